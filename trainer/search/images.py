"""Searches for the images of a prompt: a policy, a mix of its denoisers and a reward, as the particle loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..denoiser import Denoise
from ..density import density_guided
from ..generate import Generation, batch_size_for, slot_denoiser
from ..guidance import Mix, Slot, weighted_sum
from ..policy import Policy
from ..reward import Reward
from ..rng import seed_of
from ..sampling import start_at
from .loop import Found, Model, Progress, ancestral, particle_noise, search_images
from .plan import Round
from .settings import Search


@dataclass(frozen=True)
class Searcher:
    """Searches under one prompt at a time, `images` of each returned. Particles are evaluated and decoded `chunk` at a time."""

    policy: Policy
    mix: Mix
    sigmas: Tensor
    settings: Generation
    search: Search
    rounds: list[Round]
    reward: Reward
    images: int = 1
    models: Mapping[str, Policy] = field(default_factory=dict[str, Policy])
    lookahead: Slot | None = None
    source: Tensor | None = None
    """Latents (1,C,h,w) of an image that is noised to the first noise level; None: a search from noise."""
    before: int = 0
    """Steps of the whole schedule before sigmas[0], where the search starts from an image."""

    @property
    def chunk(self) -> int:
        """Particles at a time."""
        return batch_size_for(self.policy, self.settings)

    @torch.no_grad()
    def __call__(self, prompt: str, first: int = 0, report: Callable[[Progress], object] = lambda progress: None) -> Found:
        """The candidates of image `first` and those after it, best first."""
        shape, device = self.policy.latent_shape, self.policy.device
        noise = particle_noise(self.settings.seed, self.images, shape, first)
        drawn = self.settings.start_noise(noise(-1, range(self.rounds[0].rows)).to(device))
        if self.source is None:
            start = start_at(drawn, self.sigmas[0], self.policy.space)
        else:
            start = self.policy.add_noise(self.source.to(drawn).expand_as(drawn), drawn, self.sigmas[0].expand(len(drawn)))
        made: dict[tuple[Slot, int], Denoise] = {}

        unguided: list[Tensor] = []  # the last predictions without density guidance, which moves them for the sampler's step alone

        def model_of(mix: Mix) -> Model:
            def model(i: int, x: Tensor) -> Tensor:
                unguided[:] = [self._in_chunks(lambda part: self._denoised(mix, prompt, i, part, made), x)]
                return density_guided(x, unguided[0].to(x), self.sigmas[i].expand(len(x)), self.settings.density, self.policy.space)

            return model

        def advance_noise(i: int, particles: Sequence[int]) -> Tensor:
            return noise(i + self.before, particles)

        other = None if self.lookahead is None else model_of(Mix((self.lookahead,), lambda i, sigma: (1.0,)))
        return search_images(
            self.search,
            self.rounds,
            self.sigmas,
            start,
            model_of(self.mix),
            ancestral(self.sigmas, advance_noise, self.settings.method, self.policy.space),
            lambda latents: self._in_chunks(lambda part: self._scored(part, prompt), latents),
            seed_of(self.settings.seed, first),
            self.policy.space,
            other,
            report,
            lambda denoised: unguided[0],
        )

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images (n,3,H,W) in [0,1] on the CPU."""
        return self._in_chunks(lambda part: self.policy.decode(part).cpu(), latents)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part) for part in x.split(self.chunk)])

    def _scored(self, latents: Tensor, prompt: str) -> Tensor:
        return self.reward(self.policy.decode(latents), [prompt] * len(latents))

    def _denoised(self, mix: Mix, prompt: str, i: int, x: Tensor, made: dict[tuple[Slot, int], Denoise]) -> Tensor:
        """The mix at step i; the denoisers of each number of particles are made once."""
        policies = {"": self.policy, **self.models}
        parts = mix.at(i + self.before, float(self.sigmas[i]))
        for slot, _ in parts:
            if (slot, len(x)) not in made:
                made[slot, len(x)] = slot_denoiser(policies, slot, [prompt] * len(x))
        return weighted_sum([(made[slot, len(x)], value) for slot, value in parts])(x, self.sigmas[i].expand(len(x)))
