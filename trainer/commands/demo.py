"""`python -m trainer demo`."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default demo)")
    parser.add_argument("--quick", action="store_true", help="everything small: checks that it runs, not that it works")
    parser.add_argument("--seed", type=int, default=0, help="training and test seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    parser.add_argument("--resume", action="store_true", help="continue after Ctrl-C or a crash")


def run(args: argparse.Namespace) -> int:
    """Train, generate and evaluate on the embedded model; returns the exit status."""
    from ..demo.show import show
    from .options import quiet_libraries

    quiet_libraries()
    print("1 to 2 minutes on two CPU cores" if args.quick else "5 to 15 minutes on two CPU cores; --quick takes 1 to 2", flush=True)
    results = show(args.out, quick=args.quick, seed=args.seed, overwrite=args.overwrite, resume=args.resume)
    print(f"wrote {args.out / 'report.html'} ({results['seconds']:.0f} s, {results['peak_rss_mb']:.0f} MB)")
    return 0
