"""transformers' caches behind the modules' own: one module's view of a `Cache`, and a layer that holds states.

The numbers of all tokens stay in transformers' cache, so that everything it offers works: fixed sizes, sliding windows,
beams, cropping. A module sees a cache of its own class, whose coordinates start at the first token that is still held.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from attnzoo.cache import (
    ComposedCache,
    FactorCache,
    KeyValueCache,
    LatentCache,
    StatefulCache,
    StaticContextCache,
    TiedCache,
    TokenCache,
    UntiedCache,
)
from attnzoo.modules.clustered_cache import ClusteredCache


def cache_of(attn: Any, past: Any, index: int, batch: int, tokens: int, *, is_masked: bool, limit: int) -> Any:
    """What a module takes as its cache for a call with so many new tokens, over layer `index` of transformers' cache.

    Args:
        attn: the module.
        past: transformers' cache.
        index: number of the layer in it.
        batch: sequences.
        tokens: new tokens.
        is_masked: whether a mask alone says which keys are visible, so that the length of a cache of fixed size, which
            is on the device, need not be read.
        limit: tokens that a module's own cache is made for.

    Raises:
        ValueError: if past is not a cache of transformers, or if the module keeps sink tokens, which a sliding cache
            drops.
    """
    if isinstance(past, EncoderDecoderCache):
        past = past.self_attention_cache
    if not isinstance(past, Cache):
        raise ValueError(f"past_key_values must be a Cache of transformers, got {type(past).__name__}")
    if not issubclass(attn.cache_type, TokenCache) or issubclass(attn.cache_type, StatefulCache | StaticContextCache):
        longest = attn.longest() if hasattr(attn, "longest") else None
        return state_layer(attn, past, index, batch, tokens, limit if longest is None else min(limit, longest)).cache
    return view_class(attn.cache_type)(attn, past, index, tokens, is_masked)


class View:
    """One module's cache whose tokens are in transformers' cache; it is made for one call."""

    max_length = None
    held: int
    """Keys that the module gets, of which a cache of fixed size has more than there are tokens."""
    is_exact: bool
    """Whether `length` is the number of tokens held, not only a place where they may end."""

    def __init__(self, attn: Any, past: Cache, index: int, tokens: int, is_masked: bool) -> None:
        self.layout = attn.cache_layout()
        self._past, self._index, self._user = past, index, type(attn)
        held, offset = past.get_mask_sizes(tokens, index)
        self.held = held
        if attn.sink_tokens and _is_sliding(past, index):
            raise ValueError(
                f"sink_tokens must be 0 with a cache that slides and drops the first tokens, got {attn.sink_tokens}"
            )
        start = _query_offset(past, index)
        if isinstance(start, Tensor) and is_masked and not getattr(attn, "reads_token_index", True):
            self.length, self.is_exact = held - tokens, False
        else:
            self.length, self.is_exact = int(start) - offset, True

    def snapshot(self, tokens: int) -> None:
        """Nothing: transformers' caches do not take back what a failing layer appended."""

    def restore(self, snapshot: None) -> None:
        """See `snapshot`."""

    def _append(self, *new: Tensor) -> tuple[tuple[Tensor, ...], None]:
        """Store new states (B, T, heads, width) in transformers' cache; return those of all tokens that it holds."""
        heads = [state.shape[2] for state in new]
        if len(new) == 2 and heads[0] == heads[1]:
            held = self._update(new[0].transpose(1, 2), new[1].transpose(1, 2))
            return tuple(state.transpose(1, 2) for state in held), None
        row = torch.cat([state.flatten(2) for state in new], dim=-1)[:, None]
        row, _ = self._update(row, row[..., :0])
        parts = row[:, 0].split([state.shape[2] * state.shape[3] for state in new], dim=-1)
        return tuple(part.unflatten(-1, state.shape[2:]) for part, state in zip(parts, new, strict=True)), None

    def _update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._past.update(keys, values, self._index)
        except RuntimeError as error:
            held: Any = getattr(self._past.layers[self._index], "keys", None)
            if not isinstance(held, Tensor) or held.ndim != 4 or held.shape[1::2] == keys.shape[1::2]:
                raise
            raise ValueError(
                f"past_key_values must hold what {self._user.__name__} caches, {keys.shape[1]} heads of width "
                f"{keys.shape[3]}, got {held.shape[1]} of width {held.shape[3]}: prefixes of another layout, such as "
                "peft's prefix tuning makes from the configuration, have no meaning for it"
            ) from error

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The states before this call, each (B, heads, S, width)."""
        layers: Any = self._past.layers
        end = 0
        row: Tensor | None = layers[self._index].keys if self._index < len(layers) else None
        buffers = []
        for heads, width in self.layout.widths:
            start, end = end, end + heads * width
            part = torch.empty(1, 0, heads * width) if row is None or row.ndim < 4 else row[:, 0, :, start:end]
            buffers.append(part.unflatten(-1, (heads, width)).transpose(1, 2))
        return tuple(buffers)


def _view_of(cache_type: type[TokenCache]) -> type[Any]:
    return type(f"{cache_type.__name__}View", (View, cache_type), {})


_VIEWS: dict[type[TokenCache], type[Any]] = {
    kind: _view_of(kind) for kind in (KeyValueCache, LatentCache, TiedCache, UntiedCache, ComposedCache, FactorCache)
}


def view_class(cache_type: type[TokenCache]) -> type[Any]:
    """The view that is a cache of that class; torch.compile can trace calls of those that were made before."""
    if cache_type not in _VIEWS:
        _VIEWS[cache_type] = _view_of(cache_type)
    return _VIEWS[cache_type]


def _is_sliding(past: Cache, index: int) -> bool:
    return index < len(past.layers) and bool(getattr(past.layers[index], "is_sliding", False))


def _query_offset(past: Cache, index: int) -> int | Tensor:
    """Index of the next token; releases before 5.8 call it the length."""
    offset = getattr(past, "get_query_offset", past.get_seq_length)
    return cast("int | Tensor", offset(index))


class StateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of transformers' cache that holds a module's own cache: sums of linear attention, or states beside keys.

    It can be reordered, repeated and selected from by rows, but single tokens cannot be taken back unless the module's
    cache can do that.

    Args:
        cache: from the module's `init_cache`.
        fixed: keys that transformers' masks have room for, where the cache has a fixed size; else None.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: Any, fixed: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.fixed = fixed
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: the module's cache has been allocated."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refused: the module fills its cache itself."""
        raise ValueError("this layer of the cache belongs to a module of attnzoo: it cannot be updated with keys")

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return int(self.cache.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask covers, and the index of the first."""
        return self.get_seq_length() + query_length if self.fixed is None else self.fixed, 0

    def get_max_length(self) -> int:
        """Tokens that it may ever see, -1 if it grows."""
        return -1 if self.fixed is None else self.fixed

    get_max_cache_shape = get_max_length  # its name before 5.10

    def offload(self) -> None:
        """Nothing: states stay on their device."""

    prefetch = offload

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens (or, if positive, all but that many), where the cache can."""
        length = self.get_seq_length()
        self.cache.truncate(length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b continues what row beam_idx[b] was."""
        self.cache = rows_of(self.cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.cache = rows_of(self.cache, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(self.cache.batch_size, device=self.cache.buffers[0].device)
        self.cache = rows_of(self.cache, rows.repeat_interleave(repeats))


def state_layer(attn: Any, past: Any, index: int, batch: int, tokens: int, limit: int) -> StateLayer:
    """The layer that holds the module's own cache; it is made, or grown, where necessary.

    Raises:
        ValueError: if another module has put tokens into this layer.
    """
    while len(past.layers) <= index:
        past.layers.append(past.layer_class_to_replicate())
    layer = past.layers[index]
    if not isinstance(layer, StateLayer):
        if layer.is_initialized and int(layer.get_seq_length()):
            raise ValueError(
                f"past_key_values must be empty at the first call of {type(attn).__name__}, got "
                f"{int(layer.get_seq_length())} tokens in layer {index}"
            )
        fixed = None if layer.is_sliding else getattr(layer, "max_cache_len", None)
        if fixed is None and issubclass(attn.cache_type, TokenCache):
            limit = max(_FIRST_ROOM, tokens)
        layer = StateLayer(attn.init_cache(batch, fixed or max(limit, tokens)), fixed)
        past.layers[index] = layer
    own = layer.cache
    if own.length + tokens > own.max_length and layer.fixed is None and isinstance(own, TokenCache):
        layer.cache = _grown(attn, own, own.length + tokens)
    return layer


_FIRST_ROOM = 256


def _grown(attn: Any, cache: TokenCache, tokens: int) -> Any:
    """The same tokens in a cache for twice as many."""
    grown = attn.init_cache(cache.batch_size, max(2 * cache.max_length, tokens))
    grown.take(cache)
    return grown


def rows_of(cache: Any, index: Tensor) -> Any:
    """A module's cache with row b what row index[b] was; there may be more or fewer rows than before."""
    if isinstance(cache, ClusteredCache):
        chosen = copy.copy(cache)
        chosen.states = rows_of(cache.states, index)
        chosen.clusters = None if cache.clusters is None else cache.clusters.reorder(index)
    else:
        chosen = copy.copy(cache)
        chosen.buffers = tuple(buffer.index_select(0, index.to(buffer.device)) for buffer in cache.buffers)
        if isinstance(cache, TokenCache):
            chosen._rows = tuple(buffer.transpose(1, 2) for buffer in chosen.buffers)
        if isinstance(cache, StatefulCache):
            chosen.state = tuple(part.index_select(0, index.to(part.device)) for part in cache.state)
    chosen.batch_size = index.shape[0]
    return chosen
