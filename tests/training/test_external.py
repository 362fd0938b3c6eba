"""A reward outside this process that is gone at any of its calls: the run stops with its state saved, and resumes to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.processes import Asked, log_of, toy_run, trained

from trainer.config import ConfigError
from trainer.reward import RewardUnavailable
from trainer.training import run as running
from trainer.training.config import Watch
from trainer.training.evaluation import is_owed


class Distant(Asked):
    """A reward that is gone at its call `last`, until it is started again."""

    external = True
    differentiable = False

    def __init__(self, last=0):
        super().__init__(self._act)
        self.last = last

    def _act(self, call):
        if call == self.last:
            raise RewardUnavailable("the judge is gone")


def calls_of(case, folder):
    """How often a whole run asks the reward, and its weights."""
    run = toy_run(case, folder, reward=Distant(), save_every=100)
    run.open_folder(overwrite=False, resume=False)
    for _ in run.steps():
        pass
    return run.reward.calls, run.policy.weight.detach()


@pytest.mark.parametrize(
    "case", ["ddpo", *(pytest.param(name, marks=pytest.mark.full) for name in ("awm", "diffusion-nft", "sqdf-black-box"))]
)
def test_a_run_that_loses_its_reward_resumes_to_the_same_bits(case, tmp_path):
    calls, weight = calls_of(case, tmp_path / "whole")
    assert calls >= 3
    for last in sorted({2, calls // 2, calls}):
        out = tmp_path / str(last)
        run = toy_run(case, out, reward=Distant(last), save_every=100)
        run.open_folder(overwrite=False, resume=False)
        with pytest.raises(RewardUnavailable, match=r"the judge is gone; saved .*checkpoint.pt after step \d+: --resume goes on"):
            for _ in run.steps():
                pass
        assert torch.equal(trained(case, out, resume=True, reward=Distant(), save_every=100)["weight"], weight), last
        assert log_of(out) == log_of(tmp_path / "whole"), last


def test_objectives_on_the_rewards_gradient_refuse_it(tmp_path):
    with pytest.raises(ConfigError, match=r"has no gradient: use an objective that needs none \(sqdf-black-box, .*ddpo"):
        toy_run("refl", tmp_path, reward=Distant())


def test_an_evaluation_that_was_not_taken_is_taken_after_resuming():
    points = [{"step": 0.0}, {"step": 2.0}]
    assert is_owed([], 0, 2, False) and is_owed([], 3, 2, False)
    assert is_owed(points, 4, 2, False) and is_owed(points, 5, 2, True)
    assert not is_owed(points, 2, 2, False) and not is_owed(points, 3, 2, False) and not is_owed(points, 2, 2, True)


def test_a_held_out_reward_that_is_gone_while_it_judges_stops_the_run_and_its_evaluation_is_made_up(tmp_path, monkeypatch):
    def watched(out, gone):
        run = toy_run("ddpo", out, save_every=100, steps=4)
        run.config = replace(run.config, watch=Watch(every=2))

        class Evaluation:
            points = []

            def run(self, step):
                if step == gone:
                    raise RewardUnavailable("the judge is gone")
                point = {"step": float(step), "reward": 0.0, "heldout": float(run.policy.weight.detach().sum()), "diversity": 1.0}
                self.points = [*(p for p in self.points if p["step"] < step), point]
                return point

        run.evaluation = Evaluation()
        return run

    monkeypatch.setattr(running.Run, "_write_result", lambda *_: None)
    found = {}
    for gone in (-1, 0, 2, 4):
        out = tmp_path / str(gone)
        run = watched(out, gone)
        run.open_folder(overwrite=False, resume=False)
        if gone >= 0:
            with pytest.raises(RewardUnavailable, match=f"saved .* after step {gone}"):
                list(run.steps())
            run = watched(out, -1)
            run.open_folder(overwrite=False, resume=True)
        list(run.steps())
        found[gone] = (json.loads((out / "watch.json").read_text()), run.policy.weight.tolist())
    assert found[0] == found[2] == found[4] == found[-1] and [p["step"] for p in found[-1][0]] == [0, 2, 4]
