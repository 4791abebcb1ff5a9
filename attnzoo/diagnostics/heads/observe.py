"""What every head of a model does in its forward passes: queries, keys, values, patterns and outputs.

Nothing in the model changes. Queries, keys and masks are read where they enter softmax attention, by
`attnzoo.ops.observation`, so patterns follow the module's own rules: rotation, windows, soft-caps, sinks, compositions
of heads. Patterns are computed from them on demand, block by block if wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import layers_of
from attnzoo.diagnostics.batches import uncompiled
from attnzoo.diagnostics.configs import RAGGED
from attnzoo.diagnostics.heads.attention_call import AttentionCall, pattern_of
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.observation import Observation, current_observer, observing
from attnzoo.ops.score_rules import ScoreRules

KINDS = ("queries", "keys", "values", "patterns", "outputs")
"""What `capture` can keep of a layer."""

_NAME = "attnzoo_observed"
_CONTEXTS = ("context", "key_value_states", "encoder_hidden_states")
"""Names by which attention modules are given other tokens for their keys."""


@contextmanager
def observe(
    model: nn.Module, visit: Callable[[AttentionCall], None], layers: Sequence[int] | None = None
) -> Iterator[list[AttentionLayer]]:
    """Call `visit` with each attention layer's `AttentionCall` during the forward passes inside the block.

    Only one layer's tensors are alive at a time unless the visitor keeps them. Yields the observed layers. Whatever
    implementation a Hugging Face model is set to, inside the block it uses scaled_dot_product_attention, or patterns
    where that lacks an option, and compiled modules run uncompiled.

    Args:
        model: any model that `attention_layers` understands.
        visit: called in the order of execution, once for each time a layer runs.
        layers: indices of the layers to observe. Default: all.

    Raises:
        ValueError: if no attention is found, an index does not exist, or a layer's outputs cannot be read.
    """
    chosen = _chosen(attention_layers(model), layers)
    observer = _Observer(visit)
    undo: list[Callable[[], None]] = []
    try:
        for layer in chosen:
            observer.attach(layer, undo)
        _set_implementation(model, chosen, undo)
        with observing(observer.show), uncompiled():
            yield chosen
    finally:
        for step in reversed(undo):
            step()


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """What was kept of one layer in one forward pass; shapes as in `AttentionCall`, patterns (B, H, T, S)."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    patterns: Tensor | None = None
    outputs: Tensor | None = None


