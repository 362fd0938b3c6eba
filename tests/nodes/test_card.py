"""The nodes in a ComfyUI server on a card, `make test-gpu`: ComfyUI streams weights there, and computes in the types of the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.comfyui import PLACES, SCRIPTS, comfyui, run_inside
from helpers.hosts import ROOT, environment

from trainer.data import images

pytestmark = pytest.mark.full
CARD = os.environ.get("TEST_DEVICE", "").startswith("cuda")
FLAGS = ["", "--disable-dynamic-vram", "--disable-dynamic-vram --lowvram", "--novram", "--disable-dynamic-vram --force-fp32"]


def run(flags, files, out):
    """Every graph of card.py on a server of these flags, by name."""
    command = [sys.executable, SCRIPTS / "card.py", PLACES[0], ROOT, files, out, *flags]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    return {row.pop("graph"): row for row in rows}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    assert len(run_inside(PLACES[0], "card_files.py", folder, cwd=folder)) == 6
    return folder


@comfyui
@pytest.mark.skipif(not CARD, reason="skipped: no card (set TEST_DEVICE=cuda:0)")
@pytest.mark.parametrize("flags", FLAGS)
def test_every_graph_runs_on_the_card(flags, files, tmp_path):
    """Demo templates, searches, the switch on seven storages against a chain of stock samplers, and training on each of them."""
    if "dynamic" in flags and "--disable-dynamic-vram" not in (PLACES[0] / "comfy" / "cli_args.py").read_text("utf-8"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    found = run(flags.split(), files, tmp_path / "card")
    assert found.pop("start")["devices"][0].startswith("cuda")
    streamed = "--novram" in flags  # there training is refused
    trains = {name for name in found if "train" in name or "noise" in name}
    for name in trains if streamed else ():
        assert found.pop(name)["why"].endswith("as training needs: start ComfyUI without --novram")
    assert {name: row for name, row in found.items() if row["ended"] != "success"} == {}
    for name, row in found.items():
        if name.startswith("storage"):
            # weights that are streamed ComfyUI does not round to fp8 once a LoRA is in them
            assert row["off"] < (0.5 if "fp8" in name else 0.03) * row["effect"] and row["finite"], (name, row)
        if name.startswith("training"):
            assert row["finite"] and row["moved"] > 0, (name, row)
    if "--force-fp32" in flags:
        run(["--cpu"], files, tmp_path / "cpu")
        drawn = ("base-to-few-steps", "combined-generation", "two-checkpoints", "train-imagerefl")  # the last by what is trained, too
        paths = [path for name in drawn for path in sorted((tmp_path / "cpu").glob(f"demo-{name}-*.png"))]
        off = [float((images.load(tmp_path / "card" / path.name, 64) - images.load(path, 64)).abs().mean()) for path in paths]
        assert len(off) > 30 and max(off) < 0.003, torch.tensor(off)
