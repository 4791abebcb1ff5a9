"""The benchmark of the kernels runs without a GPU: every row is made, checked and written; no timing counts there."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")


@pytest.fixture
def main(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return runpy.run_path(str(SCRIPT))["main"]


@needs_no_gpu
@pytest.mark.parametrize(
    "only", ["qk_norm_rope", "latent", "T=512", "decode G=1 B=1", "core M=8", "mhla core T=2048", "moh core 50%", "moa"]
)
def test_the_dry_run_checks_its_rows(main, tmp_path, capsys, only):
    assert main(["--device", "cpu", "--interpret", "--tiny", "--only", only, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) >= 2
    for line in lines:
        assert line["correct"]
        assert line["interpreted"]
        assert line["ms"] > 0
        assert line["versions"]["torch"] == torch.__version__
        assert all(goal["met"] is None for goal in line["goals"])
    printed = capsys.readouterr().out
    assert "not measured, out of budget: 0 rows" in printed


@needs_no_gpu
@pytest.mark.slow
def test_the_whole_dry_run(main, tmp_path):
    assert main(["--device", "cpu", "--interpret", "--tiny", "--out", str(tmp_path)]) == 0


@needs_no_gpu
def test_the_budget_leaves_rows_out_by_name(main, tmp_path, capsys):
    assert main(["--device", "cpu", "--interpret", "--tiny", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "softmax D=128 T=4096 causal" in capsys.readouterr().out.split("out of budget")[1]


@needs_no_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --interpret and --tiny"),
        ([], "--device cuda needs a GPU"),
        (
            ["--device", "cpu", "--interpret", "--tiny", "--grid", "x"],
            "--grid must be one of standard, train, decode, mechanisms",
        ),
    ],
)
def test_mistakes(main, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
