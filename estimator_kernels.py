"""SEA's estimator in Triton: the steps of sea.py from q, k and v to the scores of each row's cells, and the
mix at the end.

kernels.py re-exports these operations. What its docstring says of signatures, dtypes, GROUP and decoding
steps holds here, too.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HISTORY = 4  # rows of the past that a 3-row convolution of dilation 2 looks at

# What fits into shared memory and registers; kernels.supports asks. Sizes are padded to powers of two.
MAX_STRIDE = 32  # a row and its keys, in a chunk of causal_context
MAX_FEATURES = 128
# m x D, of causal_context
MAX_SUMS = {torch.bfloat16: 128 * 128, torch.float16: 64 * 64, torch.float32: 64 * 64}
MAX_DECODER = 2**16  # 2D x P, weights of encode_rows' decoder for one of its channels
MAX_WIDTH_CELL_KEYS = 2048  # the cells of a row

MAX_D_HEAD = 256  # of attention: tiles of queries, keys and accumulators must fit into registers

DTYPES = tuple(MAX_SUMS)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; -inf would give nan: exp2((-inf) - (-inf))
LOG2_E = tl.constexpr(math.log2(math.e))  # e^x = 2^(x log2 e), and the GPU has 2^x


# -- tools -------------------------------------------------------------------------------------------


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def _check_device(name: str, x: Tensor) -> None:
    _expect(x.is_cuda or triton.knobs.runtime.interpret, name, "a CUDA tensor", f"one on {x.device}")


def _check_tensor(name: str, x: Tensor, n_dim: int, shape: str) -> None:
    _expect(x.ndim == n_dim, name, f"shape {shape}", tuple(x.shape))
    _expect(x.dtype in DTYPES, name, "float32, float16 or bfloat16", x.dtype)
    _check_device(name, x)


def _check_qk(q: Tensor, k: Tensor, seen: Tensor) -> None:
    """What all kinds of attention ask of their arguments."""
    (B, H, T, D), Hkv = q.shape, k.shape[1]
    _expect(k.shape[0] == B and k.shape[3] == D, "k", f"a batch of {B} and head size {D} as q",
            tuple(k.shape))
    _expect(H % Hkv == 0, "k", f"a number of heads that divides q's {H}", Hkv)
    _expect(D <= MAX_D_HEAD, "q", f"head size <= {MAX_D_HEAD}", D)
    _expect(seen.shape == (B, T), "seen", f"shape (B, T) = {(B, T)}", tuple(seen.shape))


def _check_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, order: Tensor | None) -> None:
    """What sparse_attention and bin_attention ask of their arguments."""
    for x_name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(x_name, x, 4, "(B, heads, tokens, D)")
        _expect(x.dtype == q.dtype, x_name, f"dtype {q.dtype} as q", x.dtype)
        _expect(x.device == q.device, x_name, f"device {q.device} as q", x.device)
        _expect(x.shape[2] >= 1, x_name, "at least one token", tuple(x.shape))
    _check_qk(q, k, seen)
    _expect(k.shape == v.shape, "v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    in_order = len(k), k.shape[2]
    _expect(order is None or order.shape == in_order, "order", f"shape (B, S) = {in_order}",
            None if order is None else tuple(order.shape))


def _in_order(k: Tensor, v: Tensor, seen: Tensor, order: Tensor) -> list[Tensor]:
    """Keys and values, each at its rank; 0 where no query sees them, since padding may be nan."""
    offs_k = order[:, None, :, None].expand_as(k)
    unseen = torch.arange(k.shape[2], device=k.device) >= seen.amax(1, keepdim=True)
    return [x.gather(2, offs_k).masked_fill(unseen[:, None, :, None], 0) for x in (k, v)]


def _is_step(x: Tensor) -> bool:
    """A decoding step: one row, and no gradient wanted."""
    return x.shape[2] == 1 and not torch.is_grad_enabled()


# Triton's own versions of these two take 3 us a call from Python, and a layer makes dozens of calls.


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is >= n >= 1."""
    return 1 << (n - 1).bit_length()


def _dot_block(n: int, dtype: torch.dtype = torch.float32) -> int:
    """Block size for n numbers in a tl.dot. In half precision, for a tile whose rows are n long, at least 128
    bytes: from narrower ones Triton 3.6 and 3.7 read beyond the tile on Hopper
    (github.com/triton-lang/triton/issues/11366)."""
    return max(16 if dtype == torch.float32 else 64, _next_power_of_2(n))


