"""A real ComfyUI for the tests that want one: where it is, and running a script inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.hosts import ROOT, chosen, environment

from trainer.lora.file import save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora

SCRIPTS = ROOT / "tests" / "nodes" / "comfyui"
PLACES = [place for place in (chosen(),) if place]
comfyui = pytest.mark.skipif(not PLACES, reason="skipped: no ComfyUI (set COMFYUI_PATH)")


OWN_PROCESS = {"download.py", "graph.py", "second_device.py", "live.py", "missing.py", "taste_live.py", "taste_browser.py"}
"""Scripts that change a ComfyUI's start."""


@cache
def _served(place):
    """A ComfyUI that has started, and runs scripts in copies of itself."""
    command = [sys.executable, SCRIPTS / "serve.py", place, ROOT]
    return subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_inside())


def _inside():
    return {**environment(os.environ.get("PYTHONPATH", "")), "OMP_NUM_THREADS": "1"}


def run_inside(place, script, *arguments, cwd):
    """Run a script with ComfyUI first on the path, away from our own `nodes` folder."""
    given = [str(argument) for argument in arguments]
    if sys.platform == "linux" and script not in OWN_PROCESS:
        host = _served(place)
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            request = {"script": script, "arguments": given, "cwd": str(cwd), "out": str(out), "err": str(err)}
            host.stdin.write(json.dumps(request) + "\n")
            host.stdin.flush()
            status = host.stdout.readline().strip()
            assert status == "0", err.read_text("utf-8")[-3000:] if err.exists() else f"ComfyUI ended: {host.poll()}"
            return json.loads(out.read_text("utf-8").strip().splitlines()[-1])
    command = [sys.executable, SCRIPTS / script, place, ROOT, *given]
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=900, env=_inside())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_lora(pipeline_folder, path, seed, **settings):
    """A LoRA of the embedded model that changes its images by about a sixth."""
    policy = UNetPolicy.load(pipeline_folder)
    policy.add_lora(Lora(rank=4, alpha=8.0, **settings))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=rng))
    save_lora(policy, path, {})
    return path
