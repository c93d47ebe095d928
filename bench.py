"""Latency and memory of SEA attention, estimator included, against FlashAttention and cuDNN.

    python bench.py                           T = 1k ... 256k, forward and forward + backward, strides
                                              1 and 4
    python bench.py --model DIR --data FILE   on q, k and v of a real model instead of synthetic ones
    python bench.py --student DIR --data FILE   a layer of a student that distill.py saved, as it is
    python bench.py --break-even              from which T SEA wins on this machine
    python bench.py --profile 32768           where the time goes at one T
    python bench.py --distill                 time and memory of a distillation step, against one with
                                              T x T tensors
    torchrun --nproc-per-node 2 bench.py --distill [--shard]       on several GPUs, without T x T
    python bench.py --decode                  a decoding step against SDPA on the same keys, contexts of
                                              8k ... 512k, batch 1 and 16
    python bench.py --prefill                 time and memory of a model's prefill, in chunks and in one
                                              call, against SDPA

One run compares everything on the same inputs, with SEA as --topk, --width and --sea say (--sea bin=0:
cells without bins) and with --kv-heads key/value heads. On a GPU it also measures what others made, where
that runs: FlexAttention over the first and last keys, as many as SEA attends to, and forward alone `fla`'s
native sparse attention, which wants at least 16 query heads a key/value head. Writes OUT/bench.json and
OUT/bench.png, --decode, --prefill and --distill OUT/bench_decode.json and so on; --break-even and --profile
only print. Without a GPU it measures the plain PyTorch path at small T and says so.

Inputs. With --student: q, k and v of its middle layer in one window of the text, and that layer with its
weights and configuration, which every row names. With --model: text windows through the model; q, k, v of
neighbouring layers, their heads side by side, windows one after the other until T is reached, so that a
longer sequence has the local statistics of a real one and repeats nothing but the positions within a
window. Without: random walks, since real neighbours are alike. The estimator is then trained on those
inputs for a moment (estimate_loss at 2,048 tokens), because the cells that an untrained one picks are as
good as random, which is the worst case for the kernels. That case is measured too, as "random choice". A
position table trained at 2,048 is stretched to T. What such a layer's speed is worth nobody knows, and its
rows say so.

--decode takes a trained estimator and random walks as well. Its state comes from a prefill of the first
8,192 tokens of each context, and is then told the whole context's number of tokens: how many keys are
selected depends on that, and they lie all over the context. A step is one CUDA graph: attention with
its estimator, its state updated in place; adding the new key and value to the cache, which dense attention
needs as well, is left out of both. Its time is on a GPU the mean of 32 steps, of which one in --strides
estimates a row. --prefill takes an OPT with random weights, or a
Llama if heads share keys, whose cells are as good as random.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer

import convert
import distill
import evaluate
import sea

TRAINED = 2048
ROOM = 64  # steps that --decode's static buffer of keys has room for
STEPS = 32  # that --decode takes the mean of
PROMPT = 8192  # tokens that --decode's state has seen
REFERENCE = 16384  # longest T for plain PyTorch, which computes all scores
PYTORCH = "plain PyTorch path of SEA"
RANDOM = "random choice, sparse attention alone"
FLEX = "FlexAttention, window"
NSA = "NSA of fla, 16 blocks"
DENSE = ("FlashAttention", "cuDNN", "SDPA")
OTHERWISE = ("width", "topk", "query_stride", "max_positions", "backend")  # fields that --sea does not set


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    defaults = dict(heads=12, d_head=64, width=256, topk=64, train_steps=200 if cuda else 5)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", help="local folder or hub id of a causal language model to take q, k, v from (none: "
        "random walks); the teacher of --distill, whose tokens are random")
    add("--student", help="folder that distill.py saved a student of SEA in, whose attention is measured, "
        "with --topk, --sea and --width only where no weight depends on them (none: as saved)")
    add("--data", help="text file in UTF-8, needed with --student and --model, but not for --distill")
    add("--lengths", type=int, nargs="+", help="tokens (none: 1024 ... 262144, --distill 2048, 8192, "
        "32768, --decode 8192 ... 524288, --prefill 8192, 32768, 131072; 256 and 512 without a GPU; of a "
        "student those that it has positions for)")
    add("--batches", type=int, nargs="+", default=[1, 16] if cuda else [1, 2],
        help="sequences decoded at a time")
    add("--strides", type=int, nargs="+", default=[1, 4], help="query strides")
    add("--heads", type=int, help="query heads (none: 12)")
    add("--kv-heads", type=int, help="key/value heads (none: as many)")
    add("--d-head", type=int, help="numbers a head (none: 64)")
    add("--width", type=int, help="cells of an estimated row (none: 256)")
    add("--topk", type=int, help="keys per query and head, on average (none: 64)")
    add("--sea", type=evaluate.settings(sea.SEAConfig), nargs="+", action="extend", default=[],
        metavar="NAME=VALUE", help="other fields of sea.SEAConfig: bin (0: no bins), local, first, "
        "candidates, group, nbf, cell_keys, cnn")
    add("--train-steps", type=int, help=f"steps that train the estimator (none: {defaults['train_steps']})")
    add("--forward-only", action="store_true", help="leave out the backward passes")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="what others made: FlexAttention, "
        "which compiles for a minute at each T, fla's sparse attention; or none")
    add("--break-even", action="store_true", help="only look for the T from which SEA is faster, by "
        "bisection")
    add("--distill", action="store_true", help="only measure steps of distill.py on an OPT (a Llama "
        "with --kv-heads) of --layers layers with random weights, at the first of --strides")
    add("--batch", type=int, default=1, help="sequences a step and process of --distill")
    for name in ("--shard", "--gradient-checkpointing"):
        add(name, action="store_true", help="of --distill: as in distill.py")
    add("--decode", action="store_true", help="only measure decoding steps")
    add("--prefill", action="store_true", help="only measure the prefill of an OPT (a Llama with "
        "--kv-heads) of --layers layers with random weights")
    add("--layers", type=int, default=12 if cuda else 1, help="of the model of --distill and --prefill")
    add("--profile", type=int, help="only list the kernels of one forward and backward at this T")
    add("--out", default="out", help="folder for the files it writes")
    args = p.parse_args(argv)
    for name in ("lengths", "batches", "strides", "heads", "kv_heads", "d_head", "width", "topk",
                 "train_steps", "batch", "layers", "profile"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            p.error(f"--{name.replace('_', '-')}: expected integers >= 1, got {value}")
    if (args.student or args.model) and not args.data and not args.distill:
        p.error(f"--data: expected a text file with {'--student' if args.student else '--model'}, got none")
    args.device = "cuda" if cuda else "cpu"
    args.dtype = torch.bfloat16 if cuda else torch.float32
    fixed = [name for name, _ in args.sea if name in OTHERWISE]
    if fixed:
        p.error(f"--sea: expected other fields than {', '.join(OTHERWISE)}, which --width, --topk, --strides "
                f"and what is measured set, got {', '.join(fixed)}")
    if args.student:
        refuse_beside_student(p, args)
    else:
        complete(p, args, defaults)
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--shard: expected several processes to spread over, under torchrun, got one")
    return args


def refuse_beside_student(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what a student decides itself; turn --sea, --topk and --width into a dict of fields to change."""
    for name in ("distill", "decode", "prefill"):
        if getattr(args, name):
            p.error(f"--student: expected no --{name} beside it, since of a student only the attention is "
                    "measured")
    for name in ("model", "heads", "kv_heads", "d_head", "train_steps"):
        if getattr(args, name) is not None:
            p.error(f"--student: expected no --{name.replace('_', '-')} beside it, since it has its own, "
                    f"got {getattr(args, name)}")
    given = dict(width=args.width, topk=args.topk)
    args.sea = {name: value for name, value in given.items() if value is not None} | dict(args.sea)


