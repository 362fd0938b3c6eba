"""Captions of images, masks and least noise levels in preference losses, against the formulas written up by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.family import STATES, as4, gradient
from helpers.preference import PROMPTS, Captioned, by_dpo, by_kto

from trainer.data.batches import Details, Images, Labels, Pairs
from trainer.objectives import DSPO, TPO, DiffusionDPO, DiffusionKTO, DiffusionNPO, MaPO, RunContext
from trainer.rng import Rng

SHAPE = (3, 4, 2)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(seed, n=4):
    weights = torch.rand(n, 1, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights / weights.mean((1, 2, 3), keepdim=True)


def pairs(details):
    return Pairs(PROMPTS, Rng(3, 0, (0, 1, 2, 3)), 0, 0.7 * drawn(1, 4, *SHAPE), 0.7 * drawn(2, 4, *SHAPE), details=details)


def levels(batch, space, least=None):
    """Uniform of the 999 levels, or of those that are not below the least."""
    sigmas = Captioned("flow" if space == "flow" else "epsilon").sigmas(999)[:-1]
    flow = sigmas if space == "flow" else sigmas / (1 + sigmas)
    u = batch.rng.uniform("noise level").double()
    numbers = [999] * 4 if least is None else [int((flow >= level).sum()) for level in least]
    return torch.stack([sigmas[int(draw * number)] for draw, number in zip(u, numbers)])


def error(policy, batch, latents, prompts, weight, sigma):
    """(B,C,h,w), of ε or of the velocity, with the prompts' share of `Captioned`."""
    noise, s = batch.rng.normal("diffusion noise", SHAPE).double(), as4(sigma, latents)
    shift = as4(torch.tensor([0.2 * len(p) for p in prompts]), latents)
    if policy.prediction == "flow":
        return policy.network((1 - s) * latents + s * noise, sigma, weight) - shift / s - (noise - latents)
    return policy.network((1 + s.square()).rsqrt() * (latents + s * noise), sigma, weight) - shift / s - noise


def loss_of(objective, batch, policy):
    loss, logs = objective.begin(RunContext(policy, prompts=PROMPTS))(batch)
    return loss, gradient(policy, loss), logs


CAPTIONS = ("a", "bbbbb", "cc", "dddd"), ("eee", "f", "gggg", "hhhhhhhh")
KINDS = {
    "captions": Details(captions=CAPTIONS),
    "masks": Details(masks=(mask(5), mask(6))),
    "least": Details(least=torch.tensor([0.0, 0.4, 0.7, 0.85], dtype=torch.float64)),
    "all": Details(CAPTIONS, (mask(5), mask(6)), torch.tensor([0.3, 0.0, 0.5, 0.6], dtype=torch.float64)),
}


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dpo", "npo", "dspo", "mapo"])
def test_pairs(name, kind, prediction):
    policy, batch = Captioned(prediction), pairs(KINDS[kind])
    details = batch.details
    sigma = levels(batch, policy.space, details.least)
    found = []
    for i, latents in enumerate((batch.chosen, batch.rejected)):
        prompts, weights = (details.captions or (PROMPTS,) * 2)[i], (details.masks or (torch.ones(()),) * 2)[i]
        errors = [error(policy, batch, latents, prompts, w, sigma) for w in (policy.weight, STATES["base"])]
        found.append([((weights * e.square()).mean((1, 2, 3)), e, weights) for e in errors])
    (better, base), (worse, other) = found
    if name == "mapo":
        objective = MaPO(beta=0.3, margin_scale=5.0)
        f = [0.5 * one[0] / torch.expm1(0.5 * one[0]) for one in (better, worse)]
        hand = (better[0] - 0.3 * torch.log(1 / (1 + torch.exp(-5.0 * (f[0] - f[1]))))).mean()
    elif name == "dspo":
        objective = DSPO(beta=2.0, safeguard=False)
        margin = -1.0 * ((better[0] - worse[0]) - (base[0] - other[0]))
        moved = as4(2.0 * (1 - margin.sigmoid()), better[1]) * (better[1] - base[1])
        hand = (better[2] * (better[1] - moved).square()).mean((1, 2, 3)).mean()
    else:
        objective = (DiffusionDPO if name == "dpo" else DiffusionNPO)(beta=20.0, safeguard=False)
        both = [(better[0], base[0]), (worse[0], other[0])]
        hand = by_dpo(policy, objective, *(both if name == "dpo" else both[::-1])).mean()
    expected = gradient(policy, hand)
    loss, slope, _ = loss_of(objective, batch, policy)
    assert float(loss.detach()) == pytest.approx(float(hand.detach()), rel=1e-9)
    torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-10)
    plain, _, _ = loss_of(objective, dataclasses.replace(batch, details=Details()), policy)
    assert abs(float(plain.detach()) / float(hand.detach()) - 1) > 1e-4  # the data say something


