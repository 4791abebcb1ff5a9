"""Compiles what linear attention launches for a target without a GPU and prints what each kernel takes.

    python -m tests.kernels.linear_attention_resources sm_90 bfloat16

Exits with 1 if a kernel spills registers or needs more shared memory than a program may have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from attnzoo_kernels import aot
from attnzoo_kernels.linear_attention import linear_attention, linear_attention_finish, linear_attention_step

Key = tuple[object, ...]
# Widths of keys and values, tokens of a block, weights' heads (0: none), causal, packed.
CALLS = (
    (128, 128, 64, 1, True, False),
    (128, 128, 64, 0, True, True),
    (128, 128, 256, 4, True, False),
    (128, 256, 64, 1, True, True),
    (64, 64, 16, 1, False, False),
    (96, 96, 128, 0, True, False),
    (64, 1, 64, 4, True, False),
    (256, 64, 1024, 0, False, False),
)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, aot.Launch]]:
    """Every launch of these calls once, with the call it belongs to."""
    seen: set[Key] = set()
    for D, Dv, size, heads, causal, packed in CALLS:
        T, H, G = 1024, 4, 2
        q, k, v = (torch.zeros(2, T, h, d, dtype=dtype, requires_grad=True) for h, d in ((H, D), (G, D), (G, Dv)))
        n = T // size
        weights = torch.zeros(1, heads, n, n, requires_grad=True) if heads else None
        starts = torch.arange(0, T + 1, size).expand(2, -1) if packed else None
        fresh = torch.zeros(2, n, dtype=torch.bool) if packed and not heads else None

        def run() -> None:
            out, _ = linear_attention(
                q, k, v, size=size, causal=causal, weights=weights, starts=starts, fresh=fresh  # noqa: B023
            )  # fmt: skip
            out.sum().backward()

        def step() -> None:
            states, row = torch.zeros(2, 3, G, D, Dv), torch.zeros((heads, 3) if heads > 1 else (3,))  # noqa: B023
            with torch.no_grad():
                linear_attention_step(q[:, :1], k[:, :1], v[:, :1], states, row if heads else None)  # noqa: B023

        def finish() -> None:
            out = torch.zeros(2, T, H, Dv, requires_grad=True)  # noqa: B023
            gate = torch.zeros(2, T, H * Dv, dtype=dtype)  # noqa: B023
            linear_attention_finish(out, torch.zeros(Dv), gate, eps=1e-6, dtype=dtype).sum().backward()  # noqa: B023

        for launch in (*aot.record(run), *aot.record(step), *aot.record(finish)):
            key = (launch.name, *(_kind(x) for x in launch.arguments.values()), *launch.options.items())
            if key not in seen:
                seen.add(key)
                yield f"D={D} Dv={Dv} C={size} weights={heads} causal={causal} packed={packed}", launch


def _kind(value: object) -> object:
    """What a launch is compiled for: a tensor's dtype, and a number itself."""
    return value.dtype if isinstance(value, torch.Tensor) else value


def main(target: str, *names: str) -> int:
    bad = 0
    for dtype in (getattr(torch, name) for name in names):
        for call, launch in launches(dtype):
            result = aot.compile_launch(launch, target)
            wrong = result.spills > 0 or result.shared > aot.SHARED_LIMIT[target]
            bad += wrong
            reverse = " reversed" if launch.arguments.get("REVERSE") else ""
            print(
                f"{target} {str(dtype)[6:]} {call}: {result.kernel}{reverse} registers={result.registers} "
                f"spills={result.spills} shared={result.shared}{'  TOO MUCH' if wrong else ''}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
