"""Two steps of pretraining with composed attention on the kernels: the losses are those of the definition."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from attnzoo_recipes.callbacks.summary import Report
from tests.recipes.conftest import arguments, corpus_file, quiet_jsonargparse, run

__all__ = ["arguments", "corpus_file", "quiet_jsonargparse", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["dcmha", "talking_heads"])
def test_losses_of_two_steps(
    mechanism: str,
    arguments: Callable[..., list[str]],
    run: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two hundred decoded tokens at the end of a run take minutes in the interpreter.
    monkeypatch.setattr(Report, "sample", lambda *_: [])
    losses = []
    for backend in ("eager", "triton"):
        folder = tmp_path / backend
        words = [
            f"--model.attention.init_args.backend={backend}", f"--trainer.default_root_dir={folder}",
            "--data.block_size=16", "--data.batch_size=2", "--trainer.limit_val_batches=1",
            "--trainer.limit_test_batches=1", "--trainer.val_check_interval=2", "--samples.max_new_tokens=2",
        ]  # fmt: skip
        run(arguments(mechanism, *words))
        (metrics,) = folder.rglob("metrics.csv")
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        losses.append([float(row[name]) for row in rows for name in ("train_loss", "val_loss") if row.get(name)])
    assert len(losses[0]) >= 3
    # The second step's loss has gone through gradients and an update; sums of float32 in another order, no more.
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)
    assert losses[0][0] != losses[0][1]
