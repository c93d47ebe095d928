"""SEA: Sparse Linear Attention with Estimated Attention Mask, in plain PyTorch.

Lee, Kim, Willette, Hwang, ICLR 2024 (arXiv 2310.01777). SEA replaces the attention of a pretrained
transformer. It estimates each attention row in `width` cells with linear attention and a small CNN,
keeps the best cells by a grouped top-k, attends only to the best keys under them, and learns all
this by distilling the teacher's attention. A causal layer, SEAttention.forward, computes (a
bidirectional one has functions of its own for steps 1, 2, 4, 5 and 10):

            what                                                              step   by
    tokens  valid tokens of q, k, v at the front, padding behind them         -      to_front
    rows    the queries whose attention is estimated: all, or every stride-th -      choose_rows
    c       phi(q) (sum phi(k)^T [position ; v]) / (phi(q) sum phi(k))        1, 2   causal_context
    z       GELU(LayerNorm(Linear([c ; v]))), for the CNN's image and gates   3      encode_rows
    scores  CNN(image)                                                        4      causal_cnn
            + gain * q . (cell key), ours                                     5      add_cell_keys
    cells   bin=0, as in the paper: the best of softmax(scores), all their
            keys                                                              6      select_cells
    bins    else, ours: the best bins of keys in the best cells, those of the
            first and of the last keys                                        7      choose_bins
    sparse  softmax(q k^T * softmax_scale) v over these keys, of bins         8, 9   bin_attention
            or of cells: sparse_attention
    out     s_mix * s_prob * sparse + (1 - s_mix) * average of v              10     mix_average
    back    each query to where it came from, beside the next call's state    -      Tokens.back

This file is the readable reference: a function for each step, in that order, then state, the border
(from a model's tokens to compact ones and back) and module, for every dtype and device, with
autograd. Steps take what they need of the past as tensors; SEAState holds these. Copy the file away
and it works: it needs torch and einops only. Its sparse attention looks at all keys and masks them,
which is easy to check and not fast; kernels.py has the same operations in Triton and takes over on
a GPU.

    name       paper   meaning
    B, H, T    N,H,T   batch, query heads, queries (the new tokens of a call)
    Hkv        -       key/value heads, H % Hkv == 0 (grouped-query attention)
    S, D       T, d    keys (past and new tokens), head size
    width      K       cells of an estimated attention row
    topk       k       budget: keys per query and head, on average
    cell       pixel   one of `width` equal slices of the keys that a query sees; with bins, of
                       those before the last `local`
    in_cells   -       number of these keys
    seen       t       number of keys that a query sees; 0 marks padding
    cell key   -       what stands for the keys of a cell; ours
    bin        -       `bin` neighbouring keys, chosen together, from a multiple of `bin` on
    n          -       entries of a query's list of bins
    E          -       heads with an estimate of their own: the query heads, E = H, or without a
                       CNN the key/value heads, E = Hkv
    chooser, C -       what chooses bins: each query head, C = H, or all that share a key/value head
                       together, C = Hkv
    row        -       a query whose attention is estimated: those of rank 0, stride, 2 * stride,
                       ...; R of them, with or without the last one of the call before
    place      -       index of a token in a call: n_new (B,) new tokens at places 0 ... n_new-1
    rank       -       number of a token in its sequence: count + place, after count (B,) earlier
                       ones
    phi        phi     features of linear attention: relu_features, bidirectional softmax_features
    m, Dv      -       how many these are; size of linear attention's values [position ; v], 2D
    P          -       columns of the CNN's image: width / 4 (bidirectional: / 2), rounded up, at
                       least 4
    s_prob, s_mix      a row's learned gates: of sparse attention, and of that against the average
    gain       -       a head's learned weight of step 5
    share      -       what a head counts in a chooser's mean query, learned, too

Tensors are (B, H, T, D). Probabilities, softmax statistics and running sums are computed in at
least fp32, whatever the input is. "Differs" marks where we leave the paper or its authors' code.
Numbers that are not finite: padding may hold any. A key that is inf or nan changes no earlier row.
A value does, as in any attention that multiplies by a mask's zeros, since 0 * inf is nan.

Left out: attention dropout, cross-attention, sliding windows.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BACKENDS = ("auto", "torch", "triton")
HISTORY = 4  # rows of the past that a 3-row convolution of dilation 2 looks at


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def is_integer(x: object) -> bool:
    """True and False are not: a file that says `width: true` means something else than 1."""
    return isinstance(x, int) and not isinstance(x, bool)


class Group(NamedTuple):
    """Which cells, or bins, compete to be kept, see topk_mask and choose_bins."""

    layout: str  # the axes of (b, h, t, p) ranked together, in einops' words
    causal: bool  # no query competes with a later one
    n_kept: Callable | None  # (H, topk * width, keys seen) -> cells to keep; None: no cells
    shared: bool = False  # one choice for all query heads of a key/value head, of bins only


def _rounded(a, b):
    """a / b rounded half up, in integers."""
    return (2 * a + b) // (2 * b)


GROUPS = {
    "causal_batch": Group("b t (h p)", True, lambda H, n, seen: _rounded(H * n, seen)),
    "query": Group("b t h p", True, lambda H, n, seen: _rounded(n, seen)),
    "kv": Group("b t h p", True, None, shared=True),
    "head": Group("b h (t p)", False, lambda H, n, seen: n),
    "batch": Group("b (h t p)", False, lambda H, n, seen: H * n),
}


@dataclass(frozen=True)
class SEAConfig:
    """Everything that fixes the shapes and the arithmetic of one SEA attention layer.

    Raises ValueError for values that no layer can be built from.
    """

    n_head: int
    d_head: int
    n_kv_head: int | None = None  # None: n_head
    width: int = 256  # 128 for BERT
    topk: int = 64
    causal: bool = True
    group: str | None = None  # one of GROUPS; None: "kv" with bins, "causal_batch" without
    bin: int = 2  # keys of a bin, step 7 (causal); 0: no bins, all keys in the best cells
    local: int = 8  # last keys that a query always attends to, with bins
    first: int = 2  # first keys of the sequence, likewise; rounded up to whole bins
    candidates: int = 16  # bins that compete for each that is chosen, at most
    query_stride: int = 1  # of so many queries one is estimated, the others use its row (causal)
    dense_below: int = 0  # a query that sees fewer keys attends to all of them (causal)
    nbf: float = 8  # random features m = int(D ln D / nbf); 1 for BERT
    max_positions: int = 2048  # rows of the learned position table, padding included (causal)
    cell_keys: bool = True  # step 5
    # False: no steps 1 to 4. Cell keys alone give the scores, one row for all heads that share
    # keys, by their mean query; each head has gates of its own, the same for all queries (causal).
    cnn: bool = True
    seed: int = 0  # of the random features
    backend: str = "auto"  # "triton": kernels.py; "torch": this file; "auto": the former if it can

    def __post_init__(self):
        for name in ("n_head", "d_head", "width", "topk", "query_stride", "max_positions",
                     "candidates"):
            value = getattr(self, name)
            _expect(is_integer(value) and value >= 1, name, "an integer >= 1", repr(value))
        for name in ("causal", "cell_keys", "cnn"):
            value = getattr(self, name)
            _expect(isinstance(value, bool), name, "True or False", repr(value))
        _expect(is_integer(self.seed) and abs(self.seed) < 2**63, "seed", "an integer of 64 bits",
                repr(self.seed))
        kv = self.kv_heads
        divides = is_integer(kv) and kv >= 1 and self.n_head % kv == 0
        _expect(divides, "n_kv_head", f"a divisor of n_head = {self.n_head}", repr(kv))
        for name in ("bin", "first", "dense_below"):
            value = getattr(self, name)
            _expect(is_integer(value) and value >= 0, name, "an integer >= 0", repr(value))
        ok = is_integer(self.local) and self.local >= 1 or not self.has_bins
        _expect(ok, "local", "an integer >= 1, with bins", repr(self.local))
        if self.group is None:
            object.__setattr__(self, "group", "kv" if self.has_bins else "causal_batch")
        _expect(self.group in tuple(GROUPS), "group", f"one of {tuple(GROUPS)}", repr(self.group))
        shared = GROUPS[self.group].shared
        _expect(self.causal or not shared, "group", "one that ranks cells when bidirectional",
                repr(self.group))
        _expect(self.has_bins or not shared, "bin", f"bins for group {self.group}", self.bin)
        _expect(self.backend in BACKENDS, "backend", f"one of {BACKENDS}", repr(self.backend))
        number = is_integer(self.nbf) or isinstance(self.nbf, float)
        _expect(number and 0 < self.nbf < math.inf, "nbf", "a number > 0", repr(self.nbf))
        causal_groups = tuple(name for name, group in GROUPS.items() if group.causal)
        _expect(not self.causal or self.group in causal_groups, "group",
                f"one of {causal_groups} when causal, since the others rank a query's cells "
                "against later queries'", repr(self.group))
        _expect(self.query_stride == 1 or self.causal, "query_stride", "1 unless causal",
                self.query_stride)
        _expect(self.dense_below == 0 or self.causal, "dense_below", "0 unless causal",
                self.dense_below)
        _expect(self.cnn or self.causal and self.cell_keys, "cnn",
                "True unless causal, with cell_keys", self.cnn)
        if self.has_bins:
            self.n_chosen(self.topk)

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def n_features(self) -> int:
        return max(1, int(self.d_head * math.log(self.d_head) / self.nbf)) if self.cnn else 0

    @property
    def n_estimates(self) -> int:
        """Heads with an estimate of their own."""
        return self.n_head if self.cnn else self.kv_heads

    @property
    def has_bins(self) -> bool:
        return self.causal and self.bin > 0

    @property
    def unit(self) -> int:
        """Keys that go to the same cell: a bin, or each for itself."""
        return self.bin if self.has_bins else 1

    @property
    def n_choosers(self) -> int:
        """Heads with a choice of bins of their own."""
        return self.kv_heads if GROUPS[self.group].shared else self.n_head

    @property
    def is_shared(self) -> bool:
        """Whether several heads share a choice of bins."""
        return self.n_choosers < self.n_head

    @property
    def n_first(self) -> int:
        """Bins of the first keys."""
        return -(-self.first // self.bin) if self.has_bins else 0

    @property
    def n_last(self) -> float:
        """Last keys that a query attends to, on average: the `local` last of its row, those before
        them whose bin is not full, and so in no cell, yet, and those since the row.

        A row sees one key more than a multiple of the stride. So the keys of the bin that is not
        full number r, r + step, r + 2 * step, ... < bin, where step = gcd(bin, query_stride) and
        r = (1 - local) % step: on average r + (bin - step) / 2. Since the row there have been 0, 1,
        ... query_stride - 1 keys.
        """
        step = math.gcd(self.bin, self.query_stride)
        return self.local + (1 - self.local) % step + (self.bin - step + self.query_stride - 1) / 2

    def n_chosen(self, topk: int) -> int:
        """How many bins to choose for a query and chooser, so that with its first and last keys it
        attends to at most topk keys on average; may be 0. Raises ValueError if topk is less than
        the first and last keys."""
        _expect(self.has_bins, "bin", "bins", self.bin)
        always = self.n_first * self.bin + self.n_last
        _expect(is_integer(topk), "topk", "an integer >= 1", repr(topk))
        _expect(topk >= always, "topk", f"at least {math.ceil(always)}, since on average as many "
                "first and last keys are always attended to", topk)
        return int((topk - always) // self.bin)

    def most_bins(self, n_keys: int) -> int:
        """The bins of n_keys keys, or of max_positions if that is more: then lists of bins keep
        their length while a sequence grows."""
        return -(-max(n_keys, self.max_positions) // self.bin)

    def n_listed(self, topk: int, n_keys: int) -> int:
        """The most bins on the list of a query that sees n_keys keys: first, chosen, last."""
        n_listed = self.n_always + self.n_chosen(topk) * self.n_ranked_together
        return min(n_listed, self.most_bins(n_keys))

    @property
    def n_ranked_together(self) -> int:
        """Choices of bins that are ranked together."""
        return self.n_head if self.group == "causal_batch" else 1

    @property
    def n_always(self) -> int:
        """First and last keys are in at most so many bins: the last number local + bin - 1 +
        query_stride - 1 at most, from a bin's beginning on."""
        return self.n_first + (self.local + 2 * self.bin + self.query_stride - 3) // self.bin

    def in_cells(self, seen: Tensor) -> Tensor:
        """How many keys the cells of a row that sees `seen` share out: all, or with bins those
        before the last `local`, rounded down to whole bins."""
        return keys_in_cells(seen, *self.behind_cells)

    @property
    def behind_cells(self) -> tuple[int, int]:
        """`local` and `bin` of keys_in_cells."""
        return (self.local, self.bin) if self.has_bins else (0, 1)

    def cell_layout(self, in_cells: Tensor) -> dict:
        """Keywords of pool_attention and estimate_loss that say which keys are in which cell, of
        queries with in_cells (B, T) keys in cells."""
        return dict(in_cells=in_cells, unit=self.unit, first=self.n_first * self.bin)


def keys_in_cells(seen: Tensor, local: int, bin: int) -> Tensor:
    """How many of `seen` keys lie before the last `local`, in whole bins."""
    return seen if (local, bin) == (0, 1) else (seen - local).clamp(min=0) // bin * bin


# -- small tools -----------------------------------------------------------------------------------


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def is_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor):
    """Switches autocast off, which would run the matmuls of fp32 sums in half precision."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries of x (B, heads, N, size) at each sequence's index (B, M): (B, heads, M, size)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def take_pair(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """take of both."""
    return take(k, index), take(v, index)


def extend(past: Tensor, x: Tensor) -> Tensor:
    """x (B, heads, N, size) after the past's entries; x itself, not a copy, if there are none."""
    return torch.cat([past.to(x.dtype), x], dim=2) if past.shape[2] else x


def keep_row(past: Tensor, x: Tensor, last: Tensor,
             in_place: bool = False) -> tuple[Tensor, Tensor]:
    """The rows x (B, heads, R, size) of a call after that of the past (B, heads, 0 or 1, size), and
    the one of them that is kept for the next call, number last (B, 0 or 1). in_place: the second
    result is past, overwritten, if it has that shape."""
    rows = extend(past, x)
    row = take(rows, last)
    return rows, past.copy_(row) if in_place and past.shape == row.shape else row


