"""SEA on the GPU: the operations of sea.py that cost time, in Triton, forward and backward.

This file has masks as bits, the selection of cells, the choice of bins, sparse attention and the pooled
attention of a teacher, and re-exports the estimator's operations from estimator_kernels.py and attention to
chosen bins from bin_kernels.py. Signatures and results are those of sea.py, whose docstrings say what each
operation computes, and whose glossary what the letters mean; exceptions are noted. To use the kernels
elsewhere, copy the three files: they need only torch and Triton.

Tensors are (B, H, T, D) in fp16, bf16 or fp32, and may be strided. Softmax statistics, norms, sums and
accumulators are fp32 whatever the input is. GROUP is the number of query heads that share one key/value
head, unlike `group`, which says whose cells compete in the top-k.

A mask of cells is packed into one bit per cell (CellBits): 32 bytes per query and head at width 256. No
kernel expands it.

Programs are numbered on the grid's first axis, those of one head side by side: number h * n + i is program
i of the n of head h, of all sequences. The other axes hold at most 65,535, fewer than a batch may have heads.
Offsets are 64-bit where B, H, T or a stride is a factor.

A decoding step, one query per sequence without gradient, is bound by launch overhead and latency. So
most operations have separate kernels for it: few launches, and parts where one program a head would leave a
GPU idle.
"""

import functools
import importlib.metadata
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

if __package__:  # the files were copied into a package
    from .bin_kernels import NONE, bin_attention
    from .estimator_kernels import (DTYPES, LOG2_E, LOWEST, MAX_D_HEAD, MAX_DECODER, MAX_FEATURES, MAX_STRIDE,
                                    MAX_SUMS, MAX_WIDTH_CELL_KEYS, _cdiv, _check_attention, _check_qk,
                                    _check_tensor, _dot_block, _expect, _in_order, _is_step, _load_tile, _new,
                                    _next_power_of_2, _program, _vector, add_cell_keys, causal_cnn,
                                    causal_context, choose_rows, encode_rows, keep_row, mean_of_heads,
                                    mix_average, take_pair)
else:
    from bin_kernels import NONE, bin_attention
    from estimator_kernels import (DTYPES, LOG2_E, LOWEST, MAX_D_HEAD, MAX_DECODER, MAX_FEATURES, MAX_STRIDE,
                                   MAX_SUMS, MAX_WIDTH_CELL_KEYS, _cdiv, _check_attention, _check_qk,
                                   _check_tensor, _dot_block, _expect, _in_order, _is_step, _load_tile, _new,
                                   _next_power_of_2, _program, _vector, add_cell_keys, causal_cnn,
                                   causal_context, choose_rows, encode_rows, keep_row, mean_of_heads,
                                   mix_average, take_pair)

LN_2 = tl.constexpr(math.log(2))

# -- masks of cells, packed --------------------------------------------------------------------------

PACK = dict(BLOCK=128)  # words that a program packs


