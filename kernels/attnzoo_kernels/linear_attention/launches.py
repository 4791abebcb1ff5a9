"""What the passes of linear attention launch, kernel after kernel; the names are those of `kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from attnzoo_kernels.launch import Launch, Launches, empty_if, gradient_buffer, precision, strides
from attnzoo_kernels.linear_attention import tuning
from attnzoo_kernels.linear_attention.kernels import (
    linear_attention_mix_kernel,
    linear_attention_pair_kernel,
    linear_attention_state_kernel,
    linear_attention_sums_kernel,
    linear_attention_tile_kernel,
)
from attnzoo_kernels.tuning import cdiv

PROGRAMS = 264
"""Programs that a reduction is split into, two for each multiprocessor of an H100."""


class Inputs(NamedTuple):
    """What the operator takes; see `linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None
    state: Tensor | None
    starts: Tensor | None
    fresh: Tensor | None
    order: Tensor | None
    size: int
    causal: bool

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Buffers for the output and the state after all keys, which is empty with weights or packed documents."""
        (B, T, H, D), (_, _, G, Dv) = self.q.shape, self.v.shape
        out = torch.empty((B, T, H, Dv), dtype=torch.float32, device=self.q.device)
        plain = self.weights is None and self.starts is None
        return out, empty_if(plain, (B, G, D, Dv), torch.float32, self.q.device)

    def gradients(self, needed: list[bool]) -> list[Tensor]:
        """Buffers for the gradients of q, k, v, weights and state; empty where not needed."""
        return [
            gradient_buffer(self.q if given is None else given, wanted and given is not None)
            for given, wanted in zip(self[:5], needed, strict=True)
        ]


class Passes:
    """The launches of one call's passes.

    `forward` and `backward` are generators of them and do in between what needs no kernel of ours; the other methods
    return what a kernel will have filled once its launch is carried out, and the launch.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.weights, self.starts, self.order = inputs.weights, inputs.starts, inputs.order
        self.size, self.causal = inputs.size, inputs.causal
        self.B, _, self.H, _ = inputs.q.shape
        self.G = inputs.v.shape[2]
        self.group = self.H // self.G if self.G else 1
        # Whether every query head has weights, and with them states before a block, of its own.
        self.per_head = self.weights is not None and self.weights.shape[1] > 1
        self.dtype, self.device = inputs.q.dtype, inputs.q.device
        # float16's range does not hold sums of features, so its products go through TF32, as exact as they are.
        kind = tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32
        self.product = {"KIND": kind, "PRECISION": precision(self.dtype)}
        self.kept = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def forward(self, out: Tensor, end: Tensor) -> Iterator[Launch]:
        """Fills the output and, where it is not empty, the state after all keys."""
        q, k, v = self.inputs[:3]
        if self.weights is None:
            before = yield from self.sums(k, v, self.inputs.state, end if end.numel() else None)
        else:
            states, launch = self.states(k, v)
            yield launch
            before, launch = self.before(states)
            yield launch
        _, launch = self.tile(q, k, v, before, out)
        yield launch

    def backward(
        self, do: Tensor, dend: Tensor | None, gradients: list[Tensor], needed: list[bool]
    ) -> Iterator[Launch]:
        """Fills the gradients of q, k, v, weights and state that are needed."""
        q, k, v = self.inputs[:3]
        dq, dk, dv, dweights, dstate = gradients
        need_q, need_k, need_v, need_weights, need_state = needed
        states = diagonal = before = after = None
        if self.weights is None and need_q:
            before = yield from self.sums(k, v, self.inputs.state, None)
        elif self.weights is not None and (need_q or need_weights):
            states, launch = self.states(k, v)
            yield launch
            if need_q or self.causal:
                before, launch = self.before(states)
                yield launch
        if before is not None:
            own = q if need_weights and self.causal else None
            diagonal, launch = self.tile(
                do, v, k, before.transpose(3, 4), dq if need_q else torch.empty_like(q), own=own
            )
            yield launch
        if not (need_k or need_v or need_weights or need_state):
            return
        if self.weights is None:
            after = yield from self.sums(q, do, dend, dstate if need_state else None, reverse=True)
        else:
            received, launch = self.states(q, do, queries=True)
            yield launch
            if need_weights:
                assert states is not None
                pairs, launch = self.pairs(received, states)
                yield launch
                gather_pairs(dweights, pairs, diagonal)
            if need_k or need_v:
                after, launch = self.after(received)
                yield launch
        if need_k:
            assert after is not None
            _, launch = self.tile(v, do, q, after.transpose(3, 4), dk, reverse=True)
            yield launch
        if need_v:
            assert after is not None
            _, launch = self.tile(k, q, do, after, dv, reverse=True)
            yield launch

    def before(self, states: Tensor) -> tuple[Tensor, Launch]:
        """What the queries of a block see of other blocks, (B, G or H, n, D, Dv)."""
        return self.mixed(states, self.H if self.per_head else self.G, 1, triangle=1 if self.causal else 0)

    def after(self, received: Tensor) -> tuple[Tensor, Launch]:
        """The gradient of the states, (B, G, n, D, Dv), from what their readers received."""
        members = self.group if self.per_head else 1
        return self.mixed(received, self.G, members, triangle=2 if self.causal else 0, transposed=True)

    def sums(
        self, a: Tensor, b: Tensor, first: Tensor | None, end: Tensor | None, *, reverse: bool = False
    ) -> Launches[Tensor]:
        """Sums of a^T b over the tokens before each block, or of all tokens, (B, G, n or 1, A, Z).

        `first` is before them all, `end` gets what is after. With `reverse` a and b are of queries, summed over each
        group, and the sums are of the tokens after each block.
        """
        if not self.causal:
            states, launch = self.states(a, b, queries=reverse, dtype=torch.float32)
            yield launch
            total = states.sum(2, keepdim=True)
            if first is not None:
                total += first[:, :, None]
            if end is not None:
                end.copy_(total[:, :, 0])
            return total
        A, Z, n = a.shape[3], b.shape[3], self.blocks(a.shape[1])
        out = torch.empty((self.B, self.G, n, A, Z), dtype=self.kept, device=a.device)
        end = torch.empty((self.B, self.G, A, Z), dtype=torch.float32, device=a.device) if end is None else end
        pieces, arguments = self.of_tokens("linear_attention_sums", a, b, self.G, n)
        arguments |= {
            "first_ptr": None if first is None else first.contiguous(), "fresh_ptr": self.inputs.fresh, "p_ptr": out,
            "end_ptr": end, "REVERSE": reverse,
        }  # fmt: skip
        yield linear_attention_sums_kernel, (self.B * self.G * pieces,), arguments
        return out

    def of_tokens(self, kernel: str, a: Tensor, b: Tensor, heads: int, n: int) -> tuple[int, dict[str, Any]]:
        """Pieces of a state of a and b, and the arguments of a kernel that sums it over the tokens of n blocks."""
        A, Z = a.shape[3], b.shape[3]
        config = tuning.of_tokens(kernel, self.dtype, self.device, self.size, A, Z)
        return cdiv(A, config["BLOCK_A"]) * cdiv(Z, config["BLOCK_Z"]), {
            "a_ptr": a, "b_ptr": b, "starts_ptr": self.starts, "order_ptr": self.order, **strides(a, "a", "bth"),
            **strides(b, "b", "bth"), "T": a.shape[1], "n": n, "size": self.size, "X": heads,
            "MEMBERS": a.shape[2] // max(heads, 1), "A": A, "Z": Z, **self.product, **config.options(),
        }  # fmt: skip

    def states(
        self, a: Tensor, b: Tensor, *, queries: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Launch]:
        """sum a^T b over the tokens of each block: (B, G, n, A, Z) of keys, or of queries summed over each group."""
        n, heads = self.blocks(a.shape[1]), self.G if not queries or not self.per_head else self.H
        out = torch.empty((self.B, heads, n, a.shape[3], b.shape[3]), dtype=dtype or self.kept, device=a.device)
        pieces, arguments = self.of_tokens("linear_attention_state", a, b, heads, n)
        return out, (linear_attention_state_kernel, (self.B * heads * n * pieces,), arguments | {"s_ptr": out})

    def mixed(
        self, states: Tensor, X: int, members: int, *, triangle: int, transposed: bool = False
    ) -> tuple[Tensor, Launch]:
        """Weighted sums of the states, (B, X, n, D, Dv)."""
        B, heads, n, D, Dv = states.shape
        out = torch.empty((B, X, n, D, Dv), dtype=self.kept, device=states.device)
        config = tuning.of_blocks("linear_attention_mix", self.dtype, self.device, n, D * Dv)
        arguments = {
            "s_ptr": states, "w_ptr": self.weights, "p_ptr": out, **self.weight_strides(transposed), "n": n,
            "E": D * Dv, "X": X, "MEMBERS": members, "READERS": X * members // heads, "TRIANGLE": triangle,
            "PRECISION": self.product["PRECISION"], **config.options(),
        }  # fmt: skip
        grid = (B * X * cdiv(n, config["BLOCK_I"]) * cdiv(D * Dv, config["BLOCK_E"]),)
        return out, (linear_attention_mix_kernel, grid, arguments)

    def pairs(self, received: Tensor, states: Tensor) -> tuple[Tensor, Launch]:
        """<U_i, S_j> in shares of the states' numbers, (B, G or H, splits, n, n)."""
        B, X, n, D, Dv = received.shape
        config = tuning.of_blocks("linear_attention_pair", self.dtype, self.device, n, D * Dv)
        programs = cdiv(n, config["BLOCK_I"]) * cdiv(n, config["BLOCK_J"])
        pieces = cdiv(D * Dv, config["BLOCK_E"])
        splits = max(1, min(pieces, PROGRAMS // (B * X * programs)))
        out = torch.empty((B, X, splits, n, n), dtype=torch.float32, device=states.device)
        arguments = {
            "u_ptr": received, "s_ptr": states, "w_ptr": out, "n": n, "E": D * Dv, "X": X,
            "READERS": X // states.shape[1], "share": cdiv(pieces, splits) * config["BLOCK_E"], "SPLITS": splits,
            "TRIANGLE": 1 if self.causal else 0, **self.product, **config.options(),
        }  # fmt: skip
        return out, (linear_attention_pair_kernel, (B * X * splits * programs,), arguments)

    def tile(
        self, x: Tensor, y: Tensor, z: Tensor, states: Tensor, out: Tensor, *, reverse: bool = False,
        own: Tensor | None = None,
    ) -> tuple[Tensor | None, Launch]:  # fmt: skip
        """x P + w (x y) z into out; with `own` the gradient of the w, (B, H, n, pieces)."""
        tokens, X, A, Z = x.shape[1], x.shape[2], x.shape[3], out.shape[3]
        n = self.blocks(tokens)
        config = tuning.of_tokens("linear_attention_tile", self.dtype, self.device, self.size, A, Z)
        tiles_t = cdiv(min(self.size, max(1, tokens)), config["BLOCK_T"])
        pieces = tiles_t * cdiv(Z, config["BLOCK_Z"])
        dw = None
        if own is not None:
            dw = torch.empty((self.B, X, n, pieces), dtype=torch.float32, device=x.device)
        u = x if own is None else own
        state_strides = strides(states, "p", "bxnaz")
        if states.shape[2] == 1:
            state_strides["stride_p_n"] = 0
        arguments = {
            "x_ptr": x, "y_ptr": y, "z_ptr": z, "u_ptr": u, "p_ptr": states, "w_ptr": self.weights, "o_ptr": out,
            "dw_ptr": dw, "starts_ptr": self.starts, "order_ptr": self.order, **strides(x, "x", "bth"),
            **strides(y, "y", "bth"), **strides(z, "z", "bth"), **strides(u, "u", "bth"), **state_strides,
            **self.weight_strides(), "T": tokens, "n": n, "size": self.size, "tiles_t": tiles_t, "X": X,
            "MEMBERS": self.group if reverse else 1, "READERS": 1 if reverse else self.group,
            "STATES": X // states.shape[1], "A": A, "Z": Z, "WITHIN": self.causal, "REVERSE": reverse,
            **self.product, **config.options(),
        }  # fmt: skip
        return dw, (linear_attention_tile_kernel, (self.B * X * n * pieces,), arguments)

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens are cut into."""
        return self.starts.shape[1] - 1 if self.starts is not None else max(1, cdiv(tokens, self.size))

    def weight_strides(self, transposed: bool = False) -> dict[str, int]:
        """Strides of the weights over rows, heads and pairs of blocks; 0 where all share them."""
        names = strides(self.weights, "w", "bhji" if transposed else "bhij")
        if self.weights is not None:
            shared = [size == 1 for size in self.weights.shape[:2]]
            names |= {name: 0 for name, one in zip(("stride_w_b", "stride_w_h"), shared, strict=True) if one}
        return names


def gather_pairs(dweights: Tensor, pairs: Tensor, diagonal: Tensor | None) -> None:
    """Sum what pairs (B, X, splits, n, n) and diagonal (B, H, n, pieces) hold for weights (1 or B, 1 or H, n, n)."""
    pairs = pairs.sum(2)
    along = tuple(axis for axis in (0, 1) if dweights.shape[axis] == 1)
    dweights.copy_(pairs.sum(along, keepdim=True) if along else pairs)
    if diagonal is not None:
        own = diagonal.sum(-1)
        own = own.sum(along, keepdim=True) if along else own
        dweights.diagonal(dim1=2, dim2=3).add_(own)
