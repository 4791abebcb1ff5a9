"""The flash backend against stand-ins for flash-attn 2, 3 and 4: this suite runs without a GPU.

A stand-in has its package's signature, keeps a record of each call, and computes in float64 what that package
documents: causal rule and window aligned to the bottom right, window (left, right) inclusive, ALiBi by
distance, sequences cut out by cu_seqlens. The reference below knows nothing of that: it loops over queries.
"""

import importlib.machinery
import math
import sys
import types

import pytest
import torch

import attnzoo.ops.flash as flash
from attnzoo.backends import BackendUnavailable
from attnzoo.masks import AttentionMask
from attnzoo.ops.flash import flash_attention, flash_obstacle, installed
from attnzoo.ops.score_rules import ScoreRules
from tests.views import view_of

B, H, G, D = 2, 6, 3, 8


COMMON = {"softmax_scale": None, "causal": False, "softcap": 0.0}
KEYWORDS = {
    2: COMMON | {"window_size": (-1, -1), "dropout_p": 0.0, "alibi_slopes": None},
    3: COMMON | {"window_size": (-1, -1)},
    4: COMMON | {"window_size": (None, None), "learnable_sink": None},
}
"""What each version takes by keyword, with its defaults: the part of their signatures that concerns us."""


class StandIn:
    """One package's functions; `calls` holds (function name, keyword arguments)."""

    def __init__(self, version: int, returns_lse: bool) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.keywords = KEYWORDS[version]
        self.returns_lse = returns_lse

    def flash_attn_func(self, q, k, v, **given):
        options = self.filled("flash_attn_func", given)
        assert q.ndim == k.ndim == v.ndim == 4
        return self.returned(torch.stack([self.sequence(*row, options) for row in zip(q, k, v, strict=True)]))

    def flash_attn_varlen_func(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **given):
        options = self.filled("flash_attn_varlen_func", given)
        assert q.ndim == k.ndim == v.ndim == 3
        for cu, tokens, longest in (
            (cu_seqlens_q, q.shape[0], max_seqlen_q),
            (cu_seqlens_k, k.shape[0], max_seqlen_k),
        ):
            assert cu.dtype == torch.int32
            assert int(cu[0]) == 0
            assert int(cu[-1]) == tokens
            assert 0 <= int(cu.diff().min()) <= int(cu.diff().max()) <= longest
        q, k, v = (x.split(cu.diff().tolist()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k)))
        return self.returned(torch.cat([self.sequence(*part, options) for part in zip(q, k, v, strict=True)]))

    def filled(self, name, given):
        unknown = given.keys() - self.keywords.keys()
        if unknown:
            raise TypeError(f"{name}() got an unexpected keyword argument {unknown.pop()!r}")
        options = self.keywords | given
        self.calls.append((name, options))
        return options

    def returned(self, out):
        return (out, torch.zeros(())) if self.returns_lse else out

    @staticmethod
    def sequence(q, k, v, options):
        """One sequence in the packages' conventions: q (T, H, D), k (S, G, D), v (S, G, Dv)."""
        assert q.dtype in (torch.float16, torch.bfloat16)
        (T, heads, _), S = q.shape, k.shape[0]
        repeats = heads // k.shape[1]
        s = torch.einsum("thd,shd->hts", q.double(), k.double().repeat_interleave(repeats, 1))
        s = s * options["softmax_scale"]
        if options["softcap"]:
            s = options["softcap"] * torch.tanh(s / options["softcap"])
        i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)
        if options.get("alibi_slopes") is not None:
            assert options["alibi_slopes"].dtype == torch.float32
            s = s - options["alibi_slopes"].double()[:, None, None] * (i - j).abs()
        left, right = (math.inf if w in (None, -1) else w for w in options["window_size"])
        right = 0 if options["causal"] else right
        seen = (j <= i + right) & (j >= i - left)
        e = torch.exp(s).masked_fill(~seen, 0.0)
        total = e.sum(-1, keepdim=True)
        if options.get("learnable_sink") is not None:
            assert options["learnable_sink"].dtype == torch.bfloat16
            assert options["learnable_sink"].shape == (heads,)
            total = total + torch.exp(options["learnable_sink"].double())[:, None, None]
        p = e / total.masked_fill(total == 0, 1.0)
        return torch.einsum("hts,shd->thd", p, v.double().repeat_interleave(repeats, 1)).to(q.dtype)


