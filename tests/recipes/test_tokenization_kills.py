"""Tokenisation that is killed, done twice at once, or damaged afterwards."""

import multiprocessing
import os
import re
import signal
import time

import pytest

from attnzoo_recipes import files
from attnzoo_recipes.data import packing
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.packing import PackedCorpus
from tests.recipes.children import before

processes = multiprocessing.get_context("forkserver")


def pack(corpus_file, cache):
    return packing.pack(Corpus("text", (str(corpus_file),), unit="line"), "byte", 0, 0.2, 0.2, cache)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def die_in(stage, number, corpus_file, cache):
    """Tokenise in a process that believes to have number 1, as in a container, and end it at a stage."""
    own = os.getpid()
    os.getpid = lambda: 1
    module, name, count = stage
    calls = []

    def action(*_):
        calls.append(name)
        if len(calls) == count:
            os.kill(own, number)

    before({"files": files, "packing": packing, "os": os}[module], name, action)
    pack(corpus_file, cache)


STAGES = [
    ("packing", "_write", 1), ("files", "sync", 1), ("files", "sync", 3), ("packing", "save_tokenizer", 1),
    ("os", "replace", 1), ("os", "replace", 2), ("files", "sync_folder", 1), ("files", "sync_folder", 4),
    ("files", "sync_folder", 5),
]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_run_after_a_kill_works(number, corpus_file, tmp_path):
    expected = contents(pack(corpus_file, tmp_path / "whole").folder.parent)
    for stage in STAGES:
        cache = tmp_path / "-".join(map(str, stage))
        for attempt in range(2):
            process = processes.Process(target=die_in, args=(stage, number, corpus_file, cache))
            process.start()
            process.join(60)
            # Once the folder is there, a second attempt has nothing to do.
            done = attempt == 1 and process.exitcode == 0 and any(len(path.suffix) == 0 for path in cache.iterdir())
            assert process.exitcode == -number or done, stage
        pack(corpus_file, cache)
        assert contents(cache) == expected, stage


def pack_when_told(corpus_file, cache, start, results):
    before(packing, "_write", lambda *_: (results.put("wrote"), time.sleep(0.3)))
    start.wait()
    results.put(str(pack(corpus_file, cache).folder))


@pytest.mark.parametrize("with_locks", [True, False])
def test_two_at_once_both_work(with_locks, corpus_file, tmp_path):
    start, results = processes.Event(), processes.Queue()
    target = pack_when_told if with_locks else pack_without_locks
    both = [processes.Process(target=target, args=(corpus_file, tmp_path / "data", start, results)) for _ in range(2)]
    for process in both:
        process.start()
    time.sleep(0.5)
    start.set()
    said = []
    while len([each for each in said if each != "wrote"]) < 2:
        said.append(results.get(timeout=60))
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert said.count("wrote") == (1 if with_locks else 2), "the second waits for the first, and takes its files"
    (folder,) = (tmp_path / "data").iterdir()
    assert [each for each in said if each != "wrote"] == [str(folder)] * 2


def pack_without_locks(*arguments):
    """As on a network file system that has none."""
    files.try_lock = lambda descriptor: None
    pack_when_told(*arguments)


def damaged(content, kind):
    match kind:
        case "flipped":
            middle = len(content) // 2
            return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        case "first bit":
            return bytes([content[0] ^ 128]) + content[1:]
        case "last bit":
            return content[:-1] + bytes([content[-1] ^ 1])
        case "cut short":
            return content[: len(content) // 2]
        case "one byte short":
            return content[:-1]
        case "empty":
            return b""
        case "longer":
            return content + b"\n"


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "val.bin", "test.bin", "SHA256SUMS"])
def test_damaged_files_are_refused_by_name(name, corpus_file, tmp_path):
    folder = pack(corpus_file, tmp_path).folder
    path = folder / name
    whole = path.read_bytes()
    for kind in ("flipped", "first bit", "last bit", "cut short", "one byte short", "empty", "longer", "missing"):
        path.unlink()
        if kind != "missing":
            path.write_bytes(damaged(whole, kind))
        for read in (lambda: pack(corpus_file, tmp_path), lambda: PackedCorpus.open(folder)):
            with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
                read()
            # Damage of the sums shows in the file whose sum it was.
            assert str(path) in str(caught.value) or name == "SHA256SUMS", kind
            assert f"remove {folder}, and the next run tokenises the corpus anew" in str(caught.value)
            assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert pack(corpus_file, tmp_path).meta["splits"]["train"]["tokens"] > 0


def test_the_command_refuses_a_damaged_file_before_training(arguments, run, tmp_path, capsys):
    run(arguments("mha"))
    (path,) = (tmp_path / "data").rglob("train.bin")
    path.write_bytes(damaged(path.read_bytes(), "flipped"))
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha"))
    assert stopped.value.code == 2
    assert f"{path} is not what was written" in capsys.readouterr().err


def test_the_sums_are_those_of_sha256sum(corpus_file, tmp_path):
    import subprocess

    folder = pack(corpus_file, tmp_path).folder
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == len(list(folder.iterdir())) - 1


def test_a_lock_ends_with_its_process_and_leaves_no_file(tmp_path):
    path = tmp_path / "deep" / "a.lock"
    with files.locked(path), path.open("rb") as file:
        assert files.try_lock(file.fileno()) is False
    assert not path.exists()
    path.write_bytes(b"")  # of a process that was killed
    with files.locked(path):
        pass
    assert not path.exists()
