"""Checkpoints that survive kill -9 at any instruction, a full disk and damaged bytes.

Next to each checkpoint NAME there is a sidecar NAME.json with the SHA-256 and size of *each* version that NAME may be
at this moment: one, or two while a save is in progress. A save

1. streams the checkpoint to NAME.tmp-RANDOM in the same folder, hashing as it writes, and syncs it to the disk;
2. replaces the sidecar by one that lists the new version and the one in place;
3. replaces NAME by NAME.tmp-RANDOM;
4. replaces the sidecar by one that lists only the new version.

Each replacement is one atomic rename, followed by a sync of the folder (`files.replacing`). Killed before 2, the old
checkpoint has its old sidecar. Killed between 2 and 4, the sidecar lists both, and NAME is one of them, complete.
After 3 the new one is in place. So NAME is never half written and never without a record that vouches for it. A kill
can leave a file NAME.tmp-RANDOM behind; the next save into the folder removes those that no living process has locked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from attnzoo_recipes import files, sharded_checkpoints

SUFFIX = ".ckpt"
"""File extension of checkpoints, the one that Lightning uses."""

_VERSION_FOLDER = re.compile(r"version_(\d+)")
_LARGEST_SIDECAR = 1_000_000


class AtomicCheckpointIO(CheckpointIO):
    """Saves as described in the module's docstring; loads what a sidecar vouches for, and never runs code from a file.

    A save that fails with an OSError, such as a full disk, leaves the old checkpoint as it was, and training continues
    until the next save. While saves fail, no older checkpoint is removed.

    Args:
        failures_allowed: number of consecutive training steps whose save fails before the OSError is raised.

    Raises:
        ValueError: if failures_allowed is less than 1.
    """

    def __init__(self, *, failures_allowed: int = 3) -> None:
        if failures_allowed < 1:
            raise ValueError(f"failures_allowed must be at least 1, got {failures_allowed}")
        self.failures_allowed = failures_allowed
        self._failures = 0
        self._failed_step: Any = None
        self._saved_into: set[Path] = set()
        self._to_remove: list[Path] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None, sharded: bool = False
    ) -> None:
        """Save to a local path; if `sharded`, a folder, for which all processes have to call this.

        Raises:
            OSError: if this is the last failure that is allowed.
            ValueError: if the path is not local or storage_options is given.
        """
        if storage_options is not None:
            raise ValueError(f"storage_options must be None: checkpoints are local files, got {storage_options!r}")
        target = _local(path)
        step = checkpoint.get("global_step")
        try:
            if sharded:
                sharded_checkpoints.save(checkpoint, target, _identity(step))
            else:
                with files.naming(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                files.sweep(target.parent)
                _save(checkpoint, target, step)
        except OSError as error:
            # Two files saved in one step, such as the best and the last, count as one failure.
            if step is None or step != self._failed_step:
                self._failures += 1
            self._failed_step = step
            if self._failures >= self.failures_allowed:
                raise
            rank_zero_warn(
                f"{target} could not be saved ({error}), failure {self._failures} of {self.failures_allowed} that "
                "would end the run; the older checkpoints are kept and training continues."
            )
            return
        self._failures, self._failed_step = 0, None
        self._saved_into.add(target.parent)
        waiting, self._to_remove = self._to_remove, []
        for old in waiting:
            if old != target:
                self.remove_checkpoint(old)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint; if it is not valid, warn and load the newest valid one in its folder.

        The path of a folder that is not a checkpoint stands for the newest valid one in it.

        Raises:
            FileNotFoundError: if there is no such file or folder.
            ValueError: if no checkpoint is valid, if the valid one holds anything but tensors and plain values, or if
                weights_only is False.
        """
        if weights_only is False:
            raise ValueError("weights_only must not be False: loading a checkpoint must not run code")
        target = _local(path)
        if target.is_dir() and not sharded_checkpoints.is_sharded(target):
            return read_checkpoint(target, map_location)
        found = _verified(target, map_location)
        return read_checkpoint(instead_of(target, found), map_location) if isinstance(found, str) else found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its sidecar, but only from a folder that this object has saved into.

        Lightning also takes names of files to remove from checkpoints, which anybody may have written.
        """
        target = _local(path)
        if self._failures:
            self._to_remove.append(target)
        elif target.parent in self._saved_into:
            _remove(target)
        else:
            rank_zero_warn(f"{target} is not removed: this run has saved no checkpoint into its folder.")


def instead_of(target: Path, wrong: str) -> Path:
    """The newest valid checkpoint in the folder of one that is not valid, with a warning.

    Raises:
        ValueError: if there is none.
    """
    other = newest_valid(target.parent, recursive=False)
    if other is None:
        raise ValueError(f"{wrong}, and no other checkpoint in its folder is valid")
    rank_zero_warn(f"{wrong}; loading {other}, the newest valid checkpoint in its folder, instead.")
    return other


def verify(path: str | Path) -> str | None:
    """None if the checkpoint is what was saved, by size and SHA-256; otherwise one sentence that says what is wrong."""
    target = _local(path)
    if sharded_checkpoints.is_sharded(target):
        return sharded_checkpoints.wrong(target)
    if not target.is_file():
        return f"there is no checkpoint {target}"
    with target.open("rb") as file:
        return _wrong(target, file)


def newest_valid(folder: str | Path, recursive: bool = True, before: int | None = None) -> Path | None:
    """The newest checkpoint of a folder among those that `verify` accepts, or None; with `before`, of earlier steps.

    Within a run, which has a folder of its own, it is the one of the largest step, whatever the clock said. Runs that
    are folders version_0, version_1, ... side by side follow their numbers, and others the time of their last save.
    """
    folder = _local(folder)
    found = (folder.rglob if recursive else folder.glob)(f"*{SUFFIX}")
    paths = [path for path in found if path.is_file() or sharded_checkpoints.is_sharded(path)]
    saved = {path: _saved(path) for path in paths}
    if before is not None:
        saved = {path: values for path, values in saved.items() if values[0] < before}
    last: dict[Path, int] = {}
    for path, (_, time_ns) in saved.items():
        runs, _ = _run(path)
        last[runs] = max(time_ns, last.get(runs, 0))

    def age(path: Path) -> tuple[Any, ...]:
        runs, number = _run(path)
        # A link has the age of the checkpoint that it links to; the file itself comes before links to it.
        return last[runs], str(runs), number, *saved[path], not path.is_symlink(), str(path)

    return next((path for path in sorted(saved, key=age, reverse=True) if verify(path) is None), None)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", unverified: bool = False) -> dict[str, Any]:
    """The verified content of a checkpoint, or of the newest valid one below a folder: tensors and plain values.

    With `unverified`, a file that has no sidecar is read with a warning; a damaged one is not.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: in one sentence, if it is not valid, no checkpoint below the folder is, or it holds anything but
            tensors and plain values.
    """
    target = _local(path)
    if target.is_dir() and not sharded_checkpoints.is_sharded(target):
        newest = newest_valid(target)
        if newest is None:
            raise ValueError(f"there is no valid checkpoint in {target}")
        target = newest
    found = _verified(target, map_location, unverified)
    if isinstance(found, str):
        raise ValueError(found)
    return found


# saving


class _HashingFile:
    """What torch.save writes to: keeps the SHA-256 and size of the bytes written, and the first OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            files.write_all(self.file, data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], target: Path, step: Any) -> None:
    with files.replacing(target) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], hashing))
        except RuntimeError as error:
            # torch's own error about a failed write does not mention a full disk.
            if hashing.error is None:
                raise
            raise hashing.error from error
        record = {
            "sha256": hashing.sha256.hexdigest(),
            "size": hashing.size,
            "saved_at_ns": time.time_ns(),
            **_identity(step),
        }
        files.sync(file)
        _write_sidecar(target, [record, *_in_place(target)])
    _write_sidecar(target, [record])


