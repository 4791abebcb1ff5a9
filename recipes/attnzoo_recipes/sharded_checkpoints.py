"""Checkpoints that are folders, into which every process writes its own part of the tensors.

A checkpoint NAME.ckpt holds a folder of a random name, with the safetensors files that `torch.distributed.checkpoint`
writes and a file of everything else, and manifest.json, which names that folder and the SHA-256 and size of each file
in it. A save

1. writes all files into a new folder inside NAME.ckpt, syncs and hashes them;
2. replaces the manifest by one that names the new folder, in one atomic rename;
3. removes the folder that the manifest named before.

So NAME.ckpt is at every moment what its manifest says, or has none yet and is not a checkpoint. What a killed save
leaves is removed by the next one into the same place.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor

from attnzoo_recipes import files

MANIFEST = "manifest.json"
"""Name of the file that makes a folder a checkpoint."""

_REST = "rest.pt"
_SHARD = ".safetensors"
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"[\w-]+(\.[\w-]+)*")
_LARGEST_MANIFEST = 10_000_000
_WEIGHTS = "state_dict."
_STATES = "optimizer_states."
_SHAPES = "tensor_shapes"
_dcp: Any = torch.distributed.checkpoint

T = TypeVar("T")


# saving


def save(checkpoint: Mapping[str, Any], target: Path, record: Mapping[str, Any]) -> None:
    """Save a checkpoint whose tensors are spread over the processes, all of which have to call this.

    Args:
        checkpoint: of Lightning; "state_dict" and "optimizer_states" hold DTensors.
        target: the folder NAME.ckpt.
        record: what the manifest says besides its files.

    Raises:
        OSError: in all processes, if one of them could not write; the checkpoint in place is as it was.
    """
    tensors, rest = _split(checkpoint)
    name = _from_first(secrets.token_hex(8))
    folder = target / name
    rank, ranks = _place()
    with contextlib.ExitStack() as held:
        _together(lambda: _begin(folder, held) if rank == 0 else None)
        try:
            _together(lambda: _write(tensors, folder))
            listed = sorted(folder.glob(f"*{_SHARD}"))
            own = _together(lambda: {path.name: _synced_hash(path) for path in listed[rank::ranks]})
            if rank == 0:
                manifest = {**record, "folder": name, "files": {}, "saved_at_ns": time.time_ns()}
                for part in own:
                    manifest["files"].update(part)
            _together(lambda: _finish(rest, target, manifest) if rank == 0 else None)
        except OSError:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The large tensors by the names that they have in the files, and everything else."""
    tensors: dict[str, Tensor] = {f"{_WEIGHTS}{name}": value for name, value in checkpoint["state_dict"].items()}
    rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
    rest["optimizer_states"] = []
    for i, saved in enumerate(checkpoint.get("optimizer_states", [])):
        states: dict[Any, dict[str, Any]] = {}
        for number, values in saved["state"].items():
            large = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"{_STATES}{i}.{number}.{name}": value for name, value in large.items()}
            states[number] = {name: value for name, value in values.items() if name not in large}
        rest["optimizer_states"].append({**saved, "state": states})
    rest[_SHAPES] = {name: list(value.shape) for name, value in tensors.items()}
    return tensors, rest


def _begin(folder: Path, held: contextlib.ExitStack) -> None:
    target = folder.parent
    with files.naming(target):
        if target.is_file() or target.is_symlink():
            target.unlink()
        target.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_RDONLY)
        held.callback(os.close, descriptor)
        files.try_lock(descriptor)
        _sweep(target.parent)
        _remove_others(target)
        folder.mkdir()


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    writer = _dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with files.naming(folder), _quiet():
        try:
            _dcp.save(tensors, storage_writer=writer, no_dist=_place()[1] == 1)
        except _dcp.CheckpointException as error:
            found = [failure for failure, _ in error.failures.values() if isinstance(failure, OSError)]
            if len(found) < len(error.failures):
                raise
            raise found[0] from error


def _finish(rest: dict[str, Any], target: Path, manifest: dict[str, Any]) -> None:
    folder = target / manifest["folder"]
    content = io.BytesIO()
    torch.save(rest, content)
    files.write_atomically(folder / _REST, content.getvalue())
    manifest["files"][_REST] = _synced_hash(folder / _REST)
    files.sync_folder(folder)
    files.sync_folder(target)
    files.write_atomically(target / MANIFEST, json.dumps(manifest, indent=1))
    files.sync_folder(target.parent)
    _remove_others(target)


def _synced_hash(path: Path) -> dict[str, Any]:
    with files.naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": os.fstat(file.fileno()).st_size}


def _remove_others(target: Path) -> None:
    """Remove the folders of unfinished and of replaced saves from a checkpoint."""
    named = (manifest_of(target) or {}).get("folder")
    for path in target.iterdir():
        if _FOLDER.fullmatch(path.name) and path.name != named and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    files.sweep(target)


def _sweep(folder: Path) -> None:
    """Remove checkpoints that a killed process has begun beside this one: nobody has locked them."""
    for path in folder.glob("*.ckpt"):
        if not path.is_dir() or path.is_symlink() or (path / MANIFEST).exists():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if files.try_lock(descriptor):
                    _remove_others(path)
                    path.rmdir()  # of nothing but what a save has made
            finally:
                os.close(descriptor)


