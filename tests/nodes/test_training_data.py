"""Training in a graph against the headless trainer, in one process: a step's gradient, and runs on a captioned folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

pytestmark = [comfyui, pytest.mark.slow]


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, pipeline_folder, tmp_path_factory):
    return run_inside(request.param, "gradient.py", pipeline_folder, cwd=tmp_path_factory.mktemp("gradient"))


@pytest.fixture
def folder(told):
    return told["folder"]


@pytest.fixture
def pairs(told):
    return told["pairs"]


def test_one_step_in_a_graph_has_the_headless_gradient(told):
    assert told["modules"] > 50 and told["latents"] < 1e-4
    assert all(told[name] < 1e-3 for name in ("refl", "guided", "imagerefl", "draft-k", "srpo", "sqdf")), told


def test_a_captioned_folder_trains_as_the_command_does(folder):
    """Three sizes, two folders with repeats; the posterior's deviation, which ComfyUI drops, is in the latents."""
    graph, headless = folder["log"]
    assert len(graph) == len(headless) == 4
    for ours, theirs in zip(graph, headless):
        assert ours == pytest.approx(theirs, abs=2e-5), (graph, headless)
    error, size = folder["lora"]
    assert error < 5e-3 and size > 0.1, folder["lora"]


def test_a_resumed_run_reads_its_latents_from_the_disk_and_keeps_its_result(folder):
    assert folder["encoded again"] == [] and folder["resumed, cached"] == 0.0
    expected = "cached was trained on other images or captions than input/stars has now: restore them, or choose a new run"
    assert folder["refused"]["a caption changed"] == expected
    assert "written with another buckets: True, now False" in folder["refused"]["buckets changed"]


def test_the_report_says_what_was_taken_and_left_out_and_in_which_sizes(folder):
    assert folder["said"] == folder["report"].splitlines()[1]
    assert folder["said"] == (
        "read 4 images, 4 captions, 6 samples from input/stars; left out: 1 not an image (notes.md), 1 text without an image (lonely.txt)"
    )
    sizes, few = folder["report"].splitlines()[-2:]
    assert sizes == "samples by width×height: 80×48: 3, 56×72: 2, 64×64: 1"
    assert few == "fewer than batch_size, so that its images repeat: 64×64: 1"


def test_folders_with_captioned_images_are_offered_and_other_packs_keep_what_they_registered(folder):
    """A folder that is a link is not followed."""
    stars = ["input/stars", "input/stars/1_blue", "input/stars/2_red"]
    linked = ["input/inside", "input/linked", "input/linked caption", "input/linked folder", "input/linked twice", "input/no caption"]
    assert folder["folders"] == ["input/10_flat", *linked, *stars, "imagerefl_datasets/deep", "imagerefl_datasets/deep/er"]
    paths, extensions = folder["registered"]
    assert len(paths) == 2 and any(path.endswith("registered") for path in paths) and extensions == [".foreign"]


@pytest.mark.parametrize("case", ["a link/secret", "../elsewhere/secret", "stars/../../elsewhere/secret", "absolute"])
def test_a_path_that_is_not_in_the_list_is_refused(folder, case):
    assert "is not in the list: choose one below ComfyUI's input or output folder" in folder["refused"][case]


@pytest.mark.parametrize(
    ("case", "link"), [("linked", "i.png"), ("linked caption", "j.txt"), ("linked folder", "more"), ("linked twice", "more")]
)
def test_links_that_lead_out_are_refused_and_others_are_read(folder, case, link):
    assert folder["refused"][case].startswith(f"input/{case}: {link} is a link that leads to "), folder["refused"][case]
    assert folder["linked from within"] == ["a square", "linked from within"]


def test_a_change_of_content_alone_runs_the_node_again(folder):
    """Another caption, and another file that is not taken."""
    assert folder["fingerprint"] == [False, True]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("both", "images and dataset are both connected: disconnect one of them"),
        ("prompts", "clear prompts, a dataset has its own captions"),
        ("no size", "image_size = 0 keeps the size of images, which a dataset cannot"),
        ("odd size", "image_size = 60: this model takes multiples of 8 pixels, 56 say"),
        ("tiny size", "image_size = 4: buckets of this model have sides of 8 pixels and more"),
        ("changed meanwhile", "input/stars changed after Captioned Folder read it: queue again"),
        ("no data", "no prompt: write one per line"),
        ("no caption", "o.png has no caption: write one into o.txt beside it"),
    ],
)
def test_data_that_contradict_each_other_get_a_sentence(folder, case, message):
    assert message in folder["refused"][case] and "\n" not in folder["refused"][case]


def test_a_blank_caption_is_a_caption(folder):
    """Of two images: the first line blank, a blank last line, one for both, blank lines between."""
    assert folder["captions of two images"] == [["", "a star"], ["a star", "a star"], ["a star", "a star"], ["a", "b"]]


