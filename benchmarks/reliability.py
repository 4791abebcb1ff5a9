"""What survives kills, signals, full disks, damaged files and bad batches: counts, not times.

    python benchmarks/reliability.py                                   everything; about 35 minutes on 2 cores
    python benchmarks/reliability.py --only save resume --runs 4       a part of it
    python benchmarks/reliability.py --only shards processes           what two processes do together
    python benchmarks/reliability.py --out benchmarks/results/reliability.jsonl

Suites:

save      kill -9 at random moments of a process that saves checkpoints without pause, half of them with TMPDIR on
          another file system
shards    kill -9 at random moments of two processes that save sharded checkpoints without pause, of one of them first
          or of both at once; what is left must be a complete save
tokenise  kill -9 and SIGTERM at random moments of tokenisation, in processes that all believe to have the number 1, as
          in containers; the next run must make the files that an undisturbed one makes, and leave nothing else
disk      runs on a small file system that is full for a random part of them (needs to be allowed to mount a tmpfs);
          they must go on, say which file and how much room there is, and end as an undisturbed run, metrics and samples
          included; and runs on one that stays full, which must end with exit code 4 and a valid older checkpoint
signals   SIGTERM, SIGINT and SIGUSR1 at random moments of the whole process, from when its handlers are there to its
          end (not while the system takes it down); the exit code must be the promised one, and what has been trained
          must be in a valid checkpoint
resume    kill -9 at a random moment of a random step, resumed from the newest valid checkpoint; weights, optimiser
          state and losses must be equal bit for bit, for every mechanism of configs/attention, and for two also when
          compiled
processes the same of one of two processes with sharded parameters (FSDP2); the other one must end with exit code 6
tokens    token files with flipped bits, cut short, extended or missing; the next run must refuse them by name
nan       one batch without a finite loss, and nothing else than such batches
attacks   the tests of tests/recipes/test_attacks.py

Kills, tokenisation, disks, resumptions and bad batches run in processes forked from this one, which has imported
everything; signals in processes of their own, since importing is a part of what they may hit.

In each row `ratio` is the share of attempts that went well, `error` that of those that did not, and `ms` the mean
time of an attempt. The exit status is 1 if one did not go well.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Read when torch is imported. OpenMP's threads do not come along into a forked process, which then waits for them.
os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
import torch.distributed as dist
from timing import ROOT, append_lines, environment
from torch.distributed.tensor import Shard, distribute_tensor

from attnzoo_recipes import pretrain
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint, verify
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.packing import pack
from attnzoo_recipes.sharded_checkpoints import MANIFEST
from attnzoo_recipes.signals import EXIT_CODES, Stop
from attnzoo_recipes.trainer import LOST_PROCESS

Row = dict[str, Any]
PACKAGES = ("attnzoo", "lightning")
MECHANISMS = sorted(path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml"))
RESUMED = [*MECHANISMS, "mha, compiled", "kha, compiled"]
SHARDED = ("mla", "moh")
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
    """Makes what the last norm returns NaN in these steps, as a broken batch or kernel would."""

    def __init__(self, first: int, last: int) -> None:
        self.steps = range(first, last + 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def spoil(module: torch.nn.Module, _: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * math.nan if module.training and trainer.global_step in self.steps else hidden

        pl_module.model.norm.register_forward_hook(spoil)


class FillDisk(L.Callback):
    """Fills the file system of the run from the beginning of one step to that of another."""

    def __init__(self, first: int, last: int, filler: str) -> None:
        self.first, self.last, self.filler = first, last, Path(filler)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            with self.filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if trainer.global_step == self.last:
            self.filler.unlink(missing_ok=True)


def save_for_ever(path: Path) -> None:
    """Save checkpoint 1, 2, 3, ... under one name."""
    plugin = AtomicCheckpointIO()
    for step in itertools.count(1):
        plugin.save_checkpoint({"global_step": step, "weights": torch.full((WEIGHTS,), float(step))}, path)


def save_shards_for_ever(rank: int, store: Path, path: Path) -> None:
    """The same of one of two processes that share the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, plugin = dist.init_device_mesh("cpu", (2,)), AtomicCheckpointIO()
    for step in itertools.count(1):
        weights = distribute_tensor(torch.full((WEIGHTS,), float(step)), mesh, [Shard(0)])
        plugin.save_checkpoint({"global_step": step, "state_dict": {"weights": weights}}, path, sharded=True)


