"""The comparison: what is held equal, statistics, tables, and a small one from end to end."""

import csv
import itertools
import json
import math
import random
import signal
import statistics
import string
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import t, ttest_rel

import attnzoo
from attnzoo_recipes.compare import cli
from attnzoo_recipes.compare.cli import checked, finished_run, main, parse
from attnzoo_recipes.compare.pictures import draw_losses, draw_quality, label_points, spread
from attnzoo_recipes.compare.plan import (
    Data,
    Settings,
    Variant,
    attention_of,
    disagreements,
    feed_forward_of,
    held_equal,
    plan,
    run_key,
)
from attnzoo_recipes.compare.table import markdown, smallest_difference, summarise
from attnzoo_recipes.tables import as_csv

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))
MODEL = {"embed_dim": 192, "num_layers": 4}
FACTS = {
    "equal": "parameters", "training": "400 steps of 2,048 tokens", "unigram": 4.6, "bigram": 3.5,
    "prompt_tokens": 192, "decode_tokens": 32, "machine": "a 2-core CPU with precision 32-true",
    "rates": "0.001, 0.003",
}  # fmt: skip
TEXT = Data("corpus", "corpus/val", 2048)


def settings_of(model, lr=1e-3):
    """Settings of a run, of which the plan takes defaults for the rest."""
    trainer = {"max_steps": 400, "default_root_dir": "runs"}
    return {"model": {**model, "lr": lr}, "data": {"batch_size": 8, "block_size": 256, "seed": 0}, "trainer": trainer}


def planned(attentions, model, match):
    given = [(Variant(name, name), settings_of({**model, "attention": each})) for name, each in attentions.items()]
    return plan(given, [TEXT] * len(given), match)


def plans(match, names=("mha", *[n for n in NAMES if n != "mha"])):
    return planned({name: attention_of(CONFIGS / "attention" / f"{name}.yaml") for name in names}, MODEL, match)


def finished(name, seed, bits, **more):
    return {
        "mechanism": name, "seed": seed, "status": "finished", "detail": "", "val_bits_per_byte": bits,
        "rate": None,
        "parameters": 2_000_000, "mlp_dim": 512, "flops_per_token": 14_000_000, "cache_bytes_per_token": 3072,
        "curve": [(100, bits + 1), (200, bits)], **more,
    }  # fmt: skip


@pytest.mark.parametrize("match", ["params", "flops"])
def test_every_mechanism_is_matched_by_its_mlp(match):
    # EIT's H^2 score maps alone take more FLOPs than the whole small model of mha.
    made = plans(match, ("mha", *[n for n in NAMES if n != "mha" and not (match == "flops" and n == "eit")]))
    first, *others = made
    figure = {"params": "parameters", "flops": "flops_per_token"}[match]
    # Half a step of 8 in the width of four MLPs of three matrices each.
    bound = 4 * 3 * 192 * 4 * (1 if match == "params" else 6)
    for other in others:
        assert abs(other.expected[figure] - first.expected[figure]) <= bound * 1.01 + 600, other.variant.name
        assert other.mlp_dim % 8 == 0
    assert len({other.mlp_dim for other in others}) > 1
    largest = max(abs(other.expected[figure] / first.expected[figure] - 1) for other in others)
    assert f"to {largest:.2%}, through the MLP's hidden width in steps of 8" in held_equal(made, match, "attention")


def test_without_matching_every_mlp_has_the_same_width():
    made = plans("none")
    assert {p.mlp_dim for p in made} == {None}
    assert {p.expected["mlp_dim"] for p in made} == {512}


def test_a_mechanism_without_room_for_an_mlp_is_refused():
    big = {"class_path": "attnzoo.MultiHeadAttention", "init_args": {"num_heads": 8, "head_dim": 2048}}
    small = {"class_path": "attnzoo.MultiQueryAttention", "init_args": {"num_heads": 8}}
    with pytest.raises(ValueError, match="match 'params' leaves no room for the MLP of big"):
        planned({"small": small, "big": big}, MODEL, "params")


