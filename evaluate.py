"""Measure a teacher and the students that distill.py saved.

    python evaluate.py                                    what `python distill.py` left in out/
    python evaluate.py --model DIR --data FILE --students out/sea out/performer
    python evaluate.py --model DIR --data FILE            the teacher alone
    python evaluate.py ... --topk 8 16 32 64              SEA students with other numbers of keys, too
    python evaluate.py ... --prompt "Once upon" "def"     and how each model goes on
    torchrun --nproc-per-node 2 evaluate.py ... [--shard]     several processes share the windows

Of each model: validation perplexity, also by position in the window; keys per query; time of the
attention alone; time and memory of a pass through the model; continuations of the prompts. Of a SEA
student, by layer: how near its estimate comes to the teacher's attention, and how much of that its
cells keep. Prints tables; writes all of it to OUT/evaluate.json, pictures of heads to
OUT/<student>.png, and with --topk the curves OUT/topk.png and the numbers in them, OUT/topk.json.
"""

import argparse
import copy
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench
import convert
import distill
import sea


def layer_and_head(text: str) -> tuple[int, int]:
    layer, head = text.split(".")
    return int(layer), int(head)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    distill.add_common_options(p)
    add = p.add_argument
    add("--students", nargs="+", metavar="DIR", help="saved students of --model (none: without --model "
        "those in --out, else none)")
    add("--split", choices=("validation", "test"), default="validation", help="of WikiText-2: the "
        "paper's, or the usual one (default: %(default)s)")
    add("--topk", type=int, nargs="+", default=[], metavar="K", help="numbers of keys to measure SEA "
        "students with, besides their own")
    add("--backend", choices=sea.BACKENDS, help="of the students' attention, see sea.SEAConfig (none: "
        "as saved)")
    add("--look", type=layer_and_head, nargs="+", default=[], metavar="LAYER.HEAD", help="heads to "
        "draw, counted from 0 (none: a median one)")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue, greedily")
    add("--new-tokens", type=int, default=64, help="tokens to continue each --prompt by "
        "(default: %(default)s)")
    args = p.parse_args(argv)
    distill.check_common_options(p, args)
    if any(k < 1 for k in args.topk):
        p.error(f"--topk: expected integers >= 1, got {args.topk}")
    if not args.model and not (Path(args.out) / "teacher").exists():
        p.error(f"--model: expected a teacher, or one that distill.py trained in --out, got {args.out}")
    if args.students is None:
        saved = [Path(args.out) / method for method in distill.METHODS]
        args.students = [] if args.model else [str(path) for path in saved if path.exists()]
    return args


Records = list[convert.Record]  # one a layer


@dataclass
class Setting:
    """What all models are measured with."""

    args: argparse.Namespace
    original: nn.Module  # the teacher as it was loaded
    teacher: nn.Module  # on the device
    tokenizer: object
    valid: Tensor  # (n, T) windows


def load_documents(args) -> list[str]:
    """Those to measure on."""
    if args.valid_data:
        return distill.read_documents("--valid-data", args.valid_data)
    return distill.load_texts(args, args.split)[1]


def check_against_model(args, teacher, tokenizer) -> None:
    """--look and --prompt have to fit the model."""
    config = teacher.config.get_text_config()
    n_layer, n_head = config.num_hidden_layers, config.num_attention_heads
    for layer, head in args.look:
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            sys.exit(f"--look: expected layers below {n_layer} and heads below {n_head}, got "
                     f"{layer}.{head}")
    longest = config.max_position_embeddings
    if args.prompt and args.new_tokens >= longest:
        sys.exit(f"--new-tokens: expected fewer than the model's {longest} positions, got "
                 f"{args.new_tokens}")
    most = longest - args.new_tokens
    for prompt in args.prompt:
        n = len(tokenizer(prompt).input_ids)
        if not 0 < n <= most:
            sys.exit(f"--prompt: expected 1 to {most} tokens, since the model has {longest} positions and "
                     f"--new-tokens is {args.new_tokens}, got {n} in {prompt[:40]!r}")


# -- of one model ----------------------------------------------------------------------------------


def measure(model, setting: Setting) -> dict:
    args, valid = setting.args, setting.valid
    losses = distill.token_losses(model, valid, args)
    return dict(ppl=losses.mean().exp().item(), keys=distill.keys_per_query(model, valid, args),
                by_position=by_position(losses))


