"""Masks on head outputs of any model, and running a model's loss under them.

A head's output c (B, T, Dv) is what the output projection reads. A head mask xi multiplies it; 1 is the untouched
model, 0 removes the head, and the projection's bias stays (Michel, Levy and Neubig 2019, arXiv:1905.10650). Masks are
hooks, so every model that `attention_layers` knows works as it is.

Heads have original numbers: in a model that has been pruned structurally, heads that are gone keep their columns.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.modules.moa import MixtureOfAttentionHeads
from attnzoo.modules.talking_heads import TalkingHeadsAttention

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
"""Called as loss_fn(model, batch): losses (B,) of the batch's examples, or a pair of those and second scores (B,)."""

Head = tuple[int, int]
"""Layer, and head or key/value group, by original numbers."""


@dataclass(frozen=True)
class HeadSlots:
    """Where the heads of a model stand in tables (L, H) and at the inputs of its output projections.

    Attributes:
        layers: the model's attention layers.
        kept: per layer, the original numbers of its heads in the projection's order.
        total: H, the largest original number of heads of a layer.
    """

    layers: tuple[AttentionLayer, ...]
    kept: tuple[tuple[int, ...], ...]
    total: int

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.layers), self.total

    def present(self) -> Tensor:
        """Which heads there are, boolean (L, H)."""
        table = torch.zeros(self.shape, dtype=torch.bool)
        for layer, heads in enumerate(self.kept):
            table[layer, list(heads)] = True
        return table

    def units(self, size: int) -> list[Head]:
        """(layer, unit) for units of `size` heads: 1 for heads, `group_size()` for key/value groups."""
        return [(int(layer), int(unit)) for layer, unit in self.present()[:, ::size].nonzero().tolist()]

    def group_size(self) -> int:
        """Query heads that share a key/value head, the same in all layers.

        Raises:
            ValueError: if heads have been removed, or layers differ.
        """
        sizes = set()
        for layer, heads in zip(self.layers, self.kept, strict=True):
            mixed = isinstance(layer.module, TalkingHeadsAttention) and layer.num_heads != layer.num_kv_heads
            if heads != tuple(range(self.total)) or mixed:
                raise ValueError(
                    f"unit 'kv_group' needs layers of {self.total} query heads in groups, none of them removed, but "
                    f"{layer.name!r} has heads {list(heads)} and {layer.num_kv_heads} key/value heads"
                )
            sizes.add(layer.num_heads // layer.num_kv_heads)
        if len(sizes) != 1:
            raise ValueError(f"unit 'kv_group' needs groups of one size in all layers, got {sorted(sizes)}")
        return sizes.pop()


def head_slots(model: nn.Module) -> HeadSlots:
    """The heads of a model by their original numbers."""
    layers, kept, totals = tuple(attention_layers(model)), [], []
    for layer in layers:
        gone: set[int] = set()
        # A mixture of experts counts experts there, while its masks are those of the active heads.
        if not isinstance(layer.module, MixtureOfAttentionHeads):
            gone = set(getattr(layer.module, "pruned_heads", ()))
        totals.append(layer.num_heads + len(gone))
        kept.append(tuple(h for h in range(totals[-1]) if h not in gone))
    return HeadSlots(layers, tuple(kept), max(totals))


@contextmanager
def masked_heads(model: nn.Module, xi: Tensor) -> Iterator[None]:
    """Within the context every head's output is multiplied by its entry of xi, which may need a gradient.

    Masks compose: a context within another multiplies both. All ones change nothing, bit for bit.

    Args:
        model: any model that `attention_layers` knows.
        xi: (L, H), or (B, L, H) with a mask for each sequence; any real values.

    Raises:
        ValueError: for another shape or dtype, a batch of another size inside, or a layer that takes no hooks.
    """
    slots = head_slots(model)
    if not xi.is_floating_point() or xi.ndim not in (2, 3) or tuple(xi.shape[-2:]) != slots.shape:
        shape = tuple(xi.shape)
        raise ValueError(f"xi must be floating-point (L, H) or (B, L, H) with {slots.shape}, got {xi.dtype} {shape}")
    with hooked(slots, lambda index, heads: heads * layer_scale(xi, slots, index, heads)):
        yield


def head_mask(heads: Iterable[Head], shape: tuple[int, int], *, rescale: bool = False) -> Tensor:
    """Ones (L, H) float64 with zeros at these heads; with rescale, survivors of a layer get H / (number of them)."""
    xi = torch.ones(shape, dtype=torch.float64)
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ValueError(f"heads must lie within {shape[0]} layers of {shape[1]}, got {(layer, head)}")
        xi[layer, head] = 0
    return xi * (shape[1] / xi.sum(1, keepdim=True).clamp(min=1)) if rescale else xi


def layer_scale(xi: Tensor, slots: HeadSlots, index: int, heads: Tensor) -> Tensor:
    """Entries of one layer, in the shape in which they multiply heads (B, ..., H, Dv)."""
    chosen = xi[..., index, :]
    if len(slots.kept[index]) != slots.total:
        chosen = chosen[..., list(slots.kept[index])]
    chosen = chosen.to(heads.device, heads.dtype)[..., None]
    if xi.ndim == 2:
        return chosen
    if xi.shape[0] != heads.shape[0]:
        raise ValueError(f"xi must have one mask for each of the {heads.shape[0]} sequences, got {xi.shape[0]}")
    return chosen.view(chosen.shape[0], *[1] * (heads.ndim - 3), *chosen.shape[1:])


@contextmanager
def hooked(slots: HeadSlots, change: Callable[[int, Tensor], Tensor]) -> Iterator[set[int]]:
    """Replace head outputs by change(layer index, heads (B, T, H, Dv)); yields the layers that have run."""
    seen = {index for index, heads in enumerate(slots.kept) if not heads}

    def function(index: int) -> Callable[[Tensor], Tensor]:
        def changed(heads: Tensor) -> Tensor:
            seen.add(index)
            return change(index, heads)

        return changed

    with ExitStack() as stack:
        for index, layer in enumerate(slots.layers):
            if slots.kept[index]:
                stack.callback(layer.hook_heads(function(index)).remove)
        yield seen


def check_seen(slots: HeadSlots, seen: set[int]) -> None:
    """Refuse a run that passed layers by: a mask on them would be silently without effect."""
    for index, layer in enumerate(slots.layers):
        if index not in seen:
            raise ValueError(f"loss_fn must run every attention layer of the model, but {layer.name!r} never ran")


# Running a model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the context; warns if the model was in training mode with dropout."""
    before = [(module, module.training) for module in model.modules()]
    if any(training and _drops(module) for module, training in before):
        warnings.warn("the model is in training mode with dropout; heads are measured in eval mode", stacklevel=4)
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _drops(module: nn.Module) -> bool:
    values = [getattr(module, name, None) for name in ("p", "dropout", "attention_dropout")]
    return any(isinstance(value, float) and value > 0 for value in (values if hasattr(module, "p") else values[1:]))


def losses_of(loss_fn: LossFn, model: nn.Module, batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """Losses (B,) and second scores (B,) of a batch, checked."""
    found = loss_fn(model, batch)
    losses, scores = found if isinstance(found, tuple) else (found, None)
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must return a loss for each example, shape (B,), got {got}")
    finite = losses.detach().isfinite()
    if not bool(finite.all()):
        worst = int((~finite).nonzero()[0])
        value = float(losses.detach()[worst])
        raise ValueError(f"loss_fn must return finite losses, got {value} for example {worst} of batch {number}")
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
            found, more = losses_of(loss_fn, model, batch, number)
            check_seen(slots, seen)
            left = None if wanted is None else wanted - done
            losses.append(found[:left].double().cpu())
            done += len(losses[-1])
            if more is not None:
                scores.append(more[:left].double().cpu())
    check_count(done, wanted)
    return torch.cat(losses), torch.cat(scores) if scores else None


def check_count(done: int, wanted: int | None) -> None:
    """Refuse no examples, or fewer than asked for."""
    if done == 0:
        raise ValueError("batches must hold at least one example, got none")
    if wanted is not None and done < wanted:
        raise ValueError(f"num_examples must not exceed the examples in batches, got {wanted} and {done}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def progress_bar(items: Iterable[Any], what: str, progress: bool) -> Iterable[Any]:
    """The items, behind a progress bar once they have taken some seconds, on a terminal with tqdm."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        return items
    tqdm: Any = importlib.import_module("tqdm").tqdm
    bar: Iterable[Any] = tqdm(items, desc=what, leave=False, delay=3, disable=None)
    return bar