@pytest.mark.parametrize(
    ("name", "got"), [("depth0", "null"), ("depth2", "FeedForward"), ("mh_moe", "MultiHeadMixtureOfExperts")]
)
def test_attention_is_compared_with_swiglu(name, got):
    mha = {"mha": attention_of(CONFIGS / "attention" / "mha.yaml")}
    model = {**MODEL, **feed_forward_of(CONFIGS / "feed_forward" / f"{name}.yaml")}
    with pytest.raises(
        ValueError, match=f"feed_forward must be SwiGLU, whose width is chosen, to match params, got .*{got}"
    ):
        planned(mha, model, "params")


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
    assert "±" not in markdown(rows, FACTS)
    assert smallest_difference(rows) is None
    read = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [row["mechanism"] for row in read] == ["mha", "kha"]
    assert float(read[0]["val_bits_per_byte"]) == 1.8


def test_pictures_are_written(tmp_path):
    cells = [finished(name, seed, 1.8 + 0.01 * seed) for name in ("mha", "kha") for seed in range(2)]
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for kind, start in begins.items():
        draw_losses(cells, FACTS, tmp_path / f"a.{kind}")
        draw_quality(summarise(cells, {}), tmp_path / f"b.{kind}")
        for name in "ab":
            assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("seed", range(8))
def test_names_in_a_picture_cover_neither_each_other_nor_points(seed):
    draw, letters = random.Random(seed), string.ascii_lowercase
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    count = draw.randrange(5, 32)
    # Many with one cache and nearly one loss, as mechanisms have them.
    points = [(draw.choice([512, 1024, 3072, 3072, 4096, 6000]), draw.gauss(2.1, 0.05)) for _ in range(count)]
    names = ["".join(draw.choices(letters, k=draw.randrange(3, 13))) for _ in points]
    axes.plot(*zip(*points, strict=True), "o")
    label_points(axes, [(*point, name, "black") for point, name in zip(points, names, strict=True)])
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == count
    for one, other in itertools.combinations(boxes, 2):
        assert min(one.y1, other.y1) - max(one.y0, other.y0) < 3 or min(one.x1, other.x1) <= max(one.x0, other.x0)
    for (x, y), box in itertools.product(axes.transData.transform(points), boxes):
        assert not box.contains(x, y)
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1


@pytest.mark.parametrize("heights", [[0.5], [0.1, 0.9], [0.5] * 5, [0.0, 0.01, 0.02, 0.9, 1.0], [0.5, 0.4, 0.41]])
def test_names_beside_points_keep_apart_in_order_and_near(heights):
    gap = 0.05
    found = spread(heights, gap)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [found[i] for i in order]
    assert all(above - below > gap - 1e-9 for below, above in itertools.pairwise(placed))
    assert min(placed) > gap / 2 - 1e-9
    assert max(placed) < 1 - gap / 2 + 1e-9
    if len(set(heights)) == 1:
        assert sum(found) == pytest.approx(sum(heights))  # to both sides alike
    if len(heights) == 2:
        assert found == pytest.approx(heights)  # moved only where they must be


def test_names_that_are_too_many_fill_the_height():
    assert spread([0.3] * 40, 0.05) == pytest.approx([(i + 0.5) / 40 for i in range(40)])


def test_the_table_says_how_it_was_made_and_what_its_terms_mean():
    rows = summarise([finished("mha", 0, 1.8)], {})
    made = {
        "date": "2026-01-02",
        "versions": {"attnzoo": "9.8", "torch": "7.6"},
        "command": "attnzoo-compare --seeds 1",
    }
    text = markdown(rows, {**FACTS, **made})
    assert text.endswith("Made on 2026-01-02 by attnzoo 9.8 with torch 7.6: `attnzoo-compare --seeds 1`\n")
    assert "\n- **bits per byte**: " in text
    assert "Made on" not in markdown(rows, FACTS)


