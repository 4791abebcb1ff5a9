"""Words that CONTRIBUTING lists do not come back into pages and docstrings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attnzoo", "kernels/attnzoo_kernels", "recipes/attnzoo_recipes")
LISTED = re.search(r"^## Words\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)[1]
# Where a word of the list is right: what follows it, or comes before it.
FINE = {
    "is no ...": r"(?<!there )\bis no (?!longer\b|more\b|less\b|faster\b|slower\b|reason\b|such\b)\w+",
    "are no ...": r"(?<!there )\bare no (?!longer\b|more\b|less\b|faster\b|slower\b|such\b)\w+",
    "stands": r"\bstands\b(?! for\b| out\b| in for\b)",
    "stand": r"\bstand\b(?! for\b| out\b| in for\b|-in)",
    "lies": r"\blies\b(?! between\b| below\b| above\b| where\b| wholly\b| with the\b)",
    "lie": r"\blie\b(?! between\b| below\b| above\b)",
    "apart": r"(?<!told )(?<!tells )(?<!tells them )(?<!kept )(?<!keep )(?<!documents )(?<!set )\bapart\b(?! from\b)",
    "rooms": r"\brooms\b",
}


def words():
    """The first column of the table, word by word, and the pattern of each."""
    found = {}
    for row in re.findall(r"^\| (.*?) \|", LISTED, re.MULTILINE)[2:]:
        row = re.sub(r" \((but|of).*?\)|, for separately", "", row)
        for word in row.split(", "):
            found[word] = FINE.get(word, rf"\b{re.escape(word)}(s|rs)?\b")
    return found


def texts():
    """(file, text) of the pages without their code, and of all docstrings, each on one line."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels" / "README.md"]
    for path in sorted(pages):
        if path.name != "CHANGELOG.md":  # it names what was renamed
            text = re.sub(r"^( *)```.*?^ *```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
            yield path, one_line(text.replace(LISTED, ""))
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, one_line(ast.get_docstring(node) or "")


def one_line(text):
    return " ".join(text.split())


ALL = list(texts())


@pytest.mark.parametrize("word", words())
def test_a_word_of_the_list_does_not_come_back(word):
    pattern = re.compile(words()[word], re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: ...{text[max(0, hit.start() - 40) : hit.end() + 40]}..."
        for path, text in ALL for hit in pattern.finditer(text)
    ]  # fmt: skip
    assert not found, "\n".join(found)


def test_rates_are_per():
    """Of pages: "numbers per token", not "numbers a token"."""
    rate = re.compile(
        r"\b(numbers|bytes|FLOPs|nats|tokens|heads|latent) a (cached |static )?(token|sequence|rank|layer)\b"
    )
    found = [f"{path.name}: {hit[0]}" for path, text in ALL if path.suffix == ".md" for hit in rate.finditer(text)]
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for():
    assert set(FINE) <= set(words())
    wrong = "It is no list, stands there, lies here, comes apart, begins anew and goes on once a run."
    fine = "There is no list; it is no longer one; it stands for x, lies between 0 and 1, and is told apart."
    hits = {word for word, pattern in words().items() if re.search(pattern, wrong, re.IGNORECASE)}
    assert hits == {"is no ...", "stands", "lies", "apart", "anew", "goes on", "once a run"}
    assert not [word for word, pattern in words().items() if re.search(pattern, fine, re.IGNORECASE)]
    assert len(ALL) > 2000
