"""Byte and BPE tokenizers. Both have an additional token, which precedes every document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attnzoo_recipes.files import write_atomically

DOCUMENT = "<|document|>"


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

    def decode(self, ids: Iterable[int]) -> str:
        """The bytes as text."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

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

    Raises:
        ValueError: if the text is not such a tokenizer, or its tokens are not made of bytes.
    """

    def __init__(self, serialized: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(serialized)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"data.tokenizer is no tokenizer of Hugging Face tokenizers: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_special_tokens([DOCUMENT])
        self.document_id: int = self._tokenizer.get_vocab(with_added_tokens=True)[DOCUMENT]
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        sample = "def f(x):\n    return 'é €'  # ok\n"
        if self.decode(self.encode(sample)) != sample:
            raise ValueError("data.tokenizer must be byte-level BPE, which returns every text unchanged")

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
        parts = text.split(DOCUMENT)
        ids: list[int] = self._tokenizer.encode(parts[0], add_special_tokens=False).ids
        for part in parts[1:]:
            for piece in ("<", DOCUMENT[1:] + part):
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode`, on all cores."""
        if any(DOCUMENT in text for text in texts):
            return [np.array(self.encode(text), dtype=np.int64) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text."""
        text: str = self._tokenizer.decode([i for i in ids if i != self.document_id], skip_special_tokens=False)
        return text

    def token_bytes(self) -> np.ndarray:
        """Byte-level tokens are spelled with one character per byte."""
        spelled = self._tokenizer.get_vocab(with_added_tokens=True)
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in spelled.items():
            lengths[index] = 0 if index == self.document_id else len(token)
        return lengths

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as text."""
        return {"kind": "bpe", "serialized": self._tokenizer.to_str()}


def from_dict(settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described.

    Raises:
        ValueError: for an unknown kind.
    """
    if settings.get("kind") == "byte":
        return ByteTokenizer()
    if settings.get("kind") == "bpe":
        return BpeTokenizer(settings["serialized"])
    raise ValueError(f"tokenizer kind must be byte or bpe, got {settings.get('kind')!r}")


def load_tokenizer(path: Path) -> BpeTokenizer:
    """A byte-level BPE from a tokenizer.json.

    Raises:
        ValueError: if there is no such file, or it is not such a tokenizer.
    """
    if not path.is_file():
        raise ValueError(f"data.tokenizer must be byte, bpe or a tokenizer.json, got {str(path)!r}")
    return BpeTokenizer(path.read_text(encoding="utf-8"))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `to_dict` as JSON."""
    write_atomically(path, json.dumps(tokenizer.to_dict()))
