"""The guide of `sample`: which one, and its settings."""

from __future__ import annotations

import argparse
import typing
from dataclasses import Field, dataclass, fields
from typing import Any

from torch import Tensor

from ..config import ConfigError, build, plain
from ..generate import Generation
from ..guidance import Mix
from ..guides import GUIDES, Guide
from .two_parts import TwoParts

COMBINED = "combined"
"""The guide of --switch and --until, which has no settings of its own here."""
_OF_TWO = ("rl", "aig", "autoguidance", "double-cfg")  # with one model they are that model


def _settings() -> dict[str, tuple[Field[Any], list[str]]]:
    """The settings of all guides by name, with the guides that have them."""
    found: dict[str, tuple[Field[Any], list[str]]] = {}
    for name, guide in GUIDES.items():
        for field in fields(typing.cast(Any, guide)) if name != COMBINED else ():
            found.setdefault(field.name, (field, []))[1].append(name)
    return found


def add_guide(parser: argparse.ArgumentParser) -> None:
    """Add `--guide` and a flag for each setting of a guide."""
    about = "how base and tuned model are mixed: combined (default, by --switch), or both at once; --guidance-scale is the scale s of all"
    parser.add_argument("--guide", choices=list(GUIDES), default=COMBINED, help=about)
    for name, (field, users) in _settings().items():
        text = f"{', '.join(users)}: {field.metadata['help']} (default {field.default or 'none'})".replace("%", "%%")
        parser.add_argument(f"--guide-{name}", type=type(field.default), metavar="X", help=text)


@dataclass(frozen=True)
class Guiding:
    """A guide other than combined generation, by its name."""

    name: str
    guide: Guide

    def mix(self, parts: TwoParts, settings: Generation, levels: Tensor) -> Mix:
        """The mix of a run; raises ConfigError where a step has none."""
        try:
            mix = self.guide.mix(*parts.slots(settings), levels)
            mix.calls(levels.tolist())
        except ValueError as error:
            raise ConfigError(f"--guide {self.name}: {error}") from error
        return mix

    @property
    def facts(self) -> dict[str, Any]:
        """What the images depend on."""
        return {"guide": {"name": self.name, **plain(self.guide)}}


def guiding(args: argparse.Namespace, parts: TwoParts, settings: Generation) -> Guiding | None:
    """The guide that the arguments name; None for combined generation. Raises ConfigError for settings that it does not read."""
    given = {name: getattr(args, f"guide_{name}") for name in _settings()}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        users = _settings()[name][1]
        if args.guide not in users:
            raise ConfigError(f"--guide-{name} is of --guide {' and '.join(users)}, not of {args.guide}")
    if args.guide == COMBINED:
        return None
    ours = {
        "--switch": args.switch != "auto",
        "--until": args.until is not None,
        "--tuned-steps": settings.tuned_steps > 0,
        "--tuned-method": settings.tuned_method is not None,
    }
    name = next((name for name, wrong in ours.items() if wrong), None)
    if name is not None:
        raise ConfigError(f"{name} is of combined generation: leave out --guide {args.guide}")
    if args.guide in _OF_TWO and not parts.tuned:
        raise ConfigError(f"--guide {args.guide} needs a tuned model: give --lora or --tuned-model")
    if args.guide == "npo" and not (parts.tuned or parts.base_loras):
        raise ConfigError("--guide npo needs a negative model: give its LoRA as --base-lora, after those of the tuned model")
    try:
        return Guiding(args.guide, build(GUIDES[args.guide], given, "--guide-"))
    except ConfigError as error:  # of no single key: the table's
        raise ConfigError(str(error).replace("--guide-:", "--guide-table:")) from error
