"""Operations on shards show nothing to observers: they would take some tokens or heads for those of the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import Tensor

from attnzoo.ops.observation import current_observer, observing

P = ParamSpec("P")


def unobserved(operation: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The same operation, whose own calls of others are shown to nobody."""

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if current_observer() is None:
            return operation(*args, **kwargs)
        with observing(None):
            return operation(*args, **kwargs)

    return run
