"""The sweep of tiles runs without a GPU: candidates that fail, end their process or answer wrongly are named."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")

PLANTED = """
import os

from gpu_tune_cases import QUERIES_KEYS, Sweep, configs, forward
from attnzoo_kernels.softmax_attention import softmax_attention


def planted(bench):
    q, k, v = bench.tensors(0, *[(1, 20, 1, 8)] * 3)

    def run(config):
        rows = 0 if config is None else config["BLOCK_T"]
        if rows == 256:
            raise RuntimeError("out of resource: shared memory")
        if rows == 512:
            os._exit(3)
        return softmax_attention(q, k, v, scale=0.5)[0] * (1.5 if rows == 128 else 1.0)

    tiles = "16x16/4/1 256x16/4/1 128x16/4/1 512x16/4/1 32x16/4/2"
    for kernel in ("softmax_attention_fwd", "softmax_attention_bwd_dq"):
        yield Sweep(kernel, kernel, {"T": 20}, lambda: forward(run), configs(QUERIES_KEYS, tiles))


SWEEPS = (planted,)
"""


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the sweep with these options: its exit status and its lines."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    main = importlib.import_module("gpu_tune").main

    def run(*options: str) -> tuple[int, list[dict[str, Any]]]:
        status = main(["--device", "cpu", "--interpret", "--tiny", "--out", str(tmp_path), *options])
        path = tmp_path / "gpu_tune.jsonl"
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run


def test_two_sweeps_are_timed_between_the_tables_tiles(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = tune("--only", "softmax_dq_64,decode_b8", "--processes", "1", "--budget", "60")
    assert status == 0
    for sweep, kernel in (("softmax_dq_64", "softmax_attention_bwd_dq"), ("decode_b8", "decode_attention_fwd")):
        own = [line for line in lines if line["sweep"] == sweep]
        assert [own[0]["role"], own[-1]["role"]] == ["table", "table again"]
        assert len(own) > 5
        for line in own:
            assert line["failure"] is None
            assert line["kernel"] == kernel
            assert line["ms"] > 0
            assert line["ratio"] == pytest.approx(own[0]["ms"] / line["ms"])
            # What was launched is what was asked for.
            asked = {name: size for name, size in line["tiles"].items() if name != "splits"}
            given = {"tiles": asked, "num_warps": line["num_warps"], "num_stages": line["num_stages"]}
            assert line["launched"] == given
        assert all(line["error"] < 1e-2 for line in own[1:])
    assert "softmax_dq_64" in capsys.readouterr().out


def test_candidates_that_fail_end_or_answer_wrongly_are_named_and_the_others_timed(tune: Any, tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    status, lines = tune("--sweeps", str(file), "--processes", "1", "--budget", "60")
    assert status == 0
    own = [line for line in lines if line["sweep"] == "softmax_attention_fwd"]
    by_rows = {line["tiles"]["BLOCK_T"]: line for line in own if line["role"] == "candidate"}
    assert sorted(by_rows) == [16, 32, 128, 256, 512]
    assert "out of resource: shared memory" in by_rows[256]["failure"]
    assert "wrong: 5.0e-01" in by_rows[128]["failure"]
    assert by_rows[128]["ms"] is None
    assert "ended with 3" in by_rows[512]["failure"]
    assert by_rows[16]["ms"] > 0
    assert by_rows[32]["ms"] > 0
    # A forward call does not launch a kernel of the backward pass.
    others = [
        line["failure"] for line in lines if line["sweep"] == "softmax_attention_bwd_dq" and line["role"] == "table"
    ]
    assert others == ["softmax_attention_bwd_dq was not launched"]


def test_nothing_is_written_where_the_budget_ends_before_a_process_has_started(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = tune("--processes", "1", "--budget", "0.2")
    assert status == 1
    assert lines == []
    assert "no process has started" in capsys.readouterr().err
