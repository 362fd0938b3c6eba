"""DiffusionNFT against its write-up in velocities and noise predictions, and the model that follows from round to round."""

from __future__ import annotations

import pytest
import torch
from helpers.family import STATES, Family, Towers, as4, gradient
from helpers.processes import log_of, toy_run, trained

from trainer.data.batches import Prompts
from trainer.objectives import DiffusionNFT, RunContext
from trainer.rng import Rng

SMALL = {"steps": 5, "group": 4, "prompts_per_round": 2}


def batch(number, step, n=4):
    return Prompts(tuple("a" * n), Rng(3, step, tuple(range(number * n, number * n + n)), number), number)


def nft_by_hand(policy, objective, part, old, rng):
    """The official lines' terms: mixtures of the network's own predictions, turned into x0 afterwards."""
    clean, sigma = part.states[:, 0], policy.sigmas(objective.steps)[part.index]
    s, noise = as4(sigma, clean), rng.normal("matching noise", (3, 1, 1)).double()
    flow = policy.prediction == "flow"
    a = 1 - s if flow else (1 + s.square()).rsqrt()
    x = a * clean + (s if flow else a * s) * noise
    now, then, base = (policy.network(x, sigma, w) for w in (policy.weight, old, STATES["base"]))

    def error(prediction):
        if flow:
            x0 = x - s * prediction
        else:
            x0 = (x - a * s * prediction) / a if policy.prediction == "epsilon" else a * x - a * s * prediction
        size = (x0 - clean).abs().mean((1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
        return ((x0 - clean) ** 2 / size).mean((1, 2, 3))

    beta = objective.beta
    good, bad = error(beta * now + (1 - beta) * then), error((1 + beta) * then - beta * now)
    r = (part.advantages.double() / 5 / 2 + 0.5).clamp(0, 1)
    in_noise = now - base  # v of a v-network is compared in units of ε: its difference is √(1 + σ²) of that
    unit = (1 + sigma.square()).sqrt() if policy.prediction == "v" else torch.ones_like(sigma)
    distance = (in_noise / as4(unit, clean)).square().mean((1, 2, 3))
    return (5 * (r * good + (1 - r) * bad) / beta + objective.kl_weight * distance).mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_and_gradient_are_those_of_the_write_up(prediction, beta, tmp_path):
    """In three rounds, between which the weights move: D_old is the mean that follows, and draws the images."""
    policy, kept = Family(prediction), []
    objective = DiffusionNFT(beta=beta, kl_weight=0.2, decay_rate=0.3, max_decay=0.5, **SMALL)
    run = objective.begin(RunContext(policy, Towers(), folder=tmp_path, prompts=("a", "bb", "ccc")))
    plain = DiffusionNFT.losses
    old = policy.weight.detach().clone()
    for round_, decay in enumerate((0.0, 0.3, 0.5)):  # min(0.3·step, 0.5) at steps 1 and 2
        if round_:
            with torch.no_grad():
                policy.weight.add_(0.1)
            old = decay * old + (1 - decay) * policy.weight.detach()
        part_batch = batch(round_ * 8, round_)  # 8 images × 4 levels are 8 micro-batches of 4
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DiffusionNFT, "losses", lambda self, run, part: (kept.append(part), plain(self, run, part))[1])
            loss, _ = run(part_batch)
        expected = nft_by_hand(policy, objective, kept[-1], old, part_batch.rng)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(run.old.values[0], old)
    drawn = Family(prediction)
    with torch.no_grad():
        drawn.weight.copy_(old)
    other = DiffusionNFT(**SMALL).begin(RunContext(drawn, Towers(), folder=tmp_path / "other", prompts=("a", "bb", "ccc")))
    assert other.settings.images == 8 and torch.equal(objective.trained_steps(0, 0), torch.arange(4).expand(8, 4))


def test_where_the_model_is_what_drew_it_the_gradient_is_the_advantage_weighted_one(tmp_path):
    """At D = D_old with β = 1 both errors are equal and the gradient is (2r − 1)·∇ of the error: none at advantage 0."""
    policy, kept = Family(), []
    objective = DiffusionNFT(kl_weight=0.0, **SMALL)
    run = objective.begin(RunContext(policy, Towers(), folder=tmp_path, prompts=("a", "bb", "ccc")))
    plain = DiffusionNFT.losses
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DiffusionNFT, "losses", lambda self, run, part: (kept.append(part), plain(self, run, part))[1])
        loss, logs = run(batch(0, 0))
    torch.testing.assert_close(logs["good"], logs["bad"])
    part, rng = kept[-1], batch(0, 0).rng
    clean, sigma = part.states[:, 0], policy.sigmas(5)[part.index]
    x = policy.add_noise(clean, rng.normal("matching noise", (3, 1, 1)).double(), sigma)
    error = (policy.denoiser("aaaa")(x, sigma) - clean).flatten(1)
    weighted = part.advantages.double() / 5 * error.square().mean(1) / error.detach().abs().mean(1)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, 5 * weighted.mean()), rtol=1e-6, atol=1e-9)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    whole = trained("diffusion-nft", tmp_path / "whole")
    run = toy_run("diffusion-nft", tmp_path / "part")
    run.open_folder(overwrite=False, resume=False)
    for done in run.steps():
        if done.number == 5:
            break
    assert torch.equal(trained("diffusion-nft", tmp_path / "part", resume=True)["weight"], whole["weight"])
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
