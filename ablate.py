"""What each choice is worth: short distillations that differ from a base run in one thing.

    python ablate.py --model DIR --data FILE [--valid-data FILE] [--steps 250] [--jobs 4] [--only NAME ...]

Each variant is a run of distill.py with its own options, or with one part of the method replaced; `--jobs` of them run at a time,
in turn on the GPUs there are. A variant of your own: --variant="--lr 2e-5 --topk 32". Options that this file does not know go to
distill.py, for all variants alike. Prints a table, writes it to OUT/ablation.json, and each run to OUT/<variant>/.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import convert
import distill
import sea

BASE = ("--method sea --batch 4 --micro-batch 4 --lr 1e-4 --lr-new 5e-3 --schedule cosine --warmup 30 "
        "--eval-windows 48").split()


class Nearest(nn.Module):
    """One score for four neighbouring cells, as the authors upsample."""

    def forward(self, x):
        return x.repeat_interleave(4, dim=0)

    def right_inverse(self, x):
        return x[::4]


def nearest(module: nn.Module) -> None:
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(module.sea.cnn.up, name, Nearest())


def half_open_gates(module: nn.Module) -> None:
    module.sea.gate.bias.data.zero_()


def no_gates(module: nn.Module) -> None:
    module.sea.gate.bias.data.fill_(60.0)  # sigmoid(60) is 1: nothing but the sparse attention
    module.sea.gate.requires_grad_(False)


def no_positions(module: nn.Module) -> None:
    module.sea.position.data.zero_()
    module.sea.position.requires_grad_(False)


def sinusoidal_positions(module: nn.Module) -> None:
    n, d = module.sea.position.shape
    phase = torch.arange(n)[:, None] * 10000 ** -torch.linspace(0, 1, d // 2)
    module.sea.position.data[:, : 2 * (d // 2)] = torch.cat([phase.sin(), phase.cos()], dim=1) * 2**0.5


def features(phi):
    """Other features of the causal linear attention, in plain PyTorch."""
    def context(q, *args, **options):
        c, sums = sea.causal_context(q, *args, **options)
        return c.to(q.dtype), sums  # as the kernels that go on from there want it

    def change(module: nn.Module) -> None:
        sea.relu_features = phi
        if torch.cuda.is_available():
            sea.load_kernels().causal_context = context
    return change


def before_rotary(module: nn.Module) -> None:
    """Features of queries and keys turned back to before their rotary embedding, by Llama's convention. Stride 1, no padding."""
    half, estimate = module.sea.config.d_head // 2, module.sea.estimate_attention
    frequency = module.config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)

    def turned_back(x):
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency.to(x.device)
        cos, sin, (a, b) = angle.cos(), angle.sin(), x.float().chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)

    def change(ops, *args):
        context = lambda q, k, *rest, **options: ops.causal_context(turned_back(q), turned_back(k), *rest, **options)
        return estimate(SimpleNamespace(**{**vars(ops), "causal_context": context}), *args)

    module.sea.estimate_attention = change


def estimate_times(factor: float):
    """L_estimate with another weight, so that its gradient is larger or smaller beside the others."""
    def change(module: nn.Module, losses=distill.layer_losses) -> None:
        def scaled(*args):
            terms = losses(*args)
            return terms | {"estimate": factor * terms["estimate"]}
        distill.layer_losses = scaled
    return change


project = lambda x, projection: sea.at_least_fp32(x) @ projection.to(sea.at_least_fp32(x).dtype)
VARIANTS = {  # name -> options of distill.py, and a change to each attention module, whose new layer is `sea`
    "base": ("", None),
    "without cell keys": ("--no-cell-keys", None),
    "width 128": ("--width 128", None),
    "width 512": ("--width 512", None),
    "stride 2": ("--query-stride 2", None),
    "stride 4": ("--query-stride 4", None),
    "stride 8": ("--query-stride 8", None),
    "stride 16": ("--query-stride 16", None),
    "66 features (nbf 4)": ("--nbf 4", None),
    "133 features (nbf 2)": ("--nbf 2", None),
    "redrawn every 50 steps": ("--redraw-every 50", None),
    "features exp(x W - x^2 / 2)": ("", features(
        lambda x, w: (project(x, w) - sea.at_least_fp32(x).square().sum(-1, True) / 2).clamp(max=20).exp() + 1e-3)),
    "features relu(x W)^2": ("", features(lambda x, w: project(x, w).relu().square() + 1e-3)),
    "nearest instead of sub-pixel": ("", nearest),
    "no positions": ("", no_positions),
    "sinusoidal positions": ("", sinusoidal_positions),
    "gates half open": ("", half_open_gates),
    "no gates, no mean of v": ("", no_gates),
    "L_score, weight 1": ("--score-weight 1", None),
    "L_score, weight 0.01": ("--score-weight 0.01", None),
    "L_estimate times 0.1": ("", estimate_times(0.1)),
    "L_estimate times 10": ("", estimate_times(10.0)),
    "only new weights train": ("--train sea", None),
    "lr 3e-5": ("--lr 3e-5", None),
    "lr 3e-4": ("--lr 3e-4", None),
    "lr-new 1e-3": ("--lr-new 1e-3", None),
    "lr-new 1e-2": ("--lr-new 1e-2", None),
    "trained at topk 32": ("--topk 32", None),
    "features before rotary": ("", before_rotary),  # of a model that has one
}


