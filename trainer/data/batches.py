"""Micro-batches: what a loss is given. Objectives say which kind they train on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ..policy import Policy
from ..rng import Rng


@dataclass(frozen=True)
class Details:
    """What the data say of the images of a batch beside prompts and labels, each by image: of a pair the better one's first.

    captions: B of each image, in place of the prompts. masks: (B,1,h,w) of each image, weights of its errors, of mean 1. least: (B,),
    noise levels in flow units below which a sample is not trained.
    """

    captions: tuple[tuple[str, ...], ...] = ()
    masks: tuple[Tensor, ...] = ()
    least: Tensor | None = None

    @property
    def turned(self) -> Details:
        """Those of pairs the other way round."""
        return Details(self.captions[::-1], self.masks[::-1], self.least)


@dataclass(frozen=True)
class Prompts:
    """B prompts, the random draws that belong to them, and the number of the micro-batch, counted over the run from 0."""

    prompts: tuple[str, ...]
    rng: Rng
    number: int
    details: Details = field(default=Details(), kw_only=True)

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

    @property
    def swapped(self) -> Pairs:
        """The pairs the other way round."""
        return replace(self, chosen=self.rejected, rejected=self.chosen, details=self.details.turned)

    def shape(self, policy: Policy) -> tuple[int, ...]:
        """(C,h,w) of the latents."""
        return tuple(self.chosen.shape[1:])


@dataclass(frozen=True)
class Labels(Images):
    """Labelled images: labels (B,) are higher for better images, in units that the objective states."""

    labels: Tensor


Batch = Prompts | Images | Pairs | Labels
