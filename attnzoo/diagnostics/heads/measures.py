"""The measures of a report, summed up over query blocks and batches for one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.layers import AttentionLayer

MEASURES = (
    "entropy", "normalized_entropy", "distance", "distance_argmax", "confidence", "sink", "previous_token",
    "current_token",
)  # fmt: skip
"""Measures that every report holds, as `similarity` defines them."""

CLOSED = 0.1
"""Below this a gate counts as closed."""

_TOLERANCE = 1e-3
_OF_DISTRIBUTIONS = ("entropy", "normalized_entropy", "distance", "distance_argmax")


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer's heads, on the CPU in float64; NaN where a measure is not defined.

    Attributes:
        name: of the layer inside the model.
        index: of the layer.
        measures: (H,) by name: those of `MEASURES`, "detect_<kind>" for kinds of `similarity.DETECTABLE` if the batches
            have token numbers, "induction_stripe" if a period was given, and the figures of gates (`RunningGates`).
        pair_cosine: (H, H) cosine of whole patterns, mean over the examples in which both heads attend to anything.
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

    def measure(self, name: str) -> Tensor:
        """(H,) of one measure, NaN if the layer does not have it."""
        missing = torch.full((self.num_heads,), math.nan, dtype=torch.float64)
        return self.measures.get(name, missing)


class RunningMeasures:
    """Running sums of one layer's measures.

    Args:
        layer: the layer, whose calls are added.
        period: adds "induction_stripe" for a period of this many tokens, unless None.
        block: queries at once.
    """

    def __init__(self, layer: AttentionLayer, period: int | None, block: int) -> None:
        self.layer = layer
        self.period = period
        self.block = block
        self.queries = 0
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.note = ""
        self.composed = self.improper = self.broken = False

    def add(
        self, call: AttentionCall, tokens: Tensor | None, mask: Tensor | None, key_mask: Tensor | None
    ) -> None:  # fmt: skip
        """Add one call; tokens (B, T) or None, masks of the real tokens (B, T) and keys (B, S) or None.

        Padding counts neither as queries nor as keys, and places are those among the real tokens.
        """
        B, H, T, _ = call.outputs.shape
        S = call.num_keys
        if not call.cross and S != T:
            raise ValueError(f"batches must need no cache, got {T} queries and {S} keys")
        tokens = None if call.cross else tokens
        device = call.outputs.device
        real = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask.to(device)
        real_keys = None if key_mask is None else key_mask.to(device)
        for given, expected in ((real, (B, T)), (real_keys, (B, S))):
            if given is not None and given.shape != expected:
                raise ValueError(f"mask must have shape {expected}, got {tuple(given.shape)}")
        if tokens is not None and tokens.shape != (B, T):
            raise ValueError(f"tokens must have shape {(B, T)}, that of the queries, got {tuple(tokens.shape)}")
        if self.period is not None and not call.cross and not 1 <= self.period <= (longest := int(real.sum(1).max())):
            raise ValueError(f"period must lie between 1 and the {longest} tokens, got {self.period}")
        if not bool(real.any()):
            return
        tokens = None if tokens is None else tokens.to(device)
        self.queries += int(real.sum())
        keys = tokens
        if tokens is not None and real_keys is not None:
            keys = tokens.gather(1, similarity.real_first(real_keys))
        gram = torch.zeros(B, H, H, dtype=torch.float64, device=device)
        kinds = torch.zeros(len(similarity.DETECTABLE), B, H, dtype=torch.float64, device=device)
        weight = torch.zeros(B, H, dtype=torch.float64, device=device)
        for rows, pattern in call.pattern_blocks(self.block):
            m, i = real[:, rows], (real.cumsum(1) - 1)[:, rows]
            p = similarity.real_tokens_first(pattern.double(), None, real_keys)
            if mask is not None:
                p = p.masked_fill(~m[:, None, :, None], 0.0)
            flat = p.flatten(2)
            gram += flat @ flat.mT
            self._check(call, p, m)
            self._single(p, m, i, call.visible_counts(rows, real_keys), call.cross)
            if tokens is not None and keys is not None:
                self._kinds(p, tokens[:, rows], keys, i, kinds, weight)
        # A head without weights in an example has no cosine there.
        cosines = similarity.cosines(gram)
        self._put("pair_cosine", cosines.nansum(0), cosines.isfinite().double().sum(0))
        self._put("output_cosine", similarity.output_cosine(call.outputs, real) * real.sum(), float(real.sum()))
        if tokens is not None:
            # A token alone has no key but the first.
            some = real.sum(1) > 1
            for kind, sums in zip(similarity.DETECTABLE, kinds, strict=True):
                share = torch.where(weight > 0, sums / weight, torch.zeros_like(sums))
                self._put(f"detect_{kind}", share[some].sum(0), int(some.sum()))

    def _check(self, call: AttentionCall, p: Tensor, m: Tensor) -> None:
        """Note whether rows are not distributions, not finite, or of keys of other tokens."""
        sums = p.sum(-1)[m[:, None].expand(p.shape[:3])]
        if not bool(sums.isfinite().all()):
            self.broken = True
        if call.cross:
            self.note = "keys are other tokens than queries, so heads have no distances and no offsets"
        if call.post is not None:
            self.composed = True
            self.note = "weights are composed over heads and may be negative, so heads have cosines alone"
        elif bool(((sums - 1).abs() > _TOLERANCE).any()):
            self.improper = True
            self.note = "rows do not add up to 1, so they have no entropy and no distance"

    def _single(self, p: Tensor, m: Tensor, i: Tensor, visible: Tensor, cross: bool) -> None:
        """Add the measures of single heads, of p (B, H, t, S) with real rows m (B, t) at places i (B, t).

        Those of places are left out if keys are other tokens than queries (cross).
        visible, broadcastable to (B, H, t), says how many keys a row sees.
        """
        j = torch.arange(p.shape[-1], device=p.device)
        entropy = -torch.xlogy(p.clamp(min=0), p.clamp(min=0)).sum(-1)
        seen = visible.double().expand(p.shape[:-1])
        many = m[:, None] & (seen > 1)
        relative = torch.where(many, entropy / seen.log().clamp(min=1e-30), torch.zeros_like(entropy))
        self._put("normalized_entropy", relative.sum((0, 2)), many.sum((0, 2)).double())
        of_rows = {"entropy": entropy, "confidence": p.amax(-1), "sink": p[..., 0]}
        if not cross:
            of_rows["distance"] = (p * (i[:, None, :, None] - j).abs()).sum(-1)
            of_rows["distance_argmax"] = (i[:, None] - p.argmax(-1)).abs().double()
        for name, values in of_rows.items():
            self._put(name, (values * m[:, None]).sum((0, 2)), float(m.sum()))
        if cross:
            return
        offsets = {"current_token": 0, "previous_token": 1}
        if self.period is not None:
            offsets["induction_stripe"] = self.period - 1
        for name, offset in offsets.items():
            at = i - offset
            there = (at >= 0) & m
            index = at.clamp(min=0)[:, None, :, None].expand(*p.shape[:-1], 1)
            values = p.gather(-1, index)[..., 0]
            self._put(name, (values * there[:, None]).sum((0, 2)), float(there.sum()))

    def _kinds(self, p: Tensor, queries: Tensor, keys: Tensor, i: Tensor, kinds: Tensor, weight: Tensor) -> None:
        """Add to kinds (3, B, H) and weight (B, H) what `similarity.detect_head` sums, without the first key.

        queries (B, t) at places i (B, t) and keys (B, T) are token numbers.
        """
        i = i[..., None]
        j = torch.arange(p.shape[-1], device=p.device)
        same = queries[..., None] == keys[:, None]
        after = torch.zeros_like(same)
        after[:, :, 1:] = same[:, :, :-1] & (j[:-1] < i) & (j[1:] <= i)
        wanted = (i - j == 1, same & (j < i), after)
        p = p * (j > 0)
        weight += p.sum((-1, -2))
        for sums, where in zip(kinds, wanted, strict=True):
            sums += (p * where[:, None]).sum((-1, -2))

    def _put(self, name: str, total: Tensor, count: Any) -> None:
        self.totals[name] = total if name not in self.totals else self.totals[name] + total
        self.counts[name] = count if name not in self.counts else self.counts[name] + count

    def report(self) -> LayerReport:
        """The averages so far."""
        means = {name: (total / self.counts[name]).cpu() for name, total in self.totals.items()}
        for name in MEASURES:
            means.setdefault(name, torch.full_like(means["entropy"], math.nan))
        pairs = {name: means.pop(name) for name in ("pair_cosine", "output_cosine")}
        for name, values in means.items():
            if self.composed or self.broken or (self.improper and name in _OF_DISTRIBUTIONS):
                means[name] = torch.full_like(values, math.nan)
        order = [name for name in MEASURES if name in means]
        measures = {name: means[name] for name in (*order, *(name for name in means if name not in order))}
        sink = measures["sink"]
        rate = math.nan if self.composed or self.broken else float((sink > 0.3).double().mean())
        note = "weights are not finite, so heads have no figures" if self.broken else self.note
        return LayerReport(
            self.layer.name, self.layer.index, measures, pairs["pair_cosine"], pairs["output_cosine"], rate, note
        )


class RunningGates:
    """Running figures of the sigmoid gates of a layer's heads, over tokens and a head's features.

    They are "<name>_mean", "<name>_min", "<name>_max" and "<name>_closed", the share below CLOSED.

    Args:
        name: of the gate.
        reads: which of the equal parts of the logits each head is gated by.
    """

    def __init__(self, name: str, reads: tuple[int, ...]) -> None:
        self.name = name
        self.reads = reads
        self.count = 0
        self.figures: dict[str, Tensor] = {}

    def add(self, logits: Tensor, real: Tensor | None) -> None:
        """Add logits (B, T, ...) of the real tokens (B, T); None: all are."""
        gates = torch.sigmoid(logits.detach().double()).flatten(2)
        gates = gates.unflatten(2, (max(self.reads, default=0) + 1, -1))[:, :, list(self.reads)]
        # Keys and values of a context are gated by their own tokens.
        gates = gates.flatten(0, 1) if real is None or real.shape != gates.shape[:2] else gates[real.to(gates.device)]
        if not gates.numel():
            return
        count, before = gates.shape[0] * gates.shape[2], self.figures
        new = {
            "mean": gates.mean((0, 2)), "min": gates.amin((0, 2)), "max": gates.amax((0, 2)),
            "closed": (gates < CLOSED).double().mean((0, 2)),
        }  # fmt: skip
        if before:
            share = count / (count + self.count)
            new["min"], new["max"] = new["min"].minimum(before["min"]), new["max"].maximum(before["max"])
            new |= {figure: before[figure].lerp(new[figure], share) for figure in ("mean", "closed")}
        self.figures, self.count = new, count + self.count

    def measures(self) -> dict[str, Tensor]:
        """The figures so far, each (H,), on the CPU."""
        return {f"{self.name}_{figure}": values.cpu() for figure, values in self.figures.items()}
