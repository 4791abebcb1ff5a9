"""What launchers share: the device, memory layout, and an operator's arguments under the names of its kernels'."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, get_type_hints, overload

import torch
from torch import Tensor

Launch = tuple[Any, tuple[int, ...], dict[str, Any]]
"""A kernel, its grid and its arguments.

An operator with several launches runs a generator of them, `kernel[grid](**arguments)` for each: the tensors between
them are made and dropped in order, and no helper is on the stack while a kernel is launched.
"""
Result = TypeVar("Result")
Launches = Generator[Launch, None, Result]

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str",
}  # fmt: skip


def schema(inputs: type[tuple[Any, ...]], returns: int) -> str:
    """The schema of an operator that takes the fields of a NamedTuple and returns that many tensors."""
    arguments = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(inputs).items())
    return f"({arguments}) -> ({', '.join(['Tensor'] * returns)})"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@overload
def dense_rows(tensor: Tensor) -> Tensor: ...


@overload
def dense_rows(tensor: Tensor | None) -> Tensor | None: ...


def dense_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor, where there is one, with its last axis contiguous, as the kernels read it.

    Projections and caches have it so.
    """
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def strides(tensor: Tensor | None, name: str, axes: str) -> dict[str, int]:
    """stride_{name}_{axis} of the leading axes; 0 where there is no tensor."""
    return {f"stride_{name}_{axis}": 0 if tensor is None else tensor.stride(n) for n, axis in enumerate(axes)}


def arguments_of(tensors: dict[str, Tensor | None], axes: dict[str, str]) -> dict[str, Any]:
    """{name}_ptr of every tensor, and `strides` of those that have axes."""
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, letters in axes.items():
        arguments |= strides(tensors[name], name, letters)
    return arguments


def empty_if(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor, without elements if it is not wanted."""
    return torch.empty(shape if wanted else (0,), dtype=dtype, device=device)


def gradient_buffer(tensor: Tensor, wanted: bool) -> Tensor:
    """A contiguous buffer for the gradient of a tensor, without elements if it is not wanted."""
    return empty_if(wanted, tuple(tensor.shape), tensor.dtype, tensor.device)


def stored_as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor, where there is one, contiguous in that dtype."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def as_int(tensor: Tensor | None) -> Tensor | None:
    """The tensor, where there is one, as the kernels read numbers of tokens."""
    return stored_as(tensor, torch.int32)


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: exact in float32; half precision has one way only."""
    return "ieee" if dtype == torch.float32 else "tf32"


def row_norm(shift: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for what `shift_and_norm` keeps beside the shift: without elements in half precision."""
    return torch.empty_like(shift) if dtype == torch.float32 else shift.new_empty(0)


def positive_scale(scale: float, q: Tensor, q_rope: Tensor | None = None) -> tuple[float, Tensor, Tensor | None]:
    """A scale that is not positive goes into the queries: kernels multiply by it after masks and maxima."""
    if scale > 0:
        return scale, q, q_rope
    return 1.0, q * scale, None if q_rope is None else q_rope * scale
