"""What a round asks of its images: the reward, or each of a sum's by itself, and features to compare images in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...reward import SummedReward
from ..base import RunContext


class Scoring:
    """The rewards of a run: each of a sum by itself where `apart`; with `compared` also features."""

    def __init__(self, run: RunContext, apart: bool, compared: bool) -> None:
        self.run, self.apart, self.compared = run, apart, compared

    @property
    def weights(self) -> Sequence[float]:
        """Of the rewards (R,)."""
        reward = self.run.required_reward
        return reward.weights if self.apart and isinstance(reward, SummedReward) else (1.0,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rewards (B,R) of images (B,3,H,W), and features (B,D), of which there are none unless they are wanted."""
        reward, features = self.run.required_reward, self.run.features
        terms = reward.terms(images, prompts) if self.apart and isinstance(reward, SummedReward) else reward(images, prompts)[:, None]
        return terms, features.image_features(images) if self.compared and features else images.new_zeros(len(images), 0)
