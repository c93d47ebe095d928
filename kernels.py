"""SEA on the GPU: the operations of sea.py that cost time, in Triton, forward and backward.

Same names, signatures and results as in sea.py, whose docstrings say what each computes, and whose glossary says what
the letters mean. Copy this file away and it works: it needs torch and Triton only. Layout is (B, H, T, D). Softmax
statistics, sums and accumulators are fp32 whatever the input is; inputs are fp16, bf16 or fp32 and may be strided.

A mask of cells is packed to one bit a cell (CellBits): 32 bytes a query and head at width 256. It is never expanded.
"""

import importlib.metadata
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Gradients of k and v: True adds them up in a fixed order, bit-equal from run to run; False uses atomic additions, which
# need no sorted lists and no wait for the GPU.
DETERMINISTIC = True

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; with -inf, exp2 of (-inf) - (-inf) would be nan


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


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


def _check_tensor(name: str, x: Tensor, n_dim: int, shape: str) -> None:
    _expect(x.ndim == n_dim, name, f"shape {shape}", tuple(x.shape))
    _expect(x.dtype in (torch.float32, torch.float16, torch.bfloat16), name, "float32, float16 or bfloat16", x.dtype)
    _expect(x.is_cuda or triton.knobs.runtime.interpret, name, "a CUDA tensor", f"one on {x.device}")


