"""A short session on a GPU, prepared: every step with a time limit of its own, what it found written as it ends.

    python benchmarks/gpu_session.py --plan first --out OUT        # 480 seconds: is it right, and how fast
    python benchmarks/gpu_session.py --plan second --out OUT       # 200 seconds: candidates and compiled peers
    python benchmarks/gpu_session.py --plan first --out OUT --device cpu --interpret --tiny     # rehearsed anywhere

OUT/session.jsonl has a line for each step, OUT/NAME.log what it printed, OUT/NAME.xml its tests, OUT/NAME.jsonl those
that failed, OUT/NAME/ its rows.
Rows of families that the smoke tests refuse are left out. Exit status 1: a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
GPU = ("python", "benchmarks/gpu.py")
PYTEST = ("python", "-m", "pytest")
# A plugin that warns, as one of benchmarks does beside xdist, ends pytest: here warnings are errors.
PLUGINS = ("xdist.plugin", "pytest_timeout", "_hypothesis_pytestplugin", "pytest_failures")
SMOKE = "tests/kernels/test_gpu_smoke.py"
# Those that need no compiler.
PEERS = "sdpa,loop,torch,dense,official,plain,two,softmax,formed"
# Families of the smoke tests whose kernels run in rows of another name.
ROWS_OF = {"softmax": ("softmax", "latent 128", "module"), "latent": ("latent 128",)}


@dataclass(frozen=True)
class Step:
    """A command with its limit in seconds.

    In it {out} is the session's folder, {step} the step's name, {skip} the rows to leave out and {tests} what to test.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


def tests(name: str, *arguments: str) -> tuple[str, ...]:
    """pytest with its result in NAME.xml, and with no plugins but those that the tests need."""
    plugins = [word for plugin in PLUGINS for word in ("-p", plugin)]
    return (
        *PYTEST,
        "-q",
        "-p",
        "no:cacheprovider",
        *plugins,
        f"--junitxml={{out}}/{name}.xml",
        f"--failures={{out}}/{name}.jsonl",
        *arguments,
    )


def rows(grid: str, seconds: float, *arguments: str) -> tuple[str, ...]:
    """The rows of a grid; the rest of the step is for the start and the table."""
    limits = "--budget", f"{seconds:g}", "--row-limit", f"{min(60.0, seconds / 2):g}"
    return (*GPU, "--grid", grid, *limits, "--out", "{out}/{step}", *arguments)


