"""A comparison of mechanisms: its settings, its runs (one for each mechanism and seed), and what is held equal."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from attnzoo.costs import cache_bytes
from attnzoo_recipes.allowlist import ALLOWED, check_import, check_settings, enforce
from attnzoo_recipes.lm import default_mlp_dim
from attnzoo_recipes.model_config import build_model, describe_attention

MATCHES = ("params", "flops", "none")
VARIED = ("attention", "feed_forward")
_SWIGLU = {"class_path": "attnzoo_recipes.feed_forward.SwiGLU"}
_FEED_FORWARD = ("feed_forward", "sparse_feed_forward", "sparse_every", "parallel")
EQUAL = {
    "params": "parameters of the whole model, to 0.2 %, through the MLP's hidden width",
    "flops": "training FLOPs per token, to 0.2 %, through the MLP's hidden width",
    "none": "the MLP's hidden width: parameters and FLOPs differ with the mechanism",
    "feed_forward": "the attention: parameters and FLOPs differ with the feed-forward layer",
}


@dataclass(frozen=True)
class Settings:
    """What is compared, and how.

    Args:
        configs: config files by the name of the mechanism.
        seeds: number of runs of each mechanism; run s draws weights and data order from seed s for every mechanism.
        match: what is held equal to the first mechanism besides data, schedule and sizes: "params", "flops" or
            "none". The MLP's hidden width is adjusted for it.
        out: folder of the results; a run that is finished there is not repeated.
        train: settings over configs/pretrain.yaml, by section: model, data, trainer, checkpoints, ...
        allowed: packages that configs and checkpoints may name.
        vary: what a mechanism is, "attention" or "feed_forward". Feed-forward layers are not matched, since not all of
            them have a width.

    Raises:
        ValueError: for an argument outside its rule.
    """

    configs: Mapping[str, str]
    seeds: int
    match: str
    out: Path
    train: Mapping[str, Any]
    allowed: tuple[str, ...] = ALLOWED
    vary: str = "attention"

    @property
    def equal(self) -> str:
        """Key of what is held equal, in `EQUAL`."""
        return self.match if self.vary == "attention" else self.vary

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms."""
        return tuple(self.configs)

    @classmethod
    def checked(
        cls,
        mechanisms: list[str] | str,
        seeds: int,
        match: str | None,
        out: str,
        train: Mapping[str, Any],
        allowed: Iterable[str] = ALLOWED,
        vary: str = "attention",
    ) -> Settings:
        """Settings from those of a command line.

        `mechanisms` is a list, or words with commas between. Each is the NAME of a file configs/attention/NAME.yaml
        (configs/feed_forward/NAME.yaml if these vary), or the path of a YAML file of the same form, whose stem is the
        mechanism's name. `match` is by default "params", or "none" where feed-forward layers vary.
        """
        if vary not in VARIED:
            raise ValueError(f"vary must be one of {', '.join(VARIED)}, got {vary!r}")
        if match is None:
            match = "params" if vary == "attention" else "none"
        given = mechanisms.split(",") if isinstance(mechanisms, str) else list(mechanisms)
        words = [word.strip() for word in given if word.strip()]
        names = [Path(word).stem if _is_file_name(word) else word for word in words]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"mechanisms must name at least one mechanism, and each once, got {names}")
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
        if vary == "feed_forward" and match != "none":
            raise ValueError(f"match must be none where feed-forward layers vary, got {match!r}")
        sections = {"model", "data", "trainer", "checkpoints", "loss_guard", "samples"}
        unknown = sorted(set(train) - sections)
        if unknown:
            raise ValueError(f"train must hold sections {', '.join(sorted(sections))}, got {unknown[0]!r}")
        files = [word if _is_file_name(word) else f"{vary}/{word}.yaml" for word in words]
        return cls(dict(zip(names, files, strict=True)), seeds, match, Path(out), train, tuple(allowed), vary)


