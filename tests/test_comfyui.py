"""The embedded model and our LoRAs inside a real ComfyUI, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.lora_file import save_lora
from trainer.policies.unet import Lora, UNetPolicy

ROOT = Path(__file__).parent.parent


def find_comfyui():
    for place in (os.environ.get("COMFYUI_PATH"), ROOT.parent.parent, Path.home() / "comfy" / "ComfyUI"):
        if place and (Path(place) / "comfy" / "sd.py").is_file():
            return Path(place)
    return None


comfyui = pytest.mark.skipif(find_comfyui() is None, reason="skipped: no ComfyUI (set COMFYUI_PATH)")


def run_inside(script, *arguments, cwd):
    """Run a script with ComfyUI first on the path, away from our own `nodes` folder."""
    command = [sys.executable, ROOT / "tests" / "comfyui" / script, find_comfyui(), ROOT, *arguments]
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_lora(pipeline_folder, path, seed, **settings):
    policy = UNetPolicy.load(pipeline_folder)
    policy.add_lora(Lora(rank=4, alpha=8.0, **settings))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=draws))
    save_lora(policy, path, {})
    return path


@comfyui
@pytest.mark.slow
def test_comfyuis_own_classes_give_diffusers_outputs_and_load_every_lora_key(pipeline_folder, tmp_path):
    lora = random_lora(pipeline_folder, tmp_path / "a.safetensors", 7, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"))
    errors = run_inside("same_model.py", pipeline_folder, lora, cwd=tmp_path)
    assert errors["unmatched"] == 0
    assert max(errors["denoised"], errors["decoded"], errors["text"]) < 1e-4
    assert errors["tuned"] < 1e-3 * errors["effect"] and errors["effect"] > 0.01


@pytest.fixture(scope="module")
def exactness(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exactness")
    loras = [random_lora(pipeline_folder, folder / f"{seed}.safetensors", seed) for seed in (7, 8)]
    return run_inside("exactness.py", pipeline_folder, *loras, cwd=folder)


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "two", "styled"])
def test_combined_sampling_equals_two_separate_models(exactness, mode):
    """One set of weights with gated patches, two resident models, and a style LoRA below the reward LoRA."""
    assert exactness[mode] and max(exactness[mode].values()) <= 1e-5, exactness[mode]
    assert exactness["effect"] > 0.01


@comfyui
@pytest.mark.slow
def test_the_ends_are_the_stock_sampler_bit_for_bit_and_the_base_is_left_alone(exactness):
    assert exactness["ends euler"] and exactness["ends dpmpp_2m"] and exactness["base untouched"] and exactness["denoise"]
    assert exactness["stock sampler"] <= 1e-6 and exactness["strength"] <= 1e-5


@comfyui
@pytest.mark.slow
def test_tuned_guidance_of_one_skips_the_negative(exactness):
    """Two images: base steps evaluate positive and negative, tuned steps the positive alone."""
    assert exactness["evaluations"] == [4] * 5 + [2] * 3


@comfyui
@pytest.mark.slow
def test_impossible_switches_are_refused_with_a_reason(exactness):
    expected = {
        "beyond": "lies outside the 8 steps",
        "equal": "the tuned model equals the base",
        "reversed": "the base has a LoRA that the tuned model lacks",
        "not finite": "not finite",
        "flow": "one of base and tuned model is a flow model",
    }
    for name, message in expected.items():
        assert message in exactness["refused"][name], (name, exactness["refused"])


@comfyui
@pytest.mark.slow
def test_comfyui_registers_every_node_with_tooltips_and_a_help_page(exactness):
    assert exactness["registered"] == ["ImageReFLCombinedKSampler", "ImageReFLSwitch"]
    assert exactness["described"]
    assert all((ROOT / "web" / "docs" / f"{name}.md").is_file() for name in exactness["registered"])
