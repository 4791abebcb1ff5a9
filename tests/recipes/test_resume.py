"""A run that was killed and resumed equals the one that was not, bit for bit."""

import csv
import os
import signal
import threading
import time

import pytest
import torch
from children import command, together

from attnzoo_recipes import files
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint

STEPS = 14
# Dropout, so that the random states matter; a checkpoint every 3 steps, validation every 5.
OPTIONS = ["--model.dropout=0.1", "--checkpoints.every_n_train_steps=3", "--trainer.log_every_n_steps=1"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_once_saved(folder, name):
    """Kill this process, whatever it is doing, once there is a checkpoint of that name."""

    def wait():
        while not any(name in path.name for path in folder.rglob("*.ckpt.json")):
            time.sleep(0.01)
        kill()

    threading.Thread(target=wait, daemon=True).start()


def killed_in_a_save(number):
    """Kill this process after so many files of checkpoints have reached the disk."""
    synced, sync = [], files.sync

    def killing(file):
        sync(file)
        if ".ckpt" in file.name:
            synced.append(file)
        if len(synced) == number:
            kill()

    files.sync = killing


def finish(words):
    code, said = command(words)
    assert code == 0, said


def losses(folder):
    """Step to training loss, of all runs in a folder; a later run overwrites."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="") as file:
            found |= {row["step"]: row["train_loss"] for row in csv.DictReader(file) if row.get("train_loss")}
    return found


def assert_equal_runs(whole, resumed):
    ours, theirs = read_checkpoint(newest_valid(whole)), read_checkpoint(newest_valid(resumed))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    for index, state in moments[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][index][name])), name
    final = str(STEPS - 1)
    assert losses(whole)[final] == losses(resumed)[final]


@pytest.mark.parametrize(
    ("mechanism", "more"),
    [
        pytest.param("kha", (), marks=pytest.mark.slow),
        (
            "kha",
            (
                "--data.windows=random",
                "--trainer.accumulate_grad_batches=2",
                "--data.num_workers=2",
                "--config=configs/training/muon.yaml",
                "--config=configs/training/wsd.yaml",
                "--lr_scheduler.init_args.warmup_steps=2",
                "--lr_scheduler.init_args.decay_steps=6",
                "--model.z_loss=1e-3",
            ),
        ),
        pytest.param("gta", (), marks=pytest.mark.slow),
        pytest.param("mha", ("--model.compile=true",), marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_of_a_run(mechanism, more, arguments, tmp_path):
    words = arguments(mechanism, *OPTIONS, *more, steps=STEPS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*words, f"--trainer.default_root_dir={whole}"])
    words = [*words, f"--trainer.default_root_dir={killed}"]
    assert command(words, killed_once_saved, killed, "step=6")[0] == -signal.SIGKILL
    path = newest_valid(killed)
    assert read_checkpoint(path)["global_step"] < STEPS
    finish([*words, f"--ckpt_path={path}"])
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("sync", [4, *(pytest.param(sync, marks=pytest.mark.slow) for sync in (5, 6))])
def test_killed_in_the_middle_of_a_save(sync, arguments, tmp_path):
    words = arguments("mqa", *OPTIONS, steps=STEPS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*words, f"--trainer.default_root_dir={whole}"])
    words = [*words, f"--trainer.default_root_dir={killed}"]
    assert command(words, killed_in_a_save, sync)[0] == -signal.SIGKILL
    path = newest_valid(killed)
    assert read_checkpoint(path)["global_step"] in (3, 6)
    finish([*words, f"--ckpt_path={path}"])
    assert_equal_runs(whole, killed)


def test_a_flipped_bit_in_the_last_checkpoint_is_noticed(arguments, run, tmp_path):
    words = arguments("gqa", "--checkpoints.every_n_train_steps=2", steps=4)
    run(words)
    folder = newest_valid(tmp_path / "run").parent
    last, before = folder / "step=4.ckpt", folder / "step=2.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    assert newest_valid(folder) == before
    with pytest.warns(UserWarning, match=r"step=4\.ckpt.*step=2\.ckpt"):
        run([*words, "--trainer.max_steps=5", f"--ckpt_path={last}"])
    assert read_checkpoint(tmp_path / "run" / "version_1")["global_step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["kha", "moh", "moa"])
def test_two_processes_equal_one(mechanism, arguments, tmp_path):
    words = arguments(
        mechanism,
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--model.aux_loss_weight=20",  # so that routers show which batch they balance
        steps=4,
    )
    finish([*words, f"--trainer.default_root_dir={tmp_path / '1'}"])
    for code, said in together([*words, f"--trainer.default_root_dir={tmp_path / '2'}", "--trainer.strategy=ddp"]):
        assert code == 0, said
    alone, shared = (read_checkpoint(tmp_path / str(devices))["state_dict"] for devices in (1, 2))
    for name, value in alone.items():
        torch.testing.assert_close(value, shared[name], atol=2e-6, rtol=1e-5, msg=name)
    expected, found = (losses(tmp_path / str(devices)) for devices in (1, 2))
    assert len(expected) == 4
    assert {step: float(loss) for step, loss in found.items()} == pytest.approx(
        {step: float(loss) for step, loss in expected.items()}, rel=1e-5
    )
