"""Distil SEA into a pretrained causal language model.

    python distill.py                      no download, no GPU: trains a tiny OPT on Python's own
                                           documentation, then distils SEA and two controls from it
    python distill.py --model opt-125m     facebook/opt-125m, WikiText-2, the paper's rates and steps;
                                           --teacher-steps N fine-tunes it there first, as the authors do
    python distill.py --model DIR --data FILE [--valid-data FILE]        your own model and text
    python distill.py --model DIR --data FILE --load out/sea --out out/more      a saved student, further
    torchrun --nproc-per-node 2 distill.py ... [--shard]                 several GPUs or CPUs
    python distill.py --dataset glue --help                              BERT on GLUE, see glue.py

    teacher     the pretrained model, which stays as it is
    student     a copy of it that is trained, with other attention:
      sea         SEA
      performer   control: a Performer, the linear attention that SEA estimates with
      window      control: the first and the last keys alone, as many as SEA attends to
      reformer    control: keys found by hashing, about as many as SEA attends to
      dense       control: the teacher's own attention
      oracle      SEA whose cells come from the teacher's attention: what is lost to the estimate
    loss        0.1 ce + 5 hidden + 0.2 kd + mean over layers of (estimate + choice + context + 0 score)
      ce          cross entropy of the next token
      hidden      mean square between hidden states of student and teacher, mean over layers
      kd          KL(teacher || student) of the next token
      estimate    L_estimate: SEA's cells against the teacher's attention
      choice      attention of the mean query of heads that share a choice of bins against the teacher's
      context     L_context: mean square between the outputs of an attention layer
      score       L_score: the student's own dense attention against the teacher's; the paper has 1

Prints a line a step and a table of perplexities at the end. Writes the same records to
OUT/log.jsonl, students to OUT/<name>, which evaluate.py measures more closely, and checkpoints for
--resume to OUT/<name>.ckpt, see checkpoints.py. SIGTERM or Ctrl-C ends the training of a student after
its step, saved. A step's data and random numbers follow from --seed and the step alone: a run that was
killed and resumed goes on as if nothing had happened, and another number of processes, --shard or
another --micro-batch change no more than rounding and dropout.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import checkpoints
import convert
import evaluate
import sea


# -- settings --------------------------------------------------------------------------------------


def check_numbers(config) -> None:
    """Raises ValueError unless all numbers of a dataclass are >= 0, and finite but for `clip`."""
    for name, x in vars(config).items():
        if not isinstance(x, str) and not (x >= 0 and (name == "clip" or math.isfinite(x))):
            raise ValueError(f"{name}: expected a finite number >= 0, got {x}")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms, see the top of this file."""

    ce: float = 0.1
    hidden: float = 5.0
    kd: float = 0.2
    score: float = 0.0  # Differs: 1 in the paper, which made students worse here

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's, by default as in the paper, where nothing else is said."""

    lr: float = 2e-6  # of pretrained weights, at its peak
    lr_new: float = 1e-4  # of SEA's
    control_lr: float = 1e-5  # of the controls' weights
    beta2: float = 0.95  # Differs: 0.999, which takes a thousand steps to come to rest
    schedule: str = "constant"  # or linear or cosine decay to 0
    warmup: int = 0  # steps over which the learning rates rise to their peaks
    weight_decay: float = 0.01  # none on biases and norms
    clip: float = 1.0  # gradient norm at most, inf for any
    redraw_every: int = 1000  # steps between draws of SEA's random features, 0 for no more draws

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: expected constant, linear or cosine, got {self.schedule}")
        if not self.clip > 0:
            raise ValueError(f"clip: expected a number > 0, got {self.clip}")
        if not self.beta2 < 1:
            raise ValueError(f"beta2: expected a number below 1, got {self.beta2}")
        check_numbers(self)


# Where the jobs differ. With --model: section 4 and appendix of the paper, which the defaults of
# OptimizerConfig follow as well; of an OPT that the authors trained, by its name: their numbers, with
# controls at five times SEA's rate, as theirs are at 125M.
# --sea cell_keys=false bin=0 --loss score=1 make the rest theirs, too.
# Without: found by trying, for two CPU cores.
PAPER = dict(steps=10_000, batch=32, eval_every=500, teacher_steps=0, teacher_lr=1e-5, sea={},
             optimizer={})
