"""Multi-head linear attention: token-level heads."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache_state import BlockStateCache
from attnzoo.masks import AttentionMask
from attnzoo.modules.checks import check_cache, check_sizes
from attnzoo.modules.linear_base import FeatureAttention, check_normalisable
from attnzoo.ops.fused_linear import block_states, continued_block, fused_linear_attention
from attnzoo.ops.linear_attention import (
    block_weights,
    document_blocks,
    linear_attention_chunked,
    linear_attention_reference,
)
from attnzoo.ops.mixing_matrix import MIXING_INITS, clipped, extended, initial_mixing
from attnzoo.ops.precision import without_autocast
from attnzoo.rotary import Rotary


class MultiHeadLinearAttention(FeatureAttention):
    """Multi-head linear attention (Zhang et al. 2026, arXiv:2601.07832).

    Linear attention whose history is kept as one state for each block of C tokens, weighed anew for every block of
    queries by a learned matrix m (M, M):

        S_j = sum_{s in block j} k^_s v_s^T
        o_t = q^_t^T ( sum_{j < i} m_ij S_j + m_ii sum_{s in block i, s <= t} k^_s v_s^T ),   i = t // C

    m is clipped to `mixing_clip` and, if causal, its upper triangle is 0. "mixed" divides by the same expression of
    q~, k~ and 1. Then RMS norm of each head's output, gate and output projection as in `LinearAttention`. A fresh
    causal module with norm_eps = 0 is linear attention with the same norm. Time is linear in T as long as
    (T / C)^2 <= T. "Heads" in its name are the blocks; H and G are feature heads as everywhere else.

    With a grid, tokens are an image in raster order (B, gh gw, E), and a block is a rectangle of it.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        v_head_dim: width Dv of values. Default: D.
        bias: whether the q, k and v projections have one.
        out_bias: whether the output projection has one. Default: bias.
        causal: no query sees a later key.
        block_size: tokens C of a block.
        num_blocks: trained blocks M.
        grid: (gh, gw) tokens of an image; needs causal=False.
        block_grid: (ph, pw) tokens of a block; C = ph pw, M = (gh / ph) (gw / pw).
        feature_map: see `FeatureMap`.
        feature_eps: added to features.
        qk_norm: RMS-normalise queries and keys over all heads together, before the features.
        qk_norm_eps: added to that mean square. Default: the dtype's machine epsilon, as torch.nn.RMSNorm has it.
        scale: of the queries' features. Default: D ** -0.5 with normalizer "none", else 1.
        normalizer: "none", "mixed", or "compat", which divides as the released image code does (by queries of other
            blocks) and is for its weights alone.
        normalizer_eps: added to the denominator.
        output_norm: "rmsnorm" or "none".
        norm_eps: added to that mean square.
        gate: multiply heads by swish(x Wg).
        rope: rotary position embedding of the features.
        mixing_init: "uniform", "linear", "cos", "exp", "local" or "gaussian", see `initial_mixing`.
        mixing_norm: "row" or "col", along which the start sums to 1.
        mixing_sigma: of "exp".
        mixing_per_head: one matrix for each head.
        mixing_clip: bounds of the matrix, or None; the gradient passes straight through.
        mixing_trainable: whether it is trained.
        extrapolation: what a causal module does beyond M blocks: "error", "clamp" or "window", see `extended`.
        lepe_kernel: width of a depthwise convolution of the values that is added, 0 for none; needs a grid.
        dropout: of the output, in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked), "eager" (the quadratic definition) or "triton" (chunked, in kernels).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    _norm_name = "g_norm"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        block_size: int = 64,
        num_blocks: int = 32,
        grid: tuple[int, int] | None = None,
        block_grid: tuple[int, int] | None = None,
        feature_map: str = "relu",
        feature_eps: float = 0.0,
        qk_norm: bool = False,
        qk_norm_eps: float | None = None,
        scale: float | None = None,
        normalizer: str = "none",
        normalizer_eps: float = 1e-6,
        output_norm: str = "rmsnorm",
        norm_eps: float = 1e-6,
        gate: bool = True,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        mixing_init: str = "uniform",
        mixing_norm: str = "row",
        mixing_sigma: float = 3.0,
        mixing_per_head: bool = False,
        mixing_clip: tuple[float, float] | None = (1e-5, 1.0),
        mixing_trainable: bool = True,
        extrapolation: str = "error",
        lepe_kernel: int = 0,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = max(1, head_dim if head_dim is not None else embed_dim // max(1, num_heads))
        if scale is None:
            scale = width**-0.5 if normalizer == "none" else 1.0
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=None, bias=bias,
            out_bias=out_bias, causal=causal, feature_map=feature_map, feature_eps=feature_eps, scale=scale,
            qk_norm=qk_norm, qk_norm_eps=qk_norm_eps, output_norm=output_norm, norm_eps=norm_eps, gate=gate, rope=rope,
            dropout=dropout, init_std=init_std, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self._check_options(normalizer, extrapolation, mixing_init, mixing_norm, mixing_clip)
        self.grid, self.block_grid = self._image(grid, block_grid)
        blocks: tuple[int, ...] = (num_blocks,)
        if self.grid is not None and self.block_grid is not None:
            block_size = math.prod(self.block_grid)
            blocks = tuple(g // p for g, p in zip(self.grid, self.block_grid, strict=True))
        check_sizes(block_size=block_size, num_blocks=math.prod(blocks))
        self.block_size = block_size
        self.num_blocks = math.prod(blocks)
        self.normalizer = normalizer
        self.normalizer_eps = normalizer_eps
        self.mixing_clip = None if mixing_clip is None else (float(mixing_clip[0]), float(mixing_clip[1]))
        self.extrapolation = extrapolation
        self._mixing_start = (mixing_init, blocks, mixing_norm, mixing_sigma)
        shape = (num_heads,) * mixing_per_head + (self.num_blocks, self.num_blocks)
        self.mixing_matrix = nn.Parameter(
            torch.empty(shape, device=device, dtype=dtype), requires_grad=mixing_trainable
        )
        if lepe_kernel:
            if lepe_kernel < 0 or lepe_kernel % 2 == 0 or self.grid is None or self.num_kv_heads != num_heads:
                raise ValueError(
                    f"lepe_kernel must be odd, with a grid and as many key/value heads as heads, got {lepe_kernel}, "
                    f"grid {self.grid} and {self.num_kv_heads} of {num_heads}"
                )
            channels = num_heads * self.v_head_dim
            self.lepe = nn.Conv2d(
                channels, channels, lepe_kernel, padding=lepe_kernel // 2, groups=channels, device=device, dtype=dtype
            )
        self.reset_parameters()

    def _check_options(
        self,
        normalizer: str,
        extrapolation: str,
        mixing_init: str,
        mixing_norm: str,
        mixing_clip: tuple[float, float] | None,
    ) -> None:
        for name, value, allowed in (
            ("normalizer", normalizer, ("none", "mixed", "compat")),
            ("extrapolation", extrapolation, ("error", "clamp", "window")),
            ("mixing_init", mixing_init, MIXING_INITS),
            ("mixing_norm", mixing_norm, ("row", "col")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if normalizer != "none":
            check_normalisable(self.feature_map, "normalizer", normalizer)
        if normalizer == "compat" and self.causal:
            raise ValueError("normalizer 'compat' needs causal=False: it reproduces the released image code")
        if extrapolation != "error" and not self.causal:
            raise ValueError(f"extrapolation must be 'error' with causal=False, got {extrapolation!r}")
        if mixing_clip is not None and not 0 <= mixing_clip[0] < mixing_clip[1]:
            raise ValueError(f"mixing_clip must be two bounds with 0 <= low < high, or None, got {mixing_clip}")

    def _image(
        self, grid: tuple[int, int] | None, block_grid: tuple[int, int] | None
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        if grid is None and block_grid is None:
            return None, None
        if grid is None or block_grid is None or self.causal:
            raise ValueError(
                f"grid and block_grid must be given together and with causal=False, got {grid}, {block_grid} and "
                f"causal={self.causal}"
            )
        grid, block_grid = (int(grid[0]), int(grid[1])), (int(block_grid[0]), int(block_grid[1]))
        if min(*grid, *block_grid) < 1 or grid[0] % block_grid[0] or grid[1] % block_grid[1]:
            raise ValueError(f"block_grid must divide grid, got {block_grid} and {grid}")
        return grid, block_grid

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Projections as in `LinearAttention`; the mixing matrix starts as mixing_init says, whatever std is."""
        super().reset_parameters(std, out_std)
        kind, blocks, norm, sigma = self._mixing_start
        start = initial_mixing(kind, blocks, causal=self.causal, norm=norm, sigma=sigma)
        with torch.no_grad():
            self.mixing_matrix.copy_(start.to(self.mixing_matrix))
        if hasattr(self, "lepe"):
            self.lepe.reset_parameters()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The mixing matrix: weight decay pulls it to 0, which means nothing for it."""
        return [self.mixing_matrix]

    @torch.no_grad()
    def project_parameters(self) -> None:
        """Put the mixing matrix back between its bounds, as training does before every step."""
        if self.mixing_clip is not None:
            self.mixing_matrix.clamp_(*self.mixing_clip)

    def mixing(self, blocks: int, dtype: torch.dtype) -> Tensor:
        """The matrix that is used, (blocks, blocks) or (H, blocks, blocks): clipped, triangular, continued."""
        matrix = clipped(self.mixing_matrix.to(dtype), self.mixing_clip)
        if not self.causal:
            return matrix[..., :blocks, :blocks]
        return extended(matrix.tril(), blocks, self.extrapolation).tril()

    def forward(
        self,
        x: Tensor,
        context: None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: BlockStateCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only. With a grid, an image in raster order.
            context: refused: no cross-attention is defined.
            mask: AttentionMask.padding (on the right: blocks are counted from the first token) or .packed (blocks
                start anew in each document); a dense mask has no meaning here.
            positions: (T,) or (B, T) integers for the rotation; blocks go by the index of a token.
            cache: from `init_cache`; its states are updated in place.
        """
        backend, dtype = self.chosen_backend(x), self.product_dtype(x)
        mask = self.checked_mask(mask)
        if not self.num_heads:
            return self.without_heads(x, cache)
        if context is not None:
            raise ValueError("context must be None: multi-head linear attention defines no cross-attention")
        past, limit = (0, None) if cache is None else (cache.length, cache.max_length)
        self._check_length(x, mask, past)
        plain_q, plain_k, q, k, v = self.features(x, x, mask, positions, past, limit)
        with without_autocast(x):
            if cache is not None:
                check_cache(cache, BlockStateCache, self.causal, context, mask)
                out = self._continue(cache, plain_q, plain_k, q, k, v, backend, dtype)
            else:
                out = self._attend(q, k, v, mask, backend, dtype)
                if self.normalizer == "mixed":
                    ones = plain_k.new_ones(*plain_k.shape[:3], 1)
                    out = out / (self._attend(plain_q, plain_k, ones, mask, backend, dtype) + self.normalizer_eps)
                elif self.normalizer == "compat":
                    out = out / self._compat_denominator(plain_q, plain_k)
                if hasattr(self, "lepe"):
                    out = out + self._local_values(v)
        return self.finish(out, x, backend)

    def _check_length(self, x: Tensor, mask: AttentionMask | None, past: int) -> None:
        tokens, most = past + x.shape[1], self.num_blocks * self.block_size
        if self.grid is not None:
            if x.shape[1] != math.prod(self.grid):
                raise ValueError(f"x must hold the {self.grid[0]} x {self.grid[1]} tokens of grid, got {x.shape[1]}")
            if mask is not None and mask.cu_seqlens is not None:
                raise ValueError("mask must not be packed with a grid")
        elif tokens > most and self.extrapolation == "error":
            raise ValueError(
                f"x must hold at most num_blocks * block_size = {self.num_blocks} * {self.block_size} tokens with "
                f"extrapolation 'error', got {tokens}"
            )
        if self.normalizer == "compat" and tokens != most:
            raise ValueError(f"normalizer 'compat' needs exactly num_blocks * block_size = {most} tokens, got {tokens}")

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, backend: str, dtype: torch.dtype
    ) -> Tensor:
        """Weighted sums (B, T, H, Dv)."""
        B, T = q.shape[:2]
        C = self.block_size
        if mask is not None and mask.cu_seqlens is not None:
            blocks = document_blocks(mask, B, T, C)
            weights = block_weights(self.mixing(blocks.count, q.dtype), blocks, blocks.count)
            if backend == "eager":
                at = blocks.slot // C
                rows = torch.arange(B, device=q.device)[:, None, None]
                pairs = weights.expand(B, -1, -1, -1).permute(0, 2, 3, 1)[rows, at[:, :, None], at[:, None, :]]
                pairs = pairs.permute(0, 3, 1, 2)
                return linear_attention_reference(q, k, v, pairs.tril() if self.causal else pairs)
            if backend == "triton":
                return fused_linear_attention(
                    q, k, v, size=C, causal=self.causal, dtype=dtype, weights=weights, blocks=blocks
                )[0]
            out, _ = linear_attention_chunked(
                blocks.spread(q), blocks.spread(k), blocks.spread(v), size=C, causal=self.causal, weights=weights
            )
            return blocks.gather(out)
        weights = block_weights(self.mixing(max(1, -(-T // C)), q.dtype), None, max(1, -(-T // C)))
        order = self._raster_order(q.device)
        if backend == "triton":
            return fused_linear_attention(
                q, k, v, size=C, causal=self.causal, dtype=dtype, weights=weights, order=order
            )[0]
        if order is not None:
            q, k, v = (x.index_select(1, order) for x in (q, k, v))
        if backend == "eager":
            at = torch.arange(T, device=q.device) // C
            pairs = weights[:, :, at[:, None], at]
            out = linear_attention_reference(q, k, v, pairs.tril() if self.causal else pairs)
        else:
            out, _ = linear_attention_chunked(q, k, v, size=C, causal=self.causal, weights=weights)
        return out if order is None else out.index_select(1, order.argsort())

    def _raster_order(self, device: torch.device) -> Tensor | None:
        """Token numbers of an image block after block."""
        if self.grid is None or self.block_grid is None:
            return None
        (gh, gw), (ph, pw) = self.grid, self.block_grid
        image = torch.arange(gh * gw, device=device).view(gh // ph, ph, gw // pw, pw)
        return image.transpose(1, 2).flatten()

    def _compat_denominator(self, q: Tensor, k: Tensor) -> Tensor:
        """sum_j m_ij (q~ of the same slot in block j) . z_j, as the released image code divides."""
        order = self._raster_order(q.device)
        if order is not None:
            q, k = q.index_select(1, order), k.index_select(1, order)
        B, T, H, D = q.shape
        C, M = self.block_size, self.num_blocks
        sums = k.view(B, M, C, k.shape[2], D).sum(2).repeat_interleave(H // k.shape[2], 2)
        own = torch.einsum("bjchd,bjhd->bjch", q.view(B, M, C, H, D), sums) + self.normalizer_eps
        matrix = self.mixing(M, q.dtype)
        mixed = torch.einsum("hij,bjch->bich", matrix.expand(H, M, M), own).reshape(B, T, H, 1)
        return mixed if order is None else mixed.index_select(1, order.argsort())

    def _local_values(self, v: Tensor) -> Tensor:
        """Depthwise convolution of the values over the image."""
        assert self.grid is not None
        B, T, H, Dv = v.shape
        image = v.flatten(2).transpose(1, 2).reshape(B, H * Dv, *self.grid)
        weight, bias = self.lepe.weight.to(v.dtype), None if self.lepe.bias is None else self.lepe.bias.to(v.dtype)
        local = F.conv2d(image, weight, bias, padding=self.lepe.padding, groups=H * Dv)
        return local.flatten(2).transpose(1, 2).reshape(B, T, H, Dv)

    def _continue(
        self,
        cache: BlockStateCache,
        plain_q: Tensor,
        plain_k: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Outputs of new tokens after the cached ones, block after block; the cache moves on."""
        cache.admit(q.shape[0], q.shape[1], v)
        C, T, outputs, t = self.block_size, q.shape[1], [], 0
        if T == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        matrix = self.mixing((cache.length + T - 1) // C + 1, q.dtype)
        ones = plain_k.new_ones(*plain_k.shape[:3], 1)
        mixed = self.normalizer == "mixed"
        if backend == "triton" and cache.length == 0 and T > 1:
            out, n = self._attend(q, k, v, None, backend, dtype), -(-T // C)
            if mixed:
                out = out / (self._attend(plain_q, plain_k, ones, None, backend, dtype) + self.normalizer_eps)
            cache.streams[0][:, :n] = block_states(k, v, size=C, dtype=dtype)
            cache.streams[1][:, :n] = block_states(plain_k, ones, size=C, dtype=dtype)[..., 0]
            cache.length = T
            return out
        advance = partial(continued_block, size=C, dtype=dtype) if backend == "triton" else _block_step
        while t < T:
            block, stop = cache.length // C, min(T, t + C - cache.length % C)
            row = matrix[..., block, : block + 1]
            part = slice(t, stop)
            states, sums = (stream[:, : block + 1] for stream in cache.streams)
            out = advance(q[:, part], k[:, part], v[:, part], states, row)
            if mixed:
                bottom = advance(plain_q[:, part], plain_k[:, part], ones[:, part], sums.unsqueeze(-1), row)
                out = out / (bottom + self.normalizer_eps)
            else:
                sums[:, block] += plain_k[:, part].detach().sum(1)
            cache.length += stop - t
            outputs.append(out)
            t = stop
        return torch.cat(outputs, dim=1)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockStateCache:
        """States of all blocks up to max_length: float32, or float64 for a float64 module or dtype."""
        if self.extrapolation == "error" and max_length > self.num_blocks * self.block_size:
            raise ValueError(
                f"max_length must be at most num_blocks * block_size = {self.num_blocks * self.block_size} with "
                f"extrapolation 'error', got {max_length}"
            )
        weight = self.q_proj.weight
        wanted = torch.promote_types(weight.dtype if dtype is None else dtype, torch.float32)
        groups = self.state_groups()
        return BlockStateCache(
            batch_size, max_length, ((groups, self.feature_dim, self.v_head_dim), (groups, self.feature_dim)),
            self.block_size, device=weight.device if device is None else device, dtype=wanted,
        )  # fmt: skip

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """A block's states over its tokens, rounded up: G Df (Dv + 1) / C numbers of at least float32."""
        item = torch.promote_types(dtype, torch.float32).itemsize
        return -(-item * self.state_groups() * self.feature_dim * (self.v_head_dim + 1) // self.block_size)

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one sequence's states after so many tokens."""
        item = torch.promote_types(dtype, torch.float32).itemsize
        blocks = -(-tokens // self.block_size)
        return blocks * item * self.state_groups() * self.feature_dim * (self.v_head_dim + 1)

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens of S."""
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`, in the chunked form: "projections", "mixing" of the states and "attention"."""
        S = T if S is None else S
        C, H, Df = self.block_size, self.num_heads, self.feature_dim
        Dv = self.v_head_dim + int(self.normalizer != "none")
        n, n_new = -(-S // C), -(-T // C)
        padded = n_new * C if T > 1 else 1
        mixed = H if self.mixing_matrix.ndim == 3 else self.state_groups()
        within = 2 * padded * C * H * (Df * (1 + int(self.normalizer != "none")) + Dv) if self.causal and T > 1 else 0
        states = 2 * padded * (self.state_groups() + H) * Df * Dv
        mixing = 2 * n * n_new * mixed * Df * Dv if T > 1 or S % C == 1 or C == 1 else 0
        return {"projections": self.projection_flops(T, T), "mixing": mixing, "attention": states + within}


def _block_step(q: Tensor, k: Tensor, v: Tensor, states: Tensor, row: Tensor) -> Tensor:
    """Tokens of one block, q (B, c, H, D), after states (B, i + 1, G, D, Dv) weighed by row (i + 1,) or (H, i + 1).

    The last state moves on.
    """
    B, c, H, D = q.shape
    G, blocks = k.shape[2], row.shape[-1]
    q = q.view(B, c, G, H // G, D)
    kept, states = states, states.clone()
    within = torch.einsum("bcgrd,bsgd->bgrcs", q, k).tril()
    own = row[..., -1]
    if row.ndim == 1:
        before = torch.einsum("j,bjgdv->bgdv", row, states)
        out = torch.einsum("bcgrd,bgdv->bcgrv", q, before)
    else:
        before = torch.einsum("grj,bjgdv->bgrdv", row.view(G, H // G, blocks), states)
        out = torch.einsum("bcgrd,bgrdv->bcgrv", q, before)
        own = own.view(G, H // G, 1, 1)
    out = out + torch.einsum("bgrcs,bsgv->bcgrv", own * within, v)
    kept[:, -1] += torch.einsum("bcgd,bcgv->bgdv", k.detach(), v.detach())
    return out.reshape(B, c, H, v.shape[3])
