"""Host time of a call: what Python does before a kernel runs, with the launches left out.

python benchmarks/host_time.py                     print microseconds per call
python benchmarks/host_time.py --before DIRECTORY  beside those of another checkout, in turns
python benchmarks/host_time.py ... --write         append them to benchmarks/results/host_time.jsonl

No GPU is needed: tensors are on the CPU, launches do nothing, and tiles and splits are those of an H100. Triton's own
launcher comes on top. A small kernel cannot be faster than this, unless a CUDA graph holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "host_time.jsonl"
GOALS = {
    "softmax_attention, one token": 60, "latent_attention, one token": 70, "composed_attention, one token": 120,
    "softmax_attention": 60,
}  # fmt: skip
"""Microseconds."""
CALLS, ROUNDS = 10, 100


def cases() -> dict[str, Callable[[], object]]:
    """What is timed. Sizes hardly matter, since nothing is computed but what PyTorch does before a launch."""
    import torch

    import attnzoo
    from attnzoo.masks import Visibility
    from attnzoo.ops.composed_attention import Composition, composed_attention
    from attnzoo.ops.latent_attention import latent_attention
    from attnzoo.ops.softmax_attention import softmax_attention
    from attnzoo_kernels.linear_attention import linear_attention_step
    from attnzoo_kernels.qk_norm_rope import qk_norm_rope

    S, options = 2048, {"backend": "triton"}

    def few(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float16).requires_grad_(grad)

    q, cache = few(1, 1, 16, 64), [few(1, 4, S + 8, 64)[:, :, :S].transpose(1, 2) for _ in range(2)]
    last = Visibility(query_start=S - 1)
    latent_q, latent_rope, latent = few(1, 1, 16, 512), few(1, 1, 16, 64), few(1, 1, S, 576).transpose(1, 2)
    long = [few(1, 256, heads, 64) for heads in (16, 4, 4)]
    trained = [few(1, 256, heads, 64, grad=True) for heads in (16, 4, 4)]
    do = few(1, 256, 16, 64)
    keys = 24
    composed = few(1, 1, 16, 64), few(1, keys, 16, 64), few(1, keys, 16, 64)
    of = {length: (few(1, length, 1, 2, 16), few(1, length, 1, 2, 16), few(1, length, 1, 16)) for length in (1, keys)}
    compositions = [Composition(few(1, 16, 16), query=of[1], key=of[keys]) for _ in range(2)]
    after = Visibility(query_start=keys - 1)
    factors = few(1, S, 2, 16), few(1, S, 2, 64)
    table = torch.randn(256, 64), torch.randn(256, 64)
    z, gain, state = few(1, 256, 16, 64), few(64), torch.randn(1, 1, 16, 64, 64)
    module = attnzoo.GroupedQueryAttention(256, 4, 2, **options).half().eval()
    x, held = few(1, 1, 256), module.init_cache(1, S)

    def backward() -> None:
        out = softmax_attention(*trained, **options)
        torch.autograd.grad(out, trained, do)

    def decode() -> None:
        held.length = S - 1
        module(x, cache=held)

    calls: dict[str, Callable[[], object]] = {
        "softmax_attention, one token": lambda: softmax_attention(q, *cache, last, **options),
        "latent_attention, one token": lambda: latent_attention(
            latent_q, latent_rope, latent, last, latent_width=512, scale=0.1, **options
        ),
        "composed_attention, one token": lambda: composed_attention(
            *composed, *compositions, after, scale=0.1, **options
        ),
        "softmax_attention": lambda: softmax_attention(*long, **options),
        "softmax_attention, forward and backward": backward,
        "qk_norm_rope": lambda: qk_norm_rope(z, norm_weight=gain, cos=table[0], sin=table[1]),
        "linear_attention_step": lambda: linear_attention_step(q, q, q, state),
        "GroupedQueryAttention, one token": decode,
    }
    with suppress(ImportError):  # A checkout of before has neither.
        from attnzoo.ops.sigmoid_attention import sigmoid_attention
        from attnzoo_kernels.decode.factors import decode_factors

        calls["decode_factors, one token"] = lambda: decode_factors(q, *factors, *factors, scale=0.1, query_start=S - 1)
        calls["sigmoid_attention, one token"] = lambda: sigmoid_attention(
            q, *cache, last, logit_bias="visible", **options
        )
    return calls


def measured() -> dict[str, float]:
    """Microseconds of each case in this process, the least of some rounds."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    from attnzoo_kernels import tuning

    torch.set_num_threads(1)
    InterpretedFunction.run = lambda *_, **__: None
    tuning.device_limits = lambda _: (132, 227 * 1024, 32)
    taken: dict[str, float] = {}
    with torch.no_grad():
        calls = cases()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                with torch.set_grad_enabled("backward" in name):
                    call()
                    # Of this thread, so that other processes do not count.
                    start = time.thread_time()
                    for _ in range(CALLS):
                        call()
                    each = (time.thread_time() - start) / CALLS * 1e6
                taken[name] = min(taken.get(name, each), each)
    return taken


def of_checkout(tree: Path) -> dict[str, float]:
    """`measured`, in a process of its own, of the packages in a checkout."""
    paths = os.pathsep.join(str(tree / part) for part in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree} cannot be measured: {(done.stderr.splitlines() or ['no message'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Host microseconds per call, with the launches left out.")
    parser.add_argument("--before", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measured()))
        return
    trees = {"now": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    taken: dict[str, dict[str, float]] = {}
    for _ in range(3):
        for label, tree in trees.items():
            for name, each in of_checkout(tree).items():
                row = taken.setdefault(name, {})
                row[label] = min(row.get(label, each), each)
    rows: list[dict[str, Any]] = []
    for name, row in taken.items():
        print(f"{name:42} " + "  ".join(f"{label} {each:6.0f} us" for label, each in row.items()))
        rows.append({"case": name, **{f"{label}_us": round(each, 1) for label, each in row.items()}})
    if arguments.write:
        from timing import environment

        stamp = environment(["triton"])
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**row, "goal_us": GOALS.get(row["case"]), **stamp}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
