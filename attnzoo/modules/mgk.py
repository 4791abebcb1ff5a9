"""Mixture of Gaussian keys."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.cache_state import StateCache
from attnzoo.masks import AttentionMask
from attnzoo.modules.base import per_head
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_entries, keep_rows
from attnzoo.modules.linear_base import state_cache
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.mixture_attention import mean_responsibilities, mixture_attention, mixture_features
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import constant
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_options, check_sizes, one_of
from attnzoo.tracing import is_readable

CHUNK = 64  # Tokens of a chunk of the linear form; it changes speed only.
LACKS = ("qk_norm", "scale", "logit_softcap", "alibi", "sliding_window", "sink")
"""Options of grouped-query attention that there are none of here."""


class MixtureOfGaussianKeysAttention(GroupedQueryAttention):
    """Mixture of Gaussian keys (Nguyen et al. 2022, arXiv:2110.08678): every position has R keys.

        k_r = c Wk_r, or with shared_key c Wk + key_shift_r;   q, k_r are rotated, if at all, after that
        g_ijr = -a_r / (2 sqrt(D)) |q_i - k_jr|^2
        e_ij = sum_r clamp(pi_jr, 0, 1) exp(g_ijr), or with assignment "hard" max_r exp(g_ijr)
        o_i = sum_j e_ij v_j / (sum_j e_ij + eps);   y = concat_h(o_h) Wo

    The prior pi is learned, or with assignment "soft" the mean responsibility of each key, a buffer that every training
    forward updates after using it: gamma_ijr = pi_jr exp(g_ijr) / (sum_r pi_jr exp(g_ijr) + 1e-6), averaged over all
    real tokens i, later ones too, as the authors' code does. With R = 2 the second is 1 minus the first.

    attention="linear" sums features instead, with phi = elu + 1, and decodes from a state:

        kk_j = sum_r c_r clamp(pi_jr, 0, 1) phi(k_jr);   o_i = output_scale phi(q_i) S_i / (phi(q_i) . z_i + eps)

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H; the paper takes half of those of the layer that it replaces.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        num_mixtures: R.
        shared_key: one projection and R shifts in place of R projections.
        assignment: "learned", "soft" or "hard".
        prior: what has a pi of its own: each "head", each "position" (index of the token) of a head, or "global".
        max_positions: positions that the prior "position" knows.
        precision: a_r, R positive numbers. Default: (1, 3) for R = 2, else all 1.
        eps: see above.
        attention: "softmax" or "linear".
        feature_norm: divide phi by its sum over D; needs "linear", as the next two do.
        output_scale: see above.
        scale_w: c_r. Default: all 1.
        rope: rotary position embedding, or None; not for "linear".
        options: those of `GroupedQueryAttention` but LACKS. dropout is of weights, of "linear" of the output.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value; in a call, for more tokens than
            max_positions.
    """

    takes_bias = False
    takes_left_padding = False  # The prior may go by the index of a token.
    reads_token_index = True

    aux_loss_group: Any = None
    pi: Tensor | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        num_mixtures: int = 2,
        shared_key: bool = False,
        assignment: str = "learned",
        prior: str = "head",
        max_positions: int | None = None,
        precision: Sequence[float] | None = None,
        eps: float = 0.0,
        attention: str = "softmax",
        feature_norm: bool = False,
        output_scale: float = 1.0,
        scale_w: Sequence[float] | None = None,
        rope: Rotary | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        (num_mixtures,) = check_sizes(num_mixtures=num_mixtures)
        if max_positions is not None:
            (max_positions,) = check_sizes(max_positions=max_positions)
        ones = (1.0,) * num_mixtures
        precision = ((1.0, 3.0) if num_mixtures == 2 else ones) if precision is None else precision
        scale_w = ones if scale_w is None else scale_w
        check_options(
            precision=precision, scale_w=scale_w, eps=eps, shared_key=shared_key, feature_norm=feature_norm,
            output_scale=output_scale,
        )  # fmt: skip
        check("assignment", assignment, one_of("learned", "soft", "hard"))
        check("prior", prior, one_of("head", "position", "global"))
        check("attention", attention, one_of("softmax", "linear"))
        for name, numbers in (("precision", precision), ("scale_w", scale_w)):
            if len(numbers) != num_mixtures:
                raise ValueError(f"{name} must hold num_mixtures {num_mixtures} positive numbers, got {numbers!r}")
        precision, scale_w = tuple(map(float, precision)), tuple(map(float, scale_w))
        linear = (("feature_norm", feature_norm, False), ("output_scale", output_scale, 1), ("scale_w", scale_w, ones))
        for name, value, plain in linear:
            if attention == "softmax" and value != plain:
                raise ValueError(f"{name} needs attention 'linear', got {value} and attention 'softmax'")
        if attention == "linear" and (assignment != "learned" or rope is not None):
            raise ValueError(
                f"attention 'linear' needs assignment 'learned' and no rope, got {assignment!r} and {rope}"
            )
        if prior == "position" and max_positions is None and assignment != "hard":
            raise ValueError("max_positions must be given with prior 'position', got None")
        if shared_key and num_mixtures == 1:
            warnings.warn("shared_key with num_mixtures=1 shifts all keys alike: one key has no mixture", stacklevel=2)
        for name in LACKS:
            if (given := options.get(name)) is not None and given is not False:
                raise ValueError(f"{name} is no option of a mixture of Gaussian keys, got {given!r}")
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, rope=rope, **options)
        self.num_mixtures, self.shared_key, self.assignment = num_mixtures, shared_key, assignment
        self.prior, self.max_positions, self.precision, self.eps = prior, max_positions, precision, float(eps)
        self.attention, self.feature_norm = attention, feature_norm
        self.output_scale, self.scale_w = output_scale, scale_w
        self.has_patterns = attention == "softmax"
        self.cache_type = KeyValueCache if self.has_patterns else StateCache
        R, G, D = num_mixtures, self.num_kv_heads, self.head_dim
        factory_kwargs: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        if not shared_key:
            self.k_proj = nn.Linear(self.kdim, R * G * D, self.k_proj.bias is not None, **factory_kwargs)
        self.key_shift = nn.Parameter(torch.empty(R, G, D, **factory_kwargs)) if shared_key else None
        shapes = {"position": (R, G, max_positions or 0), "head": (R, G), "global": (R,)}
        pi = torch.empty(shapes[prior], **factory_kwargs)
        if assignment == "learned":
            self.pi = nn.Parameter(pi)
        else:
            self.register_buffer("pi", pi if assignment == "soft" else None)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; pi is 1 / R, the first shift 0 and the others normal with standard deviation 0.5."""
        super().reset_parameters(std, out_std)
        if (pi := getattr(self, "pi", None)) is not None:
            nn.init.constant_(pi, 1 / self.num_mixtures)
        if (shift := getattr(self, "key_shift", None)) is not None:
            nn.init.normal_(shift, std=0.5)
            nn.init.zeros_(shift[0])

    sequence_forms: tuple[str, ...] = ("gather",)
    sequence_cache = False
    tensor_reason = "the keys of a head are apart in k_proj"

    def sequence_obstacle(self) -> str | None:
        """The linear form has sums of its own."""
        if self.attention == "linear":
            return "attention must be 'softmax', got 'linear', whose keys are summed before they are gathered"
        return None

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`.

        positions steers the rotation; the prior "position" goes by the index of a token in its document.
        """
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        if self.attention == "linear":
            return self.attend_linearly(q, self.shifted(k), v, call)
        if self.rope is not None:
            k = self.shifted(k)
            q, rotated = call.rotate(q, k.flatten(2, 3))
            k = rotated.view(k.shape)
        with call.remember(k.flatten(3), v) as (k, v):
            k = k.unflatten(3, (self.cached_keys, self.head_dim))
            k = self.shifted(k) if self.rope is None else k
            pi = self.weights(call, 0, k.shape[1], x)
            prior = self.next_prior(x, q, k, pi, call)
            k, v = self.heads.spread(k, v)
            out = mixture_attention(
                q, k, v, call.view, precision=constant(self.precision, x.device),
                # As 0 to float32, and its logarithm has a gradient.
                log_prior=None if pi is None else self.heads.spread(pi + 1e-30)[0].log(),
                hard=self.assignment == "hard", eps=self.eps, dropout=self.weight_dropout, backend=self.backend,
            )  # fmt: skip
            y: Tensor = self.o_proj(out.flatten(2))
            if prior is not None and self.pi is not None:
                self.pi.copy_(prior)
            return y

    def project(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys (B, S, G, R, D), with shared_key (B, S, G, 1, D), and values (B, S, G, Dv)."""
        (B, T, _), (S, G, D) = x.shape, (key.shape[1], self.num_kv_heads, self.head_dim)
        k = self.k_proj(key).view(B, S, 1 if self.shared_key else self.num_mixtures, G, D).transpose(2, 3)
        return self.q_proj(x).view(B, T, self.num_heads, D), k, self.v_proj(value).view(B, S, G, self.v_head_dim)

    def shifted(self, k: Tensor) -> Tensor:
        """All R keys of a position."""
        return k if self.key_shift is None else k + self.key_shift.to(k.dtype).transpose(0, 1)

    def weights(self, call: Call, start: int, stop: int, x: Tensor) -> Tensor | None:
        """clamp(pi, 0, 1) of the keys of these indices, (1 or B, 1 or S, G, R); None for hard assignment."""
        if self.pi is None:
            return None
        pi = self.pi.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
        if self.prior != "position":
            return pi.expand(self.num_kv_heads, -1)[None, None] if pi.ndim == 1 else pi.T[None, None]
        return pi.permute(2, 1, 0)[self.places(call, start, stop, x)]

    def places(self, call: Call, start: int, stop: int, x: Tensor) -> Tensor:
        """Index of these keys in their documents, (1 or B, S)."""
        index, mask = torch.arange(start, stop, device=x.device)[None], call.view.mask
        packed = None if mask is None else mask.positions(x.shape[0], stop - start)
        longest = stop if packed is None or not is_readable(packed) or not packed.numel() else int(packed.max()) + 1
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(f"x must end within max_positions {self.max_positions}, got {longest} tokens")
        return index if packed is None else packed

    def next_prior(self, x: Tensor, q: Tensor, k: Tensor, pi: Tensor | None, call: Call) -> Tensor | None:
        """What the buffer is after this batch, its mean responsibilities, if it is one of training; or None."""
        if self.assignment != "soft" or not self.training or call.cache is not None or pi is None or self.pi is None:
            return None
        mask = AttentionMask() if call.view.mask is None else call.view.mask
        real = mask.real_queries if call.source is x else None
        if mask.lengths is not None:
            within = torch.arange(k.shape[1], device=k.device) < mask.lengths[:, None]
            real = within if real is None else real & within
        return mean_responsibilities(
            q, k, pi, self.pi, constant(self.precision, q.device), reads=self.heads.reads,
            places=self.places(call, 0, k.shape[1], q) if self.prior == "position" else None,
            real=(call.real_tokens(x), real), group=self.aux_loss_group,
        )  # fmt: skip

    def attend_linearly(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The output by sums of features of queries (B, T, H, D) and keys (B, S, G, R, D)."""
        mask, (B, S), cache = call.view.mask, k.shape[:2], call.cache
        if mask is not None and mask.dense_mask is not None:
            raise ValueError("mask must be AttentionMask.padding or .packed: sums over keys know no single pairs")
        with without_autocast(q):
            pi = self.weights(call, call.past, call.past + S, v)
            assert pi is not None
            q, k = mixture_features(q, k, pi * constant(self.scale_w, v.device), normalise=self.feature_norm)
            if (real := call.keys_within_lengths()) is not None:
                k = k * real[..., None, None]
            k, v = self.heads.spread(k, v)
            state = None
            if cache is not None:
                cache.check_fits(B, S, q)
                sums, totals = cache.current()
                state = torch.cat([sums, totals[..., None]], -1)
            # One more value, 1, for the denominator.
            out, state = linear_attention(
                q, k, F.pad(v, (0, 1), value=1.0), size=CHUNK, causal=self.causal, mask=mask, state=state,
                backend=self.backend,
            )  # fmt: skip
            below = out[..., -1:] + self.eps
            # Features are positive, so that a sum of 0 is one over no key.
            out = self.output_scale * out[..., :-1] / (below + (below == 0))
        y: Tensor = F.dropout(self.o_proj(out.to(v.dtype).flatten(2)), self.weight_dropout)
        if cache is not None and state is not None:
            cache.store(state[..., :-1], k)
        return y

    @property
    def cached_keys(self) -> int:
        """Keys of a token in the cache: 1 if shifts can be added later; after a rotation they cannot."""
        return 1 if self.shared_key and self.rope is None else self.num_mixtures

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """The keys and one value of a token; of the linear form the states S and z."""
        if self.has_patterns:
            return (self.num_kv_heads, self.cached_keys * self.head_dim), (self.num_kv_heads, self.v_head_dim)
        groups = self.num_kv_heads if self.heads.is_regular else self.num_heads
        return (groups, self.head_dim, self.v_head_dim), (groups, self.head_dim)

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:  # fmt: skip
        """A cache for max_length tokens; of the linear form states in at least float32."""
        if self.has_patterns:
            return super().init_cache(batch_size, max_length, device, dtype)
        return state_cache(self, batch_size, max_length, device, dtype)

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Of the linear form 0: its state does not grow."""
        return super().cache_bytes_per_token(dtype) if self.has_patterns else 0

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that the cache of one sequence holds after so many tokens."""
        if self.has_patterns:
            return super().state_bytes(tokens, dtype)
        groups, D = self.cache_widths()[1]
        return groups * D * (self.v_head_dim + 1) * torch.promote_types(dtype, torch.float32).itemsize

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E), and the mean of each group's key weights by pi a, of "linear" by pi c."""
        R, G = self.num_mixtures, self.num_kv_heads
        k = per_head(self.k_proj, self.head_dim)
        share = torch.tensor(self.precision if self.has_patterns else self.scale_w, dtype=k.dtype, device=k.device)
        share = share[:, None].expand(R, G)
        if self.pi is not None:
            pi = self.pi.detach().clamp(0, 1).to(k.dtype)
            share = share * (pi.mean(-1) if self.prior == "position" else pi.view(R, -1))
        k = k.view(1 if self.shared_key else R, G, *k.shape[1:]).expand(R, -1, -1, -1)
        return per_head(self.q_proj, self.head_dim), ((share / share.sum(0))[..., None, None] * k).sum(0)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections" and "attention", 2 H (R D + Dv) a visible pair, of "linear" by the state."""
        S, keys = (T, T) if S is None else (S, T if self.causal else S)
        H, G, D, Dv, R = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim, self.num_mixtures
        rows = self.kdim * D * (1 if self.shared_key else R) + self.vdim * Dv
        projections = 2 * T * self.embed_dim * H * (D + Dv) + 2 * keys * G * rows
        if self.has_patterns:
            attention = 2 * H * (R * D + Dv) * attention_pairs(T, S, causal=self.causal)
        else:
            chunk = CHUNK if self.causal and T > 1 else 0
            padded, keys = (-(-T // CHUNK) * CHUNK,) * 2 if chunk else (T, keys)
            sums = D * (Dv + 1) * (self.heads.groups_read * keys + H * padded)
            attention = 2 * (sums + padded * chunk * H * (D + Dv + 1))
        return {"projections": projections, "attention": attention}

    def no_weight_decay(self) -> set[str]:
        """The prior and the shifts."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """As the base's, with all R keys of a group."""
        R, G = 1 if self.shared_key else self.num_mixtures, self.num_kv_heads
        rows = [r * G + g for r in range(R) for g in groups]
        keep_rows(self.q_proj, heads, self.head_dim)
        keep_rows(self.k_proj, rows, self.head_dim)
        keep_rows(self.v_proj, groups, self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
        for name in ("key_shift", "pi"):
            value = getattr(self, name)
            if value is not None and value.ndim > 1:
                kept = keep_entries(value, groups, 1)
                setattr(self, name, kept if isinstance(value, nn.Parameter) else kept.detach())
