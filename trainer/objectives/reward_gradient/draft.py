"""DRaFT-K, DRaFT-LV, AlignProp and DRTune: the reward's gradient through the last steps of a rollout.

They are one chain. They differ in which steps carry a gradient, in whether it passes through the network's input, and in
what is scored at the end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...policy import Batch, Policy
from ...rng import generator
from ...sampling import alpha
from ..base import (
    Logs,
    RunContext,
    Stateless,
    one_step,
    reward_threshold,
    roll,
    rollout_noise,
    sampler_steps,
    shaped,
    training_guidance_scale,
    weight_of_reward,
)


def _recompute() -> Any:
    return field(
        default=True, metadata={"help": "keep one latent per step and evaluate the step again going back: memory of a single call"}
    )


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
        policy = run.policy
        sigmas, first = policy.sigmas(self.steps), self.first(batch)
        x = policy.start(batch.rng.normal("start", batch.shape(policy)), self.steps)
        indices = torch.zeros(len(x), dtype=torch.long)
        x = roll(policy, batch, x, indices, indices + first, sigmas, self.guidance_scale, self.eta)
        denoise = self.evaluate(policy, batch)
        for i in range(first, self.steps):
            x = one_step(policy, batch, x, denoise(x, sigmas[i].expand(len(x))), i, sigmas, self.eta)
        scores = self.score(run, batch, x, sigmas)
        return self.reward_weight * shaped(scores, self.threshold).mean(), {"reward": scores.detach().reshape(-1, len(x)).mean(0)}

    def evaluate(self, policy: Policy, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser, keeping no activations where `recompute` asks for that."""
        denoiser = policy.denoiser(batch.prompts, guidance_scale=self.guidance_scale)
        if not self.recompute:
            return denoiser
        return lambda x, sigma: checkpoint(denoiser, x, sigma, use_reentrant=False)

    def score(self, run: RunContext, batch: Batch, x: Tensor, sigmas: Tensor) -> Tensor:
        """Scores (B,), or (n·B,), of the end of the chain."""
        return run.scores(x, batch.prompts)


@dataclass(frozen=True)
class DRaFTK(Chain):
    """DRaFT-K (Clark et al. 2024, arXiv:2309.17400, algorithm 1): back-propagation through the last K sampler steps.

    K = 1 is DRaFT-1; K = T differentiates the whole chain. Memory is one denoiser call and K latents with `recompute`.
    """

    steps: int = sampler_steps(50)
    k: int = field(default=1, metadata={"min": 1, "max": 1000, "help": "last steps K that carry the gradient"})
    guidance_scale: float = training_guidance_scale(7.5, "paper 7.5")
    eta: float = rollout_noise(0.0, "paper: DDIM")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    recompute: bool = _recompute()

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

    samples: int = field(default=2, metadata={"min": 1, "max": 64, "help": "extra noise draws n at the last level (paper 2)"})

    def score(self, run: RunContext, batch: Batch, x: Tensor, sigmas: Tensor) -> Tensor:
        """Scores ((n+1)·B,) of the end and of its n renoised versions."""
        policy, scores = run.policy, [run.scores(x, batch.prompts)]
        sigma = sigmas[self.steps - 1].expand(len(x))
        denoise = self.evaluate(policy, batch)
        for j in range(self.samples):
            noise = batch.rng.normal(f"low variance {j}", batch.shape(policy)).to(x)
            scores.append(run.scores(denoise(policy.add_noise(x.detach(), noise, sigma), sigma), batch.prompts))
        return torch.cat(scores)


@dataclass(frozen=True)
class AlignProp(Chain):
    """AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739, section 4): back-propagation through a random number of last steps.

    The first step with a gradient is drawn from a normal law cut to the grid, one for a whole micro-batch. Cutting the
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
    recompute: bool = _recompute()

    def __post_init__(self) -> None:
        if not 0 <= self.cut_mean <= self.steps - 1:
            raise ValueError(f"cut_mean = {self.cut_mean} lies outside the steps 0–{self.steps - 1}")

    def first(self, batch: Batch) -> int:
        """A draw of the cut normal law."""
        rng = generator(batch.rng.seed, batch.rng.step, batch.number, "truncation")
        while True:
            drawn = round(self.cut_mean + self.cut_std * float(torch.randn((), generator=rng)))
            if 0 <= drawn < self.steps:
                return drawn

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Of the mean cut."""
        return float(sigmas[round(self.cut_mean)])


@dataclass(frozen=True)
class DRTune(Chain):
    """DRTune (Wu et al. 2024, arXiv:2405.00760, algorithm 1): all steps in the graph, but never through the network's input.

    The network sees a detached state: its noise prediction is held, in every space, its Jacobian drops out, and the gradient
    reaches early steps along the sampler's linear terms alone. K evenly spaced steps with a random offset are trained; the
    chain ends early, at a random one of the last `early_stop` steps, with that step's x0-prediction.
    """

    steps: int = sampler_steps(50)
    k: int = field(default=5, metadata={"min": 1, "max": 1000, "help": "trained steps K, evenly spaced over the chain"})
    early_stop: int = field(
        default=20, metadata={"min": 1, "max": 1000, "help": "the chain ends at one of so many last steps; 1 never stops early"}
    )
    guidance_scale: float = training_guidance_scale(7.5, "as DRaFT")
    eta: float = rollout_noise(0.0, "DDIM")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    recompute: bool = _recompute()

    def __post_init__(self) -> None:
        if self.k > self.steps:
            raise ValueError(f"K = {self.k} trained steps of a rollout that has {self.steps}")
        if self.early_stop > self.steps:
            raise ValueError(f"early_stop = {self.early_stop} of a rollout that has {self.steps} steps")

    def first(self, batch: Batch) -> int:
        """The whole chain is in the graph."""
        return 0

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """All steps are trained."""
        return float(sigmas[0])

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        policy = run.policy
        sigmas = policy.sigmas(self.steps)
        gap = self.steps // self.k
        offset = int(batch.rng.integers("trained steps", 0, gap - 1, shared=True)[0])
        last = self.steps - 1 - int(batch.rng.integers("early stop", 0, self.early_stop - 1, shared=True)[0])
        trained = {i for i in range(offset, self.steps, gap)[: self.k]}
        if not any(i <= last for i in trained):
            trained = {last}  # an early end before the first trained step would leave nothing to learn from
        denoise, frozen = self.evaluate(policy, batch), policy.denoiser(batch.prompts, guidance_scale=self.guidance_scale)
        x = policy.start(batch.rng.normal("start", batch.shape(policy)), self.steps)
        for i in range(last + 1):
            sigma = sigmas[i].expand(len(x))
            if i in trained:
                denoised = denoise(x.detach(), sigma)
            else:
                with torch.no_grad():
                    denoised = frozen(x.detach(), sigma)
            if x.requires_grad:  # with ε̂ held, D = (x − σε̂)/α moves with x; the start, where α may be 0, does not move
                denoised = denoised + (x - x.detach()) / alpha(sigmas[i], policy.space).to(x)
            x = one_step(policy, batch, x, denoised, i, sigmas, self.eta) if i < last else denoised
        scores = run.scores(x, batch.prompts)
        return self.reward_weight * shaped(scores, self.threshold).mean(), {"reward": scores.detach()}
