"""Numbers for every head of a model: what it attends to, which kind it is, and how much the heads of a layer differ.

The measures are those of `similarity`, summed up over query blocks and batches, so that long inputs and many batches
need no more memory than one block of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.attention_call import HeadCall
from attnzoo.diagnostics.heads.observe import Captured, observe
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers
from attnzoo.masks import AttentionMask

MEASURES = (
    "entropy", "normalized_entropy", "distance", "distance_argmax", "confidence", "sink", "previous_token",
    "current_token",
)  # fmt: skip
"""Measures that every report holds, as `similarity` defines them."""

KINDS = ("previous_token_head", "duplicate_token_head", "induction_head", "sink_head")
"""What `HeadReport.kinds` tells apart."""

_BLOCK = 256
_TOLERANCE = 1e-3
_OF_DISTRIBUTIONS = ("entropy", "normalized_entropy", "distance", "distance_argmax")


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer's heads, on the CPU in float64; NaN where a measure is not defined.

    Attributes:
        name: of the layer inside the model.
        index: of the layer.
        measures: (H,) by name: those of `MEASURES`, "detect_<kind>" for kinds of `similarity.DETECTABLE` if the batches
            have token numbers, and "induction_stripe" if a period was given.
        pair_cosine: (H, H) cosine of whole patterns, mean over examples.
        output_cosine: (H, H) mean cosine of head outputs of a token.
        sink_rate: share of heads whose mean weight on the first key exceeds 0.3.
        note: why measures are missing.
    """

    name: str
    index: int
    measures: Mapping[str, Tensor]
    pair_cosine: Tensor
    output_cosine: Tensor
    sink_rate: float
    note: str = ""

    @property
    def num_heads(self) -> int:
        """Heads H."""
        return self.pair_cosine.shape[0]


