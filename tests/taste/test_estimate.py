"""Intervals of choices that share images."""

from __future__ import annotations

import pytest
import torch
from helpers.taste import compare

from trainer.metrics.intervals import student
from trainer.taste.comparisons import once
from trainer.taste.estimate import Units, agreement, means, wilson
from trainer.taste.folds import Keys, folds


def grouped(groups):
    return Units(torch.tensor(list(groups))[:, None])


def test_intervals_of_agreement():
    share = wilson(0.8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=5e-4)  # tables of Wilson's interval
    right = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0, 1, 1] * 2, dtype=torch.float64)
    few = (1.959964 / 2.093024) ** 2  # Student's t with 19 degrees of freedom, from tables
    alone = agreement(right, torch.ones(20).double(), grouped(range(20)))
    assert (alone.low, alone.high) == pytest.approx((wilson(0.7, 19 * few).low, wilson(0.7, 19 * few).high), abs=1e-4)
    twins = agreement(right.sort().values, torch.ones(20).double(), grouped(i // 4 for i in range(20)))  # fours that agree: about five
    assert twins.high - twins.low > 1.4 * (alone.high - alone.low)
    sure = agreement(torch.ones(40).double(), torch.ones(40).double(), grouped(i // 8 for i in range(40)))  # five prompts
    assert (sure.value, sure.low) == pytest.approx((1.0, wilson(1.0, 5 * (1.959964 / 2.776) ** 2).low), abs=1e-4)
    assert agreement(right, torch.ones(20).double(), grouped(range(20)), 7.0) == wilson(0.7, 7.0)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (9, 2.262), (10, 2.2281), (15, 2.1314), (30, 2.0423), (200, 1.9719)])
def test_quantiles_of_students_distribution_are_those_of_tables(freedom, value):
    assert student(freedom) == pytest.approx(value, abs=1e-3)


def test_pairs_with_a_common_image_are_dependent_and_the_variance_is_the_double_sum_over_them():
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (0, 3), (0, 1), (5, 4)]
    residuals = torch.tensor([0.6, 0.4, -0.2, -0.5, 0.3, 0.1, -0.1], dtype=torch.float64)
    units = Units(torch.tensor(pairs))
    wanted = sum(float(a * b) for p, a in zip(pairs, residuals) for q, b in zip(pairs, residuals) if set(p) & set(q))
    assert len(units) == 6 and float(units.variance(residuals[:, None])) == pytest.approx(6 / 5 * wanted)
    (mean,) = means(residuals[:, None], torch.ones(7).double(), units)
    assert mean.value == pytest.approx(float(residuals.mean())) and mean.high - mean.value == pytest.approx(mean.value - mean.low)


def test_a_choice_that_is_made_a_hundred_times_counts_once():
    pairs = [(f"{i % 7}", f"{10 + i % 5}") for i in range(30)]
    judged = [compare(*pair, "one prompt") for pair in pairs + [("10", "0")] * 100]
    keys = [one.keys for one in judged]
    found = folds(keys)
    assert found.level == "pair" and len(set(found.groups)) == 30
    weights = torch.tensor([one.weight for one in once(judged)], dtype=torch.float64)
    right, units = torch.tensor([1.0, 0] * 15 + [1.0] * 100, dtype=torch.float64), Units.of(found, keys)
    assert float(weights.sum()) == pytest.approx(30) and agreement(right, weights, units).low < 0.5
    assert len(units) == 12
    once_each = agreement(right[:30], torch.ones(30).double(), Units.of(folds(keys[:30]), keys[:30]))
    assert agreement(torch.ones(130).double(), weights, units).low < once_each.high


def test_units_are_the_groups_of_folds_or_the_images():
    keys = [Keys(f"p{i // 3}", (2 * i, 2 * i + 1)) for i in range(60)]
    assert len(Units.of(folds(keys), keys)) == 20
