"""The speed tables of docs/speed.md, made from committed results.

python benchmarks/speed_table.py           print them
python benchmarks/speed_table.py --write   put them between the page's markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
BEGIN, END = "<!-- made by benchmarks/speed_table.py -->", "<!-- end -->"
MODULES = (
    "floor", "attnzoo MHA", "x-transformers flash", "torch nn.MultiheadAttention", "attnzoo MHA, RoPE",
    "transformers LlamaAttention, RoPE", "floor, G=2", "attnzoo GQA", "attnzoo GQA, RoPE", "attnzoo KHA mlp, RoPE",
    "attnzoo KHA linear, RoPE", "attnzoo GTA, RoPE",
)  # fmt: skip
DECODING = (
    "floor", "attnzoo MHA", "attnzoo MHA, RoPE", "torch.cat cache", "x-transformers cache",
    "transformers DynamicCache, RoPE", "floor, G=2", "attnzoo GQA",
)  # fmt: skip
PLACES = ((1, 1024), (1, 4096), (8, 1024))


def tables(path: Path = RESULTS) -> str:
    """Markdown: one layer, one decoded token, the recipe and the import; the last run in the file counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    found = {_key(row): row for row in rows}
    machine, versions = rows[-1]["machine"], rows[-1]["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "attnzoo")
    lines = [
        f"Measured on {rows[-1]['date'][:10]} with attnzoo {versions['attnzoo']}, on a {machine} in float32 ({named}): "
        "times over the floor of the same run, which is one fused "
        "qkv projection, `scaled_dot_product_attention` and the output projection. Causal, E = 512, H = 8, "
        "B = 4, T = 512; rows after \"floor, G=2\" have 2 key/value heads.",
        "",
        "| one layer | forward | forward + backward | MiB saved for backward |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    scale = 1.0
    for name in MODULES:
        forward, both = (found["modules", phase, name, 4, None] for phase in ("forward", "forward+backward"))
        if name.startswith("floor"):
            scale, base = both["ms"], forward["ms"]
        lines.append(f"| {name} | {forward['ms'] / base:.2f} | {both['ms'] / scale:.2f} | {both['saved_mib']:.1f} |")
    lines += ["", "| one decoded token | " + " | ".join(f"B = {B}, {S:,} cached" for B, S in PLACES) + " |"]
    lines += ["| --- " * (1 + len(PLACES)) + "|"]
    for name in DECODING:
        ratios = [found["decode", "one token", name, *place]["ratio"] for place in PLACES]
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    goals = {row["case"]: row["ratio"] for row in rows if row["suite"] == "goals"}
    recipe = goals["tokens/s: recipe / plain loop"]
    seconds = goals["seconds: import attnzoo on top of import torch"]
    lines += [
        "",
        f"The recipe trains at {recipe:.2f} times the tokens per second of a plain training loop with the same "
        f"dimensions; `import attnzoo` takes {seconds:.2f} s on top of `import torch`.",
    ]
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["suite"], row["phase"], row["case"], row["shape"].get("B"), row["shape"].get("S")


def written(page: str, made: str) -> str:
    """The page with what stands between the markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"docs/speed.md must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The speed tables of docs/speed.md, from benchmarks/results/cpu.jsonl."
    )
    parser.add_argument("--write", action="store_true", help="put them into docs/speed.md instead of printing them")
    arguments = parser.parse_args()
    if arguments.write:
        path = ROOT / "docs" / "speed.md"
        path.write_text(written(path.read_text(), tables()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
