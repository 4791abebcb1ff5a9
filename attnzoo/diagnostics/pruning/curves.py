"""Pruning curves: the loss while heads are removed in an order.

After "Are Sixteen Heads Really Better than One?" (Michel, Levy and Neubig 2019, arXiv:1905.10650). Heads are masked;
`structural.prune_heads` removes them. In a model that has been pruned structurally, the columns of removed heads stay
in the importance table, hold 0, and are never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import SEED, check_choice, check_wanted, pairs_of
from attnzoo.diagnostics.pruning.evaluate import LossFn, evaluate, progress_bar
from attnzoo.diagnostics.pruning.importance import GRANULARITIES, NORMALIZATIONS, head_importance
from attnzoo.diagnostics.pruning.masks import UNITS, Head, head_mask, head_slots
from attnzoo.rules import COUNT, SWITCH, check, describe, is_number, numbers_of

MODES = ("greedy", "iterative")
BASELINES = ("random", "reverse")


@dataclass(frozen=True, eq=False)
class PruningCurve:
    """Losses while heads are removed in an order.

    Attributes:
        order: (layer, head) or (layer, group), first removed first.
        counts: how many of them are removed at each point.
        losses: mean losses, float64 (points,).
        scores: means of the loss function's second scores, or None.
    """

    order: tuple[Head, ...]
    counts: tuple[int, ...]
    losses: Tensor
    scores: Tensor | None

    def removed(self, point: int) -> tuple[Head, ...]:
        """What is removed at a point."""
        return self.order[: self.counts[point]]


@dataclass(frozen=True, eq=False)
class HeadPruningCurve(PruningCurve):
    """A pruning curve, and what it is compared with.

    Attributes:
        mode: "greedy", "iterative" or "given".
        unit: "head" or "kv_group": what order and counts count.
        total: how many of them the full model has.
        percents: as given.
        min_heads_per_layer: how many of the best of every layer are protected.
        base_loss: mean loss of the full model.
        base_score: mean of its second scores, or None.
        importance: of the full model as it was sorted, (L, H) or (L, G); None for a given order.
        baselines: curves by name: "random0", "random1", ... by seed, and "reverse".
    """

    mode: str
    unit: str
    total: int
    percents: tuple[float, ...]
    min_heads_per_layer: int
    base_loss: float
    base_score: float | None
    importance: Tensor | None
    baselines: Mapping[str, PruningCurve]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""

        def plain(curve: PruningCurve) -> dict[str, Any]:
            scores = None if curve.scores is None else curve.scores.tolist()
            order = [list(head) for head in curve.order]
            return {"order": order, "counts": list(curve.counts), "losses": curve.losses.tolist(), "scores": scores}

        names = ("mode", "unit", "total", "min_heads_per_layer", "base_loss", "base_score")
        return {
            **{name: getattr(self, name) for name in names},
            "percents": list(self.percents),
            "importance": None if self.importance is None else self.importance.tolist(),
            **plain(self),
            "baselines": {name: plain(curve) for name, curve in self.baselines.items()},
        }


def head_pruning_curve(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    order: Sequence[Head] | None = None,
    mode: str = "greedy",
    percents: Iterable[float] = range(10, 100, 10),
    granularity: str = "example",
    normalize: str | None = "l2",
    unit: str = "head",
    min_heads_per_layer: int = 0,
    rescale: bool = False,
    baselines: Sequence[str] = BASELINES,
    seeds: Sequence[int] = (0, 1),
    coupled: bool = False,
    valid: Callable[[Any], Tensor] | None = None,
    num_examples: int | None = None,
    progress: bool = True,
) -> HeadPruningCurve:
    """Loss against heads removed, the least important first (Michel et al. 2019, section 4.2).

    At p percent the first int(total p / 100) of the order are masked. A layer may lose all its heads. "iterative"
    measures importance again before each point, at the heads removed so far, and keeps those removed.

    Args:
        model: any model that `attention_layers` knows; runs in eval mode.
        batches: kept in a list; importance and losses are of the same examples.
        loss_fn: see `LossFn`.
        order: (layer, head) pairs, instead of importance.
        mode: "greedy" measures importance once, "iterative" before each point.
        percents: ascending, from 0 to 100.
        granularity, normalize, unit, coupled, valid, num_examples, progress: as `head_importance`.
        min_heads_per_layer: protect this many of the best of every layer, of a given order the last ones and those
            that it does not name; the last points then remove fewer heads.
        rescale: multiply a layer's surviving heads by H / (number of them).
        baselines: "random" orders, one for each of `seeds`, and the "reverse" order, each with as many of its own last
            heads of every layer protected.
        seeds: of the random orders.

    Raises:
        ValueError: as `head_importance`, and for an unknown mode or baseline, percents that do not ascend, or an
            order that repeats a head or names one that does not exist.
    """
    check_choice("mode", mode, MODES)
    check_choice("unit", unit, UNITS)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("normalize", normalize, NORMALIZATIONS)
    if not isinstance(baselines, list | tuple):
        raise ValueError(f"baselines must be some of {', '.join(map(repr, BASELINES))}, got {describe(baselines)}")
    for name in baselines:
        check_choice("baselines", name, BASELINES)
    check("rescale", rescale, SWITCH)
    percents = _ascending(percents)
    check("min_heads_per_layer", min_heads_per_layer, COUNT)
    check_wanted(num_examples)
    seeds = numbers_of("seeds", seeds)
    for seed in seeds:
        check("seeds", seed, SEED)
    if order is not None and mode == "iterative":
        raise ValueError("mode 'iterative' finds an order of its own, got order too")
    slots = head_slots(model)
    size = slots.group_size() if unit == "kv_group" else 1
    units = slots.units(size)
    counts = [int(len(units) * p / 100) for p in percents]
    batches = list(batches)

    def importance(removed: Sequence[Head]) -> Tensor:
        return head_importance(
            model, batches, loss_fn, granularity=granularity, normalize=normalize, unit=unit,
            head_mask=masks(removed) if removed else None, coupled=coupled, valid=valid, num_examples=num_examples,
            progress=progress,
        )  # fmt: skip

    def masks(removed: Iterable[Head]) -> Tensor:
        heads = [(layer, u * size + i) for layer, u in removed for i in range(size)]
        xi = head_mask(heads, slots.shape)
        if rescale:
            left = (xi * slots.present()).sum(1, keepdim=True).clamp(min=1)
            xi = xi * slots.present().sum(1, keepdim=True) / left
        return xi

    first: Tensor | None = None
    if order is not None:
        full = pairs_of("order", order)
        if len(set(full)) != len(full) or set(full) - set(units):
            raise ValueError(f"order must name heads of the model once each, got {full}")
        chosen = unprotected(full, min_heads_per_layer, units)
    else:
        first = importance(())
        full = sort_heads(first, units)
        chosen = unprotected(full, min_heads_per_layer)
        if mode == "iterative":
            chosen = chosen[: counts[0]]
            for count in counts[1:]:
                again = importance(chosen) if chosen else first
                rest = sort_heads(again, [head for head in units if head not in chosen])
                chosen = chosen + unprotected(rest, min_heads_per_layer)[: count - len(chosen)]
    orders = {"": chosen}
    if "random" in baselines:
        orders |= {f"random{seed}": unprotected(_shuffled(units, seed), min_heads_per_layer) for seed in seeds}
    if "reverse" in baselines:
        orders["reverse"] = unprotected(full[::-1], min_heads_per_layer, units)

    base, base_scores = evaluate(model, slots, batches, loss_fn, None, num_examples)
    points = [(name, min(count, len(heads))) for name, heads in orders.items() for count in counts]
    losses: dict[str, list[float]] = {name: [] for name in orders}
    scores: dict[str, list[float]] = {name: [] for name in orders}
    for name, count in progress_bar(points, "pruning curves", progress):
        got, more = evaluate(model, slots, batches, loss_fn, masks(orders[name][:count]), num_examples)
        losses[name].append(float(got.mean()))
        if more is not None:
            scores[name].append(float(more.mean()))

    def curve(name: str) -> tuple[tuple[Head, ...], tuple[int, ...], Tensor, Tensor | None]:
        taken = tuple(count for at, count in points if at == name)
        second = torch.tensor(scores[name], dtype=torch.float64) if scores[name] else None
        return tuple(orders[name]), taken, torch.tensor(losses[name], dtype=torch.float64), second

    return HeadPruningCurve(
        *curve(""), mode="given" if order is not None else mode, unit=unit, total=len(units), percents=percents,
        min_heads_per_layer=min_heads_per_layer, base_loss=float(base.mean()),
        base_score=None if base_scores is None else float(base_scores.mean()), importance=first,
        baselines={name: PruningCurve(*curve(name)) for name in orders if name},
    )  # fmt: skip


def _ascending(percents: Any) -> tuple[float, ...]:
    """The percents; raises ValueError unless they are several numbers that ascend."""
    given = list(percents) if isinstance(percents, Iterable) else []
    rising = all(map(is_number, given)) and given == sorted(set(given)) and all(0 <= p <= 100 for p in given)
    if not given or not rising:
        shown = given if isinstance(percents, Iterable) else percents
        raise ValueError(f"percents must ascend between 0 and 100, got {shown}")
    return tuple(given)


def sort_heads(importance: Tensor, heads: Iterable[Head]) -> list[Head]:
    """These heads by ascending importance; ties by (layer, head)."""
    return sorted(heads, key=lambda head: (float(importance[head]), head))


def unprotected(order: Sequence[Head], per_layer: int, units: Iterable[Head] = ()) -> list[Head]:
    """The order without the last `per_layer` of each layer; units that it does not name stay, and count among those."""
    met: dict[int, int] = {}
    for layer, _ in set(units) - set(order):
        met[layer] = met.get(layer, 0) + 1
    left = []
    for layer, head in reversed(order):
        met[layer] = met.get(layer, 0) + 1
        if met[layer] > per_layer:
            left.append((layer, head))
    return left[::-1]


def _shuffled(units: list[Head], seed: int) -> list[Head]:
    return [units[i] for i in torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()]
