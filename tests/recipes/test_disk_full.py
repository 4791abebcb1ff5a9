"""Disks that take nothing more: training goes on, says what it could not write, and loses nothing in the end.

The system itself refuses the writes, by a limit on the size of files, so that no writer is forgotten.
"""

import csv
import os
import re
import resource

import pytest
import torch

from attnzoo_recipes import commandline, files
from attnzoo_recipes.callbacks.metrics import MetricsWriter
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.data import packing
from tests.recipes.children import before, command

STEPS = 8
OPTIONS = ["--trainer.val_check_interval=2", "--checkpoints.every_n_train_steps=2", "--trainer.log_every_n_steps=1"]


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_between(first, last):
    """No file takes a byte from the beginning of one step to that of another."""

    def action(callback, trainer, *_):
        if trainer.global_step == first:
            limit(0)
        if trainer.global_step == last:
            limit(resource.RLIM_INFINITY)

    before(commandline.LossGuard, "on_train_batch_start", action)


def rows(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "tokens_per_second"} for row in csv.DictReader(file)
        ]


def text(folder, name):
    (path,) = folder.rglob(name)
    return path.read_text()


@pytest.fixture
def words(arguments, tmp_path):
    """Arguments of a run below a folder of this name."""

    def made(name, *more):
        return [*arguments("kha", *OPTIONS, *more, steps=STEPS), f"--trainer.default_root_dir={tmp_path / name}"]

    return made


@pytest.mark.parametrize(("first", "last", "kept"), [(1, 3, {6, 8}), (3, 7, {2, 8})])
def test_training_goes_on_and_loses_nothing(first, last, kept, words, tmp_path):
    recorded = [
        "--trainer.callbacks+=attnzoo_recipes.callbacks.diagnostics.HeadStatisticsCallback",
        "--trainer.callbacks.every_n_steps=2",
        "--trainer.callbacks.also_at=[]",
    ]
    assert command(words("whole", *recorded))[0] == 0
    code, said = command(words("full", *recorded), full_between, first, last)
    assert code == 0, said
    whole, full = tmp_path / "whole", tmp_path / "full"
    steps = {read_checkpoint(path)["global_step"] for path in full.rglob("*.ckpt")}
    assert steps == kept, "a save that failed is none of the two that are kept"
    expected, found = (read_checkpoint(folder)["state_dict"] for folder in (whole, full))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert rows(full) == rows(whole)
    assert text(full, "samples.txt") == text(whole, "samples.txt")
    assert text(full, "heads.jsonl") == text(whole, "heads.jsonl")
    for name in (r"step=\d\.ckpt", r"samples\.txt", r"loss_curve\.png", r"heads\.jsonl", r"metrics\.csv"):
        sentence = rf"{full}\S*{name} could not be written: File too large \([\d,.]+ MiB free on its disk\)"
        assert re.search(sentence, said), name


def test_a_last_save_that_fails_ends_with_another_code(words, tmp_path):
    code, said = command(words("full"), full_between, STEPS - 1, -1)
    assert code == 4
    last = said.strip().splitlines()[-1]
    newest = newest_valid(tmp_path / "full")
    assert read_checkpoint(newest)["global_step"] == 6
    assert f"the checkpoint of the last step, {STEPS}, could not be saved" in last
    assert "MiB free on its disk" in last
    assert str(newest) in last
    assert "Traceback" not in said


def test_too_many_failed_saves_end_the_run_early(words, tmp_path):
    code, said = command(words("full"), full_between, 1, -1)
    assert code == 4
    last = said.strip().splitlines()[-1]
    assert re.search(r"step=6.ckpt could not be written: .* MiB free .*too many checkpoints in a row", last)
    assert "Traceback" not in said


def stopped_on_a_full_disk(number):
    full_between(3, -1)
    before(
        commandline.Pretraining,
        "training_step",
        lambda module, *_: module.global_step == 3 and os.kill(os.getpid(), number),
    )


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 4), ("SIGTERM", 143)])
def test_a_stop_that_cannot_save_does_not_exit_with_0(name, code, words, tmp_path):
    import signal

    found, said = command(words("full"), stopped_on_a_full_disk, getattr(signal, name))
    assert found == code
    last = said.strip().splitlines()[-1]
    assert "no checkpoint could be saved" in last
    assert str(newest_valid(tmp_path / "full")) in last


def full_while_tokenising():
    before(packing.ByteTokenizer, "encode_batch", lambda *_: limit(0))


def test_a_disk_that_is_full_before_training(words, tmp_path):
    code, said = command(words("full"), full_while_tokenising)
    assert code == 2, said
    last = said.strip().splitlines()[-1]
    assert re.fullmatch(rf"attnzoo-pretrain: error: {tmp_path}/data/\S+ could not be written: .*MiB free.*", last)
    assert not list((tmp_path / "data").iterdir())


def output_on_a_full_disk():
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def test_output_that_goes_nowhere(words, tmp_path):
    assert command([*words("full"), "--trainer.enable_progress_bar=true"], output_on_a_full_disk)[0] == 0
    assert read_checkpoint(tmp_path / "full")["global_step"] == STEPS


# the writers one by one


def test_what_was_not_appended_comes_with_the_next(tmp_path, monkeypatch):
    path, lines = tmp_path / "deep" / "lines.txt", files.Appender()
    lines.append(path, "one\n")

    def half(file, data):
        file.write(data[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", half)
        with pytest.warns(
            UserWarning, match=r"lines.txt could not be written: No space .*MiB free.*training continues"
        ):
            lines.append(path, "two\n")
        assert path.read_text() == "one\n", "no half line"
    lines.append(path, "three\n")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_new_column_does_not_empty_the_metrics(tmp_path, monkeypatch):
    writer = MetricsWriter(str(tmp_path / "run"))
    path = tmp_path / "run" / "metrics.csv"
    writer.log_metrics({"a": 1}, 0)
    writer.save()
    writer.log_metrics({"b": 2}, 1)

    def full(file, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        with pytest.warns(UserWarning, match="metrics.csv could not be written"):
            writer.save()
        assert path.read_text().split() == ["a,step", "1,0"]
    writer.log_metrics({"a": 3, "b": 4}, 2)
    writer.save()
    assert path.read_text().split() == ["a,b,step", "1,,0", ",2,1", "3,4,2"]


def test_token_files_say_where_there_is_no_room(corpus_file, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    corpus = packing.Corpus("text", (str(corpus_file),), unit="line")
    with pytest.raises(
        OSError, match=r"data/\w+\.unfinished/\S+ could not be written: No space .*MiB free on its disk"
    ):
        packing.pack(corpus, "byte", 0, 0.2, 0.2, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
