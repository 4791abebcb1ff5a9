"""Arithmetic in the precision that its terms have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def has_autocast(device: str) -> bool:
    """Whether a kind of device knows autocast, as "meta" does not."""
    # torch.compile before 2.12 cannot ask; what it compiles for knows it.
    return device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtype of their factors."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()
