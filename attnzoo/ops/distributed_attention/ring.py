"""Form "ring": blocks of keys travel, and their gradients behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnzoo.distributed.collectives import Passing
from attnzoo.distributed.sequence import Run, SequenceParallel, Shards, ring_hops
from attnzoo.masks import Visibility
from attnzoo.ops.distributed_attention.merging import merge_partials, with_sinks
from attnzoo.ops.distributed_attention.tiles import Tile, tiles
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention_lse

Expand = Callable[..., tuple[Tensor, ...]]
"""States of some tokens -> keys (B, s, G, D), values (B, s, G, Dv) and, where there is one, the shared rotary key."""


def hops(view: Visibility) -> int:
    """How many ranks back a ring has to reach: fewer than P - 1 for a window of contiguous shards."""
    shards: Shards = view.shards
    near = view.causal and not view.sink_tokens and shards.sp.layout == "contiguous"
    return ring_hops(view.window if near else None, shards.positions.shape[0], shards.sp.size)


def ring_attention(
    q: Tensor,
    states: tuple[Tensor, ...],
    view: Visibility,
    rules: ScoreRules,
    expand: Expand | None = None,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """States travel around the ring while each rank attends to those that it has (Ring Attention, arXiv:2310.01889).

    Saved for the backward pass: this rank's queries and states, its output and one number of each query and head. There
    states travel again, and their gradient, in at least float32, one step behind them. Outputs are kept in at least
    float32 and rounded once.
    """
    queries = (q,) if rules.q_rope is None else (q, rules.q_rope)
    ring = _SoftmaxRing(
        view, replace(rules, sinks=None, q_rope=None, k_rope=None), expand, len(queries), len(states), q
    )
    out, lse = Ring.apply(ring, *queries, *states, *parameters)  # type: ignore[no-untyped-call]
    return with_sinks(out, lse, rules.sinks).to(states[0].dtype)


class Ring(torch.autograd.Function):
    """A ring of blocks as one differentiable function of queries, states and parameters."""

    @staticmethod
    def forward(ctx: Any, ring: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and their log-sum-exps."""
        ctx.ring = ring
        out, lse = ring.forward(*ring.split(tensors))
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        *tensors, out, lse = ctx.saved_tensors
        ring = ctx.ring
        with torch.autocast(d_out.device.type, **ring.autocast):
            given = ring.backward(*ring.split(tensors), out, lse, d_out, d_lse)
        return None, *(None if g is None else g.to(t.dtype) for g, t in zip(given, tensors, strict=True))


class Travel:
    """What all rings share: the order of blocks, and messages of several states."""

    def __init__(self, view: Visibility, queries: int, states: int, like: Tensor) -> None:
        self.view, self.shards = view, view.shards
        self.sp: SequenceParallel = self.shards.sp
        self.group, self.last = self.sp.group, hops(view)
        self.counts = queries, states
        device = like.device.type
        self.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, states and parameters."""
        queries, states = self.counts
        given = list(tensors)
        return given[:queries], given[queries : queries + states], given[queries + states :]

    def blocks(self, states: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Run], list[Tensor]]]:
        """Step, runs and states of each block, from this rank's own backwards."""
        rank, P = self.sp.rank, self.sp.size
        block = packed(states)
        for step in range(self.last + 1):
            passing = Passing(block, self.group) if step < self.last else None
            if passing is not None and not self.sp.overlap:
                passing.wait()
            yield step, self.sp.runs(self.shards.tokens, (rank - step) % P), unpacked(block, states)
            if passing is not None:
                block = passing.wait()

    def tiles(self, runs: Sequence[Run], like: Tensor, slopes: Tensor | None = None) -> Iterator[Tile]:
        """The tiles of this rank's queries and a block."""
        return tiles(self.view, self.sp.runs(self.shards.tokens), runs, like, slopes)

    def homing(self, step: int, gradient: Tensor, before: Passing | None) -> Passing:
        """The gradient of a block follows one step behind it, with what ranks before this have added; last, home."""
        gradient = gradient if before is None else gradient + before.wait()
        return Passing(gradient, self.group, 1 if step < self.last else -self.last)


def packed(states: Sequence[Tensor]) -> Tensor:
    """States (B, t, ..) as one message (B, t, n)."""
    return torch.cat([state.flatten(2) for state in states], -1)


