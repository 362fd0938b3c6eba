"""ReFL and ImageReFL: the reward's gradient through one denoiser call at a random late step.

They differ in where that step's state comes from: pure noise (ReFL) or a noised real image (ImageReFL).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ...denoiser import per_sample
from ...sampling import alpha, end_of
from ..base import Logs, RunContext, Stateless
from .shared import (
    Sampler,
    distance_to_base,
    reward_threshold,
    rollout_noise,
    sampler_steps,
    shaped,
    training_guidance_scale,
    weight_of_reward,
)


@dataclass(frozen=True)
class ReFL(Stateless):
    """Reward feedback learning (Xu et al. 2023, arXiv:2304.05977, algorithm 1).

    Noise is denoised without gradient up to a random index m; one call with gradient there gives x̂0, which is decoded
    and scored. Defaults are the official ImageReFL configuration's for SD1.5.
    """

    steps: int = sampler_steps(40)
    grad_from: int = field(default=30, metadata={"min": 0, "max": 999, "help": "first index m at which the gradient step may fall"})
    grad_to: int = field(default=39, metadata={"min": 0, "max": 999, "help": "last such index, included"})
    sigma_high: float = field(default=0.0, metadata={"min": 0.0, "help": "with sigma_low: the range of m as noise levels, instead"})
    sigma_low: float = field(default=0.0, metadata={"min": 0.0, "help": "lowest noise level of m; 0 means: use the indices"})
    per_sample: bool = field(default=True, metadata={"help": "draw m for each sample (official code: one per batch)"})
    guidance_scale: float = training_guidance_scale(1.0, "official: off")
    eta: float = rollout_noise(1.0, "official: ancestral")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    kl_weight: float = field(
        default=0.0, metadata={"min": 0.0, "help": "weight of the squared distance to the base model's noise prediction at m"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.grad_from <= self.grad_to < self.steps:
            raise ValueError(f"gradient range {self.grad_from}–{self.grad_to} does not lie in 0–{self.steps - 1} (steps = {self.steps})")
        if self.sigma_low > self.sigma_high:
            raise ValueError(f"sigma_low {self.sigma_low} lies above sigma_high {self.sigma_high}")

    def check(self, context: RunContext) -> None:
        """Refuse settings that give each process another number of evaluations where that number must be equal."""
        if self.per_sample and context.processes.sharded:
            raise ValueError(
                "per_sample = true evaluates the network more often in one process than in another, "
                "which sharded weights (FSDP) do not allow: give per_sample = false, as the official code has it"
            )

    def index_range(self, sigmas: Tensor) -> tuple[int, int]:
        """First and last index of the gradient step on a grid (T+1,)."""
        if self.sigma_low <= 0:
            return self.grad_from, self.grad_to
        inside = [i for i, s in enumerate(sigmas[:-1].tolist()) if self.sigma_low * (1 - 1e-4) <= s <= self.sigma_high * (1 + 1e-4)]
        if not inside:
            raise ValueError(f"no step of {self.steps} has a noise level between {self.sigma_low} and {self.sigma_high}")
        return inside[0], inside[-1]

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Noise level from which the tuned model has been trained: where combined generation should switch to it."""
        return float(sigmas[self.index_range(sigmas)[0]])

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        sampler = Sampler(run, batch, self.steps, self.guidance_scale, self.eta)
        low, high = self.index_range(sampler.sigmas)
        m = batch.rng.integers("gradient step", low, high, shared=not self.per_sample)
        x, sigma = sampler.rollout(sampler.start(), m), sampler.sigmas[m]
        return self._reward_loss(run, batch, x, sigma, sampler.denoiser(x, sigma))

    def _reward_loss(self, run: RunContext, batch: Batch, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Logs]:
        scores = run.scores(denoised, batch.prompts)
        total = self.reward_weight * shaped(scores, self.threshold).mean()
        logs: Logs = {"reward": scores.detach()}
        if self.kl_weight > 0:
            distance = distance_to_base(run.policy, batch, x, sigma, denoised, self.guidance_scale)
            total = total + self.kl_weight * distance.mean()
            logs["kl"] = distance.detach()
        return total, logs


