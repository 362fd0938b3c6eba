"""Agreement by chance: permuted features."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.taste import random_design

from trainer.taste.agreement import by_chance, correct, held_out_logits, measure
from trainer.taste.chance import Chance, exchangeable, permutations
from trainer.taste.estimate import Units
from trainer.taste.folds import Keys, folds
from trainer.taste.head import PRECISIONS


def keys_of(number):
    return [Keys(f"p{i}", (i, number + i)) for i in range(number)]


def null_of(features, better, worse, design, of):
    number = len(design)
    names = [f"{i}" for i in range(2 * number)]
    return by_chance(features, better, worse, names, [f"p{i % number}" for i in range(2 * number)], design, of,
                     torch.ones(number) > 0)  # fmt: skip


def test_the_closed_form_is_a_newton_step_from_the_tower_without_the_fold():
    features, better, worse, design = random_design(24, ties=(3,))
    parts = folds(keys_of(24)).parts
    chance = Chance(features, better, worse, design, parts, torch.ones(24) > 0)
    found = chance.held_out((design.reduced @ design.reduced.T)[None], design.offset[None])[0]
    start = torch.sigmoid(design.offset)
    for train, test in parts:
        x, gradient = design.reduced[train], (design.outcome - start)[train]
        curvature = x.T @ (x * (start * (1 - start))[train, None])
        for column, precision in enumerate(PRECISIONS[:-1]):
            beta = torch.linalg.solve(curvature + precision * torch.eye(len(curvature)), x.T @ gradient)
            assert torch.allclose(found[test, column], design.logits(beta, test), atol=1e-9)
    assert torch.equal(found[:, -1], design.offset)


def test_images_of_the_same_prompts_change_places_under_all_of_them():
    images, prompts = ["a", "b", "c", "a", "b", "d", "e"], ["p", "p", "p", "q", "q", "r", "r"]
    sets = exchangeable(images, prompts)
    assert sorted(map(sorted, sets)) == [[[0, 3], [1, 4]], [[2]], [[5], [6]]]
    moved = permutations(sets, 7, 10)
    assert {tuple(row) for row in moved.tolist()} == {
        (*first[:2], 2, *first[2:], *last) for first in ((0, 1, 3, 4), (1, 0, 4, 3)) for last in ((5, 6), (6, 5))
    }


def test_of_independent_pairs_a_tower_is_a_coin_and_a_head_varies_more():
    features, better, worse, design = random_design(40)
    null = null_of(features, better, worse, design, folds(keys_of(40)))
    assert null.shape == (199, 2) and null.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    coin = 0.5 / math.sqrt(40)
    assert (
        float(null[:, 1].std()) == pytest.approx(coin, rel=0.15) and 1.05 * coin < float(null[:, 0].std()) < 1.5 * coin
    )  # up to √(1 + 2/π)


def test_a_head_is_trusted_where_chance_does_not_do_as_well():
    everything, keys = torch.ones(40) > 0, keys_of(40)
    of = folds(keys)
    for taste, trusted in ((torch.tensor([8.0, -5, 0, 0, 0, 0], dtype=torch.float64), True), (None, False)):
        features, better, worse, design = random_design(40, taste)
        held = held_out_logits(design, keys, of, 1.0)
        found = measure(held, design, Units.of(of, keys), everything, null_of(features, better, worse, design, of))
        assert found.head.value == pytest.approx(float(correct(held).mean()))
        assert (found.head.low > 0.5, found.chance <= 0.025) == (trusted, trusted), found
