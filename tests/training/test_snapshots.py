"""Snapshots of the LoRA during training: what saving at that step gives, also after a kill, and only where the disk has room."""

from __future__ import annotations

import signal

import pytest
import torch
from helpers.runs import command, finish, same_lora, settings, wait_for_steps
from safetensors.torch import load_file

from trainer.config import ConfigError
from trainer.data.samples import Samples
from trainer.lora.file import read_lora, save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora
from trainer.training import checkpoint, folder
from trainer.training.config import TrainConfig
from trainer.training.parts import Parts
from trainer.training.run import Run


class Bright:
    differentiable = True

    def __call__(self, images, prompts):
        return 10 * images.flatten(1).mean(1)


def a_run(pipeline_folder, out, *, resume=False, **more):
    objective = {"name": "refl", "steps": 4, "grad_from": 2, "grad_to": 3}
    given = {"steps": 5, "snapshot_every": 2, "save_every": 3, "batch_size": 1, "learning_rate": 0.02, "ema": 0.5, **more}
    config = TrainConfig(out=str(out), objective=objective, lora=Lora(4, 4.0), **given)
    return Run.start(config, Parts(UNetPolicy.load(pipeline_folder), Samples(("a star",)), Bright()), resume=resume, overwrite=True)


def snapshots(out):
    return sorted(path.name for path in out.glob("lora-*"))


def test_a_snapshot_is_what_saving_at_that_step_gives(pipeline_folder, tmp_path):
    run = a_run(pipeline_folder, tmp_path / "run")
    for step in run.steps():
        if step.number % 2 == 0:
            save_lora(run.policy, tmp_path / f"saved-{step.number}.safetensors", run.metadata(), run.ema.values)
    assert snapshots(tmp_path / "run") == ["lora-000002.safetensors", "lora-000004.safetensors"]
    for number in (2, 4):
        path = tmp_path / "run" / f"lora-{number:06d}.safetensors"
        same_lora(path, tmp_path / f"saved-{number}.safetensors")
        assert read_lora(path)[1]["step"] == number
        ended = a_run(pipeline_folder, tmp_path / f"of-{number}", steps=number, snapshot_every=0)
        list(ended.steps())
        assert snapshots(ended.folder) == []
        saved, kept = load_file(ended.result), load_file(path)
        assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in saved)


def test_a_new_run_removes_the_snapshots_of_the_old_one(pipeline_folder, tmp_path):
    list(a_run(pipeline_folder, tmp_path).steps())
    (tmp_path / "lora-mine.safetensors").write_bytes(b"mine")
    run = a_run(pipeline_folder, tmp_path, steps=3)
    assert snapshots(tmp_path) == ["lora-mine.safetensors"]
    list(run.steps())
    assert snapshots(tmp_path) == ["lora-000002.safetensors", "lora-mine.safetensors"]


def test_full_fine_tuning_keeps_differences(pipeline_folder, tmp_path):
    run = a_run(pipeline_folder, tmp_path, tune="full", steps=2)
    list(run.steps())
    same_lora(tmp_path / "delta-000002.safetensors", run.result)


def test_snapshots_that_the_disk_cannot_take_are_refused_before_training(pipeline_folder, tmp_path, monkeypatch):
    size = sum(p.numel() for p in a_run(pipeline_folder, tmp_path / "size").policy.parameters()) * 4
    monkeypatch.setattr(folder, "free_bytes", lambda path: 2 * size - 1)
    with pytest.raises(ConfigError, match=r"snapshot_every = 2: 2 snapshots of .* take .* GB, but .* disk with .* GB free"):
        a_run(pipeline_folder, tmp_path / "full")
    a_run(pipeline_folder, tmp_path / "fewer", snapshot_every=4)
    a_run(pipeline_folder, tmp_path / "budget", steps=100_000, budget=2)  # a step takes one call at least


@pytest.mark.full
def test_a_killed_run_resumes_to_the_same_snapshots(pipeline_folder, reward_folder, image_folder, tmp_path):
    paths = (pipeline_folder, reward_folder, image_folder)
    more = {"snapshot_every": 1, "save_every": 4, "steps": 12}
    assert finish(["train", *settings(*paths, tmp_path / "whole", **more)])[0] == 0
    process = command(["train", *settings(*paths, tmp_path / "cut", **more)])
    wait_for_steps(tmp_path / "cut" / "log.jsonl", 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    step = checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert step in (4, 8)
    (tmp_path / "cut" / f"lora-{step + 1:06d}.safetensors").write_bytes(b"of a step that the checkpoint does not have")
    code, _, err = finish(["train", *settings(*paths, tmp_path / "cut", **more), "--resume"])
    assert code == 0, err
    assert len(snapshots(tmp_path / "whole")) == 12 and snapshots(tmp_path / "cut") == snapshots(tmp_path / "whole")
    for name in snapshots(tmp_path / "whole"):
        same_lora(tmp_path / "whole" / name, tmp_path / "cut" / name)