def folder(out: str, name: str) -> Path:
    return Path(out) / "".join(c if c.isalnum() else "-" for c in name)


def run(name: str, argv: list[str]) -> None:
    options, change = VARIANTS.get(name, (name, None))
    if change is not None:
        attach = convert.attach

        def attach_and_change(model, **fields):
            attach(model, **fields)
            for module in convert.attention_modules(model):
                change(module)
            return model

        convert.attach = attach_and_change
    distill.main([*BASE, *argv, *options.split()])


def start(i: int, name: str, args, rest: list[str]) -> dict:
    """Run one variant in a process of its own; what its log says."""
    out, env = folder(args.out, name), dict(os.environ)
    if torch.cuda.is_available():
        ours = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or range(torch.cuda.device_count())
        env["CUDA_VISIBLE_DEVICES"] = str(ours[i % len(ours)])
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, f"--run={name}", "--steps", str(args.steps), "--eval-every", str(args.steps), *rest,
               "--out", str(out)]
    (out / "log.jsonl").unlink(missing_ok=True)
    with (out / "log.txt").open("w") as file:
        code = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if code == 0 else []
    if code:
        print(f"{name}: failed, see {out}/log.txt", flush=True)
        return {}
    results = next(line["results"] for line in lines if "results" in line)
    layers = next(line["layers"] for line in lines if "layers" in line)
    ms = sorted(line["ms"] for line in lines if "ms" in line and line["name"] == "sea")
    found = {key: value / results["teacher"] for key, value in results.items() if key.startswith("sea")}
    found |= {key: sum(layer[key] for layer in layers) / len(layers) for key in ("kl", "kept")} | dict(ms=ms[len(ms) // 2])
    print(f"{name}: {found['sea']:.4f}", flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--steps", type=int, default=250, help="optimizer steps of each variant")
    p.add_argument("--jobs", type=int, default=1, help="variants at a time")
    p.add_argument("--only", nargs="+", choices=VARIANTS, default=[name for name in VARIANTS if "rotary" not in name], metavar="NAME",
                   help="variants to run")
    p.add_argument("--variant", action="append", default=[], metavar="OPTIONS", help="one more, of these options of distill.py")
    p.add_argument("--run", help=argparse.SUPPRESS)
    p.add_argument("--out", default="out/ablation", help="folder for the runs and the table")
    args, rest = p.parse_known_args()
    if args.run:
        return run(args.run, ["--steps", str(args.steps), "--out", args.out, *rest])
    with ThreadPoolExecutor(args.jobs) as pool:
        names = [*args.only, *args.variant]
        found = dict(zip(names, pool.map(lambda x: start(*x, args, rest), enumerate(names))))
    at_topk = list(dict.fromkeys(key for r in found.values() for key in r if key.startswith("sea, ")))
    columns = {"ratio": ("sea", ".4f"), **{key.removeprefix("sea, "): (key, ".4f") for key in at_topk}, "KL": ("kl", ".3f"),
               "kept": ("kept", ".3f"), "ms": ("ms", ".0f")}
    print(f"\n{'':30} " + " ".join(f"{name:>8}" for name in columns))
    for name, r in found.items():
        print(f"{name:30} " + " ".join(f"{format(r[key], form) if key in r else '-':>8}" for key, form in columns.values()))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "ablation.json").write_text(json.dumps(dict(command=sys.argv, results=found), indent=1))
    if not all(found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
