"""The head fitted to choices: its optimum, its prior, its folds, and what the report says of choices that no head could learn."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from trainer.__main__ import main
from trainer.data.images import to_pil
from trainer.demo import files, world
from trainer.rewards.registry import load, load_reward, weights_hashes
from trainer.rewards.taste import TasteFile
from trainer.rng import generator
from trainer.taste.agreement import agreement, correct, learning_curve, wilson
from trainer.taste.choices import append, choice, save_image
from trainer.taste.comparisons import Comparison, Gathered, Image, gather, once
from trainer.taste.consistency import consistency
from trainer.taste.fit import under_prompts
from trainer.taste.folds import Keys, folds
from trainer.taste.following import expected, information, questions
from trainer.taste.head import PRECISIONS, Design, Features, best_precision
from trainer.taste.prototypes import fit_mixture


def random_features(n, width=6):
    draw = lambda name: F.normalize(torch.randn(n, width, generator=generator("taste", name), dtype=torch.float64), dim=1)  # noqa: E731
    image, text = draw("image"), draw("text")
    return Features(image, text, 5 * (image * text).sum(1))


def random_design(n=40, taste=None, ties=()):
    """n pairs of 2n images; with a taste (D,) the better image is the one that it scores higher."""
    features = random_features(2 * n)
    better, worse = torch.arange(n), torch.arange(n) + n
    if taste is not None:
        swap = features.image[better] @ taste < features.image[worse] @ taste
        better, worse = torch.where(swap, worse, better), torch.where(swap, better, worse)
    tied = torch.zeros(n, dtype=torch.bool)
    tied[list(ties)] = True
    return features, better, worse, Design.of(features, better, worse, tied, torch.ones(n))


def test_newton_reaches_the_optimum_of_the_formula_written_out_over_all_columns():
    features, better, worse, design = random_design(ties=(3, 7))
    theta = (design.basis @ design.fitted(2.0)).requires_grad_()
    score, image, met = (
        features.score / design.scales[0],
        features.image / design.scales[1],
        features.image * features.text / design.scales[2],
    )
    reward = (1 + theta[0]) * score + image @ theta[1:7] + met @ theta[7:]
    logit = reward[better] - reward[worse]
    outcome = torch.ones(40).double()
    outcome[[3, 7]] = 0.5
    loss = F.binary_cross_entropy_with_logits(logit, outcome, reduction="sum") + theta.square().sum()  # λ/2 = 1
    (gradient,) = torch.autograd.grad(loss, theta)
    assert float(gradient.abs().max()) < 1e-8
    scales = [float((columns[better] - columns[worse]).square().sum(1).mean()) for columns in (score[:, None], image, met)]
    assert scales == pytest.approx([1, 1, 1], abs=1e-9)  # each block has the unit of the prior


def test_without_choices_and_under_an_endless_prior_the_head_is_the_tower():
    _, _, _, design = random_design()
    for beta in (design.fitted(math.inf), design.fitted(1.0, torch.arange(0))):
        assert torch.equal(design.logits(beta, torch.arange(40)), design.offset)
    weak, strong = (float(design.fitted(precision).norm()) for precision in (0.1, 300.0))
    assert weak > 10 * strong


def test_a_tie_says_the_same_in_either_order():
    features = random_features(20)
    a, b, ties = torch.arange(10), torch.arange(10) + 10, torch.tensor([True] * 4 + [False] * 6)
    one = Design.of(features, a, b, ties, torch.ones(10))
    other = Design.of(features, torch.where(ties, b, a), torch.where(ties, a, b), ties, torch.ones(10))
    assert torch.allclose(one.basis @ one.fitted(1.0), other.basis @ other.fitted(1.0), atol=1e-9)


def test_choices_that_are_the_towers_own_keep_it_and_another_taste_does_not():
    keys = [Keys(str(i), (i, 1000 + i)) for i in range(120)]
    taste = torch.tensor([3.0, -2, 0, 0, 0, 0], dtype=torch.float64)
    _, _, _, clear = random_design(120, taste)
    assert best_precision(clear, folds(keys).parts) < 1
    features, first, second, design = random_design(120)
    likes = torch.rand(120, generator=generator("toss")) < torch.sigmoid(design.offset)
    better, worse = torch.where(likes, first, second), torch.where(likes, second, first)
    noise = Design.of(features, better, worse, torch.zeros(120) > 0, torch.ones(120))
    assert best_precision(noise, folds(keys).parts) >= 30 and PRECISIONS[-1] == math.inf


@pytest.mark.parametrize(
    ("keys", "level"),
    [
        ([Keys(f"p{i // 3}", (f"{i}a", f"{i}b")) for i in range(60)], "prompt and image"),
        ([Keys("one prompt", (i // 2, f"{i}b")) for i in range(40)], "image"),
        ([Keys("one prompt", (i % 7, 10 + i % 5)) for i in range(30)], "pair"),
    ],
)
def test_no_image_and_where_possible_no_prompt_is_on_both_sides_of_a_fold(keys, level):
    found = folds(keys)
    assert found.level == level
    assert sorted(i for _, test in found.parts for i in test.tolist()) == list(range(len(keys)))
    for train, test in found.parts:
        images = [{image for i in rows.tolist() for image in keys[i].images} for rows in (train, test)]
        prompts = [{keys[i].prompt for i in rows.tolist()} for rows in (train, test)]
        assert not images[0] & images[1]
        assert level != "prompt and image" or not prompts[0] & prompts[1]
    assert [t.tolist() for _, t in folds(keys).parts] == [t.tolist() for _, t in found.parts]


def test_intervals_of_agreement():
    share = wilson(0.8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=5e-4)  # tables of Wilson's interval
    right = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0, 1, 1] * 2, dtype=torch.float64)
    alone = agreement(right, torch.ones(20).double(), list(range(20)))
    assert (alone.low, alone.high) == pytest.approx((wilson(0.7, 20).low, wilson(0.7, 20).high), abs=0.01)
    twins = agreement(right.sort().values, torch.ones(20).double(), [i // 4 for i in range(20)])  # fours that agree: about five choices
    assert twins.high - twins.low > 1.4 * (alone.high - alone.low)
    sure = agreement(torch.ones(40).double(), torch.ones(40).double(), [i // 8 for i in range(40)])  # five prompts
    assert (sure.value, sure.low) == pytest.approx((1.0, wilson(1.0, 5).low))


def test_a_choice_that_is_made_a_hundred_times_counts_once():
    keys = [Keys("one prompt", (i % 7, 10 + i % 5)) for i in range(30)] + [Keys("one prompt", (10, 0))] * 100
    found = folds(keys)
    assert found.level == "pair" and len(set(found.groups)) == 30
    judged = [Comparison(*(Image(Path("x"), str(i)) for i in k.images), k.prompt) for k in keys]
    weights = torch.tensor([one.weight for one in once(judged)], dtype=torch.float64)
    right = torch.tensor([1.0, 0] * 15 + [1.0] * 100, dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(30) and agreement(right, weights, found.groups).low < 0.5
    assert agreement(torch.ones(130).double(), torch.ones(130).double(), found.groups) == wilson(1.0, 30)


def two_people():
    """Features, rows of the better and worse image, keys, and whether bob chose."""
    features, better, worse, _ = random_design(60, torch.tensor([4.0, -3, 0, 0, 0, 0], dtype=torch.float64))
    return features, better, worse, [Keys(str(i), (i, 1000 + i)) for i in range(60)], torch.arange(60) % 2 == 0


def test_two_people_of_opposite_tastes_are_two_prototypes():
    features, better, worse, keys, bob = two_people()
    design = Design.of(features, torch.where(bob, worse, better), torch.where(bob, better, worse), torch.zeros(60) > 0, torch.ones(60))
    found = fit_mixture(design, ["bob" if one else "ann" for one in bob], folds(keys, 3), 0.3)
    assert found.summary.prototypes == 2 and found.summary.loss[1] < found.summary.loss[0] - 0.1
    heads = torch.stack([found.of("ann"), found.of("bob")])
    assert float(F.cosine_similarity(heads[:1], heads[1:])) < 0
    right = (design.logits(found.of("ann"), (~bob).nonzero()[:, 0]) > 0).double().mean()
    assert right > 0.8
    judged, mean = design.outcome != 0.5, correct(found.held_out_mean)
    written = float(correct(design.logits(found.mean, torch.arange(60)))[judged].mean())
    # the mean of opposite people predicts neither: its agreement is reported where it is the head that is written
    assert (
        float(correct(found.held_out)[judged].mean()) > 0.7 > float(mean[judged].mean()) and abs(float(mean[judged].mean()) - written) < 0.2
    )


@pytest.mark.full
def test_two_people_of_one_taste_are_one_prototype():
    features, better, worse, keys, bob = two_people()
    design = Design.of(features, better, worse, torch.zeros(60) > 0, torch.ones(60))
    assert fit_mixture(design, ["bob" if one else "ann" for one in bob], folds(keys), 0.3).summary.prototypes == 1


def test_the_curve_of_a_clear_taste_rises():
    _, _, _, design = random_design(200, torch.tensor([3.0, -2, 1, 0, 0, 0], dtype=torch.float64))
    curve = learning_curve(design, folds([Keys(str(i), (i, 1000 + i)) for i in range(200)]), 0.3)
    assert curve.points[0][1] < curve.points[-1][1] and curve.points[-1][0] == pytest.approx(180)
    assert curve.gain.low <= curve.gain.value <= curve.gain.high and 0 <= curve.fourfold.high <= 1


# -- what to ask next


def test_information_is_that_of_a_simulation_and_none_where_the_answer_is_known():
    mean, variance = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    found, chance = information(mean, variance), expected(mean, variance)
    drawn = torch.sigmoid(mean[:2, None] + variance[:2, None].sqrt() * torch.randn(2, 200_000, generator=generator("information")))
    entropy = lambda p: -(p * p.log2() + (1 - p) * (1 - p).log2())  # noqa: E731
    assert torch.allclose(found[:2], entropy(drawn.mean(1)) - entropy(drawn).mean(1), atol=3e-3)
    assert torch.allclose(chance[:2], drawn.mean(1), atol=3e-3) and float(found[2]) < 1e-9


def test_the_next_question_is_about_what_is_not_known_and_not_twice_about_the_same():
    _, _, _, design = random_design(60, torch.tensor([3.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    axes = torch.eye(6, dtype=torch.float64)
    image = torch.cat([axes[:3], -axes[:3], F.normalize(axes[:1] + 0.01 * axes[3:4], dim=1)])
    features = Features(image, torch.zeros_like(image), torch.zeros(7, dtype=torch.float64))
    prompts = ["a", "b", "c", "a", "b", "c", "a"]  # pairs: a 0-3, 0-6, 3-6; b 1-4; c 2-5
    cold = questions(features, prompts, 5, None, 1.0)
    assert len({(q.first, q.second) for q in cold}) == 5 and [q.bits for q in cold] == sorted((q.bits for q in cold), reverse=True)
    assert {prompts[q.first] for q in cold[:3]} == {"a", "b", "c"}  # 3-6 is nearly 0-3 asked again
    told = questions(features, prompts, 5, design, 0.3)
    assert prompts[told[0].first] in "bc" and told[0].chance == pytest.approx(0.5, abs=0.25)


# -- files and commands


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Sixteen prompts with two renders each; the person prefers the darker one."""
    folder = tmp_path_factory.mktemp("judged")
    prompts = world.captions(16, "judged")
    renders = world.real_renders(prompts, 2, 3)
    for i, caption in enumerate(prompts):
        both = renders[2 * i : 2 * i + 2]
        shown = [save_image(folder, to_pil(one), seed=i) for one in both]
        darker = int(both[1].mean() < both[0].mean())
        append(folder / "choices.jsonl", choice("pair", caption.text, shown, "chosen", darker, [i % 2, 1 - i % 2], person="ann"))
    return folder


