"""attnzoo-heads, -spectrum and -prune on models of images, sound, encoders with decoders, and tokens, as folders."""

import json
import math
import re

import numpy
import pytest
import tiny_hugging_face
import torch
from safetensors.torch import save_file

from attnzoo.diagnostics.heads.report import head_report
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning.masks import head_mask, head_slots, masked_heads
from attnzoo_recipes.diagnose import heads, prune, spectrum

transformers = pytest.importorskip("transformers")

# Layers (of the whole model) by name, and whether heads can be removed for good.
MODELS = {
    "vit": (2, True), "whisper": (6, True), "t5": (6, False), "gpt2": (2, True), "deepseek": (2, False),
    "distilbert": (2, True),
}  # fmt: skip
CLASSES = {"vit": 5, "distilbert": 3}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """Name, folder, model and a file of tensors that it takes."""
    model, tensors = tiny_hugging_face.family(request.param)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "data.safetensors"
    save_file(tensors, file)
    return request.param, tmp_path / "model", model, file, tensors


def test_heads(saved, tmp_path, capsys):
    name, folder, model, file, tensors = saved
    heads.main([str(folder), "--data", str(file), "--batch-size", "4", "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out/heads.json").read_text())
    layers, _ = MODELS[name]
    assert len(content["layers"]) == layers
    expected = head_report(model, [tensors])
    for found, layer in zip(content["layers"], expected.layers, strict=True):
        assert set(found["measures"]) == set(layer.measures)
        for measure, values in layer.measures.items():
            # Shares of kinds are means over examples, others over tokens.
            assert found["measures"][measure] == pytest.approx(values.nan_to_num().tolist(), abs=1e-5) or all(
                value is None for value in found["measures"][measure]
            )
        assert len(found["measures"]["entropy"]) == len(found["pair_cosine"]) == 4
        assert all(value is not None for value in found["measures"]["entropy"])
        crosses = "encoder_attn" in layer.name or "EncDec" in layer.name
        assert (found["measures"]["distance"][0] is None) == crosses == ("other tokens" in layer.note)
    assert f"{4 * layers} heads on" in capsys.readouterr().out


def test_spectrum(saved, tmp_path):
    name, folder, model, _, _ = saved
    spectrum.main([str(folder), "--out", str(tmp_path / "out"), "--drawn", "0"])
    records = json.loads((tmp_path / "out/spectrum.json").read_text())["records"]
    assert len(records) == 2 * 4 * MODELS[name][0]
    for record in records:
        assert record["hard_rank"] <= max(8, attention_layers(model)[0].head_dim)


def test_prune(saved, tmp_path, capsys):
    name, folder, model, file, tensors = saved
    layers, prunable = MODELS[name]
    prune.main([str(folder), "--data", str(file), "--percents", "25,50", "--speed", "0,50", "--rounds", "1",
                "--out", str(tmp_path / "out")])  # fmt: skip
    content = json.loads((tmp_path / "out/prune.json").read_text())
    curve = content["curves"]["greedy, l2"]
    chance = math.log(CLASSES.get(name, 64))
    assert content["facts"]["chance"] == pytest.approx(chance)
    assert f"of equally likely answers {chance:.4f}" in capsys.readouterr().out
    assert torch.tensor(curve["importance"]).shape == (layers, 4)
    # The loss of the whole model, and of it with a quarter of the heads masked, as the model itself says.
    given = tensors | ({"labels": tensors["input_ids"]} if "labels" not in tensors else {})
    with torch.no_grad():
        assert curve["base_loss"] == pytest.approx(float(model(**given).loss), rel=1e-5)
        gone = [tuple(head) for head in curve["order"][: curve["counts"][0]]]
        with masked_heads(model, head_mask(gone, head_slots(model).shape)):
            assert curve["losses"][0] == pytest.approx(float(model(**given).loss), rel=1e-5)
    if prunable:
        assert max(content["speed"]["forward"]["error"]) < 1e-5
        assert content["speed"]["forward"]["removed"] == [0, 2 * layers]
    else:
        assert "prune_heads knows zoo modules and the families of" in content["no_speed"]


