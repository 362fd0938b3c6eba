"""`python -m trainer taste`: fit a head on a two-tower reward to a person's choices, and say which images to judge next."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..config import ConfigError
from ..data.report import Report
from ..rewards.registry import load, tower_hash
from ..rewards.two_tower import TwoTower
from ..runtime.files import write_text
from ..scoring.items import find_items, prompt_for
from ..taste.active import next_pairs
from ..taste.comparisons import gather
from ..taste.fit import fit_taste, image_features
from .options import add_device, device_of

NEXT = "next"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `taste`."""
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="CHOICES",
        help=f"files of choices, or tables and folders of pairs; with {NEXT} first: say which pairs of --images to judge next",
    )
    add(
        "--tower",
        required=True,
        metavar="NAME",
        help="two-tower reward whose features the head reads: pickscore, hpsv2.1, clip, demo-proxy",
    )
    add("--out", type=Path, metavar="FILE", help="the fitted taste, a safetensors file; its report is written beside it")
    add("--person", default="", metavar="NAME", help="whose taste, where several people chose (default: all together)")
    add(
        "--asked",
        action="append",
        default=[],
        type=Path,
        metavar="CHOICES",
        help=f"choices of pairs that {NEXT} chose: learnt from, but not counted in the agreement, which is higher on them",
    )
    add("--overwrite", action="store_true", help="replace the file and its report")
    add("--images", action="append", metavar="PATH", help=f"{NEXT}: image folders, images, globs or tables, as for `score`")
    add("--prompt", metavar="TEXT", help=f"{NEXT}: prompt of all images (default: from the table, a .txt file, or inside the image)")
    add("-n", type=int, default=20, metavar="N", help=f"{NEXT}: number of pairs (default 20)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Fit and write, or list pairs."""
    if args.paths[:1] == [NEXT]:
        return _next(args)
    if not args.paths or args.out is None:
        raise ConfigError("give files of choices and --out FILE.safetensors")
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"--out {args.out}: give a name that ends in .safetensors")
    beside = args.out.with_suffix(".json")
    there = next((path for path in (args.out, beside) if path.exists()), None)
    if there is not None and not args.overwrite:
        raise ConfigError(f"{there} exists: add --overwrite, or give another --out")
    found = gather([Path(path) for path in args.paths], asked=args.asked)
    head, report = fit_taste(found, _tower(args), args.tower, tower_hash(args.tower), args.person)
    head.write(args.out)
    write_text(json.dumps(report.facts(), indent=1) + "\n", beside)
    print("\n".join(report.lines()))
    print(f"wrote {args.out} and {beside}; use it as --reward taste@{args.out}")
    return 0


def _tower(args: argparse.Namespace) -> TwoTower:
    reward = load(args.tower, device_of(args)).reward
    if not isinstance(reward, TwoTower):
        raise ConfigError(f"--tower {args.tower} has no features of images and texts: give a two-tower reward, such as pickscore or clip")
    return reward


@torch.no_grad()
def _next(args: argparse.Namespace) -> int:
    """Print pairs of images, the most telling first."""
    if not args.images:
        raise ConfigError(f"taste {NEXT} chooses among images: give --images FOLDER")
    report = Report()
    items = find_items(args.images, args.prompt, "", report)
    report.show()
    prompts = [prompt_for(item) for item in items]
    bare = next((item.path for item, prompt in zip(items, prompts) if not prompt), None)
    if bare is not None:
        raise ConfigError(f"{bare} has no prompt: write one into {bare.stem}.txt beside it, or give --prompt")
    texts, tower = [prompt or "" for prompt in prompts], _tower(args)
    given = [Path(path) for path in args.paths[1:]]
    found = gather(given, fewest=1, asked=args.asked) if given or args.asked else None
    asked = next_pairs(tower, image_features(tower, [item.path for item in items]), texts, args.n, found)
    if not asked:
        raise ConfigError("no prompt has two images: a choice is between two images of one prompt")
    print("bits\tchance of the first\tfirst\tsecond\tprompt")
    for one in asked:
        print(f"{one.bits:.3f}\t{one.chance:.2f}\t{items[one.first].path}\t{items[one.second].path}\t{texts[one.first]}")
    return 0
