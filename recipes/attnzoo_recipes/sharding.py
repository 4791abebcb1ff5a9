"""Training whose parameters, gradients and optimiser states are spread over processes: FSDP2 under Lightning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from attnzoo_recipes import sharded_checkpoints
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, instead_of, load_file, newest_valid
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.random_states import random_states, set_random_states


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` whose default is to shard over all processes, and whose checkpoints survive kill -9.

    `--trainer.strategy ModelParallelStrategy` is this one.

    Args:
        data_parallel_size: processes over which parameters are sharded and batches are divided. Default: all.
        tensor_parallel_size: processes that share a batch. Only 1 is supported.
        process_group_backend: as in Lightning; gloo on CPU and nccl on GPUs by default.
        timeout: after which a process gives up waiting for another one.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1 if tensor_parallel_size == "auto" else tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

        self._source: Path | None = None

    @classmethod
    def of(cls, strategy: ModelParallelStrategy) -> ShardedStrategy:
        """The same settings as those of Lightning's strategy."""
        given = (strategy._data_parallel_size, strategy._tensor_parallel_size)
        return cls(*given, strategy._process_group_backend, strategy._timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimiser states of a checkpoint, once it has compared the models."""
        return True

    def setup_environment(self) -> None:
        """Start the processes."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights, as DTensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The states of an optimiser by number, with DTensors."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a folder (`sharded_checkpoints`); all processes have to call it."""
        writer = self.checkpoint_io
        assert isinstance(writer, AtomicCheckpointIO)
        writer.save_checkpoint(checkpoint, self.broadcast(str(filepath)), storage_options, sharded=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of either kind; of a sharded one everything but its large tensors, which are loaded later.

        In their place it has tensors of the same shapes that take no memory, to be compared with the model.
        """
        if weights_only is False:
            raise ValueError("weights_only must not be False: loading a checkpoint must not run code")
        target = Path(self.broadcast(str(checkpoint_path))).absolute()
        if target.is_dir() and not sharded_checkpoints.is_sharded(target):
            newest = self.broadcast(newest_valid(target) if self.is_global_zero else None)
            if newest is None:
                raise ValueError(f"there is no valid checkpoint in {target}")
            target = newest
        if sharded_checkpoints.is_sharded(target) and (wrong := sharded_checkpoints.wrong_for_all(target)) is not None:
            target = instead_of(target, wrong)
        self._source = target if sharded_checkpoints.is_sharded(target) else None
        if self._source is None:
            loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(target)
            return loaded
        return sharded_checkpoints.read(self._source, load_file, tensors=False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load each process's part of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        if self._source is not None:
            sharded_checkpoints.load_weights(self._source, own)
            return
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                own[name].copy_(_like(own[name], value))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load each process's part of the optimiser states."""
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: self._state_of(parameters[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            if self._source is not None:
                sharded_checkpoints.load_states(self._source, i, state)
            optimizer.load_state_dict({**saved, "state": state})

    def _state_of(self, parameter: Tensor, value: Any) -> Any:
        """A state of a parameter as this process holds it; one that is to be loaded has no values yet."""
        if not isinstance(value, Tensor):
            return value
        if value.ndim > 0 and value.shape == parameter.shape:
            return _like(parameter, value) if self._source is None else torch.empty_like(parameter, dtype=value.dtype)
        return value if self._source is None else torch.empty(value.shape, dtype=value.dtype)


StrategyRegistry.register(  # Lightning looks names up in lower case
    "modelparallelstrategy", ShardedStrategy, "FSDP2 over all processes, with checkpoints that survive kill -9"
)


def _like(sharded: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a tensor that all have."""
    if not isinstance(sharded, DTensor) or isinstance(whole, DTensor):
        return whole
    whole = whole.to(sharded.device)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


# building


def sharded_decoder(
    vocab_size: int,
    attention: Callable[[int], nn.Module],
    feed_forwards: Mapping[str, Callable[[int], nn.Module] | None],
    sizes: Mapping[str, Any],
    mesh: DeviceMesh,
    device: torch.device,
) -> DecoderLM:
    """A decoder with the weights that `DecoderLM` would draw in one process, of which each process keeps its part.

    Blocks are on the meta device until they are sharded. Attention modules and feed-forward layers are drawn one by
    one, so that, apart from embedding and output weights, no process ever holds more than one of them.

    Args:
        vocab_size: number of token ids.
        attention: makes an attention module.
        feed_forwards: the makers of feed-forward layers that `DecoderLM` takes, by name.
        sizes: other arguments of `DecoderLM`.
        mesh: one-dimensional, of the processes to shard over.
        device: of this process.
    """
    parts = _Parts(mesh, device)
    makers: dict[str, Any] = {
        name: None if maker is None else parts.watched(maker) for name, maker in feed_forwards.items()
    }
    with device:
        model = DecoderLM(vocab_size, parts.watched(attention), **makers, **sizes)
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    # Under autocast parameters are gathered in float32, since mechanisms keep some of them there on purpose.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The loss reads the output weights after the forward pass, so that the root's parameters stay gathered until then.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    parts.materialise()
    register_fsdp_forward_method(model, "hidden")
    return model


class _Parts:
    """Modules on the meta device that are drawn, one by one, when they are told to reset their parameters."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device
        self.drawn: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def watched(self, maker: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        """A maker of the same modules, which the decoder takes for the maker itself."""
        inner = maker if isinstance(maker, functools.partial) else functools.partial(maker)
        return functools.partial(self._make, inner.func, *inner.args, **inner.keywords)

    def _make(self, cls: Any, *arguments: Any, **options: Any) -> nn.Module:
        make: Callable[[], nn.Module] = functools.partial(cls, *arguments, **options)
        before = random_states()
        make()  # for the random numbers that it draws
        after = random_states()
        with torch.device("meta"):
            module = make()
        set_random_states(after)

        def reset_parameters(**stds: float) -> None:
            now = random_states()
            set_random_states(before)
            real: Any = make()
            set_random_states(now)
            real.reset_parameters(**stds)
            self.drawn.append((module, dict(self._own_parts(real))))

        module.reset_parameters = reset_parameters  # type: ignore[assignment]
        return module

    def _own_parts(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in module.named_parameters():
            whole = parameter.detach()
            own = distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None).to_local()
            yield name, own.clone() if own.numel() else own
        yield from module.named_buffers()

    def materialise(self) -> None:
        """Give the modules their weights, of which `fully_shard` has left each process a part."""
        for module, own in self.drawn:
            del module.reset_parameters
            module.to_empty(device=self.device)
            with torch.no_grad():
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    local.copy_(own.pop(name))
        self.drawn.clear()
