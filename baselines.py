"""The controls: attention that replaces a model's as SEAttention does, to measure SEA against.

    performer   linear attention alone (Choromanski et al., ICLR 2021), as in SEA but without
                positions: beside it one sees what the estimated mask adds
    window      the first keys and the last ones alone (Xiao et al., ICLR 2024), as many as SEA
                attends to: beside it one sees what is found between them
    reformer    keys found by locality-sensitive hashing (Kitaev et al., ICLR 2020), about as many
                as SEA attends to: beside it one sees what an estimate finds that hashing does not

Each is a module built from a SEAConfig, with SEAttention's forward, so that convert.attach and
distill.py treat them alike.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sea import (NONE, SEAConfig, SEAOutput, SEAState, _expect, all_rows, always_bins, at_least_fp32,
                 causal_linear_attention, check_call, choose_rows, in_chunks, is_token,
                 linear_attention, no_autocast, operations, orthogonal_features, relu_features,
                 repeat_heads, scale_or_default, scaled_qk, softmax_features, take, to_front)


class PerformerAttention(nn.Module):
    """out = phi(q) (sum phi(k)^T v) / (phi(q) sum phi(k)). It has no parameters of its own; the model
    around it learns.

    Of the config it uses n_head, n_kv_head, d_head, causal, nbf and seed.
    """

    # what it has no use for, with any topk
    of_config: ClassVar[dict] = dict(cell_keys=False, cnn=True, bin=0, group=None, dense_below=0)

    def __init__(self, config: SEAConfig):
        super().__init__()
        _expect(config.query_stride == 1, "query_stride", "1 for a Performer", config.query_stride)
        self.config = replace(config, **self.of_config)
        self.register_buffer("projection", torch.empty(config.d_head, self.config.n_features))
        self.redraw_features(torch.Generator().manual_seed(config.seed))

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, in place."""
        if not self.projection.is_meta:
            self.projection.copy_(orthogonal_features(*self.projection.shape, generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None,
                softmax_scale: float | None = None, state: SEAState | None = None,
                topk: int | None = None, kv_cached: bool = False,
                rows_at_once: int | None = None) -> SEAOutput:
        """As SEAttention.forward; topk has no meaning here. The result has no scores and no cells."""
        check_call(self.config, q, k, v, valid, state, kv_cached, rows_at_once)
        scale = scale_or_default(softmax_scale, self.config.d_head)
        if rows_at_once is not None and q.shape[2] > rows_at_once:
            return in_chunks(self, rows_at_once, q, k, v, valid, state, kv_cached, softmax_scale=scale)
        past = self.empty_state(q) if state is None else state
        tokens = to_front(q, k, v, valid, past, kv_cached)
        if self.config.causal:
            seen, _, _, place, _, _, count, _ = choose_rows(past.count, tokens.n_new, q.shape[2], 1, 0)
        else:
            seen, _, _, place, _, _, count, _ = all_rows(tokens.n_new, q.shape[2])
        out, sums = self.context(tokens.q, tokens.k, tokens.v, scale, tokens.n_new, past.sums, place)
        state = replace(past, count=count, n_tokens=past.n_tokens + q.shape[2], sums=sums)
        state.k, state.v = (None, None) if kv_cached else (tokens.keys, tokens.values)
        out = (out * is_token(out, tokens.n_new)).to(q.dtype)
        return tokens.back(SEAOutput(out, seen, state if self.config.causal else None))

    def empty_state(self, q: Tensor) -> SEAState:
        """Only count and sums (B, Hkv, m, D+1) are used."""
        state = SEAState.empty(self.config, q)
        return replace(state, sums=state.sums[..., : q.shape[-1] + 1].contiguous())

    def context(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, n_new: Tensor,
                past: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Linear attention over v, (B, H, T, D), and the sums after the new tokens if causal."""
        is_key = is_token(k, n_new)
        q, k = scaled_qk(q, k, softmax_scale)
        with no_autocast(q):
            if not self.config.causal:
                q_feat = softmax_features(q, self.projection)
                k_feat = softmax_features(k, self.projection, is_key) * is_key
                return linear_attention(q_feat, k_feat, at_least_fp32(v)), past
            q_feat = relu_features(q, self.projection)
            k_feat = relu_features(k, self.projection) * is_key
        return causal_linear_attention(q_feat, k_feat, at_least_fp32(v), past, place)


class WindowAttention(nn.Module):
    """softmax(q k^T * softmax_scale) v over the first keys and the last ones. It has no parameters; the
    model around it learns.

    Of the config it uses n_head, n_kv_head, d_head, topk, bin, first and backend. Raises ValueError if
    that is not causal or has no bins.
    """

    # what it has no use for, with any topk
    of_config: ClassVar[dict] = dict(local=1, query_stride=1, dense_below=0)

    def __init__(self, config: SEAConfig):
        super().__init__()
        _expect(config.has_bins, "bin", ">= 1, and a causal layer, for a window", config.bin)
        self.config = replace(config, **self.of_config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None,
                softmax_scale: float | None = None, state: SEAState | None = None,
                topk: int | None = None, kv_cached: bool = False,
                rows_at_once: int | None = None) -> SEAOutput:
        """As SEAttention.forward. The result has bins but no scores."""
        check_call(self.config, q, k, v, valid, state, kv_cached, rows_at_once)
        config, scale = self.window(topk), scale_or_default(softmax_scale, self.config.d_head)
        if rows_at_once is not None and q.shape[2] > rows_at_once:
            return in_chunks(self, rows_at_once, q, k, v, valid, state, kv_cached, softmax_scale=scale,
                             topk=topk)
        past = SEAState.empty(config, q) if state is None else state
        tokens = to_front(q, k, v, valid, past, kv_cached)
        seen, row, _, _, _, _, count, _ = choose_rows(past.count, tokens.n_new, q.shape[2], 1, 0)
        middle = config.in_cells(seen) // config.bin
        bins = always_bins(seen, middle, config, tokens.keys.shape[2])
        bins = bins[:, None].expand(-1, config.kv_heads, -1, -1).int()
        out = operations(config, q).bin_attention(tokens.q, tokens.keys, tokens.values, bins, seen,
                                                  scale, bin=config.bin, order=tokens.key_order)
        state = replace(past, count=count, n_tokens=past.n_tokens + q.shape[2])
        state.k, state.v = (None, None) if kv_cached else (tokens.keys, tokens.values)
        return tokens.back(SEAOutput(out, seen, state, row=row, bins=bins, bin=config.bin))

    def window(self, topk: int | None) -> SEAConfig:
        """The config whose last keys take what the first leave of the budget."""
        config = self.config if topk is None else replace(self.config, topk=topk)
        return replace(config, local=config.topk - config.n_first * config.bin - config.bin // 2)


class ReformerAttention(nn.Module):
    """softmax(q k^T * softmax_scale) v over the keys that share a bucket with the query in one of several
    rounds of locality-sensitive hashing, see lsh_keys. It has no parameters; the model around it learns.

    Of the config it uses n_head, n_kv_head, d_head, causal, topk, seed and backend.
    """

    # what it has no use for, with any topk, as small as it can be
    of_config: ClassVar[dict] = dict(width=1, group="query", bin=0, query_stride=1, nbf=1e9,
                                     cell_keys=False, cnn=True, dense_below=0)

    def __init__(self, config: SEAConfig):
        super().__init__()
        self.config = replace(config, **self.of_config)
        shape = (ROUNDS, HASHES, config.d_head + 1, 2 ** (BITS - 1))
        self.register_buffer("rotations", torch.empty(shape))
        if not self.rotations.is_meta:
            draw = dict(generator=torch.Generator().manual_seed(config.seed), device="cpu")
            self.rotations.copy_(torch.randn(shape, **draw))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None,
                softmax_scale: float | None = None, state: SEAState | None = None,
                topk: int | None = None, kv_cached: bool = False,
                rows_at_once: int | None = None) -> SEAOutput:
        """As SEAttention.forward. The result has no scores; its bins are single keys."""
        check_call(self.config, q, k, v, valid, state, kv_cached, rows_at_once)
        config = self.config if topk is None else replace(self.config, topk=topk)
        scale = scale_or_default(softmax_scale, config.d_head)
        if rows_at_once is not None and q.shape[2] > rows_at_once:
            return in_chunks(self, rows_at_once, q, k, v, valid, state, kv_cached, softmax_scale=scale,
                             topk=topk)
        past = SEAState.empty(config, q) if state is None else state
        tokens = to_front(q, k, v, valid, past, kv_cached)
        if config.causal:
            seen, row, _, _, _, _, count, _ = choose_rows(past.count, tokens.n_new, q.shape[2], 1, 0)
        else:
            seen, row, _, _, _, _, count, _ = all_rows(tokens.n_new, q.shape[2])
        rank = past.count[:, None] + row
        keys = tokens.keys if tokens.key_order is None else take(tokens.keys, tokens.key_order)
        chosen = lsh_keys(tokens.q, keys, seen, rank, self.rotations, chunk=max(1, config.topk // 4))
        out = operations(config, q).bin_attention(tokens.q, tokens.keys, tokens.values, chosen, seen,
                                                  scale, bin=1, order=tokens.key_order)
        state = replace(past, count=count, n_tokens=past.n_tokens + q.shape[2])
        state.k, state.v = (None, None) if kv_cached else (tokens.keys, tokens.values)
        state = state if config.causal else None
        return tokens.back(SEAOutput(out, seen, state, row=row, bins=chosen, bin=1))


# -- hashing, for the Reformer
#
# A round finds two chunks of topk / 4 keys at most. Buckets may be smaller, and rounds find many of
# the same, so that 8 of them find about topk: 67 of 64 in late queries of a small OPT.

ROUNDS = 8
BITS = 6  # a rotation tells 2**6 buckets apart
HASHES = 2  # rotations of a round; where one has too few buckets, the next divides each of them


@torch.no_grad()
def lsh_keys(q: Tensor, k: Tensor, seen: Tensor, rank: Tensor, rotations: Tensor,
             chunk: int) -> Tensor:
    """The keys that each query attends to: (B, H, T, n) int32, n = 2 * chunk * rounds + 1 or S, ascending,
    each of them once, NONE behind the last. No gradient flows through the choice.

    q (B, H, T, D); k (B, Hkv, S, D) by rank; seen, rank (B, T): how many keys each query sees, and
    which is its own; rotations (rounds, hashes, D+1, 2**(BITS-1)).

        sorted   in each round the keys by (bucket, rank)
        chunks   `chunk` neighbours of a bucket, from its first key on
        found    of the query's bucket the chunk where its own rank would stand, and the one before
                 (after it, if it is the first), as far as it sees them
        chosen   what any round found, and the query's own key

    One softmax over the chosen keys is what the paper has: it adds up the rounds' attention, and
    divides each pair's weight by the number of rounds that found it.

    Differs: in the paper queries are keys, of norm 1, and attend to themselves only where there is no
    other. Those of a pretrained model are not the same, and most of its keys lie in one direction,
    which no query's softmax sees but which fills few buckets; so keys are centred and given one norm,
    and then hashed by the same rotations as queries.
    Differs: the paper cuts chunks across buckets, and has as many buckets as fit the length of the
    sequence: later tokens would decide what a query attends to. Here chunks begin with their bucket,
    and a query that sees n keys has 2**level buckets, the most with chunk * 2**level <= n (4,096 at
    most). So its keys depend on nothing but what it sees, the first queries attend to all, and any
    split of a sequence into calls gives what one call gives.
    """
    (B, H, T, _), S = q.shape, k.shape[2]
    chunk = min(chunk, S)  # of all keys there are
    n_levels = min(max(1, (S // chunk).bit_length()), HASHES * BITS + 1)
    edges = chunk * 2 ** torch.arange(1, n_levels, device=q.device)
    level_of_query = torch.searchsorted(edges, seen, right=True)[:, None, None]  # (B, 1, 1, T)
    orders, begin, end, n_sorted = [], 0, 0, 0
    for level in range(n_levels):
        least = chunk * 2**level  # keys that a query of this level sees
        n = S if level == n_levels - 1 else min(S, 2 * least)  # and no more than these
        bucket = hash_vectors(of_equal_norms(k[:, :, :n], least), rotations, level)
        in_order = n * bucket + torch.arange(n, device=q.device)
        in_order = in_order.sort(-1).values.contiguous()  # (B, rounds, Hkv, n)
        of_query = n * hash_vectors(at_least_fp32(q), rotations[:, :, :-1], level)
        first = n_before(in_order, of_query)
        own = n_before(in_order, of_query + rank[:, None, None])
        last = n_before(in_order, of_query + seen[:, None, None])
        first = first + ((own - first) // chunk - 1).clamp(min=0) * chunk
        last = torch.minimum(first + 2 * chunk, last)
        is_level = level_of_query == level
        begin = torch.where(is_level, n_sorted + first, begin)  # (B, rounds, H, T)
        end = torch.where(is_level, n_sorted + last, end)
        orders.append(in_order % n)
        n_sorted += n
    order = repeat_heads(torch.cat(orders, dim=-1).int().transpose(1, 2), H)  # (B, H, rounds, n_sorted)
    chosen = [rank.int().masked_fill(seen == 0, NONE)[:, None, :, None].expand(B, H, T, 1)]
    for i in range(len(rotations)):
        place = begin[:, i, ..., None] + torch.arange(2 * chunk, device=q.device)
        keys = order[:, :, i].gather(-1, place.clamp(max=n_sorted - 1).flatten(2)).view(place.shape)
        chosen.append(keys.masked_fill(place >= end[:, i, ..., None], NONE))
    return each_once(torch.cat(chosen, dim=-1))[..., :S]


def n_before(in_order: Tensor, x: Tensor) -> Tensor:
    """How many of in_order (B, rounds, Hkv, n), ascending, are less than each of x (B, rounds, H, T)."""
    of_kv = x.unflatten(2, (in_order.shape[2], -1)).flatten(3)
    return torch.searchsorted(in_order, of_kv.contiguous()).view(x.shape)


def of_equal_norms(k: Tensor, n: int) -> Tensor:
    """Keys (B, Hkv, S, D) less the mean of the first n, with one more number each, which gives all of
    them the norm of the longest of these: (B, Hkv, S, D+1). What has the largest product with a query
    is then what points most in its direction (Neyshabur and Srebro, ICML 2015)."""
    k = at_least_fp32(k)
    k = k - k[:, :, :n].mean(2, keepdim=True)
    squared = k.square().sum(-1, keepdim=True)
    missing = squared[:, :, :n].amax(2, keepdim=True) - squared
    return torch.cat([k, missing.clamp(min=0).sqrt()], dim=-1)


def hash_vectors(x: Tensor, rotations: Tensor, level: int) -> Tensor:
    """The bucket, one of 2**level, of each vector of x (B, heads, N, D) in each round: argmax of
    [x R ; -x R], (B, rounds, heads, N). rotations (rounds, hashes, D, 2**(BITS-1)). A vector's length
    does not matter."""
    bucket = torch.zeros(len(x), len(rotations), *x.shape[1:3], dtype=torch.long, device=x.device)
    for i in range(0, level, BITS):
        half = 2 ** (min(BITS, level - i) - 1)  # of this rotation's buckets
        rotation = rotations[:, i // BITS, :, :half].to(x.dtype).transpose(0, 1)  # (D, rounds, half)
        with no_autocast(x):
            y = (x @ rotation.flatten(1)).unflatten(-1, (-1, half))
        best = y.abs().argmax(-1, keepdim=True)
        best = best + half * (y.gather(-1, best) < 0)
        bucket = 2 * half * bucket + best.squeeze(-1).movedim(-1, 1)
    return bucket


def each_once(keys: Tensor) -> Tensor:
    """Rows of numbers (..., n), ascending, NONE behind the last; no number twice."""
    keys = keys.sort(-1).values
    again = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0))
    return keys.masked_fill(again, NONE).sort(-1).values


BASELINES = {"performer": PerformerAttention, "window": WindowAttention, "reformer": ReformerAttention}
