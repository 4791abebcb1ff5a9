"""What one side of the pairs brings to the compositions of dynamically composable attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.composed_attention import DynamicProjection
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.submodules import local, own_shapes

ACTIVATIONS = ("gelu", "gelu_tanh")
DYNAMIC_SPLITS: dict[str, Any] = {"w1": "rows", "w2": 0, "gate": "rows"}


class DynamicLinear(nn.Module):
    """A matrix (out, in). No nn.Linear, so that a pass over a model's linear layers leaves its small start alone."""

    def __init__(self, in_features: int, out_features: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory_kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return F.linear(x, local(self.weight))

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(own_shapes(self))


class DynamicWeights(nn.Module):
    """What one side of the pairs, queries or keys, brings to the compositions, from the layer's input:

        d = act(X W1^T) W2;   u = d[:R] / sqrt(mean(d[:R]^2) + eps),  v = d[R:],  g = tanh(X Wg^T)

    for each of P stages and N groups of M heads; the mean is over the M heads.
    """

    def __init__(
        self, width: int, stages: int, groups: int, heads: int, rank: int, hidden: int, act: str, eps: float,
        **factory_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes = (groups, stages, hidden, rank, heads)
        self.act = act
        self.eps = eps
        self.w1 = DynamicLinear(width, groups * stages * hidden, **factory_kwargs)
        self.w2 = nn.Parameter(torch.empty(groups, stages, hidden, 2 * rank, heads, **factory_kwargs))
        self.gate = DynamicLinear(width, groups * stages * heads, **factory_kwargs)

    def reset_parameters(self) -> None:
        """The official start, close to the identity: u of size 0.7, small v and gates."""
        _, _, hidden, rank, heads = self.sizes
        width = self.w1.weight.shape[1]
        nn.init.normal_(self.w1.weight, std=math.sqrt(2 / (width + hidden)))
        nn.init.normal_(self.w2, std=0.02 / (math.sqrt(hidden) * (heads + rank)))
        nn.init.normal_(self.gate.weight, std=0.005 * math.sqrt(2 / (width + heads)))

    def forward(self, x: Tensor) -> list[DynamicProjection]:
        """x (B, L, E) -> for each stage u (B, L, N, R, M), v (B, L, N, R, M), g (B, L, N, M), in x's dtype."""
        groups, stages, hidden, rank, heads = self.sizes
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        raw, gate = self.w1(x), self.gate(x)
        with without_autocast(x):
            raw = raw.to(compute_dtype).view(*x.shape[:2], groups, stages, hidden)
            inner = F.gelu(raw, approximate="tanh" if self.act == "gelu_tanh" else "none")
            d = torch.einsum("blnpk,npkrm->blnprm", inner, local(self.w2).to(compute_dtype))
            u, v = d[..., :rank, :], d[..., rank:, :]
            u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps)
            g = torch.tanh(gate.to(compute_dtype)).view(*x.shape[:2], groups, stages, heads)
        return list(zip(*(z.to(x.dtype).unbind(3) for z in (u, v, g)), strict=True))

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(own_shapes(self))
