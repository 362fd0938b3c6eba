"""Preference losses against write-ups in the network's own prediction, their identities, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.family import Family, gradient
from helpers.preference import (
    PROMPTS,
    Captioned,
    N,
    both,
    by_dpo,
    by_kto,
    images,
    labels,
    loss_and_gradient,
    pairs,
    written_up,
)  # fmt: skip
from helpers.processes import log_of, toy_run, trained

from trainer.config import ConfigError
from trainer.objectives import TPO, DiffusionDPO, DiffusionKTO, DiffusionNPO, MaPO, RunContext
from trainer.objectives.preference.dpo import safeguard
from trainer.objectives.preference.mapo import saturated
from trainer.objectives.preference.perturb import perturb
from trainer.runtime.processes import ALONE
from trainer.training.nfe import CountingPolicy


def dpo_by_hand(policy, settings):
    batch = pairs()
    return by_dpo(policy, settings, both(policy, batch, batch.chosen), both(policy, batch, batch.rejected)).mean()


def npo_by_hand(policy, settings):
    batch = pairs()
    return by_dpo(policy, settings, both(policy, batch, batch.rejected), both(policy, batch, batch.chosen)).mean()


def kto_by_hand(policy, settings):
    batch = labels()
    tuned, base = both(policy, batch, batch.latents)
    return by_kto(base - tuned, (batch.labels > 0).tolist(), settings.beta).mean()


def mapo_by_hand(policy, settings):
    batch = pairs()
    errors = both(policy, batch, batch.chosen)[0], both(policy, batch, batch.rejected)[0]
    f = [0.5 * e / (torch.exp(0.5 * e) - 1) for e in errors]
    return (errors[0] + 0.1 * torch.log(1 + torch.exp(-settings.margin_scale * (f[0] - f[1])))).mean()


def tpo_by_hand(policy, settings):
    batch = images()
    wrong = [perturb(prompt) for prompt in batch.prompts]
    right, off = both(policy, batch, batch.latents), both(policy, batch, batch.latents, wrong)
    if settings.form == "dpo":
        return by_dpo(policy, settings, right, off).mean()
    gain = torch.cat([right[1] - right[0], off[1] - off[0]])
    return by_kto(gain, [True] * N + [False] * N, settings.beta).mean()


WRITTEN = {
    "dpo": (DiffusionDPO(beta=3.0, safeguard=False), pairs, dpo_by_hand),
    "npo": (DiffusionNPO(beta=3.0), pairs, npo_by_hand),
    "kto": (DiffusionKTO(beta=3.0), labels, kto_by_hand),
    "mapo": (MaPO(margin_scale=2.0), pairs, mapo_by_hand),
    "tdpo": (TPO(beta=3.0, mu=0.0), images, tpo_by_hand),
    "tkto": (TPO(beta=3.0, form="kto"), images, tpo_by_hand),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("name", WRITTEN)
def test_loss_and_gradient_are_those_of_the_write_up(name, prediction, monkeypatch):
    """In the network's prediction and target, while the code has x0-predictions; the grid, draws and reference are written up too."""
    monkeypatch.setattr("trainer.objectives.preference.tpo.safeguard", lambda *_: 1.0)  # it has a test of its own
    objective, data, by_hand = WRITTEN[name]
    target = "velocity" if prediction == "v" else "model"
    loss, found, _ = loss_and_gradient(replace(objective, target=target), data(), prediction)
    policy = Captioned(prediction)
    expected = by_hand(policy, objective)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found, gradient(policy, expected), rtol=1e-7, atol=1e-10)
    assert float(found.norm()) > 1e-4


@pytest.mark.parametrize("mu", [0.5, 0.9, 1.0])
def test_the_safeguard_is_the_papers_and_keeps_the_better_images_error_from_rising(mu):
    """λ by autograd on the two mean errors, as the paper derives it; the value of the loss is untouched."""
    seen = []
    for number in range(8):
        objective, batch, policy = DiffusionDPO(beta=3.0, mu=mu), pairs(number), Captioned()
        loss, found, logs = loss_and_gradient(objective, batch)
        plain = loss_and_gradient(replace(objective, safeguard=False), batch)
        assert float(loss) == pytest.approx(float(plain[0]), rel=1e-12)
        _, e_w = written_up(policy, batch, batch.chosen, batch.prompts, policy.weight)
        _, e_l = written_up(policy, batch, batch.rejected, batch.prompts, policy.weight)
        up, down = (torch.autograd.grad((e := error.detach().requires_grad_()).square().mean(), e)[0] for error in (e_w, e_l))
        aligned = float((up * down).sum())
        scale = min(1.0, (1 - mu) * float((up * up).sum()) / aligned) if aligned > 0 else 1.0
        assert logs["lambda"].tolist() == pytest.approx([scale] * N, rel=1e-9) and 0 <= scale <= 1
        slope = float(((-up + scale * down) * up).sum())  # of the better images' error along the step
        assert slope <= -mu * float((up * up).sum()) + 1e-12
        seen.append(scale)
        (better, b), (worse, w) = both(policy, batch, batch.chosen), both(policy, batch, batch.rejected)
        share = torch.sigmoid(1.5 * ((better - b) - (worse - w))).detach()
        torch.testing.assert_close(found, gradient(policy, (1.5 * share * (better - scale * worse)).mean()), rtol=1e-7, atol=1e-10)
    assert len({round(s, 6) for s in seen}) == (1 if mu == 1 else 8), seen


