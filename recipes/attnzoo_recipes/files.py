"""Writing files so that a reader finds the old content or the new one, and never half of either.

Whatever is being written has a random name beside its target and holds a lock of the operating system, which ends with
the process however that ends. So what a killed process has left is told apart from what a living one is writing without
process numbers, which containers share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]+")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one piece, replacing an older one; creates its folder.

    Text is encoded as UTF-8. Whatever happens, a power failure included, the file then holds its old content or all
    of the new one.

    Raises:
        OSError: if it cannot be written, with the file and the free space of its disk; the old file is left as it was.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write_all(file, content.encode() if isinstance(content, str) else content)
        sync(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new, unbuffered file that takes the place of `path` when the block ends, and is removed if the block raises.

    The caller writes with `write_all` and calls `sync` before the block ends. An OSError of the block is raised with
    the file and the free space of its disk.
    """
    unfinished = temporary(path)
    with naming(path):
        try:
            with unfinished.open("xb", buffering=0) as file:
                try_lock(file.fileno())
                yield file
                os.replace(unfinished, path)
            sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A name under which a file or folder is prepared: NAME.tmp-RANDOM, in the same folder."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder: those that nobody has locked."""
    for path in folder.iterdir():
        if not _TEMPORARY.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:
            if try_lock(file.fileno()):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, which is removed afterwards; waits, saying so, while another process holds it.

    Yields False, without a lock, on a file system that has none.
    """
    while True:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = try_lock(descriptor)
            if held is False:
                sys.stderr.write(f"waiting for the process that holds {path}\n")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held it before has removed it: then this is a lock that nobody else will look for.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield held is not None
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed: False if another has locked it, None if locks do not work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


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


# disks that fail


class WriteError(OSError):
    """A file could not be written; the message is a sentence with the file, the reason and the free space."""

    def __init__(self, code: int | None, sentence: str) -> None:
        super().__init__(code, sentence)

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a WriteError that names the file and the free space of its disk."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise WriteError(error.errno, f"{path} could not be written: {reason} ({free_space(path)})") from error


def free_space(path: Path) -> str:
    """How much room the disk of a file has, in words."""
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free on its disk"
    return "its disk does not answer"


@contextlib.contextmanager
def training_goes_on(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, such as that of a full disk, into a warning that names the file."""
    try:
        with naming(path):
            yield
    except OSError as error:
        warnings.warn(f"{error}; training continues.", stacklevel=4)


class Appender:
    """Appends text to a file; what a failing disk did not take is kept, and written before the next text."""

    def __init__(self) -> None:
        self.unwritten = ""

    def append(self, path: Path, text: str) -> None:
        """Append all of the text or none of it, with a warning; creates the folder."""
        self.unwritten += text
        with training_goes_on(path):
            append(path, self.unwritten)
            self.unwritten = ""


def append(path: Path, text: str) -> None:
    """Append text, all of it or nothing; creates the folder.

    Raises:
        OSError: if it cannot be written; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            write_all(file, text.encode())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def is_failing_disk(error: BaseException) -> bool:
    """Whether an exception says that a disk is full, broken, read-only or closed to this user."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
    return isinstance(error, WriteError) or (isinstance(error, OSError) and error.errno in full)


class Unbreakable:
    """A text stream that drops what cannot be written: a full disk or a closed pipe below stdout ends no training."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
