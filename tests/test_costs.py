"""The cost model: sums of its parts, and the published systems view of decoding."""

import itertools

import pytest
import torch

import attnzoo
from attnzoo.costs import DEVICES, Device
from attnzoo.masks import Visibility
from attnzoo.modules.heads import attention_pairs
from tests.zoo import names

BF16 = torch.bfloat16


def deepseek():
    """DeepSeek-V3's layer, and one of multi-head attention with the same heads, without memory."""
    with torch.device("meta"):
        mla = attnzoo.MultiHeadLatentAttention(
            7168, 128, 512, 1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )
        mha = attnzoo.MultiHeadAttention(7168, 128, 192, v_head_dim=128, bias=False)
    return mla, mha


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_that_see_each_other(causal):
    for queries, keys, window, sinks in itertools.product((1, 4, 6), (6, 9), (None, 1, 2, 7), (0, 1, 4, 20)):
        if window is not None or not sinks:
            view = Visibility(causal, window, sinks)
            visible = view.dense((1, 1, queries, keys), torch.device("cpu"))
            expected = queries * keys if visible is None else int(visible.expand(1, 1, queries, keys).sum())
            counted = attention_pairs(queries, keys, causal=causal, window=window, sink_tokens=sinks)
            assert counted == expected, (queries, keys, window, sinks)


def test_absorbed_decoding_has_two_hundred_times_the_intensity_of_multi_head_attention():
    mla, mha = deepseek()
    latent = attnzoo.cost(mla, 1, 1, past=32_768, device="H100")
    full = attnzoo.cost(mha, 1, 1, past=32_768, device="H100")
    # 2 H (2 R + dr) FLOPs over 2 (R + dr) bytes a token: 1.9 H.
    assert latent.attention_intensity == pytest.approx(128 * (2 * 512 + 64) / (512 + 64), rel=1e-3)
    assert full.attention_intensity == pytest.approx(1.0, rel=1e-3)
    assert latent.cache_bytes == 32_769 * 1152
    assert full.cache_bytes / latent.cache_bytes == pytest.approx(128 * 320 / 576)
    assert full.bound == "memory"
    assert full.seconds > 9 * latent.seconds  # the weights are read too
    # The cache of a whole batch against the peak: the latent form is bound by arithmetic, the other by memory.
    assert attnzoo.cost(mla, 256, 1, past=32_768, device="H100").bound == "memory"
    assert attnzoo.cost(mla, 256, 2, past=32_768, device="H100").bound == "compute"
    assert attnzoo.cost(mha, 256, 2, past=32_768, device="H100").bound == "memory"


def test_groups_share_what_is_read():
    with torch.device("meta"):
        layers = [attnzoo.GroupedQueryAttention(4096, 32, groups) for groups in (32, 8, 1)]
    found = [attnzoo.cost(layer, 4, 1, past=8191) for layer in layers]
    assert [c.attention_intensity for c in found] == [1.0, 4.0, 32.0]
    assert [c.cache_bytes for c in found] == [4 * 8192 * 2 * groups * 128 * 2 for groups in (32, 8, 1)]


def test_prefill_is_bound_by_arithmetic_and_counts_the_keys_that_are_seen():
    with torch.device("meta"):
        layer = attnzoo.GroupedQueryAttention(4096, 32, 8)
    found = attnzoo.cost(layer, 2, 4096, device="H200")
    pairs = 4096 * 4097 // 2
    assert found.flops == {"projections": 2 * 2 * 4096 * 4096 * 2 * (4096 + 1024), "attention": 2 * 4 * 4096 * pairs}
    assert found.forward_flops == sum(found.flops.values())
    assert found.backward_flops == 2 * found.forward_flops
    assert found.bound == "compute"
    assert found.seconds == found.forward_flops / 989e12
    assert found.parameters == sum(p.numel() for p in layer.parameters())
    moved = found.parameters * 2 + 2 * 2 * 4096 * 4096 * 2 + 2 * found.cache_bytes
    assert found.bytes_moved == moved
    assert found.intensity == found.forward_flops / moved


def test_a_window_bounds_the_cache():
    layer = attnzoo.GroupedQueryAttention(64, 4, 2, sliding_window=100, sink_tokens=4)
    assert attnzoo.cost(layer, 1, 1, past=10_000).cache_bytes == 104 * layer.cache_bytes_per_token(BF16)
    assert layer.init_cache(1, 20_000, dtype=BF16).nbytes == 104 * layer.cache_bytes_per_token(BF16)


@pytest.mark.parametrize("name", names())
def test_every_mechanism_has_a_cost(name):
    from tests.zoo import MECHANISMS

    module = MECHANISMS[name]()
    prefill, step = attnzoo.cost(module, 2, 64, device="A100"), attnzoo.cost(module, 2, 1, past=63, device="A100")
    assert 0 < step.forward_flops < prefill.forward_flops
    assert step.cache_bytes == prefill.cache_bytes > 0
    assert 0 < step.seconds <= prefill.seconds


