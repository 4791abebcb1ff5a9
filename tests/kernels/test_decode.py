"""Decoding kernels against the definition in float64: every option, every way to cut the keys, real caches."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from attnzoo import AttentionMask
from attnzoo.cache import KeyValueCache, TiedCache
from attnzoo_kernels import decode as decode_module
from attnzoo_kernels.decode import decode_attention, is_tied
from attnzoo_kernels.decode.tuning import decode_config, key_range, tile_bytes
from attnzoo_kernels.tuning import splits_for
from tests.views import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, G, D, DV, R, S = 2, 3, 6, 2, 5, 7, 4, 107

FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.linspace(0.0, 0.3, H)},
    "window": {"window": 45},
    "window and sink tokens": {"window": 37, "sink_tokens": 3},
    "zero sink": {"sinks": 0.0},
    "learned sinks": {"sinks": torch.linspace(-2, 4, H)},
    "shared part": {"extra": R},
    "tied": {"tied": True},
    "head scale": {"head_scale": torch.linspace(-1, 2, H)},
    "head scale of each row": {"head_scale": torch.linspace(-1, 2, B * H).view(B, H)},
    "decay": {"decay": torch.linspace(-20, 0, B * H * S).view(B, H, S).flip(-1).contiguous()},
    "lengths": {"lengths": torch.tensor([S - 40, 0])},
    "dense mask": {"mask": torch.arange(B * H * T * S).view(B, H, T, S) % 7 > 2},
    "mask of rows": {"mask": torch.arange(B * S).view(B, 1, 1, S) % 5 > 1},
    "mask without batch": {"mask": torch.arange(T * S).view(T, S) % 3 > 0},
    "bidirectional": {"causal": False},
    "ring": {"key_positions": (torch.arange(S) * 40 + 9) % S + 11, "query_start": S + 8},
    "negative scale": {"scale": -0.7},
    "first query": {"query_start": 40},
}  # fmt: skip
TOGETHER = (
    "softcap",
    "alibi",
    "window and sink tokens",
    "learned sinks",
    "shared part",
    "head scale",
    "lengths",
    "ring",
)


def made(options: dict[str, Any], dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[list[Tensor], dict]:
    """q, k, v, perhaps q_rope and k_rope, and the options that are left."""
    n = {"B": B, "T": T, "H": H, "G": G, "D": D, "DV": DV, "S": S} | sizes
    options = dict(options)
    width, tied = options.pop("extra", None), options.pop("tied", False)
    shapes = [(n["B"], n["T"], n["H"], n["D"]), (n["B"], n["S"], n["G"], n["D"]), (n["B"], n["S"], n["G"], n["DV"])]
    shapes += [] if width is None else [(n["B"], n["T"], n["H"], width), (n["B"], n["S"], 1, width)]
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).to(DEVICE) for s in shapes]
    if tied:
        tensors[1] = tensors[2][..., : n["D"]]
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    options.setdefault("query_start", n["S"] - n["T"])
    options.setdefault("scale", 0.4)
    return tensors, options


def fused(tensors: list[Tensor], options: dict[str, Any], num_splits: int | None = None) -> Tensor:
    rope = dict(zip(("q_rope", "k_rope"), tensors[3:], strict=False))
    mask, positions = options.get("mask"), options.get("key_positions")
    if mask is not None and positions is not None and mask.shape[-1] > 1:
        # A ring's mask has a column for every position, the kernels' one for every key.
        options = options | {"mask": mask.index_select(-1, positions)}
    return decode_attention(*tensors[:3], **rope, **options, num_splits=num_splits)


def defined(tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    options = dict(options)
    lengths, mask = options.pop("lengths", None), options.pop("mask", None)
    parts = [] if lengths is None else [AttentionMask.padding(lengths)]
    parts += [] if mask is None else [AttentionMask.dense(mask)]
    both = parts[0] & parts[1] if len(parts) == 2 else (parts[0] if parts else None)
    rope = dict(zip(("q_rope", "k_rope"), tensors[3:], strict=False))
    return attend(*tensors[:3], **rope, **options, mask=both, backend="eager")


def wide(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()}


def assert_as_good_as_eager(tensors: list[Tensor], options: dict[str, Any], num_splits: int | None = None) -> None:
    """At most twice as far from the float64 answer as the definition in the tensors' own dtype, and four steps."""
    out = fused(tensors, options, num_splits)
    exact = defined([x.double() for x in tensors], wide(options))
    assert out.shape == exact.shape
    assert out.dtype == tensors[0].dtype
    if exact.numel():
        budget = (defined(tensors, options).double() - exact).abs().max()
        bound = 2 * budget + 4 * torch.finfo(out.dtype).eps * exact.abs().max().clamp(min=1)
        error = (out.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e}, budget {bound:.2e}"


