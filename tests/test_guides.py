"""Two-model guidance: identities in closed form, on every parametrisation and on a tiny Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.family import Family, as4
from helpers.samplers import grid

from trainer.config import ConfigError, build
from trainer.generate import Generation, branches, generate
from trainer.guidance import Slot, cfg, classifier_free_guidance
from trainer.guide_table import parse_table
from trainer.guides import GUIDES, step_at
from trainer.policy import Lora

BASE, TUNED = Slot("base", 3.0), Slot("tuned", 1.5)
SETTINGS = {"custom": {"table": "10: 3,-2,0,0; 0.5: 0,0,1.5,-0.5", "interpolation": "linear"}}
MEANS = {("base", "c"): 0.3, ("base", "n"): -0.2, ("tuned", "c"): 1.1, ("tuned", "n"): 0.4}
VARIANCE = 0.49


def guide(name, **settings):
    return build(GUIDES[name], {**SETTINGS.get(name, {}), **settings})


def gaussian(mean):
    """E[x0 | x, σ] for data N(mean, VARIANCE)."""
    return lambda x, sigma: (VARIANCE * x + as4(sigma.square(), x) * mean) / (VARIANCE + as4(sigma.square(), x))


def gaussians(slot):
    """A slot's denoiser where every model and prompt has data of its own mean; embeddings are the means."""
    n, c = MEANS[slot.adapter, "n"], MEANS[slot.adapter, "c"]
    seen, empty = gaussian(n + slot.prompt_weight * (c - n)), gaussian(n)
    return lambda x, sigma: classifier_free_guidance(seen(x, sigma), empty(x, sigma), slot.guidance_scale)


def drawn(mix, steps=20):
    sigmas = grid(steps)
    start = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * sigmas[0]
    return dict(branches({0: mix}, gaussians, start, sigmas, lambda i: torch.zeros(1), "ddim"))[0]


def outputs(name, slots, settings):
    """What a guide predicts at every step; a negative moves the mean of its branch, a slot without one does not see it."""
    sigmas, x = grid(12), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mix = guide(name, **settings).mix(*slots, sigmas)

    def predicted(slot, sigma):
        n, c = MEANS[slot.adapter, "n"] + len(slot.negative), MEANS[slot.adapter, "c"]
        seen, empty = gaussian(n + slot.prompt_weight * (c - n)), gaussian(n)
        return classifier_free_guidance(seen(x, sigma), empty(x, sigma), slot.guidance_scale)

    return torch.cat([sum(v * predicted(slot, s[None]) for slot, v in mix.at(i, float(s))) for i, s in enumerate(sigmas[:-1])])


READ_OF = [
    *((name, scales, {}) for name in GUIDES for scales in ((3.0, 1.5), (1.0, 1.0), (0.0, 1.5))),
    ("chats", (2.0, 1.5), {"proxy": -1.0}),
    *(
        ("custom", (2.0, 1.5), {"table": text})
        for text in ("1: 0.4,0.6", "5: 2,-1,0,0; 1: 0.4,0,0.6,0", "1: 0,0,-5,6,0,0", "1: 0,0,0,2,0,-1")
    ),
]


@pytest.mark.parametrize(("name", "scales", "settings"), READ_OF)
def test_a_guide_reads_the_scales_and_negatives_that_change_its_prediction(name, scales, settings):
    base, tuned = (Slot(each, scale) for each, scale in zip(("base", "tuned"), scales))
    moved = {
        "guidance_scale": (replace(base, guidance_scale=base.guidance_scale + 0.7), tuned),
        "tuned_guidance_scale": (base, replace(tuned, guidance_scale=tuned.guidance_scale + 0.7)),
        "negative": (replace(base, negative="x"), tuned),
        "tuned_negative": (base, replace(tuned, negative="x")),
    }
    plain = outputs(name, (base, tuned), settings)
    changed = {key for key, slots in moved.items() if float((outputs(name, slots, settings) - plain).abs().max()) > 1e-9}
    assert guide(name, **settings).reads(*scales) - {"proxy"} == changed


