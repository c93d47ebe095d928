"""SEA: Sparse Linear Attention with Estimated Attention Mask, in plain PyTorch.

Lee, Kim, Willette, Hwang, ICLR 2024 (arXiv 2310.01777). SEA replaces the attention of a pretrained transformer. It
estimates each attention row in `width` cells with linear attention and a small CNN, keeps the best cells by a grouped
top-k, attends only to the keys under them, and learns all this by distilling the teacher's attention. This file is the
readable reference: every step of the paper is one function, in the paper's order, for every dtype and device, with
autograd. Copy it away and it works: it needs torch and einops only.

    name     paper   meaning
    B, H, T  N,H,T   batch, query heads, queries (new tokens)
    Hkv      -       key/value heads, H % Hkv == 0 (grouped-query attention)
    S, D     T, d    keys (past and new tokens), head size
    width    K       cells of an estimated attention row
    topk     k       budget: keys per query and head, on average
    seen     t       number of keys that a query may see; 0 marks a padded query
    cell     pixel   one of `width` equal slices of the keys that a query sees
    row      -       a query whose attention is estimated: every one, or each `query_stride`-th; R rows for T queries
    m        -       random features of the linear attention

Tensors are (B, H, T, D). A key's number is its rank among the valid keys. Probabilities, softmax statistics and running
sums are at least fp32, whatever the input is. "Differs" marks where we leave the paper or its authors' code.

Left out: attention dropout, cross-attention, sliding windows.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GROUPS = ("causal_batch", "query", "head", "batch")
METHODS = ("sea", "performer")
HISTORY = 4  # rows of the past that a 3-row convolution of dilation 2 looks at


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


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
    group: str = "causal_batch"  # what cells compete with each other, see topk_mask
    query_stride: int = 1  # estimate queries 0, r, 2r, ...; the queries between reuse that row (causal only)
    nbf: float = 8  # random features m = int(D ln D / nbf); 1 for BERT
    max_positions: int = 2048  # rows of the learned position table (causal only)
    method: str = "sea"  # "performer": the linear attention's own context is the output, the paper's control
    seed: int = 0  # of the random features

    def __post_init__(self):
        for name in ("n_head", "d_head", "width", "topk", "query_stride", "max_positions"):
            value = getattr(self, name)
            _expect(isinstance(value, int) and value >= 1, name, "an integer >= 1", value)
        kv = self.kv_heads
        _expect(isinstance(kv, int) and kv >= 1 and self.n_head % kv == 0, "n_kv_head",
                f"a divisor of n_head = {self.n_head}", kv)
        _expect(self.group in GROUPS, "group", f"one of {GROUPS}", repr(self.group))
        _expect(self.method in METHODS, "method", f"one of {METHODS}", repr(self.method))
        _expect(self.nbf > 0, "nbf", "a number > 0", self.nbf)
        if self.causal:
            _expect(self.group in GROUPS[:2], "group", f"one of {GROUPS[:2]} when causal, since the others rank "
                    "a query's cells against later queries'", repr(self.group))
        _expect(self.query_stride == 1 or (self.causal and self.method == "sea"), "query_stride",
                "1 unless causal and method = 'sea'", self.query_stride)

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def n_features(self) -> int:
        return max(1, int(self.d_head * math.log(self.d_head) / self.nbf))


# -- small tools -------------------------------------------------------------------------------------------------------


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor):
    """Autocast would run the matmuls of fp32 sums in half precision."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, C, N, E) at index (B, M), each batch entry by its own: (B, C, M, E)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, H, S, D): each key/value head serves H/Hkv neighbouring query heads."""
    return x if x.shape[1] == n_head else x.repeat_interleave(n_head // x.shape[1], dim=1)


# -- 1. estimate the attention row in `width` cells --------------------------------------------------------------------


def orthogonal_features(d_head: int, n_features: int, generator: torch.Generator | None = None) -> Tensor:
    """Random projection (D, m) with orthogonal columns in blocks of D and the norms of Gaussian vectors (FAVOR+)."""
    blocks = [torch.linalg.qr(torch.randn(d_head, d_head, generator=generator, dtype=torch.float64))[0]
              for _ in range(-(-n_features // d_head))]
    norms = torch.randn(n_features, d_head, generator=generator, dtype=torch.float64).norm(dim=1)
    return (torch.cat(blocks, dim=1)[:, :n_features] * norms).float()


def relu_features(x: Tensor, projection: Tensor) -> Tensor:
    """phi for causal attention: relu(xW) + 1e-3, (..., D) -> (..., m). Positive, and a function of one token only."""
    return F.relu(at_least_fp32(x) @ projection.to(at_least_fp32(x).dtype)) + 1e-3


def softmax_features(x: Tensor, projection: Tensor, keep: Tensor | None = None) -> Tensor:
    """phi for bidirectional attention: FAVOR+ positive features exp(xW - |x|^2/2 - max) + 1e-4, (..., T, D) -> (..., T, m).

    The maximum is a factor of phi that cancels in the attention. It runs over each query's features, or, with `keep`
    (broadcastable to (..., T, 1)), over the features of all kept tokens, since keys share one sum. That is why causal
    attention has features of its own: such a maximum would leak the future.
    """
    x = at_least_fp32(x)
    u = x @ projection.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
    if keep is None:
        top = u.amax(-1, keepdim=True)
    else:
        u = u.masked_fill(~keep, torch.finfo(u.dtype).min)
        top = u.amax((-2, -1), keepdim=True)
    return (u - top.detach()).exp() + 1e-4


def interpolated_identity(seen: Tensor, n_rows: int, d: int) -> Tensor:
    """The D x D identity stretched linearly over each sequence's `seen` (B,) rows: (B, n_rows, D), bidirectional positions."""
    row = torch.arange(n_rows, device=seen.device, dtype=torch.float64)
    x = row * (d - 1) / (seen[:, None] - 1).clamp(min=1)  # (B, n_rows)
    return F.relu(1 - (x[..., None] - torch.arange(d, device=seen.device)).abs()).float()


def linear_attention(q_feat: Tensor, k_feat: Tensor, v: Tensor, *, causal: bool = True, stride: int = 1,
                     past: Tensor | None = None, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """c = phi(q) (sum phi(k)^T v) / (phi(q) sum phi(k)), the sums over all keys, or causal, in O(S).

    q_feat (B, H, R, m), k_feat (B, Hkv, S, m), v (B, Hkv, S, E). Causal, row i sees the keys before (i+1)*stride; a key
    whose features are 0 is not there. past and the second result: (B, Hkv, m, E+1), sums of phi(k)^T [v; 1] before the
    first key and after the last. Returns (B, H, R, E), and 0 for a row that sees nothing.

    Causal rows work in chunks: keys of earlier chunks through their sum, keys of the same chunk one by one.
    """
    n_group, n_rows, n_keys = q_feat.shape[1] // k_feat.shape[1], q_feat.shape[2], k_feat.shape[2]
    v = F.pad(v, (0, 1), value=1.0)  # a last column of ones gives the denominator
    with no_autocast(v):
        if causal:
            rows = max(1, chunk // stride)
            n_chunk = max(-(-n_rows // rows), -(-n_keys // (rows * stride)))
            q = F.pad(q_feat, (0, 0, 0, n_chunk * rows - n_rows))
            q = rearrange(q, "b (h g) (n r) m -> b h n g r m", g=n_group, n=n_chunk)
            pad = (0, 0, 0, n_chunk * rows * stride - n_keys)
            k = rearrange(F.pad(k_feat, pad), "b h (n c) m -> b h n c m", n=n_chunk)
            v = rearrange(F.pad(v, pad), "b h (n c) e -> b h n c e", n=n_chunk)
            sums = k.mT @ v  # (B, Hkv, n_chunk, m, E+1)
            sums = torch.cat([torch.zeros_like(sums[:, :, :1]) if past is None else past[:, :, None], sums], 2).cumsum(2)
            last_key = torch.arange(rows, device=q.device) * stride + stride - 1
            later = torch.arange(rows * stride, device=q.device) > last_key[:, None]
            same_chunk = (q @ k[:, :, :, None].mT).masked_fill(later, 0) @ v[:, :, :, None]
            c = q @ sums[:, :, :-1, None] + same_chunk
            c, past = rearrange(c, "b h n g r e -> b (h g) (n r) e")[:, :, :n_rows], sums[:, :, -1]
        else:
            past = k_feat.mT @ v
            c = q_feat @ repeat_heads(past, q_feat.shape[1])
    return c[..., :-1] / c[..., -1:].where(c[..., -1:] != 0, 1), past


# -- 2. grouped top-k --------------------------------------------------------------------------------------------------


def topk_mask(probs: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """The cells to keep, bool (B, H, T, width). Section 3.2 of the paper; no gradient flows through the choice.

    probs (B, H, T, width); seen (B, T) keys that each query may see. Cells are ranked inside a group and the first n
    are kept, ties going to the lower (head, row, cell); a query that sees no key keeps no cell:

        causal_batch   H x width cells of one query            n = round(H*topk*width / seen)
        query          width cells of one head and query       n = round(topk*width / seen)
        head           T x width cells of one head             n = topk*width         (bidirectional only)
        batch          H x T x width cells of one sequence     n = H*topk*width       (bidirectional only)

    n is rounded half up, at least 1, at most all, so early causal queries keep every cell and are exactly dense.
    """
    _expect(probs.ndim == 4, "probs", "shape (B, H, T, width)", tuple(probs.shape))
    B, H, T, width = probs.shape
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(isinstance(topk, int) and topk >= 1, "topk", "an integer >= 1", topk)
    _expect(group in GROUPS, "group", f"one of {GROUPS}", repr(group))
    layout = {"causal_batch": "b t (h p)", "query": "b h t p", "head": "b h (t p)", "batch": "b (h t p)"}[group]
    visible = (seen > 0)[:, None, :, None]  # (B, 1, T, 1)
    ranked = rearrange(probs.detach().masked_fill(~visible, -1), f"b h t p -> {layout}")

    t = seen.long().clamp(min=1)
    if group == "causal_batch":
        n = (2 * H * topk * width + t) // (2 * t)  # (B, T), round(a/b) = (2a+b)//(2b)
    elif group == "query":
        n = ((2 * topk * width + t) // (2 * t))[:, None]  # (B, 1, T)
    else:
        n = torch.full(ranked.shape[:-1], topk * width * (H if group == "batch" else 1), device=probs.device)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices  # stable: ties to the lower index
    first_n = torch.arange(ranked.shape[-1], device=probs.device) < n.clamp(min=1)[..., None]
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, first_n.expand_as(order))
    return rearrange(keep, f"{layout} -> b h t p", h=H, t=T, p=width) & visible


# -- 3. from cells to keys ---------------------------------------------------------------------------------------------


def cell_of_key(j, seen, width: int):
    """The cell that key j (0-based rank) lies in for a query that sees `seen` >= 1 keys. Exact, for ints and int tensors.

    Differs: the paper's floor((j + 0.5)/seen*width - tiny) in integers, so that no rounding decides.
    """
    j, seen = (x.long() if isinstance(x, Tensor) else x for x in (j, seen))
    return ((2 * j + 1) * width - 1) // (2 * seen)


def first_key_of_cell(p, seen, width: int):
    """lo(p): cell p covers the keys lo(p) <= j < lo(p+1), none where seen < width leaves it empty. lo(width) = seen."""
    p, seen = (x.long() if isinstance(x, Tensor) else x for x in (p, seen))
    return (2 * seen * p + width) // (2 * width)


def keys_per_cell(seen: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T, width): how many keys each cell covers."""
    return first_key_of_cell(torch.arange(width + 1, device=seen.device), seen[..., None], width).diff(dim=-1)


def spread_to_keys(cells: Tensor, seen: Tensor, n_keys: int, fill) -> Tensor:
    """Give each key its cell's value: (B, H, T, width) -> (B, H, T, n_keys), `fill` for keys that a query does not see."""
    j = torch.arange(n_keys, device=cells.device)
    cell = cell_of_key(j, seen[..., None].clamp(min=1), cells.shape[-1]).clamp(max=cells.shape[-1] - 1)  # (B, T, n_keys)
    values = cells.gather(-1, cell[:, None].expand(-1, cells.shape[1], -1, -1))
    return values.masked_fill((j >= seen[..., None])[:, None], fill)


def expand_mask(mask: Tensor, seen: Tensor, n_keys: int) -> Tensor:
    """Which keys the kept cells stand for: bool (B, H, T, width) -> (B, H, T, n_keys). For reading and tests."""
    return spread_to_keys(mask, seen, n_keys, False)


# -- 4. sparse attention and output ------------------------------------------------------------------------------------


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seen: Tensor, softmax_scale: float | None = None, *,
                     row: Tensor | None = None, block: int = 1024) -> Tensor:
    """softmax(q k^T * softmax_scale) v over the keys under the kept cells: (B, H, T, D). A query with no key gives 0.

    q (B, H, T, D); k, v (B, Hkv, S, D), the valid keys first; mask (B, H, R, width) bool; seen (B, T); row (B, T): the
    row of `mask` that each query uses, its own (R = T) by default; softmax_scale D**-0.5 by default. Works on `block`
    queries at a time. Raises ValueError if shapes do not fit.
    """
    _check_qkv(q, k, v)
    B, H, T, D = q.shape
    _expect(mask.ndim == 4 and mask.shape[:2] == (B, H), "mask", f"shape (B, H, R, width) with B, H = {(B, H)}",
            tuple(mask.shape))
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(row is not None or mask.shape[2] == T, "mask", f"{T} rows, or `row` to say which is whose", mask.shape[2])
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    outs = []
    for i in range(0, T, block):
        at = slice(i, i + block)
        cells = mask[:, :, at] if row is None else take(mask, row[:, at])
        keep = expand_mask(cells, seen[:, at], k.shape[2])  # (B, H, block, S)
        scores = at_least_fp32(q[:, :, at] @ k.mT) * scale
        # The finite fill keeps empty rows, and their gradients, free of nan; `* keep` makes them 0.
        probs = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep
        outs.append(probs.to(v.dtype) @ v)
    return torch.cat(outs, dim=2)


def running_mean(v: Tensor, seen: Tensor, valid: Tensor | None = None, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of v over the keys <= i, the causal `average`: (B, Hkv, T, D), and the running sum after the last (B, Hkv, D)."""
    v = at_least_fp32(v)
    if valid is not None:
        v = v * valid[:, None, :, None]
    sums = v.cumsum(2) if past is None else v.cumsum(2) + past[:, :, None]
    return sums / seen[:, None, :, None].clamp(min=1), sums[:, :, -1]


def estimated_mean(probs: Tensor, v: Tensor, row_seen: Tensor) -> Tensor:
    """sum_j w_j v_j, the bidirectional `average`: (B, H, 1, D). w: the mean estimated row, given to the keys of each cell.

    probs (B, H, R, width) of rows that see row_seen (B, R) keys, all of them or, in a padded row, none. Differs: the
    authors do not normalise w to sum 1.
    """
    there = (row_seen > 0)[:, None, :, None]
    mean = (probs * there).sum(2, keepdim=True)  # the normalisation below makes the sum a mean
    w = spread_to_keys(mean, row_seen.amax(1, keepdim=True), v.shape[2], 0.0)  # (B, H, 1, S)
    w = w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return w @ repeat_heads(v, probs.shape[1]).to(w.dtype)


# -- 5. streaming ------------------------------------------------------------------------------------------------------


@dataclass
class SEAState:
    """What a causal layer needs of the past; constant in size but for the KV cache (None where the caller keeps it)."""

    count: Tensor  # (B,) valid tokens so far
    sums: Tensor  # (B, Hkv, m, E+1), sum of phi(k)^T [v_cat; 1], E = 2D (D for the Performer)
    v_sum: Tensor | None = None  # (B, Hkv, D)
    conv_rows: tuple[Tensor, Tensor] | None = None  # the last input rows of each convolution, 2 x (B, 2H, 4, width/4)
    last_scores: Tensor | None = None  # (B, H, 1, width), the last estimated row, for the queries that reuse it
    last_gates: Tensor | None = None  # (B, H, 1, 2)
    k: Tensor | None = None  # (B, Hkv, S, D)
    v: Tensor | None = None
    valid: Tensor | None = None  # (B, S), None: all

    def index_select(self, index: Tensor) -> "SEAState":
        """The state of batch entries `index`: beam search's reordering, batch expansion."""
        pick = lambda x: x if x is None else tuple(map(pick, x)) if isinstance(x, tuple) else x.index_select(0, index)
        return SEAState(**{name: pick(x) for name, x in vars(self).items()})


@dataclass
class SEAOutput:
    """The result of SEAttention and what it was made of. `probs` and `mask` hold a row for each query."""

    out: Tensor  # (B, H, T, D)
    seen: Tensor  # (B, T)
    state: SEAState | None  # None if bidirectional
    scores: Tensor | None = None  # (B, H, R, width), before the softmax over cells
    cells: Tensor | None = None  # (B, H, R, width) bool, the kept ones
    row: Tensor | None = None  # (B, T), the row of `scores` and `cells` that each query uses

    @property
    def probs(self) -> Tensor | None:
        """Estimated attention (B, H, T, width); None for the Performer."""
        return None if self.scores is None else take(at_least_fp32(self.scores).softmax(-1), self.row)

    @property
    def mask(self) -> Tensor | None:
        """Kept cells, bool (B, H, T, width); None for the Performer."""
        return None if self.cells is None else take(self.cells, self.row) & (self.seen > 0)[:, None, :, None]


@dataclass
class Rows:
    """Which tokens of a call are estimated, and where each query finds its row. Padding and stride end here: the
    estimator sees dense rows and keys, the valid ones first."""

    seen: Tensor  # (B, T) keys that each query sees
    query: Tensor  # (B, R) the query that each row belongs to
    row_seen: Tensor  # (B, R) or, with a last row of the past before them, (B, 1+R)
    row: Tensor  # (B, T) each query's place among those rows
    n_rows: Tensor  # (B,) valid rows
    key: Tensor  # (B, N) the new token at each place before, at, and after the rows
    key_there: Tensor  # (B, N) whether there is one
    order: Tensor  # (B, T) new tokens, the valid ones first


def choose_rows(valid: Tensor, count: Tensor, stride: int, causal: bool, has_past: bool) -> Rows:
    """Rows are the tokens of rank 0, stride, 2*stride, ... counted from the start of the sequence, not of the call.

    valid (B, T) of the new tokens; count (B,) valid tokens before them. Places of keys are such that row i sees the
    places before (i+1)*stride, whatever rank the call starts at.
    """
    T, device = valid.shape[1], valid.device
    n_new = valid.sum(1)
    rank = valid.cumsum(1) - 1  # (B, T) among the new tokens
    seen = ((count[:, None] + rank + 1) if causal else n_new[:, None]) * valid
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    offset = -count % stride  # (B,) rank of the first row
    at = offset[:, None] + stride * torch.arange((T - 1) // stride + 1, device=device)  # (B, R)
    row_seen = ((count[:, None] + at + 1) if causal else n_new[:, None]) * (at < n_new[:, None])
    row = (rank - offset[:, None]).div(stride, rounding_mode="floor")
    if has_past and stride > 1:  # the first queries may still use the row before
        row_seen = torch.cat([(count + offset - stride + 1).clamp(min=0)[:, None], row_seen], dim=1)
        row = row + 1
    key = torch.arange(T + stride - 1, device=device) - (stride - 1 - offset)[:, None]
    return Rows(seen=seen, query=order.gather(1, at.clamp(max=T - 1)), row_seen=row_seen, row=row.clamp(min=0),
                n_rows=(n_new[:, None] > at).sum(1), key=order.gather(1, key.clamp(0, T - 1)),
                key_there=(key >= 0) & (key < n_new[:, None]), order=order)


# -- the module --------------------------------------------------------------------------------------------------------


class CausalCNN(nn.Module):
    """Rows (B, 2H, R, width/4) -> scores (B, H, R, width). Heads are channels, so heads inform each other.

    3x3 convolutions of dilation 2 that read rows t, t-2, t-4: never a later one. Differs: the authors upsample by
    nearest and give four neighbouring cells one score; a 1x1 convolution to 4 cells costs the same.
    """

    def __init__(self, n_head: int, width: int):
        super().__init__()
        self.width, quarter = width, -(-width // 4)
        self.norm = nn.LayerNorm(quarter)
        self.conv1 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.conv2 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.up = nn.Conv2d(2 * n_head, 4 * n_head, 1)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor, n_rows: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """past and the second result: the last rows that entered each convolution; n_rows (B,) says where they end."""
        x, kept = self.norm(x), []
        last = n_rows[:, None] + torch.arange(HISTORY, device=x.device)
        for i, conv in enumerate((self.conv1, self.conv2)):
            before = x.new_zeros(x.shape[0], x.shape[1], HISTORY, x.shape[3]) if past is None else past[i].to(x.dtype)
            x = torch.cat([before, x], dim=2)
            kept.append(take(x, last))
            x = F.relu(conv(x))
        x = rearrange(self.up(x), "b (h s) t p -> b h t (p s)", s=4)[..., : self.width]
        return self.norm_out(x), tuple(kept)


class BidirectionalCNN(nn.Module):
    """Rows (B, 4H, R, width/2) -> scores (B, H, R, width), at half the rows, doubled by nearest."""

    def __init__(self, n_head: int, width: int):
        super().__init__()
        self.width = width
        self.conv1 = nn.Conv2d(4 * n_head, 4 * n_head, 3, padding=1, stride=(2, 1))
        self.conv2 = nn.Conv2d(4 * n_head, 4 * n_head, 3, padding=1)
        self.up = nn.Conv2d(4 * n_head, 2 * n_head, 3, padding=1)

    def forward(self, x: Tensor, n_rows: Tensor) -> Tensor:
        """Rows from n_rows (B,) on are padding: they enter each convolution as zeros, as the border does."""
        n_total = x.shape[2]
        crop = lambda x, n: x * (torch.arange(x.shape[2], device=x.device) < n[:, None])[:, None, :, None]
        x = F.relu(self.conv1(crop(x, n_rows)))
        x = F.relu(self.conv2(crop(x, (n_rows + 1) // 2)))
        x = self.up(crop(x.repeat_interleave(2, dim=2)[:, :, :n_total], n_rows))
        return rearrange(x, "b (h s) t p -> b h t (p s)", s=2)[..., : self.width]


class SEAttention(nn.Module):
    """One SEA attention layer: everything between the q, k, v projections and the output projection.

    forward(q, k, v, state=...) is one function for training, chunked prefill and decoding: feeding a sequence in any
    chunks, each with the state of the one before, gives what one call gives.
    """

    def __init__(self, config: SEAConfig):
        super().__init__()
        self.config = config
        H, D, width = config.n_head, config.d_head, config.width
        self.register_buffer("projection", torch.empty(D, config.n_features))
        self.redraw_features(torch.Generator().manual_seed(config.seed))
        if config.method == "performer":
            return
        if config.causal:
            self.position = nn.Parameter(torch.randn(config.max_positions, D))
        self.encoder = nn.Sequential(nn.Linear(3 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU())
        self.channels, part = (2, 4) if config.causal else (4, 2)
        self.decoder = nn.Linear(2 * D, self.channels * -(-width // part))
        self.cnn = (CausalCNN if config.causal else BidirectionalCNN)(H, width)
        self.gate = nn.Linear(2 * D, 2)
        nn.init.zeros_(self.gate.weight)  # gates start open: a student that begins as half an average
        nn.init.constant_(self.gate.bias, 4.0)  # needs hundreds of steps to recover

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, in place. The authors do so every 1000 training steps."""
        self.projection.copy_(orthogonal_features(*self.projection.shape, generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, softmax_scale: float | None = None,
                state: SEAState | None = None, topk: int | None = None, kv_cached: bool = False) -> SEAOutput:
        """q (B, H, T, D); k, v (B, Hkv, T, D), or, with kv_cached, (B, Hkv, S, D) with the past keys first.

        valid: bool, as long as k, False where a token is padding (either side, or between); its output is 0.
        softmax_scale: what q k^T is multiplied by, D**-0.5 by default. state: SEAOutput.state of the call before.
        topk: keys per query and head, the config's by default; it may differ from call to call (the paper's dynamic k).
        kv_cached: the caller keeps the KV cache, so the state carries none. Raises ValueError for what does not fit.
        """
        config = self.config
        self._check(q, k, v, valid, state, kv_cached)
        B, H, T, D = q.shape
        scale = D**-0.5 if softmax_scale is None else softmax_scale
        k_new, v_new = k[:, :, -T:], v[:, :, -T:]
        if state is not None and not kv_cached:
            if valid is not None or state.valid is not None:
                ones = lambda x: torch.ones(B, x.shape[2], dtype=torch.bool, device=x.device)
                past_valid = ones(state.k) if state.valid is None else state.valid
                valid = torch.cat([past_valid, ones(k) if valid is None else valid], dim=1)
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        new = torch.ones(B, T, dtype=torch.bool, device=q.device) if valid is None else valid[:, -T:]
        count = torch.zeros(B, dtype=torch.long, device=q.device) if state is None else state.count
        rows = choose_rows(new, count, config.query_stride, config.causal, state is not None)

        padded = valid is not None
        context, scores, gates, next_state = self.estimate_attention(q, k_new, v_new, rows, scale, state, padded)
        if next_state is not None:
            next_state.count = count + new.sum(1)
            if not kv_cached:
                next_state.k, next_state.v, next_state.valid = k, v, valid
        if config.method == "performer":
            out = take(context, rows.row) * (rows.seen > 0)[:, None, :, None]
            return SEAOutput(out.to(q.dtype), rows.seen, next_state)

        probs = at_least_fp32(scores).softmax(-1)  # (B, H, R, width)
        cells = topk_mask(probs, rows.row_seen, config.topk if topk is None else topk, config.group)
        if padded:
            order = valid.int().argsort(dim=1, descending=True, stable=True)  # valid keys first
            k, v_ranked = take(k, order), take(v, order)
        else:
            v_ranked = v
        sparse = sparse_attention(q, k, v_ranked, cells, rows.seen, scale, row=rows.row)
        if config.causal:
            past_sum = None if state is None else state.v_sum
            average, next_state.v_sum = running_mean(v_new, rows.seen, new if padded else None, past_sum)
            average = repeat_heads(average, H)
        else:
            average = estimated_mean(probs, v_ranked, rows.row_seen)
        s_prob, s_mix = take(at_least_fp32(gates).sigmoid(), rows.row).split(1, dim=-1)  # (B, H, T, 1)
        out = s_mix * s_prob * sparse + (1 - s_mix) * average
        out = out * (rows.seen > 0)[:, None, :, None] if padded else out
        return SEAOutput(out.to(q.dtype), rows.seen, next_state, scores, cells, rows.row)

    def estimate_attention(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, softmax_scale: float,
                           state: SEAState | None, padded: bool) -> tuple[Tensor, Tensor, Tensor, SEAState | None]:
        """Linear attention -> encoder -> row decoder -> CNN, for the rows of new tokens q, k, v (B, H or Hkv, T, D).

        Returns context (B, H, R, E), scores (B, H, R, width), gates (B, H, R, 2) before their sigmoid, and the state.
        With query_stride > 1 the gates come per estimated row as well, since they need its linear attention.
        """
        config, (H, D) = self.config, (self.config.n_head, self.config.d_head)
        sea, moved = config.method == "sea", padded or config.query_stride > 1
        there = rows.key_there[:, None, :, None]
        q, v_row = (take(q, rows.query), take(v, rows.query)) if moved else (q, v)
        k, v = (take(k, rows.key), take(v, rows.key)) if moved else (k, v)

        # phi(q) phi(k)^T stands for exp(q k^T * softmax_scale); q takes what k's D**-0.25 leaves, since some models
        # scale q before they call us.
        with no_autocast(q):
            q, k = at_least_fp32(q) * (softmax_scale * D**0.25), at_least_fp32(k) * D**-0.25
            if config.causal:
                q_feat, k_feat = relu_features(q, self.projection), relu_features(k, self.projection)
            else:
                q_feat, k_feat = softmax_features(q, self.projection), softmax_features(k, self.projection, there)
        v_cat = at_least_fp32(v)
        if sea:
            v_cat = torch.cat([self._positions(rows, state, v).to(v_cat.dtype).expand_as(v), v_cat], dim=-1)
        past = None if state is None else state.sums
        k_feat = k_feat * there if moved else k_feat
        context, sums = linear_attention(q_feat, k_feat, v_cat, causal=config.causal, stride=config.query_stride, past=past)
        next_state = SEAState(count=None, sums=sums) if config.causal else None
        if not sea:
            return context, None, None, next_state

        dtype = v.dtype if torch.is_autocast_enabled(v.device.type) else self.gate.weight.dtype
        z = self.encoder(torch.cat([context, repeat_heads(v_row, H)], dim=-1).to(dtype))  # (B, H, R, 2D)
        gates = self.gate(z)
        image = rearrange(self.decoder(z), "b h t (c p) -> b (h c) t p", c=self.channels)
        if not config.causal:
            return context, self.cnn(image, rows.n_rows), gates, None
        scores, next_state.conv_rows = self.cnn(image, rows.n_rows, None if state is None else state.conv_rows)
        if config.query_stride > 1:
            if state is not None:
                scores, gates = torch.cat([state.last_scores, scores], 2), torch.cat([state.last_gates, gates], 2)
            last = rows.n_rows[:, None] - int(state is None)  # its index, after any row of the past
            next_state.last_scores, next_state.last_gates = take(scores, last.clamp(min=0)), take(gates, last.clamp(min=0))
        return context, scores, gates, next_state

    def _positions(self, rows: Rows, state: SEAState | None, v: Tensor) -> Tensor:
        """Position part of v_cat, (B, 1, N, D) in the order of the keys."""
        if not self.config.causal:
            return interpolated_identity(rows.n_rows, v.shape[2], v.shape[3])[:, None]
        if state is None:  # places start at stride - 1, so the ranks there are 0, 1, ...
            return F.pad(self.position[: rows.seen.shape[1]], (0, 0, self.config.query_stride - 1, 0))[None, None]
        stride = self.config.query_stride
        rank = torch.arange(v.shape[2], device=v.device) - (stride - 1 - -state.count % stride)[:, None] + state.count[:, None]
        return self.position[rank.clamp(0, len(self.position) - 1)][:, None]

    def _check(self, q, k, v, valid, state, kv_cached) -> None:
        config = self.config
        _check_qkv(q, k, v)
        (B, H, T, D), S = q.shape, k.shape[2]
        _expect(H == config.n_head, "q", f"{config.n_head} heads", H)
        _expect(D == config.d_head, "q", f"head size {config.d_head}", D)
        _expect(k.shape[1] == config.kv_heads, "k", f"{config.kv_heads} key/value heads", k.shape[1])
        _expect(state is None or config.causal, "state", "None when bidirectional", "a state")
        _expect(state is None or state.count.shape == (B,), "state", f"a batch of {B}",
                None if state is None else tuple(state.count.shape))
        if kv_cached:
            _expect(S >= T, "k", f"at least the {T} tokens of q", S)
            _expect(S == T or state is not None, "state", f"the state of the {S - T} tokens before", None)
        else:
            _expect(S == T, "k", f"the {T} tokens of q (or kv_cached=True)", S)
            _expect(state is None or state.k is not None, "state", "one that carries the KV cache (or kv_cached=True)",
                    "one without")
        _expect(valid is None or (valid.dtype == torch.bool and valid.shape == (B, S)), "valid", f"bool of shape {(B, S)}",
                None if valid is None else f"{valid.dtype} {tuple(valid.shape)}")
        total = S if kv_cached or state is None else S + state.k.shape[2]
        _expect(not config.causal or config.method == "performer" or total <= config.max_positions, "k",
                f"at most max_positions = {config.max_positions} tokens", total)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _expect(x.ndim == 4, name, "shape (B, heads, tokens, D)", tuple(x.shape))
        _expect(x.is_floating_point(), name, "a floating-point dtype", x.dtype)
        _expect(x.dtype == q.dtype, name, f"dtype {q.dtype} as q", x.dtype)
        _expect(x.device == q.device, name, f"device {q.device} as q", x.device)
        _expect(x.shape[2] >= 1, name, "at least one token", tuple(x.shape))
    _expect(k.shape == v.shape, "v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    _expect(k.shape[0] == q.shape[0], "k", f"a batch of {q.shape[0]} as q", k.shape[0])
    _expect(k.shape[3] == q.shape[3], "k", f"head size {q.shape[3]} as q", k.shape[3])
    _expect(q.shape[1] % k.shape[1] == 0, "k", f"a number of heads that divides q's {q.shape[1]}", k.shape[1])


# -- 6. distillation ---------------------------------------------------------------------------------------------------


@dataclass
class PooledAttention:
    """All that the estimate loss needs of a teacher's attention A: O(T*width) numbers instead of O(T*S)."""

    cells: Tensor  # (B, H, T, width), sum of A over the keys of each cell
    a_log_a: Tensor  # (B, H, T), sum of A log A
    a_square: Tensor  # (B, H, T), sum of A^2
    n_keys: int


def dense_scores(q: Tensor, k: Tensor, seen: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """log softmax(q k^T * softmax_scale) over the keys seen, with 0 at those unseen: (B, H, T, S), and which are seen."""
    visible = (torch.arange(k.shape[2], device=k.device) < seen[..., None])[:, None]  # (B, 1, T, S)
    scores = at_least_fp32(q @ repeat_heads(k, q.shape[1]).mT) * softmax_scale
    log_probs = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    return log_probs.masked_fill(~visible, 0), visible


@torch.no_grad()
def pool_attention(q: Tensor, k: Tensor, seen: Tensor, width: int, softmax_scale: float | None = None, *,
                   block: int = 256) -> PooledAttention:
    """Teacher attention softmax(q k^T * softmax_scale) pooled to `width` cells, `block` queries at a time.

    q (B, H, T, D), k (B, Hkv, S, D), the valid keys first; seen (B, T). Memory O(T*width + block*S).
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    parts = []
    for i in range(0, q.shape[2], block):
        t = seen[:, i : i + block]
        log_a, visible = dense_scores(q[:, :, i : i + block], k, t, scale)
        a = log_a.exp() * visible
        j = torch.arange(k.shape[2], device=k.device)
        cell = cell_of_key(j, t[..., None].clamp(min=1), width).clamp(max=width - 1)[:, None].expand_as(a)
        cells = a.new_zeros(*a.shape[:-1], width).scatter_add(-1, cell, a)
        parts.append((cells, (a * log_a).sum(-1), a.square().sum(-1)))
    return PooledAttention(*(torch.cat(x, dim=2) for x in zip(*parts)), n_keys=k.shape[2])


def estimate_loss(scores: Tensor, pooled: PooledAttention, seen: Tensor, *, row: Tensor | None = None,
                  kl_weight: float = 0.1) -> Tensor:
    """L_estimate = kl_weight * KL(A || a) + MSE(a, A), exactly, without a T x S tensor.

    a: the cell scores given to each key, softmax over the keys seen. scores (B, H, R, width), row (B, T) which of its
    rows each query uses (its own by default). With n_p keys and teacher mass A_p in cell p, and a_p the value of each of
    its keys:

        log Z = log sum_p n_p exp(s_p),   a_p = exp(s_p) / Z
        KL = sum A log A - sum_p A_p s_p + log Z,   sum_j (a_j - A_j)^2 = sum_p (n_p a_p^2 - 2 a_p A_p) + sum A^2

    KL is averaged over the queries of all heads, MSE over their n_keys entries each; padded queries are left out.
    """
    _expect(pooled.cells.shape[-1] == scores.shape[-1], "pooled", f"width {scores.shape[-1]} as scores",
            pooled.cells.shape[-1])
    s = at_least_fp32(scores if row is None else take(scores, row))  # (B, H, T, width)
    there = (seen > 0)[:, None]
    n = keys_per_cell(seen.clamp(min=1), s.shape[-1])[:, None]  # (B, 1, T, width)
    log_z = (s + n.to(s.dtype).log()).logsumexp(-1, keepdim=True)
    # An empty cell takes no part; without the fill its a_p may overflow and 0 * inf is nan.
    a = (s - log_z).masked_fill(n == 0, -torch.inf).exp()
    kl = pooled.a_log_a - (pooled.cells * s).sum(-1) + log_z.squeeze(-1)
    square = (n * a.square() - 2 * a * pooled.cells).sum(-1) + pooled.a_square
    return ((kl_weight * kl + square / pooled.n_keys) * there).sum() / (there.sum() * s.shape[1]).clamp(min=1)


def score_loss(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, seen: Tensor,
               softmax_scale: float | None = None, *, kl_weight: float = 0.1, block: int = 256) -> Tensor:
    """L_score = kl_weight * KL(A || S) + MSE(S, A): the student's own dense attention S against the teacher's A.

    Blocks of queries are computed again in the backward pass, so that no T x S tensor is kept. Means as in estimate_loss.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def part(q, k, teacher_q, teacher_k, seen):
        log_s, visible = dense_scores(q, k, seen, scale)
        with torch.no_grad():
            log_a, _ = dense_scores(teacher_q, teacher_k, seen, scale)
            a = log_a.exp() * visible
        square = ((log_s.exp() - a) * visible).square().sum(-1)
        return ((kl_weight * (a * (log_a - log_s)).sum(-1) + square / k.shape[2]) * (seen > 0)[:, None]).sum()

    total = q.new_zeros((), dtype=at_least_fp32(q[:0]).dtype)
    for i in range(0, q.shape[2], block):
        at = slice(i, i + block)
        total = total + checkpoint(part, q[:, :, at], k, teacher_q[:, :, at], teacher_k, seen[:, at], use_reentrant=False)
    return total / ((seen > 0).sum() * q.shape[1]).clamp(min=1)
