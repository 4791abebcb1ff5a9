"""Low-rank approximations of weights in the norm that their inputs and readers give them, and ranks over layers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-12
"""Smallest eigenvalue of a moment, relative to its largest, so that directions without data still have an order."""


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of positive semi-definite (..., n, n), its eigenvalues at least FLOOR."""
    values, vectors = torch.linalg.eigh(moment)
    if not values.numel():
        return moment, moment
    tiny = torch.finfo(values.dtype).tiny ** 0.5
    values = values.maximum((FLOOR * values[..., -1:]).clamp(min=tiny))[..., None, :]
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


@dataclass(frozen=True)
class Weighted:
    """A matrix M (n, E) whose approximation is judged by ||A (M - M_R) S||.

    Attributes:
        matrix: M.
        columns: S (E, E), the root of its inputs' second moment; None for the identity.
        rows: A (n, n) and its inverse; None for the identity.
    """

    matrix: Tensor
    columns: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    def of(self, matrix: Tensor) -> Tensor:
        """A matrix S for a matrix of M's shape."""
        matrix = matrix if self.rows is None else self.rows[0] @ matrix
        return matrix if self.columns is None else matrix @ self.columns

    @property
    def energies(self) -> Tensor:
        """Squared singular values of A M S, descending."""
        values: Tensor = torch.linalg.svdvals(self.of(self.matrix))
        return values.square()

    def truncated(self, rank: int, balance: str) -> tuple[Tensor, Tensor, float, float]:
        """down (rank, E) and up (n, rank) of the best approximation up @ down, its energy and the whole.

        With U the first left singular vectors of A M S, up @ down = A^-1 U U^T A M: no inverse of S is needed.
        balance "up" gives down orthonormal rows; "sqrt" shares the singular values of up @ down.
        """
        u, s, _ = torch.linalg.svd(self.of(self.matrix), full_matrices=False)
        energy, up = s.square(), u[:, :rank]
        if self.rows is None:
            down = up.mT @ self.matrix
        else:
            up, down = self.rows[1] @ up, up.mT @ (self.rows[0] @ self.matrix)
        basis, t = torch.linalg.qr(down.mT)
        u, s, vt = torch.linalg.svd(up @ t.mT, full_matrices=False)
        left, right = (s, torch.ones_like(s)) if balance == "up" else (s.sqrt(), s.sqrt())
        return right[:, None] * (vt @ basis.mT), u * left, float(energy[:rank].sum()), float(energy.sum())


def allocate_ranks(energies: Sequence[Tensor], budget: int, minimum: int = 1) -> list[int]:
    """A rank per layer, `budget` in all: those with the least sum of relative errors.

    Layers whose spectra fall slowly get more, as in CARE (Zhou et al. 2026, arXiv:2603.17946): one rank after another
    goes to the layer whose next singular value removes most. Here that is its share of the layer's energy; the
    authors' code divides by what is left of it instead, and weighs depth and rank.

    Args:
        energies: per layer the squared singular values, descending (`Weighted.energies`).
        budget: sum of the ranks.
        minimum: smallest rank of a layer.

    Raises:
        ValueError: if the budget is below the minimum of all layers, or above all of their singular values.
    """
    shares = [(e / max(float(e.sum()), torch.finfo(e.dtype).tiny)).tolist() for e in energies]
    lowest, highest = minimum * len(shares), sum(map(len, shares))
    if not lowest <= budget <= highest:
        raise ValueError(f"budget must lie between {lowest} and {highest} for {len(shares)} layers, got {budget}")
    ranks = [minimum] * len(shares)
    # What the next rank of each layer removes, largest first.
    gains = [(-share[minimum], layer) for layer, share in enumerate(shares) if len(share) > minimum]
    heapq.heapify(gains)
    for _ in range(budget - lowest):
        _, layer = heapq.heappop(gains)
        ranks[layer] += 1
        if ranks[layer] < len(shares[layer]):
            heapq.heappush(gains, (-shares[layer][ranks[layer]], layer))
    return ranks
