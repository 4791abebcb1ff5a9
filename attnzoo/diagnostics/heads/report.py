"""Numbers for every head of a model: what it attends to, which kind it is, and how much the heads of a layer differ.

The measures are those of `similarity`, summed up over query blocks and batches, so that long inputs and many batches
need no more memory than one block of one layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import check_choice
from attnzoo.diagnostics.batches import (
    decoder_modules,
    decoder_tokens_and_mask,
    in_eval_mode,
    run_batch,
    tokens_and_mask,
)
from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.heads.measures import LayerReport, RunningGates, RunningMeasures
from attnzoo.diagnostics.heads.observe import Captured, observe
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.diagnostics.training_records import finite
from attnzoo.rules import INTEGER, SIZE, check, describe, is_number

KINDS = ("previous_token_head", "duplicate_token_head", "induction_head", "sink_head")
"""What `HeadReport.kinds` tells apart."""


@dataclass(frozen=True)
class HeadReport:
    """Figures of all heads of a model; see `head_report`.

    Attributes:
        layers: one entry per layer, in depth order.
        queries: how many query tokens the averages are over.
    """

    layers: tuple[LayerReport, ...]
    queries: int

    @property
    def measures(self) -> list[str]:
        """Names of the measures that any layer has."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.measures))

    def table(self, measure: str) -> Tensor:
        """(L, H) of one measure; NaN for heads and measures that a layer does not have.

        Raises:
            ValueError: for a measure that the report does not hold.
        """
        check_choice("measure", measure, self.measures)
        width = max(layer.num_heads for layer in self.layers)
        table = torch.full((len(self.layers), width), math.nan, dtype=torch.float64)
        for row, layer in zip(table, self.layers, strict=True):
            row[: layer.num_heads] = layer.measure(measure)
        return table

    def pair_cosine_mean(self) -> Tensor:
        """(L,) mean cosine of the patterns of two different heads of a layer; NaN where there is one head."""
        means = [similarity.head_diversity(layer.pair_cosine) for layer in self.layers]
        return torch.tensor(means, dtype=torch.float64)

    def kinds(self, threshold: float = 0.4) -> dict[str, str]:
        """Heads of a known kind, by label "L3H5": the kind with the largest share of the weight, if above threshold.

        Shares of the kinds of `similarity.DETECTABLE` exclude the first key, whose share decides on "sink_head".
        """
        if not is_number(threshold) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {describe(threshold)}")
        kinds = {}
        for layer in self.layers:
            scores = {
                "sink_head": layer.measures["sink"],
                **{kind: layer.measures[f"detect_{kind}"] for kind in similarity.DETECTABLE
                   if f"detect_{kind}" in layer.measures},
            }  # fmt: skip
            scores.setdefault("previous_token_head", layer.measures["previous_token"])
            table = torch.stack(list(scores.values())).nan_to_num(-1.0)
            for head in range(layer.num_heads):
                best = int(table[:, head].argmax())
                if table[best, head] > threshold:
                    kinds[f"L{layer.index}H{head}"] = list(scores)[best]
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; what is not finite becomes None."""
        layers = [
            {
                "name": layer.name, "index": layer.index,
                "measures": {name: values.tolist() for name, values in layer.measures.items()},
                "pair_cosine": layer.pair_cosine.tolist(), "output_cosine": layer.output_cosine.tolist(),
                "sink_rate": layer.sink_rate, "note": layer.note,
            }
            for layer in self.layers
        ]  # fmt: skip
        return {"queries": self.queries, "layers": finite(layers)}

    def to_dataframe(self) -> Any:
        """One row per head in a pandas.DataFrame: layer, head, label, name of the layer, and every measure."""
        import pandas  # type: ignore[import-untyped]

        rows = [
            {
                "layer": layer.index, "head": head, "label": f"L{layer.index}H{head}", "name": layer.name,
                **{name: float(values[head]) for name, values in layer.measures.items()},
            }
            for layer in self.layers
            for head in range(layer.num_heads)
        ]  # fmt: skip
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        names = self.measures
        shown = [name.removesuffix("_head") for name in names]
        widths = [max(len(name), 7) for name in shown]
        lines = ["head    " + "  ".join(name.rjust(width) for name, width in zip(shown, widths, strict=True))]
        for layer in self.layers:
            for head in range(layer.num_heads):
                cells = (f"{float(layer.measure(name)[head]):.3f}" for name in names)
                row = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
                lines.append(f"L{layer.index}H{head}".ljust(8) + row)
            if layer.note:
                lines.append(f"        {layer.name}: {layer.note}")
        return "\n".join(lines)


def head_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    period: int | None = None,
    block: int = 256,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> HeadReport:
    """Figures of every head over all real tokens of all batches, without gradients and with dropout off.

    Averages are over tokens, not over batches, so it does not matter how the data is split. Layers whose rows are not
    distributions have NaN where that matters: entropies and distances with a sink in the softmax's denominator, and
    everything but cosines with composed weights, and everything with weights that are not finite; attention over other
    tokens (cross-attention) has no distances and offsets. Scores of `similarity.DETECTABLE` are shares of the weight
    that does not go to the first key. Layers whose mechanism names sigmoid gates (`gate_layers`) have the figures of
    `measures.RunningGates` for each.

    Args:
        model: any model that `attention_layers` understands, with softmax patterns.
        batches: tensors, called as model(batch), of tokens (B, T) or inputs (B, T, E); pairs (tensor, mask) with a
            boolean mask (B, T) of the real tokens, padded on either side, called as model(tensor, mask=...); or
            mappings, called as model(**batch), with "input_ids" and "attention_mask" (B, T) as transformers has them,
            and "decoder_input_ids" and "decoder_attention_mask" for the decoder of an encoder-decoder model.
            Padding counts neither as queries nor as keys. Where padding comes first, models that take "positions" or
            "position_ids" and are not given any get those of the real tokens.
        layers: indices of the layers to report. Default: all.
        period: of batches [first token] + r + r with r of that many random tokens: adds "induction_stripe".
        block: queries at once.
        forward: calls the model on a batch in another way; the second of a pair may then be labels.

    Raises:
        ValueError: if there are no batches or no real tokens, for a batch or mask of another form, if a call has a
            cache, or if a layer has no patterns.
    """
    check("block", block, SIZE)
    if period is not None:
        check("period", period, INTEGER)
    sums: dict[int, RunningMeasures] = {}
    current: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * 2
    of_decoder = decoder_modules(model)

    def visit(call: AttentionCall) -> None:
        if call.layer.index not in sums:
            sums[call.layer.index] = RunningMeasures(call.layer, period, block)
        own = current[call.layer.module in of_decoder]
        sums[call.layer.index].add(call, *own, current[0][1] if call.cross else own[1])

    with in_eval_mode(model), ExitStack() as stack, torch.no_grad():
        gates = _watched_gates(
            stack.enter_context(observe(model, visit, layers)), stack, lambda own: current[own in of_decoder][1]
        )
        for batch in batches:
            tokens, mask = tokens_and_mask(batch, labelled=forward is not None)
            current[:] = [(tokens, mask), decoder_tokens_and_mask(batch)]
            run_batch(model, batch, mask, forward)
    if not sums:
        raise ValueError("batches must hold at least one batch that runs the model's attention, got none")
    if not any(layer.queries for layer in sums.values()):
        raise ValueError("batches must hold at least one real token, got padding alone")
    reports = []
    for index in sorted(sums):
        layer = sums[index].report()
        own = {name: values for gate in gates.get(index, ()) for name, values in gate.measures().items()}
        reports.append(replace(layer, measures={**layer.measures, **own}))
    return HeadReport(tuple(reports), sums[min(sums)].queries)


def _watched_gates(
    layers: Iterable[AttentionLayer], stack: ExitStack, real_tokens: Callable[[nn.Module], Tensor | None]
) -> dict[int, list[RunningGates]]:
    """Figures of the gates of each layer, by its index, that grow while the stack is open."""
    watched: dict[int, list[RunningGates]] = {}
    for layer in layers:
        named: dict[str, tuple[nn.Module, tuple[int, ...]]] = getattr(layer.mechanism, "gate_layers", dict)()
        for name, (module, reads) in named.items():
            gates = RunningGates(name, tuple(reads))
            watched.setdefault(layer.index, []).append(gates)
            note = functools.partial(_note, gates, functools.partial(real_tokens, layer.module))
            stack.callback(module.register_forward_hook(note).remove)
    return watched


def _note(gates: RunningGates, real: Callable[[], Tensor | None], _: nn.Module, __: Any, logits: Tensor) -> None:
    gates.add(logits, real())


def composition_table(model: nn.Module, mode: str) -> Tensor:
    """Composition scores of all pairs of heads, (L, H, L, H): how much the later head reads from the earlier one.

    Entry [i, a, j, b] is `similarity.composition_scores` of head a of layer i and head b of layer j > i; entries with
    j <= i are 0. They come from weights only, without rotation, norms between layers and nonlinear head maps.

    Args:
        model: any model that `attention_layers` understands, whose layers have equally many heads.
        mode: "Q", "K" or "V".

    Raises:
        ValueError: for another mode, or layers that have different numbers of heads.
    """
    if mode not in ("Q", "K", "V"):
        raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
    weights = []
    for layer in attention_layers(model):
        qk, ov = layer.qk_factors(), layer.ov_factors()
        if len(qk) != len(ov):
            raise ValueError(
                f"model must have one query-key form for each head, got {len(qk)} and {len(ov)} heads in {layer.name!r}"
            )
        w_q, w_k = (torch.stack([pair[i] for pair in qk]) for i in range(2))
        w_v, w_o = (torch.stack([pair[i] for pair in ov]) for i in range(2))
        weights.append((w_q, w_k, w_v, w_o))
    counts = sorted({w_q.shape[0] for w_q, *_ in weights})
    if len(counts) > 1:
        raise ValueError(f"model must have equally many heads in every layer, got {counts}")
    L, H = len(weights), counts[0]
    scores = torch.zeros(L, H, L, H, dtype=torch.float64)
    for j, later in enumerate(weights):
        for i, (_, _, w_v, w_o) in enumerate(weights[:j]):
            scores[i, :, j] = similarity.composition_scores((w_o, w_v), later, mode).cpu()
    return scores


def to_bertviz(captured: Captured, tokens: Sequence[str], example: int = 0) -> tuple[tuple[Tensor, ...], list[str]]:
    """What bertviz's head_view and model_view take: (1, H, T, T) of every layer, and the tokens.

        with capture(model) as captured:
            model(ids)
        bertviz.head_view(*to_bertviz(captured, words))

    Args:
        captured: with patterns; its last forward pass is shown.
        tokens: T strings.
        example: which row of the batch.

    Raises:
        ValueError: if there are no patterns, for patterns over a cache, or another number of tokens.
    """
    patterns = captured.last("patterns")
    B, _, T, S = patterns[0].shape
    if T != S:
        raise ValueError(f"captured must hold a pass without a cache, got {T} queries and {S} keys")
    check("example", example, INTEGER)
    if not 0 <= example < B:
        raise ValueError(f"example must lie between 0 and {B - 1}, got {example}")
    if len(tokens) != T:
        raise ValueError(f"tokens must be as many as the patterns' {T}, got {len(tokens)}")
    return tuple(p[example : example + 1].float().cpu() for p in patterns), [str(token) for token in tokens]
