"""Peak memory of each process while a decoder is built and makes one AdamW step, alone and sharded over two.

    python benchmarks/sharded_memory.py --out benchmarks/results/sharded_memory.jsonl

Processes run on CPU with gloo; what importing takes is subtracted. Each row has the largest peak among the processes,
and its ratio to that of one process that builds the decoder in the ordinary way.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import attnzoo
from attnzoo_recipes.feed_forward import SwiGLU
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.sharding import sharded_decoder


def peak() -> int:
    """Largest resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(rank: int, processes: int, store: str, sizes: dict[str, Any], found: Any) -> None:
    """Build, make a step, and report the bytes."""
    torch.set_num_threads(1)
    before = peak()
    attention = functools.partial(attnzoo.MultiHeadAttention, num_heads=16)
    torch.manual_seed(0)
    if processes == 1:
        model = DecoderLM(8192, attention, **sizes)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
        mesh = dist.init_device_mesh("cpu", (processes,))
        model = sharded_decoder(8192, attention, {"feed_forward": SwiGLU}, sizes, mesh, torch.device("cpu"))
    built = peak() - before
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.hidden(torch.zeros(1, 16, dtype=torch.int64)).square().mean().backward()
    optimizer.step()
    found.put({"built_bytes": built, "step_bytes": peak() - before, "parameters": model.num_parameters})


def main() -> None:
    """Measure one process and two, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=23)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    for processes in (1, 2):
        found = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"embed_dim": 1024, "num_layers": options.layers}
            started = [
                context.Process(target=measure, args=(rank, processes, f"{folder}/store", sizes, found))
                for rank in range(processes)
            ]
            for process in started:
                process.start()
            measured = [found.get(timeout=600) for _ in started]
            for process in started:
                process.join()
        largest = {name: max(each[name] for each in measured) for name in measured[0]}
        first = rows[0] if rows else largest
        ratios = {f"{name}_ratio": largest[f"{name}_bytes"] / first[f"{name}_bytes"] for name in ("built", "step")}
        rows.append({"processes": processes, **largest, **ratios, "torch": torch.__version__})
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
