"""attnzoo: head-level attention mechanisms as drop-in PyTorch modules.

Every mechanism has the same call, `y = attn(x)` with x (B, T, E) -> (B, T, E); see the README.
"""

from torch import Tensor, nn

from attnzoo import adapters, conversion
from attnzoo.backends import BackendUnavailable
from attnzoo.costs import cost
from attnzoo.masks import AttentionMask
from attnzoo.modules.chai import ClusteredHeadAttention
from attnzoo.modules.dcmha import DynamicallyComposableAttention
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.gta import GroupedTiedAttention
from attnzoo.modules.kha import KnockingHeadsAttention
from attnzoo.modules.kha_gta import KnockingHeadsTiedAttention
from attnzoo.modules.kha_mla import KnockingHeadsLatentAttention
from attnzoo.modules.linear import LinearAttention
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mhla import MultiHeadLinearAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.modules.moa import MixtureOfAttentionHeads
from attnzoo.modules.moh import MixtureOfHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.modules.talking_heads import TalkingHeadsAttention
from attnzoo.rotary import Rotary

__version__ = "0.1.0"

__all__ = [
    "MultiHeadAttention",
    "MultiQueryAttention",
    "GroupedQueryAttention",
    "GroupedTiedAttention",
    "MultiHeadLatentAttention",
    "MixtureOfHeadAttention",
    "MixtureOfAttentionHeads",
    "DynamicallyComposableAttention",
    "TalkingHeadsAttention",
    "KnockingHeadsAttention",
    "KnockingHeadsTiedAttention",
    "KnockingHeadsLatentAttention",
    "LinearAttention",
    "MultiHeadLinearAttention",
    "ClusteredHeadAttention",
    "AttentionMask",
    "Rotary",
    "BackendUnavailable",
    "adapters",
    "aux_loss",
    "conversion",
    "cost",
    "__version__",
]


def aux_loss(model: nn.Module) -> Tensor | None:
    """Sum of the auxiliary losses that a model's attention modules left in their last training forward.

    None if no module has one; each module's own coefficient is already in its `aux_loss`.
    """
    losses = [loss for module in model.modules() if isinstance(loss := getattr(module, "aux_loss", None), Tensor)]
    return sum(losses[1:], losses[0]) if losses else None
