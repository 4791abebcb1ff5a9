"""The report is one file that holds everything, runs nothing and reads the same in the dark."""

import base64
import re
from html.parser import HTMLParser

import pytest

from attnzoo_recipes.diagnose.html import Picture, Section, Table, Terms, Text, html_report, number, write_report

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(30))
DARK = b"\x89PNG\r\n\x1a\n" + bytes(30)
VOID = {"meta", "img", "source"}


class Reader(HTMLParser):
    """Tags in order, with a check that they close as they opened."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def sections():
    return [
        Section("Heads", [
            Text("a < b & c"),
            Picture(PNG, 'a "map"', DARK),
            Table([{"layer": "h.0", "x": 0.123456}, {"layer": "<i>", "y": 12345}], {"x": "the x"}),
        ]),
        Section("More", [Picture(PNG, "alone")]),
    ]  # fmt: skip


def test_terms_and_the_way_it_was_made():
    text = html_report("t", [Section("Terms", [Terms({"a < b": "less & more"})])], footer="attnzoo-x '<y>'")
    page = Reader(text)
    assert [tag for tag, _ in page.seen if tag in ("dl", "dt", "dd", "footer")] == ["dl", "dt", "dd", "footer"]
    assert {"a < b", "less & more", "attnzoo-x '<y>'"} <= set(page.texts)


def test_everything_is_inside():
    text = html_report("Spectra of <m>", sections(), introduction="x & y")
    page = Reader(text)
    pictures = page.all("img")
    assert [base64.b64decode(p["src"].split(",")[1]) for p in pictures] == [PNG, PNG]
    assert [p["alt"] for p in pictures] == ['a "map"', "alone"]
    (dark,) = page.all("source")
    assert dark["media"] == "(prefers-color-scheme: dark)"
    assert base64.b64decode(dark["srcset"].split(",")[1]) == DARK
    for said in ("Spectra of <m>", "x & y", "a < b & c", "Heads", "the x", "0.1235", "12,345", "<i>"):
        assert said in page.texts, said
    assert [t for t in page.texts if t in ("layer", "the x", "y")] == ["layer", "the x", "y"]
    assert len(page.all("td")) == 6


def test_nothing_is_fetched_and_nothing_runs():
    text = html_report("t", sections())
    page = Reader(text)
    assert not re.search(r"https?://|url\(|@import|<script|javascript:|\son\w+=", text)
    assert not {"script", "link", "iframe", "object", "embed", "a", "form"} & {tag for tag, _ in page.seen}
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    hostile = html_report("<script>x</script>", [Section("</style><script>", [Text("<img src=x onerror=y>")])])
    assert "script" not in {tag for tag, _ in Reader(hostile).seen}
    assert not Reader(hostile).all("img")


def test_it_is_written_in_one_piece(tmp_path):
    path = write_report(tmp_path / "a" / "report.html", "t", sections())
    assert path.read_text() == html_report("t", sections())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (1234567, "1,234,567"),
        (0.0001234567, "0.0001235"),
        (float("nan"), "nan"),
        ("x", "x"),
        (True, "True"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_picture_that_is_none_is_refused():
    with pytest.raises(ValueError, match="png must be the bytes of a PNG file, got b'GIF89a'"):
        html_report("t", [Section("s", [Picture(b"GIF89a", "x")])])