@pytest.fixture(scope="module")
def taste(judged):
    path = judged / "taste.safetensors"
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(path)]) == 0
    return path


def test_the_command_writes_a_reward_and_its_report(judged, taste, capsys):
    report = json.loads(taste.with_suffix(".json").read_text())
    assert report["choices"] == 16 and report["level"] == "prompt and image" and report["tower"] == "demo-proxy"
    assert 0.5 < report["agreement"]["value"] <= 1 and report["agreement"]["low"] < report["agreement"]["value"]
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(taste)]) == 2
    assert "exists: add --overwrite" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_gives_the_same_bytes_again(judged, taste, capsys):
    before = taste.read_bytes()
    assert main(["taste", str(judged / "choices.jsonl"), "--tower", "demo-proxy", "--out", str(taste), "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "16 choices under 16 prompts" in said and "of held-out choices; demo-proxy alone" in said
    assert taste.read_bytes() == before


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


def test_the_fit_of_the_file_orders_pairs_as_the_design_did(judged, taste):
    found = gather([judged / "choices.jsonl"])
    reward = load_reward(f"{taste}", True)
    assert weights_hashes(str(taste)).keys() == {str(taste)}
    from trainer.taste.fit import rated

    known = rated(files.load_tower("proxy"), found.comparisons)
    design, head = known.design(found.comparisons), TasteFile.read(taste)
    logits = design.logits(design.fitted(head.precision), torch.arange(16))
    from trainer.data.images import load as load_image

    scores = [
        [float(reward(load_image(image.path, 64)[None], [one.prompt])) for image in (one.better, one.worse)] for one in found.comparisons
    ]
    ours = torch.tensor([a - b for a, b in scores]) * head.std
    assert torch.allclose(ours.double(), logits, atol=2e-3)


def test_score_takes_the_taste(judged, taste, tmp_path):
    images = judged / "images"
    assert main(["score", str(images), "--prompt", "a red star", "--reward", f"taste@{taste}", "--out", str(tmp_path / "s.csv")]) == 0
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 33


def test_another_tower_is_refused(taste, tmp_path, capsys):
    from dataclasses import replace

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
    from dataclasses import replace

    replace(TasteFile.read(taste), **edited).write(tmp_path / "edited.safetensors")
    with pytest.raises(ValueError, match=r"edited\.safetensors is not a taste: (its|baseline|must be)"):
        TasteFile.read(tmp_path / "edited.safetensors")


def test_weak_tastes_say_so_when_they_are_loaded(taste, caplog):
    from dataclasses import replace

    head = replace(TasteFile.read(taste), agreement=(0.55, 0.41, 0.69))
    assert "may be chance (0.41): do not train on it" in head.weak and not replace(head, agreement=(0.7, 0.6, 0.8)).weak
    assert "not known" in replace(head, agreement=None).weak


def test_next_lists_pairs_of_one_prompt(judged, image_folder, capsys):
    folder = str(judged / "images")
    arguments = ["--tower", "demo-proxy", "--images", folder, "--prompt", "a large star", "-n", "4"]
    assert main(["taste", "next", str(judged / "choices.jsonl"), *arguments]) == 0
    lines = capsys.readouterr().out.partition("bits\t")[2].splitlines()
    bits = [float(line.split("\t")[0]) for line in lines[1:]]
    assert len(bits) == 4 and bits[0] > 0
    assert main(["taste", "next", *arguments]) == 0


def shown(folder, values):
    return [save_image(folder, to_pil(torch.full((3, 8, 8), value / 50))) for value in values]


def test_bad_choices_end_in_one_line(tmp_path, capsys):
    def refused(name, records):
        path = tmp_path / name / "choices.jsonl"
        for record in records(path.parent):
            append(path, record)
        assert main(["taste", str(path), "--tower", "demo-proxy", "--out", str(tmp_path / "t.safetensors")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    pair = lambda folder, i, place: choice("pair", f"p{i}", shown(folder, (i, i + 20)), "chosen", 0, [0, 1] if place == 0 else [1, 0])  # noqa: E731
    assert "all 9 choices are the image shown first" in refused("side", lambda f: [pair(f, i, 0) for i in range(9)])
    assert "has 5 choices between two images: give at least 8" in refused("few", lambda f: [pair(f, i, i % 2) for i in range(5)])
    thumb = lambda f, i, word: choice("thumb", f"p{i // 3}", shown(f, (i,)), word)  # noqa: E731
    said = refused("thumbs", lambda f: [thumb(f, i, "liked" if i < 6 else "disliked") for i in range(12)])
    assert "12 images are judged, and under no prompt are some liked and others disliked" in said
    assert "(2 skipped, 1 ties)" in refused(
        "ties",
        lambda f: [*(choice("pair", f"p{i}", shown(f, (i, i + 20)), o) for i, o in enumerate(("tie", "skip", "skip"))), pair(f, 5, 0)],
    )
    (tmp_path / "few" / "choices.jsonl").open("a").write('{"version": 1, "ki')
    with pytest.raises(ValueError, match="has 5 choices"):
        gather([tmp_path / "few" / "choices.jsonl"])
    assert "line 6: cut off" in gather([tmp_path / "few" / "choices.jsonl"], fewest=1).notes[0]
    assert main(["taste", "x", "--tower", "aesthetic", "--out", str(tmp_path / "t.pt")]) == 2


# -- consistency


def compare(a, b, prompt="p", **more):
    return Comparison(Image(Path(a), a), Image(Path(b), b), prompt, **more)


def test_contradictions_cycles_and_a_liking_for_one_side_are_counted():
    found = Gathered(
        [
            *(compare(a, b) for a, b in ("ab", "ba", "ab", "cd")),  # a over b twice, b over a once
            *(compare(a, b, "q") for a, b in ("xy", "yz", "zx", "xw")),  # a circle of three, and one choice outside
            compare("x", "y", "r"),
            compare("z", "x", "r", tie=True),
        ],
        places=[(0, 2)] * 19 + [(1, 2)],
    )
    seen = consistency(found)
    assert (seen.repeated, seen.same, seen.cycles) == (1, pytest.approx(2 / 3), 3)
    assert seen.first.value == 0.95 and seen.first.low > 0.7
    said = "\n".join(seen.warnings)
    assert "same answer in 67% only" in said and "3 choices run in circles" in said and "shown first was chosen in 0.95" in said


def test_likes_become_pairs_of_their_prompt_that_weigh_as_judgements(tmp_path):
    path = tmp_path / "choices.jsonl"
    images = shown(tmp_path, range(6))
    for i, image in enumerate(images):
        append(path, choice("thumb", "two kinds" if i < 5 else "one kind", [image], "liked" if i < 3 else "disliked"))
    append(path, choice("thumb", "two kinds", [images[0]], "disliked"))  # the last word counts
    found = gather([path], fewest=1)
    assert len(found.comparisons) == 6 and sum(one.weight for one in found.comparisons) == pytest.approx(4)  # 2 × 3 pairs of 5 images
    assert found.alone == 1 and "1 of 7 likes and dislikes are left out" in consistency(found).warnings[0]


def test_features_under_prompts_are_the_towers_score():
    tower, (images, prompts) = files.load_tower("proxy"), world.real_images(4, 1)
    with torch.no_grad():
        features = under_prompts(tower, tower.image_features(images).double(), prompts)
        assert torch.allclose(features.score.float(), tower(images, prompts), atol=1e-4)


def test_an_image_that_was_changed_after_it_was_shown_is_refused(judged, tmp_path):
    folder = tmp_path / "judged"
    shutil.copytree(judged, folder)
    one, other = sorted((folder / "images").glob("*.png"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=rf"choices\.jsonl, line \d+: \S+{one.name} is not the image that was shown: put that back, or"):
        gather([folder / "choices.jsonl"])
