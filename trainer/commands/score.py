"""`python -m trainer score`: from images to tables of scores."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..rewards.registry import open_reward
from ..rewards.weighted import Part, parse_weights
from ..scoring.items import Item, find_items
from ..scoring.journal import Journal
from ..scoring.scorer import Row, score
from ..scoring.table import Table, collect
from .options import add_device, device_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the args of `score`."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image folders, images, quoted globs, CSV or JSONL manifests (columns path and prompt)"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="one prompt for all images; default: the manifest's, the .txt file beside an image, or what ComfyUI or A1111 wrote into it",
    )
    parser.add_argument(
        "--prompt-column", default="", metavar="NAME", help="the manifest's column of prompts (default prompt, caption or text)"
    )
    parser.add_argument(
        "--reward", action="append", metavar="NAME[=WEIGHT]", help="see `rewards list`; may be given several times (default demo-proxy)"
    )
    parser.add_argument("--raw", action="store_true", help="weight raw scores instead of standardised ones")
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        metavar="N",
        help="crop images to N pixels for rewards that accept any size; 0: as they are (default)",
    )
    parser.add_argument(
        "--out", type=Path, action="append", metavar="FILE", help=".csv or .jsonl; may be given twice (default: CSV on the terminal)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace the output files")
    parser.add_argument("--write-back", action="store_true", help="write the scores into the text chunks of each PNG")
    parser.add_argument("--top", type=int, default=0, metavar="K", help="copy the K best images of each prompt to --top-folder")
    parser.add_argument("--top-folder", type=Path, default=Path("best"), metavar="FOLDER", help="folder for --top (default best)")
    parser.add_argument("--link", action="store_true", help="link the best images instead of copying them")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images per batch (default 32)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Score, write, collect; 0 when every picture was scored, 1 when some could not be."""
    if args.batch < 1 or args.top < 0 or args.size < 0:
        raise ConfigError("--batch needs at least 1; --top and --size at least 0")
    outs: list[Path] = args.out or []
    for out in outs:
        _check_output(out, args)
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not outs:
        raise ConfigError("several processes write to a file: give --out")
    device = device_of(args)
    if processes > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    weights = parse_weights(args.reward or ["demo-proxy"])
    opened = [(open_reward(name, device), weight) for name, weight in weights]
    parts = [replace(part, weight=weight, size=args.size or part.size) for part, weight in opened]
    table = Table(parts, args.raw)
    if args.top:
        table.best([], args.top)  # whether there is a score to rank by is known before the work
    items = find_items(args.paths, args.prompt, args.prompt_column)

    journal = Journal(outs[0], process, _settings(args, parts)) if outs else None
    rows = _score_all(items, parts, journal, args, device, process, processes)
    if process > 0:
        return 0
    order = {(str(i.path), i.prompt): n for n, i in enumerate(items)}
    by_path = {path: n for (path, _), n in order.items()}
    rows = sorted((r for r in rows if r.path in by_path), key=lambda r: order.get((r.path, r.prompt), by_path.get(r.path, 0)))
    good, bad = [r for r in rows if not r.error], [r for r in rows if r.error]
    for out in outs:
        table.write(good, out)
    if not outs:
        table.write_to(good, sys.stdout)
    unwritten = table.write_back(good) if args.write_back else []
    if args.top:
        collect(table.best(good, args.top), args.top_folder, args.link)
    if journal:
        journal.clear()
    for row in unwritten:
        print(f"scores not written back: {row.error}", file=sys.stderr)
    return max(_report(good, bad, table, outs), int(bool(unwritten)))


def _settings(args: argparse.Namespace, parts: Sequence[Part]) -> dict[str, Any]:
    """What must be the same when a stopped run goes on."""
    same = {"rewards": [p.name for p in parts], "size": args.size}
    return {**same, "prompt": args.prompt, "prompt column": args.prompt_column}


def _check_output(out: Path, args: argparse.Namespace) -> None:
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--out {out}: give a .csv or a .jsonl file")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _score_all(
    items: Sequence[Item],
    parts: Sequence[Part],
    journal: Journal | None,
    args: argparse.Namespace,
    device: str,
    process: int,
    processes: int,
) -> list[Row]:
    """Every row of every process, new and journalled; the first process alone gets them."""
    from tqdm import tqdm

    if journal is None:
        return list(tqdm(score(items, parts, device, args.batch), total=len(items), unit="picture", disable=not sys.stderr.isatty()))
    together: Any = None
    if processes > 1:
        from accelerate import PartialState

        # The first process may wait for one with larger pictures longer than the half hour that torch grants.
        together = PartialState(cpu=not device.startswith("cuda"), timeout=timedelta(days=7))
    if args.resume:
        left = journal.left(items)
    else:
        if journal.all() and not args.overwrite and process == 0:
            raise ConfigError(f"{journal.all()[0]} is from a run that was stopped: add --resume to go on, or --overwrite to start again")
        left = list(items)
    if together:
        together.wait_for_everyone()  # all have read the journals before any is changed
    if not args.resume and process == 0:
        journal.clear()
    if together:
        together.wait_for_everyone()
    mine = left[process::processes]
    rows = journal.append(score(mine, parts, device, args.batch))
    for _ in tqdm(rows, total=len(mine), unit="picture", disable=process > 0 or not sys.stderr.isatty()):
        pass
    if together:
        together.wait_for_everyone()
    return journal.finished() if process == 0 else []


def _report(good: Sequence[Row], bad: Sequence[Row], table: Table, outs: Sequence[Path]) -> int:
    if outs:
        print(f"scored {len(good)} pictures; wrote {', '.join(map(str, outs))}")
    if not table.summed and len(good) > 0:
        lacking = [p.name for p in table.parts if p.std is None]
        print(f"no weighted score: {', '.join(lacking)} without statistics (rewards calibrate), and no --raw", file=sys.stderr)
    for row in bad:
        print(f"not scored: {row.error}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(good) + len(bad)} pictures were not scored", file=sys.stderr)
    return 1 if bad else 0
