"""Micro-batches: what a loss is given. Objectives say which kind they train on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..policy import Policy
from ..rng import Rng


@dataclass(frozen=True)
class Prompts:
    """B prompts, the random draws that belong to them, and the number of the micro-batch, counted over the run from 0."""

    prompts: tuple[str, ...]
    rng: Rng
    number: int

    def shape(self, policy: Policy) -> tuple[int, ...]:
        """(C,h,w) of this batch's samples: the policy's, or that of the batch's own latents."""
        return policy.latent_shape


@dataclass(frozen=True)
class Images(Prompts):
    """Captioned images: latents (B,C,h,w), one posterior sample each, on any device."""

    latents: Tensor

    def shape(self, policy: Policy) -> tuple[int, ...]:
        """(C,h,w) of the latents."""
        return tuple(self.latents.shape[1:])


@dataclass(frozen=True)
class Pairs(Prompts):
    """Preferences: the latents (B,C,h,w) of a better and a worse image of each prompt."""

    chosen: Tensor
    rejected: Tensor

    def shape(self, policy: Policy) -> tuple[int, ...]:
        """(C,h,w) of the latents."""
        return tuple(self.chosen.shape[1:])


@dataclass(frozen=True)
class Labels(Images):
    """Labelled images: labels (B,) are higher for better images, in units that the objective states."""

    labels: Tensor


Batch = Prompts | Images | Pairs | Labels
