"""The main job end to end, on models and texts that take seconds: distill.py, and the README's own code.
What measures it is in test_evaluate.py."""

import copy
import errno
import functools
import gc
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM,
                          PreTrainedTokenizerFast)

import ablate
import checkpoints
import convert
import distill
import evaluate
import sea
from test_convert import SEA, SEQ, VOCAB, tiny, tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a saved OPT, its tokenizer, and texts: what a user's own model looks like."""
    folder = tmp_path_factory.mktemp("home")
    text = "\n\n\n".join(f"The {a} {b} jumps over the {c} dog." for a in ("quick", "slow") for b in ("red", "brown") for c in ("lazy", "old"))
    (folder / "text.txt").write_text(text * 20, encoding="utf-8")
    tokenizer = distill.tiny_tokenizer([text], vocab_size=300)
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
                       num_attention_heads=2, max_position_embeddings=32, dropout=0.0, init_std=0.3)
    torch.manual_seed(0)
    convert.save(OPTForCausalLM(config).half(), folder / "teacher", tokenizer)  # as the real OPT is stored
    return folder


AS_OPTIONS = ["--sea", *(f"{name}={x}" for name, x in SEA.items())]
SMALL = ["--seq-len", "16", "--batch", "2", *AS_OPTIONS, "--device", "cpu"]


def test_own_model_and_text_end_to_end(home, tmp_path, capsys):
    """Every method trains; the students and the log are there; evaluate.py measures the same again."""
    own = ["--model", str(home / "teacher"), "--data", str(home / "text.txt")]
    out = tmp_path / "out"
    results = distill.main([*own, *SMALL, "--out", str(out), "--steps", "4", "--micro-batch", "1", "--eval-every", "2", "--optimizer", "lr=1e-3",
                            "lr_new=1e-2", "--loss", "score=1", "--method", "sea", "performer", "window", "reformer", "dense"])
    printed = capsys.readouterr().out
    assert results["dense before"] == results["teacher"] and results["sea"] != results["sea before"]
    for line in ("sea step 00004/00004 (100%) | loss ", "keys/query", *(f"\n{name} " for name in results)):
        assert line in printed
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in losses:
        if "terms" in record:
            assert math.isclose(record["loss"], sum(record["terms"].values()))
    assert {"ce", "hidden", "kd", "context", "score", "estimate"} == set(next(r for r in losses if r.get("name") == "sea")["terms"])
    steps = [r for r in losses if r.get("name") == "dense" and "lr" in r]
    assert [r["lr"] for r in steps] == [1e-3] * 4  # the paper's schedule is constant

    assert results["window"] != results["window before"] != results["sea before"] != results["reformer before"]

    students = [str(out / name) for name in ("sea", "performer", "window", "reformer", "dense")]
    again = evaluate.main([*own, "--seq-len", "16", "--device", "cpu", "--students", *students, "--topk", "16", "--out", str(tmp_path / "eval")])
    for name in ("teacher", "sea", "performer", "window", "reformer", "dense"):
        assert math.isclose(again[name]["ppl"], results[name], rel_tol=1e-5)
    for name in ("sea", "window"):  # at most topk, fewer where a query has fewer before it
        assert 5 < again[name]["keys"] < SEA["topk"]
    for name in ("sea", "reformer"):
        assert again[f"{name}, topk 16"]["ppl"] != again[name]["ppl"] and again[f"{name}, topk 16"]["keys"] > again[name]["keys"]


