"""The loops of noise optimisation, against the authors' code, autograd and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from trainer.config import ConfigError
from trainer.noise.optimise import cost, norm_prior, optimise
from trainer.noise.settings import NoiseOptimisation, optimisation_of
from trainer.rng import Rng

FIRST = torch.randn(12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 6
NOISE = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def draw(z: Tensor) -> Tensor:
    """A one-step model: three channels of four pixels."""
    return torch.sigmoid(z.flatten(1) @ FIRST.T).reshape(-1, 3, 2, 2)


def scores(images: Tensor) -> Tensor:
    """Two rewards (2,B)."""
    first = -(images[:, 0].mean((1, 2)) - 0.8).square()
    return torch.stack([first, images[:, 1].mean((1, 2)) - images[:, 2].square().mean((1, 2))])


def test_reno_gives_the_numbers_of_the_authors_code():
    """Recorded from LatentNoiseTrainer of github.com/ExplainableML/ReNO (training/trainer.py) with the model and rewards above.

    Its losses were 1 − a and 2 − b with weights 5 and 1, its SGD that of training/optim.py with lr 5 and Nesterov momentum 0.9.
    """
    found = optimise(optimisation_of("reno", {}), NOISE, draw, scores, (5.0, 1.0), Rng(0, 0, (0,)))
    first, best = found.history[0], found.best
    assert [1 - first.rewards[0], 2 - first.rewards[1]] == pytest.approx([1.0375473104860287, 1.9513138120713724], abs=1e-12)
    assert [1 - best.rewards[0], 2 - best.rewards[1]] == pytest.approx([1.0006547291306864, 1.052101506900566], rel=1e-6)
    assert best.norm * math.sqrt(32) == pytest.approx(10.132314682006836, rel=1e-6)
    assert found.history[-1].norm * math.sqrt(32) == pytest.approx(7.7420938691575545, rel=1e-6) and len(found.history) == 50
    assert torch.equal(found.image, draw(found.noise)) and best.total == max(row.total for row in found.history)


def test_carinox_clips_each_reward_and_their_sum():
    """One step by hand; with one reward it is reno."""
    weights, clip = (5.0, 1.0), 0.1
    total = torch.zeros(32, dtype=torch.float64)
    for r in range(2):
        z = NOISE.flatten().clone().requires_grad_(True)
        loss = -weights[r] * scores(draw(z.reshape(1, 2, 4, 4)))[r, 0] + 0.01 * (0.5 * z.dot(z) - 31 * z.norm().log())
        (gradient,) = torch.autograd.grad(loss, z)
        total += gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))
    total *= min(1.0, clip / (float(total.norm()) + 1e-6))
    expected = NOISE.flatten() - 5.0 * 1.9 * total  # Nesterov's first step: (1 + momentum)·gradient
    two = optimisation_of("carinox", {"iterations": 2, "starts": 1})
    seen: list[Tensor] = []
    optimise(two, NOISE, lambda z: (seen.append(z.detach().clone()), draw(z))[1], scores, weights, Rng(0, 0, (0,)))
    assert torch.allclose(seen[1].flatten(), expected, atol=1e-9)
    one = {"iterations": 9, "starts": 1}
    pair = [
        optimise(optimisation_of(name, one), NOISE, draw, lambda images: scores(images)[1:], (1.0,), Rng(0, 0, (0,)))
        for name in ("reno", "carinox")
    ]
    assert torch.allclose(pair[0].noise, pair[1].noise, atol=1e-6)


def test_carinox_compares_starts_by_the_plain_sum():
    starts = torch.cat([NOISE, -NOISE, NOISE.flip(2)])
    found = optimise(optimisation_of("carinox", {"starts": 3, "iterations": 4}), starts, draw, scores, (100.0, 0.01), Rng(0, 0, (0,)))
    assert len(found.history) == 12 and sum(found.best.rewards) == max(sum(row.rewards) for row in found.history)


def test_the_norm_prior_is_the_density_of_a_norm():
    """Its gradient is that of −log of the chi density with d degrees of freedom, and vanishes at ‖z‖² = d − 1."""
    z = NOISE.float().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(norm_prior(z), z)
    assert torch.allclose(gradient, z * (1 - 31 / z.detach().square().sum()), atol=1e-6)


def test_rotation_needs_no_gradient_keeps_the_law_and_never_loses_the_best():
    norms: list[float] = []
    settings = optimisation_of("rotate", {"iterations": 30, "neighbours": 8, "starts": 2})

    def constant(images: Tensor) -> Tensor:
        return torch.rand(1, len(images), generator=torch.Generator().manual_seed(len(norms)))

    def seen(z: Tensor) -> Tensor:
        norms.extend(z.flatten(1).square().mean(1).tolist())
        return draw(z)

    found = optimise(settings, torch.cat([NOISE, -NOISE]), seen, constant, (1.0,), Rng(0, 0, (0,)))
    assert len(found.history) == 2 * (1 + 29 * 8) == cost(settings, 1).model and not found.noise.requires_grad
    error = math.sqrt(2 / 32)  # of one mean square
    assert sum(norms) / len(norms) == pytest.approx(1.0, abs=1.5 * error)
    better = optimise(settings, torch.cat([NOISE, -NOISE]), draw, lambda i: scores(i)[1:], (1.0,), Rng(0, 0, (0,)))
    assert better.best.total > better.history[0].total + 0.3 and torch.allclose(better.image, draw(better.noise), atol=1e-12)


def test_a_reward_that_is_never_finite_is_refused_and_one_that_is_once_is_kept():
    settings = optimisation_of("rotate", {"iterations": 2})
    with pytest.raises(ValueError, match="no image has a finite reward"):
        optimise(settings, NOISE, draw, lambda i: torch.full((1, len(i)), math.nan), (1.0,), Rng(0, 0, (0,)))
    found = optimise(settings, NOISE, draw, lambda i: torch.tensor([[math.nan, 2.0, 1.0, 0.0][: len(i)]]), (1.0,), Rng(0, 0, (0,)))
    assert found.best.total == 2.0
    with pytest.raises(ValueError, match="gradient is not finite"):
        optimise(optimisation_of("reno", {}), NOISE, draw, lambda i: (i.sum() - i.sum()).sqrt().reshape(1, 1), (1.0,), Rng(0, 0, (0,)))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("best", {}, "unknown noise optimisation 'best'"),
        ("rotate", {"clip": 1.0}, "rotate has no clip"),
        ("reno", {"iterations": 0}, "iterations"),
    ],
)
def test_settings_out_of_range_are_one_line(name, given, message):
    with pytest.raises(ConfigError, match=message):
        optimisation_of(name, given)


def test_cost_counts_gradients_as_three_calls_more():
    reno = NoiseOptimisation(iterations=50)
    assert cost(reno, 2).model == 2 * 50 + 2 * 49 * 3 and cost(reno, 2).decodes == 50
