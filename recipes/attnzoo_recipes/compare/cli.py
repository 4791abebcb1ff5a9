"""attnzoo-compare: train mechanisms in the same model on the same data, and compare them in a table."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import torch
import yaml
from jsonargparse import ArgumentParser
from tqdm import tqdm

import attnzoo
from attnzoo_recipes.allowlist import check_arguments
from attnzoo_recipes.callbacks import record
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.commandline import (
    check_end,
    check_trainer,
    config_path,
    configurations,
    default_precision,
    find_configs,
)
from attnzoo_recipes.compare.pictures import draw_losses, draw_quality
from attnzoo_recipes.compare.plan import (
    MATCHES,
    OWN,
    VARIED,
    Data,
    Plan,
    Settings,
    Variant,
    attention_of,
    disagreements,
    feed_forward_of,
    held_equal,
    plan,
    run_key,
)
from attnzoo_recipes.compare.table import markdown, summarise
from attnzoo_recipes.data.module import MAIN, TextDataModule
from attnzoo_recipes.files import Unbreakable, locked, write_atomically
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.losses import linear_cross_entropy
from attnzoo_recipes.model_config import model_from_checkpoint
from attnzoo_recipes.options import (
    Help,
    add_allow_import,
    add_format,
    command_line,
    device_named,
    formats_named,
    join_allowed,
    mistakes_in_one_sentence,
    take_allowed_imports,
)
from attnzoo_recipes.signals import EXIT_CODES
from attnzoo_recipes.tables import as_csv
from attnzoo_recipes.training import check_finite

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 192, 32, 5
FIGURES = ("parameters", "mlp_dim", "flops_per_token", "cache_bytes_per_token")
CONTINUES = "the same command continues where it was"
_DIVERGED = 3
_STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    words = command_line(args)
    words, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    with mistakes_in_one_sentence("attnzoo-compare", CONTINUES), long_running("attnzoo-compare"):
        settings, device, formats = parse(words)
        line = shlex.join(["attnzoo-compare", *words, *(["--", *passed_on] if passed_on else [])])
        compare(settings, passed_on, device, formats, line)


@contextlib.contextmanager
def long_running(name: str) -> Iterator[None]:
    """What takes hours continues where the reader of its output leaves; SIGTERM stops it as Ctrl-C does, with 143."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.stderr.write(f"{name}: stopped by SIGTERM; {CONTINUES}\n")
        raise SystemExit(EXIT_CODES[number])

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        with contextlib.redirect_stdout(cast(TextIO, Unbreakable(sys.stdout))):
            yield
    finally:
        if is_main:
            # A handler that was not installed from Python cannot be put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def parse(words: Sequence[str]) -> tuple[Settings, str | None, tuple[str, ...]]:
    """Settings from a command line, the device for speeds if one is named, and the formats of pictures."""
    words, allowed = take_allowed_imports(words)
    parser = ArgumentParser(
        prog="attnzoo-compare",
        description="Train mechanisms in the same model, data order and schedule, and write a table and two plots. "
        "Arguments after -- are those of every attnzoo-pretrain run, such as -- --trainer.max_steps 100.",
        exit_on_error=False,
        formatter_class=Help,
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file with these options, such as configs/compare.yaml"
    )
    parser.add_argument(
        "--mechanisms",
        type=list[str] | str,
        help="names of files in configs/attention (or configs/feed_forward, see --vary), or paths of YAML files like "
        "these: mha,path/to/mine.yaml,...",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of runs of each mechanism")
    parser.add_argument(
        "--match", type=str | None, help=f"what is held equal to the first mechanism: {', '.join(MATCHES)}"
    )
    parser.add_argument(
        "--vary",
        default="attention",
        help=f"what differs: {', '.join(VARIED)}, or the path of a setting, such as model.embed_dim, with --values",
    )
    parser.add_argument("--values", type=list[str] | str | None, help="values of that setting: 128,192,256")
    parser.add_argument(
        "--lrs",
        type=list[float] | str | None,
        help="learning rates that every mechanism is trained with, 1e-3,3e-3: the table has a common one, and the best "
        "of each mechanism beside it",
    )
    parser.add_argument("--device", type=str | None, help="where speeds are measured (default: where the runs train)")
    parser.add_argument("--out", default="runs/compare", help="folder of the results")
    parser.add_argument(
        "--cells", type=str | None, help="folder of single runs, which comparisons may share (default: OUT/cells)"
    )
    parser.add_argument("--train", type=dict[str, Any], default={}, help="settings over those of configs/pretrain.yaml")
    add_format(parser)
    add_allow_import(parser)
    words = find_configs(words)
    check_arguments(words, allowed)
    parsed = parser.parse_args(words)
    if parsed.allow_import is not None:
        raise ValueError("allow_import must be given on the command line, not in a config")
    if parsed.mechanisms is None:
        raise ValueError("mechanisms must be given, in --mechanisms or by --config configs/compare.yaml")
    settings = Settings.checked(
        parsed.mechanisms, parsed.seeds, parsed.match, parsed.out, parsed.train, allowed, parsed.vary, parsed["values"],
        parsed.lrs, parsed.cells,
    )  # fmt: skip
    return settings, parsed.device, formats_named(parsed.format)


@dataclass(frozen=True)
class Trained:
    """The runs of a comparison.

    Attributes:
        plans: of every variant.
        runs: results (`finished_run`), by variant and then by seed.
        equal: what is held equal, in words.
        training: steps and tokens of a run, in words.
        entropies: of the validation text.
        accelerator: of the runs.
        precision: of the runs.
        rate: the learning rate of the first variant.
    """

    plans: list[Plan]
    runs: list[dict[str, Any]]
    equal: str
    training: str
    entropies: Mapping[str, Any]
    accelerator: str
    precision: str
    rate: float


def train(settings: Settings, passed_on: Sequence[str]) -> Trained:
    """Plan all runs, and train those that are not finished yet."""
    for word in passed_on:
        if word.startswith("--") and word[2:].split("=")[0] in OWN:
            raise ValueError(f"{word.split('=')[0]} must not be given after --: attnzoo-compare sets it for each run")
    configs = {name: Path(config_path(file)) for name, file in settings.configs.items()}
    for path in configs.values():
        (feed_forward_of if settings.vary == "feed_forward" else attention_of)(path, settings.allowed)
    overlay = settings.out / "train.yaml"
    write_atomically(overlay, yaml.safe_dump(dict(settings.train), sort_keys=False))
    words = {each: pretrain_words(overlay, configs[each.mechanism], each, settings, passed_on)
             for each in settings.variants}  # fmt: skip
    given = configurations(list(words.values()), settings.allowed)
    for each in given:
        check_finite(each)
        check_trainer(each["trainer"])
        check_end(each["trainer"])
    texts = prepared([each["data"] for each in given])
    plans = plan(
        list(zip(settings.variants, given, strict=True)), [data for data, _ in texts], settings.match, settings.allowed
    )
    accelerator = given[0]["trainer"]["accelerator"]
    equal = held_equal(plans, settings.match, settings.vary)
    sys.stdout.write(f"held equal: {equal}\n")
    wanted = [(chosen, seed) for seed in range(settings.seeds) for chosen in plans]
    runs = []
    done = 0
    with tqdm(total=sum(chosen.steps for chosen, _ in wanted), unit="step", desc="compare", smoothing=0.05) as bar:
        for i, (chosen, seed) in enumerate(wanted):
            name = chosen.variant.name
            bar.set_description(f"{name}, seed {seed} ({i + 1} of {len(wanted)})")
            folder = settings.runs_folder / f"{_as_folder(name)}-{seed}-{run_key(chosen, seed)}"
            with locked(folder.with_name(f"{folder.name}.lock")):
                runs.append(finished_run(chosen, seed, command(words[chosen.variant], settings), folder, bar.update))
            done += chosen.steps
            bar.n = done
            bar.refresh()
    order = [chosen.variant.name for chosen in plans]
    runs.sort(key=lambda run: order.index(run["mechanism"]))
    return Trained(
        plans, runs, equal, training_in_words(plans), texts[0][1], accelerator,
        given[0]["trainer"]["precision"] or default_precision(accelerator), given[0]["model"]["lr"],
    )  # fmt: skip


def compare(
    settings: Settings,
    passed_on: list[str],
    device_name: str | None = None,
    formats: Sequence[str] = ("png",),
    line: str = "",
) -> None:
    """Train what is not finished yet, then write table.md, table.csv, results.json and two pictures.

    Args:
        settings: of the comparison.
        passed_on: arguments of every run.
        device_name: where speeds are measured. Default: where the runs train.
        formats: of learning_curves and quality_vs_cache: png, pdf, svg.
        line: the command line, for the table.
    """
    named = None if device_name is None else device_named(device_name)
    trained = train(settings, passed_on)
    plans, runs, precision = trained.plans, trained.runs, trained.precision
    device = named or device_named(default_device(trained.accelerator))
    rate = settings.rates[0] if settings.rates else None
    facts = {
        "match": settings.match,
        "vary": settings.vary,
        "equal": trained.equal,
        "training": trained.training,
        "rate": rate,
        "rates": ", ".join(f"{each:g}" for each in settings.rates),
        "unigram": trained.entropies.get("unigram_bits_per_byte"),
        "bigram": trained.entropies.get("bigram_bits_per_byte"),
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "machine": machine(device, precision),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": line,
    }
    shown = [run for run in runs if run["rate"] == rate]
    measured_speeds = speeds(shown, plans, device, precision, settings.allowed)
    rows = summarise(runs, measured_speeds, rate)
    text = markdown(rows, facts)
    write_atomically(settings.out / "table.md", text)
    write_atomically(settings.out / "table.csv", as_csv(rows))
    results = json.dumps({"facts": facts, "rows": rows, "cells": runs}, indent=1)
    write_atomically(settings.out / "results.json", results)
    for kind in formats:
        draw_losses(runs, facts, settings.out / f"learning_curves.{kind}")
        draw_quality(rows, settings.out / f"quality_vs_cache.{kind}")
    names = [f"{name}.{kind}" for kind in formats for name in ("learning_curves", "quality_vs_cache")]
    sys.stdout.write(f"\n{text}\nwritten to {settings.out}: table.md, table.csv, results.json, {', '.join(names)}\n")
    if not any(run["status"] in ("finished", "diverged") for run in runs):
        raise ValueError(f"no run finished: {rows[0]['note']}; their logs are in {settings.runs_folder}")


def versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    return {"attnzoo": attnzoo.__version__, "torch": torch.__version__, "python": platform.python_version()}


def pretrain_words(
    overlay: Path, mechanism: Path, variant: Variant, settings: Settings, passed_on: Sequence[str]
) -> list[str]:
    """The arguments of attnzoo-pretrain for a variant; feed-forward layers with mha, or what follows."""
    attention = [config_path("attention/mha.yaml")] if settings.vary == "feed_forward" else []
    configs = (config_path("pretrain.yaml"), *attention, str(overlay), str(mechanism))
    return ["fit", *(word for path in configs for word in ("--config", path)), *passed_on, *variant.words]


def command(words: Sequence[str], settings: Settings) -> list[str]:
    """The command that trains with these arguments, in a process of its own."""
    run, *rest = words
    return [sys.executable, "-m", "attnzoo_recipes.pretrain", run, *join_allowed(settings.allowed), *rest]


def prepared(sections: Sequence[Mapping[str, Any]]) -> list[tuple[Data, Mapping[str, Any]]]:
    """The text of each section `data` of settings, with what is known about its validation part."""
    known: dict[str, tuple[Data, Mapping[str, Any]]] = {}
    found = []
    for section in sections:
        key = json.dumps(section, sort_keys=True, default=str)
        if key not in known:
            module = TextDataModule(**section)
            packed, split = module.validation[MAIN]
            facts = Data(module.key, f"{packed.key}/{split}", module.tokenizer.vocab_size)
            known[key] = facts, packed.meta["splits"][split]
        found.append(known[key])
    return found


def training_in_words(plans: Sequence[Plan]) -> str:
    """Steps and tokens of a run, where they are the same for all."""
    steps, sizes = {chosen.steps for chosen in plans}, {chosen.sample for chosen in plans}
    if len(steps) > 1 or len(sizes) > 1:
        return "with the steps and sizes that vary"
    samples, tokens = sizes.pop()
    return f"{steps.pop():,} steps of {samples * tokens:,} tokens"


def default_device(accelerator: str) -> str:
    """Where a run with this accelerator trains."""
    return "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def machine(device: torch.device, precision: str) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)} with precision {precision}"
    return f"a {os.cpu_count()}-core CPU with precision {precision}"


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w=.+-]", "_", name)


