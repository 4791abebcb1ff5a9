"""Attention modules of a model, found by their structure, with the weights of their heads.

The mechanisms of this library, torch.nn.MultiheadAttention and the usual Hugging Face families are known;
`register_family` adds others. The other diagnostics (observation, masks, pruning, spectra) work on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.attention_layer import AttentionLayer, Factors, NoPartError, Weights, grouped_layer, layer_of
from attnzoo.diagnostics.layer_probe import folded_norm
from attnzoo.diagnostics.projections import Reader, blank, matrix
from attnzoo.modules.heads import HeadLayout
from attnzoo.modules.protocol import is_mechanism
from attnzoo.rules import describe

__all__ = ["AttentionLayer", "Factors", "Family", "NoPartError", "attention_layers", "layer_of", "register_family"]


class Family(NamedTuple):
    """How one kind of attention module is recognised and read."""

    matches: Callable[[nn.Module], bool]
    read: Callable[[str, int, nn.Module], AttentionLayer]


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Attention layers of a model, in the order in which its modules are registered.

    A module that is registered in several places counts once.

    Raises:
        ValueError: if the model has none that a family knows, or one whose sizes do not fit its family.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {describe(model)}")
    layers: list[AttentionLayer] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        for family in _FAMILIES.values():
            if family.matches(module):
                layers.append(_within_adapter(model, family.read(name, len(layers), module)))
                inside.update(module.modules())
                break
    if not layers:
        known = ", ".join(_FAMILIES)
        raise ValueError(
            f"model must contain attention of a known family ({known}; register_family adds others), got "
            f"{type(model).__name__}"
        )
    return layers


def register_family(
    name: str, matches: Callable[[nn.Module], bool], read: Callable[[str, int, nn.Module], AttentionLayer]
) -> None:
    """Teach `attention_layers` another kind of module; entries added later are asked first.

        register_family("mine", lambda m: isinstance(m, Mine), lambda name, index, m: layer_of(
            name, index, m, "mine", m.out, lambda: (m.wq, m.wk, m.wv), num_heads=8, num_kv_heads=2))

    Args:
        name: of the family; a known name is replaced.
        matches: whether a module is of the family.
        read: its layer from (qualified name, index, module), for instance by `layer_of`.
    """
    others = {key: value for key, value in _FAMILIES.items() if key != name}
    _FAMILIES.clear()
    _FAMILIES.update({name: Family(matches, read), **others})


def _within_adapter(model: nn.Module, layer: AttentionLayer) -> AttentionLayer:
    """The layer; if an adapter wraps the whole module and changes what it computes, one whose factors are refused."""
    home, _, own = layer.name.rpartition(".")
    adapter: Any = model.get_submodule(home)
    if own != "base_layer" or getattr(adapter, "merged", False) or getattr(adapter, "disable_adapters", False):
        return layer

    def refuse(*_: Any) -> Factors:
        raise ValueError(f"layer {home!r} must have its adapter merged to be read, got {type(adapter).__name__}")

    return replace(layer, _qk=refuse, _ov=refuse)


# The mechanisms of this library


def _read_zoo(name: str, index: int, module: Any) -> AttentionLayer:
    return AttentionLayer(
        name, index, module, len(module.heads.kept), module.num_kv_heads, module.head_dim, module.v_head_dim,
        module.head_outputs, "attnzoo", heads=module.heads, _qk=module.qk_circuit, _ov=module.ov_circuit,
    )  # fmt: skip


# torch.nn.MultiheadAttention


def _read_torch(name: str, index: int, module: Any) -> AttentionLayer:
    def weights() -> tuple[Tensor, Tensor, Tensor]:
        if module.in_proj_weight is None:
            return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        query, key, value = module.in_proj_weight.chunk(3)
        return query, key, value

    return layer_of(
        name, index, module, "torch", module.out_proj, weights, num_heads=module.num_heads,
        num_kv_heads=module.num_heads,
        obstacle="torch.nn.MultiheadAttention reads the weight of out_proj and never calls it; convert the module with "
        "attnzoo.conversion.from_mha",
    )  # fmt: skip


# Hugging Face, by attribute names


def _has(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _projects(module: Any, *names: str) -> bool:
    """Whether these submodules have a matrix of weights."""
    return _has(module, *names) and all(getattr(getattr(module, name), "weight", None) is not None for name in names)


def _separate_out(module: nn.Module) -> str | None:
    """The name of the output projection beside q_proj, k_proj and v_proj."""
    if not _projects(module, "q_proj", "k_proj", "v_proj"):
        return None
    return next((name for name in ("o_proj", "out_proj") if _projects(module, name)), None)


def _read_separate(name: str, index: int, module: Any) -> AttentionLayer:
    out = getattr(module, _separate_out(module) or "o_proj")
    rows = blank(module.q_proj).shape[0]
    width = getattr(module, "head_dim", None)
    if width is None:
        heads = _first(module, name, "num_heads", "num_attention_heads", "n_heads")
        width = rows // heads

    def weights(of: Reader) -> Weights:
        return of(module.q_proj), of(module.k_proj), of(module.v_proj)

    groups, tables = blank(module.k_proj).shape[0] // width, _table_width(module, width)
    return grouped_layer(name, index, module, "separate", out, [weights], rows // width, groups, tables)


def _first(module: Any, layer: str, *names: str) -> int:
    """The first of these numbers that a module or its configuration has."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(f"layer {layer!r} must have one of {', '.join(names)}, got none of them")


