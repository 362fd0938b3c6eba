"""CPU offloading of rewards. The meta device stands for the accelerator: tensors there have no values, so none leak through it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.runs import settings
from torch import nn

from tests.parity import run as parity
from trainer.__main__ import main
from trainer.commands import parts as commands
from trainer.config import build
from trainer.memory.offload import place_rewards, tensors
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.models.prompts import Prompts
from trainer.rewards.registry import load_reward
from trainer.rewards.weighted import RewardSpec, WeightedSum
from trainer.training.config import TrainConfig, Watch
from trainer.training.evaluation import Evaluation
from trainer.training.folder import claim

META = torch.device("meta")


@pytest.fixture(autouse=True)
def moves_back(monkeypatch):
    """PyTorch refuses to copy from meta to the CPU; here weights come back without values."""
    to = nn.Module.to

    def move(module, target=None, *more, **named):
        back = str(target) == "cpu" and any(t.is_meta for t in tensors(module))
        return module.to_empty(device="cpu") if back else to(module, *[t for t in (target, *more) if t is not None], **named)

    monkeypatch.setattr(nn.Module, "to", move)


def devices(module):
    return {t.device.type for t in tensors(module)}


def small(name, folder):
    return parity.open_case(name, folder, parity.CASES[name].small)[0]


@pytest.mark.parametrize("name", ["hpsv2.1", "mps"])
def test_an_unknown_prompt_brings_the_text_tower_and_known_ones_need_none(name, tmp_path, monkeypatch):
    reward = small(name, tmp_path)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = reward(images, ["a fox", "a boat"])
    known = dict(reward._encoded)
    reward.text.to(META)
    torch.testing.assert_close(reward(images, ["a fox", "a boat"]), before, rtol=0, atol=0)

    reward = small(name, tmp_path)
    reward._encoded.update(known)
    reward.visual.to(META)
    during = []
    monkeypatch.setattr(reward, "encode_prompt", lambda prompt: during.append((prompt, devices(reward.text))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reward.remember(["a fox", "a cat"])
    assert during == [("a cat", {"meta"})] and devices(reward.text) == {"cpu"}


def evaluation_of(judge, prompts):
    policy = SimpleNamespace(sigmas=lambda steps: torch.linspace(1, 0, steps + 1))
    config = TrainConfig(out="none", watch=Watch(every=1, heldout="x", count=2, images=2))
    return Evaluation.of_run(config, policy, {"reward": judge, "heldout": judge}, prompts, lambda x: x)


class Recorder(parity.RewardModel):
    """Records where it is placed, with which prompts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.placed = []

    def place(self, device, prompts=None):
        self.placed.append((str(device), None if prompts is None else list(prompts)))
        super().place(device, prompts)


def test_the_runs_prompts_are_encoded_and_the_held_out_reward_waits_between_evaluations():
    prompts = ["a fox", "a boat", "a cat"]
    trained, judge = Recorder(), Recorder()
    parts = SimpleNamespace(
        reward=trained, features=None, samples=SimpleNamespace(prompts=prompts), evaluation=evaluation_of(judge, prompts)
    )
    srpo = {"out": "none", "objective": {"name": "srpo", "positive": ["x"], "negative": ["y"]}, "device": "cuda"}
    place_rewards(build(TrainConfig, srpo), parts, "meta")
    ((device, encoded),) = trained.placed
    assert device == "meta" and set(encoded) == {word + p for p in prompts for word in ("", "x. ", "y. ")}
    assert judge.placed == [("meta", prompts[:2])] and devices(judge) == {"cpu"} and devices(trained) == {"meta"}
    with parts.evaluation.on_device():
        assert devices(judge) == {"meta"}

    for stays in ({"offload_encoders": False}, {"device": "cpu"}):
        place_rewards(build(TrainConfig, {**srpo, **stays}), parts, "meta")
        assert trained.placed[-1] == judge.placed[-1] == ("meta", None) and devices(judge) == {"meta"}


