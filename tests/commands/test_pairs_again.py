"""`pairs` on pairs that repeat or contradict each other, on few groups, in small units; its folder as training and `--resume` take it."""

from __future__ import annotations

import argparse
import json

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.commands.pairs import configure
from trainer.commands.pairs_arguments import as_arguments
from trainer.data.preferences import list_labels, list_pairs
from trainer.data.report import Report
from trainer.pairs.tables import read_table

RED = "def reward(images, prompts):\n    return 1e-9 * images[:, 0].mean((1, 2))\n"  # in a small unit


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a reward and eight images, the redder the later, of which `copy.png` has the bytes of `1.png`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(RED)
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 200 - 20 * (3 * i % 8), 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    return tmp_path


def table(here, *rows, name="given.csv"):
    (here / name).write_text("\n".join(["chosen,rejected,prompt", *(",".join(row) for row in rows)]) + "\n")
    return name


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


REPEATED = [
    ("1.png", "0.png", "p"),
    ("1.png", "0.png", "p"),
    ("copy.png", "0.png", "p"),  # the same by its bytes
    ("1.png", "0.png", "q"),  # another prompt, another pair
    ("3.png", "2.png", "p"),
    ("2.png", "3.png", "p"),
    ("5.png", "4.png", "p"),
]


@pytest.mark.parametrize(
    ("label", "kept", "dropped"),
    [
        ("given", [("1.png", "p"), ("1.png", "q"), ("5.png", "p")], {"pairs given again": 2, "pairs labelled both ways": 1}),
        ("sum", [("1.png", "p"), ("1.png", "q"), ("3.png", "p"), ("5.png", "p")], {"pairs given again": 3}),
    ],
)
def test_a_pair_counts_once_and_one_that_is_labelled_both_ways_is_named(label, kept, dropped, here, capsys):
    given = ["--from-pairs", table(here, *REPEATED), "--reward", "r.py", "--raw", "--split", "0", "--per-prompt", "0", "--label", label]
    assert main(["pairs", *given, "--out", "o"]) == 0
    assert sorted((row["chosen"].rpartition("/")[2], row["prompt"]) for row in rows(here / "o" / "pairs.jsonl")) == sorted(kept)
    assert json.loads((here / "o" / "report.json").read_text())["dropped"] == dropped
    said = capsys.readouterr().out
    assert "labelled both ways: 3.png and 2.png under 'p'\n" in said
    assert "2 pairs given more than once" not in said and "1 pair given more than once (1.png), 1 pair labelled both ways" in said


