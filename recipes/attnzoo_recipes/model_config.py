"""The configuration of a model as plain types, for a checkpoint that loads with weights_only=True."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from attnzoo_recipes.allowlist import ALLOWED, check_import, check_settings
from attnzoo_recipes.lm import DecoderLM

KEY = "attnzoo"
"""Key of a checkpoint's entry {"model": configuration, "tokenizer": settings}."""

_FREE_TO_CHANGE = {"backend", "dropout", "activation_checkpointing", "init", "init_std", "device", "dtype"}


def describe_attention(attention: Callable[[int], nn.Module]) -> dict[str, Any]:
    """{"class_path", "init_args"} of a class of attention modules, or of a functools.partial of one.

    Raises:
        ValueError: for anything else, such as a lambda, and for an argument that is not a plain value, a dataclass, or
            a list or dictionary of those.
    """
    parts: list[Any] = [attention]
    arguments: dict[str, Any] = {}
    if isinstance(attention, functools.partial):
        parts = [attention.func, *attention.args]
        arguments = attention.keywords
    classes = [part for part in parts if isinstance(part, type) and issubclass(part, nn.Module)]
    if len(classes) != 1:
        raise ValueError(
            "attention must be a class or functools.partial(class, option=value), so that a checkpoint can name it, "
            f"got {attention!r}"
        )
    init_args = {name: _plain(f"attention option {name}", value) for name, value in arguments.items()}
    return {"class_path": _class_path(classes[0]), "init_args": init_args}


def build_attention(
    description: Mapping[str, Any], allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> Callable[[int], nn.Module]:
    """The inverse of `describe_attention`; checks everything that it names against the allow-list before it imports.

    Args:
        description: {"class_path", "init_args"}.
        allowed: packages that it may name.
        where: what messages call the source of the description.

    Raises:
        ImportRefusedError: for the first import path outside `allowed`.
        ValueError: if the class cannot be imported, or the options do not fit it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_import(description["class_path"], allowed, where)
    check_settings(dict(description), allowed, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attention", type=Callable[[int], nn.Module])
    try:
        parsed = parser.parse_object({"attention": dict(description)})
    except ArgumentError as error:
        raise ValueError(f"the attention {dict(description)} of {where} cannot be built: {error}") from error
    attention: Callable[[int], nn.Module] = parser.instantiate_classes(parsed).attention
    return attention


def build_model(
    config: Mapping[str, Any], allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> DecoderLM:
    """A decoder of this configuration, newly initialised; other arguments are those of `build_attention`."""
    options = dict(config)
    return DecoderLM(options.pop("vocab_size"), build_attention(options.pop("attention"), allowed, where), **options)


def model_from_checkpoint(checkpoint: Mapping[str, Any], allowed: Iterable[str] = ALLOWED) -> DecoderLM:
    """The trained decoder in eval mode, from the dictionary that torch.load(path, weights_only=True) returns.

    Raises:
        ImportRefusedError: if it names a package outside `allowed`.
        ValueError: if it was not written by this recipe, or its weights do not fit its configuration.
    """
    if KEY not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError("the checkpoint was not written by attnzoo-pretrain: it names no attnzoo model")
    model = build_model(checkpoint[KEY]["model"], allowed)
    prefix = "model."
    state = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    check_state(model, state)
    model.load_state_dict(state)
    return model.eval()


def check_same_model(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> None:
    """Raise ValueError in one sentence if the model of a checkpoint differs from the configured one.

    Options that change neither the weights nor their meaning (backend, dropout, initialisation, ...) may differ.
    """
    theirs, ours = saved["attention"], configured["attention"]
    if theirs["class_path"] != ours["class_path"]:
        raise ValueError(
            f"the checkpoint holds a model with {theirs['class_path']}, but the configuration asks for "
            f"{ours['class_path']}: give the checkpoint's own --config, or start without it"
        )
    differences = _differences(theirs["init_args"], ours["init_args"])
    differences += _differences({**saved, "attention": None}, {**configured, "attention": None})
    if differences:
        raise ValueError(f"the checkpoint's model differs from the configured one in {', '.join(differences)}")


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError in one sentence that lists all weights that are missing, unknown or of the wrong shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in expected]
    problems += [
        f"{name} has shape {given[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise ValueError(f"the checkpoint's weights do not fit the model: {'; '.join(problems)}")


def _differences(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; an option that one side does not mention has its default there."""
    shared = [name for name in saved if name in configured and name not in _FREE_TO_CHANGE]
    return [
        f"{name} ({saved[name]!r} in the checkpoint, {configured[name]!r} now)"
        for name in shared
        if saved[name] != configured[name]
    ]


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(f"{name}.{field.name}", getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", inner) for key, inner in value.items()}
    raise ValueError(f"{name} must be a plain value, a dataclass or a list of such, got {value!r}")


def _class_path(cls: type) -> str:
    """The shortest import path: attnzoo.MultiHeadAttention rather than attnzoo.modules.mha.MultiHeadAttention."""
    package = cls.__module__.split(".")[0]
    if getattr(importlib.import_module(package), cls.__name__, None) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
