"""DRaFT-K, DRaFT-LV and AlignProp: the reward's gradient through the last steps of a rollout.

They differ in which steps carry a gradient and in what is scored at the end.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...data.batches import Batch
from ...denoiser import Denoise
from ...rng import generator
from ...sampling import end_of
from ..base import Logs, RunContext, Stateless
from ..shared import Sampler, reward_threshold, rollout_noise, sampler_steps, shaped, training_guidance_scale, weight_of_reward


def recomputation() -> Any:
    """Field `recompute`."""
    return field(
        default=True, metadata={"help": "keep one latent per step and evaluate the step again in the backward pass: memory of one call"}
    )


def recomputed(denoiser: Denoise, wanted: bool) -> Denoise:
    """The denoiser, keeping no activations where that is wanted."""
    if not wanted:
        return denoiser

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        found: Any = checkpoint(denoiser, x, sigma, use_reentrant=False)
        return found

    return denoise


class Chain(Stateless):
    """A rollout whose steps first…T−1 are differentiated, those before not at all."""

    steps: int
    guidance_scale: float
    eta: float
    threshold: float | None
    reward_weight: float
    recompute: bool

    @abstractmethod
    def first(self, batch: Batch) -> int:
        """Index of the first step that is in the graph."""

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        sampler, first = Sampler(run, batch, self.steps, self.guidance_scale, self.eta), self.first(batch)
        denoise = recomputed(sampler.denoiser, self.recompute)
        x = sampler.rollout(sampler.start(), first)
        x = end_of(x, sampler.trajectory(denoise, x, first))
        scores = self.score(run, batch, denoise, x, sampler.sigmas)
        return self.reward_weight * shaped(scores, self.threshold).mean(), {"reward": scores.detach().reshape(-1, len(x)).mean(0)}

    def score(self, run: RunContext, batch: Batch, denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
        """Scores (B,), or (n·B,), of the end of the chain."""
        return run.scores(x, batch.prompts)


@dataclass(frozen=True)
class DRaFTK(Chain):
    """DRaFT-K (Clark et al. 2024, arXiv:2309.17400, algorithm 1): back-propagation through the last K sampler steps.

    K = 1 is DRaFT-1; K = T differentiates the whole chain. Memory is one denoiser call and K latents with `recompute`.
    """

    title: ClassVar[str] = "DRaFT-K"
    steps: int = sampler_steps(50)
    k: int = field(default=1, metadata={"min": 1, "max": 1000, "help": "last steps K that carry the gradient"})
    guidance_scale: float = training_guidance_scale(7.5, "paper 7.5")
    eta: float = rollout_noise(0.0, "paper: DDIM")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    recompute: bool = recomputation()

    def __post_init__(self) -> None:
        if self.k > self.steps:
            raise ValueError(f"K = {self.k} steps of a rollout that has {self.steps}")

    def first(self, batch: Batch) -> int:
        """T − K."""
        return self.steps - self.k

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Of the first step with a gradient."""
        return float(sigmas[self.steps - self.k])


@dataclass(frozen=True)
class DRaFTLV(DRaFTK):
    """DRaFT-LV (Clark et al. 2024, arXiv:2309.17400, algorithm 2): DRaFT-1 whose gradient is averaged over more noise.

    The finished image is noised again to the last level n times; each is denoised with gradient and scored.
    """

    title: ClassVar[str] = "DRaFT-LV"
    samples: int = field(default=2, metadata={"min": 1, "max": 64, "help": "extra noise draws n at the last level (paper 2)"})

    def score(self, run: RunContext, batch: Batch, denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
        """Scores ((n+1)·B,) of the end and of its n renoised versions."""
        policy, scores = run.policy, [run.scores(x, batch.prompts)]
        sigma = sigmas[self.steps - 1].expand(len(x))
        for j in range(self.samples):
            noise = batch.rng.normal(f"low variance {j}", batch.shape(policy)).to(x)
            scores.append(run.scores(denoise(policy.add_noise(x.detach(), noise, sigma), sigma), batch.prompts))
        return torch.cat(scores)


@dataclass(frozen=True)
class AlignProp(Chain):
    """AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739, section 4): back-propagation through a random number of last steps.

    The first step with a gradient is drawn from a normal distribution truncated to the grid, one for a micro-batch. Cutting the
    graph there gives the official code's gradient: before it every trainable input was detached.
    """

    steps: int = sampler_steps(50)
    cut_mean: float = field(
        default=42.0, metadata={"min": 0.0, "max": 1000.0, "help": "mean of the first step with a gradient (official 42 of 50)"}
    )
    cut_std: float = field(default=5.0, metadata={"min": 0.0, "max": 1000.0, "help": "its standard deviation (official 5); 0 fixes it"})
    guidance_scale: float = training_guidance_scale(5.0, "official 5")
    eta: float = rollout_noise(1.0, "official: ancestral")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    recompute: bool = recomputation()

    def __post_init__(self) -> None:
        if not 0 <= self.cut_mean <= self.steps - 1:
            raise ValueError(f"cut_mean = {self.cut_mean} lies outside the steps 0–{self.steps - 1}")

    def first(self, batch: Batch) -> int:
        """A draw of the truncated normal distribution."""
        rng = generator(batch.rng.seed, batch.rng.step, batch.number, "truncation")
        while True:
            drawn = round(self.cut_mean + self.cut_std * float(torch.randn((), generator=rng)))
            if 0 <= drawn < self.steps:
                return drawn

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Of the mean cut."""
        return float(sigmas[round(self.cut_mean)])
