"""What pruning must not do: round numbers of heads, leave a model half pruned, or reach another model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from attnzoo.diagnostics import load_pruned, masked_heads, prune_heads, pruned_heads
from attnzoo.diagnostics.configs import own_configs

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
IDS = torch.arange(9)[None]


def config_of(**options):
    return transformers.LlamaConfig(**SIZES, **options)


def model_of(config=None):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config_of() if config is None else config).eval()


@pytest.fixture(scope="module")
def llama():
    return model_of()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({0: [2.9]}, "heads must be integers, got 2.9"),
        ({0: ["2"]}, "heads must be integers, got '2'"),
        ({0: "2"}, "heads must be several integers, got '2'"),
        ({0.7: [1]}, "heads must be integers, got 0.7"),
        ({"0": [1]}, "heads must be integers, got '0'"),
        ({0: [True]}, "heads must be integers, got True"),
        ({False: [1]}, "heads must be integers, got False"),
        ({0: torch.tensor([0.6])}, "heads must be integers, got a torch.float32 tensor"),
        ({0: torch.tensor([True, False])}, "heads must be integers, got a torch.bool tensor"),
        ({0: 1}, "heads must be several integers, got 1"),
        (5, r"heads must be \(layer, head\) pairs, got 5"),
        ([5], r"heads must be \(layer, head\) pairs, got 5"),
        ([(0, 1, 2)], r"heads must be \(layer, head\) pairs, got \(0, 1, 2\)"),
        ([(0, 1.0)], "heads must be integers, got 1.0"),
        (None, r"heads must be \(layer, head\) pairs, got None"),
    ],
)
@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_numbers_that_are_no_integers_are_refused(llama, heads, message, unit):
    with pytest.raises(ValueError, match=message):
        prune_heads(llama, heads, unit=unit)
    assert pruned_heads(llama) == {}
    assert llama.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


@pytest.mark.parametrize(
    "heads",
    [
        {0: (1, 2)}, {np.int64(0): np.array([1, 2])}, {0: torch.tensor([1, 2])}, {0: [torch.tensor([1]), 2]},
        [(0, 1), [0, np.int32(2)]], torch.tensor([[0, 1], [0, 2]]), iter([(0, 2), (0, 1)]),
    ],
)  # fmt: skip
def test_integers_of_any_kind_are_taken(llama, heads):
    model = copy.deepcopy(llama)
    prune_heads(model, heads)
    assert pruned_heads(model) == {0: (1, 2)}


@pytest.mark.parametrize("when", ["in a pruned module", "in a trial", "in the note"])
def test_an_interrupt_leaves_the_model_as_it_was(llama, when, monkeypatch, tmp_path):
    from attnzoo.diagnostics.pruning import structural, trial

    model = copy.deepcopy(llama)
    before = model(IDS).logits
    calls = []

    def interrupt(*_):
        calls.append(1)
        # The first four run the masked model.
        if len(calls) == 5:
            raise KeyboardInterrupt

    if when == "in a trial":
        handle = model.register_forward_pre_hook(interrupt)
    else:
        holder, name = (structural, "prune_module") if when == "in a pruned module" else (trial, "own_configs")
        whole = getattr(holder, name)

        def stopped(*inputs):
            whole(*inputs)
            raise KeyboardInterrupt

        monkeypatch.setattr(holder, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        prune_heads(model, {0: [1]})
    if when == "in a trial":
        handle.remove()
    monkeypatch.undo()
    assert pruned_heads(model) == {}
    assert torch.equal(model(IDS).logits, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, before)
    prune_heads(model, {0: [1]})
    assert pruned_heads(model) == {0: (1,)}


def test_pruning_does_not_reach_a_model_of_the_same_configuration(tmp_path):
    config = config_of(num_key_value_heads=2)
    teacher, student = model_of(config), model_of(config)
    before, written = teacher(IDS).logits, config.to_dict()
    prune_heads(student, {0: [1]})
    assert student.config.attnzoo_pruned_heads == {"0": [1]}
    assert not hasattr(teacher.config, "attnzoo_pruned_heads")
    assert teacher.config is config
    assert config.to_dict() == written
    mask = torch.ones(2, 4)
    mask[0, 1] = 0
    with masked_heads(teacher, mask):
        expected = teacher(IDS).logits
    torch.testing.assert_close(student(IDS).logits, expected)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert torch.equal(read(IDS).logits, before)
    torch.testing.assert_close(load_pruned(tmp_path / "student")(IDS).logits, expected)


def test_an_own_configuration_is_one_object_throughout_the_model():
    class Part(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    config = transformers.LlavaConfig(text_config=config_of(), vision_config=transformers.CLIPVisionConfig())
    model = Part(config)
    model.text, model.again, model.other = Part(config.text_config), Part(config), Part(config_of())
    other = model.other.config
    undo = own_configs(model.modules())
    assert model.config is not config
    assert model.again.config is model.config
    assert model.text.config is model.config.text_config
    assert model.text.config is not config.text_config
    assert model.other.config is not other
    assert model.config.to_dict() == config.to_dict()
    undo()
    assert (model.config, model.text.config, model.other.config) == (config, config.text_config, other)
