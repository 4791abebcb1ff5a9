"""attnzoo-spectrum: the spectra of a model's heads against randomness, as a table, files and a report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

import attnzoo
from attnzoo.diagnostics import plots
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.spectra.spectrum import SpectrumRecord
from attnzoo.diagnostics.training_records import finite, label
from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text, number, write_report
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model

MAPS = ("outlier_count", "mp_softrank", "stable_rank", "participation_ratio")
_PRINTED = 24
_COLUMNS = {
    "layer": "layer", "heads": "heads", "outlying": "with outliers", "mp_gap": "largest gap",
    "outlier_energy": "largest energy", "stable_rank": "stable rank", "participation_ratio": "participation",
    "hard_rank": "rank",
}  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    model: str
    out: Path
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
    device: str
    allowed: tuple[str, ...]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    try:
        spectrum(parse(list(sys.argv[1:] if args is None else args)))
    except (ValueError, ArgumentError, OSError) as error:
        sys.stderr.write(f"attnzoo-spectrum: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def parse(words: Sequence[str]) -> Choices:
    """Choices from a command line."""
    parser = ArgumentParser(
        prog="attnzoo-spectrum",
        description="Compare the spectra of a model's attention heads with what random weights would show, and write "
        "spectrum.json, spectrum.csv, pictures and report.html.",
        exit_on_error=False,
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help="a run folder or .ckpt of attnzoo-pretrain, a .safetensors file or folder, or a local Hugging Face folder",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default runs/spectrum/NAME)")
    parser.add_argument(
        "--matrices", default="qk,ov", help="some of qk (logits), ov (values to output), weights (default qk,ov)"
    )
    parser.add_argument("--form", default="circuit", help="of qk: circuit or gram (default circuit)")
    parser.add_argument("--per", default="head", help="head or layer (default head)")
    parser.add_argument("--part", default="full", help="of qk: full, nope or rope (default full)")
    parser.add_argument("--null", help="product, simulate or mp (default: what fits the mechanism)")
    parser.add_argument("--estimator", default="bulk", help="of the variance: bulk, median or mean (default bulk)")
    parser.add_argument("--level", type=float, default=0.99, help="0.99, 0.95 or 0.9: noise below the threshold")
    parser.add_argument("--num_heads", type=int, help="query heads, for safetensors without config.json")
    parser.add_argument("--num_kv_heads", type=int, help="key/value heads, likewise (default: by the keys' rows)")
    parser.add_argument("--drawn", type=int, default=6, help="spectra drawn, those with the largest gap (default 6)")
    parser.add_argument("--save_eigenvalues", type=bool, default=False, help="whether spectrum.json holds them")
    parser.add_argument("--device", default="cpu", help="where the decompositions run (default cpu)")
    parser.add_argument(
        "--allow_import", type=str, default="", metavar="PREFIX,...",
        help=f"packages that a checkpoint may name beside {', '.join(ALLOWED)}; importing runs their code",
    )  # fmt: skip
    found = parser.parse_args(list(words))
    if found.drawn < 0:
        raise ValueError(f"drawn must not be negative, got {found.drawn}")
    path = Path(found.model)
    return Choices(
        model=found.model,
        out=Path(found.out) if found.out else Path("runs") / "spectrum" / (path.stem or path.resolve().name),
        matrices=tuple(word.strip() for word in found.matrices.split(",") if word.strip()),
        form=found.form, per=found.per, part=found.part, null=found.null, estimator=found.estimator, level=found.level,
        num_heads=found.num_heads, num_kv_heads=found.num_kv_heads, drawn=found.drawn,
        save_eigenvalues=found.save_eigenvalues, device=found.device,
        allowed=(*ALLOWED, *(word.strip() for word in found.allow_import.split(",") if word.strip())),
    )  # fmt: skip


def spectrum(choices: Choices) -> None:
    """Load, analyse, print and write."""
    try:
        device = torch.device(choices.device)
    except RuntimeError:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda, got {choices.device!r}") from None
    loaded = load_model(
        choices.model, num_heads=choices.num_heads, num_kv_heads=choices.num_kv_heads, allowed=choices.allowed,
        device=device,
    )  # fmt: skip
    records = analyze_model(
        loaded.model, matrices=choices.matrices, form=choices.form, per=choices.per, part=choices.part,
        null=choices.null, estimator=choices.estimator, level=choices.level, keep_eigenvalues=True,
        progress=lambda layers: tqdm(layers, unit="layer", desc="spectra", disable=None),
    )  # fmt: skip
    groups: dict[str, list[SpectrumRecord]] = {}
    for record in records:
        groups.setdefault(record.matrix, []).append(record)
    tables = {name: layer_rows(own) for name, own in groups.items()}
    sys.stdout.write(
        "".join(f"{name}: {verdict(own, choices.level)}\n{printed(tables[name])}\n" for name, own in groups.items())
    )
    write_files(choices, loaded, records)
    write_pictures_and_report(choices, loaded, groups, tables)
    sys.stdout.write(f"written to {choices.out}: report.html, spectrum.json, spectrum.csv and pictures\n")


def layer_rows(records: Sequence[SpectrumRecord]) -> list[dict[str, Any]]:
    """One row a layer: means of the ranks over its heads, largest gap and outlier energy."""
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
            "stable_rank": _mean(record.stable_rank for record in own),
            "participation_ratio": _mean(record.participation_ratio for record in own),
            "hard_rank": _mean(float(record.hard_rank) for record in own),
        }
        for layer, own in layers.items()
    ]


def verdict(records: Sequence[SpectrumRecord], level: float) -> str:
    """How many spectra have outliers, and how many noise would have."""
    judged = [record for record in records if record.outlier_count is not None]
    outlying = sum((record.outlier_count or 0) > 0 for record in judged)
    text = f"{outlying} of {len(judged)} spectra have eigenvalues above the threshold; "
    text += f"of random weights about {(1 - level) * len(judged):.1f} would"
    missing = len(records) - len(judged)
    return text + (f" ({missing} more are too small to judge)" if missing else "")


def printed(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal; of many layers those with the largest gaps."""
    shown = list(rows)
    note = ""
    if len(shown) > _PRINTED:
        largest = sorted(range(len(rows)), key=lambda i: _gap(rows[i]["mp_gap"]), reverse=True)[:_PRINTED]
        shown = [rows[i] for i in sorted(largest)]
        note = f"({_PRINTED} of {len(rows)} layers, those with the largest gaps; all are in the report)\n"
    cells = [list(_COLUMNS.values()), *([number(row[key], 3) for key in _COLUMNS] for row in shown)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
             for line in cells]  # fmt: skip
    return "\n".join(lines) + "\n" + note


