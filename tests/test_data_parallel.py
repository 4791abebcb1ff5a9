"""Routers balance over the batch of all processes: two processes equal one, in loss and in gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import attnzoo
from attnzoo_recipes.feed_forward import MultiHeadMixtureOfExperts

processes = torch.multiprocessing.get_context("fork")
ROWS, T, E = 4, 12, 32

ROUTED = {
    "moh": lambda: attnzoo.MixtureOfHeadAttention(E, 8, aux_loss_coef=0.5),
    "moh by query norm": lambda: attnzoo.MixtureOfHeadAttention(E, 8, aux_loss_coef=0.5, router="query_norm"),
    **{
        f"moa with {kind}": lambda kind=kind: attnzoo.MixtureOfAttentionHeads(
            E, num_experts=6, num_experts_per_tok=2, head_dim=8, aux_loss=kind, **COEFFICIENTS[kind]
        )
        for kind in ("switch_z", "mi", "cv")
    },
    "mh_moe": lambda: MultiHeadMixtureOfExperts(E, num_experts=6, hidden_dim=16, aux_loss_coef=0.5),
}
COEFFICIENTS = {
    "switch_z": {"switch_coef": 0.5, "z_coef": 0.5},
    "mi": {"mi_coef": 0.5},
    "cv": {"cv_coef": 0.5},
}


def module(name):
    torch.manual_seed(0)
    return ROUTED[name]().double()


def batch():
    """Rows of very different tokens and lengths, so that the halves of the batch route differently."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, T, E, generator=generator, dtype=torch.float64)
    return x + 3 * torch.randn(ROWS, 1, E, generator=generator, dtype=torch.float64), torch.tensor([12, 3, 7, 5])


def losses(attn, rows):
    """Auxiliary loss, its gradients by name, and the statistics, of some rows of the batch."""
    x, lengths = batch()
    is_attention = not isinstance(attn, MultiHeadMixtureOfExperts)
    real = torch.arange(T) < lengths[rows, None]
    attn(x[rows], mask=attnzoo.AttentionMask.padding(lengths[rows]) if is_attention else real)
    attn.aux_loss.backward()
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in attn.named_parameters()}
    return {"loss": attn.aux_loss.detach(), "load": attn.routing.load, "entropy": attn.routing.entropy, **gradients}


def run(rank, folder, name, synced):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    attn = module(name)
    if synced:
        attnzoo.sync_aux_loss(attn)
        assert copy.deepcopy(attn).aux_loss_group is None
    found = losses(attn, slice(2 * rank, 2 * rank + 2))
    for key, value in found.items():
        dist.all_reduce(value)
        found[key] = value / 2
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def on_two(folder, name, synced):
    """Averages over two processes, each with one half of the batch."""
    started = [processes.Process(target=run, args=(rank, folder, name, synced)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", ROUTED)
def test_two_processes_balance_as_one(name, tmp_path):
    expected = losses(module(name), slice(None))
    for key, value in on_two(tmp_path, name, synced=True).items():
        torch.testing.assert_close(
            value, expected[key], atol=1e-12, rtol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_without_it_each_process_balances_its_own_part(tmp_path):
    expected = losses(module("moh"), slice(None))["loss"]
    assert abs(on_two(tmp_path, "moh", synced=False)["loss"] - expected) > 1e-3


def test_it_needs_processes():
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed to be initialized"):
        attnzoo.sync_aux_loss(module("moh"))
