"""A short convolution along time, of each feature of a head by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.precision import without_autocast


class CausalConvolution(nn.Module):
    """y_t = b + sum_j w_j z_{t-(K-1)+j}, j = 0 .. K-1, with filters for the D features that all heads share.

    Attributes:
        weight: (D, 1, K); starts as that of torch.nn.Conv1d with D groups.
        bias: (D,).
    """

    def __init__(
        self, width: int, kernel_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(K)."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, z: Tensor, before: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """z (B, T, H, D) -> the same, computed in float32 or float64.

        Args:
            z: its input.
            before: at most K - 1 rows (B, P, H, D) that came before z. Zeros come before those.
            places: (B, T) place of each token in its document, before whose start there are zeros. Default: one
                document.
        """
        T, K = z.shape[1], self.weight.shape[2]
        compute_dtype = torch.promote_types(z.dtype, torch.float32)
        with without_autocast(z):
            rows = (z if before is None else torch.cat([before, z], 1)).to(compute_dtype)
            rows = F.pad(rows, (0, 0, 0, 0, K - 1 + T - rows.shape[1], 0))
            taps = self.weight.to(compute_dtype)[:, 0]
            out = self.bias.to(compute_dtype) + rows[:, K - 1 :] * taps[:, K - 1]
            for back in range(1, K):
                term = rows[:, K - 1 - back : K - 1 - back + T] * taps[:, K - 1 - back]
                out = out + (term if places is None else term.where((places >= back)[..., None, None], 0))
            return out.to(z.dtype)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}"
