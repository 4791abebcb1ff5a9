"""The configuration of a model as plain types, for a checkpoint that loads with weights_only=True."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.costs import cache_bytes
from attnzoo.description import arguments_of, plain, public_mechanisms
from attnzoo_recipes.allowlist import ALLOWED, ImportRefusedError, added_packages, find_class
from attnzoo_recipes.data.tokenizers import Tokenizer, from_dict
from attnzoo_recipes.feed_forward import FeedForward, MultiHeadMixtureOfExperts, SwiGLU
from attnzoo_recipes.lm import DecoderLM, made_class

KEY = "attnzoo"
"""Key of a checkpoint's entry {"model": configuration, "tokenizer": settings}."""

ZOO = {f"attnzoo.{name}": cls for name, cls in public_mechanisms().items()}
"""The mechanisms that a checkpoint may name without further ado."""

_DEEPEST = 8

_FREE_TO_CHANGE = {"backend", "dropout", "activation_checkpointing", "init", "init_std", "device", "dtype"}


FEED_FORWARDS: dict[str, type[nn.Module]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls for cls in (SwiGLU, FeedForward, MultiHeadMixtureOfExperts)
}
"""The feed-forward layers that a checkpoint may name without further ado."""

_FEED_FORWARD_DEFAULTS = {
    "feed_forward": {"class_path": next(iter(FEED_FORWARDS)), "init_args": {}},
    "sparse_feed_forward": None,
}
"""What a checkpoint has that does not mention its feed-forward layers."""


MODEL_SETTINGS = (
    "embed_dim", "num_layers", "mlp_dim", "sparse_every", "parallel", "tie_embeddings", "norm_eps", "dropout",
    "init_std", "activation_checkpointing",
)  # fmt: skip
"""Arguments of the decoder that are numbers."""


def describe_attention(attention: Callable[[int], nn.Module]) -> dict[str, Any]:
    """{"class_path", "init_args"} of a class of attention modules, or of a functools.partial of one.

    Raises:
        ValueError: for anything else, such as a lambda, and for an argument that is not a plain value, a dataclass, or
            a list or dictionary of those.
    """
    return _description("attention", attention)


def describe_feed_forward(feed_forward: Callable[[int], nn.Module] | None) -> dict[str, Any] | None:
    """As `describe_attention`, of a class of feed-forward layers; None for None."""
    return None if feed_forward is None else _description("feed_forward", feed_forward)


def _description(kind: str, maker: Callable[[int], nn.Module]) -> dict[str, Any]:
    cls = made_class(maker)
    if cls is None:
        raise ValueError(
            f"{kind} must be a class or functools.partial(class, option=value), so that a checkpoint can name it, "
            f"got {maker!r}"
        )
    arguments = maker.keywords if isinstance(maker, functools.partial) else {}
    init_args = {name: plain(f"{kind} option {name}", value) for name, value in arguments.items()}
    return {"class_path": _class_path(cls), "init_args": init_args}


