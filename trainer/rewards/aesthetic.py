"""LAION's aesthetic predictor v2: a linear head on CLIP ViT-L/14's image features; the prompt plays no part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from .linear_head import LinearHead
from .two_tower import TwoTower
from .weights import Held, fill


class Aesthetic:
    """How much people liked pictures like it, about 1 to 10 (Schuhmann 2022, `sac+logos+ava1-l14-linearMSE`)."""

    differentiable = True
    needs_prompt = False

    def __init__(self, tower: TwoTower, head: nn.Module) -> None:
        self.tower, self.head = tower, head
        tower.reads_prompts = False
        self.fit = tower.fit

    @staticmethod
    def load(tower: TwoTower, path: Path) -> Aesthetic:
        """The head from its released file, on the device of the tower and in float32."""
        width = tower.model.visual.proj.shape[1]
        held = Held(tower.model.logit_scale.device)
        return Aesthetic(tower, fill(lambda: LinearHead(width), held.read(path), path, held))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], any prompts -> (B,)."""
        return self.head(self.tower.image_features(images))

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.tower.checkpoint_gradients(enabled)
