"""SEA's attention to chosen bins of keys in Triton: forward, backward and decoding step.

kernels.py re-exports bin_attention. What its docstring says of signatures, dtypes, programs and decoding
steps holds here, too.

A chooser is the query heads that share a choice. Each query has, for each of C choosers, a list of bins,
(B, C, T, n) int32, ascending, with NONE behind the last. In all kernels t is the number of keys that a query
sees, j a key, s a place among the keys of a list: key number s stands at j = list[s // BIN] * BIN + s % BIN.

A tile holds the heads of a chooser, which visit the same keys: HEADS of them. Where a chooser has more than a
tile holds, its list is walked several times; where it has few, a tile holds them for QUERIES neighbouring
queries. These choose much the same bins, so the tile walks their lists united, and each query masks what it
has not chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

if __package__:  # the files were copied into a package
    from .estimator_kernels import (LOG2_E, LOWEST, _cdiv, _check_attention, _expect, _in_order, _is_step,
                                    _load_tile, _new, _next_power_of_2, _program)
else:
    from estimator_kernels import (LOG2_E, LOWEST, _cdiv, _check_attention, _expect, _in_order, _is_step,
                                   _load_tile, _new, _next_power_of_2, _program)

NONE = tl.constexpr(2**31 - 1)  # the number of no bin, behind all others

# -- tuning. BLOCK_M, BLOCK_N >= 16, as tl.dot wants.
# of the kernel that lists visits: queries of a program, at least, and programs of a chooser, at most
QUERY_CHUNKS = dict(queries=128, most=256)
VISITS_PER_PROGRAM = 64  # (unit, query) pairs that one program of the dk, dv kernel adds up, at least
MAX_EXTRA_PROGRAMS = 4096  # of that kernel, to share the work on units that many queries visit
MERGE = dict(BLOCK_N=16, num_warps=4)


def _tile_sizes(dtype: torch.dtype, d_head: int, heads: int) -> dict:
    """For `heads` query heads of a chooser. "ieee" dots in fp32 run without tensor cores: small tiles keep
    them in registers. HEAD_TILES: tiles that the heads take."""
    n_head = min(heads, 16 if dtype == torch.float32 else 32)  # 64 rows would be a dot with limits of its own
    return dict(HEADS=n_head, HEAD_TILES=_cdiv(heads, n_head), BLOCK_D=max(16, _next_power_of_2(d_head)))


def _walk_tiles(dtype: torch.dtype, d_head: int, heads: int) -> dict:
    """Of the forward and dq kernels. As many queries a tile, up to four, as its 16 rows hold: of four in 32
    rows, more bins are masked for most than sharing saves."""
    tile = _tile_sizes(dtype, d_head, heads)
    block_m = max(16, _next_power_of_2(tile["HEADS"]))
    tile |= dict(QUERIES=min(block_m // _next_power_of_2(tile["HEADS"]), 4), BLOCK_M=block_m)
    if dtype == torch.float32:
        return dict(tile, BLOCK_N=16 if d_head > 64 else 32, num_warps=4, num_stages=1)
    return dict(tile, BLOCK_N=32, num_warps=tile["BLOCK_M"] // 16 if d_head <= 128 else 4, num_stages=2)


def _dkdv_tiles(dtype: torch.dtype, d_head: int, heads: int, bin: int) -> dict:
    """Of the dk, dv kernel: CHUNKS programs for BLOCK_N keys of a unit each, VISITS queries at a time. A unit
    is UNIT bins, as many as a dot has keys."""
    tile = _tile_sizes(dtype, d_head, heads)
    is_half, is_wide = dtype != torch.float32, d_head > 128
    block_m = (32 if is_wide else 64) if is_half else 16
    unit = max(1, 16 // bin)
    block_n = min(max(16, _next_power_of_2(bin)), 32 if is_half else 16)
    num_warps = max(2, tile["BLOCK_D"] // (64 if is_wide else 32)) if is_half else 4
    return dict(tile, BLOCK_M=block_m, BLOCK_N=block_n, VISITS=block_m // tile["HEADS"], UNIT=unit,
                CHUNKS=_cdiv(unit * bin, block_n), num_warps=num_warps,
                num_stages=2 if is_half and not is_wide else 1)


def _step_tiles(dtype: torch.dtype, d_head: int, heads: int) -> dict:
    """Of a decoding step."""
    tile = _tile_sizes(dtype, d_head, heads)
    block_n = (64 if d_head > 128 else 128) if dtype != torch.float32 else 32
    tile["BLOCK_D"] = max(32, tile["BLOCK_D"])  # Triton 3.6: wrong addresses if two threads read a head
    return dict(tile, BLOCK_M=max(16, _next_power_of_2(tile["HEADS"])), BLOCK_N=block_n, num_warps=4)


# -- tiles and lists inside a kernel


@triton.jit
def _rows_of(ptr, strides, b, h, i, offs_d):
    """Pointers to rows i of heads h, (rows, BLOCK_D)."""
    ptr += b * strides[0] + h[:, None].to(tl.int64) * strides[1] + i[:, None].to(tl.int64) * strides[2]
    return ptr + offs_d[None, :] * strides[3]


@triton.jit
def _find(bins_ptr, x, n, LOG_LIST: tl.constexpr):
    """Where the numbers x would be on a list of n, ascending, and which of them are, by bisection."""
    place = tl.zeros_like(x)  # of the first number that is not less, or of the last
    for i in tl.static_range(LOG_LIST):
        step = 1 << (LOG_LIST - 1 - i)
        before = tl.load(bins_ptr + place + step - 1, mask=place + step <= n, other=NONE)
        place += tl.where(before < x, step, 0)
    return place, tl.load(bins_ptr + place, mask=place < n, other=NONE) == x


# -- lists of a tile's queries, united


# The bins that a tile's queries have chosen, each once, and which of them have: those of the first query,
# then those that the next one adds, so that what a query sums does not depend on a later one, bit for bit.
# One program: QUERIES neighbouring queries of a chooser; grid (cdiv(T, QUERIES) * B * C,).
#   bins (B, C, T, n) int32, below 2^27 but NONE
#   united (B, C, cdiv(T, QUERIES), QUERIES * n) int32: 2^QUERIES * bin + a bit for each query; counts
#   (B, C, cdiv(T, QUERIES)) int32: how many there are
# A bin goes with the first query that has it, which looks for it on the lists of later ones and marks it
# there. The marks of query i are in united at i * n, where no earlier query writes.
@triton.jit
def _unite_kernel(bins_ptr, united_ptr, counts_ptr, T, n, QUERIES: tl.constexpr, LOG_LIST: tl.constexpr):
    n_tile = tl.cdiv(T, QUERIES)
    pid_tile, pid_bc = _program(n_tile)
    offs = tl.arange(0, 2**LOG_LIST)
    bins_ptr += pid_bc * T * n
    united_ptr += (pid_bc * n_tile + pid_tile) * QUERIES * n
    for i in tl.static_range(1, QUERIES):
        tl.store(united_ptr + i * n + offs, 0, mask=offs < n)
    count = pid_tile * 0  # of the type that it will have
    for i in tl.static_range(QUERIES):
        tl.debug_barrier()  # marks are written
        query = pid_tile * QUERIES + i
        x = tl.load(bins_ptr + query.to(tl.int64) * n + offs, mask=(query < T) & (offs < n), other=NONE)
        mask_new, bits = x != NONE, tl.full((2**LOG_LIST,), 2**i, tl.int32)
        if i > 0:
            mask_new &= tl.load(united_ptr + i * n + offs, mask=offs < n, other=1) == 0
        for k in tl.static_range(i + 1, QUERIES):
            other = pid_tile * QUERIES + k
            place, is_listed = _find(bins_ptr + other.to(tl.int64) * n, x, tl.where(other < T, n, 0), LOG_LIST)
            bits += tl.where(is_listed, 2**k, 0)
            tl.store(united_ptr + k * n + place, 1, mask=mask_new & is_listed)
        place = count + tl.cumsum(mask_new.to(tl.int32), axis=0) - 1
        tl.store(united_ptr + place, x * 2**QUERIES + bits, mask=mask_new)
        count += tl.sum(mask_new.to(tl.int32), axis=0)
    tl.store(counts_ptr + pid_bc * n_tile + pid_tile, count)


def _unite(bins: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """united and counts, as above."""
    B, C, T, n = bins.shape
    n_tile, size = _cdiv(T, queries), _next_power_of_2(n)
    united, counts = _new(bins, B, C, n_tile, queries * n), _new(bins, B, C, n_tile)
    _unite_kernel[(n_tile * B * C,)](bins, united, counts, T=T, n=n, QUERIES=queries,
                                     LOG_LIST=size.bit_length() - 1, num_warps=max(1, min(size // 256, 4)))
    return united, counts


@triton.jit
def _tile_of_queries(seen_ptr, united_ptr, counts_ptr, H, T, n, n_key, CHOOSERS: tl.constexpr,
                     HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr,
                     BLOCK_M: tl.constexpr):
    """b and c of a program's chooser, its tile's list and how many bins that has, none if no query sees a
    key; and of the rows of the tile, (BLOCK_M,) each: heads, queries, their numbers in the tile, t, offsets
    into (B, H, T) and mask."""
    n_tile = tl.cdiv(T, QUERIES)
    pid_tile, pid_bch = _program(n_tile)
    pid_bc, pid_head = pid_bch // HEAD_TILES, pid_bch % HEAD_TILES
    b, c = pid_bc // CHOOSERS, pid_bc % CHOOSERS
    offs_m = tl.arange(0, BLOCK_M)
    i_query, i_head = offs_m // HEADS, (pid_head * HEADS).to(tl.int32) + offs_m % HEADS
    query, h = pid_tile * QUERIES + i_query, c * (H // CHOOSERS) + i_head
    mask_m = (i_query < QUERIES) & (query < T) & (i_head < H // CHOOSERS)
    t = tl.minimum(tl.load(seen_ptr + b * T + query, mask=mask_m, other=0), n_key).to(tl.int32)
    pid_list = pid_bc * n_tile + pid_tile
    count = tl.where(tl.max(t, axis=0) > 0, tl.load(counts_ptr + pid_list), 0)
    return (b, c, united_ptr + pid_list * QUERIES * n, count, h, query, i_query, t, (b * H + h) * T + query,
            mask_m)


@triton.jit
def _keys_of_tile(united_ptr, offs_s, n_slot, i_query, t, BIN: tl.constexpr, QUERIES: tl.constexpr):
    """Keys at places offs_s of a tile's list, and which row of the tile attends to which, (BLOCK_M,
    BLOCK_N). In place of a key that no query sees stands the last that one does: a load without a mask."""
    entry = tl.load(united_ptr + offs_s // BIN, mask=offs_s < n_slot, other=0)  # 0: of no query
    j = (entry >> QUERIES) * BIN + offs_s % BIN
    mask_ms = (((entry[None, :] >> i_query[:, None]) & 1) != 0) & (j[None, :] < t[:, None])
    return tl.minimum(j, tl.max(t, axis=0) - 1).to(tl.int64), mask_ms


@triton.jit
def _load_rows(ptr, stride, i, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i (int64), (rows, BLOCK_D); ptr (1, BLOCK_D) points to row 0."""
    if D == BLOCK_D:
        return tl.load(ptr + i[:, None] * stride)
    return tl.load(ptr + i[:, None] * stride, mask=(offs_d < D)[None, :], other=0.0)


