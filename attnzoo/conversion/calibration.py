"""What calibration keeps of a layer's inputs: sums whose size does not depend on the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.rules import describe


class InputStatistics:
    """Second moments of the inputs of one attention layer, and mean norms of its queries' and keys' pairs of features.

    Everything is a sum over tokens in float64: (E + 1)^2 numbers for E-wide inputs, and D / 2 per head for the pairs
    (i, i + D / 2) of a rotation of style "half".

    Args:
        embed_dim: width E of the inputs.
        module: the layer whose pairs are measured, for `rope_select="2-norm"`; None measures none.
        device: where the sums are to be.
    """

    def __init__(
        self, embed_dim: int, module: GroupedQueryAttention | None = None, device: torch.device | str | None = None
    ) -> None:
        self.embed_dim = embed_dim
        self._sums = torch.zeros(embed_dim + 1, embed_dim + 1, dtype=torch.float64, device=device)
        self._module = module
        self._norms: list[Tensor | float] = [0.0, 0.0]

    @classmethod
    def of(cls, x: Tensor, module: GroupedQueryAttention | None = None) -> InputStatistics:
        """Those of x (..., E)."""
        statistics = cls(x.shape[-1], module, x.device)
        statistics.update(x)
        return statistics

    @torch.no_grad()
    def update(self, x: Tensor, real: Tensor | None = None) -> None:
        """Add inputs x (..., E); `real` (...), boolean, is False at padded tokens.

        Raises:
            ValueError: if x has another width, or numbers that are not finite.
        """
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"calib must have width {self.embed_dim}, got {x.shape[-1]}")
        x = x.detach().flatten(0, -2) if real is None else x.detach()[real.to(x.device)]
        x = x.double()
        if not torch.isfinite(x).all():
            raise ValueError("calib must lead to finite inputs of the layer, got infinity or NaN")
        ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1).to(self._sums.device)
        self._sums += ones.mT @ ones
        if self._module is not None:
            for i, linear in enumerate((self._module.q_proj, self._module.k_proj)):
                bias = None if linear.bias is None else linear.bias.double()
                features = torch.nn.functional.linear(x, linear.weight.double(), bias)
                pairs = features.unflatten(-1, (-1, 2, self._module.head_dim // 2))
                self._norms[i] = self._norms[i] + pairs.norm(dim=-2).sum(0)

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return int(self._sums[-1, -1])

    @property
    def moment(self) -> Tensor:
        """Mean of `[x, 1]` times itself, (E + 1, E + 1) in float64: second moments, the mean as last row and column."""
        if not self.tokens:
            raise ValueError("calib must have at least one token, got none")
        return self._sums / self.tokens

    @property
    def pair_norms(self) -> tuple[Tensor, Tensor] | None:
        """Mean norms of the pairs of features of queries (H, D / 2) and of keys (G, D / 2), before the rotation."""
        if self._module is None:
            return None
        queries, keys = (torch.as_tensor(total) / self.tokens for total in self._norms)
        return queries, keys


Calibration = Tensor | InputStatistics
"""Inputs (N, T, E) of a layer, or what was kept of them."""


def statistics_of(calib: Calibration, module: GroupedQueryAttention) -> InputStatistics:
    """Statistics of the inputs of `module`, or those given, checked.

    Raises:
        ValueError: for another shape or width, no token, or a layer that reads two inputs of different widths.
    """
    E = module.embed_dim
    if (module.kdim, module.vdim) != (E, E):
        raise ValueError(f"calib needs kdim and vdim equal to embed_dim {E}, got {module.kdim} and {module.vdim}")
    if isinstance(calib, InputStatistics):
        if calib.embed_dim != E:
            raise ValueError(f"calib must have width {E}, got {calib.embed_dim}")
        return calib
    if not isinstance(calib, Tensor):
        raise ValueError(f"calib must be a tensor (N, T, {E}) or InputStatistics, got {describe(calib)}")
    if calib.ndim != 3 or calib.shape[-1] != E:
        raise ValueError(f"calib must have shape (N, T, {E}), got {tuple(calib.shape)}")
    return InputStatistics.of(calib.to(module.o_proj.weight.device), None if module.head_dim % 2 else module)
