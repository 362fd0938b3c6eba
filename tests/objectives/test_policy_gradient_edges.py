"""Policy gradients at the edges: pure noise, scores without an advantage, presets of few-step models, and what a finished run leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.family import Family, Towers, gradient
from helpers.rounds import PROMPTS, SMALL, batch, begun

from trainer.objectives import AWM, DDPO, DiffusionNFT, FlowGRPO, RunContext
from trainer.objectives.policy_gradient.advantages import History, group_advantages
from trainer.objectives.policy_gradient.kernels import flow_sde


def test_the_flow_sde_adds_no_more_noise_than_the_next_level_where_the_first_is_that_of_zero_terminal_snr():
    sigma, following = torch.tensor([4518.8, 14.6], dtype=torch.float64), torch.tensor([20.0, 9.0], dtype=torch.float64)
    std, along = flow_sde(0.7)(sigma, following, "ve")
    assert std[0] == pytest.approx(0.7 * (1 + 20.0), rel=5e-3) and float(along.min()) >= 0 and bool((std <= following).all())  # was 216
    s, t = 14.6 / 15.6, 0.9  # below pure noise as published
    assert float(std[1]) == pytest.approx(10 * 0.7 * (s / (1 - s) * (s - t)) ** 0.5, rel=1e-12)
    near, exact = (flow_sde(0.7)(torch.tensor([first]), torch.tensor([0.9]), "flow")[0] for first in (0.99999994, 1.0))
    assert float(near) == pytest.approx(float(exact), rel=1e-5) == pytest.approx(0.7, rel=1e-5)


class OfPrompts(Towers):
    """A reward that reads the prompt alone, but for rounding."""

    def __call__(self, images, prompts):
        return torch.tensor([20.0 + len(p) for p in prompts]) + 2e-6 * images.flatten(1)[:, 0].sign().float()


def test_groups_of_equal_scores_are_refused_in_the_first_round_and_reported_later(tmp_path, caplog):
    with pytest.raises(ValueError, match="the images of each prompt have one reward, and no advantage over each other; choose"):
        begun(DDPO(**SMALL), Family(), tmp_path, OfPrompts())(batch())
    loss = begun(DDPO(**SMALL), Family(), tmp_path)
    assert float(loss(batch())[1]["no advantage"].max()) == 0
    loss.run = replace(loss.run, reward=OfPrompts())
    value, logs = loss(batch(8, step=4))
    assert float(gradient(loss.run.policy, value).abs().max()) == 0 == float(logs["advantage size"].max())
    assert float(logs["no advantage"].mean()) == 1 and "the images of each prompt have one reward" in caplog.text


def test_the_share_of_groups_without_an_advantage_is_logged(tmp_path):
    class Half(Towers):
        def __call__(self, images, prompts):
            return torch.where(torch.tensor([len(p) == 1 for p in prompts]), 0.5, super().__call__(images, prompts))

    loss = begun(DDPO(**SMALL), Family(), tmp_path, Half())
    shown = torch.cat([loss(batch(number))[1]["no advantage"] for number in range(8)])  # a round, 4 images of "a" or none
    names = loss.objective.prompts_of(PROMPTS, 3, 0)
    assert float(shown.mean()) == names.count("a") / 8 == 0.5


@pytest.mark.parametrize("baseline", ["round", "history"])
def test_scores_equal_but_for_rounding_have_no_advantage_by_any_baseline(baseline):
    near = 20.1 + torch.tensor([2e-6, -2e-6, 0.0, 2e-6], dtype=torch.float64)
    history = History()
    history.scores["a"] = [20.1 - 2e-6] * 15
    found = history.advantages(["a", "b", "c", "d"], near) if baseline == "history" else group_advantages(near.reshape(2, 2), baseline)
    assert float(found.abs().max()) == 0
    apart = near + torch.tensor([0.0, 1e-3, 0.0, 0.0])  # 50 times the tolerance
    found = History().advantages(["a", "b", "c", "d"], apart) if baseline == "history" else group_advantages(apart.reshape(2, 2), baseline)
    assert float(found.abs().max()) == pytest.approx(3**0.5, rel=1e-2)


def test_awm_and_nft_train_errors_without_guidance_and_takes_one_pass(tmp_path):
    policy, asked = Family("flow"), []
    inner = policy.denoiser
    policy.denoiser = lambda prompts, **given: asked.append(given["guidance_scale"]) or inner(prompts, **given)
    loss = begun(AWM(steps=6, group=4, prompts_per_round=2, levels=3, guidance_scale=4.0), policy, tmp_path)
    loss(batch())
    assert asked[:-2] == [4.0] * len(asked[:-2]) != [] and asked[-2:] == [1.0, 1.0]
    asked.clear()
    policy.denoiser = lambda prompts, **given: asked.append(given.get("guidance_scale")) or inner(prompts, **given)
    begun(DiffusionNFT(steps=6, group=4, prompts_per_round=2, guidance_scale=4.0), policy, tmp_path / "nft")(batch())
    assert set(asked[:-3]) == {4.0} and asked[-3:] == [1.0, 1.0, 1.0]  # of the model before, now, and the base
    with pytest.raises(ValueError, match="passes = 2: AWM has no probability ratio"):
        AWM(passes=2)


def test_awm_says_that_a_round_spans_optimizer_steps_and_what_to_give(caplog):
    for size, accumulate, warned in ((4, 3, True), (4, 6, False), (4, 12, False), (8, 2, True)):
        caplog.clear()
        context = RunContext(Family(), Towers(), batch_size=size, step_samples=size * accumulate)
        AWM(steps=6, group=4, prompts_per_round=2, levels=3).check(context)
        wanted = f"takes {size * accumulate} of a round's 24 samples, and AWM has no probability ratio to images of an earlier model"
        assert (f"{wanted}: give gradient_accumulation_steps = {24 // size}" in caplog.text) == warned == bool(caplog.text), (
            size,
            accumulate,
        )


@pytest.mark.parametrize("steps", [2, 3])
def test_the_images_of_a_round_that_is_over_are_deleted_and_a_resumed_run_goes_on(steps, tmp_path):
    """32 samples a round, of which an optimizer step takes half."""
    objective, folder = DDPO(**SMALL), tmp_path / "rollouts"

    def run(loss, first, last):
        return [loss(batch(4 * step + micro, step=step))[0].item() for step in range(first, last) for micro in range(4)]

    loss = begun(objective, Family(), tmp_path, step_samples=16)
    run(loss, 0, steps)
    state, images = loss.state(), len(list(folder.iterdir()))
    killed = begun(objective, Family(), tmp_path, step_samples=16)
    killed.restore(state)  # before files are deleted
    loss.saved()
    assert images > 0 and folder.exists() == (steps == 3) and bool(state["files"]) == (steps == 3)
    again = begun(objective, Family(), tmp_path, step_samples=16)
    again.restore(state)
    whole = run(begun(objective, Family(), tmp_path / "whole", step_samples=16), 0, 6)
    assert run(again, steps, 6) == whole[4 * steps :] and again.state()["files"] == []


def test_a_step_with_more_noise_than_the_next_level_holds_is_warned_of(caplog):
    """Flow-GRPO's step as published, on the last levels of few steps."""
    for kind, steps, warned in (("flow-grpo", 4, True), ("cps", 4, False), ("flow-grpo", 400, False)):
        caplog.clear()
        FlowGRPO(group=2, prompts_per_round=1, steps=steps, noise_kind=kind).check(RunContext(Family(), Towers()))
        assert ("which stays in the images" in caplog.text) == warned, (kind, steps)
