"""Results of a comparison as a table (Markdown, CSV) and two pictures."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo_recipes.compare.plan import EQUAL
from attnzoo_recipes.files import write_atomically

Row = dict[str, Any]
CONFIDENCE = 0.95


def summarise(runs: Sequence[Mapping[str, Any]], speeds: Mapping[str, tuple[float, float]]) -> list[Row]:
    """One row per mechanism, in the order of the runs.

    The difference is that to the first mechanism, paired by seed; its confidence interval is Student's with n - 1
    degrees of freedom. With one seed there is neither an interval nor a standard error.

    Args:
        runs: results: mechanism, seed, status ("finished", "diverged" or "failed"), detail, and for a finished one
            val_bits_per_byte and the figures of its plan.
        speeds: tokens/s in training and in decoding, by mechanism.
    """
    names = list(dict.fromkeys(run["mechanism"] for run in runs))
    bits = {
        name: {c["seed"]: c["val_bits_per_byte"] for c in runs if c["mechanism"] == name and c["status"] == "finished"}
        for name in names
    }
    rows = []
    for name in names:
        own = [run for run in runs if run["mechanism"] == name]
        finished = [run for run in own if run["status"] == "finished"]
        broken = [f"seed {c['seed']} {c['status']}: {c['detail']}" for c in own if c["status"] != "finished"]
        paired = sorted(set(bits[name]) & set(bits[names[0]]))
        differences = [bits[name][seed] - bits[names[0]][seed] for seed in paired] if name != names[0] else []
        values = list(bits[name].values())
        rows.append({
            "mechanism": name,
            "parameters": own[0]["parameters"],
            "mlp_dim": own[0]["mlp_dim"],
            "training_flops_per_token": own[0]["flops_per_token"],
            "cache_bytes_per_token": own[0]["cache_bytes_per_token"],
            "tokens_per_second": speeds.get(name, (None, None))[0],
            "decode_tokens_per_second": speeds.get(name, (None, None))[1],
            "val_bits_per_byte": _mean(values),
            "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
            "difference": _mean(differences),
            "interval": interval(differences),
            "seeds": len(finished),
            "note": "; ".join(broken),
        })  # fmt: skip
    return rows


def interval(differences: Sequence[float]) -> float | None:
    """Half the width of the confidence interval of the mean; None for fewer than two."""
    if len(differences) < 2:
        return None
    from scipy.stats import t  # type: ignore[import-untyped]  # has no stubs

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The table, with notes on how it was obtained."""
    first = rows[0]["mechanism"]
    head = [
        "mechanism", "parameters", "MLP width", "training FLOPs/token", "cache bytes/token", "train tokens/s",
        "decode tokens/s", "validation bits/byte", f"difference to {first}", "seeds", "note",
    ]  # fmt: skip
    lines = [" | ".join(["", *head, ""]).strip(), "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        value = _number(row["val_bits_per_byte"], ".4f")
        if row["standard_error"] is not None:
            value += f" ± {row['standard_error']:.4f}"
        difference = _number(row["difference"], "+.4f")
        if row["interval"] is not None:
            difference += f" ± {row['interval']:.4f}"
        cells = [
            row["mechanism"], f"{row['parameters']:,}", _number(row["mlp_dim"], ","),
            f"{row['training_flops_per_token'] / 1e6:.1f} M", f"{row['cache_bytes_per_token']:,}",
            _number(row["tokens_per_second"], ",.0f"), _number(row["decode_tokens_per_second"], ",.0f"), value,
            difference, str(row["seeds"]), row["note"].replace("|", "/"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_facts(rows, facts), ""])


def _facts(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    first = rows[0]["mechanism"]
    several = any(row["seeds"] > 1 for row in rows)
    spread = (
        f"± after bits per byte is the standard error over seeds; ± after a difference is half the {CONFIDENCE:.0%} "
        f"confidence interval of the differences paired by seed (Student's t)."
        if several
        else "One seed: differences of this size may come from the seed alone, and no interval can be given."
    )
    return [
        f"Held equal to {first}: {EQUAL[facts['match']]}; data and their order seed by seed, optimiser, schedule, "
        f"{facts['steps']:,} steps of {facts['batch_tokens']:,} tokens, every other size.",
        f"The corpus's own entropies on the validation split: unigram {facts['unigram']:.4f}, bigram "
        f"{facts['bigram']:.4f} bits per byte.",
        spread,
        f"Cache bytes are bfloat16, of all layers; a state that does not grow with the length is divided by the "
        f"{facts['tokens']:,} tokens of a sample. Training speed (forward and backward of a batch) and decoding "
        f"({facts['decode_tokens']} tokens after {facts['prompt_tokens']}, batch 1) are the best of rounds in which "
        f"all mechanisms take turns, on a {facts['machine']} in float32; they say nothing about a GPU.",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_losses(runs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """Validation bits per byte over steps: one line per mechanism, the mean over its seeds, with their range."""
    figure, axes = _figure()
    for number, (name, own) in enumerate(_finished(runs).items()):
        curves = [dict(run["curve"]) for run in own]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        style = _style(number)
        axes.plot(steps, [statistics.fmean(v) for v in values], label=name, **style)
        if len(curves) > 1:
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.2
            )
    axes.axhline(facts["bigram"], color="0.4", linewidth=1, linestyle=":", label="bigram entropy")
    axes.set(xlabel="optimiser step", ylabel="validation (bits per byte)", title="Learning curves")
    _finish(figure, axes, path)


def draw_quality(rows: Sequence[Row], path: Path) -> None:
    """Validation bits per byte against cache bytes per token, with standard errors."""
    figure, axes = _figure()
    shown = [(i, row) for i, row in enumerate(rows) if row["val_bits_per_byte"] is not None]
    for number, row in shown:
        style = _style(number)
        x, y = row["cache_bytes_per_token"], row["val_bits_per_byte"]
        axes.errorbar(
            [x], [y], yerr=[row["standard_error"] or 0.0], color=style["color"], marker=style["marker"], markersize=8,
            linestyle="", label=row["mechanism"], capsize=3,
        )  # fmt: skip
    if shown and all(row["cache_bytes_per_token"] > 0 for _, row in shown):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(
        xlabel="cache (bytes per token, bfloat16, all layers)", ylabel="validation (bits per byte)",
        title="Quality against cache",
    )  # fmt: skip
    _finish(figure, axes, path)


def _finished(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    finished: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["status"] == "finished":
            finished.setdefault(run["mechanism"], []).append(run)
    return finished


# Okabe and Ito's colours, which colour-blind readers can tell apart; line style and marker vary as well.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
_LINES = ("-", "--", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())
