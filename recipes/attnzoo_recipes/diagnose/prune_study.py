"""Pruning of one model, measured: importance, ablations, curves in several orders, and the speed of removed heads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attnzoo.diagnostics.pruning.ablation import HeadAblation, ablate_heads
from attnzoo.diagnostics.pruning.curves import BASELINES, HeadPruningCurve, head_pruning_curve, sort_heads, unprotected
from attnzoo.diagnostics.pruning.evaluate import LossFn
from attnzoo.diagnostics.pruning.importance import head_importance, normalize_importance
from attnzoo.diagnostics.pruning.masks import Head, head_slots
from attnzoo.diagnostics.pruning.speed import PruningSpeed, pruning_speed
from attnzoo_recipes.diagnose.load_model import LoadedModel
from attnzoo_recipes.diagnose.losses import (
    decode,
    embeddings,
    label_losses,
    logits_of,
    next_token_losses,
    output_of,
    predicts_tokens,
    retrieval_losses,
)
from attnzoo_recipes.diagnose.tensors import SUFFIXES, batches_of, read_tensors
from attnzoo_recipes.diagnose.texts import PairBatch, pair_batches, reader, refuse_pairs, sequences

WARMUP = 1
"""Rounds of the timing before those that count."""


@dataclass(frozen=True)
class Task:
    """What a model is judged by, and the calls that are timed.

    Attributes:
        batches: of examples.
        loss_fn: gives the losses of a batch's examples.
        examples: their number.
        coupled: whether an example's loss depends on other examples.
        loss: name of the loss, with its unit.
        score: name of the second score, or None.
        chance: loss of a model for which all answers are equally likely.
        calls: by name, a call and the number of its tokens, or None.
    """

    batches: list[Any]
    loss_fn: LossFn
    examples: int
    coupled: bool
    loss: str
    score: str | None
    chance: float
    calls: Mapping[str, tuple[Callable[[nn.Module], Tensor], int | None]]


@dataclass(frozen=True)
class Point:
    """One point of a curve: heads (or groups) removed, loss, and second score."""

    removed: int
    loss: float
    score: float | None


@dataclass(frozen=True)
class Study:
    """Everything that was measured.

    Attributes:
        task: what was measured.
        curves: by name, the first in the order by which speed was measured.
        points: of all curves and baselines by name, with the whole model at 0.
        ablations: by mode.
        speed: by name of the call.
        obstacle: why speed was not measured, or None.
    """

    task: Task
    curves: Mapping[str, HeadPruningCurve]
    points: Mapping[str, tuple[Point, ...]]
    ablations: Mapping[str, HeadAblation]
    speed: Mapping[str, PruningSpeed]
    obstacle: str | None

    @property
    def first(self) -> HeadPruningCurve:
        """The first curve."""
        return next(iter(self.curves.values()))


def task_of(
    loaded: LoadedModel, path: Path, *, length: int, examples: int | None, batch_size: int | None, decoded: int,
    device: torch.device,
) -> Task:  # fmt: skip
    """Loss of labels for a file of tensors; else next-token loss for language models, and retrieval for others.

    Args:
        loaded: the model.
        path: of the tensors (see `read_tensors`), of the text, or of lines {"query": ..., "document": ...}.
        length: tokens of a sequence, or the largest number of tokens in a pair's text.
        examples: their number, which the file must hold. Default: up to 32 sequences, or all pairs or tensors.
        batch_size: examples processed together. Default: 4 sequences, 64 pairs or 16 tensors. Each batch of
            pairs is a retrieval task of its own.
        decoded: tokens that are read one at a time in the timing of decoding; 0 omits it.
        device: of the model.

    Raises:
        ValueError: for a file of another kind or with too few examples, or an argument outside its rule.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if decoded < 0:
        raise ValueError(f"decoded must not be negative, got {decoded}")
    if path.suffix in SUFFIXES:
        return _labels(loaded, path, examples, batch_size or 16, device)
    read = reader(loaded)
    if predicts_tokens(loaded):
        refuse_pairs("data", path)
        tokens = sequences("data", path, read, length, examples, most=32, counted="examples").to(device)
        batches = list(torch.split(tokens, 4 if batch_size is None else batch_size))
        first = batches[0]
        calls: dict[str, tuple[Callable[[nn.Module], Tensor], int | None]] = {
            "prefill": (lambda model: logits_of(model, first), first.numel())
        }
        if decoded:
            steps = first[:1, :decoded]
            calls["decoding"] = (lambda model: decode(model, steps), steps.numel())
        chance = _chance(logits_of(loaded.model, first[:1, :1]))
        return Task(batches, next_token_losses, len(tokens), False, "loss (nats per token)", None, chance, calls)
    pairs = [
        PairBatch(*((ids.to(device), real.to(device)) for ids, real in (batch.queries, batch.documents)))
        for batch in pair_batches("data", path, read, length, examples, 64 if batch_size is None else batch_size)
    ]
    ids, real = pairs[0].documents
    sizes = [len(batch.queries[0]) for batch in pairs]
    return Task(
        pairs, retrieval_losses, sum(sizes), True, "loss (nats per query)",
        "share of queries whose document comes first", sum(n * math.log(n) for n in sizes) / sum(sizes),
        {"forward": (lambda model: embeddings(model, ids, real), ids.numel())},
    )  # fmt: skip


