"""Generation from policies: prompts to images, by the base model, a tuned one, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .policy import Policy
from .rng import Rng
from .sampling import Method, State, prefixes, rollout


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


@torch.no_grad()
def generate(
    base: Policy,
    tuned: Mapping[str, Policy],
    prompts: Sequence[str],
    switches: Sequence[int],
    settings: Generation,
    progress: Callable[[int], object] = lambda images: None,
    first: int = 0,
) -> dict[tuple[str, int], Tensor]:
    """Images (N,3,H,W) by (name, k) for N prompts, every tuned policy and every switch k.

    Image i depends on (seed, i, prompt, models, k) alone; `first` is the number of the first, so that a long list can be drawn
    in parts. The base prefix is computed once for all policies and k. `progress` is told how many images are new.
    """
    finished: dict[tuple[str, int], list[Tensor]] = {(name, k): [] for name in tuned for k in switches}
    for numbers in _chunks(first, len(prompts), together(base, settings)):
        part = [prompts[i - first] for i in numbers]
        start, noise_at = _start(base, numbers, settings)
        sigmas = base.sigmas(settings.steps)
        states = prefixes(
            start,
            base.denoiser(part, adapter="base", guidance_scale=settings.guidance_scale),
            sigmas,
            switches,
            noise_at,
            settings.method,
            base.space,
        )
        for name, policy in tuned.items():
            denoiser = policy.denoiser(part, guidance_scale=settings.tuned_guidance_scale)
            for k, state in states.items():
                end = rollout(state, settings.steps, denoiser, sigmas, noise_at, settings.method, base.space)
                finished[name, k].append(policy.decode(end.x).cpu())
                progress(len(part))
    return {key: torch.cat(images) for key, images in finished.items()}


@torch.no_grad()
def generate_base(
    base: Policy,
    prompts: Sequence[str],
    settings: Generation,
    progress: Callable[[int], object] = lambda images: None,
    first: int = 0,
) -> Tensor:
    """Images (N,3,H,W) of the base model at `settings.guidance`: what `generate` gives at k = T."""
    images: list[Tensor] = []
    for numbers in _chunks(first, len(prompts), together(base, settings)):
        part = [prompts[i - first] for i in numbers]
        start, noise_at = _start(base, numbers, settings)
        denoiser = base.denoiser(part, adapter="base", guidance_scale=settings.guidance_scale)
        end = rollout(start, settings.steps, denoiser, base.sigmas(settings.steps), noise_at, settings.method, base.space)
        images.append(base.decode(end.x).cpu())
        progress(len(part))
    return torch.cat(images)


def together(policy: Policy, settings: Generation) -> int:
    """Images that are drawn at a time: `chunk`, but no more than sixteen of 512² pixels or four of 1024²."""
    _, height, width = policy.latent_shape
    return max(1, min(settings.chunk, 2**16 // (height * width)))


def _chunks(first: int, n: int, size: int) -> Iterator[range]:
    for start in range(first, first + n, size):
        yield range(start, min(start + size, first + n))


def _start(policy: Policy, numbers: Sequence[int], settings: Generation) -> tuple[State, Callable[[int], Tensor]]:
    rng = Rng(settings.seed, 0, tuple(numbers))
    start = State(policy.start(rng.normal("start", policy.latent_shape), settings.steps))
    return start, lambda i: rng.normal(f"step {i}", policy.latent_shape)
