"""The head: its optimum, its prior, ties."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.taste import random_design, random_features
from torch.nn import functional as F

from trainer.rng import generator
from trainer.taste.folds import Keys, folds
from trainer.taste.head import PRECISIONS, Design, best_precision


def test_newton_reaches_the_optimum_of_the_formula_written_out_over_all_columns():
    features, better, worse, design = random_design(ties=(3, 7))
    theta = (design.basis @ design.fitted(2.0)).requires_grad_()
    score, image, met = (
        features.score / design.scales[0],
        features.image / design.scales[1],
        features.image * features.text / design.scales[2],
    )
    reward = (1 + theta[0]) * score + image @ theta[1:7] + met @ theta[7:]
    logit = reward[better] - reward[worse]
    outcome = torch.ones(40).double()
    outcome[[3, 7]] = 0.5
    loss = F.binary_cross_entropy_with_logits(logit, outcome, reduction="sum") + theta.square().sum()  # λ/2 = 1
    (gradient,) = torch.autograd.grad(loss, theta)
    assert float(gradient.abs().max()) < 1e-8
    scales = [float((columns[better] - columns[worse]).square().sum(1).mean()) for columns in (score[:, None], image, met)]
    assert scales == pytest.approx([1, 1, 1], abs=1e-9)  # each block has the unit of the prior


def test_without_choices_and_under_an_endless_prior_the_head_is_the_tower():
    _, _, _, design = random_design()
    for beta in (design.fitted(math.inf), design.fitted(1.0, torch.arange(0))):
        assert torch.equal(design.logits(beta, torch.arange(40)), design.offset)
    weak, strong = (float(design.fitted(precision).norm()) for precision in (0.1, 300.0))
    assert weak > 10 * strong


def test_a_tie_says_the_same_in_either_order():
    features = random_features(20)
    a, b, ties = torch.arange(10), torch.arange(10) + 10, torch.tensor([True] * 4 + [False] * 6)
    one = Design.of(features, a, b, ties, torch.ones(10))
    other = Design.of(features, torch.where(ties, b, a), torch.where(ties, a, b), ties, torch.ones(10))
    assert torch.allclose(one.basis @ one.fitted(1.0), other.basis @ other.fitted(1.0), atol=1e-9)


def test_choices_that_are_the_towers_own_keep_it_and_another_taste_does_not():
    keys = [Keys(str(i), (i, 1000 + i)) for i in range(120)]
    taste = torch.tensor([3.0, -2, 0, 0, 0, 0], dtype=torch.float64)
    _, _, _, clear = random_design(120, taste)
    assert best_precision(clear, folds(keys).parts) < 1
    features, first, second, design = random_design(120)
    likes = torch.rand(120, generator=generator("toss")) < torch.sigmoid(design.offset)
    better, worse = torch.where(likes, first, second), torch.where(likes, second, first)
    noise = Design.of(features, better, worse, torch.zeros(120) > 0, torch.ones(120))
    assert best_precision(noise, folds(keys).parts) >= 30 and PRECISIONS[-1] == math.inf
