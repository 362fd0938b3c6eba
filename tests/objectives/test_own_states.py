"""DRO and Self-NPO, which learn at states that the model draws: write-ups in the network's own coordinates, and what follows a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.family import STATES, Family, as4, gradient
from helpers.losses import batch_of
from helpers.preference import pairs, written_up
from helpers.processes import log_of, trained

from trainer.objectives import DRO, RunContext, SelfNPO
from trainer.objectives.following import Following
from trainer.rng import Rng

PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])


def images(step=0):
    batch = pairs()
    return batch_of(batch.prompts, Rng(3, step, (0, 1, 2, 3), 0), 0, batch.chosen)


def split(policy, x, sigma, weight):
    """x0- and noise prediction of the network's output, and α, in its own coordinates: variance-preserving, or flow."""
    s = as4(sigma, x)
    out = policy.network(x, sigma, weight)
    if policy.prediction == "flow":
        return x - s * out, x + (1 - s) * out, 1 - s, s
    a = (1 + s.square()).rsqrt()
    b = a * s
    noise = out if policy.prediction == "epsilon" else a * out + b * x
    return (x - b * noise) / a, noise, a, b


def coordinates(policy, sigma):
    """α and the noise's coefficient of one level in the network's coordinates."""
    if policy.prediction == "flow":
        return 1 - sigma, sigma
    a = (1 + sigma * sigma) ** -0.5
    return a, a * sigma


def ddim_by_hand(policy, x, levels, weight):
    """DDIM along levels."""
    for high, low in pairwise(levels):
        x0, noise, _, _ = split(policy, x, torch.tensor([high], dtype=torch.float64), weight)
        a, b = coordinates(policy, low)
        x = a * x0 + b * noise
    return x


# -- DRO ----------------------------------------------------------------------------------------------------------------


def dro_by_hand(policy, settings, batch):
    sigma = policy.sigmas(999)[(batch.rng.uniform("noise level") * 999).floor().long()]
    start = batch.rng.start_noise((3, 1, 1)).double()
    losses = []
    expert, of_base = (written_up(policy, batch, batch.latents, [""] * 4, w)[0] for w in (policy.weight, STATES["base"]))
    for i, end in enumerate(sigma.tolist()):
        grid = [float(policy.sigmas(999)[0]), *policy.sigmas(settings.rollout_steps).tolist()]
        levels = [s for s in grid if s > end]
        levels = [s for j, s in enumerate(levels) if j == 0 or s < levels[j - 1]] + [end]
        x = start[i : i + 1]  # unscaled in the network's coordinates, flow or variance-preserving
        x = ddim_by_hand(policy, x, levels, policy.weight.detach())
        at = torch.tensor([end], dtype=torch.float64)
        target = policy.network(x, at, policy.weight).detach()
        own = (policy.network(x, at, policy.weight) - target).square().mean()
        base = (policy.network(x, at, STATES["base"]) - target).square().mean()
        gap = (expert[i] - of_base[i]) - (own - base)
        losses.append(torch.clamp(gap + settings.margin, min=0))
    return torch.stack(losses)


@PREDICTIONS
def test_dro_is_the_hinge_of_its_write_up(prediction):
    """With the own states' error and its gradient written out, which are 0: some of the hinges are open and some closed."""
    settings = DRO(margin=0.02, rollout_steps=6, target="velocity" if prediction == "v" else "model")
    policy, batch = Family(prediction), images()
    loss, logs = settings.loss(RunContext(policy), batch)
    expected = dro_by_hand(policy, settings, batch)
    torch.testing.assert_close(loss.detach(), expected.mean().detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected.mean()), rtol=1e-6, atol=1e-9)
    assert logs["active"].tolist() == (expected > 0).double().tolist()
    assert float(logs["active"].sum()) > 0 and bool((logs["distance"] > 0).all())


def test_dro_begins_with_the_plain_gradient_of_good_images():
    policy, batch = Family(), images()
    with torch.no_grad():
        policy.weight.zero_()
    loss, logs = DRO(rollout_steps=4).loss(RunContext(policy), batch)
    plain, _ = written_up(policy, batch, batch.latents, [""] * 4, policy.weight)
    assert float(loss.detach()) == pytest.approx(0.001) and float(logs["distance"].max()) == 0
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, plain.mean()))
    with torch.no_grad():
        policy.weight.add_(torch.tensor([0.3, 0.2, 0.0, 0.0]))
    logs = DRO(rollout_steps=4, margin=0.0).loss(RunContext(policy), batch)[1]
    assert bool((logs["distance"] > 0).all())


