"""evaluate.py and ablate.py, on models and texts that take seconds. Where the students come from is in test_distill.py."""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import ablate
import bench
import checkpoints
import convert
import distill
import evaluate
import retrieval
import sea
from test_convert import FAMILIES, SEA, SEQ, build, recomputed, tiny, tokens
from test_distill import AS_OPTIONS, SMALL, home, run_steps, torchrun  # noqa: F401, home is a fixture


def arguments(home, *options) -> list[str]:
    return ["--model", str(home / "teacher"), "--data", str(home / "text.txt"), "--seq-len", "16", "--device", "cpu", *map(str, options)]


@pytest.fixture(scope="module")
def student(home, tmp_path_factory) -> Path:
    """A trained one, saved."""
    out = tmp_path_factory.mktemp("student")
    run_steps(home, out)
    return out / "sea"


def test_a_teacher_alone_is_measured(home, tmp_path, capsys):
    found = evaluate.main(arguments(home, "--out", tmp_path))
    assert list(found) == ["teacher"] and found["teacher"]["keys"] == 8.5 and found["teacher"]["ppl"] > 1
    assert "val ppl of tokens" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.json"]


def test_columns_of_tables_line_up(capsys):
    names = "teacher", "sea, query_stride=16, candidates=8, topk 1024"
    row = dict(ppl=12.3, keys=4.0, attention_ms=1.0, pass_ms=2.0, pass_mib=3.0, by_position=[dict(first=1, last=16, ppl=12.3)])
    one = functools.partial(retrieval.print_table, "one needle", field="length", form="{:,}")
    for show, line in ((evaluate.print_models, row), (evaluate.print_positions, row), (one, [dict(length=1024, found=0.5)])):
        show(dict.fromkeys(names, line))
        assert len({len(text) for text in capsys.readouterr().out.splitlines()[1:4]}) == 1


def test_topk_measures_one_student_at_each(home, student, tmp_path, capsys, monkeypatch):
    """Perplexity, and the time of the attention alone, of the same student."""
    timed = []
    monkeypatch.setattr(evaluate, "milliseconds", lambda run, **_: timed.append(run()) or float(len(timed)))
    monkeypatch.setattr(evaluate, "pass_cost", lambda *_: dict(pass_ms=123.4, pass_mib=5678.9))
    results = evaluate.main(arguments(home, "--students", student, "--topk", 5, 9, 20, "--look", "0.1", "1.0", "--out", tmp_path))
    at = [results[f"sea, topk {k}"] for k in (5, 9, 20)]
    assert at[1]["ppl"] == results["sea"]["ppl"] and len({row["ppl"] for row in at}) == 3
    assert at[0]["keys"] < at[1]["keys"] < at[2]["keys"]
    printed = capsys.readouterr().out
    assert "sea, topk 20" in printed and printed.count("123.4 ms    5,679 MiB") == 5  # the teacher, the student and its three
    curve = json.loads((tmp_path / "topk.json").read_text())
    assert [p["ppl"] for p in curve["points"]["sea"].values()] == [row["ppl"] for row in at]
    assert curve["lines"]["teacher"]["ppl"] == results["teacher"]["ppl"] and list(curve["lines"]) == ["teacher"]
    assert curve["lines"]["teacher"]["attention_ms"] == 1.0  # and the student's 2.0
    assert [p["attention_ms"] for p in curve["points"]["sea"].values()] == [3.0, 4.0, 5.0]
    assert {p["clock"] for p in curve["points"]["sea"].values()} == {"wall clock"} and "from q, k, v on" in curve["timed"]
    keys = [[layer.n_attended().sum().item() for layer in layers] for layers in timed[2:]]  # of both layers
    assert len(keys[0]) == 2 and keys[0] < keys[1] < keys[2] and all(isinstance(x, torch.Tensor) for x in timed[0])
    for name in ("topk.png", "sea.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "evaluate.json").read_text())
    assert saved["models"] == json.loads(json.dumps(results)) and saved["args"]["topk"] == [5, 9, 20]


def test_a_variant_is_the_student_with_those_options(home, student, tmp_path):
    """As --sea gives them, each from the student's own, at its number of keys and at each of --topk."""
    own = ["--students", student, "--topk", 20, "--out", tmp_path]
    rows = evaluate.main(arguments(home, *own, "--variant", "topk=9 query_stride=2", "--variant", "bin=1 first=1"))
    first, second = "sea, topk=9, query_stride=2", "sea, bin=1, first=1"
    names = [name for title in ("sea", first, second) for name in (title, f"{title}, topk 20")]
    assert list(rows) == ["teacher", *names] and rows[f"{first}, topk 20"]["student"] == first
    for title, options in ((first, ["topk=9", "query_stride=2"]), (second, ["bin=1", "first=1"])):
        alone = evaluate.main(arguments(home, *own, "--sea", *options))
        for name in (title, f"{title}, topk 20"):
            assert rows[name]["ppl"] == alone[name.replace(title, "sea")]["ppl"] != rows["sea"]["ppl"]
            assert rows[name]["keys"] == alone[name.replace(title, "sea")]["keys"]
    for variant, message in (("width=9", "expected topk, group, .*, got width"), ("local=9", "expected fields .* .topk: expected at least ")):
        with pytest.raises(SystemExit, match=f"^--variant: {message}"):
            evaluate.check_options(evaluate.parse(arguments(home, *own, "--variant", variant)))


@pytest.mark.parametrize("measured", [["--seq-len", 16], ["--retrieval", 16]])
def test_numbers_of_keys_that_a_student_cannot_have_are_refused_before_anything_is_measured(measured, home, student, tmp_path, monkeypatch):
    """Of every student that they are for; one without bins can have any."""
    model = convert.load(student)
    convert.set_option(model, bin=0)
    convert.save(model, tmp_path / "cells")
    convert.save(convert.attach(AutoModelForCausalLM.from_pretrained(home / "teacher"), "performer"), tmp_path / "performer")
    others = [str(tmp_path / name) for name in ("cells", "performer", "no-such-student")]
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_: pytest.fail("loaded before it refused"))
    own = ["--model", home / "teacher", "--device", "cpu", *measured, "--out", tmp_path / "out", "--topk", 5, 4, "--students", *others]
    with pytest.raises(SystemExit, match="^--topk: expected numbers of keys for the student in .*/sea, got 4 .topk: expected at least 5, since on average "):
        evaluate.main([str(x) for x in [*own, student]])
    evaluate.check_options(evaluate.parse([str(x) for x in own]))


def test_students_of_one_name_are_told_apart(home, student, tmp_path):
    convert.save(convert.load(student), tmp_path / "other/sea")
    found = evaluate.main(arguments(home, "--students", student, tmp_path / "other/sea", "--out", tmp_path))
    assert list(found) == ["teacher", str(student), str(tmp_path / "other/sea")]
    assert found[str(student)]["ppl"] == found[str(tmp_path / "other/sea")]["ppl"]


