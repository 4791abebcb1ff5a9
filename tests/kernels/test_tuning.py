"""Which line of the tables a device gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from attnzoo_kernels import expert_projection, tuning
from attnzoo_kernels.composed_attention import tuning as composed_tuning
from attnzoo_kernels.decode import tuning as decode_tuning
from attnzoo_kernels.head_routing import tuning as routing_tuning
from attnzoo_kernels.launch import find_plan, keep_plan
from attnzoo_kernels.linear_attention import tuning as linear_tuning
from attnzoo_kernels.qk_norm_rope import tuning as norm_tuning
from attnzoo_kernels.softmax_attention import softmax_attention
from attnzoo_kernels.softmax_attention import tuning as softmax_tuning
from tests.kernels.tiles import tile

CPU = torch.device("cpu")
# Multiprocessors, bytes of shared memory for a program, threads of a warp.
DEVICES = {
    "hopper": (132, 227 * 1024, 32),
    "ampere": (108, 163 * 1024, 32),
    "ada": (128, 99 * 1024, 32),
    "amd": (304, 64 * 1024, 64),
}


@pytest.mark.parametrize(
    ("device", "architecture"), [("hopper", "hopper"), ("ampere", "cuda"), ("ada", "cuda"), ("amd", "hip")]
)
def test_the_architecture_follows_from_what_a_program_may_take(
    monkeypatch: pytest.MonkeyPatch, device: str, architecture: str
) -> None:
    monkeypatch.setattr(tuning, "device_limits", lambda _: DEVICES[device])
    assert tuning.architecture(CPU) == architecture


# Tables of kernels whose size is a head's width, and the widths that they serve.
OF_WIDTH = {
    "softmax": (softmax_tuning.TABLE, (16, 32, 64, 128, 160, 256, 320, 512)),
    "routed": (routing_tuning.TABLE, (16, 64, 128, 256)),
    "experts": (expert_projection.TABLE, (0,)),
    "vectors": (norm_tuning.VECTORS, (16, 128, 256)),
    "matrices": (norm_tuning.MATRICES, (16, 128, 256)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kernel_has_a_line_for_every_device_and_width(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tuning, "device_limits", lambda _: DEVICES[device])
    for table, widths in OF_WIDTH.values():
        for kernel in table.lines:
            for width in widths:
                assert set(table.config(kernel, dtype, CPU, width).tiles) == set(table.tiles)
    for kernel in ("linear_attention_state", "linear_attention_tile"):
        assert linear_tuning.of_tokens(kernel, dtype, CPU, 64, 64, 64)["BLOCK_T"] >= 16
    for kernel in linear_tuning.BLOCKS.lines:
        assert linear_tuning.of_blocks(kernel, dtype, CPU, 64, 64)["BLOCK_I"] >= 16
    most, largest = composed_tuning.capacity(dtype, CPU)
    for kernel in composed_tuning.TABLE.lines:
        for heads in (1, 4, 8, 16, 32):
            width = largest // heads
            if heads <= most and width >= 16:
                size = composed_tuning.sizes(heads, width)
                assert composed_tuning.TABLE.config(kernel, dtype, CPU, *size)["BLOCK_S"] >= 16


def test_a_wider_head_never_gets_a_line_that_is_meant_for_a_narrower_one() -> None:
    tables = [*(table for table, _ in OF_WIDTH.values()), composed_tuning.TABLE]
    for lines in (lines for table in tables for kernel in table.lines.values() for lines in kernel.values()):
        assert list(lines) == sorted(lines)


def test_the_first_line_as_large_as_the_head_serves_and_the_last_one_beyond() -> None:
    table = tuning.Table(("BLOCK_T",), {"k": {("any", 2): {64: (32, 4, 2), 128: (16, 8, 1)}}})
    chosen = [table.config("k", torch.float16, CPU, width)["BLOCK_T"] for width in (16, 64, 65, 128, 512)]
    assert chosen == [32, 32, 16, 16, 16]


def test_a_pinned_configuration_replaces_the_tiles_that_a_kernel_has() -> None:
    table = tuning.Table(("BLOCK_T", "BLOCK_S"), {"k": {("cuda", 2): {64: (32, 64, 4, 2)}}})
    with tuning.pinned(tuning.Config({"BLOCK_S": 16, "BLOCK_K": 8}, num_warps=1, num_stages=3)):
        config = table.config("k", torch.float16, CPU, 64)
    assert config == tuning.Config({"BLOCK_T": 32, "BLOCK_S": 16}, num_warps=1, num_stages=3)
    assert table.config("k", torch.float16, CPU, 64) == tuning.Config({"BLOCK_T": 32, "BLOCK_S": 64}, 4, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter's launches")
def test_a_pinned_configuration_reaches_a_backward_pass_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where autograd's own thread of the device runs backward passes."""
    launched: dict[str, int] = {}
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launched[self.__name__] = given.get("BLOCK_T", 0)
        run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    q, k, v = (torch.randn(1, 20, 1, 4, requires_grad=True) for _ in range(3))
    table = softmax_attention(q, k, v, scale=0.5)[0].sum()
    with tuning.pinned(tile(32, 16)), tuning.pinned(tile(64, 16)), ThreadPoolExecutor(1) as pool:
        pool.submit(table.backward).result()
    assert launched["softmax_attention_fwd_kernel"] != 64
    assert launched["softmax_attention_bwd_dq_kernel"] == launched["softmax_attention_bwd_dkdv_kernel"] == 64
    config = softmax_tuning.TABLE.config("softmax_attention_fwd", torch.float32, CPU, 16)
    assert launched["softmax_attention_fwd_kernel"] == config["BLOCK_T"]


