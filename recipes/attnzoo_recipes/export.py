"""attnzoo-export: a trained decoder as a folder that transformers loads."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.rotary import Rotary
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.data.tokenizers import DOCUMENT, Tokenizer, letters_of_bytes
from attnzoo_recipes.feed_forward import FeedForward, SwiGLU
from attnzoo_recipes.lm import DecoderBlock, DecoderLM
from attnzoo_recipes.model_config import model_from_checkpoint, saved_settings, tokenizer_from_checkpoint
from attnzoo_recipes.options import (
    add_allow_import,
    check_new_folder,
    command_line,
    mistakes_in_one_sentence,
    need_transformers,
    quiet_transformers,
    take_allowed_imports,
)

_PLACES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip
"""Parts of a decoder's block and of a Llama's."""


def to_hugging_face(lm: DecoderLM, tokenizer: Tokenizer | None = None, *, max_length: int = 2048) -> Any:
    """A trained decoder as a `transformers.LlamaForCausalLM` with the decoder's attention; the decoder is left alone.

    Where a Llama has the same attention (multi-head, grouped and multi-query attention with half-split rotation and
    without further options) the model is a plain one, which everything reads that reads Llama. Otherwise its class is
    `AttnzooLlamaForCausalLM`, and who loads it has to `import attnzoo.hugging_face` before.

    Dropout of the embedding and of branches, and auxiliary losses, belong to the recipe's training and are not carried
    over.

    Args:
        lm: blocks of attention and a gated feed-forward layer ("swiglu", of two layers, the same in every block), one
            after the other.
        tokenizer: its document token becomes the token that begins and ends a text.
        max_length: tokens that the model reads at once, `max_position_embeddings`.

    Raises:
        ValueError: for a decoder of another form, or attention that `attnzoo.describe` does not know.
    """
    from transformers import LlamaForCausalLM

    from attnzoo.hugging_face import restore
    from attnzoo.hugging_face.installation import install
    from attnzoo.hugging_face.saving import adopt

    blocks = lm.layers
    for i, block in enumerate(blocks):
        _check_block(i, block, blocks[0])
    config = _configuration(lm, max_length)
    config.bos_token_id = config.eos_token_id = None if tokenizer is None else tokenizer.document_id
    own = lm.embedding.weight
    llama: Any = LlamaForCausalLM
    model = llama._from_config(config, dtype=own.dtype).to(own.device)
    parts = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    parts |= {} if lm.head is None else {"head": "lm_head"}
    for i, block in enumerate(blocks):
        parts |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _PLACES.items()}
        install(model, f"model.layers.{i}.self_attn", copy.deepcopy(block.attn))
    for ours, theirs in parts.items():
        model.get_submodule(theirs).load_state_dict(lm.get_submodule(ours).state_dict())
    adopt(model)
    with contextlib.suppress(ValueError):  # of attention that a Llama does not have
        restore(model)
    return model.train(lm.training)


def hugging_face_tokenizer(tokenizer: Tokenizer, max_length: int = 2048) -> Any:
    """A tokenizer of the recipe as one of transformers: the document token begins a text and ends generation.

    It is a special token: where a text spells it, it is read as one.

    Args:
        tokenizer: the tokenizer.
        max_length: tokens that the model reads at once.

    Raises:
        ValueError: if the document token has a number that the package tokenizers cannot give it.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    settings = tokenizer.to_dict()
    if settings["kind"] == "byte":
        fast = Fast(models.BPE({letter: byte for byte, letter in letters_of_bytes().items()}, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    else:
        fast = Fast.from_str(settings["serialized"])
    fast.add_special_tokens([DOCUMENT])
    if fast.token_to_id(DOCUMENT) != tokenizer.document_id:
        raise ValueError(
            f"tokenizer must number its tokens without gaps to be exported, got {tokenizer.document_id} for its "
            f"document token, which would become {fast.token_to_id(DOCUMENT)}"
        )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", pair=f"{DOCUMENT} $A {DOCUMENT}:1 $B:1",
        special_tokens=[(DOCUMENT, tokenizer.document_id)],
    )  # fmt: skip
    cls: Any = PreTrainedTokenizerFast
    return cls(tokenizer_object=fast, bos_token=DOCUMENT, eos_token=DOCUMENT, model_max_length=max_length)


def _check_block(index: int, block: DecoderBlock, first: DecoderBlock) -> None:
    """Raise if a Llama does not have such a block, or has it in some of its layers only."""
    mlp, shapes = block.mlp, [[tuple(p.shape) for p in b.mlp.parameters()] for b in (block, first) if b.mlp is not None]
    if mlp is not None and block.mlp_norm is None:
        problem = "parallel branches"
    elif not isinstance(mlp, SwiGLU | FeedForward):
        problem = "no feed-forward layer" if mlp is None else f"a {type(mlp).__name__}"
    elif isinstance(mlp, FeedForward) and (mlp.depth, mlp.activation) != (2, "swiglu"):
        problem = f"a feed-forward layer of depth {mlp.depth} with {mlp.activation}"
    elif shapes[0] != shapes[-1]:
        problem = "another feed-forward layer than the first block"
    else:
        return
    raise ValueError(
        f"lm must have attention and then a gated feed-forward layer (swiglu, of depth 2) in every block to be a "
        f"Llama, got {problem} in block {index}"
    )


def _configuration(lm: DecoderLM, max_length: int) -> Any:
    """The LlamaConfig of a decoder's sizes; what it says about attention is that of the first block."""
    from transformers import LlamaConfig

    block: Any = lm.layers[0]
    attn, gate = block.attn, block.mlp.gate_proj
    rope = attn.rope if isinstance(getattr(attn, "rope", None), Rotary) else Rotary()
    return LlamaConfig(
        vocab_size=lm.vocab_size, hidden_size=lm.embed_dim, intermediate_size=gate.out_features,
        num_hidden_layers=lm.num_layers, num_attention_heads=attn.num_heads, num_key_value_heads=attn.num_kv_heads,
        head_dim=attn.head_dim, max_position_embeddings=max_length, rms_norm_eps=block.attn_norm.eps,
        tie_word_embeddings=lm.head is None, mlp_bias=gate.bias is not None, initializer_range=lm.init_std,
        attention_bias=getattr(getattr(attn, "o_proj", None), "bias", None) is not None,
        attention_dropout=getattr(attn, "dropout", 0.0),
        rope_parameters={"rope_type": "default", "rope_theta": rope.theta},
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-export"):
        words, allowed = take_allowed_imports(command_line(args))
        options = build_parser().parse_args(words)
        need_transformers()
        check_new_folder(options.out)
        checkpoint = read_checkpoint(options.run)
        where = f"checkpoint {options.run}"
        lm = model_from_checkpoint(checkpoint, allowed, where)
        tokenizer = tokenizer_from_checkpoint(checkpoint, where)
        length = options.max_length
        if length is None:
            length = saved_settings(checkpoint, where).get("block_size", 2048)
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"--max-length must be at least 1, got {length!r:.80}")
        model = to_hugging_face(lm, tokenizer, max_length=length)
        fast = None if tokenizer is None else hugging_face_tokenizer(tokenizer, length)
        with quiet_transformers():
            model.save_pretrained(options.out)
        if fast is not None:
            fast.save_pretrained(options.out)
    name = type(model).__name__
    needs = "" if name == "LlamaForCausalLM" else ": import attnzoo.hugging_face before loading it"
    text = "" if fast is not None else " (the checkpoint has no tokenizer)"
    sys.stdout.write(f"written to {options.out}{text}: {name}, {lm.num_parameters:,} parameters{needs}\n")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="attnzoo-export", description="Write a trained checkpoint as a folder that transformers loads."
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a .ckpt file, or the folder of a run: its newest valid checkpoint")
    add("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    add(
        "--max-length", type=int, metavar="N",
        help="tokens that the model reads at once (default: those of a training sequence)",
    )  # fmt: skip
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    main()
