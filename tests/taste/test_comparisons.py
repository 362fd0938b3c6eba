"""Choices of any kind as comparisons, and files that give none."""

from __future__ import annotations

import shutil

import pytest
from helpers.taste import shown

from trainer.__main__ import main
from trainer.taste.choices import append, choice, undo
from trainer.taste.comparisons import gather
from trainer.taste.consistency import consistency
from trainer.taste.folds import folds


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


def test_likes_become_pairs_of_their_prompt_that_weigh_as_judgements(tmp_path):
    path = tmp_path / "choices.jsonl"
    images = shown(tmp_path, range(6))
    for i, image in enumerate(images):
        append(path, choice("thumb", "two kinds" if i < 5 else "one kind", [image], "liked" if i < 3 else "disliked"))
    append(path, choice("thumb", "two kinds", [images[0]], "disliked"))  # the last word counts
    found = gather([path], fewest=1)
    assert len(found.comparisons) == 6 and sum(one.weight for one in found.comparisons) == pytest.approx(4)  # 2 × 3 pairs of 5 images
    assert found.alone.total() == 1 and "1 of 7 likes and dislikes are left out" in consistency(found).warnings[0]


def test_an_image_that_was_changed_after_it_was_shown_is_refused(judged, tmp_path):
    folder = tmp_path / "judged"
    shutil.copytree(judged, folder)
    one, other = sorted((folder / "images").glob("*.png"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=rf"choices\.jsonl, line \d+: \S+{one.name} is not the image that was shown: put that back, or"):
        gather([folder / "choices.jsonl"])


def test_a_choice_of_several_files_counts_once_and_not_where_one_takes_it_back(tmp_path):
    path, copy = tmp_path / "choices.jsonl", tmp_path / "copy.jsonl"
    for i in range(3):
        append(path, choice("pair", f"p{i}", shown(tmp_path, (i, i + 20)), "chosen", i % 2, number=f"{i}"))
    copy.write_bytes(path.read_bytes())
    append(path, undo("1", "x"))
    for files in ((path, copy), (copy, path), (path, copy, path)):
        found = gather(files, fewest=1)
        assert [one.prompt for one in found.comparisons] == ["p0", "p2"] and found.choices == 2, files
    table = tmp_path / "pairs.csv"
    table.write_text(
        "chosen,rejected,prompt\n" + "".join(f"{one.better.path},{one.worse.path},{one.prompt}\n" for one in found.comparisons)
    )
    again = tmp_path / "again.csv"
    again.write_bytes(table.read_bytes())
    assert gather([table, again], fewest=1).choices == 2


def test_a_best_of_four_is_three_choices_that_hang_together(tmp_path):
    for i in range(4):
        append(tmp_path / "choices.jsonl", choice("best", f"p{i}", shown(tmp_path, range(5 * i, 5 * i + 4)), "chosen", i))
    found = gather([tmp_path / "choices.jsonl"])
    of = folds([one.keys for one in found.comparisons], level="image")
    assert found.choices == 12 and len(set(of.groups)) == 4
