"""Distil SEA into a pretrained causal language model.

    python distill.py                        no download, no GPU: trains a tiny OPT on Python's own documentation, then
                                             distils SEA from it, and two controls, in a few minutes
    python distill.py --model opt-125m       facebook/opt-125m on WikiText-2 with the paper's learning rates, batch and steps
    python distill.py --model DIR --data FILE [--valid-data FILE]       your own model and text
    python distill.py --model DIR --load OUT/sea --eval-only --eval-topk 8,16,32     measure a saved student
    python distill.py --model DIR --load OUT/sea --eval-only --by-position --prompt "Once upon"      and see how it goes on
    torchrun --nproc-per-node 2 distill.py ...       the same job on several GPUs or hosts, or on CPU processes
    torchrun --nproc-per-node 2 distill.py --shard ...      and each holds a part of both models, which need not fit one GPU

Prints one line a step, writes the same records to OUT/log.jsonl, each student to OUT/<method>, what training needs to go on
(--resume) to OUT/<method>.ckpt, and figures: OUT/sea.png of some heads, with --eval-topk OUT/topk.png. A step's data and random
numbers follow from --seed and the step alone, so that a run that was killed and resumed continues as if nothing had happened; on
another number of processes, with or without --shard or with another --micro-batch, too, but for rounding and dropout.
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import logging
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import bench
import convert
import sea

HUB = {name: f"facebook/{name}" for name in ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b")}
METHODS = ("sea", "performer", "dense", "oracle")

# What differs between the two jobs. "paper": section 4 and appendix of the paper. "tiny": found by trying, for 2 CPU cores.
DEFAULTS = {
    "paper": dict(steps=10_000, batch=32, micro_batch=1, seq_len=2048, width=256, topk=64, lr=2e-6, lr_new=1e-4, schedule="constant",
                  warmup=0, eval_every=500),
    "tiny": dict(steps=120, batch=8, micro_batch=8, seq_len=256, width=64, topk=16, lr=5e-4, lr_new=1e-2, schedule="linear",
                 warmup=0, eval_every=60),
}


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def layers_and_heads(text: str) -> list[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in (pair.split(".") for pair in text.split(","))]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", help="teacher: opt-125m, opt-350m, opt-1.3b, opt-2.7b, a hub id, or a local folder (none: train a tiny OPT)")
    add("--data", help="training text file, UTF-8; documents are separated by three newlines (none: WikiText-2 with "
        "--model, else Python's documentation)")
    add("--valid-data", help="validation text file (none: the validation split, or the last tenth of --data)")
    add("--split", choices=("validation", "test"), default="validation", help="of WikiText-2, to evaluate on: the paper's, or the usual one; "
        "either way its lines joined by blank lines, no BOS token, windows without overlap, the remainder dropped")
    add("--method", nargs="+", choices=METHODS, default=METHODS[:3], help="students to train, one after the other; performer and "
        "dense, the model itself trained with the same losses and steps, are controls; oracle is SEA with cells chosen from the "
        "teacher's own attention, the bound for any estimator of that width")
    add("--load", help="start from this saved student, of whatever method, instead of fresh ones; --method is then ignored")
    add("--eval-only", action="store_true", help="measure, do not train")
    add("--eval-topk", type=integers, default=[], metavar="K,K,...",
        help="measure the SEA student with these numbers of keys, too")
    add("--by-position", action="store_true", help="also print perplexity by position in the window: of tokens 1-256, 257-512, and "
        "so on in blocks that double")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="texts for the teacher and each student to continue, greedily, at the end")
    add("--new-tokens", type=int, default=64, help="tokens to continue each --prompt by")
    add("--look", type=layers_and_heads, default=[], metavar="LAYER.HEAD,...",
        help="heads to draw in OUT/sea.png, counted from 0 (none: a median one)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out, where there are any; options that change what is "
        "learned must be those of the run that wrote them, the number of processes, --shard, --micro-batch and what is measured need not")
    add("--out", default="out", help="folder for students, log.jsonl and figures")
    note = "(none: {} with --model, {} without)"
    for name, kind, text in (
        ("steps", int, "optimizer steps"),
        ("batch", int, "sequences a step, over all processes"),
        ("micro-batch", int, "sequences in memory at once, of each process"),
        ("seq-len", int, "tokens a sequence"),
        ("width", int, "cells of an estimated attention row"),
        ("topk", int, "keys per query and head, on average"),
        ("lr", float, "peak learning rate of pretrained weights"),
        ("lr-new", float, "peak learning rate of new weights"),
        ("schedule", str, "learning rate over time: constant, or linear or cosine decay to 0"),
        ("warmup", int, "first steps, over which the learning rate rises from 0"),
        ("eval-every", int, "steps from one evaluation and save to the next"),
    ):
        defaults = (DEFAULTS[job][name.replace("-", "_")] for job in ("paper", "tiny"))
        choices = ("constant", "linear", "cosine") if name == "schedule" else None
        add(f"--{name}", type=kind, choices=choices, help=f"{text} {note.format(*defaults)}")
    add("--backend", choices=sea.BACKENDS, help="of SEA's attention: plain PyTorch, the kernels, or the kernels where they fit "
        "(none: auto)")
    add("--query-stride", type=int, help="estimate every r-th query only (none: 1)")
    add("--nbf", type=float, help="random features are D ln D / nbf (none: 8)")
    add("--cell-keys", action=argparse.BooleanOptionalAction, help="add each query's product with the mean key of a cell to its "
        "estimated score, see sea.add_cell_keys: a far better estimate (none: yes)")
    add("--redraw-every", type=int, default=1000, help="steps from one draw of random features to the next, 0 for never")
    add("--train", choices=("all", "sea"), default="all", help="weights of the SEA student to train: all, or only the new ones")
    add("--gradient-checkpointing", action="store_true", help="keep of each layer its input and what the losses look at, and "
        "compute the rest again, for large models")
    add("--shard", action="store_true", help="under torchrun: spread both models, gradients and the optimizer over the processes (FSDP2), "
        "which otherwise hold all of them each (DDP). For models that do not fit one GPU; with --gradient-checkpointing, without which "
        "bf16 copies of all weights stay from the forward to the backward pass. Each process needs CPU memory for both models in fp32")
    add("--save-every", type=int, help="steps from one checkpoint to the next (none: --eval-every)")
    add("--hidden-weight", type=float, default=5.0, help="weight of the mean square between hidden states; where a few of them are "
        "huge, as Llamas tend to have them at the first token, it is most of the loss: 0.005 is better there")
    add("--score-weight", type=float, default=0.0, help="weight of L_score, the student's dense scores against the teacher's; 1 in the "
        "paper, which made students worse here and can drown all other terms")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, none on biases and norms")
    add("--clip", type=float, default=1.0, help="gradient norm at most, inf for any")
    add("--eval-windows", type=int, help="validation windows to use (none: all)")
    add("--teacher-steps", type=int, default=1000, help="steps that train the tiny teacher")
    add("--seed", type=int, default=0, help="of weights, data order, dropout and redrawn features")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device; bf16 autocast on cuda")
    args = p.parse_args(argv)
    if args.eval_only and not args.load:
        p.error("--eval-only: expected --load DIR with it, the student to measure")
    for name in ("width", "nbf", "query_stride", "cell_keys"):
        if args.load and getattr(args, name) is not None:
            p.error(f"--{name.replace('_', '-')}: expected none with --load, since the saved student has its own")
    args.cell_keys = True if args.cell_keys is None else args.cell_keys
    for name, value in DEFAULTS["paper" if args.model else "tiny"].items():
        if getattr(args, name) is None and not (name == "topk" and args.load):  # a saved student has its own
            setattr(args, name, value)
    args.save_every = args.eval_every if args.save_every is None else args.save_every
    if not 0 <= args.seed < 2**20:
        p.error(f"--seed: expected an integer from 0 to {2**20 - 1}, got {args.seed}")
    for name in ("warmup", "redraw_every"):
        if getattr(args, name) < 0:
            p.error(f"--{name.replace('_', '-')}: expected an integer >= 0, got {getattr(args, name)}")
    for name in ("steps", "batch", "micro_batch", "seq_len", "width", "topk", "eval_every", "save_every", "query_stride", "eval_windows",
                 "new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')}: expected an integer >= 1, got {getattr(args, name)}")
    if args.seq_len < 2:
        p.error(f"--seq-len: expected an integer >= 2, a token predicts the next, got {args.seq_len}")
    for name in ("clip", "nbf"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            p.error(f"--{name}: expected a number > 0, got {getattr(args, name)}")
    if any(k < 1 for k in args.eval_topk):
        p.error(f"--eval-topk: expected integers >= 1, got {args.eval_topk}")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if args.shard and size == 1:
        p.error("--shard: expected several processes to spread over, under torchrun, got one")
    if args.batch % size:
        p.error(f"--batch: expected a multiple of the {size} processes, got {args.batch}")
    args.micro_batch = min(args.micro_batch, args.batch // size)
    if args.batch // size % args.micro_batch:
        p.error(f"--micro-batch: expected a divisor of the {args.batch // size} sequences of a process, got {args.micro_batch}")
    return args


# -- several processes -------------------------------------------------------------------------------------------------


def start_processes(args) -> tuple[int, int]:
    """This process's rank and how many there are, under torchrun; (0, 1) without. Only rank 0 prints and writes."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
            dist.init_process_group("nccl", device_id=torch.device(args.device))
        else:
            dist.init_process_group("gloo")
    elif args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank, size


