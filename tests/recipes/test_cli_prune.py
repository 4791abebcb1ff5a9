"""attnzoo-prune: importance, curves, ablations and speed of recipe checkpoints, Hugging Face models and encoders."""

import csv
import json
import re

import pytest
import tiny_hugging_face
import torch
import torch.nn.functional as F

from attnzoo.diagnostics.pruning.ablation import ablate_heads
from attnzoo.diagnostics.pruning.curves import head_pruning_curve
from attnzoo.diagnostics.pruning.importance import head_importance
from attnzoo.diagnostics.pruning.masks import head_mask, masked_heads
from attnzoo_recipes.diagnose.load_model import load_model
from attnzoo_recipes.diagnose.losses import decode, label_losses, logits_of, next_token_losses, retrieval_losses
from attnzoo_recipes.diagnose.prune import main, parse
from attnzoo_recipes.diagnose.prune_study import Point, Task, drawn, greedy_curves, measure_speed
from attnzoo_recipes.diagnose.texts import pair_batches, reader


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
    words = tiny_hugging_face.WORDS.split()[:20]
    path.write_text(" ".join(words[(i * i + 3 * i) % len(words)] for i in range(400)))
    return path


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("the cat", "a cat sat on a mat"), ("the dog", "that dog ran"), ("what", "it was found"),
            ("see", "to see its mat"), ("under", "found under it")]  # fmt: skip
    path.write_text("\n".join(json.dumps({"query": q, "document": d}) for q, d in rows) + "\n\n")
    return path


def read(out):
    with (out / "prune.csv").open(newline="") as file:
        return json.loads((out / "prune.json").read_text()), list(csv.DictReader(file))


