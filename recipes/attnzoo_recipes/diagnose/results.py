"""Files of a command: collected while it works and written at its end, so that a mistake leaves nothing half done."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo.diagnostics import plots
from attnzoo.diagnostics.training_records import finite
from attnzoo_recipes.diagnose.html import Picture, Section, html_report, number


class Results:
    """Files by name, for one folder.

    Args:
        folder: made by `write`, if there is none.

    Raises:
        ValueError: if the folder, or something on the way to it, is a file.
    """

    def __init__(self, folder: Path) -> None:
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"out must be a folder or a new name, got {str(folder)!r}, but {str(place)!r} is a file"
                )
        self.folder = folder
        self.files: dict[str, bytes] = {}

    def json(self, name: str, content: Any) -> None:
        """Plain types as JSON; floats that are not finite become null."""
        self.files[name] = (json.dumps(finite(content), indent=1, allow_nan=False) + "\n").encode()

    def csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows under the union of their keys."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(finite(list(rows)))
        self.files[name] = text.getvalue().encode()

    def picture(self, name: str, text: str, draw: Callable[..., Any], *arguments: Any, **options: Any) -> Picture:
        """draw(*arguments, **options, theme=...) in both themes: name.png and name-dark.png, and both for a report."""
        made = {}
        for theme, ending in (("light", ""), ("dark", "-dark")):
            made[theme] = plots.to_png(draw(*arguments, **options, theme=theme))
            self.files[f"{name}{ending}.png"] = made[theme]
        return Picture(made["light"], text, made["dark"])

    def report(self, title: str, sections: Sequence[Section], introduction: str) -> None:
        """report.html."""
        self.files["report.html"] = html_report(title, sections, introduction=introduction).encode()

    def write(self) -> None:
        """Write all files, each in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            unfinished = self.folder / f"{name}.tmp-{os.getpid()}"
            unfinished.write_bytes(content)
            os.replace(unfinished, self.folder / name)


def text_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], digits: int = 3) -> str:
    """Rows for a terminal: the first column to the left, the others to the right."""
    cells = [list(names.values()), *([number(row.get(key), digits) for key in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    return "\n".join(lines) + "\n"


def words(text: str) -> tuple[str, ...]:
    """Words between commas; none for an empty text or "none" alone."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    return () if found == ("none",) else found


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: naming the argument, if one is none.
    """
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {text!r}") from None
