"""FlowBP and LeapAlign against surrogates written out in velocities, also on the raw outputs of tiny flow transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.family import Family, Towers, as4, batch, gradient
from helpers.losses import loss_of

from trainer.models.flux import FluxPolicy
from trainer.models.sd3 import SD3Policy
from trainer.objectives import DRaFTK, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign
from trainer.objectives.reward_gradient.leapalign import interpolation_weights
from trainer.policy import Lora

PLAIN = {"guidance_scale": 1.0}


@dataclass
class Chain:
    """A flow model's Euler rollout, cached: `velocity(z, i)` is the network's, levels s (T+1,) as numbers."""

    velocity: Any
    s: list[float]
    start: torch.Tensor

    def __post_init__(self):
        self.z, self.v = [self.start], []
        with torch.no_grad():
            for i in range(len(self.s) - 1):
                self.v.append(self.velocity(self.z[-1], i))
                self.z.append(self.z[-1] + (self.s[i + 1] - self.s[i]) * self.v[-1])

    @property
    def width(self):
        return [b - a for a, b in zip(self.s, self.s[1:])]


def through(hat, true):
    """Straight-through: the true value with the surrogate's gradient."""
    return hat + (true - hat).detach()


def scaled(v, factor):
    return v.detach() + factor * (v - v.detach())


def composed(chain, start, first, last, active, factor):
    """Euler's sum over cached velocities and, where active, velocities with gradient."""
    for i in range(first, last):
        v = scaled(active[i], factor) if i in active else chain.v[i]
        start = start + chain.width[i] * v
    return start


def factor_of(chain, objective, active):
    total = sum(-w for w in chain.width[objective.trained_from :])
    return 1 + objective.rescale * (total / sum(-chain.width[i] for i in active) - 1)


def sparse(chain, o, b, score):
    active = o.active(b)
    velocities = {i: chain.velocity(chain.z[i], i) for i in active}
    hat = composed(chain, chain.z[0], 0, o.steps, velocities, factor_of(chain, o, active))
    return -score(through(hat, chain.z[-1]), b.prompts).mean()


def bridge(chain, o, b, score):
    before, after = o.parts(b)
    factor, j = factor_of(chain, o, before + after), after[0]
    early = {i: chain.velocity(chain.z[i], i) for i in before}
    z_j = through(composed(chain, chain.z[0], 0, j, early, factor), chain.z[j])
    late = {i: chain.velocity(chain.z[i] if i != j else o.alpha * z_j + (1 - o.alpha) * z_j.detach(), i) for i in after}
    return -score(through(composed(chain, z_j, j, o.steps, late, factor), chain.z[-1]), b.prompts).mean()


def distance(found, true, tau):
    return (found - true).abs().flatten(1).mean(1).clamp(min=tau).detach()


def leaps(chain, o, b, score):
    k, j = o.leaps(b)
    hat_j = chain.z[k] + (chain.s[j] - chain.s[k]) * chain.velocity(chain.z[k], k)
    z_j = through(hat_j, chain.z[j])
    hat_0 = z_j - chain.s[j] * chain.velocity(o.alpha * z_j + (1 - o.alpha) * z_j.detach(), j)
    weight = distance(hat_j, chain.z[j], o.tau) + distance(hat_0, chain.z[-1], o.tau)
    return -(score(through(hat_0, chain.z[-1]), b.prompts) / weight).mean()


def interpolated(chain, o, start, end, state, seen):
    """One of FlowBP-Lagrange's leaps, its weights by integrating the interpolant's polynomials."""
    steps = list(range(start, end))
    supports = steps if len(steps) <= o.order else [steps[int(p)] for p in np.round(np.linspace(0, len(steps) - 1, o.order))]
    weights = []
    for i in supports:
        others = [chain.s[m] for m in supports if m != i]
        basis = np.poly1d(others, r=True) / np.prod([chain.s[i] - m for m in others])
        integral = np.polyint(basis)
        weights.append(integral(chain.s[end]) - integral(chain.s[start]))
    active = supports[:2]
    factor = 1 + o.rescale * (sum(map(abs, weights)) / sum(abs(w) for w, i in zip(weights, supports) if i in active) - 1)
    for w, i in zip(weights, supports):
        v = chain.v[i]
        if i in active:
            v = scaled(chain.velocity(seen if i == start else chain.z[i], i), factor * (1 if i == start else o.support_scale))
        state = state + w * v
    return state


