"""`python -m trainer score`: from images to tables of scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data.report import Report
from ..reward import RewardUnavailable
from ..rewards.registry import load, weights_hashes
from ..rewards.weighted import RewardSpec, parse_weights
from ..runtime.processes import Processes, joined
from ..scoring.best import collect
from ..scoring.copies import copies
from ..scoring.items import Item, find_items
from ..scoring.journal import Journal
from ..scoring.ray_engine import named_parts
from ..scoring.scorer import ScoredImage, score
from ..scoring.table import Table
from .options import add_device, add_remote
from .score_shards import add_shards, run_on_ray

TIMEOUT = timedelta(days=7)  # a process with large images may keep the others waiting longer than the default half hour


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="image folders, images, quoted globs, CSV or JSONL manifests (columns path and prompt)")
    add("--prompt", metavar="TEXT", help="prompt of all images (default: from the manifest, a .txt file, or inside the image)")
    add("--prompt-column", default="", metavar="NAME", help="the manifest's column of prompts (default prompt, caption or text)")
    add("--reward", action="append", metavar="NAME[=WEIGHT]", help="see `rewards list`; may be given several times (default demo-proxy)")
    add("--raw", action="store_true", help="weight raw scores instead of standardised ones")
    add("--size", type=int, default=0, metavar="N", help="crop to N pixels for rewards that accept any size; 0: as they are (default)")
    add("--out", action="append", metavar="FILE", help=".csv or .jsonl; may be given twice (default: CSV on the terminal)")
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--overwrite", action="store_true", help="replace the output files")
    add("--write-back", action="store_true", help="write the scores into the text chunks of each PNG")
    add("--top", type=int, default=0, metavar="K", help="copy the K best images of each prompt to --top-folder")
    add("--top-folder", type=Path, default=Path("best"), metavar="FOLDER", help="folder for --top (default best)")
    add("--link", action="store_true", help="link the best images instead of copying them")
    add("--batch", type=int, default=32, metavar="N", help="images per batch (default 32)")
    add_remote(add)
    add_device(parser)
    add_shards(parser)


def run(args: argparse.Namespace) -> int:
    """Score, write, collect; 0 when every image was scored, 1 when some could not be.

    Several processes, started by `torchrun` or `accelerate launch`, share the images; the first one writes the table.
    """
    with joined(TIMEOUT) as processes:
        return _run(args, processes)


def _run(args: argparse.Namespace, processes: Processes) -> int:
    if args.batch < 1 or args.top < 0 or args.size < 0:
        raise ConfigError("--batch needs at least 1; --top and --size at least 0")
    if args.engine == "ray":
        parts = named_parts(parse_weights(args.reward or ["demo-proxy"]), args.allow_remote)
        check_names(parts)
        return run_on_ray(args, parts, _settings(args, parts))
    outs = [Path(out) for out in args.out or ()]
    resumed = args.resume and bool(outs) and bool(Journal(outs[0], 0, {}).all())
    for out in outs:
        _check_output(out, replaced=args.overwrite or resumed)
    if processes.count > 1 and not outs:
        raise ConfigError("several processes write to a file: give --out")
    device = processes.device(args.device)
    named = parse_weights(args.reward or ["demo-proxy"])
    opened = [(load(name, device, allow_remote=args.allow_remote), weight) for name, weight in named]
    parts = [replace(part, weight=weight, size=args.size or part.size) for part, weight in opened]
    check_names(parts)
    table = Table(parts, args.raw)
    if args.top:
        table.best([], args.top)  # before any work: raises where images cannot be ranked
    report = Report()
    items = find_items(args.paths, args.prompt, args.prompt_column, report)
    if args.top:
        _check_top_folder(args.top_folder, items, args.paths)
    if processes.main:
        report.show(None if outs else sys.stderr)  # without --out stdout holds the table

    journal = Journal(outs[0], processes.rank, _settings(args, parts)) if outs else None
    if journal is None:
        good, bad = _print(score(items, parts, device, args.batch), table)
    else:
        scored = _score_all(items, parts, journal, args, device, processes)
        if not processes.main:
            return 0
        good, bad = _sorted(scored, items)
    for out in outs:
        table.write(good, out)
    unwritten = table.write_back(good) if args.write_back else []
    if args.top:
        collect(table.best(good, args.top), args.top_folder, args.link)
    if journal:
        journal.clear()
    for image in unwritten:
        print(f"scores not written back: {image.error}", file=sys.stderr)
    return max(_report(good, bad, table, outs), int(bool(unwritten)))


def _settings(args: argparse.Namespace, parts: Sequence[RewardSpec]) -> dict[str, Any]:
    """The settings that must not change when an interrupted run resumes."""
    rewards = [p.name for p in parts]
    weights = weights_hashes(",".join(rewards))
    return {"rewards": rewards, "size": args.size, "prompt": args.prompt, "prompt column": args.prompt_column, "weights": weights}


def check_names(parts: Sequence[RewardSpec]) -> None:
    """ConfigError where a reward's columns would be others' too."""
    columns = ["path", "prompt", "score", *(name for part in parts for name in (part.name, part.name + "_z"))]
    twice = next((part.name for part in parts if columns.count(part.name) > 1 or columns.count(part.name + "_z") > 1), None)
    if twice is not None:
        raise ConfigError(f"--reward {twice}: the table has a column of that name: write ./{twice}")


def _check_top_folder(folder: Path, items: Sequence[Item], paths: Sequence[str]) -> None:
    """ConfigError where the best would be copied over, or beside, what is scored."""
    own = {path.resolve() for path in copies(folder)}
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--top-folder {folder} is a file: give a folder")
    if any(Path(path).is_dir() and Path(path).samefile(folder) for path in paths if folder.exists()) or any(
        item.path.resolve() in own for item in items if own
    ):
        raise ConfigError(f"--top-folder {folder} is scored itself: give another, such as {folder / 'best'}")


def _check_output(out: Path, replaced: bool) -> None:
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--out {out}: give a .csv or a .jsonl file")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give a file")
    if out.exists() and not replaced:
        raise ConfigError(f"{out} exists: add --overwrite to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _score_all(
    items: Sequence[Item], parts: Sequence[RewardSpec], journal: Journal, args: argparse.Namespace, device: str, processes: Processes
) -> list[ScoredImage]:
    """The scores of all processes, new and from journals; on other processes than the first none."""
    from tqdm import tqdm

    bar = partial(tqdm, unit="image", disable=not (processes.main and sys.stderr.isatty()))
    if not args.resume and not args.overwrite and journal.all():
        raise ConfigError(f"{journal.all()[0]} is from an interrupted run: add --resume to continue it, or --overwrite to start again")
    if args.resume and processes.main:
        journal.refresh(items)
    processes.exchange(None)
    left = journal.left(items) if args.resume else list(items)
    processes.exchange(None)  # no journal is changed before all processes have read it
    if processes.main and not args.resume:
        journal.clear()
    processes.exchange(None)
    own = left[processes.rank :: processes.count]
    try:
        for _ in bar(journal.append(score(own, parts, device, args.batch)), total=len(own)):
            pass
    except RewardUnavailable as error:
        raise RewardUnavailable(f"{error}; the scores so far are in {journal.path}: --resume goes on") from error
    processes.exchange(None)
    return journal.finished() if processes.main else []


def _print(scored: Iterable[ScoredImage], table: Table) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """Write the table to stdout, each line when its image is scored; returns the images with a score and those with an error."""
    good: list[ScoredImage] = []
    bad: list[ScoredImage] = []

    def rows() -> Iterator[ScoredImage]:
        for row in scored:
            (bad if row.error else good).append(row)
            if not row.error:
                yield row

    table.write_to(rows(), sys.stdout)
    return good, bad


def _sorted(scored: Sequence[ScoredImage], items: Sequence[Item]) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """The images with a score and those with an error, in the order of the items; others, of a resumed journal, are dropped."""
    order = {(str(i.path), i.prompt): n for n, i in enumerate(items)}
    by_path = {path: n for (path, _), n in order.items()}
    own = [s for s in scored if s.path in by_path]
    own.sort(key=lambda s: order.get((s.path, s.prompt), by_path[s.path]))
    return [s for s in own if not s.error], [s for s in own if s.error]


def _report(good: Sequence[ScoredImage], bad: Sequence[ScoredImage], table: Table, outs: Sequence[Path]) -> int:
    if outs:
        print(f"scored {len(good)} images; wrote {', '.join(map(str, outs))}")
    if not table.summed and len(good) > 0:
        lacking = [p.name for p in table.parts if p.std is None]
        print(f"no weighted score: {', '.join(lacking)} without statistics (rewards calibrate), and no --raw", file=sys.stderr)
    for image in bad:
        print(f"not scored: {image.error}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(good) + len(bad)} images were not scored", file=sys.stderr)
    return 1 if bad else 0
