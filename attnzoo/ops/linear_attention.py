"""Attention without a softmax: o_t = sum_s w_ts (q_t . k_s) v_s, with weights that depend on blocks of tokens.

Plain linear attention has w_ts = 1; multi-head linear attention w_ts = m[block of t, block of s]. Shapes: q
(B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) give (B, T, H, Dv); query head h reads key/value head h // (H / G).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose, kernel_obstacle
from attnzoo.masks import AttentionMask
from attnzoo.ops.checks import check_sizes
from attnzoo.ops.score_rules import for_heads
from attnzoo.ops.token_blocks import Blocks, block_count, block_weights, document_blocks, pair_weights
from attnzoo.tracing import is_exporting


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool = True,
    mixing: Tensor | None = None,
    mask: AttentionMask | None = None,
    order: Tensor | None = None,
    state: Tensor | None = None,
    past: int = 0,
    shards: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """sum_s w_ts (q_t . k_s) v_s (B, T, H, Dv), and with a state the state after these tokens.

    w_ts is 1, or the entry of `mixing` for the blocks of t and s; 0 for a later key if causal, and across packed
    documents. "eager" computes it so, and stores (B, H, T, S); the others go through one sum of k v^T for each
    block. All sums are in the dtype of q, which is float32 or float64; kernels multiply in the dtype of v.

    Args:
        q: features of the queries (B, T, H, D).
        k: features of the keys (B, S, G, D); S = T if causal or with mixing.
        v: values (B, S, G, Dv).
        size: tokens of a block; without mixing it changes speed only.
        causal: no query sees a later key.
        mixing: (n, n) or (H, n, n), n the blocks that the tokens take, cached ones included. Default: 1.
        mask: a packed mask separates documents, each of which starts a new block; other parts are ignored.
        order: (T,) the tokens of one block after another, where a block is not a run of tokens.
        state: what tokens before these left, for causal calls that are not packed: sum k v^T (B, G, D, Dv), with
            mixing one for each block up to that of the first new token (B, past // size + 1, G, D, Dv). It is not
            changed, and no gradient goes to it.
        past: number of tokens in the state.
        shards: how the tokens of a longer sequence are spread over processes, if they are; then mask and mixing are
            those of all tokens, and a state is 0.
        backend: "auto", "eager" or "triton".

    Returns:
        Outputs, and with a state sum k v^T after these tokens: (B, G, D, Dv), with mixing one for each block that has
        new tokens. None without a state.

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    if shards is not None:
        options: dict[str, Any] = {"size": size, "causal": causal, "backend": backend}
        if mixing is not None:
            passed: tuple[Tensor, Tensor] = shards.ops.pass_block_states(q, k, v, shards, mixing=mixing, **options)
        else:
            passed = shards.ops.pass_state(q, k, v, shards, mask=mask, **options)
        return passed
    form = choose_form(backend, v.device, v.dtype)
    check_sizes(q, k, v)
    (B, T, H, D), G = q.shape, k.shape[2]
    if (causal or mixing is not None) and k.shape[1] != T:
        raise ValueError(f"causal attention and mixing need as many keys as queries, got {k.shape[1]} and {T}")
    mask = None if mask is None or mask.cu_seqlens is None else mask
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mixing))
    if state is not None and trains:
        state = state.detach().clone()  # its owner may overwrite it before the backward pass
    first, offset = (0, 0) if mixing is None else (past // size, past % size)
    if state is not None and T == 0:
        # No block has new tokens, not even one that the next token would begin.
        return q.new_zeros(B, T, H, v.shape[3]), state if mixing is None else state[:, :0]
    if state is not None and T == 1 and (form != "triton" or not trains):
        row = None if mixing is None else mixing[..., -1, :]
        if form == "triton":
            from attnzoo_kernels.linear_attention import linear_attention_step

            last = state if row is None else state[:, -1]
            before = last.clone()  # the kernel moves the last state in place
            out = linear_attention_step(q, k, v.to(q.dtype), state[:, None] if row is None else state, row)
            end = last.clone()
            last.copy_(before)
        else:
            out, end = linear_attention_recurrent(q, k, v.to(q.dtype), state, row)
        return out, end if row is None else end[:, None]
    if form == "eager" and state is None:
        pairs = pair_weights(q, k, size, causal, mixing, mask, order)
        return linear_attention_reference(q, k, v.to(q.dtype), pairs), None

    blocks = None if mask is None else document_blocks(mask, B, T, size)
    n = block_count(offset + T, size)
    # Only the causal kernel tells documents apart by itself.
    if mixing is None and blocks is not None and (form != "triton" or not causal):
        mixing = q.new_ones(1, 1).expand(n, n)
    weights = None if mixing is None else block_weights(mixing[..., first : first + n, first : first + n], blocks)
    total, by_block = (state, None) if mixing is None else (None, state)
    if by_block is not None and past:
        # New tokens take their places in blocks, of which the first may be begun.
        q, k, v = (F.pad(x, (0, 0, 0, 0, offset, n * size - offset - T)) for x in (q, k, v))
    if form == "triton":
        from attnzoo_kernels import linear_attention as kernels

        out, end = kernels.linear_attention(
            q.to(v.dtype), k.to(v.dtype), v, size=size, causal=causal, weights=weights, order=order,
            state=total, starts=None if blocks is None else blocks.starts(),
            fresh=blocks.block <= 0 if blocks is not None and weights is None else None,
        )  # fmt: skip
        if by_block is not None:
            end = kernels.linear_attention_states(k.to(v.dtype), v, size).transpose(1, 2)
    else:
        out, end = linear_attention_chunked(
            q, k, v.to(q.dtype), size=size, causal=causal, weights=weights, state=total, order=order, blocks=blocks
        )  # fmt: skip
    if by_block is not None and mixing is not None and past:
        # What tokens before these add.
        earlier = block_weights(mixing[..., first : first + n, : first + 1])
        cached = read_states(q.view(B, n, size, G, H // max(G, 1), D), earlier, by_block)
        out = (out + cached.reshape(out.shape))[:, offset : offset + T]
        end = torch.cat([end[:, :1] + by_block[:, -1:], end[:, 1:]], 1)
    return out, None if state is None else end


def choose_form(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "chunked", "eager" or "triton", for tensors on that device and products in that dtype."""
    no_softmax = "it has no softmax; only auto, eager and triton can"
    obstacles = {
        "triton": lambda: kernel_obstacle(device, dtype), "chunked": lambda: None, "eager": lambda: None,
        "sdpa": lambda: no_softmax, "flash": lambda: no_softmax,
    }  # fmt: skip
    return choose(backend, "linear attention", obstacles, device)


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
    """The definition: (q k^T * weights) v, weights (1 or B, 1 or H, T, S) with causality in them, or None for all 1."""
    scores = torch.einsum("bthd,bshd->bhts", q, for_heads(k, q.shape[2]))
    return torch.einsum("bhts,bshv->bthv", scores if weights is None else scores * weights, for_heads(v, q.shape[2]))


def linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token q (B, 1, H, D), k (B, 1, G, D), v (B, 1, G, Dv) after a state (B, G, D, Dv).

    With a row of weights, (m,) or (H, m), after one state for each block (B, m, G, D, Dv), that of the token's own
    last. Returns the output (B, 1, H, Dv) and the last state with the token in it.
    """
    B, _, H, D = q.shape
    G, group, Dv = k.shape[2], H // max(k.shape[2], 1), v.shape[3]
    q, k, v = q.reshape(B, G, group, D), k.reshape(B, G, D, 1), v.reshape(B, G, 1, Dv)
    end = torch.addcmul(state if row is None else state[:, -1], k, v)
    if row is None:
        return (q @ end).view(B, 1, H, Dv), end
    own = row[-1] if row.ndim == 1 else row[:, -1].view(G, group, 1)
    weights = row[None, None, None] if row.ndim == 1 else row[None, :, None]
    out = read_states(q[:, None, None], weights, state)[:, 0, 0] + own * (q @ k) * v
    return out.view(B, 1, H, Dv), end


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool,
    weights: Tensor | None = None,
    state: Tensor | None = None,
    blocks: Blocks | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in blocks of `size` tokens: one state (D, Dv) for each block, scores within a block only.

    O(T) time and memory for weights None, plus (T / size)^2 D Dv for others.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D); S = T if causal.
        v: values (B, S, G, Dv).
        size: tokens of a block.
        causal: no query sees a later key.
        weights: (1 or B, 1 or H, n, n) of block pairs; its diagonal multiplies what happens within a block. None: 1.
        state: (B, G, D, Dv) of everything before; for weights None only.
        blocks: of packed documents.
        order: as in `linear_attention`.

    Returns:
        Outputs (B, T, H, Dv), and the state after all keys, or with weights the state of every block.
    """
    if blocks is not None:
        q, k, v = blocks.spread(q), blocks.spread(k), blocks.spread(v)
    elif order is not None:
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    (B, T, H, D), (S, G), Dv = q.shape, k.shape[1:3], v.shape[3]
    if not causal and weights is None:
        total = torch.einsum("bsgd,bsgv->bgdv", k, v)
        total = total if state is None else total + state
        return torch.einsum("btgrd,bgdv->btgrv", q.view(B, T, G, H // max(G, 1), D), total).reshape(B, T, H, Dv), total
    n = block_count(S, size) if weights is None else weights.shape[-1]
    if is_exporting() or n * size != S:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, n * size - S)) for x in (q, k, v))
    q = q.view(B, n, size, G, H // max(G, 1), D)
    k, v = k.view(B, n, size, G, D), v.view(B, n, size, G, Dv)
    states = end = torch.einsum("bncgd,bncgv->bngdv", k, v)
    if weights is None:
        # Not a sum minus its last term: rounding would let later tokens of a block reach earlier ones.
        first = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
        sums = torch.cat([first, states], dim=1).cumsum(1)
        end = sums[:, -1]
        out = torch.einsum("bncgrd,bngdv->bncgrv", q, sums[:, :-1])
    else:
        out = read_states(q, weights.tril(-1) if causal else weights, states)
    if causal:
        scores = torch.einsum("bncgrd,bnsgd->bngrcs", q, k).tril()
        if weights is not None:
            own = weights.diagonal(dim1=-2, dim2=-1).expand(-1, H, -1).reshape(weights.shape[0], G, H // max(G, 1), n)
            scores = scores * own.permute(0, 3, 1, 2)[..., None, None]
        out = out + torch.einsum("bngrcs,bnsgv->bncgrv", scores, v)
    out = out.reshape(B, n * size, H, Dv)
    if blocks is not None:
        return blocks.gather(out), end
    if order is None and not is_exporting():
        return out[:, :T], end
    # A slice of an exported program would ask whether it is the whole.
    return out.index_select(1, torch.arange(T, device=out.device) if order is None else order.argsort()), end


def read_states(q: Tensor, weights: Tensor, states: Tensor) -> Tensor:
    """What queries (B, n, c, G, H / G, D) of n blocks find in states (B, m, G, D, Dv): (B, n, c, G, H / G, Dv).

    weights: (1 or B, 1 or H, n, m) of the states.
    """
    B, _, _, G, group, _ = q.shape
    if weights.shape[1] == 1:
        before = torch.einsum("bij,bjgdv->bigdv", weights[:, 0].expand(B, -1, -1), states)
        return torch.einsum("bncgrd,bngdv->bncgrv", q, before)
    by_head = weights.expand(B, -1, -1, -1).unflatten(1, (G, group))
    before = torch.einsum("bgrij,bjgdv->bigrdv", by_head, states)
    return torch.einsum("bncgrd,bngrdv->bncgrv", q, before)


def normalised(out: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Outputs (B, T, H, Dv) over sums of weights that cannot be negative, (B, T, H, 1), and eps; 0 where that is 0."""
    sums = sums + eps
    # With eps, no sum is 0.
    return out / (sums if eps else sums + (sums == 0))


def slot_sums(q: Tensor, k: Tensor, mixing: Tensor, *, size: int, order: Tensor | None = None) -> Tensor:
    """sum_j m_ij q_jc . z_j with z_j = sum_c k_jc, for slot c of block i: (B, T, H, 1).

    By this, whose queries are those of the same slot in every other block, the image code that was released with
    multi-head linear attention divides.

    Args:
        q: features of the queries (B, T, H, D), T = M size.
        k: features of the keys (B, T, G, D).
        mixing: (M, M) or (H, M, M).
        size: tokens C of a block.
        order: (T,) the tokens of one block after another, where a block is not a run of tokens.
    """
    if order is not None:
        q, k = q.index_select(1, order), k.index_select(1, order)
    (B, T, H, D), M, G = q.shape, mixing.shape[-1], k.shape[2]
    sums = k.view(B, M, size, G, D).sum(2).repeat_interleave(H // max(G, 1), 2)
    own = torch.einsum("bjchd,bjhd->bjch", q.view(B, M, size, H, D), sums)
    mixed = torch.einsum("hij,bjch->bich", mixing.expand(H, M, M), own).reshape(B, T, H, 1)
    return mixed if order is None else mixed.index_select(1, order.argsort())
