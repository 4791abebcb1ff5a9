"""Whether an attnzoo module computes what the attention module computes whose place it is to take.

Both are run in float32 on the inputs that the layer gets in the model: half precision would hide a wrong map behind its
rounding. Masks and positions are those that transformers makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from attnzoo.diagnostics.batches import in_eval_mode
from attnzoo.hugging_face.layer import AttentionLayer, without_hooks

TOLERANCE = 1e-4
"""Largest difference over largest output: right maps are at most 1e-6 off, wrong ones of new models 7e-3 and more."""

Inputs = Mapping[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def random_inputs(model: Any) -> dict[str, Tensor]:
    """Two rows of 16 random ids, or fewer where the model has fewer positions, the first of them left-padded."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise ValueError(
            f"verify must hold the arguments of a {type(model).__name__}, or be False: they are known of whole models "
            "of transformers alone"
        )
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    vocabulary = config.vocab_size if embedding is None else embedding.weight.shape[0]
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def verify(
    model: Any, built: Mapping[str, nn.Module], inputs: Inputs | None = None, pairs: Mapping[str, Any] | None = None
) -> None:
    """Compare the attention modules of a model with those that are to take their places.

    Args:
        model: a model of transformers; it is run once on given inputs, or with padding and without.
        built: the new modules by the names of the old ones.
        inputs: keyword arguments of the model. Default: `random_inputs`, and the second row of them without a mask.
        pairs: of layers whose last projection is outside the attention module, the module that has it, by name.

    Raises:
        ValueError: if a layer was not called, or if two outputs differ.
    """
    runs = [random_inputs(model) if inputs is None else inputs]
    if inputs is None:
        # Without padding transformers makes no mask where the kernel has its own rule of causality.
        runs.append({"input_ids": runs[0]["input_ids"][1:]})
    recorded = [(given, *_recorded(model, built, given)) for given in runs]
    if inputs is None and any(map(_has_nan, recorded[0][1].values())):
        # transformers' eager softmax is one of float32, where the lowest float64 numbers of a mask are infinite.
        del recorded[0]
    for name, attn in built.items():
        original = model.get_submodule(name)
        single, projection = _single(original), (pairs or {}).get(name)
        new = AttentionLayer(_single(attn), single)
        last = None if projection is None else _single(projection)
        for given, calls, tables in recorded:
            if name not in calls:
                raise ValueError(f"layer {name!r} was not called by the model, so that it cannot be verified")
            args, kwargs = _in_float32(calls[name], tables)
            with torch.no_grad():
                expected = single(*args, **kwargs)[0]
                expected = expected if last is None else last(expected)
                found = new(*args, **kwargs)[0]
            difference = _difference(found, expected, given.get("attention_mask"), kwargs.get("attention_mask"))
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"layer {name!r}: attnzoo computes another function than {type(original).__name__} (relative "
                    f"difference {difference:.2g}); its family may be mapped wrongly"
                )


def _difference(found: Tensor, expected: Tensor, padding: Any, mask: Any) -> float:
    """Largest difference over largest output, of rows that are not padding and see something."""
    real = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    if isinstance(padding, Tensor) and padding.shape == real.shape:
        real &= padding.bool()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        real &= sees.any(-1).any(1)
    scale = expected[real].abs().max().clamp(min=1e-30)
    return float((found - expected)[real].abs().max() / scale)


def _recorded(model: Any, built: Mapping[str, nn.Module], inputs: Inputs) -> tuple[dict[str, Call], list[Any]]:
    """Arguments of each layer in one run of the model, and how the rotation tables among them were made."""
    calls: dict[str, Call] = {}
    tables: list[Any] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = args, kwargs

        return hook

    def keep_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        tables.append((module, args, kwargs, out))

    with in_eval_mode(model), ExitStack() as hooks, torch.no_grad():
        for name in built:
            handle = model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for module in model.modules():
            if "Rotary" in type(module).__name__:
                hooks.callback(module.register_forward_hook(keep_table, with_kwargs=True).remove)
        model(**inputs)
    return calls, tables


def _has_nan(call: Call) -> bool:
    args, kwargs = call
    return any(isinstance(x, Tensor) and bool(x.isnan().any()) for x in (*args, *kwargs.values()))


def _single(module: nn.Module) -> nn.Module:
    """A copy in float32 and in eval mode."""
    config = getattr(module, "config", None)
    copied = copy.deepcopy(module, {} if config is None else {id(config): config})
    return without_hooks(nn.Module.float(copied)).eval()


def _in_float32(call: Call, tables: list[Any]) -> Call:
    """Arguments with floating-point tensors in float32, masks kept; rotation tables made again, without rounding."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            for module, args, kwargs, out in tables:
                if out is value:
                    return _precise(module)(*map(cast, args), **{key: cast(arg) for key, arg in kwargs.items()})
            return tuple(map(cast, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        hidden = value <= torch.finfo(value.dtype).min / 2
        return value.float().masked_fill(hidden, torch.finfo(torch.float32).min)

    args, kwargs = call
    # The run of a single layer has no cache.
    dropped = ("past_key_values", "layer_past", "use_cache")
    return tuple(map(cast, args)), {k: None if k in dropped else cast(v) for k, v in kwargs.items()}


def _precise(module: Any) -> Any:
    """The module that makes rotation tables, with frequencies that no cast has rounded."""
    try:
        return type(module)(module.config).to(next(module.buffers()).device)
    except (AttributeError, TypeError, StopIteration):
        return _single(module)
