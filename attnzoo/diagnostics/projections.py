"""The matrices by which linear layers multiply, whatever wraps them: adapters, quantisation, parametrisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.layer_probe import alone, line_of
from attnzoo.ops.submodules import place_of

Reader = Callable[[nn.Module], Tensor]
"""Gives the matrix (out, in) of a projection: `matrix`, or `blank` where only its shape matters."""


class ProjectionError(ValueError):
    """A projection has no matrix that can be read."""


def unwrapped(projection: Any) -> Any:
    """The layer inside the adapters of PEFT, or the layer itself."""
    while isinstance(getattr(projection, "base_layer", None), nn.Module):
        projection = projection.base_layer
    return projection


def blank(projection: nn.Module) -> Tensor:
    """A tensor on the meta device with the shape (out, in) of a projection's matrix; nothing is computed."""
    base = unwrapped(projection)
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return torch.empty(weight.T.shape if hasattr(base, "nf") else weight.shape, device="meta")
    # Quantised weights are packed.
    return torch.empty(base.out_features, base.in_features, device="meta")


def matrix(projection: nn.Module) -> Tensor:
    """The matrix (out, in) by which a projection multiplies; one that is not plain is called, without hooks.

    Raises:
        ProjectionError: for a projection that cannot be called alone, or is not linear.
    """
    weight: Any = getattr(projection, "weight", None)
    if type(projection).forward is nn.Linear.forward:
        return weight  # type: ignore[no-any-return]
    # A transformers Conv1D stores (in, out).
    if hasattr(projection, "nf") and type(projection).__name__ == "Conv1D":
        return weight.T  # type: ignore[no-any-return]
    device, dtype = place_of(projection)
    width = blank(projection).shape[1]
    draw = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    unit = torch.eye(width, dtype=dtype, device=device)
    try:
        with alone(projection), torch.no_grad():
            bias, image, found = (_first(projection(x)) for x in (torch.zeros_like(draw), unit, draw))
            image, found = image - bias, found - bias
    except Exception as error:
        raise ProjectionError(
            f"its {type(projection).__name__} does not work as a linear layer "
            f"({type(error).__name__} when it is called alone: {line_of(error)})"
        ) from None
    within = max(1e-4, 20 * torch.finfo(found.dtype).eps) * float(found.abs().max() + bias.abs().max())
    if not float((draw.double() @ image.double() - found.double()).abs().max()) <= within:
        raise ProjectionError(f"its {type(projection).__name__} is not linear")
    return image.T.contiguous()


def _first(output: Any) -> Tensor:
    """What a linear layer returns; some return a bias or a scale beside it."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
