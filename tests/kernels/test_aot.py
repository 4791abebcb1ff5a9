"""Kernels compile for GPUs that are not there, within their limits and without more spills than the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "aot_resources.py"


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process without the interpreter, which would replace the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_the_short_list_compiles_as_the_table_says():
    done = compiled("--short")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") >= 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_case_compiles_as_the_table_says():
    done = compiled()
    assert done.returncode == 0, done.stderr


def test_the_table_holds_what_was_promised():
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot_resources.json").read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    (forward,) = [
        row for row in rows
        if (row["case"], row["kernel"], row["dtype"], row["target"])
        == ("softmax causal 128", "softmax_attention_fwd_kernel", "bf16", "sm_90")
    ]  # fmt: skip
    assert forward["spills"] == 0
    latent = [row for row in rows if row["case"].startswith("latent decode 512") and row["target"] == "sm_90"]
    assert latent
    assert max(row["shared"] for row in latent) <= 227 * 1024


def test_a_table_with_more_spills_or_shared_memory_is_refused():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from aot_resources import complaints
    finally:
        sys.path.remove(str(SCRIPT.parent))
    row = {"case": "c", "kernel": "k", "dtype": "bf16", "target": "sm_90", "spills": 0, "shared": 10, "seconds": 1.0}
    assert complaints([row], [row]) == []
    assert complaints([row | {"spills": 8}], [row]) == ["c k bf16 sm_90: spills 8 bytes, 0 in the table"]
    assert "shared memory" in complaints([row | {"shared": 300_000}], [row])[0]
    assert "20.0 are allowed" in complaints([row | {"seconds": 30.0}], [row])[0]
    assert "is not in the table" in complaints([row | {"case": "new"}], [row])[0]
    assert "does not compile" in complaints([row | {"error": "boom"}], [row])[0]
