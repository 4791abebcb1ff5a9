"""Several sources of training text by weight."""

import csv
import json
import re

import numpy as np
import pytest
import torch

from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.data.order import CYCLE, EndlessBatches, MixedBatches, shares
from tests.recipes.conftest import TEXT
from tests.recipes.test_windows import drawn

# the order


@pytest.mark.parametrize(
    "weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-9, 1], [5], [1 / 3, 1 / 3, 1 / 3], [1e-9, 1e-9, 1e-9, 2, 2]]
)
def test_shares_are_the_weights(weights):
    found = shares(weights)
    assert sum(found) == CYCLE
    assert min(found) >= 1
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - weight / sum(weights) * CYCLE) <= len(weights)
    assert shares([10 * weight for weight in weights]) == found


def test_weights_hold_over_any_stretch_and_every_cycle():
    order = MixedBatches([1000, 70, 10**9], [0.6, 0.3, 0.1], 1, seed=3)
    samples = np.arange(2 * CYCLE + 5000)
    blocks = order.blocks(samples)
    sources = np.searchsorted(order.offsets, blocks, side="right") - 1
    for count in (0, 1, 700, CYCLE - 1, CYCLE, CYCLE + 1, len(samples)):
        assert order.counts(count) == np.bincount(sources[:count], minlength=3).tolist()
    for cycle in range(2):
        assert np.bincount(sources[cycle * CYCLE : (cycle + 1) * CYCLE]).tolist() == order.shares.tolist()
    for first in range(0, CYCLE, 8192):
        found = np.bincount(sources[first : first + 8192], minlength=3) / 8192
        assert np.abs(found - [0.6, 0.3, 0.1]).max() < 0.03
    # Each source is read without repetition, pass after pass.
    for source, size in ((0, 1000), (1, 70)):
        own = blocks[sources == source] - order.offsets[source]
        for start in range(0, len(own) - size, size):
            assert sorted(own[start : start + size]) == list(range(size))
        assert own[:size].tolist() != own[size : 2 * size].tolist()
    far = blocks[sources == 2]
    assert len(np.unique(far)) == len(far)


def test_the_order_follows_from_seed_and_number():
    sizes, weights = [50, 30], [2, 1]
    whole = MixedBatches(sizes, weights, 8, seed=1).blocks(np.arange(80_000))
    for start in (0, 8, 65_528, 65_536, 70_000):
        batches = iter(MixedBatches(sizes, weights, 8, 1, start))
        found = [index for _ in range(3) for index in next(batches)]
        assert found == whole[start : start + 24].tolist()
    shared = [iter(MixedBatches(sizes, weights, 8, 1, 65_528, rank, 2)) for rank in range(2)]
    for step in range(3):
        both = [index for batches in shared for index in next(batches)]
        assert both == whole[65_528 + 8 * step : 65_536 + 8 * step].tolist()
    assert MixedBatches(sizes, weights, 8, seed=2).blocks(np.arange(500)).tolist() != whole[:500].tolist()
    # One source keeps the order that it had before there were mixtures.
    assert EndlessBatches(50, 8, seed=1).blocks(np.arange(10)).tolist() == [39, 22, 32, 36, 10, 31, 7, 12, 18, 26]


# the data


@pytest.fixture
def code(tmp_path):
    """Shards of a second source, which shares no word with the first."""
    for number in range(2):
        lines = [json.dumps({"content": f"{i * i} = {i} * {i};" * 8}) for i in range(number * 40, number * 40 + 40)]
        (tmp_path / f"code-{number}.jsonl").write_text("\n".join(lines))
    return {"source": "json", "files": [str(tmp_path / "code-*.jsonl")], "text_field": "content", "weight": 3}


@pytest.fixture
def data(corpus_file, tmp_path, code):
    def made(**options):
        defaults = {
            "source": "text", "files": [str(corpus_file)], "unit": "line", "cache_dir": str(tmp_path / "data"),
            "val_fraction": 0.2, "block_size": 32, "batch_size": 4, "mixture": {"code": code},
        }  # fmt: skip
        return TextDataModule(**{**defaults, **options})

    return made


def is_code(row):
    return "=" in bytes(i for i in row.tolist() if i < 256).decode()


@pytest.mark.parametrize("windows", ["blocks", "random"])
def test_samples_are_windows_of_their_source(windows, data):
    module = data(windows=windows)
    batches = drawn(module, 200)
    rows = torch.cat([batch["tokens"] for batch in batches])
    indices = torch.cat([batch["index"] for batch in batches])
    own = len(module.blocks("train").sources[0])
    assert [is_code(row) for row in rows] == (indices >= own).tolist()
    assert abs(sum(map(is_code, rows)) / len(rows) - 0.75) < 0.06
    texts = {name: packed.tokens("train").astype("<u2").tobytes() for name, packed in module.sources.items()}
    for row in rows:
        assert row.numpy().astype("<u2").tobytes() in texts["code" if is_code(row) else "main"]
    assert module._mixed_order.counts(800)[1] == sum(map(is_code, rows))


def test_every_source_has_a_validation_set(data, corpus_file):
    module = data()
    assert list(module.validation) == ["", "code"]
    packed, split = module.validation["code"]
    assert (packed.key, split) == (module.sources["code"].key, "val")
    assert packed.meta["splits"]["val"]["documents"] > 0
    with_own = data(val_source="text", val_files=[str(corpus_file)])
    assert list(with_own.validation) == [""]
    assert with_own.sources["code"].meta["splits"]["val"]["documents"] == 0


