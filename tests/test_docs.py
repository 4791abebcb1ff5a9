"""The examples in docs/ and the README run, what the pages link to is there, tables are those of the results."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import attnzoo
from tests import zoo
from tests.test_docs_commands import uses_runs

ROOT = Path(__file__).parents[1]
# Pages of commands.
COMMANDS = {"comparison", "evidence", "gpu", "pretrain", "reliability", "speed"}
PAGES = sorted((ROOT / "docs").glob("*.md"))


def examples(page: Path) -> list[str]:
    """The page's Python blocks but those that belong to commands, which run with them (`test_docs_commands`)."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not uses_runs(block)]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, capsys, tmp_path, monkeypatch):
    torch.manual_seed(0)
    blocks = examples(page)
    assert blocks or page.stem in COMMANDS
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = []
    for block in blocks:
        # A block that begins with the name of a file is that file, from which later blocks may import.
        file = re.match(r"# (\w+)\.py\n", block)
        if file:
            (tmp_path / f"{file[1]}.py").write_text(block)
            files.append(file[1])
        exec(compile(block, str(page), "exec"), {"__name__": "__main__"})
    for name in files:
        sys.modules.pop(name, None)
    # "# 10 10 5120" behind a print, and comment lines after a block's prints, are what is printed.
    printed = capsys.readouterr().out.split()
    for line in re.findall(r"print\(.*?\)  # (.*)$", "\n".join(blocks), re.MULTILINE):
        for value in re.findall(r"[\d.]+", line):
            assert value in printed, f"{page.name} promises {value}, printed {printed}"


def test_the_readme_runs_from_top_to_bottom():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (2, 100, 512)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml")))
def test_every_mechanism_has_its_page_row_and_tests(name):
    # Of one class there may be several files, whose names begin with its page's.
    page = name.removesuffix("_v2").removesuffix("_pro")
    assert (ROOT / "docs" / f"{page}.md").is_file()
    assert (ROOT / "tests" / "modules" / f"test_{page}.py").is_file()
    assert f"[{name}](docs/{page}.md)" in (ROOT / "README.md").read_text()
    compared = (ROOT / "configs" / "compare.yaml").read_text()
    assert re.search(rf"\b{name}\b", compared)


# Names of pages and configurations, in tests/zoo.py under another one.
IN_THE_ZOO = {"mditface": "static-context"}


