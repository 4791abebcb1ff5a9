"""One figure per mechanism: what is shared, mixed, routed, gated and cached, all in the same drawing.

    python docs/scripts/figures.py

writes docs/figures/NAME.svg for every entry of MECHANISMS. The files are committed; the same code makes the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch, Polygon

FIGURES = Path(__file__).parents[1] / "figures"
HEADS = ("#4c78a8", "#72b7b2", "#b279a2", "#9d755d")
CHANGED, CACHED, IDLE, INK = "#f2a541", "#1b7f4b", "#d9d9d9", "#333333"


@dataclass(frozen=True)
class Figure:
    """What a mechanism changes in multi-head attention with four heads.

    Attributes:
        heads: how many of queries, keys and values there are; fewer than four are shared by heads side by side.
        source: what keys and values (or all, with "all: ...") are made from, where it is not the input itself.
        on_q, on_k, on_v: what happens to them after their projections.
        scores, pre, norm, post: score maps, what is done to them, what normalises them, what is done to the weights.
        on_o: what happens to the heads' outputs.
        cached: what a decoding step reads: "k" and "v" as they enter attention, "first k" and "first v" before what
            happens to them, "source", "state".
        idle: heads that a token does not use.
        idle_keys: whether their keys and values are not made either.
        state: whether keys and values go into a state in place of score maps; its label.
        single: whether there is one head alone, of an encoder.
    """

    heads: tuple[int, int, int] = (4, 4, 4)
    source: str = ""
    on_q: str = ""
    on_k: str = ""
    on_v: str = ""
    scores: str = "scores"
    pre: str = ""
    norm: str = "softmax"
    post: str = ""
    on_o: str = ""
    cached: tuple[str, ...] = ("k", "v")
    idle: tuple[int, ...] = ()
    idle_keys: bool = False
    state: str = ""
    single: bool = False


MECHANISMS = {
    "mha": Figure(),
    "mqa": Figure(heads=(4, 1, 1)),
    "gqa": Figure(heads=(4, 2, 2)),
    "gta": Figure(heads=(4, 2, 2), source="one tied\nstate", cached=("source",)),
    "mla": Figure(source="latent", cached=("source",)),
    "kha": Figure(on_v="one map\nfor all heads"),
    "kha_gta": Figure(heads=(4, 2, 2), source="one tied\nstate", on_v="one map\nfor all heads", cached=("source",)),
    "kha_mla": Figure(source="latent", on_v="one map\nfor all heads", cached=("source",)),
    "moh": Figure(idle=(1, 2), on_o="x gate\nof the head"),
    "moa": Figure(heads=(4, 1, 1), idle=(0, 3), on_q="experts\nchosen by\nthe token", on_o="x gate"),
    "dcmha": Figure(pre="mixed by\nq and k", post="mixed by\nq and k"),
    "talking_heads": Figure(pre="mixed by\nH x H", post="mixed by\nH x H"),
    "eit": Figure(pre="network\nover pairs\nof heads"),
    "complexformer": Figure(on_q="scaled\nangles", on_k="scaled\nangles"),
    "linear": Figure(on_q="feature\nmap", on_k="feature\nmap", state="sum of\nk v^T", cached=("state",)),
    "mhla": Figure(on_q="feature\nmap", on_k="feature\nmap", state="sums per block,\nmixed", cached=("state",)),
    "mditface": Figure(source="static\ncontext", cached=("k", "v")),
    "tab": Figure(heads=(1, 1, 1), on_o="x gate, to\nbe edited", cached=(), single=True),
    "mhe": Figure(
        heads=(1, 1, 1),
        on_q="+ vector\nof the head",
        on_k="+ vector\nof the head",
        on_v="+ vector\nof the head",
        cached=("first k", "first v"),
    ),
    "mgk": Figure(on_k="several keys\na position", scores="mixture of\nGaussians", norm="normalised"),
    "smha": Figure(idle=(1, 3), idle_keys=True, on_k="of tokens that\nchose the head", on_o="x gate"),
    "mae": Figure(on_o="x gate\nof the head"),
    "gated": Figure(on_o="x sigmoid\nof the input"),
    "tpa": Figure(source="all: factors", cached=("source",)),
    "diff": Figure(post="first less\nlambda x\nsecond", on_o="norm of\nthe head"),
    "forgetting": Figure(pre="less decay\nbetween\nk and q", cached=("k", "v")),
    "sigmoid": Figure(norm="sigmoid"),
    "selective": Figure(pre="less what\ntokens before\ndropped"),
    "mta": Figure(pre="convolved\nover q, k", post="mixed in\ngroups", on_o="norm of\nthe head"),
    "rcmha": Figure(on_q="convolved", on_k="convolved", on_v="convolved", pre="+ learned\ndistances"),
    "chai": Figure(heads=(2, 2, 4), on_q="one of each\ncluster", on_k="one of each\ncluster"),
}


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", cached: bool = False
) -> None:
    edge, line = (CACHED, 2.2) if cached else (INK, 0.7)
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.06",
            facecolor=colour, edgecolor=edge, linewidth=line, zorder=3,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, zorder=4, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 0.8, "color": INK}, zorder=2)


def _row(axes: Axes, x: float, y: float, count: int, cached: bool, idle: tuple[int, ...]) -> None:
    """Four places of heads; fewer heads are wider."""
    span = 4 // count
    for head in range(count):
        members = range(head * span, (head + 1) * span)
        unused = all(member in idle for member in members)
        _box(axes, x + (head * span + (span - 1) / 2) * 0.34, y, 0.34 * span - 0.1, 0.42,
             IDLE if unused else HEADS[head * span], cached=cached)  # fmt: skip


def _maps(axes: Axes, x: float, y: float, idle: tuple[int, ...], label: str, changed: bool, single: bool) -> None:
    """Four causal score maps, or a single one of all pairs."""
    if single:
        square = [(x, y), (x, y + 0.94), (x + 0.94, y + 0.94), (x + 0.94, y)]
        axes.add_patch(Polygon(square, facecolor=HEADS[0], edgecolor=INK, linewidth=0.6, zorder=3))
    for head in () if single else range(4):
        left, bottom, size = x + (head % 2) * 0.52, y + (1 - head // 2) * 0.52, 0.42
        colour = IDLE if head in idle else HEADS[head]
        corners = [(left, bottom), (left, bottom + size), (left + size, bottom + size), (left + size, bottom)]
        axes.add_patch(Polygon([corners[0], corners[1], corners[3]], color=colour, zorder=3))
        axes.add_patch(Polygon(corners, fill=False, edgecolor=INK, linewidth=0.6, zorder=4))
    backing = {"facecolor": CHANGED, "edgecolor": "none", "pad": 1.5} if changed else None
    axes.text(x + 0.47, y - 0.12, label, ha="center", va="top", fontsize=7.5, color=INK, bbox=backing)


def _stages(figure: Figure) -> Iterator[tuple[str, str]]:
    """The boxes between score maps and outputs: kind and label."""
    if figure.pre:
        yield CHANGED, figure.pre
    yield ("white" if figure.norm == "softmax" else CHANGED), figure.norm
    if figure.post:
        yield CHANGED, figure.post


def draw(figure: Figure) -> Canvas:
    """The drawing, 9.6 by 2.8 inches."""
    canvas = Canvas(figsize=(9.6, 2.8), layout="constrained")
    axes = canvas.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.35, 14)
    axes.set_ylim(-0.15, 3.95)
    lanes = {"q": 3.2, "k": 2.0, "v": 0.8}
    _box(axes, 0.1, 2.0, 0.5, 3.0, "white", "x")
    every = figure.source.startswith("all: ")
    start = dict.fromkeys(lanes, 0.4)
    if figure.source:
        fed = [lane for lane in lanes if every or lane != "q"]
        low, high = min(lanes[lane] for lane in fed), max(lanes[lane] for lane in fed)
        middle, height = (low + high) / 2, high - low + 0.5
        _box(axes, 1.25, middle, 0.95, height, CHANGED, figure.source.removeprefix("all: "), "source" in figure.cached)
        for lane in fed:
            _arrow(axes, (0.4, lanes[lane]), (0.75, lanes[lane]))
            start[lane] = 1.75
    after = {"q": figure.on_q, "k": figure.on_k, "v": figure.on_v}
    for (lane, y), count in zip(lanes.items(), figure.heads, strict=True):
        _arrow(axes, (start[lane], y), (2.1, y))
        first = f"first {lane}" in figure.cached or (lane in figure.cached and not after[lane])
        _row(axes, 2.3, y, count, first, figure.idle if lane == "q" or figure.idle_keys else ())
        axes.text(2.82, y + 0.33, lane, ha="center", fontsize=8.5, color=INK)
        if after[lane]:
            _arrow(axes, (3.55, y), (3.8, y))
            _box(axes, 4.4, y, 1.15, 0.72, CHANGED, after[lane], lane in figure.cached)
        end = 5.05 if after[lane] else 3.55
        if lane == "v" and not figure.state:
            axes.plot([end, 10.95], [y, y], color=INK, linewidth=0.8, zorder=1)
            _arrow(axes, (10.95, y), (10.95, 1.72))
        else:
            _arrow(axes, (end, y), (5.5, {"q": 2.75, "k": 2.2, "v": 1.6}[lane]))
    if figure.state:
        _box(axes, 7.3, 2.1, 3.4, 1.3, CHANGED, figure.state, "state" in figure.cached)
        _arrow(axes, (9.1, 2.0), (10.2, 2.0))
    else:
        _maps(axes, 5.6, 1.98, figure.idle, figure.scores, figure.scores != "scores", figure.single)
        left = 6.75
        for colour, label in _stages(figure):
            _box(axes, left + 0.5, 2.45, 1.02, 0.85, colour, label)
            left += 1.14
        _arrow(axes, (left - 0.05, 2.3), (10.2, 2.05))
    _row(axes, 10.4, 2.0, 1 if figure.single else 4, False, figure.idle)
    axes.text(10.92, 2.33, "o", ha="center", fontsize=8.5, color=INK)
    if figure.on_o:
        _arrow(axes, (11.7, 2.0), (11.95, 2.0))
        _box(axes, 12.55, 2.0, 1.15, 0.85, CHANGED, figure.on_o)
    _arrow(axes, (13.2 if figure.on_o else 11.7, 2.0), (13.5, 2.0))
    axes.text(13.7, 2.0, "y", ha="center", va="center", fontsize=10, color=INK)
    handles = [("changed", CHANGED, INK, 0.7)]
    handles += [("read from the cache", "white", CACHED, 2.2)] if figure.cached else []
    handles += [("not used by this token", IDLE, INK, 0.7)] if figure.idle else []
    for number, (text, face, edge, line) in enumerate(handles):
        left = 6 + 2.1 * number
        corners = [(left, 3.55), (left + 0.22, 3.55), (left + 0.22, 3.75), (left, 3.75)]
        axes.add_patch(Polygon(corners, facecolor=face, edgecolor=edge, linewidth=line))
        axes.text(left + 0.32, 3.65, text, fontsize=7.5, va="center", color=INK)
    return canvas


def main() -> None:
    """Write all figures."""
    FIGURES.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "attnzoo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, figure in MECHANISMS.items():
            draw(figure).savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
