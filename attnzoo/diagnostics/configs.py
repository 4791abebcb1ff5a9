"""The transformers configurations that the modules of a model hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

RAGGED = "attnzoo_ragged"
"""Name of the attention function that gathers key/value heads for query heads in uneven groups."""


def is_config(value: Any) -> bool:
    """Whether an attribute is a transformers configuration, which names the attention function."""
    return hasattr(value, "_attn_implementation_internal") and not isinstance(value, nn.Module)


def configs_in(module: nn.Module) -> dict[int, Any]:
    """The configurations that a module and those inside it hold, by their ids, as a memo for copies that share them."""
    held = (value for part in module.modules() for value in vars(part).values())
    return {id(value): value for value in held if is_config(value)}


def own_configs(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Give the modules of a model configurations of their own: other models may have been made from the same objects.

    Returns:
        What takes that back.
    """
    places = [
        (vars(module), name, value) for module in modules for name, value in vars(module).items() if is_config(value)
    ]
    # Configurations inside others are copied with them, each once.
    copies: dict[int, Any] = {}
    for _, _, config in places:
        copy.deepcopy(config, copies)
    for holder, name, config in places:
        holder[name] = copies[id(config)]

    def undo() -> None:
        for holder, name, config in places:
            holder[name] = config

    return undo
