"""A small network over the score maps of all pairs of a query head and a key head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# torch.compile before 2.12 loses the fields of a frozen one that is called.
@dataclass(eq=False)
class Interaction:
    """The inner- and cross-subspace interaction of arXiv:2212.10197 at one pair (t, s), from H^2 maps to N.

        hidden_ia = relu(sum_j inner_ij a_ij + bias)            a = 1 .. A, for each query head i
        Z_n = sum_ia cross_n,ia hidden_ia                        with one layer of each
        one_i = sum_a out_ia hidden_ia + bias                    with two:
        Z_n = sum_c last_nc relu(sum_i cross_ci one_i + bias)

    Attributes:
        isi_w1: (H, A, H).
        isi_b1: (H, A), or None.
        isi_w2: (H, A), or None for one layer of each.
        isi_b2: (H,), or None.
        csi_w1: (C, H), or (N, H A) for one layer of each.
        csi_b1: (C,), or None.
        csi_w2: (N, C), or None for one layer of each.
    """

    isi_w1: Tensor
    isi_b1: Tensor | None
    isi_w2: Tensor | None
    isi_b2: Tensor | None
    csi_w1: Tensor
    csi_b1: Tensor | None
    csi_w2: Tensor | None

    def at(self, queries: slice, keys: slice | Tensor) -> Interaction:  # noqa: ARG002
        """The part that a tile of the scores needs: it is the same everywhere."""
        return self

    def heads_after(self, heads: int) -> int:  # noqa: ARG002
        """How many maps come out."""
        return (self.csi_w1 if self.csi_w2 is None else self.csi_w2).shape[0]

    def __call__(self, a: Tensor) -> Tensor:
        """a (B, H H, t, s), map j H + i of key head j and query head i -> (B, N, t, s)."""
        heads = self.isi_w1.shape[0]
        maps = a.unflatten(1, (heads, heads))
        hidden = torch.einsum("bjits,iaj->biats", maps, self.isi_w1.to(a.dtype))
        hidden = F.relu(_plus(hidden, self.isi_b1))
        if self.isi_w2 is None or self.csi_w2 is None:
            return torch.einsum("bmts,nm->bnts", hidden.flatten(1, 2), self.csi_w1.to(a.dtype))
        one = _plus(torch.einsum("biats,ia->bits", hidden, self.isi_w2.to(a.dtype)), self.isi_b2)
        hidden = F.relu(_plus(torch.einsum("bits,ci->bcts", one, self.csi_w1.to(a.dtype)), self.csi_b1))
        return torch.einsum("bcts,nc->bnts", hidden, self.csi_w2.to(a.dtype))

    @torch.no_grad()
    def reset(self, init: str, heads: Sequence[int]) -> None:
        """Draw all of it again.

        Args:
            init: "default" (uniform within 1 / sqrt(fan-in)), or "mha" (map n is the score of query head and key head
                heads[n]: x = relu(x) - relu(-x) through every layer).
            heads: the maps that come out, N of them, by the numbers of their heads.
        """
        H, A = self.isi_w1.shape[:2]
        sources = {self.isi_w1: H, self.isi_b1: H, self.isi_w2: A, self.isi_b2: A, self.csi_b1: H}
        sources |= {self.csi_w1: self.csi_w1.shape[1], self.csi_w2: self.csi_w1.shape[0]}
        for parameter, fan_in in sources.items():
            if parameter is not None:
                bound = 0.0 if init == "mha" else fan_in**-0.5
                nn.init.uniform_(parameter, -bound, bound)
        if init != "mha":
            return
        for i in range(H):
            self.isi_w1[i, :2, i] = _pair(self.isi_w1)
            if self.isi_w2 is not None:
                self.isi_w2[i, :2] = _pair(self.isi_w2)
                self.csi_w1[2 * i : 2 * i + 2, i] = _pair(self.csi_w1)
        last, step = (self.csi_w1, A) if self.csi_w2 is None else (self.csi_w2, 2)
        for n, i in enumerate(heads):
            last[n, step * i : step * i + 2] = _pair(last)


def _pair(like: Tensor) -> Tensor:
    return like.new_tensor([1.0, -1.0])


def _plus(maps: Tensor, bias: Tensor | None) -> Tensor:
    return maps if bias is None else maps + bias.to(maps.dtype)[..., None, None]
