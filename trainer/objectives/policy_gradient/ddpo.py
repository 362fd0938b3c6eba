"""DDPO: PPO on the steps of the DDIM sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...sampling import Kernel, ddim
from .steps import WindowGradient


@dataclass(frozen=True)
class DDPO(WindowGradient):
    """Denoising diffusion policy optimization (Black et al. 2024, arXiv:2305.13301): PPO with any reward, which needs no gradient.

    Sampling is a Markov decision process whose actions are the sampler's noisy steps; an image's advantage is that of each of its steps.
    Official, from code: 50 DDIM steps of η = 1, guidance 5 in training too, 256 images in a round, clip 1e-4, one pass. There each image
    has a prompt of its own and is compared with the prompt's last 16 scores (`baseline = history`); here with its group.
    """

    eta: float = field(default=1.0, metadata={"min": 1e-3, "max": 1.0, "help": "noise of a step: 1 ancestral (official 1)"})

    @property
    def kernel(self) -> Kernel:
        """DDIM's."""
        return ddim(self.eta)
