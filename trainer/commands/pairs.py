"""`python -m trainer pairs`: draw or read images, score them, and write pairs and labels to learn preferences from."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..config import ConfigError, build, plain
from ..data.manifest import PROMPT_COLUMNS
from ..data.report import Report
from ..data.rows import read_rows
from ..pairs.filter import Filter, check_quality, filtered, valued
from ..pairs.label import Label, Pair, Scored, candidates, relabelled, without_repeats
from ..pairs.near_copies import Thumbnails
from ..pairs.report import lines, report
from ..pairs.split import split
from ..text import counted
from . import pairs_source as sources
from . import sample
from .options import add_remote, device_of
from .pairs_arguments import as_arguments, with_earlier
from .pairs_folder import PairsFolder
from .pairs_rewards import Judges

_LABELS = ("sum", "majority", "given")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pairs`."""
    sample.add_drawing(parser)
    group = parser.add_argument_group("pairs")
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for images, scores, tables and report.json")
    add(
        "--resume",
        action="store_true",
        help="go on with an interrupted run, or label and filter a finished one anew; its other arguments stay",
    )
    add("--overwrite", action="store_true", help="start again in the folder of an earlier run")
    add("--from", dest="source", action="append", metavar="PATH", help="score these images instead of drawing: as `score` takes them")
    add("--from-pairs", metavar="SOURCE", help="score these pairs instead of drawing: as `train --pairs` takes them")
    add("--reward", action="append", metavar="NAME[=WEIGHT]", help="what ranks images; several times: each has a vote (default demo-proxy)")
    add("--heldout", metavar="NAME", help="a reward that ranks nothing, reported beside the others")
    add_remote(add)
    add("--raw", action="store_true", help="raw scores, whose units margins then have, instead of standard deviations")
    about = "better is: sum, the weighted sum of scores (default); majority, the rewards' votes; given, as --from-pairs says (its default)"
    add("--label", choices=_LABELS, help=about)
    add("--split", type=float, metavar="X", help="share of the pairs that is held out, prompts and images of its own (0.1)")
    add("--quality", type=Path, metavar="FILE", help="table with columns prompt and quality, for --quality-weight")
    add("--batch", type=int, metavar="N", help="images scored together (default 32)")
    for f in fields(Filter):
        kind = type(f.default)
        add(f"--{f.name.replace('_', '-')}", type=kind, metavar="X", help=f"{f.metadata['help']} (default {f.default})".replace("%", "%%"))


def run(args: argparse.Namespace) -> int:
    """Draw, score, label, filter, split, write; returns the exit status: 1 where images could not be scored.

    Everything is checked before the first image is drawn.
    """
    folder = PairsFolder(args.out)
    args = with_earlier(args, folder.arguments(args.given), configure) if args.resume else args
    args.split, args.batch = 0.1 if args.split is None else args.split, 32 if args.batch is None else args.batch
    settings = _filter(args)
    _check(args, settings)
    label = args.label or ("given" if args.from_pairs else "sum")
    judges = Judges.open(args, device_of(args))
    quality = _quality(args.quality) if args.quality else None
    judges.check_value(settings, quality)
    source = sources.source_of(args, judges.needs_prompt)
    if settings.quality_weight:
        check_quality(source.all_prompts, quality or {})
    facts = {**source.facts, **judges.facts}
    folder.begin(facts, as_arguments(args, configure), resume=args.resume, overwrite=args.overwrite)
    source.provide(folder)
    scored, bad = judges.scored(source, folder, args.batch)
    dropped: Counter[str] = Counter(source.dropped)
    if bad:
        dropped["images not scored"] = len(bad)
    pairs = _labelled(label, source, scored, judges, dropped)
    thumbnails = Thumbnails()
    kept = filtered(valued(pairs, settings, judges.text_features, quality), settings, thumbnails, dropped)
    if not kept:
        reasons = ", ".join(counted(number, why) for why, number in dropped.items())
        raise ValueError(f"no pair is left ({reasons}): with --resume other settings label and filter the same scores")
    train, heldout = split(kept, args.split, args.seed or 0, thumbnails, settings.near_copies)
    parts = {"pairs": train, "pairs-heldout": heldout} if heldout else {"pairs": train}
    found = report(pairs, parts, dropped, judges.names, args.heldout or "", source.given, args.split)
    used = {"label": label, "raw": args.raw, "split": args.split, "filter": plain(settings)}
    names = folder.finish(parts, judges.names, {**found, "settings": used})
    print(
        "\n".join(lines(found, "raw scores" if args.raw else "standard deviations, weighted" if label != "majority" else "median gap, σ"))
    )
    print(f"wrote {', '.join(names)} in {args.out}")
    return 1 if bad else 0


