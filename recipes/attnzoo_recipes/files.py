"""Writing files so that a reader finds the old content or the new one, and never half of either."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one piece, replacing an older one; creates its folder.

    Text is encoded as UTF-8. Whatever happens, a power failure included, the file then holds its old content or all
    of the new one.

    Raises:
        OSError: if it cannot be written; the old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write_all(file, content.encode() if isinstance(content, str) else content)
        sync(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new, unbuffered file that takes the place of `path` when the block ends, and is removed if the block raises.

    The caller writes with `write_all` and calls `sync` before the block ends.
    """
    unfinished = temporary(path)
    try:
        with unfinished.open("wb", buffering=0) as file:
            yield file
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """The name under which this process prepares a file or folder: NAME.tmp-PID, in the same folder."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_all(file: BinaryIO, data: Any) -> None:
    """Write all of a bytes-like object: an unbuffered file may take less than it is given."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def sync(file: BinaryIO) -> None:
    """Wait until the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
