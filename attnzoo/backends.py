"""What can run an operation here, and why the rest cannot.

An operation's name is its meaning; a backend is a way to run it. `python -m attnzoo` prints what can run here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch

BACKENDS = ("auto", "eager", "sdpa", "flash", "triton")
"""Names that a module's `backend` argument takes."""


class BackendUnavailable(RuntimeError):  # noqa: N818  (the public name users catch)
    """A backend that was asked for by name cannot serve the call; the message says which condition fails."""


def check_name(backend: str) -> str:
    """Return backend if it is one of BACKENDS, else raise ValueError."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def choose(
    backend: str,
    operation: str,
    obstacles: Mapping[str, Callable[[], str | None]],
    device: torch.device | None = None,
) -> str:
    """Pick the backend that runs a call.

    obstacles holds the operation's backends from fastest to slowest on a GPU, each with a function that returns
    None or one sentence why it cannot serve this call. "auto" takes the first without an obstacle, but on another
    device "flash" and "triton" come last: they need a GPU, or an interpreter, which is for tests. A named backend is
    taken or `BackendUnavailable` is raised, and nothing falls back silently.
    """
    if backend == "auto":
        on_gpu = device is None or device.type == "cuda"
        names = obstacles if on_gpu else sorted(obstacles, key=("flash", "triton").__contains__)
        for name in names:
            if obstacles[name]() is None:
                return name
        reasons = "; ".join(f"{name}: {obstacle()}" for name, obstacle in obstacles.items())
        raise BackendUnavailable(f"no backend can run {operation}: {reasons}")
    if backend not in obstacles:
        check_name(backend)
        raise BackendUnavailable(f"{operation} has no {backend} backend, only {', '.join(obstacles)}")
    reason = obstacles[backend]()
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {operation}: {reason}")
    return backend


def triton_obstacle(device: torch.device | str = "cuda") -> str | None:
    """Why our Triton kernels cannot run on tensors of that device, or None.

    On the CPU they run in Triton's interpreter, if the environment had TRITON_INTERPRET=1 from the start.
    """
    if not _HAS_TRITON:
        return "triton is not installed (pip install attnzoo[kernels])"
    if not _HAS_KERNELS:
        return "the package attnzoo_kernels is not installed"
    kind = torch.device(device).type
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if kind != "cuda":
        return f"needs CUDA tensors (or TRITON_INTERPRET=1, for tests), got {kind}"
    return None if torch.cuda.is_available() else "needs a CUDA or ROCm device"


def kernel_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why our Triton kernels cannot run on tensors of that device and dtype, or None."""
    missing = triton_obstacle(device)
    if missing is not None:
        return missing
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, got {dtype}"
    if torch._C._are_functorch_transforms_active():
        return "the kernels have no rules for the transforms of torch.func"
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


# Looked up once: asking the import system costs as much as a whole decoding step's attention.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_KERNELS = importlib.util.find_spec("attnzoo_kernels") is not None
