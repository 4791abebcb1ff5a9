"""The comparison: what is held equal, statistics, tables, and a small one from end to end."""

import csv
import json
import math
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from attnzoo_recipes.compare.cli import main, parse
from attnzoo_recipes.compare.plan import Settings, attention_of, feed_forward_of, plan, run_key
from attnzoo_recipes.compare.table import draw_losses, draw_quality, markdown, summarise
from attnzoo_recipes.tables import as_csv

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))
MODEL = {"embed_dim": 192, "num_layers": 4}
FACTS = {
    "match": "params", "steps": 400, "batch_tokens": 2048, "unigram": 4.6, "bigram": 3.5, "prompt_tokens": 192,
    "decode_tokens": 32, "tokens": 256, "machine": "2-core CPU",
}  # fmt: skip


def plans(match, names=("mha", *[n for n in NAMES if n != "mha"])):
    described = {name: attention_of(CONFIGS / "attention" / f"{name}.yaml") for name in names}
    return plan(described, MODEL, 2048, 256, match)


def finished(name, seed, bits, **more):
    return {
        "mechanism": name, "seed": seed, "status": "finished", "detail": "", "val_bits_per_byte": bits,
        "parameters": 2_000_000, "mlp_dim": 512, "flops_per_token": 14_000_000, "cache_bytes_per_token": 3072,
        "curve": [(100, bits + 1), (200, bits)], **more,
    }  # fmt: skip


@pytest.mark.parametrize("match", ["params", "flops"])
def test_every_mechanism_is_matched_by_its_mlp(match):
    # EIT's H^2 score maps alone take more FLOPs than the whole small model of mha.
    first, *others = plans(match, ("mha", *[n for n in NAMES if n != "mha" and not (match == "flops" and n == "eit")]))
    for other in others:
        if match == "params":
            assert other.parameters == pytest.approx(first.parameters, rel=2e-3), other.mechanism
        else:
            assert other.flops_per_token == pytest.approx(first.flops_per_token, rel=2e-3), other.mechanism
    assert len({other.mlp_dim for other in others}) > 1


def test_without_matching_every_mlp_has_the_same_width():
    assert {p.mlp_dim for p in plans("none")} == {512}


def test_a_mechanism_without_room_for_an_mlp_is_refused():
    big = {"class_path": "attnzoo.MultiHeadAttention", "init_args": {"num_heads": 8, "head_dim": 2048}}
    small = {"class_path": "attnzoo.MultiQueryAttention", "init_args": {"num_heads": 8}}
    with pytest.raises(ValueError, match="match 'params' leaves no room for the MLP of big"):
        plan({"small": small, "big": big}, MODEL, 2048, 256, "params")


@pytest.mark.parametrize(
    ("name", "got"), [("depth0", "null"), ("depth2", "FeedForward"), ("mh_moe", "MultiHeadMixtureOfExperts")]
)
def test_attention_is_compared_with_swiglu(name, got):
    mha = {"mha": attention_of(CONFIGS / "attention" / "mha.yaml")}
    model = {**MODEL, **feed_forward_of(CONFIGS / "feed_forward" / f"{name}.yaml")}
    with pytest.raises(ValueError, match=f"feed_forward must be SwiGLU, whose width is chosen, .*{got}"):
        plan(mha, model, 2048, 256, "params")


def test_differences_are_paired_by_seed():
    a, b = [1.80, 1.83, 1.79, 1.84], [1.77, 1.81, 1.78, 1.80]
    cells = [finished("mha", i, x) for i, x in enumerate(a)] + [finished("kha", i, x) for i, x in enumerate(b)]
    mha, kha = summarise(cells, {"mha": (9000.0, 800.0)})
    assert mha["difference"] is None
    assert kha["difference"] == pytest.approx(sum(b) / 4 - sum(a) / 4)
    low, high = ttest_rel(b, a).confidence_interval(0.95)
    assert kha["interval"] == pytest.approx((high - low) / 2)
    assert kha["standard_error"] == pytest.approx(
        math.sqrt(sum((x - kha["val_bits_per_byte"]) ** 2 for x in b) / 3 / 4)
    )
    assert (mha["tokens_per_second"], mha["decode_tokens_per_second"]) == (9000.0, 800.0)
    assert kha["decode_tokens_per_second"] is None


def test_a_seed_that_one_side_lacks_is_left_out_and_named():
    cells = [finished("mha", 0, 1.8), finished("mha", 1, 1.9), finished("kha", 0, 1.7)]
    cells.append({**finished("kha", 1, 0.0), "status": "diverged", "detail": "10 steps in a row | not finite"})
    row = summarise(cells, {})[1]
    assert row["difference"] == pytest.approx(-0.1)
    assert row["interval"] is None
    assert row["seeds"] == 1
    text = markdown(summarise(cells, {}), FACTS)
    assert "seed 1 diverged: 10 steps in a row / not finite" in text
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines()[:4])


def test_a_mechanism_that_never_finished_is_still_a_row():
    cells = [finished("mha", 0, 1.8), {**finished("kha", 0, 0.0), "status": "failed", "detail": "out of memory"}]
    rows = summarise(cells, {})
    assert rows[1]["val_bits_per_byte"] is None
    assert "seed 0 failed: out of memory" in markdown(rows, FACTS)
    assert "One seed" in markdown(rows, FACTS)
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [row["mechanism"] for row in read] == ["mha", "kha"]
    assert float(read[0]["val_bits_per_byte"]) == 1.8


