"""What rewards share that are a head on a CLIP's image tower, and ignore the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .base import RewardModel
from .clip import load_clip
from .linear_head import LinearHead
from .preprocess import Fit
from .weights import CPU_FLOAT32, Placement, fill


class VisualHead(RewardModel):
    """`visual` and `head`; `forward` says how features become a score."""

    needs_prompt = False
    supports_gradient_checkpointing = True
    backbone: ClassVar[str]
    """The role of the tower's file among those of the reward."""

    def __init__(self, visual: nn.Module, head: nn.Module, fit: Fit) -> None:
        super().__init__()
        self.visual: Any = visual
        self.head, self.fit = head, fit

    @classmethod
    def load(cls, paths: Mapping[str, Path], architecture: Mapping[str, Any], placement: Placement = CPU_FLOAT32) -> VisualHead:
        """From `backbone`, a CLIP whose text tower is dropped, and `weights`, the head, kept in float32."""
        visual, path = load_clip(paths[cls.backbone], architecture, placement).visual, paths["weights"]
        head = Placement(placement.device)
        size, width = architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
        return cls(visual, fill(lambda: LinearHead(width), head.read(path), path, head), Fit(size))

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.visual.set_grad_checkpointing(enabled)
