"""Text as a LightningDataModule: packed blocks of tokens with the boundaries of their documents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.order import EndlessBatches, MixedBatches, PaddedBatches, shares
from attnzoo_recipes.data.packing import PackedCorpus, open_tokens, pack
from attnzoo_recipes.data.tokenizers import Tokenizer
from attnzoo_recipes.losses import IGNORED as IGNORED

_STAGES = {"train": "training", "val": "validation", "test": "test"}
_BEFORE = {"windows": "blocks", "mixture": []}  # what checkpoints had that do not say it
_SET_NAME = re.compile(r"[A-Za-z]\w*")
FIRST = "main"
"""Name of `source` in a mixture."""
MAIN = ""
"""Name of the validation set that val_loss and val_bits_per_byte are of."""


class Blocks(Dataset[dict[str, Tensor]]):
    """Windows of T tokens, each with the same tokens shifted by one as targets.

    Args:
        tokens: all ids of the split.
        block_size: T.
        document_id: the token at the beginning of every document.
        stride: tokens between the beginnings of two windows. Default: T, so that every token is in one window.
        crossing: whether attention may cross documents, so that their boundaries are not given.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        document_id: int,
        stride: int | None = None,
        crossing: bool = False,
    ) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.document_id = document_id
        self.stride = stride or block_size
        self.crossing = crossing

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1 - self.block_size) // self.stride + 1)

    def window(self, index: int) -> np.ndarray:
        """The T + 1 tokens of a window and its targets."""
        first = index * self.stride
        return self.tokens[first : first + self.block_size + 1]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Tokens and targets (B, T) int64, and index (B,); index -1 gives a row without targets.

        If a document begins inside a row, also cu_seqlens int32. Without, attention is plainly causal, which is faster.
        """
        size = self.block_size
        filler = 1 if self.document_id == 0 else 0
        rows = np.full((len(indices), size + 1), filler, dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if index >= 0:
                row[:] = self.window(index)
        tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        drawn = torch.tensor(indices, dtype=torch.int64)
        targets[drawn < 0] = IGNORED
        batch = {"tokens": tokens, "targets": targets, "index": drawn}
        if not self.crossing:
            found = boundaries(tokens, self.document_id)
            if len(found) > len(tokens) + 1:
                batch["cu_seqlens"] = found
        return batch


class MixedBlocks(Blocks):
    """Windows of several sources with the same tokenizer, numbered through all of them."""

    def __init__(self, sources: list[Blocks]) -> None:
        first = sources[0]
        super().__init__(first.tokens, first.block_size, first.document_id, first.stride, first.crossing)
        self.sources = sources
        self.offsets = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def window(self, index: int) -> np.ndarray:
        """The T + 1 tokens of a window and its targets."""
        source = int(np.searchsorted(self.offsets, index, side="right"))
        return self.sources[source].window(index - int(self.offsets[source]) + len(self.sources[source]))


def data_place(trainer: L.Trainer | None) -> tuple[int, int]:
    """(number of this process, number) among those that batches are divided over: not all where some share a batch."""
    if trainer is None:
        return 0, 1
    place = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None)
    return (trainer.global_rank, trainer.world_size) if place is None else (place["rank"], place["num_replicas"])


def check_endless(limit_train_batches: float | None, overfit_batches: float) -> None:
    """Raise ValueError for settings of a trainer that cut the training data, which have no end, into epochs."""
    for name, value, whole in (
        ("limit_train_batches", limit_train_batches, (None, 1.0)),
        ("overfit_batches", overfit_batches, (0,)),
    ):
        if value not in whole or (name == "limit_train_batches" and isinstance(value, int)):
            raise ValueError(
                f"trainer.{name} must be left out, since the training data have no end and no epochs, got {value}; "
                "trainer.max_steps is the length of a run, and data.max_documents that of the text"
            )


def boundaries(tokens: Tensor, document_id: int) -> Tensor:
    """cu_seqlens of `AttentionMask.packed`: where a row or a document begins among the B T tokens, and B T; int32."""
    begins = tokens == document_id
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).int()


def _as_is(batch: Any) -> Any:
    """Collate nothing: `Blocks.__getitems__` returns whole batches."""
    return batch


class TextDataModule(L.LightningDataModule):
    """Text, tokenised once into a memory-mapped file and read endlessly in pseudo-random order.

    The order of training samples is a function of `seed` and the number of samples drawn, so that a checkpoint needs
    only that number, and neither workers nor the number of devices change the order. Documents are packed without
    padding; attention stays within a document unless cross_documents is set.

    Args:
        source: "stdlib" (the source text of the running Python's standard library), "text", "json", "parquet", "hub",
            or "tokens" (ready token files, see `packing.open_tokens`; files is then one folder or .bin file).
        files: paths or glob patterns, for text, json, parquet and tokens.
        name: dataset of the Hugging Face hub, for hub; it is streamed.
        subset: its configuration.
        hub_split: its split.
        revision: its commit, tag or branch. Default: the newest commit.
        text_field: the field with the text, for json, parquet and hub.
        unit: what counts as a document in a text file: the whole "document", a "paragraph" or a "line".
        max_documents: largest number of documents to read.
        mixture: further sources to train on by name, each with its weight and the settings of a source (source, files,
            name, subset, hub_split, revision, text_field, unit, max_documents), in the tokens of `source`. Of each,
            val_fraction and test_fraction are left out; what is for validation is a validation set of its name.
        weight: of `source` in a mixture; weights are shares of the training tokens, relative to their sum.
        tokenizer: "byte", "bpe" (trained on the training documents), the path of a byte-level tokenizer.json, or the
            file or folder of a tokenizer that this recipe has trained.
        document_token: spelling of the token between documents, in a tokenizer.json that has one.
        vocab_size: of "bpe".
        block_size: tokens T of a sample.
        batch_size: samples of a step (before gradient accumulation) over all devices, whose number must divide it.
        windows: "blocks" (each pass reads every token once, in blocks of T) or "random" (windows of T tokens that begin
            anywhere).
        cross_documents: whether attention and positions continue across documents.
        val_fraction: share of documents for validation, chosen by their hash; not used with val_source.
        test_fraction: share of documents for testing.
        val_source: source of validation text of its own; all documents of `source` are then for training and testing.
        val_files: its paths or glob patterns.
        val_sets: further validation sets by name, each with the settings of a source (source, files, name, subset,
            hub_split, revision, text_field, unit, max_documents); logged as val_NAME_loss and val_NAME_bits_per_byte.
        val_tokens: largest number of tokens of each validation set. Default: all.
        seed: of the order.
        num_workers: processes that read; reading is cheap, so 0 is usually best.
        cache_dir: folder for the token files.
        num_proc: processes that tokenise, besides the one that reads; the token files do not depend on it.

    Raises:
        ValueError: for an argument outside its rule; in `setup`, if the text does not fill a block.
    """

    def __init__(
        self,
        *,
        source: str = "stdlib",
        files: list[str] | None = None,
        name: str | None = None,
        subset: str | None = None,
        hub_split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
        unit: str = "document",
        max_documents: int | None = None,
        mixture: dict[str, dict[str, Any]] | None = None,
        weight: float = 1.0,
        tokenizer: str = "byte",
        document_token: str | None = None,
        vocab_size: int = 4096,
        block_size: int = 256,
        batch_size: int = 32,
        windows: str = "blocks",
        cross_documents: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        val_source: str | None = None,
        val_files: list[str] | None = None,
        val_sets: dict[str, dict[str, Any]] | None = None,
        val_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str = "runs/data",
        num_proc: int = 1,
    ) -> None:
        super().__init__()
        self.corpus = Corpus(
            source, tuple(files or ()), name, subset, hub_split, text_field, unit, max_documents, revision
        )
        for argument, value, least in (
            ("block_size", block_size, 2),
            ("batch_size", batch_size, 1),
            ("num_proc", num_proc, 1),
            ("val_tokens", block_size + 1 if val_tokens is None else val_tokens, block_size + 1),
        ):
            if value < least:
                raise ValueError(f"data.{argument} must be at least {least}, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, got {num_workers}")
        if windows not in ("blocks", "random"):
            raise ValueError(f"data.windows must be blocks or random, got {windows!r}")
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ValueError(
                "data.val_fraction must be positive and leave, with data.test_fraction, something to train on, "
                f"got {val_fraction} and {test_fraction}"
            )
        if val_files and val_source is None:
            raise ValueError(f"data.val_source must be given with data.val_files, got {val_files} alone")
        self.evaluated: dict[str, Corpus] = {}
        if val_source is not None:
            own = {"unit": unit, "text_field": text_field} if val_source != "tokens" else {}
            self.evaluated[MAIN] = _corpus("data.val_", {"source": val_source, "files": val_files or [], **own})
        for set_name, settings in (val_sets or {}).items():
            if not _SET_NAME.fullmatch(set_name):
                raise ValueError(f"data.val_sets must have names of letters, digits and _, got {set_name!r}")
            self.evaluated[set_name] = _corpus(f"data.val_sets.{set_name}.", settings)
        self.weights = {FIRST: weight}
        self.mixture: dict[str, Corpus] = {}
        for source_name, settings in (mixture or {}).items():
            label = f"data.mixture.{source_name}."
            if not _SET_NAME.fullmatch(source_name) or source_name in (FIRST, *self.evaluated):
                raise ValueError(
                    "data.mixture must have names of letters, digits and _, other than main and those of "
                    f"data.val_sets, got {source_name!r}"
                )
            if "weight" not in settings:
                raise ValueError(f"{label}weight must be given, got settings of {', '.join(settings) or 'nothing'}")
            self.weights[source_name] = settings["weight"]
            self.mixture[source_name] = _corpus(label, {k: v for k, v in settings.items() if k != "weight"})
        for source_name, share in self.weights.items():
            if not (isinstance(share, int | float) and 0 < share < math.inf):
                label = "data." if source_name == FIRST else f"data.mixture.{source_name}."
                raise ValueError(f"{label}weight must be a positive number, got {share!r}")
        if weight != 1 and not mixture:
            raise ValueError(f"data.weight must be given with data.mixture alone, got {weight}")
        self.tokenizer_name = tokenizer
        self.document_token = document_token
        self.bpe_vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.windows = windows
        self.cross_documents = cross_documents
        self.val_fraction = 0.0 if val_source is not None else val_fraction
        self.test_fraction = test_fraction
        self.val_tokens = val_tokens
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir)
        self.num_proc = num_proc
        self._packed: PackedCorpus | None = None
        self._mixed: dict[str, PackedCorpus] = {}
        self._evaluated: dict[str, PackedCorpus] = {}
        self._mixed_order: MixedBatches | None = None
        self._restored: dict[str, Any] | None = None
        self._drawn_by: Any = None
        self._drawn_before = 0
        self._batches_before = 0

    # files

    @property
    def packed(self) -> PackedCorpus:
        """The token files, created by the first access."""
        if self._packed is None:
            fractions = self.val_fraction, self.test_fraction
            if self.corpus.source == "tokens":
                path = Path(self.corpus.files[0])
                self._packed = open_tokens(path, self.tokenizer_name, self.document_token, fractions)
            else:
                self._packed = pack(
                    self.corpus,
                    self.tokenizer_name,
                    self.bpe_vocab_size,
                    *fractions,
                    self.cache_dir,
                    self.document_token,
                    self.num_proc,
                )
        return self._packed

    @property
    def validation(self) -> dict[str, tuple[PackedCorpus, str]]:
        """Token files and split of every validation set, by name; the first is `MAIN`."""
        found = {MAIN: (self.packed, "val")}
        for name, corpus in self.evaluated.items():
            if name not in self._evaluated:
                self._evaluated[name] = self._packed_alike(corpus, (1.0, 0.0))
            packed = self._evaluated[name]
            found[name] = packed, "val" if packed.meta["splits"]["val"]["tokens"] else "train"
        if self.val_fraction:
            found |= {name: (packed, "val") for name, packed in self.sources.items() if name != FIRST}
        return found

    @property
    def sources(self) -> dict[str, PackedCorpus]:
        """Token files of every source of training text, by name; the first is `FIRST`."""
        for name, corpus in self.mixture.items():
            if name not in self._mixed:
                self._mixed[name] = self._packed_alike(corpus, (self.val_fraction, self.test_fraction))
        return {FIRST: self.packed, **self._mixed}

    @property
    def key(self) -> str:
        """Identifies the training text: that of `packed`, or of a mixture and its weights."""
        if not self.mixture:
            return self.packed.key
        return hashlib.sha256(json.dumps(self._mixture_identity()).encode()).hexdigest()[:16]

    def _packed_alike(self, corpus: Corpus, fractions: tuple[float, float]) -> PackedCorpus:
        """Another corpus in the tokens of the training text; ready tokens for evaluation are one split."""
        tokenizer = self.tokenizer
        if corpus.source != "tokens":
            return pack(corpus, tokenizer, 0, *fractions, self.cache_dir, num_proc=self.num_proc)
        cut = (0.0, 0.0) if fractions[0] == 1.0 else fractions
        packed = open_tokens(Path(corpus.files[0]), self.tokenizer_name, self.document_token, cut)
        if packed.tokenizer.to_dict() != tokenizer.to_dict():
            raise ValueError(
                f"{corpus.label}files must hold tokens of the training text's tokenizer, got another's in "
                f"{corpus.files[0]}"
            )
        return packed

    @property
    def tokenizer(self) -> Tokenizer:
        """Converts text to ids and back."""
        return self.packed.tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of every token, (V,) int64."""
        return torch.from_numpy(self.tokenizer.token_bytes())

    def prepare_data(self) -> None:
        """Create and check the token files, in one process."""
        _ = self.sources, self.validation

    def setup(self, stage: str) -> None:
        """Check that the splits of this stage fill a block.

        Raises:
            ValueError: if one does not, or if the number of devices does not divide data.batch_size.
        """
        if self.trainer is not None and self.trainer.world_size > 1:
            # The first process has read and hashed every file in prepare_data; the others take its word.
            made = (self.packed, self._mixed, self._evaluated) if self.trainer.global_rank == 0 else None
            received: Any = self.trainer.strategy.broadcast(made)
            self._packed, self._mixed, self._evaluated = received
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            for name, (packed, part) in self._parts(split).items():
                counts = packed.meta["splits"][part]
                if len(self._windows(packed, part)) == 0:
                    which = f"validation set {name}" if name and split == "val" else f"{_STAGES[split]} split"
                    which += f" of {name}" if name and split == "train" else ""
                    raise ValueError(
                        f"the {which} must hold more than data.block_size = {self.block_size} tokens, got "
                        f"{counts['tokens']} in {counts['documents']} of the corpus's documents: give more text, a "
                        f"larger share, or smaller documents with data.unit"
                    )
        _, divided = data_place(self.trainer)
        if self.batch_size % divided:
            raise ValueError(
                "data.batch_size counts the samples of all devices, so the number of those that batches are divided "
                f"over must divide it, got {self.batch_size} and {divided}"
            )

    def _parts(self, split: str) -> dict[str, tuple[PackedCorpus, str]]:
        """What a split consists of, by name."""
        if split == "val":
            return self.validation
        if split == "train" and self.mixture:
            return {name: (packed, split) for name, packed in self.sources.items()}
        return {MAIN: (self.packed, split)}

    def blocks(self, split: str) -> Blocks:
        """The samples of a split; for validation, those of the main set, for training those of all sources."""
        if split == "train" and self.mixture:
            return MixedBlocks([self._windows(*part, training=True) for part in self._parts(split).values()])
        return self._windows(*self._parts(split)[MAIN], training=split == "train")

    def _windows(self, packed: PackedCorpus, split: str, training: bool = False) -> Blocks:
        tokens = packed.tokens(split)
        if not training and split != "test" and self.val_tokens is not None:
            tokens = tokens[: self.val_tokens]
        stride = 1 if training and self.windows == "random" else None
        return Blocks(tokens, self.block_size, packed.tokenizer.document_id, stride, self.cross_documents)

    # loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches, continuing where a restored checkpoint, or an earlier fit of the same trainer, stopped.

        Raises:
            ValueError: if the trainer limits them, which would make every epoch begin with the same ones.
        """
        trainer: Any = self.trainer
        if trainer is not None and not trainer.fast_dev_run:
            check_endless(trainer.limit_train_batches, trainer.overfit_batches)
        if self._restored is not None:
            self._drawn_before, self._restored = self._restored["samples"], None
        else:  # another fit of the same trainer continues
            self._drawn_before = self.samples_drawn if trainer is self._drawn_by else 0
        self._batches_before, self._drawn_by = self._batches_seen(), trainer
        blocks = self.blocks("train")
        return self._loader(blocks, self._order(blocks))

    def _order(self, blocks: Blocks) -> EndlessBatches:
        """The order of training samples, from the next one on."""
        place = self.batch_size, self.seed, self._drawn_before, *data_place(self.trainer)
        if not isinstance(blocks, MixedBlocks):
            return EndlessBatches(len(blocks), *place)
        sizes = [len(source) for source in blocks.sources]
        self._mixed_order = MixedBatches(sizes, list(self.weights.values()), *place)
        return self._mixed_order

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Every validation set once, in order."""
        return [self._once(self._windows(*source)) for source in self.validation.values()]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test split once, in order."""
        return self._once(self.blocks("test"))

    def _once(self, blocks: Blocks) -> DataLoader[dict[str, Tensor]]:
        return self._loader(blocks, PaddedBatches(len(blocks), self.batch_size, *data_place(self.trainer)))

    def _loader(self, blocks: Blocks, sampler: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            blocks,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _batches_seen(self) -> int:
        """Batches that training has finished, which the trainer counts and restores."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    # state

    @property
    def samples_drawn(self) -> int:
        """Samples over all processes since the beginning of the run, earlier parts of a resumed one included."""
        return self._drawn_before + (self._batches_seen() - self._batches_before) * self.batch_size

    @property
    def tokens_drawn(self) -> dict[str, int]:
        """Tokens of each source of a mixture among `samples_drawn`; empty without a mixture."""
        if self._mixed_order is None:
            return {}
        counts = self._mixed_order.counts(self.samples_drawn)
        return {name: count * self.block_size for name, count in zip(self.weights, counts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The number of samples drawn so far, and what identifies the data."""
        return {"samples": self.samples_drawn, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many samples; other data are accepted for validation and testing.

        Raises:
            ValueError: in fitting, if the data differ from those of the checkpoint.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, value in self._identity().items():
            before = state_dict.get(name, _BEFORE.get(name))
            if before != value:
                raise ValueError(
                    f"the checkpoint was trained on other data: {name} was {before}, now {value}; give the "
                    f"same data settings, or start without it"
                )
        self._restored = state_dict

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.packed.key, "block_size": self.block_size, "seed": self.seed, "windows": self.windows,
            "mixture": self._mixture_identity(),
        }  # fmt: skip

    def _mixture_identity(self) -> list[list[Any]]:
        """Key and share of each source."""
        if not self.mixture:
            return []
        keys = [packed.key for packed in self.sources.values()]
        return [list(pair) for pair in zip(keys, shares(list(self.weights.values())), strict=True)]


def _corpus(label: str, settings: Mapping[str, Any]) -> Corpus:
    """The corpus of settings as a YAML has them.

    Raises:
        ValueError: for a setting that a corpus does not have, or whose value does not fit.
    """
    known = [field.name for field in dataclasses.fields(Corpus) if field.name != "label"]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{label[:-1]} must hold settings among {', '.join(known)}, got {unknown[0]!r}")
    files = settings.get("files") or ()
    files = (files,) if isinstance(files, str) else files
    return Corpus(**{**settings, "files": tuple(str(file) for file in files), "label": label})
