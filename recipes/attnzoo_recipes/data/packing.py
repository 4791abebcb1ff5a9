"""Documents as files of token ids, with one folder per corpus and tokenizer, named after a hash of the settings.

    KEY/meta.json              settings, and for each split: tokens, documents, bytes, entropies
    KEY/tokenizer.json         the tokenizer
    KEY/{train,val,test}.bin   ids, little-endian uint16 or uint32
    KEY/SHA256SUMS             digests of all of these, as sha256sum(1) writes and checks them

Every document in a file begins with the document token, so that boundaries need no index. A folder is created as
KEY.unfinished, where `parts` writes, by one process at a time, and renamed when it is complete; the next run continues
what a killed one has left. Opening a folder compares every file with its digest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo_recipes import files
from attnzoo_recipes.data import parts
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.parts import SPLITS, split_of
from attnzoo_recipes.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    Tokenizer,
    from_dict,
    load_tokenizer,
    save_tokenizer,
)

_SUMS = "SHA256SUMS"
_UNFINISHED = ".unfinished"
_NAMES = ("meta.json", "tokenizer.json", *(f"{split}.bin" for split in SPLITS))
_VERSION = 1
_BPE_TRAINING_BYTES = 50_000_000


@dataclass(frozen=True)
class PackedCorpus:
    """A folder of token files.

    Attributes:
        folder: the folder, or that of a file given as it is.
        meta: settings, "dtype", and "splits" with the number of tokens of each, and where `open_tokens` found them.
        tokenizer: of the tokens.
        key: identifies the tokens, by content. Default: the folder's name.
    """

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.folder.name)

    @classmethod
    def open(cls, folder: Path) -> PackedCorpus:
        """Read what `pack` wrote.

        Raises:
            ValueError: with the file's name, if one is missing or is not what was written.
        """
        _verify(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokenizer = from_dict(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        return cls(folder, meta, tokenizer)

    def tokens(self, split: str) -> np.ndarray:
        """All ids of a split, mapped into memory read-only."""
        about = self.meta["splits"][split]
        count, dtype = about["tokens"], np.dtype(self.meta["dtype"])
        if count == 0:
            return np.zeros(0, dtype=dtype)
        path, offset = self.folder / about.get("file", f"{split}.bin"), about.get("first", 0) * dtype.itemsize
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def pack(
    corpus: Corpus,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    val_fraction: float,
    test_fraction: float,
    cache_dir: Path,
    document: str | None = None,
    num_proc: int = 1,
) -> PackedCorpus:
    """The corpus as token files below cache_dir, which are created if they do not exist.

    Args:
        corpus: source of the documents.
        tokenizer: "byte", "bpe" (trained on the training documents), the path of a tokenizer.json, or a tokenizer.
        vocab_size: of "bpe".
        val_fraction: share of documents for validation, chosen by their hash; equal documents are in the same split.
        test_fraction: share of documents for testing.
        cache_dir: folder in which the corpus gets its folder.
        document: spelling of the document token in a tokenizer.json (`load_tokenizer`).
        num_proc: processes that tokenise; the files do not depend on it.

    Raises:
        OSError: if the files cannot be written, with the free space of their disk.
        ValueError: if the corpus holds no text or cannot be read, the tokenizer cannot be used, or a file that exists
            is not what was written.
    """
    given = named_tokenizer(tokenizer, document) if isinstance(tokenizer, str) else tokenizer
    settings = {
        "version": _VERSION,
        "corpus": dict(corpus.fingerprint()),
        "tokenizer": tokenizer if isinstance(tokenizer, str) and given is None else _described(given),
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
    }
    folder = cache_dir / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    lock = folder.with_name(f"{folder.name}.lock")
    if not folder.exists() or lock.exists():
        with files.locked(lock) as alone:
            for left in folder.parent.glob(f"{folder.name}.tmp-*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)
            # Without locks another process may write into the same folder, so that each needs its own.
            unfinished = folder.with_name(folder.name + _UNFINISHED) if alone else files.temporary(folder)
            if not folder.exists():
                _create(folder, unfinished, corpus, given, settings, num_proc)
    return PackedCorpus.open(folder)


def named_tokenizer(name: str, document: str | None = None) -> Tokenizer | None:
    """The tokenizer of a file or folder; None for "byte" and "bpe", which the corpus makes."""
    if name not in ("byte", "bpe"):
        return load_tokenizer(Path(name), document)
    if document is not None:
        raise ValueError(f"data.document_token must be given for a tokenizer.json alone, got {document!r} for {name}")
    return None


def _described(tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {} if tokenizer is None else tokenizer.to_dict()


def open_tokens(path: Path, tokenizer: str, document: str | None, fractions: tuple[float, float]) -> PackedCorpus:
    """Ready token files as they are; nothing is written.

    Args:
        path: a folder that `pack` has made; a folder with train.bin and, if the caller has no other validation text,
            val.bin; or one file of ids. Files hold nothing but ids, little-endian, of two bytes each where the
            vocabulary has at most 65,536 entries, otherwise of four. What a folder has not, and of one file
            the end, is cut off from the training tokens: first those for testing, then those for validation.
        tokenizer: of the ids: "byte" or the path of a tokenizer.json.
        document: spelling of the token between documents.
        fractions: shares of the tokens for validation and testing.

    Raises:
        ValueError: if there is no such file or folder, or a file cannot hold such ids.
    """
    if (path / "meta.json").is_file():
        return PackedCorpus.open(path)
    if tokenizer == "bpe":
        raise ValueError("data.tokenizer must be the path of the tokens' tokenizer.json, or byte, got 'bpe'")
    known = named_tokenizer(tokenizer, document) or ByteTokenizer()
    dtype = np.dtype("<u2" if known.vocab_size <= 2**16 else "<u4")
    named = {split: path / f"{split}.bin" for split in SPLITS} if path.is_dir() else {"train": path}
    found = {split: file for split, file in named.items() if file.is_file()}
    if "train" not in found:
        raise ValueError(
            f"data.files must name a folder with meta.json or train.bin, or a .bin file, got {str(path)!r}"
        )
    digest = hashlib.sha256(json.dumps(known.to_dict(), sort_keys=True).encode())
    splits: dict[str, dict[str, Any]] = {split: {"tokens": 0, "first": 0, "documents": 0} for split in SPLITS}
    for split, file in found.items():
        size, rest = divmod(file.stat().st_size, dtype.itemsize)
        ids = np.memmap(file, dtype=dtype, mode="r") if size and not rest else np.zeros(0, dtype=dtype)
        if rest or not size or int(ids.max()) >= known.vocab_size:
            got = f"{file.stat().st_size} bytes" if rest or not size else f"the id {int(ids.max())}"
            raise ValueError(f"{file} must hold ids below {known.vocab_size} of {dtype.itemsize} bytes each, got {got}")
        documents = int((ids == known.document_id).sum())
        splits[split] = {"tokens": size, "first": 0, "documents": documents, "file": file.name}
        with file.open("rb") as opened:
            digest.update(split.encode() + hashlib.file_digest(opened, "sha256").digest())
    whole = splits["train"]["tokens"]
    for split, share in (("test", fractions[1]), ("val", fractions[0])):
        if split not in found and (taken := int(whole * share)):
            splits["train"]["tokens"] -= taken
            splits[split] = {**splits["train"], "tokens": taken, "first": splits["train"]["tokens"]}
    meta = {"dtype": dtype.str, "splits": splits, "tokenizer": known.to_dict(), "fractions": list(fractions)}
    digest.update(json.dumps(list(fractions)).encode())
    return PackedCorpus(path if path.is_dir() else path.parent, meta, known, digest.hexdigest()[:16])


def _create(
    folder: Path, unfinished: Path, corpus: Corpus, tokenizer: Tokenizer | None, settings: dict[str, Any], num_proc: int
) -> None:
    """Make the folder in one piece. Finished parts are kept for the next run, unless it could not use them."""
    is_kept = unfinished.suffix == _UNFINISHED
    try:
        with files.naming(unfinished):
            unfinished.mkdir(exist_ok=True)
            files.sweep(unfinished)
            _write(unfinished, corpus, tokenizer, settings, num_proc)
            files.sync_folder(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Only where locks do not work can another process have made it in the meantime.
            if not (folder / _SUMS).is_file():
                raise
        files.sync_folder(folder.parent)
    except ValueError:
        is_kept = False  # what is wrong with the corpus is part of its key
        raise
    finally:
        if not (is_kept and parts.is_begun(unfinished)):
            shutil.rmtree(unfinished, ignore_errors=True)


def _verify(folder: Path) -> None:
    again = f"; remove {folder}, and the next run tokenises the corpus anew"
    name = _SUMS
    try:
        written = (folder / _SUMS).read_bytes()
        found = b""
        for name in _NAMES:
            line = _sum(folder, name)
            if line not in written:
                raise ValueError(f"{folder / name} is not what was written: its SHA-256 is not in {_SUMS}{again}")
            found += line
    except OSError as error:
        raise ValueError(f"{folder / name} cannot be read ({error.strerror}){again}") from None
    if found != written:
        raise ValueError(f"{folder / _SUMS} is not what was written{again}")


def _sum(folder: Path, name: str) -> bytes:
    """A line of SHA256SUMS."""
    with (folder / name).open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()


def _write(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, settings: dict[str, Any], num_proc: int = 1
) -> None:
    fractions = settings["val_fraction"], settings["test_fraction"]
    tokenizer = tokenizer or parts.kept_tokenizer(folder)
    if tokenizer is None:
        tokenizer = ByteTokenizer()
        if settings["tokenizer"] == "bpe":
            tokenizer = BpeTokenizer.train(_training_text(corpus, *fractions), settings["vocab_size"])
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    counted = parts.write_parts(folder, corpus.placed_documents, tokenizer, fractions, num_proc, corpus.size())
    if not any(each["documents"] for each in counted.splits.values()):
        raise ValueError("the corpus holds no text")
    splits: dict[str, dict[str, Any]] = dict(counted.splits)
    for split, pairs in counted.pairs.items():
        if splits[split]["documents"]:
            splits[split] = {**splits[split], **parts.entropies(pairs)}
    meta = {**settings, "dtype": parts.dtype_of(tokenizer), "splits": splits}
    files.write_atomically(folder / "meta.json", json.dumps(meta, indent=1))
    files.write_atomically(folder / _SUMS, b"".join(_sum(folder, name) for name in _NAMES))
    parts.finish(folder)


def _training_text(corpus: Corpus, *fractions: float) -> Iterator[str]:
    taken = 0
    for text in corpus.documents():
        if taken >= _BPE_TRAINING_BYTES:
            return
        if split_of(text, *fractions) == "train":
            taken += len(text.encode())
            yield text
