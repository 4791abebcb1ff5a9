"""What the mechanisms share beside their mathematics: sizes, initialisation, caches, costs, pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import CacheLayout, KeyValueCache
from attnzoo.masks import AttentionMask
from attnzoo.modules.call import Positions, rotary_tables
from attnzoo.modules.checks import (
    check_groups,
    check_prunable,
    counted_tokens,
    derive_head_dim,
    named_options,
    starting_stds,
)
from attnzoo.modules.heads import HeadLayout, keep_columns, keep_rows
from attnzoo.modules.hints import HintedCall
from attnzoo.modules.parallel import Parallel
from attnzoo.modules.recorded import Recorded
from attnzoo.ops.head_mixing import HeadMap
from attnzoo.ops.submodules import matrix_of, own_shapes, place_of, start_layer
from attnzoo.rotary import Rotary, RotaryTable, as_rotary
from attnzoo.rules import check_options, check_sizes

Factors = list[tuple[Tensor, Tensor]]


class Mechanism(Recorded, HintedCall, Parallel):
    """Base of the mechanisms, and a start for your own: see `attnzoo.modules.protocol` for the contract.

    A subclass has projections named q_proj, k_proj, v_proj and o_proj, or overrides what reads them: `cache_widths`,
    `qk_circuit`, `ov_circuit`, `keep_heads`.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context that keys are made from. Default: E. Needs causal=False.
        rope: rotary position embedding, or None.
        scale: factor of the scores. Default: D ** -0.5.
        sliding_window: keys that a query sees at most, or None.
        sink_tokens: leading keys that stay visible outside the window.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: name of a backend.
        options: what `attnzoo.rules.check_options` checks beside these, named by the subclass, which reads them.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
        TypeError: for an option that no constructor of the subclass names, since it would have no effect.
    """

    aux_loss: Tensor | None = None
    has_patterns = True
    depth: int = 0
    factored_circuits = False
    takes_bias = False
    """Whether the scores take an additive mask."""
    takes_pair_masks = True
    """Whether a mask may hide any single pair of a query and a key, with a cache too."""
    takes_left_padding = True
    """Whether tokens that a mask hides before a sequence leave its outputs as they are."""
    cache_type: type[Any] = KeyValueCache
    caches_all_tokens = False
    """Whether caches hold all tokens, with a window too."""
    input_layer = "q_proj"
    """Submodule whose weight has the dtype and the device that inputs must have."""
    one_source_reason = "keys and values are made from it"
    shown: tuple[str, ...] = ("rope", "sliding_window", "pruned_heads")
    """Attributes that `repr` shows where they are set."""
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        rope: Rotary | None = None,
        scale: float | None = None,
        sliding_window: int | None = None,
        sink_tokens: int = 0,
        causal: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_options(
            dropout=dropout, sliding_window=sliding_window, sink_tokens=sink_tokens, scale=scale, causal=causal,
            init_std=init_std, **named_options(type(self), options),
        )  # fmt: skip
        if sink_tokens and sliding_window is None:
            raise ValueError(f"sink_tokens needs sliding_window, got sink_tokens {sink_tokens} without a window")
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        sizes = check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim, v_head_dim=head_dim if v_head_dim is None else v_head_dim,
            kdim=embed_dim if kdim is None else kdim,
        )  # fmt: skip
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim, self.kdim = sizes
        check_groups(self.num_heads, self.num_kv_heads)
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        self.heads = HeadLayout.of(self.num_heads, self.num_kv_heads)
        self.rope = as_rotary(rope)
        self.rope_dim = 0 if self.rope is None else self.rope.width(self.head_dim)
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.sliding_window = sliding_window
        self.sink_tokens = sink_tokens
        self.causal = causal
        self.dropout = dropout
        self.init_std = init_std
        self.backend = check_name(backend)

    def make_projections(
        self, q: int, k: int, v: int, out: int, *, bias: bool, o_bias: bool | None = None, **factory_kwargs: Any
    ) -> None:
        """q_proj, k_proj and v_proj with so many rows, and o_proj with so many columns, whose bias defaults to bias."""
        self.q_proj = nn.Linear(self.embed_dim, q, bias, **factory_kwargs)
        self.k_proj = nn.Linear(self.kdim, k, bias, **factory_kwargs)
        self.v_proj = nn.Linear(getattr(self, "vdim", self.kdim), v, bias, **factory_kwargs)
        self.o_proj = nn.Linear(out, self.embed_dim, bias if o_bias is None else o_bias, **factory_kwargs)

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, norms 1, the rest as such.

        std defaults to the constructor's init_std, out_std to std.
        """
        std, out_std = starting_stds(self.init_std, std, out_std)
        for name, module in self.named_children():
            start_layer(module, out_std if name == "o_proj" else std)

    def rotation_tables(
        self, x: Tensor, source: Tensor, positions: Positions, mask: AttentionMask | None, **options: Any
    ) -> tuple[RotaryTable, RotaryTable]:
        """Tables of queries made from x and keys made from source; options as in `rotary_tables`."""
        assert self.rope is not None
        return rotary_tables(self.rope, self.rope_dim, x, source, positions, mask, **options)

    @property
    def weight_dropout(self) -> float:
        """Probability of dropping an attention weight now."""
        return self.dropout if self.training else 0.0

    @property
    def score_heads(self) -> int:
        """Heads H of the scores, which a mask (B, H, T, S) refers to."""
        return self.num_heads

    @property
    def reads_token_index(self) -> bool:
        """Whether scores depend on the distance of tokens in the sequence other than by masks and the rotation."""
        return getattr(self, "alibi_slopes", None) is not None

    @property
    def head_outputs(self) -> nn.Module:
        """The module whose input is the output of every head, (B, T, H Dv), head-major."""
        return self.o_proj

    def observed_heads(self) -> tuple[int, ...] | None:
        """Which heads of an `Observation` the module's outputs are, in order; None: all as they are."""
        return None

    def gate_layers(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """Layers whose outputs are logits of sigmoid gates, by name, and which of the equal parts each head reads."""
        return {}

    # Caches

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """What the cache holds for a token: (heads, width) of each buffer."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)

    def longest(self) -> int | None:
        """Tokens that a sequence may have at most, or None."""
        return None

    def cache_layout(self) -> CacheLayout:
        """What a cache must look like to be this module's."""
        return CacheLayout(self.cache_widths(), self.sliding_window, self.sink_tokens)

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:  # fmt: skip
        """A cache for max_length tokens, or for the window and the sink tokens where the module has a window.

        device and dtype default to those of the module's weights.
        """
        own = place_of(self)
        if self.sequence_parallel is not None and self.sequence_parallel.size > 1:
            from attnzoo.distributed.cache import ShardedCache

            return ShardedCache(
                self, batch_size, max_length, own[0] if device is None else device, own[1] if dtype is None else dtype
            )
        window = None if self.caches_all_tokens else self.sliding_window
        cache = self.cache_type(
            batch_size, max_length, self.cache_widths(), window=window, sink_tokens=self.sink_tokens,
            device=own[0] if device is None else device, dtype=own[1] if dtype is None else dtype,
        )  # fmt: skip
        cache.layout = self.cache_layout()
        return cache

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a token takes in a cache of that dtype."""
        return sum(heads * width for heads, width in self.cache_widths()) * dtype.itemsize

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that the cache of one sequence holds after so many tokens."""
        window = None if self.caches_all_tokens else self.sliding_window
        kept = tokens if window is None else min(tokens, window + self.sink_tokens)
        return kept * self.cache_bytes_per_token(dtype)

    # Costs

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T).

        Every multiply-add of a matrix product counts 2; pairs that causality or a window hides do not count. A
        cross-attending module projects S context tokens.
        """
        return sum(self.flops_by_part(*counted_tokens(T, S, causal=self.causal)).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:  # noqa: ARG002
        """The same by part, such as "projections" and "attention"."""
        raise ValueError(f"{type(self).__name__} does not count its FLOPs: define flops_by_part(T, S)")

    # Linear forms

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E) and key weights (G, D, kdim) per head with their norms' gains, detached."""
        q = per_head(self.q_proj, self.head_dim, getattr(self, "q_norm", None))
        return q, per_head(self.k_proj, self.head_dim, getattr(self, "k_norm", None))

    def value_weights(self) -> Tensor:
        """Value weights (G, Dv, vdim) per head, detached."""
        return per_head(self.v_proj, self.v_head_dim)

    def qk_circuit(self, part: str = "full") -> Factors:
        """Per query head the factors (WQ_h, WK_h), each (d, E), of the logits' bilinear form at offset 0.

        Norm gains are folded in; RMS statistics and biases are left out. part: "full", or of a module with
        rope the "rope" features or the rest, "nope".
        """
        rows = self._part_rows(part)
        wq, wk = self.head_weights()
        return [(wq[h, rows], wk[g, rows]) for h, g in enumerate(self.heads.reads)]

    def ov_circuit(self) -> Factors:
        """Per head the factors (WV_h (Dv, E), WO_h (E, Dv)) of what it writes for a token that it attends to."""
        wv, wo = self.value_weights(), matrix_of(self.o_proj).unflatten(1, (-1, self.v_head_dim))
        return [(wv[g], wo[:, h]) for h, g in enumerate(self.heads.reads)]

    def _part_rows(self, part: str) -> slice:
        if part == "full":
            return slice(None)
        if part not in ("rope", "nope"):
            raise ValueError(f"part must be 'full', 'rope' or 'nope', got {part!r}")
        if self.rope is None:
            raise ValueError(f"part must be 'full' for a module without rope, got {part!r}")
        return slice(self.rope_dim) if part == "rope" else slice(self.rope_dim, None)

    # Training

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would pull away from where they mean nothing."""
        return set()

    def project_parameters(self) -> None:
        """Put parameters back between their bounds, as training does before every step."""

    # Pruning

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the heads that are gone, ascending."""
        return self.heads.pruned

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove query heads for good; the rest computes what it did with these heads' outputs set to 0.

        indices are original head numbers, and calls add up. A key/value head goes when no query head reads it
        any more. With no head left the module returns the output bias, or zeros. Optimisers and caches have
        to be created again. To load a pruned state dict, prune a new module by `pruned_heads` first.

        Raises:
            ValueError: for a number out of range, a repeated one, a head that is gone already, or a module whose
                projections were replaced (merge adapters first).
        """
        layout = self.heads.prune(indices)
        check_prunable(self)
        self.keep_heads(*self.heads.places(layout))
        self.heads = layout
        self.num_heads, self.num_kv_heads = len(layout.kept), len(layout.groups)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:  # noqa: ARG002
        """Cut the weights down to these places of query heads and of key/value heads."""
        raise ValueError(f"{type(self).__name__} cannot be pruned: define keep_heads(heads, groups)")

    def keep_projections(self, heads: list[int], groups: list[int]) -> None:
        """Cut q_proj, k_proj, v_proj and o_proj down to these places of query heads and of key/value heads."""
        keep_rows(self.q_proj, heads, self.head_dim)
        keep_rows(self.k_proj, groups, self.head_dim)
        keep_rows(self.v_proj, groups, self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)

    def extra_repr(self) -> str:
        """The sizes and the options that are set."""
        sizes = f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"
        options = [f"{name}={value}" for name in self.shown if _is_set(value := getattr(self, name))]
        return ", ".join([sizes, *options, f"causal={self.causal}", f"backend={self.backend}", *own_shapes(self)])


def _is_set(value: Any) -> bool:
    return not isinstance(value, Tensor) and bool(value)


def per_head(
    linear: nn.Module, width: int, norm: nn.RMSNorm | None = None, head_map: nn.Module | None = None
) -> Tensor:
    """Weights (N, width, E) of a projection's heads, detached: a linear head map and a norm's gain multiplied in."""
    matrix = matrix_of(linear)
    weights = matrix.view(matrix.shape[0] // width, width, matrix.shape[1])
    if isinstance(head_map, HeadMap):
        weights = head_map.weight.detach() @ weights
    # A gain of one head, or of all heads together.
    return weights if norm is None else weights * norm.weight.detach().view(-1, width, 1)
