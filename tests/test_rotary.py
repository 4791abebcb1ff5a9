"""Rotary embedding against stored figures of transformers, and its identities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo.rotary import Rotary, rotary_range_table, rotary_table, rotate

GOLDEN = Path(__file__).parent / "golden" / "rope.safetensors"
with safe_open(GOLDEN, "pt") as _file:
    CONFIG = json.loads(_file.metadata()["config"])
    TENSORS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118  (no mapping)
DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}


def stored(kind, style="half", dim=None):
    """The Rotary of a stored case, and its sequence length."""
    settings = dict(CONFIG["types"][kind])
    length, theta = settings.pop("seq_len"), settings.pop("rope_theta")
    if settings["rope_type"] == "dynamic":
        settings["max_position_embeddings"] = CONFIG["max_position_embeddings"]
    return Rotary(theta, dim, style, settings), length


@pytest.mark.parametrize("kind", CONFIG["types"])
def test_frequencies_of_transformers(kind):
    rotary, length = stored(kind)
    frequencies, factor = rotary.frequencies(16, length)
    torch.testing.assert_close(frequencies, TENSORS[f"output.inv_freq.{kind}"], atol=0, rtol=1e-9)
    assert factor == pytest.approx(TENSORS[f"output.attention_factor.{kind}"].item(), rel=1e-9)


def test_partial_frequencies_of_transformers():
    rotary, _ = stored("default", dim=8)
    torch.testing.assert_close(rotary.frequencies(8)[0], TENSORS["output.inv_freq.partial"], atol=0, rtol=1e-9)


@pytest.mark.parametrize("key", [name for name in TENSORS if name.startswith(("output.half", "output.inter"))])
def test_rotations_of_transformers(key):
    _, style, kind = key.split(".")
    rotary, length = stored(kind, style)
    assert_rotation(key, rotary, length, 16)


def test_partial_rotation_of_transformers():
    assert_rotation("output.partial_half.default", stored("default", dim=8)[0], None, 8)


def assert_rotation(key, rotary, length, width):
    x = TENSORS["input.x"].double().transpose(1, 2)
    table = rotary_table(rotary, width, TENSORS["input.position_ids"], length=length, **DOUBLE)
    torch.testing.assert_close(rotate(x, *table, rotary.style).transpose(1, 2), TENSORS[key], atol=1e-9, rtol=0)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(style):
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    rotary = Rotary(style=style)

    def score(a, b):
        turned = [rotate(x, *rotary_table(rotary, 16, torch.tensor([p]), **DOUBLE), style) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), atol=1e-8, rtol=0)


def test_a_rotation_keeps_lengths_and_position_zero_changes_nothing():
    x = torch.randn(2, 5, 3, 16).double()
    table = rotary_table(Rotary(), 16, torch.arange(5), **DOUBLE)
    y = rotate(x, *table)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])


def test_interleaved_to_half_is_interleaved_in_another_order():
    x = torch.randn(2, 5, 3, 16).double()
    tables = {s: rotary_table(Rotary(style=s), 16, torch.arange(5), **DOUBLE) for s in ("interleaved", "half")}
    pairs = rotate(x, *tables["interleaved"], "interleaved")
    halves = rotate(x, *tables["half"], "interleaved_to_half")
    torch.testing.assert_close(torch.cat([pairs[..., 0::2], pairs[..., 1::2]], -1), halves)


def test_far_positions_are_exact():
    position, width = 1_000_003, 8
    own, other = rotary_table(Rotary(), width, torch.tensor([position]), dtype=torch.float32, device="cpu")
    for i in range(width // 2):
        angle = position * 10000.0 ** (-2 * i / width)
        assert own[0, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert other[0, i + width // 2].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_the_remembered_table_equals_the_direct_one_while_it_grows():
    for start, stop in ((0, 10), (5, 300), (290, 2000), (0, 3)):
        remembered = rotary_range_table(Rotary(theta=123.0), 16, start, stop, **DOUBLE)
        direct = rotary_table(Rotary(theta=123.0), 16, torch.arange(start, stop), **DOUBLE)
        assert all(torch.equal(a, b) for a, b in zip(remembered, direct, strict=True))


def test_a_table_first_made_for_inference_serves_training():
    module = attnzoo.MultiHeadAttention(32, 4, rope=Rotary(theta=321.0))
    x = torch.randn(2, 6, 32)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.q_proj.weight.grad.isfinite().all()


def test_casting_a_module_does_not_round_its_angles():
    module = attnzoo.MultiHeadAttention(32, 4).to(torch.bfloat16).double()
    fresh = attnzoo.MultiHeadAttention(32, 4).double()
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(1, 300, 32).double()
    assert torch.equal(module(x), fresh(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 1.0}, "theta must be finite and greater than 1, got 1"),
        ({"dim": 7}, "dim must be even and at least 2 to be rotated, got 7"),
        ({"style": "halves"}, "style must be one of 'half', 'interleaved', 'interleaved_to_half', got 'halves'"),
        ({"scaling": {"rope_type": "linar"}}, "must be one of default, linear, .*got 'linar'"),
        ({"scaling": {"rope_type": "linear"}}, "scaling of type 'linear' needs the key 'factor'"),
        ({"scaling": {"rope_type": "linear", "factor": 0.5}}, "must be at least 1, got 0.5"),
        ({"scaling": {"rope_type": "linear", "factor": 2, "low": 1}}, "scaling of type 'linear' has no key 'low'"),
        ({"scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' needs the key 'low_freq_factor'"),
        (
            {
                "scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                    "original_max_position_embeddings": 8,
                }
            },
            "'low_freq_factor'. must be less than high_freq_factor, got 4 and 1",
        ),
        ({"scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, "needs the key 'factor' or"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2}}, "needs the key 'max_position_embeddings'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Rotary(**options)


def test_numbers_of_numpy_are_numbers():
    short, length = [np.float32(1.0)] * 4, np.int64(64)
    for scaling in (
        {"rope_type": "linear", "factor": np.float32(2)},
        {"rope_type": "dynamic", "factor": np.int64(2), "max_position_embeddings": length},
        {"rope_type": "longrope", "short_factor": short, "long_factor": short, "factor": np.float64(2),
         "original_max_position_embeddings": length},
    ):  # fmt: skip
        rope = Rotary(scaling=scaling)
        assert hash(rope) == hash(Rotary(scaling=dict(rope.scaling)))
        attn = attnzoo.MultiHeadAttention(16, 2, rope=rope)
        assert attn(torch.randn(1, 3, 16)).shape == (1, 3, 16)


def test_equal_rotations_have_one_hash():
    one, other = ({"type": "linear", "factor": 2}, {"factor": 2.0, "rope_type": "linear"})
    assert Rotary(scaling=one) == Rotary(scaling=other)
    assert hash(Rotary(scaling=one)) == hash(Rotary(scaling=other))


def test_a_theta_beside_theta_is_refused():
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    with pytest.raises(ValueError, match=r"scaling\['rope_theta'\] must be theta, got 500000.0 and 10000.0"):
        Rotary(scaling=scaling)
    assert torch.equal(Rotary(5e5, scaling=scaling).frequencies(8)[0], Rotary(5e5).frequencies(8)[0] / 2)


@pytest.mark.parametrize("kind", CONFIG["types"])
def test_the_default_device_means_nothing_to_frequencies(kind):
    rotary, length = stored(kind)
    with torch.device("meta"):
        assert rotary.frequencies(16, length)[0].device.type == "cpu"


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="dim must be at most head_dim, got 16 and 8"):
        attnzoo.MultiHeadAttention(32, 4, rope=Rotary(dim=16))
    with pytest.raises(ValueError, match="head_dim must be even and at least 2 to be rotated, got 7"):
        attnzoo.MultiHeadAttention(28, 4)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="positions must not be negative, got -1"):
        rotary_table(Rotary(), 8, torch.tensor([-1, 2]), **DOUBLE)
