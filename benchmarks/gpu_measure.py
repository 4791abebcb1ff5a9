"""The process in which `benchmarks/gpu.py` measures rows, so that no failure of one takes the others along.

It is started with one JSON object and answers with JSON messages: first what rows there are, then each row's index when
it starts and its line when it is done.
"""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_cases import WHOLE, Bench, Inputs, Part, Row, Run, missing_peers  # noqa: E402
from gpu_cases_mechanisms import GRIDS  # noqa: E402
from timing import environment  # noqa: E402

from tests.kernels.tolerance import Results, deviations, kind_of  # noqa: E402

PACKAGES = ("triton", "einops", "flash-linear-attention", "fa3-fwd", "flash-attn-4")
STICKY = re.compile(r"CUDA error|Triton Error \[CUDA\]|device-side assert|unspecified launch failure")


def main(given: dict[str, Any]) -> None:
    """Measure the rows from `first` on, or compile every `of`-th from there on."""
    connection = Connection(given["connection"], readable=False)

    def tell(**message: Any) -> None:
        connection.send_bytes(json.dumps(message, allow_nan=False).encode())

    bench = Bench(given["device"], given["tiny"])
    rows = rows_of(given["grid"], bench, given["only"], given["skip"])
    if given["of"]:
        for index in range(given["first"], len(rows), given["of"]):
            tell(compiled=index, failure=compile_ahead(rows[index]))
        return
    where = environment(PACKAGES)
    if bench.gpu:
        where["machine"] = torch.cuda.get_device_name()
    copy_rate = given["copy_rate"] or measured_copy_rate(bench)
    names = [{"case": row.case, "phase": row.phase, "shape": row.shape} for row in rows]
    tell(rows=names, environment=where, copy_rate=copy_rate, missing=missing_peers(bench))
    for index in range(given["first"], len(rows)):
        tell(start=index)
        line, healthy = measured(rows[index], bench, given["peers"], copy_rate)
        tell(done=index, line=line, healthy=healthy)
        if not healthy:
            return


def rows_of(grids: list[str], bench: Bench, only: list[str], skip: list[str]) -> list[Row]:
    """The rows of grids by name, or of Python files' ROWS. A function of rows that fails is a row that fails."""
    functions: list[Any] = []
    for grid in grids:
        functions += runpy.run_path(grid)["ROWS"] if grid.endswith(".py") else GRIDS[grid]
    rows: list[Row] = []
    for function in functions:
        try:
            rows += function(bench)
        except Exception as error:
            rows.append(_broken(function.__name__, error))
    wanted = [row for row in rows if not only or any(part in row.name for part in only)]
    return [row for row in wanted if not any(row.name.startswith(part) for part in skip)]


def _broken(name: str, error: Exception) -> Row:
    def make(_: int) -> Inputs:
        raise error

    return Row(name, "rows", {}, make, lambda x: x[0], lambda x: x[0], {})


def measured(row: Row, bench: Bench, prefixes: list[str], copy_rate: float) -> tuple[dict[str, Any], bool]:
    """A row's line, and whether the device still works: after an error of CUDA nothing else does in this process."""
    line: dict[str, Any] = {
        "suite": "gpu", "case": row.case, "phase": row.phase, "shape": row.shape, "interpreted": not bench.gpu,
        "correct": False, "failure": None, "error": None, "ms": None, "ratio": None, "noise": None,
    }  # fmt: skip
    peers = {name: run for name, run in row.peers.items() if not prefixes or any(name.startswith(p) for p in prefixes)}
    try:
        line |= correctness(row, bench)
        line |= times(row, peers, bench)
        line |= rates(row, line, bench, copy_rate)
        # Last: a capture that fails may leave the generator of random numbers behind in it.
        line |= graph_times(row, peers, line, bench)
    except Exception as error:
        line |= {"correct": False, "failure": described(error), "ms": None}
        return line, is_healthy(bench, error)
    sticky = [text for text in line["peers_failed"].values() if STICKY.search(text)]
    return line, not sticky and is_healthy(bench)


