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


def autocasted(x: Tensor) -> Tensor:
    """x in autocast's dtype where it is on, as a linear layer takes its input; float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
