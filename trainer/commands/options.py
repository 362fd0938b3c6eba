"""Arguments that several commands share, and the objects that they describe."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from ..config import ConfigError, build
from ..data.captions import read_prompts
from ..data.report import Report
from ..generate import Generation
from ..lora.file import read_metadata
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from ..models.open import open_policy
from ..runtime.device import check_device, use_device
from ..sampling import METHODS
from ..text import lines, valid

log = logging.getLogger(__name__)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, mps or xpu (default cpu)")


def add_remote(add: Callable[..., object]) -> None:
    """Add `--allow-remote` by a parser's or a group's `add_argument`."""
    add("--allow-remote", action="store_true", help="let a judge that is named by its URL be on another machine: images are sent there")


def device_of(args: argparse.Namespace) -> str:
    """The device that the arguments name; raises ValueError where this machine has none."""
    return check_device(args.device)


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, as an argument's type."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return value


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the model, the prompts, the sampler and the device."""
    add = parser.add_argument
    add("--model", default="demo", metavar="PATH", help="diffusers folder, .safetensors checkpoint, or demo (default)")
    for f in fields(ModelOptions):
        add(f"--{f.name.replace('_', '-')}", default=f.default, metavar="X", help=f"{f.metadata['help']} (default {f.default or 'none'})")
    add("--image-size", type=int, default=0, metavar="N", help="width and height of the images in pixels; 0: the model's own (default)")
    add("--prompts", type=Path, metavar="FILE", help="text file, one prompt per line")
    add("-n", type=int, default=4, metavar="N", help="images per prompt (default 4)")
    for f in fields(Generation):
        if f.name not in ("method", "tuned_method"):
            text = f"{f.metadata['help']} (default {f.default})"
            add("--" + f.name.replace("_", "-"), type=type(f.default), metavar="X", help=text)
    add("--method", choices=METHODS, default="ddpm", help="sampler (default ddpm)")
    add("--tuned-method", choices=METHODS, help="sampler of the tuned part (default: as --method)")
    add_device(parser)


def policy_of(args: argparse.Namespace) -> DiffusersPolicy:
    """A new policy over the model that the arguments name."""
    device = use_device(args.device)
    quiet_libraries()
    options = ModelOptions(**{f.name: getattr(args, f.name) for f in fields(ModelOptions)})
    return open_policy(args.model, device, options, args.image_size)


def generation_of(args: argparse.Namespace) -> Generation:
    """The sampler's settings; the embedded model has its own defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(Generation) if getattr(args, f.name) is not None}
    if args.model == "demo":
        from ..demo.experiment import GUIDANCE, STEPS

        given = {"steps": STEPS, "guidance_scale": GUIDANCE, **given}
    return build(Generation, given)


def warn_of_guidance(args: argparse.Namespace, settings: Generation, loras: Iterable[Path]) -> None:
    """Say which LoRAs were trained to be drawn with another guidance than the tuned part has by default, as those on preferences are."""
    for path in loras if args.tuned_guidance_scale is None else ():
        metadata = read_metadata(path)
        scale, guide = metadata.get("tuned_guidance"), metadata.get("guide")
        if guide:
            if guide != getattr(args, "guide", None):
                log.warning(
                    f"{path} was trained for the guide {guide}: give --guide {guide}; docs/sampling.md, Guidance by two models, says how"
                )
        elif isinstance(scale, int | float) and scale != settings.tuned_guidance_scale:
            log.warning(
                f"{path} is for drawing with guidance ({scale:g} in its training's settings), and the tuned part has none: give "
                f"--tuned-guidance-scale, such as the base's {settings.guidance_scale:g}; 1 leaves it so"
            )


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts, each repeated for its `-n` images."""
    given = getattr(args, "prompt", None) or []
    prompts = [valid(" ".join(line.strip() for line in lines(text))) for text in given]  # one line each, as in a file of prompts
    if args.prompts:
        report = Report()
        prompts += read_prompts(args.prompts, report)
        report.show()
    if not prompts:
        raise ConfigError(f"no prompt: give {'--prompt TEXT or ' if hasattr(args, 'prompt') else ''}--prompts FILE")
    if args.n < 1:
        raise ConfigError(f"-n {args.n}: give at least 1 image per prompt")
    return [p for p in prompts for _ in range(args.n)]


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of diffusers and transformers: errors stay one line, the only bar is our own."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    of_diffusers.set_verbosity_error()  # warnings about missing weights, for example: such a model is refused in one line
    of_transformers.set_verbosity_error()
