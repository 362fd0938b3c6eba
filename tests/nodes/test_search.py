"""Reward Search inside a real ComfyUI, against stock sampling."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

METHODS = ("best-of-n", "svdd", "code", "fk", "dlbs", "dsearch")


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def search(request, tmp_path_factory):
    return run_inside(request.param, "search.py", cwd=tmp_path_factory.mktemp("search"))


@comfyui
@pytest.mark.slow
def test_seed_variance_moves_each_image_by_noise_of_its_own_in_the_first_steps(search):
    """Half of the values by half a standard deviation; from one start noise images differ, less than with the noise kept to the end."""
    found = search["seed variance"]
    assert found["alike"] < 1e-5 and 0.01 < found["varied"] < found["to the end"], found
    assert found["of a batch"] < 1e-5 and found["off"]
    assert found["share"] == pytest.approx(0.5, abs=0.02) and found["std"] == pytest.approx(0.5, abs=0.02), found
    assert "has a range of steps already" in found["refused"]


@comfyui
@pytest.mark.slow
def test_candidates_are_scored_without_density_guidance(search):
    """Seven selections: six score E[x0 | x], the last one the image, which is shifted."""
    assert len(search["density"]) == 7 and max(search["density"][:6]) < 1e-5 < 1e-3 < search["density"][6], search["density"]
    assert search["density, image"] < 1e-5


@comfyui
@pytest.mark.slow
def test_best_of_n_is_the_stock_samplers_batch_sorted_with_any_sampler(search):
    assert search["best of n"] == dict.fromkeys(("euler_ancestral", "dpmpp_2m", "euler", "dpmpp_2m_sde", "uni_pc", "heun"), 0.0)
    assert search["code in one block"] == search["the same again"] == search["after a cancelled run"] == 0.0
    assert search["in chunks"] < 1e-4


@comfyui
@pytest.mark.slow
def test_every_method_finds_more_reward_than_plain_sampling_within_its_budget(search):
    """160 model calls of eight steps: what 20 images take."""
    for method in METHODS:
        reward, rows, tree, header, lines = search["methods"][method]
        spent = [int(part.split()[0]) for part in rows[-1].split(", ")]
        assert reward > search["plain"] + 0.3 and 120 <= spent[0] <= 160, (method, reward, search["plain"], spent)
        assert float(rows[0].split("|")[2]) == pytest.approx(reward, abs=1e-3) and len(rows[0].split("|")) == 5
        assert tree == [1, 450, 800, 3] and header == "step,particle,parent,score,survives,log_weight" and lines > 20


@comfyui
@pytest.mark.slow
def test_samplers_that_draw_noise_are_found_by_trying_them(search):
    branching = {name for name, (can, _) in search["samplers"].items() if can}
    assert {"euler_ancestral", "ddpm", "lcm", "dpmpp_2m_sde", "dpmpp_sde", "er_sde", "seeds_2", "res_multistep_ancestral"} <= branching
    assert not branching & {"euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc", "ddim", "deis", "lms"}
    for name, (_, text) in search["svdd"].items():  # eight steps of three children; a second call in each step but the last
        calls = 45 if search["samplers"][name][1] == 2 else 24
        assert text.startswith(f"{calls} model calls, 21 decodes"), (name, text)


@comfyui
@pytest.mark.slow
def test_an_image_to_start_from_and_a_mask_are_heeded(search):
    near, far = search["from an image"]
    outside, inside = search["masked"]
    assert near < 0.8 * far and outside < 1e-5 and inside > 0.1


@comfyui
@pytest.mark.slow
def test_progress_counts_model_calls_and_cancel_is_heeded_within_a_step(search):
    """Eight steps of four candidates, two at a time."""
    assert search["progress"][:2] == [32, [32]] and search["cancelled"] == 5


@comfyui
@pytest.mark.slow
def test_bad_input_gets_a_sentence(search):
    expected = {
        "deterministic": "svdd branches, and sampler euler draws no noise",
        "no noise": "fk branches, and sampler euler_ancestral draws no noise",
        "cfg++": "connect a sampler without CFG++",
        "not to zero": "connect sigmas of at least one step, the last of them 0",
        "no prompt": "scores an image under its prompt: write the prompt",
        "no prompt for a sum": "scores an image under its prompt: write the prompt",
        "two latents": "2 latents: connect one",
        "budget": "a budget of 10 model calls is too small: code with particles 1, children 2 takes 16 in 8 steps",
        "one noise": "connect Random Noise",
        "ess": "ess = 2.0: give at most 1",
        "block": "a block of 9 steps in a run of 8",
    }
    assert search["refused"].keys() == expected.keys()
    for name, message in expected.items():
        assert message in search["refused"][name] and "\n" not in search["refused"][name], (name, search["refused"][name])


@comfyui
@pytest.mark.slow
def test_noise_optimisation_starts_at_the_stock_samplers_image_and_finds_more_reward(search):
    noise = search["noise"]
    assert noise["heeded"] < 1e-4 and noise["first"] < 1e-4 and noise["after"] < 1e-4 and noise["cancelled"] == 5
    for method in ("reno", "carinox", "rotate"):
        reward, lines, plot = noise[method]
        said = float(lines[0].split(" at first, ")[1].split()[0])
        assert reward > noise["plain"] + 0.1 and reward == pytest.approx(said, abs=0.02) and plot == [1, 500, 800, 3], (
            method,
            noise[method],
        )
        assert "(held out)" in lines[1] and "decodes and reward calls" in lines[-1]
    assert noise["progress"] == [[6, 6], True]
    expected = {
        "negative": "cfg 2 needs a negative",
        "gradient": "reno needs rewards with a gradient",
        "levels": "sigmas of at least one step down to 0",
        "range": "iterations = 0: give at least 1",
        "no prompt": "scores an image under its prompt: write the prompt",
        "no prompt for a sum": "scores an image under its prompt: write the prompt",
        "image": "connect an empty latent",
        "mask": "connect an empty latent",
        "area": "positive has area, which noise optimisation does not heed",
        "range of steps": "negative has end_percent",
        "density": "patches that work around its network (predict_noise",
        "guidance": "patches that work around its network (sampler_cfg_function",
        "wrapper": "patches that work around its network (model_function_wrapper",
    }
    assert noise["refused"].keys() == expected.keys()
    for name, message in expected.items():
        assert message in noise["refused"][name] and "\n" not in noise["refused"][name], (name, noise["refused"][name])
