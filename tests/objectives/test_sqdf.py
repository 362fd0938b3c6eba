"""SQDF against a second copy of the network, sampled log ratios and torch's own KL."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.family import Family, Towers, batch, gradient
from helpers.losses import batch_of
from helpers.unet import adapted

from trainer.objectives import SQDF, RunContext
from trainer.objectives.reward_gradient.sqdf import kl_weights, transition_loss
from trainer.rng import Rng
from trainer.sampling import step


@pytest.mark.parametrize("estimator", ["base", "consistency"])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_sqdf_without_discount_kl_and_buffer_is_the_plain_one_step_gradient(prediction, estimator):
    """End to end autograd through a second network object: what the project avoids, and so independent of how it does."""
    policy, b = Family(prediction), batch()
    objective = SQDF(steps=6, gamma=1.0, alpha=0.0, buffer_gb=0.0, guidance_scale=1.0, estimator=estimator)
    index = torch.tensor([0, 2, 4, 5])  # the last one ends in x0 itself
    sigmas = policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    loss, logs = transition_loss(objective, RunContext(policy, Towers()), b.prompts, b.rng, x, index)
    frozen = Family(prediction)
    noise = b.rng.normal("transition noise", (3, 1, 1)).double()
    here, there = sigmas[index], sigmas[index + 1]
    following = step(x, policy.denoiser(b.prompts)(x, here), here, there, noise, 1.0, policy.space)
    estimate = torch.cat([frozen.denoiser(b.prompts[:3], adapter=estimator)(following[:3], there[:3]), following[3:]])
    expected = -Towers()(estimate, b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    torch.testing.assert_close(logs["reward"], Towers()(estimate, b.prompts).detach())


def test_the_discount_counts_the_steps_that_follow():
    policy, b = Family(), batch()
    index, sigmas = torch.tensor([0, 2, 4, 5]), policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    objective = SQDF(steps=6, gamma=0.5, alpha=0.0, guidance_scale=1.0)
    loss, logs = transition_loss(objective, RunContext(policy, Towers()), b.prompts, b.rng, x, index)
    credit = torch.tensor([0.5**5, 0.5**3, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), -(credit * logs["reward"]).mean())


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_the_closed_form_kl_is_the_mean_log_ratio_of_samples(prediction):
    policy, b = Family(prediction), batch()
    index = torch.tensor([0, 1, 3, 4])
    sigmas = policy.sigmas(6)
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    here, there = sigmas[index], sigmas[index + 1]
    tuned, base = policy.denoiser(b.prompts)(x, here), policy.denoiser(b.prompts, adapter="base")(x, here)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    means = [step(x, d, here, there, zero, 1.0, policy.space) for d in (tuned, base)]
    width = (step(x, tuned, here, there, one, 1.0, policy.space) - means[0]).flatten(1)[:, 0]
    laws = [torch.distributions.Normal(m.detach().flatten(1), width.detach()[:, None]) for m in means]
    torch.manual_seed(0)
    samples = laws[0].sample((200_000,))
    ratios = (laws[0].log_prob(samples) - laws[1].log_prob(samples)).sum(2)
    found = (kl_weights(sigmas, policy.space)[index] * (tuned - base).square().flatten(1).sum(1)).detach()
    assert bool((found > 1e-4).all())
    error = (ratios.mean(0) - found).abs()
    assert bool((error < 5 * ratios.std(0) / 200_000**0.5).all()), (ratios.mean(0), found)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*laws).sum(1), rtol=1e-8, atol=1e-10)


def test_the_kl_is_logged_in_nats_and_weighed_per_element_the_last_transition_included():
    policy, b, sigmas = Family(), batch(), Family().sigmas(6)
    index = torch.tensor([1, 3, 4, 5])
    x = policy.add_noise(b.latents, b.rng.normal("start", (3, 1, 1)).double(), sigmas[index])
    weights = kl_weights(sigmas, "ve")[index]
    assert bool((kl_weights(sigmas, "ve") > 0).all())
    denoised = policy.denoiser(b.prompts)(x, sigmas[index])
    nats = weights * (denoised - policy.denoiser(b.prompts, adapter="base")(x, sigmas[index])).square().flatten(1).sum(1)
    run = RunContext(policy, Towers())
    objectives = [SQDF(steps=6, alpha=a, guidance_scale=1.0) for a in (7.0, 0.0)]
    (with_kl, logs), (without, _) = (transition_loss(o, run, b.prompts, b.rng, x, index) for o in objectives)
    torch.testing.assert_close(logs["kl"], nats.detach())
    torch.testing.assert_close(logs["kl per element"], nats.detach() / 3)
    torch.testing.assert_close(gradient(policy, with_kl) - gradient(policy, without), gradient(policy, 7.0 * nats.mean() / 3))


@pytest.mark.parametrize("estimator", ["base", "consistency"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_sqdf_on_a_real_network_equals_a_second_copy_of_it(pipeline_folder, consistency_lora, estimator, recomputed):
    """The estimator as another object, one graph through both: the copies that adapter states save us."""
    policy = adapted(pipeline_folder, consistency_lora)
    policy.gradient_checkpointing(denoiser=recomputed, vae=recomputed)
    objective = SQDF(steps=10, gamma=1.0, alpha=0.0, guidance_scale=1.0, estimator=estimator)
    b = batch_of(("a red star", "a ring"), Rng(0, 0, (0, 1)), 0)
    index, sigmas = torch.tensor([4, 8]), policy.sigmas(10)
    x = policy.add_noise(
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), b.rng.normal("start", (4, 8, 8)), sigmas[index]
    )

    class Mean:
        differentiable = True

        def __call__(self, images, prompts):
            return images.square().flatten(1).mean(1)

    transition_loss(objective, RunContext(policy, Mean()), b.prompts, b.rng, x, index)[0].backward()
    found = [p.grad.clone() for p in policy.parameters()]
    assert all(float(g.abs().max()) > 0 for g in found)
    frozen = copy.deepcopy(policy)
    policy.gradient_checkpointing(denoiser=False, vae=False)
    frozen.gradient_checkpointing(denoiser=False, vae=False)
    for parameter in policy.parameters():
        parameter.grad = None
    here, there = sigmas[index], sigmas[index + 1]
    following = step(x, policy.denoiser(b.prompts)(x, here), here, there, b.rng.normal("transition noise", (4, 8, 8)), 1.0)
    estimate = frozen.denoiser(b.prompts, adapter=estimator)(following, there)
    (-Mean()(policy.decode(estimate), b.prompts).mean()).backward()
    for a, p in zip(found, policy.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=2e-4, atol=1e-7)