@dataclass(frozen=True)
class ImageReFL(ReFL):
    """ImageReFL (Sorokin et al. 2025, arXiv:2505.22569, section 4): ReFL from noised real images, beside a diffusion
    loss at the start of the rollout and a share of plain ReFL micro-batches.

    The diffusion loss and the first rollout step are one evaluation: it is done once, with gradient. Samples whose
    gradient step is the start itself take their x̂0 from it too.
    """

    start_from: int = field(default=30, metadata={"min": 0, "max": 999, "help": "first index to which a real image may be noised"})
    start_to: int = field(
        default=30, metadata={"min": 0, "max": 999, "help": "last such index, included; the gradient step never precedes it"}
    )
    refl_share: float = field(
        default=0.25, metadata={"min": 0.0, "max": 1.0, "help": "share of micro-batches that start from noise (plain ReFL)"}
    )
    diffusion_weight: float = field(default=0.01, metadata={"min": 0.0, "help": "weight of the diffusion loss (official 0.01)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_from <= self.start_to < self.steps:
            raise ValueError(f"start range {self.start_from}–{self.start_to} does not lie in 0–{self.steps - 1} (steps = {self.steps})")
        if self.sigma_low <= 0 and self.start_to > self.grad_to:
            raise ValueError(f"images start as late as index {self.start_to}, after the last gradient step {self.grad_to}")

    @property
    def data(self) -> type[Prompts]:
        """Images, unless every micro-batch is plain ReFL."""
        return Images if self.refl_share < 1 else Prompts

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """The earliest noise level that training on images has seen."""
        return float(sigmas[self.start_from])

    def takes_noise(self, number: int) -> bool:
        """Whether micro-batch `number` is a plain ReFL one: evenly spaced, and a function of the number alone."""
        return int((number + 1) * self.refl_share) > int(number * self.refl_share)

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if self.takes_noise(batch.number):
            return super().loss(run, batch)
        if not isinstance(batch, Images):
            raise ValueError("ImageReFL trains on real images: give a folder of images with captions, or refl_share = 1")
        policy, sampler = run.policy, Sampler(run, batch, self.steps, self.guidance_scale, self.eta)
        sigmas, latents = sampler.sigmas, batch.latents.to(policy.device)
        low, high = self.index_range(sigmas)
        first = batch.rng.integers("image start", self.start_from, self.start_to, shared=not self.per_sample)
        last = batch.rng.integers("gradient step", low, high, shared=not self.per_sample).maximum(first)

        start = policy.add_noise(latents, sampler.start_noise.to(latents), sigmas[first])
        with torch.set_grad_enabled(self.diffusion_weight > 0 or bool((last == first).any())):
            at_start = sampler.denoiser(start, sigmas[first])
        x, denoised = self._from_start(sampler, start, at_start, first, last)
        loss, logs = self._reward_loss(run, batch, x, sigmas[last], denoised)
        if self.diffusion_weight > 0:
            here = sigmas[first]
            scale = per_sample(alpha(here, policy.space) / here, start)  # ε̂ − ε = −(x̂0 − x0)·α/σ, in either space
            errors = ((at_start - latents) * scale).square().flatten(1).mean(1)
            loss = loss + self.diffusion_weight * errors.mean()
            logs["diffusion"] = errors.detach()
        return loss, logs

    def _from_start(self, sampler: Sampler, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """State and x0-prediction at the gradient step; the prediction at the start takes the first step too."""
        onward = (last > first).nonzero()[:, 0]
        if len(onward) == 0:
            return start, at_start
        with torch.no_grad():
            x = end_of(start, sampler.trajectory(_Known(at_start.detach()), start, first, last.minimum(first + 1)))
        x = sampler.rollout(x, last, first + 1)
        later = sampler.denoiser.rows(onward)(x[onward], sampler.sigmas[last[onward]])
        return x, at_start.index_copy(0, onward.to(at_start.device), later)


@dataclass(frozen=True)
class _Known:
    """A denoiser whose predictions (B,C,h,w) have been made already."""

    denoised: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        return self.denoised

    def rows(self, index: Tensor) -> _Known:
        return _Known(self.denoised[index])
