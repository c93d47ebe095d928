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
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
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
from transformers.masking_utils import (bidirectional_mask_function, causal_mask_function, flash_attention_mask,
                                        packed_sequence_mask_function, sdpa_mask)

from baselines import BASELINES
from sea import (SEAConfig, SEAOutput, SEAState, SEAttention, at_least_fp32, attention_weights, check_qkv,
                 first_key_of_cell, in_documents, scale_or_default, take, valid_first)

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


# Keywords that reach attention functions and ask for no other attention.
HARMLESS = ("dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
            "logits_to_keep", "cache_position", "num_items_in_batch")
OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # say what position_ids say


def sea_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                  scaling: float | None = None, sea_layer: SEALayer | None = None, sea_documents: Tensor | None = None,
                  is_causal: bool | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: (B, H, T, D) in, (B, T, H, D) out, and weights if they are wanted.

    attention_mask: what sea_mask returned. sea_layer: of bring_cache. sea_documents (B, T): the packed document of each token,
    of complete_positions. Raises ValueError for attention of another kind, which any other keyword may ask for.
    """
    if not hasattr(module, "sea"):
        raise ValueError(f"model: expected SEA attached (convert.attach or convert.load), got a plain {type(module).__name__}")
    _check_attention(module, attention_mask, sea_documents, is_causal, kwargs)
    query, key, value = _autocast(query, key, value)
    records, wants_weights = getattr(module, "sea_records", None), getattr(module, "sea_weights", False)
    if sea_documents is not None:
        if wants_weights or records is not None:
            raise ValueError("position_ids: expected one document a sequence, since weights or records are wanted, got several")
        result = in_documents(module.sea, sea_documents, query, key, value, softmax_scale=scaling)
        return result.out.transpose(1, 2).contiguous(), None
    valid = None if attention_mask is None else attention_mask.bool()
    state = None if sea_layer is None else sea_layer.state
    in_chunks = module.sea.config.causal and not (torch.is_grad_enabled() or wants_weights or records is not None)
    result = module.sea(query, key, value, valid=valid, softmax_scale=scaling, state=state,
                        kv_cached=sea_layer is not None, rows_at_once=ROWS_AT_ONCE if in_chunks else None)
    if sea_layer is not None:
        sea_layer.state = result.state
    _record(module, query, key, value, scaling, result.out, result)
    weights = _weights(query, key, valid, scaling, result) if wants_weights else None
    return result.out.transpose(1, 2).contiguous(), weights


def _check_attention(module: nn.Module, mask: Tensor | None, documents: Tensor | None, is_causal: bool | None, kwargs: dict) -> None:
    """Raises ValueError if a call asks for other attention than that of the layer attached to `module`."""
    causal, packed = module.sea.config.causal, documents is not None
    for wanted in (is_causal, getattr(getattr(module, "config", None), "is_causal", None)):
        if wanted is not None and bool(wanted) != causal:
            raise ValueError(f"is_causal: expected {causal}, as SEA was attached to {type(module).__name__}, got {wanted}; "
                             "attach(model, causal=...) decides")
    for name, x in kwargs.items():
        if not (x is None or x is False or name in HARMLESS or (packed and name in OF_PACKING)):
            got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x
            raise ValueError(f"{name}: expected None, SEA has no such attention, got {got}")
    if mask is not None and mask.ndim != (3 if packed else 2):
        got = f"one of shape {tuple(mask.shape)}" if mask.numel() else "another (windows, prefixes, packed documents, ...)"
        raise ValueError(f"attention_mask: expected a causal or bidirectional mask, with padding of shape (B, S), got {got}")


def sea_mask(*args, mask_function: Callable = causal_mask_function, **kwargs) -> Tensor | None:
    """The mask function that transformers calls: None, or bool (B, S), False where padded.

    Empty, with 3 dimensions, where documents are packed: sea_documents says which. A mask of another kind is empty with 4, and
    refused only if it reaches an attention module: models make some that do not.
    """
    parts = set(_parts(mask_function))
    if not parts <= {causal_mask_function, bidirectional_mask_function, packed_sequence_mask_function}:
        return torch.empty(0, 0, 0, 0)
    if packed_sequence_mask_function in parts:
        return torch.empty(0, 0, 0)
    return flash_attention_mask(*args, mask_function=mask_function, **kwargs)


def _parts(mask_function: Callable) -> Iterator[Callable]:
    """The mask functions whose intersection one of transformers' is, and for packed documents the function that made it."""
    maker = getattr(mask_function, "__qualname__", "").partition(".")[0]
    if maker == "and_masks":
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    elif maker == "remap_positions_for_packed_sequence":
        yield from _parts(inspect.getclosurevars(mask_function).nonlocals["mask_function"])
    else:
        yield packed_sequence_mask_function if maker == "packed_sequence_mask_function" else mask_function


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


