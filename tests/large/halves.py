"""How far float32 rounding sets two processes apart from one: the gradient of a joined batch against the mean of its halves.

Usage: halves.py. No process is started: what processes exchange is tested elsewhere, in float64 (tests/runtime/test_processes.py).
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path

import torch

from trainer.data.batches import Images
from trainer.data.samples import encode_images
from trainer.demo import files
from trainer.demo.world import real_images
from trainer.models.open import open_policy
from trainer.objectives import OBJECTIVES, BlackBoxSQDF, RunContext
from trainer.objectives.policy_gradient.collecting import Collecting
from trainer.policy import Lora

BATCH = 8


def gradient(policy, objective, samples, reward, share):
    """Of one micro-batch's samples in `share`, all parameters in a row."""
    with tempfile.TemporaryDirectory() as folder:
        loss = objective.begin(RunContext(policy, reward, reward, folder=Path(folder), prompts=samples.prompts))
        for parameter in policy.parameters():
            parameter.grad = None
        loss(samples.batch(0, 0, 1, BATCH, share))[0].backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def main():
    """A line for each objective with its defaults; SQDF without a buffer."""
    torch.manual_seed(0)
    policy = open_policy("demo")
    samples = encode_images(policy, *real_images(32, 0))
    policy.add_lora(Lora(rank=4, alpha=4.0))
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tower = files.load_tower("proxy")
    print("| objective | relative difference |\n|---|---|")
    for name, kind in OBJECTIVES.items():
        if not issubclass(Images, kind().data) or issubclass(kind, (BlackBoxSQDF, Collecting)):
            continue  # other data; and queries and rounds, which are shared by processes, not by halves
        known = {f.name for f in fields(kind)}
        objective = kind(**({"buffer_gb": 0.0} if "buffer_gb" in known else {}))
        whole = gradient(policy, objective, samples, tower, range(BATCH))
        halves = [gradient(policy, objective, samples, tower, part) for part in (range(BATCH // 2), range(BATCH // 2, BATCH))]
        print(f"| {name} | {float((sum(halves) / 2 - whole).norm() / whole.norm()):.1e} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
