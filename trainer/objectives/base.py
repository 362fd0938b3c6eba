"""What every objective is, and the pieces most of them share: a rollout without gradient, and the shaping of a reward.

An objective is a truncated rollout: where the state comes from, which denoiser calls carry the gradient, what estimate of
x0 is scored, and how the loss is shaped. The trainer knows nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..denoiser import per_sample
from ..policy import Batch, Policy
from ..reward import PrefixReward, Reward
from ..runtime.processes import ALONE, Processes
from ..sampling import Space, alpha, step

Logs = dict[str, Tensor]


class ImageFeatures(Protocol):
    """Frozen features of a two-tower model."""

    def image_features(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,D), differentiable."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B,D)."""
        ...


@dataclass(frozen=True)
class RunContext:
    """What a run gives its objective: the model, the reward, and for stateful objectives features, a folder and all prompts."""

    policy: Policy
    reward: Reward | None = None
    features: ImageFeatures | None = None
    processes: Processes = ALONE
    folder: Path = Path()
    prompts: tuple[str, ...] = ()

    @property
    def required_reward(self) -> Reward:
        """The reward, or a ValueError where the run has none."""
        if self.reward is None:
            raise ValueError("this objective needs a reward: set `reward`")
        return self.reward

    def scores(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards (B,) of finished latents (B,C,h,w), differentiable where the reward is."""
        return self.required_reward(self.policy.decode(latents), prompts)


class Loss(ABC):
    """What the training loop calls. State between steps is saved with every checkpoint and restored from it."""

    @abstractmethod
    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,) by name."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for the checkpoint; empty for stateless objectives."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state()`."""
        return

    def saved(self) -> None:
        """Called after a checkpoint with the present state was written: files that only older ones need may be deleted."""
        return


class Objective(ABC):
    """A frozen dataclass whose fields are the config keys, the CLI flags and the node widgets."""

    steps: int
    guidance_scale: float

    @property
    def needs_images(self) -> bool:
        """Whether it trains on real images."""
        return False

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return True

    def wordings(self, prompts: Sequence[str]) -> list[str]:
        """The texts that a reward reads in training on these prompts."""
        return list(prompts)

    @abstractmethod
    def recommended_sigma(self, sigmas: Tensor) -> float:
        """Noise level from which the tuned model has been trained: where combined generation should switch to it."""

    def check(self, context: RunContext) -> None:
        """Raise ValueError where these settings cannot work with this policy, reward or disk; called before any step."""
        return

    @abstractmethod
    def begin(self, context: RunContext) -> Loss:
        """The loss of one run."""


class Stateless(Objective):
    """An objective that keeps nothing between steps: a function of the run and the batch."""

    @abstractmethod
    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,) by name."""

    def begin(self, context: RunContext) -> Loss:
        """`loss` of this run."""
        return _Bound(self, context)


@dataclass(frozen=True)
class _Bound(Loss):
    objective: Stateless
    run: RunContext

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        return self.objective.loss(self.run, batch)


# -- fields that several objectives have, so that default and range are said once per meaning -----------------------------


def sampler_steps(default: int) -> Any:
    """Field `steps`."""
    return field(default=default, metadata={"min": 1, "max": 1000, "help": "sampler steps T of the training grid"})


def training_guidance_scale(default: float, origin: str) -> Any:
    """Field `guidance`."""
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


# -- pieces ----------------------------------------------------------------------------------------------------------


def roll(policy: Policy, batch: Batch, x: Tensor, first: Tensor, last: Tensor, sigmas: Tensor, guidance_scale: float, eta: float) -> Tensor:
    """Steps first…last−1 of each sample, without gradient; samples whose range is empty stay as they are. first, last: (B,)."""
    x = x.clone()
    with torch.no_grad(), policy.merged():
        for i in range(int(first.min()), int(last.max())):
            rows = ((first <= i) & (i < last)).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            prompts = [batch.prompts[r] for r in rows.tolist()]
            denoised = policy.denoiser(prompts, guidance_scale=guidance_scale)(x[rows], sigmas[i].expand(len(rows)))
            x[rows] = one_step(policy, batch, x[rows], denoised, i, sigmas, eta, rows)
    return x


def one_step(
    policy: Policy, batch: Batch, x: Tensor, denoised: Tensor, i: int, sigmas: Tensor, eta: float, rows: Tensor | None = None
) -> Tensor:
    """Step i → i+1 with the noise that belongs to samples `rows` of the batch (all of them without)."""
    rng = batch.rng
    if rows is not None:
        rng = replace(rng, indices=tuple(rng.indices[r] for r in rows.tolist()))
    noise = rng.normal(f"step {i}", batch.shape(policy)).to(x) if eta > 0 and float(sigmas[i + 1]) > 0 else None
    here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
    return step(x, denoised, here, there, noise, eta if noise is not None else 0.0, policy.space)


def shaped(scores: Tensor, threshold: float | None) -> Tensor:
    """Losses (B,) of scores (B,): −r, or max(0, threshold − r) (ReFL)."""
    return -scores if threshold is None else (threshold - scores).relu()


def distance_to_base(policy: Policy, batch: Batch, x: Tensor, sigma: Tensor, denoised: Tensor, guidance_scale: float) -> Tensor:
    """Mean squared difference (B,) of the noise predictions of the tuned and the base model at x."""
    base = policy.denoiser(batch.prompts, adapter="base", guidance_scale=guidance_scale)(x.detach(), sigma)
    return ((denoised - base) * per_sample(alpha(sigma, policy.space) / sigma, x)).square().flatten(1).mean(1)


def snr(sigma: Tensor, space: Space) -> Tensor:
    """(α(σ)/σ)²."""
    return (alpha(sigma, space) / sigma).square()


def prefix_scores(reward: Reward | None) -> PrefixReward | None:
    """The reward as one that scores an image under several prefixed prompts, if it can: two-tower rewards do."""
    return reward if isinstance(reward, PrefixReward) and reward.takes_prefixes else None
