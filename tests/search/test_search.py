"""Reward search against plain sampling, closed-form Gaussians and its own predicted cost."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.config import ConfigError
from trainer.density import density_guided
from trainer.generate import Generation
from trainer.guidance import cfg
from trainer.sampling import end_of, gaussian, trajectory
from trainer.search.images import Searcher
from trainer.search.loop import Found, ancestral, particle_noise, search_images
from trainer.search.plan import check, cost, fitted, rounds_of
from trainer.search.settings import METHODS, search_of
from trainer.search.survivors import Resampled, diverse, effective_size, systematic

STEPS, MEAN, STD = 10, 0.4, 0.7
SIGMAS = torch.cat([torch.logspace(1, -1.3, STEPS, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
TARGET = torch.tensor([1.0, -0.5], dtype=torch.float64).reshape(1, 2, 1, 1)


def model(i, x):
    """E[x0 | x, σ] of N(MEAN, STD²) data."""
    return (STD**2 * x + SIGMAS[i] ** 2 * MEAN) / (STD**2 + SIGMAS[i] ** 2)


def linear(latents):
    """A linear reward with gradient TARGET."""
    return (latents * TARGET).flatten(1).sum(1)


def curved(latents):
    """A reward with a maximum."""
    return -(latents - TARGET).square().flatten(1).sum(1)


def run(name, score=curved, seed=0, images=1, noise=None, other=None, **given) -> Found:
    search = search_of(name, given)
    rounds = rounds_of(search, STEPS, seed)
    noise = noise or particle_noise(seed, images, (2, 1, 1))
    start = noise(-1, range(rounds[0].rows)).double() * 10
    return search_images(search, rounds, SIGMAS, start, model, ancestral(SIGMAS, noise), score, seed, lookahead=other)


def plain(n, seed=0, images=1):
    noise = particle_noise(seed, images, (2, 1, 1))
    steps = trajectory(
        lambda x, sigma: model(int((sigma[0] == SIGMAS).nonzero()[0, 0]), x),
        noise(-1, range(n)).double() * 10.0,
        SIGMAS,
        lambda i: noise(i, range(n)),
    )
    return end_of(torch.empty(0), steps)


def test_best_of_n_sorts_plain_samples():
    found, images = run("best-of-n", particles=6), plain(6)
    order = curved(images).argsort(descending=True)
    assert torch.equal(found.latents, images[order]) and found.scores == curved(images)[order].tolist()
    assert (found.counts.model, found.counts.decodes, found.counts.rewards) == (6 * STEPS, 6, 6)
    assert [node.parent for node in found.tree.nodes] == [-1] * 6


@pytest.mark.parametrize("name", ["svdd", "code"])
def test_one_child_is_plain_sampling_bit_for_bit(name):
    found = run(name, particles=3, images=3, children=1)
    assert torch.equal(found.latents[torch.tensor(sorted(range(3), key=lambda i: found.scores[i]))].sum(), found.latents.sum())
    images = plain(3, images=3)
    assert {tuple(x.flatten().tolist()) for x in found.latents} == {tuple(x.flatten().tolist()) for x in images}
    assert found.counts.model == 3 * STEPS


def test_code_with_one_block_is_best_of_n_bit_for_bit():
    code, best = run("code", children=7, block=STEPS), run("best-of-n", particles=7)
    assert torch.equal(code.latents, best.latents[:1]) and code.scores == best.scores[:1]
    assert code.counts == best.counts


@pytest.mark.parametrize("seeds", [40, pytest.param(600, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("svdd", {"particles": 2, "children": 3}),
        ("code", {"particles": 2, "children": 3, "block": 4}),
        ("fk", {"particles": 6, "ess": 1.0}),
        ("dlbs", {"particles": 2, "children": 3}),
        ("dsearch", {"particles": 1, "children": 2, "oversample": 4, "replaced": 0.3}),
    ],
)
def test_an_equal_reward_changes_no_distribution(name, given, seeds):
    """Every image is one plain sampling run of independent noise: mean and variance over seeds."""
    images = torch.cat([run(name, lambda x: torch.zeros(len(x)), seed, **given).latents[:1] for seed in range(seeds)]).flatten()
    mean, variance = exact()
    assert abs(float(images.mean()) - mean) < 4 * math.sqrt(variance / (2 * seeds))
    assert abs(float(images.var()) - variance) < 4 * variance * math.sqrt(1 / seeds)


def exact():
    """Mean and variance of the images of plain sampling, from the steps' own means and standard deviations."""
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.full((1,), 100.0, dtype=torch.float64)
    for i in range(STEPS):
        here, there = SIGMAS[i : i + 1], SIGMAS[i + 1 : i + 2]
        at = [gaussian(x, model(i, x), here, there) for x in (torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double())]
        slope = at[1][0] - at[0][0]
        mean, variance = (slope * mean + at[0][0]).flatten(), (slope**2 * variance).flatten() + at[0][1] ** 2
    return float(mean), float(variance)


