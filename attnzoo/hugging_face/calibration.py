"""One pass over calibration batches, and what conversions keep of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.conversion.calibration import InputStatistics
from attnzoo.diagnostics.batches import in_eval_mode, run_batch, tokens_and_mask
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.rules import describe

Batch = dict[str, Any]


@torch.no_grad()
def calibrate(
    model: nn.Module, sources: Mapping[str, Any], calib: Iterable[Any], *, pair_norms: bool, kept_tokens: int = 0
) -> tuple[dict[str, InputStatistics], list[Batch]]:
    """Statistics of the inputs of all these attention layers, from one pass over the batches.

    Memory does not grow with the number of batches: per layer (E + 1)^2 numbers in float64. Padded tokens count in
    nothing.

    Args:
        model: a model of transformers.
        sources: by the names of attention modules, the attnzoo modules of the same function.
        calib: token ids (B, T), mappings of the model's arguments, or pairs (token ids, attention mask).
        pair_norms: whether to measure the norms of pairs of features of queries and keys.
        kept_tokens: of the first batches, as many as hold so many tokens are returned too.

    Raises:
        ValueError: if there is no batch, or one is of another form.
    """
    statistics = {
        name: InputStatistics(attn.embed_dim, _paired(attn) if pair_norms else None, next(attn.parameters()).device)
        for name, attn in sources.items()
    }
    real: list[Tensor | None] = [None]

    def hook(name: str) -> Any:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            statistics[name].update(x, real[0])

        return read

    kept, tokens = [], 0
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        for name in sources:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in map(_inputs, calib):
            batch = {key: _moved(value, model) for key, value in batch.items()}
            _, real[0] = tokens_and_mask(batch)
            run_batch(model, batch, real[0])
            if tokens < kept_tokens and "input_ids" in batch:
                kept.append(batch)
                tokens += batch["input_ids"].numel()
    if not any(one.tokens for one in statistics.values()):
        raise ValueError("calib must hold at least one batch with a token, got none")
    return statistics, kept


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy of the next token, in nats, over all real tokens of the batches.

    Raises:
        ValueError: if the model returns no logits.
    """
    total, count = 0.0, 0
    with in_eval_mode(model):
        for batch in batches:
            ids, mask = tokens_and_mask(batch)
            logits = getattr(model(**batch), "logits", None)
            if ids is None or logits is None:
                raise ValueError(f"model must return logits of token ids to have a loss, got a {type(model).__name__}")
            targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"))
            count += int((targets != -100).sum())
    if not count:
        raise ValueError("batches must hold a token to predict, got none")
    return total / count


def _paired(attn: nn.Module) -> GroupedQueryAttention | None:
    return attn if isinstance(attn, GroupedQueryAttention) and attn.head_dim % 2 == 0 else None


def _inputs(batch: Any) -> Batch:
    """A batch as the model's arguments."""
    if isinstance(batch, Mapping):
        if not isinstance(batch.get("input_ids", None), Tensor | None):
            raise ValueError(f"calib must hold tensors as input_ids, got {describe(batch['input_ids'])}")
        return dict(batch)
    ids, mask = tokens_and_mask(batch)
    if ids is None or ids.ndim != 2:
        got = describe(batch) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"calib must hold token ids (B, T), mappings or pairs (token ids, mask), got {got}")
    if mask is not None and (mask.shape != ids.shape or not torch.equal(batch[1], mask.to(batch[1].dtype))):
        raise ValueError(f"calib must have masks of 0 and 1 in the shape of the ids {tuple(ids.shape)} in its pairs")
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask.long()}


def known_ids(model: Any, calib: Iterable[Any]) -> Iterator[Any]:
    """The batches, as they come.

    Raises:
        ValueError: for token ids that the model does not have.
    """
    for batch in calib:
        ids, _ = tokens_and_mask(batch)
        if ids is not None and ids.numel():
            least, largest, known = int(ids.min()), int(ids.max()), model.get_input_embeddings().weight.shape[0]
            if least < 0 or largest >= known:
                raise ValueError(f"calib must hold token ids from 0 to {known - 1}, got {least} to {largest}")
        yield batch


def _moved(value: Any, model: Any) -> Any:
    return value.to(model.device) if isinstance(value, Tensor) else value
