"""Feature maps of linear attention: from a head's query or key (..., D) to features (..., Df)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NON_NEGATIVE = ("elu", "relu", "hedgehog", "t2r", "dpfp")
"""Maps whose features cannot be negative, so that they can be normalised."""

FEATURE_MAPS = (*NON_NEGATIVE, "identity", "elementwise_product")


class FeatureMap(nn.Module):
    """One of FEATURE_MAPS; learned ones are shared by all heads.

    elu        elu(x) + 1                          (Katharopoulos et al. 2020, arXiv:2006.16236)
    relu       max(x, 0)
    identity   x
    hedgehog   softmax of [2 y, -2 y], y = W x + b (Zhang et al. 2024, arXiv:2402.04347); starts at W = 1, b = 0
    t2r        relu(W x)                           (Kasai et al. 2021, arXiv:2103.13076)
    elementwise_product  (W1 x + b1) * (W2 x + b2)
    dpfp       [relu(x), relu(-x)] times itself rolled by 1 .. 4 (Schlag et al. 2021, arXiv:2102.11174)
    """

    ROLLS = 4

    def __init__(self, name: str, width: int, **made: Any) -> None:
        super().__init__()
        if name not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, got {name!r}")
        self.name = name
        self.width = width
        if name in ("hedgehog", "t2r"):
            self.layer = nn.Linear(width, width, name == "hedgehog", **made)
        elif name == "elementwise_product":
            self.layer1, self.layer2 = nn.Linear(width, width, **made), nn.Linear(width, width, **made)

    @property
    def out_width(self) -> int:
        """Df."""
        return self.width * {"hedgehog": 2, "dpfp": 2 * self.ROLLS}.get(self.name, 1)

    def reset_parameters(self) -> None:
        """Hedgehog's start; torch's own for the rest."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                child.reset_parameters()
        if self.name == "hedgehog":
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., Df)."""
        if self.name == "elu":
            return F.elu(x) + 1
        if self.name == "relu":
            return F.relu(x)
        if self.name == "hedgehog":
            y = 2 * self._linear(self.layer, x)
            return torch.softmax(torch.cat([y, -y], dim=-1), dim=-1)
        if self.name == "t2r":
            return F.relu(self._linear(self.layer, x))
        if self.name == "elementwise_product":
            return self._linear(self.layer1, x) * self._linear(self.layer2, x)
        if self.name == "dpfp":
            u = F.relu(torch.cat([x, -x], dim=-1))
            return torch.cat([u * u.roll(j, -1) for j in range(1, self.ROLLS + 1)], dim=-1)
        return x

    @staticmethod
    def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
        """In the precision of x: features are float32 even where the weights are half precision."""
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
