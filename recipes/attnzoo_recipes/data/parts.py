"""Documents as token ids, in parts: by several processes, with a resume point after each part.

A part is a run of documents of about `PART_CHARACTERS`, a function of the documents alone. One process reads them and
writes the ids in their order; others turn parts into ids. So the files do not depend on the number of processes, no
process holds more than a few parts, and a process that was killed has left a prefix of the files:

    FOLDER/{train,val,test}.bin   ids; what goes beyond the finished parts is cut off
    FOLDER/parts.json             SHA-256 of the next line, and in it: how many parts are finished, what was counted in
                                  them, and digests of their texts, their ids and the tokenizer
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo_recipes import files
from attnzoo_recipes.data.tokenizers import Tokenizer, from_dict

SPLITS = ("train", "val", "test")
PART_CHARACTERS = 2**23
_OF_A_TEXT = 64  # what a text costs in a part besides its characters
_AT_ONCE = 2**20  # characters that a tokenizer is given at once
_STATE = "parts.json"
_LINE_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Part:
    """Documents, and how many bytes of the corpus had been read after them."""

    texts: list[str]
    place: int


def parts_of(documents: Iterable[tuple[str, int]]) -> Iterator[Part]:
    """Cut (text, bytes read so far) into parts."""
    texts: list[str] = []
    size = place = 0
    for text, place in documents:
        texts.append(text)
        size += len(text) + _OF_A_TEXT
        if size >= PART_CHARACTERS:
            yield Part(texts, place)
            texts, size = [], 0
    if texts:
        yield Part(texts, place)


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """train, val or test, a function of the document's hash."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if place < val_fraction:
        return "val"
    return "test" if place < val_fraction + test_fraction else "train"


def entropies(pairs: np.ndarray) -> dict[str, float]:
    """Bits per byte of the best model of single bytes, and of the best model of a byte given the previous one.

    pairs (257, 256): how often a byte follows a byte, or (256) the beginning of a document.
    """
    total = pairs.sum()
    unigram, bigram = (_bits(table).sum() for table in (pairs.sum(0, keepdims=True), pairs))
    return {"unigram_bits_per_byte": float(unigram / total), "bigram_bits_per_byte": float(bigram / total)}


def _bits(counts: np.ndarray) -> np.ndarray:
    """-n log2 p of every entry, p relative to its row."""
    rows = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, -counts * np.log2(counts / rows), 0.0)


