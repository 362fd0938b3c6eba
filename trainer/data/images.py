"""Pictures on disk and tensors in [0,1], and nothing about what is in them."""

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


class Picture(Protocol):
    """Where an encoded picture lies: a Path, or a row of a data set. `str()` is what errors call it."""

    def read_bytes(self) -> bytes:
        """The whole of it."""
        ...


def to_pil(image: Tensor) -> Image.Image:
    """(3,H,W) in [0,1] -> PIL."""
    array = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def open_picture(picture: Picture) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF orientation says.

    Transparent parts become white; of an animation, the first frame; 16 bits are scaled to 8; CMYK is converted without a profile.
    """
    try:
        with _opened(picture) as opened:
            opened.load()
            upright: Any = _eight_bit(ImageOps.exif_transpose(opened))
            upright = upright.convert("RGBA") if "A" in upright.getbands() or "transparency" in upright.info else upright.convert("RGB")
    except Exception as error:  # of a damaged file Pillow's readers raise whatever they stumble over
        raise ValueError(f"{picture} is no readable picture: {error}") from error
    if upright.mode == "RGBA":
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright).convert("RGB")
    return upright


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width) of a picture as `open_picture` gives it, from its header alone."""
    try:
        with _opened(picture) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
    except Exception as error:
        raise ValueError(f"{picture} is no readable picture: {error}") from error
    return (width, height) if turned else (height, width)


def _opened(picture: Picture) -> Image.Image:
    return Image.open(picture if isinstance(picture, Path) else BytesIO(picture.read_bytes()))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Grey levels of 16 bits, which Pillow would clip at 255, as 8 bits; other kinds pass."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its grey levels run from {levels.min()} to {levels.max()}: save it with 8 or 16 bits")
    return Image.fromarray((levels / 257).round().astype(np.uint8))


def load(picture: Picture, size: int | tuple[int, int]) -> Tensor:
    """A picture as (3,H,W) in [0,1], H,W = `size` (one number: a square): scaled, antialiased, until it covers that, then
    centre cropped; see `open_picture`."""
    height, width = (size, size) if isinstance(size, int) else size
    found = open_picture(picture)
    if found.size != (width, height):
        scale = max(width / found.width, height / found.height)
        found = found.resize((max(width, round(found.width * scale)), max(height, round(found.height * scale))), Image.Resampling.BICUBIC)
        left, top = (found.width - width) // 2, (found.height - height) // 2
        found = found.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(found, dtype=np.float32) / 255).permute(2, 0, 1)


def load_bytes(path: Path) -> Tensor:
    """A picture as it is, (3,H,W) uint8; see `open_picture`."""
    return torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1)


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
