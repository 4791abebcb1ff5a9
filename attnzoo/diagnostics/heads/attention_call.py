"""One layer's attention in one forward pass, and the patterns that follow from its queries, keys and rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnzoo.diagnostics.layers import AttentionLayer
from attnzoo.masks import Visibility
from attnzoo.ops.observation import ScoreMap
from attnzoo.ops.score_rules import ScoreRules, decay_of_pairs, masked_softmax, sigmoid_weights
from attnzoo.rules import SIZE, check

_BLOCK = 256


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention in one forward pass, detached.

    Mechanisms without a softmax give what their projections give; mechanisms that fold a part of the keys (latent
    attention over a cache) give the folded form.

    Attributes:
        layer: the layer that ran.
        queries: (B, Hq, T, D) after norms and rotation, or None where they could not be read.
        keys: (B, G, S, D) after norms and rotation, or None.
        values: (B, Gv, S, Dv), or None.
        outputs: (B, H, T, Dv) of every head, before the output projection; gates included.
        value_of: which of the values each of the H heads reads.
        view: which query sees which key, or None if there are no patterns.
        rules: how scores become weights, or None. Their rotary parts are in queries and keys already.
        pre: map of the scores over heads, or None.
        post: map of the weights over heads, or None.
        heads: which of the patterns, in which order, belong to the H heads. None: all of them.
        obstacle: why there are no patterns, or None.
        cross: whether keys come from other tokens than queries.
    """

    layer: AttentionLayer
    queries: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    outputs: Tensor
    value_of: tuple[int, ...] = ()
    view: Visibility | None = field(default=None, repr=False)
    rules: ScoreRules | None = field(default=None, repr=False)
    pre: ScoreMap | None = field(default=None, repr=False)
    post: ScoreMap | None = field(default=None, repr=False)
    heads: tuple[int, ...] | None = None
    obstacle: str | None = field(default=None, repr=False)
    cross: bool = False

    @property
    def num_keys(self) -> int:
        """Number of keys S, visible or not."""
        return self._parts()[1].shape[2]

    def pattern(self, rows: slice | None = None) -> Tensor:
        """Attention weights (B, H, t, S) of these queries (default: all), in float32, or float64 for float64.

        Rows add up to 1, except those that see nothing, those of layers with a sink in the denominator, and those of
        mechanisms that compose weights of several heads. Dropout is left out.

        Raises:
            ValueError: for a mechanism that has no such weights.
        """
        q, k, view, rules = self._parts()
        p = pattern_of(q, k, view, rules, rows, self.pre, self.post)
        return p if self.heads is None else p[:, list(self.heads)]

    def pattern_blocks(self, block: int = _BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Query rows and their weights (B, H, block, S), from the first query to the last."""
        check("block", block, SIZE)
        T = self.outputs.shape[2]
        for first in range(0, T, block):
            rows = slice(first, min(T, first + block))
            yield rows, self.pattern(rows)

    def visible_counts(self, rows: slice, real: Tensor | None = None) -> Tensor:
        """How many keys these queries see, of all or of the real ones (B, S), broadcastable to (B, H, t)."""
        q, k, view, _ = self._parts()
        visible = view.dense((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device, rows)
        if visible is None:
            visible = torch.ones(rows.stop - rows.start, k.shape[2], dtype=torch.bool, device=q.device)
        if real is not None:
            visible = visible & real[:, None, None]
        return visible.expand(*visible.shape[:-1], k.shape[2]).sum(-1)

    def values_by_head(self) -> Tensor:
        """Values (B, H, S, Dv), one for every head."""
        if self.values is None:
            raise ValueError(f"layer {self.layer.name!r} has no values: {self.obstacle}")
        return self.values[:, list(self.value_of)]

    def _parts(self) -> tuple[Tensor, Tensor, Visibility, ScoreRules]:
        if self.queries is None or self.keys is None or self.view is None or self.rules is None:
            raise ValueError(f"layer {self.layer.name!r} has no attention patterns: {self.obstacle}")
        return self.queries, self.keys, self.view, self.rules


def pattern_of(
    q: Tensor,
    k: Tensor,
    view: Visibility,
    rules: ScoreRules,
    rows: slice | None = None,
    pre: ScoreMap | None = None,
    post: ScoreMap | None = None,
) -> Tensor:
    """Attention weights (B, H', t, S) of queries q (B, H, T, D) over keys k (B, G, S, D), differentiable.

    The weights of the backends' softmax, before dropout, in float32, or float64 for float64.

    Args:
        q: with their rotary part.
        k: with their rotary part.
        view: which query sees which key.
        rules: their rotary parts are not used.
        rows: the queries whose weights are computed. Default: all.
        pre: map of the scores over heads, or None.
        post: map of the weights over heads, or None.
    """
    B, H, T, _ = q.shape
    S = k.shape[2]
    rows = slice(*(slice(None) if rows is None else rows).indices(T)[:2])
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(compute_dtype)
    k = k if k.shape[1] == H else k.repeat_interleave(H // k.shape[1], dim=1)
    s = q[:, :, rows].to(compute_dtype) @ k.mT * rules.scale
    if rules.softcap is not None:
        s = rules.softcap * torch.tanh(s / rules.softcap)
    if rules.bias is not None:
        whole = rules.bias.ndim < 2 or rules.bias.shape[-2] == 1
        s = s + (rules.bias if whole else rules.bias[..., rows, :]).to(compute_dtype)
    if rules.alibi_slopes is not None:
        i, j = view.indices(T, S, q.device)
        s = s - rules.alibi_slopes.to(s)[:, None, None] * (i[rows, None] - j).abs()
    if rules.decay is not None:
        s = s + decay_of_pairs(rules.decay.to(compute_dtype), view, T)[:, :, rows]
    if pre is not None:
        s = pre.at(rows, slice(None))(s)
    visible = view.dense((B, s.shape[1], T, S), q.device, rows)
    if rules.sigmoid_bias is not None:
        p = sigmoid_weights(s, visible, rules.sigmoid_bias)
    else:
        sinks = rules.sinks.reshape(1, -1, 1, 1) if isinstance(rules.sinks, Tensor) else rules.sinks
        p = masked_softmax(s, visible, sinks)
    return p if post is None else post.at(rows, slice(None))(p)
