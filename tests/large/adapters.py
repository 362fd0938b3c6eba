"""Processor time of switching a policy's adapter off and on again, on whole models without memory: adapters.py [sdxl flux-dev]"""

from __future__ import annotations

import argparse
import statistics
import time

from trainer.models.meta import meta_policy
from trainer.policy import Lora


def main(given=None):
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["sdxl", "flux-dev"])
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args(given)
    print("| model | adapted modules | off and on, ms of the processor: median | least |\n|---|---|---|---|")
    for name in arguments.models:
        policy = meta_policy(name)
        policy.add_lora(Lora())
        times = []
        for _ in range(arguments.rounds):
            begin = time.process_time()
            with policy.adapters.using("base"):
                pass
            times.append(1e3 * (time.process_time() - begin))
        print(f"| {name} | {len(policy.parameters()) // 2} | {statistics.median(times):.2f} | {min(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
