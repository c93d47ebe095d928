"""BERT on GLUE end to end, on models and tasks that take seconds: glue.py."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification,
                          BertLMHeadModel, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel, OPTConfig,
                          OPTForCausalLM)

import convert
import distill
import evaluate
import glue
import sea

WORDS = [f"{kind}{i}" for kind in ("good", "bad", "word") for i in range(8)]
MODEL = dict(vocab_size=5 + len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
             max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
SEA = dict(width=8, topk=6)


def tiny_bert(model_class=BertForSequenceClassification, **changes):
    torch.manual_seed(0)
    return model_class(BertConfig(**{**MODEL, **changes})).eval()


def tiny_distilbert() -> DistilBertModel:
    return DistilBertModel(DistilBertConfig(vocab_size=MODEL["vocab_size"], dim=24, n_layers=1, n_heads=2, hidden_dim=48,
                                            max_position_embeddings=128))


def tokenizer() -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(special + WORDS)}, model_max_length=128)


def rows(n: int, seed: int) -> list[tuple[str, str, int]]:
    """A pair is of class 1 if its first sentence is good, whatever the second is."""
    generator, found = torch.Generator().manual_seed(seed), []

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(n):
        kinds = draw(2), draw(2)
        pair = [" ".join(("good", "bad")[kind] + str(draw(8)) for _ in range(2 + draw(4))) for kind in kinds]
        found.append((*pair, int(kinds[0] == 0)))
    return found


def write(path: Path, lines: list[tuple], header: tuple = ("sentence1", "sentence2", "label")) -> str:
    path.write_text("\n".join("\t".join(map(str, line)) for line in (header, *lines)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an encoder that has no head, a tokenizer, and a task."""
    folder = tmp_path_factory.mktemp("home")
    convert.save(tiny_bert(BertModel), folder / "bert", tokenizer())
    for i, (split, n) in enumerate(dict(train=256, valid=32, test=16).items()):
        write(folder / f"{split}.tsv", rows(n, i))
    return folder


def options(home: Path, *more: str) -> list[str]:
    return ["--model", str(home / "bert"), "--data", str(home / "train.tsv"), "--valid-data", str(home / "valid.tsv"),
            "--sea", *(f"{name}={x}" for name, x in SEA.items()), "--device", "cpu", *more]


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_are_those_worked_out_by_hand():
    predicted, labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]), torch.tensor([1, 1, 0, 0, 0, 1, 0, 0])
    # Of class 1: 2 found, 2 more taken for it, 1 missed; of class 0: 3 found.
    assert glue.accuracy(predicted, labels) == 5 / 8
    assert glue.f1(predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert glue.METRICS["matthews"](predicted, labels) == pytest.approx((2 * 3 - 2 * 1) / (4 * 3 * 5 * 4) ** 0.5)
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 10])
    assert glue.pearson(x, y) == pytest.approx(13 / (5 * 50) ** 0.5)
    assert glue.spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert glue.ranks(torch.tensor([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert glue.spearman(x, x.exp()) == pytest.approx(1) and glue.pearson(x, -2 * x + 1) == pytest.approx(-1)


def test_metrics_of_one_class_alone_are_numbers():
    none, some = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 0])
    assert glue.f1(none, none) == glue.f1(none, some) == glue.pearson(none, some) == glue.spearman(some, none) == 0


def test_every_task_has_metrics_that_there_are():
    assert {name for task in glue.TASKS.values() for name in task.metrics} == set(glue.METRICS)
    assert set(glue.METHODS) - {"dense"} <= set(convert.METHODS)


# -- losses ----------------------------------------------------------------------------------------


def batch_of(sentences: list[list[str]], labels: list[int], side: str = "right") -> glue.Batch:
    inputs = dict(tokenizer()(*sentences, padding=True, padding_side=side, return_tensors="pt"))
    return glue.Batch(inputs, torch.tensor(labels))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", glue.METHODS)
def test_padding_is_in_no_mean(name, side):
    """A padded batch has the losses of its sequences alone: terms of layers and hidden states by their tokens, of logits by
    sequence. With padding on the left BERT's positions have to be given, and its head looks at padding."""
    teacher, other = tiny_bert(), tiny_bert()
    teacher.set_attn_implementation("sea_teacher"), other.set_attn_implementation("sea_teacher")
    student = distill.new_student(name, other, teacher, SimpleNamespace(seed=0, sea=SEA, model="bert")).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = distill.LossWeights(ce=1, hidden=10, kd=0.1, score=1)
    examples = rows(3, seed=5)
    first, second, labels = (list(x) for x in zip(*examples))

    def terms(batch: glue.Batch) -> dict[str, torch.Tensor]:
        position = (batch.valid.cumsum(1) - 1).clamp(min=0)
        inputs = {**batch.inputs, "position_ids": position}
        return glue.distillation_losses(student, teacher, replace(batch, inputs=inputs), weights)

    padded = batch_of([first, second], labels, side)
    n = padded.valid.sum(1)
    assert n.max() > n.min()
    alone = [terms(batch_of([[a], [b]], [label])) for a, b, label in examples]
    found = terms(padded)
    for term in found.keys() - ({"kd", "ce"} if side == "left" else set()):
        share = torch.full((3,), 1 / 3) if term in ("kd", "ce") else n / n.sum()
        expected = sum(w * x[term] for w, x in zip(share, alone))
        assert found[term].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7), term


