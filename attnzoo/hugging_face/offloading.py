"""Weights that accelerate keeps on another device, for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate has put hooks on the parts of a module; not asked in compiled calls, which it leaves out."""
    if torch.compiler.is_compiling():
        return False
    for part in module._modules.values():  # noqa: SIM110  (faster, and asked at every call of a layer)
        if part is not None and "_hf_hook" in part.__dict__:
            return True
    return False


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """All weights of a dispatched module where they are computed with, until the end of the context.

    accelerate's hooks bring the weights of a part for a call of that part alone, and attnzoo's modules also read them
    without such a call.
    """
    parts: list[Any] = [part for part in module.modules() if "_hf_hook" in part.__dict__]
    hooked: list[tuple[Any, Any]] = []
    try:
        for part in parts:
            part._hf_hook.pre_forward(part)
            hooked.append((part, part.forward))
            part.forward = part._old_forward
        yield
    finally:
        for part, forward in hooked:
            part.forward = forward
            part._hf_hook.post_forward(part, None)
