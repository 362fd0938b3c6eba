"""What a training step costs at the published models' sizes, and what each saving does to it: bench.py [--device cuda] [--models sd15 sdxl]

Weights are random; denoiser, autoencoder and the reward (HPSv2.1's ViT-H/14) have the published shapes, text encoders are small: prompts
are encoded before the first step. Off and on are taken in turn in one process. Without the device it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from verify import build

from tests.parity.benchmark import architecture
from tools.embedded.stepper import Case, SeparateForwards, Stepper, embedded, pair, savings, wait
from trainer.models.load import MODELS
from trainer.objectives import ImageReFL, ReFL
from trainer.rewards.clip import tokenizer
from trainer.rewards.preprocess import Fit
from trainer.rewards.two_tower import TwoTower

SIZES = {"sd15": 512, "sdxl": 1024, "sd35-medium": 1024, "demo": 64}
PROMPTS = ("a red star", "a blue ring", "two green squares", "a yellow cross")


def hps(depth, device):
    """HPSv2.1's architecture on random weights, `depth` layers in each tower (0: all), as a function of the type of its weights."""
    import open_clip

    shape = architecture("ViT-H-14" + (f":{depth}" if depth else ""))

    def load(dtype):
        torch.manual_seed(0)
        with torch.device(device):
            model = open_clip.CustomTextCLIP(**shape).to(dtype)
        return TwoTower(model, tokenizer(77), Fit(224, "pad"))

    return load


def stepper(name, folder, arguments):
    """Random models of the family `name`, or the embedded ones."""
    if name == "demo":
        return embedded()
    dtype = getattr(torch, arguments.dtype)
    policy = build(name, folder, arguments.device, dtype, arguments.size or SIZES[name])
    images = torch.rand(len(PROMPTS), 3, *policy.image_size, generator=torch.Generator().manual_seed(0))
    return Stepper(policy, images, PROMPTS, hps(arguments.reward_depth, arguments.device))


def parked_gb(name):
    """Gigabytes in bfloat16 that `offload_encoders` takes off the device: text encoders and the autoencoder's encoder, as published."""
    import diffusers
    import transformers

    total = 0
    for part, ((library, kind), config) in MODELS[name][1].parts.items():
        with torch.device("meta"):
            if part == "vae":
                vae = getattr(diffusers, kind)(**config)
                total += sum(p.numel() for m in (vae.encoder, vae.quant_conv) if m is not None for p in m.parameters())
            elif part.startswith("text_encoder") and library == "transformers":
                settings = "T5Config" if kind.startswith("T5") else "CLIPTextConfig"
                total += sum(p.numel() for p in getattr(transformers, kind)(getattr(transformers, settings)(**config)).parameters())
    return 2 * total / 1e9


class Peak:
    """Highest memory in GB since it was made: allocated on an accelerator, resident on a CPU."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def __call__(self):
        """Gigabytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1e6


def bench(name, step, arguments, say):
    """One model's tables as Markdown lines."""
    device, steps = step.policy.device, arguments.steps
    late = {"steps": steps, "grad_from": steps * 3 // 4, "grad_to": steps - 1}
    image = ImageReFL(**late, start_from=steps * 3 // 4, start_to=steps * 3 // 4, refl_share=0.0)
    separate = SeparateForwards(**{f.name: getattr(image, f.name) for f in fields(image)})
    base = Case(image, arguments.batch, denoiser=arguments.checkpoint, decoder=arguments.checkpoint, reward=arguments.checkpoint)
    height, width = step.policy.image_size
    say(f"\n## {name}, {width}×{height}, {arguments.dtype}, batch {arguments.batch}, {steps} sampler steps, {arguments.where}\n")
    if name in MODELS:
        say(f"`offload_encoders` takes {parked_gb(name):.2f} GB in bfloat16 off the device.\n")
    say("| saving | off, s/step | on, s/step | images/s, on | on/off, clock | on/off, processor | off, GB | on, GB |")
    say("|---|---|---|---|---|---|---|---|")
    for title, off, on in savings(base, separate, ReFL(**late)):
        if off == on or (arguments.items and not any(item in title for item in arguments.items)):
            continue
        try:
            peaks = []
            for case in (off, on):
                step.prepare(case)
                wait(device)
                peak = Peak(device)
                step(case)
                peaks.append(peak())
            p = pair(step, off, on, arguments.rounds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            say(f"| {title} | out of memory | | | | | | |")
            continue
        rate = arguments.batch / p.on
        say(f"| {title} | {p.off:.2f} | {p.on:.2f} | {rate:.2f} | {p.clock:.2f} | {p.work:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} |")


def main(given=None):
    """Measure the models that are named, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl"], choices=list(SIZES))
    parser.add_argument("--size", type=int, default=0, help="pixels; 0 is what the model was made for")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="sampler steps; the gradient falls into the last quarter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", action="store_true", help="all gradient checkpoints on in every row")
    parser.add_argument("--reward-depth", type=int, default=0, help="layers of the reward's towers; 0: all")
    parser.add_argument("--items", nargs="*", help="only savings whose name contains one of these")
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found: nothing was measured (--device cpu measures on the processor, slowly)")
        return 0
    arguments.where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"

    def say(line):
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            bench(name, stepper(name, Path(folder), arguments), arguments, say)
    return 0


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(main())
