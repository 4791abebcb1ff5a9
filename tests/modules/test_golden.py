"""Modules against stored figures of reference implementations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import attnzoo
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES: dict[str, type[nn.Module]] = {
    "gqa": attnzoo.GroupedQueryAttention,
    "gqa_mha": attnzoo.MultiHeadAttention,
    "gta": attnzoo.GroupedTiedAttention,
    "kha": attnzoo.KnockingHeadsAttention,
    **dict.fromkeys(("diff", "diff_gqa", "diff_v2"), attnzoo.DifferentialAttention),
    **dict.fromkeys(("forgetting", "forgetting_pro", "forgetting_fixed_rope"), attnzoo.ForgettingAttention),
    **dict.fromkeys(("gated", "gated_headwise", "gated_value"), attnzoo.GatedAttention),
    "tpa": attnzoo.TensorProductAttention,
    "tpa_kvonly": attnzoo.TensorProductAttention,
    "mta": attnzoo.MultiTokenAttention,
    "mta_full": attnzoo.MultiTokenAttention,
    "selective": attnzoo.SelectiveAttention,
    "sigmoid": attnzoo.SigmoidAttention,
    "sigmoid_bidir": attnzoo.SigmoidAttention,
}
BACKENDS = ("eager", "sdpa")
CASES = [
    (name, "auto" if backend == "sdpa" and name.startswith(("sigmoid", "mta", "selective")) else backend)
    for name in CLASSES
    for backend in BACKENDS
]
every_case = pytest.mark.parametrize(("name", "backend"), CASES)


@cache
def load(name: str) -> tuple[dict[str, Tensor], dict[str, object], dict[str, float]]:
    """Tensors, configuration, and the largest difference of a float32 run for each stored result."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not iterable itself)
        metadata = file.metadata()
    return tensors, json.loads(metadata["config"]), json.loads(metadata["tolerance"])["max_abs_f32_minus_f64"]


def construct(name: str, **options: object) -> nn.Module:
    """The module of a file's configuration with its weights; options override the configuration."""
    tensors, stored, _ = load(name)
    config = {key: value for key, value in stored.items() if key not in ("B", "T", "mask_convention")}
    if config["rope"] is not None:
        rope = dict(config["rope"])
        assert rope.pop("type") == "default"
        config["rope"] = attnzoo.Rotary(dim=rope.pop("rotary_dim"), **rope)
    if name == "kha":
        assert config.pop("base") == "gqa"
    if name == "gqa_mha":
        assert config.pop("num_kv_heads") == config["num_heads"]
    module = CLASSES[name](**config | options)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    module.load_state_dict(weights, strict=True)
    return module


def results(name: str, module: nn.Module, dtype: torch.dtype, **call: object) -> dict[str, Tensor]:
    """What a module of that dtype gives, under the file's keys."""
    tensors = load(name)[0]
    found = gradients(module.to(dtype), tensors["input.x"].to(dtype), tensors["input.w"].to(dtype), **call)
    return {"output.y": found.pop("y"), **{f"grad.{key}": value for key, value in found.items()}}


def stored_results(name: str) -> dict[str, Tensor]:
    """The output and every gradient that the file holds."""
    tensors = load(name)[0]
    return {key: value for key, value in tensors.items() if key == "output.y" or key.startswith("grad.")}


def largest_errors(found: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == stored.keys()
    return {key: float((found[key].double() - stored[key]).abs().max()) for key in stored}


@every_case
def test_output_and_every_gradient_in_float64(name: str, backend: str) -> None:
    errors = largest_errors(results(name, construct(name, backend=backend), torch.float64), stored_results(name))
    assert max(errors.values()) < 1e-9, errors


@every_case
def test_float32_is_within_ten_times_the_stored_difference(name: str, backend: str) -> None:
    errors = largest_errors(results(name, construct(name, backend=backend), torch.float32), stored_results(name))
    allowed = load(name)[2]
    assert errors.keys() == allowed.keys() - {"output.removed"}
    assert all(errors[key] <= 10 * allowed[key] for key in errors), (errors, allowed)


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if load(case[0])[1].get("causal", True)])
def test_decoding_one_by_one_gives_the_stored_output(name: str, backend: str) -> None:
    tensors = load(name)[0]
    module, x = construct(name, backend=backend).double(), tensors["input.x"].double()
    cache = module.init_cache(x.shape[0], x.shape[1])
    with torch.no_grad():
        y = torch.cat([module(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
    assert float((y - tensors["output.y"]).abs().max()) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stored_blocking_mask_stands_for_causality(backend: str) -> None:
    module = construct("gqa_mha", causal=False, backend=backend)
    visible = ~load("gqa_mha")[0]["input.attn_mask_blocked"]
    errors = largest_errors(results("gqa_mha", module, torch.float64, mask=visible), stored_results("gqa_mha"))
    assert max(errors.values()) < 1e-9, errors


def test_the_readme_names_every_file() -> None:
    text = (GOLDEN / "README.md").read_text()
    missing = [path.name for path in GOLDEN.glob("*.safetensors") if f"`{path.name}`" not in text]
    assert not missing
