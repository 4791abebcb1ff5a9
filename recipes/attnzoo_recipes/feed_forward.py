"""What a decoder block has as its feed-forward layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from attnzoo.modules.checks import check_input
from attnzoo.modules.moa import Experts
from attnzoo.ops.expert_projection import Routes
from attnzoo.ops.head_routing import Routing, router_losses
from attnzoo.ops.submodules import precise_linear
from attnzoo.rules import COUNT, INTEGER, NUMBER, SWITCH, check, check_options, check_sizes, describe, one_of
from attnzoo.tracing import is_exported

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "identity": lambda x: x}
"""Elementwise functions by name; "swiglu" is the gated one beside them."""


def default_mlp_dim(embed_dim: int) -> int:
    """8/3 E rounded to a multiple of 64: three matrices of that width have as many elements as two of width 4 E."""
    return max(64, 64 * round(8 * embed_dim / (3 * 64)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv:2002.05202): (silu(x Wgate^T) * x Wup^T) Wdown^T, no biases.

    Args:
        embed_dim: width E of input and output.
        mlp_dim: hidden width M. Default: 8/3 E, rounded to a multiple of 64.
    """

    def __init__(self, embed_dim: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        mlp_dim = default_mlp_dim(embed_dim) if mlp_dim is None else mlp_dim
        check_sizes(embed_dim=embed_dim, mlp_dim=mlp_dim)
        self.embed_dim = embed_dim
        self.gate_proj = nn.Linear(embed_dim, mlp_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, embed_dim, bias=False)

    def reset_parameters(self, std: float = 0.02, out_std: float | None = None) -> None:
        """Initialise: normal with `std`, the output projection with `out_std`."""
        nn.init.normal_(self.gate_proj.weight, std=std)
        nn.init.normal_(self.up_proj.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=std if out_std is None else out_std)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        _check_tokens(x, self.embed_dim, self.up_proj)
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y

    def tensor_parallel_plan(self) -> dict[str, ParallelStyle]:
        """Hidden units split over ranks, for `parallelize_module`; x and y are whole."""
        return {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}

    def flops(self, T: int) -> int:
        """Forward FLOPs of the matrices for T tokens."""
        return _matrix_flops(self, T)


class FeedForward(nn.Module):
    """Feed-forward layer of one, two or three matrices, the depths that Gerber 2025 (arXiv:2505.06633) compares.

        depth 1   y = phi(x W1^T)
        depth 2   y = phi(x W1^T) W2^T
        depth 3   y = phi(phi(x W1^T) Wm^T) W2^T

    With "swiglu" the first layer is silu(x Wg^T) * (x W1^T), and the middle layer has silu. Whether the paper's single
    layer has an activation is not known; here it has GELU by default, and "identity" makes it linear.

    Args:
        embed_dim: width E of input and output.
        hidden_dim: width F of the hidden layers. Default: 4 E; with "swiglu" 8/3 E, rounded up to a multiple of 8.
            Depth 1 has none.
        depth: number of layers, 1 to 3. A block without a feed-forward layer is the decoder's feed_forward=None.
        activation: "gelu" (exact), "relu", "identity" or, not for depth 1, "swiglu". Default: "swiglu", for depth 1
            "gelu".
        bias: whether the layers have one.
        dropout: probability of dropping, in training, an element of what the last layer reads; of the output for
            depth 1.

    Raises:
        ValueError: for an argument outside its rule.
    """

    aux_loss: Tensor | None = None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        depth: int = 2,
        activation: str | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim)
        activation = _checked_activation(depth, activation)
        if depth == 1 and hidden_dim is not None:
            raise ValueError(f"hidden_dim must not be given with depth 1, which has no hidden layer, got {hidden_dim}")
        check_options(bias=bias, dropout=dropout, device=device, dtype=dtype)
        if hidden_dim is None:
            hidden_dim = 8 * math.ceil(embed_dim / 3) if activation == "swiglu" else 4 * embed_dim
        check_sizes(hidden_dim=hidden_dim)
        self.embed_dim, self.depth, self.activation, self.dropout = embed_dim, depth, activation, dropout
        self.hidden_dim = None if depth == 1 else hidden_dim
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        if depth == 1:
            self.proj = nn.Linear(embed_dim, embed_dim, **options)
        else:
            if activation == "swiglu":
                self.gate_proj = nn.Linear(embed_dim, hidden_dim, **options)
            self.up_proj = nn.Linear(embed_dim, hidden_dim, **options)
            if depth == 3:
                self.mid_proj = nn.Linear(hidden_dim, hidden_dim, **options)
            self.down_proj = nn.Linear(hidden_dim, embed_dim, **options)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, out_std: float | None = None) -> None:
        """Initialise: normal with `std`, the last layer with `out_std`, the middle one 0.55 / sqrt(F); biases 0.

        0.55 / sqrt(F) is 0.02 at the width 768. A fixed 0.02 would make the middle layer of a small model attenuate.
        """
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Linear)
            if name == "mid_proj":
                scale = 0.55 / math.sqrt(layer.in_features)
            else:
                scale = out_std if name in ("down_proj", "proj") and out_std is not None else std
            nn.init.normal_(layer.weight, std=scale)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        _check_tokens(x, self.embed_dim, self.proj if self.depth == 1 else self.up_proj)
        gated = self.activation == "swiglu"
        phi = F.silu if gated else ACTIVATIONS[self.activation]
        if self.depth == 1:
            return F.dropout(phi(self.proj(x)), self.dropout, self.training)
        hidden = phi(self.gate_proj(x)) * self.up_proj(x) if gated else phi(self.up_proj(x))
        if self.depth == 3:
            hidden = phi(self.mid_proj(hidden))
        y: Tensor = self.down_proj(F.dropout(hidden, self.dropout, self.training))
        return y

    def tensor_parallel_plan(self) -> dict[str, ParallelStyle]:
        """Hidden units split over ranks, for `parallelize_module`; x, y and a third layer are whole.

        Raises:
            ValueError: with dropout of units that are split: ranks draw alike, and would drop the same of theirs.
        """
        if self.dropout and self.depth == 2:
            raise ValueError(f"dropout must be 0 to split hidden units over ranks, got {self.dropout}")
        last = "mid_proj" if self.depth == 3 else "down_proj"
        plan: dict[str, ParallelStyle] = dict.fromkeys(("gate_proj", "up_proj"), ColwiseParallel())
        plan[last] = RowwiseParallel()
        return {name: style for name, style in plan.items() if hasattr(self, name)}

    def flops(self, T: int) -> int:
        """Forward FLOPs of the matrices for T tokens."""
        return _matrix_flops(self, T)

    def extra_repr(self) -> str:
        """The options."""
        return f"depth={self.depth}, activation={self.activation!r}"


