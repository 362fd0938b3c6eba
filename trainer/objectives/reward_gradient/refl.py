"""ReFL and ImageReFL: the reward's gradient through one denoiser call at a random late step.

They differ in where that step's state comes from: pure noise (ReFL) or a noised real image (ImageReFL).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ...denoiser import per_sample
from ...reward import Reward, ScaledReward
from ...sampling import Space, alpha, end_of
from ..base import Logs, RunContext, Stateless
from ..shared import (
    Known,
    Sampler,
    distance_to_base,
    reward_threshold,
    rollout_noise,
    sampler_steps,
    shaped,
    training_guidance_scale,
    weight_of_reward,
)

Unit = Literal["raw", "sd"]


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
    stratified: bool = field(
        default=False, metadata={"since": "0.2", "help": "draw every m equally often: each once per round of draws, in random order"}
    )
    grad_steps: int = field(
        default=1,
        metadata={
            "since": "0.2",
            "min": 1,
            "max": 1000,
            "help": "gradient steps on one rollout, evenly spaced over the range, m one of them",
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.grad_from <= self.grad_to < self.steps:
            raise ValueError(f"gradient range {self.grad_from}–{self.grad_to} does not lie in 0–{self.steps - 1} (steps = {self.steps})")
        if self.sigma_low > self.sigma_high:
            raise ValueError(f"sigma_low {self.sigma_low} lies above sigma_high {self.sigma_high}")

    def check(self, context: RunContext) -> None:
        """Refuse more gradient steps than the range has, and settings that give each process another number of evaluations where
        that number must be equal."""
        low, high = self.index_range(context.policy.sigmas(self.steps))
        if self.grad_steps > high - low + 1:
            raise ValueError(f"grad_steps = {self.grad_steps} of a range that has {high - low + 1} steps ({low}–{high})")
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
        m = self.gradient_steps(batch, sampler.sigmas)
        x = sampler.rollout(sampler.start(), m[0])
        return self._reward_losses(run, batch, sampler, m, x, sampler.denoiser(x, sampler.sigmas[m[0]]))

    def gradient_step(self, batch: Batch, sigmas: Tensor) -> Tensor:
        """The index m (B,) that is drawn for each sample on a grid (T+1,)."""
        low, high = self.index_range(sigmas)
        if not self.stratified:
            return batch.rng.integers("gradient step", low, high, shared=not self.per_sample)
        turns = batch.rng.indices if self.per_sample else [self.turn(batch.number)] * len(batch.prompts)
        return batch.rng.in_turn("gradient step", low, high, turns)

    def gradient_steps(self, batch: Batch, sigmas: Tensor) -> Tensor:
        """The indices (grad_steps,B), ascending, of each sample's gradient steps: m, and others evenly spaced over the range."""
        low, high = self.index_range(sigmas)
        span = high - low + 1
        ahead = torch.tensor([j * span // self.grad_steps for j in range(self.grad_steps)])
        return (low + (self.gradient_step(batch, sigmas) - low + ahead[:, None]) % span).sort(0).values

    def turn(self, number: int) -> int:
        """How many micro-batches of the kind of micro-batch `number` came before it."""
        return number

    def _reward_losses(
        self, run: RunContext, batch: Batch, sampler: Sampler, m: Tensor, x: Tensor, denoised: Tensor
    ) -> tuple[Tensor, Logs]:
        """Mean reward loss at the indices m (n,B), ascending, of one rollout; x and its prediction are those at m[0]."""
        found = [self._reward_loss(run, batch, x, sampler.sigmas[m[0]], denoised)]
        for before, here in pairwise(m.unbind()):
            x, sigma = sampler.rollout(x, here, before), sampler.sigmas[here]
            found.append(self._reward_loss(run, batch, x, sigma, sampler.denoiser(x, sigma)))
        logs = {name: torch.stack([one[name] for _, one in found]).mean(0) for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).mean(), logs

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

    The diffusion loss is always on the unguided prediction. Without guidance the first rollout step is the same evaluation: it
    is done once, with gradient. Samples whose gradient step is the start itself take their x̂0 from it too.
    """

    start_from: int = field(default=30, metadata={"min": 0, "max": 999, "help": "first index to which a real image may be noised"})
    start_to: int = field(
        default=30, metadata={"min": 0, "max": 999, "help": "last such index, included; the gradient step never precedes it"}
    )
    refl_share: float = field(
        default=0.25, metadata={"min": 0.0, "max": 1.0, "help": "share of micro-batches that start from noise (plain ReFL)"}
    )
    diffusion_weight: float = field(
        default=0.01, metadata={"min": 0.0, "help": "weight of the diffusion loss (official 0.01 beside a raw reward)"}
    )
    refl_diffusion: bool = field(
        default=False,
        metadata={"since": "0.2", "help": "diffusion loss on the plain ReFL micro-batches too, at m with fresh noise (official: true)"},
    )
    diffusion_weight_unit: Unit | None = field(
        default=None,
        metadata={
            "since": "0.2",
            "help": "diffusion_weight is meant beside the raw reward, or beside the standardised one; none: whichever is trained on",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_from <= self.start_to < self.steps:
            raise ValueError(f"start range {self.start_from}–{self.start_to} does not lie in 0–{self.steps - 1} (steps = {self.steps})")
        if self.sigma_low <= 0 and self.start_to > self.grad_to:
            raise ValueError(f"images start as late as index {self.start_to}, after the last gradient step {self.grad_to}")

    @property
    def data(self) -> type[Prompts]:
        """Images, unless every micro-batch is plain ReFL without a diffusion loss."""
        return Images if self.refl_share < 1 or self._regularises_refl else Prompts

    @property
    def _regularises_refl(self) -> bool:
        return self.refl_diffusion and self.diffusion_weight > 0

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """The earliest noise level that training on images has seen."""
        return float(sigmas[self.start_from])

    def takes_noise(self, number: int) -> bool:
        """Whether micro-batch `number` is a plain ReFL one: evenly spaced, and a function of the number alone."""
        return int((number + 1) * self.refl_share) > int(number * self.refl_share)

    def turn(self, number: int) -> int:
        """How many micro-batches from noise, or from images, came before micro-batch `number`."""
        from_noise = int(number * self.refl_share)
        return from_noise if self.takes_noise(number) else number - from_noise

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        from_noise = self.takes_noise(batch.number)
        if from_noise and not self._regularises_refl:
            return super().loss(run, batch)
        if not isinstance(batch, Images):
            raise ValueError("ImageReFL trains on real images: give a folder of images with captions, or refl_share = 1")
        if not from_noise:
            return self._image_loss(run, batch)
        loss, logs = super().loss(run, batch)
        sigmas = run.policy.sigmas(self.steps)
        sigma = sigmas[self.gradient_step(batch, sigmas)]
        latents = batch.latents.to(run.policy.device)
        noise = batch.rng.normal("diffusion noise", batch.shape(run.policy)).to(latents)
        denoised = run.policy.denoiser(batch.prompts)(run.policy.add_noise(latents, noise, sigma), sigma)
        return self._regularised(run, loss, logs, denoising_error(denoised, latents, sigma, run.policy.space))

    def _image_loss(self, run: RunContext, batch: Images) -> tuple[Tensor, Logs]:
        policy, sampler = run.policy, Sampler(run, batch, self.steps, self.guidance_scale, self.eta)
        sigmas, latents = sampler.sigmas, batch.latents.to(policy.device)
        first = batch.rng.integers("image start", self.start_from, self.start_to, shared=not self.per_sample)
        m = self.gradient_steps(batch, sigmas).maximum(first)
        last = m[0]
        start = policy.add_noise(latents, sampler.start_noise.to(latents), sigmas[first])
        regularised = self.diffusion_weight > 0
        if regularised and self.guidance_scale != 1:
            unguided = policy.denoiser(batch.prompts)(start, sigmas[first])
            x = sampler.rollout(start, last, first)
            denoised = sampler.denoiser(x, sigmas[last])
        else:
            with torch.set_grad_enabled(regularised or bool((last == first).any())):
                unguided = sampler.denoiser(start, sigmas[first])
            x, denoised = self._from_start(sampler, start, unguided, first, last)
        loss, logs = self._reward_losses(run, batch, sampler, m, x, denoised)
        if not regularised:
            return loss, logs
        return self._regularised(run, loss, logs, denoising_error(unguided, latents, sigmas[first], policy.space))

    def check(self, context: RunContext) -> None:
        """As ReFL; and refuse a unit of the diffusion weight that this reward does not have."""
        super().check(context)
        self.weight_beside(context.reward)

    def weight_beside(self, reward: Reward | None) -> float:
        """The diffusion weight in the unit of the scores: a raw score is std standard deviations' worth.

        Raises ValueError where the conversion needs a standard deviation that the reward does not have.
        """
        unit, weight = self.diffusion_weight_unit, self.diffusion_weight
        standardised, std = (reward.standardised, reward.std) if isinstance(reward, ScaledReward) else (False, None)
        if unit is None or weight == 0 or standardised == (unit == "sd"):
            return weight
        if std is None and unit == "raw":
            raise ValueError("diffusion_weight_unit = raw: a sum of standardised rewards has no raw unit; give sd, or standardise = false")
        if std is None:
            raise ValueError(
                "diffusion_weight_unit = sd: the reward has no measured standard deviation; "
                "measure it with `python -m trainer rewards calibrate`, or give raw"
            )
        return weight / std if unit == "raw" else weight * std

    def _regularised(self, run: RunContext, loss: Tensor, logs: Logs, errors: Tensor) -> tuple[Tensor, Logs]:
        return loss + self.weight_beside(run.reward) * errors.mean(), {**logs, "diffusion": errors.detach()}

    def _from_start(self, sampler: Sampler, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """State and x0-prediction at the gradient step; the prediction at the start takes the first step too."""
        onward = (last > first).nonzero()[:, 0]
        if len(onward) == 0:
            return start, at_start
        with torch.no_grad():
            x = end_of(start, sampler.trajectory(Known(at_start.detach()), start, first, last.minimum(first + 1)))
        x = sampler.rollout(x, last, first + 1)
        later = sampler.denoiser.rows(onward)(x[onward], sampler.sigmas[last[onward]])
        return x, at_start.index_copy(0, onward.to(at_start.device), later)


def denoising_error(denoised: Tensor, latents: Tensor, sigma: Tensor, space: Space) -> Tensor:
    """Mean squared error (B,) of the noise prediction that x0-predictions of noised latents imply: ε̂ − ε = −(x̂0 − x0)·α/σ."""
    return ((denoised - latents) * per_sample(alpha(sigma, space) / sigma, latents)).square().flatten(1).mean(1)
