"""What a call would launch, compiled without a GPU: registers, spills, shared memory and loop length of every kernel.

    launches = record(lambda: softmax_attention(q, k, v, scale=0.1))
    resources = compile_launch(launches[0], "sm_90")

Needs a process without Triton's interpreter; the tensors may be on the CPU and are never read.
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
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
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
    """What one program of a compiled kernel takes.

    Attributes:
        kernel: its name.
        target: "sm_90" and the like.
        registers: of a thread.
        spills: bytes of a thread; on gfx942 registers.
        shared: bytes of shared memory.
        instructions: `loop_length`; 0 on gfx942.
        serialized: `is_serialized`; never on gfx942.
        seconds: of the processor to compile it, the assembler's included.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    instructions: int
    serialized: bool
    seconds: float


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call would make, recorded instead of carried out."""
    launches: list[Launch] = []
    run = JITFunction.run

    def keep(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        launches.append(Launch(self, named | {k: v for k, v in kwargs.items() if k in self.arg_names}, options))

    JITFunction.run = keep
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for one of TARGETS, specialised as the launch itself would be."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        kind, aligned = _type_of(value, not parameter.do_not_specialize)
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
    registers, spills, listing = _usage(compiled.asm)
    return Resources(
        launch.name, target, registers, spills, int(compiled.metadata.shared), loop_length(listing),
        is_serialized(listing), seconds,
    )  # fmt: skip


def loop_length(listing: str) -> int:
    """Instructions of the innermost loop with the most matrix products, on the shortest way through, 0 without one.

    That is what a tile that needs no mask costs a warp. listing is what `cuobjdump -sass` prints.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)]
    jumps = [(at, int(jump[1], 16)) for at, text in code if (jump := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    loops = [(target, at) for at, target in jumps if target < at]
    lengths = []
    for first, last in loops:
        if any(first <= start and end <= last and (start, end) != (first, last) for start, end in loops):
            continue
        skipped: set[int] = set()
        for at, target in jumps:
            if first <= at < target <= last:
                skipped |= {place for place, _ in code if at < place < target}
        body = [text for at, text in code if first <= at <= last and at not in skipped]
        lengths.append((-sum("MMA" in text for text in body), len(body)))
    products, length = min(lengths, default=(0, 0))
    return length if products else 0


def is_serialized(listing: str) -> bool:
    """Whether each warpgroup product waits for the one before, as the assembler arranges where it sees a hazard."""
    return 4 <= len(re.findall(r"\bHGMMA\.", listing)) <= len(re.findall(r"\bWARPGROUP\.ARRIVE\b", listing))


def _type_of(value: Any, specialised: bool) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether it is a multiple of 16, as its launcher would specialise."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_ELEMENT[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, torch.Tensor):
        return f"*{_ELEMENT[value.dtype]}", True
    if value is None or isinstance(value, bool) or (value == 1 and specialised):
        return "constexpr", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), specialised and value % 16 == 0
    return ("fp32" if isinstance(value, float) else "constexpr"), False


def _usage(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers of a thread, spills, and the listing of the instructions, empty on gfx942."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text), ""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump runs nvdisasm, which it looks for in the path.
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [str(tools / "cuobjdump"), option, file.name],
                check=True, capture_output=True, text=True, env=environment,
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )  # fmt: skip
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), listing


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report must contain {pattern}, got {text[:200]!r}")
    return int(match.group(1))
