"""What our modules are compared with: a floor, two ways to cache, and other libraries' classes.

All hold the same weights and compute the same function, apart from the rotation, which the floor and
torch.nn.MultiheadAttention do not have. No projection has a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THETA = 10000.0


@dataclass(frozen=True)
class Weights:
    """Projections of one attention layer, head-major: q (H D, E), k and v (G D, E), o (E, H D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_kv_heads: int

    @classmethod
    def random(cls, embed_dim: int, num_heads: int, num_kv_heads: int, seed: int = 0) -> Weights:
        """Entries of variance 1 / E."""
        generator = torch.Generator().manual_seed(seed)
        kv = embed_dim // num_heads * num_kv_heads
        q, k, v, o = (
            torch.randn(rows, embed_dim, generator=generator) * embed_dim**-0.5
            for rows in (embed_dim, kv, kv, embed_dim)
        )
        return cls(q, k, v, o, num_heads, num_kv_heads)


def exact_attention(x: Tensor, w: Weights, *, rotary: bool, last: int | None = None) -> Tensor:
    """The causal layer's output in float64, from the formula: all of it, or the `last` tokens' alone."""
    x = x.double()
    B, S, E = x.shape
    H, G = w.num_heads, w.num_kv_heads
    T = S if last is None else last
    q = (x[:, S - T :] @ w.q.double().T).view(B, T, H, -1).transpose(1, 2)
    k = (x @ w.k.double().T).view(B, S, G, -1).transpose(1, 2)
    v = (x @ w.v.double().T).view(B, S, G, -1).transpose(1, 2)
    if rotary:
        cos, sin = rotary_rows(torch.arange(S), q.shape[-1], torch.float64)
        q, k = rotate(q, cos[S - T :], sin[S - T :]), rotate(k, cos, sin)
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1 + S - T), float("-inf"))
    out = torch.softmax(scores, -1) @ v
    return out.transpose(1, 2).reshape(B, T, E) @ w.o.double().T


def rotary_rows(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, width) with both halves alike: the form that transformers' Llama takes."""
    frequencies = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions.double()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., T, D) by halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FusedAttention(nn.Module):
    """The floor: one Linear for q, k and v, scaled_dot_product_attention, one Linear."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = weights.num_heads, weights.num_kv_heads
        self.head_dim = weights.q.shape[0] // weights.num_heads
        self.qkv = _linear(torch.cat([weights.q, weights.k, weights.v]))
        self.out = _linear(weights.o)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D), k and v (B, G, T, D)."""
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """Heads to output (B, T, E)."""
        gqa = self.num_heads != self.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        return self.attend(*self.heads(x), is_causal=True)


class StaticCacheAttention(FusedAttention):
    """The floor of decoding: keys and values written into preallocated buffers."""

    def __init__(self, weights: Weights, batch_size: int, max_length: int) -> None:
        super().__init__(weights)
        shape = (batch_size, weights.num_kv_heads, max_length, self.head_dim)
        self.k_cache, self.v_cache = torch.zeros(shape), torch.zeros(shape)
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        """A prompt on an empty cache, then one token a call."""
        q, k, v = self.heads(x)
        end = self.length + x.shape[1]
        self.k_cache[:, :, self.length : end] = k
        self.v_cache[:, :, self.length : end] = v
        prompt, self.length = self.length == 0, end
        return self.attend(q, self.k_cache[:, :, :end], self.v_cache[:, :, :end], is_causal=prompt)

    def truncate(self, length: int) -> None:
        """Forget what came after `length` tokens."""
        self.length = length


