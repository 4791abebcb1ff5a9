"""Results of a comparison as a table, Markdown or CSV."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo_recipes.compare.plan import VARIED

Row = dict[str, Any]
CONFIDENCE = 0.95
_FIGURES = ("parameters", "mlp_dim", "flops_per_token", "cache_bytes_per_token")
_TERMS = {
    "bits per byte": "cross-entropy of the validation text in bits, divided by its UTF-8 bytes, so that tokenizers "
    "compare; lower is better",
    "training FLOPs/token": "three times those of the forward pass, for samples of the trained length",
    "cache bytes/token": "what decoding stores for each earlier token",
    "MLP width": "hidden units of the feed-forward layers, by which parameters or FLOPs are made equal",
    "unigram, bigram entropy": "bits per byte of the best model of single bytes, and of a byte given the one before",
}


def summarise(
    runs: Sequence[Mapping[str, Any]], speeds: Mapping[str, tuple[float, float]], rate: float | None = None
) -> list[Row]:
    """One row per mechanism, in the order of the runs.

    The difference is that to the first mechanism, paired by seed; its confidence interval is Student's with n - 1
    degrees of freedom. With one seed there is neither an interval nor a standard error. Only runs that finished, and
    were what the plan says, have figures.

    Args:
        runs: results: mechanism, seed, status ("finished", "diverged", "failed" or "differs"), detail, the figures of
            the plan, and for a finished one val_bits_per_byte; where several learning rates were tried, also rate.
        speeds: tokens/s in training and in decoding, by mechanism.
        rate: the learning rate that all rows have in common, if several were tried; each row then also has the best
            one of its mechanism, and the difference between the best ones.
    """
    names = list(dict.fromkeys(run["mechanism"] for run in runs))
    bits: dict[tuple[str, Any], dict[int, float]] = {}
    for run in runs:
        if run["status"] == "finished":
            bits.setdefault((run["mechanism"], run.get("rate")), {})[run["seed"]] = run["val_bits_per_byte"]
    best = {name: _best_rate(name, bits) for name in names}
    rows = []
    for name in names:
        own = [run for run in runs if run["mechanism"] == name]
        common = bits.get((name, rate), {})
        broken = [f"seed {c['seed']}{_at(c)} {c['status']}: {c['detail']}" for c in own if c["status"] != "finished"]
        values = list(common.values())
        row = {
            "mechanism": name,
            **{("training_" * (figure == "flops_per_token")) + figure: own[0][figure] for figure in _FIGURES},
            "tokens_per_second": speeds.get(name, (None, None))[0],
            "decode_tokens_per_second": speeds.get(name, (None, None))[1],
            "val_bits_per_byte": _mean(values),
            "standard_error": standard_error(values),
            **_difference(common, bits.get((names[0], rate), {}) if name != names[0] else {}),
            "seeds": len(values),
        }
        if rate is not None:
            chosen = bits.get((name, best[name]), {})
            against = bits.get((names[0], best[names[0]]), {}) if name != names[0] else {}
            row |= {"rate": rate, "best_rate": best[name], "best_val_bits_per_byte": _mean(list(chosen.values()))}
            row |= {f"best_{key}": value for key, value in _difference(chosen, against).items()}
        rows.append({**row, "note": "; ".join(broken)})
    return rows


def _at(run: Mapping[str, Any]) -> str:
    return "" if run.get("rate") is None else f" at rate {run['rate']:g}"


def _best_rate(name: str, bits: Mapping[tuple[str, Any], Mapping[int, float]]) -> Any:
    """The rate with the lowest mean among those of which most seeds finished."""
    own = {rate: values for (other, rate), values in bits.items() if other == name}
    most = max((len(values) for values in own.values()), default=0)
    means = {rate: statistics.fmean(values.values()) for rate, values in own.items() if len(values) == most}
    return min(means, key=lambda rate: means[rate]) if means else None


def _difference(ours: Mapping[int, float], first: Mapping[int, float]) -> dict[str, float | None]:
    """Mean difference over the seeds that both have, and half of its confidence interval."""
    seeds = sorted(set(ours) & set(first))
    differences = [ours[seed] - first[seed] for seed in seeds]
    return {"difference": _mean(differences), "interval": interval(differences), "spread": _spread(differences)}


def interval(differences: Sequence[float]) -> float | None:
    """Half the width of the confidence interval of the mean; None for fewer than two."""
    error = standard_error(differences)
    if error is None:
        return None
    from scipy.stats import t  # type: ignore[import-untyped]  # has no stubs

    return float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import sem

    return float(sem(values))


def smallest_difference(rows: Sequence[Row]) -> tuple[int, float] | None:
    """Number of seeds, and the difference that they could show: the half-width of an interval of typical spread.

    The spread is that of all differences together. None with fewer than two seeds.
    """
    from scipy.stats import t

    spreads = [row["spread"] for row in rows if row.get("spread") is not None]
    if not spreads:
        return None
    seeds = min(row["seeds"] for row in rows if row.get("spread") is not None)
    pooled = statistics.fmean(spread**2 for spread in spreads) ** 0.5
    return seeds, float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * pooled / seeds**0.5


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The table, with notes on how it was obtained and on what it can decide."""
    first = rows[0]["mechanism"]
    rates = "rate" in rows[0]
    head = [
        "mechanism", "parameters", "MLP width", "training FLOPs/token", "cache bytes/token", "train tokens/s",
        "decode tokens/s", "validation bits/byte", f"difference to {first}",
        *(["best rate", "validation at best rate", "difference at best rates"] if rates else []), "seeds", "note",
    ]  # fmt: skip
    lines = [" | ".join(["", *head, ""]).strip(), "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        cells = [
            row["mechanism"], f"{row['parameters']:,}", _number(row["mlp_dim"], ","),
            f"{row['training_flops_per_token'] / 1e6:.1f} M", f"{row['cache_bytes_per_token']:,}",
            _number(row["tokens_per_second"], ",.0f"), _number(row["decode_tokens_per_second"], ",.0f"),
            _with_error(row["val_bits_per_byte"], row["standard_error"], ".4f"),
            _with_error(row["difference"], row["interval"], "+.4f"),
        ]  # fmt: skip
        if rates:
            cells += [_number(row["best_rate"], "g"), _number(row["best_val_bits_per_byte"], ".4f")]
            cells += [_with_error(row["best_difference"], row["best_interval"], "+.4f")]
        lines.append("| " + " | ".join([*cells, str(row["seeds"]), row["note"].replace("|", "/")]) + " |")
    terms = [f"- **{term}**: {meaning}" for term, meaning in _TERMS.items()]
    return "\n".join([*lines, "", *_facts(rows, facts), "", *terms, "", *_made(facts), ""])


