"""attnzoo-consolidate: the weights of a checkpoint as one safetensors file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from attnzoo_recipes import files
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.model_config import saved_settings
from attnzoo_recipes.options import command_line, mistakes_in_one_sentence

_PREFIX = "model."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-consolidate"):
        options = build_parser().parse_args(command_line(args))
        consolidate(options.checkpoint, options.out)


def consolidate(checkpoint: Path, out: Path) -> None:
    """Write the weights of a checkpoint, sharded or not, under the names of a decoder's state dict.

    The file's metadata has the model's configuration as JSON, "attnzoo". It is written beside its name, synced, and
    renamed.

    Args:
        checkpoint: of attnzoo-pretrain, or the folder of a run: its newest valid checkpoint.
        out: a new file NAME.safetensors.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is not valid, or the file exists or has another ending.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if out.suffix != ".safetensors":
        raise ValueError(f"OUT must be a file NAME.safetensors, got {str(out)!r}")
    if out.exists():
        raise ValueError(f"OUT must be a new file, got {str(out)!r}, which exists")
    read = read_checkpoint(checkpoint)
    saved = saved_settings(read, f"checkpoint {checkpoint}")
    state = {name.removeprefix(_PREFIX): value.contiguous() for name, value in read["state_dict"].items()}
    unfinished = files.temporary(out)
    with files.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(state, unfinished, {"format": "pt", "attnzoo": json.dumps(saved["model"])})
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, out)
            files.sync_folder(out.parent)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="attnzoo-consolidate", description="Write the weights of a checkpoint into one safetensors file."
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run: its newest valid one")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new file NAME.safetensors")
    return parser


if __name__ == "__main__":
    main()