def complete_positions(names: tuple[str, ...], rotary: bool, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a model runs, whose arguments are `names`: count positions from the first token, and find packed documents.

    Rotary models count positions from the first column, padding or not. Dense attention sees only differences of positions,
    but SEA's features see where a token stands. And where positions begin again, documents are packed, as transformers'
    DataCollatorWithFlattening does; a KV cache would not know, so that there is none.
    """
    given = dict(zip(names, args)) | kwargs
    mask, position = given.get("attention_mask"), given.get("position_ids")
    x = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if rotary and position is None and isinstance(mask, Tensor) and mask.ndim == 2 and x is not None:
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    if mask is None and x is not None and position is not None and position.ndim == 2 and "sea_documents" not in given:
        begins = position.diff(dim=1) != 1
        if begins.any():
            if any(isinstance(y, Cache) for y in given.values()):
                raise ValueError("position_ids: expected no packed documents (positions that begin again) with past_key_values")
            documents = torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(len(x), -1)
            given |= dict(use_cache=False, sea_documents=documents)
    return (), given


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
AttentionMaskInterface.register("sea", sea_mask)
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
    ValueError, with the model as it was, if its attention is of another kind.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {method!r}")
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"model: expected self-attention modules with `is_causal`, got none in {type(model).__name__}")
    seed = options.get("seed", 0)
    layers = [_layer_of(module, model, method, {**options, "seed": seed + i}) for i, module in enumerate(modules)]
    _switch_to_sea(model, modules)

    for module, layer in zip(modules, layers):
        module.sea = layer
        if layer.config.causal:
            module.register_forward_pre_hook(bring_cache, with_kwargs=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            names = tuple(inspect.signature(part.forward).parameters)
            if "position_ids" in names:
                complete = functools.partial(complete_positions, names, hasattr(part, "rotary_emb"))
                part.register_forward_pre_hook(complete, with_kwargs=True)
            part.register_forward_pre_hook(functools.partial(_ask_weights, True), with_kwargs=True)
            part.register_forward_hook(functools.partial(_ask_weights, False), with_kwargs=True, always_call=True)
    fields = {k: v for k, v in dataclasses.asdict(layers[-1].config).items() if k not in OF_MODEL}
    model.config.sea = {"method": method, **fields, **options}
    return model


OF_MODEL = ("n_head", "n_kv_head", "d_head", "max_positions", "causal", "seed")  # fields of SEAConfig that attach() finds


def _more_than_attention(module: nn.Module, config) -> str | None:
    """What an attention module does beyond softmax(q k^T) v over all tokens, or all up to its own; None if nothing."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[module.layer_idx] if kinds and getattr(module, "layer_idx", None) is not None else "full_attention"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) and not kinds else None
    is_cross = getattr(module, "is_cross_attention", False) or (getattr(module, "is_decoder", False) and not module.is_causal)
    found = {
        "an encoder and decoder": config.is_encoder_decoder,
        "cross-attention": is_cross,
        "sliding windows": getattr(module, "sliding_window", window) is not None,
        kind.replace("_", " "): kind not in ("full_attention", "attention"),
        "multi-head latent attention": getattr(config, "kv_lora_rank", None) is not None,
        "attention sinks": hasattr(module, "sinks") or hasattr(module, "attention_sink_bias"),
        "soft caps": getattr(config, "attn_logit_softcapping", None) is not None,
        "a difference of two attentions": hasattr(module, "lambda_q1"),
        "a choice of keys": hasattr(module, "indexer"),
        "a position bias": getattr(config, "has_relative_attention_bias", False)
                           or "relative" in str(getattr(module, "position_embeddings_type", "")),
        "no weights, or quantized ones,": not any(x.is_floating_point() and x.ndim > 1 for x in module.parameters()),
    }
    return next((what for what, is_there in found.items() if is_there), None)


def _layer_of(module: nn.Module, model: PreTrainedModel, method: str, options: dict) -> nn.Module:
    """The SEAttention or control that fits an attention module of `model`. Raises ValueError if there is none."""
    config = getattr(module, "config", model.config.get_text_config())
    what = _more_than_attention(module, config)
    if what is not None:
        raise ValueError(f"model: expected plain self-attention, got {what} in {type(module).__name__}")

    def find(*names: str) -> int | None:
        return next((x for of in (module, config) for name in names if isinstance(x := getattr(of, name, None), int)), None)

    n_head = find("num_heads", "num_attention_heads")
    groups = getattr(module, "num_key_value_groups", None)
    shape = dict(n_head=n_head, d_head=find("head_dim", "attention_head_size") or config.hidden_size // n_head,
                 n_kv_head=n_head // groups if groups else find("num_key_value_heads"),
                 causal=bool(module.is_causal) and getattr(config, "is_causal", None) is not False)
    if options.get("causal", shape["causal"]) and "max_positions" not in options:
        shape["max_positions"] = find("max_position_embeddings")
        if shape["max_positions"] is None:
            raise ValueError("max_positions: expected the number of tokens of the longest sequence, since "
                             f"{type(config).__name__} does not tell it")
    weight = next(x for x in module.parameters() if x.is_floating_point())
    return METHODS[method](SEAConfig(**{**shape, **options})).to(weight.device, weight.dtype)


def _switch_to_sea(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Raises ValueError, with `model` as it was, if not all of its attention goes through transformers' interface."""
    before = model.config._attn_implementation
    # A class that can run neither makes a mask that its module alone understands.
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and attention_modules(part)]
    if all(part._supports_sdpa or part._supports_flash_attn for part in parts):
        model.set_attn_implementation("sea")
        if all(getattr(x, "config", model.config.get_text_config())._attn_implementation == "sea" for x in modules):
            return
        model.set_attn_implementation(before)
    raise ValueError(f"model: expected one whose attention goes through transformers' interface, got {type(model).__name__}")


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


def save(model: PreTrainedModel, folder: str | os.PathLike, tokenizer=None, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors, and the tokenizer's files, in place of `folder` if it exists.

    state_dict: the whole weights of a `model` that holds shards of them (FSDP2).
    Everything is written beside it and then renamed, so a kill leaves the old model or the new one; between the two
    renames the old one's name is `folder`.old.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"folder: expected a new folder or a saved model, got {folder}, which holds something else")
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    if state_dict is not None:  # gathered weights are tied no more
        state_dict = {name: x for name, x in state_dict.items() if name not in model.all_tied_weights_keys}
    model.save_pretrained(new, state_dict=state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
