"""`sample` with two parts: each has its own network, schedule, LoRAs and prompts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.lora.file import save_lora
from trainer.models.zimage import ZImagePolicy
from trainer.policy import Lora
from trainer.rng import Rng


@pytest.fixture(scope="module")
def models(family_folder, tmp_path_factory):
    """A base, a turbo model with another shift, and two LoRAs."""
    base, folder = family_folder("z-image"), tmp_path_factory.mktemp("two")
    turbo = shutil.copytree(base, folder / "turbo")
    (file,) = (turbo / "transformer").glob("*.safetensors")
    save_file({k: v + 0.1 * v.std(correction=0) for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = turbo / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 9.0}))
    for seed, name in enumerate(("a", "b")):
        policy = ZImagePolicy.load(base, image_size=64)
        policy.add_lora(Lora(rank=4, alpha=6.0))
        with torch.no_grad():
            for p in policy.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        save_lora(policy, folder / f"{name}.safetensors", {})
    return base, turbo, folder / "a.safetensors", folder / "b.safetensors"


def run(out, base, *more):
    arguments = ["sample", "--model", base, "--prompt", "a red star", "-n", 1, "--image-size", 64, "--method", "ddim", "--out", out, *more]
    return main(list(map(str, arguments)))


def with_diffusers_lora(folder, file, strength):
    policy = ZImagePolicy.load(folder, image_size=64)
    policy.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="part")
    policy.pipeline.set_adapters(["part"], [strength])
    return policy


@torch.no_grad()
def test_it_is_a_chain_of_two_models_that_share_nothing(models, tmp_path, capsys):
    """Base for two of six steps, turbo for its own levels below; each with a LoRA by diffusers, a prompt, and the formula of flow."""
    base, turbo, a, b = models
    own = ["--base-lora", f"{a}:0.5", "--tuned-model", turbo, "--tuned-lora", f"{b}:2", "--tuned-prompt", "{prompt}, vivid"]
    more = ["--steps", 6, "--guidance-scale", 2, "--tuned-steps", 4, "--switch", 2, "--negative", "blurred"]
    assert run(tmp_path / "x", base, *own, *more) == 0
    assert "by its own schedule" in capsys.readouterr().out
    first, second = with_diffusers_lora(base, a, 0.5), with_diffusers_lora(turbo, b, 2.0)
    wide, short = first.sigmas(6), second.sigmas(4)
    assert not torch.allclose(short, first.sigmas(4))
    levels = torch.cat([wide[:3], short[short < wide[2]]])
    cond, uncond = (first.denoiser([text]) for text in ("a red star", "blurred"))
    tuned = second.denoiser(["a red star, vivid"])
    x = Rng(0, 0, (0,)).start_noise(first.latent_shape)
    for i, (now, after) in enumerate(zip(levels.tolist(), levels[1:].tolist())):
        sigma = torch.tensor([now])
        clean = uncond(x, sigma) + 2 * (cond(x, sigma) - uncond(x, sigma)) if i < 2 else tuned(x, sigma)
        x = (1 - after) * clean + after * (x - (1 - now) * clean) / now
    expected = (first.decode(x)[0].permute(1, 2, 0) * 255).numpy()
    found = np.asarray(Image.open(tmp_path / "x" / "00000.png")).astype(float)
    assert float(np.abs(found - expected).max()) < 1.0 and float(expected.std()) > 5
    facts = json.loads((tmp_path / "x" / "settings.json").read_text())
    assert (facts["lora"], facts["strength"], facts["base_lora"], facts["base_strength"]) == (str(b), 2.0, str(a), 0.5)
    assert run(tmp_path / "x", base, *own, *more, "--resume") == 0
    assert run(tmp_path / "x", base, *own[:-1], "{prompt}, dull", *more, "--resume") == 2
    assert "another tuned_prompt" in capsys.readouterr().err


def test_the_tuned_part_alone_is_the_turbo_model_alone(models, tmp_path):
    base, turbo, a, _ = models
    more = ["--guidance-scale", 1, "--steps", 3]
    assert run(tmp_path / "x", base, "--tuned-model", turbo, "--tuned-steps", 2, "--switch", 0, *more) == 0
    assert run(tmp_path / "y", turbo, "--steps", 2, *more[:2]) == 0
    # one LoRA that is the base's alone is a plain LoRA
    assert run(tmp_path / "z", base, "--base-lora", a, *more) == run(tmp_path / "w", base, "--lora", a, "--switch", 0, *more) == 0
    images = {name: (tmp_path / name / "00000.png").read_bytes() for name in "xyzw"}
    assert images["x"] == images["y"] and images["z"] == images["w"] != images["x"]


def test_several_loras_that_recommend_different_switches_need_one(models, tmp_path, capsys):
    base, _, a, b = models
    assert run(tmp_path / "x", base, "--lora", a, "--lora", f"{b}:0.5") == 2
    assert "recommends no switch: give --switch" in capsys.readouterr().err
