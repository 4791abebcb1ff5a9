"""Feature maps of linear attention: from a head's query or key (..., D) to features (..., Df)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.submodules import precise_linear
from attnzoo.rules import check, one_of

NON_NEGATIVE = ("elu", "relu", "hedgehog", "t2r", "dpfp")
"""Maps whose features cannot be negative, so that they can be normalised."""

FEATURE_MAPS = (*NON_NEGATIVE, "identity", "elementwise_product")


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1. torch compiles the gradient of its own elu for one layout only."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


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

    def __init__(self, name: str, width: int, **factory_kwargs: Any) -> None:
        super().__init__()
        check("feature_map", name, one_of(*FEATURE_MAPS))
        self.name = name
        self.width = width
        if name in ("hedgehog", "t2r"):
            self.layer = nn.Linear(width, width, name == "hedgehog", **factory_kwargs)
        elif name == "elementwise_product":
            self.layer1 = nn.Linear(width, width, **factory_kwargs)
            self.layer2 = nn.Linear(width, width, **factory_kwargs)

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
            return elu_plus_one(x)
        if self.name == "relu":
            return F.relu(x)
        if self.name == "hedgehog":
            y = 2 * precise_linear(self.layer, x)
            return torch.softmax(torch.cat([y, -y], dim=-1), dim=-1)
        if self.name == "t2r":
            return F.relu(precise_linear(self.layer, x))
        if self.name == "elementwise_product":
            return precise_linear(self.layer1, x) * precise_linear(self.layer2, x)
        if self.name == "dpfp":
            u = F.relu(torch.cat([x, -x], dim=-1))
            return torch.cat([u * u.roll(j, -1) for j in range(1, self.ROLLS + 1)], dim=-1)
        return x