@torch.no_grad()
def test_perplexity_by_position_adds_up():
    """Each block is its tokens' mean, and all of them together are the perplexity, however many windows, chunks and blocks."""
    args, model, data = distill.parse([*SMALL, "--micro-batch", "2"]), tiny("opt"), tokens(3)
    nll = -torch.stack([model(w[None]).logits[0, :-1].log_softmax(-1).gather(1, w[1:, None])[:, 0] for w in data])
    losses = evaluate.token_losses(model, data, args, chunk=5)
    torch.testing.assert_close(losses, nll.mean(0).double(), rtol=1e-5, atol=1e-5)
    blocks = evaluate.by_position(losses, first=4)
    assert [(b["first"], b["last"]) for b in blocks] == [(1, 4), (5, 8), (9, 16), (17, 24)]  # the first token is given
    for b, part in zip(blocks, nll.split([3, 4, 8, 8], dim=1), strict=True):
        assert math.isclose(b["ppl"], part.mean().exp(), rel_tol=1e-5)
    mean = sum(math.log(b["ppl"]) * (b["last"] - max(b["first"], 2) + 1) for b in blocks) / (SEQ - 1)
    assert math.isclose(math.exp(mean), evaluate.perplexity(model, data, args), rel_tol=1e-5)
    assert [(b["first"], b["last"]) for b in evaluate.by_position(losses)] == [(1, 24)]


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["copies", "fsdp"])
def test_two_processes_measure_what_one_does(home, student, tmp_path, shard):
    """An odd number of windows, continuations too; sharded, all but times."""
    options = ["--students", student, "--topk", 6, "--eval-windows", 5, "--prompt", "The quick", "--new-tokens", 3]
    one = evaluate.main(arguments(home, *options, "--out", tmp_path / "one"))
    printed = torchrun("evaluate.py", *arguments(home, *options, "--out", tmp_path / "two"), *shard)
    assert printed.count("\nsea, topk 6 ") == 2  # in the table, and by position: only the first process speaks
    two = json.loads((tmp_path / "two/evaluate.json").read_text())["models"]
    assert one.keys() == two.keys() and ("pass_ms" in two["sea"]) == (not shard)
    for name, row in one.items():
        for field in ("ppl", "keys"):
            assert math.isclose(row[field], two[name][field], rel_tol=1e-4), (name, field)
        for a, b in zip(row["by_position"], two[name]["by_position"], strict=True):
            assert a == {**b, "ppl": pytest.approx(b["ppl"], rel=1e-4)}
    for a, b in zip(one["sea"]["layers"], two["sea"]["layers"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert one["sea"]["continuations"] == two["sea"]["continuations"]


@pytest.fixture(scope="module")
def llama(home) -> Path:
    """A folder like home/teacher with a grouped-query, rotary model."""
    tokenizer = AutoTokenizer.from_pretrained(home / "teacher")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
                         num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    convert.save(LlamaForCausalLM(config).bfloat16(), home / "llama", tokenizer)
    return home / "llama"


def test_a_grouped_query_rotary_model_end_to_end(home, llama, tmp_path, capsys, monkeypatch):
    """With all that a real one needs, in half precision as on a GPU: checkpointing and new weights only; then from its files
    positions, prompts, times and pictures."""
    monkeypatch.setattr(evaluate, "autocast", lambda args, **options: torch.autocast("cpu", torch.bfloat16, **options))
    own = ["--model", str(llama), "--data", str(home / "text.txt"), "--seq-len", "16", "--device", "cpu", "--eval-windows", "6"]
    results = distill.main([*own, *AS_OPTIONS, "--batch", "2", "--steps", "2", "--train", "sea", "--gradient-checkpointing",
                            "--method", "sea", "performer", "dense", "--out", str(tmp_path / "a")])
    names = ["sea", "performer", "dense"]
    again = evaluate.main([*own, "--students", *(str(tmp_path / "a" / name) for name in names), "--prompt", "The quick", "The lazy dog",
                           "--new-tokens", "5", "--look", "1.5", "--topk", "5", "9", "--out", str(tmp_path / "b")])
    assert again["sea, topk 9"]["ppl"] == pytest.approx(again["sea"]["ppl"], rel=1e-5)
    printed = capsys.readouterr().out
    for name in ("teacher", *names):
        row = again[name]
        assert row["ppl"] == pytest.approx(results[name], rel=1e-5) and row["pass_ms"] > 0 and row["attention_ms"] > 0
        assert row["by_position"] == [dict(first=1, last=16, ppl=pytest.approx(row["ppl"], rel=1e-4))]
        assert len(row["continuations"]) == 2 and all(f"{name:18} {text!r}" in printed for text in row["continuations"])
    assert (tmp_path / "b/sea.png").read_bytes().startswith(b"\x89PNG")
    trained = convert.load(tmp_path / "a/sea").state_dict()
    before = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["opt", "llama"])
@torch.no_grad()
def test_a_teacher_that_is_recorded_continues_as_itself(home, llama, kind):
    """sea_teacher attention with transformers' cache: the tokens that the untouched model gives, and its own next token each time."""
    folder = {"opt": home / "teacher", "llama": llama}[kind]
    args, tokenizer = evaluate.parse(["--model", str(folder), "--device", "cpu", "--new-tokens", "9"]), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = evaluate.continuation(model, tokenizer, "The quick red", args)
    model.set_attn_implementation("sea_teacher")
    assert evaluate.continuation(model, tokenizer, "The quick red", args) == expected
    x = tokenizer("The quick red", return_tensors="pt").input_ids
    assert tokenizer.decode(recomputed(model, x, torch.ones_like(x), 9)[0, x.shape[1] :], skip_special_tokens=True) == expected


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("method", ["sea", "performer", "window", "reformer", "dense", "dense_below"])
@torch.no_grad()
def test_what_is_timed_is_the_attention_of_the_model(kind, method, monkeypatch):
    model, x, timed = tiny(kind), tokens(1), []
    if method == "dense":
        model.set_attn_implementation("sea_teacher")
    elif method == "dense_below":
        convert.attach(model, **SEA, dense_below=x.shape[1] + 1)
    else:
        convert.attach(model, **SEA, method=method)
    monkeypatch.setattr(evaluate, "milliseconds", lambda run, graph, device: timed.extend(run()) or 7.0)
    assert evaluate.attention_time(model, x, distill.parse(SMALL)) == dict(attention_ms=7.0, clock="wall clock")
    with convert.record(model) as records:
        model(x, use_cache=False)
    assert all(isinstance(result, torch.Tensor) for result in timed) == method.startswith("dense")
    for r, result in zip(records, timed, strict=True):
        torch.testing.assert_close(getattr(result, "out", result), r.out)


@pytest.mark.parametrize("stride, bin", [(1, 2), (3, 2), (1, 0)])
def test_an_oracle_has_the_best_cells(home, tmp_path, stride, bin):
    """While it trains, and when it is measured from its files. With bins they are its candidates."""
    trained = distill.main([*arguments(home), *AS_OPTIONS, f"query_stride={stride}", f"bin={bin}", "--steps", "1", "--batch", "2",
                            "--method", "sea", "oracle", "--out", str(tmp_path)])
    found = evaluate.main(arguments(home, "--students", tmp_path / "sea", tmp_path / "oracle", "--out", tmp_path))
    assert {name: row["ppl"] for name, row in found.items()} == {name: pytest.approx(trained[name], rel=1e-5) for name in found}
    for ours, best in zip(found["sea"]["layers"], found["oracle"]["layers"], strict=True):
        assert ours["kl"] > ours["least"] > 0 and 0 < ours["kept"] < ours["best"] < 1
        assert best["kept"] > ours["kept"] or bin and stride > 1 and best["kept"] == ours["kept"]
        if stride == 1:  # otherwise a row serves queries whose own best cells are others
            assert best["kl"] == pytest.approx(best["least"], abs=1e-4)
            assert best["kept"] == pytest.approx(best["best"], abs=1e-6) or bin and best["kept"] < best["best"]


@pytest.mark.parametrize("processes", [None, "1", "3"])
def test_the_command_that_a_log_begins_with_can_be_typed_again(processes, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, processes) if processes else monkeypatch.delenv(name, raising=False)
    typed = ["--variant", "query_stride=8 topk=64", "--prompt", "What's \"this\"?", "", "$HOME", "--out", "a b"]
    launcher = ["torchrun", "--nproc-per-node", "3"] if processes == "3" else ["python"]
    assert shlex.split(evaluate.command_line("evaluate.py", typed)) == [*launcher, "evaluate.py", *typed]


def test_students_are_measured_one_at_a_time(home, student, tmp_path, monkeypatch):
    students = []

    def load(*args, do=evaluate.load_student, **options):
        assert all(earlier() is None for earlier in students)
        method, model = do(*args, **options)
        students.append(weakref.ref(model))
        return method, model

    monkeypatch.setattr(evaluate, "load_student", load)
    convert.save(convert.load(student), tmp_path / "other")
    evaluate.main(arguments(home, "--students", student, tmp_path / "other", "--topk", 5, "--out", tmp_path))
    assert len(students) == 2


# -- long windows ------------------------------------------------------------------------------------------------------


def test_windows_inside_documents_are_of_every_document_in_turn():
    documents = [torch.arange(7), torch.arange(100, 102), torch.arange(200, 212)]
    expected = [[0, 1, 2], [200, 201, 202], [3, 4, 5], [203, 204, 205], [206, 207, 208], [209, 210, 211]]
    for most in (None, 2, 3):
        found = evaluate.windows_inside(documents, 3, most)
        assert found.tolist() == expected[:most] and found.dtype == torch.long


def test_windows_asked_for_inside_documents_are_pieces_of_them(home, tmp_path, monkeypatch):
    """Without the token between two; those of documents in a row are not."""
    documents, found = ["The quick red fox jumps over the dog. " * n for n in (9, 1, 5)], {}
    (tmp_path / "text.txt").write_text("\n\n\n".join(documents))
    row = dict(ppl=2.0, keys=1.0, by_position=[])
    monkeypatch.setattr(evaluate, "measure", lambda model, setting: found.update(valid=setting.valid) or row)
    tokenizer, own = AutoTokenizer.from_pretrained(home / "teacher"), ["--valid-data", tmp_path / "text.txt", "--out", tmp_path]
    inside = []
    for options in (["--inside-documents"], []):
        evaluate.main(arguments(home, *own, *options))
        assert len(found["valid"]) > 5
        inside.append([any(tokenizer.decode(x) in document for document in documents) for x in found["valid"]])
    assert all(inside[0]) and not all(inside[1])
    with pytest.raises(SystemExit, match="^--inside-documents: expected a document of at least the 400 tokens of --seq-len, got [0-9]+ in"):
        evaluate.windows_inside([tokenizer(x, return_tensors="pt").input_ids[0] for x in documents], 400)


@torch.no_grad()
def test_perplexity_of_the_last_tokens_of_each_window(home, tmp_path, capsys):
    """In the table, ratios and curves; by position all are told."""
    found = {n: evaluate.main(arguments(home, "--out", tmp_path, "--from-token", n))["teacher"] for n in (1, 2, 9, 16)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float32), AutoTokenizer.from_pretrained(home / "teacher")
    args = evaluate.parse(arguments(home))
    data = evaluate.windows(evaluate.tokenize(evaluate.load_documents(args), tokenizer), 16)
    nll = -model(data).logits[:, :-1].log_softmax(-1).gather(2, data[:, 1:, None])[..., 0]  # of tokens 2-16
    for n, first in ((1, 2), (2, 2), (9, 9), (16, 16)):
        assert found[n]["ppl"] == pytest.approx(nll[:, first - 2 :].mean().exp().item(), rel=1e-4)
        assert found[n]["by_position"] == found[1]["by_position"]
    assert "no overlap, val ppl of tokens 9-16\n" in capsys.readouterr().out


CAUSAL = {kind: case for kind, case in FAMILIES.items() if case[0].endswith(("ForCausalLM", "LMHeadModel"))}
CAUSAL |= {"gemma2, soft caps": ("Gemma2ForCausalLM", dict(final_logit_softcapping=1.5)),
           "granite, a scale": ("GraniteForCausalLM", dict(logits_scaling=3.0))}


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_logits_of_a_chunk_at_a_time_are_the_models_own(kind):
    """Those of the head, scaled or capped as the model does, of a trunk that ran once; and the model is as it was."""
    model, x, seen, trunks = build(*CAUSAL[kind]), tokens(3), [], []
    expected = -model(x).logits[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0]
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    convert.attention_modules(model)[0].register_forward_hook(lambda *_: trunks.append(1))
    for chunk, n_chunks in ((5, [5, 5, 5, 5, 3]), (512, [SEQ - 1])):
        seen.clear(), trunks.clear()
        torch.testing.assert_close(evaluate.losses_in_chunks(model, x, chunk), expected, rtol=1e-5, atol=1e-5)
        assert seen == n_chunks and len(trunks) == 1
    assert model(x).logits.shape[1] == SEQ and len(trunks) == 2


def test_no_pass_makes_the_logits_of_a_whole_window(home, student, tmp_path, monkeypatch):
    """An oracle's included, which runs the teacher beside it."""
    model, seen = convert.load(student), set()
    model.config.sea_oracle = True
    convert.save(model, tmp_path / "oracle")
    monkeypatch.setattr(evaluate, "token_losses", functools.partial(evaluate.token_losses, chunk=4))
    vocabulary = model.config.vocab_size
    look = lambda module, args, output: seen.add(output.shape[1]) if getattr(module, "out_features", 0) == vocabulary else None
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        evaluate.main(arguments(home, "--students", student, tmp_path / "oracle", "--topk", "5", "--prompt", "The quick", "--new-tokens", "2",
                                "--out", tmp_path))
    finally:
        hook.remove()
    assert seen == {1, 3, 4}


@torch.no_grad()
def test_pictures_of_long_windows_are_of_their_first_tokens(tmp_path, monkeypatch, capsys):
    (student, teacher), x, drawn = other_student(), tokens(1)[0], []
    monkeypatch.setattr(evaluate, "draw_head", lambda figure, axes, images: drawn.append(images))
    args = evaluate.parse(["--model", "x", "--device", "cpu", "--look", "1.0"])
    evaluate.draw(student, teacher, x, tmp_path / "sea.png", args)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(evaluate, "DRAWN", 10)
    evaluate.draw(student, teacher, x, tmp_path / "sea.png", args)
    assert capsys.readouterr().out == f"sea.png shows the first 10 tokens of {SEQ}\n"
    for (_, whole), (_, first) in zip(*(list(images.items()) for images in drawn), strict=True):
        assert first.shape == (10, 10)
        torch.testing.assert_close(first, whole[:10, :10])


# -- retrieval ---------------------------------------------------------------------------------------------------------

LENGTH = 200  # tokens of an example


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder with a random model of 256 positions, its tokenizer, and a text to hide sentences in."""
    folder, rng = tmp_path_factory.mktemp("reader"), random.Random(0)
    words = "the old clerk went to town and saw a red house near the river while it rained".split()
    text = " ".join(" ".join(rng.choices(words, k=7)).capitalize() + "." for _ in range(200))
    (folder / "text.txt").write_text(text)
    asked = [" ".join(part for _, part in case.sentences) + case.intro + case.question + case.answer
             for case in (retrieval.needles(rng, 4), retrieval.variable_tracking(rng))]
    tokenizer = distill.tiny_tokenizer([text, *asked, " ".join(retrieval.KEYWORDS)], vocab_size=700)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    convert.save(LlamaForCausalLM(config), folder / "teacher", tokenizer)
    return folder


@pytest.fixture(scope="module")
def examples(reader) -> tuple[retrieval.Examples, PreTrainedTokenizerBase]:
    """Three of each task and depth, and their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(reader / "teacher")
    text = evaluate.tokenize([(reader / "text.txt").read_text()], tokenizer)
    return retrieval.make_examples(tokenizer, text, LENGTH, 3), tokenizer


def reading(reader, *options) -> list[str]:
    return ["--model", str(reader / "teacher"), "--data", str(reader / "text.txt"), "--device", "cpu", "--micro-batch", "4", *map(str, options)]


class Stub(torch.nn.Module):
    """A model whose next token is what a function of the tokens so far says."""

    def __init__(self, vocabulary: int, next_token):
        super().__init__()
        self.vocabulary, self.next_token = vocabulary, next_token

    def forward(self, x, use_cache, logits_to_keep):
        kept = range(x.shape[1] - logits_to_keep, x.shape[1])
        following = torch.tensor([[self.next_token(row[: i + 1]) for i in kept] for row in x.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, self.vocabulary).float())


def copied(tokens: list[int]) -> int:
    """What followed where the text ended most like now: a perfect induction head."""

    def alike(i: int) -> int:
        return next((n for n in range(i) if tokens[i - 1 - n] != tokens[-1 - n]), i)

    return tokens[max(range(1, len(tokens)), key=alike)]


def test_a_model_that_copies_finds_every_needle_and_one_that_does_not_none(examples):
    """Exactly the needles: which variable comes next is not to be copied."""
    args = evaluate.parse(["--model", "x", "--device", "cpu", "--micro-batch", "4"])
    for next_token, expected in ((copied, 1.0), (lambda tokens: 5, 0.0)):
        found = evaluate.shares_found("stub", Stub(700, next_token), [examples[0]], args)
        assert [(share["task"], share["length"]) for share in found] == [(task, LENGTH) for task in retrieval.TASKS]
        assert [share["found"] for share in found[:2]] == [expected] * 2
        assert found[0]["by_depth"] == [dict(depth=depth, found=expected) for depth in (0, 25, 50, 75, 100)]


def test_an_example_is_a_text_with_what_is_asked_for_in_it(examples):
    """Of exactly the length asked for; the needle at its depth, within a tenth; the answer at the end, not anywhere near."""
    (made, tokenizer), texts = examples, set()
    assert made.tokens.shape == (3 * 7, LENGTH) and made.tokens.dtype == torch.long
    assert made.tasks == [("one needle", d) for d in (0, 25, 50, 75, 100) for _ in range(3)] + [
        (task, None) for task in ("several needles", "variable tracking") for _ in range(3)]
    for (task, depth), x, n in zip(made.tasks, made.tokens, made.n_answer):
        prompt, answer = tokenizer.decode(x[:-n]), tokenizer.decode(x[-n:])
        texts.add(prompt)
        if task == "variable tracking":
            number = re.search(r"with the value (\d+)", prompt)[1]
            names = answer[1:].split(", VAR ")
            steps = [f"VAR {name} = {value}." for name, value in zip(names, [number, *(f"VAR {name}" for name in names)])]
            places = [prompt.index(step) for step in steps]
            assert len(names) == 3 and places == sorted(places)
            continue
        keyword = re.search(r"number for (\w+) is$", prompt)[1]
        needles = re.findall(r" The special magic number for (\w+) is (\d{7})\.", prompt)
        assert dict(needles)[keyword] == answer.strip() and len(dict(needles)) == len(needles) == (1 if depth is not None else 4)
        if depth is not None:
            before, after = prompt.split(f" The special magic number for {keyword} is{answer}.")
            before, after = before.split("\n\n", 1)[1], after.split("\n\n")[0]
            n_before, n_after = (len(tokenizer(part).input_ids) for part in (before, after))
            assert n_before / (n_before + n_after) == pytest.approx(depth / 100, abs=0.11 if depth % 100 else 0)
            if depth % 100:
                assert before.endswith(".")
    assert len(texts) == len(made.tokens)


def test_examples_are_the_same_ones_each_time(examples, reader):
    """Whatever was drawn before, and the first ones of more."""
    made, tokenizer = examples
    random.random(), torch.rand(1)
    text = evaluate.tokenize([(reader / "text.txt").read_text()], tokenizer)
    again = retrieval.make_examples(tokenizer, text, LENGTH, 4)
    kept = torch.arange(len(again.tokens)) % 4 < 3
    assert torch.equal(again.tokens[kept], made.tokens) and torch.equal(again.n_answer[kept], made.n_answer)
    assert not torch.equal(again.tokens[3], again.tokens[2])


@pytest.mark.parametrize("text", ["No end of a sentence ", "One end. And then none "])
def test_a_text_without_sentences_is_cut_anywhere(text, examples):
    tokenizer = examples[1]
    made = retrieval.make_examples(tokenizer, torch.tensor(tokenizer(text).input_ids + tokenizer(" and").input_ids * 400), LENGTH, 1)
    for (_, depth), x in zip(made.tasks[:5], made.tokens):
        before, after = re.split(r" The special magic number for \w+ is \d+\.", tokenizer.decode(x).split("\n\n")[1])
        assert len(before) / len(before + after) == pytest.approx(depth / 100, abs=0.15)


def test_what_a_tokenizer_puts_before_a_text_is_put_before_an_example(examples):
    made, tokenizer = examples
    special = lambda text, add_special_tokens=True, **options: SimpleNamespace(
        input_ids=[0] * add_special_tokens + tokenizer(text, add_special_tokens=False).input_ids)
    special.get_vocab = tokenizer.get_vocab
    found = retrieval.make_examples(special, torch.arange(2, 650), LENGTH, 1)
    assert found.tokens.shape == (7, LENGTH) and (found.tokens[:, 0] == 0).all() and (found.tokens[:, 1:] != 0).all()


@pytest.mark.parametrize("method", ["teacher", "sea"])
@torch.no_grad()
def test_an_answer_is_found_where_greedy_decoding_begins_with_it(method):
    """With a cache, a token at a time; and answers of several lengths at once, each changed in one place."""
    model, x, rows = tiny("llama"), tokens(4, 16), []
    if method == "sea":
        convert.attach(model, **SEA)
    model.generation_config.eos_token_id = None  # or it would never be chosen before min_new_tokens
    n_answer = torch.tensor([3, 5, 1, 5])
    for row, n in zip(x, n_answer):
        greedy = model.generate(row[None, :-n], attention_mask=torch.ones(1, 16 - n), do_sample=False, max_new_tokens=int(n),
                                min_new_tokens=int(n), pad_token_id=0)[0]
        rows.append(greedy)
    greedy = torch.stack(rows)
    assert retrieval.is_solved(model, greedy, n_answer).all()
    for place in range(1, 6):
        changed = greedy.clone()
        changed[:, -place] = (changed[:, -place] + 1) % 64
        # before an answer the prompt is another one
        expected = [place > n and model.generate(row[None, :-n], attention_mask=torch.ones(1, 16 - n), do_sample=False, pad_token_id=0,
                                                 max_new_tokens=int(n), min_new_tokens=int(n))[0].equal(row)
                    for row, n in zip(changed, n_answer)]
        assert retrieval.is_solved(model, changed, n_answer).tolist() == expected


def test_retrieval_is_measured_alone_and_told_in_tables(reader, tmp_path, capsys):
    """Of teacher and students, at each of --topk; perplexity and pictures are another command's."""
    model = LlamaForCausalLM.from_pretrained(reader / "teacher")
    convert.save(convert.attach(model, **SEA), tmp_path / "sea")
    convert.save(convert.attach(LlamaForCausalLM.from_pretrained(reader / "teacher"), "performer"), tmp_path / "performer")
    convert.save(LlamaForCausalLM.from_pretrained(reader / "teacher"), tmp_path / "dense")
    students = [tmp_path / name for name in ("sea", "performer", "dense")]
    found = evaluate.main(reading(reader, "--students", *students, "--topk", 5, "--retrieval", 150, LENGTH, "--retrieval-examples", 1,
                                  "--out", tmp_path / "out"))
    assert list(found) == ["teacher", "sea", "sea, topk 5", "performer", "dense"] and found["dense"] == found["teacher"]
    assert [(x["task"], x["length"]) for x in found["sea"]["retrieval"]] == [(task, n) for n in (150, LENGTH) for task in retrieval.TASKS]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["retrieval.json"]
    saved = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert saved["models"] == found and saved["args"]["retrieval"] == [150, LENGTH]
    printed = capsys.readouterr().out
    assert f"{'one needle':18} {'150 *':>9} {'200 *':>9}\n" in printed and "sea, topk 5: 0 of 7 found, in 150 tokens\n" in printed
    assert f"{'sea, topk 5':18} {'0%':>9} {'0%':>9}\n" in printed


def test_tables_of_retrieval_have_their_numbers_in_their_columns(capsys):
    shares = lambda *found: [dict(task=task, length=length, found=x) for length in (4096, 8192) for task, x in zip(retrieval.TASKS, found)]
    by_depth = [dict(depth=d, found=x) for d, x in zip(retrieval.DEPTHS, (1.0, 0.5, 0.9, 0.8, 0.7))]
    rows = {name: dict(retrieval=[x | dict(by_depth=by_depth) for x in shares(*found)]) for name, found in
            dict(teacher=(0.95, 0.8, 0.75), sea=(0.9, 0.6, 0.5)).items()}
    retrieval.print_tables(rows)
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in ("one needle 4,096 8,192", "teacher 95% 95%", "sea 90% 90%", "several needles 4,096 8,192", "teacher 80% 80%", "sea 60% 60%",
                 "variable tracking 4,096 * 8,192 *", "sea 50% 50%", "at 8,192, depth 0 % 25 % * 50 % 75 % 100 % *", "sea 100% 50% 90% 80% 70%"):
        assert line.split() in found
    assert "* the teacher itself finds less than 80%: this says little of its students".split() in found


def test_processes_share_the_examples(examples, monkeypatch):
    """Each of them sees its own, and none is missing."""
    made, ranks = examples[0], [(0, 1), (0, 2), (1, 2)]
    stub, args = Stub(700, lambda tokens: sum(tokens) % 700), evaluate.parse(["--model", "x", "--device", "cpu", "--micro-batch", "4"])
    monkeypatch.setattr(retrieval, "is_solved", lambda model, x, n: x.sum(1) % 2 == 0)
    found = []
    for rank in ranks:
        monkeypatch.setattr(evaluate, "rank_and_size", lambda rank=rank: rank)
        found.append(evaluate.solved(stub, made, args))
    assert torch.equal(found[0], made.tokens.sum(1) % 2 == 0) and torch.equal(found[1] | found[2], found[0])
    assert not (found[1] & found[2]).any() and found[1].any() and found[2].any()


@pytest.mark.parametrize("options, message", [
    (["--retrieval", "100", "257"], "--retrieval: expected at most the model's 256 positions, got 257"),
    (["--retrieval", "40"], "--retrieval: expected at least [0-9]+ tokens, got 40$"),
    (["--retrieval", "0"], "--retrieval: expected at least [0-9]+ tokens, got 0$"),
    (["--retrieval", "200", "--valid-data", "SHORT"], "--retrieval: expected a text of at least [0-9]+ tokens .*, got [0-9]+ for"),
])
def test_lengths_without_room_are_refused(options, message, reader, tmp_path):
    (tmp_path / "short.txt").write_text("The old clerk. " * 9)
    options = [str(tmp_path / "short.txt") if x == "SHORT" else x for x in options]
    with pytest.raises(SystemExit, match="^" + message):
        evaluate.main(reading(reader, *options, "--out", tmp_path))
    assert not (tmp_path / "retrieval.json").exists()


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    (["--topk", "8", "0"], "--topk: expected integers >= 1, got [8, 0]"),
    (["--new-tokens", "0"], "--new-tokens: expected an integer >= 1, got 0"),
    (["--seq-len", "1"], "--seq-len: expected an integer >= 2"),
    (["--from-token", "0"], "--from-token: expected an integer >= 1, got 0"),
    (["--from-token", "17", "--seq-len", "16"], "--from-token: expected at most the 16 tokens of --seq-len, got 17"),
    (["--retrieval", "64", "--retrieval-examples", "0"], "--retrieval-examples: expected an integer >= 1, got 0"),
    *((["--retrieval", "64", *option.split()], f"--retrieval: expected no {option.split()[0]} beside it, which it has no use for") for option in
      ("--seq-len 16", "--eval-windows 3", "--inside-documents", "--from-token 2", "--look 0.0", "--prompt x", "--variant topk=8")),
    (["--variant", "topk=8 wide=3"], "--variant: expected NAME=VALUE with one of "),
    (["--shard"], "--shard: expected several processes to spread over, under torchrun, got one"),
])
def test_bad_options_name_the_option(argv, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--model", "x", *argv])
    assert message in capsys.readouterr().err


def test_a_teacher_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--out", str(tmp_path)])
    assert "--model: expected a teacher, or one that distill.py trained in --out" in capsys.readouterr().err


def test_heads_that_the_model_lacks_are_refused(home, tmp_path):
    with pytest.raises(SystemExit, match="--look: expected layers below 2 and heads below 2, got 2.0"):
        evaluate.main(arguments(home, "--look", "2.0", "--out", tmp_path))


@pytest.mark.parametrize("prompt", ["", "The quick red fox " * 9])
def test_prompts_that_leave_no_room_are_refused(home, tmp_path, prompt):
    with pytest.raises(SystemExit, match="--prompt: expected 1 to 12 tokens, since the model has 32 positions and --new-tokens is 20, got"):
        evaluate.main(arguments(home, "--new-tokens", "20", "--out", tmp_path, "--prompt", "The quick", prompt))


@pytest.mark.parametrize("option, name", [("--data", "no.txt"), ("--valid-data", "no.txt"), ("--students", "no-such-student")])
def test_missing_files_are_named_in_one_sentence(home, tmp_path, option, name):
    with pytest.raises(SystemExit, match=f"^{option}: expected .*, got .*{name} "):
        evaluate.main(arguments(home, "--out", tmp_path, option, tmp_path / name))


@pytest.mark.parametrize("script, option", [(distill, "--load"), (evaluate, "--students")])
def test_models_that_do_not_fit_are_refused_by_name(home, tmp_path, script, option):
    """A teacher without a tokenizer or that is a student, and students of another model or cut short."""
    own = ["--data", str(home / "text.txt"), "--seq-len", "16", "--device", "cpu", "--out", str(tmp_path), option]
    start = lambda teacher, student: script.main(["--model", str(teacher), *own, str(student)])
    teacher, tokenizer = home / "teacher", AutoTokenizer.from_pretrained(home / "teacher")
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match="^--model: expected a tokenizer beside the model, got none in .*bare$"):
        start(tmp_path / "bare", teacher)
    convert.save(convert.attach(AutoModelForCausalLM.from_pretrained(teacher), **SEA), tmp_path / "student", tokenizer)
    with pytest.raises(SystemExit, match=f"^--model: expected a plain model, to be the teacher, got a student in .*student; .*{option}"):
        start(tmp_path / "student", teacher)
    config = AutoConfig.from_pretrained(teacher)
    config.num_hidden_layers += 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deeper")
    layers = config.num_hidden_layers
    with pytest.raises(SystemExit, match=f"^{option}: expected a student of --model, num_hidden_layers {layers - 1}, got {layers} in .*deeper$"):
        start(teacher, tmp_path / "deeper")
    weights = tmp_path / "student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=f"^{option}: expected a folder that distill.py wrote, got .*student"):
        start(teacher, tmp_path / "student")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_teacher_that_lacks_a_weight_is_refused(home, tmp_path, change):
    """It would be random."""
    shutil.copytree(home / "teacher", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weight = weights.pop("model.decoder.layers.0.fc1.weight")
    if change == "shape":
        weights["model.decoder.layers.0.fc1.weight"] = weight[1:].contiguous()
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="^This needed the model .*model and could not get it"):
        evaluate.main(arguments(home, "--model", tmp_path / "model", "--out", tmp_path))
    with pytest.raises(SystemExit, match="^--students: expected a folder that distill.py wrote, got .*model "):
        evaluate.main(arguments(home, "--students", tmp_path / "model", "--out", tmp_path))