def finished_run(
    chosen: Plan, seed: int, command: Sequence[str], folder: Path, advance: Callable[[float], Any]
) -> dict[str, Any]:
    """The result of a run, or that of an earlier call if it is in the folder already.

    A run that was interrupted, or that has failed, continues from its newest checkpoint. A run whose own record is not
    what was planned has status "differs".

    Args:
        chosen: what the run is to be.
        seed: of the weights and of the order of the data.
        command: attnzoo-pretrain with its configs.
        folder: of this run, named after everything that it depends on.
        advance: is called with the number of further steps.
    """
    result, versions = folder / "result.json", folder / "run"
    base = {
        "mechanism": chosen.variant.name, "rate": chosen.variant.rate, "seed": seed,
        **{name: chosen.expected[name] for name in FIGURES},
    }  # fmt: skip
    if result.is_file():
        outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return base | checked(chosen, outcome)
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        *command, f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={versions}",
        "--progress=lines", *([] if chosen.mlp_dim is None else [f"--model.mlp_dim={chosen.mlp_dim}"]),
    ]  # fmt: skip
    with contextlib.suppress(ValueError, OSError):
        # From the last step's own checkpoint a run would end at once, without its validation and its record.
        if versions.is_dir() and (saved := newest_valid(versions, before=chosen.steps)) is not None:
            words.append(f"--ckpt_path={saved}")
    code, last_line = watched(words, folder / "log.txt", advance, chosen.steps)
    if code in _STOPPED:
        raise KeyboardInterrupt
    if code == 0:
        outcome = measured(versions)
    else:
        status = "diverged" if code == _DIVERGED else "failed"
        outcome = {"status": status, "detail": last_line.removeprefix("attnzoo-pretrain: ")}
    if code in (0, _DIVERGED):  # what else ends a run, such as a full disk, may be gone the next time
        write_atomically(result, json.dumps(outcome, indent=1))
    return base | checked(chosen, outcome)