OF_OPT = {
    "opt-125m": dict(optimizer=dict(beta2=0.999)),
    "opt-350m": dict(optimizer=dict(beta2=0.999)),
    "opt-1.3b": dict(batch=36, optimizer=dict(beta2=0.999)),
    "opt-2.7b": dict(batch=144, optimizer=dict(lr=5e-7, lr_new=5e-6, control_lr=2.5e-6, beta2=0.999)),
}
TINY = dict(steps=120, batch=8, eval_every=60, teacher_steps=1000, teacher_lr=3e-3,
            sea=dict(width=64, topk=16, bin=2, local=4, first=2),
            optimizer=dict(lr=5e-4, lr_new=1e-2, control_lr=5e-4, schedule="linear"))
PERFORMER_NBF = 1  # with --model, as the authors have it: int(D ln D) random features


def job_of(model: str | None) -> dict:
    """The settings of the job that --model names."""
    return PAPER | OF_OPT.get(model, {}) if model else TINY


# -- data and teacher ------------------------------------------------------------------------------


def seed_of(step: int, seed: int) -> int:
    """Of a step's random numbers: no more than the 32 bits that the CPU's generator looks at."""
    return (seed * 2654435761 + step) % 2**32  # 2^32 over the golden ratio keeps seeds far apart


def batch_of(step: int, tokens: Tensor, seq_len: int, batch: int, seed: int) -> Tensor:
    """Random windows (batch, seq_len) of a token stream, those of this step."""
    generator = torch.Generator().manual_seed(seed_of(step, seed))
    starts = torch.randint(len(tokens) - seq_len + 1, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)].long()


def train_teacher(args, log: "Log") -> Path:
    """A teacher for --teacher-steps on the job's text, unless this run has it: --model, or a tiny OPT
    from scratch. Returns its folder."""
    folder = Path(args.out) / "teacher"
    if evaluate.rank_and_size()[0] == 0 and not (args.resume and evaluate.run_of(folder) == args.run):
        documents, _ = evaluate.load_texts(args)
        if args.model:
            model, tokenizer = evaluate.load_teacher(args.model, args.seq_len)
            model.set_attn_implementation("sdpa")
            model.requires_grad_(True).train()
        else:
            tokenizer = tiny_tokenizer(documents)
            model = tiny_model(len(tokenizer), args.seq_len, args.seed)
        tokens = evaluate.tokenize(documents, tokenizer)
        evaluate.windows(tokens, args.seq_len)  # at least one
        checkpoints.record_run(args)
        model.to(args.device)
        train_on_text(model, tokens, args, log)
        model.config.sea_run = args.run
        convert.save(model, folder, tokenizer)
    if dist.is_initialized():
        dist.barrier()
    return folder


def train_on_text(model, tokens: Tensor, args, log: "Log") -> None:
    """As an ordinary causal language model, for --teacher-steps at --teacher-lr."""
    optimizer = make_optimizer(model, OptimizerConfig(lr=args.teacher_lr, lr_new=0, weight_decay=0.1))
    clock, steps = Clock(), args.teacher_steps
    with noting_signals() as signals:
        for step in range(1, steps + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, steps, "linear", warmup=50))
            x = batch_of(step, tokens, args.seq_len, 4, args.seed).to(args.device)
            with evaluate.autocast(args):
                loss = model(x, labels=x).loss
            loss.backward()
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.tick(x.numel())
            log.step("teacher", step, steps, {"ce": loss.item()}, lr, clock)
            if signals:
                name = signal.Signals(signals[0]).name
                print(f"teacher step {step:05d} | stopped by {name}; it begins again", flush=True)
                sys.exit(128 + signals[0])


def tiny_tokenizer(documents: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer  # transformers brings it

    bpe, special = ByteLevelBPETokenizer(), ["</s>", "<pad>"]
    bpe.train_from_iterator(documents, vocab_size, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="</s>",
                                   eos_token="</s>", pad_token="<pad>")


def tiny_model(vocab_size: int, seq_len: int, seed: int) -> OPTForCausalLM:
    """An untrained OPT of 3 layers and 3 heads of 32.

    It starts from wide weights and sinusoidal positions, since from OPT's own start (std 0.02, random
    positions) so short a training learns little attention: replacing all attention by a running mean
    then costs 3 % of perplexity, not 100 %.
    """
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=vocab_size, hidden_size=96, word_embed_proj_dim=96, num_hidden_layers=3,
        ffn_dim=384, num_attention_heads=3, max_position_embeddings=seq_len, dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, init_std=0.06))
    position = model.get_decoder().embed_positions.weight.data
    phase = torch.arange(len(position))[:, None] * 1000 ** -torch.linspace(0, 1, 48)
    position.copy_(0.1 * torch.cat([phase.sin(), phase.cos()], dim=1))
    return model