def unpacked(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, of states of these shapes."""
    parts = message.split([math.prod(state.shape[2:]) for state in like], -1)
    return [part.view(*part.shape[:2], *state.shape[2:]) for part, state in zip(parts, like, strict=True)]


def leaves(tensors: Sequence[Tensor], at: slice = slice(None)) -> list[Tensor]:
    """These tokens of tensors (B, t, ..), as a graph of its own starts with them."""
    return [tensor[:, at].detach().requires_grad_() for tensor in tensors]


def add_to(sums: Sequence[Tensor], gradients: Sequence[Tensor | None], at: slice = slice(None)) -> None:
    """Add gradients of these tokens where there are any."""
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total[:, at] += gradient


def wide_zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of these shapes in at least float32."""
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]


class _SoftmaxRing(Travel):
    def __init__(
        self, view: Visibility, rules: ScoreRules, expand: Expand | None, queries: int, states: int, like: Tensor
    ) -> None:
        super().__init__(view, queries, states, like)
        self.rules, self.expand = rules, expand

    def partial(self, queries: Sequence[Tensor], made: Sequence[Tensor], tile: Tile) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a tile alone, differentiable."""
        k, v, *rope = made
        rules = replace(
            self.rules, alibi_slopes=None, bias=tile.bias, q_rope=queries[1] if rope else None,
            k_rope=rope[0] if rope else None,
        )  # fmt: skip
        return softmax_attention_lse(queries[0], k, v, tile.view, rules)

    def forward(self, queries: list[Tensor], states: list[Tensor], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        del parameters
        out, lse = None, None
        for _, runs, block in self.blocks(states):
            made = block if self.expand is None else self.expand(*block)
            if out is None or lse is None:
                (out,) = wide_zeros([queries[0][..., :1].expand(*queries[0].shape[:3], made[1].shape[3])])
                lse = torch.full_like(out[..., 0], -torch.inf)
            for tile in self.tiles(runs, queries[0], self.rules.alibi_slopes):
                rows, keys = tile.rows, tile.keys
                own = self.partial([q[:, rows] for q in queries], [x[:, keys] for x in made], tile)
                out[:, rows], lse[:, rows] = merge_partials(out[:, rows], lse[:, rows], *own)
        assert out is not None
        assert lse is not None
        return out, lse

    def backward(
        self, queries: list[Tensor], states: list[Tensor], parameters: list[Tensor], out: Tensor, lse: Tensor,
        d_out: Tensor, d_lse: Tensor,
    ) -> list[Tensor | None]:  # fmt: skip
        d_queries, d_parameters = wide_zeros(queries), wide_zeros(parameters)
        going: Passing | None = None
        used = [p for p in parameters if p.requires_grad]
        d_used = {p: total for p, total in zip(parameters, d_parameters, strict=True) if p.requires_grad}
        # What every weight loses, since they add up to 1.
        lost = (d_out * out).sum(-1) - d_lse
        floor = lse.masked_fill(lse == -torch.inf, 0.0)
        for step, runs, block in self.blocks(states):
            inputs = leaves(block)
            with torch.enable_grad():
                made = inputs if self.expand is None else self.expand(*inputs)
            d_made = wide_zeros(made)
            for tile in self.tiles(runs, queries[0], self.rules.alibi_slopes):
                rows, keys = tile.rows, tile.keys
                qs, ks = leaves(queries, rows), leaves(made, keys)
                with torch.enable_grad():
                    o, own = self.partial(qs, ks, tile)
                share = torch.exp(own.detach() - floor[:, rows])
                d_o = share[..., None] * d_out[:, rows]
                d_own = (d_o * o.detach()).sum(-1) - share * lost[:, rows]
                given = torch.autograd.grad((o, own), (*qs, *ks), (d_o, d_own), allow_unused=True)
                add_to(d_queries, given[: len(qs)], rows)
                add_to(d_made, given[len(qs) :], keys)
            if self.expand is not None:
                d_made = [d.to(m.dtype) for d, m in zip(d_made, made, strict=True)]
                given = torch.autograd.grad(made, (*inputs, *used), d_made, allow_unused=True)
                d_made = wide_zeros(block)
                add_to(d_made, given[: len(block)])
                for p, gradient in zip(used, given[len(block) :], strict=True):
                    if gradient is not None:
                        d_used[p] += gradient
            going = self.homing(step, packed(d_made), going)
        assert going is not None
        return [*d_queries, *unpacked(going.wait(), states), *d_parameters]