def _made(facts: Mapping[str, Any]) -> list[str]:
    """How the table was made; results of earlier versions do not say it."""
    if not facts.get("command"):
        return []
    versions = " with ".join(f"{name} {facts['versions'][name]}" for name in ("attnzoo", "torch"))
    return [f"Made on {facts['date']} by {versions}: `{facts['command']}`"]


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return _number(value, form) + ("" if error is None else f" ± {error:.4f}")


def _facts(rows: Sequence[Row], facts: Mapping[str, Any]) -> list[str]:
    first = rows[0]["mechanism"]
    # The path of a setting may be that of the data, the optimiser or the schedule.
    others = "data and their order seed by seed, optimiser, schedule, "
    if facts.get("vary", "attention") not in VARIED:
        others = "the order of the data seed by seed, "
    sentences = [
        f"Held equal to {first}: {facts['equal']}; {others}{facts['training']}. Figures are those of runs whose own "
        "record agrees with this."
    ]
    if facts.get("unigram") is not None:
        sentences.append(
            f"The corpus's own entropies on the validation split: unigram {facts['unigram']:.4f}, bigram "
            f"{facts['bigram']:.4f} bits per byte."
        )
    if "rate" in rows[0]:
        sentences.append(
            f"All rows have the learning rate {rows[0]['rate']:g}; the best of {facts['rates']} for each mechanism is "
            "beside it, chosen by the same validation text."
        )
    sentences.append(_decisions(rows))
    sentences.append(
        f"Cache bytes are bfloat16, of all layers; a state that does not grow with the length is divided by the tokens "
        f"of a sample. Training speed (forward and backward of a batch) and decoding ({facts['decode_tokens']} tokens "
        f"after {facts['prompt_tokens']}, batch 1) are the best of rounds in which all mechanisms take turns, on "
        f"{facts['machine']}; they say nothing about another device."
    )
    return sentences


def _decisions(rows: Sequence[Row]) -> str:
    """What the intervals decide, in words."""
    smallest = smallest_difference(rows)
    if smallest is None:
        return "One seed: differences of this size may come from the seed alone, and no interval can be given."
    compared = [row for row in rows if row["interval"] is not None]
    decided = [row["mechanism"] for row in compared if abs(row["difference"]) > row["interval"]]
    undecided = [row["mechanism"] for row in compared if row["mechanism"] not in decided]
    return (
        f"± after bits per byte is the standard error over seeds; ± after a difference is half the {CONFIDENCE:.0%} "
        f"confidence interval of the differences paired by seed (Student's t). The smallest difference that "
        f"{smallest[0]} seeds could show here is {smallest[1]:.4f}. Different from {rows[0]['mechanism']} by this "
        f"measure: {', '.join(decided) or 'none'}; undecided: {', '.join(undecided) or 'none'}. One in twenty such "
        "intervals misses."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
