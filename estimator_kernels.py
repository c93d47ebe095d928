"""SEA's estimator on the GPU: what sea.py does from q, k, v to the scores of each row's cells, and the mix at the end, in Triton.

kernels.py beside this file hands these operations on, so copy the two as a pair. Same names, signatures and results as in
sea.py, whose docstrings say what each computes, and whose glossary says what the letters mean. Layout is (B, H, T, D). Norms,
sums and accumulators are fp32 whatever the input is; inputs are fp16, bf16 or fp32 and may be strided.

One query a sequence, without gradient, is a decoding step: it lasts as long as its launches and their latencies, so most
operations have a kernel of their own for it, one launch each, that leaves tiles, chunks and segments out.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")

# Triton's own take 3 us a call from Python, and a layer makes dozens of calls.


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    """The least that is >= n >= 1."""
    return 1 << (n - 1).bit_length()


def _check_tensor(name: str, x: Tensor, n_dim: int, shape: str) -> None:
    _expect(x.ndim == n_dim, name, f"shape {shape}", tuple(x.shape))
    _expect(x.dtype in (torch.float32, torch.float16, torch.bfloat16), name, "float32, float16 or bfloat16", x.dtype)
    _expect(x.is_cuda or triton.knobs.runtime.interpret, name, "a CUDA tensor", f"one on {x.device}")


def _is_step(x: Tensor) -> bool:
    """A decoding step: one row, and no gradient wanted."""
    return x.shape[2] == 1 and not torch.is_grad_enabled()

def _power_of_2(n: int, dtype: torch.dtype = torch.float32) -> int:
    """Block size for n numbers in a tl.dot. In half precision, for a tile whose rows are n long, at least 128 bytes: from
    narrower ones Triton 3.6 and 3.7 read beyond the tile on Hopper (github.com/triton-lang/triton/issues/11366)."""
    return max(16 if dtype == torch.float32 else 64, _next_power_of_2(n))


def _dot_type(dtype: torch.dtype) -> dict:
    """What sums of features are multiplied in: bf16 as the input is; fp32 for fp32, and for fp16, whose range sums leave."""
    dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    return dict(DOT=dot, PRECISION="ieee" if dtype == torch.float32 else "tf32")


@triton.jit
def _tile(ptr, row, col, row_stride, col_stride, mask):
    """Rows (int64) and columns of one head, 0 where masked: (rows, columns)."""
    return tl.load(ptr + row[:, None] * row_stride + col[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def _vector(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


# -- running sums ------------------------------------------------------------------------------------------------------


# out[i] = first + x[0] + ... + x[i-1] for i = 0 ... n; REVERSE: first + x[i] + ... + x[n-1].
# One program: BLOCK_E columns of one group, BLOCK_N rows at a time, in order; grid (cdiv(E, BLOCK_E), N).
# x (N, n, E), first (N, E) or None for 0 -> out (N, n + 1, E), fp32, contiguous. Reads and writes once, where eager pads,
# sums, concatenates and copies. Reference: torch.cumsum.
@triton.jit(do_not_specialize=["n"])
def _running_sums_kernel(x_ptr, first_ptr, out_ptr, n, E, REVERSE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    offs_n, e = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    x_ptr += group * n * E + e
    out_ptr += group * (n + 1) * E + e
    if first_ptr is None:
        total = tl.zeros((BLOCK_E,), tl.float32)
    else:
        total = tl.load(first_ptr + group * E + e, mask=e < E, other=0.0)
    if REVERSE:
        tl.store(out_ptr + n.to(tl.int64) * E, total, mask=e < E)
    else:
        tl.store(out_ptr, total, mask=e < E)
    for start in range(0, n, BLOCK_N):
        i = start + offs_n
        if REVERSE:
            at, at_out = n - 1 - i, n - 1 - i
        else:
            at, at_out = i, i + 1
        mask = (i < n)[:, None] & (e < E)[None, :]
        x = tl.load(x_ptr[None, :] + at[:, None].to(tl.int64) * E, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_E)
        tl.store(out_ptr[None, :] + at_out[:, None].to(tl.int64) * E, tl.cumsum(x, axis=0) + total[None, :], mask=mask)
        total += tl.sum(x, axis=0)


def _running_sums(x: Tensor, first: Tensor | None, reverse: bool = False) -> Tensor:
    """x (N, n, ...), first (N, ...) -> (N, n + 1, ...), fp32: sums of what comes before each place, or from it on."""
    x, (N, n), E = x.contiguous(), x.shape[:2], x[0, 0].numel()
    first = None if first is None else first.float().contiguous()
    out = torch.empty(N, n + 1, *x.shape[2:], dtype=torch.float32, device=x.device)
    block = 64 if E > 1024 else 128  # smaller where the programs of the columns fill the GPU
    _running_sums_kernel[(_cdiv(E, 16), N)](x, first, out, n, E, REVERSE=reverse, BLOCK_N=block, BLOCK_E=16, num_warps=4)
    return out


# -- estimator: causal linear attention --------------------------------------------------------------------------------
#
# c_i = sum_j (phi(q_i) . phi(k_j)) vcat_j / den_i over the keys j < (i+1) * stride, vcat = [pos ; v]. Rows and keys are cut
# into chunks, chunks into segments. A program walks the chunks of one segment and holds the sum of all earlier phi(k)
# [vcat ; 1]^T (m x (2D+1)); keys of the same chunk enter through a product of row and key features. Backward, with
# g = dc / den and g_den = -(g . c):
#
#     dphi(q_i)  = sum_j (g_i . vcat_j + g_den_i) phi(k_j)     the same walk, with the same sums
#     dphi(k_j)  = sum_i (g_i . vcat_j + g_den_i) phi(q_i)     the walk from the end, with sums of phi(q) [g ; g_den]^T
#     dvcat_j    = sum_i (phi(q_i) . phi(k_j)) g_i
#
# so nothing is kept for it but the sums before each segment, den and c.


def _projection(w_ptr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, dtype: tl.constexpr):
    """W as a sum of one or two (BLOCK_D, BLOCK_F) in the dtype of x: two half-precision products are as good as one in fp32."""
    d, f = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_F)[None, :]
    w_all = tl.load(w_ptr + d * M + f, mask=(d < D) & (f < M), other=0.0)
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
def _keys(k_ptr, v_ptr, pos_ptr, there_ptr, k_strides, v_strides, pos_strides, w, j, in_chunk, N, k_scale,
          D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr):
    """phi(k) fp32, v and pos of the keys j (int64) of one head, 0 where there is no key."""
    offs_d = tl.arange(0, BLOCK_D)
    there = in_chunk & (j >= 0) & (j < N)
    if there_ptr is not None:
        there &= tl.load(there_ptr + j, mask=there, other=0) != 0
    at = there[:, None] & (offs_d < D)[None, :]
    k = _tile(k_ptr, j, offs_d, k_strides[2], k_strides[3], at)
    v = _tile(v_ptr, j, offs_d, v_strides[2], v_strides[3], at).to(DOT)
    pos = _tile(pos_ptr, j, offs_d, pos_strides[1], 1, at).to(DOT)
    f = tl.where(there[:, None], _features(k, w, k_scale, M, BLOCK_F), 0.0)
    return f, v, pos


@triton.jit
def _load_sums(sums_ptr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    """One (m, 2D+1) matrix of sums as its parts: of pos, of v, (BLOCK_F, BLOCK_D) each, and of ones, (BLOCK_F,)."""
    offs_f, offs_d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    at, sums_ptr = (offs_f < M)[:, None] & (offs_d < D)[None, :], sums_ptr + offs_f * (2 * D + 1)
    of_pos = tl.load(sums_ptr[:, None] + offs_d[None, :], mask=at, other=0.0)
    of_v = tl.load(sums_ptr[:, None] + D + offs_d[None, :], mask=at, other=0.0)
    return of_pos, of_v, tl.load(sums_ptr + 2 * D, mask=offs_f < M, other=0.0)


@triton.jit
def _store_sums(sums_ptr, of_pos, of_v, of_ones, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    offs_f, offs_d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    at, sums_ptr = (offs_f < M)[:, None] & (offs_d < D)[None, :], sums_ptr + offs_f * (2 * D + 1)
    tl.store(sums_ptr[:, None] + offs_d[None, :], of_pos, mask=at)
    tl.store(sums_ptr[:, None] + D + offs_d[None, :], of_v, mask=at)
    tl.store(sums_ptr + 2 * D, of_ones, mask=offs_f < M)


# sums[segment] = sum over its keys of phi(k)^T [pos ; v ; 1].
# One program: one segment (n_chunk chunks of CHUNK keys) of one key/value head; grid (n_segment, B * Hkv).
#   k, v (B, Hkv, N, D), any strides; pos (1 or B, N, D); w (D, m), any dtype; there (B, N) int8 or None
#   sums (B * Hkv, n_segment, m, 2D+1) fp32, contiguous
# Key j stands at place j + lead. fp32: features and sums, which stay in registers. Reads each key once.
# Reference: sea.causal_context.
@triton.jit(do_not_specialize=["n_chunk"])
def _context_sums_kernel(k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, sums_ptr, k_strides, v_strides, pos_strides, HKV, N, lead,
                         n_chunk, k_scale, D: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // HKV, pid_bh % HKV
    offs_c = tl.arange(0, BLOCK_C)
    k_ptr += b * k_strides[0] + h * k_strides[1]
    v_ptr += b * v_strides[0] + h * v_strides[1]
    pos_ptr += b * pos_strides[0]
    if there_ptr is not None:
        there_ptr += b * N
    w = _projection(w_ptr, D, M, BLOCK_D, BLOCK_F, k_ptr.dtype.element_ty)
    sum_pos, sum_v = tl.zeros((BLOCK_F, BLOCK_D), tl.float32), tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, n_chunk):
        j = ((segment * n_chunk + i) * CHUNK + offs_c - lead).to(tl.int64)
        f, v, pos = _keys(k_ptr, v_ptr, pos_ptr, there_ptr, k_strides, v_strides, pos_strides, w, j, offs_c < CHUNK,
                          N, k_scale, D, M, BLOCK_D, BLOCK_F, DOT)
        f_dot = tl.trans(f.to(DOT))
        sum_pos += tl.dot(f_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(f_dot, v, input_precision=PRECISION)
        norm += tl.sum(f, axis=0)
    _store_sums(sums_ptr + (pid_bh * n_segment + segment) * M * (2 * D + 1), sum_pos, sum_v, norm, D, M, BLOCK_D, BLOCK_F)


# c_i = phi(q_i) sums / den_i.
# One program: one segment of one query head, walking its chunks of CHUNK // STRIDE rows; grid (n_segment, B * H).
#   q (B, H, R, D), any strides; k, v, pos, w, there as above; sums (B * Hkv, n_segment + 1, m, 2D+1) fp32: what precedes each
#   context (B, H, R, 2D), den (B, H, R) fp32 (0 as 1), contiguous
# fp32: features, sums, quotient. Reads q, k, v, pos once, writes 2D numbers a row. Reference: sea.causal_context.
@triton.jit(do_not_specialize=["n_chunk"])
def _context_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, sums_ptr, context_ptr, den_ptr, q_strides, k_strides,
                    v_strides, pos_strides, H, GROUP, R, N, lead, n_chunk, q_scale, k_scale, D: tl.constexpr,
                    M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h, kv = pid_bh // H, pid_bh % H, pid_bh % H // GROUP
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    pos_ptr += b * pos_strides[0]
    if there_ptr is not None:
        there_ptr += b * N
    w = _projection(w_ptr, D, M, BLOCK_D, BLOCK_F, k_ptr.dtype.element_ty)
    sums_ptr += ((b * (H // GROUP) + kv) * (n_segment + 1) + segment) * M * (2 * D + 1)
    sum_pos, sum_v, norm = _load_sums(sums_ptr, D, M, BLOCK_D, BLOCK_F)
    earlier = offs_c[None, :] < (offs_r[:, None] + 1) * STRIDE  # (BLOCK_R, BLOCK_C)
    for i in range(0, n_chunk):
        chunk = segment * n_chunk + i
        j = (chunk * CHUNK + offs_c - lead).to(tl.int64)
        f_k, v, pos = _keys(k_ptr, v_ptr, pos_ptr, there_ptr, k_strides, v_strides, pos_strides, w, j,
                            offs_c < CHUNK, N, k_scale, D, M, BLOCK_D, BLOCK_F, DOT)
        row = (chunk * (CHUNK // STRIDE) + offs_r).to(tl.int64)
        in_row = (row < R) & (offs_r < CHUNK // STRIDE)
        at = in_row[:, None] & (offs_d < D)[None, :]
        q = _tile(q_ptr, row, offs_d, q_strides[2], q_strides[3], at)  # (BLOCK_R, BLOCK_D)
        f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
        q_dot, k_dot = f_q.to(DOT), f_k.to(DOT)
        same = tl.where(earlier, tl.dot(q_dot, tl.trans(k_dot), input_precision=PRECISION), 0.0)  # (BLOCK_R, BLOCK_C)
        den = tl.sum(f_q * norm[None, :], axis=1) + tl.sum(same, axis=1)
        den = tl.where(den == 0.0, 1.0, den)  # a row that sees nothing gives 0
        same = same.to(DOT)
        c_pos = tl.dot(q_dot, sum_pos.to(DOT), input_precision=PRECISION) + tl.dot(same, pos, input_precision=PRECISION)
        c_v = tl.dot(q_dot, sum_v.to(DOT), input_precision=PRECISION) + tl.dot(same, v, input_precision=PRECISION)
        row += pid_bh * R
        tl.store(context_ptr + row[:, None] * 2 * D + offs_d[None, :], c_pos / den[:, None], mask=at)
        tl.store(context_ptr + row[:, None] * 2 * D + D + offs_d[None, :], c_v / den[:, None], mask=at)
        tl.store(den_ptr + row, den, mask=in_row)

        k_dot = tl.trans(k_dot)
        sum_pos += tl.dot(k_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(k_dot, v, input_precision=PRECISION)
        norm += tl.sum(f_k, axis=0)


# dq, and the sums that the keys' gradients need.
# One program: the segment and walk of _context_kernel.
#   context, dcontext (B, H, R, 2D), den (B, H, R): contiguous
#   dq (B, H, R, D), g_den (B, H, R) fp32, contiguous; dsums (B * H, n_segment, m, 2D+1) fp32: the segment's sum of
#   phi(q)^T [g ; g_den]
# fp32: features, sums, g. Reference: autograd through sea.causal_context.
@triton.jit(do_not_specialize=["n_chunk"])
def _context_dq_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, sums_ptr, context_ptr, dcontext_ptr, den_ptr, dq_ptr,
                       g_den_ptr, dsums_ptr, q_strides, k_strides, v_strides, pos_strides, H, GROUP, R, N, lead, n_chunk,
                       q_scale, k_scale, D: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
                       BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                       DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h, kv = pid_bh // H, pid_bh % H, pid_bh % H // GROUP
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    pos_ptr += b * pos_strides[0]
    if there_ptr is not None:
        there_ptr += b * N
    w = _projection(w_ptr, D, M, BLOCK_D, BLOCK_F, k_ptr.dtype.element_ty)
    sums_ptr += ((b * (H // GROUP) + kv) * (n_segment + 1) + segment) * M * (2 * D + 1)
    sum_pos, sum_v, norm = _load_sums(sums_ptr, D, M, BLOCK_D, BLOCK_F)
    dsum_pos, dsum_v = tl.zeros((BLOCK_F, BLOCK_D), tl.float32), tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    dnorm = tl.zeros((BLOCK_F,), tl.float32)
    earlier = offs_c[None, :] < (offs_r[:, None] + 1) * STRIDE  # (BLOCK_R, BLOCK_C)
    for i in range(0, n_chunk):
        chunk = segment * n_chunk + i
        j = (chunk * CHUNK + offs_c - lead).to(tl.int64)
        f_k, v, pos = _keys(k_ptr, v_ptr, pos_ptr, there_ptr, k_strides, v_strides, pos_strides, w, j,
                            offs_c < CHUNK, N, k_scale, D, M, BLOCK_D, BLOCK_F, DOT)
        row = (chunk * (CHUNK // STRIDE) + offs_r).to(tl.int64)
        in_row = (row < R) & (offs_r < CHUNK // STRIDE)
        at = in_row[:, None] & (offs_d < D)[None, :]
        q = _tile(q_ptr, row, offs_d, q_strides[2], q_strides[3], at)  # (BLOCK_R, BLOCK_D)
        f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
        row += pid_bh * R
        # -- g and g_den
        den = tl.load(den_ptr + row, mask=in_row, other=1.0)[:, None]
        g_pos = _tile(dcontext_ptr, row, offs_d, 2 * D, 1, at).to(tl.float32) / den  # (BLOCK_R, BLOCK_D)
        g_v = _tile(dcontext_ptr + D, row, offs_d, 2 * D, 1, at).to(tl.float32) / den
        g_den = -tl.sum(g_pos * _tile(context_ptr, row, offs_d, 2 * D, 1, at).to(tl.float32)
                        + g_v * _tile(context_ptr + D, row, offs_d, 2 * D, 1, at).to(tl.float32), axis=1)
        tl.store(g_den_ptr + row, g_den, mask=in_row)
        g_pos, g_v = g_pos.to(DOT), g_v.to(DOT)
        # -- dphi(q), (BLOCK_R, BLOCK_F)
        df = tl.dot(g_pos, tl.trans(sum_pos.to(DOT)), input_precision=PRECISION) + g_den[:, None] * norm[None, :]
        df += tl.dot(g_v, tl.trans(sum_v.to(DOT)), input_precision=PRECISION)
        same = tl.dot(g_pos, tl.trans(pos), input_precision=PRECISION) + g_den[:, None]  # (BLOCK_R, BLOCK_C)
        same = tl.where(earlier, same + tl.dot(g_v, tl.trans(v), input_precision=PRECISION), 0.0)
        k_dot = f_k.to(DOT)
        df += tl.dot(same.to(DOT), k_dot, input_precision=PRECISION)
        df = tl.where(f_q > 1e-3, df * q_scale, 0.0)  # through relu
        tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], tl.dot(df.to(DOT), tl.trans(w[0]).to(DOT), input_precision=PRECISION), mask=at)

        k_dot, q_dot = tl.trans(k_dot), tl.trans(f_q.to(DOT))
        sum_pos += tl.dot(k_dot, pos, input_precision=PRECISION)
        sum_v += tl.dot(k_dot, v, input_precision=PRECISION)
        norm += tl.sum(f_k, axis=0)
        dsum_pos += tl.dot(q_dot, g_pos, input_precision=PRECISION)
        dsum_v += tl.dot(q_dot, g_v, input_precision=PRECISION)
        dnorm += tl.sum(f_q * g_den[:, None], axis=0)
    _store_sums(dsums_ptr + (pid_bh * n_segment + segment) * M * (2 * D + 1), dsum_pos, dsum_v, dnorm, D, M, BLOCK_D, BLOCK_F)


# dk, dv, dpos.
# One program: one segment of one key/value head, walking its chunks from the last; grid (n_segment, B * Hkv).
#   dsums (B * Hkv, n_segment + 1, m, 2D+1) fp32: sum of phi(q)^T [g ; g_den] from each segment on
#   dk, dv (B, Hkv, N, D), dpos the same, fp32: contiguous
# fp32: features, sums, g. In a fixed order. Reference: autograd through sea.causal_context.
@triton.jit(do_not_specialize=["n_chunk"])
def _context_dkdv_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, dsums_ptr, dcontext_ptr, den_ptr, g_den_ptr, dk_ptr,
                         dv_ptr, dpos_ptr, q_strides, k_strides, v_strides, pos_strides, H, GROUP, R, N, lead, n_chunk, q_scale,
                         k_scale, D: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                         DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh, HKV = tl.program_id(1).to(tl.int64), H // GROUP
    b, kv = pid_bh // HKV, pid_bh % HKV
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += b * k_strides[0] + kv * k_strides[1]
    v_ptr += b * v_strides[0] + kv * v_strides[1]
    pos_ptr += b * pos_strides[0]
    if there_ptr is not None:
        there_ptr += b * N
    w = _projection(w_ptr, D, M, BLOCK_D, BLOCK_F, k_ptr.dtype.element_ty)
    dsums_ptr += (pid_bh * (n_segment + 1) + segment + 1) * M * (2 * D + 1)
    dsum_pos, dsum_v, dnorm = _load_sums(dsums_ptr, D, M, BLOCK_D, BLOCK_F)
    earlier = offs_c[:, None] < (offs_r[None, :] + 1) * STRIDE  # (BLOCK_C, BLOCK_R)
    for i in range(0, n_chunk):
        chunk = segment * n_chunk + n_chunk - 1 - i
        j = (chunk * CHUNK + offs_c - lead).to(tl.int64)
        f_k, v, pos = _keys(k_ptr, v_ptr, pos_ptr, there_ptr, k_strides, v_strides, pos_strides, w, j,
                            offs_c < CHUNK, N, k_scale, D, M, BLOCK_D, BLOCK_F, DOT)
        k_dot = f_k.to(DOT)
        # -- rows of later chunks, (BLOCK_C, BLOCK_F) and (BLOCK_C, BLOCK_D)
        later = dsum_pos.to(DOT)
        df = tl.dot(pos, tl.trans(later), input_precision=PRECISION) + dnorm[None, :]
        dpos = tl.dot(k_dot, later, input_precision=PRECISION)
        later = dsum_v.to(DOT)
        df += tl.dot(v, tl.trans(later), input_precision=PRECISION)
        dv = tl.dot(k_dot, later, input_precision=PRECISION)
        # -- rows of this chunk
        row = (chunk * (CHUNK // STRIDE) + offs_r).to(tl.int64)
        in_row = (row < R) & (offs_r < CHUNK // STRIDE)
        at = in_row[:, None] & (offs_d < D)[None, :]
        for n in range(0, GROUP):
            h = kv * GROUP + n
            q = _tile(q_ptr + b * q_strides[0] + h * q_strides[1], row, offs_d, q_strides[2], q_strides[3], at)
            f_q = _features(q, w, q_scale, M, BLOCK_F)  # (BLOCK_R, BLOCK_F)
            of_row = (b * H + h) * R + row
            den = tl.load(den_ptr + of_row, mask=in_row, other=1.0)[:, None]
            g_den = tl.load(g_den_ptr + of_row, mask=in_row, other=0.0)
            g_pos = (_tile(dcontext_ptr, of_row, offs_d, 2 * D, 1, at).to(tl.float32) / den).to(DOT)  # (BLOCK_R, BLOCK_D)
            g_v = (_tile(dcontext_ptr + D, of_row, offs_d, 2 * D, 1, at).to(tl.float32) / den).to(DOT)
            q_dot = f_q.to(DOT)
            same = tl.dot(pos, tl.trans(g_pos), input_precision=PRECISION) + g_den[None, :]  # (BLOCK_C, BLOCK_R)
            same = tl.where(earlier, same + tl.dot(v, tl.trans(g_v), input_precision=PRECISION), 0.0)
            df += tl.dot(same.to(DOT), q_dot, input_precision=PRECISION)
            same = tl.where(earlier, tl.dot(k_dot, tl.trans(q_dot), input_precision=PRECISION), 0.0).to(DOT)
            dpos += tl.dot(same, g_pos, input_precision=PRECISION)
            dv += tl.dot(same, g_v, input_precision=PRECISION)
            q_dot = tl.trans(q_dot)
            dsum_pos += tl.dot(q_dot, g_pos, input_precision=PRECISION)
            dsum_v += tl.dot(q_dot, g_v, input_precision=PRECISION)
            dnorm += tl.sum(f_q * g_den[:, None], axis=0)
        df = tl.where(f_k > 1e-3, df * k_scale, 0.0)  # through relu; a key that is not there has no features
        dk = tl.dot(df.to(DOT), tl.trans(w[0]).to(DOT), input_precision=PRECISION)
        at = ((offs_c < CHUNK) & (j >= 0) & (j < N))[:, None] & (offs_d < D)[None, :]
        out = (pid_bh * N + j)[:, None] * D + offs_d[None, :]
        tl.store(dk_ptr + out, dk, mask=at)
        tl.store(dv_ptr + out, dv, mask=at)
        tl.store(dpos_ptr + out, dpos, mask=at)


# One token a sequence: sums = past + phi(k)^T [pos ; v ; 1], c = phi(q) sums / den.
# One program: the half of pos or that of v, of one key/value head and the query heads that share it; grid (2, B * Hkv).
#   q (B, H, 1, D), k, v (B, Hkv, 1, D), any strides; pos (1 or B, 1, D); w (D, m), any dtype; there (B,) int8 or None
#   past (B, Hkv, m, 2D+1) fp32, or None for 0; sums the same; context (B, H, 1, 2D): contiguous
# fp32: everything, no dots. Reads and writes the sums once. Reference: sea.causal_context.
@triton.jit
def _context_step_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, past_ptr, sums_ptr, context_ptr, q_strides, k_strides,
                         v_strides, pos_strides, HKV, q_scale, k_scale, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    half, pid_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, kv = pid_bh // HKV, pid_bh % HKV
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    in_d, in_f = d < D, f < M
    at = in_f[:, None] & in_d[None, :]  # (BLOCK_F, BLOCK_D)
    w = tl.load(w_ptr + d[None, :] * M + f[:, None], mask=at, other=0.0).to(tl.float32)
    k = _vector(k_ptr + b * k_strides[0] + kv * k_strides[1], d * k_strides[3], in_d)
    f_k = tl.where(in_f, tl.maximum(tl.sum(w * k[None, :], axis=1) * k_scale, 0.0) + 1e-3, 0.0)
    if half == 0:
        x = _vector(pos_ptr + b * pos_strides[0], d, in_d)
    else:
        x = _vector(v_ptr + b * v_strides[0] + kv * v_strides[1], d * v_strides[3], in_d)
    if there_ptr is not None:
        f_k = tl.where(tl.load(there_ptr + b) != 0, f_k, 0.0)
    sums, norm = f_k[:, None] * x[None, :], f_k
    # -- the state before and after
    first = pid_bh * M * (2 * D + 1) + f * (2 * D + 1)
    of_half = first[:, None] + half * D + d[None, :]
    if past_ptr is not None:
        sums += tl.load(past_ptr + of_half, mask=at, other=0.0)
        norm += tl.load(past_ptr + first + 2 * D, mask=in_f, other=0.0)
    tl.store(sums_ptr + of_half, sums, mask=at)
    if half == 0:
        tl.store(sums_ptr + first + 2 * D, norm, mask=in_f)
    # -- its rows
    for i in range(0, GROUP):
        h = kv * GROUP + i
        q = _vector(q_ptr + b * q_strides[0] + h * q_strides[1], d * q_strides[3], in_d)
        f_q = tl.where(in_f, tl.maximum(tl.sum(w * q[None, :], axis=1) * q_scale, 0.0) + 1e-3, 0.0)
        den = tl.sum(f_q * norm, axis=0)
        c = tl.sum(f_q[:, None] * sums, axis=0) / tl.where(den == 0.0, 1.0, den)
        c_ptr = context_ptr + ((b * HKV * GROUP + h) * 2 + half) * D + d
        tl.store(c_ptr, c.to(context_ptr.dtype.element_ty), mask=in_d)


def _causal_context_step(q, k, v, position, past, projection, there, softmax_scale):
    (B, H, _, D), Hkv, M = q.shape, k.shape[1], projection.shape[1]
    position, past = position.contiguous(), None if past is None else past.float().contiguous()
    block_d, block_f = _next_power_of_2(D), _next_power_of_2(M)
    sums = torch.empty(B, Hkv, M, 2 * D + 1, dtype=torch.float32, device=q.device)
    context = torch.empty(B, H, 1, 2 * D, dtype=q.dtype, device=q.device)
    _context_step_kernel[(2, B * Hkv)](
        q, k, v, position, projection.contiguous(), None if there is None else there.contiguous().view(torch.int8), past, sums,
        context, q.stride(), k.stride(), v.stride(), (position.stride(0) * (len(position) > 1), position.stride(1)), Hkv,
        softmax_scale * D**0.25, D**-0.25, GROUP=H // Hkv, D=D, M=M, BLOCK_D=block_d, BLOCK_F=block_f,
        num_warps=4 if block_d * block_f <= 4096 else 8)
    return context, sums


# Keys a chunk, and programs to fill the GPU with; warps forward and backward.
CONTEXT = dict(keys=64, programs=528, warps=4, warps_backward=8)


def _context_launch(q, k, v, position, projection, there, softmax_scale, stride, lead, backward=False):
    """What all four kernels share: n_segment, the leading arguments, and the keywords of keys, and of keys and rows.

    Backward, chunks are twice as long (where bf16 tiles are small enough), the segments the same.
    """
    (B, H, R, D), (Hkv, N), M = q.shape, k.shape[1:3], projection.shape[1]
    keys = CONTEXT["keys"] // (1 if q.dtype != torch.float32 and D <= 64 else 2)
    rows, longer = max(1, keys // stride), 2 if q.dtype == torch.bfloat16 and D <= 64 else 1
    n_chunks = _cdiv(max(_cdiv(R, rows), _cdiv(N + lead, rows * stride)), longer)  # of the longer ones
    n_chunk = max(1, n_chunks * B * Hkv // CONTEXT["programs"])
    n_segment = _cdiv(n_chunks, n_chunk)
    rows, n_chunk = (rows * longer, n_chunk) if backward else (rows, n_chunk * longer)
    there = None if there is None else there.contiguous().view(torch.int8)
    inputs = (k, v, position, projection.contiguous(), there)
    of_keys = dict(k_strides=k.stride(), v_strides=v.stride(), pos_strides=(position.stride(0) * (len(position) > 1), position.stride(1)),
                   N=N, lead=lead, n_chunk=n_chunk, k_scale=D**-0.25, D=D, M=M, CHUNK=rows * stride,
                   BLOCK_C=_power_of_2(rows * stride), BLOCK_D=_power_of_2(D, q.dtype), BLOCK_F=_power_of_2(M, q.dtype), num_stages=1,
                   num_warps=CONTEXT["warps_backward" if backward else "warps"], **_dot_type(q.dtype))
    of_all = dict(of_keys, q_strides=q.stride(), H=H, GROUP=H // Hkv, R=R, q_scale=softmax_scale * D**0.25, STRIDE=stride,
                  BLOCK_R=_power_of_2(rows))
    return n_segment, inputs, of_keys, of_all


class _CausalContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, position, past, projection, *constants):
        (B, H, R, D), Hkv, M = q.shape, k.shape[1], projection.shape[1]
        position = position.contiguous()
        n_segment, inputs, of_keys, of_all = _context_launch(q, k, v, position, projection, *constants)
        sums = torch.empty(B * Hkv, n_segment, M, 2 * D + 1, dtype=torch.float32, device=q.device)
        _context_sums_kernel[(n_segment, B * Hkv)](*inputs, sums, HKV=Hkv, **of_keys)
        sums = _running_sums(sums, None if past is None else past.flatten(0, 1))  # what precedes each segment, and all
        context = torch.empty(B, H, R, 2 * D, dtype=q.dtype, device=q.device)
        den = torch.empty(B, H, R, dtype=torch.float32, device=q.device)
        _context_kernel[(n_segment, B * H)](q, *inputs, sums, context, den, **of_all)
        ctx.save_for_backward(q, k, v, position, projection, sums, context, den)
        ctx.constants = constants
        return context, sums[:, -1].view(B, Hkv, M, 2 * D + 1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dcontext, dsums_out):
        q, k, v, position, projection, sums, context, den = ctx.saved_tensors
        (B, H, R, D), (Hkv, N), M = q.shape, k.shape[1:3], projection.shape[1]
        n_segment, inputs, _, of_all = _context_launch(q, k, v, position, projection, *ctx.constants, backward=True)
        dcontext = dcontext.contiguous()
        dq, g_den = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(den)
        dsums = torch.empty(B * H, n_segment, M, 2 * D + 1, dtype=torch.float32, device=q.device)
        _context_dq_kernel[(n_segment, B * H)](q, *inputs, sums, context, dcontext, den, dq, g_den, dsums, **of_all)
        if H != Hkv:
            dsums = dsums.view(B * Hkv, H // Hkv, n_segment, M, 2 * D + 1).sum(1)
        dsums = _running_sums(dsums, dsums_out.flatten(0, 1), reverse=True)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        dpos = torch.empty(B, Hkv, N, D, dtype=torch.float32, device=q.device)
        _context_dkdv_kernel[(n_segment, B * Hkv)](q, *inputs, dsums, dcontext, den, g_den, dk, dv, dpos, **of_all)
        dpos = dpos.sum((0, 1))[None] if len(position) == 1 else dpos.sum(1)
        dpast = dsums[:, 0].view(dsums_out.shape) if ctx.needs_input_grad[4] else None
        return dq, dk, dv, dpos.to(position.dtype), dpast, *[None] * 5


def causal_context(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, projection: Tensor, softmax_scale: float, *,
                   stride: int = 1, lead: int = 0, there: Tensor | None = None,
                   past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sea.causal_context, in the dtype of q. No gradient reaches the projection, which is drawn and not trained."""
    _expect(position is not None, "position", "a table, the Performer has no kernel", None)
    _expect(stride <= 32, "stride", "at most 32, a row and its keys have to fit into a chunk", stride)
    most = 128 if q.dtype == torch.bfloat16 else 64  # for their product to fit into shared memory
    size = max(64, _next_power_of_2(projection.shape[1])) * max(64, _next_power_of_2(q.shape[-1]))
    _expect(size <= most * most and projection.shape[1] <= 128, "projection",
            f"at most {most} features of head size <= {most} in {q.dtype}", tuple(projection.shape))
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 4, "(B, heads, tokens, D)")
    with torch.cuda.device_of(q):
        if _is_step(q) and k.shape[2] == 1 and lead < stride:  # the row sees its own key
            return _causal_context_step(q, k, v, position, past, projection, there, float(softmax_scale))
        return _CausalContext.apply(q, k, v, position, past, projection, there, float(softmax_scale), stride, lead)


