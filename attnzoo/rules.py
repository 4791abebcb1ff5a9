"""What single arguments may be: one table of options for all mechanisms, and the rules that it is made of.

A rule is one or more pairs of a test and the words for it; the first test that fails is the message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

Rule = tuple[tuple[Callable[[Any], bool], str], ...]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that modules and caches may have."""
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes of lengths, positions and indices."""


def is_integer(value: object) -> bool:
    """Whether a value counts: Python's integers and numpy's, not True and False."""
    return type(value) is int or (isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool))


def is_real(value: object) -> bool:
    """Whether a value is a real number, not True or False; infinity and nan are."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_integer_tensor(value: object) -> bool:
    """Whether a value is a tensor of integers, of a dtype that can be compared and added: not uint16 to uint64."""
    return isinstance(value, Tensor) and value.dtype in INTEGERS


def one_of(*choices: str, words: str = "") -> Rule:
    """A string, one of these; words say so in another way."""
    words = words or f"be one of {', '.join(map(repr, choices))}"
    return ((lambda value: isinstance(value, str) and value in choices, words),)


def _is_pair(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(test, value))


def _is_device(value: object) -> bool:
    try:
        torch.empty(0, device=value)  # type: ignore[call-overload]
    except Exception:
        # Each backend that is missing raises an error of its own.
        return False
    return not isinstance(value, bool)


INTEGER: Rule = ((is_integer, "be an integer"),)
SIZE: Rule = (*INTEGER, (lambda value: value >= 1, "be at least 1"))
COUNT: Rule = (*INTEGER, (lambda value: value >= 0, "not be negative"))
NUMBER: Rule = ((is_number, "be a finite number"),)
NOT_NEGATIVE: Rule = (*NUMBER, (lambda value: value >= 0, "not be negative"))
POSITIVE: Rule = (*NUMBER, (lambda value: value > 0, "be positive"))
SWITCH: Rule = ((lambda value: isinstance(value, bool), "be True or False"),)
SWITCH_OR_AUTO: Rule = (
    (lambda value: isinstance(value, bool | str) and value in (True, False, "auto"), "be True, False or 'auto'"),
)
SWITCH_OR_JOINT: Rule = (
    (lambda value: isinstance(value, bool | str) and value in (True, False, "joint"), "be True, False or 'joint'"),
)
SIZES: Rule = ((lambda value: _is_pair(value, is_integer), "be two integers"),)

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("causal", "bias", "o_bias", "out_bias", "k_rope_bias", "q_bias", "kv_b_bias", "kv_norm", "qk_norm", "alibi",
         "gate", "normalize", "sum_norm", "router_noise", "pre_compose", "post_compose", "query_wise", "key_wise",
         "static_base", "efficient", "interaction_bias", "separate_static", "shared_key", "feature_norm",
         "mixing_per_head", "mixing_trainable", "probe_causal", "allow_grad", "head_out_bias",
         "conv_query_memory", "gate_bias", "k_shift", "v_shift", "pro", "head_norm"), SWITCH,
    ),
    **dict.fromkeys(("absorb", "sparse", "packed"), SWITCH_OR_AUTO),
    **dict.fromkeys(
        ("sink_tokens", "rope_head_dim", "qk_rope_head_dim", "num_shared_heads", "num_routed_active", "sample_topk",
         "lepe_kernel", "batch_size", "depth"), COUNT,
    ),
    **dict.fromkeys(("sliding_window", "max_length", "chunk_size"), SIZE),
    **dict.fromkeys(
        ("init_std", "embed_init_std", "qk_norm_eps", "output_norm_eps", "norm_eps", "dyn_norm_eps", "feature_eps",
         "normalizer_eps", "head_norm_eps", "eps", "aux_loss_coef", "switch_coef", "z_coef", "mi_coef", "cv_coef"),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("logit_softcap", "mixing_sigma"), POSITIVE),
    **dict.fromkeys(("grid", "block_grid"), SIZES),
    "output_scale": NUMBER,
    **dict.fromkeys(("dropout", "lambda_init"), (*NUMBER, (lambda value: 0 <= value < 1, "lie in [0, 1)"))),
    "scale": ((lambda value: is_number(value) and value != 0, "be a finite number other than 0"),),
    "sink": one_of("zero", "learned", words="be None, 'zero' or 'learned'"),
    "init": one_of("normal", "xavier", words="be 'normal' or 'xavier'"),
    "ste": one_of("all", "active", "none", words="be 'all', 'active' or 'none'"),
    "gate_type": one_of("elementwise", "headwise", words="be 'elementwise' or 'headwise'"),
    "output_norm": one_of("none", "rmsnorm", words="be 'none' or 'rmsnorm'"),
    "normalizer": one_of("none", "mixed", "compat"),
    "mixing_norm": one_of("row", "col"),
    "extrapolation": one_of("error", "clamp", "window"),
    "output_gate": one_of("sigmoid", "silu", words="be None, 'sigmoid' or 'silu'"),
    "decay_times": (
        (lambda value: _is_pair(value, is_number) and 0 < value[0] <= value[1],
         "be two times with 0 < first <= last, or None"),
    ),
    "mixing_clip": (
        (lambda value: _is_pair(value, is_number) and 0 <= value[0] < value[1],
         "be two bounds with 0 <= low < high, or None"),
    ),
    **dict.fromkeys(("precision", "scale_w"), (
        (lambda value: isinstance(value, tuple | list) and all(is_number(one) and one > 0 for one in value),
         "hold positive numbers"),
    )),
    "dtype": (
        (lambda value: isinstance(value, torch.dtype) and value in FLOATS, f"be one of {', '.join(map(str, FLOATS))}"),
    ),
    "device": ((_is_device, "be a device that is there"),),
}  # fmt: skip
"""Every option that is checked by itself; sizes follow `SIZE`."""

