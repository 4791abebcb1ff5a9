"""What a run that has no memory left says: the shape, where the bytes go, and what would help."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning as L
import torch

from attnzoo.costs import cost
from attnzoo_recipes.data.module import data_place
from attnzoo_recipes.losses import LARGEST_LOGITS
from attnzoo_recipes.options import is_out_of_memory
from attnzoo_recipes.trainer import text_data

_TRAINED = 16  # bytes of a float32 parameter with its gradient and AdamW's two moments


class MemoryEstimate(L.Callback):
    """Adds to the exception of a run that has no memory left a sentence with shape, estimates and what would help."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add the sentence as a note."""
        if is_out_of_memory(exception):
            with contextlib.suppress(Exception):  # the exception itself is what must be seen
                exception.add_note(estimate(trainer, pl_module))


def out_of_memory(error: BaseException) -> str:
    """One sentence about an exception that `MemoryEstimate` has seen, or, before there is a trainer, without it."""
    notes = " ".join(getattr(error, "__notes__", [])) or "this happened before training: take a smaller model or corpus"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"out of memory ({reason.rstrip('.')}): {notes}"


def estimate(trainer: L.Trainer, pl_module: Any) -> str:
    """Shape, least bytes of the mechanism and of the rest, and three settings that would help."""
    data, sizes = text_data(trainer), pl_module.sizes
    samples, tokens = -(-data.batch_size // data_place(trainer)[1]), data.block_size
    width, layers, vocabulary = sizes["embed_dim"], sizes["num_layers"], pl_module.vocab_size or 0
    with torch.device("meta"):
        attention = pl_module.attention(width)
    each = cost(attention, samples, tokens, dtype=torch.float32)
    weights, moved = layers * each.parameters * _TRAINED, layers * each.bytes_moved
    # Logits, their float32 copy and its gradient, in pieces if they are large.
    logits = 3 * min(samples * tokens * vocabulary * 4, LARGEST_LOGITS)
    recomputed = sizes["activation_checkpointing"]
    third = "trainer.precision to bf16-mixed" if recomputed else "model.activation_checkpointing to true"
    return (
        f"shape (B, T) = ({samples}, {tokens}) in each process, E = {width}, L = {layers}, V = {vocabulary}; "
        f"{layers} layers of {type(attention).__name__} take about {_mib(weights)} for weights, gradients and moments "
        f"and move at least {_mib(moved)} in a forward pass, and logits take about {_mib(logits)}; lower "
        f"data.batch_size (trainer.accumulate_grad_batches makes up for it), lower data.block_size, or set {third}"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
