"""How large an image is as a JPEG: a black box that needs no weights (Black et al. 2023, arXiv:2305.13301, section 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.images import to_pil

QUALITY = 95  # DDPO's code


@dataclass(frozen=True)
class JpegSize:
    """sign · kilobytes of the JPEG: −1 is compressibility, +1 incompressibility. Depends on the image's size in pixels."""

    sign: int
    differentiable = False
    needs_prompt = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], any prompts -> (B,)."""
        return torch.tensor([self.sign * _kilobytes(image) for image in images], device=images.device)


def _kilobytes(image: Tensor) -> float:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
