"""Spectra of all attention layers of a model at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.layers import AttentionLayer, Factors, NoPartError, attention_layers
from attnzoo.diagnostics.spectra.marchenko_pastur import mp_median, tracy_widom_edge
from attnzoo.diagnostics.spectra.record import Settings, SpectrumRecord, settings_of
from attnzoo.diagnostics.spectra.spectrum import (
    analyze_matrix,
    check_factors,
    check_form,
    default_null,
    factor_records,
    pair_of,
    record_of,
    redrawn_factors,
    variance_of,
)
from attnzoo.diagnostics.spectra.weightwatcher import weight_matrices

MATRICES = ("qk", "ov", "weights")


def analyze_model(
    model: nn.Module,
    *,
    matrices: Sequence[str] = ("qk",),
    form: str = "circuit",
    per: str = "head",
    part: str = "full",
    null: str | None = None,
    progress: Callable[[list[AttentionLayer]], Iterable[AttentionLayer]] | None = None,
    **options: Any,
) -> list[SpectrumRecord]:
    """Spectra of every attention layer of a model that `attention_layers` reads, named by layer and head.

    Against null "product" the heads of all layers are taken together: every factor is reduced to its triangular
    part once, keys that heads share included, and the singular values come from one batched decomposition of
    matrices of head width. No E x E matrix is formed, and memory is that of the heads' d x d parts.

    Args:
        model: a module, or a whole model.
        matrices: "qk", the query-key form; "ov", what a head writes for what it reads, WO_h WV_h; "weights", every
            single matrix of the attention modules, against null "mp".
        form: "circuit" or "gram" of "qk", as in `analyze_attention`.
        per: "head", or "layer", of "qk" and "ov".
        part: of "qk": "full", "nope" or "rope"; layers that have no such features are left out.
        null: of "qk" and "ov". Default: as in `analyze_attention`.
        progress: wraps the list of layers, as tqdm does.
        options: of `analyze_matrix`, except draws.

    Raises:
        ValueError: for an argument outside its rule, a part of which no layer has features, weights that are not
            finite, or a model without attention.
    """
    check_form(form, per)
    kinds = list(matrices) if isinstance(matrices, Iterable) and not isinstance(matrices, str) else [matrices]
    kinds = [name for place, name in enumerate(kinds) if name not in kinds[:place]]
    if isinstance(matrices, str) or not kinds or not all(name in MATRICES for name in kinds):
        raise ValueError(f"matrices must be some of {', '.join(map(repr, MATRICES))}, got {kinds}")
    settings = settings_of(options)
    layers = attention_layers(model)
    batch = _HeadBatch(settings)
    # Records, or their numbers in the batch, with what they are of.
    entries: list[tuple[SpectrumRecord | int, dict[str, Any]]] = []
    refusals: list[NoPartError] = []
    for layer in layers if progress is None else progress(layers):
        for name in kinds:
            if name == "weights":
                for _, named, weight in weight_matrices(layer.module, 2):
                    entries.append((analyze_matrix(weight, **options), {"layer": layer.name, "matrix": named}))
                continue
            try:
                factors = layer.qk_factors(part) if name == "qk" else [(out.T, wv) for wv, out in layer.ov_factors()]
            except NoPartError as error:
                refusals.append(error)
                continue
            chosen = form if name == "qk" else "circuit"
            law = default_null(layer.module) if null is None else null
            of = {"layer": layer.name, "matrix": name if part == "full" or name != "qk" else f"{name} {part}"}
            if law == "product" and per == "head":
                entries += [(number, {**of, "head": head}) for head, number in enumerate(batch.add(factors, chosen))]
                continue
            noise = functools.partial(redrawn_factors, layer.module, name, part) if law == "simulate" else None
            entries += [(record, of) for record in factor_records(factors, noise, chosen, per, law, options)]
    if len(refusals) == len(layers):
        raise refusals[0]
    done = batch.records()
    return [dataclasses.replace(done[one] if isinstance(one, int) else one, **of) for one, of in entries]


class _HeadBatch:
    """Heads of many layers against the product null, in few decompositions of small matrices."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # (triangular parts of both factors or their product, sizes, float64 inputs) per head.
        self._heads: list[tuple[Tensor, Tensor, Tensor, tuple[int, ...], bool]] = []

    def add(self, factors: Factors, form: str) -> list[int]:
        """Reduce a layer's heads, (query (d, E), key (d, E)) each; returns their numbers."""
        triangles: dict[tuple[Any, ...], Tensor] = {}

        def triangle(factor: Tensor) -> Tensor:
            # Heads of a group have one key, and views of one place in memory.
            place = (factor.data_ptr(), factor.shape, factor.stride())
            if place not in triangles:
                check_factors([factor])
                tall = factor.detach().double().T
                triangles[place] = torch.linalg.qr(tall, mode="r").R if tall.shape[0] > tall.shape[1] else tall
            return triangles[place]

        first = len(self._heads)
        for query, key in factors:
            pair = pair_of(query, key, form)
            if pair[0].shape[1] != pair[1].shape[0]:
                raise ValueError(f"factors must fit each other, got {tuple(query.shape)} and {tuple(key.shape)}")
            left, right = triangle(query), triangle(key)
            inner = left @ right.T if form == "circuit" else query.detach().double() @ key.detach().double().T
            dims = (pair[0].shape[0], pair[0].shape[1], pair[1].shape[1])
            self._heads.append((inner, left, right, dims, query.dtype == key.dtype == torch.float64))
        return list(range(first, len(self._heads)))

    def records(self) -> list[SpectrumRecord]:
        """In the order in which heads were added."""
        singular = _stacked_svdvals([head[0] for head in self._heads])
        # Heads of a group have one key: variances are of each triangle once, of all of one size together.
        triangles: dict[tuple[int, int], Tensor] = {}
        for _, left, right, dims, _ in self._heads:
            triangles[id(left), max(dims[:2])] = left
            triangles[id(right), max(dims[1:])] = right
        spectra = dict(zip(triangles, _stacked_svdvals(list(triangles.values())), strict=True))
        stacks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for key, values in spectra.items():
            stacks.setdefault((values.numel(), key[1]), []).append(key)
        variances: dict[tuple[int, int], float] = {}
        for (_, n_big), keys in stacks.items():
            stacked = torch.stack([spectra[key] for key in keys])
            found = stacked_variances(stacked, n_big, self._settings.estimator, self._settings.q)
            variances.update(zip(keys, found, strict=True))
        records = []
        for values, (_, left, right, dims, exact) in zip(singular, self._heads, strict=True):
            both = [variances[id(left), max(dims[:2])], variances[id(right), max(dims[1:])]]
            records.append(record_of(values, dims, exact, "product", self._settings, both.copy, list))
        return records


