"""Observing attention from outside: operations show what they are about to compute to a callback, if one is set.

def show(observation):
    print(observation.operation, observation.q.shape)

with observing(show):
    model(tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnzoo.masks import Visibility
from attnzoo.ops.score_rules import ScoreRules


class ScoreMap(Protocol):
    """A map of all heads' scores or weights (B, H, T, S), as `ops.composed_attention.Composition` is one."""

    def at(self, queries: slice, keys: slice | Tensor) -> ScoreMap:
        """The map of a tile of the scores."""

    def heads_after(self, heads: int) -> int:
        """How many heads H' so many heads H become."""

    def __call__(self, a: Tensor) -> Tensor:
        """Heads (B, H, t, s) -> (B, H', t, s)."""


@dataclass(frozen=True, eq=False)
class Observation:
    """The arguments of one attention operation, as it received them.

    Attributes:
        operation: "softmax_attention", "sigmoid_attention", "composed_attention", "differential_attention",
            "latent_attention", "multi_token_attention", "selective_attention" or "routed_attention".
        q: queries (B, T, Hq, D).
        k: keys (B, S, G, D).
        v: values (B, S, Gv, Dv). Latent attention reads keys and values from one tensor, so k and v are the same.
        view: which query sees which key.
        rules: how scores are made and normalised, without masks.
        pre: map of the scores over heads, or None.
        post: map of the weights over heads, or None.
        value_heads: indices (Hv,) of the heads whose outputs are computed. None: all.
        value_groups: which of v's heads each of those reads. None: head n reads n // (Hv / Gv).
    """

    operation: str
    q: Tensor
    k: Tensor
    v: Tensor
    view: Visibility
    rules: ScoreRules
    pre: ScoreMap | None = None
    post: ScoreMap | None = None
    value_heads: Tensor | None = None
    value_groups: tuple[int, ...] | None = None


Observer = Callable[[Observation], None]
"""Called with the observation of every attention operation, before the operation computes anything."""

_OBSERVERS: ContextVar[tuple[Observer | None, ...]] = ContextVar("attnzoo_observers", default=())


def current_observer() -> Observer | None:
    """The callback to show an observation to; None if there is none, and while torch.compile traces."""
    if torch.compiler.is_compiling() or not _OBSERVERS.get():
        return None
    observers: list[Observer] = []
    for callback in _OBSERVERS.get():
        if callback is None:
            observers.clear()
        else:
            observers.append(callback)
    if len(observers) < 2:
        return observers[0] if observers else None

    def every(observation: Observation) -> None:
        for observer in observers:
            observer(observation)

    return every


@contextmanager
def observing(callback: Observer | None) -> Iterator[None]:
    """Show every attention operation inside the block to a callback, after those of enclosing blocks.

    An operation calls the callback before it computes. An operation that it delegates to is shown as well, after it,
    and a mechanism may make an observation of its own before it runs several operations. So the first observation
    inside a module's forward is the one that describes the module.

    Args:
        callback: takes an `Observation`. What it raises reaches the caller of the operation. None: operations inside
            the block are shown to nobody.
    """
    _OBSERVERS.set((*_OBSERVERS.get(), callback))
    try:
        yield
    finally:
        # Blocks may end in another order than they began.
        left = list(_OBSERVERS.get())
        del left[len(left) - 1 - left[::-1].index(callback)]
        _OBSERVERS.set(tuple(left))
