"""The specification of sea.py, as laws. Each law draws sizes, builds tensors from a seed, and compares in float64."""

import contextlib
import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import baselines
import sea
from baselines import PerformerAttention, ReformerAttention, WindowAttention
from convert import attention_csr
from sea import SEAConfig, SEAttention

CLOSE = dict(rtol=1e-9, atol=1e-9)


@dataclass
class Case:
    """One layer and its input, as numbers. `tokens` is the valid length of each sequence of the batch."""

    causal: bool
    stride: int
    tokens: list[int]
    n_kv_head: int
    heads_per_kv: int
    d_head: int
    width: int
    topk: int
    group: str
    seed: int
    cell_keys: bool = False
    bin: int = 0
    local: int = 0
    first: int = 0
    candidates: int = 1
    cnn: bool = True
    dense_below: int = 0

    @property
    def least(self) -> int:
        """The smallest topk."""
        return -(-self.first // self.bin) * self.bin + self.local + self.bin + self.stride - 2 if self.bin else 1

    def all_keys(self, n: int) -> int:
        """A topk with which n keys are all attended to."""
        return self.least + max(1, self.bin) * n

    def config(self, **changes) -> SEAConfig:
        fields = dict(n_head=self.n_kv_head * self.heads_per_kv, n_kv_head=self.n_kv_head, d_head=self.d_head, width=self.width,
                      topk=self.topk, causal=self.causal, group=self.group, query_stride=self.stride, nbf=1, max_positions=99,
                      cell_keys=self.cell_keys, bin=self.bin, local=self.local, first=self.first, candidates=self.candidates,
                      cnn=self.cnn, dense_below=self.dense_below)
        return SEAConfig(**{**fields, **changes})

    def layer(self, kind=SEAttention, **changes) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        layer = kind(self.config(**changes)).double()
        for parameter in layer.parameters():  # gates and norms start as constants, which would hide their bugs
            parameter.data += 0.3 * torch.randn_like(parameter)
        return layer

    def qkv(self, n_tokens: int | None = None) -> list[torch.Tensor]:
        """q (B, H, T, D); k, v (B, Hkv, T, D), T the longest sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.n_kv_head * self.heads_per_kv, self.n_kv_head, self.n_kv_head)
        return [torch.randn(len(self.tokens), h, n_tokens or max(self.tokens), self.d_head, generator=generator,
                            dtype=torch.float64) for h in heads]


@st.composite
def cases(draw, causal=st.booleans(), max_tokens=20, max_batch=2, bins=True):
    causal = draw(causal)
    bin = draw(st.sampled_from([0, 1, 2, 3, 5])) if causal and bins else 0
    case = Case(
        causal=causal,
        stride=draw(st.integers(1, 5)) if causal else 1,
        tokens=draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=max_batch)),
        n_kv_head=draw(st.integers(1, 2)),
        heads_per_kv=draw(st.integers(1, 3)),
        d_head=draw(st.integers(2, 5)),
        width=draw(st.integers(1, 24)),
        topk=draw(st.integers(1, 8)),
        group=draw(st.sampled_from([name for name, g in sea.GROUPS.items() if g.causal >= causal and (bin or not g.shared)])),
        seed=draw(st.integers(0, 999)),
        cell_keys=draw(st.booleans()),
        bin=bin,
        local=draw(st.integers(1, 6)) if bin else 0,
        first=draw(st.integers(0, 4)) if bin else 0,
        candidates=draw(st.integers(1, 3)) if bin else 1,
    )
    case = replace(case, topk=case.least + case.topk) if bin else case
    return replace(case, cnn=draw(st.sampled_from([True, True, False]))) if causal and case.cell_keys else case


causal_cases = cases(causal=st.just(True))
dense_at_first = st.builds(lambda case, n: replace(case, dense_below=n), causal_cases, st.sampled_from([0, 0, 2, 6, 99]))
cases_of_cells = cases(bins=False)


def of_kind(case: Case, kind) -> Case:
    """A case that a control can run."""
    if kind is WindowAttention:
        case = replace(case, causal=True, bin=max(1, case.bin), local=1)
        case = replace(case, group="query" if case.group not in ("kv", "causal_batch") else case.group, topk=case.topk + case.least)
    return case if kind is SEAttention else replace(case, stride=1, cell_keys=False, cnn=True)


KINDS = st.sampled_from([SEAttention, PerformerAttention, WindowAttention, ReformerAttention])


def open_gates(layer: SEAttention, bias: float = 60.0) -> SEAttention:
    """sigmoid(60) is 1 in float64."""
    if not layer.config.cnn:
        layer.gates.data.fill_(bias)
        return layer
    layer.gate.weight.data.zero_()
    layer.gate.bias.data.fill_(bias)
    return layer


def seen_by(case: Case) -> torch.Tensor:
    """(B, T) keys that each query sees, 0 past the end of a sequence."""
    n = torch.tensor(case.tokens)[:, None]
    i = torch.arange(max(case.tokens))
    return torch.where(i < n, i + 1 if case.causal else n, 0)


def dense_attention(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    visible = torch.arange(k.shape[2]) < seen[:, None, :, None]
    probs = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    return probs @ v


# -- causality, streaming, padding -------------------------------------------------------------------------------------


@given(dense_at_first, st.data())
def test_past_ignores_future(case, data):
    """Perturb all later tokens of q, k and v: the estimate, the choice and the output before them stay the same bits."""
    layer, (q, k, v) = case.layer(), case.qkv()
    T = q.shape[2]
    cut = data.draw(st.integers(1, T), label="first perturbed token")
    before = layer(q, k, v)
    perturbed = [torch.cat([x[:, :, :cut], 3 + 5 * torch.randn_like(x[:, :, cut:])], 2) for x in (q, k, v)]
    after = layer(*perturbed)
    for name in ("probs", "out"):
        assert torch.equal(getattr(before, name)[:, :, :cut], getattr(after, name)[:, :, :cut]), name
    assert torch.equal(before.attended(T)[:, :, :cut], after.attended(T)[:, :, :cut])


@given(causal_cases, st.integers(0, 99), st.sampled_from([torch.inf, -torch.inf, torch.nan]), st.booleans())
@example(Case(True, 1, [17], 1, 1, 4, 8, 4, "query", 0, cell_keys=True), 16, torch.inf, False)  # the first key after a level
def test_a_key_that_is_not_finite_changes_no_earlier_row(case, place, number, in_two_calls):
    layer, (q, k, v) = case.layer(), case.qkv()
    place %= q.shape[2]
    bad = k.clone()
    bad[:, :, place, 0] = number
    cuts = {place // 2} - {0} if in_two_calls else set()
    before, after = (split_and_run(layer, q, keys, v, None, cuts, kv_cached=True) for keys in (k, bad))
    for name in ("probs", "attended", "out"):
        of = lambda part: part.attended(q.shape[2]) if name == "attended" else getattr(part, name)
        x, y = (torch.cat([of(part) for part in parts], 2)[:, :, :place] for parts in (before, after))
        assert torch.equal(x, y), name


@given(causal_cases, st.data())
def test_later_tokens_matter(case, data):
    """The law above could not fail if the output ignored its input: the perturbed token itself must change it."""
    case = replace(case, tokens=[max(2, max(case.tokens))])
    layer, (q, k, v) = case.layer(), case.qkv()
    before = layer(q, k, v).out
    after = layer(q, k, torch.cat([v[:, :, :-1], v[:, :, -1:] + 1], 2)).out
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


def split_and_run(layer, q, k, v, valid, cuts, kv_cached):
    state, outs = None, []
    for lo, hi in itertools.pairwise([0, *sorted(cuts), q.shape[2]]):
        first = 0 if kv_cached else lo
        result = layer(q[:, :, lo:hi], k[:, :, first:hi], v[:, :, first:hi], state=state, kv_cached=kv_cached,
                       valid=None if valid is None else valid[:, first:hi])
        state = result.state
        outs.append(result)
    return outs


@given(dense_at_first, st.booleans(), st.booleans(), KINDS, st.data())
def test_any_split_is_one_call(case, kv_cached, padded, kind, data):
    """Chunks of any sizes, one token included, with any padding, at any query stride, give what one call gives."""
    case = of_kind(case, kind)
    layer, (q, k, v) = case.layer(kind), case.qkv()
    T = q.shape[2]
    cuts = data.draw(st.sets(st.integers(1, T - 1)) if T > 1 else st.just(set()), label="cuts")
    valid = None
    if padded:
        valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(q) * T, max_size=len(q) * T))).view(len(q), T)
        for x in (q, k, v):
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
    whole = layer(q, k, v, valid=valid)
    parts = split_and_run(layer, q, k, v, valid, cuts, kv_cached)
    torch.testing.assert_close(torch.cat([p.out for p in parts], 2), whole.out, **CLOSE)
    if kind is not PerformerAttention:
        assert torch.equal(torch.cat([p.attended(T) for p in parts], 2), whole.attended(T))
    torch.testing.assert_close(parts[-1].state.sums, whole.state.sums, **CLOSE)
    assert torch.equal(parts[-1].state.count, whole.state.count)


@given(causal_cases, st.integers(1, 25), st.booleans(), st.data())
def test_a_query_that_sees_few_keys_attends_to_all(case, dense_below, padded, data):
    """And every other one is what it is without dense_below, as is the estimate; numbers, choice and matrix agree."""
    layer, (q, k, v), T = case.layer(), case.qkv(), max(case.tokens)
    valid = None
    if padded:
        valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(q) * T, max_size=len(q) * T))).view(len(q), T)
    without = layer(q, k, v, valid=valid)
    layer.config = replace(layer.config, dense_below=dense_below)
    result = layer(q, k, v, valid=valid)
    is_dense = (result.seen > 0) & (result.seen < dense_below)
    assert torch.equal(result.is_dense, is_dense)
    order = sea.valid_first(torch.ones(len(q), T).bool() if valid is None else valid)
    exact = dense_attention(q, sea.take(k, order), sea.take(v, order), result.seen)
    expected = torch.where(is_dense[:, None, :, None], exact, without.out)
    torch.testing.assert_close(result.out, expected, **CLOSE)
    sees = (torch.arange(T) < result.seen[..., None])[:, None].expand(-1, q.shape[1], -1, -1)
    attended = result.attended(T)
    assert torch.equal(attended, torch.where(is_dense[:, None, :, None], sees, without.attended(T)))
    n = result.n_attended()
    assert torch.equal(n.repeat_interleave(q.shape[1] // n.shape[1], 1), attended.sum(-1))
    k = sea.take(k, order)
    for ours, theirs in zip(attention_csr(q, k, result), sea.attention_weights(q, k, attended), strict=True):
        torch.testing.assert_close(torch.stack([x.to_dense() for x in ours]), theirs, **CLOSE)
    assert torch.equal(result.scores, without.scores)
    for name, x in tensors_of(without.state).items():
        torch.testing.assert_close(tensors_of(result.state)[name], x, **CLOSE, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stride", [1, 3])
def test_nothing_is_chosen_for_rows_whose_queries_are_all_dense(stride, monkeypatch):
    layer, chosen_for = SEAttention(SEAConfig(n_head=2, d_head=4, topk=16, query_stride=stride, dense_below=12)), []
    choose = sea.choose_bins
    monkeypatch.setattr(sea, "choose_bins", lambda scores, q, *args, **kwargs: chosen_for.append(q.shape[2])
                        or choose(scores, q, *args, **kwargs))
    for n in (20, 12, 11):
        layer(*(torch.randn(1, 2, n, 4) for _ in range(3)))
    assert chosen_for == {1: [9, 1], 3: [11, 3]}[stride]


def test_a_static_buffer_is_refused_while_its_queries_would_be_dense():
    """A graph of the step could not tell when they no longer are."""
    layer = SEAttention(SEAConfig(n_head=1, d_head=4, topk=16, dense_below=4))
    x = torch.randn(1, 1, 8, 4)
    for n, dense in ((2, True), (3, False)):
        state = layer(*(x[:, :, :n] for _ in range(3)), kv_cached=True).state
        with pytest.raises(ValueError, match="^k: expected no static buffer") if dense else contextlib.nullcontext():
            layer(x[:, :, :1], x, x, state=state, kv_cached=True)


def test_a_step_after_padding_is_dense_where_its_sequence_is_short():
    """Without a mask, of keys that stand by rank: 24 places of which one sequence has 15. A buffer is refused for its sake."""
    layer = SEAttention(SEAConfig(n_head=2, d_head=4, topk=8, local=2, dense_below=20)).double()
    q, k, v = (torch.randn(2, 2, 64, 4, dtype=torch.float64) for _ in range(3))
    n, valid = torch.tensor([24, 15]), torch.arange(24) < torch.tensor([[24], [15]])
    state = layer(*(x[:, :, :24] for x in (q, k, v)), valid=valid, kv_cached=True).state
    x = [sea.take(x, n[:, None]) for x in (q, k, v)]  # the next token of each, at its rank
    result = layer(x[0], k[:, :, :25], v[:, :, :25], state=state, kv_cached=True)
    dense = dense_attention(x[0][1:], k[1:, :, :16], v[1:, :, :16], torch.tensor([[16]]))
    torch.testing.assert_close(result.out[1:], dense, **CLOSE)
    assert result.is_dense.flatten().tolist() == [False, True]
    with pytest.raises(ValueError, match="^k: expected no static buffer"):
        layer(x[0], k, v, state=state, kv_cached=True)


def tensors_of(state) -> dict[str, torch.Tensor]:
    """What a state holds, each of the two conv_rows by a name of its own."""
    values = {name: x if isinstance(x, tuple) else (x,) for name, x in vars(state).items()}
    return {f"{name}[{i}]": x for name, xs in values.items() for i, x in enumerate(xs) if isinstance(x, torch.Tensor)}


@given(dense_at_first, st.integers(1, 9), st.booleans(), st.booleans(), KINDS, st.data())
def test_rows_at_once_is_one_call(case, rows, kv_cached, padded, kind, data):
    """Whatever the padding, the query stride and the past: the same output, state and gradients."""
    case = of_kind(case, kind)
    layer, (q, k, v), T = case.layer(kind).requires_grad_(False), case.qkv(), max(case.tokens)
    cut = data.draw(st.integers(0, T - 1), label="tokens before")
    valid = torch.rand(len(q), T, generator=torch.Generator().manual_seed(case.seed)) < 0.7 if padded else None
    of = lambda first, last: dict(valid=None if valid is None else valid[:, first:last], kv_cached=kv_cached)
    state = layer(*(x[:, :, :cut] for x in (q, k, v)), **of(0, cut)).state if cut else None
    results = []
    for rows_at_once in (None, rows):
        first, q_new = 0 if kv_cached else cut, q[:, :, cut:].detach().requires_grad_()
        result = layer(q_new, k[:, :, first:], v[:, :, first:], state=state, rows_at_once=rows_at_once, **of(first, T))
        result.out.square().sum().backward()
        results.append({"out": result.out, "seen": result.seen, "dq": q_new.grad, **tensors_of(result.state)})
        assert result.state.n_tokens == T and (result.scores is None) == (kind is not SEAttention or T - cut > (rows_at_once or T))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, **CLOSE, msg=lambda m: f"{name}: {m}")


@given(cases(), KINDS, st.data())
def test_packed_documents_are_each_alone(case, kind, data):
    """in_documents, documents in pieces and of very different lengths, with padding: outputs, keys seen and gradients."""
    case = of_kind(case, kind)
    layer, qkv = case.layer(kind), [x.requires_grad_() for x in case.qkv()]
    B, _, T, _ = qkv[0].shape
    numbers = st.lists(st.integers(-2, data.draw(st.integers(-2, 2), label="highest")), min_size=T, max_size=T)
    documents = torch.tensor([data.draw(numbers, label="documents") for _ in range(B)])
    valid = None
    if data.draw(st.booleans(), label="padded"):
        valid = torch.arange(T) < torch.tensor(case.tokens)[:, None]
    result = sea.in_documents(layer, documents, *qkv, valid=valid, topk=case.least + 3)
    assert result.state is None and result.scores is None
    expected, seen = torch.zeros_like(result.out), torch.zeros_like(result.seen)
    for b in range(B):
        for number in documents[b].unique():
            here = documents[b] == number
            one = layer(*(x[b : b + 1, :, here] for x in qkv), valid=None if valid is None else valid[b : b + 1, here], topk=case.least + 3)
            expected[b, :, here], seen[b, here] = one.out[0], one.seen[0]
    torch.testing.assert_close(result.out, expected, **CLOSE)
    assert torch.equal(result.seen, seen)
    weight = torch.randn(result.out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
    of_packed, of_alone = (torch.autograd.grad((out * weight).sum(), qkv) for out in (result.out, expected))
    for mine, other in zip(of_packed, of_alone):
        torch.testing.assert_close(mine, other, **CLOSE)


@given(causal_cases, st.integers(1, 5), st.integers(0, 3), st.sampled_from([SEAttention, ReformerAttention]), st.data())
def test_a_static_buffer_holds_sequences_of_any_lengths(case, steps, room, kind, data):
    """Each sequence alone, decoded token by token, is its row of a batch in one long buffer, whose state is kept in place: by the
    call itself, or afterwards."""
    case = of_kind(case, kind)
    options = dict(in_place=True) if kind is SEAttention and data.draw(st.booleans(), label="in place") else {}
    layer, (q, k, v) = case.layer(kind), case.qkv(max(case.tokens) + steps)
    longest = max(case.tokens)
    valid = torch.arange(longest) < torch.tensor(case.tokens)[:, None]
    state = layer(*(x[:, :, :longest] for x in (q, k, v)), valid=valid, kv_cached=True).state
    held = tensors_of(state)
    pad = lambda x: F.pad(x, (0, 0, 0, room), value=9.0)
    for i in range(steps):
        new = torch.stack([x[:, n + i] for x, n in zip(q, case.tokens)])[:, :, None]
        with torch.no_grad() if options else contextlib.nullcontext():
            result = layer(new, pad(k), pad(v), state=state, kv_cached=True, **options)
        for b, n in enumerate(case.tokens):
            alone = layer(*(x[b : b + 1, :, : n + i + 1] for x in (q, k, v)))
            torch.testing.assert_close(result.out[b, :, 0], alone.out[0, :, -1], **CLOSE)
            assert torch.equal(result.attended(n + i + 1)[b, :, 0], alone.attended(n + i + 1)[0, :, -1])
        assert not options or result.state is state
        state.copy_(result.state)
        assert all(x is held[name] for name, x in tensors_of(state).items())


@given(cases(), st.data())
def test_padded_batch_is_each_sequence_alone(case, data):
    """Padding on either side, and holes between, contribute nothing anywhere; padded queries get zeros."""
    layer, T = case.layer(), max(case.tokens) + data.draw(st.integers(0, 4), label="all-padding columns")
    q, k, v = case.qkv(T)
    valid = torch.zeros(len(q), T, dtype=torch.bool)
    for b, n in enumerate(case.tokens):
        side = data.draw(st.sampled_from(["right", "left", "anywhere"]))
        places = {"right": range(n), "left": range(T - n, T)}.get(side) or data.draw(
            st.lists(st.integers(0, T - 1), min_size=n, max_size=n, unique=True))
        valid[b, list(places)] = True
    for x in (q, k, v):  # whatever padding holds, it goes nowhere
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    padded = layer(q, k, v, valid=valid)
    for b in range(len(q)):
        alone = layer(*(x[b : b + 1, :, valid[b]] for x in (q, k, v)))
        torch.testing.assert_close(padded.out[b, :, valid[b]], alone.out[0], **CLOSE)
        assert torch.equal(padded.attended(case.tokens[b])[b, :, valid[b]], alone.attended(case.tokens[b])[0])
        assert not padded.out[b, :, ~valid[b]].any() and not padded.attended(T)[b, :, ~valid[b]].any()


@given(cases())
def test_all_padding_gives_zeros_and_finite_gradients(case):
    layer, (q, k, v) = case.layer(), case.qkv()
    q.requires_grad_()
    out = layer(q, k, v, valid=torch.zeros(len(q), q.shape[2], dtype=torch.bool)).out
    out.sum().backward()
    assert not out.any() and q.grad.isfinite().all()


@given(causal_cases)
def test_state_follows_beam_search(case):
    case = replace(case, tokens=[max(2, case.tokens[0])] * 2)
    layer, (q, k, v) = case.layer(), case.qkv()
    index = torch.tensor([1, 1, 0])
    state = layer(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1]).state.index_select(index)
    last = layer(*(x[index][:, :, -1:] for x in (q, k, v)), state=state).out
    torch.testing.assert_close(last, layer(q, k, v).out[index][:, :, -1:], **CLOSE)


# -- limits ------------------------------------------------------------------------------------------------------------


@given(cases())
def test_full_mask_and_open_gates_is_dense_attention(case):
    layer, (q, k, v) = open_gates(case.layer()), case.qkv()
    n = q.shape[2]
    seen = torch.arange(1, n + 1).expand(len(q), n) if case.causal else torch.full((len(q), n), n)
    torch.testing.assert_close(layer(q, k, v, topk=case.all_keys(n)).out, dense_attention(q, k, v, seen), **CLOSE)


@given(cases(), st.booleans())
def test_equal_keys_give_the_mean_of_the_values(case, gates_open):
    """With equal keys attention is the mean of the values seen; with closed gates the causal average is that mean as well."""
    case = case if gates_open else replace(case, causal=True, group="query")
    layer, (q, k, v) = open_gates(case.layer(), 60.0 if gates_open else -60.0), case.qkv()
    n = q.shape[2]
    out = layer(q, k[:, :, :1].expand_as(k), v, topk=case.all_keys(n)).out
    mean = v.cumsum(2) / torch.arange(1, n + 1)[:, None] if case.causal else v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(out, sea.repeat_heads(mean, q.shape[1]), **CLOSE)


@given(cases(causal=st.just(False)))
def test_bidirectional_average_is_a_weighted_mean(case):
    """Closed gates: every query gets sum_j w_j v_j, w the mean estimated row spread to keys, summing to 1."""
    layer, (q, k, v) = open_gates(case.layer(), -60.0), case.qkv()
    result = layer(q, k, v)
    cell = [sea.cell_of_key(j, q.shape[2], case.width) for j in range(q.shape[2])]
    w = result.probs.mean(2)[:, :, cell]
    expected = (w / w.sum(-1, keepdim=True))[:, :, None] @ sea.repeat_heads(v, q.shape[1])
    torch.testing.assert_close(result.out, expected.expand_as(q), **CLOSE)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_output(case, random):
    case = replace(case, tokens=case.tokens[:1] * 3)
    layer, (q, k, v) = case.layer(), case.qkv()
    order = torch.tensor(random.sample(range(3), 3))
    torch.testing.assert_close(layer(q[order], k[order], v[order]).out, layer(q, k, v).out[order], **CLOSE)


@given(cases())
def test_grouped_query_is_repeated_heads(case):
    """But where the heads share a choice, or without a CNN an estimate."""
    case = replace(case, group="query" if case.group == "kv" else case.group, cnn=True)
    grouped, (q, k, v) = case.layer(), case.qkv()
    repeated = SEAttention(case.config(n_kv_head=None)).double()
    repeated.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped(q, k, v).out,
                               repeated(q, *(x.repeat_interleave(case.heads_per_kv, 1) for x in (k, v))).out, **CLOSE)


@given(cases())
def test_scaling_q_is_scaling_the_softmax(case):
    """Some models scale q before attention and pass softmax_scale 1: the same output, estimate included."""
    layer, (q, k, v) = case.layer(), case.qkv()
    torch.testing.assert_close(layer(q * case.d_head**-0.5, k, v, softmax_scale=1.0).out, layer(q, k, v).out, **CLOSE)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_dtype_runs_and_keeps_its_dtype(case, dtype):
    """Fully kept and with open gates, low precision is as close to float64 as its rounding allows."""
    layer, (q, k, v) = open_gates(case.layer()), case.qkv()
    expected = layer(q, k, v, topk=case.all_keys(q.shape[2])).out
    out = layer.to(dtype)(*(x.to(dtype) for x in (q, k, v)), topk=case.all_keys(q.shape[2])).out
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * (1 + v.abs().max().item()))


@given(cases(), st.sampled_from("qkv"), st.booleans())
def test_one_token_of_6e4_is_no_nan_in_fp16(case, name, autocast):
    """The largest number of fp16 is 65504, and the encoder's first layer adds up a row before its norm."""
    case = replace(case, tokens=[8], width=4, cnn=True)
    layer = open_gates(case.layer())
    for parameter in layer.encoder[0].parameters():
        parameter.data += 1
    inputs = {x: y.half() for x, y in zip("qkv", case.qkv())}
    inputs[name][:, :, 3] = 6e4
    expected = layer(*(x.double() for x in inputs.values()), topk=case.all_keys(99))
    layer = layer.float() if autocast else layer.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        result = layer(*inputs.values(), topk=case.all_keys(99))
    assert result.out.isfinite().all() and result.scores.isfinite().all()
    torch.testing.assert_close(result.out.double(), expected.out, rtol=4e-3, atol=4e-2)
    if name == "v":  # relu features of a q or k of 6e4 may round to the other side of 0
        assert (result.scores - expected.scores).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("causal, bin, cnn", [(True, 0, True), (True, 3, True), (True, 3, False), (False, 0, True)])
def test_a_layer_is_exported_for_any_length(causal, bin, cnn):
    """With its example of one chunk and one level of cell keys, for lengths of several; without a CNN there is no longest."""
    case = Case(causal, 1, [9], 1, 2, 4, 8, 14, "query", 0, cell_keys=True, bin=bin, local=2, first=1, cnn=cnn)
    layer = case.layer(max_positions=300 if cnn else 16)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, q, k, v):
            return self.layer(q, k, v).out

    lengths = [{2: torch.export.Dim.DYNAMIC}] * 3
    exported = torch.export.export(Model(), tuple(case.qkv()), dynamic_shapes=lengths, strict=False).module()
    for n in (3, 9, 40, 300):
        torch.testing.assert_close(exported(*case.qkv(n)), layer(*case.qkv(n)).out, **CLOSE)


