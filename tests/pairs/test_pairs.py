"""Labels, filters, near-copies and splits of pairs, against counts by hand and by brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.preferences import read_labels, read_pairs
from trainer.data.report import Report
from trainer.pairs.filter import Filter, filtered, neighbour_distances, valued
from trainer.pairs.label import Pair, Scored, candidates, labelled, relabelled
from trainer.pairs.near_copies import Thumbnails
from trainer.pairs.report import lines, report
from trainer.pairs.split import split
from trainer.pairs.tables import labels_of, read_table, write_labels, write_pairs


def scored(name, *scores, prompt="p", heldout=None):
    return Scored(name, prompt, scores, heldout)


def smooth(path, seed, size=(40, 40), change=0.0):
    """An image of slow colours; `change` is added to every pixel."""
    small = np.random.default_rng(seed).integers(40, 200, (4, 4, 3), dtype=np.uint8)
    whole = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    Image.fromarray((np.asarray(whole).astype(float) + 255 * change).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("first", "second", "weights", "label", "expected"),
    [  # chosen, margin, agreement
        ((2.0, 0.0), (1.0, 3.0), (1, 1), "sum", ("b", 2.0, 0.5)),  # −(1 − 3)
        ((2.0, 0.0), (1.0, 3.0), (4, 1), "sum", ("a", 1.0, 0.5)),  # 4·1 − 3
        ((2.0, 0.0), (1.0, 3.0), (1, -1), "sum", ("a", 4.0, 1.0)),
        ((2.0, 0.0), (1.0, 1.0), (1, 1), "sum", None),
        ((9.0, 0.1, 0.2), (0.0, 0.4, 0.3), (1, 1, 1), "majority", ("b", 0.1, 2 / 3)),  # the sum prefers a
        ((9.0, 0.1), (0.0, 0.4), (1, 1), "majority", None),
        ((0.0, 0.1, 0.0), (0.0, 0.0, 0.0), (1, 1, 1), "majority", ("a", 0.0, 1 / 3)),  # equal scores have no vote
        ((1.0, 1.0, 0.0), (0.0, 0.5, 5.0), (-1, 1, -2), "majority", ("a", 0.5, 2 / 3)),
    ],
)
def test_the_better_image_and_the_margin(first, second, weights, label, expected):
    for one, other in ((("a", first), ("b", second)), (("b", second), ("a", first))):  # the order of the two decides nothing
        pair = labelled(*(scored(name, *scores, heldout={"a": 1.0, "b": 1.5}[name]) for name, scores in (one, other)), weights, label)
        if expected is None:
            assert pair is None
            continue
        assert (pair.chosen, pair.margin, pair.agreement) == (expected[0], pytest.approx(expected[1]), pytest.approx(expected[2]))
        assert pair.heldout == (-0.5 if pair.chosen == "a" else 0.5)


def test_every_two_images_of_a_prompt_are_a_candidate():
    images = [scored(f"{p}{i}", float(i // 2), prompt=p) for p in "qp" for i in range(4)]
    dropped = Counter()
    found = list(candidates(images, (1.0,), "sum", dropped))
    assert len(found) == 2 * (6 - 2) and dropped == {"equal scores": 4} and [p.prompt for p in found] == ["q"] * 4 + ["p"] * 4
    assert all(int(p.chosen[1]) > int(p.rejected[1]) for p in found)


def test_pairs_that_exist_keep_their_label_or_get_another():
    better, worse = scored("a", 0.0, 5.0, heldout=1.0), scored("b", 2.0, 4.0, heldout=0.0)
    kept, new, votes = ([*relabelled([(better, worse)], (1, 1), label, Counter())] for label in (None, "sum", "majority"))
    (kept,), (new,) = kept, new
    assert (kept.chosen, kept.margin, kept.agreement, kept.gaps, kept.heldout) == ("a", -1.0, 0.5, (-2.0, 1.0), 1.0)
    assert (new.chosen, new.margin, new.heldout) == ("b", 1.0, -1.0) and votes == []
    assert filtered(valued([kept], Filter(near_copies=0), None, None), Filter(), None, dropped := Counter()) == []
    assert dropped == {"rewards contradict the label": 1}


def pair(chosen, rejected, margin=1.0, prompt="p", agreement=1.0, value=None):
    return Pair(chosen, rejected, prompt, margin, agreement, (margin,), None, margin if value is None else value)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images, and near-copies of the first three: brighter by 1 %, as JPEG, in another size."""
    folder = tmp_path_factory.mktemp("images")
    found = [smooth(folder / f"{i}.png", i) for i in range(12)]
    copies = [smooth(folder / "0c.png", 0, change=0.01), folder / "1c.jpg", smooth(folder / "2c.png", 2, size=(90, 90))]
    Image.open(found[1]).save(copies[1], quality=80)
    return found, copies