def _filter(args: argparse.Namespace) -> Filter:
    given = {f.name: value for f in fields(Filter) if (value := getattr(args, f.name)) is not None}
    if args.from_pairs and args.label in (None, "given"):
        given = {"per_prompt": 0, **given}  # a person chose each of them; of drawn images most pairs say the same again
    try:
        return build(Filter, given, "--")
    except ConfigError as error:
        said = str(error).replace("--: ", "--")
        for name in given:
            said = said.replace(name, name.replace("_", "-"))
        raise ConfigError(said) from error


def _check(args: argparse.Namespace, settings: Filter) -> None:
    if args.source and args.from_pairs:
        raise ConfigError("--from and --from-pairs are both given: images, or pairs of them")
    if args.label == "given" and not args.from_pairs:
        raise ConfigError("--label given keeps the labels of --from-pairs: give that, or --label sum or majority")
    if args.source or args.from_pairs:
        unread = sources.drawing_given(args)
        if unread:
            raise ConfigError(f"{unread} has no effect on images that exist: leave it out, or --from and --from-pairs")
    if not 0 <= args.split < 1:
        raise ConfigError(f"--split {args.split:g}: give a share from 0 (none is held out) to below 1")
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: give at least 1")
    if args.quality and not settings.quality_weight:
        raise ConfigError("--quality has no effect without --quality-weight: give both")


def _labelled(label: str, source: sources.Source, scored: Sequence[Scored], judges: Judges, dropped: Counter[str]) -> list[Pair]:
    chosen: Label | None = None if label == "given" else "majority" if label == "majority" else "sum"
    if source.given is None:
        return list(candidates(scored, judges.weights, chosen or "sum", dropped))
    known = {(one.image, one.prompt): one for one in scored}
    both = [(known.get((better, prompt)), known.get((worse, prompt))) for better, worse, prompt in source.given]
    whole = [(better, worse) for better, worse in both if better and worse]
    if len(whole) < len(both):
        dropped["pairs with an image that was not scored"] = len(both) - len(whole)
    whole, contrary = without_repeats(whole, chosen is None, dropped)
    if contrary:
        (better, worse), more = contrary[0], f" and {len(contrary) - 1} more" if len(contrary) > 1 else ""
        print(f"labelled both ways: {better.image} and {worse.image} under {better.prompt!r}{more}")
    return list(relabelled(whole, judges.weights, chosen, dropped))


def _quality(path: Path) -> dict[str, float]:
    """By prompt, the quality that a table says."""
    found: dict[str, float] = {}
    for row in read_rows(path, ("quality",), PROMPT_COLUMNS, Report()):
        prompt = str(next((row.values[column] for column in PROMPT_COLUMNS if row.values.get(column)), ""))
        try:
            value = float(str(row.values.get("quality")))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{row.where}: quality is {str(row.values.get('quality'))[:40]!r}: give a number")
        if found.setdefault(prompt, value) != value:
            raise ValueError(f"{row.where}: the quality of {prompt!r} is {found[prompt]:g} above and {value:g} here: keep one")
    return found
