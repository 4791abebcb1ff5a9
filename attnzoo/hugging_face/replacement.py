"""Attention modules of a transformers model exchanged for attnzoo's, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.diagnostics.configs import configs_in, own_configs
from attnzoo.hugging_face.families import FAMILIES, family_of, heads_left
from attnzoo.hugging_face.installation import (
    attention_names,
    check_merged,
    check_weights,
    holders,
    install,
    modules,
    outside,
    unguard,
)
from attnzoo.hugging_face.layer import HOOKS, AttentionLayer, every_module
from attnzoo.hugging_face.saving import adopt, described, release
from attnzoo.hugging_face.verification import verify as check_equal
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention

__all__ = ["attention_names", "install", "modules", "read_layers", "replace", "restore"]


def replace(
    model: Any, *, layers: Sequence[int] | None = None, backend: str = "auto", verify: bool | Mapping[str, Any] = True
) -> Any:
    """Replace the attention of a transformers model by attnzoo modules that compute the same, in place.

    Weights are taken over, and copied only where the layout has to change. Cross-attention, layers that share keys and
    values with others, and what is not attention are left alone. Nothing changes if anything fails.

    Args:
        model: a PreTrainedModel with attention of a known class; see `register_family`.
        layers: which attention layers, by their numbers. Default: all.
        backend: of the new modules.
        verify: run the model on two short rows of random ids, one of them padded, and on one of them without padding,
            and compare each new layer with the old one in float32. A mapping holds the model's keyword arguments for
            the only run, where it takes no ids; False skips it.

    Returns:
        The model.

    Raises:
        ValueError: if a layer cannot be replaced, with its name and the reason.
    """
    names = attention_names(model, layers)
    new = [name for name in names if not isinstance(model.get_submodule(name), AttentionLayer)]
    put_in(model, read_layers(model, new, backend=backend, verify=verify))
    return model


def put_in(model: Any, attns: Mapping[str, nn.Module]) -> None:
    """Install modules at the places of these names, and let the models around them describe them when they are saved.

    Raises:
        ValueError: for a module that cannot be described; the model is left as it is.
    """
    for name, attn in attns.items():
        described(name, attn)
    whole = holders(model)
    own_configs(module for each in whole for module in every_module(each))
    for name, attn in attns.items():
        install(model, name, attn)
    for each in whole:
        adopt(each)


def read_layers(
    model: Any, names: Sequence[str], *, backend: str = "auto", verify: bool | Mapping[str, Any] = True
) -> dict[str, nn.Module]:
    """attnzoo modules that compute what the attention modules of these names do; the model is left as it is.

    A layer that was replaced before gives its module as it is. The others share their parameters with the model, where
    the layout allows it. Arguments and errors as in `replace`.
    """
    check_name(backend)
    if not isinstance(verify, bool | Mapping):
        raise ValueError(f"verify must be True, False or a mapping of the model's arguments, got {verify!r}")
    read: dict[str, nn.Module] = {}
    new: dict[str, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, AttentionLayer):
            read[name] = module.attn
        else:
            read[name] = new[name] = _read(model, name, backend)
    if new and verify is not False:
        projections = {name: outside(model, name) for name in new}
        check_equal(model, new, None if verify is True else verify, projections)
    return read


def _read(model: Any, name: str, backend: str) -> nn.Module:
    """The attnzoo module of one layer, with its weights."""
    module, family = model.get_submodule(name), family_of(model.get_submodule(name))
    assert family is not None
    projection = outside(model, name)
    if projection is not None:
        check_weights(name, projection)
    holder = model.get_submodule(name.rpartition(".")[0])
    left, kind = heads_left(module, holder), type(module).__name__
    try:
        attn, state = family.read(module, holder)
        if left is not None and getattr(attn, "heads", None) != left:
            raise ValueError("its reader does not know them")
        trains = any(parameter.requires_grad for parameter in module.parameters())
        _load(attn, state, trains)
    except (ValueError, AttributeError, KeyError, RuntimeError) as error:
        pruned = "" if left is None else f" with pruned heads {list(left.pruned)}"
        raise ValueError(f"layer {name!r}: {kind}{pruned} cannot be read: {error}") from error
    attn.backend = backend  # type: ignore[assignment]
    return attn.train(module.training)


def restore(model: Any) -> Any:
    """Put transformers' own attention modules back, with the weights as they are now, in place.

    For models whose attention their own classes can express: after `replace`, after training, and, in families with
    separate or fused projections of grouped heads, with fewer key/value heads. Nothing changes if anything fails.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no attention of attnzoo, or a layer that its class cannot express.
    """
    attns = dict(modules(model))
    if not attns:
        raise ValueError(f"model must have attention of attnzoo to be restored, got {type(model).__name__}")
    for name, attn in attns.items():
        check_merged(name, attn)
    whole = holders(model)
    with _groups_in_config(model, attns, whole):
        built = {
            name: _written(name, model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]))
            for name in attns
        }
    for name, (module, projection) in built.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        path = FAMILIES[type(module).__name__].projection
        if path is not None and projection is not None:
            holder.set_submodule(path, projection)
        holder.set_submodule(name.rpartition(".")[2], module)
    for each in whole:
        unguard(each)
        release(each)
    return model


@contextmanager
def _groups_in_config(model: Any, attns: Mapping[str, Any], whole: Sequence[nn.Module]) -> Iterator[None]:
    """The number of key/value heads as the layers have it now in the model's configurations, unless the block fails."""
    undo, key = own_configs(module for each in whole for module in every_module(each)), "num_key_value_heads"
    try:
        # Classes that do not share key/value heads may have a configuration that says otherwise.
        layers = [layer for layer in map(model.get_submodule, attns) if hasattr(layer.skeleton, "num_key_value_groups")]
        configs = {id(layer.config): layer.config for layer in layers}
        known = [config for config in configs.values() if getattr(config, key, None) is not None]
        groups = {_groups_made(layer.attn) for layer in layers}
        if any({getattr(config, key)} != groups for config in known) and (
            len(groups) > 1 or len(attns) < len(attention_names(model))
        ):
            raise ValueError(
                f"model must have one number of key/value heads in all layers to be restored, got {sorted(groups)} in "
                f"{len(attns)} of them"
            )
        for config in known:
            setattr(config, key, next(iter(groups)))
        yield
    except BaseException:
        undo()
        raise


