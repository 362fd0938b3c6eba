"""`python -m trainer rewards`: list the rewards, download their weights, measure their statistics."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import ConfigError
from ..data.report import Report
from ..metrics.dino import DINO
from ..rewards.calibrate import measure, write
from ..rewards.files import download, find, weight_folders
from ..rewards.registry import REWARDS, WeightFolders, load
from .options import add_device, device_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `rewards`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="list every reward with its licence and source, and whether its weights are found")
    fetch = actions.add_parser("download", help="download a reward's weights from the Hugging Face hub; no other command downloads")
    fetch.add_argument("name", metavar="NAME", help="name of a reward, or dino")
    fetch.add_argument("--folder", type=Path, help="where to (default: ComfyUI's models/rewards, or the user's cache)")
    calibrate = actions.add_parser("calibrate", help="measure a reward's mean and standard deviation on images of the base model")
    calibrate.add_argument("name", metavar="NAME", help="name of a reward, or a Python file")
    calibrate.add_argument("paths", nargs="+", metavar="PATH", help="image folders, images, globs or manifests, as for `score`")
    calibrate.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    calibrate.add_argument(
        "--prompt-column", default="", metavar="NAME", help="the manifest's column of prompts (default prompt, caption or text)"
    )
    add_device(calibrate)


def run(args: argparse.Namespace) -> int:
    """List, download, or calibrate; returns the exit status."""
    if args.action == "list":
        _list()
    elif args.action == "download":
        _download(args.name, args.folder)
    else:
        _calibrate(args)
    return 0


def _list() -> None:
    folders = weight_folders()
    width = max(map(len, REWARDS))
    for name, entry in REWARDS.items():
        found = all(find(name, file, folders) for file in entry.files.values())
        print(f"{name:<{width}}  {'here' if found else 'missing':<7}  {entry.licence:<29}  {entry.source}")
    print(f"{'dino':<{width}}  {'here' if find('dino', DINO, folders) else 'missing':<7}  {'Apache-2.0 (card)':<29}  for `evaluate`")
    print("\nfiles, and the source of their names; a file without a revision is not pinned:")
    for file in dict.fromkeys([*(f for entry in REWARDS.values() for f in entry.files.values()), DINO]):
        print(f"  {file.repository} {file.path} at {file.revision[:12]}: {file.read_at}")
    print(f"weights are looked for in {', '.join(map(str, folders))}")


def _download(name: str, folder: Path | None) -> None:
    if name not in (*REWARDS, "dino"):
        raise ConfigError(f"unknown reward {name!r}: use {', '.join(REWARDS)} or dino")
    files = [DINO] if name == "dino" else REWARDS[name].files.values()
    if not files:
        raise ConfigError(f"{name} needs no weights")
    for file in files:
        print(f"{file.path} of {file.repository}", flush=True)
        print(f"  {download(name, file, folder or weight_folders()[0])}")


def _calibrate(args: argparse.Namespace) -> None:
    from ..scoring.items import find_items
    from ..scoring.scorer import score

    device = device_of(args)
    path = WeightFolders().statistics(args.name)
    report = Report()
    items = find_items(args.paths, args.prompt, args.prompt_column, report)
    report.show()
    spec = load(args.name, device)
    scores: list[float] = []
    for row in score(items, [spec], device):
        if row.error:
            raise ValueError(row.error)
        scores.append(row.raw[spec.name])
    mean, std, number = measure(scores)
    write(path, mean, std, number)
    print(f"{args.name}: mean {mean:.5g}, standard deviation {std:.5g} over {number} images; wrote {path}")
