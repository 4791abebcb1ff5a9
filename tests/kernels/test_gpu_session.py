"""A prepared session on a GPU: limits of its steps, what a failure leaves out, and the whole of it rehearsed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DRY = ["--device", "cpu", "--interpret", "--tiny"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("gpu_session")


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "session.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def planned(session: Any, monkeypatch: pytest.MonkeyPatch, *steps: tuple[str, float, tuple[str, ...]]) -> None:
    monkeypatch.setitem(session.PLANS, "first", tuple(session.Step(*step) for step in steps))


@pytest.mark.slow
def test_a_step_that_is_late_is_ended_with_all_that_it_started_and_the_next_one_runs(session, monkeypatch, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); open({str(child)!r}, 'w')"
        ".write(str(p.pid)); time.sleep(99)"
    )
    planned(
        session, monkeypatch, ("late", 5.0, ("python", "-c", code)), ("next", 60.0, ("python", "-c", "print(3)")),
        ("fails", 60.0, ("python", "-c", "raise SystemExit(4)")),
    )  # fmt: skip
    start = time.monotonic()
    assert session.main(["--plan", "first", "--out", str(tmp_path), *DRY]) == 1
    assert time.monotonic() - start < 60
    lines = lines_of(tmp_path)
    assert {name: line["status"] for name, line in lines.items()} == {"late": "late", "next": 0, "fails": 4}
    assert (tmp_path / "next.log").read_text() == "3\n"
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.slow
def test_tests_that_are_late_leave_their_results(session, monkeypatch, tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\ndef test_one(): pass\n\ndef test_two(): time.sleep(99)\n")
    command = session.tests("slow", "-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:xdist", str(slow))
    monkeypatch.setattr(session, "dry", lambda *_: [])
    planned(session, monkeypatch, ("slow", 40.0, command))
    assert session.main(["--plan", "first", "--out", str(tmp_path), *DRY]) == 1
    assert lines_of(tmp_path)["slow"]["status"] == "late"
    assert "test_one" in (tmp_path / "slow.xml").read_text()


def test_steps_without_time_are_left_out(session, monkeypatch, tmp_path):
    planned(session, monkeypatch, ("step", 9.0, ("python", "-c", "")))
    assert session.main(["--plan", "first", "--out", str(tmp_path), "--seconds", "0", *DRY]) == 1
    assert lines_of(tmp_path)["step"]["status"] == "left out"


def test_rows_of_families_that_fail_are_left_out(session, tmp_path):
    results = tmp_path / "smoke.xml"
    assert session.skipped_rows(results) == []
    case = '<testcase name="test_answers[{}]">{}</testcase>'
    results.write_text(
        "<testsuites><testsuite>"
        + case.format("softmax-64 causal-bf16", "<failure/>")
        + case.format("latent decode-16 heads-bf16", "<error/>")
        + case.format("moa-512 to 128-bf16", "<skipped/>")
        + case.format("moh-64-bf16", "")
        + "</testsuite></testsuites>"
    )
    assert session.skipped_rows(results) == ["latent 128", "latent decode", "module", "softmax"]


def test_the_names_of_families_are_those_of_rows(session, monkeypatch):
    """Or a failure in the smoke tests would leave out nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_cases import Bench
    from gpu_cases_mechanisms import GRIDS

    from tests.kernels.smoke import CASES, NEEDLES

    rows = [row.name for rows_of in GRIDS["standard"] for row in rows_of(Bench("cpu", tiny=True))]
    families = CASES.keys() | NEEDLES.keys()
    beginnings = [start for family in families for start in session.ROWS_OF.get(family, (family,))]
    assert [start for start in beginnings if not any(row.startswith(start) for row in rows)] == []
    assert [row for row in rows if not any(row.startswith(start) for start in beginnings)] == []


def test_versions_and_rates(session, monkeypatch):
    from gpu_cases import Bench
    from triton import testing

    monkeypatch.setattr(testing, "do_bench", lambda call, **_: [call(), 2.0][1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    bench = Bench("cpu", tiny=True)
    assert session.versions(bench)["torch"] == torch.__version__
    bench.gpu = True
    found = session.versions(bench)
    assert (found["device"], found["capability"]) == ("NVIDIA X", (9, 0))
    assert found["tflops"] == pytest.approx(2 * 16**3 / 2e-3 * 1e-12)
    assert found["copy_gbytes"] == pytest.approx(2 * 4 * 2**10 / 2e-3 * 1e-9)


@pytest.mark.parametrize("plan", ["first", "second"])
def test_a_plan_fits_its_call(session, plan):
    assert sum(step.seconds for step in session.PLANS[plan]) <= {"first": 480, "second": 200}[plan]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("plan", ["first", "second"])
def test_the_whole_plan_is_rehearsed(session, plan, tmp_path):
    session.main(["--plan", plan, "--out", str(tmp_path), "--seconds", "1500", *DRY])
    lines = lines_of(tmp_path)
    assert list(lines) == [step.name for step in session.PLANS[plan]]
    failed = {name for name, line in lines.items() if line["status"] != 0}
    assert not failed, [lines[name] for name in failed]
    measured = {"first": {"rows"}, "second": {"candidates", "compiled_peers"}}[plan]
    assert {path.parent.name for path in tmp_path.glob("*/gpu_interpreted.jsonl")} == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--plan and --out are needed"),
        (["--plan", "first", "--out", "x", "--device", "cpu"], "--device cpu needs --interpret and --tiny"),
    ],
)
def test_mistakes(session, capsys, arguments, message):
    with pytest.raises(SystemExit):
        session.main(arguments)
    assert message in capsys.readouterr().err
