"""How often a head predicts choices it has not seen, with intervals, and how that would go on with more choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics.intervals import bootstrap
from ..rng import generator
from .folds import Folds, Keys, folds
from .head import Design, best_precision

NESTED = 400  # comparisons up to which the prior is chosen anew inside each fold
INNER = 5  # folds of that choice
FRACTIONS, REPEATS = (0.25, 0.5, 0.75, 1.0), 4  # of a fold's training choices in the learning curve, and subsets of each size
RESAMPLES = 1000


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def correct(logits: Tensor) -> Tensor:
    """1 for a positive logit of the preferred image, 0 for a negative one, ½ for none."""
    return (logits > 0).double() + (logits == 0).double() / 2


def wilson(value: float, number: float) -> Share:
    """Wilson's 95 % interval (1927) of a share of `number` independent choices, which need not be whole."""
    z = 1.959964
    centre, scale = value + z * z / (2 * number), 1 + z * z / number
    half = z * math.sqrt(value * (1 - value) / number + z * z / (4 * number * number))
    return Share(value, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def agreement(right: Tensor, weight: Tensor, groups: Sequence[int]) -> Share:
    """Weighted share of right (n,), with Wilson's interval at the effective number of choices, Σw over the design effect.

    The design effect is the variance of the share by groups (linearised, as of a cluster sample) over the binomial one, at least 1 (Kish
    1965; Wilson's interval at that number: Korn and Graubard 1998 do the same with Clopper–Pearson's). Where all are right or all wrong
    it is not known, and the groups are counted.
    """
    value, total = float((weight * right).sum() / weight.sum()), float(weight.sum())
    names = sorted(set(groups))
    place = torch.tensor([names.index(g) for g in groups])
    residual = torch.zeros(len(names), dtype=torch.float64).index_add(0, place, weight * (right - value))
    effect = max(1.0, total / len(names))
    if 0 < value < 1 and len(names) > 1:
        variance = len(names) / (len(names) - 1) * float(residual.square().sum()) / total**2
        effect = max(1.0, variance / (value * (1 - value) / total))
    return wilson(value, total / effect)


def resampled(values: Tensor, weight: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """95 % percentile intervals of weighted means over rows of values (n,C), by a bootstrap over groups."""
    names = sorted(set(groups))
    place = torch.tensor([names.index(g) for g in groups])
    sums = torch.zeros(len(names), values.shape[1], dtype=torch.float64).index_add(0, place, weight[:, None] * values)
    sizes = torch.zeros(len(names), dtype=torch.float64).index_add(0, place, weight)
    return bootstrap(lambda rows: sums[rows].sum(0) / sizes[rows].sum(), len(names), resamples=RESAMPLES)


def held_out_logits(design: Design, keys: Sequence[Keys], of: Folds, precision: float) -> Tensor:
    """Logits (n,) of each pair without its fold; NaN where nothing is left to learn from.

    Up to NESTED pairs the prior is chosen anew inside each fold, so that no choice has a part in its own prediction.
    """
    found = torch.full((len(design),), math.nan, dtype=torch.float64)
    nested = len(design) <= NESTED and of.level != "pair"
    for train, test in of.parts:
        if len(train) < 2:
            continue
        if nested:
            inner = folds([keys[i] for i in train.tolist()], INNER, "inner")
            parts = [(train[a], train[b]) for a, b in inner.parts]
            precision = best_precision(design, parts)
        found[test] = design.logits(design.fitted(precision, train), test)
    return found


@dataclass(frozen=True)
class Curve:
    """Agreement by the number of choices learnt from, and what more of them would give."""

    points: list[tuple[float, float]]
    doubled: Share
    """Extrapolated agreement with twice the choices."""
    gain: Share
    """What the second half of those adds."""
    fourfold: Share

    @property
    def sentence(self) -> str:
        """What to do."""
        if self.gain.low > 0.005:
            return f"twice as many choices would raise agreement by {_points(self.gain)} to about {self.doubled.value:.2f}"
        if self.gain.high < 0.02:
            return "no more choices would help: twice as many would raise agreement by less than 0.02"
        return f"whether more choices would help is not clear: twice as many would change agreement by {_points(self.gain)}"


def _points(share: Share) -> str:
    return f"{share.value:+.2f} [{share.low:+.2f}, {share.high:+.2f}]"


def learning_curve(design: Design, of: Folds, precision: float) -> Curve | None:
    """Heads of parts of each fold's training choices, and agreement = a − b/√m through their means by least squares.

    The exponent is an assumption; intervals are bootstraps over groups and hold what the test choices leave open, not it. λ stays that
    of all choices: it is a property of the person. None where the choices are too few for a curve.
    """
    sizes = torch.zeros(len(FRACTIONS), dtype=torch.float64)
    right = torch.full((len(design), len(FRACTIONS)), math.nan, dtype=torch.float64)
    for number, (train, test) in enumerate(of.parts):
        if len(train) < 8:
            continue
        for column, fraction in enumerate(FRACTIONS):
            wanted, hits = max(2, round(fraction * len(train))), list[Tensor]()
            for repeat in range(REPEATS if fraction < 1 else 1):
                chosen = train[torch.randperm(len(train), generator=generator("curve", number, column, repeat))[:wanted]]
                hits.append(correct(design.logits(design.fitted(precision, chosen), test)))
            right[test, column] = torch.stack(hits).mean(0)
            sizes[column] += wanted * len(test)
    known = right.isfinite().all(1) & (design.outcome != 0.5)
    if known.sum() < 8:
        return None
    sizes = sizes / right.isfinite().all(1).sum()
    weight, groups = design.weight[known], [g for g, k in zip(of.groups, known.tolist()) if k]
    targets = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) * len(design)

    line = torch.stack([torch.ones_like(sizes), -sizes.rsqrt()], 1)
    solve = torch.linalg.pinv(line).T @ torch.stack([torch.ones_like(targets), -targets.rsqrt()])  # (sizes, targets): linear in the points
    wanted = torch.cat([solve[:, 1:2], solve[:, 1:2] - solve[:, 0:1], solve[:, 2:3]], 1)
    values = right[known] @ wanted
    low, high = resampled(values, weight, groups)
    middle = (weight[:, None] * values).sum(0) / weight.sum()
    shares = [Share(*map(float, row)) for row in zip(middle, low, high)]
    means = (weight[:, None] * right[known]).sum(0) / weight.sum()
    doubled, gain, fourfold = shares
    return Curve(list(zip(sizes.tolist(), means.tolist())), _clamped(doubled), gain, _clamped(fourfold))


def _clamped(share: Share) -> Share:
    return Share(*(min(1.0, max(0.0, value)) for value in (share.value, share.low, share.high)))
