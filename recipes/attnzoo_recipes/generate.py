"""attnzoo-generate: continue a text with a trained checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.model_config import model_from_checkpoint, tokenizer_from_checkpoint
from attnzoo_recipes.options import (
    add_allow_import,
    add_device,
    command_line,
    device_named,
    mistakes_in_one_sentence,
    take_allowed_imports,
)
from attnzoo_recipes.sampling import check_sampling, continue_text


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-generate"):
        words, allowed = take_allowed_imports(command_line(args))
        options = build_parser().parse_args(words)
        check_sampling(options.temperature, options.top_k, options.top_p)
        if options.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
        device = device_named(options.device)
        checkpoint = read_checkpoint(options.checkpoint)
        where = f"checkpoint {options.checkpoint}"
        model = model_from_checkpoint(checkpoint, allowed, where).to(device)
        tokenizer = tokenizer_from_checkpoint(checkpoint, where)
        if tokenizer is None:
            raise ValueError(f"{where} holds no tokenizer, so it cannot read or write text")
        text = continue_text(
            model,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    sys.stdout.write(f"{options.prompt}{text}\n")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="attnzoo-generate", description="Continue a text with a trained checkpoint.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .ckpt file, or the folder of a run: its newest valid checkpoint")
    add("--prompt", default="", help="text to continue (default: a new document)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens that have the probability P")
    add("--seed", type=int, default=0, help="default 0")
    add_device(parser, "the model runs")
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    main()
