"""Multi-head linear attention: stored figures, its forms, what it reduces to, images, refusals."""

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, LinearAttention, MultiHeadLinearAttention, Rotary
from attnzoo.modules.call import begin
from attnzoo.ops.linear_attention import slot_sums
from attnzoo.ops.mixing_matrix import clipped, extended, initial_mixing
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "mhla.safetensors"
E, H, G, C, M, T = 24, 4, 2, 4, 6, 19


@cache
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def golden(dtype, **options):
    tensors, config = stored()
    config = {**config, "rope": Rotary(theta=config["rope_theta"])} | options
    config.pop("rope_theta")
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = MultiHeadLinearAttention(*sizes, **config).to(dtype)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return attn


def make(dtype=torch.float64, **options):
    torch.manual_seed(5)
    blocks = {} if "grid" in options else {"block_size": C, "num_blocks": M}
    options = {"num_kv_heads": G} | blocks | options
    attn = MultiHeadLinearAttention(E, H, **options).to(dtype)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(batch=2, tokens=T):
    return torch.randn(batch, tokens, E, dtype=torch.float64)


def linear_of(attn, **options):
    """Linear attention with the same weights, features, gate and norm."""
    same = {"feature_map": attn.feature_map, "rope": attn.rope, "gate": attn.g_proj is not None, "scale": attn.scale}
    norm = {"output_norm": "rmsnorm", "norm_eps": attn.g_norm.eps} if attn.g_norm is not None else {}
    normal = attn.normalizer == "mixed"
    linear = LinearAttention(
        E, H, G, causal=attn.causal, normalize=normal, normalizer_eps=attn.normalizer_eps, dtype=torch.float64,
        **same, **norm, **options,
    )  # fmt: skip
    state = {k.replace("g_norm", "norm"): v for k, v in attn.state_dict().items() if k != "mixing_matrix"}
    linear.load_state_dict(state)
    return linear


VARIANTS = {
    "plain": {},
    "mixed": {"normalizer": "mixed", "feature_map": "elu", "output_norm": "none"},
    "heads": {"mixing_per_head": True},
    "heads, mixed": {"mixing_per_head": True, "normalizer": "mixed", "feature_map": "elu", "gate": False},
    "no clip, no rope": {"mixing_clip": None, "rope": None, "bias": True, "out_bias": False},
    "clamp": {"num_blocks": 3, "extrapolation": "clamp", "normalizer": "mixed", "feature_map": "elu"},
    "window": {"num_blocks": 2, "extrapolation": "window"},
    "qk norm": {"qk_norm": True, "feature_eps": 1e-3},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_stored_figures(backend):
    tensors, _ = stored()
    found = gradients(golden(torch.float64, backend=backend), tensors["input.x"], tensors["input.w"])
    assert (found["y"] - tensors["output.y"]).abs().max() < 1e-9
    for key, value in tensors.items():
        if key.startswith("grad."):
            assert (found[key.removeprefix("grad.")] - value).abs().max() < 1e-9, key
    unused = found["mixing_matrix"].clone()
    unused[:4, :4] = unused[:4, :4].triu(1)
    assert not unused.any(), "rows of blocks that do not occur, and the upper triangle"


def test_float32_is_within_ten_times_the_stored_difference():
    tensors, _ = stored()
    found = gradients(golden(torch.float32), tensors["input.x"].float(), tensors["input.w"].float())
    for name, expected in (("y", tensors["output.y"]), ("x", tensors["grad.x"])):
        error = (found[name].double() - expected).abs().max() / expected.abs().max()
        assert error < 10 * 4.6e-7


@every_variant
@pytest.mark.parametrize("tokens", [1, 4, 19])
def test_chunked_is_quadratic_with_every_gradient(variant, tokens):
    x, weight = sample(tokens=tokens), sample(tokens=tokens)
    found = gradients(make(**VARIANTS[variant]), x, weight)
    for key, value in gradients(make(backend="eager", **VARIANTS[variant]), x, weight).items():
        torch.testing.assert_close(found[key], value, atol=1e-10, rtol=1e-10)


@every_variant
@pytest.mark.parametrize("chunks", [[1] * T, [6, 1, 9, 3], [T]])
def test_decoding_is_the_full_forward(variant, chunks):
    attn, x = make(**VARIANTS[variant]), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=state) for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-10, rtol=1e-10)
    assert state.nbytes == 2 * attn.state_bytes(T, torch.float64)