def write_files(choices: Choices, loaded: LoadedModel, records: Sequence[SpectrumRecord]) -> None:
    """spectrum.json and spectrum.csv."""
    rows = [record.to_dict() for record in records]
    for row in rows if not choices.save_eigenvalues else ():
        row["eigenvalues"] = None
    settings = {key: value for key, value in dataclasses.asdict(choices).items() if key not in ("model", "out")}
    content = {
        "facts": describe(loaded) | {"attnzoo": attnzoo.__version__, "torch": torch.__version__},
        "settings": settings,
        "records": rows,
    }
    write(choices.out / "spectrum.json", json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    flat = [{key: value for key, value in row.items() if key not in ("eigenvalues", "spikes", "dims")} for row in rows]
    keys = ["layer", "head", "matrix", *(key for key in flat[0] if key not in ("layer", "head", "matrix"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write(choices.out / "spectrum.csv", text.getvalue())


def write_pictures_and_report(
    choices: Choices,
    loaded: LoadedModel,
    groups: Mapping[str, Sequence[SpectrumRecord]],
    tables: Mapping[str, list[dict[str, Any]]],
) -> None:
    """PNGs, light and dark, and report.html with the same."""
    sections = []
    for name, records in groups.items():
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        parts: list[Text | Table | Picture] = [Text(verdict(records, choices.level) + ".")]
        for metric in MAPS if any(record.head is not None for record in records) else ():
            parts.append(_picture(choices.out / f"{slug}-{metric}", f"{name}: {label(metric)}, by layer and head",
                                  _head_map, records, metric))  # fmt: skip
        largest = sorted((r for r in records if r.eigenvalues), key=lambda r: _gap(r.mp_gap), reverse=True)
        for place, record in enumerate(largest[: choices.drawn]):
            where = ", ".join(
                str(x) for x in (record.layer, None if record.head is None else f"head {record.head}") if x
            )
            parts.append(_picture(choices.out / f"{slug}-esd-{place}", f"{name} of {where or 'the model'}: spectrum",
                                  plots.esd, record))  # fmt: skip
        parts.append(Table(tables[name], _COLUMNS))
        sections.append(Section(f"{name} ({choices.form})" if name.startswith("qk") else name, parts))
    facts = describe(loaded)
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}. An eigenvalue is an outlier "
        f"above the threshold that random weights stay below with a probability of {choices.level:.0%}; gaps are "
        "relative to the edge of the law; ranks are means over heads."
    )
    write_report(choices.out / "report.html", f"Spectra of {loaded.name}", sections, introduction=introduction)


def _picture(path: Path, text: str, draw: Any, *arguments: Any) -> Picture:
    """Draw in both themes, write both files, and return them for the report."""
    made = {}
    for theme, ending in (("light", ""), ("dark", "-dark")):
        figure = draw(*arguments, theme=theme)
        file = plots.save(figure, path.with_name(f"{path.name}{ending}.png"))
        made[theme] = file.read_bytes()
    return Picture(made["light"], text, made["dark"])


def _head_map(records: Sequence[SpectrumRecord], metric: str, *, theme: str) -> Any:
    layers = list(dict.fromkeys(record.layer or "" for record in records))
    heads = 1 + max(record.head or 0 for record in records)
    table = torch.full((len(layers), heads), math.nan, dtype=torch.float64)
    for record in records:
        value = getattr(record, metric)
        table[layers.index(record.layer or ""), record.head or 0] = math.nan if value is None else value
    if not bool(table.isfinite().any()):
        table.zero_()
    return plots.head_map(table, metric, layers=layers, theme=theme)


def write(path: Path, text: str) -> None:
    """Write a file in one piece; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _gap(value: float | None) -> float:
    return -math.inf if value is None else value


def _largest(values: Any) -> float | None:
    return max((value for value in values if value is not None and math.isfinite(value)), default=None)


def _mean(values: Any) -> float | None:
    kept = [value for value in values if math.isfinite(value)]
    return statistics.fmean(kept) if kept else None


if __name__ == "__main__":
    main()
