"""Removing heads of a whole model for good, and what that gains over masking them.

The zoo's modules prune themselves. Hugging Face modules are pruned here: those with separate query, key, value and
output projections (Llama, Mistral, Qwen, Gemma and relatives) and BERT with its relatives. transformers 5 has nothing
of its own for this any more.

Deleting a head's rows and columns computes what masking it computes, up to the order of sums. In a mixture of heads or
of experts it is no mask: the router then chooses among the rest.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.layers import AttentionLayer, attention_layers, register_family
from attnzoo.diagnostics.pruning.importance import UNITS
from attnzoo.diagnostics.pruning.masks import Head, check_choice, evaluating, head_mask, head_slots, masked_heads
from attnzoo.modules.structure import group_index, head_rows, keep_columns, keep_entries, keep_rows, surviving_heads

RAGGED = "attnzoo_ragged"
"""Name of the attention function that gathers key/value heads for query heads in uneven groups."""


def prune_heads(
    model: nn.Module, heads: Mapping[int, Iterable[int]] | Iterable[Head], *, unit: str = "head",
    allow_inexact: bool = False,
) -> None:  # fmt: skip
    """Remove heads of a model in place; the rest computes what it did with these heads masked.

    Numbers are original ones, always, and calls add up. A key/value head goes when no query head reads it any more;
    groups may become uneven. A layer without heads gives its output projection's bias. Optimisers and caches have to
    be made anew. A pruned state dict loads into a new model after `prune_heads(new, pruned_heads(old))`; a Hugging Face
    configuration keeps its sizes, so its `from_pretrained` does not load one. Nothing is changed if a layer refuses.

    Args:
        model: a model of zoo modules or a Hugging Face model, see above.
        heads: {layer: heads} or (layer, head) pairs, such as the start of a pruning curve's order. Layers count as in
            `attention_layers`. Mixtures of attention heads remove experts by these numbers.
        unit: "head", or "kv_group" for numbers of key/value heads with all their query heads.
        allow_inexact: go on where a norm runs over the queries or keys of all heads together, though the remaining
            heads then change.

    Raises:
        ValueError: for an unknown unit, a number out of range, repeated, or gone already, a joint norm, or a model
            whose attention is of another kind.
    """
    check_choice("unit", unit, UNITS)
    layers = attention_layers(model)
    wanted: dict[int, list[int]] = {}
    named = heads.items() if isinstance(heads, Mapping) else [(layer, [head]) for layer, head in heads]
    pairs = [(layer, head) for layer, of_layer in named for head in of_layer]
    for index, head in pairs:
        if not 0 <= index < len(layers):
            raise ValueError(f"heads must name layers from 0 to {len(layers) - 1}, got {index}")
        wanted.setdefault(int(index), []).append(int(head))
    if unit == "kv_group":
        wanted = {index: _of_groups(layers[index], groups) for index, groups in wanted.items()}
    for index, numbers in wanted.items():
        _rehearse(layers[index], numbers, allow_inexact)
    for index, numbers in wanted.items():
        layer = layers[index]
        if layer.family == "attnzoo":
            layer.module.prune_heads(numbers)  # type: ignore[operator]
        else:
            _prune_hugging_face(model, layer, numbers, allow_inexact)


def pruned_heads(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Original numbers of the heads that are gone, by layer; layers with all of theirs are left out.

    Of mixtures of attention heads: numbers of experts.
    """
    gone = {layer.index: tuple(getattr(layer.module, "pruned_heads", ())) for layer in attention_layers(model)}
    return {index: tuple(sorted(heads)) for index, heads in gone.items() if heads}


def _rehearse(layer: AttentionLayer, numbers: list[int], allow_inexact: bool) -> None:
    if layer.family == "attnzoo":
        copy.deepcopy(layer.module).prune_heads(numbers)  # type: ignore[operator]
        return
    total, _ = _original_sizes(layer)
    left = surviving_heads(total, _gone(layer), numbers)
    if not isinstance(layer.module, NoHeads) and layer.num_heads:
        _check_prunable(layer, allow_inexact, left)


def _of_groups(layer: AttentionLayer, groups: list[int]) -> list[int]:
    if layer.family == "attnzoo":
        module: Any = layer.module
        total = layer.num_heads + len(module.pruned_heads)
        known = getattr(module, "_group_size", None)
        size = int(known) if known else total // getattr(module, "_all_groups", layer.num_kv_heads)
    else:
        total, count = _original_sizes(layer)
        size = total // count
    for group in groups:
        if not 0 <= group < total // size:
            raise ValueError(f"heads must name key/value heads from 0 to {total // size - 1}, got {group}")
    gone = set(_gone(layer))
    # Some of a group's query heads may be gone; a group that is gone altogether is refused by its numbers.
    return [
        h
        for group in groups
        for h in range(group * size, (group + 1) * size)
        if h not in gone or gone >= set(range(group * size, (group + 1) * size))
    ]


