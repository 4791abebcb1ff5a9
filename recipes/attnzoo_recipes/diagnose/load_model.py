"""A trained model from its path: a run, a checkpoint, safetensors, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.rules import SIZE, check
from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.checkpointing import SUFFIX, newest_valid, read_checkpoint
from attnzoo_recipes.data.tokenizers import Tokenizer
from attnzoo_recipes.model_config import model_from_checkpoint, tokenizer_from_checkpoint
from attnzoo_recipes.options import quiet_transformers

_TENSORS = ".safetensors"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_COMPUTED = ("inv_freq", "masked_bias", "position_ids")  # buffers that transformers once saved


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and what is known about it.

    Attributes:
        model: the module.
        name: for titles.
        kind: "attnzoo" (a run or checkpoint), "huggingface", or "weights" (safetensors without a configuration).
        path: the file or folder that was read.
        tokenizer: of an attnzoo checkpoint, or None.
    """

    model: nn.Module
    name: str
    kind: str
    path: Path
    tokenizer: Tokenizer | None = None


def load_model(
    path: str | Path,
    *,
    name: str | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    allowed: Iterable[str] = ALLOWED,
    device: torch.device | str = "cpu",
    whole: bool = False,
) -> LoadedModel:
    """Read a model; nothing is downloaded and no code from the files is run.

    Args:
        path: a .ckpt file of attnzoo-pretrain or the folder of a run (its newest valid checkpoint); a local Hugging
            Face folder (config.json and safetensors); a .safetensors file, or a folder of them. A safetensors file
            next to a config.json is read as that Hugging Face model. Without a config.json, only its attention layers
            are read: those with weights q_proj, k_proj, v_proj and o_proj, and without norms of queries and keys.
        name: for titles. Default: that of the file or folder.
        num_heads: query heads per layer, for safetensors without config.json alone.
        num_kv_heads: key/value heads per layer, for safetensors without config.json alone. Default: from the number of
            rows of the keys' weight.
        allowed: packages that a checkpoint may name.
        device: where the model is moved.
        whole: keep what a Hugging Face model that is not a causal language model has on top, such as a classifier.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: in one sentence, if what is there cannot be read as any of these.
    """
    path = Path(path)
    sizes = {
        name: given for name, given in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)) if given is not None
    }
    for size, given in sizes.items():
        check(size, given, SIZE)
    if not path.exists():
        raise FileNotFoundError(f"MODEL must be a file or folder, got {str(path)!r}, which does not exist")
    if path.is_file() and path.suffix == _TENSORS:
        configured = (path.parent / "config.json").is_file()
        loaded = _hugging_face(path.parent, whole) if configured else _weights([path], path, num_heads, num_kv_heads)
    elif path.is_dir() and (path / "config.json").is_file():
        loaded = _hugging_face(path, whole)
    elif path.is_dir() and (files := sorted(file for file in path.glob(f"*{_TENSORS}") if file.is_file())):
        loaded = _weights(files, path, num_heads, num_kv_heads)
    elif path.is_dir() or path.suffix == SUFFIX:
        loaded = _checkpoint(path, allowed)
    else:
        raise ValueError(
            f"MODEL must be a run folder, a {SUFFIX} or {_TENSORS} file or a Hugging Face folder, got {str(path)!r}"
        )
    for size, given in sizes.items() if loaded.kind != "weights" else ():
        raise ValueError(f"{size} must be left out for {str(path)!r}, which says how many heads it has, got {given}")
    loaded.model.to(device).eval()
    return dataclasses.replace(loaded, name=name or loaded.name)


def _checkpoint(path: Path, allowed: Iterable[str]) -> LoadedModel:
    file = path
    if path.is_dir():
        newest = newest_valid(path)
        if newest is None:
            raise ValueError(
                f"there is neither a valid checkpoint, nor config.json, nor a {_TENSORS} file in {str(path)!r}"
            )
        file = newest
    checkpoint = read_checkpoint(file)
    where = f"checkpoint {file}"
    model = model_from_checkpoint(checkpoint, allowed, where)
    tokenizer = tokenizer_from_checkpoint(checkpoint, where)
    return LoadedModel(model, f"{path.stem or path.name}", "attnzoo", file, tokenizer)


def _hugging_face(folder: Path, whole: bool) -> LoadedModel:
    try:
        import transformers
    except ImportError:
        raise ValueError("a Hugging Face folder needs the package transformers: pip install attnzoo[hf]") from None
    _refuse_kernels(folder)
    if _json(folder / "config.json").get("model_type") == "attnzoo":
        import attnzoo.hugging_face  # noqa: F401  # it makes the model type known to transformers
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture = (config.architectures or [""])[0]
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        cls: Any = getattr(transformers, architecture, None) if architecture else None
        if not isinstance(cls, type) or getattr(cls, "config_class", None) is not type(config):
            cls = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        # Only safetensors: other formats can contain code.
        with quiet_transformers():
            model, found = cls.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # what transformers raises for files that it cannot read is not documented
        reason = own_code(folder, "config.json") or error
        raise ValueError(f"the Hugging Face model in {str(folder)!r} cannot be loaded: {reason}") from error
    _check_weights(folder, model, found, causal)
    own = own_code(folder, "config.json")
    if own is not None:
        sys.stderr.write(f"{own}; transformers' {type(model).__name__} is used\n")
    return LoadedModel(model if causal or whole else model.base_model, folder.resolve().name, "huggingface", folder)