def test_no_code_of_a_folder_runs(home, tmp_path, monkeypatch):
    """Whatever is answered to the question whether it may."""
    shutil.copytree(home / "teacher", tmp_path / "model")
    config = dict(model_type="strange", auto_map=dict(AutoConfig="code.C", AutoModelForCausalLM="code.M"))
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for options in (["--model", tmp_path / "model"], ["--students", tmp_path / "model"]):
        with pytest.raises(SystemExit, match="custom code"):
            evaluate.main(arguments(home, *options, "--out", tmp_path))
    assert not (tmp_path / "ran").exists()


def test_students_of_the_teachers_run_are_measured(tmp_path):
    """Not what an earlier run left beside them."""
    for name, run in dict(teacher=5, sea=5, performer=4, oracle=None).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({} if run is None else dict(sea_run=run)))
    assert evaluate.parse(["--out", str(tmp_path)]).students == [str(tmp_path / "sea")]


def test_what_an_output_cannot_encode_is_escaped(home, tmp_path, monkeypatch):
    """As that of a redirected output on Windows."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    evaluate.main(arguments(home, "--prompt", "na\u00efve \u2192", "--new-tokens", "3", "--out", tmp_path))
    output.flush()
    assert b"'na\\xefve \\u2192'" in output.buffer.getvalue() and (tmp_path / "evaluate.json").exists()


def test_a_prompt_that_the_tokenizer_fails_on_is_named(home):
    args = evaluate.parse(arguments(home, "--prompt", "one", "--new-tokens", "3"))
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    with pytest.raises(SystemExit, match=r"^--prompt: expected a text that .* takes, got 'one' \(no such text\)$"):
        evaluate.check_against_model(args, model, lambda text: (_ for _ in ()).throw(TypeError("no such text")))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_wikitext_is_one_stream_of_the_split_asked_for(split, monkeypatch):
    splits = {name: {"text": [f" {name} \n", "", " = A title = \n"]} for name in ("train", "validation", "test")}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_: splits))
    args = evaluate.parse(["--model", "opt-125m", "--split", split])
    assert evaluate.load_documents(args) == [f" {split} \n\n\n\n\n = A title = \n"]
    assert evaluate.load_texts(args, split) == ([" train \n\n\n\n\n = A title = \n"], evaluate.load_documents(args))


def test_openwebtext_is_streamed_as_far_as_it_is_wanted(tmp_path, monkeypatch):
    """The last 1,000 documents of it validate, unless others are given; a file of that name is a file."""
    read = []

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("Skylion007/openwebtext", "train", True)
        return ({"text": read.append(i) or f"document {i}"} for i in itertools.count())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(evaluate.load_openwebtext, "__defaults__", (1500,))
    monkeypatch.chdir(tmp_path)
    args = evaluate.parse(["--model", "opt-125m", "--data", "openwebtext"])
    documents, valid = evaluate.load_texts(args)
    assert documents + valid == [f"document {i}" for i in range(1500)] and len(valid) == 1000 and len(read) == 1500
    (tmp_path / "other.txt").write_text("another text")
    args.valid_data = "other.txt"
    assert [len(x) for x in evaluate.load_texts(args)] == [1500, 1]
    (tmp_path / "openwebtext").write_text("a file")
    assert evaluate.load_texts(args) == (["a file"], ["another text"])


# -- ablate.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, message", [
    ([], "--model: expected the teacher of all variants, a folder or hub id, got none"),
    (["--model", "x", "--jobs", "0"], "--jobs: expected an integer >= 1, got 0"),
    (["--model", "x", "--topk", "0"], "--topk: expected integers >= 1, got [0]"),
    (["--model", "x", "--variant=--sea topk=0"], "--sea topk: expected an integer >= 1, got 0"),
    (["--model", "x", "--topk", "32", "60", "--only", "base", "local 32"],
     ("--topk: expected numbers of keys for every variant, got 32 for local 32 "
      "(topk: expected at least 35, since on average as many first and last keys are always attended to, got 32)")),
    (["--model", "x", "--stesp", "3"], "unrecognized arguments: --stesp 3"),
])
def test_a_mistake_ends_all_ablations_before_they_begin(argv, message, capsys):
    with pytest.raises(SystemExit):
        ablate.parse(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--topk", "--lengths", "--strides", "--d-head", "--layers", "--profile"])
def test_sizes_of_the_benchmark_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        bench.parse([option, "0"])
    assert f"{option}: expected integers >= 1, got " in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in ablate.VARIANTS if name != "base"])
def test_an_ablation_changes_what_is_learned(name):
    base, other = (checkpoints.fixed_options(distill.parse([*ablate.BASE, "--model", "DIR", *options.split()]))
                   for options in ("", ablate.VARIANTS[name]))
    assert base != other


def test_ablations_run_and_are_told_in_a_table(home, tmp_path):
    names = ["base", "stride 2", "--sea cell_keys=false"]
    done = subprocess.run([sys.executable, Path(ablate.__file__), "--model", home / "teacher", "--data", home / "text.txt", *SMALL,
                           "--micro-batch", "2", "--optimizer", "warmup=0", "--steps", "2", "--topk", "6", "--jobs", "2", "--only", *names[:2],
                           f"--variant={names[2]}", "--out", tmp_path], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "ablation.json").read_text())["results"]
    assert list(results) == names and all(0.5 < r["ratio"] < 2 and 0.5 < r["topk 6"] < 2 and 0 < r["kept"] < 1 for r in results.values())
    assert len({r["ratio"] for r in results.values()}) == 3
    assert all(f"{name:30} {results[name]['ratio']:8.4f}" in done.stdout for name in names) and "topk 6" in done.stdout


# -- what is printed, drawn and written is what was measured -----------------------------------------------------------


def test_tables_have_their_numbers_in_their_columns(capsys):
    rows = {name: dict(ppl=ppl, keys=keys, attention_ms=1.25, pass_ms=22.5, pass_mib=3000.0,
                       by_position=[dict(first=1, last=4, ppl=ppl + 1), dict(first=5, last=8, ppl=ppl + 2)])
            for name, ppl, keys in (("teacher", 10.0, 64.5), ("sea", 12.0, 16.0))}
    evaluate.print_models(rows)
    evaluate.print_positions(rows)
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "val ppl ratio keys/query attention a pass memory".split() in found
    assert "sea 12.00 1.200 16.0 1.25 ms 22.5 ms 3,000 MiB".split() in found
    assert "val ppl of tokens 1-4 5-8".split() in found and "sea 13.00 14.00".split() in found


def test_curves_are_drawn_from_their_fields(tmp_path, monkeypatch):
    figures, of = [], lambda ppl, ms, **more: dict(ppl=ppl, attention_ms=ms, clock="wall clock", **more)
    monkeypatch.setattr(evaluate.pyplot(), "close", figures.append)
    rows = {"teacher": of(8.0, 5.0), "sea": of(9.5, 1.5)}
    rows |= {f"sea, topk {k}": of(11.0 - k / 2, k / 2, student="sea", topk=k) for k in (2, 4)}
    evaluate.draw_curves(rows, tmp_path / "topk", 16, "CPU")
    for axis, student, teacher in zip(figures[0].axes, ([10.0, 9.0], [1.0, 2.0]), (8.0, 5.0), strict=True):
        drawn = {line.get_label(): line for line in axis.lines}
        assert list(drawn["sea"].get_xdata()) == [2, 4] and list(drawn["sea"].get_ydata()) == student
        assert set(drawn["teacher"].get_ydata()) == {teacher}
    untimed = {name: {field: x for field, x in row.items() if field != "attention_ms" or name == "teacher"} for name, row in rows.items()}
    evaluate.draw_curves(untimed, tmp_path / "oracle", 16, "CPU")
    assert [line.get_label() for line in figures[1].axes[1].lines] == ["teacher"]


def other_student(kind: str = "opt", **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student whose weights are not its teacher's, and the teacher."""
    student, teacher = convert.attach(tiny(kind), **{**SEA, **options}), tiny(kind)
    teacher.set_attn_implementation("sea_teacher")
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return student, teacher