def test_near_copies_are_found_by_brute_force_too(images):
    found, copies = images
    every, thumbnails = [*found, *copies], Thumbnails()
    distances = {(i, j): thumbnails.distance(every[i], every[j]) for i, j in combinations(range(len(every)), 2)}
    for limit in (0.0, 0.02, 0.2, 1.0):
        expected = {key for key, distance in distances.items() if distance <= limit}
        assert {tuple(sorted(one)) for one in thumbnails.near(every, limit)} == expected
        if limit == 0.02:
            assert expected == {(0, 12), (1, 13), (2, 14)}, {key: f"{distances[key]:.3f}" for key in expected}
    assert list(thumbnails.near([], 0.02)) == []


def test_filters_count_what_they_drop(images):
    found, copies = images
    a, b, c, d = found[:4]
    pairs = [
        pair(a, b, 3.0),
        pair(a, copies[0], 2.5),  # the same image
        pair(c, d, 2.0),
        pair(b, c, 1.0),
        pair(a, d, 0.1),
        pair(a, b, 5.0, "q"),
        pair(c, d, 1.5, "q", agreement=0.5),
        pair(a, c, 0.9, "r"),
    ]
    kept = filtered(
        pairs, Filter(min_margin=0.5, max_margin=4.0, min_agreement=0.6, per_prompt=2, keep=2), Thumbnails(), dropped := Counter()
    )
    assert kept == [pairs[0], pairs[2]]
    assert dropped == {
        "margin too small": 1,
        "margin too large": 1,
        "rewards disagree": 1,
        "near-copies of each other": 1,
        "beyond the number per prompt": 1,
        "of lower value": 1,
    }
    assert len(filtered(pairs, Filter(per_prompt=0), Thumbnails(), Counter())) == 7  # all but the near-copies
    with pytest.raises(ValueError, match="max_margin = 1 is below min_margin = 2"):
        Filter(min_margin=2.0, max_margin=1.0)


def test_the_value_of_a_pair_is_its_margin_and_what_its_prompt_adds():
    angle = torch.tensor([0.0, 0.1, 0.3, 1.5], dtype=torch.float64)
    points = torch.stack([angle.cos(), angle.sin()], 1)
    prompts = ["a", "b", "c", "d"]
    pairs = [pair("x", "y", 1.0 + i, prompt) for i, prompt in enumerate([*prompts, "a"])]
    quality = dict(zip(prompts, [8.0, 2.0, 5.0, 1.0]))
    settings = Filter(quality_weight=0.25, diversity_weight=0.5, neighbours=2)
    found = [one.value for one in valued(pairs, settings, lambda texts: points, quality)]

    def second_nearest(i):
        return sorted(math.dist(points[i].tolist(), points[j].tolist()) for j in range(4) if j != i)[1]

    assert found == pytest.approx(
        [1.0 + i + 0.25 * quality[p] + 0.5 * math.log(second_nearest(prompts.index(p))) for i, p in enumerate([*prompts, "a"])], abs=1e-12
    )
    assert neighbour_distances(points, 9) == pytest.approx([max(math.dist(a, b) for b in points.tolist()) for a in points.tolist()])
    assert [one.value for one in valued(pairs, Filter(), None, None)] == [one.margin for one in pairs]
    with pytest.raises(ValueError, match="no quality is given for 1 prompt, such as 'd'"):
        valued(pairs, settings, None, {p: 1.0 for p in "abc"})
    with pytest.raises(ValueError, match="no reward scored them"):
        valued([Pair("x", "y", "p")], Filter(), None, None)


def components(pairs, thumbnails):
    """The groups that a split must not part, by repeated union over all pairs of pairs."""
    groups = [{i} for i in range(len(pairs))]

    def linked(one, other):
        same = one.prompt.lower().split() == other.prompt.lower().split()
        return same or any(thumbnails.distance(x, y) <= 0.02 for x in (one.chosen, one.rejected) for y in (other.chosen, other.rejected))

    for i, j in combinations(range(len(pairs)), 2):
        if linked(pairs[i], pairs[j]):
            joined = next(g for g in groups if i in g) | next(g for g in groups if j in g)
            groups = [g for g in groups if not g & joined] + [joined]
    return groups