def remove(target: Path) -> None:
    """Remove a checkpoint: first its manifest, so that it is none any more."""
    (target / MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _remove_others(target)
        target.rmdir()


# reading


def is_sharded(target: Path) -> bool:
    """Whether a path is a checkpoint of this kind, whatever its state."""
    return (target / MANIFEST).is_file()


def manifest_of(target: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if there is none or it is not one."""
    path = target / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
            return None
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        listed = manifest["files"].items()
        sound = _FOLDER.fullmatch(manifest["folder"]) and _REST in manifest["files"]
        sound = sound and all(
            _FILE.fullmatch(name) and isinstance(file["sha256"], str) and isinstance(file["size"], int)
            for name, file in listed
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if sound else None


def wrong(target: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """One sentence that says why a checkpoint is not what was saved, or None.

    Args:
        target: the checkpoint.
        share: (i, n) to hash only every n-th file, from the i-th on.
    """
    manifest = manifest_of(target)
    if manifest is None:
        return f"{target} cannot be verified: its {MANIFEST} is missing or unreadable"
    folder = target / manifest["folder"]
    try:
        found = {path.name for path in folder.iterdir()}
        if found != set(manifest["files"]):
            differing = ", ".join(sorted(found ^ set(manifest["files"])))
            return f"{target} is damaged: {differing} differ from the files that its {MANIFEST} lists"
        for name in sorted(manifest["files"])[share[0] :: share[1]]:
            listed, path = manifest["files"][name], folder / name
            size = path.stat().st_size
            if size != listed["size"]:
                return f"{path} is damaged: it has {size} bytes instead of {listed['size']}"
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != listed["sha256"]:
                return f"{path} is damaged: its SHA-256 is not the one that {MANIFEST} lists"
    except OSError as error:
        return f"{target} cannot be read ({error})"
    return None


def wrong_for_all(target: Path) -> str | None:
    """As `wrong`, where every process hashes its share of the files."""
    return next((sentence for sentence in _together(lambda: wrong(target, _place())) if sentence), None)


def read(target: Path, load_rest: Callable[[Path], dict[str, Any]], tensors: bool = True) -> dict[str, Any]:
    """The content of a verified checkpoint, as that of a file.

    Args:
        target: the checkpoint.
        load_rest: reads the file of everything but the large tensors.
        tensors: whether to read these too. Otherwise each is a placeholder of its shape that takes no memory.

    Raises:
        ValueError: for files that do not hold together.
    """
    folder = _folder(target)
    checkpoint = load_rest(folder / _REST)
    sizes = _sizes(folder)
    found = {name: list(size) for name, (size, _) in sizes.items()}
    # Checkpoints of 0.2.0 do not say.
    if (shapes := checkpoint.pop(_SHAPES, found)) != found:
        lost = sorted(name for name in shapes.keys() | found if shapes.get(name) != found.get(name))
        raise ValueError(f"{folder} does not hold all of {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}")
    made = {name: torch.empty(size, dtype=kind) if tensors else torch.zeros((), dtype=kind).expand(size)
            for name, (size, kind) in sizes.items()}  # fmt: skip
    if tensors:
        _load(made, folder, alone=True)
    checkpoint["state_dict"] = {n.removeprefix(_WEIGHTS): v for n, v in made.items() if n.startswith(_WEIGHTS)}
    for name, value in made.items():
        if name.startswith(_STATES):
            i, number, key = name.removeprefix(_STATES).split(".", 2)
            checkpoint["optimizer_states"][int(i)]["state"][int(number)][key] = value
    return checkpoint


def load_weights(target: Path, state: Mapping[str, Tensor]) -> None:
    """Fill a state dict, whose DTensors take each process's part. All processes have to call it."""
    _load({f"{_WEIGHTS}{name}": value for name, value in state.items()}, _folder(target))


def load_states(target: Path, number: int, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Fill the states of optimiser `number` in the same way, by the number of the parameter and the state's name."""
    named = {
        f"{_STATES}{number}.{parameter}.{name}": value
        for parameter, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    _load(named, _folder(target))


def _folder(target: Path) -> Path:
    return target / str((manifest_of(target) or {}).get("folder"))


def _load(tensors: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    alone = alone or _place()[1] == 1
    with _quiet():
        _dcp.load(tensors, storage_reader=_dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor."""
    try:
        metadata: dict[str, Any] = _dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as safetensors: {type(error).__name__}: {error}") from error
    sizes = {}
    for name, value in metadata.items():
        # Whoever wrote the files could otherwise ask for any amount of memory.
        if sum(math.prod(chunk.sizes) for chunk in value.chunks) != math.prod(value.size):
            raise ValueError(f"{folder} does not hold all of {name}")
        sizes[name] = value.size, value.properties.dtype
    return sizes


# processes


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _from_first(value: T) -> T:
    shared = [value]
    if _place()[1] > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def _together(action: Callable[[], T]) -> list[T]:
    """What the action returned in every process; if one of them had an OSError, all raise it."""
    result: T | None = None
    failure: OSError | None = None
    try:
        result = action()
    except OSError as error:
        failure = error
    if _place()[1] == 1:
        if failure is not None:
            raise failure
        return [result]  # type: ignore[list-item]
    told = None if failure is None else (failure.errno, str(failure))
    every: list[Any] = [None] * _place()[1]
    dist.all_gather_object(every, (result, told))
    for _, told in every:
        if told is not None:
            raise files.WriteError(*told)
    return [result for result, _ in every]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
