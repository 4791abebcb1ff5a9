"""Removing heads of Hugging Face attention modules for good, which transformers 5 no longer offers itself.

Modules with separate query, key, value and output projections can be pruned (Llama, Mistral, Qwen, Gemma, BERT,
DistilBERT and relatives), and those with one fused projection (GPT-2, GPT-NeoX). Whether one really can is tried, see
`trial`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.configs import RAGGED, configs_in
from attnzoo.diagnostics.layer_probe import norms_after
from attnzoo.diagnostics.layers import AttentionLayer, register_family
from attnzoo.diagnostics.projections import blank, matrix
from attnzoo.modules.heads import HeadLayout, head_rows, keep_entries

PRUNABLE = ("separate", "bert", "distilbert", "gpt2", "gpt_neox")
"""Families that pruning knows; a layer that lost heads may be of "pruned"."""
_NAMES = {
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "gpt2": ("c_attn",) * 3,
    "gpt_neox": ("query_key_value",) * 3,
}


def projections_of(layer: AttentionLayer) -> tuple[Any, Any, Any, Any, Any]:
    """The module that calls attention, and its query, key, value and output projections; a fused one three times."""
    module: Any = layer.module
    if layer.family == "bert":
        inner = module.self
        return inner, inner.query, inner.key, inner.value, module.output.dense
    names = _NAMES.get(layer.family, ("q_proj", "k_proj", "v_proj"))
    query, key, value = (getattr(module, name) for name in names)
    return module, query, key, value, layer.projection


def check_prunable(layer: AttentionLayer, numbers: Iterable[int], allow_inexact: bool) -> None:
    """Raise ValueError where these heads cannot be removed; numbers are original ones.

    Args:
        layer: of a Hugging Face model.
        numbers: heads to remove.
        allow_inexact: accept norms that run over all heads together.
    """
    left = layer.heads.prune(numbers)
    if not layer.num_heads:
        return
    if layer.family not in (*PRUNABLE, "pruned"):
        raise ValueError(
            "prune_heads knows zoo modules and the families of Llama, BERT, DistilBERT, GPT-2 and GPT-NeoX, got "
            f"{type(layer.module).__name__}"
        )
    inner, query, key, value, out = projections_of(layer)
    if query is key and layer.num_kv_heads != len(layer.heads.kept):
        raise ValueError(
            f"prune_heads needs a key/value head for each query head where they are one projection, got "
            f"{layer.num_heads} and {layer.num_kv_heads} in layer {layer.name!r}"
        )
    for linear in (query, key, value, out):
        if not isinstance(linear, nn.Linear) and not hasattr(linear, "nf"):
            kind = f"{type(linear).__module__}.{type(linear).__name__}"
            raise ValueError(f"prune_heads needs linear projections, got a {kind} in layer {layer.name!r}")
    for name, count in zip(_norms(layer), (layer.num_heads, layer.num_kv_heads), strict=True):
        if name is not None and name.startswith(_JOINT) and count > 1 and not allow_inexact:
            raise ValueError(
                f"prune_heads needs norms of single heads, but {name[1:]} of layer {layer.name!r} runs over all heads "
                "together; allow_inexact=True goes on all the same"
            )
    if not left.kept and not layer.name and layer.family != "bert":
        raise ValueError("heads must leave at least one of a model that is a single attention module, got all of them")
    if not left.is_regular:
        home = sys.modules[type(inner).__module__]
        if not (hasattr(home, "ALL_ATTENTION_FUNCTIONS") and hasattr(home, "eager_attention_forward")):
            raise ValueError(
                f"heads must leave even groups where {type(inner).__name__} does not call transformers' attention "
                "interface; prune with unit='kv_group'"
            )


_JOINT = "*"
"""Before the name of a norm that runs over all heads together."""


def _norms(layer: AttentionLayer) -> tuple[str | None, str | None]:
    """Names inside the module of the norms that queries and keys pass; what the first pruning found stays."""
    inner, query, key, _, _ = projections_of(layer)
    if query is key:
        return None, None
    if hasattr(inner, "attnzoo_norms"):
        return inner.attnzoo_norms  # type: ignore[no-any-return]
    module = layer.module
    if query.weight.is_meta:
        # Any weights show the norms.
        with torch.device("cpu"), torch.no_grad():
            module = copy.deepcopy(module, configs_in(module)).to_empty(device="cpu")
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_() if not tensor.is_floating_point() else tensor.normal_()
            of_copy = replace(layer, module=module, projection=module.get_submodule(_name_in(layer)))
            return _norms(of_copy)
    try:
        found = norms_after(module, (query, key), layer.head_dim, layer.num_heads)
    except ValueError as error:
        raise ValueError(f"prune_heads cannot try layer {layer.name!r}: {error}") from None
    names = {part: name for name, part in inner.named_modules()}
    joint = [
        norm is not None and norm[1][-1] == linear.out_features
        for norm, linear in zip(found, (query, key), strict=True)
    ]
    first, second = (
        None if norm is None or norm[0] not in names else _JOINT * whole + names[norm[0]]
        for norm, whole in zip(found, joint, strict=True)
    )
    return first, second


def _name_in(layer: AttentionLayer) -> str:
    """The name of a layer's output projection inside its module."""
    names: Iterator[str] = (name for name, part in layer.module.named_modules() if part is layer.projection)
    return next(names)