def test_no_argument_trains_its_own_teacher(tmp_path):
    """The default jobs in small: the real OPT, a BPE trained on the spot, Python's own documentation; then what they left, measured."""
    results = distill.main(["--teacher-steps", "2", "--steps", "1", "--eval-windows", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert set(results) == {"teacher"} | {f"{m}{when}" for m in ("sea", "performer", "dense") for when in (" before", "")}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")) is OPTForCausalLM
    assert convert.load(tmp_path / "sea").config.sea["method"] == "sea"
    again = evaluate.main(["--eval-windows", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert {name: row["ppl"] for name, row in again.items()} == {name: pytest.approx(results[name], rel=1e-5) for name in again}
    assert list(again) == ["teacher", "sea", "performer", "dense"]


def test_a_saved_student_trains_further(home, tmp_path):
    run_steps(home, tmp_path / "a")
    first = last_results(tmp_path / "a")
    distill.main([*arguments(home, tmp_path / "b", "--seq-len", "16", "--batch", "2", "--device", "cpu"), "--load", str(tmp_path / "a/sea")])
    assert last_results(tmp_path / "b")["sea before"] == pytest.approx(first["sea"], rel=1e-6)
    assert last_results(tmp_path / "b")["sea"] != last_results(tmp_path / "b")["sea before"]
    assert convert.load(tmp_path / "b/sea").config.sea["width"] == 8  # its own
    with pytest.raises(SystemExit, match="^--out: expected another folder than that of .*a/sea, which would be lost"):
        distill.main([*arguments(home, tmp_path / "a", "--seq-len", "16", "--batch", "2", "--device", "cpu"), "--load", str(tmp_path / "a/sea")])


@pytest.mark.parametrize("saved, given, refused", [
    ({}, ["topk=20", "bin=4", "local=3"], None),
    ({}, ["topk=4"], "--sea topk: expected at least 5, since on average as many first and last keys are always attended to, got 4"),
    ({}, ["bin=0"], None),
    (dict(group="kv"), ["bin=0"], "--sea bin: expected bins for group kv, got 0"),
    (dict(bin=0), ["topk=2"], None),
    (None, ["topk=2"], None),  # from before there were bins
    (None, ["group=kv"], "--sea bin: expected bins for group kv, got 0")])
def test_options_of_a_saved_student_have_to_go_with_its_own(saved, given, refused, tmp_path, capsys):
    student = convert.attach(tiny("opt"), **{**SEA, **(dict(bin=0, group="causal_batch") if saved is None else saved)})
    if saved is None:
        student.config.sea = {name: x for name, x in student.config.sea.items() if name not in convert.OF_BINS}
    convert.save(student, tmp_path / "student")
    argv = ["--load", str(tmp_path / "student"), "--sea", *given]
    if refused is None:
        args = distill.parse(argv)
        convert.set_option(convert.load(tmp_path / "student"), **args.sea)
        return
    with pytest.raises(SystemExit):
        distill.parse(argv)
    assert refused in capsys.readouterr().err


def student_and_teacher(kind="opt", **options):
    teacher = tiny(kind).requires_grad_(False)
    teacher.set_attn_implementation("sea_teacher")
    return convert.attach(tiny(kind), **{**SEA, **options}), teacher


def test_distillation_lowers_every_term():
    student, teacher = student_and_teacher()
    optimizer, x = distill.make_optimizer(student, distill.OptimizerConfig(lr=1e-3, lr_new=1e-2)), tokens(8)
    first = distill.distillation_losses(student, teacher, x, distill.LossWeights(ce=0.0, score=1.0))
    for _ in range(60):
        terms = distill.distillation_losses(student, teacher, x, distill.LossWeights(ce=0.0, score=1.0))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    # Two random models are close in their own scores from the start, so that this term may only stay small.
    for name in ("hidden", "kd", "context", "estimate"):
        assert terms[name] < first[name], name


@pytest.mark.parametrize("kind, options", [("opt", dict(cell_keys=False)), ("opt", {}), ("llama", {}), ("llama", dict(cnn=False)), ("llama", dict(bin=0))])
def test_every_new_weight_learns(kind, options):
    student, teacher = student_and_teacher(kind, **options)
    sum(distill.distillation_losses(student, teacher, tokens(), distill.LossWeights(score=1.0)).values()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name  # softmax ignores a constant added to all keys


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_autocast_reaches_queries_keys_and_values_alike(kind):
    """fp32 weights in half precision, as on a GPU, where a rotary embedding leaves queries and keys in fp32."""
    teacher, student = tiny(kind).requires_grad_(False), convert.attach(tiny(kind), **SEA)
    teacher.set_attn_implementation("sea_teacher")
    with torch.autocast("cpu", torch.bfloat16):
        with convert.record(teacher) as a, convert.record(student) as b:
            for model in (teacher, student):
                model(tokens(), use_cache=False)
        assert {x.dtype for r in a + b for x in (r.q, r.k, r.v, r.out)} == {torch.bfloat16}
        terms = distill.distillation_losses(student, teacher, tokens(), distill.LossWeights(score=1.0))
        prompt = dict(input_ids=tokens(n=5), attention_mask=torch.ones(2, 5, dtype=torch.long))
        out = student.eval().generate(**prompt, max_new_tokens=4, min_new_tokens=4, pad_token_id=1)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters()) and out.shape == (2, 9)


@pytest.mark.parametrize("alone", [0, 1])
def test_heads_of_some_layers_share_a_choice(alone):
    """Those of the other have a key/value head each; the loss is the mean over layers that have it."""
    teacher = tiny("llama").requires_grad_(False)
    attention, other = (convert.attention_modules(teacher)[i] for i in (alone, 1 - alone))
    attention.num_key_value_groups = 1
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, copy.deepcopy(attention.q_proj))
    student = convert.attach(copy.deepcopy(teacher).requires_grad_(True), **SEA)
    teacher.set_attn_implementation("sea_teacher")
    assert [m.sea.config.is_shared for m in convert.attention_modules(student)] == [alone == 1, alone == 0]
    terms, weights = distill.distillation_losses(student, teacher, tokens(), distill.LossWeights()), distill.LossWeights()
    with convert.record(teacher) as a, convert.record(student) as b:
        for model in (teacher, student):
            model(tokens(), use_cache=False)
    torch.testing.assert_close(terms["choice"], distill.layer_losses(b[1 - alone], a[1 - alone], weights)["choice"])
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("kind, bin", [("opt", 2), ("opt", 0), ("llama", 2)])
@torch.no_grad()
def test_losses_are_those_of_the_method(kind, bin):
    """Section 6, by hand, from a model's own outputs. With bins the last keys are in no cell, and cells are of whole bins; where
    heads share a choice of them, it has a loss."""
    student, teacher = student_and_teacher(kind, bin=bin)
    x, kl = tokens(), lambda p, q: (p * (p.log() - q.log())).sum(-1).mean()
    terms = distill.distillation_losses(student, teacher, x, distill.LossWeights(score=1.0))
    with convert.record(student) as s, convert.record(teacher) as t:
        a, b = (model(x, output_hidden_states=True) for model in (student, teacher))
    mean = lambda values: torch.stack(list(values)).mean()
    seen = torch.arange(1, SEQ + 1).expand(2, SEQ)
    cells = dict(in_cells=(seen - 2).clamp(min=0) // 2 * 2, unit=2, first=2) if bin else dict(in_cells=seen)
    expected = {
        "ce": 0.1 * torch.nn.functional.cross_entropy(a.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()),
        "hidden": 5 * mean((u - v).square().mean() for u, v in zip(a.hidden_states, b.hidden_states)),
        "kd": 0.2 * kl(b.logits.softmax(-1), a.logits.softmax(-1)),
        "context": mean((u.out - v.out).square().mean() for u, v in zip(s, t)),
        "score": mean(sea.score_loss(u.q * u.scale, u.k, v.q * v.scale, v.k, seen, 1.0) for u, v in zip(s, t)),
        "estimate": mean(sea.estimate_loss(u.sea.scores, sea.pool_attention(v.q, v.k, seen, 8, v.scale, **cells), **cells)
                         for u, v in zip(s, t)),
    }
    if kind == "llama":
        alike = torch.full((s[0].config.n_head,), s[0].config.kv_heads / s[0].config.n_head)
        expected["choice"] = mean(sea.choice_loss(alike, u.q, u.k, v.q, v.k, u.config, u.scale, v.scale) for u, v in zip(s, t))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("chunk", [1, 7, 10, 100])
def test_logit_losses_in_chunks_are_those_of_all_tokens(chunk):
    """Values and gradient, in fp64, in chunks that end within a sequence or do not."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 10, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randint(13, (2, 10), generator=generator)
    student.requires_grad_(True)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    ce, kd = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), x[:, 1:].flatten()), (p * (p.log() - log_q)).sum(-1).mean()
    our_ce, our_kd = distill.logit_losses(student, teacher, x, chunk)
    torch.testing.assert_close((our_ce, our_kd), (ce, kd))
    torch.testing.assert_close(torch.autograd.grad(our_ce + 2 * our_kd, student), torch.autograd.grad(ce + 2 * kd, student))


# -- data --------------------------------------------------------------------------------------------------------------


def test_each_step_has_windows_of_its_own():
    """The same again for the same step and seed, others for another; in the end all there are, first and last."""
    stream = torch.arange(10, 21, dtype=torch.int32)
    batch = lambda step, seed=0: distill.batch_of(step, stream, 8, 4, seed)
    assert torch.equal(batch(1), batch(1)) and batch(1).shape == (4, 8) and batch(1).dtype == torch.int64
    assert not torch.equal(batch(1), batch(2)) and not torch.equal(batch(1), batch(1, seed=1))
    windows = torch.cat([batch(step) for step in range(1, 31)])
    assert torch.equal(windows, windows[:, :1] + torch.arange(8)) and set(windows[:, 0].tolist()) == {10, 11, 12, 13}


def test_another_seed_draws_other_features_and_dropout(monkeypatch):
    """On the CPU, too, whose generator takes the lower 32 bits of a seed; redraws differ from step to step."""
    student, teacher = student_and_teacher()
    drawn, lost = [], []
    monkeypatch.setattr(distill, "batch_of", lambda *_: tokens())
    for layer in student.get_decoder().layers:
        layer.dropout = 0.5
    student.train()
    for seed, step in ((0, 2), (1, 2), (0, 3)):
        args = distill.parse([*SMALL, "--seed", str(seed), "--optimizer", "redraw_every=1"])
        job = distill.Job(args, None, None, teacher, None, None, None, 1.0, [])
        lost.append(distill.add_gradients(student, student, step, job)["context"])
    for seed, step in ((0, 2), (1, 2), (0, 3)):
        distill.redraw_features(student, step, distill.parse([*SMALL, "--seed", str(seed), "--optimizer", "redraw_every=1"]))
        drawn.append(convert.attention_modules(student)[0].sea.projection[0, 0].item())
    assert len(set(drawn)) == 3 and len(set(lost)) == 3


@pytest.mark.parametrize("documents", [["a" * 100], ["a" * 5, "b" * 95], ["a" * 50, "b" * 45, "c" * 5], ["a" * 9, "b"] * 10])
def test_validation_and_training_text_are_apart(documents):
    """Together all of it in its order, a tenth or a little more or less to validate on."""
    train, valid = evaluate.last_tenth_apart(documents)
    assert "".join(train + valid) == "".join(documents) and 4 <= 100 * len("".join(valid)) / len("".join(documents)) <= 12


def test_an_end_of_text_token_stands_before_each_of_several_documents(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "teacher")
    a, b = (tokenizer(text).input_ids for text in ("The quick", " dog"))
    end = tokenizer.eos_token_id
    assert evaluate.tokenize(["The quick", " dog"], tokenizer).tolist() == [end, *a, end, *b]
    assert evaluate.tokenize(["The quick"], tokenizer).tolist() == a


def test_an_id_just_beyond_the_embedding_is_refused(home):
    tokenizer, args = AutoTokenizer.from_pretrained(home / "teacher"), distill.parse([*SMALL])
    ids = tokenizer("The quick").input_ids

    def streams(known: int):
        teacher = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(known, 1))
        return evaluate.token_streams(lambda: [["The quick"]], tokenizer, teacher, args)

    assert streams(max(ids) + 1)[0].tolist() == ids
    with pytest.raises(SystemExit, match=f"^--model: expected a tokenizer whose ids are below {max(ids)}, .* got {max(ids)} from "):
        streams(max(ids))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama's: a space before the text, and no cuts between words before merges."""
    words = "The quick brown fox jumps over lazy dogs".split()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?", fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"),
                                                            tokenizers.normalizers.Replace(" ", "\u2581")])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(words * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_pieces_of_a_document_have_the_ids_of_the_whole(kind, monkeypatch):
    text = "The quick brown  fox jumps\n\nover the lazy\ndog's   dogs. \n" * 12 + "x" * 300 + " end " * 30
    tokenizer = distill.tiny_tokenizer([text], 300) if kind == "bytes" else sentencepiece_like()
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    found = [*evaluate.pieces(text, tokenizer, size=40, context=30)]
    assert len(found) > 10 and [i for piece in found for i in ids(piece)] == ids(text)
    documents = [text, "The end"] * 3
    whole = evaluate.tokenize(documents, tokenizer).tolist()
    assert evaluate.tokenize(documents, tokenizer, at_once=700).tolist() == whole
    monkeypatch.setattr(evaluate, "pieces", functools.partial(evaluate.pieces, size=40, context=30))
    assert evaluate.tokenize(documents, tokenizer, at_once=90).tolist() == whole  # only a document's first piece begins one


def test_documents_without_text_are_none(tmp_path):
    """Nor is the byte order mark, which Windows puts first, a part of the first one."""
    (tmp_path / "text").write_bytes("\ufeffone\n\n\ntwo\n\n\n \n\n\n\n\n\n".encode())
    assert evaluate.read_documents("--data", tmp_path / "text") == ["one", "two"]
    (tmp_path / "text").write_text("\n" * 7)
    with pytest.raises(SystemExit, match="^--data: expected a text file in UTF-8, got .*text, which holds no text$"):
        evaluate.read_documents("--data", tmp_path / "text")


def test_a_text_too_short_is_named(home, tmp_path):
    (tmp_path / "short").write_text("dog")
    for option, text in (("--data", "training"), ("--valid-data", "validation")):
        with pytest.raises(SystemExit, match=f"^--seq-len: expected at most the . tokens of the {text} text, got 16$"):
            run_steps(home, tmp_path, "--valid-data", str(home / "text.txt"), option, str(tmp_path / "short"))


def test_ids_that_the_model_does_not_know_are_refused(home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="^--model: expected a tokenizer whose ids are below 200, .*, got 2.. from .*model$"):
        run_steps(home, tmp_path, "--model", str(tmp_path / "model"))


@pytest.mark.parametrize("change", ["order", "text", "teacher"])
def test_the_fingerprint_tells_texts_and_teachers_apart(change):
    teacher, stream = tiny("opt"), torch.arange(50, dtype=torch.int32)
    before = distill.fingerprint(stream, teacher)
    if change == "order":
        stream = stream.flip(0)
    elif change == "text":
        stream = stream[:-1]
    else:
        next(teacher.parameters()).data[0] += 1
    assert distill.fingerprint(stream, teacher) != before


# -- training ----------------------------------------------------------------------------------------------------------


def arguments(home, out, *small) -> list[str]:
    return ["--model", str(home / "teacher"), "--data", str(home / "text.txt"), *(small or SMALL), "--out", str(out), "--method", "sea",
            "--steps", "3", "--optimizer", "lr=1e-3", "lr_new=1e-2"]


def run_steps(home, out, *options):
    """The weights of a student after a few steps, and the step records."""
    distill.main([*arguments(home, out), *options])
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return convert.load(out / "sea").state_dict(), [r for r in records if "terms" in r]


def last_results(out: Path) -> dict[str, float]:
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["results"]


def terms_of(steps: list[dict]) -> list[tuple]:
    return [(r["step"], r["terms"], r["lr"]) for r in steps]


def test_killed_and_resumed_is_the_run_that_was_not(home, tmp_path, monkeypatch):
    """2 + resume + 2 steps equal 4, bit for bit, though the kill comes in the middle of the third; dropout, schedule, redraws and
    data included. Other numbers in the options are refused, a later evaluation is not."""
    options = ["--steps", "4", "--eval-every", "2", "--optimizer", "schedule=cosine", "warmup=2", "redraw_every=3"]
    monkeypatch.setattr(evaluate, "load_teacher", lambda *args, load=evaluate.load_teacher: with_dropout(load(*args)))
    whole, steps = run_steps(home, tmp_path / "whole", *options, "--eval-every", "1")  # of which nothing depends
    assert [r["lr"] for r in steps] == pytest.approx([1e-2 * x for x in (0.5, 1, 0.75, 0.25)], rel=1e-5)
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def kill(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", kill)
    with pytest.raises(KeyboardInterrupt):
        run_steps(home, tmp_path / "parts", *options)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(SystemExit, match="--resume: expected lr 0.001 as in .*run.json, got 0.002"):
        run_steps(home, tmp_path / "parts", *options, "--resume", "--optimizer", "lr=2e-3")
    with pytest.raises(SystemExit, match="--resume: expected group kv as in .*run.json, got query"):  # a default then
        run_steps(home, tmp_path / "parts", *options, "--resume", "--sea", "group=query")
    with monkeypatch.context() as changed, pytest.raises(SystemExit, match="--resume: expected the text and the teacher as in .*run.json"):
        changed.setattr(evaluate, "tokenize", lambda *x, tokenize=evaluate.tokenize: tokenize(*x)[:-1])  # the same file, edited
        run_steps(home, tmp_path / "parts", *options, "--resume")
    parts, resumed = run_steps(home, tmp_path / "parts", *options, "--resume")
    assert terms_of(resumed) == terms_of(steps)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    again, still = run_steps(home, tmp_path / "parts", *options, "--resume", "--eval-windows", "5", "--eval-every", "3")  # nothing is left to do
    assert len(still) == len(resumed) and all(torch.equal(again[name], value) for name, value in whole.items())


TINY = ["--device", "cpu", "--teacher-steps", "2", "--steps", "1", "--eval-windows", "2", "--method", "sea"]


def test_a_run_takes_nothing_from_an_earlier_one_in_its_folder(tmp_path, monkeypatch):
    """Killed while its teacher trains, it resumes with a teacher and a student of its own and the options it began with."""
    job = lambda out, *options: distill.main([*TINY, "--out", str(tmp_path / out), *options])
    whole = job("whole", "--seed", "7")
    job("parts", "--seed", "0")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(distill, "clip_gradients", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        job("parts", "--seed", "7")
    before = (tmp_path / "parts/sea.ckpt").read_bytes()
    with pytest.raises(SystemExit, match="^--resume: expected seed 7 as in .*run.json, got 0$"):
        job("parts", "--seed", "0", "--resume")
    assert (tmp_path / "parts/sea.ckpt").read_bytes() == before
    assert job("parts", "--seed", "7", "--resume") == whole
    numbers = {evaluate.run_of(tmp_path / "parts" / name) for name in ("teacher", "sea")}
    assert numbers == {json.loads((tmp_path / "parts/run.json").read_text())["run"]}


def test_a_run_that_is_refused_leaves_the_one_before(home, tmp_path):
    run_steps(home, tmp_path, "--steps", "1")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.name != "log.jsonl"}
    for wrong in (["--data", "no.txt"], ["--model", str(tmp_path / "sea")], ["--seq-len", "33"]):
        with pytest.raises(SystemExit):
            run_steps(home, tmp_path, *wrong)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("something", ["file", "folder"])
def test_what_is_no_model_is_not_replaced(home, tmp_path, something):
    """And found before any work is done."""
    (tmp_path / "sea").write_text("mine") if something == "file" else shutil.copytree(home, tmp_path / "sea")
    with pytest.raises(SystemExit, match=f"^--out: expected a new folder, or one of a saved model and nothing else, got {tmp_path}/sea, "):
        run_steps(home, tmp_path)
    assert (tmp_path / "sea").exists() and not (tmp_path / "run.json").exists()


def test_a_teacher_that_knows_nothing_is_refused(home, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "teacher")
    model.get_input_embeddings().weight.data.fill_(math.nan)
    shutil.copytree(home / "teacher", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="^--model: expected a teacher of finite perplexity, got nan from .*model$"):
        run_steps(home, tmp_path, "--model", str(tmp_path / "model"))


def test_resume_where_no_run_is_begins_one(home, tmp_path, capsys):
    run_steps(home, tmp_path, "--steps", "1", "--resume")
    assert f"--resume: there is no run in {tmp_path} yet, one begins" in capsys.readouterr().out
    run_steps(home, tmp_path, "--steps", "1", "--resume")
    assert "sea resumes after step 00001" in capsys.readouterr().out


def test_checkpoints_of_other_runs_and_methods_are_not_resumed(home, tmp_path, capsys):
    whole, _ = run_steps(home, tmp_path / "a", "--steps", "1", "--method", "sea", "performer")
    run_steps(home, tmp_path / "b", "--steps", "1")
    shutil.copy(tmp_path / "b/sea.ckpt", tmp_path / "a/sea.ckpt")  # the same options, another job
    again, _ = run_steps(home, tmp_path / "a", "--steps", "1", "--method", "sea", "performer", "--resume")
    printed = capsys.readouterr().out
    assert f"{tmp_path}/a/sea.ckpt is of an earlier run: sea begins anew" in printed
    assert "performer resumes after step 00001" in printed
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    shutil.copy(tmp_path / "a/performer.ckpt", tmp_path / "a/sea.ckpt")
    with pytest.raises(SystemExit, match="^--resume: expected a checkpoint of sea, got one of performer in .*sea.ckpt$"):
        run_steps(home, tmp_path / "a", "--steps", "1", "--resume")


def test_options_within_a_checkpoint_have_to_be_the_runs(home, tmp_path):
    run_steps(home, tmp_path, "--steps", "1")
    saved = torch.load(tmp_path / "sea.ckpt")
    torch.save(saved | dict(args=saved["args"] | dict(seed=7)), tmp_path / "sea.ckpt")
    with pytest.raises(SystemExit, match="^--resume: expected seed 7 as in .*sea.ckpt, got 0$"):
        run_steps(home, tmp_path, "--steps", "1", "--resume")


def test_processes_have_to_share_their_folder(home, tmp_path, monkeypatch):
    """One that finds no checkpoint would train other weights than the rest."""
    student, _ = student_and_teacher()
    args = distill.parse(arguments(home, tmp_path, "--resume"))
    monkeypatch.setattr(evaluate, "over_processes", lambda values, *_: [values[0] + 3])  # another process has step 3
    with pytest.raises(SystemExit, match="^--out: expected one folder that all processes share, got .* with sea of step 0 in one"):
        checkpoints.resume("sea", student, None, args)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(home, tmp_path, capsys):
    """One flipped bit of a weight is noticed; the steps since are done again."""
    whole, steps = run_steps(home, tmp_path, "--steps", "3", "--eval-every", "1")
    file = tmp_path / "sea.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again, more = run_steps(home, tmp_path, "--steps", "3", "--eval-every", "1", "--resume")
    printed = capsys.readouterr().out
    assert re.search(r"damaged: .*sea.ckpt \(.* in it differs from its checksum\); sea goes on from .*sea.ckpt.1", printed)
    assert terms_of(more[3:]) == terms_of(steps[2:])
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("change", [
    lambda state: state.clear(),
    lambda state: state.pop(next(iter(state))),
    lambda state: state.update(more=next(iter(state.values())))], ids=["none", "one less", "one more"])
def test_a_checkpoint_has_all_of_the_state_and_no_more(home, one_step, tmp_path, part, change):
    """What it lacks would stay as fresh as it is."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / "sea.ckpt")
    change(saved["model"] if part == "model" else saved["optimizer"]["state"])
    torch.save(saved, tmp_path / "sea.ckpt")
    what = dict(model="weights", optimizer="optimizer's state")[part]
    with pytest.raises(SystemExit, match=f"^--resume: expected a checkpoint with sea's {what}, .*: .*, got "):
        run_steps(home, tmp_path, "--steps", "1", "--resume")


def test_a_checkpoint_of_other_groups_or_without_a_part_is_refused(home, one_step, tmp_path):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / "sea.ckpt")
    torch.save({name: x for name, x in saved.items() if name != "args"}, tmp_path / "sea.ckpt")
    with pytest.raises(SystemExit, match="^--resume: expected a whole checkpoint, got .*sea.ckpt .it lacks args."):
        run_steps(home, tmp_path, "--steps", "1", "--resume")
    first, second, *_ = saved["optimizer"]["param_groups"]
    second["params"].append(first["params"].pop())  # another learning rate
    torch.save(saved, tmp_path / "sea.ckpt")
    with pytest.raises(SystemExit, match="^--resume: expected a checkpoint whose optimizer groups weights as sea's, got another$"):
        run_steps(home, tmp_path, "--steps", "1", "--resume")


def test_a_checkpoint_runs_no_code(home, one_step, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    torch.save(torch.load(tmp_path / "sea.ckpt") | dict(code=Code()), tmp_path / "sea.ckpt")
    with pytest.raises(SystemExit, match="^--resume: expected a whole checkpoint, got .*sea.ckpt"):
        run_steps(home, tmp_path, "--steps", "1", "--resume")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("lost", ["removed", "emptied"])
def test_resume_writes_a_lost_student_again(home, one_step, tmp_path, lost):
    whole = convert.load(one_step / "sea").state_dict()
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sea/config.json").write_bytes(b"") if lost == "emptied" else shutil.rmtree(tmp_path / "sea")
    again, _ = run_steps(home, tmp_path, "--steps", "1", "--resume")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(home, tmp_path, monkeypatch, capsys, number):
    """Saved, with the shell's code for it; resumed, it is the run that was not stopped."""
    whole, steps = run_steps(home, tmp_path / "whole")
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return clip(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
        run_steps(home, tmp_path / "parts")
    assert ended.value.code == 128 + number and signal.getsignal(number) == before
    assert capsys.readouterr().out.endswith(f"sea step 00002 | stopped by {number.name}, saved; --resume goes on\n")
    parts, resumed = run_steps(home, tmp_path / "parts", "--resume")
    assert terms_of(resumed) == terms_of(steps) and all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), distill.noting_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_do_not_write_to_one_folder(home, tmp_path):
    pytest.importorskip("fcntl", reason="Windows locks nothing")
    refusal = "^--out: expected a folder that no other run is writing to, got"
    with checkpoints.locked(tmp_path), pytest.raises(SystemExit, match=refusal):
        run_steps(home, tmp_path)
    run_steps(home, tmp_path, "--steps", "1")  # nor does a run that has ended


def out_of_space(kind: str):
    """As the system, torch.save and safetensors say it."""
    full = OSError(errno.ENOSPC, "No space left on device")
    if kind == "safetensors":
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    try:
        raise full
    finally:
        if kind == "torch":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


@pytest.mark.parametrize("kind", ["system", "torch", "safetensors"])
def test_a_full_disk_is_told_in_a_sentence(kind):
    with pytest.raises(SystemExit, match="^--out: expected room on the disk, got a full one at out; "), evaluate.room_for("out"):
        out_of_space(kind)


def test_a_run_that_filled_the_disk_resumes(home, tmp_path, monkeypatch):
    whole, _ = run_steps(home, tmp_path / "whole", "--steps", "2")

    def write_or_fail(name, student, optimizer, step, args, write=checkpoints.write):
        with monkeypatch.context() as full:
            if step == 2:
                full.setattr(torch, "save", lambda content, file: (file.write(b"half"), out_of_space("torch")))
            write(name, student, optimizer, step, args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^--out: expected room on the disk"):
        patch.setattr(checkpoints, "write", write_or_fail)
        run_steps(home, tmp_path, "--steps", "2", "--eval-every", "1")
    assert not [*tmp_path.glob(".*.sea-new")]  # which would keep it full
    again, steps = run_steps(home, tmp_path, "--steps", "2", "--eval-every", "1", "--resume")
    assert [r["step"] for r in steps] == [1, 2, 2] and all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_log_line_that_was_cut_off_stands_alone(tmp_path):
    log = distill.Log(distill.parse(["--device", "cpu", "--out", str(tmp_path)]))
    log.record(a=1)
    (tmp_path / "log.jsonl").open("a").write('{"b": ')
    log.record(c=math.inf, d=[math.nan])  # JSON has neither
    assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n{"b": \n{"c": "inf", "d": ["nan"]}\n'


def test_an_infinite_option_is_told_in_json_and_resumes(home, tmp_path):
    refuse = lambda text: pytest.fail(f"not JSON: {text}")
    for more in ([], ["--resume"]):
        run_steps(home, tmp_path, "--steps", "1", "--optimizer", "clip=inf", *more)
    for line in [*(tmp_path / "log.jsonl").read_text().splitlines(), (tmp_path / "run.json").read_text()]:
        json.loads(line, parse_constant=refuse)


@pytest.fixture(scope="module")
def one_step(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_step")
    run_steps(home, out, "--steps", "1")
    return out


def with_dropout(loaded):
    teacher, tokenizer = loaded
    for layer in teacher.get_decoder().layers:
        layer.dropout = 0.1
    return teacher, tokenizer


def test_a_truncated_checkpoint_is_refused_by_name(home, tmp_path):
    run_steps(home, tmp_path, "--steps", "1")
    names = ["lock", "log.jsonl", "run.json", "sea", "sea.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # nothing half-written
    file = tmp_path / "sea.ckpt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="--resume: expected a whole checkpoint, got .*sea.ckpt"):
        run_steps(home, tmp_path, "--steps", "1", "--resume")


def test_checkpoints_of_earlier_versions_resume(home, tmp_path):
    """Their options were flat, None where a default was meant, and there were no bins."""
    cells = ["--sea", "bin=0"]
    whole, _ = run_steps(home, tmp_path / "whole", "--steps", "2", *cells)
    run_steps(home, tmp_path, "--steps", "1", *cells)  # of a constant schedule
    saved = torch.load(tmp_path / "sea.ckpt")
    names = ("model", "data", "load", "steps", "batch", "seq_len", "width", "topk", "lr", "lr_new", "schedule", "warmup",
             "redraw_every", "train", "hidden_weight", "score_weight", "weight_decay", "clip", "seed", "fingerprint")
    assert set(names) <= saved["args"].keys()
    saved["args"] = {name: saved["args"][name] for name in names} | dict(valid_data=None, query_stride=None, nbf=None, cell_keys=True, steps=2)
    saved["model"] = {name: x for name, x in saved["model"].items() if "head_share" not in name}
    torch.save({part: saved[part] for part in ("step", "model", "optimizer", "args")}, tmp_path / "sea.ckpt")
    (tmp_path / "run.json").unlink()
    with pytest.raises(SystemExit, match="^--resume: expected bin 0 as in .*sea.ckpt, got 2$"):
        run_steps(home, tmp_path, "--steps", "2", "--resume")
    (tmp_path / "run.json").unlink()
    resumed, _ = run_steps(home, tmp_path, "--steps", "2", "--resume", *cells)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_run_from_before_models_were_fine_tuned_resumes():
    """It recorded --teacher-steps, which meant nothing beside --model."""
    args = distill.parse(["--model", "DIR"])
    before = {name: x for name, x in checkpoints.fixed_options(args).items() if name not in ("teacher_lr", "control_lr", "beta2")}
    before["teacher_steps"] = 1000
    checkpoints.check_options(before, args, "run.json")
    with pytest.raises(SystemExit, match="^--resume: expected teacher_steps 0 as in run.json, got 5$"):
        checkpoints.check_options(before, distill.parse(["--model", "DIR", "--teacher-steps", "5"]), "run.json")


def torchrun(script, *options) -> str:
    """What two processes on the CPU print, over gloo."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(here / script), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(here)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ACCUMULATING = ["--batch", "4", "--micro-batch", "1", "--eval-every", "2", "--eval-windows", "5"]


@pytest.fixture(scope="module")
def one_process(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return run_steps(home, out, *ACCUMULATING), (out / "log.jsonl").read_text().splitlines()


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_the_same_batch(home, one_process, tmp_path, shard):
    """The same losses and perplexities, to rounding, of an odd number of windows too, and a checkpoint that one process can resume."""
    (one, steps), log = one_process
    printed = torchrun("distill.py", *arguments(home, tmp_path), *ACCUMULATING, *shard)
    assert printed.count("sea step 00003/00003") == 1  # only the first process speaks
    records = (tmp_path / "log.jsonl").read_text().splitlines()
    for a, b in zip(map(json.loads, log), map(json.loads, records), strict=True):
        for name in {"loss", "ppl", "teacher_ppl"} & a.keys():
            assert math.isclose(a[name], b[name], rel_tol=1e-4), (a, b)
    two, more = run_steps(home, tmp_path, *ACCUMULATING, "--resume")
    assert len(more) == len(steps)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")


def test_shares_of_heads_are_the_same_where_weights_are_spread(home, tmp_path):
    """Their loss is computed behind the layer, when its weights are spread again."""
    tokenizer = AutoTokenizer.from_pretrained(home / "teacher")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5)
    torch.manual_seed(0)
    convert.save(LlamaForCausalLM(config), tmp_path / "teacher", tokenizer)
    options = ["--model", str(tmp_path / "teacher"), "--data", str(home / "text.txt"), *SMALL, "--micro-batch", "1", "--steps", "3",
               "--eval-windows", "2", "--optimizer", "lr=1e-3", "lr_new=1e-2", "--method", "sea", "--out"]
    distill.main([*options, str(tmp_path / "one")])
    torchrun("distill.py", *options, str(tmp_path / "two"), "--shard", "--gradient-checkpointing")
    one, two = (load_file(tmp_path / out / "sea/model.safetensors") for out in ("one", "two"))
    shares = [name for name in one if name.endswith("head_share")]
    assert len(shares) == 2 and all((one[name] != 0.5).all() for name in shares)
    for name in shares:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3)


def test_a_run_may_change_its_number_of_processes(home, tmp_path, monkeypatch):
    """2 steps of one process, 2 of two with the weights spread over them, until one is told to stop, and 2 of one again are
    6 of one, to rounding."""
    options = ["--steps", "6", "--batch", "4", "--eval-every", "2", "--optimizer", "schedule=cosine", "redraw_every=3"]
    whole, steps = run_steps(home, tmp_path / "whole", *options)
    write = checkpoints.write
    with monkeypatch.context() as stopping, pytest.raises(SystemExit):
        stopping.setattr(checkpoints, "write", lambda *args: (write(*args), sys.exit()))
        run_steps(home, tmp_path / "parts", *options)
    (tmp_path / "stopping.py").write_text("""
import os, signal, sys, torch, distill
clip, calls = torch.nn.utils.clip_grad_norm_, []

def stop(*args):
    calls.append(args)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return clip(*args)

torch.nn.utils.clip_grad_norm_ = stop
try:
    distill.main()
except SystemExit as ended:
    sys.exit(ended.code - 128 - signal.SIGTERM)
""")
    torchrun(tmp_path / "stopping.py", *arguments(home, tmp_path / "parts"), *options, "--shard", "--gradient-checkpointing", "--resume")
    parts, resumed = run_steps(home, tmp_path / "parts", *options, "--resume")
    assert [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in steps], rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")


def test_bench_measures_steps_of_several_processes(tmp_path):
    printed = torchrun("bench.py", "--distill", "--lengths", "32", "--heads", "2", "--d-head", "16", "--width", "8", "--topk", "24", "--layers",
                       "2", "--batch", "2", "--shard", "--gradient-checkpointing", "--out", str(tmp_path))
    assert printed.count("T 32 linear: ") == 1 and "T x T" not in printed
    r = json.loads((tmp_path / "bench_distill.json").read_text())["results"]["32"]["linear"]
    assert r["gpus"] == 2 and math.isclose(r["tokens_per_second"], 2 * 2 * 32 / (r["ms"] / 1000))


def test_gradient_checkpointing_changes_memory_only(home, tmp_path):
    kept, steps = run_steps(home, tmp_path / "kept")
    again, resteps = run_steps(home, tmp_path / "again", "--gradient-checkpointing")
    assert [r["loss"] for r in steps] == pytest.approx([r["loss"] for r in resteps], rel=1e-4)
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_the_weight_of_hidden_states_is_an_option(home, tmp_path):
    for weight, out in ((None, "a"), ("0.5", "b")):
        run_steps(home, tmp_path / out, "--steps", "1", *(() if weight is None else ("--loss", f"hidden={weight}")))
    a, b = (json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[1])["terms"] for out in "ab")
    assert b.pop("hidden") == pytest.approx(a.pop("hidden") / 10) and a == b


def test_train_sea_leaves_pretrained_weights_alone(home, tmp_path):
    after, _ = run_steps(home, tmp_path, "--train", "sea")
    before = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float32).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    fresh = convert.attach(AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float32), **SEA).state_dict()
    assert not torch.equal(fresh["model.decoder.layers.0.self_attn.sea.decoder.weight"], after["model.decoder.layers.0.self_attn.sea.decoder.weight"])


def test_the_collector_leaves_alone_what_was_there_before_training():
    before = [[]]
    with pytest.raises(RuntimeError), distill.settled():
        assert all(x is not before for x in gc.get_objects())
        raise RuntimeError
    assert any(x is before for x in gc.get_objects())


@pytest.mark.parametrize("hidden, heads, projection, norm_before", [
    (768, 12, 768, True), (1024, 16, 512, False), (2048, 32, 2048, True), (2560, 32, 2560, True)], ids=["125m", "350m", "1.3b", "2.7b"])
def test_every_opt_shape_converts(hidden, heads, projection, norm_before, tmp_path):
    """The widths, heads and odd ends of the real ones, at one layer: a step's gradients, saved and loaded."""
    config = lambda: OPTConfig(vocab_size=VOCAB, hidden_size=hidden, word_embed_proj_dim=projection, ffn_dim=4 * hidden, num_hidden_layers=1,
                               num_attention_heads=heads, max_position_embeddings=2048, do_layer_norm_before=norm_before)
    torch.manual_seed(0)
    teacher = OPTForCausalLM(config()).eval()
    student, x = convert.attach(OPTForCausalLM(config()), width=256, topk=64), tokens(1)
    student.load_state_dict(teacher.state_dict(), strict=False)
    teacher.set_attn_implementation("sea_teacher")
    terms = distill.distillation_losses(student, teacher, x, distill.LossWeights(score=1.0))
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    convert.save(student.eval(), tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(convert.load(tmp_path / "student")(x).logits, student(x).logits)


def test_micro_batches_add_up_to_the_batch(home, tmp_path):
    whole, _ = run_steps(home, tmp_path / "a", "--micro-batch", "2")
    parts, _ = run_steps(home, tmp_path / "b", "--micro-batch", "1")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_gradients_are_those_of_the_whole_batch(home):
    """However many micro-batches: clipping and AdamW would hide a factor."""
    student, teacher = student_and_teacher()
    found = []
    for size in ("4", "2", "1"):
        args = distill.parse([*SMALL, "--batch", "4", "--micro-batch", size])
        student.zero_grad()
        job = distill.Job(args, None, None, teacher, None, tokens(9).flatten(), None, 1.0, [])
        distill.add_gradients(student, student, 1, job)
        found.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_the_student_trains_with_dropout_and_the_teacher_without(home, tmp_path, monkeypatch):
    modes = []

    def losses(student, teacher, *args, do=distill.distillation_losses):
        modes.append((student.training, teacher.training))
        return do(student, teacher, *args)

    monkeypatch.setattr(distill, "distillation_losses", losses)
    run_steps(home, tmp_path, "--eval-every", "1")  # which is without
    assert set(modes) == {(True, False)}


def test_the_position_table_may_have_fewer_rows_than_the_model(home, tmp_path):
    rows = lambda weights: {len(x) for name, x in weights.items() if name.endswith("sea.position")}
    assert rows(run_steps(home, tmp_path / "a", "--steps", "1")[0]) == {32}
    assert rows(run_steps(home, tmp_path / "b", "--steps", "1", "--sea", "max_positions=20")[0]) == {20}
    with pytest.raises(SystemExit, match="^--resume: expected max_positions 20 as in .*run.json, got the model's$"):
        run_steps(home, tmp_path / "b", "--steps", "1", "--resume")


def test_schedule_clip_and_redraw(home, tmp_path):
    weights, steps = run_steps(home, tmp_path / "a", "--optimizer", "schedule=linear")
    assert [r["lr"] for r in steps] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    name = next(name for name in weights if name.endswith("projection"))
    for every, redrawn in ((2, True), (3, False)):  # 3 steps: no draw that no step would use
        drawn, _ = run_steps(home, tmp_path / str(every), "--optimizer", f"redraw_every={every}")
        assert torch.equal(drawn[name], weights[name]) != redrawn
    clipped, _ = run_steps(home, tmp_path / "c", "--optimizer", "clip=1e-12")  # far below AdamW's epsilon
    first = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float32).state_dict()
    moved = lambda after: max((after[name] - first[name]).abs().max().item() for name in first if name in after)
    assert moved(clipped) < moved(weights) / 10


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(bin=0), dict(query_stride=3, bin=3), dict(group="causal_batch"), dict(method="window"),
                                     dict(method="reformer")])
def test_keys_per_query_counts_keys(options):
    """Those that have a weight."""
    student, _ = student_and_teacher("llama", **options)
    args, x = distill.parse(SMALL), tokens()
    weights = student(x[:1], output_attentions=True).attentions
    keys = [(w > 0).sum(-1).float().mean() for w in weights]
    assert math.isclose(evaluate.keys_per_query(student, x, args), torch.stack(keys).mean(), rel_tol=1e-6)


def test_a_student_that_is_the_teacher_has_only_the_label_loss():
    teacher = tiny("opt")
    teacher.set_attn_implementation("sea_teacher")
    terms = distill.distillation_losses(teacher, teacher, tokens(), distill.LossWeights(score=1.0))
    assert terms.pop("ce") > 0
    assert all(abs(value.item()) < 1e-6 for value in terms.values()), terms


@torch.no_grad()
def test_perplexity_is_of_windows_without_overlap(home):
    args = distill.parse(SMALL)
    model = tiny("opt")
    model.config.dropout = 0.5
    for layer in model.get_decoder().layers:
        layer.dropout = 0.5  # off while measuring
    model.train()
    data = evaluate.windows(torch.arange(2, 61), 16)
    assert data.shape == (3, 16)  # the remainder is dropped
    measured = evaluate.perplexity(model, data, args)
    model.eval()
    nll = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]) for w in data]
    assert math.isclose(measured, math.exp(torch.stack(nll).mean()), rel_tol=1e-5)


def test_optimizer_groups():
    student, _ = student_and_teacher()
    names = {id(p): n for n, p in student.named_parameters()}
    groups = distill.make_optimizer(student, distill.OptimizerConfig(lr=1e-5, lr_new=1e-3)).param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert group["peak"] == (1e-3 if ".sea." in names[id(parameter)] else 1e-5)
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)


def test_model_names_mean_the_hub(monkeypatch, tmp_path):
    """`--model opt-125m` asks the hub for facebook/opt-125m; without it, one sentence says what to give instead."""
    asked = []

    def offline(name, **_):
        asked.append(name)
        raise OSError("We couldn't connect to the hub\nand a long explanation")

    monkeypatch.setattr(evaluate.AutoTokenizer, "from_pretrained", offline)
    for name in ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "someone/model"):
        with pytest.raises(SystemExit, match=f"needed the model .*{name}.*couldn't connect to the hub\\); give a local folder with --model DIR"):
            distill.main(["--model", name, "--device", "cpu", "--out", str(tmp_path)])
    assert asked == ["facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b", "facebook/opt-2.7b", "someone/model"]


