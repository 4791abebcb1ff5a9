"""What constructors take: every default given by its name, None where the signature says so, and nothing twice."""

from __future__ import annotations

import inspect
import types
import typing
from functools import cache

import pytest
from torch import nn

import attnzoo
from attnzoo.description import describe
from attnzoo.modules.base import Mechanism

CLASSES = {
    name: cls
    for name, cls in vars(attnzoo).items()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and name != "ClusteredHeadAttention"
}


@cache
def options(cls: type) -> dict[str, tuple[object, object]]:
    """Type and default of every argument that a constructor takes by name, those of its bases included."""
    found: dict[str, tuple[object, object]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base in (nn.Module, object):
            continue
        hints = typing.get_type_hints(base.__init__)
        parameters = inspect.signature(base.__init__).parameters.values()
        for one in parameters:
            if one.default is not one.empty:
                found.setdefault(one.name, (hints[one.name], one.default))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found


def made(name: str, **given: object) -> nn.Module:
    return CLASSES[name](16, **({} if name == "TABAttention" else {"num_heads": 4}) | given)


def attempt(name: str, option: str, value: object) -> nn.Module | str:
    """A module with this option, or why there is none."""
    try:
        return made(name, **{option: value})
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", CLASSES)
def test_a_default_can_be_given_by_its_name(name: str) -> None:
    for option, (_, default) in options(CLASSES[name]).items():
        module = attempt(name, option, default)
        # Or it is an option of a base that has no meaning here.
        assert not isinstance(module, str) or option in module


@pytest.mark.parametrize("name", CLASSES)
def test_none_is_an_argument_where_the_signature_says_so(name: str) -> None:
    for option, (kind, _) in options(CLASSES[name]).items():
        module = attempt(name, option, None)
        if kind is typing.Any or types.NoneType in typing.get_args(kind):
            assert option in module if isinstance(module, str) else describe(module), option
        else:
            assert isinstance(module, str), option
            assert option in module


def test_the_number_of_key_value_heads_is_not_given_twice() -> None:
    for name, right in (("MultiHeadAttention", 4), ("MultiQueryAttention", 1), ("MultipleHeadEmbeddingAttention", 1)):
        assert made(name, num_kv_heads=right).num_kv_heads == right
        for wrong in (2, True, "1"):
            with pytest.raises(ValueError, match=rf"^num_kv_heads must be .*, got {wrong!r}"):
                made(name, num_kv_heads=wrong)


def test_what_is_not_a_description_or_a_row_is_refused() -> None:
    for wrong in (None, [], "MultiHeadAttention"):
        with pytest.raises(ValueError, match="description must be a mapping, got"):
            attnzoo.build(wrong)
    with pytest.raises(ValueError, match=r"gate_rows must hold token numbers .*got \(-1,\)"):
        made("TABAttention", gate_rows=-1)
    assert made("TABAttention", gate_rows=0).gate_rows == (0,)


def test_an_option_that_a_class_of_ones_own_does_not_name_is_refused() -> None:
    class Plain(Mechanism):
        """Hands its options on, and reads none of them."""

        def __init__(self, embed_dim: int, num_heads: int, **options: object) -> None:
            super().__init__(embed_dim, num_heads, **options)

    class Normed(Plain):
        def __init__(self, embed_dim: int, num_heads: int, *, qk_norm: bool = False, **options: object) -> None:
            super().__init__(embed_dim, num_heads, qk_norm=qk_norm, **options)

    assert Normed(16, 4, qk_norm=True, dropout=0.5).dropout == 0.5
    with pytest.raises(ValueError, match="qk_norm must be True or False, got 2"):
        Normed(16, 4, qk_norm=2)
    for cls, option in ((Plain, "qk_norm"), (Plain, "bias"), (Normed, "bias"), (Normed, "nonsense")):
        with pytest.raises(TypeError, match=f"{cls.__name__} has no option {option!r}"):
            cls(16, 4, **{option: True})
