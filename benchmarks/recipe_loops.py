"""The recipe under its Trainer beside a plain training loop with the same sizes, data and mathematics."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from baselines import rotary_rows, rotate
from lightning.pytorch.loggers import CSVLogger
from timing import Timing, interleave, relative_error
from torch import Tensor, nn

import attnzoo
from attnzoo_recipes.callbacks.progress import LossCurve, StepProgress, Throughput
from attnzoo_recipes.callbacks.resilience import GracefulStop, LossGuard, RandomStates
from attnzoo_recipes.checkpointing import AtomicCheckpointIO
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.optimisers import warmup_cosine
from attnzoo_recipes.training import Pretraining

E, H, LAYERS, B, T = 192, 8, 4, 8, 256
STEPS, WARM = 24, 4
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


class PlainBlock(nn.Module):
    """Pre-norm block with one Linear for q, k, v and scaled_dot_product_attention; no masks, no caches, no options."""

    def __init__(self, mlp_dim: int) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(E, eps=1e-6), nn.RMSNorm(E, eps=1e-6)
        self.qkv, self.out = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.gate, self.up = nn.Linear(E, mlp_dim, bias=False), nn.Linear(E, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, E, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attn_norm(x)).view(*x.shape[:2], 3 * H, E // H).transpose(1, 2).chunk(3, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        z = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


class PlainLM(nn.Module):
    """The recipe's decoder, written down for one mechanism."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, E)
        self.blocks = nn.ModuleList(PlainBlock(model.mlp_dim) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(E, eps=1e-6)
        self.cos, self.sin = rotary_rows(torch.arange(T), E // H, torch.float32)
        with torch.no_grad():
            self.embedding.weight.copy_(model.embedding.weight)
            for ours, theirs in zip(self.blocks, model.blocks, strict=True):
                attn, mlp = theirs.attn, theirs.mlp
                ours.qkv.weight.copy_(torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]))
                ours.out.weight.copy_(attn.o_proj.weight)
                for mine, other in ((ours.gate, mlp.gate_proj), (ours.up, mlp.up_proj), (ours.down, mlp.down_proj)):
                    mine.weight.copy_(other.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.linear(self.norm(x), self.embedding.weight)


def plain_loop(model: PlainLM, tokens: np.ndarray) -> float:
    """Mean ms of a step: random crops, AdamW, clipping, cosine; no logging but the loss every tenth step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    factor = warmup_cosine(10, STEPS, 0.1)
    start = 0.0
    for step in range(STEPS):
        if step == WARM:
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LR * factor(step)
        places = torch.randint(len(tokens) - T - 1, (B,))
        rows = torch.from_numpy(np.stack([tokens[i : i + T + 1] for i in places]).astype(np.int64))
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % 10 == 0:
            loss.item()
    return (time.perf_counter() - start) * 1e3 / (STEPS - WARM)


class Clock(L.Callback):
    """Mean ms of a step, from the end of step WARM on."""

    ms = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM:
            self.start = time.perf_counter()
        if trainer.global_step == STEPS:
            self.ms = (time.perf_counter() - self.start) * 1e3 / (STEPS - WARM)


def recipe_loop(folder: Path) -> float:
    """Mean ms of a step with what attnzoo-pretrain has in every run, apart from checkpoints and validation."""
    clock = Clock()
    module = Pretraining(
        functools.partial(attnzoo.MultiHeadAttention, num_heads=H, bias=False),
        embed_dim=E, num_layers=LAYERS, lr=LR, weight_decay=WEIGHT_DECAY, warmup_steps=10,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            gradient_clip_val=CLIP,
            limit_val_batches=0,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=CSVLogger(folder / "runs", name=""),
            plugins=[AtomicCheckpointIO()],
            callbacks=[RandomStates(), LossGuard(), Throughput(), LossCurve(), GracefulStop(), StepProgress(10), clock],
        )
        trainer.fit(module, datamodule=text(folder))
    return clock.ms


def text(folder: Path) -> TextDataModule:
    """The standard library's text in bytes."""
    return TextDataModule(block_size=T, batch_size=B, cache_dir=str(folder / "data"))


def compare(rounds: int) -> Iterator[dict[str, Any]]:
    """Both loops in turns; one row each."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*max_epochs.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = text(folder)
        module = Pretraining(
            functools.partial(attnzoo.MultiHeadAttention, num_heads=H, bias=False),
            vocab_size=data.tokenizer.vocab_size, embed_dim=E, num_layers=LAYERS,
        )  # fmt: skip
        module.configure_model()
        plain = PlainLM(module.model)
        tokens = torch.from_numpy(data.packed.tokens("train")[: B * T].astype(np.int64)).view(B, T)
        with torch.no_grad():
            error = relative_error(plain(tokens), module.model(tokens).double())
        stream = data.packed.tokens("train")
        times = interleave(
            {
                "plain loop": lambda: plain_loop(PlainLM(module.model), stream),
                "attnzoo recipe, MHA": lambda: recipe_loop(folder),
            },
            max(3, rounds // 3),
            warmup=1,
        )
    yield from (row(name, timing, times["plain loop"], error) for name, timing in times.items())


def row(name: str, timing: Timing, floor: Timing, error: float) -> dict[str, Any]:
    """One line of the results; error is the difference of the two models' logits."""
    return {
        "suite": "recipe",
        "case": name,
        "phase": "training step",
        "shape": {"B": B, "T": T, "E": E, "H": H, "L": LAYERS},
        "ms": round(timing.ms, 3),
        "ratio": round(timing.ms / floor.ms, 3),
        "noise": round(timing.noise, 2),
        "error": float(f"{error:.1e}"),
        "tokens_per_s": round(B * T / timing.ms * 1e3),
    }