def described(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def is_healthy(bench: Bench, error: Exception | None = None) -> bool:
    """Whether work can go on in this process."""
    if error is not None and STICKY.search(str(error)):
        return False
    if not bench.gpu:
        return True
    try:
        torch.cuda.empty_cache()
        return float(torch.randn(8, device=bench.device).square().sum()) > 0
    except Exception:
        return False


def correctness(row: Row, bench: Bench) -> dict[str, Any]:
    """Our answer and gradients against the definition, each with what it may be off by."""
    start = time.perf_counter()
    given = _separate(row.check(row.make(0)))
    fast = _results(row.ours, given, WHOLE, None)
    if bench.gpu:
        torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    found: dict[str, tuple[float, float]] = {}
    for part in row.parts:
        inputs = _separate([x[at] for x, at in _placed(given, part)])
        wide = _separate([x.double() if x.is_floating_point() else x for x in inputs])
        plain, exact = (_results(row.formula, x, part, fast) for x in (inputs, wide))
        mine = {name: x[part.answer] for name, x in fast.items() if name == "output"}
        mine |= {f"gradient {n}": fast[f"gradient {n}"][at] for n, (x, at) in enumerate(_placed(given, part))
                 if x.requires_grad}  # fmt: skip
        for name, (error, allowed) in deviations(mine, plain, exact, kind_of(given), least=1e-30).items():
            if not math.isfinite(allowed):
                raise ValueError(f"the definition's {name} is not finite in {kind_of(given)}")
            if name not in found or error / allowed > found[name][0] / found[name][1]:
                found[name] = error, allowed
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    bad = [name for name, (error, allowed) in found.items() if not error <= allowed]
    endless = [name for name in bad if found[name][0] == float("inf")]
    finite = {name: pair for name, pair in found.items() if name not in endless}
    return {
        "first_call_s": round(first_call, 2), "correct": not bad, "wrong": bad, "errors": finite,
        "error": found[worst][0] if worst in finite else None, "budget": found[worst][1],
        "not_finite": endless,
    }  # fmt: skip


def _placed(inputs: Inputs, part: Part) -> list[tuple[torch.Tensor, Any]]:
    return list(zip(inputs, part.inputs or ((),) * len(inputs), strict=True))


def _separate(inputs: Inputs) -> Inputs:
    """Tensors of their own, that require a gradient where these do."""
    return [x.detach().requires_grad_(x.requires_grad) for x in inputs]


def _results(run: Run, inputs: Inputs, part: Part, whole: Results | None) -> Results:
    """The answer and the gradients of its product with fixed weights, of which `whole` has those of the whole call."""
    wanted = [n for n, x in enumerate(inputs) if x.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        y = run(inputs)
    result = {"output": y.detach()}
    if not wanted:
        return result
    shape = y.shape if whole is None else whole["output"].shape
    generator = torch.Generator(y.device).manual_seed(1)
    weight = torch.randn(shape, generator=generator, device=y.device)[part.answer]
    gradients = torch.autograd.grad(y, [inputs[n] for n in wanted], weight.to(y.dtype), allow_unused=True)
    for n, gradient in zip(wanted, gradients, strict=True):
        result[f"gradient {n}"] = torch.zeros_like(inputs[n]) if gradient is None else gradient
    return result


def times(row: Row, peers: dict[str, Run], bench: Bench) -> dict[str, Any]:
    """Medians over three sets of inputs, all contenders in turns."""
    taken: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for seed in range(3 if bench.gpu else 1):
        inputs = row.make(seed)
        for name, run in {"ours": row.ours, **peers}.items():
            if name in failures:
                continue
            try:
                taken.setdefault(name, []).append(timed(step(run, inputs), bench))
            except Exception as error:
                if name == "ours":
                    raise
                failures[name] = described(error)[:160]
                taken.pop(name, None)
    own = statistics.median(taken["ours"])
    medians = {name: statistics.median(t) for name, t in taken.items() if name != "ours"}
    ratio = {name: ms / own for name, ms in medians.items()}
    sdpa = [value for name, value in ratio.items() if name.startswith("sdpa")]
    if sdpa:
        ratio["sdpa best"] = min(sdpa)
    return {
        "ms": own, "noise": max(taken["ours"]) / min(taken["ours"]), "peers": medians, "ratio": ratio,
        "graph_ms": None, "peers_graph_ms": {}, "peers_failed": failures,
    }  # fmt: skip


def graph_times(row: Row, peers: dict[str, Run], line: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Medians of the first set of inputs in CUDA graphs, of ours and of the peers that could be timed."""
    found: dict[str, float] = {}
    failures: dict[str, str] = dict(line["peers_failed"])
    inputs = row.make(0)
    for name in ("ours", *line["peers"]) if bench.gpu else ():
        try:
            found[name] = timed_in_graph(step({"ours": row.ours, **peers}[name], inputs))
        except Exception as error:
            failures[f"{name}, in a graph"] = described(error)[:160]
            break
    return {"graph_ms": found.pop("ours", None), "peers_graph_ms": found, "peers_failed": failures}


def step(run: Run, inputs: Inputs) -> Callable[[], None]:
    """A call, with the backward pass where inputs require gradients."""
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:

        def forward() -> None:
            with torch.no_grad():
                run(inputs)

        return forward
    weight: list[torch.Tensor] = []

    def both() -> None:
        y = run(inputs)
        if not weight:
            weight.append(torch.randn_like(y))
        torch.autograd.grad(y, wanted, weight[0], allow_unused=True)

    return both


def timed(call: Callable[[], None], bench: Bench) -> float:
    """Median in ms on a GPU, with the L2 cache emptied before every call; one run elsewhere."""
    if not bench.gpu:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    from triton import testing

    call()
    return float(testing.do_bench(call, warmup=20, rep=60, return_mode="median"))


def timed_in_graph(call: Callable[[], None]) -> float:
    """Median in ms of a call in a CUDA graph, without the host's time and with what the L2 cache holds."""
    from triton import testing

    call()
    torch.cuda.synchronize()
    return float(testing.do_bench_cudagraph(call, rep=10, return_mode="median"))


def rates(row: Row, line: dict[str, Any], bench: Bench, copy_rate: float) -> dict[str, Any]:
    """What follows from the times: rates, peak memory, goals."""
    ms = line["ms"]
    found: dict[str, Any] = {
        "tflops": row.flops / ms * 1e-9, "gbytes": row.bytes / ms * 1e-6,
        "copy_share": row.bytes / (ms * 1e-3) / copy_rate if copy_rate else 0.0,
    }  # fmt: skip
    if bench.gpu:
        call = step(row.ours, row.make(0))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    reached = {**line["ratio"], "copy": found["copy_share"], "tflops": found["tflops"]}
    found["goals"] = [
        {
            "against": goal.peer, "goal": goal.ratio, "reached": reached.get(goal.peer),
            "met": reached[goal.peer] >= goal.ratio if goal.peer in reached and bench.gpu else None,
        }
        for goal in row.goals
    ]  # fmt: skip
    return found


def measured_copy_rate(bench: Bench) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes here; 0 on a CPU."""
    if not bench.gpu:
        return 0.0
    source = torch.empty(bench.size(2**28, 2**10), device=bench.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2.0 * source.nbytes / (timed(copy, bench) * 1e-3)


def compile_ahead(row: Row) -> str | None:
    """Compile what the row launches when it is checked and timed, without a launch; None or why that failed."""
    try:
        with warm_up():
            for inputs in (_separate(row.check(row.make(0))), row.make(0)):
                step(row.ours, inputs)()
    except Exception as error:
        return described(error)
    return None


@contextmanager
def warm_up() -> Iterator[None]:
    """Launches compile their kernel for exactly their arguments and leave it there; in the interpreter they do nothing.

    The compiled kernel lies in Triton's cache then, under the key by which the launch itself will look for it.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    run, interpreted = JITFunction.run, InterpretedFunction.run

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs | {"warmup": True})

    JITFunction.run, InterpretedFunction.run = compiled, lambda *_, **__: None
    try:
        yield
    finally:
        JITFunction.run, InterpretedFunction.run = run, interpreted


def end_with(parent: int) -> None:
    """End this process when its parent is gone, whatever it does then."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    main(json.loads(sys.argv[1]))
