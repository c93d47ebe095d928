"""What lets a run of distill.py go on after it ended early: who it is, and where its students were.

    OUT/run.json       the run: a random number, and the options that change what is learned
    OUT/<name>.ckpt    a student's newest checkpoint; <name>.ckpt.1 is the one before
    OUT/lock           held by the run that writes there

A run without --resume has a new number. Its checkpoints bear it, and so do the teacher that it trained
and its students, as `sea_run` in config.json. So --resume never takes what an earlier run left in the
same folder for its own.
"""

import contextlib
import json
import os
import secrets
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import convert
import evaluate
import sea

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

FROM_MODEL = ("n_head", "n_kv_head", "d_head", "causal", "seed")  # of SEAConfig
# Options that may differ between a run and the one that resumes it. The groups are compared field by
# field instead.
FREE = ("out", "resume", "run", "method", "backend", "eval_every", "eval_windows", "valid_data",
        "micro_batch", "device", "gradient_checkpointing", "shard", "sea", "loss", "optimizer")
# State dicts hold all processes' weights by name, on the CPU of the first.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
OF_EARLIER_VERSION = 0  # the number of a run that has none


# -- runs ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(out: str):
    """No second run in this folder, within. The lock goes with its process, however that ends."""
    if evaluate.rank_and_size()[0] or fcntl is None:
        yield
        return
    with open(Path(out) / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"--out: expected a folder that no other run is writing to, got {out}")
        except OSError:  # a file system that knows no locks
            pass
        yield


def find_run(args) -> int:
    """The number of the run that --resume goes on with, or of a new one; the same in all processes."""
    number, path = 0, Path(args.out) / "run.json"
    if evaluate.rank_and_size()[0] == 0:
        check_places(args.out)
        number = 1 + secrets.randbits(48)
        if args.resume and path.exists():
            number = read_run(path, args)
        elif args.resume and (Path(args.out, "teacher").exists() or [*Path(args.out).glob("*.ckpt")]):
            number = OF_EARLIER_VERSION
        elif args.resume:
            print(f"--resume: there is no run in {args.out} yet, one begins", flush=True)
    return int(evaluate.over_processes([float(number)], args)[0])


def check_places(out: str) -> None:
    """Where models will be saved there may be others, which they replace, and nothing else."""
    for name in ("teacher", *evaluate.METHODS):
        try:
            convert.check_replaceable(convert.whole(Path(out) / name))
        except ValueError as error:
            sys.exit(f"--out: {str(error).removeprefix('folder: ')}")


def read_run(path: Path, args) -> int:
    """Its number, if its options are these."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        number, options = int(run["run"]), dict(run["options"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f"--resume: expected the record of a run, got {path} ({evaluate.reason(error)})")
    check_options(options, args, path)
    return number


def record_run(args) -> None:
    """Write run.json: from now on the folder is this run's. All processes call this; once the text and
    the teacher are known, too, which have to stay the same."""
    path = Path(args.out) / "run.json"
    if evaluate.rank_and_size()[0]:
        return
    if args.resume and path.exists():
        read_run(path, args)
    with convert.replacing(path) as new:
        new.write_text(evaluate.as_json(dict(run=args.run, options=fixed_options(args)), indent=1))


def fixed_options(args) -> dict:
    """All that changes what is learned, by name."""
    fields = args.sea  # a saved student has its own of the others
    if not args.load:
        fields = vars(sea.SEAConfig(n_head=1, d_head=2, **args.sea))
        fields = {name: value for name, value in fields.items() if name not in FROM_MODEL}
        fields["max_positions"] = args.sea.get("max_positions", "the model's")
    weights = {f"{name}_weight": value for name, value in vars(args.loss).items()}
    options = {**vars(args), **fields, **vars(args.optimizer), **weights}
    return {name: value for name, value in options.items() if name not in FREE}


def check_options(before: dict, args, path: Path) -> None:
    """`before`, which `path` holds, has to agree in all that changes what is learned."""
    if not args.load:  # there were no bins before that was an option
        before = {"bin": 0, **before}
    if args.model and "teacher_lr" not in before:  # nor was a given model trained
        before = {**before, "teacher_steps": 0}
    for name, value in fixed_options(args).items():
        # None: left to its default, or not yet an option
        if before.get(name) is not None and evaluate.as_json(before[name]) != evaluate.as_json(value):
            what = "the text and the teacher" if name == "fingerprint" else f"{name} {before[name]}"
            sys.exit(f"--resume: expected {what} as in {path}, got {value}")


# -- checkpoints -----------------------------------------------------------------------------------


def files(name: str, args) -> tuple[Path, Path]:
    """The newest checkpoint's and the one's before."""
    return Path(args.out) / f"{name}.ckpt", Path(args.out) / f"{name}.ckpt.1"


def write(name: str, student, optimizer, step: int, args) -> None:
    """All that a step depends on, whole, however many processes there are. All of them call this; the
    first writes."""
    model, state = get_state_dict(student, optimizer, options=WHOLE)
    if evaluate.rank_and_size()[0]:
        return
    newest, before = files(name, args)
    content = dict(run=args.run, name=name, step=step, model=model, optimizer=state,
                   args=fixed_options(args))
    with convert.replacing(newest) as new:
        with new.open("wb") as file:  # given a name, torch.save would not say that a disk is full
            torch.save(content, file)
        if newest.exists():
            os.replace(newest, before)


def resume(name: str, student, optimizer, args) -> int:
    """With --resume, give the student the state in its checkpoint and return the steps behind it; 0 if
    there is none. Without, remove an earlier run's."""
    rank, size = evaluate.rank_and_size()
    saved = find(name, args) if args.resume else None
    if rank == 0 and not args.resume:
        for path in files(name, args):
            path.unlink(missing_ok=True)
    done = saved["step"] if saved else 0
    if evaluate.over_processes([float(done)], args)[0] != done * size:
        sys.exit(f"--out: expected one folder that all processes share, got {args.out} with {name} of "
                 f"step {done} in one of them, others in others")
    if saved:
        for key, x in student.named_buffers():  # from before heads had shares, where none are learned
            if key.endswith(".head_share"):
                saved["model"].setdefault(key, x)
        check_state(name, saved, student, optimizer)
        set_state_dict(student, optimizer, model_state_dict=saved["model"],
                       optim_state_dict=saved["optimizer"], options=WHOLE)
    return done


