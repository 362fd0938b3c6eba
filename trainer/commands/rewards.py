"""`python -m trainer rewards`: what there is, fetching weights, measuring statistics."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import ConfigError
from ..metrics.dino import DINO
from ..rewards.calibrate import measure, write
from ..rewards.files import download, find, folders
from ..rewards.registry import REWARDS, Places, open_reward


def configure(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="every reward, its licence, its source, and whether its weights are here")
    fetch = actions.add_parser("download", help="fetch a reward's weights from the hub; nothing else ever does")
    fetch.add_argument("name", help="a reward's name, or dino")
    fetch.add_argument("--folder", type=Path, help="where to (default: ComfyUI's models/rewards, or the user's cache)")
    statistics = actions.add_parser("calibrate", help="measure a reward's mean and standard deviation on pictures of the base model")
    statistics.add_argument("name", help="a reward's name, or a Python file")
    statistics.add_argument("paths", nargs="+", help="as for `score`")
    statistics.add_argument("--prompt", help="one prompt for all")
    statistics.add_argument("--prompt-column", default="", help="column of the manifest that holds the prompt")
    statistics.add_argument("--device", default="cpu", help="cpu, cuda, mps or xpu")


def run(arguments: argparse.Namespace) -> int:
    """List, fetch, or measure."""
    if arguments.action == "list":
        return _list()
    if arguments.action == "download":
        return _download(arguments.name, arguments.folder)
    return _calibrate(arguments)


def _list() -> int:
    places = folders()
    width = max(map(len, REWARDS))
    for name, entry in REWARDS.items():
        here = all(find(name, file, places) for file in entry.files.values())
        print(f"{name:<{width}}  {'here' if here else 'missing':<7}  {entry.licence:<29}  {entry.source}")
    print(f"{'dino':<{width}}  {'here' if find('dino', DINO, places) else 'missing':<7}  {'Apache-2.0 (card)':<29}  for `evaluate`")
    print("\nfiles, and where their names were read; a revision that was not read there is not pinned:")
    for file in dict.fromkeys([*(f for entry in REWARDS.values() for f in entry.files.values()), DINO]):
        print(f"  {file.repository} {file.path} at {file.revision[:12]}: {file.read_at}")
    print(f"weights are looked for in {', '.join(map(str, places))}")
    return 0


def _download(name: str, folder: Path | None) -> int:
    if name not in (*REWARDS, "dino"):
        raise ConfigError(f"unknown reward {name!r}: use {', '.join(REWARDS)} or dino")
    files = [DINO] if name == "dino" else REWARDS[name].files.values()
    if not files:
        raise ConfigError(f"{name} needs no weights")
    for file in files:
        print(f"{file.path} of {file.repository}", flush=True)
        print(f"  {download(name, file, folder or folders()[0])}")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from ..scoring.items import find_items
    from ..scoring.scorer import score

    path = Places().statistics(arguments.name)
    part = open_reward(arguments.name, arguments.device)
    items = find_items(arguments.paths, arguments.prompt, arguments.prompt_column)
    scores: list[float] = []
    for row in score(items, [part], arguments.device):
        if row.error:
            raise ValueError(row.error)
        scores.append(row.raw[part.name])
    mean, std, number = measure(scores)
    write(path, mean, std, number)
    print(f"{arguments.name}: mean {mean:.5g}, standard deviation {std:.5g} over {number} images; wrote {path}")
    return 0
