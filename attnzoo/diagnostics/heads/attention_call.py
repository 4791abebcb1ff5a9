"""One layer's attention in one forward pass, and the patterns that follow from its queries, keys and rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo.diagnostics.layers import AttentionLayer
from attnzoo.masks import AttentionMask, visibility
from attnzoo.ops.composed_attention import Composition

_BLOCK = 256


@dataclass(frozen=True)
class Rules:
    """How scores become a pattern; the words of `ops.softmax_attention` and `ops.composed_attention`."""

    scale: float
    causal: bool = False
    mask: AttentionMask | None = None
    window: int | None = None
    sink_tokens: int = 0
    query_start: int = 0
    key_positions: Tensor | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | float | None = None
    seen: Tensor | None = None
    bias: Tensor | None = None
    pre: Composition | None = None
    post: Composition | None = None
    heads: tuple[int, ...] | None = None

    def visible(self, shape: tuple[int, int, int, int], rows: slice, device: torch.device) -> Tensor | None:
        """Which keys the queries `rows` of a (B, H, T, S) call see, broadcastable to (B, H, rows, S); None: all."""
        B, H, _, S = shape
        if self.seen is not None:
            return self.seen if self.seen.shape[-2] == 1 else self.seen[..., rows, :]
        common: dict[str, Any] = {
            "causal": self.causal, "window": self.window, "sink_tokens": self.sink_tokens,
            "key_positions": self.key_positions, "device": device,
        }  # fmt: skip
        if self.mask is None:
            count = rows.stop - rows.start
            return visibility(None, (B, H, count, S), query_start=self.query_start + rows.start, **common)
        whole = visibility(self.mask, shape, query_start=self.query_start, **common)
        return whole if whole is None or whole.ndim < 2 or whole.shape[-2] == 1 else whole[..., rows, :]


@dataclass(frozen=True, eq=False)
class HeadCall:
    """One layer's attention in one forward pass, detached.

    Query t stands at index query_start + t of its sequence. Mechanisms without a softmax give what their projections
    give; mechanisms that fold a part of the keys (latent attention over a cache) give the folded form.

    Attributes:
        layer: whose it is.
        queries: (B, Hq, T, D) after norms and rotation, or None where they could not be read.
        keys: (B, G, S, D), likewise.
        values: (B, Gv, S, Dv), likewise.
        outputs: (B, H, T, Dv) of every head, before the output projection; gates included.
        value_of: which of the values each of the H heads reads.
        rules: how scores become patterns, or None.
        obstacle: why there are no patterns, or None.
    """

    layer: AttentionLayer
    queries: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    outputs: Tensor
    value_of: tuple[int, ...] = ()
    rules: Rules | None = field(default=None, repr=False)
    obstacle: str | None = field(default=None, repr=False)

    @property
    def num_keys(self) -> int:
        """Keys S that a query could see."""
        return self._parts()[1].shape[2]

    def pattern(self, rows: slice | None = None) -> Tensor:
        """Attention weights (B, H, t, S) of these queries (default: all), in float32, or float64 for float64.

        Rows add up to 1, except those that see nothing, those of layers with a sink in the denominator, and those of
        mechanisms that compose weights of several heads. Dropout is left out.

        Raises:
            ValueError: for a mechanism that has no such weights.
        """
        q, k, rules = self._parts()
        B, H, T, _ = q.shape
        rows = slice(*(slice(None) if rows is None else rows).indices(T)[:2])
        high = torch.promote_types(q.dtype, torch.float32)
        k = k.to(high)
        k = k if k.shape[1] == H else k.repeat_interleave(H // k.shape[1], dim=1)
        s = q[:, :, rows].to(high) @ k.mT * rules.scale
        if rules.softcap is not None:
            s = rules.softcap * torch.tanh(s / rules.softcap)
        if rules.bias is not None:
            s = s + (rules.bias if rules.bias.shape[-2] == 1 else rules.bias[..., rows, :]).to(high)
        if rules.slopes is not None:
            i, j = self._indices(rows)
            s = s - rules.slopes.to(high)[:, None, None] * (i[:, None] - j).abs()
        if rules.pre is not None:
            s = rules.pre.at(rows, slice(None))(s)
        visible, blind = rules.visible((B, s.shape[1], T, k.shape[2]), rows, q.device), None
        if visible is not None:
            blind = ~visible.any(-1, keepdim=True)
            s = s.masked_fill(~(visible | blind), -math.inf)
        if rules.sinks is None:
            p = torch.softmax(s, dim=-1)
        else:
            sink = torch.as_tensor(rules.sinks, dtype=high, device=s.device).reshape(1, -1, 1, 1)
            p = torch.softmax(torch.cat([s, sink.expand(*s.shape[:-1], 1)], -1), -1)[..., :-1]
        if blind is not None:
            p = p.masked_fill(blind, 0.0)
        if rules.post is not None:
            p = rules.post.at(rows, slice(None))(p)
        return p if rules.heads is None else p[:, list(rules.heads)]

    def pattern_blocks(self, block: int = _BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Query rows and their weights (B, H, block, S), from the first query to the last."""
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        T = self.outputs.shape[2]
        for first in range(0, T, block):
            rows = slice(first, min(T, first + block))
            yield rows, self.pattern(rows)

    def visible_counts(self, rows: slice) -> Tensor:
        """How many keys these queries see, broadcastable to (B, H, t)."""
        q, k, rules = self._parts()
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        visible = rules.visible(shape, rows, q.device)
        if visible is None:
            return torch.full((rows.stop - rows.start,), k.shape[2], device=q.device)
        return visible.expand(*visible.shape[:-1], k.shape[2]).sum(-1)

    def values_by_head(self) -> Tensor:
        """Values (B, H, S, Dv), one for every head."""
        if self.values is None:
            raise ValueError(f"layer {self.layer.name!r} has no values: {self.obstacle}")
        return self.values[:, list(self.value_of)]

    def _indices(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Where these queries and all keys stand in their sequence."""
        q, k, rules = self._parts()
        i = torch.arange(rows.start, rows.stop, device=q.device) + rules.query_start
        return i, torch.arange(k.shape[2], device=q.device) if rules.key_positions is None else rules.key_positions

    def _parts(self) -> tuple[Tensor, Tensor, Rules]:
        if self.queries is None or self.keys is None or self.rules is None:
            raise ValueError(f"layer {self.layer.name!r} has no attention patterns: {self.obstacle}")
        return self.queries, self.keys, self.rules
