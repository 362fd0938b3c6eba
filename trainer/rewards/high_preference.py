"""HP of ICT-HP: how much an image would be preferred, whatever its prompt; a head on a tuned CLIP ViT-H/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import RewardModel
from .clip import load_clip
from .linear_head import LinearHead
from .preprocess import Fit
from .two_tower import embed_images
from .weights import CPU_FLOAT32, Placement, fill


class HighPreference(RewardModel):
    """sigmoid(head(f_image)), 0 to 1 (Ba et al. 2025, arXiv:2507.19002); the features are not normalised, as in the authors' code."""

    needs_prompt = False
    supports_gradient_checkpointing = True

    def __init__(self, visual: nn.Module, head: nn.Module, fit: Fit) -> None:
        super().__init__()
        self.visual: Any = visual
        self.head, self.fit = head, fit

    @staticmethod
    def load(paths: Mapping[str, Path], architecture: Mapping[str, Any], placement: Placement = CPU_FLOAT32) -> HighPreference:
        """From `backbone`, a CLIP whose text tower is dropped, and `weights`, the head, kept in float32."""
        visual, path = load_clip(paths["backbone"], architecture, placement).visual, paths["weights"]
        head = Placement(placement.device)
        size, width = architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
        return HighPreference(visual, fill(lambda: LinearHead(width), head.read(path), path, head), Fit(size))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        return self.head(embed_images(self.visual, self.fitted(images))).sigmoid()

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.visual.set_grad_checkpointing(enabled)