def test_the_table_of_caches_names_what_mechanisms_make():
    page = (ROOT / "docs" / "masks_and_caches.md").read_text().partition("| mechanism | holds |")[2]
    shown = {}
    for row in re.findall(r"^\| ([a-z0-9_, ]+) \| (.*?) \|", page, re.MULTILINE):
        shown |= dict.fromkeys(row[0].split(", "), row[1])
    named = {path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml")} | {"chai"}
    assert set(shown) == named
    for name in sorted(named - {"chai"}):
        module = zoo.MECHANISMS[IN_THE_ZOO.get(name, name.replace("_", "-"))]()
        assert f"`{type(module.init_cache(1, 8)).__name__}`" in shown[name]


def test_contributing_lists_the_contract_in_its_order():
    tree = ast.parse((ROOT / "attnzoo" / "modules" / "protocol.py").read_text())
    protocol = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    members = [
        node.target.id if isinstance(node, ast.AnnAssign) else getattr(node, "name", "") for node in protocol.body
    ]
    listed = re.search(r"^What the contract holds.*", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[0]
    listed = listed.replace(" (a `HeadLayout`)", "").replace("the call", "`__call__`")
    assert re.findall(r"`(\w+)`", listed) == [name for name in members if name]


def test_the_tpa_page_says_how_many_heads_have_as_many_parameters():
    page = (ROOT / "docs" / "tpa.md").read_text()
    sizes = re.search(r"Attention\((\d+), (\d+), (\d+)\)  # as many parameters as (\d+) heads", page)
    width, heads, head_dim, others = map(int, sizes.groups())
    ours, theirs = (
        sum(p.numel() for p in attn.parameters())
        for attn in (attnzoo.TensorProductAttention(width, heads, head_dim), attnzoo.MultiHeadAttention(width, others))
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_what_static_tokens_save_is_what_the_results_say():
    lines = (ROOT / "benchmarks" / "results" / "static_context.jsonl").read_text().splitlines()
    assert "1 - T / (6 E + T + S) of its FLOPs for many steps" in (ROOT / "docs" / "mditface.md").read_text()
    for row in map(json.loads, lines):
        E, T, S = (row["shape"][name] for name in "ETS")
        # Nine of ten steps reuse what the first has made.
        assert row["flops_saved"] == pytest.approx(0.9 * (1 - T / (6 * E + T + S)))


def test_the_speed_tables_are_those_of_the_committed_results():
    path = ROOT / "benchmarks" / "speed_table.py"
    made = runpy.run_path(str(path))
    page = (ROOT / "docs" / "speed.md").read_text()
    assert made["written"](page, made["tables"]()) == page, f"run {path.name} --write"


def test_the_tables_of_the_gpu_are_those_of_the_committed_results():
    path = ROOT / "benchmarks" / "gpu_table.py"
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert runpy.run_path(str(path))["page"](page) == page, f"run {path.name} --write"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_and_commands_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"
    for path in re.findall(r"\b((?:tests|attnzoo|configs|benchmarks|kernels|recipes|docs)/[\w./-]+)", text):
        # NAME stands for a mechanism's short name.
        wanted = path.rstrip(".").replace("NAME", "kha")
        assert (ROOT / wanted).exists(), f"{page.name} names {path}"


def test_the_resources_of_composed_attention_are_those_of_the_committed_table():
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot_resources.json").read_text())["rows"]
    measured = {}
    for row in rows:
        if (row["dtype"], row["target"]) == ("bf16", "sm_90") and row["case"].startswith("composed 16 heads of 64"):
            each = row["instructions"] * 32 * row["num_warps"] / (16 * row["BLOCK_T"] * row["BLOCK_S"])
            numbers = row["registers"], row["spills"], row["shared"] // 1024, round(each, 1)
            measured.setdefault(row["kernel"], [f"{row['BLOCK_T']} x {row['BLOCK_S']}"]).append(numbers)
    page = (ROOT / "docs" / "dcmha.md").read_text()
    for tile, both, of_queries in measured.values():
        cells = " | ".join(f"{a} ({b})" for a, b in zip(both, of_queries, strict=True))
        assert f"| {tile} | {cells} |" in page
    assert len(measured) == 5


COMPARED = ROOT / "benchmarks" / "results" / "compare-cpu"


def test_the_comparison_is_that_of_the_results():
    table, *_ = (COMPARED / "table.md").read_text().split("\n\n")
    assert table in (ROOT / "docs" / "comparison.md").read_text()
    assert len(table.splitlines()) == 2 + len(list((ROOT / "configs" / "attention").glob("*.yaml")))


def test_training_speeds_are_those_of_the_comparison():
    rows = json.loads((COMPARED / "results.json").read_text())["rows"]
    speeds = {row["mechanism"]: f"{row['tokens_per_second'] / rows[0]['tokens_per_second']:.2f}" for row in rows}
    shown = {}
    for line in (ROOT / "docs" / "backends.md").read_text().splitlines():
        cells = [cell.split(", ") for cell in line.strip("| ").split(" | ")]
        if len(cells) == 7 and set(cells[0]) <= set(speeds):
            shown |= dict(zip(cells[0], cells[-1], strict=True))
    assert shown == speeds


def test_the_learning_rates_of_dcmha_are_those_of_the_results():
    lines = (ROOT / "benchmarks" / "results" / "dcmha_rate.jsonl").read_text().splitlines()
    held_out = {row["case"]: f"{row['curve'][-1][2]:.3f}" for row in map(json.loads, lines)}
    page = (ROOT / "docs" / "dcmha.md").read_text()
    for rate in ("3e-3", "1e-3", "3e-4"):
        cells = [held_out[f"{arm} {rate} {ratio}"] for arm, ratio in (("mha", 1), ("dcmha", 1), ("dcmha", 0.1))]
        assert f"| {rate} | {' | '.join(cells)} |" in page


def test_what_the_norm_of_heads_does_is_what_the_results_say():
    lines = (ROOT / "benchmarks" / "results" / "head_norm_rate.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines)}
    held_out = {case: f"{row['curve'][-1][2]:.3f}" for case, row in rows.items()}
    page = (ROOT / "docs" / "comparison.md").read_text()
    mechanisms = list(dict.fromkeys(case.split()[0] for case in rows))
    assert len(mechanisms) == 7
    for mechanism in mechanisms:
        start = rows[f"{mechanism} 1"]["start"]
        cells = [f"{sum(start) / len(start):.1f}", held_out[f"{mechanism} 1"], held_out.get(f"{mechanism} 0.1", "")]
        assert f"| `{mechanism}` | {' | '.join(cells)} |" in page


def test_the_conversion_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pytest.importorskip("transformers", reason="needs transformers")
    import smollm2_conversion

    assert smollm2_conversion.table(smollm2_conversion.OUT) in (ROOT / "docs" / "hugging_face.md").read_text()