def measure_use(model, setting: Setting) -> dict:
    """How fast a model is, and what it says."""
    args = setting.args
    said = [continuation(model, setting.tokenizer, prompt, args) for prompt in args.prompt]
    return times(model, setting) | dict(continuations=said)


def times(model, setting: Setting) -> dict:
    args, x = setting.args, setting.valid[:1]
    if args.shard:  # processes that wait for each other would have to agree on the number of passes
        return {}
    return attention_time(model, x, args) | pass_cost(model, x, args)


def by_position(losses: Tensor, first: int = 256) -> list[dict[str, float]]:
    """Perplexity of tokens 1 ... `first` of a window, of the next `first`, and of blocks that double
    from there. losses (T - 1,): each token's mean, but the first's, which is given."""
    blocks, start, end, T = [], 0, first, len(losses) + 1
    while start < T:
        block = losses[max(0, start - 1) : end - 1]
        blocks.append(dict(first=start + 1, last=min(end, T), ppl=block.mean().exp().item()))
        start, end = end, 2 * end
    return blocks


@torch.no_grad()
def pass_cost(model, x: Tensor, args) -> dict[str, float | None]:
    """Of one pass of x (1, T) through the whole model, as launched from Python, with logits of the last
    token only: ms, and on a GPU the peak memory above what is held between passes, MiB."""
    model.eval()
    x = x.to(args.device)

    def run():
        # autocast's cache would keep copies of weights in half precision, of trainable ones only
        with distill.autocast(args, cache_enabled=False):
            model(x, use_cache=False, logits_to_keep=1)

    return dict(pass_ms=bench.milliseconds(run, graph=False, device=args.device),
                pass_mib=bench.peak_mib(run) if args.device.startswith("cuda") else None)


@torch.no_grad()
def attention_time(model, x: Tensor, args) -> dict[str, float | str]:
    """ms that the attention alone of all layers takes on their q, k, v of one sequence x (1, T): a
    student's modules, their weights in the dtype of q, or PyTorch's SDPA. clock: how it was timed; on a
    GPU all of it is one replayed CUDA graph, where a graph can hold it."""
    model.eval()
    with distill.autocast(args), convert.record(model) as records:
        model(x.to(args.device), use_cache=False)
    inputs = [(r.q, r.k, r.v, r.scale) for r in records]
    del records  # a student's hold its scores
    runs, graph = [], True
    for module, (q, k, v, scale) in zip(convert.attention_modules(model), inputs, strict=True):
        if hasattr(module, "sea"):
            layer = copy.deepcopy(module.sea).to(q.dtype)
            runs.append(functools.partial(layer, q, k, v, softmax_scale=scale))
            # plain PyTorch's sparse attention checkpoints, which no graph can hold
            on_kernels = sea.operations(layer.config, q) is not sea.torch_operations
            graph = graph and (on_kernels or not isinstance(layer, sea.SEAttention))
        else:
            grouped = dict(enable_gqa=True) if q.shape[1] != k.shape[1] else {}
            runs.append(functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True,
                                          scale=scale, **grouped))

    def run():
        return [attention() for attention in runs]

    clock = "wall clock"
    if args.device.startswith("cuda"):
        clock = "replayed CUDA graph" if graph else "launched from Python"
    return dict(attention_ms=bench.milliseconds(run, graph=graph, device=args.device), clock=clock)


@torch.no_grad()
def continuation(model, tokenizer, prompt: str, args) -> str:
    """The prompt's greedy continuation, with transformers' cache; plain text, whatever chat template
    there is."""
    model.eval()
    x = tokenizer(prompt, return_tensors="pt").to(args.device)
    with distill.autocast(args):
        # of one sequence no padding is needed, but not to name a token for it is warned of
        ids = model.generate(x.input_ids, attention_mask=x.attention_mask, do_sample=False,
                             pad_token_id=0, max_new_tokens=args.new_tokens, synced_gpus=args.shard)
    return tokenizer.decode(ids[0, x.input_ids.shape[1] :], skip_special_tokens=True)


# -- of a student ----------------------------------------------------------------------------------


