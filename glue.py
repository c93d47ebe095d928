"""Distil SEA into BERT or a relative of it, on a task of GLUE.

    python glue.py --model bert-base-uncased --subset mrpc        nyu-mll/glue from the Hugging Face hub
    python glue.py --model DIR --subset mrpc --data train.tsv --valid-data validation.tsv
    python glue.py ... --topk 8 16              students that choose keys with other numbers, too
    python distill.py --dataset glue ...        the same

    teacher     --model with a head for the task. A head that is new is trained first, and the model with
                it, on the labels: fine-tuning. It is kept in OUT/teacher, a --model of later runs
    student     a copy of the teacher with SEA, a control (baselines.py), or its own attention (dense)
    loss        10 hidden + 0.1 kd + mean over layers of (estimate + context + 0 score), see distill.py;
                kd of a score is the mean square. Means are over tokens, of which padding is none

Files have a header, sentence1, sentence2 (for tasks of pairs) and label, and tabs between; nothing is
quoted. A label is a class, counted from 0 as nyu-mll/glue does, or stsb's score.

Prints a line a step, and at the end a table, in percent, of each split whose labels are known but `train`:
GLUE's metrics for the task, and the cosine of sentences' embeddings to the teacher's. Writes the same
records to OUT/log.jsonl, students to OUT/<name>, and a picture of one of SEA's heads to OUT/sea.png.
"""

import argparse
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

import checkpoints
import convert
import distill
import evaluate
import sea

METHODS = (*(name for name in convert.METHODS if name != "window"), "dense")  # a window is of the past
PAIR = ("sentence1", "sentence2")


# -- metrics, of predictions and labels (n,) -------------------------------------------------------


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Of class 1; 0 where there is none of it."""
    both, either = (predicted * labels).sum(), (predicted + labels).sum()
    return (2 * both / either.clamp(min=1)).item()


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Correlation; 0 with a constant, with which it is not defined."""
    x, y = (z.double() - z.double().mean() for z in (predicted, labels))
    norm = (x.norm() * y.norm()).item()
    return (x @ y).item() / norm if norm else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    return pearson(ranks(predicted), ranks(labels))


