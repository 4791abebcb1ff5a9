"""docs/your_mechanism.md runs as it is written, from the files that it shows to the last report."""

import importlib
import json
import re
import shlex
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from attnzoo_recipes.allowlist import ALLOWED, enforce
from attnzoo_recipes.compare.plan import Data, Variant, attention_of, plan, run_key
from attnzoo_recipes.diagnose.losses import next_token_losses
from attnzoo_recipes.diagnose.prune_study import Task, study
from attnzoo_recipes.model_config import build_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your_mechanism.md").read_text()
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "console" for line in block.splitlines()]
COMPARISONS = [line for line in LINES if "attnzoo-compare" in line]


def call(line):
    """A line of a console block, in this process."""
    command, *words = shlex.split(line)
    module, function = COMMANDS[command].split(":")
    with warnings.catch_warnings():
        # Of lightning's own code: its use of a class that torch is about to remove.
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
        getattr(importlib.import_module(module), function)(words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page shows, in an empty folder which is the current one."""
    for _, block in BLOCKS:
        named = re.match(r"# (\w+\.(?:py|yaml))\n", block)
        if named:
            (tmp_path / named[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    enforce((*ALLOWED, "mylab", "scratch"))
    yield tmp_path
    for name in ("mylab", "scratch"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread_setting():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_blocks_of_python_run(folder):
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "your_mechanism.md", "exec"), {"__name__": "example"})


def test_it_trains_generates_and_has_reports(folder, capsys):
    first = next(i for i, line in enumerate(LINES) if "attnzoo-compare" in line)
    wanted = [line for line in LINES if "attnzoo-compare" not in line and "scratch" not in line]
    assert [line.split()[0] for line in LINES[:first]] == ["attnzoo-pretrain", "attnzoo-generate"]
    assert [line.split()[0] for line in wanted[2:]] == ["attnzoo-spectrum", "attnzoo-heads", "attnzoo-prune"]
    for line in wanted:
        call(line)
    printed = capsys.readouterr().out
    assert re.search(r"^sample, \d+ characters after 'def ':$", printed, re.MULTILINE)
    assert printed.count("\ndef ") == 2
    for name in ("spectrum", "heads", "prune"):
        assert (folder / "runs" / name / "smoke" / "report.html").is_file()
    spectrum = json.loads((folder / "runs" / "spectrum" / "smoke" / "spectrum.json").read_text())
    assert {record["matrix"] for record in spectrum["records"]} == {"qk", "ov"}
    assert len(spectrum["records"]) == 2 * 2 * 4
    prune = json.loads((folder / "runs" / "prune" / "smoke" / "prune.json").read_text())
    assert max(prune["speed"]["prefill"]["error"]) < 1e-4
    assert prune["no_speed"] is None


def compare(folder, line):
    """What a comparison of the page says of its rows, and when each run finished."""
    call(line)
    rows = json.loads((folder / "runs" / "mine" / "results.json").read_text())["rows"]
    for row in rows:
        # Half a step of 8 in the width of two MLPs of three matrices each.
        assert abs(row["parameters"] - rows[0]["parameters"]) <= 4 * 3 * 32 * 2
        assert row["decode_tokens_per_second"] > 0
    runs = (folder / "runs" / "mine" / "cells").rglob("result.json")
    return [(row["mechanism"], row["seeds"], row["note"]) for row in rows], {p: p.stat().st_mtime_ns for p in runs}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_compared(folder):
    rows, runs = compare(folder, COMPARISONS[0])
    assert rows == [("mha", 1, ""), ("gated_value", 1, "")]
    assert len(runs) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_further_mechanism_joins_the_comparison(folder):
    _, before = compare(folder, COMPARISONS[0])
    rows, after = compare(folder, COMPARISONS[1])
    assert rows == [("mha", 1, ""), ("gated_value", 1, ""), ("shared_qk", 1, "")]
    assert len(after) == 3
    assert before.items() <= after.items()


def test_the_class_from_scratch_trains_and_has_its_heads_seen(folder):
    for line in LINES:
        if "shared_qk" in line and "attnzoo-compare" not in line:
            call(line)
    content = json.loads((folder / "runs" / "heads" / "shared_qk" / "heads.json").read_text())
    assert [len(layer["measures"]["sink"]) for layer in content["layers"]] == [4, 4]


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        (
            "embed_dim, causal = 32, True",
            r"without .*cache_bytes_per_token.*flops.*init_cache.*argument mask of forward",
        ),
        ("embed_dim = 32", "without .*causal"),
    ],
)
def test_what_is_missing_is_said_before_training(folder, body, missing, capsys):
    (folder / "mylab.py").write_text(
        "from torch import nn\n\nclass GatedValueAttention(nn.Module):\n"
        f"    {body}\n    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int):\n"
        "        super().__init__()\n    def forward(self, x):\n        return x\n"
    )
    for line in (LINES[0], COMPARISONS[0]) if "causal" in body else LINES[:1]:
        with pytest.raises(SystemExit) as stop:
            call(line)
        assert stop.value.code == 2
        (sentence,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert re.search(rf"got GatedValueAttention {missing}", sentence)
        assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize("line", [line for line in LINES if "smoke" in line and "scratch" not in line])
def test_nothing_is_imported_that_is_not_allowed(folder, line, capsys):
    (folder / "mylab.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    with pytest.raises(SystemExit) as stop:
        call(line.replace("--allow-import mylab ", ""))
    assert stop.value.code == 2
    if "runs/smoke" not in line:
        assert "--allow-import mylab" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def planned(config, match, allowed):
    """The plan of one mechanism in a small model."""
    model = {"embed_dim": 32, "attention": attention_of(config, allowed)}
    settings = {"model": model, "data": {"batch_size": 2, "block_size": 32}, "trainer": {"max_steps": 2}}
    return plan([(Variant(config.stem, config.stem), settings)], [Data("a", "a/val", 257)], match, allowed)


def test_an_own_mechanism_that_has_changed_is_another_run(folder):
    (one,) = planned(folder / "gated_value.yaml", "none", (*ALLOWED, "mylab"))
    before = run_key(one, 0)
    assert run_key(one, 0) == before
    (folder / "mylab.py").write_text((folder / "mylab.py").read_text() + "\n# changed\n")
    assert run_key(one, 0) != before


def test_other_settings_beside_the_mechanism_are_refused(folder):
    path = folder / "gated_value.yaml"
    path.write_text(path.read_text() + "  lr: 1.0e-2\ndata: {batch_size: 1}\n")
    with pytest.raises(ValueError, match=r"must hold nothing but class_path .* got data, model\.lr"):
        attention_of(path, ("attnzoo", "mylab"))


def test_a_mechanism_that_counts_no_flops_is_not_compared(folder):
    path = folder / "scratch.py"
    path.write_text(path.read_text().replace("def flops_by_part", "def other"))
    with pytest.raises(ValueError, match="SharedQueryKeyAttention does not count its FLOPs: define flops_by_part"):
        planned(folder / "shared_qk.yaml", "params", (*ALLOWED, "scratch"))


def test_a_mechanism_that_cannot_be_cut_has_curves_without_speed(folder):
    path = folder / "scratch.py"
    path.write_text(path.read_text().replace("def keep_heads", "def other"))
    model = build_model(
        {
            "vocab_size": 257,
            "embed_dim": 32,
            "num_layers": 1,
            "attention": {"class_path": "scratch.SharedQueryKeyAttention", "init_args": {"num_heads": 4}},
        },
        (*ALLOWED, "scratch"),
    ).eval()
    tokens = torch.arange(40).view(2, 20)
    calls = {"prefill": (lambda model: model(tokens), 40)}
    task = Task([tokens], next_token_losses, 2, False, "loss (nats per token)", None, 3.0, calls)
    result = study(
        model, task, percents=(50,), modes=("greedy",), normalize=("none",), granularity="example", unit="head",
        min_heads_per_layer=0, rescale=False, seeds=(0,), ablate=(), speed=(0, 50), rounds=1,
    )  # fmt: skip
    assert result.first.counts == [2] or result.first.counts == (2,)
    assert "cannot be pruned: define keep_heads" in result.obstacle
