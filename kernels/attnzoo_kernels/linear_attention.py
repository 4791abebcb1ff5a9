"""Linear attention with weights of block pairs: launchers, registration with torch, and the public function.

Saved for the backward pass: the inputs. Block states are computed again in it; nothing of size T T exists in either
pass, and both are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from attnzoo_kernels import linear_attention_tuning as tuning
from attnzoo_kernels.launch import as_int, dense_rows, on_device, stored_as
from attnzoo_kernels.linear_attention_kernels import (
    linear_attention_mix_kernel,
    linear_attention_pair_kernel,
    linear_attention_scan_kernel,
    linear_attention_state_kernel,
    linear_attention_tile_kernel,
)

PROGRAMS = 264
"""Programs that a reduction is split into, two for each multiprocessor of an H100."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool,
    weights: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    fresh: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_s w (q_t . k_s) v_s of q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) in blocks of `size` tokens.

    The meaning of q, k, v, size, causal, weights and state is that of
    `attnzoo.ops.linear_attention.linear_attention_chunked`. Gradients go to q, k, v, weights and state, once.

    Args:
        q: float16, bfloat16 or float32; k and v too, of the same dtype. Products of half precision go through tensor
            cores (float16 as TF32, whose range sums of features need), those of float32 are exact.
        k: S = T unless neither causal nor weights is given.
        v: values.
        size: tokens of a block.
        causal: no query sees a later key.
        weights: (1 or B, 1 or H, n, n) of pairs of n blocks, or None for 1.
        state: (B, G, D, Dv) of everything before; for weights None without starts.
        starts: (B, n + 1) integers, ascending: block i of row b holds tokens starts[b, i] .. starts[b, i + 1] - 1, at
            most `size`. Default: every `size` tokens. For not causal it needs weights.
        fresh: (B, n) boolean, with starts and weights None: blocks that see none before them.
        order: (T,) integers, a permutation: blocks go by it, token p of them is order[p] of the tensors.

    Returns:
        out (B, T, H, Dv) in float32, whatever the inputs are: these sums have no bound. For weights None and no starts
        the state after all keys (B, G, D, Dv), float32; else an empty tensor.

    Raises:
        ValueError: where a table's size is not that of the blocks, which the kernels would read beyond.
    """
    n = starts.shape[1] - 1 if starts is not None else max(1, -(-q.shape[1] // size))
    if weights is not None and weights.shape[2:] != (n, n):
        raise ValueError(f"weights must be of {n} by {n} blocks, got {tuple(weights.shape)}")
    if (causal or weights is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must have the {q.shape[1]} tokens of q, got {k.shape[1]}")
    if starts is not None and (starts.shape[0] != q.shape[0] or state is not None or (weights is None and not causal)):
        raise ValueError(
            f"starts must be (B, n + 1), without state and for not causal with weights, got {tuple(starts.shape)}"
        )
    if weights is not None:
        weights = weights.to(torch.float32)
    if state is not None:
        state = state.to(torch.float32).contiguous()
    out: tuple[Tensor, Tensor] = _forward(
        dense_rows(q), dense_rows(k), dense_rows(v), weights, state, as_int(starts), stored_as(fresh, torch.uint8),
        as_int(order), size, causal,
    )  # fmt: skip
    return out


@torch.no_grad()
def linear_attention_states(k: Tensor, v: Tensor, size: int) -> Tensor:
    """sum k_s^T v_s over each block of `size` tokens of k (B, S, G, D), v (B, S, G, Dv): (B, G, n, D, Dv), float32."""
    k, v = dense_rows(k), dense_rows(v)
    call = _Call(k, k, v, None, None, None, size, True)
    if k.shape[0] == 0 or k.shape[2] == 0:
        shape = (k.shape[0], k.shape[2], call.blocks(k.shape[1]), k.shape[3], v.shape[3])
        return k.new_zeros(shape, dtype=torch.float32)
    with on_device(k):
        return call.states(k, v)


@library.custom_op("attnzoo::linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None, starts: Tensor | None,
    fresh: Tensor | None, order: Tensor | None, size: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, end = _forward_fake(q, k, v, weights, state, starts, fresh, order, size, causal)
    call = _Call(q, k, v, weights, starts, order, size, causal)
    if q.shape[0] == 0 or q.shape[2] == 0:
        return out.zero_(), end.zero_()
    with on_device(q):
        before = call.before(call.states(k, v), state, fresh, end if end.numel() else None)
        call.tile(q, k, v, before, out)
    return out, end


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None, starts: Tensor | None,
    fresh: Tensor | None, order: Tensor | None, size: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, D = q.shape
    G, Dv = v.shape[2:]
    out = torch.empty((B, T, H, Dv), dtype=torch.float32, device=q.device)
    shape = (B, G, D, Dv) if weights is None and starts is None else (0,)
    return out, torch.empty(shape, dtype=torch.float32, device=q.device)


@library.custom_op("attnzoo::linear_attention_backward", mutates_args=())
def _backward(
    do: Tensor, dend: Tensor | None, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None,
    starts: Tensor | None, fresh: Tensor | None, order: Tensor | None, size: int, causal: bool, need_q: bool,
    need_k: bool, need_v: bool, need_weights: bool, need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, weights and state; empty where not needed."""
    made = _backward_fake(
        do, dend, q, k, v, weights, state, starts, fresh, order, size, causal, need_q, need_k, need_v, need_weights,
        need_state,
    )  # fmt: skip
    dq, dk, dv, dweights, dstate = made
    if q.shape[0] == 0 or q.shape[2] == 0:
        for gradient in made:
            gradient.zero_()
        return made
    call = _Call(q, k, v, weights, starts, order, size, causal)
    do = dense_rows(do)
    with on_device(q):
        states = call.states(k, v) if need_q or need_weights else None
        diagonal = None
        if need_q or (need_weights and causal):
            assert states is not None
            before = call.before(states, state, fresh, None)
            out = dq if need_q else torch.empty_like(q)
            diagonal = call.tile(do, v, k, before.transpose(3, 4), out, own=q if need_weights and causal else None)
        if need_k or need_v or need_weights or need_state:
            received = call.states(q, do, queries=True)
            if need_weights:
                assert states is not None
                _gather_pairs(dweights, call.pairs(received, states), diagonal)
            if need_k or need_v or need_state:
                after = call.after(received, dend, fresh, dstate if need_state else None)
                if need_k:
                    call.tile(v, do, q, after.transpose(3, 4), dk, reverse=True)
                if need_v:
                    call.tile(k, q, do, after, dv, reverse=True)
    return made


