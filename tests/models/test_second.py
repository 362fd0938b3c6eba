"""A second model for the tuned part: its own weights and schedule, what it shares, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.original_names import original_krea
from helpers.runs import plan_config, settings
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.generate import Generation, generate
from trainer.guidance import Switch, cfg, combined
from trainer.lora.file import load_lora
from trainer.memory import offload
from trainer.memory.planner import Planner
from trainer.models import load
from trainer.models.krea import KreaPolicy
from trainer.models.load import load_policy
from trainer.models.second import states_schedule, with_network
from trainer.models.zimage import ZImagePolicy
from trainer.rewards.registry import load_reward
from trainer.training import checkpoint

PROMPTS = ["a red star", "a blue ring"]


def predicted(policy):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.denoiser(PROMPTS, guidance_scale=2.0)(x, torch.tensor([0.9, 0.3]))


def turbo_of(folder, path, **schedule):
    """A copy of a folder with other weights and another schedule."""
    shutil.copytree(folder, path)
    (file,) = (path / "transformer").glob("*.safetensors")
    save_file({k: v + 0.1 * v.std(correction=0) for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | schedule))
    return path


@pytest.fixture
def turbo(family_folder, tmp_path):
    return turbo_of(family_folder("z-image"), tmp_path / "turbo", shift=9.0)


def test_it_predicts_as_the_other_model_on_that_models_levels(family_folder, turbo):
    base, other = ZImagePolicy.load(family_folder("z-image"), image_size=64), ZImagePolicy.load(turbo, image_size=64)
    before = predicted(base)
    for path in (turbo, turbo / "transformer"):
        second = with_network(base, path)
        assert torch.equal(predicted(second), predicted(other)) and torch.equal(second.sigmas(8), other.sigmas(8))
        assert second.vae is base.vae and second.prompts is base.prompts
    assert torch.equal(predicted(base), before) and not torch.allclose(second.sigmas(8), base.sigmas(8))


@pytest.fixture
def krea(family_folder, tmp_path, monkeypatch):
    """A policy of Krea 2, a folder of a distilled one, and its network's file; the tiny model counts as published."""
    folder = turbo_of(family_folder("krea2"), tmp_path / "krea")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    base, other = KreaPolicy.load(family_folder("krea2"), image_size=64), KreaPolicy.load(folder, image_size=64)
    base.max_tokens = other.max_tokens = 24
    config = KreaPolicy.published["krea2"]
    parts = {**config.parts, "transformer": (config.parts["transformer"][0], dict(base.network.config))}
    monkeypatch.setattr(load, "detect", lambda shapes: "krea2")
    monkeypatch.setitem(load.MODELS, "krea2", (KreaPolicy, replace(config, parts=parts)))
    save_file({k: v.contiguous() for k, v in original_krea(other.network.state_dict()).items()}, tmp_path / "krea.safetensors")
    return base, other, folder, tmp_path / "krea.safetensors"


def test_a_file_of_the_network_alone_takes_its_schedule_from_a_folder(krea):
    """A distilled Krea 2 has its own shift: the pipeline's index says that it is distilled, not its scheduler."""
    base, other, folder, file = krea
    alone, whole = with_network(base, file), with_network(base, file, folder)
    alone.max_tokens = whole.max_tokens = 24
    assert torch.equal(predicted(alone), predicted(other)) and torch.equal(predicted(whole), predicted(other))
    assert torch.equal(alone.sigmas(8), base.sigmas(8)) and torch.equal(whole.sigmas(8), other.sigmas(8))
    assert not torch.allclose(whole.sigmas(8), base.sigmas(8))
    assert [states_schedule(base, file), states_schedule(base, file, folder), states_schedule(base, folder)] == [False, True, True]


def test_other_models_are_refused(family_folder, turbo, tmp_path):
    base = ZImagePolicy.load(family_folder("z-image"), image_size=64)
    with pytest.raises(ValueError, match="is of another family: it is for StableDiffusionPipeline, the model for ZImagePipeline"):
        with_network(base, family_folder("sd15"))
    with pytest.raises(ValueError, match="it holds a UNet2DConditionModel, the model has a ZImageTransformer2DModel"):
        with_network(base, family_folder("sd15") / "unet")
    with pytest.raises(FileNotFoundError, match="is not a diffusers transformer: it has no config.json"):
        with_network(base, tmp_path / "nowhere")
    small = ZImagePolicy.load(turbo, image_size=64)
    type(small.network).from_config({**small.network.config, "n_layers": 1}).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="is a model of another size or family: .* weights differ, layers.1"):
        with_network(base, tmp_path / "small")


def test_offloaded_encoders_stay_where_they_are(family_folder, turbo):
    """On a GPU they would be moved there with the second network."""
    base = ZImagePolicy.load(family_folder("z-image"), image_size=64, offload=True)
    assert with_network(base, turbo).prompts.offload and not with_network(ZImagePolicy.load(turbo, image_size=64), turbo).prompts.offload


