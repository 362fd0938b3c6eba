"""The size of an image as a JPEG: a black-box reward without weights (Black et al. 2023, arXiv:2305.13301, section 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.images import to_pil
from .base import RewardModel

QUALITY = 95  # DDPO's code


class JpegSize(RewardModel):
    """sign · kilobytes of the JPEG: −1 is compressibility, +1 incompressibility. Depends on the image's size in pixels."""

    differentiable = False
    needs_prompt = False

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], any prompts -> (B,) float32."""
        return torch.tensor([self.sign * _kilobytes(image) for image in images], device=images.device)


def _kilobytes(image: Tensor) -> float:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
