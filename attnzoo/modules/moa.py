"""Mixture of attention heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import check_cache, check_input, check_options, check_sizes, derive_head_dim, one_source
from attnzoo.modules.positions import rotary_tables
from attnzoo.modules.structure import attention_pairs, surviving_heads
from attnzoo.ops.expert_projection import Routes, expert_linear_pieces
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotate

GATE_MODES = ("topk_softmax", "softmax_topk", "softmax_topk_norm")
AUX_LOSSES = ("switch_z", "mi", "cv", "none")


class Experts(nn.Module):
    """N matrices, weight (N, out, in)."""

    def __init__(self, experts: int, in_features: int, out_features: int, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features, **made))


@dataclass(frozen=True)
class Routing:
    """What the router of the last training forward did, detached, for diagnostics.

    Attributes:
        load: (N,) share of the choices that fell on each expert.
        probability: (N,) mean probability of each expert.
        entropy: mean entropy of a token's probabilities, in nats.
    """

    load: Tensor
    probability: Tensor
    entropy: Tensor


class MixtureOfAttentionHeads(nn.Module):
    """Mixture of attention heads (Zhang et al. 2022, arXiv:2210.05144; causal as in JetMoE, arXiv:2404.07413).

    A router picks k of N experts for each token. An expert owns a query and an output projection of M heads; keys
    and values, G heads, are shared by all:

        l = Wr x, p = softmax(l);   e_1 .. e_k the largest
        q_s = rotate(Wq[e_s] x);    o_s = attention of q_s over the shared keys and values
        y = sum_s gate_s Wo[e_s] o_s + o_bias

    with gates softmax(l over the selected) ("topk_softmax"), p[e_s] ("softmax_topk"), or p[e_s] over its detached
    sum ("softmax_topk_norm"). Router arithmetic is float32. The attention is grouped-query attention with k M heads.

    There is no o_proj: per-head outputs pass through `head_outputs`, an identity, as (B, T, k M Dv), slot-major and
    multiplied by their gates; a hook there sees what o_proj's input is elsewhere.

    Tokens beyond the lengths of a padding mask are not routed: their y is o_bias, and they are in no loss. After a
    training forward `aux_loss` holds the auxiliary loss with its coefficients, and `routing` the statistics.

    Args:
        embed_dim: width E of input and output.
        num_heads: active heads k M of a token.
        num_kv_heads: key/value heads G. Default: 1.
        head_dim: width D of queries and keys. Default: E / (k M).
        num_experts: N. Default: 2 k.
        num_experts_per_tok: k. Default: num_heads / heads_per_expert.
        heads_per_expert: heads M of an expert; a multiple of G. Default: G.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context. Default: E.
        bias: whether the key and value projections have one.
        out_bias: whether there is one on the output.
        gate_mode: "topk_softmax", "softmax_topk" or "softmax_topk_norm".
        sample_topk: in training, so many of the k are drawn by their probability instead of taken.
        router_noise: learned noise on the logits in training.
        aux_loss: "switch_z" (load balance and squared log-sum-exp), "mi" (mutual information), "cv" or "none".
        switch_coef: of the load balance.
        z_coef: of the squared log-sum-exp.
        mi_coef: of the mutual information.
        cv_coef: of the squared coefficient of variation.
        rope: rotary position embedding, or None.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" and the names of softmax attention's backends with grouped projections, which are torch's or,
            with "triton", kernels; "eager" computes all experts, which is the definition.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    routing: Routing | None = None
    o_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        *,
        num_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        heads_per_expert: int | None = None,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        gate_mode: str = "topk_softmax",
        sample_topk: int = 0,
        router_noise: bool = False,
        aux_loss: str = "switch_z",
        switch_coef: float = 0.01,
        z_coef: float = 0.001,
        mi_coef: float = 0.01,
        cv_coef: float = 0.01,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        causal: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        per_expert = num_kv_heads if heads_per_expert is None else heads_per_expert
        check_sizes(embed_dim=embed_dim, num_kv_heads=num_kv_heads, heads_per_expert=per_expert)
        if per_expert % num_kv_heads:
            raise ValueError(
                f"heads_per_expert must be a multiple of num_kv_heads, got {per_expert} and {num_kv_heads}"
            )
        if num_heads is None:
            num_heads = (2 if num_experts_per_tok is None else num_experts_per_tok) * per_expert
        active = num_heads // per_expert if num_experts_per_tok is None else num_experts_per_tok
        if active * per_expert != num_heads:
            raise ValueError(
                f"num_heads must be num_experts_per_tok * heads_per_expert, got {num_heads}, {active} and {per_expert}"
            )
        experts = 2 * active if num_experts is None else num_experts
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        self.kdim = embed_dim if kdim is None else kdim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(
            num_heads=num_heads, num_experts=experts, num_experts_per_tok=active, head_dim=head_dim,
            v_head_dim=v_head_dim, kdim=self.kdim,
        )  # fmt: skip
        check_options(
            dropout=dropout, logit_softcap=None, sliding_window=None, sink_tokens=0, sink=None, scale=None
        )  # fmt: skip
        if active > experts:
            raise ValueError(f"num_experts_per_tok must be at most num_experts, got {active} and {experts}")
        if not 0 <= sample_topk <= active:
            raise ValueError(f"sample_topk must lie between 0 and num_experts_per_tok {active}, got {sample_topk}")
        for name, value, allowed in (("gate_mode", gate_mode, GATE_MODES), ("aux_loss", aux_loss, AUX_LOSSES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        coefficients = {"switch": switch_coef, "z": z_coef, "mi": mi_coef, "cv": cv_coef}
        for name, coefficient in coefficients.items():
            if coefficient < 0:
                raise ValueError(f"{name}_coef must not be negative, got {coefficient}")
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.num_experts = experts
        self.num_experts_per_tok = active
        self.heads_per_expert = per_expert
        self.gate_mode = gate_mode
        self.sample_topk = sample_topk
        self.aux_loss_kind = aux_loss
        self.coefficients = coefficients
        self.rope = rope
        self.rope_dim = 0 if rope is None else rope.width(head_dim)
        self.causal = causal
        self.dropout = dropout
        self.init_std = init_std
        self.backend = check_name(backend)
        self._total_experts, self._kept_experts = experts, tuple(range(experts))

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Linear(embed_dim, experts, False, **made)
        self.noise = nn.Linear(embed_dim, experts, False, **made) if router_noise else None
        self.q_experts = Experts(experts, embed_dim, per_expert * head_dim, **made)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(self.kdim, num_kv_heads * v_head_dim, bias, **made)
        self.o_experts = Experts(experts, per_expert * v_head_dim, embed_dim, **made)
        self.o_bias = nn.Parameter(torch.empty(embed_dim, **made)) if out_bias else None
        self.head_outputs = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: everything normal with `std` (output experts `out_std`), biases and noise 0.

        The router too: with zeros every token would take the same experts.
        """
        std = self.init_std if std is None else std
        for weight in (self.router.weight, self.q_experts.weight, self.k_proj.weight, self.v_proj.weight):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.o_experts.weight, std=std if out_std is None else out_std)
        for zero in (
            self.k_proj.bias, self.v_proj.bias, self.o_bias, None if self.noise is None else self.noise.weight
        ):  # fmt: skip
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention; needs causal=False, and positions if rope is set. The router
                and the queries read x.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. With a
                cache it covers cached and new keys. A mask of single heads goes by key/value head, then slot.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; filled in place.
        """
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        source = one_source(self, x, context)
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        if cache is not None:
            check_cache(cache, KeyValueCache, self.causal, context, mask)
        real = None
        if mask is not None and mask.lengths is not None and context is None:
            if mask.lengths.shape[0] != B:
                raise ValueError(f"lengths must have one entry a row, got {mask.lengths.shape[0]} for {B}")
            real = torch.arange(past, past + T, device=x.device) < mask.lengths[:, None]
        logits = self.router_logits(x)
        chosen, gates = self._gates(logits)
        if real is not None:
            gates = gates * real[..., None].to(gates.dtype)
        self._note(logits, chosen, gates, real)
        k_slots, M, G = self.num_experts_per_tok, self.heads_per_expert, self.num_kv_heads
        routes = Routes.of(chosen.flatten(), self.num_experts)
        x_slots = _cast(x).reshape(B * T, 1, 1, self.embed_dim).expand(-1, -1, k_slots, -1)
        # Slots of a key/value head side by side, so that head h reads h // (k M / G).
        q = expert_linear_pieces(
            x_slots, _cast(self.q_experts.weight, x_slots), routes, out_groups=G, backend=self.backend
        )
        q = q.reshape(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(source).view(B, S, G, self.head_dim)
        v = self.v_proj(source).view(B, S, G, self.v_head_dim)
        if self.rope is not None:
            q_table, k_table = rotary_tables(
                self.rope, self.rope_dim, q, k, positions, mask, cross=context is not None, past=past,
                limit=None if cache is None else cache.max_length,
            )  # fmt: skip
            q, k = rotate(q, *q_table, self.rope.style), rotate(k, *k_table, self.rope.style)
        key_positions = None
        if cache is not None:
            k, v, key_positions = cache.append(k, v)
        out = softmax_attention(
            q, k, v, causal=self.causal, mask=mask, dropout=self.dropout if self.training else 0.0,
            key_positions=key_positions, query_start=past if cache is not None else None, backend=self.backend,
        )  # fmt: skip
        out = out.reshape(B * T, G, k_slots, M // G * self.v_head_dim)
        gates = gates.reshape(B * T, k_slots)
        wo = _cast(self.o_experts.weight, out)
        if self.backend == "triton" and not self._outputs_are_watched():
            y = expert_linear_pieces(out, wo, routes, gates=gates, backend=self.backend)
        else:
            gated = out.transpose(1, 2) * gates.to(out.dtype)[..., None, None]
            gated = self.head_outputs(gated.reshape(B, T, k_slots * M * self.v_head_dim))
            gated = gated.reshape(B * T, 1, k_slots, M * self.v_head_dim)
            y = expert_linear_pieces(gated, wo, routes, backend=self.backend)
        y = y.reshape(B, T, k_slots, self.embed_dim).sum(2)
        return y if self.o_bias is None else y + self.o_bias.to(y.dtype)

    def _outputs_are_watched(self) -> bool:
        """Whether something may look at `head_outputs`; if not, the kernels take the gates themselves."""
        place = self.head_outputs
        hooks = (place._forward_hooks, place._forward_pre_hooks, place._backward_hooks, place._backward_pre_hooks)
        return type(place) is not nn.Identity or any(hooks)

    def router_logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, N) in float32, or float64 for float64; with learned noise in training."""
        high = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            logits = F.linear(x.to(high), self.router.weight.to(high))
            if self.noise is not None and self.training:
                spread = F.softplus(F.linear(x.to(high), self.noise.weight.to(high))) + 0.01
                logits = logits + torch.randn_like(logits) * spread
        return logits

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their gates, both (B, T, k)."""
        probabilities = logits.softmax(-1)
        taken = self.num_experts_per_tok - (self.sample_topk if self.training else 0)
        chosen = logits.topk(taken, dim=-1).indices if taken else logits.new_empty(*logits.shape[:2], 0).long()
        if taken < self.num_experts_per_tok:
            rest = (probabilities.detach() + 1e-6).scatter(-1, chosen, 0.0).flatten(0, 1)
            drawn = torch.multinomial(rest, self.num_experts_per_tok - taken).view(*logits.shape[:2], -1)
            chosen = torch.cat([chosen, drawn], dim=-1)
        if self.gate_mode == "topk_softmax":
            return chosen, logits.gather(-1, chosen).softmax(-1)
        gates = probabilities.gather(-1, chosen)
        if self.gate_mode == "softmax_topk_norm":
            gates = gates / (gates.detach().sum(-1, keepdim=True) + 1e-6)
        return chosen, gates

    def _note(self, logits: Tensor, chosen: Tensor, gates: Tensor, real: Tensor | None) -> None:
        """Auxiliary loss and statistics of a training forward; nothing else keeps them."""
        self.aux_loss, self.routing = None, None
        if not self.training or logits.shape[0] * logits.shape[1] == 0:
            return
        terms = router_losses(logits, chosen, gates, real)
        weights = {"switch_z": ("switch", "z"), "mi": ("mi",), "cv": ("cv",), "none": ()}[self.aux_loss_kind]
        if weights:
            self.aux_loss = sum((self.coefficients[name] * terms[name] for name in weights), logits.new_zeros(()))
        with torch.no_grad():
            valid = torch.ones_like(logits[..., 0]) if real is None else real.to(logits.dtype)
            p = logits.softmax(-1)
            entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
            load = F.one_hot(chosen, self.num_experts).sum(2) * valid[..., None]
            total = valid.sum().clamp(min=1)
            self.routing = Routing(
                load.sum((0, 1)) / (total * self.num_experts_per_tok),
                (p * valid[..., None]).sum((0, 1)) / total,
                (entropy * valid).sum() / total,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left, which belongs to its graph."""
        return {**self.__dict__, "aux_loss": None, "routing": None}

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """A cache for max_length tokens; device and dtype default to those of the module's weights."""
        weight = self.router.weight
        return KeyValueCache(
            batch_size,
            max_length,
            ((self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)),
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """G (D + Dv) numbers of that dtype, whatever the number of experts."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T)."""
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`, with grouped projections: "projections", "router" and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv, E = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim, self.embed_dim
        pairs = attention_pairs(T, S, causal=self.causal, window=None)
        return {
            "projections": 2 * T * E * H * (D + Dv) + 2 * keys * self.kdim * G * (D + Dv),
            "router": 2 * T * E * self.num_experts,
            "attention": 2 * H * (D + Dv) * pairs,
        }

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per head of every expert, N M in all, the factors (WQ, WK), each (d, E), whoever is chosen.

        part: "full", or of a module with rope the "rope" features or the rest, "nope".
        """
        if part not in ("full", "rope", "nope") or (part != "full" and self.rope is None):
            raise ValueError(f"part must be 'full', or with rope 'rope' or 'nope', got {part!r}")
        rows = {"full": slice(None), "rope": slice(self.rope_dim), "nope": slice(self.rope_dim, None)}[part]
        M, size = self.heads_per_expert, self.heads_per_expert // self.num_kv_heads
        wq = self.q_experts.weight.detach().view(self.num_experts, M, self.head_dim, self.embed_dim)
        wk = self.k_proj.weight.detach().view(self.num_kv_heads, self.head_dim, self.kdim)
        return [(wq[n, m, rows], wk[m // size, rows]) for n in range(self.num_experts) for m in range(M)]

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the experts that are gone, ascending."""
        return tuple(n for n in range(self._total_experts) if n not in self._kept_experts)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove experts. The router chooses among the rest, as if their logits were -inf: not a mask of outputs.

        Raises:
            ValueError: also if fewer than num_experts_per_tok would be left.
        """
        old = self._kept_experts
        experts = surviving_heads(self._total_experts, self.pruned_heads, indices)
        if len(experts) < self.num_experts_per_tok:
            raise ValueError(
                f"indices must leave at least num_experts_per_tok {self.num_experts_per_tok} experts, got "
                f"{len(experts)}"
            )
        at = [old.index(n) for n in experts]
        for owner in (self.router, self.noise, self.q_experts, self.o_experts):
            if owner is not None:
                weight = owner.weight
                owner.weight = nn.Parameter(weight.detach()[at], requires_grad=weight.requires_grad)
        self._kept_experts, self.num_experts = experts, len(experts)
        self.router.out_features = len(experts)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        experts = f"{self.num_experts_per_tok} of {self.num_experts} experts of {self.heads_per_expert} heads"
        return f"{self.embed_dim}, {self.num_heads} active heads, {experts}, head_dim={self.head_dim}, rope={self.rope}"


def router_losses(logits: Tensor, chosen: Tensor, gates: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Losses of a router without coefficients, over the real tokens of the batch.

        switch = N sum_e (P_e / sum P) (f_e / sum f)               1 when balanced
        z      = mean logsumexp(l)^2
        cv     = Var(I / sum I) / (mean^2 + 1e-10), I_e the sum of gates
        mi     = mean_t H(p_t) - H(mean_t p_t)                     -log N .. 0

    Args:
        logits: (B, T, N).
        chosen: (B, T, k) experts.
        gates: (B, T, k).
        real: (B, T) boolean, or None if all tokens are.
    """
    N = logits.shape[-1]
    valid = torch.ones_like(logits[..., 0]) if real is None else real.to(logits.dtype)
    total = valid.sum().clamp(min=1)
    p = logits.softmax(-1)
    of_experts = (p * valid[..., None]).sum((0, 1))
    one_hot = F.one_hot(chosen, N).to(logits.dtype) * valid[..., None, None]
    frequency = one_hot.sum((0, 1, 2))
    switch = N * ((of_experts / of_experts.sum().clamp(min=1e-30)) * (frequency / frequency.sum().clamp(min=1))).sum()
    z = (torch.logsumexp(logits, -1).square() * valid).sum() / total
    importance = (one_hot * gates[..., None]).sum((0, 1, 2))
    share = importance / importance.sum().clamp(min=1e-30)
    cv = (share.var() if N > 1 else share.new_zeros(())) / (share.mean().square() + 1e-10)
    mean = of_experts / total
    log_p = torch.log_softmax(logits, -1)
    mi = -(p * log_p * valid[..., None]).sum() / total + (mean * (mean + 1e-8).log()).sum()
    return {"switch": switch, "z": z, "cv": cv, "mi": mi}


def _cast(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In autocast's dtype where it is on, as a linear layer would be; else in that of `like`."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device)) if x.dtype != torch.float64 else x
    return x if like is None else x.to(like.dtype)
