"""The text as a LightningDataModule: packed blocks of tokens with the boundaries of their documents."""

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
"""Target of a token that is not predicted, as torch.nn.functional.cross_entropy has it."""

_STAGES = {"train": "training", "val": "validation", "test": "test"}


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of T tokens of one split, each with the T tokens that follow one place later.

    Args:
        tokens: all ids of the split.
        block_size: T.
        document_id: the token that begins every document.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, document_id: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.document_id = document_id

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.block_size)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Tokens and targets (B, T) int64, index (B,), cu_seqlens int32; index -1 is a row without targets."""
        size = self.block_size
        filler = 1 if self.document_id == 0 else 0
        rows = np.full((len(indices), size + 1), filler, dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if index >= 0:
                row[:] = self.tokens[index * size : index * size + size + 1]
        tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        index = torch.tensor(indices, dtype=torch.int64)
        targets[index < 0] = IGNORED
        return {
            "tokens": tokens,
            "targets": targets,
            "cu_seqlens": boundaries(tokens, self.document_id),
            "index": index,
        }


def boundaries(tokens: Tensor, document_id: int) -> Tensor:
    """cu_seqlens of `AttentionMask.packed`: where in the B T tokens a row or a document begins, and B T; int32."""
    begins = tokens == document_id
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([tokens.numel()])]).int()


def _as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


class TextDataModule(L.LightningDataModule):
    """Text, tokenised once into a memory-mapped file and read in a pseudo-random order without end.

    The order of training samples is a function of `seed` and the number of samples drawn, so a checkpoint needs that
    one number, and neither workers nor the number of devices change it. Documents are packed without padding;
    attention stays within a document.

    Args:
        source: "stdlib" (the source text of the running Python's standard library), "text", "json", "parquet" or "hub".
        files: paths or glob patterns, for text, json and parquet.
        name: dataset of the Hugging Face hub, for hub; it is streamed.
        subset: its configuration.
        hub_split: its split.
        text_field: the field that holds the text, for json, parquet and hub.
        unit: what is a document of a text file: the whole "document", a "paragraph" or a "line".
        max_documents: read so many documents at most.
        tokenizer: "byte", "bpe" (trained on the training documents) or the path of a byte-level tokenizer.json.
        vocab_size: of "bpe".
        block_size: tokens T of a sample.
        batch_size: samples of a step (before gradient accumulation), over all devices; their number must divide it.
        val_fraction: share of documents for validation, by their hash.
        test_fraction: share for testing.
        seed: of the order.
        num_workers: processes that read; reading is cheap, 0 is usually right.
        cache_dir: folder of the token files.

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

    # what is there

    @property
    def packed(self) -> PackedCorpus:
        """The token files; made at the first call."""
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
        """Text to ids and back."""
        return self.packed.tokenizer

    @property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of every token, (V,) int64."""
        return torch.from_numpy(self.tokenizer.token_bytes())

    def prepare_data(self) -> None:
        """Make the token files, in one process."""
        _ = self.packed

    def setup(self, stage: str) -> None:
        """Check that the splits of this stage fill a block.

        Raises:
            ValueError: if one does not, or data.batch_size cannot be shared among the devices.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in splits:
            found = self.packed.meta["splits"][split]
            if len(self.blocks(split)) == 0:
                raise ValueError(
                    f"the {_STAGES[split]} split must hold more than data.block_size = {self.block_size} tokens, got "
                    f"{found['tokens']} in {found['documents']} of the corpus's documents: give more text, a larger "
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
        """Batches without end, continuing where a restored checkpoint stopped."""
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
        """Batches that training has finished, as the trainer counts and restores them."""
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    # state

    def state_dict(self) -> dict[str, Any]:
        """Samples drawn so far, and which data they were drawn from."""
        drawn = self._drawn_before + (self._batches_seen() - self._batches_before) * self.batch_size
        return {"samples": drawn, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that many samples. Any text may be used to validate or test.

        Raises:
            ValueError: in fitting, if the checkpoint's data are not these.
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
