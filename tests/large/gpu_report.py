"""One file about this machine for the project: `make gpu-report` writes gpu-report.md. Nothing is downloaded; weights are random.

It holds the versions, three training steps of each model family with planned beside measured memory, what each saving costs, and,
beside a ComfyUI, what the switch costs per evaluation. A section that fails says so, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.helpers.hosts import chosen, environment

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"demo": 64, "sd15": 512, "sdxl": 1024, "sd35-medium": 1024, "flux-dev": 1024}
REWARD = "def reward(images, prompts):\n    return images.flatten(1).mean(1)\n"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "safetensors", "bitsandbytes", "triton")


def versions(device):
    """Machine, card and packages, as Markdown lines."""
    yield f"- {platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        yield f"- {card.name}, {card.total_memory / 1e9:.1f} GB, compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
    for package in PACKAGES:
        try:
            yield f"- {package} {version(package)}"
        except PackageNotFoundError:
            yield f"- {package}: not installed"


def trainer(*arguments):
    """What `python -m trainer …` prints."""
    command = [sys.executable, "-m", "trainer", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def save_random(family, folder, device):
    """A diffusers folder of the family with random weights; FLUX has fewer blocks."""
    sys.path.insert(0, str(ROOT / "tests" / "large"))
    from verify import build

    build(family, folder / "parts", device).pipeline.save_pretrained(folder / family)
    return folder / family


def training_steps(family, device, folder):
    """Three ReFL steps: a row of planned and measured memory and of seconds per step."""
    (folder / "brightness.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a red star\na blue ring\n")
    model = "demo" if family == "demo" else save_random(family, folder, device)
    given = [f"--model={model}", f"--out={folder / 'run'}", f"--prompts={folder / 'prompts.txt'}", f"--device={device}"]
    given += ["--objective.name=refl", f"--reward={folder / 'brightness.py'}", "--standardise=false"]
    given += ["--steps=3", "--batch_size=1", "--gradient_checkpointing_denoiser=true", "--gradient_checkpointing_vae=true"]
    given += [] if family == "demo" else ["--model_options.dtype=bfloat16", f"--image_size={SIZES[family]}"]
    plan = trainer("train", *given, "--plan")
    trainer("train", *given)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    planned = next(line.split()[-1] for line in plan.splitlines() if line.split()[:1] == ["total"])
    seconds = log[-1]["seconds"] - log[-2]["seconds"]
    return f"| {family} | {SIZES[family]}² | {planned} | {max(line['memory_gb'] for line in log):.2f} | {seconds:.2f} |"


def script(*command):
    """The tables that another script prints."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment(ROOT))
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return done.stdout.strip()


def sections(arguments):
    """Title and function of each section."""
    yield "Machine", lambda: "\n".join(versions(arguments.device))

    def families():
        rows = ["| family | size | planned, GB | measured, GB | s/step |", "|---|---|---|---|---|"]
        for family in arguments.families:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows.append(training_steps(family, arguments.device, Path(folder)))
                except Exception as error:
                    rows.append(f"| {family} | {SIZES[family]}² | failed: {error} | | |")
        return "\n".join(rows)

    yield "Three training steps, planned and measured memory", families
    if arguments.planned:
        yield "Training at published sizes", lambda: script("tests/large/planned.py", "--device", arguments.device, *arguments.planned)
    if arguments.bench:
        yield "What each saving costs", lambda: script("tests/large/bench.py", "--device", arguments.device, "--models", *arguments.bench)
    place = chosen()
    if place:
        yield "Cost of the switch in ComfyUI", lambda: script("tests/nodes/comfyui/cost.py", place, ROOT, *arguments.cost)


def main(given=None):
    """Write the report section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--families", nargs="*", default=["demo", "sd15", "sdxl", "sd35-medium", "flux-dev"], choices=list(SIZES))
    parser.add_argument("--planned", nargs="*", default=["sd15", "sdxl", "sd35-medium"], help="cases of planned.py")
    parser.add_argument("--bench", nargs="*", default=["sd15", "sdxl"], help="models whose savings are measured")
    parser.add_argument("--cost", nargs=4, default=["true", "64", "8", "3"], help="model, latent side, steps, pairs")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"))
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found: nothing was measured (--device cpu --families demo --planned --bench shows the form)")
        return 0
    arguments.out.write_text("# GPU report\n", "utf-8")
    for title, section in sections(arguments):
        begin = time.monotonic()
        try:
            text = section()
        except Exception as error:
            text = f"failed: {error}"
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(f"\n## {title}\n\n{text}\n")
        print(f"{title}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"wrote {arguments.out}: paste it into a GPU report issue")
    return 0


if __name__ == "__main__":
    sys.exit(main())
