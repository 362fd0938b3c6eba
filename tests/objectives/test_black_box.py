"""The black-box variant's surrogate: what it learns, and both of its optimisms, by hand."""

from __future__ import annotations

import torch

from trainer.objectives import BlackBoxSQDF
from trainer.objectives.reward_gradient.black_box import Surrogate, joined


class Features:
    """Mean colours as image features, letters as text features."""

    def image_features(self, images):
        return images.mean((2, 3))

    def text_features(self, prompts):
        return torch.tensor([[float(len(p)), 1.0, 0.0] for p in prompts])


def fitted(**settings):
    surrogate = Surrogate(Features(), BlackBoxSQDF(queries=(64,), epochs=200, heads=3, **settings), 9)
    images = torch.rand(256, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.rand(256, 3, 1, 1)
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
        inverse = torch.linalg.inv(inner.T @ inner + 1e-3 * torch.eye(16))
        bonuses.append(torch.einsum("bi,ij,bj->b", inner, inverse, inner).clamp(min=0).sqrt().clamp(max=10))
    expected = outputs(surrogate, x).mean(0) + 0.5 * torch.stack(bonuses).mean(0)
    torch.testing.assert_close(surrogate(images, prompts), expected, rtol=1e-2, atol=1e-3)
    far = surrogate(20 * images, prompts) - outputs(surrogate, joined(20 * images.mean((2, 3)), Features().text_features(prompts))).mean(0)
    near = surrogate(images, prompts) - outputs(surrogate, x).mean(0)
    assert float(far.mean()) > 2 * float(near.mean()) > 0


def test_every_loop_starts_from_the_same_networks_whatever_was_drawn_before():
    first = Surrogate(Features(), BlackBoxSQDF(), 9).heads.state_dict()
    torch.rand(17)
    second = Surrogate(Features(), BlackBoxSQDF(), 9).heads.state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
