"""What ends a head without a softmax: an RMS norm, and a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.linear_attention import choose_form
from attnzoo.ops.submodules import is_plain, normed


def norm_and_gate(
    out: Tensor, norm: nn.Module | None, gate: Tensor | None, *, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """RMS norm of heads out (B, T, H, Dv) and swish of gate (B, T, H Dv), both optional: (B, T, H Dv) in dtype."""
    weight, eps = None, None
    if isinstance(norm, nn.RMSNorm) and is_plain(norm, nn.RMSNorm):
        weight, eps = norm.weight, norm.eps
    else:
        out = normed(norm, out)
    form = choose_form(backend, out.device, dtype)
    if form == "triton" and (weight is not None or gate is not None):
        from attnzoo_kernels.linear_attention import linear_attention_finish

        heads: Tensor = linear_attention_finish(out, weight, gate, eps=eps or 0.0, dtype=dtype)
        return heads.flatten(2)
    if weight is not None:
        out = F.rms_norm(out, (out.shape[3],), weight.to(out.dtype), eps)
    heads = out.flatten(2).to(dtype)
    return heads if gate is None else heads * F.silu(gate)
