"""CHATS against a write-up and the official lines, its identities, what it writes, and how it resumes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.family import STATES, WithLoser
from helpers.preference import PROMPTS, Captioned, images, pairs, written_up
from helpers.processes import log_of, toy_run, trained
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.config import ConfigError, build
from trainer.data.batches import Details
from trainer.demo.experiment import load_tuned
from trainer.generate import Generation, generate
from trainer.guidance import Slot, cfg
from trainer.lora.file import read_metadata
from trainer.memory.planner import Planner
from trainer.objectives import CHATS, OBJECTIVES, RunContext
from trainer.training.config import TrainConfig
from trainer.training.run import Run

SETTINGS = CHATS(beta=3.0)


class Two(WithLoser, Captioned):
    """The family's policy with a loser beside the tuned adapter."""


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


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reference_every: this objective has no reference that can follow"):
        CHATS(reference_every=5)
    with pytest.raises(ValueError, match="guidance scale 0: CHATS's loser takes no part"):
        CHATS().mix(Slot("tuned", 0.0), torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match="^tune = full: chats trains 2 models at once, give tune = lora$"):
        toy_run("chats", tmp_path, tune="full")
    with pytest.raises(ValueError, match="preferences are learnt from pairs of images: give `pairs`"):
        SETTINGS.loss(RunContext(Two()), images())


def test_a_resumed_run_ends_with_the_same_bits_of_both(tmp_path):
    whole = trained("chats", tmp_path / "whole", steps=6, ema=0.9)
    trained("chats", tmp_path / "cut", steps=4, ema=0.9)
    resumed = trained("chats", tmp_path / "cut", steps=6, ema=0.9, resume=True)
    assert torch.equal(resumed["weight"], whole["weight"]) and log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    moved = (whole["weight"] - torch.cat([p.detach() for p in Two().parameters()])).abs()
    assert float(moved[:4].max()) > 1e-5 and float(moved[4:].max()) > 1e-5
    for stem in ("lora", "lora-loser"):
        one, other = (load_file(tmp_path / run / f"{stem}.safetensors") for run in ("cut", "whole"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.full
def test_a_run_writes_two_loras_that_draw_as_its_watch_did(tmp_path, capsys):
    """Result, best and snapshot, each beside its loser; loaded from files they give the images of the run's own adapters."""
    arguments = ["--objective.name=chats", "--pairs=demo", "--steps=2", "--batch_size=2", "--learning_rate=0.02", "--snapshot_every=1"]
    watch = ["--watch.every=2", "--watch.heldout=demo-heldout", "--watch.count=1", "--watch.images=2", "--ema=0.5", "--objective.steps=3"]
    out, run = tmp_path / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", lambda self, finish=Run.finish: (finish(self), run.update(run=self)))
        assert main(["train", f"--out={out}", *arguments, *watch]) == 0
    names = ["best", "lora", "lora-000001", "lora-000002"]
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted(f"{n}{x}.safetensors" for n in names for x in ("", "-loser"))
    assert "lora.safetensors and " in capsys.readouterr().out
    told = read_metadata(out / "lora-loser.safetensors")
    assert told["adapter"] == "tuned-loser" and told["guide"] == "chats" and told["settings"]["objective"]["name"] == "chats"
    run = run["run"]
    files = {"tuned": out / "lora.safetensors", "tuned-loser": out / "lora-loser.safetensors"}
    policy = load_tuned({"winner": files["tuned"], "winner-loser": files["tuned-loser"]})
    average = {name: value.detach().clone() for name, value in run.ema.values.items()}
    for name, parameter in run.policy.named_parameters():
        assert not torch.equal(parameter, average[name]) or not parameter.any(), name  # the files have the average
        parameter.data.copy_(average[name])
    evaluation = run.evaluation
    again = generate(policy, evaluation.prompts, evaluation.generation, {"": CHATS().mix(Slot("winner", 5.0), evaluation.levels)})
    assert torch.equal(evaluation.images, again[""])
    settings = Generation(steps=3, seed=1)
    mixes = [CHATS().mix(Slot(name, 1.0), policy.sigmas(3)) for name in ("winner", "tuned")]
    mine, its = (generate(p, ["a red star"] * 2, settings, {"": mix})[""] for p, mix in zip((policy, run.policy), mixes))
    assert torch.equal(mine, its)
    alone = generate(policy, ["a red star"] * 2, settings, {"": cfg(Slot("winner"))})[""]
    other = generate(policy, ["a red star"] * 2, settings, {"": cfg(Slot("winner-loser"))})[""]
    assert min(float((a - b).abs().max()) for a, b in ((mine, alone), (alone, other))) > 1e-3
    assert (
        main(["train", f"--out={out}", "--overwrite", "--steps=1", "--batch_size=2", "--objective.name=diffusion-dpo", "--pairs=demo"]) == 0
    )
    assert [path.name for path in out.glob("*.safetensors")] == ["lora.safetensors"]  # nothing of the earlier run is left


def test_the_plan_counts_the_second_adapter():
    one, two = (Planner()(planned_config(name)) for name in ("diffusion-dpo", "chats"))
    assert two.components["adapter"] == 2 * one.components["adapter"] > 0
    assert two.components["optimizer state"] == 2 * one.components["optimizer state"]


def planned_config(name):
    return build(TrainConfig, {"out": "run", "objective": {"name": name}, "pairs": "demo", "batch_size": 2, "steps": 3})


def test_a_negative_model_draws_by_its_guide():
    """c + s·(c − n̂) with the adapter as the negative model, and the winner with the proxy prompt's loser, by hand on constants."""
    sigmas = torch.tensor([1.0, 0.0])
    for name, scale, expected in (
        ("diffusion-npo", 3.0, [("base", 1.0, 3.0), ("tuned", 0.0, -2.0)]),
        ("self-npo", 3.0, [("base", 1.0, 3.0), ("tuned", 0.0, -2.0)]),
        ("chats", 5.0, [("tuned", 1.0, 6.0), ("tuned-loser", -0.5, -5.0)]),
        ("diffusion-dpo", 3.0, [("tuned", 1.0, 1.0)]),
    ):
        parts = OBJECTIVES[name]().mix(Slot("tuned", scale), sigmas).at(0, 1.0)
        assert [(slot.adapter, slot.prompt_weight, value) for slot, value in parts] == expected, name
        assert [slot.guidance_scale for slot, _ in parts] == [scale if name == "diffusion-dpo" else 1.0] * len(parts)
    with pytest.raises(ValueError, match="guidance scale 1: a negative model takes part in guidance alone"):
        OBJECTIVES["self-npo"]().mix(Slot("tuned", 1.0), sigmas)
