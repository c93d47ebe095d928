"""SEA inside Hugging Face models: attach, save, load.

SEA enters through transformers' attention interface: a registered attention function and one `SEAttention`, named `sea`,
on each attention module. No modelling code is copied, so every model whose attention goes through that interface works
(OPT, GPT-2, BERT, Llama and their relatives).

    model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", dtype=torch.float32)
    attach(model, width=256, topk=64)
    ...                                         # train, see distill.py
    save(model, "student")
    model = load("student")
    model.generate(...)                         # with transformers' KV cache; the estimator's state rides along

The estimator's state has a constant size, whatever the context: SEAState in sea.py, of which a cache layer holds one.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from baselines import BASELINES
from sea import (SEAConfig, SEAOutput, SEAState, SEAttention, at_least_fp32, attention_weights, check_qkv,
                 first_key_of_cell, scale_or_default, take, valid_first)

# Queries of a prefill that are computed at once where no gradient is wanted. A query's estimate takes about ten times the
# memory of its key and value, so that of a long prompt would grow to that of a whole model's KV cache; chunks of 16,384 cost a
# quarter more time at 131,072 tokens, since Python has to launch each.
ROWS_AT_ONCE = 65536


@dataclass
class Record:
    """What one attention layer saw and gave in one forward pass: q, out (B, H, T, D) and k, v (B, Hkv, S, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    out: Tensor
    sea: SEAOutput | None = None  # None in a teacher, as is config
    config: SEAConfig | None = None


class SEALayer(DynamicLayer):
    """One layer of transformers' dynamic KV cache, with the estimator's state: beams, batches and resets take both along."""

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.state: SEAState | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.state is not None:
            self._select(torch.arange(len(self.state.count)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(index.to(self.state.count.device))

    def reset(self) -> None:
        super().reset()
        self.state = None

    def crop(self, *args) -> None:
        raise ValueError("past_key_values: expected no crop (assisted decoding does so), since the estimator's sums cannot "
                         "forget a token")

    def offload(self) -> None:
        raise ValueError("past_key_values: expected a cache that stays where it is, got one that is offloaded")


def bring_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before an attention module runs: give its layer of the cache a state, and show it to sea_attention.

    generate() and use_cache=True make a cache of plain layers; an empty one is replaced. Tokens that are in a plain layer
    already have left no state.
    """
    # Its name differs: past_key_values, from transformers 5.24 on cache, layer_past in GPT-NeoX.
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if cache is None:
        return args, kwargs
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"past_key_values: expected none, since {type(module).__name__} has no layer_idx; pass use_cache=False")
    if not hasattr(cache, "layers"):
        raise ValueError(f"past_key_values: expected a transformers DynamicCache, got {type(cache).__name__}")
    while len(cache.layers) <= module.layer_idx:  # a cache made without a config adds its layers when they are used
        cache.layers.append(SEALayer())
    layer = cache.layers[module.layer_idx]
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
        cache.layers[module.layer_idx] = SEALayer()
    elif not isinstance(layer, SEALayer):
        raise ValueError(f"past_key_values: expected a DynamicCache that is empty or that this model has filled, got a "
                         f"{type(layer).__name__} of {layer.get_seq_length()} tokens")
    return args, {**kwargs, "sea_layer": cache.layers[module.layer_idx]}


def sea_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  scaling: float | None = None, sea_layer: SEALayer | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: (B, H, T, D) in, (B, T, H, D) out, and weights if they are wanted.

    attention_mask is None or bool (B, S), False where padded: flash_attention_mask, registered below, makes it so.
    """
    if not hasattr(module, "sea"):
        raise ValueError(f"model: expected SEA attached (convert.attach or convert.load), got a plain {type(module).__name__}")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, SEA has no such attention, got {kwargs[name]}")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask: expected 2 dimensions (B, S), got shape {tuple(attention_mask.shape)}")
    query, key, value = _autocast(query, key, value)
    valid = None if attention_mask is None else attention_mask.bool()
    state = None if sea_layer is None else sea_layer.state
    wants_weights = getattr(module, "sea_weights", False)
    needs_all = torch.is_grad_enabled() or wants_weights or getattr(module, "sea_records", None) is not None
    in_chunks = module.sea.config.causal and not needs_all
    result = module.sea(query, key, value, valid=valid, softmax_scale=scaling, state=state,
                        kv_cached=sea_layer is not None, rows_at_once=ROWS_AT_ONCE if in_chunks else None)
    if sea_layer is not None:
        sea_layer.state = result.state
    _record(module, query, key, value, scaling, result.out, result)
    weights = _weights(query, key, valid, scaling, result) if wants_weights else None
    return result.out.transpose(1, 2).contiguous(), weights


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its dtype, as SDPA takes them: rotary embeddings of fp32 weights leave q and k in fp32, beside v."""
    device = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors) if torch.is_autocast_enabled(device) else tensors


MOST_WEIGHTS = 2**28  # numbers in a layer's attention matrix, 1 GiB


@torch.no_grad()
def _weights(q: Tensor, k: Tensor, valid: Tensor | None, scale: float | None, result: SEAOutput) -> Tensor:
    """For output_attentions=True: the sparse attention, before the gates, (B, H, T, S)."""
    if result.cells is None:
        raise ValueError("output_attentions: expected a SEA student, got a Performer, which has no attention matrix")
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if size > MOST_WEIGHTS:
        raise ValueError(f"output_attentions: expected at most {MOST_WEIGHTS:,} numbers a layer, got {size:,}; attention_csr "
                         "gives the same as sparse matrices, of what convert.record sees")
    if valid is None:
        return attention_weights(q, k, result.mask, result.seen, scale)
    order = valid_first(valid)  # as SEA ranks keys
    ranked = attention_weights(q, take(k, order), result.mask, result.seen, scale)
    return torch.zeros_like(ranked).scatter(-1, order[:, None, None].expand_as(ranked), ranked)


@torch.no_grad()
def attention_csr(q: Tensor, k: Tensor, cells, seen: Tensor, softmax_scale: float | None = None, *,
                  row: Tensor | None = None, block: int = 2**20) -> list[list[Tensor]]:
    """sea.attention_weights as sparse matrices: for each sequence and head a torch CSR tensor (T, S), fp32 at least.

    Arguments as in sea.sparse_attention; cells: SEAOutput.cells, a bool mask or kernels.CellBits. Column j is the key of
    rank j, as in k. Times v it is the sparse context, before the gates. Memory is a few times that of the result, 12 bytes
    a number, and `block` products q k at a time: nothing is T x S.
    """
    check_qkv(q, k, k)
    B, H, T, D = q.shape
    scale, group = scale_or_default(softmax_scale, D), H // k.shape[1]

    def matrix(b: int, h: int) -> Tensor:
        if isinstance(cells, Tensor):
            mask = cells[b, h]
        else:  # unpack one head at a time
            mask = type(cells)(cells.bits[b : b + 1, h : h + 1], cells.width).unpack()[0, 0]
        mask = (mask if row is None else mask[row[b]]) & (seen[b] > 0)[:, None]  # (T, width)
        query, key = _kept_keys(mask, seen[b])
        return _softmax_csr(at_least_fp32(q[b, h]) * scale, at_least_fp32(k[b, h // group]), query, key, block)

    return [[matrix(b, h) for h in range(H)] for b in range(B)]


def _kept_keys(mask: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key of each pair that a mask of cells (T, width) keeps, by query and then by key."""
    query, cell = mask.nonzero(as_tuple=True)
    first = first_key_of_cell(cell, seen[query], mask.shape[1])
    n = first_key_of_cell(cell + 1, seen[query], mask.shape[1]) - first  # keys under each cell
    before = n.cumsum(0) - n
    key = torch.arange(int(n.sum()), device=mask.device) + (first - before).repeat_interleave(n)
    return query.repeat_interleave(n), key


def _softmax_csr(q: Tensor, k: Tensor, query: Tensor, key: Tensor, block: int) -> Tensor:
    """softmax(q k^T) over the pairs (query, key), CSR (T, S); `block` of their products at a time."""
    scores = [(q[i] * k[j]).sum(-1) for i, j in zip(query.split(block), key.split(block))]
    scores = torch.cat(scores) if scores else q.new_zeros(0)
    n_key = torch.bincount(query, minlength=len(q))  # of each query
    lowest = torch.finfo(scores.dtype).min
    top = torch.segment_reduce(scores, "max", lengths=n_key, unsafe=True, initial=lowest)
    weights = (scores - top[query]).exp()
    weights = weights / torch.segment_reduce(weights, "sum", lengths=n_key, unsafe=True, initial=0)[query]
    rows = torch.cat([n_key.new_zeros(1), n_key.cumsum(0)])
    return torch.sparse_csr_tensor(rows, key, weights, size=(len(q), len(k)), check_invariants=False)


def _ask_weights(ask: bool, model: PreTrainedModel, args: tuple, kwargs: dict, output=None) -> None:
    """Before and after a model runs, if its caller wants weights: tell its attention modules, since not all models pass it on."""
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and model.config.output_attentions):
        for module in attention_modules(model):
            module.sea_weights = ask


def teacher_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, **kwargs) -> tuple[Tensor, None]:
    """transformers' SDPA attention, which also records what a student learns from."""
    query, key, value = _autocast(query, key, value)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    _record(module, query, key, value, scaling, out.transpose(1, 2))
    return out, None