def ranks(x: Tensor) -> Tensor:
    """From 1; equal numbers share the mean of theirs."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


# Matthews' correlation is Pearson's, of two classes.
METRICS = dict(accuracy=accuracy, f1=f1, matthews=pearson, pearson=pearson, spearman=spearman)


# -- tasks and their data --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    columns: tuple[str, ...]  # of nyu-mll/glue: one sentence, or two
    metrics: tuple[str, ...] = ("accuracy",)
    n_labels: int = 2  # 1: a score

    def tensor(self, labels: list[float]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32 if self.n_labels == 1 else torch.int64)


TASKS = {
    "cola": Task(("sentence",), ("matthews",)),
    "mnli": Task(("premise", "hypothesis"), n_labels=3),
    "mrpc": Task(PAIR, ("accuracy", "f1")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1")),
    "rte": Task(PAIR),
    "sst2": Task(("sentence",)),
    "stsb": Task(PAIR, ("pearson", "spearman"), n_labels=1),
    "wnli": Task(PAIR),
}


@dataclass
class Examples:
    sentences: list[list[str]]  # one list of n, or two
    labels: Tensor  # (n,): classes, int64, or scores, fp32


def load_splits(args) -> dict[str, Examples]:
    """The splits whose labels are known, by name."""
    task = TASKS[args.subset]
    if args.data:
        files = {"train": ("--data", args.data), "validation": ("--valid-data", args.valid_data),
                 "test": ("--test-data", args.test_data)}
        return {split: read_examples(*file, task) for split, file in files.items() if file[1]}
    found = evaluate.hub(f"the dataset nyu-mll/glue ({args.subset}) from the Hugging Face hub",
                         "give files with --data and --valid-data instead",
                         lambda: load_glue(args.subset))
    # Where GLUE keeps the labels of a test split to itself, they are -1.
    return {name: Examples([list(split[column]) for column in task.columns], task.tensor(split["label"]))
            for name, split in found.items() if min(split["label"]) >= 0}


def load_glue(subset: str):
    from datasets import load_dataset  # here, since --data does without

    return load_dataset("nyu-mll/glue", subset)


def read_examples(option: str, file: str, task: Task) -> Examples:
    """Those of a file, see the top. Ends the process if it is another file."""
    header, *lines = evaluate.read_text(option, file).split("\n")
    columns = [*PAIR[: len(task.columns)], "label"]
    if header.split("\t") != columns:
        sys.exit(f"{option}: expected {' '.join(columns)}, with tabs between, in the first line, got "
                 f"{header[:80]!r} in {file}")
    rows = []
    for number, line in enumerate(lines, start=2):
        *sentences, text = line.split("\t")
        label = label_of(text, task.n_labels)
        if line and (len(sentences) != len(task.columns) or label is None):
            wanted = "a number" if task.n_labels == 1 else f"an integer from 0 to {task.n_labels - 1}"
            sys.exit(f"{option}: expected {len(columns)} columns, the last {wanted}, in each line, got "
                     f"{len(sentences) + 1}, the last {text[:20]!r}, in line {number} of {file}")
        if line:
            rows.append((*sentences, label))
    if not rows:
        sys.exit(f"{option}: expected examples below the first line, got none in {file}")
    *sentences, labels = map(list, zip(*rows))
    return Examples(sentences, task.tensor(labels))


def label_of(text: str, n_labels: int) -> float | None:
    """A score if n_labels is 1, else a class; None if it is neither."""
    try:
        label = float(text) if n_labels == 1 else int(text)
    except ValueError:
        return None
    is_one = math.isfinite(label) if n_labels == 1 else 0 <= label < n_labels
    return label if is_one else None


# -- teacher ---------------------------------------------------------------------------------------


def load_teacher(args):
    """Tokenizer, model with a head for the task, and whether that still has to be trained."""
    torch.manual_seed(args.seed)  # a new head's
    n_labels = TASKS[args.subset].n_labels
    tokenizer, (model, is_new) = evaluate.from_hub(
        args.model, load_model=lambda name, dtype: classifier(name, dtype, n_labels))
    if not evaluate.is_bidirectional(model):
        sys.exit("--model: expected BERT or a bidirectional relative of it, got a "
                 f"{model.config.model_type} in {args.model}")
    longest = min(model.config.max_position_embeddings, tokenizer.model_max_length)
    if args.seq_len > longest:
        sys.exit(f"--seq-len: expected at most the model's {longest} tokens, got {args.seq_len}")
    if tokenizer.pad_token is None:
        sys.exit(f"--model: expected a tokenizer with a token for padding, got none in {args.model}")
    model.set_attn_implementation("sea_teacher")  # convert.record sees what it computes
    for name in args.method:  # before the teacher is trained for nothing
        try:
            distill.new_student(name, model, model, args)
        except ValueError as error:
            sys.exit(f"--model: expected one that {name} fits, got {args.model} ({error})")
    return tokenizer, model.to(args.device), is_new


def classifier(name: str, dtype: torch.dtype, n_labels: int):
    """A model with a head of n_labels, and whether that is new: some of it is not in the files, or there
    with other labels. Raises ValueError if any other weight is not."""
    model, found = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=n_labels, dtype=dtype, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True)
    new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    inside = [x for x in new if x.startswith(f"{model.base_model_prefix}.") and ".pooler." not in x]
    if inside:
        raise ValueError(f"expected all weights but the head's, got none for {min(inside)}")
    return model, bool(new)


# -- losses ----------------------------------------------------------------------------------------


@dataclass
class Batch:
    inputs: dict[str, Tensor]  # the model's: input_ids (B, T), attention_mask, ...
    labels: Tensor  # (B,)

    @property
    def valid(self) -> Tensor:
        """Which tokens are none of padding, (B, T)."""
        return self.inputs["attention_mask"].bool()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, n_labels), or a score's mean square."""
    logits = logits.float()
    return F.mse_loss(logits[:, 0], labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)


def distillation_losses(student, teacher, batch: Batch,
                        weights: distill.LossWeights) -> dict[str, Tensor]:
    """The weighted terms, whose sum is the loss: means over tokens, those of logits over sequences."""
    with torch.no_grad(), convert.record(teacher) as of_teacher:
        target = teacher(**batch.inputs, output_hidden_states=True)
    with convert.record(student) as of_student:
        output = student(**batch.inputs, output_hidden_states=True)
    pairs = zip(output.hidden_states, target.hidden_states, strict=True)
    hidden = torch.stack([square_error(s, t, batch.valid) for s, t in pairs]).mean()
    records = zip(of_student, of_teacher, strict=True)
    layers = [layer_losses(s, t, batch.valid, weights) for s, t in records]
    kd = logit_loss(output.logits, target.logits)
    terms = {"hidden": weights.hidden * hidden, "kd": weights.kd * kd}
    if weights.ce:
        terms["ce"] = weights.ce * label_loss(output.logits, batch.labels)
    for name in layers[0]:
        terms[name] = torch.stack([layer[name] for layer in layers]).mean()
    return terms


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits (B, n_labels), or a score's mean square."""
    student, teacher = student.float(), teacher.float()
    if student.shape[1] == 1:
        return F.mse_loss(student, teacher)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True,
                    reduction="batchmean")


