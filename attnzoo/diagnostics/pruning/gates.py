"""Gates that learn which heads to keep: L0 regularisation with hard concrete variables.

"Analyzing Multi-Head Self-Attention" (Voita et al. 2019, arXiv:1905.09418), after Louizos et al. 2018
(arXiv:1712.01312).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.pruning.masks import head_slots, masked_heads
from attnzoo.rules import NUMBER, check, check_sizes, describe


class HeadGates(nn.Module):
    """A gate g in [0, 1] for every head of a model, to be trained with it; start from a trained model.

        u ~ Uniform(eps, 1 - eps)                                             one per head and step
        training  g = clip(sigmoid((log u - log(1 - u) + a) / temperature) (high - low) + low, 0, 1)
        else      g = clip(sigmoid(a) (high - low) + low, 0, 1)               without temperature, as the authors' code
        p_open    = clip(sigmoid(a - temperature log(-low / high)), eps, 1 - eps)
        penalty   = mean over layers of sum_h p_open

    A training step is

        with gates.applied(model):
            loss = task_loss(model, batch) + coef * gates.penalty()

    with gates.parameters() in the optimiser; coef about 0.01 to 0.1 sets how many heads stay. In the end
    `prune_heads(model, gates.closed())` removes heads whose gate is 0.

    Args:
        num_layers: L.
        num_heads: H.
        init: start of log_alpha (a): 2.0 opens the gates.
        low, high: ends of the stretched interval, below 0 and above 1.
        temperature: of the concrete distribution.
        eps: distance of u and p_open from 0 and 1.

    Raises:
        ValueError: for a size below 1, or an argument outside its rule.
    """

    def __init__(
        self, num_layers: int, num_heads: int, *, init: float = 2.0, low: float = -0.1, high: float = 1.1,
        temperature: float = 0.33, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        num_layers, num_heads = check_sizes(num_layers=num_layers, num_heads=num_heads)
        for name, value in (("init", init), ("low", low), ("high", high), ("temperature", temperature), ("eps", eps)):
            check(name, value, NUMBER)
        if not low < 0:
            raise ValueError(f"low must be negative, got {low}")
        if not high > 1:
            raise ValueError(f"high must be above 1, got {high}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 < eps < 0.5:
            raise ValueError(f"eps must lie between 0 and 0.5, got {eps}")
        self.low, self.high, self.temperature, self.eps = low, high, temperature, eps
        self.log_alpha = nn.Parameter(torch.full((num_layers, num_heads), float(init)))

    @classmethod
    def for_model(cls, model: nn.Module, *, init: float = 2.0, temperature: float = 0.33) -> HeadGates:
        """Gates for all heads that `attention_layers` finds in a model."""
        return cls(*head_slots(model).shape, init=init, temperature=temperature)

    def forward(self, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Gates (L, H): sampled in training mode, else at their mean noise.

        Args:
            noise: u (L, H) in (0, 1) instead of a draw.
            generator: draws u.
        """
        a: Tensor = self.log_alpha
        if self.training or noise is not None:
            if noise is None:
                u = torch.empty_like(a).uniform_(self.eps, 1 - self.eps, generator=generator)
            elif not isinstance(noise, Tensor) or not noise.is_floating_point():
                raise ValueError(f"noise must be a floating-point tensor, got {describe(noise)}")
            elif tuple(noise.shape) != tuple(a.shape):
                raise ValueError(f"noise must have shape {tuple(a.shape)}, got {tuple(noise.shape)}")
            else:
                u = noise.to(a)
            a = (u.log() - (1 - u).log() + a) / self.temperature
        return (a.sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)

    def p_open(self) -> Tensor:
        """Probability that a gate is not 0, (L, H)."""
        shift = self.temperature * math.log(-self.low / self.high)
        return (self.log_alpha - shift).sigmoid().clamp(self.eps, 1 - self.eps)

    def penalty(self) -> Tensor:
        """Expected number of open heads of a layer, averaged over layers."""
        return self.p_open().sum(1).mean()

    @contextmanager
    def applied(
        self, model: nn.Module, noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Multiply the model's head outputs by gates drawn once for the context; yields them."""
        gates: Tensor = self(noise, generator=generator)
        with masked_heads(model, gates):
            yield gates

    @torch.no_grad()
    def closed(self) -> dict[int, list[int]]:
        """Heads whose gate is 0 outside training, by layer, as `prune_heads` takes them."""
        gates = (self.log_alpha.sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)
        return {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(gates == 0) if bool(row.any())}

    def extra_repr(self) -> str:
        """The sizes and the distribution."""
        L, H = self.log_alpha.shape
        return f"{L}, {H}, low={self.low}, high={self.high}, temperature={self.temperature}"
