"""Sources of text: files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo_recipes.data.readers import field_of, read_json, read_parquet, read_text

SOURCES = ("stdlib", "text", "json", "parquet", "hub", "tokens")
DOCUMENT_UNITS = ("document", "paragraph", "line")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Args:
        source: "stdlib" (the source text of the running Python's standard library, without its tests), "text",
            "json" (one object a line, or a list), "parquet", "hub" (a dataset of the Hugging Face hub, streamed), or
            "tokens" (ready token files, which `packing.open_tokens` reads: there are no documents to read here).
        files: paths or glob patterns, for text, json and parquet, which may be compressed (.gz, .bz2, .xz). A path that
            exists is taken as it is written, with any brackets.
        name: the dataset, for hub.
        subset: its configuration.
        hub_split: its split.
        text_field: the field with the text, for json, parquet and hub.
        unit: what counts as a document in a text file: the whole "document", a "paragraph" or a "line".
        max_documents: largest number of documents to read.
        revision: commit, tag or branch of the dataset, for hub. Default: the newest commit, which is then part of
            what identifies the corpus.
        label: prefix of the names of settings in messages.

    Raises:
        ValueError: for arguments that do not fit the source, or a pattern that no file matches.
    """

    source: str = "stdlib"
    files: tuple[str, ...] = ()
    name: str | None = None
    subset: str | None = None
    hub_split: str = "train"
    text_field: str = "text"
    unit: str = "document"
    max_documents: int | None = None
    revision: str | None = None
    label: str = "data."

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"{self.label}source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.unit not in DOCUMENT_UNITS:
            raise ValueError(f"{self.label}unit must be one of {', '.join(DOCUMENT_UNITS)}, got {self.unit!r}")
        if self.source == "tokens" and len(self.files) > 1:
            raise ValueError(f"{self.label}files must name one folder or .bin file of tokens, got {list(self.files)}")
        if bool(self.files) != (self.source in ("text", "json", "parquet", "tokens")):
            rule = "must be empty" if self.files else "must name at least one file"
            raise ValueError(f"{self.label}files {rule} for {self.label}source {self.source}, got {list(self.files)}")
        if (self.name is not None) != (self.source == "hub"):
            raise ValueError(
                f"{self.label}name must be given for {self.label}source hub alone, got {self.name!r} for {self.source}"
            )
        if self.revision is not None and self.source != "hub":
            raise ValueError(
                f"{self.label}revision must be given for {self.label}source hub alone, got {self.revision!r} for "
                f"{self.source}"
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"{self.label}max_documents must be at least 1, got {self.max_documents}")

    def paths(self) -> list[Path]:
        """The files, sorted, with patterns expanded; empty for hub."""
        if self.source == "hub":
            return []
        if self.source == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            sources = [path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts)]
            return sorted(path for path in sources if path.is_file())
        paths: list[Path] = []
        for pattern in self.files:
            matches = sorted(path for match in _matches(pattern) if (path := Path(match)).is_file())
            if not matches and Path(pattern).is_dir():
                raise ValueError(
                    f"{self.label}files must name files or patterns, such as {os.path.join(pattern, '*')!r}, got the "
                    f"folder {pattern!r}"
                )
            if not matches:
                raise ValueError(f"{self.label}files: there is no file {pattern!r}")
            paths += matches
        return list(dict.fromkeys(paths))

    def fingerprint(self) -> Mapping[str, Any]:
        """What identifies a corpus: the settings, and a hash of the names and contents of the files."""
        content = hashlib.sha256()
        for path in self.paths():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            content.update(path.name.encode() + b"\0" + digest)
        settings = {"source": self.source, "unit": self.unit, "max_documents": self.max_documents}
        if self.source == "hub":
            settings |= {"name": self.name, "subset": self.subset, "hub_split": self.hub_split}
            settings |= {"revision": self.commit}
        if self.source != "stdlib":
            settings["text_field"] = self.text_field
        return {**settings, "content": content.hexdigest()}

    @functools.cached_property
    def commit(self) -> str | None:
        """The revision of a hub dataset, as a commit if the hub answers."""
        from huggingface_hub import HfApi

        try:
            newest: str | None = HfApi().dataset_info(str(self.name), revision=self.revision).sha
        except Exception:  # what the client raises offline differs between its versions; loading says what is wrong
            return self.revision
        return newest

    def size(self) -> int | None:
        """Bytes of the files; None for hub."""
        return None if self.source == "hub" else sum(path.stat().st_size for path in self.paths())

    def documents(self) -> Iterator[str]:
        """The texts that are not blank, in the order of the files.

        Raises:
            ValueError: if a file cannot be read as the source says, or has no such field.
        """
        return (text for text, _ in self.placed_documents())

    def placed_documents(self) -> Iterator[tuple[str, int]]:
        """As `documents`, each with about how many of `size` bytes have been read after it.

        Within a file these are the characters so far, at most the file's bytes; for hub all characters.
        """
        count = 0
        for text, place in self._texts():
            if text.strip():
                yield text, place
                count += 1
            if count == self.max_documents:
                return

    def _texts(self) -> Iterator[tuple[str, int]]:
        place = 0
        if self.source == "hub":
            for text in self._hub_texts():
                place += len(text)
                yield text, place
        for path in self.paths():
            before, size = place, path.stat().st_size
            for text in self._texts_of(path):
                place = min(place + len(text) + 1, before + size)
                yield text, place
            place = before + size

    def _texts_of(self, path: Path) -> Iterator[str]:
        if self.source == "json":
            return read_json(path, self.text_field)
        if self.source == "parquet":
            return read_parquet(path, self.text_field)
        return read_text(path, self.unit)

    def _hub_texts(self) -> Iterator[str]:
        """Rows of a streamed dataset, which is not copied into a cache."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            rows = load_dataset(self.name, self.subset, split=self.hub_split, streaming=True, revision=self.commit)
            for number, row in enumerate(rows, 1):
                yield field_of(row, self.text_field, f"row {number} of {self.name}")
        except (DatasetsError, OSError) as error:
            raise ValueError(f"the corpus {self.name} cannot be read as hub: {error}") from error


def _matches(pattern: str) -> list[str]:
    """What matches a pattern, of which a beginning that exists as it is written means itself."""
    there = Path(pattern)
    while not there.exists():
        there = there.parent
    if there == Path(pattern):
        return [pattern]
    rest = str(Path(pattern).relative_to(there))
    return glob.glob(os.path.join(glob.escape(str(there)), rest), recursive=True)
