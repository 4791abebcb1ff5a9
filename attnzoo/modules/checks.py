"""Refusals that every mechanism shares: each names the argument, the rule and the value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.masks import AttentionMask


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def derive_head_dim(embed_dim: int, num_heads: int, head_dim: int | None) -> int:
    """head_dim, or embed_dim / num_heads where it is None and divides."""
    if head_dim is not None:
        return head_dim
    check_sizes(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim unless head_dim is given, got {num_heads} and {embed_dim}")
    return embed_dim // num_heads


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless num_kv_heads divides num_heads."""
    if num_kv_heads > num_heads or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")


def check_options(
    *,
    dropout: float = 0.0,
    logit_softcap: float | None = None,
    sliding_window: int | None = None,
    sink_tokens: int = 0,
    sink: str | None = None,
    scale: float | None = None,
) -> None:
    """Refuse values that the softmax-attention options do not take."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens must not be negative, got {sink_tokens}")
    if sink_tokens and sliding_window is None:
        raise ValueError(f"sink_tokens needs sliding_window, got sink_tokens {sink_tokens} without a window")
    if sink not in (None, "zero", "learned"):
        raise ValueError(f"sink must be None, 'zero' or 'learned', got {sink!r}")
    if scale is not None and not 0 < abs(scale) < float("inf"):
        raise ValueError(f"scale must be a finite number other than 0, got {scale}")


def check_input(name: str, x: Tensor, width: int) -> None:
    """Raise ValueError unless x is a real (B, T, width) tensor."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must have shape (B, T, {width}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold real floating-point numbers, got {x.dtype}")


def split_context(
    context: Tensor | tuple[Tensor, Tensor], x: Tensor, key_width: int, value_width: int
) -> tuple[Tensor, Tensor]:
    """The inputs that keys and values are made from: one tensor for both, or a pair of equal length."""
    pair = context if isinstance(context, tuple | list) else (context, context)
    if len(pair) != 2:
        raise ValueError(f"context must be a tensor or a pair (key input, value input), got {len(pair)} parts")
    key, value = pair
    check_input("context (key input)", key, key_width)
    check_input("context (value input)", value, value_width)
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"context must have keys and values of equal batch and length, got {tuple(key.shape[:2])} "
            f"and {tuple(value.shape[:2])}"
        )
    if key.shape[0] != x.shape[0]:
        raise ValueError(f"context must have the batch of x, got {key.shape[0]} and {x.shape[0]}")
    return key, value


def key_value_sources(module: Any, x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
    """What keys (B, S, kdim) and values (B, S, vdim) are made from: x, or the context.

    A module with an attribute `vdim` takes a pair of contexts too. Refuses a context that does not fit, and a missing
    one where its widths are not embed_dim.
    """
    vdim = getattr(module, "vdim", None)
    if context is None:
        if vdim is None and module.kdim != module.embed_dim:
            raise ValueError(
                f"context must be given, since kdim is not embed_dim: {module.kdim} and {module.embed_dim}"
            )
        if vdim is not None and (module.kdim != module.embed_dim or vdim != module.embed_dim):
            raise ValueError(
                f"context must be given, since kdim and vdim are not embed_dim: {module.kdim}, {vdim} "
                f"and {module.embed_dim}"
            )
        return x, x
    if module.causal:
        raise ValueError("context needs a module with causal=False, got causal=True")
    if vdim is None and not isinstance(context, Tensor):
        raise ValueError(f"context must be one tensor: {module.one_source_reason}")
    return split_context(context, x, module.kdim, module.kdim if vdim is None else vdim)


def check_cache(module: Any, cache: Any, context: object, mask: AttentionMask | None) -> None:
    """Refuse a cache of another mechanism or of other sizes, and one where a cache has no meaning."""
    if not isinstance(cache, module.cache_type):
        raise ValueError(f"cache must come from this module's init_cache, got a {type(cache).__name__}")
    if not module.causal:
        raise ValueError("cache needs a module with causal=True, got causal=False")
    if mask is not None and mask.cu_seqlens is not None:
        raise ValueError("mask must not be packed when cache is given: a cache continues one document a row")
    if context is not None:
        raise ValueError("cache holds keys of x and cannot be combined with context")
    layout = module.cache_layout()
    if cache.layout != layout:
        raise ValueError(
            f"cache must come from this module's init_cache: it was made for {cache.layout}, and the module needs "
            f"{layout}"
        )
