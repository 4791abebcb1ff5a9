"""The configurations that the modules of a model hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from attnzoo.hugging_face.layer import AttentionLayer


def own_configs(model: nn.Module) -> Callable[[], None]:
    """Give a model configurations of its own, since another may have been made from the same objects.

    Returns:
        What takes that back.
    """
    places = [
        (vars(module), name, value)
        for module in _every_module(model)
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
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


def _every_module(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        yield module
        if isinstance(module, AttentionLayer):
            yield from module.skeleton.modules()
