"""Makes expected/: what version 0.1.0 makes of the other files. Run by make.sh, that version on the path."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trainer.lora_file import load_lora
from trainer.policies.unet import UNetPolicy

from trainer.__main__ import main
from trainer.demo import files

RUNS = ("imagerefl", "sqdf", "sqdf-black-box", "srpo", "draft-lv")
LORAS = [f"{run}/lora.safetensors" for run in RUNS]
LORAS += ["imagerefl/best.safetensors", "converted-peft", "converted-diffusers.safetensors", "delta.safetensors", "delta-lora.safetensors"]


def machine() -> dict[str, str]:
    """What float32 results depend on to the bit: the processor and PyTorch."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    parts = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines()]
    cpu = {key.strip(): value.strip() for key, value in parts if key.strip() in ("model name", "cpu family", "model", "stepping")}
    return {**cpu, "kernels": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def lines(run: str) -> list[dict[str, Any]]:
    """A run's log without what depends on the machine."""
    read = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory_gb")} for line in read]


def describe_full(out: Path) -> None:
    """Order of the parameters, by which a checkpoint's optimizer state is numbered, and log of the full fine-tune."""
    names = list(torch.load("full/checkpoint.pt", weights_only=True)["adapter"])
    described = {"parameters": len(names), "sha256 of their names, one a line": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    (out / "full.json").write_text(json.dumps({**described, "log": lines("full")}, indent=1) + "\n")


def resume(out: Path) -> None:
    """LoRA, log and watch of every run after two more steps."""
    logs = {}
    for run in RUNS:
        # 0.1.0 kept the old loop's rollouts where a resumed black-box run began a new loop; its whole run is what is right
        start = "--overwrite" if run == "sqdf-black-box" else "--resume"
        assert main(["train", f"{run}.toml", start, "--steps=4"]) == 0
        save_file(load_file(f"{run}/lora.safetensors"), out / f"{run}.safetensors")
        logs[run] = lines(run)
    watch = json.loads(Path("imagerefl", "watch.json").read_text())
    (out / "resumed.json").write_text(json.dumps({"machine": machine(), "log": logs, "watch": watch}, indent=1) + "\n")


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
describe_full(expected)
with tempfile.TemporaryDirectory() as copy:
    shutil.copytree(here, copy, dirs_exist_ok=True)
    os.chdir(copy)
    resume(expected)
