"""The embedded model and our LoRAs inside a real ComfyUI, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.lora_file import save_lora
from trainer.policies.unet import Lora

ROOT = Path(__file__).parent.parent


def find_comfyui():
    for place in (os.environ.get("COMFYUI_PATH"), ROOT.parent.parent, Path.home() / "comfy" / "ComfyUI"):
        if place and (Path(place) / "comfy" / "sd.py").is_file():
            return Path(place)
    return None


comfyui = pytest.mark.skipif(find_comfyui() is None, reason="skipped: no ComfyUI (set COMFYUI_PATH)")


def run_inside(script, *arguments, cwd):
    """Run a script with ComfyUI first on the path, away from our own `nodes` folder."""
    command = [sys.executable, ROOT / "tests" / "comfyui" / script, find_comfyui(), ROOT, *arguments]
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@comfyui
@pytest.mark.slow
def test_comfyuis_own_classes_give_diffusers_outputs_and_load_every_lora_key(policy, pipeline_folder, tmp_path):
    policy.add_lora(Lora(rank=4, alpha=8.0, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1")))
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=draws))
    save_lora(policy, tmp_path / "a.safetensors", {})
    errors = run_inside("same_model.py", pipeline_folder, tmp_path / "a.safetensors", cwd=tmp_path)
    assert errors["unmatched"] == 0
    assert max(errors["denoised"], errors["decoded"], errors["text"]) < 1e-4
    assert errors["tuned"] < 1e-3 * errors["effect"] and errors["effect"] > 0.01