MODULES = {
    "4": "flash_attn.cute",
    "3": "flash_attn_interface",
    "fa3-fwd": "fa3_fwd_interface",
    "2": "flash_attn",
}


@pytest.fixture
def install(monkeypatch):
    """install("2", "4") puts stand-ins in sys.modules as if these packages were there, on a Hopper GPU."""
    monkeypatch.setattr(flash, "_present_memo", {})
    monkeypatch.setattr(flash, "_module_memo", {})
    monkeypatch.setattr(flash, "device_major", lambda device: 9)
    for name in [*MODULES.values(), "flash_attn.flash_attn_interface"]:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)

    def place(*versions: str, returns_lse: bool = False) -> list[StandIn]:
        stand_ins = []
        for version in versions:
            stand_in = StandIn({"fa3-fwd": 3}.get(version) or int(version), returns_lse)
            names = [MODULES[version], *(["flash_attn.flash_attn_interface"] if version == "2" else [])]
            for name in names:
                module = types.ModuleType(name)
                module.__spec__ = importlib.machinery.ModuleSpec(name, None)
                module.flash_attn_func = stand_in.flash_attn_func
                module.flash_attn_varlen_func = stand_in.flash_attn_varlen_func
                monkeypatch.setitem(sys.modules, name, module)
            stand_ins.append(stand_in)
        return stand_ins

    return place


