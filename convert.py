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

import copy
import dataclasses
import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, GenerationConfig, PreTrainedConfig,
                          PreTrainedModel)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (bidirectional_mask_function, causal_mask_function, flash_attention_mask,
                                        packed_sequence_mask_function, sdpa_mask)

from baselines import BASELINES
from sea import (SEAConfig, SEAOutput, SEAState, SEAttention, at_least_fp32, attention_weights, check_qkv,
                 dense_attention, first_key_of_cell, in_documents, is_autocast, is_integer, scale_or_default, take, valid_first)

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
        self.valid: Tensor | None = None  # (B, S) of the tokens so far, None: all of them
        self.is_first = False  # of the model's
        self.n_before = 0  # tokens before this call, if it is the first

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
            index = index.to(self.state.count.device)
            self.state = self.state.index_select(index)
            self.valid = None if self.valid is None else self.valid[index]

    def reset(self) -> None:
        super().reset()
        self.state = self.valid = None

    def see(self, valid: Tensor | None, n_new: int) -> None:
        """Take note of all tokens' padding. Raises ValueError if that of the past has changed: the state would not know."""
        if self.state is not None:
            known = [x for x in (self.valid, None if valid is None else valid[:, :-n_new]) if x is not None]  # else all are tokens
            if not (torch.equal(*known) if len(known) == 2 else all(x.all() for x in known)):
                raise ValueError("attention_mask: expected the padding of the tokens before as it was in their call, got another")
        self.valid = valid

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
    layer = cache.layers[module.layer_idx]
    # A call that failed midway leaves keys without their state, or layers with more tokens than others.
    first = next(x for x in cache.layers if isinstance(x, SEALayer))
    if layer is first:
        first.n_before = layer.get_seq_length()
    layer.is_first = layer is first
    in_state = 0 if layer.state is None else layer.state.n_tokens
    if not in_state == layer.get_seq_length() == first.n_before:
        raise ValueError(f"past_key_values: expected as many tokens in each layer, and in its state, got {first.n_before} and, in layer "
                         f"{module.layer_idx}, {layer.get_seq_length()} and {in_state}: a call failed midway; begin with a new cache")
    return args, {**kwargs, "sea_layer": layer}


# Keywords that reach attention functions and ask for no other attention.
HARMLESS = ("dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
            "logits_to_keep", "cache_position", "num_items_in_batch")
OF_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # say what position_ids say


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
    if sea_layer is not None and sea_layer.is_first:  # a look at the mask's numbers, which a GPU has to be waited for
        sea_layer.see(valid, query.shape[2])
    output_alone = module.sea.config.causal and not (torch.is_grad_enabled() or wants_weights or records is not None)
    if output_alone and sea_layer is None and valid is None and is_dense(module.sea, query.shape[2]):
        # No later call wants to know what the estimator would.
        module.sea.check(query, key, value, None, None, False, None)
        out = dense_attention(query, key, value, None, scale_or_default(scaling, query.shape[3]), is_first=True)
        return out.transpose(1, 2).contiguous(), None
    result = module.sea(query, key, value, valid=valid, softmax_scale=scaling, state=state,
                        kv_cached=sea_layer is not None, rows_at_once=ROWS_AT_ONCE if output_alone else None)
    if sea_layer is not None:
        sea_layer.state = result.state
    _record(module, query, key, value, scaling, result.out, result)
    weights = _weights(query, key, valid, scaling, result) if wants_weights else None
    return result.out.transpose(1, 2).contiguous(), weights


def is_dense(layer: nn.Module, n_tokens: int) -> bool:
    """Whether all queries of a sequence's first n_tokens attend to all keys that they see."""
    return n_tokens < layer.config.dense_below


