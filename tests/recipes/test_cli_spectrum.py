"""attnzoo-spectrum: each kind of model, what it prints and writes, and mistakes in one sentence."""

import csv
import json
import re
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file

import attnzoo
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo_recipes.diagnose.load_model import load_model
from attnzoo_recipes.diagnose.spectrum import layer_rows, main, parse, printed, spectrum


@pytest.fixture
def weights(tmp_path):
    """A safetensors file of two layers with 6 query and 2 key/value heads; a form is planted in head 4 of
    the second, by its query and by the key that heads 3 to 5 read."""
    torch.manual_seed(0)
    layers = [attnzoo.GroupedQueryAttention(96, 6, 2, bias=False) for _ in range(2)]
    with torch.no_grad():
        for weight, first in ((layers[1].q_proj.weight, 4 * 16), (layers[1].k_proj.weight, 16)):
            weight[first : first + 16] += 0.3 * torch.outer(torch.ones(16), torch.randn(96).sign())
    path = tmp_path / "small.safetensors"
    tensors = {f"model.layers.{i}.self_attn.{name}": value.clone() for i, layer in enumerate(layers)
               for name, value in layer.state_dict().items()}  # fmt: skip
    save_file({**tensors, "model.norm.weight": torch.ones(96)}, path)
    return path, layers


@pytest.fixture
def llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path / "tiny-llama"
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"opened a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_safetensors_file(weights, tmp_path, capsys, offline):
    path, layers = weights
    out = tmp_path / "out"
    main([str(path), "--out", str(out), "--num_heads", "6", "--drawn", "1", "--matrices", "qk,weights"])
    said = capsys.readouterr().out
    assert re.search(
        r"qk: 3 of 12 spectra have eigenvalues above the threshold; of random weights about 0.1 would", said
    )
    line = next(line for line in said.splitlines() if line.startswith("model.layers.1.self_attn"))
    assert line.split()[1:3] == ["6", "3"]
    content = json.loads((out / "spectrum.json").read_text())
    expected = [record for layer in layers for record in analyze_model(layer)]
    found = [record for record in content["records"] if record["matrix"] == "qk"]
    assert [record["lambda_max"] for record in found] == pytest.approx([r.lambda_max for r in expected], rel=1e-9)
    # All three heads that read the planted key, and most of all the one with the planted query.
    planted = [record for record in found if record["outlier_count"]]
    assert [(record["layer"], record["head"]) for record in planted] == [
        ("model.layers.1.self_attn", head) for head in (3, 4, 5)
    ]
    assert max(planted, key=lambda record: record["mp_gap"])["head"] == 4
    assert all(record["eigenvalues"] is None for record in content["records"])
    assert content["facts"]["kind"] == "weights"
    assert content["settings"]["num_heads"] == 6
    with (out / "spectrum.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content["records"]) == 12 + 8
    assert [float(row["stable_rank"]) for row in table if row["matrix"] == "qk"] == pytest.approx(
        [record["stable_rank"] for record in found]
    )
    page = (out / "report.html").read_text()
    pictures = sorted(file.name for file in out.glob("*.png"))
    assert "qk-esd-0.png" in pictures
    assert "qk-mp_softrank-dark.png" in pictures
    assert page.count("<img ") == len(pictures) / 2
    assert page.count("<source ") == len(pictures) / 2
    assert not re.search(r"https?://|<script", page)
    assert "model.layers.1.self_attn, head 4" in page


def test_a_run_folder_and_its_checkpoint(arguments, run, tmp_path, capsys):
    run(arguments("mla", "--model.attention.init_args.backend=eager"))
    folder = tmp_path / "run"
    (checkpoint,) = folder.rglob("*.ckpt")
    loaded = load_model(folder)
    assert loaded.kind == "attnzoo"
    assert loaded.path == load_model(checkpoint).path == checkpoint
    assert loaded.tokenizer is not None
    assert not loaded.model.training
    capsys.readouterr()
    main([str(folder), "--out", str(tmp_path / "out"), "--drawn", "0", "--save-eigenvalues", "true"])
    content = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert content["facts"]["class"] == "DecoderLM"
    # A figure that no spectrum has is no map of zeros.
    assert {record["mp_softrank"] for record in content["records"] if record["matrix"] == "qk"} == {None}
    assert "qk-mp_softrank.png" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert "No map, since no spectrum has the figure: " in (tmp_path / "out" / "report.html").read_text()
    expected = analyze_model(loaded.model, keep_eigenvalues=True)
    found = [record for record in content["records"] if record["matrix"] == "qk"]
    assert [record["eigenvalues"] for record in found] == [pytest.approx(list(r.eigenvalues)) for r in expected]


def test_a_hugging_face_folder(llama, tmp_path, offline, capsys):
    folder, model = llama
    for path in (folder, folder / "model.safetensors"):
        loaded = load_model(path)
        assert loaded.kind == "huggingface"
        assert type(loaded.model).__name__ == "LlamaForCausalLM"
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value)
    main([str(folder), "--out", str(tmp_path / "out"), "--drawn", "1", "--per", "head"])
    content = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert len(content["records"]) == 2 * 2 * 4
    query, key = (getattr(model.model.layers[0].self_attn, f"{x}_proj").weight.detach().double() for x in "qk")
    top = torch.linalg.svdvals(query[36:48].T @ key[12:24])[0].square().item()
    (record,) = (r for r in content["records"] if r["matrix"] == "qk" and r["head"] == 3
                 and ".0." in r["layer"])  # fmt: skip
    assert record["lambda_max"] == pytest.approx(top, rel=1e-6)