def test_the_packaged_config_is_read_and_lists_every_mechanism():
    settings, device, formats = parse(["--config", "configs/compare.yaml", "--format", "svg,png"])
    assert device is None
    assert formats == ("svg", "png")
    assert sorted(settings.mechanisms) == NAMES
    assert settings.mechanisms[0] == "mha"
    assert parse(["--config", "compare.yaml", "--mechanisms", "mha,kha", "--seeds", "3"])[0].seeds == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "mechanisms must be given"),
        (["--config", "compare.yaml", "--mechanisms", "mha,mha"], "each once, got"),
        (["--config", "compare.yaml", "--mechanisms", "nothing"], "config 'attention/nothing.yaml' is neither"),
        (["--config", "compare.yaml", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--config", "compare.yaml", "--match", "time"], "match must be one of params, flops, none, got 'time'"),
        (
            ["--mechanisms", "mha", "--vary", "model"],
            "vary must be attention, feed_forward or the path of a setting, .*, got 'model'",
        ),
        (["--mechanisms", "mha", "--vary", "data.seed", "--values", "1"], "the path of a setting, .*, got 'data.seed'"),
        (["--mechanisms", "mha", "--vary", "model.lr"], "values must be given with the path of a setting in vary"),
        (["--mechanisms", "mha", "--values", "1,2"], r"values must not be given, got \['1', '2'\] for attention"),
        (["--mechanisms", "mha", "--vary", "model.no", "--values", "1"], "no"),
        (["--mechanisms", "mha", "--lrs", "1e-3,-1"], "lrs must be positive and finite"),
        (["--mechanisms", "mha", "--lrs", "fast"], "lrs must be numbers, got 'fast'"),
        (["--mechanisms", "mha", "--lrs", "1e-3,0.001"], "lrs must differ"),
        (["--mechanisms", "mha", "--vary", "model.lr", "--values", "1", "--lrs", "1"], "lrs must not be given where"),
        (["--mechanisms", "mha", "--", "--data.seed=3"], "--data.seed must not be given after --"),
        (["--mechanisms", "mha", "--", "--model.lr=fast"], "lr"),
        (["--mechanisms", "mha", "--", "--trainer.max_steps=-1"], "trainer.max_steps must be given and be at least 1"),
        (["--mechanisms", "mha", "--", "--trainer.limit_train_batches=3"], "limit_train_batches must be left out"),
        (["--mechanisms", "mha", "--", "--model.z_loss=.inf"], "model.z_loss must be a finite number, got inf"),
        (["--mechanisms", "mha", "--", "--model.no=1"], "no"),
        (["--mechanisms", "one", "--vary", "feed_forward"], "config 'feed_forward/one.yaml' is neither"),
        (
            ["--mechanisms", "depth1", "--vary", "feed_forward", "--match", "flops"],
            "match must be none where feed-forward layers vary, got 'flops'",
        ),
        (["--mechanisms", "mha", "--device", "nowhere"], "device must be one that torch knows"),
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
    main([*small, "--format", "svg"])
    out = tmp_path / "out"
    text = (out / "table.md").read_text()
    assert f"{attnzoo.__version__} with torch" in text
    assert "`attnzoo-compare --mechanisms mha,gta --out" in text
    assert text.endswith("--format svg`\n")
    assert "Held equal to mha: parameters of the whole model" in text
    assert "held equal: parameters" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [row["seeds"] for row in results["rows"]] == [1, 1]
    assert all(row["decode_tokens_per_second"] > 0 and row["tokens_per_second"] > 0 for row in results["rows"])
    assert sorted(path.name for path in out.glob("*.*g")) == ["learning_curves.svg", "quality_vs_cache.svg"]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")}
    assert len(stamps) == 2
    main(small)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")}
    assert after == stamps


def test_a_run_that_failed_is_tried_again_and_one_that_diverged_is_not(tmp_path):
    (chosen,) = plans("none", ["mha"])
    for code, status, is_kept in ((4, "failed", False), (3, "diverged", True), (4, "diverged", True)):
        command = [sys.executable, "-c", f"import sys; sys.exit('full' and {code})"]
        outcome = finished_run(chosen, 0, command, tmp_path, lambda steps: None)
        assert outcome["status"] == status
        assert (tmp_path / "result.json").exists() is is_kept


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_that_is_training(number, code, small, tmp_path):
    endless = ["--", "--trainer.max_steps=200000", "--trainer.val_check_interval=200000"]
    command = [sys.executable, "-W", "ignore", "-m", "attnzoo_recipes.compare.cli"]
    words = [*command, *small, "--mechanisms", "mha", *endless]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as comparison:
        logs = tmp_path / "out/cells"
        for _ in range(1200):
            if comparison.poll() is not None or any("step 1/" in log.read_text() for log in logs.rglob("log.txt")):
                break
            time.sleep(0.1)
        comparison.send_signal(number)
        said = comparison.communicate(timeout=100)[1]
    assert comparison.returncode == code
    assert "Traceback" not in said
    assert "the same command continues where it was" in said
    (log,) = logs.rglob("log.txt")
    assert "stopped by SIGINT after step" in log.read_text()
    assert list(logs.rglob("stopped-step=*.ckpt"))


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_validated(small, tmp_path):
    words = [*small[:1], "gta", *small[2:], "--", "--trainer.max_steps=4", "--checkpoints.every_n_train_steps=2"]
    main(words)
    out = tmp_path / "out"
    before = json.loads((out / "results.json").read_text())["rows"][0]
    (result,) = out.rglob("cells/*/result.json")
    (metrics,) = out.rglob("metrics.csv")
    result.unlink()
    next(out.rglob("record.json")).unlink()
    head, *lines = metrics.read_text().splitlines(keepends=True)
    step = head.split(",").index("step")
    metrics.write_text("".join([head, *(line for line in lines if int(line.split(",")[step]) < 2)]))
    main(words)
    after = json.loads((out / "results.json").read_text())["rows"][0]
    assert after["note"] == ""
    assert after["val_bits_per_byte"] == before["val_bits_per_byte"]


@pytest.mark.slow
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
    def key(seed=0, lr=1e-3, more=None, key="corpus"):
        settings = settings_of(
            {**MODEL, "attention": attention_of(CONFIGS / "attention" / "mha.yaml"), **(more or {})}, lr
        )
        (one,) = plan([(Variant("mha", "mha"), settings)], [Data(key, "corpus/val", 2048)], "none")
        return run_key(one, seed)

    keys = [key(), key(1), key(lr=2e-3), key(more={"dropout": 0.1}), key(key="other")]
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_a_width_is_the_same_however_it_came_about():
    (unmatched,) = plans("none", ["mha"])
    (matched,) = plans("params", ["mha"])
    given = settings_of({**MODEL, "attention": attention_of(CONFIGS / "attention" / "mha.yaml"), "mlp_dim": 512})
    (chosen,) = plan([(Variant("mha", "mha"), given)], [TEXT], "none")
    (narrower,) = plan(
        [(Variant("mha", "mha"), {**given, "model": {**given["model"], "mlp_dim": 504}})], [TEXT], "none"
    )
    widths = [each.expected["mlp_dim"] for each in (unmatched, matched, chosen, narrower)]
    assert widths == [512, 512, 512, 504]
    assert run_key(unmatched, 0) == run_key(matched, 0) == run_key(chosen, 0) != run_key(narrower, 0)


def test_where_a_run_is_does_not_make_it_another():
    (one,) = plans("none", ["mha"])
    moved = settings_of({**MODEL, "attention": attention_of(CONFIGS / "attention" / "mha.yaml")})
    moved["trainer"]["default_root_dir"], moved["data"]["seed"] = "elsewhere", 5
    (other,) = plan([(Variant("mha", "mha"), moved)], [TEXT], "none")
    assert run_key(one, 0) == run_key(other, 0)


def test_a_record_that_is_not_the_plan_is_an_error_row():
    (one,) = plans("none", ["mha"])
    outcome = {"status": "finished", "detail": "", "val_bits_per_byte": 2.0, "record": dict(one.expected)}
    assert checked(one, outcome)["status"] == "finished"
    rates = one.expected["rates"]
    planted = {
        "parameters": one.expected["parameters"] + 1,
        "flops_per_token": 3,
        "cache_bytes_per_token": 0,
        "tokens": one.expected["tokens"] - 256,
        "steps": 399,
        "data": "other",
        "val_data": "other/val",
        "mlp_dim": 504,
        "rates": {**rates, "200": rates["200"] * 1.01},
    }
    assert set(planted) == set(one.expected)
    for name, value in planted.items():
        found = checked(one, {**outcome, "record": {**one.expected, name: value}})
        assert found["status"] == "differs", name
        assert "val_bits_per_byte" not in found
        assert ("learning rate" if name == "rates" else name) in found["detail"]
    assert checked(one, {**outcome, "record": None})["status"] == "differs"
    assert checked(one, {"status": "diverged", "detail": "x"})["status"] == "diverged"
    assert disagreements(one.expected, {**one.expected, "rates": {}})


@pytest.fixture
def in_this_process(run, monkeypatch):
    """Runs of a comparison import nothing again."""

    def watched(command, log, advance, steps):
        words = command[command.index("attnzoo_recipes.pretrain") + 1 :]
        with log.open("w") as out, redirect_stdout(out), redirect_stderr(out):
            try:
                run(words)
                code = 0
            except SystemExit as stop:
                code = stop.code
        return code, log.read_text().splitlines()[-1]

    monkeypatch.setattr(cli, "watched", watched)


@pytest.fixture
def changing(tmp_path, monkeypatch):
    """A mechanism that has one more parameter in a run than in the plan, which is made without memory."""
    (tmp_path / "changing.py").write_text(
        "import attnzoo, torch\n\nclass Changing(attnzoo.MultiHeadAttention):\n"
        "    def __init__(self, embed_dim: int, num_heads: int = 4):\n"
        "        super().__init__(embed_dim, num_heads)\n"
        "        if self.q_proj.weight.device.type != 'meta':\n"
        "            self.more = torch.nn.Parameter(torch.zeros(1))\n"
    )
    path = tmp_path / "changing.yaml"
    path.write_text("model: {attention: {class_path: changing.Changing, init_args: {num_heads: 4}}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield str(path)
    sys.modules.pop("changing", None)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_is_not_as_planned_is_an_error_row(small, changing, tmp_path):
    main(["--allow-import", "changing", small[0], f"mha,{changing}", *small[2:]])
    mha, other = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert mha["seeds"] == 1
    assert other["seeds"] == 0
    assert other["val_bits_per_byte"] is None
    planned = other["parameters"]
    assert f"seed 0 differs: the run had parameters {planned + 1} instead of {planned}" in other["note"]


@pytest.mark.usefixtures("in_this_process")
def test_arguments_of_the_runs_are_in_the_plan(small, tmp_path):
    """The rows are those of the runs, also where an argument changes every mechanism."""
    more = ["--model.attention.init_args.num_heads=2", "--model.attention.init_args.head_dim=8"]
    main([small[0], "mha", *small[2:], "--", *more])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for cell in results["cells"]:
        assert cell["status"] == "finished", cell["detail"]
        assert cell["record"]["parameters"] == cell["parameters"]
    model = attnzoo.MultiHeadAttention(32, 2, head_dim=8, bias=False)
    mha = results["rows"][0]
    attention = sum(p.numel() for p in model.parameters())
    assert mha["parameters"] == 257 * 32 + 3 * 32 + attention + 3 * 32 * mha["mlp_dim"]
    assert mha["cache_bytes_per_token"] == 2 * 2 * 8 * 2


@pytest.mark.slow
def test_any_setting_varies(small, tmp_path):
    words = [small[0], "mha", *small[2:], "--vary", "model.embed_dim", "--values", "16,32"]
    main(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["mechanism"]: row for row in results["rows"]}
    assert list(rows) == ["embed_dim=16", "embed_dim=32"]
    assert [row["seeds"] for row in rows.values()] == [1, 1], [row["note"] for row in rows.values()]
    assert rows["embed_dim=16"]["parameters"] < rows["embed_dim=32"]["parameters"]
    assert "everything but model.embed_dim" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_learning_rates_are_tried_for_each_mechanism(small, tmp_path):
    main([small[0], "mha", *small[2:], "--lrs", "1e-3,1e-2"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["rows"]
    assert [cell["rate"] for cell in results["cells"]] == [1e-3, 1e-2]
    assert row["rate"] == 1e-3
    assert row["best_val_bits_per_byte"] == min(cell["val_bits_per_byte"] for cell in results["cells"])
    assert "best of 0.001, 0.01" in (tmp_path / "out" / "table.md").read_text()


def test_the_best_rate_of_each_mechanism_is_beside_the_common_one():
    cells = [
        finished(name, seed, bits + 0.01 * seed, rate=rate)
        for name, rate, bits in (
            ("mha", 1e-3, 2.0), ("mha", 3e-3, 1.9), ("kha", 1e-3, 1.95), ("kha", 3e-3, 2.2), ("gta", 1e-3, 2.1),
        )
        for seed in range(2)
    ]  # fmt: skip
    cells.append({**finished("gta", 0, 0.0, rate=3e-3), "status": "diverged", "detail": "nan"})
    mha, kha, gta = summarise(cells, {}, 1e-3)
    assert (mha["val_bits_per_byte"], mha["best_rate"], mha["best_val_bits_per_byte"]) == pytest.approx(
        (2.005, 3e-3, 1.905)
    )
    assert kha["best_rate"] == 1e-3
    assert kha["difference"] == pytest.approx(-0.05)
    assert kha["best_difference"] == pytest.approx(0.05)
    assert gta["best_rate"] == 1e-3
    assert "seed 0 at rate 0.003 diverged" in gta["note"]
    text = markdown([mha, kha, gta], FACTS)
    assert "| best rate | validation at best rate | difference at best rates |" in text
    assert len({line.count("|") for line in text.splitlines()[:5]}) == 1


def test_the_table_says_what_it_can_decide():
    seeds = range(3)
    cells = [finished("mha", seed, 2.0 + 0.1 * seed) for seed in seeds]
    cells += [finished("kha", seed, 1.9 + 0.1 * seed + 0.001 * seed) for seed in seeds]
    cells += [finished("gta", seed, 2.0 + 0.05 * seed) for seed in seeds]
    rows = summarise(cells, {})
    number, smallest = smallest_difference(rows)
    spreads = [statistics.stdev([-0.1, -0.099, -0.098]), statistics.stdev([0.0, -0.05, -0.1])]
    pooled = math.sqrt(sum(spread**2 for spread in spreads) / 2)
    assert number == 3
    assert smallest == pytest.approx(t.ppf(0.975, 2) * pooled / math.sqrt(3))
    text = markdown(rows, FACTS)
    assert f"The smallest difference that 3 seeds could show here is {smallest:.4f}." in text
    assert "Different from mha by this measure: kha; undecided: gta." in text


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.filterwarnings("ignore:Step . is skipped")
def test_a_run_that_diverges_is_a_row_that_says_so(small, tmp_path):
    main([*small[:1], "gta", *small[2:], "--", "--model.lr=1e30", "--loss_guard.patience=1", "--trainer.max_steps=4"])
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["val_bits_per_byte"] is None
    assert "seed 0 diverged" in row["note"]
