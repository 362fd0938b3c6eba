"""`python -m trainer compare`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..config import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    methods = "objectives (refl, flowbp-sparse, diffusion-dpo …); `reward`, `pairs`, `labels`, `good`, `images`: all that take it; `all`"
    parser.add_argument("methods", nargs="+", metavar="METHOD", help=methods)
    parser.add_argument("--budget", type=int, metavar="N", help="denoiser calls that each method may spend on training (default 12000)")
    folder = "output folder; finished methods in it are kept, an interrupted one continues"
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=folder)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="training seed; test prompts and noise are always the same")
    parser.add_argument("--quick", action="store_true", help="everything small: checks that it runs, not that it works")


def run(args: argparse.Namespace) -> int:
    """Train the methods, evaluate them, and write one page; returns the exit status."""
    from ..demo.compare import QUICK, Size, check, compare
    from .options import quiet_libraries

    quiet_libraries()
    size = QUICK if args.quick else Size()
    if args.budget is not None:
        if args.budget < 1:
            raise ConfigError(f"--budget {args.budget}: give at least 1 denoiser call")
        size = replace(size, budget=args.budget)
    check(args.methods, args.out, size, args.seed)
    results = compare(args.methods, args.out, size, args.seed, quick=args.quick)
    print(f"wrote {args.out / 'report.html'} ({results['seconds']:.0f} s)")
    return 0
