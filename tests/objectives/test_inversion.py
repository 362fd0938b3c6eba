"""InPO and SmPO: inversion in the network's own coordinates, the loss at the noise that it finds, and labels softened by a reward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from helpers.family import STATES, Family, Towers, as4, gradient
from helpers.preference import PROMPTS, pairs

from trainer.objectives import InPO, RunContext, SmPO
from trainer.objectives.preference.inversion import inverted
from trainer.rng import Rng
from trainer.sampling import end_of, trajectory


def noise_of_step(i):
    return torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def inverted_by_hand(policy, x0, sigma, steps, renoise, eta):
    """One image at a time: DDIM's update in variance-preserving coordinates, Euler's in flow coordinates."""
    found = []
    for clean, end in zip(x0, sigma.tolist()):
        levels = [0.0, *(s for s in policy.sigmas(steps).flip(0).tolist() if 0 < s < end), end]
        flow, x, row = policy.prediction == "flow", clean[None], len(found)
        for i, (low, high) in enumerate(pairwise(levels)):
            a, b = ((1 + s * s) ** -0.5 for s in (low, high))
            if eta and i:
                # the ancestral step from `high` down to `low`: of variance β̃ = (1 − ᾱ_low)/(1 − ᾱ_high)·(1 − ᾱ_high/ᾱ_low)
                ratio = (1 - high) * low / ((1 - low) * high) if flow else low / high
                std = low * (1 - ratio**2) ** 0.5 if flow else ((1 - a * a) / (1 - b * b) * (1 - b * b / (a * a))) ** 0.5
                x = x + eta * std * noise_of_step(i)[row : row + 1]

            def predicted(x, high=high, b=b):
                out = policy.network(x, torch.tensor([high], dtype=torch.float64), policy.weight.detach())
                return out if policy.prediction != "v" else b * out + b * high * x

            def moved(x, out, a=a, b=b, low=low, high=high, flow=flow):
                return x + (high - low) * out if flow else b * (x - low * a * out) / a + high * b * out

            out = predicted(x)
            if renoise:
                out = (out + predicted(moved(x, out))) / 2
            x = moved(x, out)
        found.append((x - (1 - end) * clean) / end if flow else (x * (1 + end * end) ** 0.5 - clean) / end)
    return torch.cat(found)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize(("renoise", "eta"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_the_noise_found_is_that_of_the_write_up(prediction, renoise, eta):
    policy, batch = Family(prediction), pairs()
    sigma = policy.sigmas(999)[[3, 400, 800, 998]]
    noise_at = (lambda i: eta * noise_of_step(i)) if eta else None
    found = inverted(policy, batch.chosen, PROMPTS, sigma, 7, renoise, noise_at)
    torch.testing.assert_close(found, inverted_by_hand(policy, batch.chosen, sigma, 7, renoise, eta), rtol=1e-9, atol=1e-9)
    assert not found.requires_grad


def returned(policy, batch, steps, renoise):
    """Distance of images from what the sampler makes of the states to which they were inverted."""
    sigma = policy.sigmas(400)[:1].expand(4)
    found = inverted(policy, batch.chosen, PROMPTS, sigma, steps, renoise, None)
    with torch.no_grad():
        x = policy.add_noise(batch.chosen, found, sigma)
        steps_back = trajectory(policy.denoiser(PROMPTS), x, policy.sigmas(400), lambda i: x, "ddim", space=policy.space)
        return float((end_of(x, steps_back) - batch.chosen).abs().max())


def test_sampling_returns_from_the_state_that_an_inversion_found():
    """The error falls with the steps, and with ReNoise: 0.56, 0.09 and 0.04 at 20 and 400 steps, and at 400 with ReNoise."""
    policy, batch = Family(), pairs()
    few, many, refined = (returned(policy, batch, steps, renoise) for steps, renoise in ((20, False), (400, False), (400, True)))
    assert many < few / 5 and refined < many and many < 0.1, (few, many, refined)


def test_inpo_is_diffusion_dpo_at_the_noise_found():
    objective, policy, batch = InPO(beta=3.0, inversion_steps=5, inversion_noise=0.0), Family(), pairs()
    loss, _ = objective.begin(RunContext(policy))(batch)
    sigma = policy.sigmas(999)[(batch.rng.uniform("noise level") * 999).floor().long()]

    def error(x0, weight):
        noise = inverted_by_hand(policy, x0, sigma, 5, False, 0.0)
        a, s = as4((1 + sigma.square()).rsqrt(), x0), as4(sigma, x0)
        return (policy.network(a * (x0 + s * noise), sigma, weight) - noise).square().mean((1, 2, 3))

    better, worse = ((error(x0, policy.weight), error(x0, STATES["base"])) for x0 in (batch.chosen, batch.rejected))
    expected = torch.log(1 + torch.exp(1.5 * ((better[0] - better[1]) - (worse[0] - worse[1])))).mean()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-6, atol=1e-10)


def test_noise_of_an_inversion_belongs_to_the_sample_and_differs_between_its_images():
    policy, batch, seen = Family(), pairs(), []
    objective = InPO(inversion_steps=3, inversion_noise=0.5)
    for rows in (slice(0, 4), slice(1, 3)):
        part = replace(
            batch, prompts=batch.prompts[rows], chosen=batch.chosen[rows], rejected=batch.chosen[rows], rng=Rng(3, 0, (0, 1, 2, 3)[rows], 0)
        )
        seen.append(objective.states(RunContext(policy), part, [part.prompts] * 2).noise)
    whole, part = seen
    torch.testing.assert_close(part, torch.cat([whole[1:3], whole[5:7]]))
    assert float((whole[:4] - whole[4:]).abs().max()) > 1e-2


def test_smpo_softens_labels_by_the_reward():
    """10·(2p − 1) with p the softmax over the pair of scores divided by their range; a reward that disagrees turns the pair."""
    policy, batch, range_ = Family(), pairs(), 3.0
    run = RunContext(policy, Towers())
    better, worse = (Towers()(x, batch.prompts) for x in (batch.chosen, batch.rejected))
    p = torch.softmax(torch.stack([better, worse]) / range_, 0)[0]
    found = SmPO(beta=2.0, score_range=range_).strength(run, batch)
    torch.testing.assert_close(found, 2.0 * 10 * (2 * p - 1))
    assert float(found.min()) < 0 < float(found.max())
    assert SmPO().needs_reward and not SmPO().needs_gradient and not InPO().needs_reward


@dataclass
class Scaled:
    """Towers' scores in standard deviations."""

    std: float | None = 0.5
    standardised: bool = True
    differentiable: bool = True

    def __call__(self, images, prompts):
        return Towers()(images, prompts) / 0.5


