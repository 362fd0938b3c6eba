"""Estimates from choices that are not independent: they share images and prompts, and folds share what they learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics.intervals import student
from .folds import Folds, Keys

Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def signed(self) -> str:
        """Of a difference."""
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Units:
    """What choices share: the group (n,1) of each, or, where images connect all of them, its two images (n,2); int64."""

    members: Tensor

    @staticmethod
    def of(folds: Folds, keys: Sequence[Keys]) -> Units:
        """Of folds' groups, or of images where pairs were left out alone."""
        if folds.level != "pair":
            return Units(torch.tensor(folds.groups)[:, None])
        names = {image: i for i, image in enumerate({image for k in keys for image in k.images})}
        return Units(torch.tensor([sorted(names[image] for image in k.images) for k in keys]))

    def where(self, mask: Tensor) -> Units:
        """Of some of the choices."""
        return Units(self.members[mask])

    def __len__(self) -> int:
        return len(self.members.unique())

    def variance(self, parts: Tensor) -> Tensor:
        """(C,) variance of the sums over n of parts (n,C) with mean about 0.

        Of groups the cluster variance. Of pairs the dyadic one, in which choices with a common image are dependent (Fafchamps and Gubert
        2007; Aronow, Samii and Assenova 2015, arXiv:1312.3398); at least that of independent pairs.
        """
        if len(self) < 2:
            return torch.full((parts.shape[1],), math.inf, dtype=torch.float64)
        factor = len(self) / (len(self) - 1)
        if self.members.shape[1] == 1:
            return factor * _squares(self.members[:, 0], parts)
        alone = _squares(self.members @ torch.tensor([int(self.members.max()) + 1, 1]), parts)
        shared = _squares(self.members.flatten(), parts.repeat_interleave(2, 0)) - alone
        return factor * torch.maximum(shared, alone)


def _squares(names: Tensor, parts: Tensor) -> Tensor:
    """(C,) sum of the squared sums of parts by name."""
    _, place = names.unique(return_inverse=True)
    return torch.zeros(int(place.max()) + 1, parts.shape[1], dtype=torch.float64).index_add(0, place, parts).square().sum(0)


def wilson(value: float, number: float) -> Estimate:
    """Wilson's 95 % interval (1927) of a share of `number` independent choices, which need not be whole."""
    if number <= 0:
        return Estimate(value, 0.0, 1.0)
    centre, scale = value + Z * Z / (2 * number), 1 + Z * Z / number
    half = Z * math.sqrt(value * (1 - value) / number + Z * Z / (4 * number * number))
    return Estimate(value, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def agreement(right: Tensor, weight: Tensor, units: Units, by_chance: float = math.inf) -> Estimate:
    """Weighted share of right (n,), with Wilson's interval at the effective number of choices.

    That is the least of Σw and the binomial variance over that by units, either corrected for few units (times (z/t)², Korn and Graubard
    1998), and of `by_chance`, the number whose binomial variance at ½ is that of agreement by chance. Where all are right or all wrong the
    variance by units is not known, and the units are counted.
    """
    total = float(weight.sum())
    value = float((weight * right).sum()) / total
    number, few = total, (Z / student(len(units) - 1)) ** 2
    if 0 < value < 1:
        variance = float(units.variance((weight * (right - value) / total)[:, None]))
        number = min(number, value * (1 - value) / variance)
    else:
        number = min(number, len(units) / units.members.shape[1])
    return wilson(value, min(number * few, by_chance))


def means(values: Tensor, weight: Tensor, units: Units, least: float = 0.0, inflation: float = 1.0) -> list[Estimate]:
    """Weighted means of the columns of values (n,C), with Student's intervals by units.

    least: of the standard error; inflation: of the variance.
    """
    weight = weight / weight.sum()
    middle = weight @ values
    errors = (units.variance(weight[:, None] * (values - middle)) * inflation).sqrt().clamp(min=least)
    halves = student(len(units) - 1) * errors
    return [Estimate(float(m), float(m - h), float(m + h)) for m, h in zip(middle, halves)]
