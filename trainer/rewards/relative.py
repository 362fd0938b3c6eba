"""A score relative to itself under other words: what the model says of every text cancels (SRPO, Shen et al. 2025, arXiv:2509.06942)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .two_tower import TwoTower


@dataclass(frozen=True)
class Relative:
    """(1+κ)s⁺ − s⁻ as a trainer.reward.Reward: s⁺ and s⁻ are the tower's scores with a positive and a negative prefix.

    This is the official code's form of SRPO's eq. 10, whose printed form its authors found less stable. The image is
    encoded once; prefixed prompts are cached. κ weighs the plain score: negative late in sampling, positive early.
    """

    tower: TwoTower
    positive: str = "Realistic photo. "  # SRPO's evaluation words
    negative: str = "CG Render. "
    kappa: float = 0.0
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        plus, minus = self.tower.scores(images, prompts, (self.positive, self.negative)).unbind(1)
        return (1 + self.kappa) * plus - minus

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.tower.checkpoint_gradients(enabled)
