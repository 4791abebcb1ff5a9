"""What a call on a shard of a sequence checks and prepares, beside what every call does."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnzoo.distributed import collectives
from attnzoo.distributed.cache import ShardedCache
from attnzoo.distributed.sequence import SequenceParallel, Shards, form_of
from attnzoo.masks import AttentionMask, CompleteMask
from attnzoo.ops import distributed_attention


def shards_of(
    module: Any, x: Tensor, source: Tensor, mask: AttentionMask | None, positions: Any, cache: Any, *, cross: bool
) -> tuple[Shards | None, Any, int | None]:
    """The shards of a call, its positions with their default, and the length for rotations that depend on it.

    None in place of shards: a state of linear attention is the same on all ranks, so they continue it alone.
    """
    sp: SequenceParallel = module.sequence_parallel
    batch, tokens = x.shape[:2]
    form = form_of(module, sp, tokens)
    if cross and form != "gather":
        if sp.form != "auto":
            raise ValueError(f"context needs form 'gather' on a sharded sequence, got {sp.form!r}")
        form = "gather"
    if cache is not None and form != "state" and not isinstance(cache, ShardedCache):
        raise ValueError("cache must be made by init_cache after the module was parallelized, got one of one process")
    if cache is not None and cache.length:
        # New tokens, the same on every rank.
        at = torch.arange(cache.length, cache.length + tokens, device=x.device)
        known = Shards(sp, "cache", cache.length + tokens, at, module.cache_type, distributed_attention)
        _check_mask(module, known, mask, batch, tokens, known.tokens, x.device)
        return (None if form == "state" else known), positions, cache.max_length
    _check_equal(sp, batch, tokens)
    total = tokens * sp.size
    shards = Shards(sp, form, total, _positions(sp, total, x.device), module.cache_type, distributed_attention)
    _check_mask(module, shards, mask, batch, tokens, source.shape[1] * sp.size, x.device)
    limit = total if cache is None else cache.max_length
    if positions is None:
        return shards, None if cross else shards.rotation_positions(mask, batch), limit
    if cache is None and module.rope is not None and module.rope.depends_on_length:
        pair = positions if isinstance(positions, tuple | list) else (positions,)
        last = torch.stack([part.max() for part in pair]).max().to(x.device)
        for group in sp.groups:
            last = collectives.all_reduce(last, group, "max")
        limit = int(last) + 1
    return shards, positions, limit


def _check_mask(
    module: Any, shards: Shards, mask: AttentionMask | None, batch: int, queries: int, keys: int, device: torch.device
) -> None:
    """Refuse a mask that does not fit the whole sequence, or that the form or the layout cannot follow."""
    if mask is None:
        return
    if isinstance(mask, CompleteMask):
        raise ValueError(
            "mask must be an AttentionMask of the whole sequence or boolean on a shard, got a CompleteMask"
        )
    heads, dense = module.score_heads, mask.dense_mask
    parts = AttentionMask(lengths=mask.lengths, cu_seqlens=mask.cu_seqlens, real_queries=mask.real_queries)
    parts.check(batch, heads, keys if mask.cu_seqlens is not None else shards.tokens, keys, device)
    if dense is not None:
        AttentionMask.dense(dense).check(batch, heads, queries, keys, device)
        if shards.form in ("ring", "hybrid"):
            raise ValueError(f"mask must not be dense with form {shards.form!r}: take 'gather' or 'heads'")
    if mask.cu_seqlens is not None and shards.sp.layout == "striped":
        raise ValueError("mask must not be packed with layout 'striped', which takes documents apart")


@lru_cache(64)
def _positions(sp: SequenceParallel, tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return sp.positions(tokens).to(device)


def _check_equal(sp: SequenceParallel, batch: int, tokens: int) -> None:
    """Refuse shards of different sizes; asked of the other ranks under TORCH_DISTRIBUTED_DEBUG."""
    if not _debugging():
        return
    for group in sp.groups:
        sizes = collectives.gather(torch.tensor([batch, tokens], device=_device_of(group)), group)
        if bool((sizes != sizes[0]).any()):
            raise ValueError(f"x must have the same batch and tokens on all ranks, got {sizes.tolist()}")


def _debugging() -> bool:
    level: Any = dist.get_debug_level()  # type: ignore[attr-defined]
    return bool(level != dist.DebugLevel.OFF)  # type: ignore[attr-defined]


def _device_of(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
