"""The Two-Model Guider in a real ComfyUI: against the papers' formulas over two models that share nothing, and the stock guider."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, random_lora, run_inside

REFUSED = {
    "equal models": "the tuned model equals the base",
    "another family": "one of base and tuned model is a flow model",
    "sum": "custom: coefficients '1: 0.5, 0.6' sum to 1.1: they must sum to 1",
    "no table": "no coefficients: write rows",
    "power": "aig.power = 0.0: give at least 0.01",
    "auto": "switch auto needs a LoRA that says where to switch",
    "no such switch": "switch 'late': write a step (15), a percentage (75%)",
    "beyond": "switch at step 9 of 8",
    "no step": "no step of the 8 lies from start 0.5 to end 0.5",
    "rising": "noise levels rise in this run",
    "tuned_cfg": "rl does not read tuned_cfg: set it to 1",
    "one model": "rl needs two models: connect tuned, or choose npo, chats or custom",
    "proxy of rl": "rl has no coefficient on proxy_prompt with these settings: leave it unconnected",
    "proxy of 0": "chats has no coefficient on proxy_prompt",
    "loser": "the LoRA of tuned is CHATS's loser: connect the model with the winner to tuned, that with the loser to base",
    "two negatives": "has 2 parts: connect one prompt",
    "lengths": "(77, 128) and (50, 128) have no sum",
    "no padding": "(20, 128) and (10, 128) have no sum",
    "masked": "masks the padding of its prompts",
    "pooled": "one of positive and negative has a pooled embedding",
    "switched": "the base model is a switch already",
}


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guides")
    loras = [random_lora(pipeline_folder, folder / f"{seed}.safetensors", seed) for seed in (7, 8)]
    return run_inside(request.param, "guides.py", pipeline_folder, *loras, cwd=folder)


@comfyui
@pytest.mark.full
def test_every_guide_equals_its_formula_over_two_separate_models_in_seven_samplers(told):
    """LoRAs over one set of weights, two checkpoints, and NPO's negative model with two LoRAs."""
    assert len(told["shared"]) == 6 * 7 and len(told["two"]) == 6 * 2
    assert max(told["shared"].values()) <= 1e-5, told["shared"]
    assert max(told["two"].values()) <= 1e-5 and told["npo, mixed weights"] <= 1e-5, told
    assert told["effect"] > 5e-3


@comfyui
@pytest.mark.full
def test_identities_hold_bit_for_bit(told):
    assert len(told["equal"]) == 14 and all(told["equal"].values()), told["equal"]
    finite, effect = told["custom"]
    assert finite and effect > 0.01


@comfyui
@pytest.mark.full
def test_patches_of_guidance_run_over_the_whole_mix(told):
    """On one model NPO has the stock guider's two branches: Rescale CFG, APG, CFG-Zero* and CFG-Norm give its images."""
    found = told["patches"]
    for name in ("RescaleCFG", "APG", "CFGZeroStar", "CFGNorm"):
        assert found[name] == 0 and found[f"{name} matters"] > 1e-3, found
        assert min(found[f"{name} on {guide}"] for guide in ("rl", "npo", "autoguidance")) > 1e-4, found


@comfyui
@pytest.mark.full
def test_a_model_without_a_coefficient_is_not_evaluated(told):
    """Rows of each call: two images; guidance doubles them, and each model is one call."""
    assert list(told["calls"].values()) == [[2] * 16, [4] * 16, [4] * 8, [2] * 8]


@comfyui
@pytest.mark.full
def test_previews_cancel_and_failures_are_as_in_the_stock_sampler(told):
    assert [step for step, _, _ in told["previews"]] == list(range(8)) and told["preview made"]
    assert {tuple(shape) for _, shape, _ in told["previews"]} == {(2, 4, 8, 8)}
    assert told["untouched by InterruptProcessingException"] and told["untouched by RuntimeError"]
    assert told["asked for Cancel"] >= 16  # before each model of each step


@comfyui
@pytest.mark.full
def test_guides_that_cannot_be_are_refused_with_a_reason(told):
    assert told["refused"].keys() == REFUSED.keys()
    for name, message in REFUSED.items():
        assert message in told["refused"][name], (name, told["refused"])


@comfyui
@pytest.mark.full
def test_a_proxy_prompt_is_the_far_side_of_the_negative(told):
    """Longer embeddings meet shorter ones repeated; pooled embeddings too; the rest is the positive's."""
    shape, pooled, area, error = told["proxy"]
    assert shape == [1, 154, 128] and pooled == pytest.approx(-0.5) and area == 1 and error < 1e-6


@comfyui
@pytest.mark.full
def test_density_guidance_acts_on_what_any_guider_predicts(told):
    """By hand in double precision: the stock guider in three samplers, a flow model, and over RL guidance."""
    assert len(told["density"]) == 5 and max(told["density"].values()) <= 1e-5, told["density"]
    assert told["density matters"] > 1e-3 and told["density 0.5"]


@comfyui
@pytest.mark.full
def test_noise_has_the_median_length_times_the_scale(told):
    """√(N − 2/3) is the median of chi with N = 256 degrees of freedom to 1e-4; the direction is that of the noise given."""
    lengths, turned = told["noise"]
    assert lengths == pytest.approx([1.1 * (256 - 2 / 3) ** 0.5] * 3, rel=1e-4) and turned < 0.05 and told["noise as drawn"]
