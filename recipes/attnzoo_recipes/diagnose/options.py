"""Options that attnzoo-spectrum, attnzoo-heads and attnzoo-prune share."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from attnzoo_recipes.options import Help, add_allow_import, add_device, add_format, formats_named


@dataclass(frozen=True)
class Options:
    """What every one of these commands is asked for; each adds its own fields.

    Attributes:
        model: path of the model.
        name: of the model in titles and folders, or None for that of its file or folder.
        out: folder of the results.
        device: where the model runs.
        allowed: packages that a checkpoint may name.
        command: the whole command line, for the report.
        formats: of the pictures' files.
    """

    model: str
    name: str | None
    out: Path
    device: str
    allowed: tuple[str, ...]
    command: str
    formats: tuple[str, ...]

    def settings(self, *left_out: str) -> dict[str, Any]:
        """The options as plain values, for the results, without what concerns the files alone and `left_out`."""
        hidden = {"model", "name", "out", "command", "formats", *left_out}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in hidden}


Kind = TypeVar("Kind", bound=Options)


def parser_of(command: str, description: str, models: str) -> ArgumentParser:
    """A parser with MODEL and the options that all commands have.

    Args:
        command: name of the command.
        description: what it does.
        models: what MODEL may be.
    """
    parser = ArgumentParser(
        prog=f"attnzoo-{command}", description=description, exit_on_error=False, formatter_class=Help
    )
    parser.add_argument("model", metavar="MODEL", help=models)
    parser.add_argument("--out", metavar="DIR", help=f"folder of the results (default: runs/{command}/NAME)")
    parser.add_argument("--name", help="name of the model in titles and folders (default: that of its file or folder)")
    add_format(parser)
    add_device(parser, "the model runs")
    add_allow_import(parser)
    return parser


def options_of(
    kind: type[Kind], command: str, words: Sequence[str], parsed: Any, allowed: tuple[str, ...], **made: Any
) -> Kind:
    """Options of this kind from the command line and what such a parser makes of it.

    Args:
        kind: the command's own options.
        command: name of the command.
        words: of the command line.
        parsed: what the parser gives.
        allowed: packages that a checkpoint may name.
        made: fields that are not as they were parsed.
    """
    path = Path(parsed.model)
    folder = parsed.name or path.stem or path.resolve().name
    made |= {
        "out": Path(parsed.out) if parsed.out else Path("runs") / command / folder, "allowed": allowed,
        "command": shlex.join([f"attnzoo-{command}", *words]), "formats": formats_named(parsed.format),
    }  # fmt: skip
    others = {field.name for field in dataclasses.fields(kind)} - made.keys()
    return kind(**made, **{name: getattr(parsed, name) for name in others})


def comma_separated(text: str) -> tuple[str, ...]:
    """Words between commas; none for an empty text or for "none" alone."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    return () if words == ("none",) else words


def comma_separated_numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: naming the argument, if one of them is not a number.
    """
    try:
        return tuple(float(word) for word in comma_separated(text))
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {text!r}") from None
