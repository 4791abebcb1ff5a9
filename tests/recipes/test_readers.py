"""Texts of files: whatever else a file holds, its texts come out unchanged, or one sentence names file and line."""

import bz2
import gzip
import json
import lzma

import pytest

from attnzoo_recipes.data.corpus import Corpus


def documents(source, path, **options):
    return list(Corpus(source, (str(path),), **options).documents())


@pytest.mark.parametrize("folder", ["plain", "runs[1]", "a*b", "x?"])
@pytest.mark.parametrize("pattern", ["*.txt", "a[1].txt", "[ab]*.txt", "**/*.txt"])
def test_names_of_files_may_hold_the_letters_of_patterns(folder, pattern, tmp_path):
    place = tmp_path / folder
    place.mkdir()
    for name, text in {"a1.txt": "first", "a[1].txt": "second", "b.txt": "third"}.items():
        (place / name).write_text(text)
    found = documents("text", place / pattern)
    assert sorted(found) == (["second"] if pattern == "a[1].txt" else ["first", "second", "third"])


ROWS = [
    {"text": "one", "score": None, "when": "2020-01-01", "tags": [], "n": 1},
    {"text": "two", "score": "x", "when": None, "tags": {"a": 1}, "n": 10**30},
    {"score": 1.5, "text": "three", "other": {"deep": [[[]]]}},
    {"text": "2020-01-04"},
    {"text": "12", "n": "12"},
    {"text": "true", "n": float("nan")},
    {"text": "späť 日本", "bad": "\ud800"},
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("form", ["lines", "list", "indented list", "byte order mark", "Windows"])
def test_a_field_of_json_does_not_depend_on_the_others(order, form, tmp_path):
    rows, path = ROWS[::order], tmp_path / "rows.json"
    lines = "\n".join(map(json.dumps, rows))
    texts = {
        "lines": lines,
        "list": json.dumps(rows),
        "indented list": "\n " + json.dumps(rows, indent=2, ensure_ascii=True),
        "byte order mark": "\ufeff\n" + lines + "\n\n",
        "Windows": lines.replace("\n", "\r\n"),
    }
    path.write_text(texts[form], encoding="utf-8", newline="")
    assert documents("json", path) == [row["text"] for row in rows]


def test_a_long_number_beside_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": %s, "text": "a"}' % ("1" * 10_000))
    assert documents("json", tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize("opened", [gzip.open, bz2.open, lzma.open])
def test_compressed_files_are_read(opened, tmp_path):
    ending = {gzip.open: "gz", bz2.open: "bz2", lzma.open: "xz"}[opened]
    with opened(tmp_path / f"a.jsonl.{ending}", "wt") as file:
        file.write('{"text": "a"}\n{"text": "b"}\n')
    assert documents("json", tmp_path / f"a.jsonl.{ending}") == ["a", "b"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("document", ["a\nb\n\n\n\nc\n\nd"]),
        ("paragraph", ["a\nb", "c", "d"]),
        ("line", ["a", "b", "c", "d"]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_units_of_text(unit, expected, newline, tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\n\n\nc\n\nd", newline=newline)
    assert documents("text", tmp_path / "a.txt", unit=unit) == expected


@pytest.mark.parametrize("unit", ["document", "paragraph", "line"])
def test_a_byte_order_mark_is_no_text(unit, tmp_path):
    (tmp_path / "a.txt").write_text("a \ufeff", encoding="utf-8-sig")
    assert documents("text", tmp_path / "a.txt", unit=unit) == ["a \ufeff"]


def test_other_columns_of_parquet_are_not_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    strings = [pa.array(["a", "b"]), pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"]).dictionary_encode()]
    for i, column in enumerate(strings):
        parquet.write_table(pa.table({"n": [None, 1], "text": column, "s": [[1], None]}), tmp_path / f"{i}.parquet")
    assert documents("parquet", tmp_path / "*.parquet") == ["a", "b"] * 3


BROKEN = {
    "json": [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', "line 3.*|.*one of body, got 'text'"),
        (b'{"text": "a"}\n{"text": 3}\n', "got int in .*line 2"),
        (b'{"text": "a"}\n{"text": null}\n', "got null in .*line 2"),
        (b'{"text": "a"}\n"b"\n', "got str in .*line 2"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "UTF-8 can write, got .*line 2"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2"),
        (b'[{"text": "a"}, {"text": ["b"]}]', "got list in .*entry 2"),
        (b'[{"text": "a"}, ', "JSON"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "line 2"),
    ],
    "text": [(b"a\nb\n\xffc\n", "line 3"), (b"a" * 100_000 + b"\nb\n\xc3(", "line 3")],
    "parquet": [(b"PAR1 no", "cannot be read as Parquet"), (b"", "cannot be read as Parquet")],
}


@pytest.mark.parametrize(("source", "content", "words"), [(s, *case) for s, cases in BROKEN.items() for case in cases])
@pytest.mark.parametrize("unit", ["document", "line", "paragraph"])
def test_a_broken_file_is_named_with_its_line(source, content, words, unit, tmp_path):
    (tmp_path / "broken.file").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        documents(source, tmp_path / "broken.file", unit=unit)
    assert "broken.file" in str(caught.value)
    assert "data." in str(caught.value)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:60])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        documents("json", tmp_path / "a.jsonl.gz")


def test_a_column_of_numbers_is_no_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"must hold text, got int in .*a\.parquet, row 1"):
        documents("parquet", tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"must be one of text, got 'body' in .*a\.parquet"):
        documents("parquet", tmp_path / "a.parquet", text_field="body")
