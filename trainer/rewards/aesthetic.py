"""LAION's aesthetic predictor v2: a linear head on CLIP ViT-L/14's image features; the prompt is ignored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .two_tower import encode_images
from .visual_head import VisualHead


class Aesthetic(VisualHead):
    """How much people like images like it, about 1 to 10 (Schuhmann 2022, `sac+logos+ava1-l14-linearMSE`)."""

    backbone = "clip"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        return self.head(encode_images(self.visual, self.fitted(images)))
