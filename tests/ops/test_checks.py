"""Arguments of an operation that do not fit each other are refused, where broadcasting would take them silently."""

import pytest
import torch

from attnzoo.masks import Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.multi_token_attention import TokenMaps, multi_token_attention
from attnzoo.ops.selective_attention import selective_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention

OPERATIONS = {
    "softmax": softmax_attention,
    "sigmoid": sigmoid_attention,
    "selective": lambda q, k, v, view, **more: selective_attention(q, k, v, view, head=0, scale=1.0, **more),
    "multi token": lambda q, k, v, view, **more: multi_token_attention(
        q, k, v, TokenMaps(torch.ones(4, 2, 2)), view, scale=1.0, **more
    ),
    "composed": lambda q, k, v, view, **more: composed_attention(
        q, k, v, Composition(torch.ones(1, 4, 4)), None, view, scale=1.0, **more
    ),
}
Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8)
STATES = {
    "q and k must agree in batch and width": [(Q, K[:1], K[:1]), (Q[:1], K, K), (Q, K[..., :1], K)],
    r"k and v must agree in \(B, S, G\)": [(Q, K, K[:1]), (Q, K, K[:, :1]), (Q, K[:, :2], K)],
    "num_kv_heads must divide num_heads, got 3 and 4": [(Q, *2 * (torch.zeros(2, 3, 3, 8),))],
    "q, k and v must have 4 dimensions": [(Q[0], K[0], K[0])],
}


@pytest.mark.parametrize("name", [*OPERATIONS, "linear"])
def test_states_that_do_not_fit(name):
    linear = {"linear": lambda q, k, v, _: linear_attention(q, k, v, size=2, backend="eager")}
    for message, calls in STATES.items():
        for states in calls:
            with pytest.raises(ValueError, match=message):
                (OPERATIONS | linear)[name](*states, Visibility())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("states", "view", "message"),
    [
        ((Q.long(), K.long(), K.long()), Visibility(), "must have one floating dtype, got torch.int64"),
        ((Q, K.double(), K.double()), Visibility(), "must have one floating dtype, got torch.float32, torch.float64"),
        ((Q, K[:, :2], K[:, :2]), Visibility(), "causal attention needs T <= S, got 3 queries and 2 keys"),
        ((Q, K, K), Visibility(window=0), "view.window must be at least 1, got 0"),
        ((Q, K, K), Visibility(mask=torch.ones(3, 3).bool()), "view.mask must be an AttentionMask, got a torch.bool"),
        ((Q, K, K), None, "view must be a Visibility, got None"),
    ],
)
def test_dtypes_and_views(name, states, view, message):
    with pytest.raises(ValueError, match=message):
        OPERATIONS[name](*states, view)


@pytest.mark.parametrize("operation", [softmax_attention, sigmoid_attention])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"alibi_slopes": torch.ones(1)}, r"alibi_slopes must have shape \(4,\), got \(1,\)"),
        ({"bias": torch.ones(3, 3).bool()}, "bias must be a floating tensor, got torch.bool"),
        ({"bias": torch.ones(3, 2)}, r"bias must broadcast to \(B, H, T, S\) = \(2, 4, 3, 3\), got shape \(3, 2\)"),
    ],
)
def test_rules(operation, rules, message):
    with pytest.raises(ValueError, match=message):
        operation(Q, K, K, **rules)


def test_numbers_of_heads_and_names():
    with pytest.raises(ValueError, match=r"sinks must have shape \(4,\), got \(1,\)"):
        softmax_attention(Q, K, K, sinks=torch.ones(1))
    with pytest.raises(ValueError, match=r"logit_bias must have shape \(4,\), got \(1,\)"):
        sigmoid_attention(Q, K, K, logit_bias=torch.ones(1))
    with pytest.raises(ValueError, match="logit_bias must be a number, a tensor or 'visible', got 'visble'"):
        sigmoid_attention(Q, K, K, logit_bias="visble")


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "softmax"])
@pytest.mark.parametrize("chunk_size", [0, -1, 1.5])
def test_chunks_of_no_size(name, chunk_size):
    # With a part of the keys, so that composed attention is not softmax attention.
    states = (Q, K, K[:, :, :1]) if name == "composed" else (Q, K, K)
    with pytest.raises(ValueError, match="chunk_size must be"):
        OPERATIONS[name](*states, Visibility(), chunk_size=chunk_size)


def test_linear_attention_counts_keys():
    for more in ({}, {"causal": False, "mixing": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="need as many keys as queries, got 2 and 3"):
            linear_attention(Q, K[:, :2], K[:, :2], size=2, **more, backend="eager")
