"""The commands as an installation starts them: what ends one before or during its imports is a sentence, too."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence

_NEEDED = ("jsonargparse", "lightning", "tqdm", "yaml")


def _command(module: str) -> Callable[[Sequence[str] | None], None]:
    """`main` of a module, which is not imported before the packages that it needs are found."""

    name = f"attnzoo-{module.removesuffix('.cli').rpartition('.')[2]}"

    def run(args: Sequence[str] | None = None) -> None:
        missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
        if missing:
            needs = f"the command needs {', '.join(missing)}: pip install 'attnzoo[train]'"
            print(f"{name}: error: {needs}", file=sys.stderr)
            raise SystemExit(2)
        try:
            main = importlib.import_module(f"attnzoo_recipes.{module}").main
        except KeyboardInterrupt:
            print(f"{name}: stopped", file=sys.stderr)
            raise SystemExit(130) from None
        main(args)

    return run


pretrain = _command("pretrain")
generate = _command("generate")
export = _command("export")
convert = _command("convert")
consolidate = _command("consolidate")
compare = _command("compare.cli")
evidence = _command("evidence.cli")
spectrum = _command("diagnose.spectrum")
heads = _command("diagnose.heads")
prune = _command("diagnose.prune")
