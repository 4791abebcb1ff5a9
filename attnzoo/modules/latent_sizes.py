"""Widths of multi-head latent attention, from what was given."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.modules.checks import check_sizes
from attnzoo.rotary import Rotary

ROPE_MODES = ("decoupled", "pre", "none")


@dataclass(frozen=True)
class LatentSizes:
    """Widths of the latent, of the expanded key, the rotary key and the value, and how positions enter."""

    rank: int
    nope: int
    rotary: int
    value: int
    mode: str
    rope: Rotary | None

    @classmethod
    def derive(
        cls,
        nope: int,
        mode: str,
        rope: Rotary | None,
        rank: int | None,
        rotary: int | None,
        value: int | None,
    ) -> LatentSizes:
        """Check what was given and fill in the rest; see `MultiHeadLatentAttention` for the rules."""
        if mode not in ROPE_MODES:
            raise ValueError(f"rope_mode must be one of {', '.join(map(repr, ROPE_MODES))}, got {mode!r}")
        if rope is None and mode == "pre":
            raise ValueError("rope must be given with rope_mode 'pre', got None")
        mode, rope = ("none", None) if rope is None or mode == "none" else (mode, rope)
        if mode != "decoupled" and rotary not in (None, 0):
            raise ValueError(f"qk_rope_head_dim must not be given with rope_mode {mode!r}, got {rotary}")
        rank, value = 4 * nope if rank is None else rank, nope if value is None else value
        check_sizes(qk_nope_head_dim=nope, kv_lora_rank=rank, v_head_dim=value)
        if rope is None:
            return cls(rank, nope, 0, value, mode, None)
        if mode == "pre":
            if nope % 2 or rope.width(nope) != nope:
                raise ValueError(
                    f"qk_nope_head_dim must be even and all of it rotated with rope_mode 'pre', got {nope} and {rope}"
                )
            return cls(rank, nope, 0, value, mode, rope)
        rotary = max(2, nope // 4 * 2) if rotary is None else rotary
        if rotary < 2 or rotary % 2:
            raise ValueError(f"qk_rope_head_dim must be even and at least 2, got {rotary}")
        if rope.dim not in (None, rotary):
            raise ValueError(f"rope.dim must equal qk_rope_head_dim, got {rope.dim} and {rotary}")
        return cls(rank, nope, rope.width(rotary), value, mode, rope)
