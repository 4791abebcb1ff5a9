"""Knocking-heads attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.cache import TokenCache, UntiedCache
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.gta import GroupedTiedAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.ops.head_mixing import compose_projection
from attnzoo.ops.qk_norm_rope import head_prologue
from attnzoo.rotary import Rotary

VARIANTS: dict[str, tuple[str | None, str | None, str | None]] = {
    "mlp": (None, None, "mlp"),
    "linear": ("linear", "linear", "linear"),
    "linear_v": (None, None, "linear"),
    "mlp_qkv": ("mlp", "mlp", "mlp"),
}
"""The paper's configurations: the kind of map on queries, keys and values."""


class HeadMap(nn.Module):
    """One matrix (D, D) that every head passes through; the identity, or zero, at the start.

    Deliberately no nn.Linear: a pass that re-initialises a model's linear layers must leave it alone, since
    a random start loses most of what the mechanism gains (the paper's ablation).
    """

    def __init__(self, width: int, start: float = 1.0, **made: Any) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(width, width, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`start` times the identity."""
        nn.init.eye_(self.weight)
        with torch.no_grad():
            self.weight.mul_(self.start)

    def forward(self, z: Tensor, backend: str = "auto") -> Tensor:
        """z (..., D) -> (..., D); (B, T, N, D) for backend "triton"."""
        return head_prologue(z, linear=self.weight, backend=backend)


class GatedHeadMap(nn.Module):
    """The gated network of equation 9, hidden width D: the identity at the start."""

    def __init__(self, width: int, **made: Any) -> None:
        super().__init__()
        self.up_proj = HeadMap(width, **made)
        self.gate_proj = HeadMap(width, 0.0, **made)
        self.down_proj = HeadMap(width, **made)

    def reset_parameters(self) -> None:
        """Identity, zero, identity."""
        for part in (self.up_proj, self.gate_proj, self.down_proj):
            part.reset_parameters()

    def forward(self, z: Tensor, backend: str = "auto") -> Tensor:
        """z (..., D) -> (..., D); (B, T, N, D) for backend "triton"."""
        mlp = self.up_proj.weight, self.gate_proj.weight, self.down_proj.weight
        return head_prologue(z, mlp=mlp, backend=backend)


class KnockingHeadsAttention(nn.Module):
    """Knocking-heads attention (Zhou et al. 2025, arXiv:2510.23052).

    After its own projection every head's query, key or value passes through one map that all heads of its
    kind share, then through norm, rotation and attention as in the base mechanism:

        linear:  z <- z W^T                                            (equation 5)
        mlp:     z <- 2 ((z Wup^T) * sigmoid(z Wgate^T)) Wdown^T       (equation 9; hidden width = head width)

    Maps start as the identity, so the module equals its base at first, output and base gradients alike. A
    linear map folds away after training (`fold`); the mlp adds capacity.

    On base "gta" the map acts on the tied state before it serves as key and value (knock_scope="tied", the
    cache stays that of grouped-tied attention), or on the value alone ("value", G (D + Dn) + Dr numbers a
    token). The paper leaves open which.

    On base "mla" maps are linear and act on the expanded, non-rotary queries and keys and on the values: the reading
    that keeps the absorbed form exact and the rotary key shared.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        base: "gqa", "gta" or "mla".
        variant: "mlp" (values only; the default where no kind is given), "linear" (queries, keys, values; the default
            of base "mla"), "linear_v" or "mlp_qkv".
        knock_q: instead of a variant, the kind of map on queries: None, "linear" or "mlp".
        knock_k: on keys.
        knock_v: on values.
        knock_scope: for base "gta", "tied" or "value".
        rope_head_dim: for base "gta", see `GroupedTiedAttention`.
        k_rope_bias: for base "gta".
        kv_lora_rank: for base "mla", see `MultiHeadLatentAttention`, as the next three.
        q_lora_rank: see there.
        qk_nope_head_dim: see there; in place of head_dim.
        qk_rope_head_dim: see there.
        v_head_dim: this and every following argument as in `GroupedQueryAttention`; base "gta" takes those
            that `GroupedTiedAttention` has, base "mla" those of `MultiHeadLatentAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    q_knock: HeadMap | GatedHeadMap | None
    k_knock: HeadMap | GatedHeadMap | None
    v_knock: HeadMap | GatedHeadMap | None
    # What the base's class brings in the subclasses below:
    _base: type[GroupedQueryAttention] | type[GroupedTiedAttention] | type[MultiHeadLatentAttention]
    _folded_projections: Callable[[], dict[str, dict[str, Tensor]]]
    embed_dim: int
    head_dim: int
    v_head_dim: int
    pruned_heads: tuple[int, ...]
    o_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        base: str = "gqa",
        variant: str | None = "auto",
        knock_q: str | None = None,
        knock_k: str | None = None,
        knock_v: str | None = None,
        knock_scope: str = "tied",
        rope_head_dim: int | None = None,
        k_rope_bias: bool | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        logit_softcap: float | None = None,
        alibi: bool = False,
        sliding_window: int | None = None,
        sink_tokens: int = 0,
        sink: str | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        init: str = "normal",
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if base not in _BASES:
            raise ValueError(f"base must be one of {', '.join(map(repr, _BASES))}, got {base!r}")
        if type(self) is KnockingHeadsAttention:
            # Here rather than in __new__, which would hide these arguments from inspect and from config parsers.
            self.__class__ = _BASES[base]
        kinds = _kinds(variant, (knock_q, knock_k, knock_v), base)
        if knock_scope not in ("tied", "value"):
            raise ValueError(f"knock_scope must be 'tied' or 'value', got {knock_scope!r}")
        given: dict[str, Any] = {
            "v_head_dim": v_head_dim, "kdim": kdim, "vdim": vdim, "bias": bias, "o_bias": o_bias, "qk_norm": qk_norm,
            "qk_norm_eps": qk_norm_eps, "rope": rope, "scale": scale, "logit_softcap": logit_softcap, "alibi": alibi,
            "sliding_window": sliding_window, "sink_tokens": sink_tokens, "sink": sink, "causal": causal,
            "dropout": dropout, "init": init, "init_std": init_std, "backend": backend, "device": device,
            "dtype": dtype, "rope_head_dim": rope_head_dim, "k_rope_bias": k_rope_bias, "kv_lora_rank": kv_lora_rank,
            "q_lora_rank": q_lora_rank, "qk_nope_head_dim": qk_nope_head_dim, "qk_rope_head_dim": qk_rope_head_dim,
        }  # fmt: skip
        if base != "gta":
            _refuse_foreign(base, {"knock_scope": knock_scope}, {"knock_scope": "tied"})
        sizes: tuple[Any, ...] = (embed_dim, num_heads)
        if base == "mla":
            _refuse_foreign(base, {"head_dim": head_dim}, {})
            given["num_kv_heads"] = num_kv_heads
        else:
            sizes = (*sizes, num_kv_heads, head_dim)
        options = _options_of(base, self._base, given)
        super().__init__(*sizes, **options)
        self._base_arguments = (sizes, options)
        self.knock_scope = knock_scope
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.qk_nope_head_dim if isinstance(self, MultiHeadLatentAttention) else self.head_dim
        widths = (width, width, self.v_head_dim)
        for name, kind, width in zip(("q_knock", "k_knock", "v_knock"), kinds, widths, strict=True):
            shared: nn.Module | None = None
            if kind is not None:
                shared = HeadMap(width, **made) if kind == "linear" else GatedHeadMap(width, **made)
            setattr(self, name, shared)

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise the base's parameters; the shared maps become the identity whatever std is."""
        super().reset_parameters(std, out_std)  # type: ignore[misc]
        for child in self.children():
            if isinstance(child, HeadMap | GatedHeadMap):
                child.reset_parameters()

    def knock_parameters(self) -> list[nn.Parameter]:
        """The shared maps' weights, for an optimiser group of their own: decay pulls them to 0, not to 1."""
        maps = (self.q_knock, self.k_knock, self.v_knock)
        return [parameter for m in maps if m is not None for parameter in m.parameters()]

    def _get_name(self) -> str:
        return "KnockingHeadsAttention"

    def fold(self) -> GroupedQueryAttention | GroupedTiedAttention | MultiHeadLatentAttention:
        """An equal module without the maps: exact, since norm and rotation come after them.

        Maps are multiplied into the projection before them, or with knock_scope="value" into the output's.

        Raises:
            ValueError: if a map is of kind "mlp".
        """
        projections = self._folded_projections()
        sizes, options = self._base_arguments
        base = self._base(*sizes, **options)
        base.prune_heads(self.pruned_heads)
        state = {name: value for name, value in self.state_dict().items() if "_knock." not in name}
        for layer, values in projections.items():
            state |= {f"{layer}.{name}": value.detach() for name, value in values.items()}
        weight = self.o_proj.weight
        base.to(device=weight.device, dtype=weight.dtype).load_state_dict(state)
        return base.train(self.training)


Kinds = tuple[str | None, str | None, str | None]


def _kinds(variant: str | None, explicit: Kinds, base: str) -> Kinds:
    """Kind of map on q, k, v from the variant, or from the explicit kinds."""
    kinds = _chosen_kinds(variant, explicit, "linear" if base == "mla" else "mlp")
    if base == "gta" and (kinds[0] is not None or kinds[1] is not None):
        raise ValueError(f"knock_q and knock_k must be None with base 'gta', got {kinds[:2]}")
    if base == "mla" and "mlp" in kinds:
        raise ValueError(f"kinds must be linear with base 'mla', which never makes queries and keys, got {kinds}")
    return kinds


def _chosen_kinds(variant: str | None, explicit: Kinds, default: str) -> Kinds:
    for name, kind in zip(("knock_q", "knock_k", "knock_v"), explicit, strict=True):
        if kind not in (None, "linear", "mlp"):
            raise ValueError(f"{name} must be None, 'linear' or 'mlp', got {kind!r}")
    given = any(kind is not None for kind in explicit)
    if variant == "auto":
        variant = None if given else default
    if variant is None:
        if not given:
            raise ValueError("knock_q, knock_k or knock_v must be given when variant is None, got none of them")
        return explicit
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    kinds = VARIANTS[variant]
    if given and explicit != kinds:
        raise ValueError(f"variant {variant!r} means (knock_q, knock_k, knock_v) = {kinds}, got {explicit} beside it")
    return kinds


def _refuse_foreign(base: str, values: dict[str, Any], defaults: dict[str, Any]) -> None:
    for name, value in values.items():
        if value != defaults.get(name):
            raise ValueError(f"{name} is no option of base {base!r}, got {value!r}")


def _options_of(base: str, kind: type[nn.Module], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that the base's constructor has; refuses others that are not at their defaults."""
    own = inspect.signature(kind).parameters
    ours = inspect.signature(KnockingHeadsAttention).parameters
    foreign = {name: value for name, value in given.items() if name not in own}
    _refuse_foreign(base, foreign, {name: ours[name].default for name in foreign})
    return {name: value for name, value in given.items() if name in own}


def _map_after(
    projection: nn.Linear, head_map: HeadMap | GatedHeadMap | None, source: Tensor, width: int, backend: str
) -> Tensor:
    """Heads (B, T, N, width) of source (B, T, E): projected, then mapped.

    Two linear maps in a row are multiplied first where that is cheaper, which it is from B T > E on. It also
    stores nothing more for the backward pass than the projection alone. A projection that somebody replaced
    (a low-rank adapter, a quantised layer) is called as it is.
    """
    B, T, E = source.shape
    if isinstance(head_map, HeadMap) and type(projection) is nn.Linear and B * T > E:
        weight, bias = compose_projection(projection.weight, projection.bias, head_map.weight)
        return F.linear(source, weight, bias).view(B, T, -1, width)
    z: Tensor = projection(source).view(B, T, projection.out_features // width, width)
    return z if head_map is None else head_map(z, backend)


def _folded(linear: nn.Linear, head_map: nn.Module | None) -> dict[str, Tensor]:
    """State of a projection with the linear head map multiplied in."""
    if head_map is None:
        return dict(linear.state_dict())
    if not isinstance(head_map, HeadMap):
        raise ValueError("fold is exact for linear maps only, got kind 'mlp'")
    weight, bias = compose_projection(linear.weight, linear.bias, head_map.weight)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _linear_flops(module: nn.Module | None, width: int) -> int:
    """Forward FLOPs of one head vector through its map."""
    if module is None:
        return 0
    return 2 * width * width * (1 if isinstance(module, HeadMap) else 3)


class _KnockingGrouped(KnockingHeadsAttention, GroupedQueryAttention):
    """Knocking heads over the grouped-query family."""

    _base = GroupedQueryAttention

    def project(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values after the shared maps, before norm and rotation."""
        key, value = self.sources(x, context)
        return (
            _map_after(self.q_proj, self.q_knock, x, self.head_dim, self.backend),
            _map_after(self.k_proj, self.k_knock, key, self.head_dim, self.backend),
            _map_after(self.v_proj, self.v_knock, value, self.v_head_dim, self.backend),
        )

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, with linear maps multiplied in; an mlp on queries or keys is left out."""
        wq, wk = super().head_weights()
        if isinstance(self.q_knock, HeadMap):
            wq = self.q_knock.weight.detach() @ wq
        if isinstance(self.k_knock, HeadMap):
            wk = self.k_knock.weight.detach() @ wk
        return wq, wk

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every projected head through its map."""
        keys = T if self.causal or S is None else S
        q = T * self.num_heads * _linear_flops(self.q_knock, self.head_dim)
        k = keys * self.num_kv_heads * _linear_flops(self.k_knock, self.head_dim)
        v = keys * self.num_kv_heads * _linear_flops(self.v_knock, self.v_head_dim)
        return {**super().flops_by_part(T, S), "head maps": q + k + v}

    def _folded_projections(self) -> dict[str, dict[str, Tensor]]:
        return {
            "q_proj": _folded(self.q_proj, self.q_knock),
            "k_proj": _folded(self.k_proj, self.k_knock),
            "v_proj": _folded(self.v_proj, self.v_knock),
        }


class _KnockingTied(KnockingHeadsAttention, GroupedTiedAttention):
    """Knocking heads over grouped-tied attention: a map on the tied state or on its use as value."""

    _base = GroupedTiedAttention

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the base's; the value, and with scope "tied" the key with it, after the shared map."""
        source = self.source(x, context)
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        if self.knock_scope == "tied":
            v = k = _map_after(self.kv_proj, self.v_knock, source, self.head_dim, self.backend)
        else:
            k = self.kv_proj(source).view(*source.shape[:2], self.num_kv_heads, self.head_dim)
            v = k if self.v_knock is None else self.v_knock(k, self.backend)
        return q, k[..., : self.nope_head_dim], v, self.rotary_key(source)

    @property
    def cache_type(self) -> type[TokenCache]:
        """That of the base; with scope "value" the one that holds key and value apart."""
        return UntiedCache if self.knock_scope == "value" else super().cache_type

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TokenCache:
        """The base's cache; with scope "value" one that holds key and value apart."""
        if self.knock_scope == "tied":
            return super().init_cache(batch_size, max_length, device, dtype)
        weight = self.q_proj.weight
        return UntiedCache(
            batch_size,
            max_length,
            (
                (self.num_kv_heads, self.nope_head_dim),
                (self.num_kv_heads, self.head_dim),
                (1, self.rope_head_dim),
            ),
            window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """G D + Dr numbers of that dtype, or G (D + Dn) + Dr with scope "value"."""
        untied = self.num_kv_heads * self.nope_head_dim if self.knock_scope == "value" else 0
        return super().cache_bytes_per_token(dtype) + untied * dtype.itemsize

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, with a linear map on the tied state multiplied in; an mlp is left out."""
        wq, wkv = super().head_weights()
        if self.knock_scope == "tied" and isinstance(self.v_knock, HeadMap):
            wkv = self.v_knock.weight.detach() @ wkv
        return wq, wkv

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every tied head through the map."""
        keys = T if self.causal or S is None else S
        maps = keys * self.num_kv_heads * _linear_flops(self.v_knock, self.head_dim)
        return {**super().flops_by_part(T, S), "head maps": maps}

    def _folded_projections(self) -> dict[str, dict[str, Tensor]]:
        if self.knock_scope == "tied":
            return {"kv_proj": _folded(self.kv_proj, self.v_knock)}
        if not isinstance(self.v_knock, HeadMap):
            raise ValueError("fold is exact for linear maps only, got kind 'mlp'")
        blocks = rearrange(self.o_proj.weight, "e (h d) -> e h d", d=self.head_dim)
        return {"o_proj": {**self.o_proj.state_dict(), "weight": (blocks @ self.v_knock.weight).flatten(1)}}


class _KnockingLatent(KnockingHeadsAttention, MultiHeadLatentAttention):
    """Knocking heads over latent attention: linear maps behind the expansion, which folds into the absorbed form."""

    _base = MultiHeadLatentAttention

    def queries(self, x: Tensor) -> Tensor:
        """As the base's, the non-rotary features after the shared map."""
        q = super().queries(x)
        if self.q_knock is None:
            return q
        width = self.qk_nope_head_dim
        return torch.cat([self.q_knock(q[..., :width], self.backend), q[..., width:]], dim=-1)

    def expand(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """As the base's, after the shared maps."""
        k, v = super().expand(c)
        k = k if self.k_knock is None else self.k_knock(k, self.backend)
        return k, v if self.v_knock is None else self.v_knock(v, self.backend)

    def expansion(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """As the base's, with the maps multiplied in."""
        key, value, bias = super().expansion()
        if isinstance(self.k_knock, HeadMap):
            key = self.k_knock.weight @ key
        if isinstance(self.v_knock, HeadMap):
            value = self.v_knock.weight @ value
            bias = None if bias is None else self.v_knock(bias)
        return key, value, bias

    def query_weights(self) -> Tensor:
        """As the base's, with the map multiplied in."""
        weight, width = super().query_weights(), self.qk_nope_head_dim
        if not isinstance(self.q_knock, HeadMap):
            return weight
        return torch.cat([self.q_knock.weight.detach() @ weight[:, :width], weight[:, width:]], dim=1)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As the base's, and every expanded head through its map."""
        keys = T if S is None else S
        q = T * self.num_heads * _linear_flops(self.q_knock, self.qk_nope_head_dim)
        k = keys * self.num_kv_heads * _linear_flops(self.k_knock, self.qk_nope_head_dim)
        v = keys * self.num_kv_heads * _linear_flops(self.v_knock, self.v_head_dim)
        return {**super().flops_by_part(T, S), "head maps": q + k + v}

    def _folded_projections(self) -> dict[str, dict[str, Tensor]]:
        key, value, _ = self.expansion()
        folded = {"kv_b_proj": {"weight": torch.cat([key, value], dim=1).flatten(0, 1)}}
        query = self.q_proj if self.q_lora_rank is None else self.q_b_proj
        width = self.qk_nope_head_dim

        def mapped(rows: Tensor) -> Tensor:
            """Rows (H (dn + dr), ...) with the first dn of each head after the map."""
            heads = rows.view(self.num_heads, self.head_dim, -1)
            if not isinstance(self.q_knock, HeadMap):
                return rows
            return torch.cat([self.q_knock.weight @ heads[:, :width], heads[:, width:]], 1).flatten(0, 1)

        folded["q_proj" if self.q_lora_rank is None else "q_b_proj"] = {
            name: mapped(rows).view(rows.shape) for name, rows in query.state_dict().items()
        }
        return folded


_BASES: dict[str, type[KnockingHeadsAttention]] = {
    "gqa": _KnockingGrouped,
    "gta": _KnockingTied,
    "mla": _KnockingLatent,
}