def test_wikitext_without_a_network_says_what_to_give(home, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="an ordinary dependency, absent on some GPU images")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(SystemExit, match="needed the dataset Salesforce/wikitext .*no network.*--data FILE"):
        distill.main(["--model", str(home / "teacher"), *SMALL, "--out", str(tmp_path)])


def test_the_papers_defaults():
    args, config = distill.parse(["--model", "opt-125m"]), sea.SEAConfig(n_head=12, d_head=64)
    assert (args.eval_every, args.seed, distill.parse([]).eval_every) == (500, 0, 60)
    assert (args.steps, args.batch, args.seq_len, args.sea, config.width, config.topk) == (10_000, 32, 2048, {}, 256, 64)
    assert (args.optimizer.lr, args.optimizer.lr_new, args.optimizer.schedule, args.optimizer.weight_decay) == (2e-6, 1e-4, "constant", 0.01)
    assert (args.loss.ce, args.loss.hidden, args.loss.kd) == (0.1, 5, 0.2) and set(args.method) == {"sea", "performer", "dense"}


def test_grouped_options_add_up_and_the_last_one_counts():
    args = distill.parse(["--sea", "width=8", "cell_keys=false", "--sea", "width=16", "nbf=0.5", "--optimizer", "warmup=3", "--loss", "score=1"])
    assert args.sea == distill.TINY["sea"] | dict(width=16, cell_keys=False, nbf=0.5)
    assert args.optimizer == distill.OptimizerConfig(lr=5e-4, lr_new=1e-2, control_lr=5e-4, schedule="linear", warmup=3)
    assert args.loss == distill.LossWeights(score=1.0)


