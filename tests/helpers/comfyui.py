"""A real ComfyUI for the tests that want one: where it is, and running a script inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.hosts import ROOT, chosen, environment

from trainer.lora.file import save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora

PLACES = [place for place in (chosen(),) if place]
comfyui = pytest.mark.skipif(not PLACES, reason="skipped: no ComfyUI (set COMFYUI_PATH)")


def run_inside(place, script, *arguments, cwd):
    """Run a script with ComfyUI first on the path, away from our own `nodes` folder."""
    inside = {**environment(os.environ.get("PYTHONPATH", "")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "nodes" / "comfyui" / script, place, ROOT, *arguments]
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=900, env=inside)
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
