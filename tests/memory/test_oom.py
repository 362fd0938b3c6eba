"""What a run says when memory runs out: the stage, what is saved, and a setting with which it goes on."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from helpers.runs import settings
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.config import override
from trainer.data.samples import load_samples
from trainer.memory import oom
from trainer.models import load
from trainer.models.open import open_policy
from trainer.models.unet import UNetPolicy
from trainer.rewards.two_tower import TwoTower
from trainer.training.evaluation import Evaluation

IN_MODULES = {  # a function of each module and package in the table
    load: load.load_policy,
    oom.rewards: TwoTower.forward,
    torch.optim: torch.optim.AdamW.step,
    oom.evaluation: Evaluation.run,
    oom.data: load_samples,
}


class Bomb:
    """Fails wherever it is used."""

    def __getattr__(self, name):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("where", "stage"), oom.STAGES, ids=[stage for _, stage in oom.STAGES])
def test_every_stage_is_recognised(where, stage):
    function = inspect.unwrap(IN_MODULES.get(where, where) if inspect.ismodule(where) else where)
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    with pytest.raises(Exception) as raised:
        result = function(*[Bomb() for _ in required])
        result(Bomb(), Bomb())  # where the function returns one
    assert oom.failing_stage(raised.value) == stage


def test_a_recomputed_forward_is_part_of_the_backward_pass():
    tower = TwoTower.__new__(TwoTower)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            TwoTower.forward(tower, Bomb(), Bomb())

    with pytest.raises(Exception) as raised:
        Forward.apply(torch.ones(1, requires_grad=True)).backward()
    assert oom.failing_stage(raised.value) == "the backward pass of the reward"


def test_an_error_elsewhere_has_no_stage():
    with pytest.raises(ZeroDivisionError) as raised:
        1 / 0  # noqa: B018
    assert oom.failing_stage(raised.value) == ""


@pytest.mark.parametrize(("name", "stage"), [("encode_prompts", "the text encoders"), ("to", "moving the model to the device")])
def test_the_stage_of_an_error_deep_inside(name, stage, monkeypatch):
    policy = open_policy("demo")

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNetPolicy if name == "encode_prompts" else torch.nn.Module, name, full)
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        policy.prompts.prepare(["a"]) if name == "encode_prompts" else policy.to("cpu:0")
    assert oom.failing_stage(raised.value) == stage


REWARD = """
import pathlib, torch
calls = 0
def reward(images, prompts):
    global calls
    calls += 1
    if calls > 3 and pathlib.Path(__file__).with_name("full").exists():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return images.mean((1, 2, 3))
"""


def test_out_of_memory_names_the_stage_and_a_setting_that_a_resumed_run_takes(pipeline_folder, image_folder, tmp_path, capsys):
    (tmp_path / "own.py").write_text(REWARD)
    paths = (pipeline_folder, tmp_path / "own.py", image_folder)
    more = {"standardise": False, "gradient_accumulation_steps": 1, "steps": 4}
    assert main(["train", *settings(*paths, tmp_path / "whole", **more)]) == 0
    (tmp_path / "full").write_text("")
    cut = ["train", *settings(*paths, tmp_path / "cut", **more)]
    assert main(cut) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: out of memory in the reward; the last checkpoint is intact: ")
    assert "checkpoint.pt, step 2; try --" in said
    flags = re.findall(r"--[\w.]+=\w+", said)
    assert flags and said.endswith("then --resume")
    (tmp_path / "full").unlink()
    assert main([*cut, *flags, "--resume"]) == 0
    whole, resumed = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[k], resumed[k], rtol=1e-4, atol=1e-6) for k in whole)
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    changed = override({}, flags)
    assert {key: written[key] for key in changed} == changed
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["memory_gb"] > 0 for line in lines)