def test_a_job_has_the_numbers_of_its_model_and_method():
    """Of an OPT by its name those of the paper's authors, unless others are given; controls are not handicapped."""
    for argv, batch, rates, beta2 in ((["--model", "opt-125m"], 32, (2e-6, 1e-5), 0.999), (["--model", "opt-1.3b"], 36, (2e-6, 1e-5), 0.999),
                                      (["--model", "opt-2.7b"], 144, (5e-7, 2.5e-6), 0.999), (["--model", "DIR"], 32, (2e-6, 1e-5), 0.95),
                                      (["--model", "opt-2.7b", "--optimizer", "lr=1e-4"], 144, (1e-4, 1e-4), 0.999),
                                      (["--model", "DIR", "--optimizer", "control_lr=3e-6", "lr=1e-4"], 32, (1e-4, 3e-6), 0.95), ([], 8, (5e-4, 5e-4), 0.95)):
        args = distill.parse(argv)
        assert args.batch == batch and args.teacher_steps == (0 if args.model else 1000)
        found = {name: distill.optimizer_of(name, args) for name in ("sea", "oracle", "dense", "performer", "window")}
        assert [found[name].lr for name in found] == pytest.approx([rates[0]] * 2 + [rates[1]] * 3)
        assert {config.beta2 for config in found.values()} == {beta2} and len({config.lr_new for config in found.values()}) == 1
        assert distill.fields_of("performer", args).get("nbf") == (1 if args.model else None)
        assert "nbf" not in distill.fields_of("sea", args)
    assert distill.fields_of("performer", distill.parse(["--model", "DIR", "--sea", "nbf=4"]))["nbf"] == 4


