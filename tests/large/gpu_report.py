"""One file about this machine for the project: `make gpu-report` writes gpu-report.md. Nothing is downloaded; weights are random.

It holds the versions, three training steps at published sizes with planned beside measured memory, what each saving costs, and,
beside a ComfyUI, what the switch costs per evaluation. A section that fails says so, and the next one runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.helpers.hosts import chosen, environment

ROOT = Path(__file__).resolve().parents[2]
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


def script(*command):
    """The tables that another script prints."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment(ROOT))
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return done.stdout.strip()


def sections(arguments):
    """Title and function of each section."""
    yield "Machine", lambda: "\n".join(versions(arguments.device))
    if arguments.planned:
        yield (
            "Three training steps, planned and measured memory",
            lambda: script("tests/large/planned.py", "--device", arguments.device, *arguments.planned),
        )
    if arguments.bench:
        yield "What each saving costs", lambda: script("tests/large/bench.py", "--device", arguments.device, "--models", *arguments.bench)
    place = chosen()
    if place:
        yield "Cost of the switch in ComfyUI", lambda: script("tests/nodes/comfyui/cost.py", place, ROOT, *arguments.cost)


def main(given=None):
    """Write the report section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--planned", nargs="*", default=["demo", "sd15", "sdxl", "sd35-medium", "flux-dev"], help="cases of planned.py")
    parser.add_argument("--bench", nargs="*", default=["sd15", "sdxl"], help="models whose savings are measured")
    parser.add_argument("--cost", nargs=4, default=["true", "64", "8", "3"], help="model, latent side, steps, pairs")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"))
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found: nothing was measured (--device cpu --planned demo --bench shows the form)")
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
