"""The black-box variant's surrogate: what it learns, and both of its optimisms, by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.family import Family

from trainer.objectives import BlackBoxSQDF, RunContext
from trainer.objectives.reward_gradient.black_box import Surrogate, bonus, joined, regularised_covariance


class Features:
    """Mean colours as image features, letters as text features."""

    def image_features(self, images):
        return images.mean((2, 3))

    def text_features(self, prompts):
        return torch.tensor([[float(len(p)), 1.0, 0.0] for p in prompts])


def fitted(**settings):
    surrogate = Surrogate(Features(), BlackBoxSQDF(queries=(64,), epochs=200, heads=3, **settings), 9)
    rng = torch.Generator().manual_seed(0)  # never the global one, which other tests move
    images = torch.rand(256, 3, 4, 4, generator=rng) * torch.rand(256, 3, 1, 1, generator=rng)
    prompts = ["a", "bb"] * 128
    x = joined(Features().image_features(images), Features().text_features(prompts))
    labels = 3 * x[:, 0] - 2 * x[:, 1] + 0.5 * x[:, 3]
    labels = (labels - labels.mean()) / labels.std()
    surrogate.fit(x, labels, 0)
    return surrogate, images, prompts, x, labels


def outputs(surrogate, x):
    return torch.stack([head(x)[:, 0] for head in surrogate.heads])


def test_a_surrogate_learns_its_labels_and_passes_the_gradient_to_pixels():
    surrogate, images, prompts, x, labels = fitted()
    assert float((outputs(surrogate, x).mean(0) - labels).square().mean()) < 0.05
    pixels = images[:4].clone().requires_grad_()
    (pull,) = torch.autograd.grad(surrogate(pixels, prompts[:4]).sum(), pixels)
    assert float(pull[:, 0].mean()) > 0 > float(pull[:, 1].mean())  # red raises the label, green lowers it


def test_bootstrap_is_the_highest_head_and_heads_differ():
    surrogate, images, prompts, x, _ = fitted()
    heads = outputs(surrogate, x)
    torch.testing.assert_close(surrogate(images, prompts), heads.amax(0))
    assert float((heads[0] - heads[1]).abs().max()) > 1e-4


def test_ucb_adds_the_weighted_root_of_a_quadratic_form_that_grows_away_from_the_labelled():
    surrogate, images, prompts, x, _ = fitted(optimism="ucb", ucb_weight=0.5)
    bonuses = []
    for head in surrogate.heads:
        inner = head[:4](x)
        inverse = torch.linalg.inv(torch.cov(inner.T) + 1e-3 * torch.eye(16))
        bonuses.append(torch.einsum("bi,ij,bj->b", inner, inverse, inner).clamp(min=0).sqrt().clamp(max=10))
    expected = outputs(surrogate, x).mean(0) + 0.5 * torch.stack(bonuses).mean(0)
    torch.testing.assert_close(surrogate(images, prompts), expected, rtol=1e-2, atol=1e-3)
    far = surrogate(20 * images, prompts) - outputs(surrogate, joined(20 * images.mean((2, 3)), Features().text_features(prompts))).mean(0)
    near = surrogate(images, prompts) - outputs(surrogate, x).mean(0)
    assert 5.0 >= float(far.mean()) > float(near.mean()) > 0  # the limit of 10, times the weight


def test_the_bonus_does_not_shrink_with_the_number_of_labels():
    """For features of mean 0 it is √16 on average; 0.1.0's, of the sum of outer products, was 1/√N of that."""
    for n in (1024, 15360):
        inner = torch.randn(n, 16, generator=torch.Generator().manual_seed(n))
        official, old = (float(bonus(inner, regularised_covariance(inner, kind)).square().mean()) ** 0.5 for kind in ("mean", "sum"))
        assert official == pytest.approx(4, rel=0.02) and old == pytest.approx(4 / n**0.5, rel=0.02)
    assert float(bonus(100 * inner[:5], regularised_covariance(inner, "mean")).max()) == 10


def test_a_state_without_a_covariance_is_0_1_0s():
    run = RunContext(Family(), features=Features())
    loss = BlackBoxSQDF(queries=(8,), heads=2).begin(run)
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    surrogate = Surrogate(Features(), loss.objective, 9)
    state = {"loop": 0, "images": x, "prompts": ["a"] * 8, "labels": torch.rand(8), "heads": surrogate.heads.state_dict(), "inner": {}}
    for known, kind in (({}, "sum"), ({"covariance": "mean"}, "mean")):
        loss.restore({**state, **known})
        inner = loss.surrogate.heads[0][:4](joined(x, Features().text_features(["a"] * 8)))
        expected = (torch.cov(inner.T) if kind == "mean" else inner.T @ inner) + 1e-3 * torch.eye(16)
        torch.testing.assert_close(loss.surrogate.covariances[0], expected)
        assert loss.state()["covariance"] == kind


def test_every_loop_starts_from_the_same_networks_whatever_was_drawn_before():
    first = Surrogate(Features(), BlackBoxSQDF(), 9).heads.state_dict()
    torch.rand(17)
    second = Surrogate(Features(), BlackBoxSQDF(), 9).heads.state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
