"""Measure a teacher and the students that distill.py saved.

    python evaluate.py                                    what `python distill.py` left in out/
    python evaluate.py --model DIR --data FILE --students out/sea out/performer
    python evaluate.py --model DIR --data FILE            the teacher alone
    python evaluate.py ... --topk 8 16 32 64              SEA students with other numbers of keys, too
    python evaluate.py ... --prompt "Once upon" "def"     and how each model goes on
    python evaluate.py ... --seq-len 32768 --inside-documents --from-token 16385     long contexts
    python evaluate.py ... --retrieval 4096 32768         what each model finds in them, and that alone
    torchrun --nproc-per-node 2 evaluate.py ... [--shard]     several processes share the windows

Of each model: validation perplexity, also by position in the window; keys per query, of one window;
time of the attention alone; time and memory of a pass through the model; continuations of the prompts.
Of a SEA student, by layer, of 8 windows: how near its estimate comes to the teacher's attention, and
how much of that attention is on the keys that the student keeps. Prints tables; writes all of it to
OUT/evaluate.json, pictures of heads to OUT/<student>.png, and with --topk the curves OUT/topk.png and
the numbers in them, OUT/topk.json; of --retrieval, see retrieval.py, OUT/retrieval.json.
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import functools
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import baselines
import convert
import retrieval
import sea

HUB = {name: f"facebook/{name}" for name in ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b")}
METHODS = (*convert.METHODS, "dense", "oracle")
WITH_TOPK = ("sea", "window", "reformer", "oracle")  # topk says how many keys they attend to


# -- data ------------------------------------------------------------------------------------------


def load_texts(args, split: str = "validation") -> tuple[list[str], list[str]]:
    """Training and validation documents. split: of WikiText-2, to validate on."""
    valid = None if args.valid_data is None else read_documents("--valid-data", args.valid_data)
    if args.data == "openwebtext" and not Path(args.data).exists():
        documents = hub("the dataset Skylion007/openwebtext from the Hugging Face hub",
                        "give a text file with --data FILE instead", load_openwebtext)
        return (documents, valid) if valid else (documents[:-1000], documents[-1000:])
    if args.data:
        documents = read_documents("--data", args.data)
    elif args.model:
        splits = hub("the dataset Salesforce/wikitext (wikitext-2-raw-v1) from the Hugging Face hub",
                     "give a text file with --data FILE instead", load_wikitext)
        return ["\n\n".join(splits["train"]["text"])], valid or ["\n\n".join(splits[split]["text"])]
    else:
        from pydoc_data.topics import topics  # comes with Python, differs a little with its version

        documents = [topics[name] for name in sorted(topics)]
    return (documents, valid) if valid else last_tenth_apart(documents)


def load_wikitext():
    from datasets import load_dataset  # here, since --data does without

    return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")


def load_openwebtext(n: int = 200_000) -> list[str]:
    """Its first n documents of eight million, about a gigabyte; the others are not downloaded."""
    from datasets import load_dataset

    rows = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
    return [row["text"] for row in itertools.islice(rows, n)]


def read_documents(option: str, file: str) -> list[str]:
    """Documents that hold more than white space."""
    documents = [document for document in read_text(option, file).split("\n\n\n") if document.strip()]
    if not documents:
        sys.exit(f"{option}: expected a text file in UTF-8, got {file}, which holds no text")
    return documents


def read_text(option: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{option}: expected a text file in UTF-8, got {file} ({error})")


def hub(what: str, instead: str, load: Callable):
    """Run `load`, which may need the network; say in one sentence what was missing and what to give
    instead."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its retries
    print(f"loading {what}", flush=True)
    try:
        return load()
    except Exception as error:  # a folder with the wrong things in it gives any
        sys.exit(f"This needed {what} and could not get it ({reason(error)}); {instead}.")


def reason(error: Exception) -> str:
    """In one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_tenth_apart(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut between documents, or within the last one if that alone is more than a tenth."""
    total, size = sum(map(len, documents)), 0
    for i, document in enumerate(documents[:-1], start=1):
        size += len(document)
        if size >= 0.9 * total:
            return documents[:i], documents[i:]
    cut = int(0.9 * len(documents[-1]))
    return [*documents[:-1], documents[-1][:cut]], [documents[-1][cut:]]


def token_streams(load: Callable[[], list[list[str]]], tokenizer, teacher, args) -> list[Tensor]:
    """The token ids of each text that `load` gives, int32 (n,): read and tokenized by the first process,
    for all of them."""
    streams = []
    if rank_and_size()[0] == 0:
        streams = [tokenize(documents, tokenizer) for documents in load()]
        known = teacher.get_input_embeddings().num_embeddings
        largest = max((int(ids.max()) for ids in streams if len(ids)), default=0)
        if largest >= known:
            sys.exit(f"--model: expected a tokenizer whose ids are below {known}, since the model's "
                     f"embedding has no more, got {largest} from the one in {tokenizer.name_or_path}")
    (n,) = over_processes([float(len(streams))], args)
    streams = streams or [None] * int(n)
    return [from_first_process(ids, args) for ids in streams]


def from_first_process(x: Tensor | None, args, part: int = 2**24) -> Tensor:
    """The first process's x, int32 (n,), in all of them, which pass anything."""
    if not dist.is_initialized():
        return x
    rank, _ = rank_and_size()
    (n,) = over_processes([0.0 if rank else float(len(x))], args)
    whole = torch.empty(int(n), dtype=torch.int32) if rank else x
    for piece in whole.split(part):  # through the GPU if the processes talk over NCCL
        sent = piece.to(args.device)
        dist.broadcast(sent, 0)
        piece.copy_(sent)
    return whole


BETWEEN_WORDS = re.compile(r"(?<=\S)\s(?=\S)")


def tokenize(documents: list[str], tokenizer, at_once: int = 2**22) -> Tensor:
    """One stream of token ids, int32, an end-of-text token before each document if there are several.

    About `at_once` characters at a time, since a tokenizer takes over 100 bytes for each.
    """
    several = len(documents) > 1 and tokenizer.eos_token_id is not None
    ids, batch, size = array("i"), [], 0
    for document in documents:
        for i, piece in enumerate(pieces(document, tokenizer)):
            batch.append((several and i == 0, piece))
            size += len(piece)
            if size >= at_once:
                add_ids(ids, batch, tokenizer)
                batch, size = [], 0
    add_ids(ids, batch, tokenizer)
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


def add_ids(ids: array, batch: list[tuple[bool, str]], tokenizer) -> None:
    """Those of each text of the batch, after an end-of-text token where its flag says so."""
    texts = [text for _, text in batch]
    found = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    for (begins, _), more in zip(batch, found, strict=True):
        if begins:
            ids.append(tokenizer.eos_token_id)
        ids.extend(more)