def stop_processes() -> None:
    """Wait for all processes, the first of which may still be writing."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def over_processes(values: list[float], args, op=dist.ReduceOp.SUM) -> list[float]:
    """The sum of each number over all processes, or their `op`."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=args.device)
    dist.all_reduce(total, op)
    return total.tolist()


def place(model, args):
    """Move `model` to the device, in place; with --shard, this process's shard of each weight.

    FSDP2 moves and shards one layer after the other, so that a model on the CPU is never whole on the device. Which weights are
    trained has to be settled before.
    """
    if not args.shard:
        return model.to(args.device)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # OPT's layers do; nothing writes to it
    mesh = init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),))
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack if convert.attention_modules(layer)]
    for module in (*layers, model):  # also outside the layers weights are shards between passes, as optimizer and checkpoints want them
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def data_parallel(student, args):
    """What calls `student` in training: its DistributedDataParallel, or itself if there is one process or it is sharded."""
    if args.shard or not dist.is_initialized():
        return student
    devices = [args.device] if args.device.startswith("cuda") else None
    return DistributedDataParallel(student, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def exchanging(run, now: bool):
    """The context of one forward and backward pass of `run`, what data_parallel gave: do processes exchange gradients in it? Until they do,
    each adds up gradients of all weights, sharded or not."""
    if isinstance(run, FSDPModule):
        run.set_requires_gradient_sync(now)
    return run.no_sync() if isinstance(run, DistributedDataParallel) and not now else contextlib.nullcontext()


@contextlib.contextmanager
def settled():
    """Python's garbage collector, within, does not look again at what is there already: that takes a tenth of a second and more, at any
    moment, for which all other processes wait."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def clip_gradients(model, most: float) -> float:
    """Scale the gradients down to norm `most`; returns the norm they had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# -- data and teacher --------------------------------------------------------------------------------------------------


def hub(what: str, instead: str, load):
    """Run `load`, which may need the network; say in one sentence what was missing and what to give instead."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its retries
    print(f"loading {what}", flush=True)
    try:
        return load()
    except (OSError, ConnectionError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sys.exit(f"distill.py needed {what} and could not get it ({reason}); {instead}.")


def read_documents(option: str, file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").split("\n\n\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{option}: expected a text file in UTF-8, got {file} ({error})")


def load_texts(args) -> tuple[list[str], list[str]]:
    """Training and validation documents."""
    valid = None if args.valid_data is None else read_documents("--valid-data", args.valid_data)
    if args.data:
        documents = read_documents("--data", args.data)
    elif args.model:
        def wikitext():
            from datasets import load_dataset  # here, since --data does without

            return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")

        splits = hub("the dataset Salesforce/wikitext (wikitext-2-raw-v1) from the Hugging Face hub",
                     "give a text file with --data FILE instead", wikitext)
        return ["\n\n".join(splits["train"]["text"])], valid or ["\n\n".join(splits[args.split]["text"])]
    else:
        from pydoc_data.topics import topics  # ships with every Python, differs a little from version to version

        documents = [topics[name] for name in sorted(topics)]
    if valid:
        return documents, valid
    total, size = sum(map(len, documents)), 0
    for i, document in enumerate(documents):  # the last tenth, to the nearest document
        size += len(document)
        if size >= 0.9 * total and i + 1 < len(documents):
            return documents[: i + 1], documents[i + 1 :]
    cut = int(0.9 * len(documents[-1]))  # one huge last document: cut it
    return [*documents[:-1], documents[-1][:cut]], [documents[-1][cut:]]


def tokenize(documents: list[str], tokenizer) -> Tensor:
    """One stream of token ids, an end-of-text token before each document if there are several."""
    ids = tokenizer(documents, add_special_tokens=False, verbose=False).input_ids
    start = [tokenizer.eos_token_id] if len(documents) > 1 and tokenizer.eos_token_id is not None else []
    return torch.tensor([i for document in ids for i in start + document])


def windows(tokens: Tensor, seq_len: int, most: int | None = None) -> Tensor:
    """Windows without overlap, remainder dropped: (n, seq_len)."""
    n = len(tokens) // seq_len
    if n == 0:
        sys.exit(f"--seq-len: expected at most the {len(tokens)} tokens of the text, got {seq_len}")
    return tokens[: n * seq_len].view(n, seq_len)[:most]


def tiny_tokenizer(documents: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer  # transformers brings it

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=["</s>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def train_teacher(args, tokenizer, tokens: Tensor, log) -> OPTForCausalLM:
    """A tiny OPT, trained from scratch: 3 layers, 3 heads of 32.

    It starts from wide weights and sinusoidal positions, since from OPT's own start (std 0.02, random positions) so short
    a training learns little attention: replacing all attention by a running mean then costs 3 % of perplexity, not 100 %.
    """
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=96, word_embed_proj_dim=96, num_hidden_layers=3, ffn_dim=384,
                       num_attention_heads=3, max_position_embeddings=args.seq_len, dropout=0.0, bos_token_id=0,
                       eos_token_id=0, pad_token_id=1, init_std=0.06)
    model = OPTForCausalLM(config).to(args.device)
    position = model.get_decoder().embed_positions.weight.data
    phase = torch.arange(len(position))[:, None] * 1000 ** -torch.linspace(0, 1, 48)
    position.copy_(0.1 * torch.cat([phase.sin(), phase.cos()], dim=1))
    optimizer, clock = make_optimizer(model, lr=3e-3, lr_new=0, weight_decay=0.1), Clock()
    for step in range(1, args.teacher_steps + 1):
        lr = learning_rate(step, args.teacher_steps, "linear", 50)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr
        x = batch_of(step, tokens, args.seq_len, 4, args.seed).to(args.device)
        with autocast(args):
            loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.tick(x.numel())
        log.step("teacher", step, args.teacher_steps, loss.item(), {"ce": loss.item()}, 3e-3 * lr, clock)
    return model


def load_teacher(args):
    """Pretrained model and tokenizer, from the hub or a folder. Weights in fp32: checkpoints are often half precision."""
    name = HUB.get(args.model, args.model)
    what = f"the model {name}" + ("" if Path(name).is_dir() else " from the Hugging Face hub")
    instead = "give a local folder with --model DIR instead"
    tokenizer = hub(what, instead, lambda: AutoTokenizer.from_pretrained(name))
    if not tokenizer("the", add_special_tokens=False).input_ids:  # a folder without one gets an empty one
        sys.exit(f"--model: expected a tokenizer beside the model, got none in {name}")
    model = hub(what, instead, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
    if hasattr(model.config, "sea"):
        sys.exit(f"--model: expected a plain model, to be the teacher, got a student in {name}; --load is for students")
    return model, tokenizer


def load_student(args, teacher):
    """What an earlier run saved, of any method, in fp32."""
    try:
        config, expected = (c.get_text_config() for c in (AutoConfig.from_pretrained(args.load), teacher.config))
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            if getattr(config, field) != getattr(expected, field):
                sys.exit(f"--load: expected a student of --model, {field} {getattr(expected, field)}, got {getattr(config, field)} in "
                         f"{args.load}")
        if hasattr(AutoConfig.from_pretrained(args.load), "sea"):
            student = convert.load(args.load, dtype=torch.float32)
            if args.topk is not None:
                convert.set_option(student, topk=args.topk)
            if args.backend is not None:
                convert.set_option(student, backend=args.backend)
            return student
        student = AutoModelForCausalLM.from_pretrained(args.load, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"--load: expected a folder that distill.py wrote, got {args.load} ({str(error).splitlines()[0]})")
    student.set_attn_implementation("sea_teacher")
    return student


def batch_of(step: int, tokens: Tensor, seq_len: int, batch: int, seed: int) -> Tensor:
    """Random windows (batch, seq_len) of a token stream, those of this step."""
    generator = torch.Generator().manual_seed(seed * 2**32 + step)
    starts = torch.randint(len(tokens) - seq_len + 1, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)]


# -- losses, section 6 of the method -----------------------------------------------------------------------------------


@dataclass
class Weights:
    """loss = ce*CE + hidden*MSE(hidden states) + logits*KL(logits) + mean over layers of (estimate + score*... + context)."""

    ce: float = 0.1
    hidden: float = 5.0
    logits: float = 0.2
    score: float = 0.0  # Differs: 1 in the paper, which made students worse here


def distillation_losses(student, teacher, x: Tensor, weights: Weights, run=None) -> dict[str, Tensor]:
    """The weighted terms, whose sum is the loss, of a batch of token ids x (B, T). run: what data_parallel gave for the student."""
    with torch.no_grad(), convert.record(teacher) as teachers:
        target = teacher(x, output_hidden_states=True, use_cache=False)
    with convert.record(student) as students:
        output = (run or student)(x, output_hidden_states=True, use_cache=False)
    hidden = [F.mse_loss(s.float(), t.float()) for s, t in zip(output.hidden_states, target.hidden_states)]
    ce, kd = logit_losses(output.logits, target.logits, x)
    terms = {"ce": weights.ce * ce, "hidden": weights.hidden * torch.stack(hidden).mean(), "kd": weights.logits * kd}
    layers = [layer_losses(s, t, weights.score) for s, t in zip(students, teachers, strict=True)]
    return terms | {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}


def logit_losses(student: Tensor, teacher: Tensor, x: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Means over tokens of the next token's cross entropy and of KL(teacher || student), logits (B, T, vocabulary) each. `chunk` tokens
    at a time, again in the backward pass: in fp32 a large vocabulary's logits are by far the largest tensors of a step."""

    def sums(student, teacher, target):
        log_q, log_p = (sea.at_least_fp32(logits).log_softmax(-1) for logits in (student, teacher))
        return torch.stack([F.nll_loss(log_q, target, ignore_index=-1, reduction="sum"),
                            F.kl_div(log_q, log_p, log_target=True, reduction="sum")])

    target = F.pad(x[:, 1:], (0, 1), value=-1)  # the last token predicts nothing
    parts = zip(*(y.flatten(0, 1).split(chunk) for y in (student, teacher, target)))
    ce, kd = sum(torch.utils.checkpoint.checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)
    return ce / target[:, :-1].numel(), kd / target.numel()


def layer_losses(student: convert.Record, teacher: convert.Record, score_weight: float) -> dict[str, Tensor]:
    terms = {"context": F.mse_loss(student.out.float(), teacher.out.float())}
    B, H, T, D = student.q.shape
    seen = torch.arange(1, T + 1, device=student.q.device).expand(B, T)
    ops = sea.operations(student.config or sea.SEAConfig(n_head=H, d_head=D), teacher.q)
    if score_weight:
        # Scales may differ: OPT scales q before attention, so each record brings its own.
        terms["score"] = score_weight * ops.score_loss(student.q * student.scale, student.k, teacher.q * teacher.scale,
                                                       teacher.k, seen, 1.0)
    if student.sea is not None and student.sea.scores is not None:
        pooled = ops.pool_attention(teacher.q, teacher.k, seen, student.sea.scores.shape[-1], teacher.scale)
        terms["estimate"] = sea.estimate_loss(student.sea.scores, pooled, seen, row=student.sea.row)
    return terms


# -- evaluation --------------------------------------------------------------------------------------------------------


def batches_of_process(data: Tensor, args):
    """This process's windows, of data (n, T), a micro-batch at a time, and how many of each batch count: of all processes as many
    batches, since with --shard each pass gathers from all."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = data[rank::size]
    for i in range(0, -(-len(data) // size), args.micro_batch):
        x = mine[i : i + args.micro_batch]
        yield (x if len(x) else data[:1]).to(args.device), len(x)


@torch.no_grad()
def perplexity(model, data: Tensor, args) -> float:
    """exp of the mean negative log likelihood; each window predicts all its tokens but the first. Processes share windows."""
    model.eval()
    total = 0.0
    for x, n in batches_of_process(data, args):
        total += token_losses(model, x, args)[:n].mean(1).sum().item()
    return math.exp(over_processes([total], args)[0] / len(data))


@torch.no_grad()
def token_losses(model, x: Tensor, args, chunk: int = 512) -> Tensor:
    """Negative log likelihood of the tokens of x (B, T) but the first: (B, T - 1). `chunk` tokens at a time, since a large
    vocabulary's logits of a long window are too many to hold in fp32."""
    with autocast(args):
        logits = model(x, use_cache=False).logits
    parts = zip(logits[:, :-1].split(chunk, dim=1), x[:, 1:].split(chunk, dim=1))
    losses = [F.cross_entropy(z.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape) for z, y in parts]
    return torch.cat(losses, dim=1)


def perplexity_by_position(model, data: Tensor, args, first: int = 256) -> list[dict[str, float]]:
    """Perplexity of tokens 1 ... `first` of all windows, of the next `first`, and of blocks that double from there."""
    model.eval()
    total, T = torch.zeros(data.shape[1], dtype=torch.float64), data.shape[1]  # of each token; the first is given, not predicted
    for x, n in batches_of_process(data, args):
        total[1:] += token_losses(model, x, args)[:n].double().sum(0).cpu()
    total, ends = over_processes(total.tolist(), args), [first]
    while ends[-1] < T:
        ends.append(2 * ends[-1])
    blocks = [(start, min(end, T)) for start, end in zip([0, *ends], ends)]
    return [dict(first=start + 1, last=end, ppl=math.exp(sum(total[start:end]) / (end - max(start, 1)) / len(data)))
            for start, end in blocks]


@torch.no_grad()
def pass_cost(model, x: Tensor, args) -> dict[str, float | None]:
    """Of one pass of x (1, T) through the whole model, as launched from Python, with logits of the last token only: ms, and on
    a GPU the peak memory above what is held between passes, MiB."""
    model.eval()
    x = x.to(args.device)

    def run():
        with autocast(args, cache_enabled=False):  # else it keeps copies of weights in half precision, of trainable ones only
            model(x, use_cache=False, logits_to_keep=1)

    return dict(ms=bench.milliseconds(run, graph=False, device=args.device),
                mib=bench.peak_mib(run) if args.device.startswith("cuda") else None)


@torch.no_grad()
def continuation(model, tokenizer, prompt: str, args) -> str:
    """The prompt's greedy continuation, with transformers' cache; plain text, whatever chat template there is."""
    model.eval()
    x = tokenizer(prompt, return_tensors="pt").to(args.device)
    with autocast(args):
        ids = model.generate(x.input_ids, attention_mask=x.attention_mask, max_new_tokens=args.new_tokens, do_sample=False,
                             pad_token_id=0,  # of one sequence none is needed, but not to say so is warned of
                             synced_gpus=args.shard)
    return tokenizer.decode(ids[0, x.input_ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def attention_time(model, x: Tensor, args) -> dict[str, float | str]:
    """ms that the attention alone of all layers takes on their q, k, v of one sequence x (1, T): SEA's or a Performer's module,
    its weights in the dtype of q, or PyTorch's SDPA. clock: on a GPU all of it is one replayed CUDA graph."""
    model.eval()
    with autocast(args), convert.record(model) as records:
        model(x.to(args.device), use_cache=False)
    inputs, runs, graph = [(r.q, r.k, r.v, r.scale) for r in records], [], True
    del records  # a student's hold its scores
    for module, (q, k, v, scale) in zip(convert.attention_modules(model), inputs, strict=True):
        if hasattr(module, "sea"):
            layer = copy.deepcopy(module.sea).to(q.dtype)
            runs.append(functools.partial(layer, q, k, v, softmax_scale=scale))
            # plain PyTorch's sparse attention checkpoints, which no graph can hold
            graph = graph and (layer.config.method == "performer" or sea.operations(layer.config, q) is not sea.torch_operations)
        else:
            grouped = dict(enable_gqa=True) if q.shape[1] != k.shape[1] else {}
            runs.append(functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=scale, **grouped))

    run = lambda: [of_layer() for of_layer in runs]
    clock = "wall clock" if not args.device.startswith("cuda") else "replayed CUDA graph" if graph else "launched from Python"
    return dict(ms=bench.milliseconds(run, graph=graph, device=args.device), clock=clock)


@torch.no_grad()
def keys_per_query(model, data: Tensor, args) -> float:
    """Mean keys that a query attends to, over layers, heads and the queries of one window."""
    with autocast(args), convert.record(model) as records:
        model(data[:1].to(args.device), use_cache=False)
    if records[0].sea is None or records[0].sea.cells is None:
        return (data.shape[1] + 1) / 2
    counts = [(r.sea.mask * sea.keys_per_cell(r.sea.seen, r.sea.mask.shape[-1])[:, None]).sum(-1) for r in records]
    return torch.stack(counts).float().mean().item()


@torch.no_grad()
def draw(student, teacher, x: Tensor, path: Path, args) -> None:
    """For one sequence x (T,) and each head of --look: teacher attention, SEA's estimate, the keys attended and the sparse
    attention. Without --look one head: the median by the share of the teacher's attention that the keys attended hold."""
    with autocast(args), convert.record(teacher) as teachers, convert.record(student) as students:
        for model in (teacher, student):
            model(x[None].to(args.device), use_cache=False)
    if dist.is_initialized() and dist.get_rank():
        return
    plt = pyplot()
    T, H = len(x), teachers[0].q.shape[1]
    seen = torch.arange(1, T + 1, device=args.device)[None]

    def attention(i):  # (H, T, T), one layer at a time: all of them may not fit
        return sea.dense_scores(teachers[i].q, teachers[i].k, seen, teachers[i].scale)[0][0].exp().tril()

    def shares(i):  # (H,)
        return (attention(i) * sea.expand_mask(students[i].sea.mask, seen, T)[0]).sum((1, 2)) / T

    heads = args.look
    if not heads:
        share = torch.cat([shares(i) for i in range(len(teachers))])
        heads = [divmod(share.argsort()[len(share) // 2].item(), H)]
    shrink = -(-T // 256)  # what is larger than the picture: the largest of each square, so that no single key is lost
    unseen = torch.ones(T, T, dtype=torch.bool).triu(1)
    figure, axes = plt.subplots(len(heads), 4, figsize=(17, 4.4 * len(heads)), layout="constrained", squeeze=False)
    for axis, (layer, head) in zip(axes, heads):
        r = students[layer].sea
        kept = sea.expand_mask(r.mask, seen, T)[0, head].float()
        estimate = r.scores[0, head : head + 1, r.row[0]][None]  # (1, 1, T, width)
        estimate = sea.spread_to_keys(estimate.float(), seen, T, -torch.inf).softmax(-1)[0, 0]
        sparse = sea.attention_weights(students[layer].q, students[layer].k, r.mask, seen, students[layer].scale)[0, head]
        share = shares(layer)[head].item()
        panels = ((attention(layer)[head], f"teacher, layer {layer}, head {head}"), (estimate, "SEA's estimate"),
                  (sparse, "SEA's sparse attention"),
                  (kept, f"keys attended: {kept.sum(1).mean():.0f} of {(T + 1) / 2:.0f} a query,\n"
                   f"holding {share:.0%} of the teacher's attention"))
        for panel, (image, title) in zip(axis, panels):
            image = image.float().cpu() if image is kept else image.float().cpu().clamp(min=1e-4).log10()
            image = image.masked_fill(unseen | (kept.cpu() == 0) if panel is axis[2] else unseen, -torch.inf)
            image = F.max_pool2d(image[None], shrink, ceil_mode=True)[0]
            image = image.masked_fill(image == -torch.inf, torch.nan).numpy()
            style = dict(cmap="gray_r", vmin=0, vmax=1) if panel is axis[3] else dict(cmap="magma", vmin=-4, vmax=0)
            shown = panel.imshow(image, interpolation="nearest", extent=(0, T, T, 0), **style)
            # the first key, which many heads rest on, beside the frame, not under it
            panel.set(xlabel="key", ylabel="query", title=title, xlim=(-T / 50, T), facecolor="0.8" if panel is not axis[3] else "1")
            bar = shown if panel is axis[0] else bar
        figure.colorbar(bar, ax=axis[:3], label="log10 attention", shrink=0.85)
    figure.savefig(path, dpi=170)  # two pixels a column: with less than one, whole columns are left out
    plt.close(figure)


def draw_curve(points: dict[int, dict], lines: dict[str, dict], path: Path, timed: str) -> None:
    """Perplexity and time against topk, other models as lines. points and lines: {"ppl": .., "ms": ..} each; timed: what ms is of."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, field, label in zip(axes, ("ppl", "ms"), ("validation perplexity", "ms a sequence, attention alone")):
        axis.plot(list(points), [p[field] for p in points.values()], marker="o", label="SEA")
        for style, (name, line) in zip(("--", ":", "-."), lines.items()):
            axis.axhline(line[field], linestyle=style, color="gray", label=name)
        axis.set_xscale("log", base=2)
        if field == "ppl":
            axis.set_yscale("log")
            for kind in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                kind("{x:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(list(points), [str(k) for k in points])
        axis.set(xlabel="topk, keys per query and head", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].set_title(timed, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(dict(points=points, lines=lines, timed=timed), indent=1))


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def follow_teacher(student, teacher) -> None:
    """The oracle: choose the student's cells, from now on, from the teacher's own attention to the same tokens. Once saved
    it is a plain SEA student again, whose estimator has learned nothing."""
    records = []

    def look(model, args, kwargs):
        with torch.no_grad(), convert.record(teacher) as found:
            teacher(kwargs["input_ids"] if "input_ids" in kwargs else args[0], use_cache=False)
        records[:] = found

    student.register_forward_pre_hook(look, with_kwargs=True)
    for i, module in enumerate(convert.attention_modules(student)):
        def estimate(ops, q, k, v, rows, *args, i=i, of_student=module.sea.estimate_attention, config=module.sea.config):
            context, scores, gates, state = of_student(ops, q, k, v, rows, *args)
            pooled = ops.pool_attention(records[i].q, records[i].k, rows.seen, config.width, records[i].scale)
            best = best_scores(pooled, rows.seen)[:, :, :: config.query_stride]
            return context, best + 0 * scores.float(), gates, state  # every weight keeps a gradient, of 0

        module.sea.estimate_attention = estimate


def best_scores(pooled: sea.PooledAttention, seen: Tensor) -> Tensor:
    """The scores (B, H, T, width) that estimate the attention best: the log of its mean in each cell."""
    return (pooled.cells / sea.keys_per_cell(seen, pooled.cells.shape[-1])[:, None].clamp(min=1)).clamp(min=1e-30).log()


@torch.no_grad()
def layer_report(student, teacher, data: Tensor, args) -> list[dict[str, float]]:
    """Of each layer, over windows `data`: kl(teacher's attention || estimate) in nats a row, and the least that cells of this width
    allow; the share of the teacher's attention that is kept, under the cells selected, and that of the best cells, as many."""
    layers = []
    for x in data.split(args.micro_batch):
        with autocast(args), convert.record(teacher) as teachers, convert.record(student) as students:
            for model in (teacher, student):
                model(x.to(args.device), use_cache=False)
        seen = torch.arange(1, x.shape[1] + 1, device=args.device).expand(x.shape)
        for i, (s, t) in enumerate(zip(students, teachers)):
            ops, c = sea.operations(s.config, t.q), s.config
            pooled = ops.pool_attention(t.q, t.k, seen, c.width, t.scale)
            best = best_scores(pooled, seen)
            loss = lambda scores, row, weight: sea.estimate_loss(scores, pooled, seen, row=row, kl_weight=weight)
            kl = lambda scores, row: loss(scores, row, 1.0) - loss(scores, row, 0.0)
            share = lambda mask: (pooled.cells * mask).sum(-1).mean()
            found = dict(kl=kl(s.sea.scores, s.sea.row), least=kl(best, None), kept=share(s.sea.mask),
                         best=share(sea.topk_mask(best.softmax(-1), seen, c.topk, c.group)))
            layers = layers if i < len(layers) else [*layers, dict.fromkeys(found, 0.0)]
            layers[i] = {name: layers[i][name] + value.item() * len(x) / len(data) for name, value in found.items()}
    return layers


# -- training ----------------------------------------------------------------------------------------------------------


def autocast(args, **options):
    if not args.device.startswith("cuda"):
        return contextlib.nullcontext()
    # With --shard the cache would keep a bf16 copy of every weight, whole, through a forward pass.
    return torch.autocast("cuda", torch.bfloat16, **{"cache_enabled": not args.shard, **options})


def learning_rate(step: int, steps: int, schedule: str, warmup: int) -> float:
    """As a share of its peak, which it reaches with the last step of the warm-up."""
    done = max(0, step - max(1, warmup)) / max(1, steps - max(0, warmup - 1))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
    return decay * min(1.0, step / max(1, warmup))


def make_optimizer(model, lr: float, lr_new: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW in four groups: pretrained or new weights, with decay or, for biases and norms, without."""
    new, groups = set(convert.sea_parameters(model)), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in new, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW([dict(params=params, lr=lr_new if is_new else lr, peak=lr_new if is_new else lr,
                                   weight_decay=weight_decay if decays else 0.0)
                              for (is_new, decays), params in groups.items()], betas=(0.9, 0.95))


class Clock:
    """Milliseconds a step and tokens a second; the first 10 steps, which warm up, do not count, nor does paused time."""

    def __init__(self, skip: int = 10):
        self.skip, self.steps, self.tokens, self.seconds, self.last = skip, 0, 0, 0.0, time.perf_counter()
        self.step_seconds = 0.0

    def tick(self, tokens: int) -> None:
        now = time.perf_counter()
        self.step_seconds, self.last = now - self.last, now
        self.skip -= 1
        if self.skip < 0:
            self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + self.step_seconds

    def resume(self) -> None:
        self.last = time.perf_counter()


class Log:
    """Lines for people on standard output, the same records for programs in log.jsonl."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def record(self, **fields) -> None:
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    def step(self, name: str, step: int, steps: int, loss: float, terms: dict[str, float], lr: float, clock: Clock) -> None:
        speed = eta = ""
        if clock.steps:
            rate = clock.tokens / clock.seconds
            speed, eta = f" | {rate:,.0f} tok/s", f" | eta {(steps - step) * clock.seconds / clock.steps / 60:.1f}m"
        parts = " + ".join(f"{key} {value:.3g}" for key, value in terms.items())
        print(f"{name} step {step:05d}/{steps:05d} ({100 * step // steps}%) | loss {loss:.3f} = {parts} | lr {lr:.2g} | "
              f"{1000 * clock.step_seconds:.0f} ms{speed}{eta}", flush=True)
        self.record(name=name, step=step, loss=loss, terms=terms, lr=lr, ms=1000 * clock.step_seconds)


# What may differ between a run and the one that resumes it.
FREE = ("out", "resume", "method", "eval_only", "split", "backend", "eval_topk", "by_position", "prompt", "new_tokens", "look", "eval_every",
        "save_every", "eval_windows", "micro_batch", "device", "gradient_checkpointing", "shard", "teacher_steps")

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all processes, on the CPU of the first


def write_checkpoint(path: Path, student, optimizer, step: int, args) -> None:
    """All that a step depends on, by the names of weights and whole, however many processes there are; all of them call this, the first
    writes. Written beside `path` and then renamed, so that a kill leaves the old one or the new one."""
    model, state = get_state_dict(student, optimizer, options=WHOLE)
    if dist.is_initialized() and dist.get_rank():
        return
    fixed = {name: value for name, value in vars(args).items() if name not in FREE}
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        torch.save(dict(step=step, model=model, optimizer=state, args=fixed), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def read_checkpoint(path: Path, args) -> dict:
    """What write_checkpoint wrote, if it is of this run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=dist.is_initialized())  # one copy for all processes
        fixed, _ = saved["args"], saved["step"]
    except Exception as error:  # torch raises whatever its zip and pickle readers do
        sys.exit(f"--resume: expected a whole checkpoint, got {path} ({str(error).splitlines()[0]})")
    for name, value in fixed.items():
        if getattr(args, name, value) != value:
            what = "the text and the teacher" if name == "fingerprint" else f"--{name.replace('_', '-')} {value}"
            sys.exit(f"--resume: expected {what} as in {path}, got {getattr(args, name)}")
    return saved


def train(name: str, student, teacher, tokens: Tensor, valid: Tensor, teacher_ppl: float, args, log: Log,
          save) -> tuple[float, float | None]:
    """Distil `teacher` into `student`, both as place() left them; returns the final validation perplexity and the tokens a second over
    all processes, None after too few steps to tell. save(): keeps the student; all processes call it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(student, args.lr, args.lr_new, args.weight_decay)
    checkpoint, done, ppl = Path(args.out) / f"{name}.ckpt", 0, None
    if args.resume and checkpoint.exists():
        saved = read_checkpoint(checkpoint, args)
        done = saved["step"]
    elif rank == 0:
        checkpoint.unlink(missing_ok=True)  # of an earlier run
    if over_processes([float(done)], args)[0] != done * size:
        sys.exit(f"--out: expected one folder that all processes share, got {checkpoint} of step {done} in one of them, others in others")
    if done:
        set_state_dict(student, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=WHOLE)
        del saved
        ppl = perplexity(student, valid, args)
        print(f"{name} resumes after step {done:05d} from {checkpoint}, val ppl {ppl:.2f}", flush=True)
    run, clock, accumulate = data_parallel(student, args), Clock(), args.batch // size // args.micro_batch
    weights = Weights(hidden=args.hidden_weight, score=args.score_weight)
    for step in range(done + 1, args.steps + 1):
        student.train()
        torch.manual_seed((args.seed * 2**32 + step) * 2**10 + rank)  # dropout's
        factor = learning_rate(step, args.steps, args.schedule, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if name != "dense" and args.redraw_every and step > 1 and (step - 1) % args.redraw_every == 0:
            features = torch.Generator().manual_seed((args.seed + 1) * 2**32 + step)
            for module in convert.attention_modules(student):
                module.sea.redraw_features(features)
        sums = {}
        mine = batch_of(step, tokens, args.seq_len, args.batch, args.seed)[rank::size]
        for i, x in enumerate(mine.split(args.micro_batch)):
            with exchanging(run, i + 1 == accumulate):  # once a step
                with autocast(args):
                    terms = distillation_losses(student, teacher, x.to(args.device), weights, run)
                (sum(terms.values()) / accumulate).backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + value.item() / accumulate
        sums = dict(zip(sums, (x / size for x in over_processes(list(sums.values()), args))))
        loss = sum(sums.values())
        if not math.isfinite(loss):
            sys.exit(f"{name} step {step}: the loss is not finite: {sums}")
        norm = clip_gradients(student, args.clip)
        if not math.isfinite(norm):
            sys.exit(f"{name} step {step}: the gradient is not finite, the loss is: {sums}")
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(args.batch * args.seq_len)
        log.step(name, step, args.steps, loss, sums, max(group["lr"] for group in optimizer.param_groups), clock)
        last, ppl = step == args.steps, None
        if last or step % args.eval_every == 0:
            ppl = perplexity(student, valid, args)
            save()
            print(f"{name} step {step:05d} | val ppl {ppl:.2f} (teacher {teacher_ppl:.2f}) | saved", flush=True)
            log.record(name=name, step=step, ppl=ppl)
        if last or step % args.save_every == 0:
            write_checkpoint(checkpoint, student, optimizer, step, args)
        if last or step % args.eval_every == 0 or step % args.save_every == 0:
            clock.resume()
    return ppl, clock.tokens / clock.seconds if clock.steps else None


def peak_memory(args) -> float:
    """GiB, the most of any process: of its GPU's allocator since the last reset, or of all of it since its start."""
    if args.device.startswith("cuda"):
        return over_processes([torch.cuda.max_memory_allocated() / 2**30], args, dist.ReduceOp.MAX)[0]
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return over_processes([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], args, dist.ReduceOp.MAX)[0]


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    began = time.perf_counter()
    rank, size = start_processes(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(Path(os.devnull) if rank else out / "log.jsonl")
    command = bench.command_line("distill.py", argv, size)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    device = device if size == 1 else f"{size} x {device}"
    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{command}\n{versions}\n{device}")
    transformers.utils.logging.disable_progress_bar()  # logs are files
    torch.manual_seed(args.seed)

    if args.model:
        teacher, tokenizer = load_teacher(args)
        train_texts, valid_texts = load_texts(args)
    else:
        train_texts, valid_texts = load_texts(args)
        tokenizer = tiny_tokenizer(train_texts)
    tokens, valid = tokenize(train_texts, tokenizer), windows(tokenize(valid_texts, tokenizer), args.seq_len, args.eval_windows)
    windows(tokens, args.seq_len)  # at least one
    if not args.model:
        if rank == 0 and not (args.resume and (out / "teacher").exists()):
            convert.save(train_teacher(args, tokenizer, tokens, log), out / "teacher", tokenizer)
        if size > 1:
            dist.barrier()
        teacher = AutoModelForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
    longest = teacher.config.max_position_embeddings
    if args.seq_len > longest:
        sys.exit(f"--seq-len: expected at most the model's {longest} positions, got {args.seq_len}")
    text = teacher.config.get_text_config()
    for layer, head in args.look:
        if not (0 <= layer < text.num_hidden_layers and 0 <= head < text.num_attention_heads):
            sys.exit(f"--look: expected layers below {text.num_hidden_layers} and heads below {text.num_attention_heads}, got {layer}.{head}")
    if args.prompt and args.new_tokens >= longest:
        sys.exit(f"--new-tokens: expected fewer than the model's {longest} positions, got {args.new_tokens}")
    for prompt in args.prompt:
        n = len(tokenizer(prompt).input_ids)
        if not 0 < n <= longest - args.new_tokens:
            sys.exit(f"--prompt: expected 1 to {longest - args.new_tokens} tokens, since the model has {longest} positions and "
                     f"--new-tokens is {args.new_tokens}, got {n} in {prompt[:40]!r}")
    # what a checkpoint is good for: these tokens, and this teacher, whose sum may differ in its last bits from machine to machine
    weight = sum(p.double().abs().sum().item() for p in teacher.parameters())
    args.fingerprint = [len(tokens), int((tokens * torch.arange(1, len(tokens) + 1)).sum()), round(weight, 2)]
    teacher.eval().requires_grad_(False)
    teacher.set_attn_implementation("sea_teacher")
    whole = teacher  # what students begin as; a sharded model cannot be copied
    teacher = place(copy.deepcopy(whole) if args.shard else whole, args)
    teacher_ppl = perplexity(teacher, valid, args)
    parameters = sum(p.numel() for p in teacher.parameters())
    print(f"teacher {parameters / 1e6:.1f} M parameters | train {len(tokens):,} tokens | valid {len(valid)} windows of {args.seq_len}, "
          f"no overlap | ppl {teacher_ppl:.2f}", flush=True)
    log.record(command=command, versions=versions, device=device, args=vars(args), parameters=parameters, teacher_ppl=teacher_ppl)
    table, results = [("teacher", teacher_ppl, (args.seq_len + 1) / 2, "")], {"teacher": teacher_ppl}
    points, lines, passes, positions, texts, peaks = {}, {}, {}, {}, {}, []

    def examine(name: str, model) -> None:
        peaks.append(peak_memory(args))  # so far, since measuring a pass begins anew
        if not args.shard:  # processes that wait for each other would have to agree on the number of passes
            passes[name] = pass_cost(model, valid[:1], args)
        if args.by_position:
            positions[name] = perplexity_by_position(model, valid, args)
        texts[name] = [continuation(model, tokenizer, prompt, args) for prompt in args.prompt]

    def point(model, ppl: float) -> dict[str, float | str]:
        return dict(ppl=ppl) if args.shard else dict(ppl=ppl, **attention_time(model, valid[:1], args))

    examine("teacher", teacher)

    for name in ["loaded"] if args.load else args.method:
        student = None  # lets the one before go
        start = time.perf_counter()
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        if args.load:
            student = load_student(args, whole)
            name = student.config.sea.get("method", "sea") if hasattr(student.config, "sea") else "dense"
        else:
            torch.manual_seed(args.seed)
            student = copy.deepcopy(whole).requires_grad_(True)  # "dense" stays so
            if name != "dense":
                options = dict(width=args.width, topk=args.topk, nbf=8 if args.nbf is None else args.nbf, backend=args.backend or "auto",
                               method="performer" if name == "performer" else "sea")
                if name != "performer":
                    options |= dict(query_stride=args.query_stride or 1, cell_keys=args.cell_keys)
                convert.attach(student, **options)
                if name == "oracle":
                    follow_teacher(student, teacher)
        if name == "sea" and args.train == "sea":
            new = set(convert.sea_parameters(student))
            for key, parameter in student.named_parameters():
                parameter.requires_grad_(key in new)
        place(student, args)

        def save():
            weights = get_model_state_dict(student, options=WHOLE) if args.shard else None
            if rank == 0:
                convert.save(student, out / name, tokenizer, weights)

        before = after = perplexity(student, valid, args)
        cost = ""
        if not args.eval_only:
            table.append((f"{name} before", before, keys_per_query(student, valid, args), ""))
            with settled():
                after, speed = train(name, student, teacher, tokens, valid, teacher_ppl, args, log, save)
            seconds, gib = time.perf_counter() - start, peak_memory(args)
            cost = f"{seconds / 60:8.1f}m {gib:8.2f} GiB" + ("" if speed is None else f" {speed:11,.0f}")
            log.record(name=name, seconds=seconds, gib=gib, tokens_per_second=speed)
        table.append((name if args.eval_only else f"{name} after", after, keys_per_query(student, valid, args), cost))
        results |= {f"{name} before": before, name: after}
        if name != "oracle":  # its cells come from a whole pass of the teacher
            examine(name, student)
        if name in ("sea", "oracle"):
            layers = layer_report(student, teacher, valid[:8], args)
            log.record(name=name, layers=layers)
            print(f"{name}, by layer: KL of the estimate in nats, the least for this width, the attention kept, the most for this topk")
            for i, layer in enumerate(layers):
                print(f"  {i:3} {layer['kl']:7.3f} {layer['least']:7.3f} {layer['kept']:7.3f} {layer['best']:7.3f}", flush=True)
        if name == "sea":
            own = convert.attention_modules(student)[0].sea.config.topk
            for k in args.eval_topk:
                convert.set_option(student, topk=k)
                points[k] = point(student, perplexity(student, valid, args))
                results[f"sea, topk {k}"] = points[k]["ppl"]
                table.append((f"sea, topk {k}", points[k]["ppl"], keys_per_query(student, valid, args), ""))
            convert.set_option(student, topk=own)
            draw(student, teacher, valid[0], out / "sea.png", args)
        elif args.eval_topk and name != "oracle":  # which has no time of its own
            lines[name] = point(student, after)

    if args.eval_topk:
        lines = {"teacher": point(teacher, teacher_ppl), **lines}
    print(f"\n{'':18} {'val ppl':>9} {'ratio':>7} {'keys/query':>11} {'a pass':>12} {'memory':>12} {'training':>9} {'memory':>12} {'tok/s':>11}")
    for name, ppl, keys, training in table:
        cost = passes.get(name.removesuffix(" after"))
        once = " " * 25 if cost is None else f"{cost['ms']:9.1f} ms " + (" " * 12 if cost["mib"] is None else f"{cost['mib']:8,.0f} MiB")
        print(f"{name:18} {ppl:9.2f} {ppl / teacher_ppl:7.3f} {keys:11.1f} {once} {training}".rstrip())
    print("a pass: one sequence through the whole model, launched from Python, logits of its last token; memory above the weights")
    if args.by_position:
        print(f"\n{'val ppl of tokens':18} " + " ".join(f"{b['first']:,}-{b['last']:,}".rjust(13) for b in positions["teacher"]))
        for name, blocks in positions.items():
            print(f"{name:18} " + " ".join(f"{b['ppl']:13.2f}" for b in blocks))
    for i, prompt in enumerate(args.prompt):  # a line for each, whatever lines the text has
        print(f"\n{'prompt':18} {prompt!r}")
        for name in texts:
            print(f"{name:18} {texts[name][i]!r}")
    log.record(results=results, passes=passes, by_position=positions, prompts=args.prompt, continuations=texts,
               seconds=time.perf_counter() - began)
    if points and not args.shard and rank == 0:
        draw_curve(points, lines, out / "topk", f"from q, k, v on, estimator included, all {text.num_hidden_layers} layers,\n"
                   f"a sequence of {args.seq_len:,}, {next(iter(points.values()))['clock']}, {device}")
    total, each = time.perf_counter() - began, "" if size == 1 else " a process"
    print(f"\n{total / 60:.1f} minutes, peak memory {max(*peaks, peak_memory(args)):.2f} GiB{each}, written to {out}/")
    stop_processes()
    return results


if __name__ == "__main__":
    main()
