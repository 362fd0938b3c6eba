"""The unit of ImageReFL's diffusion weight: the same gradient, up to its scale, however the reward is normalised."""

from __future__ import annotations

import pytest
import torch
from helpers.family import Family, Towers, batch, gradient
from helpers.losses import loss_of

from trainer.config import build
from trainer.objectives import ImageReFL, RunContext
from trainer.rewards.base import RewardModel
from trainer.rewards.registry import load, load_reward
from trainer.rewards.weighted import RewardSpec, WeightedSum

MEAN, STD = 0.26, 0.025
SMALL = {"steps": 6, "grad_from": 3, "grad_to": 5, "start_from": 2, "start_to": 4, "refl_share": 0.0}


class Raw(RewardModel):
    """A smooth reward with the scale of a cosine."""

    def __init__(self, std=None):
        super().__init__()
        self.std = std

    def forward(self, images, prompts):
        return MEAN + STD * Towers()(images, prompts)


def spec(std=STD, weight=1.0):
    return RewardSpec("cosine", Raw(std), weight, None if std is None else MEAN, std)


def weighted(objective, reward):
    policy = Family()
    loss, _ = loss_of(objective, policy, batch(), reward)
    return gradient(policy, loss)


@pytest.mark.parametrize("reward_weight", [1.0, 0.1])
def test_a_raw_weight_has_the_official_balance_with_either_reward(reward_weight):
    raw = ImageReFL(**SMALL, diffusion_weight=0.01, diffusion_weight_unit="raw", reward_weight=reward_weight)
    official = ImageReFL(**SMALL, diffusion_weight=0.01, reward_weight=reward_weight)
    expected = weighted(official, spec().reward)  # −w·r + 0.01·MSE, r raw
    torch.testing.assert_close(weighted(raw, spec().reward), expected)
    torch.testing.assert_close(STD * weighted(raw, spec().standardised), expected)
    assert float((STD * weighted(official, spec().standardised) - expected).norm() / expected.norm()) > 1e-3  # without the unit it differs


def test_a_weight_in_standard_deviations_has_one_balance_with_either_reward():
    deviations, plain = (ImageReFL(**SMALL, diffusion_weight=0.3, diffusion_weight_unit=unit) for unit in ("sd", None))
    expected = weighted(plain, spec().standardised)  # −z + 0.3·MSE
    torch.testing.assert_close(weighted(deviations, spec().standardised), expected)
    torch.testing.assert_close(weighted(deviations, spec().reward) / STD, expected)


@pytest.mark.parametrize(
    ("unit", "reward", "weight"),
    [
        (None, spec().reward, 0.2),
        (None, spec(std=None).reward, 0.2),
        ("raw", spec(std=None).reward, 0.2),
        ("raw", Towers(), 0.2),  # which says nothing of its scale: raw
        ("raw", spec().standardised, 0.2 / STD),
        ("raw", WeightedSum([spec(weight=2.0)]), 0.2 / STD),
        ("raw", WeightedSum([spec(), spec()], raw=True), 0.2),
        ("sd", spec().standardised, 0.2),
        ("sd", spec().reward, 0.2 * STD),
        ("sd", WeightedSum([spec(), spec()]), 0.2),
        ("sd", WeightedSum([spec(weight=2.0)], raw=True), 0.2 * STD),
    ],
)
def test_the_weight_in_the_unit_of_the_scores(unit, reward, weight):
    assert ImageReFL(diffusion_weight=0.2, diffusion_weight_unit=unit).weight_beside(reward) == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(
    ("unit", "reward", "message"),
    [
        ("sd", spec(std=None).reward, "diffusion_weight_unit = sd: the reward has no measured standard deviation"),
        ("sd", Towers(), "rewards calibrate"),
        ("sd", WeightedSum([spec(), spec()], raw=True), "no measured standard deviation"),
        ("raw", WeightedSum([spec(), spec()]), "a sum of standardised rewards has no raw unit"),
    ],
)
def test_a_unit_that_the_reward_does_not_have_is_refused_before_training(unit, reward, message):
    with pytest.raises(ValueError, match=message) as refused:
        ImageReFL(diffusion_weight_unit=unit).check(RunContext(Family(), reward))
    assert "\n" not in str(refused.value)
    ImageReFL(diffusion_weight_unit=unit, diffusion_weight=0.0).check(RunContext(Family(), reward))


def test_rewards_by_name_know_their_scale_whether_standardised_or_not():
    part = load("demo-proxy")
    assert part.std is not None and part.std > 0
    for standardise in (True, False):
        reward = load_reward("demo-proxy", standardise)
        assert (reward.standardised, reward.std) == (standardise, part.std)
    assert load_reward("demo-proxy=1, demo-heldout=1", True).std is None


def test_configs_without_the_key_are_as_before():
    assert build(ImageReFL, {}).diffusion_weight_unit is None and build(ImageReFL, {"diffusion_weight_unit": "none"}) == ImageReFL()
    assert build(ImageReFL, {}).refl_diffusion is False
    with pytest.raises(ValueError, match="use one of raw, sd"):
        build(ImageReFL, {"diffusion_weight_unit": "z"})