@pytest.mark.parametrize("name", ["diffusion-dpo", "unsafe dpo", "diffusion-kto", "mapo", "diffusion-npo", "chats"])
def test_one_step_on_pairs_in_a_graph_has_the_headless_gradient(told, name):
    assert told["preferences"][name] < 1e-3 and told["preferences"][f"norm of {name}"] > 1, told["preferences"]


def test_pairs_train_in_a_graph_as_the_command_does(pairs):
    """Made in the graph, saved, and loaded there and by the command."""
    graph, headless = pairs["log"]
    assert len(graph) == len(headless) == 4 and graph == pytest.approx(headless, abs=2e-5), pairs["log"]
    error, size = pairs["lora"]
    assert error < 5e-3 and size > 0.1, pairs["lora"]
    assert pairs["report"].splitlines()[-1] == "3 pairs of 6 images, 64×64 pixels"
    assert pairs["likes"].splitlines()[-1] == "3 liked and 3 disliked images, 64×64 pixels"
    assert pairs["captions"].startswith("1 step in")
    assert pairs["two"] == [["run: two", "run: two (loser)"], [f"imagerefl/two/{stem}.safetensors" for stem in ("lora", "lora-loser")]]


def test_pairs_are_made_filtered_saved_and_loaded(pairs):
    number, shape, report = pairs["made"]
    assert (number, shape) == (3, [3, 128, 256, 3]) and pairs["best and worst"], pairs["made"]
    assert report.splitlines()[:2] == [
        "kept 3 of 9 pairs: 3 for training (3 prompts)",
        "dropped: 6 beyond the number per prompt, 1 image alone under their prompt",
    ]
    every, kept, held, said = pairs["filtered"]
    assert every >= kept + held and held == 1 and pairs["sides"] and "order" in said and "held-out demo-heldout prefers" in said
    assert pairs["saved"] == ["output/imagerefl_pairs/_a_b", "output/imagerefl_pairs/_a_b_2"] and pairs["loaded"]
    assert pairs["tables"] == ["input/out pairs.csv", *(f"{folder}/pairs.jsonl" for folder in pairs["saved"])]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no pairs", "DiffusionDPO trains on pairs of a better and a worse image: connect Make Pairs or Load Pairs to pairs"),
        ("nothing at all", "DiffusionDPO trains on pairs of a better and a worse image: connect Make Pairs or Load Pairs to pairs"),
        ("same heldout", "heldout is demo-proxy, and demo-proxy is trained on, so that it rises with over-optimisation: connect another"),
        ("heldout in a sum", "heldout is demo-proxy, and demo-proxy is trained on"),
        ("images too", "pairs and images or a dataset are connected"),
        ("prompts too", "pairs is connected and prompts are written: clear prompts"),
        ("another objective", "pairs is connected: choose an objective on pairs or likes"),
        ("one image", "batch_size = 1: an image is compared with the mean of its micro-batch, give at least 2"),
        ("odd size", "images of 60×60 pixels: this model takes multiples of 8, give image_size, 64 say"),
        ("other pairs", "dpo was trained on other pairs: connect those, or choose a new run"),
        ("nothing held out", "there are no pairs: nothing was held out, or all were filtered"),
        ("outside", "input/out pairs.csv names "),
        ("not listed", "'../secret/pairs.csv' is not in the list"),
        ("alone", "prompt 'a' has one image, as each prompt has: a pair is two images of one prompt"),
        ("no prompt", "an image has no prompt: images are compared under one prompt, which training needs too"),
        ("twice", "reward demo-proxy is connected twice"),
        ("held out", "heldout is demo-proxy, which ranks the images too"),
        ("copies", "no pair: 1 image alone under their prompt, 9 equal scores"),
        ("no scale", "no mean and standard deviation are known for compressibility, in which several rewards are compared"),
        ("margin", "no pair is left: 3 margin too small"),
        ("no features", "diversity_weight is set: distances of prompts need a two-tower reward"),
        ("unscored", "no reward scored them"),
    ],
)
def test_what_pairs_cannot_be_is_one_line(pairs, case, message):
    assert message in pairs["refused"][case] and "\n" not in pairs["refused"][case], pairs["refused"][case]


def test_a_heldout_reward_is_trained_on_by_its_weights_too(pairs):
    """A part without a weight is not; a run that was made so goes on, and says it."""
    assert pairs["apart"] == ["", "", "demo-proxy"]
    assert "warning: heldout is demo-proxy, and demo-proxy is trained on" in pairs["resumed with it"]


def test_what_the_trainer_warns_of_is_in_the_report(pairs):
    """AWM with an optimizer step for each of two images of a round."""
    assert "\nwarning: an optimizer step takes 1 of a round's 2 samples, and AWM has no" in pairs["warned"], pairs["warned"]
    assert "warning" not in pairs["report"]


def test_pairs_are_made_of_grey_images_and_of_those_with_alpha(pairs):
    assert pairs["channels"] == [True, True, [3, 128, 256, 3]]
