"""Denoising errors of the tuned model and of the reference at equal noise levels and noise: what preference losses are made of.

The reference is the model without its adapter: no weights are copied. Errors are reduced by their mean over the elements of a sample,
so that a loss's β means the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ...data.batches import Batch
from ...denoiser import per_sample
from ...policy import Policy
from ...sampling import Space
from ..base import Bound, Logs, Loss, RunContext, Stateless, WithoutReward
from ..following import Following, WithFollowing
from ..shared import GRID, Target, error_scale, snr

Levels = Literal["uniform", "logit-normal", "early", "min-snr", "debiased"]
Two = tuple[Tensor, Tensor]
"""Of a better and of a worse image, or of an image under a right and a wrong caption."""


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
    masks: tuple[Tensor, ...] = ()
    """(B,1,h,w) of each of what is compared: weights of its errors, of mean 1."""

    def errors(self, latents: Sequence[Tensor], prompts: Sequence[Sequence[str]], adapter: str = "tuned") -> list[Tensor]:
        """Error of the prediction (B,C,h,w), in units of the target, for each of `latents` (B,C,h,w) under its prompts; one evaluation."""
        clean = torch.cat([one.to(self.policy.device) for one in latents])
        sigma = self.sigma.repeat(len(latents))
        noise = self.noise.to(clean).repeat(len(clean) // len(self.noise), 1, 1, 1)
        x = self.policy.add_noise(clean, noise, sigma)
        with torch.set_grad_enabled(adapter != "base" and torch.is_grad_enabled()):
            denoised = self.policy.denoiser([prompt for some in prompts for prompt in some], adapter=adapter)(x, sigma)
            scale = error_scale(self.target, sigma, self.policy.space)
            errors = (denoised - clean) * per_sample(scale, clean)
            if self.masks:  # of each image, or one for an image that is compared with itself
                errors = errors * torch.cat(self.masks * (len(latents) // len(self.masks))).to(errors).sqrt()
            return list(errors.chunk(len(latents)))

    def of(self, number: int) -> Noised:
        """For the errors of one of what is compared by itself."""
        return replace(self, masks=self.masks[number : number + 1])

    def two(self, latents: Two, prompts: Sequence[Sequence[str]], adapter: str = "tuned") -> Two:
        """`errors` of two latents."""
        first, second = self.errors(latents, prompts, adapter)
        return first, second


def mean_square(error: Tensor) -> Tensor:
    """L (B,) of errors (B,C,h,w)."""
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class DenoisingObjective(WithoutReward, Stateless):
    """What the objectives on denoising errors share."""

    may_follow: ClassVar[bool] = True
    """Whether errors are compared with those of one reference, which may follow the tuned model."""
    reads_details: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.may_follow:
            cls.unread = (*cls.unread, "reference_every", "reference_decay")

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
    reference_every: int = field(
        default=0,
        metadata={
            "min": 0,
            "since": "0.2.0",
            "help": "optimizer steps after which the reference follows the tuned model; 0: it stays the base model",
        },
    )
    reference_decay: float = field(
        default=0.0,
        metadata={
            "min": 0.0,
            "max": 0.99999,
            "since": "0.2.0",
            "help": "share of the old reference that is kept then: 0 replaces it, 0.999 with reference_every = 1 averages (EMA)",
        },
    )

    def __post_init__(self) -> None:
        if self.reference_every and not self.may_follow:
            raise ValueError("reference_every: this objective has no reference that can follow the tuned model; leave it out")
        if self.reference_decay and not self.reference_every:
            raise ValueError("reference_decay is of a reference that follows: give reference_every, 1 say")
        if self.reference_every == 1 and not self.reference_decay:
            raise ValueError(
                "reference_every = 1 with reference_decay = 0: the reference would be the tuned model itself; give more steps or a decay"
            )

    def begin(self, context: RunContext) -> Loss:
        """The loss of one run, by the base model or by a reference that follows."""
        if not self.reference_every:
            return self.of_run(context)
        following = Following(context.policy)
        policy = cast(Policy, WithFollowing(context.policy, following, "base"))
        return _FollowedReference(self, self.of_run(replace(context, policy=policy)), following)

    def of_run(self, context: RunContext) -> Loss:
        """The loss of one run."""
        return Bound(self, context)

    def noised(self, run: RunContext, batch: Batch) -> Noised:
        """The draws of a micro-batch."""
        policy = run.policy
        sigmas = policy.sigmas(GRID)[:-1]
        cumulative = level_weights(self.levels, self.target, sigmas, policy.space).cumsum(0)
        drawn, last = batch.rng.uniform("noise level"), torch.tensor(len(sigmas) - 1)
        if batch.details.least is not None:  # of the levels that are high enough; the noisiest comes first
            flow = sigmas if policy.space == "flow" else sigmas / (1 + sigmas)
            last = (flow.double()[None] >= batch.details.least.to(flow.device)[:, None]).sum(1).clamp(min=1) - 1
            drawn = drawn.to(cumulative) * cumulative[last] / cumulative[-1]
        index = torch.searchsorted(cumulative / cumulative[-1], drawn, right=True)
        noise = batch.rng.normal("diffusion noise", batch.shape(policy))
        return Noised(policy, sigmas[index.minimum(last)], noise, self.target, batch.details.masks)

    def read(self, batch: Batch, images: int = 1) -> list[list[str]]:
        """The prompts of each of so many compared images, some of them replaced by the empty one, for all images alike."""
        return [self.kept(batch, one) for one in batch.details.captions or (batch.prompts,) * images]

    def kept(self, batch: Batch, prompts: Sequence[str]) -> list[str]:
        """The prompts, some of them replaced by the empty one."""
        dropped = (batch.rng.uniform("prompt dropout") < self.prompt_dropout).tolist()
        return ["" if gone else prompt for prompt, gone in zip(prompts, dropped)]


class _FollowedReference(Loss):
    """A loss whose reference follows the tuned model: v ← decay·v + (1 − decay)·θ after every so many optimizer steps."""

    def __init__(self, settings: DenoisingObjective, inner: Loss, following: Following) -> None:
        self.settings, self.inner, self.following, self.step = settings, inner, following, -1

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        s, step = self.settings, batch.rng.step
        if step != self.step:  # an optimizer step lies between
            if step % s.reference_every == 0:
                self.following.update(s.reference_decay)
            self.step = step
        return self.inner(batch)

    def held(self) -> Sequence[Tensor]:
        """The reference."""
        return self.following.values

    def state(self) -> dict[str, Any]:
        """That of the loss, the reference, and the optimizer step that it follows."""
        return {"inner": self.inner.state(), "reference": self.following.state(), "step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` returned."""
        self.inner.restore(state["inner"])
        self.following.restore(state["reference"])
        self.step = state["step"]
