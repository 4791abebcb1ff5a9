"""Conversions: the stated relation, and what has none. Agreement of `from_mha` is in modules/test_parity.py."""

from functools import partial

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import Rotary
from attnzoo.conversion import InputStatistics, from_mha, to_dcmha, to_gated, to_gqa, to_kha, to_moh, to_talking_heads
from tests.zoo import E, H, build


def test_submodules_need_no_import_of_their_own():
    assert attnzoo.conversion.to_gqa is to_gqa
    assert attnzoo.adapters.TorchMultiheadAttention.__name__ == "TorchMultiheadAttention"


def test_the_extra_key_and_value_of_torch_are_refused():
    with pytest.raises(ValueError, match="module must not have add_bias_kv=True"):
        from_mha(nn.MultiheadAttention(E, H, add_bias_kv=True))


def test_a_causal_copy_cannot_have_other_context_widths():
    with pytest.raises(ValueError, match="kdim and vdim need causal=False, got kdim=12"):
        from_mha(nn.MultiheadAttention(E, H, kdim=12), causal=True)


def test_options_of_the_result_can_be_named():
    attn = from_mha(nn.MultiheadAttention(E, H, dropout=0.1).eval(), backend="eager", sliding_window=4)
    assert (attn.backend, attn.sliding_window, attn.dropout, attn.training) == ("eager", 4, 0.1, False)


