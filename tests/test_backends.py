"""The choice of a backend and the table that shows it."""

import runpy
import subprocess
import sys

import pytest
import torch

import attnzoo
from attnzoo.__main__ import status, table
from attnzoo.backends import BACKENDS, check_name, choose, triton_obstacle
from attnzoo.ops.softmax_attention import softmax_attention


def test_auto_takes_the_first_without_an_obstacle():
    obstacles = {"flash": lambda: "no card", "sdpa": lambda: None, "eager": lambda: pytest.fail("asked too far")}
    assert choose("auto", "op", obstacles) == "sdpa"


def test_a_named_backend_runs_or_says_why_not():
    obstacles = {"flash": lambda: "no card", "eager": lambda: None}
    assert choose("eager", "op", obstacles) == "eager"
    with pytest.raises(attnzoo.BackendUnavailable, match="backend 'flash' cannot run op: no card"):
        choose("flash", "op", obstacles)
    with pytest.raises(attnzoo.BackendUnavailable, match="op has no triton backend, only flash, eager"):
        choose("triton", "op", obstacles)
    with pytest.raises(ValueError, match="backend must be one of auto, eager, sdpa, flash, triton, got 'cudnn'"):
        choose("cudnn", "op", obstacles)
    with pytest.raises(attnzoo.BackendUnavailable, match="no backend can run op: flash: no card"):
        choose("auto", "op", {"flash": lambda: "no card"})


def test_names():
    assert [check_name(name) for name in BACKENDS] == list(BACKENDS)


def test_every_backend_has_a_line_with_a_reason():
    lines = {s.name: s for s in status()}
    assert set(lines) == set(BACKENDS) - {"auto"}
    assert all(s.detail for s in lines.values())
    assert lines["eager"].available
    assert lines["sdpa"].available
    if not torch.cuda.is_available():
        assert not lines["flash"].available
    assert table().splitlines()[0].split() == ["backend", "runs", "with,", "or", "why", "not"]


def test_the_module_prints_the_table():
    out = subprocess.run([sys.executable, "-m", "attnzoo"], capture_output=True, text=True, check=True, timeout=120)
    first, *rows = out.stdout.splitlines()
    assert first.startswith(f"attnzoo {attnzoo.__version__}, torch {torch.__version__}")
    assert [row.split()[0] for row in rows] == ["backend", "flash", "triton", "sdpa", "eager"]
    assert out.stderr == ""


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_obstacle("cpu") == "needs CUDA tensors (or TRITON_INTERPRET=1, for tests), got cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_obstacle("cpu") is None
    monkeypatch.setattr("attnzoo.backends._HAS_TRITON", False)
    assert triton_obstacle("cpu") == "triton is not installed (pip install attnzoo[kernels])"


def test_auto_never_picks_the_interpreter():
    calls = ({}, {"softcap": 3.0}, {"sinks": torch.zeros(2, requires_grad=True)})
    for backend in ("auto", "triton"):
        for options in calls:
            q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
            out = softmax_attention(q, k, v, **options, backend=backend)
            names = " ".join(type(node).__name__ for node in ancestors(out.grad_fn)).lower()
            assert ("attnzoo" in names) == (backend == "triton")


def test_arguments_of_the_table_are_not_ignored(monkeypatch, capsys):
    for word, code, printed in (("--all", 2, "unrecognized arguments: --all"), ("--help", 0, "Print which backends")):
        monkeypatch.setattr(sys, "argv", ["attnzoo", word])
        monkeypatch.delitem(sys.modules, "attnzoo.__main__", raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module("attnzoo", run_name="__main__")
        assert end.value.code == code
        assert printed in "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_derivatives_are_left_to_the_definition():
    q, k, v, direction = (torch.randn(1, 4, 2, 8, dtype=torch.float64) for _ in range(4))

    def along(backend):
        return torch.func.jvp(lambda q: softmax_attention(q, k, v, backend=backend), (q,), (direction,))[1]

    assert torch.equal(along("auto"), along("eager"))
    with pytest.raises(attnzoo.BackendUnavailable, match="scaled_dot_product_attention has no forward-mode derivative"):
        along("sdpa")


def ancestors(node):
    """Every autograd node behind an output."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if one is not None and one not in seen:
            seen.add(one)
            todo += [parent for parent, _ in one.next_functions]
    return seen
