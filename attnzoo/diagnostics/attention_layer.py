"""An attention layer of a model with the weights of its heads, and how one of plain grouped heads is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnzoo.diagnostics.layer_probe import rotated_features, verified
from attnzoo.diagnostics.projections import ProjectionError, Reader, blank, matrix
from attnzoo.modules.heads import HeadLayout
from attnzoo.modules.protocol import AttentionMechanism

Factors = list[tuple[Tensor, Tensor]]
Weights = tuple[Tensor, Tensor, Tensor]
"""Of queries (H D, E), keys (G D, E) and values (G Dv, E), rows head by head."""


class NoPartError(ValueError):
    """A layer has no features of the part of its factors that was asked for."""


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention module of a model.

    Attributes:
        name: qualified name inside the model; "" if the model is the module.
        index: index among the model's attention layers, in the order in which modules are registered.
        module: the attention module.
        num_heads: heads H whose outputs the output projection reads.
        num_kv_heads: key/value heads G.
        head_dim: width D of queries and keys.
        v_head_dim: width Dv of values.
        projection: the output projection, whether or not hooks fire on it; see `output`.
        family: which entry of the table found it.
        obstacle: why hooks at the output projection do not work, or None.
        heads: the original numbers of the heads, and which key/value head each of them reads.
    """

    name: str
    index: int
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    projection: nn.Module = field(repr=False)
    family: str
    obstacle: str | None = field(default=None, repr=False)
    heads: HeadLayout = field(kw_only=True, repr=False)
    _qk: Callable[[str], Factors] = field(kw_only=True, repr=False)
    _ov: Callable[[], Factors] = field(kw_only=True, repr=False)

    @property
    def mechanism(self) -> AttentionMechanism | None:
        """The module if it is a mechanism of this library and was read as one, else None."""
        return cast("AttentionMechanism", self.module) if self.family == "attnzoo" else None

    @property
    def output(self) -> nn.Module:
        """The module whose input is (B, T, H Dv), head by head: what a forward pre-hook reads, scales or replaces.

        Raises:
            ValueError: if the module never calls it, so that a hook would silently do nothing.
        """
        if self.obstacle is not None:
            raise ValueError(f"layer {self.name!r} takes no hooks on its heads: {self.obstacle}")
        return self.projection

    def hook_heads(self, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call function with the head outputs (B, T, H, Dv) before the output projection; it may return others.

        Raises:
            ValueError: as `output`.
        """

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            heads = inputs[0].unflatten(-1, (self.num_heads, self.v_head_dim))
            changed = function(heads)
            return None if changed is None else (changed.flatten(-2), *inputs[1:])

        return self.output.register_forward_pre_hook(hook)

    def qk_factors(self, part: str = "full") -> Factors:
        """Per query head (WQ_h (d, E), WK_h (d, E)), detached; the logits' form at offset 0 is WQ_h^T WK_h.

        Norm gains are folded in; scales, biases and RMS statistics are left out. Heads that are mixed give their
        factors before the mix, and mixtures of experts one pair for each head of each expert.

        Args:
            part: "full", or of a layer with rotary positions their features "rope" or the rest, "nope".

        Raises:
            ValueError: for an unknown part, one that the layer has no features of, or a layer that cannot be read.
        """
        factors = self._read(lambda: self._qk(part))
        if any(query.shape[0] == 0 for query, _ in factors):
            raise NoPartError(f"part must be one that layer {self.name!r} has features of, got {part!r}")
        return factors

    def ov_factors(self) -> Factors:
        """Per query head (WV_h (Dv, E), WO_h (E, Dv)), detached: a value's way into the output is WO_h WV_h.

        Biases, gates, norms of outputs, nonlinear head maps and head mixing are left out; mixtures of experts give
        one pair for each head of each expert.

        Raises:
            ValueError: for a layer that cannot be read.
        """
        return self._read(self._ov)

    def _read(self, factors: Callable[[], Factors]) -> Factors:
        try:
            return factors()
        except ProjectionError as error:
            raise ValueError(f"layer {self.name!r} cannot be read: {error}") from None


def layer_of(
    name: str,
    index: int,
    module: nn.Module,
    family: str,
    projection: nn.Module,
    weights: Callable[[], Weights] | Sequence[Callable[[], Weights]],
    *,
    num_heads: int,
    num_kv_heads: int,
    rope_dim: int = 0,
    obstacle: str | None = None,
) -> AttentionLayer:
    """A layer of plain grouped heads, query head h reading key/value head h // (H / G).

    Args:
        name: qualified name of the module.
        index: index among the attention layers.
        module: the attention module.
        family: name of the family.
        projection: the output projection, a linear layer (H Dv) -> E, a transformers Conv1D, or one that wraps them.
        weights: gives the query (H D, E), key (G D, E) and value (G Dv, E) weights, rows head by head. Several of them
            are guesses: when factors are asked for, the module is run alone on a random token, the first one that it
            computes with is taken, and the gains of norms of queries and keys are folded in.
        num_heads: H.
        num_kv_heads: G.
        rope_dim: width of a head's rotated features, which come first; with guesses that of the rotary tables, and the
            module is run to see what it rotates.
        obstacle: see `AttentionLayer`.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    known = callable(weights)

    def layout(own: Callable[[], Weights]) -> Callable[[Reader], Weights]:
        return lambda _: own()

    layouts = [layout(own) for own in ([weights] if callable(weights) else weights)]
    return grouped_layer(
        name, index, module, family, projection, layouts, num_heads, num_kv_heads, rope_dim, obstacle=obstacle,
        known=known,
    )  # fmt: skip


def grouped_layer(
    name: str, index: int, module: nn.Module, family: str, projection: nn.Module,
    layouts: Sequence[Callable[[Reader], Weights]], num_heads: int, num_kv_heads: int, rope_dim: int = 0, *,
    obstacle: str | None = None, known: bool = False,
) -> AttentionLayer:  # fmt: skip
    """`layer_of` of weights that are made by reading projections; known ones are taken without running the module."""
    query, key, value = layouts[0](blank)
    inputs = blank(projection).shape[1]
    rows = (query.shape[0], key.shape[0], value.shape[0])
    fits = num_heads > 0 and num_kv_heads > 0 and num_heads % num_kv_heads == 0
    fits = fits and rows[0] % num_heads == 0 and rows[1] % num_kv_heads == 0 and rows[2] % num_kv_heads == 0
    if not fits or rows[0] // num_heads != rows[1] // num_kv_heads or (
        inputs != num_heads * (rows[2] // num_kv_heads)
    ):  # fmt: skip
        raise ValueError(
            f"layer {name!r} does not fit family {family!r}: its query, key and value weights have {rows} rows and its "
            f"output projection {inputs} inputs, for {num_heads} query and {num_kv_heads} key/value heads"
        )
    reads = [h * num_kv_heads // num_heads for h in range(num_heads)]

    def read() -> Weights:
        if known:
            return layouts[0](matrix)
        guesses = [functools.partial(layout, matrix) for layout in layouts]
        return verified(name, module, projection, guesses, num_heads, num_kv_heads)

    def features(part: str, query: Tensor) -> Tensor | slice:
        """Which features of a head are of this part."""
        if part == "full":
            return slice(None)
        if part not in ("rope", "nope"):
            raise ValueError(f"part must be 'full', 'rope' or 'nope', got {part!r}")
        turned = torch.arange(query.shape[0] // num_heads, device=query.device) < rope_dim
        if not known:
            seen = rotated_features(module, query, num_heads, rope_dim)
            if seen is None:
                raise ValueError(
                    f"part must be 'full' for layer {name!r}, since {type(module).__name__} does not show what it "
                    f"rotates, got {part!r}"
                )
            turned = seen
        if part == "rope" and not bool(turned.any()):
            raise NoPartError(f"part must be 'full' for a layer without rotary features, got {part!r} for {name!r}")
        return turned if part == "rope" else ~turned

    def qk(part: str) -> Factors:
        wq, wk, _ = (w.detach() for w in read())
        kept = features(part, wq)
        wq, wk = wq.reshape(num_heads, -1, wq.shape[1]), wk.reshape(num_kv_heads, -1, wk.shape[1])
        wq, wk = wq[:, kept], wk[:, kept]
        return [(wq[h], wk[g]) for h, g in enumerate(reads)]

    def ov() -> Factors:
        value = read()[2].detach()
        value = value.reshape(num_kv_heads, -1, value.shape[1])
        width, out = value.shape[1], matrix(projection).detach()
        return [(value[g], out[:, h * width : (h + 1) * width]) for h, g in enumerate(reads)]

    # Pruning leaves its layout on the module.
    layout = getattr(module, "attnzoo_heads", HeadLayout.of(num_heads, num_kv_heads))
    return AttentionLayer(
        name, index, module, num_heads, num_kv_heads, rows[0] // num_heads, rows[2] // num_kv_heads, projection,
        family, obstacle, heads=layout, _qk=qk, _ov=ov,
    )  # fmt: skip
