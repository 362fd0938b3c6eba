"""Policy gradients against the Gaussian's own log-density, closed forms, write-ups of the papers' steps, and what they refuse."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.family import Family, Towers, as4, gradient
from helpers.processes import log_of, toy_run, trained

from trainer.config import ConfigError
from trainer.data.batches import Prompts
from trainer.objectives import AWM, DDPO, OBJECTIVES, FlowGRPO, RunContext
from trainer.objectives.policy_gradient.advantages import History, above_auxiliaries, group_advantages, relative_distances
from trainer.objectives.policy_gradient.selection import Selection
from trainer.objectives.policy_gradient.steps import clipped_losses, kl_per_element, log_prob
from trainer.objectives.policy_gradient.store import Rollouts
from trainer.rng import Rng, generator
from trainer.sampling import ddim, gaussian

PROMPTS = ("a", "bb", "ccc")
SMALL = {"steps": 5, "guidance_scale": 1.0, "group": 4, "prompts_per_round": 2, "clip": 0.2}
METHODS = {
    "ddpo": SMALL,
    "flow-grpo": SMALL,
    "awm": {"steps": 6, "group": 4, "prompts_per_round": 2, "levels": 3},
}


def batch(number=0, n=4, step=0):
    return Prompts(tuple("a" * n), Rng(3, step, tuple(range(number * n, number * n + n)), number), number)


def begun(objective, policy, folder, reward=None, **more):
    return objective.begin(RunContext(policy, reward or Towers(), folder=folder, prompts=PROMPTS, **more))


# -- steps -----------------------------------------------------------------------------------------------------------


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


def part_of(loss, given):
    """Loss and logs of a micro-batch, and what it trains."""
    parts, inner = [], loss._part
    loss._part = lambda *arguments: parts.append(inner(*arguments)) or parts[-1]
    try:
        return *loss(given), parts[0]
    finally:
        loss._part = inner


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


# -- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_are_those_of_the_papers():
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    rows, every = scores.numpy(), scores.numpy().ravel()
    by_group = [(r - r.mean()) / (r.std() + 1e-6) for r in rows]
    np.testing.assert_allclose(group_advantages(scores, "group").numpy(), by_group, atol=1e-12)
    np.testing.assert_allclose(group_advantages(scores, "group-mean").numpy(), [(r - r.mean()) / (every.std() + 1e-6) for r in rows])
    np.testing.assert_allclose(group_advantages(scores, "round").numpy(), (rows - every.mean()) / (every.std() + 1e-6))
    for kind in ("group", "group-mean"):  # equal but for rounding: no advantage
        near = torch.full((1, 4), 0.2) + torch.tensor([0.0, 1e-8, -1e-8, 2e-8])
        assert float(group_advantages(torch.cat([near, scores.new_ones(1, 4)]), kind).abs().max()) == 0


def test_a_prompts_history_counts_from_its_sixteenth_score_on():
    history, rng, kept = History(), np.random.default_rng(0), {}
    for _ in range(12):
        prompts, scores = [*"aab", "c"], torch.tensor(rng.normal(size=4))
        expected = []
        for prompt, score in zip(prompts, scores.tolist()):
            kept.setdefault(prompt, deque(maxlen=16)).append(score)
        for prompt, score in zip(prompts, scores.tolist()):
            base = np.array(kept[prompt]) if len(kept[prompt]) == 16 else scores.numpy()
            expected.append((score - base.mean()) / (base.std() + 1e-6))
        np.testing.assert_allclose(history.advantages(prompts, scores).numpy(), expected, rtol=1e-9)
    assert len(kept["a"]) == 16 and len(kept["b"]) == 12


class Several(Towers):
    """A sum of three rewards, the last of weight 0."""

    weights = (1.0, -0.5, 0.0)

    def terms(self, images, prompts):
        flat = images.flatten(1)
        return torch.stack([super().__call__(images, prompts), flat.sum(1), flat[:, 0]], 1).float()

    def __call__(self, images, prompts):
        return (self.terms(images, prompts) * torch.tensor(self.weights)).sum(1)


class Colours:
    """Features of images: their three values."""

    def image_features(self, images):
        return images.flatten(1)


def test_each_reward_of_a_sum_may_have_advantages_of_its_own(tmp_path):
    loss = begun(DDPO(**SMALL, separate_rewards=True), Family(), tmp_path, Several())
    seen = []
    loss.run.policy.decode = lambda latents: seen.append(latents) or latents
    loss(batch())
    prompts = loss.objective.prompts_of(PROMPTS, 3, 0)
    terms = torch.cat([Several().terms(x, prompts[4 * i : 4 * i + 4]) for i, x in enumerate(seen)]).reshape(2, 4, 3).numpy()
    each = (terms - terms.mean(1, keepdims=True)) / (terms.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(loss.round.advantages.numpy(), (each[..., 0] - 0.5 * each[..., 1]).ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss.round.scores.numpy(), (terms[..., 0] - 0.5 * terms[..., 1]).ravel(), rtol=1e-5, atol=1e-5)


def test_the_gate_takes_images_that_the_reward_ranks_above_what_the_auxiliary_rewards_do(tmp_path):
    scores, others = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0], [0.0, 4.0, 3.0, 2.0, 1.0]]).T
    excess = [4 - 0, 0 - 4, 3 - 2, 1 - 2.5, 2 - 1.5]  # ranks by hand
    assert above_auxiliaries(scores, others, 1.0).tolist() == [e > 0 for e in excess]
    assert above_auxiliaries(scores, others, 0.1).tolist() == [True, False, False, False, False]
    assert not above_auxiliaries(scores, scores[:, None], 1.0).any()
    loss = begun(DDPO(**SMALL, kl_weight=0.5, gate=0.4), Family(), tmp_path, Several())
    value, logs, part = part_of(loss, batch())
    assert 0 < float(loss.round.held.sum()) < 8 and torch.equal(part.held, loss.round.held.float()[_images(loss, batch())])
    assert float(value.detach()) == pytest.approx(float((-part.advantages + 0.5 * logs["kl per element"] * part.held).mean()), rel=1e-6)


def _images(loss, given):
    order = torch.randperm(32, generator=generator(given.rng.seed, "order", 0))
    return order[torch.tensor(given.rng.indices)] // 4


def test_diversity_multiplies_what_is_above_the_mean_by_the_relative_distance_to_the_nearest(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 4, 5))
    expected = []
    for group in features:
        unit = group / np.linalg.norm(group, axis=1, keepdims=True)
        nearest = [min(1 - unit[i] @ unit[j] for j in range(4) if j != i) for i in range(4)]
        expected.append(np.array(nearest) / np.mean(nearest))
    np.testing.assert_allclose(relative_distances(torch.tensor(features)).numpy(), expected, rtol=1e-9)
    assert relative_distances(torch.ones(1, 3, 2)).tolist() == [[1.0, 1.0, 1.0]]  # equal images
    plain, weighted = (
        begun(DDPO(**SMALL, diversity_weighted=on), Family(), tmp_path / str(on), features=Colours()) for on in (False, True)
    )
    for loss in (plain, weighted):
        loss(batch())
    ratio = weighted.round.advantages / plain.round.advantages
    above = plain.round.advantages > 0
    assert bool((ratio[~above] == 1).all()) and float((ratio[above] - 1).abs().max()) > 0.05


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["each", "random", "sliding"])
def test_a_round_trains_each_of_its_steps_once_in_each_pass_and_then_is_drawn_anew(window, tmp_path):
    objective = DDPO(**SMALL, trained_count=2, window=window, window_every=1, passes=2)
    policy, rounds = Family(), []
    loss, seen = begun(objective, policy, tmp_path), []
    for number in range(12):  # two rounds of 8 images × 2 steps, twice each
        _, _, part = part_of(loss, batch(number))
        seen += [(p, i, float(x.sum())) for p, i, x in zip(part.prompts, part.index.tolist(), part.states[:, 0])]
        rounds.append(loss.round.number)
    assert rounds == [0] * 8 + [1] * 4
    first, second, third = seen[:16], seen[16:32], seen[32:]
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == 16 and not {*first} & {*third}
    assert {p for p, _, _ in first} == set(loss.objective.prompts_of(PROMPTS, 3, 0)) and len({p for p, _, _ in first + third}) == 3
    steps = {i for _, i, _ in first}
    assert steps <= {0, 1, 2, 3} and (window == "each" or len(steps) == 2)
    if window == "sliding":
        assert steps == {0, 1} and {i for _, i, _ in third} == {1, 2}
    assert len(list((tmp_path / "rollouts").iterdir())) == 2  # the old round's files are gone


def test_outside_a_window_no_noise_is_added(tmp_path):
    policy, objective = Family(), DDPO(**SMALL, trained_count=1, window="sliding")
    run, rng = RunContext(policy), Rng(0, 0, (0, 1))
    states, ends, found = objective.draw(run, ("a", "b"), rng, torch.full((2, 1), 2), 2)
    sigmas, x = policy.sigmas(5), policy.start(rng.start_noise((3, 1, 1)), 5)
    for i in range(5):
        mean, std = gaussian(x, policy.denoiser("ab")(x, sigmas[i].expand(2)), sigmas[i].expand(2), sigmas[i + 1].expand(2), float(i == 2))
        if i == 2:
            torch.testing.assert_close(states[:, 0], x)
            x = mean + as4(std, x) * rng.step_noise((3, 1, 1))(2)
            torch.testing.assert_close((states[:, 1], found[:, 0]), (x, log_prob(x, mean, std)))
        else:
            x = mean
    torch.testing.assert_close(ends, x)


def test_files_that_a_checkpoint_lists_outlive_their_round(tmp_path):
    store = Rollouts(tmp_path / "r")
    names = lambda: sorted(p.name for p in store.folder.iterdir())  # noqa: E731
    make = lambda number, first: store.write(number, first, torch.full((2, 1, 1, 1, 1), number + first / 10))  # noqa: E731
    store.replace([make(0, 0), make(0, 2)])
    store.saved()
    store.replace([make(1, 0), make(1, 2)])
    assert len(names()) == 4 and float(store.read(3, 0)) == pytest.approx(1.2)
    again = Rollouts(tmp_path / "r")
    again.restore([["000000-000000.safetensors", 0], ["000000-000002.safetensors", 2]])  # killed before the next checkpoint
    assert len(names()) == 2 and float(again.read(2, 0)) == pytest.approx(0.2)
    with pytest.raises(FileNotFoundError, match="1 files of the present round's rollouts are missing"):
        again.restore([["000001-000000.safetensors", 0]])
    store.replace([make(2, 0), make(2, 2)])
    kept = [list(file) for file in store.files]
    (store.folder / "mine.txt").write_text("a user's own")
    (store.folder / "mine").mkdir()
    store.saved()
    assert names() == ["000002-000000.safetensors", "000002-000002.safetensors", "mine", "mine.txt"]
    make(2, 2)  # the same content
    again.restore(kept)
    store.write(2, 2, torch.zeros(2, 1, 1, 1, 1))  # of another run, say
    with pytest.raises(ValueError, match="000002-000002.safetensors is not as the run wrote it: put it back, or start again"):
        again.restore(kept)


@pytest.mark.parametrize("name", ["ddpo", "awm"])
def test_a_run_resumes_to_the_same_bits(name, tmp_path):
    whole = trained(name, tmp_path / "whole")
    run = toy_run(name, tmp_path / "part")
    run.open_folder(overwrite=False, resume=False)
    for done in run.steps():
        if done.number == 5:  # the last checkpoint is of step 4, and a new round began since
            break
    assert torch.equal(trained(name, tmp_path / "part", resume=True)["weight"], whole["weight"])
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")


class Fixed(Towers):
    """The same score for every image."""

    def __init__(self, score):
        self.score = score

    def __call__(self, images, prompts):
        return torch.full((len(images),), self.score)


@pytest.mark.parametrize(
    ("score", "message"),
    [(0.25, "all 8 images of the round have the reward 0.25, and no advantage"), (math.nan, "the reward of an image of '.*' is nan")],
)
def test_scores_without_an_advantage_are_refused_before_any_step(score, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        begun(DDPO(**SMALL), Family(), tmp_path, Fixed(score))(batch())


def test_a_later_round_of_equal_scores_trains_nothing_and_says_so(tmp_path, caplog):
    policy, reward = Family(), Towers()
    loss = begun(DDPO(**SMALL), policy, tmp_path, reward)
    loss(batch())
    loss.run = replace(loss.run, reward=Fixed(1.0))
    value, _ = loss(batch(8, step=4))
    assert float(gradient(policy, value).abs().max()) == 0 and "and no advantage over each other" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "group = 1: an image is compared with others"),
        ({"group": 1, "prompts_per_round": 1, "baseline": "round"}, "= 1 image: give at least 2"),
        ({"steps": 1}, "steps = 1: the last step has no noise"),
        ({"separate_rewards": True, "baseline": "history"}, "remembers one score"),
        ({"gate": 0.1}, "give a kl_weight above 0"),
        ({"trained_count": 5}, "trained_count = 5: of 5 steps 4 have noise"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DDPO(**{**SMALL, **settings})


def test_a_micro_batch_that_no_round_is_a_multiple_of_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 5: a round has 8 images × 3 trained steps = 24 samples, give a divisor"):
        toy_run("ddpo", tmp_path, batch_size=5)
    with pytest.raises(ValueError, match="a round takes .* GB twice"):
        DDPO(**{**SMALL, "group": 1024, "prompts_per_round": 100000, "steps": 1000}).check(RunContext(Family(), folder=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separate_rewards": True}, "give a sum of rewards, such as"),
        ({"gate": 0.1, "kl_weight": 1.0}, "auxiliary rewards, which are those of weight 0"),
        ({"diversity_weighted": True}, "give `features`"),
    ],
)
def test_options_that_this_run_has_no_reward_or_features_for_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DDPO(**SMALL, **settings).check(RunContext(Family(), Towers(), folder=tmp_path))
