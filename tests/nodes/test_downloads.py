"""The node that downloads a reward's weights, in a real ComfyUI, from a hub that is a dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: Path(place).parent.name if place else "none")
def told(request, tmp_path_factory):
    return run_inside(request.param, "downloads.py", cwd=tmp_path_factory.mktemp("downloads"))


@comfyui
def test_nothing_is_fetched_before_the_licence_is_accepted(told):
    assert "set accept_licence to download" in told["not accepted"] and "is under" in told["not accepted"]
    assert told["asked for without"] == []


@comfyui
def test_cancel_stops_a_download_and_leaves_no_half_file(told):
    assert told["cancelled"].startswith("InterruptProcessingException") and told["left"] == []


@comfyui
def test_files_are_recorded_and_verified(told):
    assert told["accepted"] and all(Path(path).name for path in told["accepted"])
    assert told["again"] == told["accepted"] and told["asked again"] == 0
    assert "has changed since it was downloaded" in told["changed"]
