"""What a config or a command line may name: classes of listed modules, checked before anything else is imported.

A `class_path` in a YAML file imports a module, which runs its top-level code, and may call anything in it, before
anybody checks what kind of class it is. So the text of configs and of the command line is searched first, and names
anything but the classes of `ALLOWED` only where the user has added its package. jsonargparse's own import policy, set
to the same list, is the second line of defence: it is checked before every import that a parsed value leads to, whether
the value came from a file, the command line or the environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ALLOWED = (
    "attnzoo.modules",
    "attnzoo.rotary",
    "attnzoo_recipes.callbacks",
    "attnzoo_recipes.data.module",
    "attnzoo_recipes.feed_forward",
    "attnzoo_recipes.optimisers",
    "attnzoo_recipes.sharding",
    "attnzoo_recipes.training",
    "lightning.fabric.plugins",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.nn",
    "torch.optim",
)
"""Modules whose classes a config may always name, by any path that leads to them."""

REFUSED = (
    "attnzoo_recipes.callbacks.summary",
    "lightning.fabric.plugins.io",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.lambda_function",
    "lightning.pytorch.plugins.io",
    "lightning.pytorch.strategies.launchers",
)
"""What of these modules calls what a config gives it, reads checkpoints in another way, or has an allow-list itself."""

SUMMARY = (
    "classes of attnzoo, of attnzoo_recipes, of torch.nn and torch.optim, and of lightning.pytorch's callbacks, "
    "loggers, plugins, profilers and strategies"
)
"""`ALLOWED` in words."""

_FILES = {"config", "c", "ckpt_path", "model.init_from", "trainer.default_root_dir"}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_LARGEST_CONFIG = 1_000_000
_MOST_VALUES = 100_000


class ImportRefusedError(ValueError):
    """A config, command line or checkpoint names what is not on the allow-list."""


def check_import(path: str, allowed: Iterable[str] = ALLOWED, where: str = "the config") -> None:
    """Check a dotted import path; imports nothing but modules of `ALLOWED`.

    Args:
        path: must be inside one of the packages that the user has added, or lead to a class that is defined in one of
            the allowed modules of `ALLOWED`. A function, a module, and what such a module has imported from elsewhere
            (torch.nn.modules.os.system) do not pass.
        allowed: modules of `ALLOWED` and packages that the user has added.
        where: what messages call the text that names it.

    Raises:
        ImportRefusedError: for any other path.
    """
    known, added = _split(allowed)
    if any(_inside(path, package) for package in added):
        return
    found = find_class(path, known)
    if found is None:
        raise ImportRefusedError(
            f"{where} names {path}, but may name only {', '.join((SUMMARY, *added))}; if you trust it, add "
            f"--allow-import {path.rpartition('.')[0] or path}"
        )
    if any(_inside(_import_path(found), entry) for entry in REFUSED):
        raise ImportRefusedError(f"{where} names {path}, which a config may not use: it could run any code")


def find_class(path: str, modules: Iterable[str]) -> type | None:
    """The class of an import path if it is defined inside one of the modules, otherwise None.

    Only these modules, their parents and modules inside them are imported.
    """
    modules = tuple(modules)
    found: Any = None
    name = ""
    for part in path.split("."):
        is_module = found is None or isinstance(found, ModuleType)
        name = f"{name}.{part}" if name else part
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
        elif is_module and any(_inside(name, module) or _inside(module, name) for module in modules):
            try:
                found = importlib.import_module(name)
            except ImportError:
                return None
        else:
            return None
        if isinstance(found, ModuleType) and found.__name__ != name:
            return None
    return found if isinstance(found, type) and any(_inside(_import_path(found), m) for m in modules) else None


def added_packages(allowed: Iterable[str]) -> tuple[str, ...]:
    """What of an allow-list the user has added."""
    return _split(allowed)[1]


def check_arguments(args: Sequence[str], allowed: Iterable[str] = ALLOWED) -> None:
    """Check everything that command line arguments name, directly and in the config files that they lead to.

    Environment variables that jsonargparse would read as options are checked as well.

    Raises:
        ImportRefusedError: for the first import path outside `allowed`.
        ValueError: for a config file that cannot be read.
    """
    search = _Search(tuple(allowed))
    for key, value in _options(args):
        search.value(key, _parsed(value, "the command line"), "the command line", Path.cwd())
    is_read = os.environ.get("JSONARGPARSE_DEFAULT_ENV", "").lower() == "true"
    for name, value in os.environ.items() if is_read else ():
        if name.startswith(("PL_", "ATTNZOO_")):
            search.value("", _parsed(value, name), f"the environment variable {name}", Path.cwd())


def check_settings(settings: Any, allowed: Iterable[str] = ALLOWED, where: str = "the config") -> None:
    """Check everything that parsed settings name, at any depth.

    Raises:
        ImportRefusedError: for the first import path outside `allowed`.
    """
    _Search(tuple(allowed)).value("", settings, where, Path.cwd())


def enforce(allowed: Iterable[str]) -> None:
    """Make jsonargparse itself refuse any other import for the rest of the process."""
    from jsonargparse import set_parsing_settings

    import attnzoo

    public = [f"attnzoo.{name}" for name in attnzoo.__all__ if find_class(f"attnzoo.{name}", ALLOWED)]
    set_parsing_settings(
        import_path_denylist=["*", *REFUSED],
        import_path_allowlist=[*allowed, *public],
        instantiate_subclass_spec_in_any=False,
    )


class _Search:
    """Searches parsed YAML for import paths, and for names of files that contain further ones."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed
        self.files: set[Path] = set()
        self.visited = 0

    def value(self, key: str, value: Any, where: str, folder: Path) -> None:
        try:
            self.walk(key, value, where, folder)
        except RecursionError:
            raise ImportRefusedError(f"{where} is nested too deeply") from None

    def walk(self, key: str, value: Any, where: str, folder: Path) -> None:
        self.visited += 1
        if self.visited > _MOST_VALUES:
            raise ImportRefusedError(f"{where} must hold at most {_MOST_VALUES:,} values, got more")
        if isinstance(value, dict):
            for name, inner in value.items():
                self.walk(f"{key}.{name}" if key else str(name), inner, where, folder)
        elif isinstance(value, list | tuple):
            for inner in value:
                self.walk(key, inner, where, folder)
        elif isinstance(value, str):
            self.text(key, value.strip(), where, folder)

    def text(self, key: str, text: str, where: str, folder: Path) -> None:
        name = key.rsplit(".", 1)[-1]
        if name == "class_path" and "." in text:
            check_import(text, self.allowed, where)
        if name == "class_path" or _is_plain_data(key):
            return
        for place in {folder, Path.cwd()}:
            self.file(place / text, is_config=name in ("config", "c"))
        # Where the type is known, a class may be given as a bare string. Names of data files contain dots too, so a
        # string counts only if its first part is a module, and not where it can be nothing but a file.
        if key not in _FILES and _DOTTED.fullmatch(text) and _is_module(text.split(".")[0]):
            check_import(text, self.allowed, where)
        if text.startswith(("{", "[")) or "class_path" in text:
            parsed = _parsed(text, where)
            if parsed != text:
                self.value(key, parsed, where, folder)

    def file(self, path: Path, is_config: bool) -> None:
        try:
            path = path.resolve()
            if path in self.files or not path.is_file():
                return
            content = path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST_CONFIG else None
        except (OSError, ValueError):
            content = None
        if content is None:
            if is_config:
                raise ValueError(f"config {str(path)!r} must be UTF-8 text of at most {_LARGEST_CONFIG:,} bytes")
            return
        self.files.add(path)
        self.value("", _parsed(content, path.name), path.name, path.parent)