AttentionInterface.register("sea", sea_attention)
AttentionInterface.register("sea_teacher", teacher_attention)
# Without a mask function of its own an attention function never hears of padding.
AttentionMaskInterface.register("sea", flash_attention_mask)
AttentionMaskInterface.register("sea_teacher", sdpa_mask)


def _record(module, q, k, v, scale, out, sea=None) -> None:
    if getattr(module, "sea_records", None) is not None:
        config = None if sea is None else module.sea.config
        module.sea_records.append(Record(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, out, sea, config))


@contextmanager
def record(model: nn.Module) -> Iterator[list[Record]]:
    """Collect a Record from each attention layer, in the order they run. `model` runs "sea" or "sea_teacher" attention."""
    records, modules = [], attention_modules(model)
    for module in modules:
        module.sea_records = records
    try:
        yield records
    finally:
        for module in modules:
            module.sea_records = None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a transformers model: they alone say whether they are causal."""
    return [m for m in model.modules() if hasattr(m, "is_causal")]


METHODS = {"sea": SEAttention, **BASELINES}  # what stands in for a model's attention


def attach(model: PreTrainedModel, method: str = "sea", **options) -> PreTrainedModel:
    """Give each attention layer of `model` a SEAttention or a control, in place, and switch the model to it.

    method: "sea", or a control of baselines.py. options: fields of sea.SEAConfig; heads, head size, causality and the longest
    sequence come from the model. Load the model first: new weights keep the initialisation of SEAttention. Raises
    ValueError if the model has no attention of the kind that the attention interface serves.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {method!r}")
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"model: expected self-attention modules with `is_causal`, got none in {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: expected self-attention only, got {type(model).__name__}, an encoder and decoder")
    text = model.config.get_text_config()
    n_head = text.num_attention_heads
    shape = dict(n_head=n_head, d_head=getattr(text, "head_dim", None) or text.hidden_size // n_head,
                 n_kv_head=getattr(text, "num_key_value_heads", None), max_positions=text.max_position_embeddings)
    for i, module in enumerate(modules):
        if getattr(module, "is_cross_attention", False):
            raise ValueError(f"model: expected self-attention only, got cross-attention in {type(module).__name__}")
        config = SEAConfig(**{**shape, "causal": bool(module.is_causal), "seed": i, **options})
        weight = next(module.parameters())
        module.sea = METHODS[method](config).to(weight.device, weight.dtype)
        if config.causal:
            module.register_forward_pre_hook(bring_cache, with_kwargs=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.register_forward_pre_hook(functools.partial(_ask_weights, True), with_kwargs=True)
            part.register_forward_hook(functools.partial(_ask_weights, False), with_kwargs=True, always_call=True)
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*shape, "causal", "seed")}
    model.config.sea = {"method": method, **fields, **options}
    model.set_attn_implementation("sea")
    if text._attn_implementation != "sea":
        raise ValueError(f"model: expected one whose attention goes through transformers' interface, got {type(model).__name__}")
    return model


