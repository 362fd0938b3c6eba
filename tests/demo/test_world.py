"""The embedded world: captions say what renders show, and the rater measures what it claims to."""

from __future__ import annotations

import random

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from tools.embedded import judge_gates, preference
from trainer.demo import architecture, files, rater, world
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


def test_an_image_is_right_if_it_shows_the_content_that_its_prompt_names_whatever_its_finish():
    seen = {"shape": torch.tensor([[0.6, 0.4, 0, 0, 0, 0], [0.4, 0.6, 0, 0, 0, 0]]), "edge": torch.tensor([[0.1, 0.9], [0.1, 0.9]])}
    assert rater.shows_content(seen, ["a crisp circle", "a crisp circle"]).tolist() == [1, 0]
    assert rater.shows_content(seen, ["a crisp shape", "a square"]).tolist() == [1, 1]


def test_the_raters_utility_has_a_finite_gradient_and_is_what_gold_scores():
    gold, captions = files.load_reward("gold"), world.captions(6, "test gradient")
    images = world.real_renders(captions, 1, 0).requires_grad_()
    utility = gold.utility(images, [c.text for c in captions])
    (gradient,) = torch.autograd.grad(utility.sum(), images)
    assert torch.equal(utility, gold(images.detach(), [c.text for c in captions]))
    assert gradient.isfinite().all() and float(gradient.flatten(1).norm(dim=1).min()) > 0


def test_the_extractor_leaves_the_finish_alone_and_sees_the_layout():
    found = judge_gates.extractor_gates(files.load_extractor().features, world.captions(24, "gates"), per_prompt=8)
    assert found["finish"] >= 0.95 and found["layout"] <= 0.60


def test_the_extractors_features_have_no_common_mean_that_hides_differences():
    features = files.load_extractor().features(world.render(*world.draw_scenes(512, generator("test features"))))
    assert float(features.mean(0).norm()) < 0.2 * float(features.norm(dim=1).mean())
    assert 0.5 < float(features.square().mean()) < 2


def test_correlations_of_the_gates_are_within_a_prompt_and_partial_ones_hold_the_other_parts_fixed():
    offsets = 100 * torch.arange(40).repeat_interleave(8)
    rng = generator("gates")
    first, second = torch.randn(320, generator=rng), torch.randn(320, generator=rng)
    assert judge_gates._correlation(first + offsets, first - offsets, 8) == pytest.approx(1.0)
    score = first + 0.1 * second
    alone = judge_gates._partial(score, {"first": first, "second": second}, 8)
    assert alone["first"] == pytest.approx(1.0) and alone["second"] == pytest.approx(1.0)
    assert judge_gates._correlation(score, second, 8) < 0.3
