"""Every file of configs/ is read, built and trained."""

from pathlib import Path

import pytest
import torch

from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
MECHANISMS = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_trains(mechanism, arguments, run, tmp_path, capsys):
    run(arguments(mechanism))
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    printed = capsys.readouterr().out
    for name in ("parameters", "cache", "checkpoint", "metrics", "loss curve", "sample"):
        assert f"\n{name}" in printed


@pytest.mark.parametrize("overlay", [[], ["configs/quickstart.yaml"]], ids=["pretrain", "quickstart"])
def test_full_sizes_train(overlay, arguments, run, tmp_path):
    words = arguments("mqa", "--data.batch_size=2", "--data.block_size=64", "--data.vocab_size=300")
    smoke = words.index("configs/smoke.yaml")
    words[smoke - 1 : smoke + 1] = [word for name in overlay for word in ("--config", name)]
    run([*words, "--trainer.limit_val_batches=1"])
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2


def test_mechanisms_differ_in_their_attention_alone(arguments, run, tmp_path):
    states = {}
    for mechanism in ("gqa", "kha"):
        run(arguments(mechanism, f"--trainer.default_root_dir={tmp_path / mechanism}", "--model.lr=1e-30", steps=1))
        states[mechanism] = read_checkpoint(tmp_path / mechanism)["state_dict"]
    shared = [name for name in states["gqa"] if ".attn." not in name]
    assert len(shared) > 8
    for name in shared:
        assert torch.equal(states["gqa"][name], states["kha"][name]), name


def test_validate_and_test_read_a_checkpoint(arguments, run, tmp_path, capsys):
    words = arguments("kha", "--data.test_fraction=0.2")
    run(words)
    path = newest_valid(tmp_path / "run")
    for command, split in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        run([command, *words[1:], f"--ckpt_path={path}"])
        assert f"{split}_bits_per_byte" in capsys.readouterr().out


def test_validate_reads_other_text_than_the_checkpoint_was_trained_on(arguments, run, tmp_path, capsys):
    words = arguments()
    run(words)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"line {i} of some other text" for i in range(40)))
    capsys.readouterr()
    run(["validate", *words[1:], f"--data.files=['{other}']", f"--ckpt_path={newest_valid(tmp_path / 'run')}"])
    assert "val_bits_per_byte" in capsys.readouterr().out
