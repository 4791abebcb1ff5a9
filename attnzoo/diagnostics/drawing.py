"""What all pictures are made of: themes, panels, grids of cells, legends, and files.

Beside `plots` the only file that imports matplotlib.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.rules import check, one_of

THEMES: dict[str, dict[str, Any]] = {
    "light": {"background": "#ffffff", "text": "#1a1a1a", "faint": "#6e6e6e", "fill": "#b8c4d6", "first": "#0072B2"},
    "dark": {"background": "#16181d", "text": "#e8e8e8", "faint": "#9a9a9a", "fill": "#465063", "first": "#56B4E9"},
}
"""Colours of the background, text, secondary text, histograms, and the first curve."""

# Okabe and Ito's colours; line style and marker distinguish repetitions.
COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999933", "#F0E442")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ACROSS = 4
"""Panels of a figure in one row."""
NUMBERED = 80
"""Cells of a heat map that is small enough for their numbers."""
SEQUENTIAL, DIVERGING, MISSING = "cividis", "PuOr", "#7f7f7f"
DPI = 130
FORMATS = ("png", "pdf", "svg")
"""Kinds of files that a figure can be written as."""
FONT = "DejaVu Sans"


@contextlib.contextmanager
def themed(theme: str) -> Iterator[dict[str, Any]]:
    """matplotlib's settings of a theme, for the figures created inside."""
    check("theme", theme, one_of(*THEMES))
    import matplotlib

    look = THEMES[theme]
    text, ground, faint = look["text"], look["background"], look["faint"]
    settings = {
        "figure.facecolor": ground, "savefig.facecolor": ground, "axes.facecolor": ground, "text.color": text,
        "axes.edgecolor": faint, "axes.labelcolor": text, "axes.titlecolor": text, "xtick.color": faint,
        "ytick.color": faint, "xtick.labelcolor": text, "ytick.labelcolor": text, "grid.color": faint,
        "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.facecolor": ground, "legend.edgecolor": faint,
        "legend.labelcolor": text, "legend.framealpha": 0.85, "legend.fontsize": 8.5, "font.size": 9.5,
        "axes.titlesize": 10.5, "figure.titlesize": 11.5, "axes.spines.top": False, "axes.spines.right": False,
        "font.family": FONT,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield look


def make_figure(
    panels: int, *, width: float, height: float, stacked: bool = False, columns: int | None = None
) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, stacked on one horizontal axis, or in rows of `columns`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if stacked:
        shape = (panels, 1)
    else:
        across = columns or panels
        shape = (-(-panels // across), across)
    grid = figure.subplots(*shape, sharex=stacked, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[panels:]:
        unused.remove()
    axes = axes[:panels]
    for one in axes:
        one.grid(True)
        one.set_axisbelow(True)
    return figure, axes


def draw_grid(
    axes: Any,
    values: Sequence[Sequence[float]],
    low: float,
    high: float,
    colours: str,
    log: bool,
    square: bool = False,
    missing: str = MISSING,
) -> Any:
    """Cells (rows, columns) in the colours of a scale from low to high; NaN in the colour for missing ones."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    axes.grid(False)
    cmap = colormaps[colours].with_extremes(bad=missing)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    aspect = "equal" if square else "auto"
    return axes.imshow(values, cmap=cmap, norm=norm, aspect=aspect, interpolation="nearest")


def draw_numbers(
    axes: Any, image: Any, values: Sequence[Sequence[float]], numbers: Sequence[Sequence[float]] | None = None
) -> None:
    """Write each cell's number (or another one) into it, dark on light colours and light on dark ones.

    All have as many decimals as two digits of the colours' largest number need, the same in all panels; where that is
    too many, where they are very large, or where colours follow the logarithm, each has two digits of its own.
    """
    from matplotlib.colors import LogNorm

    numbers = values if numbers is None else numbers
    largest = max(map(abs, image.get_clim()))
    decimals = max(0, 2 - math.ceil(math.log10(largest))) if largest > 0 else 0
    plain = decimals < 5 and largest < 1e5 and not isinstance(image.norm, LogNorm)
    form = f".{decimals}f" if plain else ".1e" if decimals >= 5 else ".2g"
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            number = numbers[row][column]
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                shade = "#1a1a1a" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
                # Adding 0 after rounding leaves no minus sign at a zero.
                text = format(round(number, decimals) + 0.0 if plain else number, form)
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)


def draw_colour_bar(figure: Any, image: Any, panels: Sequence[Any], text: str) -> Any:
    """The scale of the panels' colours, labelled, at their side."""
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.02)
    bar.set_label(text)
    bar.outline.set_visible(False)
    return bar


def label_cells(axes: Any, which: str, names: Sequence[str], most: int, upright: bool = False) -> None:
    """Labels at the cells of one axis, at most `most` of them, evenly spaced."""
    every = max(1, -(-len(names) // most))
    places = list(range(0, len(names), every))
    axis = axes.xaxis if which == "x" else axes.yaxis
    shown = [names[place] for place in places]
    axis.set_ticks(places, labels=shown)
    if which == "x" and (upright or sum(len(name) for name in shown) > 40):
        axes.tick_params(axis="x", labelrotation=90 if upright else 45)


def line_style(number: int, look: Mapping[str, Any]) -> dict[str, Any]:
    """Colour, dashes and marker of a figure's line with this number."""
    colours = (look["first"], *COLOURS)
    return {
        "color": colours[number % len(colours)], "linestyle": _LINES[number // len(colours) % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4.5, "linewidth": 1.6,
    }  # fmt: skip


def draw_legend(axes: Any, entries: int, width: float) -> None:
    """A legend; if it is long, beside the axes of a figure that gets wider by it."""
    if entries > 5:
        columns = 1 + entries // 17
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=columns)
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        wider = width + columns * (0.6 + 0.07 * longest)
        axes.figure.set_figwidth(max(axes.figure.get_figwidth(), wider))
    elif entries:
        axes.legend(loc="best")


def wrapped(text: str, inches: float) -> str:
    """A title in lines that fit this width."""
    return textwrap.fill(text, max(16, int(12.5 * inches)))


# Files


def to_bytes(figure: Any, kind: str = "png", dpi: int = DPI) -> bytes:
    """The figure as a file's bytes: "png", "pdf" or "svg". A figure gives the same bytes each time.

    Raises:
        ValueError: for another kind of file.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, got {kind!r}")
    import matplotlib

    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    buffer = io.BytesIO()
    # Fonts of type 3, matplotlib's default, are refused by some publishers.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "attnzoo"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated)
    return buffer.getvalue()


def to_png(figure: Any, dpi: int = DPI) -> bytes:
    """The figure as a PNG file's bytes."""
    return to_bytes(figure, "png", dpi)


def to_array(figure: Any, dpi: int = 90) -> Tensor:
    """The figure's pixels, (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    width, height = canvas.get_width_height()
    # A copy, since the canvas's memory goes with it.
    pixels = bytearray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 4)[..., :3].clone()


def save(figure: Any, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG, PDF or SVG, as the path ends, atomically, and create the folder.

    Raises:
        ValueError: for another ending.
    """
    path = Path(path)
    content = to_bytes(figure, path.suffix[1:].lower(), dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return path
