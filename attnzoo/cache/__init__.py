"""Caches for decoding: preallocated, filled in place, passed in explicitly.

A cache belongs to one module and one batch of sequences of equal length. No gradient flows through it.
"""

from attnzoo.cache.selection import SelectionCache
from attnzoo.cache.stateful import (
    ConvolutionCache,
    ForgettingCache,
    MeanCache,
    RecentCache,
    RecentQueriesCache,
    StatefulCache,
)
from attnzoo.cache.tokens import (
    BufferCache,
    CacheLayout,
    ComposedCache,
    FactorCache,
    KeyValueCache,
    LatentCache,
    Snapshot,
    StaticContextCache,
    TiedCache,
    TokenCache,
    UntiedCache,
    check_held,
    checked_rows,
    writable,
)

__all__ = [
    "BufferCache",
    "CacheLayout",
    "ComposedCache",
    "ConvolutionCache",
    "FactorCache",
    "ForgettingCache",
    "KeyValueCache",
    "LatentCache",
    "MeanCache",
    "RecentCache",
    "RecentQueriesCache",
    "SelectionCache",
    "Snapshot",
    "StatefulCache",
    "StaticContextCache",
    "TiedCache",
    "TokenCache",
    "UntiedCache",
    "check_held",
    "checked_rows",
    "writable",
]