def hidden_dim_for(embed_dim: int, depth: int, activation: str, parameters: int) -> int:
    """The hidden width at which a `FeedForward` without biases has the nearest number of parameters.

    Raises:
        ValueError: for depth 1, whose number is E^2, and where not even a width of 1 is left.
    """
    check_sizes(embed_dim=embed_dim)
    activation = _checked_activation(depth, activation)
    if depth == 1:
        raise ValueError("depth must be 2 or 3 to have a hidden width, got 1")
    check("parameters", parameters, NUMBER)
    outer, most = (3 if activation == "swiglu" else 2) * embed_dim, max(parameters, 0)
    # Depth 3: F^2 + outer F = parameters.
    width = most / outer if depth == 2 else (math.sqrt(outer**2 + 4 * most) - outer) / 2
    if round(width) < 1:
        raise ValueError(f"parameters must allow a hidden width of at least 1, got {parameters}")
    return round(width)


class MultiHeadMixtureOfExperts(nn.Module):
    """Multi-head mixture of experts (Huang et al. 2024, arXiv:2411.16205; Wu et al. 2024, arXiv:2404.15045).

    Each token is projected and cut into h sub-tokens of width Dh = E / h, of which each is routed to k of N experts:

        z = x Wh^T + bh;   z_j the j-th slice;   l_j = Wr z_j;   p_j = softmax(l_j);   sel_j the k largest
        o_j = sum_{e in sel_j} g_e f_e(z_j);   y = concat_j(o_j) Wm^T + bm
        f_e(u) = Wdown_e (silu(Wgate_e u) * Wup_e u), or Wdown_e phi(Wup_e u) with "relu" and "gelu"

    with gates p_e ("softmax_topk") or softmax over the selected logits ("topk_softmax"). The heads share router and
    experts. Nothing is dropped, so the layer treats every token alone. Router arithmetic is in at least float32.

    After a training forward `aux_loss` is aux_loss_coef N sum_e P_e f_e (P mean probability of expert e, f its share
    of the choices; the sum is 1 when balanced), and `routing` holds the statistics.

    Args:
        embed_dim: width E of input and output.
        num_heads: sub-tokens h of a token.
        num_experts: N. Default: that of `mh_moe_parity` with 8 experts; 40 for h = k = 2.
        num_experts_per_tok: experts k of a sub-token.
        hidden_dim: hidden width F of an expert. Default: that of `mh_moe_parity`; E for h = k = 2.
        activation: "swiglu", "relu" or "gelu".
        gate_mode: "softmax_topk" or "topk_softmax".
        bias: whether the head and merge layers have one.
        inner_residual: add a sub-token to the sum of its experts.
        shared_dim: hidden width of a `SwiGLU` of the whole token that is added to the output; 0 for none.
        aux_loss_coef: of the load balance.
        aux_count: choices that f counts: the "first" of a sub-token, or "all".
        init_std: standard deviation of the router and the experts.
        backend: "auto", "eager" (computes all experts, the definition) or "triton" (kernels).

    Raises:
        ValueError: for an argument outside its rule.
    """

    aux_loss: Tensor | None = None
    routing: Routing | None = None
    aux_loss_group: Any = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 2,
        *,
        num_experts: int | None = None,
        num_experts_per_tok: int = 2,
        hidden_dim: int | None = None,
        activation: str = "swiglu",
        gate_mode: str = "softmax_topk",
        bias: bool = False,
        inner_residual: bool = False,
        shared_dim: int = 0,
        aux_loss_coef: float = 0.01,
        aux_count: str = "first",
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        h, k = num_heads, num_experts_per_tok
        check_sizes(embed_dim=embed_dim, num_heads=h, num_experts_per_tok=k)
        if embed_dim % h:
            raise ValueError(f"num_heads must divide embed_dim, got {h} and {embed_dim}")
        check("activation", activation, one_of("swiglu", "relu", "gelu"))
        check("gate_mode", gate_mode, one_of("softmax_topk", "topk_softmax"))
        check("aux_count", aux_count, one_of("first", "all"))
        check("backend", backend, one_of("auto", "eager", "triton"))
        check("shared_dim", shared_dim, COUNT)
        check("inner_residual", inner_residual, SWITCH)
        check_options(bias=bias, device=device, dtype=dtype)
        for name, value in (("aux_loss_coef", aux_loss_coef), ("init_std", init_std)):
            check(name, value, NUMBER)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if hidden_dim is None or num_experts is None:
            usual = _usual_sizes(embed_dim, h, k, activation)
            hidden_dim = usual[0] if hidden_dim is None else hidden_dim
            num_experts = usual[1] if num_experts is None else num_experts
        N, width = num_experts, embed_dim // h
        check_sizes(num_experts=N, hidden_dim=hidden_dim)
        if k > N:
            raise ValueError(f"num_experts_per_tok must be at most num_experts, got {k} and {N}")
        if k == 1 and gate_mode == "topk_softmax":
            raise ValueError('num_experts_per_tok must be at least 2 with gate_mode "topk_softmax", got 1')
        if N < 2 and aux_loss_coef > 0:
            raise ValueError(f"num_experts must be at least 2 to be balanced (aux_loss_coef {aux_loss_coef}), got {N}")
        self.embed_dim, self.num_heads, self.num_experts, self.num_experts_per_tok = embed_dim, h, N, k
        self.hidden_dim, self.activation, self.gate_mode, self.backend = hidden_dim, activation, gate_mode, backend
        self.inner_residual, self.aux_loss_coef, self.aux_count = inner_residual, aux_loss_coef, aux_count
        self.init_std = init_std
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_proj = nn.Linear(embed_dim, embed_dim, bias, **factory_kwargs)
        self.router = nn.Linear(width, N, False, **factory_kwargs)
        self.gate_experts = Experts(N, width, hidden_dim, **factory_kwargs) if activation == "swiglu" else None
        self.up_experts = Experts(N, width, hidden_dim, **factory_kwargs)
        self.down_experts = Experts(N, hidden_dim, width, **factory_kwargs)
        self.merge_proj = nn.Linear(embed_dim, embed_dim, bias, **factory_kwargs)
        self.shared = SwiGLU(embed_dim, shared_dim).to(device=device, dtype=dtype) if shared_dim else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: router and experts normal with `std`, head and merge layer Xavier uniform; biases 0.

        The gain of the head layer is 1 / sqrt(2). The merge layer is normal with `out_std` if that is given.
        """
        std = self.init_std if std is None else std
        nn.init.xavier_uniform_(self.head_proj.weight, gain=1 / math.sqrt(2))
        # Zeros would send all sub-tokens to the same experts.
        nn.init.normal_(self.router.weight, std=std)
        for experts in (self.gate_experts, self.up_experts, self.down_experts):
            if experts is not None:
                nn.init.normal_(experts.weight, std=std)
        if out_std is None:
            nn.init.xavier_uniform_(self.merge_proj.weight)
        else:
            nn.init.normal_(self.merge_proj.weight, std=out_std)
        for layer in (self.head_proj, self.merge_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.shared is not None:
            self.shared.reset_parameters(std, out_std)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input.
            mask: (B, T) boolean, True = real token; only those count in the balance loss.
        """
        check_input("x", x, self.embed_dim, self.head_proj)
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"mask must be a boolean tensor (B, T), got {describe(mask)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"mask must be boolean (B, T) {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        (B, T, E), h, k = x.shape, self.num_heads, self.num_experts_per_tok
        z = self.head_proj(x).reshape(B, T * h, E // h)
        logits = precise_linear(self.router, z)
        chosen, gates = self._gates(logits)
        routes = Routes.of(chosen.flatten(), self.num_experts)
        rows = z.reshape(B * T * h, 1, 1, E // h).expand(-1, -1, k, -1)
        hidden = self.up_experts(rows, routes, backend=self.backend)
        if self.gate_experts is None:
            hidden = ACTIVATIONS[self.activation](hidden)
        else:
            hidden = F.silu(self.gate_experts(rows, routes, backend=self.backend)) * hidden
        out = self.down_experts(hidden, routes, gates=gates.reshape(-1, k), backend=self.backend).sum(2)
        out = out.reshape(B, T * h, E // h)
        if self.inner_residual:
            out = out + z
        y: Tensor = self.merge_proj(out.reshape(B, T, E))
        self._keep_statistics(logits, chosen, gates, None if mask is None else mask.repeat_interleave(h, 1))
        return y if self.shared is None else y + self.shared(x)

    def router_logits(self, x: Tensor) -> Tensor:
        """Logits (B, T, h, N) of the sub-tokens of x (B, T, E), in at least float32."""
        return precise_linear(self.router, self.head_proj(x).unflatten(-1, (self.num_heads, -1)))

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their gates, both (B, T h, k)."""
        best, chosen = logits.topk(self.num_experts_per_tok, dim=-1)
        if self.gate_mode == "topk_softmax":
            return chosen, best.softmax(-1)
        return chosen, logits.softmax(-1).gather(-1, chosen)

    def _keep_statistics(self, logits: Tensor, chosen: Tensor, gates: Tensor, real: Tensor | None) -> None:
        """Set `aux_loss` and `routing`, to None outside training; an exported program keeps neither."""
        if is_exported():
            return
        self.aux_loss, self.routing = None, None
        if self.training:
            count = 1 if self.aux_count == "first" else self.num_experts_per_tok
            terms, routing = router_losses(logits, chosen[..., :count], gates[..., :count], real, self.aux_loss_group)
            self.aux_loss, self.routing = self.aux_loss_coef * terms["switch"], routing.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left, which belongs to its graph, and without a process group."""
        return {**self.__dict__, "aux_loss": None, "routing": None, "aux_loss_group": None}

    def flops(self, T: int) -> int:
        """Forward FLOPs for T tokens: head and merge layer, router, chosen experts and the shared layer."""
        E, matrices = self.embed_dim, 2 if self.gate_experts is None else 3
        experts = 2 * matrices * E * self.hidden_dim * self.num_experts_per_tok
        shared = 0 if self.shared is None else self.shared.flops(T)
        return T * (4 * E * E + 2 * E * self.num_experts + experts) + shared

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.num_heads} heads, {self.num_experts_per_tok} of {self.num_experts} experts of {self.hidden_dim}"


class Parity(NamedTuple):
    """Sizes of `mh_moe_parity`, rounded to multiples of 8, and the exact values."""

    hidden_dim: int
    num_experts: int
    exact_hidden_dim: float
    exact_num_experts: float


def mh_moe_parity(
    embed_dim: int,
    num_heads: int,
    k: int,
    base_hidden: float,
    base_experts: int,
    base_k: int,
    activation: str = "swiglu",
) -> Parity:
    """Sizes at which a multi-head mixture has the cost and the parameters of a plain mixture of experts.

    Multiply-adds per token give k F = k0 F0 - c and parameters N = h (F0 N0 - c) / F, where c is what the head and
    merge layers take: 2/3 E of three matrices ("swiglu"), E of two. The routers are left out.

    Args:
        embed_dim: width E.
        num_heads: sub-tokens h of a token.
        k: experts of a sub-token.
        base_hidden: hidden width F0 of the plain mixture's experts.
        base_experts: its experts N0.
        base_k: its experts k0 of a token.
        activation: of both.

    Raises:
        ValueError: if less than a hidden width of 1 is left.
    """
    check_sizes(embed_dim=embed_dim, num_heads=num_heads, k=k, base_experts=base_experts, base_k=base_k)
    check("base_hidden", base_hidden, NUMBER)
    check("activation", activation, one_of("swiglu", "relu", "gelu"))
    layers = 2 * embed_dim / 3 if activation == "swiglu" else float(embed_dim)
    hidden = (base_k * base_hidden - layers) / k
    if hidden < 1:
        raise ValueError(f"base_hidden must leave a hidden width of at least 1, got {base_hidden:g} ({hidden:g} left)")
    experts = num_heads * (base_hidden * base_experts - layers) / hidden
    return Parity(max(8, 8 * round(hidden / 8)), max(8, 8 * round(experts / 8)), hidden, experts)


def _usual_sizes(embed_dim: int, num_heads: int, k: int, activation: str) -> tuple[int, int]:
    """Default hidden width and number of experts: parity with 8 experts as large as a dense layer."""
    gated = activation == "swiglu"
    if gated and num_heads == k == 2:
        return embed_dim, 40
    if k > (most := (2 if gated else 3) * embed_dim):
        raise ValueError(
            f"num_experts_per_tok must be at most {most} unless hidden_dim and num_experts are given, got {k}"
        )
    return mh_moe_parity(embed_dim, num_heads, k, embed_dim * (8 / 3 if gated else 4), 8, 1, activation)[:2]


def _checked_activation(depth: int, activation: str | None) -> str:
    """The activation, by default that of the depth."""
    check("depth", depth, INTEGER)
    if depth == 0:
        raise ValueError("depth must be 1, 2 or 3, got 0: for no feed-forward layer write feed_forward: null")
    if depth not in (1, 2, 3):
        raise ValueError(f"depth must be 1, 2 or 3, got {depth}")
    if activation is None:
        return "gelu" if depth == 1 else "swiglu"
    check("activation", activation, one_of(*ACTIVATIONS, "swiglu"))
    if depth == 1 and activation == "swiglu":
        raise ValueError('activation must not be "swiglu" with depth 1, whose single layer has no gate')
    return activation


def _check_tokens(x: Tensor, width: int, layer: nn.Module) -> None:
    """Raise ValueError unless x (B, T, width), or with other axes before the last, fits the layer."""
    if not isinstance(x, Tensor) or x.ndim == 3:
        check_input("x", x, width, layer)
    elif x.shape[-1:] != (width,):
        raise ValueError(f"x must have shape (B, T, {width}), got {tuple(x.shape)}")


def _matrix_flops(module: nn.Module, T: int) -> int:
    return 2 * T * sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
