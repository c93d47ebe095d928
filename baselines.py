"""The controls: attention that replaces a model's as SEAttention does, to measure SEA against.

    performer   linear attention alone (Choromanski et al., ICLR 2021), as in SEA but without
                positions: beside it one sees what the estimated mask adds
    window      the first keys and the last ones alone (Xiao et al., ICLR 2024), as many as SEA
                attends to: beside it one sees what is found between them

Each is a module built from a SEAConfig, with SEAttention's forward, so that convert.attach and
distill.py treat them alike.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sea import (SEAConfig, SEAOutput, SEAState, _expect, all_rows, always_bins, at_least_fp32,
                 causal_linear_attention, check_call, choose_rows, in_chunks, is_token,
                 linear_attention, no_autocast, operations, orthogonal_features, relu_features,
                 scale_or_default, scaled_qk, softmax_features, to_front)


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
            seen, _, _, place, _, _, count = choose_rows(past.count, tokens.n_new, q.shape[2], 1, 0)
        else:
            seen, _, _, place, _, _, count = all_rows(tokens.n_new, q.shape[2])
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
        seen, row, _, _, _, _, count = choose_rows(past.count, tokens.n_new, q.shape[2], 1, 0)
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


BASELINES = {"performer": PerformerAttention, "window": WindowAttention}