@torch.no_grad()
def test_terms_of_a_layer_without_padding_are_those_of_sea():
    teacher, student = tiny_bert(), convert.attach(tiny_bert(initializer_range=0.1), **SEA)
    teacher.set_attn_implementation("sea_teacher")
    batch = batch_of([["good1 bad2 word3"] * 2, ["bad1 word1"] * 2], [1, 0])
    with convert.record(teacher) as of_teacher, convert.record(student) as of_student:
        teacher(**batch.inputs), student(**batch.inputs)
    seen = batch.valid * batch.valid.shape[1]
    for s, t in zip(of_student, of_teacher, strict=True):
        pooled = sea.pool_attention(t.q, t.k, seen, SEA["width"], t.scale)
        expected = dict(context=F.mse_loss(s.out, t.out), estimate=sea.estimate_loss(s.sea.scores, pooled, seen),
                        score=3 * sea.score_loss(s.q * s.scale, s.k, t.q * t.scale, t.k, seen, 1.0))
        found = glue.layer_losses(s, t, batch.valid, distill.LossWeights(score=3))
        torch.testing.assert_close({name: found[name] for name in expected}, expected)


@torch.no_grad()
def test_all_keys_and_open_gates_are_the_teacher():
    """Then nothing is left of the losses but the estimate, and the student's logits are the teacher's."""
    teacher = tiny_bert()
    teacher.set_attn_implementation("sea_teacher")
    student = convert.attach(tiny_bert(), width=8, topk=64)
    for module in convert.attention_modules(student):
        module.sea.gate.bias.fill_(60.0)
    first, second, labels = (list(x) for x in zip(*rows(4, seed=1)))
    batch = batch_of([first, second], labels)
    terms = glue.distillation_losses(student, teacher, batch, distill.LossWeights(hidden=10, kd=0.1, score=1))
    assert all(terms[name] < 1e-9 for name in ("hidden", "kd", "context", "score")) and terms["estimate"] > 1e-4
    torch.testing.assert_close(student(**batch.inputs).logits, teacher(**batch.inputs).logits, atol=1e-5, rtol=1e-5)


def test_batches_are_padded_on_the_right(home):
    """BERT's head looks at the first token, whatever side the tokenizer pads."""
    args, left = glue.parse(options(home)), tokenizer()
    left.padding_side = "left"
    job = glue.Job(args, None, left, ["input_ids", "attention_mask"], glue.load_splits(args))
    batch = job.batch("validation", torch.arange(8))
    assert set(batch.inputs) == {"input_ids", "attention_mask"} and not batch.valid.all()
    assert (batch.inputs["input_ids"][:, 0] == left.cls_token_id).all()


