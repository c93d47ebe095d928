"""SEA: Sparse Linear Attention with Estimated Attention Mask, in plain PyTorch.

Lee, Kim, Willette, Hwang, ICLR 2024 (arXiv 2310.01777). SEA replaces the attention of a pretrained transformer. It
estimates each attention row in `width` cells with linear attention and a small CNN, keeps the best cells by a grouped
top-k, attends only to the keys under them, and learns all this by distilling the teacher's attention. This file is the
readable reference: every step of the paper is one function, in the paper's order, for every dtype and device, with
autograd. Copy it away and it works: it needs torch and einops only. Its sparse attention looks at all keys and masks them,
so that it is easy to check; kernels.py beside it, which takes over on a GPU, does only the work that SEA needs.

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

import importlib.util
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GROUPS = ("causal_batch", "query", "head", "batch")
METHODS = ("sea", "performer")
BACKENDS = ("auto", "torch", "triton")
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
    query_stride: int = 1  # estimate queries 0, r, 2r, ...; those between reuse that row's cells and gates (causal only)
    nbf: float = 8  # random features m = int(D ln D / nbf); 1 for BERT
    max_positions: int = 2048  # rows of the learned position table, the longest sequence with its padding (causal only)
    cell_keys: bool = True  # add each query's product with the mean key of a cell to its score, see add_cell_keys (causal only)
    method: str = "sea"  # "performer": the linear attention's own context is the output, the paper's control
    seed: int = 0  # of the random features
    backend: str = "auto"  # kernels.py on a GPU where it lies beside this file and fits; or "torch", or "triton" to insist

    def __post_init__(self):
        for name in ("n_head", "d_head", "width", "topk", "query_stride", "max_positions"):
            value = getattr(self, name)
            _expect(isinstance(value, int) and value >= 1, name, "an integer >= 1", value)
        kv = self.kv_heads
        _expect(isinstance(kv, int) and kv >= 1 and self.n_head % kv == 0, "n_kv_head",
                f"a divisor of n_head = {self.n_head}", kv)
        _expect(self.group in GROUPS, "group", f"one of {GROUPS}", repr(self.group))
        _expect(self.method in METHODS, "method", f"one of {METHODS}", repr(self.method))
        _expect(self.backend in BACKENDS, "backend", f"one of {BACKENDS}", repr(self.backend))
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
    """Bidirectional positions: the D x D identity, stretched linearly over each sequence's `seen` (B,) rows.

    Returns (B, n_rows, D) fp64.
    """
    row = torch.arange(n_rows, device=seen.device, dtype=torch.float64)
    x = row * (d - 1) / (seen[:, None] - 1).clamp(min=1)  # (B, n_rows)
    return F.relu(1 - (x[..., None] - torch.arange(d, device=seen.device)).abs())


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


def causal_context(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, projection: Tensor, softmax_scale: float, *,
                   stride: int = 1, lead: int = 0, there: Tensor | None = None,
                   past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: causal linear attention over v_cat = [position ; v] with ReLU features.

    q (B, H, R, D) of the estimated rows; k, v (B, Hkv, N, D); position (1 or B, N, D), or None to leave it out (the
    Performer). Key j stands at place j + lead, and row i sees the places before (i+1)*stride; there (B, N) bool: which keys
    there are. past and the second result as in linear_attention. Returns (B, H, R, E), E = 2D (D without position).
    """
    D = q.shape[-1]
    # phi(q) phi(k)^T stands for exp(q k^T * softmax_scale); q takes what k's D**-0.25 leaves, since some models scale q
    # before they call us.
    with no_autocast(q):
        q_feat = relu_features(at_least_fp32(q) * (softmax_scale * D**0.25), projection)
        k_feat = relu_features(at_least_fp32(k) * D**-0.25, projection)
    if there is not None:
        k_feat, v = (x.masked_fill(~there[:, None, :, None], 0) for x in (k_feat, v))
    v_cat = at_least_fp32(v)
    if position is not None:
        v_cat = torch.cat([position[:, None].to(v_cat.dtype).expand_as(v), v_cat], dim=-1)
    k_feat, v_cat = F.pad(k_feat, (0, 0, lead, 0)), F.pad(v_cat, (0, 0, lead, 0))
    return linear_attention(q_feat, k_feat, v_cat, stride=stride, past=past)


def encode_rows(context: Tensor, v: Tensor, encoder: nn.Sequential, decoder: nn.Linear, norm: nn.LayerNorm,
                gate: nn.Linear) -> tuple[Tensor, Tensor]:
    """Steps 3, 4 and 8: z = encoder([c ; v]), the row decoder's image, normed for the CNN, and the gates.

    context (B, H, R, 2D), v (B, Hkv, R, D) -> image (B, 2H, R, P), P = ceil(width / 4) or at least 4, and gates (B, H, R, 2) before their
    sigmoid.
    """
    dtype = v.dtype if torch.is_autocast_enabled(v.device.type) else gate.weight.dtype
    z = encoder(torch.cat([context, repeat_heads(v, context.shape[1])], dim=-1).to(dtype))  # (B, H, R, 2D)
    return norm(rearrange(decoder(z), "b h t (c p) -> b (h c) t p", p=norm.weight.shape[0])), gate(z)


