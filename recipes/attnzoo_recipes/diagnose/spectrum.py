"""attnzoo-spectrum: the spectra of a model's heads compared with random weights, as tables, files and a report."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from attnzoo.diagnostics import plots
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.spectra.spectrum import SpectrumRecord
from attnzoo.diagnostics.training_records import label
from attnzoo_recipes.diagnose.glossary import SPECTRUM
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model
from attnzoo_recipes.diagnose.options import Options, comma_separated, options_of, parser_of
from attnzoo_recipes.diagnose.results import Results, finite_mean, text_table
from attnzoo_recipes.options import command_line, device_named, mistakes_in_one_sentence, take_allowed_imports

MAPS = ("outlier_count", "mp_softrank", "stable_rank", "participation_ratio")
_PRINTED = 24
_COLUMNS = {
    "layer": "layer", "heads": "heads", "outlying": "with outliers", "mp_gap": "largest gap",
    "outlier_energy": "largest energy", "stable_rank": "stable rank", "participation_ratio": "participation",
    "hard_rank": "rank",
}  # fmt: skip


@dataclass(frozen=True)
class SpectrumOptions(Options):
    """What the command line asks for."""

    matrices: tuple[str, ...]
    form: str
    per: str
    part: str
    null: str | None
    estimator: str
    level: float
    num_heads: int | None
    num_kv_heads: int | None
    drawn: int
    save_eigenvalues: bool


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-spectrum"):
        spectrum(parse(command_line(args)))


def parse(words: Sequence[str]) -> SpectrumOptions:
    """Options from a command line."""
    given = list(words)
    words, allowed = take_allowed_imports(given)
    parser = parser_of(
        "spectrum",
        "Compare the spectra of a model's attention heads with those of random weights, and write spectrum.json, "
        "spectrum.csv, pictures and report.html.",
        "a run folder or .ckpt of attnzoo-pretrain, a .safetensors file or folder, or a local Hugging Face folder",
    )
    add = parser.add_argument
    add("--matrices", default="qk,ov", help="some of qk (logits), ov (values to output), weights")
    add("--form", default="circuit", help="form of qk: circuit (of the logits) or gram (of the inner products)")
    add("--per", default="head", help="what has a spectrum: head or layer")
    add("--part", default="full", help="features of qk: full, nope (not rotated) or rope")
    add("--null", help="law of random weights: product, simulate or mp (default: the one that fits the mechanism)")
    add("--estimator", default="bulk", help="estimator of the variance: bulk, median or mean")
    add("--level", type=float, default=0.99, help="probability that noise stays below the threshold: 0.99, 0.95 or 0.9")
    add("--num-heads", type=int, help="query heads, for safetensors without config.json")
    add(
        "--num-kv-heads", type=int,
        help="key/value heads, for safetensors without config.json (default: from the number of rows of the keys)",
    )  # fmt: skip
    add("--drawn", type=int, default=6, help="number of spectra to draw, those with the largest gap")
    add("--save-eigenvalues", type=bool, default=False, help="whether spectrum.json contains the eigenvalues")
    parsed = parser.parse_args(words)
    if parsed.drawn < 0:
        raise ValueError(f"drawn must not be negative, got {parsed.drawn}")
    matrices = comma_separated(parsed.matrices)
    return options_of(SpectrumOptions, "spectrum", given, parsed, allowed, matrices=matrices)


def spectrum(options: SpectrumOptions) -> None:
    """Load, analyse, print and write."""
    results = Results(options.out, options.command, options.formats)
    loaded = load_model(
        options.model, name=options.name, num_heads=options.num_heads, num_kv_heads=options.num_kv_heads,
        allowed=options.allowed, device=device_named(options.device),
    )  # fmt: skip
    records = analyze_model(
        loaded.model, matrices=options.matrices, form=options.form, per=options.per, part=options.part,
        null=options.null, estimator=options.estimator, level=options.level, keep_eigenvalues=True,
        progress=lambda layers: tqdm(layers, unit="layer", desc="spectra", disable=None),
    )  # fmt: skip
    groups: dict[str, list[SpectrumRecord]] = {}
    for record in records:
        groups.setdefault(record.matrix, []).append(record)
    tables = {name: layer_rows(own) for name, own in groups.items()}
    write_files(results, options, loaded, records)
    write_report(results, options, loaded, groups, tables)
    results.write()
    sys.stdout.write(
        "".join(f"{name}: {verdict(own, options.level)}\n{printed(tables[name])}\n" for name, own in groups.items())
    )
    sys.stdout.write(f"written to {options.out}: report.html, spectrum.json, spectrum.csv and pictures\n")


def layer_rows(records: Sequence[SpectrumRecord]) -> list[dict[str, Any]]:
    """One row per layer: means of the ranks over its heads, largest gap and largest outlier energy."""
    layers: dict[Any, list[SpectrumRecord]] = {}
    for record in records:
        layers.setdefault(record.layer, []).append(record)
    return [
        {
            "layer": layer or "(the model)",
            "heads": len(own),
            "outlying": sum((record.outlier_count or 0) > 0 for record in own),
            "mp_gap": _largest(record.mp_gap for record in own),
            "outlier_energy": _largest(record.outlier_energy for record in own),
            "stable_rank": finite_mean(record.stable_rank for record in own),
            "participation_ratio": finite_mean(record.participation_ratio for record in own),
            "hard_rank": finite_mean(float(record.hard_rank) for record in own),
        }
        for layer, own in layers.items()
    ]


def verdict(records: Sequence[SpectrumRecord], level: float) -> str:
    """How many spectra have outliers, and how many of random weights would."""
    judged = [record for record in records if record.outlier_count is not None]
    outlying = sum((record.outlier_count or 0) > 0 for record in judged)
    text = f"{outlying} of {len(judged)} spectra have eigenvalues above the threshold; "
    text += f"of random weights about {(1 - level) * len(judged):.1f} would"
    missing = len(records) - len(judged)
    return text + (f" ({missing} more are too small to judge)" if missing else "")


def printed(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal; if there are many layers, of those with the largest gaps."""
    shown = list(rows)
    note = ""
    if len(shown) > _PRINTED:
        largest = sorted(range(len(rows)), key=lambda i: _gap(rows[i]["mp_gap"]), reverse=True)[:_PRINTED]
        shown = [rows[i] for i in sorted(largest)]
        note = f"({_PRINTED} of {len(rows)} layers, those with the largest gaps; all are in the report)\n"
    return text_table(shown, _COLUMNS) + note