def joined(*names: str) -> dict[str, Any]:
    """Options of several features; a narrower mask, window or start of a later one replaces an earlier one's."""
    options: dict[str, Any] = {}
    for name in names:
        options |= FEATURES[name]
    if "key_positions" in options:
        options["query_start"] = S + 8
        if options.get("mask") is not None:
            # A ring's mask has a column for every position.
            more = torch.ones(*options["mask"].shape[:-1], 11, dtype=torch.bool)
            options["mask"] = torch.cat([options["mask"], more], -1)
    return options


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, num_splits: int) -> None:
    assert_as_good_as_eager(*made(joined(name)), num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_everything_at_once_in_half_precision(num_splits: int) -> None:
    assert_as_good_as_eager(*made(joined(*TOGETHER, "dense mask"), torch.float16), num_splits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("first", "second"), list(combinations(FEATURES, 2)))
def test_pair_of_features(first: str, second: str, dtype: torch.dtype) -> None:
    for num_splits in (1, 3):
        assert_as_good_as_eager(*made(joined(first, second), dtype), num_splits)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5])
def test_numbers_of_splits(num_splits: int) -> None:
    """5 make parts of two tiles, which are 4."""
    tensors, options = made(joined("learned sinks", "head scale"), S=239)
    assert_as_good_as_eager(tensors, options, num_splits)


def test_splits_agree_with_one_pass() -> None:
    tensors, options = made(joined("zero sink", "alibi"), S=239)
    whole = fused(tensors, options, 1)
    torch.testing.assert_close(fused(tensors, options, 100), whole, rtol=1e-5, atol=1e-6)


