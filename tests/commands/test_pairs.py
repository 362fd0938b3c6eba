"""`pairs`: refused before anything is drawn, scored once, labelled as often as wanted, and read by training."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.commands import sample
from trainer.data.preferences import read_labels, read_pairs
from trainer.scoring import scorer

RED = "def reward(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
BLUE = "def reward(images, prompts):\n    return images[:, 2].mean((1, 2)) + 1e-3 * len(images)\n"  # depends on the batch
WITH = {"r.py": RED, "b.py": BLUE, "broken.py": "def reward(images, prompts):\n    return images.mean((1, 2, 3)) / 0\n", "same.py": RED}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with rewards and ten images of six prompts, of which two have one image."""
    monkeypatch.chdir(tmp_path)
    for name, text in WITH.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "in").mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16), (25 * i, 0, 250 - 25 * (i * 3 % 10))).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(f"prompt {min(i // 2, 4) if i < 9 else 'alone'}")
    (tmp_path / "q.csv").write_text("prompt,quality\na red star,3\n")
    (tmp_path / "nan.csv").write_text("prompt,quality\na red star,nan\n")
    (tmp_path / "two.csv").write_text("prompt,quality\na red star,8\na red star,3\n")
    (tmp_path / "prompts.txt").write_text("a red star\na large blue ring on a black background\n")
    return tmp_path


