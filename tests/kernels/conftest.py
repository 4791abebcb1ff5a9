"""Kernel tests run on memory that starts as NaN."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN (integers their largest value), so nothing unwritten can look right."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta" or not isinstance(tensor, torch.Tensor):
                return tensor
            if tensor.dtype == torch.bool:
                return tensor
            value = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            # A leaf that requires a gradient, as checkpoints of torch 2.11 make one, takes no other change in place.
            with torch.no_grad():
                return tensor.fill_(value)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
