"""Advantages against the papers' formulas: groups, histories, several rewards, GARDO's gate and diversity."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from helpers.family import Family, Towers
from helpers.rounds import PROMPTS, SMALL, batch, begun, part_of

from trainer.objectives import DDPO
from trainer.objectives.policy_gradient.advantages import History, above_auxiliaries, group_advantages, relative_distances
from trainer.rng import generator


def test_advantages_are_those_of_the_papers():
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    rows, every = scores.numpy(), scores.numpy().ravel()
    by_group = [(r - r.mean()) / (r.std() + 1e-6) for r in rows]
    np.testing.assert_allclose(group_advantages(scores, "group").numpy(), by_group, atol=1e-12)
    np.testing.assert_allclose(group_advantages(scores, "group-mean").numpy(), [(r - r.mean()) / (every.std() + 1e-6) for r in rows])
    np.testing.assert_allclose(group_advantages(scores, "round").numpy(), (rows - every.mean()) / (every.std() + 1e-6))
    for kind in ("group", "group-mean"):  # equal but for rounding: no advantage
        near = torch.full((1, 4), 0.2) + torch.tensor([0.0, 1e-8, -1e-8, 2e-8])
        assert float(group_advantages(torch.cat([near, scores.new_ones(1, 4)]), kind).abs().max()) == 0


def test_a_prompts_history_counts_from_its_sixteenth_score_on():
    history, rng, kept = History(), np.random.default_rng(0), {}
    for _ in range(12):
        prompts, scores = [*"aab", "c"], torch.tensor(rng.normal(size=4))
        expected = []
        for prompt, score in zip(prompts, scores.tolist()):
            kept.setdefault(prompt, deque(maxlen=16)).append(score)
        for prompt, score in zip(prompts, scores.tolist()):
            base = np.array(kept[prompt]) if len(kept[prompt]) == 16 else scores.numpy()
            expected.append((score - base.mean()) / (base.std() + 1e-6))
        np.testing.assert_allclose(history.advantages(prompts, scores).numpy(), expected, rtol=1e-9)
    assert len(kept["a"]) == 16 and len(kept["b"]) == 12


class Several(Towers):
    """A sum of three rewards, the last of weight 0."""

    weights = (1.0, -0.5, 0.0)

    def terms(self, images, prompts):
        flat = images.flatten(1)
        return torch.stack([super().__call__(images, prompts), flat.sum(1), flat[:, 0]], 1).float()

    def __call__(self, images, prompts):
        return (self.terms(images, prompts) * torch.tensor(self.weights)).sum(1)


class Colours:
    """Features of images: their three values."""

    def image_features(self, images):
        return images.flatten(1)


def test_each_reward_of_a_sum_may_have_advantages_of_its_own(tmp_path):
    loss = begun(DDPO(**SMALL, separate_rewards=True), Family(), tmp_path, Several())
    seen = []
    loss.run.policy.decode = lambda latents: seen.append(latents) or latents
    loss(batch())
    prompts = loss.objective.prompts_of(PROMPTS, 3, 0)
    terms = torch.cat([Several().terms(x, prompts[4 * i : 4 * i + 4]) for i, x in enumerate(seen)]).reshape(2, 4, 3).numpy()
    each = (terms - terms.mean(1, keepdims=True)) / (terms.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(loss.round.advantages.numpy(), (each[..., 0] - 0.5 * each[..., 1]).ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss.round.scores.numpy(), (terms[..., 0] - 0.5 * terms[..., 1]).ravel(), rtol=1e-5, atol=1e-5)


def test_the_gate_takes_images_that_the_reward_ranks_above_what_the_auxiliary_rewards_do(tmp_path):
    scores, others = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0], [0.0, 4.0, 3.0, 2.0, 1.0]]).T
    excess = [4 - 0, 0 - 4, 3 - 2, 1 - 2.5, 2 - 1.5]  # ranks by hand
    assert above_auxiliaries(scores, others, 1.0).tolist() == [e > 0 for e in excess]
    assert above_auxiliaries(scores, others, 0.1).tolist() == [True, False, False, False, False]
    assert not above_auxiliaries(scores, scores[:, None], 1.0).any()
    rng = torch.Generator().manual_seed(0)
    passed, order = (torch.rand(16, generator=rng) > 0.5).float(), torch.randperm(16, generator=rng)  # equal scores have no order
    random = torch.rand(16, 2, generator=rng).round(decimals=1)
    assert torch.equal(above_auxiliaries(passed, random, 0.3)[order], above_auxiliaries(passed[order], random[order], 0.3))
    assert not above_auxiliaries(torch.ones(16), torch.ones(16, 1), 1.0).any()
    loss = begun(DDPO(**SMALL, kl_weight=0.5, gate=0.4), Family(), tmp_path, Several())
    value, logs, part = part_of(loss, batch())
    assert 0 < float(loss.round.held.sum()) < 8 and torch.equal(part.held, loss.round.held.float()[_images(loss, batch())])
    assert float(value.detach()) == pytest.approx(float((-part.advantages + 0.5 * logs["kl per element"] * part.held).mean()), rel=1e-6)


def _images(loss, given):
    order = torch.randperm(32, generator=generator(given.rng.seed, "order", 0))
    return order[torch.tensor(given.rng.indices)] // 4


def test_diversity_multiplies_what_is_above_the_mean_by_the_relative_distance_to_the_nearest(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 4, 5))
    expected = []
    for group in features:
        unit = group / np.linalg.norm(group, axis=1, keepdims=True)
        nearest = [min(1 - unit[i] @ unit[j] for j in range(4) if j != i) for i in range(4)]
        expected.append(np.array(nearest) / np.mean(nearest))
    np.testing.assert_allclose(relative_distances(torch.tensor(features)).numpy(), expected, rtol=1e-9)
    assert relative_distances(torch.ones(1, 3, 2)).tolist() == [[1.0, 1.0, 1.0]]  # equal images
    plain, weighted = (
        begun(DDPO(**SMALL, diversity_weighted=on), Family(), tmp_path / str(on), features=Colours()) for on in (False, True)
    )
    for loss in (plain, weighted):
        loss(batch())
    ratio = weighted.round.advantages / plain.round.advantages
    above = plain.round.advantages > 0
    assert bool((ratio[~above] == 1).all()) and float((ratio[above] - 1).abs().max()) > 0.05
