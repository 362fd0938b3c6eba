"""The guide of `sample`: which one, and its settings."""

from __future__ import annotations

import argparse
import re
import typing
from dataclasses import Field, dataclass, fields
from typing import Any

from torch import Tensor

from ..config import ConfigError, build, plain
from ..generate import Generation
from ..guidance import Mix
from ..guides import GUIDES, OF_TWO, TRAINED, Combined, Guide, Read, misplaced
from ..lora.file import read_metadata
from .two_parts import TwoParts

COMBINED = "combined"
"""The guide of --switch and --until, which has no settings of its own here."""


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
        _check_read(args, parts, settings, Combined())
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
    if args.guide in OF_TWO and not parts.tuned:
        raise ConfigError(f"--guide {args.guide} needs a tuned model: give --lora or --tuned-model")
    ours, others = TRAINED.get(args.guide, ("", ""))
    if others and not ours and not (parts.tuned or parts.base_loras):
        raise ConfigError(f"--guide {args.guide} needs {others}: give its LoRA as --base-lora, after those of the tuned model")
    for tuned, loras in ((True, parts.loras), (False, parts.base_loras)):
        wrong, right = ("--lora", "--base-lora") if tuned else ("--base-lora", "--lora")
        for path, _ in loras:
            if what := misplaced(args.guide, read_metadata(path), tuned):
                raise ConfigError(f"--guide {args.guide}: {path} is {what}: give it as {right}, not as {wrong}")
    try:
        guide = build(GUIDES[args.guide], given, "--guide-")
    except ConfigError as error:  # of no single key: the table's
        raise ConfigError(str(error).replace("--guide-:", "--guide-table:")) from error
    _check_read(args, parts, settings, guide)
    return Guiding(args.guide, guide)


def _check_read(args: argparse.Namespace, parts: TwoParts, settings: Generation, guide: Guide) -> None:
    """ConfigError for a scale, prompt or negative that is given and changes no image."""
    read, guided = guide.reads(settings.guidance_scale, settings.tuned_guidance_scale), guide.reads(2.0, 2.0)
    given: dict[Read, bool] = {
        "guidance_scale": args.guidance_scale is not None,
        "tuned_guidance_scale": args.tuned_guidance_scale is not None,
        "tuned_negative": bool(args.tuned_negative),
        "negative": bool(args.negative),
    }
    alone = args.guide == COMBINED and not parts.tuned  # the base alone
    of_the_tuned = {
        "--tuned-prompt": args.tuned_prompt != "{prompt}",
        "--switch": args.switch != "auto",
    }
    wrong = next((name for name, is_given in of_the_tuned.items() if is_given), None)
    if alone and wrong is not None:
        raise ConfigError(f"{wrong} is of the tuned part: give --lora or --tuned-model")
    if args.strength != 1 and not parts.loras:
        raise ConfigError("--strength is of LoRAs of the tuned part: give --lora, or --base-lora FILE:0.8")
    if any(one != "{prompt}" for one in re.findall(r"\{\s*prompt\s*\}", args.tuned_prompt, re.IGNORECASE)):
        raise ConfigError(f"--tuned-prompt {args.tuned_prompt!r}: the image's own prompt is written {{prompt}}")
    for name in [name for name, is_given in given.items() if is_given]:
        flag = f"--{name.replace('_', '-')}"
        if alone and name.startswith("tuned"):
            raise ConfigError(f"{flag} is of the tuned part: give --lora or --tuned-model")
        # the tuned part's negative is the base's, unless it has its own
        places = {name, "tuned_negative"} if name == "negative" and args.tuned_negative is None and not alone else {name}
        if not places & guided:
            raise ConfigError(f"--guide {args.guide} does not read {flag}: leave it out")
        if not places & read:
            scale = "--tuned-guidance-scale" if name == "tuned_negative" and "tuned_guidance_scale" in read else "--guidance-scale"
            raise ConfigError(f"{flag} is read with guidance alone: give {scale} above 1")