def _table_width(module: Any, width: int) -> int:
    """Features of a head that the model's rotary tables cover, by its configuration; 0 if it seems to have none."""
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parameters = parameters if isinstance(parameters, dict) else {}
    # Some models have tables for each kind of layer.
    kinds, number = getattr(config, "layer_types", None) or [], getattr(module, "layer_idx", None)
    kind = kinds[number] if isinstance(number, int) and number < len(kinds) else None
    own = parameters.get(kind)
    parameters = own if isinstance(own, dict) else parameters
    if not parameters and getattr(config, "rope_theta", None) is None:
        return 0
    share = getattr(config, "partial_rotary_factor", None)
    share = parameters.get("partial_rotary_factor") if share is None else share
    return int(width * (1.0 if share is None else share))


def _plain(
    name: str, index: int, module: Any, family: str, heads: int, query: Any, key: Any, value: Any, out: Any
) -> AttentionLayer:  # fmt: skip
    """A layer with a key/value head for each query head and four projections."""
    return grouped_layer(name, index, module, family, out, [lambda of: (of(query), of(key), of(value))], heads, heads)


def _read_bert(name: str, index: int, module: Any) -> AttentionLayer:
    inner, heads = module.self, _first(module.self, name, "num_attention_heads", "num_heads")
    return _plain(name, index, module, "bert", heads, inner.query, inner.key, inner.value, module.output.dense)


def _read_distilbert(name: str, index: int, module: Any) -> AttentionLayer:
    heads = _first(module, name, "n_heads")
    return _plain(name, index, module, "distilbert", heads, module.q_lin, module.k_lin, module.v_lin, module.out_lin)


def _read_short(name: str, index: int, module: Any) -> AttentionLayer:
    heads = _first(module, name, "num_attention_heads", "n_heads")
    family = "t5" if hasattr(module, "key_value_proj_dim") else "mpnet"
    return _plain(name, index, module, family, heads, module.q, module.k, module.v, module.o)


def _read_gpt2(name: str, index: int, module: Any) -> AttentionLayer:
    heads = _first(module, name, "num_heads", "n_head")
    if not _has(module, "q_attn"):
        return _fused(name, index, module, "gpt2", module.c_attn, module.c_proj, heads, 0)

    def weights(of: Reader) -> Weights:
        key, value = of(module.c_attn).chunk(2)
        return of(module.q_attn), key, value

    return grouped_layer(name, index, module, "gpt2", module.c_proj, [weights], heads, heads)


def _read_neox(name: str, index: int, module: Any) -> AttentionLayer:
    heads, rope = _first(module, name, "num_attention_heads", "num_heads"), getattr(module, "rotary_ndims", 0)
    return _fused(name, index, module, "gpt_neox", module.query_key_value, module.dense, heads, rope)