@dataclass(frozen=True)
class HeadReport:
    """Figures of all heads of a model; see `head_report`.

    Attributes:
        layers: one entry a layer, in depth order.
        queries: how many query tokens the averages are over.
    """

    layers: tuple[LayerReport, ...]
    queries: int

    def table(self, measure: str) -> Tensor:
        """(L, H) of one measure; NaN for heads that a smaller layer does not have.

        Raises:
            ValueError: for a measure that the report does not hold.
        """
        names = list(self.layers[0].measures)
        if measure not in names:
            raise ValueError(f"measure must be one of {', '.join(map(repr, names))}, got {measure!r}")
        width = max(layer.num_heads for layer in self.layers)
        found = torch.full((len(self.layers), width), math.nan, dtype=torch.float64)
        for row, layer in zip(found, self.layers, strict=True):
            row[: layer.num_heads] = layer.measures[measure]
        return found

    def pair_cosine_mean(self) -> Tensor:
        """(L,) mean cosine of the patterns of two different heads of a layer."""
        means = [similarity.head_diversity(layer.pair_cosine) for layer in self.layers]
        return torch.tensor(means, dtype=torch.float64)

    def kinds(self, threshold: float = 0.4) -> dict[str, str]:
        """Heads of a known kind, by label "L3H5": the kind with the largest share of the weight, if above threshold.

        Shares of the kinds of `similarity.DETECTABLE` exclude the first key, whose share decides on "sink_head".
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
        found = {}
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
                    found[f"L{layer.index}H{head}"] = list(scores)[best]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; NaN becomes None."""
        return {
            "queries": self.queries,
            "layers": [
                {
                    "name": layer.name,
                    "index": layer.index,
                    "measures": {name: _plain(values) for name, values in layer.measures.items()},
                    "pair_cosine": _plain(layer.pair_cosine),
                    "output_cosine": _plain(layer.output_cosine),
                    "sink_rate": None if math.isnan(layer.sink_rate) else layer.sink_rate,
                    "note": layer.note,
                }
                for layer in self.layers
            ],
        }

    def to_dataframe(self) -> Any:
        """One row a head in a pandas.DataFrame: layer, head, label, name of the layer, and every measure."""
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
        names = list(self.layers[0].measures)
        shown = [name.removesuffix("_head") for name in names]
        widths = [max(len(name), 7) for name in shown]
        lines = ["head    " + "  ".join(name.rjust(width) for name, width in zip(shown, widths, strict=True))]
        for layer in self.layers:
            for head in range(layer.num_heads):
                cells = (f"{float(layer.measures[name][head]):.3f}" for name in names)
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
    block: int = _BLOCK,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> HeadReport:
    """Figures of every head over all real tokens of all batches, without gradients and with dropout off.

    Averages are over tokens, not over batches, so it does not matter how the data is split. Layers whose rows are no
    distributions have NaN where that matters: with a sink in the softmax's denominator no entropies and distances, with
    composed weights nothing but cosines. Scores of `similarity.DETECTABLE` are shares of the weight that does not go to
    the first key.

    Args:
        model: any model that `attention_layers` understands, with softmax patterns.
        batches: tensors, called as model(batch), of tokens (B, T) or inputs (B, T, E); pairs (tensor, mask) with a
            right-padded boolean mask (B, T), called as model(tensor, mask=AttentionMask.padding(...)); or mappings,
            called as model(**batch), with "input_ids" and "attention_mask" as transformers has them.
        layers: indices of the layers to report. Default: all.
        period: of batches [first token] + r + r with r of that many random tokens: adds "induction_stripe".
        block: queries at once.
        forward: calls the model on a batch in another way.

    Raises:
        ValueError: for no batches, a batch of another kind, a call with other queries than keys, or patterns that a
            layer does not have.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    sums: dict[int, _Sums] = {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        current: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]

        def visit(call: HeadCall) -> None:
            if call.layer.index not in sums:
                sums[call.layer.index] = _Sums(call.layer, period, block)
            sums[call.layer.index].add(call, *current[0])

        with observe(model, visit, layers), torch.no_grad():
            for batch in batches:
                tokens, mask = _described(batch)
                current[0] = (tokens, mask)
                _run(model, batch, mask, forward)
    finally:
        for module, was in training.items():
            module.training = was
    if not sums:
        raise ValueError("batches must hold at least one batch that runs the model's attention, got none")
    found = [sums[index] for index in sorted(sums)]
    return HeadReport(tuple(layer.report() for layer in found), found[0].queries)


def composition_table(model: nn.Module, mode: str) -> Tensor:
    """Composition scores of all pairs of heads, (L, H, L, H): how much the later head reads from the earlier one.

    Entry [i, a, j, b] is `similarity.composition_scores` of head a of layer i and head b of layer j > i; entries with
    j <= i are 0. Weights alone: without rotation, norms between layers and nonlinear head maps.

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
    found = torch.zeros(L, H, L, H, dtype=torch.float64)
    for j, later in enumerate(weights):
        for i, (_, _, w_v, w_o) in enumerate(weights[:j]):
            found[i, :, j] = similarity.composition_scores((w_o, w_v), later, mode).cpu()
    return found


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
        ValueError: for no patterns, patterns over a cache, or another number of tokens.
    """
    patterns = captured.last("patterns")
    B, _, T, S = patterns[0].shape
    if T != S:
        raise ValueError(f"captured must hold a pass without a cache, got {T} queries and {S} keys")
    if not 0 <= example < B:
        raise ValueError(f"example must lie between 0 and {B - 1}, got {example}")
    if len(tokens) != T:
        raise ValueError(f"tokens must be as many as the patterns' {T}, got {len(tokens)}")
    return tuple(p[example : example + 1].float().cpu() for p in patterns), [str(token) for token in tokens]


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: AttentionLayer, period: int | None, block: int) -> None:
        self.layer = layer
        self.period = period
        self.block = block
        self.queries = 0
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.note = ""
        self.composed = False

    def add(self, call: HeadCall, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Add one call; tokens (B, T) or None, mask (B, T) of the queries that count or None."""
        B, H, T, _ = call.outputs.shape
        if call.num_keys != T:
            raise ValueError(f"batches must need no cache and no context, got {T} queries and {call.num_keys} keys")
        device = call.outputs.device
        real = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask.to(device)
        if real.shape != (B, T):
            raise ValueError(f"mask must have shape {(B, T)}, got {tuple(real.shape)}")
        if tokens is not None and tokens.shape != (B, T):
            raise ValueError(f"tokens must have shape {(B, T)}, that of the queries, got {tuple(tokens.shape)}")
        tokens = None if tokens is None else tokens.to(device)
        self.queries += int(real.sum())
        gram = torch.zeros(B, H, H, dtype=torch.float64, device=device)
        kinds = torch.zeros(len(similarity.DETECTABLE), B, H, dtype=torch.float64, device=device)
        weight = torch.zeros(B, H, dtype=torch.float64, device=device)
        for rows, found in call.pattern_blocks(self.block):
            p, m = found.double(), real[:, rows]
            flat = (p * m[:, None, :, None]).flatten(2)
            gram += flat @ flat.mT
            self._check(call, p, m)
            self._single(call, p, m, rows)
            if tokens is not None:
                self._kinds(p, tokens, rows, kinds, weight)
        scale = gram.diagonal(dim1=1, dim2=2).sqrt()
        self._put("pair_cosine", (gram / (scale[:, :, None] * scale[:, None])).sum(0), B)
        self._put("output_cosine", similarity.output_cosine(call.outputs, real) * real.sum(), float(real.sum()))
        if tokens is not None:
            for kind, sums in zip(similarity.DETECTABLE, kinds, strict=True):
                share = torch.where(weight > 0, sums / weight, torch.zeros_like(sums))
                self._put(f"detect_{kind}", share.sum(0), B)

    def _check(self, call: HeadCall, p: Tensor, m: Tensor) -> None:
        """Notice rows that are no distributions."""
        if call.rules is not None and call.rules.post is not None:
            self.composed = True
            self.note = "weights are composed over heads and may be negative, so heads have cosines alone"
        elif bool(((p.sum(-1) - 1).abs() > _TOLERANCE)[m[:, None].expand(p.shape[:3])].any()):
            self.note = "rows do not add up to 1, so they have no entropy and no distance"

    def _single(self, call: HeadCall, p: Tensor, m: Tensor, rows: slice) -> None:
        """Add the measures of single heads, of p (B, H, t, T) with counting rows m (B, t)."""
        T = p.shape[-1]
        i = torch.arange(rows.start, rows.stop, device=p.device)
        j = torch.arange(T, device=p.device)
        entropy = -torch.xlogy(p.clamp(min=0), p.clamp(min=0)).sum(-1)
        seen = call.visible_counts(rows).double().expand(p.shape[:-1])
        many = m[:, None] & (seen > 1)
        relative = torch.where(many, entropy / seen.log().clamp(min=1e-30), torch.zeros_like(entropy))
        self._put("normalized_entropy", relative.sum((0, 2)), many.sum((0, 2)).double())
        for name, values in {
            "entropy": entropy,
            "distance": (p * (i[:, None] - j).abs()).sum(-1),
            "distance_argmax": (i - p.argmax(-1)).abs().double(),
            "confidence": p.amax(-1),
            "sink": p[..., 0],
        }.items():
            self._put(name, (values * m[:, None]).sum((0, 2)), float(m.sum()))
        offsets = {"current_token": 0, "previous_token": 1}
        if self.period is not None:
            offsets["induction_stripe"] = self.period - 1
        for name, offset in offsets.items():
            if not 0 <= offset < T:
                raise ValueError(f"period must lie between 1 and the {T} tokens, got {self.period}")
            at = i - offset
            there = (at >= 0) & m
            index = at.clamp(min=0)[:, None].expand(*p.shape[:-1], 1)
            values = p.gather(-1, index)[..., 0]
            self._put(name, (values * there[:, None]).sum((0, 2)), float(there.sum()))

    def _kinds(self, p: Tensor, tokens: Tensor, rows: slice, kinds: Tensor, weight: Tensor) -> None:
        """Add to kinds (3, B, H) and weight (B, H) what `similarity.detect_head` sums, without the first key."""
        T = p.shape[-1]
        i = torch.arange(rows.start, rows.stop, device=p.device)[:, None]
        j = torch.arange(T, device=p.device)
        same = tokens[:, rows, None] == tokens[:, None, :]
        after = torch.zeros_like(same)
        after[:, :, 1:] = same[:, :, :-1] & (j[:-1] < i) & (j[1:] <= i)
        wanted = ((i - j == 1).expand_as(same), same & (j < i), after)
        p = p * (j > 0)
        weight += p.sum((-1, -2))
        for sums, where in zip(kinds, wanted, strict=True):
            sums += (p * where[:, None]).sum((-1, -2))

    def _put(self, name: str, total: Tensor, count: Any) -> None:
        self.totals[name] = total if name not in self.totals else self.totals[name] + total
        self.counts[name] = count if name not in self.counts else self.counts[name] + count

    def report(self) -> LayerReport:
        means = {name: (total / self.counts[name]).cpu() for name, total in self.totals.items()}
        pairs = {name: means.pop(name) for name in ("pair_cosine", "output_cosine")}
        for name, values in means.items():
            if self.composed or (self.note and name in _OF_DISTRIBUTIONS):
                means[name] = torch.full_like(values, math.nan)
        order = [name for name in MEASURES if name in means]
        measures = {name: means[name] for name in (*order, *(name for name in means if name not in order))}
        sink = measures["sink"]
        rate = math.nan if self.composed else float((sink > 0.3).double().mean())
        return LayerReport(
            self.layer.name, self.layer.index, measures, pairs["pair_cosine"], pairs["output_cosine"], rate, self.note
        )


def _described(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Token numbers (B, T) and mask (B, T) of a batch, as far as it has them."""
    tokens: Any = None
    mask: Any = None
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        tokens, mask = batch
    elif isinstance(batch, Tensor):
        tokens = batch
    integral = isinstance(tokens, Tensor) and not tokens.is_floating_point()
    plain = isinstance(mask, Tensor) and mask.ndim == 2
    return tokens if integral else None, mask.bool() if plain else None


def _run(
    model: nn.Module, batch: Any, mask: Tensor | None, forward: Callable[[nn.Module, Any], Any] | None
) -> None:  # fmt: skip
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 2 and mask is not None:
        lengths = mask.sum(1)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
            raise ValueError("mask must be of right padding, True for the first tokens of each row, got another one")
        model(batch[0], mask=AttentionMask.padding(lengths))
    else:
        raise ValueError(f"batches must hold tensors, pairs (tensor, mask) or mappings, got {type(batch).__name__}")


def _plain(values: Tensor) -> Any:
    """Nested lists with None for NaN."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else value for value in values.tolist()]