@_backward.register_fake
def _backward_fake(
    do: Tensor, dend: Tensor | None, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, state: Tensor | None,
    starts: Tensor | None, fresh: Tensor | None, order: Tensor | None, size: int, causal: bool, need_q: bool,
    need_k: bool, need_v: bool, need_weights: bool, need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def made(like: Tensor | None, wanted: bool) -> Tensor:
        if like is None or not wanted:
            return torch.empty((0,), dtype=torch.float32, device=q.device)
        return torch.empty(like.shape, dtype=like.dtype, device=q.device)

    return (
        made(q, need_q), made(k, need_k), made(v, need_v), made(weights, need_weights), made(state, need_state)
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.size, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, do: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, weights, state, starts, fresh, order = ctx.saved_tensors
    need = ctx.needs_input_grad
    if do is None:
        do = torch.zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    if dend is not None and not (weights is None and starts is None):
        dend = None
    found = _backward(
        do, dend, q, k, v, weights, state, starts, fresh, order, ctx.size, ctx.causal, *(bool(x) for x in need[:5])
    )
    return (*(g if wanted else None for g, wanted in zip(found, need[:5], strict=True)), *(None,) * 5)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _gather_pairs(dweights: Tensor, pairs: Tensor, diagonal: Tensor | None) -> None:
    """Sum what pairs (B, X, splits, n, n) and diagonal (B, H, n, pieces) hold for weights (1 or B, 1 or H, n, n)."""
    pairs = pairs.sum(2)
    along = tuple(axis for axis in (0, 1) if dweights.shape[axis] == 1)
    dweights.copy_(pairs.sum(along, keepdim=True) if along else pairs)
    if diagonal is not None:
        own = diagonal.sum(-1)
        own = own.sum(along, keepdim=True) if along else own
        dweights.diagonal(dim1=2, dim2=3).add_(own)


@dataclass
class _Call:
    """One call's sizes, and a launch of each kernel under the name of what comes out."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    starts: Tensor | None
    order: Tensor | None
    size: int
    causal: bool

    def __post_init__(self) -> None:
        self.B, self.T, self.H, self.D = self.q.shape
        self.S, self.G, self.Dv = self.v.shape[1:]
        self.group = self.H // self.G if self.G else 1
        # Whether every query head has weights, and with them states before a block, of its own.
        self.per_head = self.weights is not None and self.weights.shape[1] > 1
        # float16's range does not hold sums of features, so its products go through TF32, as exact as they are.
        self.kind = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        self.precision = "ieee" if self.q.dtype == torch.float32 else "tf32"

    def blocks(self, tokens: int) -> int:
        return self.starts.shape[1] - 1 if self.starts is not None else max(1, -(-tokens // self.size))

    def product(self) -> dict[str, Any]:
        import triton.language as tl

        return {"KIND": tl.bfloat16 if self.kind == torch.bfloat16 else tl.float32, "PRECISION": self.precision}

    def states(self, a: Tensor, b: Tensor, *, queries: bool = False) -> Tensor:
        """sum a^T b over the tokens of each block: (B, G, n, A, Z) of keys, or of queries summed over each group."""
        tokens, n = a.shape[1], self.blocks(a.shape[1])
        heads = self.G if not queries or not self.per_head else self.H
        members = a.shape[2] // heads
        A, Z = a.shape[3], b.shape[3]
        out = torch.empty((self.B, heads, n, A, Z), dtype=torch.float32, device=a.device)
        tiles = tuning.tiles("state", self.q.dtype, tokens=self.size, inner=A, outer=Z)
        pieces = -(-A // tiles.inner) * -(-Z // tiles.outer)
        linear_attention_state_kernel[(self.B * heads * n * pieces,)](
            a, b, out, self.starts, self.order, *a.stride()[:3], *b.stride()[:3], tokens, n, self.size, heads, members,
            A=A, Z=Z, **self.product(), BLOCK_T=tiles.tokens, BLOCK_A=tiles.inner, BLOCK_Z=tiles.outer,
            **tiles.options(),
        )  # fmt: skip
        return out

    def before(self, states: Tensor, first: Tensor | None, fresh: Tensor | None, end: Tensor | None) -> Tensor:
        """What the queries of a block see of other blocks, (B, G or H, n or 1, D, Dv); `end` gets the state after."""
        if self.weights is None:
            return self.sums(states, first, fresh, end, reverse=False)
        return self.mixed(states, self.H if self.per_head else self.G, 1, triangle=1 if self.causal else 0)

    def after(self, received: Tensor, dend: Tensor | None, fresh: Tensor | None, dfirst: Tensor | None) -> Tensor:
        """The gradient of the states, (B, G, n or 1, D, Dv), from what their readers received."""
        if self.weights is None:
            return self.sums(received, dend, fresh, dfirst, reverse=True)
        members = self.group if self.per_head else 1
        return self.mixed(received, self.G, members, triangle=2 if self.causal else 0, transposed=True)

    def sums(
        self, states: Tensor, first: Tensor | None, fresh: Tensor | None, end: Tensor | None, *, reverse: bool
    ) -> Tensor:
        B, X, n, D, Dv = states.shape
        if not self.causal:
            total = states.sum(2, keepdim=True)
            if first is not None:
                total += first[:, :, None]
            if end is not None:
                end.copy_(total[:, :, 0])
            return total
        out = torch.empty_like(states)
        end = torch.empty((B, X, D, Dv), dtype=torch.float32, device=states.device) if end is None else end
        first = None if first is None else first.contiguous()
        width = 1024
        linear_attention_scan_kernel[(B * X * -(-D * Dv // width),)](
            states,
            first,
            fresh,
            out,
            end,
            n,
            D * Dv,
            X,
            REVERSE=reverse,
            BLOCK_E=width,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return out

    def mixed(self, states: Tensor, X: int, members: int, *, triangle: int, transposed: bool = False) -> Tensor:
        assert self.weights is not None
        B, heads, n, D, Dv = states.shape
        out = torch.empty((B, X, n, D, Dv), dtype=torch.float32, device=states.device)
        tiles = tuning.tiles("mix", self.q.dtype, tokens=n, inner=n, outer=D * Dv)
        b, h, i, j = self.weight_strides()
        linear_attention_mix_kernel[(B * X * -(-n // tiles.tokens) * -(-D * Dv // tiles.outer),)](
            states, self.weights, out, b, h, *((j, i) if transposed else (i, j)), n, D * Dv, X, members,
            X * members // heads, TRIANGLE=triangle, PRECISION=self.precision, BLOCK_I=tiles.tokens,
            BLOCK_J=tiles.inner, BLOCK_E=tiles.outer, **tiles.options(),
        )  # fmt: skip
        return out

    def pairs(self, received: Tensor, states: Tensor) -> Tensor:
        """<U_i, S_j> in shares of the states' numbers, (B, G or H, splits, n, n)."""
        B, X, n, D, Dv = received.shape
        tiles = tuning.tiles("pair", self.q.dtype, tokens=n, inner=D * Dv, outer=n)
        cells = -(-n // tiles.tokens) * -(-n // tiles.outer)
        pieces = -(-D * Dv // tiles.inner)
        splits = max(1, min(pieces, PROGRAMS // (B * X * cells)))
        share = -(-pieces // splits) * tiles.inner
        out = torch.empty((B, X, splits, n, n), dtype=torch.float32, device=states.device)
        linear_attention_pair_kernel[(B * X * splits * cells,)](
            received, states, out, n, D * Dv, X, X // states.shape[1], share, splits, TRIANGLE=1 if self.causal else 0,
            PRECISION=self.precision, BLOCK_I=tiles.tokens, BLOCK_J=tiles.outer, BLOCK_E=tiles.inner,
            **tiles.options(),
        )  # fmt: skip
        return out

    def tile(
        self, x: Tensor, y: Tensor, z: Tensor, states: Tensor, out: Tensor, *, reverse: bool = False,
        own: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """x P + w (x y) z into out; with `own` the gradient of the w, (B, H, n, pieces)."""
        tokens, X, A, Z = x.shape[1], x.shape[2], x.shape[3], out.shape[3]
        n = self.blocks(tokens)
        tiles = tuning.tiles("tile", self.q.dtype, tokens=self.size, inner=A, outer=Z)
        tiles_t = -(-min(self.size, max(1, tokens)) // tiles.tokens)
        pieces = tiles_t * -(-Z // tiles.outer)
        gain = None
        if own is not None:
            gain = torch.empty((self.B, X, n, pieces), dtype=torch.float32, device=x.device)
        u = x if own is None else own
        per_block = states.stride(2) if states.shape[2] > 1 else 0
        linear_attention_tile_kernel[(self.B * X * n * pieces,)](
            x, y, z, u, states, self.weights, out, gain, self.starts, self.order, *x.stride()[:3], *y.stride()[:3],
            *z.stride()[:3], *u.stride()[:3], *states.stride()[:2], per_block, *states.stride()[3:],
            *self.weight_strides(), tokens, n, self.size, tiles_t, X, self.group if reverse else 1,
            1 if reverse else self.group, X // states.shape[1], A=A, Z=Z, WITHIN=self.causal, REVERSE=reverse,
            **self.product(), BLOCK_T=tiles.tokens, BLOCK_A=tiles.inner, BLOCK_Z=tiles.outer, **tiles.options(),
        )  # fmt: skip
        return gain

    def weight_strides(self) -> tuple[int, int, int, int]:
        """Strides of the weights over rows, heads and blocks; 0 where all share them."""
        if self.weights is None:
            return 0, 0, 0, 0
        b, h, i, j = self.weights.stride()
        return (b if self.weights.shape[0] > 1 else 0), (h if self.weights.shape[1] > 1 else 0), i, j
