"""Whether a Hugging Face model computes with heads removed what it computes with them masked: tried, not assumed.

A copy of each attention module is pruned before anything changes, and the whole model is run before and after, also
over a cache; where it differs or raises, it is restored.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnzoo.diagnostics.configs import RAGGED, configs_in, is_config, own_configs
from attnzoo.diagnostics.layer_probe import calls_of, line_of
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.diagnostics.projections import blank
from attnzoo.diagnostics.pruning.hugging_face import projections_of, prune_module


def rehearse(layer: AttentionLayer, numbers: list[int], allow_inexact: bool) -> None:
    """Prune a copy of the module, in float64 with other gains and biases, and compare it with its masked heads.

    Raises:
        ValueError: if the pruned copy computes something else, or nothing.
    """
    if next(layer.module.parameters()).is_meta:
        return
    # Configurations are read alone.
    stage = nn.ModuleDict({"attention": copy.deepcopy(layer.module, configs_in(layer.module))}).double().eval()
    draw = torch.Generator().manual_seed(0)
    for module in stage.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        for name, part in list(vars(module).items()):
            if is_config(part) and part._attn_implementation_internal != RAGGED:
                setattr(module, name, eager := copy.copy(part))
                eager._attn_implementation_internal = "eager"
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim != 2 or min(parameter.shape) <= layer.num_heads:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter))
    (copied,) = attention_layers(stage)
    _, query, *_ = projections_of(copied)
    x = torch.randn(1, 5, blank(query).shape[1], generator=draw, dtype=torch.float64).to(query.weight.device)
    what, masked = "", None
    for call in calls_of(copied.module, x, layer.head_dim, layer.num_heads):
        with _masked(copied, numbers), torch.no_grad():
            try:
                masked = _first_tensor(copied.module(**call))
                break
            except Exception as error:
                what = what or f"{type(error).__name__} on hidden states alone: {line_of(error)}"
    if masked is not None:
        try:
            prune_module(stage, copied, numbers)
            with torch.no_grad():
                found = _first_tensor(stage["attention"](**call))
            what = "" if allow_inexact else _difference(found, masked)
        except Exception as error:
            what = f"{type(error).__name__} when it is pruned: {line_of(error)}"
    if what:
        raise ValueError(f"prune_heads cannot prune {type(layer.module).__name__} of layer {layer.name!r}: {what}")


def _masked(layer: AttentionLayer, numbers: Sequence[int]) -> RemovableHandle:
    """A hook, and a context, in which these heads of a layer are 0."""
    mask = torch.tensor([float(head not in numbers) for head in layer.heads.kept])
    return layer.hook_heads(lambda heads: heads * mask.to(heads)[:, None])


def _first_tensor(output: Any) -> Tensor:
    """The output, or the first floating-point tensor of a structure of them."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if hasattr(output, "values") else output
    tensor: Tensor = next(part for part in parts if isinstance(part, Tensor) and part.is_floating_point())
    return tensor


