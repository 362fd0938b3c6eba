"""Generation: prompts to images, by mixes of a base model and tuned ones that share their common steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import plain
from .denoiser import Denoise, Denoiser
from .density import rescaled_noise, with_density
from .guidance import Mix, Parts, Slot, weighted_sum
from .policy import Policy
from .rng import Rng
from .sampling import Method, NoiseAt, Space, last_of, start_at, trajectory

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
    tuned_steps: int = field(default=0, metadata={"min": 0, "max": 1000, "help": "steps of the tuned model's own schedule; 0: as steps"})
    tuned_method: Method | None = field(default=None, metadata={"help": "sampler of the tuned part; none: as method"})
    density: float = field(
        default=0.5,
        metadata={
            "min": 0.001,
            "max": 0.999,
            "help": "density guidance q: below 0.5 more detail, above it smoother; authors 0.3 to 0.7; approximate with ddpm",
        },
    )
    noise_quantile: float = field(
        default=0.0,
        metadata={
            "min": 0.0,
            "max": 0.9999,
            "help": "length of the start noise as a quantile of its distribution, 0.5 the median; 0: as drawn",
        },
    )
    noise_scale: float = field(
        default=1.0, metadata={"min": 0.5, "max": 2.0, "help": "factor of the start noise: 0.97 smoother, 1.03 more detail"}
    )
    chunk: int = field(default=64, metadata={"min": 1, "help": "images at a time, fewer where they are large; changes no image"})

    @property
    def facts(self) -> dict[str, Any]:
        """The settings as plain values; those that earlier versions had not only where they are set, as those wrote them."""
        new = {"tuned_steps": 0, "tuned_method": None, "density": 0.5, "noise_quantile": 0.0, "noise_scale": 1.0}
        return {key: value for key, value in plain(self).items() if key not in new or value != new[key]}

    def start_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise (B,C,h,w) with the length that is set."""
        return rescaled_noise(noise, self.noise_quantile, self.noise_scale)

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
    grids: Mapping[K, Tensor] | None = None,
) -> dict[K, Tensor]:
    """Images (N,3,H,W) of N prompts by the keys of `mixes`; `grids` are noise levels (T+1,) of mixes that have their own.

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

        def made_once(slot: Slot, part: Sequence[str] = part, made: dict[Slot, Denoise] = denoisers) -> Denoise:
            if slot not in made:
                made[slot] = slot_denoiser(policies, slot, part)
            return made[slot]

        noise = settings.start_noise(rng.start_noise(policy.latent_shape).to(policy.device))
        noise_at = rng.step_noise(policy.latent_shape)
        for level, members in by_start(mixes, sigmas, grids or {}).items():
            start = policy.start(noise, settings.steps) if level == float(sigmas[0]) else start_at(noise, torch.tensor(level), policy.space)
            for key, latents in branches(
                members, made_once, start, sigmas, noise_at, settings.method, policy.space, settings.tuned_method, grids, settings.density
            ):
                finished[key].append(policy.decode(latents).cpu())
                progress(len(part))
    return {key: torch.cat(images) for key, images in finished.items()}


def slot_denoiser(policies: Mapping[str, Policy], slot: Slot, prompts: Sequence[str]) -> Denoiser:
    """The denoiser of a slot for images of `prompts`; policies: the models, by the names in slots."""
    given = [slot.prompt.replace("{prompt}", prompt) for prompt in prompts]
    return policies[slot.model].denoiser(
        given, adapter=slot.adapter, guidance_scale=slot.guidance_scale, negative=slot.negative, prompt_weight=slot.prompt_weight
    )


def by_start(mixes: Mapping[K, Mix], sigmas: Tensor, grids: Mapping[K, Tensor]) -> dict[float, dict[K, Mix]]:
    """The mixes that begin at one noise level, by that level; `sigmas` are those of mixes without a grid of their own."""
    found: dict[float, dict[K, Mix]] = {}
    for key, mix in mixes.items():
        found.setdefault(float(grids.get(key, sigmas)[0]), {})[key] = mix
    return found


def branches(
    mixes: Mapping[K, Mix],
    denoiser_of: Callable[[Slot], Denoise],
    x: Tensor,
    sigmas: Tensor,
    noise_at: NoiseAt,
    method: Method = "ddpm",
    space: Space = "ve",
    tuned_method: Method | None = None,
    grids: Mapping[K, Tensor] | None = None,
    density: float = 0.5,
) -> Iterator[tuple[K, Tensor]]:
    """The final latents of every mix from one start x (B,C,h,w); a trajectory forks where mixes begin to differ.

    `tuned_method` is the sampler from a mix's handover on. A multistep sampler keeps its history where it stays the same. `grids`
    are noise levels of mixes that have their own, all with the first level of x. `density` is the q of density guidance, 0.5 for none.
    """
    own = {key: (grids or {}).get(key, sigmas) for key in mixes}
    levels = {key: list[float](grid.tolist()) for key, grid in own.items()}
    waiting: list[tuple[dict[K, Mix], int, Tensor, tuple[Method, Tensor] | None]] = [(dict(mixes), 0, x, None)]

    def at(key: K, mix: Mix, i: int) -> tuple[Parts, Method, float] | None:
        """What step i does to a state at its level; None after the last."""
        if i == len(levels[key]) - 1:
            return None
        after = tuned_method is not None and mix.handover is not None and i >= mix.handover
        return mix.at(i, levels[key][i]), tuned_method if after and tuned_method else method, levels[key][i + 1]

    while waiting:
        group, i, x, previous = waiting.pop()
        alike: dict[tuple[Parts, Method, float], dict[K, Mix]] = {}
        for key, mix in group.items():
            step = at(key, mix, i)
            if step is None:
                yield key, x
            else:
                alike.setdefault(step, {})[key] = mix
        for (parts, sampler, _), members in alike.items():
            stop, steps = i + 1, {at(key, mix, i + 1) for key, mix in members.items()}
            while len(steps) == 1 and (one := next(iter(steps))) is not None and one[:2] == (parts, sampler):
                stop, steps = stop + 1, {at(key, mix, stop + 1) for key, mix in members.items()}
            denoise = with_density(weighted_sum([(denoiser_of(slot), value) for slot, value in parts]), density, space)
            history = previous[1] if previous is not None and previous[0] == sampler else None
            grid = own[next(iter(members))]
            end = last_of(trajectory(denoise, x, grid, noise_at, sampler, i, stop, space=space, previous=history))
            waiting.append((members, stop, end.x_next, (sampler, end.denoised)))


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
