"""CSV that no spreadsheet runs."""

import csv
import io

import pytest

from attnzoo_recipes.compare.table import summarise
from attnzoo_recipes.diagnose.html import Section as HtmlSection
from attnzoo_recipes.diagnose.html import Table, Text, html_report
from attnzoo_recipes.diagnose.results import Results
from attnzoo_recipes.tables import as_csv

FORMULAS = (
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "=cmd|' /C calc'!A0", "-cmd", "+", "-", "=", "@", "\t=1", "\r=1", "\n=1", " =1",
    "\uff1d1+1", "\uff20SUM(A1)", "a;=1+1", "a\t=1", "a\n=1+1", "-1e", "--1", "+-1", "=HYPERLINK(\"http://x\")",
)  # fmt: skip


def runs(cell):
    """Whether a spreadsheet that separates cells at commas, semicolons or tabs would take the text for a formula."""
    parts = cell.replace(";", "\n").replace("\t", "\n").replace("\r", "\n").split("\n")
    return any(part.strip()[:1] in tuple("=+-@\uff1d\uff20") and part.strip() for part in parts)


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_is_a_text(formula):
    (heading,), (cell,) = csv.reader(io.StringIO(as_csv([{formula: formula}]), newline=""))
    for text in (heading, cell):
        assert not runs(text)
        assert text.replace("'", "") == formula.replace("'", "").replace("\r", "\n")


def test_numbers_and_other_texts_stay():
    row = {
        "a": -0.5, "b": "-0.5", "c": "+3e-5", "d": 2, "e": None, "f": "L0H1", "g": "a-b", "h": "a=b", "i": "x, y",
        "j": True,
    }  # fmt: skip
    _, cells = csv.reader(as_csv([row]).splitlines())
    assert cells == ["-0.5", "-0.5", "+3e-5", "2", "", "L0H1", "a-b", "a=b", "x, y", "True"]


def test_every_table_is_written_this_way(tmp_path):
    results = Results(tmp_path)
    results.csv("a.csv", [{"name": "=1+1", "value": -1.0}, {"name": "b", "other": float("nan")}])
    assert results.files["a.csv"].decode() == "name,value,other\n'=1+1,-1.0,\nb,,\n"
    run = {
        "mechanism": "=1+1", "seed": 0, "status": "failed", "detail": "@x", "parameters": 1, "mlp_dim": 1,
        "flops_per_token": 1, "cache_bytes_per_token": 1,
    }  # fmt: skip
    _, cells = csv.reader(as_csv(summarise([run], {})).splitlines())
    assert cells[0] == "'=1+1"


def test_a_report_escapes_names():
    evil = "</td><script>alert(1)</script>\"'&"
    parts = [Text(evil), Table([{evil: evil}])]
    page = html_report(evil, [HtmlSection(evil, parts)], introduction=evil)
    assert "<script" not in page
    assert page.count("&lt;/td&gt;&lt;script&gt;alert(1)") == 7
