"""What survives kill -9, a folder on another disk and a bad batch: counts, not times.

    python benchmarks/reliability.py                                   everything; about seven minutes
    python benchmarks/reliability.py --only save resume --runs 4       a part of it
    python benchmarks/reliability.py --out benchmarks/results/reliability.jsonl

Suites: "save" kills a process that saves checkpoints without pause, 20 times with TMPDIR beside the checkpoints and
20 times with TMPDIR on another file system. "resume" runs attnzoo-pretrain whole, and again with kill -9 at a random
moment of a random step and a resumption from the newest valid checkpoint; weights, optimiser state and losses must be
equal bit for bit. "nan" gives a run one batch without a finite loss, and another run nothing else.

In each row `ratio` is the share of attempts that went well, `error` that of those that did not, and `ms` the mean
time of an attempt. The exit status is 1 if one did not go well.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timing import append_lines, environment

from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint, verify

Row = dict[str, Any]
PACKAGES = ("attnzoo", "lightning")
MECHANISMS = ("mha", "mqa", "gqa", "gta", "kha")
STEPS, EVERY = 40, 8
MOMENTS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start")
WEIGHTS = 500_000  # 2 MB: a save takes long enough to be hit


# what the child processes run


class KillAt(L.Callback):
    """Ends its own process with kill -9 in a hook of a step; a validation counts for the next step that has one."""

    def __init__(self, step: int, moment: str) -> None:
        self.step = step

        def kill(trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step >= self.step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, kill)


class SpoilLoss(L.Callback):
    """Makes the logits of these steps NaN, as a broken batch or kernel would."""

    def __init__(self, first: int, last: int) -> None:
        self.steps = range(first, last + 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def spoil(module: torch.nn.Module, _: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits * math.nan if module.training and trainer.global_step in self.steps else logits

        pl_module.model.register_forward_hook(spoil)


def save_for_ever(path: Path) -> None:
    """Save checkpoint 1, 2, 3, ... under one name, saying when the first is there."""
    plugin = AtomicCheckpointIO()
    for step in itertools.count(1):
        plugin.save_checkpoint({"global_step": step, "weights": torch.full((WEIGHTS,), float(step))}, path)
        if step == 1:
            print("saved", flush=True)


# suites


def save_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Kill -9 at random moments of a loop of saves."""
    shared = Path("/dev/shm")
    places = {"TMPDIR on the same file system": folder}
    if shared.is_dir() and shared.stat().st_dev != folder.stat().st_dev:
        places["TMPDIR on another file system"] = shared
    for case, temporary in places.items():
        path = folder / case.replace(" ", "-") / "last.ckpt"
        draw, good, times, leftovers = random.Random(case), 0, [], 0
        for _ in range(runs):
            start = time.perf_counter()
            child = subprocess.Popen(
                [sys.executable, __file__, "--save-for-ever", str(path)],
                env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            with child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(draw.uniform(0, 0.1))
                child.kill()
            good += child.returncode == -signal.SIGKILL and is_whole(path)
            leftovers += any(".tmp-" in file.name for file in path.parent.iterdir())
            times.append(time.perf_counter() - start)
        yield row("save", case, "kill -9", times, good, bytes=4 * WEIGHTS, killed_in_a_write=leftovers)


def is_whole(path: Path) -> bool:
    """Whether the checkpoint is valid and of one save."""
    if verify(path) is not None:
        return False
    checkpoint = read_checkpoint(path)
    return bool((checkpoint["weights"] == checkpoint["global_step"]).all())


def resume_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Runs that are killed at a random step and resumed, against one that was not."""
    draw = random.Random(0)
    whole: dict[str, Path] = {}
    outcomes: dict[str, list[tuple[bool, float, dict[str, Any]]]] = {}
    for attempt in range(runs):
        name = MECHANISMS[attempt % len(MECHANISMS)]
        if name not in whole:
            whole[name] = folder / f"{name}-whole"
            pretrain(name, whole[name])
        run = folder / f"{name}-killed-{attempt}"
        step, moment = draw.randrange(EVERY + 1, STEPS), draw.choice(MOMENTS)
        if moment == "on_validation_start":
            step = min(step, STEPS - EVERY)
        start = time.perf_counter()
        code = pretrain(name, run, *callback(KillAt, step=step, moment=moment))
        newest = newest_valid(run)
        assert newest is not None, f"{run} has no valid checkpoint"
        resumed_from = read_checkpoint(newest)["global_step"]
        resumed = pretrain(name, run, "--ckpt_path", str(newest))
        seconds = time.perf_counter() - start
        equal = code == -signal.SIGKILL and resumed == 0 and is_same_run(whole[name], run, resumed_from)
        what = {"killed_at": step, "moment": moment, "resumed_from": resumed_from, "equal": equal}
        outcomes.setdefault(name, []).append((equal, seconds, what))
        print(f"  {name}: {what}", flush=True)
    for name, results in outcomes.items():
        times = [seconds for _, seconds, _ in results]
        good = sum(equal for equal, _, _ in results)
        yield row("resume", name, "kill -9, resume", times, good, steps=STEPS, kills=[what for *_, what in results])


def nan_suite(runs: int, folder: Path) -> Iterator[Row]:
    """One bad batch is skipped and nothing else; ten in a row end the run with exit code 3 and finite weights."""
    for case, last, expected in (("one NaN batch", 10, 0), ("NaN batches without end", STEPS, 3)):
        times, good = [], 0
        for attempt in range(max(1, runs // 10)):
            run = folder / f"nan-{expected}-{attempt}"
            start = time.perf_counter()
            code = pretrain("gqa", run, *callback(SpoilLoss, first=10, last=last))
            times.append(time.perf_counter() - start)
            reports = sorted(run.rglob("nonfinite-step=*.json"))
            newest = newest_valid(run)
            finite = newest is not None and all(
                bool(torch.as_tensor(weight).isfinite().all())
                for weight in read_checkpoint(newest)["state_dict"].values()
            )
            wanted = 1 if expected == 0 else 10
            good += code == expected and finite and len(reports) == wanted
        yield row("nan", case, "train", times, good, exit_code=expected, reports=wanted)


SUITES = {"save": (save_suite, 20), "resume": (resume_suite, 10), "nan": (nan_suite, 10)}


# a run of the recipe


def callback(kind: type[L.Callback], **arguments: Any) -> list[str]:
    """Command line words that add one of this file's callbacks."""
    description = {"class_path": f"reliability.{kind.__name__}", "init_args": arguments}
    return ["--allow-import", "reliability", "--trainer.callbacks", json.dumps([description])]


def pretrain(name: str, folder: Path, *words: str) -> int:
    """attnzoo-pretrain fit with the smoke settings and dropout; returns the exit code, -9 for a killed one."""
    configs = [
        word for config in ("pretrain.yaml", "smoke.yaml", f"attention/{name}.yaml") for word in ("--config", config)
    ]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from attnzoo_recipes.pretrain import main; main(sys.argv[1:])"
    done = subprocess.run(
        [
            sys.executable, "-c", code, "fit", *configs,
            "--trainer.default_root_dir", str(folder), "--data.cache_dir", str(folder.parent / "data"),
            "--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(EVERY),
            "--checkpoints.every_n_train_steps", str(EVERY), "--model.dropout", "0.1",
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *words,
        ],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 3, -signal.SIGKILL):
        sys.stderr.write(done.stderr)
    return done.returncode


def is_same_run(whole: Path, resumed: Path, step: int) -> bool:
    """Whether weights, optimiser and every loss from this step on are equal, bit for bit."""
    ends = [newest_valid(folder) for folder in (whole, resumed)]
    if None in ends:
        return False
    left, right = (read_checkpoint(end) for end in ends if end is not None)
    if left["global_step"] != STEPS or right["global_step"] != STEPS:
        return False
    expected = losses(sorted(whole.rglob("metrics.csv"))[-1], step)
    found = losses(sorted(resumed.rglob("metrics.csv"))[-1], step)
    same_losses = expected == found and len(expected) == STEPS - step
    return same_losses and all(is_equal(left[key], right[key]) for key in ("state_dict", "optimizer_states"))


def losses(path: Path, step: int) -> dict[int, str]:
    """Training loss of each logged step from this one on, as it is written."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            int(line["step"]): line["train_loss"]
            for line in csv.DictReader(file)
            if line["train_loss"] and int(line["step"]) >= step
        }


def is_equal(left: Any, right: Any) -> bool:
    """Bitwise equality of nested plain values and tensors."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and left.keys() == right.keys() and all(is_equal(left[k], right[k]) for k in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_equal, left, right))
    return bool(left == right)


# results


def row(suite: str, case: str, phase: str, seconds: Sequence[float], good: int, **shape: Any) -> Row:
    """A result line; `good` of the attempts went well."""
    attempts = len(seconds)
    mean = statistics.fmean(seconds)
    return {
        "suite": suite, "case": case, "phase": phase, "shape": {"attempts": attempts, "good": good, **shape},
        "ms": round(1e3 * mean, 1), "ratio": good / attempts, "noise": max(seconds) / mean,
        "error": 1 - good / attempts,
        **environment(PACKAGES),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--runs", type=int, help="attempts of each suite (default: 20 kills, 10 resumptions)")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    parser.add_argument("--save-for-ever", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.save_for_ever is not None:
        save_for_ever(arguments.save_for_ever)
    if arguments.runs is not None and arguments.runs < 1:
        parser.error(f"--runs must be at least 1, got {arguments.runs}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="attnzoo-reliability-") as folder:
        for name in arguments.only:
            suite, runs = SUITES[name]
            for result in suite(arguments.runs or runs, Path(folder)):
                rows.append(result)
                shape = result["shape"]
                print(f"{name:8} {result['case']:32} {shape['good']} of {shape['attempts']}", flush=True)
    if arguments.out is not None:
        append_lines(arguments.out, rows)
    return 0 if all(result["error"] == 0 for result in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