@pytest.mark.parametrize("mode", ["mean", "first"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_merging_equal_heads_changes_nothing(mode, groups):
    attn = build("mha", qk_norm=True, sink="learned", sliding_window=5)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            for parameter in getattr(attn, name).parameters():
                heads = parameter.unflatten(0, (groups, H // groups, E // H))
                heads.copy_(heads[:, :1].expand_as(heads).clone())
    merged, x = to_gqa(attn.eval(), groups, mode), torch.randn(2, 9, E).double()
    assert merged.num_kv_heads == groups
    assert not merged.training
    torch.testing.assert_close(merged(x), attn(x), atol=1e-12, rtol=0)


def test_a_group_becomes_its_mean_or_its_first_head():
    attn = build("mha")
    heads = attn.k_proj.weight.view(2, 2, E // H, E)
    assert torch.equal(to_gqa(attn, 2, "first").k_proj.weight.view(2, E // H, E), heads[:, 0])
    torch.testing.assert_close(to_gqa(attn, 2).k_proj.weight.view(2, E // H, E), heads.mean(1))
    before = attn.k_proj.weight.clone()
    to_gqa(attn, 1).k_proj.weight.data.zero_()
    assert torch.equal(attn.k_proj.weight, before)


def test_a_grouped_module_merges_further():
    attn = build("gqa", rope=None, alibi=True, logit_softcap=4.0)
    merged = to_gqa(attn, 1)
    assert merged.alibi_slopes == attn.alibi_slopes
    assert (merged.logit_softcap, merged.rope) == (4.0, None)
    assert merged(torch.randn(1, 3, E).double()).shape == (1, 3, E)


@pytest.mark.parametrize(
    ("make", "groups", "mode", "message"),
    [
        (lambda: build("mha"), 3, "mean", "num_kv_heads must divide the module's 4, got 3"),
        (lambda: build("mha"), 0, "mean", "num_kv_heads must divide the module's 4, got 0"),
        (
            lambda: build("mha"),
            2,
            "median",
            "mode must be one of 'mean', 'first', .*, got 'median'",
        ),
        (lambda: build("kha"), 1, "mean", "module must be multi-head or grouped-query attention, got "),
        (lambda: build("gta"), 1, "mean", "got GroupedTiedAttention"),
        (lambda: build("mha", qk_norm="joint"), 2, "mean", "module must not have qk_norm 'joint'"),
        (lambda: build("mha"), 2, "activations", "calib must be given with mode 'activations', got None"),
        (lambda: build("mha", qk_norm=True), 2, "activations", "module must not have qk_norm for mode 'activations'"),
    ],
)
def test_refusals_of_to_gqa(make, groups, mode, message):
    with pytest.raises(ValueError, match=message):
        to_gqa(make(), groups, mode)


def test_a_pruned_module_is_refused():
    attn = build("mha")
    attn.prune_heads([1])
    with pytest.raises(ValueError, match="module must not have pruned heads, got"):
        to_gqa(attn, 2)


ROTATIONS = {
    "half": Rotary(),
    "interleaved": Rotary(style="interleaved"),
    "partial": Rotary(dim=4),
    "scaled": Rotary(scaling={"rope_type": "linear", "factor": 2.0}),
    "none": None,
}


def related_heads(rope, bias):
    """A layer of two groups of two heads, equal up to a complex factor per pair and an invertible map of the rest."""
    attn = build("mha", rope=rope, bias=bias, logit_softcap=5.0)
    D, width, draw = E // H, attn.rope_dim, torch.Generator().manual_seed(2)

    def related(heads):
        """heads (2, D, n) with the second the first in other coordinates."""
        a, half = heads[0], width // 2
        u, v = (slice(0, width, 2), slice(1, width, 2)) if rope == ROTATIONS["interleaved"] else (
            slice(0, half), slice(half, width))  # fmt: skip
        factor = torch.randn(half, 2, generator=draw, dtype=torch.float64)
        rest = torch.randn(D - width, D - width, generator=draw, dtype=torch.float64)
        b = a.clone()
        b[u] = factor[:, :1] * a[u] - factor[:, 1:] * a[v]
        b[v] = factor[:, :1] * a[v] + factor[:, 1:] * a[u]
        b[width:] = rest @ a[width:]
        return b

    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
        for linear, change in ((attn.k_proj, related), (attn.v_proj, None)):
            matrix = torch.cat([linear.weight, (linear.bias if bias else torch.zeros(E).double())[:, None]], 1)
            heads = matrix.view(2, 2, D, E + 1)
            for group in heads:
                other = torch.randn(D, D, generator=draw, dtype=torch.float64)
                group[1] = change(group) if change else other @ group[0]
            linear.weight.copy_(matrix[:, :-1])
            if bias:
                linear.bias.copy_(matrix[:, -1])
    return attn.eval()


@pytest.mark.parametrize("rope", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["activations", "two-sided"])
def test_heads_in_other_coordinates_merge_exactly(rope, bias, mode):
    attn, x = related_heads(rope, bias), torch.randn(3, 11, E).double()
    for calib in (x, InputStatistics.of(7 * x)):
        torch.testing.assert_close(to_gqa(attn, 2, mode, calib=calib)(x), attn(x), atol=1e-8, rtol=0)
    mean = to_gqa(attn, 2, "mean")
    assert (mean(x) - attn(x)).abs().max() > 1e-3


def test_merging_by_activations_loses_less_than_the_mean():
    attn, x = build("mha").eval(), torch.randn(4, 16, E).double() @ torch.randn(E, E).double()
    error = {
        mode: (to_gqa(attn, 2, mode, **more)(x) - attn(x)).detach().norm()
        for mode, more in {"mean": {}, "first": {}, "activations": {"calib": x}, "two-sided": {"calib": x}}.items()
    }
    assert error["two-sided"] < 0.97 * error["activations"]
    assert error["activations"] < 0.9 * min(error["mean"], error["first"])


STARTS = {
    "kha": lambda attn: to_kha(attn, "mlp_qkv"),
    "moh": lambda attn: to_moh(attn, 1, H - 1),
    "dcmha": to_dcmha,
    "dcmha static": lambda attn: to_dcmha(attn, static_base=True, head_groups=2, rank=1),
    "talking heads": to_talking_heads,
    **{f"gated {gate}": partial(to_gated, gate=gate) for gate in ("output", "value", "key", "query", "dense")},
    "gated headwise": partial(to_gated, gate="value", gate_type="headwise", gate_bias=True),
}
SOURCES = {
    "mha": lambda **options: build("mha", **options),
    "gqa": lambda **options: build("gqa", **options),
    "mqa": lambda **options: build("mqa", **options),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("bias", [{}, {"bias": True}, {"bias": True, "o_bias": False}, {"bias": False, "o_bias": True}])
def test_exact_starts(start, source, bias):
    attn, x = SOURCES[source](**bias).eval(), torch.randn(2, 9, E).double()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    begun = STARTS[start](attn)
    assert type(begun) is not type(attn)
    assert not begun.training
    torch.testing.assert_close(begun(x), attn(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"sliding_window": 4}, {"qk_norm": True}, {"qk_norm": "joint"}, {"rope": None}])
def test_a_start_keeps_the_options_of_its_source(options):
    attn, x = build("gqa", **options).eval(), torch.randn(2, 9, E).double()
    if options != {"qk_norm": "joint"}:
        torch.testing.assert_close(to_dcmha(attn)(x), attn(x), atol=1e-10, rtol=0)
    for gate in ("output", "query"):
        torch.testing.assert_close(to_gated(attn, gate)(x), attn(x), atol=1e-10, rtol=0)
    if "qk_norm" not in options:
        torch.testing.assert_close(to_talking_heads(attn)(x), attn(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_one_half_rounds_nothing(dtype):
    attn, x = build("gqa", dtype=dtype, sink="learned", logit_softcap=4.0).eval(), torch.randn(2, 9, E, dtype=dtype)
    assert torch.equal(to_gated(attn)(x), attn(x))


def test_new_parameters_of_a_start_learn_at_once():
    x = torch.randn(2, 9, E).double()
    for start in (to_dcmha, to_talking_heads, to_gated):
        begun = start(build("gqa"))
        begun(x).square().sum().backward()
        flat = {name for name, p in begun.named_parameters() if p.grad is None or not p.grad.abs().sum()}
        assert flat == ({"q_dyn.w1.weight", "k_dyn.w1.weight"} if start is to_dcmha else set())


@pytest.mark.parametrize("start", [to_dcmha, to_talking_heads, lambda attn: to_moh(attn, 2, 2)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_softcap": 3.0}, "module must not have logit_softcap: .* does not take it"),
        ({"alibi": True, "rope": None}, "module must not have alibi"),
        ({"sink": "zero"}, "module must not have sink"),
        ({"scale": 0.5}, r"module must have the scale head_dim \*\* -0.5, got 0.5"),
    ],
)
def test_what_a_start_cannot_express_is_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(build("gqa", **options))


@pytest.mark.parametrize("start", [to_dcmha, to_talking_heads])
@pytest.mark.parametrize(
    ("option", "value"),
    [("rope", None), ("causal", False), ("sliding_window", 2), ("kdim", 3), ("bias", False), ("num_heads", 3)],
)
def test_a_start_has_no_other_options_than_its_source(start, option, value):
    attn = build("gqa", bias=True)
    with pytest.raises(ValueError, match=f"{option} must be that of module, .*, for an equal layer, got {value}"):
        start(attn, **{option: value})


@pytest.mark.parametrize("start", [to_dcmha, to_talking_heads])
def test_a_start_takes_the_options_of_its_source_and_those_without_effect(start):
    attn, x = build("gqa"), torch.randn(2, 9, E).double()
    begun = start(attn, rope=attn.rope, causal=True, bias=True, dropout=0.5, init_std=0.1).eval()
    torch.testing.assert_close(begun(x), attn.eval()(x), atol=1e-10, rtol=0)
    assert begun.dropout == 0.5
    assert begun.q_proj.bias is not None


def test_a_start_refuses_another_family_and_pruned_heads():
    pruned = build("gqa")
    pruned.prune_heads([1])
    for start in (to_dcmha, to_talking_heads, to_gated):
        with pytest.raises(ValueError, match="module must be multi-head or grouped-query attention, got GroupedTied"):
            start(build("gta"))
        with pytest.raises(ValueError, match="module must not have pruned heads"):
            start(pruned)
    with pytest.raises(ValueError, match="module must not have qk_norm 'joint'"):
        to_dcmha(build("gqa", qk_norm="joint"))
    with pytest.raises(ValueError, match="module must have v_head_dim equal to head_dim"):
        to_dcmha(build("gqa", v_head_dim=4))


def test_statistics_of_inputs_do_not_grow_and_leave_padding_out():
    x = torch.randn(3, 10, E)
    statistics = InputStatistics(E)
    size = sum(t.numel() for t in vars(statistics).values() if isinstance(t, torch.Tensor))
    real = torch.ones(3, 10, dtype=torch.bool)
    real[0, :4] = False
    statistics.update(x, real)
    statistics.update(x[:1, :4])
    assert statistics.tokens == 30
    assert sum(t.numel() for t in vars(statistics).values() if isinstance(t, torch.Tensor)) == size
    torch.testing.assert_close(statistics.moment, InputStatistics.of(x).moment)
    torch.testing.assert_close(statistics.moment[-1, :-1], x.double().mean((0, 1)))
    with pytest.raises(ValueError, match="calib must lead to finite inputs"):
        statistics.update(x * float("inf"))
    with pytest.raises(ValueError, match="calib must have width 32, got 31"):
        statistics.update(x[..., 1:])
    with pytest.raises(ValueError, match="calib must have at least one token, got none"):
        _ = InputStatistics(E).moment
    with pytest.raises(ValueError, match="calib must have width 32, got 16"):
        to_gqa(build("mha"), 2, "activations", calib=InputStatistics(16))
