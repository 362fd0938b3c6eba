"""CHATS against a write-up and the official lines, its identities, what it writes, and how it resumes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.family import STATES, as4
from helpers.preference import PROMPTS, Captioned, pairs, written_up
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.data.batches import Details
from trainer.generate import Generation, slot_denoiser
from trainer.guidance import Slot, weighted_sum
from trainer.lora.file import read_metadata
from trainer.models.unet import UNetPolicy
from trainer.objectives import CHATS, OBJECTIVES, RunContext
from trainer.policy import Lora, with_companions

SETTINGS = CHATS(beta=3.0)


class Two(Captioned):
    """The family's policy with a loser beside the tuned adapter."""

    adapters = frozenset({"tuned", "tuned-loser", *STATES})

    def __init__(self, prediction="epsilon"):
        super().__init__(prediction)
        self.loser = torch.nn.Parameter(torch.tensor([-0.1, 0.3, 0.2, -0.2], dtype=torch.float64))

    def denoiser(self, prompts, *, adapter="tuned", **settings):
        if adapter != "tuned-loser":
            return super().denoiser(prompts, adapter=adapter, **settings)
        inner = super().denoiser(prompts, adapter="base", **settings)
        inner.function = lambda x, sigma: self.denoise(x, sigma, self.loser) + as4(torch.tensor([0.2 * len(p) for p in prompts]), x)
        return inner

    def parameters(self):
        return [self.weight, self.loser]


def loss_and_gradients(objective, batch, policy):
    loss, logs = objective.begin(RunContext(policy, prompts=PROMPTS))(batch)
    return loss.detach(), torch.autograd.grad(loss, policy.parameters()), logs


def losers_prompts(batch, share):
    dropped = (batch.rng.uniform("loser's prompt dropout") < share).tolist()
    return ["" if gone else prompt for gone, prompt in zip(dropped, batch.prompts)]


def errors_of(policy, batch, share=0.5):
    """L of winner and loser on their own images, and of the base on both, by the write-up of the network's own prediction."""
    sides = (batch.chosen, batch.prompts, policy.weight), (batch.rejected, losers_prompts(batch, share), policy.loser)
    tuned = [written_up(policy, batch, latents, prompts, weight)[0] for latents, prompts, weight in sides]
    base = [written_up(policy, batch, latents, prompts, STATES["base"])[0] for latents, prompts, _ in sides]
    return tuned, base


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_loss_and_both_gradients_are_those_of_the_write_up(prediction):
    batch, policy = pairs(), Two(prediction)
    assert 0 < losers_prompts(batch, 0.5).count("") < 4  # both kinds of prompt
    objective = replace(SETTINGS, target="velocity" if prediction == "v" else "model")
    loss, found, logs = loss_and_gradients(objective, batch, policy)
    (w, l), (b_w, b_l) = errors_of(policy, batch)  # noqa: E741
    expected = torch.log(1 + torch.exp(3.0 * ((w - b_w) + (l - b_l)))).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    for mine, theirs in zip(found, torch.autograd.grad(expected, policy.parameters())):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
        assert float(mine.norm()) > 1e-3
    torch.testing.assert_close(logs["loser_gain"], (b_l - l).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [20.0, 1000.0])
