"""Results of a comparison as two pictures: learning curves, and quality against cache."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from attnzoo.diagnostics.plots import to_bytes
from attnzoo_recipes.files import write_atomically

LINE = 10.5
"""Points from a name to the next below it."""

FILLED = 0.82
"""The share of a figure's height that its axes have, about."""

LETTER = 0.0095
"""The width of a letter of a name, as a share of the axes' width, about."""

BESIDE = 0.015
"""From a point to a name right of it."""

MARKER = 0.01
"""Half of a point's width."""

Place = tuple[float, float]
"""A point of the axes, from (0, 0) to (1, 1)."""


def draw_losses(runs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """Validation bits per byte over steps: one line per mechanism, the mean over its seeds, with their range.

    Of several learning rates, the lines have the common one.
    """
    finished, ends = _finished(runs, facts.get("rate")), []
    figure, axes = _figure(len(finished))
    for number, (name, own) in enumerate(finished.items()):
        curves = [dict(run["curve"]) for run in own]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        means, style = [statistics.fmean(v) for v in values], _style(number, len(finished))
        axes.plot(steps, means, **style)
        if len(curves) > 1:
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.2
            )
        if steps:
            ends.append((steps[-1], means[-1], name, style["color"]))
    note = "" if facts.get("bigram") is None else f"; bigram entropy {facts['bigram']:.3f}"
    axes.set(xlabel="optimiser step", ylabel="validation (bits per byte)", title=f"Learning curves{note}")
    label_points(axes, ends)
    _finish(figure, axes, path)


def draw_quality(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation bits per byte against cache bytes per token, with standard errors."""
    figure, axes = _figure(len(rows))
    shown, points = [(i, row) for i, row in enumerate(rows) if row["val_bits_per_byte"] is not None], []
    for number, row in shown:
        style = _style(number, len(rows))
        x, y = row["cache_bytes_per_token"], row["val_bits_per_byte"]
        error = row["standard_error"]
        axes.errorbar(
            [x], [y], yerr=None if error is None else [error], color=style["color"], marker=style["marker"],
            markersize=8, linestyle="", capsize=3,
        )  # fmt: skip
        points.append((x, y, row["mechanism"], style["color"]))
    if shown and all(row["cache_bytes_per_token"] > 0 for _, row in shown):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(
        xlabel="cache (bytes per token, bfloat16, all layers)", ylabel="validation (bits per byte)",
        title="Quality against cache",
    )  # fmt: skip
    label_points(axes, points)
    _finish(figure, axes, path)


def _finished(runs: Sequence[Mapping[str, Any]], rate: float | None) -> dict[str, list[Mapping[str, Any]]]:
    finished: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["status"] == "finished" and run.get("rate") == rate:
            finished.setdefault(run["mechanism"], []).append(run)
    return finished


# Okabe and Ito's colours, which colour-blind readers can tell apart; line style and marker vary as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
_LINES = ("-", "--", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def _style(number: int, count: int) -> dict[str, Any]:
    from matplotlib import colormaps

    # More mechanisms than Okabe and Ito have colours take theirs along a map, neighbours far from each other.
    place = (number * 5 % count if count % 5 else number * 7 % count) / count
    mapped = colormaps["turbo"](0.04 + 0.92 * place)[:3]
    return {
        "color": _COLOURS[number] if count <= len(_COLOURS) else tuple(0.85 * part for part in mapped),
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def label_points(axes: Any, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each point's name to its right, and draw a line to it where names would cover each other or a point."""
    if not points:
        return
    axes.margins(x=0.05)
    left, _ = axes.get_xlim()
    # Names stand within the axes.
    widths = [LETTER * len(name) for _, _, name, _ in points]
    to_axes = axes.transData + axes.transAxes.inverted()
    far = to_axes.inverted().transform((1 + max(widths) + 0.11, 0))[0]
    axes.set_xlim(left, far)
    places = [(float(x), float(y)) for x, y in to_axes.transform([(x, y) for x, y, _, _ in points])]
    gap = LINE / (72 * FILLED * axes.figure.get_figheight())
    for column in _columns(places, widths, gap):
        names = _names(places, column, gap)
        leads = any(names[i][0] != places[i][0] + BESIDE for i in column)
        line = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5)}
        for i in column:
            x, y, name, colour = points[i]
            axes.annotate(
                name, (x, y), names[i], textcoords="axes fraction", va="center", fontsize=8, color=colour,
                arrowprops={**line, "color": colour} if leads else None,
            )  # fmt: skip


def _names(places: Sequence[Place], column: Sequence[int], gap: float) -> dict[int, Place]:
    """Where the names of a column of points begin: beside their points, or one below another right of all of them."""
    heights = spread([places[i][1] for i in column], gap)
    moved = max(abs(height - places[i][1]) for i, height in zip(column, heights, strict=True))
    side, first = max(places[i][0] for i in column), min(places[i][0] for i in column)
    if moved > gap / 2 or side - first > gap:
        return {i: (side + min(0.03 + moved / 4, 0.1), height) for i, height in zip(column, heights, strict=True)}
    return {i: (places[i][0] + BESIDE, height) for i, height in zip(column, heights, strict=True)}


def _columns(places: Sequence[Place], widths: Sequence[float], gap: float) -> list[list[int]]:
    """Indices of points in columns, whose names and lines cover neither points nor names of another column."""
    columns = [[i] for i in range(len(places))]
    while True:
        names = [_names(places, column, gap) for column in columns]
        for one, other in permutations(range(len(columns)), 2):
            taken = [(places[i][0] - MARKER, places[i][1], 2 * MARKER) for i in columns[other]]
            taken += [(x, y, widths[i]) for i, (x, y) in names[other].items()]
            if any(_meets(places[i], name, widths[i], taken, 0.99 * gap) for i, name in names[one].items()):
                columns[min(one, other)] += columns.pop(max(one, other))
                break
        else:
            return columns


def _meets(point: Place, name: Place, width: float, taken: Sequence[tuple[float, float, float]], height: float) -> bool:
    """Whether a name, or the line to it, meets what begins at (x, y) and is so wide."""
    (x0, y0), (x1, y1) = point, name
    for x, y, wide in taken:
        if x - width < x1 < x + wide and abs(y - y1) < height:
            return True
        ends = [min(max(end, x0), x1) for end in (x, x + wide)]
        if x1 - x0 > BESIDE and ends[0] < ends[1] and wide > 2 * MARKER:
            low, high = sorted(y0 + (y1 - y0) * (end - x0) / (x1 - x0) for end in ends)
            if low - height / 2 < y < high + height / 2:
                return True
    return False


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights within (0, 1) with distances of `gap` or more, in their order and, in squares, nearest to those given."""
    from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]  # has no stubs

    count = len(heights)
    gap = min(gap, 1 / count)
    order = sorted(range(count), key=lambda i: heights[i])
    moved = isotonic_regression([heights[i] - place * gap for place, i in enumerate(order)]).x
    within = moved.clip(gap / 2, 1 - gap / 2 - gap * (count - 1))
    found = [0.0] * count
    for place, i in enumerate(order):
        found[i] = float(within[place]) + place * gap
    return found


def _figure(names: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(5, names * LINE / (72 * FILLED))), layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    write_atomically(path, to_bytes(figure, path.suffix[1:], dpi=150))
