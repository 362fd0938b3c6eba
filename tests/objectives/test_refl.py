"""ReFL and ImageReFL against autograd by hand and against their own definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ToyPolicy
from helpers.losses import batch_of, loss_of
from helpers.toys import ToyDenoiser

from trainer.data.batches import Images, Prompts
from trainer.objectives import ImageReFL, ReFL, RunContext
from trainer.rng import Rng
from trainer.sampling import step

SMALL = {"steps": 10, "grad_from": 6, "grad_to": 9}


def batch(n=6, number=0, latents=True, seed=3):
    rng = Rng(seed, 0, tuple(range(n)))
    z = torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if latents else None
    return batch_of(tuple("abcdefghij"[:n]), rng, number, z)


def gradient(policy, loss):
    policy.weight.grad = None
    loss.backward()
    return policy.weight.grad.clone()


def hand_gradient(policy, x, sigma):
    """−d mean r / dw for r = −Σ(D − 0.3)², D = (x(1+a)+b)/(1+σ²)."""
    c = 1 / (1 + sigma.square())
    a, b = policy.weight.detach()
    x = x.flatten(1)
    error = (x * (1 + a) + b) * c[:, None] - 0.3
    return torch.stack([(2 * error * x * c[:, None]).sum(1).mean(), (2 * error * c[:, None]).sum(1).mean()])


def test_refl_gradient_is_the_hand_derivative_at_the_drawn_step(toy_policy, toy_reward):
    objective, b = ReFL(**SMALL), batch(latents=False)
    sigmas = toy_policy.sigmas(10)
    m = b.rng.integers("gradient step", 6, 9)
    x = toy_policy.start(b.rng.normal("start", (3, 1, 1)), 10)
    states = []
    for row in range(6):  # one by one, in the plainest way
        state = x[row : row + 1]
        for i in range(int(m[row])):
            denoised = toy_policy._denoise(state, sigmas[i : i + 1], toy_policy.weight.detach())
            noise = Rng(3, 0, (row,)).normal(f"step {i}", (3, 1, 1)).double()
            state = step(state, denoised, sigmas[i : i + 1], sigmas[i + 1 : i + 2], noise)
        states.append(state)
    loss, logs = loss_of(objective, toy_policy, b, toy_reward)
    expected = hand_gradient(toy_policy, torch.cat(states), sigmas[m])
    torch.testing.assert_close(gradient(toy_policy, loss), expected)
    assert logs["reward"].shape == (6,)


def two_forwards(policy, b, reward, objective):
    """ImageReFL as the paper draws it: a separate forward for the diffusion loss, the rollout from scratch."""
    sigmas = policy.sigmas(objective.steps)
    first = b.rng.integers("image start", objective.start_from, objective.start_to)
    last = b.rng.integers("gradient step", objective.grad_from, objective.grad_to).maximum(first)
    noise = b.rng.normal("start", (3, 1, 1)).double()
    z = b.latents + sigmas[first].reshape(-1, 1, 1, 1) * noise
    epsilon = (z - policy._denoise(z, sigmas[first], policy.weight)) / sigmas[first].reshape(-1, 1, 1, 1)
    diffusion = (epsilon - noise).square().mean()
    x = z.clone()
    with torch.no_grad():
        for row in range(len(x)):
            for i in range(int(first[row]), int(last[row])):
                denoised = policy._denoise(x[row : row + 1], sigmas[i : i + 1], policy.weight)
                noise = Rng(3, 0, (row,)).normal(f"step {i}", (3, 1, 1)).double()
                x[row : row + 1] = step(x[row : row + 1], denoised, sigmas[i : i + 1], sigmas[i + 1 : i + 2], noise)
    scores = reward(policy._denoise(x, sigmas[last], policy.weight), b.prompts)
    return -scores.mean() + objective.diffusion_weight * diffusion


@pytest.mark.parametrize("starts", [(6, 6), (4, 8)])
def test_the_shared_forward_equals_two_forwards(toy_policy, toy_reward, starts):
    objective = ImageReFL(**SMALL, start_from=starts[0], start_to=starts[1], refl_share=0.0, diffusion_weight=0.3)
    loss, _ = loss_of(objective, toy_policy, batch(10), toy_reward)
    expected = two_forwards(toy_policy, batch(10), toy_reward, objective)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(toy_policy, loss), gradient(toy_policy, expected))


def test_a_gradient_step_at_the_start_costs_one_forward(toy_policy, toy_reward):
    """m = s is an empty range: no step is taken, and the one evaluation serves both losses."""
    objective = ImageReFL(steps=10, grad_from=6, grad_to=6, start_from=6, start_to=6, refl_share=0.0, diffusion_weight=0.3)
    loss_of(objective, toy_policy, batch(6), toy_reward)
    assert toy_policy.calls == 6


def test_image_branch_costs_at_most_9_3_forwards(toy_policy, toy_reward):
    """s = 30, m uniform in 30–39, a gradient call counted as three forwards (official code: 10.6)."""
    objective = ImageReFL(steps=40, refl_share=0.0)
    cost, n = 0.0, 0
    for seed in range(120):
        b = batch(10, seed=seed)
        m = b.rng.integers("gradient step", 30, 39)
        toy_policy.calls = 0
        loss_of(objective, toy_policy, b, toy_reward)
        with_gradient = 10 + int((m > 30).sum())
        cost += toy_policy.calls + 2 * with_gradient
        n += 10
    assert cost / n == pytest.approx(9.3, abs=0.15)


def test_refl_share_spaces_the_noise_micro_batches_evenly(toy_policy, toy_reward):
    objective = ImageReFL(refl_share=0.25)
    assert [objective.takes_noise(i) for i in range(8)] == [False, False, False, True] * 2
    assert not any(ImageReFL(refl_share=0.0).takes_noise(i) for i in range(9))
    assert all(ImageReFL(refl_share=1.0).takes_noise(i) for i in range(9))


def test_a_noise_micro_batch_is_refl(toy_policy, toy_reward):
    image = ImageReFL(**SMALL, start_from=6, start_to=6, refl_share=1.0)
    torch.testing.assert_close(
        loss_of(image, toy_policy, batch(), toy_reward)[0], loss_of(ReFL(**SMALL), toy_policy, batch(), toy_reward)[0]
    )


def official_refl(policy, b, reward, objective):
    """A plain ReFL micro-batch as the official trainer has it: −r at m, and the noise prediction's MSE on real images noised to m."""
    sigmas = policy.sigmas(objective.steps)
    m = b.rng.integers("gradient step", objective.grad_from, objective.grad_to, shared=not objective.per_sample)
    x = policy.start(b.rng.normal("start", (3, 1, 1)), objective.steps)
    with torch.no_grad():
        for row in range(len(x)):
            for i in range(int(m[row])):
                denoised = policy.guided(x[row : row + 1], sigmas[i : i + 1], objective.guidance_scale)
                noise = Rng(3, 0, (row,)).normal(f"step {i}", (3, 1, 1)).double()
                x[row : row + 1] = step(x[row : row + 1], denoised, sigmas[i : i + 1], sigmas[i + 1 : i + 2], noise)
    scores = reward(policy.guided(x, sigmas[m], objective.guidance_scale), b.prompts)
    level, noise = sigmas[m].reshape(-1, 1, 1, 1), b.rng.normal("diffusion noise", (3, 1, 1)).double()
    noised = b.latents + level * noise
    epsilon = (noised - policy._denoise(noised, sigmas[m], policy.weight)) / level
    return -objective.reward_weight * scores.mean() + objective.diffusion_weight * (epsilon - noise).square().mean()


