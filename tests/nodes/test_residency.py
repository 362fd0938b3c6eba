"""Base and tuned model over one set of weights, on every storage that ComfyUI has, in a real ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

STORAGES = ["float32", "float16", "bfloat16", "fp8 e4m3", "fp8 e5m2"]
GGUF = [path for path in (os.environ.get("COMFYUI_GGUF_PATH"),) if path]  # a checkout of city96/ComfyUI-GGUF at 795e451
QUANTISED = ("fp8 scaled", "int8", "nvfp4", "mxfp8")
PATCHES = ["post-CFG", "pre-CFG", "CFG", "unet wrapper", "mask", "attention", "replaced attention", "wrapper"]


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def place(request):
    return request.param


@pytest.fixture(scope="module")
def told(place, tmp_path_factory):
    return run_inside(place, "storages.py", *GGUF, cwd=tmp_path_factory.mktemp("storages"))


@pytest.fixture(scope="module")
def unequal(place, tmp_path_factory):
    return run_inside(place, "unequal.py", cwd=tmp_path_factory.mktemp("unequal"))


@comfyui
def test_the_gate_is_comfyuis_merged_lora_on_every_storage_and_leaves_the_base_bit_identical(told):
    """Off: the base. On: the weights of every layer as ComfyUI merges and rounds them; the bytes of the base before and after.

    Quantised layers multiply without functions in their own arithmetic, which rounds activations too; hence a bound on outputs.
    """
    assert set(STORAGES) < told["storage"].keys() and "fp8 scaled" in told["storage"] and told["problem"] is None
    for name, found in told["storage"].items():
        limit = 0.02 if name.startswith(QUANTISED) else 0.0
        assert found["off"] == 0.0 and found["weights"] == 0.0 and found["on"] <= limit and found["base kept"], (name, found)
        assert 0.01 < found["effect"] < 0.5, (name, found)


@comfyui
def test_a_small_lora_survives_fp8_with_fast_matmul(told):
    """Rounding to nearest keeps 0, 4, 78 and 99.5 % of a LoRA of 0.3, 1, 3 and 10 % of the weight."""
    for size, found in told["fp8 fast"].items():
        assert found["against stock"] == 0.0 and abs(found["share"] - 1) < (0.5 if float(size) < 0.01 else 0.15), told["fp8 fast"]


@comfyui
def test_layers_that_ignore_weight_functions_take_their_tensors_own_patches_or_are_refused(told):
    own = told["own patches"]
    assert own["on"] == 0.0 and own["off"] == 0.0 and own["effect"] > 0.01 and own["base kept"], own
    assert "cannot be changed while it samples: load the base with Load Checkpoint" in told["ignoring"]


@comfyui
@pytest.mark.skipif(not GGUF, reason="skipped: no ComfyUI-GGUF (set COMFYUI_GGUF_PATH)")
def test_gguf_models_are_switched_as_their_own_loader_adds_a_lora(told):
    assert sum(name.startswith("GGUF") for name in told["storage"]) == 2  # compared with the others above


@comfyui
def test_the_gate_is_of_one_network_and_closes_after_an_exception(told):
    assert told["another clone while on"] == 0.0 and told["after an exception"] == 0.0


@comfyui
@pytest.mark.parametrize("patch", PATCHES)
def test_patches_that_one_side_lacks_or_has_otherwise_are_refused(unequal, patch):
    for case in ("refused", "refused, of one kind"):
        assert "patched differently" in unequal[case][patch] and "ahead of Load LoRA" in unequal[case][patch], unequal[case]
    assert unequal["taken, cloned"][patch] == "" and unequal["taken, set twice"][patch] == ""


@comfyui
def test_a_comfyui_that_lacks_what_the_switch_needs_is_named_in_one_sentence(unequal):
    missing, changed = unequal["a symbol is missing"], unequal["a signature has changed"]
    assert "lacks comfy.float.stochastic_rounding: update ImageReFL" in missing, missing
    assert "lacks weight patches as they were (TypeError" in changed and unequal["as it is"] is None, changed
