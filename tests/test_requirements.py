"""Installing the pack beside ComfyUI changes nothing that ComfyUI has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def would_install(*requirements):
    """Names and versions that pip would install, by a dry run in this environment; nothing is fetched where all is satisfied."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--disable-pip-version-check",
        "--report",
        "-",
        *requirements,
    ]
    environment = {**os.environ, "PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "5"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr
    return [(item["metadata"]["name"], item["metadata"]["version"]) for item in json.loads(done.stdout)["install"]]


@pytest.mark.slow
def test_the_base_requirements_change_no_installed_version():
    pytest.importorskip("pip")
    assert would_install("-r", "requirements.txt") == []


@pytest.mark.slow
def test_the_dry_run_does_see_a_requirement_that_would_change_something():
    pytest.importorskip("pip")
    changed = would_install("-r", "requirements.txt", "safetensors<0.4.3")
    assert changed != []  # a list with an older safetensors, or, without an index, pip's refusal
