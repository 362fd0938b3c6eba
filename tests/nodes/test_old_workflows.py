"""Graphs saved with version 0.1.0: every node is there, its widgets in their order, and the server accepts the workflows."""

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
