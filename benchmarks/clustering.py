"""What clustering heads saves at inference: ClusteredHeadAttention against the module that it wraps, on a CPU.

    python benchmarks/clustering.py [--out benchmarks/results/clustering.jsonl] [--only prefill decode cache peak]

prefill: a whole prompt without a cache, the probe and the clustering included.
decode: one token on a cache of S tokens.
cache: bytes that the two caches take.
peak: resident memory above that of an idle process at its highest, in a prefill.

"planted" modules have groups of heads with equal queries and keys, as many as clusters: the error is that against the
wrapped module, which clustering does not change. "apart" modules have unlike heads and a batch whose sequences
cluster differently, which leaves no projection out: the error is that against a float64 run. One thread, interleaved
rounds, minima; ratio is wrapped over clustered. The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment, interleave, once, relative_error

import attnzoo

E, H = 512, 8
STEPS = 10
Row = dict[str, Any]
CASES = (("planted", 1, 2), ("planted", 1, 4), ("apart", 4, 2), ("apart", 4, 4))
"""Kind of module, batch and clusters K."""


def make(kind: str, clusters: int) -> tuple[attnzoo.MultiHeadAttention, attnzoo.ClusteredHeadAttention]:
    """The two modules, with the same weights."""
    torch.manual_seed(0)
    attn = attnzoo.MultiHeadAttention(E, H, bias=False).eval()
    with torch.no_grad():
        for linear in (attn.q_proj, attn.k_proj):
            # Scores with a standard deviation of about 1, so that heads do not all attend evenly.
            linear.weight.normal_(std=E**-0.5)
            if kind == "planted":
                heads = linear.weight.view(H, -1, E)
                heads.copy_(heads[torch.arange(H) % clusters])
    return attn, attnzoo.ClusteredHeadAttention(attn, clusters)


def error(kind: str, clusters: int, x: torch.Tensor) -> float:
    """See the top of the file; a clustering other than the planted one ends the run."""
    attn, layer = make(kind, clusters)
    exact = copy.deepcopy(attn if kind == "planted" else layer).double()
    got, expected = layer(x), exact(x.double())
    if kind == "planted" and layer.labels.tolist() != [[h % clusters for h in range(H)]] * x.shape[0]:
        raise SystemExit(f"the planted groups were not found: {layer.labels.tolist()}")
    if kind == "apart" and len(x) > 1 and bool((layer.labels == layer.labels[:1]).all()):
        raise SystemExit("the sequences were to cluster differently")
    found = relative_error(got, expected)
    if found > 1e-5:
        raise SystemExit(f"{kind}, {clusters} clusters: error {found}")
    return found


def prefill(rounds: int) -> Iterator[Row]:
    """Time of a prompt."""
    for kind, batch, clusters in CASES:
        attn, layer = make(kind, clusters)
        for tokens in (512, 2048) if batch == 1 else (512,):
            x = torch.randn(batch, tokens, E)
            cases = {
                name: once(lambda module=module, x=x: module(x))
                for name, module in (("wrapped", attn), ("clustered", layer))
            }
            timed = interleave(cases, rounds)
            yield row("prefill", kind, clusters, {"B": batch, "T": tokens}, timed, error(kind, clusters, x))


def decode(rounds: int) -> Iterator[Row]:
    """Time of one token."""
    for kind, batch, clusters in CASES:
        attn, layer = make(kind, clusters)
        for length in (512, 2048):
            x, new = torch.randn(batch, length, E), torch.randn(batch, 1, E)
            cases, outputs = {}, {}
            for name, module in (("wrapped", attn), ("clustered", layer)):
                cache = module.init_cache(batch, length + STEPS)
                module(x, cache=cache)

                def steps(
                    module: Any = module, cache: Any = cache, new: torch.Tensor = new, length: int = length
                ) -> torch.Tensor:
                    for _ in range(STEPS):
                        y = module(new, cache=cache)
                    cache.truncate(length)
                    return y

                cases[name], outputs[name] = once(steps), steps()
            if kind == "planted":
                found = relative_error(outputs["clustered"], outputs["wrapped"].double())
            else:
                whole = layer(torch.cat([x, new.expand(-1, STEPS, -1)], 1))[:, -1:]
                found = relative_error(outputs["clustered"], whole.double())
            if found > 1e-5:
                raise SystemExit(f"{kind}, {clusters} clusters: error {found} in decoding")
            # A round takes milliseconds, so that a quiet one is found only among many.
            timed = interleave(cases, 5 * rounds)
            yield row("decode", kind, clusters, {"B": batch, "T": 1, "S": length}, timed, found, steps=STEPS)


def cache(_: int) -> Iterator[Row]:
    """Bytes of the caches; with D = Dv the clustered one takes (1 + K / H) / 2."""
    for kind, batch, clusters in CASES:
        attn, layer = make(kind, clusters)
        x, sizes = torch.randn(batch, 2048, E), []
        for module in (attn, layer):
            made = module.init_cache(batch, 2048)
            module(x, cache=made)
            sizes.append(made.nbytes)
        ratio, bound = sizes[0] / sizes[1], 2 / (1 + clusters / H)
        yield row("cache", kind, clusters, {"B": batch, "S": 2048}, None, None, ratio, bound, bytes=sizes)


def peak(_: int) -> Iterator[Row]:
    """Resident bytes of a prefill with a cache, the inputs' included, above those of a prompt of 16 tokens."""
    for clusters in (2, 4):
        sizes = []
        for name in ("wrapped", "clustered"):
            found = []
            for tokens in (16, 4096):
                settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
                command = [sys.executable, __file__, "--measure", name, str(tokens), str(clusters)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
                found.append(int(done.stdout))
            sizes.append(found[1] - found[0])
        yield row(
            "peak", "planted", clusters, {"B": 1, "T": 4096}, None, None, sizes[0] / sizes[1], None, bytes=sizes
        )  # fmt: skip


def measure(name: str, tokens: int, clusters: int) -> None:
    """Highest resident bytes of this process after one prefill."""
    attn, layer = make("planted", clusters)
    module: Any = layer if name == "clustered" else attn
    module(torch.randn(1, tokens, E), cache=module.init_cache(1, tokens))
    status = Path("/proc/self/status").read_text()
    print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024)


