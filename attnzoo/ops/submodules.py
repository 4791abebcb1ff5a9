"""Submodules whose weights an operation would like to use directly, and when it may."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnzoo.ops.precision import without_autocast


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what its weights say: exactly one of these types (default: Linear), and no hooks.

    Adapters, quantised layers, parametrised and hooked modules are not plain and have to be called.
    """
    if type(module) not in (kinds or (nn.Linear,)):
        return False
    assert module is not None
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked


def own_shapes(module: nn.Module) -> list[str]:
    """ "name=(sizes)" of each parameter that a module holds itself, for its repr."""
    return [f"{name}={tuple(parameter.shape)}" for name, parameter in module.named_parameters(recurse=False)]


Split = TypeVar("Split", bound=Tensor | None)


def local(parameter: Split) -> Split:
    """A parameter as operations take it: of one that is split over ranks (a DTensor) this rank's part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[union-attr]


def matrix_of(linear: nn.Module) -> Tensor:
    """The (out, in) matrix by which a linear layer multiplies, detached; adapters and parametrisations included."""
    weight = getattr(linear, "weight", None)
    if type(linear) is nn.Linear or (parametrize.is_parametrized(linear) and isinstance(weight, Tensor)):
        assert isinstance(weight, Tensor)
        return weight.detach()
    width: int = linear.in_features  # type: ignore[assignment]
    like = next((p for p in linear.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.no_grad():
        unit = torch.eye(width, dtype=like.dtype, device=like.device)
        zero: Tensor = linear(torch.zeros_like(unit[:1]))
        image: Tensor = linear(unit) - zero
    return image.T.contiguous()


def precise_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) in at least float32, outside autocast, as routers want it; a layer that is not plain is called."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        if not is_plain(linear):
            called: Tensor = linear(x.to(place_of(linear)[1]))
            return called.to(dtype)
        assert isinstance(linear, nn.Linear)
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return F.linear(x.to(dtype), linear.weight.to(dtype), bias)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x) in x's dtype, computed in the gain's: under autocast x is half precision and the gain is float32."""
    if norm is None:
        return x
    gain = getattr(norm, "weight", None)
    y: Tensor = norm(x.to(gain.dtype) if isinstance(gain, Tensor) else x)
    return y.to(x.dtype)


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's first floating-point tensor; those of quantised modules are float32 on the CPU."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def start_layer(module: nn.Module, std: float) -> None:
    """The start of a layer beside the projections: normal with `std` and biases 0, norms 1, others as they do it."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