class GrowingCacheAttention(FusedAttention):
    """Keys and values joined by torch.cat at every step."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """A prompt on an empty cache, then one token a call."""
        q, k, v = self.heads(x)
        prompt = self.cache is None
        if self.cache is not None:
            k, v = torch.cat([self.cache[0], k], dim=2), torch.cat([self.cache[1], v], dim=2)
        self.cache = k, v
        return self.attend(q, k, v, is_causal=prompt)

    def truncate(self, length: int) -> None:
        """Forget what came after `length` tokens."""
        if self.cache is not None:
            self.cache = self.cache[0][:, :, :length], self.cache[1][:, :, :length]


def torch_multihead(weights: Weights, length: int) -> Callable[[Tensor], Tensor]:
    """torch.nn.MultiheadAttention as fast as it goes: need_weights=False, the causal hint."""
    E = weights.o.shape[0]
    module = nn.MultiheadAttention(E, weights.num_heads, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([weights.q, weights.k, weights.v]))
        module.out_proj.weight.copy_(weights.o)
    mask = nn.Transformer.generate_square_subsequent_mask(length)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]

    return Call()


class LlamaLayer(nn.Module):
    """transformers' LlamaAttention with its sdpa implementation; the rotation's tables are made once."""

    def __init__(self, weights: Weights, max_length: int) -> None:
        super().__init__()
        from transformers import DynamicCache, LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention

        E = weights.o.shape[0]
        config = LlamaConfig(
            hidden_size=E,
            num_attention_heads=weights.num_heads,
            num_key_value_heads=weights.num_kv_heads,
            attn_implementation="sdpa",
        )
        self.attention = LlamaAttention(config, layer_idx=0)
        _load(self.attention, weights)
        self.new_cache = DynamicCache
        self.cache: DynamicCache | None = None
        cos, sin = rotary_rows(torch.arange(max_length), E // weights.num_heads, torch.float32)
        self.register_buffer("cos", cos[None], persistent=False)
        self.register_buffer("sin", sin[None], persistent=False)
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E), the positions from 0; or the cache continued after `start_decoding`."""
        end = self.length + x.shape[1]
        tables = self.cos[:, self.length : end], self.sin[:, self.length : end]
        out = self.attention(x, position_embeddings=tables, past_key_values=self.cache)[0]
        if self.cache is not None:
            self.length = end
        return out

    def start_decoding(self) -> LlamaLayer:
        """From now on continue a DynamicCache."""
        self.cache, self.length = self.new_cache(), 0
        return self

    def truncate(self, length: int) -> None:
        """Forget what came after `length` tokens."""
        if self.cache is not None and length < self.length:
            self.cache.crop(length - self.length)
            self.length = length


class XTransformersLayer(nn.Module):
    """x-transformers' Attention, no rotation."""

    def __init__(self, weights: Weights, *, flash: bool = True) -> None:
        super().__init__()
        from x_transformers.x_transformers import Attention

        E = weights.o.shape[0]
        self.attention = Attention(
            E,
            dim_head=E // weights.num_heads,
            heads=weights.num_heads,
            kv_heads=weights.num_kv_heads,
            causal=True,
            flash=flash,
        )
        with torch.no_grad():
            for name, weight in (("q", weights.q), ("k", weights.k), ("v", weights.v), ("out", weights.o)):
                getattr(self.attention, f"to_{name}").weight.copy_(weight)
        self.decoding = False
        self.intermediates = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E); after `start_decoding` the cache is continued."""
        if not self.decoding:
            return self.attention(x)
        out, self.intermediates = self.attention(x, cache=self.intermediates, return_intermediates=True)
        return out

    def start_decoding(self) -> XTransformersLayer:
        """From now on continue a cache."""
        self.decoding, self.intermediates = True, None
        return self

    def truncate(self, length: int) -> None:
        """Forget what came after `length` tokens."""
        if self.intermediates is not None:
            k, v = self.intermediates.cached_kv
            self.intermediates.cached_kv = k[:, :, :length], v[:, :, :length]


class ZooLayer(nn.Module):
    """A module of ours, and its cache in decoding."""

    def __init__(self, module: nn.Module, weights: Weights | None = None) -> None:
        super().__init__()
        self.module = module
        if weights is not None:
            _load(module, weights)
        self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, E) -> (B, T, E); after `start_decoding` the cache is continued."""
        return self.module(x, cache=self.cache)

    def start_decoding(self, batch_size: int, max_length: int) -> ZooLayer:
        """From now on continue a cache of the module's own."""
        self.cache = self.module.init_cache(batch_size, max_length)
        return self

    def truncate(self, length: int) -> None:
        """Forget what came after `length` tokens."""
        if self.cache is not None:
            self.cache.truncate(length)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def _load(module: nn.Module, weights: Weights) -> None:
    """Copy into projections named q_proj, k_proj, v_proj and o_proj."""
    with torch.no_grad():
        for name in "qkvo":
            getattr(module, f"{name}_proj").weight.copy_(getattr(weights, name))
