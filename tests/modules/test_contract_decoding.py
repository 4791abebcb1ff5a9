"""What every mechanism promises about decoding: it equals the full forward, however the tokens arrive."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.cache import TokenCache
from tests.zoo import MECHANISMS, OPTIONS, E, G, H, build, cases, names

B, T = 2, 12
EXACT = 1e-12
WINDOWED = [option for option in OPTIONS if "sliding_window" in OPTIONS[option]]
BY_INDEX = [*WINDOWED, "alibi"]  # these go by the index of a token, padding included, not by its position
CASES = cases()

every_case = pytest.mark.parametrize(("name", "option"), CASES)
every_mechanism = pytest.mark.parametrize("name", MECHANISMS)
every_windowed_case = pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[1] in WINDOWED])


def make(name: str, option: str = "plain", **more: object) -> nn.Module:
    """A mechanism with a named option, in float64 unless told otherwise; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build(name, **OPTIONS[option] | more)


def untied() -> nn.Module:
    """Knocking heads on the value of a tied state alone: the one cache that no entry of the zoo has."""
    return attnzoo.KnockingHeadsTiedAttention(E, H, G, knock_scope="value").double()


def sample(batch: int = B, tokens: int = T) -> Tensor:
    return torch.randn(batch, tokens, E, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


@torch.no_grad()
def decode(module: nn.Module, x: Tensor, chunks: list[int] | None = None, cache: TokenCache | None = None) -> Tensor:
    """Outputs of x fed in chunks of these sizes, by default one by one."""
    cache = module.init_cache(x.shape[0], x.shape[1]) if cache is None else cache
    chunks = [1] * x.shape[1] if chunks is None else chunks
    return torch.cat([module(chunk, cache=cache) for chunk in x.split(chunks, dim=1)], dim=1)


def random_chunks(total: int, seed: int) -> list[int]:
    """Sizes of at least 1 that add up to total; among the seeds some exceed every window of the zoo."""
    draw, sizes = random.Random(seed), []
    while (left := total - sum(sizes)) > 0:
        sizes.append(draw.randint(1, min(left, 8)))
    return sizes


# Decoding equals the full forward


@every_case
def test_one_by_one_equals_the_full_forward(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    assert apart(decode(module, x), module(x)) <= EXACT


@every_case
@pytest.mark.parametrize("seed", range(4))
def test_random_chunks_equal_the_full_forward(name: str, option: str, seed: int) -> None:
    module, x = make(name, option), sample(tokens=23)
    assert apart(decode(module, x, random_chunks(23, seed)), module(x)) <= EXACT


@every_case
def test_calls_without_tokens_change_nothing(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    cache = module.init_cache(B, T)
    assert apart(decode(module, x, [0, 4, 0, 1, 0, 5, 0, 2, 0], cache), module(x)) <= EXACT
    assert cache.length == T


@every_case
def test_a_larger_cache_and_an_eager_backend_change_nothing(name: str, option: str) -> None:
    module, x = make(name, option, backend="eager"), sample()
    assert apart(decode(module, x, [5, 1, 6], module.init_cache(B, 3 * T)), make(name, option)(x)) <= EXACT


@pytest.mark.parametrize("chunks", [None, [4, 1, 5, 2]], ids=["one-by-one", "chunks"])
def test_a_key_that_only_the_value_path_changes_is_cached_apart(chunks: list[int] | None) -> None:
    module, x = untied(), sample()
    assert apart(decode(module, x, chunks), module(x)) <= EXACT


@every_mechanism
def test_rows_decode_independently_and_an_empty_batch_too(name: str) -> None:
    module, x = make(name), sample(3)
    assert apart(decode(module, x)[1:2], decode(module, x[1:2])) <= EXACT
    assert decode(module, x[:0]).shape == (0, T, E)


@every_mechanism
def test_inference_mode_decodes_the_same(name: str) -> None:
    module, x = make(name), sample()
    with torch.inference_mode():
        inferred = decode(module, x)
    assert torch.equal(inferred, decode(module, x))


@every_case
def test_the_rotation_continues_and_explicit_positions_are_taken(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    positions = torch.stack([torch.arange(T) + 3, torch.arange(T) * 2])
    cache = module.init_cache(B, T)
    parts = [module(x[:, t : t + 3], positions=positions[:, t : t + 3], cache=cache) for t in range(0, T, 3)]
    assert apart(torch.cat(parts, dim=1), module(x, positions=positions)) <= EXACT


# Masks


@pytest.mark.parametrize(("name", "option"), cases("dense mask", "masks of earlier queries"))
def test_a_mask_covers_cached_and_new_keys(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    keep = torch.rand(B, H, T, T) < 0.7
    cache = module.init_cache(B, T)
    parts, start = [], 0
    for size in (5, 1, 4, 1, 1):
        stop = start + size
        parts.append(module(x[:, start:stop], mask=keep[:, :, start:stop, :stop], cache=cache))
        start = stop
    y = torch.cat(parts, dim=1)
    assert apart(y, module(x, mask=keep)) <= EXACT
    assert apart(y, module(x)) > 1e-3


def decode_after_padding(module: nn.Module, x: Tensor, prompt: int, lengths: list[int]) -> Tensor:
    """New tokens' outputs after a prompt of which row b has lengths[b] tokens and padding to its right."""
    cache = module.init_cache(*x.shape[:2])
    module(x[:, :prompt], mask=AttentionMask.padding(lengths), cache=cache)
    index, real = torch.arange(x.shape[1]), torch.tensor(lengths)[:, None]
    keep = ((index < real) | (index >= prompt))[:, None, None]
    outputs = []
    for t in range(prompt, x.shape[1]):
        positions = real + t - prompt
        outputs.append(module(x[:, t : t + 1], mask=keep[..., : t + 1], positions=positions, cache=cache))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    ("name", "option"), [case for case in cases("dense mask", "padded prompt") if case[1] not in BY_INDEX]
)
def test_decoding_after_a_padded_prompt_is_decoding_without_the_padding(name: str, option: str) -> None:
    module, x, prompt, lengths = make(name, option), sample(), 7, [7, 4]
    y = decode_after_padding(module, x, prompt, lengths)
    for row, length in enumerate(lengths):
        real = torch.cat([x[row : row + 1, :length], x[row : row + 1, prompt:]], dim=1)
        assert apart(y[row : row + 1], module(real)[:, length:]) <= EXACT


@every_case
def test_padding_lengths_count_cached_keys(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    cache = module.init_cache(B, T)
    module(x[:, :8], cache=cache)
    y = module(x[:, 8:], mask=AttentionMask.padding([T, 10]), cache=cache)
    assert apart(y, module(x, mask=AttentionMask.padding([T, 10]))[:, 8:]) <= EXACT
    assert apart(y[1, 2:], module(x)[1, 10:]) > 1e-3


# Size


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cache_takes_the_bytes_that_the_formulas_say(name: str, option: str, dtype: torch.dtype) -> None:
    module = make(name, option)
    cache = module.init_cache(3, 40, dtype=dtype)
    assert cache.nbytes == 3 * module.state_bytes(40, dtype)
    assert cache.max_length == 40
    assert cache.length == 0
    if name in names("token cache"):
        options = OPTIONS[option]
        tokens = options["sliding_window"] + options.get("sink_tokens", 0) if option in WINDOWED else 40
        assert cache.nbytes == 3 * tokens * module.cache_bytes_per_token(dtype)


def test_a_key_cached_apart_takes_the_bytes_that_the_formula_says() -> None:
    module = untied()
    D, rotary = module.head_dim, module.rope_head_dim
    per_token = 8 * (G * (2 * D - rotary) + rotary)
    assert module.cache_bytes_per_token(torch.float64) == per_token
    assert module.init_cache(3, 40).nbytes == 3 * 40 * per_token


@every_windowed_case
def test_a_ring_buffer_forgets_and_yet_equals_the_window(name: str, option: str) -> None:
    tokens = 40
    module, x = make(name, option), sample(tokens=tokens)
    cache, linear = module.init_cache(B, tokens), make(name).init_cache(B, tokens)
    before = cache.nbytes
    assert apart(decode(module, x, [9] + [1] * 20 + [2, 9], cache), module(x)) <= EXACT
    assert cache.length == tokens
    assert cache.nbytes == before
    # Beside its tokens a cache may have a state of fixed size.
    held, whole = (sum(buffer.nbytes for buffer in one.buffers) for one in (cache, linear))
    assert held == whole * cache.capacity / tokens <= whole / 4
    assert cache.nbytes - held == linear.nbytes - whole


# Reset, truncate, reorder


@every_case
def test_reset_starts_anew(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    cache = module.init_cache(B, T)
    decode(module, sample(), cache=cache)
    cache.reset()
    assert cache.length == 0
    assert apart(decode(module, x, [3, 1, 8], cache), module(x)) <= EXACT


@pytest.mark.parametrize(("name", "option"), [case for case in cases("token cache") if case[1] not in WINDOWED])
@pytest.mark.parametrize("length", [0, 5, 8])
def test_truncate_takes_tokens_back(name: str, option: str, length: int) -> None:
    module, x, draft = make(name, option), sample(), sample()
    cache = module.init_cache(B, T)
    decode(module, torch.cat([x[:, :length], draft[:, length:8]], dim=1), cache=cache)
    cache.truncate(length)
    assert cache.length == length
    assert apart(decode(module, x[:, length:], cache=cache), module(x)[:, length:]) <= EXACT


@pytest.mark.parametrize(("name", "option"), [case for case in cases("token cache") if case[1] in WINDOWED])
def test_a_ring_buffer_is_truncated_only_while_nothing_is_lost(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    cache = module.init_cache(B, T)
    decode(module, x[:, :5], [5], cache)
    cache.truncate(3)
    assert apart(decode(module, x[:, 3:], cache=cache), module(x)[:, 3:]) <= EXACT
    with pytest.raises(ValueError, match=f"length must be {T}: the ring buffer of {cache.capacity} tokens"):
        cache.truncate(10)
    assert cache.length == T
    cache.truncate(0)
    assert apart(decode(module, x, cache=cache), module(x)) <= EXACT


@every_mechanism
@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_refuses_what_is_not_there(name: str, length: int) -> None:
    module = make(name)
    cache = module.init_cache(B, T)
    decode(module, sample(tokens=5), cache=cache)
    with pytest.raises(ValueError, match=f"length must lie between 0 and the 5 cached tokens, got {length}"):
        cache.truncate(length)
    assert cache.length == 5


@every_case
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 0]], ids=["permutation", "beams"])
def test_reorder_continues_other_rows(name: str, option: str, index: list[int]) -> None:
    module, prompt, rest = make(name, option), sample(3, 7), sample(3, 5)
    cache = module.init_cache(3, T)
    decode(module, prompt, cache=cache)
    cache.reorder(torch.tensor(index))
    assert apart(decode(module, rest, cache=cache), module(torch.cat([prompt[index], rest], dim=1))[:, 7:]) <= EXACT


@every_mechanism
@pytest.mark.parametrize("index", [torch.tensor([0]), torch.zeros(B), torch.ones(B, dtype=torch.bool)])
def test_reorder_refuses_what_is_no_index_of_rows(name: str, index: Tensor) -> None:
    cache = make(name).init_cache(B, T)
    with pytest.raises(ValueError, match=f"index must hold {B} integers, got {index.dtype} of shape"):
        cache.reorder(index)


# Refusals: none of them leaves a trace in the cache


@every_case
def test_a_full_cache_refuses_and_stays_as_it_was(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    cache = module.init_cache(B, T)
    decode(module, x[:, :10], cache=cache)
    message = f"cache is full: 10 cached and 3 new tokens exceed its max_length {T}"
    with pytest.raises(ValueError, match=message):
        module(sample(tokens=3), cache=cache)
    assert cache.length == 10
    assert apart(decode(module, x[:, 10:], cache=cache), module(x)[:, 10:]) <= EXACT


@pytest.mark.parametrize("name", names("token cache"))
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"batch_size": B + 1}, r"cache was made for states .*\(3, 12, .*, got \(2, 12, .*"),
        ({"dtype": torch.bfloat16}, r"cache was made for states .* in torch.bfloat16 on cpu, got .* in torch.float64"),
        ({"device": "meta"}, r"cache was made for states .* on meta, got .* on cpu"),
    ],
    ids=["batch", "dtype", "device"],
)
def test_a_cache_for_something_else_is_refused(name: str, made: dict[str, object], message: str) -> None:
    module = make(name)
    cache = module.init_cache(**{"batch_size": B, "max_length": T} | made)
    with pytest.raises(ValueError, match=message):
        module(sample(), cache=cache)
    assert cache.length == 0


FOREIGN = [("mha", "gqa"), ("gqa", "mqa"), ("gqa", "gta"), ("kha", "kha-gta"), ("gta", "gqa"), ("kha-gta", "kha")]


@pytest.mark.parametrize(("name", "other"), FOREIGN)
def test_the_cache_of_another_mechanism_is_refused(name: str, other: str) -> None:
    cache = make(other).init_cache(B, T)
    with pytest.raises(ValueError, match=r"cache (must come from this module's init_cache|was made for states)"):
        make(name)(sample(), cache=cache)
    assert cache.length == 0


def test_tied_and_untied_caches_are_not_interchangeable() -> None:
    for module, cache in [(untied(), make("gta").init_cache(B, T)), (make("kha-gta"), untied().init_cache(B, T))]:
        with pytest.raises(ValueError, match="cache must come from this module's init_cache, got a "):
            module(sample(), cache=cache)
        assert cache.length == 0


@every_mechanism
@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"causal": False}, {}, "cache needs a module with causal=True, got causal=False"),
        ({}, {"context": torch.ones(B, 3, E)}, "context needs a module with causal=False"),
        ({}, {"mask": AttentionMask.packed([0, 7, B * T])}, "mask must not be packed when cache is given"),
    ],
    ids=["bidirectional", "context", "packed"],
)
def test_a_call_that_a_cache_cannot_serve_is_refused(
    name: str, options: dict[str, object], call: dict[str, object], message: str
) -> None:
    if "context" in call and name not in names("context"):
        message = "context must be None|context needs num_static=0 and no cache"
    if options and name == "static-context":
        message = "cache must hold static tokens"  # it takes one that does
    if options and name not in names("bidirectional"):
        with pytest.raises(ValueError, match=r"causal must be True: .*, got causal=False"):
            make(name, **options)
        return
    module = make(name, **options)
    cache = module.init_cache(B, T)
    with pytest.raises(ValueError, match=message):
        module(sample(), cache=cache, **call)
    assert cache.length == 0


