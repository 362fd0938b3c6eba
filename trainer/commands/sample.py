"""`python -m trainer sample`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..generate import Generation, batches, generate
from ..guidance import Mix
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from . import optimising, searching
from .chain import Chain
from .guiding import add_guide
from .image_folder import ImageFolder
from .options import add_generation, generation_of, policy_of, prompts_of
from .parts import base_hash
from .two_parts import add_parts


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sample`."""
    add = parser.add_argument
    add_drawing(parser)
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the images")
    add("--resume", action="store_true", help="go on with an interrupted run: draw the images that are not in the folder")
    add("--overwrite", action="store_true", help="write into a folder that is not empty; an earlier run's images are removed from it")
    searching.configure(parser)
    optimising.configure(parser)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Add what says how images are drawn: prompts, models, guide, sampler, device."""
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    add_parts(parser)
    add(
        "--switch",
        default="auto",
        metavar="WHERE",
        help="first step of the tuned model: 15, 75%%, sigma=0.63, last=6 (of its own steps), or auto: the LoRA's (default)",
    )
    add(
        "--until",
        metavar="WHERE",
        help="step from which the base model is back, written as --switch: `--switch 0 --until 2` (default: never)",
    )
    add_guide(parser)
    add_generation(parser)


def run(args: argparse.Namespace) -> int:
    """Generate images with the base model, the tuned model from the switch on, or both at once; returns the exit status.

    Everything is checked before the first image is drawn. Each batch of images is written as soon as it is drawn.
    """
    settings, prompts = generation_of(args), prompts_of(args)
    chain = Chain.of(args, settings)
    folder = ImageFolder(args.out)
    folder.check(resume=args.resume, overwrite=args.overwrite)
    optimised = optimising.Optimising.open(args, prompts, folder, chain)
    search = None if optimised else searching.Searching.open(args, prompts, folder)
    policy, guide = policy_of(args), chain.guide
    steps = chain.on(policy)
    models, mix, levels, k, end = steps.models, steps.mix, steps.levels, steps.k, steps.end
    facts = {
        "k": k,
        **({} if end is None else {"until": end}),
        **(guide.facts if guide else {}),
        **chain.parts.facts,
        **_facts(args, prompts),
        **(search.facts() if search else {}),
        **(optimised.facts() if optimised else {}),
    }
    searcher = search.searcher(policy, settings, mix, models, levels) if search else None
    folder.begin({**settings.facts, **facts}, resume=args.resume, overwrite=args.overwrite)
    try:
        if search is not None and searcher is not None:
            new = search.draw(searcher, prompts, folder)
        elif optimised is not None:
            new = optimised.draw(optimised.optimiser(policy, settings, mix, models, levels), prompts, folder)
        else:
            new = _draw(policy, prompts, settings, mix, models, folder, levels)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(prompts) - len(folder.missing(range(len(prompts))))} of {len(prompts)} images are in {args.out}; "
            "the same command with --resume goes on"
        ) from None
    own = " by its own schedule" if settings.tuned_steps else ""
    taken = "" if k is None else f" (tuned from step {k} to {len(levels) - 1 if end is None else end} of {len(levels) - 1}{own})"
    taken = f" ({guide.name}, {mix.calls(levels.tolist())} network calls an image)" if guide else taken
    kept = "" if new == len(prompts) else f"; {len(prompts) - new} were there"
    print(f"wrote {new} images to {args.out}{taken}{kept}; {folder.write_sheet(len(prompts), args.n)}")
    return 0


def _facts(args: argparse.Namespace, prompts: Sequence[str]) -> dict[str, Any]:
    """What the images depend on beside the sampler's settings and the two parts."""
    return {
        "model": args.model,
        **{f.name: getattr(args, f.name) for f in fields(ModelOptions)},
        "image_size": args.image_size,
        "model_sha256": base_hash(args.model),
        "n": args.n,
        "prompts": list(prompts[:: args.n]),
        "images": len(prompts),
    }


def _draw(
    policy: DiffusersPolicy,
    prompts: Sequence[str],
    settings: Generation,
    mix: Mix,
    models: Mapping[str, DiffusersPolicy],
    folder: ImageFolder,
    levels: Tensor,
) -> int:
    """Draw and write the images that are not in the folder; returns their number.

    A batch of which one is missing is drawn as a whole: rounding may depend on the batch, and a resumed run is to equal another.
    """
    from tqdm import tqdm

    new = 0
    with tqdm(total=len(prompts), unit="image", disable=not sys.stderr.isatty()) as bar:
        for numbers in batches(len(prompts), policy, settings):
            missing = folder.missing(numbers)
            if missing:
                part = [prompts[i] for i in numbers]
                drawn = generate(policy, part, settings, {"": mix}, models, first=numbers.start, grids={"": levels})[""]
                for i in missing:
                    image = drawn[i - numbers.start]
                    if not bool(image.isfinite().all()):
                        raise ValueError(
                            f"image {i}: the model gave values that are not finite, which would be a black image: "
                            "lower --strength, or give another LoRA"
                        )
                    folder.write(i, image, prompts[i])
            new += len(missing)
            bar.update(len(numbers))
            for each in (policy, *models.values()):
                each.prompts.trim()
    return new