def test_what_was_pinned_before_holds_again_after_an_error() -> None:
    outer, inner = tile(32, 16), tile(64, 16)
    with tuning.pinned(outer):
        with pytest.raises(RuntimeError), tuning.pinned(inner):
            raise RuntimeError
        assert tuning.or_pinned(inner) == outer
    assert tuning.or_pinned(inner) == inner


def test_a_configuration_pinned_for_a_kernel_reaches_its_variants_and_no_other_kernel() -> None:
    lines: tuning.Lines = {name: {("any", 2): {64: (32, 4, 2)}} for name in ("k", "k dense", "k_two", "other")}
    table = tuning.Table(("BLOCK_T",), lines)
    with tuning.pinned(tuning.Config({"BLOCK_T": 16}, num_warps=1, num_stages=3), "k"):
        tiles = {name: table.config(name, torch.float16, CPU, 64)["BLOCK_T"] for name in lines}
        assert tuning.or_pinned(tile(64, 16)) == tile(64, 16)
    assert tiles == {"k": 16, "k dense": 16, "k_two": 32, "other": 32}


@pytest.mark.parametrize("kernel", [None, "softmax_attention_bwd_dq"])
def test_no_plan_is_used_or_kept_while_anything_is_pinned(kernel: str | None) -> None:
    plans = {("kept",): 1}
    with tuning.pinned(tile(16, 16), kernel):
        assert find_plan(plans, ("kept",)) is None
        assert keep_plan(plans, ("new",), 2) == 2
    assert plans == {("kept",): 1}
    assert find_plan(plans, ("kept",)) == 1


def test_every_decoding_kernel_can_be_pinned_by_its_name() -> None:
    wanted = tile(16, 32)
    for kernel in ("decode_attention_fwd", "decode_factors_fwd"):
        free, _ = decode_tuning.config_and_slots(kernel, 4, (64, 64, 0), 4, CPU)
        assert free != wanted
        with tuning.pinned(wanted, "decode_attention_fwd"):
            config, _ = decode_tuning.config_and_slots(kernel, 4, (64, 64, 0), 4, CPU)
        assert config == (wanted if kernel == "decode_attention_fwd" else free)


def test_composed_attention_has_less_capacity_where_there_is_less_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = []
    for device in ("hopper", "ampere", "ada"):
        monkeypatch.setattr(tuning, "device_limits", lambda _, device=device: DEVICES[device])
        result.append(composed_tuning.capacity(torch.bfloat16, CPU))
    assert result == [(32, 1024), (16, 512), (8, 256)]
