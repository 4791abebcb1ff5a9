"""attnzoo-heads: recipe checkpoints and Hugging Face folders, what it prints and writes, mistakes in one sentence."""

import csv
import json
import re

import pytest
import tiny_hugging_face
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import attnzoo
from attnzoo.diagnostics.heads.clusters import chai_cluster_error, elbow
from attnzoo.diagnostics.heads.report import head_report
from attnzoo_recipes.diagnose.heads import by_kind, evenly, layer_clusters, main, parse
from attnzoo_recipes.diagnose.load_model import load_model
from attnzoo_recipes.diagnose.texts import reader, sequences
from attnzoo_recipes.lm import DecoderLM


@pytest.fixture
def tiny_llama(tmp_path):
    pytest.importorskip("transformers")
    return tiny_hugging_face.llama(tmp_path / "llama")


@pytest.fixture
def tiny_encoder(tmp_path):
    pytest.importorskip("transformers")
    return tiny_hugging_face.bert(tmp_path / "bert")


@pytest.fixture
def words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("the cat sat on a mat and the dog ran to see what the cat had found; " * 20)
    return path


@pytest.fixture
def trained(arguments, run, tmp_path):
    run(arguments("mha", "--model.attention.init_args.backend=eager"))
    return tmp_path / "run"


def test_a_run_of_the_recipe(trained, words_file, tmp_path, capsys):
    out = tmp_path / "out"
    capsys.readouterr()
    main([str(trained), "--text", str(words_file), "--out", str(out), "--length", "24", "--sequences", "5",
          "--batch_size", "2", "--probe_tokens", "7", "--format", "svg,png"])  # fmt: skip
    said = capsys.readouterr().out
    loaded = load_model(trained)
    room = 23
    ids = loaded.tokenizer.encode(words_file.read_text())
    tokens = torch.tensor([[loaded.tokenizer.document_id, *ids[i * room : (i + 1) * room]] for i in range(5)])
    report = head_report(loaded.model, [tokens])
    assert f"{sum(layer.num_heads for layer in report.layers)} heads on 120 tokens: " in said
    content = json.loads((out / "heads.json").read_text())
    assert content["queries"] == 120
    for found, layer in zip(content["layers"], report.layers, strict=True):
        for name, values in layer.measures.items():
            assert found["measures"][name] == pytest.approx(values.tolist(), abs=1e-6), name
        torch.testing.assert_close(torch.tensor(found["pair_cosine"]), layer.pair_cosine.float(), atol=1e-5, rtol=0)
    clusters = layer_clusters(loaded.model, [tokens], 7)
    for found, expected in zip(content["clusters"], clusters, strict=True):
        assert found["error"] == pytest.approx(expected.error.tolist(), abs=1e-6)
        assert found["elbow"] == expected.elbow
        assert found["probe_tokens"] == 7
    with (out / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sink"]) for row in rows] == pytest.approx(report.table("sink").flatten().tolist(), abs=1e-6)
    assert rows[-1]["label"] == f"L{len(report.layers) - 1}H{report.layers[-1].num_heads - 1}"
    page = (out / "report.html").read_text()
    pictures = sorted(file.name for file in out.glob("*.png"))
    assert {"normalized_entropy.png", "distance.png", "sink.png", "previous_token.png", "kinds.png", "pair_cosine.png",
            "output_cosine.png", "clusters.png", "clusters-dark.png"} <= set(pictures)  # fmt: skip
    assert page.count("<img ") == page.count("<source ") == len(pictures) / 2
    assert {file.stem for file in out.glob("*.svg")} == {name[:-4] for name in pictures if "-dark" not in name}
    assert not re.search(r"https?://|<script", page)
    assert content["made"]["command"].startswith(f"attnzoo-heads {trained} --text ")
    assert content["made"]["command"].endswith("--format svg,png")
    assert f"by attnzoo {attnzoo.__version__} with torch" in page
    assert content["made"]["command"] in page
    assert "<h2>Terms</h2>" in page


def test_a_hugging_face_folder(tiny_llama, words_file, tmp_path, capsys):
    folder, model, tokenizer = tiny_llama
    out = tmp_path / "out"
    main(
        [
            str(folder),
            "--text",
            str(words_file),
            "--out",
            str(out),
            "--length",
            "16",
            "--sequences",
            "3",
            "--name",
            "A llama",
        ]
    )
    content = json.loads((out / "heads.json").read_text())
    ids = tokenizer.encode(words_file.read_text(), add_special_tokens=False)
    tokens = torch.tensor([ids[i * 16 : (i + 1) * 16] for i in range(3)])
    expected = head_report(model.eval(), [tokens])
    found = torch.tensor([layer["measures"]["previous_token"] for layer in content["layers"]], dtype=torch.float64)
    torch.testing.assert_close(found, expected.table("previous_token"), atol=1e-6, rtol=0)
    assert "<title>Heads of A llama</title>" in (out / "report.html").read_text()
    assert "8 heads on 48 tokens" in capsys.readouterr().out


def test_a_single_head_has_no_cosine(tmp_path, words_file, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "one")
    tiny_hugging_face.tokenizer(around=False).save_pretrained(tmp_path / "one")
    main([str(tmp_path / "one"), "--text", str(words_file), "--length", "16", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1 head on 256 tokens: ")
    assert said[2][said[1].index("  cosine") : said[1].index("  clusters")].split() == []


def test_weights_that_are_not_finite_are_named(tiny_llama, words_file, tmp_path, capsys):
    folder, model, _ = tiny_llama
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    said = refused([folder, "--text", words_file, "--length", 16, "--out", tmp_path / "out"], capsys)
    assert "layer 'model.layers.1.self_attn' must have finite attention weights" in said
    assert not (tmp_path / "out").exists()


def test_special_tokens_stand_around_every_sequence(tiny_encoder, words_file):
    folder, _, tokenizer = tiny_encoder
    read = reader(load_model(folder))
    assert (read.before, read.after) == ((tokenizer.cls_token_id,), (tokenizer.sep_token_id,))
    tokens = sequences("text", words_file, read, 12, 4)
    assert tokens.shape == (4, 12)
    assert set(tokens[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(tokens[:, -1].tolist()) == {tokenizer.sep_token_id}
    plain = tokenizer.encode(words_file.read_text(), add_special_tokens=False)
    assert tokens[:, 1:-1].flatten().tolist() == plain[:40]


def test_clusters_of_a_model_that_sees_later_tokens_are_of_all_tokens(tiny_encoder):
    _, model, _ = tiny_encoder
    tokens = torch.randint(5, 60, (2, 9))
    found = layer_clusters(model.eval(), tokens.split(1), 5)
    assert [own.probe_tokens for own in found] == [9, 9]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(tokens, output_attentions=True).attentions
    for own, pattern in zip(found, patterns, strict=True):
        expected = chai_cluster_error(pattern, 9)
        torch.testing.assert_close(own.error, expected, atol=1e-5, rtol=1e-4)
        assert own.elbow == elbow(own.error)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_cluster(request, kind, side):
    _, model, _ = request.getfixturevalue("tiny_llama" if kind == "llama" else "tiny_encoder")
    rows = [torch.randint(5, 60, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 6)]
    alone = [layer_clusters(model.eval(), [{"input_ids": row}], 5) for row in rows]
    ends = (3, 0) if side == "left" else (0, 3)
    ids, mask = (torch.cat([long, F.pad(short, ends)]) for long, short in (rows, map(torch.ones_like, rows)))
    found = layer_clusters(model, [{"input_ids": ids, "attention_mask": mask}], 5)
    for both, first, second in zip(found, *alone, strict=True):
        torch.testing.assert_close(both.error, first.error + second.error, atol=1e-5, rtol=1e-4)


def test_a_planted_head_is_found_beside_its_sink():
    """Head 1 attends to the token before by its rotation alone, where it does not rest on the first."""
    torch.manual_seed(0)
    model = DecoderLM(40, lambda E: attnzoo.MultiHeadAttention(E, 2, rope=None), embed_dim=16, num_layers=1)
    report = head_report(model, [torch.randint(40, (2, 12))])
    layer = report.layers[0]
    layer.measures["detect_previous_token_head"][1] = 0.7
    layer.measures["sink"][1] = 0.9
    kinds = by_kind(report, 0.5)
    assert kinds["previous_token_head"] == ["L0H1"]
    assert kinds["sink_head"] == ["L0H1"]
    assert by_kind(report, 0.95)["sink_head"] == []


def test_layers_are_chosen_evenly():
    assert evenly(5, 8) == [0, 1, 2, 3, 4]
    assert evenly(30, 4) == [0, 10, 19, 29]
    assert evenly(30, 1) == [29]


def test_defaults():
    choices = parse(["a/b.ckpt", "--text", "t.txt"])
    assert str(choices.out) == "runs/heads/b"
    assert str(parse(["a/b.ckpt", "--text", "t.txt", "--name", "c"]).out) == "runs/heads/c"
    assert (choices.length, choices.sequences) == (128, None)


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    found = [line for line in said.splitlines() if line.startswith("attnzoo-heads: error: ")]
    assert len(found) == 1, said
    return found[0]


def test_mistakes_end_in_one_sentence(tiny_llama, words_file, tmp_path, capsys):
    folder, _, _ = tiny_llama
    blank, binary, short = tmp_path / "blank.txt", tmp_path / "binary.txt", tmp_path / "short.txt"
    blank.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("a cat")
    weights = tmp_path / "weights.safetensors"
    layer = attnzoo.MultiHeadAttention(16, 2, bias=False)
    save_file({f"h.0.{name}": value.clone() for name, value in layer.state_dict().items()}, weights)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    text, out = ["--text", words_file], ["--out", tmp_path / "out"]
    for words, message in (
        ([tmp_path / "nothing", *text], "MODEL must be a file or folder, got .*nothing'"),
        ([folder, "--text", tmp_path / "no.txt"], "text must be a file, got .*no.txt', which is none"),
        ([folder, "--text", tmp_path], "text must be a file, got"),
        ([folder, "--text", blank], "text must hold text, got .*blank.txt', which is blank"),
        ([folder, "--text", binary], "text must be UTF-8 text, got .*binary.txt'"),
        ([folder, "--text", short], "text must fill 1 sequence of 128 tokens, got .* which fill 0"),
        ([folder, *text, "--sequences", 9999], "text must fill 9999 sequences of 128 tokens, got"),
        ([folder, *text, "--sequences", 0], "sequences must be at least 1, got 0"),
        ([folder, *text, "--length", 4096], "length must not exceed the model's 256 positions, got 4096"),
        ([folder, *text, "--length", 1], "length must be at least 2, got 1"),
        ([folder, *text, "--length", 8, "--probe-tokens", 9], "probe_tokens must not exceed length, got 9 and 8"),
        ([folder, *text, "--batch-size", 0], "batch_size must be at least 1, got 0"),
        ([folder, *text, "--threshold", 2], "threshold must lie in .*, got 2"),
        ([folder, *text, "--device", "x"], "device must be one that torch knows"),
        ([weights, *text], "does not say how many heads"),
        ([bare, *text], "the tokenizer in .*bare'"),
        ([folder], "text"),
    ):
        assert re.search(message, refused([*words, *out], capsys)), message
    assert re.search("out must be a folder", refused([folder, *text, "--out", short], capsys))
    assert not (tmp_path / "out").exists()


def test_a_mechanism_without_patterns_is_refused(arguments, run, words_file, tmp_path, capsys):
    run(arguments("linear"))
    said = refused([tmp_path / "run", "--text", words_file, "--length", 16, "--out", tmp_path / "out"], capsys)
    assert "has no attention patterns" in said
    assert not (tmp_path / "out").exists()