def row(
    phase: str,
    kind: str,
    clusters: int,
    shape: dict[str, int],
    timed: Any,
    found: float | None,
    ratio: float | None = None,
    bound: float | None = None,
    *,
    steps: int = 1,
    **more: Any,
) -> Row:
    """A result line with its verdict."""
    if timed is not None:
        ratio = timed["wrapped"].ms / timed["clustered"].ms
    assert ratio is not None
    made = {
        "suite": "clustering",
        "case": f"{kind}, K {clusters} of {H}",
        "phase": phase,
        "shape": {**shape, "E": E, "H": H, "K": clusters},
        "ms": None if timed is None else timed["clustered"].ms / steps,
        "ms_wrapped": None if timed is None else timed["wrapped"].ms / steps,
        "ratio": round(ratio, 3),
        "noise": None if timed is None else timed["clustered"].noise,
        "error": found,
        "rule": None if bound is None else ">=",
        "bound": bound,
        "passed": bound is None or ratio >= bound - 1e-9,
        **more,
    }
    ms = "" if made["ms"] is None else f"{made['ms']:9.3f} ms"
    print(f"{phase:<8} {made['case']:<18} {shape!s:<28} {ratio:7.3f} {ms:<13} {'' if found is None else found:.3}")
    return made


@torch.inference_mode()
def main() -> int:
    phases = {"prefill": prefill, "decode": decode, "cache": cache, "peak": peak}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(phases), default=list(phases))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        name, tokens, clusters = options.measure
        measure(name, int(tokens), int(clusters))
        return 0
    about = environment(("attnzoo",))
    rows = [{**found, **about} for phase in options.only for found in phases[phase](options.rounds)]
    if options.out:
        append_lines(options.out, rows)
    return int(not all(found["passed"] for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