def test_own_peak_numbers():
    layer = attnzoo.MultiHeadAttention(64, 4)
    slow = Device({BF16: 1.0}, 1e30)
    found = attnzoo.cost(layer, 1, 8, device=slow)
    assert (found.seconds, found.bound) == (found.forward_flops, "compute")
    assert set(DEVICES) == {"A100", "H100", "H200"}
    assert attnzoo.cost(layer, 1, 8).seconds is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seq": 0}, "seq must be at least 1, got 0"),
        ({"past": -1}, "past must be at least 0, got -1"),
        ({"batch": 1.5}, "batch must be an integer, got 1.5"),
        ({"batch": True}, "batch must be an integer, got True"),
        ({"seq": "2"}, "seq must be an integer, got '2'"),
        ({"dtype": "bfloat16"}, "dtype must be one of .*, got 'bfloat16'"),
        ({"form": "nonsense"}, "form must be one of 'auto', .*got 'nonsense'"),
        ({"mesh": {"tensor": 0}}, r"mesh\['tensor'\] must be at least 1, got 0"),
        ({"mesh": {"sequence": -2}}, r"mesh\['sequence'\] must be at least 1, got -2"),
        ({"mesh": [2]}, r"mesh must be a mapping of 'sequence' and 'tensor' to ranks, got \[2\]"),
        ({"mesh": {0: 2}}, "mesh must name 'sequence' and 'tensor' ranks, got 0"),
        ({"device": "TPU"}, "device must be one of A100, H100, H200 or a Device, got 'TPU'"),
        ({"device": "H100", "dtype": torch.float64}, "dtype must be one that the device's peaks name, got .*float64"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.cost(attnzoo.MultiHeadAttention(64, 4), **({"batch": 1, "seq": 1} | call))


def test_a_module_that_is_not_causal_has_no_past():
    layer = attnzoo.MultiHeadAttention(64, 4, causal=False)
    assert attnzoo.cost(layer, 1, 8).forward_flops > 0
    with pytest.raises(ValueError, match="past must be 0 for a module with causal=False, which has no cache, got 4"):
        attnzoo.cost(layer, 1, 8, past=4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((-1,), "T must not be negative, got -1"),
        ((2.0,), "T must be an integer, got 2.0"),
        (("2",), "T must be an integer, got '2'"),
        ((2, -1), "S must not be negative, got -1"),
        ((5, 3), "S must be at least T, whose keys are among the S, got 3 and 5"),
    ],
)
def test_tokens_that_no_call_has_are_not_counted(tokens, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.MultiHeadAttention(64, 4).flops(*tokens)
    assert attnzoo.MultiHeadAttention(64, 4, causal=False).flops(5, 3) > 0


def test_a_layer_that_is_no_mechanism_is_refused():
    with pytest.raises(ValueError, match="module must be an attention mechanism, got Linear"):
        attnzoo.cost(torch.nn.Linear(3, 3), 1, 1)
    with pytest.raises(ValueError, match="module must be an attention mechanism, got type"):
        attnzoo.cost(attnzoo.MultiHeadAttention, 1, 1)


def test_a_mesh_gives_the_cost_of_one_of_its_ranks():
    with torch.device("meta"):
        attn = attnzoo.GroupedQueryAttention(4096, 32, 8)
        latent, _ = deepseek()
    whole, part = attnzoo.cost(attn, 2, 4096), attnzoo.cost(attn, 2, 4096, mesh={"sequence": 4, "tensor": 2})
    assert part.forward_flops * 8 == whole.forward_flops
    assert part.cache_bytes * 8 == whole.cache_bytes
    assert part.parameters * 2 == whole.parameters
    assert attn.num_heads == 32
    # Heads: 3/16 T (H D + H Dv + G (D + Dv)) b with the heads of a tensor rank; and an all-reduce of a quarter of y.
    exchanged = 2 * 3 * 4096 * (16 * 128 * 2 + 4 * 256) * 2 // 16
    reduced = 2 * 2 * 1 * 1024 * 4096 * 2 // 2
    assert part.bytes_sent == exchanged + reduced
    assert part.bytes_sent_backward == exchanged + 3 * reduced
    assert whole.bytes_sent == 0
    # The latent is whole on every tensor rank.
    one, two = attnzoo.cost(latent, 1, 4096), attnzoo.cost(latent, 1, 4096, mesh={"tensor": 2})
    assert two.cache_bytes == one.cache_bytes
    assert one.parameters / 2 < two.parameters < one.parameters
    # Dynamic weights go with their composition groups, and the module keeps its own.
    groups = attnzoo.DynamicallyComposableAttention(64, 8, head_groups=4)
    assert attnzoo.cost(groups, 1, 16, mesh={"tensor": 2}).parameters * 2 == attnzoo.cost(groups, 1, 16).parameters
    assert groups.head_groups == groups.q_dyn.sizes[0] == 4


@pytest.mark.parametrize(
    ("make", "mesh", "message"),
    [
        (lambda: attnzoo.TalkingHeadsAttention(64, 4), {"tensor": 2}, "has no tensor-parallel plan"),
        (lambda: attnzoo.GroupedQueryAttention(64, 4), {"tensor": 3}, "cannot be split over 3 ranks"),
        (lambda: attnzoo.RelativeConvAttention(64, 4), {"sequence": 2}, "cannot run on a sharded sequence"),
        (lambda: attnzoo.GroupedQueryAttention(64, 4), {"sequence": 3}, "seq must be a multiple"),
        (lambda: attnzoo.GroupedQueryAttention(64, 4), {"pipeline": 3}, "mesh must name"),
    ],
)
def test_meshes_that_a_mechanism_cannot_be_spread_over(make, mesh, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.cost(make(), 1, 64, mesh=mesh)
