"""What is logged and shown, in optimiser steps."""

import csv
import json
import math
import re

import pytest
import torch

from attnzoo_recipes.callbacks import progress
from attnzoo_recipes.callbacks.progress import LossCurve, peak_flops
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.model_config import model_from_checkpoint


def rows(folder):
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        return list(csv.DictReader(file))


def test_accumulation_counts_optimiser_steps(arguments, run, tmp_path):
    words = ["--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3", "--model.dropout=0"]
    found = {}
    for batch, batches in ((8, 1), (2, 4)):
        folder = tmp_path / str(batches)
        sizes = [f"--data.batch_size={batch}", f"--trainer.accumulate_grad_batches={batches}"]
        run(arguments("moh", *words, *sizes, f"--trainer.default_root_dir={folder}", steps=6))
        found[batches] = rows(folder)
        callbacks = read_checkpoint(folder)["callbacks"]
        curve = callbacks[LossCurve().state_key]
        assert [step for step, _ in curve["train"]] == [2, 4, 6]
        assert [step for step, _ in curve["val_bits_per_byte"]] == [3, 6]
    for name in ("step", "lr", "train_loss", "val_bits_per_byte"):
        ours, theirs = ([float(row[name]) for row in found[n] if row[name]] for n in (1, 4))
        assert len(ours) >= 2
        assert theirs == pytest.approx(ours, rel=2e-3), name
    assert [row["step"] for row in found[4] if row["train_loss"]] == ["1", "3", "5"]


def test_a_run_that_continues_with_another_accumulation_counts_its_own_batches(arguments, run, tmp_path):
    words = ["--checkpoints.every_n_train_steps=1", "--checkpoints.keep=9", "--trainer.val_check_interval=3"]
    batches = "--trainer.accumulate_grad_batches={}"
    run(arguments("mha", *words, batches.format(2), "--data.batch_size=4", steps=4))
    first = tmp_path / "run/version_0/checkpoints/step=4.ckpt"
    for now, size in ((1, 8), (4, 2), (3, 4)):
        folder = tmp_path / str(now)
        sizes = [batches.format(now), f"--data.batch_size={size}", f"--trainer.default_root_dir={folder}"]
        run(arguments("mha", *words, *sizes, f"--ckpt_path={first}", steps=9))
        drawn = [
            read_checkpoint(folder / f"version_0/checkpoints/step={step}.ckpt")["TextDataModule"]["samples"]
            for step in range(5, 10)
        ]
        assert drawn == [32 + now * size * steps for steps in range(1, 6)]
        assert [row["step"] for row in rows(folder) if row["val_loss"]] == ["5", "8"]


def test_lines_instead_of_a_bar(arguments, run, capfd, monkeypatch):
    words = list(arguments("mha", "--progress=lines", "--trainer.val_check_interval=2"))
    at = words.index("--trainer.enable_progress_bar")
    run([*words[:at], *words[at + 2 :]])
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(("step", "validation"))]
    assert re.fullmatch(
        r"step 1/2  train_loss \d\.\d{4}  lr [\d.e-]+  tokens_per_second [\d,]+  left 0:00:\d\d", lines[0]
    )
    assert lines[1].startswith("step 2/2  train_loss")
    assert re.fullmatch(r"validation after step 2  val_bits_per_byte \d\.\d{4}", lines[2])
    assert "training:" not in err


@pytest.mark.parametrize(("progress", "shown"), [("bar", True), ("none", False), ("auto", False)])
def test_other_forms_of_progress(progress, shown, arguments, run, capfd):
    words = arguments("mha", f"--progress={progress}")
    at = words.index("--trainer.enable_progress_bar")
    run([*words[:at], *words[at + 2 :]])
    err = capfd.readouterr()
    assert ("training:" in err.out + err.err) == shown
    assert ("step 2/2" in err.err) == (progress == "auto")


def without(words, *names):
    """The arguments without these options and their values."""
    kept, skip = [], False
    for word in words:
        skip = word in names or (skip and not word.startswith("--"))
        kept += [] if skip else [word]
    return kept