@pytest.mark.parametrize("bin", [2, 0])
@torch.no_grad()
def test_pictures_are_of_the_heads_asked_for_or_of_the_median_one(bin, tmp_path, monkeypatch):
    (student, teacher), dense, x, drawn = other_student(bin=bin), tiny("opt"), tokens(1), []
    dense.set_attn_implementation("eager")
    attention = lambda model: torch.cat(model(x, output_attentions=True).attentions)  # (layers, H, T, T)
    of_teacher, of_student = attention(dense), attention(student)
    shares = (of_teacher * (of_student > 0)).sum((2, 3)) / SEQ
    median = divmod(shares.flatten().argsort()[shares.numel() // 2].item(), 2)
    monkeypatch.setattr(evaluate, "draw_head", lambda figure, axes, images: drawn.append(images))
    seen = torch.ones(SEQ, SEQ).tril().bool()
    for look in ([(1, 0), (0, 1)], []):
        drawn.clear()
        args = evaluate.parse(["--model", "x", "--device", "cpu"])
        args.look = look
        evaluate.draw(student, teacher, x[0], tmp_path / "sea.png", args)
        for (layer, head), images in zip(look or [median], drawn, strict=True):
            (first, model), (_, estimate), *compete, (kept_title, kept), (_, sparse) = images.items()
            assert f"(layer {layer}, head {head})" in first and f"hold {shares[layer, head]:.0%} of" in kept_title
            assert [int(title.split(".")[0]) for title in images] == list(range(1, 6 if bin else 5))
            in_cells = (torch.arange(1, SEQ + 1) - 2).clamp(min=0)[:, None] // 2 * 2 if bin else torch.arange(1, SEQ + 1)[:, None]
            has_estimate = (torch.arange(SEQ) < in_cells) & (torch.arange(SEQ) >= bin)  # the first bin has none
            assert torch.equal(estimate > -torch.inf, has_estimate) and not estimate.isnan().any()
            total = (10**estimate).sum(1)
            torch.testing.assert_close(total[has_estimate.any(1)], torch.ones(int(has_estimate.any(1).sum())), rtol=2e-3, atol=2e-3)
            for _, candidates in compete:
                assert not (candidates & ~has_estimate).any() and candidates.sum() < has_estimate.sum()
                assert torch.equal(kept, kept & candidates | kept & ~has_estimate) and (candidates & ~kept).any()
            assert torch.equal(kept, of_student[layer, head] > 0)
            for image, weights, shown in ((model, of_teacher, seen), (sparse, of_student, kept)):
                log10 = weights[layer, head][shown].clamp(min=1e-4).log10()
                torch.testing.assert_close(image[shown], log10, rtol=1e-3, atol=1e-4)
                assert (image[~shown] == -torch.inf).all()


def test_no_single_key_is_lost_in_a_picture():
    plt = evaluate.pyplot()
    figure, axis = plt.subplots()
    image = torch.full((600, 600), -4.0)
    image[599, 100] = 0.0
    evaluate.draw_head(figure, [axis], {"": image})
    assert axis.images[0].get_array().max() == 0
    plt.close(figure)


@pytest.mark.parametrize("options", [dict(), dict(query_stride=3), dict(group="query"), dict(group="causal_batch"), dict(bin=0)])
@torch.no_grad()
def test_a_report_counts_the_attention_kept_and_the_most_that_could_be(options):
    """Query by query: the teacher's attention in the bins attended to, and in as many of the best, of all that share a choice."""
    student, teacher = other_student("llama", **options)
    config = convert.attention_modules(student)[0].sea.config
    x, args = tokens(2), evaluate.parse(["--model", "x", "--device", "cpu"])
    dense = tiny("llama")
    dense.set_attn_implementation("eager")
    of_teacher, of_student = (model(x, output_attentions=True).attentions for model in (dense, student))
    for layer, (a, weights, report) in enumerate(zip(of_teacher, of_student, evaluate.layer_report(student, teacher, x, args), strict=True)):
        assert report["kept"] == pytest.approx((a * (weights > 0)).sum(-1).mean().item(), rel=1e-4)
        if config.bin:
            mean, keep = (y.unflatten(1, (config.n_choosers, -1)).float().mean(2) for y in (a, weights > 0))  # alike in a choice
            in_bins, n_bins = (torch.stack([y[..., i : i + config.bin].sum(-1) for i in range(0, SEQ, config.bin)], -1) for y in (mean, keep))
            n_bins = (n_bins > 0).sum(-1)
            best = [row.sort(descending=True).values[:n].sum() for row, n in zip(in_bins.flatten(0, 2), n_bins.flatten())]
            assert report["best"] == pytest.approx(torch.stack(best).mean().item(), rel=1e-4)
        assert report["kept"] < report["best"] < 1 and report["kl"] > report["least"] > 0


@torch.no_grad()
def test_a_report_of_layers_is_the_mean_of_windows_however_many_at_once():
    args, (student, teacher), reports = evaluate.parse(["--model", "x", "--device", "cpu"]), other_student(), []
    for args.micro_batch in (1, 2, 3):
        reports.append(evaluate.layer_report(student, teacher, tokens(3), args))
    for report in reports[1:]:
        assert report == [pytest.approx(layer, rel=1e-4) for layer in reports[0]]


def test_a_student_is_measured_with_the_backend_asked_for(home, student, tmp_path, monkeypatch):
    """Its layers, too, and of 8 windows."""
    found = []

    def report(model, teacher, data, args, do=evaluate.layer_report):
        found.append((len(data), {m.sea.config.backend for m in convert.attention_modules(model)}))
        return do(model, teacher, data, args)

    monkeypatch.setattr(evaluate, "layer_report", report)
    evaluate.main(arguments(home, "--students", student, "--backend", "torch", "--out", tmp_path))
    assert found == [(8, {"torch"})]


@pytest.mark.parametrize("measured", [["--seq-len", 16], ["--retrieval", 16]])
def test_a_student_is_measured_with_other_fields_that_no_weight_depends_on(measured, home, student, tmp_path, monkeypatch):
    """As if they had been set before it was saved; students of other methods stay as they are."""
    given, found = ["bin=1", "candidates=3", "query_stride=2"], []
    monkeypatch.setattr(evaluate, "to_device", lambda model, args: found.append(model) or model)
    for options in (["--sea", *given], []):
        args = evaluate.parse([str(x) for x in ("--model", home / "teacher", "--device", "cpu", *measured, *options)])
        evaluate.open_student(str(student), *[evaluate.load_teacher(home / "teacher", 16)[0]] * 2, args)
    convert.set_option(found[1], bin=1, candidates=3, query_stride=2)
    x = tokens()
    assert torch.equal(found[0](x).logits, found[1](x).logits) and found[0].config.sea == found[1].config.sea
    convert.save(convert.attach(AutoModelForCausalLM.from_pretrained(home / "teacher"), "window", **SEA), tmp_path / "window")
    for options, message in ((["width=9"], "expected topk, group, .* for the student in .*/sea, which has its own of the others, got width"),
                             (["local=99"], "expected fields that the student in .*/sea can have .topk: expected at least")):
        args = [str(x) for x in ("--model", home / "teacher", *measured, "--sea", *options, "--students", tmp_path / "window")]
        evaluate.check_options(evaluate.parse(args))
        with pytest.raises(SystemExit, match="^--sea: " + message):
            evaluate.check_options(evaluate.parse([*args, str(student)]))


def test_options_of_a_saved_encoder_are_checked_as_those_of_its_layers(tmp_path):
    """Which are bidirectional, as its config says, so that no number of keys is too small for first and last ones."""
    convert.save(convert.attach(tiny("bert")), tmp_path / "student")
    saved = evaluate.saved_config(tmp_path / "student")
    config = evaluate.with_options(saved, topk=1)
    assert (config.causal, config.group, config.width, config.topk) == (False, "batch", 128, 1)
    with pytest.raises(ValueError, match="^query_stride: expected 1 unless causal"):
        evaluate.with_options(saved, query_stride=2)


@pytest.mark.parametrize("method", ["sea", "dense"])
def test_teachers_and_students_in_half_precision_are_measured_in_fp32(home, tmp_path, method):
    teacher, _ = evaluate.load_teacher(home / "teacher", 16)
    model = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float16)
    if method == "sea":
        convert.attach(model, **SEA)
    convert.save(model, tmp_path / "student")
    found, student = evaluate.load_student("--students", str(tmp_path / "student"), teacher, teacher)
    assert found == method and {p.dtype for m in (teacher, student) for p in m.parameters()} == {torch.float32}


@torch.no_grad()
def test_dropout_is_off_where_perplexity_is_measured():
    args, model = distill.parse(SMALL), tiny("opt").train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    assert evaluate.perplexity(model, tokens(3), args) == evaluate.perplexity(tiny("opt"), tokens(3), args)


def test_a_pass_that_is_timed_ends_with_the_last_tokens_logits():
    model, n_logits = tiny("opt"), set()
    model.register_forward_hook(lambda module, args, output: n_logits.add(output.logits.shape[1]))
    evaluate.pass_cost(model, tokens(1), distill.parse(SMALL))
    assert n_logits == {1}


def test_the_first_windows_are_used():
    assert evaluate.windows(torch.arange(11), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_ablation_sums_up_what_its_runs_wrote(tmp_path):
    models = {"teacher": dict(ppl=10.0), "sea": dict(ppl=12.0, layers=[dict(kl=1.0, kept=0.5), dict(kl=3.0, kept=0.7)]),
              "sea, topk 2": dict(ppl=15.0, topk=2)}
    (tmp_path / "evaluate.json").write_text(json.dumps(dict(models=models)))
    steps = [dict(name=name, ms=ms) for name, ms in (("sea", 9), ("sea", 30), ("sea", 7), ("teacher", 1))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*steps, dict(name="sea", ppl=12.0)])))
    assert ablate.summary(tmp_path) == pytest.approx({"ratio": 1.2, "topk 2": 1.5, "kl": 2.0, "kept": 0.6, "ms": 9})


