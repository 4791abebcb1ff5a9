"""The `flash` backend of softmax attention: the flash-attn packages 4, 3 and 2, where one is installed.

`_PACKAGES` lists what each package covers, newest first; the first that covers a call runs it. Layout
(B, T, H, D), as everywhere here, and theirs too. Their causal rule and their window are aligned to the bottom
right, so that a cached prefix needs no special case, and a window of W keys is (W - 1, 0) in their words.

So far this file has been tested only against stand-ins for these packages, which record how they are called
and compute the answer in plain PyTorch (`tests/ops/test_flash.py`); it has not run on a GPU. The limits in
the table were read from the packages' sources.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import BackendUnavailable
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.score_rules import ScoreRules, join_rope

ROCM = 0
"""Stands for an AMD device where a number would be the major part of a CUDA compute capability."""


def _equal_to_256(d: int, dv: int) -> bool:
    return d == dv <= 256


def _any_to_256(d: int, dv: int) -> bool:
    return max(d, dv) <= 256


def _hopper_3(d: int, dv: int) -> bool:
    return d == dv <= 256 or (128 < d <= 192 and 96 < dv <= 128) or (d <= 64 and dv <= 256)


def _blackwell_4(d: int, dv: int) -> bool:
    return max(d, dv) <= 128 or (d, dv) in ((192, 128), (256, 256))


@dataclass(frozen=True)
class _Package:
    """One interface and what it covers; widths holds (D, Dv) by the major compute capability."""

    name: str
    distributions: tuple[str, ...]
    module: str
    marker: str
    widths: Mapping[int, Callable[[int, int], bool]]
    backward: bool = True
    alibi: bool = False
    dropout: bool = False
    sinks: bool = False
    softcap_in_varlen_backward: bool = True


_PACKAGES = (
    _Package(
        name="flash-attn 4",
        distributions=("flash-attn-4",),
        module="flash_attn.cute",
        marker="flash_attn.cute",
        widths={9: _any_to_256, 10: _blackwell_4, 11: _blackwell_4},
        sinks=True,
        softcap_in_varlen_backward=False,
    ),
    _Package(
        name="flash-attn 3",
        distributions=("flash-attn-3", "flash-attn-hopper"),
        module="flash_attn_interface",
        marker="flash_attn_interface",
        widths={9: _hopper_3},
    ),
    _Package(
        name="fa3-fwd",
        distributions=("fa3-fwd",),
        module="fa3_fwd_interface",
        marker="fa3_fwd_interface",
        widths={9: _hopper_3},
        backward=False,
    ),
    _Package(
        name="flash-attn 2",
        distributions=("flash-attn",),
        module="flash_attn",
        # flash-attn 4 lives in a namespace of the same name, which proves nothing about 2.
        marker="flash_attn.flash_attn_interface",
        widths=dict.fromkeys((ROCM, 8, 9, 10, 11, 12), _equal_to_256),
        alibi=True,
        dropout=True,
    ),
)


class _Case:
    """What of a call decides who can run it: its arguments, and what follows from them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> None:
        self.q, self.k, self.v, self.view, self.rules = q, k, v, view, rules
        mask, sinks = view.mask or AttentionMask(), rules.sinks
        parts = (mask.lengths, mask.cu_seqlens, mask.dense_mask)
        self.lengths, self.packed, self.dense = mask.lengths, mask.cu_seqlens is not None, mask.dense_mask is not None
        self.padded = mask.lengths is not None
        self.mask_elsewhere = any(part is not None and part.device != q.device for part in parts)
        # The shared part of the keys becomes further features of each key.
        shared = 0 if rules.q_rope is None else rules.q_rope.shape[3]
        self.major, self.d, self.dv = device_major(q.device), q.shape[3] + shared, v.shape[3]
        self.sinks = None if sinks is None else str(sinks.dtype if isinstance(sinks, Tensor) else float(sinks))
        tensors = (q, k, v, sinks, rules.q_rope, rules.k_rope)
        trained = any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
        self.needs_grad = torch.is_grad_enabled() and trained


