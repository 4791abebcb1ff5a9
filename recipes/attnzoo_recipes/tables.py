"""Tables of results as CSV that a spreadsheet shows and does not run."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_FORMULA = re.compile(r"(^|[;|\t\n])(?=\s*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20\t])")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the union of their keys, in order of appearance.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which makes it a text there. That
    is one that begins with =, +, -, @ (also in their full width), a tab or a carriage return, or has such a part after
    a character that separates cells elsewhere; numbers stay as they are. Lines end in a line feed alone.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(key) for key in keys])
    writer.writerows([_cell(row.get(key)) for key in keys] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        # csv does not quote a carriage return, which would begin a row.
        return _FORMULA.sub(r"\1'", value.replace("\r\n", "\n").replace("\r", "\n"))
    return value
