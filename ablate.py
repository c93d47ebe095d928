"""What each choice is worth: short distillations that differ from a base run in one thing.

    python ablate.py --model DIR --data FILE [--valid-data FILE] [--jobs 4] [--only NAME ...]

Each variant is a run of distill.py with its own options, whose student evaluate.py then measures;
`--jobs` of them run at a time, in turn on the GPUs there are. A variant of your own:
--variant="--sea topk=32". Options that this file does not know go to distill.py, for all variants
alike. Prints a table, writes it to OUT/ablation.json, and each run to OUT/<variant>/.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import distill
import evaluate
import sea

HERE = Path(__file__).parent
BASE = ("--method sea --batch 4 --micro-batch 4 --eval-windows 48 "
        "--optimizer lr=1e-4 lr_new=5e-3 schedule=cosine warmup=30").split()
VARIANTS = {  # name -> options of distill.py
    "base": "",
    "without cell keys": "--sea cell_keys=false",
    "cell keys alone": "--sea cnn=false",
    "local 1": "--sea local=1",
    "local 4": "--sea local=4",
    "local 16": "--sea local=16",
    "local 32": "--sea local=32",
    "first 0": "--sea first=0",
    "bin 1": "--sea bin=1",
    "bin 4": "--sea bin=4",
    "bin 8": "--sea bin=8",
    "bin 16": "--sea bin=16",
    "candidates 4": "--sea candidates=4",
    "candidates 8": "--sea candidates=8",
    "candidates 32": "--sea candidates=32",
    "cells alone (bin 0)": "--sea bin=0",
    "a choice per head": "--sea group=query",
    "ranked over all heads": "--sea group=causal_batch",
    "width 128": "--sea width=128",
    "width 512": "--sea width=512",
    "stride 2": "--sea query_stride=2",
    "stride 4": "--sea query_stride=4",
    "stride 8": "--sea query_stride=8",
    "stride 16": "--sea query_stride=16",
    "66 features (nbf 4)": "--sea nbf=4",
    "133 features (nbf 2)": "--sea nbf=2",
    "redrawn every 50 steps": "--optimizer redraw_every=50",
    "only new weights train": "--train sea",
    "trained at topk 32": "--sea topk=32",
}
SHARED = ("--model", "--data", "--valid-data", "--seq-len", "--micro-batch", "--eval-windows",
          "--device")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of distill.py."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--steps", default="250", help="optimizer steps of each variant")
    add("--topk", nargs="+", default=[], metavar="K", help="numbers of keys to measure each student "
        "with, besides its own")
    add("--jobs", type=int, default=1, help="variants at a time")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help="variants to run")
    add("--variant", action="append", default=[], metavar="OPTIONS", help="one more, of these options "
        "of distill.py")
    add("--out", default="out/ablation", help="folder for the runs and the table")
    args, rest = p.parse_known_args(argv)
    if args.jobs < 1:
        p.error(f"--jobs: expected an integer >= 1, got {args.jobs}")
    if "--model" not in options_of_both(rest):
        p.error("--model: expected the teacher of all variants, a folder or hub id, got none")
    for name in (*args.only, *args.variant):  # a mistake in one ends all of them before they begin
        options = options_of(name, rest)
        fields = distill.parse([*options, "--steps", args.steps]).sea
        for k in evaluate.parse([*options_of_both(options), *at_topk(args)]).topk:
            try:
                sea.SEAConfig(n_head=1, d_head=2, **{**fields, "topk": k})
            except ValueError as error:
                p.error(f"--topk: expected numbers of keys for every variant, got {k} for {name} "
                        f"({error})")
    return args, rest


def options_of(name: str, rest: list[str]) -> list[str]:
    """A variant's, of distill.py."""
    return [*BASE, *rest, *shlex.split(VARIANTS.get(name, name))]


def at_topk(args) -> list[str]:
    return ["--topk", *args.topk] if args.topk else []


def options_of_both(argv: list[str]) -> list[str]:
    """Those of distill.py's options that evaluate.py needs as well."""
    p = argparse.ArgumentParser(allow_abbrev=False)
    for name in SHARED:
        p.add_argument(name)
    found = vars(p.parse_known_args(argv)[0])
    pairs = [(name, found[name[2:].replace("-", "_")]) for name in SHARED]
    return [x for name, value in pairs if value is not None for x in (name, value)]


def run(i: int, name: str, args, rest: list[str]) -> dict[str, float]:
    """Train and measure one variant; {} if that failed."""
    out, env = Path(args.out) / "".join(c if c.isalnum() else "-" for c in name), dict(os.environ)
    if torch.cuda.is_available():
        ours = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        ours = ours or [str(gpu) for gpu in range(torch.cuda.device_count())]
        env["CUDA_VISIBLE_DEVICES"] = ours[i % len(ours)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").unlink(missing_ok=True)
    options = options_of(name, rest)
    train = [sys.executable, HERE / "distill.py", *options, "--steps", args.steps,
             "--eval-every", args.steps, "--out", out]
    measure = [sys.executable, HERE / "evaluate.py", *options_of_both(options), *at_topk(args),
               "--students", out / "sea", "--out", out]
    with (out / "log.txt").open("w") as file:
        for command in (train, measure):
            if subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT).returncode:
                print(f"{name}: failed, see {out}/log.txt", flush=True)
                return {}
    found = summary(out)
    print(f"{name}: {found['ratio']:.4f}", flush=True)
    return found


def summary(out: Path) -> dict[str, float]:
    """Ratios to the teacher's perplexity, means over layers, and the median time of a step."""
    models = json.loads((out / "evaluate.json").read_text())["models"]
    teacher, layers = models["teacher"]["ppl"], models["sea"]["layers"]
    found = {"ratio": models["sea"]["ppl"] / teacher}
    for row in models.values():
        if "topk" in row:
            found[f"topk {row['topk']}"] = row["ppl"] / teacher
    for key in ("kl", "kept"):
        found[key] = sum(layer[key] for layer in layers) / len(layers)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    ms = sorted(step["ms"] for step in steps if "ms" in step and step["name"] == "sea")
    return found | {"ms": ms[len(ms) // 2]}


def main(argv: list[str] | None = None) -> None:
    args, rest = parse(argv)
    names = [*args.only, *args.variant]
    evaluate.make_folder(args.out)
    print(f"{len(names)} variants of {args.steps} steps, {args.jobs} at a time, what each prints in "
          f"{args.out}/<variant>/log.txt", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(names, pool.map(lambda job: run(*job, args, rest), enumerate(names))))
    columns = dict.fromkeys(key for result in found.values() for key in result)
    width = max(30, *map(len, found))
    print(f"\n{'':{width}} " + " ".join(f"{name:>8}" for name in columns))
    for name, result in found.items():
        cells = (f"{result[key]:.0f}" if key == "ms" else f"{result[key]:.4f}" for key in result)
        print(f"{name:{width}} " + " ".join(f"{cell:>8}" for cell in cells))
    report = dict(command=["ablate.py", *(sys.argv[1:] if argv is None else argv)], results=found)
    (Path(args.out) / "ablation.json").write_text(json.dumps(report, indent=1))
    if not all(found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
