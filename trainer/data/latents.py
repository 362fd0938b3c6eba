"""Encoded images: the mean and standard deviation of the autoencoder's posterior, in memory or read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .cache import Shapes, TensorCache

LATENTS_KEPT = 2 << 30  # bytes of cached latents that stay in memory


class Latents(Protocol):
    """The posterior of each distinct image."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(C,h,w) of each."""
        ...

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,h,w) of image i, float32."""
        ...


@dataclass(frozen=True)
class LatentsInMemory:
    """M means and standard deviations (C,h,w)."""

    mean: Tensor | Sequence[Tensor]
    std: Tensor | Sequence[Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """As Latents."""
        return [tuple(mean.shape) for mean in self.mean]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.mean[i], self.std[i]


class CachedLatents:
    """Latents of a cache, read when they are needed; the first LATENTS_KEPT bytes of them stay in memory.

    None is evicted: an epoch needs each once in random order, where a fixed set has the most hits.
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
