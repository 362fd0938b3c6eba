"""Generation: prompts to images, by mixes of a base model and tuned ones that share their common steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .denoiser import Denoise
from .guidance import Mix, Parts, Slot, weighted_sum
from .policy import Policy
from .rng import Rng
from .sampling import Method, NoiseAt, Space, last_of, trajectory

K = TypeVar("K")


@dataclass(frozen=True)
class Generation:
    """How images are drawn."""

    steps: int = field(default=40, metadata={"min": 1, "max": 1000, "help": "sampler steps T"})
    method: Method = field(default="ddpm", metadata={"help": "ddpm (ancestral, official), ddim or dpmpp_2m"})
    guidance_scale: float = field(
        default=7.5, metadata={"min": 0.0, "max": 30.0, "help": "classifier-free guidance of the base model (official 7.5)"}
    )
    tuned_guidance_scale: float = field(
        default=1.0, metadata={"min": 0.0, "max": 30.0, "help": "guidance of the tuned model; 1 is none, as it was trained"}
    )
    seed: int = field(default=0, metadata={"min": 0, "help": "seed of start noise and step noise"})
    chunk: int = field(default=64, metadata={"min": 1, "help": "images at a time, fewer where they are large; changes no image"})

    @property
    def base(self) -> Slot:
        """The base model with its guidance."""
        return Slot("base", self.guidance_scale)

    def tuned(self, adapter: str = "tuned", model: str = "") -> Slot:
        """A tuned model with its guidance."""
        return Slot(adapter, self.tuned_guidance_scale, model)


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[str],
    settings: Generation,
    mixes: Mapping[K, Mix],
    models: Mapping[str, Policy] | None = None,
    progress: Callable[[int], object] = lambda images: None,
    first: int = 0,
) -> dict[K, Tensor]:
    """Images (N,3,H,W) of N prompts by the keys of `mixes`.

    `policy` gives noise levels and decodes; `models` are other policies of its family, by the names in slots. Steps at which
    mixes evaluate the same are computed once for all of them. Image i depends on (seed, i, prompt, mix) alone; `first` is the
    number of the first, so that a long list can be drawn in parts. `progress` is called with the number of new images.
    """
    policies = {"": policy, **(models or {})}
    sigmas = policy.sigmas(settings.steps)
    finished: dict[K, list[Tensor]] = {key: [] for key in mixes}
    for numbers in batches(len(prompts), policy, settings, first):
        part = [prompts[i - first] for i in numbers]
        rng = Rng(settings.seed, 0, tuple(numbers))
        denoisers: dict[Slot, Denoise] = {}

        def denoiser_of(slot: Slot, part: Sequence[str] = part, made: dict[Slot, Denoise] = denoisers) -> Denoise:
            if slot not in made:
                made[slot] = policies[slot.model].denoiser(part, adapter=slot.adapter, guidance_scale=slot.guidance_scale)
            return made[slot]

        start = policy.start(rng.start_noise(policy.latent_shape), settings.steps)
        noise_at = rng.step_noise(policy.latent_shape)
        for key, latents in branches(mixes, denoiser_of, start, sigmas, noise_at, settings.method, policy.space):
            finished[key].append(policy.decode(latents).cpu())
            progress(len(part))
    return {key: torch.cat(images) for key, images in finished.items()}


def branches(
    mixes: Mapping[K, Mix],
    denoiser_of: Callable[[Slot], Denoise],
    x: Tensor,
    sigmas: Tensor,
    noise_at: NoiseAt,
    method: Method = "ddpm",
    space: Space = "ve",
) -> Iterator[tuple[K, Tensor]]:
    """The final latents of every mix from one start x (B,C,h,w); a trajectory forks where mixes begin to differ."""
    steps, levels = len(sigmas) - 1, list[float](sigmas.tolist())
    waiting: list[tuple[dict[K, Mix], int, Tensor, Tensor | None]] = [(dict(mixes), 0, x, None)]
    while waiting:
        group, i, x, previous = waiting.pop()
        if i == steps:
            yield from ((key, x) for key in group)
            continue
        alike: dict[Parts, dict[K, Mix]] = {}
        for key, mix in group.items():
            alike.setdefault(mix.at(i, levels[i]), {})[key] = mix
        for parts, members in alike.items():
            stop = next((j for j in range(i + 1, steps) if any(mix.at(j, levels[j]) != parts for mix in members.values())), steps)
            denoise = weighted_sum([(denoiser_of(slot), value) for slot, value in parts])
            end = last_of(trajectory(denoise, x, sigmas, noise_at, method, i, stop, space=space, previous=previous))
            waiting.append((members, stop, end.x_next, end.denoised))


def batch_size_for(policy: Policy, settings: Generation) -> int:
    """Images that are drawn at a time: `chunk`, but no more than sixteen of 512² pixels or four of 1024²."""
    _, rows, columns = policy.latent_shape
    height, width = getattr(policy, "image_size", (8 * rows, 8 * columns))
    return max(1, min(settings.chunk, 2**22 // (height * width)))


def batches(n: int, policy: Policy, settings: Generation, first: int = 0) -> Iterator[range]:
    """The numbers of the images that are drawn together, of `n` images from `first` on."""
    size = batch_size_for(policy, settings)
    for start in range(first, first + n, size):
        yield range(start, min(start + size, first + n))