# -- masks of cells, packed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellBits:
    """A mask of cells, one bit each: cell p is bit p % 32 of word p // 32. Stands for a bool mask (B, H, R, width)."""

    bits: Tensor  # (B, H, R, ceil(width / 32)) int32
    width: int

    def __post_init__(self):
        words = -(-self.width // 32)
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
    bits = torch.empty(*mask.shape[:3], -(-width // 32), dtype=torch.int32, device=mask.device)
    _pack_kernel[(triton.cdiv(bits.numel(), 128),)](mask.contiguous().view(torch.int8), bits, bits.numel(), WIDTH=width,
                                                    WORDS=bits.shape[-1], BLOCK=128)
    return CellBits(bits, width)


def unpack_mask(cells: CellBits) -> Tensor:
    """CellBits -> bool (B, H, R, width)."""
    on = (cells.bits[..., None] >> torch.arange(32, device=cells.bits.device, dtype=torch.int32)) & 1
    return on.flatten(-2)[..., : cells.width].bool()


# -- causal linear attention -------------------------------------------------------------------------------------------
#
# c_i = sum_j (q_i . k_j) v_j / sum_j (q_i . k_j) over the keys j < (i+1) * stride. Rows and keys are cut into chunks: what
# came in earlier chunks enters through a state, the sum of k_j v_j^T (m x E), the rest of the chunk directly. The output
# and all gradients are the same product with other factors, so one kernel computes the four of them, with g = dc / den and
# g_den = -rowsum(g c):
#
#            x   y   z   over               state                        extra
#     c den  q   k   v   keys before row    sum k v^T    of chunks before
#     dq     g   v   k   keys before row    its transpose                g_den of the row: s += g_den_i
#     dk     v   g   q   rows after key     sum g q^T    of chunks after g_den of the row: s += g_den_i
#     dv     k   q   g   rows after key     its transpose


def _linear_attention_tiles() -> dict:
    """Tile sizes (>= 16) and launch options. Dots are as exact as torch's own fp32 matmuls are set to be."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return dict(PRECISION=precision, BLOCK_X=32, BLOCK_Y=32, BLOCK_C=32, BLOCK_F=64, num_warps=4, num_stages=2)


@triton.jit
def _load_rows(ptr, stride, at, mask, cols, n_col):
    """Rows `at`, columns `cols` of one head, fp32, 0 where masked: (rows, cols)."""
    ptr += at[:, None].to(tl.int64) * stride[2] + cols[None, :] * stride[3]
    return tl.load(ptr, mask=mask[:, None] & (cols < n_col)[None, :], other=0.0).to(tl.float32)


# sums[n] = sum over the rows of chunk n of x y^T, and weighted[n] = that of x w (w = 1 if None).
# One program: BLOCK_C x BLOCK_F of one chunk; grid (n_chunk, B * H, tiles of C x F).
#   x (B, H, L, C), y (B, H, L, F) any strides; w (B, H, L) fp32 contiguous
#   sums (B, H, n, C, F), weighted (B, H, n, C) fp32, the batch and head strides given, contiguous within
# Reads x and y once or a few times; eager copies them, padded and with a column of ones. Reference: k.mT @ v in
# sea.linear_attention.
@triton.jit
def _chunk_sums_kernel(x_ptr, y_ptr, w_ptr, sums_ptr, weighted_ptr, x_stride, y_stride, sums_stride, weighted_stride, H,
                       n_row, CHUNK: tl.constexpr, C: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
                       BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    chunk, pid_bh, pid_cf = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    cols_c = pid_cf // tl.cdiv(F, BLOCK_F) * BLOCK_C + tl.arange(0, BLOCK_C)
    cols_f = pid_cf % tl.cdiv(F, BLOCK_F) * BLOCK_F + tl.arange(0, BLOCK_F)
    x_ptr += b * x_stride[0] + h * x_stride[1]
    y_ptr += b * y_stride[0] + h * y_stride[1]
    acc, acc_w = tl.zeros((BLOCK_C, BLOCK_F), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, CHUNK, BLOCK_Y):
        local = start + tl.arange(0, BLOCK_Y)
        at = chunk * CHUNK + local
        mask = (local < CHUNK) & (at < n_row)
        x = _load_rows(x_ptr, x_stride, at, mask, cols_c, C)  # (BLOCK_Y, BLOCK_C)
        y = _load_rows(y_ptr, y_stride, at, mask, cols_f, F)  # (BLOCK_Y, BLOCK_F)
        acc += tl.dot(tl.trans(x), y, input_precision=PRECISION)
        if w_ptr is None:
            acc_w += tl.sum(x, axis=0)
        else:
            w = tl.load(w_ptr + pid_bh.to(tl.int64) * n_row + at, mask=mask, other=0.0)
            acc_w += tl.sum(x * w[:, None], axis=0)
    sums_ptr += b * sums_stride[0] + h * sums_stride[1] + chunk.to(tl.int64) * C * F
    tl.store(sums_ptr + cols_c[:, None] * F + cols_f[None, :], acc, mask=(cols_c < C)[:, None] & (cols_f < F)[None, :])
    if pid_cf % tl.cdiv(F, BLOCK_F) == 0:
        weighted_ptr += b * weighted_stride[0] + h * weighted_stride[1] + chunk.to(tl.int64) * C
        tl.store(weighted_ptr + cols_c, acc_w, mask=cols_c < C)


# out = (x y^T + extra, masked) z + x state, the table above; with den: out / den, den = rowsum of the same + x state_extra.
# One program: BLOCK_X rows of x in one chunk, BLOCK_F columns; grid (n_chunk * blocks of a chunk, B * Hx, blocks of F).
#   x (B, Hx, x_len, C); y (B, Hy, y_len, C), z (B, Hy, y_len, F), any strides: one of Hx, Hy is H, the other Hkv
#   extra (B, H, R) fp32 contiguous, or None; den (B, Hx, x_len) fp32 contiguous, or None
#   state (B, Hkv, n, C, F), state_extra (B, Hkv, n, C if den else F) or None, fp32, any strides
#   out (B, Hx, x_len, F) contiguous
# fp32 throughout. Nothing of size chunk x chunk or with a column of ones is written, as eager does. Deterministic.
# Reference: sea.linear_attention and autograd through it.
@triton.jit
def _causal_product_kernel(x_ptr, y_ptr, z_ptr, extra_ptr, state_ptr, state_extra_ptr, out_ptr, den_ptr, x_stride, y_stride,
                           z_stride, state_stride, state_extra_stride, HX, x_len, y_len, STRIDE: tl.constexpr,
                           REVERSE: tl.constexpr, X_CHUNK: tl.constexpr, Y_CHUNK: tl.constexpr, X_PER_Y: tl.constexpr,
                           Y_PER_X: tl.constexpr, C: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
                           BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    pid_x, pid_bh, pid_f = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pid_bh // HX).to(tl.int64), (pid_bh % HX).to(tl.int64)
    chunk, first_x = pid_x // tl.cdiv(X_CHUNK, BLOCK_X), pid_x % tl.cdiv(X_CHUNK, BLOCK_X) * BLOCK_X
    local_x = first_x + tl.arange(0, BLOCK_X)
    at_x, cols_f = chunk * X_CHUNK + local_x, pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_x = (local_x < X_CHUNK) & (at_x < x_len)
    of_x = pid_bh.to(tl.int64) * x_len + at_x
    x_ptr += b * x_stride[0] + h * x_stride[1]
    acc, den = tl.zeros((BLOCK_X, BLOCK_F), tl.float32), tl.zeros((BLOCK_X,), tl.float32)

    # -- other chunks
    state_ptr += b * state_stride[0] + h // X_PER_Y * state_stride[1] + chunk.to(tl.int64) * state_stride[2]
    if state_extra_ptr is not None:
        state_extra_ptr += b * state_extra_stride[0] + h // X_PER_Y * state_extra_stride[1]
        state_extra_ptr += chunk.to(tl.int64) * state_extra_stride[2]
    for start in range(0, C, BLOCK_C):
        cols_c = start + tl.arange(0, BLOCK_C)
        x = _load_rows(x_ptr, x_stride, at_x, mask_x, cols_c, C)  # (BLOCK_X, BLOCK_C)
        state = tl.load(state_ptr + cols_c[:, None] * state_stride[3] + cols_f[None, :] * state_stride[4],
                        mask=(cols_c < C)[:, None] & (cols_f < F)[None, :], other=0.0)  # (BLOCK_C, BLOCK_F)
        acc += tl.dot(x, state, input_precision=PRECISION)
        if den_ptr is not None:
            weight = tl.load(state_extra_ptr + cols_c * state_extra_stride[3], mask=cols_c < C, other=0.0)
            den += tl.sum(x * weight[None, :], axis=1)
    if extra_ptr is not None:
        state = tl.load(state_extra_ptr + cols_f * state_extra_stride[3], mask=cols_f < F, other=0.0)
        if REVERSE:
            acc += state[None, :]
        else:
            acc += tl.load(extra_ptr + of_x, mask=mask_x, other=0.0)[:, None] * state[None, :]

    # -- the same chunk
    if REVERSE:
        first_y, end_y = first_x // STRIDE // BLOCK_Y * BLOCK_Y, Y_CHUNK
    else:
        first_y, end_y = 0, tl.minimum(Y_CHUNK, (first_x + BLOCK_X) * STRIDE)
    for g in range(Y_PER_X):
        hy = h // X_PER_Y * Y_PER_X + g
        y_head, z_head = y_ptr + b * y_stride[0] + hy * y_stride[1], z_ptr + b * z_stride[0] + hy * z_stride[1]
        for start_y in range(first_y, end_y, BLOCK_Y):
            local_y = start_y + tl.arange(0, BLOCK_Y)
            at_y = chunk * Y_CHUNK + local_y
            mask_y = (local_y < Y_CHUNK) & (at_y < y_len)
            s = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
            for start in range(0, C, BLOCK_C):
                cols_c = start + tl.arange(0, BLOCK_C)
                x = _load_rows(x_ptr, x_stride, at_x, mask_x, cols_c, C)  # (BLOCK_X, BLOCK_C)
                y = _load_rows(y_head, y_stride, at_y, mask_y, cols_c, C)  # (BLOCK_Y, BLOCK_C)
                s += tl.dot(x, tl.trans(y), input_precision=PRECISION)
            if REVERSE:
                before = local_x[:, None] < (local_y[None, :] + 1) * STRIDE
                if extra_ptr is not None:
                    of_y = (b * HX * Y_PER_X + hy) * y_len + at_y
                    s += tl.load(extra_ptr + of_y, mask=mask_y, other=0.0)[None, :]
            else:
                before = local_y[None, :] < (local_x[:, None] + 1) * STRIDE
                if extra_ptr is not None:
                    s += tl.load(extra_ptr + of_x, mask=mask_x, other=0.0)[:, None]
            s = tl.where(before & mask_y[None, :], s, 0.0)
            den += tl.sum(s, axis=1)
            z = _load_rows(z_head, z_stride, at_y, mask_y, cols_f, F)  # (BLOCK_Y, BLOCK_F)
            acc += tl.dot(s, z, input_precision=PRECISION)
    # -- write back
    if den_ptr is not None:
        acc = acc / tl.where(den == 0, 1.0, den)[:, None]
        tl.store(den_ptr + of_x, den, mask=mask_x & (pid_f == 0))
    tl.store(out_ptr + of_x[:, None] * F + cols_f[None, :], acc.to(out_ptr.dtype.element_ty),
             mask=mask_x[:, None] & (cols_f < F)[None, :])


def _chunk_sums(x: Tensor, y: Tensor, w: Tensor | None, chunk: int, sums: Tensor, weighted: Tensor) -> None:
    """Fill sums (B, H, n, C, F) and weighted (B, H, n, C), slices of contiguous tensors."""
    (B, H, n_row, C), F, n_chunk = x.shape, y.shape[3], sums.shape[2]
    tiles = _linear_attention_tiles()
    tiles.pop("BLOCK_X")
    n_tile = triton.cdiv(C, tiles["BLOCK_C"]) * triton.cdiv(F, tiles["BLOCK_F"])
    _chunk_sums_kernel[(n_chunk, B * H, n_tile)](x, y, w, sums, weighted, x.stride(), y.stride(), sums.stride()[:2],
                                                 weighted.stride()[:2], H, n_row, CHUNK=chunk, C=C, F=F, **tiles)


def _causal_product(x, y, z, extra, state, state_extra, out, den, chunks: tuple[int, int], stride: int, reverse: bool) -> None:
    (B, HX, x_len, C), HY, y_len, F = x.shape, y.shape[1], y.shape[2], z.shape[3]
    tiles, (x_chunk, y_chunk) = _linear_attention_tiles(), chunks
    grid = (state.shape[2] * triton.cdiv(x_chunk, tiles["BLOCK_X"]), B * HX, triton.cdiv(F, tiles["BLOCK_F"]))
    _causal_product_kernel[grid](
        x, y, z, extra, state, state_extra, out, den, x.stride(), y.stride(), z.stride(), state.stride(),
        (0, 0, 0, 0) if state_extra is None else state_extra.stride(), HX, x_len, y_len, STRIDE=stride, REVERSE=reverse,
        X_CHUNK=x_chunk, Y_CHUNK=y_chunk, X_PER_Y=max(1, HX // HY), Y_PER_X=max(1, HY // HX), C=C, F=F, **tiles)


def _states(k, v, past, rows, n_chunk):
    """The state before each chunk of keys and after the last: (B, Hkv, n+1, m, E), and that of ones (B, Hkv, n+1, m)."""
    B, Hkv, _, m, E = *k.shape, v.shape[3]
    state = torch.empty(B, Hkv, n_chunk + 1, m, E, dtype=torch.float32, device=k.device)
    state_k = torch.empty(B, Hkv, n_chunk + 1, m, dtype=torch.float32, device=k.device)
    state[:, :, 0] = 0 if past is None else past[..., :-1]
    state_k[:, :, 0] = 0 if past is None else past[..., -1]
    _chunk_sums(k, v, None, rows, state[:, :, 1:], state_k[:, :, 1:])
    return state.cumsum_(2), state_k.cumsum_(2)


def _linear_attention_fwd(q, k, v, past, stride, rows, n_chunk):
    (B, H, R, m), E = q.shape, v.shape[3]
    state, state_k = _states(k, v, past, rows * stride, n_chunk)
    c = torch.empty(B, H, R, E, dtype=q.dtype, device=q.device)
    den = torch.empty(B, H, R, dtype=torch.float32, device=q.device)
    _causal_product(q, k, v, None, state[:, :, :-1], state_k[:, :, :-1], c, den, (rows, rows * stride), stride, False)
    return c, den, torch.cat([state[:, :, -1], state_k[:, :, -1, :, None]], -1).to(v.dtype)


def _linear_attention_bwd(q, k, v, past, c, den, dc, dsums, stride, rows, n_chunk):
    (B, H, R, m), (Hkv, E) = q.shape, (v.shape[1], v.shape[3])
    g = (dc.float() / den.where(den != 0, 1)[..., None]).contiguous()  # (B, H, R, E)
    g_den = -(g * c).sum(-1)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    state, state_k = _states(k, v, past, rows * stride, n_chunk)
    _causal_product(g, v, k, g_den, state[:, :, :-1].mT, state_k[:, :, :-1], dq, None, (rows, rows * stride), stride, False)

    # -- the same sums of queries, from the end: after each chunk, for the keys before
    after = torch.empty(B, H, n_chunk, m, E, dtype=torch.float32, device=q.device)
    after_den = torch.empty(B, H, n_chunk, m, dtype=torch.float32, device=q.device)
    _chunk_sums(q, g, g_den, rows, after, after_den)
    last = dsums.float()
    after = torch.cat([last[:, :, None, :, :-1], after.view(B, Hkv, -1, n_chunk, m, E).sum(2).flip(2)], 2).cumsum(2).flip(2)
    after_den = torch.cat([last[:, :, None, :, -1], after_den.view(B, Hkv, -1, n_chunk, m).sum(2).flip(2)], 2).cumsum(2).flip(2)
    _causal_product(v, g, q, g_den, after[:, :, 1:].mT, after_den[:, :, 1:], dk, None, (rows * stride, rows), stride, True)
    _causal_product(k, q, g, None, after[:, :, 1:], None, dv, None, (rows * stride, rows), stride, True)
    dpast = None if past is None else torch.cat([after[:, :, 0], after_den[:, :, 0, :, None]], -1).to(past.dtype)
    return dq, dk, dv, dpast


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, past, *constants):
        c, den, sums = _linear_attention_fwd(q, k, v, past, *constants)
        ctx.save_for_backward(q, k, v, past, c, den)
        ctx.constants = constants
        return c, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dc, dsums):
        return *_linear_attention_bwd(*ctx.saved_tensors, dc, dsums, *ctx.constants), None, None, None


def linear_attention(q_feat: Tensor, k_feat: Tensor, v: Tensor, *, causal: bool = True, stride: int = 1,
                     past: Tensor | None = None, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """sea.linear_attention. Sums and products are fp32; if not causal, two matmuls are all, and torch does them."""
    for name, x in (("q_feat", q_feat), ("k_feat", k_feat), ("v", v)):
        _check_tensor(name, x, 4, "(B, heads, tokens, m or E)")
        _expect(x.dtype == q_feat.dtype, name, f"dtype {q_feat.dtype} as q_feat", x.dtype)
        _expect(x.device == q_feat.device, name, f"device {q_feat.device} as q_feat", x.device)
    (B, H, R, m), (Hkv, S), E = q_feat.shape, k_feat.shape[1:3], v.shape[3]
    _expect(k_feat.shape[0] == B and k_feat.shape[3] == m, "k_feat", f"a batch of {B} and {m} features as q_feat",
            tuple(k_feat.shape))
    _expect(H % Hkv == 0, "k_feat", f"a number of heads that divides q_feat's {H}", Hkv)
    _expect(v.shape[:3] == k_feat.shape[:3], "v", f"shape {(B, Hkv, S, 'E')} as k_feat", tuple(v.shape))
    _expect(isinstance(stride, int) and stride >= 1, "stride", "an integer >= 1", stride)
    _expect(isinstance(chunk, int) and chunk >= 1, "chunk", "an integer >= 1", chunk)
    if not causal:
        with torch.autocast(v.device.type, enabled=False):
            sums = k_feat.mT @ F.pad(v, (0, 1), value=1.0)  # (B, Hkv, m, E+1)
            c = q_feat @ sums.repeat_interleave(H // Hkv, dim=1)
            return c[..., :-1] / c[..., -1:].where(c[..., -1:] != 0, 1), sums
    _expect(past is None or past.shape == (B, Hkv, m, E + 1), "past", f"shape {(B, Hkv, m, E + 1)}",
            None if past is None else tuple(past.shape))
    rows = max(1, chunk // stride)
    n_chunk = max(-(-R // rows), -(-S // (rows * stride)))
    with torch.cuda.device_of(v):
        return _LinearAttention.apply(q_feat, k_feat, v, past, stride, rows, n_chunk)


# -- grouped top-k -----------------------------------------------------------------------------------------------------


# The best n = round(HEADS * topk * width / seen) of the HEADS x width cells of one query, as bits; ties to the lower index.
# One program: the cells that compete, all in registers; grid (R, B * H / HEADS).
#   x (B, H, R, width), any strides: probabilities, or scores if SOFTMAX; seen (B, R) int -> bits (B, H, R, words) int32
# The order of floats is that of their bits as integers (with those of negative ones turned round), so the n-th largest is
# found by bisection over integers: exact, no sort. fp32: softmax. Reads x once and writes a bit a cell, where eager writes
# the softmax, sorts it and keeps an int64 index a cell. Limits: HEADS * width, each padded to a power of two, <= 32768.
# Reference: sea.topk_mask, bit for bit given the same probabilities; SOFTMAX may order cells closer than its rounding
# differently.
@triton.jit
def _select_kernel(x_ptr, seen_ptr, bits_ptr, x_stride, H, R, budget, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                   WORDS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, SOFTMAX: tl.constexpr):
    r, first = tl.program_id(0), tl.program_id(1) * HEADS
    b, h = (first // H).to(tl.int64), first % H
    offs_h, offs_p = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_P)
    there = (offs_h < HEADS)[:, None] & (offs_p < WIDTH)[None, :]
    # (BLOCK_H, BLOCK_P)
    x_ptr += b * x_stride[0] + (h + offs_h)[:, None].to(tl.int64) * x_stride[1] + r.to(tl.int64) * x_stride[2]
    x = tl.load(x_ptr + offs_p[None, :] * x_stride[3], mask=there, other=0.0).to(tl.float32)
    if SOFTMAX:
        x = tl.where((offs_p < WIDTH)[None, :], x, -float("inf"))
        x = tl.exp(x - tl.max(x, axis=1)[:, None])
        x = x / tl.sum(x, axis=1)[:, None]
    key = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    low, high = tl.min(tl.min(tl.where(there, key, 0x7FFFFFFF), axis=1), axis=0), -0x80000000
    key = tl.reshape(tl.where(there, key, high), (BLOCK_H * BLOCK_P,))

    # -- bisection: `low` is reached by `count` >= n cells, `high` by fewer than n
    seen = tl.load(seen_ptr + b * R + r).to(tl.int64)
    t = tl.maximum(seen, 1)
    n = tl.minimum(tl.maximum((budget + t) // (2 * t), 1), HEADS * WIDTH).to(tl.int32)
    high = tl.max(key, axis=0) + 1
    count = n * 0 + HEADS * WIDTH
    while (count != n) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, and low + high may not fit
        reached = tl.sum((key >= middle).to(tl.int32), axis=0)
        enough = reached >= n
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        count = tl.where(enough, reached, count)
    keep = key >= low
    if count != n:  # more cells than wanted equal the n-th largest
        tie = key == low
        n_tie = n - tl.sum((key > low).to(tl.int32), axis=0)
        keep = (key > low) | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= n_tie))

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
    block_h, block_p = triton.next_power_of_2(heads), max(32, triton.next_power_of_2(width))
    _expect(block_h * block_p <= 32768, "probs", "at most 32768 cells that compete, heads and width padded to powers of two",
            block_h * block_p)
    bits = torch.empty(B, H, R, -(-width // 32), dtype=torch.int32, device=x.device)
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
# The queries of one head are cut into tiles of BLOCK_M, the keys into blocks of BLOCK_N. A plan says which blocks a tile
# has to visit: those under the union of its queries' cells, as runs of neighbouring blocks that do not overlap. So each
# (query, key) pair is met at most once, and where cells are narrower than a block (early causal queries) a tile becomes an
# ordinary dense one. Inside a block, a query's own bits decide. Work and memory are linear in T for a constant budget.


def _attention_tiles(dtype: torch.dtype, d_head: int) -> dict:
    """Tile sizes and launch options of the attention kernels. BLOCK_M and BLOCK_N >= 16, as tl.dot wants."""
    if dtype == torch.float32:  # "ieee" dots run without tensor cores: small tiles keep them in registers
        return dict(BLOCK_M=16, BLOCK_N=16 if d_head > 64 else 32, num_warps=4, num_stages=1)
    return dict(BLOCK_M=16, BLOCK_N=32, num_warps=2 if d_head <= 64 else 4, num_stages=3 if d_head <= 64 else 2)


PAIRS_PER_PROGRAM = 64  # (tile, key block) pairs that one program of the dk, dv kernel adds up, at least


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _first_key(p, t, WIDTH: tl.constexpr):
    """lo(p) = (2 t p + width) // (2 width), in int64: 2 t p passes 2^31 at t = 1M, width 1024."""
    return (2 * t.to(tl.int64) * p + WIDTH) // (2 * WIDTH)


@triton.jit
def _cell_of_key(t, j, WIDTH: tl.constexpr):
    """cell(j, t) = ((2 j + 1) width - 1) // (2 t), and what is left of that division. Shapes broadcast.

    Without the slow integer division: an fp32 guess, wrong by at most one, and its exact remainder. The products may wrap
    around int32; the remainder is small, so it is right nevertheless.
    """
    cell = ((j.to(tl.float32) + 0.5) * (WIDTH / tl.maximum(t, 1).to(tl.float32))).to(tl.int32)
    rest = (2 * j + 1) * WIDTH - 1 - cell * (2 * t)
    step = (rest >= 2 * t).to(tl.int32) - (rest < 0).to(tl.int32)
    return cell + step, rest - step * (2 * t)


@triton.jit
def _is_kept(words_ptr, t, j, n_key, WIDTH: tl.constexpr):
    """Whether a query that sees t keys keeps key j: bit cell(j, t) of its mask row at words_ptr. Shapes broadcast."""
    cell, _ = _cell_of_key(t, j, WIDTH)
    word = tl.load(words_ptr + (cell >> 5), mask=(j < t) & (j < n_key), other=0)
    return ((word >> (cell & 31)) & 1) != 0


# The key blocks that each tile of queries visits.
# One program: one tile; grid (n_tile, B * H), n_tile = cdiv(T, BLOCK_M).
#   bits (B, H, R, words) int32; seen (B, T) int; row (B, T) int or None: query i uses row i
#   runs (B * H * n_tile, max_runs + 1, 2) int32: first block and end of each run, ascending, disjoint, not touching; the
#   last entry is only ever read ahead
#   steps (B * H * n_tile,) int32: blocks in all
# A cell p of the union covers keys lo(p) of the tile's shortest query to lo(p+1) of its longest. Adjacent cells always
# join, so max_runs = cdiv(width, 2) is enough: 8 bytes of runs for 2 cells of a tile. Reads the bits once.
@triton.jit
def _plan_kernel(bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, H, T, R, n_key, max_runs, WIDTH: tl.constexpr,
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
    p = tl.arange(0, BLOCK_W * 32)
    on = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK_W * 32,))
    on_before = tl.reshape((before[:, None] >> tl.arange(0, 32)[None, :]) & 1, (BLOCK_W * 32,))

    # -- blocks of each cell that is on and covers a key
    begin, end = _first_key(p, t_min, WIDTH), tl.minimum(_first_key(p + 1, t_max, WIDTH), n_key)
    on = (on != 0) & (p < WIDTH) & (begin < end)
    begin_before, end_before = _first_key(p - 1, t_min, WIDTH), tl.minimum(_first_key(p, t_max, WIDTH), n_key)
    on_before = (on_before != 0) & (p <= WIDTH) & (begin_before < end_before)
    begin = (begin // BLOCK_N).to(tl.int32)
    end = tl.where(on, ((end + BLOCK_N - 1) // BLOCK_N).to(tl.int32), 0)
    end_before = tl.where(on_before, ((end_before + BLOCK_N - 1) // BLOCK_N).to(tl.int32), 0)
    covered = tl.associative_scan(end_before, 0, _max)  # end of all cells before p; 0 if none is on

    # -- a run begins at a cell that leaves a gap; there, too, the run before it ends
    new = on & ((begin > covered) | (covered == 0))
    run = tl.cumsum(new.to(tl.int32), axis=0) - 1
    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    tl.store(runs_ptr + run * 2, begin, mask=new)
    tl.store(runs_ptr + run * 2 - 1, covered, mask=new & (run > 0))
    n_run, last_end = tl.sum(new.to(tl.int32), axis=0), tl.max(end, axis=0)
    tl.store(runs_ptr + n_run * 2 - 1, last_end, mask=n_run > 0)
    tl.store(steps_ptr + tile, last_end + tl.sum(tl.where(new, covered - begin, 0), axis=0))


@triton.jit
def _next_block(runs_ptr, block, end):
    """The walk over a tile's runs, without a branch: the pointer to the run, the block to visit, the run's end."""
    jump = block + 1 == end
    runs_ptr += tl.where(jump, 2, 0)
    following = tl.load(runs_ptr, mask=jump, other=0)
    end = tl.where(jump, tl.load(runs_ptr + 1, mask=jump, other=0), end)
    return runs_ptr, tl.where(jump, following, block + 1), end


# o = softmax(q k^T * softmax_scale) v over the kept keys; lse = log2 of the sum of 2^(scores * log2 e), +inf if none.
# One program: one tile of BLOCK_M queries, walking its key blocks; grid (B * H * n_tile,), in the order given.
#   q (B, H, T, D), k and v (B, Hkv, S, D), any strides; bits, seen, row, runs, steps as in _plan_kernel
#   order (B * H * n_tile,) int: which tile each program takes
#   o (B, H, T, D) and lse (B, H, T) fp32, contiguous
# fp32: scores, m_i, l_i, acc. Moves the visited k and v blocks, where eager writes T x S scores and probabilities.
# Limits: D padded to a power of two >= 16; tiles in registers, so D <= 256. Reference: sea.sparse_attention.
@triton.jit
def _sparse_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr, order_ptr, o_ptr,
                                 lse_ptr, q_stride, k_stride, v_stride, H, T, R, n_key, n_tile, max_runs, qk_scale,
                                 GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
                                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tl.load(order_ptr + tl.program_id(0)).to(tl.int32)
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
    # (BLOCK_N, BLOCK_D), of block 0
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + offs_n[:, None] * k_stride[2] + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + h // GROUP * v_stride[1] + offs_n[:, None] * v_stride[2] + offs_d[None, :] * v_stride[3]

    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    block, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    for _ in range(tl.load(steps_ptr + tile)):
        j, first = block * BLOCK_N + offs_n, block.to(tl.int64) * BLOCK_N
        mask_n = (j < n_key)[:, None] & mask_d[None, :]
        # -- scores, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + first * k_stride[2], mask=mask_n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        s = tl.where(_is_kept(words_ptr[:, None], t[:, None], j[None, :], n_key, WIDTH), s, -float("inf"))
        # -- online softmax
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        p, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
        l_i, m_i = l_i * alpha + tl.sum(p, axis=1), m_new
        v = tl.load(v_ptr + first * v_stride[2], mask=mask_n, other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        runs_ptr, block, end = _next_block(runs_ptr, block, end)
    # -- write back
    empty = l_i == 0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(empty, float("inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
    at = pid_bh.to(tl.int64) * T + offs_m
    tl.store(o_ptr + at[:, None] * D + offs_d[None, :], acc.to(o_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])
    tl.store(lse_ptr + at, lse, mask=mask_m)


# With p = 2^(scores - lse), dp = do v^T, delta = rowsum(o do), ds = p (dp - delta): dq = ds k * softmax_scale.
# One program: the tile and walk of the forward kernel. ATOMIC: adds its share of dk = ds^T q * softmax_scale and
# dv = p^T do as well, in no fixed order.
#   o (B, H, T, D) contiguous, do (B, H, T, D) any strides, lse and delta (B, H, T) fp32, delta is written
#   dq (B, H, T, D) contiguous; dk, dv (B, Hkv, S, D) fp32, contiguous, zeros (ATOMIC only)
# fp32: p, dp, ds, delta, accumulators. Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, runs_ptr, steps_ptr,
                                order_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride,
                                do_stride, H, T, R, n_key, n_tile, max_runs, qk_scale, softmax_scale, GROUP: tl.constexpr,
                                ATOMIC: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tl.load(order_ptr + tl.program_id(0)).to(tl.int32)
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
    # (BLOCK_N, BLOCK_D), of block 0
    k_ptr += b * k_stride[0] + h // GROUP * k_stride[1] + offs_n[:, None] * k_stride[2] + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + h // GROUP * v_stride[1] + offs_n[:, None] * v_stride[2] + offs_d[None, :] * v_stride[3]
    at_kv = (b * (H // GROUP) + h // GROUP) * n_key * D + offs_n[:, None] * D + offs_d[None, :]

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    block, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    for _ in range(tl.load(steps_ptr + tile)):
        j, first = block * BLOCK_N + offs_n, block.to(tl.int64) * BLOCK_N
        mask_n = (j < n_key)[:, None] & mask_d[None, :]
        # -- probabilities again, (BLOCK_M, BLOCK_N)
        k = tl.load(k_ptr + first * k_stride[2], mask=mask_n, other=0.0)
        v = tl.load(v_ptr + first * v_stride[2], mask=mask_n, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        keep = _is_kept(words_ptr[:, None], t[:, None], j[None, :], n_key, WIDTH)
        p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq += tl.dot(ds, k, input_precision="ieee")
        if ATOMIC:
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * softmax_scale
            tl.atomic_add(dk_ptr + at_kv + first * D, dk, mask=mask_n, sem="relaxed")
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            tl.atomic_add(dv_ptr + at_kv + first * D, dv, mask=mask_n, sem="relaxed")
        runs_ptr, block, end = _next_block(runs_ptr, block, end)
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at[:, None] * D + offs_d[None, :], dq, mask=mask_md)


# The plan, written out: which key block each step of each tile visits.
# One program: one tile; grid (B * H * n_tile,). ends (B * H * n_tile,) int64: running sum of steps
#   -> blocks (P,) int64: list of the key block, (b * Hkv + hkv) * n_block + block; tiles (P,) int32. P = sum of steps
@triton.jit
def _pairs_kernel(runs_ptr, steps_ptr, ends_ptr, blocks_ptr, tiles_ptr, n_tile, n_block, max_runs, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    steps = tl.load(steps_ptr + tile)
    at = tl.load(ends_ptr + tile) - steps
    first = (tile // n_tile // GROUP).to(tl.int64) * n_block  # heads of one batch entry are neighbours, so b * H + h will do
    runs_ptr += tile.to(tl.int64) * (max_runs + 1) * 2
    block, end = tl.load(runs_ptr), tl.load(runs_ptr + 1)
    for i in range(steps):
        tl.store(blocks_ptr + at + i, first + block)
        tl.store(tiles_ptr + at + i, tile)
        runs_ptr, block, end = _next_block(runs_ptr, block, end)


# dk = ds^T q * softmax_scale, dv = p^T do, over the tiles that visit a key block, in the order of the tiles.
# One program: one key block and at most `per_program` of its tiles; grid (programs,). A block with few tiles is written at
# once; that with many (every query visits a sink) by several programs, to `part`, summed by _sum_parts_kernel.
#   list_of (programs,) int64: whose work a program shares; tiles (P,) int32, those of list l at begins[l] to ends[l];
#   part_ends (lists,) int64: running sum of the programs of each list; slots (lists,) int64: the same, of lists with several
#   part (slots, 2, BLOCK_N, BLOCK_D) fp32; dk, dv (B, Hkv, S, D) contiguous
# fp32: p, dp, ds, accumulators. Deterministic. Reference: autograd through sea.sparse_attention.
@triton.jit
def _sparse_attention_dkdv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, bits_ptr, seen_ptr, row_ptr, lse_ptr, delta_ptr, list_of_ptr,
                                  tiles_ptr, begins_ptr, ends_ptr, part_ends_ptr, slots_ptr, part_ptr, dk_ptr, dv_ptr,
                                  q_stride, k_stride, v_stride, do_stride, H, T, R, n_key, n_tile, n_block, n_list,
                                  per_program, qk_scale, softmax_scale, GROUP: tl.constexpr, D: tl.constexpr,
                                  WIDTH: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                  BLOCK_D: tl.constexpr):
    pid = tl.program_id(0)
    lst = tl.load(list_of_ptr + pid)
    if lst >= n_list:  # the grid is a bound, so that no count has to reach the CPU
        return
    b, hkv, block = lst // n_block // (H // GROUP), lst // n_block % (H // GROUP), lst % n_block
    begin, end = tl.load(begins_ptr + lst), tl.load(ends_ptr + lst)
    n_part = tl.maximum((end - begin + per_program - 1) // per_program, 1)
    nth = pid - (tl.load(part_ends_ptr + lst) - n_part)
    begin, end = begin + nth * per_program, tl.minimum(begin + (nth + 1) * per_program, end)

    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    j = (block * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    mask_n = (j < n_key)[:, None] & mask_d[None, :]
    # (BLOCK_N, BLOCK_D)
    k_ptr += b * k_stride[0] + hkv * k_stride[1] + j[:, None].to(tl.int64) * k_stride[2] + offs_d[None, :] * k_stride[3]
    v_ptr += b * v_stride[0] + hkv * v_stride[1] + j[:, None].to(tl.int64) * v_stride[2] + offs_d[None, :] * v_stride[3]
    k, v = tl.load(k_ptr, mask=mask_n, other=0.0), tl.load(v_ptr, mask=mask_n, other=0.0)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(begin, end):
        tile = tl.load(tiles_ptr + i)
        pid_bh, h, m = tile // n_tile, (tile // n_tile % H).to(tl.int64), tile % n_tile * BLOCK_M + offs_m
        mask_m = m < T
        mask_md = mask_m[:, None] & mask_d[None, :]
        at = pid_bh.to(tl.int64) * T + m
        t = tl.load(seen_ptr + b * T + m, mask=mask_m, other=0).to(tl.int32)
        row = m if row_ptr is None else tl.load(row_ptr + b * T + m, mask=mask_m, other=0).to(tl.int32)
        words_ptr = bits_ptr + (pid_bh.to(tl.int64) * R + row) * WORDS
        # (BLOCK_M, BLOCK_D)
        q = tl.load(q_ptr + b * q_stride[0] + h * q_stride[1] + m[:, None].to(tl.int64) * q_stride[2]
                    + offs_d[None, :] * q_stride[3], mask=mask_md, other=0.0)
        do = tl.load(do_ptr + b * do_stride[0] + h * do_stride[1] + m[:, None].to(tl.int64) * do_stride[2]
                     + offs_d[None, :] * do_stride[3], mask=mask_md, other=0.0)
        lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
        # -- probabilities again, (BLOCK_N, BLOCK_M)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        keep = _is_kept(words_ptr[None, :], t[None, :], j[:, None], n_key, WIDTH)
        p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk += tl.dot(ds, q, input_precision="ieee")
    # -- write back
    dk *= softmax_scale
    if n_part == 1:
        at_kv = ((b * (H // GROUP) + hkv) * n_key + j[:, None]) * D + offs_d[None, :]
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
def _sum_parts_kernel(begins_ptr, ends_ptr, slots_ptr, part_ptr, dk_ptr, dv_ptr, n_key, n_block, per_program,
                      D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    lst = tl.program_id(0)
    n_part = (tl.load(ends_ptr + lst) - tl.load(begins_ptr + lst) + per_program - 1) // per_program
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


def _plan(bits: Tensor, seen: Tensor, row: Tensor | None, width: int, n_key: int, tiles: dict):
    """runs, steps, order, max_runs: the key blocks that each tile visits, and the tiles with most work first."""
    B, H, R, words = bits.shape
    T, n_tile = seen.shape[1], triton.cdiv(seen.shape[1], tiles["BLOCK_M"])
    max_runs = min(-(-width // 2), triton.cdiv(n_key, tiles["BLOCK_N"]))
    runs = torch.empty(B * H * n_tile, max_runs + 1, 2, dtype=torch.int32, device=bits.device)
    steps = torch.empty(B * H * n_tile, dtype=torch.int32, device=bits.device)
    _plan_kernel[(n_tile, B * H)](bits, seen, row, runs, steps, H, T, R, n_key, max_runs, WIDTH=width, WORDS=words,
                                  BLOCK_W=triton.next_power_of_2(words), BLOCK_M=tiles["BLOCK_M"], BLOCK_N=tiles["BLOCK_N"],
                                  num_warps=min(max(triton.next_power_of_2(words) // 8, 1), 8))
    # By powers of two and stable, so that neighbours, which visit the same keys, stay together in the caches.
    size = torch.frexp(steps.float()).exponent.to(torch.int8)
    return runs, steps, size.sort(descending=True, stable=True).indices, max_runs


def _sparse_attention_fwd(q, k, v, bits, seen, row, softmax_scale, width):
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    tiles = _attention_tiles(q.dtype, D)
    runs, steps, order, max_runs = _plan(bits, seen, row, width, S, tiles)
    o = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _sparse_attention_fwd_kernel[(len(order),)](
        q, k, v, bits, seen, row, runs, steps, order, o, lse, q.stride(), k.stride(), v.stride(), H, T, bits.shape[2], S,
        triton.cdiv(T, tiles["BLOCK_M"]), max_runs, softmax_scale * math.log2(math.e), GROUP=H // Hkv, D=D, WIDTH=width,
        WORDS=bits.shape[3], BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles)
    return o, lse


def _sparse_attention_bwd(q, k, v, o, lse, do, bits, seen, row, softmax_scale, width):
    (B, H, T, D), (Hkv, S), R = q.shape, k.shape[1:3], bits.shape[2]
    tiles = _attention_tiles(q.dtype, D)
    n_tile, n_block = triton.cdiv(T, tiles["BLOCK_M"]), triton.cdiv(S, tiles["BLOCK_N"])
    runs, steps, order, max_runs = _plan(bits, seen, row, width, S, tiles)  # cheaper again than kept since the forward
    sizes = dict(GROUP=H // Hkv, D=D, WIDTH=width, WORDS=bits.shape[3], BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles)
    qk_scale = softmax_scale * math.log2(math.e)
    delta, dq = torch.empty_like(lse), torch.empty_like(o)
    new = torch.empty if DETERMINISTIC else torch.zeros
    dk, dv = (new(B, Hkv, S, D, dtype=k.dtype if DETERMINISTIC else torch.float32, device=k.device) for _ in range(2))
    _sparse_attention_dq_kernel[(len(order),)](
        q, k, v, o, do, bits, seen, row, runs, steps, order, lse, delta, dq, dk, dv, q.stride(), k.stride(), v.stride(),
        do.stride(), H, T, R, S, n_tile, max_runs, qk_scale, softmax_scale, ATOMIC=not DETERMINISTIC, **sizes)
    if not DETERMINISTIC:
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    # -- transpose the plan: a stable sort of the (key block, tile) pairs, linear in T
    ends = steps.cumsum(0)
    n_pair = int(ends[-1])  # waits for the GPU: the number of pairs depends on the data, and no useful bound is known
    blocks = torch.empty(n_pair, dtype=torch.int64, device=q.device)
    of_pair = torch.empty(n_pair, dtype=torch.int32, device=q.device)
    _pairs_kernel[(len(steps),)](runs, steps, ends, blocks, of_pair, n_tile, n_block, max_runs, GROUP=H // Hkv, num_warps=1)
    blocks, index = blocks.sort(stable=True)
    n_list = B * Hkv * n_block
    ends = torch.searchsorted(blocks, torch.arange(n_list, device=q.device), right=True)
    begins = F.pad(ends[:-1], (1, 0))

    # -- several programs for a key block that many tiles visit; the parts of all of them need at most 8192 slots
    per_program = max(PAIRS_PER_PROGRAM, n_pair // 4096)
    n_part = ((ends - begins + per_program - 1) // per_program).clamp(min=1)
    part_ends, slots = n_part.cumsum(0), (n_part * (n_part > 1)).cumsum(0)
    program = torch.arange(n_list + n_pair // per_program, device=q.device)
    list_of = torch.searchsorted(part_ends, program, right=True)
    part = torch.empty(2 * (n_pair // per_program), 2, tiles["BLOCK_N"], sizes["BLOCK_D"], dtype=torch.float32, device=q.device)
    _sparse_attention_dkdv_kernel[(len(program),)](
        q, k, v, do, bits, seen, row, lse, delta, list_of, of_pair[index], begins, ends, part_ends, slots, part, dk, dv,
        q.stride(), k.stride(), v.stride(), do.stride(), H, T, R, S, n_tile, n_block, n_list, per_program, qk_scale,
        softmax_scale, **sizes)
    if len(part):
        _sum_parts_kernel[(n_list,)](begins, ends, slots, part, dk, dv, S, n_block, per_program, D=D,
                                     BLOCK_N=tiles["BLOCK_N"], BLOCK_D=sizes["BLOCK_D"])
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
                     row: Tensor | None = None, block: int = 1024) -> Tensor:
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
    cells = mask if isinstance(mask, CellBits) else pack_mask(mask)
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    row = None if row is None else row.contiguous()
    with torch.cuda.device_of(q):
        return _SparseAttention.apply(q, k, v, cells.bits.contiguous(), seen.contiguous(), row, float(scale), cells.width)


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
        _pool_attention_kernel[(triton.cdiv(T, tiles["BLOCK_M"]), B * H)](
            q, k, seen.contiguous(), cells, a_log_a, a_square, q.stride(), k.stride(), H, T, S, scale * math.log2(math.e),
            GROUP=H // Hkv, D=D, WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(D)), **tiles)
    return PooledAttention(cells, a_log_a, a_square, S)


# -- the estimator and the mix -----------------------------------------------------------------------------------------
#

# Each op has a kernel forward; its backward runs the same formula in PyTorch again and differentiates that. So a training
# step keeps the inputs of each op and nothing else.


class _Recomputed(torch.autograd.Function):
    """fast(*tensors) forward; backward differentiates formula(*tensors), the same in PyTorch. Nothing else is kept."""

    @staticmethod
    def forward(ctx, fast, formula, *tensors):
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        return fast(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tensors = [x if x is None else x.detach().requires_grad_(need)
                   for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:])]
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        precision = torch.get_float32_matmul_precision()
        if tensors[0].dtype != torch.float32:  # half-precision inputs leave no more than tf32 to keep
            torch.set_float32_matmul_precision("high")
        try:
            with torch.enable_grad():
                outputs = ctx.formula(*tensors)
            pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
            found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        finally:
            torch.set_float32_matmul_precision(precision)
        return None, None, *(next(found) if x is not None and x.requires_grad else None for x in tensors)


def _running_sum(x: Tensor, block: int = 64) -> Tensor:
    """cumsum over dim 2 of (B, H, T, D), in two levels: torch's own takes T steps one after the other."""
    T = x.shape[2]
    x = F.pad(x, (0, 0, 0, -T % block)).unflatten(2, (-1, block)).cumsum(3)
    before = F.pad(x[:, :, :-1, -1].cumsum(2), (0, 0, 1, 0))
    return (x + before[:, :, :, None]).flatten(2, 3)[:, :, :T]


def _power_of_2(n: int) -> int:
    """Block size for n numbers in a tl.dot."""
    return max(16, triton.next_power_of_2(n))


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


@triton.jit
def _normed(x, gain, bias, there, N: tl.constexpr):
    """LayerNorm over the second axis, of which N columns are `there`: (rows, BLOCK), fp32."""
    x = tl.where(there[None, :], x - (tl.sum(tl.where(there[None, :], x, 0.0), axis=1) / N)[:, None], 0.0)
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / N + 1e-5)[:, None] * gain[None, :] + bias[None, :]


@triton.jit
def _features(x, w, w_rest, scale, in_m, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """relu(x W * scale) + 1e-3, 0 in the padding: (BLOCK, BLOCK_D) @ (BLOCK_D, BLOCK_F) -> (BLOCK, BLOCK_F) fp32.

    W is w + w_rest: two bf16 products are as good as one in fp32, and x is bf16 to begin with.
    """
    f = tl.dot(x.to(DOT), w, input_precision=PRECISION)
    if DOT == tl.bfloat16:
        f += tl.dot(x, w_rest)
    return tl.where(in_m, tl.maximum(f * scale, 0.0) + 1e-3, 0.0)


# sums[segment] = sum over its keys of phi(k)^T [pos ; v ; 1].
# One program: one segment (n_chunk chunks of CHUNK keys) of one key/value head; grid (n_segment, B * Hkv).
# k, v (B, Hkv, N, D), pos (1 or B, N, D), w (D, m) fp32 -> sums (B*Hkv, n_segment, m, 2D) fp32, norm (.., m) fp32.
# Key j stands at place j + lead. Sums stay in registers; reads each key once. Reference: sea.causal_context.
@triton.jit
def _context_sums_kernel(k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, sums_ptr, norm_ptr, k_strides, v_strides, pos_strides,
                         HKV, N, lead, n_chunk, k_scale, D: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
                         HAS_THERE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                         DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // HKV, pid_bh % HKV
    offs_c, offs_d, offs_f = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    in_d, in_m = offs_d[None, :] < D, offs_f[None, :] < M
    w_all = tl.load(w_ptr + offs_d[:, None] * M + offs_f[None, :], mask=(offs_d[:, None] < D) & in_m, other=0.0)
    w = w_all.to(DOT)
    w_rest = (w_all - w.to(tl.float32)).to(DOT)
    sum_pos = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, n_chunk):
        j = (segment * n_chunk + i) * CHUNK + offs_c - lead
        there = (j >= 0) & (j < N) & (offs_c < CHUNK)
        if HAS_THERE:
            there &= tl.load(there_ptr + b * N + j, mask=there, other=0) != 0
        at, j = there[:, None] & in_d, j.to(tl.int64)
        # (BLOCK_C, BLOCK_D)
        k = _tile(k_ptr + b * k_strides[0] + h * k_strides[1], j, offs_d, k_strides[2], k_strides[3], at)
        v = _tile(v_ptr + b * v_strides[0] + h * v_strides[1], j, offs_d, v_strides[2], v_strides[3], at)
        pos = _tile(pos_ptr + b * pos_strides[0], j, offs_d, pos_strides[1], 1, at)
        f = tl.where(there[:, None], _features(k, w, w_rest, k_scale, in_m, DOT, PRECISION), 0.0)  # (BLOCK_C, BLOCK_F)
        f_dot = tl.trans(f.to(DOT))
        sum_pos += tl.dot(f_dot, pos.to(DOT), input_precision=PRECISION)
        sum_v += tl.dot(f_dot, v.to(DOT), input_precision=PRECISION)
        norm += tl.sum(f, axis=0)
    at = pid_bh * n_segment + segment
    out = sums_ptr + (at * M + offs_f[:, None]) * 2 * D + offs_d[None, :]
    in_sum = (offs_f[:, None] < M) & in_d
    tl.store(out, sum_pos, mask=in_sum)
    tl.store(out + D, sum_v, mask=in_sum)
    tl.store(norm_ptr + at * M + offs_f, norm, mask=offs_f < M)


# c_i = phi(q_i) sums / (phi(q_i) norm), sums over the keys before (i+1)*stride.
# One program: one segment of one query head, walking its chunks of ROWS rows and ROWS*stride keys with the sums in
# registers; earlier segments come as one sum each. Grid (n_segment, B * H).
# q (B, H, R, D); sums (B*Hkv, n_segment + 1, m, 2D), norm (.., m) fp32: what precedes each segment
# -> context (B, H, R, 2D). Reads q, k, v, pos once, writes 2D numbers a row. Reference: sea.causal_context.
@triton.jit
def _context_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, w_ptr, there_ptr, sums_ptr, norm_ptr, context_ptr, q_strides, k_strides,
                    v_strides, pos_strides, H, GROUP, R, N, lead, n_chunk, q_scale, k_scale, D: tl.constexpr,
                    M: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr, HAS_THERE: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
                    DOT: tl.constexpr, PRECISION: tl.constexpr):
    segment, n_segment = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    kv = h // GROUP
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offs_d, offs_f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    in_d, in_m = offs_d[None, :] < D, offs_f[None, :] < M
    w_all = tl.load(w_ptr + offs_d[:, None] * M + offs_f[None, :], mask=(offs_d[:, None] < D) & in_m, other=0.0)
    w = w_all.to(DOT)
    w_rest = (w_all - w.to(tl.float32)).to(DOT)
    at = (b * (H // GROUP) + kv) * (n_segment + 1) + segment  # the last is the sum of all
    before = sums_ptr + (at * M + offs_f[:, None]) * 2 * D + offs_d[None, :]
    in_sum = (offs_f[:, None] < M) & in_d
    sum_pos = tl.load(before, mask=in_sum, other=0.0)  # (BLOCK_F, BLOCK_D)
    sum_v = tl.load(before + D, mask=in_sum, other=0.0)
    norm = tl.load(norm_ptr + at * M + offs_f, mask=offs_f < M, other=0.0)
    earlier = offs_c[None, :] < (offs_r[:, None] + 1) * STRIDE  # (BLOCK_R, BLOCK_C)
    for i in range(0, n_chunk):
        chunk = segment * n_chunk + i
        j = chunk * CHUNK + offs_c - lead
        there = (j >= 0) & (j < N) & (offs_c < CHUNK)
        if HAS_THERE:
            there &= tl.load(there_ptr + b * N + j, mask=there, other=0) != 0
        at_k, j = there[:, None] & in_d, j.to(tl.int64)
        # (BLOCK_C, BLOCK_D)
        k = _tile(k_ptr + b * k_strides[0] + kv * k_strides[1], j, offs_d, k_strides[2], k_strides[3], at_k)
        v = _tile(v_ptr + b * v_strides[0] + kv * v_strides[1], j, offs_d, v_strides[2], v_strides[3], at_k).to(DOT)
        pos = _tile(pos_ptr + b * pos_strides[0], j, offs_d, pos_strides[1], 1, at_k).to(DOT)
        f_k = tl.where(there[:, None], _features(k, w, w_rest, k_scale, in_m, DOT, PRECISION), 0.0)  # (BLOCK_C, BLOCK_F)

        row = chunk * (CHUNK // STRIDE) + offs_r
        in_row = (row < R) & (offs_r < CHUNK // STRIDE)
        row = row.to(tl.int64)
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        q = _tile(q_head, row, offs_d, q_strides[2], q_strides[3], in_row[:, None] & in_d)  # (BLOCK_R, BLOCK_D)
        f_q = _features(q, w, w_rest, q_scale, in_m, DOT, PRECISION)  # (BLOCK_R, BLOCK_F)
        f_dot = f_k.to(DOT)
        q_dot = f_q.to(DOT)
        same = tl.where(earlier, tl.dot(q_dot, tl.trans(f_dot), input_precision=PRECISION), 0.0)  # (BLOCK_R, BLOCK_C)
        total = tl.sum(f_q * norm[None, :], axis=1) + tl.sum(same, axis=1)
        total = tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing gives 0
        same = same.to(DOT)
        c_pos = tl.dot(q_dot, sum_pos.to(DOT), input_precision=PRECISION) + tl.dot(same, pos, input_precision=PRECISION)
        c_v = tl.dot(q_dot, sum_v.to(DOT), input_precision=PRECISION) + tl.dot(same, v, input_precision=PRECISION)
        out = context_ptr + (pid_bh * R + row[:, None]) * 2 * D + offs_d[None, :]
        tl.store(out, c_pos / total, mask=in_row[:, None] & in_d)
        tl.store(out + D, c_v / total, mask=in_row[:, None] & in_d)

        sum_pos += tl.dot(tl.trans(f_dot), pos, input_precision=PRECISION)
        sum_v += tl.dot(tl.trans(f_dot), v, input_precision=PRECISION)
        norm += tl.sum(f_k, axis=0)


CONTEXT = dict(keys=64, programs=528, num_warps=4, num_stages=1)  # keys a chunk (or 16 rows), programs to fill the GPU with


def _causal_context_fwd(q, k, v, position, projection, past, there, softmax_scale, stride, lead):
    (B, H, R, D), (Hkv, N), M = q.shape, k.shape[1:3], projection.shape[1]
    rows = _power_of_2(CONTEXT["keys"] // stride)
    chunk = rows * stride
    n_chunks = max(triton.cdiv(R, rows), triton.cdiv(N + lead, chunk))
    n_chunk = max(1, n_chunks * B * Hkv // CONTEXT["programs"])
    n_segment = triton.cdiv(n_chunks, n_chunk)
    position, w = position.contiguous(), projection.float().contiguous()
    there = None if there is None else there.contiguous().view(torch.int8)
    sums, norm = (torch.empty(B * Hkv, n_segment, M, *e, dtype=torch.float32, device=q.device) for e in ((2 * D,), ()))
    common = dict(D=D, M=M, CHUNK=chunk, HAS_THERE=there is not None, BLOCK_C=_power_of_2(chunk), BLOCK_D=_power_of_2(D),
                  BLOCK_F=_power_of_2(M), num_warps=CONTEXT["num_warps"], num_stages=CONTEXT["num_stages"],
                  **_dot_type(q.dtype))
    pos_strides = (position.stride(0) * (len(position) > 1), position.stride(1))
    strides = dict(k_strides=k.stride(), v_strides=v.stride(), pos_strides=pos_strides)
    k_scale = D**-0.25
    _context_sums_kernel[(n_segment, B * Hkv)](k, v, position, w, there, sums, norm, **strides, HKV=Hkv, N=N, lead=lead,
                                               n_chunk=n_chunk, k_scale=k_scale, **common)
    past = q.new_zeros(B, Hkv, M, 2 * D + 1, dtype=torch.float32) if past is None else past.float()
    # what precedes each segment, and all
    sums = torch.cat([past.flatten(0, 1)[:, None, :, :-1], sums], 1)
    sums = _running_sum(sums.flatten(2)[None], 8)[0].unflatten(2, (M, 2 * D)).contiguous()
    norm = torch.cat([past.flatten(0, 1)[:, None, :, -1], norm], 1).cumsum(1)
    context = torch.empty(B, H, R, 2 * D, dtype=q.dtype, device=q.device)
    _context_kernel[(n_segment, B * H)](q, k, v, position, w, there, sums, norm, context, q_strides=q.stride(), **strides,
                                        H=H, GROUP=H // Hkv, R=R, N=N, lead=lead, n_chunk=n_chunk,
                                        q_scale=softmax_scale * D**0.25,
                                        k_scale=k_scale, STRIDE=stride, BLOCK_R=rows, **common)
    return context, torch.cat([sums[:, -1], norm[:, -1, :, None]], -1).view(past.shape)


def _causal_context_formula(q, k, v, position, projection, past, there, softmax_scale, stride, lead):
    D, w = q.shape[-1], projection.float()
    q_feat = torch.relu((q.float() * (softmax_scale * D**0.25)) @ w) + 1e-3
    k_feat = torch.relu((k.float() * D**-0.25) @ w) + 1e-3
    if there is not None:
        k_feat, v = (x.masked_fill(~there[:, None, :, None], 0) for x in (k_feat, v))
    v_cat = torch.cat([position[:, None].float().expand_as(v), v.float()], dim=-1)
    k_feat, v_cat = F.pad(k_feat, (0, 0, lead, 0)), F.pad(v_cat, (0, 0, lead, 0))
    context, sums = linear_attention(q_feat, k_feat, v_cat, stride=stride, past=past)
    return context.to(q.dtype), sums


def causal_context(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, projection: Tensor, softmax_scale: float, *,
                   stride: int = 1, lead: int = 0, there: Tensor | None = None,
                   past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _expect(position is not None, "position", "a table, the Performer has no kernel", None)
    _expect(stride <= 16, "stride", "at most 16, a chunk of 16 rows and their keys has to fit", stride)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, 4, "(B, heads, tokens, D)")
    rest = (there, softmax_scale, stride, lead)
    return _Recomputed.apply(lambda *x: _causal_context_fwd(*x, *rest), lambda *x: _causal_context_formula(*x, *rest),
                             q, k, v, position, projection, past)


# z = GELU(LayerNorm([c ; v] W1 + b1)); gates = z Wg + bg; image = LayerNorm(z W2 + b2) per channel.
# One program: BLOCK_R rows of one head; grid (cdiv(R, BLOCK_R), B * H). LayerNorms and GELU in fp32.
# context (B, H, R, 2D), v (B, Hkv, R, D), w1 (2D, 3D), w2 (2P, 2D), wg (2, 2D)
# -> image (B, 2H, R, P), gates (B, H, R, 2). Reads 3D numbers a row and writes 2P; z never leaves the registers.
# Reference: sea.encode_rows.
@triton.jit
def _encode_kernel(context_ptr, v_ptr, w1_ptr, b1_ptr, g1_ptr, e1_ptr, w2_ptr, b2_ptr, g2_ptr, e2_ptr, wg_ptr, bg_ptr,
                   image_ptr, gates_ptr, v_strides, H, GROUP, R, D: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d, offs_z, offs_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_P)
    in_row, in_z, in_p = (row < R)[:, None], offs_z < 2 * D, offs_p < P
    in_d = offs_d < D
    dtype = context_ptr.dtype.element_ty
    row = row.to(tl.int64)
    c = context_ptr + pid_bh * R * 2 * D
    v_head = v_ptr + b * v_strides[0] + (h // GROUP) * v_strides[1]
    at, at_w = in_row & in_d[None, :], in_d[:, None] & in_z[None, :]
    # -- the first layer: W1^T (3D, 2D) in three parts of D rows, for the two halves of c and for v; (BLOCK_R, BLOCK_Z)
    z = tl.zeros((BLOCK_R, BLOCK_Z), tl.float32)
    for i in tl.static_range(3):
        if i < 2:
            x = _tile(c + i * D, row, offs_d, 2 * D, 1, at)  # (BLOCK_R, BLOCK_D)
        else:
            x = _tile(v_head, row, offs_d, v_strides[2], v_strides[3], at)
        w1 = _tile(w1_ptr + i * D, offs_d, offs_z, 1, 3 * D, at_w).to(dtype)  # (BLOCK_D, BLOCK_Z)
        z += tl.dot(x, w1, input_precision=PRECISION)
    z += _vector(b1_ptr, offs_z, in_z)[None, :]
    z = _normed(z, _vector(g1_ptr, offs_z, in_z), _vector(e1_ptr, offs_z, in_z), in_z, 2 * D)
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # GELU
    # -- gates
    for i in tl.static_range(2):
        gate = tl.sum(z * _vector(wg_ptr + i * 2 * D, offs_z, in_z)[None, :], axis=1) + tl.load(bg_ptr + i).to(tl.float32)
        tl.store(gates_ptr + (pid_bh * R + row) * 2 + i, gate, mask=row < R)
    # -- row decoder and the norm before the CNN, a channel at a time
    for i in tl.static_range(2):
        w2 = _tile(w2_ptr + i * P * 2 * D, offs_z, offs_p, 1, 2 * D, in_z[:, None] & in_p[None, :])  # (BLOCK_Z, BLOCK_P)
        x = tl.dot(z.to(dtype), w2.to(dtype), input_precision=PRECISION) + _vector(b2_ptr + i * P, offs_p, in_p)[None, :]
        x = _normed(x, _vector(g2_ptr, offs_p, in_p), _vector(e2_ptr, offs_p, in_p), in_p, P)
        image = image_ptr + (b * 2 * H + 2 * h + i) * R * P
        tl.store(image + row[:, None] * P + offs_p[None, :], x, mask=in_row & in_p[None, :])


ENCODE = dict(BLOCK_R=64, num_warps=4)


def _encode_rows_fwd(context, v, *weights):
    (B, H, R, D2), P = context.shape, weights[6].shape[0]
    context, weights = context.contiguous(), [w.contiguous() for w in weights]
    image = torch.empty(B, 2 * H, R, P, dtype=context.dtype, device=context.device)
    gates = torch.empty(B, H, R, 2, dtype=torch.float32, device=context.device)
    tiles = ENCODE if context.dtype != torch.float32 else dict(BLOCK_R=16, num_warps=4)
    _encode_kernel[(triton.cdiv(R, tiles["BLOCK_R"]), B * H)](
        context, v, *weights, image, gates, v_strides=v.stride(), H=H, GROUP=H // v.shape[1], R=R, D=D2 // 2, P=P,
        BLOCK_D=_power_of_2(D2 // 2), BLOCK_Z=_power_of_2(D2), BLOCK_P=_power_of_2(P), PRECISION="ieee", **tiles)
    return image, gates


def _encode_rows_formula(context, v, w1, b1, gain1, bias1, w2, b2, gain2, bias2, wg, bg):
    H, dtype = context.shape[1], context.dtype
    z = torch.cat([context, v.repeat_interleave(H // v.shape[1], 1)], -1)
    z = F.layer_norm(F.linear(z, w1.to(dtype), b1.to(dtype)).float(), b1.shape, gain1.float(), bias1.float())
    z = F.gelu(z).to(dtype)  # (B, H, R, 2D)
    x = F.linear(z, w2.to(dtype), b2.to(dtype)).unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)
    image = F.layer_norm(x.float(), gain2.shape, gain2.float(), bias2.float()).to(dtype)
    return image, F.linear(z, wg.to(dtype), bg.to(dtype)).float()


def encode_rows(context: Tensor, v: Tensor, encoder: nn.Sequential, decoder: nn.Linear, norm: nn.LayerNorm,
                gate: nn.Linear) -> tuple[Tensor, Tensor]:
    _check_tensor("context", context, 4, "(B, H, R, 2D)")
    weights = [w for layer in (encoder[0], encoder[1], decoder, norm, gate) for w in (layer.weight, layer.bias)]
    return _Recomputed.apply(_encode_rows_fwd, _encode_rows_formula, context, v, *weights)


# out = relu(conv3x3(x)), rows t, t-2, t-4 and columns p-2, p, p+2; with UP also scores = LayerNorm(1x1 conv of it to 4 cells).
# One program: BLOCK_T rows of all channels; grid (cdiv(R, BLOCK_T), B). The convolution is 9 products of the (C, C) weights
# of a tap with the shifted (C, BLOCK_T * BLOCK_P) image; shifts come from the cache.
# x (B, C, lead + R, P), lead rows of the past first (0: zeros) -> out (B, C, R, P), or with UP scores (B, H, R, width).
# w (9, C, C) [tap, out, in], up (4H, C). Accumulators fp32. Reads and writes each row about once.
# Reference: sea.causal_cnn.
@triton.jit
def _conv_kernel(x_ptr, w_ptr, b_ptr, up_ptr, up_b_ptr, gain_ptr, bias_ptr, out_ptr, R, P, lead, WIDTH: tl.constexpr,
                 C: tl.constexpr, H: tl.constexpr, UP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
                 BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK_T * BLOCK_P)
    row, p = tl.program_id(0) * BLOCK_T + offs // BLOCK_P, offs % BLOCK_P
    offs_c = tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    dtype = x_ptr.dtype.element_ty
    x = x_ptr + (b * C + offs_c[:, None]) * (lead + R) * P
    acc = tl.zeros((BLOCK_C, BLOCK_T * BLOCK_P), tl.float32)
    for tap in tl.static_range(9):
        r, c = row + lead - 2 * (2 - tap // 3), p + 2 * (tap % 3 - 1)
        there = (r >= 0) & (row < R) & (c >= 0) & (c < P) & (p < P)
        tile = tl.load(x + (r * P + c)[None, :], mask=in_c[:, None] & there[None, :], other=0.0)
        w = _tile(w_ptr + tap * C * C, offs_c, offs_c, C, 1, in_c[:, None] & in_c[None, :])  # (BLOCK_C, BLOCK_C)
        acc += tl.dot(w, tile, input_precision=PRECISION)
    acc = tl.maximum(acc + _vector(b_ptr, offs_c, in_c)[:, None], 0.0)
    at = (row < R) & (p < P)
    if UP:
        offs_u = tl.arange(0, 4 * BLOCK_H)
        up = _tile(up_ptr, offs_u, offs_c, C, 1, (offs_u < 4 * H)[:, None] & in_c[None, :])
        y = tl.dot(up, acc.to(dtype), input_precision=PRECISION) + _vector(up_b_ptr, offs_u, offs_u < 4 * H)[:, None]
        # (head, sub-cell, row, p) -> (head, row, p, sub-cell): a head's row of cells lies together
        y = tl.permute(tl.reshape(y, (BLOCK_H, 4, BLOCK_T, BLOCK_P)), (0, 2, 3, 1))
        y = tl.reshape(y, (BLOCK_H * BLOCK_T, 4 * BLOCK_P))
        cell, n = tl.arange(0, 4 * BLOCK_P), tl.arange(0, BLOCK_H * BLOCK_T)
        in_w = cell < WIDTH
        y = _normed(y, _vector(gain_ptr, cell, in_w), _vector(bias_ptr, cell, in_w), in_w, WIDTH)
        h, t = n // BLOCK_T, tl.program_id(0) * BLOCK_T + n % BLOCK_T
        out = out_ptr + ((b * H + h) * R + t)[:, None] * WIDTH + cell[None, :]
        tl.store(out, y, mask=((h < H) & (t < R))[:, None] & in_w[None, :])
    else:
        out = out_ptr + (b * C + offs_c[:, None]) * R * P + (row * P + p)[None, :]
        tl.store(out, acc, mask=in_c[:, None] & at[None, :])


CONV = (dict(places=256, num_warps=4), dict(places=128, num_warps=4))  # the first convolution, and the second with its end


def _causal_cnn_fwd(image, w1, b1, w2, b2, up, up_bias, gain, bias, past1, past2, n_rows):
    (B, C, R, P), H, width, dtype = image.shape, image.shape[1] // 2, gain.shape[0], image.dtype
    x, last_rows, up = image.contiguous(), [], up.to(dtype).reshape(4 * H, C).contiguous()
    for i, (w, b, past) in enumerate(((w1, b1, past1), (w2, b2, past2))):
        lead = 0 if past is None else past.shape[2]
        x = x if past is None else torch.cat([past.to(dtype), x], 2)
        last_rows.append(_last_rows(x, n_rows, lead))
        taps = w.to(dtype).permute(2, 3, 0, 1).reshape(9, C, C).contiguous()
        out = torch.empty((B, C, R, P) if i == 0 else (B, H, R, width), dtype=dtype, device=x.device)
        block_p, tiles = _power_of_2(P), CONV[i]
        block_t = max(1, (64 if dtype == torch.float32 else tiles["places"]) // block_p)
        _conv_kernel[(triton.cdiv(R, block_t), B)](
            x, taps, b, up, up_bias, gain, bias, out, R=R, P=P, lead=lead, WIDTH=width, C=C, H=H, UP=i == 1, BLOCK_T=block_t,
            BLOCK_P=block_p, BLOCK_C=_power_of_2(C), BLOCK_H=triton.next_power_of_2(max(4, H)), PRECISION="ieee",
            num_warps=tiles["num_warps"])
        x = out
    return x, *last_rows


def _last_rows(x, n_rows, lead):
    """The 4 rows (as many as a 3-row convolution of dilation 2 looks back) before row n_rows; zeros before the first."""
    if n_rows is None:
        return F.pad(x[:, :, -4:], (0, 0, max(0, 4 - x.shape[2]), 0)).clone()
    at = (n_rows[:, None] + torch.arange(4, device=x.device))[:, None, :, None]
    x = x if lead else F.pad(x, (0, 0, 4, 0))
    return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))


def _causal_cnn_formula(image, w1, b1, w2, b2, up, up_bias, gain, bias, past1, past2, n_rows):
    x, last_rows, dtype = image, [], image.dtype
    for w, b, past in ((w1, b1, past1), (w2, b2, past2)):
        x = F.pad(x, (0, 0, 4, 0)) if past is None else torch.cat([past.to(dtype), x], 2)
        last_rows.append(_last_rows(x, n_rows, 4))
        x = F.relu(F.conv2d(x, w.to(dtype), b.to(dtype), dilation=2, padding=(0, 2)))
    y = F.conv2d(x, up.to(dtype), up_bias.to(dtype))  # (B, 4H, R, P)
    y = y.unflatten(1, (-1, 4)).permute(0, 1, 3, 4, 2).flatten(-2)[..., : gain.shape[0]].float()
    return F.layer_norm(y, gain.shape, gain.float(), bias.float()).to(dtype), *last_rows


def causal_cnn(image: Tensor, conv1: nn.Conv2d, conv2: nn.Conv2d, up: nn.Conv2d, norm: nn.LayerNorm,
               past: tuple[Tensor, Tensor] | None = None,
               n_rows: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    _check_tensor("image", image, 4, "(B, 2H, R, P)")
    weights = [w for layer in (conv1, conv2, up, norm) for w in (layer.weight, layer.bias)]
    scores, *last_rows = _Recomputed.apply(lambda *x: _causal_cnn_fwd(*x, n_rows),
                                           lambda *x: _causal_cnn_formula(*x, n_rows),
                                           image, *weights, *(past or (None, None)))
    return scores, tuple(last_rows)


# out = s_mix * s_prob * sparse + (1 - s_mix) * mean of v over the keys <= i.
# One program: BLOCK_T queries of one head; grid (cdiv(T, BLOCK_T), B * H). The mean: the sum of the blocks before, given,
# and a product with a triangle of ones inside the block. sparse (B, H, T, D), gates (B, H, R, 2) before the sigmoid,
# before (B, Hkv, n_block + 1, D) fp32, seen (B, T) and row (B, T) int32 -> out (B, H, T, D). Reference: sea.mix_average.
@triton.jit
def _mix_kernel(sparse_ptr, v_ptr, before_ptr, gates_ptr, seen_ptr, row_ptr, valid_ptr, out_ptr, v_strides, H, GROUP, T, R,
                D: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):
    pid_t, n_block = tl.program_id(0), tl.num_programs(0)
    pid_bh = tl.program_id(1).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    kv = h // GROUP
    i, d = pid_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    in_t = i < T
    at = in_t[:, None] & (d < D)[None, :]
    i64 = i.to(tl.int64)
    v = _tile(v_ptr + b * v_strides[0] + kv * v_strides[1], i64, d, v_strides[2], v_strides[3], at)  # (BLOCK_T, BLOCK_D)
    if HAS_VALID:
        v = tl.where((tl.load(valid_ptr + b * T + i, mask=in_t, other=0) != 0)[:, None], v, 0.0)
    ones = (tl.arange(0, BLOCK_T)[:, None] >= tl.arange(0, BLOCK_T)[None, :]).to(v.dtype)
    mean = tl.dot(ones, v, input_precision=PRECISION)  # exact ones: no rounding of v
    mean += _vector(before_ptr + ((b * (H // GROUP) + kv) * (n_block + 1) + pid_t) * D, d, d < D)[None, :]
    seen = tl.load(seen_ptr + b * T + i, mask=in_t, other=0)
    mean = mean / tl.maximum(seen, 1).to(tl.float32)[:, None]
    row = tl.load(row_ptr + b * T + i, mask=in_t, other=0).to(tl.int64)
    gate = gates_ptr + (pid_bh * R + row) * 2
    s_prob = tl.sigmoid(tl.load(gate, mask=in_t, other=0.0).to(tl.float32))[:, None]
    s_mix = tl.sigmoid(tl.load(gate + 1, mask=in_t, other=0.0).to(tl.float32))[:, None]
    sparse = _tile(sparse_ptr + pid_bh * T * D, i64, d, D, 1, at).to(tl.float32)
    out = s_mix * s_prob * sparse + (1.0 - s_mix) * mean
    out = tl.where((seen > 0)[:, None], out, 0.0)
    tl.store(out_ptr + (pid_bh * T + i64[:, None]) * D + d[None, :], out, mask=at)


MIX = dict(BLOCK_T=64, num_warps=4)


def _mix_average_fwd(sparse, v, gates, past, seen, row, valid):
    (B, H, T, D), Hkv, block = sparse.shape, v.shape[1], MIX["BLOCK_T"]
    n_block = triton.cdiv(T, block)
    x = v if valid is None else v.masked_fill(~valid[:, None, :, None], 0)
    x = x if T % block == 0 else F.pad(x, (0, 0, 0, n_block * block - T))
    sums = x.unflatten(2, (n_block, block)).sum(3, dtype=torch.float32)
    past = torch.zeros_like(sums[:, :, 0]) if past is None else past.float()
    # (B, Hkv, n_block + 1, D), what precedes each block, and all
    sums = _running_sum(torch.cat([past[:, :, None], sums], 2), 32).contiguous()
    out = torch.empty(sparse.shape, dtype=sparse.dtype, device=sparse.device)
    valid = None if valid is None else valid.contiguous().view(torch.int8)
    seen, row = (x.int().contiguous() for x in (seen, row))
    _mix_kernel[(n_block, B * H)](sparse.contiguous(), v, sums, gates.contiguous(), seen, row, valid, out,
                                  v_strides=v.stride(), H=H, GROUP=H // Hkv, T=T, R=gates.shape[2], D=D,
                                  HAS_VALID=valid is not None, BLOCK_D=_power_of_2(D), PRECISION="ieee", **MIX)
    return out, sums[:, :, -1]


def _mix_average_formula(sparse, v, gates, past, seen, row, valid):
    sums = _running_sum((v if valid is None else v.masked_fill(~valid[:, None, :, None], 0)).float())
    sums = sums if past is None else sums + past[:, :, None]
    average = (sums / seen[:, None, :, None].clamp(min=1)).repeat_interleave(sparse.shape[1] // v.shape[1], 1)
    gates = gates.float().sigmoid().gather(2, row.long()[:, None, :, None].expand(-1, gates.shape[1], -1, 2))
    out = gates[..., 1:] * gates[..., :1] * sparse + (1 - gates[..., 1:]) * average
    return (out * (seen > 0)[:, None, :, None]).to(sparse.dtype), sums[:, :, -1]


def mix_average(sparse: Tensor, v: Tensor, gates: Tensor, seen: Tensor, row: Tensor, valid: Tensor | None = None,
                past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_tensor("sparse", sparse, 4, "(B, H, T, D)")
    rest = (seen, row, valid)
    return _Recomputed.apply(lambda *x: _mix_average_fwd(*x, *rest), lambda *x: _mix_average_formula(*x, *rest),
                             sparse, v, gates, past)
