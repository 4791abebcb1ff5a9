"""The files of a command: collected while it works and written at its end, so that a mistake leaves nothing behind."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.diagnostics import plots
from attnzoo.diagnostics.training_records import finite
from attnzoo_recipes.diagnose.html import Picture, Section, Terms, html_report, number
from attnzoo_recipes.files import write_atomically
from attnzoo_recipes.tables import as_csv


class Results:
    """Files by name, for one folder.

    Args:
        folder: created by `write` if it does not exist.
        command: the command line that makes them.
        formats: of the pictures' files.

    Raises:
        ValueError: if the folder or one of its parents is a file.
    """

    def __init__(self, folder: Path, command: str = "", formats: Sequence[str] = ("png",)) -> None:
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(
                    f"out must be a folder or a new name, got {str(folder)!r}, but {str(place)!r} is a file"
                )
        self.folder = folder
        self.formats = tuple(formats)
        self.made = {
            "command": command, "date": time.strftime("%Y-%m-%d"), "attnzoo": attnzoo.__version__,
            "torch": torch.__version__,
        }  # fmt: skip
        self.files: dict[str, bytes] = {}

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        """Plain types as JSON, with how they were made in "made"; floats that are not finite become null."""
        content = {"made": self.made, **content}
        self.files[name] = (json.dumps(finite(content), indent=1, allow_nan=False) + "\n").encode()

    def csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows under the union of their keys; floats that are not finite become empty, see `as_csv`."""
        self.files[name] = as_csv(finite(list(rows))).encode()

    def picture(self, name: str, text: str, draw: Callable[..., Any], *arguments: Any, **options: Any) -> Picture:
        """Call draw(*arguments, **options, theme=...) for both themes.

        Returns:
            the picture for a report. Its files are name.png and name-dark.png; name.pdf and name.svg have the light
            theme.
        """
        drawn = {}
        for theme, ending in (("light", ""), ("dark", "-dark")):
            figure = draw(*arguments, **options, theme=theme)
            drawn[theme] = plots.to_png(figure)
            for kind in self.formats:
                if kind == "png":
                    self.files[f"{name}{ending}.png"] = drawn[theme]
                elif theme == "light":
                    self.files[f"{name}.{kind}"] = plots.to_bytes(figure, kind)
        return Picture(drawn["light"], text, drawn["dark"])

    def report(
        self, title: str, sections: Sequence[Section], introduction: str, terms: Mapping[str, str] | None = None
    ) -> None:
        """report.html, with the meanings of its terms, and how it was made."""
        made = "Made on {date} by attnzoo {attnzoo} with torch {torch}: {command}".format(**self.made)
        explained = [Section("Terms", [Terms(terms)])] if terms else []
        page = html_report(title, [*sections, *explained], introduction=introduction, footer=made)
        self.files["report.html"] = page.encode()

    def write(self) -> None:
        """Write all files, each in one piece."""
        for name, content in self.files.items():
            write_atomically(self.folder / name, content)


def text_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], digits: int = 3) -> str:
    """Rows for a terminal: the first column aligned to the left, the others to the right."""
    lines = [list(names.values()), *([number(row.get(key), digits) for key in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(aligned) + "\n"


def finite_mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values, or None if there are none."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(kept) if kept else None
