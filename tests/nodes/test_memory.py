"""Memory of a training in a graph, inside a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

from trainer.models.flux import FluxPolicy
from trainer.models.sd3 import SD3Policy
from trainer.models.sdxl import SDXLPolicy
from trainer.models.unet import UNetPolicy


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def memory(request, tmp_path_factory):
    return run_inside(request.param, "memory.py", cwd=tmp_path_factory.mktemp("memory"))


@comfyui
@pytest.mark.full
@pytest.mark.parametrize("family", ["demo", "sdxl", "flux"])
def test_the_plan_of_a_graph_is_what_a_real_step_takes(memory, family):
    """Bytes of tensors at the peak of a step, as given and with every memory setting."""
    for mode in ("as given", "small"):
        planned, counted = memory[f"{mode}, {family}"]
        assert planned == pytest.approx(counted, rel=0.02), (mode, planned, counted)
    assert memory[f"small, {family}"][1] < 0.8 * memory[f"as given, {family}"][1]


@comfyui
@pytest.mark.full
def test_previews_are_decoded_in_parts(memory):
    """Eight images of 1024², of 512², and of 64² pixels."""
    assert memory["decoded at a time"] == [1] * 8 + [4, 4] + [8]


@comfyui
@pytest.mark.full
def test_a_graph_without_the_widget_runs_as_before(memory):
    report, config = memory["absent"]
    assert "; memory" not in report and memory["fast is as without"] == 0
    assert (config["batch_size"], config["reward_dtype"], config["gradient_checkpointing_denoiser"]) == (4, "float32", False)


@comfyui
@pytest.mark.full
def test_balanced_takes_settings_until_the_run_fits_and_small_takes_all(memory):
    assert "; memory balanced: settings as given; " in memory["fits as given"][0]
    report, config = memory["small"]
    assert "memory small: images are decoded one at a time, the denoiser is computed twice" in report, report
    assert "the reward is computed twice" in report and "rounds the reward, batches in 4 parts; " in report
    assert config["vae_slicing"] and config["gradient_checkpointing_denoiser"] and config["offload_encoders"]
    assert (config["batch_size"], config["gradient_accumulation_steps"], config["reward_dtype"]) == (1, 4, "bfloat16")
    some, config = memory["some"]
    assert " GB planned of " in some and config["reward_dtype"] == "float32" and config["batch_size"] == 4, some
    assert config["gradient_checkpointing_denoiser"] or config["vae_slicing"], some
    assert memory["some is as fast"] < 1e-2


@comfyui
@pytest.mark.full
def test_what_does_not_fit_is_refused_before_the_first_step(memory):
    for mode, other in (("nothing fits", "small"), ("small does not fit", "fast")):
        said, config = memory[mode]
        assert said.startswith("not enough memory: this run takes ") and said.count(". ") == 0, said
        assert "reduce width and height, image_size or rank" in said and f"set memory to {other} to try" in said and not config


@comfyui
@pytest.mark.full
def test_a_resumed_run_keeps_its_settings(memory):
    """The run that was made last, whatever the device has now."""
    report, config = memory["resumed"]
    assert "as the run began" in report and config["batch_size"] == memory["some"][1]["batch_size"]
    assert config["gradient_checkpointing_denoiser"] == memory["some"][1]["gradient_checkpointing_denoiser"]


@comfyui
@pytest.mark.full
def test_prompts_are_conditioned_for_each_size_and_few_stay_on_the_device(memory):
    """A prompt of two buckets, and 100 prompts after it."""
    other_size, same_size = memory["SDXL's size conditioning"]
    assert other_size > 0.1 and same_size == 0 and memory["prompts on the device"] == 65


@comfyui
@pytest.mark.full
def test_a_resumed_run_is_planned_too(memory):
    """What does not fit is refused; of the settings that it did not begin with it takes those that keep its result."""
    said, _ = memory["resumed, does not fit"]
    assert said.startswith("not enough memory: this run takes ") and " GB planned of " in memory["resumed"][0], memory["resumed"]
    report, config = memory["resumed, small"]
    assert "as the run began; now also " in report and " GB planned of " in report, report
    assert config["vae_slicing"] and config["gradient_checkpointing_denoiser"] and config["gradient_checkpointing_reward"]
    assert (config["batch_size"], config["reward_dtype"]) == (4, "float32")


@comfyui
@pytest.mark.full
def test_images_count_by_their_latents_and_by_the_pixels_of_the_vae(memory):
    """Mean and deviation of 4×8×8 numbers each, in float32."""
    assert memory["latents of 1000 images"] == pytest.approx(2 * 4 * 8 * 8 * 4 * 1000, rel=1e-3)
    assert memory["pixels at 16 per latent"] == [128, 128]
    units = {"demo": UNetPolicy, "sdxl": SDXLPolicy, "flux": FluxPolicy, "sd3": SD3Policy}  # as of headless buckets, at 8 pixels per latent
    assert {name: memory[f"unit, {name}"] for name in units} == {name: 8 * policy.patch for name, policy in units.items()}


@comfyui
@pytest.mark.full
def test_a_model_that_cannot_be_planned_trains_and_says_so(memory):
    report, config = memory["balanced, not planned"]
    assert "memory balanced: settings as given; not planned (ZeroDivisionError" in report and config["batch_size"] == 4
    report, config = memory["small, not planned"]
    assert "not planned (ZeroDivisionError" in report and config["reward_dtype"] == "bfloat16" and config["vae_slicing"]


@comfyui
@pytest.mark.full
def test_offloading_moves_the_held_out_reward_only_to_judge_and_puts_all_back(memory):
    """The trained one encodes its prompts first: two of the evaluation, one more, and the empty one of no wording."""
    (name, device, texts), *rest = memory["moves"]
    assert (name, device) == ("trained", "cuda:0") and texts >= 3
    inside = [["held-out", "cuda:0", 2], "judged", ["held-out", "cpu"]]
    assert rest == [["held-out", "cpu"], *inside, ["trained", "cpu"], ["held-out", "cpu"]]
