"""kernels.py against sea.py, as laws. Without a GPU they run in Triton's interpreter, in fp32 and fp16 (its bf16 is wrong),
and every launch is compiled for the GPU besides; with one the same laws run there, with bf16 and large examples."""

import contextlib
import functools
import inspect
import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import baselines
import bin_kernels
import estimator_kernels
import kernels
import sea

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
torch.backends.cudnn.allow_tf32 = False  # the reference's fp32 convolutions are to be fp32
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
FEW = settings(max_examples=20)
BLOCK = 16  # tiles have at least 16 rows
here = Path(__file__).resolve().parent


def sizes(low: int, high: int, *few: int):
    """Sizes that kernels are compiled for: any on a CPU; on a GPU, where each takes seconds to compile, these few."""
    return st.sampled_from(few) if CUDA else st.integers(low, high)


def in_parts(argument: str, *values):
    """A law that compiles for a minute or more is one for each of `values` on a GPU, so that several workers share it."""
    return pytest.mark.parametrize(argument, values if CUDA else [None])


HEADS = st.sampled_from([(1, 1, 2), (2, 1, 1)] if CUDA else [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 2)])  # B, Hkv, H / Hkv

# -- tools -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded():
    """Memory that the kernels allocate is full of NaN (or a bad integer) and has bands around it that must stay so."""
    buffers, band, real = [], 64, torch.empty

    def empty(*size, dtype=None, device=None, **kwargs):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        x = real(2 * band + torch.Size(size).numel(), dtype=dtype or torch.float32, device=device)
        x.fill_(float("nan") if x.is_floating_point() else 77 if x.dtype == torch.bool else -77)
        buffers.append(x)
        return x[band : len(x) - band].view(size)

    like = lambda x, **kwargs: empty(x.shape, dtype=x.dtype, device=x.device)
    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", like):
        yield
    for x in buffers:
        for side in (x[:band], x[len(x) - band :]):
            assert (side.isnan() if x.is_floating_point() else side == -77).all(), "written out of bounds"


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other memory; what lies between them is NaN."""
    x = x.to(DEVICE)
    if layout == "heads last":  # as a projection's output, (B, T, H, D)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        wide = x.new_full((*x.shape[:2], x.shape[2] + 2, 2 * x.shape[3] + 1), float("nan"))
        wide[:, :, 1:-1, 1::2] = x
        return wide[:, :, 1:-1, 1::2]
    return x


def by_column(x: torch.Tensor) -> torch.Tensor:
    """The same numbers (B, n), those of a column side by side in memory."""
    return x.to(DEVICE).T.contiguous().T


LAYOUTS = st.sampled_from(["contiguous", "heads last", "gaps"])
LAYOUT_OF_V = {"contiguous": "gaps", "heads last": "contiguous", "gaps": "heads last"}  # by that of q and k: strides differ


def as_accurate_as_eager(case, kernel, reference, inputs: list[torch.Tensor], relu: bool = False, gradients: bool = True,
                         cancel: dict[int, float] | None = None, weights: dict[int, torch.Tensor] | None = None) -> None:
    """Outputs and gradients: error <= 2 * (error of the reference in the same dtype + eps * max|ref|), ref in fp64.

    The error is the largest of all elements. With `relu`, since where its input rounds to the other side of 0 single gradients
    are anything, and not at the same places as eager's, it is that of 99.9 % of them; in half precision, where this happens
    all over the place, the root of the mean square, and of a result of few numbers, to 5 % of which a single such place
    contributes, that of the smallest 90 %, while all of them together may have 30 times as much.

    max|ref| is that of all results together: a small gradient of few numbers is what is left of others that cancel; or, if
    that is more, what `cancel` says for the number of a result. What `weights` says for an output's number is multiplied into
    its gradient, where others would be differences of large numbers. And 2^(score - lse) carries the fp32 rounding of its
    exponents, numbers of size 8 or so, even where outputs are fp32.
    """

    def run(function, cast):
        xs = [cast(x.detach()).requires_grad_() for x in inputs]
        out = function(*xs)
        out = list(out) if isinstance(out, (tuple, list)) else [out]
        generator = torch.Generator().manual_seed(0)
        douts = [torch.randn(x.shape, generator=generator).to(x.device, inputs[0].dtype).to(x.dtype) for x in out]
        douts = [x * weights[i].to(x.dtype) if weights and i in weights else x for i, x in enumerate(douts)]
        douts = [lay_out(x, "gaps") if x.ndim == 4 else x for x in douts]  # a caller's gradient has any strides
        learn = [i for i, x in enumerate(out) if x.requires_grad and gradients]
        grads = torch.autograd.grad([out[i] for i in learn], xs, [douts[i] for i in learn], allow_unused=True) if learn else [None] * len(xs)
        return out + [torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads)]

    exact, eager = run(reference, lambda x: x.double()), run(reference, lambda x: x)
    with guarded():
        got = run(kernel, lambda x: x)
    assert len(got) == len(exact)
    scale = max(x.abs().max().item() for x in exact if x.numel())
    size = torch.max
    if relu:
        most = lambda x: x.flatten().kthvalue(math.ceil(0.999 * x.numel())).values
        few = lambda x: x.flatten().sort().values[: math.ceil(0.9 * x.numel())] if x.numel() < 1000 else x
        size = most if inputs[0].dtype == torch.float32 else lambda x: few(x).square().mean().sqrt()
    for i, (x, y, z) in enumerate(zip(got, eager, exact)):
        assert x.shape == y.shape and x.dtype == y.dtype and x.isfinite().all(), (i, x.dtype, y.dtype, case)
        error, bar = (x.double() - z).abs(), (y.double() - z).abs()
        if not z.numel():
            continue
        eps = torch.finfo(inputs[0].dtype).eps + 8 * torch.finfo(torch.float32).eps
        budget = 2 * (size(bar) + eps * max(scale, (cancel or {}).get(i, 0)))
        assert size(error) <= budget, f"result {i}: error {size(error):.2e} > {budget:.2e}: {case}"
        if relu and inputs[0].dtype != torch.float32:
            assert error.square().mean().sqrt() <= 30 * budget, f"result {i}, all of it, budget {budget:.2e}: {case}"


TWINS = ["take_pair", "keep_row", "mean_of_heads", "choose_rows", "causal_context", "encode_rows", "causal_cnn", "add_cell_keys",
         "topk_mask", "select_cells", "no_candidates", "choose_bins", "sparse_attention", "bin_attention", "mix_average", "pool_attention"]
CLASSES = ["pool_attention", "select_cells"]  # what they return is a class of each file


@pytest.mark.parametrize("name", TWINS)
def test_signature_is_that_of_sea(name):
    """But for `block`, how many queries the reference takes at a time; a module of sea.py is any to the kernels, and so is a
    config. They also take a mask of cells as they pack it."""
    ours, theirs = inspect.signature(getattr(kernels, name)), inspect.signature(getattr(sea, name))
    any_class = {sea.CausalCNN: torch.nn.Module, sea.SEAConfig: inspect.Parameter.empty}
    expected = [x.replace(annotation=any_class[x.annotation]) if x.annotation in any_class else x
                for x in theirs.parameters.values() if x.name != "block"]
    if name == "sparse_attention":
        expected = [x.replace(annotation=torch.Tensor | kernels.CellBits) if x.name == "mask" else x for x in expected]
    assert list(ours.parameters.values()) == expected
    assert ours.return_annotation == theirs.return_annotation or name in CLASSES


# -- masks of cells ----------------------------------------------------------------------------------------------------


@given(sizes(1, 70, 1, 33, 64), st.integers(1, 40), st.sampled_from([0.5, 0.0, 1.0]), st.integers(0, 9))
@FEW
def test_packing_loses_nothing(width, n_row, density, seed):
    mask = (torch.rand(2, 1, n_row, width, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)
    with guarded():
        cells = kernels.pack_mask(mask)
    assert cells.shape == mask.shape and torch.equal(kernels.unpack_mask(cells), mask)
    word, bit = divmod(width - 1, 32)
    assert torch.equal((cells.bits[..., word] >> bit & 1).bool(), mask[..., -1])


# A kernel may call global functions.
_is_kept, _cells_per_key, _window, _in_window, _first_block, _first_key, _has_windows = (
    kernels._is_kept, kernels._cells_per_key, kernels._window, kernels._in_window, kernels._first_block, kernels._first_key,
    kernels._has_windows)


@triton.jit
def is_kept_kernel(words_ptr, t_ptr, j_ptr, out_ptr, n_key, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    kept = _is_kept(words_ptr + offs * 0, tl.load(t_ptr + offs), tl.load(j_ptr + offs), n_key, WIDTH)
    tl.store(out_ptr + offs, kept.to(tl.int32))


@triton.jit
def in_window_kernel(words_ptr, t_ptr, j_ptr, out_ptr, n_key, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offs, i = tl.arange(0, BLOCK), tl.arange(0, 32)
    t, j = tl.load(t_ptr + offs), tl.load(j_ptr + offs)
    cells_per_key = _cells_per_key(t, WIDTH)
    window, real_cell = _window(words_ptr + offs * 0, t, j, cells_per_key, WIDTH)
    mask_key = j[:, None] + i[None, :] < n_key
    kept = _in_window(window[:, None], real_cell[:, None], cells_per_key[:, None], i[None, :], mask_key)
    tl.store(out_ptr + offs[:, None] * 32 + i[None, :], kept.to(tl.int32))


@triton.jit
def first_key_kernel(p_ptr, t_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs)
    tl.store(out_ptr + offs, _first_key(tl.load(p_ptr + offs), t, WIDTH))
    tl.store(out_ptr + BLOCK, _has_windows(t, WIDTH).to(tl.int32))


@given(st.integers(1, 2**23), st.sampled_from([1, 3, 32, 256, 1000, 1024, 4095]), st.integers(0, 99))
@example(2**20, 256, 0)
@example(2**20 + 1, 256, 0)
@settings(max_examples=100)
def test_cell_of_a_key_is_exact_at_any_length(t, width, seed):
    """Also where 2*t*width passes 2^31, and at the first and last key of a cell, where rounding would show. Key by key, and, for
    the lengths that they are used for, by windows of 32 keys."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 1, 1, width, generator=generator) < 0.5
    p = torch.randint(width, (128,), generator=generator)
    edges = sea.first_key_of_cell(p, torch.tensor(t), width) - torch.randint(2, (128,), generator=generator)
    j = torch.cat([edges, torch.randint(2**23, (128,), generator=generator) % (t + t // 4 + 1)]).clamp(0)
    words, t_of_j, n_key = kernels.pack_mask(mask.to(DEVICE)).bits, torch.full_like(j, t).int().to(DEVICE), t + t // 8

    def expected(j):
        cell = sea.cell_of_key(j, torch.tensor(t), width)
        return mask[0, 0, 0, cell.clamp(max=width - 1)] & (j < min(t, n_key))

    out = torch.empty(256, dtype=torch.int32, device=DEVICE)
    is_kept_kernel[(1,)](words, t_of_j, j.int().to(DEVICE), out, n_key, WIDTH=width, BLOCK=256)
    assert torch.equal(out.cpu().bool(), expected(j))
    out = torch.empty(129, dtype=torch.int32, device=DEVICE)
    first_key_kernel[(1,)](p.int().to(DEVICE), t_of_j[:128], out, WIDTH=width, BLOCK=128)
    assert torch.equal(out[:128].cpu().long(), sea.first_key_of_cell(p, torch.tensor(t), width))
    assert bool(out[128]) == (width <= t <= 2**20)
    if width <= t <= 2**20:
        first, n_key = (j - torch.randint(32, (256,), generator=generator)).clamp(0), t - t // 8
        out = torch.empty(256, 32, dtype=torch.int32, device=DEVICE)
        in_window_kernel[(1,)](words, t_of_j, first.int().to(DEVICE), out, n_key, WIDTH=width, BLOCK=256)
        assert torch.equal(out.cpu().bool(), expected(first[:, None] + torch.arange(32)))


# -- grouped top-k -----------------------------------------------------------------------------------------------------


@dataclass
class Cells:
    """Scores of cells. `levels`: how many values they take, so that many tie; 0: any value."""

    dtype: torch.dtype
    group: str
    B: int
    H: int
    R: int
    width: int
    topk: int
    levels: int
    layout: str
    seed: int

    def tensors(self):
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.randn(self.B, self.H, self.R, self.width, generator=generator)
        scores = (scores * self.levels).round().clamp(-self.levels, self.levels) if self.levels else scores
        seen = torch.randint(0, 5 * self.topk, (self.B, self.R), generator=generator)
        return lay_out(scores.to(self.dtype), self.layout), by_column(seen)


CELL_GROUPS = [name for name, group in sea.GROUPS.items() if not group.shared]
CELLS = st.builds(Cells, dtype=st.sampled_from(DTYPES), group=st.sampled_from(CELL_GROUPS), B=st.integers(1, 2), H=sizes(1, 3, 3),
                  R=st.integers(1, 4), width=sizes(1, 70, 7, 70), topk=st.integers(1, 9), levels=st.sampled_from([0, 1, 2]),
                  layout=LAYOUTS, seed=st.integers(0, 99))


@given(CELLS, st.booleans())
@example(Cells(torch.float32, "causal_batch", 1, 12, 2, 256, 7, 0, "contiguous", 0), True)
@settings(FEW)
def test_topk_mask_is_that_of_sea_bit_for_bit(case, is_probability):
    """Ties and -0.0 included; any numbers rank, not only probabilities."""
    scores, seen = case.tensors()
    x = scores.float().softmax(-1).to(case.dtype) if is_probability else scores
    with guarded():
        mask = kernels.topk_mask(x, seen, case.topk, case.group)
    assert torch.equal(mask, sea.topk_mask(x, seen, case.topk, case.group))
    assert not mask[(seen == 0)[:, None].expand(mask.shape[:3])].any()


def test_zeros_of_either_sign_tie():
    x = torch.tensor([[[[-0.0, 0.0] * 20], [[0.0, -0.0, -1.0, 1.0] * 10]]], device=DEVICE)
    seen = torch.tensor([[8]], device=DEVICE)
    for group in ("causal_batch", "query"):
        assert torch.equal(kernels.topk_mask(x, seen, 3, group), sea.topk_mask(x, seen, 3, group))


@pytest.mark.parametrize("group", CELL_GROUPS)
def test_a_huge_topk_keeps_everything(group):
    seen = torch.tensor([[0, 1, 7, 10**9]], device=DEVICE)
    cells = kernels.select_cells(torch.rand(1, 2, 4, 5, device=DEVICE), seen, 2**62, group)
    assert torch.equal(cells.unpack(), (seen > 0)[:, None, :, None].expand(1, 2, 4, 5))


@pytest.mark.parametrize("H, width", [(1, 5), (3, 40), (4, 64)])
def test_selection_ends_and_stays_within_the_width_whatever_the_scores(H, width):
    """-inf ranks last, ties among it to the lower index; a row of NaN costs no other row anything."""
    scores = torch.randn(1, H, 3, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[:, :, 0], scores[:, :, 1, 2:] = float("nan"), -float("inf")
    cells = kernels.select_cells(scores, torch.full((1, 3), 2, device=DEVICE), 1)
    padding = torch.arange(32 * cells.bits.shape[3], device=DEVICE) >= width
    assert not kernels.unpack_mask(kernels.CellBits(cells.bits, len(padding)))[..., padding].any()
    expected = sea.topk_mask(scores[:, :, 1:].softmax(-1), torch.full((1, 2), 2, device=DEVICE), 1)
    assert torch.equal(kernels.unpack_mask(cells)[:, :, 1:], expected)


@given(CELLS)
@example(Cells(torch.float32, "causal_batch", 1, 12, 2, 256, 7, 0, "contiguous", 0))
@settings(FEW)
def test_fused_softmax_selects_the_same_up_to_its_rounding(case):
    scores, seen = case.tensors()
    probs = scores.float().softmax(-1)
    mask = sea.topk_mask(probs, seen, case.topk, case.group)
    fused = kernels.unpack_mask(kernels.select_cells(scores, seen, case.topk, case.group))
    dims = {"causal_batch": (1, 3), "query": (3,), "head": (2, 3), "batch": (1, 2, 3)}[case.group]
    assert torch.equal(mask.sum(dims), fused.sum(dims))
    differ = mask ^ fused
    highest, lowest = probs.masked_fill(~differ, 0).amax(dims), probs.masked_fill(~differ, 1).amin(dims)
    assert (highest <= lowest * (1 + 4e-6)).all()  # the kernel ranks logarithms, up to about -16: 2^-20 apart


# -- candidates and bins -----------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """A call of choose_bins, as numbers. `exact`: small integers, of which products, and means of a power of two, are exact
    and many tie."""

    dtype: torch.dtype
    group: str
    heads: tuple[int, int, int]  # B, Hkv, H / Hkv
    R: int
    S: int  # keys of a static buffer
    D: int
    width: int
    bin: int
    local: int
    first: int
    candidates: int
    n_chosen: int
    stride: int
    ordered: bool
    exact: bool
    layout: str
    seed: int

    @property
    def is_exact(self):
        return self.exact and self.bin.bit_count() == 1

    def config(self):
        _, Hkv, group = self.heads
        n_first = -(-self.first // self.bin)
        step = math.gcd(self.bin, self.stride)
        last = self.local + (1 - self.local) % step + (self.bin - step + self.stride - 1) / 2
        topk = math.ceil((n_first + self.n_chosen) * self.bin + last)
        config = sea.SEAConfig(n_head=Hkv * group, n_kv_head=Hkv, d_head=self.D, width=self.width, topk=topk, group=self.group,
                               bin=self.bin, local=self.local, first=self.first, candidates=self.candidates,
                               query_stride=self.stride, max_positions=2**15)
        assert config.n_chosen(topk) == self.n_chosen
        return config

    def tensors(self):
        """scores, q, k, seen, row, row_seen, order; keys that no query sees are NaN, some see nothing, and rows have `stride`
        queries, but the first may have fewer or none, and the last fewer or more."""
        (B, Hkv, group), generator = self.heads, torch.Generator().manual_seed(self.seed)

        def make(heads, *size):
            if not self.exact:
                return torch.randn(B, heads, *size, generator=generator).to(self.dtype)
            x = torch.randint(-1, 2, (B, min(heads, Hkv), *size), generator=generator)  # of which means over heads are exact
            return x.repeat_interleave(heads // x.shape[1], 1).to(self.dtype)

        H = Hkv * group
        T = max(1, self.R * self.stride - self.seed % self.stride)
        row = torch.arange(T).expand(B, T) // self.stride
        if self.seed % 3 == 1:  # begins inside a row, or behind that of the call before
            first = torch.randint(self.stride + 1, (B, 1), generator=generator)
            row = ((torch.arange(T) + first) // self.stride).clamp(max=self.R - 1)
        n_estimates = (H, Hkv)[self.seed % 2]
        n_choosers = self.config().n_choosers
        scores, q, k = make(n_estimates, self.R, self.width), make(n_choosers, T, self.D), make(Hkv, self.S, self.D)
        row_seen = torch.randint(self.S + 1, (B, self.R), generator=generator)
        row_seen[torch.rand(B, self.R, generator=generator) < 0.1] = 0
        later = torch.arange(T) - torch.searchsorted(row, row)  # number of a query in its row
        seen = (row_seen.gather(1, row) + later.clamp(max=self.stride - 1)).clamp(max=self.S)
        seen[torch.rand(B, T, generator=generator) < 0.1] = 0
        order = torch.stack([torch.randperm(self.S, generator=generator) for _ in range(B)]) if self.ordered else None
        for b in range(B):
            unseen = torch.arange(self.S)[seen[b].max() :]
            k[b, :, unseen if order is None else order[b, unseen]] = torch.nan
        order = None if order is None else by_column(order)
        wide = torch.cat([scores[:, :, :1], scores], 2)  # a row of the past before them, as a layer has it
        return (lay_out(wide, self.layout)[:, :, 1:], lay_out(q, self.layout), lay_out(k, self.layout), by_column(seen),
                by_column(row), by_column(row_seen), order)


CHOICES = st.builds(
    Choice, dtype=st.sampled_from(DTYPES), group=st.sampled_from(kernels.BIN_GROUPS[::-1]),
    heads=st.sampled_from([(1, 1, 2), (2, 2, 3)] if CUDA else [(1, 1, 1), (1, 1, 2), (2, 2, 3)]), R=st.integers(1, 4),
    S=st.integers(1, 60) | st.integers(300, 700), D=sizes(1, 35, 7, 35), width=sizes(1, 70, 3, 70),
    bin=st.sampled_from([8, 1] if CUDA else [8, 1, 4, 5, 12, 16]), local=st.sampled_from([28, 1, 3]), first=st.sampled_from([8, 0, 1]),
    candidates=st.sampled_from([8, 1, 3]), n_chosen=st.sampled_from([2, 1, 7]), stride=st.integers(1, 4), ordered=st.booleans(),
    exact=st.booleans(), layout=LAYOUTS, seed=st.integers(0, 99))


def unsure_rows(case, scores, q, *args, **kwargs):
    """Queries whose bins change if what they are chosen by changes by as little as rounding does."""
    eps, generator = torch.finfo(case.dtype).eps + 4 * torch.finfo(torch.float32).eps, torch.Generator().manual_seed(1)
    noisy = lambda x: x.float() + eps * (1 + x.float().abs()) * torch.randn(x.shape, generator=generator).to(DEVICE)
    runs = [sea.choose_bins(noisy(scores), noisy(q), *args, **kwargs) for _ in range(16)]  # a tie may end alike in a few
    return torch.stack([(x != runs[0]).any(-1) for x in runs]).any(0)


def check_choose_bins(case):
    config, (*tensors, order) = case.config(), case.tensors()
    args = *tensors, config.topk, config, 0.5
    expected = sea.choose_bins(*args, order=order)
    at_a_time = {} if case.seed % 2 else dict(scratch=1, queries=3)
    with guarded(), mock.patch.dict(kernels.CHOOSE, at_a_time):
        bins = kernels.choose_bins(*args, order=order)
    assert bins.dtype == torch.int32 and bins.shape == expected.shape
    equal = (bins == expected).all(-1)
    sure = torch.ones_like(equal) if case.is_exact else ~unsure_rows(case, *args, order=order)
    assert (equal | ~sure).all(), case
    assert (bins[..., 1:] > bins[..., :-1])[bins[..., 1:] != sea.NONE].all()  # also where rounding decides
    assert torch.equal((bins != sea.NONE).sum(-1), (expected != sea.NONE).sum(-1))
    return equal


@given(CHOICES)
@example(Choice(torch.float32, "kv", (2, 2, 3), 4, 600, 16, 20, 8, 28, 8, 8, 3, 1, True, False, "gaps", 0))
@example(Choice(torch.float32, "query", (1, 2, 2), 3, 600, 16, 20, 4, 1, 0, 2, 5, 3, False, False, "contiguous", 1))
@example(Choice(torch.float16, "kv", (1, 1, 2), 3, 500, 64, 64, 1, 3, 1, 3, 7, 1, False, True, "heads last", 2))  # ties
@example(Choice(torch.float32, "kv", (1, 1, 2), 3, 400, 16, 20, 4, 1, 0, 8, 5, 20, False, False, "contiguous", 0))  # a dot has 16 rows
@settings(max_examples=30)
def test_chosen_bins_are_those_of_sea(case):
    """Lists of ascending bins; ties to the lower cell and bin."""
    check_choose_bins(case)


@given(CHOICES.map(lambda case: replace(case, R=4)))
@settings(max_examples=8)
def test_a_step_chooses_the_bins_of_the_whole_call(case):
    """Query by query: from keys, in whatever order, not from all boxes; other rows are there that it does not use."""
    config, (scores, q, k, seen, row, row_seen, order) = case.config(), case.tensors()
    args = config.topk, config, 0.5
    whole = kernels.choose_bins(scores, q, k, seen, row, row_seen, *args, order=order)
    sure = case.is_exact | ~unsure_rows(case, scores, q, k, seen, row, row_seen, *args, order=order)
    with mock.patch.object(kernels, "_boxes_kernel", None):
        steps = [kernels.choose_bins(scores, q[:, :, i : i + 1], k, seen[:, i : i + 1], row[:, i : i + 1], row_seen, *args,
                                     order=order) for i in range(q.shape[2])]
    assert ((torch.cat(steps, 2) == whole).all(-1) | ~sure).all(), case


@given(CHOICES.map(lambda case: replace(case, R=4, S=max(case.S, 4))))
@settings(max_examples=3 if CUDA else 6)
def test_a_step_finds_the_candidates_that_another_has_left(case):
    """Bit for bit what it would find without them: after steps of the same row and of others, by the same options and by others."""
    config, (scores, q, k, seen, row, _, order) = case.config(), case.tensors()
    generator = torch.Generator().manual_seed(case.seed)
    row_seen = torch.stack([torch.randperm(case.S + 1, generator=generator)[:4] for _ in scores]).sort().values.to(DEVICE)
    topk, local = config.topk + config.bin + case.seed % 5, config.local + 1
    others = [replace(config, topk=topk, **change) for change in (
        dict(local=local), dict(first=case.first + config.bin), dict(bin=max(1, config.bin // 2)), dict(candidates=9),
        dict(group={"kv": "query", "query": "kv"}[config.group])) if topk >= 2 * (config.first + local)]
    wide = replace(config, topk=10**6, bin=config.bin + 1, first=config.n_first * (config.bin + 1))  # and else the same
    others.append(replace(wide, topk=math.ceil(wide.first + wide.n_last) + case.n_chosen * wide.bin))
    kept = kernels.no_candidates(config, k, config.topk)

    def choose(config, i, scores, kept, k=k, q=q):
        of_chooser = q[:, :, i : i + 1]
        if config.n_choosers != of_chooser.shape[1]:
            of_chooser = sea.repeat_heads(of_chooser[:, : k.shape[1]], config.n_choosers)
        return kernels.choose_bins(scores, of_chooser, k, seen[:, i : i + 1], row[:, i : i + 1], row_seen, config.topk, config, 0.5,
                                   order=order, kept=kept)

    with guarded():
        for i in range(0, q.shape[2], max(1, case.stride - 1)):  # of each row two or three
            for options in (config, config, others[(i + case.seed) % len(others)]):
                alone = choose(options, i, scores, None)
                assert torch.equal(choose(options, i, scores, kept), alone)
                if options.n_choosers == kept.shape[1] and kept.shape[3] >= kernels.no_candidates(options, k, options.topk).shape[3]:
                    wild = torch.full_like(k, torch.nan)
                    keys = wild if options.bin > 2 else k  # else they are not more to read
                    assert torch.equal(choose(options, i, -scores, kept, keys), alone)  # it did not look at scores and keys
            otherwise = [x.to(torch.float16 if k.dtype == torch.float32 else torch.float32) for x in (k, q)]
            assert torch.equal(choose(config, i, scores, kept, *otherwise), choose(config, i, scores, None, *otherwise))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("ordered, n_chosen", [(False, 2), (True, 0), (False, 200)])
def test_bins_are_chosen_whatever_the_numbers(ordered, n_chosen):
    """Rows of NaN and inf end, within their bounds, with their first and last bins, and cost no other row anything: scores,
    queries, and keys that some rows have among their candidates. Of no, of few and of all bins."""
    case = Choice(torch.float32, "kv", (1, 1, 2), 5, 400, 8, 16, 8, 28, 8, 8, n_chosen, 1, ordered, False, "contiguous", 0)
    config, (scores, q, k, *_, order) = case.config(), case.tensors()
    seen, row = torch.tensor([[400, 400, 400, 400, 100]], device=DEVICE), torch.arange(5, device=DEVICE)[None]
    choose = lambda f, queries, x, y: f(x, y[:, :, queries], k, seen[:, queries], row[:, queries], seen, config.topk, config, 0.5,
                                        order=order)
    k = k.nan_to_num(1.0)
    expected = choose(sea.choose_bins, slice(None), scores, q)
    wild, wild_q = scores.clone(), q.clone()
    wild[:, :, 1], wild[:, :, 2, 3:], wild_q[:, :, 3] = torch.nan, torch.inf, torch.nan
    finite, always = k, sea.always_bins(seen, config.in_cells(seen) // config.bin, config, 400)[0]
    for number in (None, math.nan, math.inf):
        if number is not None:
            place = 120 if order is None else order[0, 120]
            k = finite.clone()
            k[:, :, place, 2] = number
        with guarded():
            whole = choose(kernels.choose_bins, slice(None), wild, wild_q)
            steps = torch.cat([choose(kernels.choose_bins, slice(i, i + 1), wild, wild_q) for i in range(case.R)], 2)
        for bins in (whole, steps):
            assert torch.equal(bins[:, :, 4], expected[:, :, 4])
            assert number is not None or torch.equal(bins[:, :, 0], expected[:, :, 0])
            assert (((bins >= 0) & (bins < 50)) | (bins == sea.NONE)).all()
            assert (bins[..., 1:] > bins[..., :-1])[bins[..., 1:] != sea.NONE].all()
            assert all(set(x.tolist()) <= {*y.tolist(), sea.NONE} for x, y in zip(always, bins[0, 0]))


@given(st.integers(1, 80), st.integers(1, 40), st.sampled_from([1, 8, 64]))
@settings(max_examples=20)
def test_no_row_has_more_candidates_than_its_program_has_slots(n_wanted, width, n_bin):
    """Whichever cells are best, and no more than wanted unless one cell has more; all bins are candidates where they are as many."""
    config = sea.SEAConfig(n_head=1, d_head=2, width=width, bin=1, local=1, first=0, topk=2, candidates=n_wanted)
    for middle in range(1, n_bin + 1):
        n_bins = sea.keys_per_cell(torch.tensor([[middle]]), width)[0, 0]
        best = sea.candidate_cells(-n_bins.float().expand(1, 1, 1, -1), torch.tensor([[middle]]), config, 1)[0, 0, 0]
        few, most = n_bins[best].sum(), n_bins.sort(descending=True).values[: best.sum()].sum()
        assert most <= kernels._candidates(config, 2, width, n_bin)[1]
        assert most <= n_wanted or best.sum() == 1
        assert few == middle or middle > n_wanted


@pytest.mark.parametrize("argument, change", [
    ("scores", dict(scores=torch.zeros(1, 3, 3, 4))), ("q", dict(q=torch.zeros(1, 4, 3, 8))), ("row_seen", dict(row_seen=torch.ones(1, 7).long())),
    ("row", dict(row=torch.zeros(1, 7).long())), ("seen", dict(seen=torch.ones(2, 3).long())),
    ("topk", dict(topk=2**15, k=torch.zeros(1, 2, 1, 8).expand(1, 2, 2**17, 8))),
    ("k", dict(k=torch.zeros(1, 2, 9, 3))), ("k", dict(k=torch.zeros(1, 2, 9, 8).half())), ("topk", dict(topk=3)),
    ("group", dict(config=sea.SEAConfig(n_head=2, d_head=8, group="causal_batch"))),
])
def test_a_choice_that_cannot_be_made_is_named(argument, change):
    fits = dict(scores=torch.zeros(1, 2, 3, 4), q=torch.zeros(1, 2, 3, 8), k=torch.zeros(1, 2, 9, 8),
                seen=torch.ones(1, 3).long(), row=torch.zeros(1, 3).long(), row_seen=torch.ones(1, 3).long(), topk=64, config=sea.SEAConfig(n_head=2, d_head=8), softmax_scale=1.0)
    args = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in {**fits, **change}.items()}
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        kernels.choose_bins(**args)


# -- sparse attention --------------------------------------------------------------------------------------------------


@dataclass
class Sparse:
    """A call of sparse_attention, as numbers. `density` of the cells is kept; `padded`: some queries see nothing."""

    dtype: torch.dtype
    causal: bool
    T: int
    extra: int  # keys of the past
    heads: tuple[int, int, int]  # B, Hkv, H / Hkv
    D: int
    width: int
    density: float
    stride: int
    padded: bool
    layout: str
    per_program: int  # pairs of a dk, dv program: 1 splits the work on every key block
    seed: int

    def tensors(self):
        (B, Hkv, group), (T, S) = self.heads, (self.T, self.T + self.extra)
        generator = torch.Generator().manual_seed(self.seed)
        make = lambda h, n, layout: lay_out(torch.randn(B, h, n, self.D, generator=generator).to(self.dtype), layout)
        q, k, v = make(Hkv * group, T, self.layout), make(Hkv, S, self.layout), make(Hkv, S, LAYOUT_OF_V[self.layout])
        mask = torch.rand(B, Hkv * group, -(-T // self.stride), self.width, generator=generator) < self.density
        mask[:, :1] &= torch.rand(B, 1, mask.shape[2], 1, generator=generator) < 0.7  # empty rows, and heads that differ
        seen = (torch.arange(T) + 1 + self.extra if self.causal else torch.full((T,), S)).repeat(B, 1)
        if self.padded:
            seen[torch.rand(B, T, generator=generator) < 0.3] = 0
        row = (torch.arange(T) // self.stride).repeat(B, 1)
        return q, k, v, mask.to(DEVICE), by_column(seen), by_column(row) if self.stride > 1 else None


@st.composite
def sparse_cases(draw, size=2 * BLOCK + 3):
    return Sparse(
        dtype=draw(st.sampled_from(DTYPES)), causal=draw(st.booleans()), T=draw(st.integers(1, size)),
        extra=draw(st.integers(0, size) | st.integers(100, 300)), heads=draw(HEADS),
        D=draw(sizes(1, 2 * BLOCK + 3, 7, 35)), width=draw(sizes(1, 70, 3, 70)), density=draw(st.sampled_from([0.3, 1.0, 0.1, 0.0])),
        stride=draw(st.integers(1, 5)), padded=draw(st.booleans()), layout=draw(LAYOUTS),
        per_program=draw(st.sampled_from([64, 1])), seed=draw(st.integers(0, 99)))


def check_sparse_attention(case, change=lambda seen: seen):
    q, k, v, mask, seen, row = case.tensors()
    seen = change(seen)
    few = {} if CUDA else dict(VISITORS=4)  # so that a key block's tiles are listed in several rounds
    with mock.patch.multiple(kernels, PAIRS_PER_PROGRAM=case.per_program, **few):
        as_accurate_as_eager(case, lambda q, k, v: kernels.sparse_attention(q, k, v, mask, seen, row=row),
                             lambda q, k, v: sea.sparse_attention(q, k, v, mask, seen, row=row), [q, k, v])


@given(sparse_cases())
@example(Sparse(torch.float32, True, 35, 0, (1, 2, 2), 8, 3, 0.5, 4, False, "contiguous", 1, 0))  # cells wider than a block
@example(Sparse(torch.float32, True, 1, 66, (1, 1, 1), 17, 20, 0.3, 1, False, "gaps", 64, 1))  # decoding
@example(Sparse(torch.float32, True, 18, 400, (1, 1, 1), 8, 3, 0.5, 9, False, "contiguous", 64, 2))  # runs far apart
@example(Sparse(torch.float32, True, 9, 500, (1, 1, 1), 8, 40, 0.1, 5, False, "contiguous", 64, 0))
@settings(FEW)
@in_parts("dtype", *DTYPES)
def test_sparse_attention_matches_reference(dtype, case):
    check_sparse_attention(case if dtype is None else replace(case, dtype=dtype))


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_runs_of_a_plan_are_apart_and_end_with_unit_0(density):
    """Who reads ahead then reads a key that is there."""
    T, width, tiles = 300, 100, kernels._attention_tiles(torch.float16, 64)
    cells = torch.rand(1, 2, T, width, generator=torch.Generator().manual_seed(0)) < density
    seen = torch.arange(1, T + 1, device=DEVICE)[None]
    with guarded():
        runs, steps, max_runs = kernels._plan(kernels.pack_mask(cells.to(DEVICE)).bits, seen, None, width, T, tiles)
    for run, step in zip(runs.tolist(), steps.tolist()):
        n = next(i for i in range(max_runs + 1) if run[i][0] == 0 and (i > 0 or step == 0))
        assert all(first < end for first, end in run[:n])
        assert all(end + kernels.GAP.value < first for (_, end), (first, _) in itertools.pairwise(run[:n]))
        assert step == sum(-(-(end - first) * kernels.UNIT.value // tiles["BLOCK_N"]) for first, end in run[:n])


def test_keys_in_any_order():
    q, k, v, mask, seen, row = Sparse(torch.float32, True, 33, 20, (2, 1, 2), 16, 9, 0.5, 3, True, "gaps", 64, 3).tensors()
    order = torch.stack([torch.randperm(53, generator=torch.Generator().manual_seed(b)) for b in range(2)]).to(DEVICE)
    seen = seen.clamp(max=50)
    expected = kernels.sparse_attention(q, sea.take(k, order), sea.take(v, order), mask, seen, row=row)
    for b in range(2):  # the last in order are padding, which may hold anything
        k[b, :, order[b, 50:]] = v[b, :, order[b, 50:]] = torch.nan
    assert torch.equal(kernels.sparse_attention(q, k, v, mask, seen, row=row, order=order), expected)


@triton.jit
def first_block_kernel(x_ptr, out_ptr, strides, ROW: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    ptrs = _first_block(x_ptr, strides, 0, 0, offs, offs, ROW)
    out = ptrs.to(tl.int64) - x_ptr.to(tl.int64)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], out)


@pytest.mark.parametrize("row", [5, 2**26 - 1, 2**27 - 1, 2**30, 2**33])
def test_rows_of_keys_may_lie_far_apart(row):
    """Where the 32 rows of a block pass 2^31; only the addresses are looked at."""
    x, out = torch.zeros(1, device=DEVICE), torch.empty(32, 32, dtype=torch.int64, device=DEVICE)
    first_block_kernel[(1,)](x, out, (1, 1, row, 3), ROW=row, BLOCK=32)
    offs = torch.arange(32, device=DEVICE)
    assert torch.equal(out, (offs[:, None] * row + offs * 3) * 4)


def test_seen_in_any_order():
    """No law says that `seen` grows: a tile's shortest query may stand anywhere."""
    case = Sparse(torch.float32, True, 33, 120, (1, 1, 2), 16, 9, 0.1, 3, True, "contiguous", 64, 3)
    check_sparse_attention(case, lambda seen: (seen * 37 % 153).clamp(min=0))


def test_attention_csr_takes_packed_cells():
    from convert import attention_csr

    q, k, v, mask, seen, row = Sparse(torch.float32, True, 35, 9, (1, 1, 2), 8, 9, 0.3, 3, True, "contiguous", 64, 0).tensors()
    packed, plain = (attention_csr(q, k, sea.SEAOutput(q, seen, None, cells=cells, row=row))
                     for cells in (kernels.pack_mask(mask), mask))
    for ours, theirs, out in zip(packed[0], plain[0], kernels.sparse_attention(q, k, v, mask, seen, row=row)[0]):
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        torch.testing.assert_close(ours @ v[0, 0], out, rtol=1e-4, atol=1e-5)


def test_past_ignores_future():
    q, k, v, mask, seen, row = Sparse(torch.float32, True, 35, 0, (1, 1, 1), 8, 9, 0.6, 1, False, "contiguous", 64, 0).tensors()
    before = kernels.sparse_attention(q, k, v, mask, seen)
    k[:, :, 20:], v[:, :, 20:] = 1e3, -1e3
    after = kernels.sparse_attention(q, k, v, kernels.pack_mask(mask), seen)
    assert torch.equal(before[:, :, :20], after[:, :, :20]) and not torch.equal(before, after)


def test_full_mask_is_dense_attention():
    q, k, v, mask, seen, _ = Sparse(torch.float32, True, 35, 0, (1, 1, 2), 8, 40, 1.0, 1, False, "contiguous", 64, 0).tensors()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
    torch.testing.assert_close(kernels.sparse_attention(q, k, v, torch.ones_like(mask), seen), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument, change", [
    ("k", dict(k=torch.zeros(1, 3, 8, 4))), ("v", dict(v=torch.zeros(1, 1, 7, 4))), ("seen", dict(seen=torch.ones(1, 7))),
    ("mask", dict(mask=torch.zeros(1, 2, 4, 5).bool())), ("mask", dict(mask=torch.zeros(1, 2, 8, 5))),
    ("row", dict(row=torch.zeros(1, 7).long())), ("order", dict(order=torch.zeros(1, 7).long())),
    ("q", dict(q=torch.zeros(1, 2, 8))), ("q", dict(q=torch.zeros(1, 2, 8, 4).double())),
    ("k", dict(k=torch.zeros(1, 1, 8, 4).half())),
])
def test_arguments_that_do_not_fit_are_named(argument, change):
    fits = dict(q=torch.zeros(1, 2, 8, 4), k=torch.zeros(1, 1, 8, 4), v=torch.zeros(1, 1, 8, 4),
                mask=torch.zeros(1, 2, 8, 5).bool(), seen=torch.ones(1, 8).long())
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        kernels.sparse_attention(**{name: x.to(DEVICE) for name, x in {**fits, **change}.items()})


# -- attention to chosen bins ------------------------------------------------------------------------------------------


@dataclass
class Bins:
    """A call of bin_attention, as numbers. `density` of the bins is listed, those behind the last key included; `padded`: some
    queries see nothing."""

    dtype: torch.dtype
    T: int
    extra: int  # keys of the past
    heads: tuple[int, int, int, int]  # B, Hkv, choosers of each, query heads of each chooser
    D: int
    bin: int
    density: float
    padded: bool
    layout: str
    per_program: int  # visits of a dk, dv program, at least: 1 splits the work on every bin where there are few
    seed: int

    def lists(self, S, generator):
        (B, Hkv, choosers, _), n_bin = self.heads, -(-S // self.bin)
        keep = torch.rand(B, Hkv * choosers, self.T, n_bin + 1, generator=generator) < self.density
        keep[:, :, torch.rand(self.T, generator=generator) < 0.1] = False
        bins = torch.where(keep, torch.arange(n_bin + 1), sea.NONE).sort(-1).values
        return bins[..., : max(1, int(keep.sum(-1).max()) + self.seed % 2)].int()  # a NONE behind all, or none

    def tensors(self):
        (B, Hkv, choosers, group), (T, S) = self.heads, (self.T, self.T + self.extra)
        generator = torch.Generator().manual_seed(self.seed)
        make = lambda h, n, layout: lay_out(torch.randn(B, h, n, self.D, generator=generator).to(self.dtype), layout)
        q = make(Hkv * choosers * group, T, self.layout)
        k, v = make(Hkv, S, self.layout), make(Hkv, S, LAYOUT_OF_V[self.layout])
        seen = (torch.arange(T) + 1 + self.extra).repeat(B, 1)
        if self.padded:
            seen[torch.rand(B, T, generator=generator) < 0.3] = 0
        return q, k, v, self.lists(S, generator).to(DEVICE), by_column(seen)


@st.composite
def bin_cases(draw, size=2 * BLOCK + 3):
    heads = [(1, 1, 1, 1), (1, 2, 1, 3), (2, 1, 2, 1), (1, 1, 2, 3)]
    return Bins(
        dtype=draw(st.sampled_from(DTYPES)), T=draw(st.integers(1, size)), extra=draw(st.integers(0, size) | st.integers(100, 300)),
        heads=draw(st.sampled_from(heads[1::2] if CUDA else heads)), D=draw(sizes(1, 2 * BLOCK + 3, 7, 35)),
        bin=draw(st.sampled_from([8, 5] if CUDA else [8, 1, 4, 5, 16, 32, 33])), density=draw(st.sampled_from([0.3, 1.0, 0.1, 0.0])),
        padded=draw(st.booleans()),
        layout=draw(LAYOUTS), per_program=draw(st.sampled_from([64, 1])), seed=draw(st.integers(0, 99)))


def check_bin_attention(case, change=lambda seen: seen):
    q, k, v, bins, seen = case.tensors()
    seen = change(seen)
    few = mock.patch.multiple(bin_kernels, VISITS_PER_PROGRAM=case.per_program, MAX_EXTRA_PROGRAMS=99)
    with few if case.T <= 99 else contextlib.nullcontext():
        as_accurate_as_eager(case, lambda q, k, v: kernels.bin_attention(q, k, v, bins, seen, bin=case.bin),
                             lambda q, k, v: sea.bin_attention(q, k, v, bins, seen, bin=case.bin), [q, k, v])


@given(bin_cases())
@example(Bins(torch.float32, 35, 0, (1, 2, 1, 3), 8, 8, 0.3, False, "contiguous", 1, 0))
@example(Bins(torch.float32, 5, 9, (1, 1, 1, 35), 8, 8, 0.3, False, "gaps", 1, 0))  # more heads than a tile holds
@example(Bins(torch.float16, 35, 9, (1, 1, 1, 7), 16, 4, 0.3, True, "contiguous", 64, 2))  # two queries a tile, else four
@example(Bins(torch.float16, 70, 9, (1, 1, 1, 3), 16, 100, 0.5, True, "contiguous", 1, 1))  # wide bins
@example(Bins(torch.float32, 140, 9, (1, 1, 2, 1), 8, 2, 0.3, True, "gaps", 1, 1))  # several chunks of queries, bins of a unit
@settings(FEW)
@in_parts("dtype", *DTYPES)
def test_bin_attention_matches_reference(dtype, case):
    check_bin_attention(case if dtype is None else replace(case, dtype=dtype))


def test_bins_and_seen_in_any_order():
    case = Bins(torch.float32, 33, 120, (1, 1, 1, 2), 16, 8, 0.3, True, "contiguous", 64, 3)
    check_bin_attention(case, lambda seen: (seen * 37 % 153).clamp(min=0))


def test_all_bins_are_dense_attention():
    q, k, v, bins, seen = Bins(torch.float32, 35, 0, (1, 2, 1, 2), 8, 4, 1.0, False, "contiguous", 64, 0).tensors()
    bins = torch.arange(9, dtype=torch.int32, device=DEVICE).expand(1, 2, 35, 9)
    dense = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
    torch.testing.assert_close(kernels.bin_attention(q, k, v, bins, seen, bin=4), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_attention_of_grouped_heads_runs_fused(dtype):
    """As dense_below wants it: without PyTorch's own T x T scores, which are its last resort."""
    case = Bins(dtype, 35, 0, (1, 2, 1, 2), 16, 4, 1.0, False, "contiguous", 64, 0)
    *tensors, _, seen = case.tensors()
    q, k, v = (x.contiguous() for x in tensors)
    expected = sea.dense_attention(q, k, v, seen, 0.3, is_first=False)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        out = sea.dense_attention(q, k, v, None, 0.3, is_first=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_keys_that_a_query_does_not_see_are_not_read():
    q, k, v, bins, seen = Bins(torch.float32, 35, 20, (1, 1, 1, 2), 8, 8, 0.6, False, "contiguous", 64, 0).tensors()
    before = kernels.bin_attention(q, k, v, bins, seen, bin=8)
    k[:, :, 40:], v[:, :, 40:] = torch.nan, torch.inf  # that query 20 sees, and 21 to 23, with which it shares a tile
    after = kernels.bin_attention(q, k, v, bins, seen, bin=8)
    assert torch.equal(before[:, :, :20], after[:, :, :20]) and not torch.equal(before, after)


def test_bins_of_keys_in_any_order():
    q, k, v, bins, seen = Bins(torch.float32, 33, 20, (2, 1, 1, 2), 16, 8, 0.5, True, "gaps", 64, 3).tensors()
    order = torch.stack([torch.randperm(53, generator=torch.Generator().manual_seed(b)) for b in range(2)]).to(DEVICE)
    seen = seen.clamp(max=50)
    expected = kernels.bin_attention(q, sea.take(k, order), sea.take(v, order), bins, seen, bin=8)
    for b in range(2):  # the last in order are padding, which may hold anything
        k[b, :, order[b, 50:]] = v[b, :, order[b, 50:]] = torch.nan
    assert torch.equal(kernels.bin_attention(q, k, v, bins, seen, bin=8, order=order), expected)


def test_memory_of_bin_attention_is_linear_in_the_number_of_tokens():
    """What is kept and what the backward pass needs: no launch is asked for T x T numbers."""
    def numbers(T):
        case = Bins(torch.float32, T, 0, (1, 1, 1, 2), 4, 8, 0.0, False, "contiguous", 64, 0)
        q, k, v, bins, seen = case.tensors()
        bins, allocated, real = bins.new_full((*bins.shape[:3], 3), sea.NONE), [], torch.Tensor.numel

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                allocated.extend(real(x) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
                return out

        with Count(), mock.patch.multiple(bin_kernels, **{name: mock.MagicMock() for name in dir(bin_kernels)
                                                          if name.startswith("_bin_attention") and name.endswith("_kernel")},
                                          _sum_bin_parts_kernel=mock.MagicMock(), _visits_kernel=mock.MagicMock()):
            kernels.bin_attention(q.requires_grad_(), k, v, bins, seen, bin=8).sum().backward()
        return max(allocated)

    assert numbers(4096) <= 4.1 * numbers(1024)


@pytest.mark.parametrize("argument, change", [
    ("k", dict(k=torch.zeros(1, 3, 8, 4))), ("v", dict(v=torch.zeros(1, 1, 7, 4))), ("seen", dict(seen=torch.ones(1, 7))),
    ("bins", dict(bins=torch.zeros(1, 2, 4, 5).int())), ("bins", dict(bins=torch.zeros(1, 2, 8, 5).long())),
    ("bins", dict(bins=torch.zeros(1, 3, 8, 5).int())), ("bins", dict(bins=torch.zeros(2, 2, 8, 5).int())),
    ("bins", dict(bins=torch.zeros(1, 2, 8, 0).int())), ("bin", dict(bin=0)), ("bin", dict(bin=8.0)),
    ("order", dict(order=torch.zeros(1, 7).long())),
    ("q", dict(q=torch.zeros(1, 2, 8))), ("q", dict(q=torch.zeros(1, 2, 8, 4).double())),
    ("k", dict(k=torch.zeros(1, 1, 8, 4).half())), ("q", dict(q=torch.zeros(1, 2, 8, 257), k=torch.zeros(1, 1, 8, 257))),
])
def test_arguments_of_bin_attention_that_do_not_fit_are_named(argument, change):
    fits = dict(q=torch.zeros(1, 2, 8, 4), k=torch.zeros(1, 1, 8, 4), v=torch.zeros(1, 1, 8, 4),
                bins=torch.zeros(1, 2, 8, 5).int(), seen=torch.ones(1, 8).long(), bin=8)
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        kernels.bin_attention(**{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in {**fits, **change}.items()})


# -- teacher attention pooled to cells ---------------------------------------------------------------------------------


def check_pool_attention(case, bin=0, local=0, first=0):
    q, k, _, mask, seen, _ = case.tensors()
    options = dict(in_cells=(seen - local).clamp(0) // bin * bin, unit=bin, first=first) if bin else {}
    results = lambda pooled: [pooled.cells, pooled.a_log_a, pooled.a_square]
    as_accurate_as_eager(case, lambda q, k: results(kernels.pool_attention(q, k, seen, case.width, **options)),
                         lambda q, k: results(sea.pool_attention(q, k, seen, case.width, **options)), [q, k])


@given(sparse_cases())
@example(Sparse(torch.float32, True, 18, 17, (1, 2, 2), 8, 2, 0.5, 1, True, "gaps", 1, 0))  # cells that span blocks
@settings(max_examples=20 if CUDA else 10)  # a running sum with its own rule is slow in the interpreter
def test_pool_attention_matches_reference(case):
    check_pool_attention(case)


@given(sparse_cases(), st.sampled_from([8, 1] if CUDA else [8, 1, 5, 16]), st.sampled_from([28, 0, 3]), st.sampled_from([8, 0, 3]))
@example(Sparse(torch.float32, True, 18, 87, (1, 2, 2), 8, 3, 0.5, 1, True, "gaps", 1, 0), 5, 3, 3)  # units that span blocks
@settings(max_examples=20 if CUDA else 8)
def test_pool_attention_over_bins_matches_reference(case, bin, local, first):
    """The last keys are in no cell and, as the first, in no sum, but in the softmax; a bin is in one cell."""
    check_pool_attention(case, bin, local, first)


def test_pooled_attention_is_what_the_estimate_loss_takes():
    q, k, _, _, seen, _ = Sparse(torch.float32, True, 20, 5, (1, 1, 1), 8, 7, 0.5, 1, True, "contiguous", 1, 0).tensors()
    ours, theirs = (module.pool_attention(q, k, seen, 7, 0.3) for module in (kernels, sea))
    scores = torch.ones(1, 1, 20, 7, device=DEVICE)
    assert ours._fields == tuple(vars(theirs)) and ours.n_keys == theirs.n_keys
    torch.testing.assert_close(sea.estimate_loss(scores, ours, seen), sea.estimate_loss(scores, theirs, seen))


# -- the estimator, the mix, and the whole layer -----------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 128, 300])
def test_running_sums_go_on_from_block_to_block(n, reverse):
    generator = torch.Generator().manual_seed(0)
    x, initial = torch.randn(2, n, 3, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
    with guarded():
        sums = estimator_kernels._running_sums(x.to(DEVICE), initial.to(DEVICE), reverse).cpu()
    before = torch.cat([torch.zeros(2, 1, 3, 7), x.flip(1) if reverse else x], dim=1).cumsum(1) + initial[:, None]
    torch.testing.assert_close(sums, before.flip(1) if reverse else before, rtol=1e-4, atol=1e-4)


MOST_BEFORE = 40  # tokens


@dataclass
class Layer:
    """A layer and its input, as numbers."""

    dtype: torch.dtype
    T: int
    stride: int
    heads: tuple[int, int, int]  # B, Hkv, H / Hkv
    D: int
    width: int
    topk: int
    padded: bool
    layout: str
    seed: int
    cell_keys: bool = True
    bin: int = 4  # then topk is what there is beside first and last keys; 0: cells
    cnn: bool = True

    def config(self, **changes):
        _, Hkv, group = self.heads
        fields = dict(n_head=Hkv * group, n_kv_head=Hkv, d_head=self.D, width=self.width, topk=self.topk, query_stride=self.stride,
                      nbf=2 if self.D < 64 else 8, max_positions=4096, cell_keys=self.cell_keys, bin=self.bin,
                      cnn=self.cnn)
        if self.bin:
            fields |= dict(local=5, first=3, candidates=2, topk=-(-3 // self.bin) * self.bin + 5 + self.bin + self.stride + self.topk)
        return sea.SEAConfig(**{**fields, **changes})

    def layer(self, **changes):
        torch.manual_seed(self.seed)
        layer = sea.SEAttention(self.config(**changes))
        for parameter in layer.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return layer.to(DEVICE)

    def qkv(self):
        (B, Hkv, group), generator = self.heads, torch.Generator().manual_seed(self.seed)
        layouts = self.layout, self.layout, LAYOUT_OF_V[self.layout]
        return [lay_out(torch.randn(B, h, self.T, self.D, generator=generator).to(self.dtype), layout)
                for h, layout in zip((Hkv * group, Hkv, Hkv), layouts)]

    def valid(self):
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.rand(self.heads[0], self.T, generator=generator) < 0.8).to(DEVICE) if self.padded else None

    def tokens(self):
        """count and n_new (B,): tokens of each sequence before a call, none in every other case, and in it."""
        generator, (B, _, _) = torch.Generator().manual_seed(self.seed), self.heads
        count = torch.randint(MOST_BEFORE + 1, (B,), generator=generator) * (self.seed % 2)
        n_new = torch.randint(0 if self.padded else self.T, self.T + 1, (B,), generator=generator)
        return count.to(DEVICE), n_new.to(DEVICE)


LAYERS = st.builds(Layer, dtype=st.sampled_from(DTYPES), T=st.integers(1, 6 * BLOCK + 3), stride=sizes(1, 5, 1, 3),
                   heads=HEADS, D=sizes(2, BLOCK + 3, 19),
                   width=sizes(1, 5 * BLOCK + 3, 83), topk=st.integers(1, 9), padded=st.booleans(), layout=LAYOUTS,
                   seed=st.integers(0, 99), cell_keys=st.booleans(), bin=st.sampled_from([4, 0]))
FEWER = settings(max_examples=8)


def check_causal_context(case):
    """With one program in all, it walks all chunks; and positions are then added up one head at a time."""
    programs, heads = estimator_kernels.CONTEXT["programs"], estimator_kernels.SUM_POSITIONS["BLOCK_H"]
    programs, heads = (programs, heads) if case.seed % 3 else (1, 1)
    with (mock.patch.dict(estimator_kernels.CONTEXT, programs=programs),
          mock.patch.dict(estimator_kernels.SUM_POSITIONS, BLOCK_H=heads)):
        _check_causal_context(case)


def check_estimator(case):
    programs = estimator_kernels.CONV["programs"] if case.seed % 3 else 1
    with mock.patch.dict(estimator_kernels.CONV, programs=programs):
        _check_estimator(case)


def in_fp32(x):
    """Sums of the past are fp32, or fp64 in the exact reference."""
    return x if x.dtype == torch.float64 else x.float()


def _check_causal_context(case):
    (q, k, v), (count, n_new), (B, Hkv, _), D, m = case.qkv(), case.tokens(), case.heads, case.D, case.D // 2 + 1
    generator = torch.Generator().manual_seed(case.seed)
    longest = max(1, int((count + n_new).max()))  # whose last token has the table's last row
    position = torch.randn(longest, D, generator=generator).to(DEVICE, case.dtype)
    projection = sea.orthogonal_features(D, m, generator).to(DEVICE)
    past = torch.rand(B, Hkv, m, 2 * D + 1, generator=generator).to(DEVICE, case.dtype) * (case.seed % 2)
    # A row's gradient by phi(q) is a sum over its keys less their mean, both over the denominator: times that of a mean phi(q),
    # neither is large, also where all phi(q) are near 1e-3.
    q_feat, k_feat = (sea.relu_features(x.double(), projection) for x in sea.scaled_qk(q[:, :, :: case.stride], k, D**-0.5))
    norm = past[..., -1].double()[:, :, None] + (k_feat * sea.is_token(k, n_new)).cumsum(2)
    norm = sea.take(sea.repeat_heads(norm, q.shape[1]), sea.row_places(count, case.T, case.stride).clamp(max=case.T - 1))
    weight = (q_feat * norm).sum(-1, keepdim=True) / norm.sum(-1, keepdim=True).clamp(min=1e-30)

    def call(f):
        def run(q, k, v, position, past):
            context, sums = f(q, k, v, position, projection, D**-0.5, case.stride, count, n_new, in_fp32(past))
            return context.to(q.dtype), sums
        return run
    as_accurate_as_eager(case, call(kernels.causal_context), call(sea.causal_context),
                         [q[:, :, :: case.stride], k, v, position, past], relu=True, weights={0: weight})


def _check_estimator(case):
    """encode_rows, causal_cnn and mix_average, on what the reference gives each of them."""
    (q, _, v), (count, n_new) = case.qkv(), case.tokens()
    layer, generator = case.layer().to(case.dtype), torch.Generator().manual_seed(case.seed)
    (B, H, T, D), (P,), has_past = q.shape, layer.cnn.norm.weight.shape, case.seed % 2
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, case.dtype)
    context, image, past = make(B, H, T, 2 * D), make(B, 2 * H, T, P), make(2, B, 2 * H, 4 * has_past, P)
    own = lambda x: layer.double() if x.dtype == torch.float64 else layer.to(case.dtype)

    def encode(f):
        def run(context, v):
            layer = own(v)
            image, gates = f(context, v, layer.encoder, layer.decoder, layer.cnn, layer.gate)
            return image, gates.to(v.dtype)
        return run

    def cnn(f):
        def run(image, *past):
            scores, last = f(image, own(image).cnn, past, n_new)
            return scores, *last
        return run

    valid, n_before = case.valid(), has_past * (case.stride > 1)
    seen, row, row_seen, *_ = sea.choose_rows(count, n_new, T, case.stride, n_before)
    if valid is not None:  # padding may also lie between
        seen = (count[:, None] + valid.cumsum(1)) * valid
    seen, row = by_column(seen), by_column(row)
    gates, v_sum = lay_out(make(B, H, row_seen.shape[1], 2), case.layout), make(B, v.shape[1], D) * has_past
    mix = lambda f: lambda sparse, v, gates, past: f(sparse, v, gates, seen, row, past)
    as_accurate_as_eager(case, encode(kernels.encode_rows), encode(sea.encode_rows), [context, v])
    is_fp32, of_cnn = case.dtype == torch.float32, (cnn(kernels.causal_cnn), cnn(sea.causal_cnn), [image, *past])
    as_accurate_as_eager(case, *of_cnn, relu=is_fp32, gradients=is_fp32)
    if not is_fp32:  # where one relu that rounds to the other side of 0 is half of a small result's gradients
        keep_relus_apart(own(image.double()).cnn, image.double(), past.double(), n_new)
        as_accurate_as_eager(case, *of_cnn)
    as_accurate_as_eager(case, mix(kernels.mix_average), mix(sea.mix_average), [q, v, gates, v_sum])


@torch.no_grad()
def keep_relus_apart(cnn: sea.CausalCNN, image: torch.Tensor, past: torch.Tensor, n_new: torch.Tensor) -> None:
    """Biases that put what enters each relu well above 0 in even channels, and below in odd ones."""
    for conv in (cnn.conv1, cnn.conv2):
        found = []
        conv.bias.zero_()
        with mock.patch.object(sea.F, "relu", lambda x, found=found: found.append(x) or torch.relu(x)):
            cnn(image, past, n_new)
        largest = found[0 if conv is cnn.conv1 else 1].abs().max()
        conv.bias += 1.25 * largest * (1 - 2 * (torch.arange(len(conv.bias), device=conv.bias.device) % 2))


def check_cell_keys(case, before=0, softmax_scale=0.3, local=None):
    """With one program in all, it has every tile, or one a head every bucket."""
    most = {} if case.seed % 3 else dict(programs=1)
    with mock.patch.dict(estimator_kernels.CELL_KEYS, most), mock.patch.dict(estimator_kernels.STEP_BUCKETS, most):
        _check_cell_keys(case, before, softmax_scale, local, bounds=case.bin > 0)


def _check_cell_keys(case, before, softmax_scale, local, bounds):
    """Of the last tokens, after up to `before` others whose bins are given; rows as the layer hands them over. local: how many keys
    at least are in no cell, and the others in bins of 4."""
    (q, k, _), (B, Hkv, _), stride, T = case.qkv(), case.heads, case.stride, case.T
    generator = torch.Generator().manual_seed(case.seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, case.dtype)

    def tokens(n):
        return torch.randint(0 if case.padded else n, n + 1, (B,), generator=generator).to(DEVICE)

    def row_seen(count, n_new, n_tokens):
        n_before = (stride > 1) * bool(before)
        return sea.choose_rows(count, n_new, n_tokens, stride, n_before)[2][:, n_before:]

    count, past = torch.zeros(B, dtype=torch.long, device=DEVICE), torch.zeros(B, Hkv, 2 * case.width, (3 if bounds else 1) * case.D,
                                                                                   device=DEVICE)
    gain = make(q.shape[1])
    if before:
        n_new, rows = tokens(before), q[:, :, :before:stride]
        past = sea.add_cell_keys(make(*rows.shape[:3], case.width), gain, rows, k[:, :, :before],
                                 row_seen(count, n_new, before), softmax_scale, count, n_new, past, bounds=bounds)[1]
        count = n_new
    n_new, rows, k = tokens(T - before), q[:, :, before::stride], k[:, :, before:]
    t = row_seen(count, n_new, T - before)
    in_cells = None if local is None else by_column((t - local).clamp(0) // 4 * 4)

    def call(f):
        def run(scores, gain, q, k, past):
            scores = scores + 0  # it works in place
            scores, sums = f(scores, gain, q, k, t, softmax_scale, count, n_new, in_fp32(past), in_cells, bounds=bounds)
            return scores.to(q.dtype), sums
        return run
    scores = make(*rows.shape[:3], case.width)
    check = step_as_accurate_as_eager if T - before == 1 else functools.partial(
        as_accurate_as_eager, cancel={3: 32 * scores.numel() ** 0.5})  # the gradient of gain adds up scores down to -32
    check(case, call(kernels.add_cell_keys), call(sea.add_cell_keys), [scores, gain, rows, k, past.to(case.dtype)])
    with torch.no_grad(), guarded():  # no scores are zeros
        none, zeros = (kernels.add_cell_keys(x, gain, rows, k, t, softmax_scale, count, n_new, past, in_cells, bounds=bounds)
                       for x in (None, torch.zeros_like(scores)))
    assert all(torch.equal(*xs) for xs in zip(none, zeros, strict=True))


def kept(result, n_keys):
    """What each query attends to: cells, or the keys of its bins."""
    return result.mask if result.bins is None else result.attended(n_keys)


def check_layer(case, *, rtol=2e-4):
    """Both backends in fp32: the same cells or bins, outputs, states and gradients of everything; and any split gives the whole."""
    ours, theirs = case.layer(backend="triton"), case.layer(backend="torch")
    results = []
    for layer in (ours, theirs):
        xs = [x.detach().requires_grad_() for x in case.qkv()]
        result = layer(*xs, valid=case.valid())
        generator = torch.Generator().manual_seed(1)
        # a loss on scores, too; those of rows that belong to no query are anything
        used = torch.zeros(*result.scores.shape[:3], 1, device=DEVICE).index_fill_(2, result.row[0], 1.0) * (case.valid() is None)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(DEVICE)).sum() for x in (result.out, result.scores * used))
        loss.backward()
        grads = {name: p.grad for name, p in layer.named_parameters()} | dict(zip("qkv", (x.grad for x in xs)))
        state = {name: x for name, x in vars(result.state).items() if name in ("sums", "v_sum", "key_sums") and x is not None}
        results.append({"out": result.out, "kept": kept(result, case.T), **state, **{f"d{name}": g for name, g in grads.items()}})
    assert torch.equal(results[0].pop("kept"), results[1].pop("kept")), case
    for name, expected in results[1].items():
        if expected is not None and expected.numel():
            scale = expected.abs().max().clamp(min=1.0)
            error = (results[0][name] - expected).abs().max() / scale
            assert error <= rtol, f"{name}: {error:.1e}: {case}"
    if not case.padded and case.T > 1:
        cut, (q, k, v) = case.T // 2, case.qkv()
        with torch.no_grad():
            head = ours(*(x[:, :, :cut] for x in (q, k, v)))
            tail = ours(*(x[:, :, cut:] for x in (q, k, v)), state=head.state)
        torch.testing.assert_close(torch.cat([head.out, tail.out], 2), results[0]["out"], rtol=1e-3, atol=1e-4)


@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 1), st.integers(1, 3), sizes(1, 80, 35, 64), LAYOUTS,
       st.booleans(), st.booleans(), st.integers(0, 99))
@example(torch.float16, torch.float32, 1, 1, 35, "contiguous", False, True, 1)  # keeps the row of the past
@example(torch.float16, torch.float32, 1, 1, 35, "contiguous", False, True, 0)
@settings(max_examples=20)
def test_rows_kept_are_those_of_sea(dtype, dtype_of_past, n_past, R, size, layout, no_row, in_place, seed):
    """Bit for bit, of a past row in another dtype, too, or of none; of the one that is kept there may be none."""
    generator = torch.Generator().manual_seed(seed)
    past, x = (torch.randn(2, 3, n, size, generator=generator).to(d) for n, d in ((n_past, dtype_of_past), (R, dtype)))
    in_place = in_place and n_past == 1 - no_row
    last = torch.randint(n_past + R, (2, 1 - no_row), generator=generator).to(DEVICE)
    pasts = [lay_out(past.clone(), layout) for _ in range(2)]
    with torch.no_grad(), guarded():
        ours = kernels.keep_row(pasts[0], lay_out(x, layout), last, in_place)
    theirs = sea.keep_row(pasts[1], x.to(DEVICE), last, in_place)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    assert not in_place or ours[1] is pasts[0]
    if n_past:
        assert kernels.keep_row(past.to(DEVICE), x.to(DEVICE).requires_grad_(), last)[0].requires_grad


@given(st.sampled_from(DTYPES), HEADS, sizes(1, 70, 1, 33), sizes(1, 80, 35, 64), LAYOUTS, st.integers(0, 99))
@settings(max_examples=20)
def test_entries_and_means_are_those_of_sea(dtype, heads, T, D, layout, seed):
    """An entry a sequence bit for bit, any number of them and with gradients in PyTorch; the mean of equal heads is each of them."""
    (B, Hkv, group), generator = heads, torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(B, Hkv * group, n, D, generator=generator).to(dtype)
    x, y = lay_out(make(T), layout), lay_out(make(T), LAYOUT_OF_V[layout])
    for n in 1, 3:
        index = torch.randint(T, (B, n), generator=generator).to(DEVICE)
        with guarded(), torch.no_grad():
            taken = kernels.take_pair(x, y, index)
        assert all(torch.equal(*xs) for xs in zip(taken, sea.take_pair(x, y, index), strict=True))
    assert all(z.requires_grad for z in kernels.take_pair(*(z.detach().requires_grad_() for z in (x, y)), index[:, :1]))
    with torch.no_grad():  # behind the last entry there is nothing, not the next head's
        assert all(z.isnan().all() for i in (-1, T) for z in kernels.take_pair(x, y, torch.full_like(index[:, :1], i)))
    with guarded():
        mean, equal = kernels.mean_of_heads(x, Hkv), kernels.mean_of_heads(sea.repeat_heads(x[:, :Hkv], Hkv * group), Hkv)
        share = torch.rand(Hkv * group, generator=generator).to(DEVICE, dtype)
        by_share = [kernels.mean_of_heads(x, n, share) for n in (Hkv, Hkv * group)]
        alike = kernels.mean_of_heads(x, Hkv, torch.full_like(share, 1 / group, dtype=torch.float32))
    torch.testing.assert_close(mean, sea.mean_of_heads(x, Hkv))
    torch.testing.assert_close(by_share, [sea.mean_of_heads(x, n, share) for n in (Hkv, Hkv * group)])
    assert torch.equal(equal, x[:, :Hkv]) and torch.equal(alike, mean)


@given(st.integers(1, 3), st.integers(1, 40) | st.sampled_from([255, 256, 257, 600]), st.integers(1, 40), st.booleans(),
       st.sampled_from([(0, 1), (8, 4), (3, 1)]), st.integers(0, 99))
@example(2, 1, 3, True, (8, 4), 1)  # a decoding step
@settings(max_examples=40)
def test_rows_are_those_of_sea(B, T, stride, has_past, behind, seed):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(3 * stride, (B,), generator=generator).to(DEVICE) * has_past
    n_new = torch.randint(T + 1, (B,), generator=generator).to(DEVICE)
    n_before = int(has_past and stride > 1)
    with guarded():
        ours = kernels.choose_rows(count, n_new, T, stride, n_before, *behind)
    for x, y in zip(ours, sea.choose_rows(count, n_new, T, stride, n_before, *behind), strict=True):
        assert x.dtype == torch.int64 and x.is_contiguous() and torch.equal(x, y)


@given(LAYERS)
@example(Layer(torch.float32, 70, 3, (1, 2, 2), 16, 20, 4, True, "gaps", 1))
@example(Layer(torch.float32, 70, 3, (2, 1, 1), 4, 20, 4, True, "gaps", 3))  # sequences of which different positions are used
@example(Layer(torch.float32, 17, 1, (1, 1, 2), 6, 1, 1, True, "contiguous", 95, False))  # a row all of whose phi(q) are near 1e-3
@settings(FEWER)
def test_causal_context_matches_reference(case):
    check_causal_context(case)


@given(LAYERS)
@example(Layer(torch.float16, 35, 3, (1, 2, 2), 16, 20, 4, True, "gaps", 1))
@example(Layer(torch.float16, 70, 1, (1, 1, 2), 19, 83, 1, False, "contiguous", 93))  # a relu on either side of 0, near the past
@example(Layer(DTYPES[-1], 3, 1, (1, 1, 1), 64, 64, 4, False, "contiguous", 1))  # few rows have tiles of their own
@settings(FEWER)
def test_encode_cnn_and_mix_match_reference(case):
    check_estimator(case)


@given(LAYERS, st.integers(0, 6 * BLOCK), st.sampled_from([0.3, 5.0]))
@example(Layer(torch.float32, 35, 1, (1, 2, 2), 16, 8, 4, False, "gaps", 3), 0, 0.3)  # levels begin after 16 and 32 keys
@example(Layer(torch.float32, 34, 3, (2, 2, 1), 16, 4, 4, True, "gaps", 2), 7, 0.3)
@example(Layer(torch.float32, 33, 1, (2, 1, 2), 16, 8, 4, False, "contiguous", 1), 32, 0.3)  # a step that begins a level
@example(Layer(torch.float32, 20, 1, (1, 1, 1), 4, 8, 4, False, "contiguous", 1), 10, 0.3)  # 10 keys that begin one
@example(Layer(torch.float32, 36, 1, (1, 1, 1), 4, 16, 4, False, "contiguous", 1), 33, 0.3)  # a bin of the past just begun
@example(Layer(torch.float32, 46, 4, (2, 1, 2), 33, 20, 4, False, "contiguous", 1), 45, 0.3)  # no row, its key in a begun bucket of two blocks
@example(Layer(torch.float16, 33, 1, (1, 1, 2), 64, 64, 4, False, "heads last", 0), 32, 5.0)
@example(Layer(torch.float32, 50, 3, (2, 1, 1), 19, 83, 1, True, "contiguous", 35), 1, 5.0)  # a gradient that cancels
@settings(FEW)
def test_cell_keys_match_reference(case, before, softmax_scale):
    check_cell_keys(case, min(before, case.T - 1), softmax_scale)


@given(LAYERS, st.integers(0, 6 * BLOCK), st.sampled_from([28, 0, 3]))
@example(Layer(torch.float32, 99, 3, (2, 1, 2), 16, 8, 4, True, "gaps", 3), 0, 28)
@example(Layer(torch.float32, 99, 1, (2, 1, 2), 16, 8, 4, False, "contiguous", 1), 98, 28)  # a step
@settings(max_examples=10)
def test_cell_keys_of_cells_that_end_before_the_last_keys(case, before, local):
    """The middles of cells move, the bins of keys do not."""
    check_cell_keys(case, min(before, case.T - 1), local=local)


@pytest.mark.parametrize("n", [5, 1])
def test_cell_keys_are_exact_at_any_length(n):
    """Where 2 * t * p passes 2^31, and a level begins."""
    width, count = 200, torch.tensor([400 * 2**14 - 2], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    q, k, past = (torch.randn(1, 1, n, 4, generator=generator).to(DEVICE) for n in (n, n, 400))
    seen, gain = count + torch.arange(1, n + 1, device=DEVICE)[None], torch.ones(1, device=DEVICE)
    with torch.no_grad():
        n_new = torch.tensor([n], device=DEVICE)
        ours, theirs = (f(torch.zeros(1, 1, n, width, device=DEVICE), gain, q, k, seen, 2.0**14, count, n_new, past)
                        for f in (kernels.add_cell_keys, sea.add_cell_keys))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y)


@given(LAYERS.map(lambda case: replace(case, dtype=torch.float32)))
@example(Layer(torch.float32, 90, 3, (1, 1, 2), 16, 11, 4, True, "gaps", 1))
@example(Layer(torch.float32, 50, 3, (1, 1, 2), 16, 11, 4, True, "gaps", 1, bin=0))
@example(Layer(torch.float32, 90, 3, (1, 2, 2), 16, 11, 4, True, "gaps", 1, cnn=False))
@example(Layer(torch.float32, 2, 1, (1, 1, 1), 2, 300, 4, False, "contiguous", 1, cell_keys=False))  # a row in several chunks
@settings(max_examples=5)
@in_parts("stride", 1, 3)
def test_layer_is_the_same_on_both_backends(stride, case):
    check_layer(case if stride is None else replace(case, stride=stride))


@pytest.mark.parametrize("group", ["causal_batch", "query", "head", "batch"])
def test_a_bidirectional_layer_is_the_same_on_both_backends(group):
    """Its estimate, cell keys included, is the reference's on either, its choice and attention are the kernels'."""
    case, results = Layer(torch.float32, 2 * BLOCK + 3, 1, (2, 1, 2), 8, 11, 4, True, "gaps", 1, bin=0), []
    for backend in ("torch", "triton"):
        layer = case.layer(backend=backend, causal=False, group=group)
        result = layer(*case.qkv(), valid=case.valid())
        of_gain, = torch.autograd.grad(result.out.square().sum(), layer.key_gain)
        results.append((result.scores, result.mask, result.out, of_gain))
    (scores, mask, out, of_gain), theirs = results
    assert torch.equal(scores, theirs[0]) and torch.equal(mask, theirs[1]) and of_gain.all()
    torch.testing.assert_close((out, of_gain), theirs[2:], rtol=1e-4, atol=1e-5)


@given(LAYERS.map(lambda case: replace(case, dtype=torch.float32, padded=True, T=min(case.T, 20))), st.integers(6, 19))
@example(Layer(torch.float32, 18, 3, (2, 1, 2), 16, 20, 4, True, "gaps", 1), 9)
@example(Layer(torch.float32, 10, 3, (2, 1, 2), 16, 20, 4, True, "gaps", 1, bin=0), 6)
@settings(max_examples=3 if CUDA else 1)  # a launch a chunk and kernel: slow in the interpreter
def test_what_padding_holds_goes_nowhere(case, rows):
    """NaN in padding, in chunks that look back at it: the outputs and gradients of zeros there."""
    layer, valid, results = case.layer(backend="triton"), case.valid(), []
    for fill in (0.0, float("nan")):
        q, k, v = (x.masked_fill(~valid[:, None, :, None], fill) for x in case.qkv())
        xs = [x.requires_grad_() for x in (q, k, v)]
        out = layer(*xs, valid=valid, kv_cached=True, rows_at_once=rows).out
        results.append([out, *torch.autograd.grad(out, xs, torch.ones_like(out))])
    for zeros, nans in zip(*results):
        assert torch.equal(zeros, nans)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of inf - inf, in the interpreter
@pytest.mark.parametrize("bin", [4, 0])
@pytest.mark.parametrize("stride, dtype, number", [(1, torch.float32, math.inf), (3, torch.float16, math.nan)])
def test_a_key_that_is_not_finite_changes_no_earlier_row(stride, dtype, number, bin):
    """In its tile and among its neighbours in bins, those of the past and of cell keys included. Rows that come later choose
    among bins of which it is one."""
    case = Layer(dtype, 33, stride, (1, 1, 2), 8, 4, 6, False, "contiguous", 1, bin=bin)
    layer, (q, k, v), first, place = case.layer(backend="triton").to(dtype), case.qkv(), 5, 21
    bad = k.clone()
    bad[:, :, place, 2] = number
    with torch.no_grad():
        state = layer(*(x[:, :, :first] for x in (q, k, v)), kv_cached=True).state
        before, after = (layer(q[:, :, first:], keys, v, state=state, kv_cached=True) for keys in (k, bad))
    for of in (lambda x: x.probs, lambda x: kept(x, case.T), lambda x: x.out):
        x, y = (of(result)[:, :, : place - first] for result in (before, after))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # cells of its tile's later rows change the order of sums
    assert not torch.equal(before.out[:, :, place - first :], after.out[:, :, place - first :])  # it is seen


@pytest.mark.parametrize("bin", [4, 0])
def test_an_empty_batch_gives_an_empty_batch(bin):
    layer = Layer(torch.float32, 9, 1, (1, 1, 2), 8, 8, 4, False, "contiguous", 1, bin=bin).layer(backend="triton")
    q, k, v = (torch.zeros(0, h, 9, 8, device=DEVICE, requires_grad=True) for h in (2, 1, 1))
    result = layer(q, k, v)
    result.out.sum().backward()
    assert result.out.shape == q.grad.shape == (0, 2, 9, 8) and layer.gate.weight.grad is not None
    with torch.no_grad():
        assert layer(*(x[:, :, :1] for x in (q, k, v)), state=result.state).out.shape == (0, 2, 1, 8)
    assert kernels.pool_attention(q, k, torch.ones(0, 9, dtype=torch.long, device=DEVICE), 4).cells.shape == (0, 2, 9, 4)


# -- many heads --------------------------------------------------------------------------------------------------------


def test_a_grid_has_its_heads_on_the_axis_that_holds_them():
    """The other two end at 65,535. Grids of all kernels, forward, backward and decoding, of 70,000 sequences of two heads;
    nothing is computed."""
    grids = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids.setdefault(self.name, []).append(grid)
            return lambda *args, **kwargs: None

    zeros = lambda *size, **kwargs: torch.zeros(*size, **{"device": DEVICE, **kwargs})
    modules = {module: [name for name in vars(module) if name.endswith("_kernel")]
               for module in (kernels, bin_kernels, estimator_kernels)}
    with contextlib.ExitStack() as stack:
        for module, names in modules.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, Recorder(name)))
        stack.enter_context(mock.patch.object(torch, "empty", zeros))
        stack.enter_context(mock.patch.object(torch, "empty_like", torch.zeros_like))
        B, T = 70_000, 2
        config = sea.SEAConfig(n_head=2, d_head=2, width=4, nbf=1, query_stride=2, max_positions=4, bin=0, backend="triton")
        layer = sea.SEAttention(config).to(DEVICE)
        qkv = [torch.zeros(B, 2, T, 2, device=DEVICE, requires_grad=True) for _ in range(3)]
        result = layer(*qkv)
        (result.out.sum() + result.scores.sum()).backward()
        with torch.no_grad():
            layer(*(x[:, :, :1] for x in qkv), state=result.state)
            kernels.select_cells(result.scores, result.seen[:, :1], 1, "query")
            kernels.pool_attention(qkv[0], qkv[1], result.seen, 4)
            bins = sea.SEAConfig(n_head=2, d_head=2, width=4)
            kernels.choose_bins(qkv[0].repeat(1, 1, 1, 2), *qkv[:2], result.seen, result.row, result.seen, 64, bins, 1.0)
            kernels.topk_mask(result.scores, result.seen[:, :1], 1, "head")
            kernels.mean_of_heads(qkv[0], 1)
            kernels.take_pair(*qkv[:2], result.row[:, :1])
        bins = torch.zeros(B, 2, T, 1, dtype=torch.int32, device=DEVICE)
        kernels.bin_attention(*qkv, bins, result.seen, bin=8).sum().backward()
        with torch.no_grad():
            kernels.bin_attention(qkv[0][:, :, :1], *qkv[1:], bins[:, :, :1], result.seen[:, :1], bin=8)
    assert grids.keys() == {name for names in modules.values() for name in names}
    assert all(n <= 65_535 for found in grids.values() for grid in found for n in grid[1:]), grids


@pytest.mark.parametrize("causal", [True, False])
def test_a_reformer_on_kernels_matches_reference(causal):
    """Its lists of keys are such as the kernels read, no key twice: output, gradients and a decoding step, with padding."""
    torch.manual_seed(0)
    config = sea.SEAConfig(n_head=2, n_kv_head=1, d_head=8, causal=causal, topk=8, bin=0, backend="triton")
    layer, valid = baselines.ReformerAttention(config).to(DEVICE), torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    valid[0, 3:6] = False
    reference = baselines.ReformerAttention(replace(config, backend="torch")).to(DEVICE)
    qkv = [torch.randn(2, heads, 11, 8, device=DEVICE) for heads in (2, 1, 1)]
    results = []
    for attention in (layer, reference):
        xs = [x.clone().requires_grad_() for x in qkv]
        result = attention(*xs, valid=valid)
        grads = torch.autograd.grad(result.out.square().sum(), xs)
        steps = []
        if causal:
            with torch.no_grad():
                state = attention(*(x[:, :, :10] for x in qkv), valid=valid[:, :10], kv_cached=True).state
                steps.append(attention(qkv[0][:, :, 10:], *qkv[1:], valid=valid, state=state, kv_cached=True).out)
        results.append([result.out, *grads, *steps])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


# -- modules that are more than their weights --------------------------------------------------------------------------


def lora(layer):
    """As PEFT's "all-linear" does to a model."""
    peft = pytest.importorskip("peft", reason="what LoRA wraps is the question")
    config = peft.LoraConfig(r=2, target_modules=["encoder.0", "decoder", "gate"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, layer)


def offload(layer):
    """The weights change, then leave for the CPU's memory: a hook brings each to its module and takes it away again."""
    accelerate = pytest.importorskip("accelerate", reason="what its hooks move is the question")
    layer.cnn.up.weight.data *= 2
    accelerate.cpu_offload(layer, execution_device=DEVICE)


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def replace_forward(layer):
    forward = layer.encoder[0].forward
    layer.encoder[0].forward = lambda x: forward(2 * x)


CHANGES = {
    "lora": lora,
    "offloading": offload,
    "hook": lambda layer: layer.gate.register_forward_hook(lambda module, args, out: 2 * out),
    "hook before": lambda layer: layer.cnn.conv1.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "hook on all": lambda layer: layer.cnn.register_forward_hook(lambda module, args, out: (out[0].tanh(), out[1])),
    "parametrization": lambda layer: torch.nn.utils.parametrize.register_parametrization(layer.decoder, "weight", Doubled()),
    "forward": replace_forward,
    "another layer": lambda layer: layer.encoder.__setitem__(2, torch.nn.ReLU()),
    "no bias": lambda layer: setattr(layer.decoder, "bias", None),
    "eps": lambda layer: setattr(layer.cnn.norm_out, "eps", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_more_than_its_weights_changes_both_backends_alike(change):
    """Kernels read weights; where these are not all, PyTorch calls the modules. A call, gradients of some, a step."""
    case, results = Layer(torch.float32, 6, 1, (1, 1, 1), 4, 4, 4, False, "contiguous", 1), []
    for backend in ("torch", "triton"):
        layer, (q, k, v) = case.layer(backend=backend), case.qkv()
        plain = case.layer(backend="torch")(q, k, v)
        CHANGES[change](layer)
        xs = [x[:, :, :-1].requires_grad_(change in ("lora", "hook on all")) for x in (q, k, v)]
        result = layer(*xs)
        if xs[0].requires_grad:
            (result.out.sum() + result.scores.square().sum()).backward()
        with torch.no_grad():
            step = layer(*(x[:, :, -1:] for x in (q, k, v)), state=result.state)
        results.append([result.scores, result.out, step.scores, step.out, *(x.grad for x in xs if x.requires_grad)])
        changed = ((getattr(plain, name)[:, :, :-1] - getattr(result, name)).abs().max() for name in ("out", "scores"))
        assert max(changed) > 1e-3
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_only_what_reads_a_module_leaves_the_kernels():
    layer, q = Layer(torch.float32, 20, 1, (1, 1, 2), 8, 8, 4, False, "contiguous", 1).layer(), torch.zeros(1, device=DEVICE)
    modules = [layer.encoder, layer.decoder, layer.gate, layer.cnn]
    assert sea.operations_reading(kernels, q, *modules) is kernels is sea.operations_reading(kernels, q.half(), *modules)
    for module in [m for root in modules for m in root.modules()]:
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                         "register_full_backward_pre_hook"):
            handle = getattr(module, register)(lambda *args: None)
            assert sea.operations_reading(kernels, q, *modules) is sea
            handle.remove()
    assert sea.operations_reading(kernels, q, *modules) is kernels
    layer.gate.half()
    assert sea.operations_reading(kernels, q, *modules) is sea  # fp32 rows, weights in half precision
    layer.gate.to("meta")
    assert sea.operations_reading(kernels, q.half(), *modules) is sea


def test_lora_on_all_linear_layers_of_a_student_is_the_same_on_both_backends():
    peft = pytest.importorskip("peft", reason="LoRA is its own")
    import convert
    from test_convert import SEQ, tiny, tokens

    logits = {}
    for backend in ("torch", "triton"):
        student = convert.attach(tiny("opt").to(DEVICE).eval(), width=8, topk=SEQ, backend=backend)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(student, config)
        with torch.no_grad():
            logits[backend] = model(tokens(1, 3).to(DEVICE)).logits
    torch.testing.assert_close(logits["triton"], logits["torch"], rtol=1e-3, atol=1e-3)


# -- decoding ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_tiles():
    """Only the kernels of a decoding step may run."""
    estimator = (getattr(estimator_kernels, name) for name in ("_CausalContext", "_CausalCNN", "_AddCellKeys", "_MixAverage"))
    functions = (kernels._SparseAttention, bin_kernels._BinAttention, *estimator)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for function in functions:
            stack.enter_context(mock.patch.object(function, "apply", side_effect=AssertionError(f"{function.__name__} ran")))
        yield


def step_as_accurate_as_eager(case, kernel, reference, inputs) -> None:
    def step(*xs):
        with no_tiles():
            return kernel(*xs)
    as_accurate_as_eager(case, step, torch.no_grad()(reference), inputs)


def check_step(case):
    """causal_context, causal_cnn and mix_average of one token a sequence. `padded`: of some sequences it is no token."""
    case = replace(case, T=1)
    (q, k, v), (count, n_new), (B, Hkv, _), H = case.qkv(), case.tokens(), case.heads, case.heads[1] * case.heads[2]
    layer, generator, has_past = case.layer(), torch.Generator().manual_seed(case.seed), case.seed % 2
    make = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, case.dtype)
    cnn, m, (P,) = layer.cnn, layer.projection.shape[1], layer.cnn.norm.weight.shape
    seen, row, row_seen, _, n_rows, *_ = sea.choose_rows(count, n_new, 1, case.stride, int(case.stride > 1))

    def context(f):
        def run(q, k, v, position, past):
            context, sums = f(q, k, v, position, layer.projection, 0.3, case.stride, count, n_new, in_fp32(past))
            return context.to(q.dtype), sums
        return run

    def rows(f):
        def run(image, *past):
            scores, last = f(image, (cnn.double() if image.dtype == torch.float64 else cnn.to(case.dtype)), past, n_rows)
            return scores, *last
        return run

    mix = lambda f: lambda sparse, v, gates, past: f(sparse, v, gates, seen, row, in_fp32(past))
    longest = max(1, int((count + n_new).max()))  # whose last token has the table's last row
    xs = [q, k, v, make(longest, case.D), make(B, Hkv, m, 2 * case.D + 1).abs() * has_past]
    step_as_accurate_as_eager(case, context(kernels.causal_context), context(sea.causal_context), xs)
    xs = [q, v, lay_out(make(B, H, row_seen.shape[1], 2), case.layout), make(B, Hkv, case.D) * has_past]
    step_as_accurate_as_eager(case, mix(kernels.mix_average), mix(sea.mix_average), xs)
    for f in (kernels.mix_average, sea.mix_average):
        sums = xs[3].to(torch.float32, copy=True)
        with torch.no_grad():
            out, new = f(*xs[:3], seen, row, sums.clone())
            assert torch.equal(f(*xs[:3], seen, row, sums, in_place=True)[0], out) and torch.equal(sums, new)
    image, past = make(B, 2 * H, 1, P), make(2, B, 2 * H, 4, P)
    step_as_accurate_as_eager(case, rows(kernels.causal_cnn), rows(sea.causal_cnn), [image, *past])
    first = (torch.no_grad()(rows(module.causal_cnn)) for module in (kernels, sea))  # of a sequence, which has no past
    as_accurate_as_eager(case, *first, [image, *past[:, :, :, :0]])


@given(LAYERS)
@example(Layer(torch.float32, 1, 3, (2, 2, 2), 16, 20, 4, True, "gaps", 1))
@example(Layer(DTYPES[-1], 1, 1, (1, 1, 2), 64, 256, 4, False, "heads last", 2))
@settings(FEW)
def test_a_step_of_the_estimator_and_the_mix_matches_reference(case):
    check_step(case)


def check_sparse_step(case):
    """Keys from `seen` on hold NaN: a static buffer goes on behind them. With `padded`, keys stand in any order."""
    case = replace(case, T=1)
    q, k, v, mask, seen, row = case.tensors()
    generator, n = torch.Generator().manual_seed(case.seed), k.shape[2]
    seen = torch.randint(n // 2, n + 1, (len(q), 1), generator=generator).to(DEVICE) * (seen > 0)
    row = torch.ones_like(seen) if case.stride > 1 else None  # of two
    mask = mask if row is None else torch.cat([~mask, mask], 2)
    order = by_column(torch.stack([torch.randperm(n, generator=generator) for _ in q])) if case.padded else None

    def kernel(q, k, v):
        later = (torch.arange(n, device=DEVICE) >= seen)
        later = later if order is None else torch.zeros_like(later).scatter(1, order, later)  # by place
        with no_tiles():
            k, v = (x.masked_fill(later[:, None, :, None], torch.nan) for x in (k, v))
            return kernels.sparse_attention(q, k, v, mask, seen, row=row, order=order)

    reference = torch.no_grad()(lambda q, k, v: sea.sparse_attention(q, k, v, mask, seen, row=row, order=order))
    as_accurate_as_eager(case, kernel, reference, [q, k, v])


@given(sparse_cases())
@example(Sparse(torch.float32, True, 1, 600, (2, 2, 2), 17, 3, 0.5, 1, False, "gaps", 64, 1))  # a cell in several blocks
@example(Sparse(DTYPES[-1], True, 1, 40, (1, 1, 2), 64, 256, 0.3, 2, False, "heads last", 64, 0))  # cells without keys
@example(Sparse(DTYPES[-1], True, 1, 999, (1, 1, 2), 128, 40, 1.0, 1, True, "contiguous", 64, 0))
@example(Sparse(torch.float32, True, 1, 40, (2, 1, 2), 8, 9, 0.5, 1, True, "contiguous", 64, 0))  # keys in orders that differ
@settings(FEW)
def test_a_step_of_sparse_attention_matches_reference(case):
    check_sparse_step(case)


def check_bin_step(case):
    """Keys from `seen` on hold NaN or inf: a static buffer goes on behind them. With `padded`, keys stand in any order."""
    case = replace(case, T=1)
    q, k, v, bins, seen = case.tensors()
    generator, n = torch.Generator().manual_seed(case.seed), k.shape[2]
    seen = torch.randint(n // 2, n + 1, (len(q), 1), generator=generator).to(DEVICE) * (seen > 0)
    order = by_column(torch.stack([torch.randperm(n, generator=generator) for _ in q])) if case.padded else None

    def kernel(q, k, v):
        later = torch.arange(n, device=DEVICE) >= seen
        later = later if order is None else torch.zeros_like(later).scatter(1, order, later)  # by place
        k, v = (x.masked_fill(later[:, None, :, None], bad) for x, bad in ((k, torch.nan), (v, torch.inf)))
        with no_tiles():
            return kernels.bin_attention(q, k, v, bins, seen, bin=case.bin, order=order)

    reference = torch.no_grad()(lambda q, k, v: sea.bin_attention(q, k, v, bins, seen, bin=case.bin, order=order))
    as_accurate_as_eager(case, torch.no_grad()(kernel), reference, [q, k, v])


@given(bin_cases())
@example(Bins(torch.float32, 1, 600, (2, 2, 1, 3), 17, 8, 0.5, False, "gaps", 64, 1))  # several blocks
@example(Bins(torch.float32, 1, 40, (2, 1, 1, 2), 8, 8, 0.5, True, "contiguous", 64, 0))  # keys in orders that differ
@settings(FEW)
def test_a_step_of_bin_attention_matches_reference(case):
    check_bin_step(case)


def check_decoding(case, first, rtol=1e-3):
    """Token by token after `first`: the outputs and cells or bins of the reference's one call, in fp32. Without padding, keys and
    values may be a static buffer, which goes on behind them, and the state is then overwritten."""
    ours, theirs, valid = case.layer(backend="triton"), case.layer(backend="torch"), case.valid()
    (q, k, v), of = case.qkv(), lambda n: None if valid is None else valid[:, :n]
    longer = 0 if case.padded else case.seed % 3 * 7

    def buffer(x, n):
        return torch.cat([x[:, :, :n], x.new_full((*x.shape[:2], longer, case.D), torch.nan)], 2)

    with torch.no_grad():
        whole = theirs(q, k, v, valid=valid)
        state = ours(*(x[:, :, :first] for x in (q, k, v)), valid=of(first), kv_cached=True).state
        for n in range(first, case.T):
            with no_tiles():
                result = ours(q[:, :, n : n + 1], buffer(k, n + 1), buffer(v, n + 1), valid=of(n + 1), state=state, kv_cached=True,
                              in_place=longer > 0)
            torch.testing.assert_close(result.out, whole.out[:, :, n : n + 1], rtol=rtol, atol=1e-4)
            assert torch.equal(kept(result, case.T), kept(whole, case.T)[:, :, n : n + 1]), case
            state = result.state


@pytest.mark.parametrize("moved", ["copied", "picked", "branched"])
def test_candidates_that_a_state_keeps_are_its_own(moved):
    """A state that steps overwrite, then another text's of the same length is copied into it, or its sequences change places, or
    steps of two texts that begin alike go on from it in turn: they are what the reference, which keeps nothing, says."""
    case = Layer(torch.float32, 83, 8, (2, 1, 2), 16, 20, 4, False, "contiguous", 1, cnn=False)  # 80 begins a row
    ours, theirs = (case.layer(backend=backend) for backend in ("triton", "torch"))
    text, other, index = case.qkv(), replace(case, seed=2).qkv(), torch.tensor([1, 0], device=DEVICE)

    def call(layer, text, begin, end, state, **options):
        q, k, v = text
        return layer(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], state=state, kv_cached=True, **options)

    with torch.no_grad():
        state = call(ours, text, 0, 78, None).state
        before = call(ours, text, 78, 79, state, in_place=True).state
        assert before is state and (state.candidates >= 0).any()
        runs = [(text, state)]
        if moved == "copied":
            state.copy_(call(ours, other, 0, 79, None).state)
            runs = [(other, state)]
        elif moved == "picked":
            runs = [([x[index] for x in text], state.index_select(index))]
        else:
            other = [torch.cat([x[:, :, :79], y[:, :, 79:]], 2) for x, y in zip(text, other)]
            branch = call(ours, other, 79, 80, state).state
            call(ours, text, 79, 80, state, in_place=True)
            runs.append((other, branch))
        for i in range(79 if len(runs) == 1 else 80, case.T):
            for text, state in runs:
                result, whole = call(ours, text, i, i + 1, state, in_place=True), call(theirs, text, 0, i + 1, None)
                assert torch.equal(result.bins, whole.bins[:, :, -1:]) and result.state is state
                torch.testing.assert_close(result.out, whole.out[:, :, -1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bin", [4, 0])
@pytest.mark.parametrize("cuts", [(10, 23), (20,)])
def test_a_layer_that_is_dense_at_first_is_the_same_on_both_backends(bin, cuts):
    """Calls of dense queries alone, of both kinds, and of others: the outputs and choices of the reference's one call."""
    case = Layer(torch.float32, 24, 3, (2, 1, 2), 16, 20, 4, True, "gaps", 1, bin=bin)
    ours, theirs = (case.layer(backend=backend, dense_below=14) for backend in ("triton", "torch"))
    (q, k, v), valid, state = case.qkv(), case.valid(), None
    whole = theirs(q, k, v, valid=valid)
    for begin, end in zip((0, *cuts), (*cuts, 24)):
        result = ours(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], valid=valid[:, :end], state=state, kv_cached=True)
        state = result.state
        torch.testing.assert_close(result.out, whole.out[:, :, begin:end], rtol=1e-3, atol=1e-4)
        assert torch.equal(result.attended(24), whole.attended(24)[:, :, begin:end])


@given(LAYERS.map(lambda case: replace(case, dtype=torch.float32)), st.integers(1, 5))
@example(Layer(torch.float32, 30, 3, (2, 2, 2), 16, 20, 4, True, "gaps", 1), 6)
@example(Layer(torch.float32, 45, 3, (1, 1, 2), 16, 20, 8, False, "gaps", 2), 4)  # a static buffer, rows of the past
@example(Layer(torch.float32, 30, 3, (2, 1, 2), 16, 20, 4, True, "gaps", 1, bin=0), 4)
@example(Layer(torch.float32, 18, 1, (2, 1, 1), 2, 58, 3, True, "contiguous", 66), 5)  # only the second of two tokens is one
@example(Layer(torch.float32, 35, 3, (2, 1, 2), 16, 8, 4, False, "contiguous", 1), 6)  # a level of cell keys begins
@example(Layer(torch.float32, 35, 1, (2, 1, 2), 16, 4, 4, True, "contiguous", 1), 6)
@settings(max_examples=10)
@in_parts("stride", 1, 3)
def test_decoding_is_the_whole_on_both_backends(stride, case, steps):
    case = replace(case, T=max(2, case.T), stride=stride or case.stride)
    check_decoding(case, max(1, case.T - steps))


@pytest.mark.parametrize("stride, cell_keys, topk, bin", [(3, True, 4, 0), (2, False, 9, 2), (3, True, 64, 2)])
def test_distillation_is_the_same_on_both_backends(stride, cell_keys, topk, bin):
    """Weights in fp32, autocast to half precision: losses and gradients of a training step are as near to those of fp32 as
    PyTorch's, to a factor of 2. With few keys rounding also chooses other cells and bins; when all are kept, it holds module by
    module."""
    import convert
    import distill
    from test_convert import SEQ, tiny, tokens

    def step(backend, dtype):
        teacher = tiny("opt").to(DEVICE).requires_grad_(False)
        teacher.set_attn_implementation("sea_teacher")
        student = convert.attach(tiny("opt").to(DEVICE), width=8, topk=topk, backend=backend, query_stride=stride,
                                 cell_keys=cell_keys, bin=bin, local=2, first=1, candidates=2)
        x = tokens(32 if CUDA else 2).to(DEVICE)  # many, since rounding changes the side of a few ReLUs
        with torch.autocast(DEVICE, dtype) if dtype is not None else contextlib.nullcontext():
            terms = distill.distillation_losses(student, teacher, x, distill.LossWeights(score=1.0))
        sum(terms.values()).backward()
        modules = student.named_modules() if topk > SEQ else [("all", student)]
        grads = {name: [p.grad.flatten() for p in module.parameters(topk <= SEQ)] for name, module in modules}
        return terms, {name: torch.cat(parts) for name, parts in grads.items() if parts}

    half = torch.bfloat16 if CUDA else torch.float16
    (exact, exact_grads), (terms, grads), (our_terms, our_grads) = step("torch", None), step("torch", half), step("triton", half)
    for name, value in exact.items():
        error, bar = (our_terms[name] - value).abs(), (terms[name] - value).abs()
        assert error <= 2 * bar + 0.01 * value.abs() + 1e-3, f"{name}: {our_terms[name]}, {terms[name]}, {value}"
    for name, grad in exact_grads.items():
        error, bar, size = ((x - grad).norm().item() for x in (our_grads[name], grads[name], torch.zeros_like(grad)))
        assert error <= 2 * bar + 0.01 * size, f"{name}: {error}, {bar}, {size}"


CAN_RUN = dict(n_head=12, d_head=64, bin=0)
BINS = dict(bin=8, max_positions=32768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", [
    dict(), dict(query_stride=32), dict(n_head=16, width=2048), dict(n_head=1, width=4096, d_head=32, cell_keys=False),
    dict(n_kv_head=4, group="query"), dict(BINS, n_head=14, n_kv_head=2, topk=2048), dict(BINS, group="query", topk=512),
    dict(BINS, bin=1, n_head=16, n_kv_head=1, width=2048), dict(BINS, n_head=33, n_kv_head=1, width=1024),
    dict(causal=False, nbf=1, width=128), dict(causal=False, n_head=1, width=4096),
    dict(causal=False, group="batch", d_head=256)])
def test_kernels_support(change, dtype):
    """Also BERT's 266 features, and cell keys of any width, since the bidirectional estimator has no kernels."""
    assert kernels.supports(sea.SEAConfig(**{**CAN_RUN, **change}), dtype) is None


@pytest.mark.parametrize("change, dtype, reason", [
    (dict(), torch.float64, "dtype torch.float64: float32, float16 or bfloat16 only"),
    (dict(query_stride=33), torch.bfloat16, "query_stride 33: at most 32, "),
    (dict(d_head=257, causal=False), torch.bfloat16, "d_head 257: at most 256, "),
    (dict(d_head=129), torch.bfloat16, "n_features x d_head = 78 x 129, padded to powers of two, 32768: at most 16384, "),
    (dict(d_head=65), torch.float16, "n_features x d_head = 33 x 65, padded to powers of two, 8192: at most 4096, "),
    (dict(d_head=65), torch.float32, "n_features x d_head = 33 x 65, padded to powers of two, 8192: at most 4096, "),
    (dict(nbf=2), torch.bfloat16, "n_features 133: at most 128, "),
    (dict(width=4096, n_head=4), torch.bfloat16, "2 d_head x width / 4 = 128 x 1024, padded to powers of two, 131072: at most 65536, "),
    (dict(n_head=33, width=1024), torch.bfloat16, "n_head x width = 33 x 1024, padded to powers of two, 65536: at most 32768, "),
    (dict(n_head=1, width=16385, causal=False), torch.bfloat16, "width 16385: at most 16384, "),
    (dict(n_head=1, d_head=32, width=2049), torch.bfloat16, "width with cell_keys 2049: at most 2048, "),
    (dict(BINS, group="causal_batch"), torch.bfloat16, "group causal_batch with bins: one of ('query', 'kv') only, "),
    (dict(BINS, bin=1, topk=8192), torch.bfloat16, "candidates of topk 8192, 32768: at most 16384, "),
    (dict(BINS, bin=1, topk=2048, cnn=False), torch.bfloat16, "candidates of topk 2048, 32"),  # of any number of tokens
])
def test_a_layer_that_the_kernels_cannot_run_is_left_to_sea_or_raises(change, dtype, reason):
    """With the field, its value and the limit. Only the choice is looked at, so that it needs no GPU."""
    config, on_gpu = sea.SEAConfig(**{**CAN_RUN, **change}), mock.Mock(is_cuda=True, dtype=dtype)
    assert kernels.supports(config, dtype).startswith(reason)
    assert sea.operations(config, on_gpu) is sea
    with pytest.raises(ValueError) as error:
        sea.operations(replace(config, backend="triton"), on_gpu)
    assert str(error.value).startswith(f"backend: expected one that can run this layer, got 'triton', which cannot: {reason}")


def test_the_backend_is_chosen_by_config_and_device():
    on_gpu, on_cpu = mock.Mock(is_cuda=True, dtype=torch.bfloat16), torch.zeros(1)
    choice = lambda backend, q: sea.operations(sea.SEAConfig(**CAN_RUN, backend=backend), q)
    assert choice("auto", on_gpu) is choice("triton", on_gpu) is choice("triton", on_cpu) is kernels
    assert choice("torch", on_gpu) is choice("torch", on_cpu) is choice("auto", on_cpu) is sea


def test_tensors_that_no_kernel_can_read_are_refused():
    layer, q = sea.SEAttention(sea.SEAConfig(n_head=1, d_head=8, backend="triton")), torch.randn(1, 1, 4, 8)
    compiled = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    with mock.patch.object(triton, "knobs", compiled), pytest.raises(ValueError, match="^q: expected a CUDA tensor, got one on cpu"):
        layer(q, q, q)


def test_an_operation_refuses_what_supports_refuses():
    x, seen = torch.zeros(1, 33, 1, 1024, device=DEVICE), torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="^probs: expected at most 32768 cells that compete"):
        kernels.select_cells(x, seen, 64)
    wide, bits = torch.zeros(1, 1, 1, 257, device=DEVICE), torch.zeros(1, 1, 1, 513, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="^q: expected head size <= 256, got 257"):
        kernels.sparse_attention(wide, wide, wide, kernels.CellBits(bits, 16385), seen)
    with pytest.raises(ValueError, match="^q: expected head size <= 256, got 257"):
        kernels.pool_attention(wide, wide, seen, 4)
    q = wide[..., :8]
    with pytest.raises(ValueError, match="^mask: expected a width of at most 16384, got 16385"):
        kernels.sparse_attention(q, q, q, kernels.CellBits(bits, 16385), seen)


def test_sea_alone_runs_and_says_what_triton_needs(tmp_path):
    """sea.py copied away, without kernels.py beside it."""
    (tmp_path / "sea.py").write_text((here / "sea.py").read_text())
    code = """
import sys, torch
sys.modules["kernels"] = None  # nor installed anywhere
import sea
q = torch.randn(1, 1, 4, 8)
run = lambda backend: sea.SEAttention(sea.SEAConfig(n_head=1, d_head=8, backend=backend))(q, q, q).out
run("auto"), run("torch")
try:
    run("triton")
except ValueError as error:
    assert str(error).startswith("backend: expected one that can run this layer, got 'triton', which cannot: "), error
    assert "kernels.py" in str(error), error
else:
    raise AssertionError("fell back")
"""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code], cwd=tmp_path,
                          env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_four_files_are_found_in_a_package(tmp_path):
    """Copied into one, and with nothing of theirs anywhere else."""
    (tmp_path / "mypkg").mkdir()
    for name in ("sea.py", "kernels.py", "bin_kernels.py", "estimator_kernels.py"):
        (tmp_path / "mypkg" / name).write_text((here / name).read_text())
    (tmp_path / "mypkg" / "__init__.py").touch()
    code = """
import sys
import mypkg.sea
from mypkg import kernels
assert kernels.__file__ == mypkg.sea.__file__.replace("sea.py", "kernels.py")
assert kernels.causal_context.__module__ == "mypkg.estimator_kernels"
assert kernels.bin_attention.__module__ == "mypkg.bin_kernels"
assert mypkg.sea.load_kernels() is kernels
assert not {"sea", "bin_kernels", "estimator_kernels", "sea_kernels"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("options", [[], ["--kv-heads", "1"], ["--sea", "cnn=false"], ["--break-even", "--sea", "bin=0"],
                                     ["--profile", "64", "--sea", "cnn=false"], ["--distill", "--layers", "1", "--kv-heads", "1"],
                                     ["--decode"], ["--decode", "--kv-heads", "1", "--sea", "cnn=false"], ["--prefill", "--layers", "1"],
                                     ["--prefill", "--layers", "1", "--kv-heads", "1", "--sea", "cnn=false"]])
def test_bench_measures(tmp_path, capsys, options):
    import bench

    small = ["--lengths", "64", "128", "--train-steps", "1", "--heads", "2", "--d-head", "16", "--width", "8", "--topk", "24"]
    report = bench.main([*small, "--out", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert printed.splitlines()[3] == f"SEA: {report['sea']}"
    assert CUDA or "this measures the plain PyTorch path" in printed
    if "--distill" in options:
        assert report["results"].keys() == {64, 128} and all("ms" in r for row in report["results"].values() for r in row.values())
    for mode, names in (("decode", 3 * 2), ("prefill", 5)):  # dense and two strides, at two batches or in chunks and in one call
        if f"--{mode}" in options and not CUDA:
            assert report["results"].keys() == {64, 128}
            assert all(len(row) == names and all("ms" in r for r in row.values()) for row in report["results"].values())
            assert all((tmp_path / f"bench_{mode}.{kind}").exists() for kind in ("json", "png"))
    if not (tmp_path / "bench.json").exists():
        assert "stride 4" in printed or "T 128 T x T: " in printed
        return
    assert report["results"].keys() == {64, 128} and all("ms" in r for row in report["results"].values() for r in row.values())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count(f" | no student, quality unknown: {report['sea']}\n") >= 2 * 2 * 3  # lengths, kinds of pass, rows of the table


@pytest.mark.parametrize("option", ["--model", "--student"])
def test_bench_wants_a_text_with_a_model(option, capsys):
    import bench

    with pytest.raises(SystemExit):
        bench.main([option, "somewhere"])
    assert f"--data: expected a text file with {option}, got none" in capsys.readouterr().err


def bench_of(*options):
    """bench.py, small arguments, a layer and q, k, v of 64 tokens, on the CPU."""
    import bench

    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        args = bench.parse(["--lengths", "64", "--heads", "2", "--d-head", "8", "--width", "8", "--topk", "24",
                            "--train-steps", "1", "--layers", "1", "--strides", "1", "2", *options])
    inputs = bench.walk_inputs(args, 64)
    return bench, args, bench.trained_layer(args, *inputs), inputs


def test_bench_says_how_much_faster_or_slower():
    """Above 1 is faster in speed, slower in time; against the fastest of the dense backends."""
    import bench

    named = {"cuDNN": 2.0, "FlashAttention": 4.0, "SEA stride 1": 0.5, bench.RANDOM: 0.1, bench.FLEX: 0.2, bench.NSA: 0.2}
    table = bench.table({64: {f"{name} | forward": dict(ms=ms, mib=10 * ms, student="a", topk=8, sea="topk=8") for name, ms in named.items()}},
                        "forward")
    assert "SEA stride 1: 4.00x the speed of the fastest dense | a: topk=8" in table and table.count("fastest dense") == 1
    _, heads, cells = table.strip().splitlines()[:3]
    columns = [heads.index(name[:24]) + len(name[:24]) for name in named]
    assert all(cells[:end].endswith(f"{ms:.3f} ({10 * ms:8,.0f})") for end, ms in zip(columns, named.values()))
    assert bench.decoding_line(dict(ms=0.5, keys=60.0, most=80), [4.0, 2.0]) == (
        "0.5000 ms, 60 keys a head, 80 at most, 4.00x the speed of the fastest dense")
    dense, ours = dict(ms=2.0, mib=40.0, weights_mib=5.0), dict(ms=3.0, mib=10.0, weights_mib=5.0)
    assert bench.prefill_line(ours, dense) == "3.0 ms, 10 MiB above the weights' 5, 1.50x SDPA's time and 0.25x its memory"


@pytest.mark.parametrize("longest, found", [(1000, range(100, 132)), (90, None)])
def test_bench_finds_where_sea_begins_to_win(longest, found, monkeypatch, capsys):
    """Where dense takes a millisecond a token, and SEA always 100."""
    bench, args, layer, inputs = bench_of("--lengths", str(longest))
    time = lambda attention, q, k, v: 100.0 if isinstance(attention, sea.SEAttention) else float(q.shape[2])
    monkeypatch.setattr(bench, "forward", time)
    monkeypatch.setattr(bench.evaluate, "milliseconds", lambda run: run)
    bench.break_even(args, layer, [x.repeat(1, 1, 20, 1) for x in inputs])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and all(line.startswith(f"stride {stride}: ") for line, stride in zip(lines, args.strides))
    if found is None:
        assert all(line.endswith("SEA does not win up to T = 90") for line in lines)
    else:
        assert all(int(line.split()[-1]) in found for line in lines)


def test_bench_stretches_positions_and_keeps_the_rest():
    bench, args, layer, _ = bench_of()
    layer.requires_grad_(False)
    assert torch.equal(bench.stretched(args, layer, bench.TRAINED // 2, 4).position, layer.position)
    for T in (bench.TRAINED, 2 * bench.TRAINED):
        long = bench.stretched(args, layer, T, 4)
        x = torch.arange(T) * (bench.TRAINED - 1) / (T - 1)
        low, share = x.long().clamp(max=bench.TRAINED - 2), x - x.long().clamp(max=bench.TRAINED - 2)
        expected = layer.position[low] * (1 - share[:, None]) + layer.position[low + 1] * share[:, None]
        torch.testing.assert_close(long.position.data, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(long.decoder.weight, layer.decoder.weight) and long.config.query_stride == 4


def test_bench_takes_inputs_as_the_model_scales_them():
    """From the middle layer on, heads side by side, keys repeated: its attention at the usual scale is the model's."""
    import bench

    generator = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(1, heads, 5, 4, generator=generator)
    records = [SimpleNamespace(q=make(2), k=make(1), v=make(1), scale=0.9) for _ in range(4)]
    for group in (1, 2):  # heads that share keys, as in the model
        q, k, v = bench.heads_of(records, 3, group)
        assert k.shape == v.shape == (1, 4 // group, 5, 4)
        for i, r in enumerate(records[2:]):
            heads = slice(2 * i, 2 * i + 2)
            torch.testing.assert_close(q[:, heads] @ sea.repeat_heads(k, 4)[:, heads].mT * 4**-0.5, r.q @ r.k.mT * r.scale)
            assert torch.equal(sea.repeat_heads(v, 4)[:, heads], r.v.expand(1, 2, 5, 4))
    with pytest.raises(SystemExit, match="^--kv-heads: expected a divisor of --model's 2 query heads a key/value head, got 3 of them$"):
        bench.heads_of(records, 3, 3)
    like = lambda x, y: torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    for options in ([], ["--kv-heads", "1"]):
        _, args, layer, _ = bench_of(*options)
        q, k, v = bench.walk_inputs(args, 512)
        assert k.shape == v.shape == (1, args.kv_heads, 512, 8) and layer.config.kv_heads == args.kv_heads
        k, v = (sea.repeat_heads(x, 2) for x in (k, v))
        assert like(q, k) > 0.25 and like(q, v).abs() < 0.15  # queries and keys of synthetic inputs share half


def test_bench_runs_what_its_options_say(monkeypatch):
    bench, args, layer, inputs = bench_of("--forward-only", "--sea", "bin=2", "local=3", "first=1", "group=query", "--sea", "cell_keys=false")
    monkeypatch.setattr(bench.evaluate, "milliseconds", lambda run, **_: (run(), 1.0)[1])
    given = dict(width=8, topk=24, bin=2, local=3, first=1, group="query", cell_keys=False)
    assert {name: getattr(layer.config, name) for name in given} == given
    assert bench.configuration(layer.config) == "width=8 topk=24 bin=2 local=3 first=1 candidates=16 group=query nbf=8 cell_keys=False"
    for fields, found in ((["bin=0", "nbf=2"], "width=256 topk=64 bin=0 group=causal_batch nbf=2.0 cell_keys=True"),
                          (["bin=0", "cnn=false"], "width=256 topk=64 bin=0 group=causal_batch cnn=False")):
        assert bench.configuration(bench.sea_config(bench.parse(["--sea", *fields]))) == found
    assert all(name.endswith("| forward") for name in bench.measure(args, layer, inputs, 64))
    with mock.patch.object(torch.autograd, "grad") as grad:
        bench.forward_backward(layer, *inputs)()
    (outputs, to, _), _ = grad.call_args
    assert [x.shape for x in outputs] == [(1, 2, 64, 8)] * 2 and len(to) == 3 + len(list(layer.parameters()))
    import convert

    with mock.patch.object(convert, "attach", wraps=convert.attach) as attach:
        bench.prefill_of(args, 32, 2)
    assert attach.call_args.kwargs == dict(given, query_stride=2)
    with mock.patch.object(convert, "attach", side_effect=RuntimeError) as attach, pytest.raises(RuntimeError):
        bench.distillation_step(args, 32, "torch")
    assert attach.call_args.kwargs == dict(given, query_stride=1, backend="torch")


@pytest.mark.parametrize("options, message", [
    (["--topk", "4"], "--topk: expected at least 11, since on average as many first and last keys are always attended to, got 4"),
    (["--sea", "local=0"], "--sea local: expected an integer >= 1, with bins, got 0"),
    (["--sea", "bin=x"], "argument --sea: expected bin of type int, got 'x'"),
    (["--sea", "query_stride=2", "topk=3"],
     ("--sea: expected other fields than width, topk, query_stride, max_positions, backend, which "
      "--width, --topk, --strides and what is measured set, got query_stride, topk")),
    (["--topk", "11"], "--topk: expected at least 13, since on average as many first and last keys are always attended to, got 11"),
    (["--heads", "4", "--kv-heads", "3"], "--kv-heads: expected a divisor of the 4 --heads, got 3"),
    (["--student", "x", "--data", "y", "--heads", "12"], "--student: expected no --heads beside it, since it has its own, got 12"),
    (["--student", "x", "--data", "y", "--decode"], "--student: expected no --decode beside it, since of a student only the attention is measured"),
])
def test_bench_refuses_layers_that_cannot_be(options, message, capsys):
    import bench

    with pytest.raises(SystemExit):
        bench.parse(options)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.parametrize("options", [["bin=4"], ["bin=2", "local=3", "first=1"], ["bin=0"]])
def test_bench_trains_the_estimate_of_the_keys_in_cells(options):
    """Its loss is the dense one, of keys that the layer's cells share out."""
    bench, args, layer, inputs = bench_of("--sea", *options)
    seen, config = torch.arange(1, 65)[None], layer.config
    with (mock.patch.object(sea, "estimate_loss", wraps=sea.estimate_loss) as loss,
          mock.patch.object(sea, "pool_attention", wraps=sea.pool_attention) as pool):
        bench.trained_layer(args, *inputs)
    for call in (loss, pool):
        first = -(-config.first // config.bin) * config.bin if config.bin else 0
        assert (call.call_args.kwargs["unit"], call.call_args.kwargs["first"]) == (max(config.bin, 1), first)
        in_cells = (seen - config.local).clamp(0) // config.bin * config.bin if config.bin else seen
        assert torch.equal(call.call_args.kwargs["in_cells"], in_cells)


@pytest.mark.parametrize("options", [[], ["--topk", "22", "--strides", "1"], ["--kv-heads", "1", "--sea", "group=query"], ["--sea", "bin=2", "local=3", "first=1", "group=query"]])
def test_bench_draws_as_many_bins_as_a_layer_chooses(options):
    """First and last bins are those of every row, the others anywhere in its cells."""
    bench, args, layer, inputs = bench_of(*options)
    result, seen = layer(*inputs), torch.arange(1, 65)[None]
    bins = bench.random_bins(layer.config, seen)
    assert bins.dtype == torch.int32 and bins.shape[:3] == result.bins.shape[:3]
    assert (bins[..., 1:] > bins[..., :-1])[bins[..., 1:] != sea.NONE].all()
    assert torch.equal((bins != sea.NONE).sum(-1), (result.bins != sea.NONE).sum(-1))
    n_in_cells = layer.config.in_cells(seen) // layer.config.bin
    for row, expected in zip(bins[0, 0].tolist(), sea.always_bins(seen, n_in_cells, layer.config, 64)[0].tolist()):
        assert set(expected) <= {*row, sea.NONE}


def test_bench_decodes_the_last_of_all_tokens_of_the_context(monkeypatch):
    """At every stride, dense attention over the same keys, though the state has seen a prompt only."""
    bench, args, layer, _ = bench_of("--batches", "2")
    strides, lengths, seen = [], [], []
    stretched, visited = bench.stretched, bench.keys_visited
    monkeypatch.setattr(bench, "PROMPT", 16)
    monkeypatch.setattr(bench.evaluate, "milliseconds", lambda run, **_: (run(), 1.0)[1])
    monkeypatch.setattr(bench, "stretched", lambda *x: strides.append(x[3]) or stretched(*x))
    monkeypatch.setattr(bench, "sdpa", lambda _, *qkv, causal: lengths.append((*(x.shape[2] for x in qkv), causal)))
    monkeypatch.setattr(bench, "keys_visited", lambda x: seen.append(x.seen.tolist()) or visited(x))
    found = bench.decode(args, layer, 64, 2)
    assert strides == [1, 2] and list(found) == ["SDPA", "SEA stride 1", "SEA stride 2"]
    assert set(lengths) == {(1, 64, 64, False)}
    assert seen == [[[65], [65]]] * 2  # the step after the one that was timed


def test_bench_compares_heads_that_share_keys_with_dense_ones_that_do():
    """Everywhere: dense attention is given the grouped keys as they are, and a model has heads that share theirs."""
    bench, args, layer, inputs = bench_of("--heads", "4", "--kv-heads", "2")
    q, k, v = inputs
    with mock.patch.object(bench.F, "scaled_dot_product_attention", wraps=bench.F.scaled_dot_product_attention) as dense:
        out = bench.contestants(args, layer, 64)["SDPA"](q, k, v)
        bench.decode(args, layer, 64, 1)
    assert {call.args[1].shape[1] for call in dense.call_args_list} == {2} and all(call.kwargs["enable_gqa"] for call in dense.call_args_list)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    config = bench.random_model(args, 32, "cpu").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (4, 2, 32)


@pytest.fixture(scope="module", params=[True, False], ids=["cnn", "no cnn"])
def student(request, tmp_path_factory):
    """A folder with a student, of 64 positions, of a Llama of 3 layers whose 4 heads share 2 of keys, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import convert

    folder = tmp_path_factory.mktemp("student")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=96 if request.param else 64))
    convert.attach(model, width=8, topk=16, bin=2, local=3, first=1, cnn=request.param, max_positions=64)
    convert.save(model, folder / "sea", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0"))
    (folder / "text.txt").write_text(" ".join(str(i * i % 50) for i in range(70)))
    return folder


def bench_student(folder, *options):
    import bench

    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        return bench, ["--student", str(folder / "sea"), "--data", str(folder / "text.txt"), "--forward-only", *options]


def test_bench_measures_a_student_as_it_is(student, tmp_path, monkeypatch, capsys):
    """Its middle layer, with its own weights and configuration, on what that layer sees of the text."""
    import convert

    bench, argv = bench_student(student, "--out", str(tmp_path), "--topk", "20", "--sea", "bin=4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    monkeypatch.setattr(bench.evaluate, "milliseconds", lambda run, **_: (run(), 1.0)[1])
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *x: seen.append(x[1:3]) or measure(*x))
    report = bench.main(argv)
    (layer, inputs), = seen
    whole = convert.load(student / "sea")
    convert.set_option(whole, topk=20, bin=4)
    x = torch.tensor([[i * i % 50 for i in range(64)]])
    with torch.no_grad(), convert.record(whole) as records:
        whole(x, use_cache=False)
    r, module = records[1], convert.attention_modules(whole)[1].sea
    assert list(report["results"]) == [64]  # the positions that there are, and no length was given
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(inputs, (r.q * r.scale * 8**0.5, r.k, r.v)))
    at_one = bench.stretched(bench.parse(argv), layer, 64, 1)
    assert at_one.config == module.config and all(torch.equal(x, module.state_dict()[name]) for name, x in at_one.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(at_one(*inputs).out, r.out)
    named = dict(student=str(student / "sea"), topk=20, sea=bench.configuration(module.config))
    assert "topk=20 bin=4 local=3 first=1" in report["sea"] == named["sea"]
    assert len(report["results"][64]) == 3
    assert all({name: row[name] for name in named} == named and "ms" in row for row in report["results"][64].values())
    assert capsys.readouterr().out.count(f" | {named['student']}: {named['sea']}\n") == 3


@pytest.mark.parametrize("options, message", [
    (["--lengths", "32", "65"], "--lengths: expected at most the student's 64 positions, got 65"),
    (["--profile", "65"], "--profile: expected at most the student's 64 positions, got 65"),
    (["--sea", "nbf=2"], "--student: expected options that no weight depends on beside it, got nbf"),
    (["--topk", "6"], "--student: expected options that it can have at all of --strides (topk: expected at least 7, since on average"),
    (["--student", "nowhere"], "--student: expected a folder that distill.py saved a student of SEA in, got nowhere (no student)"),
])
def test_bench_refuses_what_a_student_cannot_be_measured_with(student, options, message, tmp_path):
    bench, argv = bench_student(student, "--out", str(tmp_path), *options)
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert str(stopped.value).startswith(message)


def test_bench_changes_a_students_width_only_without_a_cnn(student):
    bench, argv = bench_student(student, "--width", "4")
    args = bench.parse(argv)
    if bench.evaluate.saved_config(student / "sea")["sea"]["cnn"]:
        with pytest.raises(SystemExit, match="^--student: expected options that no weight depends on beside it, got width$"):
            bench.open_student(args)
    else:
        assert bench.student_inputs(args)[0].config.width == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_bench_has_flex_attention_over_as_many_first_and_last_keys(monkeypatch):
    """Compiled anew for each length, since it would run uncompiled after a few; here it is not compiled."""
    bench, _, layer, (q, k, v) = bench_of("--kv-heads", "1", "--sea", "bin=4", "first=3", "local=8")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    with mock.patch.object(torch.compiler, "reset") as reset:
        found = bench.flex_window(layer.config, q, k, v)(q, k, v)
    reset.assert_called_once_with()
    i, j = torch.arange(64)[:, None], torch.arange(64)
    keep = (j <= i) & ((j < 4) | (j > i - 20))
    assert keep.sum(-1).max() == layer.config.topk
    torch.testing.assert_close(found, sea.attention_weights(q, k, keep[None, None]) @ v)


def test_bench_has_native_sparse_attention_where_it_runs(monkeypatch, capsys):
    """(B, T, H, D) in memory, with both gates and no window; what does not run is left out with a sentence."""
    bench, args, layer, (q, k, v) = bench_of("--kv-heads", "1", "--forward-only")
    module, calls = ModuleType("fla.ops.nsa.parallel"), []
    module.parallel_nsa = lambda *qkv, **options: calls.append((qkv, options))
    for name in ("fla", "fla.ops", "fla.ops.nsa"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", module)
    monkeypatch.setitem(bench.PEERS, "flex", (bench.FLEX, mock.Mock(side_effect=RuntimeError("no compiler\nat all"))))
    assert args.peers == ["flex", "nsa"] and bench.peers([], layer.config, q, k, v) == {}
    assert list(bench.peers(args.peers, layer.config, q, k, v)) == [bench.NSA]
    (qkv, options), = calls
    assert all(x.is_contiguous() and torch.equal(x.transpose(1, 2), y) for x, y in zip(qkv, (q, k, v)))
    assert {name: options.pop(name).shape for name in ("g_cmp", "g_slc")} == dict.fromkeys(("g_cmp", "g_slc"), (1, 64, 2))
    assert options == dict(g_swa=None, block_counts=16, block_size=64)
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", None)
    assert bench.peers(args.peers, layer.config, q, k, v) == {}
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == lines[1] == f"T 64: {bench.FLEX} is left out (no compiler)" and lines[2].startswith(f"T 64: {bench.NSA} is left out (")


# -- beside Hugging Face's package of the same name ----------------------------------------------------------------------

ORDERS = ["import kernels; from kernels import CUDAProperties; from kernels.layer.mode import Mode",
          "from kernels.layer.mode import Mode; import kernels; from kernels import CUDAProperties",
          "import importlib.util; assert importlib.util.find_spec('kernels'); from kernels import CUDAProperties, Mode"]


def run_python(code: str, *folders: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, *folders)))}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def hugging_face(tmp_path):
    """A package `kernels` as pip would install it, that imports itself in every way."""
    files = {"kernels/__init__.py": "from .utils import CUDAProperties\nfrom kernels.layer import Mode, kernelize",
             "kernels/utils.py": "class CUDAProperties: pass",
             "kernels/layer/__init__.py": "from .mode import Mode\ndef kernelize():\n    from kernels import CUDAProperties\n"
                                          "    from ..utils import CUDAProperties as again\n    assert again is CUDAProperties",
             "kernels/layer/mode.py": "class Mode: pass",
             "kernels-0.16.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.9\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("order", ORDERS)
def test_hugging_face_kernels_is_found_behind_ours(order, hugging_face):
    run_python(order + "; import kernels, kernels.layer.mode; assert kernels.__file__.endswith('kernels.py'); "
               "kernels.sparse_attention; kernels.kernelize(); from kernels import Mode; assert Mode is kernels.layer.mode.Mode; "
               "assert not hasattr(kernels, 'no_such_name'); assert kernels.__version__ == '0.16.9'", hugging_face)


def test_without_hugging_face_kernels_a_missing_name_is_an_attribute_error():
    with mock.patch("importlib.metadata.distribution", side_effect=kernels.importlib.metadata.PackageNotFoundError):
        assert not any(hasattr(kernels, name) for name in ("CUDAProperties", "__path__", "__version__"))


@pytest.mark.parametrize("order", ["import kernels; from transformers import OPTForCausalLM",
                                   "from transformers import OPTForCausalLM; import kernels"])
def test_transformers_can_be_imported_beside_ours(order):
    pytest.importorskip("transformers")
    run_python(order + "; assert kernels.__file__.endswith('kernels.py') and kernels.sparse_attention")


# -- on a GPU only -----------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, extra, width, D, stride", [(4096, 0, 256, 64, 4), (4096, 0, 1024, 128, 1), (1, 4999, 256, 64, 1),
                                                        (100, 4900, 256, 80, 4), (2048, 0, 128, 32, 1)])
def test_large_sparse_attention_matches_reference(dtype, T, extra, width, D, stride):
    check_sparse_attention(Sparse(dtype, True, T, extra, (1, 2, 2), D, width, 0.05, stride, False, "heads last", 64, 0))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, n_chosen, D, width", [((1, 2, 7), 59, 64, 256), ((2, 3, 3), 11, 64, 256), ((1, 4, 1), 3, 128, 256),
                                                       ((1, 1, 4), 200, 80, 1000)])
def test_large_choice_is_that_of_sea(dtype, heads, n_chosen, D, width):
    """Rounding decides in few rows."""
    case = Choice(dtype, "kv", heads, 1000, 32768, D, width, 8, 28, 8, 8, n_chosen, 1, False, False, "heads last", 0)
    assert check_choose_bins(case).float().mean() > 0.95
    assert check_choose_bins(replace(case, exact=True)).all()
    check_choose_bins(replace(case, R=1, heads=(4, *heads[1:]), ordered=True))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, extra, width, D", [(2048, 0, 256, 64), (700, 1300, 1000, 128), (1, 4999, 128, 80)])
def test_large_pool_attention_matches_reference(dtype, T, extra, width, D):
    case = Sparse(dtype, True, T, extra, (1, 2, 2), D, width, 0.05, 1, True, "heads last", 64, 0)
    check_pool_attention(case)
    check_pool_attention(case, 8, 28, 8)


@gpu
@pytest.mark.parametrize("dtype, D, stride, width", [
    (torch.float32, 64, 4, 256), (torch.float16, 64, 1, 256), (torch.float16, 64, 4, 256), (torch.bfloat16, 64, 1, 256),
    (torch.bfloat16, 64, 4, 256), (torch.bfloat16, 128, 3, 256), (torch.bfloat16, 64, 1, 64), (torch.bfloat16, 64, 4, 1024)])
def test_large_estimator_matches_reference(dtype, D, stride, width):
    case = Layer(dtype, 1100, stride, (1, 4, 3), D, width, 64, False, "heads last", 1)
    check_causal_context(case)
    check_estimator(case)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, before, width, D, stride, padded", [(5000, 0, 256, 64, 1, False), (5000, 0, 1000, 128, 4, False),
                                                                 (5000, 3100, 128, 80, 3, True), (4097, 4096, 256, 64, 1, False)])
def test_large_cell_keys_match_reference(dtype, T, before, width, D, stride, padded):
    check_cell_keys(Layer(dtype, T, stride, (1, 2, 2), D, width, 64, padded, "heads last", 0), before, D**-0.5)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, width", [(12, 256), (12, 1024), (32, 1000)])
def test_large_selection_is_that_of_sea_bit_for_bit(dtype, H, width):
    scores, _ = Cells(dtype, "causal_batch", 1, H, 512, width, 64, 0, "heads last", 0).tensors()
    for seen in (torch.arange(512, device=DEVICE)[None], torch.arange(512, device=DEVICE)[None] * 100):
        for group in ("causal_batch", "query"):
            assert torch.equal(kernels.topk_mask(scores, seen, 64, group), sea.topk_mask(scores, seen, 64, group))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bit_equal_from_run_to_run(dtype):
    case = Sparse(dtype, True, 4096, 0, (1, 2, 2), 64, 256, 0.05, 4, False, "contiguous", 64, 0)
    q, k, v, mask, seen, row = case.tensors()
    mask[..., :2] = True  # keys that every query visits

    def run():
        xs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = kernels.sparse_attention(*xs, mask, seen, row=row)
        return [out, *torch.autograd.grad(out, xs, torch.ones_like(out))]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bin", [8, 2])
def test_gradients_of_bin_attention_are_bit_equal_from_run_to_run(dtype, bin):
    q, k, v, bins, seen = Bins(dtype, 4096, 0, (1, 2, 1, 3), 64, bin, 0.05, False, "contiguous", 64, 0).tensors()
    bins[..., 0] = 0  # keys that every query visits

    def run():
        xs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = kernels.bin_attention(*xs, bins, seen, bin=bin)
        return [out, *torch.autograd.grad(out, xs, torch.ones_like(out))]

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, extra, heads, D, bin", [(2048, 0, (1, 2, 1, 7), 64, 2), (2048, 99, (1, 1, 2, 3), 128, 16),
                                                             (1, 4999, (1, 2, 1, 3), 64, 8), (999, 0, (1, 1, 1, 1), 256, 1)])
def test_large_bin_attention_matches_reference(dtype, T, extra, heads, D, bin):
    check_bin_attention(Bins(dtype, T, extra, heads, D, bin, 0.05, True, "heads last", 64, 0))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra, D", [(4999, 64), (131071, 64), (3000, 80)])
def test_large_step_of_bin_attention_matches_reference(dtype, extra, D):
    check_bin_step(Bins(dtype, 1, extra, (2, 2, 1, 3), D, 8, 0.02, False, "heads last", 64, 0))


@gpu
@pytest.mark.parametrize("cell_keys, bin", [(False, 0), (True, 0), (True, 4)])
@pytest.mark.parametrize("stride", [1, 4])
def test_a_layer_is_bit_equal_from_run_to_run(stride, cell_keys, bin):
    case = Layer(torch.bfloat16, 5000, stride, (1, 4, 3), 64, 256, 64, False, "heads last", 1, cell_keys, bin)
    layer, q = case.layer(backend="triton", nbf=8, max_positions=8192).to(torch.bfloat16), [x.requires_grad_() for x in case.qkv()]

    def run():
        result = layer(*q)
        outs = [x for x in (result.out, result.scores, result.head_share) if x is not None]
        return outs + list(torch.autograd.grad(outs, [*q, *layer.parameters()], [torch.ones_like(x) for x in outs]))

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra, width, D, density", [(4999, 256, 64, 0.05), (131071, 256, 64, 0.01), (70000, 1000, 128, 0.02),
                                                      (3000, 128, 80, 1.0)])
def test_large_step_of_sparse_attention_matches_reference(dtype, extra, width, D, density):
    check_sparse_step(Sparse(dtype, True, 1, extra, (2, 2, 2), D, width, density, 1, False, "heads last", 64, 0))


@gpu
@pytest.mark.parametrize("dtype, D, stride, padded", [(torch.float32, 64, 4, True), (torch.float16, 64, 1, False),
                                                      (torch.bfloat16, 64, 4, True), (torch.bfloat16, 128, 1, False)])
def test_large_step_of_the_estimator_matches_reference(dtype, D, stride, padded):
    case = Layer(dtype, 300, stride, (2, 4, 3), D, 256, 64, padded, "heads last", 1)
    check_step(case)
    if dtype == torch.float32:
        for bin in (4, 0):
            check_decoding(replace(case, bin=bin), 280)


@gpu
@pytest.mark.parametrize("width, cell_keys, bin", [(256, False, 0), (140, True, 0), (140, True, 4)])  # a level begins in the others
@pytest.mark.parametrize("stride", [1, 4])
def test_a_captured_step_replayed_is_eager_steps(stride, width, cell_keys, bin):
    """A CUDA graph of one step, its keys in a static buffer that holds NaN behind the last token, its state kept in place."""
    case = Layer(torch.bfloat16, 300, stride, (2, 2, 2), 64, width, 8, False, "contiguous", 1, cell_keys, bin)
    layer, (q, k, v), first = case.layer(backend="triton").to(torch.bfloat16), case.qkv(), 285

    @torch.no_grad()
    def start():
        buffers = [F.pad(x[:, :, :first], (0, 0, 0, 100), value=float("nan")) for x in (k, v)]
        return layer(*(x[:, :, :first] for x in (q, k, v)), kv_cached=True).state, buffers

    @torch.no_grad()
    def step(tokens, state, buffers):
        for x, buffer in zip(tokens[1:], buffers):
            buffer.scatter_(2, state.count[:, None, None, None].expand_as(x), x)
        return layer(tokens[0], *buffers, state=state, kv_cached=True, in_place=True).out

    tokens = lambda n: [x[:, :, n : n + 1] for x in (q, k, v)]
    (state, buffers), eager = start(), []
    for n in range(first, case.T):
        eager.append(step(tokens(n), state, buffers))
    # -- the same in a graph
    static, (state, buffers) = [x.clone() for x in tokens(first)], start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first_out = step(static, state, buffers)  # compiles, and gives the state room for candidates
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(first_out, eager[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static, state, buffers)
    for n, expected in zip(range(first + 1, case.T), eager[1:]):
        for x, new in zip(static, tokens(n)):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, expected) and out.isfinite().all(), n
    assert (state.count == case.T).all()


@gpu
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bin", [4, 0])
def test_large_rows_at_once_is_one_call(stride, padded, bin):
    """In fp32; a chunk's sums are added in another order, so cells that are as good as equal may change places."""
    case = Layer(torch.float32, 3000, stride, (2, 2, 2), 64, 256, 64, padded, "heads last", 1, bin=bin)
    layer, qkv = case.layer(backend="triton"), case.qkv()
    with torch.no_grad():
        whole, parts = (layer(*qkv, valid=case.valid(), rows_at_once=n) for n in (None, 700))
    differ = ((whole.out - parts.out).abs() > 1e-3 * whole.out.abs().max()).any(-1)
    assert differ.float().mean() < 1e-2
    torch.testing.assert_close(parts.state.sums, whole.state.sums, rtol=1e-4, atol=1e-2)


# -- every launch compiles for the GPU ---------------------------------------------------------------------------------


SHAPES = [(torch.bfloat16, 64, 256, 4), (torch.float16, 64, 256, 4), (torch.float32, 64, 256, 4), (torch.bfloat16, 128, 1024, 1)]


def launches(dtype: torch.dtype, D: int, width: int, stride: int):
    """Calls that between them launch every kernel with the options really used."""
    B, H, Hkv, T, S = 1, 4, 2, 64, 96
    q, k, v = (torch.ones(B, h, n, D, dtype=dtype, requires_grad=True) for h, n in ((H, T), (Hkv, S), (Hkv, S)))
    seen, R = torch.full((B, T), S), T // stride
    row = None if stride == 1 else torch.arange(T)[None] // stride
    scores, cells = torch.ones(B, H, R, width, dtype=dtype), torch.ones(B, H, R, width, dtype=torch.bool)
    kernels.select_cells(scores, seen[:, :R], 64, "causal_batch")
    kernels.select_cells(scores, seen[:, :R], 64, "query")
    kernels.pool_attention(q, k, seen, width)
    kernels.pool_attention(q, k, seen, width, in_cells=seen, unit=8, first=8)
    config = sea.SEAConfig(n_head=H, n_kv_head=Hkv, d_head=D, width=width, query_stride=stride, backend="triton")
    for bins in (config, replace(config, group="query", topk=512, bin=4)):
        for n, order in itertools.product((T, 1), (None, torch.zeros(B, S, dtype=torch.long))):
            of_query = torch.arange(n)[None] // stride
            of_chooser = kernels.mean_of_heads(q[:, :, :n], bins.n_choosers)
            for kept in (None, kernels.no_candidates(bins, k, bins.topk)):
                kernels.choose_bins(scores, of_chooser, k, seen[:, :n], of_query, seen[:, :R], bins.topk, bins, 0.1, order=order, kept=kept)
    config = replace(config, bin=0, group="causal_batch")
    calls = [(torch.ones(B, S, dtype=torch.bool), True), (None, True), (None, False)]
    for valid, with_scores in calls if dtype == torch.bfloat16 and D == 64 else calls[:1]:
        config = replace(config, cell_keys=with_scores)
        layer = sea.SEAttention(config).to(dtype)
        layer.projection = layer.projection.to(dtype if with_scores else torch.float32)  # fp32 as under autocast
        result = layer(k.repeat(1, H // Hkv, 1, 1), k, v, valid=valid)
        yield (result.out, result.scores) if with_scores else result.out
        with torch.no_grad():  # decoding, with and without padding
            layer, new = sea.SEAttention(config).to(dtype), torch.ones(B, H, 1, D, dtype=dtype)
            longer = None if valid is None else torch.ones(B, S + 1, dtype=torch.bool)
            kv = (torch.ones(B, Hkv, S + 1, D, dtype=dtype) for _ in range(2))
            layer(new, *kv, state=result.state, kv_cached=True, valid=longer)
    yield kernels.sparse_attention(q, k, v, cells, seen, row=row)
    bins = torch.arange(S // 8, dtype=torch.int32).repeat(B, Hkv, T, 1)
    for size in (8, 5, 2, 64) if D == 64 and dtype == torch.bfloat16 else (8,):
        yield kernels.bin_attention(q, k, v, bins, seen, bin=size)
    many = torch.ones(B, 48 * Hkv, T, D, dtype=dtype, requires_grad=True)  # heads of a chooser, in several tiles
    yield kernels.bin_attention(many, k, v, bins, seen, bin=8)
    with torch.no_grad():
        for n in T, 1:  # cell keys with bounds, of a call and of a step
            count, past = seen[:, 0] - n, torch.zeros(B, Hkv, 2 * width, 3 * D)
            x = scores.detach()[:, :, :n].clone()
            for given in (x, None):
                kernels.add_cell_keys(given, torch.ones(H), q[:, :, : x.shape[2]], k[:, :, :n], seen[:, : x.shape[2]], 0.1, count,
                                      0 * count + n, past, seen[:, : x.shape[2]], bounds=True)
        kernels.bin_attention(q[:, :, :1], k, v, bins[:, :, :1], seen[:, :1], bin=8)
        kernels.bin_attention(q[:, :, :1], k, v, bins[:, :, :1], seen[:, :1], bin=8, order=torch.arange(S)[None])
    for heads, n_cells in ((32, 1024), (12, 64)) if width == 1024 else ():  # the widest convolutions, and narrow ones of many heads
        cnn = sea.CausalCNN(heads, n_cells).to(dtype)
        image = torch.ones(1, 2 * heads, 8, n_cells // 4, dtype=dtype, requires_grad=True)
        none, four, n_rows = image[:, :, :0], image[:, :, :4], torch.ones(1, dtype=torch.long)
        yield kernels.causal_cnn(image, cnn, (none, none), n_rows)[0]
        with torch.no_grad():
            kernels.causal_cnn(image[:, :, :1], cnn, (four, four), n_rows)
    if dtype == torch.bfloat16:
        kernels.sparse_attention(q[:, :, :1], k, v, cells[:, :, :1], seen[:, :1])  # decoding: sizes of 1 are special


def compile_launches(capability: int, shape: int) -> int:
    """Compile, by Triton's own launch path, for a GPU that need not be there. Returns the number of cubins."""
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    run, cubins = triton.runtime.jit.JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert compiled.metadata.shared <= (163 if capability == 80 else 227) * 1024, (self.__name__, compiled.metadata.shared)
        cubins.add(compiled.asm["cubin"])

    triton.runtime.jit.JITFunction.run = compile_only
    estimator_kernels._check_device = lambda *args: None  # CPU tensors will do
    torch.empty, kernels.PAIRS_PER_PROGRAM = torch.ones, 1  # nothing is computed, so sizes that depend on data come from here
    torch.empty_like = lambda x, **kwargs: torch.ones_like(x)
    for out in launches(*SHAPES[shape]):
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor) and x.requires_grad]
        if out:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
    return len(cubins)


@pytest.mark.parametrize("capability, shape", [*((90, shape) for shape in reversed(range(len(SHAPES)))), (80, 0)])
def test_every_launch_compiles_without_a_gpu(capability, shape):
    """For sm_90 in all dtypes and sizes, for sm_80 in bf16."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"import test_kernels; print(test_kernels.compile_launches({capability}, {shape}), 'cubins')"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "cubins" in done.stdout, done.stderr[-3000:]
