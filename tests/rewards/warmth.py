"""A reward for warm colours, as an example of a new file in trainer/rewards/."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import RewardModel
from .preprocess import Fit


class Warmth(RewardModel):
    """Mean red minus mean blue, −1 to 1; the prompt is ignored."""

    needs_prompt = False
    fit = Fit(224)
    statistics = (0.05, 0.15)  # mean and standard deviation over the base model's images

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        red, _, blue = self.fitted(images).mean((2, 3)).unbind(1)
        return red - blue
