"""Saving and loading: transformers' model type "attnzoo", whose configuration says which attention each layer has.

A model with replaced attention gets a class made from its own (`AttnzooLlamaForCausalLM` from `LlamaForCausalLM`),
whose constructor builds the model of transformers and then puts the described modules in, and a configuration of model
type "attnzoo". A folder holds no code and names only attnzoo's public mechanisms.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import attnzoo
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning.hugging_face import PRUNABLE, prune_module
from attnzoo.hugging_face.families import family_of
from attnzoo.hugging_face.installation import install, modules

MODEL_TYPE = "attnzoo"


def adopt(model: nn.Module) -> None:
    """Give a model whose attention was replaced, and its configuration, the classes that are saved and loaded.

    The configuration then describes the modules that are there now. Every call describes them again. A
    `quantization_config` is dropped, since the weights are plain ones by now.
    """
    for each in _models(model):
        config, cls = each.config, type(each)
        if not issubclass(cls, SavedModel):
            if not isinstance(config, SavedConfig):
                base = type(config)
                config.__class__ = config_class_of(base)
                config.base_model_type, config.base_architecture = base.model_type, cls.__name__
            each.__class__ = _listed(model_class_of(cls, type(config)), config)
        config.attnzoo_version = attnzoo.__version__
        config.attnzoo_layers = {name: described(name, attn) for name, attn in modules(each.base_model)}
        known = {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
        config.attnzoo_settings = copy.deepcopy(known)
        if getattr(each, "hf_quantizer", None) is not None:
            each.hf_quantizer = None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    _mark_parts(model)


def _mark_parts(model: nn.Module) -> None:
    """Give models inside that have a configuration of their own a class that is saved alone with its attention."""
    whole = {id(each) for each in _models(model)}
    for each in model.modules():
        made = isinstance(each, SavedModel | SavedPart)
        if isinstance(each, PreTrainedModel) and id(each) not in whole and not made and modules(each):
            each.__class__ = _listed(part_class_of(type(each)), each.config)


def release(model: nn.Module) -> None:
    """Give a model and its configuration their own classes back, as `restore` does when no layer is left.

    Layers that are still replaced are described again instead.
    """
    for each in model.modules():
        if isinstance(each, SavedModel | SavedPart) and not modules(each):
            each.__class__ = each.base_class
            config: Any = each.config
            if isinstance(config, SavedConfig):
                for name in SavedConfig.__annotations__:
                    config.__dict__.pop(name, None)
                config.__class__ = config.base_class
    adopt(model)


def _models(model: nn.Module) -> Iterator[Any]:
    """Models of transformers with replaced attention, without those inside that have a configuration of their own."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and modules(module):
            around = (model.get_submodule(name[:end]) for end in range(len(name)) if end == 0 or name[end] == ".")
            if all(outer.config is module.config for outer in around if isinstance(outer, PreTrainedModel)):
                yield module


def described(name: str, attn: nn.Module) -> dict[str, Any]:
    """What a configuration says of a layer."""
    try:
        description = attnzoo.describe(attn)
    except ValueError as error:
        raise ValueError(f"layer {name!r} cannot be saved: {error}") from error
    # What can run is a matter of the machine, not of the model.
    for options in (description["arguments"], later := description.get("set", {})):
        options.pop("backend", None)
    if not later:
        description.pop("set", None)
    return description


# Classes


class _Made:
    """A class made on demand: its objects are pickled by the class that it was made from."""

    base_class: type[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.base_class, getattr(type(self), "config_base", None)), self.__dict__


def _unpickled(base: type[Any], config_base: type[Any] | None) -> Any:
    cls: Any = config_class_of(base if config_base is None else config_base)
    if config_base is not None:
        cls = model_class_of(base, cls)
    return cls.__new__(cls)


def _unpickled_part(base: type[Any]) -> Any:
    cls: Any = part_class_of(base)
    return cls.__new__(cls)


REFUSED = "attnzoo: import attnzoo.hugging_face, and load this folder with an Auto class"
"""In place of a number in the file of a configuration: transformers' own classes refuse it, and ignore no attention."""
NUMBER = "initializer_range"
"""That number, which every family has and only new weights need; the file has it under another name."""
SETTINGS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "layer_types", "sliding_window",
    "attention_bias", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_dropout", "attn_pdrop",
    "attention_probs_dropout_prob",
)  # fmt: skip
"""Attributes of configurations that describe attention, as the descriptions of the layers do in their place."""


