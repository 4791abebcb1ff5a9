"""attnzoo-heads: what each head of a model attends to on a text, and how similar heads are, as tables and a report."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attnzoo.diagnostics import plots
from attnzoo.diagnostics.batches import decoder_modules, decoder_tokens_and_mask, run_batch, tokens_and_mask
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.heads.clusters import chai_cluster_error, elbow
from attnzoo.diagnostics.heads.observe import observe
from attnzoo.diagnostics.heads.report import KINDS, HeadReport, head_report
from attnzoo.diagnostics.heads.similarity import DETECTABLE, real_tokens_first
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.training_records import label
from attnzoo_recipes.diagnose.glossary import HEADS
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model
from attnzoo_recipes.diagnose.options import Options, options_of, parser_of
from attnzoo_recipes.diagnose.results import Results, finite_mean, text_table
from attnzoo_recipes.diagnose.tensors import SUFFIXES, batches_of, inputs_of, read_tensors
from attnzoo_recipes.diagnose.texts import reader, sequences
from attnzoo_recipes.options import command_line, device_named, mistakes_in_one_sentence, take_allowed_imports

MAPS = ("normalized_entropy", "distance", "sink", "previous_token")
_COLUMNS = {
    "layer": "layer", "heads": "heads", "normalized_entropy": "entropy / max", "distance": "distance",
    "sink": "first token", "previous_token": "token before", "pair_cosine": "cosine", "elbow": "clusters",
}  # fmt: skip
_CURVES = 8


@dataclass(frozen=True)
class HeadsOptions(Options):
    """What the command line asks for."""

    text: Path
    length: int
    sequences: int | None
    batch_size: int
    threshold: float
    probe_tokens: int
    drawn: int


@dataclass(frozen=True)
class Clusters:
    """Clusters of one layer's heads with similar attention patterns.

    Attributes:
        error: of k clusters, (H,); entry k - 1 is for k.
        elbow: k at the elbow of the error.
        probe_tokens: number of first tokens whose pattern was clustered.
    """

    error: Tensor
    elbow: int
    probe_tokens: int

    @property
    def relative(self) -> list[float]:
        """Errors divided by that of one cluster; zeros if all heads are equal."""
        one = float(self.error[0])
        return [float(value) / one if one > 0 else 0.0 for value in self.error]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-heads"):
        heads(parse(command_line(args)))


def parse(words: Sequence[str]) -> HeadsOptions:
    """Options from a command line."""
    given = list(words)
    words, allowed = take_allowed_imports(given)
    parser = parser_of(
        "heads",
        "Run a model on a text and write what its heads attend to, which kinds they are and how similar they are: "
        "heads.json, heads.csv, pictures and report.html.",
        "a run folder or .ckpt of attnzoo-pretrain, or a local Hugging Face folder",
    )
    add = parser.add_argument
    add(
        "--text", "--data", metavar="FILE", required=True,
        help="UTF-8 text, read by the model's own tokenizer, or tensors by the names of the model's arguments "
        "(.safetensors, .npz, .pt)",
    )  # fmt: skip
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--sequences", type=int, help="number of sequences, which the text must fill (default: up to 16; all tensors)")
    add("--batch-size", type=int, default=4, help="sequences processed together")
    add("--threshold", type=float, default=0.4, help="share of a head's weight from which on it counts as of a kind")
    add(
        "--probe-tokens", type=int, default=5,
        help="number of first tokens whose patterns are clustered; models that see later tokens always use all",
    )  # fmt: skip
    add("--drawn", type=int, default=12, help="number of layers whose similarity is drawn, evenly spaced")
    parsed = parser.parse_args(words)
    for name, least in (("batch_size", 1), ("probe_tokens", 2), ("drawn", 1)):
        if getattr(parsed, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(parsed, name)}")
    if not 0 <= parsed.threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {parsed.threshold}")
    return options_of(HeadsOptions, "heads", given, parsed, allowed, text=Path(parsed.text))


def heads(options: HeadsOptions) -> None:
    """Load, run, print and write."""
    results = Results(options.out, options.command, options.formats)
    device = device_named(options.device)
    whole = options.text.suffix in SUFFIXES
    loaded = load_model(options.model, name=options.name, allowed=options.allowed, device=device, whole=whole)
    attention_layers(loaded.model)
    batches = _batches(options, loaded, device)
    report = head_report(loaded.model, _with_progress(batches, "heads"))
    clusters = layer_clusters(loaded.model, _with_progress(batches, "clusters"), options.probe_tokens)
    table = text_table(layer_rows(report, clusters), _COLUMNS)
    write_files(results, options, loaded, report, clusters)
    write_report(results, options, loaded, report, clusters)
    results.write()
    sys.stdout.write(f"{summary(report, options.threshold)}\n{table}")
    sys.stdout.write(f"written to {options.out}: report.html, heads.json, heads.csv and pictures\n")


def _batches(options: HeadsOptions, loaded: LoadedModel, device: torch.device) -> Sequence[Any]:
    if options.text.suffix in SUFFIXES:
        tensors = read_tensors("data", options.text, loaded.model, options.sequences)
        return batches_of(inputs_of(loaded.model, tensors), options.batch_size, device)
    tokens = sequences("text", options.text, reader(loaded), options.length, options.sequences)
    if options.probe_tokens > options.length:
        raise ValueError(f"probe_tokens must not exceed length, got {options.probe_tokens} and {options.length}")
    return torch.split(tokens.to(device), options.batch_size)


@torch.no_grad()
def layer_clusters(model: nn.Module, batches: Iterable[Any], probe_tokens: int) -> list[Clusters]:
    """Clusters of the heads of every layer by their patterns, per sequence, with errors summed over sequences.

    Causal patterns are compared on the first `probe_tokens` tokens, as in CHAI; patterns that are not causal, on all.
    Padding does not count, on either side.
    """
    errors: dict[int, Tensor] = {}
    probes: dict[int, int] = {}
    masks: list[Tensor | None] = [None, None]
    of_decoder = decoder_modules(model)

    def visit(call: AttentionCall) -> None:
        own = masks[call.layer.module in of_decoder]
        pattern = real_tokens_first(call.pattern(), own, masks[0] if call.cross else own)
        if not bool(pattern.isfinite().all()):
            raise ValueError(f"layer {call.layer.name!r} must have finite attention weights, got NaN or infinite ones")
        T, S = pattern.shape[-2:]
        # Zeros change no distance, and make a pattern over another sequence square.
        pattern = F.pad(pattern, (0, max(T - S, 0), 0, max(S - T, 0)))
        causal = not call.cross and not bool(pattern.triu(1).any())
        probe = min(probe_tokens, pattern.shape[-1]) if causal else pattern.shape[-1]
        index = call.layer.index
        error = chai_cluster_error(pattern, probe).cpu()
        errors[index] = errors[index] + error if index in errors else error
        probes[index] = probe

    with observe(model, visit):
        for batch in batches:
            masks[:] = [tokens_and_mask(batch)[1], decoder_tokens_and_mask(batch)[1]]
            run_batch(model, batch, masks[0])
    return [Clusters(errors[index], elbow(errors[index]), probes[index]) for index in sorted(errors)]


def layer_rows(report: HeadReport, clusters: Sequence[Clusters]) -> list[dict[str, Any]]:
    """One row per layer: means over its heads, mean cosine of two heads' patterns, clusters at the elbow."""
    cosines = report.pair_cosine_mean().tolist()
    return [
        {
            "layer": layer.name, "heads": layer.num_heads,
            **{name: finite_mean(layer.measures[name].tolist()) for name in MAPS},
            "pair_cosine": None if math.isnan(cosine) else cosine,
            "elbow": own.elbow,
        }
        for layer, cosine, own in zip(report.layers, cosines, clusters, strict=True)
    ]  # fmt: skip