def test_it_resumes_where_its_paths_lead_alone(here, capsys, monkeypatch):
    """Elsewhere they name other files: a reward of that name was imported before its hash was compared."""
    given = ["--from-pairs", table(here, ("7.png", "0.png", "p")), "--reward", "r.py", "--raw", "--split", "0", "--out", "o"]
    assert main(["pairs", *given]) == 0
    other = here / "other"
    other.mkdir()
    (other / "r.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(other)
    assert main(["pairs", "--resume", "--out", "../o"]) == 2
    assert f"was made in {here}, where its paths lead: run --resume there" in capsys.readouterr().err and not (other / "ran").exists()
    here.rename(moved := here.parent / "moved")
    monkeypatch.chdir(moved)
    assert main(["pairs", "--resume", *given]) == 0


def test_small_margins_are_kept(here):
    given = ["--from-pairs", table(here, ("7.png", "0.png", "p")), "--reward", "r.py", "--raw", "--split", "0", "--out", "o"]
    assert main(["pairs", *given]) == 0
    (row,), report = rows(here / "o" / "pairs.jsonl"), json.loads((here / "o" / "report.json").read_text())
    expected = pytest.approx(1e-9 * 210 / 255, rel=1e-6, abs=0)
    assert row["margin"] == expected and row["gaps"]["r.py"] == expected and report["margins"]["kept"]["50%"] == expected


def test_the_folder_itself_is_pairs_likes_and_a_source_and_resumes_with_its_own_arguments(here, capsys):
    pairs = [(f"{i + 1}.png", f"{i}.png", f"p{i}") for i in range(0, 8, 2)]
    first = ["--from-pairs", table(here, *pairs), "--reward", "r.py=2", "--raw", "--split", "0.5", "--min-margin", "1e-12", "--batch", "3"]
    assert main(["pairs", *first, "--out", "o"]) == 0
    before = {path.name: path.read_bytes() for path in (here / "o").iterdir()}
    assert not [name for name in before if name.endswith(".partial")]
    assert main(["pairs", "--resume", "--out", "o"]) == 0
    assert {path.name: path.read_bytes() for path in (here / "o").iterdir()} == before
    assert main(["pairs", "--resume", "--out", "o", "--split", "0.25"]) == 0
    assert len(rows(here / "o" / "pairs.jsonl")) == 3
    assert main(["pairs", "--resume", "--out", "o"]) == 0 and len(rows(here / "o" / "pairs.jsonl")) == 3  # the last call's
    capsys.readouterr()
    assert main(["pairs", "--resume", "--out", "o", "--reward", "r.py", "--reward", "compressibility"]) == 2
    assert 'the run has other rewards, ["r.py"], now ["r.py", "compressibility"]' in capsys.readouterr().err

    assert len(list_pairs("o")) == 3 and len(list_labels("o")) == 6
    report = Report()
    read, rewards = read_table(here / "o", report)
    assert rewards == ["r.py"] and all(pair.margin for pair in read) and "o/pairs.jsonl; left out" in str(report)
    assert main(["pairs", "--from-pairs", "o", "--reward", "r.py", "--raw", "--split", "0", "--out", "again"]) == 0


def test_arguments_read_back_as_they_were():
    def parsed(given):
        parser = argparse.ArgumentParser()
        configure(parser)
        return parser.parse_args([*given, "--out=o"])

    given = ["--prompt", "-a = b", "--prompt", "c", "--reward", "x=1", "--raw", "--keep", "4", "-n", "3", "--lora", "a b.safetensors"]
    args = parsed(given)
    assert parsed(as_arguments(args, configure)) == args
    assert as_arguments(parsed([]), configure) == []


@pytest.mark.parametrize(
    ("sizes", "share", "held"),
    [((3, 3, 3, 3), 0.2, 3), ((1,) * 10, 0.3, 3), ((5, 2, 2), 0.4, 4), ((4, 4, 2), 0.3, 2), ((6, 5, 3), 0.55, 8)],
)
def test_the_split_comes_as_near_to_its_share_as_groups_do(sizes, share, held):
    from trainer.pairs.label import Pair
    from trainer.pairs.split import split

    class Apart:
        def near(self, images, distance):
            return []

    pairs = [Pair(f"{g}.{i}a", f"{g}.{i}b", f"prompt {g}") for g, size in enumerate(sizes) for i in range(size)]
    train, out = split(pairs, share, 0, Apart(), 0.02)
    assert len(out) == held and not {pair.prompt for pair in train} & {pair.prompt for pair in out}


def test_the_files_of_a_run_are_no_images_that_were_left_out(here, capsys):
    """A folder of `pairs`, or of `sample`: its tables and contact sheet are named as such, not as files that are no image."""
    from trainer.commands.image_folder import ImageFolder
    from trainer.data.images import find, load

    folder = ImageFolder(here / "o" / "images")
    folder.path.mkdir(parents=True)
    for i in range(2):
        folder.write(i, load(here / f"{i}.png", 16), "p")
    folder.write_sheet(2, 2)
    (here / "o" / "images" / "settings.json").write_text("{}")
    (here / "o" / "pairs.jsonl").write_text("")
    (here / "o" / "mine-grid.png").write_bytes((here / "0.png").read_bytes())  # an image of that name, without a folder
    report = Report()
    assert [path.name for path in find(here / "o", report)] == ["00000.png", "00001.png", "mine-grid.png"]
    assert {why: sorted(names) for why, names in report.left_out.items()} == {
        "of a run of this program": ["images-grid.png", "pairs.jsonl", "settings.json"]
    }
