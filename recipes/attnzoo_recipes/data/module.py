"""Text as a LightningDataModule: packed blocks of tokens with the boundaries of their documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.order import EndlessBatches, PaddedBatches
from attnzoo_recipes.data.packing import PackedCorpus, pack
from attnzoo_recipes.data.tokenizers import Tokenizer

IGNORED = -100
"""Target of a token that is not predicted, the default ignore_index of torch.nn.functional.cross_entropy."""

_STAGES = {"train": "training", "val": "validation", "test": "test"}


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of T tokens of one split, each with the same tokens shifted by one as targets.

    Args:
        tokens: all ids of the split.
        block_size: T.
        document_id: the token at the beginning of every document.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, document_id: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.document_id = document_id

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.block_size)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Tokens and targets (B, T) int64, index (B,), cu_seqlens int32; index -1 gives a row without targets."""
        size = self.block_size
        filler = 1 if self.document_id == 0 else 0
        rows = np.full((len(indices), size + 1), filler, dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if index >= 0:
                row[:] = self.tokens[index * size : index * size + size + 1]
        tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        drawn = torch.tensor(indices, dtype=torch.int64)
        targets[drawn < 0] = IGNORED
        return {
            "tokens": tokens,
            "targets": targets,
            "cu_seqlens": boundaries(tokens, self.document_id),
            "index": drawn,
        }


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
    padding; attention stays within a document.

    Args:
        source: "stdlib" (the source text of the running Python's standard library), "text", "json", "parquet" or "hub".
        files: paths or glob patterns, for text, json and parquet.
        name: dataset of the Hugging Face hub, for hub; it is streamed.
        subset: its configuration.
        hub_split: its split.
        text_field: the field with the text, for json, parquet and hub.
        unit: what counts as a document in a text file: the whole "document", a "paragraph" or a "line".
        max_documents: largest number of documents to read.
        tokenizer: "byte", "bpe" (trained on the training documents) or the path of a byte-level tokenizer.json.
        vocab_size: of "bpe".
        block_size: tokens T of a sample.
        batch_size: samples of a step (before gradient accumulation) over all devices, whose number must divide it.
        val_fraction: share of documents for validation, chosen by their hash.
        test_fraction: share of documents for testing.
        seed: of the order.
        num_workers: processes that read; reading is cheap, so 0 is usually best.
        cache_dir: folder for the token files.

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
        text_field: str = "text",
        unit: str = "document",
        max_documents: int | None = None,
        tokenizer: str = "byte",
        vocab_size: int = 4096,
        block_size: int = 256,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str = "runs/data",
    ) -> None:
        super().__init__()
        self.corpus = Corpus(source, tuple(files or ()), name, subset, hub_split, text_field, unit, max_documents)
        for argument, value, least in (("block_size", block_size, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"data.{argument} must be at least {least}, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, got {num_workers}")
        if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ValueError(
                "data.val_fraction must be positive and leave, with data.test_fraction, something to train on, "
                f"got {val_fraction} and {test_fraction}"
            )
        self.tokenizer_name = tokenizer
        self.bpe_vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir)
        self._packed: PackedCorpus | None = None
        self._restored: dict[str, Any] | None = None
        self._drawn_before = 0
        self._batches_before = 0

    # files

    @property
    def packed(self) -> PackedCorpus:
        """The token files, created by the first access."""
        if self._packed is None:
            self._packed = pack(
                self.corpus,
                self.tokenizer_name,
                self.bpe_vocab_size,
                self.val_fraction,
                self.test_fraction,
                self.cache_dir,
            )
        return self._packed

    @property
    def tokenizer(self) -> Tokenizer:
        """Converts text to ids and back."""
        return self.packed.tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of every token, (V,) int64."""
        return torch.from_numpy(self.tokenizer.token_bytes())

    def prepare_data(self) -> None:
        """Create the token files, in one process."""
        _ = self.packed

    def setup(self, stage: str) -> None:
        """Check that the splits of this stage fill a block.

        Raises:
            ValueError: if one does not, or if the number of devices does not divide data.batch_size.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in splits:
            counts = self.packed.meta["splits"][split]
            if len(self.blocks(split)) == 0:
                raise ValueError(
                    f"the {_STAGES[split]} split must hold more than data.block_size = {self.block_size} tokens, got "
                    f"{counts['tokens']} in {counts['documents']} of the corpus's documents: give more text, a larger "
                    f"share, or smaller documents with data.unit"
                )
        _, world_size = self._place()
        if self.batch_size % world_size:
            raise ValueError(
                "data.batch_size counts the samples of all devices, so their number must divide it, "
                f"got {self.batch_size} and {world_size}"
            )

    def blocks(self, split: str) -> Blocks:
        """The samples of a split."""
        return Blocks(self.packed.tokens(split), self.block_size, self.tokenizer.document_id)

    # loaders

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches, continuing where a restored checkpoint stopped."""
        if self._restored is not None:
            self._drawn_before = self._restored["samples"]
        self._batches_before = self._batches_seen()
        blocks = self.blocks("train")
        sampler = EndlessBatches(len(blocks), self.batch_size, self.seed, self._drawn_before, *self._place())
        return self._loader(blocks, sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The validation split once, in order."""
        return self._once("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test split once, in order."""
        return self._once("test")

    def _once(self, split: str) -> DataLoader[dict[str, Tensor]]:
        blocks = self.blocks(split)
        return self._loader(blocks, PaddedBatches(len(blocks), self.batch_size, *self._place()))

    def _loader(self, blocks: Blocks, sampler: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            blocks,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _batches_seen(self) -> int:
        """Batches that training has finished, which the trainer counts and restores."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    # state

    def state_dict(self) -> dict[str, Any]:
        """The number of samples drawn so far, and what identifies the data."""
        drawn = self._drawn_before + (self._batches_seen() - self._batches_before) * self.batch_size
        return {"samples": drawn, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many samples; other data are accepted for validation and testing.

        Raises:
            ValueError: in fitting, if the data differ from those of the checkpoint.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"the checkpoint was trained on other data: {name} was {state_dict[name]}, now {value}; give the "
                    f"same data settings, or start without it"
                )
        self._restored = state_dict

    def _identity(self) -> dict[str, Any]:
        return {"corpus": self.packed.folder.name, "block_size": self.block_size, "seed": self.seed}