@pytest.mark.parametrize("fails", ["distill.py", "evaluate.py", None])
def test_an_ablation_changes_all_options_but_its_own_and_says_what_failed(fails, tmp_path, monkeypatch, capsys):
    """A variant's options come last, an old log goes, and a failure of one is the end of it alone, and of the exit code."""
    commands = []

    def run(command, **_):
        assert not (Path(command[command.index("--out") + 1]) / "log.jsonl").exists()
        commands.append([str(x) for x in command[1:]])
        return SimpleNamespace(returncode=Path(command[1]).name == fails and "stride-2" in str(command[-1]))

    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(ablate, "summary", lambda out: {"ratio": 1.25})
    (tmp_path / "stride-2").mkdir()
    (tmp_path / "stride-2/log.jsonl").write_text("of another run")
    argv = ["--model", "DIR", "--data", "FILE", "--sea", "query_stride=3", "--steps", "7", "--topk", "32", "50"]
    chosen = ["--only", "base", "stride 2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        ablate.main([*argv, *chosen])
    trained = [distill.parse(command[1:]) for command in commands if command[0].endswith("distill.py")]
    assert [args.sea["query_stride"] for args in trained] == [3, 2]
    assert {(args.steps, args.eval_every) for args in trained} == {(7, 7)}
    measured = [evaluate.parse(command[1:]) for command in commands if command[0].endswith("evaluate.py")]
    assert all(args.topk == [32, 50] for args in measured) and len(commands) == (3 if fails == "distill.py" else 4)
    assert json.loads((tmp_path / "ablation.json").read_text())["command"][1:] == [*argv, *chosen]
    printed = capsys.readouterr().out
    assert ("stride 2: failed, see " in printed) == (fails is not None) and f"{'base':30} {1.25:8.4f}" in printed


def test_times_are_milliseconds(monkeypatch):
    clock = iter([1.0, 1.25])
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    assert evaluate.wall_milliseconds(lambda: None) == 250.0


@pytest.mark.parametrize("n, unit, first, n_keys", [(4, 1, 0, [1, 2, 1]), (8, 2, 2, [0, 4, 2])])
def test_the_best_scores_are_of_the_mean_in_each_cell(n, unit, first, n_keys):
    """Of four keys, or bins of two, in three cells, one of which holds two."""
    cells = torch.tensor([0.2, 0.5, 0.3])
    pooled = sea.PooledAttention(cells.view(1, 1, 1, 3), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), n)
    scores = evaluate.best_scores(pooled, torch.tensor([[n]]), unit, first).flatten()
    torch.testing.assert_close(scores, (cells / torch.tensor(n_keys).clamp(min=1)).log())


