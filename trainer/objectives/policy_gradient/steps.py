"""Stochastic steps and their log-probabilities: what DDPO and the objectives of the GRPO kind train."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...policy import Policy
from ...rng import Rng, generator
from ...sampling import Kernel, Transition, end_of, gaussian, trajectory
from ..base import Logs, RunContext
from .rounds import PolicyGradient
from .selection import Selection

Window = Literal["each", "random", "sliding"]


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over the elements of log N(x; mean, std²): (B,) of x, mean (B,C,h,w) and std (B,).

    The mean and not the sum, as in the official code of DDPO, Flow-GRPO and DanceGRPO: what clips a ratio, such as 1e-4, is for this.
    """
    width = std.to(mean)
    return -(x - mean).square().flatten(1).mean(1) / (2 * width.square()) - width.log() - math.log(2 * math.pi) / 2


def clipped_losses(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρA, clip(ρ, 1 ± clip)·A) (B,) of PPO (arXiv:1707.06347, eq. 7)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_per_element(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """KL (B,) of two Gaussians of one width, over the elements: ½·mean(‖μ − μ'‖²)/s²."""
    return (mean - other).square().flatten(1).mean(1) / (2 * std.to(mean).square())


@dataclass(frozen=True)
class StepGradient(PolicyGradient):
    """PPO's loss on the log-probabilities of sampler steps. A subclass says which Gaussian a step is."""

    clip: float = field(
        default=1e-4, metadata={"min": 0.0, "max": 1.0, "help": "probability ratios are clipped to 1 ± this (official 1e-4)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps = {self.steps}: the last step has no noise and is not trained, give at least 2")

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """The Gaussian of a step."""

    def needed(self, step: int) -> range:
        """Before and after."""
        return range(step, step + 2)

    def start_noise(self, rng: Rng, policy: Policy) -> Tensor:
        """The noise (B,C,h,w) that rollouts start from."""
        return rng.start_noise(policy.latent_shape)

    def losses(self, run: RunContext, part: Selection) -> tuple[Tensor, Logs]:
        """PPO's losses, and the distance to the base model."""
        policy, sigmas = run.policy, run.policy.sigmas(self.steps)
        before, after = part.states.unbind(1)
        here, there = sigmas[part.index], sigmas[part.index + 1]

        def step(adapter: str) -> tuple[Tensor, Tensor]:
            denoiser = policy.denoiser(part.prompts, adapter=adapter, guidance_scale=self.guidance_scale)
            return gaussian(before, denoiser(before, here), here, there, self.kernel, policy.space)

        mean, std = step("tuned")
        now = log_prob(after, mean, std)
        ratio = (now - (now.detach() if part.log_probs is None else part.log_probs.to(now))).exp()
        losses = clipped_losses(ratio, part.advantages.to(now), self.clip)
        logs = {"clipped": ((ratio.detach() - 1).abs() > self.clip).float()}
        if self.kl_weight > 0:
            with torch.no_grad():
                reference, _ = step("base")
            kl = kl_per_element(mean, reference, std)
            losses, logs = losses + self.kl_weight * kl * part.held.to(kl), {**logs, "kl per element": kl.detach()}
        return losses, logs


@dataclass(frozen=True)
class WindowGradient(StepGradient):
    """Steps of one rollout, all or those of a window, of which each is trained with the image's advantage."""

    trained_count: int = field(
        default=0, metadata={"min": 0, "max": 1000, "help": "trained steps of an image; 0: all but the last, which has no noise"}
    )
    window: Window = field(
        default="each",
        metadata={
            "help": "which steps: each: every image its own at random; random: consecutive ones, drawn anew each round; sliding: from the "
            "noisiest on; outside a window no noise is added"
        },
    )
    window_every: int = field(
        default=25, metadata={"min": 1, "max": 100000, "help": "rounds after which a sliding window moves by one step"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_count > self.steps - 1:
            raise ValueError(f"trained_count = {self.trained_count}: of {self.steps} steps {self.steps - 1} have noise")

    @property
    def trained(self) -> int:
        """W."""
        return self.trained_count or self.steps - 1

    @property
    def kept(self) -> int:
        """The states before and after the trained steps."""
        return self.steps if self.window == "each" else self.trained + 1

    def trained_steps(self, seed: int, number: int) -> Tensor:
        """The indices (N,W)."""
        noisy = self.steps - 1
        if self.window == "each":
            orders = [torch.randperm(noisy, generator=generator(seed, "steps", number, i)) for i in range(self.images)]
            return torch.stack(orders)[:, : self.trained]
        places = noisy - self.trained + 1
        place = number // self.window_every % places
        if self.window == "random":
            place = int(torch.randint(places, (), generator=generator(seed, "window", number)))
        return torch.arange(place, place + self.trained).expand(self.images, -1)

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rollouts with noise in the window, or everywhere.

        The adapter is not merged into the weights, so that log-probabilities are computed as in training.
        """
        policy, sigmas, noise_at = run.policy, run.policy.sigmas(self.steps), rng.step_noise(run.policy.latent_shape)
        denoiser = policy.denoiser(prompts, guidance_scale=self.guidance_scale)
        begin, end = (0, self.steps - 1) if self.window == "each" else (first, first + self.trained)

        def steps(x: Tensor, start: int, stop: int, eta: float | Kernel) -> Iterator[Transition]:
            return trajectory(denoiser, x, sigmas, noise_at, first=start, last=stop, eta=eta, space=policy.space)

        x = policy.start(self.start_noise(rng, policy), self.steps)
        x = end_of(x, steps(x, 0, begin, 0.0))
        states, found = [x], list[Tensor]()
        for transition in steps(x, begin, end, self.kernel):
            states.append(transition.x_next)
            found.append(log_prob(transition.x_next, transition.mean, transition.std))
        log_probs = torch.stack(found, 1)
        ends = end_of(states[-1], steps(states[-1], end, self.steps, 0.0))
        return torch.stack(states[first - begin :], 1), ends, log_probs.gather(1, (index - begin).to(log_probs.device))
