"""Maps that all heads share: each head's vector passes through the same matrix or small gated network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.ops.submodules import is_plain, own_shapes


def knock_linear(z: Tensor, weight: Tensor) -> Tensor:
    """z (..., D) -> z weight^T (..., D), weight (D, D): equation 5 of arXiv:2510.23052."""
    return F.linear(z, weight)


def knock_mlp(z: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """2 ((z up^T) * sigmoid(z gate^T)) down^T, z (..., D), matrices (D, D): equation 9 of arXiv:2510.23052.

    The factor 2 is outside, so that with up = down = 1 and gate = 0 the map is the identity. Both inner
    products are one, and the gated product saves its input only.
    """
    return F.linear(F.glu(F.linear(z, torch.cat([up, gate]))), 2 * down)


def compose_projection(weight: Tensor, bias: Tensor | None, head_map: Tensor) -> tuple[Tensor, Tensor | None]:
    """The projection followed by a linear head map, as one projection.

    weight (H D, E) and bias (H D,) have head-major rows, head_map (D, D): block h becomes head_map W_h and
    head_map b_h. Exact, and cheaper than mapping B T H vectors when B T > E.
    """
    width = head_map.shape[0]
    composed = (head_map @ rearrange(weight, "(h d) e -> h d e", d=width)).flatten(0, 1)
    if bias is None:
        return composed, None
    return composed, F.linear(rearrange(bias, "(h d) -> h d", d=width), head_map).flatten()


class HeadMap(nn.Module):
    """One matrix (D, D) that every head passes through; the identity, or zero, at the start.

    Deliberately no nn.Linear: a pass that re-initialises a model's linear layers must leave it alone, since
    a random start loses most of what the mechanism gains (the paper's ablation).
    """

    def __init__(self, width: int, start: float = 1.0, **factory_kwargs: Any) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(width, width, **factory_kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`start` times the identity."""
        nn.init.eye_(self.weight)
        with torch.no_grad():
            self.weight.mul_(self.start)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., D) -> (..., D)."""
        return knock_linear(z, self.weight)

    def extra_repr(self) -> str:
        """The shape."""
        return ", ".join(own_shapes(self))

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrix (D, D)."""
        return (self.weight,)


class GatedHeadMap(nn.Module):
    """The gated network of equation 9, hidden width D: the identity at the start."""

    def __init__(self, width: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.up_proj = HeadMap(width, **factory_kwargs)
        self.gate_proj = HeadMap(width, 0.0, **factory_kwargs)
        self.down_proj = HeadMap(width, **factory_kwargs)

    def reset_parameters(self) -> None:
        """Identity, zero, identity."""
        for part in (self.up_proj, self.gate_proj, self.down_proj):
            part.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """z (..., D) -> (..., D)."""
        if all(is_plain(part, HeadMap) for part in self.children()):
            return knock_mlp(z, *self.matrices())
        mapped: Tensor = 2 * self.down_proj(self.up_proj(z) * torch.sigmoid(self.gate_proj(z)))
        return mapped

    def matrices(self) -> tuple[Tensor, ...]:
        """Matrices (D, D) of the branches up and gate, and of the way down."""
        return self.up_proj.weight, self.gate_proj.weight, self.down_proj.weight


def head_map(kind: str | None, width: int, **factory_kwargs: Any) -> HeadMap | GatedHeadMap | None:
    """The module of a kind of map: None, "linear" or "mlp"."""
    if kind is None:
        return None
    return HeadMap(width, **factory_kwargs) if kind == "linear" else GatedHeadMap(width, **factory_kwargs)