# -- forward


# o = softmax(q k^T * softmax_scale) v over the keys of a query's bins that it sees;
# lse = log2 of the sum of 2^(scores * log2 e), +inf where there is no key.
# One program: QUERIES neighbouring queries and HEADS heads of a chooser; grid
# (cdiv(T, QUERIES) * B * CHOOSERS * HEAD_TILES,).
#   q (B, H, T, D), k and v (B, Hkv, S, D), any strides; united and counts as above; seen (B, T) int
#   o (B, H, T, D) and lse (B, H, T) fp32, contiguous
# fp32: scores, m_i, l_i, acc; p until the dot, whose operands have the dtype of v. Reads the listed keys
# once for all rows of a tile, where eager writes T x S scores. Keys that no query sees are not read; a value
# that is not finite reaches all queries of a tile, whichever chose it.
# Limits: MAX_D_HEAD. Reference: sea.bin_attention.
@triton.jit
def _bin_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, united_ptr, counts_ptr, seen_ptr, o_ptr, lse_ptr,
                              q_strides, k_strides, v_strides, H, T, n, n_key, qk_scale,
                              CHOOSERS: tl.constexpr, GROUP: tl.constexpr, BIN: tl.constexpr,
                              D: tl.constexpr, HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
                              QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                              BLOCK_D: tl.constexpr):
    b, c, united_ptr, count, h, query, i_query, t, offs_bhm, mask_m = _tile_of_queries(
        seen_ptr, united_ptr, counts_ptr, H, T, n, n_key, CHOOSERS=CHOOSERS, HEADS=HEADS,
        HEAD_TILES=HEAD_TILES, QUERIES=QUERIES, BLOCK_M=BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    kv = c * (H // CHOOSERS) // GROUP
    k_ptr += b * k_strides[0] + kv * k_strides[1] + offs_d[None, :] * k_strides[3]
    v_ptr += b * v_strides[0] + kv * v_strides[1] + offs_d[None, :] * v_strides[3]
    # (BLOCK_M, BLOCK_D)
    q = tl.load(_rows_of(q_ptr, q_strides, b, h, query, offs_d), mask=mask_md, other=0.0)
    m_i, l_i = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_s in range(0, count * BIN, BLOCK_N):
        j, mask_ms = _keys_of_tile(united_ptr, start_s + offs_n, count * BIN, i_query, t, BIN=BIN,
                                   QUERIES=QUERIES)
        # -- scores, (BLOCK_M, BLOCK_N)
        k = _load_rows(k_ptr, k_strides[2], j, offs_d, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        s = tl.where(mask_ms, s, -float("inf"))
        # -- online softmax
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p, axis=1), m_new
        v = _load_rows(v_ptr, v_strides[2], j, offs_d, D, BLOCK_D)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    # -- write back
    mask_empty = l_i == 0
    l_i = tl.where(mask_empty, 1.0, l_i)
    o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)
    lse = tl.where(mask_empty, float("inf"), m_i + tl.log2(l_i))
    tl.store(o_ptr + offs_bhm[:, None] * D + offs_d[None, :], o, mask=mask_md)
    tl.store(lse_ptr + offs_bhm, lse, mask=mask_m)


def _sizes(q: Tensor, k: Tensor, v: Tensor, bins: Tensor, softmax_scale: float, bin: int) -> dict:
    """Keywords that the kernels have in common."""
    (_, H, _, D), (Hkv, S), C = q.shape, k.shape[1:3], bins.shape[1]
    return dict(q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(), H=H, n_key=S,
                qk_scale=softmax_scale * LOG2_E.value, CHOOSERS=C, GROUP=H // Hkv, BIN=bin, D=D)


def _bin_attention_fwd(q, k, v, bins, seen, softmax_scale, bin):
    (B, H, T, D), (C, _, n) = q.shape, bins.shape[1:]
    tiles = _walk_tiles(q.dtype, D, H // C)
    o, lse = _new(q, B, H, T, D), _new(q, B, H, T, dtype=torch.float32)
    united, counts = _unite(bins, tiles["QUERIES"])
    _bin_attention_fwd_kernel[(counts.numel() * tiles["HEAD_TILES"],)](
        q, k, v, united, counts, seen, o, lse, T=T, n=n, **_sizes(q, k, v, bins, softmax_scale, bin), **tiles)
    return o, lse


# -- backward
#
# With p = 2^(scores - lse), dp = do v^T, delta = rowsum(o do) and ds = p (dp - delta):
#
#     dq = ds k * softmax_scale      dk = ds^T q * softmax_scale      dv = p^T do
#
# dk and dv are summed over the queries that visit a unit, UNIT neighbouring bins: where bins are narrow, a
# query often has several of a unit, and reads its q and do once for them. Which queries visit a unit is
# found by counting: each program counts the visits of a chunk of neighbouring queries to all units, a running
# sum says where each chunk's visits to each unit begin, and each program then lists its own there, in the
# order of queries. Nothing depends on which program is first.


# dq = ds k * softmax_scale, and delta.
# One program: the tile and the walk of the forward kernel.
#   o (B, H, T, D) contiguous, do (B, H, T, D) any strides, lse (B, H, T) fp32; the others as there
#   delta (B, H, T) fp32, dq (B, H, T, D) contiguous
# fp32: delta, dq; p, dp and ds until the dots, whose operands have the dtype of q.
# Computes p again from lse in place of reading it: keys and values are read once more, q, do and dq stay in
# registers. Reference: autograd through sea.bin_attention.
@triton.jit
def _bin_attention_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, united_ptr, counts_ptr, seen_ptr, lse_ptr,
                             delta_ptr, dq_ptr, q_strides, k_strides, v_strides, do_strides, H, T, n, n_key,
                             qk_scale, softmax_scale, CHOOSERS: tl.constexpr, GROUP: tl.constexpr,
                             BIN: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                             HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b, c, united_ptr, count, h, query, i_query, t, offs_bhm, mask_m = _tile_of_queries(
        seen_ptr, united_ptr, counts_ptr, H, T, n, n_key, CHOOSERS=CHOOSERS, HEADS=HEADS,
        HEAD_TILES=HEAD_TILES, QUERIES=QUERIES, BLOCK_M=BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    kv = c * (H // CHOOSERS) // GROUP
    k_ptr += b * k_strides[0] + kv * k_strides[1] + offs_d[None, :] * k_strides[3]
    v_ptr += b * v_strides[0] + kv * v_strides[1] + offs_d[None, :] * v_strides[3]
    # (BLOCK_M, BLOCK_D)
    q = tl.load(_rows_of(q_ptr, q_strides, b, h, query, offs_d), mask=mask_md, other=0.0)
    do = tl.load(_rows_of(do_ptr, do_strides, b, h, query, offs_d), mask=mask_md, other=0.0)
    o = tl.load(o_ptr + offs_bhm[:, None] * D + offs_d[None, :], mask=mask_md, other=0.0)
    lse = tl.load(lse_ptr + offs_bhm, mask=mask_m, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + offs_bhm, delta, mask=mask_m)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_s in range(0, count * BIN, BLOCK_N):
        j, mask_ms = _keys_of_tile(united_ptr, start_s + offs_n, count * BIN, i_query, t, BIN=BIN,
                                   QUERIES=QUERIES)
        # -- probabilities again, (BLOCK_M, BLOCK_N)
        k = _load_rows(k_ptr, k_strides[2], j, offs_d, D, BLOCK_D)
        v = _load_rows(v_ptr, v_strides[2], j, offs_d, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        p = tl.where(mask_ms, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq += tl.dot(ds, k, input_precision="ieee")
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offs_bhm[:, None] * D + offs_d[None, :], dq, mask=mask_md)


@triton.jit
def _units_of_list(bins_ptr, n, n_bin, UNIT: tl.constexpr, BLOCK_LIST: tl.constexpr):
    """Of each entry of a list, (BLOCK_LIST,): its unit; whether it is the unit's first entry; and, for that,
    which of the unit's bins are on the list, a bit each."""
    offs = tl.arange(0, BLOCK_LIST)
    bins = tl.load(bins_ptr + offs, mask=offs < n, other=NONE)
    before = tl.load(bins_ptr + offs - 1, mask=(offs > 0) & (offs < n), other=NONE)
    unit, mask_first = bins // UNIT, (bins < n_bin) & (bins // UNIT != before // UNIT)
    bits = tl.zeros((BLOCK_LIST,), tl.int32)
    for i in tl.static_range(UNIT):
        after = tl.load(bins_ptr + offs + i, mask=mask_first & (offs + i < n), other=NONE)
        bits |= tl.where((after // UNIT == unit) & (after < n_bin), 1 << after % UNIT, 0)
    return unit, mask_first, bits


# The visits of each chunk of neighbouring queries of a chooser to the units: how many they are, or,
# WRITE, which.
# One program: one chunk; grid (n_chunk * B * C,).
#   bins (B, C, T, n) int32
#   places (B * C * n_chunk, n_unit) int32: the number of visits is added to it; or, WRITE, where the chunk's
#   first visit to each unit stands, which moves on to the next chunk's
#   visitors, bits (B * C * T * n,) int32, WRITE: queries, numbered (b * C + c) * T + i, and which bins of the
#   unit they visit
# Reads the lists, and for each visit one number of its chunk's row of places, once.
@triton.jit
def _visits_kernel(bins_ptr, places_ptr, visitors_ptr, bits_ptr, T, n, n_bin, n_unit, n_chunk, queries,
                   UNIT: tl.constexpr, WRITE: tl.constexpr, BLOCK_LIST: tl.constexpr):
    pid_chunk, pid_bc = _program(n_chunk)
    places_ptr += (pid_bc * n_chunk + pid_chunk) * n_unit
    for i in range(pid_chunk * queries, tl.minimum((pid_chunk + 1) * queries, T)):
        unit, mask_first, bits = _units_of_list(bins_ptr + (pid_bc * T + i) * n, n, n_bin, UNIT=UNIT,
                                                BLOCK_LIST=BLOCK_LIST)
        place = tl.load(places_ptr + unit, mask=mask_first, other=0)
        if WRITE:
            visitor = (pid_bc * T + i).to(tl.int32)
            tl.store(visitors_ptr + place, visitor + tl.zeros_like(bits), mask=mask_first)
            tl.store(bits_ptr + place, bits, mask=mask_first)
        tl.store(places_ptr + unit, place + 1, mask=mask_first)
        tl.debug_barrier()  # before other threads read them for the next query


# dk = ds^T q * softmax_scale, dv = p^T do, summed over the queries that visit a unit, in their order.
# One program: BLOCK_N keys of one unit of one key/value head, and at most `per_program` of its visits; grid
# (n_program * CHUNKS,); surplus programs return. A unit with few visits has one program, which writes dk and
# dv. One with many (every query visits the first) has several: they write to `part`, and
# _sum_bin_parts_kernel adds up.
#   q, do (B, H, T, D), k, v (B, Hkv, S, D), any strides; lse, delta (B, H, T) fp32 contiguous; seen (B, T)
#   visitors, bits as above; those of list number (b * Hkv + kv) * n_unit + unit stand from firsts[list] to
#   before firsts[list + 1]; firsts (n_list + 1,) int64
#   list_of (n_program,) int64: the list that a program works on
#   part_ends (n_list,) int64: running sum of the programs of each list; slots (n_list,) int64: the same, of
#   lists shared by several
#   part (slots, CHUNKS, 2, BLOCK_N, BLOCK_D) fp32; dk, dv (B, Hkv, S, D) contiguous
# fp32: accumulators; p, dp and ds until the dots, whose operands have the dtype of q. Reads keys and values
# once for all visits of a program, and sums in registers in place of adding to memory by atomic operations.
# Deterministic; no count has to reach the CPU, so a CUDA graph can hold it.
# Reference: autograd through sea.bin_attention.
@triton.jit
def _bin_attention_dkdv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, seen_ptr, lse_ptr, delta_ptr, visitors_ptr,
                               bits_ptr, firsts_ptr, list_of_ptr, part_ends_ptr, slots_ptr, part_ptr, dk_ptr,
                               dv_ptr, q_strides, k_strides, v_strides, do_strides, H, T, n_key, n_unit,
                               n_list, per_program, qk_scale, softmax_scale, CHOOSERS: tl.constexpr,
                               GROUP: tl.constexpr, BIN: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
                               HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, VISITS: tl.constexpr,
                               CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                               BLOCK_D: tl.constexpr):
    pid, pid_chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    i_list = tl.load(list_of_ptr + pid)
    if i_list >= n_list:  # the grid is an upper bound
        return
    pid_bkv, i_unit = i_list // n_unit, (i_list % n_unit).to(tl.int32)
    b, kv = pid_bkv // (H // GROUP), pid_bkv % (H // GROUP)
    # -- visits begin ... end - 1 are this program's, which is number pid_part of n_part
    first, last = tl.load(firsts_ptr + i_list), tl.load(firsts_ptr + i_list + 1)
    n_part = tl.maximum((last - first + per_program - 1) // per_program, 1)
    pid_part = pid - (tl.load(part_ends_ptr + i_list) - n_part)
    begin = first + pid_part * per_program
    n_visit = tl.minimum(last - begin, per_program).to(tl.int32)

    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i_visit, i_head = offs_m // HEADS, offs_m % HEADS
    offs_unit = pid_chunk * BLOCK_N + offs_n
    j = i_unit * (UNIT * BIN) + offs_unit
    mask_n, mask_d = (offs_unit < UNIT * BIN) & (j < n_key), offs_d < D
    mask_nd = mask_n[:, None] & mask_d[None, :]
    # (BLOCK_N, BLOCK_D)
    offs_kv = j[:, None].to(tl.int64) * k_strides[2] + offs_d[None, :] * k_strides[3]
    k = tl.load(k_ptr + b * k_strides[0] + kv * k_strides[1] + offs_kv, mask=mask_nd, other=0.0)
    offs_kv = j[:, None].to(tl.int64) * v_strides[2] + offs_d[None, :] * v_strides[3]
    v = tl.load(v_ptr + b * v_strides[0] + kv * v_strides[1] + offs_kv, mask=mask_nd, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_visit in range(0, n_visit, VISITS):
        mask_visit = (i_visit < VISITS) & (start_visit + i_visit < n_visit)
        visitor = tl.load(visitors_ptr + begin + start_visit + i_visit, mask=mask_visit, other=0)
        bits = tl.load(bits_ptr + begin + start_visit + i_visit, mask=mask_visit, other=0)
        c, i = visitor // T % CHOOSERS, visitor % T
        t = tl.load(seen_ptr + b * T + i, mask=mask_visit, other=0).to(tl.int32)
        mask_nm = ((bits[None, :] >> (offs_unit // BIN)[:, None]) & 1) != 0
        mask_nm &= mask_n[:, None] & (j[:, None] < t[None, :])
        for pid_head in tl.static_range(HEAD_TILES):
            offs_head = pid_head * HEADS + i_head
            h, mask_m = c * (H // CHOOSERS) + offs_head, mask_visit & (offs_head < H // CHOOSERS)
            mask_md, offs_bhm = mask_m[:, None] & mask_d[None, :], (b * H + h) * T + i
            # (BLOCK_M, BLOCK_D)
            q = tl.load(_rows_of(q_ptr, q_strides, b, h, i, offs_d), mask=mask_md, other=0.0)
            do = tl.load(_rows_of(do_ptr, do_strides, b, h, i, offs_d), mask=mask_md, other=0.0)
            lse = tl.load(lse_ptr + offs_bhm, mask=mask_m, other=float("inf"))
            delta = tl.load(delta_ptr + offs_bhm, mask=mask_m, other=0.0)
            # -- probabilities again, (BLOCK_N, BLOCK_M)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
            p = tl.where(mask_nm, tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk += tl.dot(ds, q, input_precision="ieee")
    # -- write back
    dk *= softmax_scale
    if n_part == 1:
        offs_kv = (pid_bkv * n_key + j[:, None]) * D + offs_d[None, :]
        tl.store(dk_ptr + offs_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_nd)
        tl.store(dv_ptr + offs_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_nd)
    else:
        slot = tl.load(slots_ptr + i_list) - n_part + pid_part
        part_ptr += (slot * CHUNKS + pid_chunk) * 2 * BLOCK_N * BLOCK_D
        offs_nd = offs_n[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(part_ptr + offs_nd, dk)
        tl.store(part_ptr + BLOCK_N * BLOCK_D + offs_nd, dv)


# dk, dv of the units that several programs share: the sum of their parts, in order.
# One program: BLOCK_N keys of one unit; grid (n_list * CHUNKS,). Those with one program return at once.
# Pointers as above.
@triton.jit
def _sum_bin_parts_kernel(firsts_ptr, slots_ptr, part_ptr, dk_ptr, dv_ptr, n_key, n_unit, per_program,
                          UNIT_KEYS: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    i_list, pid_chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    n_visit = tl.load(firsts_ptr + i_list + 1) - tl.load(firsts_ptr + i_list)
    n_part = (n_visit + per_program - 1) // per_program
    if n_part <= 1:
        return
    slot = tl.load(slots_ptr + i_list) - n_part
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    part_ptr += slot * CHUNKS * 2 * BLOCK_N * BLOCK_D + offs_n[:, None] * BLOCK_D + offs_d[None, :]
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, n_part.to(tl.int32)):
        dk += tl.load(part_ptr + (i * CHUNKS + pid_chunk) * 2 * BLOCK_N * BLOCK_D)
        dv += tl.load(part_ptr + (i * CHUNKS + pid_chunk) * 2 * BLOCK_N * BLOCK_D + BLOCK_N * BLOCK_D)
    offs_unit = pid_chunk * BLOCK_N + offs_n
    j = i_list % n_unit * UNIT_KEYS + offs_unit
    mask_nd = ((offs_unit < UNIT_KEYS) & (j < n_key))[:, None] & (offs_d < D)[None, :]
    offs_kv = (i_list // n_unit * n_key + j[:, None]) * D + offs_d[None, :]
    tl.store(dk_ptr + offs_kv, dk.to(dk_ptr.dtype.element_ty), mask=mask_nd)
    tl.store(dv_ptr + offs_kv, dv.to(dv_ptr.dtype.element_ty), mask=mask_nd)


def _visits(bins: Tensor, Hkv: int, n_bin: int, n_unit: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """visitors, bits and firsts, as above."""
    B, C, T, n = bins.shape
    queries = max(QUERY_CHUNKS["queries"], _cdiv(T, QUERY_CHUNKS["most"]))
    n_chunk = _cdiv(T, queries)
    arguments = dict(T=T, n=n, n_bin=n_bin, n_unit=n_unit, n_chunk=n_chunk, queries=queries, UNIT=unit,
                     BLOCK_LIST=_next_power_of_2(n), num_warps=max(1, min(_next_power_of_2(n) // 128, 4)))
    places = torch.zeros(B, Hkv, C // Hkv * n_chunk, n_unit, dtype=torch.int32, device=bins.device)
    visitors, bits = _new(bins, bins.numel()), _new(bins, bins.numel())
    _visits_kernel[(n_chunk * B * C,)](bins, places, visitors, bits, WRITE=False, **arguments)
    # -- where they begin: lists one after the other, in each the chunks
    counts = places.transpose(2, 3)  # (B, Hkv, n_unit, chunks)
    ends = counts.flatten().cumsum(0)
    begins = (ends - counts.flatten()).view(counts.shape)
    firsts = torch.cat([begins[..., 0].flatten(), ends[-1:]])
    places = begins.transpose(2, 3).int().contiguous()
    _visits_kernel[(n_chunk * B * C,)](bins, places, visitors, bits, WRITE=True, **arguments)
    return visitors, bits, firsts


def _bin_attention_dkdv(q, k, v, do, bins, seen, lse, delta, softmax_scale, bin):
    (B, Hkv, S, D), (H, C), n_bin = k.shape, (q.shape[1], bins.shape[1]), _cdiv(k.shape[2], bin)
    tiles = _dkdv_tiles(q.dtype, D, H // C, bin)
    n_unit = _cdiv(n_bin, tiles["UNIT"])
    n_list = B * Hkv * n_unit
    visitors, bits, firsts = _visits(bins, Hkv, n_bin, n_unit, tiles["UNIT"])
    # -- a program per list, and up to n_extra more for lists with many visits, in at most 2 n_extra parts
    per_program = max(VISITS_PER_PROGRAM, _cdiv(bins.numel(), MAX_EXTRA_PROGRAMS))
    n_extra = bins.numel() // per_program
    n_part = (firsts.diff() + per_program - 1).div(per_program, rounding_mode="floor").clamp(min=1)
    part_ends, slots = n_part.cumsum(0), (n_part * (n_part > 1)).cumsum(0)
    n_program = n_list + n_extra
    list_of = torch.searchsorted(part_ends, torch.arange(n_program, device=q.device), right=True)

    part = _new(q, 2 * n_extra, tiles["CHUNKS"], 2, tiles["BLOCK_N"], tiles["BLOCK_D"], dtype=torch.float32)
    dk, dv = (_new(k, *k.shape) for _ in range(2))
    _bin_attention_dkdv_kernel[(n_program * tiles["CHUNKS"],)](
        q, k, v, do, seen, lse, delta, visitors, bits, firsts, list_of, part_ends, slots, part, dk, dv,
        do_strides=do.stride(), T=q.shape[2], n_unit=n_unit, n_list=n_list, per_program=per_program,
        softmax_scale=softmax_scale, **_sizes(q, k, v, bins, softmax_scale, bin), **tiles)
    _sum_bin_parts_kernel[(n_list * tiles["CHUNKS"],)](
        firsts, slots, part, dk, dv, n_key=S, n_unit=n_unit, per_program=per_program,
        UNIT_KEYS=tiles["UNIT"] * bin, D=D, CHUNKS=tiles["CHUNKS"], BLOCK_N=tiles["BLOCK_N"],
        BLOCK_D=tiles["BLOCK_D"])
    return dk, dv


def _bin_attention_bwd(q, k, v, o, lse, do, bins, seen, softmax_scale, bin):
    (_, H, T, D), (C, _, n) = q.shape, bins.shape[1:]
    tiles = _walk_tiles(q.dtype, D, H // C)
    delta, dq = torch.empty_like(lse), torch.empty_like(o)
    united, counts = _unite(bins, tiles["QUERIES"])
    _bin_attention_dq_kernel[(counts.numel() * tiles["HEAD_TILES"],)](
        q, k, v, o, do, united, counts, seen, lse, delta, dq, do_strides=do.stride(), T=T, n=n,
        softmax_scale=softmax_scale, **_sizes(q, k, v, bins, softmax_scale, bin), **tiles)
    dk, dv = _bin_attention_dkdv(q, k, v, do, bins, seen, lse, delta, softmax_scale, bin)
    return dq, dk, dv


# -- a decoding step


# o and lse of the forward kernel for one query per sequence, by parts of its list: a GPU has more
# multiprocessors than a batch has choosers.
# One program: a part, BLOCK_N keys, and HEADS heads of a chooser; grid (n_part * B * CHOOSERS * HEAD_TILES,).
#   q (B, H, 1, D), k and v (B, Hkv, S, D), any strides; bins (B, CHOOSERS, 1, n) int32
#   seen (B, 1) int; order (B, S) int or None: the place of the key of each rank
#   parts (B, H, n_part, D) and lse (B, H, n_part) fp32: o and lse of a part, -inf where it has no key
# fp32: scores, parts; p until the dot, whose operands have the dtype of v. Reads each listed key once for all
# heads, and no key from seen on, whatever it holds. Limits: MAX_D_HEAD. Reference: sea.bin_attention.
@triton.jit
def _bin_attention_step_kernel(q_ptr, k_ptr, v_ptr, bins_ptr, seen_ptr, order_ptr, parts_ptr, lse_ptr,
                               q_strides, k_strides, v_strides, H, n, n_key, n_part, qk_scale,
                               CHOOSERS: tl.constexpr, GROUP: tl.constexpr, BIN: tl.constexpr,
                               D: tl.constexpr, HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_part, pid_bch = _program(n_part)
    pid_bc, pid_head = pid_bch // HEAD_TILES, pid_bch % HEAD_TILES
    b, c = pid_bc // CHOOSERS, pid_bc % CHOOSERS
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    i_head = pid_head * HEADS + offs_m
    h, mask_m, mask_d = c * (H // CHOOSERS) + i_head, (offs_m < HEADS) & (i_head < H // CHOOSERS), offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]
    # -- the part's keys
    t = tl.minimum(tl.load(seen_ptr + b), n_key).to(tl.int32)
    offs_s = pid_part * BLOCK_N + offs_n
    bins = tl.load(bins_ptr + pid_bc * n + offs_s // BIN, mask=offs_s < n * BIN, other=NONE)
    j = tl.where(bins == NONE, t, bins * BIN + offs_s % BIN)  # NONE * BIN might overflow
    mask_n, j = j < t, j.to(tl.int64)
    if order_ptr is not None:
        j = tl.load(order_ptr + b * n_key + j, mask=mask_n, other=0).to(tl.int64)
    # -- scores, (BLOCK_M, BLOCK_N)
    kv, mask_nd = c * (H // CHOOSERS) // GROUP, mask_n[:, None] & mask_d[None, :]
    q = _load_tile(q_ptr + b * q_strides[0], h, offs_d, q_strides[1], q_strides[3], mask_md)
    k_ptr, v_ptr = k_ptr + b * k_strides[0] + kv * k_strides[1], v_ptr + b * v_strides[0] + kv * v_strides[1]
    k = _load_tile(k_ptr, j, offs_d, k_strides[2], k_strides[3], mask_nd)
    v = _load_tile(v_ptr, j, offs_d, v_strides[2], v_strides[3], mask_nd)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    s = tl.where(mask_n[None, :], s, -float("inf"))
    # -- softmax
    m = tl.maximum(tl.max(s, axis=1), LOWEST)
    p = tl.exp2(s - m[:, None])
    total = tl.sum(p, axis=1)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / tl.where(total == 0, 1.0, total)[:, None]
    place = (b * H + h) * n_part + pid_part
    tl.store(parts_ptr + place[:, None] * D + offs_d[None, :], o, mask=mask_md)
    tl.store(lse_ptr + place, m + tl.log2(total), mask=mask_m)


# o = the mean of a query's parts, weighted by 2^lse; 0 without a key.
# One program: one head; grid (B * H,).
#   parts (B, H, n_part, D) and lse (B, H, n_part) as above
#   o (B, H, 1, D) contiguous
# fp32: everything. A launch more, but a query's keys are read by n_part programs instead of one.
@triton.jit
def _merge_parts_kernel(parts_ptr, lse_ptr, o_ptr, n_part, D: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_D: tl.constexpr):
    pid_bh = tl.program_id(0).to(tl.int64)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d, parts_ptr, lse_ptr = offs_d < D, parts_ptr + pid_bh * n_part * D, lse_ptr + pid_bh * n_part
    m_i, l_i = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n_part, BLOCK_N):
        mask_n = start + offs_n < n_part
        lse = tl.load(lse_ptr + start + offs_n, mask=mask_n, other=-float("inf"))
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        p, alpha = tl.exp2(lse - m_new), tl.exp2(m_i - m_new)
        o = _load_tile(parts_ptr, start + offs_n, offs_d, D, 1, mask_n[:, None] & mask_d[None, :])
        l_i, m_i = l_i * alpha + tl.sum(p, axis=0), m_new
        acc = acc * alpha + tl.sum(p[:, None] * o, axis=0)
    acc = acc / tl.where(l_i == 0, 1.0, l_i)
    tl.store(o_ptr + pid_bh * D + offs_d, acc.to(o_ptr.dtype.element_ty), mask=mask_d)


def _bin_attention_step(q, k, v, bins, seen, order, softmax_scale, bin):
    (B, H, _, D), (_, C, _, n) = q.shape, bins.shape
    tiles = _step_tiles(q.dtype, D, H // C)
    n_part, o = _cdiv(n * bin, tiles["BLOCK_N"]), _new(q, B, H, 1, D)
    parts, lse = (_new(q, B, H, n_part, *size, dtype=torch.float32) for size in ((D,), ()))
    _bin_attention_step_kernel[(n_part * B * C * tiles["HEAD_TILES"],)](
        q, k, v, bins, seen, order, parts, lse, n=n, n_part=n_part,
        **_sizes(q, k, v, bins, softmax_scale, bin), **tiles)
    _merge_parts_kernel[(B * H,)](parts, lse, o, n_part=n_part, D=D, BLOCK_D=tiles["BLOCK_D"], **MERGE)
    return o


class _BinAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bins, seen, softmax_scale, bin):
        o, lse = _bin_attention_fwd(q, k, v, bins, seen, softmax_scale, bin)
        ctx.save_for_backward(q, k, v, o, lse, bins, seen)
        ctx.constants = softmax_scale, bin
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, bins, seen = ctx.saved_tensors
        return *_bin_attention_bwd(q, k, v, o, lse, do, bins, seen, *ctx.constants), *[None] * 4


def bin_attention(q: Tensor, k: Tensor, v: Tensor, bins: Tensor, seen: Tensor,
                  softmax_scale: float | None = None, *, bin: int,
                  order: Tensor | None = None) -> Tensor:
    """sea.bin_attention.

    Gradients reach q, k and v and are summed in a fixed order: bit-equal from run to run.
    """
    _expect(bins.ndim == 4 and bins.dtype == torch.int32, "bins", "int32 of shape (B, C, T, n)",
            f"{bins.dtype} {tuple(bins.shape)}")
    _check_attention(q, k, v, seen, order)
    (B, H, T, D), Hkv, (C, _, n) = q.shape, k.shape[1], bins.shape[1:]
    _expect(bins.shape[0] == B and bins.shape[2] == T and C >= 1 and H % C == C % Hkv == 0, "bins",
            f"shape (B, C, T, n) with B, T = {(B, T)} and C a divisor of the {H} heads and a multiple of the "
            f"{Hkv} key/value heads", tuple(bins.shape))
    _expect(n >= 1 and bins.numel() < 2**31, "bins", "at least one bin, and fewer than 2^31 in all",
            tuple(bins.shape))
    _expect(isinstance(bin, int) and bin >= 1, "bin", "an integer >= 1", bin)
    bins, seen = bins.contiguous(), seen.contiguous()
    order = None if order is None else order.contiguous()
    scale = float(D**-0.5 if softmax_scale is None else softmax_scale)
    with torch.cuda.device_of(q):
        if _is_step(q):
            return _bin_attention_step(q, k, v, bins, seen, order, scale, bin)
        if order is not None:
            k, v = _in_order(k, v, seen, order)
        return _BinAttention.apply(q, k, v, bins, seen, scale, bin)
