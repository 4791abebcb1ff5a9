"""The order of training samples: a permutation that is computed, not stored, so that its state is one integer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_ROUNDS = 6
CYCLE = 2**16
"""Samples after which a mixture has each source's share exactly."""


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


def _key(seed: int, number: int) -> int:
    """The seed of the permutation of that number."""
    counter = (seed * 0x9E3779B97F4A7C15 + number) % 2**64
    return int(_mixed(np.array([counter], dtype=np.uint64))[0])


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
            blocks[chosen] = permuted(places[chosen], self.num_blocks, _key(self.seed, int(number)))
        return blocks


class MixedBatches(EndlessBatches):
    """Endless batches of several sources by weight, each of them in an order of its own.

    Of every `CYCLE` samples a source has a fixed number, its weight's share to within one, at pseudo-random places. So
    how many samples it had is a function of the number of all samples, which is all that a checkpoint has to keep.
    Source i's sample k is the block at place k mod N_i of its pass k div N_i. Blocks are numbered through all sources.

    Args:
        sizes: blocks N_i of each source.
        weights: of each source, positive; only their ratios count.
        batch_size: samples of a batch, over all processes.
        seed: of the order.
        start: number of samples drawn before.
        rank: this process.
        world_size: number of processes; must divide batch_size.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(sum(sizes), batch_size, seed, start, rank, world_size)
        self.sources = [EndlessBatches(size, 1, _key(seed, number)) for number, size in enumerate(sizes, 1)]
        self.offsets = np.cumsum([0, *sizes])
        self.shares = np.array(shares(weights), dtype=np.int64)
        self._cycle: tuple[int, np.ndarray, np.ndarray] | None = None

    def blocks(self, samples: np.ndarray) -> np.ndarray:
        """The block of each sample (n,) int64, numbered through all sources."""
        blocks = np.empty_like(samples)
        cycles, places = np.divmod(samples, CYCLE)
        for number in np.unique(cycles):
            sources, before = self._drawn(int(number))
            for source, order in enumerate(self.sources):
                chosen = (cycles == number) & (sources[places] == source)
                own = number * self.shares[source] + before[places[chosen]]
                blocks[chosen] = self.offsets[source] + order.blocks(own)
        return blocks

    def counts(self, samples: int) -> list[int]:
        """Samples of each source among the first so many."""
        cycles, rest = divmod(samples, CYCLE)
        begun = np.bincount(self._drawn(cycles)[0][:rest], minlength=len(self.shares))
        counts: list[int] = (cycles * self.shares + begun).tolist()
        return counts

    def _drawn(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of a cycle, and how many of the same source the cycle had before it."""
        if self._cycle is None or self._cycle[0] != number:
            order = permuted(np.arange(CYCLE), CYCLE, _key(_key(self.seed, 0), number))
            sources = np.searchsorted(np.cumsum(self.shares), order, side="right")
            before = np.empty(CYCLE, dtype=np.int64)
            for source, share in enumerate(self.shares):
                before[sources == source] = np.arange(share)
            self._cycle = number, sources, before
        return self._cycle[1], self._cycle[2]


def shares(weights: Sequence[float]) -> list[int]:
    """How many of `CYCLE` samples each source has: at least one, and otherwise the weights by largest remainders."""
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    found = [max(1, int(share)) for share in exact]
    largest = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in itertools.islice(itertools.cycle(largest), max(0, CYCLE - sum(found))):
        found[i] += 1
    # What sources of less than one sample have been given, the one with most can spare.
    found[found.index(max(found))] -= max(0, sum(found) - CYCLE)
    return found


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
