"""attnzoo-pretrain: fit, validate or test a decoder language model from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo_recipes.signals import Stop


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with Stop(is_process=args is None) as stop:
        # Imported here, since that takes seconds in which a signal is to be answered.
        from attnzoo_recipes.commandline import run

        run(args, stop)


if __name__ == "__main__":
    main()