def measure_student(name: str, folder: str, setting: Setting) -> dict[str, dict]:
    """Rows of the table: the student's, and one for each of --topk."""
    args, teacher = setting.args, setting.teacher
    options = {} if args.backend is None else dict(backend=args.backend)
    method, student = distill.load_student("--students", folder, setting.original, teacher, **options)
    distill.place(student, args)
    row = measure(student, setting)
    if method != "oracle":  # whose cells come from a whole pass of the teacher
        row |= measure_use(student, setting)
    if method in ("sea", "oracle"):
        row |= dict(layers=layer_report(student, teacher, setting.valid[:8], args))
    if method != "sea":
        return {name: row}
    draw(student, teacher, setting.valid[0], picture(name, args), args)
    return {name: row} | at_each_topk(name, student, setting)


def at_each_topk(name: str, student, setting: Setting) -> dict[str, dict]:
    rows = {}
    for k in setting.args.topk:
        convert.set_option(student, topk=k)
        found = measure(student, setting) | times(student, setting)
        rows[f"{name}, topk {k}"] = dict(student=name, topk=k) | found
    return rows


@torch.no_grad()
def layer_report(student, teacher, data: Tensor, args) -> list[dict[str, float]]:
    """estimate_report of each layer, averaged over windows `data`."""
    total = 0.0  # (layers, 4)
    for x in data.split(args.micro_batch):
        records = zip(*both_records(student, teacher, x, args))
        reports = torch.stack([estimate_report(s, t) for s, t in records])
        total = total + reports * len(x) / len(data)
    return [dict(zip(("kl", "least", "kept", "best"), layer)) for layer in total.tolist()]


def both_records(student, teacher, x: Tensor, args) -> tuple[Records, Records]:
    """What each attention layer of both models sees and gives on token ids x (B, T)."""
    with distill.autocast(args):
        with convert.record(teacher) as of_teacher:
            teacher(x.to(args.device), use_cache=False)
        with convert.record(student) as of_student:
            student(x.to(args.device), use_cache=False)
    return of_student, of_teacher


def estimate_report(student: convert.Record, teacher: convert.Record) -> Tensor:
    """Of one layer, (4,): KL(teacher's attention || estimate) in nats a query, and the least that cells
    of this width allow; the share of the teacher's attention that is kept, under the cells selected,
    and under the best cells, as many."""
    config, result, seen = student.config, student.sea, student.sea.seen
    ops = sea.operations(config, teacher.q)
    pooled = ops.pool_attention(teacher.q, teacher.k, seen, config.width, teacher.scale)
    best = distill.best_scores(pooled, seen)
    best_cells = sea.topk_mask(best.softmax(-1), seen, config.topk, config.group)

    def kl(scores, row=None):  # what L_estimate gains by its weight
        with_kl, without = (sea.estimate_loss(scores, pooled, seen, row=row, kl_weight=weight)
                            for weight in (1.0, 0.0))
        return with_kl - without

    def share(mask):
        return (pooled.cells * mask).sum(-1).mean()

    kept = share(result.mask)
    return torch.stack([kl(result.scores, result.row), kl(best), kept, share(best_cells)])


# -- figures ---------------------------------------------------------------------------------------


def picture(name: str, args) -> Path:
    return Path(args.out) / (name.replace("/", "-") + ".png")


@torch.no_grad()
def draw(student, teacher, x: Tensor, path: Path, args) -> None:
    """Panels of each head of --look for one sequence x (T,). Without --look one head: the median by the
    share of the teacher's attention that the keys attended hold."""
    students, teachers = both_records(student, teacher, x[None], args)
    if distill.rank_and_size()[0]:
        return
    heads = args.look or [median_head(students, teachers)]
    plt = bench.pyplot()
    figure, axes = plt.subplots(len(heads), 4, figsize=(17, 4.4 * len(heads)), layout="constrained",
                                squeeze=False)
    for row, (layer, head) in zip(axes, heads):
        draw_head(figure, row, panels(students[layer], teachers[layer], layer, head))
    figure.savefig(path, dpi=170)  # two pixels a column: with less than one, whole columns are left out
    plt.close(figure)


def attention_of(record: convert.Record) -> Tensor:
    """Dense attention of the first sequence, (H, T, T)."""
    seen = torch.arange(1, record.q.shape[2] + 1, device=record.q.device).expand(len(record.q), -1)
    return sea.dense_scores(record.q, record.k, seen, record.scale)[0][0].exp().tril()


def kept_keys(record: convert.Record) -> Tensor:
    """Which keys a student's first sequence attends to, (H, T, T)."""
    return sea.expand_mask(record.sea.mask, record.sea.seen, record.k.shape[2])[0]


