"""What is aligned, as objectives see it: a denoiser with an adapter that can be switched off, and an image decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .denoiser import Denoiser
from .draws import Draws
from .sampling import Space


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

    def denoiser(self, prompts: Sequence[str], guidance: float = 1.0) -> Denoiser:
        """The tuned model (adapter on); guidance 1 evaluates no unconditional branch."""
        ...

    def reference(self, prompts: Sequence[str], guidance: float = 1.0) -> Denoiser:
        """The base model (adapter off)."""
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
class Batch:
    """What an objective trains on: B prompts, the random draws that belong to them, and latents of real images."""

    prompts: tuple[str, ...]
    draws: Draws
    number: int  # counts micro-batches over the whole run
    latents: Tensor | None = None  # (B,C,h,w), one posterior sample of each image