def build_attention(
    description: Mapping[str, Any], allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> Callable[[int], nn.Module]:
    """The inverse of `describe_attention`: a class of the zoo, or of a package that the user has added, with options.

    Options are plain values of the types in the class's signature; nothing that a description names is called but
    that class, and dataclasses among the types of its arguments. An option `device` is ignored: who builds the module
    says where.

    Args:
        description: {"class_path", "init_args"}.
        allowed: `ALLOWED` and packages that the user has added.
        where: what messages call the source of the description.

    Raises:
        ImportRefusedError: for any other class, and for a class_path among the options.
        ValueError: for an option that the class does not have, or whose value is not of its type.
    """
    return _maker(description, ZOO, ("attention", "mechanism"), allowed, where)


def build_feed_forward(
    description: Mapping[str, Any] | None, allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> Callable[[int], nn.Module] | None:
    """The inverse of `describe_feed_forward`, with the rules and arguments of `build_attention`."""
    words = ("feed-forward layer", "feed-forward layer")
    return None if description is None else _maker(description, FEED_FORWARDS, words, allowed, where)


def _maker(
    description: Mapping[str, Any],
    table: Mapping[str, type[nn.Module]],
    words: tuple[str, str],
    allowed: Iterable[str],
    where: str,
) -> Callable[[int], nn.Module]:
    """A class of the table, or of a package that the user has added, with the options of the description."""
    class_path, init_args = description["class_path"], description["init_args"]
    _refuse_classes(init_args, where, words[0])
    added = added_packages(allowed)
    cls = table.get(class_path) or find_class(class_path, added)
    if cls is None or not issubclass(cls, nn.Module):
        raise ImportRefusedError(
            f"{where} names {class_path}, which is neither a {words[1]} of attnzoo nor one of the packages given in "
            f"--allow-import ({', '.join(added) or 'none'}); if you trust it, add --allow-import "
            f"{class_path.rpartition('.')[0] or class_path}"
        )
    article = "an" if words[0][0] in "aeiou" else "a"
    options = arguments_of(cls, init_args, f"{where} has {article} {words[0]} whose")
    options.pop("device", None)
    return functools.partial(cls, **options)


def build_model(
    config: Mapping[str, Any], allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> DecoderLM:
    """A decoder of this configuration, newly initialised; other arguments are those of `build_attention`.

    Raises:
        ValueError: also if the configuration does not fit, or is too large for this machine.
    """
    options = dict(config)
    attention = build_attention(options.pop("attention"), allowed, where)
    given = [name for name in _FEED_FORWARD_DEFAULTS if name in options]
    feed_forwards: dict[str, Any] = {name: build_feed_forward(options.pop(name), allowed, where) for name in given}
    options = arguments_of(DecoderLM, options, f"{where} has a model whose")
    if "vocab_size" not in options:
        raise ValueError(f"{where} has a model without vocab_size")
    try:
        return DecoderLM(options.pop("vocab_size"), attention, **feed_forwards, **options)
    except (ValueError, TypeError, RuntimeError, MemoryError, ArithmeticError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the model of {where} cannot be built: {kind}{error}") from error


def figures(model: DecoderLM, tokens: int) -> dict[str, int | None]:
    """What a decoder costs with samples of `tokens` tokens, as a comparison shows it.

    Returns:
        "parameters"; "mlp_dim", None without `SwiGLU`; "flops_per_token" of training, three times those of the forward
        pass; "cache_bytes_per_token" of all layers in bfloat16, where a state that does not grow is divided by the
        tokens.
    """
    cache = sum(cache_bytes(layer.attn, tokens, torch.bfloat16) for layer in model.layers) // tokens
    return {
        "parameters": model.num_parameters,
        "mlp_dim": model.mlp_dim,
        "flops_per_token": 3 * model.flops(tokens) // tokens,
        "cache_bytes_per_token": cache,
    }


def saved_settings(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> Mapping[str, Any]:
    """A checkpoint's {"model": configuration, "tokenizer": settings}; says nothing about the values in it.

    Raises:
        ValueError: if it was not written by this recipe.
    """
    saved, state = checkpoint.get(KEY), checkpoint.get("state_dict")
    if not isinstance(saved, dict) or not isinstance(state, dict):
        raise ValueError(f"{where} was not written by attnzoo-pretrain: it names no attnzoo model")
    model = saved.get("model")
    model = model if isinstance(model, dict) else {}
    layers = {"attention": model.get("attention")}
    layers |= {name: model[name] for name in _FEED_FORWARD_DEFAULTS if model.get(name) is not None}
    for name, layer in layers.items():
        described = layer if isinstance(layer, dict) else {}
        if not isinstance(described.get("class_path"), str) or not isinstance(described.get("init_args"), dict):
            raise ValueError(f"{where} must describe its model's {name} by class_path and init_args")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise ValueError(f"{where} must hold a state_dict of tensors by name")
    if not isinstance(saved.get("tokenizer", {}), dict):
        raise ValueError(f"{where} must hold the settings of its tokenizer, got {saved['tokenizer']!r:.80}")
    return saved


def model_from_checkpoint(
    checkpoint: Mapping[str, Any], allowed: Iterable[str] = ALLOWED, where: str = "the checkpoint"
) -> DecoderLM:
    """The trained decoder in eval mode, from the dictionary that torch.load(path, weights_only=True) returns.

    Raises:
        ImportRefusedError: if it names a class that is neither in the zoo nor in a package that the user has added.
        ValueError: if it was not written by this recipe, or its weights do not fit its configuration.
    """
    config = saved_settings(checkpoint, where)["model"]
    prefix = "model."
    state = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    if isinstance(config.get("num_layers"), int) and config["num_layers"] > len(state):
        raise ValueError(
            f"{where} must have weights of every layer, got {len(state)} for {config['num_layers']} layers"
        )
    feed_forwards = [layer["class_path"] for name in _FEED_FORWARD_DEFAULTS if (layer := config.get(name)) is not None]
    if config["attention"]["class_path"] in ZOO and all(path in FEED_FORWARDS for path in feed_forwards):
        # Of no size yet, so that a configuration cannot ask for more memory than the checkpoint's weights take.
        with torch.device("meta"):
            check_state(build_model(config, allowed, where), state, where)
    model = build_model(config, allowed, where)
    check_state(model, state, where)
    model.load_state_dict(state)
    return model.eval()


def tokenizer_from_checkpoint(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None.

    Raises:
        ValueError: if its settings are not those of one.
    """
    settings = saved_settings(checkpoint, where).get("tokenizer")
    try:
        return None if settings is None else from_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer of {where} cannot be read: {type(error).__name__}: {error}") from error


def check_same_model(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> None:
    """Raise ValueError in one sentence if the model of a checkpoint differs from the configured one.

    Options that change neither the weights nor their meaning (backend, dropout, initialisation, ...) may differ.
    """
    for name, theirs, ours in _layers(saved, configured):
        if theirs != ours:
            raise ValueError(
                f"the checkpoint holds a model with {theirs or f'no {name}'}, but the configuration asks for "
                f"{ours or f'no {name}'}: give the checkpoint's own --config, or start without it"
            )
    differences = differences_of_models(saved, configured)
    if differences:
        raise ValueError(f"the checkpoint's model differs from the configured one in {', '.join(differences)}")


def differences_of_models(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """What differs between the model of a checkpoint and the configured one, apart from the options that may."""
    found = [f"{name} ({theirs} in the checkpoint, {ours} now)" for name, theirs, ours in _layers(saved, configured)
             if theirs != ours]  # fmt: skip
    saved, configured = ({**_FEED_FORWARD_DEFAULTS, **config} for config in (saved, configured))
    for name in ("attention", *_FEED_FORWARD_DEFAULTS):
        theirs, ours = saved.pop(name), configured.pop(name)
        if theirs is not None and ours is not None and theirs["class_path"] == ours["class_path"]:
            found += _differences(theirs["init_args"], ours["init_args"])
    return found + _differences(saved, configured)


def _layers(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[tuple[str, str | None, str | None]]:
    """Name and both class paths of the attention and the feed-forward layers."""
    saved, configured = ({**_FEED_FORWARD_DEFAULTS, **config} for config in (saved, configured))
    found = []
    for name in ("attention", *_FEED_FORWARD_DEFAULTS):
        theirs, ours = (None if config[name] is None else config[name]["class_path"] for config in (saved, configured))
        found.append((name, theirs, ours))
    return found


def check_state(model: nn.Module, state: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
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
    problems += [
        f"{name} is {value.layout}, {value.dtype}" for name, value in state.items() if not _is_plain_tensor(value)
    ]
    if problems:
        raise ValueError(f"the weights of {where} do not fit the model: {'; '.join(problems)}")


def _differences(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; an option that one side does not mention has its default there."""
    shared = [name for name in saved if name in configured and name not in _FREE_TO_CHANGE]
    return [
        f"{name} ({saved[name]!r} in the checkpoint, {configured[name]!r} now)"
        for name in shared
        if saved[name] != configured[name]
    ]


def _is_plain_tensor(value: Tensor) -> bool:
    return value.layout is torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)


def _refuse_classes(value: Any, where: str, kind: str, depth: int = 0) -> None:
    """Raise for a class_path at any depth of the options of an attention or another kind of layer."""
    if depth > _DEEPEST:
        raise ValueError(f"{where} has options of the {kind} that are nested more than {_DEEPEST} deep")
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise ImportRefusedError(
                f"{where} names {value['class_path']!r:.80} among the options of its {kind}, which must be plain "
                "values: it is not imported"
            )
        value = list(value.values())
    for inner in value if isinstance(value, list | tuple) else ():
        _refuse_classes(inner, where, kind, depth + 1)


def _class_path(cls: type) -> str:
    """The shortest import path: attnzoo.MultiHeadAttention rather than attnzoo.modules.mha.MultiHeadAttention."""
    package = cls.__module__.split(".")[0]
    if getattr(importlib.import_module(package), cls.__name__, None) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
