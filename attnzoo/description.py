"""A mechanism as plain types, and a mechanism from such a description: the call of its constructor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import numbers
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLACES = ("device", "dtype")


@functools.cache
def public_mechanisms() -> dict[str, type[nn.Module]]:
    """The mechanisms of `attnzoo` by name."""
    package = importlib.import_module("attnzoo")  # which imports this file
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


def describe(attn: nn.Module) -> dict[str, Any]:
    """A mechanism's class, arguments and pruned heads in types that JSON has; the inverse of `build`.

    Weights, device and dtype are not described: `build(describe(attn)).load_state_dict(attn.state_dict())` copies a
    module.

    Returns:
        {"class": name, "arguments": {name: value}}; "pruned_heads" too where heads were removed, and "set" with the
        arguments that were set on the module later, such as `attn.dropout = 0.1`. A `Rotary` is a mapping of its
        fields, a module among the arguments a description of its own.

    Raises:
        ValueError: for a module of another class than attnzoo's public mechanisms, or whose weights are not those
            that its arguments make, such as one with adapters.
    """
    cls = type(attn)
    if public_mechanisms().get(cls.__name__) is not cls:
        raise ValueError(f"attn must be a mechanism of attnzoo to be described, got {cls.__module__}.{cls.__name__}")
    description: dict[str, Any] = {"class": cls.__name__, "arguments": _arguments(attn)}
    if pruned := getattr(attn, "pruned_heads", ()):
        description["pruned_heads"] = list(pruned)
    with warnings.catch_warnings(action="ignore"):
        like = build(description, device="meta")
    later = {
        name: plain(name, value)
        for name, value in vars(attn).items()
        if name in _parameters(cls)[0] and name in vars(like) and value != vars(like)[name]
    }
    if later:
        description["set"] = later
    wanted, given = _shapes(like), _shapes(attn)
    if different := sorted(set(wanted.items()) ^ set(given.items())):
        raise ValueError(
            f"attn must have the weights that its arguments make, got {cls.__name__} with {different[0][0]} added, "
            "replaced or missing: merge adapters first"
        )
    return description


def build(
    description: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The mechanism that `describe` described, newly initialised.

    Only attnzoo's public mechanisms can be named: nothing is imported, and nothing called but their constructors and
    `Rotary`.

    Args:
        description: from `describe`; it may come from a file of somebody else.
        device: of the module.
        dtype: of the module.

    Raises:
        ValueError: for another class, an option that the class does not have, or a value that is not of its type.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"description must be a mapping, got {description!r:.200}")
    unknown = set(description) - {"class", "arguments", "pruned_heads", "set"}
    arguments, later = (description.get(key, {}) for key in ("arguments", "set"))
    pruned = description.get("pruned_heads", [])
    mappings = isinstance(arguments, Mapping) and isinstance(later, Mapping)
    if unknown or not mappings or not isinstance(pruned, list):
        raise ValueError(
            f"description must hold class, arguments and perhaps pruned_heads and set, got {description!r:.200}"
        )
    name = description.get("class")
    cls = public_mechanisms().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"class must be one of {', '.join(public_mechanisms())}, got {name!r:.80}")
    values = {
        key: build(value, device=device, dtype=dtype) if isinstance(value, Mapping) and "class" in value else value
        for key, value in arguments.items()
    }
    options = arguments_of(cls, values, "description:")
    if taken := [key for key in _PLACES if key in options]:
        raise ValueError(f"arguments must not hold {taken[0]}, which is an argument of build")
    places = {key: value for key, value in zip(_PLACES, (device, dtype), strict=True) if key in _parameters(cls)[0]}
    try:
        attn = cls(**options, **places)
    except (TypeError, RuntimeError, MemoryError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    if pruned:
        prune: Any = getattr(attn, "prune_heads")  # noqa: B009
        prune(_argument("pruned_heads", tuple[int, ...], pruned))
    for key, value in arguments_of(cls, later, "description: set").items():
        if key not in vars(attn):
            raise ValueError(f"set must hold arguments that can be set on a {name}, got {key}")
        setattr(attn, key, value)
    return attn


def arguments_of(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain values as arguments of a class, each checked against the type in the signature of its constructor.

    A class whose constructor passes **options on takes those of its base classes. An argument without a type takes
    any plain value; an argument that is a dataclass is made from a mapping of its fields.

    Raises:
        ValueError: for an unknown name, or a value that is not of its type: True is not a number, nor is "2".
    """
    known, is_open = _parameters(cls)
    unknown = [name for name in values if name not in known]
    if unknown and not is_open:
        raise ValueError(f"{where} {unknown[0]!r:.80} is no option of {cls.__name__}")
    return {str(name): _argument(f"{where} {name}", known.get(str(name), Any), value) for name, value in values.items()}


