"""What a run prints at its end: figures, files, and a sample."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.callbacks.progress import Checkpoints, LossCurve, Throughput
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.data.module import MAIN
from attnzoo_recipes.model_config import model_from_checkpoint
from attnzoo_recipes.sampling import continue_text
from attnzoo_recipes.trainer import callbacks_of, is_dry_run, is_sharded, run_folder, text_data, weights_are_finite

WRITTEN = 200  # characters


class Sizes(L.Callback):
    """Print the model's size by part and its cost per token when fitting begins."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print three lines."""
        model, tokens = pl_module.model, text_data(trainer).block_size
        parts = {
            "attention": [layer.attn for layer in model.layers],
            "feed-forward": [layer.mlp for layer in model.layers if layer.mlp is not None],
        }
        sizes = {name: sum(x.numel() for m in modules for x in m.parameters()) for name, modules in parts.items()}
        sizes["other"] = model.num_parameters - sum(sizes.values())
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
        kinds = " and ".join(dict.fromkeys(type(layer.attn).__name__ for layer in model.layers))
        flops = 3 * model.flops(tokens) // tokens
        lines = [
            _line("model", f"{len(model.layers)} layers of width {model.embed_dim} with {kinds}"),
            _line("parameters", f"{model.num_parameters:,} ({listed})"),
            _line("training cost", f"{flops:,} FLOPs per token, in samples of {tokens:,} tokens"),
        ]
        sys.stdout.write("\n".join([*lines, ""]))
        sys.stdout.flush()


class Report(L.Callback):
    """Print figures, files and a sample when fitting has ended.

    Args:
        prompt: the text that the sample continues.
        temperature: of the sample.
        allowed: packages that the checkpoint may name when it is read again for the sample.
    """

    def __init__(self, prompt: str = "def ", temperature: float = 0.8, allowed: Iterable[str] = ALLOWED) -> None:
        self.prompt = prompt
        self.temperature = temperature
        self.allowed = tuple(allowed)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print, unless the run was stopped before its end."""
        if trainer.state.status != "running" or is_dry_run(trainer):
            return
        text = "\n".join(["", *self.figures(trainer, pl_module), *self.files(trainer), *self.sample(trainer), ""])
        sys.stdout.write(text)
        sys.stdout.flush()

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the figures of a command that only validates; Lightning's table cuts them off."""
        if trainer.state.fn == "validate":
            _print_metrics(trainer)

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the figures of a command that tests."""
        _print_metrics(trainer)

    def figures(self, trainer: L.Trainer, pl_module: Any) -> list[str]:
        """Quality, speed and size, one line each."""
        data = text_data(trainer)
        packed, split = data.validation[MAIN]
        corpus = packed.meta["splits"][split]
        limit: Any = getattr(trainer, "limit_val_batches", 1.0)
        cut = isinstance(limit, int) or limit < 1.0 or (data.val_tokens or corpus["tokens"]) < corpus["tokens"]
        text = "all validation text" if cut else "the same text"
        lines = []
        if "val_bits_per_byte" in trainer.callback_metrics:
            bits = float(trainer.callback_metrics["val_bits_per_byte"])
            lines.append(_line("validation", f"{bits:.4f} bits per byte"))
            for order in ("unigram", "bigram"):
                entropy = corpus.get(f"{order}_bits_per_byte")
                if entropy is None:  # of token files that were given as they are
                    continue
                verdict = "the model is below" if bits < entropy else "the model is NOT below"
                lines.append(_line(f"{order} entropy", f"{entropy:.4f} bits per byte of {text} ({verdict})"))
        else:
            lines.append(_line("validation", f"none in these {trainer.global_step} steps"))
        model = pl_module.whole_model()
        throughput = next(callback for callback in callbacks_of(trainer) if isinstance(callback, Throughput))
        cached = model.cache_bytes_per_token(torch.float32)
        if throughput.tokens:
            lines.append(_line("speed", f"{throughput.average:,.0f} tokens/s in training"))
        lines.append(_line("parameters", f"{model.num_parameters:,}"))
        lines.append(_line("cache", f"{cached:,} bytes per token in float32, {cached // 2:,} in bfloat16"))
        return lines

    def files(self, trainer: L.Trainer) -> list[str]:
        """Where the files are."""
        folder = run_folder(trainer)
        curve = next(callback for callback in callbacks_of(trainer) if isinstance(callback, LossCurve))
        named = {
            "checkpoint": _checkpoint(trainer),
            "metrics": folder / "metrics.csv",
            "loss curve": folder / curve.file,
        }
        return [_line(name, str(path)) for name, path in named.items() if path is not None and path.exists()]

    def sample(self, trainer: L.Trainer) -> list[str]:
        """A text written by the model of the newest checkpoint, read from its file and decoded with its cache."""
        path = _checkpoint(trainer)
        if path is None or not path.exists() or is_sharded(trainer):  # one process may not have room for the model
            return []
        model = model_from_checkpoint(read_checkpoint(path), self.allowed)
        if not weights_are_finite(model):
            return []
        # Every token is at least one character, except the last ones, which may be part of one.
        text = continue_text(
            model, text_data(trainer).tokenizer, self.prompt, WRITTEN + 4, temperature=self.temperature
        )
        where = f"after {self.prompt!r}" if self.prompt else "of a new document"
        return [
            "",
            f"sample, {len(text[:WRITTEN])} characters {where}:",
            f"{self.prompt}{text[:WRITTEN]}",
        ]


def _checkpoint(trainer: L.Trainer) -> Path | None:
    for callback in callbacks_of(trainer):
        if isinstance(callback, Checkpoints):
            return Path(callback.best_model_path) if callback.best_model_path else None
    return None


def _print_metrics(trainer: L.Trainer) -> None:
    sys.stdout.write("".join(f"{name} {float(value):.6f}\n" for name, value in trainer.callback_metrics.items()))
    sys.stdout.flush()


def _line(name: str, value: str) -> str:
    return f"{name:<16} {value}"
