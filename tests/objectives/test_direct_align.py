"""Direct-Align and SRPO against the four stages of the paper, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.family import Family, Towers, as4, batch, gradient
from helpers.losses import batch_of, loss_of

from trainer.objectives import SRPO, DirectAlign
from trainer.objectives.reward_gradient.direct_align import blend_weight, from_flow
from trainer.sampling import alpha, step


def four_stages(policy, x0, noise, here, there, prompts):
    """Direct-Align as the paper draws it: noise, one step with the network's own velocity, take the known noise away."""
    x = policy.add_noise(x0, noise, here)
    denoised = policy.denoiser(prompts)(x, here)
    slope = (x - denoised) / as4(here, x)  # ε̂ in VE, v in flow: dx/dσ either way
    moved = x + as4(there - here, x) * slope
    return (moved - as4(there, x) * noise) / as4(alpha(there, policy.space), x)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("gap", [-0.07, 0.07], ids=["denoise", "inversion"])
def test_direct_align_is_a_blend_with_the_prediction(prediction, gap):
    policy, b = Family(prediction), batch()
    noise = b.rng.normal("start", (3, 1, 1)).double()
    here = from_flow(torch.tensor([0.5, 0.6, 0.7, 0.85], dtype=torch.float64), policy.space)
    there = from_flow(torch.tensor([0.5, 0.6, 0.7, 0.85], dtype=torch.float64) + gap, policy.space)
    expected = four_stages(policy, b.latents, noise, here, there, b.prompts)
    denoised = policy.denoiser(b.prompts)(policy.add_noise(b.latents, noise, here), here)
    weight = blend_weight(here, there, policy.space)
    assert bool((weight > 0).all()) if gap < 0 else bool((weight < 0).all())
    found = b.latents + as4(weight, b.latents) * (denoised - b.latents)
    torch.testing.assert_close(found, expected)
    towers = Towers()
    torch.testing.assert_close(
        gradient(policy, towers(found, b.prompts).sum()), gradient(policy, towers(expected, b.prompts).sum()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_direct_align_scores_the_four_stages_at_the_levels_it_draws(branch, monkeypatch):
    policy, b = Family("flow"), batch()
    objective = DirectAlign(steps=6, source="offline", branch=branch, sigma_low=0.4, sigma_high=0.8, gap=0.25)
    share = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    monkeypatch.setattr(DirectAlign, "shares", lambda *_: share)
    loss, logs = loss_of(objective, policy, b, Towers())
    here = 0.4 + 0.4 * (share * 0.75 + (0.25 if branch == "denoise" else 0))
    there = here + (-0.1 if branch == "denoise" else 0.1)
    assert float(there.min()) >= 0.4 and float(there.max()) <= 0.8 + 1e-12
    scores = Towers()(four_stages(policy, b.latents, b.rng.normal("start", (3, 1, 1)).double(), here, there, b.prompts), b.prompts)
    torch.testing.assert_close(logs["reward"], scores.detach())
    torch.testing.assert_close(loss, (-scores if branch == "denoise" else scores).mean())


def test_a_recovery_at_zero_noise_is_refls_estimate():
    policy, b = Family("flow"), batch()
    objective = DirectAlign(steps=6, source="offline", sigma_low=0.0, sigma_high=0.8, gap=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    sigma = torch.full((4,), 0.8, dtype=torch.float64)
    noise = b.rng.normal("start", (3, 1, 1)).double()
    scores = Towers()(policy.denoiser(b.prompts)(policy.add_noise(b.latents, noise, sigma), sigma), b.prompts)
    torch.testing.assert_close(loss, -scores.mean(), rtol=1e-7, atol=1e-9)


def test_online_direct_align_starts_from_its_own_rollout_with_the_noise_that_began_it():
    policy, b = Family(), batch(latents=False)
    sigmas = policy.sigmas(6)
    noise = b.rng.normal("start", (3, 1, 1))
    x = policy.start(noise, 6)
    with torch.no_grad():
        for i in range(6):
            here, there = sigmas[i].expand(4), sigmas[i + 1].expand(4)
            x = step(x, policy.denoiser(b.prompts)(x, here), here, there, eta=0.0)
    online = loss_of(DirectAlign(steps=6, sigma_low=0.3, sigma_high=0.8), policy, b, Towers())[0]
    offline = loss_of(
        replace(DirectAlign(steps=6, sigma_low=0.3, sigma_high=0.8), source="offline"), policy, batch_of(b.prompts, b.rng, 0, x), Towers()
    )[0]
    torch.testing.assert_close(online, offline)
    torch.testing.assert_close(gradient(policy, online), gradient(policy, offline))


def test_srpo_is_the_difference_of_the_scores_under_control_words():
    policy, b = Family(), batch(number=4)
    words = {"positive": ("xx", "yyyy"), "negative": ("z", "zz", "zzz")}
    objective = SRPO(steps=6, source="offline", sigma_low=0.3, sigma_high=0.8, kappa_low=-0.5, kappa_high=0.7, **words)
    share, low, high = objective.shares(b, 0), 0.3, 0.8
    loss, logs = loss_of(objective, policy, b, Towers())
    called = from_flow(low + (high - low) * (share * 0.9 + 0.1), "ve").double()
    recovered = from_flow(low + (high - low) * (share * 0.9 + 0.1) - (high - low) * 0.1, "ve").double()
    images = four_stages(policy, b.latents, b.rng.normal("start", (3, 1, 1)).double(), called, recovered, b.prompts)
    scores = Towers().scores(images, b.prompts, ["xx. ", "zz. "])  # micro-batch 4: words 4 mod 2 and 4 mod 3
    kappa = -0.5 + 1.2 * share.double()
    torch.testing.assert_close(loss, -((1 + kappa) * scores[:, 0] - scores[:, 1]).mean(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logs["relative"], (scores[:, 0] - scores[:, 1]).detach(), rtol=1e-6, atol=1e-8)
