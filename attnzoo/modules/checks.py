"""Refusals that every mechanism shares: each names the argument, the rule and the value."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import StatefulCache
from attnzoo.masks import AttentionMask
from attnzoo.ops.precision import has_autocast
from attnzoo.ops.submodules import is_plain
from attnzoo.rules import COUNT, NOT_NEGATIVE, check, check_sizes, describe


def named_options(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options; raises TypeError for one that no constructor of a class names, since nothing would read it."""
    for name in options:
        if name not in _constructor_arguments(cls):
            raise TypeError(f"{cls.__name__} has no option {name!r}: name it in the constructor that reads it")
    return options


@functools.cache
def _constructor_arguments(cls: type) -> frozenset[str]:
    """Names of the arguments of a class's constructor and of those of its bases."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    return frozenset(name for one in constructors for name in inspect.signature(one).parameters)


def check_prunable(module: Any) -> None:
    """Raise ValueError where heads are split over ranks, or a projection was replaced, whose rows cannot be cut."""
    if module.tensor_group is not None:
        raise ValueError(f"prune_heads needs all heads on one rank, got those of {type(module).__name__} split")
    for name, child in module.named_children():
        linear = hasattr(child, "in_features") or name.endswith(("_proj", "router", "noise"))
        if linear and type(child) is not nn.Linear:
            raise ValueError(f"{name} must be a plain Linear layer to be pruned, got {type(child).__name__}")


def starting_stds(init_std: float, std: float | None, out_std: float | None) -> tuple[float, float]:
    """Standard deviations of the projections and of the last one; refuses negative ones."""
    for name, given in (("std", std), ("out_std", out_std)):
        if given is not None:
            check(name, given, NOT_NEGATIVE)
    std = init_std if std is None else std
    return std, std if out_std is None else out_std


def counted_tokens(T: Any, S: Any = None, *, causal: bool) -> tuple[int, int | None]:
    """Numbers of queries and keys to count FLOPs of; refuses keys that are fewer than their own queries."""
    for name, count in (("T", T), ("S", S)):
        if count is not None or name == "T":
            check(name, count, COUNT)
    if causal and S is not None and S < T:
        raise ValueError(f"S must be at least T, whose keys are among the S, got {S} and {T}")
    return T, S


def derive_head_dim(embed_dim: int, num_heads: int, head_dim: int | None, kind: str = "") -> int:
    """head_dim, or embed_dim / num_heads where it is None and divides; kind "qk_" or "v_" of some heads alone."""
    check_sizes(**{"embed_dim": embed_dim, f"num_{kind}heads": num_heads})
    if head_dim is not None:
        return head_dim
    if embed_dim % num_heads:
        width = "v_head_dim" if kind == "v_" else "head_dim"
        raise ValueError(
            f"num_{kind}heads must divide embed_dim unless {width} is given, got {num_heads} and {embed_dim}"
        )
    return embed_dim // num_heads


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless num_kv_heads divides num_heads."""
    if num_kv_heads > num_heads or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")


def check_input(name: str, x: Tensor, width: int, layer: nn.Module | None = None) -> None:
    """Raise ValueError unless x is a dense, real (B, T, width) tensor in the dtype of a layer and on its device."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor (B, T, {width}), got {describe(x)}")
    if x.is_nested or x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got a {'nested' if x.is_nested else x.layout} one")
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must have shape (B, T, {width}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold real floating-point numbers, got {x.dtype}")
    weight = None if layer is None else layer._parameters.get("weight")
    if weight is not None and (x.dtype is not weight.dtype or x.device != weight.device) and is_plain(layer):
        _check_place(name, x, weight)


def _check_place(name: str, x: Tensor, weight: Tensor) -> None:
    """Refuse x in another dtype than a plain layer's weight, unless autocast brings both to one, or elsewhere."""
    device = weight.device.type
    autocast = has_autocast(device) and torch.is_autocast_enabled(device)
    if x.dtype != weight.dtype and (not autocast or torch.float64 in (x.dtype, weight.dtype)):
        raise ValueError(f"{name} must have the dtype of the weights {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{name} must be on the device of the weights {weight.device}, got {x.device}")


def split_context(
    context: Tensor | tuple[Tensor, Tensor], x: Tensor, widths: tuple[int, int], layer: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """The inputs that keys and values are made from: one tensor for both, or a pair of equal length."""
    pair = context if isinstance(context, tuple | list) else (context, context)
    if len(pair) != 2:
        raise ValueError(f"context must be a tensor or a pair (key input, value input), got {len(pair)} parts")
    key, value = pair
    check_input("context (key input)", key, widths[0], layer)
    check_input("context (value input)", value, widths[1], layer)
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"context must have keys and values of equal batch and length, got {tuple(key.shape[:2])} "
            f"and {tuple(value.shape[:2])}"
        )
    if key.shape[0] != x.shape[0]:
        raise ValueError(f"context must have the batch of x, got {key.shape[0]} and {x.shape[0]}")
    return key, value


def key_value_sources(module: Any, x: Tensor, context: Any, layer: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """What keys (B, S, kdim) and values (B, S, vdim) are made from: x, or the context.

    A module with an attribute `vdim` takes a pair of contexts too. Refuses a context that does not fit, and a missing
    one where its widths are not embed_dim.
    """
    if context is None and module.causal:
        return x, x
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
        raise ValueError(f"context must be one tensor: {module.one_source_reason}; got {describe(context)}")
    return split_context(context, x, (module.kdim, module.kdim if vdim is None else vdim), layer)


def check_cache(module: Any, cache: Any, context: object, mask: AttentionMask | None) -> None:
    """Refuse a cache of another mechanism or of other sizes, and one where a cache has no meaning."""
    held, wanted = getattr(cache, "inner", cache), module.cache_type
    # Where a mechanism keeps no state, its stateful cache looks like one of keys and values.
    if not isinstance(held, wanted) or isinstance(held, StatefulCache) != issubclass(wanted, StatefulCache):
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


def check_bias(module: Any, mask: Any) -> None:
    """Refuse a mask that adds to the scores of a mechanism that cannot."""
    if mask.bias is not None and not getattr(module, "takes_bias", False):
        raise ValueError(f"mask must not add to the scores of {type(module).__name__}, got a bias other than 0")