def prune_module(model: nn.Module, layer: AttentionLayer, numbers: Iterable[int]) -> None:
    """Remove these heads of a layer that `check_prunable` accepts; model is the whole model."""
    layout = layer.heads.prune(numbers)
    if layout == layer.heads:
        return
    inner, query, key, value, out = projections_of(layer)
    heads, groups = layer.heads.places(layout)
    D, Dv = layer.head_dim, layer.v_head_dim
    inner.attnzoo_norms = _norms(layer)
    for name, count, kept in zip(
        inner.attnzoo_norms, (len(layer.heads.kept), layer.num_kv_heads), (heads, groups), strict=True
    ):
        if name is not None and count > 1:
            _prune_norm(inner.get_submodule(name.lstrip(_JOINT)), count, kept, D)
    if query is key:
        # Rows of a head stand together (GPT-NeoX), or those of all queries do, then of keys, then of values.
        own = head_rows(heads, D)
        by_kind = [own + kind * len(layer.heads.kept) * D for kind in range(3)]
        inner.num_attention_heads = len(heads)  # where only the configuration had it
        _keep(query, head_rows(heads, 3 * D) if layer.family == "gpt_neox" else torch.cat(by_kind), outputs=True)
    else:
        for linear, kept, width in ((query, heads, D), (key, groups, D), (value, groups, Dv)):
            _keep(linear, head_rows(kept, width), outputs=True)
    _keep(out, head_rows(heads, Dv), outputs=False)
    if isinstance(getattr(inner, "sinks", None), nn.Parameter):
        inner.sinks = keep_entries(inner.sinks, heads)
    module: Any = layer.module
    module.attnzoo_heads, module.pruned_heads = layout, layout.pruned
    _set(inner, ("num_heads", "num_attention_heads", "n_heads"), len(heads))
    _set(inner, ("num_key_value_heads", "num_kv_heads"), len(groups))
    _set(inner, ("all_head_size", "split_size"), len(heads) * D)
    if not heads:
        _empty(model, layer, inner, out)
        return
    _set(inner, ("num_key_value_groups",), len(heads) // len(groups) if layout.is_regular else 1)
    if not layout.is_regular:
        _read_unevenly(inner)


def _keep(projection: Any, features: Tensor, *, outputs: bool) -> None:
    """Keep these output or input features of a linear layer, or of a transformers Conv1D, which stores (in, out)."""
    transposed = hasattr(projection, "nf")
    projection.weight = keep_entries(projection.weight, features, int(outputs == transposed))
    if outputs and projection.bias is not None:
        projection.bias = keep_entries(projection.bias, features)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    setattr(projection, names[not outputs], features.numel())


def _prune_norm(norm: nn.Module, count: int, kept: Sequence[int], width: int) -> None:
    """Keep these heads of a norm that has gains for each of `count` heads, or a norm for each of them."""
    for module in norm.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim > 1 and parameter.shape[0] == count:
                setattr(module, name, keep_entries(parameter, kept))
            elif parameter is not None and parameter.shape == (count * width,):
                setattr(module, name, keep_entries(parameter, head_rows(kept, width)))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) == count:
                setattr(module, name, nn.ModuleList(child[i] for i in kept))


