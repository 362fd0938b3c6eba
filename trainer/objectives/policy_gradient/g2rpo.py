"""G²RPO: the noise of one step, judged by images finished in more and in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...rng import Rng, generator
from ...sampling import end_of, last_of, trajectory
from ..base import RunContext
from ..shared import Known, sampler_steps, training_guidance_scale
from .flow_grpo import FlowSteps, shared_start
from .steps import log_prob


def grids(sigmas: Tensor, first: int, granularities: int) -> Iterator[Tensor]:
    """Noise levels after step `first` of levels (T+1,), by granularity g: the next two and then every gth, of which the last is 0."""
    for g in range(1, granularities + 1):
        between = [*range(first + 2, len(sigmas), g)][:-1]
        yield sigmas[[first + 1, *between, -1]]


@dataclass(frozen=True)
class G2RPO(FlowSteps):
    """Granular GRPO (Zhou et al. 2025, arXiv:2510.01982): a group's images part at one noisy step, so that their scores judge its noise.

    An anchor without noise leads to the state that a group branches from. Each branch is finished without noise in all remaining steps,
    in every second of them, and so on; a branch's advantage is the sum of its images' in their groups. Official, from code, for FLUX.1:
    16 steps, branches at each of the first 8 in one optimizer step, groups of 12, noise 0.7, granularities 1 and 2, clip 1e-4. Here a
    round branches at one step; rounds take all of them in a random order.
    """

    title: ClassVar[str] = "G²RPO"
    steps: int = sampler_steps(16)
    guidance_scale: float = training_guidance_scale(1.0, "official: FLUX.1's own guidance alone")
    group: int = field(default=12, metadata={"min": 1, "max": 1024, "help": "branches of a prompt, which are compared (official 12)"})
    branch_steps: int = field(
        default=8, metadata={"min": 1, "max": 999, "help": "first sampler steps, at one of which a round branches (official 8 of 16)"}
    )
    granularities: int = field(
        default=2, metadata={"min": 1, "max": 8, "help": "n: branches are finished in all steps, every 2nd, … every nth (official 2)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch_steps > self.steps - 1:
            raise ValueError(f"branch_steps = {self.branch_steps}: of {self.steps} steps {self.steps - 1} have noise")
        if self.granularities > 1 and self.baseline == "history":
            raise ValueError("granularities: baseline = history remembers one score of an image; choose group, group-mean or round")

    @property
    def noisy(self) -> int:
        """Those that may branch."""
        return self.branch_steps

    @property
    def trained(self) -> int:
        """The step at which the branches part."""
        return 1

    @property
    def kept(self) -> int:
        """The states before and after it."""
        return 2

    def trained_steps(self, seed: int, number: int) -> Tensor:
        """One index for all (N,1): each of the first steps once in `branch_steps` rounds."""
        order = torch.randperm(self.branch_steps, generator=generator(seed, "branch", number // self.branch_steps))
        return order[number % self.branch_steps].expand(self.images, 1)

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng, index: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Branches, each with an end of every granularity; what a group shares is computed once in a micro-batch."""
        policy, sigmas, noise_at = run.policy, run.policy.sigmas(self.steps), rng.step_noise(run.policy.latent_shape)
        denoiser = policy.denoiser(prompts, guidance_scale=self.guidance_scale)
        groups = torch.tensor(rng.indices) // self.group
        _, place, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
        roots = counts.cumsum(0) - counts
        anchor = denoiser.rows(roots)
        x = policy.start(shared_start(rng, policy, self.group)[roots], self.steps)
        x = end_of(x, trajectory(anchor, x, sigmas, noise_at, last=first, eta=0.0, space=policy.space))
        x, denoised = (shared[place.to(shared.device)] for shared in (x, anchor(x, sigmas[first].expand(len(x)))))
        branch = last_of(trajectory(Known(denoised), x, sigmas[: first + 2], noise_at, first=first, eta=self.kernel, space=policy.space))
        x = branch.x_next
        levels = grids(sigmas, first, self.granularities)
        ends = [end_of(x, trajectory(denoiser, x, grid, noise_at, eta=0.0, space=policy.space)) for grid in levels]
        return torch.stack([branch.x, x], 1), torch.cat(ends), log_prob(x, branch.mean, branch.std)[:, None]
