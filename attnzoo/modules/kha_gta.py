"""Knocking heads over grouped-tied attention."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from attnzoo.cache import UntiedCache
from attnzoo.modules.base import per_head
from attnzoo.modules.gta import GroupedTiedAttention
from attnzoo.modules.kha import KnockingHeads, composes, folded, knock_kinds, map_flops, projected
from attnzoo.ops.head_mixing import HeadMap, head_map
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.rules import check, one_of


class KnockingHeadsTiedAttention(KnockingHeads, GroupedTiedAttention):
    """Knocking heads (Zhou et al. 2025, arXiv:2510.23052) over grouped-tied attention.

    One map of the kinds of `KnockingHeadsAttention` acts on the tied state before it serves as key and value
    (knock_scope="tied"; the cache stays that of grouped-tied attention), or on the value alone ("value"; the cache
    holds G (D + Dn) + Dr numbers per token). The paper leaves open which.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: tied states G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        variant: "mlp" (the default where no kind is given) or "linear_v".
        knock_v: instead of a variant, the kind of map: "linear" or "mlp".
        knock_scope: "tied" or "value".
        options: the keyword options of `GroupedTiedAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    q_knock = None
    k_knock = None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        variant: str | None = "auto",
        knock_v: str | None = None,
        knock_scope: str = "tied",
        **options: Any,
    ) -> None:  # fmt: skip
        kinds = knock_kinds(variant, (None, None, knock_v), "mlp")
        if kinds[0] is not None or kinds[1] is not None:
            raise ValueError(
                f"variant must be 'mlp' or 'linear_v': the tied state has one map, got {variant!r}, which maps "
                "queries and keys"
            )
        check("knock_scope", knock_scope, one_of("tied", "value", words="be 'tied' or 'value'"))
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, **options)
        self._base_arguments = ((embed_dim, num_heads, num_kv_heads, head_dim), options)
        self.knock_scope = knock_scope
        if knock_scope == "value":
            self.cache_type = UntiedCache
        self.v_knock = head_map(kinds[2], self.head_dim, device=options.get("device"), dtype=options.get("dtype"))

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the base's; the value, and with scope "tied" the key with it, after the shared map."""
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        if self.knock_scope == "tied":
            mapped = composes(self.kv_proj, self.v_knock, source)
            k = projected(self.kv_proj, self.v_knock, source, self.head_dim)
            v = k = qk_norm_rope(k, head_map=None if mapped else self.v_knock, backend=self.backend)
        else:
            k = self.kv_proj(source).view(*source.shape[:2], self.num_kv_heads, self.head_dim)
            v = qk_norm_rope(k, head_map=self.v_knock, backend=self.backend)
        return q, k[..., : self.nope_head_dim], v, self.rotary_key(source, v)

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """As the base's; with scope "value" keys and values separately, G (D + Dn) + Dr numbers per token."""
        keys = ((self.num_kv_heads, self.nope_head_dim),) if self.knock_scope == "value" else ()
        return (*keys, *super().cache_widths())

    def fold(self) -> GroupedTiedAttention:
        """An equal module without the map, which goes into the projection or with scope "value" into the output's.

        Raises:
            ValueError: if the map is of kind "mlp".
        """
        if self.knock_scope == "tied":
            projections = {"kv_proj": folded(self.kv_proj, self.v_knock)}
        else:
            if not isinstance(self.v_knock, HeadMap):
                raise ValueError("fold is exact for linear maps only, got kind 'mlp'")
            blocks = rearrange(self.o_proj.weight, "e (h d) -> e h d", d=self.head_dim)
            weight = (blocks @ self.v_knock.weight).flatten(1)
            projections = {"o_proj": {**self.o_proj.state_dict(), "weight": weight}}
        return self.folded_into(GroupedTiedAttention, projections)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, with a linear map on the tied state multiplied in; an mlp is left out."""
        shared = self.v_knock if self.knock_scope == "tied" else None
        return per_head(self.q_proj, self.head_dim), per_head(self.kv_proj, self.head_dim, None, shared)

    def value_weights(self) -> Tensor:
        """As the base's, with a linear map multiplied in; an mlp is left out."""
        return per_head(self.kv_proj, self.head_dim, None, self.v_knock)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every tied head through the map."""
        keys = T if self.causal or S is None else S
        maps = keys * self.num_kv_heads * map_flops(self.v_knock, self.head_dim)
        return {**super().flops_by_part(T, S), "head maps": maps}
