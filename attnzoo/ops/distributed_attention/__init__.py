"""Attention over a sequence whose tokens are spread over the ranks of a group: exact, forward and backward.

Shapes are those of a rank: queries (B, t, H, D) and states (B, t, ...) of its own t = T / P tokens, in the order of
`Shards.positions`. See `attnzoo.distributed.SequenceParallel` for layouts and forms.
"""

from attnzoo.ops.distributed_attention.composition import sharded_composition
from attnzoo.ops.distributed_attention.gather import gather_attention, query_runs
from attnzoo.ops.distributed_attention.heads import heads_attention
from attnzoo.ops.distributed_attention.merging import merge_partials
from attnzoo.ops.distributed_attention.ring import ring_attention
from attnzoo.ops.distributed_attention.sigmoid import sharded_sigmoid
from attnzoo.ops.distributed_attention.softmax import expanded_attention, sharded_attention
from attnzoo.ops.distributed_attention.states import pass_block_states, pass_state

__all__ = [
    "expanded_attention",
    "gather_attention",
    "heads_attention",
    "merge_partials",
    "pass_block_states",
    "pass_state",
    "query_runs",
    "ring_attention",
    "sharded_attention",
    "sharded_composition",
    "sharded_sigmoid",
]
