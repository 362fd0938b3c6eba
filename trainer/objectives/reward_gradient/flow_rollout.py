"""What FlowBP and LeapAlign share: a rollout without gradient in flow coordinates, and velocities with gradient along it.

Both methods are published for flow models, where the sampler's step is Euler's: z' = z + (s' − s)·v with v = ε̂ − x̂0. A state of any
model is x = α(σ)·x̂0 + σ·ε̂. With z = x/(α + σ) and s = σ/(α + σ) it is z = (1 − s)·x̂0 + s·ε̂ = x̂0 + s·v, and the DDIM step, which
keeps x̂0 and ε̂, is z' = (1 − s')·x̂0 + s'·ε̂ = z + (s' − s)·v. That is the ε form: v = ε̂ − x̂0 = (z − D)/s. For a flow model α + σ is 1,
so that z, s and v are the published ones; for an ε- or v-prediction model z = x/(1 + σ). One network has one gradient, however it
predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data.batches import Batch
from ...rng import generator
from ...sampling import alpha, end_of
from ..base import RunContext, Stateless
from ..shared import Known, Sampler, reward_threshold, sampler_steps, training_guidance_scale, weight_of_reward
from .draft import recomputation, recomputed


def rescaling(default: float, official: str) -> Any:
    """Field `rescale`."""
    return field(
        default=default,
        metadata={
            "min": 0.0,
            "max": 10.0,
            "help": f"1 scales the active steps' gradients up to those of all steps that may be trained (g; official {official})",
        },
    )


def coupling(default: float, official: str) -> Any:
    """Field `alpha`."""
    return field(
        default=default,
        metadata={
            "min": 0.0,
            "max": 1.0,
            "help": f"share α of the gradient that passes through the network's input at j (official {official})",
        },
    )


@dataclass(frozen=True)
class Surrogate(Stateless):
    """The reward of the end of a deterministic rollout; its gradient goes through another, shorter chain of the same value."""

    steps: int = sampler_steps(25)
    trained_from: int = field(
        default=0, metadata={"min": 0, "max": 999, "help": "first step that may be trained (official 0, FlowBP-Lagrange on FLUX.2 klein 7)"}
    )
    guidance_scale: float = training_guidance_scale(3.5, "official 3.5 on SD3.5, 4 on FLUX.2 klein")
    threshold: float | None = reward_threshold()
    reward_weight: float = weight_of_reward()
    recompute: bool = recomputation()

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise ValueError(f"steps = {self.steps}: this method needs 3 at least")
        if self.trained_from > self.steps - 3:
            raise ValueError(f"trained_from = {self.trained_from} of {self.steps} steps: give at most {self.steps - 3}")

    @property
    def window(self) -> range:
        """The steps that may be trained."""
        return range(self.trained_from, self.steps)

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Of the first step that may be trained."""
        return float(sigmas[self.trained_from])

    def drawn(self, batch: Batch, purpose: str, steps: range, count: int, bias: float = 0.0, origin: int = 0) -> list[int]:
        """`count` of some steps for a micro-batch, ascending, drawn without replacement; step i has weight (i − origin + 1)^bias."""
        weights = torch.tensor([float(i - origin + 1) ** bias for i in steps])
        return sorted(steps[i] for i in torch.multinomial(weights, count, generator=self.generator(batch, purpose)).tolist())

    def generator(self, batch: Batch, purpose: str) -> torch.Generator:
        """The random numbers that a micro-batch shares, in all processes."""
        return generator(batch.rng.seed, batch.rng.step, batch.number, purpose)


class FlowRollout:
    """One micro-batch's deterministic rollout in flow coordinates; each step is evaluated once, with or without gradient."""

    def __init__(self, run: RunContext, batch: Batch, objective: Surrogate) -> None:
        self.sampler = Sampler(run, batch, objective.steps, objective.guidance_scale, eta=0.0)
        self.denoise = recomputed(self.sampler.denoiser, objective.recompute)
        sigmas = self.sampler.sigmas.double()
        self.totals = (alpha(sigmas, run.policy.space) + sigmas).tolist()
        self.levels = [sigma / total for sigma, total in zip(sigmas.tolist(), self.totals)]  # s_0…s_T, the last 0
        self.x, self.i = self.sampler.start(), 0

    def state(self, i: int) -> Tensor:
        """z_i (B,C,h,w), after steps without gradient from the present one on. Raises ValueError for a step that lies behind."""
        if i < self.i:
            raise ValueError(f"step {i} of a rollout that is at step {self.i}")
        if i > self.i:
            self.x, self.i = self.sampler.rollout(self.x, i, self.i), i
        return self.x / self.totals[i]

    def velocity(self, i: int, change: Tensor | None = None) -> Tensor:
        """v (B,C,h,w) with gradient at z_i, or at z_i + change, a tensor of zeros with a graph; then the step is taken."""
        self.state(i)
        x = self.x if change is None else self.x + change * self.totals[i]
        denoised = self.denoise(x, self.sampler.sigmas[i].expand(len(x)))
        with torch.no_grad():
            self.x, self.i = end_of(self.x, self.sampler.trajectory(Known(denoised.detach()), self.x, i, i + 1)), i + 1
        return (x / self.totals[i] - denoised) / self.levels[i]

    def change(self, steps: Sequence[int], scale: float, bridge: Tensor | None = None) -> Tensor:
        """Zeros (B,C,h,w) with the gradient of Σ scale·(s_{i+1} − s_i)·v_i over some steps, ascending; the first is taken at its
        state + bridge."""
        total = torch.zeros_like(self.x)
        for i in steps:
            width = self.levels[i + 1] - self.levels[i]
            total = total + scale * width * gradient_alone(self.velocity(i, bridge if i == steps[0] else None))
        return total


def gradient_alone(values: Tensor) -> Tensor:
    """Zeros that have the gradient of `values`: added to a detached state they make it straight-through."""
    return values - values.detach()


def rescaled(weights: Mapping[int, float], active: Sequence[int], rescale: float) -> float:
    """Factor 1 + g·(Σ|w| / Σ_active|w| − 1) of the active velocities' gradients: at g = 1 they stand for all."""
    return 1 + rescale * (sum(map(abs, weights.values())) / sum(abs(weights[i]) for i in active) - 1)
