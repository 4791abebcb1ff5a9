"""Attention of a few new tokens over a long cache: operator and public functions.

`decode_attention` reads keys and values, `latent_decode` the compressed keys of multi-head latent attention. The
mathematics and the kernels are in `attnzoo_kernels.decode.kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.decode.checks import check_decode, check_options
from attnzoo_kernels.decode.kernels import decode_attention_fwd_kernel, decode_attention_merge_kernel
from attnzoo_kernels.decode.tuning import config_and_slots, key_range
from attnzoo_kernels.launch import (
    Key,
    Operator,
    Plan,
    chip,
    dense_rows,
    find_plan,
    keep_plan,
    layouts,
    on_device,
    schema,
    strides,
)
from attnzoo_kernels.tuning import Config, cdiv, padded, splits_for


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    query_start: int | Tensor,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | float | None = None,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
    head_scale: Tensor | None = None,
    decay: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of 1 to 16 new tokens q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv); returns (B, T, H, Dv).

    Inference only, in float16, bfloat16 or float32, with sums in float32. Query t has index query_start + t, key s
    index s or key_positions[s]; scores, visibility and sink are those of `attnzoo.ops.softmax_attention`. Views of a
    cache are read in place, in any layout whose features are contiguous; another is copied first. If k is the first D
    features of v in the same memory, each key is loaded once for both.

    Costs one pass over the keys and 4 * num_splits * B * T * H * (Dv + 2) bytes of scratch memory if num_splits > 1.

    Args:
        q: queries (B, T, H, D), T at most 16.
        k: keys (B, S, G, D); G divides H.
        v: values (B, S, G, Dv).
        scale: factor of the products.
        query_start: index of the first query, or that as one integer on the device: then nothing on the host depends
            on it, and one CUDA graph over the whole of a cache serves every length.
        causal: key j is visible to query i if j <= i.
        softcap: positive bound of the scores.
        alibi_slopes: (H,) slopes of the bias -slope |i - j|.
        window: keys with i - j < window are visible (|i - j| < window if not causal).
        sink_tokens: keys j < sink_tokens stay visible outside the window.
        sinks: one more logit in the softmax's denominator, (H,) or one number for all heads.
        q_rope: (B, T, H, R); with k_rope a part of the score whose keys all heads share.
        k_rope: (B, S, 1, R).
        head_scale: factor of each head's output, (H,) or (B, H).
        decay: (B, H, S) cumulated log gates c of the keys, float32: scores are those plus c_i - c_j.
        lengths: (B,) integers; keys j < lengths[b] are visible, and later ones are not read.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        key_positions: (S,) integers, the indices of the keys of a ring buffer.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.

    Raises:
        ValueError: for arguments that do not fit each other, or if a gradient is asked for.
    """
    check_decode(q, k, v, q_rope, k_rope, num_splits)
    check_options(
        q, k, alibi_slopes=alibi_slopes, sinks=sinks, head_scale=head_scale, decay=decay, lengths=lengths, mask=mask,
        key_positions=key_positions,
    )  # fmt: skip
    if sinks is not None and not isinstance(sinks, Tensor):
        sinks = torch.full((q.shape[2],), sinks, dtype=torch.float32, device=q.device)
    start, first = (query_start, 0) if isinstance(query_start, Tensor) else (None, query_start)
    # Gradients were refused.
    out: Tensor = _decode(
        q, k, v, q_rope, k_rope, decay, alibi_slopes, sinks, head_scale, lengths, mask, key_positions, start,
        float(scale), float(softcap or 0.0), window or 0, sink_tokens, first, num_splits or 0, causal,
    )  # fmt: skip
    return out


