"""Which ComfyUIs the tests take, and the ladder over all of them, on folders that look like ComfyUI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import ladder
import pytest
from helpers import hosts


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A function that makes a ComfyUI of a version; none is elsewhere on this machine."""
    monkeypatch.setattr(hosts, "ROOT", tmp_path / "none" / "custom_nodes" / "pack")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name in ("COMFYUI_PATH", "COMFYUI_LADDER"):
        monkeypatch.delenv(name, raising=False)

    def made(name, version, requirements=""):
        folder = tmp_path / name
        (folder / "comfy").mkdir(parents=True)
        (folder / "comfy" / "sd.py").touch()
        (folder / "requirements.txt").write_text(requirements)
        (folder / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
        return folder

    return made


def test_hosts_are_ordered_by_version_each_once(place, monkeypatch):
    newest, old, older = (place(name, version) for name, version in (("a", "0.33.0"), ("b", "0.16.0"), ("home/comfy/ComfyUI", "0.3.64")))
    monkeypatch.setenv("COMFYUI_LADDER", os.pathsep.join(map(str, (newest, old, newest, older, "/no/such"))))
    assert hosts.hosts() == [older, old, newest] and hosts.chosen() == newest
    monkeypatch.setenv("COMFYUI_PATH", str(old))
    assert hosts.chosen() == old


def test_the_ladder_prints_a_line_for_each_and_fails_if_one_fails(place, monkeypatch, tmp_path, capfd):
    folders = [place(name, version) for name, version in (("a", "0.3.64"), ("b", "0.33.0"))]
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_this(): pass\n"
        "@pytest.mark.skip\n"
        "def test_that(): pass\n"
        f"def test_here(): assert os.environ['COMFYUI_PATH'] != {str(folders[1])!r}\n"
    )
    monkeypatch.setenv("COMFYUI_LADDER", os.pathsep.join(map(str, folders)))
    assert ladder.main([str(tmp_path / "test_it.py"), "-p", "no:cacheprovider"]) == 1
    lines = capfd.readouterr().out.splitlines()[-2:]
    assert lines == ["ComfyUI 0.3.64: 2 passed, 0 failed, 1 skipped", "ComfyUI 0.33.0: 1 passed, 1 failed, 1 skipped"]
    monkeypatch.setenv("COMFYUI_LADDER", str(folders[0]))
    assert ladder.main([str(tmp_path / "test_it.py"), "-p", "no:cacheprovider"]) == 0


def test_a_comfyui_whose_packages_are_not_installed_is_left_out_with_a_line(place, capfd):
    optional = "torch>=1\ntorchaudio\n\n#non essential dependencies:\nno-such-package\n"
    old, new = place("home/comfy/ComfyUI", "0.3.64", optional), place("home/comfy33/ComfyUI", "0.33.0", "pytest\nno-such-package==1.2\n")
    assert hosts.found() == [old, new] and hosts.hosts() == [old] and hosts.chosen() == old
    shutil.rmtree(old)
    assert ladder.main([]) == 0
    line = f"ComfyUI 0.33.0: left out, {new} needs no-such-package"
    assert capfd.readouterr().out.splitlines() == [line, "skipped: no ComfyUI (name checkouts in COMFYUI_LADDER)"]


def test_without_a_comfyui_the_ladder_says_so(place, capfd):
    assert ladder.main([]) == 0 and hosts.chosen() is None
    assert "skipped: no ComfyUI" in capfd.readouterr().out
