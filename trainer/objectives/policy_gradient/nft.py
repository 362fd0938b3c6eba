"""DiffusionNFT: own images as good and as bad examples, in proportion to their advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...denoiser import per_sample
from ...policy import Policy
from ...rng import Rng
from ..base import Logs, Loss, RunContext
from ..following import Following, WithFollowing
from ..shared import error_scale, rollout_noise, sampler_steps
from .advantages import Baseline
from .awm import drawing_guidance_scale, own_images
from .rounds import PolicyGradient, Rounds
from .selection import Round, Selection


@dataclass(frozen=True)
class DiffusionNFT(PolicyGradient):
    """DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): r·‖D⁺ − x0‖² + (1 − r)·‖D⁻ − x0‖² on own images x0, r = ½ + A/2·max in [0,1].

    D⁺ = β·D + (1 − β)·D_old learns good images, D⁻ = (1 + β)·D_old − β·D bad ones; D_old drew them and follows the tuned model from round
    to round. Both errors are divided by their mean size. Official, from code, for SD3.5 medium without guidance: 10 steps, each of the
    first 9 levels of every image, groups of 24 of 48 prompts, β = 1 or 0.1, KL 1e-4, D_old's decay 0.001 a step up to 0.5.
    """

    steps: int = sampler_steps(10)
    guidance_scale: float = drawing_guidance_scale()
    group: int = field(default=24, metadata={"min": 1, "max": 1024, "help": "images of a prompt in a round (24 official)"})
    baseline: Baseline = field(
        default="group-mean",
        metadata={"help": "of advantages, as in DDPO (official: group-mean, the prompt's mean, the round's standard deviation)"},
    )
    kl_weight: float = field(
        default=1e-4, metadata={"min": 0.0, "help": "weight of the squared distance to the base model's prediction (official 1e-4)"}
    )
    max_advantage: float = field(
        default=5.0,
        metadata={
            "min": 1e-3,
            "max": 1000.0,
            "help": "advantages are clipped to ± this, where r is 1 or 0; factor of the loss (official 5)",
        },
    )
    beta: float = field(default=1.0, metadata={"min": 1e-3, "max": 10.0, "help": "share of the tuned model in D⁺ (official 1 or 0.1)"})
    decay_rate: float = field(default=0.001, metadata={"min": 0.0, "max": 1.0, "help": "growth of D_old's decay in an optimizer step"})
    max_decay: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0, "help": "its limit; 0: D_old is the model as the round began"})
    eta: float = rollout_noise(0.0, "official 0")

    @property
    def trained(self) -> int:
        """Levels of an image: all but the last."""
        return max(1, int(0.99 * self.steps))

    @property
    def kept(self) -> int:
        """The image alone."""
        return 1

    def needed(self, step: int) -> range:
        """The image."""
        return range(1)

    def trained_steps(self, seed: int, number: int) -> Tensor:
        """Indices (N,W) of noise levels: the first W of every image."""
        return torch.arange(self.trained).expand(self.images, -1)

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images alone, by D_old."""
        with cast(WithFollowing, run.policy).following.inside():
            ends = own_images(run.policy, prompts, rng, self.steps, self.guidance_scale, self.eta)
        return ends[:, None], ends, torch.zeros(index.shape)

    def losses(self, run: RunContext, part: Selection) -> tuple[Tensor, Logs]:
        """Losses (B,) and logs of (B,)."""
        policy, sigma, clean = run.policy, run.policy.sigmas(self.steps)[part.index], part.states[:, 0]
        x = policy.add_noise(clean, part.rng.normal("matching noise", policy.latent_shape).to(clean), sigma)
        scale = per_sample(error_scale("model", sigma, policy.space), clean)

        def predicted(adapter: str) -> Tensor:
            return policy.denoiser(part.prompts, adapter=adapter, guidance_scale=1.0)(x, sigma)

        with torch.no_grad():
            old = predicted("old")
        denoised = predicted("tuned")
        good = _relative(old + self.beta * (denoised - old), clean)
        bad = _relative(old - self.beta * (denoised - old), clean)
        share = (part.advantages.to(good) / self.max_advantage / 2 + 0.5).clamp(0, 1)
        losses = self.max_advantage / self.beta * (share * good + (1 - share) * bad)
        logs = {"good": good.detach(), "bad": bad.detach()}
        if self.kl_weight > 0:
            with torch.no_grad():
                base = predicted("base")
            distance = ((denoised - base) * scale).square().flatten(1).mean(1)
            losses, logs = losses + self.kl_weight * distance * part.held.to(distance), {**logs, "distance": distance.detach()}
        return losses, logs

    def begin(self, context: RunContext) -> Loss:
        """Rounds that are drawn by what follows the tuned model."""
        return _FollowedRounds(self, context)


def _relative(prediction: Tensor, clean: Tensor) -> Tensor:
    """Mean squared errors (B,) divided by mean absolute ones, which carry no gradient."""
    error = (prediction - clean).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


class _FollowedRounds(Rounds):
    def __init__(self, objective: DiffusionNFT, run: RunContext) -> None:
        self.settings, self.old = objective, Following(run.policy)
        super().__init__(objective, replace(run, policy=cast(Policy, WithFollowing(run.policy, self.old, "old"))))

    def _collect(self, rng: Rng, number: int, chunk: int) -> Round:
        if self.round is not None:
            self.old.update(min(self.settings.decay_rate * rng.step, self.settings.max_decay))
        return super()._collect(rng, number, chunk)

    def held(self) -> Sequence[Tensor]:
        """D_old."""
        return self.old.values

    def state(self) -> dict[str, Any]:
        """That of the rounds, and what follows."""
        return {**super().state(), "old": self.old.state()} if self.round is not None else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` returned."""
        super().restore(state)
        if state:
            self.old.restore(state["old"])
