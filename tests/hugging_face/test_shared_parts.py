"""Configurations that two models share, and attention modules that two blocks share."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo.hugging_face as hf
from tests.hugging_face.small import config_of

IDS = torch.arange(3, 15)[None]


def pair():
    """Two models of one configuration object."""
    config = config_of("llama")
    models = [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]
    assert models[0].config is models[1].config
    return models


CHANGES = {
    "replace": hf.replace,
    "convert": lambda model: hf.convert(model, "kha"),
    "restore": lambda model: hf.restore(hf.convert(model, "gqa", num_kv_heads=1) and model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_that_another_model_has_stays(change, tmp_path):
    teacher, student = pair()
    before, config = teacher.config.to_dict(), teacher.config
    CHANGES[change](student)
    assert type(teacher.config) is transformers.LlamaConfig
    assert teacher.config is config
    assert teacher.config.to_dict() == before
    held = {id(m.config) for m in student.modules() if getattr(m, "config", None) is not None}
    assert held == {id(student.config)}
    for model, folder in ((teacher, tmp_path / "teacher"), (student, tmp_path / "student")):
        model.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_nested_configurations_are_copied_once():
    text = config_of("gemma3")
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4,
    )  # fmt: skip
    models = [transformers.Gemma3ForConditionalGeneration(config) for _ in range(2)]
    hf.replace(models[1], verify={"input_ids": IDS})
    assert models[0].config is config
    assert models[1].config is not config
    assert models[1].config.text_config is models[1].model.language_model.config
    assert models[1].config.text_config is not config.text_config
    assert type(config.text_config) is transformers.Gemma3TextConfig


def test_a_refused_change_leaves_the_configuration():
    model, _ = pair()
    hf.convert(model, "gqa", layers=[0], num_kv_heads=1)
    config = model.config
    with pytest.raises(ValueError, match="must have one number of key/value heads"):
        hf.restore(model)
    assert model.config is config
    assert all(layer.self_attn.config is config for layer in model.model.layers)


def test_an_attention_module_in_two_blocks_is_refused():
    model, _ = pair()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    for change in (hf.replace, CHANGES["convert"]):
        with pytest.raises(
            ValueError,
            match=r"layer 'model.layers.0.self_attn' must have one place .* is 'model.layers.1.self_attn' too",
        ):
            change(model)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


@pytest.mark.parametrize("model", [None, "llama", 5])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="model must be a model of transformers, got"):
        hf.replace(model)
