"""Widths of multi-head latent attention, from what was given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from attnzoo.rotary import Frequencies, Rotary, as_rotary, frequency_rows
from attnzoo.rules import check, check_options, check_sizes, one_of

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
        cls, nope: int, mode: str, rope: Rotary | None, rank: int | None, rotary: int | None, value: int | None
    ) -> LatentSizes:
        """Check what was given and fill in the rest; see `MultiHeadLatentAttention` for the rules."""
        check("rope_mode", mode, one_of(*ROPE_MODES))
        check_options(qk_rope_head_dim=rotary)
        check_sizes(qk_nope_head_dim=nope)
        rope = as_rotary(rope)
        if rope is None and mode == "pre":
            raise ValueError("rope must be given with rope_mode 'pre', got None")
        mode, rope = ("none", None) if rope is None or mode == "none" else (mode, rope)
        if mode != "decoupled" and rotary not in (None, 0):
            raise ValueError(f"qk_rope_head_dim must not be given with rope_mode {mode!r}, got {rotary}")
        rank, value = 4 * nope if rank is None else rank, nope if value is None else value
        check_sizes(kv_lora_rank=rank, v_head_dim=value)
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

    def frequencies(self, given: Tensor | Frequencies | None, rope_kv_heads: int) -> Frequencies | None:
        """Frequencies of each rotary key as numbers."""
        if given is not None and self.mode != "decoupled":
            raise ValueError(f"rope_inv_freq needs rope_mode 'decoupled', got {self.mode!r}")
        if given is not None and self.rope is not None and self.rope.scaling is not None:
            raise ValueError(f"rope_inv_freq needs a rope without scaling, which would have no effect, got {self.rope}")
        return None if given is None else frequency_rows("rope_inv_freq", given, (rope_kv_heads, self.rotary // 2))


def check_latent_options(
    sizes: LatentSizes, H: int, G: int, rope_kv_heads: int, q_lora_rank: int | None, q_bias: bool
) -> None:
    """Refuse what `MultiHeadLatentAttention` does not take."""
    check_sizes(q_lora_rank=1 if q_lora_rank is None else q_lora_rank, rope_kv_heads=rope_kv_heads)
    if q_bias and q_lora_rank is not None:
        raise ValueError(f"q_bias needs q_lora_rank=None: it is that of q_proj, got True and q_lora_rank {q_lora_rank}")
    if rope_kv_heads not in (1, G):
        raise ValueError(f"rope_kv_heads must be 1 or num_kv_heads {G}, got {rope_kv_heads}")
    if sizes.mode == "none" and rope_kv_heads > 1:
        raise ValueError(f"rope_kv_heads must be 1 without a rotation, got {rope_kv_heads}")
    if sizes.mode == "pre" and (G < H or rope_kv_heads > 1):
        raise ValueError(
            f"num_kv_heads and rope_kv_heads must be left alone with rope_mode 'pre', got {G} and {rope_kv_heads}"
        )


def yarn_factor(rope: Rotary | None) -> float:
    """m^2 with m = 0.1 mscale_all_dim ln(factor) + 1, the factor that DeepSeek's yarn puts on the scores."""
    if rope is None or rope.scaling is None or rope.kind != "yarn":
        return 1.0
    factor, weight = rope.scaling_factor, rope.scaling.get("mscale_all_dim") or 0.0
    m: float = 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
    return m * m
