"""How noise levels are drawn, against the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from helpers.family import Family
from helpers.preference import (
    pairs,
)  # fmt: skip

from trainer.objectives import DiffusionDPO, RunContext
from trainer.objectives.preference.errors import level_weights
from trainer.objectives.shared import error_scale


def test_noise_levels_are_drawn_as_described():
    sigmas = Family().sigmas(999)[:-1].double()
    snr = sigmas**-2
    weights = {name: level_weights(name, "epsilon", sigmas, "ve") for name in ("uniform", "early", "logit-normal", "min-snr", "debiased")}
    torch.testing.assert_close(weights["min-snr"], snr.clamp(max=5) / snr)
    torch.testing.assert_close(weights["debiased"], snr**-0.5)
    assert float(weights["early"][-1] / weights["early"][0]) == pytest.approx(0.9 ** (50 * 998 / 999))
    normal = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([0.1, 0.3, 0.8]).logit())
    cumulative = (weights["logit-normal"].cumsum(0) / weights["logit-normal"].sum())[[99, 299, 799]]
    torch.testing.assert_close(cumulative.float(), normal, atol=2e-3, rtol=0)


@pytest.mark.parametrize("space", ["ve", "flow"])
def test_a_weight_is_one_weight_of_the_prediction_whatever_the_target(space):
    sigmas = (Family().sigmas(50) if space == "ve" else Family("flow").sigmas(50))[:-1]
    for name in ("min-snr", "debiased"):
        of_x0 = [
            level_weights(name, target, sigmas, space) * error_scale(target, sigmas, space).square()
            for target in ("x0", "epsilon", "velocity", "model")
        ]
        assert all(torch.allclose(one, of_x0[0]) for one in of_x0)


def test_drawn_levels_have_the_expected_gradient_of_the_weights():
    """E of an error over the draws = the weighted mean of errors over the grid."""
    policy, objective = Family(), DiffusionDPO(levels="min-snr")
    sigmas = policy.sigmas(999)[:-1]
    drawn = torch.cat([objective.noised(RunContext(policy), pairs(number)).sigma for number in range(150)])
    weights = level_weights("min-snr", "model", sigmas, "ve")
    mean = float((weights * sigmas).sum() / weights.sum())
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / len(drawn) ** 0.5)
