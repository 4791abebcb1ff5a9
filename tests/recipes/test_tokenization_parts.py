"""Tokenisation in parts: by several processes, continued after a kill, and in little memory."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest

from attnzoo_recipes import files
from attnzoo_recipes.data import packing, parts
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.packing import PackedCorpus
from attnzoo_recipes.data.tokenizers import ByteTokenizer
from tests.recipes.conftest import TEXT
from tests.recipes.test_tokenization_kills import contents

processes = multiprocessing.get_context("forkserver")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """About 20 parts."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 1000)
    monkeypatch.setattr(parts, "_AT_ONCE", 300)


@pytest.fixture
def shards(tmp_path):
    """Documents of very different lengths, blank and not ASCII ones too, as one of each kind of shards."""
    import pyarrow
    from pyarrow import parquet

    draw = random.Random(0)
    words = [*TEXT.split(), "é€", "\U0001f52c"]
    texts = [" ".join(draw.choices(words, k=draw.choice((1, 9, 40)))) for _ in range(150)]
    texts[7:7] = ["", "  \n ", " ".join(draw.choices(words, k=600))]

    def made(kind):
        folder = tmp_path / kind
        folder.mkdir()
        for number in range(3):
            some = texts[number * 51 : (number + 1) * 51]
            if kind == "json":
                lines = [json.dumps({"content": text}) for text in some]
                (folder / f"part-{number}.jsonl").write_text("\n".join(lines))
            else:
                parquet.write_table(pyarrow.table({"content": some}), folder / f"part-{number}.parquet")
        return Corpus(kind, (str(folder / "part-*"),), text_field="content"), [t for t in texts if t.strip()]

    return made


