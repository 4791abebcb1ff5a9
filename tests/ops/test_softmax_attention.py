"""The operation against the sentence that defines it, one query at a time in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import attnzoo
from attnzoo import AttentionMask
from attnzoo.ops.softmax_attention import alibi_slopes
from tests.views import attend

B, T, H, G, D, DV = 2, 7, 6, 3, 5, 4


def cumulated_gates(keys: int) -> Tensor:
    """Cumulated log forget gates (B, H, keys)."""
    return -torch.linspace(0.1, 1, B * H * keys).double().view(B, H, keys).cumsum(-1)


CALLS: dict[str, dict[str, object]] = {
    "plain": {},
    "bidirectional": {"causal": False},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor(alibi_slopes(H)).double()},
    "window": {"window": 3},
    "window and sink tokens": {"window": 2, "sink_tokens": 2},
    "bidirectional window": {"window": 2, "causal": False},
    "bidirectional window and sink tokens": {"window": 2, "sink_tokens": 1, "causal": False},
    "zero sink": {"sinks": 0.0},
    "sink of two": {"sinks": 2.0},
    "learned sinks": {"sinks": torch.linspace(-2, 2, H).double()},
    "head scale": {"head_scale": torch.linspace(-1, 2, H).double()},
    "head scale of each row": {"head_scale": torch.linspace(0, 2, B * H).double().view(B, H)},
    "head scale of each token": {"head_scale": torch.linspace(0, 2, B * T * H).double().view(B, T, H)},
    "shared part": {"extra": 3},
    "padding": {"mask": AttentionMask.padding([7, 4])},
    "packed": {"mask": AttentionMask.packed([0, 2, 9, 14])},
    "dense": {"mask": torch.arange(H * T * T).view(H, T, T) % 3 > 0},
    "dense for all heads": {"mask": torch.arange(T * T).view(T, T) % 5 > 0, "causal": False},
    "blind rows": {"mask": AttentionMask.padding([7, 0])},
    "cached prefix": {"S": 11},
    "cached prefix and window": {"S": 11, "window": 4, "sink_tokens": 1},
    "first query": {"S": 11, "query_start": 2},
    "bias": {"bias": torch.linspace(-1, 1, H * T * T).double().view(H, T, T)},
    "bias of keys": {"bias": torch.linspace(-1, 1, B * T).double().view(B, 1, 1, T), "causal": False},
    "ring buffer": {"S": 9, "query_start": 6, "key_positions": torch.tensor([9, 10, 11, 12, 4, 5, 6, 7, 8])},
    "decay": {"decay": cumulated_gates(T)},
    "decay beside a bias": {"decay": cumulated_gates(T), "bias": torch.linspace(-1, 1, H).double().view(H, 1, 1)},
    "decay and cached prefix": {"S": 11, "decay": cumulated_gates(11)},
    "decay and ring buffer": {
        "S": 9, "query_start": 6, "key_positions": torch.tensor([9, 10, 11, 12, 4, 5, 6, 7, 8]),
        "decay": cumulated_gates(13)[..., [9, 10, 11, 12, 4, 5, 6, 7, 8]],
    },
    "decay and padding": {"decay": cumulated_gates(T), "mask": AttentionMask.padding([7, 0]), "scale": -0.3},
    "output gate": {"output_gate": torch.linspace(-3, 3, B * T * H * DV).double().view(B, T, H, DV)},
    "output gate of each head": {"output_gate": torch.linspace(-3, 3, B * T * H).double().view(B, T, H, 1)},
    "everything": {
        "softcap": 2.0, "alibi_slopes": torch.linspace(0, 1, H).double(), "window": 3, "sink_tokens": 1,
        "sinks": torch.linspace(-1, 1, H).double(), "head_scale": torch.linspace(1, 2, H).double(), "extra": 2,
        "mask": AttentionMask.padding([7, 5]) & AttentionMask.packed([0, 3, 7, 14]), "scale": 0.7,
    },
}  # fmt: skip


def call_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, object]]:
    """The tensors q, k, v, perhaps q_rope and k_rope, and the remaining options."""
    options = dict(CALLS[name])
    S, R = options.pop("S", T), options.pop("extra", None)
    g = torch.Generator().manual_seed(3)
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, DV)] + ([] if R is None else [(B, T, H, R), (B, S, 1, R)])
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes], options


def run(tensors: list[Tensor], options: dict[str, object], backend: str = "eager") -> Tensor:
    extra = dict(zip(("q_rope", "k_rope"), tensors[3:], strict=False))
    return attend(*tensors[:3], **extra, **options, backend=backend)


def spelled_out(tensors: list[Tensor], options: dict[str, object]) -> Tensor:
    """The docstring's lines for one row, head and query after the other."""
    q, k, v = tensors[:3]
    rows, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    extra = tensors[3].shape[-1] if len(tensors) > 3 else 0
    scale = options.get("scale", (width + extra) ** -0.5)
    start = options.get("query_start", keys - queries)
    position = options.get("key_positions", torch.arange(keys)).tolist()
    out = torch.zeros(rows, queries, heads, v.shape[3], dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            for t in range(queries):
                i, g = start + t, h // (heads // groups)
                weights = {}
                for n, j in enumerate(position):
                    if not may_see(options, b, h, i, j, queries):
                        continue
                    s = torch.dot(q[b, t, h], k[b, n, g])
                    if extra:
                        s = s + torch.dot(tensors[3][b, t, h], tensors[4][b, n, 0])
                    s = float(s) * scale
                    if "softcap" in options:
                        s = options["softcap"] * math.tanh(s / options["softcap"])
                    if "alibi_slopes" in options:
                        s -= float(options["alibi_slopes"][h]) * abs(i - j)
                    if "decay" in options:
                        decay = options["decay"][b, h]
                        s += float(decay[position.index(i)] - decay[n])
                    if "bias" in options:
                        s += float(options["bias"].expand(rows, heads, queries, keys)[b, h, t, n])
                    weights[n] = math.exp(s)
                if not weights:
                    continue
                total = sum(weights.values())
                if "sinks" in options:
                    sink = options["sinks"]
                    total += math.exp(sink[h] if isinstance(sink, Tensor) else sink)
                out[b, t, h] = sum(w * v[b, n, g] for n, w in weights.items()) / total
                if "head_scale" in options:
                    out[b, t, h] *= factor_of(options["head_scale"], b, t, h)
                if "output_gate" in options:
                    out[b, t, h] *= torch.sigmoid(options["output_gate"][b, t, h])
    return out


def factor_of(head_scale: Tensor, b: int, t: int, h: int) -> float:
    """Of (H,), (B, H) or (B, T, H)."""
    return float(head_scale[(b, t, h)[3 - head_scale.ndim :] if head_scale.ndim != 2 else (b, h)])


def may_see(options: dict[str, object], b: int, h: int, i: int, j: int, queries: int) -> bool:
    causal, window, mask = options.get("causal", True), options.get("window"), options.get("mask")
    first, document = 0, None
    if isinstance(mask, AttentionMask):
        if mask.lengths is not None and j >= mask.lengths[b]:
            return False
        if mask.cu_seqlens is not None:
            ends = mask.cu_seqlens.tolist()
            document = [max(e for e in (*ends, b * queries) if e <= b * queries + n) for n in (i, j)]
            if document[0] != document[1]:
                return False
            first = document[0] - b * queries
    elif mask is not None and not mask.expand(B, H, -1, -1)[b, h, i, j]:
        return False
    if causal and j > i:
        return False
    return window is None or abs(i - j) < window or j - first < options.get("sink_tokens", 0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CALLS)
def test_the_definition(name: str, backend: str) -> None:
    tensors, options = call_of(name)
    if backend == "sdpa" and "softcap" in options:
        with pytest.raises(attnzoo.BackendUnavailable, match="soft-cap"):
            run(tensors, options, backend)
        return
    expected = spelled_out(tensors, options)
    torch.testing.assert_close(run(tensors, options, backend), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name: str) -> None:
    tensors, options = call_of(name)
    # The sharpest cut that keeps differences cheap: one row, two heads of one group.
    options = {k: _cut(k, o) for k, o in options.items()}
    tensors = [x[:1] for x in tensors]
    heads = [(0, 2, 3, 4), (0, 1), (0, 1), (0, 2, 3, 4), (0,)]
    tensors = [x[:, :, list(h)] for x, h in zip(tensors, heads, strict=False)]
    tensors = [x[..., :2].requires_grad_() for x in tensors]
    tensors[0] = tensors[0].detach()[:, :, :2].requires_grad_()
    if len(tensors) > 3:
        tensors[3] = tensors[3].detach()[:, :, :2].requires_grad_()
    learned = [o for o in options.values() if isinstance(o, Tensor) and o.dtype == torch.float64 and o.requires_grad]

    def call(*inputs: Tensor) -> Tensor:
        return run(list(inputs[: len(tensors)]), options)

    assert gradcheck(call, (*tensors, *learned))
    assert gradgradcheck(call, (*tensors, *learned))


def _cut(name: str, option: object) -> object:
    if name == "head_scale" and isinstance(option, Tensor) and option.ndim == 3:
        return option[:1, :, :2].clone().requires_grad_()
    if name in ("sinks", "alibi_slopes", "head_scale") and isinstance(option, Tensor):
        cut = option.reshape(-1, H)[0, :2].clone()
        return cut.requires_grad_() if name != "alibi_slopes" else cut
    if name == "output_gate":
        return option[:1, :, :2, :2].clone().requires_grad_()
    if name == "decay":
        return option[:1, :2].clone().requires_grad_()
    if name == "bias":
        return option.expand(B, -1, -1, -1)[:1, :2].clone().requires_grad_()
    if isinstance(option, AttentionMask):
        lengths = None if option.lengths is None else option.lengths[:1]
        packed = None if option.cu_seqlens is None else option.cu_seqlens.clamp(max=T)
        return AttentionMask(lengths=lengths, cu_seqlens=packed)
    if name == "mask" and option.ndim == 3:
        return option[:2]
    return option


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["plain", "alibi", "learned sinks", "shared part", "window", "blind rows"])
def test_half_precision_sums_in_float32(name: str, backend: str, dtype: torch.dtype) -> None:
    """Long rows of large scores: an error of the inputs' rounding, not of a half-precision softmax."""
    tensors, options = call_of(name)
    torch.manual_seed(2)
    options = {k: o for k, o in options.items() if k != "mask"}
    S = 300
    heads = [H, G, G, H, 1]
    low = [
        (torch.randn(1, S, n, x.shape[-1]) * (5 if i < 2 else 1)).to(dtype)
        for i, (n, x) in enumerate(zip(heads, tensors, strict=False))
    ]
    exact = run([x.double() for x in low], options)
    # Scores and softmax exact, weights rounded once to the dtype, products summed in float32.
    error = (run(low, options, backend).double() - exact).abs().max()
    values = low[2].double().abs().max()
    budget = 4 * torch.finfo(dtype).eps * values + 64 * torch.finfo(torch.float32).eps * values
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_long_decays_keep_their_differences(groups: int, dtype: torch.dtype) -> None:
    """Cumulated gates of thousands, whose differences of a few tenths decide; also their gradient."""
    S, heads = 600, 4
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, S, n, 8).to(dtype) for n in (heads, groups, groups))
    decay = torch.nn.functional.logsigmoid(torch.randn(1, heads, S) - 2).double().cumsum(-1).float() - 3000
    weight = torch.randn(1, S, heads, 8)

    def found(backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        c = tensors[3].clone().requires_grad_()
        out = attend(*tensors[:3], decay=c, backend=backend)
        return out, torch.autograd.grad((out * weight.to(out)).sum(), c)[0]

    exact = found("eager", *(x.double() for x in (q, k, v, decay)))
    for backend in ("eager", "sdpa"):
        close = found(backend, q, k, v, decay)
        for value, expected in zip(close, exact, strict=True):
            allowed = 8 * torch.finfo(dtype).eps * expected.abs().max() + 1e-3 * (dtype is torch.float32)
            assert (value - expected).abs().max() <= allowed


def test_a_decay_stores_no_pairs_and_no_repeated_keys() -> None:
    """What sdpa keeps for the backward pass grows with T, also where heads share keys."""

    def stored(T: int) -> int:
        q, k, v = (torch.randn(1, T, n, 8, requires_grad=True) for n in (4, 2, 2))
        decay = torch.randn(1, 4, T, requires_grad=True)
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            attend(q, k, v, decay=decay, backend="sdpa")
        return sum(sizes.values())

    assert stored(512) <= 2.05 * stored(256)


def test_alibi_distances_are_not_rounded_to_half_precision() -> None:
    """In bfloat16 the distances 1,000 and 1,001 are one number; here no key nearer than that is visible."""
    S = 1500
    i, j = torch.arange(S)[:, None], torch.arange(S)
    far = (i - j > 1000) | (i < 1000)
    q, k = torch.zeros(1, S, 1, 8, dtype=torch.bfloat16), torch.zeros(1, S, 1, 8, dtype=torch.bfloat16)
    v = torch.randn(1, S, 1, 8).bfloat16()
    slopes = torch.tensor([1.0])
    exact = attend(q.double(), k.double(), v.double(), alibi_slopes=slopes.double(), mask=far, backend="eager")
    for backend in ("eager", "sdpa"):
        out = attend(q, k, v, alibi_slopes=slopes, mask=far, backend=backend)
        assert (out.double() - exact).abs().max() <= 2**-7 * v.abs().max()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_scores_stay_finite(size: float, backend: str) -> None:
    tensors, options = call_of("plain", torch.float32)
    q, k, v = (x.requires_grad_() for x in tensors)
    out = attend(q * size, k, v, **options, backend=backend)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.001
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (8, 8), (33, 5), (64, 128), (256, 17)])
def test_any_width(width: int, value_width: int, backend: str) -> None:
    q, k = torch.randn(2, 5, 4, width).double(), torch.randn(2, 5, 2, width).double()
    v = torch.randn(2, 5, 2, value_width).double()
    expected = spelled_out([q, k, v], {})
    torch.testing.assert_close(attend(q, k, v, backend=backend), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "keys"), [((0, 3, 4, 8), 3), ((2, 0, 4, 8), 0), ((2, 0, 4, 8), 3), ((2, 1, 4, 8), 1), ((2, 1, 0, 8), 1)]
)
def test_empty_and_single(shape: tuple[int, ...], keys: int) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], keys, shape[2] // 2, 8, requires_grad=True)
    v = torch.randn(shape[0], keys, shape[2] // 2, 6, requires_grad=True)
    out = attend(q, k, v)
    assert out.shape == (*shape[:3], 6)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_one_query_before_later_keys_does_not_see_them(backend: str) -> None:
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4)
    out = attend(q, k, v, query_start=2, backend=backend)
    torch.testing.assert_close(out, attend(q, k[:, :3], v[:, :3], backend="eager"))


