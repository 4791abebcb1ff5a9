"""Sources of text: documents, read with Hugging Face datasets."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("stdlib", "text", "json", "parquet", "hub")
DOCUMENT_UNITS = ("document", "paragraph", "line")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Args:
        source: "stdlib" (the source text of the running Python's standard library, without its tests), "text",
            "json" (one object a line, or a list), "parquet", or "hub" (a dataset of the Hugging Face hub, streamed).
        files: paths or glob patterns, for text, json and parquet.
        name: the dataset, for hub.
        subset: its configuration.
        hub_split: its split.
        text_field: the field with the text, for json, parquet and hub.
        unit: what counts as a document in a text file: the whole "document", a "paragraph" or a "line".
        max_documents: largest number of documents to read.

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

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.unit not in DOCUMENT_UNITS:
            raise ValueError(f"data.unit must be one of {', '.join(DOCUMENT_UNITS)}, got {self.unit!r}")
        if bool(self.files) != (self.source in ("text", "json", "parquet")):
            rule = "must be empty" if self.files else "must name at least one file"
            raise ValueError(f"data.files {rule} for data.source {self.source}, got {list(self.files)}")
        if (self.name is not None) != (self.source == "hub"):
            raise ValueError(f"data.name must be given for data.source hub alone, got {self.name!r} for {self.source}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"data.max_documents must be at least 1, got {self.max_documents}")

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
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise ValueError(f"data.files: there is no file {pattern!r}")
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
        if self.source != "stdlib":
            settings["text_field"] = self.text_field
        return {**settings, "content": content.hexdigest()}

    def documents(self) -> Iterator[str]:
        """The texts that are not blank, in the order of the files.

        Raises:
            ValueError: if a file cannot be read as the source says, or has no such field.
        """
        from datasets.exceptions import DatasetsError, DatasetGenerationError  # noqa: I001

        count = 0
        try:
            for row in self._rows():
                field = "text" if self.source in ("stdlib", "text") else self.text_field
                if field not in row:
                    raise ValueError(f"data.text_field must be one of {', '.join(row)}, got {field!r}")
                text = row[field]
                if not isinstance(text, str):
                    raise ValueError(f"data.text_field {field!r} must hold text, got {type(text).__name__}")
                if text.strip():
                    yield text
                    count += 1
                if count == self.max_documents:
                    return
        except UnicodeDecodeError as error:
            raise ValueError(f"data.files must be UTF-8 text: {error}") from error
        except (DatasetsError, DatasetGenerationError, OSError) as error:
            where = self.name if self.source == "hub" else ", ".join(self.files[:3])
            raise ValueError(f"the corpus {where} cannot be read as {self.source}: {error}") from error

    def _rows(self) -> Any:
        """Rows of a streamed dataset, which is not copied into a cache."""
        from datasets import load_dataset

        if self.source == "hub":
            return load_dataset(self.name, self.subset, split=self.hub_split, streaming=True)
        file_format = "text" if self.source == "stdlib" else self.source
        options = {"sample_by": self.unit} if file_format == "text" else {}
        paths = [str(path) for path in self.paths()]
        return load_dataset(file_format, data_files=paths, split="train", streaming=True, **options)
