"""The plan against counts by hand and against real steps; fitting to a size; and what a run says when memory runs out."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import settings
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.commands import train as commands
from trainer.config import ConfigError, build, override, plain
from trainer.data.latents import LatentsInMemory
from trainer.data.samples import Samples
from trainer.lora.file import load_consistency
from trainer.memory import oom as memory
from trainer.memory import plan as planning
from trainer.memory.dry_run import META, Tally, dry
from trainer.memory.offload import tensors
from trainer.models.open import open_policy
from trainer.models.unet import UNetPolicy
from trainer.rewards.registry import load_reward
from trainer.rewards.weighted import Standardised
from trainer.runtime.device import is_out_of_memory
from trainer.runtime.processes import ALONE
from trainer.training.config import TrainConfig
from trainer.training.evaluation import Evaluation
from trainer.training.nfe import CountingPolicy
from trainer.training.parts import Parts
from trainer.training.run import Run

SHORT = {"name": "imagerefl", "steps": 3, "grad_from": 2, "grad_to": 2, "start_from": 1, "start_to": 1, "refl_share": 0.0}
KILO = 128 * 128 * 4  # bytes of a float32 square of side 128


def config(**more):
    return build(TrainConfig, {"out": "none", "batch_size": 2, "steps": 3, "objective": SHORT, **more})


@pytest.fixture(scope="module")
def planned():
    return commands.Planner(ALONE)


@pytest.mark.parametrize("again", [False, True])
def test_two_layers_keep_what_is_counted_by_hand(again):
    first, second = (nn.Linear(128, 128, bias=False, device=META) for _ in range(2))
    x = torch.empty(128, 128, device=META, requires_grad=True)
    tally = Tally()

    def body(x):
        return second(first(x).relu())

    with dry(tally):
        tally.hold([x, first.weight, second.weight], "held")
        y = checkpoint(body, x, use_reentrant=False) if again else body(x)
        # the rectifier's output, which both it and the second layer keep, and y; recomputed, y alone
        assert tally.total - tally.live["held"] == (1 if again else 2) * KILO and tally.live["held"] == 3 * KILO
        assert tally.flops["rest"] == 2 * 2 * 128**3
        y.sum().backward()
        del y
        assert tally.total == 6 * KILO  # three gradients beside the three that are held


def test_attention_keeps_no_matrix_of_all_tokens():
    q = torch.empty(1, 1, 2048, 64, device=META, requires_grad=True)
    tally = Tally()
    with dry(tally):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert tally.peak < 2048 * 2048 * 4


def test_weights_and_state_are_the_real_ones_and_memory_grows_with_the_batch(planned):
    policy = open_policy("demo")
    two, four = planned(config(ema=0.9)), planned(config(ema=0.9, batch_size=4))
    size = lambda module: sum(-(-t.nbytes // 512) * 512 for t in (*module.parameters(), *module.buffers()))  # noqa: E731
    assert two.parts["denoiser weights"] == size(policy.network) and two.parts["text encoder weights"] == size(policy.pipeline.text_encoder)
    policy.add_lora(config().lora)
    adapter = sum(-(-p.nbytes // 512) * 512 for p in policy.parameters())
    assert two.parts["adapter"] == two.parts["moving average"] == adapter
    assert 2 * adapter <= two.parts["optimizer state"] <= 2 * adapter + 64 * 512 * 2  # and a step number per parameter
    assert two.counted < four.counted < 2 * two.counted
    assert four.flops["denoiser"] == pytest.approx(2 * two.flops["denoiser"], rel=1e-3)
    assert four.forwards == 2 * two.forwards == 8 and two.backwards == 4  # each image: at the start and one step later, both with gradient


def test_a_consistency_adapter_is_planned_beside_the_trained_one(planned):
    sqdf = {"name": "sqdf", "steps": 3, "estimator": "consistency"}
    plain, more = planned(config(objective=sqdf | {"estimator": "base"})), planned(config(objective=sqdf, consistency="demo"))
    extra = sum(-(-p.nbytes // 512) * 512 for p in consistency_parameters())
    assert more.parts["adapter"] == plain.parts["adapter"] and more.parts["denoiser weights"] - plain.parts["denoiser weights"] == extra > 0


def consistency_parameters():
    from trainer.demo import files

    policy = open_policy("demo")
    load_consistency(policy, files.CONSISTENCY)
    return policy.adapters.parameters("consistency").values()


@pytest.mark.parametrize("name", [{}, {"name": "draft-k", "steps": 3, "k": 2}, {"name": "sqdf", "steps": 3}])
def test_the_plan_is_what_a_real_step_holds(name, planned, tmp_path):
    c = config(objective=name or SHORT, out=str(tmp_path), merge_rollouts=False)
    found = planned(c)
    policy, reward = open_policy("demo"), load_reward("demo-proxy", False)
    c = replace(planning._bounded(c), out=str(tmp_path))
    picture = torch.zeros(2, *policy.latent_shape)
    samples = Samples(("a", "b"), LatentsInMemory(picture, picture))
    run = Run(c, Parts(policy, samples, reward))
    policy.prompts.conditioning(("a", "b", ""))
    tally = Tally(torch.device("cpu"))
    tally.hold(tensors(policy.network, policy.vae, policy.pipeline.text_encoder, reward), "weights")
    with tally:
        state = planning._state(SimpleNamespace(policy=policy, optimizer=run.optimizer), "adamw", tally)
        loss, _ = run.loss(samples.batch(0, 0, 0, 2, 0))
        loss.backward()
    assert found.counted - found.parts["prompts' embeddings"] == pytest.approx(tally.peak, rel=0.05) and state == []


def test_checkpoints_make_it_less_and_are_offered(planned):
    before = planned(config())
    flags = {flag: saved for flag, _, saved in planning.savings(config(), planned)}
    assert flags["--gradient_checkpointing_vae=true"] == before.total - planned(config(gradient_checkpointing_vae=True)).total > 0


def fake(c):
    """A plan whose total is easily added up: 8 GB for each sample of a micro-batch, less what is switched on."""
    total = 8 * c.batch_size - 4 * c.gradient_checkpointing_vae - 2 * c.gradient_checkpointing_denoiser
    return SimpleNamespace(total=total * 10**9, moment="decoder")


def test_fitting_switches_on_no_more_than_it_must_and_keeps_what_was_given():
    found, added, _ = planning.fit(config(), 12.5, [], fake)
    assert added == ["--gradient_checkpointing_vae=true"] and found.gradient_checkpointing_vae and not found.gradient_checkpointing_denoiser
    found, added, _ = planning.fit(config(batch_size=4), 10.5, ["gradient_checkpointing_vae", "batch_size"], fake)
    assert (
        added == ["--gradient_checkpointing_denoiser=true", "--batch_size=1 --gradient_accumulation_steps=4"]
        and not found.gradient_checkpointing_vae
    )
    assert found.batch_size * found.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match=r"vram = 1: the least that this run takes is 2.0 GB, with .*a lower image_size"):
        planning.fit(config(), 1, [], fake)
    with pytest.raises(ConfigError, match="so would --gradient_checkpointing_vae=true, which the config sets otherwise"):
        planning.fit(config(), 1, ["gradient_checkpointing_vae"], fake)


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (OSError("No space left on device"), False),
    ],
)
def test_what_lacks_memory_is_told_from_what_does_not(error, lack):
    assert is_out_of_memory(error) == lack


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


def test_out_of_memory_names_the_place_and_a_setting_that_a_resumed_run_takes(pipeline_folder, image_folder, tmp_path, capsys):
    from trainer.__main__ import main

    (tmp_path / "own.py").write_text(REWARD)
    paths = (pipeline_folder, tmp_path / "own.py", image_folder)
    more = {"standardise": False, "gradient_accumulation_steps": 1, "steps": 4}
    assert main(["train", *settings(*paths, tmp_path / "whole", **more)]) == 0
    (tmp_path / "full").write_text("")
    cut = ["train", *settings(*paths, tmp_path / "cut", **more)]
    assert main(cut) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("error: out of memory in the reward; the last checkpoint is intact: ") and "checkpoint.pt, step 2; try --" in said
    )
    flags = re.findall(r"--[\w.]+=\w+", said)
    assert flags and said.endswith("then --resume")
    (tmp_path / "full").unlink()
    assert main([*cut, *flags, "--resume"]) == 0
    from safetensors.torch import load_file

    whole, resumed = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[k], resumed[k], rtol=1e-4, atol=1e-6) for k in whole)
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    changed = override({}, flags)
    assert {key: written[key] for key in changed} == changed
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["memory_gb"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("where", "name", "said"),
    [
        (UNetPolicy, "encode_prompts", "the text encoders"),
        (torch.nn.Module, "to", "bringing the model to the device"),
        (Standardised, "place", "bringing the rewards to the device"),
    ],
)
def test_out_of_memory_before_the_first_step_names_its_place(where, name, said, monkeypatch):
    policy = open_policy("demo")

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, name, full)
    calls = {
        "encode_prompts": lambda: policy.prompts.prepare(["a"]),
        "to": lambda: policy.to("cpu:0"),
        "place": lambda: commands._place_rewards(config(), "meta", [load_reward("demo-proxy", True)], None, ["a"]),
    }
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        calls[name]()
    assert memory.place(raised.value) == said


def test_vram_changes_the_run_and_resuming_keeps_it(planned, tmp_path, capsys):
    c = config(out=str(tmp_path))
    limit = (planned(c).total + planned(config(gradient_checkpointing_vae=True)).total) / 2e9
    fitted = commands._fitted(replace(c, vram=limit), [], planned, resume=False)
    assert fitted.gradient_checkpointing_vae and "--gradient_checkpointing_vae=true" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(plain(fitted)))
    assert commands._fitted(replace(c, vram=limit), [], planned, resume=True) == fitted


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_speed_is_that_of_the_fastest_product(monkeypatch):
    """By a clock on which every other reading is 10 ms later, and once only 2 ms."""
    readings, late = itertools.count(), []

    def clock():
        late.append(0.002 if next(readings) == 6 else 0.01)
        return sum(late)

    monkeypatch.setattr(planning.time, "monotonic", clock)
    assert planning.speed("cpu", torch.float32, 0.1) == pytest.approx(2 * 1024**3 / 0.002)


def test_a_look_counts_as_many_calls_as_the_watch_makes(planned):
    watch = {"every": 2, "heldout": "demo-heldout", "count": 2, "images": 3, "switch": "2", "guidance_scale": 4.0}
    c = config(watch=watch, steps=5)
    found = planned(c)
    policy = CountingPolicy(open_policy("demo"))
    judge = load_reward("demo-proxy", False)
    Evaluation.of_run(c, policy, {"reward": judge, "heldout": judge}, ["a", "b"], judge.image_features).run(0)
    assert planning._calls_of_a_look(c, policy) == policy.calls
    assert found.looks == 4  # before the first step, after the second, the fourth and the last


def test_durations_follow_the_arithmetic_and_the_speeds():
    watched = {"every": 2, "heldout": "x"}
    c = config(reward_dtype="bfloat16", watch=watched, steps=6)
    found = SimpleNamespace(flops={"denoiser": 6e12, "decoder": 2e12, "reward": 8e12}, look_flops={"denoiser": 24e12}, steps=6, looks=4)
    text = planning.duration(found, c, {"float32": 1e12, "bfloat16": 4e12})
    # a step 8 + 2 s at full speed, a look 24 s, the run 60 + 96 s
    low, high = planning.REACHED
    assert f"{10 / high:.2g} to {10 / low:.2g} s a step" in text and f"{156 / high / 60:.2g} to {156 / low / 60:.2g} min the run" in text
