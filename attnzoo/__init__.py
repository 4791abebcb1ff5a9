"""attnzoo: head-level attention mechanisms as drop-in PyTorch modules.

Every mechanism has the same call, `y = attn(x)` with x (B, T, E) -> (B, T, E); see the README.
"""

import torch.distributed
from torch import Tensor, nn

from attnzoo import adapters, conversion
from attnzoo.backends import BackendUnavailable
from attnzoo.costs import cost
from attnzoo.description import build, describe
from attnzoo.masks import AttentionMask
from attnzoo.modules.chai import ClusteredHeadAttention
from attnzoo.modules.complexformer import ComplexAttention
from attnzoo.modules.dcmha import DynamicallyComposableAttention
from attnzoo.modules.diff import DifferentialAttention
from attnzoo.modules.eit import EnhancedMultiheadAttention
from attnzoo.modules.forgetting import ForgettingAttention
from attnzoo.modules.gated import GatedAttention
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.gta import GroupedTiedAttention
from attnzoo.modules.kha import KnockingHeadsAttention
from attnzoo.modules.kha_gta import KnockingHeadsTiedAttention
from attnzoo.modules.kha_mla import KnockingHeadsLatentAttention
from attnzoo.modules.linear import LinearAttention
from attnzoo.modules.mae import MixtureOfAttentiveExperts
from attnzoo.modules.mditface import StaticContextAttention
from attnzoo.modules.mgk import MixtureOfGaussianKeysAttention
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mhe import MultipleHeadEmbeddingAttention
from attnzoo.modules.mhla import MultiHeadLinearAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.modules.moa import MixtureOfAttentionHeads
from attnzoo.modules.moh import MixtureOfHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.modules.mta import MultiTokenAttention
from attnzoo.modules.rcmha import RelativeConvAttention
from attnzoo.modules.selective import SelectiveAttention
from attnzoo.modules.sigmoid import SigmoidAttention
from attnzoo.modules.smha import SelectiveMultiHeadAttention
from attnzoo.modules.tab import TABAttention
from attnzoo.modules.talking_heads import TalkingHeadsAttention
from attnzoo.modules.tpa import TensorProductAttention
from attnzoo.rotary import Rotary

__version__ = "0.2.0"

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
    "EnhancedMultiheadAttention",
    "ComplexAttention",
    "TABAttention",
    "StaticContextAttention",
    "KnockingHeadsAttention",
    "KnockingHeadsTiedAttention",
    "KnockingHeadsLatentAttention",
    "LinearAttention",
    "MultiHeadLinearAttention",
    "ClusteredHeadAttention",
    "MultipleHeadEmbeddingAttention",
    "MixtureOfGaussianKeysAttention",
    "SelectiveMultiHeadAttention",
    "MixtureOfAttentiveExperts",
    "RelativeConvAttention",
    "GatedAttention",
    "TensorProductAttention",
    "DifferentialAttention",
    "SigmoidAttention",
    "MultiTokenAttention",
    "SelectiveAttention",
    "ForgettingAttention",
    "AttentionMask",
    "Rotary",
    "BackendUnavailable",
    "adapters",
    "aux_loss",
    "build",
    "conversion",
    "cost",
    "describe",
    "sync_aux_loss",
    "__version__",
]


def aux_loss(model: nn.Module) -> Tensor | None:
    """Sum of the auxiliary losses that a model's attention modules left in their last training forward.

    None if no module has one; each module's own coefficient is already in its `aux_loss`.
    """
    losses = [loss for module in model.modules() if isinstance(loss := getattr(module, "aux_loss", None), Tensor)]
    return sum(losses[1:], losses[0]) if losses else None


def sync_aux_loss(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Take the auxiliary losses of a model's routers over the batch of all data-parallel processes.

    The papers define them by means over the batch, and a product of means is not the mean of products: without this,
    each process balances its own part. With it every training forward of such a layer sums a vector over the processes,
    `aux_loss` and `routing` are the same in all, and gradients averaged over the processes are those of one process
    with the whole batch. A copied or unpickled module is of one process again.

    Args:
        model: with `MixtureOfHeadAttention` or `MixtureOfAttentionHeads` layers; others are left alone.
        group: the data-parallel processes. Default: all.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("sync_aux_loss needs torch.distributed to be initialized: call init_process_group first")
    for module in model.modules():
        if hasattr(module, "aux_loss_group"):
            setattr(module, "aux_loss_group", torch.distributed.group.WORLD if group is None else group)  # noqa: B010