@pytest.mark.parametrize("normalizer", ["none", "mixed"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_mixing_of_ones_is_linear_attention(normalizer, causal):
    attn, x = make(causal=causal, normalizer=normalizer), sample()
    with torch.no_grad():
        attn.mixing_matrix.fill_(1.0)
    torch.testing.assert_close(attn(x), linear_of(attn)(x), atol=1e-10, rtol=0)


def test_a_fresh_layer_is_linear_attention():
    sizes = {"block_size": C, "num_blocks": M}
    attn = MultiHeadLinearAttention(E, H, G, feature_map="elu", norm_eps=0.0, dtype=torch.float64, **sizes)
    x = sample()
    torch.testing.assert_close(attn(x), linear_of(attn)(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"norm_eps": 0.0}, {"normalizer": "mixed", "normalizer_eps": 0.0}])
def test_the_scale_of_a_row_means_nothing(options):
    attn, x = make(mixing_clip=None, feature_map="elu", **options), sample()
    expected = attn(x)
    with torch.no_grad():
        attn.mixing_matrix.mul_(torch.linspace(0.5, 2, M)[:, None])
    torch.testing.assert_close(attn(x), expected, atol=1e-9, rtol=0)


def test_the_identity_attends_within_blocks():
    attn, x = make(mixing_clip=None, rope=None), sample(tokens=2 * C)
    with torch.no_grad():
        attn.mixing_matrix.copy_(torch.eye(M))
    torch.testing.assert_close(attn(x)[:, C:], attn(x[:, C:]), atol=1e-11, rtol=0)


def test_one_block_is_linear_attention_times_a_number():
    attn, x = make(block_size=32, output_norm="none", gate=False), sample()
    with pytest.warns(UserWarning, match="trains badly"):
        linear = linear_of(attn)
    factor = attn.mixing(1, torch.float64)[0, 0]
    torch.testing.assert_close(attn(x), factor * linear(x), atol=1e-11, rtol=0)


def test_blocks_of_one_token_are_a_learned_mask():
    attn, x = make(block_size=1, num_blocks=T, output_norm="none", gate=False), sample(1)
    _, _, q, k, v = attn.features(x, begin(attn, x))
    k, v = (z[0].repeat_interleave(H // G, 1) for z in (k, v))
    weights = torch.einsum("thd,shd->hts", q[0], k) * attn.mixing(T, torch.float64)
    expected = attn.o_proj(torch.einsum("hts,shd->thd", weights, v).flatten(1))
    torch.testing.assert_close(attn(x)[0], expected, atol=1e-11, rtol=0)


def test_powers_of_a_number_are_a_decay_between_blocks():
    attn, x = make(mixing_clip=None, output_norm="none", gate=False, rope=None), sample(1, 3 * C)
    distance = torch.arange(M)[:, None] - torch.arange(M)
    with torch.no_grad():
        attn.mixing_matrix.copy_((0.5**distance).tril())
    q, k, _, _, v = attn.features(x, begin(attn, x))
    k, v = (z[0].repeat_interleave(H // G, 1) for z in (k, v))
    S, heads = torch.zeros(H, E // H, E // H).double(), []
    for t in range(3 * C):
        S = S * (0.5 if t and t % C == 0 else 1.0) + k[t][..., None] * v[t][:, None]
        heads.append(torch.einsum("hd,hdv->hv", q[0, t], S))
    torch.testing.assert_close(attn(x)[0], attn.o_proj(torch.stack(heads).flatten(1)), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("normalizer", "causal"), [("mixed", True), ("mixed", False), ("compat", False)])
def test_a_denominator_of_zero_gives_zero(normalizer, causal):
    module = make(normalizer=normalizer, causal=causal, normalizer_eps=0.0, feature_map="elu")
    x = torch.randn(2, M * C, E, dtype=torch.float64, requires_grad=True)
    y = module(x, mask=AttentionMask.padding([M * C, 0]))
    torch.testing.assert_close(y[0], module(x[:1])[0], atol=1e-12, rtol=0)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y[0].sum(), [x, *module.parameters()]))


def test_the_order_within_a_finished_block_means_nothing_later():
    attn, x = make(rope=None), sample(1)
    order = torch.arange(T)
    order[:C] = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attn(x[:, order])[:, C:], attn(x)[:, C:], atol=1e-11, rtol=0)


def test_rows_of_weights_sum_to_one_and_exceed_the_rank_of_features():
    attn = make(normalizer="mixed", normalizer_eps=0.0, output_norm="none", gate=False, head_dim=2, rope=None,
                feature_map="elu", mixing_clip=(1e-5, 9.0))  # fmt: skip
    with torch.no_grad():
        attn.v_proj.weight.zero_()
        attn.v_proj.bias = torch.nn.Parameter(torch.ones(G * attn.v_head_dim).double())
        x = sample()
        torch.testing.assert_close(attn(x), attn.o_proj.weight.sum(1).expand(2, T, E), atol=1e-11, rtol=0)
        q, k, *_ = attn.features(x, begin(attn, x))
        weights = torch.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0])
        at = torch.arange(T) // C
        mixed = (weights * attn.mixing(M, torch.float64)[at[:, None], at]).tril()
    assert int(torch.linalg.matrix_rank(mixed)) > 2


def test_an_entry_beyond_its_bounds_is_clipped_and_still_learns():
    value = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    out = clipped(value, (1e-5, 1.0))
    assert out.tolist() == torch.tensor([1e-5, 0.5, 1.0]).tolist()
    (grad,) = torch.autograd.grad((out * torch.tensor([1.0, 2.0, 3.0])).sum(), value)
    assert grad.tolist() == [1.0, 2.0, 3.0]
    attn = make()
    with torch.no_grad():
        attn.mixing_matrix.fill_(7.0)
    x = sample()
    y = attn(x)
    assert attn.mixing_matrix.max() == 7, "a forward changes no parameter"
    attn.project_parameters()
    assert attn.mixing_matrix.max() == 1
    torch.testing.assert_close(attn(x), y)


def test_starts():
    rows = initial_mixing("uniform", (4,), causal=True)
    assert rows[2].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    for kind in ("uniform", "linear", "cos", "exp", "local"):
        for causal in (True, False):
            start = initial_mixing(kind, (3, 3), causal=causal)
            torch.testing.assert_close(start.sum(1), torch.ones(9).double())
            assert (start >= 0).all()
        torch.testing.assert_close(
            initial_mixing(kind, (3, 3), causal=False, norm="col").sum(0), torch.ones(9).double()
        )
    assert (initial_mixing("linear", (6,), causal=True).tril() > 0).sum() == 21
    far = initial_mixing("linear", (4,), causal=False)
    assert far[0, 3] == 0
    assert initial_mixing("gaussian", (4,), causal=False)[1, 1] == 1
    local = initial_mixing("local", (3, 3), causal=False)
    assert (local[4] > 0).all()
    assert (local[0] > 0).sum() == 4
    fresh = MultiHeadLinearAttention(E, H, mixing_per_head=True, num_blocks=4)
    assert fresh.mixing_matrix.shape == (H, 4, 4)
    fresh.reset_parameters(std=1.0)
    torch.testing.assert_close(fresh.mixing_matrix[1].double(), rows)
    assert fresh.no_weight_decay() == {"mixing_matrix"}


def test_beyond_the_trained_blocks():
    m = torch.arange(1, 10).double().view(3, 3).tril()
    clamp, window = (extended(m, 5, rule).tril() for rule in ("clamp", "window"))
    assert clamp[4].tolist() == [7, 7, 7, 8, 9]
    assert window[4].tolist() == [0, 0, 7, 8, 9]
    assert clamp[2].tolist() == window[2].tolist() == [7, 8, 9, 0, 0]
    attn = make(num_blocks=2, extrapolation="clamp", norm_eps=0.0, feature_map="elu")
    with torch.no_grad():
        attn.mixing_matrix.fill_(0.5)
    x = sample()
    torch.testing.assert_close(attn(x), linear_of(attn)(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("options", [{}, {"normalizer": "mixed"}, {"normalizer": "compat", "lepe_kernel": 3},
                                     {"mixing_per_head": True, "lepe_kernel": 5, "qk_norm": True}])  # fmt: skip
def test_an_image_is_its_blocks_in_a_row(backend, options):
    """Regrouped by hand, the image goes through the one-dimensional form."""
    shared = {"causal": False, "rope": None, "num_kv_heads": H, "feature_map": "elu", "backend": backend}
    attn = make(grid=(4, 6), block_grid=(2, 3), **shared, **options)
    flat = make(block_size=6, num_blocks=4, **shared, **{k: v for k, v in options.items() if k != "lepe_kernel"})
    flat.load_state_dict({k: v for k, v in attn.state_dict().items() if not k.startswith("lepe")})
    x = sample(tokens=24)
    order = torch.arange(24).view(2, 2, 2, 3).transpose(1, 2).flatten()
    if "lepe_kernel" in options:
        with torch.no_grad():
            attn.lepe.weight.zero_()
            attn.lepe.bias.zero_()
    torch.testing.assert_close(attn(x)[:, order], flat(x[:, order]), atol=1e-10, rtol=0)


def test_compat_divides_by_the_sums_of_slots_and_adds_its_epsilon_to_them():
    options = {"causal": False, "feature_map": "elu", "mixing_clip": None, "rope": None, "output_norm": "none"}
    attn = make(normalizer="compat", normalizer_eps=0.3, gate=False, **options)
    plain = make(normalizer="none", gate=False, **options)
    plain.load_state_dict(attn.state_dict())
    attn.scale = plain.scale
    q, k = torch.rand(2, M * C, H, 6).double(), torch.rand(2, M * C, G, 6).double()
    with torch.no_grad():
        found = slot_sums(q, k, attn.mixing(M, q.dtype), size=C)
        for b, t, h in ((0, 0, 0), (1, 9, 3), (0, 23, 2), (1, 6, 1)):
            total = 0.0
            for j in range(M):
                z = k[b, j * C : (j + 1) * C, h // (H // G)].sum(0)
                total += attn.mixing_matrix[t // C, j] * (q[b, j * C + t % C, h] @ z)
            torch.testing.assert_close(found[b, t, h, 0], total, atol=1e-12, rtol=0)
        x, heads = sample(tokens=M * C), []
        for module in (attn, plain):
            module.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].unflatten(-1, (H, -1))))
            module(x)
        features = attn.features(x, begin(attn, x))
        below = slot_sums(*features[:2], attn.mixing(M, q.dtype), size=C) + 0.3
        torch.testing.assert_close(heads[0], heads[1] / below, atol=1e-12, rtol=0)


def test_a_grid_says_what_its_blocks_are():
    image = {"grid": (4, 6), "block_grid": (2, 3), "causal": False}
    for sizes in ({}, {"block_size": 6}, {"num_blocks": 4}, {"block_size": 6, "num_blocks": 4}):
        attn = MultiHeadLinearAttention(E, H, **image, **sizes)
        assert (attn.block_size, attn.num_blocks) == (6, 4)
    for sizes in ({"num_blocks": 32}, {"block_size": 64}, {"block_size": 6, "num_blocks": 5}):
        with pytest.raises(ValueError, match=r"block_size and num_blocks must be 6 and 4 with grid .*got"):
            MultiHeadLinearAttention(E, H, **image, **sizes)
    row = MultiHeadLinearAttention(E, H)
    assert (row.block_size, row.num_blocks) == (64, 32)


def test_local_values_are_a_convolution_over_the_image():
    attn = make(grid=(4, 6), block_grid=(2, 3), causal=False, rope=None, num_kv_heads=H, lepe_kernel=3,
                output_norm="none", gate=False)  # fmt: skip
    x = sample(1, 24)
    with_local = attn(x)
    local = attn.lepe(attn.v_proj(x)[0].T.view(1, E, 4, 6))[0].flatten(1).T
    with torch.no_grad():
        attn.lepe.weight.zero_()
        attn.lepe.bias.zero_()
    expected = attn(x)[0] + torch.nn.functional.linear(local, attn.o_proj.weight)
    torch.testing.assert_close(with_local[0], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_only_the_documents_of_a_row_have_to_fit_the_blocks(backend, causal):
    attn, x = make(backend=backend, causal=causal), sample(2, 40)
    ends = [0, 24, 31, 40, 63, 80]
    y = attn(x, mask=AttentionMask.packed(ends)).flatten(0, 1)
    for a, b in itertools.pairwise(ends):
        torch.testing.assert_close(attn(x.flatten(0, 1)[None, a:b])[0], y[a:b], atol=1e-12, rtol=0)


def test_padding_on_the_right_is_a_shorter_batch():
    for causal in (True, False):
        attn, x = make(causal=causal, normalizer="mixed", feature_map="elu"), sample()
        y = attn(x, mask=AttentionMask.padding([T, 7]))
        torch.testing.assert_close(y[1:, :7], attn(x[1:, :7]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "heads, mixed", "clamp"])
def test_derivatives(variant):
    attn = make(**VARIANTS[variant])
    with torch.no_grad():
        attn.mixing_matrix.copy_(torch.rand_like(attn.mixing_matrix) * 0.8 + 0.1)
    x = sample(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True)


@pytest.mark.parametrize("variant", ["plain", "mixed", "heads"])
def test_flops_are_those_that_are_counted(variant):
    attn = make(**VARIANTS[variant])
    with FlopCounterMode(display=False) as counter:
        attn(sample(1, 4 * C))
    # Sums over blocks are products with a matrix of one row, which the counter sees in part.
    assert attn.flops(4 * C) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_states_are_taken_back_block_by_block():
    attn, x = make(), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        attn(x[:, :11], cache=state)
        with pytest.raises(ValueError, match=r"length must be 11 or a multiple of the block_size 4: .*got 9"):
            state.truncate(9)
        state.truncate(8)
        torch.testing.assert_close(attn(x[:, 8:], cache=state), attn(x)[:, 8:], atol=1e-10, rtol=0)
        with pytest.raises(ValueError, match="cache is full"):
            attn(x[:, :1], cache=state)
    assert attn.cache_bytes_per_token() == 4 * G * 6 * 7 // C


@every_variant
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("cached", [0, 7, 8])
def test_a_call_that_fails_leaves_the_states_as_they_were(variant, tokens, cached):
    attn, x = make(**VARIANTS[variant]), sample()
    state = attn.init_cache(2, T)

    def fail(*_):
        raise RuntimeError("failed on purpose")

    with torch.no_grad():
        attn(x[:, :cached], cache=state)
        before = [buffer.clone() for buffer in state.buffers]
        hook = attn.o_proj.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="failed on purpose"):
            attn(x[:, cached : cached + tokens], cache=state)
        hook.remove()
        assert state.length == cached
        assert all(torch.equal(a, b) for a, b in zip(state.buffers, before, strict=True))
        y = attn(x[:, cached:], cache=state)
    torch.testing.assert_close(y, attn(x)[:, cached:], atol=1e-10, rtol=1e-10)


def test_a_compiled_step_serves_every_block():
    attn, x = make(**VARIANTS["mixed"]), sample()
    state, counter = attn.init_cache(2, T), CompileCounter()
    step = torch.compile(attn, backend=counter, fullgraph=True)
    with torch.no_grad():
        y = torch.cat([step(part, cache=state) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-10, rtol=1e-10)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("chunks", [[9, 1], [9, 5]])
def test_tokens_that_follow_states_have_their_own_gradients(chunks):
    attn, (old, new) = make(**VARIANTS["heads, mixed"]), sample(tokens=sum(chunks)).split(chunks, 1)
    state = attn.init_cache(2, T)
    with torch.no_grad():
        attn(old, cache=state)
    new.requires_grad_()
    y = attn(new, cache=state)
    state.reset()
    wanted = (new, attn.mixing_matrix)
    found = torch.autograd.grad(y.square().sum(), wanted)
    y = attn(torch.cat([old, new], 1))[:, chunks[0] :]
    for one, two in zip(found, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_states_of_other_blocks_are_refused():
    message = (
        "with no window, blocks of 3, and the module needs states of 2 x 6 x 6 and 2 x 6 with no window, blocks of 4"
    )
    with pytest.raises(ValueError, match=message):
        make()(sample(), cache=make(block_size=3).init_cache(2, 18))


def test_pruned_heads_are_heads_with_output_zero():
    for variant in ("plain", "heads"):
        for heads in ([1], [0, 1], [0, 3]):
            attn, x = make(**VARIANTS[variant]), sample()
            keep = torch.ones(H).double()
            keep[heads] = 0
            hook = attn.o_proj.register_forward_pre_hook(lambda _, i, k=keep: (i[0] * k.repeat_interleave(E // H),))
            expected = attn(x)
            hook.remove()
            attn.prune_heads(heads)
            torch.testing.assert_close(attn(x), expected, atol=1e-11, rtol=0)


def test_the_convolution_loses_the_channels_of_pruned_heads():
    attn = make(grid=(4, 6), block_grid=(2, 3), causal=False, rope=None, num_kv_heads=H, lepe_kernel=3)
    x, keep = sample(tokens=24), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    hook = attn.o_proj.register_forward_pre_hook(lambda _, i: (i[0] * keep.repeat_interleave(E // H),))
    expected = attn(x)
    hook.remove()
    attn.prune_heads([1])
    torch.testing.assert_close(attn(x), expected, atol=1e-11, rtol=0)
    attn.prune_heads([0, 2, 3])
    assert not attn(x).any()


def test_a_convolution_with_a_hook_is_called():
    attn = make(grid=(4, 6), block_grid=(2, 3), causal=False, rope=None, num_kv_heads=H, lepe_kernel=3)
    x = sample(tokens=24)
    expected = attn(x)
    hook = attn.lepe.register_forward_hook(lambda _, i, y: 2 * y)
    assert (attn(x) - expected).abs().max() > 1e-3
    hook.remove()
    hook = attn.lepe.register_forward_hook(lambda _, i, y: y)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"causal": False, "extrapolation": "clamp"}, "extrapolation must be 'error' with causal=False, got 'clamp'"),
        ({"extrapolation": "repeat"}, "extrapolation must be one of .*got 'repeat'"),
        ({"normalizer": "mixed", "feature_map": "identity"}, "normalizer needs features that cannot be negative"),
        ({"normalizer": "compat"}, "normalizer 'compat' needs causal=False"),
        ({"normalizer": "sum"}, "normalizer must be one of .*got 'sum'"),
        ({"grid": (4, 4), "block_grid": (2, 2)}, "grid and block_grid must be given together and with causal=False"),
        ({"grid": (4, 4), "causal": False}, "grid and block_grid must be given together"),
        (
            {"grid": (4, 5), "block_grid": (2, 2), "causal": False},
            r"block_grid must divide grid, got \(2, 2\) and \(4, 5\)",
        ),
        ({"lepe_kernel": 3}, "lepe_kernel must be odd, with a grid"),
        ({"lepe_kernel": 2, "grid": (4, 4), "block_grid": (2, 2), "causal": False}, "lepe_kernel must be odd, .*got 2"),
        ({"mixing_clip": (-1.0, 1.0)}, "mixing_clip must be two bounds with 0 <= low < high"),
        ({"mixing_clip": (1.0, 0.5)}, "mixing_clip must be two bounds"),
        ({"mixing_init": "random"}, "mixing_init must be one of .*got 'random'"),
        ({"mixing_norm": "both"}, "mixing_norm must be one of .*got 'both'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadLinearAttention(E, H, **options)


def test_calls_that_are_refused():
    attn, x = make(), sample(tokens=T)
    with pytest.raises(ValueError, match=r"at most num_blocks \* block_size = 6 \* 4 tokens with .*'error', got 25"):
        attn(sample(tokens=25))
    with pytest.raises(ValueError, match=r"at most num_blocks \* block_size = 6 \* 4 tokens .*got 25 in one document"):
        attn(sample(1, 30), mask=AttentionMask.packed([0, 5, 30]))
    late = AttentionMask(real_queries=torch.arange(T) >= torch.tensor([[0], [3]]))
    with pytest.raises(ValueError, match="mask must not begin with padding, since blocks are counted from the first"):
        attn(x, mask=late)
    with pytest.raises(ValueError, match=r"max_length must be at most .* = 24 .*got 25"):
        attn.init_cache(1, 25)
    with pytest.raises(ValueError, match="context must be None"):
        attn(x, x)
    with pytest.raises(ValueError, match="a mask of single pairs has no meaning"):
        attn(x, mask=torch.ones(T, T, dtype=torch.bool))
    image = make(grid=(4, 6), block_grid=(2, 3), causal=False, rope=None)
    with pytest.raises(ValueError, match="x must hold the 4 x 6 tokens of grid, got 19"):
        image(x)
    with pytest.raises(ValueError, match="mask must not be packed with a grid"):
        image(sample(1, 24), mask=AttentionMask.packed([0, 24]))
    compat = make(normalizer="compat", causal=False, feature_map="elu")
    with pytest.raises(ValueError, match=r"normalizer 'compat' needs exactly .* = 24 tokens, got 19"):
        compat(x)
    with pytest.raises(ValueError, match="mask must not be packed with a grid or normalizer 'compat'"):
        compat(sample(1, 24), mask=AttentionMask.packed([0, 12, 24]))
    for backend in ("sdpa", "flash"):
        with pytest.raises(attnzoo.BackendUnavailable, match=f"backend '{backend}' cannot run linear attention: it"):
            make(backend=backend)(x)
    # The interpreter refuses the dtype; without it the device is what is missing, or triton itself.
    named = "got torch.float64|needs CUDA tensors|triton is not installed"
    with pytest.raises(attnzoo.BackendUnavailable, match=f"backend 'triton' cannot run linear attention: .*({named})"):
        make(backend="triton")(x)
