"""Calls that make no sense, drawn over the constructors and forwards of all mechanisms.

Each is refused by a ValueError or TypeError that names the argument and the value, and changes neither the module nor
the cache. `pytest -m slow tests/test_bad_calls.py` draws 1,500 of them.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import AttentionMask, Rotary
from tests import zoo
from tests.zoo import LACKS, MECHANISMS, E, build

B, T, S, ROOM, HELD = 2, 6, 7, 20, 5
NAMES = (*MECHANISMS, "chai")
nan, inf = math.nan, math.inf
NONE_AT_ALL = -inf


class Anything:
    """Something that no argument is."""

    def __repr__(self) -> str:
        return "Anything()"


# Constructors: bad values by the type that an option's annotation names

COMMON: tuple[Any, ...] = (Anything(), [2], {}, 1j)
POOLS: dict[str, tuple[Any, ...]] = {
    "bool": ("no", "", 1, 0, 2.0, nan, *COMMON),
    "int": (-1, -(2**40), 2.5, 3.0, True, False, "4", nan, inf, torch.tensor([2, 3]), np.float32(2), *COMMON),
    "float": (nan, inf, NONE_AT_ALL, "0.1", "", True, np.array([0.1, 0.2]), torch.tensor([0.1, 0.2]), *COMMON),
    "str": ("nonsense", "", 1, True, 0.5, b"zero", ["zero"], *COMMON),
    "float | str": (nan, inf, "nonsense", "", True, b"visible", np.array([0.1, 0.2]), *COMMON),
    "bool | str": ("no", 1, 0, 2.5, None, *COMMON),
    "Rotary": (True, "half", 10000.0, 0, 1, "", *COMMON),
    "torch.dtype": (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, "float32", float, *COMMON),
    "torch.device | str": ("nowhere", "cuda:-1", "cpu:x", 2.5, True, *COMMON),
    "tuple[int, int]": ((1,), (1, 2, 3), 5, "ab", (2.5, 2), ("a", "b"), (True, 2), (nan, 1), (0, 0), *COMMON),
    "tuple[float, float]": ((1.0,), (0.0, nan), (1.0, 0.5), (-1.0, 1.0), "ab", 0.5, ("a", "b"), (0.0, inf), *COMMON),
    "Sequence[float]": ((1.0,), (1.0, nan), (-1.0, 2.0), (inf, 1.0), ("a", "b"), 2.0, "ab", (True, 2.0), *COMMON),
    "Tensor | Frequencies": ("x", 1.0, torch.ones(9, 9), torch.ones(1, 2) * 1j, torch.tensor([[nan, nan]]), *COMMON),
}
NEVER_NEGATIVE = ("_eps", "_coef", "dropout", "init_std", "softcap", "sigma")
LEAST_ONE = (
    "_dim", "kdim", "vdim", "num_heads", "num_kv_heads", "_rank", "_size", "_window", "_groups", "num_blocks",
    "num_experts", "heads_per_expert", "num_clusters", "probe_tokens",
)  # fmt: skip


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The options of a constructor, those that it hands to its base too."""
    own = inspect.signature(cls.__init__).parameters
    found = {name: p for name, p in own.items() if name not in ("self", "options", "attn")}
    if "options" in own:
        base = next(base for base in cls.__mro__[1:] if "__init__" in vars(base))
        found = options_of(base) | found
    if issubclass(cls, attnzoo.MultiHeadAttention | attnzoo.MultiQueryAttention):
        del found["num_kv_heads"]
    return found


def bad_values(name: str, parameter: inspect.Parameter) -> tuple[Any, ...]:
    """What that option refuses."""
    annotation = str(parameter.annotation)
    optional = annotation.endswith(" | None")
    values = POOLS[annotation.removesuffix(" | None")]
    values += () if optional else (None,)
    if annotation.startswith("float") and name.endswith(NEVER_NEGATIVE):
        values += (-1e-6, -3)
    if annotation.startswith("int") and name.endswith(LEAST_ONE) and name not in ("rope_head_dim", "qk_rope_head_dim"):
        values += (0,)
    if name == "prune_tolerance":  # the logarithm of a share; -inf is none of it, and accepted
        values = (*(value for value in values if value is not NONE_AT_ALL), 0.0, 1e-3)
    return values