def set_option(model: PreTrainedModel, **options) -> None:
    """Change fields of SEAConfig that no weight depends on, of any trained student: topk (the paper's dynamic k), group, backend."""
    for name in options:
        if name not in ("topk", "group", "backend"):
            raise ValueError(f"options: expected topk, group or backend, got {name}, which the weights depend on")
    for module in attention_modules(model):
        module.sea.config = dataclasses.replace(module.sea.config, **options)
    model.config.sea = {**model.config.sea, **options}


def sea_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that `attach` added."""
    return [name for name, _ in model.named_parameters() if ".sea." in name]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield `path`.new, to write a file or a folder to, which then takes the place of `path`, whole and on the disk.

    What is written is synced before the rename, so neither a kill nor a power loss leaves half of it: `path` is the old one
    or the new one. Between the two renames that a folder takes there is `path`.old, and `whole` finds the new one. An exception
    removes what was written. Links are followed. Raises ValueError if the working directory is `path` or within.
    """
    path = Path(os.path.realpath(path))
    if path in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"path: expected none that holds the working directory, which would go with the old one, got {path}")
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    if whole(path) != path:
        os.replace(whole(path), path)
    _remove(new)
    _remove(old)
    try:
        yield new
        for written in (*new.rglob("*"), new):
            _sync(written)
        if path.is_dir():  # which no rename replaces
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        _remove(new)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # a network's disk keeps what is open