def tilted(potential, ess, strength=0.7, particles=256, runs=16, forget=False, monkeypatch=None):
    """Mean shift of the images (2,) by weighted particles, and its standard error over runs."""
    if forget:
        call = Resampled.__call__

        def forgetful(self, *args):
            kept = call(self, *args)
            self._weights = torch.zeros_like(self._weights)
            return kept

        monkeypatch.setattr(Resampled, "__call__", forgetful)
    means = []
    for seed in range(runs):
        rng = torch.Generator().manual_seed(seed)

        def noise(i, particles, rng=rng):
            return torch.randn(len(particles), 2, 1, 1, generator=rng, dtype=torch.float64)

        given = {
            "particles": particles,
            "block": 4 if potential == "add" else 1,
            "start": 0.0,
            "end": 1.0,
            "potential": potential,
            "ess": ess,
            "strength": strength,
        }
        found = run("fk", linear, seed, noise=noise, **given)
        weights = torch.tensor(found.log_weights).softmax(0)
        means.append((weights[:, None] * found.latents.flatten(1)).sum(0))
    stacked = torch.stack(means) - exact()[0]
    return stacked.mean(0), stacked.std(0) / math.sqrt(runs)


@pytest.mark.parametrize("runs", [12, pytest.param(96, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("potential", "ess", "strength"),
    [("diff", 0.5, 0.7), ("diff", 1.0, 0.7), ("max", 0.5, 0.7), ("max", 1.0, 0.7), ("rt", 0.5, 0.7), ("rt", 1.0, 0.4), ("add", 0.5, 0.5)],
)
def test_steering_tilts_a_gaussian_by_strength_times_variance_times_gradient(potential, ess, strength, runs):
    """p(x)·exp(λ·g·x) of N(m, v) is N(m + λ·v·g, v); add weights by sums of sums, so few particles stand only few rounds."""
    expected = strength * exact()[1] * TARGET.flatten()
    shift, error = tilted(potential, ess, strength, runs=runs)
    assert ((shift - expected).abs() < 4 * error).all(), (potential, shift.tolist(), expected.tolist(), error.tolist())
    assert runs == 12 or shift[0] > 4 * error[0]


def test_weights_that_the_gate_leaves_unused_must_be_kept(monkeypatch):
    expected = 0.7 * exact()[1] * TARGET.flatten()
    shift, error = tilted("diff", 0.5, forget=True, monkeypatch=monkeypatch)
    assert ((shift - expected).abs() > 5 * error).all(), (shift.tolist(), expected.tolist(), error.tolist())


def test_systematic_resampling_draws_each_row_within_one_of_its_share():
    weights = torch.tensor([0.45, 0.05, 0.25, 0.25], dtype=torch.float64).log()
    mean = torch.zeros(4)
    for seed in range(500):
        drawn = torch.bincount(systematic(weights, torch.Generator().manual_seed(seed)), minlength=4)
        assert ((drawn - 4 * weights.exp()).abs() < 1).all()
        mean += drawn / 500
    assert (mean - 4 * weights.exp()).abs().max() < 0.09
    assert effective_size(torch.zeros(5)) == pytest.approx(5) and effective_size(torch.tensor([0.0, -1e4])) == pytest.approx(1)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("more", [{}, {"lookahead": 3}, {"start": 0.2, "end": 0.7}])
def test_the_predicted_cost_is_the_cost(name, more):
    given = {key: value for key, value in more.items() if key in METHODS[name].defaults}
    for lookahead in (None, model) if "lookahead" in METHODS[name].defaults else (None,):
        search = search_of(name, {"particles": 4, **given})
        found = run(name, other=lookahead, **{"particles": 4, **given})
        assert found.counts == cost(search, rounds_of(search, STEPS), lookahead is None)
        assert len(found.latents) == 4 or METHODS[name].final != "parent"


def test_searches_find_more_reward_than_plain_sampling():
    base = sum(float(run("best-of-n", seed=seed, particles=1).scores[0]) for seed in range(20)) / 20
    for name in METHODS:
        reward = sum(run(name, seed=seed).scores[0] for seed in range(10)) / 10
        assert reward > base + 0.3, (name, reward, base)


def test_a_search_depends_on_seed_step_and_particle_alone():
    one, two, other = run("dlbs"), run("dlbs"), run("dlbs", seed=1)
    assert torch.equal(one.latents, two.latents) and one.tree.csv() == two.tree.csv() and not torch.equal(one.latents, other.latents)
    noise = particle_noise(3, 2, (2, 1, 1), first=6)
    assert torch.equal(noise(4, [5, 1]), torch.cat([noise(4, [5]), noise(4, [1])])) and not torch.equal(noise(4, [5]), noise(3, [5]))
    all_of_them = torch.cat([noise(i, range(8)) for i in (-1, 0, 1)]).flatten().tolist()
    assert len(set(all_of_them)) == len(all_of_them)


def test_a_budget_sets_the_width():
    for name in METHODS:
        search = fitted(search_of(name, {}), STEPS, 400)
        wider = {**{METHODS[name].grows: getattr(search, METHODS[name].grows) + 1}}
        used = cost(search, rounds_of(search, STEPS)).model
        more = search_of(name, {**{key: getattr(search, key) for key in METHODS[name].defaults}, **wider})
        assert used <= 400 < cost(more, rounds_of(more, STEPS)).model, name
    with pytest.raises(ConfigError, match=r"a budget of 15 model calls is too small: fk with particles 2, children 1 takes 20 in 10 steps"):
        fitted(search_of("fk", {}), STEPS, 15)


@pytest.mark.parametrize(
    ("name", "given", "budget", "message"),
    [
        ("svdd", {"start": 1.0}, 400, "svdd takes 10 model calls with any number of children in 10 steps, so that a budget sets nothing"),
        ("dlbs", {"start": 1.0}, 400, "dlbs takes 20 model calls with any number of children"),
        ("dsearch", {"growth": "all", "width": 0.0}, 400, "with any number of children"),
        ("best-of-n", {}, 40961, "a budget of 40961 model calls is too large: best-of-n with particles 4096 takes 40960"),
        ("svdd", {}, 10**7, "is too large: svdd with children 4096 takes"),
    ],
)
def test_a_budget_that_no_width_spends_is_refused(name, given, budget, message):
    with pytest.raises(ConfigError, match=message):
        fitted(search_of(name, given), STEPS, budget)


def test_the_widest_search_is_within_the_range_of_its_settings():
    assert fitted(search_of("best-of-n", {}), STEPS, 40960).particles == 4096


@pytest.mark.parametrize(
    ("name", "given", "returned", "stochastic", "message"),
    [
        ("fk", {"ess": 1.5}, 1, True, "ess = 1.5: give at most 1"),
        ("fk", {"strength": -1.0}, 1, True, "strength"),
        ("fk", {"children": 2}, 1, True, "fk has no children: it takes particles, block"),
        ("dlbs", {"start": 0.6, "end": 0.2}, 1, True, "end 0.2 lies before start 0.6"),
        ("dsearch", {"replaced": 1.0}, 1, True, "replaced"),
        ("walk", {}, 1, True, "unknown search 'walk': use one of best-of-n, svdd, code, fk, dlbs, dsearch"),
        ("code", {"block": 11}, 1, True, "a block of 11 steps in a run of 10: give block ≤ 10"),
        (
            "svdd",
            {"start": 0.5, "end": 0.5},
            1,
            True,
            "svdd would choose nothing: no selection falls into its part of this run of 10 steps",
        ),
        ("dlbs", {"start": 1.0}, 1, True, "dlbs would choose nothing"),
        ("fk", {"start": 0.81, "end": 0.85}, 1, True, "fk would choose nothing"),
        ("svdd", {}, 2, True, "2 images of 1 particles: give particles ≥ 2"),
        ("svdd", {}, 1, False, "svdd branches, and ddim draws no noise, so that children would be equal"),
        ("fk", {}, 1, False, "fk branches"),
    ],
)
def test_what_cannot_run_is_refused(name, given, returned, stochastic, message):
    with pytest.raises(ConfigError) as caught:
        search = search_of(name, given)
        check(search, rounds_of(search, STEPS), returned, stochastic, "ddim")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("particles", "ess", "warned"), [(2, 0.5, True), (3, 0.5, False), (2, 1.0, False), (2, 0.0, False), (4, 0.25, True)]
)
def test_a_resampling_that_can_never_happen_is_warned_of(particles, ess, warned, caplog):
    """The effective number of particles is at least 1."""
    search = search_of("fk", {"particles": particles, "ess": ess})
    check(search, rounds_of(search, 10))
    assert ("never resampled" in caplog.text) == warned


def test_a_run_of_one_step_has_no_search_but_best_of_n():
    for name in ("svdd", "code", "fk", "dlbs"):
        search = search_of(name, {"block": 1} if name == "code" else {})
        with pytest.raises(ConfigError, match=f"{name} would choose nothing.* its part of this run of 1 step: give more steps"):
            check(search, rounds_of(search, 1))
    for search in (search_of("best-of-n", {}), search_of("svdd", {"children": 1})):
        check(search, rounds_of(search, 1))


def test_best_of_n_and_one_block_take_a_deterministic_sampler():
    for search in (search_of("best-of-n", {}), search_of("code", {"block": STEPS})):
        check(search, rounds_of(search, STEPS), 1, False)


def test_candidates_are_scored_without_density_guidance_and_images_with_it(policy):
    """Predictions by hand of the states that the search visits: the sampler steps with shifted ones, and the last step's is the image."""
    settings = Generation(steps=4, guidance_scale=1.0, density=0.1, seed=2)
    search, mix, sigmas = search_of("svdd", {"children": 2}), cfg(settings.base), policy.sigmas(4)
    scored, states = [], []

    class Seeing(Searcher):
        def _scored(self, latents, prompt):
            scored.append(latents)
            return latents.mean((1, 2, 3))

        def _denoised(self, mix, prompt, i, x, made):
            states.append((i, x))
            return super()._denoised(mix, prompt, i, x, made)

    found = Seeing(policy, mix, sigmas, settings, search, rounds_of(search, 4), None)("a red star")
    by_hand = policy.denoiser(["a red star"] * 2, adapter="base")
    rows = [(i, x) for i, x in states if i > 0]
    assert [i for i, _ in rows] == [1, 2, 3] and len(scored) == 3
    for (i, x), latents in zip(rows, scored):
        with torch.no_grad():
            plain = by_hand(x, sigmas[i].expand(2))
        guided = density_guided(x, plain, sigmas[i].expand(2), 0.1)
        expected = guided if i == 3 else plain
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
        assert float((guided - plain).abs().max()) > 1e-4
    best = max(range(2), key=lambda row: float(scored[-1][row].mean()))
    torch.testing.assert_close(found.latents[0], scored[-1][best], rtol=0, atol=1e-6)


def test_rewards_that_are_not_finite_never_win():
    def broken(latents):
        found = curved(latents)
        return torch.where(torch.arange(len(found)) == int(found.argmax()), torch.nan, found)

    assert math.isfinite(run("best-of-n", broken).scores[0])
    with pytest.raises(ValueError, match="no particle has a finite reward"):
        run("best-of-n", lambda x: torch.full((len(x),), torch.inf))


def test_diversity_trades_reward_for_distance():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    assert diverse([3.0, 2.9, 2.0], features, 2, 0.1) == [0, 1] and diverse([3.0, 2.9, 2.0], features, 2, 1.0) == [0, 2]
    found = run("best-of-n", particles=6)
    assert found.chosen(3) == [0, 1, 2] and found.chosen(1, 5.0) == [0]


def test_copies_come_last():
    found = run("fk", particles=8, strength=50.0, block=1, start=0.0, end=1.0, ess=1.0)
    kept = found.latents[found.chosen(8)].flatten(1)
    distinct = len({tuple(row) for row in kept.tolist()})
    assert distinct < 8 and len({tuple(row) for row in kept[:distinct].tolist()}) == distinct


def test_the_table_says_who_survived_and_from_whom():
    found = run("dlbs", particles=2, children=2)
    lines = found.tree.csv().splitlines()
    assert lines[0] == "step,particle,parent,score,survives,log_weight" and len(lines) == 1 + len(found.tree.nodes)
    for before, now in zip(found.tree.rounds(), found.tree.rounds()[1:]):
        alive = {node.particle for node in before if node.survives}
        assert {node.parent for node in now} == alive and len(alive) == 2
    assert found.tree.figure().axes


def test_copies_come_last_however_many_there_are():
    """torch.cdist of more than 25 rows goes through a matrix product, which finds equal rows apart."""
    latents = torch.randn(32, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = torch.cat([latents, latents])
    found = Found(latents, [float(-i) for i in range(64)], None, None, None)
    assert found.chosen(64)[:32] == list(range(32))
