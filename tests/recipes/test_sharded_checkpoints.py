"""Folders that are checkpoints: killed at any of its steps, a save leaves the old one or the new one, complete."""

import functools
import json
import os
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import Shard, distribute_tensor

from attnzoo_recipes import sharded_checkpoints as sharded
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint, verify

processes = torch.multiprocessing.get_context("fork")
CALLS = ("fsync", "replace", "mkdir", "rmdir", "unlink")


def content(number, mesh):
    """Tensors of several shapes, with rows for some of the processes only, and plain values."""
    shapes = {"matrix": (5, 3), "single": (1, 4), "vector": (2,)}
    whole = {name: torch.arange(float(torch.Size(shape).numel())).view(shape) + number
             for name, shape in shapes.items()}  # fmt: skip
    own = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}
    moments = {"step": torch.tensor(float(number)), "exp_avg": own["matrix"] * 2}
    states = [{"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}]
    return {"state_dict": own, "optimizer_states": states, "global_step": number, "callbacks": {"a": [1, "b"]}}


def equals(checkpoint, number):
    matrix = torch.arange(15.0).view(5, 3) + number
    state = checkpoint["optimizer_states"][0]["state"][0]
    found = {**checkpoint["state_dict"], "moment": state["exp_avg"] / 2, "step": state["step"]}
    expected = {
        "matrix": matrix, "single": torch.arange(4.0).view(1, 4) + number, "vector": torch.arange(2.0) + number,
        "moment": matrix, "step": torch.tensor(float(number)),
    }  # fmt: skip
    return checkpoint["global_step"] == number and all(torch.equal(found[name], expected[name]) for name in expected)


def run(rank, store, target, numbers, act):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo says there that a peer has gone
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    writer = AtomicCheckpointIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            checkpoint = content(number, mesh)
            act(rank, number)
            writer.save_checkpoint(checkpoint, target, sharded=True)
    dist.barrier()
    os._exit(0)


def nothing(rank, number):
    pass


def kill_at(which, when, rank, number):
    """Kill this process just before, or just after, its n-th call that changes the disk."""
    if rank != which or number != 2:
        return
    made = []
    for name in CALLS:
        original = getattr(os, name)

        def counted(*arguments, original=original, **keywords):
            made.append(original)
            if len(made) == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(os, name, counted)


def save(folder, target, numbers, act=nothing):
    store = folder / f"store-{os.urandom(4).hex()}"
    started = [processes.Process(target=run, args=(rank, store, target, numbers, act)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def test_a_save_is_what_was_given(tmp_path):
    target = tmp_path / "step=1.ckpt"
    assert save(tmp_path, target, [1, 2]) == [0, 0]
    assert verify(target) is None
    assert newest_valid(tmp_path) == target
    assert equals(read_checkpoint(target), 2)
    assert len(list(target.iterdir())) == 2, "the replaced save is gone"
    assert read_checkpoint(tmp_path)["callbacks"] == {"a": [1, "b"]}


@pytest.mark.parametrize("which", [0, 1])
def test_killed_at_any_moment_a_save_leaves_a_complete_one(which, tmp_path):
    seen = []
    for when in range(1, 60):
        target = tmp_path / str(when) / "step=1.ckpt"
        codes = save(tmp_path, target, [1, 2], functools.partial(kill_at, which, when))
        seen.append(codes[which] == -signal.SIGKILL)
        left = read_checkpoint(target.parent)
        assert equals(left, 1) or equals(left, 2), when
        if not seen[-1]:
            break
    assert len(seen) > (8 if which == 0 else 2)
    assert not seen[-1]


@pytest.mark.parametrize("which", [0, 1])
def test_the_next_save_removes_what_a_killed_first_one_has_left(which, tmp_path):
    target = tmp_path / "step=2.ckpt"
    assert save(tmp_path, target, [2], functools.partial(kill_at, which, 2))[which] == -signal.SIGKILL
    assert target.exists()
    assert newest_valid(tmp_path) is None
    other = tmp_path / "step=1.ckpt"
    assert save(tmp_path, other, [1]) == [0, 0]
    assert not target.exists()
    assert newest_valid(tmp_path) == other


def full_disk(which, rank, number):
    def failing(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    if rank == which and number == 2:
        sharded._dcp.HuggingFaceStorageWriter.write_data = failing


@pytest.mark.parametrize("which", [0, 1])
def test_a_full_disk_of_one_process_keeps_the_old_checkpoint(which, tmp_path):
    target = tmp_path / "step=1.ckpt"
    assert save(tmp_path, target, [1, 2], functools.partial(full_disk, which)) == [0, 0]
    assert equals(read_checkpoint(target), 1)
    assert len(list(target.iterdir())) == 2, "the failed save is gone"


@pytest.fixture
def saved(tmp_path):
    target = tmp_path / "step=1.ckpt"
    assert save(tmp_path, target, [1]) == [0, 0]
    return target


def manifest(target, change):
    path = target / sharded.MANIFEST
    listed = json.loads(path.read_text())
    change(listed)
    path.write_text(json.dumps(listed))


DAMAGES = {
    "a flipped bit": lambda t: next(t.glob("*/shard-00002*")).write_bytes(
        next(t.glob("*/shard-00002*")).read_bytes()[:-1] + b"?"
    ),
    "a missing shard": lambda t: next(t.glob("*/shard-00002*")).unlink(),
    "one shard more": lambda t: next(t.glob("*/shard-00002*")).with_name("more.safetensors").write_bytes(b""),
    "a truncated rest": lambda t: os.truncate(next(t.glob("*/rest.pt")), 10),
    "no manifest": lambda t: (t / sharded.MANIFEST).unlink(),
    "an empty manifest": lambda t: (t / sharded.MANIFEST).write_text("{}"),
    "another folder": lambda t: manifest(t, lambda listed: listed.update(folder="../..")),
    "a file elsewhere": lambda t: manifest(
        t, lambda listed: listed["files"].update({"../a": {"sha256": "", "size": 1}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(damage, saved):
    damage(saved)
    assert verify(saved) is not None
    assert newest_valid(saved.parent) is None
    with pytest.raises(ValueError, match=r"is damaged|cannot be verified|no valid checkpoint"):
        read_checkpoint(saved)


def test_a_manifest_without_the_last_shard_does_not_shorten_the_weights(saved):
    path = next(saved.glob("*/shard-00002*"))
    path.unlink()
    manifest(saved, lambda listed: listed["files"].pop(path.name))
    assert verify(saved) is None, "the files are those that the manifest lists"
    with pytest.raises(ValueError, match=r"does not hold all of .*state_dict\.matrix"):
        read_checkpoint(saved)


def test_a_checkpoint_is_removed_by_who_has_saved_it(saved):
    writer = AtomicCheckpointIO()
    with pytest.warns(UserWarning, match="is not removed"):
        writer.remove_checkpoint(saved)
    writer._saved_into.add(saved.parent)
    writer.remove_checkpoint(saved)
    assert not saved.exists()
