"""Download Reward in a real ComfyUI, from a hub on this machine: consent, progress, Cancel and hashes."""

from __future__ import annotations

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside


@pytest.fixture(scope="module", params=PLACES or [None], ids=lambda place: place.parent.name if place else "none")
def told(request, tmp_path_factory):
    return run_inside(request.param, "download.py", cwd=tmp_path_factory.mktemp("download"))


@comfyui
@pytest.mark.slow
def test_nothing_is_asked_of_the_hub_before_the_licence_is_accepted(told):
    text, blocked, requests, folder_exists = told["not accepted"]
    assert "licence MIT (code; card: none)" in text and "model.safetensors of yuvalkirstain/PickScore_v1" in text
    assert blocked.startswith("pickscore is not downloaded: read its licence") and requests == 0 and not folder_exists


@comfyui
@pytest.mark.slow
def test_cancel_in_the_middle_of_a_file_stops_the_download_and_leaves_no_part_of_it(told):
    had_begun, in_time, files, parts, _ = told["cancelled"]
    assert any("incomplete" in part for part in told["before Cancel"])
    assert had_begun and in_time and files == [] and parts == []


@comfyui
@pytest.mark.slow
def test_a_download_is_whole_recorded_and_not_repeated(told):
    name, files, parts, same, text, progress = told["downloaded"]
    assert name == "pickscore" and files == ["pickscore/model.safetensors", "pickscore/model.safetensors.json"] and same
    assert not any("incomplete" in part for part in parts) and "33.6 MB, into " in text and progress == [2**25, 2**25]
    assert told["recorded"] == [True, "c" * 40] and told["again"] == ["pickscore", "pickscore", 0]
    assert told["connects to Load Reward Model"] == [True, []]


@comfyui
@pytest.mark.slow
def test_changed_weights_and_an_unreachable_hub_are_one_sentence(told):
    message, kept = told["changed"]
    assert message.startswith("yuvalkirstain/PickScore_v1 now has another model.safetensors (sha256 ") and not kept
    assert told["no hub"].startswith("cannot download ImageReward.pt of THUDM/ImageReward: ") and "\n" not in told["no hub"]