@pytest.mark.parametrize("name", ["hpsv2.1", "mps"])
def test_a_placed_text_tower_waits_on_the_cpu_unless_the_prompts_exceed_the_cache(name, tmp_path, monkeypatch):
    reward = small(name, tmp_path)
    total = WeightedSum([RewardSpec(name, reward, 0.5, 5.0, 1.0)])
    monkeypatch.setattr(type(reward), "encode_prompt", lambda self, prompt: devices(self.text))
    total.place(META, ["a", "b"])
    assert devices(reward.visual) == {"meta"} and devices(reward.text) == {"cpu"} and reward._encoded == {"a": {"meta"}, "b": {"meta"}}
    monkeypatch.setattr(type(reward), "prompts_kept", 1)
    reward.forget()
    total.place(META, ["a", "b"])
    assert devices(total) == {"meta"} and not reward._encoded


def test_aesthetic_has_no_text_tower_and_imagereward_moves_whole(tmp_path_factory):
    for name in ("aesthetic", "imagereward"):
        reward = small(name, tmp_path_factory.mktemp(name))
        reward.place(META, ["a"])
        assert reward.text_tower is None and devices(reward) == {"meta"}


@pytest.mark.parametrize("wrapper", ["Reward()", "Caller()"])
def test_a_users_own_module_moves_with_the_reward(wrapper, tmp_path):
    """An LSTM keeps views of its weights, which must move too; a callable object may hold the module."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Reward(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.LSTM(3, 1)\n"
        "    def forward(self, images, prompts):\n"
        "        return self.inner(images.mean((2, 3)))[0][:, 0]\n"
        "class Caller:\n"
        "    def __init__(self):\n"
        "        self.inner = Reward().inner\n"
        "    def __call__(self, images, prompts):\n"
        "        return self.inner(images.mean((2, 3)))[0][:, 0]\n"
        f"reward = {wrapper}\n"
    )
    reward = load_reward(str(tmp_path / "own.py"), False)
    assert reward(torch.rand(2, 3, 4, 4), ["a", "b"]).shape == (2,)
    reward.place(META, ["a"])
    assert devices(reward) == {"meta"} and {t.device.type for t in reward.function.inner._flat_weights} == {"meta"}


def test_a_run_encodes_before_the_network_comes_and_refuses_a_used_folder_before_anything(
    pipeline_folder, reward_folder, image_folder, tmp_path, monkeypatch, capsys
):
    order = []
    placed = commands.place_rewards  # a resumed black box puts its surrogate where its features are: before the folder is read
    monkeypatch.setattr(commands, "place_rewards", lambda *a: order.append("rewards") or placed(*a))
    for cls, name in ((DiffusersPolicy, "encode"), (Prompts, "prepare"), (DiffusersPolicy, "to"), (DiffusersPolicy, "add_lora")):
        whole = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *a, n=name, w=whole, **k: order.append(n) or w(self, *a, **k))
    given = settings(pipeline_folder, reward_folder, image_folder, tmp_path / "run", steps=1, gradient_accumulation_steps=1)
    assert main(["train", *given]) == 0
    assert list(dict.fromkeys(order)) == ["encode", "prepare", "to", "rewards", "add_lora"]
    order.clear()
    assert main(["train", *given, "--overwrite", "--reward=incompressibility", "--standardise=false"]) == 2
    assert "prepare" not in order and "has no gradient" in capsys.readouterr().err
    (tmp_path / "own.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
    own = ["--reward=" + str(tmp_path / "own.py"), "--standardise=false", "--gradient_checkpointing_reward=true"]
    assert main(["train", *given, "--overwrite", *own]) == 2 and "cannot recompute" in capsys.readouterr().err
    assert (tmp_path / "run" / "lora.safetensors").is_file()  # nothing is replaced by a run that cannot begin
    other = "--out=" + str(tmp_path / "none")
    with claim(tmp_path / "none", overwrite=False, resume=False):
        assert main(["train", *given, other]) == 2 and "another run is writing" in capsys.readouterr().err
    assert "prepare" not in order
    monkeypatch.setattr(commands, "load_reward", lambda *_: 1 / 0)
    assert main(["train", *given]) == 2 and "exists: add --overwrite" in capsys.readouterr().err
    assert main(["train", *given, other, "--resume"]) == 2 and "nothing to resume" in capsys.readouterr().err
