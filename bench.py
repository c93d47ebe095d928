"""Latency and memory of SEA attention, estimator included, against PyTorch's FlashAttention and cuDNN attention.

    python bench.py                         T = 1k ... 256k, forward and forward + backward, strides 1 and 4
    python bench.py --model DIR             on the queries, keys and values of a real model instead of synthetic ones
    python bench.py --break-even            from which T SEA wins on this machine
    python bench.py --profile 32768         where the time goes at one T
    python bench.py --distill               time and memory of a distillation step, against one with T x T tensors

One run compares everything on the same inputs. Writes OUT/bench.json and OUT/bench.png. Without a GPU it measures the plain
PyTorch path at small T and says so.

Inputs. With --model: text windows through the model; q, k, v of neighbouring layers, their heads side by side, windows one
after the other until T is reached, so that a longer sequence has the local statistics of a real one and repeats nothing but
the positions within a window. Without: random walks, since real neighbours are alike. The estimator is then trained on those
inputs for a moment (estimate_loss at 2,048 tokens), because the cells that an untrained one picks are as good as random,
which is the worst case for the kernels. That case is measured too, as "random masks". A position table trained at 2,048 is
stretched to T.
"""

import argparse
import contextlib
import functools
import json
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
REFERENCE = 16384  # the plain PyTorch path computes all scores: beyond this T it is not worth the wait
PYTORCH = "plain PyTorch path of SEA"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--model", help="local folder or hub id of a causal language model to take q, k, v from (none: random walks)")
    add("--data", help="text file for --model, UTF-8")
    add("--lengths", type=int, nargs="+", help="tokens (none: 1024 ... 262144, --distill 2048, 8192, 32768, 256 and 512 without a GPU)")
    add("--strides", type=int, nargs="+", default=[1, 4], help="query strides")
    add("--heads", type=int, default=12)
    add("--d-head", type=int, default=64)
    add("--width", type=int, default=256, help="cells of an estimated row")
    add("--topk", type=int, default=64, help="keys per query and head, on average")
    add("--train-steps", type=int, default=200 if cuda else 5, help="steps that train the estimator")
    add("--forward-only", action="store_true")
    add("--break-even", action="store_true", help="only look for the T from which SEA is faster, by bisection")
    add("--distill", action="store_true", help="only measure steps of distill.py on an OPT of --layers layers with random weights, "
        "at the first of --strides")
    add("--layers", type=int, default=12 if cuda else 1, help="of --distill's model")
    add("--profile", type=int, help="only list the kernels of one forward and backward at this T")
    add("--out", default="out", help="folder for bench.json and bench.png")
    args = p.parse_args(argv)
    if args.model and not args.data:
        p.error("--data: expected a text file with --model, got none")
    if args.lengths is None:
        args.lengths = ([2048, 8192, 32768] if args.distill else [2**i * 1024 for i in range(9)]) if cuda else [256, 512]
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


def walk_inputs(args, T: int, device) -> list[torch.Tensor]:
    """Random walks pulled to 0, correlated over about 100 tokens, (1, H, T, D) each; q and k share half of theirs."""
    generator = torch.Generator(device).manual_seed(0)
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
    config = dict(n_head=args.heads, d_head=args.d_head, width=args.width, topk=args.topk)
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


def milliseconds(run, repeats: int = 20, graph: bool = True) -> float:
    """Median time of one run; on a GPU, of a replayed CUDA graph, so that what is timed is the device, not Python; without
    `graph` as it is, for a run that checkpoints and so cannot be captured."""
    if not torch.cuda.is_available():
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        return sorted(times)[1]
    stream, captured, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
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


def distillation(args, device) -> dict[int, dict]:
    """A step of distill.py, one sequence, on the linear path and on the plain PyTorch path that keeps T x T tensors."""
    from transformers import OPTConfig, OPTForCausalLM

    import convert
    import distill

    hidden, rows = args.heads * args.d_head, {}
    options = argparse.Namespace(device=device)
    for T in args.lengths:
        rows[T] = {}
        for name, backend, block in (("linear", "auto", None), ("T x T", "torch", T)):
            def model():
                torch.manual_seed(0)
                return OPTForCausalLM(OPTConfig(hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, dropout=0.0,
                                                num_hidden_layers=args.layers, num_attention_heads=args.heads,
                                                max_position_embeddings=T)).to(device)

            teacher = model().eval().requires_grad_(False)
            teacher.set_attn_implementation("sea_teacher")
            student = convert.attach(model(), width=args.width, topk=args.topk, query_stride=args.strides[0], backend=backend)
            optimizer = distill.make_optimizer(student, 1e-5, 1e-4, 0.01)
            x = torch.randint(5, 50000, (1, T), device=device)

            def step():
                with distill.autocast(options):
                    terms = distill.distillation_losses(student, teacher, x, distill.Weights())
                sum(terms.values()).backward()
                optimizer.step()
                optimizer.zero_grad()

            whole = {f: functools.partial(getattr(sea, f), block=block) for f in ("sparse_attention", "pool_attention", "score_loss")}
            with mock.patch.multiple(sea, **whole) if block else contextlib.nullcontext():
                try:
                    rows[T][name] = dict(ms=milliseconds(step, repeats=3, graph=False), mib=peak_mib(step))
                    print(f"T {T:,} {name}: {rows[T][name]['ms']:.0f} ms a step, {rows[T][name]['mib'] or 0:,.0f} MiB above the models "
                          "and the optimizer", flush=True)
                except torch.OutOfMemoryError as error:
                    rows[T][name] = dict(error=str(error).splitlines()[0])
                    print(f"T {T:,} {name}: out of memory", flush=True)
            del teacher, student, optimizer
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


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
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}"
    if device == "cuda":
        import triton

        versions += f", triton {triton.__version__}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", "bench.py", *(sys.argv[1:] if argv is None else argv)])
    print(f"{command}\n{name}, {versions}, commit {commit or 'unknown'}\n{dtype}, B 1, H {args.heads}, D {args.d_head}, width "
          f"{args.width}, topk {args.topk}, causal")
    if device == "cpu":
        print("no GPU: this measures the plain PyTorch path")
    out = Path(args.out)
    report = dict(command=command, device=name, versions=versions, commit=commit, args=vars(args))
    if args.distill:
        out.mkdir(parents=True, exist_ok=True)
        report |= dict(results=distillation(args, device))
        (out / "bench_distill.json").write_text(json.dumps(report, indent=1))
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
