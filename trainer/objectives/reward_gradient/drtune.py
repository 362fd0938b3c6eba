"""DRTune: the reward's gradient along the sampler's linear terms, never through the network's input."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data.batches import Batch
from ...denoiser import Denoise, per_sample
from ...sampling import Space, alpha, last_of
from ..base import Logs, RunContext, Stateless
from ..shared import Sampler, reward_threshold, rollout_noise, sampler_steps, shaped, training_guidance_scale, weight_of_reward
from .draft import recomputation, recomputed


@dataclass(frozen=True)
class DRTune(Stateless):
    """DRTune (Wu et al. 2024, arXiv:2405.00760, algorithm 1): all steps in the graph, but never through the network's input.

    The network is evaluated at a detached state, so its Jacobian drops out: its noise prediction counts as fixed, in every
    space, and the gradient reaches early steps along the sampler's linear terms. K evenly spaced steps with a random offset
    are trained; the chain ends at a random one of the last `early_stop` steps with that step's x0-prediction.
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
    recompute: bool = recomputation()

    def __post_init__(self) -> None:
        if self.k > self.steps:
            raise ValueError(f"K = {self.k} trained steps of a rollout that has {self.steps}")
        if self.early_stop > self.steps:
            raise ValueError(f"early_stop = {self.early_stop} of a rollout that has {self.steps} steps")

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """All steps are trained."""
        return float(sigmas[0])

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        sampler = Sampler(run, batch, self.steps, self.guidance_scale, self.eta)
        last = self.steps - 1 - int(batch.rng.integers("early stop", 0, self.early_stop - 1, shared=True)[0])
        trained = {float(sampler.sigmas[i]) for i in self._trained(batch, last)}
        denoise = self._detached(sampler.denoiser, trained, run.policy.space)
        end = last_of(sampler.trajectory(denoise, sampler.start(), last=last + 1))
        scores = run.scores(end.denoised, batch.prompts)
        return self.reward_weight * shaped(scores, self.threshold).mean(), {"reward": scores.detach()}

    def _trained(self, batch: Batch, last: int) -> set[int]:
        """Indices of the trained steps of a chain that ends with step `last`."""
        gap = self.steps // self.k
        offset = int(batch.rng.integers("trained steps", 0, gap - 1, shared=True)[0])
        trained = {i for i in range(offset, self.steps, gap)[: self.k] if i <= last}
        return trained or {last}  # an early end before the first trained step would leave nothing to learn from

    def _detached(self, denoiser: Denoise, trained: set[float], space: Space) -> Denoise:
        """The denoiser at a detached state, with a graph at the levels `trained` alone."""
        evaluate = recomputed(denoiser, self.recompute)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            if float(sigma[0]) in trained:
                denoised = evaluate(x.detach(), sigma)
            else:
                with torch.no_grad():
                    denoised = denoiser(x.detach(), sigma)
            if not x.requires_grad:
                return denoised
            # for a fixed ε̂, D = (x − σε̂)/α moves with x; the start, where α may be 0, does not move
            return denoised + (x - x.detach()) / per_sample(alpha(sigma, space), x)

        return denoise