# -- students --------------------------------------------------------------------------------------


def new_student(name: str, original, teacher, args):
    """One of evaluate.METHODS: a copy of `original`, the teacher as it was loaded, with new
    attention."""
    torch.manual_seed(args.seed)
    student = copy.deepcopy(original).requires_grad_(True)
    if name != "dense":
        convert.attach(student, method="sea" if name == "oracle" else name, **fields_of(name, args))
    if name == "oracle":
        evaluate.follow_teacher(student, teacher)
    return student


def fields_of(name: str, args) -> dict:
    """Those of --sea that a student has."""
    not_its = ("query_stride", "cell_keys") if name in convert.BASELINES else ()  # they estimate no rows
    own = dict(nbf=PERFORMER_NBF) if name == "performer" and args.model else {}
    return own | {key: x for key, x in args.sea.items() if key not in not_its}


def optimizer_of(name: str, args) -> OptimizerConfig:
    """Of a student: controls have a rate of their own."""
    config = args.optimizer
    return config if name in ("sea", "oracle") else replace(config, lr=config.control_lr)


# -- losses, section 6 of the method ---------------------------------------------------------------


def distillation_losses(student, teacher, x: Tensor, weights: LossWeights,
                        run=None) -> dict[str, Tensor]:
    """The weighted terms, whose sum is the loss, of token ids x (B, T). run: what data_parallel gave
    for the student."""
    with torch.no_grad(), convert.record(teacher) as of_teacher:
        target = teacher(x, output_hidden_states=True, use_cache=False)
    with convert.record(student) as of_student:
        output = (run or student)(x, output_hidden_states=True, use_cache=False)
    ce, kd = logit_losses(output.logits, target.logits, x)
    hidden = hidden_loss(output.hidden_states, target.hidden_states)
    layers = [layer_losses(s, t, weights) for s, t in zip(of_student, of_teacher, strict=True)]
    terms = {"ce": weights.ce * ce, "hidden": weights.hidden * hidden, "kd": weights.kd * kd}
    for name in dict.fromkeys(itertools.chain(*layers)):  # heads may share a choice in some layers alone
        terms[name] = torch.stack([layer[name] for layer in layers if name in layer]).mean()
    return terms


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of the mean square between hidden states (B, T, E)."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(s.float(), t.float()) for s, t in pairs]).mean()


