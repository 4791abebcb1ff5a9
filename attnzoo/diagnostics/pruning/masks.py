"""Masks on head outputs of any model.

A head's output c (B, T, Dv) is what the output projection reads. A head mask xi multiplies it; 1 is the untouched
model, 0 removes the head, and the projection's bias stays (Michel, Levy and Neubig 2019, arXiv:1905.10650). Masks are
hooks, so every model that `attention_layers` knows works unchanged.

Heads have original numbers: in a model that has been pruned structurally, removed heads keep their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import check_mask, pairs_of
from attnzoo.diagnostics.batches import uncompiled
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.rules import SIZES, SWITCH, check

UNITS = ("head", "kv_group")
"""What can be removed: a head, or a key/value head with all of its query heads."""

Head = tuple[int, int]
"""Layer, and head or key/value group, by original numbers."""


@dataclass(frozen=True)
class HeadSlots:
    """The places of a model's heads in tables (L, H) and in the inputs of its output projections.

    Attributes:
        layers: the model's attention layers.
        kept: per layer, the original numbers of its heads in the projection's order.
        total: H, the largest number of heads that a layer had originally.
    """

    layers: tuple[AttentionLayer, ...]
    kept: tuple[tuple[int, ...], ...]
    total: int

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.layers), self.total

    def present(self) -> Tensor:
        """Which heads exist, boolean (L, H)."""
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
            grouped = layer.num_heads == layer.num_kv_heads * layer.heads.group_size
            if heads != tuple(range(self.total)) or not grouped:
                raise ValueError(
                    f"unit 'kv_group' needs layers of {self.total} query heads in groups, none of them removed, but "
                    f"{layer.name!r} has heads {list(heads)} and {layer.num_kv_heads} key/value heads"
                )
            sizes.add(layer.heads.group_size)
        if len(sizes) != 1:
            raise ValueError(f"unit 'kv_group' needs groups of one size in all layers, got {sorted(sizes)}")
        return sizes.pop()


def head_slots(model: nn.Module) -> HeadSlots:
    """The heads of a model by their original numbers."""
    layers = tuple(attention_layers(model))
    total = max(layer.heads.total for layer in layers)
    return HeadSlots(layers, tuple(layer.heads.kept for layer in layers), total)


@contextmanager
def masked_heads(model: nn.Module, xi: Tensor) -> Iterator[None]:
    """Within the context every head's output is multiplied by its entry of xi, which may need a gradient.

    Masks compose: a context within another multiplies both. All ones change nothing, bit for bit. A compiled model
    runs uncompiled meanwhile.

    Args:
        model: any model that `attention_layers` knows.
        xi: (L, H), or (B, L, H) with a mask for each sequence; any real values.

    Raises:
        ValueError: for another shape or dtype, a batch of another size inside, or a layer that takes no hooks.
    """
    slots = head_slots(model)
    check_mask("xi", xi, "(L, H)", "(B, L, H)")
    if xi.ndim not in (2, 3) or tuple(xi.shape[-2:]) != slots.shape:
        raise ValueError(f"xi must be (L, H) or (B, L, H) with {slots.shape}, got {tuple(xi.shape)}")
    with hooked(slots, lambda index, heads: heads * layer_scale(xi, slots, index, heads)):
        yield


def head_mask(heads: Iterable[Head], shape: tuple[int, int], *, rescale: bool = False) -> Tensor:
    """Ones (L, H) float64 with zeros at these heads; with rescale, survivors of a layer get H / (number of them)."""
    check("shape", shape, SIZES)
    check("rescale", rescale, SWITCH)
    xi = torch.ones(shape, dtype=torch.float64)
    for layer, head in pairs_of("heads", heads):
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
        stack.enter_context(uncompiled())
        for index, layer in enumerate(slots.layers):
            if slots.kept[index]:
                stack.callback(layer.hook_heads(function(index)).remove)
        yield seen


def check_seen(slots: HeadSlots, seen: set[int]) -> None:
    """Raise ValueError if a layer did not run, since a mask on it would silently do nothing."""
    for index, layer in enumerate(slots.layers):
        if index not in seen:
            raise ValueError(f"loss_fn must run every attention layer of the model, but {layer.name!r} never ran")