def summary(report: HeadReport, threshold: float) -> str:
    """How many heads are of each kind, with the names of the first few."""
    kinds = by_kind(report, threshold)
    total = sum(layer.num_heads for layer in report.layers)
    parts = []
    for kind, labels in kinds.items():
        named = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
        parts.append(f"{len(labels)} {_kind_name(kind)} ({named})" if labels else f"no {_kind_name(kind)}")
    return f"{total} head{'s' if total > 1 else ''} on {report.queries:,} tokens: {'; '.join(parts)}"


def by_kind(report: HeadReport, threshold: float) -> dict[str, list[str]]:
    """Labels of the heads of each kind.

    A head is of the kind with the largest share of its weight outside the first token, if that exceeds the threshold.
    Sink heads give more than that share of all their weight to the first token; they may be of another kind as well:
    an induction head attends to the first token while there is nothing to copy.
    """
    labels: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for layer in report.layers:
        shares = torch.stack([layer.measure(f"detect_{kind}") for kind in DETECTABLE]).nan_to_num(-1.0)
        for head in range(layer.num_heads):
            name = f"L{layer.index}H{head}"
            best = int(shares[:, head].argmax())
            if shares[best, head] > threshold:
                labels[DETECTABLE[best]].append(name)
            if layer.measures["sink"][head] > threshold:
                labels["sink_head"].append(name)
    return labels


