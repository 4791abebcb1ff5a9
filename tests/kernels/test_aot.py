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


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The process that compiled the short list, and its rows."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    done = compiled("--short", "--rows", str(path))
    return done, json.loads(path.read_text()) if path.exists() else []


def of(rows, case, dtype="bf16", target="sm_90"):
    """Kernel -> its row."""
    found = {row["kernel"]: row for row in rows if (row["case"], row["dtype"], row["target"]) == (case, dtype, target)}
    assert found, case
    return found


def pairs_cost(row):
    """Instructions of a thread per pair of query and key in the inner loop."""
    return row["instructions"] * 32 * row["num_warps"] / (row["BLOCK_T"] * row["BLOCK_S"])


def test_the_short_list_compiles_as_the_table_says(short):
    done, rows = short
    assert done.returncode == 0, done.stderr
    assert len(rows) >= 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_case_compiles_as_the_table_says():
    done = compiled()
    assert done.returncode == 0, done.stderr


def test_every_row_of_the_table_compiles():
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot_resources.json").read_text())["rows"]
    assert not [row for row in rows if "error" in row]


def test_kernels_take_what_was_promised(short):
    _, rows = short
    # The tiles that an H200 runs fastest, of small programs, take more instructions a pair than larger ones.
    for case, most in (("softmax causal 128", 10.9), ("softmax causal 64", 9.3)):
        row = of(rows, case)["softmax_attention_fwd_kernel"]
        assert row["spills"] == 0
        assert pairs_cost(row) <= most
    for tile in ("", ", few instructions"):
        plain = of(rows, f"softmax causal 128{tile}")["softmax_attention_fwd_kernel"]
        for case in ("softmax decay 128", "softmax gated 128"):
            row = of(rows, case + tile)["softmax_attention_fwd_kernel"]
            assert pairs_cost(row) <= 1.12 * pairs_cost(plain)
            # The tile that an H200 runs a decay fastest at spills.
            assert row["spills"] == 0 or (case, tile) == ("softmax decay 128", "")
    for case, most in (("softmax causal 128", 8.2), ("softmax causal 64", 7.4)):
        row = of(rows, f"{case}, few instructions")["softmax_attention_fwd_kernel"]
        assert row["spills"] == 0
        assert pairs_cost(row) <= most
    for case in ("latent decode 512+64, 16 heads", "latent decode 512+64, 128 heads"):
        assert max(row["shared"] for row in of(rows, case).values()) <= 227 * 1024


# Kernel -> instructions per query, key and head of the design's prototypes, with matrices of both sides and of queries
# alone, at 16 heads of 64, bf16, sm_90. The keys' kernel spills less than its prototype and takes a little more; the
# tiles of the first three, which an H200 runs up to 1.44 times as fast, take up to a fifth more.
PROTOTYPES = {
    "composed_attention_fwd_stats_kernel": (19.8 * 1.15, 14.1 * 1.2),
    "composed_attention_fwd_out_kernel": (31.4 * 1.1, 19.8 * 1.1),
    "composed_attention_bwd_delta_kernel": (36.0 * 1.05, 22.4 * 1.15),
    "composed_attention_bwd_dq_kernel": (53.5, 30.4),
    "composed_attention_bwd_dkdv_kernel": (75 * 1.05, 42 * 1.07),
}


@pytest.mark.parametrize("kernel", PROTOTYPES)
def test_composed_attention_takes_few_instructions(kernel, short):
    cases = ("composed 16 heads of 64", "composed 16 heads of 64, query side")
    for case, most in zip(cases, PROTOTYPES[kernel], strict=True):
        row = of(short[1], case)[kernel]
        each = row["instructions"] * 32 * row["num_warps"] / (16 * row["BLOCK_T"] * row["BLOCK_S"])
        assert 0 < each <= most


def test_the_length_of_a_loop_leaves_out_what_may_be_jumped_over():
    from attnzoo_kernels.aot import loop_length

    listing = """
        /*0000*/  MOV R1, c[0x0][0x28] ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/  @!P0 BRA 0x50 ;
        /*0030*/  FSEL R4, R4, -INF , P1 ;
        /*0040*/  FSEL R5, R5, -INF , P1 ;
        /*0050*/  FADD R6, R4, R5 ;
        /*0060*/  @P2 BRA 0x10 ;
        /*0070*/  IADD3 R1, R1, 0x1, RZ ;
        /*0080*/  FADD R6, R6, R7 ;
        /*0090*/  @P3 BRA 0x80 ;
        /*00a0*/  EXIT ;
    """
    assert loop_length(listing) == 4
    assert loop_length(listing.replace("HMMA", "FFMA")) == 0


def test_products_that_wait_for_each_other_are_seen():
    from attnzoo_kernels.aot import is_serialized

    pair = "WARPGROUP.ARRIVE ;\n HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;\n"
    assert is_serialized(pair * 4)
    assert not is_serialized(pair + "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;\n")
    assert not is_serialized("HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n" * 2)


@pytest.mark.parametrize("case", ["softmax causal 64", "softmax causal 128", "softmax full 128"])
def test_no_kernel_of_softmax_attention_waits_for_each_product(case, short):
    assert not [kernel for kernel, row in of(short[1], case).items() if row["serialized"]]


def test_a_table_with_more_spills_or_shared_memory_is_refused():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from aot_resources import complaints
    finally:
        sys.path.remove(str(SCRIPT.parent))
    row = {
        "case": "c", "kernel": "k", "dtype": "bf16", "target": "sm_90", "spills": 0, "shared": 10, "seconds": 1.0,
        "instructions": 600,
    }  # fmt: skip
    assert complaints([row], [row]) == []
    assert complaints([row | {"spills": 8}], [row]) == ["c k bf16 sm_90: spills 8 bytes, 0 in the table"]
    assert complaints([row | {"instructions": 610}], [row]) == []
    assert complaints([row | {"instructions": 640}], [row]) == [
        "c k bf16 sm_90: takes 640 instructions a tile, 600 in the table"
    ]
    assert "wait for each other" in complaints([row | {"serialized": True}], [row])[0]
    assert "shared memory" in complaints([row | {"shared": 300_000}], [row])[0]
    assert "20.0 are allowed" in complaints([row | {"seconds": 30.0}], [row])[0]
    assert "is not in the table" in complaints([row | {"case": "new"}], [row])[0]
    assert "does not compile" in complaints([row | {"error": "boom"}], [row])[0]
