"""A switched model in the stock nodes that people put around a sampler, in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

from trainer.demo import files

WAYS = [
    "regional prompts, area",
    "regional prompts, mask",
    "prompts in ranges of steps",
    "image to image",
    "inpainting",
    "second pass",
    "advanced sampler, start and end",
    "advanced sampler, leftover noise",
    "ControlNet",
    "attention patched on both",
]


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, tmp_path_factory):
    return run_inside(request.param, "composition.py", files.loras()["demo-refl"], cwd=tmp_path_factory.mktemp("composition"))


@comfyui
@pytest.mark.parametrize("way", WAYS)
def test_both_ends_are_the_stock_models_bit_for_bit_and_between_is_neither(told, way):
    tuned_alone, base_alone, finite, apart, models_apart = told[way]
    assert tuned_alone and base_alone and finite
    assert apart > 0.01 and models_apart > 0.01
    assert told["ControlNet acts"] > 0.01
