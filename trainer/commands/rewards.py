"""`python -m trainer rewards`: list the rewards, download their weights, measure their statistics, take two-tower ones apart."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..data.captions import read_prompts
from ..data.report import Report
from ..metrics.dino import DINO
from ..metrics.inception import INCEPTION
from ..rewards.calibrate import measure, write
from ..rewards.decomposed import OMEGA, CommonText, Decomposed
from ..rewards.files import WeightFile, download, state, weight_folders
from ..rewards.http_judge import capabilities_of
from ..rewards.judge_client import is_url
from ..rewards.registry import REWARDS, WeightFolders, load, tower_hash
from ..rewards.two_tower import TwoTower
from .options import add_device, add_remote, device_of

EXTRACTORS: dict[str, tuple[WeightFile, str, str]] = {
    "dino": (DINO, "Apache-2.0 (card)", "for `evaluate`"),
    "inception": (INCEPTION, "Apache-2.0 (code)", "for FID in `evaluate`"),
}
"""Feature extractors that are downloaded as rewards are: the file, its licence, and what it is for."""


def names() -> list[str]:
    """Everything that `rewards download` knows."""
    return [*REWARDS, *EXTRACTORS]


def files_of(name: str) -> list[WeightFile]:
    """The files of a reward or a feature extractor."""
    return [EXTRACTORS[name][0]] if name in EXTRACTORS else list(REWARDS[name].files.values())


def found_files(name: str) -> dict[str, Any]:
    """`state` (here, missing, or built in), `files`, and for rewards that need them whether `statistics` are known."""
    if name in EXTRACTORS:
        return state(name, files_of(name), weight_folders())
    files = files_of(name)
    if not files:
        return {"state": "built in", "files": []}
    found = state(name, files, weight_folders())
    known = WeightFolders().read_statistics(name) is not None or name == "imagereward"  # whose authors' code holds them
    return {**found, "statistics": known}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `rewards`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="list every reward with its licence and source, and whether its weights are found")
    fetch = actions.add_parser("download", help="download a reward's weights from the Hugging Face hub; no other command downloads")
    fetch.add_argument("name", metavar="NAME", help=f"name of a reward, or {' or '.join(EXTRACTORS)}")
    fetch.add_argument("--folder", type=Path, help="where to (default: ComfyUI's models/rewards, or the user's cache)")
    calibrate = actions.add_parser("calibrate", help="measure a reward's mean and standard deviation on images of the base model")
    calibrate.add_argument("name", metavar="NAME", help="name of a reward, a Python file, or a judge's URL")
    calibrate.add_argument("paths", nargs="+", metavar="PATH", help="image folders, images, globs or manifests, as for `score`")
    calibrate.add_argument("--prompt", metavar="TEXT", help="one prompt for all images")
    calibrate.add_argument(
        "--prompt-column", default="", metavar="NAME", help="the manifest's column of prompts (default prompt, caption or text)"
    )
    add_remote(calibrate.add_argument)
    add_device(calibrate)
    about = "write the text direction that prompts have in common, for the rewards relevant@FILE and irrelevant@FILE (LongAlign)"
    common = actions.add_parser("common", help=about)
    common.add_argument("name", metavar="NAME", help="a two-tower reward: a name, NAME@FILE, or a reward folder")
    common.add_argument(
        "prompts", type=Path, metavar="PROMPTS", help="text file, one prompt per line, or .csv or .jsonl; give 1000 or more"
    )
    common.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, .json")
    common.add_argument(
        "--omega", type=float, default=OMEGA, metavar="W", help=f"share of the direction that stays, 0 to 1 (default {OMEGA})"
    )
    common.add_argument("--segments", action="store_true", help="score a prompt by the mean over its sentences")
    add_device(common)


def run(args: argparse.Namespace) -> int:
    """List, download, calibrate, or take apart; returns the exit status."""
    if args.action == "list":
        _list()
    elif args.action == "download":
        _download(args.name, args.folder)
    elif args.action == "common":
        _common(args)
    else:
        _calibrate(args)
    return 0


def _list() -> None:
    width = max(map(len, names()))
    rows = {name: (entry.licence, entry.source) for name, entry in REWARDS.items()}
    rows |= {name: (licence, purpose) for name, (_, licence, purpose) in EXTRACTORS.items()}
    for name, (licence, source) in rows.items():
        found = state(name, files_of(name), weight_folders())["state"]
        print(f"{name:<{width}}  {found:<7}  {licence:<29}  {source}")
    print("\nfiles, and the source of their names; a file without a revision is not pinned:")
    for file in dict.fromkeys(file for name in rows for file in files_of(name)):
        print(f"  {file.repository} {file.path} at {file.revision[:12]}: {file.read_at}")
    print("a judge in an environment of its own is named by its URL, such as http://127.0.0.1:8077: docs/judges.md")
    print(f"weights are looked for in {', '.join(map(str, weight_folders()))}")


def _download(name: str, folder: Path | None) -> None:
    if name not in names():
        raise ConfigError(f"unknown reward {name!r}: use {', '.join(names()[:-1])} or {names()[-1]}")
    files = files_of(name)
    if not files:
        raise ConfigError(f"{name} needs no weights")
    for file in files:
        print(f"{file.path} of {file.repository}", flush=True)
        print(f"  {download(name, file, folder or weight_folders()[0])}")


def _common(args: argparse.Namespace) -> None:
    if args.out.suffix != ".json" or not 0 <= args.omega <= 1:
        raise ConfigError(f"--out {args.out} --omega {args.omega:g}: give a .json file, and a share of 0 to 1")
    reward = load(args.name, device_of(args)).reward
    if not isinstance(reward, TwoTower):
        raise ConfigError(f"{args.name} is not a two-tower reward: its score must be the product of an image's features and a text's")
    prompts = list(dict.fromkeys(read_prompts(args.prompts)))
    file = CommonText.of(reward, args.name, tower_hash(args.name), prompts, args.omega, args.segments)
    file.write(args.out)
    along = Decomposed(reward, file, "relevant").texts(prompts) @ torch.tensor(file.common).to(reward.home)
    print(f"prompts lie along the common direction by {float(along.mean()):.3f} ± {float(along.std()):.3f} (1: all of a prompt)")
    print(f"wrote {args.out} of {len(prompts)} prompts; use it as --reward relevant@{args.out}, or irrelevant@{args.out}")


def _calibrate(args: argparse.Namespace) -> None:
    from ..scoring.items import find_items
    from ..scoring.scorer import score

    device = device_of(args)
    if is_url(args.name):
        capabilities_of(args.name, args.allow_remote)  # which names the place of its statistics
    path = WeightFolders().statistics(args.name)
    report = Report()
    items = find_items(args.paths, args.prompt, args.prompt_column, report)
    report.show()
    spec = load(args.name, device, allow_remote=args.allow_remote)
    scores: list[float] = []
    for row in score(items, [spec], device):
        if row.error:
            raise ValueError(row.error)
        scores.append(row.raw[spec.name])
    mean, std, number = measure(scores)
    write(path, mean, std, number)
    print(f"{args.name}: mean {mean:.5g}, standard deviation {std:.5g} over {number} images; wrote {path}")
