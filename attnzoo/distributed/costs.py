"""What a sharded sequence costs in messages, by formula; `counting_traffic` counts the same."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.distributed.sequence import ring_hops


def bytes_sent(module: Any, form: str, tokens: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes that one rank sends for one sequence in an attention layer, forward and backward, in contiguous layout.

    The table "Bytes" of docs/scaling.md has the formulas. What travels is what a cache keeps of a token; gradients and
    states have at least 4 bytes a number.

    Args:
        module: a mechanism.
        form: one of those of `SequenceParallel`, but "hybrid".
        tokens: T.
        ranks: P.
        dtype: of the activations.

    Raises:
        ValueError: for another form.
    """
    P, T, b = ranks, tokens, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    if form == "state":
        sent = (P - 1) * module.state_numbers(T // P) * wide
        return sent, sent
    n = sum(heads * width for heads, width in module.cache_widths())
    once = (P - 1) * T * b // P
    if form == "gather":
        sent = once * n + (P - 1) * T * (wide - b) // P * module.wide_numbers()
        return sent, sent - (P - 1) * T * wide // P * module.constant_numbers()
    (G, D), *rest = module.cache_widths()
    if form == "ring":
        hops = ring_hops(module.sliding_window if module.causal and not module.sink_tokens else None, T // P, P)
        far, home = hops * T * b // P, (hops + 1) * T * wide // P if hops else 0
        if module.mixes_heads:
            return far * (module.score_numbers() + n), 2 * far * n + n * home
        if not module.expands_states:
            # An operation reads as many keys as values.
            n = max(G, rest[0][0]) * (D + rest[0][1])
        return far * n, far * n + n * home
    if form != "heads":
        raise ValueError(f"form must be 'gather', 'heads', 'ring' or 'state', got {form!r}")
    H, Dv = module.num_heads, module.v_head_dim
    if module.expands_states:
        sent = once * n + once * H * (module.head_dim + Dv) // P
    else:
        sent = once * (H * (D + Dv) + max(G, rest[0][0], P) * (D + Dv) + module.factor_numbers()) // P
    return sent, sent
