"""From pixels to what a reward's image tower expects: differentiable, batched, on whatever device the pixels are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Shorter side to `size` (bicubic, antialiased: without it a reward can be hacked by frequencies it never shows), centre crop."""
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    return images


def normalise(images: Tensor, mean: tuple[float, float, float] = CLIP_MEAN, std: tuple[float, float, float] = CLIP_STD) -> Tensor:
    """(images − mean)/std per channel."""
    return (images - torch.tensor(mean).to(images)[:, None, None]) / torch.tensor(std).to(images)[:, None, None]
