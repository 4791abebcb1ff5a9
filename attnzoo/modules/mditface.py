"""Attention with a static context, whose keys and values are computed once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import StaticContextCache
from attnzoo.masks import AttentionMask, Visibility, as_mask, broadcasts
from attnzoo.modules.call import Call, Mask, Positions, token_positions
from attnzoo.modules.checks import check_input
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import keep_columns, keep_rows
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, RotaryTable, rotary_table
from attnzoo.rules import check_options, describe, is_integer

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


class StaticContextAttention(GroupedQueryAttention):
    """Attention of dynamic and static tokens, of which the static ones see only each other.

    The decoupled attention of MDiTFace (Cao et al. 2025, arXiv:2511.12631), in this project's reading. With x dynamic
    and c static tokens, each projected by weights of their own unless separate_static=False:

        o_d = softmax(scale qd [ks ; kd]^T) [vs ; vd]       with causal=True a dynamic token sees no later dynamic one
        o_s = softmax(scale qs ks^T) vs                     always bidirectional

    Nothing dynamic reaches a static token, so a cache of ks and vs gives what computing them again gives, as long as
    the network around it lets nothing else through (`docs/mditface.md` lists the conditions). causal=True is the prefix
    form: a static prefix that is read in both directions, then tokens one after the other. Without static tokens it is
    grouped-query attention.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        separate_static: whether static tokens have projections and norms of their own.
        causal: no dynamic query sees a later dynamic key.
        bias: whether the projections have one.
        qk_norm: as in `GroupedQueryAttention`.
        qk_norm_eps: added to the mean square.
        rope: rotary position embedding, or None.
        scale: factor of the scores. Default: D ** -0.5.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    takes_bias = False
    cache_type = StaticContextCache
    shown = ("separate_static", "rope", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        separate_static: bool = True,
        causal: bool = False,
        bias: bool = False,
        qk_norm: bool | str = False,
        qk_norm_eps: float | None = 1e-6,
        rope: Rotary | None = None,
        scale: float | None = None,
        dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, bias=bias, qk_norm=qk_norm, qk_norm_eps=qk_norm_eps,
            rope=rope, scale=scale, causal=causal, dropout=dropout, init_std=init_std, backend=backend, device=device,
            dtype=dtype,
        )  # fmt: skip
        check_options(separate_static=separate_static)
        self.separate_static = separate_static
        for name in PARTS if separate_static else ():
            part = getattr(self, name)
            setattr(self, f"static_{name}", copy.deepcopy(part))
        self.reset_parameters()

    @classmethod
    def from_joint(cls, module: GroupedQueryAttention, separate_static: bool = True) -> StaticContextAttention:
        """A module that was used on both kinds of tokens together: its weights for both, the start of fine-tuning.

        Raises:
            ValueError: for a module with options that this one lacks, or with pruned heads.
        """
        lacking = ("sliding_window", "logit_softcap", "alibi_slopes", "sink", "pruned_heads")
        plain = type(module).forward is GroupedQueryAttention.forward and not any(getattr(module, o) for o in lacking)
        one_width = plain and module.kdim == module.vdim == module.embed_dim and module.v_head_dim == module.head_dim
        biases = {layer.bias is None for layer in (module.q_proj, module.o_proj)} if plain else set()
        if not (one_width and len(biases) == 1):
            raise ValueError(
                "module must be grouped-query attention with one width, all biases or none, and without "
                f"{', '.join(lacking)}, got {module!r}"
            )
        like, norm = module.q_proj.weight, module.q_norm
        made = cls(
            module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim, separate_static=separate_static,
            causal=module.causal, bias=biases == {False}, qk_norm=module.qk_norm,
            qk_norm_eps=1e-6 if norm is None else norm.eps, rope=module.rope, scale=module.scale,
            dropout=module.dropout, init_std=module.init_std, backend=module.backend, device=like.device,
            dtype=like.dtype,
        )  # fmt: skip
        state = module.state_dict()
        made.load_state_dict(state | ({f"static_{k}": v for k, v in state.items()} if separate_static else {}))
        return made.train(module.training)

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise as the base does, static projections too."""
        super().reset_parameters(std, out_std)
        out = self._modules.get("static_o_proj")
        if isinstance(out, nn.Linear) and out_std is not None:
            nn.init.normal_(out.weight, std=out_std)

    sequence_reason = "its static tokens are no part of one sequence"

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, *, num_static: int = 0, mask: Mask = None,
        positions: Positions = None, cache: StaticContextCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Three forms: joint (num_static), with a context, and later steps over a cache.

        Args:
            x: joint: (B, T + S, E), the last num_static = S tokens static, gives (B, T + S, E) and fills the cache if
                one is given; T may be 0. Otherwise dynamic tokens alone, (B, T, E) -> (B, T, E).
            context: (B, S, E) static tokens; gives the joint form's dynamic rows.
            num_static: S of the joint form.
            mask: boolean, broadcastable to (B, H, T + S, T + S) in the joint order, or to (B, H, T, T + S) where x has
                dynamic tokens alone; True = may attend. Without static tokens an AttentionMask will do.
            positions: (T + S,) or (B, T + S) integers in the joint order; a pair (dynamic, static) with a context;
                (T,) or (B, T) in later steps. Default: static 0 .. S-1; dynamic 0 .. T-1, in the prefix form
                S .. S+T-1.
            cache: from `init_cache`. In the prefix form it grows by the dynamic tokens, otherwise each call is a step
                of its own over the same static tokens.

        Raises:
            ValueError: for arguments that do not fit each other.
        """
        check_input("x", x, self.embed_dim, self.q_proj)
        if not is_integer(num_static) or not 0 <= num_static <= x.shape[1]:
            raise ValueError(f"num_static must lie between 0 and the {x.shape[1]} tokens of x, got {num_static}")
        if context is not None and (num_static or cache is not None):
            raise ValueError(
                f"context needs num_static=0 and no cache, which have static tokens, got {describe(context)}"
            )
        held = 0 if cache is None else self._held(cache, num_static)
        if not (num_static or held) and context is None:
            if cache is not None and not self.causal:
                raise ValueError("cache must hold static tokens: fill it by a call with num_static, got an empty one")
            return super().forward(x, mask=mask, positions=positions, cache=cache)  # type: ignore[arg-type]
        if context is not None:
            check_input("context", context, self.embed_dim, self.q_proj)
            if context.shape[0] != x.shape[0]:
                raise ValueError(f"context must have the batch of x, got {context.shape[0]} and {x.shape[0]}")
        T = x.shape[1] - num_static
        dynamic, static = (x, context) if num_static == 0 else (x[:, :T], x[:, T:])
        S = held if static is None else static.shape[1]
        past = cache.length - S if held and self.causal and cache is not None else 0
        length = past + T + S if cache is None else cache.max_length
        at, static_at = self._places(positions, x, context, T, S, past)
        q, k, v = self._projected("", dynamic, at, length)
        states: tuple[Tensor, ...] = (k, v) if self.causal else ()
        if static is not None:
            qs, ks, vs = self._projected("static_", static, static_at, length)
            states = (torch.cat([ks, k], 1), torch.cat([vs, v], 1)) if self.causal else (ks, vs)
        visible = _visible(mask, (x.shape[0], self.num_heads, x.shape[1], past + T + S), S)
        view = Visibility(self.causal, mask=_part_of(visible, slice(T)), query_start=past + S if self.causal else None)
        with Call((x, x), view, cache=cache if states else None).remember(*states) as known:
            if not states:
                assert cache is not None
                known = _static_states(cache, k)
            keys, values = known if self.causal else (torch.cat([a, b], 1) for a, b in zip(known, (k, v), strict=True))
            y: Tensor = self.o_proj(self._attend(q, keys, values, view))
            if num_static:
                alone = Visibility(False, mask=_part_of(visible, slice(T, None), slice(S)))
                y = torch.cat([y, self._part("static_o_proj")(self._attend(qs, ks, vs, alone))], dim=1)
        if cache is not None and num_static:
            cache.num_static = S
        return y

    def _part(self, name: str) -> Any:
        """A projection or norm; that of dynamic tokens for both where they are shared."""
        return getattr(self, name if self.separate_static else name.removeprefix("static_"))

    def _projected(self, kind: str, x: Tensor, positions: Tensor, length: int) -> tuple[Tensor, ...]:
        """Queries (B, L, H, D), keys and values (B, L, G, D) of dynamic or of "static_" tokens, normed and rotated."""
        q, k, v = (self._part(f"{kind}{name}_proj")(x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        table = None
        if self.rope is not None:
            place: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
            cos, sin = rotary_table(self.rope, self.rope_dim, positions, length=length, **place)
            table = RotaryTable(cos, sin, self.rope.style)
        q = qk_norm_rope(q, table, norm=self._part(f"{kind}q_norm"), backend=self.backend)
        return q, qk_norm_rope(k, table, norm=self._part(f"{kind}k_norm"), backend=self.backend), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        k, v = self.heads.spread(k, v)
        return softmax_attention(q, k, v, view, **self.score_options(q.device)).flatten(2)

    def _held(self, cache: StaticContextCache, num_static: int) -> int:
        """Static tokens of a cache that fits."""
        if not isinstance(cache, StaticContextCache) or cache.layout != self.cache_layout():
            raise ValueError(f"cache must come from this module's init_cache, got {getattr(cache, 'layout', cache)}")
        if num_static and cache.length:
            raise ValueError(f"cache holds {cache.length} tokens already: reset() it before a call with num_static")
        return cache.num_static

    def _places(
        self, positions: Positions, x: Tensor, context: Tensor | None, T: int, S: int, past: int
    ) -> list[Tensor]:
        """Positions of dynamic and of static tokens."""
        if positions is not None and context is not None:
            return list(token_positions(x, context, positions, None, cross=True))
        if positions is not None:
            return list(token_positions(x, x, positions, None, cross=False)[0].split([T, x.shape[1] - T], dim=-1))
        first = past + S if self.causal else 0
        return [torch.arange(first, first + T, device=x.device), torch.arange(S, device=x.device)]

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads, static ones too."""
        super().keep_heads(heads, groups)
        for name, places in (("q", heads), ("k", groups), ("v", groups)) if self.separate_static else ():
            keep_rows(self._part(f"static_{name}_proj"), places, self.head_dim)
        if self.separate_static:
            keep_columns(self._part("static_o_proj"), heads, self.head_dim)


def _static_states(cache: StaticContextCache, k: Tensor) -> tuple[Tensor, ...]:
    """Keys and values (B, S, G, D) of a cache's static tokens; refuses keys k of another batch, dtype or device."""
    own = cache.buffers[0]
    if (k.shape[0], k.dtype, k.device) != (cache.batch_size, own.dtype, own.device):
        raise ValueError(
            f"cache was made for states of {cache.batch_size} sequences in {own.dtype} on {own.device}, got "
            f"{k.shape[0]} in {k.dtype} on {k.device}"
        )
    return tuple(buffer[:, :, : cache.num_static].transpose(1, 2) for buffer in cache.buffers)


def _visible(mask: Mask, shape: tuple[int, int, int, int], S: int) -> Tensor | None:
    """A mask with keys [dynamic | static] as a tensor with rows of its own and keys [static | dynamic]."""
    mask = as_mask(mask)
    if mask is None:
        return None
    if mask.dense_mask is None or mask.lengths is not None or mask.cu_seqlens is not None:
        raise ValueError("mask must be a boolean tensor where there are static tokens, got one of lengths or documents")
    if not broadcasts(mask.dense_mask, shape):
        raise ValueError(f"mask must broadcast to (B, H, T, S) = {shape}, got shape {tuple(mask.dense_mask.shape)}")
    dense = torch.atleast_2d(mask.dense_mask)
    dense = dense.expand(*dense.shape[:-2], *shape[2:])
    return torch.cat([dense[..., -S:], dense[..., :-S]], dim=-1)


def _part_of(visible: Tensor | None, rows: slice, keys: slice = slice(None)) -> AttentionMask | None:
    return None if visible is None else AttentionMask.dense(visible[..., rows, keys])