def latent_decode(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    *,
    scale: float,
    query_start: int | Tensor,
    causal: bool = True,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Latents weighted for 1 to 16 new tokens, u (B, T, H, R); the value projection of each head comes after.

        s_hj = scale * (q_h . c_j + q_rope_h . k_rope_j),  u_h = sum_j softmax_j(s_hj) c_j

    c_j is the latent of token j, which is key and value of all heads at once (DeepSeek-AI 2024, arXiv:2405.04434). So
    this is `decode_attention` with one key/value head whose key is the whole of its value: the heads are the tile's
    rows and a latent is loaded once. Inference only. latent and k_rope may be two slices of one cache
    (B, S, R + dr); they are read in place.

    Args:
        q: queries (B, T, H, R), multiplied by each head's key projection.
        q_rope: rotary queries (B, T, H, dr), or None without a rotary key.
        latent: (B, S, R), R at most 512.
        k_rope: rotary keys (B, S, dr), one for all heads; given together with q_rope.
        scale: factor of the products.
        query_start: index of the first query, a number or on the device as in `decode_attention`; query t sees keys
            0 .. query_start + t if causal.
        causal: whether it does.
        lengths: (B,) integers; keys j < lengths[b] are visible, and later ones are not read.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.

    Raises:
        ValueError: for arguments that do not fit each other, or if a gradient is asked for.
    """
    if latent.ndim != 3 or (k_rope is not None and k_rope.ndim != 3):
        raise ValueError(
            f"latent must be (B, S, R) and k_rope (B, S, dr), got {tuple(latent.shape)} "
            f"and {None if k_rope is None else tuple(k_rope.shape)}"
        )
    state, shared = latent[:, :, None], None if k_rope is None else k_rope[:, :, None]
    check_decode(q, state, state, q_rope, shared, num_splits)
    check_options(q, state, lengths=lengths, mask=mask)
    start, first = (query_start, 0) if isinstance(query_start, Tensor) else (None, query_start)
    u: Tensor = _decode(
        q, state, state, q_rope, shared, None, None, None, None, lengths, mask, None, start, float(scale), 0.0, 0, 0,
        first, num_splits or 0, causal,
    )  # fmt: skip
    return u


class _Inputs(NamedTuple):
    """What the operator takes; num_splits is 0 for a number of its own."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor | None
    k_rope: Tensor | None
    decay: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    head_scale: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    start: Tensor | None
    scale: float
    softcap: float
    window: int
    sink_tokens: int
    query_start: int
    num_splits: int
    causal: bool

    def key(self, tied: bool) -> Key:
        """What decides the plan: everything but addresses, the number of keys, and where the queries are."""
        q, k, v = self.q, self.k, self.v
        return (
            k.shape[2], k.stride(), v.shape[3], v.stride(), chip(q.device), tied,
            layouts((q, self.q_rope, self.head_scale)), self.k_rope is None or self.k_rope.stride(),
            *[
                x is None or (x.dtype, x.stride())
                for x in (self.decay, self.slopes, self.sinks, self.lengths, self.positions)
            ],
            self.start is None or self.start.dtype, self.mask is None, self.causal, self.softcap != 0.0,
            self.window > 0, self.sink_tokens > 0,
        )  # fmt: skip

    def dense(self) -> _Inputs:
        """With tensors as the kernels read them."""
        given = self._asdict()
        for name in ("q", "k", "v", "q_rope", "k_rope"):
            given[name] = dense_rows(given[name])
        for name in ("slopes", "sinks", "lengths", "positions"):
            given[name] = None if given[name] is None else given[name].contiguous()
        return _Inputs(**given)


class Plans(NamedTuple):
    """How calls with one key are launched, with a single split or with more."""

    config: Config
    slots: int
    one: Plan
    several: Plan
    merge: Plan

    def split(
        self, owners: int, rows: int, begin: int, end: int, splits: int, out: Tensor
    ) -> tuple[int, int, int, Plan, Tensor, Tensor | None]:
        """Programs of a split, splits, keys of one, the plan, and where it writes outputs and states.

        owners times the keys from begin to end are read, each time for so many rows; 0 splits: as many as fill the
        device.
        """
        block_s, keys = self.config["BLOCK_S"], max(end - begin, 1)
        programs = owners * cdiv(rows, self.config["BLOCK_T"])
        splits = splits or splits_for(programs, keys, block_s, self.slots)
        chunk = cdiv(cdiv(keys, splits), block_s) * block_s
        splits = cdiv(keys, chunk)
        if splits == 1:
            return programs, splits, chunk, self.one, out, None
        part = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
        state = torch.empty((splits, *out.shape[:3], 2), dtype=torch.float32, device=out.device)
        return programs, splits, chunk, self.several, part, state


_PLANS: dict[Key, Plans] = {}


def _plans(inputs: _Inputs, tied: bool) -> Plans:
    q, k = inputs.q, inputs.k
    (B, T, H, D), G, DV = q.shape, k.shape[2], inputs.v.shape[3]
    R = 0 if inputs.q_rope is None else inputs.q_rope.shape[3]
    rest = DV - D if tied else DV
    name, widths = "decode_attention_fwd", (D, rest, R)
    config, slots = config_and_slots(name, H // G * T, widths, q.element_size(), q.device)
    given = inputs._asdict()
    if inputs.head_scale is not None:
        given["head_scale"] = inputs.head_scale.expand(B, H)
    arguments: dict[str, Any] = {
        **{name: n for at, axes in STRIDES.items() for name, n in strides(given[at], at, axes).items()},
        "B": B, "H": H, "G": G, "D": D, "DV": DV, "R": R, "TIED": tied, "CAUSAL": inputs.causal,
        "SOFTCAP": inputs.softcap != 0.0, "WINDOW": inputs.window > 0, "SINK_TOKENS": inputs.sink_tokens > 0,
        "BLOCK_D": padded(D), "BLOCK_V": padded(rest), "BLOCK_R": padded(R),
    }  # fmt: skip
    one, several = (Plan(decode_attention_fwd_kernel, config, arguments | {"CLOSE": close}) for close in (True, False))
    of_merge = arguments | {"BLOCK_V": padded(DV)}
    return Plans(config, slots, one, several, Plan(decode_attention_merge_kernel, MERGE, of_merge))


TENSORS = _Inputs._fields.index("scale")
STRIDES = {"q": "bth", "k": "bsg", "v": "bsg", "q_rope": "bth", "k_rope": "bs", "decay": "bhs", "head_scale": "bh"}
MERGE = Config({"BLOCK_C": 8}, num_warps=4, num_stages=1)
"""The merging kernel takes so many splits at a time."""


def is_tied(k: Tensor, v: Tensor) -> bool:
    """Whether k (B, S, G, D) is the first D features of v (B, S, G, Dv) in the same memory."""
    if k.data_ptr() != v.data_ptr():
        return False
    strides = zip(k.shape[:3], k.stride(), v.stride(), strict=False)
    return k.shape[3] <= v.shape[3] and all(n == 1 or a == b for n, a, b in strides)


def _run(*given: Any) -> Tensor:
    inputs = _Inputs(*given)
    q, k, v, mask, start = inputs.q, inputs.k, inputs.v, inputs.mask, inputs.start
    out: Tensor = _fake(*given)
    if out.numel() == 0:
        return out
    tied = is_tied(k, v)
    key = inputs.key(tied)
    plans = find_plan(_PLANS, key)
    if plans is None:
        dense = inputs.dense()
        if any(a is not b for a, b in zip(dense[:TENSORS], inputs[:TENSORS], strict=True)):
            return _run(*dense)
        plans = keep_plan(_PLANS, key, _plans(inputs, tied))
    (B, T, H, _), (_, S, G, _) = q.shape, k.shape
    begin, end = 0, S
    if start is None:
        begin, end = key_range(
            S, T, inputs.query_start, causal=inputs.causal, window=inputs.window, sink_tokens=inputs.sink_tokens,
            ring=inputs.positions is not None,
        )  # fmt: skip
    programs, splits, chunk, plan, part, state = plans.split(B * G, H // G * T, begin, end, inputs.num_splits, out)
    closing = {"sinks_ptr": inputs.sinks, "head_scale_ptr": inputs.head_scale}
    others: dict[str, Any] = {} if mask is None else strides(mask.expand(B, H, T, S), "mask", "bhts")
    others |= closing if splits == 1 else {}
    first = plan.launch(
        q_ptr=q, k_ptr=k, v_ptr=v, q_rope_ptr=inputs.q_rope, k_rope_ptr=inputs.k_rope, decay_ptr=inputs.decay,
        slopes_ptr=inputs.slopes, lengths_ptr=inputs.lengths, positions_ptr=inputs.positions, mask_ptr=mask,
        start_ptr=start, o_ptr=part, state_ptr=state, T=T, S=S, query_start=inputs.query_start, begin=begin, end=end,
        chunk=chunk, scale=inputs.scale, softcap=inputs.softcap, window=inputs.window, sink_tokens=inputs.sink_tokens,
        **others,
    )  # fmt: skip
    with on_device(out):
        first.keep(first.run[programs, splits, 1](*first.values, **first.options))
        if splits > 1:
            merge = plans.merge.launch(
                part_ptr=part, state_ptr=state, o_ptr=out, rows=B * T * H, T=T, splits=splits, **closing
            )
            merge.keep(merge.run[B * T * H, 1, 1](*merge.values, **merge.options))
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)


_decode = Operator("attnzoo::decode_attention", _run, schema(_Inputs, 1))
_decode.register_fake(_fake)
