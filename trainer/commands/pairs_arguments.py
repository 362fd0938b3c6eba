"""The arguments of a run of `pairs`, as its folder keeps them and `--resume` completes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, cast

_OF_A_CALL = ("help", "out", "resume", "overwrite")


Configure = Callable[[argparse.ArgumentParser], None]
"""Adds the arguments of the command."""


def as_arguments(args: argparse.Namespace, configure: Configure) -> list[str]:
    """The arguments that differ from their defaults, as they would be typed. Not those of one call alone."""
    parser, found = _parser(configure), list[str]()
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        value: Any = getattr(args, action.dest, None)
        if action.dest in _OF_A_CALL or value == action.default:
            continue
        for one in cast(list[Any], value) if isinstance(value, list) else [value]:
            found += [action.option_strings[-1]] if one is True else [f"{action.option_strings[-1]}={one}"]
    return found


def with_earlier(args: argparse.Namespace, earlier: Sequence[str], configure: Configure) -> argparse.Namespace:
    """Arguments of a call, and where it gives none those of an earlier one; a list that is given replaces the earlier one."""
    before = _parser(configure).parse_args([*earlier, f"--out={args.out}"])
    whole = argparse.Namespace(**{name: None if isinstance(value, list) else value for name, value in vars(before).items()})
    whole = _parser(configure).parse_args(args.given, whole)
    for name, value in vars(before).items():
        if isinstance(value, list) and getattr(whole, name) is None:
            setattr(whole, name, value)
    if {"--from", "--from-pairs", "--prompt", "--prompts"} & {word.partition("=")[0] for word in args.given}:
        for name in ("source", "from_pairs", "prompt", "prompts"):  # another source replaces the earlier one
            setattr(whole, name, getattr(args, name))
    return argparse.Namespace(**{**vars(args), **vars(whole)})


def _parser(configure: Configure) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    configure(parser)
    return parser
