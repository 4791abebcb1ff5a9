"""Removing heads of a whole model for good.

The mechanisms of this library prune themselves; `hugging_face` prunes Hugging Face modules. Deleting a head's rows and
columns computes what masking it computes, up to the order of sums. In a mixture of heads or of experts it is not a
mask: the router then chooses among the rest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attnzoo.diagnostics.arguments import check_choice, pairs_of
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.diagnostics.pruning.evaluate import evaluating
from attnzoo.diagnostics.pruning.hugging_face import PRUNABLE, check_prunable, prune_module
from attnzoo.diagnostics.pruning.masks import UNITS, Head
from attnzoo.diagnostics.pruning.trial import Trial, rehearse
from attnzoo.rules import SWITCH, check


def prune_heads(
    model: nn.Module, heads: Mapping[int, Iterable[int]] | Iterable[Head], *, unit: str = "head",
    allow_inexact: bool = False,
) -> None:  # fmt: skip
    """Remove heads of a model in place; the rest computes what it did with these heads masked.

    Numbers are always original ones, and calls add up. A key/value head is removed with the last query head that reads
    it; groups may become uneven. A layer without heads returns its output projection's bias. Optimisers and caches have
    to be recreated. A pruned state dict loads into a new model after `prune_heads(new, pruned_heads(old))`, a Hugging
    Face model that was saved by `save_pretrained` with `load_pruned`. If any layer cannot be pruned, the model is
    unchanged.

    Hugging Face layers are tried: pruned copies against masked ones, then the whole model, also over a cache, on a few
    tokens (an image, a sound) where it takes those alone. A model that raises or differs is restored.

    Args:
        model: a model of this library's mechanisms, or a Hugging Face model: with separate query, key, value and output
            projections (Llama, Mistral, Qwen, Gemma, ViT, Whisper, BERT, DistilBERT and relatives), or with one
            fused projection (GPT-2, GPT-NeoX).
        heads: {layer: heads} or (layer, head) pairs, such as the start of a pruning curve's order. Layers count as in
            `attention_layers`. Mixtures of attention heads remove experts by these numbers.
        unit: "head", or "kv_group" for numbers of key/value heads with all their query heads.
        allow_inexact: prune even if a norm runs over the queries or keys of all heads together, although this changes
            the remaining heads.

    Raises:
        ValueError: for an unknown unit; a number that is not an integer, out of range, repeated, or already removed; a
            joint norm; a model whose attention is of another kind, or one that would not compute what masking computes.
    """
    check_choice("unit", unit, UNITS)
    check("allow_inexact", allow_inexact, SWITCH)
    layers = attention_layers(model)
    wanted: dict[int, list[int]] = {}
    for index, head in pairs_of("heads", heads):
        if not 0 <= index < len(layers):
            raise ValueError(f"heads must name layers from 0 to {len(layers) - 1}, got {index}")
        wanted.setdefault(index, []).append(head)
    if unit == "kv_group":
        wanted = {index: _of_groups(layers[index], groups) for index, groups in wanted.items()}
    for index, numbers in wanted.items():
        mechanism = copy.deepcopy(layers[index].mechanism)
        if mechanism is not None:
            mechanism.prune_heads(numbers)
        else:
            check_prunable(layers[index], numbers, allow_inexact)
            if layers[index].num_heads:
                rehearse(layers[index], numbers, allow_inexact)
    _remove(model, layers, wanted, allow_inexact)


def _remove(model: nn.Module, layers: list[AttentionLayer], wanted: dict[int, list[int]], allow_inexact: bool) -> None:
    """Remove heads that have been checked, and try the transformers models that hold them."""
    foreign = {index: numbers for index, numbers in wanted.items() if layers[index].mechanism is None}
    with evaluating(model):
        trial = Trial(model, [layers[index] for index in foreign], list(foreign.values()))
        try:
            for index, numbers in foreign.items():
                prune_module(model, layers[index], numbers)
            trial.check(compare=not allow_inexact)
            trial.record()
        except BaseException:  # A user's interrupt too must not leave some heads gone.
            trial.undo()
            raise
    for index, numbers in wanted.items():
        mechanism = layers[index].mechanism
        if mechanism is not None:
            mechanism.prune_heads(numbers)


def load_pruned(folder: str | Path, **options: Any) -> nn.Module:
    """A pruned transformers model that was saved with its `save_pretrained`.

    The configuration names the heads that are gone (`attnzoo_pruned_heads`) and otherwise keeps its sizes, so
    `from_pretrained` alone refuses such a folder for weights of other shapes.

    Args:
        folder: a local folder; code in it is not run.
        options: of the model class's `from_pretrained`, such as dtype.

    Raises:
        ValueError: if the folder holds no pruned model of transformers' own classes, or weights that are missing.
    """
    import transformers

    try:
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        heads, (name, *_) = settings.get("attnzoo_pruned_heads") or {}, settings.get("architectures") or [""]
        wanted = {int(index): [int(head) for head in numbers] for index, numbers in heads.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"folder must hold a readable config.json, got {folder}: {error}") from None
    # A class of transformers itself, so that no code of the folder is run.
    base: Any = getattr(transformers, str(name), None)
    if not wanted or not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise ValueError(
            f"folder must hold a model of transformers that prune_heads has pruned, got {name} in {folder}"
        )

    def init(self: Any, *args: Any, **keywords: Any) -> None:
        base.__init__(self, *args, **keywords)
        layers = attention_layers(self)
        for index, numbers in wanted.items():
            if not 0 <= index < len(layers) or layers[index].family not in PRUNABLE:
                raise ValueError(f"attnzoo_pruned_heads of {folder} must name layers that can be pruned, got {index}")
            prune_module(self, layers[index], numbers)

    # The class's own loader then finds parameters of the shapes that were saved.
    cls = type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
    model, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)  # type: ignore[attr-defined]
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing:
        raise ValueError(f"folder must hold exactly the weights of {name}, got {folder} without or beside {missing[0]}")
    model.__class__ = base
    return model  # type: ignore[no-any-return]


def pruned_heads(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Original numbers of the heads that have been removed, by layer; layers that have all of theirs are left out.

    For mixtures of attention heads these are numbers of experts.
    """
    removed = {layer.index: _removed(layer) for layer in attention_layers(model)}
    return {index: heads for index, heads in removed.items() if heads}


def _removed(layer: AttentionLayer) -> tuple[int, ...]:
    # A mixture of attention heads prunes experts, which its layout of heads does not know.
    return layer.heads.pruned if layer.mechanism is None else layer.mechanism.pruned_heads


def _of_groups(layer: AttentionLayer, groups: list[int]) -> list[int]:
    """Original numbers of the query heads of these key/value heads."""
    size = layer.heads.group_size
    count = layer.heads.total // size
    removed = set(_removed(layer))
    heads = []
    for group in groups:
        if not 0 <= group < count:
            raise ValueError(f"heads must name key/value heads from 0 to {count - 1}, got {group}")
        of_group = range(group * size, (group + 1) * size)
        # Some of a group's query heads may have been removed; for a removed group, its own numbers raise the error.
        heads += [h for h in of_group if h not in removed] or list(of_group)
    return heads
