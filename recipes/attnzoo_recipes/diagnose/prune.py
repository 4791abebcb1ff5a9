"""attnzoo-prune: which heads a model can do without, its loss without them, and how much faster it is then."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.diagnostics import plots
from attnzoo.diagnostics.arguments import check_choice
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning.ablation import ABLATIONS, HeadAblation
from attnzoo.diagnostics.pruning.curves import MODES
from attnzoo.diagnostics.pruning.importance import GRANULARITIES
from attnzoo.diagnostics.pruning.masks import UNITS
from attnzoo.diagnostics.pruning.paired_tests import ablation_tests
from attnzoo_recipes.diagnose.glossary import PRUNE
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model
from attnzoo_recipes.diagnose.options import Options, comma_separated, comma_separated_numbers, options_of, parser_of
from attnzoo_recipes.diagnose.prune_study import Study, drawn, study, task_of
from attnzoo_recipes.diagnose.results import Results, finite_mean, text_table
from attnzoo_recipes.diagnose.tensors import SUFFIXES
from attnzoo_recipes.options import command_line, device_named, mistakes_in_one_sentence, take_allowed_imports

NORMALIZATIONS = ("l2", "minmax", "none")
_IMPORTANCE = {
    "l2": "importance / norm of its layer's",
    "minmax": "importance, from 0 to 1",
    "none": "importance, not normalised",
}
_SIGNIFICANT = 0.01
_SPEED = {
    "call": "", "removed": "heads removed", "masked_ms": "masked (ms)", "structural_ms": "removed (ms)",
    "speedup": "times as fast", "tokens_per_second": "tokens/s", "parameters": "parameters", "error": "difference",
}  # fmt: skip


@dataclass(frozen=True)
class PruneOptions(Options):
    """What the command line asks for."""

    data: Path
    percents: tuple[float, ...]
    modes: tuple[str, ...]
    normalize: tuple[str, ...]
    granularity: str
    unit: str
    ablate: tuple[str, ...]
    min_heads_per_layer: int
    rescale: bool
    seeds: tuple[int, ...]
    speed: tuple[float, ...]
    rounds: int
    decoded: int
    examples: int | None
    length: int
    batch_size: int | None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-prune"):
        prune(parse(command_line(args)))


def parse(words: Sequence[str]) -> PruneOptions:
    """Options from a command line."""
    given = list(words)
    words, allowed = take_allowed_imports(given)
    parser = parser_of(
        "prune",
        "Rank a model's heads by importance, measure its loss while heads are removed in that order and in others, and "
        "the speed of the model without them: prune.json, prune.csv, pictures and report.html. The data are a text for "
        'language models, lines {"query": "...", "document": "..."} for encoders, which then retrieve the document of '
        "each query, and for any model tensors by the names of its arguments, with labels.",
        "a run folder or .ckpt of attnzoo-pretrain, or a local Hugging Face folder",
    )
    add = parser.add_argument
    add(
        "--data", metavar="FILE", required=True, help="UTF-8 text, lines of pairs, or tensors (.safetensors, .npz, .pt)"
    )
    add(
        "--percents",
        default="10,20,30,40,50,60,70,80,90",
        help="percents of heads to remove, one point of the curves each",
    )
    add(
        "--modes", default="greedy",
        help="some of greedy, iterative: importance is measured once, or again before each point",
    )  # fmt: skip
    add(
        "--normalize",
        default="l2,none",
        help="how importance is normalised within a layer: some of l2, minmax, none; a curve for each",
    )
    add("--granularity", default="example", help="what importance is averaged over: example, token or batch")
    add("--unit", default="head", help="what is removed: head or kv_group")
    add(
        "--ablate", default="none",
        help="ablations: some of one, all_but_one, kv_group, layer; one evaluation for each head, or none",
    )  # fmt: skip
    add("--min-heads-per-layer", type=int, default=0, help="number of best heads of each layer to keep")
    add("--rescale", type=bool, default=False, help="whether a layer's remaining heads are scaled to make up for the "
        "removed ones")  # fmt: skip
    add("--seeds", default="0,1", help="seeds of the random orders")
    add("--speed", default="0,25,50,75", help="percents of heads removed for the timing, or none")
    add("--rounds", type=int, default=5, help="rounds of the timing, of which the fastest counts")
    add("--decoded", type=int, default=32, help="tokens in the timing of decoding; 0 omits it")
    add("--examples", type=int, help="number of examples, which the file must hold (default: up to 32 sequences, all "
        "pairs and tensors)")  # fmt: skip
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--batch-size", type=int, help="examples processed together (default 4 sequences, 64 pairs, 16 tensors)")
    return _checked(given, parser.parse_args(words), allowed)


def _checked(given: list[str], parsed: Any, allowed: tuple[str, ...]) -> PruneOptions:
    for name, choices in (("modes", MODES), ("normalize", NORMALIZATIONS), ("ablate", ABLATIONS)):
        text = getattr(parsed, name)
        # "none" alone is a way to normalise; elsewhere it is an empty list.
        chosen = ("none",) if name == "normalize" and text == "none" else comma_separated(text)
        unknown = [word for word in chosen if word not in choices]
        if unknown or not (chosen or name == "ablate"):
            raise ValueError(f"{name} must be some of {', '.join(choices)}, got {text!r}")
        setattr(parsed, name, chosen)
    check_choice("granularity", parsed.granularity, GRANULARITIES)
    check_choice("unit", parsed.unit, UNITS)
    percents, speed, seeds = (
        comma_separated_numbers(name, getattr(parsed, name)) for name in ("percents", "speed", "seeds")
    )
    for name, values in (("percents", percents), ("speed", speed)):
        if list(values) != sorted(set(values)) or any(not 0 <= value <= 100 for value in values):
            raise ValueError(f"{name} must ascend between 0 and 100, got {getattr(parsed, name)}")
    if not percents:
        raise ValueError("percents must hold at least one number, got none")
    if any(not (seed.is_integer() and 0 <= seed < 2**63) for seed in seeds):
        raise ValueError(f"seeds must be whole numbers in [0, 2^63), got {parsed.seeds}")
    if parsed.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {parsed.rounds}")
    if parsed.min_heads_per_layer < 0:
        raise ValueError(f"min_heads_per_layer must not be negative, got {parsed.min_heads_per_layer}")
    return options_of(
        PruneOptions, "prune", given, parsed, allowed, data=Path(parsed.data), percents=percents, speed=speed,
        seeds=tuple(dict.fromkeys(map(int, seeds))),
    )  # fmt: skip


def prune(options: PruneOptions) -> None:
    """Load, measure, print and write."""
    results = Results(options.out, options.command, options.formats)
    device = device_named(options.device)
    loaded = load_model(
        options.model, name=options.name, allowed=options.allowed, device=device,
        whole=options.data.suffix in SUFFIXES,
    )  # fmt: skip
    attention_layers(loaded.model)
    task = task_of(
        loaded, options.data, length=options.length, examples=options.examples, batch_size=options.batch_size,
        decoded=options.decoded, device=device,
    )  # fmt: skip
    result = study(
        loaded.model, task, percents=options.percents, modes=options.modes, normalize=options.normalize,
        granularity=options.granularity, unit=options.unit, min_heads_per_layer=options.min_heads_per_layer,
        rescale=options.rescale, seeds=options.seeds, ablate=options.ablate, speed=options.speed,
        rounds=options.rounds,
    )  # fmt: skip
    write_files(results, options, loaded, result)
    write_report(results, options, loaded, result)
    results.write()
    rows = curve_rows(result)
    parts = [verdict(result), text_table(rows, {name: name for name in rows[0]}, 4)]
    parts += [f"{ablation_verdict(ablation)}\n" for ablation in result.ablations.values()]
    parts.append(text_table(speed_rows(result), _SPEED) if result.speed else f"no speed: {result.obstacle}\n")
    sys.stdout.write("\n".join(parts))
    sys.stdout.write(f"written to {options.out}: report.html, prune.json, prune.csv and pictures\n")


def verdict(result: Study) -> str:
    """The loss of the whole model, and without about half of the heads according to the first curve."""
    curve = result.first
    whole, name = curve.base_loss, next(iter(result.curves))
    at = min(range(len(curve.counts)), key=lambda i: abs(curve.counts[i] - curve.total / 2))
    units = "heads" if curve.unit == "head" else "key/value groups"
    text = f"{curve.total} {units}, {result.task.examples} examples, {result.task.loss} {whole:.4f}, of "
    text += f"equally likely answers {result.task.chance:.4f}; without the "
    text += f"{curve.counts[at]} least important ones ({name}) {float(curve.losses[at]):.4f}"
    chance = [float(own.losses[at]) for key, own in curve.baselines.items() if key.startswith("random")]
    if chance:
        text += f", without as many at random {statistics.fmean(chance):.4f}"
    return text


def ablation_verdict(ablation: HeadAblation) -> str:
    """How many removals lower the loss, and how many change it significantly."""
    delta = ablation.delta[ablation.delta.isfinite()]
    what = {
        "one": "heads alone", "all_but_one": "other heads of a layer", "kv_group": "key/value groups alone",
        "layer": "layers' heads",
    }[ablation.mode]  # fmt: skip
    text = f"without {what}: {int((delta < 0).sum())} of {delta.numel()} removals lower the loss, the worst adds "
    text += f"{float(delta.max()):.4f}"
    if ablation.base_examples.numel() > 1:
        tests = ablation_tests(ablation, threshold=_SIGNIFICANT)
        text += f"; {int(tests.significant.sum())} change it with p < {_SIGNIFICANT} in a paired t-test, of which "
        text += f"chance alone would give {tests.expected_false_alarms:.1f}"
    return text


def curve_rows(result: Study) -> list[dict[str, Any]]:
    """One row per number of removed heads, one column per curve."""
    counts = sorted({point.removed for own in result.points.values() for point in own})
    return [
        {
            "removed": count,
            **{name: next((p.loss for p in own if p.removed == count), None) for name, own in result.points.items()},
        }
        for count in counts
    ]


def speed_rows(result: Study) -> list[dict[str, Any]]:
    """One row per call and share of removed heads."""
    return [
        {
            "call": name, "removed": speed.removed[i], "masked_ms": speed.masked_ms[i],
            "structural_ms": speed.structural_ms[i], "speedup": speed.speedup[i],
            "tokens_per_second": finite_mean([speed.tokens_per_second[i]]), "parameters": speed.parameters[i],
            "error": speed.error[i],
        }
        for name, speed in result.speed.items() for i in range(len(speed.fractions))
    ]  # fmt: skip


def write_files(results: Results, options: PruneOptions, loaded: LoadedModel, result: Study) -> None:
    """prune.json and prune.csv."""
    results.json("prune.json", {
        "facts": describe(loaded) | {
            "data": str(options.data), "examples": result.task.examples, "loss": result.task.loss,
            "score": result.task.score, "chance": result.task.chance, "threads": torch.get_num_threads(),
        },
        "settings": options.settings("data"),
        "curves": {name: curve.to_dict() for name, curve in result.curves.items()},
        "ablations": {
            mode: {
                "layers": list(ablation.layers), "losses": ablation.losses.tolist(), "delta": ablation.delta.tolist(),
                "scores": None if ablation.scores is None else ablation.scores.tolist(),
            }
            for mode, ablation in result.ablations.items()
        },
        "speed": {name: dataclasses.asdict(speed) for name, speed in result.speed.items()},
        "no_speed": result.obstacle,
    })  # fmt: skip
    results.csv("prune.csv", [
        {"curve": name, "removed": point.removed, "loss": point.loss, "score": point.score}
        for name, own in result.points.items() for point in own
    ])  # fmt: skip


def write_report(results: Results, options: PruneOptions, loaded: LoadedModel, result: Study) -> None:
    """Pictures and report.html."""
    curve, facts = result.first, describe(loaded)
    names = [layer.name for layer in attention_layers(loaded.model)]
    unit = "heads removed" if curve.unit == "head" else "key/value groups removed"
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}, on {options.data}. "
        f"{verdict(result)}. Importance and losses are measured on the same examples."
    )
    heads = sum(layer.num_heads for layer in attention_layers(loaded.model))
    speed = {
        name: ([count * curve.total / heads for count in one.removed], list(one.speedup))
        for name, one in result.speed.items()
    }
    curves: list[Text | Table | Picture] = [
        results.picture(
            "curves", "loss over removed heads, in several orders, and the speed without them", plots.pruning_curves,
            drawn(result.points, "loss"), speed or None, unit=unit, loss=result.task.loss,
            title=f"Pruning {loaded.name}",
        )
    ]  # fmt: skip
    if result.task.score is not None:
        curves.append(results.picture(
            "scores", f"{result.task.score}, over removed heads", plots.pruning_curves, drawn(result.points, "score"),
            unit=unit, loss=result.task.score, title=f"Pruning {loaded.name}",
        ))  # fmt: skip
    rows = curve_rows(result)
    curves += [Table(rows), Text(_remark(options))]
    sections = [Section("Loss while heads are removed", curves)]
    importance: list[Text | Table | Picture] = []
    for how in options.normalize:
        table = next(own.importance for name, own in result.curves.items() if name.endswith(f", {how}"))
        assert table is not None
        importance += _map(results, f"importance-{how}", _IMPORTANCE[how], table, names)
    sections.append(Section("Importance", importance))
    for mode, ablation in result.ablations.items():
        rows_of = [names[layer] for layer in ablation.layers]
        sections.append(Section(f"Ablation: {mode}", [
            Text(f"{ablation_verdict(ablation)[0].upper()}{ablation_verdict(ablation)[1:]}."),
            *_map(results, f"ablation-{mode}", "added loss", ablation.delta, rows_of, center=0.0),
        ]))  # fmt: skip
    timing: list[Text | Table | Picture] = [Text(f"No speed: {result.obstacle}.")]
    if result.speed:
        timing = [
            Table(speed_rows(result), _SPEED),
            Text(
                "Heads are removed in the order of the first curve, and masked for comparison. Fastest of "
                f"{options.rounds} rounds with {torch.get_num_threads()} thread(s); difference: between the outputs of "
                "the pruned and the masked model, relative to the largest."
            ),
        ]
    sections.append(Section("Speed", timing))
    results.report(f"Pruning heads of {loaded.name}", sections, introduction, PRUNE)


def _map(
    results: Results, name: str, metric: str, table: Tensor, layers: Sequence[str], center: float | None = None
) -> list[Picture | Text]:
    """A picture of a figure by layer and head, or by layer and key/value group, or with one column for layers."""
    if not bool(table.isfinite().any()):
        return [Text(f"No map of the {metric}, which is not finite for any head.")]
    return [results.picture(
        name, f"{metric}, by layer and head", plots.head_map, table, metric, center=center, layers=list(layers),
        title=metric.capitalize(),
    )]  # fmt: skip


def _remark(options: PruneOptions) -> str:
    text = "Curves are named after how importance is measured and normalised within a layer; reverse: the most "
    text += f"important heads first; random: mean and range of {len(options.seeds)} orders."
    if options.min_heads_per_layer:
        text += f" The best {options.min_heads_per_layer} heads of each layer are kept."
    return text


if __name__ == "__main__":
    main()