def stacked_variances(singular: Tensor, n_big: int, estimator: str, quantile: float) -> list[float]:
    """`spectrum.variance_of` of each row of singular values (N, n), descending, for one n_big, all in parallel."""
    values = singular.square() / n_big
    if estimator not in ("bulk", "median") or bool((values == 0).any()):
        return [variance_of(row, n_big, estimator, quantile) for row in singular]
    n = values.shape[1]
    sigma2 = values.quantile(0.5, dim=1) / mp_median(n / n_big)
    if estimator == "bulk":
        edge = tracy_widom_edge(n_big, n, 1.0, quantile)
        kept = torch.zeros_like(values, dtype=torch.bool)
        for _ in range(50):
            below = values <= edge * sigma2[:, None]
            going = below.any(1) & (below != kept).any(1)
            if not bool(going.any()):
                break
            means = (values * below).sum(1) / below.sum(1)
            sigma2, kept = torch.where(going, means, sigma2), torch.where(going[:, None], below, kept)
    return [float(value) for value in sigma2]


def _stacked_svdvals(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of each matrix, descending, by one decomposition per shape."""
    singular: list[Tensor] = [torch.empty(0)] * len(matrices)
    for shape in {matrix.shape for matrix in matrices}:
        places = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
        for i, values in zip(places, torch.linalg.svdvals(torch.stack([matrices[i] for i in places])), strict=True):
            singular[i] = values.cpu()
    return singular
