"""DRaFT, AlignProp and DRTune against autograd through a chain written out."""

from __future__ import annotations

import pytest
import torch
from helpers.family import Family, Towers, as4, batch, gradient
from helpers.losses import loss_of

from trainer.objectives import AlignProp, DRaFTK, DRaFTLV, DRTune
from trainer.sampling import alpha, step


def loop(policy, b, steps, first, eta=0.0):
    """The whole chain by hand, with a graph from `first` on."""
    sigmas = policy.sigmas(steps)
    x = policy.start(b.rng.normal("start", (3, 1, 1)), steps)
    for i in range(steps):
        here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
        denoised = policy.denoiser(b.prompts)(x, here)
        noise = b.rng.normal(f"step {i}", (3, 1, 1)).double() if eta and i + 1 < steps else None
        x = step(x, denoised, here, there, noise, eta if noise is not None else 0.0, policy.space)
        if i + 1 == first:
            x = x.detach()
    return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_draft_k_is_autograd_through_the_last_k_steps(k, recompute):
    policy, b = Family(), batch()
    loss, _ = loss_of(DRaFTK(steps=6, k=k, guidance_scale=1.0, recompute=recompute), policy, b, Towers())
    expected = -Towers()(loop(policy, b, 6, 6 - k), b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


def test_draft_lv_averages_over_renoised_ends():
    policy, b = Family("flow"), batch()
    loss, logs = loss_of(DRaFTLV(steps=6, guidance_scale=1.0, samples=2), policy, b, Towers())
    end, sigma = loop(policy, b, 6, 5), policy.sigmas(6)[5].expand(4)
    scores = [Towers()(end, b.prompts)]
    for j in range(2):
        noise = b.rng.normal(f"low variance {j}", (3, 1, 1)).double()
        scores.append(Towers()(policy.denoiser(b.prompts)(policy.add_noise(end.detach(), noise, sigma), sigma), b.prompts))
    expected = -torch.stack(scores).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    assert logs["reward"].shape == (4,)


def test_alignprop_is_an_ancestral_draft_with_a_random_cut():
    objective = AlignProp(steps=20, cut_mean=16.0, cut_std=2.0, guidance_scale=1.0)
    cuts = torch.tensor([float(objective.first(batch(number=n))) for n in range(2000)])
    assert cuts.min() >= 0 and cuts.max() <= 19
    below = [
        min(c, 19.0) for c in (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 2 + 16).round().tolist() if 0 <= c < 20
    ]
    truncated = torch.tensor(below)
    assert float(cuts.mean()) == pytest.approx(float(truncated.mean()), abs=4 * float(truncated.std()) / 2000**0.5)
    policy, b = Family(), batch()
    objective = AlignProp(steps=6, cut_mean=3.0, cut_std=0.0, guidance_scale=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    expected = -Towers()(loop(policy, b, 6, 3, eta=1.0), b.prompts).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_drtune_holds_the_networks_input(prediction):
    """By hand, with the noise prediction taken at a detached state, and without a graph where not trained."""
    policy, b = Family(prediction), batch()
    objective = DRTune(steps=6, k=2, early_stop=3, guidance_scale=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    offset = int(b.rng.integers("trained steps", 0, 2, shared=True)[0])
    last = 5 - int(b.rng.integers("early stop", 0, 2, shared=True)[0])
    trained = {offset, offset + 3} if offset <= last else {last}
    sigmas = policy.sigmas(6)
    x = policy.start(b.rng.normal("start", (3, 1, 1)), 6)
    for i in range(last + 1):
        here = sigmas[i].expand(4)
        held = x.detach()
        a, a_next = alpha(sigmas[i], policy.space), alpha(sigmas[i + 1], policy.space)
        epsilon = (held - a * policy.denoiser(b.prompts)(held, here)) / as4(here, x)
        epsilon = epsilon if i in trained else epsilon.detach()
        clean = (x - sigmas[i] * epsilon) / a
        x = clean if i == last else a_next * clean + sigmas[i + 1] * epsilon
    expected = -Towers()(x, b.prompts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


def test_without_an_early_end_drtune_is_longaligns_training():
    """The official loop (luping-liu/LongAlign, unet_reward.py): 50 DDIM steps, every tenth in the graph from a random one of the first ten
    on, the network's input detached and the state not; loss (1 − score)/2."""
    policy, b = Family(), batch()
    objective = DRTune(early_stop=1, guidance_scale=1.0)
    loss, _ = loss_of(objective, policy, b, Towers())
    trained = sorted(objective._trained(b, 49))
    assert objective.steps == 50 and trained == list(range(trained[0], 50, 10)) and len(trained) == 5 and trained[0] < 10
    sigmas = policy.sigmas(50)
    x = policy.start(b.rng.start_noise((3, 1, 1)), 50)
    for i in range(50):
        here = sigmas[i].expand(len(x))
        noise = (x.detach() - policy.denoiser(b.prompts)(x.detach(), here)) / as4(here, x)
        clean = x - as4(here, x) * (noise if i in trained else noise.detach())
        x = clean + sigmas[i + 1] * (noise if i in trained else noise.detach())
    official = (1 - Towers()(clean, b.prompts)).mean() / 2
    torch.testing.assert_close(gradient(policy, loss) / 2, gradient(policy, official))
    starts = {min(objective._trained(batch(seed=seed), 49)) for seed in range(200)}
    assert starts == set(range(10))
