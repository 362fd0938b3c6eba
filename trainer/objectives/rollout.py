"""ReFL and ImageReFL: the reward's gradient through one denoiser call at a random late step.

They differ in where that step's state comes from: pure noise (ReFL) or a noised real image (ImageReFL).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..denoiser import per_sample
from ..policy import Batch, Policy
from ..reward import Reward
from ..sampling import alpha, step

Logs = dict[str, Tensor]


@dataclass(frozen=True)
class ReFL:
    """Reward feedback learning (Xu et al. 2023, arXiv:2304.05977, algorithm 1).

    Noise is denoised without gradient up to a random index m; one call with gradient there gives x̂0, which is decoded
    and scored. Defaults are the official ImageReFL configuration's for SD1.5.
    """

    steps: int = field(default=40, metadata={"min": 1, "max": 1000, "help": "sampler steps T of the training grid"})
    grad_from: int = field(default=30, metadata={"min": 0, "max": 999, "help": "first index m at which the gradient step may fall"})
    grad_to: int = field(default=39, metadata={"min": 0, "max": 999, "help": "last such index, included"})
    sigma_high: float = field(default=0.0, metadata={"min": 0.0, "help": "with sigma_low: the range of m as noise levels, instead"})
    sigma_low: float = field(default=0.0, metadata={"min": 0.0, "help": "lowest noise level of m; 0 means: use the indices"})
    per_sample: bool = field(default=True, metadata={"help": "draw m for each sample (official code: one per batch)"})
    guidance: float = field(
        default=1.0, metadata={"min": 0.0, "max": 30.0, "help": "classifier-free guidance in training; 1 is off, as official"}
    )
    eta: float = field(
        default=1.0, metadata={"min": 0.0, "max": 1.0, "help": "noise of the rollout: 1 ancestral (official), 0 deterministic"}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "loss max(0, threshold − reward), ReFL's 2.0 on standardised rewards; none: −reward"}
    )
    reward_weight: float = field(default=1.0, metadata={"min": 0.0, "help": "weight of the reward loss"})
    kl_weight: float = field(
        default=0.0, metadata={"min": 0.0, "help": "weight of the squared distance to the base model's noise prediction at m"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.grad_from <= self.grad_to < self.steps:
            raise ValueError(f"gradient range {self.grad_from}–{self.grad_to} does not lie in 0–{self.steps - 1} (steps = {self.steps})")
        if self.sigma_low > self.sigma_high:
            raise ValueError(f"sigma_low {self.sigma_low} lies above sigma_high {self.sigma_high}")

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

    def __call__(self, policy: Policy, batch: Batch, reward: Reward) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        sigmas = policy.sigmas(self.steps)
        low, high = self.index_range(sigmas)
        m = batch.draws.integers("gradient step", low, high, shared=not self.per_sample)
        x = policy.start(batch.draws.normal("start", policy.latent_shape), self.steps)
        x = self._roll(policy, batch, x, torch.zeros_like(m), m, sigmas)
        denoised = policy.denoiser(batch.prompts, self.guidance)(x, sigmas[m])
        return self._reward_loss(policy, batch, reward, x, sigmas[m], denoised)

    def _roll(self, policy: Policy, batch: Batch, x: Tensor, first: Tensor, last: Tensor, sigmas: Tensor) -> Tensor:
        """Steps first…last−1 of each sample, without gradient; samples whose range is empty stay as they are."""
        x = x.clone()
        with torch.no_grad():
            for i in range(int(first.min()), int(last.max())):
                rows = ((first <= i) & (i < last)).nonzero()[:, 0]
                if len(rows) == 0:
                    continue
                prompts = [batch.prompts[r] for r in rows.tolist()]
                denoised = policy.denoiser(prompts, self.guidance)(x[rows], sigmas[i].expand(len(rows)))
                x[rows] = self._step(policy, batch, x[rows], denoised, i, sigmas, rows)
        return x

    def _step(self, policy: Policy, batch: Batch, x: Tensor, denoised: Tensor, i: int, sigmas: Tensor, rows: Tensor) -> Tensor:
        draws = replace(batch.draws, indices=tuple(batch.draws.indices[r] for r in rows.tolist()))
        noise = draws.normal(f"step {i}", policy.latent_shape).to(x) if self.eta > 0 else None
        here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
        return step(x, denoised, here, there, noise, self.eta, policy.space)

    def _reward_loss(self, policy: Policy, batch: Batch, reward: Reward, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Logs]:
        scores = reward(policy.decode(denoised), batch.prompts)
        losses = -scores if self.threshold is None else (self.threshold - scores).relu()
        total = self.reward_weight * losses.mean()
        logs: Logs = {"reward": scores.detach()}
        if self.kl_weight > 0:
            base = policy.reference(batch.prompts, self.guidance)(x, sigma)
            distance = ((denoised - base) / per_sample(sigma, x)).square().flatten(1).mean(1)
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

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """The earliest noise level that training on images has seen."""
        return float(sigmas[self.start_from])

    def takes_noise(self, number: int) -> bool:
        """Whether micro-batch `number` is a plain ReFL one: evenly spaced, and a function of the number alone."""
        return int((number + 1) * self.refl_share) > int(number * self.refl_share)

    def __call__(self, policy: Policy, batch: Batch, reward: Reward) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if self.takes_noise(batch.number):
            return super().__call__(policy, batch, reward)
        if batch.latents is None:
            raise ValueError("ImageReFL trains on real images: give a folder of images with captions, or refl_share = 1")
        sigmas = policy.sigmas(self.steps)
        low, high = self.index_range(sigmas)
        first = batch.draws.integers("image start", self.start_from, self.start_to, shared=not self.per_sample)
        last = batch.draws.integers("gradient step", low, high, shared=not self.per_sample).maximum(first)

        noise = batch.draws.normal("start", policy.latent_shape).to(batch.latents)
        start = policy.add_noise(batch.latents, noise, sigmas[first])
        denoiser = policy.denoiser(batch.prompts, self.guidance)
        if self.diffusion_weight == 0 and bool((last > first).all()):
            with torch.no_grad():
                at_start = denoiser(start, sigmas[first])
        else:
            at_start = denoiser(start, sigmas[first])

        x, denoised = self._from_start(policy, batch, start, at_start, first, last, sigmas)
        loss, logs = self._reward_loss(policy, batch, reward, x, sigmas[last], denoised)
        if self.diffusion_weight > 0:
            here = sigmas[first]
            scale = per_sample(alpha(here, policy.space) / here, start)  # ε̂ − ε = −(x̂0 − x0)·α/σ, in either space
            errors = ((at_start - batch.latents) * scale).square().flatten(1).mean(1)
            loss = loss + self.diffusion_weight * errors.mean()
            logs["diffusion"] = errors.detach()
        return loss, logs

    def _from_start(
        self, policy: Policy, batch: Batch, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State and x0-prediction at the gradient step, reusing the evaluation at the start."""
        onward = (last > first).nonzero()[:, 0]
        if len(onward) == 0:
            return start, at_start
        x = start.detach().clone()
        for i in sorted(set(first[onward].tolist())):
            rows = onward[first[onward] == i]
            x[rows] = self._step(policy, batch, start[rows].detach(), at_start[rows].detach(), i, sigmas, rows)
        x = self._roll(policy, batch, x, first + 1, last, sigmas)
        prompts = [batch.prompts[r] for r in onward.tolist()]
        later = policy.denoiser(prompts, self.guidance)(x[onward], sigmas[last[onward]])
        return x, at_start.index_copy(0, onward.to(at_start.device), later)
