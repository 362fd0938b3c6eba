"""Taking a run's steps: Ctrl-C saves after the step, the pace is printed, and trackers are closed however it ends."""

from __future__ import annotations

import re
import signal

import pytest
import torch
from helpers.processes import log_of, toy_run
from helpers.runs import same_lora

from trainer.config import ConfigError
from trainer.training import checkpoint
from trainer.training.console import follow, steps_until
from trainer.training.loop import NonFinite


def test_a_stop_saves_after_the_step_and_the_run_resumes_there(tmp_path):
    run = toy_run("refl", tmp_path, steps=6, save_every=100)
    run.open_folder(overwrite=False, resume=False)
    assert [done.number for done in steps_until(run, lambda: run.step == 2)] == [1, 2]
    assert not run.last and checkpoint.load(run.checkpoint_path)["step"] == 2 and not run.result.exists()
    again = toy_run("refl", tmp_path, steps=6)
    again.open_folder(overwrite=False, resume=True)
    assert [done.number for done in steps_until(again, lambda: False)] == [3, 4, 5, 6] and again.last
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6] and again.result.is_file()


def test_a_stop_in_the_last_step_finishes_the_run(tmp_path):
    run = toy_run("refl", tmp_path, steps=2)
    run.open_folder(overwrite=False, resume=False)
    assert len(list(steps_until(run, lambda: run.step == 2))) == 2 and run.last and run.result.is_file()


@pytest.mark.parametrize("end", [{"steps": 4}, {"steps": 1000, "budget": 150}])
def test_a_run_killed_after_its_last_checkpoint_resumes_to_its_result(end, tmp_path):
    run = toy_run("refl", tmp_path, **end)
    run.open_folder(overwrite=False, resume=False)
    list(follow(run))
    run.result.rename(tmp_path / "whole.safetensors")
    again = toy_run("refl", tmp_path, **end)
    again.open_folder(overwrite=False, resume=True)
    assert list(follow(again)) == [] and again.last and again.step == run.step > 1
    same_lora(again.result, tmp_path / "whole.safetensors")
    assert len(log_of(tmp_path)) == run.step
    with pytest.raises(ConfigError, match=rf"steps = 1: .* is at step {run.step}; give at least as many"):
        toy_run("refl", tmp_path, steps=1).open_folder(overwrite=False, resume=True)


@pytest.mark.parametrize("state", [torch.zeros(2), {"model": torch.zeros(2)}])
def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="is not a checkpoint of a training run; start again with --overwrite"):
        toy_run("refl", tmp_path).open_folder(overwrite=False, resume=True)


def test_the_pace_is_printed_once_after_the_third_step(tmp_path, capsys):
    run = toy_run("refl", tmp_path, steps=5)
    run.open_folder(overwrite=False, resume=False)
    assert len(list(follow(run))) == 5
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "per step" in line]
    assert re.fullmatch(r"[\d.e-]+ s per step; 2 steps left take about \d\d:\d\d", line), line


def test_a_budget_counts_the_steps_that_are_left(tmp_path, capsys):
    free = toy_run("refl", tmp_path / "free", steps=3)
    free.open_folder(overwrite=False, resume=False)
    list(free.steps())
    each = free.counted.calls / 3
    run = toy_run("refl", tmp_path / "budget", steps=1000, budget=round(5 * each))
    run.open_folder(overwrite=False, resume=False)
    taken = len(list(follow(run)))
    left = int(re.search(r"(\d+) steps left", capsys.readouterr().out)[1])
    assert 4 <= taken <= 7 and abs(3 + left - taken) <= 2, (taken, left)


def test_the_first_ctrl_c_ends_the_run_after_its_step(tmp_path):
    run = toy_run("refl", tmp_path, steps=6)
    run.open_folder(overwrite=False, resume=False)
    numbers = []
    for done in follow(run):
        numbers.append(done.number)
        signal.raise_signal(signal.SIGINT)
    assert numbers == [1] and not run.last and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("end", ["consumer", "nan"])
def test_the_tracker_is_closed_however_the_run_ends(end, tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, name, folder):
            calls.append(name)

        def log(self, values, step):
            calls.append(step)

        def close(self):
            calls.append("closed")

    monkeypatch.setattr("trainer.training.run.Tracker", Recorder)
    monkeypatch.setattr("trainer.training.parts.check_tracker", lambda name: None)
    run = toy_run("refl", tmp_path, tracker="tensorboard")
    run.open_folder(overwrite=False, resume=False)
    if end == "nan":
        run.reward.act = lambda n: float("nan") if n > 2 else None  # two micro-batches a step
        with pytest.raises(NonFinite):
            list(run.steps())
    else:
        steps = run.steps()
        next(steps)
        steps.close()
    assert calls == ["tensorboard", 1, "closed"]
