"""G²RPO against a write-up in velocities, one-granularity Flow-GRPO, and a Gaussian whose expectation is known."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from helpers.family import Family, Towers, as4, gradient
from helpers.rounds import PROMPTS, SMALL, batch, begun, part_of

from trainer.objectives import G2RPO, FlowGRPO, RunContext
from trainer.objectives.policy_gradient.selection import Selection
from trainer.rng import Rng

BRANCH = {**SMALL, "branch_steps": 3}


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_a_branch_is_the_papers_step_and_its_ends_are_those_of_the_official_levels(first):
    """By hand in velocities. The official code lists levels by `sigmas[e + 2 :: g]` and keeps the last evaluation's x0-prediction."""
    policy, objective = Family("flow"), G2RPO(**{**BRANCH, "steps": 8, "branch_steps": 7, "granularities": 3})
    rng, sigmas, index = Rng(0, 2, (2, 3, 4, 5, 6)), policy.sigmas(8), torch.full((5, 1), first)
    states, ends, found = objective.draw(RunContext(policy), tuple("abcde"), rng, index, first)
    velocity = lambda x, s: policy.network(x, s.expand(len(x)), policy.weight)  # noqa: E731
    x = 0.9 * Rng(0, 2, (0, 0, 1, 1, 1)).normal("shared start", policy.latent_shape).double()
    for s, t in pairwise(sigmas[: first + 1]):
        x = x + velocity(x, s) * (t - s)
    s, dt = sigmas[first], sigmas[first + 1] - sigmas[first]
    w = 0.7 * (s / (1 - s)).sqrt()
    mean = x * (1 + w**2 / (2 * s) * dt) + velocity(x, s) * (1 + w**2 * (1 - s) / (2 * s)) * dt
    after = mean + w * (-dt).sqrt() * rng.step_noise(policy.latent_shape)(first).double()
    torch.testing.assert_close(states, torch.stack([x, after], 1), rtol=1e-12, atol=1e-12)
    density = torch.distributions.Normal(mean, (w * (-dt).sqrt()).expand_as(mean)).log_prob(after).mean((1, 2, 3))
    torch.testing.assert_close(found[:, 0], density, rtol=1e-10, atol=1e-12)
    for g, end in zip((1, 2, 3), ends.split(5), strict=True):
        levels, z = torch.cat([sigmas[: first + 2], sigmas[first + 2 :: g]]), after
        for i in range(first + 1, len(levels) - 1):
            clean = z - levels[i] * velocity(z, levels[i])
            z = z + velocity(z, levels[i]) * (levels[i + 1] - levels[i])
        torch.testing.assert_close(end, clean, rtol=1e-12, atol=1e-12)


def test_with_one_granularity_it_is_flow_grpo_with_noise_in_one_step_and_one_start():
    policy, rng, index = Family(), Rng(1, 0, tuple(range(8))), torch.full((8, 1), 2)
    shared = {**SMALL, "noise": 0.5}
    other = FlowGRPO(**shared, trained_count=1, window="random", shared_start=True)
    drawn = [one.draw(RunContext(policy), "abcdefgh", rng, index, 2) for one in (G2RPO(**shared, branch_steps=3, granularities=1), other)]
    for value, expected in zip(*drawn, strict=True):
        assert torch.equal(value, expected)
    cost = []
    for one in (G2RPO(**shared, branch_steps=3, granularities=1), other):
        policy.calls = 0
        one.draw(RunContext(policy), "abcdefgh", rng, index, 2)
        cost.append(policy.calls)
    assert cost == [2 * 3 + 8 * 2, 8 * 5]  # two anchors of three evaluations


def test_advantages_are_summed_over_granularities_and_the_ratio_is_one_on_policy(tmp_path):
    policy, reward, seen = Family("flow"), Towers(), []
    asked = lambda images, prompts: seen.append(reward(images, prompts)) or seen[-1]  # noqa: E731
    loss = begun(G2RPO(**BRANCH), policy, tmp_path, asked)
    value, logs, part = part_of(loss, batch())
    fine, coarse = (torch.cat(seen[g::2]).reshape(2, 4).double() for g in (0, 1))  # 8 images in two chunks, two ends each
    each = [((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)).flatten() for r in (fine, coarse)]
    torch.testing.assert_close(loss.round.advantages.double(), each[0] + each[1], rtol=1e-4, atol=1e-5)
    assert float((each[0] - each[1]).abs().max()) > 0.01
    torch.testing.assert_close(loss.round.scores.double(), (fine + coarse).flatten() / 2, rtol=1e-5, atol=1e-6)
    assert part.log_probs is None and float(value.detach()) == pytest.approx(-float(part.advantages.mean()), abs=1e-7)
    assert float(logs["clipped"].max()) == 0 and part.states.shape[1] == 2
    s, t = (as4(policy.sigmas(5)[part.index + k], part.states[:, 0]) for k in (0, 1))
    x, after = part.states.unbind(1)
    w = 0.7 * (s / (1 - s)).sqrt()
    v = policy.network(x, policy.sigmas(5)[part.index], policy.weight)
    mean = x * (1 + w**2 / (2 * s) * (t - s)) + v * (1 + w**2 * (1 - s) / (2 * s)) * (t - s)
    density = torch.distributions.Normal(mean, (w * (s - t).sqrt()).expand_as(mean)).log_prob(after).mean((1, 2, 3))
    torch.testing.assert_close(gradient(policy, value), gradient(policy, -(part.advantages * density).mean()), rtol=1e-8, atol=1e-10)


