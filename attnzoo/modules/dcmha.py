"""Dynamically composable multi-head attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import ComposedCache
from attnzoo.modules.base import Factors, Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.dynamic_weights import ACTIVATIONS, DYNAMIC_SPLITS, DynamicWeights
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_rows
from attnzoo.ops.composed_attention import Composition, DynamicProjection, composed_attention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import constant
from attnzoo.ops.submodules import local
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_sizes, one_of


class DynamicallyComposableAttention(Mechanism):
    """Dynamically composable multi-head attention (Xiao et al. 2024, arXiv:2405.08553).

    The vector of all heads' scores at a pair (t, s) passes through a composition before the softmax, and that of
    their weights through another after it:

        a'_j = a_j + sum_m a_m Base[m, j] + sum_r (a . uq_r) vq_rj + a_j gq_j + sum_r (a . uk_r) vk_rj + a_j gk_j

    uq, vq, gq are made from the input at t and uk, vk, gk from that at s (`DynamicWeights`). Masks act after the
    first composition. Composed weights may be negative, and rows need not sum to 1.

    With key_wise=False and one key/value head for all heads of a composition group, the function is plain softmax
    attention of composed queries whose outputs are composed; it is computed so, and then every backend serves it.

    Pruning a head removes its value half: what it attends with stays, since other heads read it.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        kdim: width of the context. Default: E.
        bias: whether the four projections have one.
        rank: R of the projections; at most M = H / head_groups.
        head_groups: N groups of consecutive heads that are composed among themselves.
        dyn_hidden_dim: width K between the two layers that make u and v. Default: 2 R M.
        pre_compose: whether scores are composed.
        post_compose: whether weights are composed.
        query_wise: whether what belongs to queries takes part.
        key_wise: whether what belongs to keys takes part.
        static_base: whether each stage has a learned Base.
        dyn_act: "gelu" or "gelu_tanh".
        dyn_norm_eps: added to the mean square of u.
        qk_norm: RMS-normalise each head's query and key before the rotation.
        qk_norm_eps: added to that mean square; None takes the dtype's machine epsilon.
        rope: rotary position embedding, or None.
        sliding_window: a query sees this many keys at most, itself included.
        causal: no query sees a later key.
        dropout: probability of dropping a composed weight in training.
        chunk_size: queries done at once at most; longer inputs go chunk by chunk, and scores are recomputed in the
            backward pass. None: all at once.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (folded where that is possible, else "triton" on GPUs, else chunked for more than chunk_size
            queries), "eager" (all scores at once) or "triton" (fused kernels); others where it folds.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = ComposedCache
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")
    shown = ("rank", "stages", "rope", "sliding_window", "pruned_heads")
    q_dyn: DynamicWeights | None
    k_dyn: DynamicWeights | None
    pre_base: nn.Parameter | None
    post_base: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        kdim: int | None = None,
        bias: bool = False,
        rank: int = 2,
        head_groups: int = 1,
        dyn_hidden_dim: int | None = None,
        pre_compose: bool = True,
        post_compose: bool = True,
        query_wise: bool = True,
        key_wise: bool = True,
        static_base: bool = False,
        dyn_act: str = "gelu",
        dyn_norm_eps: float = 1e-6,
        qk_norm: bool = False,
        qk_norm_eps: float | None = 1e-6,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        sliding_window: int | None = None,
        causal: bool = True, dropout: float = 0.0, chunk_size: int | None = 128, init_std: float = 0.02,
        backend: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, kdim=kdim, rope=rope, sliding_window=sliding_window,
            causal=causal, dropout=dropout, init_std=init_std, backend=backend, bias=bias, pre_compose=pre_compose,
            post_compose=post_compose, query_wise=query_wise, key_wise=key_wise, static_base=static_base,
            dyn_norm_eps=dyn_norm_eps, qk_norm=qk_norm, qk_norm_eps=qk_norm_eps, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip
        check_sizes(head_groups=head_groups, rank=rank)
        if num_heads % head_groups:
            raise ValueError(f"head_groups must divide num_heads, got {head_groups} and {num_heads}")
        heads = num_heads // head_groups
        if rank > heads:
            raise ValueError(f"rank must be at most the {heads} heads of a group, got {rank}")
        hidden = 2 * rank * heads if dyn_hidden_dim is None else dyn_hidden_dim
        check_sizes(dyn_hidden_dim=hidden)
        if sliding_window is not None and not causal:
            raise ValueError(f"sliding_window needs causal=True, got {sliding_window} and causal=False")
        if not (pre_compose or post_compose):
            raise ValueError("pre_compose or post_compose must be True, got neither: that is multi-head attention")
        if not (query_wise or key_wise or static_base):
            raise ValueError(
                "query_wise, key_wise or static_base must be True, got none of them: that is multi-head attention"
            )
        check("dyn_act", dyn_act, one_of(*ACTIVATIONS))
        self.head_groups = head_groups
        self.rank = rank
        self.stages = tuple(name for name, used in (("pre", pre_compose), ("post", post_compose)) if used)
        self.chunk_size = chunk_size
        G, D = self.num_kv_heads, self.head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(num_heads * D, G * D, G * D, num_heads * D, bias=bias, **factory_kwargs)
        self.q_norm = nn.RMSNorm(D, qk_norm_eps, **factory_kwargs) if qk_norm else None
        self.k_norm = nn.RMSNorm(D, qk_norm_eps, **factory_kwargs) if qk_norm else None
        sizes = (len(self.stages), head_groups, heads, rank, hidden, dyn_act, dyn_norm_eps)
        self.q_dyn = DynamicWeights(embed_dim, *sizes, **factory_kwargs) if query_wise else None
        self.k_dyn = DynamicWeights(self.kdim, *sizes, **factory_kwargs) if key_wise else None
        for stage in ("pre", "post"):
            learned = static_base and stage in self.stages
            base = nn.Parameter(torch.empty(head_groups, heads, heads, **factory_kwargs)) if learned else None
            self.register_parameter(f"{stage}_base", base)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), mixes close to the identity."""
        super().reset_parameters(std, out_std)
        for base in (self.pre_base, self.post_base):
            if base is not None:
                nn.init.normal_(base, std=0.1 / math.sqrt(base.shape[1]))

    def dynamic_parameters(self) -> list[nn.Parameter]:
        """What makes weights of the input and starts small, for an optimiser group with a lower learning rate."""
        return [p for side in (self.q_dyn, self.k_dyn) if side is not None for p in side.parameters()]

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: ComposedCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor.

        Masks act after the first composition.
        """
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, call.source)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        of_queries = None if self.q_dyn is None else self.q_dyn(x)
        of_keys = None if self.k_dyn is None else self.k_dyn(call.source)
        states = [k, v]
        if of_keys is not None and (cache is not None or call.view.shards is not None):
            states.append(_packed(of_keys).to(v.dtype))
        with call.remember(*states) as (k, v, *packed):
            of_keys = self.unpacked(packed[0]) if packed else of_keys
            pre, post = (self.composition(stage, of_queries, of_keys) for stage in ("pre", "post"))
            out = composed_attention(
                q, k, self.values_of_all(v), pre, post, call.view, scale=self.scale, dropout=self.weight_dropout,
                chunk_size=self.chunk_size, value_heads=self.heads.kept if self.num_heads < self.score_heads else None,
                backend=self.backend,
            )  # fmt: skip
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys (B, S, G, D) and the values that are left, before norm and rotation."""
        (B, T, _), S, D = x.shape, source.shape[1], self.head_dim
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q = q.view(B, T, self.score_heads, D)
        return q, k.view(B, S, self.num_key_heads, D), v.view(B, S, self.num_kv_heads, D)

    def composition(
        self, stage: str, of_queries: list[DynamicProjection] | None, of_keys: list[DynamicProjection] | None
    ) -> Composition | None:
        """What is composed at a stage, "pre" or "post"; None: nothing."""
        if stage not in self.stages:
            return None
        at = self.stages.index(stage)
        base = local(self.pre_base if stage == "pre" else self.post_base)
        query, key = (None if side is None else side[at] for side in (of_queries, of_keys))
        return Composition(base, query=query, key=key)

    def unpacked(self, packed: Tensor) -> list[DynamicProjection]:
        """The inverse of `_packed`."""
        R, M = self.rank, self.score_heads // self.head_groups
        stages = packed.view(*packed.shape[:2], len(self.stages), self.head_groups, 2 * R + 1, M)
        return [(stage[..., :R, :], stage[..., R:-1, :], stage[..., -1, :]) for stage in stages.unbind(2)]

    def values_of_all(self, v: Tensor) -> Tensor:
        """Values of all heads, (B, S, G, D), with zeros where only pruned heads read."""
        if self.num_kv_heads == self.num_key_heads:
            return v
        groups = constant(self.heads.groups, v.device, torch.long)
        return v.new_zeros(*v.shape[:2], self.num_key_heads, self.head_dim).index_copy(2, groups, v)

    @property
    def score_heads(self) -> int:
        """Heads H of the scores, all that the module was made with."""
        return self.heads.total

    @property
    def num_key_heads(self) -> int:
        """Heads of the keys, all that the module was made with."""
        return self.heads.total // self.heads.group_size

    @property
    def folds(self) -> bool:
        """Whether the compositions move into queries and outputs of plain attention."""
        return self.k_dyn is None and self.head_groups % self.num_key_heads == 0

    @property
    def mixes_heads(self) -> bool:  # type: ignore[override]
        """Whether weights of several heads are mixed at every pair: not where the compositions fold."""
        return not self.folds or self.backend == "eager"

    def score_numbers(self) -> int:
        """Keys, and what belongs to them in the first composition."""
        first = self.key_state_size // len(self.stages) if "pre" in self.stages else 0
        return super().score_numbers() + first

    def factor_numbers(self) -> int:
        """What belongs to queries and to keys in the compositions."""
        if not self.mixes_heads:
            return 0
        sides = sum(side is not None for side in (self.q_dyn, self.k_dyn))
        return sides * len(self.stages) * (2 * self.rank + 1) * self.score_heads

    def split_obstacle(self, parts: int) -> str | None:
        """Ranks take whole composition groups, unless the compositions fold."""
        if not self.mixes_heads:
            return super().split_obstacle(parts)
        if self.head_groups % parts:
            return (
                f"a number of ranks that divides head_groups {self.head_groups}, whose heads are composed; got {parts}"
            )
        return "all value heads, got a pruned module" if self.num_heads < self.score_heads else None

    def splits_evenly(self, parts: int) -> bool:
        """Whether so many ranks each have composition groups of their own."""
        return self.split_obstacle(parts) is None

    @property
    def key_state_size(self) -> int:
        """Numbers that belong to a key in the compositions, P (2 R + 1) H with key_wise."""
        return 0 if self.k_dyn is None else len(self.stages) * (2 * self.rank + 1) * self.score_heads

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """(heads, width) of keys, of values and, with key_wise, of what belongs to keys in the compositions."""
        widths = (self.num_key_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        return widths if self.k_dyn is None else (*widths, (1, self.key_state_size))

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "attention", "dynamic weights" and "composition" (of pairs, or folded)."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, V, D, G = self.score_heads, self.num_heads, self.head_dim, self.num_key_heads
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        projections = 2 * T * self.embed_dim * (H + V) * D + 2 * keys * self.kdim * (G + self.num_kv_heads) * D
        sides = [(side, tokens) for side, tokens in ((self.q_dyn, T), (self.k_dyn, keys)) if side is not None]
        dynamic = sum(2 * tokens * sum(p.numel() for p in side.parameters()) for side, tokens in sides)
        per_pair = len(self.stages) * 4 * self.rank * H * len(sides)
        per_pair += sum(2 * base.numel() for base in (self.pre_base, self.post_base) if base is not None)
        folded = self.folds and self.backend != "eager"
        return {
            "projections": projections, "attention": 2 * D * (H + (H if folded else V)) * pairs,
            "dynamic weights": dynamic, "composition": per_pair * (T * D if folded else pairs),
        }  # fmt: skip

    def qk_circuit(self, part: str = "full") -> Factors:
        """As `Mechanism.qk_circuit`, of all heads of the scores, before the composition."""
        rows = self._part_rows(part)
        wq, wk = self.head_weights()
        return [(wq[h, rows], wk[h // self.heads.group_size, rows]) for h in range(self.score_heads)]

    def tensor_splits(self) -> dict[str, Any]:
        """Everything by composition group."""
        sides = {f"{side}.{name}": kind for side in ("q_dyn", "k_dyn") for name, kind in DYNAMIC_SPLITS.items()}
        return {
            "q_proj": "heads", "k_proj": "groups", "v_proj": "groups", "o_proj": "columns", "q_norm": "shared",
            "k_norm": "shared", "pre_base": 0, "post_base": 0, **sides,
        }  # fmt: skip

    def tensor_obstacle(self, parts: int) -> str | None:
        """As the base's; ranks take whole composition groups."""
        if self.head_groups % parts:
            return (
                f"head_groups must be a multiple of the ranks, since a group's heads are mixed, got {self.head_groups}"
            )
        return super().tensor_obstacle(parts)

    def take_heads(self, group: Any) -> None:
        """As the base's, and the composition groups of a rank."""
        super().take_heads(group)
        self.head_groups //= group.size
        for side in (self.q_dyn, self.k_dyn):
            if side is not None:
                side.sizes = (self.head_groups, *side.sizes[1:])

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the value halves down to these places of heads and of value heads; queries and keys stay."""
        keep_rows(self.v_proj, groups, self.head_dim)
        keep_columns(self.o_proj, heads, self.head_dim)


def _packed(stages: list[DynamicProjection]) -> Tensor:
    """What belongs to keys as one tensor (B, S, 1, P N (2 R + 1) M) for the cache."""
    return torch.stack([torch.cat([u, v, g[..., None, :]], -2) for u, v, g in stages], 2).flatten(2)[:, :, None]