def after(n: int, x: Tensor, value: float = 0) -> Tensor:
    """x (B, heads, N, size) after n entries of `value`; x itself, not a copy, if there are none."""
    return F.pad(x, (0, 0, n, 0), value=value) if n else x


def is_token(x: Tensor, n: Tensor) -> Tensor:
    """Which entries of x (B, heads, T, size) are among the first n (B,): (B, 1, T, 1)."""
    return (torch.arange(x.shape[2], device=x.device) < n[:, None])[:, None, :, None]


def scale_or_default(softmax_scale: float | None, d_head: int) -> float:
    return d_head**-0.5 if softmax_scale is None else softmax_scale


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, H, S, D): each key/value head serves H/Hkv adjacent query heads."""
    return x if x.shape[1] == n_head else x.repeat_interleave(n_head // x.shape[1], dim=1)


def mean_of_heads(q: Tensor, n: int, share: Tensor | None = None) -> Tensor:
    """The mean over each of n groups of adjacent heads: (B, H, T, D) -> (B, n, T, D), dtype of q.
    share (H,): what each head counts instead of n / H; they need not add up to 1. Raises ValueError
    if its shape is another."""
    H = q.shape[1]
    if share is None:
        return q if H == n else q.unflatten(1, (n, -1)).mean(2)
    _expect(share.shape == (H,), "share", f"shape (H,) = {(H,)}", tuple(share.shape))
    # Not the sum of q times share: so equal shares give the plain mean, in fp32 to the bit.
    of_heads = at_least_fp32(q) * (at_least_fp32(share) * (H // n))[:, None, None]
    return of_heads.unflatten(1, (n, -1)).mean(2).to(q.dtype)


# -- 1. features and linear attention --------------------------------------------------------------


def orthogonal_features(d_head: int, n_features: int,
                        generator: torch.Generator | None = None) -> Tensor:
    """Random projection (D, m) with orthogonal columns in blocks of D and the norms of Gaussian
    vectors (FAVOR+), on the device of the generator, whatever the default device is."""
    device = "cpu" if generator is None else generator.device
    draw = dict(generator=generator, dtype=torch.float64, device=device)
    blocks = [torch.linalg.qr(torch.randn(d_head, d_head, **draw))[0]
              for _ in range(-(-n_features // d_head))]
    norms = torch.randn(n_features, d_head, **draw).norm(dim=1)
    return (torch.cat(blocks, dim=1)[:, :n_features] * norms).float()


def relu_features(x: Tensor, projection: Tensor) -> Tensor:
    """phi for causal attention: relu(x W) + 1e-3, (..., D) -> (..., m). Positive, and a function of
    one token only."""
    x = at_least_fp32(x)
    return F.relu(x @ projection.to(x.dtype)) + 1e-3


def softmax_features(x: Tensor, projection: Tensor, keep: Tensor | None = None) -> Tensor:
    """phi for bidirectional attention: FAVOR+ positive features exp(x W - |x|^2 / 2 - max) + 1e-4,
    (..., T, D) -> (..., T, m).

    The maximum is a factor of phi that cancels in the attention. Differs: the authors take it
    before they subtract |x|^2 / 2. It runs over each query's features or, with `keep`
    (broadcastable to (..., T, 1)), over the features of all kept tokens, since keys share one sum.
    That is why causal attention has features of its own: such a maximum would leak the future.
    """
    x = at_least_fp32(x)
    u = x @ projection.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
    if keep is None:
        top = u.amax(-1, keepdim=True)
    else:
        u = u.masked_fill(~keep, torch.finfo(u.dtype).min)
        top = u.amax((-2, -1), keepdim=True)
    return (u - top.detach()).exp() + 1e-4


def scaled_qk(q: Tensor, k: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """q and k such that phi(q) phi(k)^T stands for exp(q k^T * softmax_scale). Both are scaled by
    D**-0.25, and q additionally by softmax_scale / D**-0.5, since some models scale q before they
    call us. Differs: the authors' OPT, which has scaled q by D**-0.5 already, scales it by D**-0.25
    again, D**-0.75 in all."""
    D = q.shape[-1]
    return at_least_fp32(q) * (softmax_scale * D**0.25), at_least_fp32(k) * D**-0.25


def _quotient(c: Tensor) -> Tensor:
    """(..., Dv+1) -> (..., Dv): divided by the last column, 0 where that is 0."""
    return c[..., :-1] / c[..., -1:].where(c[..., -1:] != 0, 1)


def linear_attention(q_feat: Tensor, k_feat: Tensor, v: Tensor) -> Tensor:
    """c = phi(q) (sum phi(k)^T v) / (phi(q) sum phi(k)), the sums over all keys: (B, H, T, Dv).

    q_feat (B, H, T, m), k_feat (B, Hkv, S, m), v (B, Hkv, S, Dv). A key whose features are 0 takes
    no part.
    """
    with no_autocast(v):
        sums = k_feat.mT @ F.pad(v, (0, 1), value=1.0)  # a last column of ones: the denominator
        return _quotient(q_feat @ repeat_heads(sums, q_feat.shape[1]))


def causal_linear_attention(q_feat: Tensor, k_feat: Tensor, v: Tensor, past: Tensor, place: Tensor,
                            chunk: int = 128) -> tuple[Tensor, Tensor]:
    """The same with sums over the past and the keys up to place[b, i] for row i, in O(T).

    q_feat (B, H, R, m), place (B, R) ascending; k_feat (B, Hkv, T, m), v (B, Hkv, T, Dv); past and
    the second result (B, Hkv, m, Dv+1): sums of phi(k)^T [v ; 1] before the first key and after the
    last. Returns (B, H, R, Dv), 0 for a row that sees nothing.

    Keys of earlier chunks count through their sum, keys of the same chunk one by one.
    """
    n_group, T = q_feat.shape[1] // k_feat.shape[1], k_feat.shape[2]
    if isinstance(T, torch.SymInt):  # torch.export: any T, not a number of chunks
        chunk = T
    # Each row to its token's place, so that rows and keys are cut into the same chunks.
    slots = q_feat.new_zeros(*q_feat.shape[:2], T, q_feat.shape[3])
    slots = slots.scatter(2, place[:, None, :, None].expand_as(q_feat), q_feat)
    pad = (0, 0, 0, -T % chunk)
    with no_autocast(v):
        v = F.pad(v, (0, 1), value=1.0)  # as above
        q = rearrange(F.pad(slots, pad), "b (h g) (n c) m -> b h n g c m", g=n_group, c=chunk)
        k = rearrange(F.pad(k_feat, pad), "b h (n c) m -> b h n 1 c m", c=chunk)
        v = rearrange(F.pad(v, pad), "b h (n c) e -> b h n 1 c e", c=chunk)
        sums = torch.cat([past[:, :, None, None], k.mT @ v], dim=2).cumsum(2)  # b h n+1 1 m e
        c = q @ sums[:, :, :-1] + (q @ k.mT).tril() @ v  # earlier chunks, same chunk
    c = take(rearrange(c, "b h n g c e -> b (h g) (n c) e"), place)
    return _quotient(c), sums[:, :, -1, 0]


# -- 2. context: values with their position, mixed by linear attention -----------------------------


def causal_context(q: Tensor, k: Tensor, v: Tensor, position: Tensor, projection: Tensor,
                   softmax_scale: float, stride: int, count: Tensor, n_new: Tensor,
                   past: Tensor) -> tuple[Tensor, Tensor]:
    """Causal linear attention over [position ; v] with ReLU features, for the rows of a call.

    q (B, H, R, D) of the rows, k, v (B, Hkv, T, D), position (max_positions, D), the learned table,
    since a causal sequence grows; count, n_new (B,); past and the second result (B, Hkv, m, 2D+1)
    as in causal_linear_attention. Returns (B, H, R, 2D).
    """
    T = k.shape[2]
    rank = count[:, None] + torch.arange(T, device=k.device)
    place = row_places(count, T, stride).clamp(max=T - 1)
    q, k_scaled = scaled_qk(q, k, softmax_scale)
    with no_autocast(q):
        q_feat = relu_features(q, projection)
        k_feat = relu_features(k_scaled, projection) * is_token(k, n_new)
    v = at_least_fp32(v)
    pos = F.embedding(rank.clamp(max=len(position) - 1), position)  # (B, T, D)
    v_cat = torch.cat([pos.to(v.dtype)[:, None].expand_as(v), v], dim=-1)
    return causal_linear_attention(q_feat, k_feat, v_cat, past, place)


def row_places(count: Tensor, T: int, stride: int) -> Tensor:
    """The places of the tokens of rank 0, stride, 2 * stride, ... in a call of T queries after
    count (B,) tokens: (B, R), R = ceil(T / stride). The last may lie behind the call's end."""
    first = -count % stride
    return first[:, None] + stride * torch.arange((T - 1) // stride + 1, device=count.device)


def bidirectional_context(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, softmax_scale: float,
                          n_new: Tensor) -> Tensor:
    """Linear attention over [position ; v] and all keys with softmax features: (B, H, T, 2D).

    q (B, H, T, D), k, v (B, Hkv, T, D), of which the first n_new (B,) are tokens.
    """
    T, D = q.shape[2:]
    q, k_scaled = scaled_qk(q, k, softmax_scale)
    with no_autocast(q):
        q_feat = softmax_features(q, projection)
        k_feat = softmax_features(k_scaled, projection, is_token(k, n_new)) * is_token(k, n_new)
    v = at_least_fp32(v)
    pos = interpolated_identity(n_new, T, D).to(v.dtype)[:, None].expand_as(v)
    return linear_attention(q_feat, k_feat, torch.cat([pos, v], dim=-1))


def interpolated_identity(seen: Tensor, n_rows: int, d: int) -> Tensor:
    """Bidirectional positions: the D x D identity, stretched linearly over each sequence's `seen`
    (B,) rows. Returns (B, n_rows, D) fp64."""
    i = torch.arange(n_rows, device=seen.device, dtype=torch.float64)
    x = i * (d - 1) / (seen[:, None] - 1).clamp(min=1)  # (B, n_rows)
    return F.relu(1 - (x[..., None] - torch.arange(d, device=seen.device)).abs())


# -- 3. encoder, row decoder and gates -------------------------------------------------------------


def encode_rows(context: Tensor, v: Tensor, encoder: nn.Sequential, decoder: nn.Linear,
                cnn: nn.Module, gate: nn.Linear) -> tuple[Tensor, Tensor]:
    """z = GELU(LayerNorm(Linear([c ; v]))), by one Linear for all heads; from it image and gates.

    context (B, H, R, 2D), v (B, Hkv, R, D) of the rows. Returns the image (B, H * channels, R, P),
    all channels of a head side by side, through the CNN's norm, and the gates (B, H, R, 2), s_prob
    and s_mix before their sigmoid.
    """
    dtype = v.dtype if is_autocast(v) else gate.weight.dtype
    x = torch.cat([context, repeat_heads(v, context.shape[1])], dim=-1)  # (B, H, R, 3D)
    if dtype == torch.float16:  # values of 6e4 would overflow before the norm
        with no_autocast(v):
            weights = {name: w.float() for name, w in encoder.named_parameters()}
            z = torch.func.functional_call(encoder, weights, x.float()).to(dtype)
    else:
        z = encoder(x.to(dtype))  # (B, H, R, 2D)
    image = rearrange(decoder(z), "b h t (c p) -> b (h c) t p", c=cnn.channels)
    return cnn.norm(image), gate(z)


# -- 4. the CNN: heads are channels, so heads inform each other ------------------------------------


class CausalCNN(nn.Module):
    """Image (B, 2H, R, P) -> scores (B, H, R, width).

    3x3 convolutions of dilation 2 that read rows t, t-2, t-4: never a later one. Differs: the
    authors upsample by nearest, which gives four neighbouring cells one score, then pad their 1x1
    convolution and resize its width + 2 cells; a 1x1 convolution to 4 cells costs the same.
    """

    channels = 2  # of a head

    def __init__(self, n_head: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(self.image_width(width))  # applied in encode_rows
        self.conv1 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.conv2 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.up = nn.Conv2d(2 * n_head, 4 * n_head, 1)
        self.norm_out = nn.LayerNorm(width)

    @staticmethod
    def image_width(width: int) -> int:
        """Differs: at least 4, since the norm of a row would leave nothing of a single number."""
        return max(4, -(-width // 4))

    def forward(self, image: Tensor, past: tuple[Tensor, Tensor],
                n_rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """past: the rows that entered each convolution before, (B, 2H, n, P), n = 0 at the start of
        a sequence, else HISTORY; the second result: the HISTORY rows before row n_rows (B,)."""
        x, last_rows = image, []
        for conv, before in zip((self.conv1, self.conv2), past):
            before = F.pad(before.to(x.dtype), (0, 0, HISTORY - before.shape[2], 0))
            x = torch.cat([before, x], dim=2)
            last_rows.append(take(x, n_rows[:, None] + torch.arange(HISTORY, device=x.device)))
            x = F.relu(conv(x))
        scores = rearrange(self.up(x), "b (h s) t p -> b h t (p s)", s=4)
        return self.norm_out(scores[..., : self.norm_out.weight.shape[0]]), tuple(last_rows)


class BidirectionalCNN(nn.Module):
    """Image (B, 4H, R, P) -> scores (B, H, R, width), computed for half the rows.
    Differs: the authors upsample bilinearly; here rows are doubled by nearest, and the last
    convolution gives 2 cells a column, as CausalCNN's gives 4."""

    channels = 4

    def __init__(self, n_head: int, width: int):
        super().__init__()
        self.width = width
        self.norm = nn.Identity()
        self.conv1 = nn.Conv2d(4 * n_head, 4 * n_head, 3, padding=1, stride=(2, 1))
        self.conv2 = nn.Conv2d(4 * n_head, 4 * n_head, 3, padding=1)
        self.up = nn.Conv2d(4 * n_head, 2 * n_head, 3, padding=1)

    @staticmethod
    def image_width(width: int) -> int:
        return max(4, -(-width // 2))

    def forward(self, image: Tensor, n_rows: Tensor) -> Tensor:
        """Rows from n_rows (B,) on are padding: they enter each convolution as zeros, as the border
        of the image does."""
        n_half = (n_rows + 1) // 2
        x = F.relu(self.conv1(image * is_token(image, n_rows)))
        x = F.relu(self.conv2(x * is_token(x, n_half)))
        x = x.index_select(2, torch.arange(image.shape[2], device=x.device) // 2)
        x = self.up(x * is_token(x, n_rows))
        return rearrange(x, "b (h s) t p -> b h t (p s)", s=2)[..., : self.width]


def causal_cnn(image: Tensor, cnn: CausalCNN, past: tuple[Tensor, Tensor],
               n_rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Calls the CNN; a function, so that kernels.py can stand in for it."""
    return cnn(image, past, n_rows)


# -- 5. cell keys, ours: each query's product with what stands for the keys of every cell ----------
#
# Random features do not tell single keys apart: without this step the cells kept miss much of the
# attention (results/README.md, What each choice is worth). The keys of a sequence are summed up in
# 2 * width buckets, whatever its length, so this step, too, is causal, linear in T and its state
# constant. (With sums alone it is linear attention, q sum_j k_j onehot(bucket(j))^T, with the
# identity for phi and one-hot numbers of buckets for values.)
#
# Buckets get wider while the sequence grows, unlike the bins of step 7. Whenever it is about to
# outgrow all buckets of 2**e keys, e, the level, rises by one, and buckets 2b and 2b + 1 become
# bucket b.
#
# A bidirectional layer sees all keys at once and needs no buckets: what stands for a cell is the
# mean of its own keys.


def bucket_level(seen, n_buckets: int):
    """The smallest e >= 0 for which n_buckets of 2**e keys hold `seen` keys: an int, or a tensor of
    any shape, as `seen` is."""
    if isinstance(seen, int):
        return (max(0, seen - 1) // n_buckets).bit_length()
    if isinstance(seen, torch.SymInt):  # torch.export: of the largest that it may be, or of 2**31
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        most = (n_buckets * 2**e for e in range(40))
        return next(e for e, n in enumerate(most) if n >= 2**31 or statically_known_true(seen <= n))
    return (seen[..., None] > n_buckets * 2 ** torch.arange(40, device=seen.device)).sum(-1)


def bucket_sums(k: Tensor, level: Tensor, rise: int, count: Tensor, n_new: Tensor,
                past: Tensor) -> Tensor:
    """Sums of the keys in each bucket of 2**level keys, bucket b from rank b * 2**level on:
    (B, Hkv, n_buckets, D).

    k (B, Hkv, T, D); level, count, n_new (B,); past (B, Hkv, n_buckets, D): the sums before the new
    keys, `rise` levels lower. Keys that no bucket holds are left out.
    """
    n_buckets = past.shape[2]
    buckets, outside = _buckets_of_new(level, count, n_new, k.shape[2], n_buckets)
    buckets_of_past = (torch.arange(n_buckets, device=k.device) >> rise).expand(len(k), -1)
    sums = _add_to_buckets(torch.zeros_like(past), past, buckets_of_past)
    k = k.masked_fill(outside, 0)  # not times 0, which leaves inf a nan
    return _add_to_buckets(sums, k, buckets)


def _buckets_of_new(level: Tensor, count: Tensor, n_new: Tensor, T: int,
                    n_buckets: int) -> tuple[Tensor, Tensor]:
    """The bucket of each new key, (B, T), and which are in none, (B, 1, T, 1)."""
    i = torch.arange(T, device=count.device)
    buckets = (count[:, None] + i) >> level[:, None]
    outside = (buckets >= n_buckets) | (i >= n_new[:, None])
    return buckets.clamp(max=n_buckets - 1), outside[:, None, :, None]


def _add_to_buckets(sums: Tensor, x: Tensor, buckets: Tensor) -> Tensor:
    """x (B, heads, N, size) added to sums (B, heads, n_buckets, size) at buckets (B, N)."""
    return sums.scatter_add(2, buckets[:, None, :, None].expand_as(x), x)


def bucket_tops(x: Tensor, level: Tensor, rise: int, count: Tensor, n_new: Tensor,
                past: Tensor) -> Tensor:
    """As bucket_sums, but the largest number in each dimension, 0 where there is none.

    x (B, Hkv, T, 2D); past and what is returned (B, Hkv, n_buckets, 2D).
    """
    n_buckets = past.shape[2]
    number = torch.arange(n_buckets, device=x.device)
    buckets, outside = _buckets_of_new(level, count, n_new, x.shape[2], n_buckets)
    was_empty = (number << (level[:, None] - rise)) >= count[:, None]  # (B, n_buckets)
    x = torch.cat([past.masked_fill(was_empty[:, None, :, None], -math.inf),
                   x.masked_fill(outside, -math.inf)], dim=2)
    of_past = (number >> rise).expand(len(x), -1)
    buckets = torch.cat([of_past, buckets], dim=1)
    buckets, tops = buckets[:, None, :, None].expand_as(x), torch.full_like(past, -math.inf)
    tops = tops.scatter_reduce(2, buckets, x, "amax")
    is_empty = (number << level[:, None]) >= (count + n_new)[:, None]
    return tops.masked_fill(is_empty[:, None, :, None], 0)


def cell_key_scores(q: Tensor, k: Tensor, row_seen: Tensor, in_cells: Tensor, width: int,
                    softmax_scale: float, count: Tensor, n_new: Tensor, past: Tensor,
                    bounds: bool) -> tuple[Tensor, Tensor]:
    """s of add_cell_keys, which says what the arguments are: (B, E, R, width), at least fp32; and
    its second result."""
    n_buckets, D = 2 * width, k.shape[3]
    q, k = at_least_fp32(q) * softmax_scale, at_least_fp32(k)
    past = past.to(k.dtype)
    cells, n_parts = torch.arange(width, device=q.device), 2 if bounds else 1
    # The key in the middle of each cell or, with bounds, those in the middle of its halves.
    middles = [(2 * (n_parts * cells + i) + 1) * in_cells[..., None] // (2 * n_parts * width)
               for i in range(n_parts)]  # (B, R, width) each
    row_level, level_of_past, next_level = (
        bucket_level(n, n_buckets) for n in (row_seen, count, count + n_new))
    scores, totals = q.new_zeros(*q.shape[:3], width), past
    # level(count + T) <= max(level(count), level(T)) + 1: T new keys rise by level(T) + 1 at most.
    for rise in range(bucket_level(k.shape[2], n_buckets) + 2):
        level = level_of_past + rise  # (B,)
        of_level = bucket_sums(k, level, rise, count, n_new, past[..., :D])
        keys, queries = of_level / 2 ** level[:, None, None, None], q
        if bounds:  # as in boxes, step 7
            tops = bucket_tops(torch.cat([k, -k], dim=-1), level, rise, count, n_new, past[..., D:])
            high, low = tops[..., :D], -tops[..., D:]
            keys = torch.cat([keys / 2 + (high + low) / 4, (high - low) / 4], dim=-1)
            queries, of_level = torch.cat([q, q.abs()], dim=-1), torch.cat([of_level, tops], dim=-1)
        products = queries @ repeat_heads(keys, q.shape[1]).mT
        e = level[:, None, None]
        last_full = (row_seen[..., None] >> e) - 1
        buckets = [torch.minimum(j >> e, last_full).clamp(0, n_buckets - 1) for j in middles]
        of_parts = [products.gather(-1, x[:, None].expand_as(scores)) for x in buckets]
        best = torch.stack(of_parts).amax(0)
        scores = torch.where((row_level == level[:, None])[:, None, :, None], best, scores)
        totals = torch.where((next_level == level)[:, None, None, None], of_level, totals)
    return scores, totals


def add_cell_keys(scores: Tensor | None, gain: Tensor, q: Tensor, k: Tensor, row_seen: Tensor,
                  softmax_scale: float, count: Tensor, n_new: Tensor, past: Tensor,
                  in_cells: Tensor | None = None, *, bounds: bool = False,
                  in_place: bool = False) -> tuple[Tensor, Tensor]:
    """scores + gain * max(s - s_max, -32): (B, E, R, width). s is the scaled product of q with what
    stands for a cell's keys, s_max the row's largest. Differs: the paper has no such term.

    The keys of a row lie in 2 * width buckets of 2**e keys, e as small as can be: a bucket has one
    key, or at most 1 / width of those seen. A cell looks at the bucket in its middle or, where that
    is not full yet, at the last full one:

        without bounds   s = softmax_scale * q . mean of the bucket's keys
        with bounds      half that and half an upper bound of q's products with its keys (boxes),
                         in which a single key stands out; of two buckets, those in the middle of
                         the cell's halves, the larger s

    Layers with bins (step 7) have bounds: their cells have to find keys, not only to sum up
    attention.

    scores (B, E, R, width), or None for zeros, gain (E,); q (B, E, R, D) of the rows, which see
    row_seen (B, R) keys, in_cells (B, R) of them in cells (all by default); k (B, Hkv, T, D);
    count, n_new (B,); past and the second result (B, Hkv, 2*width, D): bucket_sums before the new
    keys, at the level of count, and after them; with bounds (B, Hkv, 2*width, 3D): the sums, then
    bucket_tops of [k ; -k].
    in_place: the second result is past, overwritten.

    No gradient reaches q and k: a student whose keys are still far from its teacher's would be
    trained mainly through this term. The limit of -32 keeps layers whose products lie thousands
    apart from drowning the loss of all others.
    """
    with torch.no_grad(), no_autocast(q):
        in_cells = row_seen if in_cells is None else in_cells
        if scores is None:
            scores = q.new_zeros(*q.shape[:3], past.shape[2] // 2)
        products, totals = cell_key_scores(q, k, row_seen, in_cells, scores.shape[-1],
                                           softmax_scale, count, n_new, past, bounds)
        totals = past.copy_(totals) if in_place else totals
    return _add_products(scores, gain, products), totals


def _add_products(scores: Tensor, gain: Tensor, products: Tensor) -> Tensor:
    """scores + gain * max(s - s_max, -32), s the products."""
    products = (products - products.amax(-1, keepdim=True)).clamp(min=-32)
    return torch.addcmul(scores, gain[:, None, None].to(scores.dtype), products).to(scores.dtype)


def mean_keys(k: Tensor, n_keys: Tensor, width: int) -> Tensor:
    """The mean of the keys in each cell or, where it is narrower than a key and has none, the key
    in its middle: (B, Hkv, width, D), at least fp32.

    k (B, Hkv, T, D), of which the first n_keys (B,) are in cells, zeros behind them.
    """
    n_keys, cells = n_keys[:, None], torch.arange(width + 1, device=k.device)
    edges = first_key_of_cell(cells, n_keys, width)  # (B, width + 1)
    middle = (2 * cells[:-1] + 1) * n_keys // (2 * width)
    first, end = torch.minimum(edges[:, :-1], middle), torch.maximum(edges[:, 1:], middle + 1)
    j = torch.arange(k.shape[2], device=k.device)
    is_in = (j >= first[..., None]) & (j < end[..., None])  # (B, width, T)
    k = at_least_fp32(k)
    with no_autocast(k):
        return (is_in.to(k.dtype) / (end - first)[..., None])[:, None] @ k


def add_mean_keys(scores: Tensor, gain: Tensor, q: Tensor, k: Tensor, n_new: Tensor,
                  softmax_scale: float) -> Tensor:
    """add_cell_keys of a bidirectional layer: s = softmax_scale * q . (mean key of the cell).

    scores (B, H, T, width), gain (H,), q (B, H, T, D), k (B, Hkv, T, D), n_new (B,). No gradient
    reaches q and k, and the limit is -32, as there.
    """
    with torch.no_grad(), no_autocast(q):
        keys = repeat_heads(mean_keys(k, n_new, scores.shape[-1]), q.shape[1])
        products = (at_least_fp32(q) * softmax_scale) @ keys.mT
    return _add_products(scores, gain, products)


# -- 6. grouped top-k: which cells to keep ---------------------------------------------------------


def select_cells(scores: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """topk_mask of softmax(scores), scores (B, H, R, width), over the cells of each row, which sees
    seen (B, R) keys."""
    _expect(scores.ndim == 4, "scores", "shape (B, H, R, width)", tuple(scores.shape))
    return topk_mask(at_least_fp32(scores).softmax(-1), seen, topk, group)


def topk_mask(probs: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """The cells to keep, bool (B, H, T, width). Section 3.2 of the paper; no gradient flows through
    the choice.

    probs (B, H, T, width); seen (B, T) keys that each query may see. Cells are ranked inside a
    group and the first n are kept, ties going to the lower (head, row, cell); a query that sees no
    key keeps no cell:

        causal_batch   H x width cells of one query          n = round(H*topk*width / seen)
        query          width cells of one head and query     n = round(topk*width / seen)
        head           T x width cells of one head           n = topk*width    (bidirectional only)
        batch          H x T x width cells of one sequence   n = H*topk*width  (bidirectional only)

    n is rounded half up, at least 1, at most all, so early causal queries keep every cell and are
    exactly dense. Differs: the authors round half to even, and add jitter to indices in training.
    Raises ValueError if shapes do not fit.
    """
    _expect(probs.ndim == 4, "probs", "shape (B, H, T, width)", tuple(probs.shape))
    B, H, T, width = probs.shape
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(is_integer(topk) and topk >= 1, "topk", "an integer >= 1", repr(topk))
    _expect(group in tuple(GROUPS), "group", f"one of {tuple(GROUPS)}", repr(group))
    _expect(not GROUPS[group].shared, "group", "one that ranks cells, not bins", repr(group))
    visible = (seen > 0)[:, None, :, None]  # (B, 1, T, 1)
    topk = min(topk, 2**31)  # more keeps everything, and would not fit into 64 bits below
    n = GROUPS[group].n_kept(H, topk * width, seen.long().clamp(min=1))  # a number, or (B, T)
    return keep_best(probs.detach().masked_fill(~visible, -1), n, group) & visible


def keep_best(x: Tensor, n: Tensor | int, group: str) -> Tensor:
    """The n largest, at least 1, of those entries of x (B, H, T, P) that a group ranks together,
    ties to the lower: bool. n: a number, or (B, T)."""
    (_, H, T, P), layout = x.shape, GROUPS[group].layout
    ranked = rearrange(x, f"b h t p -> {layout}")
    n = torch.as_tensor(n, device=x.device).clamp(min=1)
    if n.ndim:
        n = n.view(*n.shape, *[1] * (ranked.ndim - 2))
    ranking = ranked.sort(dim=-1, descending=True, stable=True).indices  # stable: ties to the lower
    first_n = (torch.arange(ranked.shape[-1], device=x.device) < n).expand_as(ranking)
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranking, first_n)
    return rearrange(keep, f"{layout} -> b h t p", h=H, t=T, p=P)


# -- 7. candidates and bins, ours: which keys of the best cells ------------------------------------
#
# The longer a text, the more keys are in a cell, and few of them matter. So the best cells only
# name candidates: bins of a fixed number of keys, which are ranked by the query's products with
# boxes around their keys. Heads that share a choice make it by their mean query, in which each counts
# by a learned share. A query attends to the best bins, and always to its last keys and to the first
# of the sequence. The last keys are in no cell; the first are in cells, but are no candidates.

NONE = 2**31 - 1  # fills up lists of bins; larger than the number of any bin


def boxes(k: Tensor, bin: int) -> Tensor:
    """What stands for every `bin` keys: (B, Hkv, S, D) -> (B, Hkv, ceil(S / bin), 2D), dtype of k.

    A bin's keys lie in a box, from their lowest to their highest number in each dimension. A
    query's product with one of them is at most q . middle + |q| . radius, an upper bound (Quest;
    Tang et al., ICML 2024), and on average q . mean. A single key stands out in the bound but is
    lost in the mean; many similar keys count in the mean. Bins are ranked by half of each, which is
    the product of [q ; |q|] with [(mean + middle) / 2 ; radius / 2].
    """
    keys = F.pad(at_least_fp32(k), (0, 0, 0, -k.shape[2] % bin)).unflatten(2, (-1, bin))
    highest, lowest = keys.amax(3), keys.amin(3)
    centre = keys.mean(3) / 2 + (highest + lowest) / 4
    return torch.cat([centre, (highest - lowest) / 4], dim=-1).to(k.dtype)


@torch.no_grad()
def choose_bins(scores: Tensor, q: Tensor, k: Tensor, seen: Tensor, row: Tensor, row_seen: Tensor,
                topk: int, config: SEAConfig, softmax_scale: float, *, order: Tensor | None = None,
                kept: Tensor | None = None) -> Tensor:
    """The bins that each query attends to: (B, C, T, n) int32, ascending, NONE behind the last.
    Differs: the paper attends to all keys of the best cells. No gradient flows through the choice.

    scores (B, E, R, width) of the rows, which see row_seen (B, R) keys; q (B, C, T, D), row (B, T)
    and seen (B, T) of the queries; k (B, Hkv, S, D) and order (B, S) as in sparse_attention. There
    are C = config.n_choosers choices: H or, in group "kv", Hkv, where q is mean_of_heads of the
    heads that share keys. With a stride the queries of a row share its candidates, but each chooses
    for itself. kept: as of no_candidates; not used here, where candidates are found anew in every
    call.

        candidates   bins of the row's best cells, at most config.candidates for each to be chosen
                     (one cell at least)
        chosen       the n_chosen(topk) best of them, by softmax_scale * [q ; |q|] . boxes(k), or H
                     times as many of all heads, by its log softmax (group "causal_batch")
        always       those of the first keys, and of all keys behind the row's cells
    """
    S, bin, C = k.shape[2], config.bin, config.n_choosers
    n_chosen, n_listed = config.n_chosen(topk), config.n_listed(topk, S)
    if order is not None:
        k = by_rank(k, order, seen)
    if isinstance(S, torch.SymInt):  # torch.export: any S, not a number of bins
        k = F.pad(k, (0, 0, 0, config.most_bins(S) * bin - S))
    n_in_cells = config.in_cells(row_seen) // bin  # (B, R), bins
    of_bins = at_least_fp32(repeat_heads(boxes(k, bin), C))  # (B, C, bins, 2D)
    n_bin = of_bins.shape[2]
    number = torch.arange(n_bin, device=k.device)  # of each bin
    best_cells = candidate_cells(scores, n_in_cells, config, n_chosen)
    in_best_cells = spread_to_keys(best_cells, n_in_cells, n_bin, False)  # bins for keys
    is_candidate = take(in_best_cells & (number >= config.n_first), row)  # (B, C, T, bins)
    with no_autocast(q):
        q = at_least_fp32(q) * softmax_scale  # (B, C, T, D)
        products = torch.cat([q, q.abs()], dim=-1) @ of_bins.mT  # (B, C, T, bins)
        lowest = torch.finfo(products.dtype).min
        # Keeps a choice's ranking, and makes choices that are ranked together comparable.
        ranked = products.masked_fill(~is_candidate, lowest).log_softmax(-1)
        n = min(config.n_ranked_together * n_chosen, 2**31)  # as in topk_mask
        chosen = keep_best(ranked.masked_fill(~is_candidate, lowest), n, config.group)
        chosen &= is_candidate & (n_chosen > 0) & (seen > 0)[:, None, :, None]
    always = always_bins(seen, n_in_cells.gather(1, row), config, S)[:, None].expand(-1, C, -1, -1)
    bins = torch.cat([always, torch.where(chosen, number, NONE)], dim=-1).sort(-1).values
    return F.pad(bins, (0, n_listed), value=NONE)[..., :n_listed].int()


def candidate_cells(scores: Tensor, n_in_cells: Tensor, config: SEAConfig,
                    n_chosen: int) -> Tensor:
    """The cells whose bins compete: bool (B, C, R, width), by the scores of what chooses or, where
    heads with estimates of their own share a choice, by their mean probabilities.

    scores (B, E, R, width); n_in_cells (B, R): how many bins the cells of a row share out. Cells
    without a bin do not compete. The largest number of cells is taken that cannot hold more bins
    than are wanted, but at least one.
    """
    width, C = scores.shape[-1], config.n_choosers
    holds = (keys_per_cell(n_in_cells, width) > 0)[:, None]  # (B, 1, R, width), a bin at least
    ranked = at_least_fp32(scores)
    lowest = torch.finfo(ranked.dtype).min
    if ranked.shape[1] > C:
        probs = ranked.masked_fill(~holds, lowest).softmax(-1)
        ranked = probs.unflatten(1, (C, -1)).mean(2)
    ranked = repeat_heads(ranked, C).masked_fill(~holds, lowest)
    n_wanted = min(config.candidates * n_chosen, 2**31)  # as in topk_mask
    most_in_cell = -(-n_in_cells // width)
    n_cells = (n_wanted // most_in_cell.clamp(min=1)).clamp(min=1)
    n_cells = torch.where(n_in_cells <= n_wanted, width, n_cells)
    return keep_best(ranked, n_cells, "query") & holds


def no_candidates(config: SEAConfig, k: Tensor, topk: int) -> Tensor | None:
    """None here; in kernels.py room, (B, C, 1, n) int32, for the candidates that the decoding steps
    of a row share and, in bins of more than 2 keys, for what stands for each: 2 * D numbers of the
    dtype of k (B, Hkv, S, D), a cache. Sized for this topk and S: steps that need more find their
    candidates anew."""


def always_bins(seen: Tensor, begin: Tensor, config: SEAConfig, n_keys: int) -> Tensor:
    """The bins of a query's first keys, and those from number `begin` (B, T) on, NONE where it sees
    none of their keys: (B, T, n). seen (B, T), at most n_keys."""
    bin, most = config.bin, config.most_bins(n_keys)
    n_first, n = min(config.n_first, most), min(config.n_always, most)
    first, last = (torch.arange(i, device=seen.device) for i in (n_first, n - n_first))
    last = begin.clamp(min=n_first)[..., None] + last
    bins = torch.cat([first.expand(*last.shape[:2], -1), last], dim=-1)
    return bins.masked_fill(bins * bin >= seen[..., None], NONE)


# -- 8. from cells and bins to keys ----------------------------------------------------------------


def cell_of_key(j, seen, width: int):
    """The cell that key j (0-based rank) lies in for a query that sees `seen` >= 1 keys. Exact, for
    ints and int tensors.

    Differs: the paper's floor((j + 0.5) / seen * width - tiny) in integers, so that no rounding
    decides.
    """
    j, seen = (x.long() if isinstance(x, Tensor) else x for x in (j, seen))
    return ((2 * j + 1) * width - 1) // (2 * seen)


def first_key_of_cell(p, seen, width: int):
    """lo(p): cell p covers the keys lo(p) <= j < lo(p+1), none where seen < width leaves it empty.
    lo(width) = seen."""
    p, seen = (x.long() if isinstance(x, Tensor) else x for x in (p, seen))
    return (2 * seen * p + width) // (2 * width)


def keys_per_cell(in_cells: Tensor, width: int, unit: int = 1, first: int = 0) -> Tensor:
    """(B, T) -> (B, T, width): how many keys each cell covers, without the `first` first ones; the
    other arguments as in cells_of_keys."""
    cells = torch.arange(width + 1, device=in_cells.device)
    edges = first_key_of_cell(cells, in_cells[..., None] // unit, width) * unit
    return edges.clamp(min=first).diff(dim=-1)


def cells_of_keys(in_cells: Tensor, n_keys: int, width: int,
                  unit: int = 1) -> tuple[Tensor, Tensor]:
    """The cell of each key and whether it is in one: (..., n_keys), of rows whose first in_cells
    (...) keys are in cells, `unit` neighbours always in the same."""
    j = torch.arange(n_keys, device=in_cells.device)
    n_units = (in_cells[..., None] // unit).clamp(min=1)
    return cell_of_key(j // unit, n_units, width).clamp(max=width - 1), j < in_cells[..., None]


def spread_to_keys(cells: Tensor, in_cells: Tensor, n_keys: int, fill, unit: int = 1) -> Tensor:
    """Give each key its cell's value: (B, H, T, width) -> (B, H, T, n_keys), `fill` for keys that
    are in none; arguments as in cells_of_keys."""
    cell, is_in = cells_of_keys(in_cells, n_keys, cells.shape[-1], unit)  # (B, T, n_keys)
    values = cells.gather(-1, cell[:, None].expand(-1, cells.shape[1], -1, -1))
    return values.masked_fill(~is_in[:, None], fill)


def expand_mask(mask: Tensor, seen: Tensor, n_keys: int) -> Tensor:
    """Which keys the kept cells stand for: bool (B, H, T, width) -> (B, H, T, n_keys). For reading,
    tests and the reference's sparse attention; the kernels never expand a mask."""
    return spread_to_keys(mask, seen, n_keys, False)


def expand_bins(bins: Tensor, seen: Tensor, n_keys: int, bin: int) -> Tensor:
    """As expand_mask, of the chosen bins: (B, C, T, n) -> bool (B, C, T, n_keys)."""
    n_bin = -(-n_keys // bin)
    keep = torch.zeros(*bins.shape[:3], n_bin + 1, dtype=torch.bool, device=bins.device)
    keep = keep.scatter(-1, bins.long().clamp(max=n_bin), True)
    j = torch.arange(n_keys, device=bins.device)
    return keep[..., j // bin] & (j < seen[..., None])[:, None]


# -- 9. sparse attention ---------------------------------------------------------------------------


def by_rank(x: Tensor, order: Tensor, seen: Tensor) -> Tensor:
    """x (B, heads, S, size) with what order (B, S) gives each rank at its place, and 0 behind what
    queries see, seen (B, T): padding may be nan."""
    x = take(x, order)
    return x.masked_fill(~is_token(x, seen.amax(1)), 0)


def _check_places(k: Tensor, seen: Tensor, queries: tuple[int, int], order: Tensor | None,
                  block: int) -> None:
    """Raises ValueError for seen and order that are not of these keys and (B, T) queries, and for
    no number of queries to compute at a time."""
    keys = len(k), k.shape[2]
    _expect(is_integer(block) and block >= 1, "block", "an integer >= 1", repr(block))
    _expect(seen.shape == queries, "seen", f"shape (B, T) = {queries}", tuple(seen.shape))
    _expect(order is None or order.shape == keys, "order", f"shape (B, S) = {keys}",
            order is not None and tuple(order.shape))


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seen: Tensor,
                     softmax_scale: float | None = None, *, row: Tensor | None = None,
                     order: Tensor | None = None, block: int = 1024) -> Tensor:
    """softmax(q k^T * softmax_scale) v over the keys under the kept cells: (B, H, T, D). A query
    with no key gives 0.

    q (B, H, T, D); k, v (B, Hkv, S, D), the valid keys first; mask (B, H, R, width) bool; seen
    (B, T); row (B, T): the row of `mask` that each query uses, its own (R = T) by default; order
    (B, S): where in k and v the key of each rank stands, at its rank by default; softmax_scale
    D**-0.5 by default. Raises ValueError if shapes do not fit.

    This reference computes all T x S scores, `block` queries at a time (and again in the backward
    pass, if there are several blocks), so its memory is linear in T but its time is not; kernels.py
    visits the selected keys only. Differs: the paper expands the cells to a CSR matrix with one
    index per key.
    """
    check_qkv(q, k, v)
    B, H, T, _ = q.shape
    _expect(mask.ndim == 4 and mask.shape[:2] == (B, H), "mask",
            f"shape (B, H, R, width) with B, H = {(B, H)}", tuple(mask.shape))
    _expect(mask.dtype == torch.bool, "mask", "bool", mask.dtype)
    _check_places(k, seen, (B, T), order, block)
    _expect(row is not None or mask.shape[2] == T, "mask",
            f"{T} rows, or `row` to say which is whose", mask.shape[2])
    _expect(row is None or row.shape == (B, T), "row", f"shape (B, T) = {(B, T)}",
            row is not None and tuple(row.shape))
    mask = mask if row is None else take(mask, row)
    return _attend(q, k, v, mask, seen, softmax_scale, order, expand_mask, block)


def bin_attention(q: Tensor, k: Tensor, v: Tensor, bins: Tensor, seen: Tensor,
                  softmax_scale: float | None = None, *, bin: int, order: Tensor | None = None,
                  block: int = 1024) -> Tensor:
    """sparse_attention over the keys in the chosen bins, of `bin` keys each: (B, H, T, D).

    bins (B, C, T, n) int32, of choose_bins; H / C adjacent query heads share those of a chooser.
    The other arguments as in sparse_attention. Raises ValueError if shapes do not fit.
    """
    check_qkv(q, k, v)
    B, H, T, _ = q.shape
    _expect(is_integer(bin) and bin >= 1, "bin", "an integer >= 1", repr(bin))
    _expect(bins.ndim == 4 and bins.dtype == torch.int32, "bins", "int32 of shape (B, C, T, n)",
            f"{bins.dtype} {tuple(bins.shape)}")
    C, Hkv = bins.shape[1], k.shape[1]
    _expect(bins.shape[0] == B and bins.shape[2] == T and C >= 1 and H % C == C % Hkv == 0, "bins",
            f"shape (B, C, T, n) with B, T = {(B, T)} and C a divisor of the {H} heads and a "
            f"multiple of the {Hkv} key/value heads", tuple(bins.shape))
    _check_places(k, seen, (B, T), order, block)

    def expand(bins, seen, n_keys):
        return repeat_heads(expand_bins(bins, seen, n_keys, bin), H)

    return _attend(q, k, v, bins, seen, softmax_scale, order, expand, block)


def _attend(q, k, v, kept, seen, softmax_scale, order, expand, block):
    """Attention to the keys that expand(kept, seen, n_keys) gives, `block` queries at a time; kept
    (B, C, T, n)."""
    H, T = q.shape[1:3]
    if order is not None:
        k, v = by_rank(k, order, seen), by_rank(v, order, seen)

    def part(q, k, v, kept, seen):
        with no_autocast(q):
            weights = attention_weights(q, k, expand(kept, seen, k.shape[2]), softmax_scale)
            return weights.to(v.dtype) @ repeat_heads(v, H)

    if isinstance(T, torch.SymInt) or T <= block:  # torch.export: any T, not a number of blocks
        return part(q, k, v, kept, seen)
    outs = []
    for i in range(0, T, block):
        x = q[:, :, i : i + block], k, v, kept[:, :, i : i + block], seen[:, i : i + block]
        outs.append(checkpoint(part, *x, use_reentrant=False))
    return torch.cat(outs, dim=2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, softmax_scale: float,
                    is_first: bool) -> Tensor:
    """softmax(q k^T * softmax_scale) v over all keys that each query sees: (B, H, T, D), anything
    for a query with no key.

    q (B, H, T, D); k, v (B, Hkv, S, D) by rank; seen (B, T). is_first: the queries are those of the
    T first keys, so that PyTorch needs neither a mask nor `seen` to know what they see.
    """
    if is_first:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        if q.dtype not in (torch.float16, torch.bfloat16):  # on a GPU no kernel would share keys
            k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale,
                                              enable_gqa=q.shape[1] != k.shape[1])
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    sees = torch.arange(k.shape[2], device=k.device) < seen.clamp(min=1)[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, sees, scale=softmax_scale)


def attention_weights(q: Tensor, k: Tensor, keep: Tensor,
                      softmax_scale: float | None = None) -> Tensor:
    """The sparse attention matrix, written out: (B, H, T, S), rows of sum 1, or 0 for a query with
    no key. q (B, H, T, D), k (B, Hkv, S, D); keep (B, H, T, S) bool: which keys each query attends
    to, of expand_mask or expand_bins."""
    scale = scale_or_default(softmax_scale, q.shape[-1])
    with no_autocast(q):
        scores = (at_least_fp32(q) * scale) @ at_least_fp32(repeat_heads(k, q.shape[1])).mT
        # The finite fill keeps empty rows, and their gradients, free of nan; `* keep` makes them 0.
        return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep


# -- 10. averages and mix --------------------------------------------------------------------------


def running_mean(v: Tensor, seen: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of v over the keys up to each query, the causal average: (B, Hkv, T, D), and the sum
    after the last (B, Hkv, D). v (B, Hkv, T, D); seen (B, T), 0 where v is padding; past
    (B, Hkv, D)."""
    sums = (at_least_fp32(v) * (seen > 0)[:, None, :, None]).cumsum(2) + past[:, :, None]
    return sums / seen[:, None, :, None].clamp(min=1), sums[:, :, -1]


def estimated_mean(probs: Tensor, v: Tensor, row_seen: Tensor) -> Tensor:
    """sum_j w_j v_j, the bidirectional average: (B, H, 1, D). w: the mean estimated row, each
    cell's value copied to its keys, and normalised.

    probs (B, H, R, width) of rows that see row_seen (B, R) keys, all of them or, in a padded row,
    none. Differs: the authors do not normalise w to sum 1.
    """
    v = repeat_heads(v, probs.shape[1]).to(probs.dtype)
    # The normalisation below makes this sum over the rows a mean.
    total = (probs * (row_seen > 0)[:, None, :, None]).sum(2, keepdim=True)
    w = spread_to_keys(total, row_seen.amax(1, keepdim=True), v.shape[2], 0.0)  # (B, H, 1, S)
    w = w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    with no_autocast(v):
        return w @ v


def mix(sparse: Tensor, average: Tensor, gates: Tensor, seen: Tensor, row: Tensor) -> Tensor:
    """out = s_mix * s_prob * sparse + (1 - s_mix) * average, (B, H, T, D), 0 for a query that sees
    no key. average broadcastable to sparse; gates (B, H, R, 2), before their sigmoid; row (B, T):
    the row that each query uses."""
    s_prob, s_mix = take(at_least_fp32(gates).sigmoid(), row).split(1, dim=-1)  # (B, H, T, 1)
    out = s_mix * s_prob * sparse + (1 - s_mix) * average
    return (out * (seen > 0)[:, None, :, None]).to(sparse.dtype)


def mix_average(sparse: Tensor, v: Tensor, gates: Tensor, seen: Tensor, row: Tensor, past: Tensor,
                in_place: bool = False) -> tuple[Tensor, Tensor]:
    """mix with the running_mean of v (B, Hkv, T, D), and the sum of v after the last token, past
    (B, Hkv, D) the one before the first; the other arguments as in mix. in_place: the second result
    is past, overwritten."""
    average, v_sum = running_mean(v, seen, past)
    v_sum = past.copy_(v_sum) if in_place else v_sum
    return mix(sparse, repeat_heads(average, sparse.shape[1]), gates, seen, row), v_sum


# -- state: one rule for training, chunked prefill and decoding ------------------------------------


@dataclass
class SEAState:
    """What a causal layer needs of the past; constant in size but for the KV cache (None where the
    caller keeps it).

    Numbers a sequence: Hkv*m*(2D+1) of sums and Hkv*D of v_sum in fp32, 16*H*P of conv_rows
    (without a CNN only v_sum of these), with cell_keys Hkv*2*width*D in fp32, with bins three times
    as many, and with a stride E*width and, of a CNN's gates, 2*H. At 12 heads of 64 and width 256,
    in bf16: 0.23 MB, with cell_keys 1.8, with bins 5.0. Of step 7 it holds nothing but, with a
    stride and where steps overwrite it, the last row's candidates and what stands for their keys,
    which else is computed from the KV cache in every call.

    Differs: the authors' cached path skips the feature map and keeps every cell for a single new
    token; with this state any split of a sequence into calls gives what one call gives.
    """

    count: Tensor  # (B,) tokens so far
    n_tokens: int  # places of all calls so far, padding included, a number for the whole batch
    sums: Tensor  # (B, Hkv, m, 2D+1), sum of phi(k)^T [position ; v ; 1]
    v_sum: Tensor  # (B, Hkv, D)
    conv_rows: tuple[Tensor, Tensor]  # (B, 2H, 0 or 4, P), the last that entered each convolution
    last_scores: Tensor  # (B, E, 0 or 1, width), the last row, if the stride lets a query reuse it
    last_gates: Tensor  # (B, H, 0 or 1, 2); 0 without a CNN, where all rows have the same
    key_sums: Tensor  # (B, Hkv, 2*width or 0, D, with bins 3D), of add_cell_keys
    k: Tensor | None  # (B, Hkv, S, D), by rank
    v: Tensor | None
    n_least: int = 0  # tokens so far of each sequence, at least
    stride: int = 1  # query_stride of the layer
    candidates: Tensor | None = None  # of no_candidates, where steps overwrite the state

    @classmethod
    def empty(cls, config: SEAConfig, q: Tensor) -> "SEAState":
        """Before the first token: sums are 0, and there are no rows and no keys. q (B, H, T, D)."""
        B, none = len(q), q.new_empty(len(q), config.kv_heads, 0, config.d_head)
        sums, rows = cls.shapes(config)
        sums = {name: torch.zeros(B, *shape, dtype=at_least_fp32(q[:0]).dtype, device=q.device)
                for name, shape in sums.items()}
        rows = {name: q.new_empty(B, heads, 0, size) for name, (heads, size) in rows.items()}
        rows["conv_rows"] = (rows["conv_rows"], rows["conv_rows"])
        count = torch.zeros(B, dtype=torch.long, device=q.device)
        return cls(count=count, n_tokens=0, **sums, **rows, k=none, v=none,
                   stride=config.query_stride)

    @staticmethod
    def shapes(config: SEAConfig) -> tuple[dict, dict]:
        """Of a sequence's sums, and heads and size of its rows, which are 0 or more, by name."""
        H, Hkv, D = config.n_head, config.kv_heads, config.d_head
        n_buckets = 2 * config.width if config.causal and config.cell_keys else 0
        return dict(
            sums=(Hkv, config.n_features, 2 * D + 1),
            v_sum=(Hkv, D),
            key_sums=(Hkv, n_buckets, 3 * D if config.has_bins else D),
        ), dict(
            conv_rows=(2 * H, CausalCNN.image_width(config.width)),
            last_scores=(config.n_estimates, config.width),
            last_gates=(H, 2),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All but candidates. After overwriting these, fill candidates, if any, with -1, as copy_
        does: they are then found anew."""
        for name, value in vars(self).items():
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, Tensor) and name != "candidates":
                    yield name, x

    def index_select(self, index: Tensor) -> "SEAState":
        """The state of batch entries `index`: beam search's reordering, batch expansion."""
        picked = {name: x.index_select(0, index) for name, x in self.tensors()}
        picked["conv_rows"] = tuple(x.index_select(0, index) for x in self.conv_rows)
        return replace(self, candidates=None, **picked)

    @torch.no_grad()
    def copy_(self, other: "SEAState") -> None:
        """Copy `other` into this state in place. Only for states without a KV cache, since that
        grows. It also changes those tensors of the SEAOutput that this state came with. Raises
        ValueError for other states, or other shapes."""
        _expect(self.k is None and other.k is None, "state",
                "one whose KV cache the caller keeps (kv_cached=True)", "one with its own")
        for (name, mine), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            _expect(mine.shape == theirs.shape, "other", f"{name} of shape {tuple(mine.shape)}",
                    tuple(theirs.shape))
        for (_, mine), (_, theirs) in zip(self.tensors(), other.tensors()):
            mine.copy_(theirs)
        self.n_tokens, self.n_least, self.stride = other.n_tokens, other.n_least, other.stride
        if self.candidates is not None and self.candidates is not other.candidates:
            self.candidates.fill_(-1)  # here, where a CUDA graph would look for them


@dataclass
class SEAOutput:
    """The result of SEAttention and what it was made of. `probs` and `mask` hold a row for each
    query."""

    out: Tensor  # (B, H, T, D)
    seen: Tensor  # (B, T)
    state: SEAState | None  # None if bidirectional
    # A call in chunks (rows_at_once) or of documents has none of these, a layer of bins no cells,
    # one of cells no bins, a control (baselines.py) what it computes. R: with the row of the past.
    scores: Tensor | None = None  # (B, E, R, width), before the softmax over cells
    cells: Any = None  # (B, H, R, width) the kept ones: a bool tensor, or kernels.CellBits
    row: Tensor | None = None  # (B, T), the row of `scores` and `cells` that each query uses
    row_in_cells: Tensor | None = None  # (B, R), keys that a row's cells share out
    bins: Tensor | None = None  # (B, C, T, n), of choose_bins; then `cells` is None
    bin: int = 0  # keys of each bin
    head_share: Tensor | None = None  # (H,), of heads that choose bins together
    dense_below: int = 0  # queries that see fewer keys attend to all of them, not to cells or bins

    @property
    def probs(self) -> Tensor | None:
        """Estimated attention (B, H, T, width)."""
        if self.scores is None:
            return None
        probs = take(at_least_fp32(self.scores).softmax(-1), self.row)
        return repeat_heads(probs, self.out.shape[1])

    @property
    def mask(self) -> Tensor | None:
        """Kept cells, bool (B, H, T, width)."""
        if self.cells is None:
            return None
        cells = self.cells if isinstance(self.cells, Tensor) else self.cells.unpack()
        return take(cells, self.row) & (self.seen > 0)[:, None, :, None]

    def attended(self, n_keys: int) -> Tensor:
        """Which keys, by rank, each query attends to, bool (B, H, T, n_keys). Raises ValueError, as
        n_attended does, for a result that has neither cells nor bins."""
        self._expect_choice()
        if self.bins is None:
            keep = expand_mask(self.mask, self.seen, n_keys)
        else:
            keep = expand_bins(self.bins, self.seen, n_keys, self.bin)
            keep = repeat_heads(keep, self.out.shape[1])
        sees = torch.arange(n_keys, device=keep.device) < self.seen[:, None, :, None]
        return torch.where(self.is_dense[:, None, :, None], sees, keep)

    def n_attended(self) -> Tensor:
        """How many keys each query attends to: (B, H, T), or (B, C, T) with bins."""
        self._expect_choice()
        if self.bins is None:
            n = (self.mask * keys_per_cell(self.seen, self.mask.shape[-1])[:, None]).sum(-1)
        else:
            begin = self.bins.long() * self.bin
            n = (self.seen[:, None, :, None] - begin).clamp(0, self.bin).sum(-1)
        return torch.where(self.is_dense[:, None], self.seen[:, None], n)

    def _expect_choice(self) -> None:
        _expect(self.cells is not None or self.bins is not None, "result", "one with cells or bins",
                "that of a call in chunks or of documents, or of a Performer")

    @property
    def in_cells(self) -> Tensor | None:
        """How many keys a query's cells share out, (B, T): with bins as many as its row's. None of
        a result that says nothing of cells."""
        if self.cells is not None:
            return self.seen
        return None if self.row_in_cells is None else self.row_in_cells.gather(1, self.row)

    @property
    def is_dense(self) -> Tensor:
        """Which queries attend to all keys that they see, (B, T)."""
        return attends_to_all(self.seen, self.dense_below)


def attends_to_all(seen: Tensor, dense_below: int) -> Tensor:
    """Which queries, that see seen (B, T) keys, attend to all of them: bool (B, T)."""
    return (seen > 0) & (seen < dense_below)


# -- the border: valid tokens first, and the rows to estimate --------------------------------------


def valid_first(valid: Tensor) -> Tensor:
    """(B, S) bool -> (B, S): the places of the valid tokens, in order, then those of the others."""
    return valid.int().argsort(dim=1, descending=True, stable=True)


@dataclass
class Tokens:
    """A call's tokens behind the border: compact, each sequence's from place 0 on."""

    q: Tensor  # (B, H, T, D); like k and v, zero behind the last token
    k: Tensor  # (B, Hkv, T, D)
    v: Tensor
    n_new: Tensor  # (B,)
    keys: Tensor  # (B, Hkv, S, D), those of the past and the new ones by rank, or as key_order says
    values: Tensor
    key_order: Tensor | None  # (B, S), where in keys and values the key of each rank stands
    came_from: Tensor | None  # (B, T), the column of each token; None: nothing has moved

    def back(self, result: SEAOutput) -> SEAOutput:
        """The result with each query where it came from."""
        if self.came_from is not None:
            back = self.came_from.argsort(dim=1)
            result.out, result.seen = take(result.out, back), result.seen.gather(1, back)
            result.bins = None if result.bins is None else take(result.bins, back)
            result.row = None if result.row is None else result.row.gather(1, back)
        return result


def to_front(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, past: SEAState,
             kv_cached: bool, take_pair: Callable = take_pair) -> Tokens:
    """The border on the way in, Tokens.back on the way out; arguments as in SEAttention.forward.
    take_pair: of one backend or the other.

    Whatever padding holds, nan included, goes no further. Without padding nothing moves.
    """
    T, S, came_from, key_order = q.shape[2], k.shape[2], None, None
    if valid is None:
        n_new = torch.full((len(q),), T, device=q.device)
        if T == 1 and kv_cached:  # a static buffer may go on behind the new token
            k_new, v_new = take_pair(k, v, past.count[:, None])
        else:
            k_new, v_new = k[:, :, -T:], v[:, :, -T:]
    else:
        n_new, k_new, v_new = valid[:, -T:].sum(1), k[:, :, -T:], v[:, :, -T:]
        if T > 1:  # a single token stands at the front already
            came_from = valid_first(valid[:, -T:])
            q, k_new, v_new = (take(x, came_from) for x in (q, k_new, v_new))
        padding = ~is_token(q, n_new)
        q, k_new, v_new = (x.masked_fill(padding, 0) for x in (q, k_new, v_new))
    if kv_cached and S > T:
        keys, values = k, v
        key_order = None if valid is None else valid_first(valid)
    else:
        keys, values = append(past.k, k_new, past.count), append(past.v, v_new, past.count)
    return Tokens(q, k_new, v_new, n_new, keys, values, key_order, came_from)


def append(cache: Tensor, x: Tensor, count: Tensor) -> Tensor:
    """x (B, Hkv, T, D) written behind the first count (B,) entries of cache (B, Hkv, S, D)."""
    if cache.shape[2] == 0:
        return x
    rank = (count[:, None] + torch.arange(x.shape[2], device=x.device))[:, None, :, None]
    return F.pad(cache.to(x.dtype), (0, 0, 0, x.shape[2])).scatter_(2, rank.expand_as(x), x)


@dataclass
class Rows:
    """Which queries are estimated, and which row every query uses: that of the last query whose
    rank in its sequence is a multiple of the stride. Row 0 may be one of the past, for the queries
    that still use it."""

    seen: Tensor  # (B, T) keys that each query sees, 0 behind the last token
    row: Tensor  # (B, T) the row of each query
    row_seen: Tensor  # (B, n_before + R) keys that each row sees, 0 behind the last
    place: Tensor  # (B, R) the query that each row of this call belongs to
    n_rows: Tensor  # (B,) rows of this call
    last: Tensor  # (B, 0 or 1) the last row, if the next call may still use it
    next_count: Tensor  # (B,) tokens of each sequence after this call
    row_in_cells: Tensor  # (B, n_before + R) keys that the cells of each row share out
    n_new: Tensor  # (B,)
    stride: int
    aligned: bool  # rows stand at places 0, stride, 2 * stride, ... of every sequence

    def of(self, x: Tensor) -> Tensor:
        """x (B, heads, T, D) at the rows of this call: a view where it can be, (B, heads, R, D)."""
        return x[:, :, :: self.stride] if self.aligned else take(x, self.place)


def choose_rows(count: Tensor, n_new: Tensor, T: int, stride: int, n_before: int, local: int = 0,
                bin: int = 1) -> tuple[Tensor, ...]:
    """The first eight fields of Rows for a causal call: the rows are the tokens of rank 0, stride,
    2 * stride, ...

    count, n_new (B,); T: queries, padding included; n_before: rows kept from the past, 0 or 1;
    local, bin: as in keys_in_cells, by default all keys that a row sees are in its cells. Query
    skipping is the paper's; a row is reused by later queries only, so it stays causal.
    """
    i, place = torch.arange(T, device=count.device), row_places(count, T, stride)
    first = place[:, :1]
    seen = (count[:, None] + i + 1) * (i < n_new[:, None])
    of_past = (count[:, None] + first + 1 - stride).clamp(min=0)  # keys that the row before sees
    row_seen = (count[:, None] + place + 1) * (place < n_new[:, None])
    row_seen = torch.cat([of_past[:, :n_before], row_seen], dim=1)
    row = n_before + (i - first).div(stride, rounding_mode="floor")
    row = row.clamp(0, row_seen.shape[1] - 1)
    n_rows = (place < n_new[:, None]).sum(1)
    last = (n_before + n_rows - 1).clamp(min=0)[:, None]
    last = last[:, : stride - 1]  # at stride 1 no later query reuses a row
    place, row_in_cells = place.clamp(max=T - 1), keys_in_cells(row_seen, local, bin)
    return seen, row, row_seen, place, n_rows, last, count + n_new, row_in_cells


def all_rows(n_new: Tensor, T: int) -> tuple[Tensor, ...]:
    """The same for a bidirectional call: every query is a row and sees all n_new keys."""
    i = torch.arange(T, device=n_new.device).expand(len(n_new), T)
    seen = n_new[:, None] * (i < n_new[:, None])
    return seen, i, seen, i, n_new, i[:, :0], n_new, seen


# -- the module ------------------------------------------------------------------------------------


torch_operations = sys.modules[__name__]


def load_kernels():
    """kernels.py beside this file, in the same package if there is one; by its path if Hugging
    Face's package of the same name is imported already."""
    if __package__:
        return importlib.import_module(".kernels", __package__)
    try:
        import kernels

        if hasattr(kernels, "select_cells"):
            return kernels
    except ImportError:
        pass
    if "sea_kernels" not in sys.modules:
        path = Path(__file__).with_name("kernels.py")
        spec = importlib.util.spec_from_file_location("sea_kernels", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["sea_kernels"] = module
    return sys.modules["sea_kernels"]


def operations(config: SEAConfig, q: Tensor):
    """The module whose operations run: kernels.py, or this one. Raises ValueError if the backend is
    "triton" and cannot run."""
    if config.backend == "torch" or (config.backend == "auto" and not q.is_cuda):
        return torch_operations
    try:
        kernels = load_kernels()
        reason = kernels.supports(config, q.dtype)
    except (ImportError, FileNotFoundError) as error:
        reason = ("it needs kernels.py, bin_kernels.py and estimator_kernels.py beside sea.py, and "
                  f"Triton ({error})")
    if reason is None:
        return kernels
    _expect(config.backend == "auto", "backend", "one that can run this layer",
            f"'triton', which cannot: {reason}")
    return torch_operations


PLAIN_MODULES = frozenset((nn.Sequential, nn.Linear, nn.LayerNorm, nn.GELU, nn.Conv2d, CausalCNN))
PLAIN_WEIGHTS = frozenset((nn.Parameter, Tensor))


def is_plain(module: nn.Module, q: Tensor) -> bool:
    """Whether a module's weights say all that it computes, and stand where q does, in fp32 or the
    dtype of q: no LoRA around a layer, no hook, no parametrization, nothing quantized or offloaded,
    norms and GELUs as SEAttention makes them."""
    fields = vars(module)
    if (type(module) not in PLAIN_MODULES or module._forward_hooks or module._forward_pre_hooks
            or module._backward_hooks or module._backward_pre_hooks or "forward" in fields
            or fields.get("eps", 1e-5) != 1e-5 or fields.get("approximate", "none") != "none"):
        return False
    for w in fields["_parameters"].values():
        if (w is None or type(w) not in PLAIN_WEIGHTS or w.device != q.device
                or w.dtype not in (torch.float32, q.dtype)):
            return False
    for child in fields["_modules"].values():
        if not is_plain(child, q):
            return False
    return True


def operations_reading(ops, q: Tensor, *modules: nn.Module):
    """`ops`, or this file if a module is not plain: kernels read its weights and do not call it.
    9 us on a CPU for all modules of a layer."""
    if ops is torch_operations or all(is_plain(m, q) for m in modules):
        return ops
    return torch_operations


# Gates before their sigmoid. Differs: the authors' begin near 0.5, and a student that begins as
# half an average needs hundreds of steps.
OPEN = 4.0


class SEAttention(nn.Module):
    """One SEA attention layer: all between the q, k, v projections and the output projection.

    forward(q, k, v, state=...) is one function for training, chunked prefill and decoding: feeding
    a sequence in any chunks, each with the state of the one before, gives what one call gives.
    """

    def __init__(self, config: SEAConfig):
        super().__init__()
        H, D = config.n_head, config.d_head
        if config.cell_keys:
            self.key_gain = nn.Parameter(torch.ones(config.n_estimates))
        if config.causal:
            self.head_share = nn.Buffer(torch.full((H,), config.kv_heads / H))
        self.set_config(config)
        if not config.cnn:
            self.gates = nn.Parameter(torch.full((H, 2), OPEN))
            return
        self.register_buffer("projection", torch.empty(D, config.n_features))
        self.redraw_features(torch.Generator().manual_seed(config.seed))
        if config.causal:
            self.position = nn.Parameter(torch.randn(config.max_positions, D))
        self.encoder = nn.Sequential(nn.Linear(3 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU())
        cnn = CausalCNN if config.causal else BidirectionalCNN
        self.decoder = nn.Linear(2 * D, cnn.channels * cnn.image_width(config.width))
        self.cnn = cnn(H, config.width)
        self.gate = nn.Linear(2 * D, 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, OPEN)

    def set_config(self, config: SEAConfig) -> None:
        """Take other options that the sizes of no weight depend on. Shares are learned, so a
        parameter, where heads share a choice, and else of no use."""
        self.config = config
        if config.causal and config.is_shared != isinstance(self.head_share, nn.Parameter):
            share = self.head_share.detach()
            del self.head_share
            self.head_share = nn.Parameter(share) if config.is_shared else nn.Buffer(share)

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, in place. The authors do so every 1000 training steps."""
        if self.config.cnn and not self.projection.is_meta:
            self.projection.copy_(orthogonal_features(*self.projection.shape, generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None,
                softmax_scale: float | None = None, state: SEAState | None = None,
                topk: int | None = None, kv_cached: bool = False,
                rows_at_once: int | None = None, in_place: bool = False) -> SEAOutput:
        """q (B, H, T, D); k, v (B, Hkv, T, D) or, with kv_cached, (B, Hkv, S, D), the past first.

        valid: bool, as long as k, False where a token is padding (either side, or between); the
        output there is 0. softmax_scale: what q k^T is multiplied by, D**-0.5 by default. state:
        SEAOutput.state of the call before. topk: keys per query and head, the config's by default;
        it may differ from call to call (the paper's dynamic k). kv_cached: the caller keeps the KV
        cache, so the state carries none; several queries after padding need `valid`. For one query
        k and v may be a static buffer (with a CNN of up to max_positions), longer than the tokens
        so far: the new token of sequence b stands at state.count[b], and any finite numbers follow
        (not below config.dense_below keys).
        rows_at_once: compute about this many queries at a time, each chunk with the state of the
        one before (causal only): the same output and state, less memory, no scores, cells or bins.
        in_place: overwrite `state`, that of a call with kv_cached, with the state after this one,
        which the result then carries, so that a CUDA graph of a decoding step goes on from there
        when it is replayed (a step outside the graph, before, whose topk and k are no smaller,
        gives the state room for candidates);
        without gradients and rows_at_once, and if it fails the state is lost.
        Raises ValueError if arguments do not fit.
        """
        self.check(q, k, v, valid, state, kv_cached, rows_at_once)
        if in_place:
            check_in_place(state, kv_cached, rows_at_once)
        config, ops = self.config, operations(self.config, q)
        scale = scale_or_default(softmax_scale, config.d_head)
        topk = config.topk if topk is None else topk
        _expect(is_integer(topk) and topk >= 1, "topk", "an integer >= 1", repr(topk))
        if config.has_bins:
            config.n_chosen(topk)  # raises
        if rows_at_once is not None and q.shape[2] > rows_at_once:
            return in_chunks(self, rows_at_once, q, k, v, valid, state, kv_cached,
                             softmax_scale=scale, topk=topk)

        past = SEAState.empty(config, q) if state is None else state
        tokens = to_front(q, k, v, valid, past, kv_cached, ops.take_pair)
        rows = self.choose_rows(ops, tokens, past)
        share = self.head_share if config.is_shared else None
        if share is not None and torch.is_grad_enabled():
            share = share.clone()  # its loss wants it after this call, when FSDP has freed the weight
        q_chooser = ops.mean_of_heads(tokens.q, config.n_choosers, share)
        scores, gates, state = self.estimate_attention(
            ops, tokens.q if config.cnn else q_chooser, tokens.k, tokens.v, rows, scale, past,
            in_place)
        n_some, n_dense = self.count_dense(past, q.shape[2], valid, kv_cached)
        is_shared = in_place and config.has_bins and config.query_stride > 1  # a row's candidates
        if is_shared and past.candidates is None:
            past.candidates = ops.no_candidates(config, tokens.keys, topk)
        state.candidates = past.candidates if in_place else None
        sparse, choice = self.choose_and_attend(ops, tokens, q_chooser, rows, scores, topk, scale,
                                                n_dense, state.candidates)
        out, state.v_sum = self.combine(ops, sparse, tokens.v, scores, gates, rows, past, in_place)
        if n_some:
            is_first = valid is None and past.n_tokens == 0
            out = self.attend_to_all(out, tokens, rows.seen, n_some, scale, is_first)
        state = self.complete(state, past, tokens, valid, kv_cached, in_place)
        result = SEAOutput(out, rows.seen, state, scores, row=rows.row,
                           row_in_cells=rows.row_in_cells, head_share=share,
                           dense_below=config.dense_below, **choice)
        return tokens.back(result)

    def choose_and_attend(self, ops, tokens: Tokens, q_chooser: Tensor, rows: Rows,
                          scores: Tensor, topk: int, softmax_scale: float, n_dense: int,
                          kept: Tensor | None) -> tuple[Tensor, dict]:
        """Steps 6, or 7, to 9, (B, H, T, D), and what was chosen, as fields of SEAOutput. q_chooser
        (B, C, T, D): what chooses bins; kept: candidates of the state. The first n_dense queries
        attend to all keys anyway: what they get here is of no use, mostly 0."""
        config, T, stride = self.config, tokens.q.shape[2], rows.stride
        if n_dense == T:
            return tokens.q.new_zeros(tokens.q.shape), self.no_choice(rows, scores)
        begin = n_dense // stride * stride if rows.aligned else 0  # a row's first query
        q, seen, row = tokens.q[:, :, begin:], rows.seen[:, begin:], rows.row[:, begin:]
        if config.has_bins:
            first = begin // stride
            bins = ops.choose_bins(scores[:, :, first:], q_chooser[:, :, begin:], tokens.keys, seen,
                                   row - first if first else row, rows.row_seen[:, first:], topk,
                                   config, softmax_scale, order=tokens.key_order, kept=kept)
            choice = dict(bins=after(begin, bins, NONE), bin=config.bin)
            out = ops.bin_attention(q, tokens.keys, tokens.values, bins, seen, softmax_scale,
                                    bin=config.bin, order=tokens.key_order)
        else:
            choice = dict(cells=ops.select_cells(repeat_heads(scores, config.n_head), rows.row_seen,
                                                 topk, config.group))
            out = ops.sparse_attention(q, tokens.keys, tokens.values, choice["cells"], seen,
                                       softmax_scale, row=row, order=tokens.key_order)
        return after(begin, out), choice

    def no_choice(self, rows: Rows, scores: Tensor) -> dict:
        """What is chosen if all queries attend to all keys: lists of no bins, or no cells."""
        (B, T), config = rows.seen.shape, self.config
        if config.has_bins:
            bins = rows.seen.new_empty(B, config.n_choosers, T, 0, dtype=torch.int32)
            return dict(bins=bins, bin=config.bin)
        none = rows.seen.new_zeros(B, config.n_head, scores.shape[2], config.width,
                                   dtype=torch.bool)
        return dict(cells=none)

    def count_dense(self, past: SEAState, T: int, valid: Tensor | None,
                    kv_cached: bool) -> tuple[int, int]:
        """How many queries, from the first one on, may see fewer than dense_below keys in one
        sequence or another, and how many of these do in every one."""
        most = self.config.dense_below - 1
        if most < 1:
            return 0, 0
        fewest, highest = past.n_least, past.n_tokens
        some_past = past.n_tokens > 0 and len(past.count) > 0
        if some_past and (valid is not None or not kv_cached):  # int() waits for the GPU
            fewest, highest = (int(x) for x in past.count.aminmax())
        return min(max(most - fewest, 0), T), min(max(most - highest, 0), T)

    def attend_to_all(self, out: Tensor, tokens: Tokens, seen: Tensor, n: int,
                      softmax_scale: float, is_first: bool) -> Tensor:
        """out (B, H, T, D), with dense attention for those of the first n queries that see fewer
        than dense_below keys; seen (B, T)."""
        k, v, order = tokens.keys, tokens.values, tokens.key_order
        n_key, is_dense = self.config.dense_below - 1, attends_to_all(seen, self.config.dense_below)
        if order is None:
            k, v = k[:, :, :n_key], v[:, :, :n_key]
        else:
            k, v = (by_rank(x, order[:, :n_key], seen[:, :n]) for x in (k, v))
        dense = dense_attention(tokens.q[:, :, :n], k, v, seen[:, :n], softmax_scale, is_first)
        dense = torch.where(is_dense[:, None, :n, None], dense, out[:, :, :n])
        return torch.cat([dense, out[:, :, n:]], dim=2)

    def complete(self, state: SEAState, past: SEAState, tokens: Tokens, valid: Tensor | None,
                 kv_cached: bool, in_place: bool) -> SEAState | None:
        """The state after a call, with all that its steps do not know of."""
        if not self.config.causal:
            return None
        state.k, state.v = (None, None) if kv_cached else (tokens.keys, tokens.values)
        if valid is None:
            state.n_least = past.n_least + tokens.q.shape[2]
        elif self.config.dense_below and len(state.count):  # for this alone, int() waits for a GPU
            state.n_least = int(state.count.min())
        if in_place:
            past.copy_(state)
            return past
        return state

    def choose_rows(self, ops, tokens: Tokens, past: SEAState) -> Rows:
        """The queries to estimate."""
        T, stride, n_new = tokens.q.shape[2], self.config.query_stride, tokens.n_new
        if not self.config.causal:
            chosen = all_rows(n_new, T)
        else:
            n_before = past.last_scores.shape[2]
            behind = self.config.behind_cells
            chosen = ops.choose_rows(past.count, n_new, T, stride, n_before, *behind)
        # A sequence begins with a row; and of a single token it does not matter.
        aligned = stride == 1 or T == 1 or past.n_tokens == 0
        return Rows(*chosen, n_new, stride, aligned)

    def estimate_attention(self, ops, q: Tensor, k: Tensor, v: Tensor, rows: Rows,
                           softmax_scale: float, past: SEAState,
                           in_place: bool) -> tuple[Tensor, Tensor, SEAState]:
        """Steps 1 to 5 for the new tokens q (B, H, T, D), k, v (B, Hkv, T, D). Without a CNN q is
        the choosers', (B, C, T, D), and the mean over those that share keys is what counts.

        Returns scores (B, E, R, width) and gates (B, H, R, 2) before their sigmoid, of the rows,
        the one kept from the past first, and the state after the new tokens but for v_sum, k and v.
        With a CNN and query_stride > 1 gates, too, are a row's, since they need its linear
        attention; without a CNN all rows have the same.
        """
        config, n_new = self.config, rows.n_new
        if not config.causal:
            context = bidirectional_context(q, k, v, self.projection, softmax_scale, n_new)
            image, gates = encode_rows(context, v, self.encoder, self.decoder, self.cnn, self.gate)
            scores = self.cnn(image, rows.n_rows)
            if config.cell_keys:
                scores = add_mean_keys(scores, self.key_gain, q, k, n_new, softmax_scale)
            return scores, gates, past

        q_row = rows.of(q)
        if config.cnn:
            scores, gates, state = self.run_cnn(ops, q_row, k, v, rows, softmax_scale, past)
        else:
            q_row, state, scores = ops.mean_of_heads(q_row, config.kv_heads), past, None
        key_sums = past.key_sums
        if config.cell_keys:
            without_past = slice(-q_row.shape[2], None)
            row_seen, in_cells = (x[:, without_past] for x in (rows.row_seen, rows.row_in_cells))
            # The kernel adds to scores in place: only what the CNN itself made.
            key_ops = operations_reading(ops, q, self.cnn) if config.cnn else ops
            scores, key_sums = key_ops.add_cell_keys(
                scores, self.key_gain, q_row, k, row_seen, softmax_scale, past.count, n_new,
                key_sums, in_cells, bounds=config.has_bins, in_place=in_place)
        scores, last_scores = ops.keep_row(past.last_scores, scores, rows.last, in_place)
        state = replace(state, count=rows.next_count, n_tokens=past.n_tokens + q.shape[2],
                        key_sums=key_sums, last_scores=last_scores, stride=config.query_stride)
        if config.cnn:
            gates, state.last_gates = ops.keep_row(past.last_gates, gates, rows.last, in_place)
        else:
            gates = self.gates[None, :, None].expand(len(q), -1, scores.shape[2], -1)
        return scores, gates, state

    def run_cnn(self, ops, q_row: Tensor, k: Tensor, v: Tensor, rows: Rows, softmax_scale: float,
                past: SEAState) -> tuple[Tensor, Tensor, SEAState]:
        """Steps 1 to 4 of a causal layer: scores (B, H, R, width), gates (B, H, R, 2), and the
        state with its sums and rows. q_row (B, H, R, D), k, v (B, Hkv, T, D)."""
        stride = self.config.query_stride
        context, sums = ops.causal_context(q_row, k, v, self.position, self.projection,
                                           softmax_scale, stride, past.count, rows.n_new, past.sums)
        cnn_ops = operations_reading(ops, q_row, self.cnn)
        row_ops = operations_reading(cnn_ops, q_row, self.encoder, self.decoder, self.gate)
        image, gates = row_ops.encode_rows(context, rows.of(v), self.encoder, self.decoder,
                                           self.cnn, self.gate)
        scores, conv_rows = cnn_ops.causal_cnn(image, self.cnn, past.conv_rows, rows.n_rows)
        return scores, gates, replace(past, sums=sums, conv_rows=conv_rows)

    def combine(self, ops, sparse: Tensor, v: Tensor, scores: Tensor, gates: Tensor, rows: Rows,
                past: SEAState, in_place: bool) -> tuple[Tensor, Tensor]:
        """Step 10, (B, H, T, D), and the sum of v (B, Hkv, T, D) after the new tokens. sparse
        (B, H, T, D), scores (B, E, R, width), gates (B, H, R, 2)."""
        if self.config.causal:
            return ops.mix_average(sparse, v, gates, rows.seen, rows.row, past.v_sum, in_place)
        average = estimated_mean(at_least_fp32(scores).softmax(-1), v, rows.row_seen)
        return mix(sparse, average, gates, rows.seen, rows.row), past.v_sum

    def check(self, q, k, v, valid, state, kv_cached, rows_at_once) -> None:
        """Raises ValueError for arguments of forward that do not fit this layer."""
        check_call(self.config, q, k, v, valid, state, kv_cached, rows_at_once)
        longest = self.config.max_positions
        if state is not None:
            sums, rows = state.shapes(self.config)
            for name, shape in (sums | rows).items():
                x = getattr(state, name)
                x = x[0] if isinstance(x, tuple) else x
                got = tuple(x.shape[1:]) if name in sums else (x.shape[1], x.shape[3])
                _expect(got == shape, "state",
                        f"one of a layer with the same options, {name} of size {shape}", got)
            stride = self.config.query_stride  # at 1 no query uses a row of the past
            _expect(stride in (1, state.stride), "state", f"one of query_stride {stride}",
                    state.stride)
        total = k.shape[2] + (0 if kv_cached or state is None else state.k.shape[2])
        n_past = 0 if state is None else state.n_tokens
        is_buffer = kv_cached and k.shape[2] > n_past + q.shape[2]
        n_least = 0 if state is None else state.n_least
        _expect(not is_buffer or n_least + 1 >= self.config.dense_below, "k",
                f"no static buffer until a query sees dense_below = {self.config.dense_below} keys",
                f"one of {k.shape[2]} for a query that sees {n_least + 1}")
        has_table = self.config.causal and self.config.cnn
        _expect(not has_table or total <= longest, "k",
                f"at most max_positions = {longest} tokens, padding included", total)


def in_chunks(layer: nn.Module, size: int, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None,
              state: SEAState | None, kv_cached: bool, **options) -> SEAOutput:
    """layer.forward, about `size` queries at a time, each chunk with the state of the last; the
    result has no scores, cells or bins. Arguments as in SEAttention.forward."""
    (B, H, T, D), stride = q.shape, layer.config.query_stride
    size = max(size // stride, 1) * stride  # a chunk begins with a row where the first one does
    before = k.shape[2] - T
    out = q.new_empty(B, T, H, D).transpose(1, 2)  # (B, T, H, D) in memory, as models read it
    seen = []
    for i in range(0, T, size):
        end = min(i + size, T)
        keys = slice(0, before + end) if kv_cached else slice(i, end)
        result = layer.forward(q[:, :, i:end], k[:, :, keys], v[:, :, keys], state=state,
                               valid=None if valid is None else valid[:, keys], kv_cached=kv_cached,
                               **options)
        out[:, :, i:end], state = result.out, result.state
        seen.append(result.seen)
        del result  # frees its scores before the next chunk
    return SEAOutput(out, torch.cat(seen, dim=1), state)


def in_documents(layer: nn.Module, documents: Tensor, q: Tensor, k: Tensor, v: Tensor, *,
                 valid: Tensor | None = None, **options) -> SEAOutput:
    """layer.forward of packed documents, each as if it were alone; the result has no state, scores,
    cells or bins.

    documents (B, T), integers: tokens of a sequence that share a number are a document, in their
    order. q (B, H, T, D), k, v (B, Hkv, T, D), valid (B, T) and options as in SEAttention.forward.
    Raises ValueError if they do not fit. Documents become the sequences of a batch, one batch for
    each power of two of their lengths, so that less than half of it is padding.
    """
    check_qkv(q, k, v)
    B, _, T, _ = q.shape
    is_number = not documents.is_floating_point() and documents.dtype != torch.bool
    _expect(documents.shape == (B, T) and is_number, "documents", f"integers of shape {(B, T)}",
            f"{documents.dtype} {tuple(documents.shape)}")
    _expect(B >= 1, "documents", "at least one sequence", B)
    _expect(k.shape[2] == T, "k", f"the {T} tokens of q", k.shape[2])
    _expect(valid is None or valid.shape == (B, T) and valid.dtype == torch.bool, "valid",
            f"bool of shape {(B, T)}", valid is not None and (valid.dtype, tuple(valid.shape)))
    number = documents.unique(return_inverse=True)[1]  # below B * T, whatever their dtype holds
    of_batch = number + B * T * torch.arange(B, device=q.device)[:, None]
    _, number, n_tokens = of_batch.flatten().unique(return_inverse=True, return_counts=True)
    by_document, first = number.argsort(stable=True), n_tokens.cumsum(0) - n_tokens
    outs, seen, places = [], [], []
    power = n_tokens.float().log2().ceil()
    for p in power.unique():
        n, i = n_tokens[power == p], torch.arange(int(n_tokens[power == p].max()), device=q.device)
        inside = i < n[:, None]  # (documents, the longest's tokens)
        place = by_document[(first[power == p, None] + i).clamp(max=B * T - 1)]
        tokens = (x.transpose(1, 2).flatten(0, 1)[place].transpose(1, 2) for x in (q, k, v))
        result = layer(*tokens, valid=inside if valid is None else inside & valid.flatten()[place],
                       **options)
        outs.append(result.out.transpose(1, 2)[inside])
        seen.append(result.seen[inside])
        places.append(place[inside])
    back = torch.cat(places).argsort()
    out, seen = (torch.cat(x)[back].unflatten(0, (B, T)) for x in (outs, seen))
    return SEAOutput(out.transpose(1, 2), seen, state=None)


# -- checks ----------------------------------------------------------------------------------------


def check_call(config: SEAConfig, q, k, v, valid, state, kv_cached, rows_at_once) -> None:
    """Raises ValueError for arguments of a layer's forward that do not fit the config or each
    other."""
    check_qkv(q, k, v)
    (B, H, T, D), S = q.shape, k.shape[2]
    _expect(H == config.n_head, "q", f"{config.n_head} heads", H)
    _expect(D == config.d_head, "q", f"head size {config.d_head}", D)
    _expect(k.shape[1] == config.kv_heads, "k", f"{config.kv_heads} key/value heads", k.shape[1])
    n_past = 0
    if state is not None:
        n_past = state.n_tokens
        _expect(config.causal, "state", "None when bidirectional", "a state")
        _expect(state.count.shape == (B,), "state", f"a batch of {B}", tuple(state.count.shape))
        _expect(kv_cached or state.k is not None, "state",
                "one that carries the KV cache (or kv_cached=True)", "one without")
    if kv_cached:
        _expect(S >= T, "k", f"at least the {T} tokens of q", S)
        _expect(S == T or state is not None, "state", f"the state of the {S - T} tokens before",
                None)
        static_buffer = T == 1 and state is not None and valid is None and S > n_past
        _expect(S == n_past + T or static_buffer, "k",
                f"{n_past} tokens of the state and {T} of q", S)
        # Only a mask tells padding from tokens. n_least is known without waiting for a GPU.
        if T > 1 and valid is None and state is not None and state.n_least < n_past:
            _expect(bool((state.count == n_past).all()), "valid",
                    f"a mask of {S} tokens, since some of the state's were padding", None)
    else:
        _expect(S == T, "k", f"the {T} tokens of q (or kv_cached=True)", S)
    if valid is not None:
        _expect(valid.dtype == torch.bool and valid.shape == (B, S), "valid",
                f"bool of shape {(B, S)}", f"{valid.dtype} {tuple(valid.shape)}")
    if rows_at_once is not None:
        _expect(is_integer(rows_at_once) and rows_at_once >= 1, "rows_at_once",
                "an integer >= 1 or None", repr(rows_at_once))
        _expect(config.causal, "rows_at_once", "None when bidirectional", rows_at_once)


def check_in_place(state: SEAState | None, kv_cached: bool, rows_at_once: int | None) -> None:
    """Raises ValueError where a state cannot be overwritten."""
    _expect(state is not None, "state", "one to overwrite, with in_place", None)
    _expect(kv_cached, "kv_cached", "True with in_place", kv_cached)
    _expect(state.k is None, "state", "one without a KV cache, with in_place", "one with its own")
    _expect(rows_at_once is None, "rows_at_once", "None with in_place", rows_at_once)
    _expect(not torch.is_grad_enabled(), "in_place", "False unless under torch.no_grad()", True)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for q, k, v that are not of one attention."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _expect(x.ndim == 4, name, "shape (B, heads, tokens, D)", tuple(x.shape))
        _expect(x.is_floating_point(), name, "a floating-point dtype", x.dtype)
        _expect(x.dtype == q.dtype, name, f"dtype {q.dtype} as q", x.dtype)
        _expect(x.device == q.device, name, f"device {q.device} as q", x.device)
        _expect(0 not in x.shape[1:], name, "at least one head, token and dimension",
                tuple(x.shape))
    _expect(k.shape == v.shape, "v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    _expect(k.shape[0] == q.shape[0], "k", f"a batch of {q.shape[0]} as q", k.shape[0])
    _expect(k.shape[3] == q.shape[3], "k", f"head size {q.shape[3]} as q", k.shape[3])
    _expect(q.shape[1] % k.shape[1] == 0, "k", f"a number of heads that divides q's {q.shape[1]}",
            k.shape[1])


# -- losses: what the estimate and q, k themselves learn from the teacher's attention --------------


@dataclass
class PooledAttention:
    """All that the estimate loss needs of a teacher's attention A: O(T*width) numbers, not
    O(T*S)."""

    cells: Tensor  # (B, H, T, width), sum of A over the keys of each cell
    a_log_a: Tensor  # (B, H, T), sum of A log A
    a_square: Tensor  # (B, H, T), sum of A^2
    n_keys: int


def dense_log_probs(q: Tensor, k: Tensor, seen: Tensor,
                    softmax_scale: float) -> tuple[Tensor, Tensor]:
    """log softmax(q k^T * softmax_scale) over the keys seen, with 0 at those unseen: (B, H, T, S),
    and which are seen, (B, 1, T, S). q (B, H, T, D), k (B, Hkv, S, D), seen (B, T)."""
    visible = (torch.arange(k.shape[2], device=k.device) < seen[..., None])[:, None]  # (B, 1, T, S)
    with no_autocast(q):
        scores = (at_least_fp32(q) * softmax_scale) @ at_least_fp32(repeat_heads(k, q.shape[1])).mT
    log_probs = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    return log_probs.masked_fill(~visible, 0), visible


@torch.no_grad()
def pool_attention(q: Tensor, k: Tensor, seen: Tensor, width: int,
                   softmax_scale: float | None = None, *, in_cells: Tensor | None = None,
                   unit: int = 1, first: int = 0, block: int = 256) -> PooledAttention:
    """Teacher attention softmax(q k^T * softmax_scale) pooled to `width` cells, `block` queries at
    a time.

    q (B, H, T, D), k (B, Hkv, S, D), the valid keys first; seen (B, T). in_cells (B, T), unit: as
    in cells_of_keys, all keys seen by default. The first keys are in no sum, nor are those in no
    cell. Memory O(T*width + block*S). Raises ValueError if `seen` does not fit.
    """
    _check_places(k, seen, (q.shape[0], q.shape[2]), None, block)
    scale = scale_or_default(softmax_scale, q.shape[-1])
    in_cells = seen if in_cells is None else in_cells
    j, parts = torch.arange(k.shape[2], device=k.device), []
    for i in range(0, q.shape[2], block):
        log_a, visible = dense_log_probs(q[:, :, i : i + block], k, seen[:, i : i + block], scale)
        cell, is_in = cells_of_keys(in_cells[:, i : i + block], k.shape[2], width, unit)
        a = log_a.exp() * (visible & (is_in & (j >= first))[:, None])
        cells = a.new_zeros(*a.shape[:-1], width).scatter_add(-1, cell[:, None].expand_as(a), a)
        parts.append((cells, (a * log_a).sum(-1), a.square().sum(-1)))
    return PooledAttention(*(torch.cat(x, dim=2) for x in zip(*parts)), n_keys=k.shape[2])


def estimate_loss(scores: Tensor, pooled: Any, in_cells: Tensor, *, row: Tensor | None = None,
                  unit: int = 1, first: int = 0, kl_weight: float = 0.1) -> Tensor:
    """L_estimate = kl_weight * KL(A || m a) + MSE(m a, A), exactly, without a T x S tensor.

    a: the cell scores given to each key, softmax over the keys in cells but the first. scores
    (B, H, R, width), or fewer that heads share, row (B, T) which of its rows each query uses (its
    own by default); pooled a PooledAttention, also of kernels.py; in_cells (B, T), unit, first as
    in pool_attention. With n_p keys and teacher mass A_p in cell p, m = sum of A_p, 1 if cells hold
    all keys, and a_p the value of each key of a cell:

        log Z = log sum_p n_p exp(s_p),   a_p = exp(s_p) / Z
        KL = sum A log A - sum_p A_p s_p + m log Z - m log m
        sum_j (m a_j - A_j)^2 = sum_p (n_p m^2 a_p^2 - 2 m a_p A_p) + sum A^2

    So a row counts by what its cells have to hold. KL is averaged over the queries of all heads
    that have keys in cells, MSE over their n_keys entries each. Differs: padded queries are left
    out, and the authors sum the KL of a bidirectional layer over heads. Raises ValueError if shapes
    do not fit.
    """
    width = scores.shape[-1]
    _expect(pooled.cells.shape[-1] == width, "pooled", f"width {width} as scores",
            pooled.cells.shape[-1])
    B, H, T, _ = pooled.cells.shape
    _expect(in_cells.shape == (B, T), "in_cells", f"shape (B, T) = {(B, T)}", tuple(in_cells.shape))
    of_all = scores.ndim == 4 and len(scores) == B and H % scores.shape[1] == 0
    _expect(of_all and (row is not None or scores.shape[2] == T), "scores",
            f"shape (B, E, R, width) with B = {B}, E a divisor of {H} and, without row, R = {T}",
            tuple(scores.shape))
    _expect(row is None or row.shape == (B, T), "row", f"shape (B, T) = {(B, T)}",
            row is not None and tuple(row.shape))
    s = at_least_fp32(scores if row is None else take(scores, row))
    s = repeat_heads(s, H)  # (B, H, T, width)
    visible = in_cells > first
    n = keys_per_cell(in_cells, width, unit, first)
    n = n.masked_fill(~visible[..., None], 1)[:, None]  # (B, 1, T, width)
    log_z = (s + n.to(s.dtype).log()).logsumexp(-1)
    # An empty cell takes no part; without the fill its a_p may overflow, and 0 * inf is nan.
    a = (s - log_z[..., None]).masked_fill(n == 0, -torch.inf).exp()
    m = pooled.cells.sum(-1)
    kl = pooled.a_log_a - (pooled.cells * s).sum(-1) + m * log_z - torch.special.xlogy(m, m)
    a = m[..., None] * a
    square = (n * a.square() - 2 * a * pooled.cells).sum(-1) + pooled.a_square
    loss = (kl_weight * kl + square / pooled.n_keys) * visible[:, None]
    return loss.sum() / (visible.sum() * H).clamp(min=1)


def score_loss(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, seen: Tensor,
               softmax_scale: float | None = None, *, kl_weight: float = 0.1,
               block: int = 256) -> Tensor:
    """L_score = kl_weight * KL(A || P) + MSE(P, A): the student's own dense attention P against the
    teacher's A.

    q, teacher_q (B, H, T, D); k, teacher_k (B, Hkv, S, D); seen (B, T) keys that each query sees.
    KL is averaged over the queries of all heads that see a key, MSE over their S entries each. If
    there are several blocks of queries, each is computed again in the backward pass, so that no
    T x S tensor is kept. Raises ValueError if shapes do not fit.
    """
    _check_places(k, seen, (q.shape[0], q.shape[2]), None, block)
    _check_teacher(q, k, teacher_q, teacher_k)
    scale, T = scale_or_default(softmax_scale, q.shape[-1]), q.shape[2]

    def part(q, k, teacher_q, teacher_k, seen):
        log_s, visible = dense_log_probs(q, k, seen, scale)
        with torch.no_grad():
            log_a, _ = dense_log_probs(teacher_q, teacher_k, seen, scale)
            a = log_a.exp() * visible
        kl = (a * (log_a - log_s)).sum(-1)
        square = ((log_s.exp() - a) * visible).square().sum(-1)
        return ((kl_weight * kl + square / k.shape[2]) * (seen > 0)[:, None]).sum()

    total = 0.0
    for i in range(0, T, block):
        rows = slice(i, i + block)
        x = q[:, :, rows], k, teacher_q[:, :, rows], teacher_k, seen[:, rows]
        total = total + (part(*x) if T <= block else checkpoint(part, *x, use_reentrant=False))
    return total / ((seen > 0).sum() * q.shape[1]).clamp(min=1)


def _check_teacher(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> None:
    for name, of_teacher, x in (("teacher_q", teacher_q, q), ("teacher_k", teacher_k, k)):
        _expect(of_teacher.shape == x.shape, name, f"shape {tuple(x.shape)} as the student's",
                tuple(of_teacher.shape))


def choice_loss(share: Tensor, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor,
                config: SEAConfig, softmax_scale: float, teacher_scale: float, *,
                n_queries: int = 128) -> Tensor:
    """KL(A || P) of evenly spaced queries, n_queries to twice as many, which trains share (H,):
    what each head counts in the mean query of a choice. Differs: the paper has no such choice.

    q (B, H, T, D) and k (B, Hkv, T, D) of the student, to which no gradient flows, and likewise of
    its teacher, all tokens valid. P: the mean query's softmax over the keys that would be in its
    cells without a stride, on which shares do not depend, but the first. A: what the teacher's
    attention, the mean over the heads of a choice, gives to each of them. A query counts by the sum
    of its A; the mean is over queries and choices. Raises ValueError if shapes do not fit.
    """
    T, C = q.shape[2], config.n_choosers
    _check_teacher(q, k, teacher_q, teacher_k)
    _expect(is_integer(n_queries) and n_queries >= 1, "n_queries", "an integer >= 1",
            repr(n_queries))
    seen = torch.arange(T, 0, -max(T // n_queries, 1), device=q.device)
    q, teacher_q = (x[:, :, seen - 1] for x in (q, teacher_q))
    seen = seen.expand(len(q), -1)  # (B, n)
    j = torch.arange(T, device=q.device)
    is_in = (j >= config.n_first * config.bin) & (j < config.in_cells(seen)[..., None])
    is_in = is_in[:, None]  # (B, 1, n, T)
    with torch.no_grad():
        log_a, _ = dense_log_probs(teacher_q, teacher_k, seen, teacher_scale)
        a = log_a.exp().unflatten(1, (C, -1)).mean(2) * is_in  # (B, C, n, T)
    with no_autocast(q):
        q = mean_of_heads(at_least_fp32(q.detach()), C, share) * softmax_scale
        scores = q @ at_least_fp32(repeat_heads(k.detach(), C)).mT
        log_p = scores.masked_fill(~is_in, torch.finfo(scores.dtype).min).log_softmax(-1)
    m = a.sum(-1, keepdim=True)
    kl = torch.special.xlogy(a, a) - torch.special.xlogy(a, m) - a * log_p
    return kl.sum() / max(m.numel(), 1)
