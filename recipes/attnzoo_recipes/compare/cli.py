"""attnzoo-compare: train every mechanism in the same model on the same data, and set them side by side."""

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
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

import attnzoo
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.compare.plan import EQUAL, MATCHES, Plan, Settings, attention_of, cell_key, plan
from attnzoo_recipes.compare.table import as_csv, draw_losses, draw_quality, markdown, summarise
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import model_from_checkpoint
from attnzoo_recipes.pretrain import config_path

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 192, 32, 5
_DIVERGED = 3
_STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    words = list(sys.argv[1:] if args is None else args)
    words, passed_on = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    try:
        compare(parse(words), passed_on)
    except (ValueError, ArgumentError, OSError) as error:
        sys.stderr.write(f"attnzoo-compare: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("attnzoo-compare: stopped; the same command goes on where it was\n")
        raise SystemExit(130) from None


def parse(words: Sequence[str]) -> Settings:
    """Settings from a command line."""
    parser = ArgumentParser(
        prog="attnzoo-compare",
        description="Train mechanisms in the same model, data order and schedule, and write a table and two plots. "
        "What follows -- goes to every attnzoo-pretrain run, such as -- --trainer.max_steps 100.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file with these options, such as configs/compare.yaml"
    )
    parser.add_argument("--mechanisms", type=list[str] | str, help="names of files in configs/attention: a,b,...")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each mechanism (default 1)")
    parser.add_argument("--match", default="params", help=f"held equal to the first mechanism: {', '.join(MATCHES)}")
    parser.add_argument("--out", default="runs/compare", help="folder of the results (default runs/compare)")
    parser.add_argument("--train", type=dict[str, Any], default={}, help="laid over configs/pretrain.yaml")
    named = [config_path(word) if i and words[i - 1] == "--config" else word for i, word in enumerate(words)]
    found = parser.parse_args(named)
    if found.mechanisms is None:
        raise ValueError("mechanisms must be given, in --mechanisms or by --config configs/compare.yaml")
    return Settings.checked(found.mechanisms, found.seeds, found.match, found.out, found.train)


def compare(settings: Settings, passed_on: list[str]) -> None:
    """Run what is not finished yet, then write table.md, table.csv, learning_curves.png and quality_vs_cache.png."""
    configs = {name: Path(config_path(f"attention/{name}.yaml")) for name in settings.mechanisms}
    settings.out.mkdir(parents=True, exist_ok=True)
    overlay = settings.out / "train.yaml"
    overlay.write_text(yaml.safe_dump(dict(settings.train), sort_keys=False))
    common = resolved(overlay, configs[settings.mechanisms[0]], passed_on)
    data = TextDataModule(**common["data"])
    corpus = data.packed.meta["splits"]["val"]
    model = common["model"]
    plans = plan(
        {name: attention_of(path) for name, path in configs.items()}, model, data.tokenizer.vocab_size,
        common["data"]["block_size"], settings.match,
    )  # fmt: skip
    steps = int(common["trainer"]["max_steps"])
    sys.stdout.write(f"held equal: {EQUAL[settings.match]}\n")
    wanted = [(chosen, seed) for seed in range(settings.seeds) for chosen in plans]
    cells = []
    with tqdm(total=steps * len(wanted), unit="step", desc="compare", smoothing=0.05) as bar:
        for i, (chosen, seed) in enumerate(wanted):
            bar.set_description(f"{chosen.mechanism}, seed {seed} ({i + 1} of {len(wanted)})")
            cells.append(cell(chosen, seed, settings, passed_on, overlay, configs[chosen.mechanism], bar.update, steps))
            bar.n = (i + 1) * steps
            bar.refresh()
    cells.sort(key=lambda c: settings.mechanisms.index(c["mechanism"]))
    facts = {
        "match": settings.match,
        "steps": steps,
        "batch_tokens": common["data"]["batch_size"] * common["data"]["block_size"],
        "tokens": common["data"]["block_size"],
        "unigram": corpus["unigram_bits_per_byte"],
        "bigram": corpus["bigram_bits_per_byte"],
        "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "machine": f"{os.cpu_count()}-core CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "versions": {"attnzoo": attnzoo.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = summarise(cells, speeds(cells, common["data"]["batch_size"], common["data"]["block_size"]))
    text = markdown(rows, facts)
    write(settings.out / "table.md", text)
    write(settings.out / "table.csv", as_csv(rows))
    write(settings.out / "results.json", json.dumps({"facts": facts, "rows": rows, "cells": cells}, indent=1))
    draw_losses(cells, facts, settings.out / "learning_curves.png")
    draw_quality(rows, settings.out / "quality_vs_cache.png")
    sys.stdout.write(f"\n{text}\nwritten to {settings.out}: table.md, table.csv, results.json, learning_curves.png, ")
    sys.stdout.write("quality_vs_cache.png\n")


def resolved(overlay: Path, mechanism: Path, passed_on: list[str]) -> Mapping[str, Any]:
    """The whole configuration that attnzoo-pretrain makes of these files and words."""
    command = [*pretrain_command(overlay, mechanism), *passed_on, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["attnzoo-pretrain refused the configuration"]
        raise ValueError(lines[-1].removeprefix("attnzoo-pretrain: error: "))
    return yaml.safe_load(done.stdout)


def pretrain_command(overlay: Path, mechanism: Path) -> list[str]:
    """How a cell is trained, in a process of its own."""
    configs = (config_path("pretrain.yaml"), str(overlay), str(mechanism))
    run = [sys.executable, "-m", "attnzoo_recipes.pretrain", "fit"]
    return [*run, *(word for path in configs for word in ("--config", path))]


def cell(
    chosen: Plan,
    seed: int,
    settings: Settings,
    passed_on: list[str],
    overlay: Path,
    config: Path,
    advance: Callable[[float], Any],
    steps: int,
) -> dict[str, Any]:
    """The result of one run; of an earlier call, if that finished with the same settings.

    A run that was interrupted goes on from its newest checkpoint.
    """
    key = cell_key(chosen, seed, settings, passed_on)
    folder = settings.out / "cells" / f"{chosen.mechanism}-{seed}-{key}"
    result, runs = folder / "result.json", folder / "run"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *pretrain_command(overlay, config), *passed_on, f"--seed_everything={seed}", f"--data.seed={seed}",
        f"--model.mlp_dim={chosen.mlp_dim}", f"--trainer.default_root_dir={runs}",
    ]  # fmt: skip
    with contextlib.suppress(ValueError, OSError):
        if runs.is_dir() and (saved := newest_valid(runs)) is not None:
            command.append(f"--ckpt_path={saved}")
    base = {
        "mechanism": chosen.mechanism, "seed": seed, "mlp_dim": chosen.mlp_dim,
        "parameters": chosen.parameters, "flops_per_token": chosen.flops_per_token,
        "cache_bytes_per_token": chosen.cache_bytes_per_token,
    }  # fmt: skip
    code, said = watched(command, folder / "log.txt", advance, steps)
    if code in _STOPPED:
        raise KeyboardInterrupt
    if code == 0:
        outcome = measured(runs)
    else:
        status = "diverged" if code == _DIVERGED else "failed"
        outcome = {"status": status, "detail": said.removeprefix("attnzoo-pretrain: ")}
    write(result, json.dumps(base | outcome, indent=1))
    return base | outcome


def watched(command: list[str], log: Path, advance: Callable[[float], Any], steps: int) -> tuple[int, str]:
    """Run a training, moving the progress bar by what its log says; exit code and the last line of its errors."""
    shown = 0
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                found = re.findall(rb"training:.*?(\d+)/\d+ \[", log.read_bytes()[-2000:])
                at = min(int(found[-1]), steps) if found else 0
                if at > shown:
                    advance(at - shown)
                    shown = at
        except KeyboardInterrupt:
            # The terminal has interrupted the training too: it saves a checkpoint and ends.
            process.wait()
            raise
    lines = [line for line in re.split(r"[\r\n]", log.read_text(errors="replace")) if line.strip()]
    return process.returncode, lines[-1].strip() if lines else ""


def measured(runs: Path) -> dict[str, Any]:
    """Validation and speed from the metrics of a finished run; the curve of a resumed run lies in several files."""
    rows: list[dict[str, str]] = []
    for path in sorted(runs.glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    curve = {int(r["step"]) + 1: float(r["val_bits_per_byte"]) for r in rows if r.get("val_bits_per_byte")}
    checkpoint = newest_valid(runs)
    if not curve or checkpoint is None:
        return {"status": "failed", "detail": "the run left no validation or no checkpoint"}
    last = curve[max(curve)]
    if last != last:
        return {"status": "diverged", "detail": f"validation is not a number after step {max(curve)}"}
    return {
        "status": "finished", "detail": "", "val_bits_per_byte": last, "curve": sorted(curve.items()),
        "checkpoint": str(checkpoint),
    }  # fmt: skip


def speeds(cells: Sequence[Mapping[str, Any]], batch: int, tokens: int) -> dict[str, tuple[float, float]]:
    """Trained and decoded tokens/s of every mechanism, each the best of rounds interleaved in this process.

    Training is forward and backward of a batch (batch, tokens), without the optimiser; decoding is at batch 1.
    """
    models: dict[str, DecoderLM] = {}
    for found in cells:
        if found["status"] == "finished" and found["mechanism"] not in models:
            models[found["mechanism"]] = model_from_checkpoint(read_checkpoint(found["checkpoint"]))
    best = dict.fromkeys(models, (0.0, 0.0))
    for _ in range(ROUNDS):
        for name, model in models.items():
            train, decode = best[name]
            train = max(train, batch * tokens / training_seconds(model, batch, tokens))
            best[name] = train, max(decode, DECODE_TOKENS / decoding_seconds(model))
    return best


def training_seconds(model: DecoderLM, batch: int, tokens: int) -> float:
    """One forward and backward."""
    model.train()
    ids = torch.arange(batch * tokens).view(batch, tokens) * 7919 % model.vocab_size
    start = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    extra = attnzoo.aux_loss(model)
    (loss if extra is None else loss + extra).backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds


@torch.inference_mode()
def decoding_seconds(model: DecoderLM) -> float:
    """DECODE_TOKENS steps after a prompt of PROMPT_TOKENS."""
    caches = model.init_caches(1, PROMPT_TOKENS + DECODE_TOKENS)
    model(torch.arange(PROMPT_TOKENS)[None] % model.vocab_size, caches=caches)
    token = torch.zeros(1, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = model(token, caches=caches)[:, -1:].argmax(-1)
    return time.perf_counter() - start


def write(path: Path, text: str) -> None:
    """Write a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
