"""Scoring of image files: which are found, which prompt is used, what is written, and what bad files do."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import finish, said, start
from PIL import Image, PngImagePlugin

from trainer.__main__ import main
from trainer.data import images
from trainer.rewards.base import RewardModel
from trainer.rewards.preprocess import Fit
from trainer.rewards.weighted import RewardSpec
from trainer.scoring import scorer
from trainer.scoring.items import Item, find_items, prompt_for
from trainer.scoring.journal import Journal
from trainer.scoring.scorer import ScoredImage, score
from trainer.scoring.table import Table, folder_name

BRIGHT = "def reward(images, prompts):\n    return images.mean((1, 2, 3))\n"


class Brightness(RewardModel):
    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images, prompts):
        self.batches.append(images.shape)
        return images.mean((1, 2, 3))


def grey(path, level, size=(8, 8), caption="a grey square"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def folder(tmp_path):
    """Six grey squares of two prompts, and a reward that likes them bright."""
    for i in range(6):
        grey(tmp_path / "in" / f"{i}.png", 40 * i, caption=f"prompt {i % 2}")
    (tmp_path / "bright.py").write_text(BRIGHT)
    return tmp_path


def run(folder, *arguments):
    return main(["score", str(folder / "in"), "--reward", str(folder / "bright.py"), *map(str, arguments)])


# -- which images, which prompt --------------------------------------------------------------------------------------


def test_folders_files_globs_and_manifests_are_found_in_order_and_once(folder):
    inside = sorted((folder / "in").glob("*.png"))
    assert [i.path for i in find_items([str(folder / "in")])] == inside
    assert [i.path for i in find_items([str(folder / "**" / "[12].png")])] == inside[1:3]
    assert (
        find_items([str(inside[3]), str(folder / "in"), str(inside[3])])[0] == Item(inside[3])
        and len(find_items([str(folder / "in")] * 2)) == 6
    )
    (folder / "m.csv").write_text('path,caption\nin/0.png,"a, b"\nin/1.png,\n')
    assert find_items([str(folder / "m.csv")]) == [Item(inside[0], "a, b"), Item(inside[1])]
    (folder / "m.jsonl").write_text('{"file_name": "in/0.png", "title": "x", "prompt": "y"}\n\n{"image": "in/0.png", "title": "z"}\n')
    assert [i.prompt for i in find_items([str(folder / "m.jsonl")])] == ["y", None]
    assert [i.prompt for i in find_items([str(folder / "m.jsonl")], prompt_column="title")] == ["x", "z"]
    assert {i.prompt for i in find_items([str(folder / "in"), str(folder / "m.jsonl")], prompt="one")} == {"one"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "name,prompt\na,b\n", "m.csv, line 1: no column path, image, .*; there are name, prompt: begin with the columns"),
        ("m.csv", "path,prompt\n,b\n", "line 2: no image; name one in a column path"),
        ("m.jsonl", "[1]\n", "line 1: give one JSON object per line"),
        ("m.jsonl", "{", "m.jsonl, line 1 is not JSON: .*; give one JSON object per line"),
        ("m.csv", b"path\n\xff\n", r"m.csv is not UTF-8 \(line 2, byte 0xFF\): save it as UTF-8"),
        ("m.jsonl", "[" * 100_000, "m.jsonl, line 1 is not JSON"),
        ("m.csv", "0.png,a star\n", "m.csv, line 1: no column path, .*; there are 0.png, a star: begin with the columns"),
        ("m.csv", "path,prompt\n", "m.csv names no image: write a line with the columns"),
        ("m.jsonl", "", "m.jsonl names no image"),
    ],
)
def test_faulty_manifests_are_said_to_be(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        find_items([str(tmp_path / name)])


def test_a_missing_prompt_column_is_said_with_what_there_is(tmp_path):
    (tmp_path / "m.csv").write_text("path,prompt\na.png,b\n")
    with pytest.raises(ValueError, match="no column 'title'; there are path, prompt"):
        find_items([str(tmp_path / "m.csv")], prompt_column="title")


def test_nothing_to_score_is_an_error(tmp_path):
    for path, message in (
        ("", "an empty path"),
        (tmp_path, "holds no image"),
        (tmp_path / "*.png", "no image matches"),
        (tmp_path / "x", "no image folder"),
    ):
        with pytest.raises(ValueError, match=message):
            find_items([str(path)])


def png_with(path, **texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


A1111 = "a fox,\nin the snow\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, Size: 4x4"


def test_a_prompt_given_beats_the_one_beside_which_beats_the_one_inside(tmp_path):
    path = png_with(tmp_path / "a.png", parameters=A1111)
    assert prompt_for(Item(path)) == "a fox,\nin the snow"
    path.with_suffix(".txt").write_text("beside\n")
    assert prompt_for(Item(path)) == "beside" and prompt_for(Item(path, "given")) == "given"


# -- images of every kind --------------------------------------------------------------------------------------------


def test_unusual_pictures_follow_the_written_rules(tmp_path):
    def save(picture, name, **options):
        picture.save(tmp_path / name, **options)
        return images.load_bytes(tmp_path / name)

    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    deep = save(Image.fromarray(ramp.astype(np.uint16)), "deep.png")
    assert deep.shape == (3, 8, 8) and np.array_equal(deep[0].numpy(), (ramp.astype(np.uint16) / 257).round())
    assert save(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "cmyk.jpg")[:, 0, 0].tolist() == pytest.approx([0, 255, 255], abs=3)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert save(palette, "palette.png")[:, 0, 0].tolist() == [10, 200, 30]
    assert save(palette, "clear.png", transparency=1)[:, 0, 0].tolist() == [255, 255, 255]
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert save(frames[0], "moving.webp", save_all=True, append_images=frames[1:], lossless=True)[:, 0, 0].tolist() == [255, 0, 0]
    assert save(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "alpha.png")[:, 0, 0].tolist() == [255, 255, 255]
    assert save(Image.new("LA", (8, 8), (0, 128)), "grey-alpha.png")[0, 0, 0] == pytest.approx(127, abs=1)
    assert save(Image.new("1", (8, 8), 1), "bit.png").min() == 255
    turned = Image.Exif()
    turned[0x0112] = 6
    assert save(Image.new("RGB", (8, 4)), "turned.jpg", exif=turned).shape == (3, 8, 4)
    assert save(Image.new("RGB", (1, 1)), "dot.png").shape == (3, 1, 1)
    assert save(Image.new("RGB", (20_000, 10)), "wide.png").shape == (3, 10, 20_000)


BAD = {
    "zero.png": b"",
    "text.png": b"this is no picture",
    "cut.png": None,
    "huge.png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0) + b"\0\0\0\0",
}


def test_bad_files_are_listed_at_the_end_and_stop_nothing(folder, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    noise.save(folder / "in" / "cut.png")
    for name, content in BAD.items():
        path = folder / "in" / name
        path.write_bytes(content if content is not None else path.read_bytes()[:-400])
    grey(folder / "in" / "nameless.png", 9, caption="")
    for odd in ("1x1", "20000x10"):
        grey(folder / "in" / f"{odd}.png", 50, tuple(map(int, odd.split("x"))))
    assert run(folder, "--out", folder / "s.csv") == 1
    captured = capsys.readouterr()
    assert len(list(csv.DictReader((folder / "s.csv").open()))) == 8
    for name in BAD:
        assert f"{name} is not a readable image" in captured.err
    assert "nameless.png has no prompt: give --prompt, a manifest, or nameless.txt beside it" in captured.err
    assert "5 of 13 images were not scored" in captured.err
    assert not list(folder.glob("*.partial"))


def test_a_picture_whose_reader_fails_in_a_way_of_its_own_is_a_bad_file(folder, monkeypatch, capsys):
    def stumble(picture):
        raise KeyError(262)

    monkeypatch.setattr(images, "_eight_bit", lambda picture: stumble(picture) if picture.filename.endswith("3.png") else picture)
    assert run(folder, "--out", folder / "s.csv") == 1
    assert "3.png is not a readable image: 262" in capsys.readouterr().err


def test_a_prompt_file_that_cannot_be_read_makes_a_bad_file(folder, monkeypatch, capsys):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "2.txt":
            raise PermissionError(f"not yours: {path}")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert run(folder, "--out", folder / "s.csv") == 1
    assert "1 of 6 images were not scored" in capsys.readouterr().err


def test_a_float_picture_is_refused_with_the_remedy(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match=r"f.tiff is not a readable image: its pixels are floating-point .* 8 or 16 bits"):
        images.load_bytes(tmp_path / "f.tiff")


def test_a_missing_file_of_a_manifest_is_a_bad_file(tmp_path):
    (tmp_path / "m.csv").write_text("path,prompt\nnone.png,a\n")
    (row,) = score(find_items([str(tmp_path / "m.csv")]), [RewardSpec("b", Brightness())])
    assert "none.png is not a readable image" in row.error


# -- scores ----------------------------------------------------------------------------------------------------------


def test_pictures_of_many_sizes_are_scored_as_if_alone(tmp_path, reward_folder):
    from tests.parity.pixels import with_pillow
    from trainer.rewards.registry import load

    sizes = [(80, 64), (64, 64), (30, 90), (64, 64), (80, 64)]
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    part = load(str(reward_folder))
    rows = list(score(find_items([str(tmp_path)], prompt="a red star"), [part], batch=4))
    alone = [images.load_bytes(tmp_path / f"{i}.png") / 255 for i in range(5)]
    by_pillow = torch.stack([with_pillow(image, part.fit) for image in alone])  # as the original packages fit them
    expected = part.reward(by_pillow, ["a red star"] * 5)
    differentiable = torch.cat([part.reward(image[None], ["a red star"]) for image in alone])
    found = torch.tensor([r.raw[part.name] for r in rows])
    assert [Path(r.path).name for r in rows] == [f"{i}.png" for i in range(5)]
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.std()), rtol=0)
    torch.testing.assert_close(found, differentiable, atol=5e-2 * float(expected.std()), rtol=0)


def test_large_images_in_their_own_size_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    paths = [grey(tmp_path / f"{i:02d}.png", 10 * i, size=(40, 40)) for i in range(20)]
    decoded, reward, most = [], Brightness(), []
    monkeypatch.setattr(scorer, "PIXELS_PER_BATCH", 2 * 40 * 40)
    monkeypatch.setattr(scorer, "load_bytes", lambda path: decoded.append(path) or images.load_bytes(path))
    for number, row in enumerate(score([Item(p) for p in paths], [RewardSpec("b", reward)], batch=8, threads=2)):
        assert row.raw["b"] == pytest.approx(10 * number / 255, abs=1e-6)
        most.append(len(decoded) - number)
    assert max(most) <= 2 + 8 and {shape[0] for shape in reward.batches} == {2}  # a batch, and four batches ahead


def test_equal_fits_share_one_resize_and_rewards_without_one_see_pictures_as_they_are(tmp_path, monkeypatch):
    for i in range(4):
        grey(tmp_path / f"{i}.png", 40, (8 + i % 2, 8))
    resized, fit_bytes = [], Fit.of_bytes
    monkeypatch.setattr(Fit, "of_bytes", lambda fit, image: resized.append(fit.size) or fit_bytes(fit, image))
    fitted, plain = Brightness(), Brightness()
    parts = [
        RewardSpec("a", fitted, size=6),
        RewardSpec("b", Brightness(), size=6),
        RewardSpec("c", Brightness(), size=7),
        RewardSpec("d", plain),
    ]
    assert all(r.raw["a"] == pytest.approx(40 / 255) for r in score(find_items([str(tmp_path)]), parts, batch=4))
    assert sorted(resized) == [6] * 4 + [7] * 4 and fitted.batches == [(4, 3, 6, 6)] and plain.batches == [(2, 3, 8, 8), (2, 3, 8, 9)]


def test_a_score_that_is_not_finite_is_a_bad_file(tmp_path):
    class Odd(Brightness):
        def forward(self, images, prompts):
            return torch.tensor([float("nan"), 1.0])

    paths = [grey(tmp_path / "a.png", 0), grey(tmp_path / "b.png", 0)]
    rows = list(score([Item(p) for p in paths], [RewardSpec("odd", Odd())]))
    assert "a.png: odd gave nan" in rows[0].error and rows[1].raw == {"odd": 1.0}


def test_rewards_without_need_of_a_prompt_score_without_one(tmp_path, capsys):
    grey(tmp_path / "a.png", 5, caption="")
    assert main(["score", str(tmp_path), "--reward", "incompressibility"]) == 0
    (line,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert float(line["incompressibility"]) == float(line["score"]) > 0 and line["prompt"] == ""


# -- tables ----------------------------------------------------------------------------------------------------------


def test_raw_and_standardised_scores_and_their_weighted_sum():
    parts = [RewardSpec("a", Brightness(), 2.0, 1.0, 0.5), RewardSpec("b", Brightness(), -1.0, 0.0, 4.0)]
    line = Table(parts).line(ScoredImage("p", "x", {"a": 2.0, "b": 8.0}))
    assert line == {"path": "p", "prompt": "x", "a": 2.0, "a_z": 2.0, "b": 8.0, "b_z": 2.0, "score": 2.0}
    assert Table(parts, raw=True).line(ScoredImage("p", "x", {"a": 2.0, "b": 8.0}))["score"] == -4.0
    unknown = [parts[0], RewardSpec("c", Brightness())]
    assert Table(unknown).columns == ["path", "prompt", "a", "a_z", "c"]
    with pytest.raises(ValueError, match="no score to rank by: c has no statistics"):
        Table(unknown).best([], 1)


def test_csv_and_jsonl_say_the_same(folder):
    assert run(folder, "--out", folder / "s.csv", "--out", folder / "s.jsonl") == 0
    rows = list(csv.DictReader((folder / "s.csv").open()))
    lines = [json.loads(line) for line in (folder / "s.jsonl").read_text().splitlines()]
    assert [{k: str(v) for k, v in line.items()} for line in lines] == rows and len(rows) == 6
    assert [float(r["score"]) for r in rows] == pytest.approx([40 * i / 255 for i in range(6)], abs=1e-5)
    assert run(folder, "--out", folder / "s.csv") == 2


def test_the_best_of_each_prompt_are_copied_or_linked(folder):
    assert run(folder, "--top", 2, "--top-folder", folder / "best", "--out", folder / "s.csv") == 0
    best = {p.name: sorted(q.name for q in p.iterdir()) for p in (folder / "best").iterdir() if p.is_dir()}
    assert best == {folder_name("prompt 0"): ["01-4.png", "02-2.png"], folder_name("prompt 1"): ["01-5.png", "02-3.png"]}
    assert run(folder, "--top", 1, "--top-folder", folder / "links", "--link", "--out", folder / "t.csv") == 0
    (link,) = (folder / "links" / folder_name("prompt 1")).iterdir()
    assert link.is_symlink() and link.read_bytes() == (folder / "in" / "5.png").read_bytes()


@pytest.mark.parametrize("prompt", ["a/b\\c:*?", "", "ü" * 300, "con", "x" * 10_000])
def test_every_prompt_has_a_folder_name_of_its_own(prompt, tmp_path):
    (tmp_path / folder_name(prompt)).mkdir()
    assert len(folder_name(prompt)) <= 50 and folder_name(prompt) != folder_name(prompt + "!")


def test_scores_go_into_a_png_and_leave_pixels_and_other_texts_alone(folder):
    path = png_with(folder / "in" / "9.png", parameters=A1111)
    pixels = np.asarray(Image.open(path)).tobytes()
    Image.new("RGB", (4, 4)).save(folder / "in" / "j.jpg")
    for _ in range(2):
        assert run(folder, "--write-back", "--prompt", "ä fox", "--out", folder / "s.csv", "--overwrite") == 1  # the JPEG cannot hold it
    info = Image.open(path).info
    assert json.loads(info["imagerefl_scores"])["prompt"] == "ä fox" and info["parameters"] == A1111
    assert path.read_bytes().count(b"imagerefl_scores") == 1 and np.asarray(Image.open(path)).tobytes() == pixels


# -- stopping and going on -------------------------------------------------------------------------------------------

COUNTING = """
from pathlib import Path
def reward(images, prompts):
    with open({log!r}, "a") as file:
        file.write(str(len(images)) + "\\n")
    if Path({stop!r}).exists() and len(open({log!r}).readlines()) == 2:
        raise KeyboardInterrupt
    return images.mean((1, 2, 3))