def _difference(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """How outputs of pruned and of masked heads differ, or nothing; transformers' softmax is one of float32."""
    if found.shape != expected.shape:
        return f"its output is {tuple(found.shape)} in place of {tuple(expected.shape)}"
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    if error <= max(1e-5, 20 * torch.finfo(dtype).eps) * size or (math.isnan(error) and bool(expected.isnan().any())):
        return ""
    return f"pruned, it differs from its masked heads by {error:.1e}, with outputs up to {size:.1e}"


class Trial:
    """The transformers models that hold these layers, run with heads masked; `check` runs them again after pruning.

    Args:
        model: the whole model.
        layers: those that are to be pruned.
        gone: the original numbers of the heads of each that are to go.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], gone: Sequence[Sequence[int]]) -> None:
        self._restore = _restorer(model, layers)
        self.hosts = _hosts(model, layers)
        with contextlib.ExitStack() as stack:
            for layer, numbers in zip(layers, gone, strict=True):
                if numbers:
                    stack.enter_context(_masked(layer, numbers))
            self.outputs = [_outputs_of(host) for host in self.hosts]

    def check(self, compare: bool) -> None:
        """Raise ValueError where the pruned model raises, or computes something else."""
        for host, before in zip(self.hosts, self.outputs, strict=True):
            for way, expected in before.items():
                try:
                    found = _CALLS[way](host)
                    what = _difference(found, expected, found.dtype) if compare else ""
                except Exception as error:
                    what = f"{type(error).__name__} when it is pruned: {line_of(error)}"
                if what:
                    raise ValueError(f"prune_heads cannot prune {type(host).__name__} ({way}): {what}")

    def undo(self) -> None:
        """Make the model what it was, parameters and attributes the same objects."""
        self._restore()

    def record(self) -> None:
        """Note in each model's configuration, from now on its own, which heads are gone, for `load_pruned`."""
        for host in self.hosts:
            gone = {layer.index: layer.heads.pruned for layer in attention_layers(host) if layer.heads.pruned}
            own_configs(host.modules())
            host.config.attnzoo_pruned_heads = {str(index): list(heads) for index, heads in gone.items()}


def _hosts(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[Any]:
    """The outermost transformers models inside a model that hold any of these layers."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    hosts: list[Any] = []
    for module in model.modules():
        inside = any(module is other for host in hosts for other in host.modules())
        if isinstance(module, PreTrainedModel) and not inside:
            parts = set(module.modules())
            if any(layer.module in parts for layer in layers):
                hosts.append(module)
    return hosts


def _restorer(model: nn.Module, layers: Sequence[AttentionLayer]) -> Callable[[], None]:
    """A function that gives these layers, and what holds them, back the parameters, modules and attributes of now."""
    homes = [model.get_submodule(layer.name.rpartition(".")[0]) for layer in layers if layer.name]
    modules = [*homes, *(module for layer in layers for module in layer.module.modules())]
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in tables}) for m in modules]

    def restore() -> None:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)

    return restore


def _inputs(host: Any) -> dict[str, Tensor]:
    """A few different tokens, an image or sound, whichever a model takes first, and tokens of its decoder."""
    config, name = host.config, host.main_input_name
    inputs = {} if name == "input_ids" else {name: _signal(config, name).to(host.device, host.dtype)}
    if name == "input_ids" or config.is_encoder_decoder:
        vocabulary = config.get_text_config().vocab_size
        ids = torch.arange(3, 10, device=host.device)[None] * 7919 % max(vocabulary - 3, 1) + min(3, vocabulary - 1)
        inputs |= {"input_ids": ids} if name == "input_ids" else {}
        inputs |= {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return inputs


def _signal(config: Any, name: str) -> Tensor:
    if name == "pixel_values":
        size = config.image_size
        shape = (1, getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))
    elif name == "input_features":
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        shape = (1, 4000)
    return torch.linspace(0, 99, math.prod(shape)).sin().view(shape)


def _at_once(host: Any) -> Tensor:
    with torch.no_grad():
        return _first_tensor(host(**_inputs(host)))


def _with_cache(host: Any) -> Tensor:
    """Outputs of the last tokens over a cache of the first ones."""
    name, tokens = list(_inputs(host).items())[-1]
    others = {key: value for key, value in _inputs(host).items() if key != name}
    with torch.no_grad():
        first = host(**others, **{name: tokens[:, :4]}, use_cache=True)
        parts = [first]
        for at in (slice(4, 6), slice(6, 7)):
            parts.append(host(**others, **{name: tokens[:, at]}, past_key_values=first.past_key_values, use_cache=True))
    return torch.cat([_first_tensor(part) for part in parts], 1)


_CALLS: dict[str, Callable[[Any], Tensor]] = {"on a few tokens": _at_once, "over a cache": _with_cache}


def _outputs_of(host: Any) -> dict[str, Tensor]:
    """What the model gives for each call that it can be given without knowing more of it."""
    outputs = {}
    for way, call in _CALLS.items():
        with contextlib.suppress(Exception):
            outputs[way] = call(host)
    return outputs