# -- estimator: from the context to cells ------------------------------------------------------------------------------


@triton.jit
def _standardized(x, there, N: tl.constexpr):
    """x with mean 0 and variance 1 over the second axis, of which N columns are `there`, and 1 / deviation: fp32."""
    x = tl.where(there[None, :], x - (tl.sum(tl.where(there[None, :], x, 0.0), axis=1) / N)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + 1e-5)
    return x * rstd[:, None], rstd


@triton.jit
def _normed(x, gain, bias, there, N: tl.constexpr):
    """LayerNorm over the second axis, of which N columns are `there`: (rows, BLOCK), fp32."""
    x, _ = _standardized(x, there, N)
    return x * gain[None, :] + bias[None, :]


@triton.jit
def _through_norm(dy, x, rstd, gain, there, N: tl.constexpr):
    """Gradient of a LayerNorm's input from that of its output, x being standardized."""
    dx = tl.where(there[None, :], dy * gain[None, :], 0.0)
    return tl.where(there[None, :], rstd[:, None] * (dx - (tl.sum(dx, axis=1) / N)[:, None]
                                                     - x * (tl.sum(dx * x, axis=1) / N)[:, None]), 0.0)


@triton.jit
def _first_layer(c_ptr, v_ptr, w1_ptr, b1_ptr, row, in_row, v_strides, D: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr, PRECISION: tl.constexpr):
    """[c ; v] W1 + b1: W1^T (3D, 2D) in three parts of D rows, for the two halves of c and for v. (BLOCK_R, BLOCK_Z) fp32."""
    offs_d, offs_z = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z)
    dtype = c_ptr.dtype.element_ty
    at = in_row[:, None] & (offs_d < D)[None, :]
    z = tl.zeros((BLOCK_R, BLOCK_Z), tl.float32)
    for i in tl.static_range(3):
        if i < 2:
            x = _tile(c_ptr + i * D, row, offs_d, 2 * D, 1, at)  # (BLOCK_R, BLOCK_D)
        else:
            x = _tile(v_ptr, row, offs_d, v_strides[2], v_strides[3], at)
        w1 = _tile(w1_ptr + i * D, offs_d, offs_z, 1, 3 * D, (offs_d < D)[:, None] & (offs_z < 2 * D)[None, :])
        z += tl.dot(x, w1.to(dtype), input_precision=PRECISION)  # (BLOCK_R, BLOCK_D) @ (BLOCK_D, BLOCK_Z)
    return z + _vector(b1_ptr, offs_z, offs_z < 2 * D)[None, :]


