"""How the nodes present themselves in a real ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

from trainer.demo import files


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, tmp_path_factory):
    return run_inside(request.param, "presentation.py", files.loras()["demo-imagerefl"], cwd=tmp_path_factory.mktemp("presentation"))


@comfyui
def test_every_node_is_found_by_other_words_and_large_ones_fold_what_few_people_set(told):
    assert told["without aliases"] == []
    most = ["batch", "lr", "memory", "name", "rank", "resume", "steps"]
    assert sorted(told["shown"]["ImageReFLAlignTrain"]) == most
    assert sorted(told["shown"]["ImageReFLTrain"]) == sorted([*most, "switch_at"])
    assert sorted(told["shown"]["ImageReFLTrainLora"]) == sorted(
        ["batch_size", "learning_rate", "memory", "name", "rank", "resume", "switch_at", "train_steps"]
    )
    assert told["deprecated"] == ["ImageReFLAlignTrain", "ImageReFLTrain"]


@comfyui
def test_the_lora_of_a_finished_run_is_in_the_list(told):
    assert told["runs"] == ["run: my run"] and told["path"]
    assert told["unfinished"] == "run: unfinished has no LoRA: its run is not finished; resume it"


@comfyui
def test_a_file_that_changes_under_its_name_is_loaded_again(told):
    assert told["fingerprints"] == [True, False]


@comfyui
def test_the_sampler_says_where_it_switched(told):
    (auto, node), (first, _), (last, _) = told["drawn"]
    assert auto.startswith("tuned from step 5 of 8 on (σ ") and node == "7"
    assert (first, last) == ("tuned model alone", "base model alone")


@comfyui
def test_preferences_are_asked_for_written_and_loaded(told):
    found = told["choosing"]
    assert found["passed on"] and found["said"] == ["2 new questions in mine", "0 new questions in mine; 5 images were asked about before"]
    assert found["told"][0] == ["imagerefl.taste", {"name": "mine"}]
    assert found["record"] == ["a red star", "ann", [5, 5], "sd15.safetensors"] and found["metadata"] == []
    assert found["connected"] == ["another", [9] * 4, "best"] and found["kept metadata"] == ["prompt", "workflow"]
    assert found["listed"] == ["taste: mine"]
    assert found["loaded"] == ["a red star", True, "1 cut off, or not a JSON object (line 3), 1 ties (line 2)"]
    refused = found["refused"]
    assert "outside ComfyUI's input and output" in refused["link"] and "no sampler" in refused["no prompt"]
    assert refused["empty prompt"] == "no prompt for these images (it is empty): connect its text to prompt"
    assert refused["name"] == "name: give 1 to 64 letters, digits, _ and -" and "not finite" in refused["not finite"]


@comfyui
def test_with_several_users_choices_are_those_of_the_tab_that_queued(told):
    unknown, own, listed, outside = told["choosing"]["users"]
    assert "reload the page" in unknown and own and listed == [] and "Unknown user" in outside


@comfyui
def test_subgraph_blueprints_have_nodes_inputs_and_choices_that_exist(told):
    names = ["Combined Generation (Reward LoRA)", "Score and Pick Best", "Train, Save and Preview Both"]
    assert told["blueprints"] == {name: [] for name in names}
    assert {"ImageReFLLoadReward: no input nothing", "ImageReFLScore: images is not connected"} <= set(told["broken"]), told["broken"]


@comfyui
def test_help_pages_have_the_inputs_and_outputs_of_their_nodes(tmp_path):
    """`python tests/nodes/comfyui/help_pages.py COMFYUI . write` writes them."""
    assert run_inside(PLACES[0], "help_pages.py", cwd=tmp_path) == []
