"""attnzoo-convert as a user runs it, and transformers on what it writes."""

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

import transformers

import attnzoo.hugging_face as hf
from attnzoo_recipes import convert
from tests.recipes.tiny_hugging_face import WORDS, bert, llama

CHILD = """
import sys
import attnzoo.hugging_face
import torch, transformers

transformers.logging.set_verbosity_error()
model, found = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
made = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
print(type(model).__name__, type(attnzoo.hugging_face.modules(model)[0][1]).__name__, model.dtype)
print(made.tolist(), not any(found.values()))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    words = WORDS.partition("[")[0].split()
    for name, step in (("calib", 5), ("eval", 7)):
        (root / name).write_text(" ".join(words[i * step % len(words)] for i in range(900)))
    return root


def command(*words):
    convert.main([str(word) for word in words])


SMALL = ("--calib-length", 32, "--calib-sequences", 8, "--eval-length", 24, "--eval-sequences", 4)


def test_a_folder_is_converted(texts, tmp_path, capsys):
    source, model, _ = llama(tmp_path / "model")
    out = tmp_path / "out"
    calib, held_out = texts / "calib", texts / "eval"
    command(source, out, "--to", "mla", "--rank", 20, "--rope-dim", 8, "--calib", calib, "--eval", held_out, *SMALL)
    said = capsys.readouterr().out
    result = json.loads((out / convert.REPORT).read_text())
    assert result["options"] == {"kv_rank": 20, "rope_dim": 8, "rope_select": "high"}
    assert result["calib"] == {"file": str(calib), "tokens": [8, 32]}
    assert result["report"]["cache_bytes_after"] < result["report"]["cache_bytes_before"]
    assert [layer["latent"]["rank"] for layer in result["report"]["layers"]] == [20, 20]
    before, after = result["perplexity"].values()
    assert f"{before:.4g} before, {after:.4g} after (4 x 24 tokens)" in said
    assert "model.layers.1.self_attn" in said

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(held_out.read_text())["input_ids"][: 4 * 24]).view(4, 24)
    converted = transformers.AutoModelForCausalLM.from_pretrained(out)
    for each, expected in ((model, before), (converted, after)):
        loss = torch.stack([each(row[None], labels=row[None]).loss.detach() for row in ids]).mean()
        assert math.exp(loss) == pytest.approx(expected, rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)

    done = subprocess.run([sys.executable, "-c", CHILD, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prompt = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = converted.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0).tolist()
    assert done.stdout.splitlines() == [
        "AttnzooLlamaForCausalLM MultiHeadLatentAttention torch.float32", f"{expected} True"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "kind", "exact"),
    [
        (["--to", "kha", "--variant", "linear"], "KnockingHeadsAttention", True),
        (
            ["--to", "moh", "--set", "num_shared_heads=1", "--set", "num_routed_active=3"],
            "MixtureOfHeadAttention",
            True,
        ),
        (["--to", "dcmha"], "DynamicallyComposableAttention", True),
        (["--to", "talking_heads"], "TalkingHeadsAttention", True),
        (["--to", "gqa", "--num-kv-heads", "1", "--calib", "CALIB"], "GroupedQueryAttention", False),
        (["--to", "mla", "--rope-dim", "12", "--set", "svd=none"], "MultiHeadLatentAttention", True),
        (
            ["--to", "mla", "--rope-dim", "12", "--set", "svd=none", "--set", "factor_dtype=float32"],
            "MultiHeadLatentAttention",
            True,
        ),
    ],
)
def test_mechanisms(texts, tmp_path, words, kind, exact):
    source, *_ = llama(tmp_path / "model")
    words = [str(texts / "calib") if word == "CALIB" else word for word in words]
    command(source, tmp_path / "out", *words, "--layers", "1", "--eval", texts / "eval", *SMALL)
    before, after = json.loads((tmp_path / "out" / convert.REPORT).read_text())["perplexity"].values()
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = [type(attn).__name__ for _, attn in hf.modules(read)]
    assert kinds[-1] == kind
    assert (after == pytest.approx(before, rel=1e-5)) == exact


def test_weights_in_half_precision(tmp_path):
    source, *_ = llama(tmp_path / "model")
    command(source, tmp_path / "out", "--to", "kha", "--dtype", "bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_a_run_is_converted(arguments, run, texts, tmp_path, capsys):
    run(arguments("gqa", "--data.block_size=24"))
    words = ["--to", "mla", "--rank", "6", "--rope-dim", "2", "--calib", texts / "calib", "--eval", texts / "eval"]
    capsys.readouterr()
    convert.main([str(word) for word in [tmp_path / "run", tmp_path / "out", *words, *SMALL]])
    assert "before" in capsys.readouterr().out
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(hf.modules(read)[0][1]).__name__ == "MultiHeadLatentAttention"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "banana"], "banana"),
        (["--to", "kha", "--rank", "4"], "kv_rank"),
        (["--to", "kha", "--set", "variant"], "--set must be followed by NAME=VALUE, got 'variant'"),
        (
            ["--to", "gqa", "--set", "calib=x"],
            "--set must name an option of the conversion, got 'calib=x': use --calib",
        ),
        (["--to", "gqa", "--set", "layers=[0]"], "of the conversion, got 'layers=[0]': use --layers"),
        (["--to", "mla", "--rope-dim", "12", "--rank", "8", "--set", "factor_dtype=int8"], "factor_dtype must be one"),
        (["--to", "mla", "--rope-dim", "7", "--rank", "8"], "rope_dim"),
        (["--to", "mla", "--rank", "8"], "rope_dim"),
        (["--to", "gqa", "--num-kv-heads", "3"], "num_kv_heads"),
        (["--to", "kha", "--layers", "2"], "layers must"),
        (["--to", "kha", "--layers", "a"], "--layers must be numbers with commas between, got 'a'"),
        (["--to", "kha", "--calib", "nowhere.txt"], "--calib must be a file, got 'nowhere.txt'"),
        (["--to", "kha", "--eval", "nowhere.txt"], "--eval must be a file, got 'nowhere.txt'"),
        (["--to", "kha", "--eval", __file__, "--eval-length", "0"], "eval-length must be at least 2, got 0"),
        (["--to", "kha", "--eval", __file__, "--eval-sequences", "0"], "--eval-sequences must be at least 1, got 0"),
        (["--to", "kha", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--to", "kha", "--device", "nowhere"], "device must be one that torch knows"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, capsys, words, message):
    source, *_ = llama(tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(source, tmp_path / "out", *words)
    assert stop.value.code == 2
    *bars, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert error.startswith("attnzoo-convert: error: ")
    assert not [line for line in bars if line and "it/s" not in line]
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_says_which_option_helps(tmp_path, capsys):
    source, *_ = llama(tmp_path / "model")
    (tmp_path / "tiny.txt").write_text("a")
    with pytest.raises(SystemExit):
        command(source, tmp_path / "out", "--to", "kha", "--eval", tmp_path / "tiny.txt")
    assert "or a smaller --eval-length" in capsys.readouterr().err


def test_models_that_are_not_converted(tmp_path, capsys):
    source, *_ = bert(tmp_path / "bert")
    for words, message in (
        ([source, tmp_path / "out"], "MODEL must be a causal language model, got BertModel"),
        ([tmp_path / "nowhere", tmp_path / "out"], "which does not exist"),
        ([source, tmp_path], "OUT must be a new or empty folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(*words, "--to", "kha")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_bar_shows_the_progress(texts, tmp_path, monkeypatch, capsys):
    source, *_ = llama(tmp_path / "model")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    command(source, tmp_path / "out", "--to", "mla", "--rank", 20, "--rope-dim", 8, "--calib", texts / "calib",
        "--eval", texts / "eval", *SMALL)  # fmt: skip
    said = capsys.readouterr().err
    for what in ("calibration: 100%", "perplexity before: 100%", "perplexity after: 100%"):
        assert what in said


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        convert.main(["--help"])
    said = capsys.readouterr().out
    for word in ("MODEL", "OUT", "--to", "--calib", "--eval", "--rank", "--rope-dim", "--set", "--layers", "--dtype"):
        assert word in said