def class_of(name: str) -> type[nn.Module]:
    return attnzoo.ClusteredHeadAttention if name == "chai" else type(MECHANISMS[name]())


def constructor(draw: random.Random) -> tuple[Callable[[], Any], str, Any, str]:
    """A bad call of a constructor: the call, the argument, its value, and what it is for a message."""
    name = draw.choice(NAMES)
    cls = class_of(name)
    options = options_of(cls)
    option = draw.choice(list(options))
    value = draw.choice(bad_values(option, options[option]))
    sizes: dict[str, Any] = {"embed_dim": E, "num_heads": 4}
    if name == "chai":
        sizes = {"attn": build("mha"), "num_clusters": 2}
    elif "normalizer" in options and draw.random() < 0.5:
        sizes |= {"causal": False, "grid": (4, 4), "block_grid": (2, 2)}
        sizes.pop({"grid": "grid", "block_grid": "block_grid"}.get(option, ""), None)
    call = lambda: cls(**sizes | {option: value})  # noqa: E731
    return call, option, value, f"{cls.__name__}({option}={value!r})"


SCALING: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "max_position_embeddings": 64},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, "mscale": 1.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
NO_NUMBERS = (nan, inf, -1.0, "2", True, [1.0, "x"], Anything(), 1j)


def rotary(draw: random.Random) -> tuple[Callable[[], Any], str, Any, str]:
    """A bad call of `Rotary`."""
    kind = draw.choice(("theta", "dim", "style", "scaling", "a number of scaling"))
    if kind != "a number of scaling":
        value = draw.choice(
            {
                "theta": (1.0, -2, nan, inf, "10000", True, None, 1j, [2.0]),
                "dim": (0, -2, 3, 2.5, 4.0, True, "4", [4], nan),
                "style": ("halves", "", None, 1, True, ["half"]),
                "scaling": ("linear", 2.0, True, ["linear"], {"rope_type": "x"}, {"rope_type": ["linear"]}, {}),
            }[kind]
        )
        return lambda: Rotary(**{kind: value}), kind, value, f"Rotary({kind}={value!r})"
    rope_type = draw.choice(tuple(SCALING))
    key = draw.choice(tuple(SCALING[rope_type]))
    value = draw.choice(NO_NUMBERS)
    scaling = {"rope_type": rope_type, **SCALING[rope_type], key: value}
    return lambda: Rotary(scaling=scaling), key, value, f"Rotary(scaling={scaling})"


# Calls


