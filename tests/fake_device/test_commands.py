"""Sampling, scoring and evaluating on the fake device, to the CPU's images and figures."""

from __future__ import annotations

import csv
import json

import torch
from fake_device.runs import on_cpu, on_fake, same_numbers

from trainer.data import images
from trainer.demo import files


def on_both(tmp_path, *arguments, out):
    """Run a command on both devices; returns where each has written."""
    written = []
    for device, run in (("cpu", on_cpu), ("fake", lambda *given: on_fake("mps", *given))):
        (tmp_path / device).mkdir()
        written.append(tmp_path / device / out)
        run(*arguments, "--out", written[-1])
    return written


def test_images_are_those_of_the_cpu(tmp_path):
    lora = files.loras()["demo-imagerefl"]
    prompts = ["--prompt", "a red star", "--prompt", "a blue ring", "-n", "2", "--steps", "5"]
    written = on_both(tmp_path, "sample", "--lora", lora, "--switch", "2", *prompts, out="images")
    names = sorted(path.name for path in written[0].glob("*.png"))
    assert len(names) == 4 and names == sorted(path.name for path in written[1].glob("*.png"))
    for name in names:
        expected, found = (images.load(folder / name, 64) for folder in written)
        assert float(expected.std()) > 0.05
        torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255, msg=lambda text, name=name: f"{name}: {text}")


def test_scores_are_those_of_the_cpu(image_folder, tmp_path):
    rewards = [word for name in ("demo-proxy", "demo-heldout", "demo-gold") for word in ("--reward", name)]
    written = on_both(tmp_path, "score", image_folder, *rewards, out="scores.csv")
    tables = [list(csv.DictReader(path.read_text().splitlines())) for path in written]
    assert len(tables[0]) == 8
    for expected, found in zip(*tables):
        for name in ("demo-proxy", "demo-heldout", "demo-gold"):
            same_numbers(float(found[name]), float(expected[name]), name)


def test_an_evaluation_is_that_of_the_cpu(image_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    given = ["--prompts", tmp_path / "prompts.txt", "-n", "2", "--steps", "3", "--real", image_folder]
    rewards = ["--reward", "demo-heldout", "--reward", "demo-gold", "--switches", "0,2"]
    loras = [word for name, file in files.loras().items() for word in ("--lora", f"{name}={file}")]
    expected, found = (json.loads(path.read_text()) for path in on_both(tmp_path, "evaluate", *loras, *given, *rewards, out="judged.json"))
    assert len(expected["points"]) == 4 and expected["reference"] == "real images" and expected["points"][0]["fid"] > 0
    same_numbers(found, expected)