# (when it applies, what is said then)
_GENERAL_RULES: tuple[tuple[Callable[[_Case], bool], str], ...] = (
    (lambda c: c.major is None, "needs CUDA tensors, got {c.q.device.type}"),
    (lambda c: c.q.dtype not in (torch.float16, torch.bfloat16), "needs float16 or bfloat16, got {c.q.dtype}"),
    (lambda c: 0 in (*c.q.shape, *c.k.shape, *c.v.shape), "flash-attn takes no empty tensors"),
    (
        lambda c: bool(c.d % 8 or c.dv % 8),
        "flash-attn needs head widths that are multiples of 8, got {c.d} and {c.dv}",
    ),
    (
        lambda c: c.view.key_positions is not None,
        "flash-attn needs keys in the order of their positions, not a ring buffer",
    ),
    (lambda c: c.view.sink_tokens > 0, "flash-attn has no sink tokens outside a window, got {c.view.sink_tokens}"),
    (lambda c: c.dense, "flash-attn takes no dense mask"),
    (lambda c: c.mask_elsewhere, "mask must be on the device of the input"),
    (lambda c: c.padded and c.packed, "flash-attn takes padding or packing, not both in one mask"),
    (lambda c: c.packed and c.q.shape[1] != c.k.shape[1], "a packed mask is for self-attention without a cache"),
    (
        lambda c: c.lengths is not None and c.lengths.shape[0] != c.q.shape[0],
        "lengths must have one entry a row, got {c.lengths.shape[0]} for {c.q.shape[0]}",
    ),
    (lambda c: c.padded and c.view.window is not None, "flash-attn would align a window to the padded row's end"),
    (
        lambda c: c.padded and c.rules.alibi_slopes is not None,
        "flash-attn would measure ALiBi from the padded row's end",
    ),
    (lambda c: c.padded and c.sinks is not None, "flash-attn with sinks may give NaN for a row of length 0"),
    (
        lambda c: c.padded and torch.compiler.is_compiling(),
        "padding lengths need shapes that depend on data, which torch.compile does not take",
    ),
    (lambda c: c.rules.softcap is not None and c.rules.dropout > 0, "flash-attn has no soft-cap together with dropout"),
)

_PACKAGE_RULES: tuple[tuple[Callable[[_Case, _Package], bool], str], ...] = (
    (lambda c, p: c.rules.alibi_slopes is not None and not p.alibi, "{p.name} has no ALiBi"),
    (lambda c, p: c.rules.dropout > 0 and not p.dropout, "{p.name} has no dropout, got {c.rules.dropout}"),
    (lambda c, p: c.sinks is not None and not p.sinks, "{p.name} has no sinks"),
    (
        lambda c, _: c.sinks not in (None, "torch.bfloat16", "0.0"),
        "{p.name} takes sinks in bfloat16 or the number 0, got {c.sinks}",
    ),
    (lambda c, p: c.needs_grad and not p.backward, "{p.name} has no backward pass"),
    (
        lambda c, _: c.needs_grad and c.sinks is not None,
        "{p.name} does not give sinks a gradient in every release, so they are for inference only",
    ),
    (
        lambda c, p: (
            c.needs_grad and c.rules.softcap is not None and (c.padded or c.packed) and not p.softcap_in_varlen_backward
        ),
        "{p.name} has no backward pass for a soft-cap with sequences of varying length",
    ),
    (
        lambda c, p: c.major not in p.widths,
        "{p.name} does not run on this device, of compute capability {c.major}.x",
    ),
    (
        lambda c, p: c.major is not None and not p.widths[c.major](c.d, c.dv),
        "{p.name} does not take head widths of {c.d} for keys and {c.dv} for values on this device",
    ),
)


def installed() -> list[tuple[str, str]]:
    """Distribution and version of each flash-attn package that can be found, newest first; imports none."""
    return [_version(package) for package in _PACKAGES if _present(package.marker)]


def device_major(device: torch.device) -> int | None:
    """Major compute capability of a CUDA device, ROCM for an AMD one, None for anything else.

    The one place that looks at the device.
    """
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return ROCM
    return torch.cuda.get_device_capability(device)[0]


