"""Families of transformers with attnzoo's attention: the same function, whatever the call."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnzoo.hugging_face import modules
from attnzoo.hugging_face.families import family_of
from attnzoo.hugging_face.replacement import attention_names, install


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_an_installed_module_computes_what_was_there():
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(3, 64, (2, 9))
    expected = model(ids).logits
    for name in attention_names(model):
        module = model.get_submodule(name)
        attn, state = family_of(module).read(module, None)
        attn.load_state_dict(state, assign=True)
        install(model, name, attn)
    assert [name for name, _ in modules(model)] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    torch.testing.assert_close(model(ids).logits, expected)
