"""Sampling from a decoder, token by token with its caches."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterable, Iterator, Sequence
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
    min_p: float | None
    repetition_penalty: float


def generate(
    model: DecoderLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    seed: int = 0,
    stop: Iterable[int] = (),
    **sampling: Unpack[Sampling],
) -> Tensor:
    """Continue a prompt (B, T) of token ids, T at least 1; returns the new ids (B, n), n at most max_new_tokens.

    The prompt is processed once, and every new token takes one step with the cache. The global random state is neither
    used nor changed.

    Args:
        model: the decoder; it is in its previous mode, training or evaluation, afterwards.
        prompt: int64 ids.
        max_new_tokens: n.
        seed: of the sampling; row i draws from seed + i, whatever the number of rows.
        stop: end once every row has produced one of these ids. A row that has continues until all have.
        sampling: temperature divides the logits, 0 takes the likeliest token (default 1). top_k samples among the k
            likeliest; top_p among the likeliest tokens that together have this probability (Holtzman et al. 2020);
            min_p among those with at least this share of the likeliest one's probability (Nguyen et al. 2024,
            arXiv:2407.01082). repetition_penalty divides positive logits of tokens that the row has, its prompt
            included, and multiplies negative ones (Keskar et al. 2019, arXiv:1909.05858; default 1).

    Raises:
        ValueError: for an argument outside its rule.
    """
    stopping = torch.tensor(sorted(stop), dtype=torch.int64, device=prompt.device)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    new = []
    for tokens in stream(model, prompt, max_new_tokens, seed=seed, **sampling):
        new.append(tokens)
        ended |= torch.isin(tokens, stopping)
        if ended.all():
            break
    return torch.stack(new, dim=1)


@torch.inference_mode()
def stream(
    model: DecoderLM, prompt: Tensor, max_new_tokens: int, *, seed: int = 0, **sampling: Unpack[Sampling]
) -> Generator[Tensor, None, None]:
    """The tokens of `generate` (B,), as they are drawn; arguments and errors are those of `generate`."""
    check_sampling(**sampling)
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must have shape (B, T) with T at least 1, got {tuple(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    randoms = [torch.Generator().manual_seed(seed + row) for row in range(len(prompt))]
    temperature, penalty = sampling.get("temperature", 1.0), sampling.get("repetition_penalty", 1.0)
    cuts = sampling.get("top_k"), sampling.get("top_p")
    was_training = model.training
    model.eval()
    try:
        caches = model.init_caches(prompt.shape[0], prompt.shape[1] + max_new_tokens)
        seen = torch.zeros(len(prompt), model.vocab_size, dtype=torch.bool, device=prompt.device)
        tokens = prompt
        for _ in range(max_new_tokens):
            logits = model(tokens, caches=caches)[:, -1]
            if penalty != 1.0:
                seen.scatter_(1, tokens, True)
                largest = torch.finfo(logits.dtype).max
                penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-largest, largest)
                logits = torch.where(seen, penalised, logits)
            drawn = choose(logits, temperature, *cuts, randoms, sampling.get("min_p"))
            tokens = drawn[:, None]
            yield drawn
    finally:
        model.train(was_training)


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    random: torch.Generator | Sequence[torch.Generator],
    min_p: float | None = None,
) -> Tensor:
    """One token id for each row of logits (B, V) -> (B,). `random` is a CPU generator, or one for each row.

    Raises:
        ValueError: for logits that are not numbers, or infinite.
    """
    if not bool((logits < torch.inf).all()):
        got = "NaN: its weights are damaged" if bool(logits.isnan().any()) else f"infinity in {logits.dtype}"
        raise ValueError(f"the model's logits must be numbers to sample from, got {got}")
    if temperature == 0:
        return logits.argmax(-1)
    ranked, order = logits.double().cpu().sort(dim=-1, descending=True)
    ranked = (ranked - ranked[:, :1]) / temperature  # of which none is too large, however low the temperature
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    probabilities = ranked.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities[:, :1], 0.0)
    if isinstance(random, torch.Generator):
        drawn = torch.multinomial(probabilities, 1, generator=random)
    else:
        rows = zip(probabilities, random, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return order.gather(-1, drawn)[:, 0].to(logits.device)


def check_sampling(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError for a setting outside its rule."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value}")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be finite and positive, got {repetition_penalty}")


class TextStream:
    """Text of tokens that arrive one at a time, without halves of characters, up to a stop string or token.

    Args:
        tokenizer: of the tokens.
        stop: texts before which the text ends.

    Attributes:
        ended: whether a stop string or the document token has come.
        tokens: number of tokens taken, the one that ended it included.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.ended = False
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = max((len(text) - 1 for text in self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""

    def add(self, token: int) -> str:
        """What can be shown now: the end of the text is held back while it may be the beginning of a stop string."""
        if self.ended:
            return ""
        self.tokens += 1
        if token == self._tokenizer.document_id:
            return self.finish()
        self._pending += self._decoder.decode(self._tokenizer.to_bytes([token]))
        found = [at for text in self._stop if (at := self._pending.find(text)) >= 0]
        if found:
            self._pending = self._pending[: min(found)]
            self.ended = True
        shown = self._pending if self.ended else self._pending[: len(self._pending) - self._held]
        self._pending = self._pending[len(shown) :]
        return shown

    def finish(self) -> str:
        """The rest of the text."""
        if self.ended:
            return ""
        self.ended = True
        rest = self._pending + self._decoder.decode(b"", final=True)
        at = min((at for text in self._stop if (at := rest.find(text)) >= 0), default=len(rest))
        return rest[:at]


def continuations(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    streams: Sequence[TextStream],
    seed: int = 0,
    **sampling: Unpack[Sampling],
) -> Iterator[list[str]]:
    """What the model writes after a prompt at the beginning of a document, as it writes it.

    Yields the new text of each stream, up to the end of the document; sample i is drawn from seed + i.
    """
    ids = [tokenizer.document_id, *tokenizer.encode(prompt)]
    device = next(model.parameters()).device
    tokens = torch.tensor([ids] * len(streams), device=device)
    for drawn in stream(model, tokens, max_new_tokens, seed=seed, **sampling):
        yield [each.add(token) for each, token in zip(streams, drawn.tolist(), strict=True)]
        if all(each.ended for each in streams):
            return
    yield [each.finish() for each in streams]


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
    parts = continuations(
        model, tokenizer, prompt, max_new_tokens, streams=[TextStream(tokenizer)], seed=seed, **sampling
    )
    return "".join(part for (part,) in parts)
