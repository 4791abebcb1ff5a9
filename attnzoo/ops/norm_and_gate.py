"""What ends a head without a softmax: an RMS norm, and a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backends import choose, kernel_obstacle
from attnzoo.ops.qk_norm_rope import epsilon_of
from attnzoo.ops.submodules import is_plain, normed


def norm_and_gate(
    out: Tensor,
    norm: nn.Module | None,
    gate: Tensor | None,
    *,
    dtype: torch.dtype,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """RMS norm of heads out (B, T, H, Dv), times silu or sigmoid of gate (B, T, H Dv): (B, T, H Dv) in dtype.

    backend "triton" does it in one pass, as "auto" does on GPUs; every other name is the plain form.
    """
    weight, eps = None, None
    if isinstance(norm, nn.RMSNorm) and is_plain(norm, nn.RMSNorm):
        weight, eps = norm.weight, norm.eps
    else:
        out = normed(norm, out)
    fused = False
    if backend == "triton" or (backend == "auto" and out.is_cuda):
        ways = {"triton": lambda: kernel_obstacle(out.device, dtype), "eager": lambda: None}
        fused = choose(backend, "norm_and_gate", ways, out.device) == "triton"
    if fused and (weight is not None or gate is not None) and (gate is None or activation == "silu"):
        from attnzoo_kernels.linear_attention import linear_attention_finish

        heads: Tensor = linear_attention_finish(out, weight, gate, eps=epsilon_of(norm, out.dtype), dtype=dtype)
        return heads.flatten(2)
    if weight is not None:
        out = F.rms_norm(out, (out.shape[3],), weight.to(out.dtype), eps)
    heads = out.flatten(2).to(dtype)
    return heads if gate is None else heads * (F.silu if activation == "silu" else torch.sigmoid)(gate)