def test_no_keys_gives_zeros() -> None:
    q = torch.randn(2, 3, 4, 8)
    none = torch.randn(2, 0, 2, 8)
    assert torch.equal(attend(q, none, none, causal=False), torch.zeros(2, 3, 4, 8))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_keeps_the_mean(backend: str) -> None:
    q, k, v = (torch.ones(1, 2000, 2, 4) for _ in range(3))
    out = attend(q, k, v, dropout=0.25, backend=backend)
    assert out[:, 500:].mean().item() == pytest.approx(1.0, abs=0.02)
    assert out[:, 500:].std() > 0.005


def test_a_learned_sink_in_training_is_left_to_eager() -> None:
    tensors, _ = call_of("plain")
    sinks = torch.zeros(H).double().requires_grad_()
    with pytest.raises(attnzoo.BackendUnavailable, match="learned sinks"):
        attend(*tensors, sinks=sinks, backend="sdpa")
    out = attend(*tensors, sinks=sinks)
    (grad,) = torch.autograd.grad(out.sum(), sinks)
    assert (grad != 0).all()
    with torch.no_grad():
        expected = attend(*tensors, sinks=sinks, backend="sdpa")
    torch.testing.assert_close(out.detach(), expected)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(1, [2**-8]), (2, [2**-4, 2**-8]), (8, [2**-i for i in range(1, 9)]), (3, [2**-4, 2**-8, 2**-2])],
)
def test_alibi_slopes(heads: int, slopes: list[float]) -> None:
    assert list(alibi_slopes(heads)) == pytest.approx(slopes)


