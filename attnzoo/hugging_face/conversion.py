"""Whole models from one mechanism to another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attnzoo.conversion import (
    InputStatistics,
    LatentReport,
    allocate_ranks,
    latent_energies,
    mha2mla,
    to_dcmha,
    to_gated,
    to_gqa,
    to_kha,
    to_moh,
    to_talking_heads,
)
from attnzoo.conversion.heads import CALIBRATED
from attnzoo.hugging_face.calibration import Batch, calibrate, known_ids, mean_loss
from attnzoo.hugging_face.layer import AttentionLayer
from attnzoo.hugging_face.replacement import attention_names, put_in, read_layers
from attnzoo.hugging_face.report import LayerReport, ModelReport
from attnzoo.modules.dcmha import DynamicallyComposableAttention
from attnzoo.modules.protocol import is_mechanism
from attnzoo.modules.talking_heads import TalkingHeadsAttention
from attnzoo.rules import POSITIVE, check, describe, is_integer, one_of

Built = dict[str, tuple[nn.Module, LatentReport | None]]
LayerConversion = Callable[[Any, int, InputStatistics | None], Any]
"""(attn, index of the layer, statistics of its inputs or None) -> attn, or (attn, a LatentReport)."""


def _keywords(function: Callable[..., Any]) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]


MECHANISMS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "gqa": (to_gqa, ["num_kv_heads", "mode"]),
    "mla": (mha2mla, [*_keywords(mha2mla), "rank_allocation"]),
    "kha": (to_kha, ["variant", "knock_q", "knock_k", "knock_v", "knock_scope"]),
    "moh": (to_moh, ["num_shared_heads", "num_routed_active", "ste"]),
    "dcmha": (to_dcmha, _keywords(DynamicallyComposableAttention)),
    "gated": (to_gated, ["gate", "gate_type", "gate_bias"]),
    "talking_heads": (to_talking_heads, _keywords(TalkingHeadsAttention)),
}
"""The conversion of a layer to each mechanism, and the options that `convert` takes for it."""

KEY_WEIGHTS = (1.0, 2.0, 4.0)
"""Candidates of key_weight="search"."""
SEARCH_TOKENS = 8192
"""Calibration tokens on which a search takes the model's loss: the batches that begin before so many."""


def convert(
    model: Any,
    mechanism: str | LayerConversion,
    *,
    layers: Sequence[int] | None = None,
    calib: Iterable[Any] | None = None,
    verify: bool | Mapping[str, Any] = True,
    **options: Any,
) -> ModelReport:
    """Convert the attention of a model of transformers in place, with calibration where the mechanism takes it.

    Layers that are transformers' own are read as by `replace` first. All new layers are built before the first of them
    is put in; after an error the model is what it was.

    Args:
        model: a model of transformers.
        mechanism: "gqa", "mla", "kha", "moh", "dcmha", "gated" or "talking_heads", for `to_gqa`, `mha2mla`, `to_kha`,
            `to_moh`, `to_dcmha`, `to_gated` and `to_talking_heads` of `attnzoo.conversion`; or a function (attn, index,
            calib or None) -> attn, where attn is the layer's attnzoo module and calib the `InputStatistics` of its
            inputs.
        layers: indices of attention layers. Default: all.
        calib: batches, read once: token ids (B, T), mappings of the model's arguments, or pairs (token ids, mask).
            What is kept of the inputs of each layer does not grow with their number.
        verify: as in `replace`.
        options: of the layer conversion. Beside them, for "mla": `rank_allocation="adaptive"` shares kv_rank times the
            number of layers among them by their spectra (`allocate_ranks`), in place of "uniform"; and
            `key_weight="search"`, or a list of candidates, takes the one with the least loss of the model on the first
            calibration batches.

    Returns:
        What became of the layers.

    Raises:
        ValueError: for an unknown mechanism or option, or a layer that it cannot be made of, naming the layer.
    """
    _check_options(mechanism, options, calib is not None)
    if calib is not None and (not isinstance(calib, Iterable) or isinstance(calib, str | Mapping)):
        raise ValueError(f"calib must be an iterable of batches, or None, got {describe(calib)}")
    every, names = attention_names(model), attention_names(model, layers)
    plan = _Layers(model, read_layers(model, names, verify=verify), [every.index(name) for name in names])
    if calib is not None:
        searches = not isinstance(options.get("key_weight", 1), int | float)
        plan.statistics, plan.batches = calibrate(
            model, plan.attns, known_ids(model, calib), pair_norms=callable(mechanism) or mechanism == "mla",
            kept_tokens=SEARCH_TOKENS if searches else 0,
        )  # fmt: skip
    chosen: dict[str, Any] = {}
    if callable(mechanism):
        built = plan.each(lambda attn, index, calib: _module_and_report(mechanism(attn, index, calib), attn))
    elif mechanism == "mla":
        built, chosen = _latent_layers(plan, **options)
    else:
        function, _ = MECHANISMS[mechanism]
        if mechanism == "gqa" and calib is not None:
            options = {"mode": "activations", **options}
        takes_calib = "calib" in inspect.signature(function).parameters
        built = plan.each(
            lambda attn, _, calib: (function(attn, **options, **({"calib": calib} if takes_calib else {})), None)
        )
    reports = [
        LayerReport.of(index, name, attn, *built[name])
        for index, (name, attn) in zip(plan.indices, plan.attns.items(), strict=True)
    ]
    put_in(model, {name: attn for name, (attn, _) in built.items()})
    return ModelReport("custom" if callable(mechanism) else mechanism, tuple(reports), chosen)


