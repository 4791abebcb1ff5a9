"""What launchers share: the device, memory layout, and an operator's arguments under the names of its kernels'."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, get_type_hints, overload

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Config, architecture, padded

Launch = tuple[Any, tuple[int, ...], dict[str, Any]]
"""A kernel, its grid and its arguments.

An operator with several launches runs a generator of them, `prepare`s each and launches it: the tensors between them
are made and dropped in order, and no helper is on the stack while a kernel is launched.
"""
Result = TypeVar("Result")
Launches = Generator[Launch, None, Result]

PLANS_KEPT = 1024
"""Plans that an operator keeps; a program that makes more starts again."""


class Plan:
    """What the launches of a kernel for one layout of its tensors share, and the kernels compiled for it.

    Triton's own launcher looks at every argument in every launch. Where nothing has changed that the kernel was
    compiled for, the compiled kernel is launched directly:

        launch = plan.launch(q_ptr=q, S=S, ...)
        launch.keep(launch.run[grid](*launch.values, **launch.options))

    Args:
        kernel: the kernel.
        config: tiles, warps and stages.
        arguments: what stays the same for these layouts; tensors are left out and have to be given to `launch`. Numbers
            given there must be of one type in every call.
    """

    def __init__(self, kernel: Any, config: Config, arguments: dict[str, Any]) -> None:
        self.kernel, self.config = kernel, config
        options = config.options()
        self.options = {name: value for name, value in options.items() if name not in kernel.arg_names}
        known = {name: x for name, x in (arguments | options).items() if not isinstance(x, Tensor)}
        self.arguments = {name: known.get(name) for name in kernel.arg_names}
        self.specialised = set(kernel.arg_names).difference(getattr(kernel, "do_not_specialize", ()))
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def launch(self, **changing: Any) -> PreparedLaunch:
        """The launch with these arguments."""
        values = (self.arguments | changing).values()
        # A kernel is compiled for pointers and numbers that are multiples of 16, and for numbers that are 1.
        key = tuple([
            x.data_ptr() % 16 == 0 if isinstance(x, Tensor) else "1" if x == 1 else x % 16 == 0
            for name, x in changing.items()
            if isinstance(x, Tensor) or (type(x) is int and name in self.specialised)
        ])  # fmt: skip
        return PreparedLaunch(self.kernel, self.compiled, key, values, self.options)


class PreparedLaunch:
    """One launch: run[grid](*values, **options), whose result goes to `keep`.

    Args:
        kernel: the kernel, which Triton's own launcher runs if it has not been compiled for the key yet.
        compiled: kernel compiled for each key.
        key: what it is compiled for.
        values: of all its arguments, in order.
        options: how it is compiled.
        grid: what `prepare` was given, as three numbers.
    """

    def __init__(
        self, kernel: Any, compiled: dict[Any, Any], key: Any, values: Iterable[Any], options: dict[str, Any],
        grid: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.compiled, self.key, self.values = compiled, key, values
        self.grid = (*grid, 1, 1)[:3]
        found = compiled.get(key)
        self.run, self.options = (kernel, options) if found is None else (found, {})

    def keep(self, compiled: Any) -> None:
        """Remember what the kernel was compiled to; nothing in the interpreter, or if it was launched directly."""
        if compiled is not None:
            if len(self.compiled) >= PLANS_KEPT:
                self.compiled.clear()
            self.compiled[self.key] = compiled


_LAUNCHED: dict[Any, dict[Any, Any]] = {}


def forget_launches() -> None:
    """Give every kernel that `prepare` knows to Triton's launcher again, as those who watch that need it."""
    _LAUNCHED.clear()


def prepare(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> PreparedLaunch:
    """A launch that nobody has planned: its kernel is known again by all arguments but addresses.

        launch = prepare(kernel, grid, **arguments)
        launch.keep(launch.run[launch.grid](*launch.values, **launch.options))

    Args:
        kernel: the kernel.
        grid: one to three numbers of programs.
        arguments: of the kernel, without descriptors, and options of the launch.
    """
    names = kernel.arg_names
    values = [arguments.get(name) for name in names]
    options = {name: x for name, x in arguments.items() if name not in names}
    key: list[Any] = [*options.items()]
    for x in values:
        if isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() % 16 == 0, x.get_device()
        else:
            key.append(x)
    return PreparedLaunch(kernel, _LAUNCHED.setdefault(kernel, {}), tuple(key), values, options, grid)


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
    """Whether nobody compiles, exports, traces, transforms or differentiates a call, or watches its operators."""
    return _is_unwatched(*tensors) and not _is_differentiated(*tensors)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_unwatched(*tensors: Tensor | None) -> bool:
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


class Operator:
    """An operator in PyTorch's registry, and its body by itself where nobody watches.

    With as many arguments as ours the dispatcher takes the host some hundred microseconds, more than many kernels take
    the device.

    Args:
        name: "attnzoo::...".
        body: computes the results, and changes nothing that it is given.
        schema: arguments and results. Default: by the body's annotations.
        alone: replaces the body in calls that nobody differentiates.
    """

    def __init__(
        self, name: str, body: Callable[..., Any], schema: str | None = None, alone: Callable[..., Any] | None = None
    ) -> None:
        self.registered = library.custom_op(name, body, mutates_args=(), schema=schema)
        self.register_fake = self.registered.register_fake
        self._name, self._body, self._alone = name, body, alone or body
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of `torch.library.CustomOpDef`; setup_context takes ctx, inputs and output."""
        self.registered.register_autograd(gradients, setup_context=setup_context)
        body = self._body

        # With a setup_context of its own, Function would look at the body's signature in every call.
        def forward(ctx: Any, *given: Any) -> Any:
            result = body(*given)
            setup_context(ctx, given, result)
            return result

        members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        self._function = type(self._name.replace("::", "_"), (torch.autograd.Function,), members)

    def __call__(self, *given: Any) -> Any:
        """The results for the arguments in the schema's order, tensors in lists among them."""
        lists = [x for x in given if isinstance(x, list)]
        tensors = [x for x in itertools.chain(given, *lists) if isinstance(x, Tensor)]
        if not _is_unwatched(*tensors):
            return self.registered(*given)
        if not _is_differentiated(*tensors):
            return self._alone(*given)
        # An operator without a formula says so when it is differentiated.
        return self.registered(*given) if self._function is None else self._function.apply(*given)


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator of an `Operator`'s body."""
    return lambda body: Operator(name, body, schema)


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
    """A scale that is not positive goes into the queries: kernels multiply by it after masks and maxima.

    It is a float, as a kernel that was compiled for one needs it.
    """
    if scale > 0:
        return float(scale), q, q_rope
    return 1.0, q * scale, None if q_rope is None else q_rope * scale
