"""Knocking heads over latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.modules.kha import KnockingHeads, knock_kinds, map_flops
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.ops.head_mixing import HeadMap, head_map
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.submodules import is_plain


class KnockingHeadsLatentAttention(KnockingHeads, MultiHeadLatentAttention):
    """Knocking heads (Zhou et al. 2025, arXiv:2510.23052) over multi-head latent attention.

    Maps are linear and act on the expanded, non-rotary queries and keys and on the values: the reading that keeps the
    absorbed form exact and the rotary key shared.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        kv_lora_rank: width R of the latent. Default: 4 E / H.
        q_lora_rank: width of the queries' own bottleneck. Default: none.
        variant: "linear" (queries, keys and values; the default where no kind is given) or "linear_v".
        knock_q: instead of a variant, the kind of map on queries: None or "linear".
        knock_k: on keys.
        knock_v: on values.
        options: the keyword options of `MultiHeadLatentAttention`; rope_mode "pre" is refused.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    q_knock: HeadMap | None
    k_knock: HeadMap | None
    v_knock: HeadMap | None

    def __init__(
        self, embed_dim: int, num_heads: int,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        *,
        variant: str | None = "auto",
        knock_q: str | None = None,
        knock_k: str | None = None,
        knock_v: str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        kinds = knock_kinds(variant, (knock_q, knock_k, knock_v), "linear")
        if "mlp" in kinds:
            raise ValueError(
                f"kinds must be linear over latent attention, which never makes queries and keys, got {kinds}"
            )
        if isinstance(mode := options.get("rope_mode"), str) and mode == "pre":
            raise ValueError("rope_mode must not be 'pre': maps act on expanded keys, got 'pre'")
        super().__init__(embed_dim, num_heads, kv_lora_rank, q_lora_rank, **options)
        self._base_arguments = ((embed_dim, num_heads, kv_lora_rank, q_lora_rank), options)
        widths = (self.qk_nope_head_dim, self.qk_nope_head_dim, self.v_head_dim)
        placed = {name: options.get(name) for name in ("device", "dtype")}
        for name, kind, width in zip(("q_knock", "k_knock", "v_knock"), kinds, widths, strict=True):
            setattr(self, name, head_map(kind, width, **placed))

    def queries(self, x: Tensor) -> Tensor:
        """As the base's, the non-rotary features after the shared map."""
        q = super().queries(x)
        if self.q_knock is None:
            return q
        width = self.qk_nope_head_dim
        mapped = qk_norm_rope(q[..., :width], head_map=self.q_knock, backend=self.backend)
        return torch.cat([mapped, q[..., width:]], dim=-1)

    def expand(self, c: Tensor, groups: slice | None = None) -> tuple[Tensor, Tensor]:
        """As the base's, after the shared maps."""
        k, v = super().expand(c, groups)
        k = qk_norm_rope(k, head_map=self.k_knock, backend=self.backend)
        return k, qk_norm_rope(v, head_map=self.v_knock, backend=self.backend)

    def expansion_parameters(self) -> tuple[Tensor, ...]:
        """As the base's, and the maps of keys and values."""
        maps = [m.weight for m in (self.k_knock, self.v_knock) if m is not None]
        return *super().expansion_parameters(), *maps

    def can_absorb(self) -> bool:
        """Whether the expansion and the maps behind it are matrices."""
        maps = (self.k_knock, self.v_knock)
        return super().can_absorb() and all(m is None or is_plain(m, HeadMap) for m in maps)

    def absorbed_queries(self, q: Tensor) -> Tensor:
        """The keys' map on queries, which are fewer than cached tokens."""
        return q if self.k_knock is None else q @ self.k_knock.weight

    def absorbed_outputs(self, out: Tensor) -> Tensor:
        """The values' map on outputs."""
        return out if self.v_knock is None else self.v_knock(out)

    def fold(self) -> MultiHeadLatentAttention:
        """An equal module without the maps, which go into the expansion and the queries' projection."""
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        expansion = {}
        for name, rows in self.kv_b_proj.state_dict().items():
            columns = rows.shape[1] if rows.ndim > 1 else 1
            key, value = rows.view(self.num_kv_heads, sum(widths), columns).split(widths, 1)
            key = key if self.k_knock is None else self.k_knock.weight @ key
            value = value if self.v_knock is None else self.v_knock.weight @ value
            expansion[name] = torch.cat([key, value], 1).view(rows.shape)
        name = "q_proj" if self.q_lora_rank is None else "q_b_proj"
        queries = {key: self._mapped_rows(rows) for key, rows in self.get_submodule(name).state_dict().items()}
        return self.folded_into(MultiHeadLatentAttention, {"kv_b_proj": expansion, name: queries})

    def _mapped_rows(self, rows: Tensor) -> Tensor:
        """Rows (H (dn + dr), ...) of a query projection with the first dn of each head after the map."""
        if self.q_knock is None:
            return rows
        heads = rows.view(self.num_heads, self.head_dim, rows.shape[1] if rows.ndim > 1 else 1)
        width = self.qk_nope_head_dim
        return torch.cat([self.q_knock.weight @ heads[:, :width], heads[:, width:]], 1).view(rows.shape)

    def query_weights(self) -> Tensor:
        """As the base's, with the map multiplied in."""
        weight = super().query_weights()
        return self._mapped_rows(weight.flatten(0, 1)).detach().view(weight.shape)

    def expansion_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, with the maps multiplied in."""
        key, value = super().expansion_weights()
        key = key if self.k_knock is None else self.k_knock.weight.detach() @ key
        return key, value if self.v_knock is None else self.v_knock.weight.detach() @ value

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every expanded head through its map; in the absorbed form every query and output."""
        S = T if S is None else S
        mapped = T * self.num_heads if self.counts_absorbed(T, S) else S * self.num_kv_heads
        q = T * self.num_heads * map_flops(self.q_knock, self.qk_nope_head_dim)
        k = mapped * map_flops(self.k_knock, self.qk_nope_head_dim)
        v = mapped * map_flops(self.v_knock, self.v_head_dim)
        return {**super().flops_by_part(T, S), "head maps": q + k + v}
