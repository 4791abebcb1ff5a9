"""Attention with a static context: stored figures, its three forms, what the cache may be used for, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import attnzoo
from attnzoo import Rotary, StaticContextAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "mditface.safetensors"
E, H, G, T, S = 32, 4, 2, 7, 5


def make(**options):
    torch.manual_seed(3)
    attn = StaticContextAttention(E, H, G, dtype=torch.float64, **{"rope": Rotary(), "bias": True, **options})
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def joint(dynamic, static):
    return torch.cat([dynamic, static], dim=1)


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


BOTH = pytest.mark.parametrize("causal", [False, True])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_stored_figures(backend):
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    T, S, rope = config["T"], config["S"], config.pop("rope")
    kept = ("num_kv_heads", "head_dim", "bias", "qk_norm", "qk_norm_eps", "separate_static", "causal")
    attn = StaticContextAttention(
        config["embed_dim"], config["num_heads"], **{name: config[name] for name in kept}, backend=backend,
        rope=Rotary(theta=rope["theta"], style=rope["style"], dim=rope["rotary_dim"]), dtype=torch.float64,
    )  # fmt: skip
    attn.load_state_dict({k.removeprefix("weights."): v.double() for k, v in t.items() if k.startswith("weights.")})
    x, x2, positions = (
        t["input.x"].double().requires_grad_(),
        t["input.x2"].double().requires_grad_(),
        t["input.positions"],
    )
    y = attn(x, num_static=S, positions=positions)
    y2 = attn(x2, x[:, T:], positions=(positions[:, :T], positions[:, T:]))
    assert_close(y, t["output.y"], 1e-9)
    assert_close(y2, t["output.y2"], 1e-9)
    ((y * t["input.w"].double()).sum() + (y2 * t["input.w2"].double()).sum()).backward()
    found = {"x": x.grad, "x2": x2.grad, **{name: p.grad for name, p in attn.named_parameters()}}
    compared = [key.removeprefix("grad.") for key in t if key.startswith("grad.")]
    assert len(compared) == 22
    for name in compared:
        assert_close(found[name], t[f"grad.{name}"], 1e-9)
    cache = attn.init_cache(2, T + S)
    with torch.no_grad():
        assert_close(attn(x, num_static=S, positions=positions, cache=cache), t["output.y"], 1e-9)
        assert_close(attn(x2, positions=positions[:, :T], cache=cache), t["output.y2"], 1e-9)


@BOTH
def test_with_shared_weights_it_is_one_attention_with_a_block_mask(causal):
    attn = make(separate_static=False, causal=causal, rope=None)
    gqa = attnzoo.GroupedQueryAttention(E, H, G, bias=True, rope=None, causal=False, dtype=torch.float64)
    gqa.load_state_dict(attn.state_dict())
    x = joint(sample(T), sample(S)).requires_grad_()
    mask = torch.ones(T + S, T + S, dtype=torch.bool)
    mask[T:, :T] = False
    if causal:
        mask[:T, :T] = mask[:T, :T].tril()
    found, expected = attn(x, num_static=S), gqa(x, mask=mask)
    assert_close(found, expected)
    weight = torch.randn_like(x)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), [x, *m.parameters()]) for y, m in ((found, attn), (expected, gqa))),
        strict=True,
    ):
        assert_close(a, b, 1e-11)


@BOTH
def test_the_forms_agree(causal):
    attn = make(causal=causal, qk_norm=True)
    static = sample(S)
    cache = attn.init_cache(2, 40)
    with torch.no_grad():
        expected = attn(joint(sample(0), static), num_static=S, cache=cache)
        assert (cache.length, cache.num_static) == (S, S)
        for steps in range(3):
            x = sample(T)
            whole = attn(joint(x, static), num_static=S)
            assert_close(attn(x, static), whole[:, :T])
            assert_close(whole[:, T:], expected)
            if not causal or not steps:
                assert_close(attn(x, cache=cache), whole[:, :T])
            assert cache.length == (S + T if causal else S)


def test_static_rows_do_not_depend_on_dynamic_ones():
    attn, static = make(), sample(S)
    x = joint(sample(T), static).requires_grad_()
    y = attn(x, num_static=S)
    assert torch.equal(y[:, T:], attn(joint(100 * sample(T), static), num_static=S)[:, T:])
    (grad,) = torch.autograd.grad(y[:, T:].sum(), x)
    assert grad[:, :T].eq(0).all()
    assert grad[:, T:].abs().max() > 0


@BOTH
def test_without_one_kind_of_tokens_it_is_plain_attention(causal):
    attn = make(causal=causal)
    x = sample(T)
    for prefix, kept, is_causal in (("", attn(x), causal), ("static_", attn(x, num_static=T), False)):
        gqa = attnzoo.GroupedQueryAttention(E, H, G, bias=True, causal=is_causal, dtype=torch.float64)
        names = [name for name in attn.state_dict() if name.startswith("static_") == bool(prefix)]
        gqa.load_state_dict({name.removeprefix(prefix): attn.state_dict()[name] for name in names})
        assert_close(kept, gqa(x))


def test_the_order_of_static_tokens_goes_by_their_positions():
    attn, x, static = make(), sample(T), sample(S)
    order = torch.randperm(S)
    assert_close(attn(x, static[:, order], positions=(torch.arange(T), order)), attn(x, static))


@pytest.mark.parametrize("eps", [None, 0.0, 1e-3])
def test_the_epsilon_of_the_norms_is_the_modules(eps):
    gqa = attnzoo.GroupedQueryAttention(E, H, G, qk_norm=True, qk_norm_eps=eps, causal=False, rope=None)
    x = 0.01 * joint(sample(T), sample(S)).float()
    assert torch.equal(StaticContextAttention.from_joint(gqa)(x), gqa(x))


def test_from_a_module_that_saw_both_kinds():
    gqa = attnzoo.GroupedQueryAttention(E, H, G, qk_norm=True, causal=False, scale=0.3, dtype=torch.float64)
    x = joint(sample(T), sample(S))
    shared, separate = (StaticContextAttention.from_joint(gqa, separate_static=kind) for kind in (False, True))
    assert_close(shared(x, num_static=S), separate(x, num_static=S))
    assert_close(separate(x), gqa(x))
    assert shared.training
    assert not StaticContextAttention.from_joint(gqa.eval()).training
    for options in ({"sliding_window": 3}, {"o_bias": True}, {"v_head_dim": 4}):
        with pytest.raises(ValueError, match="module must be grouped-query attention with one width"):
            StaticContextAttention.from_joint(attnzoo.GroupedQueryAttention(E, H, G, causal=False, **options))
    for module in (attnzoo.MultiHeadLatentAttention(E, H), nn.Linear(E, E)):
        with pytest.raises(ValueError, match="module must be grouped-query attention with one width"):
            StaticContextAttention.from_joint(module)


@pytest.mark.parametrize("chunks", [[1] * T, [3, 4], [T]])
def test_the_prefix_form_decodes_what_the_joint_form_gives(chunks):
    attn, x, static = make(causal=True), sample(T), sample(S)
    cache = attn.init_cache(2, S + T)
    with torch.no_grad():
        attn(static, num_static=S, cache=cache)
        parts = [attn(part, cache=cache) for part in x.split(chunks, dim=1)]
        assert_close(torch.cat(parts, 1), attn(joint(x, static), num_static=S)[:, :T])
        cache.truncate(S + 2)
        assert_close(attn(x[:, 2:], cache=cache), torch.cat(parts, 1)[:, 2:])
    changed = x.clone()
    changed[:, 4:] += 1
    assert_close(attn(joint(changed, static), num_static=S)[:, :4], attn(joint(x, static), num_static=S)[:, :4])


@BOTH
def test_a_mask_in_the_joint_order_cuts_conditions_apart(causal):
    """Two conditions that do not see each other: without the second it is a run without the second."""
    attn, x, static = make(causal=causal), sample(T), sample(S)
    mask = torch.ones(T + S, T + S, dtype=torch.bool)
    mask[T : T + 2, T + 2 :] = mask[T + 2 :, T : T + 2] = False
    mask[:T, T + 2 :] = False
    at = torch.cat([torch.arange(T) + (S if causal else 0), torch.arange(S)])
    found = attn(joint(x, static), num_static=S, mask=mask, positions=at)
    alone = attn(joint(x, static[:, :2]), num_static=2, positions=at[: T + 2])
    assert_close(found[:, : T + 2], alone)
    cache = attn.init_cache(2, S + T)
    with torch.no_grad():
        attn(joint(sample(0), static), num_static=S, mask=mask[T:, T:], cache=cache)
        assert_close(attn(x, mask=mask[:T], positions=at[:T], cache=cache), found[:, :T])


def test_a_row_without_static_tokens():
    attn, x, static = make(rope=None), sample(T), sample(S)
    mask = torch.ones(2, 1, T + S, T + S, dtype=torch.bool)
    mask[1, :, :, T:] = False
    y = attn(joint(x, static), num_static=S, mask=mask)
    assert_close(y[1, :T], attn(x)[1])
    assert_close(y[1, T:], attn.static_o_proj.bias.expand(S, E))


@BOTH
def test_a_refused_call_leaves_the_cache(causal):
    attn, static = make(causal=causal), sample(S)
    cache = attn.init_cache(2, S + 2)
    with torch.no_grad():
        attn(static, num_static=S, cache=cache)
        before = [buffer.clone() for buffer in cache.buffers], cache.length, cache.num_static
        for call in ({"x": sample(3), "num_static": 1}, {"x": sample(3), "mask": torch.ones(3, 3, dtype=torch.bool)}):
            with pytest.raises(ValueError, match=r"cache|mask"):
                attn(call.pop("x"), cache=cache, **call)
        assert (cache.length, cache.num_static) == before[1:]
        assert all(torch.equal(a, b) for a, b in zip(cache.buffers, before[0], strict=True))
        with pytest.raises(ValueError, match="length must be at least the 5 static tokens"):
            cache.truncate(S - 1)
        cache.reset()
        attn(static[:, :3], num_static=3, cache=cache)
        assert cache.num_static == 3


class Layer(nn.Module):
    """A block whose static stream may be modulated by the time of a step."""

    def __init__(self):
        super().__init__()
        self.attn = make(rope=None)
        self.norm = nn.LayerNorm(E, dtype=torch.float64)
        self.mlp = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, E)).double()

    def forward(self, dynamic, static, time, modulated, cache=None):
        T = dynamic.shape[1]
        shift = time * torch.linspace(-1, 1, E).double()
        normed = self.norm(dynamic) + shift
        if static is None:
            out, x = self.attn(normed, cache=cache), dynamic
        else:
            other = self.norm(static) + (shift if modulated else 0)
            out, x = self.attn(joint(normed, other), num_static=static.shape[1], cache=cache), joint(dynamic, static)
        x = x + out
        x = x + self.mlp(self.norm(x))
        return (x, None) if static is None else (x[:, :T], x[:, T:])


@pytest.mark.parametrize("modulated", [False, True])
def test_a_stack_may_reuse_static_keys_only_if_nothing_else_tells_them_the_step(modulated):
    torch.manual_seed(0)
    layers, static = [Layer() for _ in range(3)], sample(S)
    caches = [layer.attn.init_cache(2, S) for layer in layers]

    def run(x, time, static, caches):
        for layer, cache in zip(layers, caches, strict=True):
            x, static = layer(x, static, time, modulated, cache)
        return x

    with torch.no_grad():
        run(sample(T), 0.1, static, caches)
        x = sample(T)
        apart = (run(x, 0.9, None, caches) - run(x, 0.9, static, [None] * 3)).abs().max()
    assert (apart > 1e-2) if modulated else (apart < 1e-12)


@BOTH
def test_a_later_step_must_fit_the_cache(causal):
    attn = make(causal=causal)
    cache = attn.init_cache(2, S + 9)
    with torch.no_grad():
        attn(sample(S), num_static=S, cache=cache)
        with pytest.raises(ValueError, match=r"cache was made for states .*torch\.float64.*got .*1"):
            attn(sample(2)[:1], cache=cache)
        with pytest.raises(ValueError, match=r"cache was made for states .*torch\.float64.*in torch\.float32"):
            attn.float()(sample(2).float(), cache=cache)


def test_heads_are_pruned_in_both_streams():
    attn, x = make(), joint(sample(T), sample(S))
    masked = make()
    with torch.no_grad():
        for layer in (masked.o_proj, masked.static_o_proj):
            layer.weight[:, : attn.head_dim] = 0
    attn.prune_heads([0])
    assert_close(attn(x, num_static=S), masked(x, num_static=S))


def test_gradients_are_those_of_finite_differences():
    attn, x = make(causal=True), joint(sample(2), sample(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attn(x, num_static=2), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_static": -1}, "num_static must lie between 0 and the 7 tokens of x, got -1"),
        ({"num_static": T + 1}, "num_static must lie between 0 and the 7 tokens"),
        ({"num_static": True}, "num_static must lie between"),
        ({"num_static": 2, "context": sample(S)}, "context needs num_static=0 and no cache"),
        ({"context": torch.zeros(2, S, E + 1)}, "context must have shape"),
        ({"num_static": 2, "mask": attnzoo.AttentionMask.padding([5, 6])}, "mask must be a boolean tensor"),
        ({"num_static": 2, "mask": torch.ones(3, 3, dtype=torch.bool)}, "mask must broadcast"),
        ({"cache": "empty"}, "cache must hold static tokens"),
        ({"cache": "foreign"}, "cache must come from this module's init_cache"),
    ],
)
def test_refusals(call, message):
    attn = make()
    caches = {"empty": attn.init_cache(2, 20), "foreign": attnzoo.GroupedQueryAttention(E, H, G).init_cache(2, 20)}
    if "cache" in call:
        call = {"cache": caches[call["cache"]]}
    with pytest.raises(ValueError, match=message):
        attn(sample(T), **call)
