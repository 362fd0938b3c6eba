"""DRO: good images against what the model draws itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ...denoiser import per_sample
from ...policy import Policy
from ...sampling import start_at, step
from ..base import Logs, RunContext
from ..shared import GRID, error_scale
from .errors import DenoisingObjective, mean_square


@torch.no_grad()
def own_states(policy: Policy, prompts: list[str], noise: Tensor, sigma: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """States (B,C,h,w) at levels sigma (B,) of DDIM rollouts of the tuned model without guidance, and its x0-predictions there.

    noise (B,C,h,w) starts them. Each takes those of `steps` sampler steps that lie above its level, and ends on it.
    """
    levels = torch.cat([policy.sigmas(GRID)[:1], policy.sigmas(steps)])
    with policy.merged():
        denoiser, x = policy.denoiser(prompts), start_at(noise.to(policy.device), levels[0], policy.space)
        for high, low in pairwise(levels):
            here, there = high.to(sigma).expand_as(sigma).maximum(sigma), low.to(sigma).expand_as(sigma).maximum(sigma)
            rows = (here > there).nonzero()[:, 0]
            if len(rows) > 0:
                part, here, there = x[rows], here[rows], there[rows]
                moved = step(part, denoiser.rows(rows)(part, here), here, there, eta=0.0, space=policy.space)
                x = x.to(moved).index_copy(0, rows.to(x.device), moved)
        return x, denoiser(x, sigma)


@dataclass(frozen=True)
class DRO(DenoisingObjective):
    """Diffusion-DRO (Wu et al. 2025, arXiv:2510.18353): learn from good images until the model has left the base by as much.

    Loss max(0, (L − L_base of the image) − (L − L_base of an own state) + margin), both at one noise level. The target at an own state is
    the prediction of the model that drew it, so that there L is 0 without a gradient and L_base is the squared distance of the two models.
    Official, from code: the margin, 20 steps, 20 % empty prompts, 500 images of the highest rewards, learning rate 1e-4 for all weights
    of SD1.5, 64 images a step; its sampler is DPM-Solver++(2M), here DDIM, and its buffer holds the last states alone, here none.
    """

    margin: float = field(default=0.001, metadata={"min": 0.0, "help": "by how much the images' gain must exceed the distance to the base"})
    rollout_steps: int = field(default=20, metadata={"min": 1, "max": 1000, "help": "sampler steps of the model's own states"})

    @property
    def data(self) -> type[Prompts]:
        """Images."""
        return Images

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Images):
            raise ValueError("good images are learnt from: give `images`")
        policy, noised, prompts = run.policy, self.noised(run, batch), self.kept(batch, batch.prompts)
        tuned = mean_square(noised.errors([batch.latents], [prompts])[0])
        base = mean_square(noised.errors([batch.latents], [prompts], "base")[0])
        x, own = own_states(policy, prompts, batch.rng.start_noise(batch.shape(policy)), noised.sigma, self.rollout_steps)
        with torch.no_grad():
            scale = per_sample(error_scale(self.target, noised.sigma, policy.space), x)
            distance = mean_square((policy.denoiser(prompts, adapter="base")(x, noised.sigma) - own) * scale)
        gap = (tuned - base) + distance
        logs = {"gap": gap, "error": tuned, "distance": distance, "active": (gap + self.margin > 0).float()}
        return ((gap + self.margin).relu() + self.sft_weight * tuned).mean(), {name: value.detach() for name, value in logs.items()}
