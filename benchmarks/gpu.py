"""The kernels on a GPU: correctness first, then time, rate, peak memory and first-call time beside every peer.

    python benchmarks/gpu.py --grid standard --budget 420
    python benchmarks/gpu.py --grid first --peers sdpa --precompile 14      # a short session
    python benchmarks/gpu.py --device cpu --interpret --tiny                # without a GPU; times mean nothing

Needs torch, triton and einops alone. Each row is checked before it is timed, answer and gradients: each may be at most
twice as far from float64 as the definition is in the same dtype, and a few steps of that dtype. Times are medians of
`triton.testing.do_bench`, which empties the L2 cache, over three sets of inputs with all contenders in turns, and once
more in a CUDA graph, without the host's time; a ratio is the peer's time over ours, so above 1 we are faster.

Rows run in a process of their own and are written as they finish. One that fails is named and the others go on, in a
new process after an error of CUDA or when it takes too long. Exit status 1: an answer is wrong, or a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
START_LIMIT = 180.0
"""Seconds that a process may take to say which rows there are."""
Line = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the grid, write JSON lines, print a table."""
    options = parsed(arguments)
    start = time.monotonic()
    if options.precompile:
        precompile(options, start + options.budget)
    if options.compile_only:
        return 0
    run = Run(options, start + options.budget)
    for line in run.lines():
        print(one_line(line), flush=True)
    print()
    print(table(run.finished))
    for missing in run.missing:
        print(f"not compared with {missing}")
    print(f"not measured, out of budget: {len(run.left_out)} rows" + "".join(f"\n  {name}" for name in run.left_out))
    print(f"written: {run.path}" if run.path else "written: nothing, no row was finished")
    wrong = [line for line in run.finished if not line["correct"]]
    for line in wrong:
        print(one_line(line))
    return 1 if wrong or run.broken else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options, each in the form in which the measuring process takes it."""

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--grid", type=names, default=["standard"], help="grids by name, or Python files with ROWS (a,b)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --interpret")
    parser.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="shrink every row")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything; the rest is left out")
    parser.add_argument("--row-limit", type=float, default=90.0, help="seconds that one row may take")
    parser.add_argument("--only", type=names, default=[], help="rows whose name contains one of these (a,b)")
    parser.add_argument("--skip", type=names, default=[], help="no rows whose name begins with one of these (a,b)")
    parser.add_argument("--peers", type=names, default=[], help="peers whose name begins with one of these (a,b)")
    parser.add_argument("--precompile", type=int, default=0, metavar="N", help="compile in N processes first")
    parser.add_argument("--compile-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON lines")
    options = parser.parse_args(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from gpu_cases_mechanisms import GRIDS

    for grid in options.grid:
        if grid not in GRIDS and not (grid.endswith(".py") and Path(grid).is_file()):
            parser.error(f"--grid must be one of {', '.join(GRIDS)}, or a Python file, got {grid}")
    if options.device == "cpu" and not (options.interpret and options.tiny):
        parser.error("--device cpu needs --interpret and --tiny")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU; without one: --device cpu --interpret --tiny")
    if options.compile_only and not options.precompile:
        parser.error("--compile-only needs --precompile")
    if options.precompile < 0:
        parser.error(f"--precompile must be a number of processes, got {options.precompile}")
    return options


class Measuring:
    """A process of `gpu_measure.py` and what it says."""

    def __init__(self, options: argparse.Namespace, first: int, of: int = 0, copy_rate: float = 0.0) -> None:
        self.messages, theirs = Pipe(duplex=False)
        given = {
            "connection": theirs.fileno(), "first": first, "of": of, "copy_rate": copy_rate,
            **{name: getattr(options, name) for name in ("grid", "device", "tiny", "only", "skip", "peers")},
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_measure.py"), json.dumps(given)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def next(self, seconds: float) -> Line | str:
        """The next message, or why there is none: "late" or "ended"."""
        messages: Connection = self.messages
        try:
            if not messages.poll(max(0.0, seconds)):
                return "late"
            found: Line = json.loads(messages.recv_bytes())
        except (EOFError, OSError):
            self.process.wait()
            return "ended"
        return found

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self.process.kill()
        self.process.wait()
        self.messages.close()


@contextmanager
def measuring(*args: Any, **kwargs: Any) -> Iterator[Measuring]:
    """A `Measuring` that is ended in any case."""
    process = Measuring(*args, **kwargs)
    try:
        yield process
    finally:
        process.end()


class Run:
    """The rows of a grid, one after the other.

    Attributes:
        finished: a line for each row that was measured or has failed.
        left_out: names of rows that the budget left no time for.
        missing: peers that are not there, and why.
        path: the file of the lines; None as long as there is none.
        broken: whether no process could be started.
    """

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        self.options, self.deadline = options, deadline
        self.finished: list[Line] = []
        self.left_out: list[str] = []
        self.missing: list[str] = []
        self.path: Path | None = None
        self.broken = False
        self._environment: Line = {}

    def lines(self) -> Iterator[Line]:
        """Run everything; each line is on the disk before it comes."""
        first, copy_rate, rows = 0, 0.0, None
        while rows is None or first < len(rows):
            with measuring(self.options, first, copy_rate=copy_rate) as process:
                hello = process.next(START_LIMIT)
                if isinstance(hello, str):
                    print(f"the measuring process has {hello} before its first row", file=sys.stderr)
                    self.broken = True
                    self.left_out = [_name(row) for row in (rows or [])[first:]]
                    return
                rows, copy_rate, self.missing = hello["rows"], hello["copy_rate"], hello["missing"]
                self._environment = hello["environment"]
                for line in self._of_process(process, rows, first):
                    yield self._written(line)
                    first += 1
            if time.monotonic() >= self.deadline:
                break
        self.left_out = [_name(row) for row in (rows or [])[first:]]

    def _of_process(self, process: Measuring, rows: list[Line], first: int) -> Iterator[Line]:
        """Lines of the rows from `first` on, until the process cannot go on."""
        for row in rows[first:]:
            begun = time.monotonic()
            if begun >= self.deadline:
                return
            limit = min(begun + self.options.row_limit, self.deadline)
            while True:
                message = process.next(limit - time.monotonic())
                if message == "late" and limit == self.deadline:
                    return
                if isinstance(message, str):
                    status = process.process.returncode
                    yield _failed(
                        row,
                        f"took more than {self.options.row_limit:g} s" if message == "late" else f"ended with {status}",
                    )
                    return
                if "done" in message:
                    break
            yield message["line"]
            if not message["healthy"]:
                return

    def _written(self, line: Line) -> Line:
        """Append a line to the file of this device; the first one replaces a former run's file."""
        line = line | self._environment
        text = json.dumps(line, allow_nan=False) + "\n"
        path = self.path
        if path is None:
            device = "interpreted" if self.options.device == "cpu" else line["machine"].lower().replace(" ", "-")
            path = self.options.out / f"gpu_{device}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".new")
            _append(beside, text, "w")
            os.replace(beside, path)
            self.path = path
        else:
            _append(path, text, "a")
        self.finished.append(line)
        return line


