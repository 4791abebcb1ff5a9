"""What a config or a checkpoint may import: an allow-list, checked on the text before anything is imported.

A `class_path` in a YAML file imports a module, which runs its top-level code, before anybody checks what kind of
class it is. So the text of configs, of the command line and of a checkpoint's settings is searched first.
jsonargparse's own import policy, set to the same list, is the second line of defence.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ALLOWED = ("attnzoo", "attnzoo_recipes", "lightning", "torch")
"""Packages that a config may always name."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_LARGEST_CONFIG = 1_000_000


class ImportRefusedError(ValueError):
    """A config, command line or checkpoint names a module that is not on the allow-list."""


def check_import(path: str, allowed: Iterable[str] = ALLOWED, where: str = "the config") -> None:
    """Raise ImportRefusedError unless the dotted import path is one of the allowed packages or is inside one."""
    allowed = tuple(allowed)
    if not any(path == prefix or path.startswith(f"{prefix}.") for prefix in allowed):
        raise ImportRefusedError(
            f"{where} names {path}, but may import only from {', '.join(allowed)}; if you trust it, add "
            f"--allow-import {path.split('.')[0]}"
        )


def check_arguments(args: Sequence[str], allowed: Iterable[str] = ALLOWED) -> None:
    """Check everything that command line arguments name, directly and in the config files that they lead to.

    Raises:
        ImportRefusedError: for the first import path outside `allowed`.
    """
    search = _Search(tuple(allowed))
    for key, value in _options(args):
        search.value(key, _parsed(value), "the command line", Path.cwd())


def check_settings(settings: Any, allowed: Iterable[str] = ALLOWED, where: str = "the config") -> None:
    """Check everything that parsed settings name, at any depth.

    Raises:
        ImportRefusedError: for the first import path outside `allowed`.
    """
    _Search(tuple(allowed)).value("", settings, where, Path.cwd())


def enforce(allowed: Iterable[str]) -> None:
    """Make jsonargparse itself refuse any other import for the rest of the process."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(allowed))


class _Search:
    """Searches parsed YAML for import paths, and for names of files that contain further ones."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed
        self.files: set[Path] = set()

    def value(self, key: str, value: Any, where: str, folder: Path) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                self.value(f"{key}.{name}" if key else str(name), inner, where, folder)
        elif isinstance(value, list):
            for inner in value:
                self.value(key, inner, where, folder)
        elif isinstance(value, str):
            self.text(key, value.strip(), where, folder)

    def text(self, key: str, text: str, where: str, folder: Path) -> None:
        is_class = key.rsplit(".", 1)[-1] == "class_path"
        if is_class and "." in text:
            check_import(text, self.allowed, where)
        if is_class or _is_plain_data(key):
            return
        self.file(folder / text)
        # Where the type is known, a class may be given as a bare string. Names of data files contain dots too, so a
        # string counts only if its first part is a module.
        if _DOTTED.fullmatch(text) and _is_module(text.split(".")[0]):
            check_import(text, self.allowed, where)

    def file(self, path: Path) -> None:
        try:
            path = path.resolve()
            if path in self.files or not path.is_file() or path.stat().st_size > _LARGEST_CONFIG:
                return
            content = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return
        self.files.add(path)
        self.value("", _parsed(content), path.name, path.parent)


def _options(args: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(key, value) pairs of a command line: --key=value, --key value and single words."""
    key = ""
    for word in args:
        if word.startswith("-") and "=" in word:
            name, value = word.split("=", 1)
            yield name.lstrip("-").rstrip("+"), value
            key = ""
        elif word.startswith("--") or word == "-c":
            key = word.lstrip("-").rstrip("+")
        else:
            yield key, word
            key = ""


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_plain_data(key: str) -> bool:
    """Settings of the data module are texts, numbers and file names; none of them is imported."""
    parts = [part for part in key.split(".") if part not in ("fit", "validate", "test")]
    return len(parts) > 1 and parts[0] == "data"


def _is_module(root: str) -> bool:
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        return False