def test_a_model_is_fine_tuned_first_if_asked(tmp_path):
    """It is then the teacher, of a lower perplexity on its text, and a run that goes on keeps it."""
    base = ["--device", "cpu", "--eval-windows", "2", "--steps", "1", "--batch", "2", "--seq-len", "64"]
    distill.main([*base, "--teacher-steps", "2", "--method", "sea", "--out", str(tmp_path / "tiny")])
    job = [*base, "--model", str(tmp_path / "tiny/teacher"), "--data", str(Path(distill.__file__).with_name("README.md")), "--method", "dense",
           "--out", str(tmp_path / "out")]
    raw = distill.main(job)["teacher"]
    job += ["--teacher-steps", "12", "--teacher-lr", "1e-2"]
    tuned = distill.main(job)["teacher"]
    assert tuned < 0.8 * raw
    weights = (tmp_path / "out/teacher/model.safetensors").read_bytes()
    assert distill.main([*job, "--resume"])["teacher"] == tuned and (tmp_path / "out/teacher/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("argv, message", [
    (["--sea", "topk=0"], "--sea topk: expected an integer >= 1, got 0"),
    (["--sea", "widht=8"], ("--sea: expected NAME=VALUE with one of width, topk, group, bin, local, first, candidates, query_stride, dense_below, "
                            "nbf, max_positions, cell_keys, cnn, backend, got 'widht=8'")),
    (["--sea", "topk=6"], "--sea topk: expected at least 7, since on average as many first and last keys are always attended to, got 6"),
    (["--sea", "bin=0", "group=kv"], "--sea bin: expected bins for group kv, got 0"),
    (["--method", "sea", "window", "--sea", "bin=0"], "--sea bin: expected >= 1, and a causal layer, for a window, got 0"),
    (["--sea", "cell_keys=no"], "--sea: expected cell_keys of type bool, got 'no'"),
    (["--sea", "width=8.5"], "--sea: expected width of type int, got '8.5'"),
    (["--sea", "n_head=3"], "--sea: expected NAME=VALUE with one of"),
    (["--sea", "nbf=0"], "--sea nbf: expected a number > 0, got 0.0"),
    (["--batch", "6", "--micro-batch", "4"], "--micro-batch: expected a divisor of the 6 sequences of a process, got 4"),
    (["--load", "x", "--sea", "width=8"], ("--sea: expected topk, group, bin, local, first, candidates, query_stride, dense_below, backend only with --load, "
                                           "since the saved student has its own of the others, got width")),
    (["--seed", "-1"], "--seed: expected an integer from 0"),
    (["--sea", "max_positions=100"], "--sea max_positions: expected at least --seq-len, 256, got 100"),
    (["--device", "gpu"], "--device: expected a torch device such as cpu or cuda, got gpu"),
    (["--device", "cuda:99"], "GPUs that PyTorch sees, got cuda:99"),
    (["--shard"], "--shard: expected several processes to spread over, under torchrun, got one"),
    (["--optimizer", "redraw_every=-1"], "--optimizer redraw_every: expected a finite number >= 0, got -1"),
    (["--optimizer", "warmup=-1"], "--optimizer warmup: expected a finite number >= 0, got -1"),
    (["--optimizer", "lr=nan"], "--optimizer lr: expected a finite number >= 0, got nan"),
    (["--loss", "ce=inf"], "--loss ce: expected a finite number >= 0, got inf"),
    (["--method", "sea", "sea"], "--method: expected each once, got sea sea"),
    (["--optimizer", "schedule=step"], "--optimizer schedule: expected constant, linear or cosine, got step"),
    (["--optimizer", "clip=0"], "--optimizer clip: expected a number > 0, got 0.0"),
    (["--loss", "hidden"], "--loss: expected NAME=VALUE with one of ce, hidden, kd, score, got 'hidden'"),
    (["--steps", "0"], "--steps: expected an integer >= 1, got 0"),
    (["--teacher-steps", "0"], "--teacher-steps: expected an integer >= 1, got 0"),
    (["--teacher-lr", "0"], "--teacher-lr: expected a finite number > 0, got 0.0"),
    (["--optimizer", "beta2=1"], "--optimizer beta2: expected a number below 1, got 1.0"),
    (["--seq-len", "1"], "--seq-len: expected an integer >= 2"),
])
def test_bad_options_name_the_option(argv, message, capsys):
    with pytest.raises(SystemExit):
        distill.parse(argv)
    assert message in capsys.readouterr().err