def square_error(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean square between (B, T, E), over tokens that are valid (B, T)."""
    square = (student.float() - teacher.float()).square().mean(-1)
    return (square * valid).sum() / valid.sum()


def layer_losses(student: convert.Record, teacher: convert.Record, valid: Tensor,
                 weights: distill.LossWeights) -> dict[str, Tensor]:
    """As distill.layer_losses, of attention to all tokens that are valid (B, T)."""
    outs = (x.out.transpose(1, 2).flatten(2) for x in (student, teacher))  # (B, T, H D)
    terms, n_valid = {"context": square_error(*outs, valid)}, valid.sum(1)
    if weights.score:
        terms["score"] = weights.score * score_loss(student, teacher, valid)
    if student.sea is not None and student.sea.scores is not None:
        config, result, seen = student.config, student.sea, valid * n_valid[:, None]
        cells, ops = config.cell_layout(result.in_cells), sea.operations(config, teacher.q)
        keys = sea.take(teacher.k, sea.valid_first(valid))
        pooled = ops.pool_attention(teacher.q, keys, seen, config.width, teacher.scale, **cells)
        # Means over keys are over a sequence's own.
        pooled = sea.PooledAttention(pooled.cells, pooled.a_log_a, pooled.a_square,
                                     n_keys=n_valid[:, None, None])
        terms["estimate"] = sea.estimate_loss(result.scores, pooled, row=result.row, **cells)
    return terms


def score_loss(student: convert.Record, teacher: convert.Record, valid: Tensor) -> Tensor:
    """sea.score_loss, a sequence at a time, since its means over keys take in padding."""
    total = 0.0
    for i, is_token in enumerate(valid):
        q, k, teacher_q, teacher_k = (x[i : i + 1, :, is_token] for x in (
            student.q * student.scale, student.k, teacher.q * teacher.scale, teacher.k))
        seen = is_token.sum().expand(1, q.shape[2])
        total = total + q.shape[2] * sea.score_loss(q, k, teacher_q, teacher_k, seen, 1.0)
    return total / valid.sum()


# -- training and measuring ------------------------------------------------------------------------


@dataclass
class Job:
    """What teacher and students share."""

    args: argparse.Namespace
    log: distill.Log
    tokenizer: PreTrainedTokenizerBase
    inputs: Collection[str]  # names of what the model takes
    splits: dict[str, Examples]
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # the teacher's, of splits: (n, E)

    def batch(self, split: str, index: Tensor) -> Batch:
        """The examples of these numbers, padded to the longest of them, on the device."""
        examples = self.splits[split]
        sentences = [[texts[i] for i in index.tolist()] for texts in examples.sentences]
        # Heads look at the first column, where padding on the left would stand.
        inputs = self.tokenizer(*sentences, padding=True, padding_side="right", truncation=True,
                                max_length=self.args.seq_len, return_attention_mask=True,
                                return_tensors="pt").to(self.args.device)
        inputs = {name: x for name, x in inputs.items() if name in self.inputs}
        return Batch(inputs, examples.labels[index].to(self.args.device))


def fit(name: str, model, losses: Callable[[Batch], dict[str, Tensor]], epochs: int,
        config: distill.OptimizerConfig, job: Job, dropout: bool = True) -> dict[str, float]:
    """Train `model` by the sum of losses(batch), for some passes over the training split, with the dropout
    that it has or without; returns what `measure` says of it after the last. Raises distill.Diverged."""
    args, n = job.args, len(job.splits["train"].labels)
    step, steps, clock = 0, epochs * -(-n // args.batch), distill.Clock()
    optimizer = distill.make_optimizer(model, config)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(distill.seed_of(epoch, args.seed))
        for index in torch.randperm(n, generator=generator).split(args.batch):
            step += 1
            model.train(dropout)
            share = distill.learning_rate(step, steps, config.schedule, config.warmup)
            lr = distill.set_learning_rate(optimizer, share)
            distill.redraw_features(model, step, args)
            torch.manual_seed(distill.seed_of(step, args.seed))  # dropout's
            batch = job.batch("train", index)
            with evaluate.autocast(args):
                terms = losses(batch)
            sum(terms.values()).backward()
            terms = {key: x.item() for key, x in terms.items()}
            norm = distill.clip_gradients(model, config.clip)
            if not math.isfinite(sum(terms.values()) + norm):
                raise distill.Diverged(f"{name} step {step}: loss or gradient is not finite: {terms}")
            optimizer.step()
            optimizer.zero_grad()
            clock.tick(int(batch.valid.sum()))
            job.log.step(name, step, steps, terms, lr, clock)
        scores = measure(model, job)
        print(f"{name} step {step:05d} | {in_words(scores)}", flush=True)
        job.log.record(name=name, step=step, scores=scores)
        clock.resume()
    return scores


@torch.no_grad()
def outputs(model, split: str, job: Job) -> tuple[Tensor, Tensor]:
    """Of the examples of a split: logits (n, n_labels), and embeddings (n, E), the means of the last hidden
    states over tokens."""
    model.eval()
    logits, embeddings = [], []
    for index in torch.arange(len(job.splits[split].labels)).split(job.args.batch):
        batch = job.batch(split, index)
        with evaluate.autocast(job.args):
            output = model(**batch.inputs, output_hidden_states=True)
        valid = batch.valid[..., None]
        embedding = (output.hidden_states[-1].float() * valid).sum(1) / valid.sum(1)
        logits.append(output.logits.float().cpu())
        embeddings.append(embedding.cpu())
    return torch.cat(logits), torch.cat(embeddings)


def measure(model, job: Job) -> dict[str, float]:
    """Each metric of the task on each split but `train`, by "split metric", and the mean cosine of
    embeddings to the teacher's."""
    scores, task = {}, TASKS[job.args.subset]
    for split in [name for name in job.splits if name != "train"]:
        logits, embeddings = outputs(model, split, job)
        predicted = logits[:, 0] if task.n_labels == 1 else logits.argmax(-1)
        for metric in task.metrics:
            scores[f"{split} {metric}"] = METRICS[metric](predicted, job.splits[split].labels)
        if split in job.embeddings:
            cosine = F.cosine_similarity(embeddings, job.embeddings[split], dim=-1)
            scores[f"{split} cosine"] = cosine.mean().item()
    return scores


@torch.no_grad()
def keys_per_query(model, job: Job) -> float:
    """Mean keys that a query attends to, over layers, heads and the queries of the first examples."""
    batch = job.batch("train", torch.arange(len(job.splits["train"].labels))[: job.args.batch])
    with evaluate.autocast(job.args), convert.record(model) as records:
        model(**batch.inputs)
    keys = batch.valid.sum(1)[:, None, None]  # dense, or a control without a choice: all
    if records[0].sea is not None and records[0].sea.row is not None:
        keys = torch.stack([r.sea.n_attended().float().mean(1, keepdim=True) for r in records]).mean(0)
    valid = batch.valid[:, None]  # (B, 1, T)
    return ((keys * valid).sum() / valid.sum()).item()


@torch.no_grad()
def draw(student, teacher, job: Job) -> None:
    """Of the longest of the first examples that validate: the median head, see evaluate.draw_heads."""
    split = next(name for name in job.splits if name != "train")
    first = torch.arange(len(job.splits[split].labels))[: job.args.batch]
    longest = job.batch(split, first).valid.sum(1).argmax().cpu()
    inputs, records = job.batch(split, first[longest][None]).inputs, []
    for model in (student, teacher):
        with evaluate.autocast(job.args), convert.record(model) as found:
            model.eval()(**inputs)
        records.append(found)
    evaluate.draw_heads(*records, Path(job.args.out) / "sea.png", [])


def in_words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * score:.1f}" for name, score in scores.items())


