"""Spelling of options, packages that may be imported, devices, and files that are whole or not there."""

import os
import sys

import pytest
import torch

from attnzoo_recipes import files
from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.compare.cli import long_running
from attnzoo_recipes.options import (
    command_line,
    device_named,
    join_allowed,
    mistakes_in_one_sentence,
    take_allowed_imports,
)


def test_underscores_are_dashes_in_names_of_options_only():
    words = ["MODEL", "--batch_size", "3", "--name=a_b", "--data.batch_size=2", "-c", "x_y", "--", "--seed_everything"]
    expected = [
        "MODEL",
        "--batch-size",
        "3",
        "--name=a_b",
        "--data.batch_size=2",
        "-c",
        "x_y",
        "--",
        "--seed_everything",
    ]
    assert command_line(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--allow-import", "mine,other.part", "fit"],
        ["--allow_import=mine", "fit", "--allow-import", "other.part"],
        ["fit", "--allow-import=mine,other.part", "--allow-import", "mine"],
    ],
)
def test_packages_are_taken_off_the_command_line(words, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    rest, allowed = take_allowed_imports(words)
    assert rest == ["fit"]
    assert allowed == (*ALLOWED, "mine", "other.part")
    assert take_allowed_imports(join_allowed(allowed)) == ([], allowed)


def write_into(descriptor, monkeypatch, count, mistake=None):
    """Exit code of a command that writes into a descriptor; what Python does when it ends must not fail then."""
    with open(descriptor, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        try:
            with mistakes_in_one_sentence("attnzoo-x"), long_running("attnzoo-x"):
                for _ in range(count):
                    sys.stdout.write("x" * 1000)
                sys.stderr.write("done\n")
                if mistake:
                    raise ValueError(mistake)
        except SystemExit as stop:
            return stop.code
        finally:
            output.flush()
    return 0


@pytest.mark.parametrize(
    ("count", "mistake", "code", "said"),
    [(1, None, 0, "done\n"), (1000, "wrong", 2, "done\nattnzoo-x: error: wrong\n")],
)
def test_a_reader_that_leaves_changes_nothing(count, mistake, code, said, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    assert write_into(writer, monkeypatch, count, mistake) == code
    assert capsys.readouterr().err == said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no device that is always full")
def test_output_that_is_lost_is_said(monkeypatch, capsys):
    assert write_into("/dev/full", monkeypatch, 1) == 2
    assert "attnzoo-x: error: standard output could not be written: [Errno 28]" in capsys.readouterr().err


def test_ctrl_c_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop, mistakes_in_one_sentence("attnzoo-x", "go on"):
        # Not by a signal, which a process in the background of a shell ignores.
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "attnzoo-x: stopped; go on\n"


def test_the_current_folder_can_be_imported_from_last_and_only_if_asked(tmp_path, monkeypatch):
    before = [path for path in sys.path if path != ""]
    monkeypatch.setattr(sys, "path", list(before))
    monkeypatch.chdir(tmp_path)
    take_allowed_imports(["fit"])
    assert sys.path == before
    take_allowed_imports(["fit", "--allow-import", "mine"])
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize("words", [["--allow-import"], ["--allow-import", "--config"], ["--allow-import=*"]])
def test_a_package_must_be_a_name(words):
    with pytest.raises(ValueError, match="--allow-import must be followed by the names of packages, got"):
        take_allowed_imports(words)


def test_a_device_that_is_not_there_is_named_in_one_sentence():
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be one that torch knows, such as cpu or cuda, got 'gpu'"):
        device_named("gpu")
    with pytest.raises(ValueError, match=r"^device 'cuda:77' is not available on this machine: [^\n]+$"):
        device_named("cuda:77")
    with pytest.raises(ValueError, match="device 'meta' is not available on this machine"):
        device_named("meta")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    files.write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    files.write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"

    def full(file, data):
        file.write(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "something else")
    assert path.read_bytes() == b"\x00\x01"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]
