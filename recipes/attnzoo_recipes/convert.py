"""attnzoo-convert: the attention of a trained model as another mechanism."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attnzoo_recipes.diagnose.load_model import LoadedModel, load_model
from attnzoo_recipes.diagnose.losses import next_token_losses, predicts_tokens
from attnzoo_recipes.diagnose.texts import reader, sequences
from attnzoo_recipes.export import hugging_face_tokenizer, to_hugging_face
from attnzoo_recipes.files import write_atomically
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.options import (
    add_allow_import,
    add_device,
    check_new_folder,
    command_line,
    device_named,
    mistakes_in_one_sentence,
    need_transformers,
    quiet_transformers,
    take_allowed_imports,
)

REPORT = "conversion.json"
"""File beside the model: settings, what became of the layers, and perplexities."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "rank": {"type": int, "metavar": "R", "help": "mla: numbers of a latent (kv_rank)"},
    "rope-dim": {"type": int, "metavar": "D", "help": "mla: features of a head that still rotate"},
    "rope-select": {"help": "mla: which of them: 2-norm, high, low or uniform (default high)"},
    "weighting": {"help": "mla: weights, activations or two-sided (default activations with --calib)"},
    "key-weight": {"help": "mla, two-sided: weight of keys against values, or search"},
    "rank-allocation": {"help": "mla: uniform, or adaptive: ranks by the layers' spectra"},
    "num-kv-heads": {"type": int, "metavar": "G", "help": "gqa: key/value heads"},
    "mode": {"help": "gqa: mean, first, activations or two-sided (default activations with --calib)"},
    "variant": {"help": "kha: mlp, linear, linear_v or mlp_qkv (default mlp)"},
}
"""Options of conversions that have a word of their own; --set takes all."""

_NAMES = {"rank": "kv_rank"}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-convert"):
        words, allowed = take_allowed_imports(command_line(args))
        given = build_parser().parse_args(words)
        need_transformers()
        check_new_folder(given.out)
        if given.dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {given.dtype!r}")
        for name in ("calib_sequences", "eval_sequences"):
            if getattr(given, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
        options, layers = conversion_options(given), layer_numbers(given.layers)
        device = device_named(given.device)
        loaded = load_model(given.model, allowed=allowed, device=device)
        if not predicts_tokens(loaded):
            raise ValueError(f"MODEL must be a causal language model, got {type(loaded.model).__name__}")
        read = reader(loaded) if given.calib or given.eval else None
        texts = {
            name: sequences(
                f"--{name}", path, read, min(length, read.longest or length), None, most=count, option=f"{name}-length"
            )
            for name, path, length, count in (
                ("calib", given.calib, given.calib_length, given.calib_sequences),
                ("eval", given.eval, given.eval_length, given.eval_sequences),
            )
            if path is not None and read is not None
        }
        model, tokenizer = as_hugging_face(loaded)
        model.eval().to(device)
        report, perplexities = convert_and_compare(model, given.to, layers, options, texts)
        with quiet_transformers():
            model.to(_DTYPES[given.dtype]).save_pretrained(given.out)
        if tokenizer is not None:
            tokenizer.save_pretrained(given.out)
        settings: dict[str, Any] = {"model": given.model, "to": given.to, "layers": layers, "options": options}
        settings |= {
            name: {"file": str(getattr(given, name)), "tokens": list(ids.shape)} for name, ids in texts.items()
        }
        result = {**settings, "dtype": given.dtype, "report": report.to_dict(), "perplexity": perplexities}
        write_atomically(given.out / REPORT, json.dumps(result, indent=1))
    sys.stdout.write(f"{report}\n")
    if perplexities:
        n, length = texts["eval"].shape
        before, after = (f"{value:.4g}" for value in perplexities.values())
        sys.stdout.write(f"perplexity on {given.eval}: {before} before, {after} after ({n} x {length} tokens)\n")
    sys.stdout.write(f"written to {given.out}: import attnzoo.hugging_face before loading it\n")


_LENGTH = "tokens of each, if the model reads so many (default "
_OWN_WORDS = {
    "model": "it is the first word", "mechanism": "use --to", "layers": "use --layers", "calib": "use --calib",
}  # fmt: skip
"""Arguments of `convert` that the command line has otherwise."""
_FACTOR_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_and_compare(
    model: Any, mechanism: str, layers: list[int] | None, options: dict[str, Any], texts: dict[str, Tensor]
) -> tuple[Any, dict[str, float]]:
    """Convert the model in place; the report, and perplexities "before" and "after" if there is a text "eval"."""
    from attnzoo.hugging_face import convert

    if isinstance(name := options.get("factor_dtype"), str):
        options = {**options, "factor_dtype": _FACTOR_DTYPES.get(name, name)}
    perplexities = {}
    if "eval" in texts:
        perplexities["before"] = perplexity(model, texts["eval"], "perplexity before")
    calib = None
    if "calib" in texts:
        rows = texts["calib"].to(model.device).split(1)
        calib = tqdm(rows, unit="sequence", desc="calibration", disable=None)
    report = convert(model, mechanism, layers=layers, calib=calib, **options)
    if "eval" in texts:
        perplexities["after"] = perplexity(model, texts["eval"], "perplexity after")
    return report, perplexities


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, what: str) -> float:
    """exp of the mean cross-entropy of the tokens after each sequence's first; tokens (N, T)."""
    rows = tqdm(tokens.to(model.device).split(1), unit="sequence", desc=what, disable=None)
    return math.exp(float(torch.cat([next_token_losses(model, row) for row in rows]).double().mean()))


