"""What FlowBP and LeapAlign draw for a micro-batch, after an interruption too, and which settings they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.family import batch
from helpers.processes import Asked, log_of, toy_run, trained

from trainer.objectives import OBJECTIVES, FlowBPLagrange, FlowBPSparse


def test_steps_are_drawn_by_their_weights_and_shared_by_a_micro_batch():
    objective, n = FlowBPSparse(steps=6, k=1, late_bias=2.0, trained_from=2), 1500
    drawn = torch.tensor([objective.active(batch(n=1, number=i)) for i in range(n)])[:, 0]
    expected = torch.tensor([0.0, 0, 9, 16, 25, 36]) / 86
    assert ((torch.bincount(drawn, minlength=6) / n - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert objective.active(batch(n=1, number=5)) == objective.active(batch(n=4, number=5))


def test_leaps_have_the_dirichlet_distributions_mean_lengths():
    """25 steps over parameters 2.5, 6 and 2; lengths are rounded, and at least 1."""
    drawn = torch.tensor([FlowBPLagrange().leaps(batch(n=1, number=i)) for i in range(1500)]).double()
    lengths = torch.stack([24 - drawn[:, 1], drawn[:, 1] - drawn[:, 0], drawn[:, 0] + 1], 1)
    assert (lengths.sum(1) == 25).all() and lengths.min() == 1
    shares = torch.tensor([2.5, 6, 2], dtype=torch.float64) / 10.5
    assert (lengths.mean(0) - 25 * shares).abs().max() < 4 * float(lengths.std(0).max()) / 1500**0.5 + 0.1  # lengths of 0 are made 1
    capped = [FlowBPLagrange(longest=4).leaps(batch(n=1, number=i)) for i in range(200)]
    assert min(25 - j for _, j in capped) >= 2 and max(25 - j for _, j in capped) == 4 and all(0 <= k < j for k, j in capped)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flowbp-sparse", {"steps": 5, "k": 6}, "k = 6 active steps of 5: give at most that many"),
        ("flowbp-sparse", {"steps": 5, "k": 3, "trained_from": 3}, "trained_from = 3 of 5 steps: give at most 2"),
        ("flowbp-bridge", {"k": 1}, "k = 1 active step: give at least 2"),
        ("flowbp-lagrange", {"concentration": (1.0, 0.0, 1.0)}, "three numbers above 0"),
        ("flowbp-lagrange", {"longest": 1}, "longest = 1: the second leap has two steps at least"),
        ("leapalign", {"steps": 2}, "steps = 2"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**settings)


@pytest.mark.parametrize("name", ["flowbp-sparse", "flowbp-bridge", "flowbp-lagrange", "leapalign"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(name, tmp_path):
    """In the middle of a step between two checkpoints: its draws belong to the micro-batch, not to a generator's state."""

    def cut(call):
        if call == 13:
            raise OSError("power cut")

    whole = trained(name, tmp_path / "whole")
    run = toy_run(name, tmp_path / "cut", reward=Asked(cut))
    run.open_folder(overwrite=False, resume=False)
    with pytest.raises(OSError, match="power cut"):
        list(run.steps())
    again = trained(name, tmp_path / "cut", resume=True)
    assert torch.equal(again["weight"], whole["weight"]) and log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
