"""Routing of tokens to heads: gates, losses of routers, and attention of the chosen heads alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import Visibility
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention, softmax_kernel_obstacle


def two_stage_gates(
    routed: Tensor, shared: Tensor | None, kinds: Tensor | None, *, active: int, num_shared: int, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of shared heads first, then of routed ones (arXiv:2410.11842, equations 5 to 8).

    "scaled", as the authors' code runs it: alpha_0 Hs softmax(shared) and alpha_1 K softmax(selected routed), with
    alpha = 2 softmax(kinds); indifferent routers give 1. "paper", as printed: softmax(kinds) times the softmax over
    the shared heads, and over all routed heads, of which the selected count.

    Args:
        routed: logits of the routed heads (B, T, R); R = 0 if no head is routed.
        shared: logits of the shared heads (B, T, Hs), or None for at most one.
        kinds: logits (B, T, 2) of shared and routed, or None if there is only one kind.
        active: K routed heads for a token.
        num_shared: Hs.
        form: "scaled" or "paper".

    Returns:
        Gates (B, T, Hs + R), the selected routed heads (B, T, R) boolean, and their probabilities (B, T, R).
    """
    probability, selected = routed.softmax(-1), top_heads(routed, active)
    s = routed.new_ones(*routed.shape[:-1], num_shared) if shared is None else shared.softmax(-1)
    if form == "scaled":
        s, u = num_shared * s, active * routed.masked_fill(~selected, -math.inf).softmax(-1)
    else:
        u = probability * selected
    if kinds is not None:
        alpha = kinds.softmax(-1) * (2 if form == "scaled" else 1)
        s, u = s * alpha[..., :1], u * alpha[..., 1:]
    return torch.cat([s, u], dim=-1), selected, probability


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
    # Unbiased, but of one head, which pruning may leave. torch's own std warns about an empty batch, and its root has
    # no gradient at 0.
    spread = (centred.square().sum(-1, keepdim=True) / max(norms.shape[-1] - 1, 1)).clamp(min=1e-24).sqrt()
    probability, selected = (norms / spread).softmax(-1), top_heads(norms, active)
    gate = selected.to(norms.dtype)
    if ste != "none":
        through = probability - probability.detach()
        gate = gate + (through if ste == "all" else through * gate)
    return F.pad(gate, (num_shared, 0), value=1.0), selected, probability


def top_heads(scores: Tensor, count: int) -> Tensor:
    """Boolean of the `count` largest along the last axis."""
    chosen = scores.topk(count, dim=-1).indices
    # From a tensor: TorchScript has no scatter of a boolean number.
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))


def token_means(values: Sequence[Tensor], real: Tensor | None, group: Any = None) -> tuple[Tensor, ...]:
    """Mean (N,) of each (B, T, N) over the real tokens (B, T), or over all; 0 if there is none.

    With a process group the means are over the tokens of all its processes. What flows back to a process is the
    gradient of its own tokens times the number of processes, so that gradients averaged over the processes are those
    of the means.
    """
    x = torch.cat(list(values), dim=-1)
    valid = torch.ones_like(x[..., :1]) if real is None else real[..., None].to(x.dtype)
    total, count = (x * valid).sum((0, 1)), valid.sum()
    if group is not None:
        everywhere = torch.cat([total.detach(), count[None]])
        dist.all_reduce(everywhere, group=group)
        total = everywhere[:-1] + dist.get_world_size(group) * (total - total.detach())
        count = everywhere[-1]
    means: tuple[Tensor, ...] = (total / count.clamp(min=1)).split([value.shape[-1] for value in values])
    return means


@dataclass(frozen=True)
class Routing:
    """What a router did in a training forward; N counts routed heads or experts.

    Attributes:
        load: (N,) how often each was selected by a real token; of experts, its share of all choices.
        probability: (N,) mean probability of each.
        entropy: mean entropy of a token's probabilities, in nats.
    """

    load: Tensor
    probability: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, selected: Tensor, probability: Tensor, real: Tensor | None, group: Any = None) -> Routing:
        """Means, as `token_means`, of what was selected and of the probabilities, both (B, T, N)."""
        entropy = -(probability * probability.clamp(min=1e-30).log()).sum(-1, keepdim=True)
        load, mean, entropy = token_means([selected.to(probability.dtype), probability, entropy], real, group)
        return cls(load, mean, entropy[0])

    def detach(self) -> Routing:
        """Without gradients."""
        return Routing(self.load.detach(), self.probability.detach(), self.entropy.detach())


