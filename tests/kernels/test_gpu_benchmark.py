"""The benchmark of the kernels runs without a GPU: every row is made, checked and written; no timing counts there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
DRY = ["--device", "cpu", "--interpret", "--tiny"]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The scripts as modules."""
    import importlib

    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("gpu", "gpu_cases", "gpu_cases_mechanisms", "gpu_measure")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def main(modules: dict[str, Any]) -> Callable[[list[str]], int]:
    return modules["gpu"].main


def lines_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("grid", ["mechanisms", "train", "decode", "others", "candidates"])
def test_the_dry_run_checks_its_rows(main, tmp_path, capsys, grid):
    only = {
        "mechanisms": "core M=8,mhla core T=2048,moh core 50%,moa", "train": "T=512 causal,latent",
        "decode": "G=1 B=1 S=1024,latent decode H=16 B=8", "others": "norm,module G=2", "candidates": "D=64",
    }[grid]  # fmt: skip
    assert main([*DRY, "--grid", grid, "--only", only, "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path)
    assert len(lines) >= 2
    for line in lines:
        assert line["correct"]
        assert line["interpreted"]
        assert line["ms"] > 0
        assert line["versions"]["torch"] == torch.__version__
        assert all(goal["met"] is None for goal in line["goals"])
        gradients = [name for name in line["errors"] if name.startswith("gradient")]
        assert bool(gradients) == (line["phase"] == "forward+backward")
    assert "not measured, out of budget: 0 rows" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_dry_run(main, tmp_path):
    assert main([*DRY, "--budget", "3000", "--out", str(tmp_path)]) == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_leaves_out_slow_tests_and_compiles_ahead():
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tests, rows = done.stdout.splitlines()
    assert tests == 'python -m pytest -q -n 14 -m "not slow and not aot" tests/kernels'
    assert rows == "python benchmarks/gpu.py --grid standard --precompile 14 --budget 480"


@pytest.mark.slow
def test_the_makefile_rehearsed(tmp_path):
    options = f"--device cpu --interpret --tiny --budget 60 --out {tmp_path}"
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", "GPU_TESTS=tests/kernels/test_tuning.py"]
    command += ["GPU_WORKERS=1", f"GPU_OPTIONS={options}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines_of(tmp_path)) >= 1


def test_the_budget_leaves_rows_out_by_name(main, tmp_path, capsys):
    assert main([*DRY, "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "softmax D=128 T=4096 causal" in capsys.readouterr().out.split("out of budget")[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --interpret and --tiny"),
        ([], "--device cuda needs a GPU"),
        ([*DRY, "--grid", "x"], "--grid must be one of train, decode, others, candidates, mechanisms, standard, first"),
        ([*DRY, "--precompile", "-1"], "--precompile must be a number of processes, got -1"),
    ],
)
def test_mistakes(main, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# A grid of rows that go wrong in every way, beside rows that go well.
PLANTED = """
import os, time
import torch
from gpu_cases import Row

def row(case, ours=torch.sin, make=None, peers=None, grad=False, phase="forward"):
    make = make or (lambda seed: [torch.linspace(0.1, 1, 300).requires_grad_(grad)])
    return Row(case, phase, {}, make, lambda x: ours(x[0]), lambda x: x[0].sin(), peers or {})

class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy * ctx.saved_tensors[0].cos()

def one_unwritten(x):
    y = x.sin()
    y[7] = torch.nan
    return y

def raising(error):
    def run(*_):
        raise error
    return run

def sleep(x):
    time.sleep(600)

def exit(x):
    os._exit(7)

def good(bench):
    yield row("good")

def bad(bench):
    yield row("wrong", ours=lambda x: x.sin() * 1.001)
    yield row("wrong gradient", ours=BadGradient.apply, grad=True)
    yield row("unwritten", ours=one_unwritten)
    yield row("raises", ours=raising(ValueError("no such kernel")))
    yield row("no inputs", make=raising(torch.OutOfMemoryError("CUDA out of memory")))
    yield row("cuda error", ours=raising(RuntimeError("CUDA error: an illegal memory access was encountered")))
    yield row("dies", ours=exit)
    yield row("hangs", ours=sleep)
    yield row("peer fails", peers={"sdpa a": lambda x: x[0].sin(), "sdpa b": raising(RuntimeError("no kernel")),
                                   "other": lambda x: x[0].sin()})

def broken(bench):
    raise ImportError("no package")

def last(bench):
    yield row("last", grad=True, phase="forward+backward")

ROWS = (good, bad, broken, last)
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    return path


def test_a_row_that_goes_wrong_is_named_and_the_others_go_on(main, planted, tmp_path, capsys, monkeypatch):
    processes = []
    start = subprocess.Popen

    def noted(*args: Any, **kwargs: Any) -> Any:
        processes.append(start(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    out = tmp_path / "out"
    status = main([*DRY, "--grid", str(planted), "--peers", "sdpa", "--row-limit", "3", "--out", str(out)])
    assert status == 1
    lines = {line["case"]: line for line in lines_of(out)}
    names = (
        "good, wrong, wrong gradient, unwritten, raises, no inputs, cuda error, dies, hangs, peer fails, broken, last"
    )
    assert list(lines) == names.split(", ")
    assert [name for name, line in lines.items() if line["correct"]] == ["good", "peer fails", "last"]
    assert lines["wrong"]["wrong"] == ["output"]
    assert lines["wrong gradient"]["wrong"] == ["gradient 0"]
    assert lines["wrong gradient"]["errors"]["gradient 0"][0] == pytest.approx(0.01, rel=0.1)
    assert lines["unwritten"]["not_finite"] == ["output"]
    failures = {name: line["failure"] for name, line in lines.items() if line["failure"]}
    assert failures == {
        "raises": "ValueError: no such kernel",
        "no inputs": "OutOfMemoryError: CUDA out of memory",
        "cuda error": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "dies": "the process ended with 7",
        "hangs": "the process took more than 3 s",
        "broken": "ImportError: no package",
    }
    assert lines["peer fails"]["peers"].keys() == {"sdpa a"}
    assert lines["peer fails"]["peers_failed"] == {"sdpa b": "RuntimeError: no kernel"}
    # A new process after the error of CUDA, the death and the time limit; none is left.
    measuring = [process for process in processes if "gpu_measure.py" in str(process.args)]
    assert len(measuring) == 4
    assert all(process.poll() is not None for process in measuring)
    printed = capsys.readouterr().out
    assert "wrong forward {}: WRONG output" in printed
    assert "not measured, out of budget: 0 rows" in printed


def grid_of(text: str) -> str:
    """The planted functions with another grid, of the rows named in the text."""
    head = PLANTED[: PLANTED.index("def good(bench)")]
    return f"{head}def rows(bench):\n{textwrap.indent(textwrap.dedent(text), '    ')}\nROWS = (rows,)\n"


def started(planted: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *DRY, "--grid", str(planted), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def with_pid(text: str, file: Path) -> str:
    return grid_of(f"open({str(file)!r}, 'w').write(str(os.getpid()))\n{text}")


def assert_ends(pid: int) -> None:
    """A process without a parent to wait for it may stay in the table of processes; it does nothing then."""
    status, end = Path(f"/proc/{pid}/status"), time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.2)
    assert time.monotonic() < end


def test_a_run_killed_in_the_middle_leaves_its_finished_rows_and_no_process(planted, tmp_path):
    former = tmp_path / "gpu_interpreted.jsonl"
    former.write_text('{"former": true}\n')
    rows = "yield row('good')\nyield row('second')\nyield row('hangs', ours=sleep)"
    planted.write_text(with_pid(rows, tmp_path / "pid"))
    with started(planted, tmp_path) as process:
        assert json.loads(former.read_text()) == {"former": True}
        assert [process.stdout.readline().split()[0] for _ in range(2)] == ["good", "second"]
        process.send_signal(signal.SIGKILL)
    assert [line["case"] for line in lines_of(tmp_path)] == ["good", "second"]
    assert_ends(int((tmp_path / "pid").read_text()))


def test_a_run_that_is_told_to_end_ends_its_process(planted, tmp_path):
    planted.write_text(with_pid("yield row('good')\nyield row('hangs', ours=sleep)", tmp_path / "pid"))
    with started(planted, tmp_path) as process:
        assert process.stdout.readline().startswith("good forward")
        process.terminate()
        assert process.wait(60) == 143
    assert_ends(int((tmp_path / "pid").read_text()))


def test_a_file_of_a_former_run_is_replaced_by_the_first_row(main, planted, tmp_path):
    former = tmp_path / "gpu_interpreted.jsonl"
    former.write_text('{"former": true}\n')
    options = [*DRY, "--grid", str(planted), "--out", str(tmp_path)]
    assert main([*options, "--budget", "0"]) == 0
    assert json.loads(former.read_text()) == {"former": True}
    assert main([*options, "--only", "good,last"]) == 0
    assert [line["case"] for line in lines_of(tmp_path)] == ["good", "last"]
    assert main([*options, "--only", "good,last,dies", "--skip", "good,dies"]) == 0
    assert [line["case"] for line in lines_of(tmp_path)] == ["last"]


@pytest.mark.slow
def test_the_budget_ends_a_row(main, planted, tmp_path, capsys):
    start = time.monotonic()
    assert main([*DRY, "--grid", str(planted), "--only", "good,hangs,last", "--budget", "25", "--row-limit", "500",
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    assert time.monotonic() - start < 60
    left_out = capsys.readouterr().out.split("out of budget: ")[1]
    assert left_out.splitlines()[:3] == ["2 rows", "  hangs forward {}", "  last forward+backward {}"]


def test_compiling_ahead_launches_nothing_and_names_what_fails(main, planted, tmp_path, capsys):
    assert main([*DRY, "--grid", str(planted), "--only", "good,raises,last", "--precompile", "2", "--out",
                 str(tmp_path)]) == 1  # fmt: skip
    printed = capsys.readouterr().out
    assert "not compiled ahead: row 1: ValueError: no such kernel" in printed
    assert "compiled ahead: 2 rows" in printed


def test_compiling_ahead_asks_for_every_launch_of_a_row(modules, monkeypatch):
    """In the interpreter nothing is launched; on a GPU each launch becomes a call of Triton's with warmup."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: pytest.fail("launched"))
    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: asked.append((args, kwargs)))
    bench = modules["gpu_cases"].Bench("cpu", tiny=True)
    rows = [row for rows_of in modules["gpu_cases"].GRIDS["first"] for row in rows_of(bench)]
    assert len(rows) >= 20
    for row in rows:
        assert modules["gpu_measure"].compile_ahead(row) is None
    with modules["gpu_measure"].warm_up():
        JITFunction.run("kernel", 1, grid=(3,), warmup=False, num_warps=4)
    assert asked == [((1,), {"grid": (3,), "warmup": True, "num_warps": 4})]


def pretended(cases: Any) -> Any:
    """A GPU in whose place the CPU stands; the rows' numbers are in float32, which the interpreter multiplies right."""
    bench = cases.Bench("cpu", tiny=True)
    bench.gpu = True
    return bench


def test_a_row_on_a_pretended_gpu(modules, monkeypatch):
    """All that is done on a GPU alone, with timers and the device's functions in their places."""
    from triton import testing

    cases, measure = modules["gpu_cases"], modules["gpu_measure"]
    for name, result in (("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None),
                         ("memory_allocated", 2**20), ("max_memory_allocated", 5 * 2**20)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(testing, "do_bench", lambda call, **_: [call(), 2.0][1])
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda call, **_: [call(), 1.0][1])
    bench = pretended(cases)
    rate = measure.measured_copy_rate(bench)
    assert rate == 2 * 4 * 2**10 / 2e-3
    rows = {row.name: row for rows_of in cases.GRIDS["train"] for row in rows_of(bench)}
    row = rows["softmax D=128 T=4096 causal forward+backward"]
    line, healthy = measure.measured(row, bench, ["sdpa"], rate)
    assert healthy
    assert line["correct"], line
    assert not line["interpreted"]
    assert (line["ms"], line["graph_ms"], line["peak_mib"]) == (2.0, 1.0, 4.0)
    assert line["peers"] == {"sdpa flash": 2.0}
    assert line["peers_failed"].keys() == {"sdpa cudnn", "sdpa efficient"}
    assert line["goals"] == [{"against": "sdpa flash", "goal": 0.85, "reached": 1.0, "met": True}]
    assert line["peers_graph_ms"] == {"sdpa flash": 1.0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: launch")))
    line, healthy = measure.measured(row, bench, [], rate)
    assert not healthy
    assert line["failure"] == "RuntimeError: CUDA error: launch"


def test_times_on_a_gpu_come_from_both_of_tritons_timers(modules, monkeypatch):
    from triton import testing

    cases, measure = modules["gpu_cases"], modules["gpu_measure"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {"plain": 0, "graph": 0}

    def timer(name: str) -> Callable[..., float]:
        def bench(call: Callable[[], None], **options: Any) -> float:
            assert options["return_mode"] == "median"
            call()
            calls[name] += 1
            return float(calls[name])

        return bench

    monkeypatch.setattr(testing, "do_bench", timer("plain"))
    monkeypatch.setattr(testing, "do_bench_cudagraph", timer("graph"))

    def no_graph(x: list[Tensor]) -> Tensor:
        if calls["plain"] == 9:
            raise RuntimeError("not while a stream is capturing")
        return x[0].sin()

    def absent(x: list[Tensor]) -> Tensor:
        raise ImportError("no such package")

    peers = {"sdpa": lambda x: x[0].sin(), "slow": no_graph, "absent": absent}
    row = cases.Row("row", "forward", {}, lambda seed: [torch.ones(3, requires_grad=True)], lambda x: x[0].sin(),
                    lambda x: x[0].sin(), peers)  # fmt: skip
    found = measure.times(row, peers, pretended(cases))
    found |= measure.graph_times(row, peers, found, pretended(cases))
    # Three rounds of three contenders.
    assert (found["ms"], found["peers"]) == (4.0, {"sdpa": 5.0, "slow": 6.0})
    assert found["noise"] == 7.0
    assert found["ratio"] == {"sdpa": 5 / 4, "slow": 6 / 4, "sdpa best": 5 / 4}
    assert (found["graph_ms"], found["peers_graph_ms"]) == (1.0, {"sdpa": 2.0})
    assert found["peers_failed"] == {
        "absent": "ImportError: no such package",
        "slow, in a graph": "RuntimeError: not while a stream is capturing",
    }


def test_a_compiled_peer_is_compiled_for_every_shape_and_never_left_as_it_is(modules):
    compiled, limit = modules["gpu_cases"].compiled, torch._dynamo.config.recompile_limit
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def formula(x: list[Tensor]) -> Tensor:
        return x[0].sin()

    for n in range(1, limit + 3):
        for grad in (False, True):
            peer, x = compiled(formula, backend=backend), [torch.ones(n, requires_grad=grad)]
            for _ in range(2):
                assert torch.equal(peer(x), x[0].sin())
    assert len(graphs) == 2 * (limit + 2)

    def in_two_graphs(x: list[Tensor]) -> Tensor:
        torch._dynamo.graph_break()
        return x[0].sin()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(in_two_graphs, backend=backend)([torch.ones(3)])


def test_flex_attention_is_compiled_for_every_row(modules):
    """With its mask, as one graph; the sizes are those of a tiny row."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    for T in range(128, 128 * 11, 128):
        q, k, v = torch.randn(1, T, 2, 16), torch.randn(1, T, 1, 16), torch.randn(1, T, 1, 16)
        peer = modules["gpu_cases"].flex_peer(True, T, "cpu", backend=backend)
        expected = modules["gpu_cases"]._sdpa([q, k, v], True, None)
        torch.testing.assert_close(peer([q, k, v]), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 10


def test_half_precision_is_held_to_its_own_rounding_whatever_the_answer_s_dtype(modules, monkeypatch):
    """A kernel that takes bfloat16 and gives float32, as linear attention's does."""
    cases, measure = modules["gpu_cases"], modules["gpu_measure"]

    def product(x: list[Tensor], factor: float = 1.0) -> Tensor:
        return factor * (x[0] @ x[0].mT).bfloat16().to(torch.promote_types(x[0].dtype, torch.float32))

    def formula(x: list[Tensor]) -> Tensor:
        x = [x[0].to(torch.promote_types(x[0].dtype, torch.float32))]
        return x[0] @ x[0].mT

    def row(factor: float) -> Any:
        return cases.Row("row", "forward", {}, lambda _: [torch.randn(40, 40).bfloat16()],
                         lambda x: product(x, factor), formula, {})  # fmt: skip

    assert measure.correctness(row(1.0), cases.Bench("cpu", tiny=True))["correct"]
    assert not measure.correctness(row(1.05), cases.Bench("cpu", tiny=True))["correct"]


def test_parts_of_a_call_are_compared_with_the_same_parts_of_the_answer(modules):
    """Gradients of the sliced formula are slices of the whole call's gradients; a wrong last group is seen."""
    cases, measure = modules["gpu_cases"], modules["gpu_measure"]
    shapes = (3, 9, 4, 8), (3, 9, 2, 8), (3, 9, 2, 8)
    parts = cases.head_parts(3, 4, 2)
    assert [part.answer[0] for part in parts] == [slice(0, 1), slice(2, 3)]

    def row(spoil: Callable[[list[Tensor]], list[Tensor]]) -> Any:
        bench = cases.Bench("cpu", tiny=True)
        eager = lambda x: cases._attention(x, True, "eager")  # noqa: E731
        return cases.Row("row", "forward+backward", {}, lambda seed: bench.tensors(seed, *shapes, grad=True),
                         lambda x: eager(spoil(x)), eager, {}, parts=parts)  # fmt: skip

    def shifted(x: list[Tensor]) -> list[Tensor]:
        scale = torch.ones(3, 1, 2, 1)
        scale[2, :, 1] = 1.001
        return [x[0], x[1] * scale, x[2]]

    found = measure.correctness(row(lambda x: x), cases.Bench("cpu", tiny=True))
    assert found["correct"]
    assert found["errors"].keys() == {"output", "gradient 0", "gradient 1", "gradient 2"}
    assert not measure.correctness(row(shifted), cases.Bench("cpu", tiny=True))["correct"]