class Guided(ToyPolicy):
    """The toy with an unconditional branch of its own, which learns too."""

    def guided(self, x, sigma, scale):
        conditional = self._denoise(x, sigma, self.weight)
        if scale == 1:
            return conditional
        unconditional = self._denoise(x, sigma, self.weight * torch.tensor([2.0, -1.0], dtype=torch.float64))
        return unconditional + scale * (conditional - unconditional)

    def denoiser(self, prompts, *, adapter="tuned", guidance_scale=1.0, negative="", prompt_weight=1.0):
        return ToyDenoiser(prompts, lambda x, sigma: self.guided(x, sigma, guidance_scale))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_refl_micro_batch_has_the_official_diffusion_loss_at_its_own_step(toy_reward, scale, per_sample, share):
    more = {"refl_share": share, "refl_diffusion": True, "diffusion_weight": 0.3, "reward_weight": 0.7, "per_sample": per_sample}
    objective, policy = ImageReFL(**SMALL, start_from=6, start_to=6, guidance_scale=scale, **more), Guided()
    assert objective.data is Images
    loss, logs = loss_of(objective, policy, batch(number=3), toy_reward)
    expected = official_refl(policy, batch(number=3), toy_reward, objective)
    torch.testing.assert_close(loss, expected)
    found, by_hand = gradient(policy, loss), gradient(policy, expected)
    torch.testing.assert_close(found, by_hand)
    without = gradient(policy, loss_of(replace(objective, refl_diffusion=False), policy, batch(number=3), toy_reward)[0])
    assert float((found - without).norm() / found.norm()) > 1e-3  # the term is there to be missed
    assert logs["diffusion"].shape == (6,)


