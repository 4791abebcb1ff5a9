"""Hugging Face folders are read with exactly their weights, or refused."""

import json
import logging.handlers
import os
import subprocess
import sys

import pytest
import torch

from attnzoo_recipes.diagnose.load_model import load_model

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from tiny_hugging_face import bert, llama


def reweighted(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WEIGHTS = {
    "renamed": (lambda w: {f"module.{name}": value for name, value in w.items()}, "missing"),
    "one missing": (lambda w: {n: v for n, v in w.items() if n != "model.layers.1.self_attn.q_proj.weight"},
                    "1 are missing, such as model.layers.1.self_attn.q_proj.weight"),
    "no logits": (lambda w: {n: v for n, v in w.items() if n != "lm_head.weight"}, "such as lm_head.weight"),
    "one more": (lambda w: {**w, "model.layers.1.gate.weight": torch.zeros(3)}, "1 belong nowhere, such as model.lay"),
    "a layer more": (lambda w: {**w, **{n.replace("s.1.", "s.2."): v.clone() for n, v in w.items()}}, "nowhere"),
    "another shape": (lambda w: {n: v[:12] if "q_proj" in n else v for n, v in w.items()}, "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    folder, _, _ = llama(tmp_path / "model")
    reweighted(folder, change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"model_type": "mistral"}])
def test_a_config_of_another_model_is_refused_or_fits(changes, tmp_path):
    folder, model, _ = llama(tmp_path / "model")
    configured(folder, **changes)
    if "model_type" not in changes:
        with pytest.raises(ValueError, match="do not fit the LlamaForCausalLM"):
            load_model(folder)
        return
    loaded = load_model(folder).model
    assert type(loaded).__name__ == "MistralForCausalLM"
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("make", [llama, bert])
def test_nothing_is_reported_of_what_was_read(make, tmp_path, capfd):
    """transformers reports a pooler that nothing reads, and buffers that it once saved."""
    import transformers

    folder, _, _ = make(tmp_path / "model")
    reweighted(folder, lambda w: {**w, "encoder.rotary_emb.inv_freq": torch.zeros(6)})
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("transformers").addHandler(said)
    capfd.readouterr()
    load_model(folder)
    logging.getLogger("transformers").removeHandler(said)
    assert capfd.readouterr() == ("", "")
    assert said.buffer == []
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.WARNING


@pytest.mark.slow
def test_models_with_our_attention_are_read(tmp_path):
    """In another process, which has not imported attnzoo.hugging_face."""
    import attnzoo.hugging_face as hf

    _, model, words = llama(tmp_path / "model")
    hf.convert(model, "kha")
    model.save_pretrained(tmp_path / "made")
    words.save_pretrained(tmp_path / "made")
    child = (
        "import sys; from attnzoo_recipes.diagnose.load_model import load_model;"
        "print([type(x).__name__ for x in load_model(sys.argv[1]).model.modules()].count('KnockingHeadsAttention'))"
    )
    words = [sys.executable, "-W", "ignore", "-c", child, tmp_path / "made"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


def test_tied_logits_are_not_missing(tmp_path):
    folder, _, _ = llama(tmp_path / "model")
    configured(folder, tie_word_embeddings=True)
    reweighted(folder, lambda w: {n: v for n, v in w.items() if n != "lm_head.weight"})
    loaded = load_model(folder).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_old_buffers_do_not_count(tmp_path):
    folder, model, _ = llama(tmp_path / "model")
    reweighted(folder, lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    loaded = load_model(folder).model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_an_encoder_without_pooler_or_with_a_head_is_whole(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    folder, model, _ = bert(tmp_path / "model")
    loaded = load_model(folder).model
    name = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    config = BertConfig(hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, vocab_size=64)
    masked = BertForMaskedLM(config)
    masked.save_pretrained(tmp_path / "masked")
    loaded = load_model(tmp_path / "masked").model
    assert type(loaded).__name__ == "BertModel"
    assert torch.equal(loaded.get_parameter(name), masked.bert.get_parameter(name))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"model_type": 5}', '{"architectures": [5]}'])
def test_a_broken_config_is_refused(content, tmp_path):
    folder, _, _ = llama(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"the Hugging Face model in '{folder}' cannot be loaded"):
        load_model(folder)
