"""Numbers of layers and heads, counts, seeds and tensors, as callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.rules import INTEGER, SIZE, Rule, check, describe, is_number, number_of, numbers_of

SEED: Rule = (*INTEGER, (lambda value: -(2**63) <= value < 2**63, "be an integer of 64 bits"))
"""Of a torch generator."""
TOLERANCE: Rule = ((lambda value: is_number(value) and 0 <= value < 1, "lie in [0, 1)"),)
"""A relative size below which a singular value is zero."""


def check_tensor(name: str, value: object) -> None:
    """Raise ValueError unless a value is a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {describe(value)}")
    if value.is_complex() or value.is_meta or value.layout is not torch.strided:
        kind = "meta" if value.is_meta else value.dtype if value.is_complex() else value.layout
        raise ValueError(f"{name} must hold real numbers, got {kind}")


def layers_of(layers: object, count: int) -> list[int]:
    """Numbers of layers, each from 0 to count - 1; all of them for None."""
    if layers is None:
        return list(range(count))
    numbers = numbers_of("layers", layers)
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"layers must lie between 0 and {count - 1}, got {number}")
    return numbers


def pairs_of(name: str, pairs: object) -> list[tuple[int, int]]:
    """(layer, head) pairs as Python's integers, from pairs or from {layer: heads}."""
    if isinstance(pairs, Mapping):
        by_layer = [(number_of(name, layer), numbers_of(name, heads)) for layer, heads in pairs.items()]
        return [(layer, head) for layer, heads in by_layer for head in heads]
    given: list[Any] = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str) else [pairs]
    for pair in given:
        if (
            not isinstance(pair, tuple | list | Tensor)
            or (isinstance(pair, Tensor) and not pair.ndim)
            or len(pair) != 2
        ):
            raise ValueError(f"{name} must be (layer, head) pairs, got {describe(pair)}")
    return [(number_of(name, layer), number_of(name, head)) for layer, head in given]


def check_wanted(num_examples: object) -> None:
    """Raise ValueError unless a number of examples is None or at least 1."""
    if num_examples is not None:
        check("num_examples", num_examples, SIZE)


def check_mask(name: str, mask: object, *shapes: str) -> None:
    """Raise ValueError unless a head mask is a floating-point tensor."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor {' or '.join(shapes)}, got {describe(mask)}")


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError for a value that is not among the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
