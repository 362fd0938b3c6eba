"""Pairs of images in a graph: what they are, and what training reads of them. It knows no node."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..trainer.data.batches import Labels
from ..trainer.data.fingerprint import fingerprint
from ..trainer.data.images import ImageSource, load, size_of, to_pil
from ..trainer.data.samples import Listed, content_hash
from ..trainer.pairs.label import Pair
from ..trainer.pairs.tables import labels_of


@dataclass(frozen=True)
class ImageInMemory:
    """An image of a graph as a PNG, so that the headless readers take it: an `images.ImageSource`."""

    data: bytes = field(repr=False)
    name: str = field(compare=False)

    @staticmethod
    def of(image: Tensor, name: str) -> ImageInMemory:
        """(3,H,W) in [0,1], rounded to 8 bits as a file would be."""
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "PNG", compress_level=1)
        return ImageInMemory(buffer.getvalue(), name)

    def read_bytes(self) -> bytes:
        """The PNG."""
        return self.data

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PreferencePairs:
    """What the socket PREFERENCE_PAIRS carries. rewards: the names of the pairs' `gaps`."""

    pairs: tuple[Pair, ...]
    rewards: tuple[str, ...] = ()
    heldout: str = ""
    labels: tuple[Listed, ...] = ()
    """Images that were liked or disliked one by one; there are no pairs then."""

    @property
    def some(self) -> tuple[Pair, ...]:
        """The pairs; ValueError where there are none."""
        if self.labels:
            raise ValueError("these are likes and dislikes, not pairs: train Diffusion-KTO on them, or choose between images")
        if not self.pairs:
            raise ValueError("there are no pairs: nothing was held out, or all were filtered")
        return self.pairs

    def listed(self, cls: type[Any]) -> list[Listed]:
        """The samples of a run: pairs, or for `Labels` each image once, liked where it wins more often than it loses."""
        if self.labels and issubclass(cls, Labels):
            return list(self.labels)
        if not issubclass(cls, Labels):
            return [Listed((pair.chosen, pair.rejected), pair.prompt) for pair in self.some]
        labels = labels_of(self.some)
        found = [Listed((image,), prompt, 1.0 if word == "liked" else -1.0) for (image, prompt), word in labels.items()]
        if len({one.label for one in found}) < 2:
            raise ValueError("these pairs have no image that wins more often than it loses, or none that loses: make other pairs")
        return found


def fingerprint_of(listed: Sequence[Listed]) -> str:
    """Equal for equal images, labels and captions in equal order."""
    images = [" ".join(content_hash(image) for image in one.images) for one in listed]
    found = fingerprint(len(listed), images=images, labels=[str(one.label) for one in listed], captions=[one.caption for one in listed])
    return "/".join(str(value)[:16] for value in found.values())


def common_size(listed: Sequence[Listed]) -> tuple[int, int]:
    """(height, width) of every image; ValueError where they differ."""
    sizes = {size_of(image) for one in listed for image in one.images}
    if len(sizes) > 1:
        (h, w), (other_h, other_w) = sorted(sizes)[:2]
        raise ValueError(f"image_size = 0 keeps the images' size, and pairs have {w}×{h} and {other_w}×{other_h}: give pixels, 512 say")
    return sizes.pop()


def shown(images: Sequence[ImageSource], size: int = 128) -> Tensor:
    """Images as an IMAGE batch (B,H,W,3) of squares."""
    return torch.stack([load(image, size) for image in images]).movedim(1, -1)
