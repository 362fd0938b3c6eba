"""The embedded world: captions say what renders show, and the rater measures what it claims to."""

from __future__ import annotations

import random

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from tools.embedded import preference
from trainer.demo import architecture, rater, world
from trainer.rng import generator


def test_a_caption_names_a_non_empty_true_subset_and_its_words_say_so():
    attributes, _ = world.draw_scenes(300, generator("test"))
    rng = random.Random(0)
    for scene in attributes.tolist():
        caption = world.draw_caption(scene, rng)
        assert caption.named
        for name, value in caption.named.items():
            assert world.ATTRIBUTES[name][scene[list(world.ATTRIBUTES).index(name)]] == value
        assert world.attributes_named(caption.text) == caption.named


def test_completions_keep_what_is_named_and_vary_the_rest():
    caption = world.Caption("a red star", {"colour": "red", "shape": "star"})
    attributes, _ = world.completions(caption, 200, generator("test"))
    assert (attributes[:, 0] == 3).all() and (attributes[:, 1] == 0).all()
    assert all(len(attributes[:, c].unique()) > 1 for c in range(2, 8))


def test_renders_are_images_and_depend_on_scene_and_jitter_alone():
    attributes, jitter = world.draw_scenes(8, generator("test"))
    images = world.render(attributes, jitter)
    assert images.shape == (8, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images[2:5], world.render(attributes[2:5], jitter[2:5]))


def test_a_circles_area_is_its_radius_squared_times_pi():
    scene = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1]])  # large crisp flat red circle, centre, black
    jitter = torch.full((1, 8), 0.5)
    red = world.render(scene, jitter)[0, 0]
    covered = ((red - red[0, 0]) / (red[32, 32] - red[0, 0])).sum()
    radius = 0.92 * float(world.RADIUS[1].mean())
    assert float(covered) == pytest.approx(3.14159 * radius**2, rel=0.02)


@pytest.mark.parametrize(
    ("part", "column", "better", "worse"), [("crisp", 5, 0, 1), ("vivid", 6, 0, 1), ("shaded", 7, 0, 1), ("large", 2, 1, 0)]
)
def test_the_rater_measures_finish_and_size_from_pixels(part, column, better, worse):
    attributes, jitter = world.draw_scenes(400, generator("test"))
    values = []
    for value in (better, worse):
        attributes[:, column] = value
        values.append(rater.measure(world.render(attributes, jitter))[part])
    assert float((values[0] > values[1]).float().mean()) > 0.95


def test_the_rater_sees_artefacts():
    attributes, jitter = world.draw_scenes(100, generator("test"))
    clean = world.render(attributes, jitter)
    noisy = (clean + 0.1 * torch.randn(clean.shape, generator=generator("noise"))).clamp(0, 1)
    assert (rater.measure(noisy)["artefacts"] > rater.measure(clean)["artefacts"] + 0.5).float().mean() > 0.95


def test_choices_are_logistic_with_flips():
    gap = torch.full((200_000,), 1.0)
    chosen = preference.choose(gap, torch.zeros_like(gap), generator("choices")).double().mean()
    expected = (1 - preference.FLIPS) * torch.sigmoid(torch.tensor(1.0)) + preference.FLIPS * 0.5
    assert float(chosen) == pytest.approx(float(expected), abs=0.005)


def test_both_tokenizers_agree_and_keep_words_whole(tmp_path):
    architecture.write_tokenizer(tmp_path)
    clip = architecture.load_tokenizer(tmp_path)
    theirs = SimpleTokenizer(str(tmp_path / "merges.txt.gz"), context_length=77)
    for text in ("a red star, blurred", "vivid, shaded. a large shape on the left", "Une étoile ROUGE?"):
        ids = clip(text).input_ids
        assert theirs([text])[0, : len(ids)].tolist() == ids
    assert len(clip("a red star").input_ids) == 5
    assert len(clip) == architecture.vocabulary_size()
