"""Pictures of the diagnostics' figures: spectra, heads by layer, development over training, pruning, attention maps.

Every function takes figures that other modules computed and returns a matplotlib Figure; `save` and `to_png` write
it. All share one look (`drawing`), in a light and a dark theme, with colours that colour-blind readers can distinguish.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.diagnostics.drawing import (
    ACROSS,
    COLOURS,
    DIVERGING,
    DPI,
    FONT,
    FORMATS,
    MISSING,
    NUMBERED,
    SEQUENTIAL,
    THEMES,
    draw_colour_bar,
    draw_grid,
    draw_legend,
    draw_numbers,
    label_cells,
    line_style,
    make_figure,
    save,
    themed,
    to_array,
    to_bytes,
    to_png,
    wrapped,
)
from attnzoo.diagnostics.spectra.marchenko_pastur import mp_pdf, product_edge, product_pdf
from attnzoo.diagnostics.spectra.record import SpectrumRecord
from attnzoo.diagnostics.training_records import Row, by_layer_and_step, label, over_steps
from attnzoo.rules import is_number

__all__ = [
    "DPI",
    "FONT",
    "FORMATS",
    "THEMES",
    "attention_maps",
    "esd",
    "head_map",
    "heatmap",
    "pruning_curves",
    "save",
    "similarity_matrix",
    "to_array",
    "to_bytes",
    "to_png",
    "trajectory",
]


def esd(
    record: SpectrumRecord,
    *,
    title: str | None = None,
    bins: int | None = None,
    scale: str = "auto",
    theme: str = "light",
) -> Any:
    """Histogram of a record's eigenvalues with the law's density, its edge, the threshold and the outliers.

    The law is drawn for null "mp" (Marchenko-Pastur) and null "product" (`marchenko_pastur.product_pdf`). Both enclose
    the share of eigenvalues inside the threshold, so that a good bulk is under its curve.

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
    with themed(theme) as look:
        figure, (axes,) = make_figure(1, width=7.2, height=4.4)
        ends = [math.log10(x) if logarithmic else x for x in (low, record.threshold or top, top)]
        width = (ends[1] - ends[0]) / bins
        edges = ends[0] + width * torch.arange(math.ceil((ends[2] - ends[0]) / width) + 1, dtype=torch.float64)
        places = values.log10() if logarithmic else values
        counts = torch.histogram(places, edges).hist / (values.numel() * width)
        x_edges = (10**edges if logarithmic else edges).tolist()
        named = f"{values.numel()} eigenvalue{'s' if values.numel() > 1 else ''}"
        axes.stairs(counts.tolist(), x_edges, fill=True, color=look["fill"], label=named)
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
                axes.plot(outliers, [height] * len(outliers), "v", color=COLOURS[2], markersize=8, label=named)
        if logarithmic:
            axes.set_xscale("log")
        # At gamma = 1 the density diverges at 0: the histogram sets the height.
        axes.set_ylim(0, 1.25 * float(counts.max()))
        squares = "$\\lambda = s^2$ of the product" if record.dims else "$\\lambda = s^2 / n_\\mathrm{big}$"
        axes.set(
            xlabel=f"eigenvalue {squares}",
            ylabel=f"density per {'decade' if logarithmic else 'unit'} of $\\lambda$",
            title=wrapped(title if title is not None else _name(record), 6.4),
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
    with themed(theme):
        widths = [
            max(3.0, 1.2 + (0.5 if len(layers) * len(steps) <= NUMBERED else 0.32) * len(steps))
            for layers, steps, _ in tables.values()
        ]
        deepest = max(len(layers) for layers, _, _ in tables.values())
        columns = min(len(tables), ACROSS)
        across = sum(widths) if len(tables) <= ACROSS else columns * max(widths)
        width, height = min(across + 1.5, 16), min(max(2.6, 1.4 + 0.24 * deepest), 9)
        figure, panels = make_figure(
            len(tables), width=width, height=height * -(-len(tables) // columns), columns=columns
        )
        low, high = _limits([values for _, _, values in tables.values()], log)
        image = None
        for axes, (name, (layers, steps, values)) in zip(panels, tables.items(), strict=True):
            image = draw_grid(axes, values, low, high, SEQUENTIAL, log)
            if len(layers) * len(steps) <= NUMBERED:
                draw_numbers(axes, image, values)
            label_cells(axes, "x", [f"{step:,}" for step in steps], 10)
            label_cells(axes, "y", _shorts(layers), 30)
            axes.set(xlabel="training step", ylabel="layer")
            if name:
                axes.set_title(wrapped(name, (width - 1.5) / columns))
        return _explained(figure, image, panels, metric, title, width)


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
    with themed(theme) as look:
        figure, (axes,) = make_figure(1, width=8.5, height=4.4)
        number = 0
        for name, rows in models.items():
            if by is not None:
                # One without the figure, such as a layer too small for it, has no line.
                known = dict.fromkeys(row.get(by) for row in rows if is_number(row.get(metric)))
                if not known:
                    over_steps(rows, metric)
                for key, short in zip(known, _shorts(list(known)), strict=True):
                    own = [row for row in rows if row.get(by) == key]
                    steps, means, _, _ = over_steps(own, metric)
                    called = f"{by} {short}" if not name else f"{name}, {by} {short}"
                    axes.plot(steps, means, label=called, **line_style(number, look))
                    number += 1
                continue
            steps, means, lows, highs = over_steps(rows, metric)
            style = line_style(number, look)
            axes.plot(steps, means, label=name or "mean of the layers", **style)
            if lows != highs:
                axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
            number += 1
        if log:
            axes.set_yscale("log")
        text = wrapped(title if title is not None else label(metric), 7.7)
        axes.set(xlabel="training step", ylabel=label(metric), title=text)
        draw_legend(axes, number, 8.5)
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
        ValueError: for values of another shape, nothing that is finite, or another number of names.
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
    with themed(theme):
        rows = max(table.shape[0] for table in tables.values())
        if layers is not None and len(layers) != rows:
            raise ValueError(f"layers must hold one name a row of the values, got {len(layers)} for {rows}")
        columns = min(len(tables), ACROSS)
        cells = [table.shape[1] + 3 for table in tables.values()]
        cells_across = sum(cells) if len(tables) <= ACROSS else columns * max(cells)
        named = _shorts(layers if layers is not None else range(rows))
        numbered = rows * max(table.shape[1] for table in tables.values()) <= NUMBERED
        across = (0.5 if numbered else 0.34) * cells_across + 0.07 * max(map(len, named), default=0)
        width, height = min(max(4.2, 1.8 + across), 16), min(max(2.6, 1.4 + 0.3 * rows), 10)
        figure, panels = make_figure(
            len(tables), width=width, height=height * -(-len(tables) // columns), columns=columns
        )
        image = None
        for place, (axes, (name, table)) in enumerate(zip(panels, tables.items(), strict=True)):
            colours = SEQUENTIAL if center is None else DIVERGING
            image = draw_grid(axes, table.tolist(), low, high, colours, False)
            label_cells(axes, "x", [str(head) for head in range(table.shape[1])], 16)
            if numbered:
                draw_numbers(axes, image, table.tolist())
            # The panels of a row have one vertical axis.
            first = place % columns == 0
            label_cells(axes, "y", named if first else [""] * len(named), 32)
            axes.set(xlabel="head", ylabel="layer" if first else "")
            if name:
                axes.set_title(wrapped(name, (width - 1.5) / columns))
        return _explained(figure, image, panels, metric, title, width)


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
    with themed(theme) as look:
        figure, panels = make_figure(
            1 if speed is None else 2, width=7.6, height=4.2 if speed is None else 6.2, stacked=True
        )
        for axes, named in zip(panels, (curves, speed or {}), strict=False):
            for number, (name, (counts, values)) in enumerate(named.items()):
                style = line_style(number, look)
                triples = [value if isinstance(value, Sequence) else (value, value, value) for value in values]
                axes.plot(counts, [middle for _, middle, _ in triples], label=name, **style)
                if any(low != high for low, _, high in triples):
                    lows, highs = [t[0] for t in triples], [t[2] for t in triples]
                    axes.fill_between(counts, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
        panels[0].set(ylabel=loss, title=wrapped(title, 6.8))
        draw_legend(panels[0], len(curves), 7.6)
        if speed is not None:
            panels[1].axhline(1.0, color=look["faint"], linewidth=1, linestyle=":")
            panels[1].set_ylabel("speed / whole model's")
            draw_legend(panels[1], len(speed), 7.6)
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
        ValueError: for a matrix that is not square, or without a finite entry off all diagonals.
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
    if not any(bool(table.isfinite().any()) for table in tables.values()):
        raise ValueError("matrices must hold at least one finite entry off their diagonals, got none")
    if limits is None:
        limits = _limits([table.tolist() for table in tables.values()], False)
        if limits[0] < 0 < limits[1]:
            limits = (-max(-limits[0], limits[1]), max(-limits[0], limits[1]))
    colours = DIVERGING if limits[0] == -limits[1] else SEQUENTIAL
    with themed(theme) as look:
        # The middle of one scale is grey, that of the other white.
        blank = look["background"] if colours == SEQUENTIAL else MISSING
        columns = min(len(tables), 4)
        rows = -(-len(tables) // columns)
        figure, panels = make_figure(len(tables), width=1.4 + 2.7 * columns, height=1.0 + 2.7 * rows, columns=columns)
        image = None
        for axes, (name, table) in zip(panels, tables.items(), strict=False):
            image = draw_grid(axes, table.tolist(), *limits, colours, False, square=True, missing=blank)
            heads = [str(head) for head in range(table.shape[0])]
            if table.numel() <= NUMBERED:
                draw_numbers(axes, image, table.tolist())
            label_cells(axes, "x", heads, 9)
            label_cells(axes, "y", heads, 9)
            axes.set(xlabel="head", ylabel="head")
            if name:
                axes.set_title(wrapped(name, 2.7))
        return _explained(figure, image, panels, metric, title, 1.4 + 2.7 * columns)


def attention_maps(
    pattern: Tensor,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    title: str = "Attention",
    theme: str = "light",
) -> Any:
    """Attention weights of heads, queries down and keys across; colours follow the root, so that small ones show.

    With weights below 0, as heads that are composed of others have, the colours diverge from 0.

    Args:
        pattern: (H, T, S), or (T, S) of one head.
        tokens: texts of the S keys, the last T of which are the queries; more queries are numbered. Default: numbers.
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
    queries = texts[S - T :] if T <= S else [str(at) for at in range(T)]
    signed = bool((maps < 0).any())
    roots = maps.sign() * maps.abs().sqrt()
    top = max(1.0, float(roots.nan_to_num().abs().max()) if signed else 0.0)
    with themed(theme):
        columns = min(H, 4)
        rows = -(-H // columns)
        size = 4.6 if H == 1 else 3.1
        figure, panels = make_figure(H, width=1.2 + size * columns, height=0.9 + size * rows, columns=columns)
        image = None
        for number, (axes, table) in enumerate(zip(panels, maps, strict=False)):
            shown = roots[number].tolist()
            colours = DIVERGING if signed else SEQUENTIAL
            image = draw_grid(axes, shown, -top if signed else 0.0, top, colours, False, square=T == S)
            if table.numel() <= NUMBERED:
                draw_numbers(axes, image, shown, table.tolist())
            label_cells(axes, "x", texts, 24 if H == 1 else 12, upright=True)
            label_cells(axes, "y", queries, 24 if H == 1 else 12)
            axes.set_title(f"head {number if heads is None else heads[number]}")
            axes.set(xlabel="key", ylabel="query")
        bar = draw_colour_bar(figure, image, panels, "attention weight")
        weights = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
        marked = [*(-weight for weight in weights[:2:-1]), *weights[:1], *weights[3:]] if signed else weights
        places = [math.copysign(math.sqrt(abs(weight)), weight) for weight in marked]
        bar.set_ticks(places, labels=[f"{weight:g}" for weight in marked])
        figure.suptitle(wrapped(title, 1.2 + size * columns))
        return figure


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


def _explained(figure: Any, image: Any, panels: Sequence[Any], metric: str, title: str | None, width: float) -> Any:
    """The figure with its colour bar and its title, by default the metric's label."""
    text = label(metric)
    draw_colour_bar(figure, image, panels, text)
    figure.suptitle(wrapped(text[:1].upper() + text[1:] if title is None else title, width))
    return figure


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
