"""Routing of tokens to heads: gates, their losses, and attention of the chosen heads alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask
from attnzoo.ops.fused_routing import fused_routed_attention, routed_obstacle


def two_stage_gates(
    routed: Tensor | None,
    shared: Tensor | None,
    kinds: Tensor | None,
    *,
    active: int,
    num_shared: int,
    form: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gates of shared heads first, then of routed ones (arXiv:2410.11842, equations 5 to 8).

    "scaled", as the authors' code runs it: alpha_0 Hs softmax(shared) and alpha_1 K softmax(selected routed), with
    alpha = 2 softmax(kinds); indifferent routers give 1. "paper", as printed: softmax(kinds) times the softmax over
    the shared heads, and over all routed heads, of which the selected count.

    Args:
        routed: logits of the routed heads (B, T, R), or None if no head is routed.
        shared: logits of the shared heads (B, T, Hs), or None for at most one.
        kinds: logits (B, T, 2) of shared and routed, or None if there is only one kind.
        active: K routed heads for a token.
        num_shared: Hs.
        form: "scaled" or "paper".

    Returns:
        Gates (B, T, Hs + R), the selected routed heads (B, T, R) boolean, and their probabilities (B, T, R).
    """
    scaled = form == "scaled"
    weights = None if kinds is None else (2.0 if scaled else 1.0) * kinds.softmax(-1)
    parts = []
    if num_shared:
        like = shared if shared is not None else routed
        assert like is not None
        s = like.new_ones(*like.shape[:-1], 1) if shared is None else shared.softmax(-1)
        s = s * (num_shared if scaled else 1)
        parts.append(s if weights is None else s * weights[..., :1])
    selected, probability = None, None
    if routed is not None:
        probability = routed.softmax(-1)
        selected = top_heads(routed, active)
        chosen = routed.masked_fill(~selected, -math.inf)
        u = chosen.softmax(-1) * active if scaled else probability * selected
        parts.append(u if weights is None else u * weights[..., 1:])
    return torch.cat(parts, dim=-1), selected, probability


def query_norm_gates(norms: Tensor, *, active: int, num_shared: int, ste: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gates 1 for shared and for the K routed heads with the longest queries (section 4.4, equations 9 and 10).

    The probabilities are the softmax of the norms over their standard deviation; with `ste` "all" or "active" their
    gradient passes through the gates of all routed or of the selected heads.

    Args:
        norms: lengths of the routed heads' queries (B, T, R).
        active: K.
        num_shared: Hs.
        ste: "all", "active" or "none".

    Returns:
        Gates (B, T, Hs + R), selected (B, T, R), probabilities (B, T, R).
    """
    centred = norms - norms.mean(-1, keepdim=True)
    # Unbiased; torch's own std warns about an empty batch, and its root has no gradient at 0.
    spread = (centred.square().sum(-1, keepdim=True) / (norms.shape[-1] - 1)).clamp(min=1e-24).sqrt()
    probability = (norms / spread).softmax(-1)
    selected = top_heads(norms, active)
    gate = selected.to(norms.dtype)
    if ste != "none":
        through = probability - probability.detach()
        gate = gate + (through if ste == "all" else through * gate)
    return F.pad(gate, (num_shared, 0), value=1.0), selected, probability


def top_heads(scores: Tensor, count: int) -> Tensor:
    """Boolean of the `count` largest along the last axis."""
    chosen = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def load_balance_loss(selected: Tensor, probability: Tensor, real: Tensor | None) -> Tensor:
    """R sum_i P_i f_i over real tokens: mean probability times how often head i is selected; K when balanced."""
    valid = torch.ones_like(probability[..., 0]) if real is None else real.to(probability.dtype)
    total = valid.sum().clamp(min=1)
    mean = (probability * valid[..., None]).sum((0, 1)) / total
    frequency = (selected * valid[..., None]).sum((0, 1)) / total
    return probability.shape[-1] * (mean * frequency).sum()


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    scale: float,
    mask: AttentionMask | None = None,
    gates: Tensor | None = None,
    rows_at_once: int = 256,
    backend: str = "auto",
) -> Tensor:
    """Causal self-attention of the active (token, head) pairs alone, times their gates; zeros for the others.

    For each key/value head the active rows of its query heads are packed by token, and every tile of them sees the
    keys up to its last token. Neither the outputs nor the scores of inactive pairs are computed.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, T, G, D).
        v: values (B, T, G, Dv).
        active: (B, T, H) boolean.
        scale: of the scores.
        mask: None, padding or packed documents.
        gates: (B, T, H) factors of the pairs, or None for 1. Those of inactive pairs get no gradient.
        rows_at_once: rows of a tile, where torch's attention runs the tiles.
        backend: "sdpa" (torch's attention, tile after tile, which waits for the routing), "triton" (one kernel for all
            tiles, which does not) or "auto": the kernel on GPUs.

    Returns:
        (B, T, H, Dv).

    Raises:
        BackendUnavailable: if a named backend cannot serve the call.
    """
    if runs_packed_kernels(q, v, mask, backend):
        return fused_routed_attention(q, k, v, active, gates, scale=scale, mask=mask)
    B, T, H, D = q.shape
    G, Dv = k.shape[2], v.shape[3]
    size = H // G
    document = None if mask is None or mask.cu_seqlens is None else mask._documents(B, T)[1]
    key = torch.arange(T, device=q.device)
    outputs = []
    for b in range(B):
        for g in range(G):
            heads = slice(g * size, (g + 1) * size)
            place = active[b, :, heads].flatten().nonzero()[:, 0]
            # One gather and one scatter for a group; what a tile costs in the backward pass stays small.
            rows = q[b, :, heads].reshape(T * size, D).index_select(0, place)
            keys, values = k[b, :, g], v[b, :, g]
            tiles = []
            for row, at in zip(torch.split(rows, rows_at_once), torch.split(place, rows_at_once), strict=True):
                if at.numel() == 0:
                    continue
                token = at // size
                first, last = int(token[0]), int(token[-1]) + 1
                # Additive, since the CPU kernel converts a boolean mask anew; the first rows see all keys before them.
                bias = rows.new_zeros(at.numel(), last)
                bias[:, first:].masked_fill_(key[first:last] > token[:, None], -math.inf)
                if mask is not None and mask.lengths is not None:
                    bias.masked_fill_(key[:last] >= mask.lengths[b], -math.inf)
                if document is not None:
                    bias.masked_fill_(document[b, :last] != document[b, token][:, None], -math.inf)
                tiles.append(
                    F.scaled_dot_product_attention(
                        row[None, None], keys[None, None, :last], values[None, None, :last],
                        attn_mask=bias[None, None], scale=scale,
                    )[0, 0]
                )  # fmt: skip
            room = v.new_zeros(T * size, Dv)
            outputs.append(room.index_copy(0, place, torch.cat(tiles)) if tiles else room)
    out = torch.stack(outputs).view(B, G, T, size, Dv).transpose(1, 2).reshape(B, T, H, Dv)
    return out if gates is None else out * gates.to(out.dtype)[..., None]


def runs_packed_kernels(q: Tensor, v: Tensor, mask: AttentionMask | None, backend: str) -> bool:
    """Whether `routed_attention` takes the kernels; raises BackendUnavailable if a named backend cannot run."""
    ways: dict[str, Callable[[], str | None]] = {
        "triton": lambda: routed_obstacle(q, v, mask),
        "sdpa": lambda: None,
    }
    # On a CPU the kernels run in Triton's interpreter, which is for tests: only by name.
    order = ways if q.is_cuda else dict(reversed(ways.items()))
    return choose(backend, "routed_attention", order) == "triton"