def write_files(
    results: Results, options: SpectrumOptions, loaded: LoadedModel, records: Sequence[SpectrumRecord]
) -> None:
    """spectrum.json and spectrum.csv."""
    rows = [record.to_dict() for record in records]
    for row in rows if not options.save_eigenvalues else ():
        row["eigenvalues"] = None
    results.json("spectrum.json", {
        "facts": describe(loaded),
        "settings": options.settings(),
        "records": rows,
    })  # fmt: skip
    first, left_out = ("layer", "head", "matrix"), ("eigenvalues", "spikes", "dims")
    results.csv("spectrum.csv", [
        {key: row[key] for key in (*first, *(key for key in row if key not in (*first, *left_out)))} for row in rows
    ])  # fmt: skip


def write_report(
    results: Results,
    options: SpectrumOptions,
    loaded: LoadedModel,
    groups: Mapping[str, Sequence[SpectrumRecord]],
    tables: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Pictures and report.html."""
    sections = []
    for name, records in groups.items():
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        parts: list[Text | Table | Picture] = [Text(verdict(records, options.level) + ".")]
        missing = []
        for metric in MAPS if any(record.head is not None for record in records) else ():
            table, layers = _by_head(records, metric)
            if not bool(table.isfinite().any()):
                missing.append(label(metric))
                continue
            text = f"{name}: {label(metric)}, by layer and head"
            parts.append(results.picture(f"{slug}-{metric}", text, plots.head_map, table, metric, layers=layers))
        if missing:
            parts.append(Text(f"No map, since no spectrum has the figure: {', '.join(missing)}."))
        largest = sorted((r for r in records if r.eigenvalues), key=lambda r: _gap(r.mp_gap), reverse=True)
        for place, record in enumerate(largest[: options.drawn]):
            where = ", ".join(
                str(x) for x in (record.layer, None if record.head is None else f"head {record.head}") if x
            )
            text = f"{name} of {where or 'the model'}: spectrum"
            parts.append(results.picture(f"{slug}-esd-{place}", text, plots.esd, record))
        parts.append(Table(tables[name], _COLUMNS))
        sections.append(Section(f"{name} ({options.form})" if name.startswith("qk") else name, parts))
    facts = describe(loaded)
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}. An eigenvalue is an outlier "
        f"above the threshold that random weights stay below with a probability of {options.level:.0%}; gaps are "
        "relative to the edge of the law; ranks are means over heads."
    )
    results.report(f"Spectra of {loaded.name}", sections, introduction, SPECTRUM)


def _by_head(records: Sequence[SpectrumRecord], metric: str) -> tuple[torch.Tensor, list[str]]:
    """A figure (L, H), NaN where a spectrum does not have it, and the names of the layers."""
    layers = list(dict.fromkeys(record.layer or "" for record in records))
    heads = 1 + max(record.head or 0 for record in records)
    table = torch.full((len(layers), heads), math.nan, dtype=torch.float64)
    for record in records:
        value = getattr(record, metric)
        table[layers.index(record.layer or ""), record.head or 0] = math.nan if value is None else value
    return table, layers


def _gap(value: float | None) -> float:
    return -math.inf if value is None else value


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None and math.isfinite(value)), default=None)


if __name__ == "__main__":
    main()
