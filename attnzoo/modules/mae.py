"""Mixture of attentive experts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import CacheLayout, KeyValueCache, MeanCache
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import HeadLayout
from attnzoo.ops.head_routing import Routing
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import constant, softmax_attention
from attnzoo.ops.submodules import precise_linear
from attnzoo.rules import INTEGER, check, check_sizes, one_of
from attnzoo.tracing import is_exported

GATE_INPUTS = ("causal_mean", "mean", "token")
PHASES = ("mixture", "expert", "argmax")
MOST_EXPERTS = 4096


class MixtureOfAttentiveExperts(GroupedQueryAttention):
    """Mixture of attentive experts (Peng et al. 2020, arXiv:2005.06537), "a mixture of h - 1 heads".

    Multi-head attention is a uniform mixture of experts, each of which leaves heads out. Here a gate weighs them:

        f_S(t) = (H / k) sum_{h in S} Wo_h o_t,h                     S a subset of k heads
        g_t = softmax(W2 tanh(W1 z_t + b1) + b2)                     one number for each S
        y_t = sum_S g_t,S f_S(t) = sum_h a_t,h Wo_h o_t,h,           a_h = (H / k) sum_{S with h} g_S

    Computed as the last: a factor per head. With k = H - 1, the paper's, a_h = H / (H - 1) (1 - g_h), where expert i
    leaves head i out; other k count subsets in the order of itertools.combinations. W2 starts at 0, so the layer starts
    as grouped-query attention.

    z is the mean of the real tokens of a sequence, the paper's form, which a causal layer may not see; or the mean of
    the tokens up to t; or the token itself. Means restart in packed documents.

    In phase "expert" a training forward takes one expert alone, drawn by g for each z, and the gate gets a gradient of
    0; in "argmax" the most probable one. `attnzoo_recipes.callbacks.experts.BlockCoordinateDescent` alternates the
    phases of layers with training_scheme "bcd". A training forward leaves statistics of the gate in `routing`: mean g,
    the share of each expert as the most probable, the entropy.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H, at least 2.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        num_active: k. Default: H - 1.
        gate_input: "causal_mean" (default if causal), "mean" (default if not) or "token".
        gate_hidden: width of the gate's hidden layer.
        training_scheme: "joint" or "bcd".
        options: the keyword options of `GroupedQueryAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    routing: Routing | None = None
    phase: str = "mixture"
    expert_index: int | None = None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        num_active: int | None = None,
        gate_input: str | None = None,
        gate_hidden: int = 256,
        training_scheme: str = "joint",
        causal: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, causal=causal, **options)
        (gate_hidden,) = check_sizes(gate_hidden=gate_hidden)
        num_heads = self.num_heads
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, got {num_heads}")
        k = num_heads - 1 if num_active is None else num_active
        (k,) = check_sizes(num_active=k)
        gate_input = ("causal_mean" if causal else "mean") if gate_input is None else gate_input
        if k > num_heads - 1:
            raise ValueError(f"num_active must lie between 1 and num_heads - 1 = {num_heads - 1}, got {k}")
        if (n := math.comb(num_heads, k)) > MOST_EXPERTS:
            raise ValueError(
                f"num_active must give at most {MOST_EXPERTS} experts, got {n} of {k} of {num_heads} heads"
            )
        check("gate_input", gate_input, one_of(*GATE_INPUTS))
        if causal and gate_input == "mean":
            raise ValueError("gate_input 'mean' needs causal=False: it would show later tokens to earlier ones")
        check("training_scheme", training_scheme, one_of("joint", "bcd", words="be 'joint' or 'bcd'"))
        self.num_active, self.gate_input, self.training_scheme = k, gate_input, training_scheme
        if gate_input == "causal_mean":
            self.cache_type = MeanCache
        factory_kwargs: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.gate_fc1 = nn.Linear(embed_dim, gate_hidden, **factory_kwargs)
        self.gate_fc2 = nn.Linear(gate_hidden, n, **factory_kwargs)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; the gate's last layer is 0."""
        super().reset_parameters(std, out_std)
        if hasattr(self, "gate_fc2"):
            nn.init.zeros_(self.gate_fc2.weight)

    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")

    def sequence_obstacle(self) -> str | None:
        """A mean over tokens is not that of a shard."""
        if self.gate_input != "token":
            return f"gate_input must be 'token', since a mean is over tokens of all ranks, got {self.gate_input!r}"
        return None

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`. The gate reads x."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        z, sums = self.gate_inputs(x, call)
        g = self.gates(z)
        factors = self.factors(g)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k, v) as (k, v):
            if isinstance(cache, MeanCache):
                cache.store(*sums)
            k, v = self.heads.spread(k, v)
            scale = self.own_heads(factors).expand(-1, x.shape[1], -1)
            out = softmax_attention(
                q, k, v, call.view, head_scale=scale, bias=call.bias, **self.score_options(q.device)
            )
            y: Tensor = self.o_proj(out.flatten(2))
            self._keep_statistics(g, call.real_tokens(x))
            return y

    def gate_inputs(self, x: Tensor, call: Call) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """z (B, T or 1, E), and of a running mean the sum (B, E) and number (B, 1) of real tokens so far."""
        if self.gate_input == "token":
            return x, (x, x)
        (B, T, _), real, mask = x.shape, call.real_tokens(x), call.view.mask
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        one = torch.ones_like(x[..., :1]) if real is None else real[..., None].to(x.dtype)
        # Sums and numbers of the tokens before each place, and before the end.
        before = torch.cat([x.new_zeros(B, 1, x.shape[2]), (x * one).cumsum(1)], 1)
        count = torch.cat([x.new_zeros(B, 1, 1), one.cumsum(1)], 1)
        if isinstance(call.cache, MeanCache):
            call.cache.check_batch(B)
            before, count = before + call.cache.sums[:, None], count + call.cache.counts[:, None]
        causal = self.gate_input == "causal_mean"
        end, number = (before[:, 1:], count[:, 1:]) if causal else (before[:, -1:], count[:, -1:])
        bounds = None if mask is None else mask.document_bounds(B, T)
        if bounds is not None:
            first, last = (bound.long()[..., None] for bound in bounds)
            if not causal:
                end, number = before.gather(1, last.expand(-1, -1, x.shape[2])), count.gather(1, last)
            end = end - before.gather(1, first.expand(-1, -1, x.shape[2]))
            number = number - count.gather(1, first)
        return end / number.clamp(min=1), (before[:, -1], count[:, -1])

    def gates(self, z: Tensor) -> Tensor:
        """Probabilities g (.., n) of the experts."""
        return precise_linear(self.gate_fc2, torch.tanh(precise_linear(self.gate_fc1, z))).softmax(-1)

    def _keep_statistics(self, g: Tensor, real: Tensor | None) -> None:
        """Set `routing`, to None outside training; an exported program keeps none."""
        if is_exported():
            return
        self.routing = None
        if self.training and g.numel():
            counts = None if real is None or real.shape[1] != g.shape[1] else real
            self.routing = Routing.of(g == g.amax(-1, keepdim=True), g, counts).detach()

    def factors(self, g: Tensor) -> Tensor:
        """Factors a (.., H) of the heads that are left, in the module's phase."""
        H, k = self.gated_heads.total, self.num_active
        chooses = self.phase == "argmax" or (
            self.phase == "expert" and (self.training or self.expert_index is not None)
        )
        members = None if k == H - 1 and not chooses else self.members(g)
        if not chooses:
            a = H / k * (1 - g if members is None else g @ members)
        else:
            assert members is not None
            rows = g.detach().flatten(0, -2)
            if self.phase == "argmax":
                index = rows.argmax(-1)
            elif self.expert_index is not None:
                index = torch.full(rows.shape[:1], self.expert_index, device=g.device)
            else:
                index = torch.multinomial(rows, 1)[:, 0] if rows.numel() else rows.new_zeros(0, dtype=torch.long)
            # Adding 0 gives the gate a gradient, of 0, as wrappers expect of every parameter.
            a = H / k * members[index].view(*g.shape[:-1], H) + 0 * g[..., :1]
        return a if len(self.gated_heads.kept) == H else a[..., list(self.gated_heads.kept)]

    def members(self, like: Tensor) -> Tensor:
        """Which head (H) each expert (n) has: 1 or 0."""
        H, k = self.gated_heads.total, self.num_active
        if k == H - 1:
            return 1 - torch.eye(H, dtype=like.dtype, device=like.device)
        rows = [float(h in subset) for subset in itertools.combinations(range(H), k) for h in range(H)]
        return constant(tuple(rows), like.device).to(like.dtype).view(-1, H)

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's; the gate is whole."""
        return {**super().tensor_splits(), "gate_fc1": "whole", "gate_fc2": "whole"}

    @property
    def gated_heads(self) -> HeadLayout:
        """The heads that the gate knows: those of all ranks."""
        heads: HeadLayout = self.__dict__.get("whole_heads", self.heads)
        return heads

    def take_heads(self, group: Any) -> None:
        """As the base's; the gate keeps all heads."""
        self.whole_heads = self.heads
        super().take_heads(group)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate's parameters, which steps of the responsibilities train, and steps of the experts do not."""
        return [*self.gate_fc1.parameters(), *self.gate_fc2.parameters()]

    def set_phase(self, phase: str, expert_index: int | None = None) -> None:
        """Take the "mixture", one drawn "expert" in training (or always the one of expert_index), or the "argmax"."""
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(map(repr, PHASES))}, got {phase!r}")
        if expert_index is not None:
            check("expert_index", expert_index, INTEGER)
        if expert_index is not None and not (phase == "expert" and 0 <= expert_index < self.gate_fc2.out_features):
            raise ValueError(
                f"expert_index must lie between 0 and {self.gate_fc2.out_features - 1} and needs phase 'expert', got "
                f"{expert_index} and {phase!r}"
            )
        self.phase, self.expert_index = phase, expert_index

    def cache_layout(self) -> CacheLayout:
        """As the base's, and the width of the running mean."""
        layout = super().cache_layout()
        return layout._replace(widths=(*layout.widths, (self.embed_dim,))) if self.cache_type is MeanCache else layout

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:  # fmt: skip
        """As the base's; with a running mean its sum in float32 or float64."""
        cache = super().init_cache(batch_size, max_length, device, dtype)
        if isinstance(cache, MeanCache):
            cache.make_sums(self.embed_dim)
        return cache

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """As the base's, and the running sum and number of tokens."""
        own = (self.embed_dim + 1) * torch.promote_types(dtype, torch.float32).itemsize
        return super().state_bytes(tokens, dtype) + (own if self.cache_type is MeanCache else 0)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and "gate"."""
        rows, n = 1 if self.gate_input == "mean" else T, self.gate_fc2.out_features
        H, k = self.heads.total, self.num_active
        gate = self.gate_fc1.out_features * (self.embed_dim + n) + (0 if k == H - 1 else n * H)
        return {**super().flops_by_part(T, S), "gate": 2 * rows * gate}
