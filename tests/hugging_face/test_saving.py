"""Folders of models with attnzoo's attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnzoo.hugging_face.replacement import install
from attnzoo.hugging_face.saving import adopt
from tests.zoo import MECHANISMS


@pytest.mark.parametrize("name", ["gqa", "kha", "mla", "linear"])
def test_a_folder_holds_the_same_model(name, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    install(model, "model.layers.1.self_attn", MECHANISMS[name]().eval())
    adopt(model)
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(31, (2, 7))
    assert torch.equal(read(ids).logits, model(ids).logits)
