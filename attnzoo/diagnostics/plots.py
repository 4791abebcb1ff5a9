"""Pictures of the diagnostics' figures: spectra, heads by layer, development over training, pruning, attention maps.

Every function takes figures that other modules computed and returns a matplotlib Figure; `save` and `to_png` write
it. All share one look, in a light and a dark theme, with colours that colour-blind readers can distinguish. This is the
one file that imports matplotlib.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.diagnostics.spectra.marchenko_pastur import mp_pdf, product_edge
from attnzoo.diagnostics.spectra.spectrum import SpectrumRecord, product_pdf
from attnzoo.diagnostics.training_records import Row, by_layer_and_step, label, over_steps

THEMES: dict[str, dict[str, Any]] = {
    "light": {"background": "#ffffff", "text": "#1a1a1a", "faint": "#6e6e6e", "fill": "#b8c4d6", "first": "#0072B2"},
    "dark": {"background": "#16181d", "text": "#e8e8e8", "faint": "#9a9a9a", "fill": "#465063", "first": "#56B4E9"},
}
"""Colours of the background, text, secondary text, histograms, and the first curve."""

# Okabe and Ito's colours; line style and marker distinguish repetitions.
_COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999933", "#F0E442")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NUMBERED = 80
"""Cells of a heat map that is small enough for their numbers."""
_SEQUENTIAL, _DIVERGING, _MISSING = "cividis", "PuOr", "#7f7f7f"
DPI = 130
FORMATS = ("png", "pdf", "svg")
"""Kinds of files that a figure can be written as."""
FONT = "DejaVu Sans"


def esd(
    record: SpectrumRecord,
    *,
    title: str | None = None,
    bins: int | None = None,
    scale: str = "auto",
    theme: str = "light",
) -> Any:
    """Histogram of a record's eigenvalues with the law's density, its edge, the threshold and the outliers.

    The law is drawn for null "mp" (Marchenko-Pastur) and null "product" (`spectrum.product_pdf`). Both enclose the
    share of eigenvalues inside the threshold, so that a good bulk is under its curve.

    Args:
        record: of `analyze_matrix(..., keep_eigenvalues=True)`.
        title: default: layer, head and matrix.
        bins: of the histogram, below the threshold. Default: a third of the eigenvalues, between 12 and 60.
        scale: of the eigenvalues: "linear", "log", or "auto", which is "log" for products and for outliers beyond
            ten times the edge.
        theme: "light" or "dark".

    Raises:
        ValueError: for a record without eigenvalues, or an argument outside its rule.
    """
    if not record.eigenvalues:
        raise ValueError("record must hold eigenvalues (keep_eigenvalues=True), got none")
    bins = min(60, max(12, len(record.eigenvalues) // 3)) if bins is None else bins
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    if scale not in ("auto", "linear", "log"):
        raise ValueError(f"scale must be 'auto', 'linear' or 'log', got {scale!r}")
    values = torch.tensor(record.eigenvalues, dtype=torch.float64)
    far = record.lambda_plus is not None and record.lambda_max > 10 * record.lambda_plus
    logarithmic = scale == "log" or (scale == "auto" and (record.dims is not None or far))
    top = max(record.lambda_max, record.threshold or 0.0) * (1.3 if logarithmic else 1.05)
    low = max(float(values.min()), 1e-9 * top) / 1.3 if logarithmic else 0.0
    with _themed(theme) as look:
        figure, (axes,) = _figure(1, width=7.2, height=4.4)
        ends = [math.log10(x) if logarithmic else x for x in (low, record.threshold or top, top)]
        width = (ends[1] - ends[0]) / bins
        edges = ends[0] + width * torch.arange(math.ceil((ends[2] - ends[0]) / width) + 1, dtype=torch.float64)
        places = values.log10() if logarithmic else values
        counts = torch.histogram(places, edges).hist / (values.numel() * width)
        x_edges = (10**edges if logarithmic else edges).tolist()
        axes.stairs(counts.tolist(), x_edges, fill=True, color=look["fill"], label=f"{values.numel()} eigenvalues")
        grid = torch.linspace(float(edges[0]), float(edges[-1]), 1200, dtype=torch.float64)
        x = 10**grid if logarithmic else grid
        law = _law(record, x)
        if law is not None:
            density, name = law
            inside = 1 - (record.outlier_fraction or 0.0)
            density = density * inside * (x * math.log(10) if logarithmic else 1.0)
            shown = density > 0
            axes.plot(x[shown].tolist(), density[shown].tolist(), color=look["first"], linewidth=2, label=name)
        if record.lambda_plus is not None:
            axes.axvline(record.lambda_plus, color=look["text"], linewidth=1, linestyle="--", label="edge of the law")
        if record.threshold is not None:
            axes.axvline(record.threshold, color=look["text"], linewidth=1, linestyle=":", label="threshold")
            outliers = values[values > record.threshold].tolist()
            if outliers:
                height = 0.03 * max(float(counts.max()), 1e-12)
                named = f"{len(outliers)} outlier{'s' if len(outliers) > 1 else ''}, "
                named += f"{record.outlier_energy or 0.0:.0%} of the energy"
                axes.plot(outliers, [height] * len(outliers), "v", color=_COLOURS[2], markersize=8, label=named)
        if logarithmic:
            axes.set_xscale("log")
        # At gamma = 1 the density diverges at 0: the histogram sets the height.
        axes.set_ylim(0, 1.25 * float(counts.max()))
        squares = "$\\lambda = s^2$ of the product" if record.dims else "$\\lambda = s^2 / n_\\mathrm{big}$"
        axes.set(
            xlabel=f"eigenvalue {squares}",
            ylabel=f"density per {'decade' if logarithmic else 'unit'} of $\\lambda$",
            title=title if title is not None else _name(record),
        )
        axes.legend(loc="best")
        return figure


def _law(record: SpectrumRecord, x: Tensor) -> tuple[Tensor, str] | None:
    """Density of the record's null at x, over its non-zero eigenvalues, and the law's name."""
    if record.sigma2 and record.gamma:
        return mp_pdf(x, record.gamma, record.sigma2), "Marchenko-Pastur"
    if record.dims is not None and record.lambda_plus:
        scale = record.lambda_plus / product_edge(record.dims)[0]
        return product_pdf(x / scale, record.dims) / scale, "product of random matrices"
    return None


def _name(record: SpectrumRecord) -> str:
    head = None if record.head is None else f"head {record.head}"
    return ", ".join(part for part in (record.layer, head, record.matrix) if part)


def heatmap(
    records: Mapping[str, Sequence[Row]] | Sequence[Row],
    metric: str,
    *,
    log: bool = False,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """A figure by layer (down) and training step (across), one panel per model, one colour scale for all.

    Args:
        records: rows with "layer", "step" and the metric, such as the lines that a callback wrote; or several models'
            by name. Rows of one layer and step, such as its heads, are averaged; those without the metric left out.
        metric: name of the figure.
        log: whether colours follow its logarithm.
        title: default: the metric's label.
        theme: "light" or "dark".

    Raises:
        ValueError: if no row has the metric.
    """
    models = _models(records)
    tables = {name: by_layer_and_step(rows, metric) for name, rows in models.items()}
    with _themed(theme):
        widths = [
            max(3.0, 1.2 + (0.5 if len(layers) * len(steps) <= _NUMBERED else 0.32) * len(steps))
            for layers, steps, _ in tables.values()
        ]
        deepest = max(len(layers) for layers, _, _ in tables.values())
        figure, panels = _figure(
            len(tables), width=min(sum(widths) + 1.5, 16), height=min(max(2.6, 1.4 + 0.24 * deepest), 9)
        )
        low, high = _limits([values for _, _, values in tables.values()], log)
        image = None
        for axes, (name, (layers, steps, values)) in zip(panels, tables.items(), strict=True):
            image = _grid(axes, values, low, high, _SEQUENTIAL, log)
            if len(layers) * len(steps) <= _NUMBERED:
                _number(axes, image, values)
            _ticks(axes, "x", [f"{step:,}" for step in steps], 10)
            _ticks(axes, "y", _shorts(layers), 30)
            axes.set(xlabel="training step", ylabel="layer")
            if name:
                axes.set_title(name)
        _colour_bar(figure, image, panels, label(metric))
        figure.suptitle(title if title is not None else _headline(metric))
        return figure


def trajectory(
    records: Mapping[str, Sequence[Row]] | Sequence[Row],
    metric: str,
    *,
    by: str | None = None,
    log: bool = False,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """A figure over training steps: per model the mean over rows with the range of layers' means around it.

    Args:
        records: as of `heatmap`.
        metric: name of the figure.
        by: a key, such as "layer" or "head": one line for each of its values and no range.
        log: whether the figure's axis is logarithmic.
        title: default: the metric's label.
        theme: "light" or "dark".
    """
    models = _models(records)
    with _themed(theme) as look:
        figure, (axes,) = _figure(1, width=8.5, height=4.4)
        number = 0
        for name, rows in models.items():
            if by is not None:
                known = dict.fromkeys(row.get(by) for row in rows)
                for key, short in zip(known, _shorts(list(known)), strict=True):
                    own = [row for row in rows if row.get(by) == key]
                    steps, means, _, _ = over_steps(own, metric)
                    called = f"{by} {short}" if not name else f"{name}, {by} {short}"
                    axes.plot(steps, means, label=called, **_line(number, look))
                    number += 1
                continue
            steps, means, lows, highs = over_steps(rows, metric)
            style = _line(number, look)
            axes.plot(steps, means, label=name or "mean of the layers", **style)
            if lows != highs:
                axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
            number += 1
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="training step", ylabel=label(metric), title=title if title is not None else label(metric))
        _legend(axes, number)
        return figure


def head_map(
    values: Mapping[str, Tensor] | Tensor,
    metric: str = "importance",
    *,
    center: float | None = None,
    layers: Sequence[str] | None = None,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """A figure of every head, layers down and heads across: importance, loss when ablated, statistics.

    Args:
        values: (L, H), NaN where there is no head; or several by name, one panel each on one colour scale.
        metric: what the colour is.
        center: where a diverging scale is neutral, such as 0 for the loss that an ablation adds. Default: none, from
            the smallest to the largest.
        layers: names of the rows. Default: their numbers.
        title: default: the metric's label.
        theme: "light" or "dark".

    Raises:
        ValueError: for values of another shape, or nothing that is finite.
    """
    panels_of = values if isinstance(values, Mapping) else {"": values}
    tables = {name: torch.as_tensor(table).detach().double().cpu() for name, table in panels_of.items()}
    for table in tables.values():
        if table.ndim != 2:
            raise ValueError(f"values must have shape (L, H), got {tuple(table.shape)}")
    low, high = _limits([table.tolist() for table in tables.values()], False)
    if center is not None:
        reach = max(high - center, center - low) or 1.0
        low, high = center - reach, center + reach
    with _themed(theme):
        rows = max(table.shape[0] for table in tables.values())
        columns = sum(table.shape[1] + 3 for table in tables.values())
        named = _shorts(layers if layers is not None else range(rows))
        numbered = rows * max(table.shape[1] for table in tables.values()) <= _NUMBERED
        across = (0.5 if numbered else 0.34) * columns + 0.07 * max(map(len, named), default=0)
        figure, panels = _figure(
            len(tables), width=min(max(4.2, 1.8 + across), 16), height=min(max(2.6, 1.4 + 0.3 * rows), 10)
        )
        image = None
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            colours = _SEQUENTIAL if center is None else _DIVERGING
            image = _grid(axes, table.tolist(), low, high, colours, False)
            _ticks(axes, "x", [str(head) for head in range(table.shape[1])], 16)
            if numbered:
                _number(axes, image, table.tolist())
            # The panels have one vertical axis.
            first = axes is panels[0]
            _ticks(axes, "y", named if first else [""] * len(named), 32)
            axes.set(xlabel="head", ylabel="layer" if first else "")
            if name:
                axes.set_title(name)
        _colour_bar(figure, image, panels, label(metric))
        figure.suptitle(title if title is not None else _headline(metric))
        return figure


def pruning_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    speed: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    *,
    unit: str = "heads removed",
    loss: str = "loss (nats per token)",
    title: str = "Pruning",
    theme: str = "light",
) -> Any:
    """Loss over the number of pruned heads, and below, on the same axis, the speed.

    Args:
        curves: (counts, losses) by name, such as the order by importance, a random one and the reverse. Losses may
            be (low, mean, high) triples, which draw a range.
        speed: (counts, speed relative to the whole model) by name. Default: no second panel.
        unit: what the counts count.
        loss: what the losses are.
        title: of the figure.
        theme: "light" or "dark".

    Raises:
        ValueError: for a curve of unequal lengths.
    """
    for name, (counts, values) in {**curves, **(speed or {})}.items():
        if len(counts) != len(values):
            raise ValueError(f"curve {name!r} must have as many values as counts, got {len(values)} and {len(counts)}")
    with _themed(theme) as look:
        figure, panels = _figure(
            1 if speed is None else 2, width=7.6, height=4.2 if speed is None else 6.2, stacked=True
        )
        for axes, named in zip(panels, (curves, speed or {}), strict=False):
            for number, (name, (counts, values)) in enumerate(named.items()):
                style = _line(number, look)
                triples = [value if isinstance(value, Sequence) else (value, value, value) for value in values]
                axes.plot(counts, [middle for _, middle, _ in triples], label=name, **style)
                if any(low != high for low, _, high in triples):
                    lows, highs = [t[0] for t in triples], [t[2] for t in triples]
                    axes.fill_between(counts, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
        panels[0].set(ylabel=loss, title=title)
        _legend(panels[0], len(curves))
        if speed is not None:
            panels[1].axhline(1.0, color=look["faint"], linewidth=1, linestyle=":")
            panels[1].set_ylabel("speed / whole model's")
            _legend(panels[1], len(speed))
        panels[-1].set_xlabel(unit)
        return figure


def similarity_matrix(
    matrices: Mapping[str, Tensor] | Tensor,
    metric: str = "cosine",
    *,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    theme: str = "light",
) -> Any:
    """Heads against heads, one panel per layer (or name), one colour scale for all; the diagonals are left blank.

    Args:
        matrices: (H, H), or several by name.
        metric: what the colour is.
        limits: of the colours. Default: smallest and largest entry off the diagonals; with entries of both signs the
            colours diverge from 0.
        title: default: the metric's label.
        theme: "light" or "dark".

    Raises:
        ValueError: for a matrix that is not square.
    """
    named = matrices if isinstance(matrices, Mapping) else {"": matrices}
    tables = {name: torch.as_tensor(table).detach().double().cpu() for name, table in named.items()}
    for table in tables.values():
        if table.ndim != 2 or table.shape[0] != table.shape[1]:
            raise ValueError(f"matrices must have shape (H, H), got {tuple(table.shape)}")
    # What a head has in common with itself is known, and would take up the colours.
    tables = {
        name: table.masked_fill(torch.eye(table.shape[0], dtype=torch.bool), math.nan) for name, table in tables.items()
    }
    if limits is None:
        limits = _limits([table.tolist() for table in tables.values()], False)
        if limits[0] < 0 < limits[1]:
            limits = (-max(-limits[0], limits[1]), max(-limits[0], limits[1]))
    colours = _DIVERGING if limits[0] == -limits[1] else _SEQUENTIAL
    with _themed(theme) as look:
        # The middle of one scale is grey, that of the other white.
        blank = look["background"] if colours == _SEQUENTIAL else _MISSING
        columns = min(len(tables), 4)
        rows = -(-len(tables) // columns)
        figure, panels = _figure(len(tables), width=1.4 + 2.7 * columns, height=1.0 + 2.7 * rows, columns=columns)
        image = None
        for axes, (name, table) in zip(panels, tables.items(), strict=False):
            image = _grid(axes, table.tolist(), *limits, colours, False, square=True, missing=blank)
            heads = [str(head) for head in range(table.shape[0])]
            if table.numel() <= _NUMBERED:
                _number(axes, image, table.tolist())
            _ticks(axes, "x", heads, 9)
            _ticks(axes, "y", heads, 9)
            axes.set(xlabel="head", ylabel="head")
            if name:
                axes.set_title(name)
        _colour_bar(figure, image, panels, label(metric))
        figure.suptitle(title if title is not None else _headline(metric))
        return figure


def attention_maps(
    pattern: Tensor,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    title: str = "Attention",
    theme: str = "light",
) -> Any:
    """Attention weights of heads, queries down and keys across; colours follow the root, so that small ones show.

    Args:
        pattern: (H, T, S), or (T, S) of one head.
        tokens: texts of the S keys, the last T of which are the queries. Default: their numbers.
        heads: numbers of the heads in `pattern`, for the panels' titles. Default: 0 .. H-1.
        title: of the figure.
        theme: "light" or "dark".

    Raises:
        ValueError: for a pattern of another shape, or another number of tokens or heads.
    """
    maps = pattern.detach().double().cpu()
    maps = maps[None] if maps.ndim == 2 else maps
    if maps.ndim != 3:
        raise ValueError(f"pattern must have shape (H, T, S) or (T, S), got {tuple(pattern.shape)}")
    H, T, S = maps.shape
    if tokens is not None and len(tokens) != S:
        raise ValueError(f"tokens must hold one text a key, got {len(tokens)} for {S} keys")
    if heads is not None and len(heads) != H:
        raise ValueError(f"heads must hold one number a head of the pattern, got {len(heads)} for {H}")
    texts = [str(at) for at in range(S)] if tokens is None else [_visible(token) for token in tokens]
    with _themed(theme):
        columns = min(H, 4)
        rows = -(-H // columns)
        size = 4.6 if H == 1 else 3.1
        figure, panels = _figure(H, width=1.2 + size * columns, height=0.9 + size * rows, columns=columns)
        image = None
        for number, (axes, table) in enumerate(zip(panels, maps, strict=False)):
            image = _grid(axes, table.sqrt().tolist(), 0.0, 1.0, _SEQUENTIAL, False, square=T == S)
            if table.numel() <= _NUMBERED:
                _number(axes, image, table.sqrt().tolist(), table.tolist())
            _ticks(axes, "x", texts, 24 if H == 1 else 12, upright=True)
            _ticks(axes, "y", texts[S - T :], 24 if H == 1 else 12)
            axes.set_title(f"head {number if heads is None else heads[number]}")
            axes.set(xlabel="key", ylabel="query")
        bar = _colour_bar(figure, image, panels, "attention weight")
        weights = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
        bar.set_ticks([math.sqrt(weight) for weight in weights], labels=[f"{weight:g}" for weight in weights])
        figure.suptitle(title)
        return figure


# Writing


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


# The look


@contextlib.contextmanager
def _themed(theme: str) -> Iterator[dict[str, Any]]:
    """matplotlib's settings of a theme, for the figures created inside."""
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(map(repr, THEMES))}, got {theme!r}")
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


