"""Transformer attention bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.modules.call import Mask, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import masked_softmax
from attnzoo.ops.softmax_attention import constant, softmax_attention
from attnzoo.rules import describe, is_integer


class TABAttention(GroupedQueryAttention):
    """Attention bottleneck of encoders (Rahmanzadehgervi et al. 2024, arXiv:2412.18675).

    One head of width E, with a gate that closes as a class token attends to nothing but the context's class token:

        a = softmax(q k^T / sqrt(E))                     token 0 of x and of the context is the class token
        a'_r = a_r (1 - a_r,0) for gated rows r,         a'_r = a_r for the others
        y = a' v Wo + bo

    1 - a_r,0 is the attention to patches. Where it is 0 the row is the bias bo alone. Used without a residual around
    it, all that an encoder says about its image passes through the gated row, where a user can replace the weights
    (`attn_override`). A mechanism for encoders: it is never causal, has no positions and no cache.

    Args:
        embed_dim: width E of input and output, and of the one head.
        kdim: width of the context. Default: E.
        vdim: width of the context that values are made from. Default: kdim.
        gate_rows: the gated tokens of x.
        bottleneck_index: the key that closes the gate.
        bias: whether the projections have one.
        dropout: probability of dropping an attention weight in training.
        backend: "auto", "eager", "sdpa", "flash" or "triton", of rows that are not gated.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    takes_bias = False
    sequence_reason = "its gated rows belong to single tokens of an image"

    def __init__(
        self, embed_dim: int,
        kdim: int | None = None,
        vdim: int | None = None,
        *,
        gate_rows: Sequence[int] = (0,),
        bottleneck_index: int = 0,
        bias: bool = True,
        dropout: float = 0.0, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, 1, kdim=kdim, vdim=vdim, bias=bias, rope=None, causal=False, dropout=dropout, init="xavier",
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        rows = tuple(gate_rows) if isinstance(gate_rows, Sequence) else (gate_rows,)
        for name, indices in (("gate_rows", rows), ("bottleneck_index", (bottleneck_index,))):
            if not all(is_integer(index) and index >= 0 for index in indices) or len(set(indices)) < len(indices):
                raise ValueError(f"{name} must hold token numbers from 0 on, each once, got {indices}")
        self.gate_rows = rows
        self.bottleneck_index = bottleneck_index

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: None = None, cache: None = None, attn_override: Tensor | None = None, need_weights: bool = False,
        gated: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """x (B, T, E) -> (B, T, E), and with need_weights the weights (B, T, S).

        Args:
            x: queries; its gated rows are usually the class token.
            context: (B, S, kdim), or a pair (key input, value input). Default: x.
            mask: boolean, broadcastable to (B, 1, T, S), True = may attend; or an AttentionMask.
            positions: must be None.
            cache: must be None.
            attn_override: weights of gated rows to use instead of their own, before the gate: (B, S), or (B, S - 1) of
                all keys but the bottleneck, which gets the rest of 1. Not negative and of sum 1 at most, which is not
                checked on a GPU.
            need_weights: return the weights too, before the gate.
            gated: return them after it.
        """
        if positions is not None or cache is not None:
            raise ValueError("positions and cache must be None: TABAttention has no positions and serves no decoder")
        call = begin(self, x, context, mask)
        q, k, v = self.project(x, *call.sources)
        (B, T, _, _), S = q.shape, k.shape[1]
        for name, indices, tokens in (
            ("gate_rows", self.gate_rows, T),
            ("bottleneck_index", (self.bottleneck_index,), S),
        ):
            if any(index >= tokens for index in indices):
                raise ValueError(f"{name} must be below the {tokens} tokens given, got {indices}")
        visible = call.view.dense((B, 1, T, S), x.device)
        gated_rows = constant(self.gate_rows, x.device, torch.long)
        # Weights of all rows where they are asked for, else of the gated ones.
        rows, at = (slice(None), gated_rows) if need_weights else (gated_rows, slice(None))
        seen = None if visible is None else visible.expand(B, 1, T, S)[:, 0, rows]
        a = self._weights(q[:, rows, 0], k[:, :, 0], seen)
        own = a[:, at]
        if attn_override is not None:
            own = self._override(attn_override, B, S).to(a)[:, None].expand_as(own)
        closed = own * (1 - own[..., self.bottleneck_index : self.bottleneck_index + 1])
        out = softmax_attention(q, k, v, call.view, **self.score_options(q.device))[:, :, 0]
        p = F.dropout(closed, self.weight_dropout) if self.weight_dropout else closed
        y: Tensor = self.o_proj(out.index_copy(1, gated_rows, (p.to(v.dtype) @ v[:, :, 0]).to(out.dtype)))
        return (y, a.index_copy(1, gated_rows, closed if gated else own)) if need_weights else y

    def _weights(self, q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
        """Weights (B, R, S) of queries (B, R, E) in float32, or float64."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q):
            return masked_softmax(q.to(wide) @ k.to(wide).mT * self.scale, visible)

    def _override(self, weights: Tensor, batch: int, keys: int) -> Tensor:
        """Weights (B, S) of the gated rows."""
        if not isinstance(weights, Tensor):
            raise ValueError(f"attn_override must be a tensor, got {describe(weights)}")
        if tuple(weights.shape) not in ((batch, keys), (batch, keys - 1)) or not weights.is_floating_point():
            raise ValueError(
                f"attn_override must be floating of shape ({batch}, {keys}) or ({batch}, {keys - 1}), got "
                f"{weights.dtype} of shape {tuple(weights.shape)}"
            )
        if weights.device.type == "cpu" and weights.numel() and not torch.compiler.is_compiling():
            low, most = float(weights.detach().min()), float(weights.detach().sum(-1).max())
            if not (low >= 0 and most <= 1 + 1e-6):
                raise ValueError(f"attn_override must not be negative and add up to 1 at most, got {low} and {most}")
        if weights.shape[1] == keys:
            return weights
        i = self.bottleneck_index
        return torch.cat([weights[:, :i], 1 - weights.sum(-1, keepdim=True), weights[:, i:]], dim=1)

    def prune_heads(self, indices: Any) -> None:
        """There is one head, and it stays."""
        raise ValueError(f"indices cannot be pruned of TABAttention, which has one head, got {indices!r}")
