"""What launchers share: the device, memory layout, and an operator's arguments under the names of its kernels'."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, get_type_hints, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Config, architecture, padded

Launch = tuple[Any, tuple[int, ...], dict[str, Any]]
"""A kernel, its grid and its arguments.

An operator with several launches runs a generator of them, `kernel[grid](**arguments)` for each: the tensors between
them are made and dropped in order, and no helper is on the stack while a kernel is launched.
"""
Result = TypeVar("Result")
Launches = Generator[Launch, None, Result]

PLANS_KEPT = 1024
"""Plans that an operator keeps; a program that makes more starts again."""


class Plan:
    """What the launches of a kernel for one layout of its tensors share, and the kernels compiled for it.

    Triton's own launcher looks at every argument in every launch. Where nothing but pointers and numbers that no
    kernel is specialised for have changed, the compiled kernel is launched directly:

        launch = plan.launch(q_ptr=q, S=S, ...)
        launch.keep(launch.run[grid](*launch.values, **launch.options))

    Args:
        kernel: the kernel.
        config: tiles, warps and stages.
        arguments: what stays the same for these layouts; tensors are left out and have to be given to `launch`. Numbers
            given there must be among those that the kernel is not specialised for.
    """

    def __init__(self, kernel: Any, config: Config, arguments: dict[str, Any]) -> None:
        self.kernel, self.config = kernel, config
        options = config.options()
        self.options = {name: value for name, value in options.items() if name not in kernel.arg_names}
        known = {name: x for name, x in (arguments | options).items() if not isinstance(x, Tensor)}
        self.arguments = {name: known.get(name) for name in kernel.arg_names}
        self.compiled: dict[tuple[bool, ...], Any] = {}

    def launch(self, **changing: Any) -> PreparedLaunch:
        """The launch with these arguments."""
        values = (self.arguments | changing).values()
        # Of the pointers Triton assumes that they are multiples of 16 where they are.
        aligned = tuple([x.data_ptr() % 16 == 0 for x in changing.values() if isinstance(x, Tensor)])
        return PreparedLaunch(self, aligned, values)


class PreparedLaunch:
    """One launch of a `Plan`: run[grid](*values, **options), whose result goes to `keep`."""

    def __init__(self, plan: Plan, aligned: tuple[bool, ...], values: Iterable[Any]) -> None:
        compiled = plan.compiled.get(aligned)
        self.compiled, self.aligned, self.values = plan.compiled, aligned, values
        self.run, self.options = (plan.kernel, plan.options) if compiled is None else (compiled, {})

    def keep(self, compiled: Any) -> None:
        """Remember what the kernel was compiled to; nothing in the interpreter, or if it was launched directly."""
        if compiled is not None:
            self.compiled[self.aligned] = compiled


Key = tuple[Any, ...]
Found = TypeVar("Found")


def find_plan(plans: dict[Key, Found], key: Key) -> Found | None:
    """What is kept under the key; nothing while a configuration is pinned."""
    return None if tuning.is_pinned() else plans.get(key)


def keep_plan(plans: dict[Key, Found], key: Key, plan: Found) -> Found:
    """The plan, kept under the key unless a configuration is pinned."""
    if not tuning.is_pinned():
        if len(plans) >= PLANS_KEPT:
            plans.clear()
        plans[key] = plan
    return plan


def chip(device: torch.device) -> Key:
    """A device and its limits, as a part of a key: limits may be those of another chip that is compiled for."""
    return device, tuning.device_limits(device)


def layouts(tensors: Iterable[Tensor | None]) -> Key:
    """Sizes, strides and dtypes, as a part of a key."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether an operator's body may be called by itself, which saves PyTorch's dispatcher.

    That is where nobody compiles, exports, traces, transforms or differentiates the call, or watches its operators.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
    return True


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str",
}  # fmt: skip


def schema(inputs: type[tuple[Any, ...]], returns: int) -> str:
    """The schema of an operator that takes the fields of a NamedTuple and returns that many tensors."""
    arguments = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(inputs).items())
    return f"({arguments}) -> ({', '.join(['Tensor'] * returns)})"


_HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensor's."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _HERE


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


def descriptor(tensor: Tensor, block_s: int) -> TensorDescriptor | None:
    """A descriptor of keys or values (B, S, G, D) as (B, G, S, D) for tiles of block_s keys, or None.

    None where a kernel gains nothing by it, without 16-bit products on Hopper, and where hardware refuses: the tensor,
    its keys and its heads have to begin at multiples of 16 bytes, and none may be in the place of another.
    """
    if tensor.element_size() != 2 or architecture(tensor.device) != "hopper" or tensor.data_ptr() % 16:
        return None
    B, S, G, D = tensor.shape
    b, s, g, _ = tensor.stride()
    steps = [step if size > 1 else 8 for step, size in ((b, B), (g, G), (s, S))]
    if any(step % 8 or step <= 0 for step in steps):
        return None
    return TensorDescriptor(tensor, [B, G, S, D], [*steps, 1], [1, 1, block_s, padded(D)])


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
