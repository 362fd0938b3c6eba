"""The plan against counts of real steps, and what it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.runs import plan_config as config

from trainer.__main__ import main
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.memory import plan as planning
from trainer.memory.dry_run import MemoryTracker
from trainer.memory.offload import tensors
from trainer.memory.planner import Planner
from trainer.models.open import open_consistency, open_policy
from trainer.rewards.registry import load_reward
from trainer.training.parts import Parts
from trainer.training.run import Run

OBJECTIVES = [{}, {"name": "draft-k", "steps": 3, "k": 2}, {"name": "draft-lv", "steps": 3}, {"name": "sqdf", "steps": 3}]
MORE = [{"name": "flowbp-bridge", "steps": 4, "k": 3}, {"name": "leapalign", "steps": 4, "recompute": False}]


@pytest.fixture(scope="module")
def planned():
    return Planner()


def blocks(values):
    """Bytes in blocks of 512."""
    return sum(-(-t.nbytes // 512) * 512 for t in values)


def test_weights_and_state_are_the_real_ones_and_memory_grows_with_the_batch(planned):
    policy = open_policy("demo")
    two, four = planned(config(ema=0.9)), planned(config(ema=0.9, batch_size=4))
    assert two.components["denoiser weights"] == blocks(tensors(policy.network))
    assert two.components["text encoder weights"] == blocks(tensors(policy.pipeline.text_encoder))
    assert two.components["VAE weights"] + two.components["VAE encoder weights"] == blocks(tensors(policy.vae))
    policy.add_lora(config().lora)
    adapter = blocks(policy.parameters())
    assert two.components["adapter"] == two.components["EMA"] == adapter
    assert 2 * adapter <= two.components["optimizer state"] <= 2 * adapter + 64 * 512 * 2  # and a step number per parameter
    assert two.counted < four.counted < 2 * two.counted


def test_a_consistency_adapter_is_planned_beside_the_trained_one(planned):
    sqdf = {"name": "sqdf", "steps": 3, "estimator": "consistency"}
    base, more = planned(config(objective=sqdf | {"estimator": "base"})), planned(config(objective=sqdf, consistency="demo"))
    policy = open_policy("demo")
    without = blocks(tensors(policy.network))
    open_consistency(policy, "demo")
    extra = blocks(tensors(policy.network)) - without
    assert more.components["adapter"] == base.components["adapter"]
    assert more.components["denoiser weights"] - base.components["denoiser weights"] == extra > 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_reference_that_follows_is_one_more_adapter(kind, planned):
    name = {"pairs": "diffusion-dpo", "labels": "diffusion-kto"}[kind]
    base, more = (planned(config(objective={"name": name, **one}, **{kind: "demo"})) for one in ({}, {"reference_every": 5}))
    grown = more.phases["training step"] - base.phases["training step"]
    assert grown == base.components["adapter"] > 0 and "weights that follow" not in base.components


@pytest.mark.parametrize("objective", [*OBJECTIVES, *(pytest.param(one, marks=pytest.mark.full) for one in MORE)])
def test_the_plan_is_what_a_real_step_holds(objective, planned, tmp_path):
    c = config(**({"objective": objective} if objective else {}), out=str(tmp_path), merge_rollouts=False)
    found = planned(c)
    policy, reward = open_policy("demo"), load_reward("demo-proxy", False)
    latents = torch.zeros(2, *policy.latent_shape)
    samples = Samples(("a", "b"), LatentsInMemory(latents, latents))
    run = Run(planning.without_side_effects(c, tmp_path), Parts(policy, samples, reward))
    policy.prompts.conditioning(("a", "b", ""))
    tracker = MemoryTracker(torch.device("cpu"))
    tracker.attribute(tensors(policy.network, policy.vae, policy.pipeline.text_encoder, reward), "weights")
    with tracker:
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        loss, _ = run.loss(run.batches(0, 0))
        loss.backward()
    assert found.counted - found.components["embeddings of prompts"] == pytest.approx(tracker.peak.bytes, rel=0.05)


def test_the_most_expensive_micro_batch_is_planned(planned, monkeypatch):
    """AlignProp draws where the gradient is cut: the first micro-batch has a short chain, a later one all six steps."""
    chain = {"steps": 6, "recompute": False}
    c = config(objective={"name": "alignprop", "cut_mean": 3.0, "cut_std": 2.0, **chain}, steps=20)
    highest, whole = planned(c), planned(replace(c, objective={"name": "draft-k", "k": 6, **chain}))
    monkeypatch.setattr(planning, "MICRO_BATCHES", 1)
    first = Planner()(c)
    assert highest.phases["training step"] == whole.phases["training step"] > 1.5 * first.phases["training step"]


def test_offloading_leaves_encoders_text_towers_and_the_held_out_reward_on_the_cpu(planned):
    more = {"device": "cuda", "reward": "demo-proxy", "watch": {"every": 5, "heldout": "demo-heldout"}}
    here, away = (planned(config(**more, offload_encoders=value)) for value in (False, True))
    text = blocks(tensors(load_reward("demo-proxy", False).text))
    assert here.components["reward weights"] - away.components["reward weights"] == text > 0
    assert "held-out reward weights" in here.components and "held-out reward weights" not in away.components
    beside = here.phases["encoding prompts"] - away.phases["encoding prompts"]  # the denoiser comes when prompts are encoded
    assert beside > here.components["denoiser weights"] + here.components["held-out reward weights"]
    assert away.phases["encoding rewards' prompts"] < away.phases["training step"] < here.phases["training step"]


def test_the_report_has_components_phases_and_savings(capsys):
    assert main(["train", "--plan", "--batch_size=2", "--steps=3", "--objective.name=draft-k", "--objective.steps=3"]) == 0
    report = capsys.readouterr().out
    lines = report.splitlines()
    sizes = {line[2:52].strip(): float(line[52:]) for line in lines if re_size(line)}
    assert sizes["total"] == pytest.approx(sum(size for name, size in sizes.items() if name != "total"), abs=0.006)
    assert "peak of each phase, GB: encoding prompts" in report and "--gradient_checkpointing_vae=true" in report
    assert "--steps=3" in lines[-1]


def re_size(line):
    """Whether a line is a row of the table of components."""
    return line.startswith("  ") and not line.startswith("  --")
