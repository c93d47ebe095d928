"""SEA on the GPU: the operations of sea.py that cost time, in Triton, forward and backward.

Here are masks as bits, selection, sparse attention and the pooled attention of a teacher; estimator_kernels.py has the
estimator's, which this file hands on. Same names, signatures and results as in sea.py, whose docstrings say what each
computes, and whose glossary says what the letters mean. Copy the two files away and they work: they need torch and Triton
only. Layout is (B, H, T, D). Softmax statistics, sums and accumulators are fp32 whatever the input is; inputs are fp16, bf16
or fp32 and may be strided.

A mask of cells is packed to one bit a cell (CellBits): 32 bytes a query and head at width 256. It is never expanded.

One query a sequence, without gradient, is a decoding step: it lasts as long as its launches and their latencies, so most
operations have a kernel of their own for it, one launch each, that leaves tiles, chunks and segments out.
"""

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

from estimator_kernels import (_cdiv, _check_tensor, _expect, _is_step, _next_power_of_2, _vector, add_cell_keys, causal_cnn,
                               causal_context, encode_rows, mix_average)

# Gradients of k and v: True adds them up in a fixed order, bit-equal from run to run; False uses atomic additions.
DETERMINISTIC = True

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; with -inf, exp2 of (-inf) - (-inf) would be nan

