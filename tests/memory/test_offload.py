"""Weights that wait on the CPU. The meta device stands for the accelerator: what lies there has no values, so none leak through it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.runs import settings
from torch import nn

from tests.parity import run as parity
from trainer.__main__ import main
from trainer.commands import train as commands
from trainer.config import build
from trainer.memory import plan as planning
from trainer.memory.dry_run import Tally
from trainer.memory.offload import Parking, inside, slots
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.rewards.registry import load_reward
from trainer.rewards.texts import apart_from_texts, readers, waits
from trainer.rewards.weighted import Part, WeightedSum
from trainer.runtime.processes import ALONE
from trainer.training.evaluation import Watch, Watcher
from trainer.training.run import TrainConfig, claim

META = torch.device("meta")


def devices(tensors):
    return {t.device.type for t in tensors}


def test_what_is_parked_lies_on_the_device_only_inside_and_comes_back_as_it_was():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parked = Parking(slots(module))
    with parked.here():  # not parked yet: nothing moves
        assert devices(parked.tensors()) == {"cpu"}
    parked.park(META)
    homes = [id(t) for t in parked.tensors()]
    with parked.here(), parked.here():
        assert devices([*module.parameters(), *module.buffers()]) == {"meta"}
        assert all(isinstance(p, nn.Parameter) and not p.requires_grad for p in module[0]._parameters.values())
    with pytest.raises(ZeroDivisionError), parked.here():
        raise ZeroDivisionError
    assert [id(t) for t in parked.tensors()] == homes  # nothing was copied
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_shared_weights_stay_shared():
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    parked = Parking([*slots(one), *slots(two)])
    parked.park(META)
    with parked.here():
        assert one.weight is two.weight and one.weight.device == META
    assert one.weight is two.weight


def test_slots_are_taken_by_full_name():
    module = nn.ModuleDict({"visual": nn.Linear(2, 2), "text": nn.Linear(2, 2, bias=False)})
    module.register_parameter("logit_scale", nn.Parameter(torch.zeros(())))
    module.register_buffer("mask", None)
    assert [name for _, name in slots(module, ("visual.", "logit_"))] == ["weight"]
    assert len(slots(module)) == 4


@pytest.mark.parametrize("name", ["hpsv2.1", "mps"])
def test_a_text_tower_comes_for_a_prompt_not_met_before_and_scores_stay(name, tmp_path, monkeypatch):
    reward, _ = parity.open_case(name, tmp_path, parity.CASES[name].small)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = reward(images, ["a fox", "a boat"])
    (reader,) = readers(WeightedSum([Part("x", reward)], raw=True))
    reader.words.park(META)
    assert devices(reader.model.visual.parameters()) == {"cpu"} and reader.model.logit_scale.device.type == "cpu"
    at = []
    words = reader.model.token_embedding
    monkeypatch.setattr(words, "forward", lambda ids: at.append(words.weight.device.type) or 1 / 0)
    torch.testing.assert_close(reward(images, ["a fox", "a boat"]), before, rtol=0, atol=0)
    assert not at
    with pytest.raises(ZeroDivisionError):
        reward(images, ["a fox", "a cat"])
    assert at == ["meta"] and words.weight.device.type == "cpu"


def watcher_of(judge, prompts):
    policy = SimpleNamespace(sigmas=lambda steps: torch.linspace(1, 0, steps + 1))
    watch = Watch(every=1, heldout="x", count=2, images=2)
    return Watcher(watch, policy, {"reward": judge, "heldout": judge}, lambda x: x, prompts, 4, 1.0, 0, apart_from_texts(judge))


def test_only_what_a_step_needs_stays_on_the_device(tmp_path_factory):
    prompts = ["a fox", "a boat", "a cat"]
    trained, judge = (
        parity.open_case(name, tmp_path_factory.mktemp(name), parity.CASES[name].small)[0] for name in ("hpsv2.1", "pickscore")
    )
    watcher = watcher_of(judge, prompts)
    config = build(TrainConfig, {"out": "none", "objective": {"name": "srpo", "positive": ["x"], "negative": ["y"]}})
    commands._place_rewards(config, "meta", [trained, None], watcher, prompts)
    for reward, image_side in ((trained, "meta"), (judge, "cpu")):
        assert devices(reward.model.visual.parameters()) == {image_side} and devices(reward.words.tensors()) == {"cpu"}
    assert set(trained._texts) == {word + p for p in prompts for word in ("", "x. ", "y. ")}
    assert set(judge._texts) == set(prompts[:2])  # as many as the watch uses
    with watcher.waiting.here():
        assert devices(judge.model.visual.parameters()) == {"meta"} and judge.model.logit_scale.device.type == "meta"
        assert devices(judge.words.tensors()) == {"cpu"}

    stays = build(TrainConfig, {"out": "none", "offload_encoders": False})
    commands._place_rewards(stays, "meta", [trained, None], watcher_of(judge, prompts), prompts)
    assert {d for r in (trained, judge) for m in inside(r, nn.Module) for d in devices(m.parameters())} == {"meta"}


def test_what_lies_deep_in_a_sum_comes_too_and_what_is_never_read_waits(tmp_path):
    reward, _ = parity.open_case("aesthetic", tmp_path, parity.CASES["aesthetic"].small)
    total = WeightedSum([Part("aesthetic", reward, 0.5, 5.0, 1.0)])
    commands._place_rewards(build(TrainConfig, {"out": "none"}), "meta", [total, None], None, ["a fox"])
    assert devices([*reward.tower.model.visual.parameters(), *reward.head.parameters()]) == {"meta"}
    assert devices(reward.tower.words.tensors()) == {"cpu"} and not reward.tower._texts


def test_a_text_tower_stays_where_there_are_more_texts_than_are_remembered(tmp_path, monkeypatch):
    reward, _ = parity.open_case("mps", tmp_path, parity.CASES["mps"].small)
    monkeypatch.setattr(reward, "texts_kept", 3, raising=False)
    config = build(TrainConfig, {"out": "none"})
    commands._place_rewards(config, "meta", [reward], None, ["a", "b", "c", "d"])
    assert devices(reward.words.tensors()) == {"meta"} and not reward._texts
    assert not waits(reward, 4) and waits(reward, 3)
    counted = []
    for count in (3, 4):
        tally = Tally(torch.device("meta"))
        monkeypatch.setattr(reward, "remember", lambda texts: None)
        counted.append((planning._read(tally, [reward], ["a"], count, "reward weights"), tally.live["reward weights"]))
    (waiting, without), (none, whole) = counted
    assert waiting == sum(t.nbytes for t in reward.words.tensors()) and none == 0
    assert whole - without == sum(-(-t.nbytes // 512) * 512 for t in reward.words.tensors())


def test_a_users_own_module_is_moved_by_its_own_to(tmp_path):
    """An LSTM keeps views of its weights that only its own `to` renews."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Reward(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.LSTM(3, 1)\n"
        "    def forward(self, images, prompts):\n"
        "        return self.inner(images.mean((2, 3)))[0][:, 0]\n"
        "reward = Reward()\n"
    )
    reward = load_reward(str(tmp_path / "own.py"), False)
    config = build(TrainConfig, {"out": "none", "reward": str(tmp_path / "own.py")})
    commands._place_rewards(config, "meta", [reward], None, ["a"])
    assert devices(reward.function.inner._flat_weights) == {"meta"}


