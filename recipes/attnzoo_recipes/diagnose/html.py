"""A report as one self-contained HTML file: text, tables and pictures, for light and dark themes."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo_recipes.files import write_atomically

_PNG = b"\x89PNG\r\n\x1a\n"
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1a1a1a; --faint: #6e6e6e; --line: #d8d8d8; --row: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181d; --text: #e8e8e8; --faint: #9a9a9a; --line: #353941; --row: #1e2128; }
}
body { background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); } th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(odd) { background: var(--row); }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; } figcaption { color: var(--faint); }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1.5rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); color: var(--faint); overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under the union of their keys, in order of appearance; a key that a row lacks gives an empty entry.

    Attributes:
        rows: mappings of column names to texts, numbers or None.
        names: headings of columns. Default: their keys.
        digits: significant digits of numbers.
    """

    rows: Sequence[Mapping[str, Any]]
    names: Mapping[str, str] | None = None
    digits: int = 4


@dataclass(frozen=True)
class Picture:
    """A PNG with its description, which is both its caption and its alternative text.

    Attributes:
        png: the file's bytes.
        text: the description.
        dark: the same picture for dark pages.
    """

    png: bytes
    text: str
    dark: bytes | None = None


@dataclass(frozen=True)
class Terms:
    """Terms with their meanings."""

    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A heading and what follows it."""

    title: str
    parts: Sequence[Text | Table | Picture | Terms]


def html_report(title: str, sections: Sequence[Section], *, introduction: str = "", footer: str = "") -> str:
    """The text of the whole file.

    It contains no scripts and no external references, and its content policy forbids both; texts are escaped.

    Raises:
        ValueError: for a picture that is not a PNG.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    if introduction:
        body.append(f"<p>{html.escape(introduction)}</p>")
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [_part(part) for part in section.parts]
    if footer:
        body.append(f"<footer>{html.escape(footer)}</footer>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    return "\n".join(
        ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>", ""]
    )


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, introduction: str = "", footer: str = ""
) -> Path:
    """Write `html_report` to a file, in one piece; creates its folder."""
    path = Path(path)
    write_atomically(path, html_report(title, sections, introduction=introduction, footer=footer))
    return path


def number(value: Any, digits: int = 4) -> str:
    """A table's entry as text: whole numbers with separators, others with significant digits, empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    return str(value)


def _part(part: Text | Table | Picture | Terms) -> str:
    if isinstance(part, Text):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Terms):
        terms = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in part.meanings.items())
        return f"<dl>{''.join(terms)}</dl>"
    if isinstance(part, Table):
        return _table(part)
    return _picture(part)


def _table(table: Table) -> str:
    columns = list(dict.fromkeys(key for row in table.rows for key in row))
    names = table.names or {}
    head = "".join(f'<th scope="col">{html.escape(names.get(column, column))}</th>' for column in columns)
    lines = [
        "<tr>"
        + "".join(f"<td>{html.escape(number(row.get(column), table.digits))}</td>" for column in columns)
        + "</tr>"
        for row in table.rows
    ]
    body = "\n".join(lines)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _picture(picture: Picture) -> str:
    text = html.escape(picture.text, quote=True)
    dark = ""
    if picture.dark is not None:
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark)}">'
    image = f'<img src="{_data(picture.png)}" alt="{text}" loading="lazy">'
    return f"<figure><picture>{dark}{image}</picture><figcaption>{text}</figcaption></figure>"


def _data(png: bytes) -> str:
    if not png.startswith(_PNG):
        raise ValueError(f"png must be the bytes of a PNG file, got {png[:8]!r}")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