def _set(module: Any, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _read_unevenly(module: Any) -> None:
    """Let a module gather the key/value head of each query head after its cache, which holds each of them once."""
    if hasattr(module, "attnzoo_config"):
        return
    module.attnzoo_ragged = _Registered()
    # The model's configuration, which decides on the masks, stays; only this module's own copy names the gathering.
    module.attnzoo_config = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = RAGGED


class _Registered:
    """Registers the gathering attention function, also where a pickled model is loaded."""

    def __init__(self) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(RAGGED, _ragged_attention)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Registered, ()


def _ragged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """The attention that the model is configured for, over key/value heads (B, G, S, D) gathered for H query heads."""
    layout: HeadLayout = module.attnzoo_heads
    if not layout.is_regular:
        index = torch.tensor(layout.reads, device=key.device)
        key, value = key.index_select(1, index), value.index_select(1, index)
    home: Any = sys.modules[type(module).__module__]
    configured = module.attnzoo_config._attn_implementation
    function = home.ALL_ATTENTION_FUNCTIONS.get_interface(configured, home.eager_attention_forward)
    return function(module, query, key, value, attention_mask, **options)


class NoHeads(nn.Module):
    """Replaces a Hugging Face attention module without heads: an output projection that adds only its bias.

    Args:
        layer_idx: its index in caches, or None.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.projection_name: str | None = None

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
        """hidden_states (B, T, E) -> (bias as (B, T, E), None); (B, T, 0) where another module projects."""
        # Caches take the number of tokens from the first layer, which may be this one; their argument has many names.
        # Attention over an encoder's states counts nothing.
        caches = [x for x in (*others, *named.values()) if hasattr(x, "get_seq_length") and hasattr(x, "update")]
        crosses = any(named.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        if caches and self.layer_idx is not None and not crosses:
            B, T = hidden_states.shape[:2]
            counted = hidden_states.new_zeros(B, 1, T, 1)
            getattr(caches[0], "self_attention_cache", caches[0]).update(counted, counted, self.layer_idx)
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.projection_name is None:
            return nothing, None
        return getattr(self, self.projection_name)(nothing), None


def _empty(model: nn.Module, layer: AttentionLayer, inner: Any, out: nn.Linear) -> None:
    empty = NoHeads(getattr(inner, "layer_idx", None))
    empty.train(inner.training)
    if layer.family == "bert":
        layer.module.self = empty
        return
    empty.projection_name = next(name for name, child in inner.named_children() if child is out)
    empty.add_module(empty.projection_name, _as_linear(out))
    empty.attnzoo_heads, empty.pruned_heads = layer.module.attnzoo_heads, layer.module.pruned_heads
    home, _, name = layer.name.rpartition(".")
    setattr(model.get_submodule(home), name, empty)


def _as_linear(projection: Any) -> nn.Module:
    """A linear layer in place of a Conv1D, which cannot take no features at all."""
    if not hasattr(projection, "nf"):
        return projection  # type: ignore[no-any-return]
    # Of no features, torch would warn.
    linear = nn.Linear(1, projection.nf, device="meta")
    linear.in_features = projection.nx
    linear.weight, linear.bias = nn.Parameter(projection.weight.detach().T), projection.bias
    return linear


def _is_pruned(module: Any) -> bool:
    """Whether a module's sizes no longer fit its own family."""
    layout: HeadLayout | None = getattr(module, "attnzoo_heads", None)
    return _is_empty(module) or (layout is not None and not layout.is_regular)


def _is_empty(module: Any) -> bool:
    return isinstance(module, NoHeads) or isinstance(getattr(module, "self", None), NoHeads)


def _read_pruned(name: str, index: int, module: Any) -> AttentionLayer:
    heads: HeadLayout = module.attnzoo_heads
    if _is_empty(module):
        own = isinstance(module, NoHeads)
        projection = getattr(module, module.projection_name or "") if own else module.output.dense
        return AttentionLayer(
            name, index, module, 0, 0, 0, 0, projection, "pruned", heads=heads, _qk=lambda _: [], _ov=list
        )
    D, H, G = module.head_dim, len(heads.kept), len(heads.groups)
    projection = module.o_proj if hasattr(module, "o_proj") else module.out_proj
    width = blank(projection).shape[1] // H

    def qk(part: str) -> list[tuple[Tensor, Tensor]]:
        if part != "full" or getattr(module, "q_norm", None) is not None:
            raise ValueError(f"part must be 'full' for an unevenly pruned layer without query norm, got {part!r}")
        q, k = (matrix(linear).detach().unflatten(0, (-1, D)) for linear in (module.q_proj, module.k_proj))
        return [(q[h], k[g]) for h, g in enumerate(heads.reads)]

    def ov() -> list[tuple[Tensor, Tensor]]:
        v, out = matrix(module.v_proj).detach(), matrix(projection).detach()
        return [
            (v[g * width : (g + 1) * width], out[:, h * width : (h + 1) * width]) for h, g in enumerate(heads.reads)
        ]

    return AttentionLayer(name, index, module, H, G, D, width, projection, "pruned", heads=heads, _qk=qk, _ov=ov)


register_family("pruned", _is_pruned, _read_pruned)
