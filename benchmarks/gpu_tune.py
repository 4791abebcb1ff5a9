"""Candidates for the tiles of the kernels, timed on a GPU beside those of the tables.

    python benchmarks/gpu_tune.py --out results --budget 80
    python benchmarks/gpu_tune.py --out results --only softmax_fwd,decode
    python benchmarks/gpu_tune.py --out results --device cpu --interpret --tiny     # without a GPU; times mean nothing

Sweeps are taken in rounds. All candidates of a round are compiled first, in parallel and by running each once; then one
process at a time times them, in CUDA graphs, between two timings of the table's tiles, and compares their results with
those of the table's. A ratio is the table's time over the candidate's, so above 1 the candidate is faster.

Every candidate is a line of gpu_tune.jsonl, written as soon as it is known, with why it failed where it has failed. One
that ends its process, or takes too long, is named and the others go on in another process. Exit status 1: nothing ran.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPILE_LIMIT = 40.0
"""Seconds that the first run of one candidate may take."""
TIMING_LIMIT = 20.0
"""Seconds that one candidate may take when it is timed."""
ROUND = 5
"""Candidates for each process in a round."""
GRACE = 6.0
"""Seconds that candidates in work are waited for when the time for compiling is over."""
Line = dict[str, Any]
Job = tuple[int, int]
"""A sweep and a candidate, 0 for the table's tiles."""


def main(arguments: list[str] | None = None) -> int:
    """Run the sweeps, write JSON lines, print a table."""
    options = parsed(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    run = Run(options)
    try:
        run.everything()
    finally:
        run.end()
    print()
    print("\n".join(run.table()))
    for name in run.left_out():
        print(f"not timed: {name}")
    print(f"{time.monotonic() - run.start:.0f} s, written: {run.path}")
    return 0 if run.lines else 1


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_tune.jsonl")
    parser.add_argument("--only", type=names, default=[], help="sweeps whose name contains one of these (a,b)")
    parser.add_argument("--sweeps", type=names, default=[], help="Python files with SWEEPS, instead of all (a,b)")
    parser.add_argument("--processes", type=int, default=14, help="processes that compile")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds for everything; the rest is left out")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --interpret")
    parser.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="shrink every call")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not (options.interpret and options.tiny):
        parser.error("--device cpu needs --interpret and --tiny")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


class Process:
    """A process of `gpu_tune_worker.py`.

    Attributes:
        ready: whether it has started.
        job: what it works on, since `since`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.connection, theirs = Pipe()
        given = {"connection": theirs.fileno()}
        given |= {name: getattr(options, name) for name in ("device", "tiny", "only", "sweeps")}
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_tune_worker.py"), json.dumps(given)]
        # Triton prints the whole listing of a kernel that the assembler refuses.
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL)
        theirs.close()
        self.ready = False
        self.job: Job | None = None
        self.since = time.monotonic()

    def give(self, job: Job, **message: Any) -> None:
        """A job, of which `next` hears, and of the end of a process that cannot take it."""
        self.job, self.since = job, time.monotonic()
        with suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def next(self) -> Line | None:
        """The next message, None if the process has ended."""
        try:
            message: Line = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return message

    def end(self) -> int:
        """Kill it, if it still runs; its exit status."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