def _fused(
    name: str, index: int, module: nn.Module, family: str, fused: nn.Module, out: nn.Module, heads: int, rope_dim: int
) -> AttentionLayer:
    """A layer with one projection of (H + 2 G) D rows, in one of two orders: by kind, or by key/value head."""
    rows, width = blank(fused).shape[0], blank(out).shape[1] // heads
    groups = (rows // max(width, 1) - heads) // 2
    if groups < 1 or heads % groups or (heads + 2 * groups) * width != rows:
        raise ValueError(
            f"layer {name!r} does not fit family {family!r}: its fused projection has {rows} rows for {heads} heads of "
            f"width {width}"
        )

    def by_kind(of: Reader) -> Weights:
        query, key, value = of(fused).split([heads * width, groups * width, groups * width])
        return query, key, value

    def by_group(of: Reader) -> Weights:
        weight = of(fused)
        parts = weight.reshape(groups, heads // groups + 2, width, weight.shape[1])
        query, key, value = parts[:, :-2], parts[:, -2:-1], parts[:, -1:]
        return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)

    return grouped_layer(name, index, module, family, out, [by_kind, by_group], heads, groups, rope_dim)


def _read_latent(name: str, index: int, module: Any) -> AttentionLayer:
    """DeepSeek's latent attention, whose weights have the names of `MultiHeadLatentAttention`."""
    heads, width = module.num_heads, module.v_head_dim
    inputs = blank(module.o_proj).shape[1]
    if inputs != heads * width:
        raise ValueError(
            f"layer {name!r} does not fit family 'deepseek': its output projection has {inputs} inputs "
            f"for {heads} heads of width {width}"
        )
    nope, rope = module.qk_nope_head_dim, module.qk_rope_head_dim

    def matrices() -> Weights:
        """Of queries (H, D, E), of a rotated key (dr, E), and of keys and values (H, dn + Dv, E)."""
        whole = getattr(module, "q_lora_rank", None) is None
        parts = ("q_proj",) if whole else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        if not _has(module, *parts, "kv_a_layernorm"):
            raise ValueError(
                f"layer {name!r} cannot be read: {type(module).__name__} does not have {', '.join(parts)} and "
                "kv_a_layernorm; masks and patterns of its heads do not need them"
            )
        if whole:
            query = matrix(module.q_proj)
        else:
            query = matrix(module.q_b_proj) @ folded_norm(module.q_a_layernorm, matrix(module.q_a_proj))
        down = matrix(module.kv_a_proj_with_mqa)
        others = matrix(module.kv_b_proj) @ folded_norm(module.kv_a_layernorm, down[:-rope])
        of_queries, of_others = query.unflatten(0, (heads, -1)), others.unflatten(0, (heads, -1))
        return of_queries.detach(), down[-rope:].detach(), of_others.detach()

    def qk(part: str) -> Factors:
        parts = {"full": slice(None), "nope": slice(nope), "rope": slice(nope, None)}
        if part not in parts:
            raise ValueError(f"part must be 'full', 'rope' or 'nope', got {part!r}")
        query, turned, others = matrices()
        return [(query[h, parts[part]], torch.cat([others[h, :nope], turned])[parts[part]]) for h in range(heads)]

    def ov() -> Factors:
        _, _, others = matrices()
        out = matrix(module.o_proj).detach().unflatten(1, (heads, width))
        return [(others[h, nope:], out[:, h]) for h in range(heads)]

    return AttentionLayer(
        name, index, module, heads, heads, nope + rope, width, module.o_proj, "deepseek",
        heads=HeadLayout.of(heads, heads), _qk=qk, _ov=ov,
    )  # fmt: skip


def _is_bert(module: nn.Module) -> bool:
    if not _has(module, "self", "output"):
        return False
    return _projects(module.self, "query", "key", "value") and _projects(module.output, "dense")


_FAMILIES: dict[str, Family] = {
    "attnzoo": Family(is_mechanism, _read_zoo),
    "torch": Family(lambda module: isinstance(module, nn.MultiheadAttention), _read_torch),
    "separate": Family(lambda module: _separate_out(module) is not None, _read_separate),
    "deepseek": Family(
        lambda module: (
            _projects(module, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj") and hasattr(module, "qk_rope_head_dim")
        ),
        _read_latent,
    ),
    "gpt2": Family(lambda module: _projects(module, "c_attn", "c_proj"), _read_gpt2),
    "gpt_neox": Family(lambda module: _projects(module, "query_key_value", "dense"), _read_neox),
    "bert": Family(_is_bert, _read_bert),
    "distilbert": Family(lambda module: _projects(module, "q_lin", "k_lin", "v_lin", "out_lin"), _read_distilbert),
    "mpnet": Family(
        lambda module: _projects(module, "q", "k", "v", "o") and hasattr(module, "num_attention_heads"), _read_short
    ),
    "t5": Family(
        lambda module: _projects(module, "q", "k", "v", "o") and hasattr(module, "key_value_proj_dim"), _read_short
    ),
}
"""Kinds of attention modules, asked in this order."""
