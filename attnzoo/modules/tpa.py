"""Tensor product attention."""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from attnzoo.cache import FactorCache
from attnzoo.modules.base import Factors, Mechanism, per_head
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.checks import starting_stds
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_rows
from attnzoo.ops.factored_attention import factored_attention, factors_are_cheaper, tensor_product
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.submodules import normed
from attnzoo.rotary import Rotary
from attnzoo.rules import check_sizes


class TensorProductAttention(Mechanism):
    """Tensor product attention (Zhang et al. 2025, arXiv:2501.06425).

    A token's queries, keys and values, each a matrix of heads by features, are means of a few outer products. Both
    factors are linear in the token, and the cache holds them in place of keys and values:

        A_q = x Wqa (B, T, H, Rq)   B_q = x Wqb (B, T, Rq, D)          keys and values with Rk and Rv in the same way
        B_q, B_k = rotate(B_q), rotate(B_k)                            which rotates every head
        q_h = (1 / Rq) sum_r A_q[h, r] B_q[r];   k_h, v_h in the same way, from the context in cross-attention
        o_h = softmax(D^-0.5 q_h k_h^T + visibility) v_h               RMS-normalised with head_norm
        y = concat_h(o_h) Wo

    A new token attends to the factors: q_h . k_h is a sum over ranks of A_k[h, r] (q_h . B_k[r]), and neither keys
    nor values are formed.

    The output projection starts at 0, as in the authors' code: in the first step only its own gradient is not 0.
    The authors keep D = 64 and raise H until the parameters are those of multi-head attention; attention then costs as
    many times more as there are more heads.

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H.
        head_dim: width D of queries and keys. Default: E / H.
        q_rank: outer products Rq of a query; None makes queries by one plain projection `q_proj`.
        k_rank: outer products Rk of a key.
        v_rank: outer products Rv of a value.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context. Default: E.
        head_norm: RMS-normalise each head's output; the gain `subln` is shared by the heads.
        head_norm_eps: added to the mean square.
        rope: rotary position embedding, or None.
        scale: factor of the scores. Default: D ** -0.5.
        sliding_window: a query sees this many keys at most, itself included (|i - j| < W if not causal).
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = FactorCache
    input_layer = "k_a_proj"
    sequence_forms: tuple[str, ...] = ("gather",)
    shown = ("q_rank", "k_rank", "v_rank", "head_norm", "rope", "sliding_window", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int | None = None, *,
        q_rank: int | None = 6,
        k_rank: int = 2,
        v_rank: int = 2,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        head_norm: bool = False,
        head_norm_eps: float = 1e-5,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        sliding_window: int | None = None,
        causal: bool = True, dropout: float = 0.0, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, head_dim=head_dim, v_head_dim=v_head_dim, kdim=kdim, rope=rope, scale=scale,
            sliding_window=sliding_window, causal=causal, dropout=dropout, backend=backend, head_norm=head_norm,
            head_norm_eps=head_norm_eps, device=device, dtype=dtype,
        )  # fmt: skip
        self.k_rank, self.v_rank = check_sizes(k_rank=k_rank, v_rank=v_rank)
        self.q_rank = None if q_rank is None else check_sizes(q_rank=q_rank)[0]
        for name, rank, width in (("k_rank", k_rank, self.head_dim), ("v_rank", v_rank, self.v_head_dim)):
            if rank > min(num_heads, width):
                warnings.warn(f"{name} {rank} compresses nothing: {num_heads} heads are {width} wide", stacklevel=2)
        self.head_norm = head_norm
        E, S, H, D, Dv = embed_dim, self.kdim, self.num_heads, self.head_dim, self.v_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.q_rank is None:
            self.q_proj = nn.Linear(E, H * D, False, **factory_kwargs)
        else:
            self.q_a_proj = nn.Linear(E, H * self.q_rank, False, **factory_kwargs)
            self.q_b_proj = nn.Linear(E, self.q_rank * D, False, **factory_kwargs)
        self.k_a_proj = nn.Linear(S, H * self.k_rank, False, **factory_kwargs)
        self.k_b_proj = nn.Linear(S, self.k_rank * D, False, **factory_kwargs)
        self.v_a_proj = nn.Linear(S, H * self.v_rank, False, **factory_kwargs)
        self.v_b_proj = nn.Linear(S, self.v_rank * Dv, False, **factory_kwargs)
        self.o_proj = nn.Linear(H * Dv, E, False, **factory_kwargs)
        self.subln = nn.RMSNorm(Dv, head_norm_eps, **factory_kwargs) if head_norm else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise as the authors do: factors uniform within Xavier's bounds of the (E, H, R) and (E, R, D) views.

        std is that of the plain query projection (Xavier's bounds if None), out_std that of the output projection,
        which is 0 if None.
        """
        starting_stds(0.0, std, out_std)
        for a, b, rank, width in self.factor_layers():
            for layer, size in ((a, rank), (b, width)):
                bound = math.sqrt(6 / max(1, layer.out_features + size * layer.in_features))
                nn.init.uniform_(layer.weight, -bound, bound)
        if self.q_rank is None:
            weight = self.q_proj.weight
            nn.init.xavier_uniform_(weight) if std is None else nn.init.normal_(weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=0.0 if out_std is None else out_std)
        if self.subln is not None:
            nn.init.ones_(self.subln.weight)

    def factor_layers(self) -> list[tuple[nn.Linear, nn.Linear, int, int]]:
        """(head factors, feature factors, rank, width of a head) of keys, values and queries, if those are factored."""
        layers = [
            (self.k_a_proj, self.k_b_proj, self.k_rank, self.head_dim),
            (self.v_a_proj, self.v_b_proj, self.v_rank, self.v_head_dim),
        ]
        if self.q_rank is not None:
            layers.append((self.q_a_proj, self.q_b_proj, self.q_rank, self.head_dim))
        return layers

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: FactorCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor."""
        call = begin(self, x, context, mask, positions, cache)
        q = self.queries(x, call)
        with call.remember(*self.factors(call)) as (k_a, k_b, v_a, v_b):
            out = factored_attention(
                q, k_a, k_b, v_a, v_b, call.view, scale=self.scale, dropout=self.weight_dropout, backend=self.backend
            )
            y: Tensor = self.o_proj(normed(self.subln, out).flatten(2))
            return y

    def queries(self, x: Tensor, call: Call) -> Tensor:
        """Rotated queries (B, T, H, D)."""
        if self.q_rank is None:
            q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
            return qk_norm_rope(q, call.q_table, backend=self.backend)
        a, b = self._pair(self.q_a_proj, self.q_b_proj, x, self.q_rank)
        return tensor_product(a, qk_norm_rope(b, call.q_table, backend=self.backend))

    def factors(self, call: Call) -> tuple[Tensor, ...]:
        """What the cache holds of keys and values: (B, S, R, H) and (B, S, R, D) of each, those of keys rotated."""
        k_a, k_b = self._pair(self.k_a_proj, self.k_b_proj, call.source, self.k_rank)
        v_a, v_b = self._pair(self.v_a_proj, self.v_b_proj, call.source, self.v_rank)
        return k_a, qk_norm_rope(k_b, call.k_table, backend=self.backend), v_a, v_b

    def _pair(self, a: nn.Linear, b: nn.Linear, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Head factors (B, T, R, H) and feature factors (B, T, R, D)."""
        return a(x).unflatten(-1, (self.num_heads, rank)).transpose(2, 3), b(x).unflatten(-1, (rank, -1))

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """Factors of keys and values: (Rk + Rv) H + Rk D + Rv Dv numbers per token."""
        H, Rk, Rv = self.num_heads, self.k_rank, self.v_rank
        return (Rk, H), (Rk, self.head_dim), (Rv, H), (Rv, self.v_head_dim)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "forming" heads and "attention", over factors where that is cheaper."""
        S = T if S is None else S
        keys = T if self.causal else S
        E, H, D, Dv = self.embed_dim, self.num_heads, self.head_dim, self.v_head_dim
        ranks, widths = (self.k_rank, self.v_rank), (D, Dv)
        factored = self.k_rank * D + self.v_rank * Dv
        of_queries = H * D if self.q_rank is None else self.q_rank * (H + D)
        projections = T * E * (of_queries + H * Dv) + keys * self.kdim * (H * sum(ranks) + factored)
        forming = T * H * D * (self.q_rank or 0)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        if self.causal and S > T and factors_are_cheaper(T, ranks, widths):
            attention = H * factored * pairs
        else:
            forming += S * H * factored
            attention = H * (D + Dv) * pairs
        return {"projections": 2 * projections, "forming": 2 * forming, "attention": 2 * attention}

    def qk_circuit(self, part: str = "full") -> Factors:
        """For part="factors" the (D, E) matrices of every pair of feature factors: (Wqb_r, Wkb_r'), r first.

        With plain queries the first ones are the heads' matrices. There is no other part: a logit is of degree 4 in the
        two tokens, since the head factors depend on them too.

        Raises:
            ValueError: for another part.
        """
        if part != "factors":
            raise ValueError(
                "part must be 'factors': head factors depend on the token, so that no fixed matrix gives the logits; "
                f"got {part!r}"
            )
        queries = per_head(self.q_proj if self.q_rank is None else self.q_b_proj, self.head_dim)
        return [(wq, wk) for wq in queries for wk in per_head(self.k_b_proj, self.head_dim)]

    def ov_circuit(self) -> NoReturn:
        """Raises ValueError: values are of degree 2 in the token, and no fixed matrix gives them."""
        raise ValueError(
            f"{type(self).__name__} has no ov_circuit: head factors depend on the token, so that no fixed matrix gives "
            "what a head writes"
        )

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:  # noqa: ARG002
        """Cut the weights down to these places of heads; feature factors stay as they are."""
        for a, _, rank, _ in self.factor_layers():
            keep_rows(a, heads, rank)
        if self.q_rank is None:
            keep_rows(self.q_proj, heads, self.head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