def test_without_a_diffusion_weight_plain_refl_needs_no_images(toy_policy, toy_reward):
    objective = ImageReFL(**SMALL, start_from=6, start_to=6, refl_share=1.0, refl_diffusion=True, diffusion_weight=0.0)
    assert objective.data is Prompts and replace(objective, diffusion_weight=0.1).data is Images
    loss, logs = loss_of(objective, toy_policy, batch(latents=False), toy_reward)
    torch.testing.assert_close(loss, loss_of(ReFL(**SMALL), toy_policy, batch(latents=False), toy_reward)[0])
    assert "diffusion" not in logs
    with pytest.raises(ValueError, match="real images"):
        loss_of(replace(objective, diffusion_weight=0.1), toy_policy, batch(latents=False), toy_reward)


@pytest.mark.parametrize("starts", [(6, 6), (4, 8)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_diffusion_loss_is_on_the_unguided_prediction(toy_reward, starts, scale):
    more = {"start_from": starts[0], "start_to": starts[1], "refl_share": 0.0, "guidance_scale": scale}
    policy, b = Guided(), batch(10)
    losses = [loss_of(ImageReFL(**SMALL, **more, diffusion_weight=w), policy, b, toy_reward)[0] for w in (0.3, 0.0)]
    sigmas = policy.sigmas(10)
    level = sigmas[b.rng.integers("image start", *starts)]
    noise = b.rng.normal("start", (3, 1, 1)).double()
    z = b.latents + level.reshape(-1, 1, 1, 1) * noise
    epsilon = (z - policy._denoise(z, level, policy.weight)) / level.reshape(-1, 1, 1, 1)
    expected = 0.3 * (epsilon - noise).square().mean()
    torch.testing.assert_close(losses[0] - losses[1], expected)
    found, without = (gradient(policy, loss) for loss in losses)
    torch.testing.assert_close(found - without, gradient(policy, expected))


def test_threshold_stops_the_push_where_the_reward_is_high_enough(toy_policy, toy_reward):
    loss, _ = loss_of(ReFL(**SMALL, threshold=-1e9), toy_policy, batch(), toy_reward)
    assert float(loss) == 0.0 and gradient(toy_policy, loss).abs().max() == 0


def test_kl_is_zero_at_the_base_and_pulls_towards_it(toy_policy, toy_reward):
    objective = ReFL(**SMALL, reward_weight=0.0, kl_weight=1.0)
    with torch.no_grad():
        toy_policy.weight.zero_()
    loss, logs = loss_of(objective, toy_policy, batch(), toy_reward)
    assert float(loss.detach()) == 0.0 and logs["kl"].abs().max() == 0
    with torch.no_grad():
        toy_policy.weight.copy_(torch.tensor([0.2, 0.1]))
    pull = gradient(toy_policy, loss_of(objective, toy_policy, batch(), toy_reward)[0])
    assert float(pull @ toy_policy.weight.detach()) > 0


def test_noise_level_range_and_index_range_agree(toy_policy):
    sigmas = toy_policy.sigmas(10)
    by_level = ReFL(**SMALL, sigma_low=float(sigmas[8]), sigma_high=float(sigmas[6]))
    assert by_level.index_range(sigmas) == (6, 8)
    with pytest.raises(ValueError, match="no step of 10"):
        ReFL(**SMALL, sigma_low=1e-4, sigma_high=2e-4).index_range(sigmas)


def test_one_draw_per_batch_is_one_value(toy_policy):
    rng = batch(10).rng
    assert len(set(rng.integers("gradient step", 0, 9, shared=True).tolist())) == 1
    assert len(set(rng.integers("gradient step", 0, 9).tolist())) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad_from": 9, "grad_to": 3}, "gradient range"),
        ({"steps": 10, "grad_to": 10}, "gradient range"),
        ({"start_to": 40}, "start range"),
    ],
)
def test_impossible_ranges_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageReFL(**wrong)