def logit_losses(student: Tensor, teacher: Tensor, x: Tensor,
                 chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Means over tokens of the next token's cross entropy and of KL(teacher || student).

    Logits (B, T, vocabulary), token ids x (B, T). `chunk` tokens at a time, again in the backward pass:
    in fp32 a large vocabulary's logits are by far the largest tensors of a step.
    """

    def sums(student, teacher, target):
        log_q, log_p = (sea.at_least_fp32(x).log_softmax(-1) for x in (student, teacher))
        return torch.stack([F.nll_loss(log_q, target, ignore_index=-1, reduction="sum"),
                            F.kl_div(log_q, log_p, log_target=True, reduction="sum")])

    target = F.pad(x[:, 1:], (0, 1), value=-1)  # the last token predicts nothing
    parts = zip(*(y.flatten(0, 1).split(chunk) for y in (student, teacher, target)))
    ce, kd = sum(checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False)
                 for part in parts)
    return ce / target[:, :-1].numel(), kd / target.numel()


def layer_losses(student: convert.Record, teacher: convert.Record,
                 weights: LossWeights) -> dict[str, Tensor]:
    """Of one attention layer: L_context; L_score, if it has a weight; if the student has an estimate
    L_estimate and, if heads share a choice of bins, its loss."""
    B, _, T, _ = student.q.shape
    seen = torch.arange(1, T + 1, device=student.q.device).expand(B, T)
    terms = {"context": F.mse_loss(student.out.float(), teacher.out.float())}
    if weights.score:  # scales may differ, since OPT scales q before attention: each record has its own
        terms["score"] = weights.score * sea.score_loss(
            student.q * student.scale, student.k, teacher.q * teacher.scale, teacher.k, seen, 1.0)
    if student.sea is not None and student.sea.scores is not None:
        config, result = student.config, student.sea
        # With bins the queries of a row have its cells, so that the row itself stands for all of them.
        ops, every = sea.operations(config, teacher.q), config.query_stride if config.has_bins else 1
        cells = config.cell_layout(result.in_cells[:, ::every])
        pooled = ops.pool_attention(teacher.q[:, :, ::every], teacher.k, seen[:, ::every], config.width,
                                    teacher.scale, **cells)
        terms["estimate"] = sea.estimate_loss(result.scores, pooled, row=result.row[:, ::every], **cells)
        if result.head_share is not None:
            terms["choice"] = sea.choice_loss(result.head_share, student.q, student.k, teacher.q, teacher.k,
                                              config, student.scale, teacher.scale)
    return terms


# -- training --------------------------------------------------------------------------------------


@dataclass
class Job:
    """What all students of a run share."""

    args: argparse.Namespace
    log: "Log"
    original: torch.nn.Module  # the teacher as it was loaded: what is sharded cannot be copied
    teacher: torch.nn.Module  # on the device
    tokenizer: PreTrainedTokenizerFast
    tokens: Tensor  # (n,) to train on
    valid: Tensor  # (n, T) windows
    teacher_ppl: float
    signals: list[int]  # that ask to stop, as they come in


class Diverged(Exception):
    """A student whose training cannot go on."""


def train(name: str, student, job: Job) -> tuple[float, float | None]:
    """Distil the teacher into `student`, both on the device. Returns the validation perplexity
    at the end and the tokens a second over all processes, None after too few steps to tell."""
    args, config, ppl = job.args, optimizer_of(name, job.args), None
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(student, config)
    done = checkpoints.resume(name, student, optimizer, args)
    if done:
        ppl = evaluate.perplexity(student, job.valid, args)
        print(f"{name} resumes after step {done:05d}, val ppl {ppl:.2f}", flush=True)
        if done == args.steps:  # it may have been removed, or never saved
            save_student(name, student, job)
    run, clock = data_parallel(student, args), Clock()
    for step in range(done + 1, args.steps + 1):
        student.train()
        share = learning_rate(step, args.steps, config.schedule, config.warmup)
        lr = set_learning_rate(optimizer, share)
        redraw_features(student, step, args)
        terms = add_gradients(student, run, step, job)
        if not math.isfinite(sum(terms.values())):
            raise Diverged(f"{name} step {step}: the loss is not finite: {terms}")
        if not math.isfinite(clip_gradients(student, config.clip)):
            raise Diverged(f"{name} step {step}: the gradient is not finite, the loss is: {terms}")
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(args.batch * args.seq_len)
        job.log.step(name, step, args.steps, terms, lr, clock)
        stop_if_asked(name, student, optimizer, step, job)
        if step % args.eval_every == 0 or step == args.steps:
            ppl = evaluate.perplexity(student, job.valid, args)
            save_student(name, student, job)
            checkpoints.write(name, student, optimizer, step, args)
            print(f"{name} step {step:05d} | val ppl {ppl:.2f} (teacher {job.teacher_ppl:.2f}) | "
                  "saved", flush=True)
            job.log.record(name=name, step=step, ppl=ppl)
            clock.resume()
    return ppl, clock.tokens / clock.seconds if clock.steps else None


@contextlib.contextmanager
def noting_signals():
    """A list of the signals SIGTERM and SIGINT (Ctrl-C) that came in, within, instead of their effect; a
    second Ctrl-C has it."""
    caught = []

    def note(number, _):
        # torchrun passes a Ctrl-C on to processes that have had it from the terminal
        if number in caught and number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked(name: str, student, optimizer, step: int, job: Job) -> None:
    """End all processes after this step, if one of them got a signal."""
    asked = max(job.signals, default=0)
    asked = int(evaluate.over_processes([float(asked)], job.args, dist.ReduceOp.MAX)[0])
    if asked:
        checkpoints.write(name, student, optimizer, step, job.args)
        print(f"{name} step {step:05d} | stopped by {signal.Signals(asked).name}, saved; --resume goes "
              "on", flush=True)
        evaluate.stop_processes()
        sys.exit(128 + asked)


def add_gradients(student, run, step: int, job: Job) -> dict[str, float]:
    """Forward and backward through this step's batch, a micro-batch at a time; returns the terms of the
    loss, of all processes."""
    args, (rank, size) = job.args, evaluate.rank_and_size()
    torch.manual_seed(seed_of(step, args.seed) * 2**10 + rank)  # dropout's
    mine = batch_of(step, job.tokens, args.seq_len, args.batch, args.seed)[rank::size]
    parts, total = mine.split(args.micro_batch), {}
    for i, x in enumerate(parts, start=1):
        with exchanging(run, now=i == len(parts)):  # once a step
            with evaluate.autocast(args):
                terms = distillation_losses(student, job.teacher, x.to(args.device), args.loss, run)
            (sum(terms.values()) / len(parts)).backward()
        for name, value in terms.items():
            total[name] = total.get(name, 0.0) + value.item() / len(parts)
    return dict(zip(total, (x / size for x in evaluate.over_processes(list(total.values()), args))))


def make_optimizer(model, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in four groups: pretrained or new weights, with decay or, for biases and norms, without."""
    new, members = set(convert.sea_parameters(model)), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((name in new, parameter.ndim > 1), []).append(parameter)
    groups = []
    for (is_new, decays), params in members.items():
        peak = config.lr_new if is_new else config.lr
        decay = config.weight_decay if decays else 0.0
        groups.append(dict(params=params, lr=peak, peak=peak, weight_decay=decay))
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2))


