"""Sampling, scoring and evaluating as a user strings them together."""

from __future__ import annotations

import csv
import json

import pytest

from trainer.__main__ import main


@pytest.mark.slow
def test_train_then_sample_then_score_then_evaluate(tmp_path, capsys, monkeypatch):
    run, images = tmp_path / "run", tmp_path / "images"
    small = ["--steps=2", "--batch_size=2", "--images=demo", f"--out={run}", "--objective.name=imagerefl", "--objective.steps=20"]
    ranges = ["--objective.grad_from=12", "--objective.grad_to=19", "--objective.start_from=12", "--objective.start_to=12"]
    assert main(["train", *small, *ranges]) == 0
    lora = run / "lora.safetensors"
    assert main(["sample", "--lora", str(lora), "--prompt", "a red star", "-n", "2", "--out", str(images)]) == 0
    out = capsys.readouterr().out
    assert "tuned from step 12 to 20 of 20" in out  # auto: the level that training started from, as the LoRA's metadata says
    early = ["sample", "--lora", str(lora), "--prompt", "a red star", "--out", str(tmp_path / "early")]
    assert main([*early, "--switch", "10%", "--until", "2"]) == 2
    assert "no step lies between --switch, step 2, and --until, step 2" in capsys.readouterr().err
    assert main(["sample", "--prompt", "a red star", "--out", str(images)]) == 2
    assert "exists: add --overwrite" in capsys.readouterr().err
    assert main(["sample", "--lora", str(lora), "--prompt", "a red star", "--strength", "1e30", "--out", str(tmp_path / "black")]) == 2
    assert "values that are not finite" in capsys.readouterr().err and not list((tmp_path / "black").glob("*.png"))
    assert (
        main(["sample", "--prompt", "a red star", "-n", "1", "--steps", "2", "--out", str(tmp_path / "black")]) == 0
    )  # nothing was drawn into it
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["sample", "--prompt", "a red star", "-n", "1", "--steps", "2", "--out", "."]) == 0
    assert (tmp_path / "here" / "00000.png").is_file() and (tmp_path / "here-grid.png").is_file()
    assert main(["score", str(images), "--reward", "demo-proxy", "--reward", "demo-gold", "--out", str(tmp_path / "s.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert len(rows) == 2 and {"path", "prompt", "demo-proxy", "demo-gold"} < set(rows[0]) and rows[0]["prompt"] == "a red star"
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    judged = tmp_path / "judged.json"
    arguments = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "-n",
        "2",
        "--reward",
        "demo-heldout",
        "--out",
        str(judged),
        "--switches",
        "0,12",
    ]
    assert main(["evaluate", "--lora", f"mine={lora}", *arguments]) == 0
    results = json.loads(judged.read_text())
    assert [(p["model"], p["k"]) for p in results["points"]] == [("mine", 0), ("mine", 12)] and "mine" in results["frontier"]
