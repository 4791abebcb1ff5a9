"""What the documentation site has beside the pages: the README as its home, and the files that pages link to.

A link out of docs/ goes to the file itself, which is copied to the site; a link to the README goes home. The pages of
the reference are made from the packages' own lists of public names.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(((?:\.\./)*)([^)#\s:]+)(#[^)\s]*)?\)")
COPIED = "files"
# Page: title, sentence, module, and which of its public names; None for all.
REFERENCE = {
    "mechanisms": (
        "Mechanisms",
        "Every class is called as `y = attn(x)`, x (B, T, E) -> (B, T, E), with the keywords `context`, `mask`, "
        "`positions` and `cache`.",
        "attnzoo",
        lambda value: inspect.isclass(value) and "modules" in value.__module__,
    ),
    "library": (
        "Masks, positions and costs",
        "What every mechanism takes, and what it costs.",
        "attnzoo",
        lambda value: callable(value) and "modules" not in value.__module__,
    ),
    "conversion": ("Conversions", "From one attention module to another.", "attnzoo.conversion", callable),
    "hugging_face": (
        "Hugging Face models",
        "attnzoo's attention in models of transformers.",
        "attnzoo.hugging_face",
        callable,
    ),
    "distributed": (
        "Several devices",
        "One sequence, or the heads of a layer, over several processes.",
        "attnzoo.distributed",
        callable,
    ),
    "diagnostics": (
        "Diagnostics",
        "Spectra, what heads do, which of them matter, and how similar they are.",
        "attnzoo.diagnostics",
        callable,
    ),
}


def _reference(title: str, sentence: str, module: str, wanted: Callable[[object], bool]) -> str:
    package = importlib.import_module(module)
    names = [name for name in package.__all__ if wanted(getattr(package, name))]
    return f"# {title}\n\n{sentence}\n\n" + "".join(f"::: {module}.{name}\n\n" for name in names)


def _at(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / path))


def _outside(text: str, folder: Path) -> set[Path]:
    """Files of the repository, but not of docs/, to which a page in `folder` links."""
    targets = {_at(folder, up + path) for up, path, _ in LINK.findall(text)}
    return {target for target in targets if target.is_file() and not target.is_relative_to(ROOT / "docs")}


def _source(page: File, config: MkDocsConfig) -> Path:
    return ROOT if page.src_uri == "index.md" else Path(config.docs_dir, page.src_uri).parent


def _mechanisms(docs: Path) -> dict[str, str]:
    """Pages of the table in docs/mechanisms.md and their titles, in its order."""
    rows = re.findall(r"^\|(.*?)\|", (docs / "mechanisms.md").read_text(), re.MULTILINE)
    pages = dict.fromkeys(page for row in rows for page in re.findall(r"\]\((\w+\.md)\)", row))
    return {page: (docs / page).read_text().split("\n")[0].removeprefix("# ").split(":")[0] for page in pages}


def _claims(docs: Path) -> list[dict[str, str]]:
    """Pages of claims that were tried, by their titles."""
    pages = sorted((docs / "reports" / "evidence").glob("*.md"))
    return [{page.read_text().split("\n")[0].removeprefix("# "): str(page.relative_to(docs))} for page in pages]


def _gallery(docs: Path) -> str:
    """All mechanisms' figures on one page."""
    figures = "".join(
        f"## [{title}]({page})\n\n![{title}](figures/{page.removesuffix('.md')}.svg)\n\n"
        for page, title in _mechanisms(docs).items()
    )
    return f"# Gallery\n\nWhat each mechanism changes in multi-head attention, drawn with four heads.\n\n{figures}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages into the navigation: mechanisms in the order of the table in docs/mechanisms.md, and tried claims."""
    docs = Path(config.docs_dir)
    (section,) = (entry["Mechanisms"] for entry in config.nav if "Mechanisms" in entry)
    section.extend({title: page} for page, title in _mechanisms(docs).items())
    for entry in config.nav:
        for place in entry.get("Recipe", ()):
            if "Evidence" in place and (claims := _claims(docs)):
                place["Evidence"] = [place["Evidence"], *claims]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the home page, and add every file outside docs/ to which a page links."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "gallery.md", content=_gallery(Path(config.docs_dir))))
    for name, page in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(*page)))
    for page in files.documentation_pages():
        for path in _outside(page.content_string, _source(page, config)) - {ROOT / "README.md"}:
            uri = f"{COPIED}/{path.relative_to(ROOT)}"
            # A page of Markdown would be one more page of the site; here it is a file as it is.
            uri += ".txt" if path.suffix in {".md", ".ipynb"} else ""
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links into links within the site."""
    folder = _source(page.file, config)
    # Paths are those of the page's place in the site.
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        target = _at(folder, match[1] + match[2])
        anchor = match[3] or ""
        if target == ROOT / "README.md":
            return f"]({up}index.md{anchor})"
        if target.is_dir():
            raise ValueError(f"{page.file.src_uri} links to the folder {match[2]}: the site can show files only")
        if target.is_relative_to(ROOT / "docs"):
            return f"]({up}{target.relative_to(ROOT / 'docs')}{anchor})"
        if target.is_file():
            suffix = ".txt" if target.suffix in {".md", ".ipynb"} else ""
            return f"]({up}{COPIED}/{target.relative_to(ROOT)}{suffix})"
        return match[0]

    return LINK.sub(link, markdown)
