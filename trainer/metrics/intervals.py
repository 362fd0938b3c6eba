"""The reward–diversity frontier, its area, and how sure we are of a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rng import generator


def dominated_area(points: Sequence[tuple[float, float]]) -> float:
    """Area above (0,0) that the points dominate, larger being better on both axes (the hypervolume indicator in 2-D)."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area


def bootstrap(
    statistic: Callable[[Tensor], Tensor], n: int, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Percentile interval of `statistic(rows)` over resampled rows (n,) int64, with replacement (Efron 1979).

    The same seed resamples the same rows, so that statistics of several models are paired.
    """
    rng = generator(seed, "bootstrap")
    values = torch.stack([statistic(torch.randint(n, (n,), generator=rng)) for _ in range(resamples)])
    tail = (1 - level) / 2
    return values.quantile(tail, dim=0), values.quantile(1 - tail, dim=0)