def _is_file_name(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Plan:
    """One mechanism in the common model.

    Attributes:
        mechanism: its name.
        attention: its description, {"class_path", "init_args"}.
        mlp_dim: hidden width of the MLP; None where feed-forward layers vary.
        parameters: of the whole model.
        flops_per_token: training FLOPs per token, three times those of the forward pass.
        cache_bytes_per_token: of all layers in bfloat16; a state that does not grow is divided by the T tokens.
        feed_forward: the model's settings that say what its feed-forward layers are, where they vary.
    """

    mechanism: str
    attention: Mapping[str, Any]
    mlp_dim: int | None
    parameters: int
    flops_per_token: int
    cache_bytes_per_token: int
    feed_forward: Mapping[str, Any] | None = None


def attention_of(config: Path, allowed: Iterable[str] = ALLOWED) -> Mapping[str, Any]:
    """The description in the config file of a mechanism.

    Raises:
        ImportRefusedError: for an import path outside `allowed`.
        ValueError: if the file has no description, or anything else, which would not be equal between mechanisms.
    """
    content = _read(config)
    try:
        description = content["model"]["attention"]
        class_path = str(description["class_path"])
    except (KeyError, TypeError):
        raise ValueError(f"{config} must hold model.attention.class_path") from None
    others = [name for name in content if name != "model"]
    others += [f"model.{name}" for name in content["model"] if name != "attention"]
    others += [f"model.attention.{name}" for name in description if name not in ("class_path", "init_args")]
    if others:
        raise ValueError(
            f"{config} must hold nothing but class_path and init_args of model.attention, since everything else is "
            f"equal between mechanisms, got {', '.join(others)}"
        )
    check_import(class_path, allowed, str(config))
    check_settings(description, allowed, str(config))
    return {"class_path": class_path, "init_args": description.get("init_args") or {}}


def feed_forward_of(config: Path, allowed: Iterable[str] = ALLOWED) -> Mapping[str, Any]:
    """The settings of the model in the config file of a feed-forward layer, as `build_model` takes them.

    Raises:
        ImportRefusedError: for an import path outside `allowed`.
        ValueError: if the file has none, or anything else, which would not be equal between mechanisms.
    """
    content = _read(config)
    model = content.get("model") if isinstance(content, dict) and list(content) == ["model"] else None
    if not isinstance(model, dict) or not model or any(name not in _FEED_FORWARD for name in model):
        raise ValueError(f"{config} must hold nothing but {', '.join(_FEED_FORWARD)} of model")
    check_settings(model, allowed, str(config))
    settings = dict(model)
    for name in ("feed_forward", "sparse_feed_forward"):
        layer = settings.get(name)
        if layer is not None:
            if not isinstance(layer, dict) or not isinstance(layer.get("class_path"), str):
                raise ValueError(f"{config} must hold model.{name}.class_path")
            settings[name] = {"class_path": layer["class_path"], "init_args": layer.get("init_args") or {}}
    return settings


def _read(config: Path) -> Any:
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{config} must be YAML in UTF-8: {error}") from error


def _described(attention: Mapping[str, Any], allowed: Iterable[str], where: str) -> dict[str, Any]:
    """The description of a config as a checkpoint has it: defaults added, and classes of settings gone."""
    from jsonargparse import ArgumentError, ArgumentParser

    check_settings(attention, allowed, where)
    enforce(allowed)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attention", type=Callable[[int], nn.Module])
    try:
        parsed = parser.parse_object({"attention": dict(attention)})
    except ArgumentError as error:
        raise ValueError(f"the attention {dict(attention)} of {where} cannot be built: {error}") from error
    return describe_attention(parser.instantiate_classes(parsed).attention)


_MEASURES: dict[str, Callable[[Plan], int]] = {
    "params": lambda plan: plan.parameters,
    "flops": lambda plan: plan.flops_per_token,
}


def plan(
    attentions: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    vocab_size: int,
    tokens: int,
    match: str,
    allowed: Iterable[str] = ALLOWED,
) -> list[Plan]:
    """Choose the MLP width of each mechanism so that what `match` says is equal to that of the first mechanism.

    Args:
        attentions: description by mechanism.
        model: the section `model` of the training config.
        vocab_size: of the tokenizer.
        tokens: T of a sample, for the FLOPs.
        match: one of MATCHES.
        allowed: packages that descriptions may name.

    Raises:
        ValueError: if a mechanism cannot be built, lacks what a decoder needs of it, or is so large that nothing is
            left for its MLP; if the model's feed-forward layer has no such width.
    """
    layer, sparse = model.get("feed_forward", _SWIGLU), model.get("sparse_feed_forward")
    if layer is None or sparse is not None or not layer["class_path"].endswith(".SwiGLU"):
        name = (sparse or layer or {"class_path": "null"})["class_path"]
        raise ValueError(f"feed_forward must be SwiGLU, whose width is chosen, where the attention varies, got {name}")
    sizes = _sizes(model) | {"parallel": model.get("parallel", False)}
    first = model.get("mlp_dim") or default_mlp_dim(sizes["embed_dim"])
    measure = _MEASURES.get(match, _MEASURES["params"])
    plans: list[Plan] = []
    for name, attention in attentions.items():
        described = _described(attention, allowed, f"mechanism {name}")

        def planned(
            mlp_dim: int,
            name: str = name,
            attention: Mapping[str, Any] = attention,
            described: Mapping[str, Any] = described,
        ) -> Plan:
            config = {"vocab_size": vocab_size, "attention": described, "mlp_dim": mlp_dim, **sizes}
            return Plan(name, attention, mlp_dim, *_costs(config, tokens, allowed, f"mechanism {name}"))

        narrow = planned(first)
        if plans and match != "none":
            wide = planned(first + 64)
            slope = (measure(wide) - measure(narrow)) / 64
            mlp_dim = first + round((measure(plans[0]) - measure(narrow)) / slope)
            if mlp_dim < 1:
                raise ValueError(
                    f"match {match!r} leaves no room for the MLP of {name}: its attention alone exceeds the model of "
                    f"{plans[0].mechanism}; choose match 'none' or a smaller configuration of {name}"
                )
            narrow = planned(mlp_dim)
        plans.append(narrow)
    return plans


def plan_feed_forwards(
    layers: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    vocab_size: int,
    tokens: int,
    allowed: Iterable[str] = ALLOWED,
) -> list[Plan]:
    """What each feed-forward layer costs in the common model, whose attention all of them have.

    Args:
        layers: from `feed_forward_of`, by name; other arguments are those of `plan`.
        model: see there.
        vocab_size: see there.
        tokens: see there.
        allowed: see there.

    Raises:
        ValueError: if one cannot be built.
    """
    attention = model["attention"]
    described = _described(attention, allowed, "the common model")
    return [
        Plan(name, attention, None, *_costs(
            {"vocab_size": vocab_size, "attention": described, **_sizes(model), **layer}, tokens, allowed,
            f"mechanism {name}",
        ), layer)
        for name, layer in layers.items()
    ]  # fmt: skip


def _sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model[name] for name in ("embed_dim", "num_layers", "tie_embeddings") if name in model}


