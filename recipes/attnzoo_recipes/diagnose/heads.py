"""attnzoo-heads: what every head of a model attends to on a text, and how alike heads are, as a table and a report."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn
from tqdm import tqdm

import attnzoo
from attnzoo.diagnostics import plots
from attnzoo.diagnostics.heads.attention_call import HeadCall
from attnzoo.diagnostics.heads.clusters import chai_cluster_error, elbow
from attnzoo.diagnostics.heads.observe import observe
from attnzoo.diagnostics.heads.report import KINDS, HeadReport, head_report
from attnzoo.diagnostics.heads.similarity import DETECTABLE
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.training_records import label
from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model
from attnzoo_recipes.diagnose.results import Results, text_table, words
from attnzoo_recipes.diagnose.texts import reader, sequences

MAPS = ("normalized_entropy", "distance", "sink", "previous_token")
_COLUMNS = {
    "layer": "layer", "heads": "heads", "normalized_entropy": "entropy / max", "distance": "distance",
    "sink": "first token", "previous_token": "token before", "pair_cosine": "cosine", "elbow": "clusters",
}  # fmt: skip
_CURVES = 8


@dataclass(frozen=True)
class Choices:
    """What the command line asks for."""

    model: str
    name: str | None
    text: Path
    out: Path
    length: int
    sequences: int | None
    batch_size: int
    threshold: float
    probe_tokens: int
    drawn: int
    device: str
    allowed: tuple[str, ...]


@dataclass(frozen=True)
class Clusters:
    """One layer's clusters of heads that attend alike.

    Attributes:
        error: what k clusters lose, (H,); entry k - 1 is for k.
        elbow: k at its elbow.
        probe_tokens: first tokens whose pattern was clustered.
    """

    error: Tensor
    elbow: int
    probe_tokens: int

    @property
    def relative(self) -> list[float]:
        """Errors over that of one cluster; zeros if all heads are equal."""
        one = float(self.error[0])
        return [float(value) / one if one > 0 else 0.0 for value in self.error]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    try:
        heads(parse(list(sys.argv[1:] if args is None else args)))
    except (ValueError, ArgumentError, OSError) as error:
        sys.stderr.write(f"attnzoo-heads: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def parse(arguments: Sequence[str]) -> Choices:
    """Choices from a command line."""
    parser = ArgumentParser(
        prog="attnzoo-heads",
        description="Run a model over a text and write what its heads attend to, which kinds they are and how alike "
        "they are: heads.json, heads.csv, pictures and report.html.",
        exit_on_error=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder or .ckpt of attnzoo-pretrain, or a local Hugging Face folder"
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, read by the model's own tokenizer", required=True)
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default runs/heads/NAME)")
    parser.add_argument("--name", help="of the model, in titles and folders (default: that of its file or folder)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    parser.add_argument("--sequences", type=int, help="how many; the text must be that long (default: up to 16)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences at once (default 4)")
    parser.add_argument("--threshold", type=float, default=0.4, help="share of the weight that makes a kind (0.4)")
    parser.add_argument(
        "--probe_tokens", type=int, default=5,
        help="first tokens whose patterns are clustered; of models that see later tokens always all (default 5)",
    )  # fmt: skip
    parser.add_argument("--drawn", type=int, default=12, help="layers whose similarity is drawn, evenly spaced (12)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument(
        "--allow_import", type=str, default="", metavar="PREFIX,...",
        help=f"packages that a checkpoint may name beside {', '.join(ALLOWED)}; importing runs their code",
    )  # fmt: skip
    found = parser.parse_args(list(arguments))
    for name, least in (("batch_size", 1), ("probe_tokens", 2), ("drawn", 1)):
        if getattr(found, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(found, name)}")
    if not 0 <= found.threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {found.threshold}")
    path = Path(found.model)
    return Choices(
        model=found.model, name=found.name, text=Path(found.text),
        out=Path(found.out) if found.out else Path("runs") / "heads" / (found.name or path.stem or path.resolve().name),
        length=found.length, sequences=found.sequences, batch_size=found.batch_size, threshold=found.threshold,
        probe_tokens=found.probe_tokens, drawn=found.drawn, device=found.device,
        allowed=(*ALLOWED, *words(found.allow_import)),
    )  # fmt: skip


def heads(choices: Choices) -> None:
    """Load, run, print and write."""
    results = Results(choices.out)
    loaded = load_model(choices.model, allowed=choices.allowed, device=on_device(choices.device))
    loaded = dataclasses.replace(loaded, name=choices.name or loaded.name)
    attention_layers(loaded.model)
    tokens = sequences("text", choices.text, reader(loaded), choices.length, choices.sequences)
    if choices.probe_tokens > choices.length:
        raise ValueError(
            f"probe_tokens must not exceed length, got {choices.probe_tokens} and {choices.length}"
        )  # fmt: skip
    batches = tokens.to(choices.device).split(choices.batch_size)
    report = head_report(loaded.model, _shown(batches, "heads"))
    clusters = layer_clusters(loaded.model, _shown(batches, "clusters"), choices.probe_tokens)
    rows = layer_rows(report, clusters)
    said = f"{summary(report, choices.threshold)}\n{text_table(rows, _COLUMNS)}"
    write_files(results, choices, loaded, report, clusters)
    write_report(results, choices, loaded, report, clusters)
    results.write()
    sys.stdout.write(f"{said}written to {choices.out}: report.html, heads.json, heads.csv and pictures\n")


def on_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if torch knows none.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda, got {name!r}") from None


@torch.no_grad()
def layer_clusters(model: nn.Module, batches: Iterable[Tensor], probe_tokens: int) -> list[Clusters]:
    """Clusters of the heads of every layer by their patterns, each sequence for itself, errors summed up.

    Of causal patterns the first `probe_tokens` tokens count, as in CHAI; where tokens see later ones, all tokens.
    """
    errors: dict[int, Tensor] = {}
    probes: dict[int, int] = {}

    def visit(call: HeadCall) -> None:
        pattern = call.pattern()
        causal = not bool(pattern.triu(1).any())
        probe = min(probe_tokens, pattern.shape[-1]) if causal else pattern.shape[-1]
        index = call.layer.index
        found = chai_cluster_error(pattern, probe).cpu()
        errors[index] = errors[index] + found if index in errors else found
        probes[index] = probe

    with observe(model, visit):
        for batch in batches:
            model(batch)
    return [Clusters(errors[index], elbow(errors[index]), probes[index]) for index in sorted(errors)]


def layer_rows(report: HeadReport, clusters: Sequence[Clusters]) -> list[dict[str, Any]]:
    """One row a layer: means over its heads, cosine of two heads' patterns, clusters at the elbow."""
    cosines = report.pair_cosine_mean().tolist()
    return [
        {
            "layer": layer.name, "heads": layer.num_heads,
            **{name: _mean(layer.measures[name]) for name in MAPS},
            "pair_cosine": None if math.isnan(cosine) else cosine,
            "elbow": found.elbow,
        }
        for layer, cosine, found in zip(report.layers, cosines, clusters, strict=True)
    ]  # fmt: skip