def test_rewards_without_a_text_tower_wait_whole(tmp_path):
    reward, _ = parity.open_case("imagereward", tmp_path, parity.CASES["imagereward"].small)
    assert not readers(reward)
    weights = {id(t) for t in (*reward.model.parameters(), *reward.model.buffers())}
    assert {id(t) for t in apart_from_texts(reward).tensors()} == weights


def test_the_plan_knows_what_waits():
    planned = commands.Planner(ALONE)
    more = {"out": "none", "batch_size": 2, "device": "cuda", "reward": "demo-proxy", "watch": {"every": 5, "heldout": "demo-heldout"}}
    here, away = (planned(build(TrainConfig, {**more, "offload_encoders": value})) for value in (False, True))
    reward = load_reward("demo-proxy", False)
    size = lambda tensors: sum(-(-t.nbytes // 512) * 512 for t in tensors)  # noqa: E731
    text = size(reward.words.tensors())
    assert here.parts["reward weights"] - away.parts["reward weights"] == text > 0
    assert "other rewards' weights" in here.parts and "other rewards' weights" not in away.parts
    beside = here.moments["encoding prompts"] - away.moments["encoding prompts"]  # the denoiser comes when prompts are encoded
    assert beside > here.parts["denoiser weights"] + here.parts["other rewards' weights"]
    assert here.flops == pytest.approx(
        planned(build(TrainConfig, {**more, "offload_encoders": False, "watch": {}})).flops
    )  # the watch adds none
    assert away.moments["rewards reading prompts"] < away.moments["a training step"] < here.moments["a training step"]


def test_a_run_encodes_before_the_network_comes_and_refuses_a_used_folder_before_anything(
    pipeline_folder, reward_folder, image_folder, tmp_path, monkeypatch, capsys
):
    order = []
    placed = commands._place_rewards  # a resumed black box puts its surrogate where its features are: before the folder is read
    monkeypatch.setattr(commands, "_place_rewards", lambda *a: order.append("rewards") or placed(*a))
    for name in ("encode", "prepare", "to", "add_lora"):
        whole = getattr(DiffusersPolicy, name)
        monkeypatch.setattr(DiffusersPolicy, name, lambda self, *a, n=name, w=whole, **k: order.append(n) or w(self, *a, **k))
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