def _costs(config: Mapping[str, Any], tokens: int, allowed: Iterable[str], where: str) -> tuple[int, int, int]:
    """Parameters, training FLOPs per token and cache bytes per token of a decoder."""
    with torch.device("meta"):
        decoder = build_model(config, allowed, where)
    cache = sum(cache_bytes(layer.attn, tokens, torch.bfloat16) for layer in decoder.layers) // tokens
    return decoder.num_parameters, 3 * decoder.flops(tokens) // tokens, cache


def run_key(plan: Plan, seed: int, settings: Settings, words: list[str]) -> str:
    """A hash of everything that the result of a run depends on."""
    planned = asdict(plan)
    if plan.feed_forward is None:
        # A key is the same as before feed-forward layers could vary: finished runs are kept.
        del planned["feed_forward"]
    content = {"plan": planned, "seed": seed, "train": settings.train, "words": words}
    layers = [layer for layer in (plan.feed_forward or {}).values() if isinstance(layer, Mapping)]
    sources = [own_source(layer["class_path"]) for layer in (plan.attention, *layers)]
    own = [source for source in sources if source is not None]
    if own:
        content["source"] = own[0] if len(own) == 1 else own
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def own_source(class_path: str) -> str | None:
    """A hash of the imported source files of a class's package, or None if the package is one that is always allowed.

    A mechanism that is being worked on changes between two comparisons, and its finished runs are then those of
    another mechanism.
    """
    package = class_path.split(".")[0]
    if package in ("attnzoo", "attnzoo_recipes"):
        return None
    digest = hashlib.sha256()
    for name in sorted(sys.modules):
        file = getattr(sys.modules[name], "__file__", None)
        if (name == package or name.startswith(f"{package}.")) and file is not None and Path(file).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()