def whole(path: Path) -> Path:
    """`path`, or what stands for it after a kill between the two renames of `replacing`: that was whole before the first."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    if path.exists() or not old.exists():
        return path
    return new if new.exists() else old


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    if os.name == "nt":
        return  # Windows opens no folders, and syncs what is open for writing only
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(model: PreTrainedModel, folder: str | os.PathLike, tokenizer=None, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors, and the tokenizer's files, in place of `folder` if it exists.

    state_dict: the whole weights of a `model` that holds shards of them (FSDP2).
    A kill or a power loss leaves the old model or the new one, see `replacing`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"folder: expected a new folder or a saved model, got {folder}, which holds something else")
    if state_dict is not None:  # gathered weights are tied no more
        state_dict = {name: x for name, x in state_dict.items() if name not in model.all_tied_weights_keys}
    with replacing(folder) as new:
        model.save_pretrained(new, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def load(folder: str | os.PathLike, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model that `save` wrote, SEA included, in eval mode. dtype: as saved by default.

    transformers' own from_pretrained would drop the SEA weights with no more than a warning. Raises ValueError if
    `folder` is not such a model or lacks weights.
    """
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"folder: expected a model saved by convert.save, got {folder}, which has no config.json")
    config = AutoConfig.from_pretrained(folder)
    options = getattr(config, "sea", None)
    if options is None:
        raise ValueError(f"folder: expected a model with SEA, got a plain {config.model_type} in {folder}")
    model = getattr(transformers, config.architectures[0])(config)
    attach(model, **options)
    _cast(model, config.dtype)
    missing = set(model.state_dict())
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        missing -= tensors.keys()
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"folder: expected the weights of {type(model).__name__}, got {unexpected[:3]} in {file}")
    model.tie_weights()
    missing -= set(model.all_tied_weights_keys)
    if missing:
        raise ValueError(f"folder: expected all weights, got none for {sorted(missing)[:3]} in {folder}")
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _cast(model, dtype or config.dtype).eval()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights only, as from_pretrained does: a rotary embedding's frequencies would lose their far positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