class SavedConfig(_Made):
    """What the configurations of model type "attnzoo" have in common.

    Attributes:
        base_model_type: of the configuration that it was made from.
        base_architecture: name of the class of the model that was replaced.
        attnzoo_layers: from the name of an attention module, below the model without its head, to what
            `attnzoo.describe` says.
        attnzoo_settings: what the configuration said of attention then, which nothing reads any more.
        attnzoo_version: of the package that wrote it.
    """

    base_model_type: str
    base_architecture: str
    attnzoo_layers: dict[str, Any]
    attnzoo_settings: dict[str, Any]
    attnzoo_version: str

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As transformers', but its own classes cannot read the file: they would leave out the attention."""
        settings = json.loads(self.to_json_string(use_diff))  # type: ignore[attr-defined]
        for each in self._with_inner(settings):
            if NUMBER in each:
                each[f"base_{NUMBER}"] = each[NUMBER]
            each[NUMBER] = REFUSED
        Path(json_file_path).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', and of what `to_json_file` wrote."""
        config_dict = copy.deepcopy(config_dict)
        for each in cls._with_inner(config_dict):
            if isinstance(each.get(NUMBER), str):
                del each[NUMBER]
                if f"base_{NUMBER}" in each:
                    each[NUMBER] = each.pop(f"base_{NUMBER}")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def _with_inner(cls, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Settings and those of the configurations inside."""
        inside = (settings.get(name) for name in cls.sub_configs)  # type: ignore[attr-defined]
        return [settings, *(each for each in inside if isinstance(each, dict))]


class SavedModel(_Made):
    """What the models of model type "attnzoo" have in common."""

    config: Any
    base_model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _check_settings(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # Some heads have a base model that an Auto class made, with these layers in it.
        if not modules(self.base_model):
            _prune(self, getattr(config, "attnzoo_pruned_heads", None) or {})  # type: ignore[arg-type]
            for name, description in config.attnzoo_layers.items():
                _put(self.base_model, name, description)
        for each in _models(self):  # type: ignore[arg-type]
            if not isinstance(each, SavedModel):
                each.__class__ = _listed(model_class_of(type(each), type(config)), config)
        _mark_parts(self)  # type: ignore[arg-type]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers', without frequencies: the configuration has them, as numbers that no dtype rounds."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        for name in [name for name in state if name.endswith(".rope_inv_freq")]:
            del state[name]
        return state

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the attention modules described as they are now."""
        adopt(self)  # type: ignore[arg-type]
        # Names of weights in older files go with a model type, and this one has none.
        return super().save_pretrained(*args, **{**kwargs, "save_original_format": False})  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but raises where the weights of the layers are not all there.

        Raises:
            ValueError: if the folder's weights and configuration do not belong together.
        """
        wanted = kwargs.pop("output_loading_info", False)
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        # The list that the layer is in: blocks with attention of transformers' own are checked as well.
        layers = tuple(re.split(r"(?<=\.)\d+\.", name)[0] for name, _ in modules(model))
        for what, keys in (("missing", found["missing_keys"]), ("unknown", found["unexpected_keys"])):
            if wrong := sorted(key for key in keys if key.startswith(layers)):
                raise ValueError(
                    f"the weights do not fit the {cls.__name__} that config.json describes: {len(wrong)} of its layers "
                    f"are {what}, such as {wrong[0]}"
                )
        return (model, found) if wanted else model


class SavedPart(_Made):
    """What models with replaced attention have in common that are part of another one, with its own configuration."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_part, (self.base_class,), self.__dict__

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As a model of model type "attnzoo", which the part is without the model around it."""
        alone: Any = copy.copy(self)
        alone.config = copy.deepcopy(alone.config)
        alone.__class__ = self.base_class
        adopt(alone)
        return alone.save_pretrained(*args, **kwargs)


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` for functions of classes, which mypy does not take for hashable."""
    return cache(make)


@_once
def config_class_of(base: Any) -> Any:
    """The configuration of model type "attnzoo" made from a class; the Auto classes that know that class know it."""
    own: Any = type(f"Attnzoo{base.__name__}", (SavedConfig, base), _names(base) | {"model_type": MODEL_TYPE})
    _register(own)
    return own


def _register(own: Any) -> None:
    """Tell the Auto classes that know the class of a configuration by now which model goes with it."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        model = None if mapping is None else mapping.get(own.base_class, None)
        if isinstance(model, type) and issubclass(model, PreTrainedModel):
            auto.register(own, model_class_of(model, own), exist_ok=True)


@_once
def model_class_of(base: Any, config_class: Any) -> Any:
    """The class of a model with replaced attention, made from the class that transformers has for it."""
    names = _names(base) | {"config_class": config_class, "config_base": config_class.base_class}
    return type(f"Attnzoo{base.__name__}", (SavedModel, base), names)


@_once
def part_class_of(base: Any) -> Any:
    """The class of a model with replaced attention inside another model that has another configuration."""
    return type(f"Attnzoo{base.__name__}", (SavedPart, base), _names(base))


def _names(base: type[Any]) -> dict[str, Any]:
    return {"base_class": base, "__module__": __name__, "__doc__": f"`{base.__name__}` with attnzoo's attention."}


def _listed(cls: Any, config: Any) -> Any:
    """The class, known to transformers: its constructor lists by class which outputs can be recorded."""
    PreTrainedModel.__init__(cls.__new__(cls), copy.copy(config))
    return cls


# Loading


class AttnzooConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The entry of AutoConfig for model type "attnzoo"."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a folder describes, of a class made from that of its base model.

        Raises:
            ValueError: for an unknown base model, an attention that is described wrongly, or a later version.
        """
        kind, layers = config_dict.get("base_model_type"), config_dict.get("attnzoo_layers")
        if not isinstance(kind, str) or kind == MODEL_TYPE or kind not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type must be a model type of transformers, got {kind!r:.80}")
        if not (isinstance(layers, dict) and layers and all(isinstance(layer, dict) for layer in layers.values())):
            raise ValueError(f"attnzoo_layers must map names of layers to descriptions, got {layers!r:.80}")
        _check_version(config_dict.get("attnzoo_version"))
        own = config_class_of(CONFIG_MAPPING[kind])
        _register(own)  # again: its classes may be younger than this one
        return own.from_dict(config_dict, **kwargs)


def _check_version(version: Any) -> None:
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if not major.isdecimal() or int(major) > int(attnzoo.__version__.partition(".")[0]):
        raise ValueError(
            f"attnzoo_version must be at most that of the package, {attnzoo.__version__}, got {version!r:.80}: install "
            "a newer attnzoo"
        )


def _check_settings(config: Any) -> None:
    """Refuse settings of attention that were changed after its layers were described, since they would do nothing."""
    saved = getattr(config, "attnzoo_settings", {})
    if not isinstance(saved, dict):
        raise ValueError(f"attnzoo_settings must map names of settings to values, got {saved!r:.80}")
    for name in SETTINGS:
        if name in saved and getattr(config, name, None) != saved[name]:
            raise ValueError(
                f"{name} must be {saved[name]!r:.80} as it was saved, got {getattr(config, name, None)!r:.80}: "
                "attnzoo_layers describes the attention; attnzoo.hugging_face.modules lists what can be changed instead"
            )


def _prune(model: nn.Module, heads: Any) -> None:
    """Remove the heads that were removed from a model before its attention was replaced, for `restore`."""
    if not isinstance(heads, dict) or not all(str(index).isdecimal() for index in heads):
        raise ValueError(f"attnzoo_pruned_heads must map numbers of layers to heads, got {heads!r:.80}")
    layers = attention_layers(model) if heads else []
    for index, numbers in heads.items():
        if int(index) >= len(layers) or layers[int(index)].family not in PRUNABLE:
            raise ValueError(f"attnzoo_pruned_heads must name layers whose heads can be pruned, got {index}")
        prune_module(model, layers[int(index)], numbers)


def _put(model: nn.Module, name: str, description: Mapping[str, Any]) -> None:
    """Put a described module at the place of an attention module."""
    try:
        original = model.get_submodule(name)
    except AttributeError:
        original = model
    if not type(original).__name__.endswith("Attention") and family_of(original) is None:
        raise ValueError(f"attnzoo_layers must name attention modules of {type(model).__name__}, got {name!r:.80}")
    try:
        attn = attnzoo.build(description)
    except ValueError as error:
        raise ValueError(f"attnzoo_layers: {name}: {error}") from error
    install(model, name, attn)


AutoConfig.register(MODEL_TYPE, AttnzooConfig)
