"""Weights that a run starts from: those of another run, or of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo_recipes.checkpointing import SUFFIX, read_checkpoint
from attnzoo_recipes.data.tokenizers import Tokenizer
from attnzoo_recipes.model_config import check_state, differences_of_models, saved_settings
from attnzoo_recipes.sharding import laid_like

_TENSORS = ".safetensors"
_PREFIX = "model."


def start_from(model: nn.Module, config: Mapping[str, Any], tokenizer: Tokenizer | None, path: str | Path) -> list[str]:
    """Load weights into a decoder; nothing that a file names is imported.

    Args:
        model: the decoder.
        config: its configuration (`Pretraining.model_config`), to be compared with a checkpoint's.
        tokenizer: of the run's data; a checkpoint's has to be the same.
        path: a .ckpt file of attnzoo-pretrain or the folder of a run (its newest valid checkpoint), or a safetensors
            file, or a folder of them, whose tensors have the names of a decoder's state dict, with or without "model."
            before them.

    Returns:
        Sentences to warn with: in which settings the weights' own model differs from this one.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: in one sentence, if what is there cannot be read, has not exactly the decoder's weights, or belongs
            to another tokenizer.
    """
    path = Path(path)
    where = f"model.init_from {path}"
    if not path.exists():
        raise FileNotFoundError(f"model.init_from must be a file or folder, got {str(path)!r}, which does not exist")
    warned: list[str] = []
    tensors = [path] if path.suffix == _TENSORS else sorted(path.glob(f"*{_TENSORS}")) if path.is_dir() else []
    if tensors:
        state = _read_tensors(tensors, where)
    elif path.is_dir() or path.suffix == SUFFIX:
        checkpoint = read_checkpoint(path)
        saved = saved_settings(checkpoint, where)
        state = dict(checkpoint["state_dict"])
        if tokenizer is not None and saved.get("tokenizer", tokenizer.to_dict()) != tokenizer.to_dict():
            raise ValueError(
                f"{where} has another tokenizer than the data settings give: its run's own is in its data.cache_dir, "
                "and data.tokenizer takes it"
            )
        differences = differences_of_models(saved["model"], config)
        if differences:
            warned.append(f"The model of {where} differs from the configured one in {', '.join(differences)}.")
    else:
        raise ValueError(
            f"model.init_from must be a run folder, a {SUFFIX} or {_TENSORS} file, or a folder of the latter, "
            f"got {str(path)!r}"
        )
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    known = model.state_dict()
    if "head.weight" in state and "head.weight" not in known:
        # Some writers repeat tied weights.
        if not torch.equal(state["head.weight"], state.get("embedding.weight", torch.empty(0))):
            raise ValueError(f"{where} has output weights of its own, but model.tie_embeddings is true")
        del state["head.weight"]
    if not state.keys() & known.keys():
        raise ValueError(
            f"{where} must hold weights with the names of the recipe's decoder, such as {min(known)}, got "
            f"{min(state, default='none')}"
        )
    check_state(model, state, where)
    model.load_state_dict({name: laid_like(known[name], value) for name, value in state.items()})
    return warned


def _read_tensors(paths: list[Path], where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            state |= load_file(path)
        except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} cannot be read as safetensors: {error}") from error
    return state
