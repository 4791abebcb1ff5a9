"""Texts of one file: plain text, JSON or Parquet, read as a stream; errors name the file and the line."""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

_ROWS_AT_ONCE = 1024
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_text(path: Path, unit: str) -> Iterator[str]:
    """The documents of a UTF-8 text file, with "\\n" for every kind of line break and without a byte order mark.

    Args:
        path: the file, which may be compressed (.gz, .bz2, .xz, ...).
        unit: the whole "document", a "paragraph" (they end with an empty line) or a "line".

    Raises:
        ValueError: if it is not UTF-8 or cannot be read.
    """
    try:
        with _open(path) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig")
            if unit == "document":
                yield lines.read()
            elif unit == "line":
                yield from (line.removesuffix("\n") for line in lines)
            else:
                yield from _paragraphs(lines)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.files must be UTF-8 text, got {path}, line {_first_undecodable(path)}: {error}"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"data.files: {path} cannot be read: {error}") from error


def read_json(path: Path, field: str) -> Iterator[str]:
    """The field of each object in a file of JSON lines, or in a file that holds one list of objects.

    Other fields may hold anything, also different types in different lines.

    Raises:
        ValueError: if the file cannot be read, or a line is not an object with that field, holding text.
    """
    try:
        with _open(path) as file:
            for where, row in _objects(path, file):
                if not isinstance(row, dict):
                    raise ValueError(f"data.files must hold JSON objects, got {_type(row)} in {where}")
                yield field_of(row, field, where)
    except _DAMAGED as error:
        raise ValueError(f"data.files: {path} cannot be read: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """A column of a Parquet file; the others are not read.

    Raises:
        ValueError: if the file cannot be read, or has no such column of text.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                field_of(dict.fromkeys(names), field, str(path))
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield field_of({field: value.as_py()}, field, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.files must hold UTF-8 text, got {path}, row {row}: {error}") from error
    except (ArrowException, OSError) as error:
        raise ValueError(f"data.files: {path} cannot be read as Parquet: {error}") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as its name says."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    compression = infer_compression(path.name)
    with path.open("rb") as stored, ExitStack() as stack:
        yield stored if compression is None else stack.enter_context(compr[compression](stored, mode="rb"))


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph = ""
    for line in lines:
        paragraph += line
        if paragraph.endswith("\n\n"):
            yield paragraph[:-2]
            paragraph = ""
    yield paragraph


def _first_undecodable(path: Path) -> int:
    """Number of the first line that is not UTF-8, or 0."""
    with _open(path) as file:
        return next((number for number, line in enumerate(file, 1) if not _is_utf8(line)), 0)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _objects(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line, or of every entry of a file that holds a list."""
    is_list: bool | None = None
    for number, line in enumerate(file, 1):
        if is_list is None:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                is_list = line.lstrip().startswith(b"[")
        if is_list:
            entries = _parsed(line + file.read(), str(path))
            yield from ((f"{path}, entry {i}", entry) for i, entry in enumerate(entries, 1))
        elif line.strip():
            yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(text: bytes, where: str) -> Any:
    try:
        # Whole numbers are never wanted, and Python refuses long ones.
        return json.loads(text.decode(), parse_int=lambda _: 0)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.files must hold JSON, got {where}: {error}") from error


def field_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text in that field of a row; `where` names the row in messages.

    Raises:
        ValueError: if there is no such field, or it does not hold text that UTF-8 can write.
    """
    if field not in row:
        raise ValueError(f"data.text_field must be one of {', '.join(map(str, row))}, got {field!r} in {where}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"data.text_field {field!r} must hold text, got {_type(text)} in {where}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data.text_field {field!r} must hold text that UTF-8 can write, got {where}: {error}"
        ) from error
    return text


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
