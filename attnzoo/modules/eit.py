"""Enhanced multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Factors, Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_entries, keep_rows
from attnzoo.ops.composed_attention import composed_attention
from attnzoo.ops.head_interaction import Interaction
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_sizes, one_of

INTERACTION = ("isi_w1", "isi_b1", "isi_w2", "isi_b2", "csi_w1", "csi_b1", "csi_w2")


class EnhancedMultiheadAttention(Mechanism):
    """Enhanced multi-head attention of EIT (Zheng et al. 2022, arXiv:2212.10197), a reconstruction.

    Every query head meets every key head, and a small network over the H^2 score maps of a pair of tokens gives the
    H maps that go through the softmax:

        S_ij = D^-0.5 q_i . k_j                                               i, j = 1 .. H
        hidden_ia = relu(sum_j isi_w1_iaj S_ij + isi_b1_ia)                    inner-subspace interaction
        one_i = sum_a isi_w2_ia hidden_ia + isi_b2_i
        Z_n = sum_c csi_w2_nc relu(sum_i csi_w1_ci one_i + csi_b1_c)           cross-subspace interaction
        y = concat_n(softmax(Z_n + visibility) v_n) Wo

    With `efficient` each interaction has one layer: Z_n = sum_ia csi_w1_n,ia hidden_ia. The authors' code is not
    public: numbers of maps and layers are the paper's, widths and the place of the softmax inferred (`docs/eit.md`).

    Pruning removes softmax heads with their values. Queries and keys stay, since each reaches all softmax heads.

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H of queries, of keys and of values.
        head_dim: width D of a head. Default: E / H.
        kdim: width of the context. Default: E.
        bias: whether the projections have one.
        isi_hidden: hidden maps A of each query head. Default: 8, or 2 with `efficient`.
        csi_hidden: hidden maps C of the cross-subspace interaction. Default: 4 H. Not with `efficient`.
        efficient: one layer of each interaction.
        interaction_bias: whether hidden maps have biases.
        init: "default" (uniform, 1 / sqrt(fan-in)) or "mha" (multi-head attention at the start; needs isi_hidden of
            at least 2 and csi_hidden of at least 2 H).
        rope: rotary position embedding, or None.
        sliding_window: a query sees this many keys at most, itself included.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are recomputed in the
            backward pass. None: all at once.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked for more than chunk_size queries) or "eager" (all scores at once). There is no kernel.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    shown = ("isi_hidden", "csi_hidden", "efficient", "rope", "sliding_window", "pruned_heads")
    isi_w1: nn.Parameter
    isi_b1: nn.Parameter | None
    isi_w2: nn.Parameter | None
    isi_b2: nn.Parameter | None
    csi_w1: nn.Parameter
    csi_b1: nn.Parameter | None
    csi_w2: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, *, head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        isi_hidden: int | None = None,
        csi_hidden: int | None = None,
        efficient: bool = False,
        interaction_bias: bool = True,
        init: str = "default",
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        sliding_window: int | None = None,
        causal: bool = True, dropout: float = 0.0, chunk_size: int | None = 128, init_std: float = 0.02,
        backend: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, head_dim=head_dim, kdim=kdim, rope=rope, sliding_window=sliding_window,
            causal=causal, dropout=dropout, init_std=init_std, backend=backend, efficient=efficient, bias=bias,
            interaction_bias=interaction_bias, chunk_size=chunk_size, device=device, dtype=dtype,
        )  # fmt: skip
        check("init", init, one_of("default", "mha", words="be 'default' or 'mha'"))
        if efficient and csi_hidden is not None:
            raise ValueError(f"csi_hidden needs efficient=False, got {csi_hidden} and efficient=True")
        A = (2 if efficient else 8) if isi_hidden is None else isi_hidden
        C = 4 * num_heads if csi_hidden is None else csi_hidden
        A, C = check_sizes(isi_hidden=A, csi_hidden=C)
        if init == "mha" and (A < 2 or 2 * num_heads > C):
            raise ValueError(
                f"init 'mha' needs isi_hidden of at least 2 and csi_hidden of at least 2 num_heads, got {A} and {C}"
            )
        self.num_qk_heads = H = self.num_heads
        self.isi_hidden, self.csi_hidden = A, None if efficient else C
        self.efficient, self.init, self.chunk_size = efficient, init, chunk_size
        width = H * self.head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(width, width, width, width, bias=bias, **factory_kwargs)
        biased, full = interaction_bias, not efficient
        shapes = {
            "isi_w1": (H, A, H), "isi_b1": (H, A) if biased else None, "isi_w2": (H, A) if full else None,
            "isi_b2": (H,) if full and biased else None, "csi_w1": (C, H) if full else (H, H * A),
            "csi_b1": (C,) if full and biased else None, "csi_w2": (H, C) if full else None,
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, None if shape is None else nn.Parameter(torch.empty(shape, **factory_kwargs)))
        self.reset_parameters()

    @property
    def interaction(self) -> Interaction:
        """The network over the score maps."""
        return Interaction(*(getattr(self, name) for name in INTERACTION))

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, the rest as init says."""
        super().reset_parameters(std, out_std)
        self.interaction.reset(self.init, self.heads.kept)

    def no_weight_decay(self) -> set[str]:
        """The interaction: decay would pull it to 0 and not to its start."""
        return {name for name in INTERACTION if getattr(self, name) is not None}

    sequence_forms: tuple[str, ...] = ("gather",)
    mixes_heads = True
    tensor_reason = "every output mixes the scores of all heads"

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `TalkingHeadsAttention.forward`. Masks act on Z."""
        call = begin(self, x, context, mask, positions, cache)
        H, D = self.num_qk_heads, self.head_dim
        q = qk_norm_rope(self.q_proj(x).unflatten(-1, (H, D)), call.q_table, backend=self.backend)
        k = qk_norm_rope(self.k_proj(call.source).unflatten(-1, (H, D)), call.k_table, backend=self.backend)
        v = self.v_proj(call.source).unflatten(-1, (-1, D))
        with call.remember(k, v) as (k, v):
            # Key head j is read by the H query heads in turn.
            out = composed_attention(
                q.repeat(1, 1, H, 1), k, v, self.interaction, None, call.view, scale=self.scale,
                dropout=self.weight_dropout, chunk_size=self.chunk_size, backend=self.backend,
            )  # fmt: skip
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """What the cache holds for a token: (heads, width) of keys and of values."""
        return (self.num_qk_heads, self.head_dim), (self.num_heads, self.head_dim)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "attention" (H^2 score maps) and "interaction"."""
        S = T if S is None else S
        keys = T if self.causal else S
        K, H, A, D = self.num_qk_heads, self.num_heads, self.isi_hidden, self.head_dim
        C = self.csi_hidden
        network = K * K * A + (K * A * H if C is None else K * A + K * C + C * H)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        return {
            "projections": 2 * D * (K + H) * (T * self.embed_dim + keys * self.kdim),
            "attention": 2 * D * (K * K + H) * pairs,
            "interaction": 2 * network * pairs,
        }

    def qk_circuit(self, part: str = "full") -> Factors:
        """As `Mechanism.qk_circuit`, of query head i with key head i, before the interaction."""
        rows = self._part_rows(part)
        return [(wq[rows], wk[rows]) for wq, wk in zip(*self.head_weights(), strict=True)]

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of softmax heads."""
        keep_rows(self.v_proj, groups, self.head_dim)
        keep_columns(self.o_proj, heads, self.head_dim)
        last = "csi_w1" if self.csi_w2 is None else "csi_w2"
        setattr(self, last, keep_entries(getattr(self, last), heads))
