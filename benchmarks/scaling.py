"""How mechanisms scale on a CPU, as ratios within one run.

    python benchmarks/scaling.py [--out benchmarks/results/scaling.jsonl] [--only growth sparse composed ...]

growth: forward + backward of linear, multi-head linear and softmax attention when T doubles.
sparse: mixture of heads with half of the heads active, time of its dense form over that of its sparse one.
composed: DCMHA and talking heads over multi-head attention.
memory: what DCMHA in chunks keeps for the backward pass, and its peak, when T doubles.
cache: bytes a token of latent attention and multi-head attention at DeepSeek-V3's sizes.

One thread, interleaved rounds, minima. What is printed last to each line is its goal; the exit status is 1 if one
is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment, interleave, once, saved_bytes

import attnzoo

E = 512
Row = dict[str, Any]


def growth(rounds: int) -> Iterator[Row]:
    """Time at 8k over time at 4k."""
    # Small enough that no buffer is mapped anew for each operation, which would be measured instead.
    batch, width, heads, tokens = 1, 64, 2, 4096
    rope = attnzoo.Rotary()
    layers = {
        "linear": attnzoo.LinearAttention(
            width, heads, feature_map="relu", normalize=False, output_norm="rmsnorm", gate=True, rope=rope
        ),
        "mhla": attnzoo.MultiHeadLinearAttention(width, heads, block_size=96, num_blocks=86),
        "mha": attnzoo.MultiHeadAttention(width, heads, bias=False),
    }
    cases = {}
    for name, layer in layers.items():
        for length in (tokens, 2 * tokens):
            x = torch.randn(batch, length, width, requires_grad=True)
            cases[f"{name} {length}"] = once(lambda layer=layer, x=x: step(layer, x))
    timed = interleave(cases, rounds)
    for name in layers:
        short, long = timed[f"{name} {tokens}"], timed[f"{name} {2 * tokens}"]
        yield row(
            "growth",
            name,
            "forward+backward",
            long.ms / short.ms,
            "<=" if name != "mha" else None,
            2.3,
            ms=long.ms,
            noise=long.noise,
            shape={"B": batch, "T": [tokens, 2 * tokens], "E": width, "H": heads},
        )


def sparse(rounds: int) -> Iterator[Row]:
    """Dense over sparse, the same layer and input."""
    heads = 8
    for tokens in (1024, 2048, 4096):
        torch.manual_seed(0)
        layer = attnzoo.MixtureOfHeadAttention(E, heads, num_shared_heads=2, num_routed_active=2)
        x = torch.randn(1, tokens, E, requires_grad=True)
        found = {}
        for form in (False, True):
            layer.sparse = form
            found[form] = layer(x).detach()
        error = float((found[True] - found[False]).abs().max() / found[False].abs().max())
        if error > 1e-4:
            raise SystemExit(f"sparse and dense differ by {error}")

        def run(form: bool, backward: bool, layer: Any = layer, x: torch.Tensor = x) -> None:
            layer.sparse = form
            if backward:
                step(layer, x)
            else:
                with torch.no_grad():
                    layer(x)

        for phase, backward in (("forward", False), ("forward+backward", True)):
            timed = interleave(
                {form: once(lambda s=form == "sparse", b=backward: run(s, b)) for form in ("dense", "sparse")}, rounds
            )
            goal = ">=" if tokens >= 4096 else None  # from where on sparse="auto" takes it
            yield row(
                "sparse",
                "moh, 4 of 8 heads",
                phase,
                timed["dense"].ms / timed["sparse"].ms,
                goal,
                1.0,
                ms=timed["sparse"].ms,
                noise=timed["sparse"].noise,
                error=error,
                shape={"B": 1, "T": tokens, "E": E, "H": heads},
            )


def composed(rounds: int) -> Iterator[Row]:
    """Heads mixed at every pair over multi-head attention, the same input."""
    torch.manual_seed(0)
    layers = {
        "mha": attnzoo.MultiHeadAttention(E, 8, bias=False),
        "dcmha": attnzoo.DynamicallyComposableAttention(E, 8),
        "talking_heads": attnzoo.TalkingHeadsAttention(E, 8),
    }
    goals = {("dcmha", 512): 2.35, ("dcmha", 2048): 3.5, ("talking_heads", 512): 1.5, ("talking_heads", 2048): 1.8}
    for tokens in (512, 2048):
        x = torch.randn(1, tokens, E, requires_grad=True)
        cases = {name: once(lambda layer=layer, x=x: step(layer, x)) for name, layer in layers.items()}
        timed = interleave(cases, rounds)
        for name in ("dcmha", "talking_heads"):
            yield row(
                "composed",
                f"{name} / mha",
                "forward+backward",
                timed[name].ms / timed["mha"].ms,
                "<=",
                goals[name, tokens],
                ms=timed[name].ms,
                noise=timed[name].noise,
                shape={"B": 1, "T": tokens, "E": E, "H": 8},
            )


def memory(_: int) -> Iterator[Row]:
    """Saved bytes and peak resident memory at 2T over T."""
    sizes = {}
    for tokens in (2048, 4096):
        layer = attnzoo.DynamicallyComposableAttention(E, 8)
        x = torch.randn(1, tokens, E, requires_grad=True)
        sizes[tokens] = saved_bytes(lambda layer=layer, x=x: layer(x), list(layer.parameters()))
    yield row(
        "memory",
        "dcmha, chunked",
        "saved for backward",
        sizes[4096] / sizes[2048],
        "<=",
        2.1,
        shape={"B": 1, "T": [2048, 4096], "E": E, "H": 8},
    )
    peaks = {}
    for tokens in (64, 2048, 4096):
        # Freed blocks go back at once, so that the peak is that of live tensors and not of the allocator's gaps.
        settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--peak", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
        peaks[tokens] = int(done.stdout)
    ratio = (peaks[4096] - peaks[64]) / (peaks[2048] - peaks[64])
    yield row(
        "memory",
        "dcmha, chunked",
        "peak of forward+backward",
        ratio,
        "<=",
        2.1,
        shape={"B": 1, "T": [2048, 4096], "E": E, "H": 8},
    )


def cache(_: int) -> Iterator[Row]:
    """Multi-head over latent bytes a token, one layer, bfloat16."""
    with torch.device("meta"):
        latent = attnzoo.MultiHeadLatentAttention(
            7168, 128, 512, 1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )
        full = attnzoo.MultiHeadAttention(7168, 128, 192, v_head_dim=128, bias=False)
    yield row(
        "cache",
        "mha / mla, DeepSeek-V3",
        "bytes a token",
        full.cache_bytes_per_token() / latent.cache_bytes_per_token(),
        ">=",
        70.0,
        shape={"E": 7168, "H": 128, "bytes": [full.cache_bytes_per_token(), latent.cache_bytes_per_token()]},
    )


def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward and backward, nothing kept."""
    layer(x).sum().backward()
    layer.zero_grad()
    x.grad = None


