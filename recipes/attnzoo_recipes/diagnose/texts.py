"""Text files as a model's input, by its own tokenizer, and the losses that pruning is judged by."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo_recipes.diagnose.load_model import LoadedModel
from attnzoo_recipes.lm import DecoderLM

RETRIEVAL_SCALE = 20.0
"""Logits of `retrieval_losses` are cosines times this."""

_CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class Reader:
    """How a model reads text.

    Attributes:
        encode: ids of a text, without special tokens.
        before: ids that begin every sequence.
        after: ids that end it.
        padding: id that fills up shorter sequences.
        longest: most tokens of a sequence, or None.
    """

    encode: Callable[[str], list[int]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    padding: int = 0
    longest: int | None = None


def reader(loaded: LoadedModel) -> Reader:
    """The reader of a model by the tokenizer that its checkpoint or folder holds.

    Sequences of an attnzoo checkpoint begin with its document token; those of a Hugging Face model have the special
    tokens that its tokenizer puts around one text.

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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be loaded: {error}") from error
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
        ValueError: naming the argument, if there is no such file or it is no UTF-8 text, or blank.
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
    name: str, path: Path, read: Reader, length: int, count: int | None, *, most: int = 16, least: int = 1
) -> Tensor:
    """The text's beginning as token ids (N, T), one sequence after the other; what does not fill the last is left out.

    Args:
        name: what messages call the file.
        path: of the text.
        read: as `reader` gives it.
        length: T, special tokens included.
        count: sequences N; the text must hold so many. Default: `most`, or fewer where the text is shorter.
        most: see count.
        least: sequences that there must be.

    Raises:
        ValueError: for a file that cannot be read, a length that the model does not take, or too short a text.
    """
    room = _room(read, length)
    for argument, value in (("sequences", count), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    wanted = most if count is None else count
    ids = _first_tokens(read.encode, read_text(name, path), wanted * room)
    found = min(len(ids) // room, wanted)
    if found < (least if count is None else count):
        need = least if count is None else count
        raise ValueError(
            f"{name} must fill {need} sequence{'s' if need > 1 else ''} of {length} tokens, got {len(ids)} tokens, "
            f"which fill {found}: give a longer text, or a smaller --length"
        )
    rows = [[*read.before, *ids[i * room : (i + 1) * room], *read.after] for i in range(found)]
    return torch.tensor(rows)


@dataclass(frozen=True)
class PairBatch:
    """Queries and documents that belong together in order: ids (B, T) and which tokens are real (B, T)."""

    queries: tuple[Tensor, Tensor]
    documents: tuple[Tensor, Tensor]


def pair_batches(
    name: str, path: Path, read: Reader, length: int, count: int | None, batch_size: int
) -> list[PairBatch]:
    """Pairs of texts, lines of JSON {"query": ..., "document": ...}, in batches of nearly equal sizes.

    Longer texts are cut off at `length` tokens.

    Raises:
        ValueError: for a line that is no pair, or too few of them: two at least, and `count` if given.
    """
    room = _room(read, length)
    found: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(name, path).splitlines(), start=1):
        if line.strip() and (count is None or len(found) < count):
            found.append(_pair(name, number, line))
    least = 2 if count is None else max(count, 2)
    if len(found) < least:
        raise ValueError(f"{name} must hold at least {least} pairs, got {len(found)}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 for pairs, which are told apart, got {batch_size}")
    batches = []
    for rows in torch.arange(len(found)).tensor_split(-(-len(found) // batch_size)):
        sides = zip(*(found[int(row)] for row in rows), strict=True)
        batches.append(PairBatch(*(_padded([read.encode(text)[:room] for text in side], read) for side in sides)))
    return batches


def refuse_pairs(name: str, path: Path) -> None:
    """Refuse a file of pairs where a text is wanted.

    Raises:
        ValueError: naming the argument, if the first line is a pair, or as `read_text`.
    """
    first = read_text(name, path).lstrip().partition("\n")[0]
    try:
        _pair(name, 1, first)
    except ValueError:
        return
    raise ValueError(f"{name} must be a text for a model that predicts tokens, got lines of pairs in {str(path)!r}")


# Losses


def next_token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence's tokens after its first, in nats: tokens (B, T) -> (B,)."""
    logits = logits_of(model, tokens)[:, :-1].float()
    nats: Tensor = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return nats.view(len(tokens), -1).mean(1)


def retrieval_losses(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own document among the batch's, and whether it comes first: (B,) each.

    Embeddings are means of the last hidden states over real tokens, of unit length; logits are `RETRIEVAL_SCALE`
    times their cosines. Losses are coupled: all documents of a batch enter each.
    """
    queries, documents = (embeddings(model, *side) for side in (batch.queries, batch.documents))
    logits = RETRIEVAL_SCALE * queries @ documents.mT
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own, reduction="none"), (logits.argmax(1) == own).double()


def embeddings(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """Mean hidden states over real tokens, of unit length: ids and real (B, T) -> (B, E)."""
    hidden: Tensor = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    weight = real[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def predicts_tokens(loaded: LoadedModel) -> bool:
    """Whether the model is a causal language model."""
    if isinstance(loaded.model, DecoderLM):
        return True
    architectures = getattr(getattr(loaded.model, "config", None), "architectures", None) or ()
    return type(loaded.model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and any(architectures)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens (B, T)."""
    if isinstance(model, DecoderLM):
        return model(tokens)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def decode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, V) after tokens (B, n) that are read one at a time through a cache."""
    logits: Tensor | None = None
    if isinstance(model, DecoderLM):
        caches = model.init_caches(*tokens.shape)
        for step in tokens.split(1, dim=1):
            logits = model(step, caches=caches)
    else:
        cache: Any = None
        for step in tokens.split(1, dim=1):
            found: Any = model(input_ids=step, past_key_values=cache, use_cache=True)
            logits, cache = found.logits, found.past_key_values
    assert logits is not None
    return logits[:, -1]


# Reading


def _room(read: Reader, length: int) -> int:
    special = len(read.before) + len(read.after)
    if length < special + 2:
        raise ValueError(f"length must be at least {special + 2}, got {length}")
    if read.longest is not None and length > read.longest:
        raise ValueError(f"length must not exceed the model's {read.longest} positions, got {length}")
    return length - special


def _first_tokens(encode: Callable[[str], list[int]], text: str, wanted: int) -> list[int]:
    """At least so many tokens if the text has them, without reading far beyond."""
    end = _CHARACTERS_A_TOKEN * wanted
    while True:
        ids = encode(text[:end])
        if len(ids) > wanted or end >= len(text):
            return ids
        end *= 4


def _pair(name: str, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
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
