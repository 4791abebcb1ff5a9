"""Text files as a model's input, read by its own tokenizer: sequences of one text, and pairs of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo_recipes.diagnose.load_model import LoadedModel, own_code

_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Reader:
    """How a model reads text.

    Attributes:
        encode: gives the ids of a text, without special tokens.
        before: ids at the beginning of every sequence.
        after: ids at its end.
        padding: id that shorter sequences are padded with.
        longest: largest number of tokens in a sequence, or None.
    """

    encode: Callable[[str], list[int]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0
    longest: int | None = None


def reader(loaded: LoadedModel) -> Reader:
    """How a model reads text, according to the tokenizer in its checkpoint or folder.

    Sequences for an attnzoo checkpoint begin with its document token; those for a Hugging Face model have the special
    tokens that its tokenizer puts around a single text.

    Raises:
        ValueError: for weights without a tokenizer.
    """
    if loaded.kind == "attnzoo" and loaded.tokenizer is not None:
        return Reader(loaded.tokenizer.encode, before=(loaded.tokenizer.document_id,))
    if loaded.kind != "huggingface":
        raise ValueError(
            f"MODEL must have a tokenizer to read text, got {str(loaded.path)!r}: give a checkpoint of "
            "attnzoo-pretrain or a Hugging Face folder with its tokenizer"
        )
    from transformers import AutoTokenizer

    folder = loaded.path if loaded.path.is_dir() else loaded.path.parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
    except Exception as error:  # what transformers raises for files that it cannot read is not documented
        reason = own_code(folder, "tokenizer_config.json") or error
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be loaded: {reason}") from error
    if not plain:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} must make tokens of text, got none of 'a': is it all there?"
        )
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    config: Any = loaded.model.config

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return Reader(
        encode, tuple(whole[:start]), tuple(whole[start + len(plain) :]),
        padding=tokenizer.pad_token_id or 0, longest=getattr(config, "max_position_embeddings", None),
    )  # fmt: skip


def read_text(name: str, path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: naming the argument, if there is no such file, or it is not UTF-8 text, or it is blank.
    """
    if not path.is_file():
        raise ValueError(f"{name} must be a file, got {str(path)!r}, which is none")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got {str(path)!r}: {error}") from None
    if not text.strip():
        raise ValueError(f"{name} must hold text, got {str(path)!r}, which is blank")
    return text


def sequences(
    name: str,
    path: Path,
    read: Reader,
    length: int,
    count: int | None,
    *,
    most: int = 16,
    least: int = 1,
    option: str = "length",
    counted: str = "sequences",
) -> Tensor:
    """The beginning of a text as token ids (N, T), in consecutive sequences; an incomplete last one is dropped.

    Args:
        name: what messages call the file.
        path: of the text.
        read: from `reader`.
        length: T, including special tokens.
        count: number N of sequences, which the text must fill. Default: `most`, or fewer if the text is shorter.
        most: see count.
        least: smallest number of sequences if count is None.
        option: what messages call the length, with dashes before it.
        counted: what messages call the count.

    Raises:
        ValueError: for a file that cannot be read, a length that the model does not take, or a text that is too short.
    """
    capacity = _capacity(read, length, option)
    for argument, value in ((counted, count), (option, length)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    wanted = most if count is None else count
    ids = _first_tokens(read.encode, read_text(name, path), wanted * capacity)
    filled = min(len(ids) // capacity, wanted)
    needed = least if count is None else count
    if filled < needed:
        raise ValueError(
            f"{name} must fill {needed} sequence{'s' if needed > 1 else ''} of {length} tokens, got {len(ids)} tokens, "
            f"which fill {filled}: give a longer text, or a smaller --{option}"
        )
    rows = [[*read.before, *ids[i * capacity : (i + 1) * capacity], *read.after] for i in range(filled)]
    return torch.tensor(rows)


@dataclass(frozen=True)
class PairBatch:
    """Queries and their documents, in the same order: ids (B, T) and which tokens are not padding (B, T)."""

    queries: tuple[Tensor, Tensor]
    documents: tuple[Tensor, Tensor]


def pair_batches(
    name: str, path: Path, read: Reader, length: int, count: int | None, batch_size: int
) -> list[PairBatch]:
    """Pairs of texts from lines of JSON {"query": ..., "document": ...}, in batches of nearly equal sizes.

    Texts are truncated to `length` tokens.

    Raises:
        ValueError: for a line that is not a pair, or too few of them: at least two are needed, and `count` if given.
    """
    capacity = _capacity(read, length)
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(name, path).splitlines(), start=1):
        if line.strip() and (count is None or len(pairs) < count):
            pairs.append(_pair(name, number, line))
    least = 2 if count is None else max(count, 2)
    if len(pairs) < least:
        raise ValueError(f"{name} must hold at least {least} pairs, got {len(pairs)}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 for pairs, which are told apart, got {batch_size}")
    batches = []
    for rows in torch.arange(len(pairs)).tensor_split(-(-len(pairs) // batch_size)):
        sides = zip(*(pairs[int(row)] for row in rows), strict=True)
        batches.append(PairBatch(*(_padded([read.encode(text)[:capacity] for text in side], read) for side in sides)))
    return batches


def refuse_pairs(name: str, path: Path) -> None:
    """Raise if a file contains pairs instead of a text.

    Raises:
        ValueError: naming the argument, if the first line is a pair, and in the cases of `read_text`.
    """
    first = read_text(name, path).lstrip().partition("\n")[0]
    try:
        _pair(name, 1, first)
    except ValueError:
        return
    raise ValueError(f"{name} must be a text for a model that predicts tokens, got lines of pairs in {str(path)!r}")


def _capacity(read: Reader, length: int, option: str = "length") -> int:
    """Tokens of text in a sequence of that length."""
    special = len(read.before) + len(read.after)
    if length < special + 2:
        raise ValueError(f"{option} must be at least {special + 2}, got {length}")
    if read.longest is not None and length > read.longest:
        raise ValueError(f"{option} must not exceed the model's {read.longest} positions, got {length}")
    return length - special


def _first_tokens(encode: Callable[[str], list[int]], text: str, wanted: int) -> list[int]:
    """At least `wanted` tokens if the text has as many, without encoding much more of it."""
    end = _CHARACTERS_PER_TOKEN * wanted
    while True:
        ids = encode(text[:end])
        if len(ids) > wanted or end >= len(text):
            return ids
        end *= 4


def _pair(name: str, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    texts = (row.get("query"), row.get("document")) if isinstance(row, dict) else (None, None)
    query, document = texts
    if not isinstance(query, str) or not isinstance(document, str) or not query.strip() or not document.strip():
        raise ValueError(
            f'{name} must hold lines {{"query": "...", "document": "..."}} for a model that predicts no tokens, got '
            f"{line[:40]!r} in line {number}"
        )
    return query, document


def _padded(rows: Sequence[list[int]], read: Reader) -> tuple[Tensor, Tensor]:
    whole = [torch.tensor([*read.before, *row, *read.after]) for row in rows]
    lengths = torch.tensor([len(row) for row in whole])
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=read.padding)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
