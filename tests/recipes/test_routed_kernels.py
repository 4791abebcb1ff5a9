"""A run on the kernels of routed heads learns what a run on the definition learns."""

import csv

import pytest
import torch


@pytest.mark.parametrize("mechanism", ["moh", "moa"])
def test_two_steps_on_the_kernels_are_two_steps_on_the_definition(mechanism, arguments, run, tmp_path, monkeypatch):
    """Packed documents, auxiliary losses and the optimiser included."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("about the interpreter on a CPU; float32 on a GPU trains in another order of sums")
    from attnzoo_kernels import expert_projection, head_routing
    from attnzoo_recipes.callbacks import summary as report

    # The closing sample is decoded token by token, which takes the interpreter minutes.
    monkeypatch.setattr(report, "WRITTEN", 0)
    owner, name = {
        "moh": (head_routing, "routed_attention"), "moa": (expert_projection, "expert_linear"),
    }[mechanism]  # fmt: skip
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))
    losses = {}
    for backend in ("eager", "triton"):
        folder = tmp_path / backend
        run(
            arguments(
                mechanism,
                "--model.attention.init_args.num_heads=4",
                f"--model.attention.init_args.backend={backend}",
                f"--trainer.default_root_dir={folder}",
                "--trainer.limit_val_batches=0",
                "--trainer.limit_test_batches=0",
                "--data.batch_size=2",
                "--model.num_layers=1",
            )
        )
        assert bool(calls) == (backend == "triton")
        (metrics,) = folder.rglob("metrics.csv")
        with metrics.open(newline="") as file:
            losses[backend] = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
    assert len(losses["eager"]) == 2
    assert losses["eager"][0] != losses["eager"][1]
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-5)
