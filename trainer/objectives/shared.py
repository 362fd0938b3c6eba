"""What objectives of several kinds share: fields, units of errors, the sampler of a micro-batch, and the shaping of scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.batches import Batch
from ..denoiser import Denoise, per_sample
from ..policy import Policy
from ..sampling import Space, Transition, alpha, end_of, trajectory
from .base import RunContext

GRID = 999  # levels that training draws from: Stable Diffusion's timesteps 1 … 999
Target = Literal["model", "epsilon", "velocity", "x0"]

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


# -- rollouts ---------------------------------------------------------------------------------------------------------


class Sampler:
    """The sampler of one micro-batch: its noise levels (T+1,), its noise, and the tuned model under its prompts."""

    def __init__(self, run: RunContext, batch: Batch, steps: int, guidance_scale: float, eta: float) -> None:
        self.policy, self.eta, self.sigmas = run.policy, eta, run.policy.sigmas(steps)
        self.denoiser = run.policy.denoiser(batch.prompts, guidance_scale=guidance_scale)
        self.start_noise = batch.rng.start_noise(batch.shape(run.policy))
        self.noise_at = batch.rng.step_noise(batch.shape(run.policy))

    def start(self) -> Tensor:
        """The first state (B,C,h,w)."""
        return self.policy.start(self.start_noise, len(self.sigmas) - 1)

    def trajectory(self, denoise: Denoise, x: Tensor, first: int | Tensor = 0, last: int | Tensor | None = None) -> Iterator[Transition]:
        """Steps first…last−1 from x by some denoiser, with gradient where the caller has it on."""
        return trajectory(denoise, x, self.sigmas, self.noise_at, first=first, last=last, eta=self.eta, space=self.policy.space)

    @torch.no_grad()
    def rollout(self, x: Tensor, last: int | Tensor, first: int | Tensor = 0) -> Tensor:
        """The state after steps first…last−1 without gradient, one range for all samples or one each (B,)."""
        with self.policy.merged():
            return end_of(x, self.trajectory(self.denoiser, x, first, last))


@dataclass(frozen=True)
class Known:
    """A denoiser whose predictions (B,C,h,w) have been made already."""

    denoised: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """The predictions."""
        return self.denoised

    def rows(self, index: Tensor) -> Known:
        """See Denoiser."""
        return Known(self.denoised[index])


# -- losses -----------------------------------------------------------------------------------------------------------


def in_order(margin: Tensor) -> Tensor:
    """Accuracy (B,) of margins (B,) for the log: 1 above 0, 0 below, 0.5 at 0, where nothing is decided, as in a run's first step."""
    return (1 + margin.detach().sign()) / 2


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


def error_scale(target: Target, sigma: Tensor, space: Space) -> Tensor:
    """By what an error of the x0-prediction is multiplied in units of the target: ε, v = αε − σx0 (VP) or ε − x0 (flow), x0."""
    if target == "x0":
        return torch.ones_like(sigma)
    if target == "epsilon" or (target == "model" and space == "ve"):
        return alpha(sigma, space) / sigma
    return 1 / sigma if space == "flow" else (1 + sigma.square()).sqrt() / sigma
