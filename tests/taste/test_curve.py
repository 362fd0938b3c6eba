"""How agreement goes on with more choices."""

from __future__ import annotations

import pytest
import torch
from helpers.taste import random_design

from trainer.taste.curve import learning_curve
from trainer.taste.estimate import Units
from trainer.taste.folds import Keys, folds


def test_the_curve_of_a_clear_taste_rises():
    _, _, _, design = random_design(200, torch.tensor([3.0, -2, 1, 0, 0, 0], dtype=torch.float64))
    keys = [Keys(f"{i // 2}", (i, 1000 + i)) for i in range(200)]
    of, asked = folds(keys), list[set[int]]()

    def fit(rows):
        asked.append(set(rows.tolist()))
        return design.fitted(0.3, rows)

    curve = learning_curve(design, of, Units.of(of, keys), torch.ones(200) > 0, fit)
    assert all((i ^ 1) in rows for rows in asked for i in rows)  # two choices of one prompt stay together
    assert curve.points[0][1] < curve.points[-1][1] and curve.points[-1][0] == pytest.approx(180)
    assert curve.gain.low <= curve.gain.value <= curve.gain.high and 0 <= curve.fourfold.high <= 1
