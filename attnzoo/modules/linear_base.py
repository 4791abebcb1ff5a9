"""What linear attention and multi-head linear attention share: projections, features, caches of states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache_state import StateCache
from attnzoo.masks import as_mask
from attnzoo.modules.base import Factors, Mechanism
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.heads import keep_rows
from attnzoo.ops.feature_maps import NON_NEGATIVE, FeatureMap
from attnzoo.ops.norm_and_gate import norm_and_gate
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.submodules import place_of
from attnzoo.rotary import Rotary, as_rotary
from attnzoo.rules import check_options, describe


class FeatureAttention(Mechanism):
    """Projections, feature maps, rotation, output norm and gate; subclasses define how features attend.

        q, k, v = x Wq, c Wk, c Wv;   q~ = scale (phi_q(q) + e_f),  k~ = phi_k(k) + e_f
        q^, k^ = rotate(q~), rotate(k~)
        o <- RMS(o) g_norm;   o <- o swish(x Wg);   y = concat_h(o_h) Wo + bo

    Options are those that the subclasses describe, and those of `Mechanism`.
    """

    has_patterns = False
    cache_type: type[StateCache] = StateCache
    shown = ("feature_map", "rope", "pruned_heads")
    norm_name = "norm"

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, *,
        bias: bool,
        out_bias: bool | None,
        feature_map: str,
        feature_eps: float,
        qk_norm: bool,
        qk_norm_eps: float | None,
        output_norm: str,
        norm_eps: float,
        gate: bool,
        rope: Rotary | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, bias=bias, out_bias=out_bias, feature_eps=feature_eps,
            qk_norm=qk_norm, qk_norm_eps=qk_norm_eps, output_norm=output_norm, norm_eps=norm_eps, gate=gate,
            device=device, dtype=dtype, **options,
        )  # fmt: skip
        self.feature_map = feature_map
        self.feature_eps = feature_eps
        H, G, D, Dv = num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(H * D, G * D, G * Dv, H * Dv, bias=bias, o_bias=out_bias, **factory_kwargs)
        self.g_proj = nn.Linear(embed_dim, H * Dv, False, **factory_kwargs) if gate else None
        self.q_norm = nn.RMSNorm(H * D, qk_norm_eps, **factory_kwargs) if qk_norm else None
        self.k_norm = nn.RMSNorm(G * D, qk_norm_eps, **factory_kwargs) if qk_norm else None
        self.feature_map_q = FeatureMap(feature_map, D, **factory_kwargs)
        self.feature_map_k = FeatureMap(feature_map, D, **factory_kwargs)
        norm = nn.RMSNorm(Dv, norm_eps, **factory_kwargs) if output_norm == "rmsnorm" else None
        setattr(self, self.norm_name, norm)
        self.feature_dim = self.feature_map_q.out_width
        self.rope = rope = as_rotary(rope)
        self.rope_dim = 0 if rope is None else rope.width(self.feature_dim)
        if rope is not None and self.rope_dim != self.feature_dim:
            raise ValueError(f"rope must rotate all {self.feature_dim} features, got {rope}")

    def begin(
        self, x: Tensor, context: Tensor | None, mask: Mask, positions: Positions, cache: StateCache | None
    ) -> Call:
        """The call, checked; a mask that sums over keys cannot express is refused."""
        mask = as_mask(mask)
        if mask is not None and mask.dense_mask is not None:
            raise ValueError(
                "mask must be AttentionMask.padding or .packed: linear attention sums over keys before it sees the "
                f"query, so a mask of single pairs has no meaning in it; got {describe(mask.dense_mask)}"
            )
        return begin(self, x, context, mask, positions, cache)

    def features(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q~ (B, T, H, Df), k~ (B, S, G, Df), the rotated q^ and k^, and v (B, S, G, Dv).

        Features are in float32 or float64, values in the dtype of their projection. Keys beyond the mask's lengths
        and of queries that are not real have no features.
        """
        source = call.source
        (B, T, _), S = x.shape, source.shape[1]
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        if self.q_norm is not None and self.k_norm is not None:
            own = place_of(self.q_norm)[1]
            q, k = self.q_norm(q.to(own)), self.k_norm(k.to(own))
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        q = q.view(B, T, self.num_heads, self.head_dim).to(compute_dtype)
        k = k.view(B, S, self.num_kv_heads, self.head_dim).to(compute_dtype)
        v = v.view(B, S, self.num_kv_heads, self.v_head_dim)
        if call.cache is not None:
            call.cache.check_fits(B, T if call.view.shards is None else call.view.shards.tokens, q)
        with without_autocast(x):
            q = (self.feature_map_q(q) + self.feature_eps) * self.scale
            k = self.feature_map_k(k) + self.feature_eps
            q, k = self.normalised_features(q, k)
        mask = call.view.mask
        lengths = None if mask is None else mask.lengths
        real, shards = None if mask is None or source is not x else mask.real_queries, call.view.shards
        if real is not None and shards is not None:
            real = real.index_select(1, shards.positions)
        if lengths is not None:
            at = torch.arange(call.past, call.past + S, device=x.device) if shards is None else shards.positions
            real = at < lengths[:, None] if real is None else real & (at < lengths[:, None])
        if real is not None:
            k = k * real.to(k.dtype)[:, :, None, None]
        k, v = self.heads.spread(k, v)
        return q, k, *call.rotate(q, k), v

    def normalised_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features q~ and k~ as they are; subclasses may normalise them."""
        return q, k

    def project_heads(self, heads: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Norm and gate of heads (B, T, H, Dv), their projection in that dtype, and dropout."""
        gate, norm = None if self.g_proj is None else self.g_proj(x), getattr(self, self.norm_name)
        y: Tensor = self.o_proj(norm_and_gate(heads, norm, gate, dtype=dtype, backend=self.backend))
        return F.dropout(y, self.dropout) if self.training and self.dropout else y

    # Caches

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the states S and z: those of each query head where pruning left gaps."""
        groups = self.num_kv_heads if self.heads.is_regular else self.num_heads
        return (groups, self.feature_dim, self.v_head_dim), (groups, self.feature_dim)

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:  # noqa: ARG002
        """Bytes of one sequence's S and z, whatever the number of tokens: G Df (Dv + 1) numbers of at least float32."""
        groups, width = self.cache_widths()[1]
        return groups * width * (self.v_head_dim + 1) * torch.promote_types(dtype, torch.float32).itemsize

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StateCache:  # fmt: skip
        """States for up to max_length tokens: float32, or float64 for a float64 module or dtype."""
        return state_cache(self, batch_size, max_length, device, dtype)

    # Costs, linear forms, pruning

    def projection_flops(self, T: int, S: int) -> int:
        """FLOPs of all projections of T queries and S keys; learned feature maps included."""
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        maps = {"hedgehog": 1, "t2r": 1, "elementwise_product": 2}.get(self.feature_map, 0)
        gate = 0 if self.g_proj is None else 2 * T * self.embed_dim * H * Dv
        return (
            2 * T * self.embed_dim * H * (D + Dv) + 2 * S * self.kdim * G * (D + Dv) + gate
            + 2 * maps * D * D * (T * H + S * G)
        )  # fmt: skip

    def qk_circuit(self, part: str = "full") -> Factors:
        """Per query head the factors (WQ_h, WK_h), each (D, E), with the gains of qk_norm, before the feature maps.

        part: "full".
        """
        if part != "full":
            raise ValueError(f"part must be 'full': features behind a map are no linear form, got {part!r}")
        return super().qk_circuit()

    def tensor_splits(self) -> dict[str, Any]:
        """Projections by head; maps and norms of heads are of all."""
        return {
            "q_proj": "heads", "k_proj": "groups", "v_proj": "groups", "g_proj": "heads", "o_proj": "columns",
            "feature_map_q": "shared", "feature_map_k": "shared", self.norm_name: "shared", "q_norm": "whole",
            "k_norm": "whole",
        }  # fmt: skip

    def tensor_obstacle(self, parts: int) -> str | None:
        """As the base's."""
        if self.q_norm is not None:
            return "qk_norm must be False: its statistics are those of all heads together"
        return super().tensor_obstacle(parts)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads.

        Raises:
            ValueError: with qk_norm, whose statistics are those of all heads together.
        """
        if self.q_norm is not None:
            raise ValueError("prune_heads needs qk_norm=False: its statistics are those of all heads together")
        self.keep_projections(heads, groups)
        if self.g_proj is not None:
            keep_rows(self.g_proj, heads, self.v_head_dim)


def state_cache(
    module: Any, batch_size: int, max_length: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> StateCache:
    """The module's cache of states, in at least float32."""
    check_options(dtype=dtype)
    own = place_of(module)
    cache: StateCache = module.cache_type(
        batch_size, max_length, module.cache_layout(), device=own[0] if device is None else device,
        dtype=torch.promote_types(own[1] if dtype is None else dtype, torch.float32),
    )  # fmt: skip
    return cache


def check_normalisable(feature_map: str, argument: str, value: object) -> None:
    """Refuse a denominator that may change its sign."""
    if feature_map not in NON_NEGATIVE:
        raise ValueError(
            f"{argument} needs features that cannot be negative ({', '.join(NON_NEGATIVE)}), got {argument}={value!r} "
            f"with feature_map {feature_map!r}"
        )