def test_it_is_the_official_code(beta):
    """train.py of AIDC-AI/CHATS at edbded1, the lines from the predictions to the loss, on the same ε-predictions in float64."""
    batch, policy = pairs(), Two()
    loss, found, _ = loss_and_gradients(replace(SETTINGS, beta=beta, loser_dropout=0.0), batch, policy)
    noise = batch.rng.normal("diffusion noise", (3, 1, 1)).double()
    predicted = []
    for latents, weight in ((batch.chosen, policy.weight), (batch.rejected, policy.loser)):
        predicted.append([written_up(policy, batch, latents, batch.prompts, one)[1] + noise for one in (weight, STATES["base"])])
    model_pred_win, model_pred_lose = predicted[0][0], predicted[1][0]
    target = torch.cat([noise, noise])
    ref_pred = torch.cat([predicted[0][1], predicted[1][1]]).detach()
    model_losses_w = (model_pred_win - target.chunk(2)[0]).pow(2).mean(dim=[1, 2, 3])
    model_losses_l = (model_pred_lose - target.chunk(2)[1]).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = (ref_pred - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside_term = -1.0 * beta * ((model_losses_w - ref_losses_w) + (model_losses_l - ref_losses_l))
    official = -1 * torch.nn.functional.logsigmoid(inside_term).mean()
    torch.testing.assert_close(loss, official.detach(), rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(official, policy.parameters())):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def test_without_beta_or_with_both_adapters_at_the_base_the_loss_is_log_2():
    batch, policy = pairs(), Two()
    loss, found, _ = loss_and_gradients(replace(SETTINGS, beta=0.0), batch, policy)
    assert float(loss) == math.log(2) and not any(gradient.any() for gradient in found)
    with torch.no_grad():
        policy.weight.zero_(), policy.loser.zero_()
    loss, found, _ = loss_and_gradients(SETTINGS, batch, policy)
    assert float(loss) == math.log(2)  # exactly: the base is asked about the same batch
    (w, l), _ = errors_of(policy, batch)  # noqa: E741
    for mine, theirs in zip(found, torch.autograd.grad(1.5 * (w + l).mean(), policy.parameters())):  # β·σ(0): each learns its own image
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def test_masks_weigh_the_image_that_they_are_of():
    batch, policy = pairs(), Two()
    ones, twice = torch.ones(4, 1, 1, 1), 2 * torch.ones(4, 1, 1, 1)
    plain = loss_and_gradients(replace(SETTINGS, beta=0.01), batch, policy)[2]
    masked = loss_and_gradients(replace(SETTINGS, beta=0.01), replace(batch, details=Details(masks=(ones, twice))), policy)[2]
    assert torch.equal(masked["winner_gain"], plain["winner_gain"])
    torch.testing.assert_close(masked["loser_gain"], 2 * plain["loser_gain"])


def test_other_references_data_and_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reference_every: winner and loser have one reference"):
        CHATS(reference_every=5)
    with pytest.raises(ValueError, match="guidance scale 0: CHATS's loser takes no part"):
        CHATS().draws(Slot("tuned", 0.0), torch.tensor([1.0, 0.0]))
    arguments = [f"--out={tmp_path / 'x'}", "--objective.name=chats", "--pairs=demo", "--steps=1", "--batch_size=2"]
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.exit", lambda code=0: (_ for _ in ()).throw(SystemExit(code)))
        raise SystemExit(main(["train", *arguments, "--tune=full"]))
    assert stopped.value.code


def test_a_negative_model_draws_by_its_guide():
    """c + s·(c − n̂) with the adapter as the negative model, and the winner with the proxy prompt's loser, by hand on constants."""
    sigmas = torch.tensor([1.0, 0.0])
    for name, scale, expected in (
        ("diffusion-npo", 3.0, [("base", 1.0, 3.0), ("tuned", 0.0, -2.0)]),
        ("self-npo", 3.0, [("base", 1.0, 3.0), ("tuned", 0.0, -2.0)]),
        ("chats", 5.0, [("tuned", 1.0, 6.0), ("tuned-loser", -0.5, -5.0)]),
        ("diffusion-dpo", 3.0, [("tuned", 1.0, 1.0)]),
    ):
        parts = OBJECTIVES[name]().draws(Slot("tuned", scale), sigmas).at(0, 1.0)
        assert [(slot.adapter, slot.prompt_weight, value) for slot, value in parts] == expected, name
        assert [slot.guidance_scale for slot, _ in parts] == [scale if name == "diffusion-dpo" else 1.0] * len(parts)
    with pytest.raises(ValueError, match="guidance scale 1: a negative model takes part in guidance alone"):
        OBJECTIVES["self-npo"]().draws(Slot("tuned", 1.0), sigmas)
