"""Knocking-heads attention over the grouped-query family, and what its other bases share with it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Mechanism, per_head
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.ops.head_mixing import GatedHeadMap, HeadMap, compose_projection, head_map
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import is_plain
from attnzoo.rules import check, one_of
from attnzoo.tracing import is_exporting

Map = HeadMap | GatedHeadMap | None
Base = TypeVar("Base", bound=Mechanism)
VARIANTS: dict[str, tuple[str | None, str | None, str | None]] = {
    "mlp": (None, None, "mlp"),
    "linear": ("linear", "linear", "linear"),
    "linear_v": (None, None, "linear"),
    "mlp_qkv": ("mlp", "mlp", "mlp"),
}
"""The paper's configurations: the kind of map on queries, keys and values."""


class KnockingHeads(Mechanism):
    """What knocking heads have on every base: maps `q_knock`, `k_knock` and `v_knock`, which may be None."""

    q_knock: Map
    k_knock: Map
    v_knock: Map
    knock_init = "identity"
    _base_arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise the base's parameters; the shared maps start as `knock_init` says, whatever std is."""
        super().reset_parameters(std, out_std)
        for child in self.children():
            if isinstance(child, HeadMap | GatedHeadMap):
                child.reset_parameters()
                for weight in child.parameters() if self.knock_init == "normal" else ():
                    nn.init.normal_(weight, std=len(weight) ** -0.5)

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's; the maps are of all heads."""
        return {**super().tensor_splits(), "q_knock": "shared", "k_knock": "shared", "v_knock": "shared"}

    def knock_parameters(self) -> list[nn.Parameter]:
        """The shared maps' weights, for an optimiser group of their own: decay pulls them to 0, not to 1."""
        maps = (self.q_knock, self.k_knock, self.v_knock)
        return [parameter for m in maps if m is not None for parameter in m.parameters()]

    def folded_into(self, base_class: type[Base], projections: dict[str, dict[str, Tensor]]) -> Base:
        """A new module of the base's class with this module's state and these projections in place of its own.

        It also runs as this module does now, whatever the constructor was told.
        """
        (sizes, options), weight = self._base_arguments, self.o_proj.weight
        # Where the weights are now, which the constructor's device need not be.
        base = base_class(*sizes, **options | {"device": weight.device, "dtype": weight.dtype})
        base.prune_heads(self.pruned_heads)
        state = {name: value for name, value in self.state_dict().items() if "_knock." not in name}
        for layer, values in projections.items():
            state |= {f"{layer}.{name}": value.detach() for name, value in values.items()}
        base.load_state_dict(state)
        for name in {"dropout", "backend", "absorb", "depth"} & vars(self).keys():
            setattr(base, name, getattr(self, name))
        return base.train(self.training)


