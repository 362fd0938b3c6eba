"""DSPO and DMPO against write-ups in the network's own prediction, and their identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.family import STATES, gradient
from helpers.preference import Captioned, both, loss_and_gradient, pairs, written_up

from trainer.objectives import DMPO, DSPO

BASE = STATES["base"]


def margin_by_hand(policy, batch, beta):
    (better, b), (worse, w) = both(policy, batch, batch.chosen), both(policy, batch, batch.rejected)
    return -beta / 2 * ((better - b) - (worse - w))


def dspo_by_hand(policy, settings):
    batch = pairs()
    _, error = written_up(policy, batch, batch.chosen, batch.prompts, policy.weight)
    _, of_base = written_up(policy, batch, batch.chosen, batch.prompts, BASE)
    doubt = 1 / (1 + torch.exp(margin_by_hand(policy, batch, settings.beta)))
    return (error - settings.beta * doubt[:, None, None, None] * (error - of_base)).square().mean((1, 2, 3)).mean()


def dmpo_by_hand(policy, settings):
    batch, q = pairs(), torch.tensor([1 - settings.alpha, settings.alpha])
    p = 1 / (1 + torch.exp(-margin_by_hand(policy, batch, settings.beta)))
    return sum((one * torch.log(one / other)).mean() for one, other in zip((p, 1 - p), q))


WRITTEN = {
    "dspo": (DSPO(beta=0.7, safeguard=False), dspo_by_hand),
    "dmpo": (DMPO(beta=3.0, alpha=0.1, safeguard=False), dmpo_by_hand),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("name", WRITTEN)
def test_loss_and_gradient_are_those_of_the_write_up(name, prediction):
    objective, by_hand = WRITTEN[name]
    loss, found, _ = loss_and_gradient(replace(objective, target="velocity" if prediction == "v" else "model"), pairs(), prediction)
    policy = Captioned(prediction)
    expected = by_hand(policy, objective)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6 if name == "dmpo" else 1e-9, atol=0)
    torch.testing.assert_close(found, gradient(policy, expected), rtol=1e-6, atol=1e-8)
    assert float(found.norm()) > 1e-4


def at_the_base():
    policy = Captioned()
    with torch.no_grad():
        policy.weight.zero_()
    return policy


def test_dspo_begins_with_a_share_of_the_better_images_plain_gradient():
    """At the base model σ(m) = ½ and nothing has moved: the gradient is (1 − β/2)·∇L_w, the loss L_w."""
    policy, batch = at_the_base(), pairs()
    loss, found, _ = loss_and_gradient(DSPO(beta=0.4), batch, policy=policy)
    plain, _ = written_up(policy, batch, batch.chosen, batch.prompts, policy.weight)
    torch.testing.assert_close(loss, plain.mean().detach())
    torch.testing.assert_close(found, 0.8 * gradient(policy, plain.mean()))


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_dmpo_stops_at_the_labels_probability(alpha):
    """KL(p ‖ q) is 0 with no slope at p = 1 − α, falls before and rises after it; at the base model it pulls as half of that distance."""
    settings, zero = DMPO(beta=2.0, alpha=alpha), torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    wanted = math.log((1 - alpha) / alpha)
    worse = torch.tensor([wanted - 0.5, wanted, wanted + 0.5], dtype=torch.float64).reshape(3, 1, 1, 1).sqrt().requires_grad_()
    losses, logs = settings.losses((zero, worse), (zero, zero), 2.0, 1.0)
    slope = torch.autograd.grad(losses.sum(), worse)[0].flatten() / (2 * worse.detach().flatten())  # by the margin, which is worse²
    assert logs["margin"].tolist() == pytest.approx([wanted - 0.5, wanted, wanted + 0.5])
    assert float(losses[1].detach()) == pytest.approx(0, abs=1e-12) and float(slope[1]) == pytest.approx(0, abs=1e-12)
    assert slope[0] < -1e-4 and slope[2] > 1e-4 and bool((losses.detach()[[0, 2]] > 1e-4).all())


@pytest.mark.parametrize("name", WRITTEN)
def test_the_safeguard_scales_the_worse_images_part_alone(name):
    objective, batch = WRITTEN[name][0], pairs()
    plain = loss_and_gradient(objective, batch)
    safe = loss_and_gradient(replace(objective, safeguard=True, mu=1.0), batch)
    assert float(plain[0]) == pytest.approx(float(safe[0]), rel=1e-12) and safe[2]["lambda"].tolist() == [0.0] * 4
    assert float((plain[1] - safe[1]).norm()) > 1e-4
