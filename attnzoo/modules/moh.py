"""Mixture-of-head attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backends import triton_obstacle
from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import check_cache, check_input
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.positions import rotary_tables
from attnzoo.ops.head_routing import (
    load_balance_loss,
    query_norm_gates,
    routed_attention,
    runs_packed_kernels,
    two_stage_gates,
)
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotate

ROUTERS = {"two_stage": ("scaled", "paper"), "query_norm": ("binary",)}
"""Gate forms of each router, the default first."""


@dataclass(frozen=True)
class HeadRouting:
    """What the router of the last training forward did, detached, for diagnostics.

    Attributes:
        load: (R,) share of the real tokens that selected each routed head.
        probability: (R,) its mean probability.
        entropy: mean entropy of a token's probabilities, in nats.
    """

    load: Tensor
    probability: Tensor
    entropy: Tensor


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
        ste: gradient of query_norm's selection: through "all" routed gates, the "active" ones, or "none".
        aux_loss_coef: of the load balance.
        sparse: "auto", True (always in self-attention without a cache) or False. With backend="triton" "auto" is
            sparse wherever the sparse form can serve the call.
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

    routing: HeadRouting | None = None
    routed_router: nn.Linear | None
    shared_router: nn.Linear | None
    type_router: nn.Linear | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
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
        causal: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, vdim=vdim, bias=bias,
            rope=rope, causal=causal, dropout=dropout, init_std=init_std, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
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
        if router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(map(repr, ROUTERS))}, got {router!r}")
        gate_form = ROUTERS[router][0] if gate_form is None else gate_form
        if gate_form not in ROUTERS[router]:
            raise ValueError(f"gate_form of router {router!r} must be one of {ROUTERS[router]}, got {gate_form!r}")
        if router == "query_norm" and routed < 2:
            raise ValueError(f"router 'query_norm' needs at least 2 routed heads, got {routed}")
        if ste not in ("all", "active", "none"):
            raise ValueError(f"ste must be 'all', 'active' or 'none', got {ste!r}")
        if aux_loss_coef < 0:
            raise ValueError(f"aux_loss_coef must not be negative, got {aux_loss_coef}")
        if sparse not in (True, False, "auto"):
            raise ValueError(f"sparse must be True, False or 'auto', got {sparse!r}")
        self.num_shared_heads = shared
        self.num_routed_active = active
        self.router = router
        self.gate_form = gate_form
        self.ste = ste
        self.aux_loss_coef = aux_loss_coef
        self.sparse = sparse
        self._shared_factor, self._total_shared = shared, shared
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def linear(rows: int, wanted: bool) -> nn.Linear | None:
            return nn.Linear(embed_dim, rows, False, **made) if wanted and router == "two_stage" else None

        self.routed_router = linear(routed, active > 0)
        self.shared_router = linear(shared, shared > 1)
        self.type_router = linear(2, shared > 0 and active > 0)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; routers normal with `std`, never 0, or every token would take the same heads."""
        super().reset_parameters(std, out_std)
        for name in ("routed_router", "shared_router", "type_router"):
            linear = getattr(self, name, None)
            if linear is not None:
                nn.init.normal_(linear.weight, std=self.init_std if std is None else std)

    @property
    def active_share(self) -> float:
        """Active heads of a token over all heads."""
        return (self.num_shared_heads + self.num_routed_active) / max(self.num_heads, 1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`. Routing reads x."""
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        q, k, v = self.project(x, context)
        if cache is not None:
            check_cache(cache, KeyValueCache, self.causal, context, mask)
        gates, selected, probability = self.gates(x, q)
        self._note(selected, probability, self._real(x, mask, context, past))
        if self.rope is not None:
            q_table, k_table = rotary_tables(
                self.rope, self.rope_dim, q, k, positions, mask, cross=context is not None, past=past,
                limit=None if cache is None else cache.max_length,
            )  # fmt: skip
            q, k = rotate(q, *q_table, self.rope.style), rotate(k, *k_table, self.rope.style)
        key_positions = None
        if cache is not None:
            k, v, key_positions = cache.append(k, v)
        if self._kv_index is not None:
            index = torch.tensor(self._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        if self._runs_sparse(x, mask, context, cache):
            out = self._sparse(q, k, v, gates, selected, mask)
        else:
            out = softmax_attention(
                q, k, v, causal=self.causal, mask=mask, scale=self.scale,
                dropout=self.dropout if self.training else 0.0, key_positions=key_positions,
                query_start=past if cache is not None else None, backend=self.backend,
            )  # fmt: skip
            out = out * gates.to(out.dtype)[..., None]
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, selected: Tensor | None, mask: AttentionMask | None
    ) -> Tensor:
        """Gated outputs of the active heads, zeros for the others.

        The kernels pack the rows of shared and selected heads together. Elsewhere shared heads are plain attention.
        """
        shared, size = self.num_shared_heads, q.shape[2] // k.shape[2]
        if runs_packed_kernels(q, v, mask, self.backend):
            every = gates.new_ones(*gates.shape[:2], shared, dtype=torch.bool)
            active = every if selected is None else torch.cat([every, selected], dim=-1)
            return routed_attention(q, k, v, active, scale=self.scale, mask=mask, gates=gates, backend="triton")
        parts = []
        if shared:
            reads = torch.arange(shared, device=q.device) // size
            own_k, own_v = (z[:, :, :shared] if size == 1 else z.index_select(2, reads) for z in (k, v))
            parts.append(
                softmax_attention(q[:, :, :shared], own_k, own_v, mask=mask, scale=self.scale, backend=self.backend)
            )
        if selected is not None:
            active = F.pad(selected, (shared, 0), value=False)
            routed = routed_attention(q, k, v, active, scale=self.scale, mask=mask, backend="sdpa")
            parts.append(routed[:, :, shared:])
        out = torch.cat(parts, dim=2)
        return out * gates.to(out.dtype)[..., None]

    def gates(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gates (B, T, H), the selected routed heads and their probabilities (B, T, R), from x and raw queries."""
        high = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            if self.router == "query_norm":
                norms = q[:, :, self.num_shared_heads :].to(high).norm(dim=-1)
                return query_norm_gates(
                    norms, active=self.num_routed_active, num_shared=self.num_shared_heads, ste=self.ste
                )
            wide = x.to(high)
            routed, shared, kinds = (
                None if linear is None else F.linear(wide, linear.weight.to(high))
                for linear in (self.routed_router, self.shared_router, self.type_router)
            )
            if routed is None and shared is None:
                return x.new_full((*x.shape[:2], self.num_heads), float(self._shared_factor), dtype=high), None, None
            return two_stage_gates(
                routed, shared, kinds, active=self.num_routed_active, num_shared=self._shared_factor,
                form=self.gate_form,
            )  # fmt: skip

    def _real(self, x: Tensor, mask: AttentionMask | None, context: object, past: int) -> Tensor | None:
        if mask is None or mask.lengths is None or context is not None:
            return None
        return torch.arange(past, past + x.shape[1], device=x.device) < mask.lengths[:, None]

    def _note(self, selected: Tensor | None, probability: Tensor | None, real: Tensor | None) -> None:
        """Auxiliary loss and statistics of a training forward; nothing else keeps them."""
        self.aux_loss, self.routing = None, None
        if not self.training or selected is None or probability is None or probability.numel() == 0:
            return
        self.aux_loss = self.aux_loss_coef * load_balance_loss(selected, probability, real)
        with torch.no_grad():
            valid = torch.ones_like(probability[..., 0]) if real is None else real.to(probability.dtype)
            total = valid.sum().clamp(min=1)
            entropy = -(probability * probability.clamp(min=1e-30).log()).sum(-1)
            self.routing = HeadRouting(
                (selected * valid[..., None]).sum((0, 1)) / total,
                (probability * valid[..., None]).sum((0, 1)) / total,
                (entropy * valid).sum() / total,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left, which belongs to its graph."""
        return {**self.__dict__, "aux_loss": None, "routing": None}

    def _runs_sparse(self, x: Tensor, mask: AttentionMask | None, context: object, cache: KeyValueCache | None) -> bool:
        if self.sparse is False:
            return False
        obstacle = None
        if not self.causal or context is not None or cache is not None:
            obstacle = "it is for causal self-attention without a cache"
        elif mask is not None and mask.dense_mask is not None:
            obstacle = "a dense mask has an entry for every pair"
        elif self.training and self.dropout:
            obstacle = f"it has no dropout, got {self.dropout}"
        elif self.router == "query_norm" and self.ste == "all" and self.training and torch.is_grad_enabled():
            obstacle = "the gradient of ste='all' needs the outputs of all heads; choose ste='active'"
        elif self.backend not in ("auto", "sdpa", "triton"):
            obstacle = f"it runs with backend 'auto', 'sdpa' or 'triton', got {self.backend!r}"
        elif (torch.compiler.is_compiling() or x.device.type == "meta") and not self._packs_on_device(x):
            obstacle = "it waits for the routing, which a compiled graph cannot"
        if self.sparse is True:
            if obstacle is not None and cache is None:
                raise ValueError(f"sparse=True cannot run: {obstacle}")
            return obstacle is None
        if obstacle is not None or self.backend == "triton":
            return obstacle is None and self.active_share < 1
        # Where packing has paid for itself on a CPU; the kernels have not been timed on a GPU yet.
        return x.device.type == "cpu" and x.shape[1] >= 4096 and self.active_share <= 0.5

    def _packs_on_device(self, x: Tensor) -> bool:
        """Whether the sparse form is the kernels', which wait for nothing."""
        if self.backend == "triton":
            return True
        return self.backend == "auto" and x.is_cuda and x.dtype != torch.float64 and triton_obstacle(x.device) is None

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, with all heads; and "router"."""
        routers = (self.routed_router, self.shared_router, self.type_router)
        rows = sum(linear.out_features for linear in routers if linear is not None)
        return {**super().flops_by_part(T, S), "router": 2 * T * self.embed_dim * rows}

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove heads, and their rows of the routers, as if their logits were -inf: not a mask of outputs.

        Raises:
            ValueError: also if fewer routed heads than num_routed_active would be left, or no shared one.
        """
        indices = list(indices)
        old = self._kept_heads
        left = [h for h in old if h not in indices]
        shared = [i for i, h in enumerate(old) if h in left and h < self._total_shared]
        routed = [i - self.num_shared_heads for i, h in enumerate(old) if h in left and h >= self._total_shared]
        if len(routed) < self.num_routed_active:
            raise ValueError(
                f"indices must leave at least num_routed_active {self.num_routed_active} routed heads, got "
                f"{len(routed)}"
            )
        if self.num_shared_heads and not shared:
            raise ValueError("indices must leave a shared head, got none")
        super().prune_heads(indices)
        for linear, rows in ((self.shared_router, shared), (self.routed_router, routed)):
            if linear is not None:
                linear.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=linear.weight.requires_grad)
                linear.out_features = len(rows)
        self.num_shared_heads = len(shared)