def tokenise(corpus: Path, cache: Path, ready: int | None = None) -> None:
    """Tokenise as a command does, with its handlers, in a process that believes to have the number 1.

    A byte is written to `ready` once the handlers are there.
    """
    own = os.getpid()
    os.getpid = lambda: 1 if sys._getframe(1).f_globals["__name__"] != "attnzoo_recipes.signals" else own
    with Stop(is_process=True):
        if ready is not None:
            os.write(ready, b".")
        pack(Corpus("text", (str(corpus),), unit="line"), "bpe", 400, 0.1, 0.1, cache)


# processes


def start(call: Callable[[], None], log: Path) -> int:
    """Fork a process that makes the call, with its output in a file; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    atexit._clear()  # what this process does at its end, such as removing its folder, is not the child's
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        call()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a forked process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a child process did not do what was waited for")
        time.sleep(0.005)


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

        def save(path: Path = path, temporary: Path = temporary) -> None:
            os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
            save_for_ever(path)

        for _ in range(max(1, runs // len(places))):
            begin = time.perf_counter()
            before = path.stat().st_mtime_ns if path.exists() else 0
            child = start(save, folder / "log.txt")
            wait_until(lambda before=before, path=path: path.exists() and path.stat().st_mtime_ns != before)
            time.sleep(draw.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            good += finish(child) == -signal.SIGKILL and is_whole(path)
            leftovers += any(".tmp-" in file.name for file in path.parent.iterdir())
            times.append(time.perf_counter() - begin)
        yield row("save", case, "kill -9", times, good, bytes=4 * WEIGHTS, killed_in_a_write=leftovers)


def shards_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Kill -9 at random moments of a loop of sharded saves."""
    for case in ("one process first", "both processes"):
        path = folder / case.replace(" ", "-") / "last.ckpt"
        draw, good, times, unfinished = random.Random(case), 0, [], 0
        for attempt in range(max(1, runs // 2)):
            begin = time.perf_counter()
            manifest = path / MANIFEST
            before = manifest.stat().st_mtime_ns if manifest.exists() else 0
            store = folder / f"{path.parent.name}-{attempt}"
            children = [
                start(functools.partial(save_shards_for_ever, rank, store, path), folder / f"log-{rank}.txt")
                for rank in range(2)
            ]
            wait_until(lambda m=manifest, t=before: m.exists() and m.stat().st_mtime_ns != t)
            time.sleep(draw.uniform(0, 0.2))
            draw.shuffle(children)
            for child in children:
                os.kill(child, signal.SIGKILL)
                time.sleep(draw.uniform(0, 0.1) if case != "both processes" else 0)
            codes = [finish(child) for child in children]
            good += codes[0] == -signal.SIGKILL and is_whole(path)
            unfinished += len(list(path.iterdir())) > 2
            times.append(time.perf_counter() - begin)
        yield row("shards", case, "kill -9", times, good, bytes=4 * WEIGHTS, killed_in_a_write=unfinished)


def is_whole(path: Path) -> bool:
    """Whether the checkpoint is valid and of one save."""
    if verify(path) is not None:
        return False
    checkpoint = read_checkpoint(path)
    weights = checkpoint["state_dict"]["weights"] if "state_dict" in checkpoint else checkpoint["weights"]
    return bool((weights == checkpoint["global_step"]).all())


def tokenise_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Kills at random moments of tokenisation, and the run after each."""
    corpus = text_file(folder / "long.txt", 40_000)
    begin = time.perf_counter()
    assert finish(start(lambda: tokenise(corpus, folder / "whole"), folder / "log.txt")) == 0
    whole = time.perf_counter() - begin
    expected = contents(folder / "whole")
    for name, expect in (("SIGKILL", -signal.SIGKILL), ("SIGTERM", 143)):
        draw, good, times, unfinished = random.Random(name), 0, [], 0
        cache = folder / f"cache-{name}"
        while len(times) < max(1, runs // 2):
            begin = time.perf_counter()
            reader, writer = os.pipe()
            child = start(lambda cache=cache, ready=writer: tokenise(corpus, cache, ready), folder / "log.txt")
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            time.sleep(draw.uniform(0, 0.95 * whole))
            os.kill(child, getattr(signal, name))
            code = finish(child)
            if code == 0:
                shutil.rmtree(cache)
                continue  # it had ended before: another moment is drawn
            left = contents(cache)
            unfinished += any(".tmp-" in path for path in left)
            again = finish(start(lambda cache=cache: tokenise(corpus, cache), folder / "log.txt"))
            good += code == expect and again == 0 and contents(cache) == expected
            times.append(time.perf_counter() - begin)
            shutil.rmtree(cache)
        yield row("tokenise", name, "kill, run again", times, good, killed_in_a_write=unfinished)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def disk_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Runs on a file system that is full for a while, or to the end."""
    mount = folder / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], check=False).returncode:
        raise SystemExit("the suite disk needs to be allowed to mount a tmpfs")
    try:
        assert fit("kha", folder / "whole", folder) == 0
        cases = {"full for a while": runs, "full to the end": max(1, runs // 5)}
        for case, attempts in cases.items():
            draw, good, times, messages = random.Random(case), 0, [], set[str]()
            for attempt in range(attempts):
                run = mount / f"run-{attempt}"
                # The disk is full at one save at least, and three that fail in a row would end the run.
                save = EVERY * draw.randrange(1, STEPS // EVERY) if case == "full for a while" else STEPS
                first, last = draw.randrange(save - EVERY, save), draw.randrange(save, save + EVERY)
                begin = time.perf_counter()
                filler = callback(FillDisk, first=first, last=last, filler=str(mount / "filler"))
                code = fit("kha", run, folder, *filler)
                said = (folder / "log.txt").read_text()
                newest = newest_valid(run)
                named = {name for name in (".ckpt", "samples.txt", "loss_curve.png", "metrics.csv") if name in said}
                messages.update(named)
                good += "MiB free on its disk" in said and (
                    code == 0 and is_same_run(folder / "whole", run, 0) and same_files(folder / "whole", run)
                    if save < STEPS
                    else code == 4 and newest is not None
                )
                times.append(time.perf_counter() - begin)
                shutil.rmtree(run)
                (mount / "filler").unlink(missing_ok=True)
            yield row("disk", case, "train", times, good, steps=STEPS, named=sorted(messages))
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def same_files(whole: Path, run: Path) -> bool:
    """Whether all samples are there, and the last checkpoint, and as many checkpoints as are kept."""
    samples = [path.read_bytes() for folder in (whole, run) for path in folder.rglob("samples.txt")]
    kept = [sorted(path.name for path in folder.rglob("*.ckpt")) for folder in (whole, run)]
    return len(samples) == 2 and samples[0] == samples[1] and len(kept[0]) == len(kept[1]) and kept[0][-1] in kept[1]


def signal_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Signals at random moments of processes of their own."""
    words = settings("kha", folder / "whole", folder)
    begin = time.perf_counter()
    child = spawn(words, folder / "log.txt")
    wait_until(lambda: has_handlers(child.pid))
    began = time.perf_counter()
    assert child.wait() == 0
    whole = time.perf_counter() - began
    draw, outcomes, times = random.Random(0), [], []
    attempt = 0
    while len(times) < runs:
        number = sorted(EXIT_CODES)[attempt % len(EXIT_CODES)]
        attempt += 1
        run, log = folder / f"run-{attempt}", folder / f"log-{attempt}.txt"
        shutil.rmtree(folder / "data", ignore_errors=True)
        begin = time.perf_counter()
        child = spawn(settings("kha", run, folder), log)
        wait_until(lambda child=child: has_handlers(child.pid) or child.poll() is not None)
        moment = draw.uniform(0, 1.02 * whole)
        time.sleep(moment)
        if has_ended(child):
            continue  # another moment is drawn
        child.send_signal(number)
        code = child.wait()
        said = log.read_text()
        good = code == EXIT_CODES[number] and is_nothing_lost(run, said)
        last = (said.strip().splitlines() or [""])[-1].replace(str(folder), "")
        outcomes.append({"signal": signal.Signals(number).name, "at": round(moment / whole, 2), "good": good})
        print(f"  {outcomes[-1]} {code}: {last}", flush=True)
        times.append(time.perf_counter() - begin)
    good = sum(outcome["good"] for outcome in outcomes)
    yield row("signals", "whole process", "SIGTERM, SIGINT, SIGUSR1", times, good, steps=STEPS, sent=outcomes)


def is_nothing_lost(run: Path, said: str) -> bool:
    """Whether there is a valid checkpoint of the step at which the run says that it stopped, if it has made one."""
    steps = re.findall(r"stopped by SIG\w+ after (?:step|the last step) (\d+)", said)
    if not steps:
        complete = f"step={STEPS}.ckpt" in said and "tokens/s in training" in said
        return complete or ("no step of training had been made" in said and not list(run.rglob("*.ckpt")))
    newest = newest_valid(run)
    return newest is not None and read_checkpoint(newest)["global_step"] == int(steps[-1])


def has_handlers(process: int) -> bool:
    """Whether a process handles SIGTERM itself."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught.group(1), 16) >> (signal.SIGTERM - 1) & 1)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process is over, or the system is taking it down, which takes it some time and is no moment of it."""
    if process.poll() is not None:
        return True
    exiting = 0x4  # PF_EXITING of proc_pid_stat(5)
    flags = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[6]
    return bool(int(flags) & exiting)


def resume_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Runs that are killed at a random step and resumed, against one that was not."""
    draw = random.Random(0)
    whole: dict[str, Path] = {}
    outcomes: dict[str, list[tuple[bool, float, dict[str, Any]]]] = {}
    for attempt in range(runs):
        case = RESUMED[attempt % len(RESUMED)]
        name, _, compiled = case.partition(", ")
        extra = ["--model.compile", "true"] if compiled else []
        if case not in whole:
            whole[case] = folder / f"{case}-whole"
            assert fit(name, whole[case], folder, *extra) == 0
        run = folder / f"{case}-killed-{attempt}"
        step, moment = draw.randrange(EVERY + 1, STEPS), draw.choice(MOMENTS)
        if moment == "on_validation_start":
            step = min(step, STEPS - EVERY)
        begin = time.perf_counter()
        code = fit(name, run, folder, *extra, *callback(KillAt, step=step, moment=moment))
        newest = newest_valid(run)
        assert newest is not None, f"{run} has no valid checkpoint"
        resumed_from = read_checkpoint(newest)["global_step"]
        resumed = fit(name, run, folder, *extra, "--ckpt_path", str(newest))
        seconds = time.perf_counter() - begin
        equal = code == -signal.SIGKILL and resumed == 0 and is_same_run(whole[case], run, resumed_from)
        what = {"killed_at": step, "moment": moment, "resumed_from": resumed_from, "equal": equal}
        outcomes.setdefault(case, []).append((equal, seconds, what))
        print(f"  {case}: {what}", flush=True)
    for case, results in outcomes.items():
        times = [seconds for _, seconds, _ in results]
        good = sum(equal for equal, _, _ in results)
        yield row("resume", case, "kill -9, resume", times, good, steps=STEPS, kills=[what for *_, what in results])


def processes_suite(runs: int, folder: Path) -> Iterator[Row]:
    """As `resume_suite`, of runs of two processes, one of which is killed."""
    draw = random.Random(0)
    for name in SHARDED:
        whole, kills, times = folder / f"{name}-whole", [], []
        assert fit_together(name, whole, folder) == [0, 0]
        for attempt in range(max(1, runs // len(SHARDED))):
            run = folder / f"{name}-killed-{attempt}"
            killed, step, moment = draw.randrange(2), draw.randrange(EVERY + 1, STEPS), draw.choice(MOMENTS)
            if moment == "on_validation_start":
                step = min(step, STEPS - EVERY)
            begin = time.perf_counter()
            codes = fit_together(name, run, folder, killed=(killed, callback(KillAt, step=step, moment=moment)))
            newest = newest_valid(run)
            assert newest is not None, f"{run} has no valid checkpoint"
            resumed_from = read_checkpoint(newest)["global_step"]
            resumed = fit_together(name, run, folder, "--ckpt_path", str(newest))
            times.append(time.perf_counter() - begin)
            ended = codes[killed] == -signal.SIGKILL and codes[1 - killed] == LOST_PROCESS and resumed == [0, 0]
            equal = ended and is_same_run(whole, run, resumed_from)
            kills.append({"killed": killed, "killed_at": step, "moment": moment, "resumed_from": resumed_from,
                          "codes": codes, "equal": equal})  # fmt: skip
            print(f"  {name}: {kills[-1]}", flush=True)
        good = sum(kill["equal"] for kill in kills)
        yield row("processes", f"{name}, FSDP2", "kill -9, resume", times, good, steps=STEPS, kills=kills)


def tokens_suite(runs: int, folder: Path) -> Iterator[Row]:
    """Damaged token files."""
    assert fit("mha", folder / "whole", folder) == 0
    (packed,) = (folder / "data").iterdir()
    originals = contents(packed)
    draw, good, times, kinds = random.Random(0), 0, [], ("flipped", "cut short", "extended", "missing")
    for attempt in range(runs):
        name, kind = sorted(originals)[attempt % len(originals)], draw.choice(kinds)
        path, content = packed / name, bytearray(originals[name])
        if kind == "flipped":
            place = draw.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
        elif kind == "cut short":
            del content[draw.randrange(len(content)) :]
        elif kind == "extended":
            content += draw.randbytes(1 + draw.randrange(100))
        path.unlink()
        if kind != "missing":
            path.write_bytes(content)
        begin = time.perf_counter()
        code = fit("mha", folder / "run", folder)
        last = (folder / "log.txt").read_text().strip().splitlines()[-1]
        good += code == 2 and last.startswith("attnzoo-pretrain: error: ") and name in last
        times.append(time.perf_counter() - begin)
        path.write_bytes(originals[name])
    yield row("tokens", "flipped, cut short, extended, missing", "train", times, good, files=sorted(originals))


def nan_suite(runs: int, folder: Path) -> Iterator[Row]:
    """One bad batch is skipped and nothing else; ten in a row end the run with exit code 3 and finite weights."""
    for case, last, expected in (("one NaN batch", 10, 0), ("NaN batches without end", STEPS, 3)):
        times, good = [], 0
        for attempt in range(max(1, runs // 2)):
            run = folder / f"nan-{expected}-{attempt}"
            begin = time.perf_counter()
            code = fit("gqa", run, folder, *callback(SpoilLoss, first=10, last=last))
            times.append(time.perf_counter() - begin)
            reports = sorted(run.rglob("nonfinite-step=*.json"))
            newest = newest_valid(run)
            finite = newest is not None and all(
                bool(torch.as_tensor(weight).isfinite().all())
                for weight in read_checkpoint(newest)["state_dict"].values()
            )
            wanted = 1 if expected == 0 else 10
            good += code == expected and finite and len(reports) == wanted
        yield row("nan", case, "train", times, good, exit_code=expected, reports=wanted)


def attacks_suite(*_: Any) -> Iterator[Row]:
    """The project's attacks: a test that passes is an attack that executed nothing."""
    begin = time.perf_counter()
    tests = ROOT / "tests" / "recipes" / "test_attacks.py"
    if not tests.is_file():
        raise SystemExit(f"the suite attacks needs {tests}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    counted = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    passed = counted.get("passed", 0)
    attempts = sum(counted.values()) or 1
    seconds = (time.perf_counter() - begin) / attempts
    executed = attempts - passed
    yield row("attacks", "tests/recipes/test_attacks.py", "pytest", [seconds] * attempts, passed, executed=executed)


SUITES: dict[str, tuple[Callable[[int, Path], Iterator[Row]], int]] = {
    "save": (save_suite, 200),
    "shards": (shards_suite, 50),
    "tokenise": (tokenise_suite, 50),
    "disk": (disk_suite, 20),
    "signals": (signal_suite, 40),
    "resume": (resume_suite, 2 * len(RESUMED)),
    "processes": (processes_suite, 8),
    "tokens": (tokens_suite, 40),
    "nan": (nan_suite, 4),
    "attacks": (attacks_suite, 1),
}


# a run of the recipe


def callback(kind: type[L.Callback], **arguments: Any) -> list[str]:
    """Command line words that add one of this file's callbacks."""
    description = {"class_path": f"reliability.{kind.__name__}", "init_args": arguments}
    return ["--allow-import", "reliability", "--trainer.callbacks", json.dumps([description])]


def text_file(path: Path, lines: int) -> Path:
    """A text of short lines that are alike but not equal."""
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]
    path.write_text("\n".join(" ".join(draw.choices(words, k=draw.randrange(8, 30))) for _ in range(lines)))
    return path


def settings(name: str, run: Path, folder: Path) -> list[str]:
    """Words of attnzoo-pretrain fit: the smoke settings with dropout, below a folder."""
    corpus = folder / "text.txt"
    if not corpus.exists():
        text_file(corpus, 200)
    configs = [
        word for config in ("pretrain.yaml", "smoke.yaml", f"attention/{name}.yaml") for word in ("--config", config)
    ]
    return [
        "fit", *configs, "--trainer.default_root_dir", str(run), "--data.cache_dir", str(folder / "data"),
        "--data.source", "text", "--data.files", json.dumps([str(corpus)]), "--data.unit", "line",
        "--data.max_documents", "null", "--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(EVERY),
        "--checkpoints.every_n_train_steps", str(EVERY), "--model.dropout", "0.1", "--samples.max_new_tokens", "20",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


def fit(name: str, run: Path, folder: Path, *words: str) -> int:
    """attnzoo-pretrain in a forked process, with its output in log.txt; returns the exit code, -9 for a killed one."""

    def call() -> None:
        sys.argv = ["attnzoo-pretrain", *settings(name, run, folder), *words]
        pretrain.main()

    code = finish(start(call, folder / "log.txt"))
    if code not in (0, 2, 3, 4, -signal.SIGKILL):
        sys.stderr.write((folder / "log.txt").read_text())
    return code


def fit_together(
    name: str, run: Path, folder: Path, *words: str, killed: tuple[int, list[str]] = (-1, [])
) -> list[int]:
    """`fit` in two processes with sharded parameters, one of which may be given more words; both exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(rank: int) -> None:
        torch.set_num_threads(1)
        place = {"LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in place.items()})
        more = killed[1] if rank == killed[0] else []
        spread = ["--config", "distributed/fsdp.yaml", "--trainer.devices", "2"]
        sys.argv = ["attnzoo-pretrain", *settings(name, run, folder), *spread, *words, *more]
        pretrain.main()

    logs = [folder / f"log-{rank}.txt" for rank in range(2)]
    codes = [finish(child) for child in [start(functools.partial(call, rank), logs[rank]) for rank in range(2)]]
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, LOST_PROCESS, -signal.SIGKILL):
            sys.stderr.write(log.read_text())
    return codes


def spawn(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """attnzoo-pretrain in a process of its own, which imports everything itself."""
    with log.open("wb") as output:
        command = [sys.executable, "-W", "ignore", "-m", "attnzoo_recipes.pretrain", *words]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


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
    parser.add_argument("--runs", type=int, help="attempts of each suite (default: those of the committed results)")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    if arguments.runs is not None and arguments.runs < 1:
        parser.error(f"--runs must be at least 1, got {arguments.runs}")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *(str(ROOT / part) for part in (".", "kernels", "recipes"))])
    rows = []
    for name in arguments.only:
        suite, runs = SUITES[name]
        with tempfile.TemporaryDirectory(prefix=f"attnzoo-reliability-{name}-") as folder:
            for result in suite(arguments.runs or runs, Path(folder)):
                rows.append(result)
                shape = result["shape"]
                print(f"{name:8} {result['case']:32} {shape['good']} of {shape['attempts']}", flush=True)
                if arguments.out is not None:
                    append_lines(arguments.out, [result])
    return 0 if all(result["error"] == 0 for result in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