def test_a_proxy_prompt_is_read_where_a_coefficient_is_on_it():
    proxy = {name: "proxy" in guide(name).reads(2.0, 2.0) for name in GUIDES}
    assert [name for name, read in proxy.items() if read] == ["chats"]
    six = {text: "proxy" in guide("custom", table=text).reads(2.0, 2.0) for text in ("1: 0,0,-5,6,0,0", "1: 0,0,0,6,-5,0")}
    assert list(six.values()) == [True, False]
    assert "proxy" not in guide("chats").reads(0.0, 1.0) and "proxy" not in guide("chats", proxy=0.0).reads(2.0, 1.0)


@pytest.mark.parametrize("name", GUIDES)
def test_coefficients_sum_to_one_at_every_step_of_every_guide(name):
    sigmas = grid(12)
    mix = guide(name).mix(BASE, TUNED, sigmas)
    sums = [sum(value for _, value in mix.at(i, float(sigma))) for i, sigma in enumerate(sigmas[:-1])]
    assert sums == pytest.approx([1.0] * 12, abs=1e-12)


def test_network_calls_are_counted_and_a_coefficient_of_0_costs_none():
    sigmas = grid(20)
    calls = {name: guide(name).mix(BASE, TUNED, sigmas).calls(sigmas.tolist()) for name in GUIDES}
    below = int((grid(20)[:-1] <= 0.5).sum())  # there the custom table has the tuned model alone
    above = int((grid(20)[:-1] >= 10).sum())
    assert calls == {
        **{"combined": 40, "rl": 80, "aig": 2 + 19 * 4, "autoguidance": 40, "npo": 40, "chats": 40, "double-cfg": 80},
        "custom": 2 * (above + below) + 4 * (20 - above - below),
    }
    assert guide("rl").mix(replace(BASE, guidance_scale=1.0), TUNED, sigmas).calls(sigmas.tolist()) == 40
    assert guide("rl", start=0.5, end=0.75).mix(BASE, TUNED, sigmas).calls(sigmas.tolist()) == 15 * 2 + 5 * 4


def test_the_ends_of_rl_guidance_are_the_models_bit_for_bit():
    for weight, slot in ((0.0, BASE), (1.0, replace(TUNED, guidance_scale=3.0))):
        assert torch.equal(drawn(guide("rl", weight=weight).mix(BASE, TUNED, grid(20))), drawn(cfg(slot)))
    for weight, slot in ((0.0, replace(BASE, guidance_scale=1.0)), (1.0, replace(TUNED, guidance_scale=1.0))):
        assert torch.equal(drawn(guide("autoguidance", weight=weight).mix(BASE, TUNED, grid(20))), drawn(cfg(slot)))


