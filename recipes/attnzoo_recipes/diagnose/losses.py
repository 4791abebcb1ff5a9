"""Losses by which a model is judged, on sequences of tokens and on pairs of texts, and the calls they are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo_recipes.diagnose.load_model import LoadedModel
from attnzoo_recipes.diagnose.texts import PairBatch
from attnzoo_recipes.lm import DecoderLM

RETRIEVAL_SCALE = 20.0
"""Logits of `retrieval_losses` are cosines times this."""


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