# z = GELU(LayerNorm([c ; v] W1 + b1)); gates = z Wg + bg; image = LayerNorm(z W2 + b2) per channel.
# One program: BLOCK_R rows of one head; grid (cdiv(R, BLOCK_R), B * H).
#   context (B, H, R, 2D) contiguous, v (B, Hkv, R, D) any strides; w1 (2D, 3D), w2 (2P, 2D), wg (2, 2D) and vectors b bias
#   of a linear layer, g and e gain and bias of a norm, any dtype
#   image (B, 2H, R, P), gates (B, H, R, 2) fp32, contiguous
# fp32: norms and GELU. Reads 3D numbers a row and writes 2P; z never leaves the registers. Reference: sea.encode_rows.
@triton.jit
def _encode_kernel(context_ptr, v_ptr, w1_ptr, b1_ptr, g1_ptr, e1_ptr, w2_ptr, b2_ptr, g2_ptr, e2_ptr, wg_ptr, bg_ptr,
                   image_ptr, gates_ptr, v_strides, H, GROUP, R, D: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_z, offs_p = tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_P)
    in_row, in_z, in_p = row < R, offs_z < 2 * D, offs_p < P
    dtype = context_ptr.dtype.element_ty
    z = _first_layer(context_ptr + pid_bh * R * 2 * D, v_ptr + b * v_strides[0] + (h // GROUP) * v_strides[1], w1_ptr, b1_ptr,
                     row, in_row, v_strides, D, BLOCK_R, BLOCK_D, BLOCK_Z, PRECISION)
    z = _normed(z, _vector(g1_ptr, offs_z, in_z), _vector(e1_ptr, offs_z, in_z), in_z, 2 * D)
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # GELU
    # -- gates
    for i in tl.static_range(2):
        gate = tl.sum(z * _vector(wg_ptr + i * 2 * D, offs_z, in_z)[None, :], axis=1) + tl.load(bg_ptr + i).to(tl.float32)
        tl.store(gates_ptr + (pid_bh * R + row) * 2 + i, gate, mask=in_row)
    # -- row decoder and the norm before the CNN, a channel at a time
    for i in tl.static_range(2):
        w2 = _tile(w2_ptr + i * P * 2 * D, offs_z, offs_p, 1, 2 * D, in_z[:, None] & in_p[None, :])  # (BLOCK_Z, BLOCK_P)
        x = tl.dot(z.to(dtype), w2.to(dtype), input_precision=PRECISION) + _vector(b2_ptr + i * P, offs_p, in_p)[None, :]
        x = _normed(x, _vector(g2_ptr, offs_p, in_p), _vector(e2_ptr, offs_p, in_p), in_p, P)
        image = image_ptr + (b * 2 * H + 2 * h + i) * R * P
        tl.store(image + row[:, None] * P + offs_p[None, :], x, mask=in_row[:, None] & in_p[None, :])


# The gradients of all that: of the inputs, and what those of the weights are products and sums of.
# One program: the rows of _encode_kernel, whose z is computed again.
#   dimage, dgates: as image and gates, or None for 0
#   dcontext (B, H, R, 2D), dv (B, H, R, D) per query head; z, dz1 (B, H, R, 2D), dx (B, H, R, 2P): GELU's output and the
#   gradients before the two norms; sums (programs, 6D + 4P) fp32: each program's share of the gradients of b1, g1, e1 (2D),
#   b2 (2P), g2, e2 (P)
# fp32: norms, GELU and sums. Reference: autograd through sea.encode_rows.
@triton.jit
def _encode_bwd_kernel(context_ptr, v_ptr, w1_ptr, b1_ptr, g1_ptr, e1_ptr, w2_ptr, b2_ptr, g2_ptr, wg_ptr, dimage_ptr,
                       dgates_ptr, dcontext_ptr, dv_ptr, z_ptr, dz1_ptr, dx_ptr, sums_ptr, v_strides, H, GROUP, R,
                       D: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr,
                       BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_d, offs_z, offs_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_P)
    in_row, in_d, in_z, in_p = row < R, offs_d < D, offs_z < 2 * D, offs_p < P
    at_z = in_row[:, None] & in_z[None, :]
    dtype = context_ptr.dtype.element_ty
    of_row = pid_bh * R + row
    sums_ptr += (pid_bh * tl.num_programs(0) + tl.program_id(0)) * (6 * D + 4 * P)
    z1 = _first_layer(context_ptr + pid_bh * R * 2 * D, v_ptr + b * v_strides[0] + (h // GROUP) * v_strides[1], w1_ptr, b1_ptr,
                      row, in_row, v_strides, D, BLOCK_R, BLOCK_D, BLOCK_Z, PRECISION)
    z1, rstd = _standardized(z1, in_z, 2 * D)
    gain = _vector(g1_ptr, offs_z, in_z)
    y = z1 * gain[None, :] + _vector(e1_ptr, offs_z, in_z)[None, :]
    half = 0.5 * (1.0 + tl.erf(y * 0.7071067811865476))
    z = (y * half).to(dtype)
    tl.store(z_ptr + of_row[:, None] * 2 * D + offs_z[None, :], z, mask=at_z)
    # -- dz, (BLOCK_R, BLOCK_Z)
    dz = tl.zeros((BLOCK_R, BLOCK_Z), tl.float32)
    if dgates_ptr is not None:
        for i in tl.static_range(2):
            dgate = tl.load(dgates_ptr + of_row * 2 + i, mask=in_row, other=0.0).to(tl.float32)
            dz += dgate[:, None] * _vector(wg_ptr + i * 2 * D, offs_z, in_z)[None, :]
    if dimage_ptr is not None:
        dgain, dbias = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
        for i in tl.static_range(2):
            w2 = _tile(w2_ptr + i * P * 2 * D, offs_z, offs_p, 1, 2 * D, in_z[:, None] & in_p[None, :]).to(dtype)
            x = tl.dot(z, w2, input_precision=PRECISION) + _vector(b2_ptr + i * P, offs_p, in_p)[None, :]
            x, rstd_x = _standardized(x, in_p, P)
            at = in_row[:, None] & in_p[None, :]
            dy = _tile(dimage_ptr + (b * 2 * H + 2 * h + i) * R * P, row, offs_p, P, 1, at).to(tl.float32)
            dgain += tl.sum(dy * x, axis=0)
            dbias += tl.sum(dy, axis=0)
            dx = _through_norm(dy, x, rstd_x, _vector(g2_ptr, offs_p, in_p), in_p, P)
            tl.store(dx_ptr + of_row[:, None] * 2 * P + i * P + offs_p[None, :], dx, mask=at)
            tl.store(sums_ptr + 6 * D + i * P + offs_p, tl.sum(dx, axis=0), mask=in_p)
            dz += tl.dot(dx.to(dtype), tl.trans(w2), input_precision=PRECISION)
        tl.store(sums_ptr + 6 * D + 2 * P + offs_p, dgain, mask=in_p)
        tl.store(sums_ptr + 6 * D + 3 * P + offs_p, dbias, mask=in_p)
    # -- through GELU and the norm before it
    dy = dz * (half + y * 0.3989422804014327 * tl.exp(-0.5 * y * y))
    dy = tl.where(at_z, dy, 0.0)
    dz1 = _through_norm(dy, z1, rstd, gain, in_z, 2 * D)
    tl.store(sums_ptr + offs_z, tl.sum(dz1, axis=0), mask=in_z)
    tl.store(sums_ptr + 2 * D + offs_z, tl.sum(dy * z1, axis=0), mask=in_z)
    tl.store(sums_ptr + 4 * D + offs_z, tl.sum(dy, axis=0), mask=in_z)
    dz1 = dz1.to(dtype)
    tl.store(dz1_ptr + of_row[:, None] * 2 * D + offs_z[None, :], dz1, mask=at_z)
    # -- the inputs, D columns at a time
    for i in tl.static_range(3):
        w1 = _tile(w1_ptr + i * D, offs_z, offs_d, 3 * D, 1, in_z[:, None] & in_d[None, :])  # (BLOCK_Z, BLOCK_D)
        dx = tl.dot(dz1, w1.to(dtype), input_precision=PRECISION)
        at = in_row[:, None] & in_d[None, :]
        if i < 2:
            tl.store(dcontext_ptr + of_row[:, None] * 2 * D + i * D + offs_d[None, :], dx, mask=at)
        else:
            tl.store(dv_ptr + of_row[:, None] * D + offs_d[None, :], dx, mask=at)


ENCODE = dict(BLOCK_R=64, num_warps=4)
ENCODE_BACKWARD = dict(BLOCK_R=32, num_warps=4)


def _encode_launch(context, v, P, tiles):
    """Grid and keywords of both kernels."""
    B, H, R, D = *context.shape[:3], context.shape[3] // 2
    tiles = tiles if context.dtype != torch.float32 and R > 16 else dict(BLOCK_R=16, num_warps=4)
    return (_cdiv(R, tiles["BLOCK_R"]), B * H), dict(
        v_strides=v.stride(), H=H, GROUP=H // v.shape[1], R=R, D=D, P=P, BLOCK_D=_power_of_2(D, v.dtype),
        BLOCK_Z=_power_of_2(2 * D, v.dtype), BLOCK_P=_power_of_2(P, v.dtype), PRECISION="ieee", **tiles)


class _EncodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, v, *weights):
        (B, H, R, _), P, context = context.shape, weights[6].shape[0], context.contiguous()
        weights = [w.contiguous() for w in weights]
        image = torch.empty(B, 2 * H, R, P, dtype=context.dtype, device=context.device)
        gates = torch.empty(B, H, R, 2, dtype=torch.float32, device=context.device)
        grid, constants = _encode_launch(context, v, P, ENCODE)
        _encode_kernel[grid](context, v, *weights, image, gates, **constants)
        ctx.save_for_backward(context, v, *weights)
        ctx.set_materialize_grads(False)
        return image, gates

    @staticmethod
    @once_differentiable
    def backward(ctx, dimage, dgates):
        context, v, *weights = ctx.saved_tensors
        w1, b1, g1, e1, w2, b2, g2, e2, wg, bg = weights
        (B, H, R, D2), Hkv, P = context.shape, v.shape[1], g2.shape[0]
        D = D2 // 2
        dimage, dgates = (x if x is None else x.contiguous() for x in (dimage, dgates))
        grid, constants = _encode_launch(context, v, P, ENCODE_BACKWARD)
        new = lambda *size, dtype=context.dtype: torch.empty(*size, dtype=dtype, device=v.device)
        dcontext, dv, z, dz1, dx = (new(B, H, R, n) for n in (2 * D, D, 2 * D, 2 * D, 2 * P))
        sums = new(grid[0] * grid[1], 6 * D + 4 * P, dtype=torch.float32)
        _encode_bwd_kernel[grid](context, v, w1, b1, g1, e1, w2, b2, g2, wg, dimage, dgates, dcontext, dv, z, dz1, dx, sums,
                                 **constants)
        # -- weights: products over all rows
        rows = lambda x: x.reshape(-1, x.shape[-1])
        v_rows = rows(v if H == Hkv else v.repeat_interleave(H // Hkv, 1))
        grads = {"w1": torch.cat([rows(dz1).T @ rows(context), rows(dz1).T @ v_rows], 1)}
        total = sums[:, : 6 * D if dimage is None else None].sum(0)
        grads |= zip(("b1", "g1", "e1"), total[: 6 * D].split(2 * D))
        if dimage is not None:
            grads |= {"w2": rows(dx).T @ rows(z)} | dict(zip(("b2", "g2", "e2"), total[6 * D :].split((2 * P, P, P))))
        if dgates is not None:
            grads |= {"wg": rows(dgates).T.to(z.dtype) @ rows(z), "bg": rows(dgates).sum(0)}
        dv = dv if H == Hkv else dv.view(B, Hkv, H // Hkv, R, D).sum(2)
        names = ("w1", "b1", "g1", "e1", "w2", "b2", "g2", "e2", "wg", "bg")
        return dcontext, dv, *(grads[name].to(w.dtype) if name in grads else None for name, w in zip(names, weights))


def encode_rows(context: Tensor, v: Tensor, encoder: nn.Sequential, decoder: nn.Linear, norm: nn.LayerNorm,
                gate: nn.Linear) -> tuple[Tensor, Tensor]:
    """sea.encode_rows, in the dtype of context; gates are fp32."""
    _check_tensor("context", context, 4, "(B, H, R, 2D)")
    weights = [w for layer in (encoder[0], encoder[1], decoder, norm, gate) for w in (layer.weight, layer.bias)]
    with torch.cuda.device_of(v):
        return _EncodeRows.apply(context, v, *weights)


# -- estimator: the CNN ------------------------------------------------------------------------------------------------


@triton.jit
def _row_ptrs(x_ptr, row, n_row, P, C: tl.constexpr, LAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
              BLOCK_C: tl.constexpr):
    """BLOCK_T rows from `row` (int64) on of an image whose channels lie last in memory, (n_row, P, C), or first, (C, n_row, P):
    pointers (BLOCK_T * BLOCK_P, BLOCK_C)."""
    offs, c = tl.arange(0, BLOCK_T * BLOCK_P), tl.arange(0, BLOCK_C)[None, :]
    place = (offs // BLOCK_P * P + offs % BLOCK_P)[:, None]
    if LAST:
        return x_ptr + row * P * C + (place * C + c)
    else:
        return x_ptr + row * P + (place + c.to(tl.int64) * n_row * P)


@triton.jit
def _tap(w_ptr, tap, C: tl.constexpr, BACK: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tap (BLOCK_C, BLOCK_C) of w (C, C, 3, 3) [out, in, tap]; BACK: for x's gradient, transposed and from the last tap."""
    m, n = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_C)[None, :]
    of_w = (n * C + m) * 9 + 8 - tap if BACK else (m * C + n) * 9 + tap
    return tl.load(w_ptr + of_w, mask=(m < C) & (n < C), other=0.0)


@triton.jit
def _add_taps(x, w_0, w_1, w_2, acc_0, acc_1, acc_2, PRECISION: tl.constexpr):
    """x (places, BLOCK_C) as a tap of three rows, whose sums are acc (BLOCK_C, places)."""
    x = tl.trans(x)
    return (tl.dot(w_0, x, acc_0, input_precision=PRECISION), tl.dot(w_1, x, acc_1, input_precision=PRECISION),
            tl.dot(w_2, x, acc_2, input_precision=PRECISION))


@triton.jit
def _to_cells(x, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """(head and sub-cell, row and place) -> (head and row, place and sub-cell): a head's row of cells lies together."""
    x = tl.permute(tl.reshape(x, (BLOCK_H, 4, BLOCK_T, BLOCK_P)), (0, 2, 3, 1))
    return tl.reshape(x, (BLOCK_H * BLOCK_T, 4 * BLOCK_P))


@triton.jit
def _from_cells(x, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    x = tl.permute(tl.reshape(x, (BLOCK_H, BLOCK_T, BLOCK_P, 4)), (0, 3, 1, 2))
    return tl.reshape(x, (BLOCK_H * 4, BLOCK_T * BLOCK_P))


@triton.jit
def _to_scores(x, up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
               PRECISION: tl.constexpr):
    """LayerNorm(1x1 conv of x to 4 cells): x (BLOCK_C, BLOCK_T * BLOCK_P) -> (BLOCK_H * BLOCK_T, 4 * BLOCK_P). up (4H, C)."""
    offs_c, offs_u, cell = tl.arange(0, BLOCK_C), tl.arange(0, 4 * BLOCK_H), tl.arange(0, 4 * BLOCK_P)
    up = _tile(up_ptr, offs_u, offs_c, C, 1, (offs_u < 4 * H)[:, None] & (offs_c < C)[None, :]).to(x.dtype)
    y = tl.dot(up, x, input_precision=PRECISION) + _vector(up_b_ptr, offs_u, offs_u < 4 * H)[:, None]
    y, in_w = _to_cells(y, BLOCK_H, BLOCK_T, BLOCK_P), cell < WIDTH
    return _normed(y, _vector(gain_ptr, cell, in_w), _vector(bias_ptr, cell, in_w), in_w, WIDTH)


@triton.jit
def _store_rows(acc, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b, row, begin, out_stride, R, P,
                WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr, OUT_LAST: tl.constexpr, BLOCK_T: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """The end of _conv_kernel: acc (BLOCK_C, BLOCK_T * BLOCK_P), the sums of the taps of rows `row` on."""
    offs, c = tl.arange(0, BLOCK_T * BLOCK_P), tl.arange(0, BLOCK_C)
    in_c, t, p = c < C, row + offs // BLOCK_P, offs % BLOCK_P
    if b_ptr is not None:
        acc = tl.maximum(acc + _vector(b_ptr, c, in_c)[:, None], 0.0)
    if up_ptr is None:
        x, at = tl.trans(acc), ((t < R) & (p < P))[:, None] & in_c[None, :]
        of_out = _row_ptrs(b * out_stride, row.to(tl.int64), R, P, C, OUT_LAST, BLOCK_T, BLOCK_P, BLOCK_C)
        if of_relu_ptr is not None:
            of_relu = tl.load(of_relu_ptr + of_out, mask=at, other=0.0)
            x = tl.where((of_relu > 0.0) | (t + begin < 0)[:, None], x, 0.0)
        tl.store(out_ptr + of_out, x, mask=at)
    else:
        y = _to_scores(acc.to(up_ptr.dtype.element_ty), up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH, C, H, BLOCK_T, BLOCK_P,
                       BLOCK_C, BLOCK_H, PRECISION)
        n, cell = tl.arange(0, BLOCK_H * BLOCK_T), tl.arange(0, 4 * BLOCK_P)
        h, t = n // BLOCK_T, row + n % BLOCK_T
        tl.store(out_ptr + ((b * H + h) * R + t)[:, None] * WIDTH + cell[None, :], y,
                 mask=((h < H) & (t < R))[:, None] & (cell < WIDTH)[None, :])


# out = relu(conv3x3(x)), rows t, t-2, t-4 and columns p-2, p, p+2; with up, LayerNorm(1x1 conv of that to 4 cells) instead.
# Without a bias, x is the gradient of such a convolution's sum, and out that of its input: the same with mirrored taps. With
# of_relu it goes on through the relu that gave that input, except in rows of the past, which have been through theirs before.
# One program: n_block times two rows, all channels; grid (cdiv(R, 2 n_block), B). It walks down the rows of x and holds the sums
# of the three pairs of rows that the pair at hand is a tap of, so 3 loads of it, with its columns shifted, serve 9 products of
# the (C, C) weights of a tap with (C, 2P) places. Not WALK, for fp32 and rows of more than 4096 numbers, whose sums registers
# would not hold: one row, 9 loads; grid (R, B).
#   x (B, C, N, P), row `begin` of which is the first tap of row 0; w (C, C, 3, 3), up (4H, C)
#   out (B, C, R, P), of_relu as out, or with up scores (B, H, R, width); LAST, OUT_LAST: channels lie last in memory
# fp32: accumulators and the norm. Where channels lie last, shifts keep places aligned: loads of 16 bytes, which go to shared
# memory during the products before. Reads a row 3 times, mostly from the cache, and writes it once. Reference: sea.causal_cnn.
@triton.jit(do_not_specialize=["begin", "n_block"])
def _conv_kernel(x_ptr, w_ptr, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, x_stride, out_stride, N, R, P,
                 begin, n_block, WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr, LAST: tl.constexpr,
                 OUT_LAST: tl.constexpr, WALK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    BLOCK_T: tl.constexpr = 2 if WALK else 1
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * n_block * BLOCK_T
    offs, in_c = tl.arange(0, BLOCK_T * BLOCK_P), (tl.arange(0, BLOCK_C) < C)[None, :]
    row, p = begin + first + offs // BLOCK_P, offs % BLOCK_P
    x_ptrs = _row_ptrs(x_ptr + b * x_stride, (begin + first).to(tl.int64), N, P, C, LAST, BLOCK_T, BLOCK_P, BLOCK_C)
    place: tl.constexpr = C if LAST else 1
    BACK: tl.constexpr = b_ptr is None
    acc_0 = tl.zeros((BLOCK_C, BLOCK_T * BLOCK_P), tl.float32)
    if WALK:
        acc_1 = acc_0
        w_00, w_01, w_02 = _tap(w_ptr, 0, C, BACK, BLOCK_C), _tap(w_ptr, 1, C, BACK, BLOCK_C), _tap(w_ptr, 2, C, BACK, BLOCK_C)
        w_10, w_11, w_12 = _tap(w_ptr, 3, C, BACK, BLOCK_C), _tap(w_ptr, 4, C, BACK, BLOCK_C), _tap(w_ptr, 5, C, BACK, BLOCK_C)
        w_20, w_21, w_22 = _tap(w_ptr, 6, C, BACK, BLOCK_C), _tap(w_ptr, 7, C, BACK, BLOCK_C), _tap(w_ptr, 8, C, BACK, BLOCK_C)
    for i in range(0, n_block + 2):
        at = (row + 2 * i >= 0) & (row + 2 * i < N) & (p < P)
        x_0 = tl.load(x_ptrs - 2 * place, mask=(at & (p >= 2))[:, None] & in_c, other=0.0)  # (places, BLOCK_C)
        x_1 = tl.load(x_ptrs, mask=at[:, None] & in_c, other=0.0)
        x_2 = tl.load(x_ptrs + 2 * place, mask=(at & (p + 2 < P))[:, None] & in_c, other=0.0)
        if WALK:
            acc_2 = tl.zeros((BLOCK_C, BLOCK_T * BLOCK_P), tl.float32)
            acc_0, acc_1, acc_2 = _add_taps(x_0, w_20, w_10, w_00, acc_0, acc_1, acc_2, PRECISION)
            acc_0, acc_1, acc_2 = _add_taps(x_1, w_21, w_11, w_01, acc_0, acc_1, acc_2, PRECISION)
            acc_0, acc_1, acc_2 = _add_taps(x_2, w_22, w_12, w_02, acc_0, acc_1, acc_2, PRECISION)
            if i >= 2:
                _store_rows(acc_0, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b, first + 2 * i - 4,
                            begin, out_stride, R, P, WIDTH, C, H, OUT_LAST, BLOCK_T, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION)
            acc_0, acc_1 = acc_1, acc_2
        else:
            acc_0 = tl.dot(_tap(w_ptr, 3 * i, C, BACK, BLOCK_C), tl.trans(x_0), acc_0, input_precision=PRECISION)
            acc_0 = tl.dot(_tap(w_ptr, 3 * i + 1, C, BACK, BLOCK_C), tl.trans(x_1), acc_0, input_precision=PRECISION)
            acc_0 = tl.dot(_tap(w_ptr, 3 * i + 2, C, BACK, BLOCK_C), tl.trans(x_2), acc_0, input_precision=PRECISION)
        x_ptrs += 2 * P * place
    if not WALK:
        _store_rows(acc_0, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, of_relu_ptr, out_ptr, b, first, begin, out_stride, R, P,
                    WIDTH, C, H, OUT_LAST, BLOCK_T, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION)


@triton.jit
def _conv_step(past_ptr, next_ptr, x_ptr, w_ptr, b_ptr, begins, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
               PRECISION: tl.constexpr):
    """relu(conv3x3) of one row x (C, P) after the 4 rows of the past (C, 4, P): (BLOCK_C, BLOCK_P) fp32. next: the last 4 rows
    with x, or, unless it begins a row, without. w (C, C, 3, 3)."""
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    in_c = (c < C)[:, None]
    at, of_past = in_c & (p < P)[None, :], c[:, None] * 4 * P + p[None, :]
    for i in tl.static_range(3):
        tl.store(next_ptr + of_past + i * P, tl.load(past_ptr + of_past + (i + begins) * P, mask=at, other=0.0), mask=at)
    newest = tl.load(x_ptr + c[:, None] * P + p[None, :], mask=at, other=0.0)
    last = tl.load(past_ptr + of_past + 3 * P, mask=at, other=0.0)
    tl.store(next_ptr + of_past + 3 * P, tl.where(begins != 0, newest, last), mask=at)
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    w_ptr, at_w = w_ptr + (c[:, None] * C + c[None, :]) * 9, in_c & (c < C)[None, :]
    left, right = at & (p >= 2)[None, :], at & (p + 2 < P)[None, :]
    for i in tl.static_range(3):
        if i < 2:  # rows t-4 and t-2, the first and third of the past
            x = past_ptr + of_past + i * 2 * P
        else:
            x = x_ptr + c[:, None] * P + p[None, :]
        # all loads before the first product: what this takes is their latency
        x_0, x_1, x_2 = tl.load(x - 2, mask=left, other=0.0), tl.load(x, mask=at, other=0.0), tl.load(x + 2, mask=right, other=0.0)
        w_0 = tl.load(w_ptr + 3 * i, mask=at_w, other=0.0).to(x_0.dtype)
        w_1 = tl.load(w_ptr + 3 * i + 1, mask=at_w, other=0.0).to(x_0.dtype)
        w_2 = tl.load(w_ptr + 3 * i + 2, mask=at_w, other=0.0).to(x_0.dtype)
        acc += tl.dot(w_0, x_0, input_precision=PRECISION)
        acc += tl.dot(w_1, x_1, input_precision=PRECISION)
        acc += tl.dot(w_2, x_2, input_precision=PRECISION)
    return tl.maximum(acc + _vector(b_ptr, c, c < C)[:, None], 0.0)


# The whole CNN for one row a sequence, of those that begin one; the others keep their past.
# One program: one sequence, all channels; grid (B,).
#   image (B, C, 1, P), past1, past2 and next1, next2 (B, C, 4, P), middle (B, C, P) scratch: contiguous; w1, w2 (C, C, 3, 3),
#   up (4H, C) and the vectors: any dtype; begins (B,) int or None: all do -> scores (B, H, 1, width)
# fp32: accumulators and the norm. Reference: sea.causal_cnn.
@triton.jit
def _cnn_step_kernel(image_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, past1_ptr, past2_ptr,
                     begins_ptr, middle_ptr, next1_ptr, next2_ptr, scores_ptr, P, WIDTH: tl.constexpr, C: tl.constexpr,
                     H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                     PRECISION: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    begins = 1 if begins_ptr is None else (tl.load(begins_ptr + b) != 0).to(tl.int32)
    past = b * C * 4 * P
    x = _conv_step(past1_ptr + past, next1_ptr + past, image_ptr + b * C * P, w1_ptr, b1_ptr, begins, P, C, BLOCK_P, BLOCK_C,
                   PRECISION)
    # -- the second convolution wants this row's neighbours, which other threads hold
    c, p, middle_ptr = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P), middle_ptr + b * C * P
    tl.store(middle_ptr + c[:, None] * P + p[None, :], x, mask=(c < C)[:, None] & (p < P)[None, :])
    tl.debug_barrier()
    x = _conv_step(past2_ptr + past, next2_ptr + past, middle_ptr, w2_ptr, b2_ptr, begins, P, C, BLOCK_P, BLOCK_C, PRECISION)
    x = x.to(image_ptr.dtype.element_ty)
    y = _to_scores(x, up_ptr, up_b_ptr, gain_ptr, bias_ptr, WIDTH, C, H, 1, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION)
    h, cell = tl.arange(0, BLOCK_H), tl.arange(0, 4 * BLOCK_P)
    tl.store(scores_ptr + (b * H + h)[:, None] * WIDTH + cell[None, :], y, mask=(h < H)[:, None] & (cell < WIDTH)[None, :])


def _causal_cnn_step(n_rows, image, w1, b1, w2, b2, up, up_b, gain, bias, past1, past2):
    (B, C, _, P), H, width, dtype = image.shape, image.shape[1] // 2, gain.shape[0], image.dtype
    new = lambda *size: torch.empty(*size, dtype=dtype, device=image.device)
    scores, middle, next1, next2 = new(B, H, 1, width), new(B, C, P), new(B, C, HISTORY, P), new(B, C, HISTORY, P)
    begins = None if n_rows is None else n_rows.contiguous()
    begins = begins.view(torch.int8) if begins is not None and begins.dtype == torch.bool else begins
    block_p, block_c = _power_of_2(P), _power_of_2(C)
    tiles = dict(P=P, C=C, BLOCK_P=block_p, BLOCK_C=block_c, PRECISION="ieee", num_warps=4 if block_p * block_c <= 4096 else 8)
    _cnn_step_kernel[(B,)](image.contiguous(), *(w.contiguous() for w in (w1, b1, w2, b2, up, up_b, gain, bias)),
                           past1.to(dtype).contiguous(), past2.to(dtype).contiguous(), begins, middle, next1, next2, scores,
                           WIDTH=width, H=H, BLOCK_H=_next_power_of_2(max(4, H)), **tiles)
    return scores, next1, next2


# From the gradient of scores to dx, that of the second convolution's sum.
# One program: `n_block` rows, all channels; grid (programs, B). It computes their cells again.
#   x (B, C, R, P) what the second convolution gave, dx likewise, channels last in memory; dscores (B, H, R, width) contiguous
#   each program's share of the gradients of up, of its bias, and of the norm's gain and bias, all fp32:
#   dup (programs, 4 BLOCK_H, C), dup_b (.., 4 BLOCK_H), dnorm (.., 2, width)
# fp32: accumulators and the norm. Reference: autograd through sea.causal_cnn.
@triton.jit(do_not_specialize=["n_block"])
def _up_bwd_kernel(x_ptr, up_ptr, up_b_ptr, gain_ptr, dscores_ptr, dx_ptr, dup_ptr, dup_b_ptr, dnorm_ptr, R, P, n_block,
                   WIDTH: tl.constexpr, C: tl.constexpr, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                   BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    b, pid = tl.program_id(1).to(tl.int64), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    offs_c, offs_u, h = tl.arange(0, BLOCK_C), tl.arange(0, 4 * BLOCK_H), tl.arange(0, BLOCK_H)
    p, cell = tl.arange(0, BLOCK_P), tl.arange(0, 4 * BLOCK_P)
    in_c, in_w = offs_c < C, cell < WIDTH
    up = _tile(up_ptr, offs_u, offs_c, C, 1, (offs_u < 4 * H)[:, None] & in_c[None, :])
    gain = _vector(gain_ptr, cell, in_w)
    dup, dup_b = tl.zeros((4 * BLOCK_H, BLOCK_C), tl.float32), tl.zeros((4 * BLOCK_H,), tl.float32)
    dgain, dbias = tl.zeros((4 * BLOCK_P,), tl.float32), tl.zeros((4 * BLOCK_P,), tl.float32)
    for i in range(0, n_block):
        row = tl.program_id(0) * n_block + i
        at = (p < P)[:, None] & in_c[None, :] & (row < R)
        of_x = b * C * R * P + row.to(tl.int64) * P * C + (p[:, None] * C + offs_c[None, :])
        x = tl.load(x_ptr + of_x, mask=at, other=0.0)  # (BLOCK_P, BLOCK_C)
        y = tl.dot(up, tl.trans(x), input_precision=PRECISION) + _vector(up_b_ptr, offs_u, offs_u < 4 * H)[:, None]
        y, rstd = _standardized(_to_cells(y, BLOCK_H, 1, BLOCK_P), in_w, WIDTH)
        dy = tl.load(dscores_ptr + ((b * H + h) * R + row)[:, None] * WIDTH + cell[None, :],
                     mask=(h < H)[:, None] & in_w[None, :] & (row < R), other=0.0).to(tl.float32)
        dgain += tl.sum(dy * y, axis=0)
        dbias += tl.sum(dy, axis=0)
        dy = _from_cells(_through_norm(dy, y, rstd, gain, in_w, WIDTH), BLOCK_H, 1, BLOCK_P)  # (4 BLOCK_H, BLOCK_P)
        dup_b += tl.sum(dy, axis=1)
        dy = dy.to(up.dtype)
        dup += tl.dot(dy, x, input_precision=PRECISION)
        dx = tl.trans(tl.dot(tl.trans(up), dy, input_precision=PRECISION))
        tl.store(dx_ptr + of_x, tl.where(x > 0.0, dx, 0.0), mask=at)
    tl.store(dup_ptr + (pid * 4 * BLOCK_H + offs_u[:, None]) * C + offs_c[None, :], dup, mask=in_c[None, :])
    tl.store(dup_b_ptr + pid * 4 * BLOCK_H + offs_u, dup_b)
    tl.store(dnorm_ptr + pid * 2 * WIDTH + cell, dgain, mask=in_w)
    tl.store(dnorm_ptr + (pid * 2 + 1) * WIDTH + cell, dbias, mask=in_w)


# Gradients of a convolution's weights and bias: sums over all places of dout x^T.
# One program: all taps of (BLOCK, BLOCK) weights over `n_block` rows of x, each CHUNKS times BLOCK_P places; grid (programs, B,
# BLOCKS * BLOCKS). Places of x are loaded at 3 shifts, and with them those of dout, in 3 rows, that they are taps of: 6 loads
# for 9 products. Loads go to shared memory during the products before.
#   x (B, C, lead + R, P), dout (B, C, R, P), with channels last, and of x if LAST
#   each program's share: dw (programs, 9, C, C) [tap, out, in], db (programs, C), fp32
@triton.jit(do_not_specialize=["n_block"])
def _conv_dw_kernel(x_ptr, dout_ptr, dw_ptr, db_ptr, dout_stride, R, P, lead, n_block, C: tl.constexpr, LAST: tl.constexpr,
                    BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
                    PRECISION: tl.constexpr):
    b, pid = tl.program_id(1).to(tl.int64), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    m_0, n_0 = tl.program_id(2) // BLOCKS * BLOCK, tl.program_id(2) % BLOCKS * BLOCK
    p, c = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK)
    in_m, in_n = (m_0 + c < C)[:, None], (n_0 + c < C)[None, :]
    first, n_row = tl.program_id(0) * n_block, lead + R
    place: tl.constexpr = C if LAST else 1
    of_n = n_0 if LAST else n_0.to(tl.int64) * n_row * P
    x_ptrs = _row_ptrs(x_ptr + b * C * n_row * P + of_n, first.to(tl.int64), n_row, P, C, LAST, 1, BLOCK_P, BLOCK)
    dout_ptrs = dout_ptr + b * dout_stride + (first - lead).to(tl.int64) * P * C + (m_0 + c[:, None] + tl.trans(p) * C)
    zero, ones = tl.zeros((BLOCK, BLOCK), tl.float32), tl.full((BLOCK_P, 16), 1.0, x_ptr.dtype.element_ty)
    dw_00, dw_01, dw_02, dw_10, dw_11, dw_12, dw_20, dw_21, dw_22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    db = tl.zeros((BLOCK, 16), tl.float32)
    for i in range(0, n_block * CHUNKS):
        row, column = first + i // CHUNKS - lead, p + i % CHUNKS * BLOCK_P  # of dout, by the last tap
        at = in_n & (column < P) & (row < R)
        x_0 = tl.load(x_ptrs - 2 * place, mask=at & (column >= 2), other=0.0)  # (BLOCK_P, BLOCK)
        x_1 = tl.load(x_ptrs, mask=at, other=0.0)
        x_2 = tl.load(x_ptrs + 2 * place, mask=at & (column + 2 < P), other=0.0)
        at = in_m & tl.trans(column < P)
        dout = tl.load(dout_ptrs + 4 * P * C, mask=at & (row + 4 >= 0) & (row + 4 < R), other=0.0)  # (BLOCK, BLOCK_P)
        dw_00 = tl.dot(dout, x_0, dw_00, input_precision=PRECISION)
        dw_01 = tl.dot(dout, x_1, dw_01, input_precision=PRECISION)
        dw_02 = tl.dot(dout, x_2, dw_02, input_precision=PRECISION)
        dout = tl.load(dout_ptrs + 2 * P * C, mask=at & (row + 2 >= 0) & (row + 2 < R), other=0.0)
        dw_10 = tl.dot(dout, x_0, dw_10, input_precision=PRECISION)
        dw_11 = tl.dot(dout, x_1, dw_11, input_precision=PRECISION)
        dw_12 = tl.dot(dout, x_2, dw_12, input_precision=PRECISION)
        dout = tl.load(dout_ptrs, mask=at & (row >= 0) & (row < R), other=0.0)
        dw_20 = tl.dot(dout, x_0, dw_20, input_precision=PRECISION)
        dw_21 = tl.dot(dout, x_1, dw_21, input_precision=PRECISION)
        dw_22 = tl.dot(dout, x_2, dw_22, input_precision=PRECISION)
        db = tl.dot(dout, ones, db, input_precision=PRECISION)  # cheaper than a sum across threads
        step = BLOCK_P if i % CHUNKS + 1 < CHUNKS else P - (CHUNKS - 1) * BLOCK_P  # to the next columns, or row
        x_ptrs += step * place
        dout_ptrs += step * C
    dw_ptr += (pid * 9 * C + m_0 + c[:, None]) * C + n_0 + c[None, :]
    at = in_m & in_n
    tl.store(dw_ptr, dw_00, mask=at)
    tl.store(dw_ptr + C * C, dw_01, mask=at)
    tl.store(dw_ptr + 2 * C * C, dw_02, mask=at)
    tl.store(dw_ptr + 3 * C * C, dw_10, mask=at)
    tl.store(dw_ptr + 4 * C * C, dw_11, mask=at)
    tl.store(dw_ptr + 5 * C * C, dw_12, mask=at)
    tl.store(dw_ptr + 6 * C * C, dw_20, mask=at)
    tl.store(dw_ptr + 7 * C * C, dw_21, mask=at)
    tl.store(dw_ptr + 8 * C * C, dw_22, mask=at)
    if n_0 == 0:
        tl.store(db_ptr + pid * C + m_0 + c, tl.max(db, axis=1), mask=m_0 + c < C)  # its columns are one


# Programs of a kernel where rows suffice, about two a multiprocessor: each reads rows that its neighbour reads as well, or
# leaves sums that have to be added up.
CONV = dict(programs=256)
HISTORY = 4  # rows of the past that a 3-row convolution of dilation 2 looks at


def _split_rows(n_row: int, B: int, block: int = 1) -> tuple[int, int]:
    """Programs a batch entry, and blocks of rows that each of them walks."""
    n_block = _cdiv(_cdiv(n_row, block) * B, CONV["programs"])
    return _cdiv(_cdiv(n_row, block), n_block), n_block


def _conv(x, w, out, begin, *, bias=None, up=(None,) * 4, of_relu=None, last, out_last=True, **constants):
    """_conv_kernel of x to out, whose row 0 has its first tap in row `begin` of x. up: weights, bias, gain and bias of the end."""
    (B, C, N, P), R, half = x.shape, out.shape[2], x.dtype != torch.float32
    block_p, block_c = max(_power_of_2(P), 32 if half else 16), _power_of_2(C)
    walk = half and block_p * block_c <= 4096
    block_p = max(block_p, 64) if half and not walk else block_p  # 64 places at least, see _power_of_2
    n_program, n_block = _split_rows(R, B, 2) if walk else (R, 1)
    if n_block > 32:  # more programs, of which the last end sooner after the others
        n_program, n_block = _cdiv(R, 64), 32
    stages = 1 if not walk or block_c > 32 else 3 if last else 2  # as many as fit into shared memory, or registers
    _conv_kernel[(n_program, B)](
        x, w, bias, *up, of_relu, out, x.stride(0), out.stride(0), N, R, P, begin, n_block, C=C, LAST=last, OUT_LAST=out_last,
        WALK=walk, BLOCK_P=block_p, BLOCK_C=block_c, PRECISION="ieee", num_stages=stages,
        num_warps=4 if block_p * block_c * (1 + walk) <= 4096 else 8, **constants)


def _last_rows(x, n_rows, lead):
    """The HISTORY rows before row n_rows; zeros before the first."""
    if n_rows is None and x.shape[2] >= HISTORY:
        return x[:, :, -HISTORY:].clone(memory_format=torch.contiguous_format)
    x = x if lead else F.pad(x, (0, 0, HISTORY, 0))
    if n_rows is None:
        return x[:, :, -HISTORY:].contiguous()
    at = (n_rows[:, None] + torch.arange(HISTORY, device=x.device))[:, None, :, None]
    return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))


def _through_last_rows(grad, x, n_rows, lead):
    """Gradient of x from that of its last rows."""
    x = torch.zeros_like(x).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(_last_rows(x, n_rows, lead), x, grad)[0]


class _CausalCNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_rows, image, w1, b1, w2, b2, up, up_b, gain, bias, past1, past2):
        (B, C, R, P), H, width, dtype = image.shape, image.shape[1] // 2, gain.shape[0], image.dtype
        w1, w2 = w1.to(dtype).contiguous(), w2.to(dtype).contiguous()
        ups, lead = up.to(dtype).reshape(4 * H, C).contiguous(), 0 if past1 is None else HISTORY
        constants = dict(WIDTH=width, H=H, BLOCK_H=_next_power_of_2(max(4, H)))
        x1 = image.contiguous() if past1 is None else torch.cat([past1.to(dtype), image], 2).contiguous()
        x2 = torch.empty(B, lead + R, P, C, dtype=dtype, device=image.device).permute(0, 3, 1, 2)  # channels last
        if lead:
            x2[:, :, :lead] = past2
        _conv(x1, w1, x2[:, :, lead:], lead - HISTORY, bias=b1, last=False, **constants)
        scores = torch.empty(B, H, R, width, dtype=dtype, device=image.device)
        _conv(x2, w2, scores, lead - HISTORY, bias=b2, up=(ups, up_b, gain, bias), last=True, **constants)
        ctx.save_for_backward(x1, x2, w1, w2, b2, ups, up_b, gain)
        ctx.n_rows, ctx.constants, ctx.lead = n_rows, constants, lead
        ctx.set_materialize_grads(False)
        return scores, *(_last_rows(x, n_rows, lead) for x in (x1, x2))

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores, *dlast):
        x1, x2, w1, w2, b2, ups, up_b, gain = ctx.saved_tensors
        n_rows, constants, lead = ctx.n_rows, ctx.constants, ctx.lead
        (B, C, N, P), H, width = x1.shape, constants["H"], constants["WIDTH"]
        R = N - lead
        new = lambda *size, dtype=torch.float32: torch.empty(*size, dtype=dtype, device=x1.device)
        new_image = lambda rows: new(B, rows, P, C, dtype=x1.dtype).permute(0, 3, 1, 2)  # channels last
        dscores = new(B, H, R, width, dtype=x1.dtype).zero_() if dscores is None else dscores.contiguous()
        # -- scores to the second convolution's sum
        (n_program, n_block), block_p = _split_rows(R, B), _power_of_2(P)
        x3, dout, dup = new_image(R), new_image(R), new(n_program * B, 4 * constants["BLOCK_H"], C)
        dup_b, dnorm = new(*dup.shape[:2]), new(len(dup), 2, width)
        _conv(x2, w2, x3, lead - HISTORY, bias=b2, last=True, **constants)
        _up_bwd_kernel[(n_program, B)](
            x3, ups, up_b, gain, dscores, dout, dup, dup_b, dnorm, R, P, n_block, C=C, BLOCK_P=_power_of_2(P, x1.dtype),
            BLOCK_C=_power_of_2(C, x1.dtype), PRECISION="ieee", num_warps=4 if block_p <= 64 else 8, num_stages=1, **constants)
        del x3
        dgain, dbias = dnorm.sum(0)
        found = {"up": dup.sum(0)[: 4 * H, :, None, None], "up_b": dup_b.sum(0)[: 4 * H], "gain": dgain, "bias": dbias}
        # -- through the convolutions
        (n_program, n_block), block_c = _split_rows(N, B), _power_of_2(C)
        block = min(32, block_c)
        num_warps, num_stages = (4, 1) if x1.dtype == torch.float32 else (2, 3)  # more warps would share 32 x 32 products
        for i, (x, w) in enumerate(((x2, w2), (x1, w1))):
            dw, db = new(n_program * B, 9, C, C), new(n_program * B, C)
            _conv_dw_kernel[(n_program, B, (block_c // block) ** 2)](
                x, dout, dw, db, dout.stride(0), R, P, lead, n_block, C=C, LAST=i == 0, BLOCK_P=min(64, block_p),
                CHUNKS=_cdiv(P, 64), BLOCK=block, BLOCKS=block_c // block, PRECISION="ieee", num_warps=num_warps,
                num_stages=num_stages)
            found[f"w{2 - i}"] = dw.sum(0).unflatten(0, (3, 3)).permute(2, 3, 0, 1)
            found[f"b{2 - i}"] = db.sum(0)
            dx = new_image(N) if i == 0 else new(B, C, N, P, dtype=x1.dtype)  # the encoder reads it in its image's order
            _conv(dout, w, dx, -lead, of_relu=x2 if i == 0 else None, last=True, out_last=i == 0, **constants)
            if dlast[1 - i] is not None:
                own = _through_last_rows(dlast[1 - i], x, n_rows, lead)
                if i == 0:
                    own[:, :, lead:] *= x[:, :, lead:] > 0
                dx += own
            found[f"past{2 - i}"] = dx[:, :, :lead] if lead else None
            dout = dx[:, :, lead:]
        names = ("w1", "b1", "w2", "b2", "up", "up_b", "gain", "bias", "past1", "past2")
        needed = zip(names, ctx.needs_input_grad[2:])
        return None, dout, *(found[name] if need else None for name, need in needed)


def causal_cnn(image: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d, up: nn.Conv2d, norm: nn.LayerNorm,
               past: tuple[Tensor, Tensor] | None = None,
               n_rows: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """sea.causal_cnn, in the dtype of image."""
    _check_tensor("image", image, 4, "(B, 2H, R, P)")
    weights = [w for layer in (conv1, conv2, up, norm) for w in (layer.weight, layer.bias)]
    run = _causal_cnn_step if _is_step(image) and past is not None else _CausalCNN.apply
    with torch.cuda.device_of(image):
        scores, *last_rows = run(n_rows, image, *weights, *(past or (None, None)))
    return scores, tuple(last_rows)


# -- estimator: products with the mean key of each cell ----------------------------------------------------------------


@triton.jit
def _bin_level(t, N_BINS: tl.constexpr):
    """sea.bin_level: the number of bits of (t - 1) // N_BINS, read off the exponent of a float, exact for t < 2^24 * N_BINS."""
    x = (tl.maximum(t, 1) - 1) // N_BINS
    return tl.maximum((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


# Sums and means of the keys of rank bin * 2^e ... (bin + 1) * 2^e - 1, for the levels e = level(count), level(count) + 1, ...,
# up to that of count + new.
# One program: BLOCK_B bins of one level of one key/value head, whose keys stand side by side; grid (cdiv(N_BINS, BLOCK_B), n_level,
# B * Hkv). A sum is a product with ones, BLOCK_N keys at a time.
#   k (B, Hkv, N, D), any strides; first (B,) int, the rank that place 0 has or would have, None: 0; there (B, N) int8 or None
#   count (B,) int: keys before, None: 0; new (B,) int: keys that are new, None: N
#   past (B, Hkv, N_BINS, D) fp32 or None: bins of the keys before, at the level of count
#   means (B * Hkv, n_level, N_BINS, D) in the dtype of k; sums (B, Hkv, N_BINS, D) fp32: of the level of count + new
# fp32: the sums, in a fixed order. Each level reads half as many keys as the next: all together read each key twice.
# Reference: sea.bin_sums.
@triton.jit(do_not_specialize=["N"])
def _bin_keys_kernel(k_ptr, first_ptr, there_ptr, count_ptr, new_ptr, past_ptr, means_ptr, sums_ptr, k_strides, HKV, N,
                     D: tl.constexpr, N_BINS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_e, n_level = tl.program_id(1), tl.num_programs(1)
    pid_bh = tl.program_id(2).to(tl.int64)
    b, h = pid_bh // HKV, pid_bh % HKV
    count = 0 if count_ptr is None else tl.load(count_ptr + b).to(tl.int32)
    last = _bin_level(count + (N if new_ptr is None else tl.load(new_ptr + b).to(tl.int32)), N_BINS)
    e = pid_e if count_ptr is None else _bin_level(count, N_BINS) + pid_e
    if e > last:
        return
    offs_b, offs_n, d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    bin = (tl.program_id(0) * BLOCK_B + offs_b).to(tl.int64)
    in_d = (d < D)[None, :]
    # -- the first place of these bins, and those of them that hold keys
    origin = (tl.program_id(0).to(tl.int64) * BLOCK_B << e) - (0 if first_ptr is None else tl.load(first_ptr + b).to(tl.int64))
    end = tl.minimum(tl.maximum(origin + (tl.full((), BLOCK_B, tl.int64) << e), 0), N).to(tl.int32)
    k_ptr += b * k_strides[0] + h * k_strides[1]
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(tl.minimum(tl.maximum(origin, 0), N).to(tl.int32), end, BLOCK_N):
        j = (start + offs_n).to(tl.int64)
        there = j < end
        if there_ptr is not None:
            there &= tl.load(there_ptr + b * N + j, mask=there, other=0) != 0
        k = _tile(k_ptr, j, d, k_strides[2], k_strides[3], there[:, None] & in_d)  # (BLOCK_N, BLOCK_D)
        one = ((j - origin) >> e)[None, :] == offs_b[:, None]  # (BLOCK_B, BLOCK_N)
        acc += tl.dot(one.to(k.dtype), k, input_precision="ieee")
    if past_ptr is not None:
        for i in range(0, 1 << pid_e):
            of_past = (bin << pid_e) + i
            acc += _tile(past_ptr + pid_bh * N_BINS * D, of_past, d, D, 1, (of_past < N_BINS)[:, None] & in_d)
    at, there = bin[:, None] * D + d[None, :], (bin < N_BINS)[:, None] & in_d
    mean = acc * tl.exp2(-e.to(tl.float32))
    tl.store(means_ptr + (pid_bh * n_level + pid_e) * N_BINS * D + at, mean.to(means_ptr.dtype.element_ty), mask=there)
    if e == last:
        tl.store(sums_ptr + pid_bh * N_BINS * D + at, acc, mask=there)


# x[p] += gain * max(s_p - max s, -32), s_p = softmax_scale * q . (mean key of the bin in the middle of cell p); or, BACKWARD, the
# sum of x[p] max(..), the gradient of gain from x, that of the result.
# One program: every n-th tile of BLOCK_T rows of one head; grid (n,). For each level of its rows, nearly always one, it multiplies
# them with all bins, BLOCK_B at a time, and then takes each cell's product out of those of its row.
#   q (B, H, R, D), any strides; means and count as above; seen (B, R) int; x (B, H, R, WIDTH) contiguous, in place
#   products (n, BLOCK_T, 2 * WIDTH) fp32: scratch of one tile, which stays in the L2 cache
#   parts (n_tile,) fp32, BACKWARD: each tile's sum
# fp32: products (of means rounded to the dtype of k), maximum. Eager writes 2 * WIDTH products for each row and level. Limits:
# WIDTH <= 2048, since whole rows stay in registers. Tried: tl.gather, which costs a shuffle for each 32 bins a cell might be in (1.5
# times slower). Reference: sea.add_cell_keys.
@triton.jit
def _cell_keys_kernel(x_ptr, gain_ptr, q_ptr, means_ptr, seen_ptr, count_ptr, products_ptr, parts_ptr, q_strides, H, R, n_level,
                      n_tile, softmax_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_t, d, p, offs_b = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_B)
    products_ptr += (tl.program_id(0).to(tl.int64) * BLOCK_T + offs_t)[:, None] * 2 * WIDTH
    for tile in range(tl.program_id(0), n_tile, tl.num_programs(0)):
        pid_bh = (tile // tl.cdiv(R, BLOCK_T)).to(tl.int64)
        b, h = pid_bh // H, pid_bh % H
        r = (tile % tl.cdiv(R, BLOCK_T) * BLOCK_T + offs_t).to(tl.int64)
        q = _tile(q_ptr + b * q_strides[0] + h * q_strides[1], r, d, q_strides[2], q_strides[3],
                  (r < R)[:, None] & (d < D)[None, :])  # (BLOCK_T, BLOCK_D)
        t = tl.load(seen_ptr + b * R + r, mask=r < R, other=0).to(tl.int32)
        level = _bin_level(t, 2 * WIDTH)
        lowest = 0 if count_ptr is None else _bin_level(tl.load(count_ptr + b).to(tl.int32), 2 * WIDTH)
        first = tl.maximum(tl.min(tl.where(t > 0, level, 64), axis=0), lowest)
        end = tl.minimum(tl.max(level, axis=0) + 1, lowest + n_level)
        of_head = means_ptr + (b * (H // GROUP) + h // GROUP) * n_level * 2 * WIDTH * D
        s = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
        for e in range(first, end):
            mine = (level == e) & (t > 0)
            for start in range(0, tl.max(tl.where(mine, t >> e, 0), axis=0), BLOCK_B):
                bin = start + offs_b
                mean = _tile(of_head, (e - lowest).to(tl.int64) * 2 * WIDTH + bin, d, D, 1,
                             (bin < 2 * WIDTH)[:, None] & (d < D)[None, :])  # (BLOCK_B, BLOCK_D)
                tl.store(products_ptr + bin[None, :], tl.dot(q, tl.trans(mean), input_precision="ieee"), mask=(bin < 2 * WIDTH)[None, :])
            tl.debug_barrier()
            take = mine[:, None] & (p < WIDTH)[None, :]
            s += tl.load(products_ptr + _bin_of_cell(p[None, :], t[:, None], e, WIDTH), mask=take, other=0.0)
            tl.debug_barrier()  # before other products come
        s = tl.where((p < WIDTH)[None, :], s * softmax_scale, -float("inf"))
        s = tl.maximum(s - tl.max(s, axis=1)[:, None], -32.0)
        there = (t > 0)[:, None] & (p < WIDTH)[None, :]
        x_ptrs = x_ptr + (pid_bh * R + r[:, None]) * WIDTH + p[None, :]
        x = tl.load(x_ptrs, mask=there, other=0.0).to(tl.float32)
        if BACKWARD:
            tl.store(parts_ptr + tile, tl.sum(tl.sum(x * s, axis=1), axis=0))
        else:
            tl.store(x_ptrs, (x + tl.load(gain_ptr + h).to(tl.float32) * s).to(x_ptr.dtype.element_ty), mask=there)


@triton.jit
def _bin_of_cell(p, t, e, WIDTH: tl.constexpr):
    """The bin of 2^e keys that the middle key of cell p is in, t (2 p + 1) // (2 WIDTH), or the last full one. t in two parts, since the
    product passes 2^31 at t = 1M, width 1024."""
    middle = t // (2 * WIDTH) * (2 * p + 1) + t % (2 * WIDTH) * (2 * p + 1) // (2 * WIDTH)
    return tl.minimum(middle >> e, tl.maximum(t >> e, 1) - 1)


# One token a sequence: its key added to its bin, the bins moved up a level where it begins one, and the scores of its row.
# One program: one key/value head and the query heads that share it; grid (B * Hkv,).
#   x (B, H, 1, WIDTH) contiguous, in place; gain (H,); q (B, H, 1, D), k (B, Hkv, 1, D), any strides; there (B,) int8 or None
#   seen (B, 1), count (B,) int; past and sums (B, Hkv, 2 * WIDTH, D) fp32, at the levels of count and after it
#   products (B * H, 2 * WIDTH) fp32 scratch: other threads want them
# fp32: everything, no dots. Reads and writes the bins once. Reference: sea.add_cell_keys.
@triton.jit
def _cell_keys_step_kernel(x_ptr, gain_ptr, q_ptr, k_ptr, there_ptr, seen_ptr, count_ptr, past_ptr, products_ptr, sums_ptr,
                           q_strides, k_strides, HKV, softmax_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                           BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_bh = tl.program_id(0).to(tl.int64)
    b, kv = pid_bh // HKV, pid_bh % HKV
    d, offs_b, p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_P)
    count, new = tl.load(count_ptr + b).to(tl.int32), 1
    if there_ptr is not None:
        new = (tl.load(there_ptr + b) != 0).to(tl.int32)
    level, last = _bin_level(count, 2 * WIDTH), _bin_level(count + new, 2 * WIDTH)
    k = _vector(k_ptr + b * k_strides[0] + kv * k_strides[1], d * k_strides[3], d < D)
    of_head = pid_bh * 2 * WIDTH * D
    for start in range(0, 2 * WIDTH, BLOCK_B):
        bin = start + offs_b
        there = (bin < 2 * WIDTH)[:, None] & (d < D)[None, :]
        old = (bin << (last - level))[:, None]
        at = past_ptr + of_head + old * D + d[None, :]
        x = tl.load(at, mask=there & (old < 2 * WIDTH), other=0.0)
        x += tl.load(at + D, mask=there & (old + 1 < 2 * WIDTH) & (last > level), other=0.0)
        x += tl.where((bin == (count >> last))[:, None] & (new != 0), k[None, :], 0.0)
        tl.store(sums_ptr + of_head + bin[:, None] * D + d[None, :], x, mask=there)
        mean = (x * tl.exp2(-last.to(tl.float32))).to(k_ptr.dtype.element_ty).to(tl.float32)
        for g in range(0, GROUP):
            q = _vector(q_ptr + b * q_strides[0] + (kv * GROUP + g) * q_strides[1], d * q_strides[3], d < D)
            products = tl.sum(mean * q[None, :], axis=1) * softmax_scale
            tl.store(products_ptr + (pid_bh * GROUP + g) * 2 * WIDTH + bin, products, mask=bin < 2 * WIDTH)
    tl.debug_barrier()
    t = tl.load(seen_ptr + b).to(tl.int32)
    at = _bin_of_cell(p, t, last, WIDTH)
    for g in range(0, GROUP):
        h = pid_bh * GROUP + g
        s = tl.load(products_ptr + h * 2 * WIDTH + at, mask=p < WIDTH, other=-float("inf"))
        s = tl.maximum(s - tl.max(s, axis=0), -32.0)
        x = _vector(x_ptr + h * WIDTH, p, p < WIDTH)
        gain = tl.load(gain_ptr + kv * GROUP + g).to(tl.float32)
        tl.store(x_ptr + h * WIDTH + p, (x + gain * s).to(x_ptr.dtype.element_ty), mask=(p < WIDTH) & (t > 0))


def _cell_keys_tiles(dtype: torch.dtype, width: int) -> dict:
    block_p, half = max(16, _next_power_of_2(width)), dtype != torch.float32  # "ieee" dots run without tensor cores
    return dict(BLOCK_T=16, BLOCK_B=64 if half else 32, BLOCK_P=block_p, num_warps=min(max(block_p // (128 if half else 64), 1), 16),
                num_stages=3 if half else 1)


CELL_KEYS_PROGRAMS = 528  # 4 on each of an H100's multiprocessors; more are slower there


def _cell_keys_launch(x, gain, q, means, row_seen, count, parts, softmax_scale):
    (B, H, R, D), width, (n_kv, n_level, _, _), tiles = q.shape, x.shape[-1], means.shape, _cell_keys_tiles(q.dtype, x.shape[-1])
    n_tile = _cdiv(R, tiles["BLOCK_T"]) * B * H
    n_program = min(n_tile, CELL_KEYS_PROGRAMS)
    products = torch.empty(n_program, tiles["BLOCK_T"], 2 * width, dtype=torch.float32, device=q.device)
    _cell_keys_kernel[(n_program,)](
        x, gain, q, means, row_seen, count, products, parts, q.stride(), H, R, n_level, n_tile, float(softmax_scale), GROUP=B * H // n_kv,
        D=D, WIDTH=width, BACKWARD=parts is not None, BLOCK_D=_power_of_2(D, q.dtype), **tiles)


class _AddCellKeys(torch.autograd.Function):
    """In place, since scores are the largest tensor of a layer."""

    @staticmethod
    def forward(ctx, scores, gain, q, means, row_seen, count, softmax_scale):
        ctx.mark_dirty(scores)
        ctx.save_for_backward(gain, q, means, row_seen, count)
        ctx.softmax_scale = softmax_scale
        _cell_keys_launch(scores, gain, q, means, row_seen, count, None, softmax_scale)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, dscores):
        gain, q, means, row_seen, count = ctx.saved_tensors
        (B, H, R, _), dscores = q.shape, dscores.contiguous()
        n_tile = _cdiv(R, _cell_keys_tiles(q.dtype, dscores.shape[-1])["BLOCK_T"])
        parts = torch.empty(B, H, n_tile, dtype=torch.float32, device=q.device)
        _cell_keys_launch(dscores, gain, q, means, row_seen, count, parts, ctx.softmax_scale)
        return dscores, parts.sum((0, 2)).to(gain.dtype), None, None, None, None, None


def add_cell_keys(scores: Tensor, gain: Tensor, q: Tensor, k: Tensor, row_seen: Tensor, softmax_scale: float, n_keys: int, *,
                  rank: Tensor | None = None, there: Tensor | None = None, past: Tensor | None = None,
                  count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sea.add_cell_keys, in place. The keys stand in the order of their ranks, without gaps between those that are there, and a
    row sees those of `count` at least, or none."""
    for name, x in (("scores", scores), ("q", q), ("k", k)):
        _check_tensor(name, x, 4, "(B, heads, tokens, D)")
    (B, H, R, D), (Hkv, N), width = q.shape, k.shape[1:3], scores.shape[-1]
    _expect(scores.shape[:3] == (B, H, R), "scores", f"shape (B, H, R, width) with B, H, R = {(B, H, R)}", tuple(scores.shape))
    _expect(width <= 2048, "scores", "a width of at most 2048, the cells of a row have to fit into registers", width)
    _expect(scores.is_contiguous(), "scores", "a contiguous tensor, to add to", f"strides {scores.stride()}")
    _expect(row_seen.shape == (B, R), "row_seen", f"shape (B, R) = {(B, R)}", tuple(row_seen.shape))
    n_bins, row_seen, gain = 2 * width, row_seen.contiguous(), gain.contiguous()
    q, k = q.detach(), k.detach()
    past, count = None if past is None else past.float().contiguous(), None if count is None else count.contiguous()
    sums = torch.empty(B, Hkv, n_bins, D, dtype=torch.float32, device=k.device)
    block_d = _next_power_of_2(D)
    if _is_step(q) and N == 1 and past is not None:
        products, block_p = torch.empty(B * H, n_bins, dtype=torch.float32, device=q.device), _next_power_of_2(width)
        with torch.cuda.device_of(q):
            _cell_keys_step_kernel[(B * Hkv,)](
                scores, gain, q, k, None if there is None else there.contiguous().view(torch.int8), row_seen, count, past, products,
                sums, q.stride(), k.stride(), Hkv, float(softmax_scale), GROUP=H // Hkv, D=D, WIDTH=width, BLOCK_P=block_p,
                BLOCK_B=min(2 * block_p, max(1, 16384 // block_d)), BLOCK_D=block_d, num_warps=16 if block_p * block_d > 4096 else 4)
        return scores, sums
    level = lambda n: max(0, n - 1).__floordiv__(n_bins).bit_length()
    # Rows of this call are of the level of count or later. N keys more are at most level(N) + 1 levels more.
    n_level = level(max(n_keys, N)) + 1 if count is None else min(level(n_keys), level(N) + 1) + 1
    first, new = count if rank is None else rank.expand(B, N)[:, 0].contiguous(), None
    if there is not None:
        new, there = there.sum(1), there.contiguous()
        if rank is not None and N > 1:
            place = there.int().argmax(1, keepdim=True)  # of any that is there
            first = (rank.expand(B, N).gather(1, place) - place)[:, 0].contiguous()
        there = there.view(torch.int8)
    means = torch.empty(B * Hkv, n_level, n_bins, D, dtype=k.dtype, device=k.device)
    with torch.cuda.device_of(q):
        _bin_keys_kernel[(_cdiv(n_bins, 16), n_level, B * Hkv)](
            k, first, there, count, new, past, means, sums, k.stride(), Hkv, N, D=D, N_BINS=n_bins, BLOCK_B=16, BLOCK_N=64,
            BLOCK_D=_power_of_2(D, k.dtype), num_warps=2, num_stages=3)
        return _AddCellKeys.apply(scores, gain, q, means, row_seen, count, softmax_scale), sums


# -- mix ---------------------------------------------------------------------------------------------------------------


# The sum of each block of BLOCK_T values; grid (n_block, B * Hkv). v and valid as below -> sums (B * Hkv, n_block, D) fp32.
@triton.jit
def _block_sums_kernel(v_ptr, valid_ptr, sums_ptr, v_strides, HKV, T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_t, n_block, pid_bh = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    b, kv = pid_bh // HKV, pid_bh % HKV
    i, d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    there = i < T
    if valid_ptr is not None:
        there &= tl.load(valid_ptr + b * T + i, mask=there, other=0) != 0
    v = _tile(v_ptr + b * v_strides[0] + kv * v_strides[1], i, d, v_strides[2], v_strides[3], there[:, None] & (d < D)[None, :])
    tl.store(sums_ptr + (pid_bh * n_block + pid_t) * D + d, tl.sum(v.to(tl.float32), axis=0), mask=d < D)


# out = s_mix * s_prob * sparse + (1 - s_mix) * mean of v over the keys <= i.
# One program: BLOCK_T queries of one head; grid (cdiv(T, BLOCK_T), B * H). The mean: the sum of the blocks before, given,
# and a product with a triangle of ones inside the block.
#   sparse (B, H, T, D) contiguous, v (B, Hkv, T, D) any strides, before (B * Hkv, n_block + 1, D) fp32; gates (B, H, R, 2)
#   before the sigmoid; seen and row (B, T) int, valid (B, T) int8 or None
#   out (B, H, T, D) contiguous
# fp32: all but the product, of exact ones. Reads and writes once. Reference: sea.mix_average.
@triton.jit
def _mix_kernel(sparse_ptr, v_ptr, before_ptr, gates_ptr, seen_ptr, row_ptr, valid_ptr, out_ptr, v_strides, H, GROUP, T, R,
                D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_t, n_block = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h, kv = pid_bh // H, pid_bh % H, pid_bh % H // GROUP
    i, d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    in_t = i < T
    at = in_t[:, None] & (d < D)[None, :]
    seen = tl.load(seen_ptr + b * T + i, mask=in_t, other=0)
    before_ptr += ((b * (H // GROUP) + kv) * (n_block + 1) + pid_t) * D
    mean = _running_mean(v_ptr + b * v_strides[0] + kv * v_strides[1], before_ptr, valid_ptr, v_strides, i, b * T + i, in_t, at,
                         seen, D, BLOCK_T, BLOCK_D)
    row = tl.load(row_ptr + b * T + i, mask=in_t, other=0)
    gate = gates_ptr + (pid_bh * R + row) * 2
    s_prob = tl.sigmoid(tl.load(gate, mask=in_t, other=0.0).to(tl.float32))[:, None]
    s_mix = tl.sigmoid(tl.load(gate + 1, mask=in_t, other=0.0).to(tl.float32))[:, None]
    sparse = _tile(sparse_ptr + pid_bh * T * D, i, d, D, 1, at).to(tl.float32)
    out = s_mix * s_prob * sparse + (1.0 - s_mix) * mean
    tl.store(out_ptr + (pid_bh * T + i[:, None]) * D + d[None, :], tl.where((seen > 0)[:, None], out, 0.0), mask=at)


@triton.jit
def _running_mean(v_ptr, before_ptr, valid_ptr, v_strides, i, of_query, in_t, at, seen, D: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Mean of v over the keys <= i of one head: (BLOCK_T, BLOCK_D) fp32."""
    d = tl.arange(0, BLOCK_D)
    v = _tile(v_ptr, i, d, v_strides[2], v_strides[3], at)
    if valid_ptr is not None:
        v = tl.where((tl.load(valid_ptr + of_query, mask=in_t, other=0) != 0)[:, None], v, 0.0)
    triangle = (tl.arange(0, BLOCK_T)[:, None] >= tl.arange(0, BLOCK_T)[None, :]).to(v.dtype)
    sums = tl.dot(triangle, v, input_precision="ieee") + _vector(before_ptr, d, d < D)[None, :]
    return sums / tl.maximum(seen, 1).to(tl.float32)[:, None]


# The same for one query a sequence. Besides out, sums (B, Hkv, D) fp32 = past + v.
# One program: one key/value head and the query heads that share it; grid (B * Hkv,). past as sums, or None for 0; the rest as
# above, with T = 1. fp32: everything. Reference: sea.mix_average.
@triton.jit
def _mix_step_kernel(sparse_ptr, v_ptr, past_ptr, gates_ptr, seen_ptr, row_ptr, valid_ptr, out_ptr, sums_ptr, v_strides, HKV, R,
                     GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_bh, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    b, kv = pid_bh // HKV, pid_bh % HKV
    total = _vector(v_ptr + b * v_strides[0] + kv * v_strides[1], d * v_strides[3], d < D)
    if valid_ptr is not None:
        total = tl.where(tl.load(valid_ptr + b) != 0, total, 0.0)
    if past_ptr is not None:
        total += _vector(past_ptr + pid_bh * D, d, d < D)
    tl.store(sums_ptr + pid_bh * D + d, total, mask=d < D)
    seen, row = tl.load(seen_ptr + b), tl.load(row_ptr + b).to(tl.int64)
    mean = total / tl.maximum(seen, 1).to(tl.float32)
    for i in range(0, GROUP):
        h = pid_bh * GROUP + i  # of all sequences
        s_prob = tl.sigmoid(tl.load(gates_ptr + (h * R + row) * 2).to(tl.float32))
        s_mix = tl.sigmoid(tl.load(gates_ptr + (h * R + row) * 2 + 1).to(tl.float32))
        out = s_mix * s_prob * _vector(sparse_ptr + h * D, d, d < D) + (1.0 - s_mix) * mean
        tl.store(out_ptr + h * D + d, tl.where(seen > 0, out, 0.0).to(out_ptr.dtype.element_ty), mask=d < D)


def _mix_average_step(sparse, v, gates, past, seen, row, valid):
    (B, H, _, D), Hkv = sparse.shape, v.shape[1]
    out = torch.empty(B, H, 1, D, dtype=sparse.dtype, device=sparse.device)
    sums = torch.empty(B, Hkv, D, dtype=torch.float32, device=v.device)
    past = None if past is None else past.float().contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.int8)
    _mix_step_kernel[(B * Hkv,)](sparse.contiguous(), v, past, gates.contiguous(), seen.contiguous(), row.contiguous(), valid, out,
                                 sums, v.stride(), Hkv, gates.shape[2], GROUP=H // Hkv, D=D, BLOCK_D=_next_power_of_2(D),
                                 num_warps=1)
    return out, sums


# With w_i = (1 - s_mix) * do / seen: dsparse = s_mix s_prob do, dv_j = sum over i >= j of w_i, and the gates' gradients.
# One program: BLOCK_T queries of the heads that share one key/value head; grid (cdiv(T, BLOCK_T), B * Hkv). Two launches:
# the first (after_ptr None) writes dsparse, dgates and the sum of w over the block, the second dv.
#   do (B, H, T, D) any strides; dsparse (B, H, T, D), dgates (B, H, T, 2) fp32, per query; w_sums (B * Hkv, n_block, D) fp32;
#   after (B * Hkv, n_block + 1, D) fp32: sum of w from each block on; dv (B, Hkv, T, D): all contiguous
# fp32: all but the product. Reference: autograd through sea.mix_average.
@triton.jit
def _mix_bwd_kernel(sparse_ptr, v_ptr, before_ptr, gates_ptr, seen_ptr, row_ptr, valid_ptr, do_ptr, dsparse_ptr, dgates_ptr,
                    w_sums_ptr, after_ptr, dv_ptr, v_strides, do_strides, H, GROUP, T, R, D: tl.constexpr,
                    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    pid_t, n_block = tl.program_id(0), tl.num_programs(0)
    pid_bh, HKV = tl.program_id(1).to(tl.int64), H // GROUP
    b, kv = pid_bh // HKV, pid_bh % HKV
    i, d = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    in_t = i < T
    at = in_t[:, None] & (d < D)[None, :]
    seen = tl.load(seen_ptr + b * T + i, mask=in_t, other=0)
    row = tl.load(row_ptr + b * T + i, mask=in_t, other=0)
    if after_ptr is None:
        mean = _running_mean(v_ptr + b * v_strides[0] + kv * v_strides[1], before_ptr + (pid_bh * (n_block + 1) + pid_t) * D,
                             valid_ptr, v_strides, i, b * T + i, in_t, at, seen, D, BLOCK_T, BLOCK_D)
    w = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for n in range(0, GROUP):
        of_head = b * H + kv * GROUP + n
        do = _tile(do_ptr + b * do_strides[0] + (kv * GROUP + n) * do_strides[1], i, d, do_strides[2], do_strides[3], at)
        do = tl.where((seen > 0)[:, None], do.to(tl.float32), 0.0)
        gate = gates_ptr + (of_head * R + row) * 2
        s_mix = tl.sigmoid(tl.load(gate + 1, mask=in_t, other=0.0).to(tl.float32))
        w += (1.0 - s_mix)[:, None] * do
        if after_ptr is None:
            s_prob = tl.sigmoid(tl.load(gate, mask=in_t, other=0.0).to(tl.float32))
            sparse = _tile(sparse_ptr + of_head * T * D, i, d, D, 1, at).to(tl.float32)
            tl.store(dsparse_ptr + (of_head * T + i)[:, None] * D + d[None, :], (s_mix * s_prob)[:, None] * do, mask=at)
            do_sparse, do_mean = tl.sum(do * sparse, axis=1), tl.sum(do * mean, axis=1)
            dgate = dgates_ptr + (of_head * T + i) * 2
            tl.store(dgate, s_mix * do_sparse * s_prob * (1.0 - s_prob), mask=in_t)
            tl.store(dgate + 1, (s_prob * do_sparse - do_mean) * s_mix * (1.0 - s_mix), mask=in_t)
    w /= tl.maximum(seen, 1).to(tl.float32)[:, None]
    if after_ptr is None:
        tl.store(w_sums_ptr + (pid_bh * n_block + pid_t) * D + d, tl.sum(w, axis=0), mask=d < D)
    else:
        dtype = dv_ptr.dtype.element_ty
        triangle = (tl.arange(0, BLOCK_T)[:, None] <= tl.arange(0, BLOCK_T)[None, :]).to(dtype)
        dv = tl.dot(triangle, w.to(dtype), input_precision="ieee")
        dv += _vector(after_ptr + (pid_bh * (n_block + 1) + pid_t + 1) * D, d, d < D)[None, :]
        if valid_ptr is not None:
            dv = tl.where((tl.load(valid_ptr + b * T + i, mask=in_t, other=0) != 0)[:, None], dv, 0.0)
        tl.store(dv_ptr + (pid_bh * T + i)[:, None] * D + d[None, :], dv, mask=at)


# out[r] = sum of x over the queries of row r, neighbours since `row` does not fall.
# One program: BLOCK rows of one head, a query of each at a time; grid (cdiv(R, BLOCK), B * H).
# x (B, H, T, 2), ends (B, R) int: the first query after row r -> out (B, H, R, 2), fp32, contiguous. In a fixed order.
@triton.jit
def _sum_rows_kernel(x_ptr, ends_ptr, out_ptr, H, T, R, BLOCK: tl.constexpr):
    pid_bh, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ends_ptr += pid_bh // H * R + r
    end = tl.load(ends_ptr, mask=r < R, other=0)
    begin = tl.load(ends_ptr - 1, mask=(r < R) & (r > 0), other=0)
    two = tl.arange(0, 2)[None, :]
    total = tl.zeros((BLOCK, 2), tl.float32)
    for n in range(0, tl.max(end - begin, axis=0)):
        at = begin + n
        total += tl.load(x_ptr + (pid_bh * T + at)[:, None] * 2 + two, mask=(at < end)[:, None], other=0.0)
    tl.store(out_ptr + (pid_bh * R + r)[:, None] * 2 + two, total, mask=(r < R)[:, None])


MIX = dict(BLOCK_T=64, num_warps=4)


class _MixAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sparse, v, gates, past, seen, row, valid):
        (B, H, T, D), Hkv = sparse.shape, v.shape[1]
        sparse, gates, seen, row = (x.contiguous() for x in (sparse, gates, seen, row))
        n_block = _cdiv(T, MIX["BLOCK_T"])
        valid = None if valid is None else valid.contiguous().view(torch.int8)
        sums = torch.empty(B * Hkv, n_block, D, dtype=torch.float32, device=v.device)
        _block_sums_kernel[(n_block, B * Hkv)](v, valid, sums, v.stride(), Hkv, T, D=D, BLOCK_D=_power_of_2(D, v.dtype), **MIX)
        before = _running_sums(sums, None if past is None else past.flatten(0, 1))  # what precedes each block, and all
        out = torch.empty(sparse.shape, dtype=sparse.dtype, device=sparse.device)
        _mix_kernel[(n_block, B * H)](sparse, v, before, gates, seen, row, valid, out, v_strides=v.stride(), H=H, GROUP=H // Hkv,
                                      T=T, R=gates.shape[2], D=D, BLOCK_D=_power_of_2(D, v.dtype), **MIX)
        ctx.save_for_backward(sparse, v, gates, before, seen, row, valid)
        return out, before[:, -1].view(B, Hkv, D).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dsum):
        sparse, v, gates, before, seen, row, valid = ctx.saved_tensors
        (B, H, T, D), Hkv, R = sparse.shape, v.shape[1], gates.shape[2]
        n_block = before.shape[1] - 1
        new = lambda *size, dtype=torch.float32: torch.empty(*size, dtype=dtype, device=v.device)
        dsparse, dv = new(B, H, T, D, dtype=sparse.dtype), new(B, Hkv, T, D, dtype=v.dtype)
        per_query, w_sums, dgates = new(B, H, T, 2), new(B * Hkv, n_block, D), new(B, H, R, 2)
        after, grid = None, (n_block, B * Hkv)
        for _ in range(2):
            _mix_bwd_kernel[grid](sparse, v, before, gates, seen, row, valid, do, dsparse, per_query, w_sums, after, dv,
                                  v_strides=v.stride(), do_strides=do.stride(), H=H, GROUP=H // Hkv, T=T, R=R, D=D,
                                  BLOCK_D=_power_of_2(D, v.dtype), **MIX)
            after = _running_sums(w_sums, dsum.flatten(0, 1), reverse=True) if after is None else after
        ends = torch.searchsorted(row, torch.arange(R, device=row.device, dtype=row.dtype).expand(B, R).contiguous(), right=True)
        _sum_rows_kernel[(_cdiv(R, 64), B * H)](per_query, ends, dgates, H, T, R, BLOCK=64)
        dpast = after[:, 0].view(dsum.shape) if ctx.needs_input_grad[3] else None
        return dsparse, dv, dgates.to(gates.dtype), dpast, None, None, None


def mix_average(sparse: Tensor, v: Tensor, gates: Tensor, seen: Tensor, row: Tensor, valid: Tensor | None = None,
                past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sea.mix_average. Gradients are summed in a fixed order, so `row` must not fall from one query to the next."""
    _check_tensor("sparse", sparse, 4, "(B, H, T, D)")
    run = _mix_average_step if _is_step(sparse) else _MixAverage.apply
    with torch.cuda.device_of(v):
        return run(sparse, v, gates, past, seen, row, valid)