def packed(corpus, cache, tokenizer="byte", num_proc=1):
    return packing.pack(corpus, tokenizer, 300, 0.2, 0.1, cache, num_proc=num_proc)


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_files_do_not_depend_on_the_number_of_processes(kind, tokenizer, shards, tmp_path):
    corpus, texts = shards(kind)
    assert list(corpus.documents()) == texts, "shards come in the order of their names"
    alone = packed(corpus, tmp_path / "1", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_CHARACTERS", 10**9)
        whole = packed(corpus, tmp_path / "whole", tokenizer)
    assert contents(alone.folder.parent) == contents(whole.folder.parent)
    for number in (2, 3):
        assert contents(packed(corpus, tmp_path / str(number), tokenizer, number).folder.parent) == contents(
            alone.folder.parent
        )
    tokens = alone.tokens("train").tolist()
    kept = [text for text in texts if parts.split_of(text, 0.2, 0.1) == "train"]
    assert alone.tokenizer.to_bytes(tokens) == "".join(kept).encode()


def test_a_corpus_that_was_tokenised_before_there_were_parts_is_found(tmp_path):
    """Folders are named as they were, and hold the same ids."""
    (tmp_path / "text.txt").write_text("\n".join(f"{word} {number}" for number, word in enumerate(TEXT.split())))
    folder = packed(Corpus("text", (str(tmp_path / "text.txt"),), unit="line"), tmp_path / "data").folder
    assert folder.name == "51f35435eb3e2520"
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {name: sums[name][:16] for name in sums if name.endswith(".bin")} == {
        "train.bin": "0597fcb1a1195c11", "val.bin": "4c3d60e02456e61f", "test.bin": "de1325604b1b1657",
    }  # fmt: skip
    assert list(json.loads((folder / "meta.json").read_text())) == [
        "version", "corpus", "tokenizer", "vocab_size", "val_fraction", "test_fraction", "dtype", "splits",
    ]  # fmt: skip


# kills


def killed(corpus, cache, tokenizer, num_proc, number, after):
    """Tokenise in this process, which is ended once so many parts are finished."""
    parts.PART_CHARACTERS, parts._AT_ONCE = 1000, 300
    original, saved = parts._Finished.save, []

    def save(*arguments):
        original(*arguments)
        saved.append(1)
        if len(saved) == after:
            os.kill(os.getpid(), number)

    parts._Finished.save = save
    packed(corpus, cache, tokenizer, num_proc)


def end_in(*arguments):
    process = processes.Process(target=killed, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(
    ("number", "tokenizer"),
    [
        (signal.SIGKILL, "bpe"),
        (signal.SIGTERM, "byte"),
        pytest.param(signal.SIGKILL, "byte", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "bpe", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_continued(number, tokenizer, shards, tmp_path, monkeypatch, capsys):
    corpus, _ = shards("json")
    expected = contents(packed(corpus, tmp_path / "whole", tokenizer).folder.parent)
    total = len(list(parts.parts_of(corpus.placed_documents())))
    cache = tmp_path / "data"
    assert end_in(corpus, cache, tokenizer, 2, number, 3) == -number
    assert end_in(corpus, cache, tokenizer, 1, number, 4) == -number
    (unfinished,) = cache.glob("*.unfinished")
    with (unfinished / "train.bin").open("ab") as file:
        file.write(b"part of a part")
    done = []
    original = parts.encoded
    monkeypatch.setattr(parts, "encoded", lambda *arguments: done.append(1) or original(*arguments))
    monkeypatch.setattr(packing.BpeTokenizer, "train", None)
    assert contents(packed(corpus, cache, tokenizer).folder.parent) == expected
    assert len(done) == total - 7, "what was finished is not done again"
    assert "continues after 7 finished parts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "parts.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
def test_damaged_parts_are_not_continued(name, damage, shards, tmp_path, capsys):
    corpus, _ = shards("json")
    expected = contents(packed(corpus, tmp_path / "whole").folder.parent)
    cache = tmp_path / "data"
    end_in(corpus, cache, "byte", 1, signal.SIGKILL, 5)
    (unfinished,) = cache.glob("*.unfinished")
    content = (unfinished / name).read_bytes()
    (unfinished / name).unlink()
    if damage != "missing":
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flipped" else b""
        (unfinished / name).write_bytes(content[:middle] + changed)
    assert contents(packed(corpus, cache).folder.parent) == expected
    # The byte tokenizer has no state, so that its file is written again as it was.
    assert ("continues" in capsys.readouterr().err) == (name == "tokenizer.json")


def test_other_texts_are_not_continued(shards, tmp_path, monkeypatch):
    """As a dataset of a hub that does not say which commit it has."""
    corpus, texts = shards("json")
    cache = tmp_path / "data"
    end_in(corpus, cache, "byte", 1, signal.SIGKILL, 5)
    now = [*texts[:3], "other", *texts[4:]]
    monkeypatch.setattr(Corpus, "placed_documents", lambda self: ((text, 0) for text in now))
    ids = packed(corpus, cache).tokens("train").tolist()
    kept = [text for text in now if parts.split_of(text, 0.2, 0.1) == "train"]
    assert ByteTokenizer().to_bytes(ids) == "".join(kept).encode()


def alive(numbers):
    return [number for number in numbers if os.path.exists(f"/proc/{number}/cmdline")]


def children_then_kill(corpus, cache, results):
    original = parts._Worker.answer

    def answer(self):
        results.put(self._process.pid)
        if self is workers.setdefault("last", self):
            time.sleep(0.2)
        return original(self)

    workers = {}
    parts._Worker.answer = answer
    killed(corpus, cache, "byte", 2, signal.SIGKILL, 4)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_processes_end_with_the_one_that_was_killed(shards, tmp_path):
    corpus, _ = shards("json")
    results = processes.SimpleQueue()
    process = processes.Process(target=children_then_kill, args=(corpus, tmp_path / "data", results))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    numbers = set()
    while not results.empty():
        numbers.add(results.get())
    assert len(numbers) == 2
    until = time.monotonic() + 20
    while alive(numbers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(numbers)


# failures


def test_a_process_that_ends_is_reported_and_the_next_run_continues(shards, tmp_path, monkeypatch, capsys):
    corpus, _ = shards("json")
    expected = contents(packed(corpus, tmp_path / "whole").folder.parent)
    original, asked = parts._Worker.ask, []

    def ask(self, texts):
        asked.append(texts)
        if len(asked) == 8:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        original(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(parts._Worker, "ask", ask)
        with pytest.raises(files.WriteError, match=r"data.num_proc = 2 that tokenised has ended with exit code -9; "):
            packed(corpus, tmp_path / "data", num_proc=2)
    assert contents(packed(corpus, tmp_path / "data", num_proc=2).folder.parent) == expected
    assert "continues after 7 finished parts" in capsys.readouterr().err


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_in_a_late_line_names_it_and_leaves_nothing(num_proc, shards, tmp_path):
    shards("json")
    path = tmp_path / "json" / "part-1.jsonl"
    lines = path.read_text().splitlines()
    lines[40] = '{"content": 3}'
    path.write_text("\n".join(lines))
    corpus = Corpus("json", (str(tmp_path / "json" / "*.jsonl"),), text_field="content")
    with pytest.raises(ValueError, match=rf"must hold text, got int in {re.escape(str(path))}, line 41$"):
        packed(corpus, tmp_path / "data", num_proc=num_proc)
    assert not list((tmp_path / "data").iterdir())


def test_an_error_of_a_process_is_raised_as_it_is():
    worker = parts._Worker(ByteTokenizer(), (0.1, 0.1), 2)
    worker.ask([None])
    with pytest.raises(TypeError, match="NoneType"):
        worker.answer()
    worker.stop()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_no_more_than_a_few_parts_are_in_memory(num_proc, monkeypatch):
    """Texts are read when there is a process for them, not before."""
    ahead = 0
    most = 0

    def documents():
        nonlocal ahead, most
        for _ in range(400):
            ahead += 1
            most = max(most, ahead)
            yield "x" * 100, 0

    monkeypatch.setattr(parts, "PART_CHARACTERS", 1640)
    for part, _ in parts._each_encoded(parts.parts_of(documents()), ByteTokenizer(), (0.1, 0.1), num_proc):
        assert len(part.texts) == 10
        ahead -= 10
    assert most <= 10 * (num_proc + 1)


def test_progress_where_there_is_no_terminal(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "_LINE_EVERY", 0.0)
    corpus, _ = shards("json")
    packed(corpus, tmp_path / "data")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert all(re.fullmatch(r"tokenising: 0 of 0 MB, [\d.,]+ MB/s", line) for line in lines)
    places = [place for _, place in corpus.placed_documents()]
    assert places == sorted(places)
    assert 0 < places[0] < places[-1] <= corpus.size()


def test_the_number_of_processes_is_a_setting(arguments, run, tmp_path, capsys):
    run(arguments("mha", "--data.num_proc=2"))
    (folder,) = (tmp_path / "data").iterdir()
    assert PackedCorpus.open(folder).meta["splits"]["train"]["documents"] > 0
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", "--data.num_proc=0"))
    assert stopped.value.code == 2
    assert "data.num_proc must be at least 1, got 0" in capsys.readouterr().err


def test_pairs_are_those_of_the_documents():
    counts = parts.Counts()
    counts.add_document("val", "abab", 5)
    counts.add_document("train", "abc", 4)
    assert counts.pairs["val"].sum() == 4
    assert counts.pairs["val"][256, ord("a")] == 1
    assert counts.pairs["val"][ord("a"), ord("b")] == 2
    assert counts.splits["train"] == {"tokens": 4, "documents": 1, "bytes": 3}
    found = parts.entropies(counts.pairs["val"])
    assert found["unigram_bits_per_byte"] == pytest.approx(1)
    assert np.isclose(found["bigram_bits_per_byte"], 0)
