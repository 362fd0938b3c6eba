"""ComfyUI's own text encoders and autoencoders, at their true sizes, have the names and shapes that split files are read by."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.comfyui import PLACES, comfyui, run_inside
from safetensors.torch import save_file

from trainer.models.comfy_files import _OPTIONAL, _converted, _differences, _wanted
from trainer.models.load import MODELS


@comfyui
@pytest.mark.full
def test_names_of_comfyuis_parts_are_all_known(tmp_path):
    place = PLACES[0]
    if not (place / "comfy" / "text_encoders" / "krea2.py").is_file():
        pytest.skip("this ComfyUI has no Krea 2")
    found = run_inside(place, "part_names.py", cwd=tmp_path)
    assert len(found) == 13
    for key, shapes in found.items():
        model, part = key.split()
        kind, settings = MODELS[model][1].parts[part]
        given = _converted(kind, settings, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        wanted = {name: shape for name, shape in _wanted(kind, json.dumps(settings)).items() if not name.endswith(_OPTIONAL)}
        assert len(wanted) > 150 and {name: tuple(given[name].shape) for name in wanted} == wanted, key
        assert not set(given) - set(_wanted(kind, json.dumps(settings))), key


def test_a_part_of_another_model_is_told_by_its_shapes(tmp_path):
    save_file({"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    assert "weights of AutoencoderKLQwenImage differ" in _differences(tmp_path / "vae.safetensors", *MODELS["krea2"][1].parts["vae"])
