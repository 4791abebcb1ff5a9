"""Tile sizes of sigmoid attention: those of softmax attention, whose kernels hold the same tiles and more numbers."""

from __future__ import annotations

from attnzoo_kernels.softmax_attention.tuning import LINES
from attnzoo_kernels.tuning import Table

TABLE = Table(
    ("BLOCK_T", "BLOCK_S"),
    {
        name.replace("softmax", "sigmoid"): lines
        for name, lines in LINES.items()
        if name.removesuffix(" dense")
        in ("softmax_attention_fwd", "softmax_attention_bwd_dkdv", "softmax_attention_bwd_dq")
    },
)
