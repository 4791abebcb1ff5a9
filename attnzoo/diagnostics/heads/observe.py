"""What every head of a model does in its forward passes: queries, keys, values, patterns and outputs.

Nothing in the model changes. Queries, keys and masks are read where they enter softmax attention, so that patterns
follow the module's own rules: rotation, windows, soft-caps, sinks, compositions of heads. Patterns are made from them
when they are asked for, block by block if wanted.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.heads.attention_call import HeadCall, Rules
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.masks import as_mask
from attnzoo.modules.moa import MixtureOfAttentionHeads
from attnzoo.ops import composed_attention as composed
from attnzoo.ops import head_routing as routing
from attnzoo.ops import latent_attention as latent
from attnzoo.ops import softmax_attention as softmax

KINDS = ("queries", "keys", "values", "patterns", "outputs")
"""What `capture` can keep of a layer."""

_NAME = "attnzoo_observed"


@contextmanager
def observe(
    model: nn.Module, visit: Callable[[HeadCall], None], layers: Sequence[int] | None = None
) -> Iterator[list[AttentionLayer]]:
    """Call `visit` with each attention layer's `HeadCall` during the forward passes inside the block.

    Only one layer's tensors are alive at a time unless the visitor keeps them. Yields the observed layers. Hugging
    Face models run through scaled_dot_product_attention meanwhile (through patterns where that has no such option),
    whatever implementation they are set to. Compiled modules have to be observed uncompiled.

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
        _wrap_operations(chosen, observer, undo)
        _set_implementation(model, chosen, observer, undo)
        yield chosen
    finally:
        for step in reversed(undo):
            step()


@dataclass(frozen=True, eq=False)
class HeadRecord:
    """What was kept of one layer in one forward pass; shapes as in `HeadCall`, patterns (B, H, T, S)."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    patterns: Tensor | None = None
    outputs: Tensor | None = None


class Captured:
    """Records of the forward passes inside a `capture` block.

    Attributes:
        layers: the observed layers.
        passes: one dict a forward pass, from layer index to `HeadRecord`.
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
        found: list[Tensor] = [getattr(records[layer.index], kind) for layer in self.layers]
        return found


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
            if layer.family == "attnzoo" and not _operations(layer.module):
                raise ValueError(f"layer {layer.name!r} has no attention patterns: {_no_softmax(layer)}")
    depth = 0
    fresh = True

    def visit(call: HeadCall) -> None:
        nonlocal fresh
        index = call.layer.index
        if fresh or (depth == 0 and index in captured.passes[-1]):
            captured.passes.append({})
            fresh = False
        if index in captured.passes[-1]:
            raise ValueError(f"layer {call.layer.name!r} runs more than once in a forward pass: use observe")
        found = {kind: call.pattern() if kind == "patterns" else getattr(call, kind) for kind in kinds}
        for kind, value in found.items():
            if value is None:
                raise ValueError(f"layer {call.layer.name!r} has no {kind}: {call.obstacle}")
        captured.passes[-1][index] = HeadRecord(**{kind: value.clone() for kind, value in found.items()})

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
class _Open:
    """A layer that is running, and what has been seen of its attention."""

    layer: AttentionLayer
    seen: dict[str, Any] = field(default_factory=dict)


