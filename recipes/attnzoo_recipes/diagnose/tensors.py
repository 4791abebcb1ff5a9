"""Tensors as a model's input, by the names of its arguments: images, sound, pairs of an encoder and a decoder."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.batches import positions_of, tokens_and_mask

SUFFIXES = (".safetensors", ".npz", ".pt")
"""Of files that hold tensors; anything else is text."""


def read_tensors(name: str, path: Path, model: nn.Module, count: int | None) -> dict[str, Tensor]:
    """The first examples of a file of tensors: inputs of the model by the names of its arguments, and "labels".

    No code from the file is run: arrays of objects are refused, and .pt files are read as weights only.

    Args:
        name: what messages call the file.
        path: of a .safetensors, .npz or .pt file, whose tensors all have the examples as their first dimension.
        model: takes them as model(**tensors).
        count: number of examples, which the file must hold. Default: all.

    Raises:
        ValueError: for a file that cannot be read, or tensors that the model does not take.
    """
    if not path.is_file():
        raise ValueError(f"{name} must be a file, got {str(path)!r}, which is none")
    try:
        found = _read(path)
    except Exception as error:  # what safetensors, numpy and torch raise is not documented
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} must hold tensors alone, got {str(path)!r}: {line}") from error
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{name} must hold tensors by their names, got {type(found).__name__} in {str(path)!r}")
    known = list(inspect.signature(model.forward).parameters)
    inputs = [key for key in found if key in known and key != "labels"]
    unknown = [key for key in found if key not in (*known, "labels")]
    if unknown or not inputs:
        raise ValueError(
            f"{name} must hold inputs of {type(model).__name__} ({', '.join(known)}), got {', '.join(found)}"
        )
    sizes = {key: len(x) if x.ndim else 0 for key, x in found.items()}
    if len(set(sizes.values())) > 1 or not min(sizes.values()):
        raise ValueError(f"{name} must hold equally many examples in each tensor, at least one, got {sizes}")
    held = next(iter(sizes.values()))
    if count is not None and not 1 <= count <= held:
        raise ValueError(f"examples must lie between 1 and the {held} that {name} holds, got {count}")
    return {key: (x.float() if x.is_floating_point() else x)[:count] for key, x in found.items()}


def batches_of(tensors: Mapping[str, Tensor], batch_size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Consecutive examples together, as mappings."""
    parts = zip(*(torch.split(x.to(device), batch_size) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with: labels only if it may derive its decoder's tokens from them.

    Where padding comes first, a model that takes "position_ids" gets those of the real tokens, as in `head_report`.
    """
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels" or decodes}
    return {**positions_of(model, "position_ids", tokens_and_mask(batch)[1]), **inputs}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    import numpy

    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz file")
    with numpy.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