def test_labels():
    policy, details = Captioned(), Details(masks=(mask(5),), least=torch.tensor([0.0, 0.4, 0.7, 0.85], dtype=torch.float64))
    batch = Labels(PROMPTS, Rng(3, 0, (0, 1, 2, 3)), 0, drawn(1, 4, *SHAPE), torch.tensor([1.0, -1.0, -1.0, 1.0]), details=details)
    sigma = levels(batch, "ve", details.least)
    ours, theirs = (
        (details.masks[0] * error(policy, batch, batch.latents, PROMPTS, w, sigma).square()).mean((1, 2, 3))
        for w in (policy.weight, STATES["base"])
    )
    hand = by_kto(theirs - ours, (batch.labels > 0).tolist(), 20.0).mean()
    loss, _, _ = loss_of(DiffusionKTO(beta=20.0), batch, policy)
    assert float(loss.detach()) == pytest.approx(float(hand.detach()), rel=1e-9)


def test_wrong_captions_share_the_mask_of_their_image():
    policy, details = Captioned(), Details(masks=(mask(5),), least=torch.tensor([0.0, 0.4, 0.7, 0.85], dtype=torch.float64))
    batch = Images(PROMPTS, Rng(3, 0, (0, 1, 2, 3)), 0, 0.7 * drawn(1, 4, *SHAPE), details=details)
    sigma, objective = levels(batch, "ve", details.least), TPO(beta=20.0, mu=0.0)
    wrong = [objective.perturbed(PROMPTS)[prompt] for prompt in PROMPTS]
    right, other = (
        [
            (details.masks[0] * error(policy, batch, batch.latents, prompts, w, sigma).square()).mean((1, 2, 3))
            for w in (policy.weight, STATES["base"])
        ]
        for prompts in (PROMPTS, wrong)
    )
    loss, _, _ = loss_of(objective, batch, policy)
    assert float(loss.detach()) == pytest.approx(float(by_dpo(policy, objective, right, other).mean().detach()), rel=1e-9)


def test_drawn_levels_never_lie_below_the_least_and_reach_it():
    policy, least = Captioned(), torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    seen = []
    for number in range(400):
        batch = dataclasses.replace(pairs(Details(least=least)), rng=Rng(3, 0, tuple(range(4 * number, 4 * number + 4))))
        seen.append(DiffusionDPO(levels="logit-normal").noised(RunContext(policy), batch).sigma)
    flow = torch.cat(seen) / (1 + torch.cat(seen))
    assert 0.5 <= float(flow.min()) < 0.52 and float(flow.max()) > 0.89


def test_both_captions_of_a_pair_are_dropped_together():
    batch = pairs(Details(captions=CAPTIONS))
    middle = float(batch.rng.uniform("prompt dropout").sort().values[2])
    first, second = DiffusionDPO(prompt_dropout=middle).read(batch, 2)
    assert [a == "" for a in first] == [b == "" for b in second] and first.count("") == 2
