"""FlowBP and LeapAlign against surrogates written out in velocities, and on tiny flow transformers against their own outputs."""

from __future__ import annotations

import pytest
import torch
from helpers.family import Family, Towers, as4, batch, gradient
from helpers.losses import loss_of

from trainer.objectives import OBJECTIVES, DRaFTK, FlowBPSparse

PLAIN = {"guidance_scale": 1.0}


def levels(policy, steps):
    """Flow levels s = σ/(α + σ) of the policy's grid."""
    sigmas = policy.sigmas(steps).double()
    return sigmas if policy.space == "flow" else sigmas / (1 + sigmas)


def velocity(policy, z, i, steps, prompts):
    """v = ε̂ − x̂0 of a state in flow coordinates, by the network's own prediction in the policy's coordinates."""
    sigma = policy.sigmas(steps)[i].expand(len(z))
    total = 1.0 if policy.space == "flow" else 1 + as4(sigma, z)
    x, alpha = z * total, 1 - as4(sigma, z) if policy.space == "flow" else 1.0
    clean = policy.denoiser(prompts)(x, sigma)
    return (x - alpha * clean) / as4(sigma, z) - clean


def rollout(policy, b, steps):
    """Cached states z_0…z_T and velocities v_0…v_{T−1} of Euler steps."""
    s = levels(policy, steps)
    z = policy.start(b.rng.normal("start", policy.latent_shape), steps) / (1.0 if policy.space == "flow" else 1 + float(policy.sigmas(steps)[0]))
    states, velocities = [z], []
    with torch.no_grad():
        for i in range(steps):
            velocities.append(velocity(policy, states[-1], i, steps, b.prompts))
            states.append(states[-1] + (s[i + 1] - s[i]).to(z) * velocities[-1])
    return s, states, velocities


def through(hat, true):
    """Straight-through: the true value with the surrogate's gradient."""
    return hat + (true - hat).detach()


def scaled(v, factor):
    return v.detach() + factor * (v - v.detach())


def sparse(policy, b, steps, active, g, first=0):
    """FlowBP-Sparse's end of the surrogate chain, of the definition."""
    s, states, velocities = rollout(policy, b, steps)
    widths = (s[1:] - s[:-1]).abs()
    factor = 1 + g * (float(widths[first:].sum() / widths[active].sum()) - 1)
    hat = states[0]
    for i in range(steps):
        v = scaled(velocity(policy, states[i], i, steps, b.prompts), factor) if i in active else velocities[i]
        hat = hat + (s[i + 1] - s[i]).to(hat) * v
    return through(hat, states[-1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("more", [{"k": 1}, {"k": 3, "rescale": 0.5}, {"k": 2, "trained_from": 2, "late_bias": 0.0}])
def test_sparse_is_the_surrogate_written_out(prediction, more, recompute):
    policy, b = Family(prediction), batch()
    objective = FlowBPSparse(steps=6, **PLAIN, recompute=recompute, **more)
    loss, logs = loss_of(objective, policy, b, Towers())
    calls = policy.calls
    end = sparse(policy, b, 6, objective.active(b), objective.rescale, objective.trained_from)
    expected = -Towers()(end, b.prompts).mean()
    assert calls == 4 * 6
    torch.testing.assert_close(logs["reward"].mean(), -loss.detach())
    torch.testing.assert_close(loss, expected)
    assert gradient(policy, loss).abs().max() > 1e-3
    loss, _ = loss_of(objective, policy, b, Towers())
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


class Unmoved(Family):
    """A network whose velocity does not depend on its state: its Jacobian is zero."""

    def denoise(self, x, sigma, w):
        s, total = as4(sigma / (1 + sigma), x), 1 + as4(sigma, x)
        return x / total - s * (w[:3].reshape(1, 3, 1, 1) * torch.cos(3 * s + w[3]))


def test_sparse_with_all_steps_active_is_draft_with_k_equal_to_t():
    """Value and gradient, where the velocity does not depend on the state: the Jacobian that FlowBP leaves out."""
    policy, b = Unmoved(), batch()
    loss, _ = loss_of(FlowBPSparse(steps=6, k=6, rescale=0.5, **PLAIN), policy, b, Towers())
    expected, _ = loss_of(DRaFTK(steps=6, k=6, **PLAIN), policy, b, Towers())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-9, atol=1e-12)


def test_late_steps_are_drawn_by_their_weights():
    objective = FlowBPSparse(steps=6, k=1, late_bias=2.0, trained_from=2)
    counts = torch.zeros(6)
    for n in range(3000):
        (i,) = objective.active(batch(n=1, number=n))
        counts[i] += 1
    weights = torch.tensor([0.0, 0, 9, 16, 25, 36])
    expected = weights / weights.sum()
    assert ((counts / 3000 - expected).abs() <= 4 * (expected * (1 - expected) / 3000).sqrt()).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flowbp-sparse", {"steps": 5, "k": 6}, "k = 6 active steps of 5"),
        ("flowbp-sparse", {"steps": 5, "k": 3, "trained_from": 3}, "trained_from = 3 of 5 steps: give at most 2"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**settings)