def _check_attention(module: nn.Module, mask: Tensor | None, documents: Tensor | None, is_causal: bool | None, kwargs: dict) -> None:
    """Raises ValueError if a call asks for other attention than that of the layer attached to `module`."""
    causal, packed = module.sea.config.causal, documents is not None
    ends = kwargs.get("cu_seq_lens_q")
    known = HARMLESS + OF_PACKING if packed or ends is not None and len(ends) == 2 else HARMLESS  # 2: of one document
    for wanted in (is_causal, getattr(getattr(module, "config", None), "is_causal", None)):
        if wanted is not None and bool(wanted) != causal:
            raise ValueError(f"is_causal: expected {causal}, as SEA was attached to {type(module).__name__}, got {wanted}; "
                             "attach(model, causal=...) decides")
    for name, x in kwargs.items():
        if not (x is None or x is False or name in known):
            got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x
            raise ValueError(f"{name}: expected None, SEA has no such attention, got {got}")
    if mask is not None and mask.ndim != (PACKED.ndim if packed else 2):
        got = f"one of shape {tuple(mask.shape)}" if mask.numel() else "another (windows, prefixes, packed documents, ...)"
        raise ValueError(f"attention_mask: expected a causal or bidirectional mask, with padding of shape (B, S), got {got}")


# Masks that say only of which kind they are, by their number of dimensions: models make some that never reach their attention.
PACKED, OTHER = torch.empty(0, 0, 0), torch.empty(0, 0, 0, 0)


def sea_mask(*args, mask_function: Callable = causal_mask_function, **kwargs) -> Tensor | None:
    """The mask function that transformers calls: None, or bool (B, S), False where padded; PACKED, where sea_documents says
    which document a token is of; or OTHER, which attention refuses."""
    parts = set(_parts(mask_function))
    if not parts <= {causal_mask_function, bidirectional_mask_function, packed_sequence_mask_function}:
        return OTHER
    if packed_sequence_mask_function in parts:
        return PACKED
    return flash_attention_mask(*args, mask_function=mask_function, **kwargs)


def _parts(mask_function: Callable) -> Iterator[Callable]:
    """The mask functions whose intersection one of transformers' is, and for packed documents the function that made it.

    transformers makes them as closures, which alone tell what they are.
    """
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
    if not is_autocast(tensors[0]):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(x.device.type)) for x in tensors)


MOST_WEIGHTS = 2**28  # numbers in a layer's attention matrix, 1 GiB


@torch.no_grad()
def _weights(q: Tensor, k: Tensor, valid: Tensor | None, scale: float | None, result: SEAOutput) -> Tensor:
    """For output_attentions=True: the sparse attention, before the gates, (B, H, T, S)."""
    if result.row is None:
        raise ValueError("output_attentions: expected a student that chooses keys, got a Performer, which has no attention matrix")
    size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if size > MOST_WEIGHTS:
        raise ValueError(f"output_attentions: expected at most {MOST_WEIGHTS:,} numbers a layer, got {size:,}; attention_csr "
                         "gives the same as sparse matrices, of what convert.record sees")
    keep = result.attended(k.shape[2])
    if valid is None:
        return attention_weights(q, k, keep, scale)
    order = valid_first(valid)  # as SEA ranks keys
    ranked = attention_weights(q, take(k, order), keep, scale)
    return torch.zeros_like(ranked).scatter(-1, order[:, None, None].expand_as(ranked), ranked)