# -- masks of cells, packed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellBits:
    """A mask of cells, one bit each: cell p is bit p % 32 of word p // 32, and bits from width on are 0. Stands for a bool mask
    (B, H, R, width)."""

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
# One program: BLOCK words of all rows in line, (BLOCK, 32) cells; grid (cdiv(N * words, BLOCK),).
# mask (N, width) int8 contiguous -> bits (N, words) int32. Reads a byte a cell, writes a bit. Reference: unpack_mask.
@triton.jit
def _pack_kernel(mask_ptr, bits_ptr, n_word, WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_bit = tl.arange(0, 32)
    cell = (word % WORDS)[:, None] * 32 + offs_bit[None, :]  # (BLOCK, 32)
    there = (word < n_word)[:, None] & (cell < WIDTH)
    on = tl.load(mask_ptr + (word // WORDS)[:, None] * WIDTH + cell, mask=there, other=0).to(tl.int32)
    tl.store(bits_ptr + word, tl.sum(on << offs_bit[None, :], axis=1), mask=word < n_word)


def pack_mask(mask: Tensor) -> CellBits:
    """bool (B, H, R, width) -> CellBits."""
    _expect(mask.ndim == 4 and mask.dtype == torch.bool, "mask", "bool of shape (B, H, R, width)",
            f"{mask.dtype} {tuple(mask.shape)}")
    width = mask.shape[-1]
    bits = torch.empty(*mask.shape[:3], _cdiv(width, 32), dtype=torch.int32, device=mask.device)
    _pack_kernel[(_cdiv(bits.numel(), 128),)](mask.contiguous().view(torch.int8), bits, bits.numel(), WIDTH=width,
                                              WORDS=bits.shape[-1], BLOCK=128)
    return CellBits(bits, width)


def unpack_mask(cells: CellBits) -> Tensor:
    """CellBits -> bool (B, H, R, width)."""
    on = (cells.bits[..., None] >> torch.arange(32, device=cells.bits.device, dtype=torch.int32)) & 1
    return on.flatten(-2)[..., : cells.width].bool()


# -- grouped top-k -----------------------------------------------------------------------------------------------------


@triton.jit
def _order(x):
    """An integer that orders as the float x does: its bits, with those of negative ones turned round."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(order):
    """The float that _order gave this integer."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# The best n = round(HEADS * topk * width / seen) of the HEADS x width cells of one query, as bits; ties to the lower index.
# One program: the cells that compete, all in registers; grid (R, B * H / HEADS).
#   x (B, H, R, width), any strides: probabilities, or scores if SOFTMAX; seen (B, R) int -> bits (B, H, R, words) int32
# The order of floats is that of their bits as integers, so the n-th largest is found by bisection over integers: exact, no
# sort. SOFTMAX ranks logarithms, whose bisection is shorter. Reads x once and writes a bit a cell, where eager writes the
# softmax, sorts it and keeps an int64 index a cell. Limits: HEADS * width, each padded to a power of two, <= 32768.
# Reference: sea.topk_mask, bit for bit given the same probabilities; SOFTMAX, in fp32, may order cells closer than its
# rounding differently.
@triton.jit
def _select_kernel(x_ptr, seen_ptr, bits_ptr, x_stride, H, R, budget, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                   WORDS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, SOFTMAX: tl.constexpr):
    r, first = tl.program_id(0), tl.program_id(1) * HEADS
    b, h = (first // H).to(tl.int64), first % H
    offs_h, offs_p = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    there = (offs_h < HEADS)[:, None] & (offs_p < WIDTH)[None, :]
    # (BLOCK_H, BLOCK_P)
    x_ptr += b * x_stride[0] + (h + offs_h)[:, None].to(tl.int64) * x_stride[1] + r.to(tl.int64) * x_stride[2]
    x = tl.load(x_ptr + offs_p[None, :] * x_stride[3], mask=there, other=-float("inf")).to(tl.float32)
    top = tl.maximum(tl.max(x, axis=1), LOWEST)
    if SOFTMAX:  # its logarithm
        lse = top + tl.log(tl.maximum(tl.sum(tl.exp2((x - top[:, None]) * 1.4426950408889634), axis=1), 1.0))
        x, top = x - lse[:, None], top - lse
    high = _order(tl.max(tl.where(offs_h < HEADS, top, -float("inf")), axis=0)) + 1
    low = tl.minimum(_order(tl.min(tl.min(tl.where(there, x, float("inf")), axis=1), axis=0)), high - 1)  # above it with NaN only
    x = tl.reshape(tl.where(there, x, float("nan")), (BLOCK_H * BLOCK_P,))  # reaches nothing

    # -- bisection: `low` is reached by `count` >= n cells, `high` by fewer than n
    seen = tl.load(seen_ptr + b * R + r).to(tl.int64)
    t = tl.maximum(seen, 1)
    n = tl.minimum(tl.maximum((budget + t) // (2 * t), 1), HEADS * WIDTH).to(tl.int32)
    count = n * 0 + HEADS * WIDTH
    while (count != n) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, and low + high may not fit
        reached = tl.sum(tl.where(x >= _float(middle), 1.0, 0.0), axis=0).to(tl.int32)  # faster than of integers
        enough = reached >= n
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
    least = _float(low)
    keep = x >= least
    if count != n:  # more cells than wanted equal the n-th largest
        tie = x == least
        n_tie = n - tl.sum((x > least).to(tl.int32), axis=0)
        keep = (x > least) | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= n_tie))

    # -- pack, (BLOCK_H * BLOCK_P / 32, 32) cells
    on = tl.reshape((keep & (seen > 0)).to(tl.int32), (BLOCK_H * BLOCK_P // 32, 32)) << tl.arange(0, 32)[None, :]
    word = tl.arange(0, BLOCK_H * BLOCK_P // 32)
    h_word, word = word // (BLOCK_P // 32), word % (BLOCK_P // 32)
    bits_ptr += ((b * H + h + h_word) * R + r) * WORDS + word
    tl.store(bits_ptr, tl.sum(on, axis=1), mask=(h_word < HEADS) & (word < WORDS))


def _select(x: Tensor, seen: Tensor, topk: int, group: str, softmax: bool) -> CellBits:
    """topk_mask, packed. With `softmax`, x holds scores, and their softmax over cells is computed on the way."""
    _check_tensor("probs", x, 4, "(B, H, T, width)")
    B, H, R, width = x.shape
    _expect(seen.shape == (B, R), "seen", f"shape (B, T) = {(B, R)}", tuple(seen.shape))
    _expect(isinstance(topk, int) and topk >= 1, "topk", "an integer >= 1", topk)
    groups = ("causal_batch", "query", "head", "batch")
    _expect(group in groups, "group", f"one of {groups}", repr(group))
    x, topk = x.detach(), min(topk, 2**31)  # more keeps everything, and would not fit into 64 bits
    if group in groups[2:]:
        # Not worth a kernel: bidirectional, so T is moderate, and T x width cells that compete fit into no program.
        visible = (seen > 0)[:, None, :, None]
        ranked = (x.float().softmax(-1) if softmax else x).masked_fill(~visible, -1).flatten(2 if group == "head" else 1)
        n = topk * width * (H if group == "batch" else 1)
        first_n = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, first_n, True)
        return pack_mask(keep.view(x.shape) & visible)
    heads = H if group == "causal_batch" else 1
    block_h, block_p = _next_power_of_2(heads), max(32, _next_power_of_2(width))
    _expect(block_h * block_p <= 32768, "probs", "at most 32768 cells that compete, heads and width padded to powers of two",
            block_h * block_p)
    bits = torch.empty(B, H, R, _cdiv(width, 32), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _select_kernel[(R, B * H // heads)](x, seen.contiguous(), bits, x.stride(), H, R, 2 * heads * topk * width, HEADS=heads,
                                            WIDTH=width, WORDS=bits.shape[3], BLOCK_H=block_h, BLOCK_P=block_p, SOFTMAX=softmax,
                                            num_warps=min(max(block_h * block_p // 1024, 1), 16))
    return CellBits(bits, width)


def select_cells(scores: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> CellBits:
    """sea.select_cells, packed: topk_mask of softmax(scores)."""
    return _select(scores, seen, topk, group, softmax=True)


def topk_mask(probs: Tensor, seen: Tensor, topk: int, group: str = "causal_batch") -> Tensor:
    """sea.topk_mask, bit for bit, ties included. select_cells gives the same as bits, which sparse_attention takes."""
    return unpack_mask(_select(probs, seen, topk, group, softmax=False))


# -- sparse attention --------------------------------------------------------------------------------------------------
#
# The queries of one head are cut into tiles of BLOCK_M, the keys into units of UNIT. A plan says which units a tile has to
# visit: those under the union of its queries' cells, as runs of neighbouring units that do not overlap. A tile walks each run
# from its first key, a block of BLOCK_N keys at a time, so that a cell of a block's width costs one, wherever it lies. Each
# (query, key) pair is met at most once, and where cells are narrower than a block (early causal queries) a tile becomes an
# ordinary dense one. Inside a block, a query's own bits decide. Work and memory are linear in T for a constant budget.
#
# To find out which keys of a block a query keeps would cost more than the block's products: a division and a load for each pair.
# But a query that sees t >= width keys has at most 32 cells over 32 keys. The bits of these, a window, are shifted out of its
# words once a block, and key number i of the block is in the cell of the window that place + step * i rounds to. Only the first
# few tiles do without windows.


def _attention_tiles(dtype: torch.dtype, d_head: int) -> dict:
    """Tile sizes and launch options of the attention kernels. Sizes >= 16, as tl.dot wants; BLOCK_N <= 32, as windows are. With one
    warp a row's maximum and its probabilities need not leave it."""
    if dtype == torch.float32:  # "ieee" dots run without tensor cores: small tiles keep them in registers
        return dict(BLOCK_M=16, BLOCK_N=16 if d_head > 64 else 32, num_warps=4, num_stages=1)
    return dict(BLOCK_M=16, BLOCK_N=32, num_warps=1 if d_head <= 128 else 4, num_stages=3)


UNIT = tl.constexpr(8)  # keys
GAP = tl.constexpr(2)  # units between runs that are walked through: on average, half of a run's last block is waste
MOST_KEYS = tl.constexpr(2**20)  # of a query with windows: so far fp32 is exact enough
PAIRS_PER_PROGRAM = 32  # (tile, key block) pairs that one program of the dk, dv kernel adds up, at least
VISITORS = 256  # tiles that it looks through at a time


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _first_key(p, t, WIDTH: tl.constexpr):
    """lo(p) = (2 t p + width) // (2 width). t in two parts, since 2 t p passes 2^31 at t = 1M, width 1024."""
    return t // (2 * WIDTH) * 2 * p + (t % (2 * WIDTH) * 2 * p + WIDTH) // (2 * WIDTH)


@triton.jit
def _cells_a_key(t, WIDTH: tl.constexpr):
    return WIDTH / tl.maximum(t, 1).to(tl.float32)


@triton.jit
def _cell_of_key(t, j, WIDTH: tl.constexpr):
    """cell(j, t) = ((2 j + 1) width - 1) // (2 t), and what is left of that division. Shapes broadcast.

    Without the slow integer division: an fp32 guess, wrong by at most one, and its exact remainder. The products may wrap
    around int32; the remainder is small, so it is right nevertheless.
    """
    cell = ((j.to(tl.float32) + 0.5) * _cells_a_key(t, WIDTH)).to(tl.int32)
    rest = (2 * j + 1) * WIDTH - 1 - cell * (2 * t)
    step = (rest >= 2 * t).to(tl.int32) - (rest < 0).to(tl.int32)
    return cell + step, rest - step * (2 * t)


@triton.jit
def _is_kept(words_ptr, t, j, n_key, WIDTH: tl.constexpr):
    """Whether a query that sees t keys keeps key j: bit cell(j, t) of its mask row at words_ptr. Shapes broadcast."""
    cell, _ = _cell_of_key(t, j, WIDTH)
    word = tl.load(words_ptr + (cell >> 5), mask=(j < t) & (j < n_key), other=0)
    return ((word >> (cell & 31)) & 1) != 0


@triton.jit
def _has_windows(t, WIDTH: tl.constexpr):
    """Whether all queries of a tile have windows."""
    return (tl.min(tl.where(t > 0, t, WIDTH), axis=0) >= WIDTH) & (tl.max(t, axis=0) <= MOST_KEYS)


@triton.jit
def _window(words_ptr, t, j, step, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Mask bits of the 32 cells from cell(j, t) on, 0 past the last, and the place of key j's middle among them, less 1/2."""
    cell, rest = _cell_of_key(t, j, WIDTH)
    word = cell >> 5
    low = tl.load(words_ptr + word, mask=j < t, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(words_ptr + word + 1, mask=(j < t) & (word + 1 < WORDS), other=0).to(tl.int64)
    place = (2 * rest + 1 - 2 * t).to(tl.float32) * (step * (0.25 / WIDTH))
    return (((high << 32) | low) >> (cell & 31)).to(tl.int32), place


@triton.jit
def _in_window(window, place, step, i, there):
    """Whether key number i of the block is kept and `there`. Shapes broadcast."""
    cell = (place + step * i.to(tl.float32) + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23: rounds, to the low bits
    return ((window >> (cell & 31)) & there.to(tl.int32)) != 0


@triton.jit
def _kept(words_ptr, t, window, place, step, i, j, n_key, WINDOWS: tl.constexpr, WIDTH: tl.constexpr):
    """Which keys j, number i of a block, each query of a tile keeps, (BLOCK_M, BLOCK_N)."""
    if WINDOWS:
        return _in_window(window[:, None], place[:, None], step[:, None], i[None, :], (j < n_key)[None, :])
    else:
        return _is_kept(words_ptr[:, None], t[:, None], j[None, :], n_key, WIDTH)


# The keys that each tile of queries visits.
# One program: one tile; grid (n_tile, B * H), n_tile = cdiv(T, BLOCK_M).
#   bits (B, H, R, words) int32; seen (B, T) int; row (B, T) int or None: query i uses row i
#   runs (B * H * n_tile, max_runs + 1, 2) int32: first unit and end of each run, ascending, more than GAP units apart; then
#   unit 0, for those who read ahead
#   steps (B * H * n_tile,) int32: blocks in all
#   union (B * H * n_tile, words + 2) int32, or None: the words of the tile's union of cells, its shortest and longest seen
# A cell p of the union covers keys lo(p) of the tile's shortest query to lo(p+1) of its longest. Adjacent cells always
# join, so max_runs = cdiv(width, 2) is enough: 8 bytes of runs for 2 cells of a tile. Reads the bits once.
@triton.jit
def _plan_kernel(bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, union_ptr, H, T, R, n_key, max_runs, WIDTH: tl.constexpr,
                 WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    pid_m, pid_bh = tl.program_id(0), tl.program_id(1)
    tile = pid_bh * tl.num_programs(0) + pid_m
    at = (pid_bh // H).to(tl.int64) * T + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_t = pid_m * BLOCK_M + tl.arange(0, BLOCK_M) < T
    t = tl.load(seen_ptr + at, mask=in_t, other=0).to(tl.int32)
    if row_ptr is None:
        row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        row = tl.load(row_ptr + at, mask=in_t, other=0).to(tl.int32)
    t_max = tl.max(t, axis=0)
    t_min = tl.min(tl.where(t > 0, t, t_max), axis=0)

    # -- union of the words, and the same moved up by one cell
    offs_w = tl.arange(0, BLOCK_W)
    words_ptr = bits_ptr + (pid_bh.to(tl.int64) * R + row)[:, None] * WORDS + offs_w[None, :]  # (BLOCK_M, BLOCK_W)
    used = (t > 0)[:, None] & (offs_w < WORDS)[None, :]
    word = tl.reduce(tl.load(words_ptr, mask=used, other=0), 0, _or)  # (BLOCK_W,)
    last = tl.reduce(tl.load(words_ptr - 1, mask=used & (offs_w > 0)[None, :], other=0), 0, _or)
    before = (word << 1) | ((last >> 31) & 1)
    if union_ptr is not None:
        union_ptr += tile.to(tl.int64) * (WORDS + 2)
        tl.store(union_ptr + offs_w, word, mask=offs_w < WORDS)
        tl.store(union_ptr + WORDS, t_min)
        tl.store(union_ptr + WORDS + 1, t_max)
    p = tl.arange(0, BLOCK_W * 32)
    on = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK_W * 32,))
    on_before = tl.reshape((before[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK_W * 32,))

    # -- units of each cell that is on and covers a key
    begin, end = _first_key(p, t_min, WIDTH), tl.minimum(_first_key(p + 1, t_max, WIDTH), n_key)
    on = (on != 0) & (p < WIDTH) & (begin < end)
    begin_before, end_before = _first_key(p - 1, t_min, WIDTH), tl.minimum(_first_key(p, t_max, WIDTH), n_key)
    on_before = (on_before != 0) & (p <= WIDTH) & (begin_before < end_before)
    begin = begin // UNIT
    end = tl.where(on, (end + UNIT - 1) // UNIT, 0)
    end_before = tl.where(on_before, (end_before + UNIT - 1) // UNIT, 0)
    covered = tl.associative_scan(end_before, 0, _max)  # end of all cells before p; 0 if none is on

    # -- a run begins at a cell that leaves a gap; there, too, the run before it ends
    new = on & ((begin > covered + GAP) | (covered == 0))
    run = tl.cumsum(new.to(tl.int32), axis=0) - 1
    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    tl.store(runs_ptr + run * 2, begin, mask=new)
    tl.store(runs_ptr + run * 2 - 1, covered, mask=new & (run > 0))
    n_run, last_end = tl.sum(new.to(tl.int32), axis=0), tl.max(end, axis=0)
    tl.store(runs_ptr + n_run * 2 - 1, last_end, mask=n_run > 0)
    tl.store(runs_ptr + n_run * 2, 0)
    # -- blocks: a run's first unit and end are in the hands of different threads
    tl.debug_barrier()
    run = tl.arange(0, BLOCK_W * 16)
    size = tl.load(runs_ptr + run * 2 + 1, mask=run < n_run, other=0) - tl.load(runs_ptr + run * 2, mask=run < n_run, other=0)
    tl.store(steps_ptr + tile, tl.sum((size * UNIT + BLOCK_N - 1) // BLOCK_N, axis=0))


@triton.jit
def _next_block(runs_ptr, unit, end, words_ptr, t, step, WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The walk over a tile's runs, without a branch: the pointer to the run, the first unit of the block to visit, the run's end,
    and the block's window, whose loads end while other programs work."""
    jump = unit + BLOCK_N // UNIT >= end
    runs_ptr += tl.where(jump, 2, 0)
    following = tl.load(runs_ptr, mask=jump, other=0)
    end = tl.where(jump, tl.load(runs_ptr + 1, mask=jump, other=0), end)
    unit = tl.where(jump, following, unit + BLOCK_N // UNIT)
    window, place = _window(words_ptr, t, unit * UNIT, step, WIDTH, WORDS)
    return runs_ptr, unit, end, window, place


@triton.jit
def _attend(q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
            WINDOWS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Maximum and sum of the softmax, (BLOCK_M,), and its product with v, (BLOCK_M, BLOCK_D), over a tile's blocks."""
    offs_n = tl.arange(0, BLOCK_N)
    m_i = tl.full((q.shape[0],), LOWEST, tl.float32)
    l_i = tl.zeros((q.shape[0],), tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    unit, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    step = _cells_a_key(t, WIDTH)
    window, place = _window(words_ptr, t, unit * UNIT, step, WIDTH, WORDS)
    for _ in range(n_step):
        j, first = unit * UNIT + offs_n, unit.to(tl.int64) * UNIT
        n_run_key = tl.minimum(end * UNIT, n_key)  # the block may reach into the next run
        mask_n = (j < n_key)[:, None] & mask_d[None, :]
        # -- scores, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + first * K_ROW, mask=mask_n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        keep = _kept(words_ptr, t, window, place, step, offs_n, j, n_run_key, WINDOWS, WIDTH)
        s = tl.where(keep, s, -float("inf"))
        # -- online softmax
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p, axis=1), m_new
        v = tl.load(v_ptr + first * V_ROW, mask=mask_n, other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        runs_ptr, unit, end, window, place = _next_block(runs_ptr, unit, end, words_ptr, t, step, WIDTH, WORDS, BLOCK_N)
    return m_i, l_i, acc


# o = softmax(q k^T * softmax_scale) v over the kept keys; lse = log2 of the sum of 2^(scores * log2 e), +inf if none.
# One program: one tile of BLOCK_M queries, walking its key blocks; grid (B * H * n_tile,).
#   q (B, H, T, D), k and v (B, Hkv, S, D), any strides; bits, seen, row, runs, steps as in _plan_kernel
#   o (B, H, T, D) and lse (B, H, T) fp32, contiguous
# fp32: scores, m_i, l_i, acc. Moves the visited k and v blocks, where eager writes T x S scores and probabilities. Strides between
# keys are constants, so that a block's rows share one address.
# Limits: D padded to a power of two >= 16; tiles in registers, so D <= 256. Reference: sea.sparse_attention.
@triton.jit
def _sparse_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, o_ptr,
                                 lse_ptr, q_stride, k_stride, v_stride, H, T, R, n_key, n_tile, max_runs, qk_scale,
                                 K_ROW: tl.constexpr, V_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                                 WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                 BLOCK_D: tl.constexpr):
    tile = tl.program_id(0)
    pid_bh, pid_m = tile // n_tile, tile % n_tile
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m, offs_n, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < T, offs_d < D
    t = tl.load(seen_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    row = offs_m if row_ptr is None else tl.load(row_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    words_ptr = bits_ptr + (pid_bh.to(tl.int64) * R + row) * WORDS
    # (BLOCK_M, BLOCK_D)
    q_ptr += b * q_stride[0] + h * q_stride[1] + offs_m[:, None].to(tl.int64) * q_stride[2] + offs_d[None, :] * q_stride[3]
    q = tl.load(q_ptr, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    # (BLOCK_N, BLOCK_D), of unit 0
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + offs_n[:, None] * K_ROW + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + h // GROUP * v_stride[1] + offs_n[:, None] * V_ROW + offs_d[None, :] * v_stride[3]

    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    n_step = tl.load(steps_ptr + tile)
    if _has_windows(t, WIDTH):
        m_i, l_i, acc = _attend(q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale, K_ROW, V_ROW, True, WIDTH,
                                WORDS, BLOCK_N)
    else:
        m_i, l_i, acc = _attend(q, k_ptr, v_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale, K_ROW, V_ROW, False, WIDTH,
                                WORDS, BLOCK_N)
    # -- write back
    empty = l_i == 0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(empty, float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    at = pid_bh.to(tl.int64) * T + offs_m
    tl.store(o_ptr + at[:, None] * D + offs_d[None, :], acc.to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])
    tl.store(lse_ptr + at, lse, mask=mask_m)


@triton.jit
def _attend_bwd(q, do, lse, delta, k_ptr, v_ptr, dk_ptr, dv_ptr, t, words_ptr, runs_ptr, n_step, n_key, mask_d, qk_scale,
                softmax_scale, ATOMIC: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr,
                WINDOWS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq / softmax_scale, (BLOCK_M, BLOCK_D) fp32, over a tile's blocks."""
    offs_n = tl.arange(0, BLOCK_N)
    dq = tl.zeros(q.shape, tl.float32)
    unit, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    step = _cells_a_key(t, WIDTH)
    window, place = _window(words_ptr, t, unit * UNIT, step, WIDTH, WORDS)
    for _ in range(n_step):
        j, first = unit * UNIT + offs_n, unit.to(tl.int64) * UNIT
        n_run_key = tl.minimum(end * UNIT, n_key)  # the block may reach into the next run
        mask_n = (j < n_key)[:, None] & mask_d[None, :]
        # -- probabilities again, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + first * K_ROW, mask=mask_n, other=0.0)
        v = tl.load(v_ptr + first * V_ROW, mask=mask_n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        keep = _kept(words_ptr, t, window, place, step, offs_n, j, n_run_key, WINDOWS, WIDTH)
        p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq += tl.dot(ds, k, input_precision="ieee")
        if ATOMIC:
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * softmax_scale
            tl.atomic_add(dk_ptr + first * D, dk, mask=mask_n, sem="relaxed")
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            tl.atomic_add(dv_ptr + first * D, dv, mask=mask_n, sem="relaxed")
        runs_ptr, unit, end, window, place = _next_block(runs_ptr, unit, end, words_ptr, t, step, WIDTH, WORDS, BLOCK_N)
    return dq


# With p = 2^(scores - lse), dp = do v^T, delta = rowsum(o do), ds = p (dp - delta): dq = ds k * softmax_scale.
# One program: the tile and walk of the forward kernel. ATOMIC: adds its share of dk = ds^T q * softmax_scale and
# dv = p^T do as well, in no fixed order.
#   o (B, H, T, D) contiguous, do (B, H, T, D) any strides, lse and delta (B, H, T) fp32, delta is written
#   dq (B, H, T, D) contiguous; dk, dv (B, Hkv, S, D) fp32, contiguous, zeros (ATOMIC only)
# fp32: p, dp, ds, delta, accumulators. Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr,
                                lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride,
                                do_stride, H, T, R, n_key, n_tile, max_runs, qk_scale, softmax_scale, K_ROW: tl.constexpr,
                                V_ROW: tl.constexpr, GROUP: tl.constexpr, ATOMIC: tl.constexpr, D: tl.constexpr,
                                WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                BLOCK_D: tl.constexpr):
    tile = tl.program_id(0)
    pid_bh, pid_m = tile // n_tile, tile % n_tile
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m, offs_n, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < T, offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    t = tl.load(seen_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    row = offs_m if row_ptr is None else tl.load(row_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    words_ptr = bits_ptr + (pid_bh.to(tl.int64) * R + row) * WORDS
    # (BLOCK_M, BLOCK_D)
    q_ptr += b * q_stride[0] + h * q_stride[1] + offs_m[:, None].to(tl.int64) * q_stride[2] + offs_d[None, :] * q_stride[3]
    do_ptr += b * do_stride[0] + h * do_stride[1] + offs_m[:, None].to(tl.int64) * do_stride[2] + offs_d[None, :] * do_stride[3]
    q, do = tl.load(q_ptr, mask=mask_md, other=0.0), tl.load(do_ptr, mask=mask_md, other=0.0)
    at = pid_bh.to(tl.int64) * T + offs_m
    o = tl.load(o_ptr + at[:, None] * D + offs_d[None, :], mask=mask_md, other=0.0)
    lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=mask_m)
    # (BLOCK_N, BLOCK_D), of unit 0
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + offs_n[:, None] * K_ROW + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + h // GROUP * v_stride[1] + offs_n[:, None] * V_ROW + offs_d[None, :] * v_stride[3]
    at_kv = (b * (H // GROUP) + h // GROUP) * n_key * D + offs_n[:, None] * D + offs_d[None, :]

    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    n_step = tl.load(steps_ptr + tile)
    if _has_windows(t, WIDTH):
        dq = _attend_bwd(q, do, lse, delta, k_ptr, v_ptr, dk_ptr + at_kv, dv_ptr + at_kv, t, words_ptr, runs_ptr, n_step, n_key,
                         mask_d, qk_scale, softmax_scale, ATOMIC, K_ROW, V_ROW, D, True, WIDTH, WORDS, BLOCK_N)
    else:
        dq = _attend_bwd(q, do, lse, delta, k_ptr, v_ptr, dk_ptr + at_kv, dv_ptr + at_kv, t, words_ptr, runs_ptr, n_step, n_key,
                         mask_d, qk_scale, softmax_scale, ATOMIC, K_ROW, V_ROW, D, False, WIDTH, WORDS, BLOCK_N)
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at[:, None] * D + offs_d[None, :], dq, mask=mask_md)


@triton.jit
def _visits(union_ptr, tile, there, block, n_key, WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tiles have a cell in their union that reaches into this key block. Yes without a look where a block may hold
    more than 32 cells, among the first few hundred queries: too many visits cost time and change nothing."""
    union_ptr += tile.to(tl.int64) * (WORDS + 2)
    t_min, t_max = tl.load(union_ptr + WORDS, mask=there, other=0), tl.load(union_ptr + WORDS + 1, mask=there, other=0)
    there &= block * BLOCK_N < t_max
    first, _ = _cell_of_key(t_max, block * BLOCK_N, WIDTH)
    last, _ = _cell_of_key(t_min, tl.minimum(block * BLOCK_N + BLOCK_N, n_key) - 1, WIDTH)
    last = tl.minimum(last, WIDTH - 1)
    near = there & (last - first < 32)
    low = tl.load(union_ptr + (first >> 5), mask=near, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(union_ptr + (last >> 5), mask=near & (last >> 5 > first >> 5), other=0).to(tl.int64)
    cells = (((high << 32) | low) >> (first & 31)) << (63 - (last - first))  # from `first` to `last`
    return there & ((last - first >= 32) | (near & (cells != 0)))


# How many tiles visit each key block, and which is the first.
# One program: one key block of one key/value head; grid (n_block, B * Hkv). union as in _plan_kernel
#   -> counts, firsts (B * Hkv, n_block) int32, among the GROUP * n_tile tiles of the heads that share it
# Looks at every tile: quadratic in T, but BLOCK_M * BLOCK_N (query, key) pairs cost one look at four words.
@triton.jit
def _count_visits_kernel(union_ptr, counts_ptr, firsts_ptr, n_tile, n_key, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                         WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    block, pid_bh, of_group = tl.program_id(0), tl.program_id(1), GROUP * n_tile
    count, first = 0, of_group
    for start in range(0, of_group, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        visits = _visits(union_ptr, pid_bh * of_group + tile, tile < of_group, block, n_key, WIDTH, WORDS, BLOCK_N)
        count += tl.sum(visits.to(tl.int32), axis=0)
        first = tl.minimum(first, tl.min(tl.where(visits, tile, of_group), axis=0))
    tl.store(counts_ptr + pid_bh * tl.num_programs(0) + block, count)
    tl.store(firsts_ptr + pid_bh * tl.num_programs(0) + block, first)


@triton.jit
def _add_visitors(dk, dv, tiles_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr, q_stride, do_stride,
                  b, H, T, R, n_key, n_tile, block, mask_d, qk_scale, WINDOWS: tl.constexpr, WIDTH: tl.constexpr,
                  WORDS: tl.constexpr, BLOCK_M: tl.constexpr):
    """dk / softmax_scale and dv of a key block, (BLOCK_N, BLOCK_D), and the shares of the first n tiles of a list."""
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, k.shape[0]), tl.arange(0, k.shape[1])
    j = block * k.shape[0] + offs_n
    for i in range(0, n):
        tile = tl.load(tiles_ptr + i)
        pid_bh, h, m = tile // n_tile, (tile // n_tile % H).to(tl.int64), tile % n_tile * BLOCK_M + offs_m
        mask_m = m < T
        mask_md = mask_m[:, None] & mask_d[None, :]
        of_query = pid_bh.to(tl.int64) * T + m
        t = tl.load(seen_ptr + b * T + m, mask=mask_m, other=0).to(tl.int32)
        row = m if row_ptr is None else tl.load(row_ptr + b * T + m, mask=mask_m, other=0).to(tl.int32)
        words_ptr = bits_ptr + (pid_bh.to(tl.int64) * R + row) * WORDS
        # (BLOCK_M, BLOCK_D)
        q = tl.load(q_ptr + b * q_stride[0] + h * q_stride[1] + m[:, None].to(tl.int64) * q_stride[2]
                    + offs_d[None, :] * q_stride[3], mask=mask_md, other=0.0)
        do = tl.load(do_ptr + b * do_stride[0] + h * do_stride[1] + m[:, None].to(tl.int64) * do_stride[2]
                     + offs_d[None, :] * do_stride[3], mask=mask_md, other=0.0)
        lse = tl.load(lse_ptr + of_query, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + of_query, mask=mask_m, other=0.0)
        # -- probabilities again, (BLOCK_N, BLOCK_M)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        if WINDOWS:
            step = _cells_a_key(t, WIDTH)
            window, place = _window(words_ptr, t, block * k.shape[0], step, WIDTH, WORDS)
            keep = _in_window(window[None, :], place[None, :], step[None, :], offs_n[:, None], (j < n_key)[:, None])
        else:
            keep = _is_kept(words_ptr[None, :], t[None, :], j[:, None], n_key, WIDTH)
        p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk += tl.dot(ds, q, input_precision="ieee")
    return dk, dv


# dk = ds^T q * softmax_scale, dv = p^T do, over the tiles that visit a key block, in the order of the tiles.
# One program: one key block and at most `per_program` of its tiles; grid (bound on the programs,). A block with few tiles is
# written at once; that with many (every query visits a sink) by several programs, to `part`, summed by _sum_parts_kernel.
#   counts, firsts (lists,) as above, list (b * Hkv + hkv) * n_block + block; list_of (programs,) int64: whose work a program
#   shares; part_ends (lists,) int64: running sum of the programs of each list; slots (lists,) int64: the same, of lists with
#   several; per_program_ptr int64; tiles (programs, BLOCK_T) int32: scratch
#   part (slots, 2, BLOCK_N, BLOCK_D) fp32; dk, dv (B, Hkv, S, D) contiguous
# fp32: p, dp, ds, accumulators. Deterministic; no count has to reach the CPU, so that a CUDA graph can hold it.
# Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dkdv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr, union_ptr,
                                  counts_ptr, firsts_ptr, list_of_ptr, part_ends_ptr, slots_ptr, per_program_ptr, tiles_ptr,
                                  part_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride, do_stride, H, T, R, n_key, n_tile,
                                  n_block, n_list, qk_scale, softmax_scale, GROUP: tl.constexpr, D: tl.constexpr,
                                  WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                  BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    pid = tl.program_id(0)
    lst = tl.load(list_of_ptr + pid)
    if lst >= n_list:  # the grid is a bound
        return
    pid_bhkv, block = (lst // n_block).to(tl.int32), (lst % n_block).to(tl.int32)
    b, hkv = (pid_bhkv // (H // GROUP)).to(tl.int64), (pid_bhkv % (H // GROUP)).to(tl.int64)
    per_program, count = tl.load(per_program_ptr).to(tl.int32), tl.load(counts_ptr + lst)
    n_part = tl.maximum((count + per_program - 1) // per_program, 1)
    nth = (pid - (tl.load(part_ends_ptr + lst) - n_part)).to(tl.int32)
    begin, end = nth * per_program, tl.minimum((nth + 1) * per_program, count)
    tiles_ptr += pid.to(tl.int64) * BLOCK_T

    offs_d = tl.arange(0, BLOCK_D)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    mask_n = (j < n_key)[:, None] & mask_d[None, :]
    # (BLOCK_N, BLOCK_D)
    k_ptr += b * k_stride[0] + hkv * k_stride[1] + j[:, None].to(tl.int64) * k_stride[2] + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + hkv * v_stride[1] + j[:, None].to(tl.int64) * v_stride[2] + offs_d[None, :] * v_stride[3]
    k, v = tl.load(k_ptr, mask=mask_n, other=0.0), tl.load(v_ptr, mask=mask_n, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start, before = tl.load(firsts_ptr + lst), 0
    windows = (block * BLOCK_N >= WIDTH) & (n_key <= MOST_KEYS)  # of all queries that see this block
    while (start < GROUP * n_tile) & (before < end):
        # -- list the next visitors, those from the begin-th to the end-th
        at = start + tl.arange(0, BLOCK_T)
        visitor = pid_bhkv * GROUP * n_tile + at
        visits = _visits(union_ptr, visitor, at < GROUP * n_tile, block, n_key, WIDTH, WORDS, BLOCK_N)
        place = before + tl.cumsum(visits.to(tl.int32), axis=0) - 1
        skip = tl.maximum(begin, before)
        tl.debug_barrier()  # everyone has read the list before
        tl.store(tiles_ptr + place - skip, visitor, mask=visits & (place >= skip) & (place < end))
        tl.debug_barrier()
        start, before = start + BLOCK_T, before + tl.sum(visits.to(tl.int32), axis=0)
        n = tl.minimum(before, end) - skip
        if windows:
            dk, dv = _add_visitors(dk, dv, tiles_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr,
                                   q_stride, do_stride, b, H, T, R, n_key, n_tile, block, mask_d, qk_scale, True, WIDTH, WORDS,
                                   BLOCK_M)
        else:
            dk, dv = _add_visitors(dk, dv, tiles_ptr, n, q_ptr, k, v, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr,
                                   q_stride, do_stride, b, H, T, R, n_key, n_tile, block, mask_d, qk_scale, False, WIDTH, WORDS,
                                   BLOCK_M)
    # -- write back
    dk *= softmax_scale
    if n_part == 1:
        at_kv = (pid_bhkv.to(tl.int64) * n_key + j[:, None]) * D + offs_d[None, :]
        tl.store(dk_ptr + at_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_n)
        tl.store(dv_ptr + at_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_n)
    else:
        slot = tl.load(slots_ptr + lst) - n_part + nth
        in_part = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(part_ptr + slot * 2 * BLOCK_N * BLOCK_D + in_part, dk)
        tl.store(part_ptr + (slot * 2 + 1) * BLOCK_N * BLOCK_D + in_part, dv)


# dk, dv of the key blocks that several programs shared: the sum of their parts, in order. Pointers as above.
# One program: one key block; grid (lists,).
@triton.jit
def _sum_parts_kernel(counts_ptr, slots_ptr, per_program_ptr, part_ptr, dk_ptr, dv_ptr, n_key, n_block, D: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    lst, per_program = tl.program_id(0), tl.load(per_program_ptr)
    n_part = (tl.load(counts_ptr + lst) + per_program - 1) // per_program
    if n_part <= 1:
        return
    slot = tl.load(slots_ptr + lst) - n_part
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    part_ptr += slot * 2 * BLOCK_N * BLOCK_D + offs_n[:, None] * BLOCK_D + offs_d[None, :]
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(n_part):
        dk += tl.load(part_ptr + i * 2 * BLOCK_N * BLOCK_D)
        dv += tl.load(part_ptr + (i * 2 + 1) * BLOCK_N * BLOCK_D)
    j = lst % n_block * BLOCK_N + offs_n
    at_kv = ((lst // n_block).to(tl.int64) * n_key + j[:, None]) * D + offs_d[None, :]
    mask_n = (j < n_key)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + at_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_n)
    tl.store(dv_ptr + at_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_n)


# The same for one query a sequence: all selected keys, and no other, in one dense list of `total`.
# One program: one head; grid (B * H,). Key number s of the list has rank s + (keys of the cells skipped before it): of those
# cells p that are off and before which, p included, at most s keys are selected.
#   q (B, H, 1, D), k and v (B, Hkv, S, D), any strides; bits (B, H, R, words), seen and row (B, 1) int, row None for 0
#   order (B, S) int, the place of the key of each rank, or None; o (B, H, 1, D) contiguous
# fp32: everything, no dots: a tile of rows would hold one query. Reads each selected key once, in blocks as wide as
# registers allow, since the longest list of a head (H * topk keys, or a single cell) decides how long this takes. Keys
# from seen on are not touched, whatever they hold. Limits: D <= 256. Reference: sea.sparse_attention.
@triton.jit
def _sparse_attention_step_kernel(q_ptr, k_ptr, v_ptr, bits_ptr, seen_ptr, row_ptr, order_ptr, o_ptr, q_stride, k_stride,
                                  v_stride, H, R, n_key, qk_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                                  WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_bh = tl.program_id(0).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    t = tl.load(seen_ptr + b).to(tl.int32)
    row = 0 if row_ptr is None else tl.load(row_ptr + b).to(tl.int64)
    # -- how many keys each cell selects or skips
    p = tl.arange(0, BLOCK_W * 32)
    word = tl.load(bits_ptr + (pid_bh * R + row) * WORDS + p // 32, mask=p < WORDS * 32, other=0)
    on = ((word >> p % 32) & 1) != 0
    n = tl.minimum(_first_key(p + 1, t, WIDTH), n_key) - tl.minimum(_first_key(p, t, WIDTH), n_key)
    selected, skipped = tl.cumsum(tl.where(on, n, 0), axis=0), tl.where(on, 0, n)  # selected: up to a cell, it included
    total = tl.sum(tl.where(on, n, 0), axis=0)

    offs_n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q = _vector(q_ptr + b * q_stride[0] + h * q_stride[1], d * q_stride[3], d < D) * qk_scale
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + h // GROUP * v_stride[1] + d[None, :] * v_stride[3]
    m_i, l_i = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, total, BLOCK_N):
        at = start + offs_n
        j = (at + tl.sum(tl.where(selected[None, :] <= at[:, None], skipped[None, :], 0), axis=1)).to(tl.int64)
        if order_ptr is not None:
            j = tl.load(order_ptr + b * n_key + j, mask=at < total, other=0).to(tl.int64)
        mask_n = (at < total)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + j[:, None] * k_stride[2], mask=mask_n, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + j[:, None] * v_stride[2], mask=mask_n, other=0.0).to(tl.float32)
        s = tl.where(at < total, tl.sum(q[None, :] * k, axis=1), -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=0))
        p_n, alpha = tl.exp2(s - m_new), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p_n, axis=0), m_new
        acc = acc * alpha + tl.sum(p_n[:, None] * v, axis=0)
    acc = acc / tl.where(l_i == 0, 1.0, l_i)
    tl.store(o_ptr + pid_bh * D + d, acc.to(o_ptr.dtype.element_ty), mask=d < D)


STEP = dict(numbers=8192, num_warps=8)  # of keys that a program of the kernel above holds at a time, and of as many values


def _sparse_attention_step(q, k, v, bits, seen, row, order, softmax_scale, width):
    (B, H, _, D), (Hkv, S), words = q.shape, k.shape[1:3], bits.shape[3]
    # At least 32: Triton 3.6 makes wrong addresses of heads that two threads read.
    o, block_d = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device), max(32, _next_power_of_2(D))
    _sparse_attention_step_kernel[(B * H,)](
        q, k, v, bits, seen, row, order, o, q.stride(), k.stride(), v.stride(), H, bits.shape[2], S,
        softmax_scale * math.log2(math.e), GROUP=H // Hkv, D=D, WIDTH=width, WORDS=words, BLOCK_W=_next_power_of_2(words),
        BLOCK_N=min(STEP["numbers"] // block_d, 256), BLOCK_D=block_d, num_warps=STEP["num_warps"])
    return o


def _plan(bits: Tensor, seen: Tensor, row: Tensor | None, width: int, n_key: int, tiles: dict, union: Tensor | None = None):
    """runs, steps, max_runs: the keys that each tile visits."""
    B, H, R, words = bits.shape
    T, n_tile = seen.shape[1], _cdiv(seen.shape[1], tiles["BLOCK_M"])
    max_runs = min(_cdiv(width, 2), _cdiv(n_key, UNIT.value * (GAP.value + 2)))
    runs = torch.empty(B * H * n_tile, max_runs + 1, 2, dtype=torch.int32, device=bits.device)
    steps = torch.empty(B * H * n_tile, dtype=torch.int32, device=bits.device)
    _plan_kernel[(n_tile, B * H)](bits, seen, row, runs, steps, union, H, T, R, n_key, max_runs, WIDTH=width, WORDS=words,
                                  BLOCK_W=_next_power_of_2(words), BLOCK_M=tiles["BLOCK_M"], BLOCK_N=tiles["BLOCK_N"],
                                  num_warps=min(max(_next_power_of_2(words) // 8, 1), 8))
    return runs, steps, max_runs


def _sparse_attention_fwd(q, k, v, bits, seen, row, softmax_scale, width):
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    tiles = _attention_tiles(q.dtype, D)
    runs, steps, max_runs = _plan(bits, seen, row, width, S, tiles)
    o = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _sparse_attention_fwd_kernel[(len(steps),)](
        q, k, v, bits, seen, row, runs, steps, o, lse, q.stride(), k.stride(), v.stride(), H, T, bits.shape[2], S,
        _cdiv(T, tiles["BLOCK_M"]), max_runs, softmax_scale * math.log2(math.e), K_ROW=k.stride(2), V_ROW=v.stride(2),
        GROUP=H // Hkv, D=D, WIDTH=width, WORDS=bits.shape[3], BLOCK_D=max(16, _next_power_of_2(D)), **tiles)
    return o, lse


def _sparse_attention_bwd(q, k, v, o, lse, do, bits, seen, row, softmax_scale, width):
    (B, H, T, D), (Hkv, S), R = q.shape, k.shape[1:3], bits.shape[2]
    tiles = _attention_tiles(q.dtype, D)
    n_tile, n_block = _cdiv(T, tiles["BLOCK_M"]), _cdiv(S, tiles["BLOCK_N"])
    union = torch.empty(B * H * n_tile, bits.shape[3] + 2, dtype=torch.int32, device=q.device) if DETERMINISTIC else None
    runs, steps, max_runs = _plan(bits, seen, row, width, S, tiles, union)  # cheaper again than kept since the forward
    sizes = dict(GROUP=H // Hkv, D=D, WIDTH=width, WORDS=bits.shape[3], BLOCK_D=max(16, _next_power_of_2(D)), **tiles)
    qk_scale = softmax_scale * math.log2(math.e)
    delta, dq = torch.empty_like(lse), torch.empty_like(o)
    new = torch.empty if DETERMINISTIC else torch.zeros
    dk, dv = (new(B, Hkv, S, D, dtype=k.dtype if DETERMINISTIC else torch.float32, device=k.device) for _ in range(2))
    _sparse_attention_dq_kernel[(len(steps),)](
        q, k, v, o, do, bits, seen, row, runs, steps, lse, delta, dq, dk, dv, q.stride(), k.stride(), v.stride(),
        do.stride(), H, T, R, S, n_tile, max_runs, qk_scale, softmax_scale, K_ROW=k.stride(2), V_ROW=v.stride(2),
        ATOMIC=not DETERMINISTIC, **sizes)
    if not DETERMINISTIC:
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    n_list, of_lists = B * Hkv * n_block, dict(GROUP=H // Hkv, WIDTH=width, WORDS=bits.shape[3], BLOCK_N=tiles["BLOCK_N"])
    counts, firsts = (torch.empty(n_list, dtype=torch.int32, device=q.device) for _ in range(2))
    _count_visits_kernel[(n_block, B * Hkv)](union, counts, firsts, n_tile, S, BLOCK_T=256, **of_lists)

    # -- several programs for a key block that many tiles visit: `extra` at most, and twice as many slots for their parts
    extra = min(1024, _cdiv(n_list * n_tile * (H // Hkv), PAIRS_PER_PROGRAM))
    per_program = (counts.sum() + extra - 1).div(extra, rounding_mode="floor").clamp(min=PAIRS_PER_PROGRAM)
    n_part = ((counts + per_program - 1) // per_program).clamp(min=1)
    part_ends, slots = n_part.cumsum(0), (n_part * (n_part > 1)).cumsum(0)
    program = torch.arange(n_list + extra, device=q.device)
    list_of = torch.searchsorted(part_ends, program, right=True)
    part = torch.empty(2 * extra, 2, tiles["BLOCK_N"], sizes["BLOCK_D"], dtype=torch.float32, device=q.device)
    scratch = torch.empty(len(program), VISITORS, dtype=torch.int32, device=q.device)
    _sparse_attention_dkdv_kernel[(len(program),)](
        q, k, v, do, bits, seen, row, lse, delta, union, counts, firsts, list_of, part_ends, slots, per_program, scratch, part,
        dk, dv, q.stride(), k.stride(), v.stride(), do.stride(), H, T, R, S, n_tile, n_block, n_list, qk_scale, softmax_scale,
        BLOCK_T=VISITORS, **dict(sizes, num_warps=max(tiles["num_warps"], sizes["BLOCK_D"] // 64), num_stages=1))
    _sum_parts_kernel[(n_list,)](counts, slots, per_program, part, dk, dv, S, n_block, D=D, BLOCK_N=tiles["BLOCK_N"],
                                 BLOCK_D=sizes["BLOCK_D"])
    return dq, dk, dv


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


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seen: Tensor, softmax_scale: float | None = None, *,
                     row: Tensor | None = None, order: Tensor | None = None, block: int = 1024) -> Tensor:
    """sea.sparse_attention. mask may also be CellBits, which saves packing it. `block` is accepted and not used.

    Gradients reach q, k and v, summed in a fixed order if DETERMINISTIC.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 4, "(B, heads, tokens, D)")
        _expect(x.dtype == q.dtype, name, f"dtype {q.dtype} as q", x.dtype)
        _expect(x.device == q.device, name, f"device {q.device} as q", x.device)
        _expect(x.shape[2] >= 1, name, "at least one token", tuple(x.shape))
    B, H, T, D = q.shape
    _expect(k.shape[0] == B and k.shape[3] == D, "k", f"a batch of {B} and head size {D} as q", tuple(k.shape))
    _expect(H % k.shape[1] == 0, "k", f"a number of heads that divides q's {H}", k.shape[1])
    _expect(k.shape == v.shape, "v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    _expect(D <= 256, "q", "head size <= 256", D)
    _expect(len(mask.shape) == 4 and mask.shape[:2] == (B, H), "mask", f"shape (B, H, R, width) with B, H = {(B, H)}",
            tuple(mask.shape))
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(row is not None or mask.shape[2] == T, "mask", f"{T} rows, or `row` to say which is whose", mask.shape[2])
    _expect(row is None or row.shape == (B, T), "row", f"shape (B, T) = {(B, T)}", None if row is None else tuple(row.shape))
    _expect(order is None or order.shape == (B, k.shape[2]), "order", f"shape (B, S) = {(B, k.shape[2])}",
            None if order is None else tuple(order.shape))
    _expect(mask.shape[3] <= 16384, "mask", "a width of at most 16384, its square has to fit into 32 bits", mask.shape[3])
    cells = mask if isinstance(mask, CellBits) else pack_mask(mask)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    row = None if row is None else row.contiguous()
    bits, seen = cells.bits.contiguous(), seen.contiguous()
    with torch.cuda.device_of(q):
        if _is_step(q):
            order = None if order is None else order.contiguous()
            return _sparse_attention_step(q, k, v, bits, seen, row, order, float(scale), cells.width)
        if order is not None:
            k, v = (x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, D)) for x in (k, v))
        return _SparseAttention.apply(q, k, v, bits, seen, row, float(scale), cells.width)


# -- teacher attention pooled to cells ---------------------------------------------------------------------------------


class PooledAttention(NamedTuple):
    """As sea.PooledAttention."""

    cells: Tensor  # (B, H, T, width), sum of A over the keys of each cell
    a_log_a: Tensor  # (B, H, T), sum of A log A
    a_square: Tensor  # (B, H, T), sum of A^2
    n_keys: int


def _pool_tiles(dtype: torch.dtype, d_head: int) -> dict:
    if dtype == torch.float32:
        return dict(BLOCK_M=16, BLOCK_N=16 if d_head > 64 else 32, num_warps=4, num_stages=1)
    return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)


@triton.jit
def _add_in_cell(a, new_a, b, new_b):
    """Running sums that begin again at each key marked new."""
    return tl.where(new_b != 0, b, a + b), new_a | new_b


# A = softmax(q k^T * softmax_scale) over the keys seen; cells = sum of A over each cell's keys, a_log_a, a_square = row sums.
# One program: BLOCK_M queries, over all their keys twice: first the lse, then A; grid (cdiv(T, BLOCK_M), B * H).
#   q (B, H, T, D), k (B, Hkv, S, D), any strides; seen (B, T) int
#   cells (B, H, T, width) fp32, zeros, for cells without keys are not written; a_log_a, a_square (B, H, T) fp32
# The keys of a cell are neighbours: their sum is a running sum that begins again at each cell, carried from block to block
# and written at the cell's last key. One writer for each cell: deterministic, no atomics.
# fp32: scores and all sums. Writes T x width, where eager writes several T x S. Limits: D <= 256.
# Reference: sea.pool_attention.
@triton.jit
def _pool_attention_kernel(q_ptr, k_ptr, seen_ptr, cells_ptr, a_log_a_ptr, a_square_ptr, q_stride, k_stride, H, T, n_key,
                           qk_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_m, pid_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # causal: the longest first
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m, offs_n, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < T, offs_d < D
    t = tl.load(seen_ptr + b * T + offs_m, mask=mask_m, other=0).to(tl.int32)
    end = tl.minimum(tl.max(t, axis=0), n_key)
    # (BLOCK_M, BLOCK_D)
    q_ptr += b * q_stride[0] + h * q_stride[1] + offs_m[:, None].to(tl.int64) * q_stride[2] + offs_d[None, :] * q_stride[3]
    q = tl.load(q_ptr, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + offs_d[None, :] * k_stride[3]

    m_i, l_i = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, end, BLOCK_N):
        j = start + offs_n
        k = tl.load(k_ptr + j[:, None].to(tl.int64) * k_stride[2], mask=(j < n_key)[:, None] & mask_d[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale  # (BLOCK_M, BLOCK_N)
        s = tl.where((j < n_key)[None, :] & (j[None, :] < t[:, None]), s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        l_i, m_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), axis=1), m_new
    lse = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i))

    at = pid_bh.to(tl.int64) * T + offs_m
    a_log_a, a_square = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    carry = tl.zeros((BLOCK_M,), tl.float32)  # of the cell that the block before left unfinished
    for start in range(0, end, BLOCK_N):
        j = start + offs_n
        k = tl.load(k_ptr + j[:, None].to(tl.int64) * k_stride[2], mask=(j < n_key)[:, None] & mask_d[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        there = (j < n_key)[None, :] & (j[None, :] < t[:, None])
        log_a = tl.where(there, s - lse[:, None], 0.0)
        a = tl.where(there, tl.exp2(log_a), 0.0)
        a_log_a += tl.sum(a * log_a, axis=1)
        a_square += tl.sum(a * a, axis=1)
        # -- keys lie 2 width apart in the division by 2 t, so its rest tells the first and last key of a cell
        cell, rest = _cell_of_key(t[:, None], j[None, :], WIDTH)
        in_cell, begun = tl.associative_scan((a, (rest < 2 * WIDTH).to(tl.int32)), 1, _add_in_cell)
        in_cell += tl.where(begun != 0, 0.0, carry[:, None])
        last = there & ((rest + 2 * WIDTH >= 2 * t[:, None]) | (j + 1 >= n_key)[None, :])
        tl.store(cells_ptr + at[:, None] * WIDTH + cell, in_cell, mask=last)
        carry = tl.sum(tl.where((offs_n == BLOCK_N - 1)[None, :], in_cell, 0.0), axis=1)
    # -- write back
    tl.store(a_log_a_ptr + at, a_log_a * 0.6931471805599453, mask=mask_m)  # log2 -> log
    tl.store(a_square_ptr + at, a_square, mask=mask_m)


def pool_attention(q: Tensor, k: Tensor, seen: Tensor, width: int, softmax_scale: float | None = None, *,
                   block: int = 256) -> PooledAttention:
    """sea.pool_attention, without gradient. `block` is accepted and not used: memory is O(T*width) in any case."""
    _check_tensor("q", q, 4, "(B, H, T, D)")
    _check_tensor("k", k, 4, "(B, Hkv, S, D)")
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    _expect(k.dtype == q.dtype and k.device == q.device, "k", f"{q.dtype} on {q.device} as q", f"{k.dtype} on {k.device}")
    _expect(k.shape[0] == B and k.shape[3] == D, "k", f"a batch of {B} and head size {D} as q", tuple(k.shape))
    _expect(H % Hkv == 0, "k", f"a number of heads that divides q's {H}", Hkv)
    _expect(D <= 256, "q", "head size <= 256", D)
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))
    _expect(isinstance(width, int) and width >= 1, "width", "an integer >= 1", width)
    scale, tiles = D**-0.5 if softmax_scale is None else softmax_scale, _pool_tiles(q.dtype, D)
    cells = torch.zeros(B, H, T, width, dtype=torch.float32, device=q.device)
    a_log_a, a_square = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        _pool_attention_kernel[(_cdiv(T, tiles["BLOCK_M"]), B * H)](
            q, k, seen.contiguous(), cells, a_log_a, a_square, q.stride(), k.stride(), H, T, S, scale * math.log2(math.e),
            GROUP=H // Hkv, D=D, WIDTH=width, BLOCK_D=max(16, _next_power_of_2(D)), **tiles)
    return PooledAttention(cells, a_log_a, a_square, S)


# -- beside Hugging Face's package of the same name ----------------------------------------------------------------------


def __getattr__(name: str):
    """Hand names that this file lacks to Hugging Face's package of the same name, if it is installed.

    transformers asks for `kernels` while it is imported, finds this file first, and fails if its names are missing.
    The package is loaded under another name; as its __package__ stays "kernels", what it imports from itself is found
    through our __path__ (which is its folder) and exists once.
    """
    try:
        init = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    if name == "__path__" and __name__ == "kernels":
        return [str(init.parent)]
    if name.startswith("__") or __name__ != "kernels":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = sys.modules.get("_hf_kernels")
    if package is None:
        spec = importlib.util.spec_from_file_location("_hf_kernels", init, submodule_search_locations=[str(init.parent)])
        package = sys.modules["_hf_kernels"] = importlib.util.module_from_spec(spec)
        package.__package__ = "kernels"
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules["_hf_kernels"]
            raise
    return getattr(package, name)
