"""A process of `benchmarks/gpu_tune.py`: it compiles candidates, each by running its call once, or times a sweep.

It is started with one JSON object, says which sweeps there are and then answers each job with JSON messages.
"""

from __future__ import annotations

import gc
import json
import math
import os
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_cases import Bench  # noqa: E402
from gpu_measure import described, end_with, is_healthy  # noqa: E402
from gpu_tune_cases import SWEEPS, Call, Sweep  # noqa: E402
from timing import environment  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from attnzoo_kernels.launch import forget_launches  # noqa: E402
from attnzoo_kernels.tuning import Config, pinned  # noqa: E402

ALLOWED = 1e-2
"""Largest distance of a candidate's results from those of the table's tiles, in norm and relative."""
NOTHING = Config({}, 0, 0)
Tell = Callable[..., None]


def main(given: dict[str, Any]) -> None:
    """Do one job after the other until the connection ends."""
    # No collection, which may free device memory, while a graph is captured.
    gc.disable()
    gc.freeze()
    connection = Connection(given["connection"])

    def tell(**message: Any) -> None:
        connection.send_bytes(json.dumps(message, allow_nan=False).encode())

    worker = Worker(Bench(given["device"], given["tiny"]), given["only"], given["sweeps"])
    tell(sweeps=[described_sweep(sweep) for sweep in worker.sweeps], environment=worker.environment())
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if job["work"] == "compile":
            worker.compile(job["sweep"], job["candidate"], tell)
        else:
            worker.time(job["sweep"], job["candidates"], tell)


def described_sweep(sweep: Sweep) -> dict[str, Any]:
    """A sweep without its functions."""
    candidates = [
        {"tiles": config.tiles, "num_warps": config.num_warps, "num_stages": config.num_stages}
        for config in sweep.candidates
    ]
    return {"sweep": sweep.name, "kernel": sweep.kernel, "shape": sweep.shape, "candidates": candidates}


