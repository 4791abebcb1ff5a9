"""Multi-head attention."""

from __future__ import annotations

from typing import Any

from attnzoo.modules.gqa import GroupedQueryAttention, take_groups


class MultiHeadAttention(GroupedQueryAttention):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762): each query head has its key and value.

    Grouped-query attention with G = H. Like torch.nn.MultiheadAttention its projections have biases by
    default; unlike it, it is causal and rotates queries and keys unless told otherwise, and takes masks with
    True = may attend. `attnzoo.conversion.from_mha` converts one.

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H.
        head_dim: width D of a head. Default: E / H.
        bias: whether the projections have biases.
        options: the keyword options of `GroupedQueryAttention`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int | None = None, *,
        bias: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        take_groups(options, num_heads, f"num_heads {num_heads}", ": see GroupedQueryAttention")
        super().__init__(embed_dim, num_heads, num_heads, head_dim, bias=bias, **options)
