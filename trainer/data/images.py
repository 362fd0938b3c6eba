"""Image files as tensors in [0,1], and back."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSource(Protocol):
    """An encoded image: a Path, or a row of a data set. Errors name it by its `str()`."""

    def read_bytes(self) -> bytes:
        """The whole file."""
        ...


def to_pil(image: Tensor) -> Image.Image:
    """(3,H,W) in [0,1] -> PIL."""
    array = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def open_image(source: ImageSource) -> Image.Image:
    """An image as 8-bit RGB, rotated as its EXIF orientation says.

    Transparent pixels are blended with white; of an animation, the first frame; 16 bits are scaled to 8; CMYK is converted
    without a profile. Raises ValueError where it cannot be decoded.
    """
    try:
        with _opened(source) as opened:
            opened.load()
            upright: Any = _eight_bit(ImageOps.exif_transpose(opened))
            upright = upright.convert("RGBA") if "A" in upright.getbands() or "transparency" in upright.info else upright.convert("RGB")
    except Exception as error:  # Pillow's readers raise many types for a damaged file
        raise ValueError(f"{source} is not a readable image: {error}") from error
    if upright.mode == "RGBA":
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright).convert("RGB")
    return upright


def size_of(source: ImageSource) -> tuple[int, int]:
    """(height, width) of what `open_image` returns, from the file's header alone."""
    try:
        with _opened(source) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by 90°
    except Exception as error:
        raise ValueError(f"{source} is not a readable image: {error}") from error
    return (width, height) if turned else (height, width)


def _opened(source: ImageSource) -> Image.Image:
    return Image.open(source if isinstance(source, Path) else BytesIO(source.read_bytes()))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey levels, which Pillow would clip at 255, as 8 bits; other modes are unchanged."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its grey levels run from {levels.min()} to {levels.max()}: save it with 8 or 16 bits")
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def load(source: ImageSource, size: int | tuple[int, int]) -> Tensor:
    """An image as (3,H,W) in [0,1], where `size` is (H,W) or the side of a square: resized with antialiasing to cover it, then
    centre cropped; see `open_image`."""
    height, width = (size, size) if isinstance(size, int) else size
    image = open_image(source)
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def load_bytes(path: Path) -> Tensor:
    """An image in its own size, (3,H,W) uint8; see `open_image`."""
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(N,3,H,W) -> one image (3,H',W') with `columns` per row and white gaps."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image.detach().cpu()
    return sheet


def find(folder: Path) -> Sequence[Path]:
    """Every image below a folder, sorted by path."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