# -- options ---------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="glue.py", description=__doc__.split("\n\n")[0])
    p.set_defaults(shard=False)
    add = p.add_argument
    add("--dataset", choices=("glue",), default="glue", help="what distill.py knows this job by")
    add("--subset", choices=TASKS, default="mrpc", help="task of GLUE (default: %(default)s)")
    add("--model", required=True, help="hub id, or local folder, of an encoder, with or without a head "
        "that was trained on the task")
    add("--data", metavar="FILE", help="training examples (none: nyu-mll/glue from the hub)")
    add("--valid-data", metavar="FILE", help="validation examples, with --data")
    add("--test-data", metavar="FILE", help="more examples to measure on, with --data")
    add("--seq-len", type=int, default=128, help="tokens an example, at most: longer ones are cut "
        "(default: %(default)s)")
    add("--method", nargs="+", choices=METHODS, default=METHODS, help="students to train, one after the "
        f"other (default: {' '.join(METHODS)})")
    add("--epochs", type=int, default=5, help="a student's passes over the training examples "
        "(default: %(default)s)")
    add("--batch", type=int, default=32, help="examples a step (default: %(default)s)")
    add("--teacher-epochs", type=int, default=3, help="passes that fine-tune a teacher whose head is "
        "new; 0: none, where its embeddings are wanted and not its labels (default: %(default)s)")
    add("--teacher-lr", type=float, default=5e-5, help="their learning rate at its peak; it rises over "
        "a tenth of the steps and falls to 0 (default: %(default)s)")
    add("--topk", type=int, nargs="+", default=[], metavar="K", help="numbers of keys to measure "
        f"{', '.join(name for name in METHODS if name in evaluate.WITH_TOPK)} with after training, "
        "besides their own")
    groups = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    add("--sea", type=evaluate.settings(sea.SEAConfig), **groups, help="fields of sea.SEAConfig: width, "
        "topk, nbf, group, backend, ... (none: those of convert.attach)")
    add("--loss", type=evaluate.settings(distill.LossWeights), **groups, help="weights of terms: "
        "hidden=10 kd=0.1 score=0 unless given, and ce=0, of the labels")
    add("--optimizer", type=evaluate.settings(distill.OptimizerConfig), **groups, help="of students; "
        "unless given lr=5e-5 lr_new=2e-3 schedule=linear, control_lr as lr, others as in distill.py")
    add("--no-dropout", action="store_true", help="students learn without dropout, which the teacher whom "
        "they are to equal has not either; a dense student then is the teacher")
    add("--seed", type=int, default=0, help="of weights, data order, dropout and redrawn features "
        "(default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device; bf16 "
        "autocast on cuda (default: %(default)s)")
    add("--out", default="out/glue", help="folder for what is written (default: %(default)s)")
    args = p.parse_args(argv)
    check_options(p, args)
    return args


