"""From images to the input of a reward's image tower: differentiable, batched, on the images' device.

Images read from files for scoring need no gradient: they are resized as bytes, with Pillow's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Longest side in units of the shorter one that is resized: the crop keeps only the central square. Bounds memory.
WIDEST = 8


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Shorter side to `size` (bicubic, antialiased: else frequencies above the tower's resolution could hack the reward), centre crop.

    The longer side is truncated and half pixels of the crop round to even, as in torchvision, with which the models were trained.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if max(height, width) > WIDEST * min(height, width):
        images = _centre(images, min(height, WIDEST * width), min(width, WIDEST * height))
        height, width = images.shape[-2:]
    shorter = min(height, width)
    target = (size * height // shorter, size * width // shorter)
    return _centre(_resize(images, target), size, size)


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Longer side to `size` (bicubic, antialiased), black on both sides of the shorter one (HPSv2's evaluation code)."""
    height, width = images.shape[-2:]
    longer = max(height, width)
    target = (max(1, round(height * size / longer)), max(1, round(width * size / longer)))
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(_resize(images, target), (left, size - target[1] - left, top, size - target[0] - top))


def _resize(images: Tensor, target: tuple[int, int]) -> Tensor:
    """Width, then height, clipped after each as Pillow does: overshoot at edges would otherwise differ by several grey levels.

    uint8 stays uint8: torch's own kernel resizes in the same order and rounds after each axis.
    """
    if images.dtype == torch.uint8:
        unchanged = images.shape[-2:] == target
        return images if unchanged else F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
    for size in ((images.shape[-2], target[1]), target):
        if images.shape[-2:] != size:
            images = _bicubic(images, size).clamp(0, 1)
    return images


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, along one axis. The backward pass of CUDA's kernel has no deterministic form; a matrix product has."""
    if not (torch.are_deterministic_algorithms_enabled() and images.requires_grad):
        return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    axis = -1 if images.shape[-1] != size[-1] else -2
    identity = torch.eye(images.shape[axis], dtype=images.dtype, device=images.device)
    weights = F.interpolate(identity[None, None], (size[axis], len(identity)), mode="bicubic", antialias=True, align_corners=False)[0, 0]
    return images @ weights.mT if axis == -1 else weights @ images


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    top, left = round((images.shape[-2] - height) / 2), round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Fit:
    """How images of any size become a reward's square input; rewards with equal Fits can share the result."""

    size: int
    rule: Literal["crop", "pad"] = "crop"

    def __call__(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,3,size,size) in [0,1] float32; images of that size pass unchanged."""
        return self._square(images.float())

    def of_bytes(self, image: Tensor) -> Tensor:
        """(3,H,W) uint8 on the CPU -> (3,size,size) uint8: Pillow's result, but for one grey level in less than 1 % of the pixels.

        Takes an eighth of the differentiable path's time.
        """
        return self._square(image[None])[0].contiguous()

    def _square(self, images: Tensor) -> Tensor:
        return (resize_and_crop if self.rule == "crop" else resize_and_pad)(images, self.size)


def normalise(images: Tensor, mean: tuple[float, float, float] = CLIP_MEAN, std: tuple[float, float, float] = CLIP_STD) -> Tensor:
    """(images − mean)/std per channel."""
    return (images - torch.tensor(mean).to(images)[:, None, None]) / torch.tensor(std).to(images)[:, None, None]