class Captured:
    """Records of the forward passes inside a `capture` block.

    Attributes:
        layers: the observed layers.
        passes: one dict per forward pass, from layer index to `HeadRecord`.
    """

    def __init__(self, layers: Sequence[AttentionLayer], kinds: tuple[str, ...]) -> None:
        self.layers = tuple(layers)
        self.kinds = kinds
        self.passes: list[dict[int, HeadRecord]] = []

    def last(self, kind: str) -> list[Tensor]:
        """One kind of every layer, by layer, of the last forward pass.

        Raises:
            ValueError: if there was no pass, or the kind was not captured.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind must be one of the captured {', '.join(map(repr, self.kinds))}, got {kind!r}")
        if not self.passes:
            raise ValueError("capture must contain a forward pass of the model, got none")
        records = self.passes[-1]
        missing = [layer.name for layer in self.layers if layer.index not in records]
        if missing:
            raise ValueError(f"the last forward pass must run all captured layers, it left out {missing}")
        tensors: list[Tensor] = [getattr(records[layer.index], kind) for layer in self.layers]
        return tensors


@contextmanager
def capture(
    model: nn.Module, what: Sequence[str] = ("patterns", "outputs"), layers: Sequence[int] | None = None
) -> Iterator[Captured]:
    """Keep what heads do in the forward passes inside the block.

        with capture(model) as captured, torch.no_grad():
            model(tokens)
        captured.last("patterns")[3]                                    # (B, H, T, T) of the fourth layer

    Patterns of all layers are (L, B, H, T, T) numbers; for long inputs use `observe` or `head_report`.

    Args:
        model: any model that `attention_layers` understands.
        what: which of "queries", "keys", "values", "patterns" and "outputs" to keep, detached.
        layers: indices of the layers to keep. Default: all.

    Raises:
        ValueError: as `observe`; for patterns of a mechanism that has none; for a layer that runs twice in a pass.
    """
    kinds = tuple(what)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"what must name some of {', '.join(map(repr, KINDS))}, got {kinds}")
    if "patterns" in kinds:
        for layer in _chosen(attention_layers(model), layers):
            if not _may_have_patterns(layer):
                raise ValueError(f"layer {layer.name!r} has no attention patterns: {_obstacle(layer)}")
    depth = 0
    fresh = True

    def visit(call: AttentionCall) -> None:
        nonlocal fresh
        index = call.layer.index
        if fresh or (depth == 0 and index in captured.passes[-1]):
            captured.passes.append({})
            fresh = False
        if index in captured.passes[-1]:
            raise ValueError(f"layer {call.layer.name!r} runs more than once in a forward pass: use observe")
        tensors = {kind: call.pattern() if kind == "patterns" else getattr(call, kind) for kind in kinds}
        for kind, value in tensors.items():
            if value is None:
                raise ValueError(f"layer {call.layer.name!r} has no {kind}: {call.obstacle}")
        captured.passes[-1][index] = HeadRecord(**{kind: value.clone() for kind, value in tensors.items()})

    def enter(*_: Any) -> None:
        nonlocal depth, fresh
        depth, fresh = depth + 1, True

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    # Before the layers' own hooks, for the case that the model is the layer.
    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        with observe(model, visit, layers) as chosen:
            captured = Captured(chosen, kinds)
            yield captured
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Running:
    """A layer that is running, and what has been seen of its attention.

    Attributes:
        layer: the layer.
        cross: whether it was given other tokens for its keys.
        projected: outputs (B, heads, T, width) of its projections by kind, of a mechanism without patterns.
        observation: of the first operation that ran in it.
    """

    layer: AttentionLayer
    cross: bool = False
    projected: dict[str, Tensor] = field(default_factory=dict)
    observation: Observation | None = None


class _Observer:
    """Combines what hooks and operations show of the layer that is running."""

    def __init__(self, visit: Callable[[AttentionCall], None]) -> None:
        self.visit = visit
        self.running: list[_Running] = []

    def attach(self, layer: AttentionLayer, undo: list[Callable[[], None]]) -> None:
        def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            context = inputs[1:2] if layer.mechanism is not None else ()
            cross = any(x is not None for x in (*context, *(named.get(name) for name in _CONTEXTS)))
            self.running.append(_Running(layer, cross))

        def leave(*_: Any) -> None:
            # A forward pass that failed below leaves its own entries behind.
            while self.running and self.running.pop().layer is not layer:
                pass

        handles = [
            layer.hook_heads(lambda heads: self.finish(layer, heads)),
            layer.module.register_forward_pre_hook(enter, with_kwargs=True),
            layer.module.register_forward_hook(leave, always_call=True),
        ]
        if not _may_have_patterns(layer):
            for kind in ("queries", "keys", "values"):
                projection = layer.module.get_submodule(f"{kind[0]}_proj")
                handles.append(projection.register_forward_hook(functools.partial(self._projected, layer, kind)))
        undo.extend(handle.remove for handle in handles)

    def show(self, observation: Observation) -> None:
        """Note the first operation of the running layer: those it is computed by follow."""
        if self.running and self.running[-1].observation is None:
            self.running[-1].observation = observation

    def _projected(self, layer: AttentionLayer, kind: str, _: nn.Module, __: Any, out: Tensor) -> None:
        if self.running and self.running[-1].layer is layer:
            width = layer.v_head_dim if kind == "values" else layer.head_dim
            self.running[-1].projected[kind] = out.detach().reshape(*out.shape[:-1], -1, width).transpose(1, 2)

    def finish(self, layer: AttentionLayer, heads: Tensor) -> None:
        outputs = heads.detach().transpose(1, 2)
        if not self.running or self.running[-1].layer is not layer:
            obstacle = f"the forward of {type(layer.module).__name__} was not called"
            call = AttentionCall(layer, None, None, None, outputs, obstacle=obstacle)
        else:
            top = self.running[-1]
            self.running[-1] = _Running(layer, top.cross)
            if top.observation is not None:
                call = call_of(layer, top.observation, outputs)
            else:
                q, k, v = (top.projected.get(kind) for kind in ("queries", "keys", "values"))
                value_of = () if v is None else _regular(layer.num_heads, v.shape[1])
                call = AttentionCall(layer, q, k, v, outputs, value_of, obstacle=_obstacle(layer))
            call = replace(call, cross=top.cross)
        with torch.no_grad():
            self.visit(call)


def call_of(layer: AttentionLayer, seen: Observation, outputs: Tensor) -> AttentionCall:
    """What an operation was given, arranged by the layer's heads, with its outputs (B, H, T, Dv); detached."""
    rules, q, k = seen.rules, seen.q, seen.k
    if rules.q_rope is not None and rules.k_rope is not None:
        q = torch.cat([q, rules.q_rope], dim=-1)
        k = torch.cat([k, rules.k_rope.expand(-1, -1, k.shape[2], -1)], dim=-1)
    groups = seen.v.shape[2]
    value_of = _regular(layer.num_heads, groups) if seen.value_groups is None else seen.value_groups
    heads: tuple[int, ...] | None = None
    if seen.value_heads is not None:
        heads = tuple(seen.value_heads.tolist())
    elif layer.mechanism is not None:
        heads = layer.mechanism.observed_heads()
        if heads is not None and seen.value_groups is None:
            value_of = tuple(_regular(q.shape[2], groups)[h] for h in heads)
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, seen.v))
    rules = ScoreRules(
        rules.scale, rules.softcap, rules.alibi_slopes, _detached(rules.sinks), _detached(rules.bias),
        decay=_detached(rules.decay), sigmoid_bias=_detached(rules.sigmoid_bias),
    )  # fmt: skip
    return AttentionCall(layer, q, k, v, outputs, value_of, seen.view, rules, seen.pre, seen.post, heads)