def test_the_console_of_a_run(arguments, run, capfd, tmp_path):
    """Of less steps than the interval of the log, with another prompt."""
    words = arguments(
        "gqa", "--trainer.log_every_n_steps=50", "--trainer.val_check_interval=2", "--samples.prompt=the cat"
    )
    run(without(words, "--trainer.enable_model_summary"))
    printed = capfd.readouterr()
    model = model_from_checkpoint(read_checkpoint(tmp_path / "run"))
    assert "FLOPs: 0" not in printed.out
    assert re.search(r"^model +2 layers of width 32 with GroupedQueryAttention$", printed.out, re.M)
    size, parts = re.search(r"^parameters +([\d,]+) \((.*)\)$", printed.out, re.M).groups()
    assert int(size.replace(",", "")) == model.num_parameters
    assert sum(int(part.replace(",", "")) for part in re.findall(r"[\d,]*\d", parts)) == model.num_parameters
    flops = re.search(r"^training cost +([\d,]+) FLOPs per token", printed.out, re.M)[1]
    assert int(flops.replace(",", "")) == 3 * model.flops(32) // 32
    speed = re.search(r"^speed +([\d,]+) tokens/s", printed.out, re.M)[1]
    assert int(speed.replace(",", "")) > 0
    assert re.search(r"^sample, \d+ characters after 'the cat':\nthe cat", printed.out, re.M)
    (samples,) = (tmp_path / "run").rglob("samples.txt")
    assert "\nthe cat" in samples.read_text()
    assert "weights_only" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--trainer.limit_val_batches=1"], "all validation text"),
        (["--trainer.limit_val_batches=1.0", "--data.val_tokens=40"], "all validation text"),
        (["--trainer.limit_val_batches=1.0"], "the same text"),
    ],
)
def test_entropies_name_the_text_that_they_are_of(more, text, arguments, run, capfd):
    run(arguments("mha", "--trainer.val_check_interval=2", *more))
    assert f"bits per byte of {text} (the model is NOT below)" in capfd.readouterr().out


def test_sizes_of_layers_without_a_feed_forward_part(arguments, run, capfd):
    words = arguments("mha", "--config", "configs/feed_forward/depth0.yaml")
    run(without(words, "--trainer.enable_model_summary"))
    # Four projections of width 32 in each of two layers.
    assert re.search(r"^parameters +[\d,]+ \(attention 8,192, other [\d,]+\)$", capfd.readouterr().out, re.M)


def test_the_bar_of_a_resumed_run_shows_its_step(arguments, run, capfd, tmp_path):
    run(arguments("mha", steps=2))
    capfd.readouterr()
    words = arguments("mha", "--progress=bar", f"--ckpt_path={tmp_path / 'run'}", steps=6)
    run(without([*words, "--trainer.accumulate_grad_batches=2"], "--trainer.enable_progress_bar"))
    shown = re.findall(r"training: +(\d+)%\|[^|]*\| (\S+) ", capfd.readouterr().out)
    assert shown[0] == ("33", "2/6")
    assert shown[-1] == ("100", "6/6")


def test_the_learning_curve_is_in_bits_per_byte(arguments, run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(LossCurve, "draw", lambda self, path, length: drawn.append((self.train, self.val, length)))
    run(arguments("mha", "--data.tokenizer=bpe", "--data.vocab_size=300", "--trainer.val_check_interval=1"))
    train, val, length = drawn[-1]
    # Bytes of a token, from the training text itself; near the start a token costs ln 300 nats.
    (folder,) = (tmp_path / "data").iterdir()
    meta = json.loads((folder / "meta.json").read_text())["splits"]["train"]
    assert length == pytest.approx(meta["bytes"] / meta["tokens"], rel=1e-6)
    assert val[0][1] == pytest.approx(train[0][1] / length / math.log(2), rel=0.1)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 80GB HBM3", "32-true", 67e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", None),
        ("NVIDIA H200", "16-mixed", 989e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", None),
    ],
)
def test_peaks_are_the_cost_models(name, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == expected
    assert peak_flops(torch.device("cpu"), precision) is None


def test_the_use_of_the_peak_is_logged(arguments, run, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda device, precision: 1e12)
    run(arguments("mha"))
    for row in rows(tmp_path / "run"):
        if row["mfu"]:
            per_token = float(row["mfu"]) * 1e12 / float(row["tokens_per_second"])
            parameters = sum(x.numel() for x in read_checkpoint(tmp_path / "run")["state_dict"].values())
            # Six FLOPs per parameter, less the vectors, plus attention: 12 E times half of T in each of two layers.
            assert per_token == pytest.approx(6 * parameters + 2 * 12 * 32 * 16, rel=0.05)
            break
    else:
        raise AssertionError("no mfu")
