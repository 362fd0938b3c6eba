"""Policy gradients against the Gaussian's own log-density, closed forms, and write-ups of the papers' steps."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.family import Family, as4, gradient
from helpers.rounds import METHODS, SMALL, batch, begun, part_of

from trainer.objectives import AWM, DDPO, OBJECTIVES, FlowGRPO, RunContext
from trainer.objectives.policy_gradient.selection import Selection
from trainer.objectives.policy_gradient.steps import clipped_losses, kl_per_element, log_prob
from trainer.rng import Rng
from trainer.sampling import ddim, gaussian


def test_the_log_probability_is_the_gaussians():
    rng = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(4, 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, as4(std, mean)).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, std), expected, rtol=1e-12, atol=0)
    other = torch.randn(4, 3, 2, 2, generator=rng, dtype=torch.float64)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, as4(std, mean)), torch.distributions.Normal(other, as4(std, mean))
    )
    torch.testing.assert_close(kl_per_element(mean, other, std), kl.mean((1, 2, 3)), rtol=1e-12, atol=0)


def test_clipped_losses_are_ppos():
    ratio = torch.tensor([0.7, 0.95, 1.0, 1.05, 1.4], dtype=torch.float64)
    for advantage in (2.0, -2.0):
        by_hand = [-min(r * advantage, min(max(r, 0.9), 1.1) * advantage) for r in ratio.tolist()]
        torch.testing.assert_close(
            clipped_losses(ratio, torch.full_like(ratio, advantage), 0.1), torch.tensor(by_hand, dtype=torch.float64)
        )


@pytest.mark.parametrize("name", METHODS)
def test_one_denoiser_gives_one_gradient_however_its_network_predicts(name, tmp_path):
    """States of ε- and v-models and of flows are one in other coordinates: losses, scores and gradients are equal.

    AWM's errors are in units of ε or of velocities.
    """
    found = []
    for prediction in ("epsilon", "v") if name == "awm" else ("epsilon", "v", "flow"):
        policy = Family(prediction)
        loss = begun(OBJECTIVES[name](**METHODS[name], kl_weight=0.3), policy, tmp_path / prediction)
        first, logs = loss(batch())
        slopes = gradient(policy, first)
        with torch.no_grad():
            policy.weight += torch.tensor([0.01, -0.02, 0.03, 0.01], dtype=torch.float64)
        second, _ = loss(batch(1, step=1))  # off-policy
        found.append((logs["reward"], first.detach(), slopes, second.detach(), gradient(policy, second)))
    assert float(found[0][2].abs().max()) > 1e-3
    for other in found[1:]:
        for value, expected in zip(other, found[0]):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8, check_dtype=False)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_advantage_times_that_of_the_log_probability(tmp_path):
    """By hand in variance-preserving coordinates, with DDIM's variance of the paper (eq. 16)."""
    policy = Family()
    objective = DDPO(**{**SMALL, "eta": 0.7})
    value, logs, part = part_of(begun(objective, policy, tmp_path), batch())
    assert part.log_probs is None and float(value.detach()) == float(-part.advantages.double().mean()) and float(logs["clipped"].max()) == 0
    sigmas = policy.sigmas(5)
    here, there = (as4(s, part.states[:, 0]) for s in (sigmas[part.index], sigmas[part.index + 1]))
    a, b = 1 / (1 + here.square()), 1 / (1 + there.square())  # ᾱ before and after
    x, following = part.states[:, 0] * a.sqrt(), part.states[:, 1] * b.sqrt()
    epsilon = policy.network(x, sigmas[part.index], policy.weight)
    std = 0.7 * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    mean = b.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - b - std.square()).sqrt() * epsilon
    found = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(following).mean((1, 2, 3))
    torch.testing.assert_close(gradient(policy, value), gradient(policy, -(part.advantages * found).mean()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "noise"), [("flow-grpo", 0.7), ("constant", 0.3), ("cps", 0.6)])
def test_steps_of_a_flow_are_those_of_the_papers(kind, noise, tmp_path):
    """By hand in velocities; and of an ε-model, in its own coordinates, the same chain."""
    policy = Family("flow")
    objective = FlowGRPO(**SMALL, noise=noise, noise_kind=kind)
    value, _, part = part_of(begun(objective, policy, tmp_path / "flow"), batch())
    sigmas, (x, following) = policy.sigmas(5), part.states.unbind(1)
    s, t = (as4(level, x) for level in (sigmas[part.index], sigmas[part.index + 1]))
    v = policy.network(x, sigmas[part.index], policy.weight)
    if kind == "cps":  # the x0-prediction and the noise prediction, blended anew
        std = t * math.sin(noise * math.pi / 2)
        mean = (1 - t) * (x - s * v) + (t.square() - std.square()).sqrt() * (x + (1 - s) * v)
    else:
        w = noise * (s / (1 - s)).sqrt() if kind == "flow-grpo" else noise
        std = w * (s - t).sqrt()
        mean = x * (1 + w**2 / (2 * s) * (t - s)) + v * (1 + w**2 * (1 - s) / (2 * s)) * (t - s)
    density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(following).mean((1, 2, 3))
    torch.testing.assert_close(gradient(policy, value), gradient(policy, -(part.advantages * density).mean()), rtol=1e-8, atol=1e-10)


