"""The decoder of `golden/head_pruning.safetensors`, from its equations, with its losses."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import attnzoo

GOLDEN = Path(__file__).parent / "golden" / "head_pruning.safetensors"
WITHIN = 1e-9
"""Tolerance of the stored figures in float64."""


class Decoder(nn.Module):
    """x + attn(norm(x)), x + down(silu(up(norm(x)))), logits by the tied embedding; float64."""

    def __init__(self, config, weights):
        super().__init__()
        E, eps, double = config["embed_dim"], config["norm_eps"], {"dtype": torch.float64}
        rope = attnzoo.Rotary(theta=config["rope_theta"]) if config["rope_theta"] else None
        sizes = (config["num_heads"], config["num_kv_heads"], config["head_dim"])
        self.embed = nn.Embedding(config["vocab_size"], E, **double)
        self.layers = nn.ModuleList()
        for _ in range(config["num_layers"]):
            attn = attnzoo.GroupedQueryAttention(E, *sizes, bias=config["bias"], rope=rope, **double)
            up, down = (nn.Linear(*io, False, **double) for io in ((E, config["mlp_dim"]), (config["mlp_dim"], E)))
            norms = {name: nn.RMSNorm(E, eps, **double) for name in ("attn_norm", "mlp_norm")}
            mlp = nn.ModuleDict({"up_proj": up, "down_proj": down})
            self.layers.append(nn.ModuleDict({"attn": attn, "mlp": mlp, **norms}))
        self.norm = nn.RMSNorm(E, eps, **double)
        self.load_state_dict({name: weight.double() for name, weight in weights.items()})

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attn"](layer["attn_norm"](x))
            mlp = layer["mlp"]
            x = x + mlp["down_proj"](F.silu(mlp["up_proj"](layer["mlp_norm"](x))))
        return self.norm(x) @ self.embed.weight.T


def load():
    """Tensors, and the metadata that are JSON."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        return tensors, {key: json.loads(file.metadata()[key]) for key in ("config", "pcts", "l0")}


def build(stored):
    """The decoder with the stored weights."""
    tensors, meta = stored
    named = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    return Decoder(meta["config"], named)


def examples(stored):
    """The stored batch: tokens (B, T) and lengths (B,)."""
    tensors, meta = stored
    return tensors["input.tokens"], torch.tensor(meta["config"]["lengths"])


def next_token_losses(model, batch):
    """Mean cross-entropy of positions 1 .. length - 1 of each example."""
    tokens, lengths = batch
    nats = F.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:], reduction="none")
    predicted = torch.arange(1, tokens.shape[1]) < lengths[:, None]
    return (nats * predicted).sum(1) / predicted.sum(1)


def real_tokens(batch):
    """Which tokens are no padding, (B, T)."""
    return torch.arange(batch[0].shape[1]) < batch[1][:, None]


def pairs(table):
    """Rows of an integer table as tuples."""
    return [tuple(row) for row in table.tolist()]
