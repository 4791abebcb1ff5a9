"""One sequence over several processes: `SequenceParallel`, `parallelize`, `shard` and `unshard`."""

from attnzoo.distributed.collectives import Traffic, counting_traffic
from attnzoo.distributed.sequence import SequenceParallel, parallelize, shard, unshard

__all__ = ["SequenceParallel", "Traffic", "counting_traffic", "parallelize", "shard", "unshard"]
