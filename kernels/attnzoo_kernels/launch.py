"""What every launcher needs of its tensors before a kernel runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, as the kernels read it; projections and caches have it so."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(tensor: Tensor | None, name: str, axes: str) -> dict[str, int]:
    """stride_{name}{axis} of the leading axes; 0 where there is no tensor."""
    return {f"stride_{name}{axis}": 0 if tensor is None else tensor.stride(n) for n, axis in enumerate(axes)}


def stored_as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor, where there is one, contiguous in that dtype."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def as_int(tensor: Tensor | None) -> Tensor | None:
    """The tensor, where there is one, as the kernels read numbers of tokens."""
    return stored_as(tensor, torch.int32)


def row_norm(shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for what `shift_and_norm` keeps beside the shift: nothing in half precision."""
    return torch.empty_like(shift) if dtype == torch.float32 else shift.new_empty(0)


def positive_scale(scale: float, q: Tensor, q_extra: Tensor | None = None) -> tuple[float, Tensor, Tensor | None]:
    """A scale that is not positive goes into the queries: kernels multiply by it after masks and maxima."""
    if scale > 0:
        return scale, q, q_extra
    return 1.0, q * scale, None if q_extra is None else q_extra * scale
