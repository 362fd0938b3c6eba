"""A new objective is one file and one line of the table: configs, the command line and runs have it by that."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.family import Family, Towers
from helpers.losses import loss_of
from helpers.processes import Trained
from objectives.snippets.one_step import OneStep

from trainer.__main__ import main
from trainer.config import build
from trainer.data.batches import Labels, Pairs
from trainer.data.samples import Samples
from trainer.objectives import OBJECTIVES
from trainer.objectives.base import RunContext, Stateless
from trainer.rng import Rng
from trainer.training.config import TrainConfig
from trainer.training.loop import train
from trainer.training.parts import Parts
from trainer.training.run import Run


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "one-step", OneStep)


def test_it_is_short():
    source = (Path(__file__).parent / "snippets" / "one_step.py").read_text("utf-8")
    assert len(source.splitlines()) <= 30


def test_the_command_line_lists_it_and_configs_build_it(listed, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "objective one-step (--objective.name=one-step)" in text and "[20]" in text.split("objective one-step")[1]
    assert TrainConfig(out="x", objective={"name": "one-step", "steps": 7}).method == OneStep(steps=7)
    assert TrainConfig(out="x", objective={"name": "one-step", "guidance": 2.0}).method == OneStep(guidance_scale=2.0)


def test_a_run_trains_with_it(listed, tmp_path):
    config = build(
        TrainConfig, {"out": str(tmp_path), "objective": {"name": "one-step"}, "batch_size": 2, "steps": 30, "learning_rate": 0.02}
    )
    run = Run(config, Parts(Trained(), Samples(("a", "bb", "ccc")), Towers()))
    run.open_folder(overwrite=False, resume=False)
    rewards = [step.logs["reward"] for step in run.steps()]
    assert len(rewards) == 30 and sum(rewards[-6:]) > sum(rewards[:6]) + 0.1, rewards
    assert json.loads((tmp_path / "config.json").read_text())["objective"]["name"] == "one-step"


def test_its_gradient_is_autograds():
    policy, batch = Family(), Pairs(("a", "bb"), Rng(0, 0, (0, 1)), 0, torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1))
    loss, _ = loss_of(OneStep(), policy, batch, Towers())
    x, sigma = policy.start(batch.rng.normal("start", (3, 1, 1)), 20), policy.sigmas(20)[:1].expand(2)
    expected = -Towers()(policy.denoiser(batch.prompts)(x, sigma), batch.prompts).mean()
    found, by_hand = (torch.autograd.grad(value, policy.weight)[0] for value in (loss, expected))
    torch.testing.assert_close(found, by_hand)
    assert float(found.norm()) > 1e-3


# -- other kinds of data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionDPO(Stateless):
    """Diffusion-DPO (Wallace et al. 2024, arXiv:2311.12908, eq. 14) on noised pairs; no reward."""

    steps: int = 10
    guidance_scale: float = 1.0
    beta: float = 20.0

    @property
    def data(self):
        return Pairs

    def recommended_sigma(self, sigmas):
        return float(sigmas[0])

    def loss(self, run, batch):
        if not isinstance(batch, Pairs):
            raise ValueError("preferences are trained on pairs")
        policy, sigmas = run.policy, run.policy.sigmas(self.steps)
        sigma = sigmas[batch.rng.integers("level", 0, self.steps - 1)]
        noise = batch.rng.normal("noise", batch.shape(policy)).to(batch.chosen)

        def gain(latents):
            """How much lower the tuned model's denoising error is than the base's, (B,)."""
            x = policy.add_noise(latents, noise, sigma)
            tuned = policy.denoiser(batch.prompts)(x, sigma)
            with torch.no_grad():
                base = policy.denoiser(batch.prompts, adapter="base")(x, sigma)
            return ((base - latents).square() - (tuned - latents).square()).flatten(1).mean(1)

        margin = self.beta * (gain(batch.chosen) - gain(batch.rejected))
        return -torch.nn.functional.logsigmoid(margin).mean(), {"margin": margin.detach()}


def pairs(step, micro, n=8):
    rng = torch.Generator().manual_seed(step)
    chosen = 1 + 0.1 * torch.randn(n, 3, 1, 1, generator=rng, dtype=torch.float64)
    return Pairs(("p",) * n, Rng(0, step, tuple(range(n * step, n * step + n))), step, chosen, chosen - 1.0)


def test_a_preference_loss_trains_on_pairs_without_a_reward():
    """At the start the policy is the base: the loss is log 2. Then it denoises better towards the better images."""
    policy = Family()
    with torch.no_grad():
        policy.weight.zero_()
    loss = DiffusionDPO().begin(RunContext(policy))
    torch.testing.assert_close(float(loss(pairs(0, 0))[0].detach()), 0.6931471805599453)
    steps = list(train(loss, pairs, [policy.weight], torch.optim.SGD([policy.weight], lr=0.05), steps=40))
    margins = [step.logs["margin"] for step in steps]
    assert margins[0] == 0 and sum(margins[-5:]) / 5 > 0.5, margins
    assert float(policy.weight.detach()[1]) > 0.05  # the shift of D, towards the better images
    with pytest.raises(ValueError, match="pairs"):
        loss(Labels(("p",), Rng(0, 0, (0,)), 0, torch.zeros(1, 3, 1, 1), torch.ones(1)))


def test_swapped_pairs_have_the_opposite_margin():
    policy = Family()
    batch = pairs(3, 0)
    margins = [
        DiffusionDPO().begin(RunContext(policy))(b)[1]["margin"]
        for b in (batch, replace(batch, chosen=batch.rejected, rejected=batch.chosen))
    ]
    torch.testing.assert_close(margins[0], -margins[1])
    assert float(margins[0].abs().min()) > 1e-3


def test_labels_are_images_with_a_number_each():
    batch = Labels(("a", "b"), Rng(0, 0, (0, 1)), 0, torch.zeros(2, 4, 8, 6), torch.tensor([1.0, -1.0]))
    assert batch.shape(Family()) == (4, 8, 6) and pairs(0, 0).shape(Family()) == (3, 1, 1)
