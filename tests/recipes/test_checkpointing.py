"""Checkpoints against kill -9, full disks, damaged bytes and malicious files."""

import errno
import inspect
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attnzoo_recipes import checkpointing, files
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["attnzoo_recipes.callbacks.resilience", "attnzoo_recipes.checkpointing"])


def content(step, size=1000):
    return {"global_step": step, "weights": torch.full((size,), float(step)), "plain": [1, (2.5, None), "text"]}


def write(path, step, **options):
    AtomicCheckpointIO(**options).save_checkpoint(content(step), path)
    return path


def saved_step(path):
    """The step of a checkpoint that is whole: every weight must be of one save."""
    checkpoint = read_checkpoint(path)
    assert (checkpoint["weights"] == checkpoint["global_step"]).all()
    return checkpoint["global_step"]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


# what is written


def test_round_trip_is_exact_and_leaves_two_files(tmp_path):
    path = write(tmp_path / "deep" / "a.ckpt", 7)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(checkpoint["weights"], content(7)["weights"])
    assert checkpoint["plain"] == content(7)["plain"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.ckpt", "a.ckpt.json"]


def test_the_sidecar_says_what_was_saved(tmp_path):
    path = write(tmp_path / "a.ckpt", 7)
    write(path, 8)
    [record] = json.loads((tmp_path / "a.ckpt.json").read_text())["may_be"]
    assert record["size"] == path.stat().st_size
    assert record["step"] == 8
    assert record["versions"]["torch"] == str(torch.__version__)
    assert set(record["versions"]) == {"torch", "lightning", "attnzoo"}


def test_saving_makes_no_copy_in_memory(tmp_path, monkeypatch):
    largest = []
    original = files.write_all
    monkeypatch.setattr(files, "write_all", lambda file, data: (largest.append(len(data)), original(file, data)))
    half = torch.zeros(1_000_000)
    AtomicCheckpointIO().save_checkpoint({"a": half, "b": torch.ones(1_000_000)}, tmp_path / "a.ckpt")
    assert max(largest) == half.nbytes, "tensors go to the file one by one, not the checkpoint as a whole"


# kill -9


def save_for_ever(path, temporary):
    os.environ["TMPDIR"], tempfile.tempdir = temporary, None
    step = 0
    plugin = AtomicCheckpointIO()
    while True:
        step += 1
        plugin.save_checkpoint(content(step, size=100_000), path)


def folders(tmp_path):
    """(name, folder for TMPDIR); another file system if there is one."""
    shared = pathlib.Path("/dev/shm")
    other = shared.is_dir() and os.access(shared, os.W_OK) and shared.stat().st_dev != tmp_path.stat().st_dev
    return str(shared) if other else None


@pytest.mark.parametrize("place", ["same", "other"])
def test_kill_while_saving_leaves_a_valid_checkpoint(tmp_path, place):
    temporary = str(tmp_path) if place == "same" else folders(tmp_path)
    if temporary is None:
        pytest.skip("needs a second file system in /dev/shm")
    path = tmp_path / "last.ckpt"
    write(path, 0)
    draw = random.Random(place)
    for _ in range(10):
        process = processes.Process(target=save_for_ever, args=(path, temporary))
        process.start()
        # The first save of a process takes this long to be under way.
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert verify(path) is None
        assert saved_step(path) >= 1
    write(path, 100)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"], "leftovers are swept"


def save_and_die(path, step, lines):
    """Save with kill -9 before the given executed line of the save, leaving out those that only write bytes."""
    left = lines
    sources = (checkpointing.__file__, files.__file__)

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in sources or frame.f_code.co_name in ("write", "write_all"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    AtomicCheckpointIO().save_checkpoint(content(step), path)


@pytest.mark.slow
def test_kill_before_every_line_of_a_save(tmp_path):
    path = write(tmp_path / "last.ckpt", 0)
    expected, replaced, lines = 0, 0, 0
    while lines < 500:
        step = lines + 1
        process = processes.Process(target=save_and_die, args=(path, step, lines))
        process.start()
        process.join()
        assert verify(path) is None, f"killed before executed line {lines}"
        assert len(json.loads((tmp_path / "last.ckpt.json").read_text())["may_be"]) <= 2
        found = saved_step(path)
        assert found in (expected, step), f"killed before executed line {lines}"
        replaced += found == step
        expected = found
        lines += 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert lines > 60, "every line of the save was tried"
    assert replaced > 5, "some kills came after the new checkpoint was in place"
    assert process.exitcode == 0
    assert found == step
    assert len(json.loads((tmp_path / "last.ckpt.json").read_text())["may_be"]) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_living_processes_are_not_swept(tmp_path):
    """Containers share process numbers: a lock tells the living from the dead, even one of this process's number."""
    dead = [tmp_path / f"c.ckpt.tmp-{end}" for end in (1, os.getpid(), os.getppid(), "0123456789abcdef")]
    other = tmp_path / "notes.tmp-mine"
    for path in (*dead, other):
        path.write_bytes(b"x")
    with files.replacing(tmp_path / "b.ckpt") as alive:
        write(tmp_path / "a.ckpt", 1)
        assert os.path.exists(alive.name)
    assert (tmp_path / "b.ckpt").exists()
    assert other.exists()
    assert not any(path.exists() for path in dead)


# failing disks


def full_disk(monkeypatch, after):
    """Let every file take so many bytes and no more."""
    original = files.write_all
    written = {}

    def limited(file, data):
        written[file] = written.get(file, 0) + len(data)
        if written[file] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, data)

    monkeypatch.setattr(files, "write_all", limited)


@pytest.mark.parametrize("after", [0, 300, 1500, 4500])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, after):
    path = write(tmp_path / "last.ckpt", 1)
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.warns(UserWarning, match=r"last.ckpt could not be saved .*No space left on device.*1 of 3"):
            write(path, 2)
    assert saved_step(path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_failures_in_a_row_end_the_run(tmp_path, monkeypatch):
    plugin, path = AtomicCheckpointIO(failures_allowed=2), tmp_path / "last.ckpt"
    plugin.save_checkpoint(content(1), path)
    for step in (2, 4):
        with monkeypatch.context() as patch:
            full_disk(patch, 0)
            with pytest.warns(UserWarning, match="1 of 2"):
                plugin.save_checkpoint(content(step), path)
            with pytest.warns(UserWarning, match="1 of 2"):
                plugin.save_checkpoint(content(step), tmp_path / "best.ckpt")
        plugin.save_checkpoint(content(step + 1), path)
    full_disk(monkeypatch, 0)
    with pytest.warns(UserWarning, match="1 of 2"):
        plugin.save_checkpoint(content(6), path)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint(content(7), path)
    assert saved_step(path) == 5


def save_with_small_files(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    warnings.simplefilter("ignore")
    AtomicCheckpointIO().save_checkpoint(content(2, size=1_000_000), path)


def test_a_write_that_the_system_refuses(tmp_path):
    path = write(tmp_path / "last.ckpt", 1)
    process = processes.Process(target=save_with_small_files, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert saved_step(path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_removed_while_saves_fail(tmp_path, monkeypatch):
    plugin, old, new = AtomicCheckpointIO(), tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    plugin.save_checkpoint(content(1), old)
    with monkeypatch.context() as patch:
        full_disk(patch, 0)
        with pytest.warns(UserWarning, match="could not be saved"):
            plugin.save_checkpoint(content(2), new)
        plugin.remove_checkpoint(old)
    assert saved_step(old) == 1
    plugin.save_checkpoint(content(3), new)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new.ckpt", "new.ckpt.json"]


def test_failures_allowed_must_be_positive():
    with pytest.raises(ValueError, match="failures_allowed must be at least 1, got 0"):
        AtomicCheckpointIO(failures_allowed=0)


# damage


def test_flipped_bits_are_found_and_the_older_checkpoint_is_loaded(tmp_path):
    older, newer = write(tmp_path / "step=1.ckpt", 1), write(tmp_path / "step=2.ckpt", 2)
    whole = newer.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        flip(newer, draw.randrange(8 * len(whole)))
        assert "its SHA-256" in verify(newer)
        with pytest.warns(UserWarning, match=r"step=2.ckpt is damaged.* loading .*step=1.ckpt"):
            assert AtomicCheckpointIO().load_checkpoint(newer)["global_step"] == 1
        newer.write_bytes(whole)
    assert saved_step(newer) == 2
    assert verify(older) is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "zero page", "no sidecar", "bad sidecar"])
def test_damage_is_found(tmp_path, damage):
    write(tmp_path / "a.ckpt", 1)
    path = write(tmp_path / "b.ckpt", 2)
    data, sidecar = path.read_bytes(), tmp_path / "b.ckpt.json"
    expected = r"it has \d+ bytes instead of \d+"
    match damage:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(data + b"\0")
        case "zero page":
            path.write_bytes(data[:1000] + bytes(1000) + data[2000:])
            expected = "SHA-256"
        case "no sidecar":
            sidecar.unlink()
            expected = "its sidecar b.ckpt.json is missing or unreadable"
        case "bad sidecar":
            sidecar.write_text('{"may_be": [{"sha256": 1}')
            expected = "missing or unreadable"
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(path)
    with pytest.warns(UserWarning, match=rf"b.ckpt.*{expected}.*loading .*a.ckpt, the newest valid"):
        assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 1


def test_nothing_valid_is_an_error_in_one_sentence(tmp_path):
    path = write(tmp_path / "a.ckpt", 1)
    flip(path, 3000)
    with pytest.raises(ValueError, match=r"a.ckpt is damaged.*no other checkpoint in its folder is valid") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"no valid checkpoint in {tmp_path}"):
        read_checkpoint(tmp_path)
    assert newest_valid(tmp_path) is None


def test_a_missing_checkpoint_is_named(tmp_path):
    write(tmp_path / "a.ckpt", 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*b.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*b.ckpt"):
        read_checkpoint(tmp_path / "b.ckpt")
    assert "there is no checkpoint" in verify(tmp_path / "b.ckpt")


def test_a_folder_means_its_newest_valid_checkpoint(tmp_path):
    first, second = write(tmp_path / "run" / "b.ckpt", 5), write(tmp_path / "run" / "version_1" / "a.ckpt", 2)
    os.utime(first)
    assert newest_valid(tmp_path) == second, "by the time of saving, whatever the file's own time is"
    assert newest_valid(first.parent, recursive=False) == first
    assert AtomicCheckpointIO().load_checkpoint(tmp_path)["global_step"] == 2
    flip(second, 1000)
    assert read_checkpoint(tmp_path)["global_step"] == 5


def test_within_a_run_the_step_decides_and_not_the_clock(tmp_path, monkeypatch):
    """The clock of a machine may be set back while it trains."""
    clock = iter(range(10**18, 0, -(10**15)))
    monkeypatch.setattr(checkpointing.time, "time_ns", lambda: next(clock))
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    for step in (9, 10, 11):
        write(folder / f"step={step}.ckpt", step)
    stopped = write(folder / "stopped-step=12.ckpt", 12)
    assert newest_valid(tmp_path) == newest_valid(folder, recursive=False) == stopped
    flip(stopped, 3000)
    assert read_checkpoint(tmp_path)["global_step"] == 11
    with pytest.warns(UserWarning, match=r"loading .*step=11.ckpt"):
        assert AtomicCheckpointIO().load_checkpoint(stopped)["global_step"] == 11
    again = write(tmp_path / "run" / "version_1" / "checkpoints" / "step=3.ckpt", 3)
    assert newest_valid(tmp_path) == again, "a later run of the same folder, though it has made fewer steps"
    tenth = write(tmp_path / "run" / "version_10" / "checkpoints" / "step=1.ckpt", 1)
    assert newest_valid(tmp_path) == tenth


def test_runs_in_unrelated_folders_go_by_their_last_save(tmp_path):
    write(tmp_path / "first" / "version_7" / "step=900.ckpt", 900)
    second = write(tmp_path / "second" / "version_0" / "step=5.ckpt", 5)
    assert newest_valid(tmp_path) == second


def test_a_link_is_verified_like_its_target(tmp_path):
    path = write(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    assert verify(tmp_path / "last.ckpt") is None
    assert newest_valid(tmp_path) == path
    write(tmp_path / "last.ckpt", 2)
    assert saved_step(tmp_path / "last.ckpt") == 2
    assert saved_step(path) == 1


# attacks


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    path, mark = tmp_path / "a.ckpt", tmp_path / "executed"
    AtomicCheckpointIO().save_checkpoint({"state_dict": Attack(mark)}, path)
    assert verify(path) is None, "what is refused here is the content, not the bytes"
    for load in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"a.ckpt is not a checkpoint of tensors and plain values"):
            load(path)
    with pytest.raises(ValueError, match="weights_only must not be False"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the attack works on those who run it"


@pytest.mark.parametrize("path", ["http://host/a.ckpt", "s3://bucket/a.ckpt"])
def test_only_local_files(path):
    with pytest.raises(ValueError, match="must be a local file"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match="must be a local file"):
        AtomicCheckpointIO().save_checkpoint(content(1), path)


def test_only_what_lies_in_a_folder_of_this_run_is_removed(tmp_path):
    plugin = AtomicCheckpointIO()
    own, victim = tmp_path / "run" / "a.ckpt", tmp_path / "victim.txt"
    plugin.save_checkpoint(content(1), own)
    victim.write_text("precious")
    (tmp_path / "run" / "folder").mkdir()
    for path in (victim, own.parent / ".." / "victim.txt"):
        with pytest.warns(UserWarning, match=r"victim.txt is not removed"):
            plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(own.parent / "folder")
    assert victim.read_text() == "precious"
    assert (own.parent / "folder").is_dir()
    plugin.remove_checkpoint(own)
    assert [path.name for path in own.parent.iterdir()] == ["folder"]


def test_every_load_of_a_pickle_is_weights_only():
    source = inspect.getsource(checkpointing)
    assert source.count("torch.load(file") == source.count("weights_only=True)") == 1


# with a trainer


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(40.0).view(10, 4) / 40), batch_size=1)


def trainer(folder, max_steps, **options):
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_last=True)
    return L.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=[saver],
        plugins=[AtomicCheckpointIO()], enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def test_a_trainer_saves_removes_and_resumes(tmp_path):
    folder = tmp_path / "checkpoints"
    trainer(tmp_path, 6).fit(Tiny())
    files = {path.name for path in folder.iterdir()}
    assert files == {"epoch=0-step=6.ckpt", "epoch=0-step=6.ckpt.json", "last.ckpt", "last.ckpt.json"}
    flip(folder / "last.ckpt", 4000)
    again, model = trainer(tmp_path, 8), Tiny()
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged.*loading .*step=6.ckpt"):
        again.fit(model, ckpt_path=folder / "last.ckpt")
    assert again.global_step == 8
    assert read_checkpoint(folder)["global_step"] == 8


def test_a_trainer_outlives_a_full_disk(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    model, steps = Tiny(), []

    class FullForAWhile(L.Callback):
        def on_train_batch_start(self, trainer, *arguments):
            steps.append(trainer.global_step)
            if trainer.global_step == 3:
                full_disk(monkeypatch, 0)
            if trainer.global_step == 5:
                monkeypatch.undo()
                assert newest_valid(folder) is not None, "the save in between failed and took nothing away"

    run = trainer(tmp_path, 6)
    run.callbacks.insert(0, FullForAWhile())
    with pytest.warns(UserWarning, match="No space left on device"):
        run.fit(model)
    assert steps == list(range(6))
    assert read_checkpoint(folder)["global_step"] == 6
    assert {path.name for path in folder.glob("*.ckpt")} == {"epoch=0-step=6.ckpt", "last.ckpt"}