def causal_cnn(image: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d, up: nn.Conv2d, norm: nn.LayerNorm,
               past: tuple[Tensor, Tensor] | None = None,
               n_rows: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Step 5: image (B, 2H, R, P) -> scores (B, H, R, width). Heads are channels, so heads inform each other.

    3x3 convolutions of dilation 2 that read rows t, t-2, t-4: never a later one. past and the second result: the last
    HISTORY rows that entered each convolution before these rows and before row n_rows (B,), by default R. Differs: the
    authors upsample by nearest and give four neighbouring cells one score; a 1x1 convolution to 4 cells costs the same.
    """
    x, last_rows = image, []
    n_rows = torch.full((len(x),), x.shape[2], device=x.device) if n_rows is None else n_rows
    for i, conv in enumerate((conv1, conv2)):
        before = x.new_zeros(x.shape[0], x.shape[1], HISTORY, x.shape[3]) if past is None else past[i].to(x.dtype)
        x = torch.cat([before, x], dim=2)
        last_rows.append(take(x, n_rows[:, None] + torch.arange(HISTORY, device=x.device)))
        x = F.relu(conv(x))
    scores = rearrange(up(x), "b (h s) t p -> b h t (p s)", s=4)[..., : norm.weight.shape[0]]
    return norm(scores), tuple(last_rows)


def bin_level(seen, n_bins: int):
    """The smallest e >= 0 for which n_bins bins of 2**e keys hold `seen` keys, for an int or an int tensor."""
    if isinstance(seen, int):
        return max(0, (max(1, -(-seen // n_bins)) - 1).bit_length())
    return (seen[..., None] > n_bins * 2 ** torch.arange(40, device=seen.device)).sum(-1)


def bin_sums(k: Tensor, n_bins: int, level: int, rank: Tensor | None = None, there: Tensor | None = None,
             past: Tensor | None = None, past_level: Tensor | None = None) -> Tensor:
    """Sums of the keys k (B, Hkv, N, D) in bins of 2**level: (B, Hkv, n_bins, D). Bin b holds those of rank b * 2**level on.

    rank (1 or B, N): their ranks, 0, 1, ... by default; there (B, N): which keys there are. past (B, Hkv, n_bins, D): sums of
    earlier keys, in bins of 2**past_level (B,); what does not fit into n_bins bins is left out, as past of a higher level is.
    """
    B, Hkv, N, D = k.shape
    if rank is None:
        size = n_bins << level
        return F.pad(k[:, :, :size], (0, 0, 0, max(0, size - N))).unflatten(2, (n_bins, 1 << level)).sum(3)
    add = lambda to, x, at: to.scatter_add(2, at[:, None, :, None].clamp(0, n_bins - 1).expand_as(x), x)
    at = rank.expand(B, N) >> level
    inside = at < n_bins if there is None else (at < n_bins) & there
    sums = add(k.new_zeros(B, Hkv, n_bins, D), k.masked_fill(~inside[:, None, :, None], 0), at)
    if past is not None:
        up = level - past_level[:, None]  # (B, 1)
        at = torch.arange(n_bins, device=k.device) >> up.clamp(min=0)
        sums = add(sums, past.masked_fill((up < 0)[:, None, :, None], 0).to(k.dtype), at)
    return sums


def add_cell_keys(scores: Tensor, gain: Tensor, q: Tensor, k: Tensor, row_seen: Tensor, softmax_scale: float, n_keys: int, *,
                  rank: Tensor | None = None, there: Tensor | None = None, past: Tensor | None = None,
                  count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scores + gain * q (mean of the keys of a cell) * softmax_scale, less the row's largest, at least -32: (B, H, R, width).

    Linear attention with the identity for phi and, for values, one-hot places: q sum_j k_j onehot(bin(j))^T, in O(S). 2 * width
    bins of 2**e keys hold the keys of a row, e as small as can be, so that a bin is at most a cell wide; a cell takes the
    bin its middle key is in, or, at the end of the row, the last bin that is full. Differs: the paper has no such term. Random
    features do not tell single keys apart; without it the estimate is little more than a mean over all texts.

    scores (B, H, R, width) of causal_cnn, gain (H,); q (B, H, R, D) of the estimated rows, which see row_seen (B, R) keys; k (B,
    Hkv, N, D) the new keys, rank and there as in bin_sums; n_keys: at least as many as any row sees. past and the second result
    (B, Hkv, 2*width, D): bin_sums before the new keys, at the level of count (B,), and after them. No gradient to q and k: a student
    whose keys are still far from its teacher's would be dragged by this term alone. The limit keeps layers whose scores lie
    thousands apart from drowning the loss of all others.
    """
    with torch.no_grad(), no_autocast(q):
        of_keys, key_sums = cell_key_scores(q, k, row_seen, scores.shape[-1], softmax_scale, n_keys, rank, there, past, count)
    return torch.addcmul(scores, gain[:, None, None].to(scores.dtype), of_keys).to(scores.dtype), key_sums


def cell_key_scores(q: Tensor, k: Tensor, row_seen: Tensor, width: int, softmax_scale: float, n_keys: int, rank: Tensor | None,
                    there: Tensor | None, past: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """What add_cell_keys adds, without its gain, fp32 at least, and the sums after the new keys."""
    n_bins, H = 2 * width, q.shape[1]
    q, k, t = at_least_fp32(q) * softmax_scale, at_least_fp32(k), row_seen[..., None]
    past_level = None if count is None else bin_level(count, n_bins)
    if count is not None and rank is None:
        rank = count[:, None] + torch.arange(k.shape[2], device=k.device)
    n_new = torch.full((len(k),), k.shape[2], device=k.device) if there is None else there.sum(1)
    last = bin_level(n_new if count is None else count + n_new, n_bins)
    level, middle = bin_level(row_seen, n_bins), (2 * torch.arange(width, device=q.device) + 1) * t // (2 * width)
    scores, next_sums = q.new_zeros(*q.shape[:3], width), None
    for e in range(bin_level(n_keys, n_bins) + 1):
        sums = bin_sums(k, n_bins, e, rank, there, past, past_level)
        products = q @ repeat_heads(sums / 2**e, H).mT  # (B, H, R, 2*width)
        of_cells = torch.minimum(middle >> e, (t >> e) - 1).clamp(0, n_bins - 1)[:, None].expand_as(scores)
        scores = torch.where((level == e)[:, None, :, None], products.gather(-1, of_cells), scores)
        next_sums = sums if next_sums is None else torch.where((last == e)[:, None, None, None], sums, next_sums)
    return (scores - scores.amax(-1, keepdim=True)).clamp(min=-32), next_sums


# -- 2. grouped top-k --------------------------------------------------------------------------------------------------


def select_cells(scores: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """topk_mask of softmax(scores) over the cells of each row."""
    return topk_mask(at_least_fp32(scores).softmax(-1), seen, topk, group)


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

    topk, t = min(topk, 2**31), seen.long().clamp(min=1)  # more keeps everything, and would not fit into 64 bits below
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
    """Which keys the kept cells stand for: bool (B, H, T, width) -> (B, H, T, n_keys). For reading, tests and
    the reference's sparse attention; the kernels never expand a mask."""
    return spread_to_keys(mask, seen, n_keys, False)


# -- 4. sparse attention and output ------------------------------------------------------------------------------------


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seen: Tensor, softmax_scale: float | None = None, *,
                     row: Tensor | None = None, order: Tensor | None = None, block: int = 1024) -> Tensor:
    """softmax(q k^T * softmax_scale) v over the keys under the kept cells: (B, H, T, D). A query with no key gives 0.

    q (B, H, T, D); k, v (B, Hkv, S, D), the valid keys first; mask (B, H, R, width) bool; seen (B, T); row (B, T): the
    row of `mask` that each query uses, its own (R = T) by default; order (B, S): where in k and v the key of each rank
    stands, at its rank by default; softmax_scale D**-0.5 by default. Raises ValueError if shapes do not fit.

    This reference computes all T x S scores, `block` queries at a time (and again in the backward pass, if there are
    several blocks), so its memory is linear in T but its time is not; kernels.py visits the selected keys only. Differs: the
    paper expands the cells to a CSR matrix with one index per key.
    """
    _check_qkv(q, k, v)
    B, H, T, D = q.shape
    _expect(mask.ndim == 4 and mask.shape[:2] == (B, H), "mask", f"shape (B, H, R, width) with B, H = {(B, H)}",
            tuple(mask.shape))
    _expect(mask.dtype == torch.bool, "mask", "bool", mask.dtype)
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(row is not None or mask.shape[2] == T, "mask", f"{T} rows, or `row` to say which is whose", mask.shape[2])
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    if order is not None:
        unseen = (torch.arange(k.shape[2], device=k.device) >= seen.amax(1, keepdim=True))[:, None, :, None]
        k, v = take(k, order), take(v, order).masked_fill(unseen, 0)  # padding may be nan
    k, v = repeat_heads(k, H), repeat_heads(v, H)

    def part(q, k, v, cells, seen):
        with no_autocast(q):
            return attention_weights(q, k, cells, seen, scale).to(v.dtype) @ v

    outs = []
    for i in range(0, T, block):
        at = slice(i, i + block)
        x = q[:, :, at], k, v, mask[:, :, at] if row is None else take(mask, row[:, at]), seen[:, at]
        outs.append(part(*x) if T <= block else checkpoint(part, *x, use_reentrant=False))
    return torch.cat(outs, dim=2)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, seen: Tensor, softmax_scale: float | None = None) -> Tensor:
    """The sparse attention matrix, written out: (B, H, T, S), rows of sum 1, or 0 for a query with no key. Arguments as in
    sparse_attention, mask (B, H, T, width)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    keep = expand_mask(mask, seen, k.shape[2])
    with no_autocast(q):
        scores = (at_least_fp32(q) * scale) @ at_least_fp32(repeat_heads(k, q.shape[1])).mT
        # The finite fill keeps empty rows, and their gradients, free of nan; `* keep` makes them 0.
        return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep


@torch.no_grad()
def attention_csr(q: Tensor, k: Tensor, cells, seen: Tensor, softmax_scale: float | None = None, *, row: Tensor | None = None,
                  block: int = 2**20) -> list[list[Tensor]]:
    """attention_weights as sparse matrices: for each sequence and head a torch CSR tensor (T, S), fp32 at least.

    Arguments as in sparse_attention; cells: SEAOutput.cells, a bool mask or kernels.CellBits. Column j is the key of rank j,
    as in k. Times v it is the sparse context, before the gates. Memory is a few times that of the result,
    12 bytes a number, and `block` products q k at a time: nothing is T x S.
    """
    _check_qkv(q, k, k)
    (B, H, T, D), S = q.shape, k.shape[2]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    found = []
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        mask = cells[b, h] if isinstance(cells, Tensor) else type(cells)(cells.bits[b : b + 1, h : h + 1], cells.width).unpack()[0, 0]
        mask = (mask if row is None else mask[row[b]]) & (seen[b] > 0)[:, None]  # (T, width)
        query, cell = mask.nonzero(as_tuple=True)  # by query, then by cell
        first = first_key_of_cell(cell, seen[b][query], mask.shape[1])
        n = first_key_of_cell(cell + 1, seen[b][query], mask.shape[1]) - first  # keys under each cell
        before = n.cumsum(0) - n
        key = torch.arange(int(n.sum()), device=q.device) + (first - before).repeat_interleave(n)
        query = query.repeat_interleave(n)
        q_head, k_head = at_least_fp32(q[b, h]) * scale, at_least_fp32(k[b, h // (H // k.shape[1])])
        scores = [(q_head[i] * k_head[j]).sum(-1) for i, j in zip(query.split(block), key.split(block))]
        scores = torch.cat(scores) if scores else q_head.new_zeros(0)
        n_key = torch.zeros(T, dtype=torch.long, device=q.device).scatter_add_(0, query, torch.ones_like(query))
        top = torch.segment_reduce(scores, "max", lengths=n_key, unsafe=True, initial=torch.finfo(scores.dtype).min)
        weights = (scores - top[query]).exp()
        weights = weights / torch.segment_reduce(weights, "sum", lengths=n_key, unsafe=True, initial=0)[query]
        found.append(torch.sparse_csr_tensor(F.pad(n_key.cumsum(0), (1, 0)), key, weights, size=(T, S), check_invariants=False))
    return [found[i : i + H] for i in range(0, B * H, H)]


def running_mean(v: Tensor, seen: Tensor, valid: Tensor | None = None, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of v over the keys <= i, the causal `average`: (B, Hkv, T, D), and the running sum after the last (B, Hkv, D)."""
    v = at_least_fp32(v)
    if valid is not None:
        v = v.masked_fill(~valid[:, None, :, None], 0)
    sums = v.cumsum(2) if past is None else v.cumsum(2) + past[:, :, None]
    return sums / seen[:, None, :, None].clamp(min=1), sums[:, :, -1]


def estimated_mean(probs: Tensor, v: Tensor, row_seen: Tensor) -> Tensor:
    """sum_j w_j v_j, the bidirectional `average`: (B, H, 1, D). w: the mean estimated row, given to the keys of each cell.

    probs (B, H, R, width) of rows that see row_seen (B, R) keys, all of them or, in a padded row, none. Differs: the
    authors do not normalise w to sum 1.
    """
    there, v = (row_seen > 0)[:, None, :, None], repeat_heads(v, probs.shape[1]).to(probs.dtype)
    mean = (probs * there).sum(2, keepdim=True)  # the normalisation below makes the sum a mean
    w = spread_to_keys(mean, row_seen.amax(1, keepdim=True), v.shape[2], 0.0)  # (B, H, 1, S)
    w = w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    with no_autocast(v):
        return w @ v


def mix_average(sparse: Tensor, v: Tensor, gates: Tensor, seen: Tensor, row: Tensor, valid: Tensor | None = None,
                past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out = s_mix * s_prob * sparse + (1 - s_mix) * running mean of v, (B, H, T, D), 0 for a query that sees no key.

    gates (B, H, R, 2), s_prob and s_mix before their sigmoid; row (B, T): the row that each query uses; valid, past and the
    second result as in running_mean.
    """
    average, v_sum = running_mean(v, seen, valid, past)
    return mix(sparse, repeat_heads(average, sparse.shape[1]), gates, seen, row), v_sum


def mix(sparse: Tensor, average: Tensor, gates: Tensor, seen: Tensor, row: Tensor) -> Tensor:
    s_prob, s_mix = take(at_least_fp32(gates).sigmoid(), row).split(1, dim=-1)  # (B, H, T, 1)
    out = s_mix * s_prob * sparse + (1 - s_mix) * average
    return (out * (seen > 0)[:, None, :, None]).to(sparse.dtype)


# -- 5. streaming ------------------------------------------------------------------------------------------------------


@dataclass
class SEAState:
    """What a causal layer needs of the past; constant in size but for the KV cache (None where the caller keeps it).

    Numbers a sequence: Hkv*m*(E+1) of sums and Hkv*D of v_sum in fp32, 16*H*ceil(width/4) of conv_rows, H*(width+2) with a
    stride, and Hkv*2*width*D in fp32 with cell_keys. At 12 heads of 64 and width 256, in bf16, 0.23 MB, with cell_keys 1.8.

    Differs: the authors' cached path skips the feature map and keeps every cell for a single new token; with this state any
    split of a sequence into calls gives what one call gives.
    """

    count: Tensor  # (B,) valid tokens so far
    n_tokens: int  # padding included
    sums: Tensor  # (B, Hkv, m, E+1), sum of phi(k)^T [v_cat; 1], E = 2D (D for the Performer)
    v_sum: Tensor | None = None  # (B, Hkv, D)
    conv_rows: tuple[Tensor, Tensor] | None = None  # the last input rows of each convolution, 2 x (B, 2H, 4, width/4)
    last_scores: Tensor | None = None  # (B, H, 1, width), the last estimated row, for the queries that reuse it
    last_gates: Tensor | None = None  # (B, H, 1, 2)
    key_sums: Tensor | None = None  # (B, Hkv, 2*width, D), of add_cell_keys
    k: Tensor | None = None  # (B, Hkv, S, D)
    v: Tensor | None = None
    valid: Tensor | None = None  # (B, S), None: all

    def index_select(self, index: Tensor) -> "SEAState":
        """The state of batch entries `index`: beam search's reordering, batch expansion."""
        def pick(x):
            if isinstance(x, tuple):
                return tuple(map(pick, x))
            return x.index_select(0, index) if isinstance(x, Tensor) else x

        return SEAState(**{name: pick(x) for name, x in vars(self).items()})

    @torch.no_grad()
    def copy_(self, other: "SEAState") -> None:
        """Overwrite this state's tensors with `other`'s, in place: the last thing in a CUDA graph of one decoding step, whose
        replay then goes on from there. States without a KV cache only, since that grows. The SEAOutput that this state came
        with shares some of its tensors."""
        ok = self.k is None and other.k is None
        _expect(ok, "state", "one whose KV cache the caller keeps (kv_cached=True)", "one with its own")
        pairs = {}
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            for x, y in zip(*((x if isinstance(x, tuple) else (x,)) for x in (mine, theirs))):
                if isinstance(x, Tensor):
                    _expect(isinstance(y, Tensor) and x.shape == y.shape, "other", f"{name} of shape {tuple(x.shape)}",
                            tuple(y.shape) if isinstance(y, Tensor) else y)
                    pairs.setdefault(x.dtype, ([], []))[0].append(x)
                    pairs[x.dtype][1].append(y)
        for xs, ys in pairs.values():  # a launch for each dtype, not for each tensor
            torch._foreach_copy_(xs, ys)
        self.n_tokens = other.n_tokens


@dataclass
class SEAOutput:
    """The result of SEAttention and what it was made of. `probs` and `mask` hold a row for each query."""

    out: Tensor  # (B, H, T, D)
    seen: Tensor  # (B, T)
    state: SEAState | None  # None if bidirectional
    scores: Tensor | None = None  # (B, H, R, width), before the softmax over cells; None, as are the next two, if in chunks
    cells: Tensor | None = None  # (B, H, R, width) the kept ones: bool, or kernels.CellBits
    row: Tensor | None = None  # (B, T), the row of `scores` and `cells` that each query uses

    @property
    def probs(self) -> Tensor | None:
        """Estimated attention (B, H, T, width); None for the Performer."""
        return None if self.scores is None else take(at_least_fp32(self.scores).softmax(-1), self.row)

    @property
    def mask(self) -> Tensor | None:
        """Kept cells, bool (B, H, T, width); None for the Performer."""
        if self.cells is None:
            return None
        cells = self.cells if isinstance(self.cells, Tensor) else self.cells.unpack()
        return take(cells, self.row) & (self.seen > 0)[:, None, :, None]


@dataclass
class Rows:
    """Which tokens of a call are estimated, and where each query finds its row. Padding and stride end here: the
    estimator sees dense rows and keys, the valid ones first. None: as they stand."""

    seen: Tensor  # (B, T) keys that each query sees
    row: Tensor  # (B, T) each query's place among the rows, after any row of the past
    row_seen: Tensor  # (B, R), or (B, 1+R) with a row of the past before them
    query: Tensor | None = None  # (B, R) the query that each row belongs to
    n_rows: Tensor | None = None  # (B,) valid rows; bool in a decoding step, whose one token begins a row or does not
    key: Tensor | None = None  # (B, N) the new token at each place, row i seeing the places before (i+1)*stride
    there: Tensor | None = None  # (B, N) whether there is one
    rank: Tensor | None = None  # (B, N) its number among all tokens so far; None: counted from 0


def choose_rows(shape: tuple[int, int], valid: Tensor | None, count: Tensor | None, stride: int, causal: bool,
                device: torch.device, aligned: bool = False) -> Rows:
    """Rows are the tokens of rank 0, stride, 2*stride, ... counted from the start of the sequence, not of the call.

    shape (B, T) of the new tokens, valid (B, T) which of them are no padding (None: all); count (B,) valid tokens before
    them (None: 0). aligned: the caller knows that every count is a multiple of stride.
    """
    B, T = shape
    if T == 1 and count is not None:
        # A decoding step, where each operation costs a launch: no sort, and one row, the new one or the one before.
        seen, begins = count[:, None] + 1, None
        if stride > 1:
            phase = count % stride
            row_seen, begins = seen - phase[:, None], phase == 0
        if valid is not None:
            seen, begins = seen * valid, valid[:, 0] if begins is None else begins & valid[:, 0]
        row_seen = seen if stride == 1 else row_seen
        return Rows(seen, torch.zeros_like(seen), row_seen, n_rows=begins, there=valid, rank=count[:, None])
    if valid is None and (count is None or stride == 1 or aligned):
        i = torch.arange(T, device=device)
        seen = torch.arange(1, T + 1, device=device) if causal else torch.full_like(i, T)
        seen, row = seen if count is None else seen + count[:, None], i if stride == 1 else i // stride
        seen, row_seen = seen.expand(B, T), seen[..., ::stride].contiguous().expand(B, -1)
        return Rows(seen, row.expand(B, T), row_seen, rank=None if count is None else seen - 1)
    valid = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    has_past, count = count is not None, torch.zeros(B, dtype=torch.long, device=device) if count is None else count
    n_new = valid.sum(1)
    rank = valid.cumsum(1) - 1  # (B, T) among the new tokens
    seen = ((count[:, None] + rank + 1) if causal else n_new[:, None]) * valid
    order = valid.int().argsort(dim=1, descending=True, stable=True)  # (B, T), the valid ones first
    offset = -count % stride  # (B,) rank of the first row
    at = offset[:, None] + stride * torch.arange((T - 1) // stride + 1, device=device)  # (B, R)
    row_seen = ((count[:, None] + at + 1) if causal else n_new[:, None]) * (at < n_new[:, None])
    row = (rank - offset[:, None]).div(stride, rounding_mode="floor")
    if has_past and stride > 1:  # the first queries may still use the row before
        row_seen = torch.cat([(count + offset - stride + 1).clamp(min=0)[:, None], row_seen], dim=1)
        row = row + 1
    key = torch.arange(T + stride - 1, device=device) - (stride - 1 - offset)[:, None]
    there, key = (key >= 0) & (key < n_new[:, None]), key.clamp(0, T - 1)
    return Rows(seen, row.clamp(min=0), row_seen, query=order.gather(1, at.clamp(max=T - 1)),
                n_rows=(at < n_new[:, None]).sum(1), key=order.gather(1, key), there=there, rank=count[:, None] + key)


# -- the module --------------------------------------------------------------------------------------------------------


torch_operations = sys.modules[__name__]


def load_kernels():
    """kernels.py beside this file; by its place if Hugging Face's package of the same name was imported before it."""
    try:
        import kernels

        if hasattr(kernels, "select_cells"):
            return kernels
    except ImportError:
        pass
    if "sea_kernels" not in sys.modules:
        spec = importlib.util.spec_from_file_location("sea_kernels", Path(__file__).with_name("kernels.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["sea_kernels"] = module
    return sys.modules["sea_kernels"]


def operations(config: SEAConfig, q: Tensor):
    """The module whose operations run: kernels.py, or this one. An explicit "triton" that cannot run raises."""
    backend, power = config.backend, lambda n: 2 ** (n - 1).bit_length()
    fits = q.is_cuda and q.dtype != torch.float64 and config.query_stride <= 32
    fits = fits and power(config.n_head) * max(32, power(config.width)) <= 32768  # cells that one program can rank
    # sums of the linear attention and of its gradient have to fit into shared memory
    size = max(64, power(config.n_features)) * max(64, power(config.d_head))
    fits = fits and size <= (128 if q.dtype == torch.bfloat16 else 64) ** 2 and config.n_features <= 128
    fits = fits and power(2 * config.d_head) * max(64, power(-(-config.width // 4))) <= 2**16  # the encoder's, too
    fits = fits and (not config.cell_keys or config.width <= 2048)  # cells of a row, in registers
    if backend == "torch" or (backend == "auto" and not fits):
        return torch_operations
    try:
        return load_kernels()
    except (ImportError, FileNotFoundError) as error:
        _expect(backend == "auto", "backend", "kernels.py beside sea.py, and Triton, for 'triton'", error)
        return torch_operations


class CausalCNN(nn.Module):
    """The weights of causal_cnn, and of the norm before it."""

    def __init__(self, n_head: int, width: int):
        super().__init__()
        quarter = max(4, -(-width // 4))
        self.norm = nn.LayerNorm(quarter)
        self.conv1 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.conv2 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.up = nn.Conv2d(2 * n_head, 4 * n_head, 1)
        self.norm_out = nn.LayerNorm(width)


class BidirectionalCNN(nn.Module):
    """Rows (B, 4H, R, width/2) -> scores (B, H, R, width), at half the rows, doubled by nearest.

    Differs: the last convolution gives 2 cells a place, as causal_cnn's does 4.
    """

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
        # Differs: at least 4 numbers a channel, since the CNN's first norm would leave nothing of a single one.
        self.decoder = nn.Linear(2 * D, self.channels * max(4, -(-width // part)))
        self.cnn = (CausalCNN if config.causal else BidirectionalCNN)(H, width)
        self.gate = nn.Linear(2 * D, 2)
        nn.init.zeros_(self.gate.weight)  # gates start open: a student that begins as half an average
        nn.init.constant_(self.gate.bias, 4.0)  # needs hundreds of steps to recover
        if config.causal and config.cell_keys:
            self.key_gain = nn.Parameter(torch.ones(H))

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, in place. The authors do so every 1000 training steps."""
        self.projection.copy_(orthogonal_features(*self.projection.shape, generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, softmax_scale: float | None = None,
                state: SEAState | None = None, topk: int | None = None, kv_cached: bool = False,
                rows_at_once: int | None = None) -> SEAOutput:
        """q (B, H, T, D); k, v (B, Hkv, T, D), or, with kv_cached, (B, Hkv, S, D) with the past keys first.

        valid: bool, as long as k, False where a token is padding (either side, or between); its output is 0.
        softmax_scale: what q k^T is multiplied by, D**-0.5 by default. state: SEAOutput.state of the call before.
        topk: keys per query and head, the config's by default; it may differ from call to call (the paper's dynamic k).
        kv_cached: the caller keeps the KV cache, so the state carries none. For one query it may be a static buffer, longer than
        the tokens so far, where the new token of sequence b stands at place state.count[b] and any finite numbers follow.
        rows_at_once: compute so many queries at a time, each chunk with the state of the one before (causal only). The same
        output and state, less memory: no scores or cells are kept. Raises ValueError for what does not fit.
        """
        config = self.config
        self._check(q, k, v, valid, state, kv_cached, rows_at_once)
        (B, H, T, D), past = q.shape, 0 if state is None else state.n_tokens
        scale = D**-0.5 if softmax_scale is None else softmax_scale
        decoding = kv_cached and T == 1 and state is not None  # leaves the keys where they are, and reads what it selects
        clean = lambda x: x.masked_fill(~valid[:, None, -x.shape[2] :, None], 0)
        if valid is not None and not decoding:  # whatever padding holds, nan included, goes no further
            q, k, v = clean(q), clean(k), clean(v)
        k_new, v_new = k[:, :, -T:], v[:, :, -T:]
        if decoding and valid is not None:
            q, k_new, v_new = clean(q), clean(k_new), clean(v_new)
        elif decoding:  # a buffer may go on, and its sequences may differ in length
            k_new, v_new = take(k, state.count[:, None]), take(v, state.count[:, None])
        if state is not None and not kv_cached:
            if valid is not None or state.valid is not None:
                ones = lambda x: torch.ones(B, x.shape[2], dtype=torch.bool, device=x.device)
                past_valid = ones(state.k) if state.valid is None else state.valid
                valid = torch.cat([past_valid, ones(k) if valid is None else valid], dim=1)
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)
        keys, values, new, order = k, v, None if valid is None else valid[:, -T:], None
        if valid is not None and config.method == "sea":
            order = valid.int().argsort(dim=1, descending=True, stable=True)  # valid keys first
            if not decoding:
                keys, values, order = take(k, order), take(v, order), None

        call = dict(softmax_scale=scale, topk=config.topk if topk is None else topk, order=order)
        if rows_at_once is None or T <= rows_at_once:
            result = self._attend(q, k_new, v_new, keys, values, new, state, **call)
        else:
            # As models want it, (B, T, H, D) in memory. Chunks begin with a row where they can, so that none has to be sought.
            out, seen, aligned = q.new_empty(B, T, H, D).transpose(1, 2), [], state is None and new is None
            size = max(rows_at_once // config.query_stride, 1) * config.query_stride
            for i in range(0, T, size):
                at, end = slice(i, i + size), past + min(i + size, T)
                result = self._attend(q[:, :, at], k_new[:, :, at], v_new[:, :, at], keys[:, :, :end], values[:, :, :end],
                                      None if new is None else new[:, at], state, aligned=aligned, **call)
                out[:, :, at], state = result.out, result.state
                seen.append(result.seen)
                del result  # its scores, before the next chunk makes its own
            result = SEAOutput(out, torch.cat(seen, dim=1), state)
        if result.state is not None:
            result.state.n_tokens = past + T
            if not kv_cached:
                result.state.k, result.state.v, result.state.valid = k, v, valid
        return result

    def _attend(self, q: Tensor, k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, new: Tensor | None,
                state: SEAState | None, *, softmax_scale: float, topk: int, order: Tensor | None,
                aligned: bool = False) -> SEAOutput:
        """New tokens q, k_new, v_new (B, H or Hkv, T, D), new (B, T) which of them are no padding, over all keys k, v
        (B, Hkv, S, D), the valid ones first, or where order says; aligned as in choose_rows."""
        config, (B, _, T, _) = self.config, q.shape
        ops, count = operations(config, q), None if state is None else state.count
        rows = choose_rows((B, T), new, count, config.query_stride, config.causal, q.device, aligned)
        context, scores, gates, next_state = self.estimate_attention(ops, q, k_new, v_new, rows, softmax_scale, state)
        if next_state is not None and count is not None and new is None:
            next_state.count = rows.seen[:, -1]
        elif next_state is not None:
            n_new = torch.full((B,), T, device=q.device) if new is None else new.sum(1)
            next_state.count = n_new if count is None else count + n_new
        if config.method == "performer":
            out = take(context, rows.row) * (rows.seen > 0)[:, None, :, None]
            return SEAOutput(out.to(q.dtype), rows.seen, next_state)

        cells = ops.select_cells(scores, rows.row_seen, topk, config.group)
        sparse = ops.sparse_attention(q, k, v, cells, rows.seen, softmax_scale, row=rows.row, order=order)
        if config.causal:
            past_sum = None if state is None else state.v_sum
            out, next_state.v_sum = ops.mix_average(sparse, v_new, gates, rows.seen, rows.row, new, past_sum)
        else:
            out = mix(sparse, estimated_mean(at_least_fp32(scores).softmax(-1), v, rows.row_seen), gates, rows.seen, rows.row)
        return SEAOutput(out.to(q.dtype), rows.seen, next_state, scores, cells, rows.row)

    def estimate_attention(self, ops, q: Tensor, k: Tensor, v: Tensor, rows: Rows, softmax_scale: float,
                           state: SEAState | None) -> tuple[Tensor, Tensor, Tensor, SEAState | None]:
        """Linear attention -> encoder -> row decoder -> CNN, for the rows of new tokens q, k, v (B, H or Hkv, T, D).

        Returns context (B, H, R, E), scores (B, H, R, width), gates (B, H, R, 2) before their sigmoid, and the state.
        With query_stride > 1 the gates come per estimated row as well, since they need its linear attention.
        """
        config, stride, sea = self.config, self.config.query_stride, self.config.method == "sea"
        if rows.query is None:
            q, v_row, lead = q[:, :, ::stride], v[:, :, ::stride], stride - 1
        else:
            q, v_row, lead = take(q, rows.query), take(v, rows.query), 0
            k, v = take(k, rows.key), take(v, rows.key)
        if not config.causal:
            return *self._estimate_bidirectional(q, k, v, rows, softmax_scale), None

        past = SEAState(None, 0, None) if state is None else state
        position = None
        if sea:
            position = self.position[: v.shape[2]][None] if rows.rank is None else self.position[rows.rank]
        context, sums = (ops if sea else torch_operations).causal_context(
            q, k, v, position, self.projection, softmax_scale, stride=stride, lead=lead, there=rows.there, past=past.sums)
        next_state = SEAState(count=None, n_tokens=0, sums=sums)
        if not sea:
            return context, None, None, next_state
        cnn = self.cnn
        image, gates = ops.encode_rows(context, v_row, self.encoder, self.decoder, cnn.norm, self.gate)
        scores, next_state.conv_rows = ops.causal_cnn(image, cnn.conv1, cnn.conv2, cnn.up, cnn.norm_out, past.conv_rows,
                                                      rows.n_rows)
        if config.cell_keys:
            n_keys = k.shape[2] if state is None else config.max_positions
            scores, next_state.key_sums = ops.add_cell_keys(
                scores, self.key_gain, q, k, rows.row_seen[:, -q.shape[2] :], softmax_scale, n_keys, rank=rows.rank, there=rows.there,
                past=past.key_sums, count=past.count)
        if stride > 1 and rows.n_rows is not None and rows.n_rows.dtype == torch.bool:
            begins = rows.n_rows[:, None, None, None]
            scores, gates = torch.where(begins, scores, state.last_scores), torch.where(begins, gates, state.last_gates)
            next_state.last_scores, next_state.last_gates = scores, gates
        elif stride > 1:
            if state is not None and rows.n_rows is not None:
                scores, gates = torch.cat([state.last_scores, scores], 2), torch.cat([state.last_gates, gates], 2)
            if rows.n_rows is None:
                next_state.last_scores, next_state.last_gates = scores[:, :, -1:].clone(), gates[:, :, -1:].clone()
            else:
                last = (rows.n_rows - int(state is None)).clamp(min=0)[:, None]  # after any row of the past
                next_state.last_scores, next_state.last_gates = take(scores, last), take(gates, last)
        return context, scores, gates, next_state

    def _estimate_bidirectional(self, q, k, v, rows: Rows, softmax_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Context, scores and gates, with every key in the sums."""
        B, H, T, D = q.shape
        n_rows = torch.full((B,), T, device=q.device) if rows.n_rows is None else rows.n_rows
        there = torch.ones(B, T, dtype=torch.bool, device=q.device) if rows.there is None else rows.there
        there = there[:, None, :, None]
        with no_autocast(q):
            q_feat = softmax_features(at_least_fp32(q) * (softmax_scale * D**0.25), self.projection)
            k_feat = softmax_features(at_least_fp32(k) * D**-0.25, self.projection, there) * there
        if self.config.method == "performer":
            return linear_attention(q_feat, k_feat, at_least_fp32(v), causal=False)[0], None, None
        position = interpolated_identity(n_rows, T, D)[:, None]
        v_cat = torch.cat([position.to(k_feat.dtype).expand_as(v), v.to(k_feat.dtype)], dim=-1)
        context, _ = linear_attention(q_feat, k_feat, v_cat, causal=False)
        dtype = v.dtype if torch.is_autocast_enabled(v.device.type) else self.gate.weight.dtype
        z = self.encoder(torch.cat([context, repeat_heads(v, H)], dim=-1).to(dtype))
        image = rearrange(self.decoder(z), "b h t (c p) -> b (h c) t p", c=self.channels)
        return context, self.cnn(image, n_rows), self.gate(z)

    def _check(self, q, k, v, valid, state, kv_cached, rows_at_once) -> None:
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
            past = 0 if state is None else state.n_tokens
            longer = T == 1 and state is not None and valid is None and S > past  # a static buffer
            _expect(S == past + T or longer, "k", f"{past} tokens of the state and {T} of q", S)
        else:
            _expect(S == T, "k", f"the {T} tokens of q (or kv_cached=True)", S)
            _expect(state is None or state.k is not None, "state", "one that carries the KV cache (or kv_cached=True)",
                    "one without")
        _expect(valid is None or (valid.dtype == torch.bool and valid.shape == (B, S)), "valid", f"bool of shape {(B, S)}",
                None if valid is None else f"{valid.dtype} {tuple(valid.shape)}")
        _expect(rows_at_once is None or (isinstance(rows_at_once, int) and rows_at_once >= 1 and config.causal), "rows_at_once",
                "an integer >= 1, and a causal layer, or None", rows_at_once)
        total = S if kv_cached or state is None else S + state.k.shape[2]
        _expect(not config.causal or config.method == "performer" or total <= config.max_positions, "k",
                f"at most max_positions = {config.max_positions} tokens, padding included", total)


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
    with no_autocast(q):
        scores = (at_least_fp32(q) * softmax_scale) @ at_least_fp32(repeat_heads(k, q.shape[1])).mT
    log_probs = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    return log_probs.masked_fill(~visible, 0), visible


@torch.no_grad()
def pool_attention(q: Tensor, k: Tensor, seen: Tensor, width: int, softmax_scale: float | None = None, *,
                   block: int = 256) -> PooledAttention:
    """Teacher attention softmax(q k^T * softmax_scale) pooled to `width` cells, `block` queries at a time.

    q (B, H, T, D), k (B, Hkv, S, D), the valid keys first; seen (B, T). Memory O(T*width + block*S).
    """
    _expect(seen.shape == (q.shape[0], q.shape[2]), "seen", f"shape (B, T) = {(q.shape[0], q.shape[2])}", tuple(seen.shape))
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

    KL is averaged over the queries of all heads, MSE over their n_keys entries each. Differs: padded queries are left out.
    """
    _expect(pooled.cells.shape[-1] == scores.shape[-1], "pooled", f"width {scores.shape[-1]} as scores",
            pooled.cells.shape[-1])
    B, _, T, _ = pooled.cells.shape
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
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

    Several blocks of queries are computed again in the backward pass, so that no T x S tensor is kept. Means as in estimate_loss.
    """
    _expect(seen.shape == (q.shape[0], q.shape[2]), "seen", f"shape (B, T) = {(q.shape[0], q.shape[2])}", tuple(seen.shape))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def part(q, k, teacher_q, teacher_k, seen):
        log_s, visible = dense_scores(q, k, seen, scale)
        with torch.no_grad():
            log_a, _ = dense_scores(teacher_q, teacher_k, seen, scale)
            a = log_a.exp() * visible
        square = ((log_s.exp() - a) * visible).square().sum(-1)
        return ((kl_weight * (a * (log_a - log_s)).sum(-1) + square / k.shape[2]) * (seen > 0)[:, None]).sum()

    total, T = 0.0, q.shape[2]
    for i in range(0, T, block):
        at = slice(i, i + block)
        x = q[:, :, at], k, teacher_q[:, :, at], teacher_k, seen[:, at]
        total = total + (part(*x) if T <= block else checkpoint(part, *x, use_reentrant=False))
    return total / ((seen > 0).sum() * q.shape[1]).clamp(min=1)
