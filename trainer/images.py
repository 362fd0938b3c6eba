"""Pictures on disk and tensors in [0,1], and nothing about what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_pil(image: Tensor) -> Image.Image:
    """(3,H,W) in [0,1] -> PIL."""
    array = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def load(path: Path, size: int) -> Tensor:
    """A picture as (3,size,size) in [0,1]: shorter side resized to `size`, centre cropped. Transparent parts become white."""
    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Any = opened.convert("RGBA") if "A" in opened.getbands() or "transparency" in opened.info else opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable picture: {error}") from error
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    width, height = picture.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        picture = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(N,3,H,W) -> one picture (3,H',W') with `columns` per row, white between."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image.detach().cpu()
    return sheet


def find(folder: Path) -> Sequence[Path]:
    """Every picture below a folder, sorted by path."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