def learning_rate(step: int, steps: int, schedule: str, warmup: int) -> float:
    """As a share of its peak, which it reaches with the last step of the warm-up."""
    done = max(0, step - max(1, warmup)) / max(1, steps - max(0, warmup - 1))
    cosine = (1 + math.cos(math.pi * done)) / 2
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[schedule]
    return decay * min(1.0, step / max(1, warmup))


def set_learning_rate(optimizer, share: float) -> float:
    """Give every group this share of its peak; returns the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return max(group["lr"] for group in optimizer.param_groups)


def clip_gradients(model, most: float) -> float:
    """Scale the gradients down to norm `most`; returns the norm they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def redraw_features(student, step: int, args) -> None:
    """New random features in all layers, if they are due; the same in all processes."""
    every = args.optimizer.redraw_every
    if every and step > 1 and (step - 1) % every == 0:
        generator = torch.Generator().manual_seed(seed_of(step, args.seed))
        for module in convert.attention_modules(student):
            if hasattr(module, "sea"):
                module.sea.redraw_features(generator)


def save_student(name: str, student, job: Job) -> None:
    """All processes call this; the first writes."""
    weights = get_model_state_dict(student, options=checkpoints.WHOLE) if job.args.shard else None
    if evaluate.rank_and_size()[0] == 0:
        student.config.sea_run = job.args.run
        convert.save(student, Path(job.args.out) / name, job.tokenizer, weights)


def fingerprint(tokens: Tensor, teacher) -> list[float]:
    """Of the text and the teacher; a sum of weights may differ in its last bits on another machine."""
    weight = sum(p.double().abs().sum().item() for p in teacher.parameters())
    position, text = 1, 0
    for part in tokens.split(2**24):  # a copy of all in int64 would take twice their memory
        text += int((part * torch.arange(position, position + len(part))).sum())
        position += len(part)
    return [len(tokens), text, round(weight, 2)]


class Clock:
    """Milliseconds a step and tokens a second. The first 10 steps, which warm up, do not count, nor
    does the time up to resume()."""

    def __init__(self, skip: int = 10):
        self.skip, self.steps, self.tokens, self.seconds = skip, 0, 0, 0.0
        self.step_seconds, self.last = 0.0, time.perf_counter()

    def tick(self, tokens: int) -> None:
        now = time.perf_counter()
        self.step_seconds, self.last = now - self.last, now
        self.skip -= 1
        if self.skip < 0:
            self.steps += 1
            self.tokens += tokens
            self.seconds += self.step_seconds

    def resume(self) -> None:
        self.last = time.perf_counter()


class Log:
    """Lines for people on standard output, the same records for programs in OUT/log.jsonl."""

    def __init__(self, args):
        self.path = Path(args.out) / "log.jsonl"

    def record(self, **fields) -> None:
        if evaluate.rank_and_size()[0]:
            return
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):  # a line that a kill or a full disk cut off
                file.write(b"\n")
            file.write(evaluate.as_json(fields).encode() + b"\n")

    def step(self, name: str, step: int, steps: int, terms: dict[str, float], lr: float,
             clock: Clock) -> None:
        loss, ms, speed = sum(terms.values()), 1000 * clock.step_seconds, ""
        if clock.steps:
            minutes = (steps - step) * clock.seconds / clock.steps / 60
            speed = f" | {clock.tokens / clock.seconds:,.0f} tok/s | eta {minutes:.1f}m"
        parts = " + ".join(f"{key} {value:.3g}" for key, value in terms.items())
        print(f"{name} step {step:05d}/{steps:05d} ({100 * step // steps}%) | loss {loss:.3f} = "
              f"{parts} | lr {lr:.2g} | {ms:.0f} ms{speed}", flush=True)
        self.record(name=name, step=step, loss=loss, terms=terms, lr=lr, ms=ms)


