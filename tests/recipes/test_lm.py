"""The decoder."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo.costs import cache_bytes
from attnzoo_recipes.lm import DecoderLM
from tests.zoo import MECHANISMS


def decoder(mechanism="kha", **options):
    torch.manual_seed(0)
    return DecoderLM(31, MECHANISMS[mechanism], **{"embed_dim": 32, "num_layers": 2, "init_std": 0.2, **options})


@pytest.fixture
def tokens():
    return torch.randint(0, 31, (3, 12))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_its_own_weights_start_alike_whatever_the_mechanism(mechanism):
    reference = decoder("mha").state_dict()
    for name, value in decoder(mechanism).state_dict().items():
        if ".attn." not in name:
            assert torch.equal(value, reference[name]), name


def test_initialisation_has_the_documented_deviations():
    model = decoder("mha", embed_dim=128, num_layers=4, init_std=0.02)
    block = model.blocks[0]
    for weight, std in (
        (model.embedding.weight, 0.02),
        (block.mlp.gate_proj.weight, 0.02),
        (block.mlp.down_proj.weight, 0.02 / 8**0.5),
        (block.attn.q_proj.weight, 0.02),
        (block.attn.o_proj.weight, 0.02 / 8**0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_tied_embeddings_are_one_matrix():
    tied, untied = decoder(), decoder(tie_embeddings=False)
    assert untied.num_parameters - tied.num_parameters == 31 * 32


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_packed_documents_do_not_see_each_other(mechanism, tokens):
    model = decoder(mechanism).double()
    boundaries = torch.tensor([0, 5, 12, 24, 33, 36], dtype=torch.int32)
    together = model(tokens, mask=attnzoo.AttentionMask.packed(boundaries)).flatten(0, 1)
    flat = tokens.flatten()[None]
    apart = [model(flat[:, a:b])[0] for a, b in itertools.pairwise(boundaries)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_decoding_with_caches_equals_the_whole(mechanism, tokens):
    model = decoder(mechanism).double()
    caches = model.init_caches(3, 12)
    parts = [model(part, caches=caches) for part in tokens.split([4, 1, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-12, rtol=0)
    growth = sum(cache.nbytes for cache in caches)
    assert growth == 3 * sum(cache_bytes(block.attn, 12, torch.float64) for block in model.blocks)


def test_recomputing_blocks_changes_no_gradient(tokens):
    found = []
    for recompute in (False, True):
        model = decoder(dropout=0.3, activation_checkpointing=recompute)
        torch.manual_seed(5)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_flops_are_those_of_the_matrix_products(tokens):
    model = decoder("mha")
    for block in model.blocks:
        block.attn.backend = "eager"
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    # flops() counts the keys that a causal query sees; the eager form multiplies all of them.
    T, H, D = 12, 4, 8
    skipped = 2 * 2 * 2 * H * D * (T * T - T * (T + 1) // 2)
    counted = counter.get_total_flops() // 3
    assert counted in (model.flops(T), model.flops(T) + skipped)


def test_compiles(tokens):
    model = decoder()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1"),
        ({"init_std": 0.0}, "init_std must be positive, got 0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        decoder(**options)


def test_attention_that_sees_the_future_is_refused():
    with pytest.raises(ValueError, match="attention must be causal=True in a decoder, got MultiHeadAttention"):
        DecoderLM(31, lambda width: attnzoo.MultiHeadAttention(width, 4, causal=False), embed_dim=32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"tokens must have shape \(B, T\), got \(5,\)"),
        (torch.zeros(1, 5), "tokens must be int64 or int32, got torch.float32"),
        (torch.full((1, 2), 31), "tokens must be ids from 0 to 30, got 31"),
        (torch.full((1, 2), -1), "tokens must be ids from 0 to 30, got -1"),
    ],
)
def test_refused_tokens(given, message):
    with pytest.raises(ValueError, match=message):
        decoder()(given)