def at_each(objective, policy, b, reward, indices):
    """Mean loss of the objective with its gradient step fixed at each index in turn: rollouts share all noise."""
    fixed = [replace(objective, grad_steps=1, grad_from=i, grad_to=i) for i in indices]
    return torch.stack([loss_of(one, policy, b, reward)[0] for one in fixed]).mean()


@pytest.mark.parametrize("kind", ["refl", "images"])
@pytest.mark.parametrize(("count", "low", "high"), [(2, 6, 9), (3, 5, 9), (4, 6, 9)])
def test_several_gradient_steps_of_a_rollout_are_the_mean_of_their_losses(toy_policy, toy_reward, kind, count, low, high):
    images = {"start_from": low, "start_to": low, "refl_share": 0.0, "diffusion_weight": 0.3}
    kept = {"steps": 10, "grad_from": low, "grad_to": high, "per_sample": False, "kl_weight": 0.1}
    objective = ImageReFL(**kept, **images) if kind == "images" else ReFL(**kept)
    several, b = replace(objective, grad_steps=count), batch()
    steps = several.gradient_steps(b, toy_policy.sigmas(10))
    assert steps.shape == (count, 6) and int(objective.gradient_step(b, toy_policy.sigmas(10))[0]) in steps[:, 0]
    assert len(set(steps[:, 0].tolist())) == count and bool((steps.diff(dim=0) > 0).all())
    loss, logs = loss_of(several, toy_policy, b, toy_reward)
    expected = at_each(objective, toy_policy, b, toy_reward, steps[:, 0].tolist())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(toy_policy, loss), gradient(toy_policy, expected))
    assert logs["reward"].shape == (6,)


def test_gradient_steps_of_samples_apart_are_those_of_each_alone(toy_policy, toy_reward):
    objective = ImageReFL(**SMALL, start_from=6, start_to=6, refl_share=0.0, diffusion_weight=0.3, grad_steps=2)
    whole, _ = loss_of(objective, toy_policy, batch(), toy_reward)
    alone = []
    for row in range(6):
        b = batch()
        one = batch_of((b.prompts[row],), Rng(3, 0, (row,)), 0, b.latents[row : row + 1])
        steps = objective.gradient_steps(one, toy_policy.sigmas(10))[:, 0].tolist()
        alone.append(at_each(objective, toy_policy, one, toy_reward, steps))
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(gradient(toy_policy, whole), gradient(toy_policy, expected))


def test_a_rollout_is_shared_by_its_gradient_steps(toy_policy, toy_reward):
    """From 6 to 9 in four steps: nine of the rollout, four with a gradient, where four rollouts take 6+7+8+9 and four."""
    loss_of(ReFL(**SMALL, grad_steps=4), toy_policy, batch(latents=False), toy_reward)
    assert toy_policy.calls == 6 * (9 + 4)


def test_more_gradient_steps_than_the_range_has_are_refused(toy_policy, toy_reward):
    with pytest.raises(ValueError, match="grad_steps = 5 of a range that has 4 steps"):
        ReFL(**SMALL, grad_steps=5).check(RunContext(toy_policy, toy_reward))
