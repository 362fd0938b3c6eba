"""Makes expected/: what version 0.1.0 makes of the other files. Run by make.sh, that version on the path."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from trainer.lora_file import load_lora
from trainer.policies.unet import UNetPolicy

from trainer.__main__ import main
from trainer.demo import files

RUNS = ("imagerefl", "sqdf", "sqdf-black-box", "srpo", "draft-lv")
LORAS = [f"{run}/lora.safetensors" for run in RUNS]
LORAS += ["imagerefl/best.safetensors", "converted-peft", "converted-diffusers.safetensors", "delta.safetensors", "delta-lora.safetensors"]


def cpu() -> str:
    """The processor's name: bits differ between some."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def resume(out: Path) -> None:
    """LoRA, log and watch of every run after two more steps."""
    logs = {}
    for run in RUNS:
        assert main(["train", f"{run}.toml", "--resume", "--steps=4"]) == 0
        save_file(load_file(f"{run}/lora.safetensors"), out / f"{run}.safetensors")
        logs[run] = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
        for line in logs[run]:
            del line["seconds"], line["memory_gb"]
    watch = json.loads(Path("imagerefl", "watch.json").read_text())
    made = {"torch": torch.__version__, "cpu": cpu()}
    (out / "resumed.json").write_text(json.dumps({**made, "log": logs, "watch": watch}, indent=1) + "\n")


def denoise(out: Path) -> None:
    """x0-prediction of every LoRA."""
    x0 = {}
    for name in ["", *LORAS]:
        policy = UNetPolicy.load(files.PIPELINE)
        if name:
            load_lora(policy, Path(name))
        noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            x0[name or "base"] = policy.denoiser(["a red star"], 2.0)(3 * noise, torch.tensor([3.0]))
    save_file(x0, out / "x0.safetensors")


torch.set_num_threads(1)
here = Path.cwd()
expected = here / "expected"
shutil.rmtree(expected, ignore_errors=True)
expected.mkdir()
denoise(expected)
with tempfile.TemporaryDirectory() as copy:
    shutil.copytree(here, copy, dirs_exist_ok=True)
    os.chdir(copy)
    resume(expected)
