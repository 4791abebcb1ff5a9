"""What happens to a projected head before attention: a map that heads share, RMS norm, rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.backends import choose
from attnzoo.ops.head_mixing import GatedHeadMap, HeadMap
from attnzoo.ops.softmax_attention import softmax_kernel_obstacle
from attnzoo.ops.submodules import is_plain, normed
from attnzoo.rotary import RotaryTable, rotate


def qk_norm_rope(
    z: Tensor,
    table: RotaryTable | None = None,
    *,
    norm: nn.Module | None = None,
    head_map: HeadMap | GatedHeadMap | None = None,
    backend: str = "auto",
) -> Tensor:
    """Heads z (B, T, N, D) -> map, then norm, then rotation, (B, T, N, D) in z's dtype.

    Args:
        z: projected heads.
        table: rotation; it may be narrower than D. None: no rotation.
        norm: root-mean-square norm over D, or over N D where its gain has that many entries, or None.
        head_map: map of each head's vector, or None.
        backend: "triton" does everything in one pass, as "auto" does on GPUs; every other name is the plain form. A
            map or norm that is not plain (hooks, parametrisations, replacements) is called before the kernel does the
            rest.

    Raises:
        BackendUnavailable: if "triton" cannot serve the call.
    """
    fused = False
    if backend == "triton" or (backend == "auto" and z.is_cuda):
        ways = {"triton": lambda: softmax_kernel_obstacle(z, z), "eager": lambda: None}
        fused = choose(backend, "qk_norm_rope", ways, z.device) == "triton" and not (table and table.per_head)
    if head_map is not None and not (fused and is_plain(head_map, HeadMap, GatedHeadMap) and _plain_parts(head_map)):
        z, head_map = head_map(z), None
    gain = getattr(norm, "weight", None)
    joint = gain is not None and gain.shape[-1] != z.shape[-1]
    if norm is not None and (joint or not (fused and is_plain(norm, nn.RMSNorm))):
        z = z if head_map is None else head_map(z)
        z = normed(norm, z.flatten(2)).view_as(z) if joint else normed(norm, z)
        head_map = norm = None
    if not fused:
        return z if table is None else rotate(z, *table)
    if head_map is None and norm is None and table is None:
        return z
    from attnzoo_kernels.qk_norm_rope import qk_norm_rope as kernel

    matrices = () if head_map is None else head_map.matrices()
    assert norm is None or isinstance(norm, nn.RMSNorm)
    cos, sin, style = (None, None, "half") if table is None else table[:3]
    out: Tensor = kernel(
        z, linear=matrices[0] if len(matrices) == 1 else None, mlp=matrices if len(matrices) == 3 else None,
        norm_weight=None if norm is None else norm.weight, norm_eps=epsilon_of(norm, z.dtype), cos=cos, sin=sin,
        style=style,
    )  # fmt: skip
    return out


def _plain_parts(head_map: HeadMap | GatedHeadMap) -> bool:
    return all(is_plain(part, HeadMap) for part in head_map.children())


def epsilon_of(norm: nn.Module | None, dtype: torch.dtype) -> float:
    """The norm's epsilon, which PyTorch takes from the dtype where it is None."""
    eps = getattr(norm, "eps", None)
    return torch.finfo(dtype).eps if eps is None else float(eps)
