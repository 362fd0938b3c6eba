"""What is aligned, as objectives see it: a denoiser with an adapter that can be switched off, and an image decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .rng import generator
from .sampling import Space

LoraLayout = Literal["kohya", "diffusers", "native"]
"""Layouts of LoRA files that a policy may be saved in, see lora/names.py."""

AdapterState = Literal["base", "consistency"]
"""What the network can be besides the tuned model: the base, or the base with the frozen consistency adapter."""


class Policy(Protocol):
    """A diffusion model under training. Latents are in the sampler's space and scaled to about unit variance."""

    @property
    def space(self) -> Space:
        """Which signal coefficient goes with a noise level."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,h,w) of one sample."""
        ...

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0) -> Denoiser:
        """The model with one adapter: `tuned` is the trained one, `base` is none and carries no gradient.

        A guidance scale of 1 evaluates no unconditional branch.
        """
        ...

    def adapter(self, state: AdapterState) -> AbstractContextManager[None]:
        """Inside, `denoiser` evaluates another state of the network; gradients reach its input, never the adapter.

        A graph built inside must be differentiated inside: a recomputed forward runs in whatever state is on by then.
        """
        ...

    @property
    def states(self) -> frozenset[AdapterState]:
        """The states that `adapter` knows."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Around evaluations without gradient: where the policy can, they cost what the base model's do.

        Nothing but rounding changes, and nothing at all afterwards. The adapter's values must stay as they are inside.
        """
        ...

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps+1,), the last one 0."""
        ...

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """The first state of a rollout of `steps` steps from standard normal noise (B,C,h,w)."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise for sigma (B,)."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,H,W) in [0,1] -> mean and standard deviation (B,C,h,w) of their scaled latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W) in [0,1], differentiable."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the optimizer moves: the adapter alone."""
        ...


@dataclass(frozen=True)
class Lora:
    """The adapter that is trained (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = field(default=8, metadata={"min": 1, "max": 1024, "help": "rank of the update"})
    alpha: float = field(default=8.0, metadata={"min": 1e-3, "max": 4096.0, "help": "the update is scaled by alpha/rank"})
    targets: tuple[str, ...] = field(
        default=("to_q", "to_k", "to_v", "to_out.0"), metadata={"help": "module names that get an adapter (official: attention)"}
    )


class Trainable(Policy, Protocol):
    """A policy with a LoRA adapter that a run can attach, save and resume."""

    @property
    def lora(self) -> Lora | None:
        """The adapter attached, if any."""
        ...

    def add_lora(self, lora: Lora, seed: int = 0) -> None:
        """Attach an adapter that starts as the identity; its random half depends on `seed` alone."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters by peft's names, `<module>.lora_A.default.weight`."""
        ...

    @property
    def lora_layout(self) -> LoraLayout:
        """The layout in which the adapter is saved."""
        ...

    def checkpoint_gradients(self, *, denoiser: bool, decoder: bool) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        ...


class Adaptable(Trainable, Protocol):
    """A policy that LoRA files, and the weight differences of full fine-tuning, can be loaded into."""

    device: torch.device

    @property
    def original(self) -> Mapping[str, nn.Parameter]:
        """The base model's version of what `named_parameters` names; empty where an adapter is trained."""
        ...

    def adaptable(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """The network's own linear and convolutional modules by name, adapted or not."""
        ...

    def whole_parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """All parameters of the network, without adapters."""
        ...

    def add_version(self, names: Collection[str] | None = None) -> Mapping[str, nn.Parameter]:
        """A tuned version of the network's parameters `names` (default: all), by name; equal to the originals."""
        ...

    def add_consistency(self, lora: Lora) -> Mapping[str, nn.Parameter]:
        """Attach the frozen adapter `consistency`; its parameters by peft's names, to be filled."""
        ...


def initial_down(name: str, shape: Sequence[int], rank: int, seed: int) -> Tensor:
    """An adapter's random half, as the official code draws it: Gaussian with standard deviation 1/rank."""
    return torch.randn(tuple(shape), generator=generator(seed, "lora", name)) / rank