def complete(p: argparse.ArgumentParser, args: argparse.Namespace, defaults: dict) -> None:
    """Fill in defaults, and turn --sea, --topk and --width into a dict of fields of SEAConfig, which layers at
    each of --strides have to be able to have."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        p.error(f"--kv-heads: expected a divisor of the {args.heads} --heads, got {args.kv_heads}")
    args.lengths = args.lengths or default_lengths(args)
    args.sea = dict(width=args.width, topk=args.topk, **dict(args.sea))
    try:
        for stride in args.strides:
            sea_config(args, query_stride=stride)
    except ValueError as error:
        own = str(error).startswith(("topk:", "width:"))
        p.error(f"--{error}" if own else f"--sea {error}")


def sea_config(args, **fields) -> sea.SEAConfig:
    """Of the layers that are measured, but for a student's, and for models of --distill and --prefill, whose
    heads are their own."""
    return sea.SEAConfig(n_head=args.heads, n_kv_head=args.kv_heads, d_head=args.d_head, **args.sea, **fields)


def default_lengths(args) -> list[int]:
    if args.device != "cuda":
        return [256, 512]
    if args.distill:
        return [2048, 8192, 32768]
    if args.decode:
        return [8192, 32768, 131072, 524288]
    if args.prefill:
        return [8192, 32768, 131072]
    return [1024 * 2**i for i in range(9)]


# -- inputs ----------------------------------------------------------------------------------------


@torch.no_grad()
def model_inputs(args, T: int) -> list[torch.Tensor]:
    """q (1, H, T, D) and k, v (1, Hkv, T, D) of a model's layers on text."""
    text = "\n\n\n".join(evaluate.read_documents("--data", args.data))[: 8 * T]
    tokenizer, model = evaluate.from_hub(args.model, torch.bfloat16)
    model = model.to(args.device).eval()
    model.set_attn_implementation("sea_teacher")
    ids = tokenizer(text, verbose=False).input_ids
    window = min(TRAINED, T)
    n = -(-T // window) * window
    ids = torch.tensor((ids * (T // len(ids) + 2))[:n], device=args.device).view(-1, window)
    windows = []
    for x in ids:
        with convert.record(model) as records:
            model(x[None], use_cache=False)
        windows.append(heads_of(records, args.heads, args.heads // args.kv_heads))
    q, k, v = (torch.cat(parts, 2)[..., :T, :].contiguous() for parts in zip(*windows))
    return [q[:, : args.heads], k[:, : args.kv_heads], v[:, : args.kv_heads]]


def heads_of(records: list, n_head: int, group: int) -> list[torch.Tensor]:
    """q, k, v of as many layers, from the middle one on, as it takes for n_head query heads, side by side, of
    which `group` share a key/value head."""
    of_model = records[0].q.shape[1] // records[0].k.shape[1]
    if of_model % group:
        sys.exit(f"--kv-heads: expected a divisor of --model's {of_model} query heads a key/value head, got "
                 f"{group} of them")
    middle, n_layer = len(records) // 2, -(-n_head // records[0].q.shape[1])
    layers = []
    for i in range(n_layer):
        r = records[(middle + i) % len(records)]
        n_kv_head = r.q.shape[1] // group
        layers.append((as_scaled_by_default(r), *(sea.repeat_heads(x, n_kv_head) for x in (r.k, r.v))))
    return [torch.cat(parts, 1) for parts in zip(*layers)]


def as_scaled_by_default(r: convert.Record) -> torch.Tensor:
    """Its q, as a scale of D**-0.5 wants it."""
    return r.q * r.scale * r.q.shape[-1] ** 0.5


def walk_inputs(args, T: int, seed: int = 0) -> list[torch.Tensor]:
    """Random walks pulled to 0, correlated over about 100 tokens, q (1, H, T, D) and k, v (1, Hkv, T, D); q
    and k share half of theirs."""
    generator, H, Hkv = torch.Generator(args.device).manual_seed(seed), args.heads, args.kv_heads
    kernel = torch.exp(-torch.arange(512, device=args.device) / 100.0)
    kernel = kernel / kernel.square().sum().sqrt()

    def walk(n_head):
        noise = torch.randn(n_head * args.d_head, 1, T + 511, generator=generator, device=args.device)
        return F.conv1d(noise, kernel[None, None]).view(1, n_head, args.d_head, T).mT

    shared, q, k, v = (walk(n_head) for n_head in (Hkv, H, Hkv, Hkv))
    return [x.contiguous() for x in (sea.repeat_heads(shared, H) + q, shared + k, v)]


def trained_layer(args, q, k, v) -> sea.SEAttention:
    """A layer whose estimator has seen these inputs."""
    torch.manual_seed(0)
    config = sea_config(args, max_positions=TRAINED, backend="torch")
    layer = sea.SEAttention(config).to(args.device)
    optimizer = torch.optim.AdamW(layer.parameters(), 2e-3)
    n = min(TRAINED, q.shape[2], 2048 if q.is_cuda else 256)
    seen = torch.arange(1, n + 1, device=args.device)[None]
    for step in range(args.train_steps):
        start = (step * n) % (q.shape[2] - n + 1)
        x = [t[:, :, start : start + n].float() for t in (q, k, v)]
        result = layer(*x)
        cells = config.cell_layout(result.in_cells)
        pooled = sea.pool_attention(x[0], x[1], seen, config.width, **cells)
        loss = sea.estimate_loss(result.scores, pooled, **cells)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if args.train_steps:
        print(f"estimator trained for {args.train_steps} steps of {n} tokens, loss {loss.item():.4f}",
              flush=True)
    return layer


def stretched(args, layer: sea.SEAttention, T: int, stride: int,
              backend: str = "auto") -> sea.SEAttention:
    """The layer at that stride, its position table, if it has one, stretched to T tokens if it is shorter."""
    longest, weights = max(T, layer.config.max_positions), layer.state_dict()
    config = replace(layer.config, max_positions=longest, query_stride=stride, backend=backend)
    if config.cnn:
        table = weights["position"].T[None]  # (1, D, max_positions)
        weights["position"] = F.interpolate(table, size=longest, mode="linear", align_corners=True)[0].T
    long = sea.SEAttention(config).to(args.device)
    long.load_state_dict(weights)
    return long.to(args.dtype)


def random_model(args, T: int, device: str) -> torch.nn.Module:
    """For T tokens, of args.layers layers with random weights: an OPT, OPT-125m by default, or a Llama if
    query heads share a key/value head, which an OPT's do not."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    hidden = args.heads * args.d_head
    shape = dict(hidden_size=hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                 max_position_embeddings=T, vocab_size=50272)
    with torch.device(device):
        if args.kv_heads < args.heads:
            return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=args.kv_heads,
                                                intermediate_size=4 * hidden))
        return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, dropout=0.0))


# -- a student -------------------------------------------------------------------------------------


def open_student(args) -> tuple[torch.nn.Module, object]:
    """--student, with --sea, --topk and --width as far as no weight depends on them, and its tokenizer."""
    saved = evaluate.saved_config(args.student)
    method = "oracle" if saved.get("sea_oracle") else saved.get("sea", {}).get("method", "no student")
    expected = f"--student: expected a folder that distill.py saved a student of SEA in, got {args.student}"
    if method != "sea":
        sys.exit(f"{expected} ({method})")
    free = convert.free_options(saved["sea"])
    if fixed := [name for name in args.sea if name not in free]:
        sys.exit(f"--student: expected options that no weight depends on beside it, got {', '.join(fixed)}")
    try:
        for stride in args.strides:
            evaluate.with_options(saved, **args.sea, query_stride=stride)
    except ValueError as error:
        sys.exit(f"--student: expected options that it can have at all of --strides ({error})")
    try:
        folder = convert.whole(Path(args.student))
        student = convert.load(folder, dtype=args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a folder with the wrong things in it gives any
        sys.exit(f"{expected} ({evaluate.reason(error)})")
    convert.set_option(student, **args.sea)
    return student.to(args.device), tokenizer


@torch.no_grad()
def student_inputs(args) -> tuple[sea.SEAttention, list[torch.Tensor]]:
    """The middle layer of --student, and q (1, H, T, D) and k, v (1, Hkv, T, D) that it sees of the first T
    tokens of the text, the most that are measured. --lengths become, if none are given, the usual ones that
    it has positions for."""
    student, tokenizer = open_student(args)
    modules = convert.attention_modules(student)
    middle, longest = modules[len(modules) // 2], student.config.get_text_config().max_position_embeddings
    if middle.sea.config.cnn:  # which has positions of its own
        longest = min(longest, middle.sea.config.max_positions)
    args.lengths = args.lengths or [T for T in default_lengths(args) if T <= longest] or [longest]
    option, T = ("--profile", args.profile) if args.profile else ("--lengths", max(args.lengths))
    if T > longest:
        sys.exit(f"{option}: expected at most the student's {longest} positions, got {T}")
    text = "\n\n\n".join(evaluate.read_documents("--data", args.data))
    ids = evaluate.tokenize([text[: 16 * T]], tokenizer)[:T]
    if len(ids) < T:
        sys.exit(f"--data: expected a text of at least {T} tokens, got {len(ids)}")
    with convert.record(middle) as records:
        student.base_model(ids[None].long().to(args.device), use_cache=False)
    (r,) = records
    return middle.sea, [x.contiguous() for x in (as_scaled_by_default(r), r.k, r.v)]


# -- timing tools ----------------------------------------------------------------------------------


def measured(measure: Callable[[], dict]) -> dict:
    """What measure() gives, or the first line of the error that ended it: some run out of memory, and a
    compiler raises anything."""
    try:
        return measure()
    except Exception as error:
        return dict(error=evaluate.reason(error))
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- attention at each T ---------------------------------------------------------------------------


def forward(attention, q, k, v) -> Callable[[], None]:
    def run():
        with torch.no_grad():
            attention(q, k, v)

    return run


def forward_backward(attention, q, k, v) -> Callable[[], None]:
    """As training needs it: from all outputs, also what SEA's own losses are of, to q, k, v and all weights."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    douts = [torch.randn_like(x) for x in outputs(attention(*inputs))]
    weights = list(attention.parameters()) if isinstance(attention, torch.nn.Module) else []

    def run():
        torch.autograd.grad(outputs(attention(*inputs)), inputs + weights, douts)

    return run


def outputs(result) -> list[torch.Tensor]:
    if not isinstance(result, sea.SEAOutput):
        return [result]
    return [x for x in (result.out, result.scores, result.head_share) if x is not None]


def sdpa(backend: SDPBackend | None, q, k, v, causal: bool = True) -> torch.Tensor:
    is_grouped = q.shape[1] != k.shape[1]
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=is_grouped)


def dense_contestants(args) -> dict[str, SDPBackend | None]:
    if args.device == "cuda":
        return {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {"SDPA": None}


def contestants(args, layer, T: int) -> dict[str, Callable]:
    """Name -> attention(q, k, v) -> out."""
    found = {}
    for name, backend in dense_contestants(args).items():
        found[name] = functools.partial(sdpa, backend)
    for stride in args.strides:
        found[f"SEA stride {stride}"] = stretched(args, layer, T, stride)
    if args.device == "cuda" and T <= REFERENCE:
        found[PYTORCH] = stretched(args, layer, T, args.strides[0], "torch")
    if args.device == "cuda":
        found[RANDOM] = on_random_choice(args, layer.config, T)
    return found


def flex_window(config: sea.SEAConfig, q, k, v) -> Callable:
    """FlexAttention to the first and the last keys, as many as SEA attends to."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # at every T it is compiled anew, and after a few times it would run uncompiled
    T, n_first = q.shape[2], config.n_first * config.unit
    n_last = config.topk - n_first

    def keep(b, h, query, key):
        return (key <= query) & ((key < n_first) | (query - key < n_last))

    mask = torch.compile(create_block_mask)(keep, None, None, T, T, device=q.device)  # else it is T x T
    attention = torch.compile(flex_attention, dynamic=False)
    return functools.partial(attention, block_mask=mask, enable_gqa=True)


def native_sparse_attention(config: sea.SEAConfig, q, k, v) -> Callable:
    """fla's, of 16 chosen blocks of 64 keys and the means of all blocks, whatever the budget; of these inputs
    alone, since it wants (B, T, H, D) in memory."""
    from fla.ops.nsa.parallel import parallel_nsa

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    gate = q.new_ones(q.shape[:3])
    options = dict(g_cmp=gate, g_slc=gate, g_swa=None, block_counts=16, block_size=64)
    return lambda *_: parallel_nsa(q, k, v, **options)


PEERS = {"flex": (FLEX, flex_window), "nsa": (NSA, native_sparse_attention)}  # names of --peers


@torch.no_grad()
def peers(chosen: list[str], config: sea.SEAConfig, q, k, v) -> dict[str, Callable]:
    """Sparse attention that others made, of --peers. What does not run here is left out, with a sentence."""
    found = {}
    for name, make in (PEERS[peer] for peer in chosen):
        try:
            attention = make(config, q, k, v)
            attention(q, k, v)
            found[name] = attention
        except Exception as error:  # of a compiler, or of a package that is not there
            print(f"T {q.shape[2]:,}: {name} is left out ({evaluate.reason(error)})", flush=True)
    return found


def on_random_choice(args, config: sea.SEAConfig, T: int) -> Callable:
    """Sparse attention to random bins, or under random cells, as many as SEA keeps."""
    import kernels

    seen = torch.arange(1, T + 1, device=args.device)[None]
    if config.has_bins:
        bins = torch.cat([random_bins(config, part) for part in seen.split(8192, dim=1)], 2)
        return lambda q, k, v: kernels.bin_attention(q, k, v, bins, seen, bin=config.bin)
    H, width, bits = config.n_head, config.width, []
    n_cells = (2 * H * config.topk * width + seen) // (2 * seen)  # of all heads
    for share in (n_cells / (H * width)).split(8192, dim=1):
        scores = torch.rand(1, H, share.shape[1], width, device=args.device)
        bits.append(kernels.pack_mask(scores < share[:, None, :, None]).bits)
    cells = kernels.CellBits(torch.cat(bits, 2), width)
    return lambda q, k, v: kernels.sparse_attention(q, k, v, cells, seen)


def random_bins(config: sea.SEAConfig, seen: torch.Tensor) -> torch.Tensor:
    """As choose_bins, (B, C, T, n): but for the first and last bins, one from each of n_chosen equal parts of
    those in cells."""
    n, first, n_in_cells = config.n_chosen(config.topk), config.n_first, config.in_cells(seen) // config.bin
    middle = (n_in_cells - first).clamp(min=0)[:, None, :, None]  # (B, 1, T, 1)
    edges = first + middle * torch.arange(n + 1, device=seen.device) // max(n, 1)
    begin, size = edges[..., :-1], edges.diff(dim=-1)
    drawn = torch.rand(len(seen), config.n_choosers, seen.shape[1], n, device=seen.device)
    chosen = torch.where(size > 0, begin + (drawn * size).long().minimum(size - 1), sea.NONE)
    always = sea.always_bins(seen, n_in_cells, config, seen.shape[1])[:, None]
    always = always.expand(-1, config.n_choosers, -1, -1)
    return torch.cat([always, chosen], dim=-1).sort(-1).values.int()


def measure(args, layer, inputs, T: int) -> dict[str, dict]:
    q, k, v = (x[:, :, :T].to(args.dtype) for x in inputs)
    kinds, results = {"forward": forward, "forward+backward": forward_backward}, {}
    if args.forward_only:
        del kinds["forward+backward"]

    def time_and_memory(make, attention, graph: bool) -> dict:
        run = make(attention, q, k, v)  # forward_backward needs memory for it already
        return dict(ms=evaluate.milliseconds(run, graph=graph), mib=evaluate.peak_mib(run))

    def rivals() -> Iterator[tuple[str, Callable]]:
        yield from contestants(args, layer, T).items()
        if args.device == "cuda":  # the last, since a compiler may take minutes
            yield from peers(args.peers, layer.config, q, k, v).items()

    for name, attention in rivals():
        for kind, make in kinds.items():
            if name == NSA and kind != "forward":
                continue
            measure_one = functools.partial(time_and_memory, make, attention, graph=name != PYTORCH)
            result = results[f"{name} | {kind}"] = measured(measure_one)
            found = f"{result['ms']:.3f} ms" if "ms" in result else f"left out ({result['error']})"
            print(f"T {T:,} {name}, {kind}: {found}", flush=True)
    return results


def all_lengths(args, layer, inputs) -> dict[int, dict]:
    rows, of = {}, of_layer(args, layer.config)
    for T in args.lengths:
        rows[T] = {name: result | of for name, result in measure(args, layer, inputs, T).items()}
    for kind in ("forward",) if args.forward_only else ("forward", "forward+backward"):
        print(table(rows, kind))
    return rows


def of_layer(args, config: sea.SEAConfig) -> dict:
    """What a row says of the layer that it measures."""
    student = args.student or "no student, quality unknown"
    return dict(student=student, topk=config.topk, sea=configuration(config))


def table(rows: dict[int, dict], kind: str) -> str:
    names = sorted({name for row in rows.values() for name in row if name.endswith(f"| {kind}")})
    short = {name: name.split(" |")[0] for name in names}
    lines = [f"\n{kind}: ms (MiB above the inputs)",
             f"{'T':>8} " + " ".join(f"{short[name][:24]:>24}" for name in names)]
    for T, row in rows.items():
        found = {name: row[name] for name in names if "ms" in row.get(name, {})}
        cells = dict.fromkeys(names, "-")
        cells |= {name: f"{r['ms']:.3f} ({r['mib'] or 0:8,.0f})" for name, r in found.items()}
        of = next(f" | {r['student']}: {r['sea']}" for r in row.values())
        lines.append(f"{T:8,} " + " ".join(f"{cell:>24}" for cell in cells.values()) + of)
        dense = [r["ms"] for name, r in found.items() if name.startswith(DENSE)]
        for name, r in found.items():
            if dense and name.startswith("SEA"):
                speed = min(dense) / r["ms"]
                lines.append(f"{'':8}   {short[name]}: {speed:.2f}x the speed of the fastest dense{of}")
    return "\n".join(lines)


def break_even(args, layer, inputs) -> None:
    """Bisection for each stride, forward, to 3 % of T."""
    def wins(stride, T):
        q, k, v = (x[:, :, :T].to(args.dtype) for x in inputs)
        sea_layer = stretched(args, layer, T, stride)
        dense = [functools.partial(sdpa, backend) for backend in dense_contestants(args).values()]
        fastest = min(evaluate.milliseconds(forward(attention, q, k, v)) for attention in dense)
        return evaluate.milliseconds(forward(sea_layer, q, k, v)) < fastest

    for stride in args.strides:
        low, high = 1, max(args.lengths)
        if not wins(stride, high):
            print(f"stride {stride}: SEA does not win up to T = {high:,}")
            continue
        while high - low > max(1, high // 32):
            middle = (low + high) // 2
            low, high = (low, middle) if wins(stride, middle) else (middle, high)
        print(f"stride {stride}: SEA's forward is faster from about T = {high:,}")


def profile(args, layer, inputs) -> None:
    T, cuda = args.profile, args.device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    microseconds = "self_device_time_total" if cuda else "self_cpu_time_total"
    q, k, v = (x[:, :, :T].to(args.dtype) for x in inputs)
    for stride in args.strides:
        module = stretched(args, layer, T, stride)
        for name, make in (("forward", forward), ("forward+backward", forward_backward)):
            run = make(module, q, k, v)
            run()
            with torch.profiler.profile(activities=[activity]) as prof:
                run()
                if cuda:
                    torch.cuda.synchronize()
            events = [(getattr(event, microseconds) / 1000, event) for event in prof.key_averages()]
            events.sort(key=lambda pair: pair[0], reverse=True)
            total, count = sum(ms for ms, _ in events), sum(event.count for _, event in events)
            print(f"\nT {T:,} stride {stride} {name}: {total:.2f} ms in {count} kernels")
            for ms, event in events[:20]:
                print(f"  {ms:8.3f} ms {event.count:4} x {event.key[:90]}")


# -- distillation ----------------------------------------------------------------------------------


def teacher_model(args, T: int) -> torch.nn.Module:
    """--model, or one with random weights, as distill.py's teacher, not yet placed: what is to be
    sharded is made on the CPU."""
    if args.model:
        _, model = evaluate.from_hub(args.model)
        longest = model.config.max_position_embeddings
        if T > longest:
            sys.exit(f"--lengths: expected at most the model's {longest} positions, got {T}")
    else:
        model = random_model(args, T, "cpu" if args.shard else args.device)
    model.set_attn_implementation("sea_teacher")
    return model.eval().requires_grad_(False)


def distillation_step(args, T: int, backend: str) -> tuple[Callable[[], None], int]:
    """What a step of distill.py does, and how many tokens this process trains on in it."""
    teacher = teacher_model(args, T)
    student = copy.deepcopy(teacher).requires_grad_(True)
    convert.attach(student, **args.sea, query_stride=args.strides[0], backend=backend).train()
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    teacher, student = evaluate.to_device(teacher, args), evaluate.to_device(student, args)
    optimizer = distill.make_optimizer(student, distill.OptimizerConfig())
    run = distill.data_parallel(student, args)
    x = torch.randint(5, student.config.vocab_size, (args.batch, T), device=args.device)

    def step():
        with evaluate.autocast(args):
            terms = distill.distillation_losses(student, teacher, x, distill.LossWeights(), run)
        sum(terms.values()).backward()
        distill.clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, x.numel()


@contextlib.contextmanager
def one_block(T: int):
    """Plain PyTorch's attention and pooling keep their T x T tensors, instead of blocks of queries."""
    whole = {name: functools.partial(getattr(sea, name), block=T)
             for name in ("sparse_attention", "bin_attention", "pool_attention")}
    with mock.patch.multiple(sea, **whole):
        yield


def distillation(args, size: int) -> dict[int, dict]:
    """A step of distill.py, on the linear path and, if this is the only process of `size`, on the plain
    PyTorch path that keeps T x T tensors."""
    rows = {}
    for T in args.lengths:
        rows[T] = {"linear": report_step(args, T, "linear", "auto", size)}
        if size == 1:
            with one_block(T):
                rows[T]["T x T"] = report_step(args, T, "T x T", "torch", size)
    return rows


def time_step(args, T: int, backend: str, size: int) -> dict:
    step, n_tokens = distillation_step(args, T, backend)
    with distill.settled():
        ms, mib = evaluate.milliseconds_in_a_row(step), evaluate.peak_mib(step)
    return dict(ms=ms, tokens_per_second=1000 * size * n_tokens / ms, gpus=size, mib=mib,
                gib=distill.peak_memory(args))


def report_step(args, T: int, name: str, backend: str, size: int) -> dict:
    try:
        result = time_step(args, T, backend, size)
    except torch.OutOfMemoryError as error:
        if size > 1:
            raise  # the others wait for this process
        print(f"T {T:,} {name}: out of memory", flush=True)
        return dict(error=str(error).splitlines()[0])
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"T {T:,} {name}: {result['ms']:.0f} ms a step, {result['tokens_per_second']:,.0f} tok/s on "
          f"{size}, peak {result['gib']:.2f} GiB each, {result['mib'] or 0:,.0f} MiB of it above the models "
          "and the optimizer", flush=True)
    return result


# -- decoding --------------------------------------------------------------------------------------


def decode_inputs(args, S: int, B: int) -> tuple[torch.Tensor, ...]:
    """q (B, H, PROMPT + 1, D), of the first tokens and of the last of S; k and v (B, Hkv, S + ROOM, D). Two
    random walks, in turn: no sequence's step is quicker because another is like it."""
    options = dict(dtype=args.dtype, device=args.device)
    k, v = (torch.zeros(B, args.kv_heads, S + ROOM, args.d_head, **options) for _ in range(2))
    q = k.new_zeros(B, args.heads, min(PROMPT, S - 1) + 1, args.d_head)
    for b in range(B):
        if b < 2:
            all_q, k[b, :, :S], v[b, :, :S] = (x[0] for x in walk_inputs(args, S, seed=1 + b))
            q[b, :, :-1], q[b, :, -1] = all_q[:, : q.shape[2] - 1], all_q[:, -1]
            del all_q
        else:
            q[b], k[b], v[b] = q[b % 2], k[b % 2], v[b % 2]
    return q, k, v


def decoding_step(args, layer, S: int, stride: int, q, k, v) -> Callable[[], sea.SEAOutput]:
    """A step of SEA, again and again, whose state is that of a prefill of q's first tokens, told that
    they were S - 1."""
    module, prompt = stretched(args, layer, S + ROOM, stride), q[:, :, :-1]
    n = prompt.shape[2]
    state = module(prompt, k[:, :, :n], v[:, :, :n], kv_cached=True, rows_at_once=TRAINED).state
    state.count.fill_(S - 1)
    state.n_tokens = state.n_least = S - 1
    last = q[:, :, -1:]

    def step():
        return module(last, k, v, state=state, kv_cached=True, in_place=True)

    return step


def step_milliseconds(args, step) -> float:
    """Mean of STEPS steps, on a GPU of a CUDA graph, one after the other."""
    if args.device != "cuda":
        return evaluate.milliseconds(step, device=args.device)
    evaluate.warm_up(step, 3)
    replay = evaluate.captured(step)
    replay()
    return evaluate.gpu_milliseconds(lambda: [replay() for _ in range(STEPS)]) / STEPS


@torch.no_grad()
def decode(args, layer, S: int, B: int) -> dict[str, dict]:
    """One step with S keys, each of B sequences: name -> ms, and for SEA how many keys a head visits, on
    average and at most."""
    n_bytes = args.kv_heads * 2 * B * args.dtype.itemsize + args.heads * 8 * 4  # of k and v, and of the walks
    gib = S * args.d_head * n_bytes / 2**30
    free = torch.cuda.mem_get_info()[0] / 2**30 if args.device == "cuda" else gib
    if gib > free:
        return {"all": dict(error=f"skipped, needs {gib:.0f} GiB of the {free:.0f} that are free")}
    q, k, v = decode_inputs(args, S, B)
    inputs = q[:, :, -1:], k[:, :, :S], v[:, :, :S]
    runs, results = {}, {}
    for name, backend in dense_contestants(args).items():
        runs[name] = functools.partial(sdpa, backend, *inputs, causal=False)  # one query sees all keys
    for stride in args.strides:
        runs[f"SEA stride {stride}"] = decoding_step(args, layer, S, stride, q, k, v)
    for name, run in runs.items():
        results[name] = measured(lambda run=run: dict(ms=step_milliseconds(args, run)))
        if name.startswith("SEA") and "ms" in results[name]:
            results[name] |= keys_visited(run())
    return results


def keys_visited(result: sea.SEAOutput) -> dict[str, float]:
    n_keys = result.n_attended()
    return dict(keys=n_keys.float().mean().item(), most=n_keys.max().item())


def decoding(args, layer) -> dict[int, dict]:
    rows = {}
    for S in args.lengths:
        rows[S] = {}
        for B in args.batches:
            found = decode(args, layer, S, B)
            dense = [r["ms"] for name, r in found.items() if "ms" in r and not name.startswith("SEA")]
            for name, result in found.items():
                rows[S][f"batch {B}, {name}"] = result
                print(f"context {S:,} batch {B} {name}: {decoding_line(result, dense)}", flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return rows


def decoding_line(result: dict, dense: list[float]) -> str:
    if "error" in result:
        return result["error"]
    line = f"{result['ms']:.4f} ms"
    if "keys" in result:
        line += f", {result['keys']:.0f} keys a head, {result['most']} at most"
        line += f", {min(dense) / result['ms']:.2f}x the speed of the fastest dense" if dense else ""
    return line


# -- prefill ---------------------------------------------------------------------------------------


def prefill(args) -> dict[int, dict]:
    """A prompt of T tokens, its keys and values kept, logits of the last token only: time, and memory
    above the weights."""
    rows = {}
    for T in args.lengths:
        chunk = convert.ROWS_AT_ONCE if args.device == "cuda" else T // 2
        found = {"SDPA": (None, None)}
        for stride in args.strides:
            found[f"SEA stride {stride}, chunks"] = stride, chunk
            found[f"SEA stride {stride}, one call"] = stride, T
        rows[T] = {}
        for name, (stride, rows_at_once) in found.items():
            with mock.patch.object(convert, "ROWS_AT_ONCE", rows_at_once):
                rows[T][name] = prefill_of(args, T, stride)
            print(f"T {T:,} {name}: {prefill_line(rows[T][name], rows[T]['SDPA'])}", flush=True)
    return rows


def prefill_of(args, T: int, stride: int | None) -> dict:
    """Of a student at that stride, or of a plain model."""
    model = random_model(args, T, args.device).to(args.dtype).eval()
    if stride is not None:
        convert.attach(model, **args.sea, query_stride=stride)
    x = torch.randint(5, 50000, (1, T), device=args.device)

    @torch.no_grad()
    def run():
        model(x, use_cache=True, logits_to_keep=1)

    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    result = measured(lambda: dict(ms=evaluate.milliseconds(run, repeats=5, graph=False), mib=evaluate.peak_mib(run)))
    return result | dict(weights_mib=weights)


def prefill_line(result: dict, dense: dict) -> str:
    if "error" in result:
        return result["error"]
    line = (f"{result['ms']:.1f} ms, {result['mib'] or 0:,.0f} MiB above the weights' "
            f"{result['weights_mib']:,.0f}")
    if result is not dense and "ms" in dense:
        line += f", {result['ms'] / dense['ms']:.2f}x SDPA's time"
        line += f" and {result['mib'] / dense['mib']:.2f}x its memory" if result["mib"] else ""
    return line


# -- figures ---------------------------------------------------------------------------------------


def plot(rows: dict[int, dict], path: Path, title: str) -> None:
    """A panel for each kind of pass, and one for memory."""
    kinds = [kind for kind in ("forward", "forward+backward")
             if any(name.endswith(f"| {kind}") for row in rows.values() for name in row)]
    panels = [(kind, "ms", kind, "ms") for kind in kinds]
    panels.append(("forward", "mib", "forward, peak memory", "MiB above the inputs"))
    plt = evaluate.pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained")
    for axis, (kind, field, label, unit) in zip(axes, panels):
        for name in sorted({name for row in rows.values() for name in row}):
            if name.endswith(f"| {kind}"):
                style = ":" if name.startswith(("random", "plain")) else "-"
                plot_line(axis, rows, name, field, label=name.split(" |")[0], linestyle=style)
        axis.set(xlabel="tokens", ylabel=unit, title=label)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_lines(rows: dict[int, dict], fields: dict[str, str], path: Path, title: str,
               xlabel: str) -> None:
    """A log-log panel for each field, a line for each name; `fields` name their axes."""
    plt, n = evaluate.pyplot(), len(fields)
    figure, axes = plt.subplots(1, n, figsize=(4 + 4 * n, 4.8), layout="constrained", squeeze=False)
    for axis, (field, label) in zip(axes[0], fields.items()):
        for name in dict.fromkeys(name for row in rows.values() for name in row):
            plot_line(axis, rows, name, field, label=name, linestyle="-" if "SEA" in name else "--")
        axis.set(xlabel=xlabel, ylabel=label)
        axis.grid(alpha=0.3, which="both")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def plot_line(axis, rows: dict[int, dict], name: str, field: str, **style) -> None:
    points = [(T, row[name][field]) for T, row in rows.items() if row.get(name, {}).get(field)]
    if points:
        axis.loglog(*zip(*points), marker="o", **style)


# -- the job ---------------------------------------------------------------------------------------


def describe(args, argv: list[str] | None, config: sea.SEAConfig) -> dict:
    """Print and return what this run is, of layers with this config."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    command = evaluate.command_line("bench.py", argv)
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    device = device if size == 1 else f"{size} x {device}"
    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}"
    if cuda:
        import triton

        versions += f", triton {triton.__version__}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    print(f"{command}\n{device}, {versions}, commit {commit or 'unknown'}\n{args.dtype}, B "
          f"{args.batches if args.decode else args.batch}, H {config.n_head} over {config.kv_heads}, D "
          f"{config.d_head}, causal\nSEA: {configuration(config)}")
    if not cuda:
        print("no GPU: this measures the plain PyTorch path")
    shown = {name: value for name, value in vars(args).items() if name != "dtype"}
    return dict(command=command, device=device, versions=versions, commit=commit, sea=configuration(config),
                args=shown)


def configuration(config: sea.SEAConfig) -> str:
    """As options say it."""
    of_bins = ("bin", "local", "first", "candidates") if config.has_bins else ("bin",)
    of_estimate = ("nbf", "cell_keys") if config.cnn else ("cnn",)
    names = ("width", "topk", *of_bins, "group", *of_estimate)
    return " ".join(f"{name}={getattr(config, name)}" for name in names)


def write(report: dict, args, name: str) -> Path:
    """The report as JSON in --out; returns where its figure belongs."""
    path = Path(args.out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1))
    return path.with_suffix(".png")


def main_distill(args, argv) -> dict:
    rank, size = evaluate.start_processes(args)
    report = describe(args, argv, sea_config(args))
    report |= dict(results=distillation(args, size))
    if rank == 0:
        write(report, args, "bench_distill")
    evaluate.stop_processes()
    return report


def main_prefill(args, argv) -> dict:
    report = describe(args, argv, sea_config(args))
    report |= dict(results=prefill(args))
    figure = write(report, args, "bench_prefill")
    model = "a Llama" if args.kv_heads < args.heads else "an OPT"
    plot_lines(report["results"], dict(ms="ms", mib="MiB above the weights"), figure,
               f"prefill of {model} of {args.layers} layers ({report['device']})\n{report['sea']}", "tokens")
    return report


def main_decode(args, argv) -> dict:
    report = describe(args, argv, sea_config(args))
    T = 16 * TRAINED if args.device == "cuda" else max(args.lengths)
    layer = trained_layer(args, *walk_inputs(args, T))
    report |= dict(results=decoding(args, layer))
    figure = write(report, args, "bench_decode")
    plot_lines(report["results"], dict(ms="ms a step"), figure,
               f"decoding, estimator included ({report['device']})\n{report['sea']}", "context")
    return report


def main_attention(args, argv) -> dict:
    if args.student:
        layer, inputs = student_inputs(args)
        report = describe(args, argv, layer.config)
    else:
        report = describe(args, argv, sea_config(args))
        make_inputs = model_inputs if args.model else walk_inputs
        inputs = make_inputs(args, args.profile or max(args.lengths))
        layer = trained_layer(args, *inputs)
    inputs = [x.to(args.dtype) for x in inputs]
    if args.profile:
        profile(args, layer, inputs)
    elif args.break_even:
        break_even(args, layer, inputs)
    else:
        report |= dict(results=all_lengths(args, layer, inputs))
        figure = write(report, args, "bench")
        plot(report["results"], figure,
             f"SEA attention, estimator included ({report['device']})\n{report['sea']}")
    return report


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if not (args.break_even or args.profile):
        evaluate.make_folder(args.out)
    if args.distill:
        return main_distill(args, argv)
    if args.prefill:
        return main_prefill(args, argv)
    if args.decode:
        return main_decode(args, argv)
    return main_attention(args, argv)


if __name__ == "__main__":
    main()