@pytest.mark.parametrize("weight", [0.5, 1.6, 3.0])
def test_rl_guidance_of_two_gaussians_of_one_variance_samples_a_gaussian_of_extrapolated_mean(weight):
    """D is affine in the mean m. The flow of N(m, v) is known: x0 = m + √(v / (v + σ²)) (x − m); DDIM with 400 steps comes close."""
    base = replace(BASE, guidance_scale=1.0)
    mean = MEANS["base", "c"] + weight * (MEANS["tuned", "c"] - MEANS["base", "c"])
    sigmas = grid(400)
    found = drawn(guide("rl", weight=weight).mix(base, TUNED, sigmas), 400)
    start = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * sigmas[0]
    expected = mean + (VARIANCE / (VARIANCE + sigmas[0] ** 2)).sqrt() * (start - mean)
    error = (found - expected).square().mean().sqrt().item()
    assert error < 0.01, error
    x, sigma = torch.randn(4, 1, 1, 1, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    one, two = gaussians(base)(x, sigma), gaussians(replace(TUNED, guidance_scale=1.0))(x, sigma)
    torch.testing.assert_close((1 - weight) * one + weight * two, gaussian(mean)(x, sigma), rtol=1e-12, atol=1e-12)


def test_npo_with_equal_models_is_classifier_free_guidance_and_chats_without_contrast_the_winner():
    sigmas = grid(20)
    both = guide("npo").mix(replace(TUNED, guidance_scale=5.0), TUNED, sigmas)
    torch.testing.assert_close(drawn(both), drawn(cfg(replace(TUNED, guidance_scale=5.0))), rtol=1e-12, atol=1e-12)
    winner = guide("chats").mix(replace(BASE, guidance_scale=0.0), TUNED, sigmas)
    assert torch.equal(drawn(winner), drawn(cfg(replace(TUNED, guidance_scale=1.0))))
    # with the same model in both places and proxy 0 it is guidance of scale 1 + s
    same = guide("chats", proxy=0.0).mix(replace(TUNED, guidance_scale=4.0), TUNED, sigmas)
    torch.testing.assert_close(drawn(same), drawn(cfg(replace(TUNED, guidance_scale=5.0))), rtol=1e-12, atol=1e-12)


def test_double_guidance_is_the_sum_of_both_models_guidance():
    x, sigma = torch.randn(4, 1, 1, 1, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    m = {key: gaussian(mean)(x, sigma) for key, mean in MEANS.items()}
    expected = m["tuned", "n"] + 3 * (m["base", "c"] - m["base", "n"]) + 1.5 * (m["tuned", "c"] - m["tuned", "n"])
    found = sum(value * gaussians(slot)(x, sigma) for slot, value in guide("double-cfg").mix(BASE, TUNED, grid(20)).at(0, 0.8))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_annealed_interpolation_begins_with_the_base_and_ends_near_the_tuned_model():
    mix = guide("aig", power=1.25).mix(BASE, TUNED, grid(40))
    assert mix.at(0, 14.0) == ((BASE, 1.0),)
    assert [mix.at(i, 1.0)[1][1] for i in (10, 39)] == pytest.approx([0.25**1.25, 0.975**1.25])


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("name", ["rl", "aig", "autoguidance"])
def test_a_mix_of_networks_outputs_is_the_mix_of_x0(prediction, name):
    """The same weights on ε, v or velocity, as the official pipelines apply them, and on x0."""
    family = Family(prediction)
    x = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.full((3,), 0.6, dtype=torch.float64)
    weights = {"tuned": family.weight.detach(), "base": torch.zeros(4, dtype=torch.float64)}
    parts = guide(name).mix(replace(BASE, guidance_scale=1.0), TUNED, grid(10)).at(7, 0.6)
    mixed = sum(value * family.denoise(x, sigma, weights[slot.adapter]) for slot, value in parts)
    level = as4(sigma, x)
    scale = 1.0 if prediction == "flow" else (1 + level.square()).rsqrt()
    output = sum(value * family.network(x * scale, sigma, weights[slot.adapter]) for slot, value in parts)
    clean = {"epsilon": x - level * output, "v": scale**2 * x - level * scale * output, "flow": x - level * output}[prediction]
    torch.testing.assert_close(mixed, clean, rtol=1e-10, atol=1e-10)


def test_identities_on_a_tiny_stable_diffusion(policy):
    """Through prompts, adapters and the sampler: images of a LoRA that matters."""
    policy.add_lora(Lora(rank=4, alpha=8.0))
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    settings = Generation(steps=4, guidance_scale=3.0, method="ddim", seed=1)
    base, tuned, sigmas = settings.base, settings.tuned(), policy.sigmas(4)
    guided = replace(tuned, guidance_scale=3.0)
    mixes = {
        "cfg": cfg(guided),
        "npo": guide("npo").mix(guided, tuned, sigmas),
        "winner": guide("chats").mix(replace(base, guidance_scale=0.0), tuned, sigmas),
        "chats": guide("chats").mix(base, tuned, sigmas),
        "tuned": cfg(replace(tuned, guidance_scale=1.0)),
        "rl 1": guide("rl", weight=1.0).mix(base, tuned, sigmas),
        "rl 0": guide("rl", weight=0.0).mix(base, tuned, sigmas),
        "base": cfg(base),
    }
    images = generate(policy, ["a red star"] * 2, settings, mixes)
    torch.testing.assert_close(images["npo"], images["cfg"], rtol=0, atol=1e-5)
    assert torch.equal(images["winner"], images["tuned"])
    assert torch.equal(images["rl 1"], images["cfg"]) and torch.equal(images["rl 0"], images["base"])
    assert float((images["chats"] - images["tuned"]).abs().mean()) > 1e-3
    x, sigma = torch.randn(2, *policy.latent_shape), torch.full((2,), 1.0)
    c, n = (policy.prompts.conditioning([text] * 2) for text in ("a red star", ""))
    with torch.no_grad():
        proxy = policy.denoiser(["a red star"] * 2, adapter="base", prompt_weight=-0.5)(x, sigma)
        with policy.adapters.using("base"):
            expected = policy.predict(x, sigma, {k: 1.5 * n[k] - 0.5 * c[k] for k in c})
    torch.testing.assert_close(proxy, expected, rtol=0, atol=1e-6)


def test_a_custom_table_holds_rows_or_draws_lines_between_them():
    sigmas = grid(20)
    step = guide("custom", table="10: 1, 0; 2: 0.5, 0.5\n0.5: 0, 1", interpolation="step").mix(BASE, TUNED, sigmas)
    linear = guide("custom", table="10: 1, 0; 2: 0.5, 0.5; 0.5: 0, 1").mix(BASE, TUNED, sigmas)
    levels = (14.0, 10.0, 6.0, 2.0, 1.25, 0.5, 0.1)
    assert [step.coefficients(0, s)[0] for s in levels] == [1, 1, 1, 0.5, 0.5, 0, 0]
    assert [linear.coefficients(0, s)[0] for s in levels] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0])
    six = guide("custom", table="1: 0,0,-5,6,0,0", proxy=0.25).mix(BASE, TUNED, sigmas).at(0, 1.0)
    assert [(slot.adapter, slot.prompt_weight, value) for slot, value in six] == [("base", -0.25, -5.0), ("tuned", 1.0, 6.0)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("custom", {"table": ""}, "no coefficients: write rows"),
        ("custom", {"table": "1: 0.5, 0.6"}, "sum to 1.1: they must sum to 1"),
        ("custom", {"table": "1: 1"}, "give 2"),
        ("custom", {"table": "1: 1,0; 2: 0,1"}, "with σ below the row before"),
        ("custom", {"table": "2: 1,0; 1: 0,0,1,0"}, "rows of one length"),
        ("custom", {"table": "high: 1,0"}, "write `σ: c1, c2`"),
        ("custom", {"table": "nan: 1,0"}, "finite"),
        ("custom", {"table": "1: 1,0", "interpolation": "cubic"}, "use one of step, linear"),
        ("aig", {"power": 0.0}, "power = 0.0: give at least 0.01"),
        ("rl", {"weight": 1000.0}, "give at most 100"),
        ("rl", {"strength": 1.0}, "valid keys are end, start, weight"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_valid_form(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        guide(name, **settings)


def test_ranges_without_a_step_are_refused_when_the_steps_are_known():
    with pytest.raises(ValueError, match="no step of the 20 lies from start 0.5 to end 0.5"):
        guide("rl", start=0.5, end=0.5).mix(BASE, TUNED, grid(20))


def test_evaluations_between_steps_belong_to_the_step_before():
    sigmas = grid(8).tolist()
    assert [step_at(sigmas, s) for s in sigmas[:-1]] == list(range(8))
    assert step_at(sigmas, sigmas[3] * 0.999) == 3 and step_at(sigmas, sigmas[3] * (1 + 1e-5)) == 3
    assert step_at(sigmas, sigmas[0] * 2) == 0 and step_at(sigmas, 0.0) == 7
    assert len(parse_table("1: 1,0;")) == 1