WATCH = {"watch.every": 1, "watch.count": 1, "watch.images": 2, "watch.guidance_scale": 2.0, "watch.reference": "none"}


@pytest.mark.parametrize("switch", ["0", pytest.param("50%", marks=pytest.mark.full)])
def test_evaluations_draw_with_the_other_model_and_the_lora(switch, pipeline_folder, reward_folder, heldout_folder, image_folder, tmp_path):
    """The watch's rewards are those of images by a policy that loads the other model and the run's LoRA from their files."""
    turbo = tmp_path / "turbo"
    shutil.copytree(pipeline_folder, turbo)
    file = turbo / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.3 * v.std(correction=0) for k, v in load_file(file).items()}, file, {"format": "pt"})
    (tmp_path / "prompts.txt").write_text("a red star\n")
    watch = {**WATCH, "watch.switch": switch, "watch.prompts": str(tmp_path / "prompts.txt"), "watch.heldout": str(heldout_folder)}
    watch |= {"watch.tuned_model": str(turbo), "watch.tuned_steps": 3}
    out, common = tmp_path / "run", (reward_folder, image_folder)
    assert main(["train", *settings(pipeline_folder, *common, out, steps=1, ema=0.0, learning_rate=0.05, **watch)]) == 0
    assert set(checkpoint.load(out / "checkpoint.pt")["data"]) == {"images", "watch.prompts", "watch.tuned_model"}
    reward, points = load_reward(str(heldout_folder), True), json.loads((out / "watch.json").read_text())
    for point, lora in zip(points, (None, out / "lora.safetensors")):
        other, base = load_policy(turbo), load_policy(pipeline_folder)
        if lora:
            load_lora(other, lora)
        drawing = Generation(steps=6, tuned_steps=3, guidance_scale=2.0, seed=1, tuned_method="ddim")
        levels, k = Switch.parse(switch).joined(base.sigmas(6), other.sigmas(3))
        mix = combined(drawing.base, drawing.tuned(model="other"), k)
        images = generate(base, ["a red star"] * 2, drawing, {"": mix}, {"other": other}, grids={"": levels})[""]
        alone = generate(other, ["a red star"] * 2, Generation(steps=3, seed=1, method="ddim"), {"": cfg(drawing.tuned())})[""]
        assert switch != "0" or torch.equal(images, alone)  # by no code of two parts
        assert point["heldout"] == pytest.approx(float(reward(images, ["a red star"] * 2).mean()), rel=1e-5)
    assert abs(points[0]["heldout"] - points[1]["heldout"]) > 1e-4


def test_a_watch_of_another_model_is_refused_where_it_does_not_fit(
    pipeline_folder, family_folder, reward_folder, heldout_folder, image_folder, tmp_path, capsys
):
    sdxl, same = family_folder("sdxl"), pipeline_folder
    for more, message in (
        ({"watch.tuned_model": str(same)}, "watch: tuned_model has a schedule of its own: give tuned_steps, such as 8"),
        ({"watch.tuned_steps": 4}, "watch: tuned_steps is of another model: give tuned_model"),
        (
            {"watch.tuned_model": str(sdxl), "watch.tuned_steps": 4},
            "watch.tuned_model: .* is of another family: it is for StableDiffusionXL",
        ),
        (
            {"watch.tuned_model": str(same), "watch.tuned_steps": 4, "tune": "full"},
            "watch.tuned_model draws with the LoRA, which needs tune",
        ),
    ):
        values = {**WATCH, "watch.heldout": str(heldout_folder), **more}
        assert main(["train", *settings(same, reward_folder, image_folder, tmp_path / "run", **values)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert re.search(message, line), line


def test_it_waits_on_the_cpu_between_evaluations_and_the_plan_counts_it(pipeline_folder, monkeypatch):
    base = load_policy(pipeline_folder)
    second, moves = with_network(base, pipeline_folder), []
    monkeypatch.setattr(offload, "moved_to", lambda modules, device: moves.append((list(modules), device)) or nullcontext())
    evaluation = SimpleNamespace(tuned=second)
    offload.place_models(plan_config(device="cuda"), base, evaluation, "cpu")
    with evaluation.drawing():
        assert moves == [([second.network], "cpu")]
    watch = {"every": 1, "heldout": "demo-heldout"}
    other = {"tuned_model": str(pipeline_folder), "tuned_steps": 2}
    options = {"model": str(pipeline_folder), "device": "cuda", "batch_size": 1}
    plain, two = (Planner()(plan_config(**options, watch=watch | more)) for more in ({}, other))
    network = sum(-(-p.nbytes // 512) * 512 for p in base.network.parameters())
    held = two.waiting - plain.waiting
    print(network, held)
    assert 0 < held / network - 1 < 0.2 and two.phases["training step"] == plain.phases["training step"]  # the adapter's copy with it