def make(name: str, draw: random.Random, causal: bool) -> nn.Module:
    """A mechanism as tests have it, causal or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name == "chai":
            module = attnzoo.ClusteredHeadAttention(build("mha", dtype=torch.float32), draw.choice((2, 4)))
        else:
            options: dict[str, Any] = {} if causal else {"causal": False}
            if draw.random() < 0.4 and not name.startswith(("mla-pre", "linear", "rcmha")):
                options["rope"] = None
            module = build(name, dtype=torch.float32, **options)
    return module.eval() if name == "chai" or draw.random() < 0.5 else module.train()


def bad_inputs(width: int, batch: int, tokens: int) -> Iterator[Any]:
    x = torch.randn(batch, tokens, width)
    yield from (x.tolist(), x.numpy(), "x", 1.5, (x,), {}, Anything())
    yield from (x.double(), x.half(), x.bfloat16(), x.long(), x > 0, x + 1j, x.to("meta"), x.to_sparse())
    yield from (x[..., 1:], x[0], x[None], x.sum(), torch.nested.nested_tensor([x[0], x[1, :3]]))


def bad_masks(batch: int, tokens: int, keys: int) -> Iterator[tuple[str, Any]]:
    seen = torch.ones(tokens, keys, dtype=torch.bool)
    for value in (seen.float(), seen.long(), seen.tolist(), "causal", True, 0, {}, Anything(), seen + 1j):
        yield "mask", value
    yield "mask", torch.ones(tokens + 1, keys + 1, dtype=torch.bool)
    yield "mask", torch.ones(batch + 1, 1, 1, keys, dtype=torch.bool)
    yield "mask", torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    yield "mask", seen.to("meta")
    yield "lengths", AttentionMask.padding([keys + 1] * batch)
    yield "lengths", AttentionMask.padding([1] * (batch + 1))
    yield "real_queries", AttentionMask(real_queries=torch.ones(batch, tokens + 1, dtype=torch.bool))
    yield "mask", AttentionMask(lengths=torch.ones(batch, dtype=torch.long, device="meta"))


def bad_positions(batch: int, tokens: int) -> Iterator[Any]:
    at = torch.arange(tokens)
    yield from (at.float(), at > 0, at + 1j, at.tolist(), "first", 3, True, -1 - at, at[:-1], at[None, None])
    yield from (at.expand(batch + 1, -1), Anything(), at.double() + nan, {})


def bad_caches(name: str) -> Iterator[Any]:
    yield from ({}, [], "cache", 0, False, Anything(), torch.zeros(2), (None,))
    # Of another mechanism, and of other sizes.
    yield build("gqa" if name.startswith(("linear", "mhla")) else "linear", dtype=torch.float32).init_cache(B, ROOM)
    yield attnzoo.MultiHeadAttention(48, 6).init_cache(B, ROOM)


def forward(draw: random.Random) -> tuple[Callable[[], Any], str, Any, str]:
    """A bad call of a module, which has a cache with tokens in it where it is causal and the draw says so."""
    name = draw.choice(NAMES)
    causal = name == "chai" or "bidirectional" in LACKS.get(name, ()) or draw.random() < 0.6
    module = make(name, draw, causal)
    arguments: dict[str, Any] = {"x": torch.randn(B, draw.choice((1, T)), E)}
    crossing = not causal and "context" not in LACKS.get(name, ()) and draw.random() < 0.5
    if crossing:
        arguments["context"] = torch.randn(B, S, E)
        if getattr(module, "rope", None) is not None:
            arguments["positions"] = (torch.arange(arguments["x"].shape[1]), torch.arange(S))
    if causal and draw.random() < 0.5:
        arguments["cache"] = module.init_cache(B, ROOM)
        with torch.no_grad():
            module.eval()(torch.randn(B, HELD, E), cache=arguments["cache"])
            if name != "chai":
                module.train(draw.random() < 0.5)
    tokens = arguments["x"].shape[1]
    keys = S if crossing else tokens + (HELD if "cache" in arguments else 0)
    kinds = ["x", "mask", "positions", "cache", "context"]
    kind, what = draw.choice(kinds), ""
    value: Any
    if kind == "x":
        value = draw.choice(list(bad_inputs(E, B, tokens if tokens > 1 else T)))
    elif kind == "mask":
        what, value = draw.choice(list(bad_masks(B, tokens, keys)))
    elif kind == "positions":
        value = draw.choice(list(bad_positions(B, tokens)))
        if crossing and draw.random() < 0.8:
            good = (torch.arange(tokens), torch.arange(S))
            value = draw.choice([(value, good[1]), (good[0], value), good[:1], (*good, good[0])])
    elif kind == "cache":
        value = draw.choice(list(bad_caches(name)))
        if not causal:
            value = build("mha", dtype=torch.float32).init_cache(B, ROOM)
        elif draw.random() < 0.4:
            full = module.init_cache(B, tokens) if name != "chai" else module.init_cache(B + 1, ROOM)
            if name != "chai":
                with torch.no_grad(), warnings.catch_warnings():
                    module(torch.randn(B, tokens, E), cache=full)
            value = draw.choice([full, module.init_cache(B + 1, ROOM), module.init_cache(B, ROOM, dtype=torch.float64)])
    else:
        contexts = [torch.randn(B, S, E)] if causal and name != "static-context" else list(bad_inputs(E, B, S))
        contexts += [torch.randn(B + 1, S, E), (torch.randn(B, S, E),) * 3, (torch.randn(B, S, E),)]
        value = draw.choice(contexts)
    arguments[kind] = value
    x = arguments.pop("x")
    return (lambda: module(x, **arguments)), what or kind, value, f"{name}({kind}={value!r}), {arguments.keys()}"


SIZES = (-1, 2.5, True, "4", None, nan, [2], Anything())
PLACES: dict[str, tuple[Any, ...]] = {"dtype": POOLS["torch.dtype"], "device": POOLS["torch.device | str"]}


def cache(draw: random.Random) -> tuple[Callable[[], Any], str, Any, str]:
    """A bad call of what makes and moves caches."""
    name = draw.choice(NAMES)
    module = make(name, draw, True)
    kind = draw.choice(("batch_size", "max_length", "dtype", "device", "truncate", "reorder"))
    arguments: dict[str, Any] = {"batch_size": B, "max_length": ROOM}
    if kind in arguments or kind in PLACES:
        value = draw.choice(PLACES.get(kind, SIZES))
        arguments[kind] = value
        return lambda: module.init_cache(**arguments), kind, value, f"{name}.init_cache({kind}={value!r})"
    held = module.init_cache(B, ROOM)
    with torch.no_grad():
        module.eval()(torch.randn(B, HELD, E), cache=held)
    arguments = {"cache": held}
    if kind == "truncate":
        value = draw.choice((*SIZES, HELD + 1))
        return lambda: arguments["cache"].truncate(value), "length", value, f"{name}: truncate({value!r})"
    value = draw.choice(
        (
            [1, 0],
            1,
            None,
            torch.ones(B),
            torch.ones(B) > 0,
            torch.tensor([0, B]),
            torch.tensor([-1, 0]),
            torch.arange(9),
        )
    )
    return lambda: arguments["cache"].reorder(value), "index", value, f"{name}: reorder({value!r})"


def mask(draw: random.Random) -> tuple[Callable[[], Any], str, Any, str]:
    """A bad call of `AttentionMask`."""
    kind = draw.choice(("lengths", "cu_seqlens", "mask", "real_queries"))
    no_integers = ([1.5], "ab", 3, None, [True], [[1]], torch.ones(2), torch.ones(2, 2).long(), Anything(), [nan])
    no_booleans = ([[True]], "ab", 1, torch.ones(2, 2), torch.ones(2, 2).long(), {}, torch.ones(2) * 1j)
    if kind == "lengths":
        value = draw.choice((*no_integers, [3, -1], torch.tensor([1j])))
        return lambda: AttentionMask.padding(value), kind, value, f"padding({value!r})"
    if kind == "cu_seqlens":
        value = draw.choice((*no_integers, [1, 2], [0, 3, 2], torch.tensor([0, 2])))
        return lambda: AttentionMask.packed(value), kind, value, f"packed({value!r})"
    value = draw.choice(no_booleans)
    name = "dense_mask" if kind == "mask" else kind
    return lambda: AttentionMask(**{name: value}), kind, value, f"AttentionMask({name}={value!r})"


KINDS = (constructor, rotary, forward, cache, mask)


def state_of(thing: Any) -> Any:
    """Everything that a module or a cache is, to be compared."""
    if isinstance(thing, nn.Module):
        own = [
            {key: id(value) for key, value in vars(part).items() if not key.startswith("_") or key == "_buffers"}
            for part in thing.modules()
        ]
        return own, {name: tensor.clone() for name, tensor in thing.state_dict().items()}
    if hasattr(thing, "buffers") and hasattr(thing, "length"):
        return thing.length, id(getattr(thing, "clusters", None)), [buffer.clone() for buffer in thing.buffers]
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def mentions(message: str, value: Any) -> bool:
    """Whether a message says what it got: the value, or of a large one its type, dtype, shape, place or parts."""
    # Where another argument decides, it is that one's value.
    words = [repr(value), str(value), type(value).__name__, "got causal=True", "got causal=False"]
    for part in (value, *(value if isinstance(value, tuple) else ())):
        words += [repr(part), type(part).__name__]
        for tensor in (part, *(vars(part).values() if isinstance(part, AttentionMask) else ())):
            if isinstance(tensor, Tensor):
                words += [str(tensor.dtype), str(tensor.device), str(tensor.layout)]
                words += ["nested"] if tensor.is_nested else [str(tuple(tensor.shape)), *map(str, tensor.shape)]
                if tensor.device.type == "cpu" and not tensor.is_nested and tensor.numel() < 99:
                    words += map(str, tensor.flatten().tolist())
    if hasattr(value, "layout") and hasattr(value, "length"):
        words += [str(value.layout), str(value.batch_size), str(value.max_length), "float64"]
    if isinstance(value, tuple | list | dict):
        words += [f"{len(value)} parts", *map(repr, value.values() if isinstance(value, dict) else value)]
        words += [] if value else ["None"]
    return any(word in message for word in words)


def problem(seed: int) -> str | None:
    """What is wrong with how the bad call of that seed ends, or None."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem_of(*draw.choices(KINDS, weights=(8, 1, 9, 1, 1))[0](draw))