def _identity(step: Any) -> dict[str, Any]:
    """What is recorded of every save."""
    versions = {name: _version(name) for name in ("torch", "lightning", "attnzoo")}
    return {"step": step if isinstance(step, int) else None, "versions": versions}


def _in_place(target: Path) -> list[dict[str, Any]]:
    """The record of the checkpoint in place; where a killed save has left two, the file's hash decides."""
    records = _records(target)
    if len(records) < 2 or not target.is_file():
        return records[:1]
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [record for record in records if record["sha256"] == digest]


def _write_sidecar(target: Path, records: list[dict[str, Any]]) -> None:
    files.write_atomically(_sidecar(target), json.dumps({"may_be": records}, indent=1))


def _remove(target: Path) -> None:
    if sharded_checkpoints.manifest_of(target) is not None:
        sharded_checkpoints.remove(target)
    if target.is_file() or target.is_symlink():
        target.unlink()
    _sidecar(target).unlink(missing_ok=True)


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    return L.__version__ if package == "lightning" else metadata.version(package)


# loading


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise ValueError(f"a checkpoint must be a local file, got {path}")
    return Path(path).absolute()


def _refuse_special(target: Path) -> None:
    """Raise for a path that is not a regular file: opening a FIFO could wait forever, and a device has no end."""
    if not target.exists():
        raise FileNotFoundError(f"there is no checkpoint {target}")
    if not target.is_file():
        raise ValueError(f"a checkpoint must be a regular file, got {target}, which is none")