def test_a_group_may_start_from_one_noise(tmp_path):
    rng, policy = Rng(0, 3, (2, 3, 4, 5)), Family("flow")
    apart, shared = (FlowGRPO(**SMALL, shared_start=one).start_noise(rng, policy).flatten(1) for one in (False, True))
    assert len({*map(tuple, apart.tolist())}) == 4
    assert len({*map(tuple, shared.tolist())}) == 2 and torch.equal(shared[0], shared[1]) and not torch.equal(shared[1], shared[2])


@pytest.mark.parametrize("weighting", ["ghuber", "t2", "t", "none"])
def test_awm_is_the_denoising_error_of_own_images_weighted_by_their_advantages(weighting, tmp_path):
    """By hand in velocities; levels are one of each part of the grid, its first step and last tenth left out."""
    policy = Family("flow")
    objective = AWM(steps=20, group=4, prompts_per_round=2, levels=4, weighting=weighting, kl_weight=0.2)
    value, _, part = part_of(begun(objective, policy, tmp_path), batch())
    clean, t = part.states[:, 0], policy.sigmas(20)[part.index]
    noise = batch().rng.normal("matching noise", (3, 1, 1)).double()
    x = (1 - as4(t, clean)) * clean + as4(t, clean) * noise
    v, base = (policy.network(x, t, w) for w in (policy.weight, torch.zeros_like(policy.weight)))
    m = (v - (noise - clean)).square().mean((1, 2, 3))
    weighted = {"ghuber": t * ((m + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25, "t2": t**2 * m, "t": t * m, "none": m}[weighting]
    expected = (part.advantages / 5 * weighted + 0.2 * (v - base).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(gradient(policy, value), gradient(policy, expected), rtol=1e-7, atol=1e-9)
    index = objective.trained_steps(0, 0)
    assert index.shape == (8, 4) and int(index.min()) >= 1 and int(index.max()) <= 17 and len(index.unique(dim=0)) > 1
    edges = 1 + 17 / 4 * torch.arange(5)
    assert bool(((index >= edges[:-1].floor()) & (index <= edges[1:])).all()), index
    assert part.states.shape[1] == 1


def test_off_policy_the_ratio_is_that_of_the_log_probabilities_then_and_now(tmp_path):
    policy = Family()
    loss = begun(DDPO(**{**SMALL, "clip": 0.002}), policy, tmp_path)
    loss(batch())
    old = Family()
    with torch.no_grad():
        policy.weight.add_(0.05)
    value, logs, part = part_of(loss, batch(1, step=1))
    sigmas, rows = policy.sigmas(5), part.index
    before, after = part.states.unbind(1)

    def density(one):
        return log_prob(after, *gaussian(before, one.denoiser("aaaa")(before, sigmas[rows]), sigmas[rows], sigmas[rows + 1], ddim(1.0)))

    ratio = (density(policy) - density(old)).exp()
    torch.testing.assert_close(density(old).detach(), part.log_probs, rtol=1e-10, atol=1e-10)  # so without an update it is 1 here too
    expected = torch.maximum(-part.advantages * ratio, -part.advantages * ratio.clamp(0.998, 1.002)).mean()
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradient(policy, value), gradient(policy, expected), rtol=1e-6, atol=1e-9)
    assert 0 < float(logs["clipped"].mean()) <= 1


def test_the_estimate_is_unbiased_on_a_closed_form_gaussian(toy_policy, tmp_path):
    """E[r] of a linear chain by its mean and variance, differentiated by autograd, against the mean of 20000 estimates.

    The last step has no noise and is part of the reward: its weights are those of the rollout.
    """
    steps, runs, n = 4, 20, 1000
    objective = DDPO(steps=steps, guidance_scale=1.0, group=n, prompts_per_round=1, clip=1.0)
    policy, sigmas = toy_policy, toy_policy.sigmas(steps)
    mean, variance = torch.zeros(()).double(), torch.full((), 16.0).double()
    for i in range(steps):
        s, t = sigmas[i], sigmas[i + 1]
        weight = policy.weight if i < steps - 1 else policy.weight.detach()
        slope, shift = (1 + weight[0]) / (1 + s**2), weight[1] / (1 + s**2)
        std = t * (1 - (t / s) ** 2).sqrt() if i < steps - 1 else torch.zeros(()).double()
        along = (t**2 - std**2).sqrt() / s
        factor = slope + along * (1 - slope)
        mean, variance = factor * mean + shift * (1 - along), factor**2 * variance + std**2
    expected = gradient(policy, 3 * (-((mean - 0.3) ** 2) - variance))  # r = −‖x − 0.3‖² of three elements
    index, estimates = torch.arange(steps - 1).expand(n, -1), []
    for i in range(runs):
        rng = Rng(0, i, tuple(range(n)))
        states, ends, _ = objective.draw(RunContext(policy), ("",) * n, rng, index, 0)
        scores = -(ends - 0.3).square().flatten(1).sum(1).detach()
        total = torch.zeros(()).double()
        for k in range(steps - 1):
            part = Selection(
                ("",) * n, rng, states[:, k : k + 2].detach(), index[:, k], scores + 3.0, None, torch.ones(n)
            )  # any constant may be added
            total = total - 3 * objective.losses(RunContext(policy), part)[0].mean()
        estimates.append(gradient(policy, total))
    found = torch.stack(estimates)
    error, standard = found.mean(0) - expected, found.std(0) / runs**0.5
    assert bool((error.abs() < 3.5 * standard).all()), (found.mean(0), expected, standard)
    assert bool((standard < 0.1 * expected.abs()).all()), (expected, standard)