def load_balance_loss(routing: Routing) -> Tensor:
    """R sum_i P_i f_i: mean probability times how often head i is selected; K when balanced."""
    return routing.probability.shape[-1] * (routing.probability * routing.load).sum()


def router_losses(
    logits: Tensor, chosen: Tensor, gates: Tensor, real: Tensor | None, group: Any = None
) -> tuple[dict[str, Tensor], Routing]:
    """Losses of a router of experts without coefficients, over the real tokens of the batch, and its statistics.

        switch = N sum_e (P_e / sum P) (f_e / sum f)               1 when balanced
        z      = mean logsumexp(l)^2
        cv     = Var(I / sum I) / (mean^2 + 1e-10), I_e the sum of gates
        mi     = mean_t H(p_t) - H(mean_t p_t)                     -log N .. 0

    Args:
        logits: (B, T, N).
        chosen: (B, T, k) experts, all different.
        gates: (B, T, k).
        real: (B, T) boolean, or None if all tokens are.
        group: processes that the batch is spread over, as in `token_means`.
    """
    N, p, nothing = logits.shape[-1], logits.softmax(-1), torch.zeros_like(logits)
    mean, frequency, importance, squares, entropy = token_means(
        [
            p,
            nothing.scatter(-1, chosen, torch.ones_like(gates)),
            nothing.scatter(-1, chosen, gates),
            logits.logsumexp(-1, keepdim=True).square(),
            -(p * logits.log_softmax(-1)).sum(-1, keepdim=True),
        ],
        real,
        group,
    )
    share = importance / importance.sum().clamp(min=1e-30)
    spread = share.var() if N > 1 else share.new_zeros(())
    losses = {
        "switch": N * (mean / mean.sum().clamp(min=1e-30) * frequency / frequency.sum().clamp(min=1)).sum(),
        "z": squares[0],
        "cv": spread / (share.mean().square() + 1e-10),
        "mi": entropy[0] + (mean * (mean + 1e-8).log()).sum(),
    }
    return losses, Routing(frequency / chosen.shape[-1], mean, entropy[0])


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, view: Visibility = Visibility(), *, scale: float,  # noqa: B008
    gates: Tensor | None = None, rows_at_once: int = 256, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal self-attention of the active (token, head) pairs alone, times their gates; zeros for the others.

    For each key/value head the active rows of its query heads are packed by token, and every tile of them sees the
    keys up to its last token. Neither the outputs nor the scores of inactive pairs are computed.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, T, G, D).
        v: values (B, T, G, Dv).
        active: (B, T, R) boolean, of the last R heads; those before them are active at every token.
        view: causality, and padding or packed documents.
        scale: of the scores.
        gates: (B, T, H) factors of the pairs, or None for 1. Those of inactive pairs get no gradient.
        rows_at_once: rows of a tile, where torch's attention runs the tiles.
        backend: "sdpa" (torch's attention, tile after tile, which waits for the routing; plain attention for the first
            H - R heads), "triton" (one kernel for all tiles, which does not) or "auto": the kernel on GPUs.

    Returns:
        (B, T, H, Dv).

    Raises:
        ValueError: for a view with anything else in it, or one that does not fit, and for active pairs that do not.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    B, T, H, _ = q.shape
    if not view.causal or view.window is not None or view.start(T, k.shape[1]) or k.shape[1] != T:
        raise ValueError("view must be causal, without a window, of as many queries as keys, to be routed")
    if active.dtype != torch.bool or active.shape[:2] != (B, T) or active.shape[2] > H:
        raise ValueError(
            f"active must be boolean (B, T, R) of at most {H} heads for q of shape {tuple(q.shape)}, got "
            f"{active.dtype} of shape {tuple(active.shape)}"
        )
    if (observer := current_observer()) is not None:
        observer(Observation("routed_attention", q, k, v, view, ScoreRules(scale)))
    shared = H - active.shape[2]
    packs = runs_packed_kernels(q, v, view, backend)
    known = view.for_kernel((B, H, T, T), q.device)
    lengths, documents = known["lengths"], known["documents"]
    if packs:
        from attnzoo_kernels.head_routing import routed_attention as kernel

        active = F.pad(active, (shared, 0), value=True)
        out: Tensor = kernel(q, k, v, active, scale=scale, gates=gates, lengths=lengths, documents=documents)
        return out
    last = torch.arange(1, T + 1, device=q.device).expand(B, T)
    last = last if lengths is None else torch.minimum(last, lengths[:, None])
    first = torch.zeros_like(last) if documents is None else documents[0]
    out = _packed_attention(q, k, v, F.pad(active, (shared, 0)), first, last, scale, rows_at_once)
    if shared:
        group = torch.arange(shared, device=q.device) // (H // k.shape[2])
        own_k, own_v = (x[:, :, :shared] if x.shape[2] == H else x.index_select(2, group) for x in (k, v))
        always = softmax_attention(q[:, :, :shared], own_k, own_v, view, scale=scale, backend=backend)
        out = torch.cat([always, out[:, :, shared:]], dim=2)
    return out if gates is None else out * gates.to(out.dtype)[..., None]


