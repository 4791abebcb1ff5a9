"""Mixture-of-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import keep_rows
from attnzoo.ops.head_routing import (
    Routing,
    load_balance_loss,
    query_norm_gates,
    routed_attention,
    runs_packed_kernels,
    two_stage_gates,
)
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import precise_linear
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_options, one_of
from attnzoo.tracing import has_values, is_exported

ROUTERS = {"two_stage": ("scaled", "paper"), "query_norm": ("binary",)}
"""Gate forms of each router, the default first."""


class MixtureOfHeadAttention(GroupedQueryAttention):
    """Mixture-of-head attention (Jin et al. 2024, arXiv:2410.11842).

    Grouped-query attention whose head outputs are weighed by gates that depend on the token:

        y_t = sum_h gate_t,h Wo_h o_t,h

    The first Hs heads are shared and always active; of the R = H - Hs others each token takes K. Router "two_stage":

        sel = the K largest of Wr x;  u = softmax of those logits;  s = softmax(Ws x);  a = 2 softmax(Wh x)
        gate_h = a_0 Hs s_h (shared),   a_1 K u_i (selected),   0 (others)

    so that indifferent routers give plain attention of the active heads. Router "query_norm" has no parameters: the K
    routed heads with the longest queries, before the rotation, get 1. It turns trained attention into this
    (`conversion.to_moh`). Router arithmetic is float32.

    Inactive heads are computed and multiplied by 0 in the dense form. The sparse form computes active pairs of token
    and head alone, with the same gradients; "auto" takes it for long causal inputs with few active heads, where it is
    faster. It is not for ste="all" in training, whose gradient needs the outputs of all heads.

    After a training forward `aux_loss` is aux_loss_coef times R sum_i P_i f_i (P mean probability, f frequency; the
    value is K when balanced), and `routing` holds the statistics. `attnzoo.aux_loss` adds layers up, where the paper
    takes their mean: divide the coefficient by the number of layers for the same weight. Padded tokens count in
    neither.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        num_shared_heads: Hs. Default: H // 2.
        num_routed_active: K. Default: H // 4.
        router: "two_stage" or "query_norm".
        gate_form: "scaled" (as the authors' code runs it) or "paper" (as printed) for two_stage; "binary" for
            query_norm.
        ste: gradient of query_norm's selection: through "all" routed gates, the "active" ones, or "none". two_stage
            has none.
        aux_loss_coef: of the load balance.
        sparse: "auto", True (always in self-attention without a cache) or False. With our kernels, so on GPUs, "auto"
            is sparse wherever the sparse form can serve the call.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context. Default: E.
        vdim: width of the context that values are made from. Default: kdim.
        bias: whether the four projections have one.
        rope: rotary position embedding, or None.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' and routers' normal initialisation.
        backend: as in `GroupedQueryAttention`; the sparse form runs with "auto", "sdpa" and "triton" only.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    sequence_forms: tuple[str, ...] = ("ring", "heads", "gather")
    routing: Routing | None = None
    aux_loss_group: Any = None
    routed_router: nn.Linear | None
    shared_router: nn.Linear | None
    type_router: nn.Linear | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        num_shared_heads: int | None = None,
        num_routed_active: int | None = None,
        router: str = "two_stage",
        gate_form: str | None = None,
        ste: str = "all",
        aux_loss_coef: float = 0.01,
        sparse: bool | str = "auto",
        v_head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = False,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        causal: bool = True, dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, vdim=vdim, bias=bias,
            rope=rope, causal=causal, dropout=dropout, init_std=init_std, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        check_options(
            num_shared_heads=num_shared_heads, num_routed_active=num_routed_active, ste=ste, sparse=sparse,
            aux_loss_coef=aux_loss_coef,
        )  # fmt: skip
        check("router", router, one_of(*ROUTERS))
        shared = num_heads // 2 if num_shared_heads is None else num_shared_heads
        active = num_heads // 4 if num_routed_active is None else num_routed_active
        routed = num_heads - shared
        if not 0 <= shared <= num_heads:
            raise ValueError(f"num_shared_heads must lie between 0 and num_heads {num_heads}, got {shared}")
        if not 0 <= active <= routed:
            raise ValueError(f"num_routed_active must lie between 0 and the {routed} routed heads, got {active}")
        if shared + active == 0:
            raise ValueError("num_shared_heads and num_routed_active must not both be 0: no head would be active")
        if active == 0 and routed:
            raise ValueError(f"num_routed_active must be at least 1 unless all heads are shared, got 0 of {routed}")
        gate_form = ROUTERS[router][0] if gate_form is None else gate_form
        if not isinstance(gate_form, str) or gate_form not in ROUTERS[router]:
            raise ValueError(f"gate_form of router {router!r} must be one of {ROUTERS[router]}, got {gate_form!r}")
        if router != "query_norm" and ste != "all":
            raise ValueError(
                f"ste needs router 'query_norm', whose selection has a gradient, got {ste!r} and {router!r}"
            )
        if router == "query_norm" and routed < 2:
            raise ValueError(f"router 'query_norm' needs at least 2 routed heads, got {routed}")
        self.num_shared_heads = self._shared_factor = shared
        self.num_routed_active = active
        self.router, self.gate_form, self.ste = router, gate_form, ste
        self.aux_loss_coef = aux_loss_coef
        self.sparse = sparse
        two_stage = router == "two_stage"
        factory_kwargs: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.routed_router = nn.Linear(embed_dim, routed, **factory_kwargs) if two_stage and active else None
        self.shared_router = nn.Linear(embed_dim, shared, **factory_kwargs) if two_stage and shared > 1 else None
        self.type_router = nn.Linear(embed_dim, 2, **factory_kwargs) if two_stage and shared and active else None
        # Normal as the projections and never 0, or every token would take the same heads.
        self.reset_parameters()

    def splits_evenly(self, parts: int) -> bool:  # noqa: ARG002
        """Never: routed heads carry different loads."""
        return False

    @property
    def active_share(self) -> float:
        """Active heads of a token over all heads."""
        return (self.num_shared_heads + self.num_routed_active) / max(self.num_heads, 1)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`. Routing reads x."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        gates, active, probability = self.gates(x, q)
        gates = self.own_heads(gates)
        q = qk_norm_rope(q, call.q_table, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, backend=self.backend)
        with call.remember(k, v) as (k, v):
            k, v = self.heads.spread(k, v)
            if self._runs_sparse(q, v, call):
                out = routed_attention(q, k, v, active, call.view, scale=self.scale, gates=gates, backend=self.backend)
            else:
                out = softmax_attention(
                    q, k, v, call.view, head_scale=gates, bias=call.bias, **self.score_options(q.device)
                )
            y: Tensor = self.o_proj(out.flatten(2))
            self._keep_statistics(active, probability, call.real_tokens(x))
            return y

    def gates(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates (B, T, H), the selected routed heads and their probabilities (B, T, R), from x and raw queries."""
        K, Hs, dtype = self.num_routed_active, self.num_shared_heads, torch.promote_types(x.dtype, torch.float32)
        if self.router == "query_norm":
            return query_norm_gates(q[:, :, Hs:].to(dtype).norm(dim=-1), active=K, num_shared=Hs, ste=self.ste)
        routed, shared, kinds = (None if router is None else precise_linear(router, x) for router in self._routers())
        routed = x.new_zeros(*x.shape[:2], 0, dtype=dtype) if routed is None else routed
        return two_stage_gates(routed, shared, kinds, active=K, num_shared=self._shared_factor, form=self.gate_form)

    def _routers(self) -> tuple[nn.Linear | None, nn.Linear | None, nn.Linear | None]:
        return self.routed_router, self.shared_router, self.type_router

    def _keep_statistics(self, active: Tensor, probability: Tensor, real: Tensor | None) -> None:
        """Set `aux_loss` and `routing`, to None outside training; an exported program keeps neither."""
        if is_exported():
            return
        self.aux_loss, self.routing = None, None
        if self.training and probability.shape[-1]:
            routing = Routing.of(active, probability, real, self.aux_loss_group)
            self.aux_loss, self.routing = self.aux_loss_coef * load_balance_loss(routing), routing.detach()

    def _runs_sparse(self, q: Tensor, v: Tensor, call: Call) -> bool:
        if self.sparse is False or call.cache is not None:
            return False
        obstacle, mask = None, call.view.mask
        if self.tensor_group is not None:
            obstacle = "the heads are spread over processes"
        elif call.view.shards is not None:
            obstacle = "the tokens are spread over processes"
        elif not self.causal:
            obstacle = "it is for causal self-attention without a cache"
        elif mask is not None and mask.dense_mask is not None:
            obstacle = "a dense mask has an entry for every pair"
        elif self.weight_dropout:
            obstacle = f"it has no dropout, got {self.dropout}"
        elif self.router == "query_norm" and self.ste == "all" and self.training and torch.is_grad_enabled():
            obstacle = "the gradient of ste='all' needs the outputs of all heads; choose ste='active'"
        elif self.backend not in ("auto", "sdpa", "triton"):
            obstacle = f"it runs with backend 'auto', 'sdpa' or 'triton', got {self.backend!r}"
        elif not has_values(q) and not runs_packed_kernels(q, v, call.view, self.backend):
            obstacle = "it waits for the routing, which a compiled graph cannot"
        if self.sparse is True and obstacle is not None:
            raise ValueError(f"sparse=True cannot run: {obstacle}")
        if self.sparse is True or obstacle is not None:
            return obstacle is None
        if runs_packed_kernels(q, v, call.view, self.backend):
            return self.active_share < 1
        # Where packing has paid for itself on a CPU; elsewhere it would wait for the routing.
        return q.device.type == "cpu" and self.active_share <= 0.5 and q.shape[1] >= 4096

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, with all heads; and "router"."""
        rows = sum(router.out_features for router in self._routers() if router is not None)
        return {**super().flops_by_part(T, S), "router": 2 * T * self.embed_dim * rows}

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's; routers are whole, since they choose among the heads of all ranks."""
        return {**super().tensor_splits(), **dict.fromkeys(("routed_router", "shared_router", "type_router"), "whole")}

    def tensor_obstacle(self, parts: int) -> str | None:
        """As the base's."""
        if self.router == "query_norm":
            return "router 'query_norm' compares the queries of all heads"
        return "sparse must not be True" if self.sparse is True else super().tensor_obstacle(parts)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """As the base's, and of the routers: as if the other heads' logits were -inf, not a mask of their outputs.

        Raises:
            ValueError: if fewer routed heads than num_routed_active would be left, or no shared one.
        """
        shared = [h for h in heads if h < self.num_shared_heads]
        routed = [h - self.num_shared_heads for h in heads if h >= self.num_shared_heads]
        K, left = self.num_routed_active, len(routed)
        if left < K:
            raise ValueError(f"indices must leave at least num_routed_active {K} routed heads, got {left}")
        if self.num_shared_heads and not shared:
            raise ValueError("indices must leave a shared head, got none")
        cut = [(router, rows) for router, rows in zip(self._routers(), (routed, shared), strict=False) if router]
        super().keep_heads(heads, groups)
        for router, rows in cut:
            keep_rows(router, rows)
        self.num_shared_heads = len(shared)
