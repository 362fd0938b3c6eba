"""Small policy gradients, and micro-batches of their rounds."""

from __future__ import annotations

from helpers.family import Towers

from trainer.data.batches import Prompts
from trainer.objectives import RunContext
from trainer.rng import Rng

PROMPTS = ("a", "bb", "ccc")
SMALL = {"steps": 5, "guidance_scale": 1.0, "group": 4, "prompts_per_round": 2, "clip": 0.2}
METHODS = {
    "ddpo": SMALL,
    "flow-grpo": SMALL,
    "g2rpo": {**SMALL, "branch_steps": 3},
    "awm": {"steps": 6, "group": 4, "prompts_per_round": 2, "levels": 3},
}


def batch(number=0, n=4, step=0):
    return Prompts(tuple("a" * n), Rng(3, step, tuple(range(number * n, number * n + n)), number), number)


def begun(objective, policy, folder, reward=None, **more):
    return objective.begin(RunContext(policy, reward or Towers(), folder=folder, prompts=PROMPTS, **more))


def part_of(loss, given):
    """Loss and logs of a micro-batch, and what it trains."""
    parts, inner = [], loss._part
    loss._part = lambda *arguments: parts.append(inner(*arguments)) or parts[-1]
    try:
        return *loss(given), parts[0]
    finally:
        loss._part = inner
