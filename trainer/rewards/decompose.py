"""A two-tower score split into what depends on the prompt and what does not (LongAlign, Liu et al. 2024, arXiv:2410.11817)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reward import same_number
from .two_tower import TwoTower


def common_direction(tower: TwoTower, prompts: Sequence[str]) -> Tensor:
    """m̂ (D,), the normalised mean of the prompts' features; LongAlign takes the batch's, a fixed list of ≥ 1000 is steadier."""
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        raise ValueError("the common direction needs prompts")
    total = sum((tower.text_features(distinct[i : i + 256]).sum(0) for i in range(0, len(distinct), 256)), start=torch.zeros(()))
    return F.normalize(total, dim=0)


@dataclass(frozen=True)
class Decomposed:
    """scale·(t − (1−ω)(t·m̂)m̂)·v as a trainer.reward.Reward: what the score says of any prompt counts ω.

    ω = 1 is the plain score; ω = 0 leaves the part that depends on the prompt. The official ω is 0.3.
    """

    tower: TwoTower
    common: Tensor  # (D,) unit vector
    omega: float = 0.3
    differentiable = True

    def parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B,3,H,W), B prompts -> text-relevant and text-irrelevant part, (B,) each; their sum is the plain score."""
        same_number(images, prompts)
        image, text = self.tower.image_features(images), self.tower.text_features(prompts)
        along = (text @ self.common.to(text))[:, None] * self.common.to(text)  # (B,D)
        return self.tower.scale * ((text - along) * image).sum(-1), self.tower.scale * (along * image).sum(-1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        relevant, irrelevant = self.parts(images, prompts)
        return relevant + self.omega * irrelevant

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.tower.checkpoint_gradients(enabled)