def test_a_run_of_the_recipe(arguments, run, words_file, tmp_path, capsys):
    run(arguments("mha", "--model.attention.init_args.backend=eager"))
    folder, out = tmp_path / "run", tmp_path / "out"
    capsys.readouterr()
    main([str(folder), "--data", str(words_file), "--out", str(out), "--length", "20", "--examples", "6",
          "--percents", "25,50,75", "--modes", "greedy,iterative", "--ablate", "one,layer", "--speed", "0,50",
          "--rounds", "1", "--decoded", "3"])  # fmt: skip
    said = capsys.readouterr().out
    loaded = load_model(folder)
    ids = loaded.tokenizer.encode(words_file.read_text())
    start = loaded.tokenizer.document_id
    tokens = torch.tensor([[start, *ids[19 * i : 19 * i + 19]] for i in range(6)])
    logits = loaded.model(tokens)
    expected = torch.stack([
        torch.nn.functional.cross_entropy(logits[i, :-1], tokens[i, 1:]) for i in range(6)
    ]).detach()  # fmt: skip
    torch.testing.assert_close(next_token_losses(loaded.model, tokens).detach(), expected)
    content, rows = read(out)
    assert set(content["curves"]) == {"greedy, l2", "greedy, none", "iterative, l2", "iterative, none"}
    curve = head_pruning_curve(loaded.model, [tokens], next_token_losses, percents=(25, 50, 75))
    found = content["curves"]["greedy, l2"]
    assert found["order"] == [list(head) for head in curve.order]
    assert found["losses"] == pytest.approx(curve.losses.tolist(), rel=1e-5)
    assert found["base_loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert set(found["baselines"]) == {"random0", "random1", "reverse"}
    raw = head_importance(loaded.model, [tokens], next_token_losses, normalize=None)
    torch.testing.assert_close(
        torch.tensor(content["curves"]["greedy, none"]["importance"], dtype=torch.float64), raw, atol=1e-6, rtol=1e-4
    )
    table = ablate_heads(loaded.model, [tokens], next_token_losses, "layer")
    assert content["ablations"]["layer"]["losses"] == [pytest.approx(row.tolist()) for row in table.losses]
    # The curve's first point is the loss with exactly those heads masked.
    shape = tuple(torch.tensor(content["curves"]["greedy, none"]["importance"]).shape)
    with masked_heads(loaded.model, head_mask(curve.removed(0), shape)), torch.no_grad():
        assert found["losses"][0] == pytest.approx(float(next_token_losses(loaded.model, tokens).mean()), rel=1e-5)
    named = {row["curve"] for row in rows}
    assert named == {*content["curves"], "random 0", "random 1", "reverse"}
    whole = [row for row in rows if row["removed"] == "0"]
    assert len(whole) == len(named)
    assert all(float(row["loss"]) == pytest.approx(found["base_loss"]) for row in whole)
    assert set(content["speed"]) == {"prefill", "decoding"}
    assert content["speed"]["prefill"]["error"][1] < 1e-5
    assert content["speed"]["prefill"]["parameters"][1] < content["speed"]["prefill"]["parameters"][0]
    page = (out / "report.html").read_text()
    pictures = {file.name for file in out.glob("*.png")}
    assert {"curves.png", "importance-l2.png", "importance-none-dark.png", "ablation-one.png"} <= pictures
    assert page.count("<img ") == len(pictures) / 2
    assert "least important ones (greedy, l2)" in said
    assert "removals lower the loss" in said


def test_key_value_groups_of_a_hugging_face_model(tiny_llama, words_file, tmp_path):
    folder, _, _ = tiny_llama
    out = tmp_path / "out"
    main([str(folder), "--data", str(words_file), "--out", str(out), "--length", "12", "--examples", "3",
          "--unit", "kv_group", "--percents", "25,50", "--normalize", "none", "--rounds", "1", "--seeds", "",
          "--min-heads-per-layer", "1", "--speed", "0,25,75"])  # fmt: skip
    content, _ = read(out)
    (curve,) = content["curves"].values()
    assert curve["total"] == 4
    assert curve["counts"] == [1, 2]
    assert set(curve["baselines"]) == {"reverse"}
    # One group of each layer is protected, so three of four groups are never removed for the timing.
    assert content["speed"]["prefill"]["fractions"] == [0.0, 0.25]
    assert content["speed"]["prefill"]["removed"] == [0, 2]
    assert content["speed"]["decoding"]["error"][1] < 1e-5


def test_decoding_ends_where_the_whole_pass_does(tiny_llama, arguments, run, tmp_path):
    _, model, _ = tiny_llama
    run(arguments("mla"))
    tokens = torch.randint(5, 60, (2, 9))
    for each in (model.eval(), load_model(tmp_path / "run").model):
        with torch.no_grad():
            torch.testing.assert_close(decode(each, tokens), logits_of(each, tokens)[:, -1], atol=1e-5, rtol=1e-4)


def test_retrieval_with_an_encoder(tiny_encoder, pairs_file, tmp_path, capsys):
    folder, model, tokenizer = tiny_encoder
    out = tmp_path / "out"
    main([str(folder), "--data", str(pairs_file), "--out", str(out), "--length", "10", "--percents", "50",
          "--speed", "0,50", "--rounds", "1"])  # fmt: skip
    content, rows = read(out)
    (batch,) = pair_batches("data", pairs_file, reader(load_model(folder)), 10, None, 64)
    texts = [json.loads(line) for line in pairs_file.read_text().split("\n") if line]
    sides = []
    for side in ("query", "document"):
        vectors = []
        for row in texts:
            ids = tokenizer(row[side], truncation=True, max_length=10, return_tensors="pt")
            with torch.no_grad():
                vectors.append(model.eval()(**ids).last_hidden_state[0].mean(0))
        sides.append(torch.nn.functional.normalize(torch.stack(vectors), dim=-1))
    logits = 20 * sides[0] @ sides[1].T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
    losses, scores = retrieval_losses(model, batch)
    torch.testing.assert_close(losses.detach(), expected, atol=1e-4, rtol=1e-4)
    assert scores.tolist() == (logits.argmax(1) == torch.arange(5)).double().tolist()
    curve = content["curves"]["greedy, l2"]
    assert curve["base_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert curve["base_score"] == pytest.approx(float(scores.mean()))
    assert rows[0]["score"] != ""
    assert (out / "scores.png").is_file()
    assert "nats per query" in capsys.readouterr().out


def test_batches_of_pairs_are_of_nearly_equal_sizes(tiny_encoder, pairs_file):
    read = reader(load_model(tiny_encoder[0]))
    sizes = [len(batch.queries[0]) for batch in pair_batches("data", pairs_file, read, 10, None, 4)]
    assert sizes == [3, 2]
    assert len(pair_batches("data", pairs_file, read, 10, 4, 4)[0].queries[0]) == 4


@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_curves_of_one_measurement_are_the_librarys(tiny_llama, unit):
    model = tiny_llama[1]
    batches = [torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    task = Task(batches, next_token_losses, 6, False, "", None, 0.0, {})
    common = {"percents": (25, 50, 75), "granularity": "token", "unit": unit, "min_heads_per_layer": 1,
              "rescale": True, "seeds": (3,)}  # fmt: skip
    found = greedy_curves(model, task, ("l2", "none", "minmax"), coupled=False, **common)
    for how, curve in zip(("l2", None, "minmax"), found.values(), strict=True):
        expected = head_pruning_curve(model, batches, next_token_losses, normalize=how, **common)
        assert (curve.order, curve.counts, curve.mode, curve.unit) == (
            expected.order, expected.counts, expected.mode, expected.unit
        )  # fmt: skip
        torch.testing.assert_close(curve.losses, expected.losses)
        torch.testing.assert_close(curve.importance, expected.importance)
        for name, baseline in curve.baselines.items():
            assert baseline.order == expected.baselines[name].order
            torch.testing.assert_close(baseline.losses, expected.baselines[name].losses)
    assert set(found["greedy, l2"].baselines) == {"random3", "reverse"}
    assert not found["greedy, none"].baselines


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_padding_on_the_left_moves_no_loss(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bos_token_id=1, eos_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(config).eval()
    ids = torch.randint(2, 30, (1, 6))
    padded = {name: F.pad(x, (3, 0)) for name, x in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)))}
    for found, expected in zip(*(label_losses(model, b, True) for b in (padded, {"input_ids": ids})), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_percent_that_the_order_reaches(tiny_llama):
    task = Task([], None, 0, False, "loss", None, 0.0, {})
    curve = head_pruning_curve(
        tiny_llama[1], [torch.randint(64, (2, 6))], next_token_losses, percents=[10], min_heads_per_layer=3, seeds=[]
    )
    with pytest.raises(ValueError, match=r"at most 2 heads may go, fewer than each of \[50\] percent"):
        measure_speed(tiny_llama[1], task, curve, [50], 1)


def test_random_orders_are_drawn_as_one_range():
    points = {
        "greedy, l2": (Point(0, 1.0, None), Point(2, 1.5, None)),
        "random 0": (Point(0, 1.0, None), Point(2, 2.0, None)),
        "random 1": (Point(0, 1.0, None), Point(2, 4.0, None)),
    }
    found = drawn(points, "loss")
    assert found["greedy, l2"] == ([0, 2], [1.0, 1.5])
    assert found["random"] == ([0, 2], [(1.0, 1.0, 1.0), (2.0, 3.0, 4.0)])


def test_heads_that_cannot_be_removed_have_curves_without_speed(arguments, run, words_file, tmp_path):
    run(arguments("talking_heads", "--model.attention.init_args.backend=eager"))
    out = tmp_path / "out"
    main([str(tmp_path / "run"), "--data", str(words_file), "--out", str(out), "--length", "16", "--examples", "2",
          "--percents", "50", "--rounds", "1"])  # fmt: skip
    content, _ = read(out)
    assert content["curves"]["greedy, l2"]["losses"][0] > 0
    assert (content["speed"] == {}) == bool(content["no_speed"])


def test_defaults():
    choices = parse(["a/b.ckpt", "--data", "t.txt"])
    assert str(choices.out) == "runs/prune/b"
    assert str(parse(["a/b.ckpt", "--data", "t.txt", "--name", "c"]).out) == "runs/prune/c"
    assert choices.percents == tuple(range(10, 100, 10))
    assert choices.normalize == ("l2", "none")
    assert choices.ablate == ()
    assert choices.batch_size is None
    assert parse(["a", "--data", "t.jsonl", "--normalize", "none"]).normalize == ("none",)


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    found = [line for line in said.splitlines() if line.startswith("attnzoo-prune: error: ")]
    assert len(found) == 1, said
    return found[0]


def test_mistakes_end_in_one_sentence(tiny_llama, tiny_encoder, words_file, pairs_file, tmp_path, capsys):
    folder, encoder = tiny_llama[0], tiny_encoder[0]
    half = tmp_path / "half.jsonl"
    half.write_text('{"query": "a", "document": "b"}\n{"query": "a"}\n')
    data, out = ["--data", words_file], ["--out", tmp_path / "out"]
    pairs = ["--data", pairs_file]
    for words, message in (
        ([tmp_path / "nothing", *data], "MODEL must be a file or folder, got .*nothing'"),
        ([folder, "--data", tmp_path / "no.txt"], "data must be a file, got .*no.txt', which is none"),
        ([folder, *data, "--examples", 9999], "data must fill 9999 sequences of 128 tokens, got .* tokens"),
        ([encoder, *pairs, "--length", 10, "--examples", 6], "data must hold at least 6 pairs, got 5"),
        ([encoder, *data, "--length", 10], 'data must hold lines {"query".* in line 1'),
        ([folder, *pairs], "data must be a text for a model that predicts tokens, got lines of pairs in"),
        ([encoder, "--data", half, "--length", 10], "data must hold lines .* in line 2"),
        ([encoder, *pairs, "--length", 10, "--batch-size", 1], "batch_size must be at least 2 for pairs, .* got 1"),
        (
            [encoder, *pairs, "--length", 10, "--granularity", "token"],
            "granularity 'token' needs examples that are not",
        ),
        ([folder, *data, "--percents", "10,x"], "percents must be numbers with commas between, got '10,x'"),
        ([folder, *data, "--percents", "50,10"], "percents must ascend between 0 and 100, got 50,10"),
        ([folder, *data, "--percents", ""], "percents must hold at least one number"),
        ([folder, *data, "--speed", "0,200"], "speed must ascend between 0 and 100, got 0,200"),
        ([folder, *data, "--modes", "lazy"], "modes must be some of greedy, iterative, got 'lazy'"),
        ([folder, *data, "--normalize", "l3"], "normalize must be some of l2, minmax, none, got 'l3'"),
        ([folder, *data, "--ablate", "two"], "ablate must be some of one, all_but_one, kv_group, layer, got 'two'"),
        ([folder, *data, "--granularity", "x"], "granularity must be one of .* got 'x'"),
        ([folder, *data, "--unit", "x"], "unit must be one of .* got 'x'"),
        ([folder, *data, "--seeds", "0.5"], "seeds must be whole numbers in .*, got 0.5"),
        ([folder, *data, "--seeds", "1e30"], "seeds must be whole numbers in .*, got 1e30"),
        ([folder, *data, "--modes", "both"], "modes must be some of greedy, iterative, got 'both'"),
        ([folder, *data, "--rounds", 0], "rounds must be at least 1, got 0"),
        ([folder, *data, "--min-heads-per-layer", -1], "min_heads_per_layer must not be negative, got -1"),
        ([folder, *data, "--decoded", -1], "decoded must not be negative, got -1"),
        ([folder, *data, "--batch-size", 0], "batch_size must be at least 1, got 0"),
        ([folder, *data, "--examples", 0], "examples must be at least 1, got 0"),
        ([folder, *data, "--device", "x"], "device must be one that torch knows"),
    ):
        assert re.search(message, refused([*words, *out], capsys)), message
    assert not (tmp_path / "out").exists()
