"""The linear forms of multi-head latent attention, multiplied through its bottlenecks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.modules.base import Factors, Mechanism
from attnzoo.ops.submodules import matrix_of
from attnzoo.rules import check, one_of


class LatentCircuits(Mechanism):
    """The part of `MultiHeadLatentAttention` that diagnostics ask, which describes the attributes."""

    factored_circuits = True
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    rope_kv_heads: int
    rope_mode: str
    q_a_proj: nn.Linear
    q_a_layernorm: nn.RMSNorm
    q_b_proj: nn.Linear
    kv_a_proj: nn.Linear
    kv_a_proj_with_mqa: nn.Linear
    kv_a_layernorm: nn.RMSNorm | None
    kv_b_proj: nn.Linear

    def rope_slots(self) -> list[int]:
        """Which rotary key each query head reads."""
        return [head // self.heads.group_size if self.rope_kv_heads > 1 else 0 for head in self.heads.kept]

    def qk_circuit(self, part: str = "full") -> Factors:
        """Per query head the factors (WQ_h, WK_h), each (d, E), of the logits' bilinear form at offset 0.

        Norm gains are folded in; RMS statistics and biases are left out. part: "full", the expanded features
        "nope" or the shared key's features "rope".
        """
        nope = self.qk_nope_head_dim
        parts = {"full": slice(None), "nope": slice(nope), "rope": slice(nope, None)}
        check("part", part, one_of(*parts, words="be 'full', 'nope' or 'rope'"))
        if part != "full" and not self.qk_rope_head_dim:
            raise ValueError(f"part must be 'full' for a module without a rotary key of its own, got {part!r}")
        wq, (key, _), (down, rope) = self.query_weights(), self.expansion_weights(), self.compression_weights()
        keys = [
            torch.cat([key[g] @ down, rope[slot]]) for g, slot in zip(self.heads.reads, self.rope_slots(), strict=True)
        ]
        return [(q[parts[part]], k[parts[part]]) for q, k in zip(wq, keys, strict=True)]

    def value_weights(self) -> Tensor:
        """Value weights (G, Dv, kdim) per head through the latent, its norm's gain included; detached."""
        return self.expansion_weights()[1] @ self.compression_weights()[0]

    def query_weights(self) -> Tensor:
        """Query weights per head, (H, dn + dr, E), through the queries' bottleneck if there is one; detached."""
        if self.q_lora_rank is None:
            weight = matrix_of(self.q_proj)
        else:
            weight = (matrix_of(self.q_b_proj) * self.q_a_layernorm.weight.detach()) @ matrix_of(self.q_a_proj)
        return weight.view(self.num_heads, self.head_dim, self.embed_dim)

    def expansion_weights(self) -> tuple[Tensor, Tensor]:
        """Wuk (G, dn, R) and Wuv (G, Dv, R) with the latent norm's gain, detached."""
        weight = matrix_of(self.kv_b_proj)
        weight = weight if self.kv_a_layernorm is None else weight * self.kv_a_layernorm.weight.detach()
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        key, value = weight.view(self.num_kv_heads, sum(widths), self.kv_lora_rank).split(widths, 1)
        return key, value

    def compression_weights(self) -> tuple[Tensor, Tensor]:
        """Matrices (R, kdim) of the latent and (Gr, dr, kdim) of the rotary keys, detached."""
        if self.rope_mode == "pre":
            kv = [matrix_of(linear).unflatten(0, (self.heads.total, -1)) for linear in (self.k_proj, self.v_proj)]
            down = matrix_of(self.kv_a_proj) @ torch.cat(kv, dim=1).flatten(0, 1)
            return down, down.new_zeros(self.rope_kv_heads, 0, self.kdim)
        weight = matrix_of(self.kv_a_proj_with_mqa)
        return weight[: self.kv_lora_rank], weight[self.kv_lora_rank :].view(self.rope_kv_heads, -1, self.kdim)
