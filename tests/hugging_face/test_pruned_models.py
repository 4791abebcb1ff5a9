"""Models whose heads attnzoo.diagnostics.prune_heads removed before they are replaced."""

import copy
import tempfile

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo.hugging_face as hf
from attnzoo.diagnostics import load_pruned, prune_heads, pruned_heads
from tests.hugging_face.small import small

IDS = torch.arange(3, 15)[None]
PRUNED = {
    "llama": {0: [0], 1: [1, 3]},  # uneven groups, and even ones
    "gpt-oss": {0: [3]},
    "qwen3": {0: [2, 3]},  # a key/value head
    "gpt2": {0: [0, 2]},
    "gpt-neox": {1: [1]},
    "bert": {0: [3], 1: [0, 1]},
}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PRUNED)
def test_pruned_layers_are_replaced_and_restored(name, implementation):
    if name == "gpt-oss" and implementation == "sdpa":
        pytest.skip("transformers has no sdpa with sinks")
    model = small(name, dtype=torch.float32)
    model.set_attn_implementation(implementation)
    prune_heads(model, PRUNED[name])
    expected = logits(model)
    removed = {layer: tuple(heads) for layer, heads in PRUNED[name].items()}
    hf.replace(model)
    assert_same(logits(model), expected)
    assert pruned_heads(model) == removed
    with pytest.raises(ValueError, match="is pruned already"):
        prune_heads(copy.deepcopy(model), {next(iter(removed)): [next(iter(removed.values()))[0]]})
    hf.restore(model)
    assert_same(logits(model), expected)
    assert pruned_heads(model) == removed
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert_same(logits(load_pruned(folder)), expected)


def test_a_pruned_and_replaced_model_is_saved_and_loaded(tmp_path):
    model = small("llama", dtype=torch.float32)
    prune_heads(model, PRUNED["llama"])
    hf.replace(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(logits(loaded), logits(model))
    assert pruned_heads(loaded) == {0: (0,), 1: (1, 3)}


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_model_is_restored_after_loading(name, layers, tmp_path):
    model = small(name, dtype=torch.float32)
    prune_heads(model, PRUNED[name])
    expected, removed = logits(model), pruned_heads(model)
    hf.replace(model, layers=layers).save_pretrained(tmp_path / "replaced")
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "replaced")
    assert torch.equal(logits(loaded), logits(model))
    hf.restore(loaded).save_pretrained(tmp_path / "restored")
    assert type(loaded).__name__ == type(small(name)).__name__
    assert_same(logits(loaded), expected)
    assert pruned_heads(loaded) == removed
    assert_same(logits(load_pruned(tmp_path / "restored")), expected)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0], r"attnzoo_pruned_heads must map numbers of layers to heads, got \[0\]"),
        ({"-1": [0]}, "attnzoo_pruned_heads must map numbers of layers to heads"),
        ({"7": [0]}, "attnzoo_pruned_heads must name layers whose heads can be pruned, got 7"),
        ({"0": [9]}, "9"),
    ],
)
def test_wrong_pruned_heads_of_a_folder_are_refused(heads, message, tmp_path):
    model = hf.replace(small("llama", dtype=torch.float32), verify=False)
    model.config.attnzoo_pruned_heads = heads
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_heads_that_were_pruned_later_cannot_be_restored():
    model = hf.replace(small("llama"))
    prune_heads(model, {1: [0, 2]})
    with pytest.raises(ValueError, match=r"cannot express this .*: heads \[0, 2\] are pruned now, and \[\] were when"):
        hf.restore(model)


def test_pruned_heads_that_cannot_be_read_are_named():
    model = small("olmo2")
    prune_heads(model, {0: [0]}, allow_inexact=True)
    with pytest.raises(ValueError, match=r"Olmo2Attention with pruned heads \[0\] cannot be read"):
        hf.replace(model)
