"""Batches as diagnostics take them: their tokens, which of them are real, and how a model is called on them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.masks import AttentionMask
from attnzoo.rules import describe


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the context."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def tokens_and_mask(batch: Any, *, labelled: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Token numbers (B, T) and mask (B, T) of the real tokens of a batch, or None where it has none.

    If labelled, the second of a pair is left out unless it can be a mask of the first.
    """
    tokens: Any = None
    mask: Any = None
    if isinstance(batch, Mapping):
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        tokens, mask = batch
        if labelled and isinstance(mask, Tensor) and not (mask.shape == tokens.shape[:2] and _is_binary(mask)):
            mask = None
    elif isinstance(batch, Tensor):
        tokens = batch
    integral = isinstance(tokens, Tensor) and not tokens.is_floating_point()
    if isinstance(mask, Tensor) and mask.ndim != 2:
        raise ValueError(f"mask must have shape (B, T), True for real tokens, got {tuple(mask.shape)}")
    return tokens if integral else None, mask.bool() if isinstance(mask, Tensor) else None


def decoder_tokens_and_mask(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The same for the decoder of an encoder-decoder model, whose tokens a mapping may hold."""
    if not isinstance(batch, Mapping):
        return None, None
    tokens, mask = batch.get("decoder_input_ids"), batch.get("decoder_attention_mask")
    return tokens, None if mask is None else mask.bool()


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """Modules of the decoder of a transformers encoder-decoder model; none for other models."""
    inner: Any = innermost(model)
    if not hasattr(inner, "get_decoder") or not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return set()
    return set(inner.get_decoder().modules())


def innermost(model: nn.Module) -> nn.Module:
    """The model that a call's keywords reach: inside wrappers that hand on what they do not name themselves.

    Adapters of PEFT, data parallelism and torch.compile wrap models in this way. It is the outermost transformers model
    inside, or else the only child.
    """
    while not _is_transformers(model) and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(model.forward).parameters.values()
    ):
        inside = [part for part in model.modules() if _is_transformers(part)] or list(model.children())
        if not inside or (len(inside) > 1 and not _is_transformers(inside[0])):
            break
        model = inside[0]
    return model


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def run_batch(
    model: nn.Module, batch: Any, mask: Tensor | None, forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:  # fmt: skip
    """Call the model on a batch as `head_report` says; mask is the batch's own."""
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**{**positions_of(model, "position_ids", mask), **batch})
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 2 and mask is not None:
        if not _is_binary(batch[1]):
            raise ValueError(f"mask must be True for real tokens and False for others, got {describe(batch[1])}")
        if bool((mask.diff(dim=1).count_nonzero(1) > 1).any()):
            raise ValueError("mask must be of right padding or of left padding in each row, got another one")
        padding = AttentionMask.dense(mask[:, None, None]) if _is_left(mask) else AttentionMask.padding(mask.sum(1))
        model(batch[0], mask=padding, **positions_of(model, "positions", mask))
    else:
        raise ValueError(f"batches must hold tensors, pairs (tensor, mask) or mappings, got {type(batch).__name__}")


def uncompiled() -> AbstractContextManager[Any]:
    """Runs compiled modules uncompiled inside: a graph made earlier does not call the hooks that come now."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_binary(mask: Tensor) -> bool:
    """Whether a tensor holds nothing but True and False, or 1 and 0."""
    return torch.equal(mask, mask.bool().to(mask.dtype))


def _is_left(mask: Tensor) -> bool:
    """Whether padding comes before real tokens in some row."""
    return bool((mask[:, 1:] > mask[:, :-1]).any())


def positions_of(model: nn.Module, name: str, mask: Tensor | None) -> dict[str, Tensor]:
    """Places of the real tokens under left padding, if the model takes them by this name and does not find its own."""
    if mask is None or not _is_left(mask):
        return {}
    if not any(name in inspect.signature(callee.forward).parameters for callee in (model, innermost(model))):
        return {}
    # Position embeddings with a place for padding (RoBERTa) are looked up by places that the model counts itself.
    embeddings = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    if any(getattr(embedding, "padding_idx", None) is not None for embedding in embeddings):
        return {}
    return {name: (mask.long().cumsum(1) - 1).clamp(min=0)}