class KnockingHeadsAttention(KnockingHeads, GroupedQueryAttention):
    """Knocking-heads attention (Zhou et al. 2025, arXiv:2510.23052).

    After its own projection every head's query, key or value passes through one map that all heads of its
    kind share, then through norm, rotation and attention as in grouped-query attention:

        linear:  z <- z W^T                                            (equation 5)
        mlp:     z <- 2 ((z Wup^T) * sigmoid(z Wgate^T)) Wdown^T       (equation 9; hidden width = head width)

    Maps start as the identity, so the module equals its base at first, output and base gradients alike. A
    linear map folds away after training (`fold`); the mlp adds capacity. `KnockingHeadsTiedAttention` and
    `KnockingHeadsLatentAttention` are the same over other bases.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        variant: "mlp" (values only; the default where no kind is given), "linear" (queries, keys, values),
            "linear_v" or "mlp_qkv".
        knock_q: instead of a variant, the kind of map on queries: None, "linear" or "mlp".
        knock_k: on keys.
        knock_v: on values.
        knock_init: "identity", or for ablations "normal" with standard deviation 1 / sqrt(D).
        options: the keyword options of `GroupedQueryAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        variant: str | None = "auto",
        knock_q: str | None = None,
        knock_k: str | None = None,
        knock_v: str | None = None,
        knock_init: str = "identity",
        **options: Any,
    ) -> None:  # fmt: skip
        check("knock_init", knock_init, one_of("identity", "normal"))
        kinds = knock_kinds(variant, (knock_q, knock_k, knock_v), "mlp")
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, **options)
        self._base_arguments = ((embed_dim, num_heads, num_kv_heads, head_dim), options)
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        for name, kind, width in zip(("q_knock", "k_knock", "v_knock"), kinds, widths, strict=True):
            setattr(self, name, head_map(kind, width, device=options.get("device"), dtype=options.get("dtype")))
        self.knock_init = knock_init
        if knock_init == "normal":
            self.reset_parameters()

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        q_map, k_map, v_map = self.remaining_maps(x, *call.sources)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, head_map=q_map, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, head_map=k_map, backend=self.backend)
        v = qk_norm_rope(v, head_map=v_map, backend=self.backend)
        with call.remember(k, v) as (k, v):
            k, v = self.heads.spread(k, v)
            out = softmax_attention(q, k, v, call.view, bias=call.bias, **self.score_options(q.device))
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def project(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as in the base, after those maps that `remaining_maps` does not name."""
        return (
            projected(self.q_proj, self.q_knock, x, self.head_dim),
            projected(self.k_proj, self.k_knock, key, self.head_dim),
            projected(self.v_proj, self.v_knock, value, self.v_head_dim),
        )

    def remaining_maps(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Map, Map, Map]:
        """The maps that `project` leaves to the pass over heads that norms and rotates them."""
        return (
            None if composes(self.q_proj, self.q_knock, x) else self.q_knock,
            None if composes(self.k_proj, self.k_knock, key) else self.k_knock,
            None if composes(self.v_proj, self.v_knock, value) else self.v_knock,
        )

    def fold(self) -> GroupedQueryAttention:
        """An equal module without the maps: exact, since norm and rotation come after them.

        Raises:
            ValueError: if a map is of kind "mlp".
        """
        q, k, v = (self.q_proj, self.q_knock), (self.k_proj, self.k_knock), (self.v_proj, self.v_knock)
        projections = {"q_proj": folded(*q), "k_proj": folded(*k), "v_proj": folded(*v)}
        return self.folded_into(GroupedQueryAttention, projections)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, with linear maps multiplied in; an mlp is left out."""
        q = per_head(self.q_proj, self.head_dim, self.q_norm, self.q_knock)
        return q, per_head(self.k_proj, self.head_dim, self.k_norm, self.k_knock)

    def value_weights(self) -> Tensor:
        """As the base's, with a linear map multiplied in; an mlp is left out."""
        return per_head(self.v_proj, self.v_head_dim, None, self.v_knock)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every projected head through its map."""
        keys = T if self.causal or S is None else S
        q = T * self.num_heads * map_flops(self.q_knock, self.head_dim)
        k = keys * self.num_kv_heads * map_flops(self.k_knock, self.head_dim)
        v = keys * self.num_kv_heads * map_flops(self.v_knock, self.v_head_dim)
        return {**super().flops_by_part(T, S), "head maps": q + k + v}


Kinds = tuple[str | None, str | None, str | None]


def knock_kinds(variant: str | None, explicit: Kinds, default: str) -> Kinds:
    """Kind of map on q, k, v from the variant, or from the explicit kinds; "auto" is `default` where none is given."""
    for name, kind in zip(("knock_q", "knock_k", "knock_v"), explicit, strict=True):
        if kind is not None:
            check(name, kind, one_of("linear", "mlp", words="be None, 'linear' or 'mlp'"))
    given = any(kind is not None for kind in explicit)
    if isinstance(variant, str) and variant == "auto":
        variant = None if given else default
    if variant is None:
        if not given:
            raise ValueError("knock_q, knock_k or knock_v must be given when variant is None, got none of them")
        return explicit
    check("variant", variant, one_of(*VARIANTS))
    kinds = VARIANTS[variant]
    if given and explicit != kinds:
        raise ValueError(f"variant {variant!r} means (knock_q, knock_k, knock_v) = {kinds}, got {explicit} beside it")
    return kinds


def composes(linear: nn.Module, head_map: Map, source: Tensor) -> bool:
    """Whether a map of source (B, T, E) is multiplied into the projection: exact, and cheaper from B T > E on.

    Both have to be plain: a projection with an adapter, a hook or quantised weights is called as it is.
    """
    # An exported program serves any B and T, so it must not ask for their product.
    many = is_exporting() or source.shape[0] * source.shape[1] > source.shape[2]
    return many and is_plain(head_map, HeadMap) and is_plain(linear)


def projected(linear: nn.Linear, head_map: Map, source: Tensor, width: int) -> Tensor:
    """Heads (B, T, N, width) of source (B, T, E), mapped where the map composes with the projection."""
    if isinstance(head_map, HeadMap) and composes(linear, head_map, source):
        z = F.linear(source, *compose_projection(linear.weight, linear.bias, head_map.weight))
    else:
        z = linear(source)
    return z.view(*source.shape[:2], z.shape[2] // width, width)


def folded(linear: nn.Linear, head_map: Map) -> dict[str, Tensor]:
    """State of a projection with the linear head map multiplied in."""
    if head_map is None:
        return dict(linear.state_dict())
    if not isinstance(head_map, HeadMap):
        raise ValueError("fold is exact for linear maps only, got kind 'mlp'")
    weight, bias = compose_projection(linear.weight, linear.bias, head_map.weight)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def map_flops(head_map: Map, width: int) -> int:
    """Forward FLOPs of one head's vector through its map."""
    matrices = 0 if head_map is None else 1 if isinstance(head_map, HeadMap) else 3
    return 2 * width * width * matrices
