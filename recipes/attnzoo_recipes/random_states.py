"""The random states of a process."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """The states of this process's default generators, as tensors and plain values; NumPy's if it is imported."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": None,
    }
    if "numpy" in sys.modules:
        kind, key, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [str(kind), torch.tensor(key.tolist()), int(position), int(has_gauss), float(cached)]
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; states that this process does not have are skipped."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if states["numpy"] is not None and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        kind, key, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(key.tolist(), dtype=numpy.uint32), *rest))
