"""Noise optimisation under a prompt: a policy, a mix of its denoisers and rewards, as the loops take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..denoiser import Denoise
from ..generate import Generation, batch_size_for, branches, slot_denoiser
from ..guidance import Mix, Slot
from ..policy import Policy
from ..reward import Reward
from ..rewards.base import RewardModel
from ..rewards.weighted import WeightedSum
from ..rng import Rng
from ..sampling import start_at
from .optimise import Cost, Optimised, cost, optimise
from .settings import METHODS, NoiseOptimisation


@dataclass(frozen=True)
class NoiseOptimiser:
    """Optimises the start noise of one image at a time; the image of the first iteration is the one that plain sampling draws.

    For a gradient the policy's `gradient_checkpointing` is to be on: every step's activations are kept otherwise.
    """

    policy: Policy
    mix: Mix
    sigmas: Tensor
    settings: Generation
    optimisation: NoiseOptimisation
    rewards: Sequence[tuple[float, Reward]]
    """Weights and rewards, see `terms`."""
    models: Mapping[str, Policy] = field(default_factory=dict[str, Policy])

    def __post_init__(self) -> None:
        name = self.optimisation.name
        if METHODS[name].gradient and not all(reward.differentiable for _, reward in self.rewards):
            raise ValueError(f"{name} needs rewards with a gradient, and one has none: give another, or use rotate")

    @property
    def cost(self) -> Cost:
        """What each image takes."""
        return cost(self.optimisation, self.mix.calls(self.sigmas.tolist()))

    def __call__(self, prompt: str, number: int = 0, report: Callable[[Optimised], object] = lambda found: None) -> Optimised:
        """The best noise and image of image `number`."""
        seed, shape = self.settings.seed, self.policy.latent_shape
        starts = [Rng(seed, start, (number,)).start_noise(shape) for start in range(self.optimisation.starts)]
        noise = self.settings.start_noise(torch.cat(starts).to(self.policy.device))
        rng = Rng(seed, 0, (number,))
        weights, rewards = zip(*self.rewards)

        def scores(images: Tensor) -> Tensor:
            return torch.stack([reward(images, [prompt] * len(images)) for reward in rewards])

        def draw(z: Tensor) -> Tensor:
            return torch.cat([self.policy.decode(latents) for latents in self._parts(z, prompt, rng)])

        return optimise(self.optimisation, noise, draw, scores, weights, rng, report)

    @torch.no_grad()
    def latents(self, noise: Tensor, prompt: str, number: int = 0) -> Tensor:
        """What image `number` is from the noise (1,C,h,w) that was found: latents (1,C,h,w)."""
        return torch.cat(list(self._parts(noise.to(self.policy.device), prompt, Rng(self.settings.seed, 0, (number,)))))

    def _parts(self, noise: Tensor, prompt: str, rng: Rng) -> Iterator[Tensor]:
        """The latents of noise (B,C,h,w), some at a time; the noise of later steps is the same for all."""
        policies, own = {"": self.policy, **self.models}, rng.step_noise(self.policy.latent_shape)
        for part in noise.split(batch_size_for(self.policy, self.settings)):
            made: dict[Slot, Denoise] = {}

            def denoiser_of(slot: Slot, made: dict[Slot, Denoise] = made, n: int = len(part)) -> Denoise:
                if slot not in made:
                    made[slot] = slot_denoiser(policies, slot, [prompt] * n)
                return made[slot]

            def noise_at(i: int, n: int = len(part)) -> Tensor:
                return own(i).expand(n, -1, -1, -1)

            start, one = start_at(part, self.sigmas[0], self.policy.space), self.settings
            how = (one.method, self.policy.space, one.tuned_method, None, one.density)
            ends = branches({"": self.mix}, denoiser_of, start, self.sigmas, noise_at, *how)
            yield from (latents for _, latents in ends)


def terms(reward: RewardModel) -> list[tuple[float, Reward]]:
    """The weights and rewards of a sum, or the one reward."""
    if isinstance(reward, WeightedSum):
        return [(weight, part) for weight, part in zip(reward.weights, reward.rewards) if isinstance(part, RewardModel)]
    return [(1.0, reward)]