def _regular(heads: int, groups: int) -> tuple[int, ...]:
    """Which of the groups each head reads, where all groups have one size."""
    return tuple(h * groups // heads for h in range(heads))


def _may_have_patterns(layer: AttentionLayer) -> bool:
    """False for a mechanism of this library that has no weights of single pairs."""
    return layer.mechanism is None or layer.mechanism.has_patterns


def _obstacle(layer: AttentionLayer) -> str:
    """Why a layer's attention could not be observed."""
    name = type(layer.module).__name__
    if not _may_have_patterns(layer):
        return f"{name} has no softmax over keys, so no weights of single pairs"
    return f"{name} computes its attention inside its own forward, where nothing can be read"


def _detached(value: Tensor | float | str | None) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _chosen(layers: list[AttentionLayer], indices: Sequence[int] | None) -> list[AttentionLayer]:
    chosen = set(layers_of(indices, len(layers)))
    return [layer for layer in layers if layer.index in chosen]


# Hugging Face: models ask their configuration which attention function to call


def _set_implementation(model: nn.Module, layers: list[AttentionLayer], undo: list[Callable[[], None]]) -> None:
    """Point the configurations of a transformers model to `_observed_attention`, until undone."""
    configs: dict[int, Any] = {}
    # A layer with uneven groups gathers its keys first, and then asks its model's configuration.
    names = ("config", "attnzoo_config")
    held: list[Any] = [getattr(module, name, None) for module in model.modules() for name in names]
    for config in held:
        if hasattr(config, "_attn_implementation_internal") and config._attn_implementation_internal != RAGGED:
            configs[id(config)] = config
    if not configs or all(layer.mechanism is not None for layer in layers):
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _observed_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for config in configs.values():
        before = config._attn_implementation_internal
        # The field behind the property, which would also write to configurations of other parts.
        config._attn_implementation_internal = _NAME
        undo.append(functools.partial(setattr, config, "_attn_implementation_internal", before))


def _observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, Dv)."""
    T, S = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    bias, visible = (None, attention_mask) if boolean else (attention_mask, None)
    if bias is not None:
        # The smallest number hides a key, as a boolean mask does.
        visible = bias > torch.finfo(bias.dtype).min / 2
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    view = Visibility(
        causal and attention_mask is None and T > 1,
        mask=None if visible is None else AttentionMask.dense(visible),
        query_start=S - T,
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = ScoreRules(scale, softcap, sinks=s_aux, bias=bias)
    observer = current_observer()
    if observer is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        observer(Observation("softmax_attention", q, k, v, view, rules))
    if softcap is None and s_aux is None and position_bias is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return out, None
    p = torch.nn.functional.dropout(pattern_of(query, key, view, rules), dropout)
    by_head = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (p.to(value.dtype) @ by_head).transpose(1, 2).contiguous(), None
