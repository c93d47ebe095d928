"""Latency and memory of SEA attention, estimator included, against PyTorch's FlashAttention and cuDNN attention.

    python bench.py                         T = 1k ... 256k, forward and forward + backward, strides 1 and 4
    python bench.py --model DIR --data FILE on the queries, keys and values of a real model instead of synthetic ones
    python bench.py --break-even            from which T SEA wins on this machine
    python bench.py --profile 32768         where the time goes at one T
    python bench.py --distill               time and memory of a distillation step, against one with T x T tensors
    torchrun --nproc-per-node 2 bench.py --distill [--shard]        the linear one alone, on several GPUs
    python bench.py --decode                a decoding step against SDPA on the same keys, contexts of 8k ... 512k, batch 1 and 16
    python bench.py --prefill               time and memory of a model's prefill, in chunks and in one call, against SDPA

One run compares everything on the same inputs. Writes OUT/bench.json and OUT/bench.png, --decode, --prefill and --distill
OUT/bench_decode.json and so on; --break-even and --profile only print. Without a GPU it measures the plain PyTorch path at small
T and says so.

Inputs. With --model: text windows through the model; q, k, v of neighbouring layers, their heads side by side, windows one
after the other until T is reached, so that a longer sequence has the local statistics of a real one and repeats nothing but
the positions within a window. Without: random walks, since real neighbours are alike. The estimator is then trained on those
inputs for a moment (estimate_loss at 2,048 tokens), because the cells that an untrained one picks are as good as random,
which is the worst case for the kernels. That case is measured too, as "random masks". A position table trained at 2,048 is
stretched to T.

--decode takes a trained estimator and random walks as well. Its state comes from a prefill of the first 8,192 tokens of each
context, and is then told the whole context's number of tokens: how many keys are selected depends on that, and they lie all
over the context. A step is one CUDA graph: attention with its estimator, and the state written back for the next step; adding
the new key and value to the cache, which dense attention needs as well, is left out of both. --prefill takes an OPT with
random weights, whose cells are as good as random.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sea

TRAINED = 2048
ROOM = 64  # steps that --decode's static buffer of keys has room for
PROMPT = 8192  # tokens that --decode's state has seen
REFERENCE = 16384  # the plain PyTorch path computes all scores: beyond this T it is not worth the wait
PYTORCH = "plain PyTorch path of SEA"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", help="local folder or hub id of a causal language model to take q, k, v from (none: random walks); the teacher of "
        "--distill, whose tokens are random")
    add("--data", help="text file in UTF-8, needed with --model, but not for --distill")
    add("--lengths", type=int, nargs="+", help="tokens (none: 1024 ... 262144, --distill 2048, 8192, 32768, --decode 8192 ... "
        "524288, --prefill 8192, 32768, 131072; 256 and 512 without a GPU)")
    add("--batches", type=int, nargs="+", default=[1, 16] if cuda else [1, 2], help="sequences decoded at a time")
    add("--strides", type=int, nargs="+", default=[1, 4], help="query strides")
    add("--heads", type=int, default=12, help="query heads")
    add("--d-head", type=int, default=64, help="numbers a head")
    add("--width", type=int, default=256, help="cells of an estimated row")
    add("--topk", type=int, default=64, help="keys per query and head, on average")
    add("--cell-keys", action=argparse.BooleanOptionalAction, default=True, help="see SEAConfig")
    add("--train-steps", type=int, default=200 if cuda else 5, help="steps that train the estimator")
    add("--forward-only", action="store_true", help="leave out the backward passes")
    add("--break-even", action="store_true", help="only look for the T from which SEA is faster, by bisection")
    add("--distill", action="store_true", help="only measure steps of distill.py on an OPT of --layers layers with random weights, "
        "at the first of --strides")
    add("--batch", type=int, default=1, help="sequences a step and process of --distill")
    for name in ("--shard", "--gradient-checkpointing"):
        add(name, action="store_true", help="of --distill: as in distill.py")
    add("--decode", action="store_true", help="only measure decoding steps")
    add("--prefill", action="store_true", help="only measure the prefill of an OPT of --layers layers with random weights")
    add("--layers", type=int, default=12 if cuda else 1, help="of the model of --distill and --prefill")
    add("--profile", type=int, help="only list the kernels of one forward and backward at this T")
    add("--out", default="out", help="folder for the files it writes")
    args = p.parse_args(argv)
    if args.model and not args.data and not args.distill:
        p.error("--data: expected a text file with --model, got none")
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--shard: expected several processes to spread over, under torchrun, got one")
    if args.lengths is None:
        longest = 32768 if args.distill else 524288 if args.decode else 131072 if args.prefill else None
        lengths = [longest // 4**i for i in (3, 2, 1, 0)][0 if args.decode else 1 :] if longest else [2**i * 1024 for i in range(9)]
        args.lengths = lengths if cuda else [256, 512]
    return args


# -- inputs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def model_inputs(args, T: int, device) -> list[torch.Tensor]:
    """q, k, v (1, H, T, D) of a model's layers on text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import convert

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device).eval()
    model.set_attn_implementation("sea_teacher")
    ids = tokenizer(Path(args.data).read_text(encoding="utf-8")[: 8 * T], verbose=False).input_ids
    window = min(TRAINED, T)
    ids = torch.tensor((ids * (T // len(ids) + 2))[: -(-T // window) * window], device=device).view(-1, window)
    parts = []
    for x in ids:
        with convert.record(model) as records:
            model(x[None], use_cache=False)
        middle, layers = len(records) // 2, -(-args.heads // records[0].q.shape[1])
        use = [records[(middle + i) % len(records)] for i in range(layers)]
        repeat = lambda r, x: sea.repeat_heads(x, r.q.shape[1])
        heads = [(r.q * r.scale * r.q.shape[-1] ** 0.5, repeat(r, r.k), repeat(r, r.v)) for r in use]  # q as D**-0.5 wants it
        parts.append([torch.cat(x, 1) for x in zip(*heads)])
    return [torch.cat(x, 2)[:, : args.heads, :T].contiguous() for x in zip(*parts)]


def walk_inputs(args, T: int, device, seed: int = 0) -> list[torch.Tensor]:
    """Random walks pulled to 0, correlated over about 100 tokens, (1, H, T, D) each; q and k share half of theirs."""
    generator = torch.Generator(device).manual_seed(seed)
    kernel = torch.exp(-torch.arange(512, device=device) / 100.0)
    kernel = kernel / kernel.square().sum().sqrt()

    def walk():
        noise = torch.randn(args.heads * args.d_head, 1, T + 511, generator=generator, device=device)
        return F.conv1d(noise, kernel[None, None]).view(1, args.heads, args.d_head, T).mT

    shared, q, k, v = (walk() for _ in range(4))
    return [x.contiguous() for x in (shared + q, shared + k, v)]


def trained_layer(args, q, k, v, device) -> sea.SEAttention:
    """A layer whose estimator has seen these inputs, its position table stretched to the longest T."""
    torch.manual_seed(0)
    config = dict(n_head=args.heads, d_head=args.d_head, width=args.width, topk=args.topk, cell_keys=args.cell_keys)
    layer = sea.SEAttention(sea.SEAConfig(**config, max_positions=TRAINED, backend="torch")).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), 2e-3)
    n = min(TRAINED, q.shape[2], 2048 if q.is_cuda else 256)
    seen = torch.arange(1, n + 1, device=device)[None]
    for step in range(args.train_steps):
        at = (step * n) % (q.shape[2] - n + 1)
        x = [t[:, :, at : at + n].float() for t in (q, k, v)]
        result = layer(*x)
        loss = sea.estimate_loss(result.scores, sea.pool_attention(x[0], x[1], seen, args.width), seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if args.train_steps:
        print(f"estimator trained for {args.train_steps} steps of {n} tokens, loss {loss.item():.4f}", flush=True)
    return layer


def stretched(layer: sea.SEAttention, T: int, stride: int, dtype, backend: str = "auto") -> sea.SEAttention:
    config = replace(layer.config, max_positions=max(T, TRAINED), query_stride=stride, backend=backend)
    long = sea.SEAttention(config).to(layer.position.device)
    table = F.interpolate(layer.position.detach().T[None], size=config.max_positions, mode="linear", align_corners=True)[0].T
    long.load_state_dict({**layer.state_dict(), "position": table})
    return long.to(dtype)


# -- measuring ---------------------------------------------------------------------------------------------------------


def milliseconds(run, repeats: int = 20, graph: bool = True, device: str = "cuda") -> float:
    """Median time of one run; on a GPU, of a replayed CUDA graph, so that what is timed is the device, not Python; without
    `graph` as it is, for a run that checkpoints and so cannot be captured."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        return sorted(times)[1]
    stream, captured, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3 if graph else 1):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    if graph:
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    run()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if sum(times) > 2000:
            break
    return sorted(times)[len(times) // 2]


def milliseconds_in_a_row(run) -> float:
    """Mean time of runs one after the other, Python included. Their number is fixed: processes run together."""
    wait, n = (torch.cuda.synchronize, 10) if torch.cuda.is_available() else (lambda: None, 1)
    for _ in range(3):
        run()
    wait()
    start = time.perf_counter()
    for _ in range(n):
        run()
    wait()
    return 1000 * (time.perf_counter() - start) / n


def peak_mib(run) -> float | None:
    """Peak memory above what was held before, MiB."""
    if not torch.cuda.is_available():
        return None
    run()  # what libraries allocate once is not this run's
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def forward(attention, q, k, v):
    def run():
        with torch.no_grad():
            attention(q, k, v)
    return run


def forward_backward(attention, q, k, v):
    """As training needs it: from all outputs, SEA's scores among them, to q, k, v and all weights."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    douts = [torch.randn_like(x) for x in outputs(attention(*inputs))]
    weights = list(attention.parameters()) if isinstance(attention, torch.nn.Module) else []

    def run():
        torch.autograd.grad(outputs(attention(*inputs)), inputs + weights, douts)
    return run


def outputs(result) -> list[torch.Tensor]:
    return [result.out, result.scores] if isinstance(result, sea.SEAOutput) else [result]


def contestants(args, layer, T: int, dtype, device) -> dict:
    """Name -> attention(q, k, v) -> out."""
    def sdpa(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return run

    found = {}
    if device == "cuda":
        found |= {"FlashAttention": sdpa(SDPBackend.FLASH_ATTENTION), "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    else:
        found["SDPA"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for stride in args.strides:
        found[f"SEA stride {stride}"] = stretched(layer, T, stride, dtype)
    if device == "cuda" and T <= REFERENCE:
        found[PYTORCH] = stretched(layer, T, args.strides[0], dtype, "torch")
    if device == "cuda":
        import kernels

        seen = torch.arange(1, T + 1, device=device)[None]
        n = (2 * args.heads * args.topk * args.width + seen) // (2 * seen) / (args.heads * args.width)
        bits = [kernels.pack_mask(torch.rand(1, args.heads, t.shape[1], args.width, device=device) < t[:, None, :, None])
                for t in n.split(8192, dim=1)]
        cells = kernels.CellBits(torch.cat([b.bits for b in bits], 2), args.width)
        found["random masks, sparse attention alone"] = lambda q, k, v: kernels.sparse_attention(q, k, v, cells, seen)
    return found


def measure(args, layer, inputs, T: int, dtype, device) -> dict:
    q, k, v = (x[:, :, :T].to(dtype) for x in inputs)
    results = {}
    for name, attention in contestants(args, layer, T, dtype, device).items():
        runs = {"forward": forward(attention, q, k, v)}
        if not args.forward_only:
            runs["forward+backward"] = forward_backward(attention, q, k, v)
        for kind, run in runs.items():
            try:
                results[f"{name} | {kind}"] = dict(ms=milliseconds(run, graph=name != PYTORCH), mib=peak_mib(run))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                results[f"{name} | {kind}"] = dict(error=str(error).splitlines()[0])
            torch.cuda.empty_cache()
    return results


# -- reports -----------------------------------------------------------------------------------------------------------


def table(rows: dict[int, dict], kind: str) -> str:
    names = sorted({name for row in rows.values() for name in row if name.endswith(f"| {kind}")})
    lines = [f"\n{kind}: ms (MiB above the inputs)", f"{'T':>8} " + " ".join(f"{n.split(' |')[0][:24]:>24}" for n in names)]
    for T, row in rows.items():
        cells = [row.get(n, {}) for n in names]
        show = lambda c: f"{c['ms']:.3f} ({c['mib'] or 0:8,.0f})" if "ms" in c else "-"
        lines.append(f"{T:8,} " + " ".join(f"{show(c):>24}" for c in cells))
        dense = [c["ms"] for n, c in zip(names, cells) if "ms" in c and not n.startswith(("SEA", "random", "plain"))]
        for n, c in zip(names, cells):
            if n.startswith("SEA") and "ms" in c and dense:
                lines.append(f"{'':8}   {n.split(' |')[0]}: {min(dense) / c['ms']:.2f}x the speed of the fastest dense")
    return "\n".join(lines)


def plot(rows: dict[int, dict], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in ("forward", "forward+backward") if any(n.endswith(f"| {k}") for row in rows.values() for n in row)]
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=(5 * len(kinds) + 5, 4.5), layout="constrained")
    for axis, (kind, field) in zip(axes, [(k, "ms") for k in kinds] + [("forward", "mib")]):
        for name in sorted({n for row in rows.values() for n in row if n.endswith(f"| {kind}")}):
            points = [(T, row[name][field]) for T, row in rows.items() if row.get(name, {}).get(field)]
            if points:
                style = ":" if name.startswith(("random", "plain")) else "-"
                axis.loglog(*zip(*points), marker="o", label=name.split(" |")[0], linestyle=style)
        label = kind if field == "ms" else f"{kind}, peak memory"
        axis.set(xlabel="tokens", ylabel="ms" if field == "ms" else "MiB above the inputs", title=label)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def break_even(args, layer, inputs, dtype, device) -> None:
    """Bisection for each stride, forward, to 3 % of T."""
    def wins(stride, T):
        q, k, v = (x[:, :, :T].to(dtype) for x in inputs)
        found = contestants(argparse.Namespace(**{**vars(args), "strides": [stride]}), layer, T, dtype, device)
        times = {name: milliseconds(forward(f, q, k, v)) for name, f in found.items() if not name.startswith(("random", "plain"))}
        return times.pop(f"SEA stride {stride}") < min(times.values())

    for stride in args.strides:
        low, high = 1, max(args.lengths)
        if not wins(stride, high):
            print(f"stride {stride}: SEA does not win up to T = {high:,}")
            continue
        while high - low > max(1, high // 32):
            middle = (low + high) // 2
            low, high = (low, middle) if wins(stride, middle) else (middle, high)
        print(f"stride {stride}: SEA's forward is faster from about T = {high:,}")


def opt(args, T: int, device) -> torch.nn.Module:
    """An OPT of args.layers layers with random weights, for T tokens: OPT-125m by default."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    hidden = args.heads * args.d_head
    with torch.device(device):
        return OPTForCausalLM(OPTConfig(hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, dropout=0.0,
                                        num_hidden_layers=args.layers, num_attention_heads=args.heads, max_position_embeddings=T))


def teacher_model(args, T: int) -> torch.nn.Module:
    """--model, or an OPT with random weights, as distill.py's teacher, not yet placed: what is to be sharded is made on the CPU."""
    if args.model:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if T > model.config.max_position_embeddings:
            sys.exit(f"--lengths: expected at most the model's {model.config.max_position_embeddings} positions, got {T}")
    else:
        model = opt(args, T, "cpu" if args.shard else args.device)
    model.set_attn_implementation("sea_teacher")
    return model.eval().requires_grad_(False)


def distillation(args, size: int) -> dict[int, dict]:
    """A step of distill.py, on the linear path and, if this is the only process of `size`, on the plain PyTorch path that keeps
    T x T tensors."""
    import convert
    import distill

    rows = {}
    for T in args.lengths:
        rows[T] = {}
        for name, backend, block in (("linear", "auto", None), ("T x T", "torch", T))[: 2 if size == 1 else 1]:
            teacher = teacher_model(args, T)
            student = convert.attach(copy.deepcopy(teacher).requires_grad_(True), width=args.width, topk=args.topk,
                                     query_stride=args.strides[0], cell_keys=args.cell_keys, backend=backend).train()
            if args.gradient_checkpointing:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            teacher, student = distill.place(teacher, args), distill.place(student, args)
            optimizer, run = distill.make_optimizer(student, 1e-5, 1e-4, 0.01), distill.data_parallel(student, args)
            x = torch.randint(5, student.config.vocab_size, (args.batch, T), device=args.device)

            def step():
                with distill.autocast(args):
                    terms = distill.distillation_losses(student, teacher, x, distill.Weights(), run)
                sum(terms.values()).backward()
                distill.clip_gradients(student, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            whole = {f: functools.partial(getattr(sea, f), block=block) for f in ("sparse_attention", "pool_attention", "score_loss")}
            with mock.patch.multiple(sea, **whole) if block else contextlib.nullcontext():
                try:
                    with distill.settled():
                        ms, mib = milliseconds_in_a_row(step), peak_mib(step)
                    r = rows[T][name] = dict(ms=ms, tokens_per_second=1000 * size * x.numel() / ms, gpus=size, mib=mib,
                                             gib=distill.peak_memory(args))
                    print(f"T {T:,} {name}: {ms:.0f} ms a step, {r['tokens_per_second']:,.0f} tok/s on {size}, peak {r['gib']:.2f} GiB "
                          f"each, {mib or 0:,.0f} MiB of it above the models and the optimizer", flush=True)
                except torch.OutOfMemoryError as error:
                    if size > 1:
                        raise  # the others wait for this process
                    rows[T][name] = dict(error=str(error).splitlines()[0])
                    print(f"T {T:,} {name}: out of memory", flush=True)
            del teacher, student, optimizer, run
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return rows


# -- decoding and prefill ----------------------------------------------------------------------------------------------


def decode_inputs(args, S: int, B: int, dtype, device) -> tuple[torch.Tensor, ...]:
    """q (B, H, PROMPT + 1, D), of the first tokens and of the last of S; k and v (B, H, S + ROOM, D). Two random walks, in turn:
    what a step does is in no sequence quicker for another being like it."""
    k, v = (torch.zeros(B, args.heads, S + ROOM, args.d_head, dtype=dtype, device=device) for _ in range(2))
    q = k.new_zeros(B, args.heads, min(PROMPT, S - 1) + 1, args.d_head)
    for b in range(B):
        if b < 2:
            all_q, k[b, :, :S], v[b, :, :S] = (x[0] for x in walk_inputs(args, S, device, seed=1 + b))
            q[b, :, :-1], q[b, :, -1] = all_q[:, : q.shape[2] - 1], all_q[:, -1]
            del all_q
        else:
            q[b], k[b], v[b] = q[b % 2], k[b % 2], v[b % 2]
    return q, k, v


@torch.no_grad()
def decode(args, layer, S: int, B: int, dtype, device) -> dict[str, dict]:
    """One step with S keys, each of B sequences: name -> ms, and for SEA how many keys a head visits, on average and at most."""
    gib = args.heads * S * args.d_head * (2 * B * dtype.itemsize + 8 * 4) / 2**30  # keys and values, and the walks
    free = torch.cuda.mem_get_info()[0] / 2**30 if device == "cuda" else gib
    if gib > free:
        return {"all": dict(error=f"skipped, needs {gib:.0f} GiB of the {free:.0f} that are free")}
    q, k, v = decode_inputs(args, S, B, dtype, device)
    q, prompt, results = q[:, :, -1:], q[:, :, :-1], {}

    def dense(backend):
        with sdpa_kernel(backend) if device == "cuda" else contextlib.nullcontext():
            F.scaled_dot_product_attention(q, k[:, :, :S], v[:, :, :S])  # one query: causal without a mask

    backends = dict(SDPA=None)
    if device == "cuda":
        backends = dict(FlashAttention=SDPBackend.FLASH_ATTENTION, cuDNN=SDPBackend.CUDNN_ATTENTION)
    runs = {name: functools.partial(dense, backend) for name, backend in backends.items()}
    for stride in args.strides:
        module, n = stretched(layer, S + ROOM, stride, dtype), prompt.shape[2]
        state = module(prompt, k[:, :, :n], v[:, :, :n], kv_cached=True, rows_at_once=TRAINED).state
        state.count.fill_(S - 1)
        state.n_tokens = S - 1

        def step(module=module, state=state):
            result = module(q, k, v, state=state, kv_cached=True)
            state.copy_(result.state)
            return result

        runs[f"SEA stride {stride}"] = step
    for name, run in runs.items():
        try:
            results[name] = dict(ms=milliseconds(run))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            results[name] = dict(error=str(error).splitlines()[0])
        if name.startswith("SEA") and "ms" in results[name]:
            result = run()
            keys = (sea.keys_per_cell(result.seen, args.width)[:, None] * result.mask).sum(-1)
            results[name] |= dict(keys=keys.float().mean().item(), most=keys.max().item())
    return results


def decoding(args, layer, dtype, device) -> dict[int, dict]:
    rows = {}
    for S in args.lengths:
        rows[S] = {}
        for B in args.batches:
            found = decode(args, layer, S, B, dtype, device)
            dense = [r["ms"] for name, r in found.items() if "ms" in r and not name.startswith("SEA")]
            for name, r in found.items():
                rows[S][f"batch {B}, {name}"] = r
                more = ""
                if name.startswith("SEA") and "ms" in r:
                    more = f", {r['keys']:.0f} keys a head, {r['most']} at most"
                    more += f", {min(dense) / r['ms']:.2f}x the speed of the fastest dense" if dense else ""
                print(f"context {S:,} batch {B} {name}: " + (f"{r['ms']:.4f} ms{more}" if "ms" in r else r["error"]), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def prefill(args, dtype, device) -> dict[int, dict]:
    """A prompt of T tokens, its keys and values kept, logits of the last token only: time, and memory above the weights."""
    import convert

    rows = {}
    for T in args.lengths:
        rows[T], x = {}, torch.randint(5, 50000, (1, T), device=device)
        chunk = convert.ROWS_AT_ONCE if device == "cuda" else T // 2
        found = [("SDPA", None, None)]
        found += [(f"SEA stride {r}, {how}", r, n) for r in args.strides for how, n in (("chunks", chunk), ("one call", T))]
        for name, stride, rows_at_once in found:
            model = opt(args, T, device).to(dtype).eval()
            if stride is not None:
                convert.attach(model, width=args.width, topk=args.topk, query_stride=stride, cell_keys=args.cell_keys)

            @torch.no_grad()
            def run():
                model(x, use_cache=True, logits_to_keep=1)

            with mock.patch.object(convert, "ROWS_AT_ONCE", rows_at_once):
                try:
                    rows[T][name] = dict(ms=milliseconds(run, repeats=5, graph=False), mib=peak_mib(run))
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    rows[T][name] = dict(error=str(error).splitlines()[0])
            weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
            r, dense = rows[T][name], rows[T]["SDPA"]
            r["weights_mib"] = weights
            if "ms" in r:
                more = f", {r['ms'] / dense['ms']:.2f}x SDPA's time" if stride is not None and "ms" in dense else ""
                more += f" and {r['mib'] / dense['mib']:.2f}x its memory" if more and r["mib"] else ""
                above = f"{r['mib'] or 0:,.0f} MiB above the weights' {weights:,.0f}"
                print(f"T {T:,} {name}: {r['ms']:.1f} ms, {above}{more}", flush=True)
            else:
                print(f"T {T:,} {name}: {r['error']}", flush=True)
            del model
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def plot_lines(rows: dict[int, dict], fields: dict[str, str], path: Path, title: str, xlabel: str) -> None:
    """A log-log panel for each field, a line for each name; `fields` name their axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(fields), figsize=(4 + 4 * len(fields), 4.8), layout="constrained", squeeze=False)
    for axis, (field, label) in zip(axes[0], fields.items()):
        for name in dict.fromkeys(name for row in rows.values() for name in row):
            points = [(T, row[name][field]) for T, row in rows.items() if row.get(name, {}).get(field)]
            if points:
                axis.loglog(*zip(*points), marker="o", label=name, linestyle="-" if "SEA" in name else "--")
        axis.set(xlabel=xlabel, ylabel=label)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def command_line(script: str, argv: list[str] | None, size: int) -> str:
    """What started this process, one of `size`."""
    launcher = "python" if size == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size)}"
    return " ".join([launcher, script, *(sys.argv[1:] if argv is None else argv)])


def profile(args, layer, inputs, T: int, dtype, device) -> None:
    q, k, v = (x[:, :, :T].to(dtype) for x in inputs)
    for stride in args.strides:
        module = stretched(layer, T, stride, dtype)
        for name, run in (("forward", forward(module, q, k, v)), ("forward+backward", forward_backward(module, q, k, v))):
            run()
            activities = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as prof:
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
            us = lambda e: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total
            events = sorted(prof.key_averages(), key=us, reverse=True)
            count = sum(e.count for e in events)
            print(f"\nT {T:,} stride {stride} {name}: {sum(map(us, events)) / 1000:.2f} ms in {count} kernels")
            for e in events[:20]:
                print(f"  {us(e) / 1000:8.3f} ms {e.count:4} x {e.key[:90]}")


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rank, size = 0, 1
    if args.distill:
        import distill

        args.device = device
        rank, size = distill.start_processes(args)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name = name if size == 1 else f"{size} x {name}"
    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}"
    if device == "cuda":
        import triton

        versions += f", triton {triton.__version__}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = command_line("bench.py", argv, size)
    print(f"{command}\n{name}, {versions}, commit {commit or 'unknown'}\n{dtype}, B "
          f"{args.batches if args.decode else args.batch}, H {args.heads}, D {args.d_head}, width {args.width}, topk {args.topk}, causal")
    if device == "cpu":
        print("no GPU: this measures the plain PyTorch path")
    out = Path(args.out)
    report = dict(command=command, device=name, versions=versions, commit=commit, args=vars(args))
    if args.distill:
        out.mkdir(parents=True, exist_ok=True)
        report |= dict(results=distillation(args, size))
        if rank == 0:
            (out / "bench_distill.json").write_text(json.dumps(report, indent=1))
        distill.stop_processes()
        return report
    if args.prefill:
        out.mkdir(parents=True, exist_ok=True)
        report |= dict(results=prefill(args, dtype, device))
        (out / "bench_prefill.json").write_text(json.dumps(report, indent=1))
        plot_lines(report["results"], dict(ms="ms", mib="MiB above the weights"), out / "bench_prefill.png",
                   f"prefill of an OPT of {args.layers} layers ({name})", "tokens")
        return report
    if args.decode:
        out.mkdir(parents=True, exist_ok=True)
        layer = trained_layer(args, *walk_inputs(args, 16 * TRAINED if device == "cuda" else max(args.lengths), device), device)
        report |= dict(results=decoding(args, layer, dtype, device))
        (out / "bench_decode.json").write_text(json.dumps(report, indent=1))
        title = f"decoding, estimator included ({name})"
        plot_lines(report["results"], dict(ms="ms a step"), out / "bench_decode.png", title, "context")
        return report
    longest = args.profile or max(args.lengths)
    inputs = (model_inputs if args.model else walk_inputs)(args, longest, device)
    layer = trained_layer(args, *inputs, device)
    inputs = [x.to(dtype) for x in inputs]
    if args.profile:
        return profile(args, layer, inputs, args.profile, dtype, device)
    if args.break_even:
        return break_even(args, layer, inputs, dtype, device)
    rows = {}
    for T in args.lengths:
        rows[T] = measure(args, layer, inputs, T, dtype, device)
        print(f"T {T:,}: " + ", ".join(f"{n} {r['ms']:.3f} ms" for n, r in rows[T].items() if "ms" in r), flush=True)
    for kind in ("forward", "forward+backward")[: 1 if args.forward_only else 2]:
        print(table(rows, kind))
    out.mkdir(parents=True, exist_ok=True)
    report |= dict(results=rows)
    (out / "bench.json").write_text(json.dumps(report, indent=1))
    plot(rows, out / "bench.png", f"SEA attention, estimator included ({name})")
    return report


if __name__ == "__main__":
    main()