def _sidecar(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _records(target: Path) -> list[dict[str, Any]]:
    """The records in the sidecar of a checkpoint, or of the one that it links to; empty if it cannot be read."""
    sidecar = _sidecar(target.resolve())
    try:
        if not sidecar.is_file() or sidecar.stat().st_size > _LARGEST_SIDECAR:
            return []
        listed = json.loads(sidecar.read_bytes())["may_be"]
        return [record for record in listed if isinstance(record["sha256"], str) and isinstance(record["size"], int)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _saved(target: Path) -> tuple[int, int]:
    """Step and time in ns of a save, from the record of the file's size, so that copying a run changes nothing."""
    try:
        size = target.stat().st_size
    except OSError:
        return -1, 0
    records = [record for record in _records(target) if record["size"] == size]
    if (manifest := sharded_checkpoints.manifest_of(target)) is not None:
        records = [manifest]
    found = [(record.get("step"), record.get("saved_at_ns")) for record in records]
    return max(((step, at) for step, at in found if isinstance(step, int) and isinstance(at, int)), default=(-1, 0))


def _run(target: Path) -> tuple[Path, int]:
    """The folder of the runs to which a checkpoint belongs, and the number of its own among them."""
    for folder in target.parents:
        match = _VERSION_FOLDER.fullmatch(folder.name)
        if match:
            return folder.parent, int(match.group(1))
    return target.parent, 0


def _wrong(target: Path, file: BufferedReader) -> str | None:
    """One sentence that says why the opened file is not what was saved, or None."""
    records = _records(target)
    if not records:
        return (
            f"{target} cannot be verified: its sidecar {_sidecar(target).name} is missing or unreadable "
            "(attnzoo-generate reads a file without one with --unverified)"
        )
    size = os.fstat(file.fileno()).st_size
    sizes = {record["size"] for record in records}
    if size not in sizes:
        return f"{target} is damaged: it has {size} bytes instead of {' or '.join(map(str, sorted(sizes)))}"
    try:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{target} cannot be read ({error})"
    if digest not in {record["sha256"] for record in records}:
        return f"{target} is damaged: its SHA-256 is not the one that its sidecar lists"
    return None


def _verified(target: Path, map_location: Any, unverified: bool = False) -> dict[str, Any] | str:
    """The content of a checkpoint, or one sentence that says why it is not what was saved."""
    if sharded_checkpoints.is_sharded(target):
        wrong = sharded_checkpoints.wrong(target)
        read = functools.partial(load_file, map_location=map_location)
        return sharded_checkpoints.read(target, read) if wrong is None else wrong
    _refuse_special(target)
    with target.open("rb") as file:
        wrong = _wrong(target, file)
        if wrong is not None and unverified and not _sidecar(target.resolve()).exists():
            rank_zero_warn(
                f"{target} has no sidecar {_sidecar(target).name}, so nothing says whether it is what was saved."
            )
            wrong = None
        return _load(target, file, map_location) if wrong is None else wrong


def load_file(target: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dictionary in a file, of which somebody else has to know that it is what was saved."""
    with target.open("rb") as file:
        return _load(target, file, map_location)


def _load(target: Path, file: BinaryIO, map_location: Any) -> dict[str, Any]:
    """Read the file that was verified, even if its name belongs to another file by now."""
    file.seek(0)
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{target} is not a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{target} must hold a dictionary, got {type(checkpoint).__name__}")
    return checkpoint