# Hugging Face


def _gone(layer: AttentionLayer) -> tuple[int, ...]:
    return tuple(sorted(getattr(layer.module, "pruned_heads", ())))


def _original_sizes(layer: AttentionLayer) -> tuple[int, int]:
    """Query and key/value heads of the module as it was made."""
    sizes: tuple[int, int] = getattr(layer.module, "attnzoo_sizes", (layer.num_heads, layer.num_kv_heads))
    return sizes


def _parts(layer: AttentionLayer) -> tuple[Any, nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """The module that calls attention, and its four projections."""
    module: Any = layer.module
    if layer.family == "bert":
        inner = module.self
        return inner, inner.query, inner.key, inner.value, module.output.dense
    return module, module.q_proj, module.k_proj, module.v_proj, layer.projection  # type: ignore[return-value]


def _check_prunable(layer: AttentionLayer, allow_inexact: bool, left: tuple[int, ...]) -> None:
    """Refuse what pruning would break."""
    if layer.family not in ("separate", "bert", "pruned"):
        raise ValueError(
            "prune_heads knows zoo modules, BERT and models with separate projections, got "
            f"{type(layer.module).__name__}"
        )
    inner, query, key, value, out = _parts(layer)
    if not all(isinstance(linear, nn.Linear) for linear in (query, key, value, out)):
        raise ValueError(f"prune_heads needs linear projections, got {type(query).__name__} in layer {layer.name!r}")
    for name, linear, count in (("q_norm", query, layer.num_heads), ("k_norm", key, layer.num_kv_heads)):
        norm = getattr(inner, name, None)
        weight = getattr(norm, "weight", None)
        if count > 1 and weight is not None and weight.shape[-1] == linear.out_features and not allow_inexact:
            raise ValueError(
                f"prune_heads needs norms of single heads, but {name} of layer {layer.name!r} runs over all heads "
                "together; allow_inexact=True goes on all the same"
            )
    total, count = _original_sizes(layer)
    if left and group_index(left, total // count)[1] is not None:
        home = sys.modules[type(inner).__module__]
        if not (hasattr(home, "ALL_ATTENTION_FUNCTIONS") and hasattr(home, "eager_attention_forward")):
            raise ValueError(
                f"heads must leave even groups where {type(inner).__name__} does not call transformers' attention "
                "interface; prune with unit='kv_group'"
            )


def _prune_hugging_face(model: nn.Module, layer: AttentionLayer, numbers: list[int], allow_inexact: bool) -> None:
    total, count = _original_sizes(layer)
    size, gone = total // count, _gone(layer)
    old = [h for h in range(total) if h not in gone]
    old_groups = sorted({h // size for h in old})
    heads = surviving_heads(total, gone, numbers)
    if heads == tuple(old):
        return
    groups, reads = group_index(heads, size)
    inner, query, key, value, out = _parts(layer)
    at, at_group = [old.index(h) for h in heads], [old_groups.index(g) for g in groups]
    D, Dv = layer.head_dim, layer.v_head_dim
    for name, linear, kept in (("q_norm", query, at), ("k_norm", key, at_group)):
        norm: Any = getattr(inner, name, None)
        if allow_inexact and norm is not None and norm.weight.shape[-1] == linear.out_features != D:
            norm.weight = keep_entries(norm.weight, head_rows(kept, D))
    keep_rows(query, head_rows(at, D))
    keep_rows(key, head_rows(at_group, D))
    keep_rows(value, head_rows(at_group, Dv))
    keep_columns(out, head_rows(at, Dv))
    if isinstance(getattr(inner, "sinks", None), nn.Parameter):
        inner.sinks = keep_entries(inner.sinks, torch.tensor(at, dtype=torch.long))
    removed = tuple(h for h in range(total) if h not in heads)
    layer.module.attnzoo_sizes, layer.module.pruned_heads = (total, count), removed  # type: ignore[assignment]
    _set(inner, ("num_heads", "num_attention_heads"), len(heads))
    _set(inner, ("num_key_value_heads", "num_kv_heads"), len(groups))
    _set(inner, ("all_head_size",), len(heads) * D)
    if not heads:
        _empty(model, layer, inner, out)
    elif reads is None:
        _set(inner, ("num_key_value_groups",), len(heads) // len(groups))
        inner.__dict__.pop("attnzoo_kv_index", None)
    else:
        _set(inner, ("num_key_value_groups",), 1)
        _read_unevenly(inner, reads)


def _set(module: Any, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _read_unevenly(module: Any, reads: tuple[int, ...]) -> None:
    """Let a module gather the key/value head of each query head after its cache, which holds every one once."""
    module.attnzoo_kv_index = reads
    if hasattr(module, "attnzoo_config"):
        return
    from transformers import AttentionInterface

    AttentionInterface.register(RAGGED, _ragged_attention)
    # Masks are made by the model's configuration, which stays; only this module's own copy names the gathering.
    module.attnzoo_config = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = RAGGED


def _ragged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """The attention that the model is configured for, over key/value heads (B, G, S, D) gathered for H query heads."""
    index: tuple[int, ...] | None = getattr(module, "attnzoo_kv_index", None)
    if index is not None:
        gathered = torch.tensor(index, device=key.device)
        key, value = key.index_select(1, gathered), value.index_select(1, gathered)
    home: Any = sys.modules[type(module).__module__]
    configured = module.attnzoo_config._attn_implementation
    function = home.ALL_ATTENTION_FUNCTIONS.get_interface(configured, home.eager_attention_forward)
    return function(module, query, key, value, attention_mask, **options)


class NoHeads(nn.Module):
    """What is left of a Hugging Face attention module without heads: an output projection that has only its bias.

    Args:
        layer_idx: its place in caches, or None.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.projection_name: str | None = None

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        """hidden_states (B, T, E) -> bias as (B, T, E), or (B, T, 0) where a module outside projects; and None."""
        if past_key_values is not None and self.layer_idx is not None:
            # Caches take the number of tokens from the first layer, which may be this one.
            B, T = hidden_states.shape[:2]
            counted = hidden_states.new_zeros(B, 1, T, 1)
            past_key_values.update(counted, counted, self.layer_idx)
        nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.projection_name is None:
            return nothing, None
        return getattr(self, self.projection_name)(nothing), None


def _empty(model: nn.Module, layer: AttentionLayer, inner: Any, out: nn.Linear) -> None:
    made = NoHeads(getattr(inner, "layer_idx", None))
    made.train(inner.training)
    if layer.family == "bert":
        layer.module.self = made
        return
    made.projection_name = next(name for name, child in inner.named_children() if child is out)
    made.add_module(made.projection_name, out)
    made.attnzoo_sizes, made.pruned_heads = layer.module.attnzoo_sizes, layer.module.pruned_heads
    home, _, name = layer.name.rpartition(".")
    if not name:
        raise ValueError("heads must leave at least one of a model that is a single attention module, got all of them")
    setattr(model.get_submodule(home), name, made)


def _is_pruned(module: Any) -> bool:
    """Modules whose sizes no longer fit their own family."""
    return (
        isinstance(module, NoHeads)
        or isinstance(getattr(module, "self", None), NoHeads)
        or getattr(module, "attnzoo_kv_index", None) is not None
    )


def _read_pruned(name: str, index: int, module: Any) -> AttentionLayer:
    if isinstance(module, NoHeads) or isinstance(getattr(module, "self", None), NoHeads):
        inner = module if isinstance(module, NoHeads) else None
        projection = getattr(inner, inner.projection_name or "") if inner is not None else module.output.dense
        return AttentionLayer(
            name, index, module, 0, 0, 0, 0, projection, "pruned", _qk=lambda _: [], _ov=list
        )  # fmt: skip
    reads: tuple[int, ...] = module.attnzoo_kv_index
    D, H, G = module.head_dim, len(reads), max(reads) + 1
    projection = module.o_proj if hasattr(module, "o_proj") else module.out_proj

    def qk(part: str) -> list[tuple[Tensor, Tensor]]:
        if part != "full" or getattr(module, "q_norm", None) is not None:
            raise ValueError(f"part must be 'full' for an unevenly pruned layer without query norm, got {part!r}")
        q, k = module.q_proj.weight.detach().view(H, D, -1), module.k_proj.weight.detach().view(G, D, -1)
        return [(q[h], k[g]) for h, g in enumerate(reads)]

    def ov() -> list[tuple[Tensor, Tensor]]:
        v, out = module.v_proj.weight.detach(), projection.weight.detach()
        width = out.shape[1] // H
        return [(v[g * width : (g + 1) * width], out[:, h * width : (h + 1) * width]) for h, g in enumerate(reads)]

    width = projection.in_features // H
    return AttentionLayer(
        name, index, module, H, G, D, width, projection, "pruned", _qk=qk, _ov=ov
    )  # fmt: skip


register_family("pruned", _is_pruned, _read_pruned)


# Speed


@dataclass(frozen=True)
class PruningSpeed:
    """Time of one call with heads masked and with the same heads removed, by share of heads.

    Attributes:
        fractions: of all heads.
        removed: number of heads.
        masked_ms: minimum over rounds.
        structural_ms: likewise.
        structural_noise: median over minimum of those; 1 on a quiet machine.
        tokens_per_second: of the pruned models; nan if the number of tokens was not given.
        parameters: numbers that the pruned models hold.
        error: largest difference of the outputs, over the largest output.
    """

    fractions: tuple[float, ...]
    removed: tuple[int, ...]
    masked_ms: tuple[float, ...]
    structural_ms: tuple[float, ...]
    structural_noise: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    parameters: tuple[int, ...]
    error: tuple[float, ...]

    @property
    def speedup(self) -> tuple[float, ...]:
        """Time with nothing removed over that of the pruned models; the first fraction is the reference if it is 0."""
        whole = self.structural_ms[0] if self.fractions[0] == 0 else self.masked_ms[0]
        return tuple(whole / ms for ms in self.structural_ms)


def pruning_speed(
    model: nn.Module,
    call: Callable[[nn.Module], Tensor],
    *,
    fractions: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    order: Sequence[Head] | None = None,
    tokens: int | None = None,
    rounds: int = 10,
    warmup: int = 2,
    seed: int = 0,
) -> PruningSpeed:
    """Wall-clock time of masked and of structurally pruned copies of a model.

    All cases run once a round in an order drawn anew, so that a slow spell hits them alike; the minima count. The
    model itself is left as it is; every fraction's copy is held at once.

    Args:
        model: what `prune_heads` takes.
        call: runs the model once, prefill or decoding, and returns what to compare; gradients are off.
        fractions: shares of heads to remove, from 0 to below 1 or 1.
        order: (layer, head) pairs. Default: as many in each layer, from the last head on.
        tokens: tokens that a call takes, for tokens_per_second.
        rounds: measurements of each case.
        warmup: rounds before those.
        seed: of the order.

    Raises:
        ValueError: for fractions outside [0, 1], too short an order, or rounds below 1.
    """
    if not fractions or any(not 0 <= share <= 1 for share in fractions):
        raise ValueError(f"fractions must lie between 0 and 1, got {list(fractions)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    slots = head_slots(model)
    present = slots.present()
    if order is None:
        # As many in each layer, the last ones first.
        order = [(layer, h) for h, layer in present.T.nonzero().flip(0).tolist()]
    counts = [int(int(present.sum()) * share) for share in fractions]
    if max(counts) > len(order):
        raise ValueError(f"order must name at least {max(counts)} heads, got {len(order)}")
    copies, masks, errors = [], [], []
    with evaluating(model), torch.no_grad():
        for count in counts:
            pruned = copy.deepcopy(model)
            prune_heads(pruned, order[:count])
            copies.append(pruned)
            masks.append(head_mask(order[:count], slots.shape))
        runs = {("structural", i): (made, None) for i, made in enumerate(copies)}
        runs |= {("masked", i): (model, xi) for i, xi in enumerate(masks)}  # type: ignore[misc]
        taken: dict[tuple[str, int], list[float]] = {case: [] for case in runs}
        outputs: dict[tuple[str, int], Tensor] = {}
        draw, cases = random.Random(seed), list(runs)
        for number in range(warmup + rounds):
            draw.shuffle(cases)
            for case in cases:
                ms, output = _timed(*runs[case], call)
                outputs.setdefault(case, output)
                if number >= warmup:
                    taken[case].append(ms)
    for i in range(len(counts)):
        masked = outputs["masked", i].double()
        errors.append(float((outputs["structural", i].double() - masked).abs().max() / masked.abs().max()))
    best = {case: min(values) for case, values in taken.items()}
    structural = tuple(best["structural", i] for i in range(len(counts)))
    return PruningSpeed(
        tuple(fractions), tuple(counts), tuple(best["masked", i] for i in range(len(counts))), structural,
        tuple(statistics.median(taken["structural", i]) / best["structural", i] for i in range(len(counts))),
        tuple(float("nan") if tokens is None else tokens / ms * 1e3 for ms in structural),
        tuple(sum(p.numel() for p in made.parameters()) for made in copies), tuple(errors),
    )  # fmt: skip


def _timed(model: nn.Module, xi: Tensor | None, call: Callable[[nn.Module], Tensor]) -> tuple[float, Tensor]:
    if xi is not None:
        with masked_heads(model, xi):
            return _timed(model, None, call)
    cuda = any(p.is_cuda for p in model.parameters())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = call(model)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, output
