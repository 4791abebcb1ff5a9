"""Forgetting attention: softmax attention with a forget gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import CacheLayout, ForgettingCache
from attnzoo.modules.base import Mechanism
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_entries, keep_rows
from attnzoo.ops.head_norm import HeadNorm
from attnzoo.ops.norm_and_gate import norm_and_gate
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.pruned_attention import pruned_attention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import constant, softmax_attention
from attnzoo.ops.submodules import precise_linear
from attnzoo.ops.token_shift import token_shift, without_padding
from attnzoo.rotary import Rotary
from attnzoo.rules import SWITCH, Rule, check, describe, is_real, one_of

GATES = ("data", "bias", "fixed")
TOLERANCE: Rule = ((lambda value: is_real(value) and value < 0, "be a negative number"),)


class ForgettingAttention(Mechanism):
    """Forgetting attention, the attention of FoX (Lin et al. 2025, arXiv:2503.02130).

    Scores of earlier tokens are lowered by forget gates f of the tokens after them, which stand for positions:

        f_t = sigmoid(x_t Wf + bf),  c_t = sum_(l <= t) log f_l                               of each query head
        o_i = sum_(j <= i) softmax_j(scale q_i . k_j + c_i - c_j) v_j,    c_i - c_j = sum_(j < l <= i) log f_l
        y = concat_h(o_h) Wo

    f is the gate on entering a token, so no token is decayed for itself. Causal only. The options of the Pro block:

        k_t = a_t k~_(t-1) + (1 - a_t) k~_t,  a = sigmoid(x Wks), k~ = x Wk                   k_shift; v_shift alike
        q, k = RMS(q), RMS(k) of each head, after the shift and before the rotation           qk_norm
        o = RMS(o) of each head                                                               output_norm
        o = o sigmoid(x Wg), or o x Wg sigmoid(x Wg), after the norm                          output_gate

    In packed documents gates and shifts start again; padding tokens have no gate and no states, where the mask names
    them. `qk_circuit` and `ov_circuit` are those of unshifted keys and values at offset 0.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H, each with a gate of its own.
        num_kv_heads: key/value heads G; must divide H. Default: H, as in the authors' models.
        head_dim: width D of queries and keys. Default: E / H.
        v_head_dim: width Dv of values. Default: D.
        forget_gate: "data" (from x), "bias" (f = sigmoid(b_h), learned), "fixed" (from decay_times) or None (f = 1).
        decay_times: (first, last) of the H times t_h, spaced geometrically, with log f = -1 / t_h: an ALiBi of slope
            1 / t_h. What "fixed" is, and where "bias" starts, which is f = 1/2 by default.
        k_shift: mix each key with that of the token before.
        v_shift: the same for values.
        qk_norm: True for gains of each head, "shared" for one gain, as the released models have it, or False.
        qk_norm_eps: added to that mean square.
        output_norm: normalise the output of each head, with gains of its own.
        output_norm_eps: added to that mean square.
        output_gate: "sigmoid", "silu" or None. "silu" needs output_norm=False.
        pro: the Pro block: k_shift, v_shift, qk_norm, output_norm and output_gate="sigmoid".
        rope: rotary position embedding, or None: the gate is enough. The authors use a base of 500,000.
        scale: factor of the products. Default: D ** -0.5.
        sliding_window: a query sees this many keys at most, itself included.
        prune_tolerance: keys are skipped whose decay leaves them a share of exp(prune_tolerance) of a query's weights
            at most, all together (arXiv:2504.06949, where it is -10). None: none are.
        causal: must be True.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    takes_bias = True
    cache_type = ForgettingCache
    sequence_forms: tuple[str, ...] = ("gather",)
    sequence_cache = False
    shown = ("forget_gate", "decay_times", "output_gate", "rope", "sliding_window", "pruned_heads")
    forget_bias: nn.Parameter

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        v_head_dim: int | None = None,
        forget_gate: str | None = "data",
        decay_times: tuple[float, float] | None = None,
        k_shift: bool = False,
        v_shift: bool = False,
        qk_norm: bool | str = False,
        qk_norm_eps: float | None = 1e-5,
        output_norm: bool = False,
        output_norm_eps: float = 1e-6,
        output_gate: str | None = None,
        pro: bool = False,
        rope: Rotary | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        prune_tolerance: float | None = None,
        causal: bool = True, dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, rope=rope, scale=scale, causal=causal,
            sliding_window=sliding_window, dropout=dropout, init_std=init_std, backend=backend, k_shift=k_shift,
            v_shift=v_shift, qk_norm_eps=qk_norm_eps, output_norm_eps=output_norm_eps, output_gate=output_gate, pro=pro,
            decay_times=decay_times, device=device, dtype=dtype,
        )  # fmt: skip
        if not causal:
            raise ValueError("causal must be True: no decay towards later tokens is defined, got causal=False")
        if forget_gate is not None:
            check("forget_gate", forget_gate, one_of(*GATES, words="be 'data', 'bias', 'fixed' or None"))
        if forget_gate == "fixed" if decay_times is None else forget_gate not in ("bias", "fixed"):
            raise ValueError(
                f"decay_times must be given with forget_gate 'fixed', and may be with 'bias' alone, got {decay_times} "
                f"with {forget_gate!r}"
            )
        check("output_norm", output_norm, SWITCH)
        shared = isinstance(qk_norm, str) and qk_norm == "shared"
        if not shared:
            check("qk_norm", qk_norm, ((lambda value: isinstance(value, bool), "be True, False or 'shared'"),))
        if pro:
            k_shift = v_shift = output_norm = True
            qk_norm = qk_norm or True
            output_gate = output_gate or "sigmoid"
        if prune_tolerance is not None:
            check("prune_tolerance", prune_tolerance, TOLERANCE)
            if sliding_window is not None or forget_gate is None:
                raise ValueError(
                    f"prune_tolerance needs a forget gate and no sliding_window, got {prune_tolerance}, "
                    f"{forget_gate!r} and {sliding_window}"
                )
        if output_gate == "silu" and output_norm:
            raise ValueError("output_gate must be 'sigmoid' or None with output_norm, got 'silu'")
        self.forget_gate, self.output_gate, self.prune_tolerance = forget_gate, output_gate, prune_tolerance
        self.decay_times = None if decay_times is None else (float(decay_times[0]), float(decay_times[1]))
        self.has_shift = k_shift or v_shift
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim

        def linear(rows: int, *, bias: bool = False) -> nn.Linear:
            return nn.Linear(embed_dim, rows, bias, **factory_kwargs)

        def norm(heads: int) -> nn.RMSNorm:
            if shared:
                return nn.RMSNorm(D, qk_norm_eps, **factory_kwargs)
            return HeadNorm(heads, D, qk_norm_eps, **factory_kwargs)

        self.make_projections(H * D, G * D, G * Dv, H * Dv, bias=False, **factory_kwargs)
        self.forget_proj = linear(H, bias=True) if forget_gate == "data" else None
        self.k_shift_proj = linear(G) if k_shift else None
        self.v_shift_proj = linear(G) if v_shift else None
        self.g_proj = linear(H * Dv) if output_gate is not None else None
        self.q_norm, self.k_norm = (norm(H), norm(G)) if qk_norm else (None, None)
        self.output_norm = HeadNorm(H, Dv, output_norm_eps, **factory_kwargs) if output_norm else None
        if forget_gate == "bias":
            self.forget_bias = nn.Parameter(torch.empty(H, **factory_kwargs))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; a learned bias starts at `decay_times`, or at f = 1/2."""
        super().reset_parameters(std, out_std)
        if self.forget_gate == "bias":
            start = torch.zeros(self.heads.total)
            if self.decay_times is not None:
                # -log(expm1(1 / t)), whose exponential overflows at short times.
                slopes = torch.tensor(self.times(), dtype=torch.float64).reciprocal()
                start = -slopes - (-torch.expm1(-slopes)).log()
            with torch.no_grad():
                self.forget_bias.copy_(start[list(self.heads.kept)])

    def times(self) -> list[float]:
        """The times t_h of all heads that `decay_times` spans."""
        assert self.decay_times is not None
        first, last = map(math.log, self.decay_times)
        steps = max(self.heads.total - 1, 1)
        return [math.exp(first + (last - first) * h / steps) for h in range(self.heads.total)]

    def forward(
        self, x: Tensor, context: None = None, *, mask: Mask = None, positions: Positions = None,
        cache: ForgettingCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, without context.

        Padding is what an AttentionMask names by its lengths or real_queries.
        """
        if context is not None:
            raise ValueError(f"context must be None: no decay to other sequences is defined; got {describe(context)}")
        call = begin(self, x, None, mask, positions, cache)
        (B, T, _), D, Dv = x.shape, self.head_dim, self.v_head_dim
        q = self.q_proj(x).view(B, T, self.num_heads, D)
        new = self.k_proj(x).view(B, T, self.num_kv_heads, D), self.v_proj(x).view(B, T, self.num_kv_heads, Dv)
        if cache is not None:
            cache.check_fits(*new)
        k, v = self.shifted(*new, x, call) if self.has_shift else new
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        c = None if self.forget_gate is None else self.cumulated_gates(x, call)
        # On a shard the sums are those of all tokens already.
        states = (k, v) if c is None or call.view.shards is not None else (k, v, c)
        with call.remember(*states) as (k, v, *held):
            if cache is not None and self.has_shift:
                cache.follow(*(without_padding(z, call.real_tokens(x)) for z in new))
            k, v = self.heads.spread(k, v)
            c = held[0] if held else c
            decay = None if c is None else c[..., 0].transpose(1, 2)
            options: dict[str, Any] = {"scale": self.scale, "decay": decay, "backend": self.backend}
            options |= {"bias": call.bias, "dropout": self.weight_dropout}
            if self.prune_tolerance is None:
                out = softmax_attention(q, k, v, call.view, **options)
            else:
                out = pruned_attention(q, k, v, call.view, tolerance=self.prune_tolerance, **options)
            gate = None if self.g_proj is None else self.g_proj(x)
            activation = self.output_gate or "sigmoid"
            heads = norm_and_gate(
                out, self.output_norm, gate, activation=activation, dtype=out.dtype, backend=self.backend
            )
            y: Tensor = self.o_proj(heads)
            return y

    def shifted(self, k: Tensor, v: Tensor, x: Tensor, call: Call) -> tuple[Tensor, ...]:
        """Keys and values mixed with those of the token before; padding has none."""
        real, mask = call.real_tokens(x), call.view.mask
        places = None if mask is None else mask.positions(*x.shape[:2])
        before = (None, None) if call.cache is None else call.cache.last_rows()
        mixed = []
        for z, proj, last in zip((k, v), (self.k_shift_proj, self.v_shift_proj), before, strict=True):
            if proj is not None:
                z = token_shift(without_padding(z, real), torch.sigmoid(proj(x)), last, places)
            mixed.append(z)
        return tuple(mixed)

    def cumulated_gates(self, x: Tensor, call: Call) -> Tensor:
        """c (B, T, H, 1), in float32 or float64; in packed documents from the start of each.

        On a shard of a sequence it is that of all tokens.
        """
        (B, T, _), dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            if self.forget_proj is not None:
                gates = F.logsigmoid(precise_linear(self.forget_proj, x))
            elif self.forget_gate == "bias":
                gates = F.logsigmoid(self.forget_bias.to(dtype)).expand(B, T, -1)
            else:
                times = self.times()
                kept = tuple(-1 / times[h] for h in self.heads.kept)
                gates = constant(kept, x.device).to(dtype).expand(B, T, -1)
            real, mask = call.real_tokens(x), call.view.mask
            if real is not None:
                gates = gates.where(real[..., None], 0)
            if call.view.shards is not None:
                (gates,) = call.view.shards.gathered(gates)
            c = gates.cumsum(1)
            bounds = None if mask is None else mask.document_bounds(*c.shape[:2])
            if bounds is not None:
                c = c - (c - gates).gather(1, bounds[0].long()[..., None].expand_as(c))
            if call.cache is not None:
                c = c + call.cache.last_gates()
            return c[..., None]

    def gate_layers(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """Forget gates of the data, and a sigmoid gate of the outputs."""
        layers = {"forget_gate": self.forget_proj, "gate": self.g_proj if self.output_gate == "sigmoid" else None}
        every = tuple(range(self.num_heads))
        return {name: (layer, every) for name, layer in layers.items() if layer is not None}

    def sequence_obstacle(self) -> str | None:
        """Shifts take the token before, which another rank may have; `prune_tolerance` asks for all scores' bounds."""
        if self.has_shift:
            return "k_shift and v_shift must be False, got shifts, as pro has them"
        return None if self.prune_tolerance is None else f"prune_tolerance must be None, got {self.prune_tolerance}"

    def wide_numbers(self) -> int:
        """Gates."""
        return 0 if self.forget_gate is None else self.num_heads

    def constant_numbers(self) -> int:
        """Gates that are fixed."""
        return self.num_heads if self.forget_gate == "fixed" else 0

    # Caches

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """Key, value and the cumulated gate of each query head."""
        gates = () if self.forget_gate is None else ((self.num_heads, 1),)
        return (*super().cache_widths(), *gates)

    def cache_layout(self) -> CacheLayout:
        """As the base's, and the rows before the shift."""
        layout = super().cache_layout()
        rows = tuple((self.cache_type.ROWS, *width) for width in layout.widths[:2])
        return layout._replace(widths=(*layout.widths, *rows)) if self.has_shift else layout

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ForgettingCache:  # fmt: skip
        """As the base's; cumulated gates are in float32 or float64."""
        cache: ForgettingCache = super().init_cache(batch_size, max_length, device, dtype)
        if self.has_shift:
            cache.make_rows()
        return cache

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a token takes in a cache of that dtype: its key and value, and 4 for each gate (8 in float64)."""
        wider = torch.promote_types(dtype, torch.float32).itemsize - dtype.itemsize
        return super().cache_bytes_per_token(dtype) + self.wide_numbers() * wider

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """As the base's, and the rows before the shift."""
        numbers = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        rows = self.cache_type.ROWS * numbers * dtype.itemsize if self.has_shift else 0
        return super().state_bytes(tokens, dtype) + rows

    # Costs and pruning

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", those of gates and shifts among them, and "attention"."""
        S = T if S is None else S
        rows = sum(child.out_features for name, child in self.named_children() if isinstance(child, nn.Linear))
        rows += self.num_heads * self.v_head_dim - self.embed_dim
        pairs = attention_pairs(T, S, causal=True, window=self.sliding_window)
        attention = 2 * self.num_heads * (self.head_dim + self.v_head_dim) * pairs
        return {"projections": 2 * T * self.embed_dim * rows, "attention": attention}

    def no_weight_decay(self) -> set[str]:
        """The learned bias of the gates, and the gains of the norms."""
        names = {name for name, _ in self.named_parameters() if "norm" in name}
        return names | {"forget_bias"} if self.forget_gate == "bias" else names

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads, with their gates, and of key/value heads."""
        self.keep_projections(heads, groups)
        for proj, kept, width in (
            (self.forget_proj, heads, 1), (self.g_proj, heads, self.v_head_dim), (self.k_shift_proj, groups, 1),
            (self.v_shift_proj, groups, 1),
        ):  # fmt: skip
            if proj is not None:
                keep_rows(proj, kept, width)
        for norm, kept in ((self.q_norm, heads), (self.k_norm, groups), (self.output_norm, heads)):
            if isinstance(norm, HeadNorm):
                norm.keep_heads(kept)
        if self.forget_gate == "bias":
            self.forget_bias = keep_entries(self.forget_bias, heads)