# -- several processes -----------------------------------------------------------------------------


def data_parallel(student, args):
    """What calls `student` in training: its DistributedDataParallel, or itself if it is sharded or the
    only process's."""
    if args.shard or not dist.is_initialized():
        return student
    devices = [args.device] if args.device.startswith("cuda") else None
    return DistributedDataParallel(student, device_ids=devices, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)


def exchanging(run, now: bool):
    """The context of a forward and backward pass of `run`, what data_parallel gave: do processes
    exchange gradients in it? Until they do, each adds up gradients of all weights, sharded or not."""
    if isinstance(run, FSDPModule):
        run.set_requires_gradient_sync(now)
    if isinstance(run, DistributedDataParallel) and not now:
        return run.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def settled():
    """Spare existing objects, within, from garbage collection, which would stall a step for a tenth of
    a second and more, at any moment, while all other processes wait."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_memory(args) -> float:
    """GiB, the most of any process: of its GPU's allocator since the last reset, or of all of it."""
    if args.device.startswith("cuda"):
        gib = torch.cuda.max_memory_allocated() / 2**30
    else:
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return evaluate.over_processes([gib], args, dist.ReduceOp.MAX)[0]


# -- options ---------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    evaluate.add_common_options(p)
    add = p.add_argument
    add("--dataset", choices=("glue",), help="a task of GLUE instead of text, with glue.py's options: "
        "--dataset glue --help lists them")
    add("--method", nargs="+", choices=evaluate.METHODS, default=("sea", "performer", "dense"),
        help="students to train, one after the other (default: sea performer dense)")
    add("--load", metavar="DIR", help="train this saved student further, instead of --method")
    add("--train", choices=("all", "sea"), default="all", help="weights of the SEA student to train: "
        "all, or only the new ones (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps" + evaluate.by_job("steps", PAPER, TINY))
    add("--batch", type=int, help="sequences a step, over all processes"
        + evaluate.by_job("batch", PAPER, TINY) + "; 36 for opt-1.3b, 144 for opt-2.7b")
    add("--eval-every", type=int, help="steps from one evaluation and checkpoint to the next"
        + evaluate.by_job("eval_every", PAPER, TINY))
    groups = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    add("--sea", type=evaluate.settings(sea.SEAConfig), **groups, help="fields of sea.SEAConfig: width, "
        "topk, bin, local, first, candidates, query_stride, dense_below, nbf (unless given 8, of a "
        "Performer with --model 1), cell_keys and cnn (true or false), group, backend, max_positions "
        "(rows of the position table of each layer: unless given the model's positions, which may be far "
        "more than --seq-len trains); without --model, width=64 "
        "topk=16 bin=2 local=4 first=2 unless given; with --load only what no weight depends on: topk, "
        "group, bin, local, first, candidates, query_stride, dense_below, backend and, without a CNN, "
        "width")
    add("--loss", type=evaluate.settings(LossWeights), **groups, help="weights of terms: ce=0.1 "
        "hidden=5 kd=0.2 score=0 unless given. Where a few hidden states are huge, as Llamas tend to "
        "have them at the first token, they are most of the loss: hidden=0.005 is better there")
    add("--optimizer", type=evaluate.settings(OptimizerConfig), **groups, help="unless given: lr=2e-6 "
        "(of pretrained weights) lr_new=1e-4 control_lr=1e-5 (of the controls' weights; lr if that is "
        "given) schedule=constant (linear and cosine fall to 0), without --model 5e-4, 1e-2, 5e-4 and "
        "linear, with opt-2.7b 5e-7, 5e-6 and 2.5e-6; beta2=0.95, with an OPT by its name 0.999; "
        "warmup=0 (steps) weight_decay=0.01 "
        "clip=1 (gradient norm) redraw_every=1000 (steps between draws of random features)")
    add("--gradient-checkpointing", action="store_true", help="keep of each layer its input and what "
        "the losses look at, and compute the rest again, for large models")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, where there are "
        "any. Options that change what is learned must be those of the run that wrote them; the number "
        "of processes, --shard, --micro-batch, --method and how it is evaluated need not")
    add("--teacher-steps", type=int, help="steps of four sequences that train the teacher on the text, "
        "as an ordinary language model, into OUT/teacher"
        + evaluate.by_job("teacher_steps", PAPER, TINY))
    add("--teacher-lr", type=float, help="its rate, which falls to 0"
        + evaluate.by_job("teacher_lr", PAPER, TINY))
    add("--seed", type=int, default=0, help="of weights, data order, dropout and redrawn "
        "features (default: %(default)s)")
    args = p.parse_args(argv)
    for name in ("steps", "batch", "eval_every", "teacher_steps", "teacher_lr"):
        if getattr(args, name) is None:
            setattr(args, name, job_of(args.model)[name])
    trained = () if args.model and not args.teacher_steps else ("teacher_steps",)
    evaluate.check_common_options(p, args, "steps", "batch", "eval_every", *trained)
    if not 0 < args.teacher_lr < math.inf:
        p.error(f"--teacher-lr: expected a finite number > 0, got {args.teacher_lr}")
    read_groups(p, args)
    if len(set(args.method)) < len(args.method):
        p.error(f"--method: expected each once, got {' '.join(args.method)}")
    if not 0 <= args.seed < 2**20:
        p.error(f"--seed: expected an integer from 0 to {2**20 - 1}, got {args.seed}")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % size:
        p.error(f"--batch: expected a multiple of the {size} processes, got {args.batch}")
    each = args.batch // size
    args.micro_batch = min(args.micro_batch, each)
    if each % args.micro_batch:
        p.error(f"--micro-batch: expected a divisor of the {each} sequences of a process, got "
                f"{args.micro_batch}")
    return args


