"""Single-pass feature statistics for FID, KID and LogCov, in blocks of prompts for jackknife intervals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rng import generator
from .distances import Moments, Reservoir, frechet_distance, log_covariance_distance, unbiased_mmd

BLOCKS = 10  # of prompts; an interval leaves each out once
ROWS = 2000  # kept for the kernel distance


class FeatureStatistics:
    """Features (N,D) of one set of images: moments per block of prompts and a uniform sample; 2·BLOCKS matrices D×D, whatever N."""

    def __init__(self) -> None:
        self._plain = [Moments() for _ in range(BLOCKS)]
        self._unit = [Moments() for _ in range(BLOCKS)]
        self._rows = Reservoir(ROWS, generator(0, "cloud"))

    def update(self, features: Tensor, prompts: Sequence[int]) -> FeatureStatistics:
        """Add features (N,D) and the number of each one's prompt."""
        features = features.detach().cpu().double()  # MPS has no float64
        blocks = torch.tensor(prompts) % BLOCKS
        for block in blocks.unique().tolist():
            rows = features[blocks == block]
            self._plain[block].update(rows)
            self._unit[block].update(F.normalize(rows, dim=1))
        self._rows.update(torch.cat([features, blocks[:, None].double()], 1))
        return self

    @property
    def blocks(self) -> list[int]:
        """The blocks that have images."""
        return [i for i, moments in enumerate(self._plain) if moments.number]

    def without(self, block: int | None) -> tuple[Moments, Moments, Tensor]:
        """Moments of the features, moments of their directions, and sampled rows, of all blocks but one."""
        kept = [i for i in range(BLOCKS) if i != block]
        plain, unit = Moments(), Moments()
        for i in kept:
            plain.merge(self._plain[i])
            unit.merge(self._unit[i])
        rows = self._rows.rows
        return plain, unit, rows[rows[:, -1] != (-1 if block is None else block), :-1]


def distances(a: FeatureStatistics, b: FeatureStatistics, block: int | None = None, paired: bool = False) -> dict[str, float]:
    """Fréchet, kernel and log-covariance distance of two sets, without one block of `a` and, where both have the same prompts, of `b`."""
    x, y = a.without(block), b.without(block if paired else None)
    return {"fid": frechet_distance(x[0], y[0]), "kid": unbiased_mmd(x[2], y[2]), "logcov": log_covariance_distance(x[1], y[1])}
