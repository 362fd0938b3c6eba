"""What is scored, and under which prompt: a table of scores names the same images and prompts again."""

from __future__ import annotations

import os
import shutil

import pytest
from helpers.images import write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.__main__ import main
from trainer.data.captions import read_captions
from trainer.data.report import Report
from trainer.data.rows import read_rows
from trainer.rewards.base import RewardModel
from trainer.rewards.weighted import RewardSpec
from trainer.scoring.items import Item, find_items, prompt_for
from trainer.scoring.scorer import ScoredImage
from trainer.scoring.table import Table
from trainer.text import valid


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.full)])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_of_scores_is_a_manifest_of_the_same_images_and_prompts(suffix, examples, tmp_path):
    names = ["a.png", "b, c.png", 'd "e".png', "ü ★.png", os.fsdecode(b"caf\xe9.png"), "f;g\t.png", "h\\i.png"]
    for i, name in enumerate(names):
        write_image(tmp_path / "x.png", i)
        os.rename(tmp_path / "x.png", tmp_path / name)
    table = Table([RewardSpec("r", RewardModel())], raw=True)
    pieces = st.sampled_from(["a star", ",", ";", "\t", '"', "'", "\n", "\r\n", "\r", "\u2028", "\x0b", "\\", "|", "=1+1", " ", "★"])
    prompts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.lists(prompts, min_size=len(names), max_size=len(names)))
    def check(texts):
        rows = [ScoredImage(str(tmp_path / name), text, {"r": 0.5}) for name, text in zip(names, texts)]
        table.write(rows, tmp_path / f"s.{suffix}")
        assert find_items([str(tmp_path / f"s.{suffix}")]) == [Item(tmp_path / name, text.strip()) for name, text in zip(names, texts)]

    check()


def test_train_and_score_take_a_table_of_scores_from_any_folder(tmp_path, monkeypatch, capsys):
    for i in range(3):
        write_image(tmp_path / "in" / f"{i}.png", i, f"a star, number {i}")
    (tmp_path / "bright.py").write_text("def reward(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    for suffix in ("csv", "jsonl"):
        assert main(["score", "in", "--reward", "bright.py", "--out", f"out/{suffix}/s.{suffix}"]) == 0
    for path in (tmp_path / "in").glob("*.txt"):
        path.unlink()
    monkeypatch.chdir(tmp_path / "else")
    for suffix in ("csv", "jsonl"):
        table = tmp_path / "out" / suffix / f"s.{suffix}"
        assert [(path.name, caption) for path, caption in read_captions(str(table))] == [
            (f"{i}.png", f"a star, number {i}") for i in range(3)
        ]
        capsys.readouterr()
        assert main(["score", str(table), "--reward", str(tmp_path / "bright.py"), "--out", f"{suffix}.{suffix}"]) == 0
        assert "read 3 rows, 3 images, 3 captions from" in capsys.readouterr().out
        rows = [read_rows(path, ["path"], [], Report()) for path in (table, tmp_path / "else" / f"{suffix}.{suffix}")]
        scores = [[float(row.values["score"]) for row in table] for table in rows]
        assert scores[0] == scores[1] and len(set(scores[0])) == 3


def test_the_report_names_what_is_scored_without_a_caption_and_what_is_named_twice(tmp_path):
    write_image(tmp_path / "a.png", 0, "a star")
    write_image(tmp_path / "b.png", 1)
    (tmp_path / "notes.md").write_text("x")
    report = Report()
    write_image(tmp_path / "c" / "c.png", 0, "a star\nin two lines")
    write_image(tmp_path / "c" / "d.png", 0)
    (tmp_path / "c" / "d.txt").write_bytes(b"caf\xe9")  # stops nothing here
    find_items([str(tmp_path / "c")], report=report)
    assert str(report) == (
        f"read 2 images, 1 caption from {tmp_path / 'c'}; left out: nothing; 1 with several lines, the first taken as the caption (c.txt)"
    )
    shutil.rmtree(tmp_path / "c")
    report = Report()
    found = find_items([str(tmp_path), str(tmp_path / "a.png"), str(tmp_path / "*")], report=report)
    assert found == [Item(tmp_path / "a.png"), Item(tmp_path / "b.png")]
    assert str(report).startswith("read 2 images, 1 caption from ")
    assert str(report).endswith("; left out: 2 not an image (notes.md, notes.md), 3 named twice (a.png, a.png, …)")


def test_prompts_that_are_no_text_become_text(tmp_path):
    """Half an emoji, and bytes of a command line that are not UTF-8."""
    write_image(tmp_path / "a.png", 0)
    (item,) = find_items([str(tmp_path / "a.png")], prompt="a \ud83c star " + os.fsdecode(b"\xe9"))
    assert item.prompt == "a \ufffd star \ufffd" and prompt_for(item) == item.prompt
    assert valid("a \ud83c\udf1f star") == "a \U0001f31f star"
