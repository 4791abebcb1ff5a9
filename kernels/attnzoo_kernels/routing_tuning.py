"""Tile sizes of the kernels of routed heads and of experts; `tuning.pinned` overrides them.

Architectures are those of `tuning`. Chosen by what the compilers report: large tiles within the shared memory and with
few instructions, few or no spilled registers. None has been timed on a GPU yet.
"""

from __future__ import annotations

import torch

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Config

# (architecture, bytes of an element) -> width of a head, after padding: the first line that is as wide serves.
Widths = dict[int, Config]
TABLE: dict[str, dict[tuple[str, int], Widths]] = {
    "head_routing_fwd": {
        ("hopper", 2): {64: Config(128, 64, 4, 3), 128: Config(128, 128, 8, 2), 256: Config(64, 32, 8, 2)},
        ("cuda", 2): {64: Config(64, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("cuda", 4): {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 2), 256: Config(16, 16, 8, 1)},
        ("hip", 2): {64: Config(128, 64, 4, 1), 128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
        ("hip", 4): {64: Config(64, 32, 4, 1), 128: Config(32, 32, 4, 1), 256: Config(32, 16, 4, 1)},
    },
    "head_routing_bwd_dkdv": {
        ("hopper", 2): {128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 1)},
        ("cuda", 2): {64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1)},
        ("hip", 2): {64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(32, 32, 4, 1)},
        ("hip", 4): {64: Config(32, 32, 4, 1), 128: Config(32, 32, 4, 1), 256: Config(16, 16, 4, 1)},
    },
    "head_routing_bwd_dq": {
        ("hopper", 2): {128: Config(128, 64, 8, 2), 256: Config(64, 32, 4, 2)},
        ("cuda", 2): {128: Config(128, 32, 8, 2), 256: Config(32, 32, 8, 1)},
        ("cuda", 4): {64: Config(32, 32, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2)},
        ("hip", 2): {64: Config(64, 64, 4, 1), 128: Config(64, 32, 4, 1), 256: Config(32, 32, 4, 1)},
        ("hip", 4): {64: Config(32, 32, 4, 1), 128: Config(32, 16, 4, 1), 256: Config(16, 16, 4, 1)},
    },
    # Tiles of BLOCK_T rows by BLOCK_S columns; whatever the width.
    "expert_projection_rows": {
        ("cuda", 2): {0: Config(128, 128, 8, 3)},
        ("cuda", 4): {0: Config(64, 64, 4, 2)},
        ("hip", 2): {0: Config(128, 128, 8, 1)},
        ("hip", 4): {0: Config(64, 64, 4, 1)},
    },
    "expert_projection_bwd_weights": {
        ("cuda", 2): {0: Config(128, 128, 8, 3)},
        ("cuda", 4): {0: Config(64, 64, 4, 2)},
        ("hip", 2): {0: Config(128, 128, 8, 1)},
        ("hip", 4): {0: Config(64, 64, 4, 1)},
    },
}


def config(kernel: str, dtype: torch.dtype, device: torch.device, width: int = 0) -> Config:
    """The configuration of a kernel in that dtype for heads of that width, padded."""
    chosen = tuning._PINNED.get()
    if chosen is not None:
        return chosen
    lines = tuning.lines_for(TABLE[kernel], dtype, device)
    return next(line for widest, line in lines.items() if width <= widest)
