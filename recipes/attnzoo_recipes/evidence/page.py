"""Pages about claims: one for each, and a table of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo_recipes.compare.table import standard_error, summarise
from attnzoo_recipes.evidence.claim import Check, Claim, Decision, decide, overall
from attnzoo_recipes.evidence.figures import FIGURES

Results = Mapping[str, Any]
"""What the command writes as JSON: claim, preset, rates, runs and facts."""


def decisions(results: Results, rates: Mapping[str, float | None]) -> list[Decision]:
    """The decision on every check of a claim, every arm with its rate."""
    claim = Claim.from_dict(results["claim"])
    decided = []
    for check in claim.checks:
        ours = _values(results, check, check.arm, rates)
        if check.against is not None:
            theirs = _values(results, check, check.against, rates)
            ours = {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}
        decided.append(decide(check, list(ours.values()), claim.seeds))
    return decided


def _values(results: Results, check: Check, arm: str, rates: Mapping[str, float | None]) -> dict[int, float]:
    return {
        run["seed"]: run["figures"][check.figure]
        for run in results["runs"]
        if (run["mechanism"], run["rate"]) == (arm, rates[arm]) and check.figure in run["figures"]
    }


def common_rates(results: Results) -> dict[str, float | None]:
    """The common learning rate of every arm."""
    return dict.fromkeys(results["claim"]["arms"], results["rates"][0])


def best_rates(results: Results) -> dict[str, float | None]:
    """The learning rate of every arm with the lowest mean validation loss; None without a finished run."""
    return {row["mechanism"]: row["best_rate"] for row in summarise(results["runs"], {}, results["rates"][0])}


def verdict(results: Results) -> str:
    """The verdict on a claim, at the common learning rate."""
    return overall(decision.verdict for decision in decisions(results, common_rates(results)))


def page(results: Results, picture: str) -> str:
    """The page of a claim in Markdown, with a picture of its learning curves."""
    claim, facts = Claim.from_dict(results["claim"]), results["facts"]
    rates = common_rates(results)
    rows = summarise(results["runs"], {}, results["rates"][0])
    best = best_rates(results)
    tried = [f"{rate:g}" for rate in results["rates"]]
    lines = [
        f"# {claim.title}", "", f"**Verdict: {verdict(results)}** ({_size(results)}).", "",
        f"- Source: {claim.source}", f"- The paper's number: {claim.number}", f"- Prediction: {claim.prediction}",
        f"- Protocol: {claim.protocol}", f"- Rule: {claim.rule_in_words}", "",
        "| check | mean | 95 % interval | seeds | decision |", "| --- | --- | --- | --- | --- |",
        *_decided(claim, decisions(results, rates)), "",
    ]  # fmt: skip
    if len(tried) > 1 and None not in best.values():
        lines += [
            f"With the best of the rates {', '.join(tried)} for each arm (chosen by the same validation text; not part "
            "of the rule):", "", "| check | mean | 95 % interval | seeds | decision |",
            "| --- | --- | --- | --- | --- |", *_decided(claim, decisions(results, best)), "",
        ]  # fmt: skip
    lines += ["## Runs", "", *_runs(results, rows), ""]
    broken = [f"- {row['mechanism']}: {row['note']}" for row in rows if row["note"]]
    lines += [*broken, ""] if broken else []
    words = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [
        f"Held equal: {facts['equal']}; data and their order seed by seed, optimiser, schedule, {facts['training']}. "
        f"± is the standard error over seeds. Rates tried: {', '.join(tried)}. Finished on {facts['date']}, {words}.",
        "", f"![Learning curves]({picture})", "",
        f"`attnzoo-evidence {claim.name} --preset {results['preset']}` repeats it "
        f"({claim.run_time.get(results['preset'], 'of another size')}).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _decided(claim: Claim, decided: Sequence[Decision]) -> list[str]:
    rows = []
    for check, one in zip(claim.checks, decided, strict=True):
        low_high = (
            "" if one.half is None or one.mean is None else f"{one.mean - one.half:+.4f} to {one.mean + one.half:+.4f}"
        )
        mean = "" if one.mean is None else f"{one.mean:+.4f}"
        rows.append(f"| {check.words} | {mean} | {low_high} | {one.seeds} of {claim.seeds} | {one.verdict} |")
    return rows


def _runs(results: Results, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for every arm and rate, with the mean of every figure and the values of single seeds."""
    names = [name for name in FIGURES if any(name in run["figures"] for run in results["runs"])]
    head = ["arm", "rate", "parameters", "MLP width", *(FIGURES[name].title for name in names), "bits per byte by seed"]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        for rate in results["rates"]:
            own = [
                r for r in results["runs"] if (r["mechanism"], r["rate"]) == (row["mechanism"], rate) and r["figures"]
            ]
            cells = [row["mechanism"], f"{rate:g}", f"{row['parameters']:,}", str(row["mlp_dim"] or "")]
            for name in names:
                values = [run["figures"][name] for run in own if name in run["figures"]]
                error = standard_error(values)
                mean = f"{sum(values) / len(values):.4f}" if values else ""
                cells.append(mean + ("" if error is None else f" ± {error:.4f}"))
            by_seed = (f"{run['figures']['val_bits_per_byte']:.4f}" for run in sorted(own, key=lambda r: r["seed"]))
            if own:
                lines.append(f"| {' | '.join([*cells, ', '.join(by_seed)])} |")
    return lines


def _size(results: Results) -> str:
    facts = results["facts"]
    largest = max(run["parameters"] for run in results["runs"])
    return f"preset {results['preset']}: {largest / 1e6:.1f} M parameters, {facts['training']}"


def summary(folder: Path, pages: str) -> str:
    """A table of all results in a folder; `pages` is the path of their pages from where the table is."""
    lines = [
        "| claim | checks: prediction, mean, half of the 95 % interval | each arm at its best rate | verdict |",
        "| --- | --- | --- | --- |",
    ]
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        best = best_rates(results)
        common = _means(results, common_rates(results), named=True)
        chosen = "" if len(results["rates"]) == 1 or None in best.values() else _means(results, best, named=False)
        title = f"[{results['claim']['title']}]({pages}/{path.stem}.md)"
        lines.append(f"| {title} | {common} | {chosen} | {verdict(results)} |")
    return "\n".join(lines)


def _means(results: Results, rates: Mapping[str, float | None], named: bool) -> str:
    """The means of all checks, with what they predict or without."""
    means = []
    for check, one in zip(results["claim"]["checks"], decisions(results, rates), strict=True):
        mean = "none" if one.mean is None else f"{one.mean:+.4f}" + ("" if one.half is None else f" ± {one.half:.4f}")
        against = f" - {check['against']}" if check["against"] else ""
        side = "below" if check["below"] is not None else "above"
        what = f"`{check['figure']}` of {check['arm']}{against} {side} {check[side]:g}"
        means.append(f"{what}: {mean}" if named else mean)
    return "; ".join(means)
