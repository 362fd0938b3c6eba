"""The routes of the choices on a real ComfyUI server; test_taste_route.py attacks them without one, in more ways."""

from __future__ import annotations

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_inside(PLACES[0], "taste_live.py", cwd=tmp_path_factory.mktemp("taste"))


@comfyui
@pytest.mark.full
def test_nothing_outside_the_folder_is_read_or_changed(told):
    found = told["attacked"]
    assert found["changed outside"] == [] and found["open"] == 2
    expected = {"names": [400], "origins": [403], "simple": [415], "huge": [413], "raw": [400, 404], "link": [400], "own address": [200]}
    assert found["codes"] == expected


@comfyui
@pytest.mark.full
def test_choices_are_those_of_the_user_whose_tab_queued(told):
    found = told["users"]
    assert found["nobody"] == [[403, None], [403, None]] and "reload the page" in found["unknown tab"]
    assert (found["queued"], found["open"], found["told"]) == ("execution_success", [[200, 1], [200, 0]], [{"name": "taste"}])
