"""`python -m trainer score`: its flags, and one run from pictures to tables."""

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


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `score`."""
    parser.add_argument("paths", nargs="+", help="folders, pictures, quoted globs, CSV or JSONL manifests (columns path and prompt)")
    parser.add_argument("--prompt", help="one prompt for all; else a manifest's, the .txt beside a picture, or what ComfyUI or A1111 wrote")
    parser.add_argument("--prompt-column", default="", help="column of the manifest that holds the prompt")
    parser.add_argument(
        "--reward", action="append", metavar="NAME[=WEIGHT]", help="see `rewards list`; may be given several times (default demo-proxy)"
    )
    parser.add_argument("--raw", action="store_true", help="add raw scores, not standard deviations, to the weighted score")
    parser.add_argument("--size", type=int, default=0, help="pixels that pictures are cropped to for rewards without a rule of their own")
    parser.add_argument("--out", type=Path, action="append", help=".csv or .jsonl; may be given twice (default: CSV on the terminal)")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace the output files")
    parser.add_argument("--write-back", action="store_true", help="put the scores into the text of each PNG")
    parser.add_argument("--top", type=int, default=0, metavar="K", help="collect the K best pictures of each prompt in --top-folder")
    parser.add_argument("--top-folder", type=Path, default=Path("best"), help="folder for --top (default best)")
    parser.add_argument("--link", action="store_true", help="link the best pictures instead of copying them")
    parser.add_argument("--batch", type=int, default=32, help="pictures per batch (default 32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or xpu")


def run(arguments: argparse.Namespace) -> int:
    """Score, write, collect; 0 when every picture was scored, 1 when some could not be."""
    if arguments.batch < 1 or arguments.top < 0 or arguments.size < 0:
        raise ConfigError("--batch needs at least 1; --top and --size at least 0")
    outs: list[Path] = arguments.out or []
    for out in outs:
        _check_output(out, arguments)
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and not outs:
        raise ConfigError("several processes write to a file: give --out")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if processes > 1 and arguments.device == "cuda" else arguments.device
    weights = parse_weights(arguments.reward or ["demo-proxy"])
    opened = [(open_reward(name, device), weight) for name, weight in weights]
    parts = [replace(part, weight=weight, size=arguments.size or part.size) for part, weight in opened]
    table = Table(parts, arguments.raw)
    if arguments.top:
        table.best([], arguments.top)  # whether there is a score to rank by is known before the work
    items = find_items(arguments.paths, arguments.prompt, arguments.prompt_column)

    journal = Journal(outs[0], process, _settings(arguments, parts)) if outs else None
    rows = _score_all(items, parts, journal, arguments, device, process, processes)
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
    unwritten = table.write_back(good) if arguments.write_back else []
    if arguments.top:
        collect(table.best(good, arguments.top), arguments.top_folder, arguments.link)
    if journal:
        journal.clear()
    for row in unwritten:
        print(f"scores not written back: {row.error}", file=sys.stderr)
    return max(_report(good, bad, table, outs), int(bool(unwritten)))


def _settings(arguments: argparse.Namespace, parts: Sequence[Part]) -> dict[str, Any]:
    """What must be the same when a stopped run goes on."""
    same = {"rewards": [p.name for p in parts], "size": arguments.size}
    return {**same, "prompt": arguments.prompt, "prompt column": arguments.prompt_column}


def _check_output(out: Path, arguments: argparse.Namespace) -> None:
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--out {out}: give a .csv or a .jsonl file")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _score_all(
    items: Sequence[Item],
    parts: Sequence[Part],
    journal: Journal | None,
    arguments: argparse.Namespace,
    device: str,
    process: int,
    processes: int,
) -> list[Row]:
    """Every row of every process, new and journalled; the first process alone gets them."""
    from tqdm import tqdm

    if journal is None:
        return list(tqdm(score(items, parts, device, arguments.batch), total=len(items), unit="picture", disable=not sys.stderr.isatty()))
    together: Any = None
    if processes > 1:
        from accelerate import PartialState

        # The first process may wait for one with larger pictures longer than the half hour that torch grants.
        together = PartialState(cpu=not device.startswith("cuda"), timeout=timedelta(days=7))
    if arguments.resume:
        left = journal.left(items)
    else:
        if journal.all() and not arguments.overwrite and process == 0:
            raise ConfigError(f"{journal.all()[0]} is from a run that was stopped: add --resume to go on, or --overwrite to start again")
        left = list(items)
    if together:
        together.wait_for_everyone()  # all have read the journals before any is changed
    if not arguments.resume and process == 0:
        journal.clear()
    if together:
        together.wait_for_everyone()
    mine = left[process::processes]
    rows = journal.append(score(mine, parts, device, arguments.batch))
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
