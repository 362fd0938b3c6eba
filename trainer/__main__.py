"""python -m trainer: train, sample, score, evaluate, and the demo."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import ModuleType
from typing import NoReturn

from .commands import COMMANDS
from .config import ConfigError

_DEVICE_ERRORS = ("cuda error", "hip error", "nvidia driver", "not compiled with", "not linked with", "device string", "device type")


class _Parser(argparse.ArgumentParser):
    """Errors are one line: raised instead of printed below the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 after an error, which is one line on stderr.

    Imports the module of that command alone, and none for `--help`.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: prompts and names that a terminal lacks letters for stop nothing
    try:
        args = _parse(list(sys.argv[1:] if arguments is None else arguments))
        return _module(args.command).run(args)
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is missing: pip install -e '.[train]'"
    except (ValueError, OSError, ArithmeticError) as error:
        message = str(error)
    except (RuntimeError, AssertionError, MemoryError) as error:
        message = _of_device(error)
        if message is None:
            raise
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        return 130
    if message:
        print(f"error: {message}", file=sys.stderr)
    return 2


def _parse(given: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m trainer",
        description="Align a diffusion model with a reward and keep its diversity: train, sample, score, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flags: list[str] = []
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # `--learning_rate=…` must never become another flag
        )
        if given[:1] == [name]:
            _module(name).configure(command)
            flags = re.findall(r"(?<= )--([\w.-]+)", command.format_help())
    # settings never reach argparse, which takes one that holds a space for a file
    settings = [a for a in given if given[0] == "train" and a.startswith("--") and "=" in a]
    args, unknown = parser.parse_known_args([a for a in given if a not in settings])
    if unknown:
        like = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), flags, 1, 0.7)
        if args.command == "train" and (not like or unknown[0] == f"--{like[0]}"):
            raise ConfigError(_with_equals_sign(given, unknown[0]))
        hint = f"did you mean --{like[0]}?" if like else f"see `python -m trainer {args.command} --help`"
        raise ConfigError(f"unknown argument {unknown[0]}; {hint}")
    if getattr(args, "resume", False) and getattr(args, "overwrite", False):
        raise ConfigError("give --resume to continue, or --overwrite to start again, not both")
    args.settings, args.given = settings, given[1:]
    return args


def _module(command: str) -> ModuleType:
    return import_module(f".commands.{command.replace('-', '_')}", __package__)


def _with_equals_sign(given: Sequence[str], argument: str) -> str:
    """How to write a setting that was given as `--key value`."""
    if not argument.startswith("--"):
        return f"unknown argument {argument}: settings are --key=value"
    value = next(iter(given[given.index(argument) + 1 :]), "")
    return f"write {argument}={'VALUE' if not value or value.startswith('--') else value}: settings take an equals sign"


def _of_device(error: BaseException) -> str | None:
    """The message of an error that a device, the lack of its memory or another process caused; None for other errors."""
    from .runtime.device import OutOfMemory, is_out_of_memory
    from .runtime.processes import StoppedElsewhere

    if isinstance(error, StoppedElsewhere):
        return ""  # the process that failed has printed why
    if isinstance(error, OutOfMemory):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: use fewer images at a time (--chunk or --batch), --dtype=bfloat16, or another device"
    first_line = next(iter(str(error).splitlines()), "")
    return first_line if any(sign in first_line.lower() for sign in _DEVICE_ERRORS) else None


if __name__ == "__main__":
    sys.exit(main())
