"""A real ComfyUI for the tests that want one: where it is, and running a script inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from trainer.lora.file import save_lora
from trainer.models.unet import UNetPolicy
from trainer.policy import Lora

ROOT = Path(__file__).parent.parent.parent


def find_comfyui():
    for place in (os.environ.get("COMFYUI_PATH"), ROOT.parent.parent, Path.home() / "comfy" / "ComfyUI"):
        if place and (Path(place) / "comfy" / "sd.py").is_file():
            return Path(place)
    return None


comfyui = pytest.mark.skipif(find_comfyui() is None, reason="skipped: no ComfyUI (set COMFYUI_PATH)")
PLACES = [place for place in (find_comfyui(), os.environ.get("COMFYUI_OLD_PATH")) if place]


def run_inside(place, script, *arguments, cwd):
    """Run a script with ComfyUI first on the path, away from our own `nodes` folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "\nimport torchaudio" in Path(place, "comfy_api", "latest", "_ui.py").read_text("utf-8") and not find_spec("torchaudio"):
        # 0.3.48 does not start without it, and uses it for sound alone: an empty package serves
        package = Path(cwd) / "absent" / "torchaudio"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        environment["PYTHONPATH"] = str(package.parent)
    command = [sys.executable, ROOT / "tests" / "nodes" / "comfyui" / script, place, ROOT, *arguments]
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=900, env=environment)
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