def own_code(folder: Path, name: str) -> str | None:
    """A sentence about the code that a Hugging Face folder brings, if that file asks for any; it is never run."""
    if not _json(folder / name).get("auto_map"):
        return None
    return f"{str(folder / name)!r} asks for code of its own (auto_map), which attnzoo never runs"


def _check_weights(folder: Path, model: nn.Module, found: Mapping[str, Any], causal: bool) -> None:
    """Raise if the weights were not exactly those of the model; tied ones count as there."""
    problems = {
        # Nothing reads the pooler of an encoder, and many are saved without.
        "are missing": [name for name in found["missing_keys"] if causal or ".pooler." not in f".{name}"],
        "belong nowhere": [name for name in found["unexpected_keys"] if name.rsplit(".", 1)[-1] not in _COMPUTED],
        "have another shape": [str(key) for key in found["mismatched_keys"]],
    }
    for what, names in problems.items():
        if names:
            raise ValueError(
                f"the weights in {str(folder)!r} do not fit the {type(model).__name__} that its config.json describes: "
                f"{len(names)} {what}, such as {min(names)}"
            )


def _refuse_kernels(folder: Path) -> None:
    """Raise if the config asks for an attention function that transformers would download and run."""
    asked = [str(value) for key, value in _json(folder / "config.json").items() if key.endswith("_implementation")]
    if any("/" in value for value in asked):
        raise ValueError(
            f"config.json in {str(folder)!r} asks for kernels of others ({', '.join(asked)}), which attnzoo never runs"
        )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if the file is not there or holds nothing of the kind."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _weights(files: list[Path], path: Path, num_heads: int | None, num_kv_heads: int | None) -> LoadedModel:
    """The attention layers of a state dict, as grouped-query attention of the zoo."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                wanted = [name for name in opened.keys() if _layer_of(name) is not None]  # noqa: SIM118
                tensors.update({name: opened.get_tensor(name) for name in wanted})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is no safetensors file: {error}") from error
    layers = list(dict.fromkeys(str(_layer_of(name)) for name in tensors))
    whole = [prefix for prefix in layers if all(f"{prefix}{p}.weight" in tensors for p in _PROJECTIONS)]
    if not whole:
        raise ValueError(
            f"{str(path)!r} must hold attention weights named q_proj, k_proj, v_proj and o_proj, or be next to a "
            f"config.json, got neither"
        )
    if num_heads is None:
        raise ValueError(
            f"{str(path)!r} does not say how many heads its layers have: give --num-heads, or put its config.json "
            f"next to it"
        )
    modules = {prefix: _attention(prefix, tensors, num_heads, num_kv_heads) for prefix in whole}
    return LoadedModel(_tree(modules), path.stem, "weights", path)


def _layer_of(name: str) -> str | None:
    """The prefix of a projection's weight, including the dot, or None."""
    for projection in _PROJECTIONS:
        if name.endswith(f"{projection}.weight"):
            return name.removesuffix(f"{projection}.weight")
    return None


def _attention(prefix: str, tensors: dict[str, Tensor], num_heads: int, num_kv_heads: int | None) -> nn.Module:
    query, key, value, out = (tensors[f"{prefix}{p}.weight"].float() for p in _PROJECTIONS)
    width, rest = divmod(query.shape[0], num_heads)
    groups = key.shape[0] // max(width, 1) if num_kv_heads is None else num_kv_heads
    v_width = value.shape[0] // max(groups, 1)
    fits = rest == 0 and groups > 0 and key.shape[0] == groups * width and value.shape[0] == groups * v_width
    if not fits or num_heads % groups or out.shape[1] != num_heads * v_width:
        raise ValueError(
            f"num_heads must fit the weights of {prefix.rstrip('.')}, which have {query.shape[0]} query, "
            f"{key.shape[0]} key and {value.shape[0]} value rows, got {num_heads} query and {groups} key/value heads"
        )
    module = attnzoo.GroupedQueryAttention(
        query.shape[1], num_heads, groups, head_dim=width, v_head_dim=v_width, bias=False
    )
    with torch.no_grad():
        for name, weight in zip(_PROJECTIONS, (query, key, value, out), strict=True):
            target: Any = getattr(module, name).weight
            if target.shape != weight.shape:
                raise ValueError(
                    f"{prefix}{name}.weight must have shape {tuple(target.shape)}, got {tuple(weight.shape)}"
                )
            target.copy_(weight)
    return module


def _tree(modules: dict[str, nn.Module]) -> nn.Module:
    """A module with these modules at their dotted names."""
    root = nn.Module()
    for prefix, module in modules.items():
        *parents, last = prefix.rstrip(".").split(".") if prefix.rstrip(".") else ["attention"]
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, module)
    return root


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """What a report says about a model, as plain types."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {
        "model": str(loaded.path),
        "kind": loaded.kind,
        "class": type(loaded.model).__name__,
        "parameters": parameters,
    }