def find(name: str, args) -> dict | None:
    """The newest checkpoint that is not damaged, if it is of this run."""
    damaged = []
    for path in files(name, args):
        if not path.exists():
            continue
        try:
            saved = read(path)
        except Exception as error:  # torch raises whatever its zip and pickle readers do
            damaged.append(f"{path} ({evaluate.reason(error)})")
            continue
        if saved.get("run", OF_EARLIER_VERSION) != args.run:
            print(f"{path} is of an earlier run: {name} begins anew", flush=True)
            return None
        if saved.get("name", name) != name:
            sys.exit(f"--resume: expected a checkpoint of {name}, got one of {saved['name']} in {path}")
        check_options(saved["args"], args, path)
        for other in damaged:
            print(f"damaged: {other}; {name} goes on from {path}", flush=True)
        return saved
    if damaged:
        sys.exit(f"--resume: expected a whole checkpoint, got {' and '.join(damaged)}; without them "
                 f"{name} begins anew")
    return None


def read(path: Path) -> dict:
    """What `write` wrote. Raises an exception of any kind if the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not look at checksums
    if broken:
        raise ValueError(f"{broken} in it differs from its checksum")
    # mapped, it is in memory once for all processes
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=dist.is_initialized())
    for part in ("step", "model", "optimizer", "args"):
        if part not in saved:
            raise ValueError(f"it lacks {part}")
    return saved


def check_state(name: str, saved: dict, student, optimizer) -> None:
    """Every weight, and what the optimizer keeps of each that is trained: none more, none less."""
    model = {key: (x.dtype, *x.shape) for key, x in student.state_dict().items()}
    trained = {key: tuple(p.shape) for key, p in student.named_parameters() if p.requires_grad}
    names = {id(p): key for key, p in student.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    states = saved["optimizer"].get("state", {})
    found = {key: {part: tuple(x.shape) for part, x in state.items()} for key, state in states.items()}
    compare(name, "weights", model, {key: (x.dtype, *x.shape) for key, x in saved["model"].items()})
    compare(name, "optimizer's state", {key: dict(step=(), exp_avg=shape, exp_avg_sq=shape)
                                        for key, shape in trained.items()}, found)
    if groups != [set(group["params"]) for group in saved["optimizer"].get("param_groups", [])]:
        sys.exit(f"--resume: expected a checkpoint whose optimizer groups weights as {name}'s, got "
                 "another")


def compare(name: str, what: str, expected: dict, found: dict) -> None:
    for key in [*expected, *found]:
        if expected.get(key) != found.get(key):
            sys.exit(f"--resume: expected a checkpoint with {name}'s {what}, {key}: {expected.get(key)}, "
                     f"got {found.get(key)}")
