"""A sample before it is encoded, and what a table says of its images beside prompt and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..text import CONTROL, is_file
from .buckets import Size
from .images import ImageSource, load, size_of
from .manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, SUFFIXES, resolve_image
from .preference_columns import short
from .report import Report
from .rows import Row, read_rows

_NO_MASK = Path()


@dataclass(frozen=True)
class Detail:
    """captions: of each image of a pair, where it has one of its own. least: the noise level, σ/(1 + σ) or a flow's σ, below which the
    sample is not trained. masks: of each image, a file whose brightness weighs its errors, `Path()` for none."""

    captions: tuple[str, ...] = ()
    least: float = 0.0
    masks: tuple[Path, ...] = ()

    def described(self) -> str:
        """For a fingerprint, beside the masks' contents."""
        return repr((self.captions, self.least))


NOTHING = Detail()


class Listed(NamedTuple):
    """One sample before it is encoded: its images, of a pair the better one first, its caption, and a label where there is one."""

    images: tuple[ImageSource, ...]
    caption: str
    label: float | None = None
    detail: Detail = NOTHING


def detail_of(row: Row, folder: Path, sides: Sequence[str], report: Report) -> Detail:
    """What a row says of its images. sides: `chosen` and `rejected`, `0` and `1` of Pick-a-Pic's columns, or nothing for a single image.

    A column of an image is `chosen_mask` or `mask_0`; `mask` and `least_noise` alone are for both images of a pair.
    """

    def value(name: str, side: str, shared: bool = True) -> object:
        own = row.values.get(f"{name}_{side}" if side.isdigit() else f"{side}_{name}")
        return row.values.get(name) if own in (None, "") and shared else own

    captions = [str(value("caption", side, False) or "").strip() for side in sides]
    if any(captions) and not all(captions):
        raise ValueError(f"{row.where}: one image of the pair has a caption of its own: give both, or the prompt alone")
    levels = [_level(value("least_noise", side), row.where) for side in sides or ("",)]
    masks = [_mask(value("mask", side), folder, row.where, report) for side in sides or ("",)]
    return Detail(tuple(captions) if any(captions) else (), max(levels), tuple(masks) if any(m != _NO_MASK for m in masks) else ())


def details_of(path: Path) -> list[Detail]:
    """What a table of images says of each row's image; nothing of other sources."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return []
    aside = Report()  # rows have been reported
    return [detail_of(row, path.parent, (), aside) for row in read_rows(path, IMAGE_COLUMNS, PROMPT_COLUMNS, aside)]


def _level(value: object, where: str) -> float:
    if value in (None, ""):
        return 0.0
    try:
        level = float(str(value))
    except ValueError:
        level = -1.0
    if not 0 <= level < 1:
        raise ValueError(f"{where}: least_noise is {short(value)}: give a noise level from 0 to below 1, in flow units (σ/(1 + σ))")
    return level


def _mask(value: object, folder: Path, where: str, report: Report) -> Path:
    if value in (None, ""):
        return _NO_MASK
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{where}: mask is {short(value)}: name an image file")
    path = resolve_image(folder, value, report)
    if not is_file(path):
        raise ValueError(f"{where}: the mask {CONTROL.sub(' ', str(path))} does not exist")
    return path


def mask_of(path: Path, image: ImageSource, size: Size, shape: tuple[int, int]) -> Tensor:
    """The weights (1,h,w) of an image's errors, of mean 1: its mask's brightness, cropped as the image to `size` and averaged to a latent's
    `shape`; ones without a mask. ValueError where mask and image differ in size, or nothing is left."""
    if path == _NO_MASK:
        return torch.ones(1, *shape)
    (height, width), (tall, wide) = size_of(path), size_of(image)
    if (height, width) != (tall, wide):
        raise ValueError(f"the mask {path} has {width}×{height} pixels and its image {wide}×{tall}: give a mask of the image's size")
    weights = F.adaptive_avg_pool2d(load(path, size).mean(0, keepdim=True), shape)
    if float(weights.mean()) == 0:
        raise ValueError(f"the mask {path} is black: nothing of {image} would be trained")
    return weights / weights.mean()
