"""What tensor product attention caches, and what decoding from the factors saves on a CPU.

    python benchmarks/tpa_decoding.py [--out benchmarks/results/tpa_decoding.jsonl]

One layer of the paper's four models (arXiv:2501.06425: heads of 64, ranks 6, 2, 2, as many heads as give the parameters
of multi-head attention) decodes one token after S cached ones: "factored" reads the factors, "expanded" forms keys and
values of all cached tokens from the same cache. "mha" is multi-head attention of as many parameters. cache_bytes are
those of a token and layer in bfloat16; "mha_own_heads" is multi-head attention with the layer's number of heads.
float32, one thread, interleaved rounds, minima; ratio is factored over expanded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment, interleave, once, relative_error
from torch import nn

import attnzoo

MODELS = ((768, 12, 34), (1024, 16, 47), (1280, 20, 61), (1600, 25, 78))
"""Width E, heads of multi-head attention, heads of tensor product attention."""
CACHED = (512, 2048, 8192)
RESULTS = Path(__file__).parent / "results" / "tpa_decoding.jsonl"


def cache_bytes(width: int, mha_heads: int, heads: int) -> dict[str, int]:
    """Bytes of a token and layer in bfloat16."""
    made = {
        "tpa": attnzoo.TensorProductAttention(width, heads, 64, device="meta"),
        "mha": attnzoo.MultiHeadAttention(width, mha_heads, 64, device="meta"),
        "mha_own_heads": attnzoo.MultiHeadAttention(width, heads, 64, device="meta"),
        "gqa4": attnzoo.GroupedQueryAttention(width, 4 * (mha_heads // 4), 4, 64, device="meta"),
        "mla": attnzoo.MultiHeadLatentAttention(
            width, mha_heads, 256, qk_nope_head_dim=64, qk_rope_head_dim=32, device="meta"
        ),
    }
    return {name: module.cache_bytes_per_token(torch.bfloat16) for name, module in made.items()}


@torch.inference_mode()
def measured(width: int, mha_heads: int, heads: int, cached: int, rounds: int) -> dict[str, Any]:
    """The row of one layer and length."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "factored": attnzoo.TensorProductAttention(width, heads, 64),
        "expanded": attnzoo.TensorProductAttention(width, heads, 64, backend="sdpa"),
        "mha": attnzoo.MultiHeadAttention(width, mha_heads, 64, bias=False),
    }
    made["factored"].reset_parameters(out_std=0.02)
    made["expanded"].load_state_dict(made["factored"].state_dict())
    x, token = torch.randn(1, cached, width), torch.randn(1, 1, width)
    caches = {name: module.init_cache(1, cached + 1) for name, module in made.items()}
    for name, module in made.items():
        module(x, cache=caches[name])

    def step(name: str) -> torch.Tensor:
        caches[name].truncate(cached)
        y: torch.Tensor = made[name](token, cache=caches[name])
        return y

    error = relative_error(step("factored"), step("expanded").double())
    timings = interleave({name: once(lambda name=name: step(name)) for name in made}, rounds)
    ms = {name: timing.ms for name, timing in timings.items()}
    return {
        "suite": "tpa_decoding", "case": "layer", "phase": "decoding",
        "shape": {"E": width, "H": heads, "H_mha": mha_heads, "D": 64, "S": cached}, "ms": ms["factored"],
        "noise": max(timing.noise for timing in timings.values()), "ratio": ms["factored"] / ms["expanded"],
        "expanded_ms": ms["expanded"], "mha_ms": ms["mha"], "cache_bytes": cache_bytes(width, mha_heads, heads),
        "error": error,
    }  # fmt: skip


def main() -> None:
    """Measure every model and length, write a row for each, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in MODELS:
        for cached in CACHED:
            row = {**measured(*model, cached, options.rounds), **environment()}
            rows.append(row)
            times = ", ".join(f"{name} {row[key]:.2f} ms" for name, key in TIMES.items())
            print(f"{row['shape']}: {times}, factored/expanded {row['ratio']:.3f}, bytes {row['cache_bytes']}")
    options.out.unlink(missing_ok=True)
    append_lines(options.out, rows)


TIMES = {"factored": "ms", "expanded": "expanded_ms", "mha": "mha_ms"}

if __name__ == "__main__":
    main()
