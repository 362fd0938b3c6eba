"""PSO: better and worse images of a few-step model, by the model's own noisy steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...rng import Rng
from ...sampling import Kernel, ddim, trajectory
from ..base import RunContext
from ..shared import sampler_steps, training_guidance_scale
from .kernels import renoised
from .step_pairs import StepPairs

Transition = Literal["ancestral", "renoised"]
_KERNELS: dict[Transition, Kernel] = {"ancestral": ddim(1.0), "renoised": renoised}


@dataclass(frozen=True)
class PSO(StepPairs):
    """Pairwise sample optimisation (Miao et al. 2024, arXiv:2410.03190), online: a few-step model's better images against its worse.

    Each of their noisy steps is a pair, on the model's own noise levels and by its own transition. Official, from code: SDXL-Turbo in 4
    ancestral steps, two images of a prompt, β 50, clip 0.1; DMD2 renoises. There one of several rewards judges each step's pair at random;
    here their sum does. Pairs with given target images, which it trains by denoising errors, are not here.
    """

    trains_distilled: ClassVar[bool] = True
    steps: int = sampler_steps(4)
    guidance_scale: float = training_guidance_scale(1.0, "official: none, as few-step models are drawn")
    group: int = field(default=2, metadata={"min": 2, "max": 1024, "help": "images of a prompt, best and worst are a pair (official 2)"})
    beta: float = field(default=50.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base (official 50)"})
    transition: Transition = field(
        default="ancestral",
        metadata={"help": "a step: ancestral (SDXL-Turbo), or renoised: the x0-prediction with fresh noise (LCM, DMD2)"},
    )

    @property
    def kernel(self) -> Kernel:
        """The model's own."""
        return _KERNELS[self.transition]

    @property
    def kept(self) -> int:
        """Of both images all states but the end."""
        return 2 * self.steps

    def needed(self, step: int) -> Sequence[int]:
        """Before and after, of both."""
        return step, step + 1, self.steps + step, self.steps + step + 1

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """`group` rollouts of each prompt, and of them the best and the worst."""
        policy, n, every = run.policy, self.group, torch.arange(len(prompts), device=run.policy.device)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        states = [policy.start(rng.start_noise(policy.latent_shape), self.steps)]
        noise_at, sigmas = rng.step_noise(policy.latent_shape), policy.sigmas(self.steps)
        with policy.merged():
            denoiser = policy.denoiser(repeated, guidance_scale=self.guidance_scale)
            states += [t.x_next for t in trajectory(denoiser, states[0], sigmas, noise_at, eta=self.kernel, space=policy.space)]
        scores = run.scores(states.pop(), repeated).reshape(-1, n)
        paths = torch.stack(states, 1).unflatten(0, (-1, n))
        both = [paths[every, chosen] for chosen in (scores.argmax(1), scores.argmin(1))]
        best, worst = (value[:, None].expand(-1, self.trained) for value in (scores.amax(1), scores.amin(1)))
        return torch.cat(both, 1), best, worst

    def log_ratios(self, run: RunContext, prompts: Sequence[str], states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Each from its own state."""
        before, after = (torch.cat([states[:, i], states[:, i + 2]]) for i in (0, 1))
        (both,) = self.ratios(run, [*prompts, *prompts], before, [after], index.repeat(2))
        better, worse = both.chunk(2)
        return better, worse
