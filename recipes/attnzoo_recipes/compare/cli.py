"""attnzoo-compare: train mechanisms in the same model on the same data, and compare them in a table."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from tqdm import tqdm

import attnzoo
from attnzoo_recipes.allowlist import check_arguments
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.commandline import config_path, find_configs
from attnzoo_recipes.compare.plan import (
    EQUAL,
    MATCHES,
    VARIED,
    Plan,
    Settings,
    attention_of,
    feed_forward_of,
    plan,
    plan_feed_forwards,
    run_key,
)
from attnzoo_recipes.compare.table import draw_losses, draw_quality, markdown, summarise
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.files import write_atomically
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import model_from_checkpoint
from attnzoo_recipes.options import (
    add_allow_import,
    command_line,
    join_allowed,
    mistakes_in_one_sentence,
    take_allowed_imports,
)
from attnzoo_recipes.tables import as_csv

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 192, 32, 5
_DIVERGED = 3
_STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    words = command_line(args)
    words, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    try:
        with mistakes_in_one_sentence("attnzoo-compare"):
            compare(parse(words), passed_on)
    except KeyboardInterrupt:
        sys.stderr.write("attnzoo-compare: stopped; the same command continues where it was\n")
        raise SystemExit(130) from None


def parse(words: Sequence[str]) -> Settings:
    """Settings from a command line."""
    words, allowed = take_allowed_imports(words)
    parser = ArgumentParser(
        prog="attnzoo-compare",
        description="Train mechanisms in the same model, data order and schedule, and write a table and two plots. "
        "Arguments after -- are those of every attnzoo-pretrain run, such as -- --trainer.max_steps 100.",
        exit_on_error=False,
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
    parser.add_argument("--match", type=str | None, help=f"held equal to the first mechanism: {', '.join(MATCHES)}")
    parser.add_argument("--vary", default="attention", help=f"what a mechanism is: {' or '.join(VARIED)}")
    parser.add_argument("--out", default="runs/compare", help="folder of the results")
    parser.add_argument("--train", type=dict[str, Any], default={}, help="settings over those of configs/pretrain.yaml")
    add_allow_import(parser)
    words = find_configs(words)
    check_arguments(words, allowed)
    parsed = parser.parse_args(words)
    if parsed.allow_import is not None:
        raise ValueError("allow_import must be given on the command line, not in a config")
    if parsed.mechanisms is None:
        raise ValueError("mechanisms must be given, in --mechanisms or by --config configs/compare.yaml")
    return Settings.checked(
        parsed.mechanisms, parsed.seeds, parsed.match, parsed.out, parsed.train, allowed, parsed.vary
    )


def compare(settings: Settings, passed_on: list[str]) -> None:
    """Train what is not finished yet, then write table.md, table.csv, learning_curves.png and quality_vs_cache.png."""
    configs = {name: Path(config_path(file)) for name, file in settings.configs.items()}
    read = attention_of if settings.vary == "attention" else feed_forward_of
    described = {name: read(path, settings.allowed) for name, path in configs.items()}
    overlay = settings.out / "train.yaml"
    write_atomically(overlay, yaml.safe_dump(dict(settings.train), sort_keys=False))
    common = resolved([*pretrain_command(overlay, configs[settings.mechanisms[0]], settings), *passed_on])
    data = TextDataModule(**common["data"])
    corpus = data.packed.meta["splits"]["val"]
    model = common["model"]
    vocab_size, tokens = data.tokenizer.vocab_size, common["data"]["block_size"]
    if settings.vary == "attention":
        plans = plan(described, model, vocab_size, tokens, settings.match, settings.allowed)
    else:
        plans = plan_feed_forwards(described, model, vocab_size, tokens, settings.allowed)
    steps = int(common["trainer"]["max_steps"])
    sys.stdout.write(f"held equal: {EQUAL[settings.equal]}\n")
    wanted = [(chosen, seed) for seed in range(settings.seeds) for chosen in plans]
    runs = []
    with tqdm(total=steps * len(wanted), unit="step", desc="compare", smoothing=0.05) as bar:
        for i, (chosen, seed) in enumerate(wanted):
            bar.set_description(f"{chosen.mechanism}, seed {seed} ({i + 1} of {len(wanted)})")
            command = [*pretrain_command(overlay, configs[chosen.mechanism], settings), *passed_on]
            key = run_key(chosen, seed, settings, passed_on)
            folder = settings.out / "cells" / f"{chosen.mechanism}-{seed}-{key}"
            runs.append(finished_run(chosen, seed, command, folder, bar.update, steps))
            bar.n = (i + 1) * steps
            bar.refresh()
    runs.sort(key=lambda run: settings.mechanisms.index(run["mechanism"]))
    facts = {
        "match": settings.equal,
        "steps": steps,
        "batch_tokens": common["data"]["batch_size"] * common["data"]["block_size"],
        "tokens": common["data"]["block_size"],
        "unigram": corpus["unigram_bits_per_byte"],
        "bigram": corpus["bigram_bits_per_byte"],
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "machine": f"{os.cpu_count()}-core CPU",
        "versions": {"attnzoo": attnzoo.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = summarise(runs, speeds(runs, common["data"]["batch_size"], common["data"]["block_size"], settings.allowed))
    text = markdown(rows, facts)
    write_atomically(settings.out / "table.md", text)
    write_atomically(settings.out / "table.csv", as_csv(rows))
    results = json.dumps({"facts": facts, "rows": rows, "cells": runs}, indent=1)
    write_atomically(settings.out / "results.json", results)
    draw_losses(runs, facts, settings.out / "learning_curves.png")
    draw_quality(rows, settings.out / "quality_vs_cache.png")
    sys.stdout.write(f"\n{text}\nwritten to {settings.out}: table.md, table.csv, results.json, learning_curves.png, ")
    sys.stdout.write("quality_vs_cache.png\n")
    if not any(run["status"] in ("finished", "diverged") for run in runs):
        raise ValueError(f"no run finished: {rows[0]['note']}; their logs are in {settings.out / 'cells'}")


def resolved(command: list[str]) -> Mapping[str, Any]:
    """The complete configuration that a command of attnzoo-pretrain would use."""
    done = subprocess.run([*command, "--print_config"], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["attnzoo-pretrain refused the configuration"]
        raise ValueError(lines[-1].removeprefix("attnzoo-pretrain: error: "))
    configuration: Mapping[str, Any] = yaml.safe_load(done.stdout)
    return configuration


def pretrain_command(overlay: Path, mechanism: Path, settings: Settings) -> list[str]:
    """The command that trains a mechanism, in a process of its own; feed-forward layers with mha, or what follows."""
    attention = [] if settings.vary == "attention" else [config_path("attention/mha.yaml")]
    configs = (config_path("pretrain.yaml"), *attention, str(overlay), str(mechanism))
    run = [sys.executable, "-m", "attnzoo_recipes.pretrain", "fit", *join_allowed(settings.allowed)]
    return [*run, *(word for path in configs for word in ("--config", path))]


def finished_run(
    chosen: Plan, seed: int, command: Sequence[str], folder: Path, advance: Callable[[float], Any], steps: int
) -> dict[str, Any]:
    """The result of a run, or that of an earlier call if it is in the folder already.

    A run that was interrupted continues from its newest checkpoint.

    Args:
        chosen: the mechanism in the common model.
        seed: of the weights and of the order of the data.
        command: attnzoo-pretrain with its configs.
        folder: of this run, named after everything that it depends on.
        advance: is called with the number of further steps.
        steps: of the whole run.
    """
    result, versions = folder / "result.json", folder / "run"
    if result.is_file():
        earlier: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return earlier
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        *command, f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={versions}",
        *([] if chosen.mlp_dim is None else [f"--model.mlp_dim={chosen.mlp_dim}"]),
    ]  # fmt: skip
    with contextlib.suppress(ValueError, OSError):
        if versions.is_dir() and (saved := newest_valid(versions)) is not None:
            words.append(f"--ckpt_path={saved}")
    base = {
        "mechanism": chosen.mechanism, "seed": seed, "mlp_dim": chosen.mlp_dim,
        "parameters": chosen.parameters, "flops_per_token": chosen.flops_per_token,
        "cache_bytes_per_token": chosen.cache_bytes_per_token,
    }  # fmt: skip
    code, last_line = watched(words, folder / "log.txt", advance, steps)
    if code in _STOPPED:
        raise KeyboardInterrupt
    if code == 0:
        outcome = measured(versions)
    else:
        status = "diverged" if code == _DIVERGED else "failed"
        outcome = {"status": status, "detail": last_line.removeprefix("attnzoo-pretrain: ")}
    write_atomically(result, json.dumps(base | outcome, indent=1))
    return base | outcome


def watched(command: list[str], log: Path, advance: Callable[[float], Any], steps: int) -> tuple[int, str]:
    """Train, moving the progress bar according to the log; returns the exit code and the last line of the log."""
    shown = 0
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                counts = re.findall(rb"training:.*?(\d+)/\d+ \[", log.read_bytes()[-2000:])
                at = min(int(counts[-1]), steps) if counts else 0
                if at > shown:
                    advance(at - shown)
                    shown = at
        except KeyboardInterrupt:
            # The terminal has interrupted the training as well: it saves a checkpoint and ends.
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
    return {
        "status": "finished", "detail": "", "val_bits_per_byte": last, "curve": sorted(curve.items()),
        "checkpoint": str(checkpoint),
    }  # fmt: skip


def speeds(
    runs: Sequence[Mapping[str, Any]], batch: int, tokens: int, allowed: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Tokens/s of every mechanism in training and in decoding, on the CPU: the best of several rounds.

    In each round all mechanisms take turns. Training is forward and backward of a batch (batch, tokens), without the
    optimiser; decoding has batch size 1.
    """
    models: dict[str, DecoderLM] = {}
    for run in runs:
        if run["status"] == "finished" and run["mechanism"] not in models:
            path = run["checkpoint"]
            models[run["mechanism"]] = model_from_checkpoint(read_checkpoint(path), allowed, f"checkpoint {path}")
    best = dict.fromkeys(models, (0.0, 0.0))
    for _ in range(ROUNDS):
        for name, model in models.items():
            train, decode = best[name]
            train = max(train, batch * tokens / training_seconds(model, batch, tokens))
            best[name] = train, max(decode, DECODE_TOKENS / decoding_seconds(model))
    return best


def training_seconds(model: DecoderLM, batch: int, tokens: int) -> float:
    """Time of one forward and backward pass."""
    model.train()
    ids = torch.arange(batch * tokens).view(batch, tokens) * 7919 % model.vocab_size
    start = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    extra = attnzoo.aux_loss(model)
    torch.autograd.backward(loss if extra is None else loss + extra)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds


@torch.inference_mode()
def decoding_seconds(model: DecoderLM) -> float:
    """Time of DECODE_TOKENS steps after a prompt of PROMPT_TOKENS."""
    caches = model.init_caches(1, PROMPT_TOKENS + DECODE_TOKENS)
    model(torch.arange(PROMPT_TOKENS)[None] % model.vocab_size, caches=caches)
    token = torch.zeros(1, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = model(token, caches=caches)[:, -1:].argmax(-1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
