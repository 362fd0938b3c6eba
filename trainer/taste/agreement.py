"""How often a head predicts choices it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .chance import INFLATION, LARGEST, Chance, exchangeable, permutations
from .estimate import Estimate, Units, agreement, means
from .folds import Folds, Keys, folds
from .head import Design, Features, best_precision, best_without, out_of_fold

NESTED = 400  # comparisons up to which the prior is chosen anew inside each fold
INNER = 5  # folds of that choice
FEWEST_TESTED = 8
ALPHA = 0.025


def correct(logits: Tensor) -> Tensor:
    """1 for a positive logit of the preferred image, 0 for a negative one, ½ for none."""
    return (logits > 0).double() + (logits == 0).double() / 2


def held_out_logits(design: Design, keys: Sequence[Keys], of: Folds, precision: float) -> Tensor:
    """Logits (n,) of each pair without its fold; NaN where nothing is left to learn from.

    Up to NESTED pairs the prior is chosen anew inside each fold, so that no choice has a part in its own prediction; where pairs are left
    out alone, it is the best one for the other pairs.
    """
    if of.level == "pair" and len(design) <= NESTED:
        logits = out_of_fold(design, of.parts)
        losses = design.weight[:, None] * (F.softplus(logits) - design.outcome[:, None] * logits)
        return logits.gather(1, best_without(losses, of.parts)[:, None])[:, 0]
    found = torch.full((len(design),), math.nan, dtype=torch.float64)
    nested = len(design) <= NESTED
    for train, test in of.parts:
        if len(train) < 2:
            continue
        if nested:
            inner = folds([keys[i] for i in train.tolist()], INNER, "inner", of.level)
            parts = [(train[a], train[b]) for a, b in inner.parts]
            precision = best_precision(design, parts)
        found[test] = design.logits(design.fitted(precision, train), test)
    return found


@dataclass(frozen=True)
class Agreement:
    """What held-out choices say of a head, beside its tower."""

    head: Estimate | None
    """None where fewer than FEWEST_TESTED choices could be held out."""
    tower: Estimate
    gain: Estimate | None
    """Head less tower."""
    chance: float | None
    """How often permuted features do as well as the head, a one-sided p-value; None where it was not computed."""


def measure(held: Tensor, design: Design, units: Units, counted: Tensor, null: Tensor | None) -> Agreement:
    """held (n,): logits of each pair without its fold; counted (n,) bool: whose agreement is meant; null (B,2): `by_chance`.

    The head is trusted, that is, its interval lies above ½, only where chance does as well in less than ALPHA of the permutations.
    """
    judged = (design.outcome != 0.5) & counted
    tested = judged & held.isfinite()
    enough = int(tested.sum()) >= FEWEST_TESTED
    number = float(design.weight[judged].sum())
    limits = [number / INFLATION, number] if null is None else (0.25 / (null - 0.5).square().mean(0).clamp(min=1e-9)).tolist()
    shown = tested if enough else judged
    alone = agreement(correct(design.offset[shown]), design.weight[shown], units.where(shown), limits[1])
    if not enough:
        return Agreement(None, alone, None, None)
    right, weight, mine = correct(held[tested]), design.weight[tested], units.where(tested)
    head, chance = agreement(right, weight, mine, limits[0]), None
    if null is not None:
        chance = (1 + int((null[:, 0] >= head.value - 1e-9).sum())) / (1 + len(null))
        head = head if chance <= ALPHA else replace(head, low=min(head.low, 0.5))
    least = 0.0 if null is None else float((null[:, 0] - null[:, 1]).square().mean().sqrt())
    (gain,) = means((right - correct(design.offset[tested]))[:, None], weight, mine, least, INFLATION if null is None else 1.0)
    return Agreement(head, alone, replace(gain, low=max(-1.0, gain.low), high=min(1.0, gain.high)), chance)


def by_chance(
    features: Features,
    better: Tensor,
    worse: Tensor,
    images: Sequence[str],
    prompts: Sequence[str],
    design: Design,
    of: Folds,
    counted: Tensor,
) -> Tensor | None:
    """Agreement (B,2) of heads and of the tower with permuted features (`chance`); None above LARGEST choices.

    images, prompts: of the rows of features; better, worse: (n,) rows.
    """
    if len(design) > LARGEST:
        return None
    rows = permutations(exchangeable(images, prompts), len(images), len(design))
    return Chance(features, better, worse, design, of.parts, counted).agreement(rows)
