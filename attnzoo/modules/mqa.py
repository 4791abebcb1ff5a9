"""Multi-query attention."""

from __future__ import annotations

from typing import Any

from attnzoo.modules.gqa import GroupedQueryAttention, take_groups


class MultiQueryAttention(GroupedQueryAttention):
    """Multi-query attention (Shazeer 2019, arXiv:1911.02150): all query heads share one key and value.

    Grouped-query attention with G = 1.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        head_dim: width D of a head. Default: E / H.
        options: the keyword options of `GroupedQueryAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int | None = None, **options: Any) -> None:
        take_groups(options, 1, "1", ": see GroupedQueryAttention")
        super().__init__(embed_dim, num_heads, 1, head_dim, **options)