def runs_packed_kernels(q: Tensor, v: Tensor, view: Visibility, backend: str) -> bool:
    """Whether `routed_attention` takes the kernels; raises BackendUnavailable if a named backend cannot run."""
    dense = view.mask is not None and view.mask.dense_mask is not None
    obstacle = "the kernels of packed rows take no dense mask" if dense else None
    ways = {"triton": lambda: softmax_kernel_obstacle(q, v) or obstacle, "sdpa": lambda: obstacle}
    return choose(backend, "routed_attention", ways, q.device) == "triton"


def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, first: Tensor, last: Tensor, scale: float, rows_at_once: int
) -> Tensor:
    """The tiles of `routed_attention` by torch's attention, without gates.

    Token t of row b sees the keys first[b, t] <= j < last[b, t], which never decrease with t.
    """
    (B, T, H, _), G, Dv = q.shape, k.shape[2], v.shape[3]
    size, key = H // G, torch.arange(T, device=q.device)
    # A token that sees nothing is active nowhere: its output is 0.
    active = active & (first < last)[..., None]
    rows, active = (
        x.reshape(B, T, G, size, *x.shape[3:]).transpose(1, 2).flatten(2, 3).flatten(0, 1) for x in (q, active)
    )
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    outputs = [v.new_zeros(0, Dv)]
    for n in range(B * G):
        place = active[n].nonzero()[:, 0]
        # One gather and one scatter for a group; what a tile costs in the backward pass stays small.
        own, tiles = rows[n].index_select(0, place), [values[n, :0]]
        for row, token in zip(torch.split(own, rows_at_once), torch.split(place // size, rows_at_once), strict=True):
            if not token.numel():
                continue
            lo, hi = first[n // G, token], last[n // G, token]
            at = slice(int(lo[0]), int(hi[-1]))
            # Additive, since the CPU kernel converts every boolean mask; compared only where tokens differ.
            bias = row.new_zeros(token.numel(), at.stop)
            bias[:, int(hi[0]) :].masked_fill_(key[int(hi[0]) : at.stop] >= hi[:, None], -math.inf)
            bias[:, : int(lo[-1])].masked_fill_(key[: int(lo[-1])] < lo[:, None], -math.inf)
            tiles.append(
                F.scaled_dot_product_attention(
                    row[None, None], keys[None, None, n, at], values[None, None, n, at],
                    attn_mask=bias[None, None, :, at], scale=scale,
                )[0, 0]
            )  # fmt: skip
        outputs.append(v.new_zeros(T * size, Dv).index_copy(0, place, torch.cat(tiles)))
    return torch.cat(outputs).view(B, G, T, size, Dv).transpose(1, 2).reshape(B, T, H, Dv)