@dataclass(frozen=True)
class CellBits:
    """A mask of cells, one bit each: cell p is bit p % 32 of word p // 32. Bits from width on are 0.

    Stands for a bool mask (B, H, R, width).
    """

    bits: Tensor  # (B, H, R, ceil(width / 32)) int32
    width: int

    def __post_init__(self):
        words = _cdiv(self.width, 32)
        ok = self.bits.dtype == torch.int32 and self.bits.ndim == 4 and self.bits.shape[-1] == words
        _expect(ok, "bits", f"int32 of shape (B, H, R, {words}) for width {self.width}",
                f"{self.bits.dtype} {tuple(self.bits.shape)}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.bits.shape[:3], self.width)

    def unpack(self) -> Tensor:
        """bool (B, H, R, width)."""
        return unpack_mask(self)


# bits[n, w] = sum of mask[n, 32 w + i] << i.
# One program: BLOCK words, counted over all rows, of (BLOCK, 32) cells; grid (cdiv(N * words, BLOCK),).
#   mask (N, width) int8 contiguous -> bits (N, words) int32
# Reads a byte per cell and writes a bit. Reference: unpack_mask, its inverse.
@triton.jit
def _pack_kernel(mask_ptr, bits_ptr, n_word, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    offs_word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_bit = tl.arange(0, 32)
    mask_word = offs_word < n_word
    # (BLOCK, 32)
    cell = (offs_word % WORDS)[:, None] * 32 + offs_bit[None, :]
    kept = tl.load(mask_ptr + (offs_word // WORDS)[:, None] * WIDTH + cell,
                   mask=mask_word[:, None] & (cell < WIDTH), other=0).to(tl.int32)
    tl.store(bits_ptr + offs_word, tl.sum(kept << offs_bit[None, :], axis=1), mask=mask_word)


def pack_mask(mask: Tensor) -> CellBits:
    """bool (B, H, R, width) -> CellBits."""
    _expect(mask.ndim == 4 and mask.dtype == torch.bool, "mask", "bool of shape (B, H, R, width)",
            f"{mask.dtype} {tuple(mask.shape)}")
    width = mask.shape[-1]
    bits = torch.empty(*mask.shape[:3], _cdiv(width, 32), dtype=torch.int32, device=mask.device)
    _pack_kernel[(_cdiv(bits.numel(), PACK["BLOCK"]),)](
        mask.contiguous().view(torch.int8), bits, n_word=bits.numel(), WIDTH=width, **PACK)
    return CellBits(bits, width)


def unpack_mask(cells: CellBits) -> Tensor:
    """CellBits -> bool (B, H, R, width)."""
    offs_bit = torch.arange(32, device=cells.bits.device, dtype=torch.int32)
    kept = (cells.bits[..., None] >> offs_bit) & 1
    return kept.flatten(-2)[..., : cells.width].bool()


# -- grouped top-k -----------------------------------------------------------------------------------

MAX_RANKED = 32768  # cells that compete, heads and width padded to powers of two: a program's registers


def _select_tiles(n_head: int, width: int) -> dict:
    """For n_head heads whose cells compete: 32 cells per thread, 1,024 per warp, and at most 16 warps."""
    block_h, block_p = _next_power_of_2(n_head), max(32, _next_power_of_2(width))
    num_warps = min(max(block_h * block_p // 1024, 1), 16)
    return dict(BLOCK_H=block_h, BLOCK_P=block_p, num_warps=num_warps)


@triton.jit
def _float_to_order(x):
    """An integer that orders as the float x does: its bits, those of a negative number reversed."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _order_to_float(order):
    """The inverse of _float_to_order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(x, n, count, low, high, GUESS: tl.constexpr, ZEROS: tl.constexpr = 0):
    """A float that the n largest numbers of x reach, and how many reach it: n or, where others equal the n-th
    largest, more.

    low and high are orders of floats: `count` >= n numbers reach low, fewer than n reach high. Stops
    early at a float that exactly n reach. GUESS: takes the logarithm of the count for linear between low and
    high, as it nearly is in the tail of what queries and keys give: half as many steps; every third bisects,
    so that none takes long. Where cells are ranked it does not pay.
    ZEROS: so many last bits of the numbers are 0, as of half precision, and of low and high: fewer steps.
    """
    step, log_n = n * 0, tl.log2(n.to(tl.float32))
    above, below = log_n + 1, tl.log2(count.to(tl.float32)) - log_n  # logarithms to go; for no number, of 1/2
    while (count != n) & (low + 2**ZEROS < high):
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down; low + high might overflow
        if GUESS:
            x_low, x_high = _order_to_float(low), _order_to_float(high)
            guess = _float_to_order(x_low + (x_high - x_low) * (below / (above + below)))
            guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)  # whatever infinities make of it
            middle, step = tl.where(step == 2, middle, guess), tl.where(step == 2, 0, step + 1)
        middle &= -(2**ZEROS)
        mask_reached = x >= _order_to_float(middle)
        reached = tl.sum(tl.where(mask_reached, 1.0, 0.0), axis=0).to(tl.int32)  # faster than of integers
        enough = reached >= n
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
        if GUESS:
            to_go = tl.log2(tl.maximum(reached.to(tl.float32), 0.5)) - log_n
            above, below = tl.where(enough, above, -to_go), tl.where(enough, to_go, below)
    low |= (low >> 31) & (2**ZEROS - 1)  # the zeros of a negative number are ones in its order
    return _order_to_float(low), count


@triton.jit
def _keep_best(x, n, count, low, high, ZEROS: tl.constexpr = 0):
    """Which of the numbers x are the n largest, ties to the lower index; arguments as in _bisect."""
    threshold, count = _bisect(x, n, count, low, high, GUESS=False, ZEROS=ZEROS)
    mask_kept = x >= threshold
    if count != n:  # more numbers than wanted equal the n-th largest
        mask_tie = x == threshold
        n_tie = n - tl.sum((x > threshold).to(tl.int32), axis=0)
        mask_kept = (x > threshold) | (mask_tie & (tl.cumsum(mask_tie.to(tl.int32), axis=0) <= n_tie))
    return mask_kept


# x (B, H, R, width), any strides: probabilities, or scores if SOFTMAX; seen (B, R) int
#   -> bits (B, H, R, words) int32:
# the n = round(HEADS * topk * width / seen) largest of the HEADS x width cells of one query; of equal cells
# those of lower index. budget = 2 * HEADS * topk * width.
# One program: the cells that compete, all in registers; grid (R * B * H / HEADS,).
# Floats order as their bits do, read as integers, so bisection over integers finds the n-th largest:
# exact, without a sort. SOFTMAX ranks log-probabilities, which bisection finds in fewer steps.
# Reads x once and writes a bit per cell, where eager writes the softmax, sorts it and keeps an int64
# index per cell. Limits: MAX_RANKED. Reference: sea.topk_mask, bit for bit given the same
# probabilities; SOFTMAX works in fp32 and may swap cells that are closer than its rounding.
@triton.jit
def _select_kernel(x_ptr, seen_ptr, bits_ptr, x_strides, H, R, budget, HEADS: tl.constexpr,
                   WIDTH: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    pid_r, pid_group = tl.program_id(0) % R, tl.program_id(0) // R
    b, h = (pid_group * HEADS // H).to(tl.int64), pid_group * HEADS % H  # divided in 32 bits
    offs_h, offs_p = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    mask_hp = (offs_h < HEADS)[:, None] & (offs_p < WIDTH)[None, :]
    # (BLOCK_H, BLOCK_P)
    x_ptr += (b * x_strides[0] + (h + offs_h)[:, None].to(tl.int64) * x_strides[1]
              + pid_r.to(tl.int64) * x_strides[2])
    x_ptr += offs_p[None, :].to(tl.int64) * x_strides[3]
    x = tl.load(x_ptr, mask=mask_hp, other=-float("inf")).to(tl.float32)

    # -- log-softmax of each head
    top = tl.maximum(tl.max(x, axis=1), LOWEST)
    if SOFTMAX:
        sum_exp = tl.sum(tl.exp2((x - top[:, None]) * LOG2_E), axis=1)
        lse = top + tl.log(tl.maximum(sum_exp, 1.0))
        x, top = x - lse[:, None], top - lse

    # -- the n-th largest lies between the smallest and the largest of all cells
    largest = tl.max(tl.where(offs_h < HEADS, top, -float("inf")), axis=0)
    smallest = tl.min(tl.min(tl.where(mask_hp, x, float("inf")), axis=1), axis=0)
    high = _float_to_order(largest) + 1
    low = tl.minimum(_float_to_order(smallest), high - 1)  # only NaN makes the minimum matter
    x = tl.where(mask_hp, x, float("nan"))  # NaN reaches nothing
    x = tl.reshape(x, (BLOCK_H * BLOCK_P,))
    seen = tl.load(seen_ptr + b * R + pid_r).to(tl.int64)
    t = tl.maximum(seen, 1)
    n = tl.minimum(tl.maximum((budget + t) // (2 * t), 1), HEADS * WIDTH).to(tl.int32)
    mask_kept = _keep_best(x, n, n * 0 + HEADS * WIDTH, low, high)

    # -- pack, (BLOCK_H * BLOCK_P / 32, 32) cells
    kept = tl.reshape((mask_kept & (seen > 0)).to(tl.int32), (BLOCK_H * BLOCK_P // 32, 32))
    bits = tl.sum(kept << tl.arange(0, 32)[None, :], axis=1)
    offs_word = tl.arange(0, BLOCK_H * BLOCK_P // 32)
    h_word, offs_word = offs_word // (BLOCK_P // 32), offs_word % (BLOCK_P // 32)
    bits_ptr += ((b * H + h + h_word) * R + pid_r) * WORDS + offs_word
    tl.store(bits_ptr, bits, mask=(h_word < HEADS) & (offs_word < WORDS))


def _select_by_sorting(x: Tensor, seen: Tensor, topk: int, group: str, softmax: bool) -> CellBits:
    """The groups in which all queries compete. They are bidirectional, so T is moderate: not worth a
    kernel, and T x width competing cells would not fit into one program."""
    _, H, _, width = x.shape
    mask_seen = (seen > 0)[:, None, :, None]
    probs = x.float().softmax(-1) if softmax else x
    ranked = probs.masked_fill(~mask_seen, -1).flatten(2 if group == "head" else 1)
    n = topk * width * (H if group == "batch" else 1)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True)
    return pack_mask(kept.view(x.shape) & mask_seen)


def _select(x: Tensor, seen: Tensor, topk: int, group: str, softmax: bool) -> CellBits:
    """topk_mask, packed. With `softmax`, x holds scores, which become probabilities on the way."""
    _check_tensor("probs", x, 4, "(B, H, T, width)")
    B, H, R, width = x.shape
    _expect(seen.shape == (B, R), "seen", f"shape (B, T) = {(B, R)}", tuple(seen.shape))
    _expect(isinstance(topk, int) and topk >= 1, "topk", "an integer >= 1", topk)
    groups = ("causal_batch", "query", "head", "batch")
    _expect(group in groups, "group", f"one of {groups}", repr(group))
    x, topk = x.detach(), min(topk, 2**31)  # a larger topk keeps everything, and would overflow 64 bits
    if group in ("head", "batch"):
        return _select_by_sorting(x, seen, topk, group, softmax)
    heads = H if group == "causal_batch" else 1
    tiles = _select_tiles(heads, width)
    n_ranked = tiles["BLOCK_H"] * tiles["BLOCK_P"]
    _expect(n_ranked <= MAX_RANKED, "probs",
            f"at most {MAX_RANKED} cells that compete, heads and width padded to powers of two", n_ranked)
    bits = torch.empty(B, H, R, _cdiv(width, 32), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _select_kernel[(R * B * H // heads,)](
            x, seen.contiguous(), bits, x_strides=x.stride(), H=H, R=R, budget=2 * heads * topk * width,
            HEADS=heads, WIDTH=width, SOFTMAX=softmax, **tiles)
    return CellBits(bits, width)


def select_cells(scores: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> CellBits:
    """sea.select_cells, packed: topk_mask of softmax(scores)."""
    return _select(scores, seen, topk, group, softmax=True)


def topk_mask(probs: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """sea.topk_mask, bit for bit, ties included. select_cells gives bits, as sparse_attention takes them."""
    return unpack_mask(_select(probs, seen, topk, group, softmax=False))


# -- candidates and bins -----------------------------------------------------------------------------
#
# Three kernels, behind one that computes what stands for each bin. The first finds each row's best cells and
# lists their bins, the candidates. The second multiplies the queries of a row (in group "kv" means over heads)
# with what stands for the candidates' keys, so that they share what is read. The third ranks each
# query's products, and lists the first bins, the chosen ones and the last. Candidates and products are
# scratch: the kernels run on as many queries at a time as have at most 2^25 products, 128 MiB, or on 16.
#
# A list of candidates begins with HEAD numbers: how many there are, what they are the candidates of, and whether
# this call has found them. So a decoding step whose query is no row takes those that the last row has left, and,
# if that is less to read than their keys, what stands for these, which is kept behind the list.

BIN_GROUPS = ("query", "kv")
HEAD = tl.constexpr(16)  # numbers, 64 bytes: what follows is aligned
MAX_CANDIDATES = 16384  # of a row, padded to a power of two: a program's registers
BOXES = dict(BLOCK_N=32, num_warps=4)
PRODUCTS = dict(BLOCK_N=128, num_warps=4)
PRODUCTS_STEP = dict(BLOCK_N=64, num_warps=4)  # of a decoding step, which reads keys
# scratch: products at a time, but of so many queries at least; what a warp ranks
CHOOSE = dict(scratch=2**25, queries=16, cells_per_warp=1024, candidates_per_warp=2048)
ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # the last of a number in fp32


def _rank_warps(n: int, per_warp: int, is_step: bool) -> int:
    """Warps that rank n numbers; more in a decoding step, which leaves most of a GPU idle."""
    return min(max(n // per_warp, 4 if is_step else 1), 16)


def _candidates(config, topk: int, width: int, n_key: int) -> tuple[int, int]:
    """How many candidates a row asks for, and the most that it gets, of n_key keys: a single cell may hold
    more than it asks for."""
    n_bin = _cdiv(n_key, config.bin)
    n_wanted = min(config.candidates * config.n_chosen(topk), n_bin)
    return n_wanted, max(n_wanted, _cdiv(n_bin, width))


@triton.jit
def _boxes(k_ptr, k_strides, order_ptr, bins, mask_bin, n_key, offs_d, D: tl.constexpr, BIN: tl.constexpr):
    """The two halves of sea.boxes of bins (int64) of one head, (bins, BLOCK_D) fp32 each. order_ptr: the
    place of the key of each rank, or None. The order of the sum is fixed."""
    total = tl.zeros((bins.shape[0], offs_d.shape[0]), tl.float32)
    highest, lowest = total - float("inf"), total + float("inf")
    AT_ONCE: tl.constexpr = BIN if BIN < 8 else 8  # loads that do not wait for each other  # noqa: FURB136
    for start in range(0, BIN, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            j, is_key = bins * BIN + start + i, start + i < BIN
            mask_j = mask_bin & (j < n_key) & is_key
            place = j if order_ptr is None else tl.load(order_ptr + j, mask=mask_j, other=0).to(tl.int64)
            key = _load_tile(k_ptr, place, offs_d, k_strides[2], k_strides[3],
                             mask_j[:, None] & (offs_d < D)[None, :]).to(tl.float32)
            total += key
            highest = tl.where(is_key, tl.maximum(highest, key), highest)
            lowest = tl.where(is_key, tl.minimum(lowest, key), lowest)
    return total / (2 * BIN) + (highest + lowest) / 4, (highest - lowest) / 4


# out = what stands for every BIN keys: the two halves of sea.boxes.
# One program: BLOCK_N bins of one key/value head; grid (cdiv(n_bin, BLOCK_N) * B * Hkv,).
#   k (B, Hkv, S, D), any strides; order (B, S) int or None: the place of the key of each rank
#   out (B, Hkv, n_bin, 2, D) in the dtype of k, contiguous
# fp32: sums. Reads each key once. The last bin may not be whole: no row has such a bin in its cells.
# Reference: sea.boxes.
@triton.jit
def _boxes_kernel(k_ptr, order_ptr, out_ptr, k_strides, HKV, n_key, n_bin, D: tl.constexpr,
                  BIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_n, pid_bkv = _program(tl.cdiv(n_bin, BLOCK_N))
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    bins, offs_d = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask_n = bins < n_bin
    order_ptr = None if order_ptr is None else order_ptr + b * n_key
    centre, radius = _boxes(k_ptr + b * k_strides[0] + kv * k_strides[1], k_strides, order_ptr, bins, mask_n,
                            n_key, offs_d, D=D, BIN=BIN)
    out_ptr += (pid_bkv * n_bin + bins[:, None]) * 2 * D + offs_d[None, :]
    mask_nd = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr, centre.to(out_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(out_ptr + D, radius.to(out_ptr.dtype.element_ty), mask=mask_nd)


@triton.jit
def _keep_best_where(x, mask, n, ZEROS: tl.constexpr):
    """Which of the numbers x where mask are the n largest, or all, ties to the lower index. ZEROS: as in
    _bisect."""
    count = tl.sum(mask.to(tl.int32), axis=0)
    high = _float_to_order(tl.max(tl.where(mask, x, -float("inf")), axis=0))
    low = tl.minimum(_float_to_order(tl.min(tl.where(mask, x, float("inf")), axis=0)), high)
    low, high = low & -(2**ZEROS), (high & -(2**ZEROS)) + 2**ZEROS
    x = tl.where(mask, x, float("nan"))  # NaN reaches nothing
    return _keep_best(x, tl.minimum(n, count), count, low, high, ZEROS=ZEROS)


@triton.jit
def _softmax(x):
    """Of one row; 0 where x is -inf."""
    x = tl.exp2((x - tl.maximum(tl.max(x, axis=0), LOWEST)) * LOG2_E)
    return x / tl.maximum(tl.sum(x, axis=0), 1.0)


@triton.jit
def _row_of_chunk(row_ptr, b, pid_r, T, begin_t, end_t):
    """Number of row pid_r of those that queries begin_t ... end_t - 1 use, and whether there are so many."""
    r = tl.load(row_ptr + b * T + begin_t) + pid_r
    return r, r <= tl.load(row_ptr + b * T + end_t - 1)


@triton.jit
def _end_of_first_row(row_ptr, b, T, STRIDE: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many queries use row 0, unless it is the only row."""
    offs_s = tl.arange(0, BLOCK_S)
    row = tl.load(row_ptr + b * T + offs_s, mask=(offs_s < STRIDE) & (offs_s < T), other=1)
    return tl.sum((row == 0).to(tl.int32), axis=0)


@triton.jit
def _is_listed(list_ptr, row_seen, local, n_first, n_wanted, BIN: tl.constexpr, DTYPE: tl.constexpr):
    """Whether a list of candidates is already that of a row that sees row_seen keys, by these options, with what is
    kept behind it in this dtype, a number for each."""
    return ((tl.load(list_ptr + 1) == row_seen) & (tl.load(list_ptr + 2) == local)
            & (tl.load(list_ptr + 3) == n_first) & (tl.load(list_ptr + 4) == n_wanted)
            & (tl.load(list_ptr + 5) == BIN) & (tl.load(list_ptr + 6) == DTYPE))


@triton.jit
def _store_head(list_ptr, n_candidate, row_seen, local, n_first, n_wanted, BIN: tl.constexpr, DTYPE: tl.constexpr):
    """What _is_listed looks at, behind the number of candidates, and that they are new."""
    tl.store(list_ptr, n_candidate)
    tl.store(list_ptr + 1, row_seen)
    tl.store(list_ptr + 2, local)
    tl.store(list_ptr + 3, n_first)
    tl.store(list_ptr + 4, n_wanted)
    tl.store(list_ptr + 5, BIN)
    tl.store(list_ptr + 6, DTYPE)
    tl.store(list_ptr + 7, 1)


@triton.jit
def _kept_boxes(k_ptr, k_strides, order_ptr, bins, mask_bin, n_key, offs_d, kept_ptr, is_new, D: tl.constexpr,
                BIN: tl.constexpr):
    """_boxes in the dtype of k, kept for a list of candidates: at kept_ptr, (bins, BLOCK_D), and D further. They
    are written there if the list is new, and else read."""
    mask = mask_bin[:, None] & (offs_d < D)[None, :]
    if is_new:
        centre, radius = _boxes(k_ptr, k_strides, order_ptr, bins, mask_bin, n_key, offs_d, D=D, BIN=BIN)
        centre, radius = centre.to(k_ptr.dtype.element_ty), radius.to(k_ptr.dtype.element_ty)
        tl.store(kept_ptr, centre, mask=mask)
        tl.store(kept_ptr + D, radius, mask=mask)
    else:
        centre, radius = tl.load(kept_ptr, mask=mask, other=0.0), tl.load(kept_ptr + D, mask=mask, other=0.0)
    return centre, radius


# The bins of each row's best cells, ascending, without those of the first keys. n_key: keys, of which no row
# sees more.
# One program: one row and chooser; grid (n_row * B * C,), which may be more rows than queries begin_t ...
# end_t - 1 use.
#   x (B, E, R, WIDTH), any strides; row_seen (B, R), row (B, T) int; E is a divisor or a multiple of C
#   lists (B, C, n_row, list_size) int32: HEAD numbers, then BLOCK_C at most; KEPT: they may be there already
# Where a chooser has one estimate, ONE, its scores are ranked, whose last ZEROS bits are 0; else fp32
# probabilities. Reads a row's scores once. Limits: MAX_WIDTH. Reference: sea.candidate_cells.
@triton.jit
def _candidates_kernel(x_ptr, row_ptr, row_seen_ptr, lists_ptr, x_strides, C, E, T, R, n_key, begin_t, end_t,
                       n_row, list_size, local, n_first, n_wanted, KEPT: tl.constexpr, DTYPE: tl.constexpr,
                       ONE: tl.constexpr, ZEROS: tl.constexpr, WIDTH: tl.constexpr, BIN: tl.constexpr,
                       BLOCK_P: tl.constexpr):
    pid_r, pid_bc = _program(n_row)
    b, c = pid_bc // C, pid_bc % C
    r, is_row = _row_of_chunk(row_ptr, b, pid_r, T, begin_t, end_t)
    if not is_row:
        return
    row_seen = tl.minimum(tl.load(row_seen_ptr + b * R + r), n_key).to(tl.int32)
    lists_ptr += (pid_bc * n_row + pid_r) * list_size
    if KEPT:
        if _is_listed(lists_ptr, row_seen, local, n_first, n_wanted, BIN, DTYPE):
            tl.store(lists_ptr + 7, 0)  # not new
            return
        tl.debug_barrier()  # all have read before any writes
    middle = tl.maximum(row_seen - local, 0) // BIN  # bins in cells
    offs_p = tl.arange(0, BLOCK_P)
    begin, end = _first_key(offs_p, middle, WIDTH), _first_key(offs_p + 1, middle, WIDTH)
    mask_p = (begin < end) & (offs_p < WIDTH)  # cells without bins do not compete

    # -- the best cells, (BLOCK_P,)
    x_ptr += b * x_strides[0] + r.to(tl.int64) * x_strides[2] + offs_p.to(tl.int64) * x_strides[3]
    if ONE:  # not masked by mask_p, lest it wait for row_seen
        x = tl.load(x_ptr + c * E // C * x_strides[1], mask=offs_p < WIDTH, other=0.0).to(tl.float32)
    else:
        x = tl.zeros((BLOCK_P,), tl.float32)
        for i in range(c * E // C, (c + 1) * E // C):
            of_head = tl.load(x_ptr + i * x_strides[1], mask=mask_p, other=-float("inf"))
            x += _softmax(of_head.to(tl.float32))
    n_cell = tl.maximum(n_wanted // tl.maximum(tl.cdiv(middle, WIDTH), 1), 1)
    n_cell = tl.where(middle <= n_wanted, WIDTH, n_cell)
    mask_kept = _keep_best_where(x, mask_p, n_cell, ZEROS)

    # -- list their bins
    begin = tl.maximum(begin, n_first)
    n_of_cell = tl.where(mask_kept, tl.maximum(end - begin, 0), 0)
    slot = tl.cumsum(n_of_cell, axis=0) - n_of_cell
    for i in range(0, tl.cdiv(middle, WIDTH)):
        tl.store(lists_ptr + HEAD + slot + i, begin + i, mask=i < n_of_cell)
    _store_head(lists_ptr, tl.sum(n_of_cell, axis=0), row_seen, local, n_first, n_wanted, BIN, DTYPE)


# products = softmax_scale * [q ; |q|] . (what stands for each candidate) of queries begin_t ... end_t - 1.
# One program: BLOCK_N candidates of one row and chooser, and the queries that use it; grid
# (cdiv(BLOCK_C, BLOCK_N) * n_row * B * C,).
#   q (B, C, T, D), any strides; row (B, T) int, as choose_bins says
#   k (B, Hkv, S, D), any strides, and order (B, S) int or None; or, FROM_BINS, what stands for their bins,
#   (B, Hkv, n_bin, 2, D) contiguous; n_key: keys or, FROM_BINS, bins. Else there is one query
#   kept (B, C, kept_size) or None: what stands for a list's bins, as _kept_boxes says
#   products (B, C, end_t - begin_t, BLOCK_C) fp32, NaN where there is no candidate up to a whole block
# Operands of the dots have the dtype of k. Reads two numbers a dimension for each candidate (in a decoding
# step that does not find them kept: its keys), once for all queries of its row, so that rows times bins is
# neither computed nor written. Reference: sea.choose_bins, whose products round differently; it ranks their
# log-softmax, which orders those of one query as they are.
@triton.jit
def _products_kernel(q_ptr, k_ptr, order_ptr, row_ptr, lists_ptr, kept_ptr, products_ptr, q_strides, k_strides, C,
                     HKV, T, R, begin_t, end_t, n_row, list_size, kept_size, n_key, softmax_scale,
                     STRIDE: tl.constexpr, D: tl.constexpr, BIN: tl.constexpr, FROM_BINS: tl.constexpr,
                     BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    pid_n, pid_rbc = _program(tl.cdiv(BLOCK_C, BLOCK_N))
    pid_r, pid_bc = pid_rbc % n_row, pid_rbc // n_row
    b, c = pid_bc // C, pid_bc % C
    kv, offs_c = c * HKV // C, pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # loads that do not wait for each other, though the first ones may say that the last is for nothing
    r, is_row = _row_of_chunk(row_ptr, b, pid_r, T, begin_t, end_t)
    lists_ptr += pid_rbc * list_size
    n_candidate, bins, is_new = tl.load(lists_ptr), tl.load(lists_ptr + HEAD + offs_c), tl.load(lists_ptr + 7) != 0
    if not is_row:
        return
    if pid_n * BLOCK_N >= n_candidate:
        return
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_c, mask_d = offs_c < n_candidate, offs_d < D
    bins = tl.where(mask_c, bins, 0).to(tl.int64)
    # (BLOCK_N, BLOCK_D)
    if FROM_BINS:
        k_ptr += ((b * HKV + kv) * n_key + bins)[:, None] * 2 * D + offs_d[None, :]
        mask_cd = mask_c[:, None] & mask_d[None, :]
        centre, radius = tl.load(k_ptr, mask=mask_cd, other=0.0), tl.load(k_ptr + D, mask=mask_cd, other=0.0)
    else:
        order_ptr = None if order_ptr is None else order_ptr + b * n_key
        k_ptr += b * k_strides[0] + kv * k_strides[1]
        if kept_ptr is None:
            centre, radius = _boxes(k_ptr, k_strides, order_ptr, bins, mask_c, n_key, offs_d, D=D, BIN=BIN)
            centre, radius = centre.to(k_ptr.dtype.element_ty), radius.to(k_ptr.dtype.element_ty)
        else:
            kept_ptr += pid_bc * kept_size + offs_c[:, None] * 2 * D + offs_d[None, :]
            centre, radius = _kept_boxes(k_ptr, k_strides, order_ptr, bins, mask_c, n_key, offs_d, kept_ptr, is_new,
                                         D=D, BIN=BIN)
    first_q, end_q = begin_t, end_t
    if FROM_BINS:
        first_row_end = _end_of_first_row(row_ptr, b, T, STRIDE, BLOCK_S)
        first_q = tl.where(r == 0, begin_t, tl.maximum(first_row_end + (r - 1) * STRIDE, begin_t))
        end_q = tl.where(r == R - 1, end_t, tl.minimum(first_row_end + r * STRIDE, end_t))
    for start_q in range(first_q, end_q, BLOCK_M):
        query = start_q + offs_m
        mask_m = query < end_q
        q = _load_tile(q_ptr + b * q_strides[0] + c * q_strides[1], query.to(tl.int64), offs_d, q_strides[2],
                       q_strides[3], mask_m[:, None] & mask_d[None, :])
        s = tl.dot(q, tl.trans(centre), input_precision="ieee")
        s = (s + tl.dot(tl.abs(q), tl.trans(radius), input_precision="ieee")) * softmax_scale
        s = tl.where(mask_c[None, :], s, float("nan"))
        offs_q = pid_bc * (end_t - begin_t) + query - begin_t
        tl.store(products_ptr + offs_q[:, None] * BLOCK_C + offs_c[None, :], s, mask=mask_m[:, None])


# The bins that each query attends to: those of the first keys, n_chosen of its row's candidates, and those
# behind the row's cells, ascending.
# One program: one query and chooser; grid ((end_t - begin_t) * B * C,).
#   products, in blocks of BLOCK, lists, row, row_seen as above; seen (B, T) int
#   bins (B, C, T, n_listed) int32
# All products of a query are in registers until the n_chosen-th largest is found, and are then read again a
# block at a time, so that a program needs few more. Few warps: in a warp a sum needs no shared memory.
# Limits: MAX_CANDIDATES. Reference: sea.choose_bins.
@triton.jit
def _choose_bins_kernel(products_ptr, lists_ptr, row_ptr, row_seen_ptr, seen_ptr, bins_ptr, C, T, R, n_key,
                        begin_t, end_t, n_row, list_size, local, n_first, n_chosen, n_listed,
                        BIN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    pid_q, pid_bc = _program(end_t - begin_t)
    b, i = pid_bc // C, begin_t + pid_q
    r = tl.load(row_ptr + b * T + i)
    seen = tl.minimum(tl.load(seen_ptr + b * T + i), n_key).to(tl.int32)
    row_seen = tl.minimum(tl.load(row_seen_ptr + b * R + r), n_key).to(tl.int32)
    lists_ptr += (pid_bc * n_row + r - tl.load(row_ptr + b * T + begin_t)) * list_size
    n_candidate = tl.load(lists_ptr)
    products_ptr += (pid_bc * (end_t - begin_t) + pid_q) * BLOCK_C
    bins_ptr += (pid_bc * T + i) * n_listed

    # -- the n-th largest product, (BLOCK_C,)
    offs_c, n_slot = tl.arange(0, BLOCK_C), tl.cdiv(n_candidate, BLOCK) * BLOCK
    products = tl.load(products_ptr + offs_c, mask=offs_c < n_slot, other=float("nan"))  # it reaches nothing
    n = tl.where(seen > 0, tl.minimum(n_chosen, n_candidate), 0)
    high = _float_to_order(tl.max(products, axis=0)) + 1
    low = tl.minimum(_float_to_order(tl.min(products, axis=0)), high - 1)
    threshold, n_reach = _bisect(products, tl.maximum(n, 1), tl.maximum(n_candidate, 1), low, high,
                                 GUESS=True)
    n_tie = n
    if n_reach != n:  # more numbers than wanted equal the n-th largest
        n_tie -= tl.sum((products > threshold).to(tl.int32), axis=0)

    # -- those that reach it, ties to the lower, (BLOCK_N,) at a time
    n_seen, offs_n = tl.cdiv(seen, BIN), tl.arange(0, BLOCK_N)
    first_end = tl.minimum(n_seen, n_first)
    chosen_end = first_end
    for start in range(0, tl.where(n > 0, n_candidate, 0), BLOCK_N):
        mask_n = start + offs_n < n_slot
        s = tl.load(products_ptr + start + offs_n, mask=mask_n, other=float("nan"))
        candidate = tl.load(lists_ptr + HEAD + start + offs_n, mask=mask_n, other=0)
        mask_chosen = s >= threshold
        if n_reach != n:
            mask_tie = (s == threshold).to(tl.int32)
            mask_chosen = (s > threshold) | (mask_tie != 0) & (tl.cumsum(mask_tie, axis=0) <= n_tie)
            n_tie -= tl.sum(mask_tie, axis=0)
        place = chosen_end + tl.cumsum(mask_chosen.to(tl.int32), axis=0) - 1
        tl.store(bins_ptr + place, candidate, mask=mask_chosen)
        chosen_end += tl.sum(mask_chosen.to(tl.int32), axis=0)

    # -- the first and the last
    last_begin = tl.maximum(tl.maximum(row_seen - local, 0) // BIN, n_first)
    last_end = chosen_end + tl.maximum(n_seen - last_begin, 0)
    for start in range(0, n_listed, BLOCK_N):
        offs = start + offs_n
        number = tl.where(offs < last_end, last_begin + offs - chosen_end, NONE)
        tl.store(bins_ptr + offs, tl.where(offs < first_end, offs, number),
                 mask=(offs < n_listed) & ((offs < first_end) | (offs >= chosen_end)))


def _room(n_candidate: int) -> int:
    """Candidates that a list has room for."""
    return max(PRODUCTS["BLOCK_N"], _next_power_of_2(n_candidate))


def _size_kept(k: Tensor, bin: int) -> int:
    """Of a candidate, in 32 bits: its number and, in the dtype of k, two a dimension, unless its keys are no more."""
    return 1 + (2 * k.shape[3] * k.element_size() // 4 if bin > 2 else 0)


def no_candidates(config, k: Tensor, topk: int) -> Tensor | None:
    """sea.no_candidates: HEAD numbers, then all candidates' numbers, then what stands for their keys."""
    n_candidate = min(_candidates(config, topk, config.width, k.shape[2])[1], MAX_CANDIDATES)
    n = HEAD.value + _room(n_candidate) * _size_kept(k, config.bin)
    return torch.full((len(k), config.n_choosers, 1, n), -1, dtype=torch.int32, device=k.device)


@torch.no_grad()
def choose_bins(scores: Tensor, q: Tensor, k: Tensor, seen: Tensor, row: Tensor, row_seen: Tensor, topk: int,
                config, softmax_scale: float, *, order: Tensor | None = None,
                kept: Tensor | None = None) -> Tensor:
    """sea.choose_bins. row as of sea.choose_rows: query_stride queries have a row, but row 0 may have fewer
    or none, and the last any number. Scratch is sized by this: other rows are out of bounds.

    kept: of no_candidates at first. A step of one query a sequence leaves its row's candidates there, with what
    stands for their keys, and the next ones find them; rows of one sequence that see as many keys, and these keys,
    have to be the same."""
    _check_tensor("scores", scores, 4, "(B, E, R, width)")
    _check_tensor("q", q, 4, "(B, C, T, D)")
    _check_tensor("k", k, 4, "(B, Hkv, S, D)")
    (B, C, T, D), (Hkv, S), (E, R, width), bin = q.shape, k.shape[1:3], scores.shape[1:], config.bin
    _expect(C == config.n_choosers, "q", f"{config.n_choosers} choosers, (B, C, T, D)", tuple(q.shape))
    _expect(len(scores) == B and E in (config.n_head, Hkv), "scores",
            f"shape (B, E, R, width) with B = {B} and E = {config.n_head} or {Hkv}", tuple(scores.shape))
    _expect(k.dtype == q.dtype, "k", f"dtype {q.dtype} as q", k.dtype)
    _check_qk(q, k, seen)
    _expect(T >= 1, "q", "at least one token", tuple(q.shape))
    _expect(width <= MAX_WIDTH, "scores", f"a width of at most {MAX_WIDTH}", width)
    for name, x, n in (("row", row, T), ("row_seen", row_seen, R)):
        _expect(x.shape == (B, n), name, f"shape {(B, n)}", tuple(x.shape))
    _expect(config.group in BIN_GROUPS, "group", f"one of {BIN_GROUPS}", repr(config.group))
    n_chosen, n_listed, n_bin = config.n_chosen(topk), config.n_listed(topk, S), _cdiv(S, bin)
    n_wanted, n_candidate = _candidates(config, topk, width, S)
    _expect(n_candidate <= MAX_CANDIDATES, "topk", f"one of at most {MAX_CANDIDATES} candidates, "
            f"{config.candidates} for each bin that it chooses", f"{topk}, of {n_candidate}")
    is_step, block_p = T == 1, max(32, _next_power_of_2(width))
    block_c = _room(n_candidate)
    n_query = min(T, max(CHOOSE["scratch"] // max(B * C * block_c, 1), CHOOSE["queries"]))  # at a time
    n_row = 1 if is_step else min(R, (n_query - 1) // config.query_stride + 2)  # that they use, at most
    is_kept = is_step and kept is not None and kept.shape[:3] == (B, C, 1)
    size_kept = _size_kept(k, bin)
    room = (kept.shape[3] - HEAD.value) // size_kept if is_kept else 0
    is_kept = is_kept and room >= block_c
    lists = kept if is_kept else _new(q, B, C, n_row, HEAD.value + block_c, dtype=torch.int32)
    has_boxes = is_kept and size_kept > 1
    boxes = kept[..., HEAD.value + room :].view(k.dtype) if has_boxes else None  # wherever this list ends
    products = _new(q, B, C, n_query, block_c, dtype=torch.float32)
    bins = _new(q, B, C, T, n_listed, dtype=torch.int32)
    order, row, row_seen, seen = (x if x is None else x.contiguous() for x in (order, row, row_seen, seen))
    with torch.cuda.device_of(q):
        block_d, stride = _dot_block(D, q.dtype), config.query_stride
        if not is_step:
            of_bins = _new(k, B, Hkv, n_bin, 2 * D)
            _boxes_kernel[(_cdiv(n_bin, BOXES["BLOCK_N"]) * B * Hkv,)](
                k, order, of_bins, k_strides=k.stride(), HKV=Hkv, n_key=S, n_bin=n_bin, D=D, BIN=bin,
                BLOCK_D=block_d, **BOXES)
            k, order = of_bins, None
        cell_warps = _rank_warps(block_p, CHOOSE["cells_per_warp"], is_step)
        warps = _rank_warps(block_c, CHOOSE["candidates_per_warp"], is_step)
        tiles = dict(PRODUCTS_STEP if is_step else PRODUCTS)
        if q.dtype == torch.float32:  # no tensor cores
            tiles["BLOCK_N"] = 16
        for begin_t in range(0, T, n_query):
            end_t = min(begin_t + n_query, T)
            shared = dict(C=C, T=T, R=R, begin_t=begin_t, end_t=end_t, n_row=n_row, list_size=lists.shape[-1],
                          BIN=bin)
            of_row = dict(n_key=S, local=config.local, n_first=config.n_first, **shared)
            _candidates_kernel[(n_row * B * C,)](
                scores, row, row_seen, lists, x_strides=scores.stride(), E=E, n_wanted=n_wanted,
                KEPT=is_kept, DTYPE=ZERO_BITS[k.dtype], ONE=E <= C,
                ZEROS=ZERO_BITS[scores.dtype] if E <= C else 0, WIDTH=width, BLOCK_P=block_p,
                num_warps=cell_warps, **of_row)
            _products_kernel[(_cdiv(block_c, tiles["BLOCK_N"]) * n_row * B * C,)](
                q, k, order, row, lists, boxes, products, q_strides=q.stride(), k_strides=k.stride(), HKV=Hkv,
                kept_size=0 if boxes is None else boxes.stride(1), n_key=k.shape[2],
                softmax_scale=float(softmax_scale), STRIDE=stride, D=D, FROM_BINS=not is_step, BLOCK_C=block_c,
                BLOCK_M=16, BLOCK_D=block_d, BLOCK_S=_next_power_of_2(min(stride, T)), **tiles,
                **shared)
            _choose_bins_kernel[((end_t - begin_t) * B * C,)](
                products, lists, row, row_seen, seen, bins, n_chosen=min(n_chosen, n_bin), n_listed=n_listed,
                BLOCK=tiles["BLOCK_N"], BLOCK_C=block_c, BLOCK_N=min(block_c, 512 * warps), num_warps=warps,
                **of_row)
    return bins


# -- sparse attention --------------------------------------------------------------------------------
#
# The queries of one head are cut into tiles of BLOCK_M, its keys into units of UNIT. A plan says which
# units a tile has to visit: those under the union of its queries' cells, as runs of neighbouring units
# that do not overlap. A tile walks each run from its first key, one block of BLOCK_N keys per step, so a
# cell no wider than a block costs one step, wherever it lies. Each (query, key) pair is met at most once,
# and where cells are narrower than a block (early causal queries) a tile becomes an ordinary dense one.
# Inside a block, each query's own bits decide. Work and memory are linear in T for a constant budget.
#
# In all kernels t is the number of keys that a query sees, j a key, p a cell.
#
# To find out which keys of a block a query keeps would cost more than the block's products: a division
# and a load per pair. But a query that sees t >= width keys has at most 32 cells over 32 keys. The bits
# of these, a window, are shifted out of its words once per block, and a rounded number says in which of
# them a key lies. In cells from the left, the middle of key j is x(j) = (2j + 1) width / (2t), so that
#
#     cell(j) = ((2j + 1) width - 1) // (2t) = ceil(x(j)) - 1 = round(x(j) - 1/2 - 1/(4t)),
#
# since all x are multiples of 1/(2t), which 1/(4t) keeps away from ties. If the window begins with cell
# c = cell(j), and rest = (2j + 1) width - 1 - 2t c is the remainder of that division, then
#
#     real_cell = x(j) - c - 1/2 - 1/(4t) = (2 rest + 1 - 2t) / (4t),
#
# and since x grows by width / t per key, key j + i lies in cell round(real_cell + i width / t) of the
# window. Tiles with queries that see fewer than width keys (the first few tiles) or more than
# MAX_WINDOW_KEYS work key by key instead.

UNIT = tl.constexpr(8)  # keys
GAP = tl.constexpr(2)  # units. Gaps up to this are walked through: a run's last block is half empty anyway
MAX_WINDOW_KEYS = tl.constexpr(2**20)  # up to here the fp32 error of real_cell + i width / t is below 1/(4t)
MAX_WIDTH = 16384  # its square has to fit into 32 bits

# -- tuning. BLOCK_M, BLOCK_N >= 16, as tl.dot wants; BLOCK_N <= 32, as windows are.
VISITORS = 256  # tiles that a program of the backward pass looks through at a time
PAIRS_PER_PROGRAM = 32  # (tile, key block) pairs that one program of the dk, dv kernel adds up, at least
MAX_EXTRA_PROGRAMS = 1024  # of that kernel, to share the work on key blocks that many tiles visit


def _attention_tiles(dtype: torch.dtype, d_head: int) -> dict:
    """Of the forward and dq kernels. With one warp, a row's maximum and its probabilities stay inside it."""
    block_d = max(16, _next_power_of_2(d_head))
    if dtype == torch.float32:  # "ieee" dots run without tensor cores: small tiles keep them in registers
        block_n = 16 if d_head > 64 else 32
        return dict(BLOCK_M=16, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=1)
    num_warps = 1 if d_head <= 128 else 4
    return dict(BLOCK_M=16, BLOCK_N=32, BLOCK_D=block_d, num_warps=num_warps, num_stages=3)


def _dkdv_tiles(dtype: torch.dtype, d_head: int) -> dict:
    """Of the dk, dv kernel: the forward's, with more warps for two accumulators where heads are wide."""
    tiles = _attention_tiles(dtype, d_head)
    return dict(tiles, num_warps=max(tiles["num_warps"], tiles["BLOCK_D"] // 64), num_stages=1)


def _plan_tiles(n_word: int) -> dict:
    """Of the plan kernel: all cells of a row, 256 of them per warp."""
    block_w = _next_power_of_2(n_word)
    return dict(BLOCK_W=block_w, num_warps=min(max(block_w // 8, 1), 8))


def _step_tiles(n_word: int, d_head: int) -> dict:
    """Of a decoding step: blocks of 8,192 numbers, as many as registers hold, since the longest list of
    a head (H * topk keys, or a single wide cell) decides how long a step takes."""
    block_d = max(32, _next_power_of_2(d_head))  # Triton 3.6: wrong addresses if two threads read a head
    block_n = min(8192 // block_d, 256)
    return dict(BLOCK_W=_next_power_of_2(n_word), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=8)


# -- cells and keys inside a kernel


@triton.jit
def _first_key(p, t, WIDTH: tl.constexpr):
    """lo(p) = (2 t p + width) // (2 width). t in two parts, since 2 t p passes 2^31 at t = 1M, width 1024."""
    return t // (2 * WIDTH) * 2 * p + (t % (2 * WIDTH) * 2 * p + WIDTH) // (2 * WIDTH)


@triton.jit
def _cells_per_key(t, WIDTH: tl.constexpr):
    return WIDTH / tl.maximum(t, 1).to(tl.float32)


@triton.jit
def _cell_of_key(t, j, WIDTH: tl.constexpr):
    """cell(j) = ((2 j + 1) width - 1) // (2 t) and the remainder of that division. Shapes broadcast.

    Integer division is slow, so this is an fp32 guess, wrong by at most one, corrected by its exact
    remainder. The products may wrap around int32; the remainder is small, so it is right nevertheless.
    """
    cell = ((j.to(tl.float32) + 0.5) * _cells_per_key(t, WIDTH)).to(tl.int32)
    rest = (2 * j + 1) * WIDTH - 1 - cell * (2 * t)
    correction = (rest >= 2 * t).to(tl.int32) - (rest < 0).to(tl.int32)
    return cell + correction, rest - correction * (2 * t)


@triton.jit
def _is_kept(words_ptr, t, j, n_key, WIDTH: tl.constexpr):
    """Whether a query that sees t keys keeps key j: bit cell(j) of its mask row. Shapes broadcast."""
    cell, _ = _cell_of_key(t, j, WIDTH)
    word = tl.load(words_ptr + (cell >> 5), mask=(j < t) & (j < n_key), other=0)
    return ((word >> (cell & 31)) & 1) != 0


@triton.jit
def _has_windows(t, WIDTH: tl.constexpr):
    """Whether all queries of a tile have windows."""
    t_min = tl.min(tl.where(t > 0, t, WIDTH), axis=0)
    return (t_min >= WIDTH) & (tl.max(t, axis=0) <= MAX_WINDOW_KEYS)


@triton.jit
def _window(words_ptr, t, j, cells_per_key, WIDTH: tl.constexpr):
    """Mask bits of the 32 cells from cell(j) on, 0 past the last cell, and real_cell, as derived above."""
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    cell, rest = _cell_of_key(t, j, WIDTH)
    word = cell >> 5
    low = tl.load(words_ptr + word, mask=j < t, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(words_ptr + word + 1, mask=(j < t) & (word + 1 < WORDS), other=0).to(tl.int64)
    window = (((high << 32) | low) >> (cell & 31)).to(tl.int32)
    real_cell = (2 * rest + 1 - 2 * t).to(tl.float32) * (cells_per_key * (0.25 / WIDTH))
    return window, real_cell


@triton.jit
def _in_window(window, real_cell, cells_per_key, i, mask):
    """Whether key number i of a block is kept, where mask. Shapes broadcast."""
    # 1.5 * 2^23 is so large that fp32 rounds the sum to an integer, which stands in its low bits
    cell = (real_cell + cells_per_key * i.to(tl.float32) + 12582912.0).to(tl.int32, bitcast=True)
    return ((window >> (cell & 31)) & mask.to(tl.int32)) != 0


@triton.jit
def _seen_and_words(seen_ptr, row_ptr, bits_ptr, b, pid_bh, offs_m, mask_m, T, R, WIDTH: tl.constexpr):
    """t of queries offs_m of one head, and pointers to their rows of the mask, (BLOCK_M,) each."""
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    t = tl.load(seen_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    row = offs_m if row_ptr is None else tl.load(row_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    return t, bits_ptr + (pid_bh.to(tl.int64) * R + row) * WORDS


@triton.jit
def _head_rows(ptr, strides, b, h, offs_row, offs_d):
    """Pointers to rows of one head, (rows, BLOCK_D)."""
    return ptr + (b * strides[0] + h * strides[1] + offs_row[:, None].to(tl.int64) * strides[2]
                  + offs_d[None, :] * strides[3])


# -- sparse attention: the plan


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


# The keys that each tile of queries visits.
# One program: one tile; grid (B * H * n_tile,), n_tile = cdiv(T, BLOCK_M).
#   bits (B, H, R, words) int32; seen (B, T) int; row (B, T) int or None: query i uses row i
#   runs (B * H * n_tile, max_runs + 1, 2) int32: first unit and end of each run, ascending, more than
#   GAP units apart; then unit 0, for the walk, which reads one run ahead
#   steps (B * H * n_tile,) int32: blocks of all runs
#   union (B * H * n_tile, words + 2) int32, or None: the words of the tile's union of cells, its smallest
#   t > 0 and its largest
# A cell p of the union covers keys lo(p) of the smallest t to lo(p+1) of the largest. Adjacent cells
# always join, so there are at most cdiv(width, 2) runs. A run and the gap after it take GAP + 2 units or
# more, so there are at most cdiv(n_key, UNIT * (GAP + 2)). max_runs is the smaller of the two.
# Cost: loads the bits twice, as they are and shifted by a word (from the cache), scans the cells, padded
# to a power of two, whatever is kept, and writes at most 8 bytes of runs per 2 cells of a tile. Computed
# once, it spares the kernels that walk the keys, forward and backward, all search.
@triton.jit
def _plan_kernel(bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, union_ptr, H, T, R, n_key, max_runs,
                 WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    pid_tile = tl.program_id(0)
    pid_m, pid_bh = _program(tl.cdiv(T, BLOCK_M))
    offs_m, offs_w = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
    mask_m, mask_w = offs_m < T, offs_w < WORDS
    t, words_ptr = _seen_and_words(seen_ptr, row_ptr, bits_ptr, b=pid_bh // H, pid_bh=pid_bh,
                                   offs_m=offs_m, mask_m=mask_m, T=T, R=R, WIDTH=WIDTH)
    t_max = tl.max(t, axis=0)
    t_min = tl.min(tl.where(t > 0, t, t_max), axis=0)

    # -- union of the words, (BLOCK_W,), and the same moved up by one cell: bit p for cell p - 1
    words_ptr = words_ptr[:, None] + offs_w[None, :]
    mask_mw = (t > 0)[:, None] & mask_w[None, :]
    word = tl.reduce(tl.load(words_ptr, mask=mask_mw, other=0), 0, _or)
    lower = tl.reduce(tl.load(words_ptr - 1, mask=mask_mw & (offs_w > 0)[None, :], other=0), 0, _or)
    moved_up = (word << 1) | ((lower >> 31) & 1)
    if union_ptr is not None:
        union_ptr += pid_tile.to(tl.int64) * (WORDS + 2)
        tl.store(union_ptr + offs_w, word, mask=mask_w)
        tl.store(union_ptr + WORDS, t_min)
        tl.store(union_ptr + WORDS + 1, t_max)

    # -- units of each cell p that is kept and covers a key, and where those of cell p - 1 end
    p = tl.arange(0, BLOCK_W * 32)
    offs_bit = tl.arange(0, 32)[None, :]
    mask_kept = tl.reshape((word[:, None] >> offs_bit) & 1, (BLOCK_W * 32,)) != 0
    mask_kept_before = tl.reshape((moved_up[:, None] >> offs_bit) & 1, (BLOCK_W * 32,)) != 0
    begin, end = _first_key(p, t_min, WIDTH), tl.minimum(_first_key(p + 1, t_max, WIDTH), n_key)
    mask_p = mask_kept & (p < WIDTH) & (begin < end)
    begin_before = _first_key(p - 1, t_min, WIDTH)
    end_before = tl.minimum(_first_key(p, t_max, WIDTH), n_key)
    mask_before = mask_kept_before & (p <= WIDTH) & (begin_before < end_before)
    begin = begin // UNIT
    end = tl.where(mask_p, (end + UNIT - 1) // UNIT, 0)
    end_before = tl.where(mask_before, (end_before + UNIT - 1) // UNIT, 0)
    covered = tl.associative_scan(end_before, 0, _max)  # where all cells before p end; 0 if none is kept

    # -- a run begins at a cell after a gap; the run before it ends there
    mask_begin = mask_p & ((begin > covered + GAP) | (covered == 0))
    run = tl.cumsum(mask_begin.to(tl.int32), axis=0) - 1
    runs_ptr += pid_tile.to(tl.int64) * (max_runs + 1) * 2
    tl.store(runs_ptr + run * 2, begin, mask=mask_begin)
    tl.store(runs_ptr + run * 2 - 1, covered, mask=mask_begin & (run > 0))
    n_run, last_end = tl.sum(mask_begin.to(tl.int32), axis=0), tl.max(end, axis=0)
    tl.store(runs_ptr + n_run * 2 - 1, last_end, mask=n_run > 0)
    tl.store(runs_ptr + n_run * 2, 0)

    # -- blocks: different threads hold a run's first unit and its end, so read them back
    tl.debug_barrier()
    offs_run = tl.arange(0, BLOCK_W * 16)
    mask_run = offs_run < n_run
    run_end = tl.load(runs_ptr + offs_run * 2 + 1, mask=mask_run, other=0)
    n_unit = run_end - tl.load(runs_ptr + offs_run * 2, mask=mask_run, other=0)
    tl.store(steps_ptr + pid_tile, tl.sum((n_unit * UNIT + BLOCK_N - 1) // BLOCK_N, axis=0))


def _plan(bits: Tensor, seen: Tensor, row: Tensor | None, width: int, n_key: int, tiles: dict,
          union: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """runs, steps, max_runs: the keys that each tile visits. Fills union, if given."""
    (B, H, R, words), T = bits.shape, seen.shape[1]
    n_tile = _cdiv(T, tiles["BLOCK_M"])
    max_runs = min(_cdiv(width, 2), _cdiv(n_key, UNIT.value * (GAP.value + 2)))
    runs = torch.empty(B * H * n_tile, max_runs + 1, 2, dtype=torch.int32, device=bits.device)
    steps = torch.empty(B * H * n_tile, dtype=torch.int32, device=bits.device)
    _plan_kernel[(len(steps),)](
        bits, seen, row, runs, steps, union, H=H, T=T, R=R, n_key=n_key, max_runs=max_runs, WIDTH=width,
        BLOCK_M=tiles["BLOCK_M"], BLOCK_N=tiles["BLOCK_N"], **_plan_tiles(words))
    return runs, steps, max_runs


# -- sparse attention: forward


@triton.jit
def _tile_of_queries(pid_tile, seen_ptr, row_ptr, bits_ptr, H, T, R, n_tile, WIDTH: tl.constexpr,
                     BLOCK_M: tl.constexpr):
    """pid_bh, b, h of a tile, and of its queries offs_m, mask_m, t and words_ptr."""
    pid_bh, pid_m = pid_tile // n_tile, pid_tile % n_tile
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    t, words_ptr = _seen_and_words(seen_ptr, row_ptr, bits_ptr, b=b, pid_bh=pid_bh, offs_m=offs_m,
                                   mask_m=mask_m, T=T, R=R, WIDTH=WIDTH)
    return pid_bh, b, h, offs_m, mask_m, t, words_ptr


@triton.jit
def _first_block(ptr, strides, b, h, offs_n, offs_d, ROW: tl.constexpr):
    """Pointers to a head's first block of keys or values, (BLOCK_N, BLOCK_D). ROW is strides[2] as a
    constant, so that a block's addresses are one base plus constant offsets."""
    if ROW >= 2**26:  # 32 keys would not fit into 32 bits
        offs_n = offs_n.to(tl.int64)
    return ptr + (b * strides[0] + h * strides[1] + offs_n[:, None] * ROW + offs_d[None, :] * strides[3])


@triton.jit
def _kept(words_ptr, t, window, real_cell, cells_per_key, i, j, n_key, WINDOWS: tl.constexpr,
          WIDTH: tl.constexpr):
    """Which keys j, number i of a block, each query of a tile keeps, (BLOCK_M, BLOCK_N)."""
    if WINDOWS:
        return _in_window(window[:, None], real_cell[:, None], cells_per_key[:, None], i[None, :],
                          mask=(j < n_key)[None, :])
    else:
        return _is_kept(words_ptr[:, None], t[:, None], j[None, :], n_key, WIDTH)


@triton.jit
def _next_block(runs_ptr, unit, end, words_ptr, t, cells_per_key, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """A step of the walk over a tile's runs, without a branch.

    Returns the pointer to the run, the next block's first unit, the run's end, and the block's window,
    loaded a step ahead.
    """
    jump = unit + BLOCK_N // UNIT >= end
    runs_ptr += tl.where(jump, 2, 0)
    following = tl.load(runs_ptr, mask=jump, other=0)
    end = tl.where(jump, tl.load(runs_ptr + 1, mask=jump, other=0), end)
    unit = tl.where(jump, following, unit + BLOCK_N // UNIT)
    window, real_cell = _window(words_ptr, t, unit * UNIT, cells_per_key, WIDTH)
    return runs_ptr, unit, end, window, real_cell


@triton.jit
def _attend(q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale, K_ROW: tl.constexpr,
            V_ROW: tl.constexpr, WINDOWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Over a tile's blocks: the softmax's maximum and sum, (BLOCK_M,), and sums of v, (BLOCK_M, BLOCK_D)."""
    offs_n = tl.arange(0, BLOCK_N)
    m_i = tl.full((q.shape[0],), LOWEST, tl.float32)
    l_i = tl.zeros((q.shape[0],), tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    unit, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    cells_per_key = _cells_per_key(t, WIDTH)
    window, real_cell = _window(words_ptr, t, unit * UNIT, cells_per_key, WIDTH)
    for _ in range(n_step):
        j, j_first = unit * UNIT + offs_n, unit.to(tl.int64) * UNIT
        n_run_key = tl.minimum(end * UNIT, n_key)  # the block may reach into the next run
        mask_nd = (j < n_key)[:, None] & mask_d[None, :]
        # -- scores, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + j_first * K_ROW, mask=mask_nd, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        mask_mn = _kept(words_ptr, t, window, real_cell, cells_per_key, i=offs_n, j=j, n_key=n_run_key,
                        WINDOWS=WINDOWS, WIDTH=WIDTH)
        s = tl.where(mask_mn, s, -float("inf"))
        # -- online softmax
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p, axis=1), m_new
        v = tl.load(v_ptr + j_first * V_ROW, mask=mask_nd, other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        runs_ptr, unit, end, window, real_cell = _next_block(
            runs_ptr, unit, end, words_ptr, t, cells_per_key, WIDTH=WIDTH, BLOCK_N=BLOCK_N)
    return m_i, l_i, acc


# o = softmax(q k^T * softmax_scale) v over the kept keys;
# lse = log2 of the sum of 2^(scores * log2 e), +inf where no key is kept.
# One program: one tile of BLOCK_M queries, walking its key blocks; grid (B * H * n_tile,).
#   q (B, H, T, D), k and v (B, Hkv, S, D), any strides; bits, seen, row, runs, steps as in _plan_kernel
#   o (B, H, T, D) and lse (B, H, T) fp32, contiguous
# fp32: scores, m_i, l_i, acc; p until the dot, whose operands have the dtype of v. Moves the visited
# blocks of k and v, where eager writes T x S scores and probabilities.
# Limits: MAX_D_HEAD, padded to a power of two >= 16. Reference: sea.sparse_attention.
@triton.jit
def _sparse_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, o_ptr,
                                 lse_ptr, q_strides, k_strides, v_strides, H, T, R, n_key, n_tile, max_runs,
                                 qk_scale, K_ROW: tl.constexpr, V_ROW: tl.constexpr, GROUP: tl.constexpr,
                                 D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_tile = tl.program_id(0)
    pid_bh, b, h, offs_m, mask_m, t, words_ptr = _tile_of_queries(
        pid_tile, seen_ptr, row_ptr, bits_ptr, H=H, T=T, R=R, n_tile=n_tile, WIDTH=WIDTH, BLOCK_M=BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    # (BLOCK_M, BLOCK_D)
    q = tl.load(_head_rows(q_ptr, q_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
    k_ptr = _first_block(k_ptr, k_strides, b, h // GROUP, offs_n, offs_d, ROW=K_ROW)
    v_ptr = _first_block(v_ptr, v_strides, b, h // GROUP, offs_n, offs_d, ROW=V_ROW)

    runs_ptr += pid_tile.to(tl.int64) * (max_runs + 1) * 2
    n_step = tl.load(steps_ptr + pid_tile)
    if _has_windows(t, WIDTH):
        m_i, l_i, acc = _attend(
            q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step=n_step, n_key=n_key, mask_d=mask_d,
            qk_scale=qk_scale, K_ROW=K_ROW, V_ROW=V_ROW, WINDOWS=True, WIDTH=WIDTH, BLOCK_N=BLOCK_N)
    else:
        m_i, l_i, acc = _attend(
            q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step=n_step, n_key=n_key, mask_d=mask_d,
            qk_scale=qk_scale, K_ROW=K_ROW, V_ROW=V_ROW, WINDOWS=False, WIDTH=WIDTH, BLOCK_N=BLOCK_N)
    # -- write back
    mask_empty = l_i == 0
    l_i = tl.where(mask_empty, 1.0, l_i)
    acc = acc / l_i[:, None]
    lse = tl.where(mask_empty, float("inf"), m_i + tl.log2(l_i))
    offs_bhm = pid_bh.to(tl.int64) * T + offs_m
    tl.store(o_ptr + offs_bhm[:, None] * D + offs_d[None, :], acc.to(o_ptr.dtype.element_ty), mask=mask_md)
    tl.store(lse_ptr + offs_bhm, lse, mask=mask_m)


def _attention_sizes(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, softmax_scale: float, width: int) -> dict:
    """Keywords that the forward, dq and dk, dv kernels have in common."""
    (_, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    n_tile = _cdiv(T, _attention_tiles(q.dtype, D)["BLOCK_M"])
    return dict(q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(), H=H, T=T, R=bits.shape[2],
                n_key=S, n_tile=n_tile, qk_scale=softmax_scale * LOG2_E.value, GROUP=H // Hkv, D=D,
                WIDTH=width)


def _sparse_attention_fwd(q, k, v, bits, seen, row, softmax_scale, width):
    (B, H, T, D), S = q.shape, k.shape[2]
    tiles = _attention_tiles(q.dtype, D)
    runs, steps, max_runs = _plan(bits, seen, row, width, S, tiles)
    o = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _sparse_attention_fwd_kernel[(len(steps),)](
        q, k, v, bits, seen, row, runs, steps, o, lse, max_runs=max_runs, K_ROW=k.stride(2),
        V_ROW=v.stride(2), **_attention_sizes(q, k, v, bits, softmax_scale, width), **tiles)
    return o, lse


# -- sparse attention: backward
#
# With p = 2^(scores - lse), dp = do v^T, delta = rowsum(o do) and ds = p (dp - delta):
#
#     dq = ds k * softmax_scale      dk = ds^T q * softmax_scale      dv = p^T do


@triton.jit
def _attend_bwd(q, do, lse, delta, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale,
                K_ROW: tl.constexpr, V_ROW: tl.constexpr, WINDOWS: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK_N: tl.constexpr):
    """dq / softmax_scale, (BLOCK_M, BLOCK_D) fp32, over a tile's blocks."""
    offs_n = tl.arange(0, BLOCK_N)
    dq = tl.zeros(q.shape, tl.float32)
    unit, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    cells_per_key = _cells_per_key(t, WIDTH)
    window, real_cell = _window(words_ptr, t, unit * UNIT, cells_per_key, WIDTH)
    for _ in range(n_step):
        j, j_first = unit * UNIT + offs_n, unit.to(tl.int64) * UNIT
        n_run_key = tl.minimum(end * UNIT, n_key)  # the block may reach into the next run
        mask_nd = (j < n_key)[:, None] & mask_d[None, :]
        # -- probabilities again, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + j_first * K_ROW, mask=mask_nd, other=0.0)
        v = tl.load(v_ptr + j_first * V_ROW, mask=mask_nd, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        mask_mn = _kept(words_ptr, t, window, real_cell, cells_per_key, i=offs_n, j=j, n_key=n_run_key,
                        WINDOWS=WINDOWS, WIDTH=WIDTH)
        p = tl.where(mask_mn, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq += tl.dot(ds, k, input_precision="ieee")
        runs_ptr, unit, end, window, real_cell = _next_block(
            runs_ptr, unit, end, words_ptr, t, cells_per_key, WIDTH=WIDTH, BLOCK_N=BLOCK_N)
    return dq


# dq = ds k * softmax_scale, and delta = rowsum(o do); ds as above.
# One program: the tile and the walk of the forward kernel.
#   o (B, H, T, D) contiguous, do (B, H, T, D) any strides, lse (B, H, T) fp32; the others as there
#   delta (B, H, T) fp32, dq (B, H, T, D) contiguous
# fp32: delta, dq; p, dp and ds until the dots, whose operands have the dtype of q.
# Computes p again from lse in place of reading it: keys and values are read once more, q, do and dq stay in
# registers.
# Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr,
                                steps_ptr, lse_ptr, delta_ptr, dq_ptr, q_strides, k_strides, v_strides,
                                do_strides, H, T, R, n_key, n_tile, max_runs, qk_scale, softmax_scale,
                                K_ROW: tl.constexpr, V_ROW: tl.constexpr, GROUP: tl.constexpr,
                                D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_tile = tl.program_id(0)
    pid_bh, b, h, offs_m, mask_m, t, words_ptr = _tile_of_queries(
        pid_tile, seen_ptr, row_ptr, bits_ptr, H=H, T=T, R=R, n_tile=n_tile, WIDTH=WIDTH, BLOCK_M=BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    # (BLOCK_M, BLOCK_D)
    q = tl.load(_head_rows(q_ptr, q_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
    do = tl.load(_head_rows(do_ptr, do_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
    offs_bhm = pid_bh.to(tl.int64) * T + offs_m
    o = tl.load(o_ptr + offs_bhm[:, None] * D + offs_d[None, :], mask=mask_md, other=0.0)
    lse = tl.load(lse_ptr + offs_bhm, mask=mask_m, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + offs_bhm, delta, mask=mask_m)
    k_ptr = _first_block(k_ptr, k_strides, b, h // GROUP, offs_n, offs_d, ROW=K_ROW)
    v_ptr = _first_block(v_ptr, v_strides, b, h // GROUP, offs_n, offs_d, ROW=V_ROW)

    runs_ptr += pid_tile.to(tl.int64) * (max_runs + 1) * 2
    n_step = tl.load(steps_ptr + pid_tile)
    if _has_windows(t, WIDTH):
        dq = _attend_bwd(
            q, do, lse, delta, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step=n_step, n_key=n_key,
            mask_d=mask_d, qk_scale=qk_scale, K_ROW=K_ROW, V_ROW=V_ROW, WINDOWS=True, WIDTH=WIDTH,
            BLOCK_N=BLOCK_N)
    else:
        dq = _attend_bwd(
            q, do, lse, delta, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step=n_step, n_key=n_key,
            mask_d=mask_d, qk_scale=qk_scale, K_ROW=K_ROW, V_ROW=V_ROW, WINDOWS=False, WIDTH=WIDTH,
            BLOCK_N=BLOCK_N)
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offs_bhm[:, None] * D + offs_d[None, :], dq, mask=mask_md)


@triton.jit
def _visits(union_ptr, offs_tile, mask_tile, pid_n, n_key, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tiles have a cell in their union that reaches into key block pid_n.

    Yes without a look where a block may hold more than 32 cells, among the first few hundred queries:
    a visit for nothing costs time and changes no result.
    """
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    union_ptr += offs_tile.to(tl.int64) * (WORDS + 2)
    t_min = tl.load(union_ptr + WORDS, mask=mask_tile, other=0)
    t_max = tl.load(union_ptr + WORDS + 1, mask=mask_tile, other=0)
    mask_tile &= pid_n * BLOCK_N < t_max
    first_cell, _ = _cell_of_key(t_max, pid_n * BLOCK_N, WIDTH)
    last_cell, _ = _cell_of_key(t_min, tl.minimum(pid_n * BLOCK_N + BLOCK_N, n_key) - 1, WIDTH)
    last_cell = tl.minimum(last_cell, WIDTH - 1)
    # -- the cells from `first_cell` to `last_cell`, if they fit into 32 bits, shifted out of two words
    mask_look = mask_tile & (last_cell - first_cell < 32)
    low = tl.load(union_ptr + (first_cell >> 5), mask=mask_look, other=0)
    low = low.to(tl.uint32, bitcast=True).to(tl.int64)
    high_ptr = union_ptr + (last_cell >> 5)
    high = tl.load(high_ptr, mask=mask_look & (last_cell >> 5 > first_cell >> 5), other=0).to(tl.int64)
    cells = (((high << 32) | low) >> (first_cell & 31)) << (63 - (last_cell - first_cell))
    return mask_tile & ((last_cell - first_cell >= 32) | (mask_look & (cells != 0)))


# How many tiles visit each key block, and which is the first.
# One program: one key block of one key/value head; grid (n_block * B * Hkv,).
#   union as in _plan_kernel
#   counts, firsts (B * Hkv, n_block) int32, among the GROUP * n_tile tiles of the heads that share the block
# Looks at every tile: quadratic in T, but BLOCK_M * BLOCK_N (query, key) pairs cost one look at four words.
@triton.jit
def _count_visits_kernel(union_ptr, counts_ptr, firsts_ptr, n_tile, n_key, GROUP: tl.constexpr,
                         WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILE: tl.constexpr):
    i_list, n_group_tile = tl.program_id(0), GROUP * n_tile
    n_block = tl.cdiv(n_key, BLOCK_N)
    pid_n, pid_bkv = i_list % n_block, i_list // n_block
    count, first = 0, n_group_tile
    for start in range(0, n_group_tile, BLOCK_TILE):
        offs_tile = start + tl.arange(0, BLOCK_TILE)
        mask_visit = _visits(union_ptr, pid_bkv * n_group_tile + offs_tile, offs_tile < n_group_tile, pid_n,
                             n_key, WIDTH=WIDTH, BLOCK_N=BLOCK_N)
        count += tl.sum(mask_visit.to(tl.int32), axis=0)
        first = tl.minimum(first, tl.min(tl.where(mask_visit, offs_tile, n_group_tile), axis=0))
    tl.store(counts_ptr + i_list, count)
    tl.store(firsts_ptr + i_list, first)


@triton.jit
def _add_visitors(dk, dv, visitors_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr,
                  delta_ptr, q_strides, do_strides, b, H, T, R, n_key, n_tile, pid_n, mask_d, qk_scale,
                  WINDOWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """dk / softmax_scale and dv of key block pid_n, (BLOCK_N, BLOCK_D), with the shares of n listed tiles."""
    offs_n, offs_d = tl.arange(0, k.shape[0]), tl.arange(0, k.shape[1])
    j = pid_n * k.shape[0] + offs_n
    for i in range(0, n):
        pid_tile = tl.load(visitors_ptr + i)
        pid_bh, h = pid_tile // n_tile, (pid_tile // n_tile % H).to(tl.int64)
        offs_m = pid_tile % n_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < T
        mask_md = mask_m[:, None] & mask_d[None, :]
        offs_bhm = pid_bh.to(tl.int64) * T + offs_m
        t, words_ptr = _seen_and_words(seen_ptr, row_ptr, bits_ptr, b=b, pid_bh=pid_bh, offs_m=offs_m,
                                       mask_m=mask_m, T=T, R=R, WIDTH=WIDTH)
        # (BLOCK_M, BLOCK_D)
        q = tl.load(_head_rows(q_ptr, q_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
        do = tl.load(_head_rows(do_ptr, do_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
        lse = tl.load(lse_ptr + offs_bhm, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_bhm, mask=mask_m, other=0.0)
        # -- probabilities again, (BLOCK_N, BLOCK_M)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        if WINDOWS:
            cells_per_key = _cells_per_key(t, WIDTH)
            window, real_cell = _window(words_ptr, t, pid_n * k.shape[0], cells_per_key, WIDTH)
            mask_nm = _in_window(window[None, :], real_cell[None, :], cells_per_key[None, :], offs_n[:, None],
                                 mask=(j < n_key)[:, None])
        else:
            mask_nm = _is_kept(words_ptr[None, :], t[None, :], j[:, None], n_key, WIDTH)
        p = tl.where(mask_nm, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk += tl.dot(ds, q, input_precision="ieee")
    return dk, dv


# dk = ds^T q * softmax_scale, dv = p^T do, summed over the tiles that visit a key block, in their order.
# One program: one key block and at most `per_program` of its visitors; grid (n_list + n_extra,); surplus
# programs return. A key block with few visitors has one program, which writes dk and dv. One with many
# (every query visits a sink) has several: they write to `part`, and _sum_parts_kernel adds up. Each of
# them looks through the tiles from `firsts` on until it has passed all of its own visitors, so the
# later ones repeat the looks, though not the products, of those before.
#   q, do (B, H, T, D), k, v (B, Hkv, S, D), any strides; lse, delta (B, H, T) fp32 contiguous
#   bits, seen, row, union as in _plan_kernel
#   counts, firsts (lists,) as above; list number (b * Hkv + kv) * n_block + pid_n is that of one key block
#   list_of (programs,) int64: the list that a program works on
#   part_ends (lists,) int64: running sum of the programs of each list; slots (lists,) int64: the same, of
#   lists shared by several; per_program () int64; visitors (programs, BLOCK_TILE) int32: scratch
#   part (slots, 2, BLOCK_N, BLOCK_D) fp32; dk, dv (B, Hkv, S, D) contiguous
# fp32: accumulators; p, dp and ds until the dots, whose operands have the dtype of q. Deterministic; no
# count has to reach the CPU, so a CUDA graph can hold it.
# Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dkdv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr,
                                  delta_ptr, union_ptr, counts_ptr, firsts_ptr, list_of_ptr, part_ends_ptr,
                                  slots_ptr, per_program_ptr, visitors_ptr, part_ptr, dk_ptr, dv_ptr,
                                  q_strides, k_strides, v_strides, do_strides, H, T, R, n_key, n_tile,
                                  n_block, n_list, qk_scale, softmax_scale, GROUP: tl.constexpr,
                                  D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TILE: tl.constexpr):
    pid = tl.program_id(0)
    i_list = tl.load(list_of_ptr + pid)
    if i_list >= n_list:  # the grid is an upper bound
        return
    pid_bkv, pid_n = (i_list // n_block).to(tl.int32), (i_list % n_block).to(tl.int32)
    b, kv = (pid_bkv // (H // GROUP)).to(tl.int64), (pid_bkv % (H // GROUP)).to(tl.int64)
    # -- visitors number begin ... end - 1 are this program's, which is number pid_part of n_part
    per_program, count = tl.load(per_program_ptr).to(tl.int32), tl.load(counts_ptr + i_list)
    n_part = tl.maximum((count + per_program - 1) // per_program, 1)
    pid_part = (pid - (tl.load(part_ends_ptr + i_list) - n_part)).to(tl.int32)
    begin, end = pid_part * per_program, tl.minimum((pid_part + 1) * per_program, count)
    visitors_ptr += pid.to(tl.int64) * BLOCK_TILE

    offs_d = tl.arange(0, BLOCK_D)
    j = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    mask_nd = (j < n_key)[:, None] & mask_d[None, :]
    # (BLOCK_N, BLOCK_D)
    k = tl.load(_head_rows(k_ptr, k_strides, b, kv, j, offs_d), mask=mask_nd, other=0.0)
    v = tl.load(_head_rows(v_ptr, v_strides, b, kv, j, offs_d), mask=mask_nd, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start, n_before = tl.load(firsts_ptr + i_list), 0
    windows = (pid_n * BLOCK_N >= WIDTH) & (n_key <= MAX_WINDOW_KEYS)  # of all queries that see this block
    while (start < GROUP * n_tile) & (n_before < end):
        # -- list the visitors among the next BLOCK_TILE tiles
        offs_tile = start + tl.arange(0, BLOCK_TILE)
        pid_tile = pid_bkv * GROUP * n_tile + offs_tile
        mask_visit = _visits(union_ptr, pid_tile, offs_tile < GROUP * n_tile, pid_n, n_key, WIDTH=WIDTH,
                             BLOCK_N=BLOCK_N)
        i_visit = n_before + tl.cumsum(mask_visit.to(tl.int32), axis=0) - 1
        skip = tl.maximum(begin, n_before)
        tl.debug_barrier()  # all threads have read the previous list
        own_ptrs = visitors_ptr + i_visit - skip
        tl.store(own_ptrs, pid_tile, mask=mask_visit & (i_visit >= skip) & (i_visit < end))
        tl.debug_barrier()
        start, n_before = start + BLOCK_TILE, n_before + tl.sum(mask_visit.to(tl.int32), axis=0)
        n = tl.minimum(n_before, end) - skip
        if windows:
            dk, dv = _add_visitors(
                dk, dv, visitors_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr,
                q_strides=q_strides, do_strides=do_strides, b=b, H=H, T=T, R=R, n_key=n_key, n_tile=n_tile,
                pid_n=pid_n, mask_d=mask_d, qk_scale=qk_scale, WINDOWS=True, WIDTH=WIDTH, BLOCK_M=BLOCK_M)
        else:
            dk, dv = _add_visitors(
                dk, dv, visitors_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr,
                q_strides=q_strides, do_strides=do_strides, b=b, H=H, T=T, R=R, n_key=n_key, n_tile=n_tile,
                pid_n=pid_n, mask_d=mask_d, qk_scale=qk_scale, WINDOWS=False, WIDTH=WIDTH, BLOCK_M=BLOCK_M)
    # -- write back
    dk *= softmax_scale
    if n_part == 1:
        offs_kv = (pid_bkv.to(tl.int64) * n_key + j[:, None]) * D + offs_d[None, :]
        tl.store(dk_ptr + offs_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_nd)
        tl.store(dv_ptr + offs_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_nd)
    else:
        slot = tl.load(slots_ptr + i_list) - n_part + pid_part
        offs_nd = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(part_ptr + slot * 2 * BLOCK_N * BLOCK_D + offs_nd, dk)
        tl.store(part_ptr + (slot * 2 + 1) * BLOCK_N * BLOCK_D + offs_nd, dv)


# dk, dv of the key blocks that several programs share: the sum of their parts, in order, so that reruns are
# equal to the bit, as sums by atomic operations would not be.
# One program: one key block; grid (lists,). Those with one program return at once. Pointers as above.
@triton.jit
def _sum_parts_kernel(counts_ptr, slots_ptr, per_program_ptr, part_ptr, dk_ptr, dv_ptr, n_key, n_block,
                      D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    i_list, per_program = tl.program_id(0), tl.load(per_program_ptr)
    n_part = (tl.load(counts_ptr + i_list) + per_program - 1) // per_program
    if n_part <= 1:
        return
    slot = tl.load(slots_ptr + i_list) - n_part
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    part_ptr += slot * 2 * BLOCK_N * BLOCK_D + offs_n[:, None] * BLOCK_D + offs_d[None, :]
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(n_part):
        dk += tl.load(part_ptr + i * 2 * BLOCK_N * BLOCK_D)
        dv += tl.load(part_ptr + (i * 2 + 1) * BLOCK_N * BLOCK_D)
    j = i_list % n_block * BLOCK_N + offs_n
    offs_kv = ((i_list // n_block).to(tl.int64) * n_key + j[:, None]) * D + offs_d[None, :]
    mask_nd = (j < n_key)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + offs_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(dv_ptr + offs_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_nd)


def _sparse_attention_dkdv(q, k, v, do, bits, seen, row, lse, delta, union, softmax_scale, width):
    (B, H, _, D), (Hkv, S) = q.shape, k.shape[1:3]
    tiles, sizes = _dkdv_tiles(q.dtype, D), _attention_sizes(q, k, v, bits, softmax_scale, width)
    n_tile, n_block = sizes["n_tile"], _cdiv(S, tiles["BLOCK_N"])
    n_list = B * Hkv * n_block
    counts, firsts = (torch.empty(n_list, dtype=torch.int32, device=q.device) for _ in range(2))
    _count_visits_kernel[(n_list,)](
        union, counts, firsts, n_tile=n_tile, n_key=S, GROUP=H // Hkv, WIDTH=width, BLOCK_N=tiles["BLOCK_N"],
        BLOCK_TILE=VISITORS)

    # -- a program per list, and up to n_extra more for lists with many visitors, in at most 2 n_extra parts
    n_extra = min(MAX_EXTRA_PROGRAMS, max(1, _cdiv(n_list * n_tile * (H // Hkv), PAIRS_PER_PROGRAM)))
    per_program = (counts.sum() + n_extra - 1).div(n_extra, rounding_mode="floor")
    per_program = per_program.clamp(min=PAIRS_PER_PROGRAM)
    n_part = ((counts + per_program - 1) // per_program).clamp(min=1)
    part_ends, slots = n_part.cumsum(0), (n_part * (n_part > 1)).cumsum(0)
    n_program = n_list + n_extra
    list_of = torch.searchsorted(part_ends, torch.arange(n_program, device=q.device), right=True)

    part = torch.empty(2 * n_extra, 2, tiles["BLOCK_N"], tiles["BLOCK_D"], dtype=torch.float32,
                       device=q.device)
    visitors = torch.empty(n_program, VISITORS, dtype=torch.int32, device=q.device)
    dk, dv = (torch.empty(B, Hkv, S, D, dtype=k.dtype, device=k.device) for _ in range(2))
    _sparse_attention_dkdv_kernel[(n_program,)](
        q, k, v, do, bits, seen, row, lse, delta, union, counts, firsts, list_of, part_ends, slots,
        per_program, visitors, part, dk, dv, do_strides=do.stride(), n_block=n_block, n_list=n_list,
        softmax_scale=softmax_scale, BLOCK_TILE=VISITORS, **sizes, **tiles)
    _sum_parts_kernel[(n_list,)](counts, slots, per_program, part, dk, dv, n_key=S, n_block=n_block, D=D,
                                 BLOCK_N=tiles["BLOCK_N"], BLOCK_D=tiles["BLOCK_D"])
    return dk, dv


def _sparse_attention_bwd(q, k, v, o, lse, do, bits, seen, row, softmax_scale, width):
    (B, H, T, D), S, words = q.shape, k.shape[2], bits.shape[3]
    tiles = _attention_tiles(q.dtype, D)
    union = torch.empty(B * H * _cdiv(T, tiles["BLOCK_M"]), words + 2, dtype=torch.int32, device=q.device)
    # cheaper than keeping the forward's plan
    runs, steps, max_runs = _plan(bits, seen, row, width, S, tiles, union)
    delta, dq = torch.empty_like(lse), torch.empty_like(o)
    _sparse_attention_dq_kernel[(len(steps),)](
        q, k, v, o, do, bits, seen, row, runs, steps, lse, delta, dq, do_strides=do.stride(),
        max_runs=max_runs, softmax_scale=softmax_scale, K_ROW=k.stride(2), V_ROW=v.stride(2),
        **_attention_sizes(q, k, v, bits, softmax_scale, width), **tiles)
    dk, dv = _sparse_attention_dkdv(q, k, v, do, bits, seen, row, lse, delta, union, softmax_scale, width)
    return dq, dk, dv


# -- sparse attention: a decoding step

# o as above, for one query per sequence: all selected keys, and no others, in one dense list of `total`.
# One program: one head; grid (B * H,). Key number s of the list has rank s + (keys skipped before it):
# the keys of those cells p that are off and with at most s selected keys up to and including p.
#   q (B, H, 1, D), k and v (B, Hkv, S, D), any strides; bits (B, H, R, words)
#   seen (B, 1) int; row (B, 1) int or None for 0; order (B, S) int or None: the place of the key of each rank
#   o (B, H, 1, D) contiguous
# fp32: everything, and no dots: a tile of rows would hold a single query. Reads each selected key once,
# and no key from seen on, whatever it holds. Limits: MAX_D_HEAD. Reference: sea.sparse_attention.
@triton.jit
def _sparse_attention_step_kernel(q_ptr, k_ptr, v_ptr, bits_ptr, seen_ptr, row_ptr, order_ptr, o_ptr,
                                  q_strides, k_strides, v_strides, H, R, n_key, qk_scale, GROUP: tl.constexpr,
                                  D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
                                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    pid_bh = tl.program_id(0).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    t = tl.load(seen_ptr + b).to(tl.int32)
    row = 0 if row_ptr is None else tl.load(row_ptr + b).to(tl.int64)
    # -- how many keys each cell selects or skips
    p = tl.arange(0, BLOCK_W * 32)
    word = tl.load(bits_ptr + (pid_bh * R + row) * WORDS + p // 32, mask=p < WORDS * 32, other=0)
    mask_kept = ((word >> p % 32) & 1) != 0
    n = tl.minimum(_first_key(p + 1, t, WIDTH), n_key) - tl.minimum(_first_key(p, t, WIDTH), n_key)
    n_selected, n_skipped = tl.where(mask_kept, n, 0), tl.where(mask_kept, 0, n)
    selected_to = tl.cumsum(n_selected, axis=0)  # up to a cell, it included
    total = tl.sum(n_selected, axis=0)

    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = _vector(q_ptr + b * q_strides[0] + h * q_strides[1], offs_d * q_strides[3], mask_d) * qk_scale
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1] + offs_d[None, :] * k_strides[3]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1] + offs_d[None, :] * v_strides[3]
    m_i, l_i = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, total, BLOCK_N):
        offs_s = start + offs_n
        mask_s = offs_s < total
        mask_before = selected_to[None, :] <= offs_s[:, None]  # (BLOCK_N, BLOCK_W * 32)
        j = (offs_s + tl.sum(tl.where(mask_before, n_skipped[None, :], 0), axis=1)).to(tl.int64)
        if order_ptr is not None:
            j = tl.load(order_ptr + b * n_key + j, mask=mask_s, other=0).to(tl.int64)
        # (BLOCK_N, BLOCK_D)
        mask_sd = mask_s[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + j[:, None] * k_strides[2], mask=mask_sd, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + j[:, None] * v_strides[2], mask=mask_sd, other=0.0).to(tl.float32)
        s = tl.where(mask_s, tl.sum(q[None, :] * k, axis=1), -float("inf"))
        # -- online softmax
        m_new = tl.maximum(m_i, tl.max(s, axis=0))
        p_s, alpha = tl.exp2(s - m_new), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p_s, axis=0), m_new
        acc = acc * alpha + tl.sum(p_s[:, None] * v, axis=0)
    acc = acc / tl.where(l_i == 0, 1.0, l_i)
    tl.store(o_ptr + pid_bh * D + offs_d, acc.to(o_ptr.dtype.element_ty), mask=mask_d)


def _sparse_attention_step(q, k, v, bits, seen, row, order, softmax_scale, width):
    (B, H, _, D), (Hkv, S), (R, words) = q.shape, k.shape[1:3], bits.shape[2:]
    o = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    _sparse_attention_step_kernel[(B * H,)](
        q, k, v, bits, seen, row, order, o, q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(),
        H=H, R=R, n_key=S, qk_scale=softmax_scale * LOG2_E.value, GROUP=H // Hkv, D=D, WIDTH=width,
        **_step_tiles(words, D))
    return o


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bits, seen, row, softmax_scale, width):
        o, lse = _sparse_attention_fwd(q, k, v, bits, seen, row, softmax_scale, width)
        ctx.save_for_backward(q, k, v, o, lse, bits, seen, row)
        ctx.constants = softmax_scale, width
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, bits, seen, row = ctx.saved_tensors
        return *_sparse_attention_bwd(q, k, v, o, lse, do, bits, seen, row, *ctx.constants), *[None] * 5


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CellBits, seen: Tensor,
                     softmax_scale: float | None = None, *, row: Tensor | None = None,
                     order: Tensor | None = None) -> Tensor:
    """sea.sparse_attention. mask may also be CellBits, which saves packing it.

    Gradients reach q, k and v and are summed in a fixed order: bit-equal from run to run.
    """
    _expect(len(mask.shape) == 4, "mask", "shape (B, H, R, width)", tuple(mask.shape))
    _check_attention(q, k, v, seen, order)
    B, H, T, D = q.shape
    _expect(row is not None or mask.shape[2] == T, "mask", f"{T} rows, or `row` to say which is whose",
            mask.shape[2])
    _expect(row is None or row.shape == (B, T), "row", f"shape (B, T) = {(B, T)}",
            None if row is None else tuple(row.shape))
    _expect(mask.shape[:2] == (B, H), "mask", f"shape (B, H, R, width) with B, H = {(B, H)}",
            tuple(mask.shape))
    _expect(mask.shape[3] <= MAX_WIDTH, "mask", f"a width of at most {MAX_WIDTH}", mask.shape[3])
    row, order = (None if x is None else x.contiguous() for x in (row, order))
    cells = mask if isinstance(mask, CellBits) else pack_mask(mask)
    bits, seen = cells.bits.contiguous(), seen.contiguous()
    scale = float(D**-0.5 if softmax_scale is None else softmax_scale)
    with torch.cuda.device_of(q):
        if _is_step(q):
            return _sparse_attention_step(q, k, v, bits, seen, row, order, scale, cells.width)
        if order is not None:
            k, v = _in_order(k, v, seen, order)
        return _SparseAttention.apply(q, k, v, bits, seen, row, scale, cells.width)


# -- teacher attention pooled to cells ---------------------------------------------------------------


class PooledAttention(NamedTuple):
    """As sea.PooledAttention."""

    cells: Tensor  # (B, H, T, width), sum of A over the keys of each cell
    a_log_a: Tensor  # (B, H, T), sum of A log A
    a_square: Tensor  # (B, H, T), sum of A^2
    n_keys: int


def _pool_tiles(dtype: torch.dtype, d_head: int) -> dict:
    """Larger tiles than in sparse attention, since a tile meets all keys; in fp32 small ones, as there."""
    block_d = max(16, _next_power_of_2(d_head))
    if dtype == torch.float32:
        block_n = 16 if d_head > 64 else 32
        return dict(BLOCK_M=16, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=1)
    return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_D=block_d, num_warps=4, num_stages=2)


@triton.jit
def _dense_scores(q, k_ptr, k_stride, j, t, n_key, mask_d, qk_scale):
    """Scores of keys j, (BLOCK_M, BLOCK_N), and which of them count."""
    mask_n = j < n_key
    # (BLOCK_N, BLOCK_D)
    k = tl.load(k_ptr + j[:, None].to(tl.int64) * k_stride, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    return s, mask_n[None, :] & (j[None, :] < t[:, None])


@triton.jit
def _add_in_cell(a, is_first_a, b, is_first_b):
    """Running sums that begin again at each first key of a cell."""
    return tl.where(is_first_b != 0, b, a + b), is_first_a | is_first_b


# A = softmax(q k^T * softmax_scale) over the keys seen; cells = sum of A over each cell's keys;
# a_log_a, a_square = sums of each row. The sums hold keys FIRST ... in_cells - 1. Cells are cells of
# in_cells / UNIT_KEYS units of neighbouring keys.
# One program: BLOCK_M queries, twice over all their keys, for the lse and then A; grid
# (cdiv(T, BLOCK_M) * B * H,).
#   q (B, H, T, D), k (B, Hkv, S, D), any strides; seen, in_cells (B, T) int
#   cells (B, H, T, width) fp32, zeros, since cells without keys are not written
#   a_log_a, a_square (B, H, T) fp32
# The keys of a cell are neighbours: their sum is a running sum that begins again at each cell, is carried
# from block to block and is written at the cell's last key. Each cell has one writer: deterministic, no
# atomics. fp32: scores and all sums. Writes T x width, where eager writes several T x S.
# Limits: MAX_D_HEAD. Reference: sea.pool_attention.
@triton.jit
def _pool_attention_kernel(q_ptr, k_ptr, seen_ptr, in_cells_ptr, cells_ptr, a_log_a_ptr, a_square_ptr,
                           q_strides, k_strides, H, T, n_key, qk_scale, GROUP: tl.constexpr, D: tl.constexpr,
                           WIDTH: tl.constexpr, UNIT_KEYS: tl.constexpr, FIRST: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    n_tile = tl.cdiv(T, BLOCK_M)
    pid_m, pid_bh = _program(n_tile)
    pid_m = n_tile - 1 - pid_m  # causal: the longest first
    b, h = pid_bh // H, pid_bh % H
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < T, offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    t = tl.load(seen_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    in_cells = tl.load(in_cells_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    n_unit = in_cells // UNIT_KEYS
    end = tl.minimum(tl.max(t, axis=0), n_key)
    # (BLOCK_M, BLOCK_D)
    q = tl.load(_head_rows(q_ptr, q_strides, b, h, offs_m, offs_d), mask=mask_md, other=0.0)
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1] + offs_d[None, :] * k_strides[3]

    m_i, l_i = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, end, BLOCK_N):
        s, mask_mn = _dense_scores(q, k_ptr, k_strides[2], start + offs_n, t, n_key, mask_d=mask_d,
                                   qk_scale=qk_scale)
        s = tl.where(mask_mn, s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        l_i, m_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), axis=1), m_new
    lse = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i))

    offs_bhm = pid_bh * T + offs_m
    a_log_a, a_square = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    carry = tl.zeros((BLOCK_M,), tl.float32)  # sum of the cell that the previous block left unfinished
    for start in range(0, tl.minimum(end, tl.max(in_cells, axis=0)), BLOCK_N):
        j = start + offs_n
        s, mask_mn = _dense_scores(q, k_ptr, k_strides[2], j, t, n_key, mask_d=mask_d, qk_scale=qk_scale)
        mask_mn &= j[None, :] < in_cells[:, None]
        log_a = tl.where(mask_mn, s - lse[:, None], 0.0)
        a = tl.where(mask_mn & (j >= FIRST)[None, :], tl.exp2(log_a), 0.0)
        a_log_a += tl.sum(a * log_a, axis=1)
        a_square += tl.sum(a * a, axis=1)
        # -- the remainder of the division by 2 n_unit grows by 2 width a unit: which tells a cell's ends
        cell, rest = _cell_of_key(n_unit[:, None], (j // UNIT_KEYS)[None, :], WIDTH)
        is_first = ((rest < 2 * WIDTH) & (j % UNIT_KEYS == 0)[None, :]).to(tl.int32)
        mask_last = (rest + 2 * WIDTH >= 2 * n_unit[:, None]) & ((j + 1) % UNIT_KEYS == 0)[None, :]
        mask_last |= (j + 1 >= n_key)[None, :]
        in_cell, has_begun = tl.associative_scan((a, is_first), 1, _add_in_cell)
        in_cell += tl.where(has_begun != 0, 0.0, carry[:, None])
        tl.store(cells_ptr + offs_bhm[:, None] * WIDTH + cell, in_cell, mask=mask_mn & mask_last)
        carry = tl.sum(tl.where((offs_n == BLOCK_N - 1)[None, :], in_cell, 0.0), axis=1)
    # -- write back
    tl.store(a_log_a_ptr + offs_bhm, a_log_a * LN_2, mask=mask_m)  # from log2
    tl.store(a_square_ptr + offs_bhm, a_square, mask=mask_m)


def pool_attention(q: Tensor, k: Tensor, seen: Tensor, width: int,
                   softmax_scale: float | None = None, *, in_cells: Tensor | None = None, unit: int = 1,
                   first: int = 0) -> PooledAttention:
    """sea.pool_attention, without gradient; in_cells is a multiple of unit."""
    _check_tensor("q", q, 4, "(B, H, T, D)")
    _check_tensor("k", k, 4, "(B, Hkv, S, D)")
    _expect(k.dtype == q.dtype and k.device == q.device, "k", f"{q.dtype} on {q.device} as q",
            f"{k.dtype} on {k.device}")
    _check_qk(q, k, seen)
    _expect(isinstance(width, int) and width >= 1, "width", "an integer >= 1", width)
    in_cells = seen if in_cells is None else in_cells
    _expect(in_cells.shape == seen.shape, "in_cells", f"shape (B, T) = {tuple(seen.shape)}",
            tuple(in_cells.shape))
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    scale, tiles = D**-0.5 if softmax_scale is None else softmax_scale, _pool_tiles(q.dtype, D)
    cells = torch.zeros(B, H, T, width, dtype=torch.float32, device=q.device)
    a_log_a, a_square = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        _pool_attention_kernel[(_cdiv(T, tiles["BLOCK_M"]) * B * H,)](
            q, k, seen.contiguous(), in_cells.contiguous(), cells, a_log_a, a_square, q_strides=q.stride(),
            k_strides=k.stride(), H=H, T=T, n_key=S, qk_scale=scale * LOG2_E.value, GROUP=H // Hkv, D=D,
            WIDTH=width, UNIT_KEYS=unit, FIRST=first, **tiles)
    return PooledAttention(cells, a_log_a, a_square, S)


# -- what the kernels can run ------------------------------------------------------------------------


@functools.cache
def supports(config, dtype: torch.dtype) -> str | None:
    """None if the kernels can run a layer of this sea.SEAConfig on inputs of this dtype, else the reason."""
    if dtype not in DTYPES:
        return f"dtype {dtype}: float32, float16 or bfloat16 only"
    if config.has_bins and config.group not in BIN_GROUPS:
        return f"group {config.group} with bins: one of {BIN_GROUPS} only, since each chooser ranks its own"
    D, m, width = config.d_head, config.n_features, config.width
    limits = [
        ("d_head", D, MAX_D_HEAD, "tiles of queries and keys must fit into registers"),
        ("width", width, MAX_WIDTH, "its square has to fit into 32 bits"),
    ]
    if not config.has_bins:
        heads = config.n_head if config.group == "causal_batch" else 1
        tiles = _select_tiles(heads, width)
        n_ranked = tiles["BLOCK_H"] * tiles["BLOCK_P"]
        limits += [(f"n_head x width = {heads} x {width}, padded to powers of two,", n_ranked, MAX_RANKED,
                    "one program ranks all cells that compete")]
    else:
        if config.cnn:
            _, n_candidate = _candidates(config, config.topk, width, config.max_positions)
        else:  # a sequence of any length
            n_candidate = config.candidates * config.n_chosen(config.topk)
        limits += [(f"candidates of topk {config.topk},", n_candidate, MAX_CANDIDATES,
                    "one program ranks them all")]
    if config.causal and config.cnn:  # the bidirectional estimator has no kernels
        quarter = _cdiv(width, 4)
        n_sums = max(64, _next_power_of_2(m)) * max(64, _next_power_of_2(D))
        n_weights = _next_power_of_2(2 * D) * max(64, _next_power_of_2(quarter))
        limits += [
            ("query_stride", config.query_stride, MAX_STRIDE, "a row and its keys must fit into one chunk"),
            ("n_features", m, MAX_FEATURES, "a program holds them all (a larger nbf gives fewer)"),
            (f"n_features x d_head = {m} x {D}, padded to powers of two,", n_sums, MAX_SUMS[dtype],
             f"in {dtype} the sums of linear attention must fit into shared memory"),
            (f"2 d_head x width / 4 = {2 * D} x {quarter}, padded to powers of two,", n_weights, MAX_DECODER,
             "the decoder's weights must fit into shared memory"),
        ]
    if config.causal:
        limits.append(("width with cell_keys", width * config.cell_keys, MAX_WIDTH_CELL_KEYS,
                       "the cells of a row must fit into registers"))
    for name, value, most, reason in limits:
        if value > most:
            return f"{name} {value}: at most {most}, since {reason}"
    return None


# -- beside Hugging Face's package of the same name --------------------------------------------------


def __getattr__(name: str):
    """Look up missing names in Hugging Face's package of the same name, if it is installed.

    transformers asks for `kernels` while it is imported, finds this file first, and fails if its names are
    missing. The package is loaded under another name; as its __package__ stays "kernels", what it imports
    from itself is found through our __path__ (which is its folder) and exists once.
    """
    try:
        init = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    if name == "__path__" and __name__ == "kernels":
        return [str(init.parent)]
    if name == "__version__" and __name__ == "kernels":  # bitsandbytes asks
        return importlib.metadata.version("kernels")
    if name.startswith("__") or __name__ != "kernels":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = sys.modules.get("_hf_kernels")
    if package is None:
        spec = importlib.util.spec_from_file_location(
            "_hf_kernels", init, submodule_search_locations=[str(init.parent)])
        package = sys.modules["_hf_kernels"] = importlib.util.module_from_spec(spec)
        package.__package__ = "kernels"
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules["_hf_kernels"]
            raise
    return getattr(package, name)
