"""Complex multi-head attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Factors
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import keep_entries
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import local
from attnzoo.rotary import Rotary
from attnzoo.rules import NUMBER, POSITIVE, check, check_options, one_of


class ComplexAttention(GroupedQueryAttention):
    """Complex multi-head attention of ComplexFormer (Shao et al. 2025, arXiv:2505.10222). Experimental.

    The authors withdrew the paper; what is here follows their code. A head's queries and keys are D / 2 complex numbers
    |q| e^(i phi), feature i the real and feature i + D / 2 the imaginary part. Each head scales the difference of their
    angles and shifts it before positions turn it as a rotary embedding does:

        s_mn = scale sum_i |q_m,i| |k_n,i| cos(phase_scale_i (phi_q - phi_k) + phase_bias_i + (m - n) g_i)
        g_i = theta^(-2i / D)

    The cosine of a difference splits, so this is softmax attention of mapped queries and keys:

        q' = |q| e^(i (phase_scale phi_q + phase_bias + m g)),    k' = |k| e^(i (phase_scale phi_k + n g))

    phase_scale = 1 and phase_bias = 0, the start, are rotary attention. Keys shared by a group are mapped for each of
    its query heads, and cached so. Angles are computed in float32 or float64.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head, even. Default: E / H.
        rope: positions' frequencies, or None; of the whole head and in style "half", as the parts are stored.
        rope_theta: shorthand for the base of these frequencies.
        softmax_scale: factor of the scores: 1 in the authors' code, D ** -0.5 elsewhere.
        eps: added to the squared moduli.
        phase_init: start of phase_scale: "identity" (1) or "official" (normal, std (D / 2) ** -0.5).
        bias: whether the projections have one.
        options: v_head_dim, kdim, vdim, o_bias, sliding_window, sink_tokens, sink, logit_softcap, causal, dropout,
            init, init_std, backend, device and dtype, as in `GroupedQueryAttention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        rope_theta: float | None = None,
        softmax_scale: float = 1.0,
        eps: float = 1e-9,
        phase_init: str = "identity",
        bias: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        for name, only in (("scale", None), ("qk_norm", False), ("alibi", False)):
            if (given := options.pop(name, only)) is not only:
                raise ValueError(f"{name} is not an option of ComplexAttention, got {given!r}")
        check_options(eps=eps)
        check("softmax_scale", softmax_scale, (*NUMBER, (lambda value: value != 0, "not be 0")))
        check("phase_init", phase_init, one_of("identity", "official", words="be 'identity' or 'official'"))
        if rope_theta is not None:
            check("rope_theta", rope_theta, POSITIVE)
            if not isinstance(rope, Rotary):
                raise ValueError(f"rope_theta needs rope, got {rope_theta} and rope={rope!r}")
            rope = replace(rope, theta=rope_theta)
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, rope=rope, scale=softmax_scale, bias=bias, **options
        )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.rope is not None and (self.rope.style != "half" or self.rope_dim != self.head_dim):
            raise ValueError(
                f"rope must turn the whole head in style 'half': imaginary parts are the second half, got {self.rope}"
            )
        self.eps = eps
        self.phase_init = phase_init
        like = self.q_proj.weight
        self.phase_scale = nn.Parameter(like.new_empty(num_heads, self.head_dim // 2))
        self.phase_bias = nn.Parameter(like.new_empty(num_heads, self.head_dim // 2))
        self._reset_phases()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: as the base's; phase_bias 0, phase_scale as phase_init says."""
        super().reset_parameters(std, out_std)
        if "phase_scale" in self._parameters:
            self._reset_phases()

    def _reset_phases(self) -> None:
        nn.init.zeros_(self.phase_bias)
        if self.phase_init == "identity":
            nn.init.ones_(self.phase_scale)
        else:
            nn.init.normal_(self.phase_scale, std=(self.head_dim // 2) ** -0.5)

    def no_weight_decay(self) -> set[str]:
        """The phases: decay would pull them to 0 and not to their start."""
        return {"phase_scale", "phase_bias"}

    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        q = self.turn(q, local(self.phase_bias))
        k = self.turn(self.of_each_query_head(k))
        q, k = call.rotate(q, k)
        with call.remember(k, v) as (k, v):
            out = softmax_attention(
                q, k, self.of_each_query_head(v), call.view, bias=call.bias, **self.score_options(q.device)
            )
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def turn(self, z: Tensor, shift: Tensor | None = None) -> Tensor:
        """|z| e^(i (phase_scale angle(z) + shift)) of z (B, T, H, D), before positions."""
        re, im = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=-1)
        tiny = torch.finfo(re.dtype).tiny
        square = (re.square() + im.square()).clamp(min=tiny)
        modulus = (square + self.eps).sqrt()
        # Where the square underflows, as for a token of zeros, no number holds the gradient of the angle.
        angle = local(self.phase_scale).to(re.dtype) * torch.atan2(im, re.masked_fill(square <= tiny, 1.0))
        angle = angle if shift is None else angle + shift.to(re.dtype)
        return torch.cat([modulus * angle.cos(), modulus * angle.sin()], dim=-1).to(z.dtype)

    def of_each_query_head(self, z: Tensor) -> Tensor:
        """Keys or values (B, S, G, D) as (B, S, H, D)."""
        (z,) = self.heads.spread(z)
        return z if z.shape[2] == self.num_heads else z.repeat_interleave(self.num_heads // z.shape[2], dim=2)

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """What the cache holds for a token: (heads, width) of mapped keys and of values."""
        return (self.num_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)

    def qk_circuit(self, part: str = "full") -> Factors:
        """Per query head the factors (WQ_h, WK_h), each (D, E), before the angles are scaled: a form of q and k alone.

        part: "full".
        """
        if part != "full":
            raise ValueError(f"part must be 'full': behind scaled angles there is no linear form, got {part!r}")
        return super().qk_circuit()

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's, and phases by head."""
        return {**super().tensor_splits(), "phase_scale": 0, "phase_bias": 0}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads."""
        super().keep_heads(heads, groups)
        self.phase_scale = keep_entries(self.phase_scale, heads)
        self.phase_bias = keep_entries(self.phase_bias, heads)