def dataset_of(argv: list[str] | None) -> str | None:
    """--dataset, which says whose the other options are."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--dataset", nargs="?")
    return p.parse_known_args(argv)[0].dataset


def read_groups(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turn --sea into a dict, --loss and --optimizer into their dataclasses."""
    job, given = job_of(args.model), dict(args.sea)
    if args.load:
        free = convert.free_options(evaluate.saved_config(args.load).get("sea", {}))
        if fixed := [name for name in given if name not in free]:
            p.error(f"--sea: expected {', '.join(free)} only with --load, since the saved student has "
                    f"its own of the others, got {', '.join(fixed)}")
    args.sea = given if args.load else job["sea"] | given
    option = "--loss"
    try:
        args.loss = LossWeights(**dict(args.loss))
        option = "--sea"
        check_layers(args)
        option = "--optimizer"
        given = dict(args.optimizer)
        if "lr" in given:
            given = {"control_lr": given["lr"], **given}
        args.optimizer = OptimizerConfig(**job["optimizer"] | given)
    except ValueError as error:
        p.error(f"{option} {error}")
    evaluate.check_backend(p, "--sea", args.sea.get("backend"), args.device)
    longest = args.sea.get("max_positions", args.seq_len)
    if longest < args.seq_len:
        p.error(f"--sea max_positions: expected at least --seq-len, {args.seq_len}, got {longest}")


def check_layers(args: argparse.Namespace) -> None:
    """Raises ValueError if the students' layers cannot have the options of --sea."""
    if args.load:
        saved = evaluate.saved_config(args.load)
        if "sea" in saved:
            evaluate.with_options(saved, **args.sea)
        return
    sea.SEAConfig(n_head=1, d_head=2, **args.sea)
    for name in set(args.method) & convert.BASELINES.keys():
        convert.BASELINES[name](sea.SEAConfig(n_head=1, d_head=2, **fields_of(name, args)))


# -- the job ---------------------------------------------------------------------------------------


@dataclass
class Line:
    """A line of the table: a model, and what its training took."""

    name: str
    ppl: float
    keys: float  # a query and head
    seconds: float | None = None
    gib: float = 0.0
    tokens_per_second: float | None = None