def _append(path: Path, text: str, mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _name(row: Line) -> str:
    return f"{row['case']} {row['phase']} {row['shape']}"


def _failed(row: Line, failure: str) -> Line:
    nothing = dict.fromkeys(("error", "ms", "ratio", "noise"))
    return {"suite": "gpu", **row, **nothing, "correct": False, "failure": f"the process {failure}"}


def precompile(options: argparse.Namespace, deadline: float) -> None:
    """Compile what the rows will launch, each process every N-th row, and say what could not be compiled."""
    start, done = time.monotonic(), 0
    processes = [Measuring(options, first, of=options.precompile) for first in range(options.precompile)]
    try:
        for process in processes:
            while not isinstance(message := process.next(deadline - time.monotonic()), str):
                done += message["failure"] is None
                if message["failure"]:
                    print(f"not compiled ahead: row {message['compiled']}: {message['failure']}", flush=True)
            if message == "late" or process.process.returncode:
                print(f"compiling ahead: a process {'was too slow' if message == 'late' else 'failed'}", flush=True)
    finally:
        for process in processes:
            process.end()
    print(
        f"compiled ahead: {done} rows in {time.monotonic() - start:.0f} s, {options.precompile} processes", flush=True
    )


def one_line(line: Line) -> str:
    """A row while the grid runs."""
    name = _name(line)
    if line["failure"]:
        return f"{name}: FAILED {line['failure']}"
    if not line["correct"]:
        return f"{name}: WRONG {', '.join(line['wrong'])}: {line['error']} where {line['budget']:.2e} is allowed"
    ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in line["ratio"].items())
    graph = "" if line["graph_ms"] is None else f", in a graph {line['graph_ms'] * 1e3:.1f} us"
    return f"{name}: {line['ms'] * 1e3:.1f} us{graph}, {line['tflops']:.0f} TFLOP/s, ratios {ratios}"


def table(lines: list[Line]) -> str:
    """The short table at the end."""
    head = f"{'row':<34} {'phase':<17} {'correct':<8} {'us':>10} {'in graph':>10}"
    out = [f"{head} {'TFLOP/s':>8} {'GB/s':>7} {'MiB':>8}  goals"]
    for line in lines:
        name = line["case"]
        if line["failure"]:
            out.append(f"{name:<34} {line['phase']:<17} {'FAILED':<8} {line['failure'][:60]}")
            continue
        words = {True: "met", False: "MISSED", None: "not timed" if line["interpreted"] else "no peer"}
        goals = "; ".join(
            f"{goal['against']} {goal['goal']} {words[goal['met']]}"
            + ("" if goal["met"] is None else f" ({goal['reached']:.2f})")
            for goal in line["goals"]
        )
        graph = "" if line["graph_ms"] is None else f"{line['graph_ms'] * 1e3:.1f}"
        out.append(
            f"{name:<34} {line['phase']:<17} {'yes' if line['correct'] else 'WRONG':<8} {line['ms'] * 1e3:>10.1f} "
            f"{graph:>10} {line['tflops']:>8.1f} {line['gbytes']:>7.0f} {line.get('peak_mib', 0):>8}  {goals}"
        )
    return "\n".join(out)


if __name__ == "__main__":
    # So that the measuring process is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
