"""Starting headless runs as a user does, shared by the tests that interrupt them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from trainer.config import build
from trainer.lora.file import read_lora
from trainer.training.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent


SHORT = {"name": "imagerefl", "steps": 3, "grad_from": 2, "grad_to": 2, "start_from": 1, "start_to": 1, "refl_share": 0.0}


def plan_config(**more):
    """A short run to be planned."""
    return build(TrainConfig, {"out": "none", "batch_size": 2, "steps": 3, "objective": SHORT, **more})


def settings(pipeline_folder, reward_folder, image_folder, folder, **more):
    values = {
        "model": str(pipeline_folder),
        "reward": str(reward_folder),
        "images": str(image_folder),
        "out": str(folder),
        "steps": 6,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ema": 0.5,
        "save_every": 2,
        "learning_rate": 1e-3,
        "objective.name": "imagerefl",
        "objective.steps": 6,
        "objective.grad_from": 4,
        "objective.grad_to": 5,
        "objective.start_from": 3,
        "objective.start_to": 4,
        **more,
    }
    return [f"--{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in values.items()]


def command(arguments, launcher=(), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "trainer", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(arguments):
    process = command(arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_steps(path, n, process):
    for _ in range(1200):
        if path.is_file() and len(path.read_text().splitlines()) >= n:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no progress")


def same_lora(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert read_lora(a)[1] == read_lora(b)[1]
