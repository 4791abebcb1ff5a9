"""What the command lines have in common: spelling, packages to import, devices, and errors in one sentence."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import re
import sys
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter

from attnzoo import BackendUnavailable
from attnzoo_recipes.allowlist import ALLOWED, SUMMARY, added_packages, enforce

OUT_OF_MEMORY = 5
"""Exit code of a command that had no memory left."""

_WORDS = ("not enough memory", "out of memory", "cannot allocate memory", "failed to allocate", "bad_alloc")


def command_line(args: Sequence[str] | None) -> list[str]:
    """The arguments of a command's `main`, or those of the process, with options spelled with dashes.

    `--batch_size` is the same option as `--batch-size`. Keys of nested settings, such as `--data.batch_size`, are not
    options of this kind, and what follows `--` is left as it is.
    """
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    return [*(_dashed(word) for word in words[:end]), *words[end:]]


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") and "." not in name else word


def take_allowed_imports(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split `--allow-import PACKAGE,...` (repeatable) off a command line; returns the rest and the whole allow-list.

    It is read before anything else, and only from the command line: a config file cannot allow its own imports. For the
    rest of the process jsonargparse refuses all other imports. If a package is added, modules in the current folder can
    be imported as well; installed ones come first.

    Raises:
        ValueError: if a package is missing or is not a dotted name.
    """
    rest: list[str] = []
    allowed = list(ALLOWED)
    pending = iter(words)
    for word in pending:
        name, equals, value = word.partition("=")
        if name not in ("--allow-import", "--allow_import"):
            rest.append(word)
            continue
        given = value if equals else next(pending, "")
        packages = [package.strip() for package in given.split(",")]
        if not all(part.isidentifier() for package in packages for part in package.split(".")):
            raise ValueError(f"--allow-import must be followed by the names of packages, got {given!r}")
        allowed += packages
    if len(allowed) > len(ALLOWED) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    enforce(allowed)
    return rest, tuple(dict.fromkeys(allowed))


class Help(DefaultHelpFormatter):
    """Help in which a default is said once: by the text if it does, and not at all where there is none."""

    def _get_help_string(self, action: Action) -> str:
        text: str = super()._get_help_string(action)
        if action.default is None or "(default" in (action.help or ""):
            text = re.sub(r",? ?default: %\(default\)s", "", text).replace(" ()", "")
        return text


def add_allow_import(parser: ArgumentParser) -> None:
    """Show `--allow-import` in a command's help; `take_allowed_imports` has read it by the time the parser runs."""
    parser.add_argument(
        "--allow-import",
        metavar="PACKAGE,...",
        help=f"packages that configs and checkpoints may name besides {SUMMARY}; importing runs their code",
    )


def add_device(parser: ArgumentParser, what: str) -> None:
    """Add `--device`, on which `what` runs."""
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help=f"where {what} (default cpu)")


def add_format(parser: ArgumentParser) -> None:
    """Add `--format`."""
    parser.add_argument(
        "--format",
        default="png",
        metavar="KIND,...",
        help="kinds of picture files: some of png, pdf, svg (default png)",
    )


def formats_named(text: str) -> tuple[str, ...]:
    """Kinds of files between commas.

    Raises:
        ValueError: for a kind that pictures are not written as, or none.
    """
    from attnzoo.diagnostics.plots import FORMATS

    kinds = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not kinds or not set(kinds) <= set(FORMATS):
        raise ValueError(f"--format must be some of {', '.join(FORMATS)}, got {text!r}")
    return kinds


def device_named(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if torch does not know such a device, or this machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda, got {name!r}") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"device {name!r} is not available on this machine: {reason}") from None
    return device


def check_new_folder(path: Path) -> None:
    """Raise ValueError unless there is nothing at the path, or an empty folder."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"OUT must be a new or empty folder, got {str(path)!r}, which is not empty")


def need_transformers() -> None:
    """Raise ValueError if the package is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("the package transformers is needed: pip install 'attnzoo[hf]'")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' reports of what it loaded (a misfit is an error here), and its bars outside a terminal."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def mistakes_in_one_sentence(command: str, stopped: str = "") -> Iterator[None]:
    """Turn a ValueError, an OSError or an error of the parser into one sentence on stderr and exit code 2.

    A backend that cannot run here is the user's choice as well, or that of the checkpoint. Ctrl-C is one sentence and
    exit code 130. Where the reader of the output has left (`| head`), the command ends as if it had read all of it.

    Args:
        command: name of the command.
        stopped: what the sentence of Ctrl-C says besides.
    """
    try:
        yield
    except BrokenPipeError:
        pass
    except (ArgumentError, ValueError, OSError, BackendUnavailable) as error:
        sys.stderr.write(f"{command}: error: {one_sentence(error)}\n")
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_sentence(error) or type(error).__name__
        sys.stderr.write(f"{command}: error: out of memory ({reason:.200})\n")
        raise SystemExit(OUT_OF_MEMORY) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"{command}: stopped{stopped and f'; {stopped}'}\n")
        raise SystemExit(130) from None
    finally:
        _flush_output(command)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of whatever kind, says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def _flush_output(command: str) -> None:
    """Write what standard output still holds back, which otherwise fails when Python ends, with its own message."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"{command}: error: standard output could not be written: {one_sentence(error)}\n")
            raise SystemExit(2) from None


def one_sentence(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split())


def join_allowed(allowed: Iterable[str]) -> list[str]:
    """The words that pass an allow-list on to another command."""
    return [word for package in added_packages(allowed) for word in ("--allow-import", package)]