@dataclass
class Counts:
    """What is counted in documents: tokens, documents and bytes of each split, and pairs of bytes where it is measured.

    The pairs give the entropies that a language model should be below.
    """

    splits: dict[str, dict[str, int]] = field(
        default_factory=lambda: {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
    )
    pairs: dict[str, np.ndarray] = field(
        default_factory=lambda: {split: np.zeros((257, 256), dtype=np.int64) for split in ("val", "test")}
    )

    def add_document(self, split: str, text: str, tokens: int) -> None:
        """Count a document; its first byte is a pair with the beginning of the document."""
        written = text.encode()
        for name, number in (("tokens", tokens), ("documents", 1), ("bytes", len(written))):
            self.splits[split][name] += number
        if split in self.pairs:
            following = np.frombuffer(written, dtype=np.uint8).astype(np.int64)
            before = np.concatenate([[256], following[:-1]])
            self.pairs[split] += np.bincount(before * 256 + following, minlength=257 * 256).reshape(257, 256)

    def add(self, other: Counts) -> None:
        """Add what was counted in other documents."""
        for split, counted in other.splits.items():
            for name, number in counted.items():
                self.splits[split][name] += number
        for split, pairs in other.pairs.items():
            self.pairs[split] += pairs


# one part


@dataclass(frozen=True)
class Encoded:
    """A part as little-endian ids of each split, and what was counted in it."""

    ids: dict[str, bytes]
    counts: Counts


def encoded(texts: list[str], tokenizer: Tokenizer, fractions: tuple[float, float]) -> Encoded:
    """The ids of documents, each after the document token."""
    dtype = dtype_of(tokenizer)
    ids = {split: bytearray() for split in SPLITS}
    counts = Counts()
    for some in _portions(texts):
        for text, found in zip(some, tokenizer.encode_batch(some), strict=True):
            split = split_of(text, *fractions)
            ids[split] += np.concatenate([[tokenizer.document_id], found]).astype(dtype).tobytes()
            counts.add_document(split, text, 1 + len(found))
    return Encoded({split: bytes(found) for split, found in ids.items()}, counts)


def dtype_of(tokenizer: Tokenizer) -> str:
    """The type of ids in files."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def _portions(texts: list[str]) -> Iterator[list[str]]:
    """Texts in order, a few at once, since tokenizers need many times as much memory as a text."""
    some: list[str] = []
    size = 0
    for text in texts:
        if some and size + len(text) > _AT_ONCE:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text) + _OF_A_TEXT
    if some:
        yield some


# several processes


def _work(connection: Connection, settings: dict[str, Any], fractions: tuple[float, float]) -> None:
    """Answer lists of texts with `Encoded`, or the exception, until the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the process that asks decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = from_dict(settings)
    with suppress(EOFError, ConnectionError):
        while True:
            texts = connection.recv()
            try:
                answer: Encoded | Exception = encoded(texts, tokenizer, fractions)
            except Exception as error:
                answer = error
            connection.send(answer)


class _Worker:
    """A process with one part at a time; it ends with the process that started it, however that ends."""

    def __init__(self, tokenizer: Tokenizer, fractions: tuple[float, float], number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self._number = number
        self._connection, theirs = context.Pipe()
        arguments = (theirs, tokenizer.to_dict(), fractions)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, texts: list[str]) -> None:
        """Begin a part."""
        with suppress(ConnectionError):  # which the answer reports
            self._connection.send(texts)

    def answer(self) -> Encoded:
        """Wait for the part.

        Raises:
            OSError: if the process has ended.
        """
        try:
            answer: Encoded | Exception = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise files.WriteError(
                None,
                f"a process of data.num_proc = {self._number} that tokenised has ended with exit code "
                f"{self._process.exitcode}; fewer take less memory, and the next run continues after the parts that "
                f"are finished",
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.join()


def _each_encoded(
    parts: Iterable[Part], tokenizer: Tokenizer, fractions: tuple[float, float], num_proc: int
) -> Generator[tuple[Part, Encoded], None, None]:
    """Parts with their ids, in order; each of num_proc processes works on every num_proc-th part."""
    if num_proc == 1:
        for part in parts:
            yield part, encoded(part.texts, tokenizer, fractions)
        return
    asked: deque[tuple[Part, _Worker]] = deque()
    with ExitStack() as stack:
        for part in parts:
            found = None
            if len(asked) < num_proc:
                worker = _Worker(tokenizer, fractions, num_proc)
                stack.callback(worker.stop)
            else:
                before, worker = asked.popleft()
                found = before, worker.answer()
            worker.ask(part.texts)
            asked.append((part, worker))
            if found is not None:
                yield found
        for part, worker in asked:
            yield part, worker.answer()


# the files


@dataclass
class _Finished:
    """How far the files of a folder are."""

    parts: int = 0
    counts: Counts = field(default_factory=Counts)
    texts: Any = field(default_factory=hashlib.sha256)
    ids: dict[str, Any] = field(default_factory=lambda: {split: hashlib.sha256() for split in SPLITS})
    place: int = 0

    def read_texts(self, part: Part) -> None:
        """Note the texts of the next part."""
        for text in part.texts:
            written = text.encode()
            self.texts.update(len(written).to_bytes(8, "little") + written)
        self.place = part.place

    def digests(self) -> dict[str, str]:
        return {"texts": self.texts.hexdigest(), **{split: self.ids[split].hexdigest() for split in SPLITS}}

    def save(self, folder: Path, tokenizer: str) -> None:
        content = json.dumps({
            "parts": self.parts, "splits": self.counts.splits, "digests": self.digests(), "tokenizer": tokenizer,
            "pairs": {split: pairs.tolist() for split, pairs in self.counts.pairs.items()},
        }).encode()  # fmt: skip
        files.write_atomically(folder / _STATE, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def is_begun(folder: Path) -> bool:
    """Whether a part is finished in a folder."""
    return (folder / _STATE).is_file()


def kept_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of finished parts, if what has been counted in them and the tokenizer are as they were written."""
    state = _state(folder)
    return None if state is None else from_dict(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        digest, _, content = (folder / _STATE).read_bytes().partition(b"\n")
        tokenizer = _digest(folder / "tokenizer.json")
    except OSError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    state: dict[str, Any] = json.loads(content)
    return state if state["tokenizer"] == tokenizer else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(folder: Path, item_bytes: int, parts: Iterator[Part]) -> _Finished | None:
    """What is finished in a folder, with its parts taken from `parts`; None if ids or texts are not those of then."""
    state = _state(folder)
    if state is None:
        return None
    counts = Counts(state["splits"], {split: np.array(pairs) for split, pairs in state["pairs"].items()})
    finished = _Finished(state["parts"], counts)
    for split in SPLITS:
        rest = counts.splits[split]["tokens"] * item_bytes
        with suppress(OSError), (folder / f"{split}.bin").open("rb") as file:
            while taken := file.read(min(rest, 2**20)):
                finished.ids[split].update(taken)
                rest -= len(taken)
    for part in itertools.islice(parts, finished.parts):
        finished.read_texts(part)
    return finished if finished.digests() == state["digests"] else None


def write_parts(
    folder: Path,
    documents: Callable[[], Iterator[tuple[str, int]]],
    tokenizer: Tokenizer,
    fractions: tuple[float, float],
    num_proc: int = 1,
    total: int | None = None,
) -> Counts:
    """Write {train,val,test}.bin, after the parts that a process before has finished; returns what they hold.

    `finish` has to follow once whatever else belongs into the folder is there.

    Args:
        folder: has tokenizer.json.
        documents: what gives (text, bytes of the corpus read so far) from the beginning, the same at every call.
        tokenizer: of the ids.
        fractions: shares of the documents for validation and testing.
        num_proc: processes that tokenise.
        total: bytes of the corpus, for the progress that is shown.

    Raises:
        OSError: if a file cannot be written, or one of the processes has ended.
        ValueError: if a document cannot be read or tokenised.
    """
    item_bytes = np.dtype(dtype_of(tokenizer)).itemsize
    parts = parts_of(documents())
    finished = _kept(folder, item_bytes, parts)
    if finished is None:
        parts, finished = parts_of(documents()), _Finished()
        (folder / _STATE).unlink(missing_ok=True)
    elif finished.parts:
        sys.stderr.write(f"tokenisation continues after {finished.parts} finished parts in {folder}\n")
    own = _digest(folder / "tokenizer.json")
    with ExitStack() as stack:
        opened = {split: stack.enter_context((folder / f"{split}.bin").open("ab")) for split in SPLITS}
        for split, file in opened.items():
            file.truncate(finished.counts.splits[split]["tokens"] * item_bytes)
        shown = stack.enter_context(closing(_Progress(finished.place, total)))
        for part, found in stack.enter_context(closing(_each_encoded(parts, tokenizer, fractions, num_proc))):
            for split, file in opened.items():
                file.write(found.ids[split])
                finished.ids[split].update(found.ids[split])
                files.sync(file)
            finished.counts.add(found.counts)
            finished.read_texts(part)
            finished.parts += 1
            finished.save(folder, own)
            shown.update(part.place)
    return finished.counts


def finish(folder: Path) -> None:
    """Remove what only a resumption needs."""
    (folder / _STATE).unlink(missing_ok=True)


class _Progress:
    """A bar on a terminal, elsewhere a line every 30 seconds; nothing in the first two."""

    def __init__(self, place: int, total: int | None) -> None:
        from tqdm import tqdm

        self._first = self._place = place
        self._total = total
        self._began = self._said = time.monotonic()
        self._bar = tqdm(
            desc="tokenising", initial=place, total=total, unit="B", unit_scale=True, delay=2, disable=None
        )

    def update(self, place: int) -> None:
        """So many bytes of the corpus are tokenised."""
        self._bar.update(place - self._place)
        self._place = place
        now = time.monotonic()
        if self._bar.disable and now - self._said >= _LINE_EVERY:
            self._said = now
            rate = (place - self._first) / (now - self._began)
            whole = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            sys.stderr.write(f"tokenising: {place / 1e6:,.0f}{whole} MB, {rate / 1e6:,.1f} MB/s\n")

    def close(self) -> None:
        """The end of the bar."""
        self._bar.close()
