"""Losses and gradients of the cases through the present interfaces: `python -m tools.revisions.present LORA OUT`."""

from __future__ import annotations

import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import build
from trainer.data.batches import Images
from trainer.demo import files
from trainer.demo.world import real_images
from trainer.lora.file import load_consistency, load_lora
from trainer.models.unet import UNetPolicy
from trainer.objectives import OBJECTIVES, RunContext
from trainer.reward import Reward
from trainer.rewards.two_tower import TwoTower
from trainer.rewards.weighted import Standardised
from trainer.rng import Rng

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
    policy.merge_rollouts = True
    for part in (policy.network, policy.vae, policy.pipeline.text_encoder):
        part.double()
    return policy


def open_tower(name: str) -> TwoTower:
    """An embedded two-tower reward of 0.1.0, which revisions are compared on, whatever they ship."""
    earlier = files.FOLDER.parents[2] / "tests" / "data" / "v010" / "rewards"
    return TwoTower.load((earlier if earlier.is_dir() else files.FOLDER) / name)


@cache
def open_reward(name: str) -> Reward:
    """`proxy`, standardised, or `gold`."""
    tower = None if name == "gold" else open_tower(name)
    reward = Standardised(tower, *tower.statistics) if tower and tower.statistics else files.load_reward(name)
    reward.double()
    return reward


@cache
def open_features(name: str) -> TwoTower | None:
    """A two-tower model, or none."""
    tower = open_tower(name) if name else None
    if tower:
        tower.double()
    return tower


def kohya_key(name: str) -> str:
    """`a.to_q.lora_A.default.weight` -> `lora_unet_a_to_q.lora_down.weight`, as version 0.1.0's driver names gradients."""
    module, half = name.split(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if half.startswith('A') else 'up'}.weight"


def run(policy: UNetPolicy, case: Case) -> dict[str, Tensor]:
    """Loss, logs and gradient of a case, by name."""
    reward, features = open_reward(case.reward), open_features(case.features)
    with tempfile.TemporaryDirectory() as folder, Float64():
        latents = policy.encode(IMAGES[:SAMPLES])[0].contiguous()  # as a run's batches are; kernels depend on the layout
        context = RunContext(policy, reward, features, folder=Path(folder), prompts=tuple(PROMPTS))
        objective = build(OBJECTIVES[case.objective], case.settings)
        objective.check(context)
        call = objective.begin(context)
        for number in case.batches:
            prompts = tuple(PROMPTS[r % len(PROMPTS)] for r in case.rows(number))
            rng = Rng(SEED, number, tuple(case.rows(number)))
            loss, logs = call(Images(prompts, rng, number, latents))
        for parameter in policy.parameters():
            parameter.grad = None
        loss.backward()
    gradient = {f"gradient {kohya_key(name)}": p.grad.clone() for name, p in policy.named_parameters()}
    return {"loss": loss.detach(), **{f"log {name}": values.detach().clone() for name, values in logs.items()}, **gradient}


if __name__ == "__main__":
    write(partial(run, open_policy(Path(sys.argv[1]))))
