"""Combined KSampler with a schedule for each part, in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, random_lora, run_inside


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return run_inside(request.param, "parts.py", pipeline_folder, random_lora(pipeline_folder, folder / "7.safetensors", 7), cwd=folder)


@comfyui
@pytest.mark.slow
def test_parts_with_schedules_of_their_own_equal_chains_of_stock_samplers(told):
    """Three ways to say where they meet, one sampler or two, both ends; five pairs of samplers; flow models with a shift each."""
    assert told["shifts"][0] > told["shifts"][1] + 0.01
    assert len(told["errors"]) == 22 and told["errors"].pop("effect") > 1e-3
    assert max(told["errors"].values()) < 1e-5, told["errors"]


@comfyui
@pytest.mark.slow
def test_equal_schedules_are_one_bit_for_bit(told):
    assert told["equal"] == dict.fromkeys(["euler", "dpmpp_2m", "heun", "euler_ancestral", "base alone"], True)


@comfyui
@pytest.mark.slow
def test_a_noise_mask_needs_one_sampler(told):
    assert "a noise mask, which needs one sampler for both parts" in told["refused"] and told["nothing"]
