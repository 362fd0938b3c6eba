"""Gain at a share of the base's diversity, by hand."""

from __future__ import annotations

import pytest

from trainer.metrics.frontier import Curves, best_gain


def constant_points(gains, shares, prompts=8):
    """Points at which every prompt has the same figures; gains and shares by model and switch."""
    points = {"base|0": (0.0, 1.0)}
    for model, values in gains.items():
        points |= {f"{model}|{k}": (gain, shares[model][i]) for i, (k, gain) in enumerate(values.items())}
    axes = ("heldout", "gold", "reward")
    return {name: {**{a: [gain] * prompts for a in axes}, "diversity": [0.5 * share] * prompts} for name, (gain, share) in points.items()}


def test_the_best_gain_at_a_share_of_diversity_lies_on_lines_between_switches():
    assert best_gain([(0.5, 2.0), (0.9, 1.0), (1.0, 0.0)], 0.85) == pytest.approx(1.0 + 0.05 / 0.4)
    assert best_gain([(0.9, 2.0), (0.95, 1.0), (1.0, 0.0)], 0.85) == 2.0  # never below: the highest point
    assert best_gain([(0.5, -1.0), (0.9, -0.5), (1.0, 0.0)], 0.85) == 0.0  # nothing better than the base


def test_leads_and_equal_proxy_follow_the_curves_by_hand():
    curves = Curves(constant_points({"a": {0: 2.0, 12: 1.0}, "b": {0: 1.6, 12: 1.2}}, {"a": (0.5, 0.9), "b": (0.6, 0.95)}))
    theirs, ours = 1.0 + 0.05 / 0.4, 1.2 + 0.10 / 0.35 * 0.4
    assert curves.lead(["b"], ["a"], "gold") == pytest.approx((ours - theirs,) * 3)
    assert curves.interval("a|12", "gold") == (1.0, 1.0, 1.0)
    assert curves.interval("b|0", "diversity") == pytest.approx((0.6, 0.6, 0.6))
    equal = curves.at_equal_proxy("b", "a", 12)  # b has a's proxy of 1.0 a sixth of the way from k = 12 to the base
    assert equal["gold"] == pytest.approx(0.0) and equal["diversity"] == pytest.approx(0.95 + 0.05 / 6 - 0.9)
