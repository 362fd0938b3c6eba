"""Encoded images: the mean and standard deviation (C,h,w) of each one's posterior, float32, in memory or in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cache import Shapes, TensorCache

LATENTS_KEPT = 2 << 30  # bytes of cached latents that stay in memory


@dataclass(frozen=True)
class LatentsInMemory:
    """M means and standard deviations (C,h,w)."""

    mean: Tensor | Sequence[Tensor]
    std: Tensor | Sequence[Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(C,h,w) of each image."""
        return [tuple(mean.shape) for mean in self.mean]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.mean[i], self.std[i]


class CachedLatents:
    """The same, read from a cache when needed; the first LATENTS_KEPT bytes stay in memory.

    None is evicted: an epoch reads each once in random order, where a fixed set has the most hits.
    """

    def __init__(self, cache: TensorCache, keys: Sequence[str], shapes: Sequence[Shapes]) -> None:
        self.cache, self.keys = cache, keys
        self.shapes = [s["mean"] for s in shapes]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._free = LATENTS_KEPT

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i in self._kept:
            return self._kept[i]
        tensors = self.cache.read(self.keys[i])
        if tensors is None:
            raise OSError(f"latents of this run are gone from {self.cache.folder}: start it again, or --resume it, to encode them")
        pair = tensors["mean"], tensors["std"]
        size = sum(value.nbytes for value in pair)
        if size <= self._free:
            self._free -= size
            self._kept[i] = pair
        return pair


Latents = LatentsInMemory | CachedLatents
