"""Which backend "auto" takes on a GPU, seen without one, and what a decoding step creates and copies."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.softmax_attention import softmax_attention
from tests.zoo import MECHANISMS, build

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "benchmarks" / "backend_table.py"))
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def noted() -> dict[tuple[str, str, torch.dtype], Any]:
    """What every mechanism calls in every case, in both half precisions."""
    return {
        (name, case, dtype): MADE["noted"](name, case, dtype)
        for name in MECHANISMS
        for case in MADE["CASES"]
        if MADE["takes"](name, case)
        for dtype in HALF
    }


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "backends.md").read_text()
    assert MADE["written"](page, MADE["markdown"]()) == page, "run benchmarks/backend_table.py --write"


def test_our_kernels_run_wherever_they_cover_the_call(noted):
    """Nothing is eager, and no (T, S) tensor exists, unless weights are dropped, which no kernel of ours does."""
    for (name, case, dtype), gpu in noted.items():
        linear = name.startswith(("linear", "mhla"))
        if "dropout" in case and not linear:
            continue
        assert gpu.attention() in (*MADE["ATTENTION"].values(), "sdpa"), (name, case, dtype)
        # The caller's dense masks are their own business.
        assert gpu.quadratic <= ({"mixing"} if linear else set()), (name, case, dtype)


def test_both_half_precisions_take_the_same(noted):
    for name, case, dtype in noted:
        assert noted[name, case, dtype].attention() == noted[name, case, HALF[0]].attention()


def test_sdpa_sees_no_bias_of_another_dtype(noted):
    """cuDNN reads a float32 bias beside half-precision queries as half precision; the other backends raise."""
    seen = 0
    for case, gpu in noted.items():
        for mask, dtype in gpu.sdpa:
            assert mask is None or mask.dtype in (torch.bool, dtype), case
            seen += mask is not None
    assert seen


SCORES = {
    "ALiBi": {"alibi_slopes": torch.ones(2, device="meta")},
    "bias": {"bias": torch.ones(5, 5, device="meta")},
    "sink": {"sinks": 1.0},
    "sinks": {"sinks": torch.ones(2, device="meta")},
}
VIEWS = {
    "window": Visibility(window=3),
    "packed": Visibility(mask=AttentionMask(cu_seqlens=torch.ones(3, dtype=torch.int32, device="meta"))),
    "padding": Visibility(mask=AttentionMask(lengths=torch.ones(1, dtype=torch.int64, device="meta"))),
    "dense": Visibility(mask=AttentionMask(dense_mask=torch.ones(5, 5, dtype=torch.bool, device="meta"))),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [*SCORES, *VIEWS, "zero sink", "soft-cap", "nothing"])
def test_the_operation_by_itself(case: str, dtype: torch.dtype, trains: bool):
    q, k, v = (torch.empty(1, 5, 2, 16, dtype=dtype, device="meta", requires_grad=trains) for _ in range(3))
    options: dict[str, Any] = dict(SCORES.get(case, {}))
    options |= {"zero sink": {"sinks": 0.0}, "soft-cap": {"softcap": 3.0}}.get(case, {})
    with MADE["pretend_gpu"]() as gpu:
        softmax_attention(q, k, v, VIEWS.get(case, Visibility()), **options)
        assert gpu.attention() == ("sdpa" if case == "nothing" else "softmax")
        if case in SCORES:
            with pytest.raises(attnzoo.BackendUnavailable, match=f"a float32 bias beside {dtype} queries"):
                softmax_attention(q, k, v, **options, backend="sdpa")


def test_float32_keeps_its_bias():
    q = torch.empty(1, 5, 2, 16, device="meta")
    with MADE["pretend_gpu"]() as gpu:
        softmax_attention(q, q, q, **SCORES["ALiBi"], backend="sdpa")
    assert [mask.dtype for mask, _ in gpu.sdpa] == [torch.float32]


def test_transforms_of_torch_func_stay_with_torch():
    """An operator of ours has no rule for vmap."""
    q = torch.empty(3, 1, 5, 2, 16, device="meta")
    with MADE["pretend_gpu"]() as gpu:
        torch.vmap(lambda x: softmax_attention(x, x, x, Visibility(window=3)))(q)
    assert not gpu.kernels


@pytest.mark.parametrize("name", ["mha", "gqa", "kha", "dcmha", "moh", "moa", "talking-heads"])
def test_norm_and_rotation_are_one_pass(name: str, noted):
    assert "qk_norm_rope" in noted[name, "training", torch.bfloat16].kernels


def test_experts_and_norms_of_heads_run_in_kernels(noted):
    assert "expert_linear" in noted["moa", "training", torch.bfloat16].kernels
    assert "linear_attention_finish" in noted["linear-lm", "training", torch.bfloat16].kernels


def test_shapes_are_read_without_joining_keys(noted):
    """Latent attention joins latents with their rotary keys, and nothing with queries to ask what can run."""
    assert noted["mla", "training", torch.bfloat16].calls["cat"] == 1


class Operations(TorchDispatchMode):
    """Counts operations, and lists those that read one of some storages and returned another one."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.watched = {x.untyped_storage().data_ptr() for x in watched}
        self.counts: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        reads = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        made = out.untyped_storage().data_ptr() if isinstance(out, Tensor) else None
        if len(reads) == 1 and reads[0] in self.watched and made not in (None, reads[0]):
            self.copies.append(name)
        return out


def step(module: nn.Module, *watched: Tensor) -> Operations:
    """The operations of one decoding step, after one that fills what is remembered."""
    x, cache = torch.randn(1, 9, module.embed_dim), module.init_cache(1, 12)
    with torch.no_grad():
        module.eval()(x[:, :7], cache=cache)
        module(x[:, 7:8], cache=cache)
        with Operations(*watched) as operations:
            module(x[:, 8:], cache=cache)
    return operations


FROM_PYTHON = ("lift_fresh", "_to_copy", "scalar_tensor", "index")
"""What torch.tensor, a move to a device and an index that is a list run."""


@pytest.mark.parametrize("groups", [4, 2])
def test_absorbed_decoding_copies_no_weights(groups: int):
    module = attnzoo.MultiHeadLatentAttention(32, 4, 20, num_kv_heads=groups, kv_b_bias=True, absorb=True)
    operations = step(module, module.kv_b_proj.weight)
    assert operations.copies == []
    assert not set(FROM_PYTHON) & set(operations.counts)


@pytest.mark.parametrize("name", ["gqa", "gta", "kha", "moh", "mla", "kha-mla", "dcmha", "talking-heads"])
def test_decoding_after_pruning_makes_no_tensor_from_numbers(name: str):
    module = build(name, dtype=torch.float32, **({"num_kv_heads": 2} if "mla" in name else {}))
    module.prune_heads([3])
    assert not set(FROM_PYTHON) & set(step(module).counts)


def test_remembered_indices_serve_training_after_inference():
    module = attnzoo.GroupedQueryAttention(32, 4, 2)
    module.prune_heads([1])
    x = torch.randn(1, 3, 32)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.k_proj.weight.grad.abs().sum() > 0