def test_more_states_than_are_merged_at_a_time() -> None:
    assert decode_module.MERGE["BLOCK_C"] < 11
    tensors, options = made(joined("zero sink"), B=1, T=1, H=2, G=1, S=11 * 32)
    assert_as_good_as_eager(tensors, options, 11)


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
def test_tokens_and_groups(tokens: int, heads: tuple[int, int]) -> None:
    tensors, options = made({"window": 50}, B=1, H=heads[0], G=heads[1], T=tokens, S=83)
    assert_as_good_as_eager(tensors, options, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    for heads, groups in ((6, 6), (6, 2), (12, 1)):
        tensors, options = made({"window": 50, "softcap": 3.0, "extra": 3}, dtype, H=heads, G=groups, T=tokens)
        assert_as_good_as_eager(tensors, options, 3)


@pytest.mark.parametrize("widths", [(64, 64), (80, 33), (128, 160)])
def test_widths_of_real_heads(widths: tuple[int, int]) -> None:
    tensors, options = made({"scale": widths[0] ** -0.5}, torch.float16, B=1, D=widths[0], DV=widths[1])
    assert_as_good_as_eager(tensors, options, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's bfloat16 products are wrong")
@pytest.mark.parametrize("name", FEATURES)
def test_bfloat16(name: str) -> None:
    for num_splits in (None, 1, 3):
        assert_as_good_as_eager(*made(joined(name), torch.bfloat16, D=64, DV=128), num_splits)


OPTIONS = [name for name in FEATURES if name not in ("dense mask", "mask of rows", "mask without batch", "ring")]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_and_options(data: st.DataObject) -> None:
    assert_a_drawn_call(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_random_shapes_and_options(data: st.DataObject) -> None:
    assert_a_drawn_call(data)


def assert_a_drawn_call(data: st.DataObject) -> None:
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    heads, rows = groups * per_group, data.draw(st.integers(0, 3))
    tokens, keys = data.draw(st.integers(1, 16)), data.draw(st.integers(0, 130))
    # The definition takes a lone causal query for the newest token, whatever its index.
    start = data.draw(st.integers(max(0, keys - (1 if tokens == 1 else tokens + 20)), keys))
    names = data.draw(st.sets(st.sampled_from(OPTIONS), max_size=5))
    options: dict[str, Any] = {}
    for name in sorted(names):
        options |= FEATURES[name]
    per_head = {name: torch.linspace(-1, 2, heads) for name in ("alibi_slopes", "head_scale") if name in options}
    options |= per_head | {"query_start": start}
    if isinstance(options.get("sinks"), Tensor):
        options["sinks"] = torch.linspace(-2, 4, heads)
    if "window" in options:
        options["window"] = data.draw(st.integers(1, 60))
    if "lengths" in options:
        options["lengths"] = torch.tensor(data.draw(st.lists(st.integers(0, keys), min_size=rows, max_size=rows)))
        options["lengths"] = options["lengths"].long()
    if data.draw(st.booleans()):
        sizes = (rows, heads, tokens, keys)
        shape = [n if data.draw(st.booleans()) else 1 for n in sizes][data.draw(st.integers(0, 3)) :]
        options["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(len(names))) > 0.4
    width = data.draw(st.integers(1, 20))
    sizes = {"B": rows, "T": tokens, "H": heads, "G": groups, "D": width, "S": keys}
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    tensors, options = made(options, dtype, **sizes, DV=width + data.draw(st.integers(0, 20)))
    assert_as_good_as_eager(tensors, options, data.draw(st.integers(1, 7)))


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    for options in ({"lengths": torch.tensor([5, 0])}, {"lengths": torch.tensor([5, 0]), "sinks": 1.0}):
        for num_splits in (1, 3):
            tensors, rest = made(options)
            out = fused(tensors, rest, num_splits)
            assert (out[1] == 0).all()
            assert (out[0] != 0).all()


def test_a_lone_query_before_the_last_key_sees_no_later_one() -> None:
    tensors, options = made({"query_start": 40})
    alone = [tensors[0][:, :1], *tensors[1:]]
    torch.testing.assert_close(fused(alone, options, 2), fused(tensors, options, 2)[:, :1], rtol=1e-5, atol=1e-6)


def test_no_keys_give_zeros() -> None:
    tensors, options = made({"causal": False, "query_start": 0}, S=0)
    assert (fused(tensors, options) == 0).all()


def test_keys_out_of_reach_are_not_read() -> None:
    """Behind a row's length, before every window and after the last query there may be anything."""
    tensors, options = made({"window": 20, "query_start": 80, "lengths": torch.tensor([75, 90])})
    expected = fused(tensors, options, 2)
    for x in tensors[1:3]:
        x[:, :60] = x[:, 84:] = float("nan")
        x[0, 75:] = float("nan")
    poisoned = fused(tensors, options, 2)
    torch.testing.assert_close(poisoned[1], expected[1])
    assert poisoned[0].isfinite().all()


def test_any_layout() -> None:
    tensors, options = made({"extra": R, "mask": torch.rand(S, T) > 0.3})
    options["mask"] = options["mask"].t()
    expected = defined([x.double() for x in tensors], options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    features_first = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in tensors]
    inside = [torch.nn.functional.pad(x, (2, 3, 1, 1))[:, :, 1:-1, 2:-3] for x in tensors]
    expanded = [*tensors[:1], tensors[1][:1].expand(B, -1, -1, -1), tensors[2][:1].expand(B, -1, -1, -1), *tensors[3:]]
    for layout in (heads_first, features_first, inside):
        assert not layout[1].is_contiguous()
        torch.testing.assert_close(fused(layout, options, 2).double(), expected, rtol=1e-5, atol=1e-5)
    assert_as_good_as_eager(expanded, options, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter touches all 6 GiB that are addressed")
def test_offsets_beyond_two_to_the_31() -> None:
    """Keys 2^30 elements apart."""
    step, keys = 2**30, 4
    memory = torch.zeros(step * (keys - 1) + 8, dtype=torch.float16, device=DEVICE)
    k = memory.as_strided((1, keys, 1, 8), (step * keys, step, 8, 1))
    k.copy_(torch.randn(keys, 8).view(1, keys, 1, 8))
    q = torch.randn(1, 1, 2, 8, device=DEVICE).half()
    tensors, options = [q, k, k], {"scale": 1.0, "query_start": keys - 1}
    expected = fused([q, k.contiguous(), k.contiguous()], options)
    torch.testing.assert_close(fused(tensors, options), expected)


@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_ring_cache(sink_tokens: int) -> None:
    window = 20
    cache = KeyValueCache(B, 70, ((G, D), (G, DV)), window=window, sink_tokens=sink_tokens, device=DEVICE)
    tensors, _ = made({}, S=60, T=60)
    options = {"scale": 0.4, "window": window, "sink_tokens": sink_tokens, "sinks": 0.5}
    for start, end in ((0, 15), (15, 16), (16, 30), (30, 31), (31, 35), (35, 36)):
        q, new_k, new_v = (x[:, start:end] for x in tensors)
        k, v, key_positions = cache.append(new_k, new_v)
        call = options | {"query_start": start, "key_positions": key_positions}
        assert_as_good_as_eager([q, k, v], call, 2)
        linear = defined([q, tensors[1][:, :end], tensors[2][:, :end]], options | {"query_start": start})
        torch.testing.assert_close(fused([q, k, v], call, 1), linear, rtol=1e-5, atol=1e-6)


def test_a_ring_with_padding_and_a_mask_looks_both_up_at_the_positions() -> None:
    cache = KeyValueCache(B, 70, ((G, D), (G, DV)), window=9, sink_tokens=2, device=DEVICE)
    tensors, _ = made({}, S=24, T=24)
    for t in range(24):
        k, v, positions = cache.append(tensors[1][:, t : t + 1], tensors[2][:, t : t + 1])
    mask = torch.rand(B, 1, 1, 24, device=DEVICE) > 0.4
    options = {
        "scale": 0.4, "window": 9, "sink_tokens": 2, "query_start": 23, "key_positions": positions,
        "lengths": torch.tensor([24, 19], device=DEVICE), "mask": mask,
    }  # fmt: skip
    assert_as_good_as_eager([tensors[0][:, 23:], k, v], options, 2)
    options["mask"] = torch.ones(B, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    assert_as_good_as_eager([tensors[0][:, 23:], k, v], options, 2)
    both = AttentionMask.padding(options.pop("lengths")) & AttentionMask.dense(mask)
    eager, triton = (
        attend(tensors[0][:, 23:], k, v, **options | {"mask": both}, backend=name) for name in ("eager", "triton")
    )
    torch.testing.assert_close(triton, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 20])
def test_tied_cache(window: int | None, dtype: torch.dtype) -> None:
    """The key is a view of the value, and one load serves both."""
    cache = TiedCache(B, 70, ((G, DV), (1, R)), window=window, device=DEVICE, dtype=dtype)
    (q, _, state, q_rope, rope), _ = made({"extra": R}, dtype, S=60, T=60)
    cache.append(state[:, :40, :, :D], state[:, :40], rope[:, :40])
    for start, end in ((40, 41), (41, 48), (48, 49)):
        k, v, k_rope, positions = cache.append(state[:, start:end, :, :D], state[:, start:end], rope[:, start:end])
        assert is_tied(k, v)
        options = {"scale": 0.4, "window": window, "query_start": start, "key_positions": positions}
        assert_as_good_as_eager([q[:, start:end], k, v, q_rope[:, start:end], k_rope], options, 2)


def test_tied_is_seen_only_in_one_memory() -> None:
    v = torch.randn(B, S, G, DV)
    assert is_tied(v[..., :D], v)
    assert is_tied(v, v)
    assert not is_tied(v[..., :D].clone(), v)
    assert not is_tied(v[..., 1 : D + 1], v)
    assert not is_tied(v.transpose(0, 2).contiguous().transpose(0, 2)[..., :D], v)
    assert not is_tied(v, v[..., :D])


def test_tied_and_untied_agree() -> None:
    tensors, options = made({"tied": True, "extra": R, "window": 30})
    untied = [tensors[0], tensors[1].clone(), *tensors[2:]]
    torch.testing.assert_close(fused(tensors, options, 3), fused(untied, options, 3), rtol=1e-5, atol=1e-6)


def test_head_scale_and_sinks_in_other_dtypes() -> None:
    tensors, options = made({"sinks": torch.linspace(0, 1, H).half(), "head_scale": torch.linspace(0, 1, H).double()})
    floats = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
    torch.testing.assert_close(fused(tensors, options, 2), fused(tensors, floats, 2))


def test_strided_and_expanded_options() -> None:
    tensors, plain = made(joined("alibi", "learned sinks", "head scale of each row", "lengths", "ring"))
    names = ("alibi_slopes", "sinks", "head_scale", "lengths", "key_positions")
    strided = plain | {name: torch.stack([plain[name], plain[name] + 1], -1)[..., 0] for name in names}
    assert not strided["sinks"].is_contiguous()
    assert torch.equal(fused(tensors, strided, 2), fused(tensors, plain, 2))
    one = {"alibi_slopes": torch.tensor(0.1), "sinks": torch.tensor(0.5), "head_scale": torch.tensor(2.0)}
    expanded = plain | {name: x.to(DEVICE).expand(H) for name, x in one.items()}
    assert_as_good_as_eager(tensors, expanded, 2)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.integers(0, 20), tokens=st.integers(1, 6), start=st.integers(0, 24), causal=st.booleans(),
    window=st.none() | st.integers(1, 9), sink_tokens=st.integers(0, 3),
)  # fmt: skip
def test_key_range_leaves_out_only_what_nobody_sees(
    keys: int, tokens: int, start: int, causal: bool, window: int | None, sink_tokens: int
) -> None:
    begin, end = key_range(keys, tokens, start, causal=causal, window=window or 0, sink_tokens=sink_tokens, ring=False)
    assert 0 <= begin <= end <= keys
    i, j = torch.arange(start, start + tokens)[:, None], torch.arange(keys)
    seen = j <= i if causal else torch.ones(tokens, keys, dtype=torch.bool)
    if window is not None:
        seen = seen & (((i - j).abs() < window) | (j < sink_tokens))
    by_anyone = seen.any(0)
    assert not by_anyone[:begin].any()
    assert not by_anyone[end:].any()
    if window is None or not sink_tokens:
        assert by_anyone[begin:end].all(), "the range could be shorter"


def test_splits_fill_the_device_and_no_more() -> None:
    assert splits_for(programs=8, keys=65536, block_s=64, slots=264) == 33
    assert splits_for(programs=8, keys=1024, block_s=64, slots=264) == 8
    assert splits_for(programs=512, keys=65536, block_s=64, slots=264) == 1
    assert splits_for(programs=8, keys=0, block_s=64, slots=264) == 1


@pytest.mark.parametrize("memory", [64, 99, 163, 227])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("widths", [(64, 64, 0), (128, 128, 0), (64, 64, 64), (512, 0, 64), (512, 512, 0)])
def test_tiles_fit_or_are_the_smallest(widths: tuple[int, int, int], size: int, memory: int) -> None:
    for rows, warp_size in product((1, 16, 64, 300), (32, 64)):
        config = decode_config(rows, *widths, size, memory * 1024, warp_size)
        fits = tile_bytes(config, *widths, size) <= memory * 1024
        assert fits or (config["BLOCK_S"] == 16 and config.num_stages == 1)


def test_torch_compile_sees_one_operator() -> None:
    tensors, options = made(joined("learned sinks", "shared part", "window and sink tokens"))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    compiled = torch.compile(lambda *x: fused(list(x), options, 2), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*tensors), fused(tensors, options, 2))
    assert len(graphs) == 1
    assert sum("decode_attention" in str(target) for target in graphs[0]) == 1


def test_opcheck() -> None:
    (q, k, v, q_rope, k_rope), options = made(joined("learned sinks", "shared part"), S=20, B=1)
    library.opcheck(
        torch.ops.attnzoo.decode_attention.default,
        (q, k, v, q_rope, k_rope, None, None, options["sinks"], *(None,) * 5, 0.5, 0.0, 9, 1, 17, 2, True),
    )


def test_a_gradient_is_refused() -> None:
    tensors, options = made({})
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="decoding has no gradient: call it under torch"):
        fused(tensors, options)
    with torch.no_grad():
        assert fused(tensors, options).isfinite().all()
    tensors, options = made({"sinks": torch.zeros(H)})
    options["sinks"].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for sinks"):
        fused(tensors, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 17}, "q must have 1 to 16 tokens, got 17"),
        ({"D": 513}, r"widths of heads must lie between 1 and 512, got \[513, 7\]"),
        ({"H": 5}, "num_kv_heads must divide num_heads, got 2 and 5"),
        ({"num_splits": 0}, "num_splits must be at least 1, got 0"),
        ({"lengths": torch.ones(3, dtype=torch.long)}, r"lengths must have shape \(2,\), got \(3,\)"),
        ({"sinks": torch.zeros(5)}, r"sinks must have shape \(6,\), got \(5,\)"),
        ({"key_positions": torch.arange(9)}, r"key_positions must have shape \(107,\), got \(9,\)"),
        ({"head_scale": torch.zeros(3, 6)}, r"head_scale must have shape \(6,\) or \(2, 6\), got \(3, 6\)"),
        ({"mask": torch.zeros(S)}, "mask must be boolean and broadcast to .* got torch.float32"),
        ({"mask": torch.ones(S + 1, dtype=torch.bool)}, r"mask must be boolean and broadcast .* \(108,\)"),
        ({"dtype": torch.float64}, "q, k and v must share float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    change = dict(change)
    sizes = {name: change.pop(name) for name in ("T", "D", "H") if name in change}
    num_splits, dtype = change.pop("num_splits", None), change.pop("dtype", torch.float32)
    tensors, options = made(change, dtype, **sizes)
    with pytest.raises(ValueError, match=message):
        fused(tensors, options, num_splits)


def test_shapes_that_do_not_fit_are_named() -> None:
    (q, k, v, q_rope, k_rope), options = made({"extra": R})
    with pytest.raises(ValueError, match=r"k must be \(B, S, G, D\) and v \(B, S, G, Dv\)"):
        fused([q, k[..., 1:], v], options)
    with pytest.raises(ValueError, match=r"k must be \(B, S, G, D\) and v \(B, S, G, Dv\)"):
        fused([q, k, v[:, 1:]], options)
    with pytest.raises(ValueError, match=r"q_rope must be \(B, T, H, R\) and k_rope \(B, S, 1, R\)"):
        fused([q, k, v, q_rope[..., 1:], k_rope], options)
    with pytest.raises(ValueError, match="q_rope and k_rope must be given together"):
        decode_attention(q, k, v, q_rope=q_rope, **options)