def _split(allowed: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules of `ALLOWED`, and packages that the user has added."""
    allowed = tuple(allowed)
    return tuple(m for m in allowed if m in ALLOWED), tuple(p for p in allowed if p not in ALLOWED)


def _inside(path: str, package: str) -> bool:
    return path == package or path.startswith(f"{package}.")


def _import_path(cls: type) -> str:
    """Where a class is defined, which is not where it was found if a module imports it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _options(args: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(key, value) pairs of a command line: --key=value, --key value, -cvalue and single words."""
    key = ""
    for word in args:
        if word.startswith("-") and "=" in word:
            name, value = word.split("=", 1)
            yield name.lstrip("-").rstrip("+"), value
            key = ""
        elif word.startswith("--") or word == "-c":
            key = word.lstrip("-").rstrip("+")
        elif word.startswith("-c"):
            yield "c", word.removeprefix("-c")
        else:
            yield key, word
            key = ""


def _parsed(text: str, where: str) -> Any:
    """The text as jsonargparse parses it."""
    from jsonargparse import get_loader

    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise ImportRefusedError(f"{where} is nested too deeply") from None


def _is_plain_data(key: str) -> bool:
    """Settings of the data module are texts, numbers and file names; none of them is imported."""
    parts = [part for part in key.split(".") if part not in ("fit", "validate", "test")]
    return len(parts) > 1 and parts[0] == "data"


def _is_module(root: str) -> bool:
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        return False
