"""The `triton` backend of linear attention and of multi-head linear attention.

Features come in float32 and go into the kernels in the dtype of the model's products; sums come back in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear_attention import Blocks


def fused_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    state: Tensor | None = None,
    blocks: Blocks | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_attention_chunked`, through the kernels; checked before by `attnzoo.backends.kernel_obstacle`.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D); S = T if causal or with weights.
        v: values (B, S, G, Dv).
        size: tokens of a block.
        causal: no query sees a later key.
        dtype: of the products.
        weights: (1 or B, 1 or H, n, n) of block pairs, or None for 1.
        state: (B, G, D, Dv) of everything before; for weights None without blocks.
        blocks: of packed documents, with their weights; causal and without weights the documents alone count.
        order: (T,) the tokens of one block after another.

    Returns:
        Outputs (B, T, H, Dv) in float32, and for weights None without blocks the state after all keys.
    """
    from attnzoo_kernels.linear_attention import linear_attention

    starts = None if blocks is None else blocks.starts()
    fresh = blocks.block <= 0 if blocks is not None and weights is None else None
    out: tuple[Tensor, Tensor] = linear_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), size=size, causal=causal, weights=weights, state=state, starts=starts,
        fresh=fresh, order=order,
    )  # fmt: skip
    return out


def block_states(k: Tensor, v: Tensor, *, size: int, dtype: torch.dtype) -> Tensor:
    """sum k^T v over each block of `size` tokens, (B, n, G, D, Dv), float32. Without gradients."""
    from attnzoo_kernels.linear_attention import linear_attention_states

    states: Tensor = linear_attention_states(k.to(dtype), v.to(dtype), size)
    return states.transpose(1, 2)


def continued(q: Tensor, k: Tensor, v: Tensor, states: Tensor, *, size: int, dtype: torch.dtype) -> Tensor:
    """Outputs of new tokens after a state (B, G, D, Dv), which moves on."""
    if _decodes(q, k, v):
        return _step(q, k, v, states[:, None], None)
    out, end = fused_linear_attention(q, k, v, size=size, causal=True, dtype=dtype, state=states.clone())
    states.copy_(end.detach())
    return out


def continued_block(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor, row: Tensor, *, size: int, dtype: torch.dtype
) -> Tensor:
    """Outputs of new tokens of one block; states (B, i + 1, G, D, Dv) of the blocks up to it, whose last moves on.

    row: weights of these blocks, (i + 1,) or (H, i + 1).
    """
    if _decodes(q, k, v, row):
        return _step(q, k, v, states, row.contiguous())
    seen, own = states.clone(), row[..., -1]
    if row.ndim == 1:
        before = torch.einsum("j,bjgdv->bgdv", row, seen)
        weighed = v * own
    else:
        repeats = q.shape[2] // k.shape[2]
        before = torch.einsum("hj,bjhdv->bhdv", row, seen.repeat_interleave(repeats, 2))
        weighed = v.repeat_interleave(repeats, 2) * own[:, None]
        k_of_head = k.repeat_interleave(repeats, 2)
    keys = k if row.ndim == 1 else k_of_head
    out, _ = fused_linear_attention(q, keys, weighed, size=size, causal=True, dtype=dtype, state=before)
    states[:, -1] += block_states(k.detach(), v.detach(), size=size, dtype=dtype)[:, 0]
    return out


def finished(out: Tensor, weight: Tensor | None, gate: Tensor | None, *, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm of heads (B, T, H, Dv) with a weight (Dv,), times swish of gate (B, T, H Dv); both optional."""
    from attnzoo_kernels.linear_attention_finish import linear_attention_finish

    heads: Tensor = linear_attention_finish(out, weight, gate, eps=eps, dtype=dtype)
    return heads


def _step(q: Tensor, k: Tensor, v: Tensor, states: Tensor, weights: Tensor | None) -> Tensor:
    from attnzoo_kernels.linear_attention_step import linear_attention_step

    out: Tensor = linear_attention_step(q, k, v, states, weights)
    return out


def _decodes(*tensors: Tensor) -> bool:
    """One new token, and nobody wants a gradient."""
    return tensors[0].shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