def _figure(
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


def _grid(
    axes: Any,
    values: Sequence[Sequence[float]],
    low: float,
    high: float,
    colours: str,
    log: bool,
    square: bool = False,
    missing: str = _MISSING,
) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    axes.grid(False)
    cmap = colormaps[colours].with_extremes(bad=missing)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    aspect = "equal" if square else "auto"
    return axes.imshow(values, cmap=cmap, norm=norm, aspect=aspect, interpolation="nearest")


def _number(
    axes: Any, image: Any, values: Sequence[Sequence[float]], numbers: Sequence[Sequence[float]] | None = None
) -> None:
    """Write each cell's number (or another one) into it, dark on light colours and light on dark ones.

    All have as many decimals as two digits of the colours' largest number need, the same in all panels.
    """
    numbers = values if numbers is None else numbers
    largest = max(map(abs, image.get_clim()))
    decimals = max(0, 2 - math.ceil(math.log10(largest))) if largest > 0 else 0
    form = f".{decimals}f" if decimals < 5 else ".1e"
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            number = numbers[row][column]
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                shade = "#1a1a1a" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
                # Adding 0 after rounding leaves no minus sign at a zero.
                text = format(round(number, decimals) + 0.0 if decimals < 5 else number, form)
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)


def _colour_bar(figure: Any, image: Any, panels: Sequence[Any], text: str) -> Any:
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.02)
    bar.set_label(text)
    bar.outline.set_visible(False)
    return bar


