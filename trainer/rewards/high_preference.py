"""HP of ICT-HP: how much an image would be preferred, whatever its prompt; a head on a tuned CLIP ViT-H/14."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .two_tower import embed_images
from .visual_head import VisualHead


class HighPreference(VisualHead):
    """sigmoid(head(f_image)), 0 to 1 (Ba et al. 2025, arXiv:2507.19002); the features are not normalised, as in the authors' code."""

    backbone = "backbone"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        return self.head(embed_images(self.visual, self.fitted(images))).sigmoid()