def pieces(document: str, tokenizer, size: int = 2**18, context: int = 100,
           tries: int = 50) -> Iterator[str]:
    """Cut a long document into pieces of about `size` characters, whose ids, one piece after the other,
    are those of the whole.

    A cut is between words, where the `context` around it has the same ids together and apart; it leaves
    the space away for a tokenizer that puts one before each text. After `tries` places in a row without
    one, the rest stays whole.
    """

    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    start, failed, space = 0, 0, BETWEEN_WORDS.search(document, size)
    while space and failed < tries:
        place = space.start()
        before, after = document[max(0, place - context) : place], document[place : place + context]
        apart = [ids(before) + ids(after[skip:]) for skip in (0, 1)]
        together, failed, following = ids(before + after), failed + 1, place + 1
        if together in apart:
            yield document[start:place]
            start, failed, following = place + apart.index(together), 0, place + size
        space = BETWEEN_WORDS.search(document, following)
    yield document[start:]


def windows(tokens: Tensor, seq_len: int, most: int | None = None, text: str = "text") -> Tensor:
    """Windows without overlap, remainder dropped, int64 (n, seq_len). text: what it is, in words."""
    n = len(tokens) // seq_len
    if n == 0:
        sys.exit(f"--seq-len: expected at most the {len(tokens)} tokens of the {text}, got {seq_len}")
    return tokens[: n * seq_len].view(n, seq_len)[:most].long()


def windows_inside(documents: list[Tensor], seq_len: int, most: int | None = None) -> Tensor:
    """Windows of one document each, int64 (n, seq_len): the first of every document that is long enough,
    then the second of every one, and so on."""
    found = [windows(ids, seq_len) for ids in documents if len(ids) >= seq_len]
    if not found:
        sys.exit(f"--inside-documents: expected a document of at least the {seq_len} tokens of "
                 f"--seq-len, got {max(map(len, documents))} in the longest one")
    in_turn = [x for turn in itertools.zip_longest(*found) for x in turn if x is not None]
    return torch.stack(in_turn[:most])


# -- models ----------------------------------------------------------------------------------------


def load_teacher(model: str | Path, seq_len: int, option: str = "--seq-len"):
    """Pretrained model and tokenizer, from the hub or a folder. Weights in fp32, since checkpoints are
    often in half precision. option: the one that asks for seq_len tokens."""
    name = HUB.get(str(model), str(model))
    tokenizer, teacher = from_hub(name)
    longest = teacher.config.max_position_embeddings
    if seq_len > longest:
        sys.exit(f"{option}: expected at most the model's {longest} positions, got {seq_len}")
    teacher.set_attn_implementation("sea_teacher")  # convert.record sees what it computes
    return teacher.eval().requires_grad_(False), tokenizer


def from_hub(name: str, dtype: torch.dtype = torch.float32, load_model: Callable | None = None):
    """Tokenizer and model, from the hub or a folder. load_model: given name and dtype, loads the model
    (default: a causal language model)."""
    load_model = load_model or language_model
    is_folder = Path(name).is_dir()
    if not is_folder and (Path(name).is_file() or name.startswith(("/", ".", "~"))):
        sys.exit(f"--model: expected a folder, or a name on the Hugging Face hub, got {name} "
                 f"({'a file' if Path(name).is_file() else 'not there'})")

    def load():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if hasattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "sea"):
            sys.exit(f"--model: expected a plain model, to be the teacher, got a student in {name}; "
                     "--load of distill.py and --students of evaluate.py are for students")
        if not tokenizer("the", add_special_tokens=False).input_ids:  # what a folder without one gives
            sys.exit(f"--model: expected a tokenizer beside the model, got none in {name}")
        return tokenizer, load_model(name, dtype)

    if is_folder:
        return hub(f"the model {name}", "give another folder with --model DIR", load)
    return hub(f"the model {name} from the Hugging Face hub",
               "give a local folder with --model DIR instead", load)


def language_model(name: str, dtype: torch.dtype = torch.float32):
    """whole_model of --model. Ends the process if tokens see those after them: the model would then
    be asked for what it has seen."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.device("meta"):  # takes no memory
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)) if known else None
    if not known or is_bidirectional(model):
        sys.exit(f"--model: expected a causal language model, got a {config.model_type} in {name}, "
                 "which is none; distill.py --dataset glue distils bidirectional models, as classifiers")
    return whole_model(name, dtype)


def is_bidirectional(model) -> bool:
    """Does every token see all others? (Those of images may, beside text.)"""
    modules = convert.attention_modules(model)
    asked = getattr(model.config, "is_causal", None) is False
    return bool(modules) and (asked or not any(module.is_causal for module in modules))


def whole_model(folder: str | Path, dtype: torch.dtype = torch.float32):
    """A causal language model. Raises ValueError if a weight is not in its files: it would be random."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"expected all weights, got none for {min(found['missing_keys'])}")
    return model


def run_of(folder: Path) -> int | None:
    """The number of the run of distill.py that saved a model in `folder`, 0 if that had none; None if
    there is no model."""
    try:
        config = convert.whole(folder) / "config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("sea_run", 0)
    except (OSError, ValueError, AttributeError):
        return None


