"""From choices to a head, its report and its file."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.taste import compare, random_design

from trainer.__main__ import main
from trainer.data.images import load as load_image
from trainer.demo import files, world
from trainer.rewards.registry import load_reward, weights_hashes
from trainer.rewards.taste import TasteFile
from trainer.taste.comparisons import Gathered, gather
from trainer.taste.fit import Rated, fitted, rated, under_prompts


def test_the_command_writes_a_reward_and_its_report(judged, taste, capsys):
    report = json.loads(taste.with_suffix(".json").read_text())
    assert report["choices"] == 16 and report["level"] == "prompt and image" and report["tower"] == "demo-proxy"
    assert 0.5 < report["agreement"]["value"] <= 1 and report["agreement"]["low"] < report["agreement"]["value"]
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(taste)]) == 2
    assert "exists: add --overwrite" in capsys.readouterr().err
    other = judged / "other.safetensors"
    other.with_suffix(".json").write_text("mine")
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(other)]) == 2
    assert "other.json exists: add --overwrite" in capsys.readouterr().err and other.with_suffix(".json").read_text() == "mine"


@pytest.mark.full
def test_the_command_gives_the_same_bytes_again(judged, taste, capsys):
    before = taste.read_bytes()
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(taste), "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "16 choices under 16 prompts" in said and "of held-out choices, as permuted images do in" in said
    assert taste.read_bytes() == before


def test_the_fit_of_the_file_orders_pairs_as_the_design_did(judged, taste):
    found = gather([judged / "choices.jsonl"])
    reward = load_reward(f"{taste}", True)
    assert weights_hashes(str(taste)).keys() == {str(taste)}
    known = rated(files.load_tower("proxy"), found.comparisons)
    design, head = known.design(found.comparisons), TasteFile.read(taste)
    logits = design.logits(design.fitted(head.precision), torch.arange(16))
    scores = [
        [float(reward(load_image(image.path, 64)[None], [one.prompt])) for image in (one.better, one.worse)] for one in found.comparisons
    ]
    ours = torch.tensor([a - b for a, b in scores]) * head.std
    assert torch.allclose(ours.double(), logits, atol=2e-3)


def test_features_under_prompts_are_the_towers_score():
    tower, (images, prompts) = files.load_tower("proxy"), world.real_images(4, 1)
    with torch.no_grad():
        features = under_prompts(tower, tower.image_features(images).double(), prompts)
        assert torch.allclose(features.score.float(), tower(images, prompts), atol=1e-4)


@pytest.mark.parametrize(
    ("person", "choices", "first"),
    [("bob", 20, 1.0), *(pytest.param(*one, marks=pytest.mark.full) for one in (("ann", 40, 0.5), ("", 60, 2 / 3)))],
)
def test_of_a_person_the_report_counts_what_that_person_chose(person, choices, first, monkeypatch):
    monkeypatch.setattr("trainer.taste.curve.REPEATS", 1)
    monkeypatch.setattr("trainer.taste.curve.FRACTIONS", (0.5, 1.0))
    features, better, worse, _ = random_design(60, torch.tensor([4.0, -3, 0, 0, 0, 0], dtype=torch.float64))
    bob = torch.arange(60) % 3 == 0  # of the opposite taste
    rows = torch.stack([torch.where(bob, worse, better), torch.where(bob, better, worse)], 1).tolist()
    found = Gathered([compare(f"{a}", f"{b}", f"p{i}", person="ann" if i % 3 else "bob") for i, (a, b) in enumerate(rows)])
    found.places += [(i % 2, 2, "ann") for i in range(40)] + [(0, 2, "bob")] * 20
    known = Rated(features, *torch.tensor(rows).unbind(1), [(f"{i}", f"p{i % 60}") for i in range(120)])
    head, report = fitted(found, known, "tower", person)
    assert (report.choices, report.prompts, report.units, report.person) == (choices, choices, choices, person)
    assert (report.consistency.first.value, report.mixture.prototypes) == (pytest.approx(first), 2)
    assert (report.agreement.low > 0.5) == bool(person), report.agreement  # the mean head knows neither of two opposite people
    design = known.design(found.comparisons)
    right = (design.logits(head, torch.arange(60)) > 0).double()
    assert not person or float(right[bob if person == "bob" else ~bob].mean()) > 0.8


def test_choices_of_pairs_that_were_asked_next_are_learnt_from_and_not_counted(judged, tmp_path, capsys):
    lines = (judged / "choices.jsonl").read_text().splitlines(keepends=True)
    files = [judged / "first.jsonl", judged / "asked.jsonl"]
    for path, part in zip(files, (lines[:10], lines[10:])):
        path.write_text("".join(part))
    found = gather(files[:1], asked=files[1:])
    assert [one.asked for one in found.comparisons].count(True) == 6 and len(found.comparisons) == 16
    whole, files[0] = judged / "choices.jsonl", judged / "turned.jsonl"
    files[0].write_text("".join(reversed(lines[:10])))
    assert gather(files[:1]).comparisons == [one for one in gather([whole]).comparisons if one in gather(files[:1]).comparisons]
    arguments = ["--tower", "demo-proxy", "--out", str(tmp_path / "t.safetensors")]
    assert main(["taste", str(files[0]), "--asked", str(files[1]), *arguments]) == 0
    said = capsys.readouterr().out
    assert "16 choices under 16 prompts, 6 of them asked next and not counted below" in said and "95 % by 10 groups" in said
    assert main(["taste", "--asked", str(files[0]), *arguments, "--overwrite"]) == 2
    assert "give files of choices" in capsys.readouterr().err