def write_files(
    results: Results, options: HeadsOptions, loaded: LoadedModel, report: HeadReport, clusters: Sequence[Clusters]
) -> None:
    """heads.json and heads.csv."""
    kinds = by_kind(report, options.threshold)
    results.json("heads.json", {
        "facts": describe(loaded) | {"text": str(options.text)},
        "settings": options.settings("text"),
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
    results: Results, options: HeadsOptions, loaded: LoadedModel, report: HeadReport, clusters: Sequence[Clusters]
) -> None:
    """Pictures and report.html."""
    names = [layer.name for layer in report.layers]
    facts = describe(loaded)
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}, on {report.queries:,} tokens "
        f"of {options.text}{_of_length(options)}. {summary(report, options.threshold)}."
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
            Section("Kinds of heads", _kinds(results, options, report, names)),
            Section("How similar heads are", _similarity(results, options, report, clusters)),
        ],
        introduction,
        HEADS,
    )


def _kinds(
    results: Results, options: HeadsOptions, report: HeadReport, names: Sequence[str]
) -> list[Text | Table | Picture]:  # fmt: skip
    kinds = by_kind(report, options.threshold)
    parts: list[Text | Table | Picture] = [
        Text(
            f"A head is of the kind with the largest share of its weight outside the first token, if that exceeds "
            f"{options.threshold:g}. Sink heads give more than that share of all their weight to the first token; a "
            "head may be both."
        ),
        Table([{"kind": _kind_name(kind), "heads": ", ".join(own) or "none"} for kind, own in kinds.items()]),
    ]
    tables = {
        _kind_name(kind): report.table(f"detect_{kind}") for kind in DETECTABLE if f"detect_{kind}" in report.measures
    }
    if any(bool(table.isfinite().any()) for table in tables.values()):
        parts.append(
            results.picture(
                "kinds", "share of each head's weight that fits a kind, by layer and head", plots.head_map, tables,
                "share_of_the_weight", layers=names, title="Kinds of heads",
            )
        )  # fmt: skip
    return parts


def _similarity(
    results: Results, options: HeadsOptions, report: HeadReport, clusters: Sequence[Clusters]
) -> list[Text | Table | Picture]:
    chosen = evenly(len(report.layers), options.drawn)
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
        "(CHAI, arXiv:2403.08058): distance of heads from the mean of their cluster, divided by that of one cluster. "
        "All causal heads agree on the first token, so a small number of clusters says less than it seems to."
    ))  # fmt: skip
    parts.append(results.picture(
        "clusters", "error of k clusters divided by that of one, by layer", plots.pruning_curves, curves,
        unit="clusters of heads", loss="error / error of one cluster", title="Heads with similar patterns",
    ))  # fmt: skip
    return parts


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spaced, including the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _with_progress(batches: Sequence[Tensor], what: str) -> Iterable[Tensor]:
    bar: Iterable[Tensor] = tqdm(batches, unit="batch", desc=what, delay=2, leave=False, disable=None)
    return bar


def _of_length(options: HeadsOptions) -> str:
    return "" if options.text.suffix in SUFFIXES else f" in sequences of {options.length}"


def _kind_name(kind: str) -> str:
    return kind.removesuffix("_head").replace("_", " ") + " heads"


def _has_pairs(table: Tensor) -> bool:
    off = ~torch.eye(table.shape[0], dtype=torch.bool)
    return table.shape[0] > 1 and bool(table[off].isfinite().any())


if __name__ == "__main__":
    main()
