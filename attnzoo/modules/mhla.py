"""Multi-head linear attention: token-level heads."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import CacheLayout
from attnzoo.cache_state import BlockStateCache, StateCache
from attnzoo.modules.call import Call, Mask
from attnzoo.modules.heads import head_rows, keep_entries
from attnzoo.modules.linear_base import FeatureAttention, check_normalisable
from attnzoo.ops.linear_attention import linear_attention, normalised, slot_sums
from attnzoo.ops.mixing_matrix import MIXING_INITS, clipped, extended, initial_mixing, leading
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.submodules import is_plain, local, place_of
from attnzoo.ops.token_blocks import block_count, block_sizes, check_image, raster_order
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_options, check_sizes, describe, one_of
from attnzoo.tracing import has_values, is_readable


class MultiHeadLinearAttention(FeatureAttention):
    """Multi-head linear attention (Zhang et al. 2026, arXiv:2601.07832).

    Linear attention whose history is kept as one state for each block of C tokens. For each block of queries these
    states are weighted by a row of a learned matrix m (M, M):

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
        block_size: tokens C of a block. Default: 64, with a grid ph pw.
        num_blocks: trained blocks M. Default: 32, with a grid (gh / ph) (gw / pw).
        grid: (gh, gw) tokens of an image; needs causal=False.
        block_grid: (ph, pw) tokens of a block.
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
        backend: "auto" (chunked, on GPUs as "triton"), "eager" (the quadratic definition) or "triton" (chunked, in
            kernels).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = BlockStateCache
    takes_left_padding = False  # Blocks go by the index of a token.
    sequence_forms: tuple[str, ...] = ("state",)
    norm_name = "g_norm"
    g_norm: nn.RMSNorm | None
    lepe: nn.Conv2d | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        v_head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        block_size: int | None = None,
        num_blocks: int | None = None,
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
        dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_options(
            normalizer=normalizer, mixing_norm=mixing_norm, extrapolation=extrapolation, grid=grid,
            block_grid=block_grid, lepe_kernel=lepe_kernel, mixing_sigma=mixing_sigma, mixing_clip=mixing_clip,
            mixing_per_head=mixing_per_head, mixing_trainable=mixing_trainable, normalizer_eps=normalizer_eps,
        )  # fmt: skip
        check("mixing_init", mixing_init, one_of(*MIXING_INITS))
        scale = 1.0 if scale is None and normalizer != "none" else scale
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, bias=bias, out_bias=out_bias,
            causal=causal, feature_map=feature_map, feature_eps=feature_eps, scale=scale, qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps, output_norm=output_norm, norm_eps=norm_eps, gate=gate, rope=rope,
            dropout=dropout, init_std=init_std, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        if normalizer != "none":
            check_normalisable(feature_map, "normalizer", normalizer)
        if normalizer == "compat" and causal:
            raise ValueError("normalizer 'compat' needs causal=False: it reproduces the released image code")
        if extrapolation != "error" and not causal:
            raise ValueError(f"extrapolation must be 'error' with causal=False, got {extrapolation!r}")
        self.mixing_clip = None if mixing_clip is None else (float(mixing_clip[0]), float(mixing_clip[1]))
        self.grid, self.block_grid = check_image(grid, block_grid, causal=causal)
        size, blocks = block_sizes(self.grid, self.block_grid)
        self.block_size, self.num_blocks = check_sizes(
            block_size=size if block_size is None else block_size,
            num_blocks=math.prod(blocks) if num_blocks is None else num_blocks,
        )  # fmt: skip
        if self.grid is None:
            blocks = (self.num_blocks,)
        elif (self.block_size, self.num_blocks) != (size, math.prod(blocks)):
            raise ValueError(
                f"block_size and num_blocks must be {size} and {math.prod(blocks)} with grid {grid} and block_grid "
                f"{block_grid}, got {block_size} and {num_blocks}"
            )
        self.normalizer, self.normalizer_eps, self.extrapolation = normalizer, normalizer_eps, extrapolation
        self.mixing_start = (mixing_init, blocks, mixing_norm, mixing_sigma)
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_heads,) * mixing_per_head + (self.num_blocks, self.num_blocks)
        self.mixing_matrix = nn.Parameter(torch.empty(shape, **factory_kwargs), requires_grad=mixing_trainable)
        self.lepe = None
        if lepe_kernel:
            if lepe_kernel % 2 == 0 or self.grid is None or self.num_kv_heads != num_heads:
                raise ValueError(
                    f"lepe_kernel must be odd, with a grid and as many key/value heads as heads, got {lepe_kernel}, "
                    f"grid {self.grid} and {self.num_kv_heads} of {num_heads}"
                )
            width = num_heads * self.v_head_dim
            self.lepe = nn.Conv2d(width, width, lepe_kernel, padding=lepe_kernel // 2, groups=width, **factory_kwargs)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Projections as in `LinearAttention`; the mixing matrix starts as mixing_init says, whatever std is."""
        super().reset_parameters(std, out_std)
        kind, blocks, norm, sigma = self.mixing_start
        start = initial_mixing(kind, blocks, causal=self.causal, norm=norm, sigma=sigma)
        with torch.no_grad():
            self.mixing_matrix.copy_(start.to(self.mixing_matrix))

    def no_weight_decay(self) -> set[str]:
        """The mixing matrix: weight decay pulls it to 0, which means nothing for it."""
        return {"mixing_matrix"}

    @torch.no_grad()
    def project_parameters(self) -> None:
        """Put the mixing matrix back between its bounds, as training does before every step."""
        if self.mixing_clip is not None:
            self.mixing_matrix.clamp_(*self.mixing_clip)

    def mixing(self, blocks: int, dtype: torch.dtype) -> Tensor:
        """The matrix that is used, (blocks, blocks) or (H, blocks, blocks): clipped, triangular, continued."""
        own = local(self.mixing_matrix) if self.mixing_matrix.ndim == 3 else self.read_by_all(self.mixing_matrix)
        matrix = clipped(own.to(dtype), self.mixing_clip)
        return extended(matrix, blocks, self.extrapolation).tril() if self.causal else leading(matrix, blocks)

    def forward(
        self, x: Tensor, context: None = None, *, mask: Mask = None, positions: Tensor | None = None,
        cache: BlockStateCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only. With a grid, an image in raster order.
            context: refused: no cross-attention is defined.
            mask: AttentionMask.padding (on the right: blocks are counted from the first token) or .packed (each
                document starts a new block); a dense mask has no meaning here.
            positions: (T,) or (B, T) integers for the rotation; blocks go by the index of a token.
            cache: from `init_cache`; its states are updated in place.
        """
        if context is not None:
            raise ValueError(f"context must be None: no cross-attention is defined; got {describe(context)}")
        call = self.begin(x, None, mask, positions, cache)
        shards = call.view.shards
        tokens = x.shape[1] if shards is None else shards.tokens
        self.check_tokens(x, tokens, call)
        plain_q, plain_k, q, k, v = self.features(x, call)
        order = raster_order(self.grid, self.block_grid, x.device)
        state, sums = (None, None) if cache is None else cache.current()
        options: dict[str, Any] = {
            "size": self.block_size, "causal": self.causal, "mask": call.view.mask, "order": order, "past": call.past,
            "mixing": self.mixing(block_count(call.past + tokens, self.block_size), q.dtype), "shards": shards,
            "backend": self.backend,
        }  # fmt: skip
        with without_autocast(x):
            out, state = linear_attention(q, k, v, state=state, **options)
            if self.normalizer == "mixed":
                sums = None if sums is None else sums[..., None]
                bottom, _ = linear_attention(plain_q, plain_k, v.new_ones(*v.shape[:3], 1), state=sums, **options)
                out = normalised(out, bottom, self.normalizer_eps)
            elif self.normalizer == "compat":
                below = slot_sums(plain_q, plain_k, options["mixing"], size=self.block_size, order=order)
                out = normalised(out, below, self.normalizer_eps)
            if self.lepe is not None and self.num_heads:
                out = out + self.local_values(self.lepe, v.to(out.dtype))
        y = self.project_heads(out, x, v.dtype)
        if cache is not None and state is not None:
            if shards is None:
                cache.store(state, plain_k)
            else:
                sums = shards.gathered(plain_k.detach())[0].unflatten(1, (-1, self.block_size)).sum(2)
                cache.fill(state, sums, tokens)
        return y

    def state_numbers(self, tokens: int) -> int:
        """Numbers of the states that a rank with so many tokens shares, those of its blocks."""
        groups, width = self.cache_widths()[1]
        return tokens // self.block_size * groups * width * (self.v_head_dim + int(self.normalizer == "mixed"))

    def tensor_splits(self) -> dict[str, Any]:
        """As the base's; the mixing matrix by head where each has its own."""
        return {**super().tensor_splits(), "mixing_matrix": 0 if self.mixing_matrix.ndim == 3 else "whole"}

    def sequence_obstacle(self) -> str | None:
        """Blocks of images are not runs of tokens."""
        if self.grid is not None or self.normalizer == "compat":
            return "a grid and normalizer 'compat' need all tokens of an image"
        return None

    def check_tokens(self, x: Tensor, tokens: int, call: Call) -> None:
        """Refuse a number of tokens or a mask that blocks, grid, normalizer or extrapolation exclude."""
        mask, most = call.view.mask, self.num_blocks * self.block_size
        ends = None if mask is None else mask.cu_seqlens
        if self.grid is not None and tokens != most:
            raise ValueError(f"x must hold the {self.grid[0]} x {self.grid[1]} tokens of grid, got {tokens}")
        if self.normalizer == "compat" and tokens != most:
            raise ValueError(f"normalizer 'compat' needs exactly num_blocks * block_size = {most} tokens, got {tokens}")
        if ends is not None and call.view.shards is not None:
            raise ValueError("mask must not be packed on a shard: every document starts a new block")
        if ends is not None and (self.grid is not None or self.normalizer == "compat"):
            raise ValueError("mask must not be packed with a grid or normalizer 'compat'")
        if self.extrapolation == "error" and (longest := call.past + tokens) > most:
            packed = None if mask is None or ends is None or not has_values(ends) else mask.positions(len(x), tokens)
            longest = longest if packed is None or not len(x) else int(packed.max()) + 1
            if longest > most:
                raise ValueError(
                    f"x must hold at most num_blocks * block_size = {self.num_blocks} * {self.block_size} tokens with "
                    f"extrapolation 'error', got {longest}{'' if packed is None else ' in one document'}"
                )
        real = None if mask is None or not self.causal or call.past else mask.real_queries
        if real is not None and is_readable(real) and bool((real.any(1) & ~real[:, :1].all(1)).any()):
            raise ValueError("mask must not begin with padding, since blocks are counted from the first token")

    def local_values(self, lepe: nn.Conv2d, v: Tensor) -> Tensor:
        """Depthwise convolution of the values (B, T, H, Dv) over the image."""
        assert self.grid is not None
        image: Tensor = v.flatten(2).transpose(1, 2).unflatten(2, self.grid)
        if is_plain(lepe, nn.Conv2d):
            bias = None if lepe.bias is None else lepe.bias.to(v.dtype)
            padding = lepe.kernel_size[0] // 2
            image = F.conv2d(image, lepe.weight.to(v.dtype), bias, padding=padding, groups=image.shape[1])
        else:
            image = lepe(image.to(place_of(lepe)[1])).to(v.dtype)
        return image.flatten(2).transpose(1, 2).reshape(v.shape)

    # Caches, costs, pruning

    def cache_layout(self) -> CacheLayout:
        """What a cache must look like to be this module's."""
        return CacheLayout(self.cache_widths(), block_size=self.block_size)

    def longest(self) -> int | None:
        """Tokens of the trained blocks where nothing is extrapolated."""
        return self.num_blocks * self.block_size if self.extrapolation == "error" else None

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StateCache:  # fmt: skip
        """States of all blocks up to max_length: float32, or float64 for a float64 module or dtype."""
        check_options(max_length=max_length)
        if (most := self.longest()) is not None and max_length > most:
            raise ValueError(
                f"max_length must be at most num_blocks * block_size = {most} with extrapolation 'error', got "
                f"{max_length}"
            )
        return super().init_cache(batch_size, max_length, device, dtype)

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """A block's states over its tokens, rounded up."""
        return -(-super().state_bytes(1, dtype) // self.block_size)

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one sequence's states after so many tokens: G Df (Dv + 1) numbers of each block."""
        return -(-tokens // self.block_size) * super().state_bytes(tokens, dtype)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "mixing" of the states and "attention", in the chunked form."""
        S = T if S is None else S
        groups, Df = self.cache_widths()[1]
        C, H, normal = self.block_size, self.num_heads, int(self.normalizer != "none")
        Dv = self.v_head_dim + normal
        n, n_new = -(-S // C), -(-T // C)
        padded = n_new * C if T > 1 else 1
        mixed = H if self.mixing_matrix.ndim == 3 else groups
        within = 2 * padded * C * H * (Df * (1 + normal) + Dv) if self.causal and T > 1 else 0
        states = 2 * padded * (groups + H) * Df * Dv
        mixing = 2 * n * n_new * mixed * Df * Dv if T > 1 or S % C == 1 or C == 1 else 0
        return {"projections": self.projection_flops(T, T), "mixing": mixing, "attention": states + within}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads."""
        super().keep_heads(heads, groups)
        if self.mixing_matrix.ndim == 3:
            self.mixing_matrix = keep_entries(self.mixing_matrix, heads)
        if self.lepe is not None:
            channels = head_rows(heads, self.v_head_dim).tolist()
            for name, parameter in list(self.lepe.named_parameters()):
                setattr(self.lepe, name, keep_entries(parameter, channels))
            self.lepe.in_channels = self.lepe.out_channels = self.lepe.groups = len(channels)