@torch.no_grad()
def test_a_picture_is_of_all_keys_of_an_example(home, tmp_path, monkeypatch):
    """The longest of the first ones, without padding; of the teacher what its own attention gives."""
    student, teacher, eager = convert.attach(tiny_bert(), **SEA), tiny_bert(), tiny_bert()
    teacher.set_attn_implementation("sea_teacher")
    eager.set_attn_implementation("eager")
    args, drawn = glue.parse(options(home, "--out", str(tmp_path))), []
    job = glue.Job(args, None, tokenizer(), ["input_ids", "token_type_ids", "attention_mask"], glue.load_splits(args))
    monkeypatch.setattr(evaluate, "draw_head", lambda figure, axes, images: drawn.append(list(images.items())))
    glue.draw(student, teacher, job)
    (title, attention), (_, estimate), (kept_title, kept), (_, sparse) = drawn[0]
    layer, head = (int(word) for word in title.replace(",", "").replace(")", "").split()[-3::2])
    lengths = job.batch("validation", torch.arange(32)).valid.sum(1)
    inputs = job.batch("validation", lengths.argmax()[None]).inputs
    expected = eager(**inputs, output_attentions=True).attentions[layer][0, head]
    torch.testing.assert_close(attention, expected.clamp(min=1e-4).log10(), atol=1e-4, rtol=1e-4)
    T = len(expected)
    assert T == lengths.max() and (estimate > -torch.inf).all() and f"{kept.sum(1).float().mean():.0f} of {T} a query" in kept_title
    assert kept.triu(1).any() and not kept.all() and torch.equal(sparse > -torch.inf, kept)


def test_a_score_is_compared_by_its_square():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    assert glue.logit_loss(student, teacher) == 2 and glue.label_loss(student, torch.tensor([0.0, 2.0])) == 0.5
    probs = torch.tensor([[0.25, 0.75]])
    kl = glue.logit_loss(torch.zeros(1, 2), probs.log())
    assert kl.item() == pytest.approx((probs * (2 * probs).log()).sum().item())


# -- the job ---------------------------------------------------------------------------------------


