"""Gated attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import keep_rows
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rules import check, check_options, one_of

GATES = ("output", "value", "key", "query", "dense")


class GatedAttention(GroupedQueryAttention):
    """Gated attention (Qiu et al. 2025, arXiv:2505.06708), in production in Qwen3-Next.

    Grouped-query attention with a sigmoid gate, a further projection of the layer's input, at one of five positions:

        gate = sigmoid(z Wg + bg)

        "output"  o_h = gate_h * o_h       after the weighted sum: the paper's best
        "value"   v_g = gate_g * v_g       after v_proj
        "key"     k_g = gate_g * k_g       after k_proj, before norm and rotation
        "query"   q_h = gate_h * q_h       after q_proj, before norm and rotation
        "dense"   y = gate * y             after o_proj and its bias

    z is x, or of a key or value gate what keys or values are made from. A gate has a number for each feature
    ("elementwise") or for each head ("headwise"). The cache holds gated keys and values; no gate depends on positions.

    `qk_circuit` and `ov_circuit` are those without the gate, which is not linear.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        gate: position, see above.
        gate_type: "elementwise" or "headwise".
        gate_bias: whether g_proj has one. Default: bias.
        options: the keyword options of `GroupedQueryAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    shown = ("gate", "gate_type", *GroupedQueryAttention.shown)
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        gate: str = "output",
        gate_type: str = "elementwise",
        gate_bias: bool | None = None,
        bias: bool = False,
        qk_norm: bool | str = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias=bias, qk_norm=qk_norm, **options)
        check("gate", gate, one_of(*GATES))
        check_options(gate_type=gate_type, gate_bias=gate_bias)
        headwise = gate_type == "headwise"
        if headwise and gate == "dense":
            raise ValueError("gate_type must be 'elementwise' with gate 'dense', which has no heads, got 'headwise'")
        # A joint norm of one head is that head's.
        alone = {"query": self.num_heads, "key": self.num_kv_heads}.get(gate) == 1
        if headwise and gate in ("query", "key") and qk_norm and (qk_norm is True or alone):
            raise ValueError(
                f"gate_type must be 'elementwise' with gate {gate!r} and qk_norm, which cancels a factor of a head, "
                "got 'headwise'"
            )
        self.gate, self.gate_type = gate, gate_type
        D, Dv = self.head_dim, self.v_head_dim
        self.gate_width = 1 if headwise else {"output": Dv, "value": Dv, "dense": embed_dim}.get(gate, D)
        heads = {"output": self.num_heads, "query": self.num_heads, "dense": 1}.get(gate, self.num_kv_heads)
        self.g_proj = nn.Linear(
            {"key": self.kdim, "value": self.vdim}.get(gate, embed_dim), heads * self.gate_width,
            bias if gate_bias is None else gate_bias, device=options.get("device"), dtype=options.get("dtype"),
        )  # fmt: skip
        self.reset_parameters()

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`."""
        call = begin(self, x, context, mask, positions, cache)
        key, value = call.sources
        logits = self.g_proj({"key": key, "value": value}.get(self.gate, x)).unflatten(2, (-1, self.gate_width))
        q, k, v = self.project(x, key, value)
        q = qk_norm_rope(self.gated("query", q, logits), call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(self.gated("key", k, logits), call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k, self.gated("value", v, logits)) as (k, v):
            k, v = self.heads.spread(k, v)
            output_gate = logits if self.gate == "output" else None
            out = softmax_attention(
                q, k, v, call.view, output_gate=output_gate, bias=call.bias, **self.score_options(q.device)
            )
            return self.gated("dense", self.o_proj(out.flatten(2)), logits.flatten(2))

    def gated(self, position: str, states: Tensor, logits: Tensor) -> Tensor:
        """The states times the gate, if this is its position."""
        return states * torch.sigmoid(logits).to(states.dtype) if position == self.gate else states

    def gate_layers(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """The gate; that of "key" or "value" is shared by a group, that of "dense" by all heads."""
        every = tuple(range(self.num_heads))
        reads = {"output": every, "query": every, "dense": (0,) * self.num_heads}.get(self.gate, self.heads.reads)
        return {"gate": (self.g_proj, reads)}

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and "gate"."""
        keys = T if S is None or self.causal else S
        tokens = keys if self.gate in ("key", "value") else T
        gate = 2 * tokens * self.g_proj.in_features * self.g_proj.out_features
        return {**super().flops_by_part(T, S), "gate": gate}

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's, and the gate by the heads at its position."""
        kind = {"output": "heads", "query": "heads", "dense": "whole"}.get(self.gate, "groups")
        return {**super().tensor_splits(), "g_proj": kind}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads."""
        super().keep_heads(heads, groups)
        if self.gate != "dense":
            keep_rows(self.g_proj, heads if self.gate in ("output", "query") else groups, self.gate_width)
