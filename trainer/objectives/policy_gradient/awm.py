"""AWM: the denoising error of own images, weighted by their advantages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...denoiser import per_sample
from ...policy import Policy
from ...rng import Rng, generator
from ...sampling import Space, end_of, trajectory
from ..base import Logs, RunContext
from ..shared import error_scale, rollout_noise, sampler_steps
from .rounds import PolicyGradient
from .selection import Selection

log = logging.getLogger(__name__)
Weighting = Literal["ghuber", "t2", "t", "none"]
_TINY = 1e-10  # official: added before the root


def drawing_guidance_scale() -> Any:
    """Field `guidance_scale` of what trains denoising errors of own images: a guided prediction's error does not bound a likelihood."""
    about = "guidance of the images that are drawn; their errors are trained without (official 1)"
    return field(default=1.0, metadata={"min": 0.0, "max": 30.0, "help": about})


def likelihood(error: Tensor, sigma: Tensor, space: Space, weighting: Weighting, power: float = 0.25) -> Tensor:
    """ℓ (B,) of mean squared errors m (B,): −t·((m + 1e-10)^p − 1e-10^p)/p, −t²·m, −t·m or −m; t is σ in a flow, σ/(1 + σ) otherwise."""
    t = (sigma if space == "flow" else sigma / (1 + sigma)).to(error)
    if weighting == "ghuber":
        return -t * ((error + _TINY).pow(power) - _TINY**power) / power
    return -error * {"t2": t.square(), "t": t, "none": torch.ones_like(t)}[weighting]


def own_images(policy: Policy, prompts: Sequence[str], rng: Rng, steps: int, guidance_scale: float, eta: float) -> Tensor:
    """Latents (B,C,h,w) that the tuned model draws."""
    noise_at = rng.step_noise(policy.latent_shape)
    x = policy.start(rng.start_noise(policy.latent_shape), steps)
    with policy.merged():
        denoiser = policy.denoiser(prompts, guidance_scale=guidance_scale)
        return end_of(x, trajectory(denoiser, x, policy.sigmas(steps), noise_at, eta=eta, space=policy.space))


@dataclass(frozen=True)
class AWM(PolicyGradient):
    """Advantage-weighted matching (Xue et al. 2025, arXiv:2509.25050): −A·exp(ℓ − sg(ℓ)), ℓ = −weighted denoising error of own images.

    Images are drawn by any sampler, and noised afresh as in pre-training. Official, from code, for SD3.5 medium without guidance: 14 steps,
    groups of 24, 6 levels of an image out of the first 90 % of the steps but for the first, advantages over 5, KL weight 1e-3, one
    optimizer step a round. Not here: its second KL to an average of recent adapters, and ratios to the adapter of an earlier step.
    """

    steps: int = sampler_steps(14)
    guidance_scale: float = drawing_guidance_scale()
    group: int = field(
        default=24, metadata={"min": 1, "max": 1024, "help": "images of a prompt in a round, which are compared (24 official)"}
    )
    kl_weight: float = field(
        default=1e-3,
        metadata={"min": 0.0, "help": "weight of the squared distance to the base model's prediction (official 1e-3)"},
    )
    max_advantage: float = field(
        default=5.0, metadata={"min": 1e-3, "max": 1000.0, "help": "advantages are clipped to ± this and divided by it (official 5)"}
    )
    levels: int = field(default=6, metadata={"min": 1, "max": 1000, "help": "noise levels that are trained of an image (official 6)"})
    weighting: Weighting = field(
        default="ghuber", metadata={"help": "ghuber: t times a root of the error (official); t2, t, none: the error times t², t or 1"}
    )
    power: float = field(default=0.25, metadata={"min": 0.01, "max": 1.0, "help": "of the root (official 0.25)"})
    eta: float = rollout_noise(0.0, "official 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 3:
            raise ValueError(f"steps = {self.steps}: first and last step are not trained, give at least 3")
        if self.passes > 1:
            raise ValueError(f"passes = {self.passes}: AWM has no probability ratio to images of an earlier model; give 1")

    def check(self, context: RunContext) -> None:
        """As all; and warn where a round trains more than one optimizer step."""
        super().check(context)
        whole = self.images * self.trained
        if context.step_samples % whole:
            log.warning(
                f"an optimizer step takes {context.step_samples} of a round's {whole} samples, and AWM has no probability ratio to images "
                f"of an earlier model: give gradient_accumulation_steps = {whole // context.batch_size}, one step a round"
            )

    @property
    def trained(self) -> int:
        """Levels of an image."""
        return self.levels

    @property
    def kept(self) -> int:
        """The image alone."""
        return 1

    def needed(self, step: int) -> range:
        """The image."""
        return range(1)

    def trained_steps(self, seed: int, number: int) -> Tensor:
        """Indices (N,W) of noise levels: of each image one from each of W equal parts of the grid."""
        first, last = 1, max(2, int(0.9 * self.steps))
        draws = [torch.rand(self.levels, generator=generator(seed, "levels", number, i), dtype=torch.float64) for i in range(self.images)]
        place = (torch.stack(draws) + torch.arange(self.levels)) / self.levels
        return (first + place * (last - first)).long().clamp(max=last - 1)

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images alone."""
        ends = own_images(run.policy, prompts, rng, self.steps, self.guidance_scale, self.eta)
        return ends[:, None], ends, torch.zeros(index.shape)

    def losses(self, run: RunContext, part: Selection) -> tuple[Tensor, Logs]:
        """−A·exp(ℓ − sg(ℓ)), whose gradient is −A·∇ℓ, and the distance to the base model."""
        policy, sigma = run.policy, run.policy.sigmas(self.steps)[part.index]
        clean = part.states[:, 0]
        x = policy.add_noise(clean, part.rng.normal("matching noise", policy.latent_shape).to(clean), sigma)
        scale = per_sample(error_scale("model", sigma, policy.space), clean)
        denoised = policy.denoiser(part.prompts, guidance_scale=1.0)(x, sigma)
        error = ((denoised - clean) * scale).square().flatten(1).mean(1)
        value = likelihood(error, sigma, policy.space, self.weighting, self.power)
        losses = -part.advantages.to(value) / self.max_advantage * (value - value.detach()).exp()
        logs = {"error": error.detach()}
        if self.kl_weight > 0:
            with torch.no_grad():
                base = policy.denoiser(part.prompts, adapter="base", guidance_scale=1.0)(x, sigma)
            distance = ((denoised - base) * scale).square().flatten(1).mean(1)
            losses, logs = losses + self.kl_weight * distance * part.held.to(distance), {**logs, "distance": distance.detach()}
        return losses, logs
