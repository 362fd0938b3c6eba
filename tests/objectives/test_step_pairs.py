"""Pairs of sampler steps (SPO, PSO): loss and gradient against a write-up in noise levels of ᾱ, what is drawn, and which pairs train."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.family import STATES, Family, Towers, as4, gradient
from helpers.rounds import PROMPTS, batch, begun

from trainer.objectives import PSO, SPO, RunContext
from trainer.objectives.policy_gradient.step_pairs import pair_losses
from trainer.rng import Rng

SPOS = {"steps": 5, "guidance_scale": 1.0, "group": 3, "prompts_per_round": 2, "first_step": 1, "gap": 0.05}
PSOS = {"steps": 3, "prompts_per_round": 2}
FORMS = {
    "spo": SPO(**{**SPOS, "gap": 0.3}),
    "lpo": SPO(**{**SPOS, "beta": 500.0, "first_step": 0, "gap": 0.02, "gap_noisiest": 0.2}),
    "pso": PSO(**PSOS),
    "pso, early": PSO(steps=4, prompts_per_round=2, trained_count=2),
    "pso, renoised": PSO(**PSOS, transition="renoised"),
}


def step_by_hand(policy, weight, x, sigma, after, transition="ancestral"):
    """Mean and width of a step in variance-preserving coordinates, from the network's own prediction; a flow's in its own."""
    if policy.prediction == "flow":
        v, s, t = policy.network(x, sigma, weight), as4(sigma, x), as4(after, x)
        clean, noise = x - s * v, x + (1 - s) * v
        a, b, a2, b2 = (1 - s) ** 2, s**2, (1 - t) ** 2, t**2
    else:
        a, a2 = ((1 + as4(level, x) ** 2) ** -1 for level in (sigma, after))
        b, b2, given = 1 - a, 1 - a2, x * a.sqrt()
        output = policy.network(given, sigma, weight)
        noise = output if policy.prediction == "epsilon" else a.sqrt() * output + b.sqrt() * given
        clean = (given - b.sqrt() * noise) / a.sqrt()
    if transition == "renoised":
        return a2.sqrt() * clean, b2.sqrt()
    variance = b2 * (1 - a * b2 / (a2 * b))  # of a variance-preserving model (b2/b)·(1 − a/a2)
    return a2.sqrt() * clean + (b2 - variance).sqrt() * noise, variance.sqrt()


def log_ratio(policy, x, end, sigma, after, transition="ancestral"):
    """Mean over the elements of log N of the tuned model less that of the base."""
    scale = 1 if policy.prediction == "flow" else (1 + as4(after, x) ** 2) ** -0.5
    both = [step_by_hand(policy, w, x, sigma, after, transition) for w in (policy.weight, STATES["base"])]
    tuned, base = ((-((end * scale - mean) ** 2) / (2 * std**2) - torch.log(std)).mean((1, 2, 3)) for mean, std in both)
    return tuned - base


def loss_by_hand(better, worse, beta):
    ratios = [torch.exp(value).clamp(0.9, 1.1).log() for value in (better, worse)]
    return -torch.log(torch.sigmoid(beta * ratios[0] - beta * ratios[1]))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradient_are_those_of_the_write_up(name, prediction, tmp_path):
    objective = FORMS[name]
    policy, n = Family(prediction), objective.rollouts * objective.trained
    loss = begun(objective, policy, tmp_path)
    with torch.no_grad():
        policy.weight.mul_(0.3)  # near the base, so that ratios lie on both sides of the clip
    found, logs = loss(batch(n=n))
    assert float(logs["pairs"].mean()) > 0 == float(logs["clipped"].min())
    assert bool(logs["clipped"].any()) == (objective.trained_count == 0)  # noisy steps move least
    sigmas, expected, count = policy.sigmas(objective.steps), [], 0
    for row in range(objective.rollouts):
        for turn in range(objective.trained):
            i = objective.first + turn
            kept = [loss.store.read(row, k)[None] for k in objective.needed(turn)]
            starts, ends = (kept[:1] * 2, kept[1:]) if isinstance(objective, SPO) else (kept[::2], kept[1::2])
            kind = getattr(objective, "transition", "ancestral")
            levels = sigmas[i : i + 1], sigmas[i + 1 : i + 2]
            ratios = [log_ratio(policy, x, end, *levels, kind) for x, end in zip(starts, ends)]
            if float(loss.round.weights[row, turn]):
                expected.append(loss_by_hand(*ratios, objective.beta))
                count += 1
    mean = torch.cat(expected).mean()
    torch.testing.assert_close(found.detach(), mean.detach(), rtol=1e-7, atol=1e-9)  # weights are of float32
    torch.testing.assert_close(gradient(policy, found), gradient(policy, mean), rtol=1e-7, atol=1e-10)
    assert count == round(float(logs["pairs"].sum())) and float(gradient(policy, loss(batch(n=n))[0]).norm()) > 1e-6


@pytest.mark.parametrize("objective", [SPO(**SPOS), PSO(**PSOS)], ids=["spo", "pso"])
def test_at_the_base_every_ratio_is_one(objective, tmp_path):
    policy = Family()
    with torch.no_grad():
        policy.weight.copy_(STATES["base"])
    loss, logs = begun(objective, policy, tmp_path)(batch(n=objective.rollouts * objective.trained))
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-12)
    assert float(logs["margin"].abs().max()) == float(logs["clipped"].max()) == 0 and float(gradient(policy, loss).norm()) > 0


def test_beyond_the_clip_a_side_has_no_gradient():
    better, worse = (torch.tensor([0.05, 0.2, -0.3, 0.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    pair_losses(better, worse.flip(0) * 0.5, 10.0, 0.1).sum().backward()
    assert [bool(g) for g in better.grad] == [True, False, False, True] and bool((better.grad <= 0).all())


def test_spo_branches_at_every_trained_step_and_a_random_next_state_goes_on(tmp_path):
    policy, spo, rng = Family(), SPO(**SPOS), Rng(5, 0, tuple(range(6)))
    states, best, worst = spo.draw(RunContext(policy, Towers(), folder=tmp_path), ("a", "bb"), rng)
    sigmas, went = policy.sigmas(5), set()
    kept = states.unflatten(1, (3, 3))
    x = policy.start(rng.start_noise((3, 1, 1))[::3], 5)
    for i in range(4):
        mean, std = step_by_hand(policy, policy.weight.detach(), x, sigmas[i].expand(2), sigmas[i + 1].expand(2))
        noise, back = rng.step_noise((3, 1, 1))(i).double(), (1 + sigmas[i + 1] ** 2).sqrt()
        if i == 0:
            x = (mean + std * noise[::3]) * back
            continue
        torch.testing.assert_close(kept[:, i - 1, 0], x)
        following = [(mean[b] + std[b] * noise[3 * b + j]) * back for b in range(2) for j in range(3)]
        clean = policy.denoiser("aaabbb").__call__(torch.stack(following), sigmas[i + 1].expand(6)).detach()
        scores = Towers()(clean, ("a",) * 3 + ("bb",) * 3).reshape(2, 3)
        torch.testing.assert_close((best[:, i - 1], worst[:, i - 1]), (scores.amax(1), scores.amin(1)))
        for b in range(2):
            order = scores[b].argsort()
            torch.testing.assert_close(kept[b, i - 1, 1], following[3 * b + int(order[-1])])
            torch.testing.assert_close(kept[b, i - 1, 2], following[3 * b + int(order[0])])
        if i < 3:
            x = kept[:, i, 0]
            went |= {j for b in range(2) for j in range(3) if torch.allclose(x[b], following[3 * b + j])}
    assert len(went) > 1
    assert policy.calls == 2 * 2 + 3 * 6 + 3 * 6 == 40  # drawn: the two shared steps and three levels of six; and by hand above


def test_pso_pairs_the_best_and_the_worst_of_whole_rollouts(tmp_path):
    policy, pso, rng = Family(), PSO(steps=4, group=3), Rng(5, 0, tuple(range(6)))
    states, best, worst = pso.draw(RunContext(policy, Towers(), folder=tmp_path), ("a", "bb"), rng)
    sigmas, x = policy.sigmas(4), policy.start(rng.start_noise((3, 1, 1)), 4)
    path = [x]
    for i in range(3):
        mean, std = step_by_hand(policy, policy.weight.detach(), x, sigmas[i].expand(6), sigmas[i + 1].expand(6))
        x = (mean + std * rng.step_noise((3, 1, 1))(i).double()) * (1 + sigmas[i + 1] ** 2).sqrt()
        path.append(x)
    ends = policy.denoiser("aaabbb")(x, sigmas[3].expand(6)).detach()
    scores = Towers()(ends, ("a",) * 3 + ("bb",) * 3).reshape(2, 3)
    for b in range(2):
        torch.testing.assert_close((best[b], worst[b]), (scores[b].max().expand(3), scores[b].min().expand(3)))
        chosen = [3 * b + int(scores[b].argmax()), 3 * b + int(scores[b].argmin())]
        expected = torch.cat([torch.stack([state[row] for state in path]) for row in chosen])
        torch.testing.assert_close(states[b], expected.detach())


class Fixed(Towers):
    def __init__(self, score):
        self.score = score

    def __call__(self, images, prompts):
        return torch.full((len(images),), self.score)


@pytest.mark.parametrize("objective", [SPO(**{**SPOS, "gap": 0.0}), PSO(**PSOS)], ids=["spo", "pso"])
def test_a_round_without_pairs_is_refused_first_and_trains_nothing_later(objective, tmp_path, caplog):
    n = objective.rollouts * objective.trained
    with pytest.raises(ValueError, match=f"of the round's {n} pairs none is trained: the scores of a pair differ by 0 at most; choose a"):
        begun(objective, Family(), tmp_path, Fixed(1.0))(batch(n=n))
    with pytest.raises(ValueError, match="the reward of an image of '.*' is nan: no pair can be compared; check the reward"):
        begun(objective, Family(), tmp_path, Fixed(math.nan))(batch(n=n))
    loss = begun(objective, Family(), tmp_path)
    loss(batch(n=n))
    loss.run = replace(loss.run, reward=Fixed(1.0))
    value, logs = loss(batch(1, n=n, step=1))
    assert float(gradient(loss.run.policy, value).abs().max()) == 0 == float(logs["pairs"].max()) and "none is trained" in caplog.text


def test_pairs_train_whose_softmax_is_apart_and_lpo_asks_more_of_noisy_steps(tmp_path):
    policy, spo = Family(), SPO(**{**SPOS, "gap": 0.4})
    loss = begun(spo, policy, tmp_path)
    loss(batch(n=6))
    both = torch.stack([loss.round.better, loss.round.worse], -1).softmax(-1)
    assert torch.equal(loss.round.weights > 0, both[..., 0] - both[..., 1] > 0.4)
    assert 0 < int((loss.round.weights > 0).sum()) < 6 and float(loss.round.weights.mean()) == pytest.approx(1)
    lpo = SPO(first_step=0, gap=0.35, gap_noisiest=0.5)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    left = (1 - betas).cumprod(0)[[*range(951, 0, -50)]]  # Stable Diffusion's 20 steps
    sigmas = torch.cat([((1 - left) / left).sqrt(), torch.zeros(1)])
    width = ((1 - left[1:]) / (1 - left[:-1]) * (1 - left[:-1] / left[1:])).sqrt()
    expected = 0.35 + (width - width.min()) / (width.max() - width.min()) * 0.15
    torch.testing.assert_close(lpo.gaps(sigmas, "ve").double(), expected)
    assert expected[0] == 0.5 and float(width[0]) == pytest.approx(0.6444, abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (SPO, {"group": 1}, "group = 1: a pair is the best and the worst of a group, give at least 2"),
        (PSO, {"group": 1}, "group = 1: a pair is the best"),
        (SPO, {"steps": 5, "first_step": 4}, "steps = 5: the last step has no noise, and none is left to train"),
        (PSO, {"trained_count": 4}, "trained_count = 4: from the first trained step on 3 steps have noise"),
        (PSO, {"steps": 1}, "steps = 1: the last step has no noise"),
    ],
)
def test_impossible_settings_are_refused(objective, settings, message):
    with pytest.raises(ValueError, match=message):
        objective(**settings)


def test_a_micro_batch_that_divides_no_round_is_refused(tmp_path):
    context = RunContext(Family(), Towers(), folder=tmp_path, prompts=PROMPTS, batch_size=4)
    with pytest.raises(ValueError, match="batch_size = 4: a round has 2 prompts × 3 trained steps = 6 samples, give a divisor of that"):
        SPO(**SPOS).check(context)
    assert SPO(**SPOS).recommended_sigma(Family().sigmas(10)) == float(Family().sigmas(10)[2])
