"""Image files as tensors in [0,1], and back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features
from torch import Tensor

from .report import Report

# Pillow refuses a PNG with a compressed text or colour profile of more than 1 MB, or 64 MB of them; workflows with images in them have more
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 1 << 28)

FORMATS = frozenset(("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA", "QOI", "HEIF", "JXL"))
"""Pillow's names of formats that hold photographs and drawings; HEIF and JXL need a plugin that is registered with Pillow."""
_BUILT_WITH = {"JPEG": "jpg", "WEBP": "webp", "JPEG2000": "jpg_2000"}  # what a build of Pillow may lack, though the suffix is known
SUFFIXES = tuple(
    sorted(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in FORMATS and name in Image.OPEN and (name not in _BUILT_WITH or features.check(_BUILT_WITH[name]))
    )
)
"""Suffixes, in lower case, of the formats that this build of Pillow opens."""
_MISSING = frozenset((".webp", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".qoi"))
SIDECARS = (".txt", ".caption")
_HIDDEN = frozenset(("@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"))
_OF_A_RUN = ("settings.json", "report.json", "scores.csv", "pairs.jsonl", "pairs-heldout.jsonl", "labels.jsonl", "labels-heldout.jsonl")
SHEET_MARK = "imagerefl"
"""The text of a contact sheet's PNG that tells it from an image."""
_ONE_FRAME = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib"))


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
            upright: Any = _eight_bit(_upright(opened))
            upright = upright.convert("RGBA") if "A" in upright.getbands() or "transparency" in upright.info else upright.convert("RGB")
    except Exception as error:  # Pillow's readers raise many types for a damaged file
        raise _unreadable(source, error) from error
    if upright.mode == "RGBA":
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright).convert("RGB")
    return upright


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, upright, where the EXIF is damaged: the pixels are as good without it."""
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's readers raise many types
        return 1
    return found if 1 <= found <= 8 else 1


def size_of(source: ImageSource) -> tuple[int, int]:
    """(height, width) of what `open_image` returns, from the file's header alone."""
    try:
        with _opened(source) as opened:
            width, height = opened.size
            turned = _orientation(opened) >= 5  # by 90°
    except Exception as error:
        raise _unreadable(source, error) from error
    return (width, height) if turned else (height, width)


def _unreadable(source: ImageSource, error: Exception) -> ValueError:
    suffix = Path(str(source)).suffix.lower()
    lacking = suffix in _MISSING and suffix not in SUFFIXES
    return ValueError(f"{source} is not a readable image: {f'this Pillow cannot open {suffix}, save it as PNG' if lacking else error}")


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


def load_bytes(source: ImageSource) -> Tensor:
    """An image in its own size, (3,H,W) uint8; see `open_image`."""
    return torch.from_numpy(np.array(open_image(source))).permute(2, 0, 1)


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(N,3,H,W) -> one image (3,H',W') with `columns` per row and white gaps."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image.detach().cpu()
    return sheet


def find(folder: Path, report: Report | None = None) -> Sequence[Path]:
    """Every image below a folder, sorted by path; linked folders are followed once.

    Left out are hidden files and folders, those that systems write (`@eaDir`, `Thumbs.db`), and what is not an image.
    """
    report = Report() if report is None else report
    report.source = report.source or str(folder)
    if not folder.is_dir():
        raise ValueError(f"no image folder {folder}")
    found: list[Path] = []
    sidecars: list[Path] = []
    for path in _files(folder, report):
        if path.suffix.lower() in SIDECARS:
            sidecars.append(path)
        elif path.name.startswith(_OF_A_RUN) or _is_sheet(path):
            report.leave_out("of a run of this program", path.name)
        elif (suffix := path.suffix.lower()) not in SUFFIXES:
            report.leave_out(f"{suffix} (this Pillow cannot open them, save as PNG)" if suffix in _MISSING else "not an image", path.name)
        elif not path.is_file() and not path.is_symlink():  # a broken link is an image that cannot be read
            report.leave_out("not a file", path.name)
        else:
            found.append(path)
    stems = {p.with_suffix("") for p in found} | set(found)
    for path in sidecars:
        if path.with_suffix("") not in stems:
            report.leave_out("text without an image", path.name)
    for path in found:
        if path.suffix.lower() not in _ONE_FRAME and frames(path) > 1:
            report.note("animated, the first frame taken", path.name)
    report.take("images", len(found))
    return sorted(found)


def _is_sheet(path: Path) -> bool:
    """Whether an image is the contact sheet that `sample` and `pairs` write beside their folder of images."""
    folder, mark, rest = path.name.rpartition("-grid.png")
    if not folder or not mark or rest or not path.with_name(folder).is_dir():
        return False
    try:
        with Image.open(path) as opened:
            return SHEET_MARK in opened.info
    except Exception:  # Pillow's readers raise many types
        return False


def frames(path: Path) -> int:
    """Number of frames of an image file; 1 where it cannot be read."""
    try:
        with Image.open(path) as opened:
            return getattr(opened, "n_frames", 1)
    except Exception:  # decoding the pixels reports the error
        return 1


def _files(root: Path, report: Report) -> Iterator[Path]:
    """Files below a folder that are not hidden. Linked folders come after all others, each real folder once."""
    seen: set[str] = set()
    waiting = deque([root])
    while waiting:
        top = waiting.popleft()
        real = os.path.realpath(top)
        if real in seen or (top != root and Path(os.path.realpath(root)).is_relative_to(real)):
            report.leave_out("linked folder that is read already", top.name)
            continue
        for here, folders, files in os.walk(top, onerror=lambda error: report.leave_out("unreadable folder", Path(error.filename).name)):
            seen.add(os.path.realpath(here))
            kept = [name for name in sorted(folders) if not _hidden(name, report)]
            links = [name for name in kept if _is_link(os.path.join(here, name))]
            waiting += [Path(here, name) for name in links]
            folders[:] = [name for name in kept if name not in links and os.path.realpath(os.path.join(here, name)) not in seen]
            yield from (Path(here, name) for name in files if not _hidden(name, report))


def _is_link(folder: str) -> bool:
    is_junction = getattr(os.path, "isjunction", None)  # Windows' other kind of link; Python 3.12
    return os.path.islink(folder) or bool(is_junction and is_junction(folder))


def _hidden(name: str, report: Report) -> bool:
    if hidden := name.startswith(".") or name.lower() in _HIDDEN:
        report.leave_out("hidden", name)
    return hidden
