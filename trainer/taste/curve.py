"""How agreement goes on with more choices: heads of parts of them, and an extrapolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rng import generator
from .agreement import correct
from .chance import INFLATION
from .estimate import Estimate, Units, means
from .folds import Folds
from .head import Design

FRACTIONS, REPEATS = (0.25, 0.5, 0.75, 1.0), 4  # of a fold's training choices in the learning curve, and subsets of each size


@dataclass(frozen=True)
class Curve:
    """Agreement by the number of choices learnt from, and what more of them would give."""

    points: list[tuple[float, float]]
    doubled: Estimate
    """Extrapolated agreement with twice the choices."""
    gain: Estimate
    """What the second half of those adds."""
    fourfold: Estimate

    @property
    def sentence(self) -> str:
        """What to do."""
        if self.gain.low > 0.005:
            return f"twice as many choices would raise agreement by {self.gain.signed} to about {self.doubled.value:.2f}"
        if self.gain.high < 0.02:
            return "no more choices would help: twice as many would raise agreement by less than 0.02"
        return f"whether more choices would help is not clear: twice as many would change agreement by {self.gain.signed}"


def learning_curve(design: Design, of: Folds, units: Units, counted: Tensor, fit: Callable[[Tensor], Tensor]) -> Curve | None:
    """Heads `fit(rows)` (r,) of parts of each fold's training choices, and agreement = a − b/√m through their means by least squares.

    Parts are drawn by groups, so that choices that share images or a prompt stay together. counted (n,) bool: whose agreement is meant. The
    exponent is an assumption, which the intervals leave out. λ stays that of all choices: it is a property of the person. None where the
    choices are too few for a curve.
    """
    sizes = torch.zeros(len(FRACTIONS), dtype=torch.float64)
    right = torch.full((len(design), len(FRACTIONS)), math.nan, dtype=torch.float64)
    for number, (train, test) in enumerate(of.parts):
        if len(train) < 8:
            continue
        for column, fraction in enumerate(FRACTIONS):
            hits = list[Tensor]()
            for repeat in range(REPEATS if fraction < 1 else 1):
                chosen = train[_part([of.groups[i] for i in train.tolist()], fraction, (number, column, repeat))]
                hits.append(correct(design.logits(fit(chosen), test)))
                sizes[column] += len(chosen) * len(test) / (REPEATS if fraction < 1 else 1)
            right[test, column] = torch.stack(hits).mean(0)
    tested = right.isfinite().all(1)
    known = tested & (design.outcome != 0.5) & counted
    if known.sum() < 8:
        return None
    sizes = sizes / tested.sum()
    targets = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) * len(design)

    line = torch.stack([torch.ones_like(sizes), -sizes.rsqrt()], 1)
    solve = torch.linalg.pinv(line).T @ torch.stack([torch.ones_like(targets), -targets.rsqrt()])  # (sizes, targets): linear in the points
    wanted = torch.cat([solve[:, 1:2], solve[:, 1:2] - solve[:, 0:1], solve[:, 2:3]], 1)
    weight, mine = design.weight[known], units.where(known)
    doubled, gain, fourfold = means(right[known] @ wanted, weight, mine, inflation=INFLATION)
    points = weight @ right[known] / weight.sum()
    return Curve(list(zip(sizes.tolist(), points.tolist())), _clamped(doubled), gain, _clamped(fourfold))


def _part(groups: Sequence[int], fraction: float, key: tuple[int, int, int]) -> Tensor:
    """Places of the rows of whole groups, in random order, until there are enough."""
    wanted, places = max(2, round(fraction * len(groups))), dict[int, list[int]]()
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    order, found = list(places.values()), list[int]()
    for i in torch.randperm(len(order), generator=generator("curve", *key)).tolist():
        if len(found) < wanted:
            found += order[i]
    return torch.tensor(sorted(found))


def _clamped(found: Estimate) -> Estimate:
    return Estimate(*(min(1.0, max(0.0, value)) for value in (found.value, found.low, found.high)))