def _labels(loaded: LoadedModel, path: Path, examples: int | None, batch_size: int, device: torch.device) -> Task:
    tensors = read_tensors("data", path, loaded.model, examples)
    batches, shifted = batches_of(tensors, batch_size, device), predicts_tokens(loaded)
    first = batches[0]
    with torch.no_grad():
        label_losses(loaded.model, first, shifted)
        chance = _chance(output_of(loaded.model, first))
    return Task(
        batches, lambda model, batch: label_losses(model, batch, shifted), len(next(iter(tensors.values()))), False,
        "loss (nats per label)", "share of labels that are most likely", chance,
        {"forward": (lambda model: output_of(model, first), None)},
    )  # fmt: skip


def _chance(logits: Tensor) -> float:
    """Cross-entropy of equally likely classes (..., C)."""
    return math.log(logits.shape[-1])


def study(
    model: nn.Module, task: Task, *, percents: Sequence[float], modes: Sequence[str], normalize: Sequence[str],
    granularity: str, unit: str, min_heads_per_layer: int, rescale: bool, seeds: Sequence[int], ablate: Sequence[str],
    speed: Sequence[float], rounds: int,
) -> Study:  # fmt: skip
    """Measure everything, with progress bars.

    Args:
        model: in eval mode.
        task: what it is judged by.
        percents, granularity, unit, min_heads_per_layer, rescale, seeds: see `head_pruning_curve`.
        modes: "greedy", "iterative"; there is a curve for each pair of a mode and an entry of normalize.
        normalize: "l2", "minmax", "none".
        ablate: modes of `ablate_heads`.
        speed: percents of heads whose removal, in the order of the first curve, is timed.
        rounds: of the timing.
    """
    common: dict[str, Any] = {"percents": percents, "unit": unit, "rescale": rescale, "coupled": task.coupled}
    importance: dict[str, Any] = {"granularity": granularity, "min_heads_per_layer": min_heads_per_layer}
    curves: dict[str, HeadPruningCurve] = {}
    if "greedy" in modes:
        curves |= greedy_curves(model, task, normalize, seeds=seeds, **importance, **common)
    for how in normalize if "iterative" in modes else ():
        curves[f"iterative, {how}"] = head_pruning_curve(
            model, task.batches, task.loss_fn, mode="iterative", normalize=None if how == "none" else how,
            baselines=() if curves else BASELINES, seeds=seeds, **importance, **common,
        )  # fmt: skip
    ablations = {
        mode: ablate_heads(model, task.batches, task.loss_fn, mode, rescale=rescale) for mode in ablate
    }  # fmt: skip
    first = next(iter(curves.values()))
    try:
        timed, obstacle = (
            (measure_speed(model, task, first, speed, rounds), None) if speed else ({}, "was not asked for")
        )
    except ValueError as error:
        timed, obstacle = {}, str(error)
    return Study(task, curves, all_points(curves), ablations, timed, obstacle)


