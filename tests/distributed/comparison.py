"""Mechanisms on shards beside the same on one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import attnzoo
from attnzoo.distributed import SequenceParallel, shard, unshard
from tests.zoo import MECHANISMS, build

E = 32
EXACT = 1e-12

ALL, MIXED, GATHER, STATE = {"heads", "ring", "gather"}, {"ring", "gather"}, {"gather"}, {"state"}
# What each mechanism can do; one that is not here refuses every form.
FORMS: dict[str, set[str]] = {
    **dict.fromkeys(("mha", "mqa", "gqa", "gta", "kha", "kha-linear", "kha-gta", "mhe", "mhe-add"), ALL),
    **dict.fromkeys(("mla", "mla-pre", "kha-mla", "moh", "moh-few", "moh-norm", "moa", "mae-token"), ALL),
    **dict.fromkeys(("gated", "gated-value", "gated-key", "gated-dense", "complexformer", "dcmha-folded"), ALL),
    **dict.fromkeys(("dcmha", "talking-heads"), MIXED),
    **dict.fromkeys(("eit", "eit-efficient", "mgk", "mgk-hard", "smha", "diff", "diff-v2"), GATHER),
    **dict.fromkeys(("tpa", "tpa-kv", "sigmoid", "sigmoid-learned", "forgetting", "forgetting-fixed"), GATHER),
    **dict.fromkeys(("linear", "linear-lm", "mhla", "mhla-heads"), STATE),
}
LAYOUTS = ("zigzag", "contiguous", "striped")
MADE: dict[str, Any] = {
    "dcmha by groups": lambda **options: attnzoo.DynamicallyComposableAttention(
        E, 8, 4, head_groups=4, static_base=True, chunk_size=5, **options
    ),
    "talking heads of three numbers": lambda **options: attnzoo.TalkingHeadsAttention(
        E, 4, num_qk_heads=2, num_v_heads=8, **options
    ),
    "mhla": lambda **options: attnzoo.MultiHeadLinearAttention(E, 4, 2, block_size=5, num_blocks=16, **options),
    "mhla-heads": lambda **options: MECHANISMS["mhla-heads"](**options),
    "mla with biases": lambda **options: attnzoo.MultiHeadLatentAttention(
        E, 4, 20, num_kv_heads=2, rope_kv_heads=2, kv_b_bias=True, **options
    ),
    "pruned": lambda **options: pruned(attnzoo.GroupedQueryAttention(E, 8, 4, **options), (0, 1, 3, 6)),
    "pruned mla": lambda **options: pruned(
        attnzoo.MultiHeadLatentAttention(E, 8, 20, num_kv_heads=4, **options), (0, 3)
    ),
    "pruned dcmha": lambda **options: pruned(attnzoo.DynamicallyComposableAttention(E, 4, 2, **options), (2,)),
}


def pruned(module: Any, heads: tuple[int, ...]) -> Any:
    module.prune_heads(heads)
    return module


def made(name: str, **options: Any) -> Any:
    """A mechanism of the zoo or of `MADE`, the same on all ranks, in float64 and off its start."""
    torch.manual_seed(5)
    if name not in MADE:
        return build(name, **options)
    module = MADE[name](**options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """The whole x and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, batch, tokens, E, generator=generator, dtype=torch.float64)
    return x, w


def results(module: nn.Module, x: Tensor, w: Tensor, **call: Any) -> dict[str, Tensor]:
    """Output, and the gradients of (y w).sum() for x and every parameter."""
    x = x.clone().requires_grad_()
    y = module(x, **call)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * w).sum(), [x, *named.values()], allow_unused=True)
    zeros = [x, *named.values()]
    full = [torch.zeros_like(z) if g is None else g for z, g in zip(zeros, grads, strict=True)]
    return {"y": y.detach(), "x": full[0], **dict(zip(named, full[1:], strict=True))}


def sharded_results(module: Any, sp: SequenceParallel, x: Tensor, w: Tensor, **call: Any) -> dict[str, Tensor]:
    """The same from shards: outputs side by side, gradients summed over the ranks."""
    found = results(module, shard(x, 1, sp), shard(w, 1, sp), **call)
    for name, value in found.items():
        if name in ("y", "x"):
            found[name] = unshard(value, 1, sp)
        else:
            dist.all_reduce(value)
    return found


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], about: object, tolerance: float = EXACT
) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1.0) if value.numel() else 1.0
        error = float((found[name] - value).abs().max()) / scale if value.numel() else 0.0
        assert error <= tolerance, f"{about}, {name}: {error:.1e}"


def group_of(form: str) -> Any:
    """All ranks; for the hybrid form two rings of two, and pairs that share heads."""
    if form != "hybrid":
        return dist.group.WORLD
    if "pair" not in GROUPS:
        mine = dist.get_rank()
        for kind, members in (("heads", ((0, 1), (2, 3))), ("ring", ((0, 2), (1, 3)))):
            for ranks in members:
                group = dist.new_group(list(ranks))
                if mine in ranks:
                    GROUPS[kind] = group
        GROUPS["pair"] = (GROUPS["ring"], GROUPS["heads"])
    return GROUPS["pair"]


GROUPS: dict[str, Any] = {}


def tokens_for(name: str, prime: int = 7) -> int:
    """T = 2 P times a prime; of block mechanisms a multiple of their blocks in every layout."""
    return 2 * dist.get_world_size() * (20 if name == "mhla" and name not in MADE else 10 if "mhla" in name else prime)
