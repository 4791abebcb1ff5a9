"""Validation text of its own, named sets, and an evaluation that shares no code with the recipe's."""

import csv
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.data.module import MAIN, TextDataModule


@pytest.fixture
def books(tmp_path):
    """Two further files of text."""
    made = {}
    for name, line in (("tea", "a cup of tea number {} with milk"), ("ships", "the ship {} left the old harbour")):
        made[name] = tmp_path / f"{name}.txt"
        made[name].write_text("\n".join(line.format(i * i) for i in range(60)))
    return made


def logged(folder):
    """The last value of every column of a run's metrics."""
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]][-1] for name in rows[0] if any(row[name] for row in rows)}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x):
    """Rotary embedding in two halves, of (T, H, D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x)).double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def logits_of_document(weights, tokens, heads=8, layers=2):
    """Multi-head attention and SwiGLU in float64, of one document (T,) -> (T, V)."""
    x = weights["embedding.weight"][tokens]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for i in range(layers):
        own = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}
        y = rms_norm(x, own["attn_norm.weight"])
        q, k, v = (
            (y @ own[f"attn.{name}_proj.weight"].T).view(len(y), heads, -1) for name in ("q", "k", "v")
        )  # fmt: skip
        scores = torch.einsum("thd,shd->hts", rotated(q), rotated(k)) / math.sqrt(q.shape[-1])
        weights_of_keys = scores.masked_fill(future, -math.inf).softmax(-1)
        out = torch.einsum("hts,shd->thd", weights_of_keys, v).flatten(1)
        x = x + out @ own["attn.o_proj.weight"].T
        y = rms_norm(x, own["mlp_norm.weight"])
        gate = y @ own["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return rms_norm(x, weights["norm.weight"]) @ weights["embedding.weight"].T


def bits_per_byte(weights, text, size):
    """Of all blocks of `size` bytes, with the byte 256 before every line, each document by itself."""
    ids = [i for line in text.split("\n") for i in (256, *line.encode())]
    nats = counted = 0.0
    for start in range(0, len(ids) - size, size):
        block, targets = ids[start : start + size], ids[start + 1 : start + size + 1]
        begins = [0, *(i for i in range(1, size) if block[i] == 256), size]
        for first, last in itertools.pairwise(begins):
            logits = logits_of_document(weights, torch.tensor(block[first:last]))
            logs = logits - logits.logsumexp(-1, keepdim=True)
            wanted = targets[first:last]
            nats -= sum(float(logs[t, byte]) for t, byte in enumerate(wanted))
            counted += sum(byte != 256 for byte in wanted)
    return nats / counted / math.log(2)


def test_an_independent_evaluator_agrees(arguments, run, tmp_path, books):
    sets = json.dumps({"ships": {"source": "text", "files": [str(books["ships"])], "unit": "line"}})
    run(
        arguments(
            "mha", "--data.val_source=text", f"--data.val_files=['{books['tea']}']", f"--data.val_sets={sets}",
            "--trainer.val_check_interval=20", "--trainer.limit_val_batches=1.0", "--model.lr=1e-2", steps=20,
        )
    )  # fmt: skip
    state = read_checkpoint(tmp_path / "run")["state_dict"]
    exported = {name.removeprefix("model."): value.contiguous() for name, value in state.items()}
    save_file(exported, tmp_path / "model.safetensors")
    weights = {name: value.double() for name, value in load_file(tmp_path / "model.safetensors").items()}
    found = logged(tmp_path / "run")
    tea, ships = (bits_per_byte(weights, books[name].read_text(), 32) for name in ("tea", "ships"))
    assert abs(float(found["val_bits_per_byte"]) - tea) < 1e-4
    assert abs(float(found["val_ships_bits_per_byte"]) - ships) < 1e-4
    assert abs(tea - ships) > 0.01


def test_all_documents_of_the_source_are_trained_on(corpus_file, books, tmp_path):
    options = {"source": "text", "files": [str(corpus_file)], "unit": "line", "cache_dir": str(tmp_path / "data")}
    alone = TextDataModule(**options, val_fraction=0.2)
    apart = TextDataModule(**options, val_fraction=0.2, val_source="text", val_files=[str(books["tea"])])
    counts = [data.packed.meta["splits"] for data in (alone, apart)]
    assert counts[0]["val"]["documents"] > 0
    assert counts[1]["val"]["documents"] == 0
    totals = [sum(each["documents"] for each in splits.values()) for splits in counts]
    assert totals == [counts[1]["train"]["documents"] + counts[1]["test"]["documents"]] * 2
    packed, split = apart.validation[MAIN]
    text = packed.tokenizer.decode(packed.tokens(split).tolist())
    assert text == books["tea"].read_text().replace("\n", "")


def test_a_bpe_of_the_training_text_reads_the_other_sets(corpus_file, books, tmp_path):
    data = TextDataModule(
        source="text", files=[str(corpus_file)], unit="line", tokenizer="bpe", vocab_size=300,
        cache_dir=str(tmp_path / "data"), val_sets={"tea": {"source": "text", "files": [str(books["tea"])]}},
        block_size=16, val_tokens=40,
    )  # fmt: skip
    packed, split = data.validation["tea"]
    assert packed.tokenizer.to_dict() == data.tokenizer.to_dict()
    assert packed.tokenizer.decode(packed.tokens(split)[1:].tolist()) == books["tea"].read_text()
    main, tea = (loader.dataset for loader in data.val_dataloader())
    assert len(main.tokens) == len(tea.tokens) == 40
    assert len(tea) == 2


def test_validate_reads_the_sets_too(arguments, run, books, tmp_path, capsys):
    run(arguments())
    sets = json.dumps({name: {"source": "text", "files": [str(path)]} for name, path in books.items()})
    words = arguments("kha", f"--data.val_sets={sets}", f"--ckpt_path={newest_valid(tmp_path / 'run')}")
    capsys.readouterr()
    run(["validate", *words[1:]])
    printed = capsys.readouterr().out
    for name in ("val_bits_per_byte", "val_tea_bits_per_byte", "val_ships_bits_per_byte"):
        assert name in printed


MISTAKES = {
    "files alone": (["--data.val_files=['x']"], "data.val_source must be given with data.val_files"),
    "no file": (["--data.val_source=text", "--data.val_files=['/none']"], "data.val_files: there is no file '/none'"),
    "no source": (["--data.val_source=txt"], "data.val_source must be one of stdlib"),
    "a name": (['--data.val_sets={"a b": {}}'], "data.val_sets must have names of letters, digits and _, got 'a b'"),
    "a setting": (['--data.val_sets={"a": {"file": "x"}}'], "data.val_sets.a must hold settings among source"),
    "a set without files": (['--data.val_sets={"a": {"source": "text"}}'], "data.val_sets.a.files must name at least"),
    "few tokens": (["--data.val_tokens=32"], "data.val_tokens must be at least 33, got 32"),
}


@pytest.mark.parametrize(("more", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence(more, named, arguments, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", *more))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "attnzoo-pretrain: error:" in line]
    assert named in sentence
