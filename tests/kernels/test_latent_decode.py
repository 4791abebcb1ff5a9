"""Decoding over latents against the definition in float64, and against the module whose inner loop it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from attnzoo import AttentionMask, MultiHeadLatentAttention
from attnzoo.cache import LatentCache
from attnzoo.masks import Visibility
from attnzoo.modules import mla
from attnzoo_kernels import decode as decode_module
from attnzoo_kernels.decode import is_tied, latent_decode
from tests.views import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, S, R, DR = 2, 3, 5, 77, 20, 6


def made(dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Tensor, Tensor]:
    """Queries (B, T, H, R + dr) and a cache's states (B, S, 1, R + dr)."""
    n = {"B": B, "T": T, "H": H, "S": S, "R": R, "DR": DR} | sizes
    g = torch.Generator().manual_seed(5)
    shapes = (n["B"], n["T"], n["H"], n["R"] + n["DR"]), (n["B"], n["S"], 1, n["R"] + n["DR"])
    query, states = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype).to(DEVICE) for s in shapes)
    return query, states


def fused(query: Tensor, states: Tensor, rank: int, num_splits: int | None = None, **options: Any) -> Tensor:
    """Latent and rotary key as slices of the states, the way a cache holds them."""
    has_rope = query.shape[-1] > rank
    q_rope, k_rope = (query[..., rank:], states[:, :, 0, rank:]) if has_rope else (None, None)
    return latent_decode(
        query[..., :rank], q_rope, states[:, :, 0, :rank], k_rope, num_splits=num_splits, **options
    )  # fmt: skip


def defined(query: Tensor, states: Tensor, rank: int, **options: Any) -> Tensor:
    lengths, mask = options.pop("lengths", None), options.pop("mask", None)
    parts = [] if lengths is None else [AttentionMask.padding(lengths)]
    parts += [] if mask is None else [AttentionMask.dense(mask)]
    both = parts[0] & parts[1] if len(parts) == 2 else (parts[0] if parts else None)
    return attend(query, states, states[..., :rank], mask=both, backend="eager", **options)


def assert_as_good_as_eager(
    query: Tensor, states: Tensor, rank: int, num_splits: int | None = None, **options: Any
) -> None:
    """At most twice as far from the float64 answer as the definition in the tensors' own dtype."""
    options.setdefault("scale", 0.3)
    options.setdefault("query_start", states.shape[1] - query.shape[1])
    out = fused(query, states, rank, num_splits, **options)
    exact = defined(query.double(), states.double(), rank, **options)
    assert out.shape == exact.shape
    assert out.dtype == query.dtype
    if exact.numel():
        budget = (defined(query, states, rank, **options).double() - exact).abs().max()
        bound = 2 * budget + 4 * torch.finfo(out.dtype).eps * exact.abs().max().clamp(min=1)
        error = (out.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e}, budget {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("rank", [16, 20, 37])
def test_ranks(rank: int, num_splits: int, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(*made(dtype, R=rank), rank, num_splits)


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (192, 32)])
def test_ranks_of_real_models(rank: int, rope: int) -> None:
    query, states = made(torch.float16, B=1, T=1, H=17, R=rank, DR=rope)
    assert_as_good_as_eager(query, states, rank, 2, scale=(rank + rope) ** -0.5)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5])