def problem_of(call: Callable[[], Any], argument: str, value: Any, what: str) -> str | None:
    """What is wrong with how that bad call ends, or None."""
    held = inspect.getclosurevars(call).nonlocals
    things = [held.get("module"), *dict(held.get("arguments") or {}).values()]
    before = [state_of(thing) for thing in things]
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    else:
        return f"{what}: accepted"
    if not re.search(rf"\b{argument}\b", message):
        return f"{what}: {argument} is not in the message: {message}"
    if not mentions(message, value):
        return f"{what}: the value is not in the message: {message}"
    if not same(before, [state_of(thing) for thing in things]):
        return f"{what}: the module or the cache has changed after: {message}"
    return None


def problems(seeds: range) -> list[str]:
    return [f"{seed}: {found}" for seed in seeds if (found := problem(seed)) is not None]


def test_bad_calls_are_refused():
    assert problems(range(150)) == []


@pytest.mark.slow
def test_bad_calls_are_refused_widely():
    assert problems(range(1000, 2500)) == []


def test_every_option_is_drawn_from():
    """An option with an annotation of a new kind needs bad values of its own."""
    for name in NAMES:
        for option, parameter in options_of(class_of(name)).items():
            assert bad_values(option, parameter), f"{name}: {option}"


@pytest.mark.parametrize("name", MECHANISMS)
def test_integers_of_numpy_are_integers(name, monkeypatch):
    x = torch.randn(B, T, E, dtype=torch.float64)
    expected = build(name).eval()
    for size in ("H", "G"):
        monkeypatch.setattr(f"tests.zoo.{size}", np.int64(getattr(zoo, size)))
    module = build(name, embed_dim=np.int64(E)).eval()
    module.load_state_dict(expected.state_dict())
    cache = module.init_cache(np.int32(B), np.int64(T))
    with torch.no_grad():
        assert torch.equal(module(x), expected(x))
        parts = [module(part, cache=cache) for part in x.split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected(x))


def test_rope_false_is_no_rope():
    for name in ("gqa", "gta", "kha-mla", "mla", "dcmha", "talking-heads", "moh", "moa", "linear-lm", "mhla"):
        assert build(name, rope=False).rope is None, name


def test_autocast_takes_inputs_in_the_dtype_of_either_side():
    module = build("gqa", dtype=torch.float32)
    x = torch.randn(B, T, E)
    for bits in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=r"x must have the dtype of the weights torch.float32, got torch\.\w*16"):
            module(x.to(bits))
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x.to(bits)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"float32, got torch\.float64"):
        module(x.double())
