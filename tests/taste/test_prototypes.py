"""Several people."""

from __future__ import annotations

import pytest
import torch
from helpers.taste import random_design
from torch.nn import functional as F

from trainer.taste.agreement import correct
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, best_precision
from trainer.taste.prototypes import fit_mixture


def two_people():
    """Features, rows of the better and worse image, keys, and whether bob chose."""
    features, better, worse, _ = random_design(60, torch.tensor([4.0, -3, 0, 0, 0, 0], dtype=torch.float64))
    return features, better, worse, [Keys(str(i), (i, 1000 + i)) for i in range(60)], torch.arange(60) % 2 == 0


def test_two_people_of_opposite_tastes_are_two_prototypes():
    features, better, worse, keys, bob = two_people()
    design = Design.of(features, torch.where(bob, worse, better), torch.where(bob, better, worse), torch.zeros(60) > 0, torch.ones(60))
    found = fit_mixture(design, ["bob" if one else "ann" for one in bob], folds(keys, 3))
    assert best_precision(design, folds(keys, 3).parts) >= 3 > 0.3 >= found.precision  # the λ of one head for both hides them
    assert found.summary.prototypes == 2 and found.summary.loss[1] < found.summary.loss[0] - 0.1
    heads = torch.stack([found.of("ann"), found.of("bob")])
    assert float(F.cosine_similarity(heads[:1], heads[1:])) < 0
    right = (design.logits(found.of("ann"), (~bob).nonzero()[:, 0]) > 0).double().mean()
    assert right > 0.8
    judged, mean = design.outcome != 0.5, correct(found.held_out_mean)
    written = float(correct(design.logits(found.mean, torch.arange(60)))[judged].mean())
    # the mean of opposite people predicts neither: its agreement is reported where it is the head that is written
    assert (
        float(correct(found.held_out)[judged].mean()) > 0.7 > float(mean[judged].mean()) and abs(float(mean[judged].mean()) - written) < 0.2
    )


@pytest.mark.full
def test_two_people_of_one_taste_are_one_prototype():
    features, better, worse, keys, bob = two_people()
    design = Design.of(features, better, worse, torch.zeros(60) > 0, torch.ones(60))
    assert fit_mixture(design, ["bob" if one else "ann" for one in bob], folds(keys)).summary.prototypes == 1