@every_mechanism
@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [(-1, T, "batch_size must not be negative, got -1"), (B, 0, "max_length must be at least 1, got 0")],
)
def test_a_cache_of_no_size_is_refused(name: str, batch: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name).init_cache(batch, length)


# Gradients and precision


@every_case
def test_no_gradient_flows_through_a_cache(name: str, option: str) -> None:
    module, old, new = make(name, option), sample(tokens=6).requires_grad_(), sample(tokens=3).requires_grad_()
    cache = module.init_cache(B, T)
    module(old, cache=cache)
    assert not any(stream.requires_grad for stream in cache.buffers)
    to_old, to_new = torch.autograd.grad(module(new, cache=cache).sum(), [old, new], allow_unused=True)
    assert to_old is None
    assert bool(to_new.any())


def half_precision_budget(name: str, option: str) -> tuple[Tensor, Tensor, float]:
    """Input in bfloat16, output in float64, and twice the error of the eager full forward in bfloat16."""
    eager = make(name, option, backend="eager", dtype=torch.bfloat16)
    x = sample().bfloat16()
    exact = copy.deepcopy(eager).double()(x.double()).detach()
    floor = torch.finfo(torch.bfloat16).eps / 2 * float(exact.abs().max())
    return x, exact, 2 * apart(eager(x).double(), exact) + floor


@every_case
@pytest.mark.parametrize("chunks", [None, [5, 1, 6]], ids=["one-by-one", "chunks"])
def test_bfloat16_decoding_is_as_good_as_the_full_forward(name: str, option: str, chunks: list[int] | None) -> None:
    x, exact, budget = half_precision_budget(name, option)
    y = decode(make(name, option, dtype=torch.bfloat16), x, chunks)
    assert y.dtype == torch.bfloat16
    assert apart(y.double(), exact) <= budget


@every_case
def test_autocast_decodes_with_a_half_precision_cache(name: str, option: str) -> None:
    x, exact, budget = half_precision_budget(name, option)
    module = make(name, option, dtype=torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = decode(module, x.float(), cache=module.init_cache(B, T, dtype=torch.bfloat16))
    assert apart(y.double(), exact) <= budget
