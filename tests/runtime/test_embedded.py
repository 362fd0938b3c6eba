"""A file of the embedded model that is missing or damaged is named, with the remedy."""

from __future__ import annotations

import shutil

import pytest

from trainer.__main__ import main
from trainer.demo import files
from trainer.models import open as opening
from trainer.runtime.embedded import PIPELINE, WEIGHTS, check_files

REMEDY = "reinstall the package or, in a clone, run `git checkout -- trainer/demo/weights`"


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def headless(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def missing(path):
    path.unlink()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A copy of the embedded files, which the loaders read instead."""
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    monkeypatch.setattr(files, "FOLDER", folder)
    monkeypatch.setattr(files, "PIPELINE", folder / "pipeline")
    monkeypatch.setattr(opening, "EMBEDDED", folder / "pipeline")
    return folder


def test_whole_files_pass():
    check_files(WEIGHTS / "pipeline", *PIPELINE)
    written = {str(path.relative_to(WEIGHTS / "pipeline")) for path in (WEIGHTS / "pipeline").rglob("*") if path.is_file()}
    assert set(PIPELINE) == written


@pytest.mark.parametrize("damage", [missing, empty, truncated, headless])
@pytest.mark.parametrize("name", ["proxy/model.safetensors", "proxy/config.json", "proxy/merges.txt.gz", "reader.safetensors"])
def test_a_damaged_reward_is_named(name, damage, weights):
    damage(weights / name)
    with pytest.raises(ValueError) as caught:
        files.load_reward("gold" if name.startswith("reader") else "proxy")
    message, what = str(caught.value), "is missing: " if damage is missing else "is damaged ("
    assert message.startswith(f"{weights / name} {what}") and message.endswith(REMEDY) and "\n" not in message


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, missing) for name in PIPELINE] + [(name, truncated) for name in PIPELINE if name.endswith("model.safetensors")],
)
def test_a_damaged_model_is_named(name, damage, weights):
    damage(weights / "pipeline" / name)
    for load in (lambda: opening.open_policy("demo"), files.check_pipeline):
        with pytest.raises(ValueError) as caught:
            load()
        assert str(weights / "pipeline" / name) in str(caught.value) and str(caught.value).endswith(REMEDY)


def test_a_missing_folder_is_one_line_on_the_command_line(weights, tmp_path, capsys):
    shutil.rmtree(weights / "pipeline" / "vae")
    (tmp_path / "prompts.txt").write_text("a red star\n")
    assert main(["sample", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]) == 2
    shutil.rmtree(weights / "proxy")
    assert main(["score", str(tmp_path), "--reward", "demo-proxy"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [REMEDY] * 2
    assert str(weights / "pipeline" / "vae" / "config.json") in lines[0] and str(weights / "proxy" / "config.json") in lines[1]