def checked(chosen: Plan, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome of a run, without figures if its record is not what was planned."""
    found = disagreements(chosen.expected, outcome.get("record") or {}) if outcome["status"] == "finished" else []
    return {"status": "differs", "detail": f"the run had {'; '.join(found)}"} if found else dict(outcome)


def watched(command: list[str], log: Path, advance: Callable[[float], Any], steps: int) -> tuple[int, str]:
    """Train, moving the progress bar according to the log; returns the exit code and the last line of the log."""
    shown = 0
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                counts = re.findall(rb"^step (\d+)/", log.read_bytes()[-2000:], re.MULTILINE)
                at = min(int(counts[-1]), steps) if counts else 0
                if at > shown:
                    advance(at - shown)
                    shown = at
        except BaseException:
            # It saves a checkpoint and ends. Where a terminal has interrupted it already, this is the same signal.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    lines = [line for line in re.split(r"[\r\n]", log.read_text(errors="replace")) if line.strip()]
    return process.returncode, lines[-1].strip() if lines else ""


def measured(versions: Path) -> dict[str, Any]:
    """Validation from the metrics of a finished run; the curve of a resumed run is in several files."""
    rows: list[dict[str, str]] = []
    for path in sorted(versions.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    curve = {int(r["step"]) + 1: float(r["val_bits_per_byte"]) for r in rows if r.get("val_bits_per_byte")}
    checkpoint = newest_valid(versions)
    if not curve or checkpoint is None:
        return {"status": "failed", "detail": "the run left no validation or no checkpoint"}
    last = curve[max(curve)]
    if last != last:
        return {"status": "diverged", "detail": f"validation is not a number after step {max(curve)}"}
    records = sorted(versions.glob(f"version_*/{record.FILE}"), key=lambda p: int(p.parent.name.split("_")[1]))
    if not records:
        return {"status": "failed", "detail": "the run left no record of itself"}
    return {
        "status": "finished", "detail": "", "val_bits_per_byte": last, "curve": sorted(curve.items()),
        "checkpoint": str(checkpoint), "record": json.loads(records[-1].read_text()),
    }  # fmt: skip


def speeds(
    runs: Sequence[Mapping[str, Any]],
    plans: Sequence[Plan],
    device: torch.device,
    precision: str,
    allowed: Sequence[str],
) -> dict[str, tuple[float, float]]:
    """Tokens/s of every mechanism in training and in decoding, on a device: the best of several rounds.

    In each round all mechanisms take turns. Training is forward and backward of a batch, without the optimiser;
    decoding has batch size 1.
    """
    models: dict[str, DecoderLM] = {}
    for run in runs:
        if run["status"] == "finished" and run["mechanism"] not in models:
            path = run["checkpoint"]
            model = model_from_checkpoint(read_checkpoint(path), allowed, f"checkpoint {path}")
            models[run["mechanism"]] = model.to(device)
    data = {chosen.variant.name: chosen.settings["data"] for chosen in plans}
    best = dict.fromkeys(models, (0.0, 0.0))
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    for _ in range(ROUNDS):
        for name, model in models.items():
            batch, tokens = data[name]["batch_size"], data[name]["block_size"]
            train, decode = best[name]
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                train = max(train, batch * tokens / training_seconds(model, batch, tokens, device))
                best[name] = train, max(decode, DECODE_TOKENS / decoding_seconds(model, device))
    return best


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def training_seconds(model: DecoderLM, batch: int, tokens: int, device: torch.device) -> float:
    """Time of one forward and backward pass."""
    model.train()
    ids = (torch.arange(batch * tokens).view(batch, tokens) * 7919 % model.vocab_size).to(device)
    start = clock(device)
    hidden, targets = model.hidden(ids).flatten(0, 1), ids.roll(-1, 1).flatten()
    loss = linear_cross_entropy(hidden, model.output_weight, targets)
    extra = attnzoo.aux_loss(model)
    torch.autograd.backward(loss if extra is None else loss + extra)
    seconds = clock(device) - start
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds


@torch.inference_mode()
def decoding_seconds(model: DecoderLM, device: torch.device) -> float:
    """Time of DECODE_TOKENS steps after a prompt of PROMPT_TOKENS."""
    caches = model.init_caches(1, PROMPT_TOKENS + DECODE_TOKENS)
    model((torch.arange(PROMPT_TOKENS)[None] % model.vocab_size).to(device), caches=caches)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    start = clock(device)
    for _ in range(DECODE_TOKENS):
        token = model(token, caches=caches)[:, -1:].argmax(-1)
    return clock(device) - start


if __name__ == "__main__":
    main()