def greedy_curves(
    model: nn.Module, task: Task, normalize: Sequence[str], *, percents: Sequence[float], granularity: str, unit: str,
    min_heads_per_layer: int, rescale: bool, seeds: Sequence[int], coupled: bool,
) -> dict[str, HeadPruningCurve]:  # fmt: skip
    """`head_pruning_curve` for every normalisation from one measurement of importance; the first has baselines."""
    raw = head_importance(
        model, task.batches, task.loss_fn, granularity=granularity, normalize=None, unit=unit, coupled=coupled
    )
    slots = head_slots(model)
    size = slots.group_size() if unit == "kv_group" else 1
    units = slots.units(size)

    def along(order: Sequence[Head], baselines: Sequence[str] = ()) -> HeadPruningCurve:
        return head_pruning_curve(
            model, task.batches, task.loss_fn, order=unprotected(order, min_heads_per_layer), percents=percents,
            unit=unit, min_heads_per_layer=min_heads_per_layer, rescale=rescale, baselines=baselines, seeds=seeds,
        )  # fmt: skip

    curves: dict[str, HeadPruningCurve] = {}
    for how in normalize:
        table = normalize_importance(raw, None if how == "none" else how)
        order = sort_heads(table, units)
        curve = replace(along(order, () if curves else ("random",)), mode="greedy", importance=table)
        if not curves:
            curve = replace(curve, baselines={**curve.baselines, "reverse": along(order[::-1])})
        curves[f"greedy, {how}"] = curve
    return curves


def measure_speed(
    model: nn.Module, task: Task, curve: HeadPruningCurve, percents: Sequence[float], rounds: int
) -> dict[str, PruningSpeed]:
    """Time of every call of the task with heads removed in the order of the curve.

    Percents beyond the end of the order are left out.

    Raises:
        ValueError: if the model's heads cannot be removed.
    """
    size = head_slots(model).group_size() if curve.unit == "kv_group" else 1
    order = [(layer, unit * size + i) for layer, unit in curve.order for i in range(size)]
    fractions = [percent / 100 for percent in percents if int(curve.total * size * percent / 100) <= len(order)]
    if not fractions:
        raise ValueError(f"at most {len(order)} heads may go, fewer than each of {list(percents)} percent")
    speeds = {}
    for name, (call, tokens) in task.calls.items():
        total = 2 * len(fractions) * (WARMUP + rounds)
        with tqdm(total=total, desc=f"speed of {name}", delay=2, leave=False, disable=None) as bar:

            def counted(model: nn.Module, call: Callable[[nn.Module], Tensor] = call, bar: Any = bar) -> Tensor:
                bar.update()
                return call(model)

            speeds[name] = pruning_speed(
                model, counted, fractions=fractions, order=order, tokens=tokens, rounds=rounds, warmup=WARMUP
            )
    return speeds


def all_points(curves: Mapping[str, HeadPruningCurve]) -> dict[str, tuple[Point, ...]]:
    """Curves and their baselines, each with the whole model as its first point."""
    named = dict(curves)
    first = next(iter(curves.values()))
    start = Point(0, first.base_loss, first.base_score)
    baselines = {name.replace("random", "random "): curve for name, curve in first.baselines.items()}
    points = {}
    for name, curve in [*named.items(), *baselines.items()]:
        losses = curve.losses.tolist()
        scores = [None] * len(losses) if curve.scores is None else curve.scores.tolist()
        own = [Point(*point) for point in zip(curve.counts, losses, scores, strict=True)]
        points[name] = (*([start] if own[0].removed else []), *own)
    return points


def drawn(points: Mapping[str, Sequence[Point]], what: str) -> dict[str, tuple[list[float], list[Any]]]:
    """Curves of "loss" or "score" for `plots.pruning_curves`, with the random ones as one range."""
    curves: dict[str, tuple[list[float], list[Any]]] = {}
    for name, own in points.items():
        if not name.startswith("random"):
            curves[name] = ([point.removed for point in own], [getattr(point, what) for point in own])
    chance = [own for name, own in points.items() if name.startswith("random")]
    if chance:
        columns = [[getattr(point, what) for point in column] for column in zip(*chance, strict=True)]
        ranges = [(min(column), statistics.fmean(column), max(column)) for column in columns]
        curves["random"] = ([point.removed for point in chance[0]], list(ranges))
    return curves
