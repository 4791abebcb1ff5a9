"""The tables of docs/gpu.md, made from committed results of a GPU.

python benchmarks/gpu_table.py           print them
python benchmarks/gpu_table.py --write   put them between the page's markers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- made by benchmarks/gpu_table.py -->", "<!-- end -->"
Line = dict[str, Any]


def read(name: str) -> list[Line]:
    """The lines of a committed file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def calls() -> list[str]:
    """A row for each call and its sizes: the device's time, the host's on top, rates, memory and the peers."""
    copied = json.loads((RESULTS / "gpu_tests_nvidia-h200.json").read_text())["versions"]["copy_gbytes"]
    rows = {(row["case"], row["phase"]): (row, "before") for row in read("gpu_nvidia-h200_before_tuning.jsonl")}
    rows |= {(row["case"], row["phase"]): (row, "now") for row in read("gpu_nvidia-h200.jsonl")}
    heads = "call | phase | tiles | us | called from Python, us | rate | peak MiB | times as fast as"
    lines = [f"| {heads} |", "| --- " * 8 + "|"]
    for (case, phase), (row, tiles) in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1])):
        if row["failure"]:
            continue
        peers = {name: ms / row["graph_ms"] for name, ms in row["peers_graph_ms"].items()}
        peers |= {name: ms / row["ms"] for name, ms in row["peers"].items() if name not in peers}
        text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in peers.items())
        faster = row["ms"] / row["graph_ms"]
        copy, rate = row["gbytes"] * faster / copied, row["tflops"] * faster
        rates = [f"{rate:.0f} TFLOP/s"] if rate >= 19 else []
        # Bytes are counted for forward passes.
        rates += [f"{100 * copy:.0f} % of a copy's"] if row["gbytes"] and phase != "forward+backward" else []
        times = f"{row['graph_ms'] * 1e3:.1f} | {row['ms'] * 1e3:.1f}"
        sizes = (f"{name}={size}" for name, size in row["shape"].items())
        call = " ".join([case, *(size for size in sizes if size not in case.split())])
        lines.append(f"| {call} | {phase} | {tiles} | {times} | {', '.join(rates)} | {row['peak_mib']:.0f} | {text} |")
    return lines


def tiles() -> list[str]:
    """A row for each sweep: the tiles that the table had, the fastest of the candidates, and the call's times."""
    sweeps: dict[str, list[Line]] = {}
    for line in read("gpu_tune_nvidia-h200.jsonl"):
        # The same call at a later commit is another sweep, around the tiles that won before.
        sweeps.setdefault(line["sweep"] + line["commit"], []).append(line)
    lines = ["| sweep | kernel | call | tiles before | us | fastest candidate | us | ratio |", "| --- " * 8 + "|"]
    for found in sweeps.values():
        table = next(line for line in found if line["role"] == "table")
        best = max((x for x in found if x["role"] == "candidate" and x["ratio"]), key=lambda x: x["ratio"])
        shape = ", ".join(f"{name} {size}" for name, size in table["shape"].items() if size)
        lines.append(
            f"| {table['sweep']} | {table['kernel']} | {shape} | {_tiles(table)} | {table['ms'] * 1e3:.1f} | "
            f"{_tiles(best)} | {best['ms'] * 1e3:.1f} | {best['ratio']:.2f} |"
        )
    return lines


def _tiles(line: Line) -> str:
    sizes: Iterable[int] = (size for name, size in line["tiles"].items() if name != "splits")
    splits = line["tiles"].get("splits")
    written = "/".join(("x".join(map(str, sizes)), str(line["num_warps"]), str(line["num_stages"])))
    return f"{written}, {splits} splits" if splits else written


def page(text: str) -> str:
    """The page with the tables put into it."""
    for made in (calls(), tiles()):
        before, _, rest = text.partition(BEGIN + "\n")
        _, _, after = rest.partition(END)
        # Marked as done, so that the next table goes to the next place.
        table = "\n".join(made)
        text = f"{before}\0{table}\n\1{after}"
    return text.replace("\0", BEGIN + "\n").replace("\1", END)


def main() -> None:
    """Print the tables, or write the page."""
    parser = argparse.ArgumentParser(description="The tables of docs/gpu.md, made from committed results.")
    parser.add_argument("--write", action="store_true", help="put them into the page")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print("\n".join([*calls(), "", *tiles()]))


if __name__ == "__main__":
    main()