def test_padding_of_an_encoder_and_a_decoder_counts_nowhere():
    model, tensors = tiny_hugging_face.family("t5")
    ids, targets = tensors["input_ids"][:1], tensors["labels"][:1]
    alone = {"input_ids": ids[:, :6], "decoder_input_ids": targets[:, :4]}
    padded = {
        "input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < 6).long()[None],
        "decoder_input_ids": targets, "decoder_attention_mask": (torch.arange(targets.shape[1]) < 4).long()[None],
    }  # fmt: skip
    for found, layer in zip(head_report(model, [padded]).layers, head_report(model, [alone]).layers, strict=True):
        torch.testing.assert_close(found.pair_cosine, layer.pair_cosine, atol=1e-5, rtol=0)
        assert found.measures.keys() == layer.measures.keys()
        for name, values in layer.measures.items():
            torch.testing.assert_close(found.measures[name], values, atol=1e-5, rtol=0, equal_nan=True, msg=name)


def test_forms_of_tensors(tmp_path):
    model, tensors = tiny_hugging_face.family("vit")
    model.save_pretrained(tmp_path / "model")
    numpy.savez(tmp_path / "data.npz", **{name: x.numpy() for name, x in tensors.items()})
    torch.save(tensors, tmp_path / "data.pt")
    save_file(tensors, tmp_path / "data.safetensors")
    found = []
    for file in ("data.npz", "data.pt", "data.safetensors"):
        out = tmp_path / file.replace(".", "-")
        heads.main([str(tmp_path / "model"), "--data", str(tmp_path / file), "--sequences", "2", "--out", str(out)])
        found.append(json.loads((out / "heads.json").read_text())["layers"])
    assert found[0] == found[1] == found[2]


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_mistakes_end_in_one_sentence(tmp_path, capsys):
    model, tensors = tiny_hugging_face.family("vit")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    pixels, labels = tensors["pixel_values"], tensors["labels"]
    for data, message in (
        ({"pixel_values": Code(), "labels": labels}, "data must hold tensors alone, got "),
        ([pixels], "data must hold tensors by their names, got list in "),
        ({"pixels": pixels}, r"data must hold inputs of ViTForImageClassification \(pixel_values, .*, got pixels"),
        ({"labels": labels}, "data must hold inputs of ViTForImageClassification .*, got labels"),
        ({"pixel_values": pixels, "labels": labels[:2]}, "data must hold equally many examples in each tensor"),
        ({"pixel_values": pixels}, "data must hold labels, and ViTForImageClassification give logits"),
        ({"pixel_values": pixels, "labels": labels + 5}, "labels must be one class for each of the logits"),
        ({"pixel_values": pixels, "labels": labels.float()}, "labels must be one class for each of the logits"),
    ):
        torch.save(data, tmp_path / "data.pt")
        assert re.search(message, refused(prune.main, [folder, "--data", tmp_path / "data.pt"], capsys)), message
    for content, name in ((b"no", "a.npz"), (b"no", "a.pt"), (b"no", "a.safetensors")):
        (tmp_path / name).write_bytes(content)
        said = refused(heads.main, [folder, "--data", tmp_path / name], capsys)
        assert re.search("data must hold tensors alone, got ", said)
    numpy.savez(tmp_path / "code.npz", pixel_values=numpy.array([Code()], dtype=object))
    assert "data must hold tensors alone" in refused(heads.main, [folder, "--data", tmp_path / "code.npz"], capsys)
    torch.save(tensors, tmp_path / "data.pt")
    said = refused(prune.main, [folder, "--data", tmp_path / "data.pt", "--examples", 99], capsys)
    assert "examples must lie between 1 and the 6 that data holds, got 99" in said


def refused(main, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "code ran" not in said.out
    found = [line for line in said.err.splitlines() if ": error: " in line]
    assert len(found) == 1, said
    return found[0]


def test_granularity_of_tokens_needs_one_sequence(tmp_path, capsys):
    model, tensors = tiny_hugging_face.family("t5")
    model.save_pretrained(tmp_path / "model")
    save_file(tensors, tmp_path / "data.safetensors")
    words = [tmp_path / "model", "--data", tmp_path / "data.safetensors", "--granularity", "token"]
    assert "granularity 'token' needs layers that all run over the same tokens" in refused(prune.main, words, capsys)