MAY_BE_NONE = frozenset(
    ("o_bias", "out_bias", "gate_bias", "k_rope_bias", "rope_head_dim", "qk_rope_head_dim", "num_shared_heads",
     "num_routed_active", "sliding_window", "qk_norm_eps", "logit_softcap", "scale", "sink", "mixing_clip",
     "grid", "block_grid", "dtype", "device", "lambda_init",
     "output_gate", "decay_times", "chunk_size")
)  # fmt: skip


def check(name: str, value: object, rule: Rule) -> None:
    """Raise ValueError unless the value follows the rule."""
    for holds, words in rule:
        if not holds(value):
            raise ValueError(f"{name} must {words}, got {value!r}")


def check_options(**options: object) -> None:
    """Raise ValueError unless every option follows its rule in `RULES`."""
    for name, value in options.items():
        if name not in RULES:
            raise TypeError(f"{name} is not an option of the mechanisms' base, got {value!r}")
        if value is not None or name not in MAY_BE_NONE:
            check(name, value, RULES[name])


def check_sizes(**sizes: Any) -> tuple[int, ...]:
    """The sizes as Python's integers; raises ValueError unless each is an integer of at least 1."""
    for name, size in sizes.items():
        check(name, size, SIZE)
    return tuple(map(int, sizes.values()))


def describe(value: object) -> str:
    """A value for a message, of what may be large its kind."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of {value.ndim} dimensions"
    shown = repr(value)
    return shown if len(shown) < 60 else f"a {type(value).__name__}"


def number_of(name: str, value: object) -> int:
    """An integer of Python or numpy, or an integer tensor of one element, as Python's; nothing is rounded.

    Raises:
        ValueError: for anything else, True and False included.
    """
    if isinstance(value, Tensor) and is_integer_tensor(value) and value.numel() == 1:
        return int(value)
    if not is_integer(value):
        raise ValueError(f"{name} must be integers, got {describe(value)}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def numbers_of(name: str, values: object) -> list[int]:
    """`number_of` of each of several."""
    if not isinstance(values, Iterable) or isinstance(values, str) or (isinstance(values, Tensor) and not values.ndim):
        raise ValueError(f"{name} must be several integers, got {describe(values)}")
    return [number_of(name, value) for value in values]
