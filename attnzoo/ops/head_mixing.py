"""Maps that all heads share: each head's vector passes through the same matrix or small gated network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def knock_linear(z: Tensor, weight: Tensor) -> Tensor:
    """z (..., D) -> z weight^T (..., D), weight (D, D): equation 5 of arXiv:2510.23052."""
    return F.linear(z, weight)


def knock_mlp(z: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """2 ((z up^T) * sigmoid(z gate^T)) down^T, z (..., D), matrices (D, D): equation 9 of arXiv:2510.23052.

    The factor 2 stands outside, so that with up = down = 1 and gate = 0 the map is the identity. Both inner
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
