"""ComfyUIs that lack what some nodes need, and ones newer than those that are tested."""

from __future__ import annotations

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside


@pytest.fixture(scope="module", params=PLACES or [None])
def told(request, tmp_path_factory):
    return run_inside(request.param, "missing.py", cwd=tmp_path_factory.mktemp("missing"))


@comfyui
def test_nothing_is_missing_and_nothing_is_logged_here(told):
    assert told["as it is"] == [] and told["all there"] and not any(told["all there"])


@comfyui
def test_each_symbol_that_is_gone_is_named_with_what_cannot_be_done(told):
    assert len(told["each symbol"]) > 40
    for which, sentence in told["each symbol"].items():
        feature, _, name = which.partition(": ")
        assert sentence is not None and f"cannot {feature} on ComfyUI" in sentence, which
        assert f"{name.replace(':', '.')}" in sentence and sentence.endswith(": update ImageReFL"), sentence


@comfyui
def test_a_changed_signature_is_named(told):
    assert "model_options of comfy.sd.CLIP" in told["another signature"]


@comfyui
@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            "no training",
            {"ImageReFLTrain", "ImageReFLAlignTrain", "ImageReFLTrainLora", "ImageReFLTrainAnyObjective", "ImageReFLOptimiseNoise"},
        ),
        (
            "no switch",
            {"ImageReFLSwitch", "ImageReFLCombinedKSampler", "ImageReFLCombinedGuider", "ImageReFLRangedLora", "ImageReFLSweep"}
            | {"ImageReFLTwoModelGuider"},
        ),
    ],
)
def test_the_nodes_concerned_say_so_and_the_others_work(told, case, names):
    found = told[case]
    assert found["absent"] == [] and found["refused"].keys() == names
    sentence = next(iter(found["refused"].values()))
    assert set(found["refused"].values()) == {sentence} and found["logged"] == [["WARNING", sentence]]


@comfyui
def test_a_newer_comfyui_is_logged_once_as_untested_where_all_is_there(told):
    assert told["newer"] == [["INFO", "ImageReFL: ComfyUI 99.1.2 is newer than the tested 0.33.0; its self-test passed"]]
    assert [level for level, _ in told["newer and lacking"]] == ["WARNING"]
