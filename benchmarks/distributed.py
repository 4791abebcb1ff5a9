"""Sharded sequences: bytes counted against formulas, time at fixed tokens a rank, and a model of larger machines.

python benchmarks/distributed.py --count --out benchmarks/results/distributed.jsonl      gloo processes on this CPU
python benchmarks/distributed.py --model                                                 tables of docs/scaling.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import attnzoo
import attnzoo.costs
from attnzoo.distributed import SequenceParallel, counting_traffic, parallelize, shard
from attnzoo.distributed.costs import bytes_sent
from attnzoo.distributed.sequence import forms_of

E, H = 256, 8
TOKENS = 512  # a rank
MECHANISMS: dict[str, Any] = {
    "mha": lambda e, h, **o: attnzoo.MultiHeadAttention(e, h, bias=False, **o),
    "gqa, G = H / 4": lambda e, h, **o: attnzoo.GroupedQueryAttention(e, h, h // 4, **o),
    "mqa": lambda e, h, **o: attnzoo.MultiQueryAttention(e, h, **o),
    "gta, G = H / 8": lambda e, h, **o: attnzoo.GroupedTiedAttention(e, h, h // 8, **o),
    "mla": lambda e, h, **o: attnzoo.MultiHeadLatentAttention(e, h, **o),
    "moh": lambda e, h, **o: attnzoo.MixtureOfHeadAttention(e, h, h // 4, **o),
    "dcmha, N = H / 4": lambda e, h, **o: attnzoo.DynamicallyComposableAttention(e, h, h // 4, head_groups=h // 4, **o),
    "linear": lambda e, h, **o: attnzoo.LinearAttention(e, h, **o),
    "mhla": lambda e, h, **o: attnzoo.MultiHeadLinearAttention(e, h, block_size=64, num_blocks=4096, **o),
}


def count(rank: int, ranks: int, folder: str, out: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for name, make in MECHANISMS.items():
        for form in forms_of(make(E, H)):
            torch.manual_seed(0)
            sp = SequenceParallel(None, form=form, layout="contiguous")
            module, T = parallelize(make(E, H), sp), TOKENS * ranks
            x = shard(torch.randn(1, T, E), 1, sp).requires_grad_()
            seconds = []
            for _ in range(4):
                dist.barrier()
                start = time.perf_counter()
                with counting_traffic() as forward:
                    y = module(x)
                with counting_traffic() as backward:
                    y.square().sum().backward()
                seconds.append(time.perf_counter() - start)
            modelled = bytes_sent(module, form, T, ranks, torch.float32) if ranks > 1 else (0, 0)
            row = {
                "mechanism": name, "form": form, "ranks": ranks, "tokens_per_rank": TOKENS, "width": E, "heads": H,
                "dtype": "float32", "sent": [forward.sent, backward.sent], "by_formula": list(modelled),
                "equal": [forward.sent, backward.sent] == list(modelled), "seconds": round(min(seconds[1:]), 4),
                "device": "cpu, gloo, 1 thread a rank", "torch": torch.__version__, "commit": commit,
                "date": datetime.date.today().isoformat(),
            }  # fmt: skip
            if rank == 0:
                print(json.dumps(row), flush=True)
                if out is not None:
                    with Path(out).open("a") as file:
                        file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def run(ranks: int, out: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = [
            torch.multiprocessing.get_context("fork").Process(target=count, args=(rank, ranks, folder, out))
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()


def traffic_table() -> None:
    """Of one layer and rank: E 4096, H 32, T 131072 over 8 ranks, bfloat16."""
    print("| mechanism | FLOPs a rank, 1e12 | cache a rank, MB | " + " | ".join(f"{f}, MB" for f in FORMS) + " |")
    print("| --- " * (3 + len(FORMS)) + "|")
    for name, make in MECHANISMS.items():
        with torch.device("meta"):
            module = make(4096, 32)
        mesh = {"sequence": 8}
        cells = []
        for form in FORMS:
            try:
                one = attnzoo.cost(module, 1, 131072, mesh=mesh, form=form)
                cells.append(f"{one.bytes_sent / 1e6:.0f} + {one.bytes_sent_backward / 1e6:.0f}")
            except ValueError:
                cells.append("-")
        print(
            f"| {name} | {one_of(module, mesh).forward_flops / 1e12:.2f} | "
            f"{one_of(module, mesh).cache_bytes / 1e6:.0f} | {' | '.join(cells)} |"
        )


FORMS = ("gather", "heads", "ring", "state")


def one_of(module: Any, mesh: dict[str, int]) -> attnzoo.costs.Cost:
    return attnzoo.cost(module, 1, 131072, mesh=mesh)


def memory_table() -> None:
    """Longest T of a training step: FSDP2 over all ranks, one sequence, every block recomputed.

    A rank holds 16 bytes a parameter / P (bfloat16 weights and gradients, float32 master weights and two moments); two
    blocks' gathered weights; of T / P tokens each block's input, and one block's activations, 34 E numbers; of gathered
    keys all T. 90 % of 80 GB.
    """
    sizes = {"7B (E 4096, 32 layers)": (4096, 32, 32), "70B (E 8192, 80 layers)": (8192, 64, 80)}
    print("| model | GPUs | gqa, gathered | gqa, heads or ring | mla, ring | linear |")
    print("| --- " * 6 + "|")
    for model, (width, heads, layers) in sizes.items():
        for ranks in (1, 8, 64, 512):
            parameters = 12 * width * width * layers
            room = 0.9 * 80e9 - 16 * parameters / ranks - 2 * 2 * parameters / layers
            cells = []
            for name, travels, whole in (
                ("gqa, G = H / 4", 0, True), ("gqa, G = H / 4", 4, False), ("mla", 4, False), ("linear", 0, False),
            ):  # fmt: skip
                with torch.device("meta"):
                    own = MECHANISMS[name](width, heads).cache_bytes_per_token()
                a_token = 2 * (width * layers + 34 * width) / ranks + (own if whole else travels * own / ranks)
                longest = int(room / a_token)
                cells.append("does not fit" if room <= 0 else f"{longest / 1000:,.0f} k")
            print(f"| {model} | {ranks} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="run gloo processes")
    parser.add_argument("--model", action="store_true", help="print modelled tables")
    parser.add_argument("--out", help="append JSON lines to this file")
    arguments = parser.parse_args()
    if arguments.count:
        for ranks in (1, 2):
            run(ranks, arguments.out)
    if arguments.model:
        traffic_table()
        print()
        memory_table()
