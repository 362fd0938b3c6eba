"""Graphs saved with version 0.1.0: every node is there, its widgets in their order, and the workflows give that version's images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

DATA = Path(__file__).parent.parent / "data" / "v010"


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def interface(request, tmp_path_factory):
    return run_inside(request.param, "interface.py", DATA / "workflows", cwd=tmp_path_factory.mktemp("interface"))


@comfyui
def test_nodes_keep_their_names_inputs_defaults_outputs_and_the_order_of_widgets(interface):
    for name, then in json.loads((DATA / "expected" / "nodes.json").read_text("utf-8"))["nodes"].items():
        now = interface["nodes"][name]
        assert then["inputs"].items() <= now["inputs"].items(), name
        assert then["defaults"].items() <= now["defaults"].items(), name
        widgets = [[key for key, kind in described["inputs"].items() if kind == "widget"] for described in (then, now)]
        assert widgets[1][: len(widgets[0])] == widgets[0], name  # saved graphs know widgets by position
        assert now["outputs"][: len(then["outputs"])] == then["outputs"], name
        assert then["kinds"].items() <= now["kinds"].items(), name
        for key, (low, high) in then["ranges"].items():  # every value that was valid still is
            assert now["ranges"][key][0] <= low and high <= now["ranges"][key][1], (name, key)
        for key, options in then["options"].items():
            assert set(options) <= set(now["options"][key]), (name, key)
        (list_in, list_out, shows), (now_in, now_out, now_shows) = then["flags"], now["flags"]
        assert now_in >= list_in and shows == now_shows and all(new >= old for old, new in zip(list_out, now_out)), name


@comfyui
def test_the_server_accepts_old_workflows(interface):
    assert interface["errors"] == json.loads((DATA / "expected" / "nodes.json").read_text("utf-8"))["errors"]


@comfyui
def test_old_workflows_run_and_save_the_images_of_their_version(interface):
    expected = json.loads((DATA / "expected" / "images.json").read_text("utf-8"))
    assert interface["ran"] == dict.fromkeys(expected, True)
    for name, images in expected.items():
        assert list(interface["images"][name]) == list(images)
        off = [max(abs(a - b) for a, b in zip(values, interface["images"][name][image])) for image, values in images.items()]
        # of 255; the demo's reward, which one of them trains on, was trained again since
        assert max(off) <= (2.0 if name == "demo-train-imagerefl" else 0.5), (name, off)


@comfyui
def test_the_successor_of_a_training_node_gives_its_lora_bit_for_bit(interface):
    assert interface["successor equal"] is True
