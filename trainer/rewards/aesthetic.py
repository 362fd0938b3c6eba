"""LAION's aesthetic predictor v2: a linear head on CLIP ViT-L/14's image features; the prompt is ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import RewardModel
from .clip import load_clip
from .linear_head import LinearHead
from .preprocess import Fit
from .two_tower import encode_images
from .weights import CPU_FLOAT32, Placement, fill


class Aesthetic(RewardModel):
    """How much people like images like it, about 1 to 10 (Schuhmann 2022, `sac+logos+ava1-l14-linearMSE`)."""

    needs_prompt = False
    supports_gradient_checkpointing = True

    def __init__(self, visual: nn.Module, head: nn.Module, fit: Fit) -> None:
        super().__init__()
        self.visual: Any = visual
        self.head, self.fit = head, fit

    @staticmethod
    def load(paths: Mapping[str, Path], architecture: Mapping[str, Any], placement: Placement = CPU_FLOAT32) -> Aesthetic:
        """From `clip`, CLIP's file, whose text tower is dropped, and `weights`, the released head, kept in float32."""
        visual, path = load_clip(paths["clip"], architecture, placement).visual, paths["weights"]
        head = Placement(placement.device)
        size, width = architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
        return Aesthetic(visual, fill(lambda: LinearHead(width), head.read(path), path, head), Fit(size))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        return self.head(encode_images(self.visual, self.fitted(images)))

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.visual.set_grad_checkpointing(enabled)
