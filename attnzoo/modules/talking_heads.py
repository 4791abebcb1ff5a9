"""Talking-heads attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backends import BackendUnavailable, check_name
from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import check_cache, check_input, check_options, check_sizes, one_source
from attnzoo.modules.positions import rotary_tables
from attnzoo.modules.structure import attention_pairs, head_rows, keep_columns, keep_rows, surviving_heads
from attnzoo.ops.composed_attention import Composition, Sight, composed_attention
from attnzoo.rotary import Rotary, rotate


class TalkingHeadsAttention(nn.Module):
    """Talking-heads attention (Shazeer et al. 2020, arXiv:2003.02436).

    Heads are mixed by one matrix before the softmax and by another after it:

        J_m = D^-0.5 q_m . k_m                       m = 1 .. Hk
        L_h = sum_m J_m logits_proj[m, h]            h = 1 .. H
        U_n = sum_h softmax(L_h + visibility) weights_proj[h, n]      n = 1 .. Hv
        o_n = sum_s U_n v_n;   y = concat_n(o_n) Wo

    Neither mix has a residual or a bias: identity matrices give multi-head attention, and they are the start where
    all three numbers of heads agree. U may be negative.

    The authors' code scales the queries' start instead of the scores; here scores are scaled.

    Args:
        embed_dim: width E of input and output.
        num_heads: softmax heads H.
        num_qk_heads: heads Hk of queries and keys. Default: H.
        num_v_heads: heads Hv of values. Default: H.
        head_dim: width D of queries and keys. Default: E / Hk.
        v_head_dim: width Dv of values. Default: E / Hv.
        kdim: width of the context. Default: E.
        bias: whether the projections have one.
        mix_init: "identity" or "fan_in" (truncated normal, std 1 / sqrt(source heads)). Default: the identity where
            the numbers of heads agree.
        rope: rotary position embedding, or None.
        sliding_window: a query sees this many keys at most, itself included.
        causal: no query sees a later key.
        dropout: probability of dropping an entry of U in training.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are made anew in the
            backward pass.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked for more than chunk_size queries), "eager" (all scores at once) or "triton" (fused
            kernels, by name only).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_qk_heads: int | None = None,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        mix_init: str | None = None,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        sliding_window: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        chunk_size: int = 128,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_qk_heads = num_heads if num_qk_heads is None else num_qk_heads
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.kdim = embed_dim if kdim is None else kdim
        check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_qk_heads=num_qk_heads, num_v_heads=num_v_heads,
            kdim=self.kdim, chunk_size=chunk_size,
        )  # fmt: skip
        self.head_dim = _width("head_dim", embed_dim, "num_qk_heads", num_qk_heads, head_dim)
        self.v_head_dim = _width("v_head_dim", embed_dim, "num_v_heads", num_v_heads, v_head_dim)
        check_options(
            dropout=dropout, logit_softcap=None, sliding_window=sliding_window, sink_tokens=0, sink=None, scale=None
        )  # fmt: skip
        if sliding_window is not None and not causal:
            raise ValueError(f"sliding_window needs causal=True, got {sliding_window} and causal=False")
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        equal = num_qk_heads == num_heads == num_v_heads
        mix_init = ("identity" if equal else "fan_in") if mix_init is None else mix_init
        if mix_init not in ("identity", "fan_in"):
            raise ValueError(f"mix_init must be 'identity' or 'fan_in', got {mix_init!r}")
        if mix_init == "identity" and not equal:
            raise ValueError(
                f"mix_init 'identity' needs equal numbers of heads, got {num_qk_heads}, {num_heads} and {num_v_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_qk_heads = num_qk_heads
        self.num_v_heads = num_v_heads
        self.mix_init = mix_init
        self.rope = rope
        self.rope_dim = 0 if rope is None else rope.width(self.head_dim)
        self.scale = self.head_dim**-0.5
        self.sliding_window = sliding_window
        self.sink_tokens = 0
        self.causal = causal
        self.dropout = dropout
        self.chunk_size = chunk_size
        self.init_std = init_std
        self.backend = check_name(backend)
        self._total_heads, self._kept_heads = num_v_heads, tuple(range(num_v_heads))

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_qk_heads * self.head_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, num_qk_heads * self.head_dim, bias, **made)
        self.v_proj = nn.Linear(self.kdim, num_v_heads * self.v_head_dim, bias, **made)
        self.o_proj = nn.Linear(num_v_heads * self.v_head_dim, embed_dim, bias, **made)
        self.logits_proj = nn.Parameter(torch.empty(num_qk_heads, num_heads, **made))
        self.weights_proj = nn.Parameter(torch.empty(num_heads, num_v_heads, **made))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, mixes as mix_init says."""
        std = self.init_std if std is None else std
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std if out_std is None else out_std)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for mix in (self.logits_proj, self.weights_proj):
            if self.mix_init == "identity":
                nn.init.eye_(mix)
            else:
                nn.init.trunc_normal_(mix, std=mix.shape[0] ** -0.5)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The mixes: weight decay would pull them to 0 and not to their start."""
        return [self.logits_proj, self.weights_proj]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention; needs causal=False, and positions if rope is set.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. With a
                cache it covers cached and new keys. It acts after the first mix.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; filled in place.
        """
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        source = one_source(self, x, context)
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        if cache is not None:
            check_cache(cache, KeyValueCache, self.causal, context, mask)
        q = self.q_proj(x).view(B, T, self.num_qk_heads, self.head_dim)
        k = self.k_proj(source).view(B, S, self.num_qk_heads, self.head_dim)
        v = self.v_proj(source).view(B, S, self.num_v_heads, self.v_head_dim)
        if self.rope is not None:
            q_table, k_table = rotary_tables(
                self.rope, self.rope_dim, q, k, positions, mask, cross=context is not None, past=past,
                limit=None if cache is None else cache.max_length,
            )  # fmt: skip
            q, k = rotate(q, *q_table, self.rope.style), rotate(k, *k_table, self.rope.style)
        key_positions = None
        if cache is not None:
            k, v, key_positions = cache.append(k, v)
        out = composed_attention(
            q, k, v,
            Composition(self.logits_proj[None], residual=False),
            Composition(self.weights_proj[None], residual=False),
            Sight(self.causal, self.sliding_window, mask, past if cache is not None else k.shape[1] - T, key_positions),
            scale=self.scale, dropout=self.dropout if self.training else 0.0,
            chunk_size=composed_chunk(self.backend, self.chunk_size), backend=self.backend,
        )  # fmt: skip
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """A cache for max_length tokens, or for the window; device and dtype default to those of the weights."""
        weight = self.q_proj.weight
        return KeyValueCache(
            batch_size,
            max_length,
            ((self.num_qk_heads, self.head_dim), (self.num_v_heads, self.v_head_dim)),
            window=self.sliding_window,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Hk D + Hv Dv numbers of that dtype."""
        return (self.num_qk_heads * self.head_dim + self.num_v_heads * self.v_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T)."""
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections", "attention" and "composition"."""
        S = T if S is None else S
        keys = T if self.causal else S
        K, H, V = self.num_qk_heads, self.num_heads, self.num_v_heads
        D, Dv = self.head_dim, self.v_head_dim
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        return {
            "projections": 2 * T * self.embed_dim * (K * D + V * Dv) + 2 * keys * self.kdim * (K * D + V * Dv),
            "attention": 2 * (K * D + V * Dv) * pairs,
            "composition": 2 * (K * H + H * V) * pairs,
        }

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query-key head the factors (WQ_m, WK_m), each (D, E), before the first mix.

        part: "full", or of a module with rope the "rope" features or the rest, "nope".
        """
        if part not in ("full", "rope", "nope") or (part != "full" and self.rope is None):
            raise ValueError(f"part must be 'full', or with rope 'rope' or 'nope', got {part!r}")
        rows = {"full": slice(None), "rope": slice(self.rope_dim), "nope": slice(self.rope_dim, None)}[part]
        shape = (self.num_qk_heads, self.head_dim, -1)
        wq, wk = (p.weight.detach().view(shape) for p in (self.q_proj, self.k_proj))
        return [(wq[m, rows], wk[m, rows]) for m in range(self.num_qk_heads)]

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the value heads that are gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove value heads; the rest computes what it did with these heads' outputs set to 0.

        Query-key and softmax heads stay, since each of them reaches all value heads. Numbers are original ones.
        """
        old = self._kept_heads
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        at = [old.index(h) for h in heads]
        keep_rows(self.v_proj, head_rows(at, self.v_head_dim))
        keep_columns(self.o_proj, head_rows(at, self.v_head_dim))
        kept = self.weights_proj.detach()[:, at]
        self.weights_proj = nn.Parameter(kept, requires_grad=self.weights_proj.requires_grad)
        self._kept_heads, self.num_v_heads = heads, len(heads)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        heads = f"{self.num_qk_heads} -> {self.num_heads} -> {self.num_v_heads}"
        return f"{self.embed_dim}, heads {heads}, head_dim={self.head_dim}, rope={self.rope}, causal={self.causal}"


def composed_chunk(backend: str, chunk_size: int) -> int | None:
    """Queries at once for a backend; refuses those that cannot mix heads."""
    if backend not in ("auto", "eager", "triton"):
        raise BackendUnavailable(
            f"backend {backend!r} cannot run composed_attention: heads are mixed between its score and its softmax; "
            "only auto, eager and triton can"
        )
    return chunk_size if backend == "auto" else None


def _width(name: str, embed_dim: int, heads_name: str, heads: int, given: int | None) -> int:
    if given is not None:
        check_sizes(**{name: given})
        return given
    if embed_dim % heads:
        raise ValueError(f"{heads_name} must divide embed_dim unless {name} is given, got {heads} and {embed_dim}")
    return embed_dim // heads
