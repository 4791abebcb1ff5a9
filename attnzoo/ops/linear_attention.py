"""Attention without a softmax: o_t = sum_s w_ts (q_t . k_s) v_s, with weights that depend on blocks of tokens.

Plain linear attention has w_ts = 1; multi-head linear attention w_ts = m[block of t, block of s]. Shapes: q
(B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) give (B, T, H, Dv); query head h reads key/value head h // (H / G). All
sums run in the dtype of the inputs, so half-precision features have to be cast up before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import AttentionMask


@dataclass(frozen=True)
class Blocks:
    """Where every token of packed rows goes when each document starts a block of its own.

    Attributes:
        slot: (B, T) place of each token in a row of `count` blocks of `size` tokens, padding between documents.
        block: (B, count) number of each block within its document, -1 for an unused one.
        document: (B, count) document of each block.
        size: tokens of a block.
        count: blocks of a row.
    """

    slot: Tensor
    block: Tensor
    document: Tensor
    size: int
    count: int

    def spread(self, x: Tensor) -> Tensor:
        """x (B, T, ...) on its places, (B, count * size, ...), zeros elsewhere."""
        B, T = x.shape[:2]
        room = x.new_zeros(B, self.count * self.size, *x.shape[2:])
        index = self.slot.view(B, T, *(1,) * (x.ndim - 2)).expand_as(x)
        return room.scatter(1, index, x)

    def starts(self) -> Tensor:
        """(B, count + 1): block i of a row holds its tokens starts[i] .. starts[i + 1] - 1, none if it is unused."""
        of_token = (self.slot // self.size).contiguous()
        block = torch.arange(self.count + 1, device=of_token.device).expand(of_token.shape[0], -1).contiguous()
        return torch.searchsorted(of_token, block)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        index = self.slot.view(*self.slot.shape, *(1,) * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def document_blocks(mask: AttentionMask, batch: int, tokens: int, size: int) -> Blocks:
    """Blocks of packed documents; every document starts a new one."""
    position = mask.positions(batch, tokens)
    assert position is not None
    starts = position % size == 0
    of_token = starts.long().cumsum(1) - 1
    if torch.compiler.is_compiling():
        assert mask.cu_seqlens is not None
        count = -(-tokens // size) + mask.cu_seqlens.shape[0]
    else:
        count = int(of_token.max()) + 1 if of_token.numel() else 1
    slot = of_token * size + position % size
    block = position.new_full((batch, count), -1).scatter(1, of_token, position // size)
    document = torch.zeros_like(block).scatter(1, of_token, (position == 0).long().cumsum(1))
    return Blocks(slot, block, document, size, count)


def block_weights(mixing: Tensor, blocks: Blocks | None, count: int) -> Tensor:
    """Weights of block pairs (1 or B, 1 or H, n, n) from mixing (n, n) or (H, n, n); 0 across documents."""
    mixing = mixing if mixing.ndim == 3 else mixing[None]
    if blocks is None:
        return mixing[None, :, :count, :count]
    at = blocks.block.clamp(min=0)
    chosen = mixing[:, at[:, :, None], at[:, None, :]].transpose(0, 1)
    same = (blocks.document[:, :, None] == blocks.document[:, None, :]) & (blocks.block >= 0)[:, None, :]
    return chosen * same[:, None]


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
    """The definition: (q k^T * weights) v, weights (1 or B, 1 or H, T, S) with causality in them, or None for all 1."""
    repeats = q.shape[2] // max(k.shape[2], 1)
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", scores if weights is None else scores * weights, v)


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool,
    weights: Tensor | None = None,
    state: Tensor | None = None,
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

    Returns:
        Outputs (B, T, H, Dv), and for weights None the state after all keys.
    """
    B, T, H, D = q.shape
    S, G, Dv = k.shape[1], k.shape[2], v.shape[3]
    if not causal and weights is None:
        total = torch.einsum("bsgd,bsgv->bgdv", k, v)
        total = total if state is None else total + state
        out = torch.einsum("btgrd,bgdv->btgrv", q.view(B, T, G, H // G, D), total)
        return out.reshape(B, T, H, Dv), total
    n = max(1, -(-S // size))
    spare = n * size - S
    if spare:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, spare)) for x in (q, k, v))
    q = q.view(B, n, size, G, H // G, D)
    k, v = k.view(B, n, size, G, D), v.view(B, n, size, G, Dv)
    states = torch.einsum("bncgd,bncgv->bngdv", k, v)
    diagonal = None
    if weights is None:
        # Not a sum minus its last term: rounding would let later tokens of a block reach earlier ones.
        first = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
        sums = torch.cat([first, states], dim=1).cumsum(1)
        before, end = sums[:, :-1], sums[:, -1]
        out = torch.einsum("bncgrd,bngdv->bncgrv", q, before)
    else:
        end = states
        mixed = weights.tril(-1) if causal else weights
        diagonal = weights.diagonal(dim1=-2, dim2=-1)
        if weights.shape[1] == 1:
            before = torch.einsum("bij,bjgdv->bigdv", mixed[:, 0].expand(B, -1, -1), states)
            out = torch.einsum("bncgrd,bngdv->bncgrv", q, before)
        else:
            per_head = mixed.expand(B, -1, -1, -1).unflatten(1, (G, H // G))  # type: ignore[no-untyped-call]
            before = torch.einsum("bgrij,bjgdv->bigrdv", per_head, states)
            out = torch.einsum("bncgrd,bngrdv->bncgrv", q, before)
    if causal:
        scores = torch.einsum("bncgrd,bnsgd->bngrcs", q, k).tril()
        if diagonal is not None:
            heads = diagonal.expand(diagonal.shape[0], H, n).view(-1, G, H // G, n)
            scores = scores * heads.permute(0, 3, 1, 2)[..., None, None]
        out = out + torch.einsum("bngrcs,bnsgv->bncgrv", scores, v)
    out = out.reshape(B, n * size, H, Dv)
    return (out[:, :T] if spare else out), end
