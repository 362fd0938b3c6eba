"""Planned beside measured memory of training, and seconds per step, at the published sizes: planned.py [--device cuda] [CASE ...]

Weights are random and made on the device; denoiser, autoencoder and reward (HPSv2.1's ViT-H/14) have the published shapes. The text
encoders are small, so the plan's phases of encoding are not measured. The command is the user's own: `train` with ReFL.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import verify
from bench import hps

from trainer.__main__ import main as trainer
from trainer.commands import parts
from trainer.memory import planner
from trainer.models.open import DTYPES

VAE = "--gradient_checkpointing_vae=true"
ALL = (VAE, "--gradient_checkpointing_denoiser=true", "--gradient_checkpointing_reward=true")
CONTEXT = 0.82e9  # bytes of CUDA's context on an H100 once libraries have loaded their kernels; 0.55e9 when a process starts
CASES = {  # model, pixels, images, sampler steps, settings
    "demo": ("demo", 64, 8, 20, (VAE,)),  # the embedded model, whole and with its own reward
    "sd15": ("sd15", 512, 4, 40, (VAE,)),
    "sd15-8gb": ("sd15", 512, 4, 40, ("--vram=8",)),
    "sd15-nothing-recomputed": ("sd15", 512, 4, 40, ()),
    "sdxl": ("sdxl", 1024, 1, 40, ALL),
    "sdxl-nothing-recomputed": ("sdxl", 1024, 1, 40, ()),
    "sd35-medium": ("sd35-medium", 1024, 1, 20, ALL),
    "flux2-klein-4b": ("flux2-klein-4b", 1024, 1, 8, ALL),
    "z-image": ("z-image", 1024, 1, 8, ALL),
    "flux-dev": ("flux-dev", 1024, 1, 8, ALL),
}


def printed(*arguments):
    """What a command prints; it must end well."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = trainer(list(map(str, arguments)))
    if code:
        raise RuntimeError((errors.getvalue().strip().splitlines() or ["no output"])[-1])
    return out.getvalue()


def measured(name, arguments, folder):
    """One case's row."""
    model, pixels, images, sampler, settings = CASES[name]
    (folder / "prompts.txt").write_text("a red star\na blue ring\ntwo green squares\na yellow cross\n")
    own = ["--reward=hpsv2.1", "--model_options.dtype=bfloat16", f"--image_size={pixels}"] if model != "demo" else ["--reward=demo-proxy"]
    given = [f"--model={model}", f"--prompts={folder / 'prompts.txt'}", f"--batch_size={images}", *own, *settings]
    given += [f"--device={arguments.device}", f"--steps={arguments.steps}"]
    given += ["--objective.name=refl", f"--objective.steps={sampler}", f"--objective.grad_from={sampler * 3 // 4}"]
    given += [f"--objective.grad_to={sampler - 1}", f"--out={folder / 'run'}"]
    with patch.object(planner, "savings", lambda *_: []):  # each takes another plan
        plan = printed("train", *given, "--plan")
    total, allowance = (float(re.search(rf"^  {word}.* (\S+)$", plan, re.M)[1]) for word in ("total", "allowance"))
    cuda = arguments.device.startswith("cuda")
    if arguments.capped:
        card = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (total * 1e9 - max(context(), CONTEXT)) / card))

    def open_policy(_, device, options, size, offload=False):
        return verify.build(model, folder, device, DTYPES[options.dtype], size)

    def load_reward(_, standardise, device, dtype=torch.float32, *rest):
        return hps(0, arguments.device)(dtype).to(device)

    replaced = {"open_policy": open_policy, "load_reward": load_reward, "denoiser_hashes": lambda _: ("", ""), "weights_of": lambda _: {}}
    with (
        patch.multiple(parts, **replaced) if model != "demo" else contextlib.nullcontext(),
        patch.object(verify, "MODELS", {key: {} for key in verify.MODELS}),
    ):
        printed("train", *given)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    peak, seconds = max(line["memory_gb"] for line in log), log[-1]["seconds"] - log[-2]["seconds"]
    taken = f"{(torch.cuda.max_memory_reserved() + context()) / 1e9:.2f}" if cuda else ""
    return f"| {name} | {pixels}² × {images} | {sampler} | {total - allowance:.2f} | {total:.2f} | {peak:.2f} | {taken} | {seconds:.2f} |"


def context():
    """Bytes of the card that are taken beside what PyTorch has reserved: CUDA's context, where nobody else uses the card."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def main(given=None):
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--capped", action="store_true", help="PyTorch gets no more than was planned in all, less CUDA's context")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found: nothing was measured")
        return 0
    print("| case | images | sampler steps | planned tensors, GB | planned total | measured tensors | on the card | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.cases or CASES:
        if arguments.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(measured(name, arguments, Path(folder)), flush=True)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"| {name} | failed: {error} | | | | | | |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
