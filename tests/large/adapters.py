"""Processor time of switching a policy's adapter off and on again, on whole models without memory: adapters.py [sdxl flux-dev]

`--against CHECKOUT` measures another revision, 0.1.0 too, in turn with this one: a round of each in its own process, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def work(name):
    """Answer each line of the input with the milliseconds of one switch, after one with the count of adapted modules."""
    try:
        from trainer.models.meta import meta_policy
    except ImportError:  # 0.1.0
        from trainer.policies.outline import outline as meta_policy
    from trainer.policy import Lora

    policy = meta_policy(name)
    policy.add_lora(Lora())
    print(len(policy.parameters()) // 2, flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        with policy.adapters.using("base") if hasattr(policy, "adapters") else policy.adapter("base"):
            pass
        print(1e3 * (time.process_time() - begin), flush=True)


def start(tree, name):
    """A process that measures the trainer of `tree`, and its count of modules."""
    command = [sys.executable, __file__, "--work", name]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(tree)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def main(given=None):
    """Print a row for each model and revision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["sdxl", "flux-dev"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--against", type=Path, help="a checkout of another revision")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.work:
        return work(arguments.work)
    print("| model | revision | adapted modules | off and on, ms of the processor: median | least | most |\n|---|---|---|---|---|---|")
    trees = {"this": ROOT, **({arguments.against.name: arguments.against} if arguments.against else {})}
    for name in arguments.models:
        workers = {label: start(tree, name) for label, tree in trees.items()}
        times = {label: [] for label in workers}
        for _ in range(arguments.rounds):
            for label, (process, _) in workers.items():
                print(file=process.stdin, flush=True)
                times[label].append(float(process.stdout.readline()))
        for label, (process, modules) in workers.items():
            process.stdin.close()
            process.wait()
            low, middle, high = min(times[label]), statistics.median(times[label]), max(times[label])
            print(f"| {name} | {label} | {modules} | {middle:.2f} | {low:.2f} | {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
