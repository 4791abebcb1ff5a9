"""Runs whose parameters are spread over processes: they equal one process, and their checkpoints are kept."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from children import before, together

from attnzoo_recipes.checkpointing import read_checkpoint

SHARDED = "--config=configs/distributed/fsdp.yaml"


def succeed(words, world_size=2, **options):
    for code, said in together(words, world_size, **options):
        assert code == 0, said


def metrics(folder):
    """Every logged number of a run by step, but those of the clock."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name not in ("step", "epoch", "tokens_per_second"):
                    found[name, int(row["step"])] = float(value)
    return found


def assert_equal_runs(expected, found, tolerance=1e-10):
    alone, together = read_checkpoint(expected), read_checkpoint(found)
    assert alone["global_step"] == together["global_step"]
    assert alone["state_dict"].keys() == together["state_dict"].keys()
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(value, together["state_dict"][name], atol=tolerance, rtol=0, msg=name)
    for one, two in zip(alone["optimizer_states"], together["optimizer_states"], strict=True):
        assert one["param_groups"] == two["param_groups"]
        for number, values in one["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(value, two["state"][number][name], atol=tolerance, rtol=0, msg=name)


EQUAL = {
    "mha": ["--model.activation_checkpointing=true", "--model.tie_embeddings=false"],
    "mla": ["--trainer.accumulate_grad_batches=2", "--model.z_loss=0.001"],
    "moh": ["--model.aux_loss_weight=20"],
    "kha": [],
    "dcmha": [],
    "linear": [],
    "mhla": [],
    "moa": ["--model.aux_loss_weight=20"],
}
FAST = ("mha", "mla", "moh")


@pytest.mark.parametrize(
    "mechanism", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in EQUAL]
)
def test_two_processes_equal_one(mechanism, arguments, run, tmp_path):
    words = arguments(mechanism, "--trainer.precision=64-true", "--trainer.log_every_n_steps=1", *EQUAL[mechanism])
    words += ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--checkpoints.every_n_train_steps=20"]
    alone, sharded = (f"--trainer.default_root_dir={tmp_path / name}" for name in ("alone", "sharded"))
    run([*words, alone, "--trainer.accelerator=cpu", "--trainer.devices=1"])
    succeed([*words, sharded, SHARDED])
    assert_equal_runs(tmp_path / "alone", tmp_path / "sharded")
    expected, found = metrics(tmp_path / "alone"), metrics(tmp_path / "sharded")
    assert ("train_loss", 19) in expected
    assert ("val_bits_per_byte", 19) in expected
    assert found == pytest.approx(expected, abs=1e-9)
    texts = [(tmp_path / name / "version_0" / "samples.txt").read_text() for name in ("alone", "sharded")]
    assert texts[0] == texts[1]


def test_runs_continue_on_another_number_of_processes(arguments, tmp_path):
    words = arguments("kha", "--trainer.precision=64-true", "--checkpoints.every_n_train_steps=3", steps=6)
    for name, world_size, more in (("alone", 1, []), ("sharded", 2, [SHARDED])):
        succeed([*words, *more, f"--trainer.default_root_dir={tmp_path / name}"], world_size)
    assert_equal_runs(tmp_path / "alone", tmp_path / "sharded")
    old = {name: next((tmp_path / name).rglob("step=3.ckpt")) for name in ("alone", "sharded")}
    assert old["sharded"].is_dir()
    assert old["alone"].is_file()
    for name, source, world_size, more in (
        ("2 to 1", "sharded", 1, [SHARDED]),
        ("2 to 1 without shards", "sharded", 1, []),
        ("1 to 2", "alone", 2, [SHARDED]),
        ("from one shard to 2", "2 to 1", 2, [SHARDED]),
        ("2 to 2, damaged", "sharded", 2, [SHARDED]),
    ):
        path = old[source] if source in old else next((tmp_path / source).rglob("*.ckpt"))
        if "damaged" in name:
            path = path.with_name("step=6.ckpt")
            shard = sorted(path.glob("*/*.safetensors"))[-1]
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        folder = tmp_path / name
        reached = 4 if name == "2 to 1" else 6
        changed = [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={reached}", "--model.schedule_steps=6"]
        said = together([*words, *more, *changed, f"--ckpt_path={path}"], world_size)
        assert [code for code, _ in said] == [0] * world_size, said
        assert ("is damaged: its SHA-256" in said[0][1]) == ("damaged" in name)
        if reached == 6:
            assert_equal_runs(tmp_path / "alone", folder)


def lose(rank, lost):
    from attnzoo_recipes.training import Pretraining

    def die(module, batch, batch_idx):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == lost:
        before(Pretraining, "training_step", die)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_a_sentence(lost, arguments):
    said = together([*arguments("mha"), SHARDED], prepare=lose, arguments=(lost,), timeout=60)
    assert said[lost][0] == -signal.SIGKILL
    code, output = said[1 - lost]
    assert code == 6
    assert "Traceback" not in output
    assert output.count("attnzoo-pretrain: another process of this run has ended or does not answer") == 1


@pytest.mark.parametrize("config", sorted(Path("configs/distributed").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_distributed_config_trains(config, arguments, tmp_path):
    succeed([*arguments("mha"), f"--config={config}"])
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(precision, arguments, tmp_path):
    succeed([*arguments("mla"), SHARDED, f"--trainer.precision={precision}"])
    expected = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {value.dtype for value in read_checkpoint(tmp_path / "run")["state_dict"].values()} == {expected}
