"""What training costs, in a unit that does not depend on the machine: denoiser calls."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, WrappedDenoiser
from ..policy import Policy
from ..sampling import Space


class CountingPolicy:
    """A policy that counts: one call per image and forward, conditional and unconditional apart; two more per image and
    backward pass through it. A forward that is computed again going back counts again."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls = 0

    @property
    def space(self) -> Space:
        """As the policy inside, like everything below but the denoisers."""
        return self.policy.space

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,h,w)."""
        return self.policy.latent_shape

    @property
    def device(self) -> torch.device:
        """Where denoisers evaluate."""
        return self.policy.device

    @property
    def adapters(self) -> Container[str]:
        """Names of the adapters."""
        return self.policy.adapters

    def denoiser(self, prompts: Sequence[str], *, adapter: str = "tuned", guidance_scale: float = 1.0) -> Denoiser:
        """The policy's, counted."""
        inner = self.policy.denoiser(prompts, adapter=adapter, guidance_scale=guidance_scale)
        return self._counted(inner, adapter, guidance_scale)

    def _counted(self, denoiser: Denoiser, adapter: str, guidance_scale: float) -> Denoiser:
        def denoise(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
            each = len(x) * (1 if guidance_scale == 1 else 2)
            self.calls += each
            output = denoiser(x, sigma)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._backward(each))  # pyright: ignore[reportUnknownLambdaType]
            return output

        return WrappedDenoiser(denoiser, denoise)

    def _backward(self, each: int) -> None:
        self.calls += 2 * each

    def merged(self) -> AbstractContextManager[None]:
        """Cheaper evaluations inside the block."""
        return self.policy.merged()

    def sigmas(self, steps: int) -> Tensor:
        """(steps+1,)."""
        return self.policy.sigmas(steps)

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """First state of a rollout."""
        return self.policy.start(noise, steps)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """α(σ)·x0 + σ·noise."""
        return self.policy.add_noise(x0, noise, sigma)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents."""
        return self.policy.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0,1]."""
        return self.policy.decode(latents)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The adapter's."""
        return self.policy.parameters()
