"""Rotations of transformers' configurations, as `from_diff_llama` and `from_qwen3_next` read them."""

import importlib

import pytest
import torch

from attnzoo.conversion import from_diff_llama, from_qwen3_next

pytest.importorskip("transformers", reason="needs transformers")

FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 32}
ROTATIONS = {
    "diff-partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "diff-dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "next-partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "next-dynamic": {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
    "next-longrope": {"rope_type": "longrope", "partial_rotary_factor": 0.5, **FACTORS},
    "next-yarn": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 24},
}
KINDS = {
    "diff": ("diffllama", "DiffLlama", from_diff_llama, {}),
    "next": ("qwen3_next", "Qwen3Next", from_qwen3_next, {"layer_types": ["full_attention"]}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ROTATIONS)
def test_layers_rotate_as_their_models_do(name):
    kind, _, _ = name.partition("-")
    home, prefix, convert, options = KINDS[kind]
    module = pytest.importorskip(f"transformers.models.{home}.modeling_{home}")
    configs = importlib.import_module(f"transformers.models.{home}.configuration_{home}")
    torch.manual_seed(0)
    config = getattr(configs, f"{prefix}Config")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        max_position_embeddings=96, rope_parameters={"rope_theta": 1e3, **ROTATIONS[name]}, **options,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = getattr(module, f"{prefix}Attention")(config, layer_idx=0).eval()
    for parameter in layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x, mask = torch.randn(1, 9, 32), torch.full((1, 1, 9, 9), -1e30).triu(1)
    tables = getattr(module, f"{prefix}RotaryEmbedding")(config)(x, torch.arange(9)[None])
    torch.testing.assert_close(convert(layer)(x), layer(x, tables, mask)[0], rtol=1e-4, atol=1e-5)
