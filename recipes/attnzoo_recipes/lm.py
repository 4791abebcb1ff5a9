"""The decoder language model that every mechanism is compared in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo import AttentionMask
from attnzoo.modules.protocol import missing_members

_CALL = ("mask", "positions", "cache")


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202): (silu(x Wgate^T) * x Wup^T) Wdown^T, no biases.

    Args:
        embed_dim: width E of input and output.
        mlp_dim: hidden width M.
    """

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, mlp_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderBlock(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)).

    Args:
        embed_dim: width E.
        attention: a causal mechanism (`attnzoo.modules.protocol`).
        mlp: the feed-forward layer.
        norm_eps: added to the mean square in both norms.
        dropout: probability of dropping an element of the output of either branch.
    """

    attn: Any  # an nn.Module with the members of the protocol
    mlp: SwiGLU

    def __init__(self, embed_dim: int, attention: nn.Module, mlp: SwiGLU, *, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(embed_dim, eps=norm_eps)
        self.attn = attention
        self.mlp_norm = nn.RMSNorm(embed_dim, eps=norm_eps)
        self.mlp = mlp
        self.dropout = dropout

    def forward(self, x: Tensor, mask: AttentionMask | Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """x (B, T, E) -> (B, T, E); mask, positions and cache are those of the attention module."""
        x = x + self._dropped(self.attn(self.attn_norm(x), mask=mask, positions=positions, cache=cache))
        return x + self._dropped(self.mlp(self.mlp_norm(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.dropout and self.training else branch


class DecoderLM(nn.Module):
    """Pre-norm decoder: embedding, L blocks of attention and SwiGLU, a final RMSNorm, logits. No biases.

    The attention modules initialise themselves: the decoder calls their `reset_parameters(std=, out_std=)` and never
    sets their parameters, since identity and zero initialisations are part of a mechanism. Its own weights are normal
    with init_std, projections back into the residual stream with init_std / sqrt(2 L). They are drawn before those of
    the attention, so that with the same seed they are the same for every mechanism.

    Args:
        vocab_size: number of token ids V.
        attention: makes an attention module from embed_dim; called once per layer.
        embed_dim: width E.
        num_layers: blocks L.
        mlp_dim: hidden width of the SwiGLU. Default: 8/3 E, rounded to a multiple of 64.
        tie_embeddings: logits use the embedding matrix.
        norm_eps: added to the mean square in every norm.
        dropout: probability of dropping an element of the embedding and of the output of each branch; dropout of
            attention weights is an option of the attention module.
        init_std: standard deviation of the initialisation.
        activation_checkpointing: in training, store only the input of each block and recompute the block in the
            backward pass.

    Raises:
        ValueError: for a size below 1, dropout outside [0, 1), or an attention module that is not causal or lacks
            members of the protocol.
    """

    def __init__(
        self,
        vocab_size: int,
        attention: Callable[[int], nn.Module],
        *,
        embed_dim: int = 256,
        num_layers: int = 4,
        mlp_dim: int | None = None,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        init_std: float = 0.02,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        mlp_dim = default_mlp_dim(embed_dim) if mlp_dim is None else mlp_dim
        sizes = {"vocab_size": vocab_size, "embed_dim": embed_dim, "num_layers": num_layers, "mlp_dim": mlp_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if init_std <= 0:
            raise ValueError(f"init_std must be positive, got {init_std}")
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.mlp_dim = mlp_dim
        self.dropout = dropout
        self.init_std = init_std
        self.activation_checkpointing = activation_checkpointing

        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.head = None if tie_embeddings else nn.Linear(embed_dim, vocab_size, bias=False)
        mlps = [SwiGLU(embed_dim, mlp_dim) for _ in range(num_layers)]
        self._reset_own(mlps)
        self.blocks = nn.ModuleList(
            DecoderBlock(embed_dim, _checked(attention(embed_dim)), mlp, norm_eps=norm_eps, dropout=dropout)
            for mlp in mlps
        )
        self.norm = nn.RMSNorm(embed_dim, eps=norm_eps)
        self._reset_attention()

    @property
    def layers(self) -> list[DecoderBlock]:
        """The blocks."""
        return [cast(DecoderBlock, block) for block in self.blocks]

    @property
    def out_std(self) -> float:
        """Standard deviation of projections into the residual stream, init_std / sqrt(2 L)."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_parameters(self) -> None:
        """Draw all parameters again, the decoder's own first."""
        self._reset_own([block.mlp for block in self.layers])
        for norm in (self.norm, *(n for block in self.layers for n in (block.attn_norm, block.mlp_norm))):
            nn.init.ones_(norm.weight)
        self._reset_attention()

    def _reset_own(self, mlps: list[SwiGLU]) -> None:
        nn.init.normal_(self.embedding.weight, std=self.init_std)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.init_std)
        for mlp in mlps:
            nn.init.normal_(mlp.gate_proj.weight, std=self.init_std)
            nn.init.normal_(mlp.up_proj.weight, std=self.init_std)
            nn.init.normal_(mlp.down_proj.weight, std=self.out_std)

    def _reset_attention(self) -> None:
        for block in self.layers:
            block.attn.reset_parameters(std=self.init_std, out_std=self.out_std)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: AttentionMask | Tensor | None = None,
        positions: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """tokens (B, T) integers -> logits (B, T, V).

        Args:
            tokens: with caches, only the new tokens. Ids of CPU tensors are checked.
            mask: one for all layers; True = may attend. See the attention modules.
            positions: (T,) or (B, T) integers. Default: continue the caches, otherwise 0 .. T-1, restarting in each
                packed document.
            caches: from `init_caches`; filled in place.

        Raises:
            ValueError: for tokens of the wrong shape or type, an id outside the vocabulary, or the wrong number of
                caches.
        """
        self._check(tokens, caches)
        x = self.embedding(tokens)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            if recompute and cache is None:
                x = checkpoint(block, x, mask, positions, None, use_reentrant=False)
            else:
                x = block(x, mask, positions, cache)
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return logits

    def _check(self, tokens: Tensor, caches: list[Any] | None) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if caches is not None and len(caches) != self.num_layers:
            raise ValueError(f"caches must hold one cache per layer, got {len(caches)} for {self.num_layers} layers")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
            low, high = tokens.aminmax()
            if low < 0 or high >= self.vocab_size:
                worst = int(low if low < 0 else high)
                raise ValueError(f"tokens must be ids from 0 to {self.vocab_size - 1}, got {worst}")

    def init_caches(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """One cache per layer for max_length tokens; device and dtype default to those of the weights."""
        return [block.attn.init_cache(batch_size, max_length, device, dtype) for block in self.layers]

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes by which the caches of all layers grow with each token of a sequence."""
        return sum(int(block.attn.cache_bytes_per_token(dtype)) for block in self.layers)

    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens: attention, matrices of the MLPs, logits. Norms are not counted."""
        mlp = 2 * T * 3 * self.embed_dim * self.mlp_dim
        attention = sum(int(block.attn.flops(T, T)) for block in self.layers)
        return attention + self.num_layers * mlp + 2 * T * self.embed_dim * self.vocab_size


def default_mlp_dim(embed_dim: int) -> int:
    """8/3 E rounded to a multiple of 64: three matrices of that width have as many elements as two of width 4 E."""
    return max(64, 64 * round(8 * embed_dim / (3 * 64)))


def _checked(attention: nn.Module) -> nn.Module:
    """The module, or ValueError in one sentence if it is not causal or lacks what a decoder needs of a mechanism."""
    if not isinstance(attention, nn.Module):
        raise ValueError(f"attention must make an nn.Module from embed_dim, got {attention!r}")
    name = type(attention).__name__
    missing = missing_members(attention)
    missing += [] if hasattr(attention, "causal") or "causal" in missing else ["causal"]
    parameters = inspect.signature(attention.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        missing += [f"argument {keyword} of forward" for keyword in _CALL if keyword not in parameters]
    if missing:
        raise ValueError(
            f"attention must have the members of attnzoo.modules.protocol, got {name} without {', '.join(missing)}"
        )
    # One token that sees a later one makes the loss meaningless.
    causal: Any = attention.causal
    if causal is not True:
        raise ValueError(f"attention must be causal=True in a decoder, got {name} with causal={causal}")
    return attention
