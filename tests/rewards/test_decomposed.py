"""The decomposed two-tower reward against LongAlign's formula in numpy, its identities, and its files."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from trainer.__main__ import main
from trainer.demo import files
from trainer.rewards.decomposed import CommonText, Decomposed, common_direction, damped, sentences
from trainer.rewards.registry import load, load_reward, tower_hash, weights_hashes

PROMPTS = ["a red star", "a small blue ring", "a crisp green square", "a yellow circle on black"]
LONG = "a red star. a small blue ring; a crisp green square! is it a yellow circle?"


@pytest.fixture(scope="module")
def tower():
    return files.load_tower("proxy")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def made(tower, path, omega=0.3, segments=False, prompts=PROMPTS):
    CommonText.of(tower, "demo-proxy", tower_hash("demo-proxy"), prompts, omega, segments).write(path)
    return path


def test_the_score_is_longaligns(tower, images, tmp_path):
    """By hand in numpy: unit features, m̂ the mean's direction, t' = t − (1 − ω)(t·m̂)m̂, never normalised again."""
    path = made(tower, tmp_path / "c.json", 0.3)
    given = ["a red star", "a vivid blue cross", "a red star"]
    t, v = (f.detach().double().numpy() for f in (tower.text_features(given), tower.image_features(images)))
    every = tower.text_features(PROMPTS).double().numpy()
    m = every.mean(0) / np.linalg.norm(every.mean(0))
    expected = [tower.scale * float((t[i] - 0.7 * (t[i] @ m) * m) @ v[i]) for i in range(3)]
    np.testing.assert_allclose(load(f"relevant@{path}").reward(images, given).numpy(), expected, atol=2e-5)
    irrelevant = load(f"irrelevant@{path}").reward
    np.testing.assert_allclose(irrelevant(images, given).numpy(), tower.scale * v @ m, atol=2e-5)
    assert not irrelevant.needs_prompt and max(abs(np.subtract(expected, tower(images, given).numpy()))) > 1
    prefixed = load(f"relevant@{path}").reward.scores(images, given, ["", "crisp. "])
    direct = load(f"relevant@{path}").reward(images, ["crisp. " + p for p in given])
    torch.testing.assert_close(prefixed[:, 1], direct, atol=1e-5, rtol=0)


def test_omega_1_leaves_the_score_and_omega_0_leaves_nothing_along_the_common_direction(tower, images, tmp_path):
    given = ["a red star", "a vivid blue cross", "two rings"]
    whole = load(f"relevant@{made(tower, tmp_path / 'one.json', 1.0)}").reward(images, given)
    torch.testing.assert_close(whole, tower(images, given), atol=1e-5, rtol=0)
    t = tower.text_features(PROMPTS).double()
    m = common_direction(t)
    assert float(m.norm()) == pytest.approx(1, abs=1e-12)
    assert float((damped(t, m, 0.0) @ m).abs().max()) < 1e-12 and float((t @ m).min()) > 0.9
    torch.testing.assert_close(damped(t, m, 0.3) @ m, 0.3 * (t @ m))
    torch.testing.assert_close(damped(t, m, 0.0) + (t @ m)[:, None] * m, t)


def test_gradients_reach_the_pixels_and_are_the_formulas(tower, images, tmp_path):
    pixels = images.clone().requires_grad_(True)
    reward = load(f"relevant@{made(tower, tmp_path / 'c.json')}").reward
    (found,) = torch.autograd.grad(reward(pixels, PROMPTS[:3]).sum(), pixels)
    (plain,) = torch.autograd.grad(tower(pixels, PROMPTS[:3]).sum(), pixels)
    common = common_direction(tower.text_features(PROMPTS))
    along = tower.scale * ((tower.text_features(PROMPTS[:3]) @ common) * (tower.image_features(pixels) @ common)).sum()
    (irrelevant,) = torch.autograd.grad(along, pixels)
    torch.testing.assert_close(found, plain - 0.7 * irrelevant, atol=1e-5, rtol=1e-3)
    assert float(found.norm()) > 1e-3


def test_a_long_prompts_score_is_the_mean_over_its_sentences(tower, images, tmp_path):
    parts = ["a red star.", "a small blue ring;", "a crisp green square!", "is it a yellow circle?"]
    assert sentences(LONG, lambda text: True) == parts and sentences("3.5 stars", lambda text: True) == ["3.5 stars"]
    assert sentences("", lambda text: True) == [""]
    reward = load(f"relevant@{made(tower, tmp_path / 's.json', 1.0, True)}").reward
    each = torch.stack([tower(images, [part] * 3) for part in parts]).mean(0)
    torch.testing.assert_close(reward(images, [LONG] * 3), each, atol=1e-5, rtol=0)


def test_no_segment_is_cut_and_no_word_is_lost(tower):
    text = "one two. " + " ".join(f"word{i}" for i in range(60)) + ". end"
    parts = sentences(text, lambda part: tower.cut(part) == 0)
    assert " ".join(parts) == text and len(parts) > 3 and max(tower.cut(part) for part in parts) == 0 < tower.cut(text)
    assert all(tower.cut(f"{a} {b.split()[0]}") > 0 for a, b in pairwise(parts[1:-1]))  # none is cut early


def test_prompts_are_encoded_before_the_text_tower_leaves(tower, images, tmp_path):
    reward = load_reward(f"relevant@{made(tower, tmp_path / 's.json', 0.3, True)}", False)
    reward.place("cpu", [LONG, "a red star"])
    asked = []
    reward.tower.encode_prompt = lambda text: asked.append(text)
    assert reward(images[:2], [LONG, "a red star"]).shape == (2,) and asked == []


def test_the_file_is_made_by_the_command_and_every_change_is_named(tower, images, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    out = tmp_path / "c.json"
    assert main(["rewards", "common", "demo-proxy", str(tmp_path / "prompts.txt"), "--out", str(out), "--omega", "0.5"]) == 0
    assert "along the common direction by 0.9" in capsys.readouterr().out
    assert load(f"relevant@{out}").reward.file.omega == 0.5
    assert weights_hashes(f"relevant@{out}")[f"relevant@{out}"] != weights_hashes("demo-proxy")["demo-proxy"]
    broken = json.loads(out.read_text())
    (tmp_path / "reward.py").write_text("raise SystemExit('run')\n")
    for change, message in (
        ({"tower_sha256": "0" * 64}, "make it again here"),
        ({"common": [1.0, 1.0]}, "its direction has the length 1.41"),
        ({"omega": 2}, "omega is 2"),
        ({"tower": str(tmp_path / "reward.py")}, "is not a two-tower reward"),
        ({"tower": f"relevant@{tmp_path / 'bad.json'}"}, "is not a two-tower reward"),
        ({"tower": "demo-gold", "tower_sha256": tower_hash("demo-gold")}, "is not a two-tower reward"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**broken, **change}))
        with pytest.raises(ValueError, match=message):
            load(f"relevant@{tmp_path / 'bad.json'}")
    with pytest.raises(ValueError, match="write relevant@FILE"):
        load("relevant")
    with pytest.raises(FileNotFoundError, match="rewards common"):
        load(f"irrelevant@{tmp_path / 'none.json'}")
    for arguments, message in ((["demo-gold"], "is not a two-tower reward"), (["demo-proxy", "--omega", "2"], "a share of 0 to 1")):
        assert main(["rewards", "common", arguments[0], str(tmp_path / "prompts.txt"), "--out", str(out), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err


def test_a_decomposed_reward_wraps_a_tower_that_stays_as_it_was(tower, images):
    before = tower(images, PROMPTS[:3])
    Decomposed(tower, CommonText.of(tower, "demo-proxy", "", PROMPTS, 0.0, False), "relevant")(images, PROMPTS[:3])
    assert torch.equal(tower(images, PROMPTS[:3]), before)
