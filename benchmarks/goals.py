"""What the figures must show, as ratios of two cases of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
PHASES = ("forward", "forward+backward")


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every goal whose cases are among the rows, with its value and whether it is met."""
    found = {
        (row["suite"], row["phase"], row["shape"].get("B"), row["shape"].get("S"), row["case"]): row for row in rows
    }

    def case(suite: str, phase: str, name: str, B: int | None = None, S: int | None = None) -> Row | None:
        return found.get((suite, phase, B, S, name))

    return [
        _verdict(name, value, rule, bound)
        for name, value, rule, bound in [*_modules(case), *_decode(case), *_rest(case)]
    ]


def _modules(case: Any) -> Iterator[tuple[str, float, str, float]]:
    for phase in PHASES:

        def ms(name: str, phase: str = phase) -> float | None:
            row = case("modules", phase, name, 4)
            return None if row is None else row["ms"]

        pairs = [
            ("attnzoo MHA", "floor", "<=", 1.05),
            ("attnzoo GQA", "floor, G=2", "<=", 1.05),
            ("attnzoo MHA", "torch nn.MultiheadAttention", "<", 1.0),
            ("attnzoo MHA", "x-transformers flash", "<", 1.0),
            ("attnzoo MHA, RoPE", "transformers LlamaAttention, RoPE", "<", 1.0),
        ]
        if phase == "forward+backward":
            pairs += [
                ("attnzoo KHA mlp, RoPE", "attnzoo GQA, RoPE", "<=", 1.15),
                ("attnzoo KHA linear, RoPE", "attnzoo GQA, RoPE", "<=", 1.15),
            ]
        for ours, peer, rule, bound in pairs:
            a, b = ms(ours), ms(peer)
            if a is not None and b is not None:
                yield f"{phase}: {ours} / {peer}", a / b, rule, bound
    row = case("modules", "forward+backward", "attnzoo MHA", 4)
    if row is not None:
        yield "MiB saved for backward: attnzoo MHA", row["saved_mib"], "<=", 17.0


def _decode(case: Any) -> Iterator[tuple[str, float, str, float]]:
    for B, S, bound in ((1, 1024, 1.15), (1, 4096, 1.15), (8, 1024, 1.10)):
        for name in ("attnzoo MHA", "attnzoo GQA"):
            row = case("decode", "one token", name, B, S)
            if row is not None:
                yield f"decode B={B} S={S}: {name} / its floor", row["ratio"], "<=", bound


def _rest(case: Any) -> Iterator[tuple[str, float, str, float]]:
    recipe = case("recipe", "training step", "attnzoo recipe, MHA", 8)
    if recipe is not None:
        yield "tokens/s: recipe / plain loop", 1 / recipe["ratio"], ">=", 0.97
    ours = case("import", "fresh process", "import attnzoo, on top")
    if ours is not None:
        yield "seconds: import attnzoo on top of import torch", ours["ms"] / 1e3, "<=", 0.3


def _verdict(name: str, value: float, rule: str, bound: float) -> dict[str, Any]:
    passed = {"<=": value <= bound, "<": value < bound, ">=": value >= bound}[rule]
    return {
        "suite": "goals", "case": name, "phase": "", "shape": {}, "ms": None, "ratio": round(value, 3),
        "noise": None, "error": None, "rule": rule, "bound": bound, "passed": passed,
    }  # fmt: skip