def lagrange(chain, o, b, score):
    k, j = o.leaps(b)
    hat_j = interpolated(chain, o, k, j, chain.z[k], chain.z[k])
    z_j = through(hat_j, chain.z[j])
    hat_0 = interpolated(chain, o, j, o.steps, z_j, o.alpha * z_j + (1 - o.alpha) * z_j.detach())
    weight = distance(hat_j, chain.z[j], o.tau) + distance(hat_0, chain.z[-1], o.tau)
    return -(score(through(hat_0, chain.z[-1]), b.prompts) / weight).mean()


CASES = [
    (FlowBPSparse(steps=7, k=1, **PLAIN), sparse),
    (FlowBPSparse(steps=7, k=3, rescale=0.5, late_bias=0.0, trained_from=2, **PLAIN), sparse),
    (FlowBPBridge(steps=7, **PLAIN), bridge),
    (FlowBPBridge(steps=7, k=3, rescale=0.5, alpha=1.0, trained_from=1, **PLAIN), bridge),
    (FlowBPLagrange(steps=9, alpha=0.4, tau=0.01, **PLAIN), lagrange),
    (FlowBPLagrange(steps=9, order=4, rescale=0.0, longest=4, **PLAIN), lagrange),
    (LeapAlign(steps=7, tau=0.01, **PLAIN), leaps),
    (LeapAlign(steps=7, alpha=1.0, trained_from=2, **PLAIN), leaps),
]


def chain_of(policy, b, steps):
    """The chain of a policy, by its network's own prediction in its own coordinates: v = ε̂ − x̂0."""
    sigmas = policy.sigmas(steps).double()

    def velocity(z, i):
        sigma, flow = as4(sigmas[i].expand(len(z)), z), policy.space == "flow"
        x = z if flow else z * (1 + sigma)
        clean = policy.denoiser(b.prompts)(x, sigmas[i].expand(len(z)))
        return (x - (1 - sigma if flow else 1.0) * clean) / sigma - clean

    start = policy.start(b.rng.normal("start", policy.latent_shape), steps) / (1.0 if policy.space == "flow" else 1 + sigmas[0])
    return Chain(velocity, (sigmas if policy.space == "flow" else sigmas / (1 + sigmas)).tolist(), start)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize(("objective", "written"), CASES)
def test_loss_and_gradient_are_those_of_the_surrogate_written_out(objective, written, prediction, recompute):
    for number in range(3):
        policy, b = Family(prediction), batch(number=number)
        loss, logs = loss_of(replace(objective, recompute=recompute), policy, b, Towers())
        assert policy.calls == 4 * objective.steps  # each step is evaluated once
        expected = written(chain_of(policy, b, objective.steps), objective, b, Towers())
        found = gradient(policy, loss)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, gradient(policy, expected), rtol=1e-8, atol=1e-10)
        assert found.abs().max() > 1e-4 and all(values.shape == (4,) for values in logs.values())


class View:
    """A flow policy's weights as an ε-predicting model: x = z·(1 + σ) at σ = s/(1 − s)."""

    space, device, adapters = "ve", torch.device("cpu"), frozenset({"tuned"})

    def __init__(self, flow):
        self.flow, self.latent_shape, self.merged = flow, flow.latent_shape, flow.merged

    def sigmas(self, steps):
        s = self.flow.sigmas(steps).double()
        return s / (1 - s)

    def start(self, noise, steps):
        return self.flow.start(noise, steps) * (1 + self.sigmas(steps)[0])

    def denoiser(self, prompts, **settings):
        inner = self.flow.denoiser(prompts, **settings)
        return lambda x, sigma: inner(x / as4(1 + sigma, x), (sigma / (1 + sigma)))

    def decode(self, latents):
        return latents