# -- Self-NPO -----------------------------------------------------------------------------------------------------------


class Guided(Family):
    """The family's policy whose unconditional prediction has half the weights."""

    def denoiser(self, prompts, *, adapter="tuned", guidance_scale=1.0, **settings):
        weight = self.weight if adapter == "tuned" else STATES[adapter]
        inner = super().denoiser(prompts, adapter=adapter)

        def denoise(x, sigma):
            c, u = self.denoise(x, sigma, weight), self.denoise(x, sigma, 0.5 * weight)
            return c if guidance_scale == 1 and prompts[0] else u + (guidance_scale if prompts[0] else 0) * (c - u)

        inner.function = denoise
        return inner


def self_npo_by_hand(policy, s, batch, teacher):
    """One image at a time, both branches of the teacher in the network's own prediction."""
    grid, all_levels = policy.sigmas(s.levels).tolist(), policy.sigmas(999)[:-1]
    first = batch.rng.integers("start level", 0, s.levels - 1).tolist()
    noises = [batch.rng.normal(name, (3, 1, 1)).double() for name in ("start noise of the teacher", "diffusion noise")]
    uniform, losses = batch.rng.uniform("noise level"), []

    def taught(x, level):
        at = torch.tensor([level], dtype=torch.float64)
        cond, uncond = (split(policy, x, at, w)[:2] for w in (teacher, 0.5 * teacher))
        return [c + s.anti_guidance * (c - u) for c, u in zip(cond, uncond)]

    for i, (start, x0) in enumerate(zip(first, batch.latents)):
        a, b = coordinates(policy, grid[start])
        x = a * x0[None] + b * noises[0][i : i + 1]
        last = min(start + s.rollout_steps, s.levels - 1)
        for j in range(start, last):
            clean, noise = taught(x, grid[j])
            a, b = coordinates(policy, grid[j + 1])
            x = a * clean + b * noise
        target, _ = taught(x, grid[last])
        above = [level for level in all_levels.tolist() if level > grid[last]]
        level = above[int(float(uniform[i]) * len(above))]
        a, b = coordinates(policy, grid[last])
        a2, b2 = coordinates(policy, level)
        x = a2 * (x / a + ((b2 / a2) ** 2 - (b / a) ** 2) ** 0.5 * noises[1][i : i + 1])  # as the official code writes it
        found = split(policy, x, torch.tensor([level], dtype=torch.float64), policy.weight)[0]
        losses.append((torch.sqrt((found - target) ** 2 + s.huber**2) - s.huber).mean())
    return torch.stack(losses).mean()


@PREDICTIONS
@pytest.mark.parametrize("w", [-1.0, -5.0])
def test_self_npo_is_its_write_up_and_its_teacher_follows(prediction, w):
    settings, policy = SelfNPO(anti_guidance=w, levels=8, rollout_steps=3, huber=0.1, decay=0.9), Guided(prediction)
    loss_of, teacher = settings.begin(RunContext(policy)), policy.weight.detach().clone()
    for step in (0, 0, 1, 2):
        batch = images(step)
        if step:
            with torch.no_grad():
                policy.weight.add_(0.1)
            teacher = 0.9 * teacher + 0.1 * policy.weight.detach()
        loss, _ = loss_of(batch)
        expected = self_npo_by_hand(policy, settings, batch, teacher)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-6, atol=1e-9)


# -- what follows -------------------------------------------------------------------------------------------------------


def test_what_follows_is_evaluated_in_place_of_the_parameters_and_comes_back():
    policy = Family()
    first = policy.weight.detach().clone()
    following = Following(policy)
    assert torch.equal(following.values[0], first)
    with torch.no_grad():
        policy.weight.add_(1.0)
    kept = policy.weight.data_ptr()
    with following.inside():
        assert torch.equal(policy.weight, first) and not (policy.weight * 1).requires_grad
    assert torch.equal(policy.weight, first + 1) and policy.weight.data_ptr() == kept and policy.weight.requires_grad
    following.update(0.75)
    torch.testing.assert_close(following.values[0], first + 0.25)
    other = Following(Family())
    other.restore(following.state())
    assert torch.equal(other.values[0], following.values[0])
    following.update(0.0)
    assert torch.equal(following.values[0], policy.weight)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = trained("self-npo", tmp_path / "whole", steps=6)
    trained("self-npo", tmp_path / "cut", steps=4)
    resumed = trained("self-npo", tmp_path / "cut", steps=6, resume=True)
    assert torch.equal(resumed["weight"], whole["weight"]) and log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert float((whole["weight"] - Family().weight).detach().abs().max()) > 1e-5
