"""A new reward is one file and one row of the table: every command then knows it."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import settings

from trainer.__main__ import main
from trainer.data import images
from trainer.rewards import registry

SOURCE = Path(__file__).parent / "warmth.py"
ROW = 'REWARDS["warmth"] = Entry(lambda *_: Warmth(), "none needed", "tests/rewards/warmth.py")'


@pytest.fixture
def warmth(monkeypatch):
    """The file as if it lay in trainer/rewards/, and its row in the table."""
    spec = importlib.util.spec_from_file_location("trainer.rewards.warmth", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry.REWARDS, "warmth", None)  # which takes the row out again
    exec(ROW, {**vars(registry), "Warmth": module.Warmth})


def test_a_reward_is_a_file_of_at_most_thirty_lines_and_a_row(warmth, image_folder, tmp_path, capsys):
    assert len(SOURCE.read_text().splitlines()) + len(ROW.splitlines()) <= 30
    assert main(["rewards", "list"]) == 0
    assert "warmth" in capsys.readouterr().out
    assert main(["score", str(image_folder), "--reward", "warmth", "--out", str(tmp_path / "s.csv")]) == 0
    with open(tmp_path / "s.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        red, _, blue = (images.load(Path(row["path"]), 224).mean((1, 2))).tolist()
        assert float(row["warmth"]) == pytest.approx(red - blue, abs=5e-3)
        assert float(row["warmth_z"]) == pytest.approx((float(row["warmth"]) - 0.05) / 0.15, abs=1e-3)
    assert len(rows) == 8


def test_it_trains_alone_and_in_a_sum_and_is_planned(warmth, pipeline_folder, image_folder, tmp_path, capsys):
    alone = settings(pipeline_folder, "warmth", image_folder, tmp_path / "alone", steps=1)
    assert main(["train", *alone]) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "alone" / "log.jsonl").read_text().splitlines())
    assert line["grad_norm"] > 0 and torch.isfinite(torch.tensor(line["reward"]))
    both = settings(pipeline_folder, "warmth=1, demo-proxy=0.5", image_folder, tmp_path / "both", steps=1)
    assert main(["train", *both, "--plan"]) == 0
    assert "total" in capsys.readouterr().out and not (tmp_path / "both").exists()
