"""How everything here is timed: interleaved rounds in one process, minima, and what stands beside them."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ROW_KEYS = {"suite", "case", "phase", "shape", "ms", "ratio", "noise", "error"}
"""What every line of a result file has; `environment` adds date, commit, versions and machine."""


@dataclass(frozen=True)
class Timing:
    """One case's rounds: the minimum in ms, and how far the median lies above it (1 = a quiet machine)."""

    ms: float
    noise: float


def once(call: Callable[[], object]) -> Callable[[], float]:
    """A measurement that runs `call` once and returns its wall-clock time in ms."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return measure


def interleave(
    measurements: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 2, seed: int = 0
) -> dict[str, Timing]:
    """Run every measurement once a round, in an order drawn anew each round; keep the minima.

    A slow spell of a shared machine then hits all cases alike, and none is always the one that runs after
    its neighbour has filled the caches. Each measurement returns its own ms.
    """
    order = list(measurements)
    draw = random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            gc.collect()
            draw.shuffle(order)
            for name in order:
                ms = measurements[name]()
                if index >= warmup:
                    taken[name].append(ms)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(min(t), statistics.median(t) / min(t)) for name, t in taken.items()}


def saved_bytes(call: Callable[[], object], exclude: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the tensors in `exclude`.

    Counts each storage once, whole. Exclude parameters and the input: they are there anyway.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)
    del result
    return total


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest deviation from the exact answer over the answer's largest entry."""
    return ((got.detach().double() - exact).abs().max() / exact.abs().max()).item()


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """When, on what and with which versions; nothing in it names the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "machine": f"{os.cpu_count()}-core CPU, {torch.get_num_threads()} thread",
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "attnzoo", "kernels", "recipes") else head


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file; every row must have what a reader counts on."""
    lines = []
    for row in rows:
        missing = (ROW_KEYS | {"date", "commit", "versions", "machine"}) - row.keys()
        if missing:
            raise ValueError(f"row must have {', '.join(sorted(missing))}, got {sorted(row)}")
        lines.append(json.dumps(row, allow_nan=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, in its order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
