"""One loss of an objective outside a run."""

from __future__ import annotations

from trainer.data.batches import Images, Prompts
from trainer.objectives import RunContext


def batch_of(prompts, rng, number=0, latents=None):
    """A micro-batch of prompts, or of images where there are latents."""
    return Prompts(prompts, rng, number) if latents is None else Images(prompts, rng, number, latents)


def loss_of(objective, policy, batch, reward, **context):
    """Loss () and logs of one micro-batch."""
    return objective.begin(RunContext(policy, reward, **context))(batch)
