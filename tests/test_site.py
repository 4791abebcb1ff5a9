"""The documentation site builds without a warning, every picture is there, and a browser shows its pages."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from attnzoo_recipes.evidence.page import page as claim_page
from tests.recipes.test_evidence import planted

ROOT = Path(__file__).parents[1]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MECHANISMS_PAGE = (ROOT / "docs" / "mechanisms.md").read_text()
SHOWN = ["index", "gallery", "mechanisms", "kha", "reference/mechanisms"]

pytest.importorskip("mkdocs", reason="the site is built with mkdocs")


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.targets, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if target := given.get("href" if tag in {"a", "link"} else "src"):
            self.targets.append((tag, target))


def build(out, root=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ".:kernels:recipes", "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_every_link_and_picture_is_there(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 40
    broken = []
    for path, page in pages.items():
        for tag, target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                # Other sites are linked to, and nothing is loaded from them.
                assert tag == "a" or parts.scheme == "data", (path, target)
                continue
            file = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if parts.path.startswith("/"):  # of the page that is shown for missing ones
                file = site / parts.path.lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (parts.fragment and file in pages and parts.fragment not in pages[file].names):
                broken.append((path.relative_to(site).as_posix(), target))
    assert not [row for row in broken if not row[1].startswith("#__")], broken


def test_every_mechanism_has_its_figure():
    pages = re.findall(r"\]\((\w+)\.md\)", "".join(re.findall(r"^\|(.*?)\|", MECHANISMS_PAGE, re.MULTILINE)))
    assert len(pages) > 20
    for page in pages:
        assert (ROOT / "docs" / "figures" / f"{page}.svg").is_file(), page
        assert f"(figures/{page}.svg)" in (ROOT / "docs" / f"{page}.md").read_text(), page


def test_the_figures_are_those_of_the_script(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures are drawn with matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs" / "scripts")
    import figures

    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    figures.main()
    for path in sorted(tmp_path.iterdir()):
        texts = [
            re.findall(r"<text[^>]*>([^<]*)", file.read_text()) for file in (path, ROOT / "docs/figures" / path.name)
        ]
        assert texts[0] == texts[1], path.name


@pytest.mark.slow
def test_a_page_that_is_missing_fails_the_build(tmp_path):
    """And pages of claims, which attnzoo-evidence writes, are shown with their tables and pictures."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    claims = tmp_path / "docs" / "reports" / "evidence"
    claims.mkdir(exist_ok=True)
    results = planted({("mha", 1e-3): [2.0, 2.1, 2.2], ("kha", 1e-3): [1.90, 1.99, 2.09]})
    (claims / "planted.md").write_text(claim_page(results, "planted.png"))
    shutil.copy(ROOT / "docs" / "reports" / "minilm" / "sink.png", claims / "planted.png")
    page = tmp_path / "docs" / "kha.md"
    page.write_text(page.read_text() + "\n[nowhere](nowhere.md)\n")
    for path in ROOT.iterdir():
        if path.name not in {"docs", "mkdocs.yml", ".git", "site"}:
            os.symlink(path, tmp_path / path.name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = build(tmp_path / "out", tmp_path)
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert [("nowhere.md" in line) for line in warnings] == [True], warnings
    shown = tmp_path / "out" / "reports" / "evidence" / "planted"
    text = (shown / "index.html").read_text()
    assert text.count("<table>") == 2
    assert "Verdict: confirmed" in text
    (picture,) = (target for tag, target in Links(text).targets if target.endswith("planted.png"))
    assert (shown / picture).resolve().is_file()
    assert results["claim"]["title"] in (tmp_path / "out" / "evidence" / "index.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("page", SHOWN)
def test_a_browser_shows_the_page(site, page, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="the screenshot is read with matplotlib")
    path = site / ("index.html" if page == "index" else f"{page}/index.html")
    shot = tmp_path / "page.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,900",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", path.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = image.imread(shot)
    assert pixels.shape[:2] == (900, 1280)
    # Text and figures on a ground: more than a few colours, and not one flat area.
    assert pixels[..., :3].std() > 0.05
    assert len({tuple(row) for row in (pixels[::7, ::7, :3].reshape(-1, 3) * 15).round()}) > 8
