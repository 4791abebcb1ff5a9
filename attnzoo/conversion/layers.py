"""Attention layers of other code, weight for weight: the same functions as modules of this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.modules.diff import DifferentialAttention
from attnzoo.modules.gated import GatedAttention
from attnzoo.rotary import Rotary
from attnzoo.rules import check, one_of

GATED_LAYOUTS = ("qwen3_next", "qiuzh20")


def from_qwen3_next(layer: nn.Module, **options: Any) -> GatedAttention:
    """The same function as a Qwen3NextAttention of transformers, with its weights copied.

    Args:
        layer: with the config that it was made with.
        options: further keyword options of `GatedAttention`.
    """
    config: Any = layer.config
    head_dim: Any = layer.head_dim
    weight = layer.get_parameter("q_proj.weight")
    converted = GatedAttention(
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_dim,
        **{
            "bias": config.attention_bias, "qk_norm": True, "qk_norm_eps": config.rms_norm_eps,
            "rope": rotary_of(config, dim=rotated_width(config, head_dim)), "dropout": config.attention_dropout,
            "device": weight.device, "dtype": weight.dtype, **options,
        },
    )  # fmt: skip
    state = gated_weights(layer.state_dict(), converted.num_heads, converted.num_kv_heads, layout="qwen3_next")
    converted.load_state_dict(state)
    return converted.train(layer.training)


def gated_weights(state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, *, layout: str) -> dict[str, Tensor]:
    """Weights of a layer with the gate's rows in q_proj as those of `GatedAttention`, which has them in g_proj.

    The layouts cannot be told apart by their shapes:

    - "qwen3_next", transformers' Qwen3NextAttention: the rows of each head's query, and then of its gate. Weights of
      norms are stored minus 1.
    - "qiuzh20", the authors' code: for each key/value head the rows of its heads' queries, and then of their gates,
      of which there are D a head or one.

    Args:
        state: weights of the layer by their names there.
        num_heads: query heads H.
        num_kv_heads: key/value heads G.
        layout: "qwen3_next" or "qiuzh20".

    Raises:
        ValueError: for an unknown layout, or rows that do not fit it.
    """
    check("layout", layout, one_of(*GATED_LAYOUTS))
    head_dim = state["k_proj.weight"].shape[0] // num_kv_heads
    queries, total = num_heads * head_dim, state["q_proj.weight"].shape[0]
    if total - queries not in (queries, num_heads if layout == "qiuzh20" else queries):
        raise ValueError(f"state must have {queries} query rows and those of a gate in q_proj.weight, got {total} rows")
    groups = num_heads if layout == "qwen3_next" else num_kv_heads
    converted = dict(state)
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            rows = state[f"q_proj.{kind}"].unflatten(0, (groups, -1))
            converted[f"q_proj.{kind}"] = rows[:, : queries // groups].flatten(0, 1)
            converted[f"g_proj.{kind}"] = rows[:, queries // groups :].flatten(0, 1)
    for name in ("q_norm.weight", "k_norm.weight"):
        if layout == "qwen3_next" and name in state:
            converted[name] = state[name] + 1
    return converted


def rotary_of(config: Any, layer_type: str | None = None, *, style: str = "half", dim: int | None = None) -> Rotary:
    """The rotation that a configuration of transformers describes.

    Args:
        config: with `rope_parameters`, for all layers or by their types.
        layer_type: key of the latter.
        style: layout of the rotated pairs.
        dim: rotary width. Default: the whole head.
    """
    parameters = config.rope_parameters
    parameters = parameters.get(layer_type, parameters)
    kind = parameters.get("rope_type", "default")
    scaling = None
    if kind != "default":
        own = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in own and value is not None}
        scaling |= {"max_position_embeddings": config.max_position_embeddings}
    return Rotary(float(parameters["rope_theta"]), dim, style, scaling)


def rotated_width(config: Any, head_dim: int) -> int | None:
    """Features of a head that rotate, None for all of them."""
    width = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return None if width == head_dim else width


def from_diff_llama(layer: nn.Module, **options: Any) -> DifferentialAttention:
    """The same function as a DiffLlamaAttention of transformers, with its weights copied.

    There head h is paired with head h + N / 2 of N, and key/value heads g and g + G of 2 G are side by side, where
    parts of a head are neighbours here. Its norm has no gain: the gain here is 1 and frozen.

    Args:
        layer: with the config and the layer_idx that it was made with.
        options: further keyword options of `DifferentialAttention`.
    """
    config: Any = layer.config
    head_dim: Any = layer.head_dim
    weight = layer.get_parameter("q_proj.weight")
    converted = DifferentialAttention(
        config.hidden_size, config.num_attention_heads // 2, config.num_key_value_heads // 2, head_dim,
        **{
            "depth": layer.layer_idx, "bias": config.attention_bias, "norm_eps": config.rms_norm_eps,
            "rope": rotary_of(config), "device": weight.device, "dtype": weight.dtype, **options,
        },
    )  # fmt: skip
    state = {key: value for key, value in layer.state_dict().items() if not key.startswith("rotary")}
    for key in [key for key in state if key[:2] in ("q_", "k_", "v_")]:
        state[key] = state[key].unflatten(0, (2, -1, converted.head_dim)).transpose(0, 1).flatten(0, 2)
    converted.load_state_dict(state | {"subln.weight": torch.ones_like(converted.subln.weight)})
    converted.subln.requires_grad_(False)
    return converted.train(layer.training)
