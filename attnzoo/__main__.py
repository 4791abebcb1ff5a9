"""`python -m attnzoo`: what can run on this machine."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass

import torch

import attnzoo
from attnzoo.backends import triton_obstacle
from attnzoo.ops.flash import installed


@dataclass(frozen=True)
class BackendStatus:
    """One line of the table: a backend, whether it can run on this machine, and why or why not."""

    name: str
    available: bool
    detail: str


def status() -> list[BackendStatus]:
    """The state of every backend on this machine, fastest first."""
    packages = ", ".join(f"{name} {version}" for name, version in installed())
    cuda = torch.cuda.is_available()
    if not packages:
        flash = BackendStatus("flash", False, "flash-attn 2, 3 or 4 is not installed")
    elif not cuda:
        flash = BackendStatus("flash", False, f"needs a CUDA device; installed: {packages}")
    else:
        flash = BackendStatus("flash", True, packages)
    obstacle = triton_obstacle()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        flash,
        BackendStatus("triton", obstacle is None, obstacle or ("interpreter, for tests" if interpreted else device)),
        BackendStatus("sdpa", True, f"torch {torch.__version__} scaled_dot_product_attention on {device}"),
        BackendStatus("eager", True, "plain PyTorch, the definition; any device, float64 too"),
    ]


def table() -> str:
    """The table that `python -m attnzoo` prints."""
    rows = [(s.name, "yes" if s.available else "no", s.detail) for s in status()]
    rows.insert(0, ("backend", "runs", "with, or why not"))
    return "\n".join(f"{name:<8} {runs:<5} {detail}" for name, runs, detail in rows)


if __name__ == "__main__":
    argparse.ArgumentParser(
        "python -m attnzoo", description="Print which backends can run on this machine, and why the others cannot."
    ).parse_args()
    print(f"attnzoo {attnzoo.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(table())
