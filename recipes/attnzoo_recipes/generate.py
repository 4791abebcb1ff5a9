"""attnzoo-generate: continue a text with a trained checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.data.tokenizers import from_dict
from attnzoo_recipes.model_config import KEY, model_from_checkpoint
from attnzoo_recipes.sampling import check_sampling, continue_text


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    parser = build_parser()
    options = parser.parse_args(args)
    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
        if options.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
        checkpoint = read_checkpoint(options.checkpoint)
        model = model_from_checkpoint(checkpoint, (*ALLOWED, *options.allow_import)).to(options.device)
        settings = checkpoint[KEY].get("tokenizer")
        if settings is None:
            raise ValueError(f"checkpoint {options.checkpoint} holds no tokenizer, so it cannot read or write text")
        text = continue_text(
            model,
            from_dict(settings),
            options.prompt,
            options.max_new_tokens,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"attnzoo-generate: error: {' '.join(str(error).split())}\n")
    sys.stdout.write(f"{options.prompt}{text}\n")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="attnzoo-generate", description="Continue a text with a trained checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file, or the folder of a run: its newest valid one")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of probability P")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--device", type=torch.device, default="cpu", help="default cpu")
    parser.add_argument(
        "--allow-import",
        action="append",
        default=[],
        metavar="PREFIX",
        help=f"a package that the checkpoint may name beside {', '.join(ALLOWED)}; importing runs its code",
    )
    return parser


if __name__ == "__main__":
    main()
