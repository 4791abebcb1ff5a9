"""Byte and BPE tokenizers. Both have an additional token, which precedes every document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attnzoo_recipes.files import write_atomically

DOCUMENT = "<|document|>"

_UNCHANGED = "data.tokenizer must be byte-level BPE, which returns every text unchanged"
_SAMPLES = (
    "def f(x):\n    return 'é €'  # ok\n",
    " Upper LOWER  two  spaces\t\r\n\n\n   123,456.78 -- \x00\x1f\x7f",
    "A\u030a \u212b \u1112\u1161\u11ab \ufb01 \u00bd \u200b\ufeff\u3000\U0001f469\u200d\U0001f52c \u0130\u00df",
    # All bytes that UTF-8 has.
    "".join(map(chr, [*range(256), *range(0x100, 0x800, 0x40), 0x800, *range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000])),
    "".join(map(chr, range(0x10000, 0x110000, 0x10000))),
)


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    document_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the document token."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of several texts, one int64 array each."""
        ...

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of token ids, without document tokens; a character may be in parts of several tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without document tokens; broken UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each token, (V,) int64; 0 for the document token."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain types from which `from_dict` makes the same tokenizer."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and the document token."""

    vocab_size = 257
    document_id = 256

    def encode(self, text: str) -> list[int]:
        """One token per byte."""
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One token per byte."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes."""
        return bytes(i for i in ids if i < 256)

    def decode(self, ids: Iterable[int]) -> str:
        """The bytes as text."""
        return self.to_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """One byte per token."""
        return np.array([1] * 256 + [0])

    def to_dict(self) -> dict[str, Any]:
        """It has no settings."""
        return {"kind": "byte"}


class BpeTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) by Hugging Face tokenizers.

    Args:
        serialized: the tokenizer as JSON text of the package tokenizers. It must be byte-level; the document token is
            added if it has none.
        document: spelling of the document token.

    Raises:
        ValueError: if the text is not such a tokenizer, or its tokens are not made of bytes.
    """

    def __init__(self, serialized: str, document: str = DOCUMENT) -> None:
        from tokenizers import Tokenizer

        self.document = document

        try:
            self._tokenizer = Tokenizer.from_str(serialized)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"data.tokenizer is no tokenizer of Hugging Face tokenizers: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if document not in vocabulary and document != DOCUMENT:
            raise ValueError(f"data.document_token must be a token of the tokenizer, got {document!r}")
        if document not in vocabulary and size == len(vocabulary):
            self._tokenizer.add_special_tokens([document])
        # The package numbers an added token by how many there are, so in a vocabulary with gaps it could be another's.
        known = self._tokenizer.token_to_id(document)
        self.document_id: int = size if known is None else known
        self.vocab_size = max(size, self.document_id + 1)
        self._spellings = _spellings(self._tokenizer, self.vocab_size)
        self._spellings[self.document_id] = b""
        if json.loads(self._tokenizer.to_str())["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
            raise ValueError(f"{_UNCHANGED}, got one with a normalizer")
        for token in self._tokenizer.get_added_tokens_decoder().values():
            if token.lstrip or token.rstrip:
                raise ValueError(f"{_UNCHANGED}, got one that strips spaces beside {token.content!r}")
        for sample in _SAMPLES:
            self.encode(sample)

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges; vocab_size includes the 256 bytes and the document token."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < 258:
            raise ValueError(f"data.vocab_size must be at least 258 for BPE, got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids; where a text contains the spelling of the document token, it is encoded as text."""
        parts = text.split(self.document)
        pieces = [parts[0], *(piece for part in parts[1:] for piece in (self.document[:1], self.document[1:] + part))]
        encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return self._checked(text, [i for encoding in encodings for i in encoding.ids])

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode`, on all cores."""
        if any(self.document in text for text in texts):
            return [np.array(self.encode(text), dtype=np.int64) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = (self._checked(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True))
        return [np.array(each, dtype=np.int64) for each in ids]

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        """The ids, or ValueError if they don't spell the text."""
        if b"".join([self._spellings[i] for i in ids]) != text.encode():
            raise ValueError(f"{_UNCHANGED}, got one that changes {text[:40]!r}")
        return ids

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The tokens' spellings."""
        return b"".join([self._spellings[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text."""
        return self.to_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Lengths of the tokens' spellings; 0 where the vocabulary has a gap."""
        return np.array([len(spelling) for spelling in self._spellings], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as text."""
        own = {} if self.document == DOCUMENT else {"document": self.document}
        return {"kind": "bpe", "serialized": self._tokenizer.to_str(), **own}


def letters_of_bytes() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary, that of GPT-2 (Radford et al. 2019).

    Printable bytes are themselves; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _spellings(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of each id: the text of added tokens, and the bytes that the letters of the others stand for."""
    letters = {letter: byte for byte, letter in letters_of_bytes().items()}
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    spellings = [b""] * size
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            spellings[index] = added[index].encode()
        elif all(letter in letters for letter in token):
            spellings[index] = bytes(letters[letter] for letter in token)
        else:
            raise ValueError(f"{_UNCHANGED}, got the token {token!r}, which stands for no bytes")
    return spellings


def from_dict(settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described.

    Raises:
        ValueError: for an unknown kind, or "bpe" without its text.
    """
    if settings.get("kind") == "byte":
        return ByteTokenizer()
    if settings.get("kind") == "bpe" and isinstance(settings.get("serialized"), str):
        document = settings.get("document", DOCUMENT)
        if not isinstance(document, str) or not document:
            raise ValueError(f"tokenizer document must be the spelling of a token, got {document!r}")
        return BpeTokenizer(settings["serialized"], document)
    raise ValueError(f"tokenizer kind must be byte or bpe, with its text, got {settings.get('kind')!r}")


def load_tokenizer(path: Path, document: str | None = None) -> Tokenizer:
    """A byte-level BPE from a tokenizer.json, or what `save_tokenizer` has written.

    Args:
        path: the file, or a folder of token files with it.
        document: spelling of the token that separates documents. Default: `DOCUMENT`, or that of a saved one.

    Raises:
        ValueError: if there is no such file, or it is not such a tokenizer.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"data.tokenizer must be byte, bpe or a tokenizer.json, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        saved = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"data.tokenizer must be UTF-8 text, got {str(path)!r}: {error}") from error
    except (ValueError, RecursionError):
        saved = None
    if isinstance(saved, dict) and "kind" in saved:
        return from_dict(saved if document is None else {**saved, "document": document})
    return BpeTokenizer(text, DOCUMENT if document is None else document)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `to_dict` as JSON."""
    write_atomically(path, json.dumps(tokenizer.to_dict()))
