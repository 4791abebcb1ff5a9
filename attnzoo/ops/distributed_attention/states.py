"""Form "state": sums of keys and values travel, as linear attention needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.distributed import collectives
from attnzoo.distributed.sequence import Shards
from attnzoo.masks import AttentionMask
from attnzoo.ops.linear_attention import linear_attention, read_states


def pass_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: Shards,
    *,
    size: int,
    causal: bool,
    mask: AttentionMask | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` of a sharded sequence: each rank adds what the states of the others hold (arXiv:2502.07563).

    Every run of tokens has one state sum k v^T; all are gathered, which does not depend on the number of tokens, and a
    run reads the sum of those before it, or if not causal of all others. In packed rows a state is that of the run's
    last document, and if not causal there is one of its first, so that runs read those of their own documents alone.

    Args:
        q: features of the queries (B, t, H, D).
        k: features of the keys (B, t, G, D).
        v: values (B, t, G, Dv).
        shards: how the tokens are spread.
        size: as in `linear_attention`.
        causal: no query sees a later key.
        mask: a packed mask of the whole sequence separates documents; other parts are ignored.
        backend: of what happens within a run.

    Returns:
        Outputs (B, t, H, Dv), and the sum of all states (B, G, D, Dv), without gradient.
    """
    sp, v = shards.sp, v.to(q.dtype)
    if not shards.tokens:
        out, _ = linear_attention(q, k, v, size=size, causal=causal, backend=backend)
        return out, torch.einsum("bsgd,bsgv->bgdv", k, v)
    documents = None if mask is None or mask.cu_seqlens is None else mask._documents(q.shape[0], shards.tokens)[1]
    one = not causal and documents is None
    length = q.shape[1] if one else sp.runs(shards.tokens)[0][1]
    places = [
        [rank] if one else [start // length for start, _ in sp.runs(shards.tokens, rank)] for rank in range(sp.size)
    ]
    order = torch.tensor([place for own in places for place in own]).argsort().to(q.device)
    runs = list(zip(places[sp.rank], q.split(length, 1), k.split(length, 1), v.split(length, 1), strict=True))
    # The document (B, n) at the first and at the last token of every run.
    firsts, lasts = (None if documents is None else documents[:, at::length] for at in (0, length - 1))

    def states(edges: Tensor | None) -> Tensor:
        kept = [
            torch.einsum("bsgd,bsgv->bgdv", key * _inside(documents, edges, n, key), value) for n, _, key, value in runs
        ]
        return collectives.differentiable_gather(torch.stack(kept), sp.group).flatten(0, 1).index_select(0, order)

    ending = states(lasts)
    beginning = ending if causal or documents is None else states(firsts)
    outs = []
    for n, query, key, value in runs:
        own = None if documents is None else packed_again(documents[:, n * length : (n + 1) * length])
        out, _ = linear_attention(query, key, value, size=size, causal=causal, mask=own, backend=backend)
        earlier, later = slice(0, n), slice(n + 1, len(order))
        sides = ((earlier, ending, firsts, lasts), (later, beginning, lasts, firsts))
        for others, held, edges, of_others in sides[: 1 if causal else 2]:
            read = held[others]
            if edges is not None and of_others is not None:
                same = of_others[:, others] == edges[:, n : n + 1]
                read = read * same.T[..., None, None, None].to(read.dtype)
            # Also where there are none, so that every rank takes part in the backward pass.
            out = out + _read_total(query * _inside(documents, edges, n, query), read.sum(0))
        outs.append(out)
    return torch.cat(outs, 1), ending.detach().sum(0)


def _inside(documents: Tensor | None, edges: Tensor | None, run: int, like: Tensor) -> Tensor | float:
    """1 for tokens (B, length, 1, 1) of the run in the document at its edge (B, n), 0 for others."""
    if documents is None or edges is None:
        return 1.0
    own = documents[:, run * like.shape[1] : (run + 1) * like.shape[1]]
    return (own == edges[:, run : run + 1])[..., None, None].to(like.dtype)


def _read_total(q: Tensor, state: Tensor) -> Tensor:
    """q (B, t, H, D) times a state (B, G, D, Dv) of its key/value head: (B, t, H, Dv)."""
    grouped = q.unflatten(2, (state.shape[1], -1))
    return torch.einsum("btgrd,bgdv->btgrv", grouped, state).flatten(2, 3)


def packed_again(documents: Tensor) -> AttentionMask:
    """A packed mask of rows whose tokens are in these documents (B, t)."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ends = torch.cat([starts.flatten().nonzero()[:, 0], starts.new_full((1,), starts.numel(), dtype=torch.long)])
    return AttentionMask.packed(ends.int())


def pass_block_states(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, *, size: int, causal: bool, mixing: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """`linear_attention` with a mixing matrix of a sharded sequence: the states of all blocks are gathered.

    Args:
        q: features of the queries (B, t, H, D).
        k: features of the keys (B, t, G, D).
        v: values (B, t, G, Dv).
        shards: how the tokens are spread; its runs must consist of whole blocks.
        size: tokens of a block.
        causal: no query sees a later key; then mixing is triangular.
        mixing: (n, n) or (H, n, n) of all n blocks.
        backend: of what happens within a block.

    Returns:
        Outputs (B, t, H, Dv), and the states of all blocks (B, n, G, D, Dv), without gradient.

    Raises:
        ValueError: if a run ends within a block, since its state would then belong to two ranks.
    """
    sp, (B, t, H, D), G = shards.sp, q.shape, k.shape[2]
    runs = sp.runs(shards.tokens)
    if any(start % size or length % size for start, length in runs):
        raise ValueError(
            f"x must have runs of whole blocks on each rank, a multiple of block_size {size} tokens, got "
            f"{[length for _, length in runs]}"
        )
    own = (shards.positions[::size] // size).to(q.device)
    kept = torch.einsum("bncgd,bncgv->nbgdv", k.unflatten(1, (-1, size)), v.to(q.dtype).unflatten(1, (-1, size)))
    order = sp.order(shards.tokens)[::size].to(q.device) // size
    states = collectives.differentiable_gather(kept, sp.group).flatten(0, 1).index_select(0, order).transpose(0, 1)
    within = torch.diag_embed(mixing.diagonal(dim1=-2, dim2=-1).index_select(-1, own))
    out, _ = linear_attention(q, k, v, size=size, causal=causal, mixing=within, backend=backend)
    rows = mixing.index_select(-2, own)
    rows = rows * (own[:, None] != torch.arange(mixing.shape[-1], device=q.device)).to(rows.dtype)
    rows = rows[None] if rows.ndim == 3 else rows[None, None]
    read = read_states(q.view(B, t // size, size, G, H // G, D), rows, states)
    return out + read.reshape(out.shape), states.detach()
