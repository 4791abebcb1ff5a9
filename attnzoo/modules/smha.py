"""Selective multi-head attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import ComposedCache
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention, take_groups
from attnzoo.modules.heads import keep_entries, keep_rows
from attnzoo.ops.head_routing import Routing, load_balance_loss, top_heads
from attnzoo.ops.observation import current_observer
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import precise_linear
from attnzoo.rotary import rotary_table, rotate
from attnzoo.rules import check, check_options, check_sizes, describe, one_of
from attnzoo.tracing import has_values, is_exported

GATES = ("normalized", "softmax", "none")
LACKS = ("qk_norm", "scale", "logit_softcap", "alibi", "sliding_window", "sink", "kdim", "vdim")
"""Options of grouped-query attention that there are none of here."""


class SelectiveMultiHeadAttention(GroupedQueryAttention):
    """Selective multi-head attention (Yang et al. 2025, arXiv:2503.02495): a head's tokens are those that chose it.

        sel_t = the k largest of l_t = Wr x_t + br;   S_h = {t : h in sel_t}
        o_t,h = sum_{j in S_h, j <= t} softmax_j(q_t,h . k_j,h / sqrt(D)) v_j,h,   t in S_h
        y_t = sum_{h in sel_t} gate_t,h (Wo_h o_t,h + bo_h)
        gate = k softmax over sel_t of l_t ("normalized"), softmax over all heads of l_t ("softmax"), or 1 ("none")

    With "none", as in the authors' code, the router gets no gradient. Router arithmetic is float32. Their code fills
    the lists of a batch up to one length with tokens that did not choose the head, which lets later tokens and other
    sequences leak in; there is no filler here.

    The dense form masks the keys that did not choose a head. The packed form computes attention within each head's own
    list, of a share k / H of the tokens when balanced, with the same gradients.

    After a training forward `aux_loss` is aux_loss_coef (H / k) sum_h f_h P_h (f share of the tokens that chose h, P
    mean probability; the sum is 1 when balanced), and `routing` holds the statistics.

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H.
        head_dim: width D of a head. Default: E / H.
        num_active: k. Default: H // 2, at least 1.
        gate_mode: "normalized", "softmax" or "none".
        rope_positions: a token is rotated by its "original" position, or by its "rank" in the head's list, as in the
            authors' code.
        head_out_bias: whether each head has an output bias bo_h.
        aux_loss_coef: of the load balance.
        bias: whether q, k and v projections have one.
        packed: "auto" (causal self-attention of 1,024 tokens or more without a mask and a cache, at most half of the
            heads active, on a CPU), True or False.
        options: those of `GroupedQueryAttention` but LACKS; o_bias is False.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = ComposedCache
    reads_token_index = True
    routing: Routing | None = None
    aux_loss_group: Any = None
    router: nn.Linear
    o_head_bias: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int | None = None, *,
        num_active: int | None = None,
        gate_mode: str = "normalized",
        rope_positions: str = "original",
        head_out_bias: bool = False,
        aux_loss_coef: float = 0.01,
        bias: bool = True,
        packed: bool | str = "auto",
        **options: Any,
    ) -> None:  # fmt: skip
        for name in LACKS:
            if (given := options.get(name)) is not None and given is not False:
                raise ValueError(f"{name} is no option of selective multi-head attention, got {given!r}")
        take_groups(options, num_heads, f"num_heads {num_heads}")
        super().__init__(embed_dim, num_heads, num_heads, head_dim, bias=bias, **{"o_bias": False} | options)
        k = max(self.num_heads // 2, 1) if num_active is None else num_active
        (k,) = check_sizes(num_active=k)
        if k > num_heads:
            raise ValueError(f"num_active must be at most num_heads {num_heads}, got {k}")
        check("gate_mode", gate_mode, one_of(*GATES))
        check("rope_positions", rope_positions, one_of("original", "rank", words="be 'original' or 'rank'"))
        check_options(aux_loss_coef=aux_loss_coef, packed=packed, head_out_bias=head_out_bias)
        self.num_active, self.gate_mode, self.rope_positions = k, gate_mode, rope_positions
        self.aux_loss_coef, self.packed = aux_loss_coef, packed
        factory_kwargs: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.router = nn.Linear(embed_dim, num_heads, **factory_kwargs)
        self.o_head_bias = nn.Parameter(torch.zeros(num_heads, embed_dim, **factory_kwargs)) if head_out_bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's, the router too; output biases of heads are 0."""
        super().reset_parameters(std, out_std)
        if (bias := getattr(self, "o_head_bias", None)) is not None:
            nn.init.zeros_(bias)

    sequence_forms: tuple[str, ...] = ("gather",)
    sequence_cache = False

    def sequence_obstacle(self) -> str | None:
        """Numbers in a head's list count tokens of all ranks."""
        if self.rope_positions == "rank" and self.rope is not None:
            return "rope_positions must be 'original', since numbers in a list count tokens of all ranks, got 'rank'"
        return "packed must not be True" if self.packed is True else None

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`.

        There is no cross-attention: a context would have to choose heads too.
        """
        if context is not None:
            raise ValueError(
                f"context must be None: keys are those of tokens of x that chose the head, got {describe(context)}"
            )
        if positions is not None and self.rope_positions == "rank":
            raise ValueError("positions must be None with rope_positions 'rank': tokens go by their number in a list")
        call = begin(self, x, None, mask, positions, cache)
        q, k, v = self.project(x, x, x)
        gates, chosen, routing = self.gates(x, call)
        q, k = call.rotate(q, k) if self.rope_positions == "original" else self.rotate_by_rank(q, k, chosen, call)
        with call.remember(k, v, chosen.to(v.dtype)[:, :, None]) as (k, v, known):
            if self._runs_packed(x, call):
                out = packed_attention(q, k, v, chosen, self.score_options(q.device)) * gates.to(v.dtype)[..., None]
            else:
                keys = AttentionMask.dense(known[:, :, 0].transpose(1, 2)[:, :, None] > 0)
                own = call.view.mask
                view = replace(call.view, mask=keys if own is None else own & keys)
                out = softmax_attention(q, k, v, view, head_scale=gates, bias=call.bias, **self.score_options(q.device))
            y: Tensor = self.o_proj(out.flatten(2))
            self._keep_statistics(routing)
            return y if self.o_head_bias is None else y + gates.to(y.dtype) @ self.o_head_bias.to(y.dtype)

    def gates(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Routing | None]:
        """Gates (B, T, H), 0 for heads that a token did not choose; who is on each head's list, without padding.

        And, in training, the statistics with their gradients.
        """
        logits, k = precise_linear(self.router, x), self.num_active
        chosen, probability, real = top_heads(logits, k), logits.softmax(-1), call.real_tokens(x)
        if self.gate_mode == "normalized":
            gates = k * logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        else:
            gates = chosen.to(logits.dtype) if self.gate_mode == "none" else probability * chosen
        routing = None
        if self.training and not is_exported():
            routing = Routing.of(chosen, probability, real, self.aux_loss_group)
        chosen = chosen if real is None else chosen & real[..., None]
        return self.own_heads(gates), self.own_heads(chosen), routing

    def _keep_statistics(self, routing: Routing | None) -> None:
        """Set `aux_loss` and `routing`, to None outside training; an exported program keeps neither."""
        if is_exported():
            return
        self.aux_loss, self.routing = None, None
        if routing is not None:
            self.aux_loss = self.aux_loss_coef / self.num_active * load_balance_loss(routing)
            self.routing = routing.detach()

    def no_weight_decay(self) -> set[str]:
        """The output biases of heads, which are a matrix."""
        return set() if self.o_head_bias is None else {"o_head_bias"}

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's; the router is whole."""
        return {**super().tensor_splits(), "router": "whole", "o_head_bias": "whole"}

    def tensor_obstacle(self, parts: int) -> str | None:
        """As the base's."""
        if self.o_head_bias is not None or self.packed is True:
            return "head_out_bias and packed must not be True"
        return super().tensor_obstacle(parts)

    def rotate_by_rank(self, q: Tensor, k: Tensor, chosen: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, H, D) rotated by their number in the head's list, which restarts in documents."""
        if self.rope is None:
            return q, k
        (B, T), mask, cache = q.shape[:2], call.view.mask, call.cache
        rank = chosen.long().cumsum(1) - chosen.long()
        index = None if mask is None else mask.positions(B, T)
        if index is not None:
            start = torch.arange(T, device=q.device) - index
            rank = rank - rank.gather(1, start[..., None].expand_as(rank))
        if cache is not None:
            cache.check_batch(B)
            rank = rank + cache.buffers[2][:, 0, : call.past].sum(1, keepdim=True, dtype=torch.float64).long()
        length = call.past + T if cache is None else cache.max_length
        cos, sin = rotary_table(self.rope, self.rope_dim, rank, length=length, dtype=q.dtype, device=q.device)
        return tuple(rotate(z, cos, sin, self.rope.style, per_head=True) for z in (q, k))  # type: ignore[return-value]

    def _runs_packed(self, x: Tensor, call: Call) -> bool:
        if self.packed is False:
            return False
        obstacle = None
        if call.view.shards is not None:
            obstacle = "the tokens are spread over processes"
        elif not self.causal or call.view.mask is not None or call.cache is not None:
            obstacle = "it is for causal self-attention without a mask and a cache"
        elif self.weight_dropout:
            obstacle = f"it has no dropout, got {self.dropout}"
        elif not has_values(x):
            obstacle = "it waits for the routing, which a compiled graph cannot"
        if self.packed is True and obstacle is not None:
            raise ValueError(f"packed=True cannot run: {obstacle}")
        if self.packed is True or obstacle is not None:
            return obstacle is None
        # Observers want the scores of all pairs; the form has not been timed on a GPU.
        few = x.device.type == "cpu" and 2 * self.num_active <= self.num_heads
        return few and current_observer() is None and x.shape[1] >= 1024

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """Keys and values of all heads, and which heads a token chose."""
        return *super().cache_widths(), (1, self.num_heads)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, with all pairs as in the dense form, and output biases of heads; and "router"."""
        parts, product = super().flops_by_part(T, S), 2 * T * self.embed_dim * self.num_heads
        if self.o_head_bias is not None:
            parts["projections"] += product
        return {**parts, "router": product}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """As the base's, and of the router: as if the other heads' logits were -inf, not a mask of their outputs.

        Raises:
            ValueError: if fewer heads than num_active would be left.
        """
        if len(heads) < self.num_active:
            raise ValueError(f"indices must leave at least num_active {self.num_active} heads, got {len(heads)}")
        super().keep_heads(heads, groups)
        keep_rows(self.router, heads)
        if self.o_head_bias is not None:
            self.o_head_bias = keep_entries(self.o_head_bias, heads)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, options: dict[str, Any]) -> Tensor:
    """Causal attention of every head among the tokens that chose it; what stands for others has no meaning.

    The lists come first in their rows, in time order, so that causality hides from them what fills the rows.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, T, H, D).
        v: values (B, T, H, Dv).
        chosen: (B, T, H) boolean.
        options: of `softmax_attention`.
    """
    B, H = q.shape[0], q.shape[2]
    lists = chosen.transpose(1, 2).flatten(0, 1)
    longest = int(lists.sum(1).max()) if lists.numel() else 0
    order = (~lists).to(torch.int8).argsort(dim=1, stable=True)[:, :longest, None]
    rows = [z.transpose(1, 2).flatten(0, 1) for z in (q, k, v)]
    q, k, v = (z.gather(1, order.expand(-1, -1, z.shape[2]))[:, :, None] for z in rows)
    heads = softmax_attention(q, k, v, Visibility(), **options)[:, :, 0]
    out = torch.zeros_like(rows[2]).scatter(1, order.expand(-1, -1, v.shape[3]), heads)
    return out.view(B, H, *out.shape[1:]).transpose(1, 2)
