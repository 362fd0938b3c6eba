"""`sample`: everything is checked first, images are written as they are drawn, and a run goes on where it stopped."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.commands import image_folder, sample
from trainer.commands.image_folder import ImageFolder
from trainer.commands.options import policy_of
from trainer.config import ConfigError

SETTINGS = {"steps": 2, "method": "ddpm", "seed": 0, "model": "demo", "lora": "", "k": None, "images": 3}


def run(out, *more, n=5, prompt="a red star"):
    arguments = ["sample", "--prompt", prompt, "-n", n, "--steps", 2, "--chunk", 2, "--out", out, *more]
    return main(list(map(str, arguments)))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def opened():
    """The embedded model, loaded once."""
    found = []
    return lambda args: found[0] if found else found.append(policy_of(args)) or found[0]


@pytest.fixture(autouse=True)
def _one_model(opened, monkeypatch):
    monkeypatch.setattr(sample, "policy_of", opened)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, opened):
    """Five images, drawn by two, without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "policy_of", opened)
        assert run(folder) == 0
    return folder


def test_a_stopped_run_keeps_what_was_drawn_and_resumes_to_the_same_files(whole, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "images", ImageFolder.write

    def stop(self, number, image, prompt):
        if number == 3:  # in the middle of a batch
            raise KeyboardInterrupt
        write(self, number, image, prompt)

    monkeypatch.setattr(ImageFolder, "write", stop)
    assert run(out) == 130
    assert capsys.readouterr().err == f"interrupted: 3 of 5 images are in {out}; the same command with --resume goes on\n"
    assert sorted(files(out)) == sorted(["settings.json", *(f"0000{i}.{kind}" for i in range(3) for kind in ("png", "txt"))])
    monkeypatch.setattr(ImageFolder, "write", write)
    assert run(out) == 2 and "add --overwrite to write into it, or --resume" in capsys.readouterr().err
    assert run(tmp_path / "elsewhere" / ".." / "images", "--resume", "--chunk", 2) == 0
    assert "wrote 2 images" in (said := capsys.readouterr().out) and "3 were there" in said
    assert files(out) == files(whole)
    before = (out / "00001.png").stat().st_mtime_ns
    (out / "00000.png").unlink()
    assert run(out, "--resume") == 0 and files(out) == files(whole) and (out / "00001.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "key"),
    [(["--seed", "1"], "seed, 0, now 1"), (["--steps", "3"], "steps, 2, now 3"), (["-n", "6"], "n, 5, now 6")],
)
def test_resume_refuses_other_settings(whole, more, key, capsys):
    before = files(whole)
    assert run(whole, *more, "--resume") == 2
    assert f"{whole / 'settings.json'}: the run has another {key}: give the same, or --overwrite" in capsys.readouterr().err
    assert files(whole) == before


def test_resume_refuses_another_prompt_and_a_folder_of_something_else(whole, tmp_path, capsys):
    assert run(whole, "--resume", prompt="a blue ring") == 2
    assert 'another prompts, ["a red star"], now ["a blue ring"]' in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("x")
    assert run(tmp_path, "--resume") == 2 and "holds no run of `sample`" in capsys.readouterr().err


def test_a_used_folder_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "policy_of", lambda args: pytest.fail("a model was loaded"))
    (tmp_path / "mine.txt").write_text("x")
    assert run(tmp_path) == 2 and "exists: add --overwrite" in capsys.readouterr().err
    assert run(tmp_path / "mine.txt") == 2 and "is a file: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "name"), [("search", "search"), ("optimise_noise", "noise")])
def test_tables_of_an_earlier_run_go_with_its_images(key, name, tmp_path):
    """A scores.csv that kept the rows of images which are no more would be taken for the new run's."""
    folder, beside = ImageFolder(tmp_path / "images"), tmp_path / f"images-{name}"

    def tables(*names):
        beside.mkdir(exist_ok=True)
        for one in ("scores.csv", "00000.csv", "00002.png", "notes.csv", *names):
            (beside / one).write_text("x")

    tables()
    folder.begin({**SETTINGS, key: {}}, resume=False, overwrite=True)  # the images were removed by hand
    assert sorted(files(beside)) == ["notes.csv"]
    (tmp_path / "images/00000.png").write_text("x")
    tables()
    folder.begin({**SETTINGS, key: {}}, resume=True, overwrite=False)
    assert len(files(beside)) == 4
    folder.begin(SETTINGS, resume=False, overwrite=True)  # without a search
    assert sorted(files(beside)) == ["notes.csv"]
    tables()
    folder.begin(SETTINGS, resume=False, overwrite=True)  # of no run of this folder
    assert len(files(beside)) == 4
    tables("settings.json")
    with pytest.raises(ConfigError, match=f"images-{name} holds images of another run, and the tables go there: give another --out"):
        folder.begin({**SETTINGS, key: {}}, resume=False, overwrite=True)


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "images"
    assert run(out, n=3) == 0
    for name in ("00007.png", "00000.jpg", "notes.txt"):
        (out / name).write_bytes(b"mine")
    assert run(out, "--overwrite", n=2, prompt="a blue ring") == 0
    kept = files(out)
    own = ["settings.json", "00000.png", "00000.txt", "00001.png", "00001.txt"]
    assert sorted(kept) == sorted([*own, "00007.png", "00000.jpg", "notes.txt"])
    assert kept["00007.png"] == kept["00000.jpg"] == kept["notes.txt"] == b"mine" and kept["00000.txt"] == b"a blue ring\n"
    old = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({k: v for k, v in old.items() if k != "images"}))  # as earlier versions wrote it
    assert run(out, "--overwrite", n=1) == 0
    assert sorted(files(out)) == sorted([*own[:3], "00007.png", "00000.jpg", "notes.txt"])


def test_a_contact_sheet_replaces_no_file_but_an_earlier_sheet(tmp_path, monkeypatch):
    folder = ImageFolder(tmp_path / "images")
    folder.begin(SETTINGS, resume=False, overwrite=False)
    for i in range(3):
        Image.new("RGB", (600, 300), (80 * i, 0, 0)).save(folder.image(i))
    folder.sheet.write_bytes(b"mine")
    assert folder.write_sheet(3, 2) == f"no contact sheet: {folder.sheet} was there before" and folder.sheet.read_bytes() == b"mine"
    folder.sheet.unlink()
    monkeypatch.setattr(image_folder, "SHEET_IMAGES", 2)
    for _ in range(2):
        assert folder.write_sheet(3, 2) == f"contact sheet: {folder.sheet}, the first 2 of 3 images"
    with Image.open(folder.sheet) as sheet:
        assert sheet.size == (2 * 256 + 2, 128) and sheet.getpixel((300, 60)) == (80, 0, 0) and sheet.getpixel((256, 0)) == (255,) * 3


def test_paths_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    folder = ImageFolder(tmp_path / "images")
    folder.begin({**SETTINGS, "lora": "x.safetensors"}, resume=False, overwrite=False)
    folder.image(0).touch()
    for path in ("./x.safetensors", str(tmp_path / "x.safetensors"), str(tmp_path / "link" / "x.safetensors")):
        folder.begin({**SETTINGS, "lora": path, "chunk": 8}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="another lora"):
        folder.begin({**SETTINGS, "lora": "y.safetensors"}, resume=True, overwrite=False)