class Run:
    """All sweeps, one round after the other.

    Attributes:
        sweeps: what the processes say of them.
        lines: what was written.
        path: where.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.deadline = self.start + options.budget
        self.path = options.out / "gpu_tune.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sweeps: list[Line] = []
        self.lines: list[Line] = []
        self.environment: Line = {}
        self.processes = [Process(options) for _ in range(options.processes)]

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.end()

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def everything(self) -> None:
        """Compile and time, round after round."""
        while not self.sweeps:
            if not self.processes or self.left() <= 0:
                print("no process has started", file=sys.stderr)
                return
            self.hear(self.processes)
        at = 0
        while at < len(self.sweeps) and self.left() > 0 and self.processes:
            sweeps: list[int] = []
            jobs: list[Job] = []
            while at < len(self.sweeps) and (not sweeps or len(jobs) < ROUND * len(self.processes)):
                sweeps.append(at)
                jobs += [(at, candidate) for candidate in range(len(self.sweeps[at]["candidates"]) + 1)]
                at += 1
            begun = time.monotonic()
            compiled = self.compile(jobs)
            print(f"compiled {len(compiled)} of {len(jobs)} in {time.monotonic() - begun:.0f} s", flush=True)
            for sweep in sweeps:
                if self.left() > 0 and (sweep, 0) in compiled:
                    self.time(sweep, [job[1] for job in jobs if job[0] == sweep and job[1] and job in compiled])

    def hear(self, processes: list[Process], seconds: float = 0.5) -> list[tuple[Process, Line | None]]:
        """Messages of these processes within so many seconds; the first one of each is only noted."""
        heard = []
        ready = wait([process.connection for process in processes], max(0.0, min(seconds, self.left())))
        for process in [process for process in processes if process.connection in ready]:
            message = process.next()
            if process.ready:
                heard.append((process, message))
            elif message is None:
                # One that cannot start is not replaced.
                self.drop(process)
            else:
                process.ready = True
                self.sweeps, self.environment = message["sweeps"], message["environment"]
        return heard

    def drop(self, process: Process) -> int:
        """End a process; its exit status."""
        self.processes.remove(process)
        return process.end()

    def replace(self, process: Process) -> int:
        """End a process and start another one; its exit status."""
        status = self.drop(process)
        self.processes.append(Process(self.options))
        return status

    def compile(self, jobs: list[Job]) -> set[Job]:
        """Run every job's candidate once, and say which went well. Leaves a sixth of the budget for timing."""
        waiting, compiled = deque(jobs), set[Job]()
        stop = self.deadline - self.options.budget / 6
        while self.processes:
            now = time.monotonic()
            for process in self.processes:
                if waiting and now < stop and process.ready and process.job is None:
                    job = waiting.popleft()
                    process.give(job, work="compile", sweep=job[0], candidate=job[1])
            working = [process for process in self.processes if process.job is not None]
            if not working and (not waiting or now >= stop):
                break
            for process, message in self.hear(self.processes):
                done, process.job = process.job, None
                if message is None:
                    status = self.replace(process)
                    if done is not None:
                        self.failed(done, f"not compiled: the process ended with {status}")
                elif done is not None and message["failure"] is None:
                    compiled.add(done)
                elif done is not None:
                    self.failed(done, f"not compiled: {message['failure']}")
                    if not message["healthy"]:
                        self.replace(process)
            for process in list(self.processes):
                took = time.monotonic() - process.since
                late = took > COMPILE_LIMIT or self.left() <= 0 or time.monotonic() > stop + GRACE
                if process.job is not None and late:
                    self.failed(process.job, f"not compiled: took more than {took:.0f} s")
                    self.replace(process)
        for job in waiting:
            self.failed(job, "not compiled: no time left")
        return compiled

    def time(self, sweep: int, candidates: list[int]) -> None:
        """Time candidates of a sweep, in another process where one has ended."""
        while self.left() > 0 and self.processes:
            process = next((process for process in self.processes if process.ready), None)
            if process is None:
                self.hear(self.processes)
                continue
            process.give((sweep, 0), work="time", sweep=sweep, candidates=candidates)
            last = self.timed(process, sweep)
            candidates = candidates[candidates.index(last) + 1 :] if last in candidates else []
            if not candidates:
                return

    def timed(self, process: Process, sweep: int) -> int | None:
        """Write lines as they come; the candidate with which the process has ended, if it has."""
        current: Line = {"start": 0, "role": "table"}
        while True:
            heard = self.hear([process])
            late = time.monotonic() - process.since > TIMING_LIMIT or self.left() <= 0
            if not heard and not late:
                continue
            message = heard[0][1] if heard else None
            if message is None:
                status = self.replace(process)
                why = "no time left" if self.left() <= 0 else "took too long" if late else f"ended with {status}"
                self.failed((sweep, current["start"]), f"not timed: the process {why}", current["role"])
                return int(current["start"])
            process.since = time.monotonic()
            if "start" in message:
                current = message
            elif "done" in message:
                process.job = None
                if not message["healthy"]:
                    self.replace(process)
                    return int(current["start"])
                return None
            else:
                self.written((sweep, message["candidate"]), message["role"], message["line"])

    def failed(self, job: Job, failure: str, role: str = "") -> None:
        """The line of a candidate that has no time."""
        self.written(job, role or ("candidate" if job[1] else "table"), {"failure": failure})

    def written(self, job: Job, role: str, found: Line) -> None:
        """Append a line to the file."""
        sweep = self.sweeps[job[0]]
        nothing = {"tiles": None, "num_warps": None, "num_stages": None}
        config = sweep["candidates"][job[1] - 1] if job[1] else found.get("launched", nothing)
        line = {
            "suite": "gpu_tune", "sweep": sweep["sweep"], "kernel": sweep["kernel"], "role": role, **config,
            **dict.fromkeys(("ms", "ratio", "error", "failure", "timer", "launched")), **found,
            "shape": sweep["shape"], **self.environment,
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
        self.lines.append(line)
        if line["failure"]:
            print(f"{line['sweep']} {named(line)}: {line['failure'][:150]}", flush=True)

    def table(self) -> list[str]:
        """The short table at the end: a line for each sweep that was timed."""
        out = [f"{'sweep':<18} {'table':<20} {'us':>9} {'again':>9}  {'best candidate':<20} {'us':>9} {'ratio':>6}"]
        for sweep in self.sweeps:
            own = [line for line in self.lines if line["sweep"] == sweep["sweep"] and line["ms"]]
            by_role = {line["role"]: line for line in own}
            if "table" not in by_role:
                continue
            table, again = by_role["table"], by_role.get("table again")
            best = max((line for line in own if line["role"] == "candidate"), key=lambda x: x["ratio"], default=None)
            text = f"{sweep['sweep']:<18} {named(table):<20} {table['ms'] * 1e3:>9.1f} "
            text += f"{again['ms'] * 1e3:>9.1f}" if again else f"{'':>9}"
            if best:
                text += f"  {named(best):<20} {best['ms'] * 1e3:>9.1f} {best['ratio']:>6.3f}"
            out.append(text)
        return out

    def left_out(self) -> list[str]:
        """Sweeps without any time."""
        timed = {line["sweep"] for line in self.lines if line["ms"]}
        return [sweep["sweep"] for sweep in self.sweeps if sweep["sweep"] not in timed]


def named(line: Line) -> str:
    """A configuration in short: 128x64/8/3."""
    if line["tiles"] is None:
        return "table"
    return f"{'x'.join(map(str, line['tiles'].values()))}/{line['num_warps']}/{line['num_stages']}"


if __name__ == "__main__":
    # So that the other processes are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