def _wrong(**changes: object) -> dict[str, object]:
    made: dict[str, object] = {
        "q": torch.zeros(2, 3, 4, 8),
        "k": torch.zeros(2, 3, 2, 8),
        "v": torch.zeros(2, 3, 2, 8),
    }
    return made | changes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_wrong(q=torch.zeros(3, 4, 8)), "q, k and v must have 4 dimensions, got 3, 4 and 4"),
        (_wrong(v=torch.zeros(2, 4, 2, 8)), r"k and v must agree in \(B, S, G\)"),
        (_wrong(q=torch.zeros(1, 3, 4, 8)), "q and k must agree in batch and width"),
        (_wrong(q=torch.zeros(2, 3, 4, 9)), "q and k must agree in batch and width"),
        (_wrong(q=torch.zeros(2, 3, 3, 8)), "num_kv_heads must divide num_heads, got 2 and 3"),
        (_wrong(q=torch.zeros(2, 3, 4, 8).double()), "one floating dtype"),
        (_wrong(q=torch.zeros(2, 4, 4, 8)), "causal attention needs T <= S, got 4 queries and 3 keys"),
        (_wrong(q_rope=torch.zeros(2, 3, 4, 2)), "q_rope and k_rope must be given together"),
        (
            _wrong(q_rope=torch.zeros(2, 3, 4, 2), k_rope=torch.zeros(2, 3, 2, 2)),
            r"k_rope \(B, S, 1, R\), got .*\(2, 3, 2, 2\)",
        ),
        (_wrong(mask=torch.zeros(3, 3)), "mask must be boolean"),
        (_wrong(bias=torch.zeros(5, 3)), r"bias must broadcast to \(B, H, T, S\)"),
        (_wrong(bias=torch.ones(3, 3, dtype=torch.bool)), "bias must be a floating tensor, got torch.bool"),
        (_wrong(head_scale=torch.ones(2)), r"head_scale must be \(4,\), \(2, 4\) or \(2, 3, 4\), got shape \(2,\)"),
        (_wrong(mask=torch.ones(5, 3, dtype=torch.bool)), "mask must broadcast"),
        (_wrong(mask=[[True]]), "mask must be a boolean tensor or an AttentionMask, got list"),
        (_wrong(output_gate=torch.ones(2, 3, 4)), r"output_gate must be a floating tensor \(2, 3, 4, 8\) or \(2, 3, 4"),
        (_wrong(output_gate=torch.ones(2, 3, 4, 1).long()), "output_gate must be a floating .* got torch.int64"),
        (
            _wrong(decay=torch.ones(2, 2, 3)),
            r"decay must be a float32 or float64 tensor \(2, 4, 3\), got .*\(2, 2, 3\)",
        ),
        (_wrong(decay=torch.ones(2, 4, 3).bfloat16()), "decay must be a float32 or float64 .*, got torch.bfloat16"),
        (_wrong(decay=torch.ones(2, 4, 3), sinks=0.0), "decay must not be given together with sinks"),
        (_wrong(backend="cudnn"), "backend must be one of .*, got 'cudnn'"),
    ],
)
def test_refusals(call: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(**call)


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_a_backend_that_cannot_run_here_says_why(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors, _ = call_of("plain", torch.float32)
    with pytest.raises(attnzoo.BackendUnavailable, match=f"backend '{backend}' cannot run softmax_attention: .+"):
        attend(*tensors, backend=backend)


def test_the_sum_over_heads_reads_the_right_group() -> None:
    """A group's value reaches its own query heads and no other: callables keep the layout honest."""
    q, k = torch.zeros(1, 1, H, D), torch.zeros(1, 1, G, D)
    v = torch.arange(G).view(1, 1, G, 1).float().expand(1, 1, G, DV)
    take: Callable[[str], Tensor] = lambda backend: attend(q, k, v, backend=backend)[0, 0, :, 0]  # noqa: E731
    for backend in ("eager", "sdpa"):
        assert take(backend).tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
