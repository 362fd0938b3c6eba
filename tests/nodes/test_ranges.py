"""LoRAs in ranges of steps, and what a sampling run keeps of them, in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, random_lora, run_inside

EXPECTED = {
    "empty steps": "no step lies from 4 to 4: give start before end",
    "fraction": "give shares of the steps, from 0 to 1",
    "noise levels": "give start, the higher noise level, above end",
    "beyond": "lies outside the 8 steps",
    "auto": "load one trained by ImageReFL",
    "zero": "changes nothing",
    "two checkpoints": "load the LoRA on one of the models that go into it",
    "below two checkpoints": "a LoRA in a range works on one set of weights",
    "no step in a share": "no step of the 8 lies from fraction 0.5 to 0.51",
    "no step before the end": "no step of the 8 lies from step 8 to the end",
    "rising noise levels": "noise levels rise in this run",
    "merge at half strength": "the tuned model is a merge of models",
    "same below both": "the tuned model equals the base",
}


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    loras = [random_lora(pipeline_folder, folder / f"{seed}.safetensors", seed) for seed in (7, 8)]
    return run_inside(request.param, "ranges.py", pipeline_folder, *loras, cwd=folder)


@comfyui
@pytest.mark.slow
def test_loras_in_ranges_equal_chains_of_stock_samplers_with_merged_loras(told):
    """Early, late, between, overlapping, below and over a switch, and switches in either direction."""
    assert len(told["errors"]) == 15 and told["errors"].pop("effect") > 0.01
    assert max(told["errors"].values()) <= 5e-6, told["errors"]
    assert told["base kept"] and told["hook's effect"] > 0.01


@comfyui
@pytest.mark.slow
def test_patched_weights_are_computed_once_a_run_as_far_as_memory_allows(told):
    """Three sets of 56 weights in seven of eight evaluations; the images are the same bit for bit however much is kept."""
    assert told["weights"] == [56, 56, 56]
    size, found = told["bytes"], told["computed"]
    assert found["all"] == [168, 3 * size, True] and found["one set"] == [168, size, True] and found["none"] == [392, 0, True]
    computed, most, same = found["a tenth"]
    assert 168 < computed < 392 and 0 < most <= size // 10 and same, found


@comfyui
@pytest.mark.slow
@pytest.mark.parametrize("end", ["RuntimeError", "InterruptProcessingException"])
def test_nothing_is_kept_after_a_run_that_was_stopped(told, end):
    during, gone, base_is_untouched = told[f"after {end}"]
    assert during == [0, 56, 56] and gone and base_is_untouched and not told["kept after"]


@comfyui
@pytest.mark.slow
def test_ranges_that_cannot_be_are_refused_with_a_reason(told):
    assert told["refused"].keys() == EXPECTED.keys()
    for name, message in EXPECTED.items():
        assert message in told["refused"][name], (name, told["refused"])
