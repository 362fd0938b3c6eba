"""Predict the peak memory of a noise optimisation, whose gradient goes through every sampler step."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ..generate import Generation
from ..guidance import Slot, cfg
from ..models.diffusers_policy import DiffusersPolicy
from ..noise.images import NoiseOptimiser, terms
from ..noise.settings import NoiseOptimisation
from ..policy import Lora, Policy
from ..rewards.base import RewardModel
from .dry_run import META, MemoryTracker, dry_run
from .offload import tensors
from .plan import allowance
from .stand_ins import TrackedPolicy


def gradient_bytes(
    policy: DiffusersPolicy, reward: RewardModel, settings: Generation, optimisation: NoiseOptimisation, guidance_scale: float, device: str
) -> int:
    """Predicted bytes at the peak of one iteration on `device`, with activations recomputed.

    policy and reward are on the meta device, whose weights count; guidance_scale is the largest of the mix.
    """
    if policy.lora is None:
        policy.add_lora(Lora(rank=1))
    policy.gradient_checkpointing(denoiser=True, vae=True)
    tracker = MemoryTracker(META)
    with dry_run(tracker):
        tracker.attribute(tensors(policy.network, *policy.decoders(), *policy.prompts.encoders, reward), "weights")
        tracked = cast(Policy, TrackedPolicy(policy, tracker))
        two = replace(optimisation, iterations=2, starts=1)
        optimiser = NoiseOptimiser(tracked, cfg(Slot("base", guidance_scale)), policy.sigmas(settings.steps), settings, two, terms(reward))
        with tracker.phase("iteration"):
            optimiser("a prompt")
    counted = tracker.phases["iteration"].bytes
    return counted + allowance(counted, device)
