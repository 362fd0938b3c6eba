"""SPO: at each step the best and the worst of several next states, by what the reward makes of their x0-predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...denoiser import per_sample
from ...rng import Rng
from ...sampling import Kernel, Space, ddim, end_of, gaussian, trajectory
from ..base import RunContext
from .step_pairs import StepPairs


@dataclass(frozen=True)
class SPO(StepPairs):
    """Step-aware preference optimisation (Liang et al. 2024, arXiv:2406.04314): pairs of next states of one state; a random one goes on.

    Official, from code, for SD1.5: 20 DDIM steps of η = 1, guidance 5 in training too, 4 next states from step 4 on, gap 0.3, β 10, clip
    0.1. There a PickScore that is given the timestep judges decoded x0-predictions; here the run's reward does, which is not. LPO (Zhang
    et al. 2025, arXiv:2502.01051) by beta = 500, first_step = 0, gap = 0.35, gap_noisiest = 0.5, without its reward on latents.
    """

    group: int = field(default=4, metadata={"min": 2, "max": 1024, "help": "next states of a state (official 4; SDXL 2)"})
    first_step: int = field(default=4, metadata={"min": 0, "max": 998, "help": "first step that is trained (official 4 of 20; LPO 0)"})
    eta: float = field(default=1.0, metadata={"min": 1e-3, "max": 1.0, "help": "noise of a step: 1 ancestral (official 1)"})
    gap: float = field(
        default=0.3,
        metadata={"min": 0.0, "max": 1.0, "help": "pairs are trained whose softmax of the two scores differs by more (0.3; SDXL 0.4)"},
    )
    gap_noisiest: float | None = field(
        default=None, metadata={"min": 0.0, "max": 1.0, "help": "at the noisiest step, gap at the least noisy (LPO 0.5, 0.35); none: gap"}
    )

    @property
    def kernel(self) -> Kernel:
        """DDIM's."""
        return ddim(self.eta)

    @property
    def first(self) -> int:
        """Where states branch."""
        return self.first_step

    @property
    def kept(self) -> int:
        """Of each trained step the state, the best next one and the worst."""
        return 3 * self.trained

    def needed(self, step: int) -> range:
        """Those three."""
        return range(3 * step, 3 * step + 3)

    def gaps(self, sigmas: Tensor, space: Space) -> Tensor:
        """Between the two gaps by the standard deviation of the step, in variance-preserving units."""
        if self.gap_noisiest is None:
            return torch.full((self.trained,), self.gap)
        after = sigmas[1:-1]
        width = self.kernel(sigmas[:-2], after, space)[0]
        width = width if space == "flow" else width * (1 + after.square()).rsqrt()
        share = (width - width.min()) / (width.max() - width.min()).clamp(min=1e-12)
        return (self.gap + share * (self.gap_noisiest - self.gap))[self.first : self.first + self.trained]

    def draw(self, run: RunContext, prompts: Sequence[str], rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """One rollout for each prompt, which branches at each trained step."""
        return branched(self, run, prompts, rng)

    def log_ratios(self, run: RunContext, prompts: Sequence[str], states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Both from the model's one prediction at the common state."""
        x, *ends = states.unbind(1)
        better, worse = self.ratios(run, prompts, x, ends, index)
        return better, worse


def branched(spo: SPO, run: RunContext, prompts: Sequence[str], rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """States (B,3W,C,h,w) of rollouts that branch into `group` at each trained step, and scores (B,W) of the best and the worst.

    rng: of B·group samples; the first of a group draws for all of it what is common. A next state is scored by the model's x0-prediction
    from it, which serves the next step of the one that goes on.
    """
    policy, sigmas, n, size = run.policy, run.policy.sigmas(spo.steps), spo.group, len(prompts)
    noise_at, every = rng.step_noise(policy.latent_shape), torch.arange(size, device=policy.device)
    common = replace(rng, indices=rng.indices[::n])
    repeated = [prompt for prompt in prompts for _ in range(n)]
    kept, best, worst = list[Tensor](), list[Tensor](), list[Tensor]()
    with policy.merged():
        one, many = (policy.denoiser(texts, guidance_scale=spo.guidance_scale) for texts in (prompts, repeated))
        x = policy.start(common.start_noise(policy.latent_shape), spo.steps)
        single = trajectory(one, x, sigmas, common.step_noise(policy.latent_shape), last=spo.first, eta=spo.kernel, space=policy.space)
        x = end_of(x, single)
        denoised = one(x, sigmas[spo.first].expand(size))
        for i in range(spo.first, spo.first + spo.trained):
            mean, std = gaussian(x, denoised, sigmas[i].expand(size), sigmas[i + 1].expand(size), spo.kernel, policy.space)
            after = mean[:, None] + per_sample(std, mean)[:, None] * noise_at(i).to(mean).unflatten(0, (size, n))
            predicted = many(after.flatten(0, 1), sigmas[i + 1].expand(size * n))
            scores = run.scores(predicted, repeated).reshape(size, n)
            kept += [x, *(after[every, chosen] for chosen in (scores.argmax(1), scores.argmin(1)))]
            best.append(scores.amax(1))
            worst.append(scores.amin(1))
            going = common.integers(f"branch {i}", 0, n - 1).to(policy.device)
            x, denoised = after[every, going], predicted.unflatten(0, (size, n))[every, going]
    return torch.stack(kept, 1), torch.stack(best, 1), torch.stack(worst, 1)
