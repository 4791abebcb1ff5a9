"""Tokenisation of a large made corpus: tokens per second and peak memory, by number of processes.

    python benchmarks/tokenization.py                                          200 MB; a few minutes on 2 cores
    python benchmarks/tokenization.py --megabytes 2000 --out benchmarks/results/tokenization.jsonl

The corpus is eight files of JSON lines in a temporary folder, removed at the end: the sources of the standard library
again and again, cut into documents of 1 to 400 lines whose order is drawn with a fixed seed. `bpe` is a vocabulary of
4,096 learnt from the first 20 MB, before the clock starts.

Each row is one run of `attnzoo_recipes.data.packing.pack`, from reading the corpus for its hash to checking the
finished files: `ms`, `tokens_per_second`, `ratio` (speed relative to one process with the same tokenizer), and `mib`,
the largest sum of the proportional set sizes of all its processes, looked at ten times a second. With one process
bpe uses the threads of the package tokenizers, with more it does not. The files of all runs with a tokenizer have to be
equal, otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import append_lines, environment

from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.packing import pack
from attnzoo_recipes.data.tokenizers import BpeTokenizer, save_tokenizer

SHARDS = 8
BPE_VOCABULARY, BPE_BYTES = 4096, 20_000_000


def documents() -> Iterator[str]:
    """Without end."""
    draw = random.Random(0)
    lines = "".join(Corpus().documents()).splitlines(keepends=True)
    while True:
        starts = [0]
        while starts[-1] < len(lines):
            starts.append(starts[-1] + draw.randint(1, 400))
        pieces = list(itertools.pairwise(starts))
        draw.shuffle(pieces)
        yield from ("".join(lines[first:last]) for first, last in pieces)


def make(folder: Path, size: int) -> None:
    """Write shards of together `size` bytes of text, and the tokenizer."""
    source = documents()
    for shard in range(SHARDS):
        written = 0
        with (folder / f"shard-{shard}.jsonl").open("w") as file:
            while written < size / SHARDS:
                text = next(source)
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
    taken = 0
    texts = []
    for text in documents():
        texts.append(text)
        taken += len(text)
        if taken >= BPE_BYTES:
            break
    save_tokenizer(BpeTokenizer.train(iter(texts), BPE_VOCABULARY), folder / "tokenizer.json")


def one(folder: Path, tokenizer: str, num_proc: int) -> dict[str, Any]:
    """A run in this process."""
    name = str(folder / "tokenizer.json") if tokenizer == "bpe" else tokenizer
    corpus = Corpus("json", (str(folder / "*.jsonl"),))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        packed = pack(corpus, name, 0, 0.05, 0.05, Path(cache), num_proc=num_proc)
        seconds = time.perf_counter() - start
        sums = (packed.folder / "SHA256SUMS").read_text()
    splits = packed.meta["splits"].values()
    return {"seconds": seconds, "sums": sums, **{key: sum(s[key] for s in splits) for key in ("tokens", "bytes")}}


def memory_of(session: int) -> float:
    """MiB of all processes of a session, shared pages counted once."""
    total = 0
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # it has ended
    return total / 1024


def measured(folder: Path, tokenizer: str, num_proc: int) -> tuple[dict[str, Any], float]:
    """A run in a session of its own, and its peak memory."""
    command = [sys.executable, __file__, "--one", str(folder), tokenizer, str(num_proc)]
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.1)
        said = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(said)
    return result, peak


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="text of the corpus, in 10^6 bytes")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "bpe"], choices=["byte", "bpe"])
    parser.add_argument("--num-proc", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        sys.stdout.write(json.dumps(one(Path(chosen.one[0]), chosen.one[1], int(chosen.one[2]))))
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), chosen.megabytes * 10**6)
        for tokenizer in chosen.tokenizers:
            first: dict[str, Any] = {}
            for num_proc in chosen.num_proc:
                result, peak = measured(Path(name), tokenizer, num_proc)
                first = first or result
                failed |= result["sums"] != first["sums"]
                row = {
                    "suite": "tokenization", "case": tokenizer, "phase": f"{num_proc} processes",
                    "shape": {"bytes": result["bytes"], "tokens": result["tokens"]}, "ms": result["seconds"] * 1e3,
                    "ratio": first["seconds"] / result["seconds"], "noise": None,
                    "error": float(result["sums"] != first["sums"]), "mib": round(peak),
                    "tokens_per_second": round(result["tokens"] / result["seconds"]),
                }  # fmt: skip
                sys.stdout.write(
                    f"{tokenizer}, {num_proc} processes: {row['tokens_per_second']:,} tokens/s, {row['mib']:,} MiB, "
                    f"{result['seconds']:.1f} s\n"
                )
                sys.stdout.flush()
                if chosen.out is not None:
                    append_lines(chosen.out, [{**row, **environment()}])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
