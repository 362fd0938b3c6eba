"""The file of choices: what is written is read, undo, duplicates, damaged lines."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.preferences import read_labels, read_pairs
from trainer.data.report import Report
from trainer.taste.choices import append, choice, is_choices, pixel_hash, read_choices, save_image, undo


@pytest.fixture
def file(tmp_path):
    return tmp_path / "own" / "choices.jsonl"


@pytest.fixture
def shown(file):
    """Four images that differ, saved beside the file."""
    return [save_image(file.parent, Image.new("RGB", (8, 6), (40 * i, 0, 0)), seed=i, model="sd15.safetensors") for i in range(4)]


def write(file, *records):
    for record in records:
        append(file, record)
    return read_choices(file)


def names(pairs):
    return [(pair.chosen.name, pair.rejected.name) for pair in pairs]


def test_the_line_is_the_documented_one(file, shown):
    write(file, choice("pair", "a café 🐈", shown[:2], "chosen", chosen=1, order=[1, 0], person="ann"))
    (text,) = file.read_text("utf-8").splitlines()
    row = json.loads(text)
    assert len(row.pop("id")) == 32 and row.pop("time").endswith("Z") and "café 🐈" in text
    images = [
        {"sha256": one.sha256, "file": f"images/{one.sha256}.png", "seed": i, "model": "sd15.safetensors"} for i, one in enumerate(shown)
    ]
    assert row == {
        "version": 1,
        "kind": "pair",
        "prompt": "a café 🐈",
        "images": images[:2],
        "order": [1, 0],
        "chosen": 1,
        "outcome": "chosen",
        "person": "ann",
    }


def test_pairs_of_two_and_of_the_best_of_n_and_no_pair_of_a_tie_or_a_skip(file, shown):
    found = write(
        file,
        choice("pair", "p", shown[:2], "chosen", chosen=1, person="ann"),
        choice("best", "q", shown, "chosen", chosen=2, order=[3, 1, 0, 2]),
        choice("pair", "p", shown[:2], "tie"),
        choice("best", "p", shown, "skip"),
        choice("thumb", "p", shown[:1], "liked"),
    )
    a, b, c, d = (one.file.name for one in shown)
    assert names(found.pairs()) == [(b, a), (c, a), (c, b), (c, d)]
    assert [(pair.prompt, pair.person) for pair in found.pairs()] == [("p", "ann"), ("q", ""), ("q", ""), ("q", "")]
    assert [one.outcome for one in found.records] == ["chosen", "chosen", "tie", "skip", "liked"] and not found.cut
    assert found.records[1].order == (3, 1, 0, 2) and found.records[1].images[2].seed == 2
    assert all(pair.chosen.is_file() and pair.rejected.is_file() for pair in found.pairs())


def test_undo_takes_a_choice_back_and_an_id_counts_once(file, shown):
    first = choice("pair", "p", shown[:2], "chosen", chosen=0)
    second = choice("pair", "p", shown[2:], "chosen", chosen=0)
    found = write(file, first, second, first, undo(second["id"], "again"), second, undo("of nothing", "again"))
    assert [one.id for one in found.records] == [first["id"]] and not found.cut


def test_the_latest_thumb_of_an_image_counts(file, shown):
    told = (("p", "ann", "liked"), ("p", "ann", "disliked"), ("q", "ann", "liked"), ("p", "bob", "liked"), ("p", "ann", "skip"))
    found = write(file, *(choice("thumb", prompt, shown[:1], word, person=person) for prompt, person, word in told))
    assert [(one.prompt, one.person, one.liked) for one in found.labels()] == [("p", "ann", False), ("q", "ann", True), ("p", "bob", True)]


def test_a_line_cut_at_any_byte_is_listed_and_the_others_are_read(file, shown):
    first, second = (choice("pair", "é", images, "chosen", chosen=0) for images in (shown[:2], shown[2:]))
    write(file, first)
    line = file.read_bytes()
    write(file, second)
    after = file.read_bytes()[len(line) :]
    for end in (*range(1, len(line) - 2, 7), len(line) - 2):
        file.write_bytes(line[:end] + b"\n" + after)
        found = read_choices(file)
        assert [one.id for one in found.records] == [second["id"]], end
        assert found.cut == ((1, "cut off, or not a JSON object"),)
    file.write_bytes(line[:9])
    assert [one.id for one in write(file, first).records] == [first["id"]]
    assert found.cut_text() == f"{file}: 1 lines left out (line 1: cut off, or not a JSON object)"


BAD = [
    ({"version": 2}, "version 2, and this reads version 1"),
    ({"kind": "vote"}, "kind 'vote' is none of"),
    ({"chosen": 2}, "chosen 2 with outcome chosen and 2 images"),
    ({"chosen": True}, "chosen True"),
    ({"chosen": None}, "chosen missing"),
    ({"outcome": "tie"}, "chosen 0 with outcome tie"),
    ({"outcome": "liked"}, "outcome 'liked' of a pair"),
    ({"order": [0, 0]}, "order [0, 0] does not name"),
    ({"order": [0, True]}, "order [0, True] does not name"),
    ({"id": ""}, "id missing"),
    ({"prompt": 3}, "prompt 3 is not a text"),
    ({"images": []}, "0 images of a pair"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_lines_that_contradict_themselves_are_listed(file, shown, change, said):
    record = choice("pair", "p", shown[:2], "chosen", chosen=0)
    found = write(file, record | change, record)
    assert len(found.records) == 1 and said in found.cut[0][1]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../secret.png", "images/../../a.png", "C:/a.png", "..\\a.png", "images/a\0.png", "", None]
)
def test_a_file_outside_the_folder_is_not_read(file, shown, name):
    record = choice("pair", "p", shown[:2], "chosen", chosen=0)
    record["images"][1]["file"] = name
    found = write(file, record)
    assert not found.records and "is not a path below the file's folder" in found.cut[0][1]


def test_the_same_image_on_both_sides_is_listed(file, shown):
    found = write(file, choice("pair", "p", [shown[0], shown[0]], "chosen", chosen=0))
    assert found.cut == ((1, "the same image twice"),)


def test_garbage_of_any_kind_is_listed(file, shown):
    record = choice("pair", "p", shown[:2], "chosen", chosen=0)
    write(file, record)
    garbage = [b"\0" * 50, b"\xff\xfe{}", b"[" * 100_000, b"[1]", b"9" * 5000, b'{"version": ' + b"9" * 5000 + b"}", b"null"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n".join(garbage) + b"\n\n")
    found = read_choices(file)
    assert len(found.records) == 1 and [number for number, _ in found.cut] == [*range(2, 2 + len(garbage))]


def test_an_image_is_written_once_by_its_pixels_and_without_metadata(file):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8).astype(np.uint8))
    noise.info["prompt"] = "secret"
    one = save_image(file.parent, noise)
    before = one.file.stat().st_mtime_ns
    again = save_image(file.parent, noise.copy())
    assert again.file == one.file and again.file.stat().st_mtime_ns == before and one.sha256 == pixel_hash(Image.open(one.file))
    assert Image.open(one.file).info == {} and one.file.name == f"{one.sha256}.png"
    hashes = [pixel_hash(image) for image in (noise, noise.transpose(Image.Transpose.ROTATE_90), Image.new("RGB", (7, 5)))]
    assert len({*hashes}) == 3 and one.sha256 == hashes[0]


def test_a_link_in_place_of_the_file_is_not_followed(file, shown, tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        append(file, choice("pair", "p", shown[:2], "tie"))
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_writers_at_once_lose_no_line(file, shown):
    records = [choice("pair", f"{i} " + "x" * 3000, shown[:2], "chosen", chosen=0) for i in range(40)]
    children = []
    for part in range(4):
        if not (child := os.fork()):
            for record in records[part::4]:
                append(file, record)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    found = read_choices(file)
    assert {one.id for one in found.records} == {record["id"] for record in records} and not found.cut


def test_pairs_and_labels_of_training_data_are_read_from_it(file, shown):
    told = [choice("thumb", "p", shown[i : i + 1], word) for i, word in enumerate(("liked", "disliked"))]
    write(file, choice("best", "q", shown[:3], "chosen", chosen=1), choice("pair", "q", shown[:2], "tie"), *told)
    with open(file, "a") as end:
        end.write('{"version": 1, "id": "')
    report = Report()
    files = [one.file for one in shown]
    assert read_pairs(str(file), report) == [(files[1], files[0], "q"), (files[1], files[2], "q")]
    assert "2 pairs" in str(report) and "1 ties (line 2)" in str(report) and "1 cut off, or not a JSON object (line 5)" in str(report)
    assert read_labels(str(file)) == [(files[0], "p", 1.0), (files[1], "p", -1.0)]
    assert is_choices(file)


def test_what_training_cannot_use_is_refused_in_one_line(file, shown):
    write(file, undo("of nothing", "again"))
    with pytest.raises(ValueError, match=r"choices\.jsonl holds no choice yet"):
        read_pairs(str(file))
    write(file, choice("thumb", "p", shown[:1], "liked"))
    with pytest.raises(ValueError, match=r"likes and dislikes alone: give it as labels"):
        read_pairs(str(file))
    file.unlink()
    write(file, choice("pair", "", shown[:2], "chosen", chosen=0))
    with pytest.raises(ValueError, match=r"choices\.jsonl, line 1: no prompt"):
        read_pairs(str(file))
    write(file, choice("pair", "p", shown[2:], "chosen", chosen=0))
    with pytest.raises(ValueError, match="holds no likes or dislikes"):
        read_labels(str(file))
    shown[3].file.unlink()
    with pytest.raises(ValueError, match="line 2 names .* which does not exist"):
        read_choices(file).pairs()


def test_ids_and_times_follow_each_other(shown):
    records = [choice("pair", "p", shown[:2], "tie") for _ in range(5)]
    assert len({record["id"] for record in records}) == 5 and all(a["time"] <= b["time"] for a, b in pairwise(records))


def test_the_example_of_the_documentation_is_read():
    found = read_choices(Path(__file__).parents[2] / "docs" / "images" / "taste-choices.jsonl")
    assert [one.outcome for one in found.records] == ["chosen", "tie", "chosen", "chosen"] and len(found.ids) == 5 and not found.cut