def test_all_processes_have_all_tokens_of_the_first(monkeypatch):
    """In parts, the last of which is shorter."""
    ids, sent, rank = torch.arange(8, dtype=torch.int32), [], 0
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate, "rank_and_size", lambda: (rank, 2))
    monkeypatch.setattr(evaluate, "over_processes", lambda *_: [8.0])
    monkeypatch.setattr(evaluate.dist, "broadcast", lambda x, _: sent.append(x.clone()) if rank == 0 else x.copy_(sent.pop(0)))
    args = argparse.Namespace(device="cpu")
    assert torch.equal(evaluate.from_first_process(ids, args, part=3), ids) and len(sent) == 3
    rank = 1
    assert torch.equal(evaluate.from_first_process(None, args, part=3), ids) and not sent


@pytest.mark.parametrize("option, x", [([], "keys"), (["--time"], "attention_ms")])
def test_the_figure_of_keys_is_of_what_was_measured(option, x, tmp_path, monkeypatch):
    """Each student at its own number of keys and at each of --topk, over dense; models of several reports in one panel. Against
    time points of fewer than all keys bear their number."""
    row = lambda ppl, keys, **more: dict(ppl=ppl, keys=keys, attention_ms=keys / 2, **more)
    reports = (dict(teacher=row(11.0, 64.0), dense=row(10.0, 64.0), performer=row(90.0, 64.0)),
               {"teacher": row(11.0, 64.0), "sea": row(12.0, 16.0), "sea, topk 8": row(14.0, 8.0, student="sea")})
    for i, models in enumerate(reports):
        (tmp_path / f"{i}.json").write_text(json.dumps(dict(models=models)))
    names = runpy.run_path(str(Path(evaluate.__file__).parent / "results/keys.py"))
    scale = 1 if x == "keys" else 0.5
    assert names["lines"](reports[0] | reports[1], x) == dict(
        teacher=[(64 * scale, 1.1, 64.0)], dense=[(64 * scale, 1.0, 64.0)], performer=[(64 * scale, 9.0, 64.0)],
        sea=[(8 * scale, 1.4, 8.0), (16 * scale, 1.2, 16.0)])
    untimed = {name: dict(ppl=x["ppl"], keys=x["keys"]) for name, x in reports[0].items()}
    assert names["lines"](untimed, "attention_ms") == {}
    pytest.importorskip("matplotlib", reason="draws the figure")
    figure = tmp_path / "figure.png"
    argv = ["keys.py", *option, str(figure), f"a title={tmp_path}/0.json,{tmp_path}/1.json"]
    with mock.patch.object(sys, "argv", argv):
        runpy.run_path(str(Path(evaluate.__file__).parent / "results/keys.py"), run_name="__main__")
    assert figure.read_bytes().startswith(b"\x89PNG")
    variants = {"sea, bin=4": row(11.0, 16.0, student="sea, bin=4"), "sea, bin=4, topk 8": row(12.0, 8.0, student="sea, bin=4"),
                "sea, bin=4, first=0": row(11.0, 12.0, student="sea, bin=4, first=0")}
    (tmp_path / "2.json").write_text(json.dumps(dict(models=variants)))
    figures = []
    monkeypatch.setattr(evaluate.pyplot(), "close", figures.append)
    names["draw"](str(figure), {"a title": ",".join(f"{tmp_path}/{i}.json" for i in range(3))}, x)
    axis = figures[0].axes[0]
    assert sorted(text.get_text() for text in axis.texts) == (["12", "16", "16", "8", "8"] if option else [])
    assert [line.get_label() for line in axis.lines[:2]] == ["sea, as trained", "sea, bin=4"]
