"""A cache is what it was after a call that failed, wherever it failed, and belongs to modules of its own kind."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo import AttentionMask
from attnzoo.cache import StatefulCache
from attnzoo.modules.chai import ClusteredHeadAttention
from attnzoo.rules import INTEGERS
from tests.zoo import OPTIONS, E, G, H, build, cases, names

B, ROOM = 2, 30
# Past every window of the zoo and its sink tokens, so that a ring overwrites what it holds.
PROMPT = 9
OF_TOKENS = (*names("token cache"), "chai", "mae", "rcmha", "mta", "mta-full", "selective", "forgetting-pro")
CASES = [case for case in cases() if case[1] in ("plain", "window", "window-sinks")]
CASES += [("chai", "plain"), ("chai", "window-sinks")]

every_case = pytest.mark.parametrize(("name", "option"), CASES)
one_token_and_more = pytest.mark.parametrize("tokens", [1, 4])


class Interrupted(BaseException):
    """No Exception, just as KeyboardInterrupt is none."""


def make(name: str, option: str = "plain", **more: object) -> nn.Module:
    """A mechanism with a named option in float64, for inference; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if name == "chai":
            return ClusteredHeadAttention(build("mha", **OPTIONS[option] | more), 2).eval()
        return build(name, **OPTIONS[option] | more).eval()


def sample(tokens: int, batch: int = B) -> Tensor:
    return torch.randn(batch, tokens, E, dtype=torch.float64)


def buffers(cache: object) -> tuple[Tensor, ...]:
    """The tensors that a cache holds."""
    return cache.buffers if hasattr(cache, "buffers") else cache.streams


def contents(name: str, cache: object) -> list[object]:
    """What counts in a cache: its length, its clusters, and what it holds up to that length, or all of its sums."""
    held = buffers(cache)
    if name in OF_TOKENS:
        held = tuple(buffer[:, :, : min(cache.length, buffer.shape[2])] for buffer in held)
    held += cache.state if isinstance(cache, StatefulCache) else ()
    return [cache.length, id(getattr(cache, "clusters", None)), *(tensor.clone() for tensor in held)]


