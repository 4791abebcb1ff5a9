"""attnzoo-prune: which heads a model can do without, how its loss grows without them, and what that gains in speed."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

import attnzoo
from attnzoo.diagnostics import plots
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning.curves import ABLATIONS, MODES, HeadAblation
from attnzoo.diagnostics.pruning.importance import GRANULARITIES, UNITS
from attnzoo.diagnostics.pruning.masks import check_choice
from attnzoo.diagnostics.pruning.paired_tests import ablation_tests
from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.diagnose.heads import on_device
from attnzoo_recipes.diagnose.html import Picture, Section, Table, Text
from attnzoo_recipes.diagnose.load_model import LoadedModel, describe, load_model
from attnzoo_recipes.diagnose.prune_study import Study, drawn, study, task_of
from attnzoo_recipes.diagnose.results import Results, numbers, text_table, words

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
class Choices:
    """What the command line asks for."""

    model: str
    name: str | None
    data: Path
    out: Path
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
    device: str
    allowed: tuple[str, ...]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    try:
        prune(parse(list(sys.argv[1:] if args is None else args)))
    except (ValueError, ArgumentError, OSError) as error:
        sys.stderr.write(f"attnzoo-prune: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


def parse(arguments: Sequence[str]) -> Choices:
    """Choices from a command line."""
    parser = ArgumentParser(
        prog="attnzoo-prune",
        description="Rank a model's heads by importance, measure its loss while heads are removed in that order and in "
        "others, and the speed of the model without them: prune.json, prune.csv, pictures and report.html. Data are a "
        'text for language models, and lines {"query": "...", "document": "..."} for encoders, which then retrieve '
        "the document of each query.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder or .ckpt of attnzoo-pretrain, or a local Hugging Face folder")
    add("--data", metavar="FILE", required=True, help="UTF-8 text, or lines of pairs")
    add("--out", metavar="DIR", help="folder of the results (default runs/prune/NAME)")
    add("--name", help="of the model, in titles and folders (default: that of its file or folder)")
    add("--percents", default="10,20,30,40,50,60,70,80,90", help="of heads to remove (default 10,20,...,90)")
    add("--modes", default="greedy", help="greedy, iterative or both: importance once, or anew before each point")
    add("--normalize", default="l2,none", help="some of l2, minmax, none, a curve each (default l2,none)")
    add("--granularity", default="example", help="of importance: example, token or batch (default example)")
    add("--unit", default="head", help="head or kv_group (default head)")
    add(
        "--ablate", default="none", help="some of one, all_but_one, kv_group, layer; a run for each head (default none)"
    )
    add("--min_heads_per_layer", type=int, default=0, help="so many of the best of each layer stay (default 0)")
    add("--rescale", type=bool, default=False, help="whether a layer's remaining heads make up for the removed ones")
    add("--seeds", default="0,1", help="of the random orders (default 0,1)")
    add("--speed", default="0,25,50,75", help="percents of heads removed for the timing, or none (default 0,25,50,75)")
    add("--rounds", type=int, default=5, help="of the timing, which keeps the fastest (default 5)")
    add("--decoded", type=int, default=32, help="tokens of the timing of decoding; 0 leaves it out (default 32)")
    add("--examples", type=int, help="how many; the file must hold so many (default: 32 sequences at most, all pairs)")
    add("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    add("--batch_size", type=int, help="examples at once (default 4 sequences, 64 pairs)")
    add("--device", default="cpu", help="where the model runs (default cpu)")
    add(
        "--allow_import", type=str, default="", metavar="PREFIX,...",
        help=f"packages that a checkpoint may name beside {', '.join(ALLOWED)}; importing runs their code",
    )  # fmt: skip
    found = parser.parse_args(list(arguments))
    return _checked(found)


def _checked(found: Any) -> Choices:
    for name, allowed in (("modes", MODES), ("normalize", NORMALIZATIONS), ("ablate", ABLATIONS)):
        chosen = (
            (found.normalize,) if name == "normalize" and found.normalize == "none" else words(getattr(found, name))
        )
        unknown = [word for word in chosen if word not in allowed]
        if unknown or not (chosen or name == "ablate"):
            raise ValueError(f"{name} must be some of {', '.join(allowed)}, got {getattr(found, name)!r}")
        setattr(found, name, chosen)
    check_choice("granularity", found.granularity, GRANULARITIES)
    check_choice("unit", found.unit, UNITS)
    percents, speed, seeds = (numbers(name, getattr(found, name)) for name in ("percents", "speed", "seeds"))
    for name, values in (("percents", percents), ("speed", speed)):
        if list(values) != sorted(set(values)) or any(not 0 <= value <= 100 for value in values):
            raise ValueError(f"{name} must ascend between 0 and 100, got {getattr(found, name)}")
    if not percents:
        raise ValueError("percents must hold at least one number, got none")
    if any(not seed.is_integer() for seed in seeds):
        raise ValueError(f"seeds must be whole numbers, got {found.seeds}")
    if found.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {found.rounds}")
    if found.min_heads_per_layer < 0:
        raise ValueError(f"min_heads_per_layer must not be negative, got {found.min_heads_per_layer}")
    path = Path(found.model)
    return Choices(
        model=found.model, name=found.name, data=Path(found.data),
        out=Path(found.out) if found.out else Path("runs") / "prune" / (found.name or path.stem or path.resolve().name),
        percents=percents, modes=found.modes, normalize=found.normalize, granularity=found.granularity, unit=found.unit,
        ablate=found.ablate, min_heads_per_layer=found.min_heads_per_layer, rescale=found.rescale,
        seeds=tuple(int(seed) for seed in seeds), speed=speed, rounds=found.rounds, decoded=found.decoded,
        examples=found.examples, length=found.length,
        batch_size=found.batch_size, device=found.device, allowed=(*ALLOWED, *words(found.allow_import)),
    )  # fmt: skip


def prune(choices: Choices) -> None:
    """Load, measure, print and write."""
    results = Results(choices.out)
    device = on_device(choices.device)
    loaded = load_model(choices.model, allowed=choices.allowed, device=device)
    loaded = dataclasses.replace(loaded, name=choices.name or loaded.name)
    attention_layers(loaded.model)
    task = task_of(
        loaded, choices.data, length=choices.length, examples=choices.examples, batch_size=choices.batch_size,
        decoded=choices.decoded, device=device,
    )  # fmt: skip
    found = study(
        loaded.model, task, percents=choices.percents, modes=choices.modes, normalize=choices.normalize,
        granularity=choices.granularity, unit=choices.unit, min_heads_per_layer=choices.min_heads_per_layer,
        rescale=choices.rescale, seeds=choices.seeds, ablate=choices.ablate, speed=choices.speed,
        rounds=choices.rounds,
    )  # fmt: skip
    write_files(results, choices, loaded, found)
    write_report(results, choices, loaded, found)
    results.write()
    rows = curve_rows(found)
    said = [verdict(found), text_table(rows, {name: name for name in rows[0]}, 4)]
    said += [f"{ablation_verdict(ablation)}\n" for ablation in found.ablations.values()]
    said.append(text_table(speed_rows(found), _SPEED) if found.speed else f"no speed: {found.obstacle}\n")
    sys.stdout.write("\n".join(said) + f"written to {choices.out}: report.html, prune.json, prune.csv and pictures\n")


def verdict(found: Study) -> str:
    """The loss of the whole model and at the point of the first curve that is nearest to half of the heads."""
    curve = found.first
    whole, name = curve.base_loss, next(iter(found.curves))
    at = min(range(len(curve.counts)), key=lambda i: abs(curve.counts[i] - curve.total / 2))
    units = "heads" if curve.unit == "head" else "key/value groups"
    text = f"{curve.total} {units}, {found.task.examples} examples, {found.task.loss} {whole:.4f}; without the "
    text += f"{curve.counts[at]} least important ones ({name}) {float(curve.losses[at]):.4f}"
    chance = [float(own.losses[at]) for key, own in curve.baselines.items() if key.startswith("random")]
    if chance:
        text += f", without as many at random {statistics.fmean(chance):.4f}"
    return text


def ablation_verdict(ablation: HeadAblation) -> str:
    """How many removals lower the loss, and how many change it beyond chance."""
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


def curve_rows(found: Study) -> list[dict[str, Any]]:
    """One row a number of removed heads, one column a curve."""
    counts = sorted({point.removed for own in found.points.values() for point in own})
    return [
        {
            "removed": count,
            **{name: next((p.loss for p in own if p.removed == count), None) for name, own in found.points.items()},
        }
        for count in counts
    ]


def speed_rows(found: Study) -> list[dict[str, Any]]:
    """One row a call and share of heads."""
    return [
        {
            "call": name, "removed": speed.removed[i], "masked_ms": speed.masked_ms[i],
            "structural_ms": speed.structural_ms[i], "speedup": speed.speedup[i],
            "tokens_per_second": speed.tokens_per_second[i], "parameters": speed.parameters[i], "error": speed.error[i],
        }
        for name, speed in found.speed.items() for i in range(len(speed.fractions))
    ]  # fmt: skip


def write_files(results: Results, choices: Choices, loaded: LoadedModel, found: Study) -> None:
    """prune.json and prune.csv."""
    settings = {
        key: value for key, value in dataclasses.asdict(choices).items() if key not in ("model", "name", "out", "data")
    }
    results.json("prune.json", {
        "facts": describe(loaded) | {
            "data": str(choices.data), "examples": found.task.examples, "loss": found.task.loss,
            "score": found.task.score, "attnzoo": attnzoo.__version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "settings": settings,
        "curves": {name: curve.to_dict() for name, curve in found.curves.items()},
        "ablations": {
            mode: {
                "layers": list(ablation.layers), "losses": ablation.losses.tolist(), "delta": ablation.delta.tolist(),
                "scores": None if ablation.scores is None else ablation.scores.tolist(),
            }
            for mode, ablation in found.ablations.items()
        },
        "speed": {name: dataclasses.asdict(speed) for name, speed in found.speed.items()},
        "no_speed": found.obstacle,
    })  # fmt: skip
    results.csv("prune.csv", [
        {"curve": name, "removed": point.removed, "loss": point.loss, "score": point.score}
        for name, own in found.points.items() for point in own
    ])  # fmt: skip


def write_report(results: Results, choices: Choices, loaded: LoadedModel, found: Study) -> None:
    """Pictures and report.html."""
    curve, facts = found.first, describe(loaded)
    names = [layer.name for layer in attention_layers(loaded.model)]
    unit = "heads removed" if curve.unit == "head" else "key/value groups removed"
    introduction = (
        f"{facts['class']} with {facts['parameters']:,} parameters from {facts['model']}, on {choices.data}. "
        f"{verdict(found)}. Importance and losses are of the same examples."
    )
    heads = sum(layer.num_heads for layer in attention_layers(loaded.model))
    speed = {
        name: ([count * curve.total / heads for count in one.removed], list(one.speedup))
        for name, one in found.speed.items()
    }
    curves: list[Text | Table | Picture] = [
        results.picture(
            "curves", "loss over removed heads, in several orders, and the speed without them", plots.pruning_curves,
            drawn(found.points, "loss"), speed or None, unit=unit, loss=found.task.loss, title=f"Pruning {loaded.name}",
        )
    ]  # fmt: skip
    if found.task.score is not None:
        curves.append(results.picture(
            "scores", f"{found.task.score}, over removed heads", plots.pruning_curves, drawn(found.points, "score"),
            unit=unit, loss=found.task.score, title=f"Pruning {loaded.name}",
        ))  # fmt: skip
    rows = curve_rows(found)
    curves += [Table(rows), Text(_remark(choices))]
    sections = [Section("Loss while heads are removed", curves)]
    importance: list[Text | Table | Picture] = []
    for how in choices.normalize:
        table = next(own.importance for name, own in found.curves.items() if name.endswith(f", {how}"))
        assert table is not None
        importance.append(_map(results, f"importance-{how}", _IMPORTANCE[how], table, names))
    sections.append(Section("Importance", importance))
    for mode, ablation in found.ablations.items():
        rows_of = [names[layer] for layer in ablation.layers]
        sections.append(Section(f"Ablation: {mode}", [
            Text(f"{ablation_verdict(ablation)[0].upper()}{ablation_verdict(ablation)[1:]}."),
            _map(results, f"ablation-{mode}", "added loss", ablation.delta, rows_of, center=0.0),
        ]))  # fmt: skip
    timing: list[Text | Table | Picture] = [Text(f"No speed: {found.obstacle}.")]
    if found.speed:
        timing = [
            Table(speed_rows(found), _SPEED),
            Text(
                "Heads are removed in the order of the first curve, and for comparison masked. Fastest of "
                f"{choices.rounds} rounds with {torch.get_num_threads()} thread(s); difference: of the outputs of the "
                "pruned and the masked model, relative to the largest."
            ),
        ]
    sections.append(Section("Speed", timing))
    results.report(f"Pruning heads of {loaded.name}", sections, introduction)


def _map(
    results: Results, name: str, metric: str, table: Tensor, layers: Sequence[str], center: float | None = None
) -> Picture:
    """Heads by layer; one column of key/value groups or of layers is drawn alike."""
    shown = table.clone()
    if not bool(shown.isfinite().any()):
        shown = torch.full_like(shown, math.nan).nan_to_num(0.0)
    return results.picture(
        name, f"{metric}, by layer and head", plots.head_map, shown, metric, center=center, layers=list(layers),
        title=metric.capitalize(),
    )  # fmt: skip


def _remark(choices: Choices) -> str:
    text = "Curves are named by how importance is measured and normalised within a layer; reverse: the most important "
    text += f"ones first; random: mean and range of {len(choices.seeds)} orders."
    if choices.min_heads_per_layer:
        text += f" The best {choices.min_heads_per_layer} of each layer stay."
    return text


if __name__ == "__main__":
    main()
