"""The kernels on a GPU: correctness first, then time, rate, peak memory and first-call time beside every peer.

    python benchmarks/gpu.py --grid standard --budget 420
    python benchmarks/gpu.py --device cpu --interpret --tiny     # the same rows without a GPU; times mean nothing

Needs torch, triton and einops alone. Each row is checked before it is timed: our answer may be at most twice as far
from float64 as the definition is in the same dtype. Times are medians of `triton.testing.do_bench`, which empties the
L2 cache, over three sets of inputs with all contenders in turns; a ratio is the peer's time over ours, so above 1 we
are faster. Rows beyond the budget are named as not measured. Exit status 1: an answer is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]


def main(arguments: list[str] | None = None) -> int:
    """Run the grid, write JSON lines, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="standard", help="standard, mechanisms, train or decode")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --interpret")
    parser.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="shrink every row")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no further row starts")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON lines")
    options = parser.parse_args(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from gpu_cases import GRIDS, Bench, missing_peers
    from gpu_cases_mechanisms import ROWS

    if options.grid not in (*GRIDS, "mechanisms"):
        parser.error(f"--grid must be one of {', '.join(GRIDS)}, mechanisms, got {options.grid}")
    if options.device == "cpu" and not (options.interpret and options.tiny):
        parser.error("--device cpu needs --interpret and --tiny")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU; without one: --device cpu --interpret --tiny")
    bench = Bench(options.device, options.tiny)
    deadline = time.perf_counter() + options.budget
    copy_rate = measured_copy_rate(options.device)
    lines: list[dict[str, Any]] = []
    left_out, rows = [], []
    mechanisms = ROWS if options.grid in ("standard", "mechanisms") else ()
    for rows_of in (*mechanisms, *GRIDS.get(options.grid, ())):
        for row in rows_of(bench):
            if options.only not in row.case:
                continue
            if time.perf_counter() > deadline:
                left_out.append(f"{row.case} {row.phase} {row.shape}")
                continue
            lines.append(measured(row, bench, copy_rate))
            rows.append(row)
            print(one_line(lines[-1]), flush=True)
    path = write(options.out, lines, bench)
    print()
    print(table(lines))
    for missing in missing_peers(options.device):
        print(f"not compared with {missing}")
    print(f"not measured, out of budget: {len(left_out)} rows" + "".join(f"\n  {name}" for name in left_out))
    print(f"written: {path}")
    wrong = [line for line in lines if not line["correct"]]
    for line in wrong:
        print(f"WRONG: {line['case']} {line['phase']} {line['shape']}: {line.get('failure') or line['error']}")
    return 1 if wrong else 0


def measured_copy_rate(device: str) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes here; 0 on a CPU."""
    import torch

    if device == "cpu":
        return 0.0
    import triton

    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / (triton.testing.do_bench(lambda: target.copy_(source)) * 1e-3)


def measured(row: Any, bench: Any, copy_rate: float) -> dict[str, Any]:
    """Check a row, then time it."""
    import torch

    line: dict[str, Any] = {"suite": "gpu", "case": row.case, "phase": row.phase, "shape": row.shape}
    line |= {"interpreted": bench.device == "cpu"}
    inputs = row.make(0)
    start = time.perf_counter()
    try:
        step(row.ours, inputs)()
        _wait(bench.device)
        line["first_call_s"] = round(time.perf_counter() - start, 2)
        ours, exact, plain = row.check(inputs)
    except Exception as error:
        return line | {"correct": False, "failure": f"{type(error).__name__}: {error}"[:300], "error": None, "ms": None}
    scale = max(1.0, float(exact.abs().max()))
    line["error"] = float((ours.double() - exact).abs().max()) / scale
    line["budget"] = 2 * float((plain.double() - exact).abs().max()) / scale + 4 * torch.finfo(ours.dtype).eps
    line["correct"] = bool(line["error"] <= line["budget"])
    del ours, exact, plain
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for seed in range(1 if bench.device == "cpu" else 3):
        inputs = row.make(seed)
        for name, run in {"ours": row.ours, **row.peers}.items():
            if name in failures:
                continue
            try:
                times.setdefault(name, []).append(timed(step(run, inputs), bench.device))
            except Exception as error:
                failures[name] = (str(error).splitlines() or [type(error).__name__])[0][:160]
                times.pop(name, None)
    line["ms"] = statistics.median(times["ours"])
    line["noise"] = max(times["ours"]) / min(times["ours"])
    line["peers"] = {name: statistics.median(t) for name, t in times.items() if name != "ours"}
    line["ratio"] = {name: ms / line["ms"] for name, ms in line["peers"].items()}
    sdpa = [ratio for name, ratio in line["ratio"].items() if name.startswith("sdpa")]
    if sdpa:
        line["ratio"]["sdpa best"] = min(sdpa)
    line["peers_failed"] = failures
    line["tflops"] = row.flops / line["ms"] * 1e-9
    line["gbytes"] = row.bytes / line["ms"] * 1e-6
    line["copy_share"] = row.bytes / (line["ms"] * 1e-3) / copy_rate if copy_rate else 0.0
    if bench.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(row.ours, inputs)()
        line["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    line["goals"] = [goal_line(goal, line) for goal in row.goals]
    return line


def step(run: Callable[[Any], Any], inputs: Any) -> Callable[[], None]:
    """A call, with the backward pass where inputs require gradients."""
    import torch

    if not any(x.requires_grad for x in inputs):

        def forward() -> None:
            with torch.no_grad():
                run(inputs)

        return forward
    wanted = [x for x in inputs if x.requires_grad]
    weight: list[Any] = []

    def both() -> None:
        y = run(inputs)
        if not weight:
            weight.append(torch.randn_like(y))
        torch.autograd.grad(y, wanted, weight[0], allow_unused=True)

    return both


def timed(call: Callable[[], None], device: str) -> float:
    """Median in ms on a GPU; one run elsewhere."""
    call()
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    import triton

    return float(triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median"))


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def goal_line(goal: Any, line: dict[str, Any]) -> dict[str, Any]:
    """A goal with what was reached; met is None where its peer was not there or nothing was timed."""
    reached = {"copy": line["copy_share"], "tflops": line["tflops"]}.get(goal.peer, line["ratio"].get(goal.peer))
    met = None if reached is None or line["interpreted"] else reached >= goal.ratio
    return {"against": goal.peer, "goal": goal.ratio, "reached": reached, "met": met}


def one_line(line: dict[str, Any]) -> str:
    """Progress while the grid runs."""
    name = f"{line['case']} {line['phase']} {line['shape']}"
    if line["ms"] is None:
        return f"{name}: FAILED {line['failure']}"
    ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in line["ratio"].items())
    return f"{name}: {line['ms'] * 1e3:.1f} us, {line['tflops']:.0f} TFLOP/s, ratios {ratios}"


def table(lines: list[dict[str, Any]]) -> str:
    """The short table at the end."""
    head = f"{'row':<34} {'phase':<17} {'correct':<8} {'us':>10} {'TFLOP/s':>8} {'GB/s':>7} {'MiB':>8}  goals"
    out = [head]
    for line in lines:
        name = line["case"]
        if line["ms"] is None:
            out.append(f"{name:<34} {line['phase']:<17} {'NO':<8} {line['failure'][:60]}")
            continue
        words = {True: "met", False: "MISSED", None: "not timed" if line["interpreted"] else "no peer"}
        goals = "; ".join(
            f"{goal['against']} {goal['goal']} {words[goal['met']]}"
            + ("" if goal["met"] is None else f" ({goal['reached']:.2f})")
            for goal in line["goals"]
        )
        out.append(
            f"{name:<34} {line['phase']:<17} {'yes' if line['correct'] else 'NO':<8} {line['ms'] * 1e3:>10.1f} "
            f"{line['tflops']:>8.1f} {line['gbytes']:>7.0f} {line.get('peak_mib', 0):>8}  {goals}"
        )
    return "\n".join(out)


def write(folder: Path, lines: list[dict[str, Any]], bench: Any) -> Path:
    """JSON lines, with date, commit, device and versions in each; interpreted runs into a file of their own."""
    import torch
    from timing import append_lines, environment

    where = environment(("triton", "einops", "flash-linear-attention", "fa3-fwd", "flash-attn-4"))
    if bench.device != "cpu":
        where["machine"] = torch.cuda.get_device_name()
    name = "interpreted" if bench.device == "cpu" else where["machine"].lower().replace(" ", "-")
    path = folder / f"gpu_{name}.jsonl"
    path.unlink(missing_ok=True)
    append_lines(path, [{"noise": None, "ratio": None, **line, **where} for line in lines])
    return path


if __name__ == "__main__":
    sys.exit(main())