def check_options(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what nothing can be done with; turn --sea into a dict, --loss and --optimizer into their
    dataclasses."""
    for name, least in (("epochs", 1), ("batch", 1), ("teacher_epochs", 0)):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')}: expected an integer >= {least}, got {getattr(args, name)}")
    if args.seq_len < 8:
        p.error(f"--seq-len: expected an integer >= 8, up to 4 are special tokens, got {args.seq_len}")
    if any(k < 1 for k in args.topk):
        p.error(f"--topk: expected integers >= 1, got {args.topk}")
    if not 0 < args.teacher_lr < math.inf:
        p.error(f"--teacher-lr: expected a number > 0, got {args.teacher_lr}")
    if not 0 <= args.seed < 2**20:
        p.error(f"--seed: expected an integer from 0 to {2**20 - 1}, got {args.seed}")
    if len(set(args.method)) < len(args.method):
        p.error(f"--method: expected each once, got {' '.join(args.method)}")
    if bool(args.data) != bool(args.valid_data) or args.test_data and not args.data:
        p.error("--data: expected with --valid-data, and --test-data with both, got one of them alone")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        p.error("--dataset: expected one process for glue, got several, under torchrun")
    evaluate.check_device(p, args)
    args.sea, option = dict(args.sea), "--loss"
    evaluate.check_backend(p, "--sea", args.sea.get("backend"), args.device)
    try:
        args.loss = distill.LossWeights(**{"ce": 0.0, "hidden": 10.0, "kd": 0.1, **dict(args.loss)})
        option = "--optimizer"
        given = {"lr": 5e-5, "lr_new": 2e-3, "schedule": "linear", **dict(args.optimizer)}
        args.optimizer = distill.OptimizerConfig(**{"control_lr": given["lr"], **given})
        option = "--sea"
        for name in set(args.method) - {"dense"}:
            convert.METHODS[name](sea.SEAConfig(n_head=1, d_head=2, causal=False,
                                                **distill.fields_of(name, args)))
    except ValueError as error:
        p.error(f"{option} {error}")


# -- the job ---------------------------------------------------------------------------------------


@dataclass
class Line:
    """A line of the table; no scores: its training diverged."""

    name: str
    keys: float = math.nan  # a query and head
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


def fine_tune(teacher, job: Job) -> None:
    args = job.args
    steps = args.teacher_epochs * -(-len(job.splits["train"].labels) // args.batch)
    config = distill.OptimizerConfig(lr=args.teacher_lr, schedule="linear", warmup=steps // 10)
    try:
        fit("teacher", teacher,
            lambda batch: {"ce": label_loss(teacher(**batch.inputs).logits, batch.labels)},
            args.teacher_epochs, config, job)
    except distill.Diverged as error:
        sys.exit(f"{error}; a smaller --teacher-lr may help")
    convert.save(teacher, Path(args.out) / "teacher", job.tokenizer)


def distil(name: str, teacher, job: Job) -> list[Line]:
    """One student from its beginning to its end: its line, and one for each number of --topk."""
    args, began = job.args, time.perf_counter()
    student = distill.new_student(name, teacher, teacher, args)
    try:
        scores = fit(name, student,
                     lambda batch: distillation_losses(student, teacher, batch, args.loss),
                     args.epochs, distill.optimizer_of(name, args), job, not args.no_dropout)
    except distill.Diverged as error:
        print(error, flush=True)
        return [Line(name)]
    seconds = time.perf_counter() - began
    convert.save(student, Path(args.out) / name, job.tokenizer)
    if name == "sea":
        draw(student, teacher, job)
    lines = [Line(name, keys_per_query(student, job), scores, seconds)]
    for topk in args.topk if name in evaluate.WITH_TOPK else []:
        convert.set_option(student, topk=topk)
        lines.append(Line(f"{name} topk {topk}", keys_per_query(student, job), measure(student, job)))
    return lines


def print_table(lines: list[Line]) -> None:
    columns = list(lines[0].scores)
    print("\n" + " " * 18 + "".join(f"  {name}" for name in [*columns, "keys/query", "training"]))
    for line in lines:
        scores = [f"{100 * line.scores.get(name, math.nan):{len(name) + 2}.1f}" for name in columns]
        minutes = "" if line.seconds is None else f"{line.seconds / 60:9.1f}m"
        print(f"{line.name:18}{''.join(scores)}{line.keys:12.1f}{minutes}")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Returns the scores of the table, as shares of 1."""
    args = parse(argv)
    header = evaluate.start("glue.py", argv, args)
    with checkpoints.locked(args.out), evaluate.room_for(args.out):
        results = run(args, header)
    if diverged := [name for name, scores in results.items() if not scores]:
        sys.exit(f"diverged: {', '.join(diverged)}; a smaller lr or lr_new of --optimizer may help")
    return results


def run(args, header: dict[str, str]) -> dict[str, dict[str, float]]:
    began, log = time.perf_counter(), distill.Log(args)
    checkpoints.check_places(args.out)
    for name in args.method:
        if (Path(args.out) / name).resolve() == Path(args.model).resolve():
            sys.exit(f"--out: expected another folder than that of {args.model}, which would be lost, "
                     f"got {args.out}")
    splits = load_splits(args)
    tokenizer, teacher, is_new = load_teacher(args)
    job = Job(args, log, tokenizer, inspect.signature(teacher.forward).parameters, splits)
    n = sum(p.numel() for p in teacher.parameters())
    sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
    print(f"teacher {n / 1e6:.1f} M parameters, its head {'new' if is_new else 'trained'} | "
          f"{args.subset}: {sizes}", flush=True)
    log.record(**header, args=vars(args), parameters=n)
    if is_new and args.teacher_epochs:
        fine_tune(teacher, job)
    teacher.eval().requires_grad_(False)
    job.embeddings = {name: outputs(teacher, name, job)[1] for name in splits if name != "train"}
    lines = [Line("teacher", keys_per_query(teacher, job), measure(teacher, job))]
    print(f"teacher | {in_words(lines[0].scores)}", flush=True)
    for name in args.method:
        lines += distil(name, teacher, job)
    for line in lines:
        log.record(**vars(line))
    print_table(lines)
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes, written to {args.out}/")
    return {line.name: line.scores for line in lines}


if __name__ == "__main__":
    main()