def _check_options(mechanism: str | LayerConversion, options: Mapping[str, Any], calibrated: bool) -> None:
    """Refuse unknown mechanisms and options before anything is read or run."""
    if isinstance(mechanism, type):
        raise ValueError(
            f"mechanism must be a name or a function (attn, index, calib) -> attn, got the class {mechanism.__name__}"
        )
    if callable(mechanism):
        if options:
            raise ValueError(f"options must not be given with a function, got {', '.join(options)}")
        return
    check("mechanism", mechanism, one_of(*MECHANISMS, words=f"be a function or one of {', '.join(MECHANISMS)}"))
    known = [name for name in MECHANISMS[mechanism][1] if name not in ("calib", "device", "dtype")]
    for option in options:
        if option not in known:
            raise ValueError(f"{mechanism!r} has no option {option!r}, only {', '.join(known)}")
    signature = inspect.signature(MECHANISMS[mechanism][0])
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in options:
            raise ValueError(f"{mechanism!r} needs the option {name!r}, got {', '.join(options) or 'none'}")
    if not calibrated and (options.get("mode") in CALIBRATED or options.get("weighting", "weights") != "weights"):
        raise ValueError("calib must be given to weigh by activations, got None")


@dataclass
class _Layers:
    """The layers to be converted: modules of attnzoo by name, their indices, and what calibration kept."""

    model: Any
    attns: dict[str, Any]
    indices: list[int]
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    batches: Sequence[Batch] = ()

    def each(self, function: LayerConversion) -> dict[str, Any]:
        """function(attn, index, statistics) of every layer.

        Raises:
            ValueError: of the first layer that fails, with its name and the layers that do not.
        """
        results, errors = {}, {}
        for index, (name, attn) in zip(self.indices, self.attns.items(), strict=True):
            try:
                results[name] = function(attn, index, self.statistics.get(name))
            except ValueError as error:
                errors[name] = error
        if errors:
            first, reason = next(iter(errors.items()))
            others = [index for index, name in zip(self.indices, self.attns, strict=True) if name in results]
            hint = f"; layers={others} takes the others" if others else ""
            raise ValueError(f"layer {first!r}: {reason}{hint}") from reason
        return results


def _module_and_report(result: Any, attn: Any) -> tuple[nn.Module, Any]:
    """What a function of the user returned for the module `attn`, checked."""
    made, report = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(made, nn.Module) or not is_mechanism(made) or made.embed_dim != attn.embed_dim:
        raise ValueError(f"the function must return an attention module of width {attn.embed_dim}, got {_shown(made)}")
    return made, report if isinstance(report, LatentReport) else None


def _shown(made: Any) -> str:
    width = f" of width {made.embed_dim}" if isinstance(made, nn.Module) and is_mechanism(made) else ""
    return f"a {type(made).__name__}{width}" if isinstance(made, nn.Module) else describe(made)


def _latent_layers(
    plan: _Layers, *, key_weight: Any = 1.0, rank_allocation: str = "uniform", **options: Any
) -> tuple[Built, dict[str, Any]]:
    """Latent layers, and what was chosen by the model's loss."""
    check("rank_allocation", rank_allocation, one_of("uniform", "adaptive"))
    candidates = _candidates(key_weight)
    if len(candidates) == 1:
        return _latent_layers_of(plan, rank_allocation, key_weight=candidates[0], **options), {}
    if options.get("weighting") != "two-sided" or not plan.batches:
        raise ValueError("key_weight must be a number without weighting 'two-sided' and token ids in calib")
    best: Built = {}
    losses: dict[float, float] = {}
    for candidate in candidates:
        built = _latent_layers_of(plan, rank_allocation, key_weight=candidate, **options)
        with _in_place(plan.model, built):
            losses[candidate] = mean_loss(plan.model, plan.batches)
        if losses[candidate] <= min(losses.values()):
            best = built
    return best, {"key_weight": min(losses, key=lambda weight: losses[weight]), "losses": losses}


def _latent_layers_of(plan: _Layers, rank_allocation: str, **options: Any) -> Built:
    """Latent layers, all of kv_rank or sharing that budget by their spectra."""
    ranks = [options.pop("kv_rank", None)] * len(plan.indices)
    if rank_allocation == "adaptive":
        if options.get("svd", "joint") != "joint" or not is_integer(ranks[0]):
            raise ValueError(
                f"rank_allocation 'adaptive' needs svd 'joint' and a kv_rank, got {options.get('svd', 'joint')!r} and "
                f"{ranks[0]}"
            )
        spectrum = {name: value for name, value in options.items() if name not in ("svd", "balance", "kv_rank_split")}
        energies = plan.each(lambda attn, _, calib: latent_energies(attn, calib=calib, **spectrum))
        ranks = allocate_ranks(list(energies.values()), sum(ranks))
    rank_of = dict(zip(plan.indices, ranks, strict=True))
    return plan.each(lambda attn, index, calib: mha2mla(attn, kv_rank=rank_of[index], calib=calib, **options))


def _candidates(given: Any) -> tuple[float, ...]:
    """Values of key_weight to try."""
    if isinstance(given, str):
        check("key_weight", given, one_of("search", words="be a number, a list of numbers or 'search'"))
        return KEY_WEIGHTS
    candidates = tuple(given) if isinstance(given, tuple | list) and given else (given,)
    for candidate in candidates:
        check("key_weight", candidate, POSITIVE)
    return candidates


@contextmanager
def _in_place(model: Any, built: Built) -> Iterator[None]:
    """The new modules in the model for the context."""
    before = {name: model.get_submodule(name) for name in built}
    try:
        for name, (attn, _) in built.items():
            model.set_submodule(name, AttentionLayer(attn, before[name]))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
