"""Figures of a model's layers over training: rows {"step", "layer", figure, ...}, as JSON lines or from a callback."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
RUN_LENGTH = 3
"""Consecutive records with a spike that count as an onset."""

LABELS = {
    "confidence": "largest weight of a row",
    "current_token": "weight on the token itself",
    "distance": "attention distance (tokens)",
    "distance_argmax": "distance to the largest weight (tokens)",
    "effective_rank": "effective rank (dimensions)",
    "entropy": "attention entropy (nats)",
    "hard_rank": "rank (dimensions)",
    "induction_stripe": "weight on the induction stripe",
    "ks_bulk": "Kolmogorov-Smirnov distance to the law",
    "lambda_max": "largest eigenvalue",
    "mp_gap": "gap: largest eigenvalue / edge - 1",
    "mp_softrank": "soft rank: edge / largest eigenvalue",
    "normalized_entropy": "attention entropy / largest possible",
    "outlier_count": "eigenvalues above the threshold",
    "outlier_energy": "share of the energy in outliers",
    "outlier_fraction": "share of the eigenvalues that are outliers",
    "pair_cosine": "cosine with the patterns of the layer's other heads",
    "participation_ratio": "participation ratio (dimensions)",
    "previous_token": "weight on the token before",
    "sink": "weight on the first token",
    "spectral_entropy": "spectral entropy / largest possible",
    "stable_rank": "stable rank (dimensions)",
}
"""Labels of figures on axes and colour bars."""


def label(metric: str) -> str:
    """The name of a figure with its unit; the key itself, with spaces, if it has no other."""
    return LABELS.get(metric, metric.replace("_", " "))


def to_line(row: Row) -> str:
    """A row as a line of JSON, which has no NaN and no infinities: those become null."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(content: Any) -> Any:
    """Plain values with None for every float that is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line that was cut off, as when a run is killed, is left out.

    Raises:
        ValueError: for any other line that is not a JSON object.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:40]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:40]!r}")
        rows.append(row)
    return rows


def by_layer_and_step(rows: Sequence[Row], metric: str) -> tuple[list[Any], list[Any], list[list[float]]]:
    """Layers in order of appearance, steps ascending, and the mean (L, S) over rows of each, NaN where there is none.

    Raises:
        ValueError: if no row has a finite value of the metric.
    """
    values: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        value = row.get(metric)
        if value is not None and math.isfinite(value):
            values.setdefault((row.get("layer"), row.get("step", 0)), []).append(float(value))
    if not values:
        raise ValueError(f"records must hold the figure {metric!r}, got {len(rows)} rows without it")
    layers = list(dict.fromkeys(layer for layer, _ in values))
    steps = sorted({step for _, step in values})
    means = {key: statistics.fmean(numbers) for key, numbers in values.items()}
    return layers, steps, [[means.get((layer, step), math.nan) for step in steps] for layer in layers]


def over_steps(rows: Sequence[Row], metric: str) -> tuple[list[Any], list[float], list[float], list[float]]:
    """Steps, and the mean, smallest and largest of the layers' means at each."""
    _, steps, table = by_layer_and_step(rows, metric)
    columns = [[value for value in column if math.isfinite(value)] for column in zip(*table, strict=True)]
    means = [statistics.fmean(column) for column in columns]
    return steps, means, [min(column) for column in columns], [max(column) for column in columns]


@dataclass(frozen=True)
class SpikeHistory:
    """When spikes appeared in the spectra, and whether they stayed; see `spike_history`.

    Attributes:
        onset: by layer, the first step of the first run of 3 records with a spike; None without such a run.
        persistence: by layer, the share of the records after the onset with a spike; None without an onset, or
            with none after it.
        spread: layers whose onset came after the first layer's.
        collapsed: by layer, the first step at which the mean stable rank is below half of its first record's; None
            if it never was.
    """

    onset: dict[Any, int | None]
    persistence: dict[Any, float | None]
    spread: int
    collapsed: dict[Any, int | None]


def spike_history(rows: Sequence[Row], *, gap: float = 0.1) -> SpikeHistory:
    """Onset, persistence and spread of spikes, and rank collapse.

    A layer has a spike at a step if one of its rows has outlier_count > 0 and mp_gap > gap. The definitions are this
    project's own (after the words of the abstract of arXiv:2507.09394).

    Args:
        rows: records with step, layer, outlier_count, mp_gap and stable_rank, of one matrix.
        gap: what mp_gap has to exceed.

    Raises:
        ValueError: if no row has these figures.
    """
    layers, steps, ranks = by_layer_and_step(rows, "stable_rank")
    spiked = {
        (row.get("layer"), row.get("step", 0))
        for row in rows
        if (row.get("outlier_count") or 0) > 0 and (row.get("mp_gap") or 0.0) > gap
    }
    onset: dict[Any, int | None] = {}
    persistence: dict[Any, float | None] = {}
    collapsed: dict[Any, int | None] = {}
    for layer, own in zip(layers, ranks, strict=True):
        recorded = [(step, rank) for step, rank in zip(steps, own, strict=True) if math.isfinite(rank)]
        events = [(layer, step) in spiked for step, _ in recorded]
        starts = [i for i in range(len(events) - RUN_LENGTH + 1) if all(events[i : i + RUN_LENGTH])]
        later = events[starts[0] + 1 :] if starts else []
        onset[layer] = recorded[starts[0]][0] if starts else None
        persistence[layer] = sum(later) / len(later) if later else None
        collapsed[layer] = next((step for step, rank in recorded if rank < recorded[0][1] / 2), None)
    began = [step for step in onset.values() if step is not None]
    spread = sum(step > min(began) for step in began) if began else 0
    return SpikeHistory(onset, persistence, spread, collapsed)