def test_numbers_of_splits(num_splits: int) -> None:
    assert_as_good_as_eager(*made(B=1, S=230), R, num_splits)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"lengths": torch.tensor([30, 0])},
        {"mask": torch.arange(B * H * T * S).view(B, H, T, S) % 5 > 1},
        {"mask": torch.arange(B * S).view(B, 1, 1, S) % 5 > 1, "lengths": torch.tensor([60, 41]), "causal": False},
        {"query_start": 33},
        {"scale": -0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("rope", [DR, 0])
def test_options(options: dict[str, Any], rope: int) -> None:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert_as_good_as_eager(*made(DR=rope), R, 2, **options)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("heads", [1, 9])
def test_tokens_and_heads(tokens: int, heads: int) -> None:
    assert_as_good_as_eager(*made(torch.float16, B=1, T=tokens, H=heads), R, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    for heads in (1, 7, 16):
        assert_as_good_as_eager(*made(dtype, T=tokens, H=heads), R, 3)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_and_options(data: st.DataObject) -> None:
    assert_drawn_calls_as_good(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_random_shapes_and_options(data: st.DataObject) -> None:
    assert_drawn_calls_as_good(data)


def assert_drawn_calls_as_good(data: st.DataObject) -> None:
    rows, heads, tokens = (data.draw(st.integers(*bounds)) for bounds in ((0, 3), (1, 20), (1, 16)))
    keys, rank, rope = (data.draw(st.integers(*bounds)) for bounds in ((0, 130), (1, 70), (0, 20)))
    options: dict[str, Any] = {"causal": data.draw(st.booleans())}
    # The definition takes a lone causal query for the newest token, whatever its index.
    options["query_start"] = data.draw(st.integers(max(0, keys - (1 if tokens == 1 else tokens + 20)), keys))
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, keys), min_size=rows, max_size=rows))
        options["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    if data.draw(st.booleans()):
        shape = [n if data.draw(st.booleans()) else 1 for n in (rows, heads, tokens, keys)]
        options["mask"] = (torch.rand(shape, generator=torch.Generator().manual_seed(keys)) > 0.4).to(DEVICE)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    query, states = made(dtype, B=rows, T=tokens, H=heads, S=keys, R=rank, DR=rope)
    assert_as_good_as_eager(query, states, rank, data.draw(st.integers(1, 7)), **options)


def test_latents_are_read_in_the_cache_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher gets views of the cache, and takes key and value for the one tensor that they are."""
    cache = LatentCache(B, 100, ((1, R + DR),), device=DEVICE)
    query, states = made()
    held, _ = cache.append(states)
    seen = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*values: Any, **options: Any) -> None:
                given = dict(zip(self.arg_names, values, strict=True))
                seen.append((given["k_ptr"].data_ptr(), given["v_ptr"].data_ptr(), given["TIED"]))
                self.kernel[grid](*values, **options)

            return launch

    recorder = Recorder(decode_module.decode_attention_fwd_kernel)
    monkeypatch.setattr(decode_module, "decode_attention_fwd_kernel", recorder)
    monkeypatch.setattr(decode_module, "_PLANS", {})
    assert_as_good_as_eager(query, held, R, 2)
    start = cache.buffers[0].data_ptr()
    assert seen == [(start, start, True)]
    assert is_tied(held[..., :R], held[..., :R])


def test_rows_that_see_nothing_give_zeros_and_unseen_latents_are_not_read() -> None:
    query, states = made()
    states[0, 40:] = float("nan")
    states[1] = float("nan")
    lengths = torch.tensor([40, 0], device=DEVICE)
    for num_splits in (1, 3):
        out = fused(query, states, R, num_splits, scale=0.3, query_start=S - T, lengths=lengths)
        assert (out[1] == 0).all()
        assert out[0].isfinite().all()
        assert (out[0] != 0).all()


@pytest.mark.parametrize("rope_mode", ["decoupled", "pre"])
def test_the_module_decodes_alike(rope_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MultiHeadLatentAttention with its absorbed attention replaced by the kernel."""
    width = {"qk_rope_head_dim": 8} if rope_mode == "decoupled" else {}
    module = MultiHeadLatentAttention(
        24, 4, kv_lora_rank=R, qk_nope_head_dim=8, rope_mode=rope_mode, causal=True, absorb=True, backend="eager",
        device=DEVICE, **width,
    ).requires_grad_(False)  # fmt: skip
    x = torch.randn(B, 12, 24, device=DEVICE)
    expected = module(x)
    calls = []

    def by_kernel(
        q: Tensor, q_rope: Tensor | None, states: Tensor, view: Visibility, *, scale: float, **rest: Any
    ) -> Tensor:
        calls.append(q.shape[1])
        return latent_decode(
            q, q_rope, states[:, :, 0, :R], None if q_rope is None else states[:, :, 0, R:], scale=scale,
            causal=view.causal, query_start=view.start(q.shape[1], states.shape[1]), num_splits=2,
        )  # fmt: skip

    monkeypatch.setattr(mla, "latent_attention", by_kernel)
    cache = module.init_cache(B, 12)
    parts = [module(x[:, start:end], cache=cache) for start, end in ((0, 7), (7, 8), (8, 11), (11, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-6)
    assert calls == [7, 1, 3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's bfloat16 products are wrong")
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_bfloat16(heads: int) -> None:
    for num_splits in (None, 1, 3):
        query, states = made(torch.bfloat16, T=1, H=heads, S=1000, R=512, DR=64)
        assert_as_good_as_eager(query, states, 512, num_splits, scale=576**-0.5)


def test_torch_compile_sees_one_operator() -> None:
    query, states = made()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    def call(query: Tensor, states: Tensor) -> Tensor:
        return fused(query, states, R, 2, scale=0.3, query_start=S - T)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(query, states), call(query, states))
    assert len(graphs) == 1
    assert sum("decode_attention" in target for target in graphs[0]) == 1


def test_opcheck() -> None:
    query, states = made(B=1, S=20)
    latent, k_rope = states[..., :R], states[..., R:]
    arguments = (query[..., :R], latent, latent, query[..., R:], k_rope, *(None,) * 8, 0.3, 0.0, 0, 0, 17, 2, True)
    library.opcheck(torch.ops.attnzoo.decode_attention.default, arguments)


def test_mistakes_are_named() -> None:
    query, states = made()
    latent, k_rope, q, q_rope = states[:, :, 0, :R], states[:, :, 0, R:], query[..., :R], query[..., R:]
    options: dict[str, Any] = {"scale": 0.3, "query_start": S - T}
    with pytest.raises(ValueError, match=r"latent must be \(B, S, R\) and k_rope \(B, S, dr\), got \(2, 77, 1, 26\)"):
        latent_decode(query, None, states, None, **options)
    with pytest.raises(ValueError, match=r"k must be \(B, S, G, D\) .* got \(2, 77, 1, 19\)"):
        latent_decode(q, q_rope, latent[..., 1:], k_rope, **options)
    with pytest.raises(ValueError, match="q_rope and k_rope must be given together"):
        latent_decode(q, q_rope, latent, None, **options)
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\), got \(3,\)"):
        latent_decode(q, q_rope, latent, k_rope, lengths=torch.ones(3), **options)
    with pytest.raises(ValueError, match="widths of heads must lie between 1 and 512"):
        latent_decode(*made(R=513, DR=0)[:1], None, made(R=513, DR=0)[1][:, :, 0], None, **options)
    with pytest.raises(ValueError, match="decoding has no gradient"):
        latent_decode(q.clone().requires_grad_(), q_rope, latent, k_rope, **options)
