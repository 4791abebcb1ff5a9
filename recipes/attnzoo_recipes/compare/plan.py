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
EQUAL = {
    "params": "parameters of the whole model, to 0.2 %, through the MLP's hidden width",
    "flops": "training FLOPs per token, to 0.2 %, through the MLP's hidden width",
    "none": "the MLP's hidden width: parameters and FLOPs differ with the mechanism",
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

    Raises:
        ValueError: for an argument outside its rule.
    """

    configs: Mapping[str, str]
    seeds: int
    match: str
    out: Path
    train: Mapping[str, Any]
    allowed: tuple[str, ...] = ALLOWED

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms."""
        return tuple(self.configs)

    @classmethod
    def checked(
        cls,
        mechanisms: list[str] | str,
        seeds: int,
        match: str,
        out: str,
        train: Mapping[str, Any],
        allowed: Iterable[str] = ALLOWED,
    ) -> Settings:
        """Settings from those of a command line.

        `mechanisms` is a list, or words with commas between. Each is the NAME of a file configs/attention/NAME.yaml, or
        the path of a YAML file of the same form, whose stem is the mechanism's name.
        """
        given = mechanisms.split(",") if isinstance(mechanisms, str) else list(mechanisms)
        words = [word.strip() for word in given if word.strip()]
        names = [Path(word).stem if _is_file_name(word) else word for word in words]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"mechanisms must name at least one mechanism, and each once, got {names}")
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
        sections = {"model", "data", "trainer", "checkpoints", "loss_guard", "samples"}
        unknown = sorted(set(train) - sections)
        if unknown:
            raise ValueError(f"train must hold sections {', '.join(sorted(sections))}, got {unknown[0]!r}")
        files = [word if _is_file_name(word) else f"attention/{word}.yaml" for word in words]
        return cls(dict(zip(names, files, strict=True)), seeds, match, Path(out), train, tuple(allowed))


def _is_file_name(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Plan:
    """One mechanism in the common model.

    Attributes:
        mechanism: its name.
        attention: its description, {"class_path", "init_args"}.
        mlp_dim: hidden width of the MLP.
        parameters: of the whole model.
        flops_per_token: training FLOPs per token, three times those of the forward pass.
        cache_bytes_per_token: of all layers in bfloat16; a state that does not grow is divided by the T tokens.
    """

    mechanism: str
    attention: Mapping[str, Any]
    mlp_dim: int
    parameters: int
    flops_per_token: int
    cache_bytes_per_token: int


def attention_of(config: Path, allowed: Iterable[str] = ALLOWED) -> Mapping[str, Any]:
    """The description in the config file of a mechanism.

    Raises:
        ImportRefusedError: for an import path outside `allowed`.
        ValueError: if the file has no description, or anything else, which would not be equal between mechanisms.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{config} must be YAML in UTF-8: {error}") from error
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
            left for its MLP.
    """
    sizes = {name: model[name] for name in ("embed_dim", "num_layers", "tie_embeddings") if name in model}
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
            with torch.device("meta"):
                decoder = build_model(config, allowed, f"mechanism {name}")
            return Plan(
                name, attention, mlp_dim, decoder.num_parameters, 3 * decoder.flops(tokens) // tokens,
                sum(cache_bytes(layer.attn, tokens, torch.bfloat16) for layer in decoder.layers) // tokens,
            )  # fmt: skip

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


def run_key(plan: Plan, seed: int, settings: Settings, words: list[str]) -> str:
    """A hash of everything that the result of a run depends on."""
    content = {"plan": asdict(plan), "seed": seed, "train": settings.train, "words": words}
    source = own_source(plan.attention["class_path"])
    if source is not None:
        content["source"] = source
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def own_source(class_path: str) -> str | None:
    """A hash of the imported source files of a class's package, or None if the package is one that is always allowed.

    A mechanism that is being worked on changes between two comparisons, and its finished runs are then those of
    another mechanism.
    """
    package = class_path.split(".")[0]
    if package == "attnzoo":
        return None
    digest = hashlib.sha256()
    for name in sorted(sys.modules):
        file = getattr(sys.modules[name], "__file__", None)
        if (name == package or name.startswith(f"{package}.")) and file is not None and Path(file).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()
