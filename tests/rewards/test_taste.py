"""A taste as a reward: the formula of its file, and files that are refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from trainer.__main__ import main
from trainer.demo import files, world
from trainer.rewards.registry import load, tower_hash, weights_hashes
from trainer.rewards.taste import TasteFile
from trainer.rng import generator
from trainer.runtime.files import files_hash


@pytest.fixture(scope="module")
def taste(tmp_path_factory):
    """A random head on the embedded proxy."""
    path, width = (
        tmp_path_factory.mktemp("taste") / "taste.safetensors",
        files.load_tower("proxy").image_features(torch.rand(1, 3, 64, 64)).shape[1],
    )
    image, product = (torch.randn(width, generator=generator("head", i)) for i in range(2))
    TasteFile(0.4, image, product, "demo-proxy", tower_hash("demo-proxy"), 0.3, 1.7, 30, (0.7, 0.6, 0.8), 1.0).write(path)
    return path


def test_the_reward_is_the_formula_and_its_gradient_reaches_the_pixels(taste):
    spec, head = load(f"taste@{taste}"), TasteFile.read(taste)
    images, prompts = world.real_images(3, 5)
    tower = files.load_tower("proxy")
    with torch.no_grad():
        seen, texts = tower.image_features(images), tower.text_features(prompts)
        expected_score = head.baseline * tower(images, prompts) + seen @ head.image + (seen * texts) @ head.product
        assert torch.allclose(spec.reward(images, prompts), expected_score, atol=1e-5)
        both = spec.reward.scores(images, prompts, ["", "a large "])
        assert torch.allclose(both[:, 1], spec.reward(images, [f"a large {p}" for p in prompts]), atol=1e-5)
    assert (spec.mean, spec.std) == pytest.approx((head.mean, head.std))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(spec.standardised(images, prompts).sum(), images)
    step = 1e-3 * gradient.sign()
    with torch.no_grad():
        moved = (spec.standardised(images + step, prompts) - spec.standardised(images - step, prompts)).sum() / 2
    assert float(moved) == pytest.approx(float((gradient * step).sum()), rel=0.1)


def test_score_takes_the_taste(image_folder, taste, tmp_path):
    assert main(["score", str(image_folder), "--prompt", "a red star", "--reward", f"taste@{taste}", "--out", str(tmp_path / "s.csv")]) == 0
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 9


def test_another_tower_is_refused(taste, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    replace(TasteFile.read(taste), tower="demo-heldout").write(other)
    with pytest.raises(
        ValueError, match="was fitted on demo-heldout of sha256 [0-9a-f]{12}, which here is [0-9a-f]{12}: fit it again here"
    ):
        load(f"taste@{other}")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for name, said in (("taste", "write taste@FILE"), (f"taste@{tmp_path / 'no.safetensors'}", "is not a taste")):
        with pytest.raises(ValueError, match=said):
            load(name)


@pytest.mark.parametrize("tower", ["taste@{file}", "{folder}/evil.py", "http://127.0.0.1:1", "taste", 7])
def test_a_taste_that_names_a_program_a_judge_or_a_taste_as_its_tower_is_refused(taste, tower, tmp_path):
    file, ran = tmp_path / "other.safetensors", tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    tower = tower.format(file=file, folder=tmp_path) if isinstance(tower, str) else tower
    hashed = files_hash([tmp_path / "evil.py"])  # known to who wrote both files
    replace(TasteFile.read(taste), tower=tower, tower_sha256=hashed).write(file)
    for opened in (lambda: load(f"taste@{file}"), lambda: weights_hashes(f"taste@{file}")):
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is not a taste: .*tower"):
            opened()
    assert not ran.exists()


def test_a_tower_that_is_not_here_is_named_with_the_taste(taste, tmp_path):
    other = tmp_path / "other.safetensors"
    for tower in (str(tmp_path / "of another machine"), "pickscore@nowhere.safetensors"):
        replace(TasteFile.read(taste), tower=tower).write(other)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(other))} was fitted on {re.escape(tower)}, which is not here"):
            load(f"taste@{other}")


@pytest.mark.parametrize(
    "edited",
    [
        {"std": 0.0},
        {"mean": math.nan},
        {"baseline": "abc"},
        {"agreement": (math.nan, 0.4, 0.9)},
        {"agreement": (0.9, 0.95, 0.97)},
        {"product": torch.zeros(1)},
        {"image": torch.full((8,), math.nan), "product": torch.zeros(8)},
    ],
)
def test_a_file_that_no_fit_can_have_written_is_refused(taste, tmp_path, edited):
    replace(TasteFile.read(taste), **edited).write(tmp_path / "edited.safetensors")
    with pytest.raises(ValueError, match=r"edited\.safetensors is not a taste: (its|baseline|must be)"):
        TasteFile.read(tmp_path / "edited.safetensors")


def test_weak_tastes_say_so_when_they_are_loaded(taste, caplog):
    head = replace(TasteFile.read(taste), agreement=(0.55, 0.41, 0.69))
    assert "may be chance (0.41): do not train on it" in head.weak and not replace(head, agreement=(0.7, 0.6, 0.8)).weak
    assert "not known" in replace(head, agreement=None).weak
