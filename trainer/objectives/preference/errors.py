"""Denoising errors of the tuned model and of the reference at equal noise levels and noise: what preference losses are made of.

The reference is the model without its adapter: no weights are copied. Errors are reduced by their mean over the elements of a sample,
so that a loss's β means the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...data.batches import Batch
from ...denoiser import per_sample
from ...policy import Policy
from ...sampling import Space, alpha
from ..base import Objective, RunContext
from ..reward_gradient.shared import snr

GRID = 999  # levels that training draws from: Stable Diffusion's timesteps 1 … 999
Levels = Literal["uniform", "logit-normal", "early", "min-snr", "debiased"]
Target = Literal["model", "epsilon", "velocity", "x0"]
Two = tuple[Tensor, Tensor]
"""Of a better and of a worse image, or of an image under a right and a wrong caption."""


def error_scale(target: Target, sigma: Tensor, space: Space) -> Tensor:
    """By what an error of the x0-prediction is multiplied in units of the target: ε, v = αε − σx0 (VP) or ε − x0 (flow), x0."""
    if target == "x0":
        return torch.ones_like(sigma)
    if target == "epsilon" or (target == "model" and space == "ve"):
        return alpha(sigma, space) / sigma
    return 1 / sigma if space == "flow" else (1 + sigma.square()).sqrt() / sigma


def level_weights(levels: Levels, target: Target, sigmas: Tensor, space: Space) -> Tensor:
    """Relative probabilities (T,) float64 of noise levels (T,), the noisiest first.

    `early` is γ^i of the dense reward view (Yang et al. 2024, arXiv:2402.08265) with γ = 0.9 over 50 steps; `logit-normal` is of
    the position on the grid (Esser et al. 2024, arXiv:2403.03206). `min-snr` (Hang et al. 2023, arXiv:2303.09556, γ = 5) and
    `debiased` (Yu et al. 2023, arXiv:2310.08442, 1/√SNR on ε) are loss weights in their papers; levels drawn by them have the same
    expected gradient of an error.
    """
    sigmas = sigmas.double()
    position = (torch.arange(len(sigmas), dtype=torch.float64) + 0.5) / len(sigmas)
    if levels == "uniform":
        return torch.ones_like(position)
    if levels == "logit-normal":
        return (-position.logit().square() / 2).exp() / (position * (1 - position))
    if levels == "early":
        return 0.9 ** (50 * position)
    ratio = snr(sigmas, space).clamp(min=1 / 400)  # at σ = 1 of a flow 1/√SNR is infinite
    of_x0 = ratio.clamp(max=5) if levels == "min-snr" else ratio.sqrt()
    kind = "velocity" if target == "model" and space == "flow" else target
    return of_x0 / (ratio if kind in ("epsilon", "model") else error_scale(kind, sigmas, space).square())


@dataclass(frozen=True)
class Noised:
    """Noise levels (B,) of a micro-batch, equal for all that is compared, and noise: (B,C,h,w) likewise, or (nB,C,h,w) of n images."""

    policy: Policy
    sigma: Tensor
    noise: Tensor
    target: Target

    def errors(self, latents: Sequence[Tensor], prompts: Sequence[Sequence[str]], adapter: str = "tuned") -> list[Tensor]:
        """Error of the prediction (B,C,h,w), in units of the target, for each of `latents` (B,C,h,w) under its prompts; one evaluation."""
        clean = torch.cat([one.to(self.policy.device) for one in latents])
        sigma = self.sigma.repeat(len(latents))
        noise = self.noise.to(clean).repeat(len(clean) // len(self.noise), 1, 1, 1)
        x = self.policy.add_noise(clean, noise, sigma)
        with torch.set_grad_enabled(adapter == "tuned" and torch.is_grad_enabled()):
            denoised = self.policy.denoiser([prompt for some in prompts for prompt in some], adapter=adapter)(x, sigma)
            scale = error_scale(self.target, sigma, self.policy.space)
            return list(((denoised - clean) * per_sample(scale, clean)).chunk(len(latents)))

    def two(self, latents: Two, prompts: tuple[Sequence[str], Sequence[str]], adapter: str = "tuned") -> Two:
        """`errors` of two latents."""
        first, second = self.errors(latents, prompts, adapter)
        return first, second


def mean_square(error: Tensor) -> Tensor:
    """L (B,) of errors (B,C,h,w)."""
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class DenoisingObjective(Objective):
    """What the objectives on denoising errors share. They ask no reward: one that is named is shown by the watch alone."""

    steps: int = field(
        default=50, metadata={"min": 1, "max": 1000, "help": "sampler steps of evaluations; training draws from all noise levels"}
    )
    guidance_scale: float = field(
        default=7.5, metadata={"min": 0.0, "max": 30.0, "help": "classifier-free guidance of evaluations; training has none"}
    )
    levels: Levels = field(
        default="uniform",
        metadata={"help": "how noise levels are drawn; early: the noisy ones; min-snr and debiased: as likely as those weights are high"},
    )
    target: Target = field(
        default="model", metadata={"help": "unit of the errors; model: ε for Stable Diffusion, velocity for flow models"}
    )
    prompt_dropout: float = field(
        default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "share of samples that are trained under the empty prompt"}
    )
    sft_weight: float = field(default=0.0, metadata={"min": 0.0, "help": "weight of the plain denoising error of the better images"})

    @property
    def needs_gradient(self) -> bool:
        """No reward is asked."""
        return False

    @property
    def needs_reward(self) -> bool:
        """No reward is asked."""
        return False

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Every level is trained."""
        return float(sigmas[0])

    def noised(self, run: RunContext, batch: Batch) -> Noised:
        """The draws of a micro-batch."""
        policy = run.policy
        sigmas = policy.sigmas(GRID)[:-1]
        cumulative = level_weights(self.levels, self.target, sigmas, policy.space).cumsum(0)
        index = torch.searchsorted(cumulative / cumulative[-1], batch.rng.uniform("noise level"), right=True)
        noise = batch.rng.normal("diffusion noise", batch.shape(policy))
        return Noised(policy, sigmas[index.clamp(max=len(sigmas) - 1)], noise, self.target)

    def kept(self, batch: Batch, prompts: Sequence[str]) -> list[str]:
        """The prompts, some of them replaced by the empty one."""
        dropped = (batch.rng.uniform("prompt dropout") < self.prompt_dropout).tolist()
        return ["" if gone else prompt for prompt, gone in zip(prompts, dropped)]