def test_a_split_shares_no_prompt_and_no_near_copy(images):
    found, copies = images
    pool, thumbnails, rng = [*found, *copies], Thumbnails(), random.Random(0)
    sizes = []
    for trial in range(60):
        count = rng.randint(4, 12)
        pairs = [pair(*rng.sample(pool, 2), prompt=rng.choice(["Red  star", "red star", *"abcdefghij"])) for _ in range(count)]
        groups = components(pairs, thumbnails)
        try:
            train, held = split(pairs, 0.3, trial, thumbnails, 0.02)
        except ValueError as error:
            assert "that share prompts or near-copies" in str(error)
            assert len(groups) == 1 or min(map(len, groups)) > 2 * max(1, round(0.3 * count)), groups
            continue
        assert len(train) + len(held) == count and train
        wanted, some = max(1, round(0.3 * count)), itertools.product((0, 1), repeat=len(groups))
        sums = [sum(len(group) for group, taken in zip(groups, each) if taken) for each in some]
        assert abs(len(held) - wanted) == min(abs(total - wanted) for total in sums if 0 < total < count), (groups, len(held))
        sides = [id(one) in {id(p) for p in held} for one in pairs]
        assert all(len({sides[i] for i in group}) == 1 for group in groups)
        assert split(pairs, 0.3, trial, Thumbnails(), 0.02) == (train, held)
        sizes.append(len(held))
    assert len(sizes) > 20, sizes
    assert split(pairs, 0.0, 0, thumbnails, 0.02) == (pairs, [])


def test_tables_are_what_training_reads(images, tmp_path):
    found, _ = images
    home = found[0].parent
    pairs = [pair(found[0], found[1]), pair(found[1], found[2]), pair(found[0], found[3], prompt="a\nb.png, c")]
    write_pairs(pairs, ["hps"], home / "pairs.jsonl")
    labels = labels_of(pairs)
    assert labels == {
        (found[0], "p"): "liked",
        (found[2], "p"): "disliked",  # image 1 wins as often as it loses
        (found[0], "a\nb.png, c"): "liked",
        (found[3], "a\nb.png, c"): "disliked",
    }
    write_labels(labels, home / "labels.jsonl")
    assert read_pairs(str(home / "pairs.jsonl")) == [(one.chosen, one.rejected, one.prompt) for one in pairs]
    assert read_labels(str(home / "labels.jsonl")) == [
        (image, text, 1.0 if word == "liked" else -1.0) for (image, text), word in labels.items()
    ]
    line = json.loads((home / "pairs.jsonl").read_text().splitlines()[0])
    assert line["chosen"] == "0.png" and line["gaps"] == {"hps": 1.0} and line["margin"] == 1.0
    write_pairs(pairs, ["hps"], tmp_path / "elsewhere.jsonl")
    assert read_pairs(str(tmp_path / "elsewhere.jsonl"))[0][0] == found[0]
    again, rewards = read_table(home / "pairs.jsonl", Report())
    assert rewards == ["hps"] and [replace(one, value=None) for one in again] == [replace(one, value=None) for one in pairs]
    for bad, message in {
        '"margin": NaN': "pair 2: margin is 'nan': give a finite number, or leave it out",
        '"margin": "big"': "pair 2: margin is 'big'",
        '"margin": 1, "gaps": [1]': "pair 2: gaps are of other rewards than in the first pair",
        '"margin": 1, "gaps": {"hps": 1, "clip": 1}': "pair 2: gaps are of other rewards",
        '"margin": 1, "gaps": {"hps": null}': "pair 2: hps is 'None'",
    }.items():
        rows = [json.dumps(line), f'{{"chosen": "1.png", "rejected": "2.png", "prompt": "p", {bad}}}']
        (home / "bad.jsonl").write_text("\n".join(rows))
        with pytest.raises(ValueError, match=message):
            read_table(home / "bad.jsonl", Report())


def test_the_report_counts_agreement():
    both = [
        Pair("a", "b", "p", m, 0.5, gaps, held, m)
        for m, gaps, held in ((1.0, (1, 2), 1), (2.0, (1, -1), -1), (3.0, (2, 0), 1), (4.0, (1, 1), 0))
    ]
    found = report(
        both, {"pairs": both[:2], "pairs-heldout": both[3:]}, Counter({"equal scores": 3, "margin too small": 1}), ["x", "y"], "z"
    )
    assert found["candidates"] == 7 and found["agreement"] == {"x and y": round(2 / 3, 6)}
    assert found["heldout"] == {"reward": "z", "candidates": round(2 / 3, 6), "kept": 0.5}
    assert found["margins"]["candidates"]["50%"] == 3.0 and found["kept"] == {"pairs": 2, "pairs-heldout": 1}
    assert "kept 3 of 7 pairs: 2 for training (1 prompt), 1 held out (1 prompt)" in lines(found, "σ")
