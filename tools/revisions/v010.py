"""Losses and gradients of the cases through version 0.1.0's interfaces: `python -m revisions.v010 LORA OUT`, its trainer on the path."""

from __future__ import annotations

import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from trainer.draws import Draws
from trainer.lora_file import load_consistency, load_lora
from trainer.policies.unet import UNetPolicy

from trainer.config import build
from trainer.demo import files
from trainer.demo.show import real_images
from trainer.objectives import OBJECTIVES, Surroundings
from trainer.policy import Batch
from trainer.reward import Reward, Standardised
from trainer.rewards.two_tower import TwoTower

from .cases import SAMPLES, SEED, Case, write
from .float64 import Float64

with Float64():
    IMAGES, PROMPTS = real_images(8, SEED)


def open_policy(lora: Path) -> UNetPolicy:
    """The embedded model in float64, with both adapters, rollouts merged."""
    pipeline = UNetPolicy.load_pipeline(files.PIPELINE, torch.float32)
    with Float64():  # the table of noise levels, a product of a thousand factors
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    policy = UNetPolicy(pipeline)
    load_consistency(policy, files.CONSISTENCY)
    load_lora(policy, lora)
    policy.merges = True
    for part in (policy.unet, policy.vae, policy.text_encoder):
        part.double()
    return policy


@cache
def open_reward(name: str) -> Reward:
    """`proxy`, standardised, or `gold`."""
    reward = files.load_reward(name)
    (reward.reward.model if isinstance(reward, Standardised) else reward.reader).double()
    return reward


@cache
def open_features(name: str) -> TwoTower | None:
    """A two-tower model, or none."""
    tower = files.load_tower(name)[0] if name else None
    if tower:
        tower.model.double()
    return tower


def run(policy: UNetPolicy, case: Case) -> dict[str, Tensor]:
    """Loss, logs and gradient of a case, by name."""
    reward, features = open_reward(case.reward), open_features(case.features)
    with tempfile.TemporaryDirectory() as folder, Float64():
        latents = policy.encode(IMAGES[:SAMPLES])[0].contiguous()  # as a run's batches are; kernels depend on the layout
        around = Surroundings(Path(folder), tuple(PROMPTS), features)
        objective = build(OBJECTIVES[case.objective], case.settings)
        objective.check(policy, reward, around)
        call = objective.begin(around)
        for number in case.batches:
            prompts = tuple(PROMPTS[r % len(PROMPTS)] for r in case.rows(number))
            draws = Draws(SEED, number, tuple(case.rows(number)))
            loss, logs = call(policy, Batch(prompts, draws, number, latents), reward)
        for parameter in policy.parameters():
            parameter.grad = None
        loss.backward()
    gradient = {f"gradient {policy.file_key(name)}": p.grad.clone() for name, p in policy.named_parameters()}
    return {"loss": loss.detach(), **{f"log {name}": values.detach().clone() for name, values in logs.items()}, **gradient}


if __name__ == "__main__":
    write(partial(run, open_policy(Path(sys.argv[1]))))
