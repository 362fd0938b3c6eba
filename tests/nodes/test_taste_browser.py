"""Collect Preferences in Chromium, on both kinds of nodes."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from importlib.util import find_spec

import pytest
from helpers.comfyui import PLACES, comfyui, run_inside

from trainer.__main__ import main
from trainer.taste.choices import read_choices

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not (CHROMIUM and find_spec("playwright")), reason="skipped: no Chromium (set CHROMIUM), or no playwright")


@comfyui
@browser
@pytest.mark.full
@pytest.mark.parametrize("look", ["classic", "vue"])
def test_choosing_by_keyboard_and_mouse_a_reload_undo_and_two_tabs(look, tmp_path, capsys):
    if look == "vue" and [int(part) for part in metadata.version("comfyui-frontend-package").split(".")[:2]] < [1, 30]:
        pytest.skip("skipped: the first Nodes 2.0 drew no widgets of packs")
    found = run_inside(PLACES[0], "taste_browser.py", tmp_path / "shots", look, cwd=tmp_path)
    assert found["asked"] == {
        "said": "4 open · no choice yet",
        "prompt": "a large star on a grey background",
        "loaded": 2,
        "focused": False,
    }
    assert found["keys without focus"] == {"open": 4}
    assert found["left, down, 2"] == {"chosen": 2, "tie": 1, "open": 1}
    assert found["reloaded"]["said"] == "1 open · 2 chosen, 1 tie" and found["reloaded"]["loaded"] == 2
    assert found["undo"] == {"chosen": 1, "tie": 1, "open": 2}
    assert found["the other tab"] == ["1 open · 2 chosen, 1 tie"] * 2
    assert found["both at once"] == {"chosen": 3, "tie": 1, "open": 0}
    assert set(found["said"]) <= {"0 open · 3 chosen, 1 tie", "that question was answered in another tab"}
    assert found["others"] == [{"chosen": 1, "open": 1}, {"liked": 1, "disliked": 1, "skip": 1, "open": 5}]
    assert found["deleted"] == {"open": 0} and found["page errors"] == []
    assert found["saved with the graph"] == ["likes", "like or dislike", 4, "", False]
    assert found["red"] == {"chosen": 20, "open": 0}
    choices = read_choices(tmp_path / "shots" / "taste-choices.jsonl")
    assert [one.outcome for one in choices.records] == ["chosen", "tie", "chosen", "chosen"] and len(choices.ids) == 5 and not choices.cut
    # the head that they fit; 20 choices between 40 stars, of which the redder was always taken
    red = tmp_path / "shots" / f"taste-{look}-red" / "choices.jsonl"
    assert main(["taste", str(red), "--tower=demo-proxy", f"--out={tmp_path / 'red.safetensors'}"]) == 0
    assert (tmp_path / "red.safetensors").is_file() and capsys.readouterr().out.count("20")