def test_safetensors_below_a_folder_are_one_model(weights, tmp_path):
    path, layers = weights
    folder = tmp_path / "parts"
    folder.mkdir()
    for i, layer in enumerate(layers):
        tensors = {f"h.{i}.{name}": value.clone() for name, value in layer.state_dict().items()}
        save_file(tensors, folder / f"part-{i}.safetensors")
    loaded = load_model(folder, num_heads=6)
    assert [record.layer for record in analyze_model(loaded.model)] == ["h.0"] * 6 + ["h.1"] * 6
    assert load_model(path, num_heads=6, num_kv_heads=2).model.model.layers._modules["0"].self_attn.num_kv_heads == 2


def test_a_table_of_many_layers_shows_the_largest_gaps():
    records = analyze_model(torch.nn.ModuleList([attnzoo.MultiHeadAttention(32, 2, bias=False) for _ in range(30)]))
    rows = layer_rows(records)
    text = printed(rows)
    shown = [line.split()[0] for line in text.splitlines()[1:-1]]
    by_gap = sorted(rows, key=lambda row: row["mp_gap"], reverse=True)[:24]
    assert set(shown) == {row["layer"] for row in by_gap}
    assert shown == sorted(shown, key=int)
    assert text.splitlines()[-1] == "(24 of 30 layers, those with the largest gaps; all are in the report)"


def test_defaults():
    choices = parse(["a/b.ckpt"])
    assert str(choices.out) == "runs/spectrum/b"
    assert choices.matrices == ("qk", "ov")


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("attnzoo-spectrum: error: ")
    assert len(said.splitlines()) == 1
    return said


def test_mistakes_end_in_one_sentence(weights, tmp_path, capsys):
    path, _ = weights
    empty, text, broken = tmp_path / "empty", tmp_path / "a.txt", tmp_path / "broken.safetensors"
    empty.mkdir()
    text.write_text("x")
    broken.write_bytes(b"not tensors")
    other = tmp_path / "other.safetensors"
    save_file({"a.weight": torch.ones(2, 2)}, other)
    hugging = tmp_path / "hugging"
    hugging.mkdir()
    (hugging / "config.json").write_text('{"model_type": "no_such_model"}')
    out = ["--out", tmp_path / "out", "--drawn", "1"]
    for words, message in (
        ([tmp_path / "nothing"], "MODEL must be a file or folder, got .*nothing', which does not exist"),
        ([text], "MODEL must be a run folder, a .ckpt or .safetensors file or a Hugging Face folder, got .*a.txt'"),
        ([empty], "there is neither a valid checkpoint, nor config.json, nor a .safetensors file in .*empty'"),
        ([broken, "--num_heads", 6], ".*broken.safetensors' is no safetensors file"),
        ([other, "--num_heads", 6], "must hold attention weights named q_proj, k_proj, v_proj and o_proj"),
        ([hugging], "the Hugging Face model in .* cannot be loaded"),
        ([path], "does not say how many heads its layers have: give --num-heads"),
        ([path, "--num-heads", 0], "num_heads must be at least 1, got 0"),
        ([path, "--num-heads", 5], r"num_heads must fit the weights of model.layers.0.self_attn, .*, got 5 query"),
        ([path, "--num-heads", 6, "--matrices", "qk,x"], r"matrices must be some of .* got \['qk', 'x'\]"),
        ([path, "--num-heads", 6, "--null", "x"], "null must be one of .* got 'x'"),
        ([path, "--num-heads", 6, "--device", "x"], "device must be one that torch knows, .* got 'x'"),
        ([path, "--num-heads", 6, "--drawn", -1], "drawn must not be negative, got -1"),
    ):
        assert re.search(message, refused([*words, *(out if "--drawn" not in words else out[:2])], capsys)), message
    assert not (tmp_path / "out").exists()
    assert "--nonsense" in refused([path, "--nonsense", "1"], capsys)


def test_a_folder_that_says_its_heads_is_told_none(llama, tmp_path, capsys):
    folder, _ = llama
    said = refused([folder, "--num-kv-heads", 1, "--out", tmp_path / "out"], capsys)
    assert "num_kv_heads must be left out for " in said
    assert not (tmp_path / "out").exists()


def test_files_are_written_before_anything_is_said(weights, tmp_path, monkeypatch):
    path, _ = weights
    options = parse([str(path), "--num-heads", "6", "--out", str(tmp_path / "out"), "--drawn", "0", "--per", "layer"])
    written = []

    def leave(text):
        written.append((tmp_path / "out/report.html").is_file())
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", leave)
    with pytest.raises(BrokenPipeError):
        spectrum(options)
    assert written == [True]


def test_a_checkpoint_of_something_else_is_not_run(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"f": torch.nn.Linear(1, 1)}, path)
    assert "evil.ckpt" in refused([path], capsys)