def run(*arguments, out="o"):
    return main(["pairs", *map(str, arguments), "--out", out])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and ".journal" not in p.name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reward", "r.py", "--heldout", "r.py", "--raw"],
            "--heldout r.py is the reward that ranks, r.py: a held-out reward is another one",
        ),
        (["--reward", "r.py", "--heldout", "same.py", "--raw"], "--heldout same.py is the reward that ranks, r.py"),
        (["--heldout", "demo-heldout=2"], "--heldout demo-heldout=2: give one reward, without a weight"),
        (["--reward", "r.py=0", "--reward", "demo-proxy"], "--reward r.py=0 ranks nothing"),
        (["--reward", "r.py"], "--reward r.py has no mean and standard deviation, in which margins are measured: run `python -m trainer"),
        (["--reward", "broken.py", "--raw"], "reward broken.py cannot score an image: broken.py"),
        (["--n", "1"], "unknown argument --n"),
        (["-n", "1"], "-n 1: a pair is two images of one prompt, give at least 2"),
        (["--prompt", "x", "--split", "0.1"], None),
        (["--split", "1"], "--split 1: give a share from 0"),
        (["--label", "given"], "--label given keeps the labels of --from-pairs: give that, or --label sum or majority"),
        (["--min-margin", "2", "--max-margin", "1"], "error: --max-margin = 1 is below min-margin = 2: give a range"),
        (["--min-agreement", "2"], "--min-agreement = 2.0"),
        (["--quality-weight", "1"], "--quality-weight needs the quality of each prompt: give --quality FILE"),
        (
            ["--quality-weight", "1", "--quality", "q.csv"],
            "no quality is given for 1 prompt, such as 'a large blue ring on a black background'",
        ),
        (["--quality-weight", "1", "--quality", "nan.csv"], "nan.csv, line 2: quality is 'nan': give a number"),
        (["--quality-weight", "1", "--quality", "two.csv"], "two.csv, line 3: the quality of 'a red star' is 8 above and 3 here: keep one"),
        (["--from", "in", "-n", "7"], "-n has no effect on images that exist: leave it out, or --from and --from-pairs"),
        (["--from", "in", "--prompts", "prompts.txt"], "--prompts has no effect on images that exist"),
        (["--quality", "q.csv"], "--quality has no effect without --quality-weight: give both"),
        (["--reward", "demo-gold", "--diversity-weight", "1"], "--diversity-weight measures distances of prompts: name a two-tower reward"),
        (["--from", "in", "--from-pairs", "in"], "--from and --from-pairs are both given"),
        (["--from", "in/9.png", "--from", "in/0.png"], "each of 2 images has a prompt of its own: a pair is two images of one prompt"),
    ],
)
def test_what_can_give_no_pair_is_refused_before_anything_is_drawn(arguments, message, here, monkeypatch, capsys):
    monkeypatch.setattr(sample, "run", lambda args: pytest.fail("drawn"))
    drawing = [] if {"--from", "--prompt"} & {*arguments} else ["--prompts", "prompts.txt"]
    assert run(*drawing, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and (message or "--split 0.1 holds out prompts, and there is one") in said
    assert not (here / "o").exists()


def test_a_folder_of_something_else_is_refused_even_to_overwrite(here, capsys):
    (here / "o").mkdir()
    (here / "o" / "mine.txt").write_text("mine")
    for more in ([], ["--overwrite"], ["--resume"]):
        assert run("--from", "in", "--reward", "r.py", "--raw", *more) == 2
        assert "o holds no run of `pairs`: give another folder" in capsys.readouterr().err
    assert [p.name for p in (here / "o").iterdir()] == ["mine.txt"]


def test_images_that_exist_are_scored_once_and_labelled_anew(here, monkeypatch, capsys):
    given = ["--from", "in", "--reward", "r.py", "--reward", "b.py=2", "--heldout", "compressibility", "--raw", "--batch", "4"]
    assert run(*given, "--split", "0.4") == 0
    said = capsys.readouterr().out
    assert "2 images alone under their prompt" in said and "kept 4 of 4 pairs: 2 for training (2 prompts), 2 held out" in said
    red, blue = [round(25 * i / 255, 6) for i in range(10)], [(250 - 25 * (i * 3 % 10)) / 255 for i in range(10)]
    pairs = rows(here / "o" / "pairs.jsonl") + rows(here / "o" / "pairs-heldout.jsonl")
    best = [max(part, key=lambda i: red[i] + 2 * blue[i]) for part in ((0, 1), (2, 3), (4, 5), (6, 7))]
    assert sorted(int(one["chosen"][-5]) for one in pairs) == best
    for one in pairs:
        a, b = (int(one[side][-5]) for side in ("chosen", "rejected"))
        assert one["margin"] == pytest.approx(red[a] - red[b] + 2 * (blue[a] - blue[b]), abs=2e-5)
    first = written(here / "o")
    read_labels(str(here / "o" / "labels.jsonl"))

    monkeypatch.setattr(scorer, "load_bytes", lambda path: pytest.fail("scored again"))
    assert run(*given, "--split", "0.4", "--resume") == 0 and written(here / "o") == first
    assert run(*given, "--split", "0", "--label", "majority", "--resume") == 0
    votes = rows(here / "o" / "pairs.jsonl")
    assert {one["agreement"] for one in votes} == {1.0} and not (here / "o" / "pairs-heldout.jsonl").exists()
    assert json.loads((here / "o" / "report.json").read_text())["settings"]["label"] == "majority"
    capsys.readouterr()
    assert run(*given[:-2], "--batch", "8", "--resume") == 2 and "was scored with batch 4, now 8" in capsys.readouterr().err
    assert run("--from", "in", "--reward", "r.py", "--raw", "--resume") == 2
    assert (
        'settings.json: the run has other rewards, ["r.py", "b.py", "compressibility"], now ["r.py", "compressibility"]'
        in capsys.readouterr().err
    )
    assert run(*given, "--label", "sum", "--min-margin", "9", "--resume") == 2
    assert "no pair is left (2 images alone under their prompt, 4 margin too small)" in capsys.readouterr().err


def test_a_stopped_run_scores_whole_batches_and_ends_with_the_same_bytes(here, monkeypatch):
    given = ["--from", "in", "--reward", "b.py", "--raw", "--batch", "4", "--split", "0.4"]
    assert run(*given, out="whole") == 0
    decode, seen = scorer.load_bytes, []

    def stop(path):
        seen.append(path.name)
        if len(seen) > 6:
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(scorer, "load_bytes", stop)
    assert run(*given) == 130
    monkeypatch.setattr(scorer, "load_bytes", decode)
    assert run(*given, "--resume") == 0 and written(here / "o") == written(here / "whole")


def test_pairs_that_exist_are_filtered_and_keep_their_labels_or_get_others(here, capsys):
    (here / "human.csv").write_text("chosen,rejected,prompt\nin/0.png,in/1.png,p\nin/3.png,in/2.png,q\nin/5.png,in/4.png,q\n")
    given = ["--from-pairs", "human.csv", "--reward", "r.py", "--raw", "--split", "0"]
    assert run(*given) == 0
    assert [int(one["chosen"][-5]) for one in rows(here / "o" / "pairs.jsonl")] == [3, 5]  # red contradicts the first; both of q
    report = json.loads((here / "o" / "report.json").read_text())
    assert report["settings"]["label"] == "given" and report["turned"] == {"pairs": 0}
    assert report["dropped"] == {"rewards contradict the label": 1}
    capsys.readouterr()
    assert run(*given, "--per-prompt", "1", "--resume") == 0 and len(rows(here / "o" / "pairs.jsonl")) == 1
    capsys.readouterr()
    assert run(*given, "--label", "sum", "--per-prompt", "0", "--resume") == 0
    assert "labels turned round by the rewards: 1 of 3 pairs" in capsys.readouterr().out
    assert [int(one["chosen"][-5]) for one in rows(here / "o" / "pairs.jsonl")] == [1, 3, 5]


def test_images_that_cannot_be_scored_are_named(here, capsys):
    (here / "in" / "3.png").write_bytes(b"no image")
    assert run("--from", "in", "--reward", "r.py", "--raw", "--split", "0") == 1
    said = capsys.readouterr()
    assert "not scored: in/3.png is not a readable image" in said.err and "1 image not scored" in said.out


def test_drawn_images_become_pairs_of_their_prompts(here, capsys):
    given = ["--prompts", "prompts.txt", "-n", "2", "--steps", "2", "--heldout", "demo-heldout", "--split", "0.5"]
    (here / "q.csv").write_text("prompt,quality\na red star,8\na large blue ring on a black background,3\n")
    assert run(*given, "--diversity-weight", "1", "--quality-weight", "0.5", "--quality", "q.csv") == 0
    one, other = (read_pairs(str(here / "o" / f"{name}.jsonl")) for name in ("pairs", "pairs-heldout"))
    assert {one[0][2], other[0][2]} == {"a red star", "a large blue ring on a black background"}
    for row in rows(here / "o" / "pairs.jsonl") + rows(here / "o" / "pairs-heldout.jsonl"):
        bonus = 0.5 * (8 if "star" in row["prompt"] else 3)
        assert row["value"] - row["margin"] - bonus < math.log(2)  # log of the distance of two unit vectors
    before = written(here / "o")
    assert run(*given, "--resume", "--seed", "1") == 2 and "settings.json: the run has other seed, null, now 1" in capsys.readouterr().err
    assert written(here / "o") == before


def test_pairs_of_a_data_set_are_written_and_filtered(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets", reason="pip install datasets")
    images = [(here / "in" / f"{i}.png").read_bytes() for i in range(4)]
    rows_ = {"jpg_0": images[:2], "jpg_1": images[2:], "label_0": [0.0, 1.0], "caption": ["p", "q"]}
    library.Dataset.from_dict(rows_).save_to_disk(here / "pick")
    for more in ([], ["--resume"]):
        assert run("--from-pairs", "hf:pick", "--reward", "r.py", "--raw", "--split", "0", "--label", "given", *more) == 0
        (pair,) = read_pairs(str(here / "o" / "pairs.jsonl"))  # red contradicts the second
        assert [pair[0].read_bytes(), pair[1].read_bytes(), pair[2]] == [images[2], images[0], "p"]
