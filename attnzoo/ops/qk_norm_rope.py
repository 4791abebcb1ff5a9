"""What happens to a projected head before attention: a map that heads share, RMS norm, rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.backends import choose
from attnzoo.ops.fused import fused_obstacle
from attnzoo.ops.head_mixing import knock_linear, knock_mlp
from attnzoo.rotary import rotate


def head_prologue(
    z: Tensor,
    *,
    linear: Tensor | None = None,
    mlp: tuple[Tensor, Tensor, Tensor] | None = None,
    norm: nn.RMSNorm | None = None,
    table: tuple[Tensor, Tensor] | None = None,
    style: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Heads z (B, T, N, D) -> map, then norm, then rotation, (B, T, N, D) in z's dtype.

    Args:
        z: projected heads.
        linear: matrix (D, D) of the map z -> z linear^T.
        mlp: matrices (up, gate, down), each (D, D), of the gated map; see `attnzoo.ops.head_mixing.knock_mlp`.
        norm: root-mean-square norm over D.
        table: cos and sin from `attnzoo.rotary`; they may be narrower than D.
        style: layout of the rotated pairs.
        backend: "triton" does all in one pass; every other name is the plain form.

    Raises:
        BackendUnavailable: if "triton" cannot serve the call.
    """
    if backend == "triton":
        choose(backend, "head_prologue", {"triton": lambda: fused_obstacle(z, z, None, 0.0)})
        if linear is None and mlp is None and norm is None and table is None:
            return z
        from attnzoo_kernels.head_prologue import head_prologue as fused

        cos, sin = (None, None) if table is None else table
        out: Tensor = fused(
            z, linear=linear, mlp=mlp, norm_weight=None if norm is None else norm.weight,
            norm_eps=_eps(norm, z.dtype), cos=cos, sin=sin, style=style,
        )  # fmt: skip
        return out
    if linear is not None:
        z = knock_linear(z, linear)
    if mlp is not None:
        z = knock_mlp(z, *mlp)
    if norm is not None:
        # In the weights' dtype: under autocast z is half precision and the norm is float32.
        z = norm(z.to(norm.weight.dtype)).to(z.dtype)
    return z if table is None else rotate(z, *table, style)


def _eps(norm: nn.RMSNorm | None, dtype: torch.dtype) -> float:
    """The norm's epsilon, which torch takes from the dtype where it is None."""
    if norm is None or norm.eps is None:
        return torch.finfo(dtype).eps
    return float(norm.eps)
