"""Sampling from a decoder, token by token with its caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from attnzoo_recipes.data.tokenizers import Tokenizer
from attnzoo_recipes.lm import DecoderLM


class Sampling(TypedDict, total=False):
    """Options of `generate` that say how a token is drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None


@torch.inference_mode()
def generate(
    model: DecoderLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Iterable[int] = (),
) -> Tensor:
    """Continue a prompt (B, T) of token ids, T at least 1; returns the new ids (B, n), n at most max_new_tokens.

    The prompt is processed once, and every new token takes one step with the cache. The global random state is neither
    used nor changed.

    Args:
        model: the decoder; it is in its previous mode, training or evaluation, afterwards.
        prompt: int64 ids.
        max_new_tokens: n.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest.
        top_p: sample among the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: of the sampling.
        stop: end when every row has produced one of these ids at the same step, which is returned too.

    Raises:
        ValueError: for an argument outside its rule.
    """
    check_sampling(temperature, top_k, top_p)
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must have shape (B, T) with T at least 1, got {tuple(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    random = torch.Generator().manual_seed(seed)
    stopping = torch.tensor(sorted(stop), dtype=torch.int64, device=prompt.device)
    was_training = model.training
    model.eval()
    try:
        caches = model.init_caches(prompt.shape[0], prompt.shape[1] + max_new_tokens)
        tokens, new = prompt, []
        for _ in range(max_new_tokens):
            logits = model(tokens, caches=caches)[:, -1]
            tokens = choose(logits, temperature, top_k, top_p, random)[:, None]
            new.append(tokens)
            if torch.isin(tokens, stopping).all():
                break
    finally:
        model.train(was_training)
    return torch.cat(new, dim=1)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> Tensor:
    """One token id for each row of logits (B, V) -> (B,). `random` is a CPU generator: tokens are drawn on the CPU.

    Raises:
        ValueError: for logits that are not numbers.
    """
    if bool(logits.isnan().any()):
        raise ValueError("the model's logits must be numbers to sample from, got NaN: its weights are damaged")
    if temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits.double().cpu() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    probabilities = ranked.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=random)
    return order.gather(-1, drawn)[:, 0].to(logits.device)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for a setting outside its rule."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def continue_text(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    seed: int = 0,
    **sampling: Unpack[Sampling],
) -> str:
    """What the model writes after a prompt at the beginning of a document, up to the end of the document."""
    ids = [tokenizer.document_id, *tokenizer.encode(prompt)]
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    new = generate(model, tokens, max_new_tokens, seed=seed, stop=[tokenizer.document_id], **sampling)
    return tokenizer.decode(new[0].tolist())