def smpo_loss(batch, reward, **given):
    policy = Family()
    objective = SmPO(beta=2.0, score_range=3.0, inversion_steps=3, **given)
    loss, _ = objective.begin(RunContext(policy, reward))(batch)
    return loss.detach(), gradient(policy, loss)


def test_smpo_prefers_what_its_reward_prefers_whatever_the_data_say_and_the_reverse_with_flipped_labels():
    batch = pairs()
    turned = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    plain, swapped, flipped = (smpo_loss(one, Towers(), flip_labels=flip) for one, flip in ((batch, False), (turned, False), (batch, True)))
    torch.testing.assert_close(plain[0], swapped[0])
    torch.testing.assert_close(plain[1], swapped[1], rtol=1e-6, atol=1e-9)
    assert float((plain[1] + flipped[1]).norm()) < 0.3 * float((plain[1] - flipped[1]).norm()), "flipping turns the gradient"
    for given in ({"safeguard": True}, {"sft_weight": 0.1}):
        with pytest.raises(ValueError, match="the one that its reward prefers: leave both out, or take inpo"):
            SmPO(**given)


def test_smpos_range_is_in_the_raw_unit_also_of_a_standardised_reward():
    raw, standardised = smpo_loss(pairs(), Towers()), smpo_loss(pairs(), Scaled())
    torch.testing.assert_close(raw[0], standardised[0])
    torch.testing.assert_close(raw[1], standardised[1])
    with pytest.raises(ValueError, match="give standardise = false"):
        SmPO().check(RunContext(Family(), Scaled(std=None)))


def test_smpos_range_of_another_reward_is_warned_of(caplog):
    SmPO(score_range=10.0).check(RunContext(Family(), Scaled()))
    assert not caplog.records
    SmPO().check(RunContext(Family(), Scaled(std=0.02)))  # HPSv2's, with PickScore's range: every label would be a half
    assert "score_range = 16.7 is 835 standard deviations of this reward" in caplog.text


def test_a_pair_of_equal_scores_teaches_nothing():
    policy, batch = Family(), pairs()
    loss, _ = SmPO(inversion_steps=3).begin(RunContext(policy, lambda images, prompts: torch.zeros(len(images))))(batch)
    assert float(loss.detach()) == pytest.approx(0.6931471805599453) and float(gradient(policy, loss).norm()) == 0
