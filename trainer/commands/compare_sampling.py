"""`python -m trainer compare-sampling`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare-sampling`."""
    add = parser.add_argument
    add("methods", nargs="*", metavar="METHOD", help="searches to compare with best-of-n and with more steps (default: all)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="output folder; what is finished in it is kept")
    add("--budgets", type=int, nargs="+", metavar="N", help="model calls, as multiples of those of one image (default 2 4 8 16)")
    add("--seeds", type=int, nargs="+", metavar="N", help="seeds of the noise (default 0 1 2)")
    add("--prompts", type=int, metavar="N", help="prompts (default 12)")
    add("-n", type=int, metavar="N", help="images per prompt and seed, at least 2 (default 4)")
    add("--quick", action="store_true", help="everything small: checks that it runs, not that it works")


def run(args: argparse.Namespace) -> int:
    """Draw, judge and write one page; returns the exit status."""
    from ..demo.sampling_study import QUICK, Size, compare, names_of
    from ..search.settings import METHODS
    from .options import quiet_libraries

    quiet_libraries()
    unknown = next((name for name in args.methods if name not in METHODS), None)
    if unknown is not None:
        raise ConfigError(f"unknown search {unknown!r}: use some of {', '.join(METHODS)}")
    given = {"prompts": args.prompts, "per_prompt": args.n, "budgets": args.budgets, "seeds": args.seeds}
    lists = {key: tuple(dict.fromkeys(value)) if isinstance(value, list) else value for key, value in given.items() if value is not None}
    size = replace(QUICK if args.quick else Size(), **lists)
    if min(size.budgets) < 2 or size.per_prompt < 2 or size.prompts < 2:
        raise ConfigError("--budgets, --prompts and -n: give at least 2")
    results = compare(names_of(args.methods), args.out, size)
    print(f"wrote {args.out / 'report.html'} ({results['seconds']:.0f} s)")
    return 0
