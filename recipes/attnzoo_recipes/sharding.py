"""Training that is spread over processes under Lightning: parameters (FSDP2), heads (tensor) and tokens (context)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from attnzoo.distributed import SequenceParallel, parallelize
from attnzoo.distributed.sequence import attention_layers
from attnzoo_recipes import sharded_checkpoints
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, instead_of, load_file, newest_valid
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.random_states import random_states, set_random_states


class ShardedStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` whose default is to shard over all processes, and whose checkpoints survive kill -9.

    `--trainer.strategy ModelParallelStrategy` is this one. Processes are a mesh of data x sequence x tensor, the last
    of which are neighbours. Parameters are sharded over data and sequence.

    Args:
        data_parallel_size: processes that batches are divided over. Default: all that the other two leave.
        tensor_parallel_size: processes that heads and hidden units are split over.
        sequence_parallel_size: processes that the tokens of every sequence are spread over.
        sequence_form: how attention reaches them; one of `attnzoo.distributed.SequenceParallel`, but "hybrid".
        process_group_backend: as in Lightning; gloo on CPU and nccl on GPUs by default.
        timeout: after which a process gives up waiting for another one.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        sequence_parallel_size: int = 1,
        sequence_form: Literal["auto", "gather", "heads", "ring", "state"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        self.tensor_parallel_size = 1 if tensor_parallel_size == "auto" else tensor_parallel_size
        self.sequence_parallel_size = sequence_parallel_size
        self.sequence_form = sequence_form
        sizes = {
            "data": 1 if data_parallel_size == "auto" else data_parallel_size,
            "tensor": self.tensor_parallel_size, "sequence": sequence_parallel_size,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"trainer.strategy's {name}_parallel_size must be at least 1, got {size}")
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size * sequence_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._shard_mesh: DeviceMesh | None = None
        self._source: Path | None = None

    @classmethod
    def of(cls, strategy: ModelParallelStrategy) -> ShardedStrategy:
        """The same settings as those of Lightning's strategy."""
        if isinstance(strategy, ShardedStrategy):
            return strategy
        return cls(
            strategy._data_parallel_size,
            strategy._tensor_parallel_size,
            process_group_backend=strategy._process_group_backend,
            timeout=strategy._timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimiser states of a checkpoint, once it has compared the models."""
        return True

    def mesh_shape(self) -> tuple[int, int, int]:
        """Processes of data, sequence and tensor parallelism.

        Raises:
            ValueError: if their product is not the number of processes.
        """
        processes = self.num_nodes * self.num_processes
        sequence, tensor = self.sequence_parallel_size, self.tensor_parallel_size
        given = self._data_parallel_size
        data = max(1, processes // (sequence * tensor)) if given == "auto" else int(given)
        if data * sequence * tensor != processes:
            raise ValueError(
                "trainer.strategy's data_parallel_size x sequence_parallel_size x tensor_parallel_size must be the "
                f"number of devices {processes}, got {data} x {sequence} x {tensor}"
            )
        return data, sequence, tensor

    def setup_environment(self) -> None:
        """Start the processes, and lay them out as a mesh."""
        data, sequence, tensor = self.mesh_shape()
        self._data_parallel_size = data
        super().setup_environment()
        assert self.lightning_module is not None
        kind = self.root_device.type
        names = ("data_parallel", "sequence_parallel", "tensor_parallel")
        self._device_mesh = init_device_mesh(kind, (data, sequence, tensor), mesh_dim_names=names)
        self.lightning_module._device_mesh = self._device_mesh
        # Of groups of its own: a ring must not meet the messages of FSDP2.
        self._shard_mesh = init_device_mesh(kind, (data * sequence, tensor), mesh_dim_names=("shards", names[2]))

    def decoder(
        self,
        vocab_size: int,
        attention: Callable[[int], nn.Module],
        feed_forwards: Mapping[str, Callable[[int], nn.Module] | None],
        sizes: Mapping[str, Any],
    ) -> tuple[DecoderLM, SequenceParallel | None]:
        """The decoder of `sharded_decoder`, and how sequences are spread over processes, if they are.

        Raises:
            ValueError: in one sentence, if the mechanism cannot be split or spread in this way.
        """
        assert self._shard_mesh is not None
        tensor = self._shard_mesh["tensor_parallel"] if self.tensor_parallel_size > 1 else None
        mesh, device = self._shard_mesh["shards"], self.root_device
        model = sharded_decoder(vocab_size, attention, feed_forwards, sizes, mesh, device, tensor)
        if self.sequence_parallel_size == 1:
            return model, None
        for block in model.layers:
            if not hasattr(block.attn, "sequence_forms"):
                name = type(block.attn).__name__
                raise ValueError(f"attention must name its sequence_forms to run on a sharded sequence, got {name}")
        sp = SequenceParallel(self.device_mesh["sequence_parallel"], self.sequence_form).resolved(model)
        return parallelize(model, sp), sp

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
                own[name].copy_(laid_like(own[name], value))

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
            return (
                laid_like(parameter, value) if self._source is None else torch.empty_like(parameter, dtype=value.dtype)
            )
        return value if self._source is None else torch.empty(value.shape, dtype=value.dtype)


StrategyRegistry.register(  # Lightning looks names up in lower case
    "modelparallelstrategy", ShardedStrategy, "FSDP2 over all processes, with checkpoints that survive kill -9"
)


def laid_like(sharded: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a tensor that all have."""
    if not isinstance(sharded, DTensor) or isinstance(whole, DTensor):
        return whole
    made = torch.empty_like(sharded, dtype=whole.dtype)
    assert isinstance(made, DTensor)
    made.to_local().copy_(_own_part(whole, sharded))
    return made


def _own_part(whole: Tensor, sharded: Tensor) -> Tensor:
    """What this process has of a tensor that is laid out like another one.

    FSDP2 splits what tensor parallelism has left, so the last dimension of a mesh is the first to split.
    """
    if isinstance(sharded, DTensor):
        mesh = sharded.device_mesh
        for i, placement in reversed(list(enumerate(sharded.placements))):
            if (dim := getattr(placement, "dim", None)) is not None:
                whole = _part(whole, dim, mesh.size(i), mesh.get_local_rank(i))
    return whole


def _part(tensor: Tensor, dim: int, parts: int, number: int) -> Tensor:
    """One of the parts in which DTensor and FSDP2 split a tensor; the last ones may be empty."""
    made = tensor.chunk(parts, dim)
    return made[number] if number < len(made) else tensor.narrow(dim, 0, 0)


# building


def sharded_decoder(
    vocab_size: int,
    attention: Callable[[int], nn.Module],
    feed_forwards: Mapping[str, Callable[[int], nn.Module] | None],
    sizes: Mapping[str, Any],
    mesh: DeviceMesh,
    device: torch.device,
    tensor: DeviceMesh | None = None,
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
        tensor: one-dimensional, of the processes that heads and hidden units are split over, if they are.

    Raises:
        ValueError: in one sentence, if they cannot be.
    """
    parts = _Parts(mesh, device, tensor)
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

    def __init__(self, mesh: DeviceMesh, device: torch.device, tensor: DeviceMesh | None) -> None:
        self.mesh = mesh
        self.device = device
        self.tensor = tensor
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
        if self.tensor is not None:
            parallelize_module(module, self.tensor, _plan(module))

        def reset_parameters(**stds: float) -> None:
            now = random_states()
            set_random_states(before)
            real: Any = make()
            set_random_states(now)
            real.reset_parameters(**stds)
            self.drawn.append((module, dict(self._own_parts(real, module))))
            del real
            _return_memory()

        module.reset_parameters = reset_parameters  # type: ignore[assignment]
        return module

    def _own_parts(self, module: nn.Module, split: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Of a module's tensors; `split` is the same module, whose heads are split but nothing is sharded yet."""
        for name, parameter in module.named_parameters():
            own = _own_part(parameter.detach(), split.get_parameter(name))
            yield name, _part(own, 0, self.mesh.size(), self.mesh.get_local_rank()).clone()
        yield from module.named_buffers()

    def materialise(self) -> None:
        """Give the modules their weights, of which `fully_shard` has left each process a part."""
        while self.drawn:
            module, own = self.drawn.pop()
            del module.reset_parameters
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                place, _, last = name.rpartition(".")
                owner, values = module.get_submodule(place), own.pop(name)
                if isinstance(tensor, DTensor):
                    values = DTensor.from_local(
                        values, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
                    )
                if isinstance(tensor, nn.Parameter):
                    owner.register_parameter(last, nn.Parameter(values, requires_grad=tensor.requires_grad))
                else:
                    owner.register_buffer(last, values, persistent=last not in owner._non_persistent_buffers_set)


def _return_memory() -> None:
    """Give what was freed back to the system, where the C library can: it would stay between what is kept."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _plan(module: Any) -> dict[str, Any]:
    """The tensor-parallel plan of a mechanism or a feed-forward layer; one of the latter may be whole everywhere."""
    plan: Callable[[], dict[str, Any]] | None = getattr(module, "tensor_parallel_plan", None)
    if plan is not None:
        return plan()
    if hasattr(module, "init_cache"):
        raise ValueError(f"attention must have a tensor_parallel_plan to be split, got {type(module).__name__}")
    return {}


# training


@contextlib.contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside the block attention takes what it gets for whole sequences, which all processes have."""
    spread = [(layer, layer.sequence_parallel) for layer in attention_layers(model)]
    for layer, _ in spread:
        layer.sequence_parallel = None
    try:
        yield
    finally:
        for layer, sp in spread:
            layer.sequence_parallel = sp


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """2-norm of all gradients; of split heads they are on a mesh of their own, which torch does not mix."""
    norms = [torch.nn.utils.get_total_norm(group) for group in _by_mesh(gradients).values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[Tensor], limit: float, by_value: bool) -> None:
    """Scale gradients so that their norm is at most the limit, or clamp each element."""
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(owner.grad for owner in owners if owner.grad is not None)
    for group in _by_mesh(owners).values():
        if by_value:
            torch.nn.utils.clip_grad_value_(group, limit)
        else:
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)


def _by_mesh(tensors: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return groups
