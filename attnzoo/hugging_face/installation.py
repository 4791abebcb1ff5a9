"""Where attention modules are in a transformers model, and how one of attnzoo is put in their place."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from attnzoo.hugging_face.families import FAMILIES, family_of
from attnzoo.hugging_face.layer import AttentionLayer
from attnzoo.rules import FLOATS, describe, is_integer


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attnzoo modules of a model with the names of the layers that hold them, as `install` takes them."""
    _check_model(model)
    return [(name, module.attn) for name, module in model.named_modules() if isinstance(module, AttentionLayer)]


def attention_names(model: nn.Module, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the attention modules of a model that can be or have been replaced, in the order of its layers.

    Args:
        model: a model of transformers.
        layers: which of them, by their numbers among these. Default: all.

    Raises:
        ValueError: if the model has none, if an index is out of range or repeated, or if weights are not plain
            floating-point tensors of this process, or those of a module that has several places in the model.
    """
    _check_model(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AttentionLayer) or (family_of(module) is not None and not _is_left_alone(module))
    }
    if not found:
        _refuse_model(model)
    names = list(found)
    if layers is not None:
        names = [names[index] for index in _checked(layers, len(names))]
    _check_places(model, {name: found[name] for name in names})
    for name in names:
        check_weights(name, found[name])
    return names


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model of transformers, got {describe(model)}")


def _check_places(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Refuse an attention module that several other modules hold."""
    names = {id(module): name for name, module in chosen.items()}
    for holder_name, holder in model.named_modules():
        for place, child in holder._modules.items():
            path = f"{holder_name}.{place}" if holder_name else place
            first = names.get(id(child), path)
            if first != path:
                raise ValueError(
                    f"layer {first!r} must have one place in the model, but is {path!r} too: give each its own module"
                )


def install(model: nn.Module, name: str, attn: nn.Module) -> None:
    """Put an attnzoo module at the place of the attention module of that name, or of one that was installed there.

    Nothing is verified and no weights are copied.

    Args:
        model: a model of transformers.
        name: of the attention module, from `attention_names`.
        attn: the module.
    """
    holder_name, _, place = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    original = holder.get_submodule(place)
    layer = AttentionLayer(attn, original)
    if not isinstance(original, AttentionLayer):
        family = family_of(original)
        if family is not None and family.projection is not None:
            holder.set_submodule(family.projection, nn.Identity())
        for module in _models_around(model, name):
            if not hasattr(module, "_attnzoo_guard"):
                module._attnzoo_guard = module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
    holder.set_submodule(place, layer)


def outside(model: nn.Module, name: str) -> nn.Module | None:
    """The output projection of the attention module of that name where another module has it, or None."""
    family = family_of(model.get_submodule(name))
    if family is None or family.projection is None:
        return None
    return model.get_submodule(name.rpartition(".")[0]).get_submodule(family.projection)


def holders(model: nn.Module) -> list[nn.Module]:
    """The model, or those around it if it is the base of others or a layer: who saves them saves its attention too."""
    if getattr(model, "base_model", model) is not model:
        return [model]
    # A module does not know its holder.
    others = [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel) and one is not model]
    return [other for other in others if any(part is model for part in other.modules())] or [model]


def unguard(model: nn.Module) -> None:
    """Take back that models refuse `output_attentions`, but for those whose attention is still replaced."""
    for module in model.modules():
        if "_attnzoo_guard" in vars(module) and not modules(module):
            vars(module).pop("_attnzoo_guard").remove()


def _refuse_attentions(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    if module.config.output_attentions if wanted is None else wanted:
        raise ValueError(
            "output_attentions must be False for a model with attnzoo's attention, which returns no weights: use "
            "attnzoo.diagnostics.capture"
        )


def _models_around(model: nn.Module, name: str) -> list[Any]:
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in around if isinstance(module, PreTrainedModel)]


def _is_left_alone(module: Any) -> bool:
    """Cross-attention, and layers that read the keys and values of others."""
    return bool(getattr(module, "is_cross_attention", False) or getattr(module, "is_kv_shared_layer", False))


def _checked(layers: Sequence[int], count: int) -> list[int]:
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers must hold numbers from 0 to {count - 1}, or be None, got {layers!r}")
    chosen = list(layers)
    for index in chosen:
        if not is_integer(index) or not 0 <= index < count:
            raise ValueError(f"layers must hold numbers from 0 to {count - 1}, got {index!r}")
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ValueError(f"layers must hold different numbers, at least one, got {chosen}")
    return sorted(chosen)


def _refuse_model(model: nn.Module) -> None:
    """Say why nothing can be replaced."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and not _is_left_alone(module):
            kind = type(module).__name__
            around = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
            other = ", set_attn_implementation('attnzoo') needs no mapping" if _asks_the_interface(around) else ""
            raise ValueError(f"layer {name!r}: {kind} is not known; register_family teaches it{other}")
    raise ValueError(
        f"model must contain attention of a known class ({', '.join(FAMILIES)}; register_family adds others), got "
        f"{type(model).__name__}"
    )


def _asks_the_interface(model: Any) -> bool:
    """Whether a model of transformers takes another attention function."""
    return model is not None and bool(model._can_set_attn_implementation())


def check_merged(name: str, module: nn.Module) -> None:
    """Refuse adapters beside the weights."""
    for part in module.modules():
        if hasattr(part, "base_layer") or hasattr(part, "lora_A"):
            raise ValueError(f"layer {name!r}: merge adapters first, got a {type(part).__name__} inside")


def check_weights(name: str, module: nn.Module) -> None:
    """Refuse weights that cannot be taken over."""
    check_merged(name, module)
    for part in module.modules():
        if getattr(part, "_hf_hook", None) is not None and getattr(part._hf_hook, "offload", False):
            raise ValueError(f"layer {name!r}: weights must not be offloaded; replace before dispatching the model")
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, DTensor):
            raise ValueError(f"layer {name!r}: {key} must not be sharded; replace before sharding")
        if tensor.dtype is not torch.bool and tensor.dtype not in FLOATS:
            raise ValueError(
                f"layer {name!r}: weights must be floating; load without quantisation, got {tensor.dtype} in {key}"
            )
        if tensor.is_meta:
            raise ValueError(f"layer {name!r}: weights must be loaded, got {key} on the meta device")