def test_rounds_branch_at_each_of_the_first_steps_once_in_turn(tmp_path):
    objective = G2RPO(**BRANCH)
    steps = [objective.trained_steps(5, number).unique().tolist() for number in range(9)]
    assert all(len(one) == 1 for one in steps) and [sorted(chain(*steps[i : i + 3])) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert len({str(steps[i : i + 3]) for i in (0, 3, 6)}) > 1
    loss, found = begun(objective, Family(), tmp_path), []
    for number in range(6):  # 8 samples a round
        _, _, part = part_of(loss, batch(number, step=number // 2))
        found.append((set(part.index.tolist()), {p for p in part.prompts} <= set(PROMPTS)))
    assert [one for one, _ in found] == [set(objective.trained_steps(3, number // 2).flatten().tolist()) for number in range(6)]


def test_the_estimate_is_unbiased_on_a_closed_form_gaussian(toy_policy):
    """The sum over granularities of E[r] of a linear model, by mean and variance, differentiated by the branching step's weights."""
    steps, first, runs, n = 5, 1, 20, 1000
    objective = G2RPO(steps=steps, group=n, prompts_per_round=1, clip=1.0, branch_steps=3, noise_kind="cps", noise=0.6)
    policy, sigmas, index = toy_policy, toy_policy.sigmas(steps), torch.full((n, 1), first)

    def along(mean, levels, w):  # x' of D = slope·x + shift without noise
        for s, t in pairwise(levels):
            slope, shift = (1 + w[0]) / (1 + s**2), w[1] / (1 + s**2)
            mean = slope * mean + shift + t * (mean - slope * mean - shift) / s
        return mean

    wanted, estimates = [], []
    for i in range(runs):
        rng = Rng(0, i, tuple(range(n)))
        states, ends, _ = objective.draw(RunContext(policy), ("",) * n, rng, index, first)
        x, s, t, w = states[0, 0].detach(), sigmas[first], sigmas[first + 1], policy.weight
        part_of_noise = torch.tensor(0.6 * torch.pi / 2).double()  # of σ' in flow coordinates, where α' = 1/(1 + σ')
        std, keep = t * part_of_noise.sin(), t * part_of_noise.cos()
        slope, shift = (1 + w[0]) / (1 + s**2), w[1] / (1 + s**2)
        mean = slope * x + shift + keep * (x - slope * x - shift) / s
        expected = 0.0
        for levels in (sigmas[2:], sigmas[[2, 3, 5]]):
            end = along(mean, levels, w.detach())
            (scale,) = torch.autograd.grad(end.sum(), mean, retain_graph=True)  # the same everywhere: the map is linear
            expected = expected - ((end - 0.3) ** 2 + (scale * std) ** 2).sum()
        wanted.append(gradient(policy, expected))
        scores = sum(-(end - 0.3).square().flatten(1).sum(1) for end in ends.detach().split(n))
        part = Selection(("",) * n, rng, states.detach(), index[:, 0], scores - scores.mean(), None, torch.ones(n))
        estimates.append(gradient(policy, -states[0, 0].numel() * objective.losses(RunContext(policy), part)[0].mean()) * n / (n - 1))
    error = torch.stack(estimates) - torch.stack(wanted)
    standard = error.std(0) / runs**0.5
    assert bool((error.mean(0).abs() < 3.5 * standard).all()), (error.mean(0), standard)
    assert bool((standard < 0.1 * torch.stack(wanted).mean(0).abs()).all()), (standard, torch.stack(wanted).mean(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "group = 1: an image is compared with others"),
        ({"branch_steps": 5}, "branch_steps = 5: of 5 steps 4 have noise"),
        ({"baseline": "history"}, "remembers one score of an image"),
        ({"noise_kind": "cps", "noise": 1.5}, "it is at most 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        G2RPO(**{**BRANCH, **settings})


def test_only_steps_that_may_branch_are_warned_of(caplog):
    for branching, warned in ((2, False), (3, True)):
        caplog.clear()
        G2RPO(group=2, prompts_per_round=1, steps=4, branch_steps=branching).check(RunContext(Family(), Towers()))
        assert ("which stays in the images" in caplog.text) == warned, branching