def flash_obstacle(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> str | None:
    """Why no installed flash-attn can run this call, as one sentence, or None if one can.

    q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv).
    """
    chosen = _choose(_Case(q, k, v, view, rules))
    return chosen if isinstance(chosen, str) else None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) -> (B, T, H, Dv); options as in `softmax_attention`.

    Padding lengths cost a synchronisation with the device, since the real tokens are gathered.

    Raises:
        BackendUnavailable: where `flash_obstacle` would name an obstacle.
    """
    chosen = _choose(_Case(q, k, v, view, rules))
    if isinstance(chosen, str):
        raise BackendUnavailable(f"backend 'flash' cannot run softmax_attention: {chosen}")
    q, k = join_rope(q, k, rules)
    causal, mask, window, sinks = view.causal, view.mask, view.window, rules.sinks
    # Only what the call uses is passed: the packages differ in the rest.
    options: dict[str, Any] = {"softmax_scale": rules.scale}
    if rules.softcap is not None:
        options["softcap"] = rules.softcap
    if window is not None:
        options["window_size"] = (window - 1, 0 if causal else window - 1)
    if rules.alibi_slopes is not None:
        options["alibi_slopes"] = rules.alibi_slopes.to(torch.float32)
    if rules.dropout > 0:
        options["dropout_p"] = rules.dropout
    if isinstance(sinks, Tensor):
        options["learnable_sink"] = sinks
    elif sinks is not None:
        options["learnable_sink"] = q.new_full((q.shape[2],), sinks, dtype=torch.bfloat16)
    if mask is not None and mask.cu_seqlens is not None:
        return _packed(chosen, q, k, v, mask.cu_seqlens, causal, options)
    if mask is not None and mask.lengths is not None:
        return _padded(chosen, q, k, v, mask.lengths, causal, options)
    return _first(chosen.flash_attn_func(q, k, v, causal=causal, **options))


def _packed(
    package: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, options: dict[str, Any]
) -> Tensor:
    """Every document is a sequence of its own; a row's end is a boundary whether it is listed or not.

    Boundaries that occur twice make empty sequences, which cost nothing; removing them would need the host.
    """
    batch, length = q.shape[:2]
    if batch > 1:
        rows = torch.arange(1, batch, device=cu_seqlens.device, dtype=torch.int32) * length
        cu_seqlens = torch.cat([cu_seqlens, rows]).sort().values
    out = _varlen(
        package, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), (cu_seqlens, cu_seqlens),
        (length, length), causal, options,
    )  # fmt: skip
    return out.view(batch, length, *out.shape[1:])


def _padded(
    package: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool, options: dict[str, Any]
) -> Tensor:
    """Right padding, exact for padding queries too.

    A causal query at an index below its row's length sees no padding anyway, so an unmasked call is right for
    it. Every other query sees all real keys of its row, which is a bidirectional call over gathered tokens.
    """
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    lengths = lengths.clamp(max=keys)
    real = torch.arange(keys, device=k.device) < lengths[:, None]
    index = torch.arange(keys - queries, keys, device=q.device).expand(batch, queries)
    sees_all = index >= lengths[:, None] if causal else torch.ones_like(index, dtype=torch.bool)
    boundaries = _cumulated(sees_all.sum(1)), _cumulated(lengths)

    def bidirectional() -> Tensor:
        sequences = q[sees_all], k[real], v[real]
        return _varlen(package, *sequences, boundaries, (queries, keys), False, options)

    if not causal:
        out = bidirectional()
        return out.view(batch, queries, *out.shape[1:])
    out = _first(package.flash_attn_func(q, k, v, causal=True, **options))
    return out.index_put((sees_all,), bidirectional()) if bool(sees_all.any()) else out


def _varlen(
    package: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    options: dict[str, Any],
) -> Tensor:
    """Sequences laid end to end: q (tokens, H, D), boundaries and upper bounds of length (queries, keys)."""
    out = package.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=boundaries[0], cu_seqlens_k=boundaries[1], max_seqlen_q=longest[0],
        max_seqlen_k=longest[1], causal=causal, **options,
    )  # fmt: skip
    return _first(out)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; some releases return the log-sum-exp beside it."""
    return out[0] if isinstance(out, tuple) else out


def _cumulated(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _choose(case: _Case) -> Any:
    """The module that runs the case, or one sentence why none does: the newest package's reason."""
    for applies, sentence in _GENERAL_RULES:
        if applies(case):
            return sentence.format(c=case)
    reasons = []
    for package in _PACKAGES:
        if not _present(package.marker):
            continue
        reason = next((text for applies, text in _PACKAGE_RULES if applies(case, package)), None)
        if reason is not None:
            reasons.append(reason.format(c=case, p=package))
            continue
        module = _load(package.module)
        if not isinstance(module, str):
            return module
        reasons.append(f"{package.name} is installed but does not import: {module}")
    return "; ".join(reasons) or "flash-attn is not installed"


_present_memo: dict[str, bool] = {}
_module_memo: dict[str, Any] = {}


def _present(module: str) -> bool:
    """Whether a module can be found, without importing it or the packages around it."""
    if module not in _present_memo:
        _present_memo[module] = _find(module)
    return _present_memo[module]


def _find(module: str) -> bool:
    if module in sys.modules:
        return True
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)
    if not rest or spec is None:
        return spec is not None
    locations = spec.submodule_search_locations
    return locations is not None and importlib.machinery.PathFinder.find_spec(module, list(locations)) is not None


def _load(name: str) -> Any:
    """The imported module, or what its import failed with: a wheel for another torch fails only here."""
    if name not in _module_memo:
        try:
            _module_memo[name] = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            _module_memo[name] = f"{type(error).__name__}: {error}"
    return _module_memo[name]


def _version(package: _Package) -> tuple[str, str]:
    for distribution in package.distributions:
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return package.name, "of unknown version"