def distil(name: str, job: Job) -> list[Line]:
    """One student from its beginning to its end: a line before training, and one after."""
    args, valid, began = job.args, job.valid, time.perf_counter()
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    if args.load:
        name, student = evaluate.load_student("--load", args.load, job.original, job.teacher, **args.sea)
        if (Path(args.out) / name).resolve() == Path(args.load).resolve():
            sys.exit(f"--out: expected another folder than that of {args.load}, which would be lost, "
                     f"got {args.out}")
    else:
        student = new_student(name, job.original, job.teacher, args)
    if name == "sea" and args.train == "sea":
        new = set(convert.sea_parameters(student))
        for key, parameter in student.named_parameters():
            parameter.requires_grad_(key in new)
    evaluate.to_device(student, args)
    ppl, keys = evaluate.perplexity(student, valid, args), evaluate.keys_per_query(student, valid, args)
    before = Line(f"{name} before", ppl, keys)
    try:
        with settled():
            ppl, speed = train(name, student, job)
    except Diverged as error:
        print(error, flush=True)
        job.log.record(name=name, diverged=str(error))
        return [before, Line(name, math.inf, keys)]
    keys, seconds = evaluate.keys_per_query(student, valid, args), time.perf_counter() - began
    after = Line(name, ppl, keys, seconds, peak_memory(args), speed)
    job.log.record(**vars(after))
    return [before, after]


def print_table(lines: list[Line]) -> None:
    print(f"\n{'':18} {'val ppl':>9} {'ratio':>7} {'keys/query':>11} {'training':>9} {'memory':>12} "
          f"{'tok/s':>11}")
    for line in lines:
        cost = "" if line.seconds is None else f"{line.seconds / 60:8.1f}m {line.gib:8.2f} GiB"
        speed = "" if line.tokens_per_second is None else f"{line.tokens_per_second:11,.0f}"
        ratio = line.ppl / lines[0].ppl
        text = f"{line.name:18} {line.ppl:9.2f} {ratio:7.3f} {line.keys:11.1f} {cost} {speed}"
        print(text.rstrip())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the perplexities of the table, or what glue.main does."""
    if dataset_of(argv) == "glue":
        import glue  # here, since it is made of this file's parts

        return glue.main(argv)
    args = parse(argv)
    header = evaluate.start("distill.py", argv, args)
    with checkpoints.locked(args.out), evaluate.room_for(args.out):
        results = run(args, header)
    evaluate.stop_processes()
    diverged = [name for name, ppl in results.items() if not math.isfinite(ppl)]
    if diverged:
        sys.exit(f"diverged: {', '.join(diverged)}; a smaller lr or lr_new of --optimizer may help")
    return results


def run(args, header: dict[str, str]) -> dict[str, float]:
    began, log = time.perf_counter(), Log(args)
    args.run = checkpoints.find_run(args)
    model = train_teacher(args, log) if args.teacher_steps else args.model
    original, tokenizer = evaluate.load_teacher(model, args.seq_len)
    tokens, valid_tokens = evaluate.token_streams(lambda: evaluate.load_texts(args), tokenizer, original,
                                                  args)
    evaluate.windows(tokens, args.seq_len, text="training text")  # at least one
    valid = evaluate.windows(valid_tokens, args.seq_len, args.eval_windows, "validation text")
    args.fingerprint = fingerprint(tokens, original)

    teacher = evaluate.to_device(copy.deepcopy(original) if args.shard else original, args)
    teacher_ppl = evaluate.perplexity(teacher, valid, args)
    if not math.isfinite(teacher_ppl):
        sys.exit(f"--model: expected a teacher of finite perplexity, got {teacher_ppl} from {model}")
    n = sum(p.numel() for p in original.parameters())
    print(f"teacher {n / 1e6:.1f} M parameters | train {len(tokens):,} tokens | valid {len(valid)} "
          f"windows of {args.seq_len}, no overlap | ppl {teacher_ppl:.2f}", flush=True)
    checkpoints.record_run(args)
    log.record(**header, args=vars(args), parameters=n, teacher_ppl=teacher_ppl)

    lines = [Line("teacher", teacher_ppl, (args.seq_len + 1) / 2)]
    with noting_signals() as signals:
        job = Job(args, log, original, teacher, tokenizer, tokens, valid, teacher_ppl, signals)
        for name in ["loaded"] if args.load else args.method:
            lines += distil(name, job)

    print_table(lines)
    results, seconds = {line.name: line.ppl for line in lines}, time.perf_counter() - began
    log.record(results=results, seconds=seconds)
    print(f"\n{seconds / 60:.1f} minutes, peak memory {max(line.gib for line in lines):.2f} GiB of a "
          f"process, written to {args.out}/")
    return results


if __name__ == "__main__":
    main()
