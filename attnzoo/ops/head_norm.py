"""RMS norm of heads, each with a gain of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class HeadNorm(nn.RMSNorm):
    """RMS norm over each head's features, with a gain (N D,) for every feature of every head."""

    def __init__(self, num_heads: int, width: int, eps: float | None = None, **factory_kwargs: Any) -> None:
        super().__init__(num_heads * width, eps, **factory_kwargs)
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        """z (B, T, N, D) or (B, T, N D) -> the same."""
        gains = self.weight.view(-1, self.width)
        heads = z.view(*z.shape[:2], *gains.shape)
        return (F.rms_norm(heads, (self.width,), None, self.eps) * gains).view_as(z)

    def keep_heads(self, heads: Iterable[int]) -> None:
        """Keep the gains of these heads."""
        kept = self.weight.detach().view(-1, self.width)[list(heads)].flatten()
        self.weight = nn.Parameter(kept, requires_grad=self.weight.requires_grad)
        self.normalized_shape = (kept.numel(),)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.weight.numel() // self.width}, {self.width}, eps={self.eps}"
