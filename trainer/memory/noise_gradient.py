"""Predict the peak memory of a noise optimisation, whose gradient goes through every sampler step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from ..generate import Generation
from ..guidance import Mix
from ..models.diffusers_policy import DiffusersPolicy
from ..noise.images import NoiseOptimiser, terms
from ..noise.settings import NoiseOptimisation
from ..policy import Policy
from ..rewards.base import RewardModel
from .dry_run import META, MemoryTracker, dry_run
from .offload import tensors
from .plan import allowance
from .stand_ins import TrackedPolicy


def gradient_bytes(
    policy: DiffusersPolicy,
    reward: RewardModel,
    settings: Generation,
    optimisation: NoiseOptimisation,
    mix: Mix,
    levels: Tensor,
    device: str,
    models: Mapping[str, DiffusersPolicy] | None = None,
    others: Sequence[RewardModel] = (),
) -> int:
    """Predicted bytes at the peak of one iteration on `device`, with activations recomputed.

    Policies and rewards are on the meta device, whose weights count; so do those of `others`, rewards that see no gradient.
    """
    tracker, given = MemoryTracker(META), {"": policy, **(models or {})}
    with dry_run(tracker):
        for each in given.values():
            each.gradient_checkpointing(denoiser=True, vae=True)
        modules = (each.network for each in given.values())
        tracker.attribute(tensors(*modules, *policy.decoders(), *policy.prompts.encoders, reward, *others), "weights")
        tracked = {name: cast(Policy, TrackedPolicy(each, tracker)) for name, each in given.items()}
        two = replace(optimisation, iterations=2, starts=1)
        optimiser = NoiseOptimiser(tracked.pop(""), mix, levels, settings, two, terms(reward), tracked)
        with tracker.phase("iteration"):
            optimiser("a prompt")
    counted = tracker.phases["iteration"].bytes
    return counted + allowance(counted, device)