@torch.no_grad()
def attention_csr(q: Tensor, k: Tensor, result: SEAOutput, softmax_scale: float | None = None, *,
                  block: int = 2**20) -> list[list[Tensor]]:
    """sea.attention_weights as sparse matrices: for each sequence and head a torch CSR tensor (T, S), fp32 at least.

    q (B, H, T, D), k (B, Hkv, S, D), the valid keys first, and what SEAttention gave for them. Column j is the key of rank j,
    as in k. Times v it is the sparse context, before the gates. Memory is a few times that of the result, 12 bytes a number,
    and `block` products q k at a time: nothing is T x S.
    """
    check_qkv(q, k, k)
    B, H, T, D = q.shape
    scale, group = scale_or_default(softmax_scale, D), H // k.shape[1]

    def matrix(b: int, h: int) -> Tensor:
        seen, row = result.seen[b], result.row[b]
        if result.bins is not None:
            query, key = _keys_in_bins(result.bins[b, h * result.bins.shape[1] // H], seen, result.bin)
        else:
            cells = result.cells
            if isinstance(cells, Tensor):
                mask = cells[b, h]
            else:  # unpack one head at a time
                mask = type(cells)(cells.bits[b : b + 1, h : h + 1], cells.width).unpack()[0, 0]
            query, key = _keys_in_cells(mask[row] & (seen > 0)[:, None], seen)
        if result.dense_below:
            is_dense = result.is_dense[b]
            all_query, all_key = _keys_in_cells(is_dense[:, None], seen)  # one cell for all keys
            query, key = query[~is_dense[query]], key[~is_dense[query]]
            query, order = torch.cat([query, all_query]).sort(stable=True)
            key = torch.cat([key, all_key])[order]
        return _softmax_csr(at_least_fp32(q[b, h]) * scale, at_least_fp32(k[b, h // group]), query, key, block)

    return [[matrix(b, h) for h in range(H)] for b in range(B)]


def _keys_in_bins(bins: Tensor, seen: Tensor, bin: int) -> tuple[Tensor, Tensor]:
    """Query and key of each pair that chosen bins (T, n) stand for, by query and then by key."""
    query, place = (bins < -(-seen // bin)[:, None]).nonzero(as_tuple=True)
    key = bins[query, place].long()[:, None] * bin + torch.arange(bin, device=bins.device)
    is_seen = key < seen[query, None]
    return query[:, None].expand_as(key)[is_seen], key[is_seen]


def _keys_in_cells(mask: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a mask of cells (T, width)."""
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
    if x is None or "sea_documents" in given or not (mask is None or isinstance(mask, Tensor) and mask.ndim == 2):
        return (), given
    T = x.shape[1]
    if position is None:
        if rotary and mask is not None:
            column = torch.arange(mask.shape[1], device=mask.device)
            first = (mask != 0).int().argmax(dim=1, keepdim=True)
            given["position_ids"] = (column - first).clamp(min=0)[:, -T:]
        return (), given
    if position.ndim != 2 or T == 1:
        return (), given
    begins = position.diff(dim=1) != 1
    if mask is not None:
        begins = begins & (mask[:, 1 - T :] != 0) & (mask[:, -T:-1] != 0)
    returns = position[:, 1:] == position.amin(dim=1, keepdim=True)
    if not begins.any() or begins.all() or (begins & ~returns).any():  # other jumps are positions of one's own
        return (), given
    if mask is not None:  # with which dense attention would let documents see each other
        raise ValueError("attention_mask: expected None with packed documents (positions that begin again), got one")
    if any(isinstance(y, Cache) for y in given.values()):
        raise ValueError("position_ids: expected no packed documents (positions that begin again) with past_key_values")
    documents = torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(len(x), -1)
    return (), {**given, "use_cache": False, "sea_documents": documents}


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
    """Collect a Record from each attention layer, in the order they run. `model` runs "sea" or "sea_teacher" attention.

    Raises ValueError while another record of the model is open, in this thread or in another.
    """
    records, modules = [], attention_modules(model)
    if any(getattr(module, "sea_records", None) is not None for module in modules):
        raise ValueError("model: expected no other record of it that is open, got one, whose layers cannot tell the two apart")
    for module in modules:
        module.sea_records = records
    try:
        yield records
    finally:
        for module in modules:
            module.sea_records = None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a transformers model: they alone have `is_causal`, which SDPA asks them for."""
    return [m for m in model.modules() if hasattr(m, "is_causal")]


Model = TypeVar("Model", bound=PreTrainedModel)
METHODS: dict[str, type[nn.Module]] = {"sea": SEAttention, **BASELINES}  # what stands in for a model's attention
FROM_MODEL = ("n_head", "n_kv_head", "d_head")  # fields of SEAConfig that no option sets
OF_BINS = ("bin", "local", "first", "candidates")  # which students from before there were bins do not have
OF_ENCODER = dict(causal=False, width=128, nbf=1, group="batch")  # the paper's for BERT, defaults of a bidirectional model
OF_NO_WEIGHT = ("topk", "group", *OF_BINS, "query_stride", "dense_below", "backend")
# The name of a student's attention in its config.json. transformers' own loaders would drop the SEA weights with no more than a
# warning and run dense attention; so they refuse an attention of this name, and repeat it.
ONLY_LOAD = "that of a SEA student, to be loaded by convert.load"


def attach(model: Model, method: str = "sea", **options: Any) -> Model:
    """Give each attention layer of `model` a SEAttention or a control, in place, and switch the model to it.

    method: "sea", or a control of baselines.py. options: fields of sea.SEAConfig; heads, head size, causality and the longest
    sequence come from the model. Where all its layers are bidirectional, defaults are those of OF_ENCODER. Raises ValueError,
    with the model as it was, if its attention is of another kind or has SEA already.

    Load the model first, since new weights keep the initialisation of SEAttention; PEFT's adapters come after. Then distil: a
    language model's own loss does not train the estimate, since a choice of cells passes no gradient on.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {method!r}")
    known = [field.name for field in dataclasses.fields(SEAConfig) if field.name not in FROM_MODEL]
    for name in options:
        if name not in known:
            raise ValueError(f"options: expected some of {', '.join(known)}, got {name}")
    if _has_adapters(model):
        raise ValueError("model: expected one without PEFT's adapters, which come after attach, got one that has them")
    modules = attention_modules(model)
    if any(hasattr(module, "sea") for module in modules):
        raise ValueError("model: expected one without SEA, whose weights would be lost, got a student; set_option changes "
                         f"{', '.join(OF_NO_WEIGHT)}")
    if not modules:
        raise ValueError(f"model: expected self-attention modules with `is_causal`, got none in {type(model).__name__}")
    if not any(options.get("causal", _is_causal(module, model)) for module in modules):
        options = {**OF_ENCODER, **options}
    seed = options.get("seed", 0)  # each layer draws features of its own; SEAConfig refuses what is no number
    layers = [_layer_of(module, model, method, {**options, "seed": seed + i if is_integer(seed) else seed})
              for i, module in enumerate(modules)]
    _switch_to_sea(model, modules)

    for module, layer in zip(modules, layers):
        module.sea = layer
        if layer.config.causal:
            module.register_forward_pre_hook(bring_cache, with_kwargs=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            names = tuple(inspect.signature(part.forward).parameters)
            if "position_ids" in names:
                rotary = any("Rotary" in type(child).__name__ for child in part.children())
                complete = functools.partial(complete_positions, names, rotary)
                part.register_forward_pre_hook(complete, with_kwargs=True)
            part.register_forward_pre_hook(functools.partial(_ask_weights, True), with_kwargs=True)
            part.register_forward_hook(functools.partial(_ask_weights, False), with_kwargs=True, always_call=True)
    fields = {k: v for k, v in dataclasses.asdict(layers[-1].config).items()
              if k not in (*FROM_MODEL, "max_positions", "causal", "seed")}
    fields["group"] = None  # unless given: that of a layer with bins is not that of one without
    model.config.sea = {"method": method, **fields, **options}
    model.config.attn_implementation = ONLY_LOAD  # whoever saves the model, its config says so
    return model


def _more_than_attention(module: nn.Module, config) -> str | None:
    """What an attention module does beyond softmax(q k^T) v over all tokens, or all up to its own; None if nothing."""
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[module.layer_idx] if kinds and getattr(module, "layer_idx", None) is not None else "full_attention"
    # Most modules have their window; some are not even told, and then their config has one that no list of kinds takes back.
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


def _is_causal(module: nn.Module, model: PreTrainedModel) -> bool:
    config = getattr(module, "config", model.config.get_text_config())
    return bool(module.is_causal) and getattr(config, "is_causal", None) is not False


def _layer_of(module: nn.Module, model: PreTrainedModel, method: str, options: dict) -> nn.Module:
    """The SEAttention or control that fits an attention module of `model`. Raises ValueError if there is none."""
    config = getattr(module, "config", model.config.get_text_config())
    what = _more_than_attention(module, config)
    if what is not None:
        raise ValueError(f"model: expected plain self-attention, got {what} in {type(module).__name__}")

    def find(*names: str) -> int | None:
        return next((x for of in (module, config) for name in names if isinstance(x := getattr(of, name, None), int)), None)

    n_head = find("num_heads", "num_attention_heads")
    if n_head is None:
        raise ValueError(f"model: expected a number of heads in {type(config).__name__} or {type(module).__name__}, got none")
    groups = getattr(module, "num_key_value_groups", None)
    shape = dict(n_head=n_head, d_head=find("head_dim", "attention_head_size") or config.hidden_size // n_head,
                 n_kv_head=n_head // groups if groups else find("num_key_value_heads"),
                 causal=_is_causal(module, model))
    if options.get("causal", shape["causal"]) and "max_positions" not in options:
        shape["max_positions"] = find("max_position_embeddings")
        if shape["max_positions"] is None:
            raise ValueError("max_positions: expected the number of tokens of the longest sequence, since "
                             f"{type(config).__name__} does not tell it")
    weight = next(x for x in module.parameters() if x.is_floating_point())
    config = SEAConfig(**{**shape, **options, **getattr(METHODS[method], "of_config", {})})
    return METHODS[method](config).to(weight.device, weight.dtype)


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


def set_option(model: PreTrainedModel, **options: Any) -> None:
    """Change fields of SEAConfig that no weight depends on (OF_NO_WEIGHT, and width without a CNN) of any trained student:
    topk is the paper's dynamic k.

    Raises ValueError, with the model as it was, if a layer cannot have them.
    """
    if not hasattr(model.config, "sea"):
        raise ValueError(f"model: expected a student, got a plain {type(model).__name__}")
    free = free_options(model.config.sea)
    for name in options:
        if name not in free:
            raise ValueError(f"options: expected some of {', '.join(free)}, got {name}, which the weights depend on")
    modules, layer = attention_modules(model), METHODS[model.config.sea["method"]]
    # A group of None is that of a layer with bins, or without.
    changes = {"group": model.config.sea["group"], **options, **getattr(layer, "of_config", {})}
    with torch.device("meta"):  # a layer that can be built can have them
        configs = [layer(dataclasses.replace(module.sea.config, **changes)).config for module in modules]
    for module, config in zip(modules, configs):
        for x in module.sea.modules():  # itself, or PEFT's copy and the original
            if isinstance(x, SEAttention):
                x.set_config(config)
            elif isinstance(x, layer):
                x.config = config
    model.config.sea = {**model.config.sea, **options}


def free_options(options: dict[str, Any]) -> tuple[str, ...]:
    """The fields of SEAConfig that no weight of a student with these options depends on."""
    return OF_NO_WEIGHT if options.get("cnn", True) else (*OF_NO_WEIGHT, "width")


def _has_adapters(model: nn.Module) -> bool:
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def sea_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that `attach` added."""
    return [name for name, _ in model.named_parameters() if ".sea." in name]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a place beside `path`, to write a file or a folder to, which then takes the place of `path`, whole and on the disk.

    What is written is synced before the rename, so neither a kill nor a power loss leaves half of it: `path` is the old one
    or the new one. A folder takes two renames, between which `path` is not there, and `whole` finds the new one. An exception
    removes what was written. Links are followed. Raises ValueError if the working directory is `path` or within.
    """
    path = Path(os.path.realpath(path))
    if path in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"path: expected none that holds the working directory, which would go with the old one, got {path}")
    new, old = _beside(path)
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
    """`path`, or what stands for it after a kill between the two renames of `replacing`: the new one, whole before the first of
    them, or the old one, should somebody have removed that."""
    new, old = _beside(path)
    if path.exists() or not old.exists():
        return path
    return new if new.exists() else old


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the new one is written, and where the old one waits, under names that nobody else would give."""
    return path.with_name(f".{path.name}.sea-new"), path.with_name(f".{path.name}.sea-old")


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
    A kill or a power loss leaves the old model or the new one, see `replacing`. Raises ValueError if `folder` holds something
    else, is the working directory or holds it, or if `model` has PEFT's adapters.
    """
    if _has_adapters(model):
        raise ValueError("model: expected one without PEFT's adapters, got one that has them: save(peft_model.merge_and_unload(), "
                         "folder), or save the student before PEFT wraps it, peft_model.save_pretrained(adapter), and later "
                         "PeftModel.from_pretrained(load(folder), adapter)")
    folder = Path(os.path.realpath(folder))
    check_replaceable(folder)
    if state_dict is not None:  # gathered weights are tied no more
        state_dict = {name: x for name, x in state_dict.items() if name not in model.all_tied_weights_keys}
    with replacing(folder) as new:
        # Under the names that the model's modules have, as `load` wants them; others' loaders want those of the family.
        model.save_pretrained(new, state_dict=state_dict, save_original_format=not hasattr(model.config, "sea"))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


# What is in a saved model's folder.
OF_MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.index.json", "tokenizer*", "special_tokens_map.json",
            "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model")


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if something would be lost with `folder` that is no part of a saved model."""
    names = [folder.name] if folder.is_file() else sorted(x.name for x in folder.iterdir()) if folder.exists() else []
    others = [name for name in names if folder.is_file() or not any(fnmatch(name, pattern) for pattern in OF_MODEL)]
    if others or (names and "config.json" not in names):
        raise ValueError(f"folder: expected a new folder, or one of a saved model and nothing else, got {folder}, which holds "
                         f"{', '.join(others[:3] or names[:3])}")


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(folder: str | os.PathLike, dtype: torch.dtype | None = None,
         model_class: type[PreTrainedModel] | None = None) -> Any:
    """The PreTrainedModel that `save` wrote, SEA included, in eval mode.

    dtype: as saved by default, each weight in its own if that is one of FLOATS. model_class: the model's class, where
    transformers has none of its name. Runs no code from `folder`. Raises ValueError if that is not such a model or lacks
    weights, before it takes the memory of one.
    """
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
    folder = whole(Path(os.path.realpath(folder)))
    config, generation = _read_configs(folder)
    model_class = model_class or _class_of(config, folder)
    files = sorted(folder.glob("*.safetensors"))
    _check_weights(model_class, config, files, folder)
    saved_as = config.dtype or torch.get_default_dtype()
    with _in_a_sentence(f"the config.json of a student in {folder}"):
        model = _cast(_student(model_class, config), saved_as)
    for gain in _encoder_gains(model).values():  # a gain of 0 is no cell keys, for files from before there were any
        nn.init.zeros_(gain)
    for file in files:
        weights = load_file(file)
        for name, parameter in model.named_parameters():
            if name in weights and weights[name].dtype in FLOATS:
                parameter.data = parameter.data.to(weights[name].dtype)
        model.load_state_dict(weights, strict=False)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    return (model if dtype is None else _cast(model, dtype)).eval()


def _read_configs(folder: Path) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Those of a student, of values that a model can be built from. Raises ValueError."""
    if not (folder / "config.json").exists():
        raise ValueError(f"folder: expected a model saved by convert.save, got {folder}, which has no config.json")
    with _in_a_sentence(f"a config.json that transformers reads in {folder}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_generation = (folder / "generation_config.json").exists()
        generation = GenerationConfig.from_pretrained(folder) if has_generation else None
    if not hasattr(config, "sea"):
        raise ValueError(f"folder: expected a model with SEA, got a plain {config.model_type} in {folder}")
    with _in_a_sentence(f"the config.json of a student in {folder}"):
        if config.dtype is not None and not config.dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point one, got {config.dtype}")
        of_bins = OF_BINS if config.sea.keys() & set(OF_BINS) else ()
        for name in ("topk", "group", "query_stride", *of_bins):  # no weight's shape would tell
            if name not in config.sea:
                raise ValueError(f"sea: expected {name} in it, got {sorted(config.sea)}")
    config._attn_implementation = None  # it is ONLY_LOAD
    return config, generation


def _check_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig, files: list[Path], folder: Path) -> None:
    """Raises ValueError if the files' weights are not those of such a student, by name and shape; it takes no memory to tell.

    A config may say that a head is tied to the embedding though it was not: the file then has both, and `config` is corrected.
    """
    with _in_a_sentence(f"whole weights in {folder}"):
        found = _shapes(files)
    with _in_a_sentence(f"the config.json of a student in {folder}"), torch.device("meta"):
        if config.get_text_config().num_hidden_layers > len(found):  # a module a layer takes long even without memory
            raise ValueError(f"num_hidden_layers: expected at most the {len(found)} weights, got more")
        skeleton = _student(model_class, config)
        if skeleton.all_tied_weights_keys.keys() & found.keys():
            config.tie_word_embeddings = False
            skeleton = _student(model_class, config)
    optional = skeleton.all_tied_weights_keys.keys()
    for later in (_encoder_gains(skeleton).keys(), _head_shares(skeleton)):
        if not later & found.keys():
            optional = optional | later
    expected = {name: tuple(x.shape) for name, x in skeleton.state_dict().items()}
    if unexpected := sorted(found.keys() - expected.keys()):
        raise ValueError(f"folder: expected the weights of {model_class.__name__}, as convert.save names them, got {unexpected[:3]} in "
                         f"{folder}")
    if missing := sorted(expected.keys() - found.keys() - optional):
        raise ValueError(f"folder: expected all weights, got none for {missing[:3]} in {folder}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"folder: expected {name} of shape {expected[name]}, as its config.json says, got {shape} in {folder}")


def _encoder_gains(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The gains of bidirectional layers' cell keys, by name, which students from before there were such do not have."""
    layers = {name: x for name, x in model.named_modules() if isinstance(x, SEAttention) and not x.config.causal}
    return {f"{name}.key_gain": x.key_gain for name, x in layers.items() if x.config.cell_keys}


def _head_shares(model: PreTrainedModel) -> set[str]:
    """Names of what heads count in choices of bins, in causal layers; before it was learned they counted alike, as in new ones."""
    return {f"{name}.head_share" for name, x in model.named_modules() if isinstance(x, SEAttention) and x.config.causal}


@contextmanager
def _in_a_sentence(expected: str) -> Iterator[None]:
    """What is read from a folder can be anything, and its readers raise whatever they run into."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"folder: expected {expected}, got another ({reason})") from error


def _class_of(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    names = config.architectures
    name = names[0] if isinstance(names, list) and names else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise ValueError(f"folder: expected architectures to name a model of transformers, got {name!r} in {folder}; if it is a class "
                     "of your own, pass it as model_class")


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Of the weights in the files, by their names."""
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118, it is no dict
    return shapes


def _student(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    options = {"bin": 0, **config.sea}  # of OF_BINS it has all or none
    return attach(model_class(copy.deepcopy(config)), **options)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights only, as from_pretrained does: a rotary embedding's frequencies would lose their far positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
