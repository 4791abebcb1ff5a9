"""The `triton` backend of routed heads and of experts: from the operations' words to the kernels' tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.backends import kernel_obstacle
from attnzoo.masks import AttentionMask
from attnzoo.ops.fused import fused_obstacle

if TYPE_CHECKING:
    from attnzoo.ops.expert_projection import Routes


def routed_obstacle(q: Tensor, v: Tensor, mask: AttentionMask | None) -> str | None:
    """Why the kernels cannot serve attention of routed heads, or None."""
    obstacle = fused_obstacle(q, v, None, 0.0)
    if obstacle is None and mask is not None and mask.dense_mask is not None:
        return "the kernels of packed rows take no dense mask"
    return obstacle


def fused_routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    gates: Tensor | None,
    *,
    scale: float,
    mask: AttentionMask | None,
) -> Tensor:
    """As `attnzoo.ops.head_routing.routed_attention`, through the kernels; checked before by `routed_obstacle`."""
    from attnzoo_kernels.head_routing import routed_attention

    B, T, H, _ = q.shape
    lengths = documents = None
    if mask is not None:
        mask.check(B, H, T, T, q.device)
        lengths, documents = mask.lengths, mask.document_bounds(B, T)
    out: Tensor = routed_attention(q, k, v, active, scale=scale, gates=gates, lengths=lengths, documents=documents)
    return out


def expert_obstacle(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot serve a projection by experts, or None."""
    obstacle = kernel_obstacle(x.device, x.dtype)
    if obstacle is not None:
        return obstacle
    if weight.dtype != x.dtype:
        return f"the kernels take rows and matrices of one dtype, got {x.dtype} and {weight.dtype}"
    return None


def fused_expert_linear(
    x: Tensor, weight: Tensor, routes: Routes, *, out_groups: int = 1, gates: Tensor | None = None
) -> Tensor:
    """As `attnzoo.ops.expert_projection.expert_linear_pieces`, through the kernels; see `expert_obstacle`."""
    from attnzoo_kernels.expert_projection import expert_linear

    y: Tensor = expert_linear(
        x, weight, routes.order, routes.counts.cumsum(0).to(torch.int32), out_groups=out_groups, gates=gates
    )
    return y