def _ticks(axes: Any, which: str, names: Sequence[str], most: int, upright: bool = False) -> None:
    """Labels at the cells of one axis, at most `most` of them, evenly spaced."""
    every = max(1, -(-len(names) // most))
    places = list(range(0, len(names), every))
    axis = axes.xaxis if which == "x" else axes.yaxis
    shown = [names[place] for place in places]
    axis.set_ticks(places, labels=shown)
    if which == "x" and (upright or sum(len(name) for name in shown) > 40):
        axes.tick_params(axis="x", labelrotation=90 if upright else 45)


def _line(number: int, look: Mapping[str, Any]) -> dict[str, Any]:
    colours = (look["first"], *_COLOURS)
    return {
        "color": colours[number % len(colours)], "linestyle": _LINES[number // len(colours) % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4.5, "linewidth": 1.6,
    }  # fmt: skip


def _legend(axes: Any, entries: int) -> None:
    """A legend, beside the axes if it is long."""
    if entries > 5:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + entries // 17)
    elif entries:
        axes.legend(loc="best")


# Figures


def _models(records: Mapping[str, Sequence[Row]] | Sequence[Row]) -> dict[str, Sequence[Row]]:
    models = dict(records) if isinstance(records, Mapping) else {"": records}
    if not models:
        raise ValueError("records must hold at least one model, got none")
    return models


def _limits(tables: Sequence[Sequence[Sequence[float]]], log: bool) -> tuple[float, float]:
    values = [x for table in tables for row in table for x in row if math.isfinite(x) and (x > 0 or not log)]
    if not values:
        raise ValueError(f"values must hold at least one finite {'positive ' if log else ''}number, got none")
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5) if not log else (low / 2, high * 2)


def _headline(metric: str) -> str:
    """The label of a figure as a title."""
    text = label(metric)
    return text[:1].upper() + text[1:]


def _shorts(layers: Sequence[Any]) -> list[str]:
    """The numbers in modules' names if they distinguish the layers; otherwise the names."""
    names = [str(layer) for layer in layers]
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    single = [found[0] for found in numbers if len(found) == 1]
    return single if len(set(single)) == len(names) else names


def _visible(token: str) -> str:
    """A token's text with blanks and line ends visible, without markup, and with □ for what the font lacks."""
    shown = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    known = _glyphs()
    return "".join(letter if ord(letter) in known else "□" for letter in shown).replace("$", "\\$") or "∅"


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points of the font of all pictures."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())