def inputs(T=7, S=None, dtype=torch.float16, width=D, value_width=D, grad=False):
    S = T if S is None else S
    generator = torch.Generator().manual_seed(T + 31 * S)
    shapes = ((B, T, H, width), (B, S, G, width), (B, S, G, value_width))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def reference(q, k, v, visible, *, scale=0.3, softcap=None, slopes=None, sinks=None):
    """One query at a time in float64; visible(b, i, j) with the last query at i = S - 1."""
    q, k, v = q.double(), k.double(), v.double()
    (_, T, _, _), S = q.shape, k.shape[1]
    rows = []
    for b in range(B):
        for t in range(T):
            i = S - T + t
            seen = [j for j in range(S) if visible(b, i, j)]
            for h in range(H):
                if not seen:
                    rows.append(v.new_zeros(v.shape[-1]))
                    continue
                s = scale * torch.stack([q[b, t, h] @ k[b, j, h // (H // G)] for j in seen])
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                if slopes is not None:
                    s = s - slopes[h] * torch.tensor([abs(i - j) for j in seen], dtype=torch.float64)
                weights = torch.exp(s)
                weights = weights / (weights.sum() + (0 if sinks is None else math.exp(sinks[h])))
                rows.append(weights @ v[b, seen, h // (H // G)])
    return torch.stack(rows).view(B, T, H, -1)


def asked(**changes):
    """Who sees whom and the rules of a call; `scale` is 0.3."""
    view, rules = view_of({"scale": 0.3, **changes})
    return view, ScoreRules(**rules)


def assert_rounded(out, exact, ulps=1.0):
    """Equal up to `ulps` roundings to out's dtype, since the stand-ins compute in float64."""
    budget = ulps * torch.finfo(out.dtype).eps * float(exact.detach().abs().max())
    assert float((out.double() - exact).detach().abs().max()) <= budget


def is_causal(b, i, j):
    return j <= i


@pytest.mark.parametrize("version", ["2", "3", "4", "fa3-fwd"])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 11), (1, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_each_package_with_aligned_queries(install, version, T, S, causal):
    (stand_in,) = install(version, returns_lse=version != "2")
    q, k, v = inputs(T, S, torch.bfloat16)
    assert flash_obstacle(q, k, v, *asked(causal=causal)) is None
    out = flash_attention(q, k, v, *asked(causal=causal))
    assert_rounded(out, reference(q, k, v, is_causal if causal else lambda b, i, j: True))
    name, passed = stand_in.calls[0]
    assert (name, passed["causal"], passed["softmax_scale"]) == ("flash_attn_func", causal, 0.3)
    assert set(passed["window_size"]) in ({-1}, {None})


@pytest.mark.parametrize("version", ["2", "3", "4"])
@pytest.mark.parametrize("T", [11, 4])
def test_window_counts_the_current_token(install, version, T):
    (stand_in,) = install(version)
    q, k, v = inputs(T, 11)
    for causal, passed in ((True, (2, 0)), (False, (2, 2))):
        out = flash_attention(q, k, v, *asked(causal=causal, window=3))
        inside = (lambda b, i, j: 0 <= i - j < 3) if causal else (lambda b, i, j: abs(i - j) < 3)
        assert_rounded(out, reference(q, k, v, inside))
        assert stand_in.calls[-1][1]["window_size"] == passed


@pytest.mark.parametrize("version", ["2", "3", "4"])
def test_softcap(install, version):
    (stand_in,) = install(version)
    q, k, v = inputs()
    out = flash_attention(q, k, v, *asked(softcap=0.7, scale=1.1))
    assert_rounded(out, reference(q, k, v, is_causal, scale=1.1, softcap=0.7))
    assert stand_in.calls[0][1]["softcap"] == 0.7


def test_alibi_goes_to_version_2_in_float32(install):
    four, two = install("4", "2")
    slopes = torch.tensor([2.0**-i for i in range(H)], dtype=torch.float64)
    for T, causal in ((7, True), (3, True), (3, False)):
        q, k, v = inputs(T, 7)
        out = flash_attention(q, k, v, *asked(alibi_slopes=slopes, causal=causal))
        visible = is_causal if causal else lambda b, i, j: True
        assert_rounded(out, reference(q, k, v, visible, slopes=slopes))
    assert len(two.calls) == 3
    assert not four.calls


@pytest.mark.parametrize("sinks", [0.0, torch.tensor([-2.0, -1, 0, 1, 2, 3], dtype=torch.bfloat16)])
def test_sinks_go_to_version_4(install, sinks):
    two, four = install("2", "4")
    q, k, v = inputs(5, 8)
    out = flash_attention(q, k, v, *asked(sinks=sinks))
    logits = sinks.double().tolist() if isinstance(sinks, torch.Tensor) else [sinks] * H
    assert_rounded(out, reference(q, k, v, is_causal, sinks=logits))
    assert len(four.calls) == 1
    assert not two.calls


def test_dropout_goes_to_version_2(install):
    three, two = install("3", "2")
    flash_attention(*inputs(), *asked(dropout=0.25))
    assert two.calls[0][1]["dropout_p"] == 0.25
    assert not three.calls


@pytest.mark.parametrize("version", ["3", "4"])
def test_value_width_of_its_own(install, version):
    install(version)
    q, k, v = inputs(width=16, value_width=24)
    out = flash_attention(q, k, v, *asked())
    assert out.shape == (B, 7, H, 24)
    assert_rounded(out, reference(q, k, v, is_causal))


@pytest.mark.parametrize("version", ["2", "3", "4"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("boundaries", [[0, 3, 9, 14], [0, 3, 7, 9, 14], [0, 14]])
def test_packed_documents(install, version, causal, boundaries):
    (stand_in,) = install(version, returns_lse=True)
    q, k, v = inputs(7, grad=True)
    mask = AttentionMask.packed(boundaries)
    out = flash_attention(q, k, v, *asked(causal=causal, mask=mask))

    def same_document(b, i, j):
        ends = {*boundaries, 7}
        return (j <= i or not causal) and not any(min(i, j) + 7 * b < e <= max(i, j) + 7 * b for e in ends)

    exact = reference(q, k, v, same_document)
    assert_rounded(out, exact)
    assert_gradients(out, exact, (q, k, v))
    assert stand_in.calls[0][0] == "flash_attn_varlen_func"


def test_packed_documents_with_window_and_alibi(install):
    install("2")
    q, k, v = inputs(7)
    slopes = torch.tensor([2.0**-i for i in range(H)])
    mask = AttentionMask.packed([0, 4, 7, 12, 14])
    out = flash_attention(q, k, v, *asked(mask=mask, window=2, alibi_slopes=slopes))

    def visible(b, i, j):
        document = [sum(t + 7 * b >= e for e in (4, 7, 12)) for t in (i, j)]
        return 0 <= i - j < 2 and document[0] == document[1]

    assert_rounded(out, reference(q, k, v, visible, slopes=slopes.double()))


@pytest.mark.parametrize("version", ["2", "3", "4"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 7), (1, 7), (9, 7)])
@pytest.mark.parametrize("lengths", [[7, 4], [0, 6], [7, 7]])
def test_padding_is_exact_for_padding_queries_too(install, version, causal, T, S, lengths):
    install(version)
    if causal and T > S:
        T = S
    q, k, v = inputs(T, S, grad=True)
    mask = AttentionMask.padding(lengths)
    assert flash_obstacle(q, k, v, *asked(causal=causal, mask=mask)) is None
    out = flash_attention(q, k, v, *asked(causal=causal, mask=mask))
    exact = reference(q, k, v, lambda b, i, j: (j <= i or not causal) and j < lengths[b])
    assert_rounded(out, exact)
    assert_gradients(out, exact, (q, k, v))


def assert_gradients(out, exact, tensors):
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    expected = torch.autograd.grad((exact * weights.double()).sum(), tensors)
    for mine, right in zip(got, expected, strict=True):
        # `right` was rounded once, `mine` once for each sum of two parts.
        assert_rounded(mine, right.double(), ulps=3.0)


def test_the_newest_package_that_covers_the_call_runs_it(install):
    four, three, forward_only, two = install("4", "3", "fa3-fwd", "2")
    q, k, v = inputs()
    flash_attention(q, k, v, *asked())
    assert [len(s.calls) for s in (four, three, forward_only, two)] == [1, 0, 0, 0]
    mask = AttentionMask.packed([0, 14])
    q.requires_grad_()
    flash_attention(q, k, v, *asked(mask=mask, softcap=2.0))
    assert [len(s.calls) for s in (four, three, forward_only, two)] == [1, 1, 0, 0]


def test_forward_only_wheel_serves_no_training(install):
    (stand_in,) = install("fa3-fwd")
    q, k, v = inputs(grad=True)
    assert flash_obstacle(q, k, v, *asked()) == "fa3-fwd has no backward pass"
    with pytest.raises(BackendUnavailable, match="fa3-fwd has no backward pass"):
        flash_attention(q, k, v, *asked())
    with torch.no_grad():
        flash_attention(q, k, v, *asked())
    assert len(stand_in.calls) == 1


LENGTHS = AttentionMask.padding([7, 4])
PACKED = AttentionMask.packed([0, 14])
SLOPES = torch.ones(H)


@pytest.mark.parametrize(
    ("versions", "tensors", "changes", "sentence"),
    [
        ("432", {"dtype": torch.float32}, {}, "needs float16 or bfloat16, got torch.float32"),
        ("432", {"width": 20}, {}, "flash-attn needs head widths that are multiples of 8, got 20 and 8"),
        ("432", {"T": 0}, {}, "flash-attn takes no empty tensors"),
        ("432", {}, {"window": 4, "sink_tokens": 2}, "flash-attn has no sink tokens outside a window, got 2"),
        ("432", {}, {"key_positions": torch.arange(7)}, "keys in the order of their positions"),
        ("432", {}, {"mask": AttentionMask.dense(torch.ones(7, 7).bool())}, "flash-attn takes no dense mask"),
        ("432", {}, {"mask": LENGTHS & PACKED}, "padding or packing, not both"),
        ("432", {"T": 3, "S": 7}, {"mask": PACKED}, "a packed mask is for self-attention without a cache"),
        ("432", {}, {"mask": AttentionMask.padding([7])}, "lengths must have one entry a row, got 1 for 2"),
        ("432", {}, {"mask": LENGTHS, "window": 3}, "align a window to the padded row's end"),
        ("2", {}, {"mask": LENGTHS, "alibi_slopes": SLOPES}, "measure ALiBi from the padded row's end"),
        ("4", {}, {"mask": LENGTHS, "sinks": 0.0}, "NaN for a row of length 0"),
        ("2", {}, {"softcap": 3.0, "dropout": 0.1}, "no soft-cap together with dropout"),
        ("3", {}, {"alibi_slopes": SLOPES}, "flash-attn 3 has no ALiBi"),
        ("4", {}, {"dropout": 0.1}, "flash-attn 4 has no dropout, got 0.1"),
        ("32", {}, {"sinks": 0.0}, "flash-attn 3 has no sinks; flash-attn 2 has no sinks"),
        ("4", {}, {"sinks": 1.5}, "takes sinks in bfloat16 or the number 0, got 1.5"),
        ("4", {}, {"sinks": torch.zeros(H)}, "in bfloat16 or the number 0, got torch.float32"),
        ("4", {"grad": True}, {"sinks": 0.0}, "does not give sinks a gradient in every release"),
        ("4", {"grad": True}, {"mask": PACKED, "softcap": 3.0}, "no backward pass for a soft-cap"),
        ("2", {"value_width": 16}, {}, "head widths of 8 for keys and 16 for values"),
        ("3", {"width": 96, "value_width": 128}, {}, "head widths of 96 for keys and 128 for values"),
        ("432", {"width": 264, "value_width": 264}, {}, "head widths of 264 for keys and 264 for values"),
        ("", {}, {}, "flash-attn is not installed"),
    ],
)
def test_obstacles(install, versions, tensors, changes, sentence):
    stand_ins = install(*versions)
    q, k, v = inputs(**tensors)
    obstacle = flash_obstacle(q, k, v, *asked(**changes))
    assert obstacle is not None
    assert sentence in obstacle
    with pytest.raises(BackendUnavailable, match="backend 'flash' cannot run softmax_attention"):
        flash_attention(q, k, v, *asked(**changes))
    assert not any(stand_in.calls for stand_in in stand_ins)


@pytest.mark.parametrize(
    ("version", "major", "widths", "covered"),
    [
        ("4", 8, (64, 64), False),
        ("4", 10, (128, 128), True),
        ("4", 10, (192, 128), True),
        ("4", 10, (192, 192), False),
        ("4", 9, (192, 192), True),
        ("3", 8, (64, 64), False),
        ("3", 9, (64, 256), True),
        ("3", 9, (192, 128), True),
        ("2", 7, (64, 64), False),
        ("2", 8, (256, 256), True),
        ("2", flash.ROCM, (64, 64), True),
        ("4", flash.ROCM, (64, 64), False),
    ],
)
def test_devices_and_widths(install, monkeypatch, version, major, widths, covered):
    install(version)
    monkeypatch.setattr(flash, "device_major", lambda device: major)
    q, k, v = inputs(width=widths[0], value_width=widths[1])
    obstacle = flash_obstacle(q, k, v, *asked())
    assert (obstacle is None) is covered
    if not covered:
        assert "this device" in obstacle


def test_cpu_tensors_are_refused(install, monkeypatch):
    install("2")
    monkeypatch.setattr(flash, "device_major", lambda device: None)
    assert flash_obstacle(*inputs(), *asked()) == "needs CUDA tensors, got cpu"


def test_cpu_is_no_cuda_device():
    assert flash.device_major(torch.device("cpu")) is None


def test_a_package_that_does_not_import_is_named(install, monkeypatch):
    install()

    def broken(name):
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setitem(flash._present_memo, "flash_attn_interface", True)
    monkeypatch.setattr(flash.importlib, "import_module", broken)
    sentence = flash_obstacle(*inputs(), *asked())
    assert sentence == (
        "flash-attn 3 is installed but does not import: ImportError: undefined symbol in flash_attn_interface"
    )


def test_installed_lists_what_is_there_without_importing_it(install, monkeypatch, tmp_path):
    install()
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported too early')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed() == []
    flash._present_memo.clear()
    (package / "flash_attn_interface.py").touch()
    assert installed() == [("flash-attn 2", "of unknown version")]
    flash._present_memo.clear()
    (package / "cute").mkdir()
    (package / "cute" / "__init__.py").touch()
    metadata = tmp_path / "flash_attn_4-4.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n")
    assert installed() == [("flash-attn-4", "4.0.0"), ("flash-attn 2", "of unknown version")]
    assert "flash_attn" not in sys.modules


def test_compiles_to_one_graph(install):
    install("2")
    q, k, v = inputs()
    mask = AttentionMask.packed(torch.tensor([0, 4, 14], dtype=torch.int32))

    def attend(q, k, v):
        return flash_attention(q, k, v, *asked(window=3, mask=mask))

    seen = []

    def remember(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    def plain(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        return (q.float() * options["softmax_scale"] + v.repeat_interleave(H // G, 1).float()).half()

    module = sys.modules["flash_attn"]
    module.flash_attn_varlen_func = plain
    expected = attend(q, k, v)
    out = torch.compile(attend, backend=remember, fullgraph=True)(q, k, v)
    assert len(seen) == 1
    assert torch.equal(out, expected)