def test_the_safeguard_lies_between_0_and_1_and_leaves_opposed_errors_alone():
    rng, seen = torch.Generator().manual_seed(0), []
    for _ in range(200):
        better, worse = (torch.randn(2, 3, 2, 2, generator=rng) for _ in range(2))
        worse = worse + 0.5 * better  # near the threshold aligned = (1 − μ)·norm
        scale = safeguard((better, worse), 0.6, ALONE)
        assert 0 <= scale <= 1 and (scale == 1 if float((better * worse).sum()) <= 0 else True)
        seen.append(scale)
    assert min(seen) < 0.9 and 0.2 < sum(scale == 1 for scale in seen) / 200 < 0.95
    assert safeguard((better, better), 0.6, ALONE) == pytest.approx(0.4)


def test_npo_is_dpo_with_the_pair_swapped():
    batch = pairs()
    swapped = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    for safe in (True, False):
        one = loss_and_gradient(DiffusionNPO(beta=4.0, safeguard=safe), batch)
        two = loss_and_gradient(DiffusionDPO(beta=4.0, safeguard=safe), swapped)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_soft_labels_and_the_supervised_share():
    batch = pairs()
    plain, turned = (loss_and_gradient(DiffusionDPO(beta=4.0, flip_labels=f, safeguard=False), batch)[0] for f in (False, True))
    soft = loss_and_gradient(DiffusionDPO(beta=4.0, label_smoothing=0.2, safeguard=False), batch)[0]
    torch.testing.assert_close(soft, 0.8 * plain + 0.2 * turned)
    mixed, _, logs = loss_and_gradient(DiffusionDPO(beta=4.0, sft_weight=0.5, safeguard=False), batch)
    torch.testing.assert_close(mixed, plain + 0.5 * logs["chosen_error"].mean())


def test_mapos_function_is_one_at_no_error_and_falls():
    errors = torch.tensor([0.0, 1e-9, 1e-4, 2e-4, 3e-4, 0.1, 1.0, 10.0], dtype=torch.float64, requires_grad=True)
    values = saturated(errors, 0.5)
    (slope,) = torch.autograd.grad(values.sum(), errors)
    assert float(values[0].detach()) == 1.0 and float(slope[0]) == pytest.approx(-0.25)
    assert bool((values.diff() < 0).all()) and float(values[-1].detach()) == pytest.approx(5 / math.expm1(5))
    assert slope[1:4].tolist() == pytest.approx([-0.25] * 3, abs=1e-5)


@pytest.mark.parametrize(("name", "forwards"), [("mapo", 2 * N), ("dpo", 4 * N), ("kto", 2 * N), ("tdpo", 4 * N)])
def test_the_reference_is_evaluated_where_there_is_one(name, forwards):
    """MaPO has none: half the evaluations of Diffusion-DPO."""
    objective, data, _ = WRITTEN[name]
    policy = CountingPolicy(Captioned())
    loss, _ = objective.begin(RunContext(policy, prompts=PROMPTS))(data())
    assert policy.calls == forwards
    loss.backward()
    assert policy.calls - forwards == 2 * (N if name == "kto" else 2 * N)


def test_prompt_dropout_takes_both_halves_of_a_pair():
    class Empty(Captioned):
        def denoiser(self, prompts, **settings):
            seen.append(list(prompts))
            return super().denoiser(prompts, **settings)

    seen = []
    for number in range(30):
        loss_and_gradient(DiffusionDPO(prompt_dropout=0.4), pairs(number), policy=Empty())
    assert all(one[:N] == one[N:] for one in seen)
    share = sum(prompt == "" for one in seen for prompt in one) / sum(map(len, seen))
    assert share == pytest.approx(0.4, abs=0.15)
    loss_and_gradient(TPO(prompt_dropout=1.0), images(), policy=Empty())
    assert seen[-1] == [""] * 2 * N


@pytest.mark.parametrize("case", ["diffusion-dpo", "diffusion-kto"])
def test_a_resumed_run_ends_with_the_same_bits(case, tmp_path):
    whole = trained(case, tmp_path / "whole", steps=6)
    trained(case, tmp_path / "cut", steps=4)
    resumed = trained(case, tmp_path / "cut", steps=6, resume=True)
    assert torch.equal(resumed["weight"], whole["weight"]) and log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert float((whole["weight"] - Family().weight).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("case", "wanted"),
    [("diffusion-dpo", "pairs"), ("mapo", "pairs"), ("diffusion-kto", "labels")],
)
def test_other_data_are_refused_before_a_step(case, wanted, tmp_path, monkeypatch):
    from helpers import processes

    monkeypatch.setattr(processes, "samples", lambda n=5, kind=None, plain=processes.samples: plain(n))
    with pytest.raises(ConfigError, match=f"{case} trains on {wanted} with these settings, and the data are images: give `{wanted}`"):
        toy_run(case, tmp_path)


def test_likes_are_compared_with_others(tmp_path):
    with pytest.raises(
        ConfigError, match="diffusion-kto: batch_size = 1: an image is compared with the mean of its micro-batch, give at least 2"
    ):
        toy_run("diffusion-kto", tmp_path, batch_size=1)


def test_the_safeguard_of_two_processes_is_that_of_one():
    chosen, rejected = pairs().chosen, pairs().chosen + 0.3 * pairs().rejected

    class Half:
        def __init__(self):
            self.sent = []

        def exchange(self, value):
            self.sent.append(value)
            return [value]

    half = Half()
    for share in (slice(0, 2), slice(2, 4)):
        safeguard((chosen[share], rejected[share]), 0.5, half)
    joined = type("Joined", (), {"exchange": lambda self, value: half.sent})()
    assert safeguard((chosen[:2], rejected[:2]), 0.5, joined) == pytest.approx(safeguard((chosen, rejected), 0.5, ALONE))
