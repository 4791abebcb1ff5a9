"""A run on the linear attention kernels learns what a run on the definition learns."""

import csv

import pytest
import torch


@pytest.mark.parametrize("mechanism", ["mhla", pytest.param("linear", marks=pytest.mark.slow)])
def test_two_steps_on_the_kernels_are_two_steps_on_the_definition(mechanism, arguments, run, tmp_path):
    """Packed documents, the optimiser and the projection of mixing matrices included."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("about the interpreter on a CPU; float32 on a GPU trains in another order of sums")
    losses = {}
    for backend in ("eager", "triton"):
        folder = tmp_path / backend
        run(
            arguments(
                mechanism,
                "--model.attention.init_args.num_heads=2",
                f"--model.attention.init_args.backend={backend}",
                f"--trainer.default_root_dir={folder}",
                "--trainer.limit_val_batches=0",
                "--trainer.limit_test_batches=0",
                "--data.batch_size=1",
                "--model.num_layers=1",
            )
        )
        (metrics,) = folder.rglob("metrics.csv")
        with metrics.open(newline="") as file:
            losses[backend] = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
    assert len(losses["eager"]) == 2
    assert losses["eager"][0] != losses["eager"][1]
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-5)
