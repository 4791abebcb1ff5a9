"""A comparison of mechanisms: its settings, its cells (one mechanism, one seed), and what is held equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from attnzoo.costs import cache_bytes
from attnzoo_recipes.allowlist import ALLOWED, check_import
from attnzoo_recipes.lm import default_mlp_dim
from attnzoo_recipes.model_config import build_model

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
        mechanisms: short names, each of a file configs/attention/NAME.yaml, or a list in one string with commas.
        seeds: runs of each mechanism; run s draws weights and data order from s for every mechanism.
        match: what is held equal to the first mechanism beside data, schedule and sizes: "params", "flops" or
            "none". The MLP's hidden width is what gives.
        out: folder of the results; a finished cell in it is not run again.
        train: what is laid over configs/pretrain.yaml, by section: model, data, trainer, checkpoints.

    Raises:
        ValueError: for an argument outside its rule.
    """

    mechanisms: tuple[str, ...]
    seeds: int
    match: str
    out: Path
    train: Mapping[str, Any]

    @classmethod
    def checked(
        cls, mechanisms: list[str] | str, seeds: int, match: str, out: str, train: Mapping[str, Any]
    ) -> Settings:
        """Settings from what a command line gives."""
        names = mechanisms.split(",") if isinstance(mechanisms, str) else list(mechanisms)
        names = [name.strip() for name in names if name.strip()]
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
        return cls(tuple(names), seeds, match, Path(out), train)


@dataclass(frozen=True)
class Plan:
    """One mechanism in the common model.

    Attributes:
        mechanism: its short name.
        attention: its description, {"class_path", "init_args"}.
        mlp_dim: hidden width of the MLP that holds equal what is held equal.
        parameters: of the whole model.
        flops_per_token: training FLOPs per token, three times forward.
        cache_bytes_per_token: of all layers, bfloat16; a state that does not grow is shared among the T tokens.
    """

    mechanism: str
    attention: Mapping[str, Any]
    mlp_dim: int
    parameters: int
    flops_per_token: int
    cache_bytes_per_token: int


def attention_of(config: Path) -> Mapping[str, Any]:
    """The description in a mechanism's config file."""
    content = yaml.safe_load(config.read_text())
    try:
        description = content["model"]["attention"]
        check_import(description["class_path"], ALLOWED, str(config))
    except (KeyError, TypeError):
        raise ValueError(f"{config} must hold model.attention.class_path") from None
    return {"class_path": description["class_path"], "init_args": description.get("init_args", {})}


def plan(
    attentions: Mapping[str, Mapping[str, Any]], model: Mapping[str, Any], vocab_size: int, tokens: int, match: str
) -> list[Plan]:
    """Choose every mechanism's MLP width so that it holds equal what `match` says, to the first one's.

    Args:
        attentions: description by mechanism.
        model: the section `model` of the training config.
        vocab_size: of the tokenizer.
        tokens: T of a sample, for the FLOPs.
        match: one of MATCHES.

    Raises:
        ValueError: if a mechanism is so large that nothing is left for its MLP.
    """
    sizes = {name: model[name] for name in ("embed_dim", "num_layers", "tie_embeddings") if name in model}
    first = model.get("mlp_dim") or default_mlp_dim(sizes["embed_dim"])
    plans: list[Plan] = []
    for name, attention in attentions.items():

        def made(mlp_dim: int, name: str = name, attention: Mapping[str, Any] = attention) -> Plan:
            config = {"vocab_size": vocab_size, "attention": attention, "mlp_dim": mlp_dim, **sizes}
            with torch.device("meta"):
                decoder = build_model(config)
            return Plan(
                name, attention, mlp_dim, decoder.num_parameters, 3 * decoder.flops(tokens) // tokens,
                sum(cache_bytes(block.attn, tokens, torch.bfloat16) for block in decoder.blocks) // tokens,
            )  # fmt: skip

        narrow = made(first)
        if plans and match != "none":
            wide = made(first + 64)
            measure = (lambda p: p.parameters) if match == "params" else (lambda p: p.flops_per_token)
            slope = (measure(wide) - measure(narrow)) / 64
            mlp_dim = first + round((measure(plans[0]) - measure(narrow)) / slope)
            if mlp_dim < 1:
                raise ValueError(
                    f"match {match!r} leaves no room for the MLP of {name}: its attention alone exceeds the model of "
                    f"{plans[0].mechanism}; choose match 'none' or a smaller configuration of {name}"
                )
            narrow = made(mlp_dim)
        plans.append(narrow)
    return plans


def cell_key(plan: Plan, seed: int, settings: Settings, words: list[str]) -> str:
    """What a cell's result depends on, hashed."""
    content = {"plan": asdict(plan), "seed": seed, "train": settings.train, "words": words}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