class Worker:
    """The sweeps, and the call of the last one that was worked on."""

    def __init__(self, bench: Bench, only: list[str], files: list[str]) -> None:
        self.bench = bench
        functions = [function for file in files for function in runpy.run_path(file)["SWEEPS"]] if files else SWEEPS
        sweeps = [sweep for function in functions for sweep in function(bench)]
        self.sweeps = [sweep for sweep in sweeps if not only or any(part in sweep.name for part in only)]
        self.stream = torch.cuda.Stream() if bench.gpu else None
        self._made: tuple[int, Call] | None = None

    def environment(self) -> dict[str, Any]:
        """Date, versions and device, as every line has them."""
        where = environment(("triton",))
        return where | ({"machine": torch.cuda.get_device_name()} if self.bench.gpu else {})

    def here(self) -> AbstractContextManager[Any]:
        """The stream of all calls: a backward pass runs in the stream of its forward pass."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def call_of(self, at: int) -> Call:
        """The call of a sweep, made once as long as no other sweep comes between."""
        if self._made is None or self._made[0] != at:
            self._made = None
            gc.collect()
            if self.bench.gpu:
                torch.cuda.empty_cache()
            self._made = at, self.sweeps[at].make()
        return self._made[1]

    def config(self, at: int, candidate: int) -> Config | None:
        """The candidate of that number, from 1 on; 0 is the table's."""
        return self.sweeps[at].candidates[candidate - 1] if candidate else None

    def run(self, at: int, config: Config | None) -> Sequence[Tensor]:
        """The results of the call with these tiles, when they are there."""
        call = self.call_of(at)
        with self.pinned(at, config):
            results = call(config)
        if self.bench.gpu:
            torch.cuda.synchronize()
        return results

    def pinned(self, at: int, config: Config | None) -> AbstractContextManager[None]:
        """The table's tiles are run as candidates are, without the plans of launches."""
        return pinned(NOTHING, "no kernel") if config is None else pinned(config, self.sweeps[at].kernel)

    def compile(self, at: int, candidate: int, tell: Tell) -> None:
        """Run the call once."""
        failure, healthy = None, True
        try:
            with self.here():
                self.run(at, self.config(at, candidate))
        except Exception as error:
            failure, healthy = described(error), is_healthy(self.bench, error)
        tell(done=candidate, failure=failure, healthy=healthy)

    def time(self, at: int, candidates: list[int], tell: Tell) -> None:
        """Time the table's tiles, the candidates, and the table's again."""
        expected: Sequence[Tensor] = ()
        table_ms, healthy = None, True
        order = [("table", 0), *(("candidate", n) for n in candidates), ("table again", 0)]
        for role, candidate in order:
            tell(start=candidate, role=role)
            line: dict[str, Any] = dict.fromkeys(("ms", "ratio", "error", "failure"))
            try:
                with self.here():
                    found, results = self.measured(at, self.config(at, candidate), expected)
                line |= found
                if role == "table":
                    expected, table_ms = results, line["ms"]
            except Exception as error:
                line["failure"], healthy = described(error), is_healthy(self.bench, error)
            if line["ms"] and table_ms:
                line["ratio"] = table_ms / line["ms"]
            tell(line=line, candidate=candidate, role=role)
            if not healthy or (role == "table" and line["ms"] is None):
                break
        self._made = None
        tell(done=at, healthy=healthy)

    def measured(
        self, at: int, config: Config | None, expected: Sequence[Tensor]
    ) -> tuple[dict[str, Any], Sequence[Tensor]]:
        """What a line says of one configuration, and its results."""
        sweep = self.sweeps[at]
        with launches_of(f"{sweep.kernel}_kernel", sweep.tiles()) as launched:
            results = self.run(at, config)
        if not launched:
            return {"failure": f"{sweep.kernel} was not launched"}, results
        line: dict[str, Any] = {"launched": launched[-1]}
        if expected:
            error = max(distance(x, y) for x, y in zip(results, expected, strict=True))
            line["error"] = error if math.isfinite(error) else None
            if not error < ALLOWED:
                return line | {"failure": f"wrong: {error:.1e} from the table's results"}, results
        call = self.call_of(at)
        with self.pinned(at, config):
            ms, timer = timed(lambda: call(config), self.stream)
        return line | {"ms": ms, "timer": timer}, results


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; not a number where x holds any."""
    x, y = x.float(), y.float()
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


@contextmanager
def launches_of(kernel: str, tiles: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Tiles, warps and stages of every launch of a kernel, in any thread."""
    found: list[dict[str, Any]] = []
    runs = {function: function.run for function in (JITFunction, InterpretedFunction)}

    def watching(run: Any) -> Any:
        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.__name__ == kernel:
                given = dict(zip(self.arg_names, args, strict=False)) | kwargs
                sizes = {name: given[name] for name in tiles}
                found.append({"tiles": sizes, **{name: given[name] for name in ("num_warps", "num_stages")}})
            return run(self, *args, **kwargs)

        return watched

    forget_launches()
    for function, run in runs.items():
        function.run = watching(run)
    try:
        yield found
    finally:
        for function, run in runs.items():
            function.run = run


def timed(call: Callable[[], object], stream: Any) -> tuple[float, str]:
    """Median in ms, and how it was measured: in a CUDA graph, or where that fails by events; one run on a CPU."""
    if stream is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3, "once"
    try:
        return timed_in_graph(call), "graph"
    except Exception as error:
        # After an error that outlasts the capture this fails too, and says so.
        torch.cuda.synchronize()
        from triton import testing

        ms = float(testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
        return ms, f"do_bench, for a graph failed: {described(error)[:120]}"


def timed_in_graph(call: Callable[[], object]) -> float:
    """Median in ms of a call, captured in the current stream.

    As `triton.testing.do_bench_cudagraph`, which captures in a stream of its own: a backward pass runs in the stream of
    its forward pass and would not be in the graph.
    """
    one = captured(call, 1)
    elapsed(one)
    calls = max(1, min(50, int(5 / max(statistics.median(elapsed(one) for _ in range(3)), 1e-3))))
    graph = one if calls == 1 else captured(call, calls)
    elapsed(graph)
    return statistics.median(elapsed(graph) for _ in range(9)) / calls


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """So many calls as a graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for _ in range(calls):
            call()
    finally:
        graph.capture_end()
    return graph


def elapsed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    main(json.loads(sys.argv[1]))