# The plans of a session of 12 minutes in two calls. "auto" and graph captures are steps of their own: what they find is
# about dispatch and modules, not about a kernel.
PLANS: dict[str, tuple[Step, ...]] = {
    "first": (
        Step("versions", 30, ("python", "benchmarks/gpu_session.py", "--versions")),
        Step("precompile", 60, rows("first,tests/kernels/smoke.py", 50, "--precompile", "14", "--compile-only")),
        Step("smoke", 75, tests("smoke", "-n", "8", SMOKE, "-k", "TestOnAGPU and not auto and not graph")),
        Step("auto", 55, tests("auto", "-n", "12", SMOKE, "-k", "TestOnAGPU and (auto or graph)")),
        Step("tests", 120, tests("tests", "-n", "14", "-m", "not slow and not aot", "{tests}", f"--ignore={SMOKE}")),
        Step("rows", 140, rows("first", 130, "--peers", PEERS, "--skip", "{skip}")),
    ),
    "second": (
        Step("failed", 40, tests("failed", "-n", "8", SMOKE, "-k", "TestOnAGPU", "--maxfail=20")),
        Step("candidates", 95, ("python", "benchmarks/gpu_tune.py", "--budget", "85", "--processes", "14", "--out",
                                "{out}/{step}")),
        Step("compiled peers", 65, rows("first", 55, "--peers", "eager,compile,flex", "--only",
                                        "dcmha core,qk_norm_rope norm,softmax D=128 T=4096 causal")),
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, help="which of the two calls")
    parser.add_argument("--out", type=Path, help="folder of everything that the session finds")
    parser.add_argument("--seconds", type=float, default=480.0, help="for the whole plan; later steps are left out")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --interpret")
    parser.add_argument("--interpret", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="shrink every row and take few tests")
    parser.add_argument("--only", help="steps of the plan (a,b)")
    parser.add_argument("--versions", action="store_true", help="print what is installed and how fast the device is")
    options = parser.parse_args(arguments)
    if options.versions:
        print(json.dumps(versions()))
        return 0
    if options.plan is None or options.out is None:
        parser.error("--plan and --out are needed")
    if options.device == "cpu" and not (options.interpret and options.tiny):
        parser.error("--device cpu needs --interpret and --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    failed = False
    steps = PLANS[options.plan]
    if options.only is not None:
        named = options.only.split(",")
        if unknown := set(named) - {step.name for step in steps}:
            parser.error(
                f"--only must be of {', '.join(step.name for step in steps)}, got {', '.join(sorted(unknown))}"
            )
        steps = tuple(step for step in steps if step.name in named)
    for step in steps:
        line = run(step, options, deadline)
        with (options.out / "session.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line), flush=True)
        failed |= line["status"] != 0
    return 1 if failed else 0


def run(step: Step, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Run a step within its limit and what is left of the session; the line says how it ended."""
    left = min(step.seconds, deadline - time.monotonic())
    line: dict[str, Any] = {"plan": options.plan, "step": step.name, "limit": round(left, 1)}
    if left < 1.0:
        return line | {"status": "left out"}
    skip = skipped_rows(options.out / "smoke.xml")
    few = "tests/kernels/test_tuning.py"
    name = step.name.replace(" ", "_")
    words = {
        "{out}": str(options.out), "{step}": name, "{skip}": ",".join(skip),
        "{tests}": few if options.tiny else "tests/kernels",
    }  # fmt: skip
    command = [sys.executable if word == "python" else filled(word, words) for word in step.command]
    command += dry(step, options)
    start = time.monotonic()
    with (options.out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "benchmarks")},
        )  # fmt: skip
        try:
            status: int | str = process.wait(left)
        except subprocess.TimeoutExpired:
            status = "late"
            end(process)
    found = {"status": status, "seconds": round(time.monotonic() - start, 1), "command": " ".join(command[1:])}
    return line | found | ({"skipped_rows": skip} if "{skip}" in step.command else {})


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started: first so that it can write what it has, as pytest does, then for good."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(5.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def filled(word: str, words: dict[str, str]) -> str:
    """A word of a command with its places filled."""
    for place, text in words.items():
        word = word.replace(place, text)
    return word


def dry(step: Step, options: argparse.Namespace) -> list[str]:
    """What a rehearsal adds to a step's command."""
    if options.device != "cpu":
        return []
    if "pytest" in step.command:
        return ["-n", "1"]
    if "--versions" in step.command:
        return []
    processes = [word for word in ("--precompile", "--processes") if word in step.command]
    return ["--device", "cpu", "--interpret", "--tiny", *[word for name in processes for word in (name, "1")]]


def skipped_rows(junit: Path) -> list[str]:
    """Beginnings of the names of rows whose family failed a smoke test."""
    if not junit.is_file():
        return []
    failed: set[str] = set()
    for case in ET.parse(junit).iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            continue
        family = case.get("name", "").partition("[")[2].split("-")[0]
        failed |= set(ROWS_OF.get(family, (family,)))
    return sorted(failed - {""})


def versions(bench: Any = None) -> dict[str, Any]:
    """What is installed, the rate of a copy and of a matrix product of 8,192."""
    import torch
    import triton
    from gpu_measure import Bench, measured_copy_rate, timed

    found: dict[str, Any] = {
        "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    bench = bench or Bench("cuda" if torch.cuda.is_available() else "cpu", tiny=False)
    if not bench.gpu:
        return found
    x = bench.tensors(0, (bench.size(8192, 16),) * 2)[0]

    def product() -> None:
        torch.mm(x, x)

    return found | {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
        "tflops": 2 * x.shape[0] ** 3 / timed(product, bench) * 1e-9,
        "copy_gbytes": measured_copy_rate(bench) * 1e-9,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
