"""`python -m trainer score --engine ray`: from shards of images, local or an object store's, to a folder of tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ConfigError
from ..data.report import Report
from ..rewards.weighted import RewardSpec
from ..scoring.ray_engine import Scoring, check_ray, on_ray, score_shards
from ..scoring.shards import find_shards
from ..text import valid


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the engine."""
    add = parser.add_argument
    add("--engine", choices=("local", "ray"), default="local", help="ray: shards of images on Ray Data; --out is a folder (default local)")
    add("--workers", type=int, default=1, metavar="N", help="with --engine ray: workers, each with its own model (default 1)")
    add("--shard-size", type=int, default=1024, metavar="N", help="with --engine ray: images of a folder per shard (default 1024)")
    add("--form", choices=("parquet", "csv"), default="parquet", help="with --engine ray: of the tables (default parquet)")


def run_on_ray(args: argparse.Namespace, parts: Sequence[RewardSpec], settings: Mapping[str, Any]) -> int:
    """Score by shards; 0 when every image of every shard was scored, else 1."""
    if args.top or args.write_back:
        raise ConfigError("--engine ray: --top and --write-back need the images on this machine: use --engine local")
    if not args.out or len(args.out) > 1:
        raise ConfigError("--engine ray: give one --out FOLDER, local or as s3://bucket/scores")
    if args.workers < 1 or args.shard_size < 1:
        raise ConfigError("--workers and --shard-size need at least 1")
    check_ray()
    report = Report()
    size = -(-args.shard_size // args.batch) * args.batch  # whole batches: an image has the batch mates of --engine local
    shards = find_shards(args.paths, size, report, args.prompt_column)
    report.show()
    rewards = tuple((part.name, part.weight) for part in parts)
    shared = {key: getattr(args, key) for key in ("form", "raw", "size", "prompt", "prompt_column", "batch", "device", "allow_remote")}
    shared["prompt"] = None if args.prompt is None else valid(args.prompt)
    scoring = Scoring(rewards, args.out[0], **shared)
    found = score_shards(shards, scoring, settings, on_ray(args.workers), resume=args.resume, overwrite=args.overwrite)
    earlier = f", {found.before} of them before" if found.before else ""
    print(f"scored {found.done} of {len(shards)} shards{earlier}; wrote {scoring.out}")
    paths = {shard.name: shard.path or f"{shard.images[0].path} …" for shard in shards}
    for name, reason in found.unread.items():
        print(f"shard not scored: {paths[name]}: {reason}", file=sys.stderr)
    for image in found.bad:
        print(f"not scored: {image.error}", file=sys.stderr)
    return 1 if found.unread or found.bad else 0
