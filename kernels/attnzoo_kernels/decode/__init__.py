"""Attention of a few new tokens over a long cache: operator and public functions.

`decode_attention` reads keys and values, `latent_decode` the compressed keys of multi-head latent attention. The
mathematics and the kernels are in `attnzoo_kernels.decode.kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from attnzoo_kernels.decode.checks import check_decode, check_options
from attnzoo_kernels.decode.kernels import decode_attention_fwd_kernel, decode_attention_merge_kernel
from attnzoo_kernels.decode.tuning import config_and_splits, key_range
from attnzoo_kernels.launch import arguments_of, dense_rows, on_device, schema, strides
from attnzoo_kernels.tuning import cdiv, padded

MERGED = 8
"""Splits that the merging kernel takes at a time."""


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    query_start: int,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | float | None = None,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
    head_scale: Tensor | None = None,
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
        query_start: index of the first query.
        causal: key j is visible to query i if j <= i.
        softcap: positive bound of the scores.
        alibi_slopes: (H,) slopes of the bias -slope |i - j|.
        window: keys with i - j < window are visible (|i - j| < window if not causal).
        sink_tokens: keys j < sink_tokens stay visible outside the window.
        sinks: one more logit in the softmax's denominator, (H,) or one number for all heads.
        q_rope: (B, T, H, R); with k_rope a part of the score whose keys all heads share.
        k_rope: (B, S, 1, R).
        head_scale: factor of each head's output, (H,) or (B, H).
        lengths: (B,) integers; keys j < lengths[b] are visible, and later ones are not read.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        key_positions: (S,) integers, the indices of the keys of a ring buffer.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.

    Raises:
        ValueError: for arguments that do not fit each other, or if a gradient is asked for.
    """
    check_decode(q, k, v, q_rope, k_rope, num_splits)
    check_options(
        q, k, alibi_slopes=alibi_slopes, sinks=sinks, head_scale=head_scale, lengths=lengths, mask=mask,
        key_positions=key_positions,
    )  # fmt: skip
    if sinks is not None and not isinstance(sinks, Tensor):
        sinks = torch.full((q.shape[2],), sinks, dtype=torch.float32, device=q.device)
    out: Tensor = _decode(
        q, k, v, q_rope, k_rope, alibi_slopes, sinks, head_scale, lengths, mask, key_positions, scale, softcap or 0.0,
        window or 0, sink_tokens, query_start, num_splits or 0, causal,
    )  # fmt: skip
    return out


def latent_decode(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    *,
    scale: float,
    query_start: int,
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
        query_start: index of the first query; query t sees keys 0 .. query_start + t if causal.
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
    u: Tensor = _decode(
        q, state, state, q_rope, shared, None, None, None, lengths, mask, None, scale, 0.0, 0, 0, query_start,
        num_splits or 0, causal,
    )  # fmt: skip
    return u


class _Inputs(NamedTuple):
    """What the operator takes, under the names of its kernels' arguments; num_splits is 0 for a number of its own."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor | None
    k_rope: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    head_scale: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    scale: float
    softcap: float
    window: int
    sink_tokens: int
    query_start: int
    num_splits: int
    causal: bool

    def arguments(self) -> dict[str, Any]:
        """All that the first kernel takes beside the range of keys and what it writes."""
        (B, T, H, D), (_, S, G, _), DV = self.q.shape, self.k.shape, self.v.shape[3]
        R = 0 if self.q_rope is None else self.q_rope.shape[3]
        tied = is_tied(self.k, self.v)
        tensors: dict[str, Any] = dict(zip(_Inputs._fields[:TENSORS], self, strict=False))
        for name in ("q", "k", "v", "q_rope", "k_rope"):
            tensors[name] = dense_rows(tensors[name])
        for name in ("slopes", "sinks", "lengths", "positions"):
            given = tensors[name]
            tensors[name] = None if given is None else given.contiguous()
        if self.mask is not None:
            tensors["mask"] = self.mask.expand(B, H, T, S)
        if self.head_scale is not None:
            tensors["head_scale"] = self.head_scale.expand(B, H)
        return {
            **arguments_of(tensors, STRIDES), **dict(zip(_Inputs._fields[TENSORS:-2], self[TENSORS:-2], strict=True)),
            "B": B, "T": T, "S": S, "H": H, "G": G, "D": D, "DV": DV, "R": R, "TIED": tied,
            "CAUSAL": self.causal, "SOFTCAP": self.softcap != 0.0, "WINDOW": self.window > 0,
            "SINK_TOKENS": self.sink_tokens > 0, "BLOCK_D": padded(D), "BLOCK_V": padded(DV - D if tied else DV),
            "BLOCK_R": padded(R),
        }  # fmt: skip


TENSORS = _Inputs._fields.index("scale")
STRIDES = {"q": "bth", "k": "bsg", "v": "bsg", "q_rope": "bth", "k_rope": "bs", "mask": "bhts", "head_scale": "bh"}


def is_tied(k: Tensor, v: Tensor) -> bool:
    """Whether k (B, S, G, D) is the first D features of v (B, S, G, Dv) in the same memory."""
    strides = zip(k.shape[:3], k.stride(), v.stride(), strict=False)
    return k.data_ptr() == v.data_ptr() and k.shape[3] <= v.shape[3] and all(n == 1 or a == b for n, a, b in strides)


@library.custom_op("attnzoo::decode_attention", mutates_args=(), schema=schema(_Inputs, 1))
def _decode(*given: Any) -> Tensor:
    inputs = _Inputs(*given)
    (B, T, H, D), (_, S, G, _), DV = inputs.q.shape, inputs.k.shape, inputs.v.shape[3]
    out: Tensor = _decode_fake(*given)
    if out.numel() == 0:
        return out
    begin, end = key_range(
        S, T, inputs.query_start, causal=inputs.causal, window=inputs.window, sink_tokens=inputs.sink_tokens,
        ring=inputs.positions is not None,
    )  # fmt: skip
    arguments = inputs.arguments()
    widths = D, DV - D if arguments["TIED"] else DV, arguments["R"]
    rows = H // G * T
    config, splits = config_and_splits(rows, B * G, end - begin, widths, out.element_size(), out.device)
    splits = inputs.num_splits or splits
    chunk = cdiv(cdiv(max(end - begin, 1), splits), config["BLOCK_S"]) * config["BLOCK_S"]
    splits = max(1, cdiv(end - begin, chunk))
    close = splits == 1
    part, state = out, None
    closing = {name: arguments.pop(name) for name in ("sinks_ptr", "head_scale_ptr")}
    if not close:
        part = torch.empty(splits, B, T, H, DV, dtype=torch.float32, device=out.device)
        state = torch.empty(splits, B, T, H, 2, dtype=torch.float32, device=out.device)
    with on_device(out):
        decode_attention_fwd_kernel[(B * G * cdiv(rows, config["BLOCK_T"]), splits)](
            **arguments, **(closing if close else dict.fromkeys(closing)), o_ptr=part, state_ptr=state, begin=begin,
            end=end, chunk=chunk, CLOSE=close, **config.options(),
        )  # fmt: skip
        if not close:
            scale_strides = strides(closing["head_scale_ptr"], "head_scale", "bh")
            decode_attention_merge_kernel[(B * T * H,)](
                part_ptr=part, state_ptr=state, **closing, o_ptr=out, **scale_strides, rows=B * T * H, T=T, H=H,
                splits=splits, DV=DV, BLOCK_C=MERGED, BLOCK_V=padded(DV), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@_decode.register_fake
def _decode_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])