def assert_same(found: list[object], expected: list[object], what: str = "") -> None:
    assert len(found) == len(expected), what
    for one, other in zip(found, expected, strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same, (what, one, other)


def filled(module: nn.Module, tokens: int = PROMPT) -> object:
    """A cache of that module with so many tokens."""
    cache = module.init_cache(B, ROOM)
    with torch.no_grad():
        module(sample(tokens), cache=cache)
    return cache


def attempt(action: Callable[[], Tensor]) -> Tensor | str:
    """What it returns, or the words of its refusal."""
    try:
        return action()
    except ValueError as refusal:
        return str(refusal)


@torch.no_grad()
def assert_go_on_alike(name: str, module: nn.Module, cache: object, untouched: object) -> None:
    """Both caches serve the same calls with the same outputs, bit for bit, whatever is done to them."""

    def both(action: Callable[[object], Tensor | None]) -> None:
        found, expected = (attempt(lambda one=one: action(one)) for one in (cache, untouched))
        assert type(found) is type(expected), (found, expected)
        assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected

    one, three = sample(1), sample(3)
    both(lambda cache: module(three, cache=cache))
    both(lambda cache: module(one, cache=cache))
    both(lambda cache: cache.reorder(torch.tensor([1, 0])))
    both(lambda cache: module(one, cache=cache))
    both(lambda cache: cache.truncate(cache.length - 2))
    both(lambda cache: module(one, cache=cache))
    both(lambda cache: module(three, cache=cache))
    both(lambda cache: cache.reset())
    both(lambda cache: module(sample(0), cache=cache))
    both(lambda cache: module(three, cache=cache))


# Calls that are refused


@contextmanager
def backend_of(module: nn.Module, backend: str) -> Iterator[None]:
    inner = getattr(module, "attn", module)
    before, inner.backend = inner.backend, backend
    try:
        yield
    finally:
        inner.backend = before


def with_backend(backend: str) -> Callable[[nn.Module, Tensor, object], None]:
    def call(module: nn.Module, x: Tensor, cache: object) -> None:
        with backend_of(module, backend):
            module(x, cache=cache)

    return call


# In float64 and on a CPU neither "flash" nor "triton" can run.
REFUSED: dict[str, Callable[[nn.Module, Tensor, object], object]] = {
    "mask of another shape": lambda module, x, cache: module(x, mask=torch.ones(3, 3, dtype=torch.bool), cache=cache),
    "mask of numbers": lambda module, x, cache: module(x, mask=torch.ones(x.shape[1], 1), cache=cache),
    "lengths of another batch": lambda module, x, cache: module(x, mask=AttentionMask.padding([9] * 3), cache=cache),
    "packed mask": lambda module, x, cache: module(x, mask=AttentionMask.packed([0, B * x.shape[1]]), cache=cache),
    "positions that are not integers": lambda module, x, cache: module(x, positions=x[..., 0], cache=cache),
    "positions of another shape": lambda module, x, cache: module(x, positions=torch.arange(7), cache=cache),
    "negative positions": lambda module, x, cache: module(x, positions=-torch.ones(x.shape[1]).long(), cache=cache),
    "another dtype": lambda module, x, cache: module(x.float(), cache=cache),
    "another width": lambda module, x, cache: module(x[..., 1:], cache=cache),
    "another batch": lambda module, x, cache: module(x[:1], cache=cache),
    "a larger batch": lambda module, x, cache: module(torch.cat([x, x[:1]]), cache=cache),
    "context": lambda module, x, cache: module(x, x, cache=cache),
    "full cache": lambda module, x, cache: module(sample(ROOM), cache=cache),
    "backend flash": with_backend("flash"),
    "backend triton": with_backend("triton"),
}


def refuses(name: str, option: str, fault: str) -> bool:
    """Whether a fault is one for that mechanism: positions need a rotation, and clustered heads have no backend."""
    if "positions" in fault:
        module = make(name, option)
        return getattr(module, "attn", module).rope is not None
    return not (name == "chai" and fault.startswith("backend"))


@pytest.mark.parametrize(
    ("name", "option", "fault"), [(*case, fault) for case in CASES for fault in REFUSED if refuses(*case, fault)]
)
def test_a_refused_call_leaves_the_cache_as_it_was(name: str, option: str, fault: str) -> None:
    module = make(name, option)
    cache = filled(module)
    untouched = copy.deepcopy(cache)
    before = contents(name, cache)
    for tokens in (1, 4):
        with torch.no_grad(), pytest.raises((ValueError, attnzoo.BackendUnavailable)):
            REFUSED[fault](module, sample(tokens), cache)
        assert_same(contents(name, cache), before, f"{tokens} tokens")
    assert_go_on_alike(name, module, cache, untouched)


# Copies and orders of rows


@every_case
def test_a_pickled_cache_goes_on_as_the_cache_does(name: str, option: str) -> None:
    module = make(name, option)
    cache = filled(module)
    assert_go_on_alike(name, module, pickle.loads(pickle.dumps(cache)), cache)


@every_case
@pytest.mark.parametrize("how", [None, copy.deepcopy])
def test_a_cache_of_inference_mode_goes_on_outside_it(
    name: str, option: str, how: Callable[[object], object] | None
) -> None:
    module = make(name, option)
    torch.manual_seed(3)
    expected = filled(module)
    torch.manual_seed(3)
    with torch.inference_mode():
        cache = filled(module)
        cache = cache if how is None else how(cache)
    for tokens in (1, 2):
        x = sample(tokens)
        # Clusters of heads are for inference.
        with torch.set_grad_enabled(name != "chai"):
            y = module(x, cache=cache)
            assert torch.equal(y, module(x, cache=expected))
        if name != "chai":
            y.sum().backward()


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_rows_are_reordered_by_integers_of_any_dtype(name: str) -> None:
    module = make(name)
    cache = filled(module)
    others = [copy.deepcopy(cache) for _ in INTEGERS]
    cache.reorder(torch.tensor([1, 0]))
    for other, dtype in zip(others, INTEGERS, strict=True):
        other.reorder(torch.tensor([1, 0], dtype=dtype))
        assert_same(contents(name, other)[2:], contents(name, cache)[2:], str(dtype))


# Calls that fail on the way


@every_case
@one_token_and_more
def test_a_hook_that_raises_leaves_the_cache_as_it_was(name: str, option: str, tokens: int) -> None:
    module, x = make(name, option), sample(tokens)
    cache = filled(module)
    untouched = copy.deepcopy(cache)
    before, raised = contents(name, cache), []

    def interrupt(*_: object) -> None:
        raise Interrupted

    parts = list(module.named_modules())
    for place, part in parts[1:]:
        for register in (part.register_forward_pre_hook, part.register_forward_hook):
            hook = register(interrupt)
            try:
                with torch.no_grad():
                    module(x, cache=cache)
            except Interrupted:
                raised.append(place)
                assert_same(contents(name, cache), before, place)
            else:
                # A part that this call does not use; the cache has moved on, as it should.
                cache = copy.deepcopy(untouched)
                before = contents(name, cache)
            finally:
                hook.remove()
    output = "head_outputs" if name == "moa" else "attn.o_proj" if name == "chai" else "o_proj"
    assert raised.count(output) == 2
    assert_go_on_alike(name, module, cache, untouched)


class InterruptAt(TorchDispatchMode):
    """Raises instead of running the at-th operator, and notes the first that writes into one of some tensors."""

    def __init__(self, at: int = 0, watched: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.at = at
        self.watched = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self.count = 0
        self.first: int | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise Interrupted
        if self.first is None and func._schema.is_mutable and isinstance(args[0], Tensor):
            storage = args[0].untyped_storage()
            self.first = self.count if storage.nbytes() and storage.data_ptr() in self.watched else None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def assert_survives_interruptions(name: str, module: nn.Module, cache: object, x: Tensor) -> None:
    """Whatever operator fails from the cache's first change on, the cache is what it was."""
    untouched, before = copy.deepcopy(cache), contents(name, cache)
    # Tables that are remembered between calls have to be there before operators are counted.
    module(x, cache=copy.deepcopy(cache))
    probe = copy.deepcopy(cache)
    with InterruptAt(watched=buffers(probe)) as whole:
        module(x, cache=probe)
    assert whole.first is not None
    for at in range(max(1, whole.first - 2), whole.count + 1):
        with pytest.raises(Interrupted), InterruptAt(at):
            module(x, cache=cache)
        assert_same(contents(name, cache), before, f"operator {at} of {whole.count}")
    assert_go_on_alike(name, module, cache, untouched)


@every_case
@one_token_and_more
def test_an_operator_that_fails_leaves_the_cache_as_it_was(name: str, option: str, tokens: int) -> None:
    module = make(name, option)
    assert_survives_interruptions(name, module, filled(module), sample(tokens))


@pytest.mark.parametrize(("cached", "tokens"), [(2, 1), (2, 2), (2, 4), (4, 1)])
def test_a_failure_while_heads_are_clustered_leaves_the_cache_as_it_was(cached: int, tokens: int) -> None:
    module = make("chai")
    cache = filled(module, cached)
    for backend in ("flash", "triton"):
        if cached + tokens < module.probe_tokens:
            before = contents("chai", cache)
            with pytest.raises(attnzoo.BackendUnavailable), backend_of(module, backend):
                module(sample(tokens), cache=cache)
            assert_same(contents("chai", cache), before)
    untouched, before = copy.deepcopy(cache), contents("chai", cache)
    with pytest.raises(ValueError, match="mask"):
        module(sample(tokens), mask=torch.ones(3, 3, dtype=torch.bool), cache=cache)
    assert_same(contents("chai", cache), before)
    with torch.no_grad():
        probe = copy.deepcopy(cache)
        with InterruptAt() as whole:
            module(sample(tokens), cache=probe)
        for at in range(1, whole.count + 1, 3):
            with pytest.raises(Interrupted), InterruptAt(at):
                module(sample(tokens), cache=cache)
            assert_same(contents("chai", cache), before, f"operator {at} of {whole.count}")
    assert_go_on_alike("chai", module, cache, untouched)


@pytest.mark.parametrize("name", names("context"))
def test_a_first_call_that_fails_leaves_an_empty_cache(name: str) -> None:
    module = make(name)
    cache = module.init_cache(B, ROOM)
    assert_survives_interruptions(name, module, cache, sample(6))


# Caches of other modules

Make = Callable[[], nn.Module]


def other(module: nn.Module, pruned: tuple[int, ...] = ()) -> nn.Module:
    """That module in float64, for inference, without some heads."""
    module = module.double().eval()
    if pruned:
        module.prune_heads(pruned)
    return module


def gqa(**options: object) -> Make:
    return lambda: other(attnzoo.GroupedQueryAttention(E, H, **{"num_kv_heads": G} | options))


def gta(**options: object) -> Make:
    return lambda: other(attnzoo.GroupedTiedAttention(E, H, G, **options))


def mla(rank: int, rotary: int, **options: object) -> Make:
    return lambda: other(attnzoo.MultiHeadLatentAttention(E, H, rank, qk_rope_head_dim=rotary, **options))


def dcmha(**options: object) -> Make:
    return lambda: other(attnzoo.DynamicallyComposableAttention(E, H, G, **options))


def linear(**options: object) -> Make:
    return lambda: other(attnzoo.LinearAttention(E, H, **{"num_kv_heads": G} | options))


def mhla(block: int, **options: object) -> Make:
    return lambda: other(
        attnzoo.MultiHeadLinearAttention(
            E, H, **{"num_kv_heads": G} | options, block_size=block, num_blocks=4, extrapolation="clamp"
        )
    )


# What differs, two makers, and the two numbers that the refusal names.
PAIRS: dict[str, tuple[Make, Make, str, str]] = {
    "window": (gqa(sliding_window=5), gqa(sliding_window=3), "5", "3"),
    "window, tied": (gta(sliding_window=5), gta(sliding_window=3), "5", "3"),
    "window, composed": (dcmha(sliding_window=5), dcmha(sliding_window=3), "5", "3"),
    "sink tokens": (gqa(sliding_window=5, sink_tokens=2), gqa(sliding_window=5, sink_tokens=1), "2", "1"),
    "window and sink tokens of one sum": (
        gqa(sliding_window=5, sink_tokens=2), gqa(sliding_window=4, sink_tokens=3), "5", "4"
    ),
    "key/value heads": (gqa(num_kv_heads=4), gqa(num_kv_heads=1), "4", "1"),
    "key/value heads, linear": (linear(num_kv_heads=4), linear(num_kv_heads=1), "4", "1"),
    "key/value heads, blocks": (mhla(4, num_kv_heads=4), mhla(4, num_kv_heads=1), "4", "1"),
    "key width": (gqa(head_dim=6), gqa(head_dim=10), "6", "10"),
    "value width": (gqa(v_head_dim=6), gqa(v_head_dim=10), "6", "10"),
    "value width, linear": (linear(v_head_dim=6), linear(v_head_dim=10), "6", "10"),
    "feature width": (linear(feature_map="hedgehog"), linear(), "16", "8"),
    "rotary width, tied": (gta(rope_head_dim=4), gta(rope_head_dim=2), "4", "2"),
    "latent width": (mla(20, 4), mla(18, 4), "20", "18"),
    "latent width, with rotary width of one sum": (mla(20, 4), mla(22, 2), "20", "22"),
    "rank of compositions": (dcmha(rank=2), dcmha(rank=1), "40", "24"),
    "block size": (mhla(4), mhla(5), "4", "5"),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [0, PROMPT])
@pytest.mark.parametrize("what", PAIRS)
def test_a_cache_of_a_module_that_differs_is_refused_with_both_sides(what: str, tokens: int) -> None:
    first, second, one, another = PAIRS[what]
    for maker, taker, numbers in ((first, second, (one, another)), (second, first, (another, one))):
        module = maker()
        cache = filled(module, tokens)
        before = [cache.length, *(buffer.clone() for buffer in buffers(cache))]
        for new in (1, 4):
            with pytest.raises(ValueError, match="cache") as refusal:
                taker()(sample(new), cache=cache)
            assert all(re.search(rf"\b{number}\b", str(refusal.value)) for number in numbers), str(refusal.value)
            assert_same([cache.length, *buffers(cache)], before)


@pytest.mark.parametrize("make_one", [gqa, linear], ids=["tokens", "states"])
def test_a_cache_from_before_heads_were_pruned_is_refused(make_one: Callable[..., Make]) -> None:
    module = make_one()()
    cache = filled(module)
    module.prune_heads([0, 1])
    with pytest.raises(ValueError, match=r"cache .*\b2\b.*\b1\b|cache .*\b1\b.*\b2\b"):
        module(sample(1), cache=cache)
    assert cache.length == PROMPT


def kind(name: str, cache: object) -> tuple[object, ...]:
    """What has to agree between a cache and a module."""
    held = tuple(
        (buffer.shape[1], buffer.shape[3]) if name in OF_TOKENS else tuple(buffer.shape[1:])
        for buffer in buffers(cache)
    )
    options = tuple(getattr(cache, option, None) for option in ("window", "sink_tokens", "block_size"))
    return type(cache).__name__, held, options


def one_of_each_kind() -> dict[tuple[object, ...], tuple[str, str]]:
    """A mechanism and an option for every kind of cache in the zoo."""
    found: dict[tuple[object, ...], tuple[str, str]] = {}
    for name, option in CASES:
        found.setdefault(kind(name, make(name, option).init_cache(B, 10)), (name, option))
    return found


@every_case
def test_caches_of_any_other_kind_are_refused(name: str, option: str) -> None:
    module, refused = make(name, option), 0
    own = kind(name, module.init_cache(B, 10))
    for other_kind, (maker, with_option) in KINDS.items():
        cache = make(maker, with_option).init_cache(B, 10)
        if other_kind == own:
            continue
        refused += 1
        with pytest.raises(ValueError, match="cache"):
            module(sample(2), cache=cache)
        assert cache.length == 0
        assert not any(bool(buffer.any()) for buffer in buffers(cache))
    assert refused == len(KINDS) - 1


KINDS = one_of_each_kind()


@every_case
def test_the_cache_of_an_equal_module_is_taken(name: str, option: str) -> None:
    module, x = make(name, option), sample(4)
    cache = make(name, option).init_cache(B, ROOM)
    own = module.init_cache(B, ROOM)
    with torch.no_grad():
        for tokens in (4, 1, 1):
            assert torch.equal(module(x[:, :tokens], cache=cache), module(x[:, :tokens], cache=own))
