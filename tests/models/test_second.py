"""A second model for the tuned part: its own weights and schedule, what it shares, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.original_names import original_krea
from safetensors.torch import load_file, save_file

from trainer.models import load
from trainer.models.krea import KreaPolicy
from trainer.models.second import states_schedule, with_network
from trainer.models.zimage import ZImagePolicy

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