def test_the_job_end_to_end(home, tmp_path, capsys):
    """A head that is new is trained, and every student; all of them are there to load, and measure as the table says."""
    out = tmp_path / "out"
    results = glue.main(options(home, "--test-data", str(home / "test.tsv"), "--out", str(out), "--epochs", "4",
                                "--teacher-epochs", "4", "--teacher-lr", "5e-3", "--topk", "3", "--optimizer", "lr=1e-3",
                                "lr_new=5e-3"))
    printed = capsys.readouterr().out
    assert "its head new | mrpc: 256 train, 32 validation, 16 test" in printed and "validation accuracy" in printed
    lines = [[name, f"{name} topk 3"] if name in evaluate.WITH_TOPK else [name] for name in ("teacher", *glue.METHODS)]
    assert list(results) == [*itertools.chain(*lines)]
    assert results["teacher"]["validation accuracy"] > 0.85 < results["sea"]["validation accuracy"], results
    assert set(results["sea"]) == {f"{split} {metric}" for split in ("validation", "test")
                                   for metric in ("accuracy", "f1", "cosine")}
    cosines = [results[name]["test cosine"] for name in ("sea topk 3", "sea", "dense", "teacher")]
    assert cosines == sorted(cosines) and cosines[0] < cosines[1] and cosines[3] == pytest.approx(1)
    assert (out / "sea.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("teacher", *glue.METHODS):
        losses = [record["loss"] for record in records if record.get("name") == name and "loss" in record]
        assert len(losses) == 32
        assert losses[-1] < 0.7 * losses[0] or name == "dense", (name, losses)  # it begins as the teacher, with none
    keys = {record["name"]: record["keys"] for record in records if "keys" in record}
    assert keys["sea topk 3"] < keys["sea"] < keys["dense"] == keys["teacher"]

    args = glue.parse(options(home, "--test-data", str(home / "test.tsv")))
    loaders = {"sea": convert.load, "performer": convert.load, "dense": AutoModelForSequenceClassification.from_pretrained}
    for name, load in loaders.items():
        model = load(out / name)
        job = glue.Job(args, None, tokenizer(), ["input_ids", "token_type_ids", "attention_mask"], glue.load_splits(args))
        of_labels = {key: score for key, score in results[name].items() if "cosine" not in key}
        assert type(model) is BertForSequenceClassification and glue.measure(model, job) == of_labels


def test_a_trained_head_is_the_teacher_as_it_is(home, tmp_path):
    """By the way of distill.py, and one sentence an example; the same seed gives the same again."""
    convert.save(tiny_bert(), tmp_path / "trained", tokenizer())
    one = [write(tmp_path / f"{split}.tsv", [(a, label) for a, _, label in rows(40, i)], ("sentence1", "label"))
           for i, split in enumerate(("train", "valid"))]
    command = ["--dataset", "glue", "--subset", "cola", "--model", str(tmp_path / "trained"), "--data", one[0],
               "--valid-data", one[1], "--method", "performer", "--epochs", "1", "--device", "cpu"]
    results = [distill.main([*command, "--out", str(tmp_path / out)]) for out in ("out", "again")]
    assert not (tmp_path / "out" / "teacher").exists() and results[0] == results[1]
    assert set(results[0]["performer"]) == {"validation matthews", "validation cosine"}
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained").classifier.weight
    assert torch.equal(before, tiny_bert().classifier.weight)


@pytest.mark.parametrize("given", [[], ["--no-dropout"]])
def test_students_learn_with_dropout_or_without(home, tmp_path, given):
    """A dense student begins as its teacher, which has none: with no dropout there is nothing to learn."""
    convert.save(tiny_bert(hidden_dropout_prob=0.5), tmp_path / "bert", tokenizer())
    out = tmp_path / "out"
    glue.main([*options(home, "--method", "dense", "--epochs", "1", "--teacher-epochs", "0"), "--model",
               str(tmp_path / "bert"), "--out", str(out), *given])
    records = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    first = next(record["loss"] for record in records if "loss" in record)
    assert first < 1e-6 if given else first > 1, first


def test_a_score_is_learned_as_a_score(home, tmp_path):
    """stsb: one output, correlations; a head of two classes is not one for it, and is trained anew."""
    convert.save(tiny_bert(), tmp_path / "bert", tokenizer())
    files = [write(tmp_path / f"{split}.tsv", [(a, b, 2.5 + 2 * label) for a, b, label in rows(32, i)])
             for i, split in enumerate(("train", "valid"))]
    results = glue.main(["--subset", "stsb", "--model", str(tmp_path / "bert"), "--data", files[0], "--valid-data", files[1],
                         "--epochs", "1", "--teacher-epochs", "1", "--method", "sea", "--out", str(tmp_path / "out"),
                         "--device", "cpu"])
    assert set(results["sea"]) == {"validation pearson", "validation spearman", "validation cosine"}
    assert convert.load(tmp_path / "out" / "sea").classifier.out_features == 1


def test_an_embedding_is_the_mean_of_its_tokens(home, tmp_path):
    """As the model gives it for a sentence alone, without padding. No epochs of the teacher: it stays as it is."""
    convert.save(tiny_bert(), tmp_path / "bert", tokenizer())
    args = glue.parse(options(home, "--model", str(tmp_path / "bert"), "--teacher-epochs", "0"))
    job = glue.Job(args, None, tokenizer(), ["input_ids", "token_type_ids", "attention_mask"], glue.load_splits(args))
    model, (first, second) = tiny_bert(), job.splits["validation"].sentences
    logits, embeddings = glue.outputs(model, "validation", job)
    for i in range(3):
        with torch.no_grad():
            output = model(**tokenizer()(first[i], second[i], return_tensors="pt"), output_hidden_states=True)
        torch.testing.assert_close(embeddings[i], output.hidden_states[-1][0].mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[i], output.logits[0], atol=1e-5, rtol=1e-5)
    glue.main(options(home, "--teacher-epochs", "0", "--epochs", "1", "--method", "dense", "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out" / "teacher").exists()


def test_splits_of_the_hub_are_those_with_labels(monkeypatch):
    """mnli's two validation splits; a test split whose labels are kept is left out."""
    split = dict(premise=["good1"] * 2, hypothesis=["bad1"] * 2, label=[2, 0])
    hidden = {**split, "label": [-1, -1]}
    monkeypatch.setattr(glue, "load_glue", lambda subset: {
        "train": split, "validation_matched": split, "validation_mismatched": split, "test_matched": hidden})
    found = glue.load_splits(SimpleNamespace(subset="mnli", data=None))
    assert list(found) == ["train", "validation_matched", "validation_mismatched"]
    assert found["train"].sentences == [["good1"] * 2, ["bad1"] * 2] and found["train"].labels.tolist() == [2, 0]


def test_a_model_takes_what_its_forward_names(home, tmp_path):
    """DistilBERT has no token types, its tokenizer may."""
    convert.save(tiny_distilbert(), tmp_path / "model", tokenizer())
    results = glue.main([*options(home, "--method", "sea", "--epochs", "1", "--teacher-epochs", "1"), "--model",
                         str(tmp_path / "model"), "--data", str(home / "test.tsv"), "--out", str(tmp_path / "out")])
    assert list(results) == ["teacher", "sea"]


# -- refusals --------------------------------------------------------------------------------------


GOOD = ("good1 good2", "bad1", 1)
COLUMNS = "expected sentence1 sentence2 label, with tabs between, in the first line, got"
LINES = "expected 3 columns, the last an integer from 0 to 1, in each line, got"
BAD_FILES = {
    "a header of another task": ([GOOD], ("sentence1", "label"), COLUMNS),
    "no header": ([GOOD], GOOD, f"{COLUMNS} 'good1 good2.tbad1.t1'"),
    "a column too few": ([GOOD, ("good1", 1)], None, f"{LINES} 2, the last '1', in line 3 of"),
    "a class that the task lacks": ([GOOD, ("good1", "bad1", 2)], None, f"{LINES} 3, the last '2', in line 3 of"),
    "a class that is no number": ([("good1", "bad1", "yes")], None, f"{LINES} 3, the last 'yes', in line 2 of"),
    "nothing but a header": ([], None, "expected examples below the first line, got none in"),
}


@pytest.mark.parametrize("option, what", [*zip(itertools.cycle(["--data", "--valid-data", "--test-data"]), BAD_FILES)])
def test_another_file_is_refused_in_one_sentence(home, tmp_path, what, option):
    """Before the model is loaded."""
    lines, header, message = BAD_FILES[what]
    bad = write(tmp_path / "bad.tsv", lines, header or ("sentence1", "sentence2", "label"))
    with pytest.raises(SystemExit, match=rf"^{option}: {message}[^\n]*$"):
        glue.main(options(home, option, bad, "--model", "nothing", "--out", str(tmp_path / "out")))


@pytest.mark.parametrize("content", ["", "sentence1\tsentence2\tlabel", "\xff"])
def test_an_empty_file_is_refused(home, tmp_path, content):
    bad = tmp_path / "bad.tsv"
    bad.write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit, match=r"^--valid-data: expected [^\n]*bad.tsv[^\n]*$"):
        glue.main(options(home, "--valid-data", str(bad), "--out", str(tmp_path / "out")))


def test_labels_that_are_scores_are_finite():
    assert glue.label_of("2.5", 1) == 2.5 and glue.label_of("2", 3) == 2
    assert glue.label_of("nan", 1) is glue.label_of("inf", 1) is glue.label_of("1.0", 2) is glue.label_of("-1", 2) is None


BAD_OPTIONS = {
    "--epochs 0": "--epochs: expected an integer >= 1, got 0",
    "--seq-len 4": "--seq-len: expected an integer >= 8",
    "--topk 8 0": "--topk: expected integers >= 1",
    "--teacher-lr nan": "--teacher-lr: expected a number > 0, got nan",
    "--method sea sea": "--method: expected each once",
    "--sea query_stride=4": "--sea query_stride: expected 1 unless causal, got 4",
    "--sea group=kv": "--sea group: expected one that ranks cells when bidirectional",
    "--loss kd=-1": "--loss kd: expected a finite number >= 0",
    "--optimizer schedule=never": "--optimizer schedule: expected constant, linear or cosine",
    "--method window": "argument --method: invalid choice: 'window'",
    "--subset ax": "argument --subset: invalid choice: 'ax'",
}


@pytest.mark.parametrize("given, message", BAD_OPTIONS.items())
def test_options_that_cannot_be_are_refused(home, capsys, given, message):
    with pytest.raises(SystemExit):
        glue.parse(options(home, *given.split()))
    assert message in capsys.readouterr().err


def test_files_are_given_together(home, capsys):
    for given in (["--data", "a"], ["--valid-data", "a"], ["--test-data", "a"]):
        with pytest.raises(SystemExit):
            glue.parse(["--model", "m", *given])
        assert "--data: expected with --valid-data" in capsys.readouterr().err


def test_models_that_cannot_be_distilled_are_refused(home, tmp_path):
    """Before a teacher is trained; and the student that is --model stays."""
    opt = OPTConfig(vocab_size=29, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
                    num_attention_heads=2, pad_token_id=0)
    convert.save(OPTForCausalLM(opt), tmp_path / "opt", tokenizer())
    student = convert.attach(tiny_bert(), **SEA)
    convert.save(student, tmp_path / "student", tokenizer())
    convert.save(tiny_bert(), tmp_path / "out" / "dense", tokenizer())
    part = tiny_bert(BertModel)
    state = {name: x for name, x in part.state_dict().items() if "layer.1" not in name}
    convert.save(part, tmp_path / "part", tokenizer(), state)
    for name, message in {
        "opt": "--model: expected BERT or a bidirectional relative of it, got a opt in",
        "student": "--model: expected a plain model, to be the teacher, got a student in",
        "part": "This needed the model .*expected all weights but the head's, got none for bert.encoder.layer.1",
        "out/dense": "--out: expected another folder than that of .*, which would be lost",
    }.items():
        with pytest.raises(SystemExit, match=f"^{message}[^\n]*$"):
            glue.main([*options(home, "--out", str(tmp_path / "out")), "--model", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="^--seq-len: expected at most the model's 128 tokens, got 129$"):
        glue.main(options(home, "--seq-len", "129", "--out", str(tmp_path / "out")))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["dense"]


@pytest.mark.parametrize("script", ["distill", "evaluate"])
@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel, BertForSequenceClassification, DistilBertModel])
def test_no_bidirectional_model_is_taken_for_a_language_model(home, tmp_path, script, kind):
    """It would be asked for tokens that it sees. By name, and before anything is written."""
    is_bert = kind is not DistilBertModel
    convert.save(tiny_bert(kind) if is_bert else tiny_distilbert(), tmp_path / "model", tokenizer())
    (tmp_path / "text.txt").write_text("good1 bad1 " * 200, encoding="utf-8")
    main = dict(distill=distill, evaluate=evaluate)[script].main
    got = "bert" if is_bert else "distilbert"
    message = f"^--model: expected a causal language model, got a {got} in .* --dataset glue [^\n]*$"
    with pytest.raises(SystemExit, match=message):
        main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--seq-len", "16", "--device", "cpu",
              "--out", str(tmp_path / "out"), *(["--steps", "1"] if script == "distill" else [])])
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "lock"]


def test_a_decoder_in_the_family_of_bert_is_a_language_model(tmp_path):
    convert.save(tiny_bert(BertLMHeadModel, is_decoder=True), tmp_path / "model", tokenizer())
    model, _ = evaluate.load_teacher(tmp_path / "model", 16)
    assert not evaluate.is_bidirectional(model)


def test_distill_names_the_job(capsys):
    with pytest.raises(SystemExit) as end:
        distill.main(["--dataset", "glue", "--help"])
    assert end.value.code == 0 and "--subset" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        distill.main(["--dataset=glue", "--subset", "rte"])
    assert "the following arguments are required: --model" in capsys.readouterr().err
