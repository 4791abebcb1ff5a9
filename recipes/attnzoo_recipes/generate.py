"""attnzoo-generate: continue a text with a trained checkpoint."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

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
from attnzoo_recipes.sampling import Sampling, TextStream, check_sampling, continuations

MAX_SAMPLES = 65_536
"""Samples drawn together: each has a random generator and a text stream of its own."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-generate"):
        words, allowed = take_allowed_imports(command_line(args))
        generate_text(build_parser().parse_args(words), allowed)


def generate_text(options: argparse.Namespace, allowed: tuple[str, ...]) -> None:
    """Write the samples, one as it is drawn, several when they are complete; the speed goes to stderr."""
    sampling: Sampling = {
        "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p, "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
    }  # fmt: skip
    check_sampling(**sampling)
    for name, value in (("max-new-tokens", options.max_new_tokens), ("num-samples", options.num_samples)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.num_samples > MAX_SAMPLES:
        raise ValueError(f"--num-samples must be at most {MAX_SAMPLES:,}, got {options.num_samples}")
    if not -(2**63) <= options.seed <= 2**64 - options.num_samples:
        raise ValueError(
            f"--seed must lie between -2^63 and 2^64 less the number of samples, got {options.seed} and "
            f"{options.num_samples} sample{'s' if options.num_samples > 1 else ''}"
        )
    if "" in options.stop:
        raise ValueError("--stop must be followed by a text, got an empty one")
    prompt = read_prompt(options.prompt, options.prompt_file)
    device = device_named(options.device)
    checkpoint = read_checkpoint(options.checkpoint, unverified=options.unverified)
    where = f"checkpoint {options.checkpoint}"
    model = model_from_checkpoint(checkpoint, allowed, where).to(device, DTYPES[options.dtype])
    tokenizer = tokenizer_from_checkpoint(checkpoint, where)
    if tokenizer is None:
        raise ValueError(f"{where} holds no tokenizer, so it cannot read or write text")
    streams = [TextStream(tokenizer, options.stop) for _ in range(options.num_samples)]
    texts = [prompt] * len(streams)
    alone = len(streams) == 1
    began = time.perf_counter()
    if alone:
        _show(prompt)
    parts = continuations(
        model, tokenizer, prompt, options.max_new_tokens, streams=streams, seed=options.seed, **sampling
    )
    for new in parts:
        if alone:
            _show(new[0])
        texts = [text + part for text, part in zip(texts, new, strict=True)]
    seconds = time.perf_counter() - began
    if alone:
        _show("\n")
    for i, text in enumerate(() if alone else texts):
        _show(f"--- sample {i}, seed {options.seed + i}\n{text}\n")
    count = sum(each.tokens for each in streams)
    sys.stderr.write(f"{count} tokens, {count / seconds:,.1f} tokens/s with the prompt's time\n")


def read_prompt(text: str | None, path: str | None) -> str:
    """The prompt: the text, or what a file or, for "-", standard input holds."""
    if path is None:
        text = text or ""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"--prompt must be text that UTF-8 can write, got {text!r:.80}")
        return text
    if text is not None:
        raise ValueError(f"--prompt and --prompt-file must not both be given, got {text!r:.80} and {path!r}")
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file must hold UTF-8 text, got {path!r}: {error}") from error


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="attnzoo-generate", description="Continue a text with a trained checkpoint.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a .ckpt file, or the folder of a run: its newest valid checkpoint")
    add("--prompt", help="text to continue (default: a new document)")
    add("--prompt-file", metavar="FILE", help="file with that text; - is standard input")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="length of a continuation (default 200)")
    add("--num-samples", type=int, default=1, metavar="N", help="number of continuations, drawn together (default 1)")
    add(
        "--temperature", type=float, default=0.8, help="divides the logits; 0 takes the most likely token (default 0.8)"
    )
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens that have the probability P")
    add("--min-p", type=float, metavar="P", help="sample from tokens with P times the most likely one's probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1, tokens come back less (default 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the first sample; the next ones have the following numbers (default 0)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="dtype of weights and caches (default float32)")
    add("--unverified", action="store_true", help="read a .ckpt file without its sidecar, which says what was saved")
    add_device(parser, "the model runs")
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    main()
