"""Confidence intervals by bootstrap and jackknife, and the area of a reward–diversity frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rng import generator

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, 1 to 9 degrees of freedom


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t; above 9 degrees of freedom by Cornish and Fisher's expansion (0.001 off at most)."""
    if freedom < 1:
        return math.inf
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + third


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


def jackknife(statistic: Callable[[int | None], dict[str, float]], blocks: Sequence[int]) -> dict[str, list[float]]:
    """95 % intervals of statistics by leaving each block out once (Tukey 1958): value ± t·√((G−1)/G · Σ(θ₋g − mean)²).

    A bootstrap is biased here: images that are drawn twice make a set look narrower than it is.
    """
    if len(blocks) < 2:
        return {}
    whole, left = statistic(None), [statistic(block) for block in blocks]
    found: dict[str, list[float]] = {}
    for name, value in whole.items():
        values = [one[name] for one in left]
        mean = sum(values) / len(values)
        spread = math.sqrt((len(values) - 1) / len(values) * sum((v - mean) ** 2 for v in values))
        found[name] = [value - student(len(values) - 1) * spread, value + student(len(values) - 1) * spread]
    return found