def _groups_made(attn: Any) -> int:
    """Key/value heads that a layer was made with, before pruning."""
    number: int = attn.heads.total // attn.heads.group_size if attn.pruned_heads else attn.num_kv_heads
    return number


def _written(name: str, layer: Any, holder: Any) -> tuple[nn.Module, nn.Module | None]:
    """The module of transformers with the weights of a layer, and its last projection where that is outside."""
    attn, kind = layer.attn, type(layer.skeleton).__name__
    family = FAMILIES.get(kind)
    if family is None or family.write is None:
        raise ValueError(f"layer {name!r}: {kind} has no way back; register_family(write=...) teaches it")
    left, heads = heads_left(layer.skeleton, holder), getattr(attn, "heads", None)
    if getattr(attn, "pruned_heads", ()) and heads != left:
        raise ValueError(
            f"layer {name!r}: {kind} cannot express this {type(attn).__name__}: heads {list(attn.pruned_heads)} are "
            f"pruned now, and {[] if left is None else list(left.pruned)} were when it was replaced"
        )
    module = copy.deepcopy(layer.skeleton, configs_in(layer.skeleton))
    try:
        state = dict(attn.state_dict(keep_vars=True))
        trains = any(parameter.requires_grad for parameter in attn.parameters())
        _fill(module, family.write(state, module), attn, trains)
        around: Any = attn.o_proj
        for part in reversed([] if family.projection is None else family.projection.split(".")):
            around = SimpleNamespace(**{part: around}, attnzoo_heads=left)
        again, numbers = family.read(module, around)
        if _facts(again) != _facts(attn) or {k: t.shape for k, t in numbers.items()} != {
            k: t.shape for k, t in state.items()
        }:
            raise ValueError("its options or weights are others")
    except (ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(f"layer {name!r}: {kind} cannot express this {type(attn).__name__}: {error}") from error
    for hooks in HOOKS:
        setattr(module, hooks, getattr(layer, hooks))
    module.train(attn.training)
    return module, None if family.projection is None else attn.o_proj


def _fill(module: nn.Module, state: Mapping[str, Tensor], attn: Any, trains: bool) -> None:
    """Give a module on the meta device these parameters, and the sizes that go with them."""
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        owner = module.get_submodule(path)
        if getattr(owner, leaf).shape != tensor.shape:
            setattr(owner, leaf, nn.Parameter(torch.empty_like(tensor, device="meta")))
            if isinstance(owner, nn.Linear) and leaf == "weight":
                owner.out_features, owner.in_features = tensor.shape
    # Where pruning left uneven groups, keys are gathered for each query head.
    size = attn.num_heads // attn.num_kv_heads if attn.heads.is_regular else 1
    for name, count in (("num_key_value_heads", attn.num_kv_heads), ("num_key_value_groups", size)):
        if hasattr(module, name):
            setattr(module, name, count)
    _load(module, state, trains)


def _load(module: nn.Module, state: Mapping[str, Tensor], trains: bool) -> None:
    """Parameters become those of the module, other tensors parameters of their own."""
    own = {
        key: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().contiguous().clone(), trains)
        for key, tensor in state.items()
    }
    for key, parameter in module.named_parameters():
        # load_state_dict gives the parameters that it assigns this flag.
        parameter.requires_grad_(own[key].requires_grad if key in own else True)
    module.load_state_dict(own, assign=True)


_GROUPED = (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention)


def _facts(attn: Any) -> dict[str, Any]:
    """What a module computes beside its weights."""
    left_out = (
        "backend", "dropout", "init", "init_std", "absorb", "made_with", "training", "aux_loss", "routing", "depth",
    )  # fmt: skip
    facts = {name: value for name, value in vars(attn).items() if not name.startswith("_") and name not in left_out}
    kind = GroupedQueryAttention if type(attn) in _GROUPED else type(attn)
    return {**facts, "class": kind, "eps": [m.eps for m in attn.modules() if isinstance(m, nn.RMSNorm)]}
