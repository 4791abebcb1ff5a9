"""What a call would launch, compiled without a GPU: registers, spilled bytes and shared memory of every kernel.

    launches = record(lambda: softmax_attention(q, k, v, scale=0.1))
    resources = compile_launch(launches[0], "sm_90")

Needs a process without Triton's interpreter; the tensors may lie on the CPU and are never read.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may take."""

_ELEMENT = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", torch.int8: "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and how a program is run (num_warps, num_stages, ...)."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes. Spills are bytes of a thread (on gfx942 registers), seconds
    those of the processor, the assembler's included."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    seconds: float


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes, which are not carried out."""
    launches: list[Launch] = []
    run = JITFunction.run

    def keep(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        launches.append(Launch(self, named | {k: v for k, v in kwargs.items() if k in self.arg_names}, options))

    JITFunction.run = keep  # type: ignore[method-assign, assignment]
    try:
        call()
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
    return launches


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for "sm_80", "sm_90" or "gfx942", specialised as the launch itself would be."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        kind, aligned = _type_of(value)
        if parameter.is_constexpr or kind == "constexpr":
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if aligned:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    start = sum(os.times()[:4])
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    seconds = sum(os.times()[:4]) - start
    registers, spills = _usage(compiled.asm)
    return Resources(launch.name, target, registers, spills, int(compiled.metadata.shared), seconds)


def _type_of(value: Any) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it is a multiple of 16, as its launcher would specialise."""
    if isinstance(value, torch.Tensor):
        return f"*{_ELEMENT[value.dtype]}", True
    if value is None or isinstance(value, bool) or value == 1:
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return ("fp32" if isinstance(value, float) else "constexpr"), False


def _usage(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers of a thread and spills."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report must contain {pattern}, got {text[:200]!r}")
    return int(found.group(1))
