"""Which line of the tables a device gets."""

from __future__ import annotations

import pytest
import torch

from attnzoo_kernels import composed_tuning, routing_tuning, tuning

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kernel_has_a_line_for_every_device_and_width(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tuning, "device_limits", lambda _: DEVICES[device])
    for kernel in tuning.TABLE:
        for width in (16, 32, 64, 128, 160, 256, 320, 512):
            assert tuning.config(kernel, width, dtype, CPU).BLOCK_S >= 16
    for kernel in routing_tuning.TABLE:
        for width in (16, 64, 128, 256):
            width = 0 if kernel.startswith("expert") else width
            assert routing_tuning.config(kernel, dtype, CPU, width).BLOCK_S >= 16
    most, largest = composed_tuning.room(dtype, CPU)
    for kernel in composed_tuning.TABLE:
        for heads in (1, 4, 8, 16, 32):
            width = largest // heads
            if heads <= most and width >= 16:
                assert composed_tuning.config(kernel, heads, width, dtype, CPU).BLOCK_S >= 16


def test_a_wider_head_never_gets_a_line_that_is_meant_for_a_narrower_one() -> None:
    for lines in (lines for kernel in tuning.TABLE.values() for lines in kernel.values()):
        assert list(lines) == sorted(lines)


def test_composed_attention_has_less_room_where_there_is_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for device in ("hopper", "ampere", "ada"):
        monkeypatch.setattr(tuning, "device_limits", lambda _, device=device: DEVICES[device])
        found.append(composed_tuning.room(torch.bfloat16, CPU))
    assert found == [(32, 1024), (16, 512), (8, 256)]
