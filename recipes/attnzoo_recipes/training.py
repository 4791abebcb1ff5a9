"""Loss, optimiser and schedule of the pretraining recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

import attnzoo
from attnzoo.distributed import SequenceParallel, shard
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.feed_forward import SwiGLU
from attnzoo_recipes.initial_weights import start_from
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.losses import IGNORED, cross_entropy_and_z, linear_cross_entropy
from attnzoo_recipes.model_config import (
    KEY,
    check_same_model,
    check_state,
    describe_attention,
    describe_feed_forward,
    saved_settings,
)
from attnzoo_recipes.optimisers import (
    OptimiserMaker,
    ScheduleMaker,
    check_continued,
    check_optimiser,
    continued_settings,
    default_schedule,
    made_schedule,
    settings_of_groups,
)
from attnzoo_recipes.sharding import ShardedStrategy, clip_gradients
from attnzoo_recipes.trainer import check_strategy, ends_step, is_sharded, log_is_due, recount_batches


class Pretraining(L.LightningModule):
    """Next-token prediction with a decoder whose attention mechanism is an argument.

    A batch is {"tokens": (B, T) int64, "targets": (B, T) int64 with -100 = not predicted} and, if documents are
    packed, "cu_seqlens" as `AttentionMask.packed` takes it. Logs train_loss (nats per token, the mean over all batches
    of an optimiser step and all processes), lr, val_loss and val_bits_per_byte (total nats / total UTF-8 bytes / ln 2,
    which makes tokenizers comparable) of each validation set, test_loss and test_bits_per_byte. Data of another kind
    than `TextDataModule` have no bits per byte unless their module has `token_bytes`, and their sets after the first
    are val_1_loss, val_2_loss, ...

    Args:
        attention: the mechanism; makes an attention module from embed_dim.
        vocab_size: number of token ids. Default: that of the data module's tokenizer.
        embed_dim: width E.
        num_layers: blocks L.
        mlp_dim: hidden width of `SwiGLU`, if that is the feed-forward layer. Default: 8/3 E, rounded to a multiple of
            64.
        feed_forward: the feed-forward layer; makes one from embed_dim. None for blocks of attention alone.
        sparse_feed_forward: that of every `sparse_every`-th block, if it has another.
        sparse_every: as in `DecoderLM`.
        parallel: attention and feed-forward layer read the same norm of the same input.
        tie_embeddings: logits use the embedding matrix.
        norm_eps: added to the mean square in every norm.
        dropout: of the embedding and the branches; dropout of attention weights is an option of the attention.
        init_std: standard deviation of the initialisation.
        lr: peak learning rate.
        betas: AdamW's moment factors.
        adam_eps: AdamW's epsilon.
        weight_decay: of matrices. Parameters of one dimension (norms, biases, sinks, ...) are not decayed, nor are
            those that a mechanism names in `no_weight_decay()`.
        knock_weight_decay: of knocking-heads maps; decay pulls them to 0, not to the identity that they start from.
            Default: weight_decay.
        dynamic_lr_ratio: learning rate of what a mechanism names in `dynamic_parameters()`, weights that make weights
            of the input and start small, over lr.
        warmup_steps: optimiser steps of linear warm-up.
        min_lr_ratio: the cosine ends at this fraction of lr.
        schedule_steps: optimiser steps of the schedule. Default: the trainer's last step.
        optimizer: makes the optimiser from the parameter groups, which carry lr and weight_decay. Default: AdamW with
            betas and adam_eps.
        lr_scheduler: makes the schedule from the optimiser, with one step per optimiser step; an argument `steps` of
            its class is schedule_steps by default. Default: `WarmupCosine` with warmup_steps and min_lr_ratio.
        z_loss: coefficient of the squared logarithm of the softmax's denominator in the training loss (see `losses`);
            train_loss is logged without it.
        init_from: weights to start from, instead of random ones: a run, a checkpoint, or a safetensors file or folder
            of a decoder (`initial_weights.start_from`). Unlike with a trainer's ckpt_path, the run starts at step 0,
            with its own data, length and schedule.
        aux_loss_weight: factor of the mechanism's auxiliary losses, which already include their own coefficients.
        compile: torch.compile the decoder for batches; samples are drawn without.
        activation_checkpointing: recompute blocks in the backward pass instead of storing their activations.

    Raises:
        ValueError: for an argument outside its rule.
    """

    model: DecoderLM
    _on_batches: Callable[..., Tensor]
    _spread: SequenceParallel | None = None

    def __init__(
        self,
        attention: Callable[[int], nn.Module],
        *,
        vocab_size: int | None = None,
        embed_dim: int = 256,
        num_layers: int = 4,
        mlp_dim: int | None = None,
        feed_forward: Callable[[int], nn.Module] | None = SwiGLU,
        sparse_feed_forward: Callable[[int], nn.Module] | None = None,
        sparse_every: int = 2,
        parallel: bool = False,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        init_std: float = 0.02,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.1,
        knock_weight_decay: float | None = None,
        dynamic_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.1,
        schedule_steps: int | None = None,
        optimizer: OptimiserMaker | None = None,
        lr_scheduler: ScheduleMaker | None = None,
        z_loss: float = 0.0,
        init_from: str | None = None,
        aux_loss_weight: float = 1.0,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        numbers = {
            "norm_eps": norm_eps, "dropout": dropout, "init_std": init_std, "lr": lr, "betas": betas,
            "adam_eps": adam_eps, "weight_decay": weight_decay, "knock_weight_decay": knock_weight_decay,
            "dynamic_lr_ratio": dynamic_lr_ratio, "min_lr_ratio": min_lr_ratio, "aux_loss_weight": aux_loss_weight,
            "z_loss": z_loss,
        }  # fmt: skip
        check_finite(numbers)
        for name, value in (("lr", lr), ("dynamic_lr_ratio", dynamic_lr_ratio)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        for name, value in (
            ("norm_eps", norm_eps),
            ("adam_eps", adam_eps),
            ("weight_decay", weight_decay),
            ("knock_weight_decay", knock_weight_decay or 0.0),
            ("warmup_steps", warmup_steps),
            ("aux_loss_weight", aux_loss_weight),
            ("z_loss", z_loss),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in [0, 1], got {min_lr_ratio}")
        if schedule_steps is not None and schedule_steps < 1:
            raise ValueError(f"schedule_steps must be at least 1, got {schedule_steps}")
        if optimizer is not None:
            check_optimiser(optimizer, lr, weight_decay)
        self.attention = attention
        self.feed_forwards: dict[str, Any] = {"feed_forward": feed_forward, "sparse_feed_forward": sparse_feed_forward}
        self.vocab_size = vocab_size
        self.sizes: dict[str, Any] = {
            "embed_dim": embed_dim, "num_layers": num_layers, "mlp_dim": mlp_dim,
            "sparse_every": sparse_every, "parallel": parallel, "tie_embeddings": tie_embeddings,
            "norm_eps": norm_eps, "dropout": dropout, "init_std": init_std,
            "activation_checkpointing": activation_checkpointing,
        }  # fmt: skip
        self.lr = lr
        self.betas = betas
        self.adam_eps = adam_eps
        self.weight_decay = weight_decay
        self.knock_weight_decay = weight_decay if knock_weight_decay is None else knock_weight_decay
        self.dynamic_lr_ratio = dynamic_lr_ratio
        self.warmup_steps = warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.schedule_steps = schedule_steps
        self.optimiser = optimizer
        self.schedule = lr_scheduler or default_schedule(warmup_steps, min_lr_ratio)
        self.z_loss = z_loss
        self.init_from = init_from
        self.aux_loss_weight = aux_loss_weight
        self.compile_model = compile
        self._totals = torch.zeros(0, 3)
        self._evaluated: list[str] = []
        self._token_bytes = torch.zeros(0)
        self._has_weights = False
        self._of_step: dict[str, list[Tensor]] = {}

    # model

    def setup(self, stage: str) -> None:
        """Raise ValueError for a strategy that the recipe does not support, or a training without an end."""
        check_strategy(self.trainer, self.compile_model)

    def configure_model(self) -> None:
        """Build the decoder, once; the size of the vocabulary is known by now.

        Raises:
            ValueError: if sequences or heads are to be spread over processes and cannot be.
        """
        if "model" in self._modules:
            return
        if self.vocab_size is None:
            tokenizer = getattr(self._data(), "tokenizer", None)
            if tokenizer is None:
                raise ValueError("vocab_size must be given where the trainer's data module has no tokenizer, got None")
            self.vocab_size = int(tokenizer.vocab_size)
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            self.model, self._spread = strategy.decoder(self.vocab_size, self.attention, self.feed_forwards, self.sizes)
            if self._spread is not None and self._data() is not None:
                check_block_size(self._spread, self._data().block_size)
            return
        self.model = DecoderLM(self.vocab_size, self.attention, **self.feed_forwards, **self.sizes)
        if self.compile_model:
            # For batches alone: samples, of every length, would make it compile again, and then round in another way.
            # Drawn by torch's own generator, dropout is that of an uncompiled run, and continues in a resumed one.
            compiled = torch.compile(self.model.hidden, options={"fallback_random": True})
            object.__setattr__(self, "_on_batches", compiled)  # no submodule: its weights are those of the model

    def whole_model(self) -> DecoderLM:
        """The decoder, or where heads are split over processes one without values, to count those of all processes."""
        if self._trainer is None or getattr(self.trainer.strategy, "tensor_parallel_size", 1) == 1:
            return self.model
        assert self.vocab_size is not None
        with torch.device("meta"):
            return DecoderLM(self.vocab_size, self.attention, **self.feed_forwards, **self.sizes)

    def model_config(self) -> dict[str, Any]:
        """The arguments of `model_config.build_model` for the same decoder, as plain types."""
        layers = {name: describe_feed_forward(maker) for name, maker in self.feed_forwards.items()}
        attention = describe_attention(self.attention)
        return {"vocab_size": self.vocab_size, **self.sizes, **layers, "attention": attention}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what generation needs: the model's configuration and the tokenizer's settings."""
        saved: dict[str, Any] = {"model": self.model_config()}
        tokenizer = getattr(self._data(), "tokenizer", None)
        if tokenizer is not None:
            saved["tokenizer"] = tokenizer.to_dict()
        if (block_size := getattr(self._data(), "block_size", None)) is not None:
            saved["block_size"] = int(block_size)
        saved["optimizer"] = self._continued_settings()
        checkpoint[KEY] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise, in one sentence, for a checkpoint of another mechanism, of other sizes or of another tokenizer.

        A run that continues it must also have its optimiser's settings, which Lightning would take from it.
        """
        saved = saved_settings(checkpoint)
        self._has_weights = True
        self.configure_model()
        check_same_model(saved["model"], self.model_config())
        tokenizer = getattr(self._data(), "tokenizer", None)
        if tokenizer is not None and saved.get("tokenizer", tokenizer.to_dict()) != tokenizer.to_dict():
            raise ValueError("the checkpoint's tokenizer differs from the one that the data settings give")
        check_state(self, checkpoint["state_dict"])
        if self._trainer is not None and self.trainer.state.fn == "fit":
            before = saved.get("optimizer", settings_of_groups(checkpoint.get("optimizer_states")))
            check_continued(before if isinstance(before, dict) else {}, self._continued_settings())
            if isinstance(self._data(), TextDataModule):
                recount_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def _continued_settings(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model.lr": self.lr, "model.weight_decay": self.weight_decay,
            "model.knock_weight_decay": self.knock_weight_decay, "model.dynamic_lr_ratio": self.dynamic_lr_ratio,
        }  # fmt: skip
        if self.optimiser is None:
            options |= {"model.betas": self.betas, "model.adam_eps": self.adam_eps}
        return continued_settings(self.optimiser, self.schedule, options)

    def _data(self) -> Any:
        """The trainer's data module, or None."""
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def on_fit_start(self) -> None:
        """Read the weights to start from, and balance routers over the batch of all processes."""
        self._start()
        if self.trainer.world_size > 1:
            attnzoo.sync_aux_loss(self.model)
        if self._spread is not None:
            self._rehearse(self._spread)

    @torch.no_grad()
    def _rehearse(self, spread: SequenceParallel) -> None:
        """Let every layer say, before training, what it cannot do on a shard: one sequence, of two documents."""
        data = self._data()
        tokens = torch.zeros(1, data.block_size, dtype=torch.int64, device=self.device)
        batch = {"tokens": shard(tokens, 1, spread)}
        if not data.cross_documents:
            ends = [0, data.block_size // 2 + 1, data.block_size]
            batch["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=self.device)
        was_training = self.model.training
        self.model.eval()
        self._hidden(batch)
        self.model.train(was_training)

    def on_validation_start(self) -> None:
        """Read the weights to start from, if no training has."""
        self._start()

    on_test_start = on_validation_start

    def _start(self) -> None:
        """Once, read the weights of init_from, unless those of a checkpoint have been restored."""
        if self._has_weights or self.init_from is None:
            return
        self._has_weights = True
        tokenizer = getattr(self._data(), "tokenizer", None)
        for sentence in start_from(self.model, self.model_config(), tokenizer, self.init_from):
            rank_zero_warn(sentence)

    # loss

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); options are those of `DecoderLM.forward`."""
        logits: Tensor = self.model(tokens, **options)
        return logits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move parameters that have bounds back into them, before each step that uses them."""
        for module in self.model.modules():
            project: Callable[[], None] | None = getattr(module, "project_parameters", None)
            if project is not None:
                project()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the predicted tokens, plus auxiliary losses and the z-loss."""
        loss, z = self._mean_losses(self._own_tokens(batch))
        self._log_of_step("train_loss", loss, batch_idx, prog_bar=True)
        if z is not None:
            self._log_of_step("train_z_loss", z, batch_idx)
            loss = loss + self.z_loss * z
        aux = attnzoo.aux_loss(self.model)
        if aux is not None:
            self._log_of_step("train_aux_loss", aux, batch_idx)
            loss = loss + self.aux_loss_weight * aux
        if log_is_due(self.trainer, batch_idx, self.global_step + 1):
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.log("lr", optimizer.param_groups[0]["lr"])
        return loss

    def _log_of_step(self, name: str, value: Tensor, batch_idx: int, prog_bar: bool = False) -> None:
        """Log the mean over the batches of an optimiser step and over all processes, at its last batch."""
        values = self._of_step.setdefault(name, [])
        values.append(value.detach())
        if ends_step(self.trainer, batch_idx):
            del self._of_step[name]
            self.log(name, sum(values) / len(values), prog_bar=prog_bar, sync_dist=True)

    def _own_tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with the tokens of each sequence that this process has, and their targets, which are shifted."""
        if self._spread is None:
            return batch
        return batch | {name: shard(batch[name], 1, self._spread) for name in ("tokens", "targets")}

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """What the decoder's last norm returns for the tokens of a batch, (B T, E); documents are of all ranks."""
        boundaries = batch.get("cu_seqlens")
        if boundaries is not None and self.compile_model:
            # One length for all batches, by empty documents at the end: what is compiled, and with it rounding, would
            # depend on how many documents the first batch had.
            tokens = batch["tokens"].numel()
            boundaries = F.pad(boundaries, (0, tokens + 1 - boundaries.numel()), value=tokens)
        mask = None if boundaries is None else attnzoo.AttentionMask.packed(boundaries)
        decoder: Callable[..., Tensor] = self._on_batches if self.compile_model else self.model.hidden
        return decoder(batch["tokens"], mask=mask).flatten(0, 1)

    def _cross_entropy(self, batch: dict[str, Tensor], reduction: str) -> Tensor:
        return linear_cross_entropy(
            self._hidden(batch), self.model.output_weight, batch["targets"].flatten(), reduction
        )

    def _mean_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Mean cross-entropy over the predicted tokens of all processes, and that of the z-loss if there is one.

        Where targets are ignored, processes have different numbers of them, and a mean of means would be wrong: so
        the average of the gradients is the gradient of these. Processes that share heads count the same tokens, as
        often as processes.
        """
        alone = self.trainer.world_size == 1
        reduction = "mean" if alone else "sum"
        factor: Tensor | float = 1.0
        if not alone:
            predicted = (batch["targets"] != IGNORED).sum()
            dist.all_reduce(predicted)
            factor = self.trainer.world_size / predicted
        if not self.z_loss:
            return self._cross_entropy(batch, reduction) * factor, None
        nats, z = cross_entropy_and_z(
            self._hidden(batch), self.model.output_weight, batch["targets"].flatten(), reduction
        )
        return nats * factor, z * factor

    # evaluation

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._start_totals("val")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count nats, predicted tokens and bytes."""
        self._count(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log val_loss and val_bits_per_byte, and those of other sets with their names."""
        self._log_totals()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._start_totals("test")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count nats, predicted tokens and bytes."""
        self._count(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log test_loss and test_bits_per_byte."""
        self._log_totals()

    def _start_totals(self, stage: str) -> None:
        data = self._data()
        loaders = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        sets = [str(number or "") for number in range(len(loaders))]
        if stage == "val":
            sets = list(getattr(data, "validation", sets))
        self._evaluated = [f"{stage}_{name}" if name else stage for name in sets]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._totals = torch.zeros(len(sets), 3, dtype=dtype, device=self.device)
        known = getattr(data, "token_bytes", None)
        lengths = torch.zeros(self.model.vocab_size, dtype=torch.int64) if known is None else known
        self._token_bytes = lengths.to(self.device)

    def _count(self, batch: dict[str, Tensor], index: int) -> None:
        batch = self._own_tokens(batch)
        nats = self._cross_entropy(batch, "sum")
        predicted = batch["targets"][batch["targets"] != IGNORED]
        counts = (nats, predicted.new_tensor(predicted.numel()), self._token_bytes[predicted].sum())
        self._totals[index] += torch.stack([count.to(self._totals) for count in counts])

    def _log_totals(self) -> None:
        totals = self.trainer.strategy.reduce(self._totals, reduce_op="sum")
        for name, (nats, predicted, text_bytes) in zip(self._evaluated, totals.tolist(), strict=True):
            if predicted:
                self.log(f"{name}_loss", nats / predicted)
            if text_bytes:
                self.log(f"{name}_bits_per_byte", nats / text_bytes / math.log(2), prog_bar=True)

    # optimiser

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser over the parameter groups, and the schedule, with one step per optimiser step."""
        if self.optimiser is None:
            # The fused step unscales gradients itself, so that with float16's scaler they could not be clipped.
            fused = self.trainer.precision != "16-mixed"
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameter_groups(), lr=self.lr, betas=self.betas, eps=self.adam_eps, fused=fused
            )
        else:
            optimizer = self.optimiser(self.parameter_groups(embeddings=True))
        scheduler = made_schedule(self.schedule, optimizer, self._last_step())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self, embeddings: bool = False) -> list[dict[str, Any]]:
        """Named groups "decay", "no_decay", "knock" and "dynamic", without those that are empty, with rate and decay.

        With `embeddings`, embeddings and output weights are a group "embeddings" of their own, decayed like "decay".
        """
        apart = {id(self.model.embedding.weight), id(self.model.output_weight)} if embeddings else set()
        own: dict[str, set[int]] = {"knock": set(), "dynamic": set()}
        undecayed: set[int] = set()
        for module in self.model.modules():
            for group, members in own.items():
                found: Callable[[], Iterable[nn.Parameter]] | None = getattr(module, f"{group}_parameters", None)
                members |= {id(parameter) for parameter in (found() if found is not None else ())}
            named: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
            if named is not None:
                undecayed |= {id(module.get_parameter(name)) for name in named()}
        groups: dict[str, list[nn.Parameter]] = {
            "decay": [], "embeddings": [], "no_decay": [], "knock": [], "dynamic": [],
        }  # fmt: skip
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            if (name := next((name for name, members in own.items() if id(parameter) in members), None)) is not None:
                groups[name].append(parameter)
            elif id(parameter) in apart:
                groups["embeddings"].append(parameter)
            else:
                decayed = parameter.ndim > 1 and id(parameter) not in undecayed
                groups["decay" if decayed else "no_decay"].append(parameter)
        decay = dict.fromkeys(groups, self.weight_decay) | {"no_decay": 0.0, "knock": self.knock_weight_decay}
        rate = dict.fromkeys(groups, self.lr) | {"dynamic": self.lr * self.dynamic_lr_ratio}
        return [
            {"name": name, "params": parameters, "weight_decay": decay[name], "lr": rate[name]}
            for name, parameters in groups.items()
            if parameters
        ]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; Lightning refuses to with fused AdamW in mixed precision, even without a gradient scaler."""
        plugin = self.trainer.precision_plugin
        if is_sharded(self.trainer):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if gradient_clip_val:
                clip_gradients(parameters, gradient_clip_val, gradient_clip_algorithm == GradClipAlgorithmType.VALUE)
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _last_step(self) -> int:
        """Steps of the schedule."""
        if self.schedule_steps is not None:
            return self.schedule_steps
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) or steps < 1:  # Lightning answers -1 where the data have no end
            raise ValueError("trainer.max_steps must be given: the learning rate's cosine ends there, got no end")
        return int(steps)


def check_block_size(spread: SequenceParallel, block_size: int) -> None:
    """Raise ValueError for a sequence that cannot be spread evenly."""
    try:
        spread.runs(block_size)
    except ValueError as error:
        raise ValueError(f"data.block_size must divide among sequence_parallel_size {spread.size}: {error}") from None


def check_finite(settings: Any, name: str = "") -> None:
    """Raise ValueError for the first number in nested settings that is NaN or infinite, with its dotted name."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            check_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_finite(value, name)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{name} must be a finite number, got {settings}")
