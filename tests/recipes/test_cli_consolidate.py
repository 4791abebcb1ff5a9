"""attnzoo-consolidate, and generation, on the checkpoint of a sharded run."""

import json

import pytest
import torch
from children import together
from safetensors import safe_open

from attnzoo_recipes import consolidate, generate
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.initial_weights import start_from
from attnzoo_recipes.model_config import model_from_checkpoint, saved_settings


@pytest.fixture
def trained(arguments, tmp_path):
    words = arguments("mla", "--config=configs/distributed/fsdp.yaml", "--model.tie_embeddings=false")
    for code, said in together(words):
        assert code == 0, said
    assert newest_valid(tmp_path / "run").is_dir()
    return tmp_path / "run"


def test_a_sharded_run_generates_and_becomes_one_file(trained, tmp_path, capsys):
    generate.main([str(trained), "--prompt", "the cat", "--max-new-tokens", "5", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("the cat")
    out = tmp_path / "weights" / "model.safetensors"
    consolidate.main([str(trained), str(out)])
    checkpoint = read_checkpoint(trained)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["attnzoo"]) == saved_settings(checkpoint)["model"]
        assert set(file.keys()) == {name.removeprefix("model.") for name in checkpoint["state_dict"]}
    model = model_from_checkpoint(checkpoint)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_parameters()
    assert start_from(model, {}, None, out) == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert [path.name for path in out.parent.iterdir()] == [out.name]


BAD = {
    "no run": (["missing", "a.safetensors"], "missing"),
    "another ending": (["missing", "a.pt"], r"OUT must be a file NAME.safetensors, got 'a.pt'"),
    "an existing file": (["missing", "here.safetensors"], "OUT must be a new file, got 'here.safetensors'"),
}


def test_a_folder_that_takes_no_file(arguments, run, tmp_path, capsys):
    run(arguments("mha"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        consolidate.main([str(tmp_path / "run"), "/proc/w.safetensors"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/proc/w.safetensors could not be written" in line


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        consolidate.main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
