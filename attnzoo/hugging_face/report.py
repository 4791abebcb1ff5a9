"""What a conversion made of the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnzoo.conversion import LatentReport


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        index: number of the layer among the model's attention layers.
        name: of the attention module.
        before: class of the attnzoo module before.
        after: class of the one that is there now.
        cache_bytes_before: bytes that a token takes in the cache, in the dtype of the weights.
        cache_bytes_after: the same of the new module.
        params_before: number of parameters.
        params_after: those of the new module.
        latent: of a conversion to latent attention, what it kept.
    """

    index: int
    name: str
    before: str
    after: str
    cache_bytes_before: int
    cache_bytes_after: int
    params_before: int
    params_after: int
    latent: LatentReport | None = None

    @classmethod
    def of(cls, index: int, name: str, before: Any, after: Any, latent: LatentReport | None = None) -> LayerReport:
        """The report on a layer whose module `before` becomes the module `after`."""
        return cls(
            index, name, type(before).__name__, type(after).__name__, _cache_bytes(before), _cache_bytes(after),
            _parameters(before), _parameters(after), latent,
        )  # fmt: skip


def _cache_bytes(attn: Any) -> int:
    return int(attn.cache_bytes_per_token(next(attn.parameters()).dtype))


def _parameters(attn: nn.Module) -> int:
    return sum(parameter.numel() for parameter in attn.parameters())


@dataclass(frozen=True)
class ModelReport:
    """What became of a model; `str` makes a table of it.

    Attributes:
        mechanism: its name, or "custom" for a function of your own.
        layers: the converted layers, in order.
        chosen: what was chosen by the model's loss: `key_weight`, and the `losses` of its candidates in nats a token.
    """

    mechanism: str
    layers: tuple[LayerReport, ...]
    chosen: Mapping[str, Any]

    @property
    def cache_bytes_before(self) -> int:
        """Bytes of the cache per token, over the converted layers."""
        return sum(layer.cache_bytes_before for layer in self.layers)

    @property
    def cache_bytes_after(self) -> int:
        """The same of the new modules."""
        return sum(layer.cache_bytes_after for layer in self.layers)

    @property
    def params_before(self) -> int:
        """Parameters of the converted layers."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """The same of the new modules."""
        return sum(layer.params_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        sums = ("cache_bytes_before", "cache_bytes_after", "params_before", "params_after")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}

    def __str__(self) -> str:
        latent = any(layer.latent for layer in self.layers)
        rows = [["layer", "from", "to", "cache bytes/token", "parameters", *(["rank", "error"] if latent else [])]]
        for layer in self.layers:
            more = [] if layer.latent is None else [f"{layer.latent.rank}", f"{layer.latent.rel_error:.3f}"]
            rows.append([layer.name, layer.before, layer.after, *_changes(layer), *more])
        rows.append(["all", "", "", *_changes(self)])
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
        ]
        return "\n".join([*(f"{name}: {value}" for name, value in self.chosen.items()), *lines])


def _changes(report: LayerReport | ModelReport) -> tuple[str, str]:
    """Bytes of the cache and parameters, before and after."""
    return (
        f"{report.cache_bytes_before:,} -> {report.cache_bytes_after:,}",
        f"{report.params_before:,} -> {report.params_after:,}",
    )