def test_a_mixture_has_one_tokenizer(data, code, tmp_path, corpus_file):
    module = data(tokenizer="bpe", vocab_size=300)
    ids = module.sources["code"].tokens("val").tolist()
    assert module.sources["code"].tokenizer.to_dict() == module.packed.tokenizer.to_dict()
    assert b"= 5 * 5;" in module.tokenizer.to_bytes(module.sources["code"].tokens("train").tolist() + ids)
    ready = {"source": "tokens", "files": [str(module.sources["code"].folder)], "weight": 1}
    assert data(tokenizer="bpe", vocab_size=300, mixture={"code": ready}).sources["code"].key == (
        module.sources["code"].key
    )
    with pytest.raises(ValueError, match=r"data.mixture.code.files must hold tokens of the training text's tokenizer"):
        _ = data(mixture={"code": ready}).sources


def test_what_identifies_a_mixture(data, code):
    keys = {data().key, data(mixture=None).key, data(mixture={"code": {**code, "weight": 2}}).key}
    assert len(keys) == 3
    assert data(mixture=None).key == data().packed.key
    assert data(mixture={"code": {**code, "weight": 6}}, weight=2).key == data().key
    state = data().state_dict()
    data().load_state_dict(state)
    with pytest.raises(ValueError, match=r"mixture was .*, now "):
        data(mixture=None).load_state_dict(state)
    before = data(mixture=None).state_dict()
    del before["mixture"]
    data(mixture=None).load_state_dict(before)
    with pytest.raises(ValueError, match=r"mixture was \[\], now "):
        data().load_state_dict(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": {"a": {"source": "stdlib"}}}, "data.mixture.a.weight must be given, got settings of source"),
        ({"mixture": {"a": {"weight": 0}}}, "data.mixture.a.weight must be a positive number, got 0"),
        ({"mixture": {"a": {"weight": "1"}}}, "data.mixture.a.weight must be a positive number, got '1'"),
        ({"mixture": {"a": {"weight": float("nan")}}}, "data.mixture.a.weight must be a positive number, got nan"),
        ({"weight": -1.0}, "data.weight must be a positive number, got -1.0"),
        ({"weight": 2.0, "mixture": None}, "data.weight must be given with data.mixture alone, got 2.0"),
        ({"mixture": {"main": {"weight": 1}}}, "other than main and those of data.val_sets, got 'main'"),
        ({"mixture": {"a b": {"weight": 1}}}, "data.mixture must have names of letters, digits and _, .* got 'a b'"),
        (
            {"mixture": {"a": {"weight": 1}}, "val_sets": {"a": {"source": "stdlib"}}},
            "data.mixture must have names .* got 'a'",
        ),
        ({"mixture": {"a": {"weight": 1, "share": 2}}}, "data.mixture.a must hold settings among .*, got 'share'"),
        ({"mixture": {"a": {"weight": 1, "source": "x"}}}, "data.mixture.a.source must be one of .*, got 'x'"),
    ],
)
def test_settings_that_do_not_fit(options, message, data):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_a_source_that_fills_no_block_is_named(data, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n".join("abcdefgh"))
    short = {"source": "text", "files": [str(path)], "unit": "line", "weight": 1}
    with pytest.raises(ValueError, match=r"the training split of short must hold more than data.block_size = 32"):
        data(mixture={"short": short}).setup("fit")


def test_a_bad_line_names_file_and_line(data, tmp_path, code):
    path = tmp_path / "code-1.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"must hold JSON, got {re.escape(str(path))}, line 7: "):
        _ = data().sources


# runs


def metrics(folder):
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="") as file:
            found |= {row["step"]: row for row in csv.DictReader(file) if row.get("train_loss")}
    return found


def test_a_resumed_run_equals_the_whole_one(arguments, run, code, tmp_path):
    options = [
        f"--data.mixture={json.dumps({'code': code})}", "--data.weight=2", "--model.dropout=0.1",
        "--checkpoints.every_n_train_steps=3", "--trainer.log_every_n_steps=1", "--data.windows=random",
    ]  # fmt: skip
    folders = {}
    for name in ("whole", "parts"):
        folders[name] = tmp_path / name
        words = [*options, f"--trainer.default_root_dir={folders[name]}"]
        if name == "parts":
            run(arguments("mha", *words, "--model.schedule_steps=6", steps=3))
            words.append(f"--ckpt_path={newest_valid(folders[name])}")
        run(arguments("mha", *words, "--model.schedule_steps=6", steps=6))
    ours, theirs = (read_checkpoint(newest_valid(folder)) for folder in folders.values())
    for name, weights in ours["state_dict"].items():
        assert torch.equal(weights, theirs["state_dict"][name]), name
    whole, parts = (metrics(folder) for folder in folders.values())
    assert len(whole) == 6
    names = ("train_loss", "tokens_main", "tokens_code")
    assert [[row[name] for name in names] for row in whole.values()] == (
        [[parts[step][name] for name in names] for step in whole]
    )
    last = whole["5"]
    (record,) = folders["whole"].rglob("record.json")
    found = json.loads(record.read_text())
    assert found["tokens_by_source"] == {name: float(last[f"tokens_{name}"]) for name in ("main", "code")}
    assert sum(found["tokens_by_source"].values()) == found["tokens"]
    assert min(found["tokens_by_source"].values()) > 0
    assert any("val_code_bits_per_byte" in row for row in whole.values())


def test_text_is_not_code():
    assert "=" not in TEXT