def share_kept(student: convert.Record, teacher: convert.Record) -> Tensor:
    """Of the teacher's attention, by each head's keys, (H,)."""
    return (attention_of(teacher) * kept_keys(student)).sum((1, 2)) / teacher.q.shape[2]


def median_head(students: Records, teachers: Records) -> tuple[int, int]:
    shares = torch.cat([share_kept(s, t) for s, t in zip(students, teachers)])  # one layer at a time
    middle = shares.argsort()[len(shares) // 2].item()
    return divmod(middle, students[0].q.shape[1])


def panels(student: convert.Record, teacher: convert.Record, layer: int,
           head: int) -> dict[str, Tensor]:
    """Title -> image (T, T) of one head, -inf where there is nothing: log10 of the teacher's attention,
    SEA's estimate and sparse attention, and the keys attended."""
    result, (q, k), T = student.sea, (student.q, student.k), student.q.shape[2]
    kept = kept_keys(student)[head]
    scores = result.scores[:1, head : head + 1, result.row[0]].float()  # (1, 1, T, width)
    estimate = sea.spread_to_keys(scores, result.seen, T, -torch.inf).softmax(-1)[0, 0]
    sparse = sea.attention_weights(q, k, result.mask, result.seen, student.scale)[0, head]
    unseen = torch.ones_like(kept).triu(1)

    def log10(attention, hidden):
        return attention.float().clamp(min=1e-4).log10().masked_fill(hidden, -torch.inf).cpu()

    share = share_kept(student, teacher)[head].item()
    title = (f"keys attended: {kept.sum(1).float().mean():.0f} of {(T + 1) / 2:.0f} a query,\n"
             f"holding {share:.0%} of the teacher's attention")
    return {f"teacher, layer {layer}, head {head}": log10(attention_of(teacher)[head], unseen),
            "SEA's estimate": log10(estimate, unseen),
            "SEA's sparse attention": log10(sparse, unseen | ~kept),
            title: kept.float().masked_fill(unseen, -torch.inf).cpu()}


def draw_head(figure, axes, images: dict[str, Tensor]) -> None:
    for axis, (title, image) in zip(axes, images.items()):
        last = axis is axes[-1]
        T = len(image)
        # What is larger than the picture: the largest of each square, so that no single key is lost.
        small = F.max_pool2d(image[None], -(-T // 256), ceil_mode=True)[0]
        small = small.masked_fill(small == -torch.inf, torch.nan).numpy()
        style = dict(cmap="gray_r", vmin=0, vmax=1) if last else dict(cmap="magma", vmin=-4, vmax=0)
        shown = axis.imshow(small, interpolation="nearest", extent=(0, T, T, 0), **style)
        # the first key, which many heads rest on, beside the frame, not under it
        axis.set(xlabel="key", ylabel="query", title=title, xlim=(-T / 50, T))
        axis.set_facecolor("1" if last else "0.8")
        if axis is axes[0]:
            figure.colorbar(shown, ax=axes[:3], label="log10 attention", shrink=0.85)


def draw_curves(rows: dict[str, dict], path: Path, seq_len: int, device: str) -> None:
    """Perplexity and time against topk, a line for each SEA student; other models as horizontals."""
    swept = [row for row in rows.values() if "topk" in row]
    timed = (f"from q, k, v on, estimator included, all layers,\na sequence of {seq_len:,}, "
             f"{rows['teacher']['clock']}, {device}")
    points = {name: {row["topk"]: row for row in swept if row["student"] == name}
              for name in dict.fromkeys(row["student"] for row in swept)}
    lines = {name: row for name, row in rows.items()
             if name not in points and "topk" not in row and "attention_ms" in row}
    plt = bench.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_curve(left, points, lines, "ppl", "validation perplexity")
    draw_curve(right, points, lines, "attention_ms", "ms a sequence, attention alone")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend()
    right.set_ylim(bottom=0)
    right.set_title(timed, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    keep = lambda row: {field: row[field] for field in ("ppl", "attention_ms", "clock")}
    path.with_suffix(".json").write_text(json.dumps(dict(
        points={name: {k: keep(row) for k, row in line.items()} for name, line in points.items()},
        lines={name: keep(row) for name, row in lines.items()}, timed=timed), indent=1))


def draw_curve(axis, points: dict, lines: dict, field: str, label: str) -> None:
    for name, line in points.items():
        axis.plot(list(line), [row[field] for row in line.values()], marker="o", label=name)
    for style, (name, row) in zip(("--", ":", "-.") * len(lines), lines.items()):
        axis.axhline(row[field], linestyle=style, color="gray", label=name)
    ticks = sorted({k for line in points.values() for k in line})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.set(xlabel="topk, keys per query and head", ylabel=label)
    axis.grid(alpha=0.3)


# -- tables ----------------------------------------------------------------------------------------


def print_models(rows: dict[str, dict]) -> None:
    print(f"\n{'':18} {'val ppl':>9} {'ratio':>7} {'keys/query':>11} {'attention':>12} {'a pass':>12} "
          f"{'memory':>12}")
    for name, row in rows.items():
        ratio = row["ppl"] / rows["teacher"]["ppl"]
        costs = [("attention_ms", ".2f", "ms"), ("pass_ms", ".1f", "ms"), ("pass_mib", ",.0f", "MiB")]
        cells = ("" if row.get(field) is None else f"{row[field]:{form}} {unit}"
                 for field, form, unit in costs)
        line = f"{name:18} {row['ppl']:9.2f} {ratio:7.3f} {row['keys']:11.1f} "
        print((line + " ".join(f"{cell:>12}" for cell in cells)).rstrip())
    print(f"attention: of all layers, from q, k, v on, {rows['teacher'].get('clock', 'not timed')}\n"
          "a pass: one sequence through the whole model, launched from Python, logits of its last token\n"
          "memory: of a pass, above the weights")


def print_positions(rows: dict[str, dict]) -> None:
    blocks = rows["teacher"]["by_position"]
    titles = (f"{block['first']:,}-{block['last']:,}" for block in blocks)
    print(f"\n{'val ppl of tokens':18} " + " ".join(f"{title:>13}" for title in titles))
    for name, row in rows.items():
        print(f"{name:18} " + " ".join(f"{b['ppl']:13.2f}" for b in row["by_position"]))


def print_layers(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        if "layers" not in row:
            continue
        print(f"\n{name}, by layer: KL of the estimate in nats, the least for this width, the attention "
              "kept, the most for this topk")
        for i, layer in enumerate(row["layers"]):
            print(f"  {i:3} " + " ".join(f"{value:7.3f}" for value in layer.values()))


def print_continuations(rows: dict[str, dict], prompts: list[str]) -> None:
    """A line for each, whatever lines the text has."""
    for i, prompt in enumerate(prompts):
        print(f"\n{'prompt':18} {prompt!r}")
        for name, row in rows.items():
            if "continuations" in row:
                print(f"{name:18} {row['continuations'][i]!r}")


def name_students(folders: list[str]) -> dict[str, str]:
    """Name -> folder: the last part of its path where that tells them apart."""
    short = [Path(folder).name for folder in folders]
    clear = len(set(short)) == len(short) and "teacher" not in short
    return dict(zip(short if clear else folders, folders))


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Returns what is known of each model, by the names in the table."""
    args = parse(argv)
    header = distill.start("evaluate.py", argv, args)
    original, tokenizer = distill.load_teacher(args.model or Path(args.out) / "teacher", args.seq_len)
    check_against_model(args, original, tokenizer)
    tokens = distill.tokenize(load_documents(args), tokenizer)
    valid = distill.windows(tokens, args.seq_len, args.eval_windows)
    teacher = distill.place(copy.deepcopy(original) if args.shard else original, args)

    setting = Setting(args, original, teacher, tokenizer, valid)
    print(f"{len(valid)} windows of {args.seq_len}, no overlap", flush=True)
    rows = {"teacher": measure(teacher, setting) | measure_use(teacher, setting)}
    for name, folder in name_students(args.students).items():
        rows |= measure_student(name, folder, setting)
        print(f"{name}: val ppl {rows[name]['ppl']:.2f}", flush=True)

    print_models(rows)
    print_positions(rows)
    print_layers(rows)
    print_continuations(rows, args.prompt)
    if distill.rank_and_size()[0] == 0:
        if args.topk and not args.shard:
            draw_curves(rows, Path(args.out) / "topk", args.seq_len, header["device"])
        report = json.dumps(dict(**header, args=vars(args), models=rows), indent=1)
        (Path(args.out) / "evaluate.json").write_text(report)
    print(f"\nwritten to {args.out}/")
    distill.stop_processes()
    return rows


if __name__ == "__main__":
    main()
