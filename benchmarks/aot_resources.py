"""Registers, spills, shared memory and loop length of every kernel, compiled without a GPU for four chips.

    python benchmarks/aot_resources.py --write       # all cases, minutes; writes benchmarks/results/aot_resources.json
    python benchmarks/aot_resources.py --short       # the cases that the tests check against that file

A case is a call of a kernel's public function; what it would launch is recorded and compiled, specialised as it would
be on a GPU. Exit status 1: a kernel does not compile, takes too much shared memory, or spills more than the file says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "aot_resources.json"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SECONDS = 20.0
MORE_INSTRUCTIONS = 1.03
"""How many times the table's instructions a loop may take: other values mean that a kernel has changed."""
B, T = 2, 2048


def tensor(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Uninitialized memory, which is never read."""
    return torch.empty(*shape, dtype=dtype, requires_grad=grad)


def softmax(D: int, DV: int, R: int = 0, H: int = 8, G: int = 8, **options: Any) -> Callable[[torch.dtype], object]:
    """Forward and backward of softmax attention."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.softmax_attention import softmax_attention

        given = {k: v(dtype) if callable(v) else v for k, v in options.items()}
        if R:
            given |= {"q_rope": tensor(B, T, H, R, dtype=dtype), "k_rope": tensor(B, T, 1, R, dtype=dtype)}
        q, k, v = (tensor(B, T, n, d, dtype=dtype) for n, d in ((H, D), (G, D), (G, DV)))
        out = softmax_attention(q, k, v, scale=0.1, **given)[0]
        if out.requires_grad:
            out.sum().backward()

    return call


def few_instructions(stages: int, call: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
    """The forward pass of softmax attention at the tile of fewest instructions, in place of the fastest one."""

    def at_tile(dtype: torch.dtype) -> None:
        from attnzoo_kernels.tuning import Config, pinned

        tile = Config({"BLOCK_T": 128, "BLOCK_S": 128}, num_warps=8, num_stages=stages)
        with torch.no_grad(), pinned(tile, "softmax_attention_fwd"):
            call(dtype)

    return at_tile


def sigmoid(D: int, G: int = 8, **options: Any) -> Callable[[torch.dtype], object]:
    """Forward and backward of sigmoid attention with a bias of each head."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.sigmoid_attention import sigmoid_attention

        q, k, v = (tensor(B, T, n, D, dtype=dtype) for n in (8, G, G))
        bias = tensor(8, 1, dtype=torch.float32)
        sigmoid_attention(q, k, v, logit_bias=bias, scale=0.1, **options).sum().backward()

    return call


def everything(D: int) -> Callable[[torch.dtype], object]:
    """All features at once."""
    documents = tuple(torch.empty(B, T, dtype=torch.int32) for _ in range(2))
    return softmax(
        D, D, G=2, softcap=30.0, window=512, sink_tokens=4, documents=documents,
        lengths=torch.empty(B, dtype=torch.int32), alibi_slopes=torch.empty(8),
        sinks=lambda _: tensor(8, dtype=torch.float32), head_scale=lambda _: tensor(8, dtype=torch.float32),
        bias=lambda dtype: tensor(8, T, T, dtype=dtype), mask=torch.empty(B, 1, T, T, dtype=torch.bool),
    )  # fmt: skip


def decode(
    heads: int, groups: int, D: int, DV: int, R: int = 0, tied: bool = False, options: bool = False, decay: bool = False
) -> Callable[[torch.dtype], object]:
    """One token over a cache of 8,192."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.decode import decode_attention

        factory_kwargs: dict[str, Any] = {"dtype": dtype, "grad": False}
        v = tensor(B, groups, 8192, DV, **factory_kwargs).transpose(1, 2)
        k = v[..., :D] if tied else tensor(B, groups, 8192, D, **factory_kwargs).transpose(1, 2)
        given: dict[str, Any] = {"query_start": 8191}
        if R:
            given |= {
                "q_rope": tensor(B, 1, heads, R, **factory_kwargs),
                "k_rope": tensor(B, 8192, 1, R, **factory_kwargs),
            }
        if decay:
            given["decay"] = torch.empty(B, heads, 8192)
        if options:
            given |= {
                "softcap": 30.0, "window": 512, "sink_tokens": 4, "sinks": torch.empty(heads),
                "head_scale": torch.empty(heads), "alibi_slopes": torch.empty(heads),
                "lengths": torch.empty(B, dtype=torch.int32), "key_positions": torch.empty(8192, dtype=torch.int32),
                "mask": torch.empty(B, 1, 1, 8192, dtype=torch.bool),
            }  # fmt: skip
        decode_attention(tensor(B, 1, heads, D, **factory_kwargs), k, v, scale=0.1, **given)

    return call


def latent(heads: int, R: int, rope: int) -> Callable[[torch.dtype], object]:
    """One token of absorbed latent attention over a cache of 8,192."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.decode import latent_decode

        factory_kwargs: dict[str, Any] = {"dtype": dtype, "grad": False}
        cache = tensor(B, 8192, R + rope, **factory_kwargs)
        q, q_rope = tensor(B, 1, heads, R, **factory_kwargs), tensor(B, 1, heads, rope, **factory_kwargs)
        latent_decode(q, q_rope, cache[..., :R], cache[..., R:], scale=0.1, query_start=8191)

    return call


def factors(heads: int, D: int, rank: int) -> Callable[[torch.dtype], object]:
    """One token over a cache of 8,192 factors of keys and values."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.decode.factors import decode_factors

        shapes = (heads, D, heads, D)
        held = [tensor(B, rank, 8192, n, dtype=dtype, grad=False).transpose(1, 2) for n in shapes]
        decode_factors(tensor(B, 1, heads, D, dtype=dtype, grad=False), *held, scale=0.1, query_start=8191)

    return call


def norm_rope(D: int, kind: str, style: str = "half") -> Callable[[torch.dtype], object]:
    """Head map, norm and rotation, forward and backward."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.qk_norm_rope import qk_norm_rope

        matrices = [tensor(D, D, dtype=dtype) for _ in range(3)]
        maps: dict[str, Any] = {"none": {}, "linear": {"linear": matrices[0]}, "gated": {"mlp": tuple(matrices)}}[kind]
        y = qk_norm_rope(
            tensor(B, T, 8, D, dtype=dtype), **maps, norm_weight=tensor(D, dtype=dtype), cos=torch.empty(T, D),
            sin=torch.empty(T, D), style=style,
        )  # fmt: skip
        y.backward(torch.empty_like(y))

    return call


def composed(M: int, D: int, key_side: bool, causal: bool = True) -> Callable[[torch.dtype], object]:
    """DCMHA's core, forward and backward: M heads mixed before and after the softmax."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.composed_attention import composed_attention

        q, k, v = (tensor(B, T, M, D, dtype=dtype) for _ in range(3))
        sides = ("q_pre", "q_post", *(("k_pre", "k_post") if key_side else ()))
        matrices = {side: tensor(B, T, 1, M, M, dtype=dtype) for side in sides}
        composed_attention(q, k, v, scale=0.1, causal=causal, **matrices).sum().backward()

    return call


def linear(D: int, DV: int, size: int, heads: int, causal: bool = True) -> Callable[[torch.dtype], object]:
    """Linear attention in blocks, mixed with weights of that many heads (0: none), forward and backward."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.linear_attention import linear_attention

        q, k, v = (tensor(B, T, n, d, dtype=dtype) for n, d in ((8, D), (2, D), (2, DV)))
        n = T // size
        weights = tensor(1, heads, n, n, dtype=torch.float32) if heads else None
        linear_attention(q, k, v, size=size, causal=causal, weights=weights)[0].sum().backward()

    return call


def routed(D: int, H: int, G: int) -> Callable[[torch.dtype], object]:
    """The active heads of a mixture of heads, forward and backward."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.head_routing import routed_attention

        q, k, v = (tensor(B, T, n, D, dtype=dtype) for n in (H, G, G))
        active, gates = torch.zeros(B, T, H, dtype=torch.bool), tensor(B, T, H, dtype=torch.float32)
        routed_attention(q, k, v, active, scale=0.1, gates=gates).sum().backward()

    return call


def experts(inner: int, outer: int) -> Callable[[torch.dtype], object]:
    """Grouped projections of a mixture of attention heads, forward and backward."""

    def call(dtype: torch.dtype) -> None:
        from attnzoo_kernels.expert_projection import expert_linear

        order, ends = torch.zeros(B * T * 8, dtype=torch.int64), torch.zeros(16, dtype=torch.int32)
        x, weight = tensor(B * T, 1, 8, inner, dtype=dtype), tensor(16, outer, inner, dtype=dtype)
        expert_linear(x, weight, order, ends, gates=tensor(B * T, 8, dtype=torch.float32)).sum().backward()

    return call


CASES: dict[str, Callable[[torch.dtype], object]] = {
    "softmax causal 64": softmax(64, 64),
    "softmax causal 128": softmax(128, 128),
    "softmax causal 128, 4 heads a group": softmax(128, 128, G=2),
    "softmax causal 256": softmax(256, 256),
    "softmax causal 80": softmax(80, 80),
    "softmax full 128": softmax(128, 128, causal=False),
    "softmax window 128": softmax(128, 128, window=512, sink_tokens=4),
    "softmax latent 128+64": softmax(128, 128, 64),
    "softmax tied 64+64": softmax(64, 128, 64, G=2),
    "softmax bias 128": softmax(128, 128, bias=lambda _: tensor(8, T, T, dtype=torch.float32)),
    "softmax bias 256": softmax(256, 256, bias=lambda _: tensor(8, T, T, dtype=torch.float32)),
    "softmax latent 256+64": softmax(256, 256, 64),
    "softmax decay 64": softmax(64, 64, decay=lambda _: tensor(B, 8, T, dtype=torch.float32)),
    "softmax decay 128": softmax(128, 128, decay=lambda _: tensor(B, 8, T, dtype=torch.float32)),
    "softmax decay 256": softmax(256, 256, decay=lambda _: tensor(B, 8, T, dtype=torch.float32)),
    "softmax gated 128": softmax(128, 128, output_gate=lambda dtype: tensor(B, T, 8, 128, dtype=dtype)),
    "softmax gated by head 64": softmax(64, 64, output_gate=lambda dtype: tensor(B, T, 8, 1, dtype=dtype)),
    "softmax causal 64, few instructions": few_instructions(2, softmax(64, 64)),
    "softmax causal 128, few instructions": few_instructions(3, softmax(128, 128)),
    "softmax decay 128, few instructions": few_instructions(
        2, softmax(128, 128, decay=lambda _: tensor(B, 8, T, dtype=torch.float32))
    ),
    "softmax gated 128, few instructions": few_instructions(
        3, softmax(128, 128, output_gate=lambda dtype: tensor(B, T, 8, 128, dtype=dtype))
    ),
    "softmax everything 64": everything(64),
    "softmax everything 128": everything(128),
    "sigmoid 64": sigmoid(64),
    "sigmoid 128": sigmoid(128),
    "sigmoid 256": sigmoid(256),
    "sigmoid window 128, 4 heads a group": sigmoid(128, 2, window=512),
    "decode 64": decode(8, 2, 64, 64),
    "decode 128": decode(32, 8, 128, 128),
    "decode decay 128": decode(32, 8, 128, 128, decay=True),
    "decode 128, 32 heads a group": decode(32, 1, 128, 128),
    "decode 256 everything": decode(16, 1, 256, 256, options=True),
    "decode tied 64+64": decode(16, 1, 64, 128, 64, tied=True),
    "latent decode 512+64, 16 heads": latent(16, 512, 64),
    "latent decode 512+64, 128 heads": latent(128, 512, 64),
    "latent decode 256+32": latent(8, 256, 32),
    "decode from 2 factors, 47 heads of 64": factors(47, 64, 2),
    "decode from 1 factor, 16 heads of 128": factors(16, 128, 1),
    **{f"qk_norm_rope {kind} {D}": norm_rope(D, kind) for kind in ("none", "linear", "gated") for D in (64, 128, 256)},
    "qk_norm_rope gated 128 interleaved": norm_rope(128, "gated", "interleaved"),
    "composed 8 heads of 128": composed(8, 128, True),
    "composed 8 heads of 128, query side": composed(8, 128, False),
    "composed 16 heads of 64": composed(16, 64, True),
    "composed 16 heads of 64, query side": composed(16, 64, False),
    "composed 8 heads of 64": composed(8, 64, True),
    "composed 32 heads of 32": composed(32, 32, True),
    "composed 8 heads of 32": composed(8, 32, True),
    "composed 4 heads of 64": composed(4, 64, True),
    "linear 128 mixed": linear(128, 128, 64, 1),
    "linear 128 mixed per head": linear(128, 128, 64, 8),
    "linear 128": linear(128, 128, 64, 0),
    "linear 64 full, mixed": linear(64, 64, 64, 1, causal=False),
    "routed 128": routed(128, 16, 16),
    "routed 64, 4 heads a group": routed(64, 16, 4),
    "experts 2048 to 128": experts(2048, 128),
    "experts 128 to 2048": experts(128, 2048),
}
SHORT = [
    ("softmax causal 128", "bf16", "sm_90"),
    ("softmax causal 128", "bf16", "sm_89"),
    ("softmax causal 128", "bf16", "gfx942"),
    ("softmax causal 64", "bf16", "sm_90"),
    ("softmax full 128", "bf16", "sm_90"),
    ("softmax latent 128+64", "bf16", "sm_90"),
    ("softmax everything 64", "bf16", "sm_90"),
    ("softmax decay 128", "bf16", "sm_90"),
    ("softmax gated 128", "bf16", "sm_90"),
    ("softmax causal 64, few instructions", "bf16", "sm_90"),
    ("softmax causal 128, few instructions", "bf16", "sm_90"),
    ("softmax decay 128, few instructions", "bf16", "sm_90"),
    ("softmax gated 128, few instructions", "bf16", "sm_90"),
    ("sigmoid 128", "bf16", "sm_90"),
    ("decode 128", "bf16", "sm_90"),
    ("decode tied 64+64", "bf16", "gfx942"),
    ("decode from 2 factors, 47 heads of 64", "bf16", "sm_90"),
    ("latent decode 512+64, 16 heads", "bf16", "sm_90"),
    ("latent decode 512+64, 128 heads", "bf16", "sm_90"),
    ("qk_norm_rope gated 128", "bf16", "sm_90"),
    ("qk_norm_rope linear 128", "bf16", "sm_80"),
    ("composed 16 heads of 64", "bf16", "sm_90"),
    ("composed 16 heads of 64, query side", "bf16", "sm_90"),
    ("linear 128 mixed", "bf16", "sm_90"),
    ("routed 128", "bf16", "sm_90"),
    ("experts 2048 to 128", "bf16", "sm_90"),
]
"""What the tests compile: (case, dtype, target)."""


def dtypes(case: str) -> tuple[str, ...]:
    """All of them for the plain cases; features and odd widths, which change no tile, in bfloat16 alone."""
    plain = r"softmax causal (64|128|256)|decode \d+|latent decode 512.64, 16 heads|qk_norm_rope \w+ 128"
    own = r"linear 128 mixed|routed 128|composed 4 heads of 64"
    return tuple(DTYPES) if re.fullmatch(f"{plain}|{own}", case) else ("bf16",)


def fits(case: str, dtype: str, target: str) -> bool:
    """Whether a case fits the target: composed attention refuses groups that are too large for it."""
    if case.endswith("few instructions"):
        return target == "sm_90"  # Elsewhere the tile of a table is the one of fewest instructions.
    size = re.match(r"composed (\d+) heads of (\d+)", case)
    if not size:
        return True
    from attnzoo_kernels.composed_attention.tuning import CAPACITY, sizes

    chip = {"sm_80": "cuda", "sm_89": "cuda, 99 KiB", "sm_90": "hopper", "gfx942": "hip"}[target]
    heads, state = sizes(int(size[1]), int(size[2]))
    most, largest = CAPACITY[chip, DTYPES[dtype].itemsize]
    return heads <= most and state <= largest


def compiled(job: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Rows of one case."""
    name, dtype, target = job
    torch.set_num_threads(1)
    from attnzoo_kernels import tuning
    from attnzoo_kernels.aot import SHARED_LIMIT, TARGETS, compile_launch, record

    # Tiles depend on the device that there is not.
    tuning.device_limits = lambda _: (132, SHARED_LIMIT[target], TARGETS[target].warp_size)
    rows = []
    for launch in record(lambda: CASES[name](DTYPES[dtype])):
        try:
            resources = compile_launch(launch, target)
        except Exception as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            rows.append({"case": name, "kernel": launch.name, "dtype": dtype, "target": target, "error": first_line})
            continue
        tile = {k: v for k, v in launch.arguments.items() if k.startswith("BLOCK_") and isinstance(v, int)}
        options = {k: launch.options[k] for k in ("num_warps", "num_stages") if k in launch.options}
        rows.append({
            "case": name, "kernel": resources.kernel, "dtype": dtype, "target": target, **tile, **options,
            "registers": resources.registers, "spills": resources.spills, "shared": resources.shared,
            "instructions": resources.instructions, "serialized": resources.serialized,
            "seconds": round(resources.seconds, 1),
        })  # fmt: skip
    return rows


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a row."""
    return tuple(row[part] for part in ("case", "kernel", "dtype", "target"))


def complaints(rows: list[dict[str, Any]], stored: list[dict[str, Any]]) -> list[str]:
    """What is wrong with new rows, beside the stored ones of the same Triton."""
    from attnzoo_kernels.aot import SHARED_LIMIT

    # A kernel that a case launches several times has several rows: the worst counts.
    spills: dict[tuple[str, ...], int] = {}
    instructions: dict[tuple[str, ...], int] = {}
    serialized: set[tuple[str, ...]] = set()
    for row in stored:
        spills[key(row)] = max(spills.get(key(row), 0), row.get("spills", 0))
        instructions[key(row)] = max(instructions.get(key(row), 0), row.get("instructions", 0))
        if row.get("serialized"):
            serialized.add(key(row))
    problems = []
    for row in rows:
        where = " ".join(key(row))
        if "error" in row:
            problems.append(f"{where}: does not compile: {row['error']}")
            continue
        limit = SHARED_LIMIT[row["target"]]
        if row["shared"] > limit:
            problems.append(f"{where}: takes {row['shared']} bytes of shared memory, the chip has {limit}")
        if row["seconds"] > MAX_SECONDS:
            problems.append(f"{where}: took {row['seconds']} s to compile, {MAX_SECONDS} are allowed")
        if not stored:
            continue
        if key(row) not in spills:
            problems.append(f"{where}: is not in the table; rewrite it with --write")
        elif row["spills"] > spills[key(row)]:
            problems.append(f"{where}: spills {row['spills']} bytes, {spills[key(row)]} in the table")
        most = instructions.get(key(row), 0)
        if most and row.get("instructions", 0) > MORE_INSTRUCTIONS * most:
            problems.append(f"{where}: takes {row['instructions']} instructions a tile, {most} in the table")
        if row.get("serialized") and key(row) in spills.keys() - serialized:
            problems.append(f"{where}: products wait for each other, those in the table do not")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table and what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only the cases that the tests check")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rows", type=Path, help="a file for the rows of this run, as JSON")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at a time")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("kernels compile only without TRITON_INTERPRET=1")
    if options.write:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # or the seconds would be those of reading a cache
    jobs = SHORT if options.short else [(n, dtype, t) for n in CASES for dtype in dtypes(n) for t in TARGETS]
    jobs = [job for job in jobs if options.only in job[0] and fits(*job)]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.processes) as pool:
        for new in pool.map(compiled, jobs):
            rows += new
            for row in new:
                print(
                    " ".join(key(row)), {k: v for k, v in row.items() if k not in ("case", "kernel", "dtype", "target")}
                )
    if options.rows:
        options.rows.write_text(json.dumps(rows))
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    stored = [] if options.write else table["rows"]
    if table.get("triton") != importlib.metadata.version("triton"):
        # Another compiler takes other instructions for the same kernel.
        stored = [row | {"instructions": 0} for row in stored]
    wrong = complaints(rows, stored)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    if options.write:
        import triton

        kept = [row for row in table["rows"] if options.only not in row["case"]] if options.only else []
        text = ",\n".join(json.dumps(row) for row in kept + rows)
        RESULTS.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{text}\n]}}\n')
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
