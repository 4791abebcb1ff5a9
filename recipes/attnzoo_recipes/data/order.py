"""The order of training samples: a permutation that is computed, not stored, so that its state is one integer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_ROUNDS = 6


def permuted(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Images of indices (n,) int64 under a pseudo-random permutation of 0 .. size - 1.

    A Feistel network on the next even number of bits is a permutation of a power of 4. It is applied again to values
    outside the range until they are inside, less than 4 times on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _mixed(np.uint64(seed % 2**64) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0xA24BAED4963EE407))
    value = indices.astype(np.uint64)
    pending = np.ones(value.shape, dtype=bool)
    while pending.any():
        left, right = value[pending] >> np.uint64(half), value[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        value[pending] = (left << np.uint64(half)) | right
        pending &= value >= size
    return value.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class EndlessBatches(Sampler[list[int]]):
    """Endless batches of block indices, with a different order in each pass over the blocks.

    Sample n is the block at place n mod N of pass n div N. A batch is batch_size samples over all processes, each of
    which gets a consecutive share, so that the samples of a batch do not depend on the number of processes.

    Args:
        num_blocks: N.
        batch_size: samples of a batch, over all processes.
        seed: of the order.
        start: number of samples drawn before.
        rank: this process.
        world_size: number of processes; must divide batch_size.
    """

    def __init__(
        self, num_blocks: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        first = self.start + self.rank * share
        while True:
            yield self.blocks(np.arange(first, first + share)).tolist()
            first += self.batch_size

    def blocks(self, samples: np.ndarray) -> np.ndarray:
        """The block of each sample (n,) int64."""
        passes, places = np.divmod(samples, self.num_blocks)
        blocks = np.empty_like(samples)
        for number in np.unique(passes):
            chosen = passes == number
            counter = (self.seed * 0x9E3779B97F4A7C15 + int(number)) % 2**64
            key = int(_mixed(np.array([counter], dtype=np.uint64))[0])
            blocks[chosen] = permuted(places[chosen], self.num_blocks, key)
        return blocks


class PaddedBatches(Sampler[list[int]]):
    """All block indices once, in order. With several processes, -1 fills the last batch of each.

    Args:
        num_blocks: N.
        batch_size: samples of a batch, over all processes.
        rank: this process.
        world_size: number of processes; must divide batch_size.
    """

    def __init__(self, num_blocks: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.rank = rank
        self.share = batch_size // world_size
        self.padded = world_size > 1

    def __len__(self) -> int:
        return -(-self.num_blocks // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = batch * self.batch_size + self.rank * self.share
            indices = [i if i < self.num_blocks else -1 for i in range(first, first + self.share)]
            yield indices if self.padded else [i for i in indices if i >= 0]