def _new(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, on the device of `like` and, unless another is given, of its dtype."""
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device)


@triton.jit
def _program(n):
    """A program's number among the n of its head, and its head (int64)."""
    pid = tl.program_id(0)
    return pid % n, (pid // n).to(tl.int64)


@triton.jit
def _load_tile(ptr, row, col, row_stride, col_stride, mask):
    """Rows (int64) and columns of one head, 0 where masked: (rows, columns)."""
    return tl.load(ptr + row[:, None] * row_stride + col[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def _vector(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


# -- a decoding step's entries, and means of heads ----------------------------------------------------

TAKE = dict(num_warps=4)
MEAN = dict(num_warps=4)


@triton.jit
def _take_entry(x_ptr, strides, out_ptr, b, h, pid_bh, i, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x_ptr += b * strides[0] + h * strides[1] + i * strides[2]
    mask = (offs < SIZE) & (i >= 0) & (i < N)
    x = tl.load(x_ptr + offs.to(tl.int64) * strides[3], mask=mask, other=float("nan"))
    tl.store(out_ptr + pid_bh * SIZE + offs, x, mask=offs < SIZE)


# The entry of each head of k and of v at its sequence's index; NaN where there is none, as when a CUDA graph of
# a step is replayed beyond the end of its buffer of keys.
# One program: one head; grid (B * Hkv,).
#   k, v (B, Hkv, N, SIZE), any strides; index (B,) int64
#   k_out, v_out (B, Hkv, 1, SIZE) contiguous
# One launch; eager expands the index, and its gathers read one for every number. Reference: sea.take_pair,
# which raises in place of NaN.
@triton.jit
def _take_pair_kernel(k_ptr, v_ptr, index_ptr, k_out_ptr, v_out_ptr, k_strides, v_strides, HKV, N,
                      SIZE: tl.constexpr, BLOCK: tl.constexpr):
    pid_bkv = tl.program_id(0).to(tl.int64)
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    i = tl.load(index_ptr + b)
    _take_entry(k_ptr, k_strides, k_out_ptr, b, kv, pid_bkv, i, N, SIZE, BLOCK)
    _take_entry(v_ptr, v_strides, v_out_ptr, b, kv, pid_bkv, i, N, SIZE, BLOCK)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """sea.take."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def take_pair(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """sea.take_pair, in one kernel if that is one entry a sequence and no gradient is wanted."""
    if index.shape[1] != 1 or torch.is_grad_enabled():
        return _take(k, index), _take(v, index)
    _check_device("k", k)
    _expect(k.shape == v.shape, "v", f"shape {tuple(k.shape)} as k", tuple(v.shape))
    (B, Hkv, N, size), outs = k.shape, [_new(x, *x.shape[:2], 1, x.shape[3]) for x in (k, v)]
    with torch.cuda.device_of(k):
        _take_pair_kernel[(B * Hkv,)](k, v, index.contiguous(), *outs, k_strides=k.stride(), v_strides=v.stride(),
                                      HKV=Hkv, N=N, SIZE=size, BLOCK=_next_power_of_2(size), **TAKE)
    return tuple(outs)


# rows = that of the past, then x; row = the one of both that is numbered `last`.
# One program: one head; grid (B * H,).
#   past, x (B, H, 1, SIZE) contiguous; last (B,) int64: 0 or 1
#   rows (B, H, 2, SIZE), row (B, H, 1, SIZE), which may be past: contiguous
# One launch for three copies. Reference: sea.keep_row.
@triton.jit
def _keep_row_kernel(past_ptr, x_ptr, last_ptr, rows_ptr, row_ptr, H, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    pid_bh, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, rows_ptr = offs < SIZE, rows_ptr + pid_bh * 2 * SIZE + offs
    past, x = _vector(past_ptr + pid_bh * SIZE, offs, mask), _vector(x_ptr + pid_bh * SIZE, offs, mask)
    tl.store(rows_ptr, past.to(rows_ptr.dtype.element_ty), mask=mask)
    tl.store(rows_ptr + SIZE, x.to(rows_ptr.dtype.element_ty), mask=mask)
    past = past.to(rows_ptr.dtype.element_ty).to(tl.float32)  # as rows have it
    row = tl.where(tl.load(last_ptr + pid_bh // H) == 0, past, x)
    tl.store(row_ptr + pid_bh * SIZE + offs, row.to(row_ptr.dtype.element_ty), mask=mask)


def keep_row(past: Tensor, x: Tensor, last: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """sea.keep_row, in one kernel if that is of one row and no gradient is wanted."""
    B, H, n_past, size = past.shape
    if n_past != 1 or last.shape[1] != 1 or not past.is_contiguous() or not _is_step(x):
        rows = torch.cat([past.to(x.dtype), x], dim=2) if n_past else x
        row = _take(rows, last)
        return rows, past.copy_(row) if in_place and past.shape == row.shape else row
    _check_device("x", x)
    rows, row = _new(x, B, H, 2, size), past if in_place else _new(x, B, H, 1, size)
    with torch.cuda.device_of(x):
        _keep_row_kernel[(B * H,)](past, x.contiguous(), last.contiguous(), rows, row, H=H,
                                   SIZE=size, BLOCK=_next_power_of_2(size), **TAKE)
    return rows, row


# out = the mean over every GROUP adjacent heads, or their sum by shares.
# One program: BLOCK_T queries of one group; grid (cdiv(T, BLOCK_T) * B * N,).
#   q (B, N * GROUP, T, D), any strides; share (N * GROUP,) or None
#   out (B, N, T, D) contiguous
# fp32: the sum. Reads each query once. Reference: sea.mean_of_heads.
@triton.jit
def _mean_of_heads_kernel(q_ptr, share_ptr, out_ptr, q_strides, N, T, GROUP: tl.constexpr, D: tl.constexpr,
                          BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_t, pid_bn = _program(tl.cdiv(T, BLOCK_T))
    b, n = pid_bn // N, pid_bn % N
    offs_t, offs_d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for g in tl.static_range(GROUP):
        head_ptr = q_ptr + b * q_strides[0] + (n * GROUP + g) * q_strides[1]
        q = _load_tile(head_ptr, offs_t, offs_d, q_strides[2], q_strides[3], mask)
        times = 1.0 if share_ptr is None else tl.load(share_ptr + n * GROUP + g).to(tl.float32) * GROUP
        total += q.to(tl.float32) * times
    out_ptrs = out_ptr + (pid_bn * T + offs_t)[:, None] * D + offs_d[None, :]
    mean = tl.div_rn(total, tl.full(total.shape, GROUP, tl.float32))  # "/" would not give x for GROUP times x
    tl.store(out_ptrs, mean.to(out_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
def mean_of_heads(q: Tensor, n: int, share: Tensor | None = None) -> Tensor:
    """sea.mean_of_heads, without gradient."""
    (B, H, T, D), block_d = q.shape, _next_power_of_2(q.shape[3])
    if H == n and share is None:
        return q
    _expect(share is None or share.shape == (H,), "share", f"shape (H,) = {(H,)}",
            share is not None and tuple(share.shape))
    block_t, out = min(_next_power_of_2(T), max(2048 // block_d, 1)), _new(q, B, n, T, D)
    with torch.cuda.device_of(q):
        _mean_of_heads_kernel[(_cdiv(T, block_t) * B * n,)](
            q, share if share is None else share.contiguous(), out, q_strides=q.stride(), N=n, T=T, GROUP=H // n,
            D=D, BLOCK_T=block_t, BLOCK_D=block_d, **MEAN)
    return out


# -- rows --------------------------------------------------------------------------------------------

ROWS = dict(BLOCK=256, num_warps=4)


# Which tokens are rows, and which row each token uses.
# One program: BLOCK tokens of one sequence, and as many rows; grid (cdiv(T, BLOCK) * B,).
#   count, n_new, n_rows, next_count (B,), seen, row (B, T), row_seen and row_in_cells (B, N_BEFORE + R),
#   place (B, R), last (B, 1) or, with stride 1, (B, 0): int64, contiguous
# One launch for what eager computes in a dozen. Reference: sea.choose_rows.
@triton.jit
def _choose_rows_kernel(count_ptr, n_new_ptr, seen_ptr, row_ptr, row_seen_ptr, place_ptr, n_rows_ptr,
                        last_ptr, next_count_ptr, row_in_cells_ptr, T, R, STRIDE: tl.constexpr,
                        N_BEFORE: tl.constexpr, LOCAL: tl.constexpr, BIN: tl.constexpr,
                        BLOCK: tl.constexpr):
    pid_t, b = _program(tl.cdiv(T, BLOCK))
    count, n_new = tl.load(count_ptr + b), tl.load(n_new_ptr + b)
    first = (STRIDE - count % STRIDE) % STRIDE
    offs = (pid_t * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    # -- tokens
    mask_t = offs < T
    row = (offs - first + STRIDE) // STRIDE - 1 + N_BEFORE  # "+ STRIDE": no division of a negative number
    row = tl.minimum(tl.maximum(row, 0), N_BEFORE + R - 1)
    tl.store(seen_ptr + b * T + offs, tl.where(offs < n_new, count + offs + 1, 0), mask=mask_t)
    tl.store(row_ptr + b * T + offs, row, mask=mask_t)
    # -- rows
    mask_r, place = offs < R, first + offs * STRIDE
    row_seen_ptr += b * (N_BEFORE + R)
    row_in_cells_ptr += b * (N_BEFORE + R)
    row_seen = tl.where(place < n_new, count + place + 1, 0)
    tl.store(row_seen_ptr + N_BEFORE + offs, row_seen, mask=mask_r)
    tl.store(row_in_cells_ptr + N_BEFORE + offs, tl.maximum(row_seen - LOCAL, 0) // BIN * BIN, mask=mask_r)
    tl.store(place_ptr + b * R + offs, tl.minimum(place, T - 1), mask=mask_r)
    if pid_t == 0:
        n_rows = tl.maximum(n_new - first + STRIDE - 1, 0) // STRIDE
        tl.store(n_rows_ptr + b, n_rows)
        tl.store(next_count_ptr + b, count + n_new)
        if N_BEFORE == 1:
            of_past = tl.maximum(count + first - STRIDE + 1, 0)
            tl.store(row_seen_ptr, of_past)
            tl.store(row_in_cells_ptr, tl.maximum(of_past - LOCAL, 0) // BIN * BIN)
        if STRIDE > 1:
            tl.store(last_ptr + b, tl.maximum(N_BEFORE + n_rows - 1, 0))


def choose_rows(count: Tensor, n_new: Tensor, T: int, stride: int, n_before: int, local: int = 0,
                bin: int = 1) -> tuple[Tensor, ...]:
    """sea.choose_rows."""
    _check_device("q", count)  # all tensors of a call are where q is
    B, R = len(count), (T - 1) // stride + 1
    seen, row, row_seen, row_in_cells, place = (_new(count, B, n) for n in (T, T, *[n_before + R] * 2, R))
    n_rows, last, next_count = _new(count, B), _new(count, B, min(stride - 1, 1)), _new(count, B)
    with torch.cuda.device_of(count):
        _choose_rows_kernel[(_cdiv(T, ROWS["BLOCK"]) * B,)](
            count.contiguous(), n_new.contiguous(), seen, row, row_seen, place, n_rows, last, next_count,
            row_in_cells, T=T, R=R, STRIDE=stride, N_BEFORE=n_before, LOCAL=local, BIN=bin, **ROWS)
    return seen, row, row_seen, place, n_rows, last, next_count, row_in_cells


# -- running sums ------------------------------------------------------------------------------------


def _running_sums_tiles(E: int) -> dict:
    """Fewer rows at a time where the programs of the columns alone fill the GPU."""
    return dict(BLOCK_N=64 if E > 1024 else 128, BLOCK_E=16, num_warps=4)


# out[i] = initial + x[0] + ... + x[i-1] for i = 0 ... n; REVERSE: initial + x[i] + ... + x[n-1].
# One program: BLOCK_E columns of one group, BLOCK_N rows at a time, in order; grid (cdiv(E, BLOCK_E) * N,).
#   x (N, n, E), initial (N, E) -> out (N, n + 1, E): fp32, contiguous
# Reads and writes once, where eager pads, sums, concatenates and copies. Reference: torch.cumsum.
@triton.jit(do_not_specialize=["n"])
def _running_sums_kernel(x_ptr, initial_ptr, out_ptr, n, E, REVERSE: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_E: tl.constexpr):
    pid_e, pid_n = _program(tl.cdiv(E, BLOCK_E))
    offs_n, offs_e = tl.arange(0, BLOCK_N), pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    x_ptr += pid_n * n * E + offs_e
    out_ptr += pid_n * (n + 1) * E + offs_e
    total = tl.load(initial_ptr + pid_n * E + offs_e, mask=mask_e, other=0.0)
    if REVERSE:
        tl.store(out_ptr + n.to(tl.int64) * E, total, mask=mask_e)
    else:
        tl.store(out_ptr, total, mask=mask_e)
    for start in range(0, n, BLOCK_N):
        i = start + offs_n
        if REVERSE:
            i_in, i_out = n - 1 - i, n - 1 - i
        else:
            i_in, i_out = i, i + 1
        mask = (i < n)[:, None] & mask_e[None, :]
        # (BLOCK_N, BLOCK_E)
        x = tl.load(x_ptr[None, :] + i_in[:, None].to(tl.int64) * E, mask=mask, other=0.0)
        sums = tl.cumsum(x, axis=0) + total[None, :]
        tl.store(out_ptr[None, :] + i_out[:, None].to(tl.int64) * E, sums, mask=mask)
        total += tl.sum(x, axis=0)


def _running_sums(x: Tensor, initial: Tensor, reverse: bool = False) -> Tensor:
    """x (N, n, ...), initial (N, ...) -> (N, n + 1, ...), fp32: sums before each place, or from it on."""
    x, initial = x.contiguous(), initial.float().contiguous()
    N, n = x.shape[:2]
    E = math.prod(x.shape[2:])
    out = _new(x, N, n + 1, *x.shape[2:], dtype=torch.float32)
    tiles = _running_sums_tiles(E)
    _running_sums_kernel[(_cdiv(E, tiles["BLOCK_E"]) * N,)](x, initial, out, n, E, REVERSE=reverse, **tiles)
    return out


# -- causal linear attention -------------------------------------------------------------------------
#
# c_i = sum_j (phi(q_i) . phi(k_j)) vcat_j / den_i over the keys j that row i sees, vcat = [pos ; v]. Keys
# stand at places, key j at place j + lead, so that row i sees the places before (i + 1) * STRIDE: lead is
# STRIDE - 1 where the first token is a row, and less where the first row comes later. Places are cut into
# chunks, chunks into segments. A program walks the chunks of one segment and holds the sum of
# phi(k) [vcat ; 1]^T over all earlier keys, m x (2D+1) numbers; keys of the same chunk enter through a
# product of row and key features. Backward, with g = dc / den and g_den = -(g . c):
#
#     dphi(q_i)  = sum_j (g_i . vcat_j + g_den_i) phi(k_j)
#     dphi(k_j)  = sum_i (g_i . vcat_j + g_den_i) phi(q_i)
#     dvcat_j    = sum_i (phi(q_i) . phi(k_j)) g_i
#
# the first in the same walk, with the same sums, the others in a walk from the end, with sums of
# phi(q) [g ; g_den]^T. So nothing is kept for them but the sums before each segment, den and c.

# Places of a chunk, half as many in fp32 and for heads larger than 64; programs that fill the GPU; warps.
CONTEXT = dict(places=64, programs=528, warps=4, warps_backward=8)
SUM_POSITIONS = dict(BLOCK_H=16, BLOCK_R=4, num_warps=4)


def _context_tiles(q: Tensor, k: Tensor, n_features: int, stride: int, backward: bool) -> tuple[int, dict]:
    """Segments of a head, and the sizes of a kernel that walks them. Backward, chunks are twice as long
    where bf16 tiles are small enough, and the segments the same."""
    (B, Hkv, T, D), dtype, small = k.shape, q.dtype, q.shape[3] <= 64
    places = CONTEXT["places"] // (1 if dtype != torch.float32 and small else 2)
    rows, longer = max(1, places // stride), 2 if dtype == torch.bfloat16 and small else 1
    n_long = _cdiv(T + stride - 1, rows * stride * longer)  # chunks backward, for the largest lead
    n_chunk = max(1, n_long * B * Hkv // CONTEXT["programs"])
    n_segment = _cdiv(n_long, n_chunk)
    rows, n_chunk = (rows * longer, n_chunk) if backward else (rows, n_chunk * longer)
    dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32  # sums of features may overflow fp16
    return n_segment, dict(
        n_chunk=n_chunk, STRIDE=stride, CHUNK=rows * stride, BLOCK_R=_dot_block(rows),
        BLOCK_C=_dot_block(rows * stride), BLOCK_D=_dot_block(D, dtype),
        BLOCK_F=_dot_block(n_features, dtype), DOT=dot,
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_stages=1,
        num_warps=CONTEXT["warps_backward" if backward else "warps"])


def _context_step_tiles(D: int, n_features: int) -> dict:
    block_d, block_f = _next_power_of_2(D), _next_power_of_2(n_features)
    return dict(BLOCK_D=block_d, BLOCK_F=block_f, num_warps=4 if block_d * block_f <= 4096 else 8)


@triton.jit
def _projection(w_ptr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                dtype: tl.constexpr):
    """W as a sum of one or two (BLOCK_D, BLOCK_F) in the dtype of x: two half-precision products are as good
    as one in fp32."""
    offs_d, offs_f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    w_all = _load_tile(w_ptr, offs_d, offs_f, M, 1, (offs_d < D)[:, None] & (offs_f < M)[None, :])
    w = w_all.to(dtype)
    if dtype == tl.float32 or w_all.dtype == dtype:
        return (w,)
    else:
        return w, (w_all.to(tl.float32) - w.to(tl.float32)).to(dtype)


@triton.jit
def _features(x, w, scale, M: tl.constexpr, BLOCK_F: tl.constexpr):
    """relu(x W * scale) + 1e-3, 0 in the padding: (BLOCK, BLOCK_D) -> (BLOCK, BLOCK_F) fp32."""
    f = tl.dot(x, w[0], input_precision="ieee")
    if len(w) == 2:
        f += tl.dot(x, w[1])
    return tl.where((tl.arange(0, BLOCK_F) < M)[None, :], tl.maximum(f * scale, 0.0) + 1e-3, 0.0)


@triton.jit
def _keys_of_head(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, k_strides, v_strides, n_position, b, kv,
                  D: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_F: tl.constexpr):
    """What _keys_of_chunk needs to know about one key/value head, and W by itself."""
    count, n_new = tl.load(count_ptr + b), tl.load(n_new_ptr + b)
    lead = (count + STRIDE - 1) % STRIDE
    w = _projection(w_ptr, D, M, BLOCK_D, BLOCK_F, k_ptr.dtype.element_ty)
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    head = (k_ptr, v_ptr, pos_ptr + count * D, k_strides, v_strides, n_position - 1 - count, n_new, lead, w)
    return head, w


@triton.jit
def _keys_of_chunk(head, chunk, k_scale, D: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr):
    """The keys of a chunk: j (int64), phi(k) fp32, v and pos, which are 0 where there is no key."""
    k_ptr, v_ptr, pos_ptr, k_strides, v_strides, last_pos, n_new, lead, w = head
    offs_c, offs_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    j = chunk * CHUNK + offs_c - lead
    mask_j = (offs_c < CHUNK) & (j >= 0) & (j < n_new)
    mask_k = mask_j[:, None] & (offs_d < D)[None, :]
    k = _load_tile(k_ptr, j, offs_d, k_strides[2], k_strides[3], mask_k)  # (BLOCK_C, BLOCK_D)
    v = _load_tile(v_ptr, j, offs_d, v_strides[2], v_strides[3], mask_k).to(DOT)
    pos = _load_tile(pos_ptr, tl.minimum(j, last_pos), offs_d, D, 1, mask_k).to(DOT)
    f = tl.where(mask_j[:, None], _features(k, w, k_scale, M, BLOCK_F), 0.0)  # (BLOCK_C, BLOCK_F)
    return j, f, v, pos


@triton.jit
def _rows_of_chunk(chunk, R, D: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a chunk (int64), and their masks (BLOCK_R,) and (BLOCK_R, BLOCK_D)."""
    offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    row = (chunk * (CHUNK // STRIDE) + offs_r).to(tl.int64)
    mask_r = (row < R) & (offs_r < CHUNK // STRIDE)
    return row, mask_r, mask_r[:, None] & (offs_d < D)[None, :]


@triton.jit
def _load_sums(sums_ptr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    """A matrix of sums (m, 2D+1) as its parts: of pos, of v, (BLOCK_F, BLOCK_D), and of ones, (BLOCK_F,)."""
    offs_f, offs_d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    mask_f, sums_ptr = offs_f < M, sums_ptr + offs_f * (2 * D + 1)
    mask = mask_f[:, None] & (offs_d < D)[None, :]
    of_pos = tl.load(sums_ptr[:, None] + offs_d[None, :], mask=mask, other=0.0)
    of_v = tl.load(sums_ptr[:, None] + D + offs_d[None, :], mask=mask, other=0.0)
    return of_pos, of_v, tl.load(sums_ptr + 2 * D, mask=mask_f, other=0.0)


@triton.jit
def _store_sums(sums_ptr, of_pos, of_v, of_ones, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_F: tl.constexpr):
    offs_f, offs_d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    mask_f, sums_ptr = offs_f < M, sums_ptr + offs_f * (2 * D + 1)
    mask = mask_f[:, None] & (offs_d < D)[None, :]
    tl.store(sums_ptr[:, None] + offs_d[None, :], of_pos, mask=mask)
    tl.store(sums_ptr[:, None] + D + offs_d[None, :], of_v, mask=mask)
    tl.store(sums_ptr + 2 * D, of_ones, mask=mask_f)


# sums[segment] = sum over its keys of phi(k)^T [pos ; v ; 1].
# One program: one segment (n_chunk chunks of CHUNK places) of one key/value head; grid
# (n_segment * B * Hkv,).
#   k, v (B, Hkv, T, D), any strides; pos (n_position, D), w (D, m), any dtype, and count, n_new (B,) int:
#   contiguous
#   sums (B * Hkv, n_segment, m, 2D+1) fp32, contiguous
# fp32: features, rounded to DOT where they enter the sums' dots, and sums, which stay in registers. Reads
# each key once. Reference: sea.causal_context.
@triton.jit(do_not_specialize=["n_segment", "n_chunk"])
def _context_sums_kernel(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, sums_ptr, k_strides, v_strides,
                         n_position, HKV, n_segment, n_chunk, k_scale, D: tl.constexpr, M: tl.constexpr,
                         STRIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr,
                         PRECISION: tl.constexpr):
    pid_s, pid_bkv = _program(n_segment)
    head = _keys_of_head(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, k_strides, v_strides,
                         n_position, pid_bkv // HKV, pid_bkv % HKV, D, M, STRIDE, BLOCK_D, BLOCK_F)[0]
    sum_pos, sum_v = tl.zeros((BLOCK_F, BLOCK_D), tl.float32), tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, n_chunk):
        _, f, v, pos = _keys_of_chunk(head, pid_s * n_chunk + i, k_scale, D, M, CHUNK, BLOCK_C, BLOCK_D,
                                      BLOCK_F, DOT)
        f_dot = tl.trans(f.to(DOT))
        sum_pos += tl.dot(f_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(f_dot, v, input_precision=PRECISION)
        norm += tl.sum(f, axis=0)
    sums_ptr += (pid_bkv * n_segment + pid_s) * M * (2 * D + 1)
    _store_sums(sums_ptr, sum_pos, sum_v, norm, D, M, BLOCK_D, BLOCK_F)


# c_i = (phi(q_i) sums + same) / den_i: sums = sum of phi(k_j)^T vcat_j over the keys j of all earlier chunks,
# same = sum of (phi(q_i) . phi(k_j)) vcat_j over the keys of this chunk that row i sees, and den_i is the
# numerator with 1 for vcat_j.
# One program: one segment of one query head, chunk by chunk, each with CHUNK // STRIDE rows; grid
# (n_segment * B * H,).
#   q (B, H, R, D), any strides; k ... n_new as above
#   sums (B * Hkv, n_segment + 1, m, 2D+1) fp32: what precedes each segment
#   context (B, H, R, 2D), den (B, H, R) fp32 (0 as 1), contiguous
# fp32: features and sums, rounded to DOT where they enter dots; den, quotient. Reads q once, and k and v once
# for each of the GROUP heads that share them; writes 2D numbers per row. Fast, since the sums stay on chip
# from chunk to chunk and the segments fill the GPU. Reference: sea.causal_context.
@triton.jit(do_not_specialize=["n_segment", "n_chunk"])
def _context_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, sums_ptr, context_ptr, den_ptr,
                    q_strides, k_strides, v_strides, n_position, H, GROUP, R, n_segment, n_chunk, q_scale,
                    k_scale, D: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    pid_s, pid_bh = _program(n_segment)
    b, h, kv = pid_bh // H, pid_bh % H, pid_bh % H // GROUP
    offs_r, offs_c, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    head, w = _keys_of_head(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, k_strides, v_strides,
                            n_position, b, kv, D, M, STRIDE, BLOCK_D, BLOCK_F)
    sums_ptr += ((b * (H // GROUP) + kv) * (n_segment + 1) + pid_s) * M * (2 * D + 1)
    sum_pos, sum_v, norm = _load_sums(sums_ptr, D, M, BLOCK_D, BLOCK_F)
    mask_earlier = offs_c[None, :] < (offs_r[:, None] + 1) * STRIDE  # (BLOCK_R, BLOCK_C)
    for i in range(0, n_chunk):
        chunk = pid_s * n_chunk + i
        _, f_k, v, pos = _keys_of_chunk(head, chunk, k_scale, D, M, CHUNK, BLOCK_C, BLOCK_D, BLOCK_F, DOT)
        row, mask_r, mask_q = _rows_of_chunk(chunk, R, D, STRIDE, CHUNK, BLOCK_R, BLOCK_D)
        q = _load_tile(q_ptr, row, offs_d, q_strides[2], q_strides[3], mask_q)  # (BLOCK_R, BLOCK_D)
        f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
        q_dot, k_dot = f_q.to(DOT), f_k.to(DOT)
        same = tl.dot(q_dot, tl.trans(k_dot), input_precision=PRECISION)  # (BLOCK_R, BLOCK_C)
        same = tl.where(mask_earlier, same, 0.0)
        den = tl.sum(f_q * norm[None, :], axis=1) + tl.sum(same, axis=1)
        den = tl.where(den == 0.0, 1.0, den)  # a row that sees nothing gives 0
        same = same.to(DOT)
        c_pos = tl.dot(q_dot, sum_pos.to(DOT), input_precision=PRECISION)
        c_pos += tl.dot(same, pos, input_precision=PRECISION)
        c_v = tl.dot(q_dot, sum_v.to(DOT), input_precision=PRECISION)
        c_v += tl.dot(same, v, input_precision=PRECISION)
        row += pid_bh * R
        tl.store(context_ptr + row[:, None] * 2 * D + offs_d[None, :], c_pos / den[:, None], mask=mask_q)
        tl.store(context_ptr + row[:, None] * 2 * D + D + offs_d[None, :], c_v / den[:, None], mask=mask_q)
        tl.store(den_ptr + row, den, mask=mask_r)

        k_dot = tl.trans(k_dot)
        sum_pos += tl.dot(k_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(k_dot, v, input_precision=PRECISION)
        norm += tl.sum(f_k, axis=0)


# dq, and the sums that the keys' gradients need. g is dcontext / den, the gradient of phi(q) sum phi(k)^T v,
# g_den = -rowsum(g context) that of the denominator.
# One program: the segment and walk of _context_kernel.
#   context, dcontext (B, H, R, 2D), den (B, H, R): contiguous
#   dq (B, H, R, D), g_den (B, H, R) fp32, contiguous; dsums (B * H, n_segment, m, 2D+1) fp32: the segment's
#   sum of phi(q)^T [g ; g_den]
# fp32: features, sums and g, rounded to DOT where they enter dots. Reference: autograd through
# sea.causal_context.
@triton.jit(do_not_specialize=["n_segment", "n_chunk"])
def _context_dq_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, sums_ptr, context_ptr,
                       dcontext_ptr, den_ptr, dq_ptr, g_den_ptr, dsums_ptr, q_strides, k_strides, v_strides,
                       n_position, H, GROUP, R, n_segment, n_chunk, q_scale, k_scale, D: tl.constexpr,
                       M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr,
                       PRECISION: tl.constexpr):
    pid_s, pid_bh = _program(n_segment)
    b, h, kv = pid_bh // H, pid_bh % H, pid_bh % H // GROUP
    offs_r, offs_c, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    head, w = _keys_of_head(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, k_strides, v_strides,
                            n_position, b, kv, D, M, STRIDE, BLOCK_D, BLOCK_F)
    sums_ptr += ((b * (H // GROUP) + kv) * (n_segment + 1) + pid_s) * M * (2 * D + 1)
    sum_pos, sum_v, norm = _load_sums(sums_ptr, D, M, BLOCK_D, BLOCK_F)
    dsum_pos, dsum_v = tl.zeros((BLOCK_F, BLOCK_D), tl.float32), tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    dnorm = tl.zeros((BLOCK_F,), tl.float32)
    mask_earlier = offs_c[None, :] < (offs_r[:, None] + 1) * STRIDE  # (BLOCK_R, BLOCK_C)
    for i in range(0, n_chunk):
        chunk = pid_s * n_chunk + i
        _, f_k, v, pos = _keys_of_chunk(head, chunk, k_scale, D, M, CHUNK, BLOCK_C, BLOCK_D, BLOCK_F, DOT)
        row, mask_r, mask_q = _rows_of_chunk(chunk, R, D, STRIDE, CHUNK, BLOCK_R, BLOCK_D)
        q = _load_tile(q_ptr, row, offs_d, q_strides[2], q_strides[3], mask_q)  # (BLOCK_R, BLOCK_D)
        f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
        row += pid_bh * R
        # -- g and g_den
        den = tl.load(den_ptr + row, mask=mask_r, other=1.0)[:, None]
        # (BLOCK_R, BLOCK_D)
        g_pos = _load_tile(dcontext_ptr, row, offs_d, 2 * D, 1, mask_q).to(tl.float32) / den
        g_v = _load_tile(dcontext_ptr + D, row, offs_d, 2 * D, 1, mask_q).to(tl.float32) / den
        g_c = g_pos * _load_tile(context_ptr, row, offs_d, 2 * D, 1, mask_q).to(tl.float32)
        g_c += g_v * _load_tile(context_ptr + D, row, offs_d, 2 * D, 1, mask_q).to(tl.float32)
        g_den = -tl.sum(g_c, axis=1)
        tl.store(g_den_ptr + row, g_den, mask=mask_r)
        g_pos, g_v = g_pos.to(DOT), g_v.to(DOT)
        # -- dphi(q), (BLOCK_R, BLOCK_F)
        df = tl.dot(g_pos, tl.trans(sum_pos.to(DOT)), input_precision=PRECISION)
        df += g_den[:, None] * norm[None, :]
        df += tl.dot(g_v, tl.trans(sum_v.to(DOT)), input_precision=PRECISION)
        same = tl.dot(g_pos, tl.trans(pos), input_precision=PRECISION) + g_den[:, None]  # (BLOCK_R, BLOCK_C)
        same = tl.where(mask_earlier, same + tl.dot(g_v, tl.trans(v), input_precision=PRECISION), 0.0)
        k_dot = f_k.to(DOT)
        df += tl.dot(same.to(DOT), k_dot, input_precision=PRECISION)
        df = tl.where(f_q > 1e-3, df * q_scale, 0.0)  # through relu
        dq = tl.dot(df.to(DOT), tl.trans(w[0]).to(DOT), input_precision=PRECISION)
        tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], dq, mask=mask_q)

        k_dot, q_dot = tl.trans(k_dot), tl.trans(f_q.to(DOT))
        sum_pos += tl.dot(k_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(k_dot, v, input_precision=PRECISION)
        norm += tl.sum(f_k, axis=0)
        dsum_pos += tl.dot(q_dot, g_pos, input_precision=PRECISION)
        dsum_v += tl.dot(q_dot, g_v, input_precision=PRECISION)
        dnorm += tl.sum(f_q * g_den[:, None], axis=0)
    dsums_ptr += (pid_bh * n_segment + pid_s) * M * (2 * D + 1)
    _store_sums(dsums_ptr, dsum_pos, dsum_v, dnorm, D, M, BLOCK_D, BLOCK_F)


# dk, dv, dpos: through phi(k) and v of each key from the sum of phi(q)^T [g ; g_den] over the later queries,
# the mirror of the forward walk, so in O(T) as well.
# One program: one segment of one key/value head, from its last chunk to its first; grid
# (n_segment * B * Hkv,).
#   dsums (B * Hkv, n_segment + 1, m, 2D+1) fp32: sum of phi(q)^T [g ; g_den] from each segment on
#   dk, dv (B, Hkv, T, D), dpos the same, fp32: contiguous
# fp32: features, sums and g, rounded to DOT where they enter dots. In a fixed order.
# Reference: autograd through sea.causal_context.
@triton.jit(do_not_specialize=["n_segment", "n_chunk"])
def _context_dkdv_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, dsums_ptr, dcontext_ptr,
                         den_ptr, g_den_ptr, dk_ptr, dv_ptr, dpos_ptr, q_strides, k_strides, v_strides,
                         n_position, H, GROUP, T, R, n_segment, n_chunk, q_scale, k_scale, D: tl.constexpr,
                         M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                         DOT: tl.constexpr, PRECISION: tl.constexpr):
    pid_s, pid_bkv = _program(n_segment)
    b, kv = pid_bkv // (H // GROUP), pid_bkv % (H // GROUP)
    offs_r, offs_c, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    head, w = _keys_of_head(k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, k_strides, v_strides,
                            n_position, b, kv, D, M, STRIDE, BLOCK_D, BLOCK_F)
    dsums_ptr += (pid_bkv * (n_segment + 1) + pid_s + 1) * M * (2 * D + 1)
    dsum_pos, dsum_v, dnorm = _load_sums(dsums_ptr, D, M, BLOCK_D, BLOCK_F)
    mask_earlier = offs_c[:, None] < (offs_r[None, :] + 1) * STRIDE  # (BLOCK_C, BLOCK_R)
    for i in range(0, n_chunk):
        chunk = pid_s * n_chunk + n_chunk - 1 - i
        j, f_k, v, pos = _keys_of_chunk(head, chunk, k_scale, D, M, CHUNK, BLOCK_C, BLOCK_D, BLOCK_F, DOT)
        k_dot = f_k.to(DOT)
        # -- rows of later chunks, (BLOCK_C, BLOCK_F) and (BLOCK_C, BLOCK_D)
        later = dsum_pos.to(DOT)
        df = tl.dot(pos, tl.trans(later), input_precision=PRECISION) + dnorm[None, :]
        dpos = tl.dot(k_dot, later, input_precision=PRECISION)
        later = dsum_v.to(DOT)
        df += tl.dot(v, tl.trans(later), input_precision=PRECISION)
        dv = tl.dot(k_dot, later, input_precision=PRECISION)
        # -- rows of this chunk
        row, mask_r, mask_q = _rows_of_chunk(chunk, R, D, STRIDE, CHUNK, BLOCK_R, BLOCK_D)
        for g in range(0, GROUP):
            h = kv * GROUP + g
            q = _load_tile(q_ptr + b * q_strides[0] + h * q_strides[1], row, offs_d, q_strides[2],
                           q_strides[3], mask_q)
            f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
            of_row = (b * H + h) * R + row
            den = tl.load(den_ptr + of_row, mask=mask_r, other=1.0)[:, None]
            g_den = tl.load(g_den_ptr + of_row, mask=mask_r, other=0.0)
            g_pos = _load_tile(dcontext_ptr, of_row, offs_d, 2 * D, 1, mask_q).to(tl.float32) / den
            g_pos = g_pos.to(DOT)
            g_v = _load_tile(dcontext_ptr + D, of_row, offs_d, 2 * D, 1, mask_q).to(tl.float32) / den
            g_v = g_v.to(DOT)
            q_dot = f_q.to(DOT)
            # (BLOCK_C, BLOCK_R)
            same = tl.dot(pos, tl.trans(g_pos), input_precision=PRECISION) + g_den[None, :]
            same = tl.where(mask_earlier, same + tl.dot(v, tl.trans(g_v), input_precision=PRECISION), 0.0)
            df += tl.dot(same.to(DOT), q_dot, input_precision=PRECISION)
            same = tl.dot(k_dot, tl.trans(q_dot), input_precision=PRECISION)
            same = tl.where(mask_earlier, same, 0.0).to(DOT)
            dpos += tl.dot(same, g_pos, input_precision=PRECISION)
            dv += tl.dot(same, g_v, input_precision=PRECISION)
            q_dot = tl.trans(q_dot)
            dsum_pos += tl.dot(q_dot, g_pos, input_precision=PRECISION)
            dsum_v += tl.dot(q_dot, g_v, input_precision=PRECISION)
            dnorm += tl.sum(f_q * g_den[:, None], axis=0)
        df = tl.where(f_k > 1e-3, df * k_scale, 0.0)  # through relu; a key that is not there has no features
        dk = tl.dot(df.to(DOT), tl.trans(w[0]).to(DOT), input_precision=PRECISION)
        mask_k = ((offs_c < CHUNK) & (j >= 0) & (j < T))[:, None] & (offs_d < D)[None, :]
        out = (pid_bkv * T + j)[:, None] * D + offs_d[None, :]
        tl.store(dk_ptr + out, dk, mask=mask_k)
        tl.store(dv_ptr + out, dv, mask=mask_k)
        tl.store(dpos_ptr + out, dpos, mask=mask_k)


# Gradient of the table of positions: row r is the sum of dpos over all heads whose sequence has a token of
# that rank.
# One program: BLOCK_R rows, BLOCK_H heads at a time; grid (cdiv(n_position, BLOCK_R),).
#   dpos (B * Hkv, T, D) fp32, count, n_new (B,) int -> dposition (n_position, D), any dtype: contiguous
# fp32: the sum, in a fixed order. Reads dpos once. Reference: autograd through sea.causal_context.
@triton.jit
def _sum_positions_kernel(dpos_ptr, count_ptr, n_new_ptr, dposition_ptr, n_head, HKV, T, n_position,
                          D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
                          BLOCK_D: tl.constexpr):
    rank, offs_d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    acc = tl.zeros((BLOCK_H, BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, n_head, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        mask_h = offs_h < n_head
        count = tl.load(count_ptr + offs_h // HKV, mask=mask_h, other=0)[:, None]
        n_new = tl.load(n_new_ptr + offs_h // HKV, mask=mask_h, other=0)[:, None]
        j = rank[None, :] - count  # (BLOCK_H, BLOCK_R) int64
        dpos_ptrs = dpos_ptr + (offs_h.to(tl.int64)[:, None] * T + j)[:, :, None] * D + offs_d[None, None, :]
        mask = ((j >= 0) & (j < n_new))[:, :, None] & mask_d[None, :, :]
        acc += tl.load(dpos_ptrs, mask=mask, other=0.0)
    out = rank[:, None].to(tl.int64) * D + offs_d[None, :]
    tl.store(dposition_ptr + out, tl.sum(acc, axis=0), mask=(rank < n_position)[:, None] & mask_d)


# One token per sequence: sums = past + phi(k)^T [pos ; v ; 1], c = phi(q) sums / den.
# One program: the half of pos or that of v, of one key/value head and its query heads; grid
# (2 * B * Hkv,).
#   q (B, H, 1, D), k, v (B, Hkv, 1, D), any strides; pos ... n_new as above
#   past, sums (B, Hkv, m, 2D+1) fp32; context (B, H, 1, 2D): contiguous
# fp32: everything, no dots. Reads and writes the sums once. Reference: sea.causal_context.
@triton.jit
def _context_step_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, count_ptr, n_new_ptr, past_ptr, sums_ptr,
                         context_ptr, q_strides, k_strides, v_strides, n_position, HKV, q_scale, k_scale,
                         GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_F: tl.constexpr):
    pid_half, pid_bkv = _program(2)
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    offs_d, offs_f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    mask_d, mask_f = offs_d < D, offs_f < M
    mask = mask_f[:, None] & mask_d[None, :]
    w = _load_tile(w_ptr, offs_f, offs_d, 1, M, mask).to(tl.float32)  # (BLOCK_F, BLOCK_D)
    k = _vector(k_ptr + b * k_strides[0] + kv * k_strides[1], offs_d * k_strides[3], mask_d)
    f_k = tl.where(mask_f, tl.maximum(tl.sum(w * k[None, :], axis=1) * k_scale, 0.0) + 1e-3, 0.0)
    f_k = tl.where(tl.load(n_new_ptr + b) > 0, f_k, 0.0)
    if pid_half == 0:
        x = _vector(pos_ptr + tl.minimum(tl.load(count_ptr + b), n_position - 1) * D, offs_d, mask_d)
    else:
        x = _vector(v_ptr + b * v_strides[0] + kv * v_strides[1], offs_d * v_strides[3], mask_d)
    # -- the state before and after
    offs_ones = pid_bkv * M * (2 * D + 1) + offs_f * (2 * D + 1) + 2 * D
    offs_sums = offs_ones[:, None] - 2 * D + pid_half * D + offs_d[None, :]
    sums = f_k[:, None] * x[None, :] + tl.load(past_ptr + offs_sums, mask=mask, other=0.0)
    norm = f_k + tl.load(past_ptr + offs_ones, mask=mask_f, other=0.0)
    tl.store(sums_ptr + offs_sums, sums, mask=mask)
    if pid_half == 0:
        tl.store(sums_ptr + offs_ones, norm, mask=mask_f)
    # -- its rows
    for g in range(0, GROUP):
        h = kv * GROUP + g
        q = _vector(q_ptr + b * q_strides[0] + h * q_strides[1], offs_d * q_strides[3], mask_d)
        f_q = tl.where(mask_f, tl.maximum(tl.sum(w * q[None, :], axis=1) * q_scale, 0.0) + 1e-3, 0.0)
        den = tl.sum(f_q * norm, axis=0)
        c = tl.sum(f_q[:, None] * sums, axis=0) / tl.where(den == 0.0, 1.0, den)
        c_ptr = context_ptr + ((b * HKV * GROUP + h) * 2 + pid_half) * D + offs_d
        tl.store(c_ptr, c.to(context_ptr.dtype.element_ty), mask=mask_d)


def _causal_context_step(q, k, v, position, past, projection, count, n_new, softmax_scale, _stride):
    """With the arguments of _CausalContext.apply; one token is a row or none, whatever the stride."""
    B, H, _, D = q.shape
    Hkv, m = k.shape[1], projection.shape[1]
    sums = _new(q, B, Hkv, m, 2 * D + 1, dtype=torch.float32)
    context = _new(q, B, H, 1, 2 * D)
    _context_step_kernel[(2 * B * Hkv,)](
        q, k, v, position, projection, count, n_new, past.float().contiguous(), sums, context,
        q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(), n_position=len(position), HKV=Hkv,
        q_scale=softmax_scale * D**0.25, k_scale=D**-0.25, GROUP=H // Hkv, D=D, M=m,
        **_context_step_tiles(D, m))
    return context, sums


def _context_launch(q, k, v, position, projection, softmax_scale, stride, backward=False):
    """Segments of a head, and the keywords of the kernel that has keys only and of those with rows, too."""
    (_, H, R, D), m = q.shape, projection.shape[1]
    n_segment, tiles = _context_tiles(q, k, m, stride, backward)
    block_r = tiles.pop("BLOCK_R")
    of_keys = dict(tiles, n_segment=n_segment, k_strides=k.stride(), v_strides=v.stride(),
                   n_position=len(position), k_scale=D**-0.25, D=D, M=m)
    of_rows = dict(of_keys, q_strides=q.stride(), H=H, GROUP=H // k.shape[1], R=R,
                   q_scale=softmax_scale * D**0.25, BLOCK_R=block_r)
    return n_segment, of_keys, of_rows


class _CausalContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, position, past, projection, count, n_new, softmax_scale, stride):
        (B, H, R, D), Hkv, m = q.shape, k.shape[1], projection.shape[1]
        inputs = (k, v, position, projection, count, n_new)
        n_segment, of_keys, of_rows = _context_launch(q, k, v, position, projection, softmax_scale, stride)
        sums = _new(q, B * Hkv, n_segment, m, 2 * D + 1, dtype=torch.float32)
        _context_sums_kernel[(n_segment * B * Hkv,)](*inputs, sums, HKV=Hkv, **of_keys)
        sums = _running_sums(sums, past.flatten(0, 1))  # what precedes each segment, and all
        context, den = _new(q, B, H, R, 2 * D), _new(q, B, H, R, dtype=torch.float32)
        _context_kernel[(n_segment * B * H,)](q, *inputs, sums, context, den, **of_rows)
        ctx.save_for_backward(q, *inputs, sums, context, den)
        ctx.constants = softmax_scale, stride
        return context, sums[:, -1].view(B, Hkv, m, 2 * D + 1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dcontext, dsums_out):
        q, *inputs, sums, context, den = ctx.saved_tensors
        k, v, position, projection, count, n_new = inputs
        (B, H, _, D), (Hkv, T), m = q.shape, k.shape[1:3], projection.shape[1]
        n_segment, _, of_rows = _context_launch(q, k, v, position, projection, *ctx.constants, backward=True)
        dcontext, dq, g_den = dcontext.contiguous(), _new(q, *q.shape), torch.empty_like(den)
        dsums = _new(sums, B * H, n_segment, m, 2 * D + 1)
        _context_dq_kernel[(n_segment * B * H,)](q, *inputs, sums, context, dcontext, den, dq, g_den, dsums,
                                                 **of_rows)
        if H != Hkv:
            dsums = dsums.view(B * Hkv, H // Hkv, n_segment, m, 2 * D + 1).sum(1)
        dsums = _running_sums(dsums, dsums_out.flatten(0, 1), reverse=True)
        dk, dv, dpos = _new(k, *k.shape), _new(v, *v.shape), _new(den, *k.shape)
        _context_dkdv_kernel[(n_segment * B * Hkv,)](q, *inputs, dsums, dcontext, den, g_den, dk, dv, dpos,
                                                     T=T, **of_rows)
        dposition = dpast = None
        if ctx.needs_input_grad[3]:
            dposition = _new(position, *position.shape)
            _sum_positions_kernel[(_cdiv(len(position), SUM_POSITIONS["BLOCK_R"]),)](
                dpos, count, n_new, dposition, n_head=B * Hkv, HKV=Hkv, T=T, n_position=len(position), D=D,
                BLOCK_D=_next_power_of_2(D), **SUM_POSITIONS)
        if ctx.needs_input_grad[4]:
            dpast = dsums[:, 0].view(dsums_out.shape)
        return dq, dk, dv, dposition, dpast, *[None] * 5


def causal_context(q: Tensor, k: Tensor, v: Tensor, position: Tensor, projection: Tensor,
                   softmax_scale: float, stride: int, count: Tensor, n_new: Tensor,
                   past: Tensor) -> tuple[Tensor, Tensor]:
    """sea.causal_context, in the dtype of q. The projection gets no gradient: it is drawn and not trained."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 4, "(B, heads, tokens, D)")
    R, D, n_features = (k.shape[2] - 1) // stride + 1, q.shape[3], projection.shape[1]
    _expect(stride <= MAX_STRIDE, "stride", f"at most {MAX_STRIDE}", stride)
    _expect(q.shape[2] == R, "q", f"{R} rows, for {k.shape[2]} tokens and stride {stride}", q.shape[2])
    fits = max(64, _next_power_of_2(n_features)) * max(64, _next_power_of_2(D)) <= MAX_SUMS[q.dtype]
    _expect(fits and n_features <= MAX_FEATURES, "projection",
            f"features and head size that fit in {q.dtype}", tuple(projection.shape))
    run = _causal_context_step if _is_step(q) and k.shape[2] == 1 else _CausalContext.apply
    position, projection, count, n_new = (x.contiguous() for x in (position, projection, count, n_new))
    with torch.cuda.device_of(q):
        return run(q, k, v, position, past, projection, count, n_new, float(softmax_scale), stride)


# -- from the context to an image --------------------------------------------------------------------

ENCODE = dict(BLOCK_R=64, num_warps=4)
ENCODE_BACKWARD = dict(BLOCK_R=32, num_warps=4)
ENCODE_FEW_ROWS = dict(BLOCK_R=16, num_warps=4)  # and fp32, both ways


def _encode_tiles(context: Tensor, P: int, backward: bool) -> dict:
    R, D, dtype = context.shape[2], context.shape[3] // 2, context.dtype
    tiles = ENCODE_BACKWARD if backward else ENCODE
    return dict(BLOCK_D=_dot_block(D, dtype), BLOCK_Z=_dot_block(2 * D, dtype), BLOCK_P=_dot_block(P, dtype),
                PRECISION="ieee", **(tiles if dtype != torch.float32 and R > 16 else ENCODE_FEW_ROWS))


@triton.jit
def _standardized(x, mask, N: tl.constexpr):
    """x with mean 0 and variance 1 over the N columns of the mask, and 1 / deviation: fp32."""
    x = tl.where(mask[None, :], x - (tl.sum(tl.where(mask[None, :], x, 0.0), axis=1) / N)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + 1e-5)
    return x * rstd[:, None], rstd


@triton.jit
def _normed(x, gain, bias, mask, N: tl.constexpr):
    """LayerNorm over the N columns of the mask: (rows, BLOCK), fp32."""
    x, _ = _standardized(x, mask, N)
    return x * gain[None, :] + bias[None, :]


@triton.jit
def _through_norm(dy, x, rstd, gain, mask, N: tl.constexpr):
    """Gradient of a LayerNorm's input from that of its output, x being standardized."""
    dx = tl.where(mask[None, :], dy * gain[None, :], 0.0)
    mean, along_x = tl.sum(dx, axis=1) / N, tl.sum(dx * x, axis=1) / N
    return tl.where(mask[None, :], rstd[:, None] * (dx - mean[:, None] - x * along_x[:, None]), 0.0)


@triton.jit
def _first_layer(c_ptr, v_ptr, w1_ptr, b1_ptr, row, mask_r, v_strides, D: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr):
    """[c ; v] W1 + b1, (BLOCK_R, BLOCK_Z) fp32; W1^T (3D, 2D) in three parts: for c's halves and for v."""
    offs_d, offs_z = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z)
    mask_d, mask_z = offs_d < D, offs_z < 2 * D
    dtype = c_ptr.dtype.element_ty
    mask_x = mask_r[:, None] & mask_d[None, :]
    z = tl.zeros((BLOCK_R, BLOCK_Z), tl.float32)
    for i in tl.static_range(3):
        if i < 2:
            x = _load_tile(c_ptr + i * D, row, offs_d, 2 * D, 1, mask_x)  # (BLOCK_R, BLOCK_D)
        else:
            x = _load_tile(v_ptr, row, offs_d, v_strides[2], v_strides[3], mask_x)
        # (BLOCK_D, BLOCK_Z)
        w1 = _load_tile(w1_ptr + i * D, offs_d, offs_z, 1, 3 * D, mask_d[:, None] & mask_z[None, :])
        z += tl.dot(x, w1.to(dtype), input_precision=PRECISION)
    return z + _vector(b1_ptr, offs_z, mask_z)[None, :]


# z = GELU(LayerNorm([c ; v] W1 + b1)); gates = z Wg + bg; image = LayerNorm(z W2 + b2) per channel.
# One program: BLOCK_R rows of one head; grid (cdiv(R, BLOCK_R) * B * H,).
#   context (B, H, R, 2D) contiguous, v (B, Hkv, R, D) any strides; w1 (2D, 3D), w2 (2P, 2D), wg (2, 2D) and
#   vectors: b1, b2, bg biases of linear layers, gain and bias of norms, any dtype
#   image (B, 2H, R, P), gates (B, H, R, 2) fp32, contiguous
# fp32: norms and GELU. Reads 3D numbers per row and writes 2P; z never leaves the registers.
# Reference: sea.encode_rows.
@triton.jit
def _encode_kernel(context_ptr, v_ptr, w1_ptr, b1_ptr, gain1_ptr, bias1_ptr, w2_ptr, b2_ptr, gain2_ptr,
                   bias2_ptr, wg_ptr, bg_ptr, image_ptr, gates_ptr, v_strides, H, GROUP, R, D: tl.constexpr,
                   P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
                   BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    pid_r, pid_bh = _program(tl.cdiv(R, BLOCK_R))
    b, h = pid_bh // H, pid_bh % H
    row = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_z, offs_p = tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_P)
    mask_r, mask_z, mask_p = row < R, offs_z < 2 * D, offs_p < P
    dtype = context_ptr.dtype.element_ty
    v_ptr += b * v_strides[0] + (h // GROUP) * v_strides[1]
    z = _first_layer(context_ptr + pid_bh * R * 2 * D, v_ptr, w1_ptr, b1_ptr, row, mask_r, v_strides, D,
                     BLOCK_R, BLOCK_D, BLOCK_Z, PRECISION)
    z = _normed(z, _vector(gain1_ptr, offs_z, mask_z), _vector(bias1_ptr, offs_z, mask_z), mask_z, 2 * D)
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # GELU
    # -- gates
    for i in tl.static_range(2):
        gate = tl.sum(z * _vector(wg_ptr + i * 2 * D, offs_z, mask_z)[None, :], axis=1)
        gate += tl.load(bg_ptr + i).to(tl.float32)
        tl.store(gates_ptr + (pid_bh * R + row) * 2 + i, gate, mask=mask_r)
    # -- row decoder and the norm before the CNN, a channel at a time
    for i in tl.static_range(2):
        # (BLOCK_Z, BLOCK_P)
        w2 = _load_tile(w2_ptr + i * P * 2 * D, offs_z, offs_p, 1, 2 * D, mask_z[:, None] & mask_p[None, :])
        x = tl.dot(z.to(dtype), w2.to(dtype), input_precision=PRECISION)
        x += _vector(b2_ptr + i * P, offs_p, mask_p)[None, :]
        x = _normed(x, _vector(gain2_ptr, offs_p, mask_p), _vector(bias2_ptr, offs_p, mask_p), mask_p, P)
        out_ptr = image_ptr + (b * 2 * H + 2 * h + i) * R * P
        tl.store(out_ptr + row[:, None] * P + offs_p[None, :], x, mask=mask_r[:, None] & mask_p[None, :])


# The gradients of all that: of the inputs, and the factors of the weights' gradients.
# One program: the rows of _encode_kernel, whose z is computed again.
#   dimage, dgates: as image and gates, or None for 0
#   dcontext (B, H, R, 2D), dv (B, H, R, D) per query head
#   z, dz1 (B, H, R, 2D), dx (B, H, R, 2P): GELU's output and the gradients before the two norms
#   sums (programs, 6D + 4P) fp32: each program's share of the gradients of b1, gain1, bias1 (2D), b2 (2P),
#   gain2, bias2 (P)
# fp32: norms, GELU and sums. Nothing has to be kept from the forward pass but its inputs; the weights'
# gradients themselves are matmuls of what it writes. Reference: autograd through sea.encode_rows.
@triton.jit
def _encode_bwd_kernel(context_ptr, v_ptr, w1_ptr, b1_ptr, gain1_ptr, bias1_ptr, w2_ptr, b2_ptr, gain2_ptr,
                       wg_ptr, dimage_ptr, dgates_ptr, dcontext_ptr, dv_ptr, z_ptr, dz1_ptr, dx_ptr, sums_ptr,
                       v_strides, H, GROUP, R, D: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_P: tl.constexpr,
                       PRECISION: tl.constexpr):
    pid_r, pid_bh = _program(tl.cdiv(R, BLOCK_R))
    b, h = pid_bh // H, pid_bh % H
    row = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_d, offs_z, offs_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_P)
    mask_r, mask_d, mask_z, mask_p = row < R, offs_d < D, offs_z < 2 * D, offs_p < P
    mask_rz = mask_r[:, None] & mask_z[None, :]
    mask_rp = mask_r[:, None] & mask_p[None, :]
    mask_rd = mask_r[:, None] & mask_d[None, :]
    dtype = context_ptr.dtype.element_ty
    of_row = pid_bh * R + row
    sums_ptr += tl.program_id(0).to(tl.int64) * (6 * D + 4 * P)
    v_ptr += b * v_strides[0] + (h // GROUP) * v_strides[1]
    z1 = _first_layer(context_ptr + pid_bh * R * 2 * D, v_ptr, w1_ptr, b1_ptr, row, mask_r, v_strides, D,
                      BLOCK_R, BLOCK_D, BLOCK_Z, PRECISION)
    z1, rstd = _standardized(z1, mask_z, 2 * D)
    gain = _vector(gain1_ptr, offs_z, mask_z)
    y = z1 * gain[None, :] + _vector(bias1_ptr, offs_z, mask_z)[None, :]
    cdf = 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))  # of the normal distribution: GELU(y) = y cdf(y)
    z = (y * cdf).to(dtype)
    tl.store(z_ptr + of_row[:, None] * 2 * D + offs_z[None, :], z, mask=mask_rz)
    # -- dz, (BLOCK_R, BLOCK_Z)
    dz = tl.zeros((BLOCK_R, BLOCK_Z), tl.float32)
    if dgates_ptr is not None:
        for i in tl.static_range(2):
            dgate = tl.load(dgates_ptr + of_row * 2 + i, mask=mask_r, other=0.0).to(tl.float32)
            dz += dgate[:, None] * _vector(wg_ptr + i * 2 * D, offs_z, mask_z)[None, :]
    if dimage_ptr is not None:
        dgain, dbias = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
        for i in tl.static_range(2):
            mask_w = mask_z[:, None] & mask_p[None, :]
            w2 = _load_tile(w2_ptr + i * P * 2 * D, offs_z, offs_p, 1, 2 * D, mask_w).to(dtype)
            x = tl.dot(z, w2, input_precision=PRECISION) + _vector(b2_ptr + i * P, offs_p, mask_p)[None, :]
            x, rstd_x = _standardized(x, mask_p, P)
            dimage_ptrs = dimage_ptr + (b * 2 * H + 2 * h + i) * R * P
            dy = _load_tile(dimage_ptrs, row, offs_p, P, 1, mask_rp).to(tl.float32)
            dgain += tl.sum(dy * x, axis=0)
            dbias += tl.sum(dy, axis=0)
            dx = _through_norm(dy, x, rstd_x, _vector(gain2_ptr, offs_p, mask_p), mask_p, P)
            tl.store(dx_ptr + of_row[:, None] * 2 * P + i * P + offs_p[None, :], dx, mask=mask_rp)
            tl.store(sums_ptr + 6 * D + i * P + offs_p, tl.sum(dx, axis=0), mask=mask_p)
            dz += tl.dot(dx.to(dtype), tl.trans(w2), input_precision=PRECISION)
        tl.store(sums_ptr + 6 * D + 2 * P + offs_p, dgain, mask=mask_p)
        tl.store(sums_ptr + 6 * D + 3 * P + offs_p, dbias, mask=mask_p)
    # -- through GELU and the norm before it
    dy = tl.where(mask_rz, dz * (cdf + y * 0.3989422804014327 * tl.exp(-0.5 * y * y)), 0.0)
    dz1 = _through_norm(dy, z1, rstd, gain, mask_z, 2 * D)
    tl.store(sums_ptr + offs_z, tl.sum(dz1, axis=0), mask=mask_z)
    tl.store(sums_ptr + 2 * D + offs_z, tl.sum(dy * z1, axis=0), mask=mask_z)
    tl.store(sums_ptr + 4 * D + offs_z, tl.sum(dy, axis=0), mask=mask_z)
    dz1 = dz1.to(dtype)
    tl.store(dz1_ptr + of_row[:, None] * 2 * D + offs_z[None, :], dz1, mask=mask_rz)
    # -- the inputs, D columns at a time
    for i in tl.static_range(3):
        # (BLOCK_Z, BLOCK_D)
        w1 = _load_tile(w1_ptr + i * D, offs_z, offs_d, 3 * D, 1, mask_z[:, None] & mask_d[None, :])
        dx = tl.dot(dz1, w1.to(dtype), input_precision=PRECISION)
        if i < 2:
            tl.store(dcontext_ptr + of_row[:, None] * 2 * D + i * D + offs_d[None, :], dx, mask=mask_rd)
        else:
            tl.store(dv_ptr + of_row[:, None] * D + offs_d[None, :], dx, mask=mask_rd)


def _flatten_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _EncodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, v, *weights):
        (B, H, R, D2), P, context = context.shape, weights[6].shape[0], context.contiguous()
        weights, tiles = [w.contiguous() for w in weights], _encode_tiles(context, P, backward=False)
        image, gates = _new(context, B, 2 * H, R, P), _new(context, B, H, R, 2, dtype=torch.float32)
        _encode_kernel[(_cdiv(R, tiles["BLOCK_R"]) * B * H,)](
            context, v, *weights, image, gates, v_strides=v.stride(), H=H, GROUP=H // v.shape[1], R=R,
            D=D2 // 2, P=P, **tiles)
        ctx.save_for_backward(context, v, *weights)
        ctx.set_materialize_grads(False)
        return image, gates

    @staticmethod
    @once_differentiable
    def backward(ctx, dimage, dgates):
        context, v, *weights = ctx.saved_tensors
        w1, b1, gain1, bias1, w2, b2, gain2, _, wg, _ = weights
        (B, H, R, D2), Hkv, P = context.shape, v.shape[1], gain2.shape[0]
        D, tiles = D2 // 2, _encode_tiles(context, P, backward=True)
        dimage, dgates = (x if x is None else x.contiguous() for x in (dimage, dgates))
        dcontext, dv, z, dz1, dx = (_new(context, B, H, R, n) for n in (D2, D, D2, D2, 2 * P))
        n_program = _cdiv(R, tiles["BLOCK_R"]) * B * H
        sums = _new(context, n_program, 6 * D + 4 * P, dtype=torch.float32)
        _encode_bwd_kernel[(n_program,)](
            context, v, w1, b1, gain1, bias1, w2, b2, gain2, wg, dimage, dgates, dcontext, dv, z, dz1, dx,
            sums, v_strides=v.stride(), H=H, GROUP=H // Hkv, R=R, D=D, P=P, **tiles)
        # -- weights: products over all rows
        dz1_rows = _flatten_rows(dz1)
        v_rows = _flatten_rows(v if H == Hkv else v.repeat_interleave(H // Hkv, 1))
        total = sums[:, : 6 * D if dimage is None else None].sum(0)
        dw1 = torch.cat([dz1_rows.T @ _flatten_rows(context), dz1_rows.T @ v_rows], 1)
        grads = [dw1, *total[: 6 * D].split(2 * D), *[None] * 6]
        if dimage is not None:
            grads[4:8] = _flatten_rows(dx).T @ _flatten_rows(z), *total[6 * D :].split((2 * P, P, P))
        if dgates is not None:
            grads[8:] = _flatten_rows(dgates).T.to(z.dtype) @ _flatten_rows(z), _flatten_rows(dgates).sum(0)
        dv = dv if H == Hkv else dv.view(B, Hkv, H // Hkv, R, D).sum(2)
        return dcontext, dv, *(dw if dw is None else dw.to(w.dtype) for dw, w in zip(grads, weights))


def encode_rows(context: Tensor, v: Tensor, encoder: nn.Sequential, decoder: nn.Linear, cnn: nn.Module,
                gate: nn.Linear) -> tuple[Tensor, Tensor]:
    """sea.encode_rows, in the dtype of context; gates are fp32."""
    _check_tensor("context", context, 4, "(B, H, R, 2D)")
    layers = (encoder[0], encoder[1], decoder, cnn.norm, gate)
    weights = [w for layer in layers for w in (layer.weight, layer.bias)]
    with torch.cuda.device_of(v):
        return _EncodeRows.apply(context, v, *weights)


# -- the CNN -----------------------------------------------------------------------------------------
#
# Programs walk down the rows, so that one load of a row serves all the rows that it is a tap of. A
# convolution is a sum of nine products, of a tap's weights (C, C) with a row's places shifted by -2, 0 or 2,
# taken of rows r-4, r-2 and r.

# Target number of programs; more would re-read neighbours' rows and add partial sums. `walk`: the longest
# walk, in pairs of rows.
CONV = dict(programs=256, walk=32)


def _split_rows(n_row: int, B: int, block: int = 1) -> tuple[int, int]:
    """Programs per sequence, and blocks of rows that each of them walks."""
    n_block = max(1, _cdiv(_cdiv(n_row, block) * B, CONV["programs"]))  # 1 of an empty batch
    return _cdiv(_cdiv(n_row, block), n_block), n_block


def _conv_tiles(dtype: torch.dtype, B: int, R: int, C: int, P: int, channels_last: bool) -> tuple[int, dict]:
    """Programs per sequence, and sizes. A program walks where registers hold three pairs of rows' sums."""
    is_half, block_c = dtype != torch.float32, _dot_block(C)
    block_p = max(_dot_block(P), 32 if is_half else 16)
    walk = is_half and block_p * block_c <= 4096
    block_p = max(block_p, 64) if is_half and not walk else block_p  # 64 places at least, see _dot_block
    n_program, n_block = _split_rows(R, B, 2) if walk else (R, 1)
    if n_block > CONV["walk"]:
        n_program, n_block = _cdiv(R, 2 * CONV["walk"]), CONV["walk"]
    # as many stages as fit into shared memory, or registers
    stages = 1 if not walk or block_c > 32 else 3 if channels_last else 2
    return n_program, dict(n_block=n_block, WALK=walk, BLOCK_P=block_p, BLOCK_C=block_c, PRECISION="ieee",
                           num_stages=stages, num_warps=4 if block_p * block_c * (1 + walk) <= 4096 else 8)


def _up_bwd_tiles(dtype: torch.dtype, C: int, P: int) -> dict:
    return dict(BLOCK_P=_dot_block(P, dtype), BLOCK_C=_dot_block(C, dtype), PRECISION="ieee",
                num_warps=4 if P <= 64 else 8, num_stages=1)


def _conv_dw_tiles(dtype: torch.dtype, C: int, P: int) -> dict:
    block_c = _dot_block(C)
    block = min(32, block_c)
    # more warps would share 32 x 32 products
    num_warps, num_stages = (4, 1) if dtype == torch.float32 else (2, 3)
    return dict(BLOCK_P=min(64, _dot_block(P)), CHUNKS=_cdiv(P, 64), BLOCK=block, BLOCKS=block_c // block,
                PRECISION="ieee", num_warps=num_warps, num_stages=num_stages)


def _cnn_step_tiles(C: int, P: int) -> dict:
    block_p, block_c = _dot_block(P), _dot_block(C)
    return dict(BLOCK_P=block_p, BLOCK_C=block_c, PRECISION="ieee",
                num_warps=4 if block_p * block_c <= 4096 else 8)


@triton.jit
def _row_ptrs(x_ptr, row, n_row, P, C: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr,
              BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_R rows from `row` (int64) on of an image whose channels lie last in memory, (n_row, P, C), or
    first, (C, n_row, P): pointers (BLOCK_R * BLOCK_P, BLOCK_C)."""
    offs_rp, offs_c = tl.arange(0, BLOCK_R * BLOCK_P), tl.arange(0, BLOCK_C)[None, :]
    place = (offs_rp // BLOCK_P * P + offs_rp % BLOCK_P)[:, None]
    if LAST:
        return x_ptr + row * P * C + (place * C + offs_c)
    else:
        return x_ptr + row * P + (place + offs_c.to(tl.int64) * n_row * P)


@triton.jit
def _tap(w_ptr, tap, C: tl.constexpr, BACK: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tap (BLOCK_C, BLOCK_C) of w (C, C, 3, 3) [out, in, tap]. BACK, for dx: mirrored, transposed."""
    m, n = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_C)[None, :]
    offs_w = (n * C + m) * 9 + 8 - tap if BACK else (m * C + n) * 9 + tap
    return tl.load(w_ptr + offs_w, mask=(m < C) & (n < C), other=0.0)


@triton.jit
def _taps_of_row(w_ptr, i, C: tl.constexpr, BACK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The taps 3 i, 3 i + 1 and 3 i + 2, which see one row at three shifts."""
    return (_tap(w_ptr, 3 * i, C, BACK, BLOCK_C), _tap(w_ptr, 3 * i + 1, C, BACK, BLOCK_C),
            _tap(w_ptr, 3 * i + 2, C, BACK, BLOCK_C))


@triton.jit
def _add_taps(x, w_0, w_1, w_2, acc_0, acc_1, acc_2, PRECISION: tl.constexpr):
    """x (places, BLOCK_C) as a tap of three rows, whose sums are acc (BLOCK_C, places)."""
    x = tl.trans(x)
    return (tl.dot(w_0, x, acc_0, input_precision=PRECISION),
            tl.dot(w_1, x, acc_1, input_precision=PRECISION),
            tl.dot(w_2, x, acc_2, input_precision=PRECISION))


@triton.jit
def _to_cells(x, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """(head and sub-cell, row and place) -> (head and row, place and sub-cell): a row's cells in order."""
    x = tl.permute(tl.reshape(x, (BLOCK_H, 4, BLOCK_R, BLOCK_P)), (0, 2, 3, 1))
    return tl.reshape(x, (BLOCK_H * BLOCK_R, 4 * BLOCK_P))


@triton.jit
def _from_cells(x, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    x = tl.permute(tl.reshape(x, (BLOCK_H, BLOCK_R, BLOCK_P, 4)), (0, 3, 1, 2))
    return tl.reshape(x, (BLOCK_H * 4, BLOCK_R * BLOCK_P))


@triton.jit
def _to_scores(x, up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
               BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
               PRECISION: tl.constexpr):
    """LayerNorm(1x1 conv of x to 4 cells): (BLOCK_C, BLOCK_R * BLOCK_P) -> (BLOCK_H * BLOCK_R, 4 BLOCK_P)."""
    offs_c, offs_u, offs_w = tl.arange(0, BLOCK_C), tl.arange(0, 4 * BLOCK_H), tl.arange(0, 4 * BLOCK_P)
    mask_u, mask_w = offs_u < 4 * H, offs_w < WIDTH
    up = _load_tile(up_ptr, offs_u, offs_c, C, 1, mask_u[:, None] & (offs_c < C)[None, :]).to(x.dtype)
    y = tl.dot(up, x, input_precision=PRECISION) + _vector(up_b_ptr, offs_u, mask_u)[:, None]
    y = _to_cells(y, BLOCK_H, BLOCK_R, BLOCK_P)
    return _normed(y, _vector(gain_ptr, offs_w, mask_w), _vector(bias_ptr, offs_w, mask_w), mask_w, WIDTH)


@triton.jit
def _store_rows(acc, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b, first_row, begin,
                out_stride, R, P, WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                OUT_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """The end of _conv_kernel: acc (BLOCK_C, BLOCK_R * BLOCK_P), the taps' sums for rows `first_row` on."""
    offs_rp, offs_c = tl.arange(0, BLOCK_R * BLOCK_P), tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    row, p = first_row + offs_rp // BLOCK_P, offs_rp % BLOCK_P
    if b_ptr is not None:
        acc = tl.maximum(acc + _vector(b_ptr, offs_c, mask_c)[:, None], 0.0)
    if up_ptr is None:
        x, mask = tl.trans(acc), ((row < R) & (p < P))[:, None] & mask_c[None, :]
        offs_out = _row_ptrs(b * out_stride, first_row.to(tl.int64), R, P, C, OUT_LAST, BLOCK_R, BLOCK_P,
                             BLOCK_C)
        if of_relu_ptr is not None:
            of_relu = tl.load(of_relu_ptr + offs_out, mask=mask, other=0.0)
            x = tl.where((of_relu > 0.0) | (row + begin < 0)[:, None], x, 0.0)
        tl.store(out_ptr + offs_out, x, mask=mask)
    else:
        y = _to_scores(acc.to(up_ptr.dtype.element_ty), up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH, C, H,
                       BLOCK_R, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION)
        offs_hr, offs_w = tl.arange(0, BLOCK_H * BLOCK_R), tl.arange(0, 4 * BLOCK_P)
        h, row = offs_hr // BLOCK_R, first_row + offs_hr % BLOCK_R
        tl.store(out_ptr + ((b * H + h) * R + row)[:, None] * WIDTH + offs_w[None, :], y,
                 mask=((h < H) & (row < R))[:, None] & (offs_w < WIDTH)[None, :])


# forward: out = relu(conv3x3(x)), of rows r, r-2, r-4 and places p-2, p, p+2; with up, LayerNorm(1x1 conv of
#   that to 4 cells).
# input gradient: without a bias, x is the gradient of such a convolution's sum and out that of its input: the
#   same with mirrored taps. With of_relu it goes on through the relu that gave that input, except in rows of
#   the past, which have been through theirs.
# One program: n_block pairs of rows, all channels; grid (n_program * B,). It walks down the rows of x
#   and holds the sums of the three pairs of rows that the pair at hand is a tap of, so that 3 loads of the
#   pair, one for each shift, serve 9 products of (C, C) with (C, 2P).
# no WALK: one row, 9 loads; grid (R * B,). In fp32 and for rows of more than 4096 numbers, whose sums
#   registers would not hold.
#   x (B, C, N, P), row `begin` of which is the first tap of row 0; w (C, C, 3, 3), up (4H, C)
#   out (B, C, R, P), of_relu as out, or with up scores (B, H, R, width)
#   LAST, OUT_LAST: channels lie last in memory
# fp32: accumulators and the norm. Where channels lie last, shifted loads stay aligned: 16 bytes each, to
# shared memory during the products before. Reads a row 3 times, mostly from the cache, and writes it once.
# Reference: sea.causal_cnn.
@triton.jit(do_not_specialize=["begin", "n_program", "n_block"])
def _conv_kernel(x_ptr, w_ptr, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, x_stride,
                 out_stride, N, R, P, begin, n_program, n_block, WIDTH: tl.constexpr, C: tl.constexpr,
                 H: tl.constexpr, LAST: tl.constexpr, OUT_LAST: tl.constexpr, WALK: tl.constexpr,
                 BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                 PRECISION: tl.constexpr):
    BLOCK_R: tl.constexpr = 2 if WALK else 1
    BACK: tl.constexpr = b_ptr is None
    shift: tl.constexpr = 2 * (C if LAST else 1)  # two places, in memory
    pid_r, b = _program(n_program)
    first_row = pid_r * n_block * BLOCK_R
    offs_rp, mask_c = tl.arange(0, BLOCK_R * BLOCK_P), (tl.arange(0, BLOCK_C) < C)[None, :]
    row, p = begin + first_row + offs_rp // BLOCK_P, offs_rp % BLOCK_P
    x_ptrs = _row_ptrs(x_ptr + b * x_stride, (begin + first_row).to(tl.int64), N, P, C, LAST, BLOCK_R,
                       BLOCK_P, BLOCK_C)
    acc_0 = tl.zeros((BLOCK_C, BLOCK_R * BLOCK_P), tl.float32)
    if WALK:
        acc_1 = acc_0
        w_00, w_01, w_02 = _taps_of_row(w_ptr, 0, C, BACK, BLOCK_C)
        w_10, w_11, w_12 = _taps_of_row(w_ptr, 1, C, BACK, BLOCK_C)
        w_20, w_21, w_22 = _taps_of_row(w_ptr, 2, C, BACK, BLOCK_C)
    for i in range(0, n_block + 2):
        mask_x = (row + 2 * i >= 0) & (row + 2 * i < N) & (p < P)
        # (places, BLOCK_C)
        x_0 = tl.load(x_ptrs - shift, mask=(mask_x & (p >= 2))[:, None] & mask_c, other=0.0)
        x_1 = tl.load(x_ptrs, mask=mask_x[:, None] & mask_c, other=0.0)
        x_2 = tl.load(x_ptrs + shift, mask=(mask_x & (p + 2 < P))[:, None] & mask_c, other=0.0)
        if WALK:
            acc_2 = tl.zeros((BLOCK_C, BLOCK_R * BLOCK_P), tl.float32)
            acc_0, acc_1, acc_2 = _add_taps(x_0, w_20, w_10, w_00, acc_0, acc_1, acc_2, PRECISION)
            acc_0, acc_1, acc_2 = _add_taps(x_1, w_21, w_11, w_01, acc_0, acc_1, acc_2, PRECISION)
            acc_0, acc_1, acc_2 = _add_taps(x_2, w_22, w_12, w_02, acc_0, acc_1, acc_2, PRECISION)
            if i >= 2:
                _store_rows(acc_0, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b,
                            first_row + 2 * i - 4, begin, out_stride, R, P, WIDTH, C, H, OUT_LAST, BLOCK_R,
                            BLOCK_P, BLOCK_C, BLOCK_H, PRECISION)
            acc_0, acc_1 = acc_1, acc_2
        else:
            w_0, w_1, w_2 = _taps_of_row(w_ptr, i, C, BACK, BLOCK_C)
            acc_0 = tl.dot(w_0, tl.trans(x_0), acc_0, input_precision=PRECISION)
            acc_0 = tl.dot(w_1, tl.trans(x_1), acc_0, input_precision=PRECISION)
            acc_0 = tl.dot(w_2, tl.trans(x_2), acc_0, input_precision=PRECISION)
        x_ptrs += P * shift
    if not WALK:
        _store_rows(acc_0, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b, first_row,
                    begin, out_stride, R, P, WIDTH, C, H, OUT_LAST, BLOCK_R, BLOCK_P, BLOCK_C, BLOCK_H,
                    PRECISION)


# The HISTORY rows before row n_rows of what entered the first convolution and the second, 0 before row 0.
# One program: one channel of one sequence; grid (C * B,).
#   x1, x2 (B, C, n_past + R, P), any strides; n_rows (B,) int -> out1, out2 (B, C, HISTORY, P), contiguous
# A launch for both, where eager copies or gathers each. Reference: sea.causal_cnn.
@triton.jit
def _last_rows_kernel(x1_ptr, x2_ptr, n_rows_ptr, out1_ptr, out2_ptr, x1_strides, x2_strides, n_past, C, P,
                      HISTORY: tl.constexpr, BLOCK_P: tl.constexpr):
    c, b = _program(C)
    c = c.to(tl.int64)
    offs_n, offs_p = tl.arange(0, HISTORY), tl.arange(0, BLOCK_P)
    row = tl.load(n_rows_ptr + b) + n_past - HISTORY + offs_n
    mask_p = (offs_p < P)[None, :]
    mask_x = (row >= 0)[:, None] & mask_p
    offs_out = ((b * C + c) * HISTORY + offs_n[:, None]) * P + offs_p[None, :]
    x1 = _load_tile(x1_ptr + b * x1_strides[0] + c * x1_strides[1], row, offs_p, x1_strides[2], x1_strides[3],
                    mask_x)
    x2 = _load_tile(x2_ptr + b * x2_strides[0] + c * x2_strides[1], row, offs_p, x2_strides[2], x2_strides[3],
                    mask_x)
    tl.store(out1_ptr + offs_out, x1, mask=mask_p)
    tl.store(out2_ptr + offs_out, x2, mask=mask_p)


@triton.jit
def _conv_step(past_ptr, next_ptr, x_ptr, w_ptr, b_ptr, n_new, P, C: tl.constexpr, HISTORY: tl.constexpr,
               BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """relu(conv3x3) of one row x (C, P) after the rows of the past (C, HISTORY, P): (BLOCK_C, BLOCK_P) fp32.
    next: the last HISTORY rows with x or, where n_new is 0, without. w (C, C, 3, 3)."""
    offs_c, offs_p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    mask_c, mask_p = offs_c < C, offs_p < P
    mask = mask_c[:, None] & mask_p[None, :]
    offs_past = offs_c[:, None] * HISTORY * P + offs_p[None, :]
    for i in tl.static_range(HISTORY - 1):
        later = tl.load(past_ptr + offs_past + (i + n_new) * P, mask=mask, other=0.0)
        tl.store(next_ptr + offs_past + i * P, later, mask=mask)
    newest = tl.load(x_ptr + offs_c[:, None] * P + offs_p[None, :], mask=mask, other=0.0)
    last = tl.load(past_ptr + offs_past + (HISTORY - 1) * P, mask=mask, other=0.0)
    tl.store(next_ptr + offs_past + (HISTORY - 1) * P, tl.where(n_new != 0, newest, last), mask=mask)
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    w_ptr += (offs_c[:, None] * C + offs_c[None, :]) * 9
    mask_w = mask_c[:, None] & mask_c[None, :]
    mask_left = mask & (offs_p >= 2)[None, :]
    mask_right = mask & (offs_p + 2 < P)[None, :]
    for i in tl.static_range(3):
        if i < 2:  # rows r-4 and r-2, the first and third of the past
            x = past_ptr + offs_past + i * 2 * P
        else:
            x = x_ptr + offs_c[:, None] * P + offs_p[None, :]
        # all loads before the first product: what this takes is their latency
        x_0, x_1 = tl.load(x - 2, mask=mask_left, other=0.0), tl.load(x, mask=mask, other=0.0)
        x_2 = tl.load(x + 2, mask=mask_right, other=0.0)
        w_0 = tl.load(w_ptr + 3 * i, mask=mask_w, other=0.0).to(x_0.dtype)
        w_1 = tl.load(w_ptr + 3 * i + 1, mask=mask_w, other=0.0).to(x_0.dtype)
        w_2 = tl.load(w_ptr + 3 * i + 2, mask=mask_w, other=0.0).to(x_0.dtype)
        acc += tl.dot(w_0, x_0, input_precision=PRECISION)
        acc += tl.dot(w_1, x_1, input_precision=PRECISION)
        acc += tl.dot(w_2, x_2, input_precision=PRECISION)
    return tl.maximum(acc + _vector(b_ptr, offs_c, mask_c)[:, None], 0.0)


# The whole CNN for one token per sequence, where it is a row (n_rows 1); the other sequences keep their past.
# One program: one sequence, all channels, since the second convolution wants all of the first's; grid (B,).
# So it is one launch, with a barrier between the two.
#   image (B, C, 1, P), past1, past2 and next1, next2 (B, C, HISTORY, P), middle (B, C, P) scratch: contiguous
#   w1, w2 (C, C, 3, 3), up (4H, C) and the vectors: any dtype; n_rows (B,) int -> scores (B, H, 1, width)
# fp32: accumulators and the norm. Reference: sea.causal_cnn.
@triton.jit
def _cnn_step_kernel(image_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr,
                     past1_ptr, past2_ptr, n_rows_ptr, middle_ptr, next1_ptr, next2_ptr, scores_ptr, P,
                     WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr, HISTORY: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                     PRECISION: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n_new, past = tl.load(n_rows_ptr + b).to(tl.int32), b * C * HISTORY * P
    x = _conv_step(past1_ptr + past, next1_ptr + past, image_ptr + b * C * P, w1_ptr, b1_ptr, n_new, P, C,
                   HISTORY, BLOCK_P, BLOCK_C, PRECISION)
    # -- the second convolution wants this row's neighbours, which other threads hold
    offs_c, offs_p, middle_ptr = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), middle_ptr + b * C * P
    mask = (offs_c < C)[:, None] & (offs_p < P)[None, :]
    tl.store(middle_ptr + offs_c[:, None] * P + offs_p[None, :], x, mask=mask)
    tl.debug_barrier()
    x = _conv_step(past2_ptr + past, next2_ptr + past, middle_ptr, w2_ptr, b2_ptr, n_new, P, C, HISTORY,
                   BLOCK_P, BLOCK_C, PRECISION)
    x = x.to(image_ptr.dtype.element_ty)
    y = _to_scores(x, up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH, C, H, 1, BLOCK_P, BLOCK_C, BLOCK_H,
                   PRECISION)
    offs_h, offs_w = tl.arange(0, BLOCK_H), tl.arange(0, 4 * BLOCK_P)
    mask = (offs_h < H)[:, None] & (offs_w < WIDTH)[None, :]
    tl.store(scores_ptr + (b * H + offs_h)[:, None] * WIDTH + offs_w[None, :], y, mask=mask)


# From the gradient of scores to dx, that of the second convolution's sum.
# One program: `n_block` rows, all channels; grid (n_program * B,). It computes their cells again, which are
# wider than the image, in place of reading them.
#   x (B, C, R, P) what the second convolution gave, dx likewise, channels last in memory
#   dscores (B, H, R, width) contiguous
#   each program's share of the gradients of up, of its bias, and of the norm's gain and bias, all fp32:
#   dup (programs, 4 BLOCK_H, C), dup_b (.., 4 BLOCK_H), dnorm (.., 2, width)
# fp32: accumulators and the norm. Reference: autograd through sea.causal_cnn.
@triton.jit(do_not_specialize=["n_program", "n_block"])
def _up_bwd_kernel(x_ptr, up_ptr, up_b_ptr, gain_ptr, dscores_ptr, dx_ptr, dup_ptr, dup_b_ptr, dnorm_ptr, R,
                   P, n_program, n_block, WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                   PRECISION: tl.constexpr):
    pid_r, b = _program(n_program)
    program = tl.program_id(0).to(tl.int64)
    offs_c, offs_u, offs_h = tl.arange(0, BLOCK_C), tl.arange(0, 4 * BLOCK_H), tl.arange(0, BLOCK_H)
    offs_p, offs_w = tl.arange(0, BLOCK_P), tl.arange(0, 4 * BLOCK_P)
    mask_c, mask_u, mask_w = offs_c < C, offs_u < 4 * H, offs_w < WIDTH
    up = _load_tile(up_ptr, offs_u, offs_c, C, 1, mask_u[:, None] & mask_c[None, :])
    gain = _vector(gain_ptr, offs_w, mask_w)
    dup, dup_b = tl.zeros((4 * BLOCK_H, BLOCK_C), tl.float32), tl.zeros((4 * BLOCK_H,), tl.float32)
    dgain, dbias = tl.zeros((4 * BLOCK_P,), tl.float32), tl.zeros((4 * BLOCK_P,), tl.float32)
    for i in range(0, n_block):
        row = pid_r * n_block + i
        mask_x = (offs_p < P)[:, None] & mask_c[None, :] & (row < R)
        offs_x = b * C * R * P + row.to(tl.int64) * P * C + (offs_p[:, None] * C + offs_c[None, :])
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)  # (BLOCK_P, BLOCK_C)
        y = tl.dot(up, tl.trans(x), input_precision=PRECISION) + _vector(up_b_ptr, offs_u, mask_u)[:, None]
        y, rstd = _standardized(_to_cells(y, BLOCK_H, 1, BLOCK_P), mask_w, WIDTH)
        dy = tl.load(dscores_ptr + ((b * H + offs_h) * R + row)[:, None] * WIDTH + offs_w[None, :],
                     mask=(offs_h < H)[:, None] & mask_w[None, :] & (row < R), other=0.0).to(tl.float32)
        dgain += tl.sum(dy * y, axis=0)
        dbias += tl.sum(dy, axis=0)
        # (4 BLOCK_H, BLOCK_P)
        dy = _from_cells(_through_norm(dy, y, rstd, gain, mask_w, WIDTH), BLOCK_H, 1, BLOCK_P)
        dup_b += tl.sum(dy, axis=1)
        dy = dy.to(up.dtype)
        dup += tl.dot(dy, x, input_precision=PRECISION)
        dx = tl.trans(tl.dot(tl.trans(up), dy, input_precision=PRECISION))
        tl.store(dx_ptr + offs_x, tl.where(x > 0.0, dx, 0.0), mask=mask_x)
    tl.store(dup_ptr + (program * 4 * BLOCK_H + offs_u[:, None]) * C + offs_c[None, :], dup,
             mask=mask_c[None, :])
    tl.store(dup_b_ptr + program * 4 * BLOCK_H + offs_u, dup_b)
    tl.store(dnorm_ptr + program * 2 * WIDTH + offs_w, dgain, mask=mask_w)
    tl.store(dnorm_ptr + (program * 2 + 1) * WIDTH + offs_w, dbias, mask=mask_w)


# Gradients of a convolution's weights and bias: sums over all places of dout x^T.
# One program: all taps of (BLOCK, BLOCK) weights over `n_block` rows of x, each CHUNKS times BLOCK_P places;
# grid (n_program * B, BLOCKS * BLOCKS). Places of x are loaded at 3 shifts, and with them those of dout, in 3
# rows, that they are taps of: 6 loads for 9 products. Loads go to shared memory during the products before.
#   x (B, C, n_past + R, P), dout (B, C, R, P), with channels last, and of x if LAST
#   each program's share: dw (programs, 9, C, C) [tap, out, in], db (programs, C), fp32
@triton.jit(do_not_specialize=["n_program", "n_block"])
def _conv_dw_kernel(x_ptr, dout_ptr, dw_ptr, db_ptr, dout_stride, R, P, n_past, n_program, n_block,
                    C: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr,
                    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    pid_r, b = _program(n_program)
    program = tl.program_id(0).to(tl.int64)
    m_0, n_0 = tl.program_id(1) // BLOCKS * BLOCK, tl.program_id(1) % BLOCKS * BLOCK
    offs_p, offs_c = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK)
    mask_m, mask_n = (m_0 + offs_c < C)[:, None], (n_0 + offs_c < C)[None, :]
    first_row, n_row = pid_r * n_block, n_past + R
    place: tl.constexpr = C if LAST else 1
    offs_b = b * C * n_row * P + (n_0 if LAST else n_0.to(tl.int64) * n_row * P)
    x_ptrs = _row_ptrs(x_ptr + offs_b, first_row.to(tl.int64), n_row, P, C, LAST, 1, BLOCK_P, BLOCK)
    dout_ptrs = dout_ptr + b * dout_stride + (first_row - n_past).to(tl.int64) * P * C
    dout_ptrs += m_0 + offs_c[:, None] + tl.trans(offs_p) * C
    zero = tl.zeros((BLOCK, BLOCK), tl.float32)
    ones = tl.full((BLOCK_P, 16), 1.0, x_ptr.dtype.element_ty)
    dw_00, dw_01, dw_02 = zero, zero, zero
    dw_10, dw_11, dw_12 = zero, zero, zero
    dw_20, dw_21, dw_22 = zero, zero, zero
    db = tl.zeros((BLOCK, 16), tl.float32)
    for i in range(0, n_block * CHUNKS):
        row, p = first_row + i // CHUNKS - n_past, offs_p + i % CHUNKS * BLOCK_P  # of dout, by the last tap
        mask_x = mask_n & (p < P) & (row < R)
        x_0 = tl.load(x_ptrs - 2 * place, mask=mask_x & (p >= 2), other=0.0)  # (BLOCK_P, BLOCK)
        x_1 = tl.load(x_ptrs, mask=mask_x, other=0.0)
        x_2 = tl.load(x_ptrs + 2 * place, mask=mask_x & (p + 2 < P), other=0.0)
        mask_out = mask_m & tl.trans(p < P)
        # (BLOCK, BLOCK_P), of three rows
        dout = tl.load(dout_ptrs + 4 * P * C, mask=mask_out & (row + 4 >= 0) & (row + 4 < R), other=0.0)
        dw_00 = tl.dot(dout, x_0, dw_00, input_precision=PRECISION)
        dw_01 = tl.dot(dout, x_1, dw_01, input_precision=PRECISION)
        dw_02 = tl.dot(dout, x_2, dw_02, input_precision=PRECISION)
        dout = tl.load(dout_ptrs + 2 * P * C, mask=mask_out & (row + 2 >= 0) & (row + 2 < R), other=0.0)
        dw_10 = tl.dot(dout, x_0, dw_10, input_precision=PRECISION)
        dw_11 = tl.dot(dout, x_1, dw_11, input_precision=PRECISION)
        dw_12 = tl.dot(dout, x_2, dw_12, input_precision=PRECISION)
        dout = tl.load(dout_ptrs, mask=mask_out & (row >= 0) & (row < R), other=0.0)
        dw_20 = tl.dot(dout, x_0, dw_20, input_precision=PRECISION)
        dw_21 = tl.dot(dout, x_1, dw_21, input_precision=PRECISION)
        dw_22 = tl.dot(dout, x_2, dw_22, input_precision=PRECISION)
        db = tl.dot(dout, ones, db, input_precision=PRECISION)  # cheaper than a sum across threads
        # to the next places, or row
        step = BLOCK_P if i % CHUNKS + 1 < CHUNKS else P - (CHUNKS - 1) * BLOCK_P
        x_ptrs += step * place
        dout_ptrs += step * C
    dw_ptr += (program * 9 * C + m_0 + offs_c[:, None]) * C + n_0 + offs_c[None, :]
    mask_w = mask_m & mask_n
    tl.store(dw_ptr, dw_00, mask=mask_w)
    tl.store(dw_ptr + C * C, dw_01, mask=mask_w)
    tl.store(dw_ptr + 2 * C * C, dw_02, mask=mask_w)
    tl.store(dw_ptr + 3 * C * C, dw_10, mask=mask_w)
    tl.store(dw_ptr + 4 * C * C, dw_11, mask=mask_w)
    tl.store(dw_ptr + 5 * C * C, dw_12, mask=mask_w)
    tl.store(dw_ptr + 6 * C * C, dw_20, mask=mask_w)
    tl.store(dw_ptr + 7 * C * C, dw_21, mask=mask_w)
    tl.store(dw_ptr + 8 * C * C, dw_22, mask=mask_w)
    if n_0 == 0:
        column = tl.max(db, axis=1)  # all are equal
        tl.store(db_ptr + program * C + m_0 + offs_c, column, mask=m_0 + offs_c < C)


def _conv(x, w, out, begin, *, bias=None, up=(None,) * 4, of_relu=None, last, out_last=True, **constants):
    """_conv_kernel of x to out, whose row 0 has its first tap in row `begin` of x. up: weights, bias, gain
    and bias of the end."""
    B, C, N, P = x.shape
    R = out.shape[2]
    n_program, tiles = _conv_tiles(x.dtype, B, R, C, P, last)
    _conv_kernel[(n_program * B,)](
        x, w, bias, *up, of_relu, out, x_stride=x.stride(0), out_stride=out.stride(0), N=N, R=R, P=P,
        begin=begin, n_program=n_program, C=C, LAST=last, OUT_LAST=out_last, **tiles, **constants)


def _conv_dw(x, dout, last):
    """Gradients of a convolution's weights and bias from dout, that of its sum."""
    B, C, N, P = x.shape
    R = dout.shape[2]
    n_program, n_block = _split_rows(N, B)
    tiles = _conv_dw_tiles(x.dtype, C, P)
    dw = _new(x, n_program * B, 9, C, C, dtype=torch.float32)
    db = _new(x, n_program * B, C, dtype=torch.float32)
    _conv_dw_kernel[(n_program * B, tiles["BLOCKS"] ** 2)](
        x, dout, dw, db, dout_stride=dout.stride(0), R=R, P=P, n_past=N - R, n_program=n_program,
        n_block=n_block, C=C, LAST=last, **tiles)
    return dw.sum(0).unflatten(0, (3, 3)).permute(2, 3, 0, 1), db.sum(0)


def _image(like, rows):
    """Memory for an image (B, C, rows, P) whose channels lie last."""
    B, C, _, P = like.shape
    return _new(like, B, rows, P, C).permute(0, 3, 1, 2)


def _last_rows(x1, x2, n_rows, n_past):
    B, C, _, P = x1.shape
    out1, out2 = _new(x1, B, C, HISTORY, P), _new(x2, B, C, HISTORY, P)
    _last_rows_kernel[(C * B,)](x1, x2, n_rows, out1, out2, x1_strides=x1.stride(), x2_strides=x2.stride(),
                                n_past=n_past, C=C, P=P, HISTORY=HISTORY, BLOCK_P=_next_power_of_2(P))
    return out1, out2


def _through_last_rows(dlast, x, n_rows, n_past):
    """Gradient of x from that of its last rows."""
    dx = x.new_zeros(*x.shape[:2], HISTORY + x.shape[2], x.shape[3])  # with the rows before the first
    row = n_rows[:, None] + n_past + torch.arange(HISTORY, device=x.device)
    return dx.scatter_(2, row[:, None, :, None].expand_as(dlast), dlast)[:, :, HISTORY:]


class _CausalCNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_rows, image, w1, b1, w2, b2, up, up_b, gain, bias, past1, past2):
        B, C, R, _ = image.shape
        H, width = C // 2, gain.shape[0]
        dtype, n_past = image.dtype, past1.shape[2]
        w1, w2 = w1.to(dtype).contiguous(), w2.to(dtype).contiguous()
        ups = up.to(dtype).reshape(4 * H, C).contiguous()
        constants = dict(WIDTH=width, H=H, BLOCK_H=_next_power_of_2(max(4, H)))
        x1 = image.contiguous()
        x2 = _image(image, n_past + R)
        if n_past:  # without, image is not copied
            x1 = torch.cat([past1.to(dtype), image], 2)
            x2[:, :, :n_past] = past2
        _conv(x1, w1, x2[:, :, n_past:], n_past - HISTORY, bias=b1, last=False, **constants)
        scores = _new(image, B, H, R, width)
        _conv(x2, w2, scores, n_past - HISTORY, bias=b2, up=(ups, up_b, gain, bias), last=True, **constants)
        ctx.save_for_backward(n_rows, x1, x2, w1, w2, b2, ups, up_b, gain)
        ctx.constants, ctx.n_past = constants, n_past
        ctx.set_materialize_grads(False)
        return scores, *_last_rows(x1, x2, n_rows, n_past)

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores, dlast1, dlast2):
        n_rows, x1, x2, w1, w2, b2, ups, up_b, gain = ctx.saved_tensors
        constants, n_past = ctx.constants, ctx.n_past
        B, C, N, P = x1.shape
        H, R, width = constants["H"], N - n_past, constants["WIDTH"]
        dscores = x1.new_zeros(B, H, R, width) if dscores is None else dscores.contiguous()
        # -- scores to the second convolution's sum
        x3, dout = _image(x1, R), _image(x1, R)
        n_program, n_block = _split_rows(R, B)
        dup = _new(x1, n_program * B, 4 * constants["BLOCK_H"], C, dtype=torch.float32)
        dup_b, dnorm = _new(dup, *dup.shape[:2]), _new(dup, len(dup), 2, width)
        _conv(x2, w2, x3, n_past - HISTORY, bias=b2, last=True, **constants)
        _up_bwd_kernel[(n_program * B,)](
            x3, ups, up_b, gain, dscores, dout, dup, dup_b, dnorm, R=R, P=P, n_program=n_program,
            n_block=n_block, C=C, **_up_bwd_tiles(x1.dtype, C, P), **constants)
        del x3
        dup, dup_b = dup.sum(0)[: 4 * H, :, None, None], dup_b.sum(0)[: 4 * H]
        dgain, dbias = dnorm.sum(0)
        # -- through the second convolution
        dw2, db2 = _conv_dw(x2, dout, last=True)
        dx2 = _image(x1, N)
        _conv(dout, w2, dx2, -n_past, of_relu=x2, last=True, **constants)
        if dlast2 is not None:
            own = _through_last_rows(dlast2, x2, n_rows, n_past)
            own[:, :, n_past:] *= x2[:, :, n_past:] > 0
            dx2 += own
        # -- through the first
        dout = dx2[:, :, n_past:]
        dw1, db1 = _conv_dw(x1, dout, last=False)
        dx1 = _new(x1, B, C, N, P)  # the encoder reads it in its image's order
        _conv(dout, w1, dx1, -n_past, last=True, out_last=False, **constants)
        if dlast1 is not None:
            dx1 += _through_last_rows(dlast1, x1, n_rows, n_past)
        grads = (dw1, db1, dw2, db2, dup, dup_b, dgain, dbias, dx1[:, :, :n_past], dx2[:, :, :n_past])
        needed = zip(grads, ctx.needs_input_grad[2:])
        return None, dx1[:, :, n_past:], *(grad if need else None for grad, need in needed)


def _causal_cnn_step(n_rows, image, w1, b1, w2, b2, up, up_b, gain, bias, past1, past2):
    B, C, _, P = image.shape
    H, width, dtype = C // 2, gain.shape[0], image.dtype
    scores, middle = _new(image, B, H, 1, width), _new(image, B, C, P)
    next1, next2 = _new(image, B, C, HISTORY, P), _new(image, B, C, HISTORY, P)
    weights = (w.contiguous() for w in (w1, b1, w2, b2, up, up_b, gain, bias))
    _cnn_step_kernel[(B,)](
        image.contiguous(), *weights, past1.to(dtype).contiguous(), past2.to(dtype).contiguous(), n_rows,
        middle, next1, next2, scores, P=P, WIDTH=width, C=C, H=H, HISTORY=HISTORY,
        BLOCK_H=_next_power_of_2(max(4, H)), **_cnn_step_tiles(C, P))
    return scores, next1, next2


def causal_cnn(image: Tensor, cnn: nn.Module, past: tuple[Tensor, Tensor], n_rows: Tensor) -> tuple[Tensor,
               tuple[Tensor, Tensor]]:
    """sea.causal_cnn, in the dtype of image."""
    _check_tensor("image", image, 4, "(B, 2H, R, P)")
    layers = (cnn.conv1, cnn.conv2, cnn.up, cnn.norm_out)
    weights = [w for layer in layers for w in (layer.weight, layer.bias)]
    run = _causal_cnn_step if _is_step(image) and past[0].shape[2] == HISTORY else _CausalCNN.apply
    with torch.cuda.device_of(image):
        scores, *last_rows = run(n_rows.contiguous(), image, *weights, *past)
    return scores, tuple(last_rows)


# -- products with what stands for the keys of each cell ---------------------------------------------

BUCKET_KEYS = dict(BLOCK_B=16, BLOCK_N=8, num_warps=4)
CELL_KEYS = dict(programs=528)  # 4 on each of an H100's multiprocessors
STEP_BUCKETS = dict(programs=1024)  # in most steps all but one a head have nothing to do


def _cell_keys_tiles(dtype: torch.dtype, D: int, width: int) -> dict:
    is_half, block_p = dtype != torch.float32, max(16, _next_power_of_2(width))  # fp32: no tensor cores
    is_narrow = block_p <= 256  # one block, and its products stay in registers for the second pass
    num_warps = (1 if block_p <= 128 else 2) if is_half else 4
    return dict(BLOCK_R=16, BLOCK_B=64 if is_half else 32, BLOCK_P=block_p if is_narrow else 128,
                BLOCK_D=_dot_block(D, dtype), num_warps=num_warps, num_stages=3 if is_half else 1)


def _cell_keys_step_tiles(n_head: int, D: int, width: int) -> tuple[int, dict, dict]:
    """Blocks of buckets that a program of the kernel of buckets reads, and constants of that kernel, blocks of
    2,048 numbers, and of that of cells; n_head: key/value heads of all sequences."""
    block_p, block_d = _next_power_of_2(width), _next_power_of_2(D)
    block_b = min(2 * block_p, max(1, 2048 // block_d))
    n_block = max(1, _cdiv(_cdiv(2 * width, block_b) * n_head, STEP_BUCKETS["programs"]))
    return (n_block, dict(BLOCK_B=block_b, BLOCK_D=block_d, num_warps=4),
            dict(BLOCK_P=block_p, num_warps=min(max(block_p // 256, 1), 8)))


@triton.jit
def _bucket_level(seen, N_BUCKETS: tl.constexpr):
    """sea.bucket_level: the bits of (seen - 1) // N_BUCKETS, counted by a float's exponent. Exact for
    seen < 2^24 * N_BUCKETS."""
    x = (tl.maximum(seen, 1) - 1) // N_BUCKETS
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _bucket_of_cell(p, seen, in_cells, e, WIDTH: tl.constexpr, PLACE: tl.constexpr, PLACES: tl.constexpr):
    """The bucket of 2^e keys, or the last full one, that the middle key of part PLACE of PLACES of cell p is
    in: key in_cells x // n with n = 2 PLACES WIDTH, x = 2 PLACES p + 2 PLACE + 1. in_cells in two parts,
    since the product passes 2^31 at 1M keys, width 1024."""
    n: tl.constexpr = 2 * PLACES * WIDTH
    x = 2 * PLACES * p + 2 * PLACE + 1
    middle = in_cells // n * x + in_cells % n * x // n
    return tl.minimum(middle >> e, tl.maximum(seen >> e, 1) - 1)


# What the keys of rank bucket * 2^e ... (bucket + 1) * 2^e - 1 add up to, and what stands for them, for the
# levels e from that of count to that of count + n_new.
# One program: BLOCK_B buckets of one level of one key/value head; grid (cdiv(N_BUCKETS, BLOCK_B) * n_level *
# B * Hkv,). It reads BLOCK_N keys of each at a time.
#   k (B, Hkv, T, D), any strides; count, n_new (B,) int
#   past, totals (B, Hkv, N_BUCKETS, D) fp32, sums at the levels of count and of count + n_new; or, BOUNDS,
#   (B, Hkv, N_BUCKETS, 3, D), followed by the largest numbers of k and of -k
#   keys (B, Hkv, n_level, N_BUCKETS, D) in the dtype of k, their means; or, BOUNDS, (B, Hkv, n_level,
#   N_BUCKETS, 2, D), as sea.boxes has them
# fp32: the sums, in a fixed order. A level holds half as many keys as the next, so all together read each key
# twice. Reference: sea.bucket_sums, sea.bucket_tops.
@triton.jit
def _bucket_keys_kernel(k_ptr, count_ptr, n_new_ptr, past_ptr, keys_ptr, totals_ptr, k_strides, HKV, n_level,
                        D: tl.constexpr, N_BUCKETS: tl.constexpr, BOUNDS: tl.constexpr,
                        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    TOTALS: tl.constexpr = 3 * D if BOUNDS else D
    KEYS: tl.constexpr = 2 * D if BOUNDS else D
    n_block: tl.constexpr = (N_BUCKETS + BLOCK_B - 1) // BLOCK_B
    pid, pid_bkv = _program(n_block * n_level)
    pid_b, pid_e = pid % n_block, pid // n_block
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    count, n_new = tl.load(count_ptr + b).to(tl.int32), tl.load(n_new_ptr + b).to(tl.int32)
    lowest, last = _bucket_level(count, N_BUCKETS), _bucket_level(count + n_new, N_BUCKETS)
    e = lowest + pid_e
    if e > last:
        return
    offs_b, offs_n, offs_d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    offs_bucket = (pid_b * BLOCK_B + offs_b).to(tl.int64)
    mask_b, mask_d = offs_bucket < N_BUCKETS, offs_d < D
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_B, BLOCK_D), -float("inf"), tl.float32)  # of k and, below, of -k
    top_neg = tl.full((BLOCK_B, BLOCK_D), -float("inf"), tl.float32)
    # -- the new keys of these buckets
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    origin = (pid_b.to(tl.int64) * BLOCK_B << e) - count  # place of the first key of the first bucket
    has_new = (origin < n_new) & (origin + (tl.full((), BLOCK_B, tl.int64) << e) > 0)
    for start in range(0, tl.where(has_new, 1 << e, 0), BLOCK_N):
        i = start + offs_n
        j = (offs_bucket << e)[:, None] - count + i[None, :]  # (BLOCK_B, BLOCK_N)
        mask_j = (i < (1 << e))[None, :] & (j >= 0) & (j < n_new) & mask_b[:, None]
        mask = mask_j[:, :, None] & mask_d[None, None, :]
        k = tl.load(k_ptr + j[:, :, None] * k_strides[2] + offs_d[None, None, :] * k_strides[3], mask=mask,
                    other=0.0).to(tl.float32)
        acc += tl.sum(k, axis=1)
        if BOUNDS:
            top = tl.maximum(top, tl.max(tl.where(mask, k, -float("inf")), axis=1))
            top_neg = tl.maximum(top_neg, tl.max(tl.where(mask, -k, -float("inf")), axis=1))
    # -- the past's buckets that lie in these; from n_past_bucket on they are empty
    n_past_bucket = tl.minimum((count + (1 << lowest) - 1) >> lowest, N_BUCKETS)
    for i in range(0, tl.minimum(1 << pid_e, n_past_bucket - (pid_b * BLOCK_B << pid_e))):
        bucket_past = (offs_bucket << pid_e) + i
        mask = (bucket_past < n_past_bucket)[:, None] & mask_d[None, :]
        past_ptrs = past_ptr + (pid_bkv * N_BUCKETS + bucket_past)[:, None] * TOTALS + offs_d[None, :]
        acc += tl.load(past_ptrs, mask=mask, other=0.0)
        if BOUNDS:
            top = tl.maximum(top, tl.load(past_ptrs + D, mask=mask, other=-float("inf")))
            top_neg = tl.maximum(top_neg, tl.load(past_ptrs + 2 * D, mask=mask, other=-float("inf")))
    # -- write back
    mask = mask_b[:, None] & mask_d[None, :]
    place = (pid_bkv * n_level + pid_e) * N_BUCKETS + offs_bucket
    keys_ptrs = keys_ptr + place[:, None] * KEYS + offs_d[None, :]
    totals_ptrs = totals_ptr + (pid_bkv * N_BUCKETS + offs_bucket)[:, None] * TOTALS + offs_d[None, :]
    centre = acc * tl.exp2(-e.to(tl.float32))  # the mean
    if BOUNDS:
        has_keys = ((offs_bucket << e) < count + n_new)[:, None]
        top, top_neg = tl.where(has_keys, top, 0.0), tl.where(has_keys, top_neg, 0.0)
        tl.store(keys_ptrs + D, ((top + top_neg) / 4).to(keys_ptr.dtype.element_ty), mask=mask)
        centre = centre / 2 + (top - top_neg) / 4
    tl.store(keys_ptrs, centre.to(keys_ptr.dtype.element_ty), mask=mask)
    if e == last:
        tl.store(totals_ptrs, acc, mask=mask)
        if BOUNDS:
            tl.store(totals_ptrs + D, top, mask=mask)
            tl.store(totals_ptrs + 2 * D, top_neg, mask=mask)


@triton.jit
def _products_of_cells(products_ptr, cells, seen, in_cells, e, mask, WIDTH: tl.constexpr, BOUNDS: tl.constexpr):
    """The product that stands for each cell, (cells, rows), of rows whose buckets are of level e; -inf where
    mask, of that shape, is False. products_ptr: that of each row's first bucket."""
    PLACES: tl.constexpr = 2 if BOUNDS else 1
    p, products_ptr, seen, in_cells = cells[:, None], products_ptr[None, :], seen[None, :], in_cells[None, :]
    bucket = _bucket_of_cell(p, seen, in_cells, e, WIDTH, 0, PLACES)
    s = tl.load(products_ptr + bucket, mask=mask, other=-float("inf"))
    if BOUNDS:
        bucket = _bucket_of_cell(p, seen, in_cells, e, WIDTH, 1, PLACES)
        s = tl.maximum(s, tl.load(products_ptr + bucket, mask=mask, other=-float("inf")))
    return s


# x[p] += gain * max(s_p - max s, -32), s_p = softmax_scale * q . (key of the bucket in the middle of cell p),
# or, BOUNDS, softmax_scale * [q ; |q|] . (key of a bucket), the larger one for the buckets in the middle of
# its halves; or, BACKWARD, the sum of x[p] max(..), the gradient of gain from x, that of the result.
# One program: every n-th tile of BLOCK_R rows of one head; grid (n,). For each level of its rows, nearly
# always one, it multiplies them with its buckets, BLOCK_B at a time, and then takes each cell's product out
# of those of its row, BLOCK_P at a time: once for the largest, and once more to add them.
#   q (B, H, R, D), seen and in_cells (B, R) int, any strides; keys and count as above
#   x (B, H, R, WIDTH) contiguous, in place
#   products (n, BLOCK_R, 2 * WIDTH) fp32: scratch of one tile
#   parts (n_tile,) fp32, BACKWARD: each tile's sum
# fp32: products (of keys rounded to the dtype of k), maximum. Eager writes 2 * WIDTH products per row and
# level. Tiles that take products out are (cells, rows): where an address depends on data, Triton has
# neighbouring threads walk along the first axis, and neighbouring cells' products lie side by side. At width
# 256 (rows, cells) is 1.2 to 1.4 times slower. Limits: WIDTH <= MAX_WIDTH_CELL_KEYS. Tried: tl.gather, which
# costs a shuffle for each 32 buckets that a cell might be in (1.5 times slower). Reference: sea.add_cell_keys.
@triton.jit
def _cell_keys_kernel(x_ptr, gain_ptr, q_ptr, keys_ptr, seen_ptr, in_cells_ptr, count_ptr, products_ptr,
                      parts_ptr, q_strides, seen_strides, in_cells_strides, H, R, n_level, n_tile,
                      softmax_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                      BOUNDS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    N_BUCKETS: tl.constexpr = 2 * WIDTH
    KEYS: tl.constexpr = 2 * D if BOUNDS else D
    offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    offs_p, offs_b = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_B)
    mask_d = (offs_d < D)[None, :]
    products_ptr += (tl.program_id(0).to(tl.int64) * BLOCK_R + offs_r) * N_BUCKETS
    for tile in range(tl.program_id(0), n_tile, tl.num_programs(0)):
        pid_bh = (tile // tl.cdiv(R, BLOCK_R)).to(tl.int64)
        b, h = pid_bh // H, pid_bh % H
        row = (tile % tl.cdiv(R, BLOCK_R) * BLOCK_R + offs_r).to(tl.int64)
        mask_r = row < R
        q_ptrs = q_ptr + b * q_strides[0] + h * q_strides[1]
        # (BLOCK_R, BLOCK_D)
        q = _load_tile(q_ptrs, row, offs_d, q_strides[2], q_strides[3], mask_r[:, None] & mask_d)
        seen = tl.load(seen_ptr + b * seen_strides[0] + row * seen_strides[1], mask=mask_r,
                       other=0).to(tl.int32)
        in_cells = tl.load(in_cells_ptr + b * in_cells_strides[0] + row * in_cells_strides[1], mask=mask_r,
                           other=0).to(tl.int32)
        level = _bucket_level(seen, N_BUCKETS)
        lowest = _bucket_level(tl.load(count_ptr + b).to(tl.int32), N_BUCKETS)
        level_begin = tl.maximum(tl.min(tl.where(seen > 0, level, 64), axis=0), lowest)
        level_end = tl.minimum(tl.max(level, axis=0) + 1, lowest + n_level)
        keys_ptrs = keys_ptr + (b * (H // GROUP) + h // GROUP) * n_level * N_BUCKETS * KEYS
        part = 0.0
        for e in range(level_begin, level_end):
            mask_e = (level == e) & (seen > 0)
            for start in range(0, tl.max(tl.where(mask_e, seen >> e, 0), axis=0), BLOCK_B):
                offs_bucket = start + offs_b
                mask_b = offs_bucket < N_BUCKETS
                place, mask = (e - lowest).to(tl.int64) * N_BUCKETS + offs_bucket, mask_b[:, None] & mask_d
                key = _load_tile(keys_ptrs, place, offs_d, KEYS, 1, mask)  # (BLOCK_B, BLOCK_D)
                products = tl.dot(q, tl.trans(key), input_precision="ieee")
                if BOUNDS:
                    key = _load_tile(keys_ptrs + D, place, offs_d, KEYS, 1, mask)
                    products += tl.dot(tl.abs(q), tl.trans(key), input_precision="ieee")
                tl.store(products_ptr[:, None] + offs_bucket[None, :], products * softmax_scale,
                         mask=mask_b[None, :])
            tl.debug_barrier()
            highest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
            for start in range(0, WIDTH, BLOCK_P):
                cells = start + offs_p
                mask = (cells < WIDTH)[:, None] & mask_e[None, :]
                s = _products_of_cells(products_ptr, cells, seen, in_cells, e, mask, WIDTH, BOUNDS)
                highest = tl.maximum(highest, tl.max(s, axis=0))
            for start in range(0, WIDTH, BLOCK_P):
                cells = start + offs_p
                mask = (cells < WIDTH)[:, None] & mask_e[None, :]
                s = _products_of_cells(products_ptr, cells, seen, in_cells, e, mask, WIDTH, BOUNDS)
                s = tl.maximum(s - highest[None, :], -32.0)
                x_ptrs = x_ptr + (pid_bh * R + row[None, :]) * WIDTH + cells[:, None]
                x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
                if BACKWARD:
                    part += tl.sum(tl.sum(tl.where(mask, x * s, 0.0), axis=1), axis=0)
                else:
                    x += tl.load(gain_ptr + h).to(tl.float32) * s
                    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # before other products come
        if BACKWARD:
            tl.store(parts_ptr + tile, part)


# One token per sequence: its key added to its bucket, in place, the buckets moved up a level where it begins
# one, and the products of its row, if it is one, with what stands for each bucket.
# One program: n_block blocks of BLOCK_B buckets of one key/value head, and the query heads that share it; grid
# (cdiv(cdiv(2 * WIDTH, BLOCK_B), n_block) * B * Hkv,). At a new level a head's first program does the work of
# all, from the first bucket on, since buckets move to lower places.
#   q (B, H, 1, D), k (B, Hkv, 1, D), any strides; seen (B, 1), any strides: 0 if the token is no row
#   count, n_new (B,) int; totals as above, of 2 * WIDTH buckets
#   products (B * H, 2 * WIDTH) fp32
# fp32: everything, no dots. Reads all buckets if the token is a row or at a new level, else the block that
# its key is in. Reference: sea.add_cell_keys.
@triton.jit
def _step_buckets_kernel(q_ptr, k_ptr, seen_ptr, count_ptr, n_new_ptr, totals_ptr, products_ptr, q_strides,
                         k_strides, seen_strides, HKV, n_block, softmax_scale, GROUP: tl.constexpr,
                         D: tl.constexpr, N_BUCKETS: tl.constexpr, BOUNDS: tl.constexpr, BLOCK_B: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    TOTALS: tl.constexpr = 3 * D if BOUNDS else D
    pid_b, pid_bkv = _program(tl.cdiv(tl.cdiv(N_BUCKETS, BLOCK_B), n_block))
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    count, n_new = tl.load(count_ptr + b).to(tl.int32), tl.load(n_new_ptr + b).to(tl.int32)
    level, last = _bucket_level(count, N_BUCKETS), _bucket_level(count + n_new, N_BUCKETS)
    is_row = tl.load(seen_ptr + b * seen_strides[0]) > 0
    # -- this program's buckets
    begin, end = pid_b * n_block, tl.minimum((pid_b + 1) * n_block, tl.cdiv(N_BUCKETS, BLOCK_B))
    if last > level:
        begin, end = begin * 0, tl.where(pid_b == 0, tl.cdiv(N_BUCKETS, BLOCK_B), 0)  # of begin's type
    elif not is_row:
        of_key = (count >> last) // BLOCK_B
        is_mine = (of_key >= begin) & (of_key < end) & (n_new > 0)
        begin, end = of_key, tl.where(is_mine, of_key + 1, of_key)
    n_past_bucket = tl.minimum((count + (1 << level) - 1) >> level, N_BUCKETS)  # from here on they are empty
    offs_d = tl.arange(0, BLOCK_D)
    mask_d, totals_ptr = offs_d < D, totals_ptr + pid_bkv * N_BUCKETS * TOTALS + offs_d[None, :]
    k = _vector(k_ptr + b * k_strides[0] + kv * k_strides[1], offs_d * k_strides[3], mask_d)[None, :]
    for block in range(begin, end):
        offs_b = block * BLOCK_B + tl.arange(0, BLOCK_B)
        mask = (offs_b < N_BUCKETS)[:, None] & mask_d[None, :]
        # -- what was in them, and the new key
        old = (offs_b << (last - level))[:, None]
        mask_0, mask_1 = mask & (old < n_past_bucket), mask & (old + 1 < n_past_bucket) & (last > level)
        mask_new = (offs_b == (count >> last))[:, None] & (n_new > 0)
        old_ptrs, new_ptrs = totals_ptr + old * TOTALS, totals_ptr + offs_b[:, None] * TOTALS
        x = tl.load(old_ptrs, mask=mask_0, other=0.0) + tl.load(old_ptrs + TOTALS, mask=mask_1, other=0.0)
        x += tl.where(mask_new, k, 0.0)
        centre = x * tl.exp2(-last.to(tl.float32))
        radius = centre
        if BOUNDS:
            top = tl.load(old_ptrs + D, mask=mask_0, other=-float("inf"))
            top = tl.maximum(top, tl.load(old_ptrs + TOTALS + D, mask=mask_1, other=-float("inf")))
            top = tl.maximum(top, tl.where(mask_new, k, -float("inf")))
            top_neg = tl.load(old_ptrs + 2 * D, mask=mask_0, other=-float("inf"))
            next_neg = tl.load(old_ptrs + TOTALS + 2 * D, mask=mask_1, other=-float("inf"))
            top_neg = tl.maximum(tl.maximum(top_neg, next_neg), tl.where(mask_new, -k, -float("inf")))
            has_keys = ((offs_b << last) < count + n_new)[:, None] & mask_d[None, :]
            top, top_neg = tl.where(has_keys, top, 0.0), tl.where(has_keys, top_neg, 0.0)
            centre, radius = centre / 2 + (top - top_neg) / 4, (top + top_neg) / 4
            radius = radius.to(k_ptr.dtype.element_ty).to(tl.float32)
        centre = centre.to(k_ptr.dtype.element_ty).to(tl.float32)
        tl.debug_barrier()  # old buckets are read before new ones take their places
        mask_changed = mask & (mask_new | (last > level))
        tl.store(new_ptrs, x, mask=mask_changed)
        if BOUNDS:
            tl.store(new_ptrs + D, top, mask=mask_changed)
            tl.store(new_ptrs + 2 * D, top_neg, mask=mask_changed)
        # -- products
        if is_row:
            for g in range(0, GROUP):
                q_ptrs = q_ptr + b * q_strides[0] + (kv * GROUP + g) * q_strides[1]
                q = _vector(q_ptrs, offs_d * q_strides[3], mask_d)[None, :]
                products = tl.sum(centre * q, axis=1)
                if BOUNDS:
                    products += tl.sum(radius * tl.abs(q), axis=1)
                products_ptrs = products_ptr + (pid_bkv * GROUP + g) * N_BUCKETS + offs_b
                tl.store(products_ptrs, products * softmax_scale, mask=offs_b < N_BUCKETS)


# x as _cell_keys_kernel leaves it, of one token per sequence, from those products; IS_NEW: x held nothing.
# One program: one head; grid (B * H,).
#   x (B, H, 1, WIDTH) contiguous, in place; gain (H,); seen, in_cells (B, 1), any strides; count, n_new (B,)
# fp32: everything. A launch of its own, since a row's largest product is among what many programs of
# _step_buckets_kernel write. Reference: sea.add_cell_keys.
@triton.jit
def _step_cells_kernel(x_ptr, gain_ptr, seen_ptr, in_cells_ptr, count_ptr, n_new_ptr, products_ptr,
                       seen_strides, in_cells_strides, H, IS_NEW: tl.constexpr, WIDTH: tl.constexpr,
                       BOUNDS: tl.constexpr, BLOCK_P: tl.constexpr):
    N_BUCKETS: tl.constexpr = 2 * WIDTH
    PLACES: tl.constexpr = 2 if BOUNDS else 1
    pid_bh = tl.program_id(0).to(tl.int64)
    b, offs_p = pid_bh // H, tl.arange(0, BLOCK_P)
    mask_p, x_ptr = offs_p < WIDTH, x_ptr + pid_bh * WIDTH + offs_p
    x = tl.zeros((BLOCK_P,), tl.float32)
    seen = tl.load(seen_ptr + b * seen_strides[0]).to(tl.int32)
    if seen == 0:
        if IS_NEW:
            tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=mask_p)
        return
    in_cells = tl.load(in_cells_ptr + b * in_cells_strides[0]).to(tl.int32)
    last = _bucket_level((tl.load(count_ptr + b) + tl.load(n_new_ptr + b)).to(tl.int32), N_BUCKETS)
    products_ptr += pid_bh * N_BUCKETS
    bucket_0 = _bucket_of_cell(offs_p, seen, in_cells, last, WIDTH, 0, PLACES)
    bucket_1 = _bucket_of_cell(offs_p, seen, in_cells, last, WIDTH, PLACES - 1, PLACES)
    s = tl.load(products_ptr + bucket_0, mask=mask_p, other=-float("inf"))
    s = tl.maximum(s, tl.load(products_ptr + bucket_1, mask=mask_p, other=-float("inf")))
    s = tl.maximum(s - tl.max(s, axis=0), -32.0)
    if not IS_NEW:
        x = tl.load(x_ptr, mask=mask_p, other=0.0).to(tl.float32)
    x += tl.load(gain_ptr + pid_bh % H).to(tl.float32) * s
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), mask=mask_p)


def _cell_keys_launch(x, gain, q, keys, row_seen, in_cells, count, parts, softmax_scale):
    (B, H, R, D), width, (Hkv, n_level) = q.shape, x.shape[-1], keys.shape[1:3]
    tiles = _cell_keys_tiles(q.dtype, D, width)
    n_tile = _cdiv(R, tiles["BLOCK_R"]) * B * H
    n_program = min(n_tile, CELL_KEYS["programs"])
    products = _new(q, n_program, tiles["BLOCK_R"], 2 * width, dtype=torch.float32)
    _cell_keys_kernel[(n_program,)](
        x, gain, q, keys, row_seen, in_cells, count, products, parts, q_strides=q.stride(),
        seen_strides=row_seen.stride(), in_cells_strides=in_cells.stride(), H=H, R=R, n_level=n_level,
        n_tile=n_tile, softmax_scale=softmax_scale, GROUP=H // Hkv, D=D, WIDTH=width,
        BOUNDS=keys.shape[-1] > D, BACKWARD=parts is not None, **tiles)


class _AddCellKeys(torch.autograd.Function):
    """In place, since scores are the largest tensor of a layer."""

    @staticmethod
    def forward(ctx, scores, gain, q, keys, row_seen, in_cells, count, softmax_scale):
        ctx.mark_dirty(scores)
        ctx.save_for_backward(gain, q, keys, row_seen, in_cells, count)
        ctx.softmax_scale = softmax_scale
        _cell_keys_launch(scores, gain, q, keys, row_seen, in_cells, count, None, softmax_scale)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores):
        gain, q, keys, row_seen, in_cells, count = ctx.saved_tensors
        (B, H, R, D), dscores = q.shape, dscores.contiguous()
        tiles_per_head = _cdiv(R, _cell_keys_tiles(q.dtype, D, dscores.shape[-1])["BLOCK_R"])
        parts = _new(q, B, H, tiles_per_head, dtype=torch.float32)
        _cell_keys_launch(dscores, gain, q, keys, row_seen, in_cells, count, parts, ctx.softmax_scale)
        return dscores, parts.sum((0, 2)).to(gain.dtype), *[None] * 6


def add_cell_keys(scores: Tensor | None, gain: Tensor, q: Tensor, k: Tensor, row_seen: Tensor,
                  softmax_scale: float, count: Tensor, n_new: Tensor, past: Tensor,
                  in_cells: Tensor | None = None, *, bounds: bool = False,
                  in_place: bool = False) -> tuple[Tensor, Tensor]:
    """sea.add_cell_keys, scores in place. A row sees `count` keys at least, or none."""
    _check_tensor("q", q, 4, "(B, H, R, D)")
    _check_tensor("k", k, 4, "(B, Hkv, T, D)")
    _check_tensor("past", past, 4, "(B, Hkv, 2*width, D or 3D)")
    (B, H, R, D), (Hkv, T), is_step = q.shape, k.shape[1:3], _is_step(q) and k.shape[2] == 1
    is_new = scores is None
    if is_new:
        size = B, H, R, past.shape[2] // 2
        scores = _new(q, *size) if is_step else q.new_zeros(size)
    _check_tensor("scores", scores, 4, "(B, H, R, width)")
    width = scores.shape[-1]
    _expect(scores.shape[:3] == (B, H, R), "scores", f"shape (B, H, R, width) with B, H, R = {(B, H, R)}",
            tuple(scores.shape))
    _expect(width <= MAX_WIDTH_CELL_KEYS, "scores", f"a width of at most {MAX_WIDTH_CELL_KEYS}", width)
    _expect(scores.is_contiguous(), "scores", "a contiguous tensor, to add to", f"strides {scores.stride()}")
    in_cells = row_seen if in_cells is None else in_cells
    for name, x in (("row_seen", row_seen), ("in_cells", in_cells)):
        _expect(x.shape == (B, R), name, f"shape (B, R) = {(B, R)}", tuple(x.shape))
    q, k, softmax_scale = q.detach(), k.detach(), float(softmax_scale)
    count, n_new, gain, n_buckets = count.contiguous(), n_new.contiguous(), gain.contiguous(), 2 * width
    of_past = B, Hkv, n_buckets, 3 * D if bounds else D
    _expect(past.shape == of_past, "past", f"shape {of_past}", tuple(past.shape))
    totals = past.float().contiguous()
    with torch.cuda.device_of(q):
        if is_step:
            totals = totals if in_place else totals.clone()
            products = _new(q, B * H, n_buckets, dtype=torch.float32)
            n_block, of_buckets, of_cells = _cell_keys_step_tiles(B * Hkv, D, width)
            _step_buckets_kernel[(_cdiv(_cdiv(n_buckets, of_buckets["BLOCK_B"]), n_block) * B * Hkv,)](
                q, k, row_seen, count, n_new, totals, products, q_strides=q.stride(), k_strides=k.stride(),
                seen_strides=row_seen.stride(), HKV=Hkv, n_block=n_block, softmax_scale=softmax_scale,
                GROUP=H // Hkv, D=D, N_BUCKETS=n_buckets, BOUNDS=bounds, **of_buckets)
            _step_cells_kernel[(B * H,)](
                scores, gain, row_seen, in_cells, count, n_new, products, seen_strides=row_seen.stride(),
                in_cells_strides=in_cells.stride(), H=H, IS_NEW=is_new, WIDTH=width, BOUNDS=bounds, **of_cells)
            return scores, past.copy_(totals) if in_place else totals
        past_totals, totals = totals, torch.empty_like(totals)
        # T tokens raise the level to at most one above their own, bucket_level(T), or above that of count.
        n_level = ((T - 1) // n_buckets).bit_length() + 2
        keys = _new(k, B, Hkv, n_level, n_buckets, 2 * D if bounds else D)
        _bucket_keys_kernel[(_cdiv(n_buckets, BUCKET_KEYS["BLOCK_B"]) * n_level * B * Hkv,)](
            k, count, n_new, past_totals, keys, totals, k_strides=k.stride(), HKV=Hkv, n_level=n_level, D=D,
            N_BUCKETS=n_buckets, BOUNDS=bounds, BLOCK_D=_next_power_of_2(D), **BUCKET_KEYS)
        scores = _AddCellKeys.apply(scores, gain, q, keys, row_seen, in_cells, count, softmax_scale)
    return scores, past.copy_(totals) if in_place else totals


# -- mix ---------------------------------------------------------------------------------------------

MIX = dict(BLOCK_T=64, num_warps=4)
MIX_STEP = dict(num_warps=1)  # in one warp no thread reads sums that another has overwritten
SUM_ROWS = dict(BLOCK_R=64, num_warps=4)


# The sum of each block of BLOCK_T values: the first of two passes over v, in place of a running sum that
# would go from block to block.
# One program: a block of one key/value head; grid (n_block * B * Hkv,).
#   v (B, Hkv, T, D) any strides, seen (B, T) int, 0 where v is padding
#   sums (B * Hkv, n_block, D) fp32
@triton.jit
def _block_sums_kernel(v_ptr, seen_ptr, sums_ptr, v_strides, HKV, T, D: tl.constexpr, BLOCK_T: tl.constexpr,
                       BLOCK_D: tl.constexpr):
    n_block = tl.cdiv(T, BLOCK_T)
    pid_t, pid_bkv = _program(n_block)
    b, kv = pid_bkv // HKV, pid_bkv % HKV
    offs_t, offs_d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < D
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    v = _load_tile(v_ptr, offs_t, offs_d, v_strides[2], v_strides[3], mask_t[:, None] & mask_d[None, :])
    seen = tl.load(seen_ptr + b * T + offs_t, mask=mask_t, other=0)
    v = tl.where((seen > 0)[:, None], v.to(tl.float32), 0.0)
    tl.store(sums_ptr + (pid_bkv * n_block + pid_t) * D + offs_d, tl.sum(v, axis=0), mask=mask_d)


@triton.jit
def _running_mean(v_ptr, before_ptr, v_strides, offs_t, mask, seen, D: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Mean of v over the keys that each query of a block sees, of one head: (BLOCK_T, BLOCK_D) fp32."""
    offs_d, offs_i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    v = _load_tile(v_ptr, offs_t, offs_d, v_strides[2], v_strides[3], mask)
    v = tl.where((seen > 0)[:, None], v, 0.0)
    triangle = (offs_i[:, None] >= offs_i[None, :]).to(v.dtype)
    sums = tl.dot(triangle, v, input_precision="ieee") + _vector(before_ptr, offs_d, offs_d < D)[None, :]
    return sums / tl.maximum(seen, 1).to(tl.float32)[:, None]


@triton.jit
def _gates(gates_ptr, strides, b, h, row):
    """s_prob and s_mix of rows of one head, or of one row of heads."""
    gates_ptr += b * strides[0] + h * strides[1] + row * strides[2]
    s_prob, s_mix = tl.load(gates_ptr), tl.load(gates_ptr + strides[3])
    return tl.sigmoid(s_prob.to(tl.float32)), tl.sigmoid(s_mix.to(tl.float32))


# out = s_mix * s_prob * sparse + (1 - s_mix) * mean of v over the keys seen.
# One program: BLOCK_T queries of one head; grid (cdiv(T, BLOCK_T) * B * H,). The mean: the sum of the blocks
# before, given, and a product with a triangle of ones inside the block.
#   v (B, Hkv, T, D), gates (B, H, R, 2) before their sigmoid: any strides
#   sparse (B, H, T, D), before (B * Hkv, n_block + 1, D) fp32, seen and row (B, T) int -> out (B, H, T, D):
#   contiguous
# fp32 except the product, whose other operand is exact ones. Reads and writes once.
# Reference: sea.mix_average.
@triton.jit
def _mix_kernel(sparse_ptr, v_ptr, before_ptr, gates_ptr, seen_ptr, row_ptr, out_ptr, v_strides,
                gates_strides, H, GROUP, T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    n_block = tl.cdiv(T, BLOCK_T)
    pid_t, pid_bh = _program(n_block)
    b, kv = pid_bh // H, pid_bh % H // GROUP
    offs_t, offs_d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    seen = tl.load(seen_ptr + b * T + offs_t, mask=mask_t, other=0)
    row = tl.load(row_ptr + b * T + offs_t, mask=mask_t, other=0)
    before_ptr += ((b * (H // GROUP) + kv) * (n_block + 1) + pid_t) * D
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    mean = _running_mean(v_ptr, before_ptr, v_strides, offs_t, mask, seen, D, BLOCK_T, BLOCK_D)
    s_prob, s_mix = _gates(gates_ptr, gates_strides, b, pid_bh % H, row)
    s_prob, s_mix = s_prob[:, None], s_mix[:, None]
    sparse = _load_tile(sparse_ptr + pid_bh * T * D, offs_t, offs_d, D, 1, mask).to(tl.float32)
    out = tl.where((seen > 0)[:, None], s_mix * s_prob * sparse + (1.0 - s_mix) * mean, 0.0)
    tl.store(out_ptr + (pid_bh * T + offs_t[:, None]) * D + offs_d[None, :], out, mask=mask)


# dsparse = s_mix s_prob do; dv_j = sum over i >= j of w_i = (1 - s_mix) * do / seen; and dgates.
# One program: BLOCK_T queries of the heads that share one key/value head; grid
# (cdiv(T, BLOCK_T) * B * Hkv,).
# Two launches: the first (after_ptr None) writes dsparse, dgates and the sum of w over the block, the second
# dv.
#   do (B, H, T, D) any strides
#   dsparse (B, H, T, D), dgates (B, H, T, 2) fp32, per query, w_sums (B * Hkv, n_block, D) fp32: contiguous
#   after (B * Hkv, n_block + 1, D) fp32: sum of w from each block on; dv (B, Hkv, T, D): contiguous
# fp32 except the product, for which w is rounded to the dtype of dv.
# Reference: autograd through sea.mix_average.
@triton.jit
def _mix_bwd_kernel(sparse_ptr, v_ptr, before_ptr, gates_ptr, seen_ptr, row_ptr, do_ptr, dsparse_ptr,
                    dgates_ptr, w_sums_ptr, after_ptr, dv_ptr, v_strides, gates_strides, do_strides, H, GROUP,
                    T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    n_block = tl.cdiv(T, BLOCK_T)
    pid_t, pid_bkv = _program(n_block)
    b, kv = pid_bkv // (H // GROUP), pid_bkv % (H // GROUP)
    offs_t, offs_d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < D
    mask = mask_t[:, None] & mask_d[None, :]
    seen = tl.load(seen_ptr + b * T + offs_t, mask=mask_t, other=0)
    row = tl.load(row_ptr + b * T + offs_t, mask=mask_t, other=0)
    if after_ptr is None:
        v_ptr += b * v_strides[0] + kv * v_strides[1]
        before_ptr += (pid_bkv * (n_block + 1) + pid_t) * D
        mean = _running_mean(v_ptr, before_ptr, v_strides, offs_t, mask, seen, D, BLOCK_T, BLOCK_D)
    w = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for g in range(0, GROUP):
        h, of_head = kv * GROUP + g, b * H + kv * GROUP + g
        do = _load_tile(do_ptr + b * do_strides[0] + h * do_strides[1], offs_t, offs_d, do_strides[2],
                        do_strides[3], mask)
        do = tl.where((seen > 0)[:, None], do.to(tl.float32), 0.0)
        s_prob, s_mix = _gates(gates_ptr, gates_strides, b, h, row)
        w += (1.0 - s_mix)[:, None] * do
        if after_ptr is None:
            sparse = _load_tile(sparse_ptr + of_head * T * D, offs_t, offs_d, D, 1, mask).to(tl.float32)
            dsparse_ptrs = dsparse_ptr + (of_head * T + offs_t)[:, None] * D + offs_d[None, :]
            tl.store(dsparse_ptrs, (s_mix * s_prob)[:, None] * do, mask=mask)
            do_sparse, do_mean = tl.sum(do * sparse, axis=1), tl.sum(do * mean, axis=1)
            dgate_ptrs = dgates_ptr + (of_head * T + offs_t) * 2
            tl.store(dgate_ptrs, s_mix * do_sparse * s_prob * (1.0 - s_prob), mask=mask_t)
            tl.store(dgate_ptrs + 1, (s_prob * do_sparse - do_mean) * s_mix * (1.0 - s_mix), mask=mask_t)
    w /= tl.maximum(seen, 1).to(tl.float32)[:, None]
    if after_ptr is None:
        tl.store(w_sums_ptr + (pid_bkv * n_block + pid_t) * D + offs_d, tl.sum(w, axis=0), mask=mask_d)
    else:
        offs_i = tl.arange(0, BLOCK_T)
        dtype = dv_ptr.dtype.element_ty
        triangle = (offs_i[:, None] <= offs_i[None, :]).to(dtype)
        dv = tl.dot(triangle, w.to(dtype), input_precision="ieee")
        dv += _vector(after_ptr + (pid_bkv * (n_block + 1) + pid_t + 1) * D, offs_d, mask_d)[None, :]
        dv = tl.where((seen > 0)[:, None], dv, 0.0)
        tl.store(dv_ptr + (pid_bkv * T + offs_t)[:, None] * D + offs_d[None, :], dv, mask=mask)


# out[r] = sum of x over the queries of row r, neighbours since `row` does not fall.
# One program: BLOCK_R rows of one head, a query of each at a time; grid (cdiv(R, BLOCK_R) * B * H,).
#   x (B, H, T, 2), ends (B, R) int: the first query after row r -> out (B, H, R, 2), fp32, contiguous
# In a fixed order, which Tensor.scatter_add, the reference, does not have on a GPU.
@triton.jit
def _sum_rows_kernel(x_ptr, ends_ptr, out_ptr, H, T, R, BLOCK_R: tl.constexpr):
    pid_r, pid_bh = _program(tl.cdiv(R, BLOCK_R))
    row = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    ends_ptr += pid_bh // H * R + row
    end = tl.load(ends_ptr, mask=row < R, other=0)
    begin = tl.load(ends_ptr - 1, mask=(row < R) & (row > 0), other=0)
    offs_2 = tl.arange(0, 2)[None, :]
    total = tl.zeros((BLOCK_R, 2), tl.float32)
    for n in range(0, tl.max(end - begin, axis=0)):
        i = begin + n
        total += tl.load(x_ptr + (pid_bh * T + i)[:, None] * 2 + offs_2, mask=(i < end)[:, None], other=0.0)
    tl.store(out_ptr + (pid_bh * R + row)[:, None] * 2 + offs_2, total, mask=(row < R)[:, None])


# The same as _mix_kernel for one query per sequence, in one launch; besides out, sums = past + v.
# One program: the heads of one key/value head, which it alone reads and writes; grid (B * Hkv,). sums, past
# (B, Hkv, D) fp32, perhaps the same; the rest as above, with T = 1.
# fp32: everything. Reference: sea.mix_average.
@triton.jit
def _mix_step_kernel(sparse_ptr, v_ptr, past_ptr, gates_ptr, seen_ptr, row_ptr, out_ptr, sums_ptr, v_strides,
                     gates_strides, HKV, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    pid_bkv, i_head, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    b, kv, mask_d = pid_bkv // HKV, pid_bkv % HKV, offs_d < D
    mask_hd, offs_hd = (i_head < GROUP)[:, None] & mask_d[None, :], i_head[:, None] * D + offs_d[None, :]
    seen, row = tl.load(seen_ptr + b), tl.load(row_ptr + b)
    v = _vector(v_ptr + b * v_strides[0] + kv * v_strides[1], offs_d * v_strides[3], mask_d)
    total = tl.where(seen > 0, v, 0.0) + _vector(past_ptr + pid_bkv * D, offs_d, mask_d)
    tl.store(sums_ptr + pid_bkv * D + offs_d, total, mask=mask_d)
    s_prob, s_mix = _gates(gates_ptr, gates_strides, b, kv * GROUP + tl.minimum(i_head, GROUP - 1), row)
    s_prob, s_mix = s_prob[:, None], s_mix[:, None]
    mean = (total / tl.maximum(seen, 1).to(tl.float32))[None, :]
    sparse = _vector(sparse_ptr + pid_bkv * GROUP * D, offs_hd, mask_hd)
    out = tl.where(seen > 0, s_mix * s_prob * sparse + (1.0 - s_mix) * mean, 0.0)
    tl.store(out_ptr + pid_bkv * GROUP * D + offs_hd, out.to(out_ptr.dtype.element_ty), mask=mask_hd)


class _MixAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sparse, v, gates, past, seen, row):
        B, H, T, D = sparse.shape
        Hkv, block_d = v.shape[1], _dot_block(D, v.dtype)
        n_block = _cdiv(T, MIX["BLOCK_T"])
        sums = _new(v, B * Hkv, n_block, D, dtype=torch.float32)
        _block_sums_kernel[(n_block * B * Hkv,)](v, seen, sums, v_strides=v.stride(), HKV=Hkv, T=T, D=D,
                                                 BLOCK_D=block_d, **MIX)
        before = _running_sums(sums, past.flatten(0, 1))  # what precedes each block, and all
        out = _new(sparse, B, H, T, D)
        _mix_kernel[(n_block * B * H,)](
            sparse, v, before, gates, seen, row, out, v_strides=v.stride(), gates_strides=gates.stride(), H=H,
            GROUP=H // Hkv, T=T, D=D, BLOCK_D=block_d, **MIX)
        ctx.save_for_backward(sparse, v, gates, before, seen, row)
        return out, before[:, -1].view(B, Hkv, D).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dsum):
        sparse, v, gates, before, seen, row = ctx.saved_tensors
        B, H, T, D = sparse.shape
        Hkv, R, n_block = v.shape[1], gates.shape[2], before.shape[1] - 1
        dsparse, dv = _new(sparse, B, H, T, D), _new(v, B, Hkv, T, D)
        w_sums = _new(before, B * Hkv, n_block, D)
        per_query, dgates = _new(before, B, H, T, 2), _new(before, B, H, R, 2)
        after, grid = None, (n_block * B * Hkv,)
        for _ in range(2):
            _mix_bwd_kernel[grid](
                sparse, v, before, gates, seen, row, do, dsparse, per_query, w_sums, after, dv,
                v_strides=v.stride(), gates_strides=gates.stride(), do_strides=do.stride(), H=H,
                GROUP=H // Hkv, T=T, D=D, BLOCK_D=_dot_block(D, v.dtype), **MIX)
            after = _running_sums(w_sums, dsum.flatten(0, 1), reverse=True) if after is None else after
        rows = torch.arange(R, device=row.device, dtype=row.dtype).expand(B, R).contiguous()
        ends = torch.searchsorted(row, rows, right=True)
        _sum_rows_kernel[(_cdiv(R, SUM_ROWS["BLOCK_R"]) * B * H,)](per_query, ends, dgates, H=H, T=T, R=R,
                                                                   **SUM_ROWS)
        dpast = after[:, 0].view(dsum.shape) if ctx.needs_input_grad[3] else None
        return dsparse, dv, dgates.to(gates.dtype), dpast, None, None


def _mix_average_step(sparse, v, gates, past, seen, row, in_place):
    (B, H, _, D), Hkv = sparse.shape, v.shape[1]
    out, totals = _new(sparse, B, H, 1, D), past.float().contiguous()
    sums = totals if in_place else torch.empty_like(totals)
    _mix_step_kernel[(B * Hkv,)](
        sparse, v, totals, gates, seen, row, out, sums, v_strides=v.stride(), gates_strides=gates.stride(),
        HKV=Hkv, GROUP=H // Hkv, D=D, BLOCK_H=_next_power_of_2(H // Hkv), BLOCK_D=_next_power_of_2(D),
        **MIX_STEP)
    return out, past.copy_(sums) if in_place else sums


def mix_average(sparse: Tensor, v: Tensor, gates: Tensor, seen: Tensor, row: Tensor, past: Tensor,
                in_place: bool = False) -> tuple[Tensor, Tensor]:
    """sea.mix_average. Gradients are summed in a fixed order, so `row` must not fall from query to query."""
    _check_tensor("sparse", sparse, 4, "(B, H, T, D)")
    sparse, seen, row = (x.contiguous() for x in (sparse, seen, row))
    with torch.cuda.device_of(v):
        if _is_step(sparse):
            return _mix_average_step(sparse, v, gates, past, seen, row, in_place)
        out, v_sum = _MixAverage.apply(sparse, v, gates, past, seen, row)
    return out, past.copy_(v_sum) if in_place else v_sum