class _Observer:
    """Puts together what hooks and operations tell about the layer that is running."""

    def __init__(self, visit: Callable[[HeadCall], None]) -> None:
        self.visit = visit
        self.running: list[_Open] = []

    def attach(self, layer: AttentionLayer, undo: list[Callable[[], None]]) -> None:
        def enter(*_: Any) -> None:
            self.running.append(_Open(layer))

        def leave(*_: Any) -> None:
            # A forward pass that failed below leaves its own entries behind.
            while self.running and self.running.pop().layer is not layer:
                pass

        handles = [
            layer.hook_heads(lambda heads: self.finish(layer, heads)),
            layer.module.register_forward_pre_hook(enter),
            layer.module.register_forward_hook(leave, always_call=True),
        ]
        if layer.family == "attnzoo" and not _operations(layer.module):
            for name in "qkv":
                projection = layer.module.get_submodule(f"{name}_proj")
                handles.append(projection.register_forward_hook(functools.partial(self._projected, layer, name)))
        undo.extend(handle.remove for handle in handles)

    def current(self, module: nn.Module | None = None) -> _Open | None:
        """The entry of the running layer, if module belongs to it."""
        if not self.running:
            return None
        top = self.running[-1]
        inside = module is None or any(part is module for part in top.layer.module.modules())
        return top if inside else None

    def note(self, open_: _Open, q: Tensor, k: Tensor, v: Tensor, rules: Rules, value_of: tuple[int, ...]) -> None:
        """Queries (B, H, T, D), keys and values that enter attention, and its rules."""
        open_.seen = {
            "queries": q.detach(), "keys": k.detach(), "values": v.detach(), "rules": rules, "value_of": value_of,
        }  # fmt: skip

    def _projected(self, layer: AttentionLayer, name: str, _: nn.Module, __: Any, out: Tensor) -> None:
        top = self.current()
        if top is not None and top.layer is layer:
            width = layer.v_head_dim if name == "v" else layer.head_dim
            kind = {"q": "queries", "k": "keys", "v": "values"}[name]
            top.seen[kind] = out.detach().reshape(*out.shape[:-1], -1, width).transpose(1, 2)
            top.seen["obstacle"] = _no_softmax(layer)

    def finish(self, layer: AttentionLayer, heads: Tensor) -> None:
        top = self.current()
        if top is None or top.layer is not layer:
            seen: dict[str, Any] = {"obstacle": f"the forward of {type(layer.module).__name__} was passed by"}
        else:
            seen, top.seen = top.seen, {}
        seen.setdefault("obstacle", None if "rules" in seen else _unseen(layer))
        if not seen.get("value_of"):
            groups = seen["values"].shape[1] if seen.get("values") is not None else 1
            seen["value_of"] = tuple(h * groups // layer.num_heads for h in range(layer.num_heads))
        for kind in ("queries", "keys", "values"):
            seen.setdefault(kind, None)
        with torch.no_grad():
            self.visit(HeadCall(layer, outputs=heads.detach().transpose(1, 2), **seen))


def _no_softmax(layer: AttentionLayer) -> str:
    return f"{type(layer.module).__name__} has no softmax over keys, so no weights of single pairs"


def _unseen(layer: AttentionLayer) -> str:
    return f"{type(layer.module).__name__} computes its attention inside its own forward, where nothing can be read"


def _chosen(found: list[AttentionLayer], indices: Sequence[int] | None) -> list[AttentionLayer]:
    if indices is None:
        return found
    for index in indices:
        if not 0 <= index < len(found):
            raise ValueError(f"layers must lie between 0 and {len(found) - 1}, got {index}")
    return [layer for layer in found if layer.index in set(indices)]


# The zoo: its modules call operations by names of their Python modules


def _operations(module: nn.Module) -> list[tuple[Any, str]]:
    """Python modules of the class and its bases that call softmax attention, with the names to wrap."""
    found = []
    for cls in type(module).__mro__:
        owner = sys.modules.get(cls.__module__)
        for name in (
            "softmax_attention",
            "latent_attention",
            "composed_attention",
            "routed_attention",
            "_heads_composed",
        ):
            if callable(getattr(owner, name, None)):
                found.append((owner, name))
    return list(dict.fromkeys(found))


def _wrap_operations(layers: list[AttentionLayer], observer: _Observer, undo: list[Callable[[], None]]) -> None:
    """Replace the names by functions that tell the observer first, until undone."""
    tell = {
        "softmax_attention": (_tell_softmax, inspect.signature(softmax.softmax_attention)),
        "latent_attention": (_tell_latent, inspect.signature(latent.latent_attention)),
        "composed_attention": (_tell_composed, inspect.signature(composed.composed_attention)),
        "routed_attention": (_tell_routed, inspect.signature(routing.routed_attention)),
        "_heads_composed": (_tell_outputs_composed, None),
    }
    owners = dict.fromkeys(
        pair for layer in layers if layer.family == "attnzoo" for pair in _operations(layer.module)
    )  # fmt: skip
    for owner, name in owners:
        original = getattr(owner, name)
        told, signature = tell[name]

        def wrapped(
            *args: Any, _original: Any = original, _told: Any = told, _signature: Any = signature, **options: Any
        ) -> Any:
            top = observer.current()
            if top is not None:
                if _signature is None:
                    _told(observer, top, *args)
                else:
                    bound = _signature.bind(*args, **options)
                    bound.apply_defaults()
                    _told(observer, top, bound.arguments)
            return _original(*args, **options)

        setattr(owner, name, wrapped)
        undo.append(functools.partial(setattr, owner, name, original))


def _tell_softmax(observer: _Observer, top: _Open, call: dict[str, Any]) -> None:
    q, k, v = call["q"], call["k"], call["v"]
    scale = call["scale"]
    if scale is None:
        scale = (q.shape[-1] + (0 if call["q_extra"] is None else call["q_extra"].shape[-1])) ** -0.5
    if call["q_extra"] is not None:
        k = torch.cat([k, call["k_extra"].expand(-1, -1, k.shape[2], -1)], dim=-1)
        q = torch.cat([q, call["q_extra"]], dim=-1)
    start = call["query_start"]
    rules = Rules(
        scale, call["causal"], as_mask(call["mask"]), call["window"], call["sink_tokens"],
        k.shape[1] - q.shape[1] if start is None else start, call["key_positions"], call["softcap"],
        call["alibi_slopes"], _detached(call["sinks"]),
    )  # fmt: skip
    heads, module = q.shape[2], top.layer.module
    order: list[int] | None = None
    if isinstance(module, MixtureOfAttentionHeads):
        # Attention goes by key/value head, then slot; outputs by slot.
        grid = torch.arange(heads).view(module.num_kv_heads, module.num_experts_per_tok, -1)
        order = grid.transpose(0, 1).flatten().tolist()
    kept = getattr(module, "_value_heads", None)
    kept = None if kept is None else kept(torch.device("cpu"))
    if kept is not None:
        order = kept.tolist()
    value_of = tuple(h * v.shape[2] // heads for h in (range(heads) if order is None else order))
    rules = rules if order is None else replace(rules, heads=tuple(order))
    observer.note(top, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rules, value_of)


def _tell_latent(observer: _Observer, top: _Open, call: dict[str, Any]) -> None:
    """Absorbed latent attention: the latent and the rotary key are one key and one value for all heads."""
    q = call["q"] if call["q_rope"] is None else torch.cat([call["q"], call["q_rope"]], dim=-1)
    state, start = call["latent"], call["query_start"]
    start = state.shape[1] - q.shape[1] if start is None else start
    rules = Rules(call["scale"], call["causal"], as_mask(call["mask"]), query_start=start)
    keys = state.transpose(1, 2)
    observer.note(top, q.transpose(1, 2), keys, keys, rules, (0,) * q.shape[2])


def _tell_routed(observer: _Observer, top: _Open, call: dict[str, Any]) -> None:
    """Sparse mixture of heads: the pattern of every head, also where a token did not choose it."""
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    value_of = tuple(h * v.shape[1] // q.shape[1] for h in range(q.shape[1]))
    observer.note(top, q, k, v, Rules(call["scale"], True, call["mask"]), value_of)


def _tell_composed(observer: _Observer, top: _Open, call: dict[str, Any]) -> None:
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    sight = call["sight"]
    kept = call["value_heads"]
    rules = Rules(
        call["scale"], sight.causal, sight.mask, sight.window, 0, sight.start, sight.positions, pre=call["pre"],
        post=call["post"], heads=None if kept is None else tuple(kept.tolist()),
    )  # fmt: skip
    reads = call["value_groups"]
    heads = top.layer.num_heads
    value_of = tuple(h * v.shape[1] // heads for h in range(heads)) if reads is None else tuple(reads)
    observer.note(top, q, k, v, rules, value_of)


def _tell_outputs_composed(_: _Observer, top: _Open, composition: composed.Composition, *__: Any) -> None:
    """Folded composition: before attention it has gone into the queries, after it the weights are composed too."""
    if "rules" in top.seen:
        top.seen["rules"] = replace(top.seen["rules"], post=composition)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# Hugging Face: models ask their configuration which attention function to call

_ACTIVE: list[_Observer] = []


def _set_implementation(
    model: nn.Module, layers: list[AttentionLayer], observer: _Observer, undo: list[Callable[[], None]]
) -> None:
    """Point the configurations of a transformers model to `_observed_attention`, until undone."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    if not configs or all(layer.family == "attnzoo" for layer in layers):
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
    _ACTIVE.append(observer)
    undo.append(functools.partial(_ACTIVE.remove, observer))


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
    bias = None if boolean else attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    rules = Rules(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal and attention_mask is None and T > 1,
        query_start=S - T, softcap=softcap, sinks=_detached(s_aux), bias=_detached(bias),
        seen=attention_mask if boolean else None,
    )  # fmt: skip
    value_of = tuple(h * value.shape[1] // query.shape[1] for h in range(query.shape[1]))
    for observer in _ACTIVE:
        top = observer.current(module)
        if top is not None:
            observer.note(top, query, key, value, rules, value_of)
    if softcap is None and s_aux is None and position_bias is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return out, None
    return _plain(query, key, value, replace(rules, sinks=s_aux, bias=bias), value_of, dropout), None


def _plain(q: Tensor, k: Tensor, v: Tensor, rules: Rules, value_of: tuple[int, ...], dropout: float) -> Tensor:
    """Outputs (B, T, H, Dv) through patterns, differentiable."""
    # Only `pattern` is asked, which needs no layer.
    call = HeadCall(None, q, k, v, q, value_of, rules)  # type: ignore[arg-type]
    p = torch.nn.functional.dropout(call.pattern(), dropout)
    return (p.to(v.dtype) @ v[:, list(value_of)]).transpose(1, 2).contiguous()
