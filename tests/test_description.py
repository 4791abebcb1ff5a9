"""Mechanisms as plain types and back."""

import copy
import json
import pickle

import pytest
import torch

import attnzoo
from tests import zoo


def again(attn):
    """The module that the description makes, with the weights."""
    made = attnzoo.build(json.loads(json.dumps(attnzoo.describe(attn))), dtype=torch.float64)
    made.load_state_dict(attn.state_dict())
    return made.train(attn.training)


@pytest.mark.parametrize(("name", "option"), zoo.cases())
def test_round_trip(name, option):
    attn = zoo.build(name, **zoo.OPTIONS[option]).eval()
    made = again(attn)
    assert type(made) is type(attn)
    assert attnzoo.describe(made) == attnzoo.describe(attn)
    assert repr(made) == repr(attn)
    x = torch.randn(2, 11, zoo.E, dtype=torch.float64)
    assert torch.equal(made(x), attn(x))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
MORE = {
    "positions": lambda: attnzoo.GroupedQueryAttention(32, 4, 2, 6, v_head_dim=5),
    "defaults": lambda: attnzoo.MultiHeadAttention(32, 4),
    "no rotation": lambda: attnzoo.MultiHeadAttention(32, 4, rope=False),
    "numpy": lambda: attnzoo.MultiQueryAttention(32, torch.tensor(4).numpy()[()], scale=torch.tensor(0.5).numpy()[()]),
    "scaled rotation": lambda: attnzoo.MultiQueryAttention(32, 4, rope=attnzoo.Rotary(5e5, 4, "interleaved", YARN)),
    "cross": lambda: attnzoo.GroupedQueryAttention(32, 4, 2, kdim=7, vdim=9, causal=False, rope=None),
    "own frequencies": lambda: attnzoo.MultiHeadLatentAttention(
        32, 4, 8, qk_rope_head_dim=4, rope_kv_heads=2, num_kv_heads=2, rope_inv_freq=torch.rand(2, 2)
    ),
    "class token": lambda: attnzoo.TABAttention(32, gate_rows=(0, 1)),
    "clusters": lambda: attnzoo.ClusteredHeadAttention(attnzoo.MultiHeadAttention(32, 4, bias=False), 2),
    "partial": lambda: attnzoo.StaticContextAttention.from_joint(attnzoo.GroupedQueryAttention(32, 4, 2)),
    "folded": lambda: attnzoo.KnockingHeadsAttention(32, 4, 2, variant="linear", qk_norm=True).fold(),
    "converted": lambda: attnzoo.conversion.mha2mla(
        attnzoo.GroupedQueryAttention(32, 4, 2), rope_dim=4, kv_rank=6, rope_select="high"
    )[0],
}


@pytest.mark.parametrize("made", MORE.values(), ids=MORE)
def test_round_trip_of_other_calls(made):
    attn = made().double().eval()
    copied = again(attn)
    assert repr(copied) == repr(attn)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    context = (torch.randn(1, 5, 7, dtype=torch.float64), torch.randn(1, 5, 9, dtype=torch.float64))
    call = {"context": context} if getattr(attn, "kdim", 32) == 7 else {}
    assert torch.equal(copied(x, **call), attn(x, **call))


def test_every_public_mechanism_is_described_here():
    described = {type(zoo.build(name)).__name__ for name in zoo.MECHANISMS}
    described |= {type(made()).__name__ for made in MORE.values()}
    modules = [getattr(attnzoo, name) for name in attnzoo.__all__ if isinstance(getattr(attnzoo, name), type)]
    assert {cls.__name__ for cls in modules if issubclass(cls, torch.nn.Module)} <= described


@pytest.mark.parametrize("name", [name for name in zoo.MECHANISMS if name not in ("rcmha", "mta", "mta-full")])
def test_pruned_heads(name):
    attn = zoo.build(name).eval()
    # The head that selects cannot be pruned.
    head = 0 if getattr(attn, "selection_head", None) == 1 else 1
    attn.prune_heads([head])
    assert attnzoo.describe(attn)["pruned_heads"] == [head]
    made = again(attn)
    x = torch.randn(2, 11, zoo.E, dtype=torch.float64)
    assert made.pruned_heads == (head,)
    assert torch.equal(made(x), attn(x))


def test_options_that_were_set_later():
    attn = zoo.build("mla", dropout=0.2)
    attn.dropout, attn.backend, attn.absorb = 0.1, "eager", True
    attn.causal = False
    made = again(attn)
    assert (made.dropout, made.backend, made.absorb, made.causal) == (0.1, "eager", True, False)
    assert attnzoo.describe(attn)["set"] == {"dropout": 0.1, "backend": "eager", "absorb": True, "causal": False}