def saved_config(folder: str) -> dict:
    """What config.json in `folder` says, {} if there is none that can be read."""
    try:
        config = json.loads((convert.whole(Path(folder)) / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config.get("sea", {}), dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def with_options(saved: dict, **options) -> sea.SEAConfig:
    """Of the layers of a student of this saved_config with other options, but for what comes from the
    model. Raises ValueError if no layer can have them."""
    fields = {"bin": 0, **saved["sea"], **options}  # as convert.load has it
    known = {field.name for field in dataclasses.fields(sea.SEAConfig)}
    return sea.SEAConfig(n_head=1, d_head=2, **{name: x for name, x in fields.items() if name in known})


def load_student(option: str, folder: str, original, teacher, **changes):
    """Which of METHODS an earlier run saved in `folder`, and the student, in fp32. changes: fields of
    SEAConfig that no weight depends on."""
    folder = convert.whole(Path(folder))
    if not folder.is_dir():
        sys.exit(f"{option}: expected a folder that distill.py wrote, got {folder} "
                 f"({'a file' if folder.is_file() else 'not there'})")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        expected = original.config.get_text_config()
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            found, wanted = getattr(config.get_text_config(), field), getattr(expected, field)
            if found != wanted:
                sys.exit(f"{option}: expected a student of --model, {field} {wanted}, got {found} "
                         f"in {folder}")
        if not hasattr(config, "sea"):
            student = whole_model(folder)
            student.set_attn_implementation("sea_teacher")
            return "dense", student
        student = convert.load(folder, dtype=torch.float32)
        convert.set_option(student, **changes)
    except Exception as error:  # a folder with the wrong things in it gives any
        sys.exit(f"{option}: expected a folder that distill.py wrote, got {folder} ({reason(error)})")
    if getattr(config, "sea_oracle", False):
        follow_teacher(student, teacher)
        return "oracle", student
    return config.sea.get("method", "sea"), student


def follow_teacher(student, teacher) -> None:
    """The oracle: from now on the student's cells are chosen by the teacher's own attention to the same
    tokens."""
    records = []

    def look(model, args, kwargs):
        with torch.no_grad(), convert.record(teacher) as found:
            x = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            teacher(x, use_cache=False, logits_to_keep=1)
        records[:] = found

    def follow(layer: int, attention: sea.SEAttention):
        estimate_attention = attention.estimate_attention

        def follow_layer(ops, q, k, v, rows, *others):
            scores, gates, state = estimate_attention(ops, q, k, v, rows, *others)
            of_teacher, config = records[layer], attention.config
            cells = config.cell_layout(config.in_cells(rows.seen))  # a row's, at its own query
            pooled = ops.pool_attention(of_teacher.q, of_teacher.k, rows.seen, config.width,
                                        of_teacher.scale, **cells)
            best = rows.of(best_scores(pooled, **cells))
            unused = sea.repeat_heads(0 * scores.float(), best.shape[1])
            return best + unused, gates, state  # every weight keeps a gradient, of 0

        attention.estimate_attention = follow_layer

    student.config.sea_oracle = True
    student.register_forward_pre_hook(look, with_kwargs=True)
    for i, module in enumerate(convert.attention_modules(student)):
        follow(i, module.sea)


def best_scores(pooled: sea.PooledAttention, in_cells: Tensor, unit: int, first: int) -> Tensor:
    """The best estimate of the attention, scores (B, H, T, width): the log of its mean in each cell."""
    n_keys = sea.keys_per_cell(in_cells, pooled.cells.shape[-1], unit, first)[:, None]
    return (pooled.cells / n_keys.clamp(min=1)).clamp(min=1e-30).log()


# -- several processes -----------------------------------------------------------------------------

# All wait while the first tokenizes a large text or saves; torchrun ends them if one of them ends.
PATIENCE = timedelta(hours=6)


def start(script: str, argv: list[str] | None, args) -> dict[str, str]:
    """Join the other processes, make --out, print and return what runs: command, versions, device."""
    _, size = start_processes(args)
    make_folder(args.out)
    transformers.utils.logging.disable_progress_bar()  # logs are files
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    if size > 1:
        device = f"{size} x {device}"
    header = dict(command=command_line(script, argv),
                  versions=f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers "
                           f"{transformers.__version__}", device=device)
    print("\n".join(header.values()), flush=True)
    return header


def command_line(script: str, argv: list[str] | None) -> str:
    """What was typed, so that a shell takes it as it was."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    launcher = "python" if size == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size)}"
    return f"{launcher} {shlex.join([script, *(sys.argv[1:] if argv is None else argv)])}"


def make_folder(out: str) -> None:
    """--out, before any work is done that could not be kept there."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        sys.exit(f"--out: expected a folder that can be written to, got {out} ({error.strerror})")


@contextlib.contextmanager
def room_for(out: str) -> Iterator[None]:
    """A disk that gets full, within, ends the process in one sentence."""
    try:
        yield
    except Exception as error:
        # torch.save raises another error in its place; safetensors says the number only
        errors = [e for e in (error, error.__context__) if e is not None]
        if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(e)
               for e in errors):
            sys.exit(f"--out: expected room on the disk, got a full one at {out}; what was saved before "
                     "is whole")
        raise


def start_processes(args) -> tuple[int, int]:
    """This process's rank and how many there are, under torchrun; (0, 1) without. Only rank 0 prints
    and writes."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
            dist.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device(args.device))
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    elif args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if rank:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a text may hold what another encoding than UTF-8 cannot
        sys.stdout.reconfigure(errors="backslashreplace")
    return rank, size


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stop_processes() -> None:
    """Wait for all processes, the first of which may still be writing."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # FSDP's caches keep gloo's threads. One that frees its last tensor while Python (before 3.14)
        # ends aborts the process, so let them be done.
        time.sleep(1)


def over_processes(values: list[float], args, op=dist.ReduceOp.SUM) -> list[float]:
    """The sum of each number over all processes, or their `op`."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=args.device)
    dist.all_reduce(total, op)
    return total.tolist()


def to_device(model, args):
    """Move `model` to the device, in place; with --shard, this process's shard of each weight.

    FSDP2 moves and shards one layer after the other, so that a model on the CPU is never whole on the
    device. Which weights are trained has to be settled before.
    """
    if not args.shard:
        return model.to(args.device)
    # OPT's layers do so; nothing writes to it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),))
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack if convert.attention_modules(layer)]
    # Outside the layers, too, weights are shards between passes, as optimizer and checkpoints want.
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def as_json(value, **options) -> str:
    """JSON proper, without infinity and NaN: they are written as strings, which float() reads."""

    def plain(x):
        if dataclasses.is_dataclass(x):
            return plain(vars(x))
        if isinstance(x, dict):
            return {key: plain(y) for key, y in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(y) for y in x]
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), allow_nan=False, **options)


def autocast(args, **options):
    """bf16 on a GPU."""
    if not args.device.startswith("cuda"):
        return contextlib.nullcontext()
    # With --shard the cache would keep a bf16 copy of every weight, whole, through a forward pass.
    return torch.autocast("cuda", torch.bfloat16, **{"cache_enabled": not args.shard, **options})


# -- timing ----------------------------------------------------------------------------------------


def milliseconds(run, repeats: int = 20, graph: bool = True, device: str = "cuda") -> float:
    """Median time of one run; on a GPU, of a replayed CUDA graph, so that what is timed is the device,
    not Python; without `graph` as it is, for a run that checkpoints and so cannot be captured."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        run()
        return sorted(wall_milliseconds(run) for _ in range(3))[1]
    warm_up(run, 3 if graph else 1)
    run = captured(run) if graph else run
    run()
    times = []
    while len(times) < repeats and sum(times) <= 2000:
        times.append(gpu_milliseconds(run))
    return sorted(times)[len(times) // 2]


def wall_milliseconds(run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def gpu_milliseconds(run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def warm_up(run, times: int) -> None:
    """On a stream of its own, as a CUDA graph's capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def captured(run) -> Callable[[], None]:
    """The replay of a CUDA graph of one run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds_in_a_row(run) -> float:
    """Mean time of runs one after the other, Python included. Their number is fixed, since processes run
    together."""
    n = 10 if torch.cuda.is_available() else 1
    for _ in range(3):
        run()

    def all_of_them():
        for _ in range(n):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return wall_milliseconds(all_of_them) / n


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


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# -- options ---------------------------------------------------------------------------------------


# Where the two jobs of distill.py differ, with --model and without.
PAPER = dict(seq_len=2048, micro_batch=1)
TINY = dict(seq_len=256, micro_batch=8)


def by_job(name: str, paper: dict = PAPER, tiny: dict = TINY) -> str:
    return f" (none: {paper[name]} with --model, {tiny[name]} without)"


def settings(config: type) -> Callable[[str], tuple[str, object]]:
    """An argparse type: NAME=VALUE, for a field of the dataclass `config`, becomes (NAME, value)."""
    no_options = (*convert.FROM_MODEL, "causal", "seed")
    kinds = {f.name: f.type if isinstance(f.type, type) else str  # str | None
             for f in dataclasses.fields(config) if f.name not in no_options}

    def setting(text: str) -> tuple[str, object]:
        name, _, value = text.partition("=")
        if name not in kinds or not value:
            raise argparse.ArgumentTypeError(
                f"expected NAME=VALUE with one of {', '.join(kinds)}, got {text!r}")
        kind = kinds[name]
        try:
            return name, {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"expected {name} of type {kind.__name__}, got {value!r}") from None

    return setting


def several(setting: Callable[[str], tuple[str, object]]) -> Callable[[str], dict[str, object]]:
    """An argparse type: settings with spaces between them, by name."""
    return lambda text: dict(setting(word) for word in text.split())


def add_common_options(p: argparse.ArgumentParser) -> None:
    """Those of distill.py and evaluate.py alike."""
    add = p.add_argument
    add("--model", help="teacher: opt-125m, opt-350m, opt-1.3b, opt-2.7b, a hub id, or a local folder "
        "(none: the tiny OPT that distill.py trains, in --out)")
    add("--data", help="text file, UTF-8; documents are separated by three newlines; or openwebtext, its "
        "first 200,000 documents (none: WikiText-2 with --model, else Python's documentation)")
    add("--valid-data", help="validation text file (none: the validation split, or the last tenth of "
        "--data)")
    add("--seq-len", type=int, help="tokens a sequence" + by_job("seq_len"))
    add("--micro-batch", type=int, help="sequences in memory at once, of each process"
        + by_job("micro_batch"))
    add("--eval-windows", type=int, help="validation windows to use (none: all)")
    add("--shard", action="store_true", help="under torchrun: spread both models, and in training "
        "gradients and the optimizer, over the processes (FSDP2), which otherwise hold all of them "
        "each. For models that do not fit one GPU; in training with --gradient-checkpointing, without "
        "which bf16 copies of all weights stay from the forward to the backward pass. Each process "
        "needs CPU memory for both models in fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device; bf16 "
        "autocast on cuda (default: %(default)s)")
    add("--out", default="out", help="folder for what is written (default: %(default)s)")


def check_common_options(p: argparse.ArgumentParser, args: argparse.Namespace, *own: str) -> None:
    """Fill in the job's defaults, and refuse numbers that nothing can be done with; own: names of a
    script's own options that have to be positive."""
    for name, value in (PAPER if args.model else TINY).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("micro_batch", "seq_len", "eval_windows", *own):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')}: expected an integer >= 1, got {value}")
    if args.seq_len < 2:
        p.error(f"--seq-len: expected an integer >= 2, a token predicts the next, got {args.seq_len}")
    check_device(p, args)
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--shard: expected several processes to spread over, under torchrun, got one")


def check_device(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        p.error(f"--device: expected a torch device such as cpu or cuda, got {args.device}")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        p.error(f"--device: expected cpu or one of the {found} GPUs that PyTorch sees, got "
                f"{args.device}")


def check_backend(p: argparse.ArgumentParser, option: str, backend: str | None, device: str) -> None:
    if backend == "triton" and not device.startswith("cuda") and "TRITON_INTERPRET" not in os.environ:
        p.error(f"{option}: expected auto or torch on {device}, since triton needs a GPU, got triton")


def layer_and_head(text: str) -> tuple[int, int]:
    try:
        layer, head = map(int, text.split("."))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LAYER.HEAD, two integers, got {text!r}") from None
    return layer, head


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_common_options(p)
    add = p.add_argument
    add("--students", nargs="+", metavar="DIR", help="saved students of --model (none: without --model "
        "those in --out of the teacher's run, else none)")
    add("--split", choices=("validation", "test"), default="validation", help="of WikiText-2: the "
        "paper's, or the usual one (default: %(default)s)")
    add("--topk", type=int, nargs="+", default=[], metavar="K", help="numbers of keys to measure SEA "
        "students with, besides their own")
    add("--backend", choices=sea.BACKENDS, help="of the students' attention, see sea.SEAConfig (none: "
        "as saved)")
    add("--sea", type=settings(sea.SEAConfig), nargs="+", action="extend", default=[],
        metavar="NAME=VALUE", help="fields of SEAConfig for SEA students to be measured with instead of "
        f"their own: {', '.join(convert.OF_NO_WEIGHT)} and, without a CNN, width")
    add("--variant", type=several(settings(sea.SEAConfig)), action="append", default=[],
        metavar="\"NAME=VALUE ...\"", help="such fields to measure SEA students with as well, at each "
        "--topk, too; may be given several times")
    add("--look", type=layer_and_head, nargs="+", default=[], metavar="LAYER.HEAD", help="heads to "
        "draw, counted from 0 (none: a median one)")
    add("--inside-documents", action="store_true", help="windows of one document each, shorter "
        "ones left out, instead of windows of all documents in a row")
    add("--from-token", type=int, default=1, metavar="N", help="perplexity of the tokens N to "
        "--seq-len of each window (default: %(default)s)")
    add("--retrieval", type=int, nargs="+", default=[], metavar="LENGTH", help="measure retrieval from "
        "texts of these numbers of tokens instead, see retrieval.py")
    add("--retrieval-examples", type=int, default=20, metavar="N", help="of each task, depth and length "
        "(default: %(default)s)")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue, greedily")
    add("--new-tokens", type=int, default=64, help="tokens to continue each --prompt by "
        "(default: %(default)s)")
    args = p.parse_args(argv)
    for name in ("seq_len", "eval_windows", "inside_documents", "from_token", "look", "prompt",
                 "variant"):
        if args.retrieval and getattr(args, name) != p.get_default(name):
            p.error(f"--retrieval: expected no --{name.replace('_', '-')} beside it, which it has no "
                    "use for")
    check_common_options(p, args, "new_tokens", "from_token", "retrieval_examples")
    if args.from_token > args.seq_len:
        p.error(f"--from-token: expected at most the {args.seq_len} tokens of --seq-len, got "
                f"{args.from_token}")
    check_backend(p, "--backend", args.backend, args.device)
    args.sea = dict(args.sea)
    if any(k < 1 for k in args.topk):
        p.error(f"--topk: expected integers >= 1, got {args.topk}")
    if not args.model and not (Path(args.out) / "teacher").exists():
        p.error(f"--model: expected a teacher, or one that distill.py trained in --out, got {args.out}")
    if args.students is None:
        run, saved = run_of(Path(args.out) / "teacher"), [Path(args.out) / method for method in METHODS]
        args.students = [] if args.model else [str(path) for path in saved if run_of(path) == run]
    return args


# -- perplexity ------------------------------------------------------------------------------------


def perplexity(model, data: Tensor, args) -> float:
    """exp of the mean negative log likelihood; windows data (n, T) predict all tokens but the first."""
    return token_losses(model, data, args).mean().exp().item()


@torch.no_grad()
def token_losses(model, data: Tensor, args, chunk: int = 512) -> Tensor:
    """Negative log likelihood at each place of a window but the first, the mean over windows data
    (n, T), which processes share: (T - 1,)."""
    model.eval()
    total = torch.zeros(data.shape[1] - 1, dtype=torch.float64)
    for x, n in batches_of_process(data, args):
        with autocast(args):
            losses = losses_in_chunks(model, x, chunk)
        total += losses[:n].sum(0).cpu()
    total = over_processes(total.tolist(), args)
    return torch.tensor(total, dtype=torch.float64) / len(data)


def losses_in_chunks(model, x: Tensor, chunk: int) -> Tensor:
    """Of each token of x (B, T) but the first, (B, T - 1), without more than `chunk` tokens' logits at
    once: all those of a long window are 10 GB in half precision with a vocabulary of 150,000.

    The trunk runs once. Of what it gave, the model's own forward makes the logits of each chunk, with
    its scales and soft caps. It is one call of the model, whose hooks (an oracle's, FSDP's) run once.
    """
    trunk, given, losses = model.get_decoder(), [], []
    run_trunk, run_model = trunk.forward, model.forward

    def trunk_once(*args, **kwargs):
        if not given:
            given.append(run_trunk(*args, **kwargs))
        return given[0]

    def model_in_chunks(*args, **kwargs):
        places = torch.arange(x.shape[1] - 1, device=x.device)  # the last token predicts none
        for part, y in zip(places.split(chunk), x[:, 1:].split(chunk, dim=1)):
            output = run_model(*args, **kwargs, logits_to_keep=part)
            logits = output.logits.float().flatten(0, 1)
            losses.append(F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape))
        return output

    with forward_of(trunk, trunk_once), forward_of(model, model_in_chunks):
        model(x, use_cache=False)
    return torch.cat(losses, dim=1)


@contextlib.contextmanager
def forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` runs `forward` within."""
    before = vars(module).get("forward")  # most have their class's alone
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def batches_of_process(data: Tensor, args) -> Iterator[tuple[Tensor, int]]:
    """This process's windows, a micro-batch at a time, and how many of a batch count: all processes
    have as many batches, since with --shard each pass gathers weights from all."""
    rank, size = rank_and_size()
    mine = data[rank::size]
    for i in range(0, -(-len(data) // size), args.micro_batch):
        x = mine[i : i + args.micro_batch]
        yield (x if len(x) else data[:1]).to(args.device), len(x)


@torch.no_grad()
def keys_per_query(model, data: Tensor, args) -> float:
    """Mean keys that a query attends to, over layers, heads and the queries of one window."""
    with autocast(args), convert.record(model) as records:
        model(data[:1].to(args.device), use_cache=False, logits_to_keep=1)
    if records[0].sea is None or records[0].sea.row is None:  # dense, or a control without a choice
        return (data.shape[1] + 1) / 2
    return torch.stack([r.sea.n_attended().float().mean() for r in records]).mean().item()


Records = list[convert.Record]  # one a layer


@dataclass
class Setting:
    """What all models are measured with."""

    args: argparse.Namespace
    original: nn.Module  # the teacher as it was loaded
    teacher: nn.Module  # on the device
    tokenizer: object
    valid: Tensor  # (n, T) windows


def check_options(args) -> None:
    """The students that --sea and each of --topk change have to be able to have them."""
    for folder in args.students:
        saved = saved_config(folder)
        method = saved.get("sea", {}).get("method")
        if method not in WITH_TOPK:  # an oracle's is sea
            continue
        of_sea = args.sea if method == "sea" else {}
        free = convert.free_options(saved["sea"])
        for option, changes in [("--sea", of_sea), *(("--variant", x) for x in args.variant)]:
            if fixed := [name for name in changes if name not in free and method == "sea"]:
                sys.exit(f"{option}: expected {', '.join(free)} for the student in {folder}, which has "
                         f"its own of the others, got {', '.join(fixed)}")
        cases = [("--sea: expected fields that the student in {} can have", of_sea)]
        cases += [(f"--topk: expected numbers of keys for the student in {{}}, got {k}",
                   of_sea | dict(topk=k)) for k in args.topk]
        cases += [("--variant: expected fields that the student in {} can have at each --topk",
                   of_sea | variant | topk) for variant in args.variant if method == "sea"
                  for topk in ({}, *(dict(topk=k) for k in args.topk))]
        for expected, changes in cases:
            try:
                with_options(saved, **changes)
            except ValueError as error:
                sys.exit(f"{expected.format(folder)} ({error})")


def load_documents(args) -> list[str]:
    """Those to measure on."""
    if args.valid_data:
        return read_documents("--valid-data", args.valid_data)
    return load_texts(args, args.split)[1]


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
        try:
            n = len(tokenizer(prompt).input_ids)
        except Exception as error:  # whatever a tokenizer's own code raises
            sys.exit(f"--prompt: expected a text that the model's tokenizer takes, got {prompt[:40]!r} "
                     f"({reason(error)})")
        if not 0 < n <= most:
            sys.exit(f"--prompt: expected 1 to {most} tokens, since the model has {longest} positions "
                     f"and --new-tokens is {args.new_tokens}, got {n} in {prompt[:40]!r}")


# -- of one model ----------------------------------------------------------------------------------


def measure(model, setting: Setting) -> dict:
    args, valid = setting.args, setting.valid
    losses = token_losses(model, valid, args)  # of the tokens 2, 3, ...
    counted = losses[max(0, args.from_token - 2) :]
    return dict(ppl=counted.mean().exp().item(), keys=keys_per_query(model, valid, args),
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
        with autocast(args, cache_enabled=False):
            model(x, use_cache=False, logits_to_keep=1)

    return dict(pass_ms=milliseconds(run, graph=False, device=args.device),
                pass_mib=peak_mib(run) if args.device.startswith("cuda") else None)


@torch.no_grad()
def attention_time(model, x: Tensor, args) -> dict[str, float | str]:
    """ms that the attention alone of all layers takes on their q, k, v of one sequence x (1, T): a
    student's modules, their weights in the dtype of q, or PyTorch's SDPA, which a student runs in such a
    call if it is shorter than dense_below. clock: how it was timed; on a GPU all of it is one replayed
    CUDA graph, where a graph can hold it."""
    model.eval()
    with autocast(args), convert.record(model) as records:
        model(x.to(args.device), use_cache=False, logits_to_keep=1)
    inputs = [(r.q, r.k, r.v, r.scale) for r in records]
    del records  # a student's hold its scores
    runs, graph = [], True
    for module, (q, k, v, scale) in zip(convert.attention_modules(model), inputs, strict=True):
        if hasattr(module, "sea") and not convert.is_dense(module.sea, q.shape[2]):
            layer = copy.deepcopy(module.sea).to(q.dtype)
            runs.append(functools.partial(layer, q, k, v, softmax_scale=scale))
            # plain PyTorch's sparse attention checkpoints, which no graph can hold
            on_kernels = sea.operations(layer.config, q) is not sea.torch_operations
            graph = graph and (on_kernels or isinstance(layer, baselines.PerformerAttention))
        else:
            runs.append(functools.partial(sea.dense_attention, q, k, v, None, scale, is_first=True))

    def run():
        return [attention() for attention in runs]

    clock = "wall clock"
    if args.device.startswith("cuda"):
        clock = "replayed CUDA graph" if graph else "launched from Python"
    return dict(attention_ms=milliseconds(run, graph=graph, device=args.device), clock=clock)


@torch.no_grad()
def continuation(model, tokenizer, prompt: str, args) -> str:
    """The prompt's greedy continuation, with transformers' cache; plain text, whatever chat template
    there is."""
    model.eval()
    x = torch.tensor([tokenizer(prompt).input_ids], device=args.device)
    with autocast(args):
        # of one sequence no padding is needed, but not to name a token for it is warned of
        ids = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, pad_token_id=0,
                             max_new_tokens=args.new_tokens, synced_gpus=args.shard)
    return tokenizer.decode(ids[0, x.shape[1] :], skip_special_tokens=True)


# -- of a student ----------------------------------------------------------------------------------


def measure_student(name: str, folder: str, setting: Setting) -> dict[str, dict]:
    """Rows of the table: the student's, and one for each of --topk."""
    args, teacher = setting.args, setting.teacher
    method, student = open_student(folder, setting.original, teacher, args)
    row = measure(student, setting)
    if method != "oracle":  # whose cells come from a whole pass of the teacher
        row |= measure_use(student, setting)
    if method in ("sea", "oracle"):
        row |= dict(layers=layer_report(student, teacher, setting.valid[:n_reported(args)], args))
    if method == "sea":
        draw(student, teacher, setting.valid[0], picture(name, args), args)
    rows, own = {name: row}, own_options(student) if method == "sea" else {}
    if method in WITH_TOPK:
        rows |= at_each_topk(name, method, student, setting)
    for variant in args.variant if method == "sea" else []:
        convert.set_option(student, **own | variant)
        title = ", ".join([name, *(f"{field}={x}" for field, x in variant.items())])
        rows[title] = measure(student, setting) | times(student, setting)
        rows |= at_each_topk(title, method, student, setting)
    return rows


def own_options(student) -> dict[str, object]:
    """The fields of SEAConfig that no weight depends on, as the student has them."""
    options, config = student.config.sea, convert.attention_modules(student)[0].sea.config
    return {field: options.get(field, getattr(config, field)) for field in convert.free_options(options)}


def open_student(folder: str, original, teacher, args) -> tuple[str, nn.Module]:
    """Which of METHODS it is, and the student, on the device."""
    options = {} if args.backend is None else dict(backend=args.backend)
    method, student = load_student("--students", folder, original, teacher, **options)
    if method in ("sea", "oracle"):
        convert.set_option(student, **args.sea)
    return method, to_device(student, args)


def at_each_topk(name: str, method: str, student, setting: Setting) -> dict[str, dict]:
    rows = {}
    for k in setting.args.topk:
        convert.set_option(student, topk=k)
        found = measure(student, setting) | ({} if method == "oracle" else times(student, setting))
        rows[f"{name}, topk {k}"] = dict(student=name, topk=k) | found
    return rows


def n_reported(args) -> int:
    """Windows that the report on layers looks at: 8, or as many as 16,384 tokens are."""
    return max(1, min(8, 2**14 // args.seq_len))


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
    with autocast(args):
        with convert.record(teacher) as of_teacher:
            teacher(x.to(args.device), use_cache=False, logits_to_keep=1)
        with convert.record(student) as of_student:
            student(x.to(args.device), use_cache=False, logits_to_keep=1)
    return of_student, of_teacher


def estimate_report(student: convert.Record, teacher: convert.Record) -> Tensor:
    """Of one layer, (4,): KL(teacher's attention || estimate) in nats a query, and the least that cells
    of this width allow; the share of the teacher's attention that is kept, by the keys attended to, and
    by the best cells or bins, as many."""
    config, result, seen = student.config, student.sea, student.sea.seen
    ops, cells = sea.operations(config, teacher.q), config.cell_layout(result.in_cells)
    pooled = ops.pool_attention(teacher.q, teacher.k, seen, config.width, teacher.scale, **cells)
    best = best_scores(pooled, **cells)

    def kl(scores, row=None):  # what L_estimate gains by its weight
        with_kl, without = (sea.estimate_loss(scores, pooled, row=row, kl_weight=weight, **cells)
                            for weight in (1.0, 0.0))
        return with_kl - without

    if config.has_bins:
        shares = shares_in_bins(result, teacher)
    else:
        masks = result.mask, sea.topk_mask(best.softmax(-1), seen, config.topk, config.group)
        shares = [torch.where(result.is_dense[:, None], 1.0, (pooled.cells * mask).sum(-1)).mean()
                  for mask in masks]
    return torch.stack([kl(result.scores, result.row), kl(best), *shares])


def shares_in_bins(result: sea.SEAOutput, teacher: convert.Record, block: int = 256) -> list[Tensor]:
    """Of the teacher's attention, in the bins of a student, and in the best bins, as many; `block`
    queries at a time."""
    bin, shares = result.bin, []
    for i in range(0, teacher.q.shape[2], block):
        rows = slice(i, i + block)
        log_a, seen = sea.dense_log_probs(teacher.q[:, :, rows], teacher.k, result.seen[:, rows],
                                          teacher.scale)
        a = F.pad(log_a.exp() * seen, (0, -log_a.shape[-1] % bin)).unflatten(-1, (-1, bin)).sum(-1)
        bins = result.bins[:, :, rows].long()
        a = a.unflatten(1, (bins.shape[1], -1)).mean(2)  # of each chooser, (B, C, rows, bins)
        n = (bins * bin < result.seen[:, None, rows, None]).sum(-1, keepdim=True)
        best = a.topk(min(bins.shape[-1], a.shape[-1]), -1).values
        best = best * (torch.arange(best.shape[-1], device=a.device) < n)
        kept = F.pad(a, (0, 1)).gather(-1, bins.clamp(max=a.shape[-1]))
        found = torch.stack([kept.sum(-1), best.sum(-1)])  # (2, B, C, rows)
        shares.append(torch.where(result.is_dense[:, None, rows], 1.0, found))
    return list(torch.cat(shares, dim=-1).mean((1, 2, 3)))


# -- retrieval -------------------------------------------------------------------------------------


def retrieval_of_student(name: str, folder: str, original, teacher, examples: list[retrieval.Examples],
                         args) -> dict[str, dict]:
    """Rows of the table: the student's, and one for each of --topk."""
    method, student = open_student(folder, original, teacher, args)
    rows = {name: dict(retrieval=shares_found(name, student, examples, args))}
    for k in args.topk if method in WITH_TOPK else []:
        convert.set_option(student, topk=k)
        found = shares_found(f"{name}, topk {k}", student, examples, args)
        rows[f"{name}, topk {k}"] = dict(student=name, topk=k, retrieval=found)
    return rows


def shares_found(name: str, model, examples: list[retrieval.Examples], args) -> list[dict]:
    """Of each length and task. name: the model's."""
    shares = []
    for part in examples:
        found, (n, length) = solved(model, part, args), part.tokens.shape
        print(f"{name}: {int(found.sum())} of {n} found, in {length:,} tokens", flush=True)
        shares += retrieval.shares(part, found)
    return shares


@torch.no_grad()
def solved(model, examples: retrieval.Examples, args) -> Tensor:
    """Which examples a model solves, bool (n,); processes share them."""
    model.eval()
    found = torch.zeros(len(examples.tokens))
    for index, n in batches_of_process(torch.arange(len(found)), args):
        mine = index.cpu()
        x, n_answer = examples.tokens[mine].to(args.device), examples.n_answer[mine].to(args.device)
        with autocast(args):
            found[mine[:n]] = retrieval.is_solved(model, x, n_answer)[:n].float().cpu()
    return torch.tensor(over_processes(found.tolist(), args)).bool()


# -- figures ---------------------------------------------------------------------------------------


DRAWN = 4096  # tokens of a sequence at most: a picture takes several (H, T, T)


def picture(name: str, args) -> Path:
    return Path(args.out) / (name.replace("/", "-") + ".png")


@torch.no_grad()
def draw(student, teacher, x: Tensor, path: Path, args) -> None:
    """draw_heads of one sequence x (T,), or of its first tokens, whose attention is the same without the
    later ones."""
    students, teachers = both_records(student, teacher, x[None, :DRAWN], args)
    if rank_and_size()[0]:
        return
    if len(x) > DRAWN:
        print(f"{path.name} shows the first {DRAWN:,} tokens of {len(x):,}")
    draw_heads(students, teachers, path, args.look)


def draw_heads(students: Records, teachers: Records, path: Path, look: list[tuple[int, int]]) -> None:
    """Panels of each head to look at, of records of a first sequence without padding. Without any of one
    head: the median by the share of the teacher's attention that the keys attended hold."""
    heads = look or [median_head(students, teachers)]
    plt = pyplot()
    images = [panels(students[layer], teachers[layer], layer, head) for layer, head in heads]
    n_panel = len(images[0])
    figure, axes = plt.subplots(len(heads), n_panel, figsize=(4.25 * n_panel, 4.4 * len(heads)),
                                layout="constrained", squeeze=False)
    for row, of_head in zip(axes, images):
        draw_head(figure, row, of_head)
    figure.savefig(path, dpi=170)  # two pixels a column: with less than one, whole columns are left out
    plt.close(figure)


def attention_of(teacher: convert.Record, student: convert.Record) -> Tensor:
    """The teacher's attention of the first sequence, (H, T, T)."""
    log_a, sees = sea.dense_log_probs(teacher.q[:1], teacher.k[:1], student.sea.seen[:1], teacher.scale)
    return (log_a.exp() * sees)[0]


def kept_keys(record: convert.Record) -> Tensor:
    """Which keys a student's first sequence attends to, (H, T, T)."""
    return record.sea.attended(record.k.shape[2])[0]


def share_kept(student: convert.Record, teacher: convert.Record) -> Tensor:
    """Of the teacher's attention, by each head's keys, (H,)."""
    return (attention_of(teacher, student) * kept_keys(student)).sum((1, 2)) / teacher.q.shape[2]


def median_head(students: Records, teachers: Records) -> tuple[int, int]:
    shares = torch.cat([share_kept(s, t) for s, t in zip(students, teachers)])  # one layer at a time
    middle = shares.argsort()[len(shares) // 2].item()
    return divmod(middle, students[0].q.shape[1])


def panels(student: convert.Record, teacher: convert.Record, layer: int,
           head: int) -> dict[str, Tensor]:
    """Title -> image (T, T) of one head, -inf where there is nothing: log10 of attention, or bool."""
    result, config, T = student.sea, student.config, student.q.shape[2]
    kept = kept_keys(student)[head]
    scores = sea.repeat_heads(result.scores[:1], config.n_head)
    scores = scores[:, head : head + 1, result.row[0]].float()  # (1, 1, T, width)
    estimate = sea.spread_to_keys(scores, result.in_cells[:1], T, -torch.inf, config.unit)[0, 0]
    estimate[:, : config.n_first * config.bin] = -torch.inf  # these, as the last keys, are in no cell
    sparse = sea.attention_weights(student.q[:1], student.k[:1], result.attended(T)[:1],
                                   student.scale)[0, head]
    seen = result.seen[0]
    unseen = torch.arange(T, device=seen.device) >= seen[:, None]

    def log10(attention, hidden):
        return attention.float().clamp(min=1e-4).log10().masked_fill(hidden, -torch.inf).cpu()

    images = {
        f"the model's attention\n(layer {layer}, head {head})":
            log10(attention_of(teacher, student)[head], unseen),
        f"SEA's estimate of it,\n{scores.shape[3]} cells a row":
            log10(estimate.softmax(-1), estimate == -torch.inf),
    }
    if config.has_bins:
        images["the keys under the best cells:\ncandidates"] = candidates(student, head).cpu()
    share = share_kept(student, teacher)[head].item()
    n_kept = kept.sum(1).float().mean()
    images[f"the keys it keeps: {n_kept:.0f} of {seen.float().mean():,.0f} a query,\n"
           f"which hold {share:.0%} of the model's attention"] = kept.cpu()
    images["SEA's attention\nover these keys"] = log10(sparse, unseen | ~kept)
    return {f"{i}. {title}": image for i, (title, image) in enumerate(images.items(), 1)}


def candidates(student: convert.Record, head: int) -> Tensor:
    """Which keys of the first sequence compete to be chosen, with bins: bool (T, T). The first keys do
    not, which all queries attend to."""
    result, config, (_, H, T, _) = student.sea, student.config, student.q.shape
    in_cells, scores = result.in_cells[:1], result.scores[:1, :, result.row[0]]
    cells = sea.candidate_cells(scores, in_cells // config.bin, config, config.n_chosen(config.topk))
    chooser = head * cells.shape[1] // H
    keys = sea.spread_to_keys(cells, in_cells, T, False, config.bin)[0, chooser]
    return keys & (torch.arange(T, device=keys.device) >= config.n_first * config.bin)


def draw_head(figure, axes, images: dict[str, Tensor]) -> None:
    for axis, (title, image) in zip(axes, images.items()):
        T, is_mask = len(image), image.dtype == torch.bool
        # What is larger than the picture: the largest of each square, so that no single key is lost.
        small = F.max_pool2d(image.float()[None], -(-T // 256), ceil_mode=True)[0]
        small = small.masked_fill(small == -torch.inf, torch.nan).numpy()
        style = dict(cmap="gray_r", vmin=0, vmax=1) if is_mask else dict(cmap="magma", vmin=-4, vmax=0)
        shown = axis.imshow(small, interpolation="nearest", extent=(0, T, T, 0), **style)
        # the first key, which many heads rest on, beside the frame, not under it
        axis.set(xlabel="key", ylabel="query", title=title, xlim=(-T / 50, T))
        axis.set_facecolor("1" if is_mask else "0.8")
    figure.colorbar(shown, ax=axes, label="log10 attention", shrink=0.85)


def draw_curves(rows: dict[str, dict], path: Path, seq_len: int, device: str,
                from_token: int = 1) -> None:
    """Perplexity and time against topk, a line for each SEA student; other models as horizontals."""
    swept = [row for row in rows.values() if "topk" in row]
    timed = (f"from q, k, v on, estimator included, all layers,\na sequence of {seq_len:,}, "
             f"{rows['teacher']['clock']}, {device}")
    points = {name: {row["topk"]: row for row in swept if row["student"] == name}
              for name in dict.fromkeys(row["student"] for row in swept)}
    lines = {name: row for name, row in rows.items()
             if name not in points and "topk" not in row and "attention_ms" in row}
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counted = f"\nof tokens {from_token:,}-{seq_len:,}" if from_token > 1 else ""
    draw_curve(left, points, lines, "ppl", "validation perplexity" + counted)
    draw_curve(right, points, lines, "attention_ms", "ms a sequence, attention alone")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend()
    right.set_ylim(bottom=0)
    right.set_title(timed, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)

    def keep(row: dict) -> dict:
        return {field: row[field] for field in ("ppl", "attention_ms", "clock") if field in row}

    path.with_suffix(".json").write_text(as_json(dict(
        points={name: {k: keep(row) for k, row in line.items()} for name, line in points.items()},
        lines={name: keep(row) for name, row in lines.items()}, timed=timed, from_token=from_token),
        indent=1))


def draw_curve(axis, points: dict, lines: dict, field: str, label: str) -> None:
    for name, line in points.items():
        found = {k: row[field] for k, row in line.items() if field in row}  # an oracle has no time
        if found:
            axis.plot(list(found), list(found.values()), marker="o", label=name)
    for style, (name, row) in zip(("--", ":", "-.") * len(lines), lines.items()):
        axis.axhline(row[field], linestyle=style, color="gray", label=name)
    ticks = sorted({k for line in points.values() for k in line})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.set(xlabel="topk, keys per query and head", ylabel=label)
    axis.grid(alpha=0.3)


# -- tables ----------------------------------------------------------------------------------------


def name_width(rows: dict[str, dict]) -> int:
    return max(18, *map(len, rows))


def print_models(rows: dict[str, dict]) -> None:
    print(f"\n{'':{name_width(rows)}} {'val ppl':>9} {'ratio':>7} {'keys/query':>11} {'attention':>12} {'a pass':>12} "
          f"{'memory':>12}")
    for name, row in rows.items():
        ratio = row["ppl"] / rows["teacher"]["ppl"]
        costs = [("attention_ms", ".2f", "ms"), ("pass_ms", ".1f", "ms"), ("pass_mib", ",.0f", "MiB")]
        cells = ("" if row.get(field) is None else f"{row[field]:{form}} {unit}"
                 for field, form, unit in costs)
        line = f"{name:{name_width(rows)}} {row['ppl']:9.2f} {ratio:7.3f} {row['keys']:11.1f} "
        print((line + " ".join(f"{cell:>12}" for cell in cells)).rstrip())
    print(f"attention: of all layers, from q, k, v on, {rows['teacher'].get('clock', 'not timed')}\n"
          "a pass: one sequence through the whole model, launched from Python, logits of its last "
          "token\n"
          "memory: of a pass, above the weights")


def print_positions(rows: dict[str, dict]) -> None:
    blocks = rows["teacher"]["by_position"]
    titles = (f"{block['first']:,}-{block['last']:,}" for block in blocks)
    print(f"\n{'val ppl of tokens':{name_width(rows)}} " + " ".join(f"{title:>13}" for title in titles))
    for name, row in rows.items():
        print(f"{name:{name_width(rows)}} " + " ".join(f"{b['ppl']:13.2f}" for b in row["by_position"]))


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
        print(f"\n{'prompt':{name_width(rows)}} {prompt!r}")
        for name, row in rows.items():
            if "continuations" in row:
                print(f"{name:{name_width(rows)}} {row['continuations'][i]!r}")


def name_students(folders: list[str]) -> dict[str, str]:
    """Name -> folder: the last part of its path where that tells them apart."""
    short = [Path(folder).name for folder in folders]
    clear = len(set(short)) == len(short) and "teacher" not in short
    return dict(zip(short if clear else folders, folders))


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Returns what is known of each model, by the names in the table."""
    args = parse(argv)
    header = start("evaluate.py", argv, args)
    with room_for(args.out):
        rows = (measure_retrieval if args.retrieval else measure_all)(args, header)
    stop_processes()
    return rows


def measure_all(args, header: dict[str, str]) -> dict[str, dict]:
    check_options(args)
    original, tokenizer = load_teacher(args.model or Path(args.out) / "teacher", args.seq_len)
    check_against_model(args, original, tokenizer)
    valid = validation_windows(original, tokenizer, args)
    teacher = to_device(copy.deepcopy(original) if args.shard else original, args)

    setting = Setting(args, original, teacher, tokenizer, valid)
    print(f"{len(valid)} windows of {args.seq_len}, no overlap" +
          (f", val ppl of tokens {args.from_token:,}-{args.seq_len:,}" if args.from_token > 1 else ""),
          flush=True)
    rows = {"teacher": measure(teacher, setting) | measure_use(teacher, setting)}
    for name, folder in name_students(args.students).items():
        rows |= measure_student(name, folder, setting)
        print(f"{name}: val ppl {rows[name]['ppl']:.2f}", flush=True)

    print_models(rows)
    print_positions(rows)
    print_layers(rows)
    print_continuations(rows, args.prompt)
    if rank_and_size()[0] == 0:
        if args.topk and not args.shard:
            draw_curves(rows, Path(args.out) / "topk", args.seq_len, header["device"], args.from_token)
        write_report("evaluate.json", rows, args, header)
    print(f"\nwritten to {args.out}/")
    return rows


def write_report(name: str, rows: dict[str, dict], args, header: dict[str, str]) -> None:
    (Path(args.out) / name).write_text(as_json(dict(**header, args=vars(args), models=rows), indent=1))


def validation_windows(teacher, tokenizer, args) -> Tensor:
    """(n, T)."""
    if args.inside_documents:
        documents = token_streams(lambda: [[x] for x in load_documents(args)], tokenizer, teacher, args)
        return windows_inside(documents, args.seq_len, args.eval_windows)
    (tokens,) = token_streams(lambda: [load_documents(args)], tokenizer, teacher, args)
    return windows(tokens, args.seq_len, args.eval_windows, "validation text")


def measure_retrieval(args, header: dict[str, str]) -> dict[str, dict]:
    check_options(args)
    longest = max(args.retrieval)
    original, tokenizer = load_teacher(args.model or Path(args.out) / "teacher", longest, "--retrieval")
    (text,) = token_streams(lambda: [["\n\n\n".join(load_documents(args))]], tokenizer, original, args)
    try:
        examples = [retrieval.make_examples(tokenizer, text, length, args.retrieval_examples)
                    for length in args.retrieval]
    except ValueError as error:
        sys.exit(f"--retrieval: {error}")
    teacher = to_device(copy.deepcopy(original) if args.shard else original, args)

    rows = {"teacher": dict(retrieval=shares_found("teacher", teacher, examples, args))}
    for name, folder in name_students(args.students).items():
        rows |= retrieval_of_student(name, folder, original, teacher, examples, args)
    retrieval.print_tables(rows)
    if rank_and_size()[0] == 0:
        write_report("retrieval.json", rows, args, header)
    print(f"\nwritten to {args.out}/")
    return rows


if __name__ == "__main__":
    main()
