"""Token shift: each token's keys and values mixed with those of the token before."""

from __future__ import annotations

import torch
from torch import Tensor


def without_padding(z: Tensor, real: Tensor | None) -> Tensor:
    """States z (B, T, G, D) with zeros where real (B, T) says that there is no token."""
    return z if real is None else z.where(real[..., None, None], 0)


def token_shift(z: Tensor, share: Tensor, before: Tensor | None = None, places: Tensor | None = None) -> Tensor:
    """share_t z_(t-1) + (1 - share_t) z_t, (B, T, G, D).

    Args:
        z: states (B, T, G, D).
        share: of the previous token, (B, T, G).
        before: the state before the first token, (B, 1, G, D). Default: zeros.
        places: (B, T) place of each token in its document, before whose start there are zeros. Default: one document.
    """
    first = z.new_zeros(z.shape[0], 1, *z.shape[2:]) if before is None else before
    previous = torch.cat([first, z], 1)[:, : z.shape[1]]
    if places is not None:
        previous = previous.where((places > 0)[..., None, None], 0)
    share = share.to(z.dtype)[..., None]
    return share * previous + (1 - share) * z