@pytest.mark.parametrize(
    ("family", "kind", "cases"),
    [
        ("sd3", SD3Policy, CASES[2:3]),
        pytest.param("sd3", SD3Policy, CASES[::2], marks=pytest.mark.full),
        pytest.param("flux-dev", FluxPolicy, CASES[::2], marks=pytest.mark.full),
    ],
)
def test_on_flow_transformers_it_is_the_published_form_in_either_coordinates(family, kind, cases, family_folder, monkeypatch):
    """The published form on raw velocities, against ours through the flow policy and through an ε view of the same weights."""
    policy = kind.load(family_folder(family), image_size=64)
    policy.add_lora(Lora(rank=2))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    grid = kind.sigmas
    monkeypatch.setattr(kind, "sigmas", lambda self, steps: grid(self, steps).clamp(max=0.98))  # at s = 1 σ is infinite
    monkeypatch.setattr(kind, "decode", lambda self, latents: latents)
    b, parameters = batch(2, latents=False), list(policy.parameters())
    conditioning = policy.prompts.conditioning(b.prompts)

    def velocity(z, i):
        with policy.adapters.using("tuned"):
            return policy.velocity(z, policy.sigmas(5)[i].expand(len(z)), conditioning)

    def score(images, prompts):
        return torch.sin(3 * images).flatten(1).mean(1)

    chain = Chain(velocity, policy.sigmas(5).tolist(), policy.start(b.rng.normal("start", policy.latent_shape), 5))
    for objective, written in cases:
        objective = replace(objective, steps=5)
        expected = written(chain, objective, b, score)
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
        for model in (policy, View(policy)):
            loss, _ = loss_of(objective, model, b, score)
            found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
            assert float((found - wanted).norm() / wanted.norm()) < 1e-3 < float(wanted.norm())


class Unmoved(Family):
    """A network whose velocity does not depend on its state: its Jacobian is zero."""

    def denoise(self, x, sigma, w):
        s, total = as4(sigma / (1 + sigma), x), 1 + as4(sigma, x)
        return x / total - s * (w[:3].reshape(1, 3, 1, 1) * torch.cos(3 * s + w[3]))


def test_sparse_with_all_steps_active_is_draft_with_k_equal_to_t():
    """Value and gradient, where the velocity does not depend on the state: the Jacobian that FlowBP leaves out. The value, with any."""
    for policy in (Unmoved(), Family()):
        loss, _ = loss_of(FlowBPSparse(steps=6, k=6, rescale=0.5, **PLAIN), policy, batch(), Towers())
        expected, _ = loss_of(DRaFTK(steps=6, k=6, **PLAIN), policy, batch(), Towers())
        torch.testing.assert_close(loss, expected)
        error = float((gradient(policy, loss) - gradient(policy, expected)).abs().max())
        assert (error < 1e-12) == isinstance(policy, Unmoved), error


def test_bridge_without_coupling_is_sparse_and_lagrange_of_order_one_is_leapalign(monkeypatch):
    policy, b = Family(), batch()
    uncoupled, plain = FlowBPBridge(steps=7, alpha=0.0, **PLAIN), FlowBPSparse(steps=7, k=5, **PLAIN)
    before, after = uncoupled.parts(b)
    monkeypatch.setattr(FlowBPSparse, "active", lambda self, b: before + after)
    first, second = (loss_of(o, policy, b, Towers())[0] for o in (uncoupled, plain))
    torch.testing.assert_close(gradient(policy, first), gradient(policy, second), rtol=1e-12, atol=0)
    monkeypatch.setattr(FlowBPLagrange, "leaps", LeapAlign.leaps)
    first, second = (
        loss_of(kind(steps=7, alpha=0.3, tau=0.1, **more, **PLAIN), policy, b, Towers())[0]
        for kind, more in ((LeapAlign, {}), (FlowBPLagrange, {"order": 1}))
    )
    torch.testing.assert_close(gradient(policy, first), gradient(policy, second), rtol=1e-12, atol=0)


def test_interpolation_weights_integrate_polynomials_exactly():
    levels = [0.97, 0.9, 0.71, 0.6, 0.4, 0.15, 0.0]
    for supports in ([1], [1, 3], [1, 2, 4], [0, 2, 3, 5]):
        weights = interpolation_weights(levels, supports, 6)
        for power in range(len(supports)):
            found = sum(w * levels[i] ** power for i, w in weights.items())
            exact = -(levels[supports[0]] ** (power + 1)) / (power + 1)
            assert found == pytest.approx(exact, rel=1e-10)
