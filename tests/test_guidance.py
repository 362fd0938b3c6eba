"""Mixes of denoisers: coefficients, combined generation, switches, and what generation computes once."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.samplers import grid, noises, table, toy_denoiser

from trainer.generate import Generation, branches, generate
from trainer.guidance import Mix, Slot, Switch, cfg, classifier_free_guidance, combined, weighted_sum
from trainer.sampling import end_of, trajectory

BASE, TUNED = Slot("base"), Slot("tuned")
EXAMPLES = {"cfg": cfg(TUNED), "combined": combined(BASE, TUNED, 5)}


def test_coefficients_of_every_mix_sum_to_one():
    sums = {name: [sum(mix.coefficients(i, sigma)) for i, sigma in enumerate(grid(12)[:-1].tolist())] for name, mix in EXAMPLES.items()}
    assert all(values == [1.0] * 12 for values in sums.values()), sums
    assert [mix.at(4, 1.0) for mix in EXAMPLES.values()] == [((TUNED, 1.0),), ((BASE, 1.0),)]  # a coefficient of 0 costs no call


@pytest.mark.parametrize("wrong", [(0.5, 0.6), (1.0,), (0.5, 0.25, 0.25)])
def test_other_coefficients_are_refused(wrong):
    with pytest.raises(ValueError, match="with sum 1"):
        Mix((BASE, TUNED), lambda i, sigma: wrong).at(0, 1.0)


def test_a_weighted_sum_of_two_branches_is_classifier_free_guidance():
    """cond with coefficient s and uncond with 1 − s, on x0-predictions."""
    x, sigma = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64)

    def uncond(x, sigma):
        return 0.7 * toy_denoiser(x, sigma) - 0.1

    found = weighted_sum([(toy_denoiser, 7.5), (uncond, -6.5)])(x, sigma)
    torch.testing.assert_close(found, classifier_free_guidance(toy_denoiser(x, sigma), uncond(x, sigma), 7.5), rtol=1e-12, atol=1e-12)
    assert weighted_sum([(toy_denoiser, 1.0)]) is toy_denoiser


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m"])
def test_switching_at_the_ends_is_one_model_alone_bit_for_bit(method):
    calls = []

    def base(x, sigma):
        calls.append("base")
        return toy_denoiser(x, sigma)

    def tuned(x, sigma):
        return 0.9 * toy_denoiser(x, sigma) + 0.05

    sigmas = grid(12)
    start = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * sigmas[0]

    def drawn(*switches):
        mixes = {k: combined(BASE, TUNED, k) for k in switches}
        return dict(branches(mixes, lambda slot: base if slot.adapter == "base" else tuned, start, sigmas, noises(0), method))

    finals = drawn(0, 5, 12)
    assert len(calls) == 12  # the base's steps are taken once for all switches
    alone = [end_of(start, trajectory(d, start, sigmas, noises(0), method)) for d in (tuned, base)]
    assert torch.equal(finals[0], alone[0]) and torch.equal(finals[12], alone[1])
    assert torch.equal(finals[5], drawn(5)[5])
    assert not torch.equal(finals[5], finals[0]) and not torch.equal(finals[5], finals[12])


def test_a_tuned_part_that_ends_is_a_chain_of_three_trajectories(toy_policy):
    settings = Generation(steps=10, guidance_scale=1.0)
    base, tuned, between = cfg(settings.base), cfg(settings.tuned()), combined(settings.base, settings.tuned(), 3, 6)
    found = [next(slot.adapter for slot, _ in between.at(i, 1.0)) for i in range(10)]
    assert found == ["base"] * 3 + ["tuned"] * 3 + ["base"] * 4
    early = combined(settings.base, settings.tuned(), 0, 10)
    images = generate(
        toy_policy,
        ["p"] * 2,
        settings,
        {"base": base, "tuned": tuned, "all": early, "none": combined(settings.base, settings.tuned(), 10, 10)},
    )
    assert torch.equal(images["all"], images["tuned"]) and torch.equal(images["none"], images["base"])


def test_generation_computes_common_steps_once(toy_policy):
    """Two tuned models, three switches, the base alone and a mix that changes at every step: N calls a step of each kind."""
    settings, n, other = Generation(steps=10, guidance_scale=1.0, chunk=4), 6, type(toy_policy)()
    with torch.no_grad():
        other.weight.add_(0.3)
    rising = Mix((BASE, TUNED), lambda i, sigma: (1 - i / 10, i / 10))
    switched = {(name, k): combined(settings.base, settings.tuned(model=name), k) for name in ("", "other") for k in (2, 5, 10)}
    images = generate(toy_policy, ["p"] * n, settings, {**switched, "base": cfg(settings.base), "rising": rising}, {"other": other})
    # the base's ten steps, its first of which is the rising mix's too; the tuned model's 8 + 5; nine steps of two calls
    assert (toy_policy.calls, other.calls) == (n * (10 + 8 + 5 + 9 * 2), n * (8 + 5))
    assert torch.equal(images["", 10], images["base"]) and torch.equal(images["other", 10], images["base"])
    distinct = [images["base"], images["", 2], images["", 5], images["other", 2], images["other", 5], images["rising"]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(distinct, 2))
    alone = {key: generate(toy_policy, ["p"] * n, settings, {key: mix}, {"other": other})[key] for key, mix in switched.items()}
    assert all(torch.equal(alone[key], images[key]) for key in alone)


@pytest.mark.parametrize(("steps", "at_226", "at_101"), [(20, 15, 17), (25, 19, 22), (30, 23, 26), (40, 30, 35), (50, 38, 44)])
def test_a_noise_level_switch_finds_the_same_place_on_every_grid(steps, at_226, at_101):
    sigmas = grid(steps).float()
    assert Switch(sigma=float(table()[226])).index(sigmas) == at_226
    assert Switch(sigma=float(table()[101])).index(sigmas) == at_101


def test_switches_say_what_is_wrong():
    sigmas = grid(10)
    assert Switch.parse("3").index(sigmas) == 3 and Switch.parse("50%").index(sigmas) == 5
    assert Switch.parse("sigma=1000").index(sigmas) == 0
    with pytest.raises(ValueError, match="0 .tuned only. to 10"):
        Switch(step=11).index(sigmas)
    with pytest.raises(ValueError, match="write a step"):
        Switch.parse("late")
    for text in ("sigma=nan", "sigma=-1", "sigma=inf", "nan%"):
        with pytest.raises(ValueError, match="write a step"):
            Switch.parse(text)
    with pytest.raises(ValueError, match="one of step, percent, sigma or last"):
        Switch(step=1, sigma=0.5)


def test_two_schedules_meet_at_one_level():
    base, tuned = grid(40), grid(8)
    for switch, k in ((Switch(step=3), 3), (Switch(percent=0.5), 20), (Switch(last=12), 28), (Switch(sigma=float(base[7])), 7)):
        joined, found = switch.joined(base, base)
        assert torch.equal(joined, base) and found == k  # equal schedules are one
    assert all(torch.equal(switch.joined(base, tuned)[0], tuned) for switch in (Switch(step=0), Switch(last=8)))
    assert all(torch.equal(switch.joined(base, tuned)[0], base) for switch in (Switch(step=40), Switch(last=0)))
    joined, k = Switch(step=2).joined(base, tuned)
    assert k == 2 and torch.equal(joined[:3], base[:3]) and torch.equal(joined[3:], tuned[tuned < base[2]])
    joined, k = Switch.parse("last=6").joined(base, tuned)  # the base draws down to the level where 6 steps are left
    assert torch.equal(joined[k:], tuned[2:]) and torch.equal(joined[:k], base[base > tuned[2] * 1.0001]) and k > 2
    assert bool((joined.diff() < 0).all())
    with pytest.raises(ValueError, match="last 9 of 8 steps"):
        Switch(last=9).joined(base, tuned)


@pytest.mark.parametrize(("first", "then"), itertools.product(("ddpm", "ddim", "dpmpp_2m"), repeat=2))
def test_parts_with_their_own_steps_and_sampler_are_a_chain_of_two_trajectories(first, then):
    """Each from its own table of levels; the history of a multistep sampler crosses only where the sampler stays."""

    def tuned(x, sigma):
        return 0.9 * toy_denoiser(x, sigma) + 0.05

    levels, k = Switch(last=4).joined(grid(20), grid(8))
    start = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * levels[0]
    mix = combined(BASE, TUNED, k)
    models = {"base": toy_denoiser, "tuned": tuned}
    found = dict(branches({0: mix}, lambda slot: models[slot.adapter], start, levels, noises(0), first, tuned_method=then))[0]
    transitions = list(trajectory(toy_denoiser, start, levels, noises(0), first, 0, k))
    history = transitions[-1].denoised if first == then else None
    x = transitions[-1].x_next
    assert torch.equal(found, end_of(x, trajectory(tuned, x, levels, noises(0), then, k, previous=history)))


def test_generation_with_two_equal_schedules_is_generation_with_one(toy_policy):
    settings = Generation(steps=10, guidance_scale=1.0)
    sigmas = toy_policy.sigmas(10)
    mixes = {k: combined(settings.base, settings.tuned(), k) for k in (0, 4, 10)}
    grids = {k: Switch(step=k).joined(sigmas, sigmas)[0] for k in mixes}
    one, two = (generate(toy_policy, ["p"] * 3, settings, mixes, grids=given) for given in (None, grids))
    assert all(torch.equal(one[k], two[k]) for k in mixes)
    other = {k: Switch(step=k).joined(sigmas, toy_policy.sigmas(5))[0] for k in (2, 4, 6)}
    three = {k: combined(settings.base, settings.tuned(), k) for k in (2, 4, 6)}
    before = toy_policy.calls
    joined = generate(toy_policy, ["p"] * 3, settings, three, grids=other)
    # the base's six steps are taken once for all; the tuned model's own levels below each switch
    assert toy_policy.calls - before == 3 * (6 + sum(len(other[k]) - 1 - k for k in three))
    alone = {k: generate(toy_policy, ["p"] * 3, settings, {k: three[k]}, grids=other)[k] for k in three}
    assert all(torch.equal(joined[k], alone[k]) for k in three)
    assert not torch.equal(generate(toy_policy, ["p"] * 3, settings, mixes, grids=other)[4], one[4])
    assert torch.equal(generate(toy_policy, ["p"] * 3, settings, mixes, grids=other)[0], one[0])


def test_a_part_may_have_prompts_of_its_own(policy):
    """The template of a slot is the prompt itself, and a negative prompt is one more branch of guidance."""
    x, sigma, prompts = torch.randn(2, *policy.latent_shape), torch.tensor([0.8, 0.4]), ["a red star", "a blue ring"]
    own = {"plain": Slot("base", 3.0), "suffix": Slot("base", 3.0, prompt="{prompt}, vivid", negative="blurred")}
    images = generate(policy, prompts, Generation(steps=2), {name: cfg(slot) for name, slot in own.items()})
    written = generate(policy, [f"{p}, vivid" for p in prompts], Generation(steps=2), {0: cfg(Slot("base", 3.0, negative="blurred"))})
    assert torch.equal(images["suffix"], written[0]) and not torch.equal(images["suffix"], images["plain"])
    cond, uncond = (policy.denoiser([*texts], adapter="base")(x, sigma) for texts in (prompts, ["blurred"] * 2))
    found = policy.denoiser(prompts, adapter="base", guidance_scale=3.0, negative="blurred")(x, sigma)
    torch.testing.assert_close(found, classifier_free_guidance(cond, uncond, 3.0), rtol=1e-4, atol=1e-5)
