"""The decoder language model that every mechanism is compared in."""

from __future__ import annotations

import functools
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
from attnzoo_recipes.feed_forward import SwiGLU as SwiGLU
from attnzoo_recipes.feed_forward import default_mlp_dim as default_mlp_dim

_CALL = ("mask", "positions", "cache")


class DecoderBlock(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); in parallel x + attn(norm(x)) + mlp(norm(x)), with one norm.

    Args:
        embed_dim: width E.
        attention: a causal mechanism (`attnzoo.modules.protocol`).
        mlp: the feed-forward layer; None for a block of attention alone. If its forward has an argument `mask`, it is
            told which tokens are not padding, (B, T), unless there is a cache.
        norm_eps: added to the mean square in the norms.
        dropout: probability of dropping an element of the output of either branch.
        parallel: whether both branches read the same norm of the same x.
    """

    attn: Any  # an nn.Module with the members of the protocol
    mlp: Any  # an nn.Module with reset_parameters and flops, or None
    mlp_norm: nn.RMSNorm | None

    def __init__(
        self,
        embed_dim: int,
        attention: nn.Module,
        mlp: nn.Module | None,
        *,
        norm_eps: float,
        dropout: float,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(embed_dim, eps=norm_eps)
        self.attn = attention
        self.mlp_norm = None if parallel or mlp is None else nn.RMSNorm(embed_dim, eps=norm_eps)
        self.mlp = mlp
        self.dropout = dropout
        self._mlp_takes_mask = mlp is not None and "mask" in inspect.signature(mlp.forward).parameters

    def forward(self, x: Tensor, mask: AttentionMask | Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """x (B, T, E) -> (B, T, E); mask, positions and cache are those of the attention module."""
        normed = self.attn_norm(x)
        x = x + self._dropped(self.attn(normed, mask=mask, positions=positions, cache=cache))
        if self.mlp is None:
            return x
        normed = normed if self.mlp_norm is None else self.mlp_norm(x)
        options = {"mask": _real_tokens(mask, x)} if self._mlp_takes_mask and cache is None else {}
        return x + self._dropped(self.mlp(normed, **options))

    def _dropped(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.dropout and self.training else branch


class DecoderLM(nn.Module):
    """Pre-norm decoder: embedding, L blocks of attention and a feed-forward layer, a final RMSNorm, logits. No biases.

    The attention modules initialise themselves: the decoder calls their `reset_parameters(std=, out_std=)` and never
    sets their parameters, since identity and zero initialisations are part of a mechanism. Feed-forward layers have
    the same method. The decoder's own weights are normal with init_std, projections back into the residual stream with
    init_std / sqrt(n), n the number of branches: 2 L, or L without feed-forward layers. They and those of the
    feed-forward layers are drawn before those of the attention, so that with the same seed they are the same for every
    mechanism.

    Args:
        vocab_size: number of token ids V.
        attention: makes an attention module from embed_dim; called once per layer.
        embed_dim: width E.
        num_layers: blocks L.
        mlp_dim: hidden width of `SwiGLU`, if that is the feed-forward layer. Default: 8/3 E, rounded to a multiple of
            64.
        feed_forward: makes a feed-forward layer from embed_dim (`attnzoo_recipes.feed_forward`), which has
            reset_parameters(std=, out_std=) and flops(T); None for blocks of attention alone.
        sparse_feed_forward: the same for every `sparse_every`-th block, the first of which is block sparse_every - 1.
        sparse_every: of `sparse_feed_forward`.
        parallel: attention and feed-forward layer read the same norm of the same input, with one norm in a block.
        tie_embeddings: logits use the embedding matrix.
        norm_eps: added to the mean square in every norm.
        dropout: probability of dropping an element of the embedding and of the output of each branch; dropout of
            attention weights is an option of the attention module.
        init_std: standard deviation of the initialisation.
        activation_checkpointing: in training, store only the input of each block and recompute the block in the
            backward pass.

    Raises:
        ValueError: for a size below 1, dropout outside [0, 1), a negative norm_eps, an attention module that is not
            causal or lacks members of the protocol, mlp_dim without SwiGLU, or parallel without a feed-forward layer.
    """

    def __init__(
        self,
        vocab_size: int,
        attention: Callable[[int], nn.Module],
        *,
        embed_dim: int = 256,
        num_layers: int = 4,
        mlp_dim: int | None = None,
        feed_forward: Callable[[int], nn.Module] | None = SwiGLU,
        sparse_feed_forward: Callable[[int], nn.Module] | None = None,
        sparse_every: int = 2,
        parallel: bool = False,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        init_std: float = 0.02,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size, "embed_dim": embed_dim, "num_layers": num_layers, "mlp_dim": mlp_dim,
            "sparse_every": sparse_every,
        }  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if not 0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps must be finite and not negative, got {norm_eps}")
        if init_std <= 0:
            raise ValueError(f"init_std must be positive, got {init_std}")
        if parallel and feed_forward is None:
            raise ValueError("parallel must be false without a feed-forward layer, got true with feed_forward null")
        if mlp_dim is not None:
            maker: Any = feed_forward
            made = made_class(maker)
            if made is None or not issubclass(made, SwiGLU):
                name = maker if made is None else made.__name__
                raise ValueError(
                    "mlp_dim must not be given unless feed_forward is SwiGLU, whose width it is, "
                    f"got {mlp_dim} and {name}"
                )
            feed_forward = functools.partial(maker, mlp_dim=mlp_dim)
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.dropout = dropout
        self.init_std = init_std
        self.activation_checkpointing = activation_checkpointing

        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.head = None if tie_embeddings else nn.Linear(embed_dim, vocab_size, bias=False)
        sparse = [sparse_feed_forward is not None and (i + 1) % sparse_every == 0 for i in range(num_layers)]
        makers = [sparse_feed_forward if is_sparse else feed_forward for is_sparse in sparse]
        mlps = [None if maker is None else _checked_feed_forward(maker(embed_dim)) for maker in makers]
        self.mlp_dim = mlps[0].gate_proj.out_features if isinstance(mlps[0], SwiGLU) else None
        self.num_branches = num_layers + sum(mlp is not None for mlp in mlps)
        self._reset_own(mlps)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                embed_dim, _checked(attention(embed_dim)), mlp, norm_eps=norm_eps, dropout=dropout, parallel=parallel
            )
            for mlp in mlps
        )
        self.norm = nn.RMSNorm(embed_dim, eps=norm_eps)
        for depth, block in enumerate(self.layers):
            block.attn.depth = depth
        self._reset_attention()

    @property
    def layers(self) -> list[DecoderBlock]:
        """The blocks."""
        return [cast(DecoderBlock, block) for block in self.blocks]

    @property
    def out_std(self) -> float:
        """Standard deviation of projections into the residual stream, init_std / sqrt(number of branches)."""
        return self.init_std / math.sqrt(self.num_branches)

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters; tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_parameters(self) -> None:
        """Draw all parameters again, the decoder's own first."""
        self._reset_own([block.mlp for block in self.layers])
        for norm in (self.norm, *(n for block in self.layers for n in (block.attn_norm, block.mlp_norm))):
            if norm is not None:
                nn.init.ones_(norm.weight)
        self._reset_attention()

    def _reset_own(self, mlps: list[Any]) -> None:
        nn.init.normal_(self.embedding.weight, std=self.init_std)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.init_std)
        for mlp in mlps:
            if mlp is not None:
                mlp.reset_parameters(std=self.init_std, out_std=self.out_std)

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

        Arguments and errors are those of `hidden`.
        """
        return F.linear(self.hidden(tokens, mask=mask, positions=positions, caches=caches), self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """(V, E), which makes logits of `hidden`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: AttentionMask | Tensor | None = None,
        positions: Tensor | None = None,
        caches: list[Any] | None = None,
    ) -> Tensor:
        """tokens (B, T) integers -> what the last norm returns, (B, T, E).

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
        out: Tensor = self.norm(x)
        return out

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
        """Forward FLOPs of one sequence of T tokens: attention, feed-forward layers, logits. Norms are not counted."""
        blocks = (int(b.attn.flops(T, T)) + (0 if b.mlp is None else int(b.mlp.flops(T))) for b in self.layers)
        return sum(blocks) + 2 * T * self.embed_dim * self.vocab_size


def made_class(maker: Any) -> type[nn.Module] | None:
    """The one class of modules that a class, or a functools.partial of one, makes; None for anything else."""
    parts = [maker.func, *maker.args] if isinstance(maker, functools.partial) else [maker]
    classes = [part for part in parts if isinstance(part, type) and issubclass(part, nn.Module)]
    return classes[0] if len(classes) == 1 else None


def _checked_feed_forward(module: nn.Module) -> nn.Module:
    """The module, or ValueError in one sentence if it lacks what a decoder needs of a feed-forward layer."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"feed_forward must make an nn.Module from embed_dim, got {module!r}")
    missing = [name for name in ("reset_parameters", "flops") if not callable(getattr(module, name, None))]
    if missing:
        raise ValueError(
            "feed_forward must have reset_parameters(std=, out_std=) and flops(T), got "
            f"{type(module).__name__} without {' and '.join(missing)}"
        )
    return module


def _real_tokens(mask: AttentionMask | Tensor | None, x: Tensor) -> Tensor | None:
    """Which of x (B, T, E) are tokens and not padding, (B, T); None if all are."""
    if not isinstance(mask, AttentionMask):
        return None
    if mask.real_queries is not None or mask.lengths is None:
        return mask.real_queries
    return torch.arange(x.shape[1], device=x.device) < mask.lengths[:, None].to(x.device)


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
