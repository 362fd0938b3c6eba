"""InPO and SmPO: pairs are compared at the states and noise that DDIM inversion of their images finds, instead of at drawn noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ...data.batches import Pairs
from ...denoiser import Denoiser, per_sample
from ...policy import Policy
from ...reward import Reward, ScaledReward
from ...sampling import alpha, gaussian
from ..base import RunContext
from .dpo import DiffusionDPO
from .errors import Noised

log = logging.getLogger(__name__)
_WIDE = 20  # standard deviations: images of a data set spread over some ten


@torch.no_grad()
def inverted(
    policy: Policy, x0: Tensor, prompts: Sequence[str], sigma: Tensor, steps: int, renoise: bool, noise_at: Callable[[int], Tensor] | None
) -> Tensor:
    """Noise ε (B,C,h,w) of images x0 (B,C,h,w): α(σ)·x0 + σ·ε is where DDIM inversion with the tuned model ends, at levels sigma (B,).

    A step to the next of the levels of `steps` sampler steps takes the network's prediction at that next level, as diffusers'
    DDIMInverseScheduler does; the last step ends at σ. With renoise it is the mean of that and of the prediction where the step led
    (ReNoise, one refinement). noise_at(i) (B,C,h,w) is added before step i.
    """
    levels = torch.cat([policy.sigmas(steps).flip(0), sigma.max().reshape(1).to(torch.float32)])
    with policy.merged():
        denoiser, x = policy.denoiser(prompts), x0
        for i, (low, high) in enumerate(pairwise(levels)):
            here, there = low.to(sigma).expand_as(sigma).minimum(sigma), high.to(sigma).expand_as(sigma).minimum(sigma)
            rows = (there > here).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            one, part, here, there = denoiser.rows(rows), x[rows], here[rows], there[rows]
            if noise_at is not None and i > 0:
                part = part + per_sample(gaussian(part, part, there, here, space=policy.space)[1], part) * noise_at(i)[rows].to(part)
            slope = _slope(policy, one, part, here, there)
            if renoise:
                slope = (slope + _slope(policy, one, part + per_sample(there - here, part) * slope, there, there)) / 2
            x = x.index_copy(0, rows.to(x.device), part + per_sample(there - here, part) * slope)
    return (x - per_sample(alpha(sigma, policy.space), x) * x0) / per_sample(sigma, x)


def _slope(policy: Policy, denoiser: Denoiser, x: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """dx/dσ, ε or the velocity (B,C,h,w), of what the network sees of the state x at level `here` when it is given level `there`."""
    if policy.space == "ve":  # the network's input is x/√(1 + σ²)
        x = x * per_sample(((1 + there.square()) / (1 + here.square())).sqrt(), x)
    return (x - denoiser(x, there)) / per_sample(there, x)


@dataclass(frozen=True)
class InPO(DiffusionDPO):
    """InPO (Lu et al. 2025, arXiv:2503.18454): Diffusion-DPO at the noise that the model itself finds in each of the two images.

    Both images are inverted by DDIM, with the present adapter and no guidance, to the drawn level; their errors are against the noise
    found. Official, from code: 10 steps for all levels, so 5 on average, with noise of 0.1; β = 2000 (SD1.5, after supervised training)
    and 5000 (SDXL); 400 steps of 1024 pairs. There the last step may end below the level at which errors are taken; here it ends on it.
    """

    beta: float = field(default=2000.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base (5000 SDXL)"})
    safeguard: bool = field(default=False, metadata={"help": "as Diffusion-DPO; the official code has none"})
    inversion_steps: int = field(default=10, metadata={"min": 1, "max": 1000, "help": "steps of an inversion to the highest noise level"})
    inversion_noise: float = field(
        default=0.1, metadata={"min": 0.0, "max": 1.0, "help": "noise added between its steps, as a share of an ancestral step's"}
    )
    renoise: bool = field(default=False, metadata={"help": "refine each step once (ReNoise), at twice the evaluations"})

    def states(self, run: RunContext, batch: Pairs, prompts: Sequence[Sequence[str]]) -> Noised:
        """The drawn levels, and the noise found in each image."""
        drawn, shape = self.noised(run, batch), batch.shape(run.policy)

        def noise_at(i: int) -> Tensor:
            return self.inversion_noise * torch.cat([batch.rng.normal(f"inversion {i}, image {k}", shape) for k in range(2)])

        x0 = torch.cat([one.to(run.policy.device) for one in (batch.chosen, batch.rejected)])
        noisy = noise_at if self.inversion_noise > 0 else None
        found = inverted(run.policy, x0, [*prompts[0], *prompts[1]], drawn.sigma.repeat(2), self.inversion_steps, self.renoise, noisy)
        return replace(drawn, noise=found)


@dataclass(frozen=True)
class SmPO(InPO):
    """SmPO-Diffusion (Lu et al. 2025, arXiv:2506.02698): InPO with ReNoise, on pairs that a reward labels, softly.

    β of a pair is multiplied by 10·(2p − 1), p = σ((r_w − r_l)/range) of the rewards of both decoded images: small where they are alike,
    negative where the reward disagrees with the data, so that only the reward decides which image is preferred. Official, from code:
    PickScore with the range of its data, 16.7; 10 steps of inversion (SDXL), 5 (SD1.5); β = 5000 and 2000; 200 steps of 1024 pairs.
    """

    unread: ClassVar[tuple[str, ...]] = ("safeguard", "mu", "sft_weight")
    inversion_noise: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "noise added between the steps of the inversion"})
    renoise: bool = field(default=True, metadata={"help": "refine each step once (ReNoise), at twice the evaluations"})
    sharpness: float = field(default=10.0, metadata={"min": 0.0, "help": "factor of β for a pair that is certain"})
    score_range: float = field(
        default=16.7, metadata={"min": 1e-6, "help": "highest less lowest score of such images, in the reward's unit (16.7: PickScore)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safeguard or self.sft_weight:
            raise ValueError(
                "safeguard and sft_weight hold to the image that the data call better, and SmPO to the one that its reward prefers: "
                "leave both out, or take inpo"
            )

    @property
    def needs_reward(self) -> bool:
        """It labels the pairs."""
        return True

    def check(self, context: RunContext) -> None:
        """Refuse a reward without a raw unit, which `score_range` is in, and warn where that is far beyond the reward's spread."""
        self.unit(context.reward)
        std = context.reward.std if isinstance(context.reward, ScaledReward) else None
        if std is not None and self.score_range > _WIDE * std:
            log.warning(
                f"objective.score_range = {self.score_range:g} is {self.score_range / std:.0f} standard deviations of this reward, which "
                "hardly decides any pair by it (16.7 is PickScore's): give the highest less the lowest score of such images"
            )

    def unit(self, reward: Reward | None) -> float:
        """Raw scores that one of the reward's is worth; ValueError for a sum of standardised rewards."""
        if not isinstance(reward, ScaledReward) or not reward.standardised:
            return 1.0
        if reward.std is None:
            raise ValueError(
                "score_range is in the raw reward's unit, and a sum of standardised rewards has none: give standardise = false"
            )
        return reward.std

    @torch.no_grad()
    def strength(self, run: RunContext, batch: Pairs) -> Tensor:
        """β of each pair (B,), of the better image by the data over the worse one."""
        better, worse = (run.scores(latents.to(run.policy.device), batch.prompts) for latents in (batch.chosen, batch.rejected))
        return self.beta * self.sharpness * torch.tanh(self.unit(run.reward) * (better - worse) / (2 * self.score_range))
