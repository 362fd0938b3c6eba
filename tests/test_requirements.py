"""Installing the pack beside ComfyUI moves no version that ComfyUI would have had without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hosts import chosen

ROOT = Path(__file__).parent.parent


def comfyui_requirements():
    """requirements.txt of the ComfyUI that the tests use."""
    place = chosen() or pytest.skip("skipped: no ComfyUI")
    return place / "requirements.txt"


def resolved(folder, *requirements):
    """The versions that an empty environment would get, {name: version}; nothing is installed."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv") or pytest.skip("skipped: uv is not installed")
    files = []
    for i, requirement in enumerate(requirements):
        if isinstance(requirement, str):
            (folder / f"{i}.txt").write_text(requirement + "\n")
            requirement = folder / f"{i}.txt"
        files.append(str(requirement))
    command = [uv, "pip", "compile", "--quiet", "--no-annotate", "--no-header", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    if done.returncode and any(word in done.stderr for word in ("Failed to fetch", "dns error", "Could not connect", "request failed")):
        pytest.skip("skipped: no package index")
    assert done.returncode == 0, done.stderr
    pins = (line.split(";")[0].strip().split("==") for line in done.stdout.splitlines() if "==" in line)
    return {name: version for name, version in pins}


def moved(before, after):
    """What has another version, or is missing, after."""
    return {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return resolved(tmp_path_factory.mktemp("alone"), comfyui_requirements())


def test_the_pack_moves_no_version_of_comfyuis(alone, tmp_path):
    together = resolved(tmp_path, comfyui_requirements(), ROOT / "requirements.txt")
    assert len(alone) > 30 and "open-clip-torch" in together and "open-clip-torch" not in alone
    assert moved(alone, together) == {}


def test_a_cap_in_the_requirements_is_seen(alone, tmp_path):
    """The same check refuses a pack that would move NumPy."""
    capped = resolved(tmp_path, comfyui_requirements(), "numpy<2")
    assert set(moved(alone, capped)) >= {"numpy"}