def test_kernels_without_a_gpu_are_refused(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for script, option, value in ((distill, "--sea", "backend=triton"), (evaluate, "--backend", "triton")):
        with pytest.raises(SystemExit):
            script.parse(["--model", "x", "--device", "cpu", option, value])
        assert f"{option}: expected auto or torch on cpu, since triton needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("script", [distill, evaluate])
def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(home, tmp_path, script):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(SystemExit, match=f"^--out: expected a folder that can be written to, got {tmp_path}/{out} "):
            script.main(["--model", "no-such-model", "--device", "cpu", "--out", str(tmp_path / out)])


def test_sequences_longer_than_the_model_are_refused(home, tmp_path):
    with pytest.raises(SystemExit, match="--seq-len: expected at most the model's 32 positions, got 33"):
        distill.main(["--model", str(home / "teacher"), "--data", str(home / "text.txt"), *SMALL, "--seq-len", "33", "--out", str(tmp_path)])


@pytest.mark.parametrize("option, name", [("--data", "no.txt"), ("--valid-data", "no.txt"), ("--load", "no-such-student")])
def test_missing_files_are_named_in_one_sentence(home, tmp_path, option, name):
    argv = ["--model", str(home / "teacher"), "--data", str(home / "text.txt"), "--seq-len", "16", "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"^{option}: expected .*, got .*{name} "):
        distill.main([*argv, option, str(tmp_path / name)])


def test_students_are_in_memory_one_at_a_time(home, tmp_path, monkeypatch):
    students = []

    def train(name, student, *args, do=distill.train):
        assert all(earlier() is None for earlier in students), name
        students.append(weakref.ref(student))
        return do(name, student, *args)

    monkeypatch.setattr(distill, "train", train)
    distill.main(["--model", str(home / "teacher"), "--data", str(home / "text.txt"), *SMALL, "--steps", "1", "--out", str(tmp_path)])
    assert len(students) == 3


def test_a_diverged_student_stops_and_the_next_one_goes_on(home, tmp_path, monkeypatch, capsys):
    """Before a gradient that is not finite reaches the weights; what it saved stays; the table and the exit say so."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def diverge(*args):
        calls.append(args)
        return torch.tensor(math.nan) if len(calls) == 2 else clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", diverge)
    with pytest.raises(SystemExit, match="^diverged: sea; "):
        run_steps(home, tmp_path, "--steps", "2", "--eval-every", "1", "--method", "sea", "performer")
    printed = capsys.readouterr().out
    assert re.search(r"\nsea step 2: the gradient is not finite, the loss is: .*\n(.*\n)*sea +inf +inf .*\n", printed)
    results = last_results(tmp_path)
    assert results["sea"] == "inf" and math.isfinite(results["performer"])
    assert torch.load(tmp_path / "sea.ckpt")["step"] == 1 and torch.load(tmp_path / "performer.ckpt")["step"] == 2


def test_a_loss_that_is_not_finite_is_told_with_its_terms(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sea, "score_loss", lambda *_, **__: torch.tensor(math.nan))
    with pytest.raises(SystemExit, match="^diverged: sea; "):
        run_steps(home, tmp_path, "--loss", "score=1", "--steps", "1")
    assert re.search("\nsea step 1: the loss is not finite: .*'score': nan", capsys.readouterr().out)
    assert not (tmp_path / "sea.ckpt").exists() and not (tmp_path / "sea").exists()


# -- README.md ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_documented_commands_have_the_options_that_there_are(file, monkeypatch):
    text = (Path(__file__).parent / file).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(python|torchrun) ([^`\n]*?)\b(distill|glue|evaluate|bench|ablate)\.py([^`\n#|&]*)", text)
    assert commands
    for launcher, _, script, options in commands:
        monkeypatch.setenv("WORLD_SIZE", "2" if launcher == "torchrun" else "1")
        argv = [option for option in shlex.split(options) if option != "..."]
        script = "glue" if "--dataset" in argv else script
        parsed = importlib.import_module(script).parse(argv)
        if script == "ablate":
            distill.parse([*ablate.BASE, *parsed[1]])


def test_readme_code_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", Path(__file__).with_name("README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