"""


def test_a_stopped_run_goes_on_where_it_was(folder, capsys):
    log, stop = folder / "log", folder / "stop"
    (folder / "bright.py").write_text(COUNTING.format(log=str(log), stop=str(stop)))
    stop.touch()
    assert run(folder, "--batch", 2, "--out", folder / "s.csv") == 130
    stop.unlink()
    assert not (folder / "s.csv").exists() and len(list(folder.glob("s.csv.*.partial"))) == 1
    with open(folder / "s.csv.0.partial", "a") as file:
        file.write('{"path": "torn')  # a kill in the middle of a line
    assert run(folder, "--batch", 2, "--out", folder / "s.csv") == 2
    assert "add --resume to continue it" in capsys.readouterr().err
    assert main(["score", str(folder / "in"), "--reward", "compressibility", "--resume", "--out", str(folder / "s.csv")]) == 2
    assert "was scored with rewards" in capsys.readouterr().err
    (folder / "s.csv").write_text("of an earlier run")  # which the stopped run was told to replace
    assert run(folder, "--batch", 2, "--resume", "--out", folder / "s.csv") == 0
    assert [int(n) for n in log.read_text().split()] == [2, 2, 2, 2]  # the second pair was lost, no other was scored twice
    rows = list(csv.DictReader((folder / "s.csv").open()))
    assert [Path(r["path"]).name for r in rows] == [f"{i}.png" for i in range(6)] and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("left", ["", '{"rewards": ["bri', '\n{"path": "1.png", "prompt": "", "raw": {}, "error": ""}\n'])
def test_a_journal_killed_in_its_first_line_is_begun_anew(left, tmp_path):
    journal = Journal(tmp_path / "s.csv", 0, {"size": 0})
    journal.path.write_text(left)
    list(journal.append(iter([ScoredImage("0.png", "a", {"bright": 1.0})])))
    assert [row.path for row in journal.rows()] == ["0.png"]
    with pytest.raises(ValueError, match="was scored with size 0, now 8"):
        list(Journal(tmp_path / "s.csv", 0, {"size": 8}).rows())


def test_an_output_named_like_a_glob_gets_its_scores(folder):
    assert run(folder, "--out", folder / "s[1].csv") == 0
    assert len(list(csv.DictReader((folder / "s[1].csv").open()))) == 6 and not list(folder.glob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_that_is_not_utf_8_costs_no_other_image_its_score(folder):
    (folder / "in" / "0.png").rename(os.fsdecode(bytes(folder / "in") + b"/odd\xff.png"))
    assert run(folder, "--prompt", "a square", "--out", folder / "s.csv", "--out", folder / "s.jsonl") == 0
    assert len(list(csv.DictReader((folder / "s.csv").open(encoding="utf-8")))) == 6
    paths = [json.loads(line)["path"] for line in (folder / "s.jsonl").read_text("utf-8").splitlines()]
    assert len(paths) == 6 and all(Path(path).is_file() for path in paths)


def test_a_picture_that_fails_under_one_prompt_is_listed_though_it_has_a_score_under_another(tmp_path):
    journal = Journal(tmp_path / "s.csv", 0, {})
    good, bad = ScoredImage("0.png", "good", {"odd": 1.0}), ScoredImage("0.png", "bad", error="0.png: odd gave nan")
    unread, mended = ScoredImage("1.png", error="cut"), ScoredImage("1.png", "from beside it", {"odd": 2.0})
    list(journal.append(iter([good, bad, unread, mended])))
    assert journal.finished() == [good, bad, mended]
    again = ScoredImage("0.png", "bad", {"odd": 3.0})
    list(journal.append(iter([again])))
    assert journal.finished() == [good, again, mended]


@pytest.mark.slow
def test_two_processes_share_the_work_and_write_one_table(folder):
    arguments = ["score", str(folder / "in"), "--reward", str(folder / "bright.py")]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    command = [*launch, "-m", "trainer", *arguments, "--out", str(folder / "s.csv")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert main([*arguments, "--out", str(folder / "one.csv")]) == 0
    assert (folder / "s.csv").read_text() == (folder / "one.csv").read_text() and not list(folder.glob("*.partial"))


def score_in_process(folder):
    return main(["score", str(folder / "in"), "--reward", str(folder / "failing.py"), "--out", str(folder / "s.csv")])


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_one_error_line(folder):
    failing = "import os\ndef reward(images, prompts):\n    if os.environ['RANK'] == '1':\n        raise OSError('disk gone')\n"
    (folder / "failing.py").write_text(failing + "    return images.mean((1, 2, 3))\n")
    assert finish(start(2, score_in_process, folder)) == [2, 2]
    assert [line for rank in (0, 1) for line in said(folder, rank) if not line.startswith("read ")] == [
        f"error: {folder / 'failing.py'}: reward() failed: OSError: disk gone (line 4)"
    ]
    assert not (folder / "s.csv").exists() and (folder / "s.csv.0.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt"], "give a .csv or a .jsonl file"),
        (["--batch", "0"], "--batch needs at least 1"),
        (["--reward", "bright.py=1", "--reward", "bright.py=2"], "given twice"),
    ],
)
def test_faulty_arguments_are_one_line(arguments, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(folder, *arguments) == 2
    assert message in capsys.readouterr().err
    shutil.rmtree(folder / "in")
