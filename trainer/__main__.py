"""python -m trainer: train, sample, score, evaluate, and the demo."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from .commands.main import COMMANDS
    from .memory.oom import OutOfMemory
    from .runtime.processes import StoppedElsewhere

    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Align a diffusion model with a reward and keep its diversity: train, sample, score, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (configure, run) in COMMANDS.items():
        described = inspect.getdoc(run) or name
        command = commands.add_parser(
            name,
            help=described.splitlines()[0],
            description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `--learning_rate=…` must never become another flag
        )
        configure(command)
        command.set_defaults(run=run)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # settings never reach argparse, which takes one that holds a space for a file
    settings = [a for a in given if given[0] == "train" and a.startswith("--") and "=" in a]
    parsed, rest = parser.parse_known_args([a for a in given if a not in settings])
    rest += settings
    if rest and parsed.command != "train":
        parser.error(f"unknown argument {rest[0]}")
    parsed.rest = rest
    _quiet()
    try:
        return parsed.run(parsed)
    except StoppedElsewhere:
        return 2  # the process that failed has said why
    except (ValueError, OSError, ArithmeticError, OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is missing: pip install -e '.[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130


def _quiet() -> None:
    """No loading bars of libraries: errors stay one line, and the only bar is the run's own."""
    try:
        import diffusers.utils.logging as of_diffusers
        import transformers.utils.logging as of_transformers
    except ModuleNotFoundError:
        return
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    of_diffusers.set_verbosity_error()  # of weights that a file lacks, say: we refuse such a model in one line
    of_transformers.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