def as_hugging_face(loaded: LoadedModel) -> tuple[Any, Any]:
    """The model of transformers, and its tokenizer or None; a decoder of the recipe is exported first."""
    if isinstance(loaded.model, DecoderLM):
        tokenizer = loaded.tokenizer
        return to_hugging_face(loaded.model, tokenizer), None if tokenizer is None else hugging_face_tokenizer(
            tokenizer
        )
    from transformers import AutoTokenizer

    folder = loaded.path if loaded.path.is_dir() else loaded.path.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return loaded.model, None
    return loaded.model, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def conversion_options(given: argparse.Namespace) -> dict[str, Any]:
    """The keyword options of `attnzoo.hugging_face.convert` from the command line.

    Raises:
        ValueError: for a --set that is not NAME=VALUE, or whose name another word has.
    """
    options = {}
    for word in _OPTIONS:
        name = word.replace("-", "_")
        if (value := getattr(given, name)) is not None:
            options[_NAMES.get(name, name)] = plain_value(value) if isinstance(value, str) else value
    for text in given.set:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--set must be followed by NAME=VALUE, got {text!r}")
        if name.strip() in _OWN_WORDS:
            raise ValueError(f"--set must name an option of the conversion, got {text!r}: {_OWN_WORDS[name.strip()]}")
        options[name.strip()] = plain_value(value)
    if given.to == "mla":
        options.setdefault("rope_select", "high")
    return options


def plain_value(text: str) -> Any:
    """What JSON makes of a text, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def layer_numbers(text: str | None) -> list[int] | None:
    """Numbers between commas.

    Raises:
        ValueError: if they are not.
    """
    if text is None:
        return None
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise ValueError(f"--layers must be numbers with commas between, got {text!r}")
    return [int(word) for word in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="attnzoo-convert",
        description="Convert the attention of a trained model to another mechanism and write it as a folder that "
        "transformers loads once attnzoo.hugging_face is imported.",
        epilog=f"OUT gets the model, its tokenizer and {REPORT}: settings, layers, perplexities.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face folder (nothing is downloaded), or a run of attnzoo-pretrain")
    add("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    add("--to", required=True, metavar="MECHANISM", help="gqa, mla, kha, moh, dcmha, talking_heads or gated")
    for name, words in _OPTIONS.items():
        add(f"--{name}", **words)
    add(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="any other option of the conversion (docs/hugging_face.md), repeatable",
    )  # fmt: skip
    add("--layers", metavar="N,...", help="attention layers to convert, from 0 (default: all)")
    add("--calib", type=Path, metavar="FILE", help="text on whose inputs of every layer the conversion is calibrated")
    add("--calib-sequences", type=int, default=30, metavar="N", help="at most this many sequences of it (default 30)")
    add("--calib-length", type=int, default=256, metavar="T", help=_LENGTH + "256)")
    add("--eval", type=Path, metavar="FILE", help="text for the perplexity before and after")
    add("--eval-sequences", type=int, default=16, metavar="N", help="at most this many sequences of it (default 16)")
    add("--eval-length", type=int, default=512, metavar="T", help=_LENGTH + "512)")
    add("--dtype", default="float32", help=f"dtype of the written weights: {', '.join(_DTYPES)} (default float32)")
    add_device(parser, "the model is read, converted and compared")
    add_allow_import(parser)
    return parser


if __name__ == "__main__":
    main()
