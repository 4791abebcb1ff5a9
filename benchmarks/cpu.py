"""Speed on a CPU: modules, decoding, the recipe and the import, each beside its peers.

    python benchmarks/cpu.py                                   everything; about ten minutes
    python benchmarks/cpu.py --only modules decode --rounds 5  a quick look
    python benchmarks/cpu.py --out benchmarks/results/cpu.jsonl

One thread, interleaved rounds, minima. Every case's numbers are compared with the formula in float64 before
they count. What is printed last are the goals with pass or fail; the exit status is 1 if one fails.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from baselines import (
    FusedAttention,
    GrowingCacheAttention,
    LlamaLayer,
    StaticCacheAttention,
    Weights,
    XTransformersLayer,
    ZooLayer,
    exact_attention,
    torch_multihead,
)
from goals import judge
from timing import Timing, append_lines, environment, interleave, once, relative_error, saved_bytes
from torch import Tensor, nn

Row = dict[str, Any]
TOLERANCE = 1e-4
PACKAGES = ("attnzoo", "transformers", "x-transformers", "lightning")
E, H, G = 512, 8, 2


def module_suite(rounds: int) -> Iterator[Row]:
    """Forward (eval, no gradients) and forward + backward of one causal layer."""
    import attnzoo

    B, T = 4, 512
    mha, gqa = Weights.random(E, H, H), Weights.random(E, H, G)
    plain: dict[str, Any] = {"rope": None}

    def grouped(kind: type[nn.Module], **options: Any) -> ZooLayer:
        return ZooLayer(kind(E, H, G, **options), gqa)

    rotating = {"attnzoo MHA, RoPE", "attnzoo GQA, RoPE", "transformers LlamaAttention, RoPE"}
    rotating |= {"attnzoo KHA mlp, RoPE", "attnzoo KHA linear, RoPE"}
    models: dict[str, nn.Module] = {
        "floor": FusedAttention(mha),
        "attnzoo MHA": ZooLayer(attnzoo.MultiHeadAttention(E, H, bias=False, **plain), mha),
        "attnzoo MHA, RoPE": ZooLayer(attnzoo.MultiHeadAttention(E, H, bias=False), mha),
        "attnzoo MHA, eager": ZooLayer(attnzoo.MultiHeadAttention(E, H, bias=False, backend="eager", **plain), mha),
        "torch nn.MultiheadAttention": torch_multihead(mha, T),
        "transformers LlamaAttention, RoPE": LlamaLayer(mha, T),
        "x-transformers flash": XTransformersLayer(mha),
        "x-transformers eager": XTransformersLayer(mha, flash=False),
        "floor, G=2": FusedAttention(gqa),
        "attnzoo GQA": grouped(attnzoo.GroupedQueryAttention, **plain),
        "attnzoo GQA, RoPE": grouped(attnzoo.GroupedQueryAttention),
        "attnzoo KHA mlp, RoPE": grouped(attnzoo.KnockingHeadsAttention),
        "attnzoo KHA linear, RoPE": grouped(attnzoo.KnockingHeadsAttention, variant="linear"),
        "attnzoo GTA, RoPE": ZooLayer(attnzoo.GroupedTiedAttention(E, H, G)),
    }
    torch.manual_seed(1)
    x, gradient = torch.randn(B, T, E), torch.randn(B, T, E)
    shape = {"B": B, "T": T, "E": E, "H": H}
    exact = {
        (name, rotary): _exact(x, gradient, lambda z, w=w, r=rotary: exact_attention(z, w, rotary=r))
        for name, w in (("mha", mha), ("gqa", gqa))
        for rotary in (False, True)
    }
    grouped_cases = {"floor, G=2", *(n for n in models if n.startswith(("attnzoo GQA", "attnzoo KHA")))}
    answers = {
        name: exact["gqa" if name in grouped_cases else "mha", name in rotating]
        for name in models
        if name != "attnzoo GTA, RoPE"
    }
    tied = models["attnzoo GTA, RoPE"]
    definition = attnzoo.GroupedTiedAttention(E, H, G, backend="eager", dtype=torch.float64)
    definition.load_state_dict(tied.module.state_dict())
    answers["attnzoo GTA, RoPE"] = _exact(x, gradient, lambda z: definition(z.double()))

    errors: dict[tuple[str, str], float] = {}
    saved: dict[str, float] = {}
    leaf = x.clone().requires_grad_()
    calls: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward+backward": {}}
    for name, model in models.items():
        inputs = [leaf, *model.parameters()]

        def forward(model: nn.Module = model) -> Tensor:
            with torch.no_grad():
                return model(x)

        def both(model: nn.Module = model, inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(leaf), inputs, gradient)

        calls["forward"][name], calls["forward+backward"][name] = forward, both
        errors["forward", name] = relative_error(forward(model.eval()), answers[name][0])
        errors["forward+backward", name] = relative_error(both(model.train())[0], answers[name][1])
        saved[name] = saved_bytes(lambda model=model: model(leaf), inputs) / 2**20
    for phase, cases in calls.items():
        for model in models.values():
            model.train(phase != "forward")
        times = interleave({name: once(call) for name, call in cases.items()}, rounds)
        for name, timing in times.items():
            own_floor = "floor, G=2" if name in grouped_cases else "floor"
            extra = {"saved_mib": round(saved[name], 2)} if phase != "forward" else {}
            sizes = shape | ({"G": G} if name in grouped_cases or "GTA" in name else {})
            yield _row("modules", name, phase, sizes, timing, times[own_floor], errors[phase, name], **extra)


def decode_suite(rounds: int, tokens: int = 32) -> Iterator[Row]:
    """One new token through one layer, with `S` tokens in its cache at the end of a block of `tokens`."""
    import attnzoo

    mha, gqa = Weights.random(E, H, H), Weights.random(E, H, G)
    rotating = {"attnzoo MHA, RoPE", "transformers DynamicCache, RoPE"}
    for B, S in ((1, 1024), (1, 4096), (8, 1024)):
        models: dict[str, Any] = {
            "floor": StaticCacheAttention(mha, B, S),
            "attnzoo MHA": ZooLayer(attnzoo.MultiHeadAttention(E, H, bias=False, rope=None), mha),
            "attnzoo MHA, RoPE": ZooLayer(attnzoo.MultiHeadAttention(E, H, bias=False), mha),
            "torch.cat cache": GrowingCacheAttention(mha),
            "transformers DynamicCache, RoPE": LlamaLayer(mha, S).start_decoding(),
            "x-transformers cache": XTransformersLayer(mha).start_decoding(),
            "floor, G=2": StaticCacheAttention(gqa, B, S),
            "attnzoo GQA": ZooLayer(attnzoo.GroupedQueryAttention(E, H, G, rope=None), gqa),
        }
        torch.manual_seed(2)
        x = torch.randn(B, S, E)
        start = S - tokens
        exact = {
            (name, rotary): exact_attention(x, w, rotary=rotary, last=tokens)
            for name, w, rotary in (("mha", mha, False), ("mha", mha, True), ("gqa", gqa, False))
        }
        errors, blocks = {}, {}
        with torch.no_grad():
            for name, model in models.items():
                model.eval()
                if isinstance(model, ZooLayer):
                    model.start_decoding(B, S)
                model(x[:, :start])
                outputs = torch.cat([model(x[:, t : t + 1]) for t in range(start, S)], dim=1)
                answer = exact["gqa" if name in ("floor, G=2", "attnzoo GQA") else "mha", name in rotating]
                errors[name] = relative_error(outputs, answer)
                blocks[name] = _decode_block(model, x, start)
            times = interleave(blocks, rounds)
        for name, timing in times.items():
            grouped = name in ("floor, G=2", "attnzoo GQA")
            shape = {"B": B, "S": S, "E": E, "H": H} | ({"G": G} if grouped else {})
            own_floor = times["floor, G=2" if grouped else "floor"]
            yield _row("decode", name, "one token", shape, timing, own_floor, errors[name])


def _decode_block(model: Any, x: Tensor, start: int) -> Callable[[], float]:
    """Median ms of the tokens after `start`; going back to `start` is not timed."""

    def measure() -> float:
        model.truncate(start)
        taken = []
        for t in range(start, x.shape[1]):
            token = x[:, t : t + 1]
            begin = time.perf_counter()
            model(token)
            taken.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(taken)

    return measure


def recipe_suite(rounds: int) -> Iterator[Row]:
    """Tokens/s of the recipe under its Trainer beside a plain loop with the same sizes and data."""
    from recipe_loops import compare

    yield from compare(rounds)


def import_suite(rounds: int) -> Iterator[Row]:
    """`import attnzoo` after `import torch`, each round in a fresh process."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import attnzoo; "
        "c = time.perf_counter(); import sys; "
        "heavy = [m for m in ('triton', 'transformers', 'lightning') if m in sys.modules]; "
        "print((b - a) * 1e3, (c - b) * 1e3, *heavy)"
    )
    taken: list[tuple[float, float]] = []
    for _ in range(min(rounds, 10)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        of_torch, of_ours, *heavy = done.stdout.split()
        if heavy:
            raise SystemExit(f"import attnzoo must not import {', '.join(heavy)}")
        taken.append((float(of_torch), float(of_ours)))
    columns = [Timing(min(ms), statistics.median(ms) / min(ms)) for ms in zip(*taken, strict=True)]
    for name, timing in zip(("import torch", "import attnzoo, on top"), columns, strict=True):
        yield _row("import", name, "fresh process", {}, timing, columns[0], 0.0)


SUITES = {"modules": module_suite, "decode": decode_suite, "recipe": recipe_suite, "import": import_suite}


def _exact(x: Tensor, gradient: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, from a float64 function."""
    z = x.clone().double().requires_grad_()
    out = function(z)
    return out.detach(), torch.autograd.grad(out, z, gradient.double())[0]


def _row(
    suite: str,
    case: str,
    phase: str,
    shape: dict[str, int],
    timing: Timing,
    floor: Timing,
    error: float,
    **extra: Any,
) -> Row:
    if not error <= TOLERANCE:
        raise SystemExit(f"{suite}, {case}, {phase}: error {error:.1e} against float64, limit {TOLERANCE:.0e}")
    return {
        "suite": suite,
        "case": case,
        "phase": phase,
        "shape": shape,
        "ms": round(timing.ms, 4),
        "ratio": round(timing.ms / floor.ms, 3),
        "noise": round(timing.noise, 2),
        "error": float(f"{error:.1e}"),
        **extra,
    }


def describe(row: Row) -> str:
    """One line of the printed table."""
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items() if name not in "EH")
    saved = f"  saved {row['saved_mib']:6.2f} MiB" if "saved_mib" in row else ""
    speed = f"  {row['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in row else ""
    return (
        f"{row['suite']:<8} {row['phase']:<17} {sizes:<14} {row['case']:<34} {row['ms']:>9.3f} ms "
        f"{row['ratio']:>6.3f}x  noise {row['noise']:4.2f}  error {row['error']:.0e}{saved}{speed}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SUITES,
        default=list(SUITES),
        metavar="NAME",
        help=f"of {', '.join(SUITES)}",
    )
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds of each suite (default 20)")
    parser.add_argument("--out", type=Path, help="append the results to this JSON-lines file")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    rows = []
    for row in itertools.chain.from_iterable(SUITES[name](options.rounds) for name in options.only):
        print(describe(row), flush=True)
        rows.append(row)
    verdicts = judge(rows)
    print("\ngoal" + " " * 66 + "value   must be")
    for goal in verdicts:
        print(
            f"{goal['case']:<68} {goal['ratio']:>7.3f}   {goal['rule']} {goal['bound']:<6g} "
            f"{'pass' if goal['passed'] else 'FAIL'}"
        )
    if options.out is not None:
        where = environment(PACKAGES)
        append_lines(options.out, [row | where for row in [*rows, *verdicts]])
    return 0 if all(goal["passed"] for goal in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
