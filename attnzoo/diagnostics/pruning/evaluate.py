"""Running a model's loss: in eval mode, under a head mask, with its losses checked."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.batches import in_eval_mode
from attnzoo.diagnostics.pruning.masks import HeadSlots, check_seen, hooked, layer_scale

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
"""Called as loss_fn(model, batch): losses (B,) of the batch's examples, or a pair of those and second scores (B,)."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the context; warns if the model was in training mode with dropout."""
    if any(module.training and _drops(module) for module in model.modules()):
        warnings.warn("the model is in training mode with dropout; heads are measured in eval mode", stacklevel=4)
    with in_eval_mode(model):
        yield


def _drops(module: nn.Module) -> bool:
    values = [getattr(module, name, None) for name in ("p", "dropout", "attention_dropout")]
    return any(isinstance(value, float) and value > 0 for value in (values if hasattr(module, "p") else values[1:]))


def losses_of(loss_fn: LossFn, model: nn.Module, batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """Losses (B,) and second scores (B,) of a batch, checked."""
    result = loss_fn(model, batch)
    if isinstance(result, tuple) and len(result) != 2:
        raise ValueError(f"loss_fn must return losses, or a pair of losses and scores, got {len(result)} values")
    losses, scores = result if isinstance(result, tuple) else (result, None)
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must return a loss for each example, shape (B,), got {got}")
    finite = losses.detach().isfinite()
    if not bool(finite.all()):
        worst = int((~finite).nonzero()[0])
        value = float(losses.detach()[worst])
        raise ValueError(f"loss_fn must return finite losses, got {value} for example {worst} of batch {number}")
    if scores is not None:
        if not isinstance(scores, Tensor) or scores.shape != losses.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"loss_fn must return a score for each of the {len(losses)} examples, got {got}")
        if not bool(scores.isfinite().all()):
            raise ValueError(f"loss_fn must return finite scores, got others for batch {number}")
    return losses, scores


@torch.no_grad()
def evaluate(
    model: nn.Module, slots: HeadSlots, batches: list[Any], loss_fn: LossFn, xi: Tensor | None, wanted: int | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (N,) and second scores (N,) of all examples under a mask, float64 on the CPU."""
    losses, scores, done = [], [], 0

    def change(index: int, heads: Tensor) -> Tensor:
        return heads if xi is None else heads * layer_scale(xi, slots, index, heads)

    with evaluating(model), hooked(slots, change) as seen:
        for number, batch in enumerate(batches):
            if wanted is not None and done >= wanted:
                break
            of_batch, more = losses_of(loss_fn, model, batch, number)
            check_seen(slots, seen)
            left = None if wanted is None else wanted - done
            losses.append(of_batch[:left].double().cpu())
            done += len(losses[-1])
            if more is not None:
                scores.append(more[:left].double().cpu())
            if len(scores) not in (0, len(losses)):
                raise ValueError(f"loss_fn must return scores for all batches or for none, got both by batch {number}")
    check_count(done, wanted)
    return torch.cat(losses), torch.cat(scores) if scores else None


def check_count(done: int, wanted: int | None) -> None:
    """Raise ValueError if there were no examples, or fewer than asked for."""
    if done == 0:
        raise ValueError("batches must hold at least one example, got none")
    if wanted is not None and done < wanted:
        raise ValueError(f"num_examples must not exceed the examples in batches, got {wanted} and {done}")


def progress_bar(items: Iterable[Any], what: str, progress: bool) -> Iterable[Any]:
    """The items, behind a progress bar once they have taken some seconds, on a terminal with tqdm."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        return items
    tqdm: Any = importlib.import_module("tqdm").tqdm
    bar: Iterable[Any] = tqdm(items, desc=what, leave=False, delay=3, disable=None)
    return bar
