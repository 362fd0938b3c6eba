"""Lists of images of several sizes, blank prompts, and what is not finite, through the scoring and judging nodes in a real ComfyUI."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

BLOCKED = "Pick Best has no latents: connect the latents that its images were decoded from"


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: place.parent.name if place else "none")
def told(request, tmp_path_factory):
    return run_inside(request.param, "lists.py", cwd=tmp_path_factory.mktemp("lists"))


@comfyui
@pytest.mark.parametrize("case", ["sizes", "sizes, batches", "a prompt per batch"])
def test_images_of_several_sizes_score_as_each_does_alone_in_their_order(told, case):
    scores, alone = told[case]
    assert len(set(alone)) == len(alone) > 2 and scores == pytest.approx(alone, abs=1e-4)


@comfyui
@pytest.mark.parametrize("case", ["in a list", "line", "lines at the end", "lines between", "last line"])
def test_a_blank_prompt_keeps_its_place(told, case):
    """Blank lines that make prompts too many are no prompts: those at the end first, then those between."""
    scores, expected = told[f"blank {case}"]
    assert len(set(expected)) == len(expected) >= 2 and scores == pytest.approx(expected, abs=1e-4)


@comfyui
def test_a_blank_prompt_beside_one_other_is_not_replaced_by_it(told):
    listed, lines, expected = told["blank beside one"]
    assert listed == pytest.approx(expected, abs=1e-4) and lines == pytest.approx(expected, abs=1e-4)


@comfyui
def test_a_broken_image_has_no_score_and_the_others_keep_theirs(told):
    scores, raw, mean, table, text, alone = told["not finite"]
    assert [math.isnan(x) for x in scores] == [math.isnan(x) for x in raw] == [False, True, True, False]
    assert [scores[0], scores[3]] == pytest.approx([alone[0], alone[3]], abs=1e-4) and mean == pytest.approx(
        (alone[0] + alone[3]) / 2, abs=1e-4
    )
    assert "| 1 | nan | nan |" in table and "image 1 is not finite and ranks last" in text and "image 2 is not finite" in text


@comfyui
def test_what_cannot_be_scored_or_picked_is_refused_in_a_sentence(told):
    assert told["none finite"] == "ValueError: no image is finite: look at the node that made the images"
    assert told["no finite score"] == "ValueError: reward 'nan demo-proxy' gives no image a finite score: connect another"
    assert told["an empty list"] == "ValueError: an empty list of images: connect at least one image"
    shape = told["three dimensions"]
    assert shape.startswith("ValueError: an image of shape (") and "(batch, height, width, colours)" in shape
    assert told["bytes"].startswith("ValueError: an image of torch.uint8: ComfyUI's hold floats from 0 to 1")
    assert [Path(root).parts[-2:] for root in told["no folder of rewards"]] == [("models", "rewards")]
    assert told["pick of NaN alone"].startswith("ValueError: none of 2 images is finite and has a finite score: look at the node")
    assert told["diversity of one"] == "ValueError: prompt 'b' has one image: diversity needs at least two"


@comfyui
def test_pick_best_gives_one_batch_of_one_size_and_a_list_of_several(told):
    """Latents keep their noise masks and batch indices; none is dropped where only some have a mask."""
    listed, batch = told["pick of sizes"], told["pick of one size"]
    assert listed["right"] and listed["indices"] == [1, 2, 3] and [one["batch_index"] for one in listed["latents"]] == [[1], [2], [3]]
    assert [one["samples"] for one in listed["latents"]] == [[1, 4, 8, 12], [1, 4, 8, 8], [1, 4, 10, 8]]
    assert [one["noise_mask"] for one in listed["latents"]] == [[1, 64, 96], [1, 64, 64], [1, 80, 64]]
    assert batch["right"] and batch["latents"] == [{"samples": [2, 4, 8, 8], "batch_index": [1, 2]}]
    assert [one.get("noise_mask") for one in told["pick, a mask on one"]["latents"]] == [[1, 64, 64], None]


@comfyui
def test_pick_best_never_takes_what_is_not_finite(told):
    scores, image = told["pick beside NaN"], told["pick beside a broken image"]
    assert scores["right"] and scores["indices"] == [3, 1] and scores["scores"] == [1.0, 0.5]
    assert "image 0 has no finite score and ranks last\nimage 2 has no finite score" in scores["text"]
    assert image["right"] and image["indices"] == [0] and "image 1 is not finite and ranks last" in image["text"]


@comfyui
def test_without_latents_what_is_connected_to_them_stops_with_a_sentence_and_the_images_go_on(told):
    assert told["pick without latents"]["latents"] == BLOCKED and told["pick without latents"]["right"]
    sizes, scores, stopped = told["executed"]
    assert sorted(sizes) == [[64, 64], [64, 64], [64, 80]] and scores == sorted(scores, reverse=True)
    assert stopped == [["VAEDecode", f"Execution Blocked: {BLOCKED}"]]


@comfyui
def test_saved_files_are_numbered_through_all_sizes_and_a_broken_image_is_left_out(told):
    assert told["saved"] == [
        ["64_00001_.png", [64, 64], 1.0],
        ["96_00001_.png", [96, 64], 2.0],
        ["64_00002_.png", [64, 80], None],
        ["64_00003_.png", [64, 64], 5.0],
        "image 2 is not finite and is not saved",
    ]


@comfyui
@pytest.mark.parametrize("case", ["of sizes", "beside NaN", ", blank line"])
def test_diversity_of_a_list_is_that_of_its_images(told, case):
    """Expected: mean colours as features, written out pair by pair."""
    value, table, text, expected = told[f"diversity {case}".replace(" ,", ",")]
    assert expected > 0.01 and value == pytest.approx(expected, abs=1e-5)
    assert ("image 1 is not finite and is left out" in text) == (case == "beside NaN")
    assert ("|  | 2 |" in table) == (case == ", blank line")


@comfyui
def test_distances_take_lists_and_the_demos_extractor_any_size(told):
    assert max(map(abs, told["distance of lists"][0])) < 1e-3 and told["diversity, the demo's extractor"] > 0.1
    assert told["distance, said"].endswith("4 images against 4\nreference image 0 is not finite and is left out")


@comfyui
def test_a_reward_gets_images_on_the_device_of_its_own_network(told):
    assert told["device"] == [[0.0] * 4, ["meta"]]


@comfyui
def test_the_folder_of_rewards_keeps_what_another_pack_registered(told):
    assert told["folder, theirs"] == [2, "/theirs", [".bin", ".pt", ".safetensors"]]
    assert told["folder, any"] == [2, "/theirs", []]  # no extension: ComfyUI takes any
    assert told["folder, new"] == [1, [".safetensors"]]


@comfyui
def test_an_http_judge_scores_and_is_cancelled_while_it_hangs(told):
    found = told["judged"]
    scores, expected = found["scores"]
    assert scores == pytest.approx(expected, abs=3e-3) and len(set(scores)) == 4  # Pillow rounds the grey of each pixel
    assert found["is"] == ["brightness", False, True, True, ["brightness", "demo-proxy"]]
    assert found["fingerprint"] and found["gone"] and found["empty"].startswith("url is empty: start a judge")
    assert found["remote"].endswith("forward its port to 127.0.0.1, or start ComfyUI with IMAGEREFL_ALLOW_REMOTE=1")
    assert found["zero"].startswith("every weight is 0")
    seconds, still = found["cancelled"]
    assert seconds < 5 and not still