def plain(name: str, value: Any) -> Any:
    """An argument in types that JSON has.

    Raises:
        ValueError: naming the argument, for anything that is not a number, a text, a real tensor, a dataclass, or a
            list or mapping of those.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Tensor) and not value.is_complex():
        return torch.zeros(value.shape).tolist() if value.is_meta else value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(f"{name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [plain(name, inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", inner) for key, inner in value.items()}
    raise ValueError(f"{name} must be a plain value, a dataclass or a list of such, got {value!r}")


def _arguments(attn: Any) -> dict[str, Any]:
    """The arguments of a module's constructor in plain types, without device and dtype."""
    signature = inspect.signature(type(attn).__init__)
    given, options = attn.made_with
    arguments = dict(signature.bind(attn, *given, **options).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    del arguments["self"]
    if arguments.get("rope") is False:
        arguments["rope"] = None
    return {
        name: describe(value) if isinstance(value, nn.Module) else plain(name, value)
        for name, value in arguments.items()
        if name not in _PLACES
    }


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """Names and types of a constructor's arguments, and whether it takes others as well."""
    known: dict[str, Any] = {}
    is_open = False
    for base in cls.__mro__:
        if base in (nn.Module, object) or "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        hints = _type_hints(base.__init__)  # type: ignore[misc]
        for one in parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                known.setdefault(one.name, hints.get(one.name, Any))
        is_open = any(one.kind is one.VAR_KEYWORD for one in parameters)
        if not is_open:
            break
    return known, is_open


@functools.cache
def _type_hints(function: Any) -> dict[str, Any]:
    # Names that a module imports for type checkers only are not there: such arguments take any plain value.
    with contextlib.suppress(NameError, TypeError, AttributeError):
        return typing.get_type_hints(function)
    return {}


def _argument(name: str, kind: Any, value: Any) -> Any:
    """The value as an argument of that type, or ValueError."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        others = [one for one in inner if one is not types.NoneType]
        if value is not None and len(others) == 1:
            return _argument(name, others[0], value)
        for one in inner:
            with contextlib.suppress(ValueError):
                return _argument(name, one, value)
    elif kind is float and type(value) in (int, float):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif kind in (int, bool, str, types.NoneType):
        if type(value) is kind:
            return value
    elif origin is typing.Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        try:
            return kind(**arguments_of(typing.cast(type, kind), value, f"{name} has"))  # type: ignore[operator]
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{name} cannot be made of {value!r:.80}: {error}") from error
    elif isinstance(kind, type) and isinstance(value, nn.Module) and isinstance(value, kind):
        return value
    elif kind is Any or (origin in (dict, Mapping) and isinstance(value, Mapping)):
        return plain(name, value)
    elif origin in (list, tuple, Sequence, Iterable) and isinstance(value, list | tuple):
        kinds = [inner[0] if inner else Any] * len(value)
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            kinds = list(inner)
        if len(kinds) == len(value):
            items = [_argument(name, one, item) for one, item in zip(kinds, value, strict=True)]
            return tuple(items) if origin is tuple else items
    shown = kind.__name__ if isinstance(kind, type) and not inner else str(kind).replace("typing.", "")
    raise ValueError(f"{name} must be {shown}, got {value!r:.80}")