def summary(report: HeadReport, threshold: float) -> str:
    """How many heads are of a known kind, and which, the first few by name."""
    kinds = by_kind(report, threshold)
    total = sum(layer.num_heads for layer in report.layers)
    parts = []
    for kind, labels in kinds.items():
        named = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        parts.append(f"{len(labels)} {_kind_name(kind)} ({named})" if labels else f"no {_kind_name(kind)}")
    return f"{total} heads on {report.queries:,} tokens: {'; '.join(parts)}"


def by_kind(report: HeadReport, threshold: float) -> dict[str, list[str]]:
    """Labels of the heads of each kind.

    Of the weight outside the first token, the kind with the largest share counts, above the threshold. Sink heads are
    those whose first token gets more than that of all weight; they may be of another kind too: an induction head
    rests on the first token while there is nothing to copy.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for layer in report.layers:
        shares = torch.stack([layer.measures[f"detect_{kind}"] for kind in DETECTABLE]).nan_to_num(-1.0)
        for head in range(layer.num_heads):
            name = f"L{layer.index}H{head}"
            best = int(shares[:, head].argmax())
            if shares[best, head] > threshold:
                found[DETECTABLE[best]].append(name)
            if layer.measures["sink"][head] > threshold:
                found["sink_head"].append(name)
    return found


def write_files(
    results: Results, choices: Choices, loaded: LoadedModel, report: HeadReport, clusters: Sequence[Clusters]
) -> None:
    """heads.json and heads.csv."""
    kinds = by_kind(report, choices.threshold)
    settings = {
        key: value for key, value in dataclasses.asdict(choices).items() if key not in ("model", "name", "out", "text")
    }
    results.json("heads.json", {
        "facts": describe(loaded) | {
            "text": str(choices.text), "attnzoo": attnzoo.__version__, "torch": torch.__version__,
        },
        "settings": settings,
        "kinds": kinds,
        "clusters": [
            {"layer": layer.name, "elbow": own.elbow, "probe_tokens": own.probe_tokens, "error": own.error.tolist()}
            for layer, own in zip(report.layers, clusters, strict=True)
        ],
        **report.to_dict(),
    })  # fmt: skip
    results.csv("heads.csv", [
        {
            "layer": layer.index, "head": head, "label": f"L{layer.index}H{head}", "name": layer.name,
            "kinds": " ".join(kind for kind, own in kinds.items() if f"L{layer.index}H{head}" in own),
            **{name: float(values[head]) for name, values in layer.measures.items()},
        }
        for layer in report.layers for head in range(layer.num_heads)
    ])  # fmt: skip


def write_report(
    results: Results, choices: Choices, loaded: LoadedModel, report: HeadReport, clusters: Sequence[Clusters]
) -> None:
    """Pictures and report.html."""
    names = [layer.name for layer in report.layers]
    facts = describe(loaded)
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}, on {report.queries:,} tokens "
        f"of {choices.text} in sequences of {choices.length}. {summary(report, choices.threshold)}."
    )
    notes = [Text(f"{layer.name}: {layer.note}.") for layer in report.layers if layer.note]
    attended: list[Text | Table | Picture] = [
        Table(layer_rows(report, clusters), _COLUMNS),
        Text("Means over the heads of a layer; cosine: of the patterns of two heads; clusters: at the elbow."),
        *notes,
    ]
    for name in MAPS:
        table = report.table(name)
        if bool(table.isfinite().any()):
            attended.append(
                results.picture(name, f"{label(name)}, by layer and head", plots.head_map, table, name, layers=names)
            )
    results.report(
        f"Heads of {loaded.name}",
        [
            Section("What heads attend to", attended),
            Section("Kinds of heads", _kinds(results, choices, report, names)),
            Section("How alike heads are", _alike(results, choices, report, clusters)),
        ],
        introduction,
    )


def _kinds(
    results: Results, choices: Choices, report: HeadReport, names: Sequence[str]
) -> list[Text | Table | Picture]:  # fmt: skip
    kinds = by_kind(report, choices.threshold)
    parts: list[Text | Table | Picture] = [
        Text(
            f"A head is of the kind that has the largest share of its weight outside the first token, if that exceeds "
            f"{choices.threshold:g}. Sink heads give more than that of all their weight to the first token; a head "
            "may be both."
        ),
        Table([{"kind": _kind_name(kind), "heads": ", ".join(own) or "none"} for kind, own in kinds.items()]),
    ]
    tables = {_kind_name(kind): report.table(f"detect_{kind}") for kind in DETECTABLE}
    if any(bool(table.isfinite().any()) for table in tables.values()):
        parts.append(
            results.picture(
                "kinds", "share of each head's weight that fits a kind, by layer and head", plots.head_map, tables,
                "share_of_the_weight", layers=names, title="Kinds of heads",
            )
        )  # fmt: skip
    return parts


def _alike(
    results: Results, choices: Choices, report: HeadReport, clusters: Sequence[Clusters]
) -> list[Text | Table | Picture]:
    chosen = evenly(len(report.layers), choices.drawn)
    parts: list[Text | Table | Picture] = []
    for name, text in (
        ("pair_cosine", "cosine of two heads' patterns"),
        ("output_cosine", "cosine of two heads' outputs"),
    ):
        tables = {f"layer {report.layers[i].index}": getattr(report.layers[i], name) for i in chosen}
        tables = {key: table for key, table in tables.items() if _has_pairs(table)}
        if tables:
            parts.append(
                results.picture(
                    name, f"{text}, by layer", plots.similarity_matrix, tables, "cosine", title=text.capitalize()
                )
            )
    curves = {
        f"layer {report.layers[i].index} (elbow {clusters[i].elbow})": (
            list(range(1, len(clusters[i].relative) + 1)),
            clusters[i].relative,
        )
        for i in evenly(len(report.layers), _CURVES)
    }
    probes = sorted({own.probe_tokens for own in clusters})
    parts.append(Text(
        f"Clusters of heads by the patterns of the first {' or '.join(map(str, probes))} tokens of each sequence "
        "(CHAI, arXiv:2403.08058): how far heads are from the mean of their cluster, over what one cluster has. All "
        "causal heads agree on the first token, so few clusters say less than they seem to."
    ))  # fmt: skip
    parts.append(results.picture(
        "clusters", "error of k clusters over that of one, by layer", plots.pruning_curves, curves,
        unit="clusters of heads", loss="error / error of one cluster", title="Heads that attend alike",
    ))  # fmt: skip
    return parts


def evenly(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _shown(batches: Sequence[Tensor], what: str) -> Iterable[Tensor]:
    return tqdm(batches, unit="batch", desc=what, delay=2, leave=False, disable=None)


def _kind_name(kind: str) -> str:
    return kind.removesuffix("_head").replace("_", " ") + " heads"


def _has_pairs(table: Tensor) -> bool:
    off = ~torch.eye(table.shape[0], dtype=torch.bool)
    return table.shape[0] > 1 and bool(table[off].isfinite().any())


def _mean(values: Tensor) -> float | None:
    kept = [value for value in values.tolist() if math.isfinite(value)]
    return statistics.fmean(kept) if kept else None


if __name__ == "__main__":
    main()
