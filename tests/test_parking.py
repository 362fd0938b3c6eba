"""Weights that wait on the CPU. The meta device stands for the accelerator: what lies there has no values, so none leak through it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests_of_runs import settings
from torch import nn

from trainer import commands
from trainer.__main__ import main
from trainer.config import ConfigError, build
from trainer.parking import Parking, inside, slots
from trainer.policies.base import DiffusersPolicy
from trainer.processes import ALONE
from trainer.rewards import parity
from trainer.rewards.combine import Part, WeightedSum
from trainer.rewards.texts import apart_from_texts, readers
from trainer.run import TrainConfig
from trainer.watch import Watch, Watcher

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


def test_rewards_without_a_text_tower_wait_whole(tmp_path):
    reward, _ = parity.open_case("imagereward", tmp_path, parity.CASES["imagereward"].small)
    assert not readers(reward)
    weights = {id(t) for t in (*reward.model.parameters(), *reward.model.buffers())}
    assert {id(t) for t in apart_from_texts(reward).tensors()} == weights


def test_the_plan_knows_what_waits():
    planned = commands.Planner(ALONE)
    more = {"out": "none", "batch": 2, "device": "cuda", "reward": "demo-proxy", "watch": {"every": 5, "heldout": "demo-heldout"}}
    here, away = (planned(build(TrainConfig, {**more, "offload_encoders": value})) for value in (False, True))
    reward = commands.load_reward("demo-proxy", False)
    size = lambda tensors: sum(-(-t.nbytes // 512) * 512 for t in tensors)  # noqa: E731
    text = size(reward.words.tensors())
    assert here.parts["reward weights"] - away.parts["reward weights"] == text > 0
    assert "other rewards' weights" in here.parts and "other rewards' weights" not in away.parts
    beside = here.moments["encoding prompts"] - away.moments["encoding prompts"]  # the denoiser comes when prompts are encoded
    assert beside > here.parts["denoiser weights"] + here.parts["other rewards' weights"]
    assert away.moments["rewards reading prompts"] < away.moments["a training step"] < here.moments["a training step"]


def test_a_run_encodes_before_the_network_comes_and_refuses_a_used_folder_before_anything(
    pipeline_folder, reward_folder, image_folder, tmp_path, monkeypatch
):
    order = []
    for name in ("encode", "prepare", "to", "add_lora"):
        whole = getattr(DiffusersPolicy, name)
        monkeypatch.setattr(DiffusersPolicy, name, lambda self, *a, n=name, w=whole, **k: order.append(n) or w(self, *a, **k))
    given = settings(pipeline_folder, reward_folder, image_folder, tmp_path / "run", steps=1, accumulate=1)
    assert main(["train", *given]) == 0
    assert list(dict.fromkeys(order)) == ["encode", "prepare", "to", "add_lora"]
    monkeypatch.setattr(commands, "load_reward", lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match="exists: add --overwrite"):
        commands._run(
            build(TrainConfig, {"out": str(tmp_path / "run")}),
            SimpleNamespace(overwrite=False, resume=False),
            ALONE,
            commands.Planner(ALONE),
        )
    assert main(["train", *given]) == 2 and main(["train", *given, "--out=" + str(tmp_path / "none"), "--resume"]) == 2