@pytest.mark.parametrize("causal, bin", [(True, 0), (True, 3), (False, 0)])
def test_shapes_alone_go_through_a_layer(causal, bin):
    """On the device "meta", for which there is no autocast."""
    case = Case(causal, 1, [9, 7], 1, 2, 4, 8, 14, "query", 0, cell_keys=True, bin=bin, local=2, first=1)
    result = case.layer().to("meta")(*(x.to("meta") for x in case.qkv()))
    assert result.out.shape == (2, 2, 9, 4) and result.out.is_meta


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [SEAttention, PerformerAttention, ReformerAttention])
def test_an_empty_batch_gives_an_empty_batch(causal, kind):
    case = Case(causal, 1, [9], 1, 2, 4, 8, 4, "query", 0, cell_keys=True)
    layer, qkv = case.layer(kind), [x[:0] for x in case.qkv()]
    if causal and kind is SEAttention:
        layer.config = replace(layer.config, dense_below=5)
        assert layer(*qkv, state=layer(*qkv).state).out.shape == layer(*qkv, rows_at_once=4).out.shape == (0, 2, 9, 4)
    assert layer(*qkv, valid=torch.ones(0, 9).bool()).out.shape == layer(*qkv).out.shape == (0, 2, 9, 4)


def test_the_default_device_changes_no_feature():
    """Random features are drawn where their generator is."""
    expected = SEAttention(SEAConfig(n_head=2, d_head=8)).projection
    with torch.device("meta"):
        drawn = sea.orthogonal_features(8, expected.shape[1], torch.Generator("cpu").manual_seed(0))
        assert SEAttention(SEAConfig(n_head=2, d_head=8)).projection.is_meta
    assert torch.equal(drawn, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(cases(), st.booleans())
def test_gpu_is_cpu(case, padded):
    layer, (q, k, v) = case.layer(), case.qkv()
    valid = seen_by(case) > 0 if padded else None
    expected = layer(q, k, v, valid=valid)
    result = layer.cuda()(q.cuda(), k.cuda(), v.cuda(), valid=None if valid is None else valid.cuda())
    torch.testing.assert_close(result.out.cpu(), expected.out, **CLOSE)
    assert torch.equal(result.attended(q.shape[2]).cpu(), expected.attended(q.shape[2]))


@given(causal_cases, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_state_serves_calls_of_other_dtypes(case, dtype, kv_cached):
    """Its sums keep theirs; what a call gives has its own."""
    case = replace(case, tokens=[4] * len(case.tokens))
    layer, (q, k, v) = case.layer(), case.qkv()
    state = layer.to(dtype)(*(x[:, :, :2].to(dtype) for x in (q, k, v)), kv_cached=kv_cached).state
    first = 0 if kv_cached else 2
    result = layer.double()(q[:, :, 2:], k[:, :, first:], v[:, :, first:], state=state, kv_cached=kv_cached)
    assert result.out.dtype == torch.float64 and result.out.isfinite().all()


@given(cases())
def test_the_default_dtype_changes_nothing(case):
    layer, qkv = case.layer().float(), [x.float() for x in case.qkv()]
    expected = layer(*qkv).out
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(*qkv).out, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@given(cases())
def test_autocast_keeps_sums_in_fp32(case):
    layer, (q, k, v) = case.layer().float(), [x.bfloat16() for x in case.qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(q, k, v)
    assert result.out.dtype == torch.bfloat16 and result.probs.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert sea.estimated_mean(result.probs, v, result.seen).dtype == torch.float32
    if not case.causal:
        return
    assert result.state.sums.dtype == torch.float32
    exact = layer.double()(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(result.state.sums.double(), exact.state.sums, rtol=1e-4, atol=1e-4)


# -- the whole layer against the method, written out -------------------------------------------------------------------


def key_products(q, k, t: int, width: int, in_cells: int, bounds: bool):
    """q (..., D) times what stands for each cell when t keys k (T, D) are seen, `in_cells` of them in cells, less the largest of
    the row, at least -32: (..., width). Without bounds the mean key of the bin that holds the middle key of a cell, or of the last
    full bin; with bounds the best of those in the middle of its halves, by the mean of that product and of an upper bound."""
    size = 1
    while 2 * width * size < t:
        size *= 2

    def product(p, place, places):
        first = min((2 * (p * places + place) + 1) * in_cells // (2 * width * places) // size, t // size - 1) * size
        keys = k[first : first + size]
        mean = q @ keys.mean(0)
        return mean / 2 + torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum(-1) / 2 if bounds else mean

    places = 2 if bounds else 1
    products = torch.stack([torch.stack([product(p, i, places) for i in range(places)]).amax(0) for p in range(width)], -1)
    return (products - products.amax(-1, keepdim=True)).clamp(min=-32)


def mean_key_products(q, k, width: int):
    """The same of a query that sees all keys: times the mean of those in each cell or, where that has none, the key it lies in."""
    T, cell = len(k), [sea.cell_of_key(j, len(k), width) for j in range(len(k))]

    def keys(p):
        return [j for j in range(T) if cell[j] == p] or [math.floor((p + 0.5) * T / width)]

    products = torch.stack([sum(q @ k[j] for j in keys(p)) / len(keys(p)) for p in range(width)], -1)
    return (products - products.amax(-1, keepdim=True)).clamp(min=-32)


def naive_cnn(layer: SEAttention, q, k, v):
    """Steps 1 to 4 for one sequence q, k, v (H, T, D): scores (H, R, width) and, at the rows, gates (H, T, 2)."""
    c, w = layer.config, layer.state_dict()
    (H, T, D), r, width, P = q.shape, c.query_stride, c.width, layer.decoder.out_features // layer.cnn.channels
    linear = lambda name, x: F.linear(x, w[name + ".weight"], w[name + ".bias"])
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    channels = torch.zeros(H * layer.cnn.channels, T, P, dtype=q.dtype)
    gates, rows = torch.zeros(H, T, 2, dtype=q.dtype), list(range(0, T, r))
    if c.causal:
        position = w["position"][:T]
        phi = lambda x: (x @ w["projection"]).clamp(min=0) + 1e-3
    else:
        position = torch.zeros(T, D, dtype=q.dtype)
        for i in range(T):
            x = i * (D - 1) / (T - 1) if T > 1 else 0.0
            for d in range(D):
                position[i, d] = max(0.0, 1 - abs(x - d))
        phi = lambda x: (x @ w["projection"] - x.square().sum(-1, keepdim=True) / 2)
    for h in range(H):
        q_feat, k_feat = phi(q[h] * D**-0.25), phi(k[h] * D**-0.25)
        if not c.causal:
            q_feat, k_feat = (q_feat - q_feat.amax(1, keepdim=True)).exp() + 1e-4, (k_feat - k_feat.max()).exp() + 1e-4
        for i in rows:
            keys = range(i + 1) if c.causal else range(T)
            weight = torch.stack([q_feat[i] @ k_feat[j] for j in keys])
            context = sum(a * torch.cat([position[j], v[h, j]]) for a, j in zip(weight, keys)) / weight.sum()
            z = F.gelu(norm("encoder.1", linear("encoder.0", torch.cat([context, v[h, i]]))))
            gates[h, i] = linear("gate", z).sigmoid()
            for n, part in enumerate(linear("decoder", z).split(P)):
                channels[h * layer.cnn.channels + n, i] = norm("cnn.norm", part) if c.causal else part

    def conv(name, image, n_rows, taps, step=1):
        """Every output row i from rows step*i + taps and three columns, a product at a time; zeros outside."""
        weight, spread = w[name + ".weight"], 2 if c.causal else 1
        out = w[name + ".bias"][:, None, None].repeat(1, n_rows, image.shape[2])
        for i, (n, dr), m, p in itertools.product(range(n_rows), enumerate(taps), range(weight.shape[3]), range(image.shape[2])):
            row, column = step * i + dr, p + spread * (m - weight.shape[3] // 2)
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                out[:, i, p] += weight[:, :, n, m] @ image[:, row, column]
        return out

    x = channels[:, ::r]
    R = x.shape[1]
    if c.causal:
        x = conv("cnn.conv1", x, R, (-4, -2, 0)).clamp(min=0)
        x = conv("cnn.conv2", x, R, (-4, -2, 0)).clamp(min=0)
        x, parts = conv("cnn.up", x, R, (0,)), 4
    else:
        x = conv("cnn.conv1", x, (R + 1) // 2, (-1, 0, 1), step=2).clamp(min=0)
        x = conv("cnn.conv2", x, (R + 1) // 2, (-1, 0, 1)).clamp(min=0)
        x, parts = conv("cnn.up", x.repeat_interleave(2, 1)[:, :R], R, (-1, 0, 1)), 2
    scores = torch.stack([x[h * parts + p % parts, :, p // parts] for h in range(H) for p in range(width)]).view(H, width, R).mT
    return (norm("cnn.norm_out", scores) if c.causal else scores), gates


def naive_layer(layer: SEAttention, q, k, v):
    """Sections 1 to 4 of the method for one sequence q (H, T, D), k, v (Hkv, T, D), a number at a time where it helps.

    Returns out (H, T, D) and, for each query, its row's scores (H, T, width).
    """
    c, w = layer.config, layer.state_dict()
    (H, T, D), r, width = q.shape, c.query_stride, c.width
    shares = c.has_bins and c.group == "kv" and len(k) < H
    q_choosing = q * w["head_share"][:, None, None] * (H // len(k)) if shares else q
    k, v = (x.repeat_interleave(H // len(x), 0) for x in (k, v))
    rows = list(range(0, T, r))
    if c.cnn:
        scores, gates = naive_cnn(layer, q, k, v)
    else:
        scores, gates = torch.zeros(H, len(rows), width, dtype=q.dtype), w["gates"].sigmoid()[:, None].expand(H, T, 2)
    if c.cell_keys:
        sharing = 1 if c.cnn else H // c.n_kv_head
        for h, (n, i) in itertools.product(range(H), enumerate(rows)):
            in_cells = max(0, i + 1 - c.local) // c.bin * c.bin if c.bin else i + 1
            mean_q = (q if c.cnn else q_choosing)[h // sharing * sharing :][:sharing, i].mean(0)
            if c.causal:
                products = key_products(D**-0.5 * mean_q, k[h], i + 1, width, in_cells, c.has_bins)
            else:
                products = mean_key_products(D**-0.5 * mean_q, k[h], width)
            scores[h, n] += w["key_gain"][h // sharing] * products
    probs = scores.softmax(-1)
    row_seen = torch.tensor([[i + 1 if c.causal else T for i in rows]])
    if c.has_bins:
        chosen = brute_force_bins(probs, q_choosing * D**-0.5, k, c)
    else:
        mask = brute_force_topk(probs[None], row_seen, c.topk, c.group)[0]

    out = torch.zeros_like(q)
    for h, i in itertools.product(range(H), range(T)):
        t, row = (i + 1, i // r) if c.causal else (T, i)
        cell = [sea.cell_of_key(j, t, width) for j in range(t)]
        if c.has_bins:
            keys = [j for j in range(t) if j // c.bin in chosen[h, i]]
        else:
            keys = [j for j in range(t) if mask[h, row, cell[j]]]
        sparse = (k[h, keys] @ q[h, i] * D**-0.5).softmax(0) @ v[h, keys] if keys else torch.zeros_like(q[h, i])
        share = torch.ones(t, dtype=q.dtype) if c.causal else probs[h].mean(0)[cell]
        s_prob, s_mix = gates[h, i - i % r]
        out[h, i] = s_mix * s_prob * sparse + (1 - s_mix) * (share / share.sum()) @ v[h, :t]
    return out, scores[:, [i // r for i in range(T)]]


def box_product(q, k):
    """Half the mean product of q (D,) and keys k (n, D), half the largest of q and a key anywhere in their box."""
    corner = torch.where(q > 0, k.amax(0), k.amin(0))
    return (k @ q).mean() / 2 + corner @ q / 2


def brute_force_bins(probs, q, k, c: SEAConfig) -> dict[tuple[int, int], set[int]]:
    """(head, query) -> the bins attended to, of probs (H, R, width), q (H, T, D), already scaled, and k (H, T, D)."""
    (H, _, width), bin, stride, T, chosen = probs.shape, c.bin, c.query_stride, q.shape[1], {}
    sharing = H // c.n_kv_head if c.group == "kv" else 1
    first = -(-c.first // bin)
    # The last keys of a query that sees t keys: the average of a period, of whole strides and bins.
    last = [t - (t - (t - 1) % stride - c.local) // bin * bin for t in range(c.local + 99, c.local + 99 + bin * stride)]
    n_chosen = math.floor((c.topk - first * bin - sum(last) / len(last)) / bin)
    mean_probs = lambda x: torch.stack(x).softmax(-1).mean(0)
    for i in range(T):
        r, ranked = i // stride, []
        middle = max(0, r * stride + 1 - c.local) // bin  # of the row
        for h in range(0, H, sharing):
            heads = range(h, h + sharing)
            cell = [sea.cell_of_key(b, middle, width) for b in range(middle)]
            held = sorted(set(cell))
            if held:
                of_cells = mean_probs([probs[g, r, held].log() for g in heads])
                wanted = c.candidates * n_chosen
                n_cells = width if middle <= wanted else max(1, wanted // math.ceil(middle / width))
                best = {p for _, p in sorted(zip(-of_cells, held))[:n_cells]}
                candidates = [b for b in range(first, middle) if cell[b] in best]
                if candidates:
                    mean_q = q[heads, i].mean(0)
                    of_bins = torch.stack([box_product(mean_q, k[h, b * bin : b * bin + bin]) for b in candidates]).log_softmax(0)
                    ranked += [(-x.item(), h, b) for x, b in zip(of_bins, candidates)]
            for g in heads:
                chosen[g, i] = {b for b in range(i // bin + 1) if b < first or b >= middle}
        together = [ranked] if c.group == "causal_batch" else [[x for x in ranked if x[1] == h] for h in range(0, H, sharing)]
        for group in together:
            for _, h, b in sorted(group)[: n_chosen * (H if c.group == "causal_batch" else 1)]:
                for g in range(h, h + sharing):
                    chosen[g, i].add(b)
    return chosen


@settings(max_examples=60)
@given(cases(max_tokens=12, max_batch=1))
def test_a_layer_is_the_method_written_out(case):
    layer, (q, k, v) = case.layer(), case.qkv()
    result = layer(q, k, v)
    with torch.no_grad():
        out, scores = naive_layer(layer, q[0], k[0], v[0])
    torch.testing.assert_close(sea.repeat_heads(result.scores, len(scores))[0, :, result.row[0]], scores, **CLOSE)
    torch.testing.assert_close(result.out[0], out, **CLOSE)


def test_a_config_says_how_many_features_are_drawn_and_from_which_seed():
    layer = lambda **fields: SEAttention(SEAConfig(n_head=2, d_head=64, max_positions=4, **fields))
    for nbf, m in ((8, 33), (1, 266), (1000, 1), (2.5, 106)):
        assert layer(nbf=nbf).projection.shape == (64, m)
    expected = sea.orthogonal_features(64, 33, torch.Generator().manual_seed(5))
    assert torch.equal(layer(seed=5).projection, expected) and not torch.equal(layer().projection, expected)


def test_cell_keys_begin_with_a_gain_of_1():
    layer = SEAttention(SEAConfig(n_head=3, d_head=8))
    assert torch.equal(layer.key_gain, torch.ones(3))


def test_every_position_is_used_and_by_its_own_token():
    """Of max_positions tokens, the last has the last row of the table; one more is refused."""
    case = Case(True, 1, [6], 1, 2, 4, 8, 4, "query", 0)
    layer, qkv = case.layer(max_positions=6), case.qkv()
    assert len(layer.position) == 6
    before = layer(*qkv).scores
    layer.position.data[5] += 10
    after = layer(*qkv).scores
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.equal(before[:, :, 5], after[:, :, 5])
    with pytest.raises(ValueError, match="^k: expected at most max_positions = 6 tokens, padding included, got 7"):
        layer(*case.qkv(7))


def test_new_gates_are_open():
    layer = SEAttention(SEAConfig(n_head=2, d_head=8))
    result = layer.gate(torch.randn(5, 16)).sigmoid()
    assert (result > 0.95).all()


@given(cases(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_large_scores_stay_finite_in_half_precision(case, dtype):
    """Scores are fp32: those of q and k of size 200 are not finite in fp16, and have no digit after the point in bf16."""
    (q, k, v), seen = [x.to(dtype) for x in case.qkv()], seen_by(case)
    q, k = 200 * q, 200 * k
    mask = torch.ones(*q.shape[:3], case.width, dtype=torch.bool)
    out = sea.sparse_attention(q, k, v, mask, seen)
    expected = sea.sparse_attention(q.double(), k.double(), v.double(), mask, seen)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * (1 + v.abs().max().item()))


# -- 1. linear attention and its features ------------------------------------------------------------------------------


@given(causal_cases, st.integers(1, 9))
def test_chunked_linear_attention_is_quadratic(case, chunk):
    generator = torch.Generator().manual_seed(case.seed)
    rand = lambda h, n, e: torch.rand(2, h, n, e, generator=generator, dtype=torch.float64)
    H, n_keys = case.n_kv_head * case.heads_per_kv, case.tokens[0]
    n_rows = -(-n_keys // case.stride)
    q, k, v = rand(H, n_rows, 3), rand(case.n_kv_head, n_keys, 3), rand(case.n_kv_head, n_keys, 4)
    past = rand(case.n_kv_head, 3, 5)
    place = torch.stack([torch.randperm(n_keys, generator=generator)[:n_rows].sort().values for _ in range(2)])
    context, sums = sea.causal_linear_attention(q, k, v, past, place, chunk)
    weights = (q @ sea.repeat_heads(k, H).mT) * (torch.arange(n_keys) <= place[..., None])[:, None]
    total = weights @ sea.repeat_heads(F.pad(v, (0, 1), value=1.0), H) + q @ sea.repeat_heads(past, H)
    torch.testing.assert_close(context, total[..., :-1] / total[..., -1:], **CLOSE)
    torch.testing.assert_close(sums, past + k.mT @ F.pad(v, (0, 1), value=1.0), **CLOSE)


@given(cases())
def test_all_keys_linear_attention_is_the_last_causal_row(case):
    layer, (q, k, v) = replace(case, cnn=True).layer(), case.qkv()
    q_feat, k_feat = (sea.relu_features(x, layer.projection) for x in (q, k))
    place = torch.arange(q.shape[2]).expand(len(q), -1)
    causal, _ = sea.causal_linear_attention(q_feat, k_feat, v, v.new_zeros(*v.shape[:2], k_feat.shape[3], v.shape[3] + 1), place)
    full = sea.linear_attention(q_feat, k_feat, v)
    torch.testing.assert_close(full[:, :, -1], causal[:, :, -1], **CLOSE)


def test_softmax_features_approximate_softmax_attention():
    """FAVOR+ is unbiased: many features come close to exp(q k), and more come closer."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 50, 4, dtype=torch.float64) / 2 for _ in range(3))
    expected, keep = (q @ k.mT).softmax(-1) @ v, torch.ones(1, 1, 50, 1, dtype=torch.bool)
    errors = []
    for m in (16, 4096):
        w = sea.orthogonal_features(4, m, torch.Generator().manual_seed(0))
        c = sea.linear_attention(sea.softmax_features(q, w), sea.softmax_features(k, w, keep), v)
        errors.append((c - expected).abs().mean().item())
    assert errors[1] < 0.1 and errors[1] < errors[0] / 2


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_features_are_orthogonal_in_blocks(d, m, seed):
    w = sea.orthogonal_features(d, m, torch.Generator().manual_seed(seed))
    assert w.shape == (d, m)
    gram = (w / w.norm(dim=0)).T @ (w / w.norm(dim=0))
    for i in range(0, m, d):
        block = gram[i : i + d, i : i + d]
        torch.testing.assert_close(block, torch.eye(len(block)), rtol=0, atol=1e-5)


def test_redrawn_features_differ_and_follow_the_seed():
    layer = SEAttention(SEAConfig(n_head=2, d_head=8))
    first = layer.projection.clone()
    layer.redraw_features(torch.Generator().manual_seed(7))
    second = layer.projection.clone()
    layer.redraw_features(torch.Generator().manual_seed(7))
    assert not torch.equal(first, second) and torch.equal(second, layer.projection)
    assert "projection" in layer.state_dict() and not layer.projection.requires_grad


@given(st.integers(1, 30), st.integers(2, 9))
def test_interpolated_identity_is_linear_interpolation(t, d):
    """Row r of t sits at x = r*(D-1)/(t-1): weight 1-frac at floor(x), frac at floor(x)+1."""
    rows = sea.interpolated_identity(torch.tensor([t]), t, d)[0]
    for r in range(t):
        x = r * (d - 1) / (t - 1) if t > 1 else 0.0
        expected = torch.zeros(d + 1, dtype=torch.float64)
        expected[math.floor(x)], expected[math.floor(x) + 1] = 1 - x % 1, x % 1
        torch.testing.assert_close(rows[r], expected[:d], **CLOSE)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99), st.booleans(), st.booleans())
def test_cell_keys_are_products_with_mean_keys_or_half_with_bounds(T, width, seed, half, bounds):
    """half: of the keys that a query sees are in cells."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, h, T, 3, generator=generator, dtype=torch.float64) for h in (2, 1))
    q = q * torch.rand(T, 1, generator=generator) ** 2 * 40  # some rows reach the limit
    scores, gain = torch.randn(1, 2, T, width, generator=generator, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)
    none, all_new, past = torch.tensor([0]), torch.tensor([T]), torch.zeros(1, 1, 2 * width, 9 if bounds else 3, dtype=torch.float64)
    seen = torch.arange(1, T + 1)[None]
    got, _ = sea.add_cell_keys(scores, gain, q, k, seen, 0.7, none, all_new, past, seen // 2 if half else None, bounds=bounds)
    for t in range(1, T + 1):
        expected = gain[:, None] * key_products(0.7 * q[0, :, t - 1], k[0, 0], t, width, t // 2 if half else t, bounds)
        torch.testing.assert_close(got[0, :, t - 1] - scores[0, :, t - 1], expected)


def mean_key_inputs(tokens: list[int], width: int, seed: int):
    """scores (B, 4, T, width), q (B, 4, T, 3), k (B, 2, T, 3), 0 where padded, gain (4,) and n_new of add_mean_keys."""
    generator, B, T = torch.Generator().manual_seed(seed), len(tokens), max(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    n_new = torch.tensor(tokens)
    q, k = (x * sea.is_token(x, n_new) for x in (draw(B, 4, T, 3) * draw(B, 1, T, 1).exp() * 5, draw(B, 2, T, 3)))
    return draw(B, 4, T, width), draw(4), q, k, n_new


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any), st.integers(1, 24), st.integers(0, 99))
@example([7, 3], 24, 0)  # cells narrower than a key
@example([40, 31], 6, 0)  # wider
def test_bidirectional_cell_keys_are_products_with_the_mean_key_of_each_cell(tokens, width, seed):
    """Of each sequence's own keys, whatever its length; a sequence without any gets nothing."""
    scores, gain, q, k, n_new = mean_key_inputs(tokens, width, seed)
    added = sea.add_mean_keys(scores, gain, q, k, n_new, 0.7) - scores
    for b, n in enumerate(tokens):
        assert not added[b, :, n:].any()
        for h, i in itertools.product(range(4), range(n)):
            expected = gain[h] * mean_key_products(0.7 * q[b, h, i], k[b, h // 2, :n], width)
            torch.testing.assert_close(added[b, h, i], expected, **CLOSE)


@given(st.integers(1, 40), st.integers(1, 24), st.integers(0, 99))
def test_bidirectional_cell_keys_teach_their_gain_alone(T, width, seed):
    scores, gain, q, k, n_new = (x.requires_grad_(x.is_floating_point()) for x in mean_key_inputs([T], width, seed))
    got = sea.add_mean_keys(scores, gain, q, k, n_new, 1.0)
    of_out = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    of_scores, of_gain, *others = torch.autograd.grad(got, (scores, gain, q, k), of_out, allow_unused=True)
    assert torch.equal(of_scores, of_out) and others == [None, None]
    products = sea.add_mean_keys(scores, torch.ones_like(gain), q, k, n_new, 1.0) - scores
    torch.testing.assert_close(of_gain, (products * of_out).sum((0, 2, 3)), **CLOSE)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(st.integers(1, 99), st.integers(1, 24), st.integers(0, 99))
def test_bidirectional_cell_keys_are_rounded_once_in_half_precision(dtype, autocast, T, width, seed):
    """Their means and products are fp32, also of large ones that differ little."""
    *inputs, n_new = mean_key_inputs([T], width, seed)
    scores, gain, q, k = (x.to(dtype) for x in inputs)
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = sea.add_mean_keys(scores, gain, q + 100, k, n_new, 0.7)
    expected = sea.add_mean_keys(*(x.double() for x in (scores, gain, q + 100, k)), n_new, 0.7)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


# -- 2. grouped top-k --------------------------------------------------------------------------------------------------


def brute_force_topk(probs, seen, topk, group):
    """Section 2 of the method, one comparison at a time."""
    B, H, T, width = probs.shape
    rounded = lambda a, b: (2 * a + b) // (2 * b)
    keep = torch.zeros(probs.shape, dtype=torch.bool)

    def rank(b, cells, n):
        best = sorted(cells, key=lambda c: (-probs[(b, *c)].item(), c))  # ties to the lower (head, row, cell)
        for c in best[: min(max(n, 1), len(cells))]:
            keep[(b, *c)] = True

    for b in range(B):
        rows = [i for i in range(T) if seen[b, i] > 0]
        if group == "causal_batch":
            for i in rows:
                rank(b, [(h, i, p) for h in range(H) for p in range(width)], rounded(H * topk * width, seen[b, i].item()))
        if group == "query":
            for h, i in itertools.product(range(H), rows):
                rank(b, [(h, i, p) for p in range(width)], rounded(topk * width, seen[b, i].item()))
        if group == "head" and rows:
            for h in range(H):
                rank(b, [(h, i, p) for i in rows for p in range(width)], topk * width)
        if group == "batch" and rows:
            rank(b, [(h, i, p) for h in range(H) for i in rows for p in range(width)], H * topk * width)
    return keep


@given(cases(bins=False, max_tokens=7), st.integers(1, 4))
def test_topk_is_brute_force_ties_included(case, levels):
    """Probabilities of few levels tie often."""
    torch.manual_seed(case.seed)
    H = case.n_kv_head * case.heads_per_kv
    probs = torch.randint(levels, (len(case.tokens), H, max(case.tokens), case.width)).double() / levels
    seen = seen_by(case) * (1 + case.seed % 7 if case.causal else 1)  # budgets of long sequences too
    mask = sea.topk_mask(probs, seen, case.topk, case.group)
    assert torch.equal(mask, brute_force_topk(probs, seen, case.topk, case.group))


@pytest.mark.parametrize("group", [name for name, group in sea.GROUPS.items() if not group.shared])
def test_budget_is_topk_keys_per_query_and_head(group):
    """Within 2 % once t is large. (One head and query alone rounds to whole cells: here topk is a whole number of them.)"""
    torch.manual_seed(0)
    H, width, topk = 8, 64, 100
    for t in (800, 1600):
        T = t if group in ("head", "batch") else 100  # those two rank all t rows of a sequence
        seen = torch.full((1, T), t)
        mask = sea.topk_mask(torch.randn(1, H, T, width).softmax(-1), seen, topk, group)
        keys = (mask * sea.keys_per_cell(seen, width)[:, None]).sum(-1).float().mean().item()
        assert abs(keys / topk - 1) <= 0.02


@given(st.sampled_from(["kv", "query", "causal_batch"]), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9),
       st.integers(0, 30))
@example("kv", 1, 64, 16, 4, 0)  # 64 queries have the candidates of a row, and their own last keys
@example("query", 8, 8, 10, 0, 0)  # at a row's first query, bins are always as full
def test_budget_with_bins_is_at_most_topk_keys(group, bin, stride, local, first, more):
    """On average over many queries of a long text, and less than a bin below."""
    config = dict(n_head=2, n_kv_head=1, d_head=2, width=8, group=group, bin=bin, query_stride=stride, local=local, first=first, cnn=False)
    least = next(n for n in itertools.count(1) if is_config(topk=n, **config))
    layer, T = SEAttention(SEAConfig(topk=least + more, **config)), 300 + 2 * bin * stride
    qkv = (torch.randn(1, h, T, 2, generator=torch.Generator().manual_seed(0)) for h in (2, 1, 1))
    keys = layer(*qkv).attended(T)[:, :, -bin * stride :].sum(-1).double().mean().item()
    assert least + more - bin - 1 < keys <= least + more


def is_config(**options) -> bool:
    try:
        return bool(SEAConfig(**options))
    except ValueError:
        return False


@pytest.mark.parametrize("kind", [SEAttention, WindowAttention])
def test_a_huge_topk_with_bins_is_dense_and_lists_no_more_bins_than_there_are(kind):
    case = Case(True, 1, [20], 1, 2, 4, 8, 99, "kv", 0, cell_keys=True, bin=3, local=4, first=2)
    q, k, v = case.qkv()
    for change in (dict(topk=10**12), dict(topk=10**15), dict(topk=10**12, local=10**9), dict(candidates=10**30)):
        result = open_gates(case.layer(**change))(q, k, v) if kind is SEAttention else case.layer(kind, **change)(q, k, v)
        assert result.bins.shape[-1] <= 99 // 3
        torch.testing.assert_close(result.out, dense_attention(q, k, v, seen_by(case)), **CLOSE)


@pytest.mark.parametrize("group", [name for name, group in sea.GROUPS.items() if not group.shared])
def test_a_huge_topk_keeps_everything(group):
    seen = torch.tensor([[0, 1, 7, 10**9]])
    mask = sea.topk_mask(torch.rand(1, 2, 4, 5), seen, 2**62, group)
    assert torch.equal(mask, (seen > 0)[:, None, :, None].expand(1, 2, 4, 5))


@given(cases(bins=False))
def test_early_queries_keep_every_cell(case):
    case = replace(case, group="query")
    torch.manual_seed(case.seed)
    probs = torch.rand(1, case.n_kv_head, case.topk, case.width)
    assert sea.topk_mask(probs, torch.arange(1, case.topk + 1)[None], case.topk, "query").all()


@given(causal_cases, st.integers(1, 30))
def test_topk_of_a_call_overrides_the_config(case, topk):
    layer, (q, k, v) = case.layer(), case.qkv()
    topk += case.least - 1
    other = SEAttention(case.config(topk=topk)).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(q, k, v, topk=topk).out, other(q, k, v).out)


@given(causal_cases)
def test_queries_between_rows_reuse_the_row_before(case):
    layer, (q, k, v) = case.layer(), case.qkv()
    result = layer(q, k, v)
    for i in range(q.shape[2]):
        if result.bins is None:
            assert torch.equal(result.mask[:, :, i], result.mask[:, :, i - i % case.stride])
        assert torch.equal(result.probs[:, :, i], result.probs[:, :, i - i % case.stride])
    assert result.scores.shape[2] == -(-q.shape[2] // case.stride)


# -- 3. cells and keys -------------------------------------------------------------------------------------------------


@given(st.integers(1, 2**21), st.integers(1, 2048), st.data())
def test_cells_partition_the_keys(seen, width, data):
    p = data.draw(st.integers(0, width - 1))
    lo, hi = (sea.first_key_of_cell(x, seen, width) for x in (p, p + 1))
    assert sea.first_key_of_cell(0, seen, width) == 0 and sea.first_key_of_cell(width, seen, width) == seen
    assert 0 <= lo <= hi <= seen
    for j in {lo, hi - 1} if lo < hi else ():
        assert sea.cell_of_key(j, seen, width) == p
    j = data.draw(st.integers(0, seen - 1))
    cell = sea.cell_of_key(torch.tensor(j, dtype=torch.int32), torch.tensor(seen, dtype=torch.int32), width)
    assert cell == sea.cell_of_key(j, seen, width)  # int32 input does not overflow
    assert sea.first_key_of_cell(cell, seen, width) <= j < sea.first_key_of_cell(cell + 1, seen, width)


@given(st.integers(1, 2048), st.integers(1, 512))
def test_cells_agree_with_the_papers_float_formula(seen, width):
    j = torch.arange(seen)
    assert torch.equal(sea.cell_of_key(j, seen, width), ((j + 0.5).double() / seen * width - 1e-4).floor().long())


@given(cases(bins=False, max_tokens=40))
def test_expand_mask_is_cell_of_key(case):
    torch.manual_seed(case.seed)
    seen = seen_by(case)
    mask = torch.rand(len(seen), 2, seen.shape[1], case.width) < 0.4
    expanded = sea.expand_mask(mask, seen, seen.shape[1] + 3)
    for b, i, j in itertools.product(*map(range, (len(seen), seen.shape[1], seen.shape[1] + 3))):
        t = seen[b, i].item()
        expected = mask[b, :, i, sea.cell_of_key(j, t, case.width)] if j < t else torch.zeros(2, dtype=torch.bool)
        assert torch.equal(expanded[b, :, i, j], expected)
    assert torch.equal(expanded.sum(-1), (mask * sea.keys_per_cell(seen, case.width)[:, None]).sum(-1))


# -- 4. sparse attention -----------------------------------------------------------------------------------------------


@given(cases(bins=False, max_tokens=12), st.floats(0, 1), st.integers(1, 13))
def test_sparse_attention_is_softmax_over_the_keys_kept(case, density, block):
    """Key by key; a query whose cells hold no key gives zeros; blocks of queries change nothing."""
    torch.manual_seed(case.seed)
    (q, k, v), seen = case.qkv(), seen_by(case)
    mask = torch.rand(*q.shape[:3], case.width) < density
    out = sea.sparse_attention(q, k, v, mask, seen, block=block)
    keep = sea.expand_mask(mask, seen, k.shape[2])
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = keep[b, h, i].nonzero().flatten()
        kv = h // case.heads_per_kv
        expected = torch.zeros(case.d_head, dtype=torch.float64)
        if len(keys):
            expected = (k[b, kv, keys] @ q[b, h, i] * case.d_head**-0.5).softmax(0) @ v[b, kv, keys]
        torch.testing.assert_close(out[b, h, i], expected, **CLOSE)


@given(cases(bins=False), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1, 7, 1000]))
def test_attention_csr_is_the_sparse_attention_exactly(case, density, block):
    """Rows sum to 1, or 0 where a query has no key; times v it is the context; only kept keys are stored."""
    q, k, v = case.qkv()
    seen, R = seen_by(case), -(-q.shape[2] // case.stride)
    mask = torch.rand(*q.shape[:2], R, case.width, generator=torch.Generator().manual_seed(case.seed)) < density
    row = (torch.arange(q.shape[2]) // case.stride).expand(len(q), -1)
    expanded = sea.take(mask, row)
    keep = sea.expand_mask(expanded, seen, k.shape[2])
    sparse = attention_csr(q, k, sea.SEAOutput(q, seen, None, cells=mask, row=row), block=block)
    dense = sea.attention_weights(q, k, keep)
    out = sea.sparse_attention(q, k, v, mask, seen, row=row)
    n_key = keep.sum(-1)
    for b, h in ((b, h) for b in range(len(q)) for h in range(q.shape[1])):
        matrix = sparse[b][h]
        assert matrix.layout == torch.sparse_csr and torch.equal(matrix.crow_indices().diff(), n_key[b, h])
        torch.testing.assert_close(matrix.to_dense(), dense[b, h], **CLOSE)
        torch.testing.assert_close(matrix @ v[b, h // case.heads_per_kv], out[b, h], **CLOSE)
        torch.testing.assert_close(dense[b, h].sum(-1), (n_key[b, h] > 0).double(), **CLOSE)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_attention_weights_are_the_same_under_autocast(case, dtype):
    (q, k, _), seen = [x.to(dtype) for x in case.qkv()], seen_by(case)
    mask = torch.ones(*q.shape[:3], case.width, dtype=torch.bool)
    keep = sea.expand_mask(mask, seen, k.shape[2])
    expected = sea.attention_weights(q, k, keep)
    with torch.autocast("cpu", torch.bfloat16):
        weights = sea.attention_weights(q, k, keep)
    assert weights.dtype == torch.float32 and torch.equal(weights, expected)


@given(cases())
def test_an_empty_row_gives_zeros(case):
    (q, k, v), seen = case.qkv(), seen_by(case)
    for x in (q, k, v):
        x.requires_grad_()
    out = sea.sparse_attention(q, k, v, torch.zeros(*q.shape[:3], case.width, dtype=torch.bool), seen)
    out.sum().backward()
    assert not out.any() and not any(x.grad.any() for x in (q, k, v))


# -- gradients ---------------------------------------------------------------------------------------------------------


@given(cases(max_tokens=6, max_batch=1))
def test_gradients_of_sparse_attention(case):
    torch.manual_seed(case.seed)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    mask = torch.rand(*q.shape[:3], case.width) < 0.5
    assert torch.autograd.gradcheck(lambda *x: sea.sparse_attention(*x, mask, seen_by(case)), (q, k, v))


def test_gradients_of_a_layer():
    """Through the estimator, the gates and the average, causal and not, at a point where no choice of cells is close."""
    for causal, stride in ((True, 1), (True, 2), (False, 1)):
        case = Case(causal, stride, [5], 1, 2, 2, 4, 2, "query", seed=1)
        layer = case.layer()
        q, k, v = (x.requires_grad_() for x in case.qkv())

        def outputs(q, k, v, *parameters):
            result = torch.func.functional_call(layer, dict(zip(names, parameters)), (q, k, v))
            return result.out, result.scores

        names, parameters = zip(*layer.named_parameters())
        assert torch.autograd.gradcheck(outputs, (q, k, v, *parameters))


# -- 6. distillation ---------------------------------------------------------------------------------------------------


def dense_kl_mse(teacher, student, seen, n_keys, kl_weight=0.1):
    """0.1 * KL(A || a) + MSE(a, A) from dense (B, H, T, S) probabilities, over the queries that see a key."""
    there = (seen > 0)[:, None, :].expand(teacher.shape[:3])
    kl = torch.where(teacher > 0, teacher * (teacher.clamp(min=1e-300).log() - student.clamp(min=1e-300).log()), 0).sum(-1)
    return ((kl_weight * kl + (student - teacher).square().sum(-1) / n_keys)[there]).mean()


def dense_probs(q, k, seen):
    visible = torch.arange(k.shape[2]) < seen[:, None, :, None]
    scores = q @ sea.repeat_heads(k, q.shape[1]).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()


@given(cases(), st.integers(1, 21), st.integers(0, 3))
def test_estimate_loss_is_the_dense_loss(case, block, extra_keys):
    """Value and gradient, without a T x S tensor, also where cells hold no key or queries share rows."""
    (q, k, _), seen = case.qkv(), seen_by(case)
    k = F.pad(k, (0, 0, 0, extra_keys))
    T = q.shape[2]
    row = (torch.arange(T) // case.stride).expand(len(q), T)
    scores = 3 * torch.randn(len(q), q.shape[1], row.max() + 1, case.width, dtype=torch.float64)
    scores.requires_grad_()
    pooled = sea.pool_attention(q, k, seen, case.width, block=block)
    loss = sea.estimate_loss(scores, pooled, seen, row=row)
    to_keys = sea.spread_to_keys(scores[:, :, row[0]], seen, k.shape[2], -torch.inf)
    expected = dense_kl_mse(dense_probs(q, k, seen), to_keys.softmax(-1).nan_to_num(), seen, k.shape[2])
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (loss, expected)), **CLOSE)


@pytest.mark.parametrize("argument, change", [
    ("scores", dict(scores=torch.zeros(1, 3, 8, 5))), ("scores", dict(scores=torch.zeros(1, 2, 4, 5))),
    ("row", dict(scores=torch.zeros(1, 2, 4, 5), row=torch.zeros(1, 7).long())), ("in_cells", dict(in_cells=torch.ones(1, 7))),
])
def test_what_does_not_fit_pooled_attention_is_named(argument, change):
    pooled = sea.pool_attention(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), torch.ones(1, 8).long(), 5)
    fits = dict(scores=torch.zeros(1, 2, 8, 5), pooled=pooled, in_cells=torch.ones(1, 8).long())
    with pytest.raises(ValueError, match=f"^{argument}: expected shape .*, got "):
        sea.estimate_loss(**{**fits, **change})


@pytest.mark.parametrize("argument", ["seen", "row", "order"])
def test_places_that_do_not_fit_keys_and_queries_are_named(argument):
    q, k = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 8, 4)
    places = dict(seen=torch.ones(1, 8).long(), row=torch.zeros(1, 8).long(), order=torch.arange(8)[None])
    places[argument] = torch.zeros(1, 7).long()
    with pytest.raises(ValueError, match=f"^{argument}: expected shape .* = .1, 8., got .1, 7."):
        sea.sparse_attention(q, k, k, torch.ones(1, 2, 8, 5).bool(), **places)
    if places.pop("row").shape == (1, 8):
        with pytest.raises(ValueError, match=f"^{argument}: expected shape .* = .1, 8., got .1, 7."):
            sea.bin_attention(q, k, k, torch.zeros(1, 2, 8, 1).int(), **places, bin=8)


@given(cases())
def test_pooled_attention_is_the_sum_over_each_cell(case):
    (q, k, _), seen = case.qkv(), seen_by(case)
    pooled, a = sea.pool_attention(q, k, seen, case.width), dense_probs(q, k, seen)
    for p in range(case.width):
        only_p = torch.zeros(*q.shape[:3], case.width, dtype=torch.bool)
        only_p[..., p] = True
        torch.testing.assert_close(pooled.cells[..., p], (a * sea.expand_mask(only_p, seen, k.shape[2])).sum(-1), **CLOSE)


@given(cases(), st.integers(1, 21))
def test_score_loss_is_the_dense_loss(case, block):
    (q, k, _), (teacher_q, teacher_k, _) = case.qkv(), replace(case, seed=case.seed + 1).qkv()
    seen = seen_by(case)
    q.requires_grad_(), k.requires_grad_()
    loss = sea.score_loss(q, k, teacher_q, teacher_k, seen, block=block)
    expected = dense_kl_mse(dense_probs(teacher_q, teacher_k, seen), dense_probs(q, k, seen), seen, k.shape[2])
    torch.testing.assert_close(loss, expected, **CLOSE)
    for x in (q, k):
        torch.testing.assert_close(*(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected)), **CLOSE)


@given(cases())
def test_a_perfect_student_has_no_loss(case):
    (q, k, _), seen = case.qkv(), seen_by(case)
    assert abs(sea.score_loss(q, k, q, k, seen).item()) < 1e-12


@given(cases(causal=st.just(True)).filter(lambda case: case.bin), st.integers(1, 30))
@settings(max_examples=40)
def test_the_loss_of_a_choice_is_the_attention_of_its_mean_query_against_the_teachers(case, n_queries):
    """Query by query, over the keys that a layer's cells share out at stride 1 but the first; it trains the shares alone."""
    config, (q, k, v) = case.config(), case.qkv()
    in_cells = replace(case, stride=1).layer()(q, k, v).in_cells.tolist()
    teacher_q, teacher_k = (x.detach() + torch.randn_like(x) for x in (q, k))
    share = torch.rand(config.n_head, dtype=torch.float64).requires_grad_()
    q.requires_grad_(), k.requires_grad_()
    loss = sea.choice_loss(share, q, k, teacher_q, teacher_k, config, 0.7, 0.3, n_queries=n_queries)
    (B, H, T, _), C, bin, expected = q.shape, config.n_choosers, config.bin, []
    for i, b, c in itertools.product(range(T - 1, -1, -max(T // n_queries, 1)), range(B), range(C)):
        heads, keys = range(c * H // C, (c + 1) * H // C), slice(-(-config.first // bin) * bin, in_cells[b][i])
        kv = [g * k.shape[1] // H for g in heads]
        a = torch.stack([(0.3 * teacher_k[b, n, : i + 1] @ teacher_q[b, g, i]).softmax(0) for g, n in zip(heads, kv)]).mean(0)[keys]
        p = (0.7 * k[b, kv[0], keys] @ sum(share[g] * q[b, g, i] for g in heads)).softmax(0)
        expected.append((a * ((a / a.sum()).log() - p.log())).sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean(), **CLOSE)
    of_share, *others = torch.autograd.grad(loss, (share, q, k), allow_unused=True)
    assert of_share.isfinite().all() and others == [None, None]


def test_a_choice_that_attends_as_the_teacher_does_has_no_loss():
    case = Case(True, 1, [30], 3, 1, 4, 8, 9, "query", 0, bin=3, local=2)
    q, k, _ = case.qkv()
    share = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = sea.choice_loss(share, q, k, q, k, case.config(), 0.5, 0.5)
    assert abs(loss.item()) < 1e-12 and torch.autograd.grad(loss, share)[0].abs().max() < 1e-12
    assert sea.choice_loss(share, q[:0], k[:0], q[:0], k[:0], case.config(), 0.5, 0.5) == 0
    assert sea.choice_loss(2 * share, q, k, q, k, case.config(), 0.5, 0.5) > 0.001


# -- the public face ---------------------------------------------------------------------------------------------------


def test_import_needs_torch_and_einops_only():
    code = "import sys; before = set(sys.modules); import torch, einops; base = set(sys.modules); import sea; " \
           "print(*sorted({m.split('.')[0] for m in set(sys.modules) - base} - set(sys.stdlib_module_names)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {"sea", "torch", "einops"}


@pytest.mark.parametrize("layer", [SEAttention, PerformerAttention, ReformerAttention])
def test_a_layer_without_memory_has_the_shapes_of_one_with(layer, monkeypatch):
    """On the meta device nothing is drawn, so that a layer of any size can be looked at."""
    shapes = {name: x.shape for name, x in layer(SEAConfig(n_head=2, d_head=8)).state_dict().items()}
    for module in sys.modules[layer.__module__], sea:
        monkeypatch.setattr(module, "orthogonal_features", lambda *_: pytest.fail("drew features"))
    with torch.device("meta"):
        assert shapes == {name: x.shape for name, x in layer(SEAConfig(n_head=2, d_head=8)).state_dict().items()}


GOOD = dict(n_head=4, n_kv_head=2, d_head=8, width=8, topk=2, max_positions=16, bin=0)
BINS = dict(bin=4, local=3, first=5, topk=13)


@pytest.mark.parametrize("change, argument, expected, got", [
    (dict(width=0), "width", ">= 1", "0"),
    (dict(topk=0), "topk", ">= 1", "0"),
    (dict(topk=1.5), "topk", "integer", "1.5"),
    (dict(n_kv_head=3), "n_kv_head", "divisor of n_head = 4", "3"),
    (dict(n_head=0), "n_head", ">= 1", "0"),
    (dict(group="rows"), "group", "causal_batch", "rows"),
    (dict(group=["query"]), "group", "causal_batch", "query"),
    (dict(group="batch"), "group", "when causal", "batch"),
    (dict(query_stride=2, causal=False), "query_stride", "1 unless causal", "2"),
    (dict(nbf=0), "nbf", "> 0", "0"),
    (dict(nbf="8"), "nbf", "number", "'8'"),
    (dict(nbf=math.inf), "nbf", "number", "inf"),
    (dict(width=True), "width", "integer", "True"),
    (dict(width=None), "width", "integer", "None"),
    (dict(n_kv_head=True), "n_kv_head", "divisor", "True"),
    (dict(causal=1), "causal", "True or False", "1"),
    (dict(cell_keys=None), "cell_keys", "True or False", "None"),
    (dict(cnn=False, cell_keys=False), "cnn", "with cell_keys", "False"),
    (dict(cnn=False, causal=False), "cnn", "unless causal", "False"),
    (dict(seed="0"), "seed", "integer", "'0'"),
    (dict(seed=2**64), "seed", "64 bits", str(2**64)),
    (dict(bin=-1), "bin", ">= 0", "-1"),
    (dict(bin=2.0), "bin", ">= 0", "2.0"),
    (BINS | dict(local=0), "local", ">= 1", "0"),
    (BINS | dict(first="4"), "first", ">= 0", "'4'"),
    (BINS | dict(candidates=0), "candidates", ">= 1", "0"),
    (BINS | dict(topk=12), "topk", "at least 13, since on average as many first and last keys", "12"),
    (dict(group="kv"), "bin", "bins for group kv", "0"),
    (dict(group="kv", causal=False), "group", "cells when bidirectional", "'kv'"),
])
def test_bad_config_names_the_argument(change, argument, expected, got):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*") as error:
        SEAConfig(**{**GOOD, **change})
    left, right = str(error.value).split(", got ")
    assert expected in left and got in right


@pytest.mark.parametrize("argument, expected, got, call", [
    ("q", "4 heads", "2", lambda a, q, k, v: a(q[:, :2], k, v)),
    ("q", "head size 8", "4", lambda a, q, k, v: a(q[..., :4], k[..., :4], v[..., :4])),
    ("q", "(B, heads, tokens, D)", "(4, 6, 8)", lambda a, q, k, v: a(q[0], k, v)),
    ("q", "at least one head, token and dimension", "(2, 4, 0, 8)", lambda a, q, k, v: a(q[:, :, :0], k, v)),
    ("k", "at least one head, token and dimension", "(2, 0, 6, 8)", lambda a, q, k, v: a(q, k[:, :0], v[:, :0])),
    ("q", "at least one head, token and dimension", "(2, 4, 6, 0)", lambda a, q, k, v: sea.sparse_attention(
        q[..., :0], k[..., :0], v[..., :0], torch.ones(2, 4, 6, 4, dtype=torch.bool), torch.ones(2, 6).long())),
    ("q", "floating-point", "int64", lambda a, q, k, v: a(q.long(), k, v)),
    ("k", "float32 as q", "float64", lambda a, q, k, v: a(q, k.double(), v)),
    ("k", "2 key/value heads", "1", lambda a, q, k, v: a(q, k[:, :1], v[:, :1])),
    ("k", "batch of 2", "1", lambda a, q, k, v: a(q, k[:1], v[:1])),
    ("v", "as k", "(2, 2, 5, 8)", lambda a, q, k, v: a(q, k, v[:, :, 1:])),
    ("k", "the 5 tokens of q", "6", lambda a, q, k, v: a(q[:, :, 1:], k, v)),
    ("state", "state of the 1 tokens before", "None", lambda a, q, k, v: a(q[:, :, 1:], k, v, kv_cached=True)),
    ("state", "of query_stride 4", "1", lambda a, q, k, v: SEAttention(replace(a.config, query_stride=4))(
        q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state=a(*(x[:, :, :5] for x in (q, k, v))).state)),
    ("other", "last_scores of shape (2, 4, 1, 8)", "(2, 4, 0, 8)", torch.no_grad()(lambda a, q, k, v: a(
        q[:, :, 5:], k, v, kv_cached=True, in_place=True, state=SEAttention(replace(a.config, query_stride=4))(
            *(x[:, :, :5] for x in (q, k, v)), kv_cached=True).state))),
    ("state", "the same options, key_sums of size (2, 0, 8)", "(2, 16, 8)", lambda a, q, k, v: SEAttention(replace(
        a.config, cell_keys=False))(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state=a(*(x[:, :, :5] for x in (q, k, v))).state)),
    ("state", "the same options, conv_rows of size (8, 4)", "(4, 4)", lambda a, q, k, v: a(
        q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state=SEAttention(replace(a.config, n_head=2))(q[:, :2, :5], k[:, :, :5], v[:, :, :5]).state)),
    ("documents", "at least one sequence", "0", lambda a, q, k, v: sea.in_documents(a, torch.zeros(0, 6).long(), q[:0], k[:0], v[:0])),
    ("result", "one with cells or bins", "documents", lambda a, q, k, v: sea.in_documents(a, torch.zeros(2, 6).long(), q, k, v).attended(6)),
    ("valid", "bool", "torch.int64", lambda a, q, k, v: a(q, k, v, valid=torch.ones(2, 6, dtype=torch.long))),
    ("valid", "(2, 6)", "(2, 5)", lambda a, q, k, v: a(q, k, v, valid=torch.ones(2, 5, dtype=torch.bool))),
    ("topk", ">= 1", "0", lambda a, q, k, v: a(q, k, v, topk=0)),
    ("rows_at_once", ">= 1", "0", lambda a, q, k, v: a(q, k, v, rows_at_once=0)),
    ("rows_at_once", ">= 1", "True", lambda a, q, k, v: a(q, k, v, rows_at_once=True)),
    ("state", "to overwrite, with in_place", "None", torch.no_grad()(lambda a, q, k, v: a(q, k, v, kv_cached=True, in_place=True))),
    ("state", "without a KV cache, with in_place", "its own", torch.no_grad()(lambda a, q, k, v: a(
        q[:, :, 5:], k, v, kv_cached=True, in_place=True, state=a(*(x[:, :, :5] for x in (q, k, v))).state))),
    ("kv_cached", "True with in_place", "False", torch.no_grad()(lambda a, q, k, v: a(q, k, v, state=a(q, k, v).state, in_place=True))),
    ("rows_at_once", "None with in_place", "3", torch.no_grad()(lambda a, q, k, v: a(
        q[:, :, 5:], k, v, kv_cached=True, in_place=True, rows_at_once=3, state=a(*(x[:, :, :5] for x in (q, k, v)), kv_cached=True).state))),
    ("in_place", "False unless under torch.no_grad()", "True", lambda a, q, k, v: a(
        q[:, :, 5:], k, v, kv_cached=True, in_place=True, state=a(*(x[:, :, :5] for x in (q, k, v)), kv_cached=True).state)),
    ("result", "one with cells or bins", "in chunks", lambda a, q, k, v: a(q, k, v, rows_at_once=3).attended(6)),
    ("result", "one with cells or bins", "in chunks", lambda a, q, k, v: a(q, k, v, rows_at_once=3).n_attended()),
    ("state", "the caller keeps", "its own", lambda a, q, k, v: a(q, k, v).state.copy_(a(q, k, v).state)),
    ("other", "count of shape (2,)", "(1,)", lambda a, q, k, v: a(q, k, v, kv_cached=True).state.copy_(
        a(q[:1], k[:1], v[:1], kv_cached=True).state)),
    ("k", "6 tokens of the state and 1 of q", "6",
     lambda a, q, k, v: a(q[:, :, :1], k, v, state=a(q, k, v).state, kv_cached=True)),
    ("k", "max_positions = 16", "18", lambda a, q, k, v: a(*(x.repeat(1, 1, 3, 1) for x in (q, k, v)))),
    ("k", "max_positions = 16", "18", lambda a, q, k, v: a(q, k, v, state=a(q, k, v, state=a(q, k, v).state).state)),
    ("state", "batch of 1", "(2,)", lambda a, q, k, v: a(q[:1], k[:1], v[:1], state=a(q, k, v).state)),
    ("state", "the same options, key_sums of size (2, 16, 8)", "(2, 10, 8)",
     lambda a, q, k, v: a(q, k, v, state=SEAttention(SEAConfig(**{**GOOD, "width": 5}))(q, k, v).state)),
    ("state", "carries the KV cache", "without",
     lambda a, q, k, v: a(q, k, v, state=a(q, k, v, kv_cached=True).state)),
    ("mask", "(B, H, R, width)", "(2, 3, 6, 8)",
     lambda a, q, k, v: sea.sparse_attention(q, k, v, torch.ones(2, 3, 6, 8, dtype=torch.bool), torch.ones(2, 6).long())),
    ("k", "6 tokens of the state and 2 of q", "2",
     lambda a, q, k, v: a(q[:, :, :2], k[:, :, :2], v[:, :, :2], state=a(q, k, v).state, kv_cached=True)),
    ("mask", "bool", "int64",
     lambda a, q, k, v: sea.sparse_attention(q, k, v, torch.ones(2, 4, 6, 8).long(), torch.ones(2, 6).long())),
    ("seen", "(2, 6)", "(1, 6)", lambda a, q, k, v: sea.pool_attention(q, k, torch.ones(1, 6).long(), 8)),
    ("seen", "(2, 6)", "(1, 6)", lambda a, q, k, v: sea.score_loss(q, k, q, k, torch.ones(1, 6).long())),
    ("block", ">= 1", "-3", lambda a, q, k, v: sea.score_loss(q, k, q, k, torch.ones(2, 6).long(), block=-3)),
    ("block", ">= 1", "0", lambda a, q, k, v: sea.pool_attention(q, k, torch.ones(2, 6).long(), 4, block=0)),
    ("teacher_q", "(2, 4, 6, 8) as the student's", "(1, 4, 6, 8)", lambda a, q, k, v: sea.score_loss(q, k, q[:1], k, torch.ones(2, 6).long())),
    ("teacher_k", "(2, 2, 6, 8) as the student's", "(2, 2, 5, 8)", lambda a, q, k, v: sea.choice_loss(
        torch.ones(4), q, k, q, k[:, :, 1:], a.config, 1.0, 1.0)),
    ("n_queries", ">= 1", "0", lambda a, q, k, v: sea.choice_loss(torch.ones(4), q, k, q, k, a.config, 1.0, 1.0, n_queries=0)),
    ("share", "(H,) = (4,)", "(1,)", lambda a, q, k, v: sea.choice_loss(torch.ones(1), q, k, q, k, a.config, 1.0, 1.0)),
    ("share", "(H,) = (4,)", "(2,)", lambda a, q, k, v: sea.mean_of_heads(q, 2, torch.ones(2))),
    ("scores", "(B, H, R, width)", "(4, 6, 8)", lambda a, q, k, v: sea.select_cells(q[0], torch.ones(2, 6).long(), 4)),
    ("bin", "bins", "0", lambda a, q, k, v: a.config.n_chosen(8)),
    ("valid", "a mask of 6 tokens, since some of the state's were padding", "None", lambda a, q, k, v: a(
        q[:, :, 4:], k, v, kv_cached=True, state=a(*(x[:, :, :4] for x in (q, k, v)), valid=torch.arange(4) < torch.tensor([[4], [3]]),
                                                   kv_cached=True).state)),
    ("valid", "bool of shape (2, 6)", "int64", lambda a, q, k, v: sea.in_documents(
        a, torch.zeros(2, 6).long(), q, k, v, valid=torch.ones(2, 6).long())),
    ("mask", "6 rows", "5",
     lambda a, q, k, v: sea.sparse_attention(q, k, v, torch.ones(2, 4, 5, 8, dtype=torch.bool), torch.ones(2, 6).long())),
    ("seen", "(2, 6)", "(1, 6)", lambda a, q, k, v: sea.topk_mask(torch.rand(2, 4, 6, 8), torch.ones(1, 6).long(), 3)),
    ("documents", "integers of shape (2, 6)", "torch.float32", lambda a, q, k, v: sea.in_documents(a, torch.ones(2, 6), q, k, v)),
    ("documents", "integers of shape (2, 6)", "(1, 6)", lambda a, q, k, v: sea.in_documents(a, torch.ones(1, 6).long(), q, k, v)),
    ("k", "the 5 tokens of q", "6", lambda a, q, k, v: sea.in_documents(a, torch.ones(2, 5).long(), q[:, :, 1:], k, v)),
    ("valid", "(2, 6)", "(2, 5)",
     lambda a, q, k, v: sea.in_documents(a, torch.ones(2, 6).long(), q, k, v, valid=torch.ones(2, 5, dtype=torch.bool))),
    ("group", "causal_batch", "'row'",
     lambda a, q, k, v: sea.topk_mask(torch.rand(2, 4, 6, 8), torch.ones(2, 6).long(), 3, "row")),
])
def test_bad_input_names_the_argument(argument, expected, got, call):
    layer = SEAttention(SEAConfig(**GOOD))
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    with pytest.raises(ValueError, match=f"^{argument}: expected ") as error:
        call(layer, q, k, v)
    left, right = str(error.value).split(", got ")
    assert expected in left and got in right


@pytest.mark.parametrize("argument, expected, got, call", [
    ("topk", "at least 13, since on average as many first and last keys", "12", lambda a, *qkv: a(*qkv, topk=12)),
    ("topk", "integer", "20.0", lambda a, *qkv: a(*qkv, topk=20.0)),
    ("topk", "integer", "'20'", lambda a, *qkv: a(*qkv, topk="20")),
    ("topk", "at least 11, since on average", "10", lambda a, *qkv: WindowAttention(a.config)(*qkv, topk=10)),
    ("bins", "int32", "float32", lambda a, *qkv: attend(*qkv, torch.zeros(2, 2, 5, 3))),
    ("bins", "(B, C, T, n)", "(2, 2, 5)", lambda a, *qkv: attend(*qkv, torch.zeros(2, 2, 5, dtype=torch.int32))),
    ("bins", "a multiple of the 2", "(2, 0, 5, 3)", lambda a, *qkv: attend(*qkv, torch.zeros(2, 0, 5, 3, dtype=torch.int32))),
    ("bins", "a multiple of the 2", "(2, 1, 5, 3)", lambda a, *qkv: attend(*qkv, torch.zeros(2, 1, 5, 3, dtype=torch.int32))),
    ("bin", ">= 1", "0", lambda a, *qkv: attend(*qkv, torch.zeros(2, 2, 5, 3, dtype=torch.int32), bin=0)),
])
def test_bad_input_with_bins_names_the_argument(argument, expected, got, call):
    layer = SEAttention(SEAConfig(**GOOD | BINS, query_stride=2, group="kv"))
    with pytest.raises(ValueError, match=f"^{argument}: expected .*") as error:
        call(layer, torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    left, right = str(error.value).split(", got ")
    assert expected in left and got in right


def attend(q, k, v, bins, bin=4):
    return sea.bin_attention(q, k, v, bins, torch.arange(1, 6).expand(2, -1), bin=bin)


def test_bidirectional_refuses_a_state():
    layer = SEAttention(SEAConfig(**{**GOOD, "causal": False}))
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    state = SEAttention(SEAConfig(**GOOD))(q, k, v).state
    with pytest.raises(ValueError, match="^state: expected None when bidirectional"):
        layer(q, k, v, state=state)
    with pytest.raises(ValueError, match="^rows_at_once: expected None when bidirectional, got 3"):
        layer(q, k, v, rows_at_once=3)
    assert layer(q, k, v).state is None


# -- what a call and a config say is what is computed with -------------------------------------------------------------


def test_defaults_are_those_that_are_documented():
    """The README's numbers were measured with them, and students hold no others."""
    assert vars(SEAConfig(n_head=3, d_head=64)) == dict(
        n_head=3, d_head=64, n_kv_head=None, width=256, topk=64, causal=True, group="kv", bin=2, local=8, first=2, candidates=16,
        query_stride=1, dense_below=0, nbf=8, max_positions=2048, cell_keys=True, cnn=True, seed=0, backend="auto")
    assert SEAConfig(n_head=3, d_head=64, bin=0).group == SEAConfig(n_head=3, d_head=64, causal=False).group == "causal_batch"


@given(causal_cases, st.integers(1, 9), KINDS)
def test_chunks_take_the_scale_and_the_topk_of_the_call(case, rows, kind):
    case = of_kind(case, kind)
    layer, (q, k, v) = case.layer(kind), case.qkv()
    whole, parts = (layer(q, k, v, softmax_scale=2.0, topk=case.topk + 3, rows_at_once=n) for n in (None, rows))
    torch.testing.assert_close(parts.out, whole.out, **CLOSE)


@given(cases())
def test_a_performer_is_linear_attention_written_out(case):
    """Whatever the padding at a sequence's end holds, and with the features of its seed."""
    case, scale = replace(case, stride=1), 0.7
    layer, (q, k, v), D = case.layer(PerformerAttention, seed=case.seed), case.qkv(), case.d_head
    valid = seen_by(case) > 0
    for x in (q, k, v):
        x.masked_fill_(~valid[:, None, :, None], torch.nan)
    out = layer(q, k, v, valid=valid, softmax_scale=scale).out
    w = sea.orthogonal_features(D, layer.config.n_features, torch.Generator().manual_seed(case.seed)).double()
    for b, n in enumerate(case.tokens):
        assert not out[b, :, n:].any()
        for h in range(q.shape[1]):
            kv = h // case.heads_per_kv
            x, y = q[b, h, :n] * scale * D**0.25, k[b, kv, :n] * D**-0.25
            if case.causal:
                x, y = ((z @ w).clamp(min=0) + 1e-3 for z in (x, y))
                weights = (x @ y.T).tril()
            else:
                x, y = (z @ w - z.square().sum(1, keepdim=True) / 2 for z in (x, y))
                weights = ((x - x.amax(1, keepdim=True)).exp() + 1e-4) @ ((y - y.max()).exp() + 1e-4).T
            torch.testing.assert_close(out[b, h, :n], weights / weights.sum(1, keepdim=True) @ v[b, kv, :n], **CLOSE)


def bucket_by_hand(x, rotations, level: int) -> list[int]:
    """Of a vector in a round, a digit for each rotation: argmax of [R x ; -R x]."""
    digits = []
    for rotation in rotations:
        half = 2 ** min(baselines.BITS, level) // 2
        if half:
            products = [float(x @ rotation[:, i]) for i in range(half)]
            products += [-y for y in products]
            digits.append(products.index(max(products)))
        level -= min(baselines.BITS, level)
    return digits


def lsh_by_hand(q, k, n_seen: int, rank: int, rotations, chunk: int) -> set[int]:
    """The keys k (S, D) that a query q (D,) attends to, of which it sees n_seen, its own at `rank`."""
    level = 0
    while chunk * 2 ** (level + 1) <= n_seen and level < baselines.HASHES * baselines.BITS:
        level += 1
    x = k[:n_seen] - k[: min(chunk * 2**level, n_seen)].mean(0)
    longest = max(float(y @ y) for y in x[: chunk * 2**level])
    x = [torch.cat([y, torch.tensor([math.sqrt(max(0.0, longest - float(y @ y)))], dtype=y.dtype)]) for y in x]
    found = {rank}
    for of_round in rotations:
        bucket = bucket_by_hand(q, of_round[:, :-1], level)
        mates = [j for j, y in enumerate(x) if bucket_by_hand(y, of_round, level) == bucket]
        first = max(0, sum(j < rank for j in mates) // chunk - 1) * chunk
        found |= set(mates[first : first + 2 * chunk])
    return found


@given(cases(max_tokens=16, bins=False), st.integers(1, 16), st.sampled_from([2, 6]), st.booleans(), st.data())
@settings(max_examples=30)
def test_a_reformer_is_hashing_written_number_by_number(case, topk, bits, padded, data):
    """Padding anywhere, nan in it, changes neither what is found nor gradients."""
    with mock.patch.object(baselines, "BITS", bits), mock.patch.object(baselines, "ROUNDS", 2):
        case = of_kind(case, ReformerAttention)
        layer, (q, k, v), T = case.layer(ReformerAttention, topk=topk), case.qkv(), max(case.tokens)
        k += 2  # as if from a model, whose keys lie in one direction
        valid = torch.arange(T) < torch.tensor(case.tokens)[:, None]
        if padded:
            valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=valid.numel(), max_size=valid.numel()))).view(valid.shape)
        mine, expected = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
        result = layer(*(x.masked_fill(~valid[:, None, :, None], torch.nan) for x in mine), valid=valid)
        by_hand, attended = torch.zeros_like(q), result.attended(T)
        assert torch.equal(result.n_attended(), attended.sum(-1)), "a key twice on a list"
        assert torch.equal(result.bins, result.bins.sort(-1).values)
        for b, of_sequence in enumerate(valid):
            places = of_sequence.nonzero()[:, 0]
            for h in range(q.shape[1]):
                x, y, z = expected[0][b, h, places], *(z[b, h // case.heads_per_kv, places] for z in expected[1:])
                for rank, place in enumerate(places.tolist()):
                    n_seen = rank + 1 if case.causal else len(places)
                    keys = sorted(lsh_by_hand(x[rank].detach(), y.detach(), n_seen, rank, layer.rotations, max(1, topk // 4)))
                    assert attended[b, h, place].nonzero()[:, 0].tolist() == keys
                    by_hand[b, h, place] = (y[keys] @ x[rank] * case.d_head**-0.5).softmax(0) @ z[keys]
        torch.testing.assert_close(result.out, by_hand, **CLOSE)
        if valid.any():
            weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(case.seed))
            grads = [torch.autograd.grad((out * weight).sum(), x) for out, x in ((result.out, mine), (by_hand, expected))]
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y, **CLOSE)


@given(cases(max_tokens=40, bins=False))
@settings(max_examples=30)
def test_a_reformer_of_one_bucket_is_dense(case):
    """Two chunks hold all keys; and so they do for the first queries, whatever the rotations."""
    case = of_kind(case, ReformerAttention)
    (q, k, v), T, valid = case.qkv(), max(case.tokens), seen_by(case) > 0
    dense = dense_attention(q, k, v, seen_by(case))
    layer = case.layer(ReformerAttention, topk=4 * T)  # chunks of all keys
    for topk in (4 * T, 10**15):
        result = layer(q, k, v, valid=valid, topk=topk)
        torch.testing.assert_close(result.out, dense, **CLOSE)
        assert result.bins.shape[-1] == T
    layer.rotations.zero_()
    torch.testing.assert_close(layer(q, k, v, valid=valid, topk=4 * -(-T // 2)).out, dense, **CLOSE)
    if case.causal:
        early = 2 * max(1, case.topk // 4) - 1  # one less than the first that has two buckets
        out = case.layer(ReformerAttention)(q, k, v, valid=valid).out
        torch.testing.assert_close(out[:, :, :early], dense[:, :, :early], **CLOSE)


@given(cases(causal=st.just(True), max_tokens=40, bins=False), st.data())
@settings(max_examples=30)
def test_the_past_of_a_reformer_ignores_the_future(case, data):
    """Whatever later tokens hold, and however many: neither buckets nor chunks move."""
    case = of_kind(case, ReformerAttention)
    layer, (q, k, v) = case.layer(ReformerAttention), case.qkv()
    T = q.shape[2]
    cut, number = data.draw(st.integers(1, T)), data.draw(st.sampled_from([3.0, 1e9, torch.inf, torch.nan]))
    before = layer(q, k, v)
    later = [torch.cat([x[:, :, :cut], torch.full_like(x[:, :, cut:], y)], 2) for x, y in ((q, number), (k, number), (v, 3.0))]
    for after in (layer(*later), layer(*(x[:, :, :cut] for x in (q, k, v)))):
        torch.testing.assert_close(after.out[:, :, :cut], before.out[:, :, :cut], **CLOSE)
        assert torch.equal(after.attended(T)[:, :, :cut], before.attended(T)[:, :, :cut])


@given(cases(max_tokens=40, bins=False))
@settings(max_examples=30)
def test_rounds_of_the_same_rotations_find_no_more(case):
    """A pair counts once, however many rounds find it; and a constant in all keys, which no softmax sees, moves no bucket."""
    case = of_kind(case, ReformerAttention)
    layer, (q, k, v), rotations = case.layer(ReformerAttention), case.qkv(), case.layer(ReformerAttention).rotations
    layer.rotations = rotations[:1]
    once = layer(q, k, v)
    layer.rotations = rotations[:1].expand_as(rotations)
    again = layer(q, k, v)
    torch.testing.assert_close(again.out, once.out, **CLOSE)
    assert torch.equal(again.attended(q.shape[2]), once.attended(q.shape[2]))
    assert torch.equal(layer(q, k + 100, v).attended(q.shape[2]), once.attended(q.shape[2]))


@pytest.mark.parametrize("causal", [True, False])
def test_a_reformer_finds_keys_that_a_query_attends_to(causal):
    """Most of them are of its own topic, of 8, though those are long ago and all keys have a large mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    topic = torch.randint(8, (512,), generator=generator)
    centres = draw(8, 32)
    q, k = centres[topic] + 0.3 * draw(1, 1, 512, 32), centres[topic] + 0.3 * draw(1, 1, 512, 32) + 5
    layer = ReformerAttention(SEAConfig(n_head=1, d_head=32, causal=causal, topk=32))
    attended = layer(q, k, k).attended(512)[0, 0, 256:]
    right = attended & (topic[256:, None] == topic)
    assert right.sum() > attended.sum() / 2 and right.sum(1).float().mean() > 16


def test_a_reformer_finds_no_more_keys_in_a_longer_text_and_its_memory_is_linear():
    """The largest tensor, the search included, at twice the tokens; bins of single keys that no operation has to expand."""
    sizes, T = [], 512

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes[-1] = max([sizes[-1], *(x.untyped_storage().nbytes() for x in torch.utils._pytree.tree_leaves(out)
                                          if isinstance(x, torch.Tensor))])
            return out

    layer, q = ReformerAttention(SEAConfig(n_head=1, d_head=8, topk=16)), torch.randn(1, 1, 2 * T, 8)
    seen = torch.arange(1, 2 * T + 1)[None]
    for n in (T, 2 * T):
        sizes.append(0)
        with Largest():
            keys = baselines.lsh_keys(q[:, :, :n], q[:, :, :n], seen[:, :n], seen[:, :n] - 1, layer.rotations, 4)
        assert keys.shape == (1, 1, n, 8 * 2 * 4 + 1)
    assert sizes[1] <= 2 * sizes[0]


@given(causal_cases)
def test_no_gradient_goes_where_none_belongs(case):
    """Through cell keys to queries and keys, and from either loss to the teacher."""
    (q, k, _), (teacher_q, teacher_k, _), seen = case.qkv(), replace(case, seed=case.seed + 1).qkv(), seen_by(case)
    inputs = [x.requires_grad_() for x in (q, k, teacher_q, teacher_k)]
    scores = torch.randn(*q.shape[:3], case.width, dtype=torch.float64, requires_grad=True)
    none, all_new = torch.zeros(len(q), dtype=torch.long), torch.tensor(case.tokens)
    past = k.new_zeros(*k.shape[:2], 2 * case.width, case.d_head)
    gain = torch.ones(q.shape[1], dtype=torch.float64)
    biased, sums = sea.add_cell_keys(scores, gain, q, k, seen, 1.0, none, all_new, past)
    estimate = sea.estimate_loss(biased, sea.pool_attention(teacher_q, teacher_k, seen, case.width), seen)
    assert not sums.requires_grad and torch.autograd.grad(estimate, [scores, *inputs], allow_unused=True)[1:] == (None,) * 4
    grads = torch.autograd.grad(sea.score_loss(q, k, teacher_q, teacher_k, seen), inputs, allow_unused=True)
    assert None not in grads[:2] and grads[2:] == (None, None)


def test_a_state_copied_in_place_is_the_other_whole():
    """Or, where the other is that of another layer, as it was."""
    case = Case(True, 2, [9], 1, 2, 4, 8, 3, "query", 1, cell_keys=True)
    layer, qkv = case.layer(), case.qkv()
    first, second = (layer(*(x[:, :, :n] for x in qkv), kv_cached=True).state for n in (4, 8))
    first.copy_(second)
    assert first.n_tokens == 8 and all(torch.equal(x, tensors_of(second)[name]) for name, x in tensors_of(first).items())
    with pytest.raises(ValueError, match="^other: expected last_scores of shape "):
        first.copy_(replace(case, width=9).layer()(*(x[:, :, :7] for x in qkv), kv_cached=True).state)
    assert first.n_tokens == 8 and all(torch.equal(x, tensors_of(second)[name]) for name, x in tensors_of(first).items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_documents_have_any_numbers(dtype):
    case = Case(True, 1, [9, 9], 1, 2, 4, 8, 3, "query", 1, cell_keys=True)
    layer, qkv, second = case.layer(), case.qkv(), torch.arange(9).expand(2, 9) > 4
    documents = torch.where(second, torch.iinfo(dtype).max, torch.tensor(torch.iinfo(dtype).min).to(dtype)).to(dtype)
    torch.testing.assert_close(sea.in_documents(layer, documents, *qkv).out, sea.in_documents(layer, second.int(), *qkv).out, **CLOSE)
    with pytest.raises(ValueError, match="^documents: expected integers of shape .*, got torch.bool"):
        sea.in_documents(layer, second, *qkv)


def test_a_state_without_rows_is_copied_from_calls_of_any_topk():
    """At stride 1 nothing is left of a list of bins."""
    case = Case(True, 1, [9], 1, 2, 4, 8, 20, "kv", 1, cell_keys=True, bin=2, local=2)
    layer, qkv = case.layer(), case.qkv()
    first, second = (layer(*(x[:, :, :n] for x in qkv), kv_cached=True, topk=topk).state for n, topk in ((4, 8), (8, 20)))
    first.copy_(second)
    assert first.n_tokens == 8 and torch.equal(first.sums, second.sums)


def test_new_weights_start_where_students_learn_from():
    """Gates open, cell keys at their full products, positions as large as values are."""
    layer = SEAttention(SEAConfig(n_head=3, d_head=64))
    assert (layer.gate.bias == 4).all() and not layer.gate.weight.any() and (layer.key_gain == 1).all()
    assert 0.95 < layer.position.std() < 1.05


@given(cases(bins=False))
def test_attention_csr_takes_a_scale(case):
    (q, k, _), seen = case.qkv(), seen_by(case)
    mask = torch.rand(*q.shape[:3], case.width, generator=torch.Generator().manual_seed(case.seed)) < 0.5
    dense = sea.attention_weights(q, k, sea.expand_mask(mask, seen, k.shape[2]), 0.3)
    row = torch.arange(q.shape[2]).expand(len(q), -1)
    ours_of = attention_csr(q, k, sea.SEAOutput(q, seen, None, cells=mask, row=row), 0.3)
    for ours, theirs in zip(ours_of, dense, strict=True):
        torch.testing.assert_close(torch.stack([x.to_dense() for x in ours]), theirs, **CLOSE)


def test_only_plain_weights_are_read():
    """A tensor of a class of its own may compute something else than its numbers."""

    class Quantized(torch.Tensor):
        pass

    layer, q = torch.nn.Linear(2, 2), torch.zeros(1)
    assert sea.is_plain(layer, q)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized))
    assert not sea.is_plain(layer, q)
