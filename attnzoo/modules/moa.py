"""Mixture of attention heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.distributed.collectives import reduced
from attnzoo.modules.base import Factors, Mechanism, per_head
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.checks import check_prunable, starting_stds
from attnzoo.modules.heads import HeadLayout, attention_pairs, keep_entries, keep_rows
from attnzoo.ops.expert_projection import Routes, expert_linear_pieces
from attnzoo.ops.head_routing import Routing, router_losses
from attnzoo.ops.precision import autocasted
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import is_plain, local, own_shapes, precise_linear
from attnzoo.rotary import Rotary
from attnzoo.rules import SWITCH, check, check_sizes, one_of
from attnzoo.tracing import is_exported

GATE_MODES = ("topk_softmax", "softmax_topk", "softmax_topk_norm")
AUX_LOSSES = {"switch_z": ("switch", "z"), "mi": ("mi",), "cv": ("cv",), "none": ()}
"""Terms of `router_losses` that each auxiliary loss adds up."""


class Experts(nn.Module):
    """N matrices, weight (N, out, in)."""

    def __init__(self, experts: int, in_features: int, out_features: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features, **factory_kwargs))

    def forward(self, x: Tensor, routes: Routes, **options: Any) -> Tensor:
        """As `expert_linear_pieces` with these matrices."""
        return expert_linear_pieces(x, self.weight.to(x.dtype), routes, **options)

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(own_shapes(self))


class MixtureOfAttentionHeads(Mechanism):
    """Mixture of attention heads (Zhang et al. 2022, arXiv:2210.05144; causal as in JetMoE, arXiv:2404.07413).

    A router picks k of N experts for each token. An expert owns a query and an output projection of M heads; keys
    and values, G heads, are shared by all:

        l = Wr x, p = softmax(l);   e_1 .. e_k the largest
        q_s = rotate(Wq[e_s] x);    o_s = attention of q_s over the shared keys and values
        y = sum_s gate_s Wo[e_s] o_s + o_bias

    with gates softmax(l over the selected) ("topk_softmax"), p[e_s] ("softmax_topk"), or p[e_s] over its detached
    sum + 1e-6 ("softmax_topk_norm"). Router arithmetic is float32. The attention is that of k M grouped heads.

    There is no o_proj: per-head outputs pass through `head_outputs`, an identity, as (B, T, k M Dv), slot-major and
    multiplied by their gates; a hook there sees what o_proj's input is elsewhere.

    Tokens beyond the lengths of a padding mask are not routed: their y is o_bias, and they are in no loss. After a
    training forward `aux_loss` holds the auxiliary loss with its coefficients, and `routing` the statistics.

    Args:
        embed_dim: width E of input and output.
        num_heads: active heads k M of a token.
        num_kv_heads: key/value heads G. Default: 1.
        head_dim: width D of queries and keys. Default: E / (k M).
        num_experts: N. Default: 2 k.
        num_experts_per_tok: k. Default: num_heads / heads_per_expert.
        heads_per_expert: heads M of an expert; a multiple of G. Default: G.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context. Default: E.
        bias: whether the key and value projections have one.
        out_bias: whether there is one on the output.
        gate_mode: "topk_softmax", "softmax_topk" or "softmax_topk_norm".
        sample_topk: in training, so many of the k are drawn by their probability instead of taken.
        router_noise: learned noise on the logits in training.
        aux_loss: "switch_z" (load balance and squared log-sum-exp), "mi" (mutual information), "cv" or "none".
        switch_coef: of the load balance.
        z_coef: of the squared log-sum-exp.
        mi_coef: of the mutual information.
        cv_coef: of the squared coefficient of variation.
        rope: rotary position embedding, or None.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" and the names of softmax attention's backends with grouped projections, which are torch's or,
            with "triton" and on GPUs with "auto", kernels; "eager" computes all experts, which is the definition.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    input_layer = "k_proj"
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")
    routing: Routing | None = None
    aux_loss_group: Any = None
    o_bias: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int | None = None, num_kv_heads: int = 1, head_dim: int | None = None, *,
        num_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        heads_per_expert: int | None = None,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        gate_mode: str = "topk_softmax",
        sample_topk: int = 0,
        router_noise: bool = False,
        aux_loss: str = "switch_z",
        switch_coef: float = 0.01,
        z_coef: float = 0.001,
        mi_coef: float = 0.01,
        cv_coef: float = 0.01,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        causal: bool = True, dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        M = num_kv_heads if heads_per_expert is None else heads_per_expert
        check_sizes(embed_dim=embed_dim, num_kv_heads=num_kv_heads, heads_per_expert=M)
        if M % num_kv_heads:
            raise ValueError(f"heads_per_expert must be a multiple of num_kv_heads, got {M} and {num_kv_heads}")
        counts = {"num_heads": num_heads, "num_experts_per_tok": num_experts_per_tok}
        check_sizes(**{name: count for name, count in counts.items() if count is not None})
        if num_heads is None:
            num_heads = (2 if num_experts_per_tok is None else num_experts_per_tok) * M
        k = num_heads // M if num_experts_per_tok is None else num_experts_per_tok
        if k * M != num_heads:
            raise ValueError(f"num_heads must be num_experts_per_tok * heads_per_expert, got {num_heads}, {k} and {M}")
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, rope=rope, causal=causal,
            dropout=dropout, init_std=init_std, backend=backend, bias=bias, out_bias=out_bias, sample_topk=sample_topk,
            router_noise=router_noise, switch_coef=switch_coef, z_coef=z_coef, mi_coef=mi_coef, cv_coef=cv_coef,
            device=device, dtype=dtype,
        )  # fmt: skip
        N = 2 * k if num_experts is None else num_experts
        check_sizes(num_experts=N, num_experts_per_tok=k)
        if k > N:
            raise ValueError(f"num_experts_per_tok must be at most num_experts, got {k} and {N}")
        if not 0 <= sample_topk <= k:
            raise ValueError(f"sample_topk must lie between 0 and num_experts_per_tok {k}, got {sample_topk}")
        check("out_bias", out_bias, SWITCH)
        check("gate_mode", gate_mode, one_of(*GATE_MODES))
        check("aux_loss", aux_loss, one_of(*AUX_LOSSES))
        self.coefficients = {"switch": switch_coef, "z": z_coef, "mi": mi_coef, "cv": cv_coef}
        self.experts = HeadLayout.of(N)
        self.num_experts, self.num_experts_per_tok, self.heads_per_expert = N, k, M
        self.gate_mode, self.sample_topk, self.aux_loss_kind = gate_mode, sample_topk, aux_loss
        D, Dv = self.head_dim, self.v_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(embed_dim, N, False, **factory_kwargs)
        self.noise = nn.Linear(embed_dim, N, False, **factory_kwargs) if router_noise else None
        self.q_experts = Experts(N, embed_dim, M * D, **factory_kwargs)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * D, bias, **factory_kwargs)
        self.v_proj = nn.Linear(self.kdim, num_kv_heads * Dv, bias, **factory_kwargs)
        self.o_experts = Experts(N, M * Dv, embed_dim, **factory_kwargs)
        self.o_bias = nn.Parameter(torch.empty(embed_dim, **factory_kwargs)) if out_bias else None
        self._modules["head_outputs"] = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: everything normal with `std` (output experts `out_std`), biases and noise 0.

        The router too: with zeros every token would take the same experts.
        """
        std, out_std = starting_stds(self.init_std, std, out_std)
        for layer in (self.router, self.q_experts, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(self.o_experts.weight, std=out_std)
        noise = None if self.noise is None else self.noise.weight
        for zero in (self.k_proj.bias, self.v_proj.bias, self.o_bias, noise):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor.

        The router and the queries read x; a mask of single heads goes by key/value head, then slot.
        """
        call = begin(self, x, context, mask, positions, cache)
        (B, T, E), real = x.shape, call.real_tokens(x)
        slots, M, G, Dv = self.num_experts_per_tok, self.heads_per_expert, self.num_kv_heads, self.v_head_dim
        logits = self.router_logits(x)
        chosen, gates = self._gates(logits)
        gates = gates if real is None else gates * real[..., None].to(gates.dtype)
        routes = Routes.of(chosen.flatten(), self.num_experts)
        # Slots of a key/value head side by side, so that head h reads h // (k M / G).
        rows = self.read_by_all(autocasted(x)).reshape(B * T, 1, 1, E).expand(-1, -1, slots, -1)
        project = _product_with(self.q_experts, rows.dtype)
        q = project(rows, routes=routes, out_groups=G, backend=self.backend)
        q = qk_norm_rope(q.reshape(B, T, slots * M, self.head_dim), call.q_table, backend=self.backend)
        k, v = (projection(call.source).unflatten(-1, (G, -1)) for projection in (self.k_proj, self.v_proj))
        k = qk_norm_rope(k, call.k_table, backend=self.backend)
        with call.remember(k, v) as (k, v):
            out = softmax_attention(
                q, k, v, call.view, scale=self.scale, dropout=self.weight_dropout, backend=self.backend
            )  # fmt: skip
            out, factors = out.reshape(B * T, G, slots, M // G * Dv), self.read_by_all(gates).reshape(B * T, slots)
            project = _product_with(self.o_experts, out.dtype)
            if is_plain(self.head_outputs, nn.Identity):
                # Nobody looks at the heads' outputs, so the projection takes the gates.
                y = project(out, routes=routes, gates=factors, backend=self.backend)
            else:
                gated = out.transpose(1, 2) * factors.to(out.dtype)[..., None, None]
                gated = self.head_outputs(gated.reshape(B, T, slots * M * Dv))
                y = project(gated.reshape(B * T, 1, slots, M * Dv), routes=routes, backend=self.backend)
            y = y.reshape(B, T, slots, E).sum(2)
            y = y if self.tensor_group is None else reduced(y, self.tensor_group.group)
            self._keep_statistics(logits, chosen, gates, real)
            return y if self.o_bias is None else y + self.o_bias.to(y.dtype)

    @property
    def head_outputs(self) -> nn.Module:
        """The identity whose input is the output of every active head times its gate, (B, T, k M Dv), slot-major."""
        return self._modules["head_outputs"]  # type: ignore[return-value]

    def tensor_splits(self) -> dict[str, Any]:
        """The heads of every expert; the router is whole."""
        return {
            "k_proj": "groups", "v_proj": "groups", "q_experts.weight": 1, "o_experts.weight": 2, "router": "whole",
            "noise": "whole", "o_bias": "whole",
        }  # fmt: skip

    def tensor_obstacle(self, parts: int) -> str | None:
        """Ranks take heads of every expert, and the key/value heads that these read."""
        if self.heads_per_expert % parts or self.num_kv_heads % parts:
            return (
                "heads_per_expert and num_kv_heads must be multiples of the ranks, got "
                f"{self.heads_per_expert} and {self.num_kv_heads}"
            )
        return super().tensor_obstacle(parts)

    def take_heads(self, group: Any) -> None:
        """As the base's, and the heads of an expert."""
        super().take_heads(group)
        self.heads_per_expert //= group.size

    def observed_heads(self) -> tuple[int, ...]:
        """Attention goes by key/value head, then slot; the outputs by slot."""
        heads = torch.arange(self.num_heads).view(self.num_kv_heads, self.num_experts_per_tok, -1)
        return tuple(heads.transpose(0, 1).flatten().tolist())

    def router_logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, N) in float32, or float64 for float64; with learned noise in training."""
        logits = precise_linear(self.router, x)
        if self.noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(precise_linear(self.noise, x)) + 0.01)
        return logits

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their gates, both (B, T, k)."""
        probabilities = logits.softmax(-1)
        taken = self.num_experts_per_tok - (self.sample_topk if self.training else 0)
        chosen = logits.topk(taken, dim=-1).indices
        if taken < self.num_experts_per_tok:
            rest = (probabilities.detach() + 1e-6).scatter(-1, chosen, 0.0).flatten(0, 1)
            drawn = torch.multinomial(rest, self.num_experts_per_tok - taken).view(*logits.shape[:2], -1)
            chosen = torch.cat([chosen, drawn], dim=-1)
        if self.gate_mode == "topk_softmax":
            return chosen, logits.gather(-1, chosen).softmax(-1)
        gates = probabilities.gather(-1, chosen)
        if self.gate_mode == "softmax_topk_norm":
            gates = gates / (gates.detach().sum(-1, keepdim=True) + 1e-6)
        return chosen, gates

    def _keep_statistics(self, logits: Tensor, chosen: Tensor, gates: Tensor, real: Tensor | None) -> None:
        """Set `aux_loss` and `routing`, to None outside training; an exported program keeps neither."""
        if is_exported():
            return
        self.aux_loss, self.routing = None, None
        if self.training:
            terms, routing = router_losses(logits, chosen, gates, real, self.aux_loss_group)
            weighted = [self.coefficients[name] * terms[name] for name in AUX_LOSSES[self.aux_loss_kind]]
            self.aux_loss, self.routing = sum(weighted[1:], weighted[0]) if weighted else None, routing.detach()

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs, with grouped projections, of "projections", "router" and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv, E = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim, self.embed_dim
        return {
            "projections": 2 * T * E * H * (D + Dv) + 2 * keys * self.kdim * G * (D + Dv),
            "router": 2 * T * E * self.num_experts,
            "attention": 2 * H * (D + Dv) * attention_pairs(T, S, causal=self.causal),
        }

    def qk_circuit(self, part: str = "full") -> Factors:
        """As the base's, per head of every expert: N M pairs, whether or not the expert is chosen."""
        rows, size = self._part_rows(part), self.heads_per_expert // self.num_kv_heads
        wq = self.q_experts.weight.detach().view(self.num_experts, -1, self.head_dim, self.embed_dim)
        wk = per_head(self.k_proj, self.head_dim)
        return [(matrix[rows], wk[m // size, rows]) for expert in wq for m, matrix in enumerate(expert)]

    def ov_circuit(self) -> Factors:
        """As the base's, per head of every expert: N M pairs, without gates."""
        wv, size = self.value_weights(), self.heads_per_expert // self.num_kv_heads
        wo = self.o_experts.weight.detach().view(self.num_experts, self.embed_dim, -1, self.v_head_dim)
        return [(wv[m // size], expert[:, m]) for expert in wo for m in range(self.heads_per_expert)]

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the experts that are gone, ascending."""
        return self.experts.pruned

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove experts. The router chooses among the rest, as if their logits were -inf: not a mask of outputs.

        Raises:
            ValueError: also if fewer than num_experts_per_tok would be left.
        """
        left, k = self.experts.prune(indices), self.num_experts_per_tok
        if len(left.kept) < k:
            raise ValueError(f"indices must leave at least num_experts_per_tok {k} experts, got {len(left.kept)}")
        routers = [router for router in (self.router, self.noise) if router is not None]
        check_prunable(self)
        places, _ = self.experts.places(left)
        for router in routers:
            keep_rows(router, places)
        for experts in (self.q_experts, self.o_experts):
            experts.weight = keep_entries(experts.weight, places)
        self.experts, self.num_experts = left, len(left.kept)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        experts = f"{self.num_experts_per_tok} of {self.num_experts} experts of {self.heads_per_expert} heads"
        sizes = f"{self.embed_dim}, {self.num_heads} active heads, {experts}, head_dim={self.head_dim}"
        return ", ".join([sizes, f"rope={self.rope}", *own_shapes(self)])


def _product_with(experts: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`expert_linear_pieces` with the matrices of a submodule; one that is not plain is called instead."""
    if not isinstance(experts, Experts) or not is_plain(experts, Experts):
        return experts
    return partial(expert_linear_pieces, weight=local(experts.weight).to(dtype))
