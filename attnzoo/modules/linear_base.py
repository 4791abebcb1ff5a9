"""What linear attention and multi-head linear attention share: projections, features, output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backends import BackendUnavailable, check_name, kernel_obstacle
from attnzoo.cache_state import StateCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import check_groups, check_input, check_options, check_sizes, derive_head_dim
from attnzoo.modules.positions import rotary_tables
from attnzoo.modules.structure import group_index, head_rows, keep_columns, keep_entries, keep_rows, surviving_heads
from attnzoo.ops.feature_maps import NON_NEGATIVE, FeatureMap
from attnzoo.ops.fused_linear import finished
from attnzoo.ops.precision import without_autocast
from attnzoo.rotary import Rotary, rotate


class FeatureAttention(nn.Module):
    """Projections, feature maps, rotation, output norm and gate; a subclass says how features attend.

    q, k, v = x Wq, c Wk, c Wv;   q~ = scale (phi_q(q) + e_f),  k~ = phi_k(k) + e_f
    q^, k^ = rotate(q~), rotate(k~)
    o <- RMS(o) g_norm;   o <- o swish(x Wg);   y = concat_h(o_h) Wo + bo
    """

    aux_loss: Tensor | None = None
    _norm_name = "norm"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        *,
        v_head_dim: int | None,
        kdim: int | None,
        bias: bool,
        out_bias: bool | None,
        causal: bool,
        feature_map: str,
        feature_eps: float,
        scale: float,
        qk_norm: bool,
        qk_norm_eps: float | None,
        output_norm: str,
        norm_eps: float,
        gate: bool,
        rope: Rotary | None,
        dropout: float,
        init_std: float,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.kdim = embed_dim if kdim is None else kdim
        check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            v_head_dim=v_head_dim, kdim=self.kdim,
        )  # fmt: skip
        check_groups(num_heads, num_kv_heads)
        check_options(
            dropout=dropout, logit_softcap=None, sliding_window=None, sink_tokens=0, sink=None, scale=scale
        )  # fmt: skip
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        if output_norm not in ("none", "rmsnorm"):
            raise ValueError(f"output_norm must be 'none' or 'rmsnorm', got {output_norm!r}")
        if feature_eps < 0:
            raise ValueError(f"feature_eps must not be negative, got {feature_eps}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.causal = causal
        self.feature_map = feature_map
        self.feature_eps = feature_eps
        self.scale = scale
        self.rope = rope
        self.dropout = dropout
        self.init_std = init_std
        self.backend = check_name(backend)
        self._total_heads, self._group_size = num_heads, num_heads // num_kv_heads
        self._kept_heads, self._kept_groups = tuple(range(num_heads)), tuple(range(num_kv_heads))
        self._kv_index: tuple[int, ...] | None = None

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(self.kdim, num_kv_heads * v_head_dim, bias, **made)
        self.o_proj = nn.Linear(num_heads * v_head_dim, embed_dim, bias if out_bias is None else out_bias, **made)
        self.g_proj = nn.Linear(embed_dim, num_heads * v_head_dim, False, **made) if gate else None
        self.q_norm = nn.RMSNorm(num_heads * head_dim, qk_norm_eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(num_kv_heads * head_dim, qk_norm_eps, **made) if qk_norm else None
        self.feature_map_q = FeatureMap(feature_map, head_dim, **made)
        self.feature_map_k = FeatureMap(feature_map, head_dim, **made)
        norm = nn.RMSNorm(v_head_dim, norm_eps, **made) if output_norm == "rmsnorm" else None
        setattr(self, self._norm_name, norm)
        self.feature_dim = self.feature_map_q.out_width
        if rope is not None and rope.width(self.feature_dim) != self.feature_dim:
            raise ValueError(f"rope must rotate all {self.feature_dim} features, got {rope}")

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, norms 1, maps anew."""
        std = self.init_std if std is None else std
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=out_std if name == "o_proj" and out_std is not None else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, FeatureMap):
                module.reset_parameters()

    def chosen_backend(self, x: Tensor) -> str:
        """ "auto" for the chunked form, "eager" for the quadratic definition, "triton" for the kernels."""
        if self.backend in ("auto", "eager"):
            return self.backend
        reason = "it has no softmax; only auto, eager and triton can"
        if self.backend == "triton":
            obstacle = kernel_obstacle(x.device, self.product_dtype(x))
            if obstacle is None:
                return self.backend
            reason = obstacle
        raise BackendUnavailable(f"backend {self.backend!r} cannot run linear attention: {reason}")

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The projections' dtype: that of x, or of autocast."""
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else x.dtype

    def checked_mask(self, mask: Tensor | AttentionMask | None) -> AttentionMask | None:
        """The mask, refused where sums over keys cannot express it."""
        mask = as_mask(mask)
        if mask is not None and mask.dense_mask is not None:
            raise ValueError(
                "mask must be AttentionMask.padding or .packed: linear attention sums over keys before it sees the "
                "query, so a mask of single pairs has no meaning in it"
            )
        return mask

    def features(
        self,
        x: Tensor,
        source: Tensor,
        mask: AttentionMask | None,
        positions: Tensor | tuple[Tensor, Tensor] | None,
        past: int = 0,
        limit: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q~ (B, T, H, Df), k~ (B, S, G, Df), the rotated q^ and k^, and v (B, S, G, Dv), in float32 or float64.

        Keys beyond the mask's lengths have no features.
        """
        check_input("x", x, self.embed_dim)
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        if self.q_norm is not None and self.k_norm is not None:
            own = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(own)), self.k_norm(k.to(own))
        high = torch.promote_types(x.dtype, torch.float32)
        q = q.view(B, T, self.num_heads, self.head_dim).to(high)
        k = k.view(B, S, self.num_kv_heads, self.head_dim).to(high)
        v = v.view(B, S, self.num_kv_heads, self.v_head_dim).to(high)
        with without_autocast(x):
            q = (self.feature_map_q(q) + self.feature_eps) * self.scale
            k = self.feature_map_k(k) + self.feature_eps
            q, k = self.normalised_features(q, k)
        if mask is not None and mask.lengths is not None:
            key = torch.arange(past, past + S, device=x.device)
            if mask.lengths.shape[0] != B:
                raise ValueError(f"lengths must have one entry a row, got {mask.lengths.shape[0]} for {B}")
            k = k * (key < mask.lengths[:, None]).to(k.dtype)[:, :, None, None]
        if self._kv_index is not None:
            index = torch.tensor(self._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        if self.rope is None:
            return q, k, q, k, v
        q_table, k_table = rotary_tables(
            self.rope, self.feature_dim, q, k, positions, mask, cross=source is not x, past=past, limit=limit
        )
        return q, k, rotate(q, *q_table, self.rope.style), rotate(k, *k_table, self.rope.style), v

    def normalised_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A subclass may normalise features."""
        return q, k

    def finish(self, out: Tensor, x: Tensor, backend: str) -> Tensor:
        """Output norm, gate and output projection of heads (B, T, H, Dv) in float32 or float64."""
        norm = getattr(self, self._norm_name)
        gate = None if self.g_proj is None else self.g_proj(x)
        if backend == "triton" and (norm is not None or gate is not None):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            heads = finished(out, weight, gate, eps=eps, dtype=self.product_dtype(x)).flatten(2)
        else:
            if norm is not None:
                out = F.rms_norm(out, (self.v_head_dim,), norm.weight.to(out.dtype), norm.eps)
            heads = out.flatten(2).to(self.product_dtype(x))
            heads = heads if gate is None else heads * F.silu(gate)
        y: Tensor = self.o_proj(heads)
        return F.dropout(y, self.dropout) if self.training and self.dropout else y

    def without_heads(self, x: Tensor, cache: StateCache | None) -> Tensor:
        """What is left when all heads are pruned: the output bias, or zeros."""
        check_input("x", x, self.embed_dim)
        if cache is not None:
            cache.length += x.shape[1]
        y: Tensor = self.o_proj(x.new_zeros(*x.shape[:2], 0))
        return y

    def projection_flops(self, T: int, S: int) -> int:
        """FLOPs of all projections of T queries and S keys; learned feature maps included."""
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        maps = {"hedgehog": 1, "t2r": 1, "elementwise_product": 2}.get(self.feature_map, 0)
        gate = 0 if self.g_proj is None else 2 * T * self.embed_dim * H * Dv
        return (
            2 * T * self.embed_dim * H * (D + Dv) + 2 * S * self.kdim * G * (D + Dv) + gate
            + 2 * maps * D * D * (T * H + S * G)
        )  # fmt: skip

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query head the factors (WQ_h, WK_h), each (D, E), before the feature maps; part: "full"."""
        if part != "full":
            raise ValueError(f"part must be 'full': features behind a map are no linear form, got {part!r}")
        wq = self.q_proj.weight.detach().view(self.num_heads, self.head_dim, self.embed_dim)
        wk = self.k_proj.weight.detach().view(self.num_kv_heads, self.head_dim, self.kdim)
        reads = self._kv_index or [h * self.num_kv_heads // self.num_heads for h in range(self.num_heads)]
        return [(wq[h], wk[g]) for h, g in enumerate(reads)]

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the query heads that are gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove query heads as `GroupedQueryAttention.prune_heads` does.

        Raises:
            ValueError: also with qk_norm, whose statistics are those of all heads together.
        """
        if self.q_norm is not None:
            raise ValueError("prune_heads needs qk_norm=False: its statistics are those of all heads together")
        old_heads, old_groups = self._kept_heads, self._kept_groups
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        groups, self._kv_index = group_index(heads, self._group_size)
        at = [old_heads.index(h) for h in heads]
        at_group = [old_groups.index(g) for g in groups]
        keep_rows(self.q_proj, head_rows(at, self.head_dim))
        keep_rows(self.k_proj, head_rows(at_group, self.head_dim))
        keep_rows(self.v_proj, head_rows(at_group, self.v_head_dim))
        if self.g_proj is not None:
            keep_rows(self.g_proj, head_rows(at, self.v_head_dim))
        keep_columns(self.o_proj, head_rows(at, self.v_head_dim))
        self._prune_own(torch.tensor(at, dtype=torch.long))
        self._kept_heads, self._kept_groups = heads, groups
        self.num_heads, self.num_kv_heads = len(heads), len(groups)

    def _prune_own(self, at: Tensor) -> None:
        """Prune what a subclass has for every head."""
        mixing = getattr(self, "mixing_matrix", None)
        if mixing is not None and mixing.ndim == 3:
            self.mixing_matrix = keep_entries(mixing, at)

    def state_groups(self) -> int:
        """Key/value heads whose states a cache holds."""
        return self.num_kv_heads if self._kv_index is None else len(self._kv_index)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        sizes = f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, feature_map={self.feature_map!r}, rope={self.rope}, causal={self.causal}"


def check_normalisable(feature_map: str, argument: str, value: object) -> None:
    """Refuse a denominator that may change its sign."""
    if feature_map not in NON_NEGATIVE:
        raise ValueError(
            f"{argument} needs features that cannot be negative ({', '.join(NON_NEGATIVE)}), got {argument}={value!r} "
            f"with feature_map {feature_map!r}"
        )