def row(suite: str, case: str, phase: str, ratio: float, rule: str | None, bound: float, **more: Any) -> Row:
    """A result line with its verdict."""
    passed = {None: True, "<=": ratio <= bound, ">=": ratio >= bound}[rule]
    made = {
        "suite": suite,
        "case": case,
        "phase": phase,
        "ms": None,
        "ratio": round(ratio, 3),
        "noise": None,
        "error": None,
        "rule": rule,
        "bound": bound if rule else None,
        "passed": passed,
        **more,
    }
    verdict = "" if rule is None else f"{rule} {bound}  {'pass' if passed else 'FAIL'}"
    print(f"{suite:<8} {case:<24} {phase:<26} T={made['shape'].get('T', '-')!s:<14} {ratio:8.3f}  {verdict}")
    return made


def peak(tokens: int) -> None:
    """Peak resident bytes of this process after one step."""
    torch.set_num_threads(1)
    layer = attnzoo.DynamicallyComposableAttention(E, 8)
    step(layer, torch.randn(1, tokens, E, requires_grad=True))
    # Not getrusage: what it reports survives exec, and is then the parent's.
    status = Path("/proc/self/status").read_text()
    print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024)


def main() -> int:
    suites = {"growth": growth, "sparse": sparse, "composed": composed, "memory": memory, "cache": cache}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(suites), default=list(suites))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak)
        return 0
    torch.set_num_threads(1)
    about = environment(("attnzoo",))
    rows = [{**found, **about} for name in options.only for found in suites[name](options.rounds)]
    if options.out:
        append_lines(options.out, rows)
    return int(not all(found["passed"] for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
