"""What reward-gradient objectives share: fields, the rollout without gradient, and the shaping of scores."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from ...data.batches import Batch
from ...denoiser import Denoise, per_sample
from ...policy import Policy
from ...sampling import Space, alpha, end_of, trajectory

# -- fields, so that default and range are said once per meaning ----------------------------------------------------------


def sampler_steps(default: int) -> Any:
    """Field `steps`."""
    return field(default=default, metadata={"min": 1, "max": 1000, "help": "sampler steps T of the training grid"})


def training_guidance_scale(default: float, origin: str) -> Any:
    """Field `guidance_scale`."""
    return field(default=default, metadata={"min": 0.0, "max": 30.0, "help": f"classifier-free guidance in training; 1 is off ({origin})"})


def rollout_noise(default: float, origin: str) -> Any:
    """Field `eta`."""
    return field(
        default=default, metadata={"min": 0.0, "max": 1.0, "help": f"noise of the rollout: 1 ancestral, 0 deterministic ({origin})"}
    )


def reward_threshold() -> Any:
    """Field `threshold`."""
    return field(default=None, metadata={"help": "loss max(0, threshold − reward), ReFL's 2.0 on standardised rewards; none: −reward"})


def weight_of_reward() -> Any:
    """Field `reward_weight`."""
    return field(default=1.0, metadata={"min": 0.0, "help": "weight of the reward loss"})


# -- losses -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(
    policy: Policy,
    batch: Batch,
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    last: int | Tensor,
    first: int | Tensor = 0,
    eta: float = 1.0,
) -> Tensor:
    """Steps first…last−1 without gradient, one range for all samples or one each (B,); x where a range is empty."""
    noise_at = batch.rng.step_noise(batch.shape(policy))
    with policy.merged():
        return end_of(x, trajectory(denoiser, x, sigmas, noise_at, first=first, last=last, eta=eta, space=policy.space))


def shaped(scores: Tensor, threshold: float | None) -> Tensor:
    """Losses (B,) of scores (B,): −r, or max(0, threshold − r) (ReFL)."""
    return -scores if threshold is None else (threshold - scores).relu()


def distance_to_base(policy: Policy, batch: Batch, x: Tensor, sigma: Tensor, denoised: Tensor, guidance_scale: float) -> Tensor:
    """Mean squared difference (B,) of the noise predictions of the tuned and the base model at x."""
    with torch.no_grad():
        base = policy.denoiser(batch.prompts, adapter="base", guidance_scale=guidance_scale)(x, sigma)
    return ((denoised - base) * per_sample(alpha(sigma, policy.space) / sigma, x)).square().flatten(1).mean(1)


def snr(sigma: Tensor, space: Space) -> Tensor:
    """(α(σ)/σ)²."""
    return (alpha(sigma, space) / sigma).square()
