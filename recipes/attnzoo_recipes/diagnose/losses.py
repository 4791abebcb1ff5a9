"""Losses by which a model is judged, on sequences of tokens and on pairs of texts, and the calls they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo_recipes.diagnose.load_model import LoadedModel
from attnzoo_recipes.diagnose.tensors import inputs_of
from attnzoo_recipes.diagnose.texts import PairBatch
from attnzoo_recipes.lm import DecoderLM

RETRIEVAL_SCALE = 20.0
"""Logits of `retrieval_losses` are cosines times this."""

_IGNORED = -100


def next_token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence's tokens after its first, in nats: tokens (B, T) -> (B,)."""
    logits = logits_of(model, tokens)[:, :-1].float()
    nats: Tensor = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return nats.view(len(tokens), -1).mean(1)


def retrieval_losses(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own document among the batch's, and whether it is ranked first: (B,) each.

    Logits are `RETRIEVAL_SCALE` times the cosines of `embeddings`. The losses are coupled: every one of them depends
    on all documents of the batch.
    """
    queries, documents = (embeddings(model, *side) for side in (batch.queries, batch.documents))
    logits = RETRIEVAL_SCALE * queries @ documents.mT
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own, reduction="none"), (logits.argmax(1) == own).double()


def embeddings(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """Mean of the last hidden states over the real tokens, normalised to length 1: ids and real (B, T) -> (B, E)."""
    hidden: Tensor = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    weight = real[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def label_losses(model: nn.Module, batch: Mapping[str, Tensor], shifted: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each example's labels, and the share of them that is most likely: (B,) each.

    Args:
        model: called as model(**batch); gives logits (B, C), or (B, T, C) for labels (B, T).
        batch: inputs, and "labels": classes, where -100 does not count. Without labels, those of a model that predicts
            tokens are its real input tokens.
        shifted: whether the logits at a token are those of the next token's label.

    Raises:
        ValueError: without labels, or for labels that are not classes of the logits.
    """
    output: Any = model(**inputs_of(model, batch))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    labels = batch.get("labels")
    if labels is None and shifted:
        labels = batch["input_ids" if "input_ids" in batch else "tokens"]
        if (mask := batch.get("attention_mask")) is not None:
            # The first token after left padding follows nothing.
            labels = labels.masked_fill((mask == 0) | (mask == 0).roll(1, 1), _IGNORED)
    if labels is None or not isinstance(logits, Tensor):
        raise ValueError(f"data must hold labels, and {type(model).__name__} give logits, to measure a loss")
    classes = logits.shape[-1]
    fits = not labels.is_floating_point() and logits.shape[:-1] == labels.shape and classes > 1
    if not fits or not bool(((labels >= 0) & (labels < classes) | (labels == _IGNORED)).all()):
        raise ValueError(
            f"labels must be one class for each of the logits, got {labels.dtype} of shape {tuple(labels.shape)} for "
            f"logits of shape {tuple(logits.shape)}"
        )
    logits, labels = logits.float(), labels.long()
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != _IGNORED
    if not bool(counted.flatten(1).any(1).all() if counted.ndim > 1 else counted.all()):
        raise ValueError(f"labels must have at least one class other than {_IGNORED} in each example")
    nats = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    right = (logits.argmax(-1) == labels).double()
    counted = counted.view(len(labels), -1)
    return tuple((x.view(len(labels), -1) * counted).sum(1) / counted.sum(1) for x in (nats, right))  # type: ignore


def output_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch of tensors."""
    output: Any = model(**inputs_of(model, batch))
    return output if isinstance(output, Tensor) else output.logits


def predicts_tokens(loaded: LoadedModel) -> bool:
    """Whether the model is a causal language model."""
    if isinstance(loaded.model, DecoderLM):
        return True
    architectures = getattr(getattr(loaded.model, "config", None), "architectures", None) or ()
    return type(loaded.model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and any(architectures)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens (B, T)."""
    logits: Tensor = model(tokens) if isinstance(model, DecoderLM) else model(input_ids=tokens, use_cache=False).logits
    return logits


def decode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, V) after tokens (B, n), n at least 1, that are read one at a time with a cache."""
    logits = tokens.new_empty(0)
    if isinstance(model, DecoderLM):
        caches = model.init_caches(*tokens.shape)
        for step in torch.split(tokens, 1, dim=1):
            logits = model(step, caches=caches)
    else:
        cache: Any = None
        for step in torch.split(tokens, 1, dim=1):
            output: Any = model(input_ids=step, past_key_values=cache, use_cache=True)
            logits, cache = output.logits, output.past_key_values
    return logits[:, -1]
