"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): what is rotated, by which angle, in which layout.

Angles are computed in float64 and rounded once. No table is a module buffer, so `module.to(torch.bfloat16)` cannot
damage the frequencies.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.rules import NOT_NEGATIVE, POSITIVE, SWITCH, Rule, check, is_integer, is_number, one_of
from attnzoo.tracing import is_readable, is_traced

STYLES = ("half", "interleaved", "interleaved_to_half")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "ntk": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_THETA: Rule = ((lambda value: is_number(value) and value > 1, "be finite and greater than 1"),)
_WIDTH = "be even and at least 2 to be rotated"
_LENGTH: Rule = ((lambda value: is_integer(value) and value >= 2, "be an integer of at least 2"),)
_FACTORS: Rule = (
    (lambda value: isinstance(value, list | tuple) and all(is_number(x) and x > 0 for x in value),
     "be a list of positive numbers"),
)  # fmt: skip
_VALUES: dict[str, Rule] = {
    **dict.fromkeys(("factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor"), POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim", "high_freq_factor"), NOT_NEGATIVE),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), _LENGTH),
    **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
    "truncate": SWITCH,
    "rope_theta": _THETA,
}
"""What the numbers of `scaling` may be."""
_ALWAYS = ("rope_type", "type", "max_position_embeddings", "original_max_position_embeddings", "rope_theta")


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated.

    With r the rotary width, n = r / 2 and position p, pair i of features turns by p f_i, f_i = theta^(-2i/r),
    unless scaled:

        u' = a (u cos - v sin),   v' = a (v cos + u sin)

    Args:
        theta: base of the frequencies.
        dim: rotary width r; the first r features of a head rotate. Default: the whole head.
        style: "half" pairs feature i with i + n (Llama, GPT-NeoX); "interleaved" pairs 2i with 2i + 1 (GPT-J,
            DeepSeek); "interleaved_to_half" reads the latter and writes the former, for cached keys of
            DeepSeek checkpoints.
        scaling: None or a mapping with transformers' key names: rope_type "linear", "dynamic", "ntk", "yarn",
            "llama3" or "longrope", and that type's numbers. A yarn or longrope without `factor` takes
            max_position_embeddings / original_max_position_embeddings.

    Raises:
        ValueError: for a value outside its rule; a missing key of `scaling` is named.
    """

    theta: float = 10000.0
    dim: int | None = None
    style: str = "half"
    scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check("theta", self.theta, _THETA)
        check("style", self.style, one_of(*STYLES))
        if self.dim is not None:
            _check_width("dim", self.dim)
        if self.scaling is not None:
            if not isinstance(self.scaling, Mapping):
                raise ValueError(f"scaling must be None or a mapping, got {self.scaling!r}")
            scaling = dict(self.scaling)
            scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", None))
            _check_scaling(scaling)
            if scaling.get("rope_theta") not in (None, self.theta):
                raise ValueError(f"scaling['rope_theta'] must be theta, got {scaling['rope_theta']} and {self.theta}")
            object.__setattr__(self, "scaling", {name: _number(value) for name, value in scaling.items()})

    def __hash__(self) -> int:
        # Nothing is kept in __dict__ but the fields: jsonargparse takes the options of a default from there.
        scaling = (self.scaling or {}).items()
        scaled = frozenset((name, tuple(value) if isinstance(value, list) else value) for name, value in scaling)
        return hash((self.theta, self.dim, self.style, scaled))

    @property
    def kind(self) -> str:
        """The scaling type."""
        return "default" if self.scaling is None else str(self.scaling["rope_type"])

    @property
    def scaling_factor(self) -> float:
        """By how much the context is stretched; 1 without a factor."""
        return 1.0 if self.scaling is None else _factor(self.scaling)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies of all positions change with the current length."""
        return self.kind in ("dynamic", "longrope")

    def width(self, head_dim: int) -> int:
        """The rotary width r of a head of that many features; refuses what does not fit it."""
        width = head_dim if self.dim is None else self.dim
        _check_width("head_dim" if self.dim is None else "dim", width)
        if width > head_dim:
            raise ValueError(f"dim must be at most head_dim, got {width} and {head_dim}")
        if self.kind in ("dynamic", "ntk") and width == 2:
            raise ValueError(f"dim must be more than 2 for scaling {self.kind!r}, got 2")
        if self.scaling is not None and self.kind == "longrope":
            for key in ("short_factor", "long_factor"):
                if len(self.scaling[key]) != width // 2:
                    raise ValueError(f"scaling[{key!r}] must hold {width // 2} numbers, got {len(self.scaling[key])}")
        return width

    def frequencies(self, width: int, length: int | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies (n,) in float64 on the CPU, and the attention factor a.

        Args:
            width: rotary width r.
            length: current sequence length, which "dynamic" and "longrope" ask for; None counts as short.
        """
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
        plain = self.theta**-exponents
        if self.scaling is None or self.kind == "default":
            return plain, 1.0
        s = self.scaling
        factor = _factor(s)
        if self.kind == "linear":
            return plain / factor, 1.0
        if self.kind in ("dynamic", "ntk"):
            stretch = factor
            if self.kind == "dynamic":
                longest = s["max_position_embeddings"]
                stretch = factor * max(length or 0, longest) / longest - (factor - 1)
            return (self.theta * stretch ** (width / (width - 2))) ** -exponents, 1.0
        original = s["original_max_position_embeddings"]
        if self.kind == "yarn":
            return _yarn(plain, self.theta, width, factor, original, s), _yarn_attention_factor(factor, s)
        if self.kind == "llama3":
            return _llama3(plain, factor, original, s), 1.0
        if self.kind == "longrope":
            extend = s["long_factor"] if (length or 0) > original else s["short_factor"]
            given = s.get("attention_factor")
            if given is None:
                given = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return plain / torch.tensor(extend, dtype=torch.float64, device="cpu"), float(given)
        raise AssertionError(f"no frequencies for {self.kind}")


def as_rotary(rope: Rotary | bool | None) -> Rotary | None:
    """rope as the modules keep it: False means None, and what is neither that nor a `Rotary` is refused."""
    if rope is None or rope is False or isinstance(rope, Rotary):
        return rope or None
    raise ValueError(f"rope must be a Rotary, or None (or False) for no rotation, got {rope!r}")


Frequencies = tuple[tuple[float, ...], ...]
"""Frequencies (N, r / 2) as numbers, which no cast of a module can round."""


def frequency_rows(name: str, given: Tensor | Frequencies, shape: tuple[int, int]) -> Frequencies:
    """The numbers of a tensor of that shape; zeros for one on the meta device, which a state dict is to fill."""
    if isinstance(given, tuple):
        given = torch.tensor(given, dtype=torch.float64, device="cpu")
    if not isinstance(given, Tensor) or given.is_complex():
        raise ValueError(f"{name} must be a tensor of real numbers, got {given!r}")
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    rows = torch.zeros(shape, device="cpu") if given.is_meta else given.detach()
    numbers = tuple(map(tuple, rows.double().tolist()))
    for number in chain.from_iterable(numbers):
        check(name, number, NOT_NEGATIVE)
    return numbers


def put_in_state_dict(module: Any) -> None:
    """Have the frequencies `rope_inv_freq` of a module in its state dicts, as a buffer would be."""
    module.register_state_dict_post_hook(_save_frequencies)
    module.register_load_state_dict_pre_hook(_load_frequencies)


def _save_frequencies(module: Any, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Hook of a state dict: a module's own frequencies `rope_inv_freq` are in it, as float64 whatever its dtype."""
    if module.rope_inv_freq is not None:
        state[f"{prefix}rope_inv_freq"] = torch.tensor(module.rope_inv_freq, dtype=torch.float64, device="cpu")


def _load_frequencies(
    module: Any,
    state: dict[str, Tensor],
    prefix: str,
    _: object,
    __: bool,
    ___: object,
    ____: object,
    errors: list[str],
) -> None:
    """Hook before loading: takes the frequencies out of a state dict, unless they are the module's own, rounded."""
    if module.rope_inv_freq is None:
        return
    stored = state.pop(f"{prefix}rope_inv_freq", None)
    own = torch.tensor(module.rope_inv_freq, dtype=torch.float64, device="cpu")
    if stored is None or stored.is_meta:
        return
    if stored.shape != own.shape:
        errors.append(f"size mismatch for {prefix}rope_inv_freq: {tuple(stored.shape)}, not {tuple(own.shape)}")
    elif not torch.equal(own.to(stored.dtype), stored.cpu()):
        module.rope_inv_freq = tuple(map(tuple, stored.double().tolist()))


def rotary_table(
    rotary: Rotary,
    width: int,
    positions: Tensor,
    *,
    length: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Factors of every rotated feature and of its partner, each (*positions.shape, r), for `rotate`.

    They are a cos and, with the sign of its place in the pair, a sin. float64 for dtype float64, else float32.

    Args:
        rotary: what to rotate by.
        width: rotary width r.
        positions: integers, not negative.
        length: see `Rotary.frequencies`.
        dtype: of the tensors to be rotated.
        device: where the table is to be.
    """
    if is_readable(positions):
        lowest = int(positions.min()) if positions.numel() else 0
        if lowest < 0:
            raise ValueError(f"positions must not be negative, got {lowest}")
    frequencies, factor = rotary.frequencies(width, length)
    # Autocast leaves float64 alone, so the angles need no protection from it.
    return layout(positions.to(device)[..., None].double() * frequencies.to(device), factor, rotary.style, dtype)


def layout(angles: Tensor, factor: float, style: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two tables that `rotate` takes, (..., r), from the angles (..., r / 2) in float64."""
    cos, sin = factor * torch.cos(angles), factor * torch.sin(angles)
    if style == "interleaved":
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    precision = torch.promote_types(dtype, torch.float32)
    return cos.to(precision), sin.to(precision)


class RotaryTable(NamedTuple):
    """Angles of one call's queries or keys, as `rotate` takes them: cos and sin (T, r) or (B, T, r), and the layout.

    With per_head they are (T, N, r) or (B, T, N, r).
    """

    cos: Tensor
    sin: Tensor
    style: str = "half"
    per_head: bool = False


_Key = tuple[Rotary, int, int | None, torch.dtype, torch.device]
_tables: OrderedDict[_Key, tuple[Tensor, Tensor]] = OrderedDict()
_TABLES_KEPT = 32


def rotary_range_table(
    rotary: Rotary,
    width: int,
    start: int,
    stop: int,
    *,
    length: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`rotary_table` for positions start .. stop - 1, a slice of a remembered table that grows by doubling."""
    length = length if rotary.depends_on_length else None
    if is_traced():
        positions = torch.arange(start, stop, device=device)
        return rotary_table(rotary, width, positions, length=length, dtype=dtype, device=device)
    key = (rotary, width, length, torch.promote_types(dtype, torch.float32), device)
    table = _tables.get(key)
    if table is None or table[0].shape[0] < stop:
        rows = max(256, 1 << max(stop - 1, 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(rows, device=device)
            table = rotary_table(rotary, width, positions, length=length, dtype=dtype, device=device)
        _tables[key] = table
        while len(_tables) > _TABLES_KEPT:
            _tables.popitem(last=False)
    return table[0][start:stop], table[1][start:stop]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half", per_head: bool = False) -> Tensor:
    """Rotate the first r features of x (B, T, N, D); the others pass through.

    Args:
        x: queries or keys.
        cos: (T, r) or (B, T, r), from `rotary_table`.
        sin: of the same shape, with the sign of each feature's place in its pair.
        style: the layout that the table was made for.
        per_head: whether the tables hold angles for every head, (T, N, r) or (B, T, N, r).

    Returns:
        A tensor of x's shape and dtype; half-precision input is rotated in float32.
    """
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    if style == "interleaved":
        partner = rotated.unflatten(-1, (width // 2, 2)).flip(-1).flatten(-2)
    else:
        if style == "interleaved_to_half":
            rotated = torch.cat([rotated[..., 0::2], rotated[..., 1::2]], dim=-1)
        u, v = rotated.chunk(2, dim=-1)
        partner = torch.cat([v, u], dim=-1)
    if not per_head:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = torch.addcmul(rotated * cos, partner, sin).to(x.dtype)
    return y if width == x.shape[-1] else torch.cat([y, x[..., width:]], dim=-1)


def split_pairs(x: Tensor, style: str) -> tuple[Tensor, Tensor]:
    """First and second features of the pairs that a rotation of that style turns."""
    return x.tensor_split(2, dim=-1) if style == "half" else (x[..., 0::2], x[..., 1::2])  # type: ignore[return-value]


def join_pairs(u: Tensor, v: Tensor, style: str) -> Tensor:
    """The inverse of `split_pairs`."""
    return torch.cat([u, v], -1) if style == "half" else torch.stack([u, v], -1).flatten(-2)


def _check_width(name: str, width: int) -> None:
    check(name, width, ((lambda size: is_integer(size) and size >= 2 and size % 2 == 0, _WIDTH),))


def _number(value: Any) -> Any:
    """A number, or a list of them, as Python's own."""
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    if isinstance(value, bool | str) or value is None:
        return value
    return int(value) if is_integer(value) else float(value)


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling["rope_type"]
    check("scaling['rope_type']", kind, one_of(*_REQUIRED, words=f"be one of {', '.join(_REQUIRED)}"))
    for key in _REQUIRED[kind]:
        if scaling.get(key) is None:
            raise ValueError(f"scaling of type {kind!r} needs the key {key!r}, got {sorted(scaling)}")
    known = {*_ALWAYS, *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise ValueError(f"scaling of type {kind!r} has no key {unknown[0]!r}")
    for key, value in scaling.items():
        if value is not None and key in _VALUES:
            check(f"scaling[{key!r}]", value, _VALUES[key])
    sizes = (scaling.get("factor"), scaling.get("max_position_embeddings"))
    if kind in ("yarn", "longrope") and sizes == (None, None):
        raise ValueError(f"scaling of type {kind!r} needs the key 'factor' or 'max_position_embeddings'")
    if kind != "default" and _factor(scaling) < 1:
        raise ValueError(f"scaling['factor'] must be at least 1, got {_factor(scaling)}")
    if kind == "llama3" and scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise ValueError(
            f"scaling['low_freq_factor'] must differ from high_freq_factor, got {scaling['low_freq_factor']}"
        )
    if kind == "llama3" and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise ValueError(f"scaling['low_freq_factor'] must be less than high_freq_factor, got {low} and {high}")


def _factor(s: Mapping[str, Any]) -> float:
    if s.get("factor") is not None:
        return float(s["factor"])
    if s["rope_type"] in ("yarn", "longrope"):
        return float(s["max_position_embeddings"] / s["original_max_position_embeddings"])
    return 1.0


def _yarn(plain: Tensor, theta: float, width: int, factor: float, original: int, s: Mapping[str, Any]) -> Tensor:
    """YaRN's frequencies (Peng et al. 2023, arXiv:2309.00071): low ones interpolated, high ones kept."""

    def turning_index(rotations: float) -> float:
        return width * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = turning_index(s.get("beta_fast") or 32), turning_index(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    index = torch.arange(plain.shape[0], dtype=torch.float64, device="cpu")
    interpolated = ((index - low) / (high - low)).clamp(0, 1)
    return plain / factor * interpolated + plain * (1 - interpolated)


def _yarn_attention_factor(factor: float, s: Mapping[str, Any]) -> float:
    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return scale(s["mscale"]) / scale(s["mscale_all_dim"])
    return scale(1.0)


def _llama3(plain: Tensor, factor: float, original: int, s: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths divided by factor, short ones kept, a ramp between."""
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    ramp = ((original * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - ramp) * plain / factor + ramp * plain
    return scaled
