"""attnzoo-export as a user runs it, and transformers on what it writes."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs transformers")

from attnzoo_recipes import export, generate
from attnzoo_recipes.checkpointing import newest_valid

CHILD = """
import sys
if sys.argv[2] == "plain":
    sys.modules["attnzoo"] = None
else:
    import attnzoo.hugging_face
import transformers

transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("the cat", return_tensors="pt")
made = model.generate(**ids, max_new_tokens=15, do_sample=False, eos_token_id=None)
print(type(model).__name__)
print(tokenizer.decode(made[0], skip_special_tokens=True))
"""


@pytest.mark.parametrize(
    ("mechanism", "tokenizer", "name"),
    [("mha", "byte", "LlamaForCausalLM"), ("kha", "bpe", "AttnzooLlamaForCausalLM")],
)
def test_a_run_becomes_a_folder_of_transformers(arguments, run, tmp_path, capsys, mechanism, tokenizer, name):
    run(arguments(mechanism, f"--data.tokenizer={tokenizer}", "--data.vocab_size=300", "--data.block_size=24"))
    out = tmp_path / "out"
    capsys.readouterr()
    export.main([str(tmp_path / "run"), str(out)])
    said = capsys.readouterr().out
    assert said.startswith(f"written to {out}: {name}, ")
    assert ("import attnzoo.hugging_face" in said) == (name != "LlamaForCausalLM")
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 24
    assert config["eos_token_id"] == (256 if tokenizer == "byte" else json.loads((out / "tokenizer.json").read_text())
        ["model"]["vocab"]["<|document|>"])  # fmt: skip
    generate.main([str(tmp_path / "run"), "--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "15"])
    expected = capsys.readouterr().out
    kind = "plain" if name == "LlamaForCausalLM" else "attnzoo"
    done = subprocess.run([sys.executable, "-c", CHILD, out, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name}\n{expected}"


def test_the_command_refuses_in_one_sentence(arguments, run, tmp_path, capsys):
    run(arguments("mqa", "--model.parallel=true"))
    good, out = newest_valid(tmp_path / "run"), tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("mine")
    for words, message in (
        ([str(good), str(out)], "got parallel branches in block 0"),
        ([str(tmp_path / "data"), str(out)], "no valid checkpoint"),
        (["nowhere.ckpt", str(out)], "nowhere.ckpt"),
        ([str(good), str(full)], "OUT must be a new or empty folder"),
        ([str(good), str(full / "notes")], "OUT must be a new or empty folder"),
        ([str(good), str(out), "--max-length", "0"], "--max-length must be at least 1, got 0"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            export.main(words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        export.main(["--help"])
    said = capsys.readouterr().out
    for word in ("RUN", "OUT", "--max-length", "--allow-import", "transformers"):
        assert word in said