def test_what_a_decoder_sets():
    for version in (1, 2):
        attn = attnzoo.DifferentialAttention(32, 4, version=version)
        attn.depth = 3
        made = attnzoo.build(attnzoo.describe(attn))
        assert (made.depth, made.lambda_init) == (3, attn.lambda_init)


def test_frequencies_that_were_loaded():
    def module(row):
        return attnzoo.MultiHeadLatentAttention(32, 4, 8, qk_rope_head_dim=4, rope_inv_freq=torch.tensor([row]))

    attn, other = module([0.1, 0.7]), module([0.3, 1 / 3])
    attn.load_state_dict(other.state_dict())
    assert attnzoo.describe(attn)["set"]["rope_inv_freq"] == [list(row) for row in other.rope_inv_freq]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda attn: pickle.loads(pickle.dumps(attn))])
@pytest.mark.parametrize("name", ["gqa", "kha", "mla"])
def test_copies_are_described(name, copied):
    attn = zoo.build(name)
    assert attnzoo.describe(copied(attn)) == attnzoo.describe(attn)


def test_half_precision_is_not_described():
    attn = zoo.build("mla")
    assert attnzoo.describe(attn.bfloat16()) == attnzoo.describe(attn.double())
    assert attnzoo.build(attnzoo.describe(attn), dtype=torch.bfloat16).o_proj.weight.dtype is torch.bfloat16
    assert attnzoo.build(attnzoo.describe(attn), device="meta").o_proj.weight.is_meta


class Own(attnzoo.MultiHeadAttention):
    pass


def with_adapter():
    attn = zoo.build("gqa")
    attn.q_proj = torch.nn.Sequential(attn.q_proj)
    return attn


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Own(32, 4), r"attn must be a mechanism of attnzoo to be described, got .*\.Own"),
        (lambda: torch.nn.Linear(2, 2), "got torch.nn.modules.linear.Linear"),
        (with_adapter, r"GroupedQueryAttention with q_proj.* added, replaced or missing"),
    ],
)
def test_what_cannot_be_described(made, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.describe(made())


GQA = {"class": "GroupedQueryAttention", "arguments": {"embed_dim": 32, "num_heads": 4}}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "class must be one of"),
        ({**GQA, "code": "import os"}, "must hold class, arguments"),
        ({**GQA, "class": "os.system"}, r"class must be one of MultiHeadAttention, .*, got 'os.system'"),
        ({**GQA, "class": "Rotary"}, "class must be one of"),
        ({**GQA, "class": "torch.nn.Linear"}, "class must be one of"),
        ({**GQA, "class": ["MultiHeadAttention"]}, "class must be one of"),
        ({**GQA, "arguments": [32, 4]}, "must hold class, arguments"),
        ({**GQA, "arguments": {"embed_dim": 32}}, "cannot be built: TypeError"),
        ({**GQA, "arguments": {"embed_dim": "32", "num_heads": 4}}, "embed_dim must be int, got '32'"),
        ({**GQA, "arguments": {"embed_dim": 32, "num_heads": 5}}, "num_heads must divide embed_dim"),
        ({**GQA, "arguments": {**GQA["arguments"], "heads": 4}}, "'heads' is no option of GroupedQueryAttention"),
        ({**GQA, "arguments": {**GQA["arguments"], "device": "cuda"}}, "arguments must not hold device"),
        ({**GQA, "arguments": {**GQA["arguments"], "rope": {"class": "os.system", "arguments": {}}}}, "class must be"),
        ({**GQA, "arguments": {**GQA["arguments"], "rope": {"class_path": "os.system"}}}, "'class_path' is no option"),
        ({**GQA, "arguments": {**GQA["arguments"], "rope": GQA}}, "rope must be"),
        ({**GQA, "set": {"forward": "os.system"}}, "'forward' is no option of GroupedQueryAttention"),
        (
            {**GQA, "set": {"bias": True}},
            "set must hold arguments that can be set on a GroupedQueryAttention, got bias",
        ),
        ({**GQA, "set": {"causal": 1}}, "set causal must be bool, got 1"),
        ({**GQA, "set": ["causal"]}, "must hold class, arguments"),
        ({**GQA, "pruned_heads": [4]}, "indices must lie between 0 and 3, got 4"),
        ({**GQA, "pruned_heads": ["0"]}, "pruned_heads must be int"),
        ({**GQA, "pruned_heads": 1}, "must hold class, arguments"),
    ],
)
def test_what_cannot_be_built(description, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.build(description)