def test_pictures_are_written(tmp_path):
    cells = [finished(name, seed, 1.8 + 0.01 * seed) for name in ("mha", "kha") for seed in range(2)]
    draw_losses(cells, FACTS, tmp_path / "a.png")
    draw_quality(summarise(cells, {}), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_packaged_config_is_read_and_lists_every_mechanism():
    settings = parse(["--config", "configs/compare.yaml"])
    assert sorted(settings.mechanisms) == NAMES
    assert settings.mechanisms[0] == "mha"
    assert parse(["--config", "compare.yaml", "--mechanisms", "mha,kha", "--seeds", "3"]).seeds == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mechanisms must be given"),
        (["--config", "compare.yaml", "--mechanisms", "mha,mha"], "each once, got"),
        (["--config", "compare.yaml", "--mechanisms", "nothing"], "config 'attention/nothing.yaml' is neither"),
        (["--config", "compare.yaml", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--config", "compare.yaml", "--match", "time"], "match must be one of params, flops, none, got 'time'"),
        (["--mechanisms", "mha", "--vary", "model"], "vary must be one of attention, feed_forward, got 'model'"),
        (["--mechanisms", "one", "--vary", "feed_forward"], "config 'feed_forward/one.yaml' is neither"),
        (
            ["--mechanisms", "depth1", "--vary", "feed_forward", "--match", "flops"],
            "match must be none where feed-forward layers vary, got 'flops'",
        ),
        (["--config", "none.yaml"], "config 'none.yaml' is neither a file nor one of"),
        (["--config", "compare.yaml", "--train", '{"optimiser": {}}'], "train must hold sections .*, got 'optimiser'"),
        (["--config", "compare.yaml", "--mechanism", "mha"], "mechanism"),
    ],
)
def test_mistakes_end_in_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("attnzoo-compare: error: ")
    assert error.count("\n") == 1
    assert __import__("re").search(message, error)


def test_settings_take_a_list_or_a_string():
    made = Settings.checked(["mha", "kha"], 1, "none", "x", {})
    assert made == Settings.checked("mha, kha", 1, "none", "x", {})


@pytest.fixture
def small(tmp_path, corpus_file):
    """Words of a comparison of two steps on the small corpus."""
    train = {
        "model": {"embed_dim": 32, "num_layers": 1, "warmup_steps": 1},
        "data": {"source": "text", "files": [str(corpus_file)], "unit": "line", "val_fraction": 0.2,
                 "tokenizer": "byte", "block_size": 32, "batch_size": 2, "cache_dir": str(tmp_path / "data")},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "log_every_n_steps": 1},
        "samples": {"max_new_tokens": 2},
    }  # fmt: skip
    return ["--mechanisms", "mha,gta", "--out", str(tmp_path / "out"), "--train", json.dumps(train)]


def test_a_comparison_finishes_and_is_not_run_again(small, tmp_path, capsys):
    main(small)
    out = tmp_path / "out"
    text = (out / "table.md").read_text()
    assert "Held equal to mha: parameters of the whole model" in text
    assert "held equal: parameters" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [row["seeds"] for row in results["rows"]] == [1, 1]
    assert all(row["decode_tokens_per_second"] > 0 and row["tokens_per_second"] > 0 for row in results["rows"])
    assert (out / "learning_curves.png").is_file()
    assert (out / "quality_vs_cache.png").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")}
    assert len(stamps) == 2
    main(small)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")}
    assert after == stamps


def test_feed_forward_layers_are_compared(small, tmp_path):
    main([*small[:1], "depth0,depth2,parallel", *small[2:], "--vary", "feed_forward"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["mechanism"]: row for row in results["rows"]}
    assert [row["seeds"] for row in rows.values()] == [1, 1, 1], [row["note"] for row in rows.values()]
    assert rows["depth2"]["parameters"] - rows["depth0"]["parameters"] == 2 * 32 * 128 + 32
    flops = [rows[name]["training_flops_per_token"] for name in ("depth0", "depth2")]
    assert flops[1] - flops[0] == 3 * 2 * 2 * 32 * 128
    assert "Held equal to depth0: the attention" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {feed_forward: null, lr: 1}", "must hold nothing but feed_forward"),
        ("model: {}", "must hold nothing but feed_forward"),
        ("model: {parallel: true}\ndata: {seed: 1}", "must hold nothing but feed_forward"),
        ("model: {feed_forward: {init_args: {}}}", "must hold model.feed_forward.class_path"),
        ("model: {feed_forward: {class_path: subprocess.Popen}}", "names subprocess.Popen, but may name only"),
        ("model: [", "must be YAML"),
    ],
)
def test_configs_of_feed_forward_layers(content, message, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        feed_forward_of(tmp_path / "a.yaml")


def test_another_setting_is_another_cell():
    (mha,) = plans("none", ["mha"])
    settings = Settings.checked("mha", 1, "none", "x", {"model": {"lr": 1e-3}})
    other = Settings.checked("mha", 1, "none", "x", {"model": {"lr": 2e-3}})
    keys = {run_key(mha, 0, settings, []), run_key(mha, 1, settings, []), run_key(mha, 0, other, []),
            run_key(mha, 0, settings, ["--model.lr=1"])}  # fmt: skip
    assert len(keys) == 4
    assert run_key(mha, 0, Settings.checked("mha,kha", 2, "none", "y", settings.train), []) in keys


def test_a_run_that_diverges_is_a_row_that_says_so(small, tmp_path):
    main([*small[:1], "gta", *small[2:], "--", "--model.lr=1e30", "--loss_guard.patience=1", "--trainer.max_steps=4"])
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["val_bits_per_byte"] is None
    assert "seed 0 diverged" in row["note"]
