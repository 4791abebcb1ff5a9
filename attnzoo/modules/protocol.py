"""The contract of a mechanism: what the recipe, the costs and the diagnostics ask of a module, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnzoo.masks import AttentionMask
from attnzoo.modules.heads import HeadLayout


class AttentionMechanism(Protocol):
    """An `nn.Module` that attends. `attnzoo.modules.base.Mechanism` has a default of nearly everything.

    Attributes:
        embed_dim: width E of input and output.
        num_heads: query heads H that are left.
        num_kv_heads: key/value heads G that are left.
        head_dim: width D of queries and keys.
        v_head_dim: width Dv of values.
        causal: whether no query sees a later key.
        heads: the heads whose outputs pass through `head_outputs`.
        head_outputs: the module whose input is the output of every head, (B, T, H Dv), head-major: o_proj in general.
        aux_loss: a scalar tensor after a training forward of a routed mechanism, else None.
        depth: number of the layer in its model, from 0; the recipe's decoder sets it.
        has_patterns: whether there are attention weights, which an observer is shown (`attnzoo.ops.observation`).
        factored_circuits: whether the circuits multiply several of the module's matrices, so that their factors are
            not matrices of independent entries.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    causal: bool
    heads: HeadLayout
    aux_loss: Tensor | None
    depth: int
    has_patterns: bool
    factored_circuits: bool

    @property
    def head_outputs(self) -> nn.Module:
        """See the class."""

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E); what a mechanism cannot do is refused with a ValueError that names the argument."""

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise; std of the projections, out_std of the last."""

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:  # fmt: skip
        """A cache with `length`, `max_length`, `nbytes`, `reset()`, `reorder(index)` and `truncate(length)`."""

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a further token takes in the cache."""

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that the cache of one sequence holds after so many tokens."""

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys."""

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """The same by part."""

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per head (WQ_h, WK_h), each (d, E), detached."""

    def ov_circuit(self) -> list[tuple[Tensor, Tensor]]:
        """Per head (WV_h (Dv, E), WO_h (E, Dv)), detached."""

    def observed_heads(self) -> tuple[int, ...] | None:
        """Which heads of an `Observation` the module's outputs are, in order; None: all as they are."""

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of what `prune_heads` has removed."""

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove heads (of a mixture of experts: experts) by their original numbers."""

    def tensor_parallel_plan(self) -> dict[str, Any]:
        """The plan of `torch.distributed.tensor.parallel.parallelize_module` that splits heads; may be missing."""

    def gate_layers(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """Layers whose outputs are the logits of sigmoid gates, by name, and which of the equal parts each head reads.

        For the diagnostics; may be missing.
        """

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, relative to the module, that are not decayed."""

    def project_parameters(self) -> None:
        """Put parameters back between their bounds; called before every optimiser step."""


OPTIONAL = {"gate_layers", "tensor_parallel_plan"}
"""Names in the contract that a module may lack."""


def _members() -> tuple[str, ...]:
    named = set(AttentionMechanism.__annotations__) | {
        name for name, value in vars(AttentionMechanism).items() if callable(value) or isinstance(value, property)
    }
    return tuple(sorted(name for name in named if not name.startswith("_") and name not in OPTIONAL))


MEMBERS = _members()
"""Names of everything in the contract that a module must have."""


def missing_members(module: nn.Module) -> list[str]:
    """What of the contract a module lacks."""
    return [name for name in MEMBERS if not hasattr(module, name)]


def is_mechanism(module: nn.Module) -> bool:
    """Whether a module fulfils the contract."""
    return not missing_members(module)
