"""The loop: one step is one step, accumulation averages, bad numbers never reach the weights."""

from __future__ import annotations

import pytest
import torch
from helpers.losses import loss_of

from trainer.data.batches import Prompts
from trainer.objectives import ReFL, RunContext
from trainer.rng import Rng
from trainer.training.loop import Ema, NonFinite, train

OBJECTIVE = ReFL(steps=10, grad_from=6, grad_to=9)


def bound(policy, reward):
    return OBJECTIVE.begin(RunContext(policy, reward))


def batches(step, micro, size=4, accumulate=1):
    first = (step * accumulate + micro) * size
    return Prompts(("p",) * size, Rng(0, step, tuple(range(first, first + size))), step)


def test_one_sgd_step_moves_the_adapter_by_minus_lr_times_the_gradient(toy_policy, toy_reward):
    before = toy_policy.weight.detach().clone()
    loss_of(OBJECTIVE, toy_policy, batches(0, 0), toy_reward)[0].backward()
    expected = before - 0.05 * toy_policy.weight.grad
    optimizer = torch.optim.SGD(toy_policy.parameters(), lr=0.05)
    steps = list(train(bound(toy_policy, toy_reward), batches, toy_policy.parameters(), optimizer, steps=1, max_grad_norm=0))
    torch.testing.assert_close(toy_policy.weight.detach(), expected)
    assert [s.number for s in steps] == [1]


def test_accumulated_micro_batches_average_to_the_joined_batch(toy_policy, toy_reward):
    gradients = []
    for accumulate, size in ((1, 8), (2, 4)):
        policy = type(toy_policy)()
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        next(
            train(
                bound(policy, toy_reward),
                lambda s, m, a=accumulate, n=size: batches(s, m, n, a),
                policy.parameters(),
                optimizer,
                steps=1,
                accumulate=accumulate,
            )
        )
        gradients.append(policy.weight.grad)
    torch.testing.assert_close(*gradients)


def test_clipping_bounds_the_step(toy_policy, toy_reward):
    before = toy_policy.weight.detach().clone()
    optimizer = torch.optim.SGD(toy_policy.parameters(), lr=1.0)
    next(train(bound(toy_policy, toy_reward), batches, toy_policy.parameters(), optimizer, steps=1, max_grad_norm=1e-3))
    assert float((toy_policy.weight - before).norm()) == pytest.approx(1e-3)


def test_a_bad_reward_names_the_sample_and_changes_nothing(toy_policy):
    class Broken:
        differentiable = True

        def __call__(self, images, prompts):
            scores = images.flatten(1).sum(1)
            return torch.where(torch.arange(len(scores)) == 2, float("nan"), scores)

    before = toy_policy.weight.detach().clone()
    optimizer = torch.optim.SGD(toy_policy.parameters(), lr=1.0)
    with pytest.raises(NonFinite, match=r"step 1: reward of sample 2 \('p'\) is not finite; lower"):
        next(train(bound(toy_policy, Broken()), batches, toy_policy.parameters(), optimizer, steps=1))
    assert torch.equal(toy_policy.weight.detach(), before)


def test_ema_is_the_geometric_average(toy_policy):
    ema = Ema([("w", toy_policy.weight)], 0.75)
    first = toy_policy.weight.detach().clone()
    with torch.no_grad():
        toy_policy.weight.add_(1.0)
    ema.update([("w", toy_policy.weight)])
    torch.testing.assert_close(ema.values["w"], 0.75 * first + 0.25 * (first + 1))
