"""The folder of the best images: an earlier run's copies are removed, and copies are not scored again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.scoring.items import find_items
from trainer.scoring.table import folder_name

BRIGHT = "def reward(images, prompts):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two folders of three grey squares each, those of the second brighter, and a reward that likes them bright."""
    for run in (1, 2):
        (tmp_path / f"r{run}").mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (60 * i + 20 * run,) * 3).save(tmp_path / f"r{run}" / f"r{run}_{i}.png")
    (tmp_path / "bright.py").write_text(BRIGHT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(*arguments, prompt="a square"):
    return main(["score", "--prompt", prompt, "--reward", "bright.py", *map(str, arguments)])


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".imagerefl-top.json")


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_the_best_of_an_earlier_run_are_removed_and_nothing_else(folder, link):
    place, other = folder_name("a square"), folder_name("a ring")
    assert score("r1", "--top", 2, *link) == 0
    assert names(folder / "best") == [f"{place}/01-r1_2.png", f"{place}/02-r1_1.png"]
    (folder / "best" / place / "mine.png").write_bytes(b"mine")
    assert score("r2", "--top", 1, *link, prompt="a ring") == 0
    assert names(folder / "best") == sorted([f"{place}/mine.png", f"{other}/01-r2_2.png"])
    (folder / "best" / place / "mine.png").unlink()
    (folder / "best" / place).rmdir()
    assert score("r1", "--top", 1, *link, prompt="a ring") == 0
    assert names(folder / "best") == [f"{other}/01-r1_2.png"] and len(names(folder / "r1")) == len(names(folder / "r2")) == 3


def test_copies_of_a_version_that_wrote_no_list_are_removed_by_their_place_and_name(folder):
    place = folder / "best" / folder_name("a square")
    place.mkdir(parents=True)
    for name in ("01-old.png", "02-old.png", "mine.png", "01-notes.txt"):
        (place / name).write_bytes(b"x")
    assert score("r1", "--top", 1) == 0
    assert names(place) == ["01-notes.txt", "01-r1_2.png", "mine.png"]


def test_the_best_inside_a_scored_folder_are_not_scored_again(folder, capsys):
    assert score("r1", "--top", 1, "--top-folder", "r1/best") == 0
    for path, count in (("r1", 3), ("r1/**/*.png", 3), (".", 6), ("r1/best", 1), ("r1/best/*/*.png", 1)):
        assert len(find_items([path])) == count, path
    (folder / "r1" / "best" / "mine.png").write_bytes((folder / "r1" / "r1_0.png").read_bytes())
    assert len(find_items(["r1"])) == 4  # a file that was not copied there is an image as others are
    (Path("r1") / "best").rename("moved")
    assert len(find_items(["."])) == 7


def test_a_top_folder_that_is_scored_or_holds_a_file_in_the_way_is_refused(folder, capsys):
    for arguments in (["r1", "--top-folder", "r1"], ["r1", "--top-folder", folder / "r2" / ".." / "r1"]):
        assert score(*arguments, "--top", 1, "--out", "s.csv") == 2
        assert "is scored itself: give another, such as" in capsys.readouterr().err and not Path("s.csv").exists()
    assert score("r1", "--top", 1) == 0
    assert score(*Path("best").rglob("*.png"), "--top", 1) == 2 and "is scored itself" in capsys.readouterr().err
    assert names(folder / "best") == [f"{folder_name('a square')}/01-r1_2.png"]
    in_the_way = folder / "best" / folder_name("a square") / "01-r2_2.png"
    in_the_way.write_bytes(b"mine")
    assert score("r2", "--top", 1) == 2 and "01-r2_2.png was there before: move it" in capsys.readouterr().err
    assert in_the_way.read_bytes() == b"mine"
    assert score("r1", "--top", 1, "--top-folder", "bright.py") == 2 and "is a file: give a folder" in capsys.readouterr().err


def test_the_table_on_the_terminal_has_each_image_as_soon_as_it_is_scored(folder, capsys):
    (folder / "bright.py").write_text(
        "def reward(images, prompts):\n    if images.mean() > 0.5:\n        raise KeyboardInterrupt\n    return images.mean((1, 2, 3))\n"
    )
    assert score("r1", "--batch", 1, "--raw") == 130
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["path", "r1/r1_0.png", "r1/r1_1.png"]


# -- resume ------------------------------------------------------------------------------------------------------------


def test_resume_scores_images_again_that_have_changed_or_whose_prompt_has(folder, capsys):
    log = folder / "log"
    note = f"    open({str(log)!r}, 'a').write(''.join(p + chr(10) for p in prompts))\n"
    (folder / "bright.py").write_text(BRIGHT.replace("    return", f"{note}    return"))
    for i in range(3):
        (folder / "r1" / f"r1_{i}.txt").write_text(f"prompt {i}")
    command = ["score", "r1", "--reward", "bright.py", "--raw", "--out", "s.jsonl"]
    assert main(command) == 0
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    Path("s.jsonl").unlink()
    states = [f"{(s := (folder / 'r1' / f'r1_{i}.png').stat()).st_size}:{s.st_mtime_ns}" for i in range(3)]
    header = {"rewards": ["bright.py"], "size": 0, "prompt": None, "prompt column": ""}

    def journal(known):
        lines = [
            {"path": row["path"], "prompt": row["prompt"], "raw": {"bright.py": 7.0}, "error": "", **({"state": state} if known else {})}
            for row, state in zip(rows, states)
        ]
        from trainer.rewards.registry import weights_hashes

        first = {**header, "weights": weights_hashes("bright.py")}
        Path("s.jsonl.0.partial").write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
        log.unlink(missing_ok=True)

    journal(known=True)
    Image.new("RGB", (8, 8), "white").save(folder / "r1" / "r1_0.png")
    (folder / "r1" / "r1_1.txt").write_text("another prompt")
    assert main([*command, "--resume"]) == 0
    scores = {Path(r["path"]).name: (r["prompt"], r["bright.py"]) for r in map(json.loads, Path("s.jsonl").read_text().splitlines())}
    assert log.read_text().splitlines() == ["prompt 0", "another prompt"]
    assert scores == {"r1_0.png": ("prompt 0", 1.0), "r1_1.png": ("another prompt", rows[1]["bright.py"]), "r1_2.png": ("prompt 2", 7.0)}
    journal(known=False)  # as earlier versions wrote it: the file is taken to be the same, its prompt is seen
    Path("s.jsonl").unlink()
    assert main([*command, "--resume"]) == 0
    assert log.read_text().splitlines() == ["another prompt"]


@pytest.mark.parametrize("name", ["score", "path", "prompt"])
def test_a_reward_called_like_a_column_is_refused(folder, name, capsys, reward_folder):
    os.symlink(reward_folder, name)
    assert main(["score", "r1", "--prompt", "a", "--reward", name, "--raw", "--out", "s.csv"]) == 2
    assert f"--reward {name}: the table has a column of that name: write ./{name}" in capsys.readouterr().err


def test_a_list_that_names_files_outside_the_folder_removes_none(folder):
    """`score` writes FOLDER/FILE; a list from elsewhere may name anything."""
    best, victim = folder / "best", folder / "victim.txt"
    best.mkdir()
    victim.write_text("mine")
    (best / ".imagerefl-top.json").write_text(json.dumps(["../victim.txt", str(victim), "a/../../victim.txt", "victim.txt", 3]))
    assert score("r1", "--top", 1, "--top-folder", best, "--out", "s.csv") == 0
    assert victim.read_text() == "mine"
