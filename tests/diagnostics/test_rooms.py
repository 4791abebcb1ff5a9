"""The rooms of the package: imports in one direction, and mechanisms read by their contract."""

import ast
import re
from pathlib import Path

import attnzoo.diagnostics as diagnostics
from attnzoo.modules.protocol import MEMBERS

FOLDER = Path(diagnostics.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
BELOW = {
    "arguments": set(),
    "configs": set(),
    "layer_probe": set(),
    "projections": {"layer_probe"},
    "attention_layer": {"layer_probe", "projections"},
    "layers": {"attention_layer", "layer_probe", "projections"},
    "batches": set(),
    "training_records": set(),
    "heads": {"layers", "batches", "arguments", "configs", "training_records"},
    "pruning": {"layers", "batches", "layer_probe", "projections", "arguments", "configs"},
    "spectra": {"layers", "arguments"},
    "capacity": {"heads", "batches", "arguments"},
    "drawing": set(),
    "plots": {"drawing", "spectra", "training_records"},
}
"""The rooms that a room may import from."""


def room(name):
    return name.removeprefix("attnzoo.diagnostics.").split(".")[0]


def imports(path):
    """Dotted names of what a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_in_one_direction():
    for path in FILES:
        if path == FOLDER / "__init__.py":
            continue
        own = room("attnzoo.diagnostics." + ".".join(path.relative_to(FOLDER).with_suffix("").parts))
        others = {room(name) for name in imports(path) if name.startswith("attnzoo.diagnostics.")} - {own}
        assert others <= BELOW[own], path


def test_mechanisms_are_read_by_their_contract_alone():
    mechanisms = {path.stem for path in (FOLDER.parent / "modules").glob("*.py")} - {"heads", "protocol"}
    for path in FILES:
        inside = [name for name in imports(path) if name.startswith("attnzoo.modules.")]
        assert not [name for name in inside if name.split(".")[2] in mechanisms], path
        assert set(re.findall(r"\bmechanism\.([a-z]\w*)", path.read_text())) <= set(MEMBERS), path
