"""Processes that are started once and sent work: functions that run on every rank of a group."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

processes = torch.multiprocessing.get_context("fork")
TIMEOUT = 60


def _serve(rank: int, size: int, store: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send(("done", function(*arguments)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """P gloo processes; `run` calls a function on all of them and returns what each gives."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.started: list[Any] = []

    def start(self) -> None:
        """Start the processes if they do not run."""
        if self.started:
            return
        self.folder = TemporaryDirectory()
        pairs = [processes.Pipe() for _ in range(self.size)]
        self.pipes = [own for own, _ in pairs]
        store = Path(self.folder.name) / "store"
        self.started = [
            processes.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.started:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; numbers and names, since tensors would be shared memory."""
        self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(2 * TIMEOUT):
                self.stop(kill=True)
                raise AssertionError(f"rank {rank} gave no answer")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (state, text) in enumerate(answers) if state == "failed"]
        if failed:
            # Ranks may wait for each other's messages.
            self.stop(kill=True)
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def stop(self, kill: bool = False) -> None:
        """End the processes."""
        for process, pipe in zip(self.started, self.pipes if self.started else (), strict=True):
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process in self.started:
            process.join(10)
        if self.started:
            self.folder.cleanup()
        self.started = []
