"""python -m trainer: train, sample, score, evaluate, and the demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .commands import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Imports that command alone, and for `--help` none."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is missing: pip install -e '.[train]'", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Align a diffusion model with a reward and keep its diversity: train, sample, score, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `--learning_rate=…` must never become another flag
        )
        if given[:1] == [name]:
            import_module(f".commands.{name}", __package__).configure(command)
    # settings never reach argparse, which takes one that holds a space for a file
    settings = [a for a in given if given[0] == "train" and a.startswith("--") and "=" in a]
    args, rest = parser.parse_known_args([a for a in given if a not in settings])
    rest += settings
    if rest and args.command != "train":
        parser.error(f"unknown argument {rest[0]}")
    args.rest = rest

    from .memory.oom import OutOfMemory
    from .runtime.processes import StoppedElsewhere

    try:
        return import_module(f".commands.{args.command}", __package__).run(args)
    except StoppedElsewhere:
        return 2  # the process that failed has said why
    except (ValueError, OSError, ArithmeticError, OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
